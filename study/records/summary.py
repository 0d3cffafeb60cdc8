"""The result block that a script ends with."""

from study.records import cost


def result_block(content: dict) -> str:
    """What a script prints at its end, and for a run that is finished already."""
    lines = []
    if "train" in content:
        part, speed = content["train"], f"{content['train']['tokens_per_second']:,.0f} tokens/s"
        lines.append(
            f"trained    loss {part['loss']:.4f} over the last epoch; {part['examples']:,} examples, "
            f"{part['steps']:,} steps, {part['tokens']:,} tokens, {part['trainable_parameters']:,} trainable "
            "parameters"
        )
    if "eval" in content:
        part, speed = content["eval"], f"{content['eval']['examples_per_second']:,.1f} examples/s"
        for name, metric in part["metrics"].items():
            low, high = metric["ci95"]
            lines.append(f"{name:<16}{metric['value']:6.2f} %  (95 % interval {low:.2f} to {high:.2f})")
        lines.append(
            f"scored     {part['examples']:,} examples, {content['method']}, {part['decoding']} decoding, "
            f"{part['input_tokens']:,} tokens in, {part['output_tokens']:,} out"
        )
    lines.append(
        f"spent      {part['wall_seconds']:,.0f} s in all, {part['seconds']:,.0f} s at {speed}, peak "
        f"{part['peak_memory_gib']:.2f} GiB, {cost.usd_text(content['cost']['usd'])} on "
        f"{cost.shown(content['cost'])}"
    )
    return "\n".join(lines)
