"""--also_epochs: the runs that a training leaves on its way are those of fewer epochs, killed or not."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import DEMO_DATA, DEMO_MODEL, error_line
from preloaded import kill, run_preloaded, start_until

from study.records import cost
from study.report.spent import spent_in_all

SCRIPT = "llama2_summarization.py"
FLAGS = (
    *("--pretrained_ckpt", DEMO_MODEL, "--max_train_samples", "16", "--batch_size", "4", "--lora_r", "4"),
    *(f"--{split}_file={DEMO_DATA / f'dialogues_{split}.jsonl'}" for split in ("train", "test")),
    *("--learning_rate", "3e-3", "--price_per_hour", "36"),
)
MEASURED = {"seconds", "wall_seconds", "earlier_seconds", "tokens_per_second", "peak_memory_gib"}


def run(folder: Path, *flags: object) -> str:
    done = run_preloaded(SCRIPT, *FLAGS, "--output_dir", folder, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def folder_of(root: Path, epochs: int) -> Path:
    [folder] = root.glob(f"*_epochs-{epochs}_*")
    return folder


def content_of(root: Path, epochs: int) -> dict:
    return json.loads((folder_of(root, epochs) / "train.json").read_text())


def same(one: Path, other: Path, epochs: int) -> None:
    """All files of both runs but their records byte by byte, and these but for what was measured."""
    folders = folder_of(one, epochs), folder_of(other, epochs)
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in folders]
    assert names[0] == names[1] >= {"train.json", "adapter/adapter_model.safetensors"}
    for name in names[0] - {"train.json"}:
        paths = [folder / name for folder in folders]
        assert paths[0].is_dir() or paths[0].read_bytes() == paths[1].read_bytes(), name
    contents = [content_of(root, epochs) for root in (one, other)]
    for content in contents:
        for name in ("started", "finished", "cost", "left_by", "earlier"):
            content.pop(name, None)
        for name in ("output_dir", "also_epochs"):
            content["config"].pop(name)
        for name in MEASURED:
            content["train"].pop(name)
    assert contents[0] == contents[1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Runs of 1, 2 and 4 epochs, each by itself."""
    folder = tmp_path_factory.mktemp("alone")
    for epochs in (1, 2, 4):
        run(folder, "--epochs", epochs)
    return folder


@pytest.fixture(scope="module")
def nested(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nested")
    run(folder, "--epochs", 4, "--also_epochs", 2, 1)
    return folder


def test_they_are_those_that_a_run_of_so_many_epochs_leaves_by_itself(alone, nested):
    for epochs in (1, 2, 4):
        same(alone, nested, epochs)


def test_each_has_the_time_and_cost_of_a_run_that_had_ended_there_and_says_who_made_it(nested):
    contents = [content_of(nested, epochs) for epochs in (1, 2, 4)]
    for name in ("seconds", "wall_seconds", "tokens"):
        assert contents[0]["train"][name] < contents[1]["train"][name] < contents[2]["train"][name]
    for content in contents:
        assert content["cost"]["usd"] == pytest.approx(content["train"]["wall_seconds"] / 100)
    assert [content.get("left_by") for content in contents] == [folder_of(nested, 4).name] * 2 + [None]
    seconds = contents[2]["train"]["wall_seconds"]
    assert f", {cost.usd_text(seconds / 100)}." in spent_in_all([nested], [])  # none is counted twice


def test_what_is_finished_is_found_and_what_is_missing_trained(nested, alone, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(nested, copy)
    assert run(copy, "--epochs", 4, "--also_epochs", 1, 2).count("finished   ") == 3
    shutil.rmtree(folder_of(copy, 2))
    assert "2 epochs\n" in run(copy, "--epochs", 4, "--also_epochs", 1, 2)
    same(alone, copy, 2)


def test_a_run_that_is_past_a_missing_one_says_so(tmp_path):
    flags = (*FLAGS, "--output_dir", tmp_path, "--epochs", 12, "--also_epochs", 1)
    saved = lambda: [
        path
        for path in tmp_path.glob("*_epochs-12_*/checkpoints/*/progress.json")
        if int(path.parent.name.rpartition("-")[2]) >= 4
    ]
    kill(start_until(saved, SCRIPT, *flags))
    shutil.rmtree(folder_of(tmp_path, 1))
    line = error_line(run_preloaded(SCRIPT, *flags))
    assert re.search(r"--also_epochs 1: .*checkpoint-\d+ is past it, and that run is missing", line)
    assert "finished" not in json.dumps(content_of(tmp_path, 12)["status"])


def test_killed_anywhere_they_end_the_same(alone, tmp_path):
    # The first checkpoint is saved after two seconds, about half of 12 epochs on an idle machine.
    flags = ("--epochs", 12, "--also_epochs", 1, 8)
    saved = lambda: list(tmp_path.glob("*_epochs-12_*/checkpoints/checkpoint-*/progress.json"))
    kill(start_until(saved, SCRIPT, *FLAGS, "--output_dir", tmp_path, *flags))
    left = lambda: list(tmp_path.glob("*_epochs-8_*/train.json"))
    if not left():
        kill(start_until(left, SCRIPT, *FLAGS, "--output_dir", tmp_path, *flags))
    run(tmp_path, *flags)
    for epochs in (8, 12):
        run(alone, "--epochs", epochs)
    for epochs in (1, 8, 12):
        same(alone, tmp_path, epochs)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--epochs", "2", "--also_epochs", "2"], "--also_epochs 2: it is not below --epochs 2"),
        (["--epochs", "5", "--also_epochs", "2", "2"], "--also_epochs 2: it is twice"),
        (["--epochs", "5", "--also_epochs", "2", "--experiment_dir", "x"], "give --output_dir"),
    ],
)
def test_what_can_not_be_is_refused_in_one_line(flags, said, tmp_path):
    assert said in error_line(run_preloaded(SCRIPT, *FLAGS, *flags))
    assert not (tmp_path / "x").exists()
