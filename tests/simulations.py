"""What intervals and tests claim, held against simulated studies whose truth is known.

    python -m tests.simulations        # the tables of docs/statistics.md, in some minutes

"Usual" is the percentile bootstrap over the test examples and, of several seeds, sqrt(e^2 + s^2) with e the
mean of its halves and s Student's of the seeds' scores: what these tables showed before.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from types import SimpleNamespace

import numpy as np
from scipy.stats import norm, t

from study import metrics
from study.intervals import Parts, interval, of_difference, p_by_swapping
from study.report.calibration import Confidences, bins_of
from study.report.cells import Cell
from study.report.choice import Best
from study.report.classes import AS_SHOWN, Confusion, ends_within

Generator = np.random.Generator
HARD = 1.5  # how much examples differ in difficulty, in units of what else decides an answer


def answers(generator: Generator, seeds: int, examples: int, share: float, spread: float) -> np.ndarray:
    """Right or wrong, [seeds, examples], of a setting that is right on `share` of all examples, and whose
    trainings' scores have a standard deviation of `spread` points: a probit, with effects of both."""
    seed, middle = seed_effect(share, spread)
    latent = (
        middle + seed * generator.standard_normal((seeds, 1)) + HARD * generator.standard_normal(examples)
    )
    return (latent + generator.standard_normal((seeds, examples)) > 0).astype(float)


@cache
def seed_effect(share: float, spread: float) -> tuple[float, float]:
    """The probit's standard deviation between seeds that gives `spread` points, and its middle."""
    at, low, high = np.linspace(-5, 5, 401), 0.0, 4.0
    weights = norm.pdf(at) / norm.pdf(at).sum()
    for _ in range(40):
        size = (low + high) / 2
        middle = norm.ppf(share) * math.sqrt(1 + HARD**2 + size**2)
        scores = norm.cdf((middle + size * at) / math.sqrt(1 + HARD**2))
        sd = 100 * math.sqrt(max(weights @ scores**2 - (weights @ scores) ** 2, 0))
        low, high = (size, high) if sd < spread else (low, size)
    return size, middle


def rouge(generator: Generator, seeds: int, examples: int, mean: float, spread: float) -> np.ndarray:
    """Scores between 0 and 1, [seeds, examples]: those of beta distributions of the same examples, whose
    trainings' means have a standard deviation of `spread` points."""
    difficulty = generator.beta(4 * mean, 4 * (1 - mean), examples)
    noise = generator.normal(0, 0.08, (seeds, examples))
    shift = spread / 100 * generator.standard_normal((seeds, 1))
    return np.clip(difficulty + shift + noise * np.minimum(difficulty, 1 - difficulty) * 4, 0, 1)


def sparse(generator: Generator, examples: int, zeros: float) -> tuple[np.ndarray, float]:
    """ROUGE-2 of a poor model, [1, examples], and its mean in the long run."""
    values = np.where(generator.random((1, examples)) < zeros, 0, generator.beta(1, 5, (1, examples)))
    return values, (1 - zeros) / 6


def classified(
    generator: Generator, classes: int, examples: int, seeds: int = 1, spread: float = 0
) -> tuple[list, np.ndarray]:
    """`per_example` of each seed of a classifier that is right on some 70 % of each class, and how often it
    gives which answer to each class, [references, answers], on all examples and seeds. A seed changes how
    often it is right on a class by up to the share `spread` of what it can change by, up and down alike."""
    right = np.clip(generator.normal(0.7, 0.15, classes), 0.05, 0.98)
    confused = generator.dirichlet(np.full(classes - 1, 0.3), classes)

    def table(right: np.ndarray) -> np.ndarray:
        found = np.zeros((classes, classes))
        found[~np.eye(classes, dtype=bool)] = (confused * (1 - right[:, None])).ravel()
        return found + np.diag(right)

    references = generator.integers(0, classes, examples)
    names = [f"{i:02d}" for i in range(classes)]
    runs = []
    for _ in range(seeds):
        shift = spread * generator.uniform(-1, 1, classes) if spread else 0
        chances = table(right + shift * np.minimum(right, 1 - right))
        named = (generator.random((examples, 1)) > chances[references].cumsum(axis=1)).sum(axis=1)
        named = np.minimum(named, classes - 1)
        runs.append({"classes": names, "references": references.tolist(), "answers": named.tolist()})
    return runs, table(right)


