"""Runs -> plots, as PNG. Colours differ in lightness, and lines and points in dash and marker, to be told
apart in grey."""

import hashlib
import io
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from statistics import mean, median

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.container import ErrorbarContainer
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from study.records import cost
from study.records.schema import SCORES
from study.report.calibration import COVERAGES, Confidences, confidences_of
from study.report.cells import Cell, score_cell
from study.report.choice import grids
from study.report.classes import INVALID, Confusion, confusions_of
from study.report.collect import Run, meant
from study.report.compare import difference
from study.report.curve import FARTHEST
from study.report.forecast import forecasts
from study.report.published import FIGURES
from study.report.selection import by, by_column, by_examples, on_everything, tuned, usual_runs
from study.report.spent import training_usd

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
NUMBERED, NAMED = 25, 50  # classes of a confusion matrix that has numbers, and that are named at most
TIMES_AHEAD = np.geomspace(1, FARTHEST, 25)
LONGEST_NAME = 120  # of a file, without its ending
COLORS = ("#10206b", "#a0122d", "#14803c", "#9a50c4", "#2fa8d8", "#e58a2f", "#e8a0c8")  # the darkest first
MARKERS, DASHES = "osD^vP*X", ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
LEVELS = ((0, (1, 2)), (0, (6, 3)), (0, (3, 3, 1, 3)))  # without markers
BLUES = LinearSegmentedColormap.from_list("", ["#ffffff", "#6fa3d0"])  # light enough for black figures


def draw(figures: Iterable[tuple], folder: Path) -> list[tuple[str, str]]:
    """Write every plot of (file name without its ending, title, figure), in 256 colours: a third of
    the bytes. Returns the first two of each."""
    drawn = []
    for name, title, figure in figures:
        whole = io.BytesIO()
        figure.savefig(whole, dpi=150)
        with Image.open(whole) as image:
            few = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        few.save(folder / f"{name}.png", optimize=True, dpi=(150, 150))
        drawn.append((name, title))
    return drawn


def figures(groups: Sequence[tuple], prices: Sequence[dict], published: bool) -> Iterator[tuple]:
    """(file name without its ending, title, matplotlib's figure) of every plot that the runs give. A figure
    is closed when the next one is asked for."""
    with matplotlib.rc_context(STYLE):
        names = set()
        for task, why, group in meant(groups):
            chosen_on = bool(why) and group[0].config.get("split") == "validation"
            for kind, figure in figures_of(task, group, prices, published and not why, chosen_on):
                if figure:
                    title = f"{task}: {kind}" + (f", apart: {why}" if why else "")
                    figure.suptitle(textwrap.fill(title, 90), fontsize=11)
                    name = file_name(f"{task} {kind} {apart(why)}")
                    while name in names:
                        name += "-too"
                    names.add(name)
                    yield name, title, figure
                    plt.close(figure)


def figures_of(
    task: str, group: Sequence, prices: Sequence[dict], published: bool, chosen_on: bool
) -> Iterator[tuple]:
    """(what it shows, its figure or None) of each plot of one group, drawn when it is asked for."""
    score = next(iter(SCORES[task].values()))
    published = published and task == "classification"
    yield f"{score} by number of training examples", plot_examples(task, group, published)
    yield f"{score} by training cost", plot_cost(task, group, prices)
    for name, cells in grids(task, group).items():
        yield f"LoRA grid, {name}", plot_grid(task, cells)
    if not chosen_on:  # large pictures: of what chose settings alone the tables say enough
        for name, confusion in confusions_of(group).items():
            yield f"confusion matrix, {name}", plot_confusion(confusion)
    sure = confidences_of(group)
    for name, confidences in sure.items():
        yield f"reliability of confidence, {name}", plot_reliability(confidences)
    yield "accuracy over coverage", plot_coverage(sure)
    yield "training loss", plot_loss(group)


def apart(why: str) -> str:
    """What a file's name says of a group that stands apart: "apart 256 test examples of posts"."""
    short = re.sub(r" \(sha256 \w+\)|\S+/|\.(jsonl?|csv|tsv|parquet)\b|\.gz\b", "", why)
    return f"apart {short}" if why else ""


def file_name(title: str) -> str:
    name = "-".join(re.findall(r"\w+", title.lower()))
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def score_title(task: str) -> str:
    return f"{next(iter(SCORES[task].values()))} (%)"


