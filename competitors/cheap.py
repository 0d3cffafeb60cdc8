"""Score what costs next to nothing, beside the language models: TF-IDF with a linear classifier, or
utterances taken from the dialogue as its summary.

    python competitors/cheap.py --train_sample_fraction 0.1                    # TF-IDF and naive Bayes
    python competitors/cheap.py --method tfidf-svm --train_file train.jsonl --test_file test.jsonl
    python competitors/cheap.py --task_type summarization --method longest-3

It trains where the method learns anything, scores, and leaves train.json, eval.json and predictions.jsonl in
a folder of its own. It takes seconds on a processor. A classifier is not kept: training it again is quick.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from study import classes, cli, data, device
from study.errors import UserError
from study.records import cost, estimate, record, runs, summary
from study.records.schema import METHODS

KIND = "cheap"


def main(process: device.Process) -> None:
    args = cli.parse_args(None, __doc__, kind=KIND)
    method, trains = args.method, METHODS[args.method].trains
    folder = runs.folder_of(args, method)
    trained_path, path = folder / "train.json", folder / runs.eval_name(args, vars(args))
    if args.dry_run:
        return estimate.say_dry_run(path, args, method, process)

    estimate.check_gpu_name(args)
    splits = data.load(args, ["train", args.split] if trains else [args.split])
    test = data.sample_eval(splits[args.split], args)
    described = {args.split: test.describe()}
    train = data.sample_train(splits["train"], args) if trains else None
    with record.locked(folder, process):
        trained = train and runs.find_finished(trained_path, args, method, {"train": train.describe()})
        content = (trained or not train) and runs.find_finished(path, args, method, described, trained)
        if content:
            return print(f"finished   {path}\n{summary.result_block(content)}")

        print(f"run        {folder}\nmodel      {METHODS[method].model}")
        print(data.say_split(args.split, splits[args.split], test), flush=True)
        answer = taken_from(method)
        if train:
            print(data.say_split("train", splits["train"], train))
            print(classes.say(train, splits["train"]), flush=True)
        if trained:
            answer, _ = fit(method, train.examples)
        elif train:
            with record.recording(trained_path, args, method, process) as content:
                answer, known = fit(method, train.examples)
                content["data"] = {"train": train.describe()}
                content["labels"] = data.labels_of(splits["train"])
                content["train"] = {
                    "examples": len(train.examples),
                    "wall_seconds": process.seconds(),
                    "peak_memory_gib": device.peak_memory_gib(),
                    "tokens_per_second": None,
                    "loss_history": [],
                    **known,
                }
                content["cost"] = cost.of_run(args, device.name(), content["train"]["wall_seconds"])
            process = process.from_here()
            if empty := known["without_a_word"]:
                print(f"{'':11}{empty:,} training texts have no word of two letters or more")
            trained = record.read(trained_path)
            print(summary.result_block(trained))
        with record.recording(path, args, method, process) as content:
            content |= {"data": described, **(runs.scored_adapter(trained) if train else {})}
            labels = data.labels_of(splits["train"]) if train else ()
            content["eval"], rows = score(args.task, answer, test, labels)
            content["eval"]["wall_seconds"] = process.seconds()
            content["cost"] = cost.of_run(args, device.name(), content["eval"]["wall_seconds"])
            record.write_rows(runs.predictions_beside(path), rows)
        print(summary.result_block(content))


def score(task: str, answer, test: data.Split, labels: Sequence[str]) -> tuple[dict, list[dict]]:
    """The `eval` of a record, but for its `wall_seconds`, and the rows of predictions.jsonl."""
    from study import metrics  # here, so that a finished run answers at once

    texts, references = (list(column) for column in zip(*test.examples, strict=True))
    began = time.monotonic()
    answers, sure, empty = answer(texts)
    seconds = max(time.monotonic() - began, 1e-9)
    if empty:
        print(f"{'':11}{empty:,} test texts have no word of the training texts: they all get the same class")
    scores, rows = metrics.score(task, answers, references, labels, test.numbers, test.places, sure)
    words = [sum(len(text.split()) for text in column) for column in (texts, answers)]  # between blanks
    return {
        "examples": len(texts),
        "seconds": seconds,
        "examples_per_second": len(texts) / seconds,
        "peak_memory_gib": device.peak_memory_gib(),
        "input_tokens": words[0],
        "output_tokens": words[1],
        "decoding": "none",
        "without_a_known_word": empty,
        **scores,
    }, rows


def fit(method: str, examples: list[tuple[str, str]]):
    """A classifier of texts by their words and pairs of words, and for the record what it took, how many of
    these it knows and how many of `examples` have none. Raises UserError where no text has one."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import ComplementNB
    from sklearn.svm import LinearSVC

    words = TfidfVectorizer(lowercase=True, ngram_range=(1, 2), sublinear_tf=True, min_df=1, norm="l2")
    classifier = {
        "tfidf-nb": ComplementNB(alpha=0.1),
        "tfidf-svm": LinearSVC(C=1.0, random_state=0),
        "tfidf-lr": LogisticRegression(C=10.0, max_iter=1000),
    }[method]
    texts, labels = (list(column) for column in zip(*examples, strict=True))
    began = time.monotonic()
    try:
        counts = words.fit_transform(texts)  # [texts, words]
    except ValueError:  # what scikit-learn raises for that alone
        raise UserError(
            f"--method {method} counts words of two letters or more, and no training text has one: name "
            "other texts by --train_file or --text_column"
        ) from None
    classifier.fit(counts, labels)
    seconds = time.monotonic() - began

    def answer(texts: list[str]) -> tuple[list[str], list[float] | None, int]:
        counts = words.transform(texts)
        sure = None
        if METHODS[method].confident:
            sure = classifier.predict_proba(counts).max(1).tolist()  # of [texts, classes]
        return list(map(str, classifier.predict(counts))), sure, wordless(counts)

    known = {"vocabulary": len(words.vocabulary_), "without_a_word": wordless(counts)}
    return answer, {"seconds": seconds, **known}


def wordless(counts) -> int:
    """Rows of a sparse matrix that hold nothing."""
    return int((counts.getnnz(axis=1) == 0).sum())


def taken_from(method: str):
    """The first three or the three longest utterances of each dialogue, in their order, as its summary."""

    def answer(texts: list[str]) -> tuple[list[str], None, int]:
        return [" ".join(chosen(text)) for text in texts], None, 0

    def chosen(text: str) -> list[str]:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if method == "longest-3":
            longest = sorted(range(len(lines)), key=lambda i: -len(lines[i]))[:3]
            return [lines[i] for i in sorted(longest)]
        return lines[:3]

    return answer


if __name__ == "__main__":
    cli.run_script(main)
