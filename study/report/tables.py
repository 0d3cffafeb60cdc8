"""Runs -> the tables of the study."""

from collections.abc import Iterable, Sequence
from statistics import mean

from study.cli import DEFAULTS
from study.records import cost
from study.records.schema import LORA, METHODS, SCORES
from study.report.cells import Cell, Table, duration, mean_cell, percent, score_cell
from study.report.collect import Run

SHARES = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


def models_of(group: Iterable[Run]) -> list[str]:
    return sorted({run.model for run in group})


def labels_of(group: Iterable[Run]) -> list[str]:
    return sorted({run.label for run in group})


def tuned(group: Iterable[Run], label: str | None = None) -> list[Run]:
    """The runs of methods that train: of all, or of the column `label`."""
    return [run for run in group if run.method.trains and label in {None, run.label}]


def reference(group: Iterable[Run], label: str) -> list[Run]:
    """A column's runs of one setting of its method's knobs: those that were run with the most training
    shares, or else seeds; or else the task's defaults, or else the most epochs and the highest rank."""
    ours = tuned(group, label)

    def rank(setting: tuple) -> tuple:
        same = [run for run in ours if run.setting == setting]
        usual = {name: DEFAULTS[same[0].task].get(name, 0.1) for name in LORA}
        knobs = dict(zip(same[0].method.knobs, setting, strict=True))
        size = knobs.get("epochs", 0), knobs.get("lora_r", 0), -knobs.get("dropout", 0), str(setting)
        return len({run.share for run in same}), len(same), knobs == usual, *size

    best = max({run.setting for run in ours}, key=rank, default=None)
    return [run for run in ours if run.setting == best]


def on_everything(group: Iterable[Run], label: str) -> list[Run]:
    """Of the `reference` runs those with the largest training share."""
    ours = reference(group, label)
    return [run for run in ours if run.share == max(run.share for run in ours)]


def settings_of(of: Sequence[Run]) -> str:
    """E.g. "rank 8, epochs 5, dropout 0.1"; "" for a method without knobs."""
    knobs = zip(of[0].method.knobs.values(), of[0].setting, strict=True)
    return ", ".join(f"{title} {value:g}" for title, value in knobs)


def note_on(settings: dict[str, Sequence[Run]]) -> str:
    """Which settings the runs of each column have."""
    told = {label: settings_of(of) for label, of in settings.items()}
    return "".join(f"{label}: {knobs}. " for label, knobs in told.items() if knobs)


def trained_on(of: Iterable[Run]) -> str:
    """How many training examples, e.g. "480"."""
    return " or ".join(sorted({f"{run.train['train']['examples']:,}" for run in of if run.train})) or "—"


def share_table(task: str, group: Sequence[Run]) -> Table:
    """Table 1: training share x what was trained."""
    metric, title = next(iter(SCORES[task].items()))
    labels = labels_of(tuned(group))
    table = Table("Table 1", f"{title} by training share", ["training share", "examples", *labels], 2)
    kept = {label: reference(group, label) for label in labels}
    for share in sorted({*SHARES, *(run.share for run in tuned(group))}):
        of = {label: [run for run in kept[label] if run.share == share] for label in labels}
        examples = trained_on(run for runs in of.values() for run in runs)
        table.add(percent(share), examples, *(score_cell(of[label], metric) for label in labels))
    table.note = note_on(kept)
    return table


def method_table(task: str, group: Sequence[Run]) -> Table:
    """Table 2: the methods, for each model: the published ones for a language model, whether run or not, and
    others that were run."""
    run = {run.content["method"] for run in group}
    shown = [method for name, method in METHODS.items() if method.published or name in run]
    title = " and ".join([", ".join(method.title for method in shown[:-1]), shown[-1].title])
    table = Table("Table 2", title, ["model", "method", "trained on", *SCORES[task].values()], 2)
    names = {run.content["model"]: run for run in group}
    for checkpoint in sorted(names):
        ours = [run for run in group if run.content["model"] == checkpoint]
        prompted = any(run.method.published for run in ours)
        for method in METHODS.values():
            same = [run for run in ours if run.method is method]
            models = models_of(same) or [names[checkpoint].name] * (prompted and method.published)
            for model in models:
                of = [run for run in same if run.model == model]
                if method.trains and of:
                    of = on_everything(of, of[0].label)
                    table.note += note_on({of[0].label: of})
                scores = (score_cell(of, metric) for metric in SCORES[task])
                table.add(model, method.title, trained_on(of), *scores)
    return table


