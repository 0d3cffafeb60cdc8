"""Accuracy, F1 and ROUGE in percent, with 95 % bootstrap intervals over the test examples, and paired tests.

A statistic here is a function of weights [resamples, examples], how often each example is drawn, that returns
values [resamples].
"""

from collections.abc import Callable, Sequence

import numpy as np

from prompts import parse_label, parse_summary

# Each counts up when a change to this module or to words.py changes a score of that task.
VERSION = {"classification": 1, "summarization": 2}
RESAMPLES = 1000  # percentile bootstrap (Efron and Tibshirani, 1993, chapter 13)
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
Statistic = Callable[[np.ndarray], np.ndarray]


def bootstrap(
    statistics: dict[str, Statistic], examples: int, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[dict, np.ndarray]:
    """Each statistic of the examples with its 95 % interval, in percent, and its values on every resample,
    [statistics, resamples]."""
    generator = np.random.default_rng(seed)
    draws = []
    for start in range(0, resamples, 100):  # a hundred at a time keep the weights of a large test set small
        size = min(100, resamples - start)
        weights = generator.multinomial(examples, np.full(examples, 1 / examples), size=size).astype(float)
        draws.append([statistic(weights) for statistic in statistics.values()])
    drawn = 100 * np.concatenate(draws, axis=1)
    intervals = {}
    for (name, statistic), row in zip(statistics.items(), drawn, strict=True):
        value = 100 * statistic(np.ones((1, examples)))[0]
        intervals[name] = {
            "value": float(value),
            "ci95": [float(end) for end in np.percentile(row, [2.5, 97.5])],
        }
    return intervals, drawn


def classification_statistics(
    parsed: Sequence[str | None], references: Sequence[str]
) -> dict[str, Statistic]:
    """Accuracy, micro, macro and weighted F1, and the share of invalid answers (None), which count as wrong.

    Macro F1 is the mean over the classes that occur as reference or as answer, as scikit-learn has it; an
    invalid answer is a miss of its reference's class and no class of its own.
    """
    labels = sorted({*references, *parsed} - {None})
    number = {label: i for i, label in enumerate([*labels, None])}
    truth = np.array([number[label] for label in references])
    answer = np.array([number[label] for label in parsed])
    one_hot = np.eye(len(number))
    is_truth, is_answer = one_hot[truth][:, :-1], one_hot[answer][:, :-1]

    def counts(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Hits, references and answers of each class, [resamples, classes]."""
        return weights @ (is_truth * is_answer), weights @ is_truth, weights @ is_answer

    def micro_f1(weights):
        hits, references, answers = (count.sum(axis=1) for count in counts(weights))
        return 2 * hits / (references + answers)

    def f1(weights):
        hits, references, answers = counts(weights)
        total = references + answers
        return np.divide(2 * hits, total, out=np.zeros_like(hits), where=total > 0), references, total

    def macro_f1(weights):
        scores, _, total = f1(weights)
        return scores.sum(axis=1) / (total > 0).sum(axis=1)

    def weighted_f1(weights):
        scores, references, _ = f1(weights)
        return (scores * references).sum(axis=1) / references.sum(axis=1)

    return {
        "accuracy": mean_of(truth == answer),
        "micro_f1": micro_f1,
        "macro_f1": macro_f1,
        "weighted_f1": weighted_f1,
        "invalid_answers": mean_of(answer == len(labels)),
    }


def mean_of(column: np.ndarray) -> Statistic:
    column = column.astype(float)
    return lambda weights: weights @ column / weights.sum(axis=1)


def rouge_scores(summaries: Sequence[str], references: Sequence[str]) -> list[dict[str, float]]:
    """ROUGE F-measures of each pair, in percent, with the stemmer: of text in ASCII as the `evaluate`
    library computes them, of other text by the words of its script."""
    from rouge_score.rouge_scorer import RougeScorer

    from study.words import Tokenizer

    scorer = RougeScorer(ROUGE, tokenizer=Tokenizer())
    return [
        {name: 100 * score.fmeasure for name, score in scorer.score(reference, summary).items()}
        for reference, summary in zip(references, summaries, strict=True)
    ]


def statistics_of(rows: Sequence[dict]) -> dict[str, Statistic]:
    """The metrics of a task as statistics of its rows of predictions.jsonl; of ROUGE, the means."""
    if "correct" in rows[0]:
        return classification_statistics([row["parsed"] for row in rows], [row["reference"] for row in rows])
    return {name: mean_of(np.array([row[name] for row in rows]) / 100) for name in ROUGE}


def score(
    task: str,
    answers: Sequence[str],
    references: Sequence[str],
    labels: Sequence[str] = (),
    numbers: Sequence[int] | None = None,
    places: Sequence[int] | None = None,
) -> tuple[dict, list[dict]]:
    """Read generated answers and score them: the metrics, and for each test example a row of
    predictions.jsonl. `numbers` and `places` are the examples' rows in their source (data.Split); all in
    order where not given."""
    numbers = range(1, len(references) + 1) if numbers is None else numbers
    places = [number - 1 for number in numbers] if places is None else places
    parsed = [parse_label(answer, labels) if labels else parse_summary(answer) for answer in answers]
    if task == "classification":
        scores = [
            {"correct": answer == reference} for answer, reference in zip(parsed, references, strict=True)
        ]
    else:
        scores = rouge_scores(parsed, references)
    rows = [
        {"index": place, "row": number, "prediction": answer, "parsed": read, "reference": right, **more}
        for place, number, answer, read, right, more in zip(
            places, numbers, answers, parsed, references, scores, strict=True
        )
    ]
    return bootstrap(statistics_of(rows), len(rows))[0], rows


def compare(rows: Sequence[dict], others: Sequence[dict], resamples: int = 10_000) -> dict:
    """How much better `rows` score than `others`, predictions for the same examples: for each metric the
    difference in points, its 95 % interval and the two-sided p of the paired bootstrap (Koehn, 2004); for
    accuracy also the exact p of McNemar's test (1947)."""
    from scipy.stats import binomtest

    ours, theirs = statistics_of(rows), statistics_of(others)
    differences = {
        name: lambda weights, name=name: ours[name](weights) - theirs[name](weights) for name in ours
    }
    result, drawn = bootstrap(differences, len(rows), resamples)
    for name, values in zip(differences, drawn, strict=True):
        tail = min((values <= 0).sum(), (values >= 0).sum())
        result[name]["p"] = float(min(1, 2 * (tail + 1) / (resamples + 1)))
    if "correct" in rows[0]:
        pairs = [(row["correct"], other["correct"]) for row, other in zip(rows, others, strict=True)]
        won, lost = pairs.count((True, False)), pairs.count((False, True))
        result["accuracy"] |= {"won": won, "lost": lost}
        result["accuracy"]["mcnemar_p"] = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    return result
