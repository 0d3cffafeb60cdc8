"""The cells of a loop as units of work, and what a budget lets begin. Nothing here needs Ray."""

import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from study.dry_run import Cell, Sum

# The variables by which a loop says what it goes through; a node is told those that are set here.
VARIABLES = "DROPOUTS EPOCHS FRACTIONS LAUNCH LEARNING_RATES MODELS RANKS SEEDS TASK TASKS"


@dataclass
class Unit:
    """Cells that one process does: those of a row, those that share one loading, or one."""

    first: int  # the number of its first cell in the loop
    cells: list[Cell]
    attempts: int = 0

    @property
    def only(self) -> str:
        """Its cells as ONLY of study/loop.sh takes them."""
        last = self.first + len(self.cells) - 1
        return str(last) if last == self.first else f"{self.first}-{last}"

    @property
    def folders(self) -> list[str]:
        """Of its runs, as the flags spell them, each once."""
        return [*dict.fromkeys(cell.folder for cell in self.cells if cell.folder)]

    @property
    def finished(self) -> bool:
        return all(cell.state == "finished" for cell in self.cells)

    @property
    def left(self) -> Sum:
        """Seconds and USD that it will take; None where that can't be told."""
        seconds, usd = ([cell.left[i] for cell in self.cells] for i in (0, 1))
        return Sum(*(None if None in part else sum(part) for part in (seconds, usd)))


def units_of(cells: list[Cell]) -> list[Unit]:
    """The units in the loop's order. One whose runs are all among those of earlier ones, because the loop
    lists a setting twice, is left out: two nodes would want one folder."""
    units, seen = [], set()
    for _, numbered in groupby(enumerate(cells, 1), key=lambda pair: pair[1].unit):
        numbers, together = zip(*numbered, strict=True)
        unit = Unit(numbers[0], [*together])
        if not unit.folders or not seen.issuperset(unit.folders):
            units.append(unit)
        seen.update(unit.folders)
    return units


def environment(variables: dict[str, str]) -> dict[str, str]:
    """For a loop: this process's own, in which `python` is this interpreter, and the loop's `variables`."""
    own = {name: value for name, value in os.environ.items() if name not in {*VARIABLES.split(), "ONLY"}}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return own | {"PATH": path} | variables


def list_cells(
    loop: str, flags: list[str], variables: dict[str, str], cwd: str
) -> tuple[list[Cell], int, str]:
    """The cells of a loop by its dry run, and the exit status and the errors of that."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cells")
        env = environment(variables) | {"LIST": str(path), "PYTHONIOENCODING": "utf-8"}
        done = subprocess.run(
            [loop, *flags, "--dry_run"], cwd=cwd, env=env, capture_output=True, text=True, check=False
        )
        text = path.read_text("utf-8", errors="surrogateescape") if path.exists() else ""
    return [Cell.read(line) for line in text.split("\n")[:-1]], done.returncode, done.stderr


class Budget:
    """Seconds of all nodes together, and USD, that the units of a grid may take."""

    def __init__(self, hours: float | None, usd: float | None):
        self.most = Sum(math.inf if hours is None else 3600 * hours, math.inf if usd is None else usd)
        self.spent = Sum()
        self.beyond = 0.0  # the most seconds that a unit has taken beyond its estimate: look-ups, and worse

    @property
    def limited(self) -> bool:
        return self.most != (math.inf, math.inf)

    def rest(self, running: list[Sum]) -> Sum:
        """What is neither spent nor reserved by the estimates of the units that run."""
        reserved = ([self.whole(left)[i] or 0.0 for left in running] for i in (0, 1))
        return Sum(*(m - s - sum(r) for m, s, r in zip(self.most, self.spent, reserved, strict=True)))

    def unknown(self, left: Sum) -> bool:
        """Whether an estimate lacks what is limited. Such a unit runs alone: nobody knows what to reserve."""
        return any(number is None and most < math.inf for number, most in zip(left, self.most, strict=True))

    def admits(self, left: Sum, running: list[Sum]) -> bool:
        """Whether a unit may begin beside those that run."""
        if not self.limited:
            return True
        if running and any(map(self.unknown, [left, *running])):
            return False
        return all((n or 0) <= rest for n, rest in zip(self.whole(left), self.rest(running), strict=True))

    def whole(self, left: Sum) -> Sum:
        """An estimate, and what units have taken beyond theirs."""
        if not left.seconds:
            return left
        share = 1 + self.beyond / left.seconds
        return Sum(left.seconds * share, None if left.usd is None else left.usd * share)

    def spend(self, left: Sum, seconds: float, usd_per_hour: float | None) -> None:
        """Take in what a unit has taken that was estimated at `left`. Without a price it has cost no dollars:
        its loop has refused to begin on a budget of them."""
        self.spent = self.spent.plus(Sum(seconds, seconds * (usd_per_hour or 0) / 3600))
        if left.seconds is not None:
            self.beyond = max(self.beyond, seconds - left.seconds)

    def flags(self, running: list[Sum]) -> list[str]:
        """The rest as a loop's own flags."""
        names = ("--budget_hours", 3600), ("--budget_usd", 1)
        rest = zip(names, self.rest(running), strict=True)
        given = [(name, max(0.0, number) / per) for (name, per), number in rest if number < math.inf]
        return [word for name, number in given for word in (name, f"{number:.6f}")]
