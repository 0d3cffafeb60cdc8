"""Records -> tables. `python -m study.report FOLDER...` prints one row for each run."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from study import record
from study.cli import run_script

SCORES = {"classification": ("accuracy", "macro_f1"), "summarization": ("rouge1", "rouge2", "rougeL")}
TITLES = {"accuracy": "accuracy", "macro_f1": "macro F1", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


def result_block(content: dict) -> str:
    """What a script prints at its end, and for a run that is finished already."""
    lines = []
    if "train" in content:
        train = content["train"]
        lines.append(f"trained    loss {train['loss']:.4f} over the last epoch; {train['examples']:,} examples, "
                     f"{train['steps']:,} steps, {train['tokens']:,} tokens, {train['trainable_parameters']:,} "
                     f"trainable parameters")  # fmt: skip
        lines.append(spent(train, f"{train['tokens_per_second']:,.0f} tokens/s", content["cost"]))
    if "eval" in content:
        scored = content["eval"]
        for name, metric in scored["metrics"].items():
            low, high = metric["ci95"]
            lines.append(f"{name:<16}{metric['value']:6.2f} %  (95 % interval {low:.2f} to {high:.2f})")
        lines.append(f"scored     {scored['examples']:,} examples, {content['method']}, {scored['decoding']} decoding; "
                     f"{scored['input_tokens']:,} tokens in, {scored['output_tokens']:,} out")  # fmt: skip
        lines.append(spent(scored, f"{scored['examples_per_second']:,.1f} examples/s", content["cost"]))
    return "\n".join(lines)


def spent(part: dict, speed: str, cost: dict) -> str:
    return (
        f"spent      {part['wall_seconds']:,.0f} s in all, {part['seconds']:,.0f} s at {speed}, peak "
        f"{part['peak_memory_gib']:.2f} GiB, {money(cost['usd'])} on {cost['gpu']}"
    )


def money(usd: float | None) -> str:
    return "unknown price" if usd is None else f"${usd:,.4f}" if usd < 1 else f"${usd:,.2f}"


def rows_of(folder: Path) -> list[dict]:
    """One row for each evaluation in a run's folder, or one that says why there is none."""
    trained = record.read(folder / "train.json")
    evals = [record.read(path) for path in sorted(folder.glob("eval*.json"))]
    if not evals:
        state = record.status(folder / "train.json")
        return [{"content": trained, "state": "not scored" if state == "finished" else state, "folder": folder}]
    return [
        {"content": content, "trained": trained, "folder": folder,
         "state": None if content["status"] == "finished" else content["status"]}
        for content in evals
    ]  # fmt: skip


def cells(row: dict, scores: Sequence[str]) -> list[str]:
    """The columns of one row, as text."""
    content, trained = row["content"], row.get("trained")
    if content is None:
        return ["—", row["folder"].name, row["state"], *["—"] * (len(scores) + 5)]
    config, tuned = content["config"], content["method"] == "qlora"
    setting = [f"{config[name]:g}" if tuned else "—" for name in ("train_sample_fraction", "lora_r", "epochs", "dropout")]
    head = [content["task"], f"{record.model_name(content['model'])}, {content['method']}", *setting, str(config["seed"])]
    if row["state"]:
        return [*head, row["state"], *["—"] * (len(scores) + 2)]
    metrics = content["eval"]["metrics"]
    values = [interval(metrics[name]) if name in metrics else "—" for name in scores]
    parts = [content] + ([trained] if trained else [])
    seconds = sum(part.get("train", part.get("eval"))["wall_seconds"] for part in parts)
    peak = max(part.get("train", part.get("eval"))["peak_memory_gib"] for part in parts)
    prices = [part["cost"]["usd"] for part in parts]
    cost = None if None in prices else sum(prices)
    return [*head, *values, f"{seconds:,.0f}", f"{peak:.2f}", money(cost)]


def interval(metric: dict) -> str:
    low, high = metric["ci95"]
    return f"{metric['value']:.2f} ± {(high - low) / 2:.2f}"


def table(folders: Sequence[Path]) -> str:
    """One aligned table a task: method and setting, scores with half their 95 % interval, seconds, memory and cost.

    Seconds and cost are those of training and evaluation together, loading included.
    """
    rows = [row for folder in folders for row in rows_of(folder)]
    tables = []
    for task, scores in SCORES.items():
        mine = [row for row in rows if task_of(row) == task]
        if mine:
            titles = ["task", "model and method", "fraction", "rank", "epochs", "dropout", "seed"]
            titles += [TITLES[name] for name in scores] + ["seconds", "peak GiB", "cost"]
            tables.append(align([titles, *(cells(row, scores) for row in mine)]))
    return "\n\n".join(tables)


def task_of(row: dict) -> str:
    name = str(row["folder"])
    return row["content"]["task"] if row["content"] else "summarization" if "summarization" in name else "classification"


def align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a run's folder")
    print(table(parser.parse_args().folders))


if __name__ == "__main__":
    run_script(main)
