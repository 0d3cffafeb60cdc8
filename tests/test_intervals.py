"""Intervals cover what they claim to and tests reject no more than they claim, in simulated studies whose
truth is known (simulations.py); and figures worked out by hand."""

import math

import numpy as np
import pytest
from scipy import stats
from simulations import (
    answers,
    best_is_marked,
    best_of_many,
    coverage_of_adapter,
    coverage_of_class,
    coverage_of_difference,
    coverage_of_macro_f1,
    coverage_of_setting,
    coverage_of_sparse,
    false_adapter_difference,
    false_difference,
    power,
    rates,
    rouge,
    seed_effect,
    worse_is_left_out,
)

from study.intervals import interval, of_difference, p_by_swapping, parts_of, wilson, within

# Four standard errors of a rate of 0.95 in 400 repetitions are 0.044, of 0.05 likewise.


@pytest.fixture
def ours_alone(monkeypatch):
    """Without the bootstraps of the usual way, which take longest."""
    monkeypatch.setattr("simulations.percentiles", lambda *_: None)
    monkeypatch.setattr("simulations.rejected_by_bootstrap", lambda *_: None)


@pytest.mark.usefixtures("ours_alone")
@pytest.mark.parametrize(("examples", "share"), [(160, 0.7), (160, 0.99), (40, 0.95)])
def test_the_interval_of_an_accuracy_holds_that_of_the_adapter(examples, share):
    assert rates(coverage_of_adapter, 400, examples, share)[1] > 0.91


@pytest.mark.parametrize(
    ("seeds", "examples", "share", "spread"),
    [
        *((2, 160, 0.7, 2), (3, 80, 0.7, 0), (3, 80, 0.95, 1), (3, 819, 0.7, 2)),
        *((3, 819, 0.7, 5), (5, 819, 0.7, 2), (5, 160, 0.05, 1)),
    ],
)
def test_the_interval_of_several_seeds_holds_the_score_of_the_setting(seeds, examples, share, spread):
    assert rates(coverage_of_setting, 400, seeds, examples, share, spread)[1] > 0.91


@pytest.mark.usefixtures("ours_alone")
def test_the_interval_of_one_seed_does_not_hold_the_score_of_the_setting_which_is_why_it_is_marked():
    assert rates(coverage_of_setting, 400, 1, 819, 0.7, 5)[1] < 0.6


def test_the_interval_of_several_seeds_counts_nothing_twice():
    generator = np.random.default_rng(0)
    runs = [answers(generator, 3, 80, 0.7, 2) for _ in range(100)]
    halves = [np.subtract(*interval(values)[::-1]) / 2 for values in runs]
    e = np.mean([1.96 * (values.std(axis=1) / math.sqrt(80)).mean() for values in runs])
    s = np.mean([4.303 * values.mean(axis=1).std(ddof=1) / math.sqrt(3) for values in runs])
    assert np.mean(halves) < 0.85 * math.hypot(e, s)


@pytest.mark.usefixtures("ours_alone")
@pytest.mark.parametrize(("examples", "zeros"), [(80, 0.6), (80, 0.95), (819, 0.8)])
def test_the_interval_of_a_rouge_near_0_holds_its_mean(examples, zeros):
    assert rates(coverage_of_sparse, 400, examples, zeros)[1] > 0.91


@pytest.mark.parametrize(("classes", "examples", "seeds"), [(20, 160, 1), (77, 256, 1), (20, 160, 3)])
def test_the_interval_of_macro_f1_holds_that_on_all_examples(request, classes, examples, seeds):
    if classes != 77:
        request.getfixturevalue("ours_alone")
    usual, ours = rates(coverage_of_macro_f1, 100, classes, examples, seeds)
    assert ours > 0.87  # four standard errors in 100
    if classes == 77:
        assert usual < 0.6  # the percentile bootstrap of so few examples a class


@pytest.mark.usefixtures("ours_alone")
@pytest.mark.parametrize("what", ["precision", "recall", "F1"])
@pytest.mark.parametrize(
    ("examples", "seeds", "spread"), [(160, 1, 0), (1600, 1, 0), (160, 3, 0.5), (1600, 3, 0.5)]
)
def test_the_interval_of_a_class_holds_its_score_on_all_examples(examples, seeds, spread, what):
    assert rates(coverage_of_class, 400, 20, examples, what, seeds, spread)[1] > 0.91


