"""Cells, which keep the runs that stand behind them, and tables of them as text."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import mean

import numpy as np

from study import intervals, metrics
from study.report.collect import Run

STATES = {"running": "running", "oom": "OOM", "failed": "failed", "interrupted": "interrupted"}


@dataclass(frozen=True)
class Cell:
    """`value` and the ends of its 95 % interval as numbers and, with its unit, as text; over how many `seeds`
    it is (0 of what is no score), and the runs behind it. A cell of a load test has its sweep
    (sweeps.py) in their place."""

    text: str
    value: float | None = None
    ends: tuple[float, float] | None = None
    runs: tuple[Run, ...] = ()
    seeds: int = 0


@dataclass
class Table:
    """The first `keys` columns name a row."""

    name: str
    title: str
    columns: list[str]
    keys: int
    note: str = ""
    rows: list[list[Cell]] = field(default_factory=list)

    def add(self, *cells: Cell | str | float) -> None:
        self.rows.append([cell if isinstance(cell, Cell) else Cell(str(cell)) for cell in cells])

    def extend(self, column: str, cells: Sequence[Cell]) -> None:
        """By a column that has any number in it."""
        if any(cell.value is not None for cell in cells):
            self.columns.append(column)
            for row, cell in zip(self.rows, cells, strict=True):
                row.append(cell)

    def markdown(self) -> str:
        from tabulate import tabulate

        rows = [[cell.text.replace("|", r"\|") for cell in row] for row in self.rows]
        text = tabulate(rows, self.columns, tablefmt="github", disable_numparse=True)
        return f"## {self.name}: {self.title}\n\n{text}\n\n{self.note}".rstrip() + "\n"

    def csv_rows(self) -> list[list]:
        """Titles and rows; a column of scores has two with the ends of their intervals beside it."""
        of_scores = [any(row[i].ends for row in self.rows) for i in range(len(self.columns))]
        lines = [[[name, f"{name} low", f"{name} high"] for name in self.columns]]
        lines += [
            [[cell.text if cell.value is None else cell.value, *(cell.ends or ("", ""))] for cell in row]
            for row in self.rows
        ]
        return [
            list(chain(*(three[: 1 + 2 * has] for three, has in zip(line, of_scores, strict=True))))
            for line in lines
        ]

    def cells(self) -> list[dict]:
        """Every cell as a row for programs, with the records behind it."""
        return [
            {
                **{"table": self.name, "title": self.title},
                **{"row": [key.text for key in row[: self.keys]], "column": column, "text": cell.text},
                **{"value": cell.value, "ci95": cell.ends},
                "seeds": cell.seeds,
                "records": [str(path) for run in cell.runs for path in run.records()],
            }
            for row in self.rows
            for column, cell in list(zip(self.columns, row, strict=True))[self.keys :]
        ]


def score_cell(of: Iterable[Run], metric: str) -> Cell:
    """The mean over the seeds with its 95 % interval (intervals.py), or both values of two seeds; or how the
    runs stand that have no score. An older record, which has no value of each example, gives no interval."""
    of = tuple(of)
    scored = [run for run in of if run.scored]
    states = Counter(STATES.get(run.state, run.state) for run in of if not run.scored)
    if not scored:
        return Cell(", ".join(states) or "—", runs=of)
    each = [run.scored["metrics"][metric]["value"] for run in scored]
    seeded = scored[0].seed is not None
    found = None if seeded and len(each) == 2 else ends_of(scored, metric)
    text = "; ".join([shown(each, found, seeded), *(f"{n} {state}" for state, n in states.items())])
    return Cell(text, mean(each), found, of, len(each))


def ends_of(
    scored: Sequence[Run], metric: str, level: float = intervals.LEVEL, pooled: tuple | None = None
) -> tuple[float, float] | None:
    """The interval of a metric over runs of one setting, in percent."""
    if not all(run.examples for run in scored):
        return None
    if metric == "macro_f1" and not all(run.examples.trusted() for run in scored):
        return None
    return metrics.interval_of(metric, np.stack([run.values[metric] for run in scored]), level, pooled)


def shown(each: Sequence[float], ends: tuple[float, float] | None, seeded: bool, sign: str = "") -> str:
    """E.g. "72.71 [61.3, 82.1] (3)", or of two seeds both values: "69.38, 75.00 (2)"."""
    count = f" ({len(each)})" if seeded else ""
    if len(each) == 2 and seeded:
        return ", ".join(f"{value:{sign}.2f}" for value in each) + count
    interval = " [{0:{2}.1f}, {1:{2}.1f}]".format(*ends, sign) if ends else ""
    return f"{mean(each):{sign}.2f}{interval}{count}"


def mean_cell(
    of: Iterable[Run], measure: Callable[[Run], float | None], show: Callable[[float], str]
) -> Cell:
    """The mean of a measure that every finished run has; it is unknown where a run's is (None)."""
    of = tuple(of)
    values = [measure(run) for run in of]
    if not values or None in values:
        return Cell("unknown" if values else "—", runs=of)
    return Cell(show(mean(values)), mean(values), None, of, len(values))


def duration(seconds: float) -> str:
    units = ((3600, "h"), (60, "min"))
    size, unit = next(((size, unit) for size, unit in units if seconds >= 1.5 * size), (1, "s"))
    return f"{seconds / size:.{0 if unit == 's' else 1}f} {unit}"


def percent(share: float) -> str:
    return f"{100 * share:g} %"
