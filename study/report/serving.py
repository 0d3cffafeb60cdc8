"""Sweeps -> tables: what a server sustains, how fast it answers there, and what that costs."""

from collections.abc import Callable, Sequence

from study.records import cost
from study.records.schema import SCORES, SHORT, lookup
from study.report.cells import STATES, Cell, Table
from study.report.sweeps import Sweep, comparable_sweeps

KEYS = ("server", "model", "task", "GPU")
LOAD = "Inference under load"  # the table that published figures stand beside


def per_second(value: float) -> str:
    return f"{value:,.2f}" if value >= 1 else f"{value:.3g}"


def measured(sweep: Sweep, value: float | None, show: Callable[[float], str] = per_second) -> Cell:
    """What a sweep measured at its sustained rate; "—" where nothing was."""
    if value is None:
        return Cell("—", runs=(sweep,))
    return Cell(show(value), value, None, (sweep,), 1)


def sustained_cell(sweep: Sweep) -> Cell:
    """A lower bound stands there as text alone, lest it be taken for the value."""
    if not sweep.finished:
        return Cell(STATES.get(sweep.state, sweep.state), runs=(sweep,))
    if sweep.sustained is None:
        return Cell("none", runs=(sweep,))
    if sweep.bound:
        return Cell(f">= {sweep.sustained:g}", runs=(sweep,))
    return measured(sweep, sweep.sustained, "{:g}".format)


def serving_tables(sweeps: Sequence[Sweep], prices: Sequence[dict]) -> list[Table]:
    """What is sustained, what that costs, and the published layout; of each group that may share a table."""
    tables = []
    for why, group in comparable_sweeps(sweeps):
        ours = [sustained_table(group), cost_table(group, prices), load_table(group, prices)]
        for table in ours:
            table.title += f", apart: {why}" if why else ""
        tables += ours
    return tables


def sustained_table(group: Sequence[Sweep]) -> Table:
    """Rate, latency, time to the first token, and the scores of the answers under load."""
    columns = ["sustained", "served", "p50", "p90", "p99", "first token p50", "first token p90"]
    metrics = list(dict.fromkeys(next(iter(SCORES[sweep.task])) for sweep in group))
    titles = {metric: title for scores in SCORES.values() for metric, title in scores.items()}
    title = "the highest rate that each server sustains, and how it answers there"
    table = Table("Sustained", title, [*KEYS, *columns, *(titles[name] for name in metrics)], len(KEYS))
    for sweep in group:
        step = sweep.step or {}
        places = [lookup(step, f"latency.{name}") for name in ("p50", "p90", "p99")]
        places += [lookup(step, f"time_to_first_token.{name}") for name in ("p50", "p90")]
        table.add(
            *sweep.keys(),
            sustained_cell(sweep),
            measured(sweep, step.get("served")),
            *(measured(sweep, place, seconds) for place in places),
            *(score_cell(sweep, name) for name in metrics),
        )
    table.note = (
        "In requests/s: at the highest rate where no request failed, 95 % or more of what was offered were "
        "served, and p90 is within the SLO where there is one. Latency is from when a request was due. The "
        "first token's time is known where answers were streamed. Scores are of the answers at that rate, "
        "with their 95 % interval for other prompts; there is none where prompts were repeated."
    )
    told = remarks(group)
    table.note += "\n" * bool(told) + "".join(f"\n- {line}" for line in told)
    return table


def score_cell(sweep: Sweep, metric: str) -> Cell:
    found = None if sweep.random else lookup(sweep.step or {}, f"metrics.{metric}")
    if found is None:
        return Cell("—", runs=(sweep,))
    ends = found.get("ci95") and tuple(found["ci95"])
    interval = " [{:.1f}, {:.1f}]".format(*ends) if ends else ""
    return Cell(f"{found['value']:.2f}{interval}", found["value"], ends or None, (sweep,), 1)


