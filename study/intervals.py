"""What a score of some seeds on some test examples says of the setting: its 95 % interval, the paired
difference of two settings, and p. docs/statistics.md has the formulas, their references and what they cover.

Values are [seeds, examples]: what each example adds to the score of each seed, as a share of 1. Their mean is
the score. Of accuracy and ROUGE these are the examples' own scores, of F1 the jackknife's pseudo-values.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

LEVEL = 0.95
RARE = 10  # examples
SWAPS = 4999  # so that the smallest p is 1/5000


@dataclass(frozen=True)
class Parts:
    """The two-way analysis of variance of values [seeds, examples]: their mean, and the mean squares between
    seeds, between examples and of the rest. With one seed the spread between seeds is unknown. It has
    `freedom_of_seeds` degrees of freedom: seeds - 1, or more where it was pooled over settings."""

    mean: float
    seeds: int
    examples: int
    of_seeds: float
    of_examples: float
    of_rest: float
    freedom_of_seeds: float

    def variance(self) -> float:
        """Of the mean: (MS_seed + MS_example - MS_rest) / (n N) (Searle, Casella and McCulloch, 1992,
        chapter 4), where a part that comes out below 0 counts as 0."""
        squares = self.of_seeds, self.of_examples, self.of_seeds + self.of_examples - self.of_rest
        return max(squares) / (self.seeds * self.examples)

    def freedom(self) -> float:
        """Satterthwaite's degrees of freedom (1946) of the variance."""
        n, m = self.freedom_of_seeds, self.examples - 1
        if n == 0 or self.variance() == 0:
            return m
        squares = self.of_seeds**2 / n + self.of_examples**2 / m + self.of_rest**2 / (n * m)
        return min(max((self.variance() * self.seeds * self.examples) ** 2 / squares, 1), m)

    def errors(self) -> list[tuple[float, float]]:
        """Standard error of the mean and its degrees of freedom: by the variance and, of several seeds, by
        the spread of their scores alone, since a few of them may agree by chance. None that is 0."""
        errors = [(math.sqrt(self.variance()), self.freedom())]
        if self.seeds > 1:
            errors.append((math.sqrt(self.of_seeds / (self.seeds * self.examples)), self.freedom_of_seeds))
        return [(error, freedom) for error, freedom in errors if error]

    def reach(self, level: float = LEVEL) -> float:
        """Half of the interval of the mean: t times the error, the larger of `errors`."""
        from scipy.special import stdtrit

        return max(
            (float(stdtrit(freedom, (1 + level) / 2)) * error for error, freedom in self.errors()), default=0
        )

    def p(self) -> float:
        """The two-sided p of a mean of 0, by the tests that `reach` inverts."""
        from scipy.special import stdtr

        found = [2 * float(stdtr(freedom, -abs(self.mean) / error)) for error, freedom in self.errors()]
        return max(found, default=1.0)

    def detectable(self, power: float = 0.8) -> float:
        """The smallest mean that these tests tell from 0 with this `power`, by the noncentral t."""
        from scipy.optimize import brentq
        from scipy.stats import nct, t

        def missed(mean: float, error: float, freedom: float) -> float:
            return power - nct.sf(t.ppf(0.975, freedom), freedom, mean / error)

        sizes = [brentq(missed, 0, 1000 * error, (error, of)) for error, of in self.errors()]
        return max(sizes, default=0.0)

    def between_seeds(self) -> float:
        """Standard deviation of what a seed changes, without what the sample of test examples adds to it."""
        return math.sqrt(max(self.of_seeds - self.of_rest, 0) / self.examples)

    def pooled(self, of: tuple[float, float] | None) -> "Parts":
        """The same with the variance that seeds make, and its degrees of freedom, from many settings."""
        if of is None:
            return self
        return replace(self, of_seeds=self.examples * of[0], freedom_of_seeds=of[1])

    def expected(self, seeds: int) -> "Parts":
        """The same as it may be expected with another number of seeds, at the variances found here."""
        of_examples = self.of_rest + (self.of_examples - self.of_rest) * seeds / self.seeds
        return replace(self, seeds=seeds, of_examples=of_examples, freedom_of_seeds=seeds - 1)


def parts_of(values: np.ndarray) -> Parts:
    """Of values [seeds, examples]."""
    seeds, examples = values.shape
    mean, rows, columns = values.mean(), values.mean(axis=1), values.mean(axis=0)
    of_examples = seeds * ((columns - mean) ** 2).sum() / max(examples - 1, 1)
    if seeds == 1:
        return Parts(float(mean), 1, examples, 0.0, float(of_examples), 0.0, 0)
    of_seeds = examples * ((rows - mean) ** 2).sum() / (seeds - 1)
    rest = ((values - rows[:, None] - columns + mean) ** 2).sum() / ((seeds - 1) * max(examples - 1, 1))
    squares = float(of_seeds), float(of_examples), float(rest)
    return Parts(float(mean), seeds, examples, *squares, seeds - 1)


