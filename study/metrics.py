"""Accuracy, F1 and ROUGE in percent, each with a 95 % bootstrap interval over the test examples."""

from collections.abc import Callable, Sequence

import numpy as np

from prompts import parse_label, parse_summary

RESAMPLES = 1000  # percentile bootstrap (Efron and Tibshirani, 1993, chapter 13)
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def with_interval(statistic: Callable[[np.ndarray], np.ndarray], examples: int, seed: int = 0) -> dict:
    """`statistic` of the examples and its 95 % interval, in percent.

    `statistic` takes weights [resamples, examples], how often each example is drawn, and returns values
    [resamples].
    """
    value = statistic(np.ones((1, examples)))[0]
    generator = np.random.default_rng(seed)
    values = np.concatenate(
        [  # a hundred at a time keep the weights of a large test set small
            statistic(generator.multinomial(examples, np.full(examples, 1 / examples), size=100))
            for _ in range(RESAMPLES // 100)
        ]
    )
    low, high = np.percentile(values, [2.5, 97.5])
    return {"value": float(100 * value), "ci95": [float(100 * low), float(100 * high)]}


def classification_metrics(
    parsed: Sequence[str | None], references: Sequence[str], labels: Sequence[str]
) -> dict:
    """Accuracy, micro, macro and weighted F1, and the share of invalid answers (None), which count as wrong.

    Macro F1 is the mean over the classes that occur as reference or as answer, as scikit-learn has it; an
    invalid answer is a miss of its reference's class and no class of its own.
    """
    number = {label: i for i, label in enumerate(labels)}
    truth = np.array([number[label] for label in references])
    answer = np.array([len(labels) if label is None else number[label] for label in parsed])
    one_hot = np.eye(len(labels) + 1)
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

    statistics = {
        "accuracy": lambda weights: (weights @ (truth == answer)) / weights.sum(axis=1),
        "micro_f1": micro_f1,
        "macro_f1": macro_f1,
        "weighted_f1": weighted_f1,
        "invalid_answers": lambda weights: (weights @ (answer == len(labels))) / weights.sum(axis=1),
    }
    return {name: with_interval(statistic, len(truth)) for name, statistic in statistics.items()}


def rouge_scores(summaries: Sequence[str], references: Sequence[str]) -> list[dict[str, float]]:
    """ROUGE F-measures of each pair, in percent, with the stemmer, as the `evaluate` library's rouge computes
    them."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE, use_stemmer=True)
    return [
        {name: 100 * score.fmeasure for name, score in scorer.score(reference, summary).items()}
        for reference, summary in zip(references, summaries, strict=True)
    ]


def summarization_metrics(scores: Sequence[dict[str, float]]) -> dict:
    """The mean of each ROUGE F-measure over the pairs."""
    columns = {name: np.array([score[name] for score in scores]) / 100 for name in ROUGE}
    return {
        name: with_interval(
            lambda weights, column=column: weights @ column / weights.sum(axis=1), len(scores)
        )
        for name, column in columns.items()
    }


def score(
    task: str, answers: Sequence[str], references: Sequence[str], labels: Sequence[str] = ()
) -> tuple[dict, list[dict]]:
    """Read generated answers and score them: the metrics, and for each test example a row of
    predictions.jsonl."""
    rows = [
        {
            "index": i,
            "prediction": answer,
            "parsed": parse_label(answer, labels) if labels else parse_summary(answer),
            "reference": reference,
        }
        for i, (answer, reference) in enumerate(zip(answers, references, strict=True))
    ]
    parsed = [row["parsed"] for row in rows]
    if task == "classification":
        extra = [
            {"correct": answer == reference} for answer, reference in zip(parsed, references, strict=True)
        ]
        metrics = classification_metrics(parsed, references, labels)
    else:
        extra = rouge_scores(parsed, references)
        metrics = summarization_metrics(extra)
    return metrics, [row | more for row, more in zip(rows, extra, strict=True)]
