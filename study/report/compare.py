"""A paired test of two evaluations of the same test examples."""

import json
from collections.abc import Sequence
from pathlib import Path

from study import metrics
from study.errors import UserError
from study.records import runs
from study.records.record import read_whole
from study.records.schema import NUMBER, PARTS, SCORES


def compare(paths: Sequence[Path]) -> str:
    """Both scores, their difference with its 95 % interval, and p. Raises UserError where the two runs were
    not scored on the same examples in the same way."""
    from tabulate import tabulate

    sides = [read_scored(scored_in(path)) for path in paths]
    (ours, rows), (_, others) = sides
    for what, one, other in (
        (
            "test examples",
            *(content["data"][content["config"]["split"]]["sha256"][:8] for content, _ in sides),
        ),
        ("metric versions", *(content["eval"].get("metrics_version") for content, _ in sides)),
    ):
        if one != other:
            raise UserError(f"--compare: {paths[0]} and {paths[1]} have different {what}: {one}, {other}")
    result, table = metrics.compare(rows, others), []
    for name, title in SCORES[ours["task"]].items():
        scores = [f"{content['eval']['metrics'][name]['value']:.2f}" for content, _ in sides]
        low, high = result[name]["ci95"]
        difference = f"{result[name]['value']:+.2f}", f"{low:+.2f} to {high:+.2f}", f"{result[name]['p']:.4f}"
        table.append([title, *scores, *difference])
    lines = [f"A: {paths[0]}", f"B: {paths[1]}", ""]
    lines.append(
        tabulate(table, ["", "A", "B", "A - B", "95 % interval", "p"], "github", disable_numparse=True)
    )
    lines += ["", f"Paired bootstrap over the same {len(rows):,} test examples."]
    if "mcnemar_p" in result.get("accuracy", {}):
        exact = result["accuracy"]
        alone = f"A alone is right {exact['won']:,} times, B alone {exact['lost']:,} times"
        lines.append(f"McNemar's exact test: {alone}, p = {exact['mcnemar_p']:.2g}.")
    return "\n".join(lines)


def scored_in(path: Path) -> Path:
    """The evaluation's record that `path` is, or that lies in this folder of a run: eval.json, or the only
    one. Raises UserError where there are several others."""
    if not path.is_dir():
        return path
    names = sorted(found.name for found in path.glob(PARTS["eval"].files))
    if "eval.json" in names or len(names) < 2:
        return path / (names[0] if len(names) == 1 else "eval.json")
    raise UserError(f"--compare {path} has several evaluations: name one of {', '.join(names)}")


def read_scored(path: Path) -> tuple[dict, list[dict]]:
    """A finished evaluation's record and predictions. Raises UserError where either lacks or is not whole."""
    content, predictions = read_whole(path, "eval"), runs.predictions_beside(path)
    if not content or content["status"] != "finished":
        raise UserError(f"--compare {path}: there is no finished evaluation")
    try:
        lines = predictions.read_text(encoding="utf-8").split("\n")  # texts hold other ends of lines
        rows = [json.loads(line) for line in lines if line]
    except (OSError, ValueError) as error:
        raise UserError(f"--compare: {predictions} is not readable ({error}): --force redoes it") from None
    kinds = dict.fromkeys(metrics.ROUGE, NUMBER)
    if content["task"] == "classification":
        kinds = {"correct": bool, "parsed": str | None, "reference": str}
    if len(rows) != content["eval"]["examples"] or not all(
        isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in kinds.items())
        for row in rows
    ):
        raise UserError(f"--compare: {predictions} is not whole: --force redoes it")
    # In the order of the test data, whatever a file was sorted by since. Both sides have the same examples;
    # the numbers of their rows may differ.
    if all(isinstance(row.get("index"), int) for row in rows):
        rows.sort(key=lambda row: row["index"])
    return content, rows
