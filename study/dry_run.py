"""A loop's dry run: how each cell stands, what is left to spend on it, and what that comes to.

    printf '%s\\0' cell '' SCRIPT FLAG... END cell '' SCRIPT FLAG... END | python -m study.dry_run

study/loop.sh asks it, in words that end in a NUL each: what, and behind that up to END (one character, 0x1e)

    row                         no training serves the cells that follow
    row SCRIPT FLAG...          one training serves them, where it is not finished
    cell SHARES SCRIPT FLAG...  a cell, by the script that scores it: alone, or with the others up to `score`,
                                where SHARES is "scoring" (each is trained alone) or "loading" (none is)
    score                       those before are scored; the next ones load their base anew
    best                        the best on the validation split will be scored on the test split

Every look-up is what the script itself says to --dry_run, all in this process, which reads a record once.

With LIST=FILE it leaves a `Cell` in a line for each, for scale/ray_grid.py and for what ONLY leaves out.
"""

import contextlib
import io
import math
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from study import cli
from study.device import Process
from study.errors import UserError

END = "\x1e"


class Sum(NamedTuple):
    """Seconds and USD; None where that can't be told."""

    seconds: float | None = 0.0
    usd: float | None = 0.0

    def plus(self, other: "Sum", sign: int = 1) -> "Sum":
        usd = None if None in (self.usd, other.usd) else self.usd + sign * other.usd
        return Sum(self.seconds + sign * other.seconds, usd)

    def __str__(self) -> str:
        """In hours or minutes, and dollars."""
        if self.seconds is None:
            time = "unknown time"
        else:
            time = f"{self.seconds / 60:.1f} min" if self.seconds < 3600 else f"{self.seconds / 3600:.1f} h"
        if self.usd is None:
            return f"{time}, unknown price"
        return f"{time}, ${self.usd:.4f}" if self.usd < 0.1 else f"{time}, ${self.usd:.2f}"

    def same_as(self, other: "Sum") -> bool:
        """But for rounding."""
        return all(
            x == y or (x and y and math.isclose(x, y, rel_tol=1e-6)) for x, y in zip(self, other, strict=True)
        )


class Found(NamedTuple):
    """What a script says of a run: how it stands, its folder, and what is left to spend in all, on its
    training, and less where the base is loaded already."""

    state: str
    folder: str
    left: Sum
    training: Sum
    saved: Sum


class Cell(NamedTuple):
    """A line for programs. A unit is what one process had better do: a row that one training serves, with its
    scoring, cells that share one loading, or else a cell. `left` is what the cell adds to the loop's sum."""

    unit: int
    state: str  # "failed" without a folder where the look-up fails
    folder: str
    left: Sum

    def __str__(self) -> str:
        numbers = ("?" if number is None else f"{number:.6g}" for number in self.left)
        return "\t".join([str(self.unit), self.state, self.folder, *numbers])

    @classmethod
    def read(cls, line: str) -> "Cell":
        unit, state, folder, *numbers = line.split("\t")
        left = Sum(*(None if number == "?" else float(number) for number in numbers))
        return cls(int(unit), state, folder, left)


