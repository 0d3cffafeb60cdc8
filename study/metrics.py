"""Accuracy, F1 and ROUGE in percent, with 95 % intervals (intervals.py), from the answer to each example."""

import importlib.metadata
from array import array
from collections import Counter
from collections.abc import Sequence

import numpy as np

from prompts import parse_label, parse_summary
from study.errors import UserError
from study.intervals import LEVEL, interval, p_by_swapping

# Each counts up when a change to this module, to intervals.py or to words.py changes a score of that task or
# its interval.
VERSION = {"classification": 2, "summarization": 3}
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
LEAST, LACKING = 3, 0.4  # more than this share of classes with fewer test examples: macro F1 has no interval


class Answers:
    """Of each test example the number of its class and of the class that the answer names, -1 for none
    (an invalid answer), and what they come to: counts of hits, references and answers [classes]."""

    def __init__(self, classes: int, references: np.ndarray, answers: np.ndarray):
        self.classes, self.references, self.answers = classes, references, answers
        self.right = references == answers
        self.counts = tuple(counted(of, classes) for of in (references[self.right], references, answers))

    def scores(self) -> dict[str, float]:
        """Accuracy, micro, macro and weighted F1, and the share of invalid answers, which count as wrong.

        Macro F1 is the mean over the classes that occur as reference or as answer, as scikit-learn has it; an
        invalid answer is a miss of its reference's class and no class of its own.
        """
        hits, references, answers = self.counts
        f1 = f1_of(hits, references + answers)
        return {
            "accuracy": self.right.mean(),
            "micro_f1": 2 * hits.sum() / (references + answers).sum(),
            "macro_f1": f1.sum() / self.occurring(),
            "weighted_f1": (references * f1).sum() / references.sum(),
            "invalid_answers": (self.answers < 0).mean(),
        }

    def occurring(self) -> int:
        """How many classes macro F1 is over."""
        return int((self.counts[1] + self.counts[2] > 0).sum())

    def trusted(self) -> bool:
        """Whether macro F1 has an interval that holds."""
        _, references, answers = self.counts
        return (references[references + answers > 0] < LEAST).mean() <= LACKING

    def values(self) -> dict[str, np.ndarray]:
        """What each example adds to each score, [examples]: to F1 the jackknife's pseudo-value (Tukey, 1958),
        N F1 - (N - 1) F1 without the example. The mean of these is F1 less its bias."""
        number, scores = len(self.references), self.scores()
        without = self.without_each()
        shares = {"accuracy": self.right.astype(float), "invalid_answers": (self.answers < 0).astype(float)}
        return shares | {name: number * scores[name] - (number - 1) * left for name, left in without.items()}

    def without_each(self) -> dict[str, np.ndarray]:
        """The F1 scores without each of the examples, [examples]. Only two classes change: the reference's,
        and the answer's where that is another one."""
        hits, references, answers = self.counts
        total, number, right = references + answers, len(self.references), self.right
        f1 = f1_of(hits, total)
        mine, named, other = self.references, self.answers, (self.answers >= 0) & ~right
        ours = f1_of(hits[mine] - right, total[mine] - 1 - right)
        theirs = np.where(other, f1_of(hits[named], total[named] - 1), 0)
        was = np.where(other, f1[named], 0)
        gone = (total[mine] - 1 - right == 0).astype(int) + (other & (total[named] == 1))
        summed = (references * f1).sum() - references[mine] * f1[mine] + (references[mine] - 1) * ours
        summed += np.where(other, references[named], 0) * (theirs - was)
        return {
            "micro_f1": ratio(2 * (hits.sum() - right), total.sum() - 1 - (named >= 0)),
            "macro_f1": ratio(f1.sum() - f1[mine] + ours - was + theirs, self.occurring() - gone),
            "weighted_f1": ratio(summed, number - 1),
        }

    def macro_f1_after(self, other: "Answers"):
        """Of swaps [repetitions, examples] the difference in macro F1 to `other`, where each example that is
        swapped has the other's answer."""
        one_hot = np.eye(self.classes + 1)[:, :-1]  # the last row, which is number -1, is of no class
        true, ours, theirs = (one_hot[of] for of in (self.references, self.answers, other.answers))
        more = true * theirs - true * ours, theirs - ours  # [examples, classes]
        base = self.counts[1]

        def change(swaps: np.ndarray) -> np.ndarray:
            hits, answers = (swaps @ column for column in more)
            ours = macro_f1(self.counts[0] + hits, base + self.counts[2] + answers)
            return ours - macro_f1(other.counts[0] - hits, base + other.counts[2] - answers)

        return change


