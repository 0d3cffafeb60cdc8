"""What a run will take, from the speed of earlier ones: of the same model, task and method on this device."""

import argparse
import contextlib
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from statistics import median

from study import data, device
from study.device import Process
from study.errors import UserError
from study.records import cost, runs
from study.records.record import locked, read, read_whole, recording, status
from study.records.schema import HELD_OUT, METHODS, PARTS, lookup, part_of


def say_dry_run(path: Path, args: argparse.Namespace, method: str, process: Process) -> None:
    """What --dry_run prints: the record, then for programs "status<TAB>folder" and three times "<TAB>
    seconds<TAB>USD", an estimate, or "?": of what is left to spend, of the training in it, and of what is
    saved where the base is loaded already. Raises UserError for data in files that can't be used.

    An evaluation that has not been made, or of another adapter, is "trained" where its training is finished,
    and else says how that stands. With --show_repeated the train texts that occur more than once come first.
    With CELL_FAILED, in which a loop says how a script ended, it leaves the record of that failure instead.
    """
    if os.environ.get("CELL_FAILED"):
        return leave_failure(path, args, method, process, os.environ["CELL_FAILED"])
    check_gpu_name(args)
    if args.show_repeated:
        train = data.load(args, ["train"], optional=["test"] if args.drop_overlap else [])["train"]
        print(f"train: {data.say_repeated(train)}")
    trained = path.parent / "train.json"
    state, training = stands(path, args.force), stands(trained, args.force)
    scores = path != trained
    if scores and state not in ("finished", "running", training):
        state = "trained" if training == "finished" else training
    if scores and state == training == "finished" and not runs.has_scored(path, read(path), read(trained)):
        state = "trained"
    if state != "finished" and not os.environ.get("DATA_CHECKED"):
        check_data(args, method, scores, read(trained) if training == "finished" else None)
    print(f"{args.task} with {METHODS[method].model or args.pretrained_ckpt} -> {path}")
    left = (0,) * 6
    if state != "finished":
        cost.say_ambiguity(args, device.name())
        left = estimate(args, method, path, training == "finished", process.kept)
    print(state, path.parent, *("?" if number is None else f"{number:.6g}" for number in left), sep="\t")


def check_data(args: argparse.Namespace, method: str, scores: bool, trained: dict | None) -> None:
    """Read the files of a run as it will, so that what is wrong with them is known before the first hour.

    The hub's data are not fetched for it. Loops set DATA_CHECKED after a first cell: all have the same data.
    """
    if not data.is_local(args):
        return
    learns = METHODS[method].trains
    reads_train = learns or args.task == "classification" or method == "few-shot"
    names = ["train"] * (reads_train and not trained) + [args.split] * scores
    splits = data.load(args, names, optional=[] if scores else ["test"], trained=trained)
    if learns and "train" in splits:
        data.sample_train(splits["train"], args)
    if scores:
        data.sample_eval(splits[args.split], args)


def leave_failure(path: Path, args: argparse.Namespace, method: str, process: Process, how: str) -> None:
    """Record a run as failed whose script ended before it began a record, so that tables show it, and print
    its folder. What that script took is not known here."""
    if status(path) == "not started":
        args = argparse.Namespace(**vars(args) | {"dry_run": False})
        with (
            contextlib.suppress(UserError),
            locked(path.parent, process),
            recording(path, args, method, process) as content,
        ):
            content["wall_seconds"] = None
            raise UserError(f"it ended before it began ({how}): its output says why")
    print(path.parent)


def stands(path: Path, force: bool) -> str:
    """The `status` of a record; what --force redoes is not started."""
    try:
        state = status(path)
    except UserError:
        if not force:
            raise
        return "not started"
    return "not started" if force and state == "finished" else state


def estimate(
    args: argparse.Namespace, method: str, path: Path, trained: bool, kept: dict | None = None
) -> tuple[float | None, ...]:
    """Seconds and USD that the run of the record `path` takes, those of the training in it, where that is not
    finished, and those that it saves where another evaluation of the same process has loaded the base; None
    where nothing tells. What earlier records tell is read once where it is `kept`."""
    here, kept = device.name(), {} if kept is None else kept
    training, scoring, saved = (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)
    if METHODS[method].trains and not trained:
        before = earlier(args, here, "train", method, kept)
        training = priced(args, here, training_seconds(args, before), before.gpus)
    if part_of(path) == "eval":
        before = earlier(args, here, "eval", method, kept)
        scoring = priced(args, here, evaluation_seconds(args, before), before.gpus)
        saved = priced(args, here, before.loading_saved, before.gpus)
    whole = (None if None in parts else sum(parts) for parts in zip(training, scoring, strict=True))
    return (*whole, *training, *saved)


def priced(args: argparse.Namespace, here: str, seconds: float | None, gpus: int) -> tuple:
    """Seconds on so many GPUs, and their USD."""
    if seconds is None:
        return None, None
    share = cost.share_of(here)
    price = cost.price(args.gpu_name or here, args.price_per_hour, gpus=gpus, share=share)["price_per_hour"]
    return seconds, cost.usd(price, seconds)


