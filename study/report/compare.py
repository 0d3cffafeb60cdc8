"""The paired difference of two settings on the same test examples, for tables and for --compare."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from study import intervals, metrics
from study.errors import UserError
from study.records.record import read_whole
from study.records.schema import PARTS, SCORES
from study.report.cells import Cell, shown
from study.report.collect import Run, check_examples


@dataclass(frozen=True)
class Difference:
    """Of the first setting less the second, in a metric: of each pair of seeds in points, and of them all."""

    each: list[float]
    parts: intervals.Parts
    pairs: list[tuple[Run, Run]]

    @property
    def value(self) -> float:
        return sum(self.each) / len(self.each)

    @property
    def seeded(self) -> bool:
        """Whether another seed might come out otherwise."""
        return any(run.seed is not None for pair in self.pairs for run in pair)

    def ends(self) -> tuple[float, float] | None:
        """Of its 95 % interval, in points; None for a single test example."""
        if self.pairs[0][0].scored["examples"] < 2:
            return None
        middle, reach = 100 * self.parts.mean, 100 * self.parts.reach()
        return max(middle - reach, -100.0), min(middle + reach, 100.0)

    def cell(self) -> Cell:
        runs = dict.fromkeys(run for pair in self.pairs for run in pair)
        ends = None if self.seeded and len(self.each) == 2 else self.ends()
        text = shown(self.each, ends, self.seeded, "+")
        return Cell(text, self.value, ends, tuple(runs), len(self.each))

    def worse(self, pooled: tuple[float, float] | None = None) -> float:
        """The one-sided p of the first being no worse than the second."""
        p = self.parts.pooled(pooled).p()
        return p / 2 if self.value < 0 else 1 - p / 2


def difference(ours: Sequence[Run], theirs: Sequence[Run], metric: str) -> Difference | None:
    """None where either setting has no score, or one of an older record without a value of each example."""
    pairs = paired(*([run for run in side if run.examples] for side in (ours, theirs)))
    return of_pairs(pairs, metric) if pairs else None


def of_pairs(pairs: list[tuple[Run, Run]], metric: str) -> Difference:
    """Raises UserError where two runs have other references to an example, which they then do not share."""
    for run in {run for pair in pairs for run in pair}:
        if not agree(run, pairs[0][0]):
            both = f"{pairs[0][0].path} and {run.path}"
            raise UserError(
                f"{both} have other classes as references of the same test examples: score one again"
            )
    sides = (np.stack([run.values[metric] for run in side]) for side in zip(*pairs, strict=True))
    scores = [[run.scored["metrics"][metric]["value"] for run in pair] for pair in pairs]
    return Difference([one - other for one, other in scores], intervals.of_difference(*sides), pairs)


def agree(one: Run, other: Run) -> bool:
    """Whether all test examples have the same classes as references; mostly these have the same numbers."""
    ours, theirs = (run.scored.get("per_example") or {} for run in (one, other))
    numbered_alike = all(ours.get(name) == theirs.get(name) for name in ("classes", "references"))
    return numbered_alike or one.references == other.references


def paired(ours: Sequence[Run], theirs: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Runs of two settings, seed by seed: those of the seeds that both have, and the others in their order; a
    run without a seed stands beside each of the other side."""
    sides = [sorted(side, key=lambda run: run.seed or 0) for side in (ours, theirs)]
    for i, side in enumerate(sides):
        if len(side) == 1 and side[0].seed is None:
            sides[i] = side * len(sides[1 - i])
    common = {run.seed for run in sides[0]} & {run.seed for run in sides[1]}
    ordered = (sorted(side, key=lambda run: run.seed not in common) for side in sides)
    return list(zip(*ordered, strict=False))


def compare(ours: Sequence[Path], theirs: Sequence[Path]) -> str:
    """Both scores of two settings, each given by the runs of its seeds, their difference with its 95 %
    interval, and p. Raises UserError where they were not scored on the same examples in the same way, or
    where the runs of a side differ in more than their seeds."""
    from tabulate import tabulate

    sides = [[read_scored(scored_in(path)) for path in paths] for paths in (ours, theirs)]
    runs = [run for side in sides for run in side]
    for run in runs:
        if run.random:
            raise UserError(f"--compare: {run.path} is of random weights: it has no score to compare")
    for what, known in (
        ("test examples", [run.test()["sha256"][:8] for run in runs]),
        ("metric versions", [run.scored.get("metrics_version") for run in runs]),
    ):
        for run, value in zip(runs, known, strict=True):
            if value != known[0]:
                both = f"{runs[0].path} and {run.path} have different {what}"
                raise UserError(f"--compare: {both}: {known[0]}, {value}")
    for side in sides:
        check_side(side)
    table, task = [], runs[0].task
    for name, title in SCORES[task].items():
        found = difference(*sides, name)
        ends = "—"
        if found.ends() and (name != "macro_f1" or all(run.examples.trusted() for run in runs)):
            ends = "{:+.2f} to {:+.2f}".format(*found.ends())
        scores = [score_of(side, name) for side in zip(*found.pairs, strict=True)]
        table.append([title, *scores, f"{found.value:+.2f}", ends, p_text(*p_of(found, name))])
    lines = [f"{letter}: {run.path.parent}" for letter, side in zip("AB", sides, strict=True) for run in side]
    titles = ["", "A", "B", "A - B", "95 % interval", "p"]
    lines += ["", tabulate(table, titles, "github", disable_numparse=True), "", *about(found, sides)]
    return "\n".join(lines)


