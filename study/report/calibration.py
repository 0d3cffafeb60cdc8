"""How far a confidence can be believed: calibration, accuracy when the least sure answers are handed to a
person, and how well confidence tells right answers from wrong ones. docs/statistics.md has the formulas."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from study.intervals import interval, parts_of, within
from study.report.cells import Cell, Table, shown
from study.report.collect import Run
from study.report.selection import by_method, note_on

COVERAGES = (1.0, 0.9, 0.75, 0.5)
BINS, LEAST = 10, 20  # bins of equal mass, each of so many examples or more
DRAWS, AT_ONCE = 1000, 50


@dataclass(frozen=True)
class Confidences:
    """How sure each answer was and whether it was right, both [seeds, examples]."""

    sure: np.ndarray
    right: np.ndarray
    runs: tuple[Run, ...] = ()

    @classmethod
    def of(cls, runs: Iterable[Run]) -> "Confidences":
        """Of one setting's seeds, whose records have confidences."""
        runs = tuple(runs)
        sure = np.array([run.scored["per_example"]["confidences"] for run in runs], float)
        return cls(sure, np.stack([run.examples.right for run in runs]), runs)

    @property
    def seeds(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return list(zip(self.sure, self.right, strict=True))

    def reliability(self) -> list[tuple[float, float, tuple[float, float] | None]]:
        """Of each bin, of all seeds' answers together: mean confidence, accuracy and its interval, in
        percent; of two seeds without interval, which would hold next to everything."""
        bins = bins_of(self.sure.ravel()).reshape(self.sure.shape)
        found = []
        for number in range(bins.max() + 1):
            members = bins == number
            hits, size = members & self.right, members.sum()
            ends = within(hits, members) if len(self.sure) != 2 else None
            shares = 100 * self.sure[members].sum() / max(size, 1), 100 * hits.sum() / max(size, 1)
            if size:
                found.append((*map(float, shares), ends and (100 * ends[0], 100 * ends[1])))
        return found

    def cell(self, each: Sequence[float], ends: tuple | None, sign: str = "") -> Cell:
        """A figure of each seed, as shares of 1, with the ends of its interval; of two seeds both figures."""
        seeded = bool(self.runs) and self.runs[0].seed is not None
        ends = (
            None if ends is None or (seeded and len(each) == 2) else tuple(100 * float(end) for end in ends)
        )
        each = [100 * float(value) for value in each]
        return Cell(shown(each, ends, seeded, sign), sum(each) / len(each), ends, self.runs, len(each))

    def overconfidence(self) -> Cell:
        """Mean confidence less accuracy, in points."""
        values = self.sure - self.right
        parts = parts_of(values)
        ends = (parts.mean - parts.reach(), parts.mean + parts.reach()) if parts.examples > 1 else None
        return self.cell(values.mean(axis=1), ends, "+")

    @cached_property
    def errors(self) -> tuple[list[float], tuple[float, float], float]:
        return calibration_error(self.seeds)

    def error(self) -> Cell:
        each, ends, _ = self.errors
        return self.cell(each, ends)

    def auroc(self) -> Cell:
        found = [auroc(sure, right) for sure, right in self.seeds]
        if None in found:
            return Cell("—", runs=self.runs)
        values = [pseudo for _, pseudo in found]
        ends = None if any(pseudo is None for pseudo in values) else interval(np.stack(values), pseudo=True)
        return self.cell([value for value, _ in found], ends)

    def kept(self, coverage: float) -> Cell:
        """Accuracy of the surest answers, so many of each seed's."""
        members = np.stack([surest(sure, coverage) for sure in self.sure])
        hits = members * self.right
        return self.cell(hits.sum(axis=1) / members.sum(axis=1), within(hits, members))

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Coverage, and the accuracy of the surest answers averaged over seeds, both in percent."""
        examples = self.sure.shape[1]
        shares = np.arange(min(LEAST, examples), examples + 1)[:: max(1, examples // 500)] / examples
        kept = [np.mean([surest(sure, share) @ right for sure, right in self.seeds]) for share in shares]
        return 100 * shares, 100 * np.array(kept) / (shares * examples)


def bins_of(sure: np.ndarray) -> np.ndarray:
    """The bin of each example, [examples]: of equal mass, and of equal confidences always the same one."""
    count = max(1, min(BINS, len(sure) // LEAST))
    edges = np.quantile(sure, np.arange(1, count) / count, method="inverted_cdf")
    return np.searchsorted(edges, sure)


def calibration_error(
    seeds: Sequence[tuple[np.ndarray, np.ndarray]], seed: int = 0
) -> tuple[list[float], tuple[float, float], float]:
    """The expected calibration error of each seed, as a share of 1, the interval of their mean, and what it
    would be by chance, were every confidence the probability of being right."""
    generator, number = np.random.default_rng(seed), len(seeds[0][0])
    # Of ones: float32 counts them without an error, up to 2^24 examples.
    bins = [np.eye(BINS, dtype=np.float32)[bins_of(sure)] for sure, _ in seeds]  # [examples, bins]
    expected = [sure @ of for (sure, _), of in zip(seeds, bins, strict=True)]  # hits, [bins]
    gaps = [(right - sure)[:, None] * of for (sure, right), of in zip(seeds, bins, strict=True)]

    def error(sums: np.ndarray) -> np.ndarray:
        """Of the sums of right - sure in each bin, [..., bins]."""
        return np.abs(sums).sum(axis=-1) / number

    each, drawn, chance = [float(error(gap.sum(axis=0))) for gap in gaps], [], []
    for _ in range(DRAWS // AT_ONCE):
        draws = [(generator.integers(0, number, number), generator.random(number)) for _ in range(AT_ONCE)]
        weights = np.stack([np.bincount(chosen, minlength=number) for chosen, _ in draws]).astype(float)
        below = np.stack([uniform for _, uniform in draws])  # of all seeds, which err on the same examples
        drawn += [*np.mean([error(weights @ gap) for gap in gaps], axis=0)]
        hits = ((below < sure).astype(np.float32) @ of for (sure, _), of in zip(seeds, bins, strict=True))
        chance += [*np.mean([error(of - sums) for of, sums in zip(hits, expected, strict=True)], axis=0)]
    mean = sum(each) / len(each)
    reach = math.hypot(max(float(np.quantile(drawn, 0.975)) - mean, 0), reach_of_seeds(each))
    low = mean - reach if mean > np.quantile(chance, 0.975) else 0.0
    return each, (max(low, 0.0), min(mean + reach, 1.0)), float(np.mean(chance))


def reach_of_seeds(each: Sequence[float]) -> float:
    """Half of Student's interval of the mean of so many seeds' figures; 0 of one."""
    from scipy.special import stdtrit

    if len(each) < 2:
        return 0.0
    return float(stdtrit(len(each) - 1, 0.975)) * float(np.std(each, ddof=1)) / math.sqrt(len(each))


def auroc(sure: np.ndarray, right: np.ndarray) -> tuple[float, np.ndarray | None] | None:
    """The probability that a right answer is surer than a wrong one, ties as half (Mann and Whitney, 1947),
    and its jackknife's pseudo-values [examples], None with less than two answers of either kind; None without
    both kinds."""
    sides = np.sort(sure[right]), np.sort(sure[~right])
    if not all(map(len, sides)):
        return None
    below, above = ((np.searchsorted(of, sure) + np.searchsorted(of, sure, "right")) / 2 for of in sides)
    wins = np.where(right, above, len(sides[0]) - below)  # of each example over, or of, the other kind
    total, (m, n), number = wins[right].sum(), map(len, sides), len(sure)
    value = total / (m * n)
    if min(m, n) < 2:
        return float(value), None
    without = (total - wins) / np.where(right, (m - 1) * n, m * (n - 1))
    return float(value), number * value - (number - 1) * without


def surest(sure: np.ndarray, coverage: float) -> np.ndarray:
    """How far each example is among the surest, [examples]: 1 or 0, and at the last confidence that gets in
    the same part for all that have it."""
    wanted = math.ceil(coverage * len(sure) - 1e-9)
    last = np.sort(sure)[len(sure) - wanted]
    above, level = sure > last, sure == last
    return above + level * (wanted - above.sum()) / level.sum()


def confidences_of(group: Sequence[Run]) -> dict[str, Confidences]:
    """Of each method, on all that it was trained on, the runs whose records have confidences."""
    found = {}
    for label, of in by_method(group).items():
        runs = [run for run in of if run.confident]
        if runs:
            found[label] = Confidences.of(runs)
    return found


def calibration_tables(group: Sequence[Run]) -> list[Table]:
    """Calibration and AUROC of each method, and its accuracy over coverage. Both are without rows where no
    record has confidences."""
    columns = ["model", "test examples", "confidence - accuracy", "ECE", "ECE by chance", "AUROC"]
    calibration = Table("Confidence", "can it be believed, and does it tell right from wrong", columns, 1)
    columns = ["model", *(f"{100 * coverage:g} %" for coverage in COVERAGES)]
    coverage = Table("Coverage", "accuracy of the surest answers, where a person gets the rest", columns, 1)
    for label, found in confidences_of(group).items():
        *_, chance = found.errors
        by_chance = Cell(f"{100 * chance:.2f}", 100 * chance, runs=found.runs)
        cells = found.overconfidence(), found.error(), by_chance, found.auroc()
        calibration.add(label, f"{found.sure.shape[1]:,}", *cells)
        coverage.add(label, *(found.kept(share) for share in COVERAGES))
        for table in (calibration, coverage):
            table.note += note_on({label: found.runs})
    if calibration.rows:
        calibration.note += (
            "In percent. ECE: expected calibration error, over bins of equal mass; by chance: what it would "
            "be if each confidence were the share of right answers. AUROC: of right against wrong answers. "
        )
    calibration.note += lacking(group)
    return [calibration, coverage]


def lacking(group: Sequence[Run]) -> str:
    """A sentence on the evaluations whose confidences older records do not have."""
    of = [run for run in group if run.scored and run.should_be_confident and not run.confident]
    count = f"{len(of)} older record{'s' * (len(of) > 1)} without confidences left out"
    return f"{count}: --rescore takes an encoder's from its predictions, --force scores again. " if of else ""