class DryRun:
    """What a loop has asked so far."""

    def __init__(self):
        self.checks_data = not os.environ.get("DATA_CHECKED")
        self.checked: set[str] = set()  # scripts, with their task, whose data were read
        self.listed: list[Cell] = []
        self.unit, self.unit_goes_on = 0, False
        self.kept: dict = {}  # what earlier records tell
        self.price = ""  # what was said of a price that could not be told
        self.cells = self.unknown = 0
        self.failed: list[str] = []
        self.total, self.each = Sum(), Sum()  # as the loop goes, and all cells one by one
        self.of_row = Sum()  # a row's training, of which the first of its cells will tell
        self.served = self.loaded = False  # by a row's training; by a cell before that has loaded the base

    def row(self, script: str = "", *flags: str) -> None:
        self.served = self.unit_goes_on = False
        self.of_row = Sum()
        if not script:
            return
        self.unit += 1
        self.unit_goes_on = True
        self.checked.add(script)  # the first cell's look-up reads the data
        with told() as failed:  # the cells say why
            found = self.look_up(script, *flags)
        if failed or found.state == "finished":
            return
        self.served = True
        if found.left.seconds is not None:
            self.of_row = found.left
            self.total = self.total.plus(found.left)

    def score(self) -> None:
        self.loaded = self.unit_goes_on = False

    def best(self) -> None:
        print("\nand the best on the validation split will be scored on the test split, ", end="")
        print("which is not in the sum")

    def cell(self, shares: str, script: str, *flags: str) -> None:
        self.cells += 1
        self.unit += not self.unit_goes_on
        self.unit_goes_on = self.unit_goes_on or shares == "loading"
        print(f"\n[{self.cells}] {' '.join(flags)}", flush=True)
        with told() as failed:
            found = self.look_up(script, *flags)
        if failed:
            self.failed.append(f"{script} {' '.join(flags)} (exit 1)")
            self.listed.append(Cell(self.unit, "failed", "", Sum(None, None)))
            return
        finished = found.state == "finished"
        print(f"{found.state}  {found.folder}" + ("" if finished else f"  {found.left}"))
        if found.left.seconds is None:
            self.unknown += 1
            self.listed.append(Cell(self.unit, found.state, found.folder, Sum(None, None)))
            return
        self.each = self.each.plus(found.left)
        adds = found.left
        if self.served:
            adds = adds.plus(found.training, -1)
        if shares and not finished:
            if self.loaded:
                adds = adds.plus(found.saved, -1)
            self.loaded = True
        self.total = self.total.plus(adds)
        self.listed.append(Cell(self.unit, found.state, found.folder, adds.plus(self.of_row)))
        self.of_row = Sum()

    def look_up(self, script: str, *flags: str) -> Found:
        """What the script says. The data are read for the first cell of each script and task."""
        task = re.search(r"--task_type [a-z]+", " ".join(flags))
        about = f"{script} {task[0]}" if task else script
        os.environ["DATA_CHECKED"] = "" if self.checks_data and about not in self.checked else "1"
        self.checked.add(about)
        sys.argv, said = [script, *flags], io.StringIO()
        with contextlib.redirect_stdout(said):
            main_of(script)(Process(cli.script_name(Path(script)), kept=self.kept))
        *lines, last = said.getvalue().splitlines()
        if not self.price:  # once for all cells
            self.price = "\n".join(line for line in lines if line.startswith("price "))
            print(self.price, end="\n" * bool(self.price))
        state, folder, *numbers = last.split("\t")
        numbers = [None if number == "?" else float(number) for number in numbers]
        return Found(state, folder, *(Sum(*numbers[i : i + 2]) for i in (0, 2, 4)))

    def finish(self) -> None:
        """The sum, and the cells that failed. Exits with 1 if any has."""
        if os.environ.get("LIST"):
            lines = "".join(f"{cell}\n" for cell in self.listed)
            Path(os.environ["LIST"]).write_text(lines, encoding="utf-8", errors="surrogateescape")
        total, each = (self.total, self.each) if self.unknown < self.cells else (Sum(None, None),) * 2
        alone = "" if each.same_as(total) else f" (one by one: {each})"
        why = "of them without an estimate: no earlier run of that model, task and device"
        lacking = f", {self.unknown} {why}" if self.unknown else ""
        print(f"\nin all: {total}, {self.cells} cells{alone}{lacking}", flush=True)
        if self.failed:
            print(f"error: {len(self.failed)} of {self.cells} cells failed:", file=sys.stderr)
            print(*(f"  {cell}" for cell in self.failed), sep="\n", file=sys.stderr)
            sys.exit(1)


@cache
def main_of(script: str) -> Callable[[Process], None]:
    return runpy.run_path(script)["main"]


@contextlib.contextmanager
def told() -> Iterator[list[UserError]]:
    """Say what a user can mend as the script itself would, and keep it."""
    failed: list[UserError] = []
    try:
        yield failed
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        failed.append(error)


def main() -> None:
    asked = DryRun()
    words = [os.fsdecode(word) for word in sys.stdin.buffer.read().split(b"\0")[:-1]]
    sys.stdout.reconfigure(errors="surrogateescape")  # a folder's name may be no Unicode
    question: list[str] = []
    for word in words:
        if word != END:
            question.append(word)
            continue
        getattr(asked, question[0])(*question[1:])
        question = []
    asked.finish()


if __name__ == "__main__":
    cli.run_script(lambda _: main())
