"""What all records took together, whether a table shows them or not."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from study.errors import UserError
from study.records import attempts, cost, record, schema
from study.report.cells import duration
from study.report.collect import records_in

FAILED = ("failed", "oom", "interrupted")


def spent_in_all(folders: Iterable[Path], prices: Sequence[dict]) -> str:
    """One sentence on the time and the dollars of every attempt that the records in the folders tell of, each
    record once, and on what it can't tell; "" where it can tell nothing."""
    histories, unreadable = read_all(folders)
    every = [attempt for history in histories for attempt in history]
    if not every:
        return ""
    failed = sum(attempt["status"] in FAILED for attempt in every)
    repeated = sum(attempt["status"] == "finished" for history in histories for attempt in history[:-1])
    seconds = [attempt["wall_seconds"] for attempt in every if is_timed(attempt)]
    usd = [usd_of(attempt, prices) for attempt in every if is_timed(attempt)]
    known = [dollars for dollars in usd if dollars is not None]
    untimed, unpriced = len(every) - len(seconds), len(usd) - len(known)

    redone = [f"{n} {what}" for n, what in ((failed, "failed"), (repeated, "repeated")) if n]
    told = f", with {' and '.join(redone)} {runs(failed + repeated)}" if redone else ""
    told += f": {duration(sum(seconds)) if seconds else 'unknown time'}"
    told += f", {cost.usd_text(sum(known) if known else None)}"
    more = ((unpriced if known else 0, "price"), (untimed if seconds else 0, "time"))
    beside = [f"{n} {runs(n)} of unknown {what}" for n, what in more if n]
    told += f" (and {' and '.join(beside)})" if beside else ""
    told += f"; not counted: {unreadable} unreadable record{'s' * (unreadable > 1)}" if unreadable else ""
    return f"Spent in all{told}."


def read_all(folders: Iterable[Path]) -> tuple[list[list[dict]], int]:
    """The attempts of each record in the folders, and how many records can't be read."""
    histories, unreadable = [], 0
    for path in sorted({path.resolve() for folder in folders for path in records_in(folder)}):
        try:
            content = record.read(path)
            if content:  # a run that goes on may have ended since
                schema.check(content, path)
                histories.append(attempts.of_record(content))
        except UserError:
            unreadable += 1
    return histories, unreadable


def is_timed(attempt: dict) -> bool:
    return attempt.get("wall_seconds") is not None


def usd_of(attempt: dict, prices: Sequence[dict]) -> float | None:
    """Dollars of an attempt by `prices`, or else as recorded; None where its price is not known."""
    spent = attempt.get("cost")
    per_hour = cost.repriced(spent, prices, spent.get("gpus") or 1) if spent else None
    return cost.usd(per_hour, attempt["wall_seconds"])


def runs(count: int) -> str:
    return "run" if count == 1 else "runs"