def shares_of_classes(table: np.ndarray) -> dict[str, np.ndarray]:
    """Of such a classifier, on all examples, [classes]."""
    hits, answered = np.diag(table), table.sum(axis=0)
    return {"precision": hits / answered, "recall": hits, "F1": 2 * hits / (1 + answered)}


def confident(
    generator: Generator, examples: int, seeds: int = 1, excess: float = 0.0, digits: int = 9
) -> Confidences:
    """Answers that are right as often as they are sure, less `excess` times the root of that."""
    difficulty, luck = generator.normal(1, 1.2, examples), generator.random(examples)
    logits = difficulty + generator.normal(0, 0.3, (seeds, examples))
    sure = (1 / (1 + np.exp(-logits))).round(digits)
    return Confidences(sure, luck < sure - excess * np.sqrt(sure))


def calibration_error_of(found: Confidences) -> float:
    """Of the first seed, in percent."""
    gap = found.right[0] - found.sure[0]
    return 100 * float(np.abs(np.bincount(bins_of(found.sure[0]), gap)).sum()) / len(gap)


OF_CONFIDENCE = {
    "ECE": Confidences.error,
    "AUROC": Confidences.auroc,
    "accuracy at 75 % coverage": lambda found: found.kept(0.75),
    "confidence - accuracy": Confidences.overconfidence,
}


@cache
def on_all(what: str, excess: float, digits: int) -> float:
    found = confident(np.random.default_rng(1), 300_000, 1, excess, digits)
    return calibration_error_of(found) if what == "ECE" else OF_CONFIDENCE[what](found).value


def percentiles(statistic: Callable, examples: int, generator: Generator, resamples: int = 300) -> tuple:
    """The usual interval: of a statistic of indices [resamples, examples]."""
    return tuple(
        np.percentile(statistic(generator.integers(0, examples, (resamples, examples))), [2.5, 97.5])
    )


def usual(values: np.ndarray, generator: Generator) -> tuple[float, float]:
    """Of values [seeds, examples]; with several seeds the bootstrap of a mean by its normal limit."""
    mean, (seeds, examples) = values.mean(), values.shape
    if seeds == 1:
        return percentiles(lambda indices: values[0][indices].mean(axis=1), examples, generator)
    e = 1.96 * (values.std(axis=1) / math.sqrt(examples)).mean()
    s = t.ppf(0.975, seeds - 1) * values.mean(axis=1).std(ddof=1) / math.sqrt(seeds)
    return mean - math.hypot(e, s), mean + math.hypot(e, s)


def usual_macro_f1(of: dict, generator: Generator) -> tuple[float, float]:
    truth, named = np.array(of["references"]), np.array(of["answers"])

    def statistic(indices: np.ndarray) -> list[float]:
        return [metrics.Answers(len(of["classes"]), truth[i], named[i]).scores()["macro_f1"] for i in indices]

    return percentiles(statistic, len(truth), generator, 200)


def held(ends: tuple[float, float] | None, truth: float) -> bool | None:
    return None if ends is None else ends[0] <= truth <= ends[1]


def share_of(found: list) -> float:
    """Of those that are not None."""
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if known else math.nan


# Each study below gives, of one seed of a generator, what the usual way and ours come to: whether an interval
# held the truth, or a test rejected what is so.


def coverage_of_adapter(generator: Generator, examples: int, share: float) -> tuple:
    """One run's accuracy, held against the same adapter's on all examples."""
    values = (generator.random((1, examples)) < share).astype(float)
    return held(usual(values, generator), share), held(interval(values), share)


def coverage_of_setting(
    generator: Generator, seeds: int, examples: int, share: float, spread: float
) -> tuple:
    values = answers(generator, seeds, examples, share, spread)
    return held(usual(values, generator), share), held(interval(values), share)


def width_of_setting(generator: Generator, seeds: int, examples: int, share: float, spread: float) -> tuple:
    """Half of the intervals, in points."""
    values = answers(generator, seeds, examples, share, spread)
    return tuple(50 * (ends[1] - ends[0]) for ends in (usual(values, generator), interval(values)))


