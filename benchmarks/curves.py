"""The loss curves of two runs side by side: do they learn the same?

    python -m benchmarks.curves RUN RUN --names fused plain --output curves.png

A RUN is a training's folder or its train.json. Printed are the mean losses of 25 steps each, with their
difference, and how far the two curves are from each other step by step; the plot has both, their losses light
and a moving mean of 10 steps on top.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, pstdev

from study.cli import run_script
from study.errors import UserError
from study.records import record

STEPS = 25  # of a row of the table
WINDOW = 10  # steps of the moving mean


def flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs=2, type=Path, metavar="RUN", help="folder or train.json of a training")
    add("--names", nargs=2, default=("first", "second"), metavar="NAME", help="of the runs (first second)")
    add("--output", type=Path, default=Path("curves.png"), metavar="FILE", help="the plot (%(default)s)")
    return parser.parse_args(argv)


def read_curve(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of a training. Raises UserError where there is none."""
    path = run / "train.json" if run.is_dir() else run
    content = record.read(path)
    if content is None:
        raise UserError(f"{path}: there is no such record: name the folder of a training or its train.json")
    history = content.get("train", {}).get("loss_history")
    if not history:
        raise UserError(f"{path} has no loss curve: its training is {content['status']}")
    return [(step, loss) for step, loss in history]


def read_curves(runs: Sequence[Path]) -> tuple[list[int], list[list[float]]]:
    """Their common steps, and the losses of each."""
    curves = [read_curve(run) for run in runs]
    steps, others = ([step for step, _ in curve] for curve in curves)
    if steps != others:
        counts = f"{len(steps)} up to {steps[-1]}, {len(others)} up to {others[-1]}"
        raise UserError(
            f"{runs[0]} and {runs[1]} differ in their steps ({counts}): train both with the same flags"
        )
    return steps, [[loss for _, loss in curve] for curve in curves]


def table(steps: Sequence[int], losses: Sequence[Sequence[float]], names: Sequence[str]) -> str:
    from tabulate import tabulate

    groups: dict[int, list[int]] = {}
    for i, step in enumerate(steps):
        groups.setdefault((step - 1) // STEPS, []).append(i)
    rows = []
    for places in groups.values():
        first, second = (mean(curve[i] for i in places) for curve in losses)
        span = f"{steps[places[0]]} to {steps[places[-1]]}"
        rows.append([span, f"{first:.4f}", f"{second:.4f}", f"{first - second:+.4f}"])
    return tabulate(rows, ["steps", *names, "difference"], tablefmt="github", disable_numparse=True)


def draw(steps: Sequence[int], losses: Sequence[Sequence[float]], names: Sequence[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for curve, name, color, dash in zip(losses, names, ("C0", "C1"), ("-", "--"), strict=True):
        smooth = [mean(curve[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(curve))]
        axes.plot(steps, curve, color=color, ls=dash, lw=0.8, alpha=0.3)
        axes.plot(steps, smooth, color=color, ls=dash, label=f"{name}, moving mean of {WINDOW}")
    axes.set(xlabel="optimizer step", ylabel="loss per learned token (nats)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--output {path} can't be written: {error}") from None
    plt.close(figure)


def main() -> None:
    args = flags()
    steps, losses = read_curves(args.runs)
    draw(steps, losses, args.names, args.output)
    apart = pstdev(first - second for first, second in zip(*losses, strict=True))
    print(f"{table(steps, losses, args.names)}\n")
    print(f"standard deviation of the difference, step by step: {apart:.4f} over {len(steps)} steps")
    print(f"plot: {args.output}")


if __name__ == "__main__":
    run_script(lambda _: main())
