"""TF-IDF and utterances taken from a dialogue: records like all others, scores of the libraries' own."""

import json
import subprocess
from pathlib import Path

import pytest
from conftest import DEMO_DATA, error_line, run_script, write_rows
from preloaded import run_preloaded

from study.records import record

POSTS = ("--train_file", DEMO_DATA / "posts_train.jsonl", "--test_file", DEMO_DATA / "posts_test.jsonl")


def cheap(*words: object, by=run_preloaded) -> subprocess.CompletedProcess:
    return by("competitors/cheap.py", *words)


def read(folder: Path, part: str) -> dict:
    [path] = folder.rglob(f"{part}.json")
    return record.read_whole(path)


def rows_of(folder: Path) -> list[dict]:
    [path] = folder.rglob("predictions.jsonl")
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("method", ["tfidf-nb", "tfidf-svm", "tfidf-lr"])
def test_a_classifier_trains_and_scores_as_scikit_learn_does(tmp_path, method):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import ComplementNB
    from sklearn.svm import LinearSVC

    by = run_script if method == "tfidf-nb" else run_preloaded
    done = cheap("--method", method, *POSTS, "--output_dir", tmp_path, "--price_per_hour", 3.6, by=by)
    assert (done.returncode, done.stderr) == (0, "")
    train, test = (
        [json.loads(line) for line in (DEMO_DATA / f"posts_{split}.jsonl").read_text("utf-8").splitlines()]
        for split in ("train", "test")
    )
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    seen = words.fit_transform([row["text"] for row in train])
    model = {
        "tfidf-nb": ComplementNB(alpha=0.1),
        "tfidf-svm": LinearSVC(random_state=0),
        "tfidf-lr": LogisticRegression(C=10, max_iter=1000),
    }[method].fit(seen, [row["label"] for row in train])
    expected = list(model.predict(words.transform([row["text"] for row in test])))
    rows = rows_of(tmp_path)
    assert [row["parsed"] for row in rows] == expected
    if method == "tfidf-svm":
        assert not any("confidence" in row for row in rows)
    else:
        shares = model.predict_proba(words.transform([row["text"] for row in test])).max(1)
        assert [row["confidence"] for row in rows] == pytest.approx(list(shares))
        assert max(shares) - min(shares) > 0.1
    content, trained = read(tmp_path, "eval"), read(tmp_path, "train")
    right = sum(row["label"] == answer for row, answer in zip(test, expected, strict=True))
    assert content["eval"]["metrics"]["accuracy"]["value"] == pytest.approx(100 * right / len(test))
    assert content["model"] == trained["model"] == f"TF-IDF + {NAMES[method]}"
    assert content["script"] == "competitors/cheap.py"
    assert trained["train"]["examples"] == 480
    assert trained["train"]["vocabulary"] == len(words.vocabulary_)
    total = trained["train"]["wall_seconds"] + content["eval"]["wall_seconds"]
    assert trained["cost"]["usd"] + content["cost"]["usd"] == pytest.approx(total / 1000)


def test_an_evaluation_that_fails_after_the_training_has_its_own_time_alone(tmp_path):
    (tmp_path / "predictions.jsonl").mkdir()  # which can't be written
    assert "predictions.jsonl" in error_line(cheap(*POSTS, "--experiment_dir", tmp_path))
    failed, trained = (json.loads((tmp_path / f"{part}.json").read_text()) for part in ("eval", "train"))
    assert failed["status"] == "failed"
    assert failed["wall_seconds"] < trained["train"]["wall_seconds"] / 2


NAMES = {"tfidf-nb": "naive Bayes", "tfidf-svm": "linear SVM", "tfidf-lr": "logistic regression"}


def test_a_finished_run_is_found_and_one_without_a_score_is_scored(tmp_path):
    words = (*POSTS, "--output_dir", tmp_path)
    assert cheap(*words).returncode == 0
    trained = read(tmp_path, "train")
    again = cheap(*words)
    assert again.stdout.startswith("finished   ")
    [path] = tmp_path.rglob("eval.json")
    path.unlink()
    assert cheap(*words).returncode == 0
    assert read(tmp_path, "train") == trained
    assert read(tmp_path, "eval")["training"] == trained["finished"]
    assert cheap(*words, "--dry_run").stdout.splitlines()[-1].startswith("finished\t")
    assert (
        cheap(*words, "--train_sample_fraction", 0.5, "--dry_run")
        .stdout.splitlines()[-1]
        .startswith("not started\t")
    )


def test_shares_and_seeds_take_the_examples_that_the_other_scripts_take(tmp_path):
    from study import cli, data

    words = (*POSTS, "--train_sample_fraction", 0.1, "--seed", 3)
    assert cheap(*words, "--output_dir", tmp_path).returncode == 0
    args = cli.parse_args("classification", "", list(map(str, words)))
    expected = data.sample_train(data.load(args, ["train", "test"])["train"], args).describe()
    assert read(tmp_path, "train")["data"]["train"] == expected


