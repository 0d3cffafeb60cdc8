"""Runs of fewer epochs that a training leaves on its way (--also_epochs).

The rate is constant after a warm-up of some steps, and a step's examples and dropout depend on seed and step
alone: a run of 2 epochs is the beginning of one of 50.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from study import device
from study.device import Process
from study.errors import UserError
from study.records import cost, record, runs

SHARED = ("data", "labels", "prompt_sha256", "checkpoint", "quantization", "loaded")  # by their records


class Also:
    """The runs that are missing, by their epochs."""

    def __init__(self, args: argparse.Namespace, method: str, described: dict, process: Process):
        self.args, self.method, self.process, self.content = args, method, process, {}
        self.missing: dict[int, argparse.Namespace] = {}
        for epochs in args.also_epochs:
            fewer = argparse.Namespace(**vars(args) | {"epochs": epochs, "also_epochs": []})
            path = self.folder(fewer) / "train.json"
            if runs.find_finished(path, fewer, method, described):
                print(f"finished   {path}")
            else:
                self.missing[epochs] = fewer

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
        fewer = self.missing[epochs]
        from study import resuming  # which loads libraries that a look-up does without

        folder = self.folder(fewer)
        with record.recording(folder / "train.json", fewer, self.method, self.process) as left:
            left |= {name: self.content[name] for name in SHARED if name in self.content}
            left["left_by"] = self.folder(self.args).name
            left["train"] = train | save(folder)
            spent, gpus = train["wall_seconds"], cost.gpus_of(train)
            left["cost"] = cost.of_run(fewer, device.name(), spent, gpus)
        resuming.discard_checkpoints(folder, self.process)


@contextlib.contextmanager
def beside(args: argparse.Namespace, method: str, described: dict, process: Process) -> Iterator[Also]:
    """The runs of --also_epochs, their folders held for this process alone."""
    also = Also(args, method, described, process)
    with contextlib.ExitStack() as locks:
        for fewer in also.missing.values():
            locks.enter_context(record.locked(also.folder(fewer), process))
        yield also
