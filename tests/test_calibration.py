"""Calibration, accuracy over coverage and AUROC of confidences, by hand, by scikit-learn and by simulation;
and what the report shows of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from simulations import OF_CONFIDENCE, confident, coverage_of_confidence, rates
from sklearn.metrics import roc_auc_score
from test_report import evaluation, report, tables, tuned

from study import metrics
from study.records import record
from study.records.schema import METHODS
from study.report import plots
from study.report.calibration import Confidences, auroc, bins_of, calibration_error, surest
from study.report.collect import comparable, find_runs

CONFIDENCE = "Confidence: classification: can it be believed, and does it tell right from wrong"
COVERAGE = "Coverage: classification: accuracy of the surest answers, where a person gets the rest"


@pytest.mark.parametrize("digits", [1, 9])  # with one there are ties
def test_auroc_is_scikit_learns_and_its_values_are_jackknifes(digits):
    found = confident(np.random.default_rng(0), 60, digits=digits)
    [(sure, right)] = found.seeds
    value, pseudo = auroc(sure, right)
    assert value == pytest.approx(roc_auc_score(right, sure))
    for i in range(60):
        rest = np.arange(60) != i
        assert pseudo[i] == pytest.approx(60 * value - 59 * roc_auc_score(right[rest], sure[rest]))


def test_without_both_kinds_of_answers_there_is_no_auroc_and_with_one_of_a_kind_no_interval():
    sure = np.array([0.9, 0.8, 0.7])
    assert auroc(sure, np.array([True] * 3)) is None
    assert auroc(sure, np.array([True, True, False])) == (1.0, None)
    assert Confidences(sure[None], np.array([[True] * 3])).auroc().text == "—"
    assert Confidences(sure[None], np.array([[True, False, True]])).auroc().ends is None


def test_bins_have_equal_mass_and_equal_confidences_stay_together():
    sizes = np.bincount(bins_of(np.random.default_rng(0).random(1000)))
    assert sizes.tolist() == [100] * 10
    assert len({*bins_of(np.arange(100) / 100)}) == 5  # of 20 each
    assert len({*bins_of(np.arange(30) / 30)}) == 1
    tied = np.repeat([0.2, 0.7, 1.0], 100)
    assert all(len({*bins_of(tied)[tied == value]}) == 1 for value in tied)
    assert len({*bins_of(np.ones(500))}) == 1


def test_the_calibration_error_is_the_mean_gap_of_the_bins():
    sure = np.repeat([0.5, 0.9], 20)
    right = np.array([True] * 15 + [False] * 5 + [True] * 16 + [False] * 4)
    [error], _, _ = calibration_error([(sure, right)])
    assert error == pytest.approx((0.25 + 0.1) / 2)
    [opposite], _, _ = calibration_error([(sure, ~right)])
    assert opposite == pytest.approx((0.25 + 0.7) / 2)


def test_accuracy_of_the_surest_shares_ties_among_equals():
    sure = np.array([0.9, 0.5, 0.5, 0.5, 0.1])
    assert surest(sure, 1).tolist() == [1] * 5
    assert surest(sure, 0.2).tolist() == [1, 0, 0, 0, 0]
    assert surest(sure, 0.4).tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3, 0])
    assert surest(sure, 0.75).tolist() == [1, 1, 1, 1, 0]  # rounded up
    right = np.array([[True, True, False, False, False]])
    assert Confidences(sure[None], right).kept(0.4).value == pytest.approx(100 * (1 + 1 / 3) / 2)


@pytest.mark.parametrize("what", OF_CONFIDENCE)
@pytest.mark.parametrize(
    ("seeds", "excess", "digits"), [(1, 0.0, 9), (1, 0.15, 9), (1, 0.15, 1), (3, 0.15, 9)]
)
def test_the_intervals_hold_the_truth(monkeypatch, what, seeds, excess, digits):
    monkeypatch.setattr("study.report.calibration.DRAWS", 200)
    monkeypatch.setattr("simulations.percentiles", lambda *_: None)
    assert rates(coverage_of_confidence, 200, what, 300, seeds, excess, digits)[1] > 0.9


# In the report


def runs_as_sure(root: Path, *seeds: np.ndarray, words: str = "") -> Path:
    """Finished runs of one setting, one for each seed's confidences; the surest 3 of 4 are right."""
    for number, sure in enumerate(seeds, 1):
        order = np.argsort(np.argsort(sure))
        hits = order >= len(sure) / 4
        rows = [
            {"parsed": "ab"[i % 2] if hit else "ba"[i % 2], "reference": "ab"[i % 2], "confidence": float(of)}
            for i, (of, hit) in enumerate(zip(sure, hits, strict=True))
        ]
        scores = metrics.summed_up("classification", rows) | {"metrics_version": "2, r"}
        scored = evaluation(0, examples=len(rows)) | scores | {"decoding": "constrained"}
        tuned(
            root / f"run {number} {words}".replace("/", " ").rstrip(),
            0,
            f"--seed {number} {words}",
            eval=scored,
        )
    return root


SURE = np.linspace(0.3, 0.99, 80)


