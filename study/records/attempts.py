"""Attempts at a run: that of a record itself, those that it replaced, and those that failed over it.

Each is {"status", "finished", "wall_seconds", "cost"}: how and when it ended, the seconds of its process, and
their cost as a record has it; these two are None where they are not known.
"""

from collections.abc import Sequence

from study.records import cost
from study.records.schema import PARTS


def measured(content: dict) -> dict:
    """What holds the seconds of a record: the part that it is of, or itself where that has no result."""
    return next((content[name] for name in PARTS if name in content), content)


def of_record(content: dict) -> list[dict]:
    """Every attempt that a record tells of, its own the last; the record is one that `schema.check` takes."""
    spent, part = content.get("cost"), measured(content)
    own = {
        **{"status": content["status"], "finished": content.get("finished")},
        **{"wall_seconds": part.get("wall_seconds"), "cost": spent and {"gpus": cost.gpus_of(part), **spent}},
    }
    return [*(content.get("spent_before") or []), own]


def without(attempts: Sequence[dict], seconds: float) -> list[dict]:
    """The attempts less `seconds` of those that did not finish, the latest first: one that went on from what
    they had kept has these seconds among its own."""
    left = []
    for attempt in reversed(attempts):
        taken = 0 if attempt["status"] == "finished" else min(seconds, attempt.get("wall_seconds") or 0)
        seconds -= taken
        left.append(less(attempt, taken) if taken else attempt)
    return left[::-1]


def less(attempt: dict, seconds: float) -> dict:
    took, spent = attempt["wall_seconds"] - seconds, attempt.get("cost")
    usd = spent and cost.usd(spent.get("price_per_hour"), took)
    return attempt | {"wall_seconds": took, "cost": spent and spent | {"usd": usd}}
