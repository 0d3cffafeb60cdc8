"""Going on after a kill: the checkpoints of an unfinished training, and what a run takes over from them.

A checkpoint is whole once progress.json stands in it: what the run is, what it has spent, its losses so far,
and how it computed.
"""

import contextlib
import json
import re
import shutil
from pathlib import Path

from study import checkpoint as checkpoints_of_models
from study import device
from study.device import Process
from study.errors import UserError
from study.fast import memory
from study.records import record, runs
from study.records.schema import SCHEMA, settings_of

PROGRESS = "progress.json"


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints that training has left, oldest first; copies that someone made of them are not ours."""
    ours = re.compile(r"checkpoint-[1-9][0-9]*")
    found = [path for path in folder.glob("checkpoint-*") if ours.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def last_checkpoint(folder: Path, process: Process) -> Path | None:
    """The newest checkpoint that was written whole; others are removed."""
    whole = None
    for checkpoint in checkpoints_in(folder):
        if (checkpoint / PROGRESS).is_file():
            whole = checkpoint
        elif process.main:
            shutil.rmtree(checkpoint)
    return whole


def discard_older(folder: Path) -> None:
    """Keep the two newest checkpoints, by their steps: a clock that was set back makes new files old."""
    for old in checkpoints_in(folder)[:-2]:
        shutil.rmtree(old)


def resume(checkpoints: Path, run: dict, args, process: Process) -> tuple[Path | None, dict, list]:
    """The checkpoint to go on from, what the run has spent, and its losses so far."""
    nothing = {"seconds": 0.0, "wall_seconds": 0.0, "peak_memory_gib": 0.0}
    if args.force:
        remove_checkpoints(checkpoints, process)
        return None, nothing, []  # the other processes don't wait to see them gone
    checkpoint = last_checkpoint(checkpoints, process)
    if checkpoint is None:
        return None, nothing, []
    progress = read_progress(checkpoint)
    runs.check_same_method(progress.get("method"), run["method"], checkpoint)
    settings = settings_of(run["method"], "train", args.drop_overlap)
    runs.check_same(progress["config"], args, settings, checkpoint)
    runs.check_same_data(progress["data"], run["data"], checkpoint)
    redo = "--force redoes it"
    checkpoints_of_models.check_same(progress.get("checkpoint"), run.get("checkpoint"), checkpoint, redo)
    for name, what in {
        "prompt_sha256": "another prompt than prompts.py has now",
        "examples_sha256": "other tokens than the examples have now",
        "schedule": "another schedule of learning rates",
    }.items():
        before = progress.get(name, None if name == "schedule" else run.get(name))
        if name in run and before != run[name]:
            raise UserError(f"{checkpoint} was made with {what}: {redo}")
    return checkpoint, progress["spent"], progress["history"]


def so_far(spent: dict, seconds: float, process: Process) -> dict:
    """What a training has taken with the attempts before, `spent`: `seconds` of training in all, those of its
    processes, and the most memory."""
    return {
        "seconds": seconds,
        "wall_seconds": spent["wall_seconds"] + process.seconds(),
        "peak_memory_gib": max(spent["peak_memory_gib"], device.peak_memory_gib()),
    }


def mark(checkpoint: Path, run: dict, spent: dict, history: list, plan: dict) -> None:
    """Say of a checkpoint that it is whole, and keep the two newest. `history` has [step, loss, learned] of
    every step."""
    history = [[step, float(loss), learned] for step, loss, learned in history]
    progress = {"schema": SCHEMA, **run, "spent": spent, "history": history, "plan": plan}
    record.write_json(checkpoint / PROGRESS, progress)
    discard_older(checkpoint.parent)


def read_progress(checkpoint: Path) -> dict:
    path = checkpoint / PROGRESS
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove {checkpoint} and start again") from None


def kept_plan(checkpoint: Path | None, args) -> dict | None:
    """How the run computed before it was stopped, which also decides what dropout draws; None where its flags
    now ask for something else, or other code wrote a plan that this one does not know."""
    progress = read_progress(checkpoint) if checkpoint else {}
    asked = ("max_tokens_per_batch", "gradient_checkpointing", "attn_implementation")
    same = all(progress["config"].get(name) == getattr(args, name) for name in asked if progress)
    plan = progress.get("plan")
    known = plan and (not plan["fused"] or plan.get("keep") in memory.KEEPS)
    if same and plan and not known:
        print("resumed    by another plan than it began with: its adapter will be another one by rounding")
    return plan if same and known else None


def remove_checkpoints(folder: Path, process: Process) -> None:
    """Remove a run's own checkpoints, and their folder if nothing else is in it."""
    if process.main:
        for checkpoint in checkpoints_in(folder):
            shutil.rmtree(checkpoint, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()


def discard_checkpoints(folder: Path, process: Process) -> None:
    """Remove what only an unfinished run needs."""
    remove_checkpoints(folder / "checkpoints", process)