def model_table(task: str, group: Sequence[Run]) -> Table:
    """Table 3: what was trained, on everything."""
    columns = ["model", "trained on", *SCORES[task].values()]
    table = Table("Table 3", "models fine-tuned on everything", columns, 1)
    for label in labels_of(tuned(group)):
        of = on_everything(group, label)
        table.note += note_on({label: of})
        table.add(label, trained_on(of), *(score_cell(of, metric) for metric in SCORES[task]))
    return table


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
    """The LoRA ablation and the marginal effect of each knob."""
    title, tables = next(iter(SCORES[task].values())), []
    for label, cells in grids(task, group).items():
        epochs = sorted({at[1] for at in cells})
        columns = ["dropout", "rank", *(f"{count} epochs" for count in epochs)]
        table = Table("LoRA ablation", f"{title} by rank, epochs and dropout, {label}", columns, 2)
        best = max((cell.value for cell in cells.values() if cell.value is not None), default=None)
        for dropout, rank in sorted({(at[2], at[0]) for at in cells}):
            row = [cells[rank, count, dropout] for count in epochs]
            row = [Cell(f"**{c.text}**", c.value, c.half, c.runs) if c.value == best else c for c in row]
            table.add(f"{dropout:g}", rank, *row)
        table.note = "The best cell is bold."
        effects = Table(
            "LoRA effects", f"mean {title} at each level, {label}", ["knob", "level", title, "cells"], 2
        )
        for place, knob in enumerate(LORA.values()):
            for level, values in marginal(cells, place).items():
                effects.add(knob, f"{level:g}", f"{mean(values):.2f}" if values else "—", len(values))
        effects.note = "Means over the settings of the other two knobs that have a score at every level."
        tables += [table, effects]
    return tables


def marginal(cells: dict[tuple, Cell], place: int) -> dict[float, list[float]]:
    """For each level of the knob at `place`, the scores of the settings that have one at every level."""
    levels = sorted({at[place] for at in cells})
    others = sorted({at[:place] + at[place + 1 :] for at in cells})
    rows = [[cells[*other[:place], level, *other[place:]].value for level in levels] for other in others]
    whole = [row for row in rows if None not in row]
    return {level: [row[i] for row in whole] for i, level in enumerate(levels)}


def training_table(groups: Sequence[tuple], prices: Sequence[dict]) -> Table:
    """Tables 4 and 5: what training costs, for each model and task."""
    columns = [
        "model",
        "task",
        "trained on",
        "epochs",
        "seeds",
        "loading",
        "training",
        "evaluation",
        "all",
        "tokens/s",
    ]
    columns += ["peak GiB", "GPU", "training cost", "evaluation cost", "cost"]
    table = Table("Tables 4 and 5", "time and cost to train", columns, 2)
    for task, why, group in groups:
        place = f"{task} ({why})" if why else task
        for label in labels_of(tuned(group)):
            ours = [run for run in on_everything(group, label) if run.train]
            for gpu in sorted({cost.shown(run.train["cost"]) for run in ours}):
                of = [run for run in ours if cost.shown(run.train["cost"]) == gpu]
                done = [run for run in of if run.scored]
                table.add(
                    *(label, place, trained_on(of), of[0].config.get("epochs", "—"), len(of)),
                    mean_cell(
                        of, lambda run: trained(run)["wall_seconds"] - trained(run)["seconds"], duration
                    ),
                    mean_cell(of, lambda run: trained(run)["seconds"], duration),
                    mean_cell(done, lambda run: run.scored["wall_seconds"], duration),
                    mean_cell(done, wall_seconds, duration),
                    mean_cell(of, lambda run: trained(run)["tokens_per_second"], "{:,.0f}".format),
                    mean_cell(of, lambda run: trained(run)["peak_memory_gib"], "{:.1f}".format),
                    gpu,
                    mean_cell(of, lambda run: training_usd(run, prices), cost.usd_text),
                    mean_cell(done, lambda run: evaluation_usd(run, prices), cost.usd_text),
                    mean_cell(done, lambda run: total_usd(run, prices), cost.usd_text),
                )
    table.note = (
        "Time is of the whole process; loading includes imports, evaluation its own loading. Cost is time by "
        "the hourly price; that of training includes its loading."
    )
    return table


