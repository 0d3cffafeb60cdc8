"""Records -> runs, in groups whose scores may share a table."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from study.errors import UserError
from study.records import record, runs

SCORES = {
    "classification": {"accuracy": "accuracy", "macro_f1": "macro F1", "invalid_answers": "invalid answers"},
    "summarization": {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"},
}
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
NUMBER = (int, float)
MEASURED = ("examples", "seconds", "wall_seconds", "peak_memory_gib")
NEEDED = {  # what tables are made from, by dots; fields of finished records only, after the first line
    "any": dict.fromkeys(("task", "method", "model", "script"), str) | {"config": dict, "config.seed": int},
    "finished": dict.fromkeys(("finished", "prompt_sha256", "cost.gpu"), str)
    | {"data": dict, "environment": dict},
    "tuned": dict.fromkeys(("config.train_sample_fraction", *(f"config.{name}" for name in KNOBS)), NUMBER),
    "train": {f"train.{name}": NUMBER for name in (*MEASURED, "tokens_per_second")}
    | {"train.loss_history": list},
    "eval": {
        f"eval.{name}": NUMBER for name in (*MEASURED, "examples_per_second", "input_tokens", "output_tokens")
    }
    | {"config.split": str, "eval.metrics": dict},
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
    name: str = ""  # of the model

    def __post_init__(self):
        self.task, self.config = self.content["task"], self.content["config"]
        self.method = self.content["method"] if self.content["method"] in METHODS else "fine-tuned"
        self.scored = self.content["eval"] if self.state == "finished" else None
        self.share = self.config.get("train_sample_fraction")
        self.setting = tuple(self.config.get(name) for name in KNOBS)

    @property
    def model(self) -> str:
        """The model's name, with what tells this run from others of the same cell."""
        return self.name + (f" ({self.variant})" if self.variant else "")

    def records(self) -> list[Path]:
        beside = self.path.with_name("train.json")
        return [self.path] if self.train is None or self.path == beside else [beside, self.path]

    def test(self) -> dict:
        """The test split's description."""
        return self.content["data"][self.config["split"]]

    def weights(self) -> str:
        """What tells the checkpoint from others of the same name."""
        sha256 = lookup(self.content, "checkpoint.sha256")
        return sha256[:8] if sha256 else "not recorded"

    def identity(self) -> tuple:
        """What no two runs have in common."""
        more = self.path.name
        if self.scored:
            more = self.test()["sha256"], self.content["prompt_sha256"], self.weights()
        variant = tuple(str(self.config.get(name)) for name in VARIANTS)
        seed = self.config.get("seed")
        return self.task, self.content["model"], self.method, self.share, *self.setting, seed, variant, more


def find_runs(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Every run in the folders, and a line for each record that is left out, with the reason. Hidden folders,
    where the loops calibrate, do not count."""
    found: dict[tuple, Run] = {}
    problems = []
    for folder in folders:
        paths = [
            path
            for path in folder.rglob("*.json")
            if path.name.lstrip(".").startswith(("train", "eval"))
            and not any(part.startswith(".") for part in path.relative_to(folder).parts[:-1])
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
    if content is not None:
        check_whole(content, path, part)
    return content


def check_whole(content: dict, path: Path, part: str) -> None:
    """Raise UserError for the record `path` of a `part`, "train" or "eval", that lacks what tables need."""
    if content.get("task") not in tuple(SCORES):  # which may be anything, a list too
        raise UserError(f"{path} lacks a task of ours: --force redoes the run")
    wanted = NEEDED["any"] | ({} if content.get("method") in METHODS else NEEDED["tuned"])
    if content["status"] == "finished":
        wanted |= NEEDED["finished"] | NEEDED[part]
    lacking = [name for name, kind in wanted.items() if not isinstance(lookup(content, name), kind)]
    if part == "eval" and not lacking and content["status"] == "finished":
        split = f"data.{content['config']['split']}"
        wanted = {f"{split}.sha256": str, f"{split}.source": str, f"{split}.rows": int}
        for metric in SCORES[content["task"]]:
            wanted |= {f"eval.metrics.{metric}.{name}": NUMBER for name in ("value", "ci95.0", "ci95.1")}
        lacking = [name for name, kind in wanted.items() if not isinstance(lookup(content, name), kind)]
    optional = {"cost.price_per_hour": int | float | None, "cost.device": str | None}
    optional["checkpoint.sha256"] = str | None
    lacking += [name for name, kind in optional.items() if not isinstance(lookup(content, name), kind)]
    if lacking:
        raise UserError(
            f"{path} lacks {', '.join(lacking)}, or has it in another form: --force redoes the run"
        )


def lookup(content, dotted: str):
    """What stands at e.g. "eval.metrics.accuracy.ci95.0"; None where nothing does."""
    for name in dotted.split("."):
        if isinstance(content, list):
            content = content[int(name)] if name.isdigit() and int(name) < len(content) else None
        else:
            content = content.get(name) if isinstance(content, dict) else None
    return content


def comparable(found: Sequence[Run]) -> list[tuple[str, str, list[Run]]]:
    """Groups of runs whose scores may share a table: (task, why the group stands apart, runs).

    The largest group of a task has no reason to stand apart; it takes the runs without a score, too.
    """
    result, places = [], {}
    for task in SCORES:
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
                source = f"{test['rows']:,} test examples of {test['source']} (sha256 {test['sha256'][:8]})"
                key = (
                    places.setdefault(test["sha256"], source),  # the same data has other names elsewhere
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
            run.name = name_of(run.content["model"], {other.content["model"] for other in group})
            told = [f"{name} {run.config[name]}" for name in varying(run, group)]
            same = [
                other for other in group if other.scored and other.content["model"] == run.content["model"]
            ]
            if run in same and len({other.weights() for other in same}) > 1:
                told.append(f"weights {run.weights()}")
            run.variant = ", ".join(told)
    return result


def name_of(model: str, others: set[str]) -> str:
    """A hub id, or as much of the end of a local path as tells it from the other models."""
    parts = model.rstrip("/").split("/")
    for count in range(min(2, len(parts)), len(parts) + 1):
        name = "/".join(parts[-count:])
        if not any(other != model and f"/{other.rstrip('/')}".endswith(f"/{name}") for other in others):
            return name
    return model


def varying(run: Run, group: Sequence[Run]) -> list[str]:
    """The VARIANTS in which the runs of a group that share a method differ."""
    same = [other.config for other in group if other.method == run.method]
    return [name for name in VARIANTS if name in run.config and len({str(of.get(name)) for of in same}) > 1]