class Summaries:
    """The ROUGE of each test example, as shares of 1, [examples]."""

    def __init__(self, columns: dict[str, np.ndarray]):
        self.columns = columns

    def scores(self) -> dict[str, float]:
        return {name: column.mean() for name, column in self.columns.items()}

    def values(self) -> dict[str, np.ndarray]:
        return self.columns


def counted(numbers: np.ndarray, classes: int) -> np.ndarray:
    """How often each class is named, [classes], as floats. Raises ValueError for a number that is neither -1,
    of no class, nor below `classes`."""
    counts = np.bincount(numbers + 1, minlength=classes + 1)
    if len(counts) > classes + 1:
        raise ValueError(f"a class has the number {numbers.max()}, of {classes}")
    return counts[1:].astype(float)


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, and 0 where there is nothing below."""
    above, below = np.broadcast_arrays(np.asarray(above, float), np.asarray(below, float))
    return np.divide(above, below, out=np.zeros(above.shape), where=below > 0)


def f1_of(hits: np.ndarray, total: np.ndarray) -> np.ndarray:
    """F1 of classes with so many hits, and references and answers in `total`."""
    return ratio(2 * np.asarray(hits), total)


def macro_f1(hits: np.ndarray, total: np.ndarray) -> np.ndarray:
    """The mean of F1 over the classes that occur, of counts [repetitions, classes]."""
    return f1_of(hits, total).sum(axis=1) / (total > 0).sum(axis=1)


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


def score(
    task: str,
    answers: Sequence[str],
    references: Sequence[str],
    labels: Sequence[str] = (),
    numbers: Sequence[int] | None = None,
    places: Sequence[int] | None = None,
    confidence: Sequence[float] | None = None,
) -> tuple[dict, list[dict]]:
    """Read generated answers and score them: what a record says of that, and for each test example a row of
    predictions.jsonl. `numbers` and `places` are the examples' rows in their source (data.Split); all in
    order where not given. `confidence` is the probability that the model gives each answer."""
    numbers = range(1, len(references) + 1) if numbers is None else numbers
    places = [number - 1 for number in numbers] if places is None else places
    parsed = [parse_label(answer, labels) if labels else parse_summary(answer) for answer in answers]
    if task == "classification":
        scores = [
            {"correct": answer == reference} for answer, reference in zip(parsed, references, strict=True)
        ]
        if confidence is not None:
            scores = [row | {"confidence": sure} for row, sure in zip(scores, confidence, strict=True)]
    else:
        scores = rouge_scores(parsed, references)
    rows = [
        {"index": place, "row": number, "prediction": answer, "parsed": read, "reference": right, **more}
        for place, number, answer, read, right, more in zip(
            places, numbers, answers, parsed, references, scores, strict=True
        )
    ]
    return summed_up(task, rows) | commonest_invalid(rows), rows


def summed_up(task: str, rows: Sequence[dict]) -> dict:
    """What a record says of the rows of predictions.jsonl: `per_example`, from which all else can be computed
    anew, `metrics` and `metrics_version`."""
    if task == "classification":
        classes = sorted({row[name] for row in rows for name in ("parsed", "reference")} - {None})
        number = {None: None} | {label: i for i, label in enumerate(classes)}
        per_example = {"classes": classes}
        per_example |= {
            name: [number[row[column]] for row in rows]
            for name, column in (("references", "reference"), ("answers", "parsed"))
        }
        if all("confidence" in row for row in rows):
            per_example["confidences"] = [round(row["confidence"], 6) for row in rows]
    else:
        per_example = {name: [round(row[name], 4) for row in rows] for name in ROUGE}
    version = f"{VERSION[task]}, rouge-score {importlib.metadata.version('rouge-score')}"
    return {"metrics": metrics_of(per_example), "metrics_version": version, "per_example": per_example}


def commonest_invalid(rows: Sequence[dict]) -> dict:
    """What a record says of the invalid answers, if there are any: the five that most are, shortened, with
    their counts."""
    invalid = Counter(row["prediction"].strip() for row in rows if row["parsed"] is None)
    common = [[answer[:80], count] for answer, count in invalid.most_common(5)]
    return {"commonest_invalid": common} if common else {}


def examples_of(per_example: dict) -> Answers | Summaries:
    """Of what a record says of each example."""
    if "answers" not in per_example:
        return Summaries({name: np.array(per_example[name], dtype=float) / 100 for name in ROUGE})
    try:
        named = whole_numbers(per_example["answers"])
    except TypeError:
        named = whole_numbers([-1 if answer is None else answer for answer in per_example["answers"]])
    return Answers(len(per_example["classes"]), whole_numbers(per_example["references"]), named)


def whole_numbers(column: Sequence[int]) -> np.ndarray:
    """As int64; NumPy takes a list half as fast. Raises TypeError for what is none."""
    return np.frombuffer(array("q", column), np.int64)


def metrics_of(per_example: dict) -> dict[str, dict]:
    """Each metric's `value` and `ci95` in percent, null where that can't be trusted; of macro F1 also how
    many `classes` it is over."""
    examples = examples_of(per_example)
    found, values = points_of(examples), examples.values()
    for name, metric in found.items():
        ends = interval_of(name, values[name][None])
        metric["ci95"] = None if ends is None else list(ends)
    if isinstance(examples, Answers) and not examples.trusted():
        found["macro_f1"]["ci95"] = None
    return found


def points_of(examples: Answers | Summaries) -> dict[str, dict]:
    """The same without the intervals, which take most of the time."""
    found = {name: {"value": float(100 * value)} for name, value in examples.scores().items()}
    if isinstance(examples, Answers):
        found["macro_f1"]["classes"] = examples.occurring()
    return found


def interval_of(
    name: str, values: np.ndarray, level: float = LEVEL, pooled: tuple | None = None
) -> tuple[float, float] | None:
    """Low and high end of a metric's values [seeds, examples], in percent. None where no interval holds."""
    ends = interval(values, name.endswith("_f1"), level, pooled)
    return None if ends is None else (100 * float(ends[0]), 100 * float(ends[1]))