def served_as(run: Run) -> tuple[str, str, str]:
    return run.model, run.method.title, cost.shown(run.content["cost"])


def inference_table(groups: Sequence[tuple], prices: Sequence[dict]) -> Table:
    """What serving the test set took: cost per 1,000 examples and per 1,000 tokens read or written."""
    columns = [
        "model",
        "task",
        "method",
        "examples",
        "examples/s",
        "tokens in",
        "tokens out",
        "peak GiB",
        "GPU",
    ]
    columns += ["per 1,000 examples", "per 1K input tokens", "per 1K output tokens"]
    table = Table("Inference", "speed and cost to serve", columns, 3)
    for task, why, group in groups:
        place = f"{task} ({why})" if why else task
        for served in sorted({served_as(run) for run in group if run.scored}):
            of = [run for run in group if run.scored and served_as(run) == served]
            if of[0].method.trains:
                of = [run for run in on_everything(group, of[0].label) if run in of]
            rates = [
                lambda run, per=per: served_usd(run, prices, per)
                for per in ("examples", "input_tokens", "output_tokens")
            ]
            if of:
                table.add(
                    *(served[0], place, served[1]),
                    *(
                        mean_cell(of, lambda run, name=name: run.scored[name], show)
                        for name, show in SERVED.items()
                    ),
                    served[2],
                    *(mean_cell(of, rate, cost.usd_text) for rate in rates),
                )
    table.note = (
        "Cost is the seconds of decoding, without loading, by the hourly price, over what was served: "
        "examples, tokens read, or tokens written, each of which alone bears all of it."
    )
    return table


SERVED = {
    "examples": "{:,.0f}".format,
    "examples_per_second": "{:,.1f}".format,
    "input_tokens": "{:,.0f}".format,
    "output_tokens": "{:,.0f}".format,
    "peak_memory_gib": "{:.1f}".format,
}


def trained(run: Run) -> dict:
    return run.train["train"]


def wall_seconds(run: Run) -> float:
    return trained(run)["wall_seconds"] + run.scored["wall_seconds"]


def training_usd(run: Run, prices: Sequence[dict]) -> float | None:
    per_hour = cost.repriced(run.train["cost"], prices, cost.gpus_of(trained(run)))
    return cost.usd(per_hour, trained(run)["wall_seconds"])


def evaluation_usd(run: Run, prices: Sequence[dict]) -> float | None:
    return cost.usd(cost.repriced(run.content["cost"], prices), run.scored["wall_seconds"])


def total_usd(run: Run, prices: Sequence[dict]) -> float | None:
    parts = evaluation_usd(run, prices), training_usd(run, prices)
    return None if None in parts else sum(parts)


def served_usd(run: Run, prices: Sequence[dict], per: str) -> float | None:
    """USD per 1,000 of the examples or tokens that were served."""
    usd = cost.usd(cost.repriced(run.content["cost"], prices), run.scored["seconds"])
    return None if usd is None or not run.scored[per] else 1000 * usd / run.scored[per]


def all_tables(groups: Sequence[tuple], prices: Sequence[dict], spent: str = "") -> list[Table]:
    """Every table of the study. A group that stands apart says so in its tables' titles. What was `spent` in
    all stands under Tables 4 and 5, or where nothing was trained under the last one."""
    tables = []
    for task, why, group in groups:
        ours = [share_table(task, group)] if task == "classification" else []
        ours.append(method_table(task, group))
        ours += [model_table(task, group)] if task == "summarization" else []
        ours += lora_tables(task, group)
        counts = {f"{run.scored['examples']:,}" for run in group if run.scored}
        for table in ours:
            table.title = f"{task}: {table.title}" + (f", apart: {why}" if why else "")
            table.note = f"Over {' or '.join(counts) or 'no'} test examples. {table.note}".strip()
        tables += ours
    training = training_table(groups, prices)
    shown = [table for table in [*tables, training, inference_table(groups, prices)] if table.rows]
    for table in [training] if training.rows else shown[-1:]:
        table.note = f"{table.note} {spent}".strip()
    return shown
