"""Scores of older records, made anew from their predictions.jsonl by the metrics as they are now."""

import json
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path

from study import metrics
from study.errors import UserError
from study.records import record, runs
from study.records.schema import NUMBER, part_of
from study.report.collect import records_in


def rescore(folders: Iterable[Path]) -> tuple[list[str], list[str]]:
    """Give every finished evaluation in the folders the present metrics. Returns a line on each, and one on
    each that can't be made anew, which stays as it is."""
    lines, problems = [], []
    every = {path for folder in folders for path in records_in(folder) if part_of(path) == "eval"}
    for path in sorted(path for path in every if not path.name.startswith(".")):
        try:
            lines.append(f"{path}: {made_anew(path)}")
        except UserError as error:
            problems.append(str(error))
    if not lines and not problems:
        problems = ["--rescore: the folders hold no evaluation: name the folder of a run, or one above it"]
    return lines, problems


def made_anew(path: Path) -> str:
    """Rewrite one record, and say what changed. Raises UserError where its predictions can't be read or are
    not those that it was made from."""
    content = record.read_whole(path)
    if content is None or content["status"] != "finished":
        return "not finished, left as it is"
    scored, rows = content["eval"], read_predictions(path, content)
    version = scored.get("metrics_version", "unknown")
    before = {name: metric["value"] for name, metric in scored["metrics"].items()}
    for name, metric in metrics.summed_up(content["task"], rows)["metrics"].items():
        if abs(before.get(name, metric["value"]) - metric["value"]) > 0.001:
            both = f"{path} has {name} {before[name]:.2f}, its predictions {metric['value']:.2f}"
            raise UserError(f"{both}: they are of another run")
    if content["task"] == "summarization":
        fresh = metrics.rouge_scores(*zip(*((row["parsed"], row["reference"]) for row in rows), strict=True))
        rows = [row | more for row, more in zip(rows, fresh, strict=True)]
    found = metrics.summed_up(content["task"], rows)
    if found["metrics_version"] == version and scored.get("per_example") == found["per_example"]:
        return "as it was"
    content["eval"] = scored | found
    content["rescored"] = {"from": version, "at": record.now(), "git_commit": record.commit()}
    record.write_json(path, content)
    name, now = next(iter(found["metrics"].items()))
    return f"{name} {before[name]:.2f} -> {now['value']:.2f}, metrics {version} -> {found['metrics_version']}"


def read_predictions(path: Path, content: dict) -> Sequence[dict]:
    """The rows beside an evaluation's record, in the order of the test data."""
    beside = runs.predictions_beside(path)
    try:
        lines = beside.read_text(encoding="utf-8").split("\n")  # texts hold other ends of lines
        rows = [json.loads(line) for line in lines if line]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} stays as it is: {beside.name} is not readable ({error})") from None
    kinds = {"parsed": str, "reference": str} | dict.fromkeys(metrics.ROUGE, NUMBER)
    if content["task"] == "classification":
        kinds = {"correct": bool, "parsed": str | None, "reference": str}
        if any("confidence" in row for row in rows if isinstance(row, dict)):
            kinds["confidence"] = NUMBER
    whole = len(rows) == content["eval"]["examples"] > 0 and all(
        isinstance(row, dict)
        and all(key in row and isinstance(row[key], kind) for key, kind in kinds.items())
        for row in rows
    )
    places = [row.get("index") for row in rows] if whole else []
    ordered = all(isinstance(place, int) for place in places) and len({*places}) == len(places)
    if not whole or not (ordered or {*places} == {None}):
        raise UserError(f"{path} stays as it is: {beside.name} is not whole")
    return sorted(rows, key=itemgetter("index")) if ordered else rows
