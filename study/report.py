"""Records -> tables. `python -m study.report FOLDER...` prints one row for each run."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from study import record, runs
from study.cli import UserError, run_script

SCORES = {"classification": ("accuracy", "macro_f1"), "summarization": ("rouge1", "rouge2", "rougeL")}
SETTINGS = {
    "train_sample_fraction": "fraction",
    "lora_r": "rank",
    "epochs": "epochs",
    "dropout": "dropout",
    "seed": "seed",
}
TITLES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
}


def result_block(content: dict) -> str:
    """What a script prints at its end, and for a run that is finished already."""
    lines = []
    if "train" in content:
        train = content["train"]
        lines.append(
            f"trained    loss {train['loss']:.4f} over the last epoch; {train['examples']:,} examples, "
            f"{train['steps']:,} steps, {train['tokens']:,} tokens, {train['trainable_parameters']:,} "
            f"trainable parameters"
        )
        lines.append(spent(train, f"{train['tokens_per_second']:,.0f} tokens/s", content["cost"]))
    if "eval" in content:
        scored = content["eval"]
        for name, metric in scored["metrics"].items():
            low, high = metric["ci95"]
            lines.append(f"{name:<16}{metric['value']:6.2f} %  (95 % interval {low:.2f} to {high:.2f})")
        lines.append(
            f"scored     {scored['examples']:,} examples, {content['method']}, {scored['decoding']} "
            f"decoding, {scored['input_tokens']:,} tokens in, {scored['output_tokens']:,} out"
        )
        lines.append(spent(scored, f"{scored['examples_per_second']:,.1f} examples/s", content["cost"]))
    return "\n".join(lines)


def spent(part: dict, speed: str, cost: dict) -> str:
    return (
        f"spent      {part['wall_seconds']:,.0f} s in all, {part['seconds']:,.0f} s at {speed}, peak "
        f"{part['peak_memory_gib']:.2f} GiB, {money(cost['usd'])} on {cost['gpu']}"
    )


def money(usd: float | None) -> str:
    return "unknown price" if usd is None else f"${usd:,.4f}" if usd < 1 else f"${usd:,.2f}"


def rows_of(folder: Path) -> list[dict[str, str]]:
    """One table row for each evaluation in a run's folder, or one that says why there is none; columns by
    title."""
    trained = record.read(folder / "train.json")
    evals = [record.read(path) for path in sorted(folder.glob("eval*.json"))]
    if evals:
        return [scored_row(content, trained) for content in evals]
    state = record.status(folder / "train.json")
    if trained:
        return [settings_row(trained) | {"state": "not scored" if state == "finished" else state}]
    task = next((task for task in SCORES if task in f"{folder.parent.name} {folder.name}"), "—")
    return [{"task": task, "method": folder.name, "state": state}]


def readable_rows(folder: Path) -> list[dict[str, str]]:
    try:
        return rows_of(folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return [{"task": "—", "method": folder.name, "state": "unreadable"}]


def settings_row(content: dict) -> dict[str, str]:
    config, tuned = content["config"], content["method"] == "qlora"
    row = {"task": content["task"], "model": runs.model_name(content["model"]), "method": content["method"]}
    named = {SETTINGS[name]: f"{config[name]:g}" for name in SETTINGS if tuned or name == "seed"}
    return row | named | {"decoding": config.get("decoding", "free")}


def scored_row(content: dict, trained: dict | None) -> dict[str, str]:
    """Scores with half their 95 % interval; seconds, memory and cost of training and evaluation together,
    loading included."""
    row = settings_row(content)
    if content["status"] != "finished":
        return row | {"state": content["status"]}
    parts = [content["eval"]] + ([trained["train"]] if trained else [])
    prices = [part["cost"]["usd"] for part in (content, trained) if part]
    return row | {
        **{TITLES[name]: interval(content["eval"]["metrics"][name]) for name in SCORES[content["task"]]},
        "seconds": f"{sum(part['wall_seconds'] for part in parts):,.0f}",
        "peak GiB": f"{max(part['peak_memory_gib'] for part in parts):.2f}",
        "cost": money(None if None in prices else sum(prices)),
    }


def interval(metric: dict) -> str:
    low, high = metric["ci95"]
    return f"{metric['value']:.2f} ± {(high - low) / 2:.2f}"


def table(folders: Sequence[Path]) -> str:
    """One aligned table of all runs. A column that says the same in every row is left out, but for
    results."""
    rows = [row for folder in folders for row in readable_rows(folder)]
    results = [*TITLES.values(), "seconds", "peak GiB", "cost"]
    titles = [
        title
        for title in ("task", "model", "method", *SETTINGS.values(), "decoding", "state", *results)
        if len({row[title] for row in rows if title in row})
        > (title not in ("task", "method", "state", *results))
    ]
    lines = [titles, *([row.get(title, "—") for title in titles] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a run's folder")
    text = table(parser.parse_args().folders)
    print(text)
    if "unreadable" in text:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