def styles_of(group: Sequence[Run]) -> dict[str, dict]:
    """The colour, marker and dash of each column of what was trained, the same in every plot of a group."""
    looks = zip(cycle(COLORS), cycle(MARKERS), cycle(DASHES), strict=False)
    return {
        label: {"color": color, "marker": marker, "ls": dash}
        for label, (color, marker, dash) in zip(by_column(group), looks, strict=False)
    }


def draw_levels(axes, task: str, group: Sequence[Run]) -> None:
    """What costs no training as a level across the plot: untrained models and sentences of the text."""
    metric, levels = next(iter(SCORES[task])), {}
    for run in group:
        if not run.method.trains and run.scored:
            levels.setdefault(f"{run.model}, {run.way}, no training", []).append(run)
    colors = cycle(COLORS[-2::-1])
    for (label, of), color, dash in zip(sorted(levels.items()), colors, cycle(LEVELS), strict=False):
        axes.axhline(score_cell(of, metric).value, ls=dash, lw=1.5, color=color, label=label)


def legend(figure, axes, **place) -> None:
    """First what was measured, with intervals, then lines."""
    named = zip(*axes.get_legend_handles_labels(), strict=True)
    named = sorted(named, key=lambda pair: not isinstance(pair[0], ErrorbarContainer))
    figure.legend(*zip(*named, strict=True), fontsize=8, **place)


def scale(axes, task: str, xlabel: str, show) -> None:
    """Scores in percent over a logarithmic axis with its values at 1, 2 and 5."""
    low, high = axes.get_ylim()
    axes.set(xscale="log", xlabel=xlabel, ylabel=score_title(task), ylim=(max(-1, low), min(101, high)))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: show(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8)


def plot_examples(task: str, group: Sequence[Run], published: bool):
    """Score over the number of training examples, with intervals; dashed, in a band, what more of them would
    bring; and as levels what needs none."""
    figure, axes = plt.subplots(figsize=(9 if published else 7, 4.5), layout="constrained")
    metric = next(iter(SCORES[task]))
    styles = styles_of(group)
    for model, column in by_column(group).items():
        points, style = by_examples(usual_runs(column)), styles[model]
        cells = {count: score_cell(of, metric) for count, of in points.items()}
        if cells:
            values, bars = bars_of(cells.values())
            axes.errorbar([*cells], values, bars, **style, capsize=3, label=model)
    if axes.has_data():
        draw_levels(axes, task, group)
    draw_forecasts(axes, task, group)
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
    legend(figure, axes, loc="outside right center" if published else "outside lower center")
    return figure


def draw_forecasts(axes, task: str, group: Sequence[Run]) -> None:
    """As far as they are of use: the scores dashed, their intervals as bands."""
    label, styles = "forecast, with its 95 % interval", styles_of(group)
    for model, each in forecasts(task, group).items():
        ahead = {times * each.n[-1]: found for times in TIMES_AHEAD if (found := each.at(times))}
        if ahead:
            middle, low, high = 100 - 100 * np.array([*ahead.values()]).T
            color = styles[model]["color"]
            axes.plot([*ahead], middle, ls=(0, (2, 2)), lw=1, color=color, label=label)
            axes.fill_between([*ahead], low, high, color=color, alpha=0.12, lw=0)
            label = None


def bars_of(cells: Iterable[Cell]) -> tuple[list[float], list[list[float]]]:
    """Scores, and how far below and above them the ends of their intervals lie; 0 without an interval."""
    values, bars = [], [[], []]
    for cell in cells:
        low, high = cell.ends or (cell.value, cell.value)
        values.append(cell.value)
        for side, length in zip(bars, (cell.value - low, high - cell.value), strict=True):
            side.append(max(length, 0))
    return values, bars