@pytest.mark.parametrize(
    ("method", "summary"),
    [
        ("lead-3", "Ann: hi Bo: good morning to you Ann: see you at nine in the old office"),
        (
            "longest-3",
            "Bo: good morning to you Ann: see you at nine in the old office Bo: I will bring the keys",
        ),
    ],
)
def test_utterances_are_taken_in_their_order(tmp_path, method, summary):
    dialogue = "Ann: hi\nBo: good morning to you\n\nAnn: see you at nine in the old office\n"
    dialogue += "Bo: I will bring the keys"
    file = write_rows(tmp_path / "t.jsonl", [{"dialogue": dialogue, "summary": "They meet at nine."}])
    words = ("--task_type", "summarization", "--method", method, "--test_file", file)
    done = cheap(*words, "--output_dir", tmp_path / "runs")
    assert (done.returncode, done.stderr) == (0, "")
    assert [row["parsed"] for row in rows_of(tmp_path / "runs")] == [summary]
    assert not list((tmp_path / "runs").rglob("train.json"))
    assert cheap(*words, "--output_dir", tmp_path / "runs").stdout.startswith("finished   ")


def test_test_texts_without_a_known_word_are_counted_and_said(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", [{"text": f"word {x}", "label": x} for x in "ab" * 4])
    test = write_rows(
        tmp_path / "test.jsonl", [{"text": "unheard of", "label": "a"}, {"text": "word", "label": "b"}]
    )
    done = cheap("--train_file", train, "--test_file", test, "--output_dir", tmp_path / "runs")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 test texts have no word of the training texts: they all get the same class" in done.stdout
    assert read(tmp_path / "runs", "eval")["eval"]["without_a_known_word"] == 1


def test_training_texts_without_a_word_are_counted_and_said(tmp_path):
    rows = [{"text": text, "label": label} for text, label in zip(["!?", "a b", "word"], "aab", strict=True)]
    file = write_rows(tmp_path / "t.jsonl", rows)
    done = cheap("--train_file", file, "--test_file", file, "--output_dir", tmp_path / "runs")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 training texts have no word of two letters or more" in done.stdout
    assert read(tmp_path / "runs", "train")["train"]["without_a_word"] == 2


@pytest.mark.parametrize("method", ["tfidf-nb", "tfidf-svm"])
def test_training_texts_without_any_word_are_refused_in_one_line_and_recorded(tmp_path, method):
    rows = [{"text": "!?", "label": "a"}, {"text": "...", "label": "b"}]
    file = write_rows(tmp_path / "t.jsonl", rows)
    words = ("--method", method, "--train_file", file, "--test_file", file)
    done = cheap(*words, "--output_dir", tmp_path / "runs")
    assert f"--method {method} counts words" in error_line(done)
    assert "name other texts by --train_file or --text_column" in error_line(done)
    assert done.returncode == 1
    assert read(tmp_path / "runs", "train")["status"] == "failed"


@pytest.mark.parametrize("method", ["tfidf-nb", "tfidf-svm"])
def test_a_sample_of_one_class_is_refused_by_its_flag(tmp_path, method):
    done = cheap("--method", method, *POSTS, "--max_train_samples", 1, "--output_dir", tmp_path)
    assert "--max_train_samples 1 takes examples of one class only" in error_line(done)


def test_a_folder_with_the_run_of_another_script_is_refused(tmp_path):
    words = (*POSTS, "--max_train_samples", 64, "--experiment_dir", tmp_path / "run")
    assert cheap(*words).returncode == 0
    done = run_preloaded("competitors/flan_t5.py", *words)
    assert "train.json belongs to a run of tfidf-nb, not of t5-full" in error_line(done)
    done = run_preloaded("llama2_classification_inference.py", "--experiment_dir", tmp_path / "run")
    assert "method tfidf-nb, which competitors/cheap.py scores too: start that instead" in error_line(done)


def test_a_method_of_the_other_task_is_bad_usage():
    done = cheap("--task_type", "summarization", "--method", "tfidf-nb")
    assert done.returncode == 2
    assert "--method tfidf-nb: for summarization it is lead-3 or longest-3" in done.stderr


def test_real_posts_score_what_is_known_of_them(real_data, tmp_path):
    words = (
        "--train_file",
        real_data / "newsgroups_train.jsonl.gz",
        "--test_file",
        real_data / "newsgroups_test.jsonl.gz",
    )
    assert cheap(*words, "--output_dir", tmp_path).returncode == 0
    assert read(tmp_path, "eval")["eval"]["metrics"]["accuracy"]["value"] == pytest.approx(74.1, abs=1)
