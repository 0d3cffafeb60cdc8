"""The LoRA grid: which cell is best, which can't be told from it, and what each step of a knob changes."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import mean

import numpy as np

from study import intervals
from study.records.schema import LORA, SCORES
from study.report.cells import Cell, Table, ends_of, percent, score_cell, shown
from study.report.collect import Run
from study.report.compare import difference
from study.report.selection import labels_of, tuned


def grid(group: Iterable[Run], metric: str, share: float) -> dict[tuple, Cell]:
    """The cells of a LoRA grid by (rank, epochs, dropout), with those that were never run."""
    ours = [run for run in group if run.share == share]
    ranks, epochs, dropouts = (
        sorted(set(column)) for column in zip(*(run.setting for run in ours), strict=True)
    )
    settings = [(rank, epoch, dropout) for dropout in dropouts for rank in ranks for epoch in epochs]
    return {at: score_cell([run for run in ours if run.setting == at], metric) for at in settings}


def grids(task: str, group: Sequence[Run]) -> dict[str, dict[tuple, Cell]]:
    """Every LoRA grid, at the training share with the most settings, where there are several."""
    metric, found = next(iter(SCORES[task])), {}
    lora = [run for run in tuned(group) if run.method.knobs == LORA]
    for label in labels_of(lora):
        ours = tuned(lora, label)
        settings = {run.share: {r.setting for r in ours if r.share == run.share} for run in ours}
        share = max(settings, key=lambda share: (len(settings[share]), share))
        if len(settings[share]) > 1:
            found[f"{label}, {percent(share)} of the examples"] = grid(ours, metric, share)
    return found


def lora_tables(task: str, group: Sequence[Run]) -> list[Table]:
    """The LoRA ablation and the effect of each knob."""
    (metric, title), tables = next(iter(SCORES[task].items())), []
    for label, cells in grids(task, group).items():
        epochs = sorted({at[1] for at in cells})
        columns = ["dropout", "rank", *(f"{count} epochs" for count in epochs)]
        table = Table("LoRA ablation", f"{title} by rank, epochs and dropout, {label}", columns, 2)
        best = Best(cells, metric)
        for dropout, rank in sorted({(at[2], at[0]) for at in cells}):
            table.add(f"{dropout:g}", rank, *(best.marked((rank, count, dropout)) for count in epochs))
        table.note = best.note()
        tables += [table, effects_table(title, metric, label, cells)]
    return tables


class Best:
    """The best of some cells, by validation where every cell has been scored there, else by its score; and
    the cells that can't be told from it: multiple comparisons with the best (Hsu, 1996), by Bonferroni. Where
    all cells have the same seeds, what a seed changes in a cell is pooled over the cells."""

    def __init__(self, cells: dict, metric: str):
        self.cells = {at: cell for at, cell in cells.items() if cell.value is not None}
        self.all, self.metric = cells, metric
        self.validated = all(run.chosen_by for cell in self.cells.values() for run in cell.runs if run.scored)
        self.at = max(self.cells, key=self.rank, default=None)
        self.pool = self.pool_seeds()
        self.level = 0.05 / max(len(self.cells) - 1, 1)
        self.ties = {at for at in self.cells if at != self.at and not self.is_worse(at)}

    def rank(self, at) -> float:
        if not self.validated:
            return self.cells[at].value
        scored = [run for run in self.cells[at].runs if run.scored]
        return mean(run.chosen_by[self.metric]["value"] for run in scored)

    def is_worse(self, at) -> bool:
        found = difference(self.cells[at].runs, self.cells[self.at].runs, self.metric)
        return bool(found) and found.worse(self.pool and self.pool.of_difference) < self.level

    def pool_seeds(self) -> intervals.Pool | None:
        """None where the cells have other seeds, or one."""
        rows = [sorted((run.seed, run) for run in cell.runs if run.values) for cell in self.cells.values()]
        seeds = [[seed for seed, _ in row] for row in rows]
        if len(rows) < 2 or len(seeds[0]) < 2 or any(other != seeds[0] for other in seeds):
            return None
        return intervals.pool(np.array([[run.values[self.metric].mean() for _, run in row] for row in rows]))

    def marked(self, at) -> Cell:
        cell = self.all[at]
        if at == self.at and len(self.cells) > 1:
            return replace(cell, text=f"**{cell.text}** best")
        return replace(cell, text=f"**{cell.text}**") if at in self.ties else cell

    def note(self) -> str:
        if len(self.cells) < 2:
            return ""
        count = len(self.cells)
        ties = "Every other one can be told from it (paired tests, 5 % for all of them)."
        if self.ties:
            ties = f"Bold: it and {len(self.ties)} that can't be told from it (paired, 5 % for all of them)."
        if self.validated:
            return f"Best: chosen among {count} by their validation scores. {ties} "
        ends = self.ends()
        held = " Its interval at such a choice is {:.1f} to {:.1f}.".format(*ends) if ends else ""
        return f"Best: chosen among {count} by these very scores, so its own is too high.{held} {ties} "

    def ends(self) -> tuple[float, float] | None:
        """Of the interval of the best at the level of its choice, where that can be said: of one seed, or
        with seeds pooled."""
        scored = [run for run in self.cells[self.at].runs if run.scored]
        if len(scored) > 1 and not self.pool:
            return None
        of = self.pool and self.pool.of_score
        return ends_of(scored, self.metric, 1 - 0.05 / len(self.cells), of)


def effects_table(title: str, metric: str, label: str, cells: dict[tuple, Cell]) -> Table:
    """What each step of a knob changes: differences paired by seed and test example, over the settings of the
    other two knobs that were run at both levels."""
    columns = ["knob", "from", "to", f"difference in {title}", "settings", "pairs"]
    table = Table("LoRA effects", f"{title} by steps of one knob, {label}", columns, 3)
    for place, knob in enumerate(LORA.values()):
        for low, high in pairwise(sorted({at[place] for at in cells})):
            pairs = {}
            for at, cell in cells.items():
                if at[place] == high:
                    lower = cells[*at[:place], low, *at[place + 1 :]]
                    seeds = {run.seed: run for run in lower.runs if run.values}
                    for run in cell.runs:
                        if run.values and run.seed in seeds:
                            pairs.setdefault(run.seed, []).append((at, run, seeds[run.seed]))
            table.add(knob, f"{low:g}", f"{high:g}", *effect(pairs, metric))
    table.note = "Paired by seed and test example, over the settings that were run at both levels. "
    return table


def effect(pairs: dict[int, list[tuple]], metric: str) -> list:
    """The difference, how many settings it is over, and how many pairs of runs."""
    if not pairs:
        return [Cell("—"), 0, 0]
    rows = [
        np.mean([run.values[metric] - lower.values[metric] for _, run, lower in pairs[seed]], axis=0)
        for seed in sorted(pairs)
    ]
    parts = intervals.parts_of(np.stack(rows))
    each, reach = [100 * float(row.mean()) for row in rows], 100 * parts.reach()
    ends = 100 * parts.mean - reach, 100 * parts.mean + reach
    runs = tuple(run for of in pairs.values() for _, *two in of for run in two)
    settings = {at for of in pairs.values() for at, _, _ in of}
    cell = Cell(shown(each, ends, True, "+"), mean(each), ends, runs)
    return [cell, len(settings), sum(map(len, pairs.values()))]
