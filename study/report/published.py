"""The published study's figures (published.json) beside ours, as facts with their source, marked †.

Such a cell has no value, so that no mean, interval or comparison of ours can take it in.
"""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from study.records import cost
from study.report.cells import Cell, Table
from study.report.serving import LOAD
from study.report.sweeps import Sweep

FIGURES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
TOKENS = 100  # about that many in each request of the study's load test
SERVED = "Inference, published"
LINES = {  # of its load test, as the table of ours under load has them
    "per 1K tokens": "per 1K tokens",
    "per 1K tokens, served": "per 1K tokens, served",
    "requests/s offered": "RPS",
    "requests/s served": "throughput",
    "90 % latency": "latency 90 %",
}


def with_published(tables: Sequence[Table]) -> list[Table]:
    """The tables with the published figures as further columns (of training shares) or rows."""
    tables = list(tables)
    for name, theirs in FIGURES["tables"].items():
        key = theirs["columns"][0]
        ours = next((t for t in tables if t.name == name and t.title.startswith(theirs["task"])), None)
        if ours is None:
            title = f"{theirs['task']}: {theirs['title']}".removeprefix(": ")
            ours = Table(name, title, [key], 1 if name == "Table 3" else 2)
            tables.append(ours)
        rows = [dict(zip(ours.columns, row, strict=True)) for row in ours.rows]
        for published in rows_of(theirs):
            if key == "training share":
                mine = next((row for row in rows if row[key].text == published[key].text), None)
                marked = {f"{column} †": cell for column, cell in published.items() if column != key}
            else:
                mine, marked = None, published | {key: Cell(f"{published[key].text} †")}
            if mine is None:
                rows.append(mine := {key: published[key]})
            mine |= marked
        if key == "training share":
            rows.sort(key=lambda row: float(row[key].text.removesuffix(" %")))
        ours.columns = list(dict.fromkeys([*ours.columns, *(column for row in rows for column in row)]))
        ours.rows = [[row.get(column, Cell("—")) for column in ours.columns] for row in rows]
        ours.note = f"{ours.note} † published: {FIGURES['source']}. {theirs.get('note', '')}".strip()
    for table in tables:
        if table.name == LOAD:
            add_load_test(table)
    return tables


def add_load_test(table: Table) -> None:
    """To a table of ours under load the published lines of each GPU as columns: beside the same server, model
    and task, or in rows of their own."""
    theirs = defaultdict(dict)
    for row in rows_of(FIGURES["tables"][SERVED]):
        cells = {f"{row['GPU'].text}: {title} †": row[name] for name, title in LINES.items()}
        theirs[tuple(row[name].text for name in ("server", "model", "task"))] |= cells
    added = sorted({column for cells in theirs.values() for column in cells}, key=order_of_load)
    matched = set()
    for row in table.rows:
        sweep = row[-1].runs[0]
        key = next((key for key in theirs if is_same(key, sweep)), None)
        matched.add(key)
        row += [theirs.get(key, {}).get(column, Cell("—")) for column in added]
    for key, cells in theirs.items():
        if key not in matched:
            row = {**dict(zip(table.columns, map(Cell, key), strict=False)), **cells}
            row["server"] = Cell(f"{key[0]} †")
            table.rows.append([row.get(column, Cell("—")) for column in [*table.columns, *added]])
    table.columns = [*table.columns, *added]
    table.note += (
        f" † published: {FIGURES['source']}, of the GPU named. Its RPS were offered, whether served or not, "
        "and its cost divides by them; ours compares with that at the rate it served."
    )


def order_of_load(column: str) -> tuple[bool, int]:
    gpu, _, title = column.removesuffix(" †").partition(": ")
    return gpu != "A10G", [*LINES.values()].index(title)


def is_same(key: tuple[str, str, str], sweep: Sweep) -> bool:
    """Whether a sweep is of a published server, size of Llama-2 and task."""
    server, model, task = key
    size = model.removeprefix("Llama-")
    llama = re.search(rf"\bllama-?2-{size}\b", sweep.content["model"], re.IGNORECASE)
    return sweep.server.casefold() == server.casefold() and task == sweep.task and bool(llama)


def rows_of(table: dict) -> list[dict[str, Cell]]:
    """Its rows by column; of the load test also USD per 1K tokens at the rate served, rate offered / rate
    served, and whether the formula gives the published price."""
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    for row in rows:
        if "requests/s served" in row:
            served, usd_per_hour = float(row["requests/s served"]), float(row["USD per hour"])
            more, offered = bound(row["requests/s offered"])
            low, high = prices_that_fit(row["per 1K tokens"], float(offered))
            would = f"${low:.2f} to {high:.2f}" if low else f"< ${high:.2f}"
            row["per 1K tokens, served"] = cost.usd_text(cost.usd(usd_per_hour, 1000 / TOKENS / served))
            row["offered / served"] = f"{more}{float(offered) / served:.1f}"
            row["fits the formula"] = "yes" if low <= usd_per_hour < high else f"no: {would} an hour would"
    return [{column: Cell(text) for column, text in row.items()} for row in rows]


def prices_that_fit(printed: str, offered: float) -> tuple[float, float]:
    """The USD per hour, from and below, at which price per hour / 3600 / `offered` per second / TOKENS x 1000
    gives the `printed` USD per 1K tokens, rounded or cut off at its last digit; from 0 for a bound "< $x"."""
    less, number = bound(printed)
    digit = 10.0 ** -len(number.partition(".")[2])
    low, high = 0 if less else float(number) - digit / 2, float(number) + digit
    per_hour = 3600 * offered * TOKENS / 1000
    return low * per_hour, high * per_hour


def bound(printed: str) -> tuple[str, str]:
    """The sign of a bound, "> " or "< ", else "", and the number without its "$"."""
    sign, number = re.fullmatch(r"([<>] )?\$?([\d.]+)", printed).groups("")
    return sign, number
