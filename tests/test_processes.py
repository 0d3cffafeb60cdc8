"""Several processes train and score what one does, each its share, and none waits for one that has ended."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DEMO_DATA, DEMO_MODEL, ROOT
from preloaded import kill, run_together, start_together
from safetensors.torch import load_file

from study import processes
from study.errors import UserError

TRAINING, SCORING = "llama2_classification.py", "llama2_classification_inference.py"
DATA = (
    f"--pretrained_ckpt={DEMO_MODEL}",
    f"--train_file={DEMO_DATA / 'posts_train.jsonl'}",
    f"--test_file={DEMO_DATA / 'posts_test.jsonl'}",
    "--price_per_hour=4",
)
# 13 steps of examples of unlike length, the last of one: fewer than processes.
SHORT = ("--epochs=1", "--max_train_samples=37", "--batch_size=3", "--learning_rate=3e-3", "--dropout=0.3")
SCORED = ("--max_eval_samples=60", "--eval_batch_size=4", "--max_new_tokens=12", "--merge=on")

# In float32 only the order of sums rounds. The first checkpoint comes at once.
IN_FLOAT32 = """
import runpy, sys
import torch
from study import device, training

def on_train_begin(self, *args, begin=training.Reporter.on_train_begin, **kwargs):
    begin(self, *args, **kwargs)
    self.saving = 0

training.Reporter.on_train_begin = on_train_begin
device.compute_dtype = lambda: torch.float32
sys.argv[0] = "{script}"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> dict[str, Path]:
    """The scripts in float32."""
    folder = tmp_path_factory.mktemp("float32")
    for name in (TRAINING, SCORING):
        (folder / name).write_text(IN_FLOAT32.format(script=ROOT / name))
    return {name: folder / name for name in (TRAINING, SCORING)}


def run(count: int, script: Path, folder: Path, *flags) -> str:
    """What the first of so many processes prints; the others print nothing."""
    first, *others = run_together(count, script, *DATA, *flags, "--experiment_dir", folder)
    for done in (first, *others):
        assert done.returncode == 0, done.stdout + done.stderr
    assert not any(done.stdout for done in others)
    return first.stdout


def kill_when(seen, count: int, script: Path, folder: Path, logs: Path, *flags) -> str:
    """Kill the last of so many processes as soon as `seen`. Returns what the first one writes to stderr, on
    whose end nobody waits long."""
    started = start_together(count, script, *DATA, *flags, "--experiment_dir", folder, folder=str(logs))
    while not seen():
        started[-1].join(0.001)
        assert started[-1].is_alive(), (logs / "err-0").read_text()
    kill(started[-1])
    began = time.monotonic()
    for process in started[:-1]:
        process.join(60)
        assert process.exitcode == 1
    assert time.monotonic() - began < 30
    said = [said_at_the_end((logs / f"err-{i}").read_text()) for i in range(count)]
    assert not any(said[1:])
    return said[0]


def said_at_the_end(stderr: str) -> str:
    lines = stderr.splitlines(keepends=True)
    return "".join(line for line in lines if line.startswith(("error", "interrupted", "Traceback")))


def apart(one: Path, other: Path) -> float:
    """How far adapters are from each other, relative to how far the first one's B has moved from 0."""
    a, b = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    moved = sum(a[name].double().norm() ** 2 for name in a if "lora_B" in name) ** 0.5
    return float(sum((a[name].double() - b[name].double()).norm() ** 2 for name in a) ** 0.5 / moved)


