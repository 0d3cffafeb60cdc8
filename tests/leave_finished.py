"""In place of a script that a loop starts: leave the finished record of its run, without data or a model.

python tests/leave_finished.py SCRIPT [flags of the script]
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prompts import prompt_sha256
from study import cli, several
from study.device import Process
from study.records import record, runs
from study.records.schema import PARTS, SCORES


def leave(script: str, words: list[str]) -> None:
    task = None if "baseline" in script else Path(script).stem.split("_")[1]
    args = cli.parse_args(task, "", words)
    for one in several.flags_of_each(args) if "_inference" in script else [args]:
        leave_one(script, task, one)


def leave_one(script: str, task: str | None, args: argparse.Namespace) -> None:
    method = getattr(args, "prompt_type", "qlora")
    folder, process = runs.folder_of(args, method), Process(script)
    trained = runs.finished_training(folder, args) if "_inference" in script and task else None
    args = runs.with_settings_of(trained, args) if trained else args
    part = "train" if task and not trained else "eval"
    path = folder / (runs.eval_name(args, trained["config"]) if trained else f"{part}.json")
    measured = {name.partition(".")[2]: 1 for name in PARTS[part].holds if name.startswith(f"{part}.")}
    value = 2 if os.environ.get("BETTER", "none") in str(folder) else 1
    metrics = {name: {"value": value, "ci95": [0, 3]} for name in SCORES[args.task]}
    split = {"source": "s", "rows": 1, "available": 1, "sha256": f"of {args.split}"}
    with record.locked(folder, process), record.recording(path, args, method, process) as content:
        content["prompt_sha256"] = prompt_sha256(args.task, "instruction" if task else method)
        content["data"] = {"train" if part == "train" else args.split: split}
        content["cost"] = {"device": "another", "gpu": "another", "price_per_hour": None}  # no estimate
        content.update(runs.scored_adapter(trained) if trained else {}, quantization={}, labels=[])
        content[part] = measured | {"loss_history": [], "metrics": metrics}


if __name__ == "__main__":
    leave(sys.argv[1], sys.argv[2:])
