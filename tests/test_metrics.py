"""Scores equal those of established libraries, intervals and tests claim what is so, prices are never
guessed."""

import gzip
import json
import os
import subprocess
import sys
import time
import unicodedata

import numpy as np
import pytest
import scipy.stats
from conftest import DEMO_DATA, PROCESS
from sklearn.metrics import accuracy_score, f1_score

from study import cli, data, metrics
from study.errors import UserError
from study.records import cost
from study.words import words

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


def of_answers(parsed: list, references: list) -> dict:
    statistics = metrics.classification_statistics(parsed, references)
    return metrics.bootstrap(statistics, len(references))[0]


def of_summaries(rows: list[dict]) -> dict:
    return metrics.bootstrap(metrics.statistics_of(rows), len(rows))[0]


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
    got = values(of_answers(parsed, references))
    assert got == pytest.approx({name: 100 * value for name, value in expected.items()})


def test_a_small_example_gives_the_figures_worked_out_by_hand():
    got = of_answers(["a", "a", "b", None], ["a", "b", "b", "a"])
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
    assert [row["row"] for row in rows] == [1, 2, 3, 4]
    # Each class has 1 hit, 2 references, 1 answer; a class of invalid answers would lower the mean to 4/9.
    assert values(scores)["macro_f1"] == pytest.approx(200 / 3)
    assert values(scores)["invalid_answers"] == 50.0


@pytest.mark.parametrize(("task", "labels"), [("classification", ["a", "b"]), ("summarization", [])])
def test_a_prediction_names_the_row_of_its_example_in_the_source(task, labels):
    _, rows = metrics.score(task, ["a", "b"], ["a", "a"], labels, numbers=[2, 7])
    assert [(row["row"], row["index"]) for row in rows] == [(2, 1), (7, 6)]


@pytest.mark.parametrize("answer", [None, "b"])
def test_all_answers_wrong_score_0_and_all_right_100(answer):
    wrong = values(of_answers([answer] * 3, ["a"] * 3))
    assert {wrong[name] for name in ("accuracy", "micro_f1", "macro_f1", "weighted_f1")} == {0.0}
    right = of_answers(["a", "b"], ["a", "b"])
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


IN_ASCII = [pair for pair in PAIRS if "".join(pair).isascii()]


def test_rouge_of_ascii_equals_rouge_score_itself():
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    summaries, references = zip(*IN_ASCII, strict=True)
    expected = [
        {name: 100 * score.fmeasure for name, score in scorer.score(target=theirs, prediction=ours).items()}
        for ours, theirs in IN_ASCII
    ]
    got = metrics.rouge_scores(summaries, references)
    assert len(got) > 5
    assert got == expected
    means = {name: np.mean([row[name] for row in expected]) for name in expected[0]}
    assert values(of_summaries(got)) == pytest.approx(means)


def default_words(text: str) -> list[str]:
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=True).tokenize(text)


def test_words_of_ascii_are_those_of_rouge_score():
    generator = np.random.default_rng(0)
    made_up = ["".join(map(chr, generator.integers(0, 128, 400))) for _ in range(200)]
    lines = [line for path in DEMO_DATA.glob("*.jsonl") for line in path.read_text("utf-8").splitlines()]
    texts = made_up + [text for line in lines for text in json.loads(line).values() if text.isascii()]
    assert len(texts) > 2000
    assert [words(text) for text in texts] == [default_words(text) for text in texts]


