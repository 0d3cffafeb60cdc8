"""Which runs of a group a table shows, and what is to be said of them."""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from statistics import mean
from typing import Any

from study.cli import parse_args
from study.records.schema import SCORES, lookup
from study.report.collect import Run

ORDER = (  # of the models as the published tables have them; all others come after
    *(r"\bdistilbert", r"\bbert-", r"\bflan-t5-base", r"\bflan-t5-large", r"\bfalcon-7b"),
    *(r"\bredpajama\S*-3b", r"\bredpajama\S*-7b", r"\bllama-?2-7b", r"\bllama-?2-13b"),
)


def in_order(names: Iterable[str]) -> list[str]:
    """The models of the published tables in their order, then the others by name."""

    def place(name: str) -> tuple[int, str]:
        found = (i for i, pattern in enumerate(ORDER) if re.search(pattern, name, re.IGNORECASE))
        return next(found, len(ORDER)), name

    return sorted(names, key=place)


def tuned(group: Iterable[Run]) -> list[Run]:
    """The runs of methods that train."""
    return [run for run in group if run.method.trains]


def by(key: Callable[[Run], Any], group: Iterable[Run]) -> dict[Any, list[Run]]:
    """The runs that have the same `key`, in their order."""
    found: dict[Any, list[Run]] = {}
    for run in group:
        found.setdefault(key(run), []).append(run)
    return found


def by_column(group: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each column of what was trained, by its label, in the tables' order."""
    found = by(lambda run: run.label, tuned(group))
    return {label: found[label] for label in in_order(found)}


def usual_runs(column: Iterable[Run]) -> list[Run]:
    """A column's runs of one setting of its method's knobs: those that were run with the most training
    shares, or else seeds. Of several, on validation examples the best; on others, where choosing by the score
    would flatter it, its script's defaults, or else the most epochs and the highest rank."""
    by_setting = by(lambda run: run.setting, column)
    if not by_setting:
        return []

    def often(setting: tuple) -> tuple:
        same = by_setting[setting]
        return len({run.share for run in same}), len(same)

    def rank(setting: tuple) -> tuple:
        same = by_setting[setting]
        knobs = dict(zip(same[0].method.knobs, setting, strict=True))
        plain = defaults_of(same[0])
        usual = {name: plain.get(name) for name in knobs}
        size = knobs.get("epochs", 0), knobs.get("lora_r", 0), -knobs.get("dropout", 0), str(setting)
        return knobs == usual, *size

    most = max(map(often, by_setting))
    rivals = [setting for setting in by_setting if often(setting) == most]
    if any(run.config.get("split") != "validation" for setting in rivals for run in by_setting[setting]):
        return by_setting[max(rivals, key=rank)]
    chosen = by_setting[max(rivals, key=lambda setting: (mean_score(by_setting[setting]), rank(setting)))]
    for run in chosen:
        run.among = sum(mean_score(by_setting[setting]) >= 0 for setting in rivals)
    return chosen


def mean_score(of: Sequence[Run]) -> float:
    """The task's first metric; less than any score where a run has none."""
    metric = next(iter(SCORES[of[0].task]))
    return mean(run.scored["metrics"][metric]["value"] if run.scored else -1 for run in of)


def defaults_of(run: Run) -> dict:
    """The flags that the run's script has where none are given."""
    words = (
        f"--{name}={run.config[name]}" for name in ("task_type", "tuning", "method") if name in run.config
    )
    task = None if "task_type" in run.config else run.task
    return plain_flags(task, run.config.get("kind", "causal"), *words)


@cache
def plain_flags(task: str | None, kind: str, *words: str) -> dict:
    """Of a script's command line `words`; looked up for each setting, made once. Not to be changed."""
    return vars(parse_args(task, "", words, kind))


def on_everything(column: Iterable[Run]) -> list[Run]:
    """Of a column's `usual_runs` those with the largest training share."""
    ours = usual_runs(column)
    largest = max((run.share for run in ours), default=None)
    return [run for run in ours if run.share == largest]


def by_method(group: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each column of Table 1 on the largest training share, and those of each model that was not
    trained, by its name and method."""
    group = list(group)
    found = {label: on_everything(of) for label, of in by_column(group).items()}
    for run in group:
        if not run.method.trains:
            found.setdefault(f"{run.model}, {run.way}", []).append(run)
    return found


def by_examples(of: Iterable[Run]) -> dict[int, list[Run]]:
    """Runs that were trained and scored by the number of their training examples, ascending."""
    scored = (run for run in of if run.scored and run.train)
    points = by(lambda run: run.train["train"]["examples"], scored)
    return {count: points[count] for count in sorted(points)}


def settings_of(of: Sequence[Run]) -> str:
    """E.g. "rank 8, epochs 5, dropout 0.1"; "" for a method without knobs."""
    knobs = zip(of[0].method.knobs.values(), of[0].setting, strict=True)
    told = ", ".join(f"{title} {value:g}" for title, value in knobs)
    return told + (f", the best of {of[0].among} settings by these very scores" if of[0].among > 1 else "")


def note_on(settings: dict[str, Sequence[Run]]) -> str:
    """Which settings the runs of each column have."""
    told = {label: settings_of(of) for label, of in settings.items()}
    return "".join(f"{label}: {knobs}. " for label, knobs in told.items() if knobs)


def trained_on(of: Iterable[Run], share: bool = False) -> str:
    """How many training examples, e.g. "10", and with `share` of how many: "10 of 480 (2.1 %)"."""
    found = set()
    for run in of:
        if run.train:
            count, all_of_them = run.train["train"]["examples"], lookup(run.train, "data.train.available")
            taken = share and all_of_them and count < all_of_them
            part = f" of {all_of_them:,} ({100 * count / all_of_them:.1f} %)" if taken else ""
            found.add(f"{count:,}{part}")
    return " or ".join(sorted(found)) or "—"