def score_of(side: Sequence[Run], metric: str) -> str:
    values = [run.scored["metrics"][metric]["value"] for run in side]
    return f"{sum(values) / len(values):.2f}"


def p_of(found: Difference, metric: str) -> tuple[float, float]:
    """p, and the least that it can be: of two runs by swapping, of several seeds by the interval's t."""
    if len(found.pairs) > 1:
        return found.parts.p(), 0.0001
    per_example = (run.scored["per_example"] for run in found.pairs[0])
    return metrics.p_of_two(metric, *per_example), 1 / (1 + intervals.SWAPS)


def p_text(p: float, least: float) -> str:
    return f"<= {least:.4f}" if p <= least else f"{p:.4f}"


def about(found: Difference, sides: Sequence[Sequence[Run]]) -> list[str]:
    """What was compared, and of what the interval and p hold."""
    count, (one, other) = len(found.pairs), found.pairs[0]
    examples = f"the same {one.scored['examples']:,} test examples"
    left = [str(run.path.parent) for side in sides for run in side if run not in {*sum(found.pairs, ())}]
    lines = []
    if count > 1:
        seeds = ", ".join(
            str(a.seed if a.seed == b.seed else f"{a.seed} with {b.seed}") for a, b in found.pairs
        )
        lines.append(
            f"Of the settings: {count} pairs of seeds ({seeds}) on {examples}. Interval and p allow for "
            "other seeds and for other examples."
        )
    elif found.seeded:
        what = "adapters" if all(run.method.trains for run in (one, other)) else "runs"
        lines.append(
            f"Of these two {what}, not of the settings: one seed a side, on {examples}. Other seeds may "
            "differ by as much: name several a side, by --against."
        )
    else:
        lines.append(f"Two runs without a seed, on {examples}.")
    if left:
        lines.append(f"Left out, for the other side has fewer runs: {', '.join(left)}")
    if count == 1 and one.task == "classification":
        won, lost, p = metrics.mcnemar(*(run.scored["per_example"] for run in (one, other)))
        alone = f"A alone is right {won:,} times, B alone {lost:,} times"
        lines.append(f"McNemar's exact test: {alone}, p = {p:.2g}.")
    return lines


def check_side(side: Sequence[Run]) -> None:
    """Raise UserError where the runs of a side are not one setting with several seeds."""
    first = side[0]
    names = ["method", "task", "model"]
    for run in side[1:]:
        other = [name for name in names if run.content[name] != first.content[name]]
        settings = {*first.method.settings} - {"seed"}
        other += [f"--{n}" for n in sorted(settings) if run.config.get(n) != first.config.get(n)]
        if other:
            raise UserError(
                f"--compare: {first.path.parent} and {run.path.parent} are on one side, and differ in "
                f"{', '.join(other)}: put them on two sides, by --against"
            )
    seeds = [run.seed for run in side]
    twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--compare: two runs of one side have the same seed ({twice}): name each once")


def scored_in(path: Path) -> Path:
    """The evaluation's record that `path` is, or that lies in this folder of a run: eval.json, or the only
    one. Raises UserError where there are several others."""
    if not path.is_dir():
        return path
    names = sorted(found.name for found in path.glob(PARTS["eval"].files))
    if "eval.json" in names or len(names) < 2:
        return path / (names[0] if len(names) == 1 else "eval.json")
    raise UserError(f"--compare {path} has several evaluations: name one of {', '.join(names)}")


def read_scored(path: Path) -> Run:
    """The run of a finished evaluation's record. Raises UserError where there is none, or an older one."""
    content = read_whole(path, "eval")
    if not content or content["status"] != "finished":
        raise UserError(f"--compare {path}: there is no finished evaluation")
    if not content["eval"].get("per_example"):
        raise UserError(
            f"--compare {path} is an older record, without a value of each example: python -m study.report "
            f"--rescore {path.parent} makes it anew from its predictions"
        )
    return Run(path, content, None, "finished", examples=check_examples(content, path))
