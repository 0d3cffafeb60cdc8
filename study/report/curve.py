"""Learning curves: the error that more training examples would leave, forecast from some training shares.

    error(n) = a + b (n / n_1)^-c,    a, b, c >= 0,    n_1 the smallest share

is a power law (Hestness et al., 2017, https://arxiv.org/abs/1712.00409) with a floor `a`, which no number of
labels gets below: POW3 of the shapes that Viering and Loog compare (2021, https://arxiv.org/abs/2103.10948).
A few shares may not determine the floor, which matters most far beyond them (Mahmood et al., 2022,
https://arxiv.org/abs/2207.01725): then the intervals are wide. Errors are shares of 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

FEWEST = 4  # training shares: one more than there are parameters
FARTHEST = 10  # times the labels
WIDEST = 0.5  # of the present error: a wider interval is of no use
STEEPEST = 3.0  # exponent
RISE = 2.5  # standard errors: one-sided 0.05 over some 8 pairs of shares


@dataclass(frozen=True)
class Curve:
    """A fit by weighted least squares: the parameters (a, b, c) and their covariance [3, 3] by the standard
    errors of what was measured. `misfit` is chi^2 / (shares - 3): 1, if these tell all of the scatter."""

    smallest: float  # share, in examples
    parameters: np.ndarray
    covariance: np.ndarray
    misfit: float
    freedom: int
    se: float  # of the error on the largest share

    def error(self, n: float) -> float:
        a, b, c = self.parameters
        return float(a + b * (n / self.smallest) ** -c)

    def variance(self, n: float) -> float:
        """Of error(n), by the delta method: g' C g with g = (1, x^-c, -b x^-c log x), x = n / n_1."""
        slope = gradient(self.parameters, np.array([n / self.smallest]))[0]
        return float(slope @ self.covariance @ slope)

    def forecast(self, n: float) -> tuple[float, float, float]:
        """The error to be measured with n examples, by as many seeds and test examples as on the largest
        share, and the ends of its 95 % interval: `reach` of variance(n) + se^2."""
        middle, half = self.error(n), reach([self.variance(n) + self.se**2], [self.misfit], self.freedom)
        return middle, max(middle - half, 0.0), min(middle + half, 1.0)


def gradient(parameters: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Of a + b x^-c by (a, b, c), [points, 3]."""
    _, b, c = parameters
    return np.stack([np.ones_like(x), x**-c, -b * x**-c * np.log(x)], axis=1)


def reach(variances: Sequence[float], misfits: Sequence[float], freedom: float) -> float:
    """Half of a 95 % interval, the larger of two: by the standard errors, of which one seed's are too small,
    and by the scatter around the curves, which may be too small by chance.

        max(1.96 sqrt(sum v), t(freedom) sqrt(sum misfit v))
    """
    from scipy.special import ndtri, stdtrit

    scattered = np.dot(misfits, variances)
    return float(max(ndtri(0.975) * np.sqrt(sum(variances)), stdtrit(freedom, 0.975) * np.sqrt(scattered)))


def fit(n: Sequence[float], errors: Sequence[float], se: Sequence[float]) -> Curve | None:
    """The curve nearest to the errors measured with n examples, in units of their standard errors `se` (above
    0). None where they do not determine one."""
    from scipy.optimize import least_squares

    n, errors, se = (np.asarray(x, float) for x in (n, errors, se))
    x = n / n[0]
    found = least_squares(
        lambda p: (p[0] + p[1] * x ** -p[2] - errors) / se,
        x0=(errors[-1] / 2, max(errors[0] - errors[-1] / 2, 0.01), 0.5),
        jac=lambda p: gradient(p, x) / se[:, None],
        bounds=([0, 0, 0], [1, 2, STEEPEST]),
    )
    information, freedom = found.jac.T @ found.jac, len(n) - 3
    if not found.success or np.linalg.matrix_rank(information) < 3:
        return None
    chi2 = 2 * found.cost
    return Curve(n[0], found.x, np.linalg.inv(information), chi2 / freedom, freedom, se[-1])


@dataclass(frozen=True)
class Check:
    """A share that was hidden: what was measured there, and the interval that smaller shares forecast."""

    n: float
    measured: float
    low: float
    high: float

    @property
    def held(self) -> bool:
        return bool(self.low <= self.measured <= self.high)

    @property
    def telling(self) -> bool:
        """Whether it could have failed: an interval of any use."""
        return bool(self.high - self.low <= WIDEST * self.measured)


def back_test(n: Sequence[float], errors: Sequence[float], se: Sequence[float]) -> list[Check]:
    """Forecasts of the largest share, and of the largest two, from the others; none from too few."""
    found = []
    for kept in (len(n) - 1, len(n) - 2):
        if kept >= FEWEST and (curve := fit(n[:kept], errors[:kept], se[:kept])):
            found += [Check(n[i], errors[i], *curve.forecast(n[i])[1:]) for i in range(kept, len(n))]
    return found


def rise(errors: Sequence[float], se: Sequence[float]) -> tuple[int, int] | None:
    """Two shares between which the error rises beyond noise, if there are."""
    pairs = combinations(range(len(errors)), 2)
    return next(((i, j) for i, j in pairs if errors[j] - errors[i] > RISE * np.hypot(se[i], se[j])), None)


def crossing(one: Curve, other: Curve, low: float, high: float) -> tuple[float, float, float] | bool | None:
    """Where between low and high examples two curves cross, and the ends of the 95 % interval: all n at which
    they can't be told apart (Fieller, 1954), if they can on both sides. False where they can everywhere. None
    where it can't be told.

    They count as independent, which is wide where test examples are shared. No misfit counts as less than 1,
    since standard errors of few seeds may be too small by chance, and no new measurement's is added to them.
    """
    n = np.geomspace(low, high, 400)
    apart = np.array([one.error(x) - other.error(x) for x in n])
    freedom, misfits = min(one.freedom, other.freedom), [max(1, curve.misfit) for curve in (one, other)]
    half = np.array([reach([one.variance(x), other.variance(x)], misfits, freedom) for x in n])
    side = np.where(np.abs(apart) > half, np.sign(apart), 0)
    if side[0] * side[-1] < 0:
        before = np.flatnonzero(side != side[0])[0] - 1  # the last n that is clear, and the first one again
        after = np.flatnonzero(side != side[-1])[-1] + 1
        at = np.argmax(np.sign(apart) != side[0])
        return float(np.sqrt(n[at - 1] * n[at])), float(n[before]), float(n[after])
    return False if side[0] and (side == side[0]).all() else None
