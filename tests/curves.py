"""How often the intervals of learning curves hold what was measured.

    python -m tests.curves [FOLDER...]        # the tables of docs/statistics.md, in 4 min

By simulated studies, by the published study's columns and by the records in the folders: the largest one or
two shares are hidden and forecast from the others. "Usual" is the interval by the standard errors alone;
"shown" are forecasts that the report would show.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from study.report import curve
from study.report.collect import comparable, find_runs
from study.report.forecast import forecasts, reason_against
from study.report.published import FIGURES

Generator = np.random.Generator
SHARES = np.array([274, 552, 1103, 2756, 5513, 11014])
EXAMPLES = 7317
SPREADS = 0.003, 0.007, 0.015, 0.03  # standard deviations between seeds on the smallest share
SHARED = 0.6  # of the variance of a right answer is the example's, whatever seed and training share


def measured(generator: Generator, truth: np.ndarray, seeds: int, spread: float) -> tuple:
    """Errors and their standard errors as from so many seeds and the same test examples, by an analysis of
    variance like that of intervals.Parts. `spread` is the standard deviation between seeds on the smallest
    share; it falls with the square root of the error. One seed knows of test sampling only."""
    of_test = truth * (1 - truth) / EXAMPLES
    common = generator.standard_normal() * np.sqrt(SHARED * of_test)
    own = np.sqrt(spread**2 * truth / truth[0] + (1 - SHARED) * of_test)
    each = truth + common + own * generator.standard_normal((seeds, len(truth)))
    between = each.var(axis=0, ddof=1) / seeds + SHARED * of_test if seeds > 1 else of_test
    return np.clip(each.mean(axis=0), 0.002, 1), np.sqrt(between)


def power_law(generator: Generator, onset: float = 0) -> Callable:
    floor, exponent = generator.choice([0, 0.05, 0.1, 0.2]), generator.choice([0.1, 0.2, 0.35, 0.5, 0.8])
    first = generator.uniform(0.3, 0.8)
    return lambda n: floor + (first - floor) * ((n + onset) / (SHARES[0] + onset)) ** -exponent


def delayed(generator: Generator) -> Callable:
    return power_law(generator, generator.uniform(100, 1000))


def sigmoid(generator: Generator) -> Callable:
    floor, slope = generator.choice([0, 0.05, 0.1, 0.2]), generator.uniform(0.5, 2)
    middle = generator.uniform(np.log(100), np.log(1500))
    return lambda n: floor + (0.95 - floor) / (1 + np.exp(slope * (np.log(n) - middle)))


def exponential(generator: Generator) -> Callable:
    floor, first = generator.choice([0, 0.05, 0.1, 0.2]), generator.uniform(0.3, 0.8)
    return lambda n: floor + (first - floor) * np.exp(-0.03 * (np.sqrt(n) - np.sqrt(SHARES[0])))


def normal_interval(n: np.ndarray, errors: np.ndarray, se: np.ndarray, at: float) -> tuple | None:
    """The usual interval: the delta method by the standard errors alone."""
    found = curve.fit(n, errors, se)
    half = found and 1.96 * np.sqrt(found.variance(at) + se[-1] ** 2)
    return found and (found.error(at) - half, found.error(at) + half)


def interval(n: np.ndarray, errors: np.ndarray, se: np.ndarray, at: float) -> tuple | None:
    """Ours."""
    found = curve.fit(n, errors, se)
    return found and found.forecast(at)[1:]


def study(generator: Generator, law: Callable, shares: int, seeds: int, times: int) -> tuple:
    """Does the usual interval and does ours hold what is measured with so many times the examples? Is ours
    shown? Its width, in units of the present error."""
    n, spread = np.append(SHARES[:shares], times * SHARES[shares - 1]), generator.choice(SPREADS)
    errors, se = measured(generator, law(generator)(n), seeds, spread)
    known = n[:-1], errors[:-1], se[:-1]
    ends = interval(*known, n[-1])
    return held(normal_interval(*known, n[-1]), errors[-1]), held(ends, errors[-1]), *shown(*known, ends)


def held(ends: tuple | None, truth: float) -> bool:
    return ends is not None and bool(ends[0] <= truth <= ends[1])


def shown(n: np.ndarray, errors: np.ndarray, se: np.ndarray, ends: tuple | None) -> tuple[bool, float]:
    width = (ends[1] - ends[0]) / errors[-1] if ends else np.inf
    return bool(width <= curve.WIDEST and not reason_against(n, errors, se)), width


def coverage(law: Callable, shares: int, seeds: int, times: int, repetitions: int) -> list[float]:
    """Of the usual way, of ours, of ours where shown; the part that is shown, and its median width."""
    generator = np.random.default_rng(0)
    found = [study(generator, law, shares, seeds, times) for _ in range(repetitions)]
    usual, ours, seen, widths = (np.array(x) for x in zip(*found, strict=True))
    of_seen = [ours[seen].mean(), seen.mean(), np.median(widths[seen])] if seen.any() else [np.nan, 0, np.nan]
    return [usual.mean(), ours.mean(), *of_seen]


def crossings(repetitions: int) -> tuple[float, float, float]:
    """Of pairs of power laws: the part with a claim of where they cross, the part of these claims that hold
    where they do, and the part of the claims of no crossing that are right."""
    generator, claims, denials = np.random.default_rng(0), [], []
    n = np.geomspace(SHARES[0], curve.FARTHEST * SHARES[-1], 2000)
    for _ in range(repetitions):
        laws = [power_law(generator) for _ in range(2)]
        fits = [curve.fit(SHARES, *measured(generator, law(SHARES), 3, 0.007)) for law in laws]
        found = curve.crossing(*fits, n[0], n[-1])
        lower = laws[0](n) < laws[1](n)
        at = n[np.flatnonzero(lower != lower[0])]
        if found is False:
            denials.append(not len(at))
        elif found:
            claims.append(len(at) > 0 and found[1] <= at[0] <= found[2])
    return len(claims) / repetitions, float(np.mean(claims)), float(np.mean(denials))


def published() -> Iterator[tuple]:
    """(name, n, errors, standard errors of test sampling) of the published study's columns, one seed each."""
    table = FIGURES["tables"]["Table 1"]
    _, n, *columns = zip(*table["rows"], strict=True)
    for name, column in zip(table["columns"][2:], columns, strict=True):
        errors = 1 - np.array(column, float) / 100
        yield name, np.array(n, float), errors, np.sqrt(errors * (1 - errors) / EXAMPLES)