def cost_table(group: Sequence[Sweep], prices: Sequence[dict]) -> Table:
    """Dollars by what was served, and beside them by what was offered."""
    kinds = ("1,000 requests", "1M tokens in", "1M tokens out")
    columns = [f"per {kind}{how}" for how in ("", ", by the rate offered") for kind in kinds]
    title = "what the sustained rate costs"
    table = Table("Cost under load", title, [*KEYS, "USD per hour", "served", *columns], len(KEYS))
    for sweep in group:
        both = [sweep.costs(prices, offered) if sweep.step else {} for offered in (False, True)]
        table.add(
            *sweep.keys(),
            priced(sweep, sweep.per_hour(prices)),
            measured(sweep, sweep.step and sweep.step["served"]),
            *(priced(sweep, costs.get(kind)) for costs in both for kind in kinds),
        )
    table.note = (
        "Requests, tokens in and tokens out bear the whole price each. By the rate offered stands for "
        "comparison alone: as if every request that was offered had been served within the time in which "
        "they were due."
    )
    return table


def load_table(group: Sequence[Sweep], prices: Sequence[dict]) -> Table:
    """The lines of the published tables, each at the highest rate that is sustained."""
    columns = ["per 1K tokens in", "per 1K tokens out", "RPS", "throughput", "tokens/s in", "tokens/s out"]
    title = "cost, rate and latency, as the published study has them"
    table = Table(LOAD, title, [*KEYS, *columns, "latency 90 %"], len(KEYS))
    for sweep in group:
        step = sweep.step
        per = sweep.costs(prices) if step else {}
        usd = [per.get(f"1M tokens {way}") for way in ("in", "out")]
        tokens = [step[name] if step else None for name in ("input_tokens", "output_tokens")]
        table.add(
            *sweep.keys(),
            *(priced(sweep, million and million / 1000) for million in usd),
            sustained_cell(sweep),
            measured(sweep, step and step["served"]),
            *(measured(sweep, count and count / step["seconds"], "{:,.0f}".format) for count in tokens),
            measured(sweep, step and step["latency"]["p90"], seconds),
        )
    table.note = (
        "At the sustained rate. RPS is that rate as offered, throughput the requests/s that were served. "
        "Cost is the price of an hour over the tokens served in it; tokens in and tokens out bear the whole "
        "of it each."
    )
    return table


def priced(sweep: Sweep, usd: float | None) -> Cell:
    """Of what was measured; "unknown" where the price or the tokens are not known."""
    return (
        Cell("unknown", runs=(sweep,)) if usd is None and sweep.step else measured(sweep, usd, cost.usd_text)
    )


def seconds(value: float) -> str:
    """Three digits, and no fewer than milliseconds."""
    return f"{value:,.3f} s" if value < 10 else f"{value:,.1f} s"


def remarks(group: Sequence[Sweep]) -> list[str]:
    """A line on each sweep whose rate is none, a bound, too low or too high."""
    told = []
    for sweep in group:
        place = f"{sweep.label}, {sweep.task}, {sweep.gpu}"
        if not sweep.finished:
            why = lookup(sweep.content, "error.message")
            why = why or next((s["why"] for s in last_rate(sweep) if s.get("status") == "void"), None)
            told.append(f"{place}: {STATES.get(sweep.state, sweep.state)}{f', {why}' if why else ''}.")
            continue
        if sweep.sustained is None:
            lowest = min(sweep.rates, key=lambda step: step["rate"])
            told.append(f"{place}: not even {lowest['rate']:g} requests/s, for {lowest['why']}.")
        elif sweep.bound:
            told.append(f"{place}: no higher rate was tried, so it may sustain more, for less.")
        cached = sweep.step and sweep.step.get("cached_prompt_share")
        if cached:
            told.append(
                f"{place}: {cached:.0%} of its prompts' tokens were in its cache of earlier ones, so prompts "
                "that differ are answered more slowly."
            )
        if sweep.step and sweep.step["latency"]["p50"] * SHORT > sweep.config["seconds"]:
            told.append(f"{place}: an answer takes over 1/{SHORT} of --seconds, so served is too low.")
    return told


def last_rate(sweep: Sweep) -> list[dict]:
    rates = lookup(sweep.content, "serve.rates")
    return [step for step in rates[-1:] if isinstance(step, dict)] if isinstance(rates, list) else []
