"""The result block that a script ends with."""

import json

from study.records import cost
from study.records.schema import FEW, METHODS

MANY = 10  # percent of invalid answers, above which the commonest are shown


def result_block(content: dict) -> str:
    """What a script prints at its end, and for a run that is finished already."""
    lines = []
    if "train" in content:
        part = content["train"]
        counts = ("examples", "steps", "tokens", "trainable_parameters")
        told = ", ".join(f"{part[name]:,} {name.replace('_', ' ')}" for name in counts if name in part)
        loss = f"loss {part['loss']:.4f} over the last epoch; " if "loss" in part else ""
        lines.append(f"trained    {loss}{told}")
        known = part["tokens_per_second"] is not None
        speed = f"{part['tokens_per_second']:,.0f} tokens/s" if known else "unknown speed"
    if "eval" in content:
        part, speed = content["eval"], f"{content['eval']['examples_per_second']:,.1f} examples/s"
        decoding = part.get("decoding", "unknown")
        how = "" if decoding == "none" else f"{decoding} decoding, "
        for name, metric in part["metrics"].items():
            ends = "no interval holds: too few examples, or all alike"
            if metric["ci95"]:
                ends = "95 % interval {:.2f} to {:.2f}".format(*metric["ci95"])
            over = f" over {metric['classes']} classes" if "classes" in metric else ""
            lines.append(f"{name:<16}{metric['value']:6.2f} %  ({ends}){over}")
        lines += remarks(part, seeded="seed" in METHODS[content["method"]].settings)
        lines += invalid_answers(part, may_be_constrained=content["config"].get("decoding") == "free")
        lines.append(
            f"scored     {part['examples']:,} examples, {content['method']}, {how}"
            f"{part['input_tokens']:,} tokens in, {part['output_tokens']:,} out"
        )
    lines.append(
        f"spent      {part['wall_seconds']:,.0f} s in all, {part['seconds']:,.0f} s at {speed}, peak "
        f"{part['peak_memory_gib']:.2f} GiB, {cost.usd_text(content['cost']['usd'])} on "
        f"{cost.shown(content['cost'])}"
    )
    return "\n".join(lines)


def remarks(scored: dict, seeded: bool) -> list[str]:
    """What a reader of the scores in a record's `eval` should know."""
    value = {name: metric["value"] for name, metric in scored["metrics"].items()}
    lines = ["intervals  of other test examples; another seed may score otherwise"] if seeded else []
    if scored["examples"] < FEW:
        lines.append(f"intervals  rough: fewer than {FEW} test examples")
    above = [name for name in ("micro_f1", "macro_f1") if value.get(name, 0) > value.get("accuracy", 100)]
    if above and value["invalid_answers"]:
        lines.append(f"{' and '.join(above)} exceed accuracy by invalid answers: misses, but no false alarms")
    return lines


def invalid_answers(scored: dict, may_be_constrained: bool) -> list[str]:
    """Where many answers of a record's `eval` name no class: the commonest, and the flag that helps."""
    share = scored["metrics"].get("invalid_answers", {"value": 0})["value"]
    common = scored.get("commonest_invalid")  # which older records lack
    if share <= MANY or not common:
        return []
    lines = ["invalid    answers that name no class, the commonest:"]
    lines += [f"{'':11}{count:>7,}  {json.dumps(text, ensure_ascii=False)}" for text, count in common]
    mend = f"{'':11}--decoding constrained lets the model choose among the class names only"
    return lines + [mend] * may_be_constrained