def plot_cost(task: str, group: Sequence[Run], prices: Sequence[dict]):
    """Score over the dollars of training: the Pareto front as a line, the points that can't be told from it
    filled, and untuned models as levels."""
    metric, ours = next(iter(SCORES[task])), [run for run in tuned(group) if run.scored and run.train]
    priced = [run for run in ours if training_usd(run, prices) is not None]
    cells = by(lambda run: (run.label, run.share, run.setting), priced)
    if not cells:
        return None
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    points = {
        key: (mean(training_usd(run, prices) for run in of), score_cell(of, metric))
        for key, of in cells.items()
    }
    front = pareto({key: (usd, cell.value) for key, (usd, cell) in points.items()})
    tied = {*front}
    for key, (usd, _) in points.items():
        found = difference(cells[key], cells[[at for at in front if points[at][0] <= usd][-1]], metric)
        if found and found.worse() >= 0.05 / len(points):
            tied.add(key)
    for model, style in styles_of(group).items():
        for chosen in (False, True):
            ours = [point for key, point in points.items() if key[0] == model and (key in tied) == chosen]
            if ours:
                values, bars = bars_of(cell for _, cell in ours)
                named = f"{model}, {'on the front or not told from it' if chosen else 'below the front'}"
                look = style | {"ls": "", "capsize": 2, "lw": 0.8} | ({} if chosen else {"mfc": "white"})
                axes.errorbar([usd for usd, _ in ours], values, bars, label=named, **look)
    line = [(points[key][0], points[key][1].value) for key in front]
    searched = sum(training_usd(run, prices) for of in cells.values() for run in of)
    count = sum(map(len, cells.values()))
    label = f"Pareto front, found by {count} trainings for {cost.usd_text(searched)}"
    axes.step(*zip(*line, strict=True), where="post", color="black", lw=1.5, label=label)
    draw_levels(axes, task, group)
    scale(axes, task, "training cost (USD)", cost.usd_text)
    legend(figure, axes, loc="outside lower center", ncols=2)
    return figure


def pareto(points: dict) -> list:
    """The names of the points (cost, score) that no cheaper one equals or beats, the cheapest first."""
    front = []
    for name, (_, score) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if not front or score > points[front[-1]][1]:
            front.append(name)
    return front


def plot_grid(task: str, cells: dict):
    """A heat map of rank x epochs for each dropout. Its blues span four widths of an interval or more, lest
    noise looks like a landscape."""
    ranks, epochs, dropouts, rates = (sorted(set(column)) for column in zip(*cells, strict=True))
    panels = [(dropout, rate) for rate in rates for dropout in dropouts]
    scored = [cell for cell in cells.values() if cell.value is not None]
    if not scored:
        return None
    size = (1.5 + 1.1 * len(epochs) * len(panels), 1.8 + 0.5 * len(ranks))
    figure, all_axes = plt.subplots(
        1, len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    low, high = min(cell.value for cell in scored), max(cell.value for cell in scored)
    width = median([cell.ends[1] - cell.ends[0] for cell in scored if cell.ends] or [high - low])
    low = min(low, high - 4 * width) - 0.01
    for axes, (dropout, rate) in zip(all_axes[0], panels, strict=True):
        rows = [[cells[rank, epoch, dropout, rate] for epoch in epochs] for rank in ranks]
        shades = [[float("nan") if cell.value is None else cell.value for cell in row] for row in rows]
        image = axes.imshow(shades, cmap=BLUES, vmin=low, vmax=high, aspect="auto")
        for y, row in enumerate(rows):
            for x, cell in enumerate(row):
                text = cell.text if cell.value is None else f"{cell.value:.2f}"
                if cell.ends:
                    text += "\n{:.1f} to {:.1f}".format(*cell.ends)
                axes.text(x, y, text, ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(epochs)), [f"{epoch:g}" for epoch in epochs])
        axes.set_yticks(range(len(ranks)), [f"{rank:g}" for rank in ranks])
        title = f"dropout {dropout:g}" + (f",\nlearning rate {rate:g}" if len(rates) > 1 else "")
        axes.set(xlabel="epochs", title=title)
        axes.grid(False)
    all_axes[0][0].set_ylabel("LoRA rank")
    bar = figure.colorbar(image, ax=all_axes[0])
    bar.set_ticks([high - i * width for i in range(5)], labels=[f"{high - i * width:.1f}" for i in range(5)])
    bar.set_label(f"{score_title(task)},\na tick for each width\nof an interval", fontsize=8)
    return figure


