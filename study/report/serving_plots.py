"""Load tests -> plots: latency and served rate over the rate offered; servers and GPUs beside each other.

Servers differ in colour, marker and dash, to be told apart in grey. A hollow point is a rate that was not
sustained.
"""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from study.records.schema import SCORES
from study.report.cells import Cell
from study.report.plots import COLORS, DASHES, MARKERS, STYLE, file_name
from study.report.serving import priced, sustained_cell
from study.report.sweeps import Sweep, comparable_sweeps

SIZES = {"marker": "", "lw": 1.4}
NOT_SUSTAINED = {"marker": "o", "ls": "", "mfc": "white", "color": "0.3", "label": "hollow: not sustained"}
PER_REQUESTS = "1,000 requests"


def figures(sweeps: Sequence[Sweep], prices: Sequence[dict]) -> Iterator[tuple]:
    """(file name without its ending, title, matplotlib's figure) of every plot. A figure is closed when the
    next one is asked for."""
    with matplotlib.rc_context(STYLE):
        for why, group in comparable_sweeps(sweeps):
            for task in SCORES:
                ours = by_name([sweep for sweep in group if sweep.task == task])
                for kind, figure in (
                    ("latency by the rate offered", plot_latency(ours)),
                    ("rate served by the rate offered", plot_served(ours)),
                    ("servers, the rate sustained and its cost", plot_servers(ours, prices)),
                    ("GPUs, the rate sustained and its cost", plot_gpus(ours, prices)),
                ):
                    if figure:
                        title = f"{task}: {kind}" + (f", apart: {why}" if why else "")
                        figure.suptitle(textwrap.fill(title, 80), fontsize=11)
                        yield file_name(f"{task} {kind}{' apart ' * bool(why)}{why}"), title, figure
                        plt.close(figure)


def by_name(group: Sequence[Sweep], told: Sequence[int] = (1, 3)) -> dict[str, Sweep]:
    """Each sweep by its server and, where there are several, by its model (1) and GPU (3)."""
    several = [i for i in told if len({sweep.keys()[i] for sweep in group}) > 1]
    return {", ".join([sweep.label, *(sweep.keys()[i] for i in several)]): sweep for sweep in group}


def looks(names: Sequence[str]) -> dict[str, dict]:
    """Colour, marker and dash of each server, the same in every plot of a task."""
    styles = zip(names, cycle(COLORS), cycle(MARKERS), cycle(DASHES), strict=False)
    return {name: {"color": color, "marker": marker, "ls": dash} for name, color, marker, dash in styles}


def draw_rates(axes, ours: dict[str, Sweep], measure: Callable[[dict], float]) -> None:
    """A line for each server over the rates offered; hollow points where they were not sustained."""
    for name, look in looks([*ours]).items():
        steps = sorted(ours[name].rates, key=lambda step: step["offered"])
        points = [(step["offered"], measure(step)) for step in steps]
        if points:
            axes.plot(*zip(*points, strict=True), **look | SIZES)
        for step, point in zip(steps, points, strict=True):
            fill = {} if step["status"] == "sustained" else {"mfc": "white"}
            axes.plot(*point, **look | {"ls": "", "ms": 5.5} | fill)


def logarithmic(axes, names: str) -> None:
    """The axes "x", "y" or both, with their values at 1, 2 and 5, and some of these in sight."""
    for name in names:
        axes.set(**{f"{name}scale": "log"})
        low, high = getattr(axes, f"get_{name}lim")()
        if high < 4 * low:
            axes.set(**{f"{name}lim": (low / 2, 2 * high)})
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
        axis.set_minor_locator(NullLocator())


def legend(figure, ours: dict[str, Sweep], *more: Line2D) -> None:
    """The servers that have rates, and what else is drawn."""
    handles = [
        Line2D([], [], label=name, **look) for name, look in looks([*ours]).items() if ours[name].rates
    ]
    bad = any(step["status"] != "sustained" for sweep in ours.values() for step in sweep.rates)
    handles += [*more, *([Line2D([], [], **NOT_SUSTAINED)] if bad else [])]
    columns = 2 if max(len(handle.get_label()) for handle in handles) > 30 else 3
    place = {"loc": "outside lower center", "ncols": columns, "fontsize": 8}
    figure.legend(handles=handles, handlelength=3.5, **place)


