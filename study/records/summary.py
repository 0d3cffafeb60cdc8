"""The result block that a script ends with."""

from study.records import cost


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
        for name, metric in part["metrics"].items():
            low, high = metric["ci95"]
            lines.append(f"{name:<16}{metric['value']:6.2f} %  (95 % interval {low:.2f} to {high:.2f})")
        lines.append(
            f"scored     {part['examples']:,} examples, {content['method']}, {decoding} decoding, "
            f"{part['input_tokens']:,} tokens in, {part['output_tokens']:,} out"
        )
    lines.append(
        f"spent      {part['wall_seconds']:,.0f} s in all, {part['seconds']:,.0f} s at {speed}, peak "
        f"{part['peak_memory_gib']:.2f} GiB, {cost.usd_text(content['cost']['usd'])} on "
        f"{cost.shown(content['cost'])}"
    )
    return "\n".join(lines)
