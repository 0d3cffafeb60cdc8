"""The LoRA grid: which cell is best, which can't be told from it, and what each step of a knob changes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from operator import itemgetter
from statistics import mean

import numpy as np

from study import intervals
from study.records.schema import LORA, SCORES
from study.report.cells import Cell, Table, ends_of, percent, score_cell
from study.report.collect import Run
from study.report.compare import Difference, difference, of_pairs
from study.report.selection import by, by_column, tuned


def grid(ours: Sequence[Run], metric: str) -> dict[tuple, Cell]:
    """The cells of a LoRA grid by (rank, epochs, dropout, learning rate), with those that were never run."""
    ranks, epochs, dropouts, rates = (
        sorted(set(column)) for column in zip(*(run.setting for run in ours), strict=True)
    )
    settings = [
        (rank, epoch, dropout, rate)
        for rate in rates
        for dropout in dropouts
        for rank in ranks
        for epoch in epochs
    ]
    of = by(lambda run: run.setting, ours)
    return {at: score_cell(of.get(at, ()), metric) for at in settings}


def best_runs(task: str, group: Sequence[Run]) -> list[Run]:
    """The runs of the best cell of all LoRA cells of a group, by their own scores."""
    metric, lora = next(iter(SCORES[task])), [run for run in tuned(group) if run.method.knobs == LORA]
    cells = by(lambda run: (run.label, run.share, run.setting), lora)
    best = Best({at: score_cell(of, metric) for at, of in cells.items()}, metric)
    return [run for run in cells[best.at] if run.scored] if best.at else []


def grids(task: str, group: Sequence[Run]) -> dict[str, dict[tuple, Cell]]:
    """Every LoRA grid, at the training share with the most settings, where there are several."""
    metric, found = next(iter(SCORES[task])), {}
    lora = [run for run in tuned(group) if run.method.knobs == LORA]
    for label, ours in by_column(lora).items():
        shares = by(lambda run: run.share, ours)
        settings = {share: {run.setting for run in of} for share, of in shares.items()}
        share = max(settings, key=lambda share: (len(settings[share]), share))
        if len(settings[share]) > 1:
            found[f"{label}, {percent(share)} of the examples"] = grid(shares[share], metric)
    return found


def lora_tables(task: str, group: Sequence[Run]) -> list[Table]:
    """The LoRA ablation and the effect of each knob."""
    (metric, title), tables = next(iter(SCORES[task].items())), []
    for label, cells in grids(task, group).items():
        epochs, rates = (sorted({at[place] for at in cells}) for place in (1, 3))
        columns = ["learning rate"] * (len(rates) > 1) + ["dropout", "rank"]
        knobs = "rank, epochs, dropout and learning rate" if len(rates) > 1 else "rank, epochs and dropout"
        columns += [f"{count} epochs" for count in epochs]
        table = Table("LoRA ablation", f"{title} by {knobs}, {label}", columns, len(columns) - len(epochs))
        best = Best(cells, metric)
        for rate, dropout, rank in sorted({(at[3], at[2], at[0]) for at in cells}):
            place = [f"{rate:g}"] * (len(rates) > 1) + [f"{dropout:g}", rank]
            table.add(*place, *(best.marked((rank, count, dropout, rate)) for count in epochs))
        table.note = best.note()
        tables += [table, effects_table(title, metric, label, cells)]
    return tables


class Best:
    """The best of some cells, by validation where every cell has been scored there, on the same examples,
    else by its score; and the cells that can't be told from it: multiple comparisons with the best (Hsu,
    1996), by Bonferroni.

    What a seed changes in a cell is pooled over the cells that have the same seeds. Since some may vary more
    than others, a cell is told from the best only if the two by themselves also are, at 5 %.
    """

    def __init__(self, cells: dict, metric: str):
        self.cells = {at: cell for at, cell in cells.items() if cell.value is not None}
        self.all, self.metric = cells, metric
        chosen_by = [run.chosen_by for cell in self.cells.values() for run in cell.runs if run.scored]
        self.validated = all(chosen_by) and len({run.test()["sha256"] for run in chosen_by}) == 1
        self.at = max(self.cells, key=self.rank, default=None)
        self.level = 0.05 / max(len(self.cells) - 1, 1)
        self.pool = self.pool_seeds()
        found = {at: self.against_best(at) for at in self.cells if at != self.at}
        self.tested = all(found.values())
        self.ties = {at for at, difference in found.items() if self.tested and not self.is_worse(difference)}
        self.pairs = min((len(difference.pairs) for difference in found.values() if difference), default=0)

    def rank(self, at) -> float:
        if not self.validated:
            return self.cells[at].value
        scored = [run for run in self.cells[at].runs if run.scored]
        return mean(run.chosen_by.scored["metrics"][self.metric]["value"] for run in scored)

    def against_best(self, at) -> Difference | None:
        return difference(self.cells[at].runs, self.cells[self.at].runs, self.metric)

    def is_worse(self, found: Difference) -> bool:
        of = self.pool and self.pool.of_difference
        return found.worse(of) < self.level and found.worse() < 0.05

    def pool_seeds(self) -> intervals.Pool | None:
        """Over the cells that have the most usual seeds; None where that is one cell or one seed."""
        rows = [sorted((run.seed, run) for run in cell.runs if run.examples) for cell in self.cells.values()]
        if not rows:
            return None
        usual, _ = max(Counter(tuple(seed for seed, _ in row) for row in rows).items(), key=itemgetter(1))
        same = [row for row in rows if tuple(seed for seed, _ in row) == usual]
        if len(same) < 2 or len(usual) < 2:
            return None
        return intervals.pool(np.array([[run.values[self.metric].mean() for _, run in row] for row in same]))

    def marked(self, at) -> Cell:
        cell = self.all[at]
        if at == self.at and len(self.cells) > 1:
            return replace(cell, text=f"**{cell.text}** best")
        return replace(cell, text=f"**{cell.text}**") if at in self.ties else cell

    def note(self) -> str:
        if len(self.cells) < 2:
            return ""
        how = "by their validation scores."
        if not self.validated:
            ends = self.ends()
            how = "by these very scores, so its own is too high."
            if all(run.config["split"] == "validation" for run in self.cells[self.at].runs):
                how = how[:-1] + "; what counts is its score on the test split."
            how += " Its interval at such a choice is {:.1f} to {:.1f}.".format(*ends) if ends else ""
        ties = "Older records can't tell which of the others may be as good."
        if self.tested:
            ties = (
                f"Bold: it and {len(self.ties)} that are not shown to be worse (paired, 5 % for all of them"
            )
            ties += ", of these adapters only)." if self.pairs < 2 else ")."
        return f"Best: chosen among {len(self.cells)} {how} {ties} "

    def ends(self) -> tuple[float, float] | None:
        """Of the interval of the best at the level of its choice, where that can be said: of one seed, or
        with seeds pooled."""
        scored = [run for run in self.cells[self.at].runs if run.scored]
        if len(scored) > 1 and not self.pool:
            return None
        of = self.pool.of_score if len(scored) > 1 else None
        return ends_of(scored, self.metric, 1 - 0.05 / len(self.cells), of)


def effects_table(title: str, metric: str, label: str, cells: dict[tuple, Cell]) -> Table:
    """What each step of a knob changes: differences paired by seed and test example, over the settings of the
    other knobs that were run at both levels, with the same seeds."""
    columns = ["knob", "from", "to", f"difference in {title}", "settings", "pairs"]
    table = Table("LoRA effects", f"{title} by steps of one knob, {label}", columns, 3)
    for place, knob in enumerate(LORA.values()):
        for low, high in pairwise(sorted({at[place] for at in cells})):
            pairs = {}  # by setting of the others and seed
            for at in (at for at in cells if at[place] == high):
                higher, lower = by_seed(cells[at]), by_seed(cells[*at[:place], low, *at[place + 1 :]])
                pairs[at] = {seed: (higher[seed], lower[seed]) for seed in higher if seed in lower}
            table.add(knob, f"{low:g}", f"{high:g}", *effect(even(pairs), metric))
    table.note = "Paired by seed and test example, over the settings that were run at both levels. "
    return table


def by_seed(cell: Cell) -> dict[int, Run]:
    return {run.seed: run for run in cell.runs if run.examples}


def even(pairs: dict) -> dict:
    """Of pairs by setting and seed those that leave every setting with the same seeds, as many as may be."""
    kept, choices = {}, [frozenset(by_seed) for by_seed in pairs.values()]
    for seeds in sorted({*choices, choices[0].intersection(*choices)} if choices else (), key=sorted):
        having = {at: by_seed for at, by_seed in pairs.items() if seeds <= {*by_seed}}
        whole = {at: {seed: by_seed[seed] for seed in sorted(seeds)} for at, by_seed in having.items()}
        if sum(map(len, whole.values())) > sum(map(len, kept.values())):
            kept = whole
    return kept


def effect(pairs: dict, metric: str) -> list:
    """The difference, how many settings it is over, and how many pairs of runs."""
    if not pairs:
        return [Cell("—"), 0, 0]
    rows = list(zip(*(of.values() for of in pairs.values()), strict=True))  # [seeds][settings] of pairs
    each = [of_pairs(list(row), metric).value for row in rows]
    ours, theirs = (
        np.stack([np.mean([pair[side].values[metric] for pair in row], axis=0) for row in rows])
        for side in (0, 1)
    )
    whole = Difference(each, intervals.of_difference(ours, theirs), [pair for row in rows for pair in row])
    return [whole.cell(), len(pairs), len(whole.pairs)]
