"""The published study's figures (published.json) beside ours, as facts with their source, marked †.

Such a cell has no value, so that no mean, interval or comparison of ours can take it in.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from study.records import cost
from study.report.cells import Cell, Table

FIGURES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
TOKENS = 100  # about that many in each request of the study's load test


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
        ours.columns = list(dict.fromkeys([*ours.columns, *(column for row in rows for column in row)]))
        ours.rows = [[row.get(column, Cell("—")) for column in ours.columns] for row in rows]
        ours.note = f"{ours.note} † published: {FIGURES['source']}. {theirs.get('note', '')}".strip()
    return tables


def rows_of(table: dict) -> list[dict[str, Cell]]:
    """Its rows by column; for the load test also the price at the rate that was served, and by how many times
    the published one is less."""
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    for row in rows:
        if "requests/s served" in row:
            offered, served = (float(row[f"requests/s {rate}"].strip("> ")) for rate in ("offered", "served"))
            row["per 1K tokens, served"] = cost.usd_text(
                cost.usd(float(row["USD per hour"]), 1000 / TOKENS / served)
            )
            row["times more"] = f"{offered / served:.1f}"
    return [{column: Cell(text) for column, text in row.items()} for row in rows]
