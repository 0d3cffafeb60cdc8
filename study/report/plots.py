"""Runs -> plots, as PNG. Lines and points differ in marker and dash, to be told apart in grey."""

import hashlib
import re
import textwrap
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from study.records import cost
from study.records.schema import METHODS, SCORES
from study.report.cells import score_cell
from study.report.collect import Run
from study.report.published import FIGURES
from study.report.tables import grids, labels_of, models_of, on_everything, reference, training_usd, tuned

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
LONGEST_NAME = 100  # of a file, without its ending
MARKERS, DASHES, LEVELS = "osD^vP*X", ("-", "--", "-.", ":"), (":", "-.", "--")


def draw(
    groups: Sequence[tuple], prices: Sequence[dict], folder: Path, published: bool
) -> list[tuple[str, str]]:
    """Write every plot that the runs give. Returns (file name without its ending, title) of each."""
    drawn = []
    for name, title, figure in figures(groups, prices, published):
        figure.savefig(folder / f"{name}.png", dpi=150)
        drawn.append((name, title))
    return drawn


def figures(groups: Sequence[tuple], prices: Sequence[dict], published: bool) -> Iterator[tuple]:
    """(file name without its ending, title, matplotlib's figure) of every plot that the runs give. A figure
    is closed when the next one is asked for."""
    with matplotlib.rc_context(STYLE):
        for number, (task, why, group) in enumerate(groups):
            with_published = published and task == "classification" and not why
            for kind, figure in (
                ("score by number of training examples", plot_examples(task, group, with_published)),
                ("score by training cost", plot_cost(task, group, prices)),
                *(
                    ("LoRA grid, " + name, plot_grid(task, cells))
                    for name, cells in grids(task, group).items()
                ),
                ("training loss", plot_loss(group)),
            ):
                if figure:
                    title = f"{task}: {kind}" + (f", apart: {why}" if why else "")
                    figure.suptitle(textwrap.fill(title, 90), fontsize=11)
                    yield file_name(f"{task} {kind} {number if why else ''}"), title, figure
                    plt.close(figure)


def file_name(title: str) -> str:
    name = "-".join(re.findall(r"\w+", title.lower()))
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def score_title(task: str) -> str:
    return f"{next(iter(SCORES[task].values()))} (%)"


def scale(axes, task: str, xlabel: str, show) -> None:
    """Scores in percent over a logarithmic axis with its values at 1, 2 and 5."""
    low, high = axes.get_ylim()
    axes.set(xscale="log", xlabel=xlabel, ylabel=score_title(task), ylim=(max(-1, low), min(101, high)))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: show(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8)


def plot_examples(task: str, group: Sequence[Run], published: bool):
    """Score over the number of training examples, with intervals."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    metric, styles = next(iter(SCORES[task])), zip(cycle(MARKERS), cycle(DASHES), strict=False)
    for model, (marker, dash) in zip(labels_of(tuned(group)), styles, strict=False):
        points = {}
        for run in reference(group, model):
            if run.scored and run.train:
                points.setdefault(run.train["train"]["examples"], []).append(run)
        cells = {count: score_cell(points[count], metric) for count in sorted(points)}
        if cells:
            values, halves = zip(*((cell.value, cell.half) for cell in cells.values()), strict=True)
            axes.errorbar(
                list(cells), values, halves, marker=marker, ls=dash, color="black", capsize=3, label=model
            )
    if published:
        table = FIGURES["tables"]["Table 1"]
        examples, *columns = list(zip(*table["rows"], strict=True))[1:]
        for name, column, marker, dash in zip(
            table["columns"][2:], columns, cycle(MARKERS), cycle(DASHES), strict=False
        ):
            x, y = [int(count) for count in examples], [float(text) for text in column]
            axes.plot(x, y, marker=marker, ls=dash, color="0.6", ms=4, lw=1, label=f"{name} (published)")
    if not axes.has_data():
        return plt.close(figure)
    scale(axes, task, "training examples", "{:,.0f}".format)
    figure.legend(loc="outside right center" if published else "outside lower center", fontsize=8)
    return figure


def plot_cost(task: str, group: Sequence[Run], prices: Sequence[dict]):
    """Score over the dollars of training, the Pareto front as a line, and untuned models as levels."""
    metric, cells = next(iter(SCORES[task])), {}
    for run in tuned(group):
        if run.scored and run.train and training_usd(run, prices) is not None:
            cells.setdefault((run.label, run.share, run.setting), []).append(run)
    if not cells:
        return None
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    points = {}
    for key, of in cells.items():
        points[key] = mean(training_usd(run, prices) for run in of), score_cell(of, metric)
    for model, marker in zip(sorted({key[0] for key in points}), cycle(MARKERS), strict=False):
        ours = [point for key, point in points.items() if key[0] == model]
        costs, scores, halves = zip(*((usd, cell.value, cell.half) for usd, cell in ours), strict=True)
        axes.errorbar(
            costs, scores, halves, ls="", marker=marker, color="0.45", capsize=2, lw=0.8, label=model
        )
    front = pareto([(usd, cell.value) for usd, cell in points.values()])
    axes.step(*zip(*front, strict=True), where="post", color="black", lw=1.5, label="Pareto front")
    untrained = [method for method in METHODS.values() if not method.trains]
    for method, dash in zip(untrained, cycle(LEVELS), strict=False):
        for model in models_of(run for run in group if run.method is method and run.scored):
            level = score_cell((r for r in group if r.method is method and r.model == model), metric).value
            axes.axhline(level, ls=dash, color="0.45", label=f"{model}, {method.title}, no training")
    scale(axes, task, "training cost (USD)", cost.usd_text)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, score) points that no cheaper one equals or beats."""
    front = []
    for usd, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((usd, score))
    return front


