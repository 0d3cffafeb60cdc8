"""What training and serving took in time and dollars, and all records together, whether a table shows them or
not."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from study.errors import UserError
from study.records import attempts, cost, record, schema
from study.report.cells import Table, duration, mean_cell
from study.report.collect import Run, records_in
from study.report.selection import by, by_column, on_everything, trained_on

FAILED = ("failed", "oom", "interrupted")


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
        for label, column in by_column(group).items():
            ours = [run for run in on_everything(column) if run.train]
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
        "Time is of the whole process; loading includes imports, evaluation its own loading, if none before "
        "has loaded the base. Cost is time by the hourly price; that of training includes its loading."
    )
    return table


def served_as(run: Run) -> tuple[str, str, str]:
    return run.model, run.way, cost.shown(run.content["cost"])


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
        shown = {label: on_everything(column) for label, column in by_column(group).items()}
        by_served = by(served_as, [run for run in group if run.scored])
        for served in sorted(by_served):
            of = by_served[served]
            if of[0].method.trains:
                ours = {*of}
                of = [run for run in shown[of[0].label] if run in ours]
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
    """Of training, where the method has one, and evaluation."""
    return (trained(run)["wall_seconds"] if run.train else 0) + run.scored["wall_seconds"]


def training_usd(run: Run, prices: Sequence[dict]) -> float | None:
    per_hour = cost.repriced(run.train["cost"], prices, cost.gpus_of(trained(run)))
    return cost.usd(per_hour, trained(run)["wall_seconds"])


def evaluation_usd(run: Run, prices: Sequence[dict]) -> float | None:
    per_hour = cost.repriced(run.content["cost"], prices, cost.gpus_of(run.scored))
    return cost.usd(per_hour, run.scored["wall_seconds"])


def total_usd(run: Run, prices: Sequence[dict]) -> float | None:
    parts = evaluation_usd(run, prices), training_usd(run, prices) if run.train else 0
    return None if None in parts else sum(parts)


def served_usd(run: Run, prices: Sequence[dict], per: str) -> float | None:
    """USD per 1,000 of the examples or tokens that were served."""
    per_hour = cost.repriced(run.content["cost"], prices, cost.gpus_of(run.scored))
    usd = cost.usd(per_hour, run.scored["seconds"])
    return None if usd is None or not run.scored[per] else 1000 * usd / run.scored[per]


def spent_in_all(folders: Iterable[Path], prices: Sequence[dict], found: Iterable[Run] = ()) -> str:
    """One sentence on the time and the dollars of every attempt that the records in the folders tell of, each
    record once, and on what it can't tell; "" where it can tell nothing. The records of the runs `found` are
    not read again."""
    histories, unreadable = read_all(folders, finished_records(found))
    every = [attempt for history in histories for attempt in history]
    if not every:
        return ""
    failed = sum(attempt["status"] in FAILED for attempt in every)
    repeated = sum(attempt["status"] == "finished" for history in histories for attempt in history[:-1])
    seconds = [attempt["wall_seconds"] for attempt in every if is_timed(attempt)]
    usd = [usd_of(attempt, prices) for attempt in every if is_timed(attempt)]
    known = [dollars for dollars in usd if dollars is not None]
    untimed, unpriced = len(every) - len(seconds), len(usd) - len(known)

    redone = [f"{n} {what}" for n, what in ((failed, "failed"), (repeated, "repeated")) if n]
    told = f", with {' and '.join(redone)} {runs(failed + repeated)}" if redone else ""
    told += f": {duration(sum(seconds)) if seconds else 'unknown time'}"
    told += f", {cost.usd_text(sum(known) if known else None)}"
    more = ((unpriced if known else 0, "price"), (untimed if seconds else 0, "time"))
    beside = [f"{n} {runs(n)} of unknown {what}" for n, what in more if n]
    told += f" (and {' and '.join(beside)})" if beside else ""
    told += f"; not counted: {unreadable} unreadable record{'s' * (unreadable > 1)}" if unreadable else ""
    return f"Spent in all{told}."


def finished_records(found: Iterable[Run]) -> dict[Path, dict]:
    """What stands in the finished records of runs, which is checked."""
    known = {}
    for run in found:
        if run.train:
            known[run.path.with_name("train.json")] = run.train
        if run.scored:
            known[run.path] = run.content
    return known


def read_all(folders: Iterable[Path], known: dict[Path, dict]) -> tuple[list[list[dict]], int]:
    """The attempts of each record in the folders, of which some are `known`, and how many can't be read."""
    histories, unreadable = [], 0
    named = real_paths(path for folder in folders for path in records_in(folder))
    for path in sorted(named):
        try:
            checked = known.get(named[path])
            content = checked or record.read(path)
            if content and not is_counted_elsewhere(content, path):  # a run that goes on may have ended since
                if not checked:
                    schema.check(content, path)
                histories.append(attempts.of_record(content))
        except UserError:
            unreadable += 1
    return histories, unreadable


def real_paths(paths: Iterable[Path]) -> dict[Path, Path]:
    """Paths by what they are without symbolic links; each folder is resolved once."""
    real: dict[Path, Path] = {}
    folders: dict[Path, Path] = {}
    for path in paths:
        folder = folders.get(path.parent) or folders.setdefault(path.parent, path.parent.resolve())
        real[path.resolve() if path.is_symlink() else folder / path.name] = path
    return real


def is_counted_elsewhere(content: dict, path: Path) -> bool:
    """Whether a run of more epochs, whose record there is, has left this one on its way."""
    longer = content.get("left_by") and path.parent.with_name(content["left_by"]) / path.name
    return bool(longer) and longer.is_file()


def is_timed(attempt: dict) -> bool:
    return attempt.get("wall_seconds") is not None


def usd_of(attempt: dict, prices: Sequence[dict]) -> float | None:
    """Dollars of an attempt by `prices`, or else as recorded; None where its price is not known."""
    spent = attempt.get("cost")
    per_hour = cost.repriced(spent, prices, spent.get("gpus") or 1) if spent else None
    return cost.usd(per_hour, attempt["wall_seconds"])


def runs(count: int) -> str:
    return "run" if count == 1 else "runs"