def coverage_of_sparse(generator: Generator, examples: int, zeros: float) -> tuple:
    values, truth = sparse(generator, examples, zeros)
    return held(usual(values, generator), truth), held(interval(values), truth)


def coverage_of_macro_f1(generator: Generator, classes: int, examples: int, seeds: int = 1) -> tuple:
    runs, table = classified(generator, classes, examples, seeds)
    truth = shares_of_classes(table)["F1"].mean()
    values = np.stack([metrics.examples_of(of).values()["macro_f1"] for of in runs])
    ours = metrics.interval_of("macro_f1", values)
    return held(usual_macro_f1(runs[0], generator), truth) if seeds == 1 else None, held(ours, 100 * truth)


def coverage_of_class(
    generator: Generator, classes: int, examples: int, what: str, seeds: int = 1, spread: float = 0
) -> tuple:
    """Precision, recall or F1 of the first class."""
    runs, table = classified(generator, classes, examples, seeds, spread)
    truth, of = shares_of_classes(table)[what][0], Confusion.of(runs)
    hits, members = of.counted(0)[what]

    def f1_or_share(indices: np.ndarray) -> np.ndarray:
        share = metrics.ratio(hits[0][indices].sum(axis=1), members[0][indices].sum(axis=1))
        return AS_SHOWN[what](share)

    ends = percentiles(f1_or_share, examples, generator) if seeds == 1 else None
    return held(ends, truth), held(ends_within(hits, members, what), 100 * truth)


def coverage_of_confidence(
    generator: Generator, what: str, examples: int, seeds: int = 1, excess: float = 0.0, digits: int = 9
) -> tuple:
    """A figure of a table of confidence."""
    found, truth = confident(generator, examples, seeds, excess, digits), on_all(what, excess, digits)

    def statistic(indices: np.ndarray) -> list[float]:
        drawn = [Confidences(found.sure[:, i], found.right[:, i]) for i in indices]
        return [
            calibration_error_of(one) if what == "ECE" else OF_CONFIDENCE[what](one).value for one in drawn
        ]

    ends = percentiles(statistic, examples, generator, 200) if seeds == 1 else None
    return held(ends, truth), held(OF_CONFIDENCE[what](found).ends, truth)


def false_difference(generator: Generator, seeds: int, examples: int, spread: float, kind=answers) -> tuple:
    """Two settings that are the same, with other seeds each: is their difference told from 0? The usual way
    is the test of the first pair alone."""
    both = kind(generator, 2 * seeds, examples, 0.7 if kind is answers else 0.4, spread)
    ours, theirs = both[:seeds], both[seeds:]
    return of_difference(ours[:1], theirs[:1]).p() < 0.05, of_difference(ours, theirs).p() < 0.05


def false_adapter_difference(generator: Generator, examples: int, differ: float) -> tuple:
    """Two adapters that are as good as each other, and differ on some examples: the test of two runs."""
    changed = (generator.random(examples) < differ) * generator.choice([-1.0, 1.0], examples)
    usual_way = rejected_by_bootstrap(changed, generator)
    return usual_way, p_by_swapping(lambda swaps: (1 - 2 * swaps) @ changed, examples) < 0.05


def rejected_by_bootstrap(changed: np.ndarray, generator: Generator) -> bool:
    examples = len(changed)
    draws = generator.multinomial(examples, np.full(examples, 1 / examples), 1000) @ changed
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    return 2 * (tail + 1) / 1001 < 0.05


def coverage_of_difference(generator: Generator, examples: int, won: float, lost: float) -> tuple:
    """The difference in accuracy of two adapters."""
    changed = generator.choice([1.0, -1.0, 0.0], examples, p=[won, lost, 1 - won - lost])[None]
    parts = of_difference(changed, np.zeros((1, examples)))
    ends = percentiles(lambda indices: changed[0][indices].mean(axis=1), examples, generator)
    return held(ends, won - lost), abs(parts.mean - (won - lost)) <= parts.reach()