@dataclass(frozen=True)
class Pool:
    """What seeds change in scores [settings, seeds] of the same seeds (randomized blocks: Fisher, 1935): the
    variance of one score, and of the difference of two of one seed, with their degrees of freedom."""

    of_score: tuple[float, float]
    of_difference: tuple[float, float]


def pool(scores: np.ndarray) -> Pool:
    """Of scores [settings, seeds], two or more of both."""
    settings, seeds = scores.shape
    rest = scores - scores.mean(axis=1, keepdims=True) - scores.mean(axis=0) + scores.mean()
    freedom = (settings - 1) * (seeds - 1)
    square = float((rest**2).sum() / freedom)
    common = float(scores.mean(axis=0).var(ddof=1))  # of what a seed changes everywhere, and of the rest / k
    apart = square * (1 - 1 / settings)
    squares = common**2 / (seeds - 1) + apart**2 / freedom
    return Pool((common + apart, (common + apart) ** 2 / squares if squares else 1), (2 * square, freedom))


def wilson(share: float, examples: float, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval (1927) of a share of so many examples."""
    return bent(share, z**2 * share * (1 - share) / examples, z**2 / examples)


def bent(mean: float, squared: float, weight: float | None = None) -> tuple[float, float]:
    """Wilson's interval of a mean between 0 and 1, of whose straight one half is sqrt(`squared`): as of a
    share of mean (1 - mean) / variance examples (Korn and Graubard, 1998). It stays within 0 and 1."""
    spread = mean * (1 - mean)
    weight = squared / spread if weight is None else weight
    middle = (mean + weight / 2) / (1 + weight)
    half = math.sqrt(weight * (spread + weight / 4)) / (1 + weight)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def interval(
    values: np.ndarray, pseudo: bool = False, level: float = LEVEL, pooled: tuple[float, float] | None = None
) -> tuple[float, float] | None:
    """Of the mean of values [seeds, examples]. None where it can't be trusted: for less than two examples,
    and for `pseudo`-values that are all alike or whose mean is not between 0 and 1. `pooled` is the variance
    that seeds make, of a Pool.

    Of one seed's shares it is Wilson's own. Other scores that next to nowhere differ from 0, or from 1, get
    one at least as wide as a share would.
    """
    from scipy.special import ndtri  # scipy.stats takes half a second to import

    parts, z = parts_of(values).pooled(pooled), ndtri((1 + level) / 2)
    if parts.examples < 2 or (pseudo and not (parts.variance() and 0 < parts.mean < 1)):
        return None
    if not 0 < parts.mean < 1:
        return wilson(parts.mean, parts.examples, z)
    squared, of_share = parts.reach(level) ** 2, z**2 * parts.mean * (1 - parts.mean) / parts.examples
    if parts.seeds == 1 and ((values == 0) | (values == 1)).all():
        squared = of_share
    elif not pseudo and min(np.any(values != end, axis=0).sum() for end in (0, 1)) < RARE:
        squared = max(squared, of_share)
    return bent(parts.mean, squared)


def within(hits: np.ndarray, members: np.ndarray) -> tuple[float, float] | None:
    """Of the share R of `members` that are `hits`, both [seeds, examples] and counted over all seeds: of
    precision, say, the right answers among those that name a class. None for less than two examples.

    Of one seed it is Wilson's. Seeds may have other members, so an example adds
    R + (hit - R member) / mean(member) (Cochran, 1977, chapter 6), over those that are members of any seed.
    """
    there = members.any(axis=0)
    hits, members = hits[:, there].astype(float), members[:, there].astype(float)
    if members.size == 0:
        return None
    share, usual = hits.sum() / members.sum(), members.mean()
    return interval(share * (1 - members / usual) + hits / usual)


def of_difference(ours: np.ndarray, theirs: np.ndarray) -> Parts:
    """Of ours - theirs, both [seeds, examples]. Shares get two examples more, of half a win and half a loss
    (Agresti and Min, 2005), lest a few that differ, or none, seem certain."""
    values = ours - theirs
    mean = float(values.mean())
    if np.isin(values, (-1, 0, 1)).all():
        more = np.full((len(values), 1), math.sqrt(0.5))
        values = np.hstack([values, more, -more])
    return replace(parts_of(values), mean=mean)


def p_by_swapping(change: Callable[[np.ndarray], np.ndarray], examples: int, seed: int = 0) -> float:
    """The two-sided p of the difference between two runs on the same examples, if on each of them A and B
    might as well be swapped: (1 + #{|T*| >= |T|}) / (1 + SWAPS) (Noreen, 1989). `change` gives T of swaps
    [repetitions, examples], 0 or 1."""
    generator = np.random.default_rng(seed)
    least = abs(change(np.zeros((1, examples)))[0]) * (1 - 1e-9)
    found, left = 0, SWAPS
    while left:  # some at a time keep the swaps of a large test set small
        size = min(left, 250)
        swaps = generator.integers(0, 2, (size, examples)).astype(float)
        found += int((np.abs(change(swaps)) >= least).sum())
        left -= size
    return (1 + found) / (1 + SWAPS)