@pytest.mark.usefixtures("ours_alone")
@pytest.mark.parametrize(("examples", "won", "lost"), [(160, 0.02, 0), (40, 0.1, 0.05), (819, 0.01, 0.005)])
def test_the_interval_of_a_difference_holds_it(examples, won, lost):
    assert rates(coverage_of_difference, 400, examples, won, lost)[1] > 0.91


@pytest.mark.usefixtures("ours_alone")
@pytest.mark.parametrize(("examples", "differ"), [(160, 0.03), (160, 0.3), (819, 0.1)])
def test_two_adapters_that_are_equal_are_told_apart_in_5_of_100_cases(monkeypatch, examples, differ):
    monkeypatch.setattr("study.intervals.SWAPS", 999)  # a p near 0.05 is told as well
    assert rates(false_adapter_difference, 200, examples, differ)[1] < 0.12


@pytest.mark.parametrize(
    ("seeds", "examples", "spread", "kind"),
    [
        (2, 7317, 1, answers),
        (3, 7317, 1, answers),
        (3, 160, 2, answers),
        (3, 819, 1, rouge),
        (3, 819, 0, rouge),
    ],
)
def test_two_settings_that_are_equal_are_told_apart_in_5_of_100_cases(seeds, examples, spread, kind):
    assert rates(false_difference, 200, seeds, examples, spread, kind)[1] < 0.12


def test_one_seed_a_side_tells_equal_settings_apart_which_is_why_it_speaks_of_adapters():
    assert rates(false_difference, 200, 1, 7317, 1)[1] > 0.25


def test_the_interval_of_the_best_of_many_holds_it_at_the_level_of_the_choice_only():
    as_it_stands, chosen = rates(best_of_many, 60, 72, 1, 819, 0)
    assert as_it_stands < 0.85
    assert chosen > 0.85


def test_a_best_cell_is_marked_and_one_that_is_worse_is_not():
    assert rates(best_is_marked, 100, 12, 3, 1, 1)[1] > 0.87
    assert rates(best_is_marked, 100, 12, 3, 5, 0.5)[1] > 0.8  # though it varies more than all others
    assert rates(worse_is_left_out, 100, 12, 3, 1, 10)[1] > 0.8


def test_a_difference_said_to_be_detectable_is_detected_in_80_of_100_cases():
    assert 0.64 < rates(power, 100, 5, 819, 1)[1] < 0.96  # four standard errors in 100
    assert rates(power, 200, 1, 819, 0, 1)[1] == pytest.approx(0.8, abs=0.12)


def test_the_simulated_studies_are_what_they_say():
    generator = np.random.default_rng(0)
    size, middle = seed_effect(0.7, 5)
    scores = stats.norm.cdf((middle + size * generator.standard_normal(20_000)) / math.sqrt(1 + 1.5**2))
    assert (scores.mean(), scores.std()) == (pytest.approx(0.7, abs=0.002), pytest.approx(0.05, abs=0.002))
    assert answers(generator, 40, 4000, 0.7, 2).mean() == pytest.approx(0.7, abs=0.03)


# By hand


@pytest.mark.parametrize(("hits", "number"), [(0, 160), (1, 40), (112, 160), (160, 160)])
def test_wilson_is_scipys(hits, number):
    theirs = stats.binomtest(hits, number).proportion_ci(method="wilson")
    assert wilson(hits / number, number) == pytest.approx((theirs.low, theirs.high))
    values = np.arange(number)[None] < hits
    assert interval(values.astype(float)) == pytest.approx((theirs.low, theirs.high))


