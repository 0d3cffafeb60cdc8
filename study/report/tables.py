"""Runs -> the tables of the study."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from statistics import mean

import numpy as np

from study import intervals
from study.records import cost
from study.records.schema import FEW, METHODS, SCORES, lookup
from study.report.calibration import calibration_tables
from study.report.cells import Cell, Table, duration, percent, score_cell
from study.report.choice import lora_tables
from study.report.classes import MOST, class_tables
from study.report.collect import Run, meant
from study.report.compare import difference
from study.report.forecast import forecast_table
from study.report.selection import (
    by,
    by_column,
    by_method,
    in_order,
    note_on,
    on_everything,
    settings_of,
    trained_on,
    tuned,
    usual_runs,
)
from study.report.serving import serving_tables
from study.report.spent import inference_table, total_usd, training_table, wall_seconds
from study.report.sweeps import Sweep


@dataclass(frozen=True)
class Reference:
    """What differences are to: the setting that is `named` or, where a table has none, the cheapest."""

    named: str | None = None
    prices: Sequence[dict] = ()

    def among(self, settings: dict[str, Sequence[Run]]) -> str | None:
        """None where no setting has a score."""
        scored = {name: [run for run in of if run.scored] for name, of in settings.items()}
        scored = {name: of for name, of in scored.items() if of}
        found = [name for name in scored if self.named in {name, *name.split(", ")}]
        spent, _ = self.spent(scored)
        return found[0] if found else min(scored, key=spent.get, default=None)

    def spent(self, settings: dict[str, Sequence[Run]]) -> tuple[dict[str, float], Callable[[float], str]]:
        """What training and scoring took on average, and how to show it: dollars where all have a price, else
        seconds."""
        scored = {name: [run for run in of if run.scored] for name, of in settings.items()}
        usd = {name: [total_usd(run, self.prices) for run in of] for name, of in scored.items()}
        if not any(None in each for each in usd.values()):
            return {name: mean(each) for name, each in usd.items()}, cost.usd_text
        return {name: mean(map(wall_seconds, of)) for name, of in scored.items()}, duration


def share_table(task: str, group: Sequence[Run], reference: Reference) -> Table:
    """Table 1: training share x what was trained, with differences to a column, or of one column to a row."""
    metric, title = next(iter(SCORES[task].items()))
    kept = {label: usual_runs(of) for label, of in by_column(group).items()}
    labels, shares = [*kept], {label: by(lambda run: run.share, of) for label, of in kept.items()}
    table = Table("Table 1", f"{title} by training share", ["training share", "examples", *labels], 2)
    rows = {}
    for share in sorted({run.share for run in tuned(group)}):
        row = {label: shares[label].get(share, []) for label in labels}
        rows[percent(share)] = row
        examples = trained_on((run for of in row.values() for run in of), share=True)
        table.add(percent(share), examples, *(score_cell(of, metric) for of in row.values()))
    if len(labels) > 1:
        base = reference.among(kept)
        for label in [label for label in labels if base not in {None, label}]:
            cells = [difference_cell(row[label], row[base], metric) for row in rows.values()]
            table.extend(f"{label} - {base}", cells)
    for label in labels if len(labels) == 1 else ():
        column = {share: row[label] for share, row in rows.items()}
        smallest = next((share for share, of in column.items() if any(run.scored for run in of)), None)
        base = reference.named if reference.named in column else smallest
        if base:
            cells = [difference_cell(of, column[base], metric) for of in column.values()]
            table.extend(f"{label} - {base}", cells)
    table.note = f"{cheapest_of_the_best(task, group, reference)}{note_on(kept)}{about_seeds(group)}"
    return table


def cheapest_of_the_best(task: str, group: Sequence[Run], reference: Reference) -> str:
    """A sentence: which of all methods is the best, and which that is not shown to be worse the cheapest."""
    metric = next(iter(SCORES[task]))
    settings = by_method(group)
    cells = {name: score_cell(of, metric) for name, of in settings.items()}
    cells = {name: cell for name, cell in cells.items() if cell.value is not None}
    if len(cells) < 2:
        return ""
    best = max(cells, key=lambda name: cells[name].value)
    found = {name: difference(settings[name], settings[best], metric) for name in cells if name != best}
    if not all(found.values()):
        return ""
    ties = [best, *(name for name, than in found.items() if than.worse() >= 0.05)]
    spent, how = reference.spent({name: settings[name] for name in ties})
    cheapest = min(ties, key=lambda name: spent[name])
    told = f"Of all methods, on all that they were trained on, {best} scores best: {cells[best].text}."
    if cheapest == best:
        return f"{told} Nothing cheaper is as good. "
    prices = f"{how(spent[cheapest])} instead of {how(spent[best])} to train and to score"
    return f"{told} {cheapest}, {cells[cheapest].text}, is not shown to be worse and costs {prices}. "


def method_table(task: str, group: Sequence[Run], reference: Reference) -> Table:
    """Table 2: the methods, for each model: the published ones for a language model, whether run or not, and
    others that were run."""
    run = {run.content["method"] for run in group}
    shown = [method.title for name, method in METHODS.items() if method.published or name in run]
    *titles, last = dict.fromkeys(shown)
    title = f"{', '.join(titles)} and {last}"
    table = Table("Table 2", title, ["model", "method", "trained on"], 2)
    rows = {}
    for _, ours in sorted(by(lambda run: run.content["model"], group).items(), key=itemgetter(0)):
        prompted = any(run.method.published for run in ours)
        for method in METHODS.values():
            models = by(lambda run: run.model, [run for run in ours if run.method is method])
            if not models and prompted and method.published:
                models = {ours[-1].name: []}
            for model in in_order(models):
                of = models[model]
                if method.trains and of:
                    of = on_everything(of)
                    table.note += note_on({of[0].label: of})
                rows[model, of[0].way if of else method.title, trained_on(of)] = of
    add_scores(table, rows, task, reference)
    table.note += about_seeds(group)
    return table


def model_table(task: str, group: Sequence[Run], reference: Reference) -> Table:
    """Table 3: what was trained, on the most that each was trained on."""
    table = Table("Table 3", "models, each on all that it was fine-tuned on", ["model", "trained on"], 1)
    rows = {}
    for label, column in by_column(group).items():
        of = on_everything(column)
        table.note += note_on({label: of})
        rows[label, trained_on(of)] = of
    add_scores(table, rows, task, reference)
    table.note += about_seeds(group)
    return table


def add_scores(table: Table, rows: dict[tuple, Sequence[Run]], task: str, reference: Reference) -> None:
    """Fill a table with its rows' scores, and with the first metric's differences to the row of reference."""
    metric, title = next(iter(SCORES[task].items()))
    table.columns += SCORES[task].values()
    for row, of in rows.items():
        table.add(*row, *(score_cell(of, name) for name in SCORES[task]))
    telling = [i for i in range(table.keys) if i == table.keys - 1 or len({row[i] for row in rows}) > 1]
    by_name = {", ".join(row[i] for i in telling): of for row, of in rows.items()}
    base = reference.among(by_name)
    if base:
        cells = [difference_cell(of, by_name[base], metric) for of in by_name.values()]
        table.extend(f"{title} - {base}", cells)


def difference_cell(of: Sequence[Run], base: Sequence[Run], metric: str) -> Cell:
    if of is base or of == base:
        return Cell("reference" if of else "—", runs=tuple(of))
    found = difference(of, base, metric)
    return found.cell() if found else Cell("—")


def about_seeds(group: Sequence[Run]) -> str:
    """What another seed changes, and how many texts of the training split stand in test."""
    told = ""
    if any(run.method.trains for run in group):
        told += "A seed draws the training examples, their order and dropout; at 100 % the last two only. "
    if any(run.seed is not None and not run.method.trains for run in group):
        told += "Untrained, it draws the examples that a prompt shows. "
    for run in group:
        overlap = lookup(run.train or {}, "data.train.also_in_test")
        if overlap:
            return f"{told}{overlap:,} texts of the training split occur in the test split, too. "
    return told


def remarks(group: Sequence[Run], table: Table) -> str:
    """What is to be known of the scores in a table: how many seeds and classes they are over, and why an F1
    may exceed accuracy."""
    cells = [cell for row in table.rows for cell in row if cell.seeds and cell.runs]
    scored = [[run for run in cell.runs if run.scored] for cell in cells]
    told = "Score [95 % interval] (seeds)." if cells else ""
    if any("(1)" in cell.text for cell in cells):
        told += " (1): one seed, whose interval is of test sampling only."
    if any("(2)" in cell.text for cell in cells):
        told += " (2): the scores of both seeds, too few for an interval."
    if any(run.scored and not run.examples for run in group):
        told += " Older records have no intervals: --rescore makes them anew."
    if "macro F1" in table.columns:
        names = "macro_f1", "accuracy", "invalid_answers"
        found = [[run.scored["metrics"][name] for name in names] for of in scored for run in of]
        classes = sorted({macro["classes"] for macro, *_ in found if "classes" in macro})
        told += f" Macro F1 is over {' or '.join(map(str, classes))} classes." if classes else ""
        if any(macro["value"] > right["value"] and invalid["value"] for macro, right, invalid in found):
            told += " It exceeds accuracy by invalid answers: a miss of one class, no false alarm of another."
    if any(run.scored["examples"] < FEW for of in scored for run in of):
        told += f" Fewer than {FEW} test examples: the intervals are rough."
    return told


def spread_table(task: str, group: Sequence[Run], reference: Reference) -> Table:
    """Where the uncertainty of the scores in Tables 1 to 3 comes from, and what would lessen it."""
    metric, title = next(iter(SCORES[task].items()))
    columns = [
        "setting",
        "score",
        "seeds",
        "test examples",
        "sd between seeds",
        "± of seeds",
        "± of test sampling",
    ]
    columns += ["± in all", "± with one seed more", "smallest difference to show"]
    table = Table("Spread", f"where the interval of {title} comes from", columns, 1)
    settings = {}
    for run in sorted(group, key=lambda run: (run.label, run.way, run.share or 0, run.setting)):
        if run.examples:
            place = [run.label or run.model, run.way]
            place += [percent(run.share), settings_of([run])] if run.method.trains else []
            settings.setdefault(", ".join(dict.fromkeys(word for word in place if word)), []).append(run)
    base = reference.among(settings)
    for name, of in settings.items():
        parts = intervals.parts_of(np.stack([run.values[metric] for run in of]))
        found = None if name == base or base is None else difference(of, settings[base], metric)
        seeds = 1.96 * parts.between_seeds() / len(of) ** 0.5
        known = len(of) > 1
        figures = [parts.between_seeds(), seeds] if known else [None, None]
        figures += [(max(parts.variance() - seeds**2 / 1.96**2, 0)) ** 0.5 * 1.96]
        figures += [parts.reach() or None, parts.expected(len(of) + 1).reach() if known else None]
        figures += [found and found.parts.detectable()]
        texts = ["—" if figure is None else f"{100 * figure:.2f}" for figure in figures]
        table.add(name, score_cell(of, metric), len(of), f"{of[0].scored['examples']:,}", *texts)
    table.note = (
        "In points. ± is 1.96 standard errors, and in all half of the interval, by Student's t of few seeds. "
        "The smallest difference is what would be told from 0 in about 80 of 100 repetitions, paired"
        f"{f', to {base}' if base else ''}; of few seeds it is rough. "
    )
    return table


def all_tables(
    groups: Sequence[tuple],
    prices: Sequence[dict],
    named: str | None = None,
    spread: bool = False,
    spent: str = "",
    most: int | None = MOST,
    sweeps: Sequence[Sweep] = (),
) -> list[Table]:
    """Every table of the study and of its load tests, with differences to what is `named`, or to the
    cheapest, and `most` classes of each model, or all. A group that stands apart says so in its tables'
    titles. What was `spent` in all stands under Tables 4 and 5, or where nothing was trained under the last
    one."""
    tables, reference = [], Reference(named, prices)
    for task, why, group in meant(groups):
        by_share = task == "classification" and tuned(group)
        ours = [share_table(task, group, reference)] if by_share else []
        ours.append(method_table(task, group, reference))
        ours += [model_table(task, group, reference)] if task == "summarization" else []
        ours += [table for table in class_tables(group, most) if table.rows]
        more = [*calibration_tables(group), forecast_table(task, group)]
        ours += [table for table in more if table.rows]
        ours[0].note += "".join(table.note for table in more if not table.rows)
        ours += lora_tables(task, group)
        ours += [spread_table(task, group, reference)] if spread else []
        counts = {f"{run.scored['examples']:,} {run.config['split']}" for run in group if run.scored}
        for table in ours:
            table.title = f"{task}: {table.title}" + (f", apart: {why}" if why else "")
            over = f"Over {' or '.join(sorted(counts)) or 'no test'} examples."
            table.note = f"{over} {table.note}{remarks(group, table)}"
        tables += ours
    training = training_table(groups, prices)
    more = [training, inference_table(groups, prices), *serving_tables(sweeps, prices)]
    shown = [table for table in [*tables, *more] if table.rows]
    for table in [training] if training.rows else shown[-1:]:
        table.note = f"{table.note} {spent}".strip()
    return shown