def test_the_report_shows_calibration_coverage_and_auroc_of_what_says_how_sure_it_is(tmp_path):
    found = tables(runs_as_sure(tmp_path, SURE, SURE**2, SURE**3))
    [row], [kept] = found[CONFIDENCE].rows, found[COVERAGE].rows
    model, examples, excess, ece, chance, area = row
    assert (model.text, examples.text) == ("a/small", "80")
    gaps = [100 * (sure.mean() - 0.75) for sure in (SURE, SURE**2, SURE**3)]
    assert excess.value == pytest.approx(np.mean(gaps))
    assert ece.ends[0] < ece.value < ece.ends[1]
    assert 0 < chance.value < ece.value
    assert area.value == 100
    assert [cell.value for cell in kept[1:]] == pytest.approx([75, 100 * 60 / 72, 100, 100])
    assert all(cell.seeds == 3 for cell in (excess, ece, area, *kept[1:]))
    assert "expected calibration error" in found[CONFIDENCE].note


def test_of_two_seeds_both_figures_are_shown(tmp_path):
    found = tables(runs_as_sure(tmp_path, SURE, SURE**2))
    assert found[COVERAGE].rows[0][1].text == "75.00, 75.00 (2)"
    assert found[CONFIDENCE].rows[0][2].text.endswith("(2)")
    assert found[CONFIDENCE].rows[0][2].text[0] in "+-"
    assert found[CONFIDENCE].rows[0][3].ends is None


def test_what_says_not_how_sure_it_is_has_no_rows_and_an_older_record_that_should_is_named(tmp_path):
    tuned(tmp_path / "free", 60)
    assert CONFIDENCE not in tables(tmp_path)
    tuned(tmp_path / "older", 60, "--decoding constrained", eval=evaluation(60, decoding="constrained"))
    found = tables(tmp_path)
    assert CONFIDENCE not in found
    told = "1 older record without confidences left out: --rescore"
    assert [told in table.note for table in found.values()].count(True) == 1
    say = [name for name, method in METHODS.items() if method.confident]
    assert say == ["encoder", "tfidf-nb", "tfidf-lr"]
    sure = np.tile(SURE, 13)[:1000]
    runs_as_sure(tmp_path, sure, words="--pretrained_ckpt b/big --decoding constrained")
    assert told in tables(tmp_path)[CONFIDENCE].note


def test_a_confidence_that_is_none_is_refused_in_one_line(tmp_path):
    path = runs_as_sure(tmp_path, SURE) / "run 1" / "eval.json"
    content = json.loads(path.read_text())
    for wrong in ([2.0] * 80, [0.5] * 79, ["sure"] * 80):
        content["eval"]["per_example"]["confidences"] = wrong
        path.write_text(json.dumps(content))
        _, [problem] = find_runs([tmp_path])
        assert "its per_example does not give its metrics: --force redoes the run" in problem


def test_rescoring_takes_confidences_over_from_the_predictions(tmp_path):
    path = runs_as_sure(tmp_path, SURE) / "run 1" / "eval.json"
    content = json.loads(path.read_text())
    of = content["eval"]["per_example"]
    rows = [
        {
            "index": i,
            "correct": a == b,
            "parsed": of["classes"][a],
            "reference": of["classes"][b],
            "confidence": c,
        }
        for i, (a, b, c) in enumerate(
            zip(of["answers"], of["references"], of.pop("confidences"), strict=True)
        )
    ]
    record.write_json(path, content)
    record.write_rows(path.with_name("predictions.jsonl"), rows)
    assert CONFIDENCE not in tables(tmp_path)
    assert report("--rescore", tmp_path).returncode == 0
    assert json.loads(path.read_text())["eval"]["per_example"]["confidences"] == SURE.round(6).tolist()
    assert CONFIDENCE in tables(tmp_path)
    del rows[3]["confidence"]
    record.write_rows(path.with_name("predictions.jsonl"), rows)
    assert "predictions.jsonl is not whole" in report("--rescore", tmp_path).stderr


def test_a_score_keeps_its_confidences_in_the_record_and_in_every_row():
    scores, rows = metrics.score(
        "classification", ["a", "b"], ["a", "a"], ["a", "b"], confidence=[0.9, 0.6000001]
    )
    assert [row["confidence"] for row in rows] == [0.9, 0.6000001]
    assert scores["per_example"]["confidences"] == [0.9, 0.6]
    without, _ = metrics.score("classification", ["a", "b"], ["a", "a"], ["a", "b"])
    assert "confidences" not in without["per_example"]
    assert without["metrics"] == scores["metrics"]


def test_pictures_of_confidence_are_drawn_with_what_they_show(tmp_path):
    groups = comparable(find_runs([runs_as_sure(tmp_path, SURE, SURE**2, SURE**3)])[0])
    drawn = {
        name: ([axes.get_xlabel() for axes in figure.axes], figure.axes[0].get_ylabel())
        for name, _, figure in plots.figures(groups, [], published=False)
    }
    assert drawn["classification-reliability-of-confidence-a-small"] == (
        ["", "confidence (%)"],
        "accuracy (%)",
    )
    labels = drawn["classification-accuracy-over-coverage"]
    assert labels == (["answers that are kept, the surest (%); a person gets the rest"], "their accuracy (%)")


def test_a_reliability_diagram_has_every_seeds_answers_in_its_bins():
    found = confident(np.random.default_rng(0), 200, 3)
    sure, right, points = found.sure, found.right, found.reliability()
    assert len(points) == 10
    assert np.mean([accuracy for _, accuracy, _ in points]) == pytest.approx(100 * right.mean(), abs=0.5)
    assert all(low < accuracy < high for _, accuracy, (low, high) in points)
    figure = plots.plot_reliability(Confidences(sure[:1, :5], right[:1, :5]))  # few examples
    assert len(figure.axes[0].containers[0][0].get_xdata()) == 1
    plots.plt.close(figure)
