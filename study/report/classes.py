"""What a score hides: precision, recall and F1 of each class, and which class is taken for which. All of it
comes from the answer to each example, which a record keeps."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from study import metrics
from study.intervals import within
from study.report.cells import Cell, Table, shown
from study.report.collect import Run
from study.report.selection import labels_of, note_on, on_everything, tuned

MOST = 5  # rows of each model, where not all are asked for
INVALID = "(invalid)"
AS_SHOWN = {  # of hits / members; with J = hits / (references or answers) F1 is 2 J / (1 + J)
    "precision": lambda share: share,
    "recall": lambda share: share,
    "F1": lambda share: 2 * share / (1 + share),
}


@dataclass(frozen=True)
class Confusion:
    """The numbers of each example's class and of its answer's, -1 for an invalid one, [seeds, examples]."""

    classes: list[str]
    references: np.ndarray
    answers: np.ndarray
    runs: tuple[Run, ...] = ()

    @classmethod
    def of(cls, per_example: Sequence[dict], runs: Iterable[Run] = ()) -> "Confusion":
        """Of what records of one setting's seeds keep, which may name other classes each."""
        classes = sorted({label for of in per_example for label in of["classes"]})
        found = [metrics.examples_of(metrics.numbered(of, classes)) for of in per_example]
        columns = (np.stack([getattr(one, name) for one in found]) for name in ("references", "answers"))
        return cls(classes, *columns, tuple(runs))

    def counts(self) -> np.ndarray:
        """Over all seeds, [classes, classes + 1]: by reference and answer, of which the last is invalid."""
        size = len(self.classes), len(self.classes) + 1
        places = self.references * size[1] + np.where(self.answers < 0, size[0], self.answers)
        return np.bincount(places.ravel(), minlength=size[0] * size[1]).reshape(size)

    def counted(self, number: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Of a class what each of its scores is made of: the hits among which members, [seeds, examples]."""
        references, answers = self.references == number, self.answers == number
        members = {"precision": answers, "recall": references, "F1": references | answers}
        return {name: (references & answers, of) for name, of in members.items()}

    def cells(self, number: int) -> dict[str, Cell]:
        return {name: self.cell(name, *counted) for name, counted in self.counted(number).items()}

    def cell(self, name: str, hits: np.ndarray, members: np.ndarray) -> Cell:
        """Over all seeds, with its interval; as text both scores of two seeds."""
        if not members.any():
            return Cell("—", runs=self.runs)
        value = 100 * AS_SHOWN[name](hits.sum() / members.sum())
        each = 100 * AS_SHOWN[name](metrics.ratio(hits.sum(axis=1), members.sum(axis=1)))
        seeded, two = self.runs[0].seed is not None, len(hits) == 2
        ends = None if seeded and two else ends_within(hits, members, name)
        return Cell(
            shown(each if two else [value] * len(hits), ends, seeded), value, ends, self.runs, len(hits)
        )


def ends_within(hits: np.ndarray, members: np.ndarray, name: str) -> tuple[float, float] | None:
    """The interval of a class's score, in percent. That of F1 is the interval of J, as F1 (Lam, Gopal and
    Qian, 2023): among examples that are of the class or named as it, hits are a share like any other."""
    ends = within(hits, members)
    return ends and tuple(100 * AS_SHOWN[name](end) for end in ends)


def confusions_of(group: Sequence[Run]) -> dict[str, Confusion]:
    """Of each column of Table 1 the runs on the largest training share; those of older records, without the
    answer to each example, give none."""
    found = {}
    for label in labels_of(tuned(group)):
        runs = [run for run in on_everything(group, label) if run.task == "classification" and run.examples]
        if runs:
            found[label] = Confusion.of([run.scored["per_example"] for run in runs], runs)
    return found


def class_tables(group: Sequence[Run], most: int | None = MOST) -> list[Table]:
    """The classes of each model, the lowest F1 first, and its confusions, the most frequent first; `most` of
    both for each model, or all."""
    columns = ["model", "class", "test examples", *AS_SHOWN]
    classes = Table("Classes", "precision, recall and F1, the lowest F1 first", columns, 2)
    columns = ["model", "reference", "answer", "count", "share of the reference"]
    confusions = Table("Confusions", "which class is taken for which, the most frequent first", columns, 3)
    for label, found in confusions_of(group).items():
        counts, cells = found.counts(), [found.cells(number) for number in range(len(found.classes))]
        sizes = counts.sum(axis=1)
        order = sorted(range(len(cells)), key=lambda i: cells[i]["F1"].value)
        for i in order[:most]:
            classes.add(label, found.classes[i], f"{sizes[i] // len(found.runs):,}", *cells[i].values())
        np.fill_diagonal(counts, 0)
        pairs = sorted(zip(*counts.nonzero(), strict=True), key=lambda at: -counts[at])
        for i, j in pairs[:most]:
            share = float(100 * counts[i, j] / sizes[i])
            confusions.add(
                *(label, found.classes[i], [*found.classes, INVALID][j]),
                Cell(f"{counts[i, j]:,}", int(counts[i, j]), runs=found.runs),
                Cell(f"{share:.1f} %", share, runs=found.runs),
            )
        for table, rows, what in ((classes, order, "classes"), (confusions, pairs, "pairs of classes")):
            table.note += note_on({label: found.runs}) + more(label, rows, most, what)
            if len(found.runs) > 1:
                table.note += f"{label}: counts of {len(found.runs)} seeds, added up. "
    return [classes, confusions]


def more(label: str, rows: Sequence, most: int | None, what: str) -> str:
    return (
        f"{label}: {most} of {len(rows):,} {what}; --classes shows all. " if rows[most or len(rows) :] else ""
    )
