"""Records -> runs, in groups whose scores may share a table."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from study import metrics
from study.cli import SHOTS
from study.errors import UserError
from study.records import record, runs
from study.records.schema import METHODS, PARTS, SCORES, SCORING, Method, lookup, part_of

# Settings that name a cell of a table, or show in the test data. All others tell variants of a cell apart.
ELSEWHERE = {
    *("pretrained_ckpt", "test_file", "validation_file", "split", "max_eval_samples"),
    *("test_fraction", "unseen_labels", "task", "prompt_type", "train_sample_fraction", "seed"),
}


@dataclass(eq=False)
class Run:
    """A training and one evaluation of it, or the evaluation of a model that was not trained here.

    `path` and `content` are of the evaluation's record, or of the training's where there is none. Without a
    score, `state` says why: "not scored", "running", "oom", "failed", "interrupted" or "unfinished".
    """

    path: Path
    content: dict
    train: dict | None
    state: str
    variant: str = ""
    name: str = ""  # of the model
    way: str = ""  # the method and, of classes that a model was not trained to name, how they are decoded
    label: str = ""  # the model, and the method where others trained it too: a column of what was trained
    among: int = 1  # of how many settings it has the one that was chosen by its score
    chosen_by: "Run | None" = None  # the same training on the validation split
    examples: metrics.Answers | metrics.Summaries | None = None  # what came of each; None of an older record

    def __post_init__(self):
        self.task, self.config = self.content["task"], self.content["config"]
        self.method: Method = METHODS[self.content["method"]]
        self.scored = self.content["eval"] if self.state == "finished" else None
        self.share = self.config.get("train_sample_fraction")
        self.setting = tuple(self.config.get(name) for name in self.method.knobs)
        self.seed = self.config.get("seed") if "seed" in self.method.settings else None

    @property
    def model(self) -> str:
        """The model's name, with what tells this run from others of the same cell."""
        return self.name + (f" ({self.variant})" if self.variant else "")

    @property
    def random(self) -> bool:
        """Whether nobody trained its weights: what it took is measured, what it scores says nothing."""
        return bool(lookup(self.content, "checkpoint.random_weights"))

    def records(self) -> list[Path]:
        beside = self.path.with_name("train.json")
        return [self.path] if self.train is None or self.path == beside else [beside, self.path]

    @cached_property
    def values(self) -> dict[str, np.ndarray]:
        """What each test example adds to each metric, as a share of 1; empty where `examples` is None."""
        return self.examples.values() if self.examples else {}

    @property
    def confident(self) -> bool:
        """Whether it says how sure each answer is."""
        return bool(self.scored and (self.scored.get("per_example") or {}).get("confidences"))

    @property
    def should_be_confident(self) -> bool:
        return self.method.confident or (self.scored or {}).get("decoding") == "constrained"

    @property
    def references(self) -> list[str]:
        """The class of each test example; none of summaries."""
        found = (self.scored and self.scored.get("per_example")) or {}
        return [found["classes"][i] for i in found.get("references", [])]

    def test(self) -> dict:
        """The description of the split that was scored."""
        return self.content["data"][self.config["split"]]

    def weights(self) -> str:
        """What tells the checkpoint from others of the same name."""
        sha256 = lookup(self.content, "checkpoint.sha256")
        return sha256[:8] if sha256 else "not recorded"

    def identity(self) -> tuple:
        """What no two runs have in common."""
        more = self.path.name
        if self.scored:
            more = self.test()["sha256"], self.content.get("prompt_sha256"), self.weights()
        return *self.cell(), more

    def cell(self) -> tuple:
        """What tells a run from all others but those of other weights or another test."""
        method = self.content["method"]
        variant = tuple(str(self.config.get(name)) for name in variants(method))
        return self.task, self.content["model"], method, self.share, *self.setting, self.seed, variant

    def scored_on(self) -> tuple:
        """A cell, and what was scored of it, whole or in part."""
        sources = (self.config.get(name) for name in ("split", "test_file", "validation_file"))
        return *self.cell(), *sources, prompt_of(self), self.weights()