def check(scored: dict, where: object) -> Answers | Summaries:
    """What came of each example, by `per_example` of a record's `eval`. Raises UserError unless that has each
    of them, and gives its metrics."""
    per_example, number = scored["per_example"], scored["examples"]
    try:
        lengths = {len(column) for name, column in per_example.items() if name != "classes"}
        named = all(isinstance(label, str) for label in per_example.get("classes", []))
        confidences = per_example.get("confidences") or [0]
        sure = min(confidences) >= 0 and max(confidences) <= 1
        examples = examples_of(per_example)
        found = points_of(examples) if named and sure and lengths == {number} else {}
        fits = all(
            abs(found[name]["value"] - metric["value"]) < 0.001
            and found[name].get("classes") == metric.get("classes")
            for name, metric in scored["metrics"].items()
        )
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, ZeroDivisionError):
        fits = False
    if not fits:
        raise UserError(f"{where}: its per_example does not give its metrics: --force redoes the run")
    return examples


def p_of_two(name: str, ours: dict, theirs: dict) -> float:
    """p of the difference of two runs in a metric, by swapping their answers to an example (intervals.py);
    both as `per_example` of the same examples."""
    if name == "macro_f1":
        classes = sorted({*ours["classes"], *theirs["classes"]})
        one, other = (examples_of(numbered(side, classes)) for side in (ours, theirs))
        return p_by_swapping(one.macro_f1_after(other), len(one.references))
    difference = examples_of(ours).values()[name] - examples_of(theirs).values()[name]
    return p_by_swapping(lambda swaps: (1 - 2 * swaps) @ difference, len(difference))


def numbered(per_example: dict, classes: Sequence[str]) -> dict:
    """The same with the numbers that `classes` gives."""
    number = {None: None} | {i: classes.index(label) for i, label in enumerate(per_example["classes"])}
    columns = {name: [number[of] for of in per_example[name]] for name in ("references", "answers")}
    return {"classes": list(classes), **columns}


def mcnemar(ours: dict, theirs: dict) -> tuple[int, int, float]:
    """How many examples only the first of two classifications has right, how many only the second, and the
    exact two-sided p of McNemar's test (1947)."""
    from scipy.special import bdtr

    one, other = (examples_of(side).right for side in (ours, theirs))
    won, lost = int((one & ~other).sum()), int((other & ~one).sum())
    return won, lost, min(2 * float(bdtr(min(won, lost), won + lost, 0.5)), 1.0)
