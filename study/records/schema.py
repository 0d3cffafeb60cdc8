"""What a record holds: the methods of the study and the parts of a run, checked when a record is written and
when it is read.

A new method is one entry in METHODS and a script that names it; tables, plots and look-ups follow from the
entry. A part of a run (its training, an evaluation) leaves one record, a JSON object, in the run's folder; so
does a sweep of load over a server (part serve), which is of no method.
"""

import os
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from string import Formatter
from types import NoneType

from study.errors import UserError

SCHEMA = 1
NUMBER = (int, float)
SCORES = {  # of each task, the metrics that tables show, the first also in plots
    "classification": {"accuracy": "accuracy", "macro_f1": "macro F1", "invalid_answers": "invalid answers"},
    "summarization": {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"},
}

FEW = 40  # test examples, below which intervals are rough
SHORT = 20  # a run of a load test should last so many times an answer: the time of the last ones counts

# Flags by what depends on them; all others change a run's speed, its price or its place.
READ = (  # what a model reads, in training and scoring alike
    *("pretrained_ckpt", "dataset", "train_file", "text_column", "label_column", "dialogue_column"),
    *("summary_column", "drop_overlap", "max_train_samples", "max_seq_length", "max_new_tokens"),
    *("test_fraction", "validation_fraction", "merge_labels"),
)
HELD_OUT = ("test_fraction", "validation_fraction")  # what becomes another split, so that no one trains on it
LATER = (
    *HELD_OUT,
    "merge_labels",
    "unseen_labels",
)  # settings that older records lack; unset they add nothing to a hash
WORDS = tuple(  # of methods without a checkpoint
    name for name in READ if name not in {"pretrained_ckpt", "max_seq_length", "max_new_tokens"}
)
ENCODED = tuple(name for name in READ if name != "max_new_tokens")  # by a model that generates nothing
TRAINING = (*READ, "lora_alpha", "target_modules", "learning_rate", "batch_size", "loss_on")
SCORING = (*READ, "test_file", "validation_file", "max_eval_samples", "split", "decoding", "unseen_labels")
PROMPTING = (*SCORING, "task", "prompt_type", "shots", "chat_template", "seed")
T5 = ("train_sample_fraction", "epochs", "seed", *READ, "learning_rate", "batch_size")
LORA = {
    "lora_r": "rank",
    "epochs": "epochs",
    "dropout": "dropout",
    "learning_rate": "learning rate",
}  # the knobs of the grid, with their titles


@dataclass(frozen=True)
class Method:
    """A way to get answers out of a model.

    `folder` names a run: a format over its settings. `settings` are all the flags that tell its runs apart;
    those that the name does not spell out and that differ from their defaults add a hash to it.
    """

    title: str  # in tables
    folder: str
    settings: tuple[str, ...]
    knobs: dict[str, str] = field(default_factory=dict)  # numbers that make a cell, with their titles
    trains: bool = False  # on a share of the training examples, and leaves a record of that
    prompted: bool = True  # by prompts.py, whose hash tells its scores apart
    model: str = ""  # what stands for a model where there is no checkpoint
    confident: bool = False  # gives a probability of each answer, whatever the decoding
    published: bool = False  # a row of every language model in Table 2, run or not

    @property
    def spelled(self) -> tuple[str, ...]:
        """The settings that the folder's name spells out."""
        return tuple(name for _, name, _, _ in Formatter().parse(self.folder) if name)


PROMPTED = "baseline/{pretrained_ckpt}/{task}/{prompt_type}"
METHODS = {  # in the order of the tables' rows
    "zero-shot": Method("zero-shot", PROMPTED, PROMPTING[:-1], published=True),  # which draws nothing
    "few-shot": Method("few-shot", PROMPTED, PROMPTING, published=True),
    "qlora": Method(
        title="fine-tuned",
        folder="{task}-sampleFraction-{train_sample_fraction}_epochs-{epochs}_rank-{lora_r}_dropout-{dropout}"
        "_seed-{seed}",
        settings=("train_sample_fraction", "epochs", "lora_r", "dropout", "seed", *TRAINING),
        knobs=LORA,
        trains=True,
        published=True,
    ),
    "t5-full": Method(
        title="fine-tuned in full",
        folder="{task}-{pretrained_ckpt}-full_sampleFraction-{train_sample_fraction}_epochs-{epochs}_seed-{seed}",
        settings=T5,
        knobs={"epochs": "epochs"},
        trains=True,
    ),
    "t5-lora": Method(
        title="LoRA",
        folder="{task}-{pretrained_ckpt}-lora_sampleFraction-{train_sample_fraction}_epochs-{epochs}"
        "_rank-{lora_r}_dropout-{dropout}_seed-{seed}",
        settings=(*T5, "lora_r", "lora_alpha", "dropout"),
        knobs=LORA,
        trains=True,
    ),
    "encoder": Method(
        title="fine-tuned in full",
        folder="{task}-{pretrained_ckpt}-sampleFraction-{train_sample_fraction}_epochs-{epochs}_seed-{seed}",
        settings=("train_sample_fraction", "epochs", "seed", *ENCODED, "learning_rate", "batch_size"),
        knobs={"epochs": "epochs", "learning_rate": "learning rate"},
        trains=True,
        prompted=False,
        confident=True,
    ),
    **{
        f"tfidf-{short}": Method(
            title="word counts",
            folder="{task}-{method}-sampleFraction-{train_sample_fraction}_seed-{seed}",
            settings=("method", "train_sample_fraction", "seed", *WORDS),
            trains=True,
            prompted=False,
            model=f"TF-IDF + {name}",
            confident=short != "svm",  # which has distances alone
        )
        for short, name in (("nb", "naive Bayes"), ("svm", "linear SVM"), ("lr", "logistic regression"))
    },
    **{
        name: Method(
            title="taken from the text",
            folder="cheap/{task}/{method}",
            settings=("method", *WORDS, "test_file", "validation_file", "max_eval_samples", "split"),
            prompted=False,
            model=name,
        )
        for name in ("lead-3", "longest-3")
    },
}


@dataclass(frozen=True)
class Part:
    """A stage of a run that leaves a record: the files' pattern, and what a finished one holds, by dots."""

    files: str
    holds: dict[str, type | tuple[type, ...]]
    of_method: bool = True  # a server's is not: what answers behind a URL is not known


MEASURED = ("examples", "seconds", "wall_seconds", "peak_memory_gib")
SERVED = ("examples_per_second", "input_tokens", "output_tokens")
PARTS = {
    "train": Part(
        "train.json",
        {f"train.{name}": NUMBER for name in MEASURED}
        | {"train.tokens_per_second": (*NUMBER, NoneType), "train.loss_history": list},
    ),
    "eval": Part(
        "eval*.json",
        {f"eval.{name}": NUMBER for name in (*MEASURED, *SERVED)}
        | {"config.split": str, "eval.metrics": dict},
    ),
    "serve": Part(
        "serve*.json",
        {f"serve.{name}": NUMBER for name in ("requests", "seconds", "wall_seconds")}
        | {"serve.url": str, "serve.api": str, "serve.rates": list, "serve.knee": bool}
        | {"serve.sustained": (*NUMBER, NoneType), "config.seconds": NUMBER},
        of_method=False,
    ),
}
LOADED = {  # of each rate of a sweep
    **dict.fromkeys(("rate", "requests", "answered", "seconds", "offered", "sent", "served"), NUMBER),
    **{f"latency.{name}": NUMBER for name in ("mean", "p50", "p90", "p99")},
    **{"status": str, "why": str | None, "failures": dict, "lag.p99": NUMBER, "metrics": dict},
    **dict.fromkeys(("input_tokens", "output_tokens"), int | None),
    **dict.fromkeys(("time_to_first_token", "seconds_per_token"), dict | None),
}
ALWAYS = dict.fromkeys(("model", "script"), str) | {"config": dict, "config.seed": int}
FINISHED = dict.fromkeys(("finished", "cost.gpu"), str) | {"data": dict, "environment": dict}
SPENT = {  # which need not be there, or are null where they are not known
    "wall_seconds": int | float | None,
    "cost.price_per_hour": int | float | None,
    "cost.device": str | None,
    "cost.gpus": int | None,
}
OPTIONAL = SPENT | {
    "checkpoint.sha256": str | None,
    "eval.per_example": dict | None,
    "eval.per_example.confidences": list | None,
    "train.batching.processes": int | None,
    "eval.processes": int | None,
    "spent_before": list | None,
    **dict.fromkeys(("serve.url", "serve.server", "error.message"), str | None),
    "config.slo_seconds": int | float | None,
}
ATTEMPT = SPENT | {"status": str, "finished": str | None}  # of `spent_before`


def part_of(path: Path | str) -> str | None:
    """The part whose record a file is by its name, also while its run goes on; None for another file."""
    name = os.path.basename(path).lstrip(".")
    return next((part for part, about in PARTS.items() if fnmatchcase(name, about.files)), None)


def settings_of(method: str, part: str, drop_overlap: bool = False) -> tuple[str, ...]:
    """The flags that the result of a method's part depends on; an evaluation of what was trained depends on
    that training beside them, and a training that drops what stands in the test split on that split."""
    if METHODS[method].trains and part == "eval":
        return SCORING
    return (*METHODS[method].settings, *(["test_file"] if METHODS[method].trains and drop_overlap else []))


def check(content: dict, path: Path, part: str | None = None) -> None:
    """Raise UserError for a record that lacks what tables need of its `part` (by default the one that the
    file's name says), or is of no task or method of ours."""
    part = part or part_of(path)
    if part is None:
        raise UserError(
            f"{path} is named like no record of a run: {', '.join(p.files for p in PARTS.values())}"
        )
    if content.get("task") not in tuple(SCORES):  # which may be anything, a list too
        raise UserError(f"{path} lacks a task of ours: --force redoes the run")
    of_method = PARTS[part].of_method
    refuse_lacking(content, path, ({"method": str} if of_method else {}) | ALWAYS | OPTIONAL)
    wanted = of_its_method(content, path) if of_method else {}
    if content["status"] == "finished":
        wanted |= FINISHED | PARTS[part].holds
    refuse_lacking(content, path, wanted)
    if content["status"] == "finished" and part == "eval":
        refuse_lacking(content, path, scores_of(content))
    if content["status"] == "finished" and part == "serve":
        refuse_lacking(content, path, loaded(content["serve"]["rates"]))
    check_spent(content, path)


def of_its_method(content: dict, path: Path) -> dict:
    """What a record holds by its method. Raises UserError for one that is not ours."""
    method = METHODS.get(content["method"])
    if method is None:
        raise UserError(
            f"{path} is of the method {content['method']!r}, and study/records/schema.py knows "
            f"{', '.join(METHODS)}: read it with the version that wrote it"
        )
    wanted = dict.fromkeys((f"config.{name}" for name in method.knobs), NUMBER)
    if method.trains:
        wanted["config.train_sample_fraction"] = NUMBER
    if content["status"] == "finished" and method.prompted:
        wanted["prompt_sha256"] = str
    return wanted


def check_spent(content: dict, path: Path) -> None:
    """Raise UserError where it can't be told what a record or an attempt before it took."""
    earlier = content.get("spent_before") or []
    places = [f"spent_before.{i}." for i in range(len(earlier))]
    wanted = {f"{place}{name}": kind for place in places for name, kind in ATTEMPT.items()}
    wanted |= {f"{place}cost.gpu": str for place in ["", *places] if lookup(content, f"{place}cost")}
    refuse_lacking(content, path, wanted)
    if any((spent.get("wall_seconds") or 0) < 0 for spent in (content, *earlier)):
        raise UserError(f"{path} has a time that is negative: --force redoes the run")


def scores_of(content: dict) -> dict:
    """What a finished evaluation holds of its split and its task's metrics."""
    split = f"data.{content['config']['split']}"
    wanted = {f"{split}.sha256": str, f"{split}.source": str, f"{split}.rows": int}
    for metric in {**SCORES[content["task"]], **content["eval"]["metrics"]}:
        wanted |= score_of(content, f"eval.metrics.{metric}")
    return wanted


def score_of(content, place: str) -> dict:
    """What a metric holds that stands at `place`."""
    ends = {f"{place}.ci95.{end}": NUMBER for end in (0, 1)}
    return {f"{place}.value": NUMBER} | (ends if lookup(content, f"{place}.ci95") is not None else {})


def loaded(rates: list) -> dict:
    """What a finished sweep holds of each of its `rates`."""
    wanted = {}
    for i, step in enumerate(rates):
        place = f"serve.rates.{i}."
        wanted |= {f"{place}{name}": kind for name, kind in LOADED.items()}
        if isinstance(lookup(step, "metrics"), dict):
            scores = [score_of(step, f"metrics.{metric}") for metric in step["metrics"]]
            wanted |= {f"{place}{name}": kind for score in scores for name, kind in score.items()}
        for name in ("time_to_first_token", "seconds_per_token"):
            streamed = ("mean", "p50", "p90", "p99") if lookup(step, name) else ()
            wanted |= {f"{place}{name}.{percent}": NUMBER for percent in streamed}
    return wanted


def refuse_lacking(content: dict, path: Path, wanted: dict) -> None:
    lacking = [name for name, kind in wanted.items() if not isinstance(lookup(content, name), kind)]
    if lacking:
        raise UserError(
            f"{path} lacks {', '.join(lacking)}, or has it in another form: --force redoes the run"
        )


@cache
def parted(dotted: str) -> list[str]:
    """Once for all records, each of which is asked for the same names."""
    return dotted.split(".")


def lookup(content, dotted: str):
    """What stands at e.g. "eval.metrics.accuracy.ci95.0"; None where nothing does."""
    for name in parted(dotted):
        if isinstance(content, list):
            content = content[int(name)] if name.isdigit() and int(name) < len(content) else None
        else:
            content = content.get(name) if isinstance(content, dict) else None
    return content
