"""Runs of fewer epochs that a training leaves on its way (--also_epochs).

The rate is constant after a warm-up of some steps, and a step's examples and dropout depend on seed and step
alone: a run of 2 epochs is the beginning of one of 50.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from study import device
from study.device import Process
from study.errors import UserError
from study.records import cost, estimate, record, runs

SHARED = ("data", "labels", "prompt_sha256", "checkpoint", "quantization", "loaded")  # by their records


def of_epochs(args: argparse.Namespace, epochs: int, also: Sequence[int] = ()) -> argparse.Namespace:
    """The flags of a run of so many epochs."""
    return argparse.Namespace(**vars(args) | {"epochs": epochs, "also_epochs": list(also)})


def what_is_missing(args: argparse.Namespace, method: str, described: dict | None = None):
    """The flags of the longest run of --epochs and --also_epochs that is not finished, with the shorter ones
    that are not; `args` where all are. Without the data, `described`, they are only looked up."""
    if not args.also_epochs:
        return args
    missing = []
    for epochs in sorted({args.epochs, *args.also_epochs}):
        fewer = of_epochs(args, epochs)
        path = runs.folder_of(fewer, method) / "train.json"
        if described is None:
            found = estimate.stands(path, args.force) == "finished"
        else:
            found = runs.find_finished(path, fewer, method, described)
        if found and described and epochs < args.epochs:
            print(f"finished   {path}")
        missing += [] if found else [epochs]
    if not missing:
        return args
    return of_epochs(args, missing[-1], missing[:-1])


class Also:
    """The runs that a training is to leave on its way, by their epochs."""

    def __init__(self, args: argparse.Namespace, method: str, process: Process):
        self.args, self.method, self.process, self.content = args, method, process, {}
        self.missing = {epochs: of_epochs(args, epochs) for epochs in args.also_epochs}

    def folder(self, fewer: argparse.Namespace) -> Path:
        return runs.folder_of(fewer, self.method)

    def refuse_passed(self, epochs: float, where: Path) -> None:
        """Raise UserError if a run is missing and the one at `where`, which has done so many, is past it."""
        for passed in self.missing:
            if passed <= epochs:
                raise UserError(
                    f"--also_epochs {passed}: {where} is past it, and that run is missing: train it by "
                    "itself with --epochs, or begin anew with --force"
                )

    def leave(self, epochs: int, train: dict, save: Callable[[Path], dict]) -> None:
        """The folder of a run that ends here: what is trained, and its record with this `train` and what it
        shares with the training's own, `content`."""
        from study import resuming  # which loads libraries that a look-up does without

        fewer = self.missing[epochs]
        folder = self.folder(fewer)
        with record.recording(folder / "train.json", fewer, self.method, self.process) as left:
            left |= {name: self.content[name] for name in SHARED if name in self.content}
            left["left_by"] = self.folder(self.args).name
            left["train"] = train | save(folder)
            spent, gpus = train["wall_seconds"], cost.gpus_of(train)
            left["cost"] = cost.of_run(fewer, device.name(), spent, gpus)
        resuming.discard_checkpoints(folder, self.process)


@contextlib.contextmanager
def beside(args: argparse.Namespace, method: str, process: Process) -> Iterator[Also]:
    """The runs of --also_epochs, their folders held for this process alone."""
    also = Also(args, method, process)
    with contextlib.ExitStack() as locks:
        for fewer in also.missing.values():
            locks.enter_context(record.locked(also.folder(fewer), process))
        yield also
