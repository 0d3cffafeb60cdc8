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
    rows = [{"parsed": answer, "reference": right} for answer, right in zip(parsed, references, strict=True)]
    return metrics.summed_up("classification", rows)["metrics"]


def of_summaries(rows: list[dict]) -> dict:
    return metrics.summed_up("summarization", rows)["metrics"]


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
    assert values(scores["metrics"])["macro_f1"] == pytest.approx(200 / 3)
    assert values(scores["metrics"])["invalid_answers"] == 50.0
    assert scores["per_example"] == {
        **{"classes": ["a", "b"], "references": [0, 0, 1, 1], "answers": [0, None, None, 1]}
    }


def test_the_five_commonest_invalid_answers_are_kept_with_their_counts():
    answers = ["a", *["z" * 200] * 3, *["It is b\n"] * 4, "", "", "x", "y", "w"]
    scores, _ = metrics.score("classification", answers, ["a"] * 13, ["a", "b"])
    common = [["It is b", 4], ["z" * 80, 3], ["", 2], ["x", 1], ["y", 1]]
    assert scores["commonest_invalid"] == common
    assert "commonest_invalid" not in metrics.score("classification", ["a"], ["b"], ["a", "b"])[0]
    assert "commonest_invalid" not in metrics.score("summarization", ["a"], ["b"])[0]


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
    assert values(of_summaries(got)) == pytest.approx(means, abs=1e-4)  # each is kept to four digits


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
        "classification": "2",
        "summarization": "3",
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
        assert means[name] == pytest.approx(100 * np.mean(scores), abs=1e-4)


def test_a_summary_is_scored_up_to_the_next_heading_and_kept_whole():
    answers = ["Ann is late.\n### Dialogue:\nfake", "Bo waits."]
    scores, rows = metrics.score("summarization", answers, ["Ann is late.", "Cy came"])
    assert [row["prediction"] for row in rows] == answers
    assert rows[0]["parsed"] == "Ann is late."
    assert [row["rouge1"] for row in rows] == [100.0, 0.0]
    assert values(scores["metrics"])["rouge1"] == 50.0


# Intervals


def noisy(generator: np.random.Generator, kinds: int = 4, number: int = 200) -> tuple[list, list]:
    """References, and answers of which 3/5 are right and some are invalid."""
    references = list(generator.choice(LABELS[:kinds], number))
    wrong = lambda: generator.choice(np.array(["a", "b", None], dtype=object))
    return references, [right if generator.random() < 0.6 else wrong() for right in references]


@pytest.mark.parametrize("name", ["accuracy", "micro_f1", "macro_f1", "weighted_f1", "invalid_answers"])
def test_every_classification_metric_has_an_interval_around_it(name):
    references, parsed = noisy(np.random.default_rng(0))
    metric = of_answers(parsed, references)[name]
    low, high = metric["ci95"]
    assert 0 < low < metric["value"] < high < 100
    assert high - low < 20


@pytest.mark.parametrize("seed", range(3))
def test_pseudo_values_are_those_of_scores_without_each_example(seed):
    references, parsed = noisy(np.random.default_rng(seed), kinds=3, number=30)  # and d never occurs
    references[0], parsed[1] = "d", "c"
    of = metrics.summed_up(
        "classification", [{"parsed": a, "reference": r} for a, r in zip(parsed, references, strict=True)]
    )
    found = metrics.examples_of(of["per_example"]).values()
    for name in ("micro_f1", "macro_f1", "weighted_f1"):
        for i in range(30):
            left = values(of_answers(parsed[:i] + parsed[i + 1 :], references[:i] + references[i + 1 :]))[
                name
            ]
            assert 100 * found[name][i] == pytest.approx(30 * of["metrics"][name]["value"] - 29 * left)


def test_macro_f1_says_over_how_many_classes_and_has_no_interval_where_these_are_too_many():
    references = [str(i % 40) for i in range(100)]
    parsed = [right if i % 3 else "0" for i, right in enumerate(references)]
    found = of_answers(parsed, references)
    assert (found["macro_f1"]["classes"], found["macro_f1"]["ci95"]) == (40, None)  # 2.5 examples each
    assert found["accuracy"]["ci95"]
    assert of_answers(parsed * 2, references * 2)["macro_f1"]["ci95"]


