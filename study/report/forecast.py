"""What more labels would bring: learning curves (curve.py) of the methods in a table, where they can be trusted."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from study import intervals
from study.records.schema import SCORES
from study.report import curve
from study.report.cells import Cell, Table, score_cell
from study.report.collect import Run
from study.report.selection import by_examples, labels_of, tuned, usual_runs

TIMES = (2, curve.FARTHEST)


@dataclass(frozen=True)
class Forecast:
    """A method's errors (as shares of 1) with n training examples each, their standard errors, and its runs."""

    n: np.ndarray
    errors: np.ndarray
    se: np.ndarray
    runs: tuple[Run, ...] = ()

    @cached_property
    def reason(self) -> str:
        return reason_against(self.n, self.errors, self.se)

    @cached_property
    def curve(self) -> curve.Curve:
        return curve.fit(self.n, self.errors, self.se)

    def at(self, times: float) -> tuple[float, float, float] | None:
        """Median and ends of the error with so many times the largest share; None where that is of no use."""
        found = self.curve.forecast(times * self.n[-1])
        return None if found[2] - found[1] > curve.WIDEST * self.errors[-1] else found


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
        return f"back-test failed: {interval} forecast at {missed.n:,.0f}, measured {percent(missed.measured)}"
    return "" if curve.fit(n, errors, se) else "the shares determine no curve"


def percent(error: float) -> str:
    return f"{100 * error:.1f}"


def forecasts(task: str, group: Sequence[Run]) -> dict[str, Forecast]:
    """Of each column of Table 1, from the shares that have a value of each test example."""
    metric, found = next(iter(SCORES[task])), {}
    for label in labels_of(tuned(group)):
        points = by_examples(run for run in usual_runs(group, label) if run.values)
        parts = [intervals.parts_of(np.stack([run.values[metric] for run in of])) for of in points.values()]
        errors, se = ([f(part) for part in parts] for f in (lambda p: 1 - p.mean, lambda p: p.variance() ** 0.5))
        runs = tuple(run for of in points.values() for run in of)
        found[label] = Forecast(np.array([*points], float), np.array(errors), np.array(se), runs)
    return found
