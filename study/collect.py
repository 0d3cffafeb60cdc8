"""Records -> runs, in groups whose scores may share a table."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from study import record, runs
from study.cli import DEFAULTS, UserError

METHODS = ("zero-shot", "few-shot", "fine-tuned")
KNOBS = {"lora_r": "rank", "epochs": "epochs", "dropout": "dropout"}
# Settings that neither name a cell of a table nor show in the test data: they tell variants of a cell apart.
ELSEWHERE = {
    "pretrained_ckpt",
    "test_file",
    "validation_file",
    "split",
    "max_eval_samples",
    "task",
    "prompt_type",
}
VARIANTS = sorted({*runs.TRAINED, *runs.BASELINE} - ELSEWHERE - {"seed"})
NEEDED = {
    "train": "examples seconds wall_seconds peak_memory_gib tokens_per_second loss_history",
    "eval": "examples seconds wall_seconds peak_memory_gib examples_per_second input_tokens output_tokens "
    "metrics",
}


@dataclass(eq=False)
class Run:
    """A training and one evaluation of it, or the evaluation of a baseline.

    `path` and `content` are of the evaluation's record, or of the training's where there is none. Without a
    score, `state` says why: "not scored", "running", "oom", "failed", "interrupted" or "unfinished".
    """

    path: Path
    content: dict
    train: dict | None
    state: str
    variant: str = ""

    def __post_init__(self):
        self.task, self.config = self.content["task"], self.content["config"]
        self.method = self.content["method"] if self.content["method"] in METHODS else "fine-tuned"
        self.scored = self.content["eval"] if self.state == "finished" else None
        self.share = self.config.get("train_sample_fraction")
        self.setting = tuple(self.config.get(name) for name in KNOBS)

    @property
    def model(self) -> str:
        """A hub id or the end of a local path, and what tells this run from others of the same cell."""
        name = "/".join(self.content["model"].rstrip("/").split("/")[-2:])
        return name + (f" ({self.variant})" if self.variant else "")

    def records(self) -> list[Path]:
        beside = self.path.with_name("train.json")
        return [self.path] if self.train is None or self.path == beside else [beside, self.path]

    def test(self) -> dict:
        """The test split's description."""
        return self.content["data"][self.config["split"]]

    def identity(self) -> tuple:
        """What no two runs have in common."""
        more = (self.test()["sha256"], self.content["prompt_sha256"]) if self.scored else ()
        variant = tuple(str(self.config.get(name)) for name in VARIANTS)
        seed = self.config.get("seed")
        return self.task, self.content["model"], self.method, self.share, *self.setting, seed, variant, more


def find_runs(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Every run in the folders, and a line for each record that is left out, with the reason."""
    found: dict[tuple, Run] = {}
    problems = []
    for folder in folders:
        paths = [
            path for path in folder.rglob("*.json") if path.name.lstrip(".").startswith(("train", "eval"))
        ]
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
                if twin.path.resolve() != run.path.resolve():
                    old, new = sorted((twin, run), key=lambda run: run.content.get("finished", ""))
                    problems.append(
                        f"{old.path} is left out: {new.path} is of the same cell and seed, and newer"
                    )
                    found[run.identity()] = new
    return list(found.values()), problems


def runs_of(folder: Path) -> list[Run]:
    """The runs in one folder: one for each evaluation, or one that has none. Raises UserError for a record
    that is not as it should be."""
    trained = read_whole(folder / "train.json", "train")
    finished = trained and trained["status"] == "finished"
    names = {
        path.name.lstrip(".") for pattern in ("eval*.json", ".eval*.json") for path in folder.glob(pattern)
    }
    found = []
    for path in (folder / name for name in sorted(names)):
        content, state = read_whole(path, "eval"), record.status(path)
        if finished and state == "finished" and content.get("training") != trained["finished"]:
            raise UserError(f"{path} scored an earlier training than the one beside it: score it again")
        found.append(Run(path, content, trained if finished else None, state))
    if not found and trained:
        state = record.status(folder / "train.json")
        found = [
            Run(
                folder / "train.json",
                trained,
                trained if finished else None,
                "not scored" if finished else state,
            )
        ]
    return found


def read_whole(path: Path, part: str) -> dict | None:
    """A record, of a run that goes on what there is. Raises UserError for one that lacks what tables need."""
    content = record.read(path)
    if content is None or content["status"] != "finished":
        content = record.read(record.beside(path)) or content
    wanted = ["task", "method", "model", "config"] if content else []
    if content and content["status"] == "finished":
        wanted += ["data", "cost", "finished", "environment", part]
    lacking = [name for name in wanted if name not in content]
    if part in wanted and not lacking:
        lacking = [f"{part}.{name}" for name in NEEDED[part].split() if name not in content[part]]
    if lacking:
        raise UserError(f"{path} lacks {', '.join(lacking)}: --force redoes the run")
    return content


def comparable(found: Sequence[Run]) -> list[tuple[str, str, list[Run]]]:
    """Groups of runs whose scores may share a table: (task, why the group stands apart, runs).

    The largest group of a task has no reason to stand apart; it takes the runs without a score, too.
    """
    result = []
    for task in DEFAULTS:
        groups = defaultdict(list)
        ours = [run for run in found if run.task == task]
        usual = {}
        for method in METHODS:
            prompts = Counter(
                run.content["prompt_sha256"] for run in ours if run.scored and run.method == method
            )
            usual[method] = max(prompts, key=prompts.get, default=None)
        for run in ours:
            if run.scored:
                test, prompt = run.test(), run.content["prompt_sha256"]
                key = (
                    f"{test['rows']:,} test examples of {test['source']} (sha256 {test['sha256'][:8]})",
                    f"metrics of version {run.scored.get('metrics_version', 'unknown')}",
                    "" if prompt == usual[run.method] else f"{run.method} prompt {prompt[:8]}",
                )
                groups[key].append(run)
        ordered = sorted(groups, key=lambda key: (-len(groups[key]), key)) or [()]
        groups[ordered[0]] += [run for run in ours if not run.scored]
        for key in ordered:
            why = "; ".join(mine for mine, main in zip(key, ordered[0], strict=True) if mine != main)
            if groups[key]:
                result.append((task, why, groups[key]))
    for _, _, group in result:
        for run in group:
            run.variant = ", ".join(f"{name} {run.config[name]}" for name in varying(run, group))
    return result


def varying(run: Run, group: Sequence[Run]) -> list[str]:
    """The VARIANTS in which the runs of a group that share a method differ."""
    same = [other.config for other in group if other.method == run.method]
    return [name for name in VARIANTS if name in run.config and len({str(of.get(name)) for of in same}) > 1]