def find_runs(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Every run in the folders, and a line for each record that is left out, with the reason."""
    found: dict[tuple, Run] = {}
    problems = []
    for folder in folders:
        paths = records_in(folder)
        if not paths:
            problems.append(f"{folder} holds no records: name the folder of a run, or one above it")
        for run_folder in sorted({path.parent for path in paths}):
            try:
                read = runs_of(run_folder)
            except UserError as error:
                problems.append(str(error))
                continue
            for run in read:
                twin = found.setdefault(run.identity(), run)
                if twin is not run and twin.path.resolve() != run.path.resolve():
                    old, new = sorted((twin, run), key=lambda run: run.content.get("finished", ""))
                    problems.append(
                        f"{old.path} is left out: {new.path} is of the same cell and seed, and newer"
                    )
                    found[run.identity()] = new
    return list(found.values()), problems


def records_in(folder: Path) -> list[Path]:
    """The records below a folder; hidden folders, where the loops calibrate, do not count."""
    found = []
    for place, folders, files in os.walk(folder):
        found += [Path(place, name) for name in (*folders, *files) if part_of(name)]
        folders[:] = [name for name in folders if not name.startswith(".")]
    return found


def runs_of(folder: Path) -> list[Run]:
    """The runs in one folder: one for each evaluation, or one that has none. Raises UserError for a record
    that is not as it should be."""
    trained, trained_state = record.read_standing(folder / "train.json")
    finished = trained and trained["status"] == "finished"
    pattern = PARTS["eval"].files
    names = {path.name.lstrip(".") for hidden in ("", ".") for path in folder.glob(hidden + pattern)}
    found = []
    for path in (folder / name for name in sorted(names)):
        content, state = record.read_standing(path)
        if finished and state == "finished" and not runs.has_scored(path, content, trained):
            raise UserError(f"{path} scored an earlier training than the one beside it: score it again")
        examples = check_examples(content, path) if state == "finished" else None
        found.append(Run(path, content, trained if finished else None, state, examples=examples))
    validated = [run for run in found if run.scored and run.config["split"] == "validation"]
    for run in (run for run in found if run.config["split"] != "validation"):
        alike = [other for other in validated if other.cell() == run.cell()]  # e.g. by the same decoding
        run.chosen_by = max(alike, key=lambda other: other.scored["examples"], default=None)
    if not found and trained:
        path = folder / "train.json"
        state = "not scored" if finished else trained_state
        found = [Run(path, trained, trained if finished else None, state)]
    return found


def check_examples(content: dict, path: Path) -> metrics.Answers | metrics.Summaries | None:
    """What came of each example of a finished evaluation; None of an older record. Raises UserError where
    they are not those of its split, or do not give its scores."""
    if not content["eval"].get("per_example"):
        return None
    rows = content["data"][content["config"]["split"]]["rows"]
    if content["eval"]["examples"] != rows:
        raise UserError(
            f"{path} scored {content['eval']['examples']} examples of {rows}: --force redoes the run"
        )
    return metrics.check(content["eval"], path)


def comparable(found: Sequence[Run]) -> list[tuple[str, str, list[Run]]]:
    """Groups of runs whose scores may share a table: (task, why the group stands apart, runs).

    The largest group on a test split, or on any, has no reason to stand apart. Runs without a score go to the
    largest group on the split that their flags name. A group
    of nothing but looks (`looks_among`) is left out.
    """
    result, places = [], {}
    for task in SCORES:
        groups = defaultdict(list)
        ours = [run for run in found if run.task == task]
        usual, schedules = {}, {}
        for method in METHODS.values():
            of = [run for run in ours if run.scored and run.method is method]
            usual[id(method)] = most_common(map(prompt_of, of), "")
            schedules[id(method)] = most_common(map(schedule_of, of), "")
        for run in ours:
            if run.scored:
                test, prompt, title = run.test(), prompt_of(run), run.method.title
                schedule = schedule_of(run)
                split = f"{test['rows']:,} {run.config['split']} examples"
                source = f"{split} of {test['source']} (sha256 {test['sha256'][:8]})"
                key = (
                    places.setdefault(test["sha256"], source),  # the same data has other names elsewhere
                    f"metrics of version {run.scored.get('metrics_version', 'unknown')}",
                    "" if prompt == usual[id(run.method)] else f"{title} prompt {prompt[:8] or 'none'}",
                    "" if schedule == schedules[id(run.method)] else f"{title} by {schedule}",
                )
                groups[key].append(run)
        looks = looks_among(ours)
        groups = defaultdict(list, {key: of for key, of in groups.items() if not looks.issuperset(of)})
        splits = {key: of[0].config["split"] for key, of in groups.items()}
        rank = {key: (splits[key] != "test", -len(of), key) for key, of in groups.items()}
        ordered = sorted(rank, key=rank.get) or [()]
        for run in ours:
            if not run.scored:
                same = (key for key in ordered if splits.get(key) == run.config.get("split"))
                groups[next(same, ordered[0])].append(run)
        for key in ordered:
            why = "; ".join(mine for mine, main in zip(key, ordered[0], strict=True) if mine != main)
            if groups[key]:
                result.append((task, why, groups[key]))
    for _, _, group in result:
        name_runs(group)
    return result


def meant(groups: Sequence[tuple[str, str, list[Run]]]) -> list[tuple[str, str, list[Run]]]:
    """The groups without runs of random weights, which have time, memory and cost but no score to show."""
    kept = [(task, why, [run for run in group if not run.random]) for task, why, group in groups]
    return [(task, why, group) for task, why, group in kept if group]


def most_common(values: Iterable, otherwise):
    counts = Counter(values)
    return max(counts, key=counts.get, default=otherwise)


def schedule_of(run: Run) -> str:
    """Whether records named the learning rate's schedule when it was trained: before, the warm-up was a share
    of all steps, so that a training of fewer epochs was not the beginning of one of more."""
    trained = run.train["train"] if run.train else {}
    named = "schedule" in trained or not trained.get("loss_history")
    return f"a learning rate's {'' if named else 'un'}named schedule"


def looks_among(found: Iterable[Run]) -> set[Run]:
    """The runs that were scored on some examples only (--max_eval_samples), and otherwise on more of them."""
    scored, most = [run for run in found if run.scored], {}
    for run in scored:
        most[run.scored_on()] = max(run.test()["rows"], most.get(run.scored_on(), 0))
    few = (run for run in scored if run.config.get("max_eval_samples"))
    return {run for run in few if run.test()["rows"] < most[run.scored_on()]}


def say_left_out(found: Sequence[Run], groups: Sequence[tuple]) -> str:
    """A sentence on the looks that `comparable` has left out of the groups; "" if there are none."""
    count = len({*found} - {run for _, _, group in groups for run in group})
    told = f"{count:,} evaluation{'s' * (count > 1)} of fewer examples (--max_eval_samples)"
    return f"Left out: {told} of what was scored in whole." if count else ""


def name_runs(group: Sequence[Run]) -> None:
    """Give each run of a group its `name`, `variant`, `way` and `label`: as much as tells it from others."""
    of_model, of_method = defaultdict(list), defaultdict(list)
    for run in group:
        of_model[run.content["model"]].append(run)
        of_method[run.content["method"]].append(run)
    names = {model: name_of(model, {*of_model}) for model in of_model}
    weights = {model: {run.weights() for run in of if run.scored} for model, of in of_model.items()}
    told_apart = {method: varying(method, of) for method, of in of_method.items()}
    for run in group:
        run.name, differ = names[run.content["model"]], told_apart[run.content["method"]]
        told = ["random weights"] * run.random
        told += [named for name in differ if name in run.config and (named := setting_named(run, name))]
        if run.scored and len(weights[run.content["model"]]) > 1:
            told.append(f"weights {run.weights()}")
        run.variant = ", ".join(told)
        run.way = run.method.title
        decoding = run.task == "classification" and not run.method.trains and run.config.get("decoding")
        if decoding and "decoding" not in differ:
            run.way += f", {decoding} decoding"
    trained = {(run.name, run.method.title) for run in group if run.method.trains}
    several = {name for name, count in Counter(name for name, _ in trained).items() if count > 1}
    for run in group:
        run.label = f"{run.model}, {run.method.title}" if run.name in several else run.model


def setting_named(run: Run, name: str) -> str:
    """E.g. "learning_rate 0.001", or for a switch "merge_labels"; "" where it is not set."""
    value = run.config[name]
    if value is None and name == "shots":  # by default
        value = SHOTS[run.task]
    return "" if value is None else name if value is True else f"{name} {value}"


def name_of(model: str, others: set[str]) -> str:
    """A hub id, or as much of the end of a local path as tells it from the other models."""
    parts = model.rstrip("/").split("/")
    for count in range(min(2, len(parts)), len(parts) + 1):
        name = "/".join(parts[-count:])
        if not any(other != model and f"/{other.rstrip('/')}".endswith(f"/{name}") for other in others):
            return name
    return model


def prompt_of(run: Run) -> str:
    """What tells the prompt of a run from others; "" for a method without one."""
    return run.content.get("prompt_sha256") or ""


@cache
def variants(method: str) -> list[str]:
    """The settings in which runs of one cell of a method may differ, beside their seeds."""
    about = METHODS[method]
    return sorted({*about.settings, *SCORING} - ELSEWHERE - {*about.knobs})


def varying(method: str, same: Sequence[Run]) -> list[str]:
    """The variants' settings in which the runs of a group that have this method differ."""
    return [name for name in variants(method) if len({str(run.config.get(name)) for run in same}) > 1]
