"""What several tests need: the scripts as commands, the demo checkpoint, and small random ones of other
architectures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from study.device import Process, pass_over_libraries

# Before torch loads. Models this small gain little from a second thread and lose much where cores are shared;
# no test takes a GPU or the network.
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

PROCESS = Process("test")
ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = ROOT / "demo" / "model"
DEMO_DATA = ROOT / "demo" / "data"
# What a record of a classifier's training or evaluation says of it, as far as tables need it.
MEASURED = dict.fromkeys(("examples", "seconds", "wall_seconds", "peak_memory_gib", "tokens_per_second"), 1)
MEASURED |= dict.fromkeys(("examples_per_second", "input_tokens", "output_tokens"), 1)
MEASURED |= {
    "loss_history": [[1, 2.0]],
    "metrics": {name: {"value": 1, "ci95": [0, 2]} for name in ("accuracy", "macro_f1", "invalid_answers")},
}


def confidence_by_hand(model, prompt: list[int], answer: list[int], allowed, ends) -> float:
    """Of an answer, scored token by token in passes of its own: the product of its tokens' shares among those
    that `allowed` answers have there, all `ends` as one; in float64."""
    import torch

    product = 1.0
    for i, token in enumerate(answer):
        following = sorted({other[i] for other in allowed if other[:i] == answer[:i] and len(other) > i})
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer[:i]])).logits[0, -1, following]
        shares = dict(zip(following, logits.double().softmax(0).tolist(), strict=True))
        product *= sum(shares.get(end, 0) for end in ends) if token in ends else shares[token]
    return product


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real data sets and the Llama-2 tokenizer, named by REAL_DATA_DIR."""
    folder = os.environ.get("REAL_DATA_DIR")
    if not folder or not Path(folder).is_dir():
        pytest.skip("REAL_DATA_DIR does not name a folder with real data")
    return Path(folder)


# Triton's kernels on the CPU: chosen at import, so in a process of its own.
INTERPRETED = "tests/interpreter.py"


def pytest_collection_modifyitems(items: list) -> None:
    """Workers take files in this order. Those with programs of some minutes (`PROGRAMS`) begin, and the first
    letters of the alphabet, which are short, end: then no worker is alone for long."""
    items.sort(key=lambda item: item.path.name, reverse=True)
    items.sort(key=lambda item: not hasattr(item.module, "PROGRAMS"))


def pytest_collection_finish() -> None:
    pass_over_libraries()


def run_program(*command: str) -> subprocess.CompletedProcess:
    """Python on the CPU; words like NAME=value before the program are its environment."""
    words = [word for word in command if "=" in word]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT)} | dict(word.split("=", 1) for word in words)
    program = [sys.executable, *command[len(words) :]]
    return subprocess.run(program, env=env, cwd=ROOT, capture_output=True, text=True, check=False)


def run_script(script: str, *flags: object, **options) -> subprocess.CompletedProcess:
    """Run a script of this project as its user would, from anywhere."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    env = os.environ | options.pop("env", {})
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False, **options)


def error_line(done: subprocess.CompletedProcess) -> str:
    """The one line on stderr of a script that refused, which it must have done with exit status 1 or 2."""
    assert done.returncode in {1, 2}, done.stderr
    lines = done.stderr.strip().splitlines()
    assert "Traceback" not in done.stderr, done.stderr
    assert len([line for line in lines if not line.startswith("usage:")]) == 1, done.stderr
    return lines[-1]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
