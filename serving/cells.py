"""Tells serve_and_load.sh what it serves.

    python serving/cells.py about FOLDER            # task, adapter, kind, flags that name its test split
    python serving/cells.py wait URL PID SECONDS    # until the server is up: exit 0, or 1 and why not

FOLDER is a run or an export of serving/export.py.
"""

import json
import os
import shlex
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from study import cli
from study.device import Process
from study.errors import UserError
from study.records import record

NAMED = (  # flags of the load test that a run's settings answer
    *("pretrained_ckpt", "dataset", "train_file", "test_file", "delimiter", "test_fraction"),
    *("validation_fraction", "text_column", "label_column", "merge_labels", "unseen_labels"),
    *("dialogue_column", "summary_column", "drop_overlap", "max_train_samples"),
    *("max_seq_length", "max_new_tokens"),
)
EACH = 5  # seconds that one look at a server may take


def main(_: Process) -> None:
    match sys.argv[1:]:
        case ["about", folder]:
            print("\n".join(about(Path(folder))))
        case ["wait", url, pid, seconds]:
            wait(url, int(pid), float(seconds))
        case _:
            raise UserError("cells.py is for serve_and_load.sh: start that")


def about(folder: Path) -> list[str]:
    """Task, what the adapter's weights hash to, kind, and the flags, quoted for a shell. Raises UserError
    where it is neither a finished run nor an export."""
    exported = described(folder)
    trained = record.read((Path(exported["run"]) if exported else folder) / "train.json") or {}
    if not exported and (trained.get("status") != "finished" or trained.get("method") != "qlora"):
        raise UserError(f"{folder} is neither a finished run of llama2_*.py nor an export of one")
    told = exported or trained | {"adapter_sha256": trained["train"]["adapter_sha256"]}
    settings = trained.get("config", {}) | (exported or {})
    if exported:
        settings["pretrained_ckpt"] = str(folder)  # it has the tokenizer
    flags = ["--task_type", told["task"]]
    for name in NAMED:
        value = settings.get(name)
        if value is not None and value is not False:
            words = value if isinstance(value, list) else [] if value is True else [value]
            flags += [f"--{name}", *map(str, words)]
    return [told["task"], told["adapter_sha256"], "export" if exported else "run", shlex.join(flags)]


def described(folder: Path) -> dict | None:
    """What an export tells of itself; None of what is none."""
    try:
        return json.loads((folder / "export.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'export.json'} can't be read ({error}): export it again") from None


def wait(url: str, pid: int, seconds: float) -> None:
    """Until `url` answers with 200. Raises UserError where the process is gone or the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except OSError:
            raise UserError("it ended before it was up") from None
        try:
            with urllib.request.urlopen(url, timeout=EACH):
                return
        except (urllib.error.URLError, OSError, ValueError):
            time.sleep(0.2)
    raise UserError(f"it was not up within {seconds:g} s")


if __name__ == "__main__":
    cli.run_script(main)