def plot_confusion(found: Confusion):
    """A row for each reference class: of its examples the share that each answer got. Dark is much, in grey
    too, and a root keeps small shares in sight. Few classes have numbers; of many, not all are named."""
    counts = found.counts()  # [classes, classes + 1]
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size, step = len(shares), -(-len(shares) // NAMED)
    side, seeds = min(8.5, 3.5 + size / 4), len(found.runs)
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100), aspect="auto")
    font = {"fontsize": min(9, 5 + 60 / size), "parse_math": False}
    names = [name if len(name) < 28 else f"{name[:26]}…" for name in found.classes]
    rows, columns = range(0, size, step), range(0, size - step + 1, step)
    axes.set_yticks(rows, [names[i] for i in rows], **font)
    axes.set_xticks([*columns, size], [*(names[i] for i in columns), INVALID], rotation=90, **font)
    for y, x in zip(*np.nonzero(shares >= 0.5), strict=True) if size <= NUMBERED else ():
        color = "white" if shares[y, x] > 40 else "black"
        axes.text(x, y, f"{shares[y, x]:.0f}", ha="center", va="center", color=color, **font)
    axes.axvline(size - 0.5, color="black", lw=0.8)
    axes.grid(False)
    axes.set(xlabel="answer", ylabel="reference")
    bar = figure.colorbar(image, ax=axes, ticks=[0, 1, 5, 10, 25, 50, 100], fraction=0.03)
    bar.set_label("% of the reference class" + (f", {seeds} seeds added up" if seeds > 1 else ""))
    return figure


def plot_reliability(found: Confidences):
    """Accuracy over confidence in bins of equal mass, with intervals, beside the diagonal where both are the
    same; below, how many answers are so sure."""
    figure, (axes, below) = plt.subplots(
        2, 1, figsize=(7, 5.5), height_ratios=(4, 1), sharex=True, layout="constrained"
    )
    points = found.reliability()
    cells = [Cell("", right, ends) for _, right, ends in points]
    values, bars = bars_of(cells)
    axes.plot([0, 100], [0, 100], ls="--", lw=1, color="0.5", label="as sure as right")
    look = {"marker": "o", "ms": 5, "lw": 1, "color": "black", "capsize": 3}
    count = f"{len(points)} bin{'s' * (len(points) > 1)} of equal mass"
    seeds = f", {len(found.runs)} seeds together" if len(found.runs) > 1 else ""
    seeds += ", too few for intervals" if len(found.runs) == 2 else ""
    axes.errorbar([sure for sure, *_ in points], values, bars, label=f"{count}{seeds}", **look)
    axes.set(ylabel="accuracy (%)", xlim=(-2, 102), ylim=(-2, 102))
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    below.hist(100 * found.sure.ravel(), bins=np.arange(0, 101, 5), color="0.6", edgecolor="white")
    below.set(xlabel="confidence (%)", ylabel="answers")
    return figure


def plot_coverage(every: dict[str, Confidences]):
    """Accuracy of the surest answers over their share; intervals at the shares of the table."""
    if not every:
        return None
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    styles = zip(cycle(MARKERS), cycle(DASHES), cycle(("black", "0.5")), strict=False)
    for number, (name, found) in enumerate(every.items()):
        marker, dash, color = next(styles)
        axes.plot(*found.curve(), ls=dash, lw=1.2, color=color)
        values, bars = bars_of(found.kept(share) for share in COVERAGES)
        look = {"marker": marker, "color": color, "ms": 5, "lw": 1.2}
        beside = [100 * share - 0.4 * number for share in COVERAGES]  # so that no bar hides another
        axes.errorbar(beside, values, bars, ls="", capsize=3, **look)
        axes.plot([], [], ls=dash, label=name, **look)
    low, high = axes.get_ylim()
    axes.set(
        xlabel="answers that are kept, the surest (%); a person gets the rest",
        ylabel="their accuracy (%)",
        xlim=(0, 102),
        ylim=(max(-1, low), min(101, high)),
    )
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def has_losses(run: Run) -> bool:
    return bool(run.train and run.train["train"]["loss_history"])


def plot_loss(group: Sequence[Run]):
    """Training loss over the steps, smoothed, of the runs on the largest training share."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    styles = styles_of(group)
    for model, column in by_column(group).items():
        style = styles[model]
        for number, run in enumerate(run for run in on_everything(column) if has_losses(run)):
            steps, losses = zip(*run.train["train"]["loss_history"], strict=True)
            window = max(1, len(losses) // 20)
            smooth = [mean(losses[max(0, i - window + 1) : i + 1]) for i in range(len(losses))]
            label = None if number else f"{model}, a line for each seed, means over 1/20 of the steps"
            axes.plot(steps, smooth, **style | {"marker": ""}, lw=1.1, label=label)
    if not axes.has_data():
        return plt.close(figure)
    axes.set(xlabel="optimizer step", ylabel="loss per learned token (nats)")
    axes.set_ylim(bottom=0)
    legend(figure, axes, loc="outside lower center")
    return figure