def record(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def alone(scripts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run(1, scripts[TRAINING], folder, *SHORT)
    return folder


def same_training(folder: Path, alone: Path) -> None:
    losses = [
        [loss for _, loss in record(run, "train.json")["train"]["loss_history"]] for run in (folder, alone)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert apart(alone, folder) < 1e-4
    assert {path.name for path in folder.iterdir()} == {"adapter", "train.json", ".lock"}


def test_two_processes_train_in_float32_what_one_does_with_its_dropout(scripts, alone, tmp_path):
    stdout = run(2, scripts[TRAINING], tmp_path, *SHORT)
    same_training(tmp_path, alone)
    two = record(tmp_path, "train.json")
    assert two["train"]["batching"]["processes"] == two["cost"]["gpus"] == 2
    assert "2 processes" in stdout
    assert two["cost"]["usd"] == pytest.approx(4 * two["train"]["wall_seconds"] / 3600)


def test_a_process_that_dies_ends_the_others_and_three_go_on_from_what_two_began(scripts, alone, tmp_path):
    folder, logs = tmp_path / "run", tmp_path / "logs"
    logs.mkdir()
    marked = lambda: list(folder.glob("checkpoints/checkpoint-*/progress.json"))
    line = kill_when(marked, 2, scripts[TRAINING], folder, logs, *SHORT)
    assert line == "error: another process of this run has ended: start it again and it goes on\n"
    assert record(folder, "train.json")["status"] == "failed"
    assert "resumed from checkpoint-" in run(3, scripts[TRAINING], folder, *SHORT)
    same_training(folder, alone)


def test_three_processes_score_and_two_go_on_with_their_answers(scripts, alone, tmp_path):
    folder, flags = tmp_path / "run", (*SCORED, "--decoding=constrained")
    shutil.copytree(alone, folder)
    run(1, scripts[SCORING], alone, *flags)
    [path], [predictions] = alone.glob("eval*.json"), alone.glob("predictions*.jsonl")
    files = [folder / f".{path.stem}.answers{end}.jsonl" for end in ("", "-1", "-2")]
    count = lambda file: len(file.read_text().splitlines()) - 2 if file.exists() else 0
    line = kill_when(lambda: count(files[-1]) > 0, 3, scripts[SCORING], folder, tmp_path, *flags)
    assert "another process of this run has ended" in line
    kept = sum(map(count, files))
    assert 0 < kept < 60

    stdout = run(2, scripts[SCORING], folder, *flags)
    assert f"resumed    {kept} of 60 answers are there" in stdout
    one, two = (record(run, path.name) for run in (alone, folder))
    assert (two["eval"]["processes"], two["cost"]["gpus"], one["cost"]["gpus"]) == (2, 2, 1)
    for name in ("input_tokens", "output_tokens", "examples", "metrics"):
        assert two["eval"][name] == one["eval"][name]
    texts = ((run / predictions.name).read_text() for run in (alone, folder))
    rows, others = ([json.loads(row) for row in text.splitlines()] for text in texts)
    for row, other in zip(rows, others, strict=True):
        assert row.pop("confidence") == pytest.approx(other.pop("confidence"), rel=1e-4)
        assert row == other
    assert not [*folder.glob(".eval*")]


NO_MEMORY = """
import os, runpy, sys
import torch
from study import paths

plain = paths.loss_sum

def loss_sum(*given):
    if os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory")
    return plain(*given)

paths.loss_sum = loss_sum
sys.argv[0] = "{script}"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_sum_of_losses_keeps_alive_no_gradients_of_its_step(tmp_path):
    script = tmp_path / "add_up.py"
    script.write_text(
        "import torch\n"
        "from study import processes\n\n"
        "processes.join()\n"
        "weight = torch.nn.Parameter(torch.zeros(1000))\n"
        "weight.grad = torch.ones(1000)\n"
        "total = processes.add_up([weight], torch.ones(()))\n"
        "print(weight.grad.sum().item(), total.item(), total.untyped_storage().nbytes())\n"
    )
    for done in run_together(2, script):
        assert done.stdout == "2000.0 2.0 4\n", done.stdout + done.stderr


def test_a_process_that_is_out_of_memory_says_so_with_its_number_and_ends_the_others(tmp_path):
    script = tmp_path / TRAINING
    script.write_text(NO_MEMORY.format(script=ROOT / TRAINING))
    first, other = run_together(2, script, *DATA, *SHORT, "--experiment_dir", tmp_path / "run")
    assert (first.returncode, other.returncode) == (1, 1)
    assert said_at_the_end(other.stderr).startswith("error: process 1: out of memory; train with a smaller")
    assert "another process of this run has ended" in said_at_the_end(first.stderr)
    assert record(tmp_path / "run", "train.json")["status"] == "failed"


def test_what_all_refuse_is_said_once(tmp_path):
    first, other = run_together(2, TRAINING, *DATA, "--experiment_dir", tmp_path, "--train_file=none.jsonl")
    assert (first.returncode, other.returncode) == (1, 1)
    assert said_at_the_end(first.stderr).count("error: ") == 1
    assert not other.stderr


def test_examples_are_shared_out_by_tokens_and_all_of_them_once():
    draw = random.Random(0)
    for count, parts in ((0, 2), (1, 3), (2, 3), (64, 2), (81, 3), (200, 8)):
        sizes = [draw.randint(1, 512) for _ in range(count)]
        shares = processes.share_out(sizes, parts)
        assert sorted(i for share in shares for i in share) == list(range(count))
        sums = [sum(sizes[i] for i in share) for share in shares]
        assert max(sums) - min(sums) <= max(sizes, default=0)
        if count >= 64:
            assert max(sums) < 1.03 * sum(sums) / parts
    assert processes.share_out([5, 1, 4, 2], 2) == [[0, 1], [2, 3]]


STUCK = """
import ctypes
from study import cli

def main(process):
    lock, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    libc.pthread_mutex_lock(lock)
    print("there", flush=True)
    libc.pthread_mutex_lock(lock)  # for ever, and no handler of Python's runs meanwhile

cli.STUCK = 0.1
cli.run_script(main, distributed=True)
"""


def test_a_process_that_waits_for_another_in_a_library_can_be_interrupted():
    env = os.environ | {"WORLD_SIZE": "2", "RANK": "0", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, "interrupted: start it again and it goes on\n")


ALONE = """
from study import cli, device
cli.run_script(lambda process: print(process.count, device.launched(), device.local_rank()))
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_script_for_one_process_runs_once_and_by_itself_though_several_are_launched(rank):
    env = os.environ | {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", ALONE], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == ("1 1 0\n" if rank == "0" else "")


@pytest.mark.parametrize(
    ("names", "sight", "message"),
    [
        (["NVIDIA H100"] * 3, 2, "3 processes, and 2 GPUs in sight: launch with --num_processes 2"),
        (["NVIDIA H100", "NVIDIA A100"], 2, "the GPUs are not alike .NVIDIA H100, NVIDIA A100.: choose"),
    ],
)
def test_too_few_gpus_and_unlike_ones_are_refused(monkeypatch, names, sight, message):
    for name, value in (
        ("is_available", lambda: True),
        ("device_count", lambda: sight),
        ("set_device", lambda _: None),
    ):
        monkeypatch.setattr(processes.torch.cuda, name, value)
    monkeypatch.setattr(processes.device, "name", lambda: names[0])
    monkeypatch.setattr(processes, "meet", lambda _: None)
    monkeypatch.setattr(processes, "everyone", lambda _: names)
    monkeypatch.setenv("WORLD_SIZE", str(len(names)))
    with pytest.raises(UserError, match=message):
        processes.join()
