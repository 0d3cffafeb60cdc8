"""Learning curves: what they forecast, how often it holds (curves.py), and when nothing is forecast."""

import numpy as np
import pytest
from curves import SHARES, coverage, crossings, delayed, power_law, sigmoid

from study.report import curve
from study.report.forecast import Forecast, reason_against
from study.report.forecast import crossings as sentences

SE = np.full(6, 0.004)


def law(floor: float, scale: float, exponent: float):
    return lambda n: floor + scale * (np.asarray(n, float) / SHARES[0]) ** -exponent


def test_a_known_curve_is_recovered():
    truth = law(0.15, 0.4, 0.4)
    found = curve.fit(SHARES, truth(SHARES), SE)
    assert found.parameters == pytest.approx([0.15, 0.4, 0.4], abs=1e-4)
    for times in (2, 10):
        middle, low, high = found.forecast(times * SHARES[-1])
        assert middle == pytest.approx(truth(times * SHARES[-1]), abs=1e-4)
        assert low < middle < high


def test_the_variance_is_that_of_many_fits():
    truth, generator, n = law(0.15, 0.4, 0.4), np.random.default_rng(0), 2 * SHARES[-1]
    fits = [curve.fit(SHARES, truth(SHARES) + generator.normal(0, 0.002, 6), SE / 2) for _ in range(300)]
    spread = np.std([found.error(n) for found in fits])
    assert spread == pytest.approx(np.sqrt(curve.fit(SHARES, truth(SHARES), SE / 2).variance(n)), rel=0.15)


# Coverage of 0.95 has a standard error of 0.018 in 150 studies.


@pytest.mark.parametrize("times", [2, 10])
@pytest.mark.parametrize(
    ("of", "shares", "seeds"),
    [
        (power_law, 6, 3),
        (power_law, 5, 3),
        (power_law, 4, 3),
        (power_law, 6, 1),
        (delayed, 6, 3),
        (sigmoid, 6, 3),
    ],
)
def test_the_interval_holds_what_is_measured_with_more_labels(of, shares, seeds, times):
    assert coverage(of, shares, seeds, times, 150)[1] > 0.9


def test_six_shares_of_a_power_law_are_shown_most_of_the_time_and_hold():
    *_, shown_holds, shown, width = coverage(power_law, 6, 3, 2, 150)
    assert shown_holds > 0.9
    assert shown > 0.6
    assert width < 0.3


def test_crossings_are_where_they_are_said_to_be():
    claimed, right, denied = crossings(60)
    assert claimed > 0.1
    assert right > 0.9
    assert denied > 0.9


def test_three_shares_are_refused():
    n = SHARES[:3]
    assert reason_against(n, law(0.15, 0.4, 0.4)(n), SE[:3]) == "3 training shares, 4 are needed"


def test_a_column_that_rises_beyond_noise_is_refused():
    errors = np.array([0.40, 0.31, 0.27, 0.25, 0.246, 0.28])
    assert reason_against(
        SHARES, errors, SE
    ) == "error rises beyond noise: 27.0 at 1,103, 28.0 at 11,014" or (
        reason_against(SHARES, errors, SE).startswith("error rises beyond noise")
    )
    assert not curve.rise(errors, SE * 5)


def test_a_curve_that_falls_when_none_expects_it_fails_its_back_test():
    errors = np.array([0.60, 0.50, 0.45, 0.42, 0.41, 0.30])
    assert reason_against(SHARES, errors, SE).startswith("back-test failed: ")


@pytest.mark.parametrize("errors", [[0.4, 0.3, 0.1, 0.0], [1.0, 0.5, 0.4, 0.35]])
def test_an_error_without_spread_is_refused(errors):
    se = np.sqrt(np.array(errors) * (1 - np.array(errors)) / 1000)
    assert "0 or 100 %" in reason_against(SHARES[:4], errors, se)


def test_a_flat_column_gives_no_parameters_out_of_nothing():
    errors = np.array([0.3, 0.301, 0.299, 0.3, 0.3, 0.3])
    found = curve.fit(SHARES, errors, SE)
    assert found is None or found.forecast(2 * SHARES[-1])[0] == pytest.approx(0.3, abs=0.01)


def test_curves_that_cross_are_said_to_where_they_do():
    one, other = law(0.15, 0.3, 0.4), law(0.10, 0.65, 0.6)
    found = curve.crossing(
        *(curve.fit(SHARES, f(SHARES), SE / 2) for f in (one, other)), SHARES[0], 10 * SHARES[-1]
    )
    n = np.geomspace(SHARES[0], 10 * SHARES[-1], 5000)
    at, low, high = found
    assert at == pytest.approx(n[np.argmax(other(n) < one(n))], rel=0.02)
    assert low < at < high


def test_no_crossing_is_claimed_where_intervals_overlap():
    laws = law(0.15, 0.40, 0.4), law(0.13, 0.43, 0.4)  # cross at 2 x 274
    fits = [curve.fit(SHARES, f(SHARES), SE * 3) for f in laws]
    assert curve.crossing(*fits, SHARES[0], 10 * SHARES[-1]) is None


def test_curves_far_apart_do_not_cross():
    fits = [curve.fit(SHARES, f(SHARES), SE / 4) for f in (law(0.15, 0.4, 0.4), law(0.3, 0.5, 0.4))]
    assert curve.crossing(*fits, SHARES[0], 10 * SHARES[-1]) is False


# 0.15 + 0.3 x^-0.4 = 0.10 + 0.65 x^-0.6 at x = 8.894, which is 2,437 examples.


def test_sentences_name_where_curves_cross_do_not_and_what_can_not_be_told():
    laws = {
        "A": law(0.15, 0.3, 0.4),
        "B": law(0.10, 0.65, 0.6),
        "C": law(0.4, 0.55, 0.4),
        "D": law(0.15, 0.3, 0.4),
    }
    told = sentences({name: Forecast(SHARES, f(SHARES), SE / 4) for name, f in laws.items()})
    assert "A and B cross at 2,400 [2,300, 2,600] examples, beyond which B errs less. " in told
    assert "No crossing within 10 times the labels: A and C; B and C; C and D. " in told
    assert told.endswith("Whether they cross can't be told: A and D. ")