def test_words_of_real_summaries_are_those_of_rouge_score_but_for_letters_that_are_not_ascii(real_data):
    with gzip.open(real_data / "samsum_train.jsonl.gz", "rt", encoding="utf-8") as file:
        summaries = [json.loads(line)["summary"] for line in file]
    letters = "".join(set("".join(summaries)))
    others = {mark for mark in letters if not mark.isascii() and words(mark)}
    plain = [summary for summary in summaries if not others & set(summary)]
    assert len(plain) > 14_000
    assert [words(summary) for summary in plain] == [default_words(summary) for summary in plain]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Müller und Möller", ["müller", "und", "möller"]),
        ("Mu\u0308ller", ["müller"]),
        ("Анна опоздает.", ["анна", "опоздает"]),
        ("Η Άννα θα αργήσει", ["η", "άννα", "θα", "αργήσει"]),
        ("آنا دیر می\u200cرسد", ["آنا", "دیر", "می" + "رسد"]),
        ("आना देर से आएगी।", ["आना", "देर", "से", "आएगी"]),
        ("안나는 늦는다", ["안나는", "늦는다"]),
        ("安娜会迟到。", list("安娜会迟到")),
        ("アンナは遅れる", list("アンナは遅れる")),
        ("ฉันรัก", ["ฉั", "น", "รั", "ก"]),
        ("ខ្ញុំ", ["ខ្", "ញុំ"]),
        ("iPhone手机15台", ["iphon", "手", "机", "15", "台"]),
        ("don’t — 5€, it’s “running”", ["don", "t", "5", "it", "s", "run"]),
        ("snake_case co\u00adoperate a\u200bb", ["snake", "case", "cooper", "a", "b"]),
        ("cafés running", ["café", "run"]),
        ("1️⃣ ❤️ 👍🏽 … ！", ["1"]),
        ("", []),
    ],
)
def test_words_are_found_in_every_script(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize("text", ["安娜会迟到。", "Анна опоздает", "อันนาจะมาสาย", "アンナは遅れる", "Müller"])
def test_a_perfect_summary_scores_100_in_every_script_and_another_name_does_not(text):
    perfect, other = metrics.rouge_scores([unicodedata.normalize("NFD", text), "Möller"], [text, text])
    assert perfect["rouge1"] == perfect["rougeLsum"] == 100
    assert other["rouge1"] == 0


def test_a_test_set_of_summaries_is_scored_in_seconds():
    generator = np.random.default_rng(0)
    lexicon = ["".join(map(chr, generator.integers(97, 123, 6))) for _ in range(2000)]
    texts = [" ".join(generator.choice(lexicon, 20)) for _ in range(1400)]
    began = time.process_time()
    metrics.rouge_scores(texts[1:], texts[:-1])
    assert time.process_time() - began < 5  # a tenth of 14,000 summaries


@pytest.mark.parametrize("summary", ["👍", "...", "\u200b", "❤️ !"])
def test_a_reference_without_a_word_is_refused_before_anything_is_generated(summary):
    split = data.Split("t.jsonl", [("A: hi", "fine"), ("A: hi", summary)], [1, 3])
    args = cli.parse_args("summarization", "", [])
    with pytest.raises(UserError, match=r"t\.jsonl row 3: its summary .* holds no word") as error:
        data.sample_eval(split, args)
    assert "\n" not in str(error.value)
    assert data.sample_eval(split, cli.parse_args("classification", "", [])).numbers == [1, 3]


def test_the_version_of_a_metric_is_that_of_its_task():
    from study.generation import Answers, describe

    answers = Answers(["x"], 1, 1, 1.0, 0.0, "", "", [2])
    versions = {
        task: describe(answers, PROCESS, metrics.score(task, ["x"], ["x"], labels)[0], "free")[
            "metrics_version"
        ]
        for task, labels in (("classification", ["x", "y"]), ("summarization", []))
    }
    assert {task: text.partition(",")[0] for task, text in versions.items()} == {
        "classification": "1",
        "summarization": "2",
    }


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
    command = [sys.executable, "-c", code, json.dumps(IN_ASCII)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if "Couldn't find" in done.stderr or "OfflineMode" in done.stderr:
        pytest.skip("the evaluate library's rouge is not cached, and EVALUATE_ROUGE names no copy of it")
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    got = metrics.rouge_scores(*zip(*IN_ASCII, strict=True))
    means = values(of_summaries(got))
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
    return metrics.bootstrap({"share": metrics.mean_of(outcomes)}, len(outcomes), seed=seed)[0]["share"]


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


def test_an_interval_of_a_mean_equals_scipys_percentile_bootstrap():
    outcomes = np.random.default_rng(1).gamma(2, 0.1, 150)
    ours, _ = metrics.bootstrap({"mean": metrics.mean_of(outcomes)}, len(outcomes), resamples=20_000)
    theirs = scipy.stats.bootstrap(
        (outcomes,), np.mean, n_resamples=20_000, method="percentile", rng=2
    ).confidence_interval
    # An end of either has a Monte-Carlo error of 0.02 standard errors of the mean.
    tolerance = 0.1 * 100 * outcomes.std() / np.sqrt(len(outcomes))
    assert ours["mean"]["ci95"] == pytest.approx([100 * theirs.low, 100 * theirs.high], abs=tolerance)


def test_the_values_of_every_resample_are_those_that_the_intervals_were_read_from():
    outcomes = np.random.default_rng(0).random((2, 40)) < 0.5
    statistics = {name: metrics.mean_of(row) for name, row in zip("ab", outcomes, strict=True)}
    intervals, drawn = metrics.bootstrap(statistics, 40, resamples=250)
    assert drawn.shape == (2, 250)
    assert [intervals[name]["ci95"] for name in "ab"] == np.percentile(drawn, [2.5, 97.5], axis=1).T.tolist()


@pytest.mark.parametrize("name", ["accuracy", "micro_f1", "macro_f1", "weighted_f1", "invalid_answers"])
def test_every_classification_metric_has_an_interval_around_it(name):
    generator = np.random.default_rng(0)
    references = list(generator.choice(LABELS, 200))
    parsed = [
        reference if generator.random() < 0.6 else generator.choice(["a", None]) for reference in references
    ]
    metric = of_answers(parsed, references)[name]
    low, high = metric["ci95"]
    assert 0 < low < metric["value"] < high < 100
    assert high - low < 20


# Paired tests


def graded(*correct: bool) -> list[dict]:
    """Rows of predictions.jsonl whose reference is always a."""
    return [{"correct": right, "parsed": "a" if right else "b", "reference": "a"} for right in correct]


def against(won: int, lost: int, tied: int = 10) -> dict:
    """A comparison in which so many examples are right on one side only; of the ties half are."""
    ties = [i % 2 == 0 for i in range(tied)]
    ours, theirs = [True] * won + [False] * lost, [False] * won + [True] * lost
    return metrics.compare(graded(*ours, *ties), graded(*theirs, *ties))


@pytest.mark.parametrize(
    ("won", "lost", "p"),
    [(5, 0, 2 / 2**5), (0, 5, 2 / 2**5), (3, 1, 2 * (1 + 4) / 2**4), (6, 1, 2 * (1 + 7) / 2**7), (2, 2, 1)],
)
def test_mcnemar_is_the_figure_worked_out_by_hand(won, lost, p):
    accuracy = against(won, lost)["accuracy"]
    assert (accuracy["won"], accuracy["lost"]) == (won, lost)
    assert accuracy["mcnemar_p"] == pytest.approx(p)
    assert accuracy["value"] == pytest.approx(100 * (won - lost) / (won + lost + 10))


def test_a_paired_bootstrap_draws_both_sides_of_an_example_together():
    # 2 of 20 won and none lost: the difference is binomial, and 0 where neither of the two is drawn.
    accuracy = against(2, 0, 18)["accuracy"]
    ends = scipy.stats.binom.ppf([0.025, 0.975], 20, 0.1)
    assert accuracy["value"] == pytest.approx(10)
    assert accuracy["ci95"] == pytest.approx(list(100 / 20 * ends))
    assert accuracy["p"] == pytest.approx(2 * 0.9**20, abs=0.02)


def test_identical_answers_differ_by_nothing():
    for comparison in (against(0, 0), metrics.compare(*[[dict.fromkeys(metrics.ROUGE, 30.0)] * 5] * 2)):
        assert {(metric["value"], *metric["ci95"], metric["p"]) for metric in comparison.values()} == {
            (0, 0, 0, 1)
        }
    assert against(0, 0)["accuracy"]["mcnemar_p"] == 1


def test_a_clear_difference_is_told_from_chance_and_a_small_one_is_not():
    clear, small = (against(*counts, 120)["accuracy"] for counts in ((60, 20), (42, 38)))
    assert max(clear["p"], clear["mcnemar_p"]) < 0.01
    assert clear["ci95"][0] > 0
    assert min(small["p"], small["mcnemar_p"]) > 0.5
    assert small["ci95"][0] < 0 < small["ci95"][1]
    assert against(20, 60, 120)["accuracy"]["value"] == -clear["value"]


def test_rouge_is_compared_by_its_mean_over_the_same_examples():
    generator = np.random.default_rng(0)
    scores = generator.uniform(10, 60, 80)
    ours, theirs = (
        [dict.fromkeys(metrics.ROUGE, score) for score in scores + shift]
        for shift in (generator.normal(3, 5, 80), 0)
    )
    difference = np.mean([row["rouge2"] - other["rouge2"] for row, other in zip(ours, theirs, strict=True)])
    comparison = metrics.compare(ours, theirs)["rouge2"]
    assert comparison.keys() == {"value", "ci95", "p"}
    assert comparison["value"] == pytest.approx(difference)
    assert comparison["p"] < 0.01  # the spread of the examples themselves, 14 points, is common to both


# Cost


@pytest.mark.parametrize(
    ("gpu", "per_hour"),
    [
        ("NVIDIA A10G", None),  # two instances have one, at different prices
        ("g5.2xlarge", 1.212),
        ("AWS G5.4xlarge", 1.624),
        ("NVIDIA A100-SXM4-40GB", 3.81),
        ("NVIDIA A100-PCIE-40GB", 3.81),
        ("GCP A100 40GB", 3.81),
        ("NVIDIA A100-SXM4-80GB", None),
        ("NVIDIA H100 80GB HBM3", None),
        ("CPU, 2 cores", None),
        ("NVIDIA A10", None),
        ("NVIDIA A10Gx", None),
    ],
)
def test_a_device_has_a_price_with_source_and_date_or_none(gpu, per_hour):
    price = cost.price(gpu, None)
    assert (price["gpu"], price["price_per_hour"]) == (gpu, per_hour)
    assert (price["price_source"] is None, price["price_date"] is None) == (per_hour is None,) * 2


def of_run(*words: str, device: str = "NVIDIA A10G", gpus: int = 1) -> dict:
    return cost.of_run(cli.parse_args("classification", "", words), device, 1800, gpus)


def test_a_run_costs_its_seconds_at_the_price_of_flag_or_device():
    assert of_run(device="CPU")["usd"] is None
    assert of_run("--price_per_hour", "3")["usd"] == 1.5
    assert of_run("--price_per_hour", "3")["price_source"] == "--price_per_hour"
    assert of_run("--gpu_name", "g5.2xlarge")["usd"] == pytest.approx(0.606)
    assert of_run("--gpu_name", "G5.4XLARGE")["usd"] == pytest.approx(0.812)
    assert of_run(device="NVIDIA A100-SXM4-40GB")["usd"] == pytest.approx(1.905)
    assert of_run("--gpu_name", "A10G", "--price_per_hour", "3")["usd"] == 1.5
    assert of_run("--gpu_name", "g5.2xlarge", gpus=2)["usd"] == pytest.approx(1.212)
    assert of_run("--price_per_hour", "3", gpus=2)["usd"] == 1.5  # of the whole machine


def test_the_device_that_was_measured_stands_beside_what_it_is_priced_as():
    for flags, shown in (([], "NVIDIA A10G"), (["--gpu_name", "mine"], "NVIDIA A10G, priced as mine")):
        spent = of_run(*flags, "--price_per_hour", "3")
        assert (spent["device"], spent["gpu"]) == ("NVIDIA A10G", flags[-1] if flags else "NVIDIA A10G")
        assert cost.shown(spent) == shown
    assert cost.shown({"gpu": "CPU"}) == cost.device_of({"gpu": "CPU"}) == "CPU"  # an older record


SEVERAL = "price      unknown: NVIDIA A10G costs $1.212 (g5.2xlarge) or $1.624 (g5.4xlarge) an hour"


def test_of_several_prices_none_is_taken_and_the_choice_is_said(capsys):
    spent = of_run()
    assert (spent["price_per_hour"], spent["usd"], spent["price_source"]) == (None, None, None)
    [line] = capsys.readouterr().out.splitlines()
    assert line == f"{SEVERAL}; choose by --gpu_name INSTANCE or --price_per_hour"
    for flags in (["--gpu_name", "g5.2xlarge"], ["--price_per_hour", "1"]):
        assert of_run(*flags)["usd"]
        assert capsys.readouterr().out == ""


def entries(*of: tuple) -> list[dict]:
    """A price list of (gpu, instance, price)."""
    return [
        {"gpu": gpu, "instance": instance, "usd_per_hour": usd, "source": "x", "date": "x"}
        for gpu, instance, usd in of
    ]


@pytest.mark.parametrize(
    ("prices", "per_hour"),
    [
        ([("A10G", "x", 5)], 10),
        ([("A10G", "x", 5), ("A10G", "y", 5)], 10),
        ([("A10G", "x", 5), ("A10G", "y", 6)], None),
        ([("A10G", "x", 6), ("NVIDIA A10G", "y", 5)], 10),  # the second is its very name
        ([("L4", "x", 5)], 1),  # as recorded
        ([], 1),
    ],
)
def test_a_record_is_priced_anew_where_one_price_is_listed(prices, per_hour):
    assert cost.repriced({"gpu": "NVIDIA A10G", "price_per_hour": 1}, entries(*prices), 2) == per_hour


def test_an_instance_can_be_chosen_though_another_s_name_holds_its_name():
    prices = entries(("A10G", "g5.2xlarge", 2), ("A10G", "g5.2xlarge spot", 1))
    assert cost.price("g5.2xlarge spot", prices=prices)["price_per_hour"] == 1
    assert cost.price("g5.2xlarge", prices=prices)["price_per_hour"] == 2
    assert cost.price("a g5.2xlarge spot", prices=prices)["price_per_hour"] is None