def test_mean_squares_are_those_of_a_table_worked_out_by_hand():
    # Rows 3, 4, 5 of means over 1, 2, 3 / 2, 4, 6 / 3, 6, 9: grand mean 4; columns 2, 4, 6
    parts = parts_of(np.array([[1, 2, 3], [2, 4, 6], [3, 6, 9]]) / 10)
    # By seed 3 (4 + 0 + 4) / 2, by example the same, rest (1 + 0 + 1 + 0 + 0 + 0 + 1 + 0 + 1) / 4
    assert (parts.mean, parts.of_seeds, parts.of_examples, parts.of_rest) == pytest.approx(
        (0.4, 0.12, 0.12, 0.01)
    )
    assert parts.variance() == pytest.approx((0.12 + 0.12 - 0.01) / 9)
    # 0.23^2 / (0.12^2 / 2 + 0.12^2 / 2 + 0.01^2 / 4) is 3.7, and no more than the examples have
    assert parts.freedom() == 2
    assert parts_of(np.tile([[1, 2, 3], [2, 4, 6], [3, 6, 9]], 2) / 10).freedom() == pytest.approx(
        (0.24 + 0.096 - 0.008) ** 2 / (0.24**2 / 2 + 0.096**2 / 5 + 0.008**2 / 10)
    )
    assert parts.between_seeds() == pytest.approx(math.sqrt(0.11 / 3))


def test_one_seed_is_students_interval_of_its_examples():
    values = np.random.default_rng(0).random((1, 30))
    theirs = stats.ttest_1samp(values[0], 0)
    ends = theirs.confidence_interval()
    parts = parts_of(values)
    assert (parts.mean - parts.reach(), parts.mean + parts.reach()) == pytest.approx((ends.low, ends.high))
    assert parts.p() == pytest.approx(theirs.pvalue)


def test_examples_alike_leave_students_interval_of_the_seeds():
    values = np.repeat([[0.5], [0.6], [0.64]], 50, axis=1)
    theirs = stats.ttest_1samp([0.5, 0.6, 0.64], 0)
    parts = parts_of(values)
    assert parts.reach() == pytest.approx(theirs.confidence_interval().high - 0.58, rel=0.02)
    assert parts.p() == pytest.approx(theirs.pvalue, rel=0.05)


def test_seeds_that_differ_by_exactly_as_much_do_not_hide_a_difference():
    ours, theirs = np.arange(160) < 128, np.arange(160) < 112
    values = np.stack([ours, np.roll(ours, 3)]).astype(float) - np.stack([theirs, np.roll(theirs, 3)])
    parts = parts_of(values)
    assert parts.of_seeds == 0
    assert parts.p() < 0.001


def test_a_share_of_some_examples_is_wilsons_of_one_seed_and_of_several_adds_them_up():
    hits, members = np.zeros((2, 3, 50), dtype=bool)
    members[0, :20] = members[1, 10:40] = members[2, :30] = True
    hits[:, 10:18] = True
    assert within(hits[:1], members[:1]) == pytest.approx(wilson(8 / 20, 20))
    # Of seed i v = R + (hit - R member) / (80 / 120), over the 40 examples that are of any seed, R = 24 / 80
    values = 0.3 + (hits - 0.3 * members)[:, :40] * 1.5
    assert within(hits, members) == pytest.approx(interval(values))
    assert within(members, members) == pytest.approx(wilson(1, 40))
    assert within(hits[:1], hits[:1] & False) is None


def test_seeds_alike_are_one_seed():
    values = np.random.default_rng(0).random((1, 60))
    assert parts_of(np.repeat(values, 3, axis=0)).reach() == pytest.approx(parts_of(values).reach())


@pytest.mark.parametrize("values", [[[0.0] * 50], [[1.0] * 50], [[0.02] * 25 + [0.99] * 25] * 2])
def test_no_interval_leaves_0_to_100_percent(values):
    low, high = interval(np.array(values))
    assert 0 <= low < high <= 1


def test_a_few_seeds_far_apart_stay_within_0_to_100_percent():
    values = np.stack([np.zeros(80), np.ones(80)])
    low, high = interval(values)
    assert 0 <= low < 0.1
    assert 0.9 < high <= 1


def test_the_floor_of_swapping_is_one_of_all_repetitions():
    assert p_by_swapping(lambda swaps: (1 - 2 * swaps) @ np.ones(100), 100) == 1 / 5000


def test_more_seeds_are_expected_to_narrow_the_interval():
    parts = parts_of(answers(np.random.default_rng(1), 3, 160, 0.7, 5))
    assert parts.expected(3).reach() == pytest.approx(parts.reach())
    assert parts.expected(4).reach() < parts.reach()


def test_no_difference_of_shares_is_certain():
    same = np.ones((1, 160))
    assert of_difference(same, same).reach() == pytest.approx(1.9747 * math.sqrt(1 / 161 / 162), abs=1e-5)
