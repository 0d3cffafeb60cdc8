"""What a run will take, from the speed of earlier ones: of the same model, task and method on this device."""

import argparse
import contextlib
import os
from collections.abc import Callable, Sequence
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
        left = estimate(args, method, path, training == "finished")
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


def estimate(args: argparse.Namespace, method: str, path: Path, trained: bool) -> tuple[float | None, ...]:
    """Seconds and USD that the run of the record `path` takes, those of the training in it, where that is not
    finished, and those that it saves where another evaluation of the same process has loaded the base; None
    where nothing tells."""
    here = device.name()
    training, scoring, saved = (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)
    if METHODS[method].trains and not trained:
        before = earlier(args, here, "train", method)
        training = priced(args, here, training_seconds(args, before), gpus_of(before, "train"))
    if part_of(path) == "eval":
        before = earlier(args, here, "eval", method)
        gpus = gpus_of(before, "eval")
        scoring = priced(args, here, evaluation_seconds(args, before), gpus)
        saved = priced(args, here, loading_saved(before), gpus)
    whole = (None if None in parts else sum(parts) for parts in zip(training, scoring, strict=True))
    return (*whole, *training, *saved)


def gpus_of(records: Sequence[dict], part: str) -> int:
    """The most that a part of these took."""
    return max((cost.gpus_of(run[part]) for run in records), default=1)


def priced(args: argparse.Namespace, here: str, seconds: float | None, gpus: int) -> tuple:
    """Seconds on so many GPUs, and their USD."""
    if seconds is None:
        return None, None
    price = cost.price(args.gpu_name or here, args.price_per_hour, gpus=gpus)["price_per_hour"]
    return seconds, cost.usd(price, seconds)


def earlier(args: argparse.Namespace, here: str, part: str, method: str) -> list[dict]:
    """The finished records in --output_dir of the same model, task and method, measured `here`."""
    found = []
    for path in sorted(Path(args.output_dir).rglob(PARTS[part].files)):
        try:
            content = read_whole(path)
        except UserError:
            continue  # the report names it
        key = (content["status"], content["task"], content["method"], content["model"])
        model = METHODS[method].model or args.pretrained_ckpt
        same = key == ("finished", args.task, method, model)
        if same and (lookup(content, f"{part}.examples") or 0) > 0 and cost.measured_on(content) == here:
            found.append(content)
    return found


def training_seconds(args: argparse.Namespace, records: Sequence[dict]) -> float | None:
    rows = available(args, records, "train", "train_file")
    if rows is None:
        return None
    examples = min(rows, args.max_train_samples or rows) * args.train_sample_fraction
    passes = examples * getattr(args, "epochs", 1)
    each = median_of(
        records,
        lambda run: run["train"]["seconds"] / run["train"]["examples"] / run["config"].get("epochs", 1),
    )
    return passes * each + median_of(
        records, lambda run: run["train"]["wall_seconds"] - run["train"]["seconds"]
    )


def evaluation_seconds(args: argparse.Namespace, records: Sequence[dict]) -> float | None:
    rows = available(args, records, args.split, f"{args.split}_file")
    if rows is None:
        return None
    each = median_of(records, lambda run: run["eval"]["seconds"] / run["eval"]["examples"])
    own, shared = by_loading(records)
    return min(rows, args.max_eval_samples or rows) * each + loading_seconds(own or shared)


def by_loading(records: Sequence[dict]) -> tuple[list[dict], list[dict]]:
    """Evaluations that have loaded their base, and those that found it loaded."""
    parted = [], []
    for run in records:
        parted["loaded_by" in run["eval"]].append(run)
    return parted


def loading_seconds(records: Sequence[dict]) -> float:
    """Of an evaluation, beside its decoding."""
    return median_of(records, lambda run: run["eval"]["wall_seconds"] - run["eval"]["seconds"])


def loading_saved(records: Sequence[dict]) -> float:
    """Seconds by which an evaluation is shorter that finds its base loaded; 0 where no record tells."""
    own, shared = by_loading(records)
    return max(0.0, loading_seconds(own) - loading_seconds(shared)) if own and shared else 0.0


def median_of(records: Sequence[dict], measure: Callable[[dict], float]) -> float:
    return median(map(measure, records))


def available(args: argparse.Namespace, records: Sequence[dict], split: str, flag: str) -> int | None:
    """How many examples the split has that the flags name, as a record of it says."""
    names = [flag, "dataset", *HELD_OUT]
    if any(getattr(args, name) for name in HELD_OUT):
        names.append("train_file")
    for content in records:
        rows = lookup(content, f"data.{split}.available")
        if rows and all(content["config"].get(name) == getattr(args, name) for name in names):
            return rows
    return None


def check_gpu_name(args: argparse.Namespace) -> None:
    """Raise UserError for a --gpu_name where no GPU is: a processor's seconds would have a card's price."""
    if args.gpu_name and not device.gpu_name():
        mend = "leave it out, and give this machine its price by --price_per_hour"
        raise UserError(f"--gpu_name {args.gpu_name}: no GPU is in sight here; {mend}")