def best_of_many(generator: Generator, cells: int, seeds: int, examples: int, spread: float) -> tuple:
    """So many cells that are equal: does the interval of the one with the best score hold the truth, as it
    stands and at the level of such a choice?"""
    hard = HARD * generator.standard_normal(examples)
    marked = Best({i: cell_of(generator, hard, seeds, 0.7, spread) for i in range(cells)}, "accuracy")
    best = np.stack([run.values["accuracy"] for run in marked.cells[marked.at].runs])
    return held(interval(best), 0.7), held(marked.ends(), 70)


def cell_of(generator: Generator, hard: np.ndarray, seeds: int, share: float, spread: float) -> Cell:
    """A cell of a grid, whose runs share how hard the test examples are with the other cells."""
    size, middle = seed_effect(share, spread)
    latent = middle + size * generator.standard_normal((seeds, 1)) + hard
    right = (latent + generator.standard_normal((seeds, len(hard))) > 0).astype(float)
    return Cell("", 100 * right.mean(), None, tuple(as_run(row, seed) for seed, row in enumerate(right)))


def marked(generator: Generator, seeds: int, shares: list, spreads: list, examples: int = 819) -> set:
    """The cells of a grid, of such shares and spreads between seeds, that are marked as the best or a tie."""
    hard = HARD * generator.standard_normal(examples)
    each = zip(shares, spreads, strict=True)
    grid = {i: cell_of(generator, hard, seeds, share, spread) for i, (share, spread) in enumerate(each)}
    best = Best(grid, "accuracy")
    return {*best.ties, best.at}


def best_is_marked(generator: Generator, cells: int, seeds: int, spread: float, of_others: float) -> tuple:
    """Of equal cells any may be the best: is the first marked, whose spread is another than the others'?"""
    return None, 0 in marked(generator, seeds, [0.7] * cells, [spread] + [of_others] * (cells - 1))


def worse_is_left_out(generator: Generator, cells: int, seeds: int, spread: float, points: float) -> tuple:
    """Is a cell left out that is worse by so many points than the others?"""
    shares = [0.7 - points / 100] + [0.7] * (cells - 1)
    return None, 0 not in marked(generator, seeds, shares, [spread] * cells)


class AsRun(SimpleNamespace):
    """As much of a run as its comparison needs."""

    __hash__ = object.__hash__


def as_run(values: np.ndarray, seed: int) -> AsRun:
    scored = {"metrics": {"accuracy": {"value": 100 * values.mean()}}, "examples": len(values)}
    more = {"seed": seed, "chosen_by": None, "examples": True, "references": []}
    return AsRun(values={"accuracy": values}, scored=scored, **more)


def power(generator: Generator, seeds: int, examples: int, spread: float, pairs: int = 8) -> tuple:
    """Is a difference of the size that is said to be detectable, on average over `pairs` of settings, told
    from 0?"""

    def pair() -> Parts:
        both = answers(generator, 2 * seeds, examples, 0.7, spread)
        return of_difference(both[:seeds], both[seeds:])

    size = np.mean([pair().detectable() for _ in range(pairs)])
    both = answers(generator, 2 * seeds, examples, 0.7, spread)
    shifted = both[:seeds].copy()
    return None, of_difference(shifted + size, both[seeds:]).p() < 0.05


def rates(study: Callable, repetitions: int, *args, seed: int = 0, **more) -> tuple[float, float]:
    """The share of repetitions, of the usual way and of ours."""
    generator = np.random.default_rng(seed)
    usual_way, ours = zip(*(study(generator, *args, **more) for _ in range(repetitions)), strict=True)
    return share_of(usual_way), share_of(ours)