def recorded(folders: list[str]) -> Iterator[tuple]:
    """The same of each method in the records."""
    for task, why, group in comparable(find_runs(map(Path, folders))[0]):
        for label, found in forecasts(task, group).items():
            yield f"{label}{why and ', apart'}", found.n, found.errors, found.se


def hidden(columns: Iterator[tuple]) -> list[list]:
    """A row for each hidden share: where it is, what was forecast and measured, whether the usual interval
    and ours hold it, and whether the report would have shown ours."""
    rows = []
    for name, n, errors, se in columns:
        for kept in (len(n) - 1, len(n) - 2):
            for i in range(kept, len(n)) if kept >= curve.FEWEST else ():
                known = n[:kept], errors[:kept], se[:kept]
                ends = interval(*known, n[i])
                told = "[{:.1f}, {:.1f}]".format(*(100 * x for x in ends)) if ends else "—"
                place = [
                    name,
                    f"{kept} to {n[kept - 1]:,.0f}",
                    f"{n[i]:,.0f}",
                    told,
                    f"{100 * errors[i]:.1f}",
                ]
                holds = held(normal_interval(*known, n[i]), errors[i]), held(ends, errors[i])
                rows.append([*place, *holds, shown(*known, ends)[0]])
    return rows


def main() -> None:
    from tabulate import tabulate

    rows = []
    for law, shares, seeds in (
        *((power_law, 6, 3), (power_law, 5, 3), (power_law, 4, 3), (power_law, 6, 1)),
        *((delayed, 6, 3), (sigmoid, 6, 3), (exponential, 6, 3)),
    ):
        for times in (2, 10):
            several = "s" * (seeds > 1)
            of = f"{law.__name__.replace('_', ' ')}, {shares} shares, {seeds} seed{several}, {times} x"
            rows.append([of, *(f"{x:.2f}" for x in coverage(law, shares, seeds, times, 1000))])
    columns = ["of", "usual", "here", "here, shown", "part shown", "width / error"]
    print(tabulate(rows, columns, "github", disable_numparse=True))
    print("\nCrossings: claimed {:.2f}, right {:.2f}; denials right {:.2f}".format(*crossings(400)))
    columns = ["method", "fitted on", "hidden", "forecast", "measured", "usual", "here", "shown"]
    for title, source in (("Published columns", published()), ("Records", recorded(sys.argv[1:]))):
        found = hidden(source)
        usual, here, seen = (sum(row[i] for row in found) for i in (5, 6, 7))
        kept = sum(row[6] for row in found if row[7])
        print(f"\n{title}: usual {usual} of {len(found)}, here {here}, of those shown {kept} of {seen}\n")
        words = [[("no", "yes")[x] if isinstance(x, bool) else x for x in row] for row in found]
        print(tabulate(words, columns, "github", disable_numparse=True))


if __name__ == "__main__":
    main()
