"""Cells, which keep the runs that stand behind them, and tables of them as text."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from statistics import mean, stdev

from study.report.collect import Run

STATES = {"running": "running", "oom": "OOM", "failed": "failed", "interrupted": "interrupted"}


@dataclass(frozen=True)
class Cell:
    """`value` ± `half` of its interval as a number and, with its unit, as text."""

    text: str
    value: float | None = None
    half: float | None = None
    runs: tuple[Run, ...] = ()


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

    def markdown(self) -> str:
        from tabulate import tabulate

        rows = [[cell.text for cell in row] for row in self.rows]
        text = tabulate(rows, self.columns, tablefmt="github", disable_numparse=True)
        return f"## {self.name}: {self.title}\n\n{text}\n\n{self.note}".rstrip() + "\n"

    def csv_rows(self) -> list[list]:
        """Titles and rows; a column of scores has one with half of their intervals beside it."""
        halves = [any(row[i].half is not None for row in self.rows) for i in range(len(self.columns))]
        lines = [[[name, f"{name} ±"] for name in self.columns]]
        lines += [
            [[cell.text if cell.value is None else cell.value, cell.half] for cell in row]
            for row in self.rows
        ]
        return [
            list(chain(*(pair[: 1 + half] for pair, half in zip(line, halves, strict=True))))
            for line in lines
        ]

    def cells(self) -> list[dict]:
        """Every cell as a row for programs, with the records behind it."""
        return [
            {
                **{"table": self.name, "title": self.title},
                **{"row": [key.text for key in row[: self.keys]], "column": column, "text": cell.text},
                **{
                    "value": cell.value,
                    "half_width": cell.half,
                    "seeds": sum(bool(run.scored) for run in cell.runs),
                },
                "records": [str(path) for run in cell.runs for path in run.records()],
            }
            for row in self.rows
            for column, cell in list(zip(self.columns, row, strict=True))[self.keys :]
        ]


def score_cell(of: Iterable[Run], metric: str) -> Cell:
    """Mean over the seeds ± half of the 95 % interval; or how the runs stand that have no score.

    One run: half = h, of its bootstrap. n runs: half = sqrt(mean(h)^2 + (t sd / sqrt(n))^2), with sd the
    standard deviation of their values and t the 0.975 quantile of Student's t, n - 1 degrees of freedom.
    """
    of = tuple(of)
    scored = [run.scored["metrics"][metric] for run in of if run.scored]
    states = Counter(STATES.get(run.state, run.state) for run in of if not run.scored)
    if not scored:
        return Cell(", ".join(states) or "—", runs=of)
    values = [entry["value"] for entry in scored]
    half, count = mean((entry["ci95"][1] - entry["ci95"][0]) / 2 for entry in scored), len(scored)
    if count > 1:
        from scipy.stats import t

        half = math.hypot(half, t.ppf(0.975, count - 1) * stdev(values) / math.sqrt(count))
    text = f"{mean(values):.2f} ± {half:.2f}" + (f" ({count})" if count > 1 else "")
    return Cell("; ".join([text, *(f"{n} {state}" for state, n in states.items())]), mean(values), half, of)


def mean_cell(
    of: Iterable[Run], measure: Callable[[Run], float | None], show: Callable[[float], str]
) -> Cell:
    """The mean of a measure that every finished run has; it is unknown where a run's is (None)."""
    of = tuple(of)
    values = [measure(run) for run in of]
    if not values or None in values:
        return Cell("unknown" if values else "—", runs=of)
    return Cell(show(mean(values)), mean(values), None, of)


def duration(seconds: float) -> str:
    units = ((3600, "h"), (60, "min"))
    size, unit = next(((size, unit) for size, unit in units if seconds >= 1.5 * size), (1, "s"))
    return f"{seconds / size:.{0 if unit == 's' else 1}f} {unit}"


def percent(share: float) -> str:
    return f"{100 * share:g} %"