def cases() -> Iterator[tuple]:
    """(what, of what, study, repetitions, arguments)."""
    for examples, share in ((160, 0.7), (160, 0.99), (40, 0.95)):
        what = f"{examples:,} examples, {share:.0%} right"
        yield "interval, accuracy of an adapter", what, coverage_of_adapter, 1000, (examples, share)
    for seeds, examples, spread in (
        *((1, 819, 2), (1, 819, 5), (3, 80, 2), (3, 819, 0), (3, 819, 5), (3, 7317, 0.5), (5, 819, 2)),
    ):
        what = f"{seeds} seed{'s' * (seeds > 1)}, {examples:,} examples, sd {spread}"
        args = seeds, examples, 0.7, spread
        yield "interval, accuracy of a setting", what, coverage_of_setting, 1000, args
    for seeds, examples, spread in ((3, 80, 2), (3, 7317, 0.5)):
        what = f"{seeds} seeds, {examples:,} examples, sd {spread}"
        yield "half of that interval, points", what, width_of_setting, 300, (seeds, examples, 0.7, spread)
    for examples, zeros in ((80, 0.6), (80, 0.95)):
        what = f"{examples} examples, {zeros:.0%} of them 0"
        yield "interval, ROUGE of an adapter", what, coverage_of_sparse, 1000, (examples, zeros)
    for classes, examples, seeds in ((20, 160, 1), (77, 256, 1), (20, 160, 3)):
        what = f"{classes} classes, {examples} examples, {seeds} seed{'s' * (seeds > 1)}"
        yield "interval, macro F1", what, coverage_of_macro_f1, 300, (classes, examples, seeds)
    for what, examples, seeds, spread in (
        *((what, 160, 1, 0) for what in AS_SHOWN),
        *(("F1", 1600, 1, 0), ("F1", 160, 3, 0.5), ("precision", 1600, 3, 0.5), ("F1", 1600, 3, 0.5)),
    ):
        of = f"20 classes, {examples:,} examples, {seeds} seed{'s' * (seeds > 1)}"
        yield f"interval, {what} of a class", of, coverage_of_class, 1000, (20, examples, what, seeds, spread)
    of_confidence = (300, 1, 0.0), (300, 1, 0.15), (300, 3, 0.15), (2000, 1, 0.15)
    for what, args in product(OF_CONFIDENCE, of_confidence):
        kind = "overconfident" if args[2] else "calibrated"
        of = f"{kind}, {args[0]:,} examples, {args[1]} seed{'s' * (args[1] > 1)}"
        yield f"interval, {what}", of, coverage_of_confidence, 200, (what, *args)
    for examples, won, lost in ((160, 0.02, 0.0), (819, 0.01, 0.005)):
        what = f"{examples} examples, {won:.1%} won, {lost:.1%} lost"
        yield (
            "interval, difference of two adapters",
            what,
            coverage_of_difference,
            1000,
            (examples, won, lost),
        )
    yield (
        *("rejected, equal adapters", "160 examples, 30% of them differ"),
        *(false_adapter_difference, 400, (160, 0.3)),
    )
    for seeds, examples, spread, kind in (
        *((1, 7317, 0.5, answers), (1, 7317, 1, answers), (2, 7317, 1, answers), (3, 160, 2, answers)),
        *((3, 7317, 1, answers), (1, 819, 1, rouge), (3, 819, 1, rouge)),
    ):
        score, several = "accuracy" if kind is answers else "ROUGE", "s" * (seeds > 1)
        what = f"{score}, {seeds} seed{several} a side, {examples:,} examples, sd {spread}"
        yield "rejected, equal settings", what, false_difference, 300, (seeds, examples, spread, kind)
    for seeds, spread in ((1, 0), (3, 1)):
        what = f"72 equal cells, {seeds} seed{'s' * (seeds > 1)}, 819 examples, sd {spread}"
        yield "interval, the best of many", what, best_of_many, 100, (72, seeds, 819, spread)
    for cells, spread, of_others in ((12, 1, 1), (24, 5, 0.5)):
        what = f"{cells} equal cells, 3 seeds, sd {spread}, of the others {of_others}"
        yield "marked, a best cell", what, best_is_marked, 200, (cells, 3, spread, of_others)
    what = "12 cells, 3 seeds, sd 1, one 10 points worse"
    yield "left out, a worse cell", what, worse_is_left_out, 200, (12, 3, 1, 10)
    for seeds in (3, 5):
        what = f"{seeds} seeds a side, 819 examples, sd 1"
        yield "detected, a difference said to be (80 %)", what, power, 300, (seeds, 819, 1)


def main() -> None:
    from tabulate import tabulate

    rows = []
    for claim, what, study, repetitions, args in cases():
        before, now = rates(study, repetitions, *args)
        digits = 1 if "points" in claim else 2
        rows.append([claim, what, *("" if math.isnan(x) else f"{x:.{digits}f}" for x in (before, now))])
    print(tabulate(rows, ["what", "of", "usual", "here"], "github", disable_numparse=True))


if __name__ == "__main__":
    main()
