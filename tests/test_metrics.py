"""Scores equal those of established libraries, intervals cover what they claim, prices are never guessed."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from study import cli, cost, metrics

LABELS = ["a", "b", "c", "d"]
PAIRS = [  # summary, reference
    ("The cat sat on the mat.", "The cat lay on the mat."),
    ("Ann will be late", "Ann is running late today. Bo waits."),
    ("Cats were running.\nThey ran home.", "The cat runs.\nIt ran home."),
    ("Zoë paid 5€ — twice!", "zoë pays 5€"),
    ("same words", "same words"),
    ("first line\nsecond line", "second line\nfirst line"),
    ("", "An empty summary scores nothing."),
    ("...", "Neither does punctuation."),
]


def values(scores: dict) -> dict[str, float]:
    return {name: metric["value"] for name, metric in scores.items()}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kinds", [2, 4])  # with 2 of 4, two classes never occur and count in no mean
def test_accuracy_and_f1_equal_scikit_learn_with_invalid_answers_as_no_class(seed, kinds):
    generator = np.random.default_rng(seed)
    references = list(generator.choice(LABELS[:kinds], 200))
    answers = list(generator.choice([*LABELS[:kinds], "invalid"], 200))
    parsed = [None if answer == "invalid" else answer for answer in answers]
    occurring = sorted({*references, *answers} - {"invalid"})
    expected = {"accuracy": accuracy_score(references, answers)}
    for kind in ("micro", "macro", "weighted"):
        expected[f"{kind}_f1"] = f1_score(
            references, answers, labels=occurring, average=kind, zero_division=0
        )
    expected["invalid_answers"] = answers.count("invalid") / 200
    got = values(metrics.classification_metrics(parsed, references, LABELS))
    assert got == pytest.approx({name: 100 * value for name, value in expected.items()})


def test_a_small_example_gives_the_figures_worked_out_by_hand():
    got = metrics.classification_metrics(["a", "a", "b", None], ["a", "b", "b", "a"], ["a", "b", "never"])
    # a: 1 hit, 2 references, 2 answers: F1 1/2. b: 1 hit, 2 references, 1 answer: F1 2/3.
    # In all 2 hits, 4 references, 3 answers.
    assert values(got) == pytest.approx(
        {
            "accuracy": 50.0,
            "micro_f1": 400 / 7,
            "macro_f1": 100 * (1 / 2 + 2 / 3) / 2,
            "weighted_f1": 100 * (1 / 2 + 2 / 3) / 2,
            "invalid_answers": 25.0,
        }
    )


def test_an_answer_outside_the_label_set_is_wrong_and_listed_as_invalid():
    scores, rows = metrics.score("classification", ["A.", "z", "", "b\na"], ["a", "a", "b", "b"], ["a", "b"])
    assert [row["parsed"] for row in rows] == ["a", None, None, "b"]
    assert [row["correct"] for row in rows] == [True, False, False, True]
    assert [row["prediction"] for row in rows] == ["A.", "z", "", "b\na"]
    assert [(row["index"], row["reference"]) for row in rows] == list(enumerate(["a", "a", "b", "b"]))
    # Each class has 1 hit, 2 references, 1 answer; a class of invalid answers would lower the mean to 4/9.
    assert values(scores)["macro_f1"] == pytest.approx(200 / 3)
    assert values(scores)["invalid_answers"] == 50.0


@pytest.mark.parametrize("answer", [None, "b"])
def test_all_answers_wrong_score_0_and_all_right_100(answer):
    wrong = values(metrics.classification_metrics([answer] * 3, ["a"] * 3, ["a", "b"]))
    assert {wrong[name] for name in ("accuracy", "micro_f1", "macro_f1", "weighted_f1")} == {0.0}
    right = metrics.classification_metrics(["a", "b"], ["a", "b"], ["a", "b"])
    assert {right[name]["value"] for name in right if name != "invalid_answers"} == {100.0}


# ROUGE


def test_rouge_of_a_pair_is_the_figure_worked_out_by_hand():
    # 5 of 6 words shared; word pairs "the cat", "on the", "the mat" of 5; longest common subsequence 5 of 6.
    [score] = metrics.rouge_scores(["The cat sat on the mat."], ["the cat lay on the mat"])
    assert score == pytest.approx(
        {"rouge1": 500 / 6, "rouge2": 60.0, "rougeL": 500 / 6, "rougeLsum": 500 / 6}
    )
    # 2 words of 2 against 4: precision 1, recall 1/2; no pair shared, and only one of them in order.
    [score] = metrics.rouge_scores(["red house"], ["house big old red"])
    assert score == pytest.approx({"rouge1": 200 / 3, "rouge2": 0, "rougeL": 100 / 3, "rougeLsum": 100 / 3})


def test_rouge_compares_stems_and_sums_over_lines():
    [score] = metrics.rouge_scores(["running cats"], ["run cat"])
    assert score["rouge2"] == 100.0
    [score] = metrics.rouge_scores(["two\none"], ["one\ntwo"])
    assert score == pytest.approx({"rouge1": 100, "rouge2": 0, "rougeL": 50, "rougeLsum": 100})


def test_rouge_equals_rouge_score_itself():
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    summaries, references = zip(*PAIRS, strict=True)
    expected = [
        {name: 100 * score.fmeasure for name, score in scorer.score(target=theirs, prediction=ours).items()}
        for ours, theirs in PAIRS
    ]
    got = metrics.rouge_scores(summaries, references)
    assert got == expected
    means = {name: np.mean([row[name] for row in expected]) for name in expected[0]}
    assert values(metrics.summarization_metrics(got)) == pytest.approx(means)


def test_rouge_equals_the_evaluate_library():
    """With EVALUATE_ROUGE naming a local copy of its rouge.py where its own is not cached."""
    code = """if True:
        import json, os, sys
        import evaluate
        rouge = evaluate.load(os.environ.get("EVALUATE_ROUGE", "rouge"))
        summaries, references = zip(*json.loads(sys.argv[1]))
        options = dict(use_stemmer=True, use_aggregator=False)
        print(json.dumps(rouge.compute(predictions=summaries, references=references, **options)))
    """
    command = [sys.executable, "-c", code, json.dumps(PAIRS)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if "Couldn't find" in done.stderr or "OfflineMode" in done.stderr:
        pytest.skip("the evaluate library's rouge is not cached, and EVALUATE_ROUGE names no copy of it")
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    got = metrics.rouge_scores(*zip(*PAIRS, strict=True))
    means = values(metrics.summarization_metrics(got))
    assert theirs.keys() == means.keys() == {"rouge1", "rouge2", "rougeL", "rougeLsum"}
    for name, scores in theirs.items():
        assert [row[name] for row in got] == pytest.approx([100 * score for score in scores])
        assert means[name] == pytest.approx(100 * np.mean(scores))


def test_a_summary_is_scored_up_to_the_next_heading_and_kept_whole():
    answers = ["Ann is late.\n### Dialogue:\nfake", "Bo waits."]
    scores, rows = metrics.score("summarization", answers, ["Ann is late.", "Cy came"])
    assert [row["prediction"] for row in rows] == answers
    assert rows[0]["parsed"] == "Ann is late."
    assert [row["rouge1"] for row in rows] == [100.0, 0.0]
    assert values(scores)["rouge1"] == 50.0


# Intervals


def share(outcomes: np.ndarray, seed: int = 0) -> dict:
    return metrics.with_interval(
        lambda weights: weights @ outcomes / weights.sum(axis=1), len(outcomes), seed
    )


def test_an_interval_is_seeded_and_holds_the_value():
    outcomes = np.random.default_rng(0).random(300) < 0.7
    one, same, other = share(outcomes, 1), share(outcomes, 1), share(outcomes, 2)
    assert one == same
    assert one["ci95"] != other["ci95"]
    assert one["value"] == other["value"] == pytest.approx(100 * outcomes.mean())
    assert one["ci95"][0] < one["value"] < one["ci95"][1]


def test_an_interval_narrows_with_the_root_of_the_examples():
    few, many = (np.tile([1, 1, 1, 0], count) for count in (25, 400))
    (low, high), (lower, higher) = share(few)["ci95"], share(many)["ci95"]
    assert (high - low) / (higher - lower) == pytest.approx(4, rel=0.15)
    assert high - low == pytest.approx(100 * 2 * 1.96 * np.sqrt(0.75 * 0.25 / 100), rel=0.1)


def test_an_interval_of_a_certain_result_has_no_width():
    assert share(np.ones(50)) == {"value": 100.0, "ci95": [100.0, 100.0]}


def test_intervals_cover_the_truth_95_times_in_100():
    generator = np.random.default_rng(3)
    runs, truth = 200, 0.7
    covered = 0
    for run in range(runs):
        low, high = share(generator.random(100) < truth, run)["ci95"]
        covered += low <= 100 * truth <= high
    # Three standard errors of a share of 0.95 in 200 runs are 0.046.
    assert covered / runs == pytest.approx(0.95, abs=0.046)


@pytest.mark.parametrize("name", ["accuracy", "micro_f1", "macro_f1", "weighted_f1", "invalid_answers"])
def test_every_classification_metric_has_an_interval_around_it(name):
    generator = np.random.default_rng(0)
    references = list(generator.choice(LABELS, 200))
    parsed = [
        reference if generator.random() < 0.6 else generator.choice(["a", None]) for reference in references
    ]
    metric = metrics.classification_metrics(parsed, references, LABELS)[name]
    low, high = metric["ci95"]
    assert 0 < low < metric["value"] < high < 100
    assert high - low < 20


# Cost


@pytest.mark.parametrize(
    ("gpu", "per_hour"),
    [
        ("NVIDIA A10G", 1.212),
        ("NVIDIA A100-SXM4-40GB", 3.81),
        ("CPU, 2 cores", None),
        ("NVIDIA A10", None),
    ],
)
def test_a_device_has_a_price_with_source_and_date_or_none(gpu, per_hour):
    price = cost.price(gpu, None)
    assert (price["gpu"], price["price_per_hour"]) == (gpu, per_hour)
    assert (price["price_source"] is None, price["price_date"] is None) == (per_hour is None,) * 2


def test_a_run_costs_its_seconds_at_the_price_of_flag_or_device():
    def of_run(*words: str) -> dict:
        return cost.of_run(cli.parse_args("classification", "", words), "CPU", 1800)

    assert of_run()["usd"] is None
    assert of_run("--price_per_hour", "3")["usd"] == 1.5
    assert of_run("--price_per_hour", "3")["price_source"] == "--price_per_hour"
    assert of_run("--gpu_name", "A10G")["usd"] == pytest.approx(0.606)
    assert of_run("--gpu_name", "A10G", "--price_per_hour", "3")["usd"] == 1.5
    assert of_run("--gpu_name", "my card")["gpu"] == "my card"
