"""What a load test measures, apart from any server: when requests are due, what came of them in numbers, and
which rate to try next.

A row is what is known of one request, its times in seconds since the run of its rate began: `due`, `sent`,
`first_token` (None without streaming), `end`, `status` ("ok", or how it failed), `input_tokens` and
`output_tokens` (None where the server does not say).
"""

import random
from collections import Counter
from collections.abc import Sequence

SERVED = 0.95  # of what is offered, below which a rate is not sustained
PERCENTILES = (50, 90, 99)


def arrivals(kind: str, rate: float, seconds: float, seed: int) -> list[float]:
    """When the round(rate x seconds) requests of a run are due. "constant": i / rate. "poisson": as a Poisson
    process has them, given that there are so many: sorted uniform numbers. So both offer the same rate."""
    count = max(1, round(rate * seconds))
    if kind == "constant":
        return [i / rate for i in range(count)]
    drawn = random.Random(f"arrivals {seed} {rate:g}")
    return sorted(drawn.uniform(0, seconds) for _ in range(count))


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest values in proportion, as NumPy's "linear"."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def distribution(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles; None of nothing."""
    if not values:
        return None
    found = {f"p{percent}": percentile(values, percent) for percent in PERCENTILES}
    return {"mean": sum(values) / len(values), **found}


def latency(row: dict, timeout: float) -> float:
    """Seconds from when a request was due to the end of its answer; a failure counts at least the timeout."""
    taken = row["end"] - row["due"]
    return taken if row["status"] == "ok" else max(taken, timeout)


def time_to_first_token(row: dict, timeout: float) -> float:
    """Likewise, to the first token."""
    return row["first_token"] - row["due"] if row["status"] == "ok" else latency(row, timeout)


def seconds_per_token(row: dict) -> float:
    """(latency - time to first token) / (tokens - 1)"""
    return (row["end"] - row["first_token"]) / (row["output_tokens"] - 1)


def measure(rows: Sequence[dict], seconds: float, timeout: float) -> dict:
    """What a record says of the run of one rate, whose requests were due within `seconds`. Rates are per
    second: `offered` of what was due, `sent` of what the client sent, `served` of successes from the first
    due to the last answer, or over `seconds` where that is earlier: no more can be served than is offered."""
    answered = [row for row in rows if row["status"] == "ok"]
    first_due = min(row["due"] for row in rows)
    drained = max(seconds, max(row["end"] for row in rows) - first_due)
    last_sent = max(row["sent"] for row in rows) - first_due
    streamed = [row for row in answered if row["first_token"] is not None]
    failed = [row for row in rows if row["status"] != "ok"]
    told = {name: [row[name] for row in answered] for name in ("input_tokens", "output_tokens")}
    firsts = [time_to_first_token(row, timeout) for row in streamed + failed]
    several = [row for row in streamed if (row["output_tokens"] or 0) > 1]
    return {
        "requests": len(rows),
        "answered": len(answered),
        "failures": dict(Counter(row["status"] for row in failed)),
        "seconds": drained,
        "offered": len(rows) / seconds,
        "sent": len(rows) / max(seconds, last_sent),
        "served": len(answered) / drained,
        "latency": distribution([latency(row, timeout) for row in rows]),
        "time_to_first_token": distribution(firsts) if streamed else None,
        "seconds_per_token": distribution([seconds_per_token(row) for row in several]),
        "lag": distribution([row["sent"] - row["due"] for row in rows]),
        **{name: None if None in counts else sum(counts) for name, counts in told.items()},
    }


def cached_share(before: tuple[float, float] | None, after: tuple[float, float] | None) -> float | None:
    """Of the prompts' tokens that a server looked up in its cache meanwhile, the share that it found there;
    None where it counts none."""
    if not before or not after or after[0] <= before[0]:
        return None
    return (after[1] - before[1]) / (after[0] - before[0])


def why_void(measured: dict, most_lag: float) -> str | None:
    """Why a run says nothing of the server, for the client was at its end; None where it was not."""
    own = sum(count for status, count in measured["failures"].items() if status.startswith("client"))
    if own:
        return f"{own:,} requests failed in the client: it ran out of files or ports (ulimit -n)"
    lag = measured["lag"]["p99"]
    if lag > most_lag:
        return (
            f"the client lagged: at p99 it sent {1000 * lag:,.0f} ms after due, over {1000 * most_lag:,.0f}"
        )
    return None


def why_not_sustained(measured: dict, slo: float | None = None) -> str | None:
    """Why a rate is not sustained: an error, less than 95 % served, or p90 over `slo` seconds; None where it
    is."""
    if measured["failures"]:
        each = ", ".join(f"{count:,} {status}" for status, count in measured["failures"].items())
        return f"of {measured['requests']:,} requests failed {each}"
    share = measured["served"] / measured["offered"]
    if share < SERVED:
        return f"{100 * share:.1f} % of the offered rate were served"
    if slo is not None and measured["latency"]["p90"] > slo:
        return f"p90 is {measured['latency']['p90']:.3f} s, over --slo_seconds {slo:g}"
    return None


def next_rate(tried: dict[float, bool], rates: Sequence[float], bisections: int) -> float | None:
    """The rate to try next, by which rates were sustained: `rates` up to the first that was not, then
    `bisections` times the middle between the highest that was and the lowest that was not. None after
    these."""
    for rate in rates:
        if rate not in tried:
            return rate
        if not tried[rate]:
            break
    good, bad = sustained(tried), min((rate for rate, good in tried.items() if not good), default=None)
    if good is None or bad is None or len(tried.keys() - {*rates}) >= bisections:
        return None
    middle = float(f"{(good + bad) / 2:.3g}")
    return middle if good < middle < bad else None


def sustained(tried: dict[float, bool]) -> float | None:
    """The highest rate that was sustained, as was every lower one that was tried."""
    bad = min((rate for rate, good in tried.items() if not good), default=float("inf"))
    return max((rate for rate, good in tried.items() if good and rate < bad), default=None)