def plot_latency(ours: dict[str, Sweep]):
    """The median and the 90th percentile, with the SLO of those that have one."""
    if not any(sweep.rates for sweep in ours.values()):
        return None
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.6), sharey=True, layout="constrained")
    slos = sorted({sweep.config["slo_seconds"] for sweep in ours.values() if sweep.config.get("slo_seconds")})
    for axes, percentile in zip(panels, ("p50", "p90"), strict=True):
        draw_rates(axes, ours, lambda step, percentile=percentile: step["latency"][percentile])
        axes.set(xlabel="requests/s offered", title=percentile)
        axes.title.set_fontsize(10)
        for slo in slos if percentile == "p90" else ():
            axes.axhline(slo, color="0.3", lw=1, ls=(0, (2, 2)))
    for axes in panels:  # which share the axis of seconds
        logarithmic(axes, "xy")
    panels[0].set_ylabel("latency (s)")
    words = " and ".join(f"{slo:g} s" for slo in slos)
    line = [Line2D([], [], color="0.3", lw=1, ls=(0, (2, 2)), label=f"SLO, p90 within {words}")]
    legend(figure, ours, *(line if slos else []))
    return figure


def plot_served(ours: dict[str, Sweep]):
    """Beside the diagonal, where all is served that is offered."""
    steps = [step for sweep in ours.values() for step in sweep.rates]
    if not steps:
        return None
    figure, axes = plt.subplots(figsize=(7, 5.2), layout="constrained")
    ends = [extreme(step["offered"] for step in steps) for extreme in (min, max)]
    axes.plot(ends, ends, color="0.3", lw=1)
    axes.fill_between(ends, [0.95 * end for end in ends], ends, color="0.8", lw=0)
    draw_rates(axes, ours, lambda step: step["served"])
    axes.set(xlabel="requests/s offered", ylabel="requests/s served")
    logarithmic(axes, "xy")
    label = "all that is offered; grey: 95 % or more of it"
    legend(figure, ours, Line2D([], [], color="0.3", lw=1, label=label))
    return figure


def plot_servers(ours: dict[str, Sweep], prices: Sequence[dict]):
    """A bar for the rate that each server sustains, and one for what 1,000 requests cost there."""
    if len(ours) < 2 or not any(sweep.step for sweep in ours.values()):
        return None
    colors = {name: look["color"] for name, look in looks([*ours]).items()}
    return bars([(name, sweep, colors[name]) for name, sweep in ours.items()], prices)


def plot_gpus(ours: dict[str, Sweep], prices: Sequence[dict]):
    """Likewise, of the servers that were loaded on several GPUs, a colour for each GPU."""
    by_server: dict[tuple, list[Sweep]] = {}
    for sweep in ours.values():
        by_server.setdefault(sweep.keys()[:3], []).append(sweep)
    several = [sweep for of in by_server.values() if len(of) > 1 for sweep in of]
    if not any(sweep.step for sweep in several):
        return None
    colors = dict(zip(sorted({sweep.gpu for sweep in several}), cycle(COLORS), strict=False))
    named = by_name([of[0] for of in by_server.values() if len(of) > 1], told=(1,))
    rows = [
        (f"{name}\n{sweep.gpu}", sweep, colors[sweep.gpu])
        for name, first in named.items()
        for sweep in by_server[first.keys()[:3]]
    ]
    return bars(rows, prices)


def bars(rows: Sequence[tuple[str, Sweep, str]], prices: Sequence[dict]):
    """Of (name, sweep, colour): the rate sustained, and the cost of 1,000 requests at that rate; of a gap why
    there is none."""
    height = 1.3 + 0.45 * len(rows)
    figure, panels = plt.subplots(1, 2, figsize=(9, height), sharey=True, layout="constrained")
    rates = [(sweep.sustained, sustained_cell(sweep)) for _, sweep, _ in rows]
    costs = [cost_of(sweep, prices) for _, sweep, _ in rows]
    titles = "requests/s sustained", f"USD per {PER_REQUESTS} at that rate"
    look = {"textcoords": "offset points", "va": "center", "size": 9}
    for axes, column, title in zip(panels, (rates, costs), titles, strict=True):
        lengths = [length or 0 for length, _ in column]
        axes.barh(range(len(rows)), lengths, height=0.6, color=[color for *_, color in rows])
        for y, (length, cell) in enumerate(column):
            axes.annotate(cell.text, (length or 0, y), (4, 0), **look)
        axes.set_xlim(0, 1.25 * max(lengths) or 1)
        axes.set_xlabel(title)
        axes.grid(axis="y", visible=False)
        axes.set_axisbelow(True)
        axes.locator_params(axis="x", nbins=5)
    panels[0].set_yticks(range(len(rows)), [wrapped(name) for name, *_ in rows], fontsize=9)
    panels[0].invert_yaxis()
    return figure


def wrapped(name: str) -> str:
    return "\n".join(textwrap.fill(line, 40) for line in name.splitlines())


def cost_of(sweep: Sweep, prices: Sequence[dict]) -> tuple[float | None, Cell]:
    usd = sweep.costs(prices)[PER_REQUESTS] if sweep.step else None
    return usd, priced(sweep, usd)
