"""Several processes train and score what one does, each its share, and none waits for one that has ended."""

import json
from pathlib import Path

import pytest
from conftest import DEMO_DATA, DEMO_MODEL, ROOT
from preloaded import run_together
from safetensors.torch import load_file

TRAINING, SCORING = "llama2_classification.py", "llama2_classification_inference.py"
DATA = (
    f"--pretrained_ckpt={DEMO_MODEL}",
    f"--train_file={DEMO_DATA / 'posts_train.jsonl'}",
    f"--test_file={DEMO_DATA / 'posts_test.jsonl'}",
)
# 13 steps of examples of unlike length, the last of one: fewer than processes.
SHORT = ("--epochs=1", "--max_train_samples=37", "--batch_size=3", "--learning_rate=3e-3", "--dropout=0.3")

IN_FLOAT32 = """
import runpy, sys
import torch
from study import device

device.compute_dtype = lambda: torch.float32
sys.argv[0] = "{script}"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    """The training script in float32, where only the order of sums rounds."""
    path = tmp_path_factory.mktemp("float32") / TRAINING
    path.write_text(IN_FLOAT32.format(script=ROOT / TRAINING))
    return path


def train(count: int, script: Path, folder: Path, *flags) -> dict:
    """What `count` processes leave; only the first speaks."""
    first, *others = run_together(count, script, *DATA, *flags, "--experiment_dir", folder)
    for done in (first, *others):
        assert done.returncode == 0, done.stdout + done.stderr
    assert not any(done.stdout for done in others)
    return {"stdout": first.stdout, **json.loads((folder / "train.json").read_text())}


def apart(one: Path, other: Path) -> float:
    """How far adapters are from each other, relative to how far the first one's B has moved from 0."""
    a, b = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    moved = sum(a[name].double().norm() ** 2 for name in a if "lora_B" in name) ** 0.5
    return float(sum((a[name].double() - b[name].double()).norm() ** 2 for name in a) ** 0.5 / moved)


@pytest.fixture(scope="module")
def alone(script, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, train(1, script, folder, *SHORT)


@pytest.mark.parametrize("count", [2, 3])
def test_processes_train_in_float32_what_one_does_with_dropout_and_steps_of_one_example(
    alone, script, tmp_path, count
):
    folder, one = alone
    many = train(count, script, tmp_path, *SHORT)
    assert many["train"]["batching"]["processes"] == many["cost"]["gpus"] == count
    assert f"{count} processes" in many["stdout"]
    losses = [[loss for _, loss in run["train"]["loss_history"]] for run in (many, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert apart(folder, tmp_path) < 1e-4
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "train.json", ".lock"}