def test_scores_of_0_and_of_all_have_wilsons_interval_and_f1_none():
    found = of_answers(["b"] * 160, ["a"] * 160)
    assert found["accuracy"] == {"value": 0.0, "ci95": pytest.approx([0, 100 * 3.8415 / 163.8415], abs=1e-3)}
    assert found["macro_f1"]["ci95"] is None
    nothing = of_summaries([dict.fromkeys(metrics.ROUGE, 0.0)] * 80)["rouge2"]
    assert nothing["ci95"] == pytest.approx([0, 100 * 3.8415 / 83.8415], abs=1e-3)


def test_one_example_has_no_interval():
    assert of_answers(["a"], ["a"])["accuracy"] == {"value": 100.0, "ci95": None}


# What a record says of each example


@pytest.mark.parametrize(
    "change",
    [
        {"answers": [0, None, 1]},
        {"answers": [0, None, 1, 9]},
        {"answers": [0, None, 1, "b"]},
        {"references": [0, 1, 0, 1]},
        {"references": None},
        {"classes": ["a"]},
    ],
)
def test_examples_that_do_not_give_the_metrics_are_refused_in_one_line(change):
    scores, _ = metrics.score("classification", ["a", "z", "b", "b"], ["a", "a", "b", "a"], ["a", "b"])
    metrics.check(scores | {"examples": 4}, "eval.json")
    spoilt = scores | {"examples": 4, "per_example": scores["per_example"] | change}
    with pytest.raises(UserError, match=r"^eval\.json: its per_example does not give its metrics") as error:
        metrics.check(spoilt, "eval.json")
    assert "\n" not in str(error.value)


# Two runs


def graded(*correct: bool) -> dict:
    """`per_example` of answers whose reference is always a."""
    return {
        "classes": ["a", "b"],
        "references": [0] * len(correct),
        "answers": [1 - right for right in correct],
    }


def against(won: int, lost: int, tied: int = 10) -> tuple[dict, dict]:
    """Two runs of which so many examples are right on one side only; of the ties half are."""
    ties = [i % 2 == 0 for i in range(tied)]
    return graded(*[True] * won, *[False] * lost, *ties), graded(*[False] * won, *[True] * lost, *ties)


@pytest.mark.parametrize(
    ("won", "lost", "p"),
    [(5, 0, 2 / 2**5), (0, 5, 2 / 2**5), (3, 1, 2 * (1 + 4) / 2**4), (6, 1, 2 * (1 + 7) / 2**7), (2, 2, 1)],
)
def test_mcnemar_is_the_figure_worked_out_by_hand_and_swapping_comes_to_it(won, lost, p):
    sides = against(won, lost)
    assert metrics.mcnemar(*sides) == (won, lost, pytest.approx(p))
    assert metrics.p_of_two("accuracy", *sides) == pytest.approx(p, abs=0.03)


def test_identical_answers_differ_by_nothing():
    sides = against(0, 0)
    assert metrics.mcnemar(*sides)[2] == 1
    assert {metrics.p_of_two(name, *sides) for name in ("accuracy", "macro_f1", "invalid_answers")} == {1}


def test_macro_f1_is_compared_by_swapping_whole_answers():
    generator = np.random.default_rng(0)
    references = generator.integers(0, 4, 12)
    ours, theirs = (generator.integers(-1, 4, 12) for _ in range(2))
    one, other = (metrics.Answers(4, references, answers) for answers in (ours, theirs))
    swaps = np.array([[(number >> i) & 1 for i in range(12)] for number in range(2**12)], dtype=float)
    found = one.macro_f1_after(other)(swaps)
    for swap, difference in list(zip(swaps, found, strict=True))[::97]:
        swapped = [np.where(swap == 1, *pair) for pair in ((theirs, ours), (ours, theirs))]
        scores = [metrics.Answers(4, references, answers).scores()["macro_f1"] for answers in swapped]
        assert difference == pytest.approx(scores[0] - scores[1])
    exact = (np.abs(found) >= abs(found[0]) - 1e-9).mean()  # over all 2^12 swaps
    names = [{"classes": list("abcd"), "references": references.tolist()} for _ in range(2)]
    for of, answers in zip(names, (ours, theirs), strict=True):
        of["answers"] = [None if answer < 0 else int(answer) for answer in answers]
    assert metrics.p_of_two("macro_f1", *names) == pytest.approx(exact, abs=0.03)


def test_classes_that_one_side_lacks_are_the_same_class_on_the_other():
    ours = {"classes": ["a", "c"], "references": [0, 1, 1], "answers": [0, 1, None]}
    theirs = {"classes": ["a", "b", "c"], "references": [0, 2, 2], "answers": [0, 2, None]}
    assert metrics.p_of_two("macro_f1", ours, theirs) == 1


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
