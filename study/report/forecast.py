"""What more labels would bring: the methods' learning curves (curve.py), where they can be trusted."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from study import intervals
from study.records.schema import SCORES
from study.report import curve
from study.report.cells import Cell, Table, score_cell, shown
from study.report.collect import Run
from study.report.selection import by_column, by_examples, usual_runs

NAME = "What more labels would bring"
TIMES = (2, curve.FARTHEST)


@dataclass(frozen=True)
class Forecast:
    """A method's errors (as shares of 1) with n training examples, their standard errors, and its runs."""

    n: np.ndarray
    errors: np.ndarray
    se: np.ndarray
    runs: tuple[tuple[Run, ...], ...] = ()  # of each n

    @cached_property
    def reason(self) -> str:
        return reason_against(self.n, self.errors, self.se)

    @cached_property
    def curve(self) -> curve.Curve:
        return curve.fit(self.n, self.errors, self.se)

    def at(self, times: float) -> tuple[float, float, float] | None:
        """The error with so many times the largest share, and the ends of its interval; None where that is of
        no use."""
        found = None if self.reason else self.curve.forecast(times * self.n[-1])
        return found if found and found[2] - found[1] <= curve.WIDEST * self.errors[-1] else None

    def cell(self, times: int) -> Cell:
        if not (found := self.at(times)):
            return Cell("—" if self.reason else "too wide")
        middle, low, high = (100 * x for x in found)
        runs = tuple(run for of in self.runs for run in of)
        return Cell(f"{middle:.1f} [{low:.1f}, {high:.1f}]", middle, (low, high), runs)

    def verdict(self) -> str:
        """What came of the back-test, or why there is no forecast."""
        checks = curve.back_test(self.n, self.errors, self.se)
        count = sum(check.telling for check in checks)
        untested = "too wide to tell" if checks else f"none: {curve.FEWEST + 1} shares are needed"
        return self.reason or (f"held, {count} of {count}" if count else untested)


def reason_against(n: Sequence[float], errors: Sequence[float], se: Sequence[float]) -> str:
    """Why a curve through these errors can't be trusted; "" where it can."""
    if len(n) < curve.FEWEST:
        return f"{len(n)} training share{'s' * (len(n) > 1)}, {curve.FEWEST} are needed"
    if not min(se) > 0:
        return "an error of 0 or 100 % has no spread to weigh it by"
    if places := curve.rise(errors, se):
        first, last = (f"{percent(errors[i])} at {n[i]:,.0f}" for i in places)
        return f"error rises beyond noise: {first}, {last}"
    if missed := next((check for check in curve.back_test(n, errors, se) if not check.held), None):
        interval = f"[{percent(missed.low)}, {percent(missed.high)}]"
        return (
            f"back-test failed: {interval} forecast at {missed.n:,.0f}, measured {percent(missed.measured)}"
        )
    return "" if curve.fit(n, errors, se) else "the shares determine no curve"


def percent(error: float) -> str:
    return f"{100 * error:.1f}"


def forecasts(task: str, group: Sequence[Run]) -> dict[str, Forecast]:
    """Of each column of Table 1, from the shares that have a value of each test example."""
    metric, found = next(iter(SCORES[task])), {}
    for label, column in by_column(group).items():
        points = by_examples(run for run in usual_runs(column) if run.examples)
        parts = [intervals.parts_of(np.stack([run.values[metric] for run in of])) for of in points.values()]
        errors, se = [1 - part.mean for part in parts], [part.variance() ** 0.5 for part in parts]
        if points:
            of = np.array([*points], float), np.array(errors), np.array(se)
            found[label] = Forecast(*of, tuple(map(tuple, points.values())))
    return found


def forecast_table(task: str, group: Sequence[Run]) -> Table:
    """What more labels would bring. Where no method has enough shares it has no rows, and a note on that."""
    (metric, title), found = next(iter(SCORES[task].items())), forecasts(task, group)
    columns = ["method", "fitted on", "error now", *(f"at {times} x" for times in TIMES), "back-test"]
    table = Table(NAME, f"error (100 - {title}) with 2 and {curve.FARTHEST} times the labels", columns, 1)
    most = max((len(each.n) for each in found.values()), default=0)
    if most < curve.FEWEST:
        table.note = f"{NAME}: that takes {curve.FEWEST} training shares of a method. " if most > 1 else ""
        return table
    for label, each in found.items():
        shares = f"{len(each.n)} shares, {each.n[0]:,.0f} to {each.n[-1]:,.0f}"
        now = error_cell(each.runs[-1], metric)
        table.add(label, shares, now, *(each.cell(times) for times in TIMES), each.verdict())
    table.note = (
        "Forecast by error(n) = a + b n^-c, with the 95 % interval of a measurement by as many seeds and "
        "test examples as on the largest share. Back-test: the largest share and the largest two, forecast "
        "from the others; where an interval misses, no number is shown. Too wide: an interval of more than "
        f"half of the error. {crossings(found)}"
    )
    return table


def error_cell(of: Sequence[Run], metric: str) -> Cell:
    """100 less the score."""
    cell, each = score_cell(of, metric), [100 - run.scored["metrics"][metric]["value"] for run in of]
    ends = cell.ends and (100 - cell.ends[1], 100 - cell.ends[0])
    return Cell(shown(each, ends, of[0].seed is not None), 100 - cell.value, ends, cell.runs, cell.seeds)


def crossings(found: dict[str, Forecast]) -> str:
    """In sentences, of each two methods with a forecast."""
    told, apart, unclear = [], [], []
    trusted = [(label, each) for label, each in found.items() if each.at(2)]
    for (one, a), (other, b) in combinations(trusted, 2):
        pair, (low, high) = (
            f"{one} and {other}",
            (max(a.n[0], b.n[0]), curve.FARTHEST * min(a.n[-1], b.n[-1])),
        )
        where = curve.crossing(a.curve, b.curve, low, high)
        if where:
            better = one if a.curve.error(high) < b.curve.error(high) else other
            at, *ends = (f"{float(f'{n:.2g}'):,.0f}" for n in where)
            told.append(
                f"{pair} cross at {at} [{ends[0]}, {ends[1]}] examples, beyond which {better} errs less. "
            )
        else:
            (unclear if where is None else apart).append(pair)
    if apart:
        told.append(f"No crossing within {curve.FARTHEST} times the labels: {'; '.join(apart)}. ")
    if unclear:
        told.append(f"Whether they cross can't be told: {'; '.join(unclear)}. ")
    return "".join(told)
