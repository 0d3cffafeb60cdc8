"""Which runs of a group a table shows, and what is to be said of them."""

import re
from collections.abc import Iterable, Sequence

from study.cli import parse_args
from study.records.schema import lookup
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


def models_of(group: Iterable[Run]) -> list[str]:
    return in_order({run.model for run in group})


def labels_of(group: Iterable[Run]) -> list[str]:
    return in_order({run.label for run in group})


def tuned(group: Iterable[Run], label: str | None = None) -> list[Run]:
    """The runs of methods that train: of all, or of the column `label`."""
    return [run for run in group if run.method.trains and label in {None, run.label}]


def usual_runs(group: Iterable[Run], label: str) -> list[Run]:
    """A column's runs of one setting of its method's knobs: those that were run with the most training
    shares, or else seeds; or else its script's defaults, or else the most epochs and the highest rank."""
    ours = tuned(group, label)

    def rank(setting: tuple) -> tuple:
        same = [run for run in ours if run.setting == setting]
        knobs = dict(zip(same[0].method.knobs, setting, strict=True))
        usual = {name: defaults_of(same[0]).get(name) for name in knobs}
        size = knobs.get("epochs", 0), knobs.get("lora_r", 0), -knobs.get("dropout", 0), str(setting)
        return len({run.share for run in same}), len(same), knobs == usual, *size

    best = max({run.setting for run in ours}, key=rank, default=None)
    return [run for run in ours if run.setting == best]


def defaults_of(run: Run) -> dict:
    """The flags that the run's script has where none are given."""
    kind, task = run.config.get("kind", "causal"), run.task
    words = [
        f"--{name}={run.config[name]}" for name in ("task_type", "tuning", "method") if name in run.config
    ]
    return vars(parse_args(None if "task_type" in run.config else task, "", words, kind))


def on_everything(group: Iterable[Run], label: str) -> list[Run]:
    """Of the `usual_runs` those with the largest training share."""
    ours = usual_runs(group, label)
    return [run for run in ours if run.share == max(run.share for run in ours)]


def by_method(group: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each column of Table 1 on the largest training share, and those of each model that was not
    trained, by its name and method."""
    group = list(group)
    found = {label: on_everything(group, label) for label in labels_of(tuned(group))}
    for run in group:
        if not run.method.trains:
            found.setdefault(f"{run.model}, {run.way}", []).append(run)
    return found


def by_examples(of: Iterable[Run]) -> dict[int, list[Run]]:
    """Runs that were trained and scored by the number of their training examples, ascending."""
    points = {}
    for run in of:
        if run.scored and run.train:
            points.setdefault(run.train["train"]["examples"], []).append(run)
    return {count: points[count] for count in sorted(points)}


def settings_of(of: Sequence[Run]) -> str:
    """E.g. "rank 8, epochs 5, dropout 0.1"; "" for a method without knobs."""
    knobs = zip(of[0].method.knobs.values(), of[0].setting, strict=True)
    return ", ".join(f"{title} {value:g}" for title, value in knobs)


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
