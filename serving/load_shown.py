"""What a load test prints: a line for each rate, and the result block."""

from study.records import cost
from study.records.schema import SHORT

HEAD = f"{'rate':>8}{'sent':>9}{'served':>9}{'p50 s':>9}{'p90 s':>9}{'p99 s':>9}{'lag ms':>8}{'failed':>8}"


def say_step(step: dict) -> str:
    times = "".join(f"{step['latency'][name]:9.3f}" for name in ("p50", "p90", "p99"))
    line = f"{step['rate']:8g}{step['sent']:9.2f}{step['served']:9.2f}{times}{1000 * step['lag']['p99']:8.1f}"
    failed = step["requests"] - step["answered"]
    return f"{line}{failed:8,}  {step['status']}{': ' + step['why'] if step['why'] else ''}"


def result_block(content: dict) -> str:
    """What a finished sweep ends with: the sustained rate, and of that rate latency, scores and cost."""
    part, config = content["serve"], content["config"]
    rate = part["sustained"]
    if rate is None:
        shown = part["rates"][0]
        lines = [f"sustained  none: not even {shown['rate']:g} requests/s"]
    else:
        [shown] = [step for step in part["rates"] if step["rate"] == rate]
        ends = "" if part["knee"] else ", the highest that was tried: give higher --rates to find the knee"
        lines = [f"sustained  {rate:g} requests/s{ends}"]
    told = ", ".join(f"{place} {value:.3f}" for place, value in shown["latency"].items())
    lines.append(f"latency    at {shown['rate']:g} requests/s {told} s, from when a request was due")
    for name, title in (("time_to_first_token", "first token"), ("seconds_per_token", "then each")):
        if shown[name]:
            told = ", ".join(f"{place} {value:.4f}" for place, value in shown[name].items())
            lines.append(f"streamed   {title} after {told} s")
    if shown["latency"]["p50"] * SHORT > config["seconds"]:
        lines.append(
            f"{'':11}an answer takes over 1/{SHORT} of --seconds, which lowers the served rate: raise it"
        )
    if shown.get("cached_prompt_share"):
        lines.append(
            f"cache      {shown['cached_prompt_share']:.0%} of the prompts' tokens were there from earlier "
            "ones; others take longer"
        )
    for name, metric in shown["metrics"].items():
        ends = "  ({:.2f} to {:.2f})".format(*metric["ci95"]) if metric["ci95"] else ""
        lines.append(f"{name:<16}{metric['value']:6.2f} %{ends}")
    lines.append(f"cost       {say_costs(cost.of_served(content['cost']['price_per_hour'], shown))}")
    lines.append(f"spent      {part['wall_seconds']:,.0f} s, {part['requests']:,} requests")
    return "\n".join(lines)


def say_costs(costs: dict) -> str:
    """At the served rate, the machine's whole price on requests, on tokens in or on tokens out."""
    known = [f"{cost.usd_text(usd)} per {what}" for what, usd in costs.items() if usd is not None]
    return ", ".join(known) or "unknown price: --price_per_hour gives it"
