"""The shell loops: their grids, what they pass on, and what a failing cell does to the others."""

import itertools
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_rows

from study import cli, data, metrics, record, runs

TRAIN, SCORE = (str(ROOT / f"llama2_classification{part}.py") for part in ("", "_inference"))
ONE_CELL = {"RANKS": "4", "EPOCHS": "2", "DROPOUTS": "0.1"}


def loop(script: str, *flags: object, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """Run a loop from another folder, with the interpreter of these tests as its `python`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ours = {"LAUNCH", "TASK", "TASKS", "MODELS", "RANKS", "EPOCHS", "DROPOUTS", "FRACTIONS", "SEEDS"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [str(ROOT / script), *map(str, flags)],
        cwd=cwd,
        env={**kept, "PATH": path, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", **env},
        capture_output=True,
        text=True,
        check=False,
    )


def grid(script: str, *flags: object, cwd: Path, **env: str) -> dict[str, str]:
    """The folders that a dry run names, and how they stand."""
    done = loop(script, "--output_dir", "runs", *flags, "--dry_run", cwd=cwd, **env)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split("  ") for line in done.stdout.splitlines() if "  runs/" in line]
    cells = {folder.removeprefix("runs/"): state for state, folder in lines}
    assert len(cells) == len(lines) == done.stdout.count("\n[")
    assert not list(cwd.glob("runs"))
    return cells


def tuned(task="summarization", *, fraction="1.0", epochs="5", rank="8", dropout="0.1", seed="42") -> str:
    return f"{task}-sampleFraction-{fraction}_epochs-{epochs}_rank-{rank}_dropout-{dropout}_seed-{seed}"


def launcher(folder: Path, body: str) -> dict[str, str]:
    """LAUNCH: a command that notes its arguments in `folder`/calls, a JSON list a line, and runs `body`."""
    path = folder / "launch"
    note = 'import json, sys; print(json.dumps(sys.argv[2:]), file=open(sys.argv[1], "a"))'
    path.write_text(f"#!/usr/bin/env bash\npython -c '{note}' {folder}/calls \"$@\"\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {"LAUNCH": str(path)}


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


# Grids


def test_run_lora_lists_exactly_the_72_published_cells(tmp_path):
    cells = itertools.product(
        ["2", "4", "8", "16"], ["2", "5", "10", "20", "30", "50"], ["0.1", "0.2", "0.5"]
    )
    names = [tuned(rank=rank, epochs=epochs, dropout=dropout) for rank, epochs, dropout in cells]
    found = grid("run_lora.sh", cwd=tmp_path)
    assert len(names) == 72
    assert found == dict.fromkeys(names, "not started")


def test_run_lora_takes_lists_and_task_from_the_environment(tmp_path):
    env = {"RANKS": "8 64", "EPOCHS": "1", "DROPOUTS": "0 0.3", "TASK": "classification"}
    names = [
        tuned("classification", rank=rank, epochs="1", dropout=dropout)
        for rank, dropout in itertools.product(("8", "64"), ("0.0", "0.3"))
    ]
    assert list(grid("run_lora.sh", cwd=tmp_path, **env)) == names


@pytest.mark.parametrize(
    ("env", "fractions", "seeds"),
    [
        ({}, "0.025 0.05 0.1 0.25 0.5 1.0", "42"),
        ({"FRACTIONS": "0.025 1", "SEEDS": "1 2 3"}, "0.025 1.0", "1 2 3"),
    ],
)
def test_sample_ablate_lists_fractions_and_seeds(tmp_path, env, fractions, seeds):
    cells = itertools.product(fractions.split(), seeds.split())
    names = [tuned("classification", fraction=fraction, seed=seed) for fraction, seed in cells]
    assert list(grid("sample_ablate.sh", cwd=tmp_path, **env)) == names


@pytest.mark.parametrize(
    ("env", "models", "tasks"),
    [
        ({}, "NousResearch/Llama-2-7b-hf NousResearch/Llama-2-13b-hf", "classification summarization"),
        ({"MODELS": "a/b", "TASKS": "summarization"}, "a/b", "summarization"),
    ],
)
def test_baseline_inference_lists_models_tasks_and_prompts(tmp_path, env, models, tasks):
    cells = itertools.product(models.replace("/", "--").split(), tasks.split(), ("zero-shot", "few-shot"))
    names = [f"baseline/{'/'.join(cell)}" for cell in cells]
    assert list(grid("baseline_inference.sh", cwd=tmp_path, **env)) == names


# What is passed on


def test_every_cell_is_trained_and_scored_with_the_flags_as_they_were_written(tmp_path):
    words = [
        "--gpu_name",
        "my  own card",
        "--report_to",
        "*",
        "--price-per-hour=2",
        "--dataset",
        "it's $HOME",
    ]
    env = {**launcher(tmp_path, "exit 0"), **ONE_CELL, "RANKS": "4 8", "TASK": "classification"}
    done = loop("run_lora.sh", *words, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert calls(tmp_path) == [
        [script, "--lora_r", rank, "--epochs", "2", "--dropout", "0.1", *words]
        for rank in ("4", "8")
        for script in (TRAIN, SCORE)
    ]


def test_launch_may_be_a_command_with_arguments(tmp_path):
    env = launcher(tmp_path, "exit 0")
    env["LAUNCH"] += " launch --num_processes 2"
    done = loop("sample_ablate.sh", cwd=tmp_path, FRACTIONS="0.5", **env)
    assert done.returncode == 0, done.stderr
    flags = ["--train_sample_fraction", "0.5", "--seed", "42"]
    assert calls(tmp_path) == [
        ["launch", "--num_processes", "2", script, *flags] for script in (TRAIN, SCORE)
    ]


def test_a_baseline_cell_is_one_script_with_its_task_and_prompt(tmp_path):
    env = {**launcher(tmp_path, "exit 0"), "MODELS": "a/b", "TASKS": "summarization"}
    done = loop("baseline_inference.sh", "--shots", "3", cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert calls(tmp_path) == [
        [
            str(ROOT / "llama2_baseline_inference.py"),
            *(
                "--pretrained_ckpt",
                "a/b",
                "--task_type",
                "summarization",
                "--prompt_type",
                prompt,
                "--shots",
                "3",
            ),
        ]
        for prompt in ("zero-shot", "few-shot")
    ]


@pytest.mark.parametrize("script", ["run_lora.sh", "sample_ablate.sh", "baseline_inference.sh"])
def test_an_unknown_flag_ends_a_loop_before_anything_runs(tmp_path, script):
    done = loop(script, "--no_such_flag", "1", cwd=tmp_path, **launcher(tmp_path, "exit 0"))
    assert done.returncode == 2
    assert "unrecognized arguments: --no_such_flag 1" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["launch"]


# Failing and finished cells


def finish_cell(folder: Path, rank: int, files: tuple) -> Path:
    """Leave a finished training and its evaluation in `folder`, as the scripts do but without a model."""
    words = map(str, ("--lora_r", rank, "--epochs", 2, "--dropout", 0.1, "--output_dir", folder, *files))
    args = cli.parse_args("classification", "", list(words))
    splits = {name: split.describe() for name, split in data.load(args, ["train", "test"]).items()}
    path = runs.experiment_dir(args) / "train.json"
    path.parent.mkdir(parents=True)
    spent = {"examples": 4, "seconds": 1.0, "wall_seconds": 2.0, "peak_memory_gib": 0.5}
    with record.recording(path, args, "qlora", runs.training_settings(args)) as trained:
        trained |= {
            "data": {"train": splits["train"]},
            "labels": ["a", "b"],
            "cost": {"usd": 0.5, "gpu": "CPU"},
        }
        steps = {"loss": 0.1, "steps": 1, "tokens": 9, "trainable_parameters": 9, "tokens_per_second": 9.0}
        trained["train"] = spent | steps
    args = cli.parse_args(
        "classification", "", ["--experiment_dir", str(path.parent), "--output_dir", str(folder)]
    )
    trained = runs.finished_training(path.parent, args)
    with record.recording(path.parent / "eval.json", args, "qlora", runs.SCORED) as scored:
        scored |= {"data": {"test": splits["test"]}, "training": trained["finished"], "cost": trained["cost"]}
        scores, _ = metrics.score("classification", ["a", "b", "b", "b"], ["a", "b", "a", "b"], ["a", "b"])
        read = {"examples_per_second": 4.0, "input_tokens": 9, "output_tokens": 9, "decoding": "free"}
        scored["eval"] = spent | read | {"metrics": scores}
    return path.parent


@pytest.fixture
def files(tmp_path) -> tuple:
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(4)]
    paths = [write_rows(tmp_path / f"{split}.jsonl", rows) for split in ("train", "test")]
    return "--train_file", paths[0], "--test_file", paths[1]


def test_a_failed_cell_stops_no_other_and_is_named_at_the_end(tmp_path, files):
    for rank in (2, 8):
        finish_cell(tmp_path / "runs", rank, files)
    refuse = 'case $* in *"--lora_r 4"*) exit 7 ;; esac\nexec python "$@"'
    env = {**launcher(tmp_path, refuse), **ONE_CELL, "RANKS": "2 4 8", "TASK": "classification"}
    done = loop("run_lora.sh", *files, "--output_dir", tmp_path / "runs", cwd=tmp_path, **env)
    assert done.returncode == 1
    title, failed = done.stderr.strip().splitlines()
    assert title == "error: 1 of 3 cells failed:"
    assert failed.startswith(f"  {TRAIN} --lora_r 4 --epochs 2 --dropout 0.1 --train_file")
    assert failed.endswith("(exit 7)")
    # The failed training is not scored; the finished cells are looked up by both scripts.
    assert [(call[0], call[2]) for call in calls(tmp_path)] == [
        (TRAIN, "2"),
        (SCORE, "2"),
        (TRAIN, "4"),
        (TRAIN, "8"),
        (SCORE, "8"),
    ]
    first, failed, last = (line.split() for line in done.stdout.splitlines()[-3:])
    assert first[:5] == ["classification", "qlora", "2", "—", "75.00"]
    assert last[:5] == ["classification", "qlora", "8", "—", "75.00"]
    assert failed[1].startswith(tuned("classification", epochs="2", rank="4"))
    assert failed[2:5] == ["—", "not", "started"]


def test_a_dry_run_says_which_cells_are_finished_and_runs_none(tmp_path, files):
    finish_cell(tmp_path / "runs", 4, files)
    env = {**launcher(tmp_path, "exit 1"), **ONE_CELL, "RANKS": "4 8", "TASK": "classification"}
    done = loop("run_lora.sh", *files, "--output_dir", tmp_path / "runs", "--dry-run", cwd=tmp_path, **env)
    states = [
        line.partition("  ")[0] for line in done.stdout.splitlines() if str(tmp_path / "runs") + "/" in line
    ]
    assert (done.returncode, states) == (0, ["finished", "not started"])
    assert not (tmp_path / "calls").exists()


def test_cells_that_all_fail_are_all_tried_and_named(tmp_path):
    flags = ("--train_file", "none.jsonl", "--output_dir", "runs")
    done = loop("sample_ablate.sh", *flags, cwd=tmp_path, FRACTIONS="0.5 1.0")
    assert done.returncode == 1
    assert done.stderr.count("--train_file none.jsonl: there is no such file") == 2
    named = done.stderr.partition("error: 2 of 2 cells failed:\n")[2].splitlines()
    assert [line.split()[2] for line in named] == ["0.5", "1.0"]


def test_an_interrupted_cell_ends_the_loop(tmp_path):
    done = loop("sample_ablate.sh", cwd=tmp_path, FRACTIONS="0.5 1.0", **launcher(tmp_path, "exit 130"))
    assert done.returncode == 130
    assert len(calls(tmp_path)) == 1


def test_a_damaged_record_fails_its_own_cell_only(tmp_path, files):
    damaged, _ = [finish_cell(tmp_path / "runs", rank, files) for rank in (2, 8)]
    (damaged / "train.json").write_text('{"schema": 1, "sta')
    (damaged / "eval.json").unlink()
    env = {**ONE_CELL, "RANKS": "2 8", "TASK": "classification"}
    done = loop("run_lora.sh", *files, "--output_dir", tmp_path / "runs", cwd=tmp_path, **env)
    assert done.returncode == 1
    assert "error: 1 of 2 cells failed:" in done.stderr
    assert "75.00" in done.stdout