def plot_grid(task: str, cells: dict):
    """A heat map of rank x epochs for each dropout, on one scale of grey."""
    ranks, epochs, dropouts = (sorted(set(column)) for column in zip(*cells, strict=True))
    values = [cell.value for cell in cells.values() if cell.value is not None]
    if not values:
        return None
    size = (1.5 + 0.9 * len(epochs) * len(dropouts), 1.8 + 0.5 * len(ranks))
    figure, all_axes = plt.subplots(
        1, len(dropouts), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    low, high = min(values), max(values)
    for axes, dropout in zip(all_axes[0], dropouts, strict=True):
        rows = [[cells[rank, epoch, dropout] for epoch in epochs] for rank in ranks]
        shades = [[float("nan") if cell.value is None else cell.value for cell in row] for row in rows]
        image = axes.imshow(shades, cmap="Greys", vmin=low - (high - low) / 4, vmax=high, aspect="auto")
        for y, row in enumerate(rows):
            for x, cell in enumerate(row):
                dark = cell.value is not None and cell.value > (low + high) / 2
                text = cell.text.strip("*").partition(" ")[0]
                axes.text(
                    x, y, text, ha="center", va="center", color="white" if dark else "black", fontsize=9
                )
        axes.set_xticks(range(len(epochs)), [f"{epoch:g}" for epoch in epochs])
        axes.set_yticks(range(len(ranks)), [f"{rank:g}" for rank in ranks])
        axes.set(xlabel="epochs", title=f"dropout {dropout:g}")
        axes.grid(False)
    all_axes[0][0].set_ylabel("LoRA rank")
    figure.colorbar(image, ax=all_axes[0], label=score_title(task))
    return figure


def has_losses(run: Run) -> bool:
    return bool(run.train and run.train["train"]["loss_history"])


def plot_loss(group: Sequence[Run]):
    """Training loss over the steps, smoothed, of the runs on the largest training share."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for model, dash in zip(labels_of(tuned(group)), cycle(DASHES), strict=False):
        for number, run in enumerate(run for run in on_everything(group, model) if has_losses(run)):
            steps, losses = zip(*run.train["train"]["loss_history"], strict=True)
            window = max(1, len(losses) // 20)
            smooth = [mean(losses[max(0, i - window + 1) : i + 1]) for i in range(len(losses))]
            label = None if number else f"{model}, a line for each seed, means over 1/20 of the steps"
            axes.plot(steps, smooth, ls=dash, color="0.25", lw=1.1, label=label)
    if not axes.has_data():
        return plt.close(figure)
    axes.set(xlabel="optimizer step", ylabel="loss per learned token (nats)")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", fontsize=8)
    return figure