class Earlier:
    """Finished records of one part, of the same model, task and method on the same device, and what they
    tell: each figure computed once, however many runs are to be estimated from them."""

    def __init__(self):
        self.records: list[dict] = []
        self.rows: dict[tuple, int | None] = {}  # of a split, by what names it

    def median_of(self, measure: Callable[[dict], float], records: Sequence[dict] | None = None) -> float:
        return median(map(measure, self.records if records is None else records))

    @cached_property
    def gpus(self) -> int:
        """The most that one of them took."""
        parts = (run.get("train") or run["eval"] for run in self.records)
        return max(map(cost.gpus_of, parts), default=1)

    @cached_property
    def training(self) -> tuple[float, float]:
        """Seconds for an example in an epoch, and of a training beside these."""
        each = self.median_of(
            lambda run: run["train"]["seconds"] / run["train"]["examples"] / run["config"].get("epochs", 1)
        )
        return each, self.median_of(lambda run: run["train"]["wall_seconds"] - run["train"]["seconds"])

    @cached_property
    def scoring(self) -> float:
        """Seconds for an example."""
        return self.median_of(lambda run: run["eval"]["seconds"] / run["eval"]["examples"])

    @cached_property
    def loading(self) -> tuple[float | None, float | None]:
        """Seconds of an evaluation beside its decoding, where it has loaded its base, and where it found that
        loaded; None where no record tells."""
        parted: tuple[list, list] = [], []
        for run in self.records:
            parted["loaded_by" in run["eval"]].append(run)
        beside = lambda run: run["eval"]["wall_seconds"] - run["eval"]["seconds"]
        return tuple(self.median_of(beside, of) if of else None for of in parted)

    @cached_property
    def loading_saved(self) -> float:
        """Seconds by which an evaluation is shorter that finds its base loaded; 0 where no record tells."""
        own, shared = self.loading
        return 0.0 if own is None or shared is None else max(0.0, own - shared)

    def available(self, args: argparse.Namespace, split: str, flag: str) -> int | None:
        """How many examples the split has that the flags name, as a record of it says."""
        names = [flag, "dataset", *HELD_OUT]
        if any(getattr(args, name) for name in HELD_OUT):
            names.append("train_file")
        asked = split, *((name, str(getattr(args, name))) for name in names)
        if asked not in self.rows:
            same = (
                run
                for run in self.records
                if all(run["config"].get(name) == getattr(args, name) for name in names)
            )
            rows = (lookup(run, f"data.{split}.available") for run in same)
            self.rows[asked] = next(filter(None, rows), None)
        return self.rows[asked]


def earlier(args: argparse.Namespace, here: str, part: str, method: str, kept: dict) -> Earlier:
    """The finished records in --output_dir of the same model, task and method, measured `here`."""
    place = args.output_dir, part
    if place not in kept:
        kept[place] = read_earlier(Path(args.output_dir), part)
    of = args.task, method, METHODS[method].model or args.pretrained_ckpt, here
    return kept[place].setdefault(of, Earlier())


def read_earlier(folder: Path, part: str) -> dict[tuple, Earlier]:
    """The finished records of a part in a folder, by task, method, model and device."""
    found: dict[tuple, Earlier] = {}
    for path in sorted(folder.rglob(PARTS[part].files)):
        try:
            content = read_whole(path)
        except UserError:
            continue  # the report names it
        if content["status"] == "finished" and (lookup(content, f"{part}.examples") or 0) > 0:
            of = content["task"], content["method"], content["model"], cost.measured_on(content)
            large = ("per_example", "loss_history")  # which are most of a record
            measured = {name: value for name, value in content[part].items() if name not in large}
            slim = {"config": content["config"], "data": content["data"], part: measured}
            found.setdefault(of, Earlier()).records.append(slim)
    return found


def training_seconds(args: argparse.Namespace, before: Earlier) -> float | None:
    rows = before.available(args, "train", "train_file")
    if rows is None:
        return None
    examples = min(rows, args.max_train_samples or rows) * args.train_sample_fraction
    each, beside = before.training
    return examples * getattr(args, "epochs", 1) * each + beside


def evaluation_seconds(args: argparse.Namespace, before: Earlier) -> float | None:
    rows = before.available(args, args.split, f"{args.split}_file")
    if rows is None:
        return None
    own, shared = before.loading
    return min(rows, args.max_eval_samples or rows) * before.scoring + (shared if own is None else own)


def check_gpu_name(args: argparse.Namespace) -> None:
    """Raise UserError for a --gpu_name where no GPU is: a processor's seconds would have a card's price."""
    if args.gpu_name and not device.gpu_name():
        mend = "leave it out, and give this machine its price by --price_per_hour"
        raise UserError(f"--gpu_name {args.gpu_name}: no GPU is in sight here; {mend}")
