"""The shell loops: their grids, what they pass on, what a failing cell does to the others, what they will
take."""

import itertools
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROCESS, ROOT, error_line, write_rows

from prompts import prompt_sha256
from study import cli, data, device, metrics
from study.errors import UserError
from study.records import estimate, record, runs
from study.records.schema import PARTS

TRAIN, SCORE = (str(ROOT / f"llama2_classification{part}.py") for part in ("", "_inference"))
ONE_CELL = {"RANKS": "4", "EPOCHS": "2", "DROPOUTS": "0.1"}


def loop(script: str, *flags: object, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """Run a loop from another folder, with the interpreter of these tests as its `python`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ours = {
        "LEARNING_RATES",
        "LAUNCH",
        "TASK",
        "TASKS",
        "MODELS",
        "RANKS",
        "EPOCHS",
        "DROPOUTS",
        "FRACTIONS",
        "SEEDS",
        "ONLY",
        "LIST",
    }
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
    cells = {folder.removeprefix("runs/"): state for state, folder, _ in lines}
    assert {estimate for *_, estimate in lines} == {"unknown time, unknown price"}
    assert len(cells) == len(lines) == done.stdout.count("\n[")
    assert f", {len(cells)} cells, {len(cells)} of them without an estimate" in done.stdout.splitlines()[-1]
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


PRICED = ("--price_per_hour", 36)
FINISH = f'exec python {ROOT}/tests/leave_finished.py "$@"'


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


FILE = {"sha256": "5", "source": "s", "rows": 1}
WHOLE = {"script": "", "finished": "", "prompt_sha256": "", "environment": {}}
PERFECT = {name: {"value": 100, "ci95": [100, 100]} for name in ("rouge1", "rouge2", "rougeL")}


def leave_record(
    folder: Path, part: str, *, seconds: float, loading: float, examples: int = 10, **other
) -> Path:
    """Write by hand a finished record of 1,000 train or 200 test examples; `other` differs from the plain."""
    split, available = ("train", 1000) if part == "train" else ("test", 200)
    config = vars(cli.parse_args("summarization", "", [])) | {"epochs": 1, "given": []}
    config |= {name: other.pop(name) for name in config.keys() & other.keys() - {"task"}}
    plain = {"task": "summarization", "method": "qlora", "model": config["pretrained_ckpt"]}
    plain["gpu"] = device.processor()
    about = plain | other
    spent = {name.partition(".")[2]: 0 for name in PARTS[part].holds if name.startswith(f"{part}.")}
    spent |= {
        "loss_history": [],
        "metrics": PERFECT,
        "examples": examples,
        "seconds": seconds,
        "wall_seconds": seconds + loading,
    }
    content = {
        **{"schema": 1, "status": "finished", "cost": {"gpu": about.pop("gpu")}, "config": config},
        **{"data": {split: {"available": available, **FILE}}, part: spent, **WHOLE},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{part}.json"
    path.write_text(json.dumps(content | about))
    return path


# Grids


def test_run_lora_lists_exactly_the_72_published_cells(tmp_path):
    cells = itertools.product(
        ["2", "4", "8", "16"], ["0.1", "0.2", "0.5"], ["2", "5", "10", "20", "30", "50"]
    )
    names = [tuned(rank=rank, epochs=epochs, dropout=dropout) for rank, dropout, epochs in cells]
    # 36 s an epoch and 100 s to load; 100 s to score, and 60 s to load for it.
    leave_record(tmp_path / "earlier" / "runs", "train", seconds=3.6, examples=100, loading=100)
    leave_record(tmp_path / "earlier" / "runs", "eval", seconds=5, examples=10, loading=60)
    flags = (*PRICED, "--output_dir", tmp_path / "earlier", "--dry_run")
    done = loop("run_lora.sh", *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split("  ") for line in done.stdout.splitlines() if "earlier/summ" in line]
    assert len(names) == 72
    assert [Path(folder).name for _, folder, _ in lines] == names
    assert {state for state, *_ in lines} == {"not started"}
    assert [estimate for *_, estimate in lines[:2]] == ["5.5 min, $3.32", "7.3 min, $4.40"]
    assert lines[-1][-1] == "34.3 min, $20.60"
    # 12 trainings of 50 epochs and 100 s to load, 160 s to score each of the 72 cells; one by one 12 settings
    # of 2 + 5 + 10 + 20 + 30 + 50 epochs, and 260 s for each cell.
    assert done.stdout.splitlines()[-1] == "in all: 9.5 h, $343.20, 72 cells (one by one: 19.2 h, $692.64)"


def test_run_lora_takes_lists_and_task_from_the_environment(tmp_path):
    env = {"RANKS": "8 64", "EPOCHS": "1", "DROPOUTS": "0 0.3", "SEEDS": "7 8", "TASK": "classification"}
    names = [
        tuned("classification", rank=rank, epochs="1", dropout=dropout, seed=seed)
        for rank, dropout, seed in itertools.product(("8", "64"), ("0.0", "0.3"), "78")
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


def test_baseline_inference_draws_few_shot_examples_by_every_seed_and_zero_shot_once(tmp_path):
    cells = [("zero-shot", "42"), ("few-shot", "42"), ("few-shot", "7"), ("few-shot", "8")]
    names = [
        str(runs.folder_of(cli.parse_args(None, "", ["--prompt_type", prompt, "--seed", seed]), prompt))
        for prompt, seed in cells
    ]
    env = {"MODELS": "NousResearch/Llama-2-7b-hf", "TASKS": "classification", "SEEDS": "42 7 8"}
    found = grid("baseline_inference.sh", cwd=tmp_path, **env)
    assert list(found) == [name.removeprefix("experiments/") for name in names]


# What is passed on


def folder_of(root: Path, rank: str) -> str:
    [folder] = (root / "experiments").glob(f"*_rank-{rank}_*")
    return str(folder.relative_to(root))


def test_every_cell_is_trained_and_scored_with_the_flags_as_they_were_written(tmp_path):
    words = [
        "--test_file",
        "my  own file",
        "--report_to",
        "*",
        "--price-per-hour=2",
        "--dataset",
        "it's $HOME",
    ]
    env = {**launcher(tmp_path, FINISH), **ONE_CELL, "RANKS": "4 8", "TASK": "classification"}
    done = loop("run_lora.sh", *words, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert calls(tmp_path) == [
        call
        for rank in ("4", "8")
        for call in (
            [TRAIN, "--lora_r", rank, "--epochs", "2", "--dropout", "0.1", "--seed", "42", *words],
            [SCORE, "--experiment_dir", folder_of(tmp_path, rank), *words],
        )
    ]


def test_launch_may_be_a_command_with_arguments(tmp_path):
    env = launcher(tmp_path, "shift 3\n" + FINISH)
    env["LAUNCH"] += " launch --num_processes 2"
    done = loop("sample_ablate.sh", cwd=tmp_path, FRACTIONS="0.5", **env)
    assert done.returncode == 0, done.stderr
    flags = ["--train_sample_fraction", "0.5", "--seed", "42"]
    launch = ["launch", "--num_processes", "2"]
    [folder] = (tmp_path / "experiments").iterdir()
    scoring = [SCORE, "--experiment_dir", f"experiments/{folder.name}"]
    assert calls(tmp_path) == [[*launch, TRAIN, *flags], [*launch, *scoring]]


def test_the_baselines_of_a_model_are_scored_by_one_process_each_with_its_task_and_prompt(tmp_path):
    env = {**launcher(tmp_path, FINISH), "MODELS": "a/b", "TASKS": "summarization"}
    done = loop("baseline_inference.sh", "--shots", "3", cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    words = ("--pretrained_ckpt", "a/b", "--task_type", "summarization", "--prompt_type", "few-shot")
    script = str(ROOT / "llama2_baseline_inference.py")
    assert calls(tmp_path) == [[script, *words, "--seed", "42", "--shots", "3"]]  # the last, for all of them
    records = (tmp_path / "experiments/baseline/a--b/summarization").glob("*/eval.json")
    found = {content["method"]: content["config"]["shots"] for content in map(record.read, records)}
    assert found == {"zero-shot": None, "few-shot": 3}


@pytest.mark.parametrize("script", ["run_lora.sh", "sample_ablate.sh", "baseline_inference.sh"])
def test_an_unknown_flag_ends_a_loop_before_anything_runs(tmp_path, script):
    done = loop(script, "--no_such_flag", "1", cwd=tmp_path, **launcher(tmp_path, "exit 0"))
    assert done.returncode == 2
    assert "unrecognized arguments: --no_such_flag 1" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["launch"]


# Failing and finished cells


def finish_cell(folder: Path, rank: int, files: tuple, epochs: int = 2) -> Path:
    """Leave a finished training and its evaluation in `folder`, as the scripts do but without a model."""
    words = map(str, ("--lora_r", rank, "--epochs", epochs, "--dropout", 0.1, "--output_dir", folder, *files))
    args = cli.parse_args("classification", "", list(words))
    splits = {name: split.describe() for name, split in data.load(args, ["train", "test"]).items()}
    path = runs.folder_of(args, "qlora") / "train.json"
    path.parent.mkdir(parents=True)
    spent = {"examples": 4, "seconds": 1.0, "wall_seconds": 2.0, "peak_memory_gib": 0.5}
    with record.recording(path, args, "qlora", PROCESS) as trained:
        trained |= {
            "data": {"train": splits["train"]},
            "labels": ["a", "b"],
            "prompt_sha256": prompt_sha256("classification", "instruction"),
            "quantization": {},
            "cost": {"usd": 0.5, "gpu": device.processor(), "price_per_hour": 900.0},
        }
        steps = {"loss": 0.1, "steps": 1, "tokens": 9, "trainable_parameters": 9, "tokens_per_second": 9.0}
        trained["train"] = spent | steps | {"loss_history": [[1, 0.1]]}
    args = cli.parse_args(
        "classification", "", ["--experiment_dir", str(path.parent), "--output_dir", str(folder)]
    )
    trained = runs.finished_training(path.parent, args)
    args = runs.with_settings_of(trained, args)
    with record.recording(path.parent / "eval.json", args, "qlora", PROCESS) as scored:
        scored |= {name: trained[name] for name in ("prompt_sha256", "cost")}
        scored |= {"data": {"test": splits["test"]}, **runs.scored_adapter(trained)}
        scores, _ = metrics.score("classification", ["a", "b", "b", "b"], ["a", "b", "a", "b"], ["a", "b"])
        read = {"examples_per_second": 4.0, "input_tokens": 9, "output_tokens": 9, "decoding": "free"}
        scored["eval"] = spent | read | scores
    return path.parent


@pytest.fixture
def files(tmp_path) -> tuple:
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(4)]
    paths = [write_rows(tmp_path / f"{split}.jsonl", rows) for split in ("train", "test")]
    return "--train_file", paths[0], "--test_file", paths[1]


def ranks_of(folder: Path) -> list[tuple]:
    """The scripts that were called, each with the rank or the ranks of the runs that it was called for."""
    found = []
    for script, *words in calls(folder):
        ranks = re.findall(r"_rank-(\d+)_", " ".join(words)) or [words[words.index("--lora_r") + 1]]
        found.append((script, *ranks))
    return found


def test_a_failed_cell_stops_no_other_and_is_named_at_the_end(tmp_path, files):
    for rank in (2, 8):
        finish_cell(tmp_path / "runs", rank, files)
    refuse = 'case $* in *"--lora_r 4"*) exit 7 ;; esac\nexec python "$@"'
    env = {**launcher(tmp_path, refuse), **ONE_CELL, "RANKS": "2 4 8", "TASK": "classification"}
    done = loop("run_lora.sh", *files, "--output_dir", tmp_path / "runs", cwd=tmp_path, **env)
    assert done.returncode == 1
    title, failed = done.stderr.strip().splitlines()
    assert title == "error: 1 of 3 cells failed:"
    assert failed.startswith(f"  {TRAIN} --lora_r 4 --epochs 2 --dropout 0.1 --seed 42 --train_file")
    assert failed.endswith("(exit 7)")
    # The failed training is not scored; the finished cells are looked up by both scripts.
    assert ranks_of(tmp_path) == [(TRAIN, "2"), (SCORE, "2"), (TRAIN, "4"), (TRAIN, "8"), (SCORE, "8")]
    table = done.stdout.partition("## LoRA ablation: classification")[2].partition("##")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[4:7]]
    assert [row[:2] for row in rows] == [["0.1", "2"], ["0.1", "4"], ["0.1", "8"]]
    assert rows[1][2] == "failed"
    assert all("75.00" in row[2] for row in rows[::2])


def test_a_cell_that_failed_before_it_started_is_failed_in_the_table_and_leaves_no_trace_outside_loops(
    tmp_path, files
):
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    write_rows(files[1], [{**row, "label": 1.5} for row in rows])
    flags = (*files, "--output_dir", "runs")
    done = loop("sample_ablate.sh", *flags, cwd=tmp_path, FRACTIONS="0.5", SEEDS="1 2")
    assert done.returncode == 1
    assert "error: 2 of 2 cells failed:" in done.stderr
    [row] = [line for line in done.stdout.splitlines() if line.startswith("| 50 %")]
    assert [cell.strip() for cell in row.split("|")[3:-1]] == ["failed"]
    [path, _] = sorted(tmp_path.rglob("train.json"))
    content = json.loads(path.read_text())
    assert (content["status"], content["config"]["seed"]) == ("failed", 1)
    assert "exit 1" in content["error"]["message"]
    assert not content["config"]["dry_run"]


def test_a_baseline_that_failed_before_it_started_is_failed_in_the_table(tmp_path):
    env = {"MODELS": "a/b", "TASKS": "classification", **launcher(tmp_path, "exit 3")}
    done = loop("baseline_inference.sh", "--output_dir", "runs", cwd=tmp_path, **env)
    assert done.returncode == 1
    lines = [
        [cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines() if "shot" in line
    ]
    states = {line[2]: line[4] for line in lines if len(line) > 4 and "-shot, " in line[2]}
    assert states == dict.fromkeys(("zero-shot, free decoding", "few-shot, free decoding"), "failed")


def test_a_scoring_that_failed_before_it_started_is_failed_in_the_table(tmp_path, files):
    refuse = f"case $1 in *inference*) exit 1 ;; esac\n{FINISH}"
    env = {**launcher(tmp_path, refuse), "FRACTIONS": "0.5"}
    done = loop("sample_ablate.sh", *files, "--output_dir", "runs", cwd=tmp_path, **env)
    assert done.returncode == 1
    [row] = [line for line in done.stdout.splitlines() if line.startswith("| 50 %")]
    assert [cell.strip() for cell in row.split("|")[3:-1]] == ["failed"]


@pytest.mark.parametrize("more", [[], ["--force"], ["--max_eval_samples", 4]], ids=["plain", "force", "few"])
def test_scripts_that_end_well_and_leave_no_finished_record_have_failed(tmp_path, more):
    env = {**launcher(tmp_path, "exit 0"), **ONE_CELL, "TASK": "classification"}
    done = loop("run_lora.sh", *more, "--output_dir", "runs", cwd=tmp_path, **env)
    assert done.returncode == 1
    title, failed = done.stderr.strip().splitlines()
    assert title == "error: 1 of 1 cells failed:"
    assert failed.startswith(f"  {SCORE} --lora_r 4")
    assert failed.endswith("(exit 0, but no finished record)")
    assert "failed" in done.stdout  # in a table, whatever the evaluation's record is called
    assert "failed" in done.stdout


def test_a_cell_that_can_not_be_looked_up_is_failed_in_the_table_and_a_dry_run_leaves_nothing(tmp_path):
    env = {**launcher(tmp_path, FINISH), **ONE_CELL, "TASK": "classification"}
    flags = ("--gpu_name", "A10G", "--output_dir", "runs")
    done = loop("run_lora.sh", *flags, "--dry_run", cwd=tmp_path, **env)
    assert done.returncode == 1
    assert not list(tmp_path.rglob("*.json"))
    done = loop("run_lora.sh", *flags, cwd=tmp_path, **env)
    assert done.returncode == 1
    error, title, failed = done.stderr.splitlines()
    assert error.startswith("error: --gpu_name A10G: no GPU")
    assert (title, failed.endswith("(exit 1)")) == ("error: 1 of 1 cells failed:", True)
    assert "| failed" in done.stdout
    assert not (tmp_path / "calls").exists()


def test_force_redoes_a_finished_cell_and_finds_it_finished_again(tmp_path):
    env = {**launcher(tmp_path, FINISH), **ONE_CELL, "TASK": "classification"}
    for flags in ([], ["--force"]):
        done = loop("run_lora.sh", *flags, "--output_dir", "runs", cwd=tmp_path, **env)
        assert (done.returncode, done.stderr) == (0, "")
    assert len(calls(tmp_path)) == 4


def test_a_forced_cell_whose_scoring_dies_has_failed_though_an_earlier_record_stands(tmp_path, files):
    finish_cell(tmp_path / "runs", 4, files)
    env = launcher(tmp_path, "case $1 in *inference*) exit 137 ;; esac")  # a training with the same adapter
    flags = (*files, "--output_dir", "runs", "--force")
    done = loop("run_lora.sh", *flags, cwd=tmp_path, TASK="classification", **ONE_CELL, **env)
    assert done.returncode == 1
    assert "error: 1 of 1 cells failed:" in done.stderr
    assert "--force (exit 137)" in done.stderr


def test_a_scoring_that_dies_is_no_success_where_all_was_finished(tmp_path, files):
    finish_cell(tmp_path / "runs", 4, files)
    env = launcher(tmp_path, 'case $1 in *inference*) exit 137 ;; esac\nexec python "$@"')
    flags = (*files, "--output_dir", "runs")
    done = loop("run_lora.sh", *flags, cwd=tmp_path, TASK="classification", **ONE_CELL, **env)
    assert done.returncode == 1
    assert "(exit 137)" in done.stderr


def test_a_setting_that_is_listed_twice_is_scored_once(tmp_path):
    env = launcher(tmp_path, FINISH) | {"RANKS": "4", "DROPOUTS": "0.1", "TASK": "classification"}
    done = loop("run_lora.sh", "--output_dir", "runs", cwd=tmp_path, EPOCHS="2 2", **env)
    assert (done.returncode, done.stderr) == (0, "")
    scored = [call for call in calls(tmp_path) if call[0] == SCORE]
    assert [sum("_epochs-2_" in word for word in call) for call in scored] == [1]


@pytest.mark.parametrize(
    ("script", "asked"),
    [
        ("run_lora.sh", ("from study import cli", "-m study.report", "-m study.dry_run")),
        ("compare_models.sh", ("from study.presets", "-m study.report")),
    ],
)
def test_what_a_loop_asks_in_between_finds_what_the_user_has_on_pythonpath(tmp_path, script, asked):
    note = "import sys; print(*sys.orig_argv[1:3], file=open({!r}, 'a'))"
    (tmp_path / "sitecustomize.py").write_text(note.format(str(tmp_path / "started")))
    env = launcher(tmp_path, FINISH) | ONE_CELL | {"MODELS": "causal=a/b", "FRACTIONS": "1.0"}
    env |= {"TASK": "classification", "PYTHONPATH": str(tmp_path), "EPOCHS": "1 2"}
    env |= {"ONLY": "1"} if "-m study.dry_run" in asked else {}  # which looks the other cells up
    done = loop(script, "--output_dir", "runs", cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    started = (tmp_path / "started").read_text()
    assert [words for words in asked if words not in started] == []


def test_a_folder_that_a_shell_reads_as_a_pattern_has_its_table(tmp_path):
    env = launcher(tmp_path, FINISH) | {"MODELS": "a/b", "TASKS": "summarization"}
    done = loop("baseline_inference.sh", "--output_dir", "[a] runs", cwd=tmp_path, **env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "## Inference" in done.stdout


def test_a_folder_that_the_terminal_can_not_spell_is_found(tmp_path):
    env = {**launcher(tmp_path, FINISH), **ONE_CELL, "TASK": "classification", "PYTHONIOENCODING": "ascii"}
    done = loop("run_lora.sh", "--output_dir", "läufe", cwd=tmp_path, **env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "| 100 %            | 1          | 1.00 (1) " in done.stdout
    assert "| zero-shot  | ? " in done.stdout


def test_a_dry_run_says_which_cells_are_finished_and_runs_none(tmp_path, files):
    finish_cell(tmp_path / "runs", 4, files)
    env = {**launcher(tmp_path, "exit 1"), **ONE_CELL, "RANKS": "4 8", "TASK": "classification"}
    flags = (*files, "--price_per_hour", 900, "--output_dir", "runs", "--dry-run")
    done = loop("run_lora.sh", *flags, cwd=tmp_path, **env)
    lines = [line.split("  ") for line in done.stdout.splitlines() if "  runs/" in line]
    assert done.returncode == 0
    assert [(state, *estimate) for state, _, *estimate in lines] == [
        ("finished",),
        ("not started", "0.1 min, $1.00"),
    ]
    assert done.stdout.splitlines()[-1] == "in all: 0.1 min, $1.00, 2 cells"
    assert not (tmp_path / "calls").exists()


def test_a_dry_run_reads_the_data_once_and_says_what_is_wrong_with_them(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", [{"text": "t", "label": label} for label in "aAb"])
    flags = ("--train_file", train, "--test_file", train, "--output_dir", "runs", "--dry_run")
    done = loop("sample_ablate.sh", *flags, cwd=tmp_path, FRACTIONS="0.5 0.7 1.0")
    assert done.returncode == 1
    assert done.stderr.count("differ only in case") == 1
    title, cell = done.stderr.splitlines()[1:]
    assert (title, "--train_sample_fraction 0.5" in cell) == ("error: 1 of 3 cells failed:", True)
    assert done.stdout.count("not started  runs/") == 2
    write_rows(train, [{"text": "t", "label": label} for label in "ab"])
    assert loop("sample_ablate.sh", *flags, cwd=tmp_path, FRACTIONS="0.5 1.0").returncode == 0


def test_a_dry_run_of_rows_that_are_trained_at_once_says_what_is_wrong_with_the_data_once(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", [{"text": "t", "label": label} for label in "aAb"])
    flags = ("--train_file", train, "--test_file", train, "--output_dir", "runs", "--dry_run")
    grid = {"RANKS": "8", "EPOCHS": "1 2", "DROPOUTS": "0.1 0.2"}
    done = loop("run_lora.sh", *flags, cwd=tmp_path, TASK="classification", **grid)
    assert (done.returncode, done.stderr.count("differ only in case")) == (1, 1)
    assert "error: 1 of 4 cells failed:" in done.stderr


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


# Estimates


def estimate_of(folder: Path, state: str, *words: object, name: str = "eval.json", task="summarization"):
    """Seconds and USD, at a cent a second, of a run by the records in `folder`."""
    words = (*PRICED, "--output_dir", folder, *words)
    args = cli.parse_args(task, "", list(map(str, words)))
    method = getattr(args, "prompt_type", "qlora")
    seconds, usd, *_ = estimate.estimate(args, method, folder / "run" / name, state == "trained")
    return seconds, usd


def leave_three(folder: Path, part: str) -> None:
    """Median: 0.2 s for each example and epoch and 20 s of loading, in no one of them both."""
    leave_record(folder / "a", part, examples=10, seconds=2, loading=10)
    leave_record(folder / "b", part, examples=50, seconds=5, loading=20)
    leave_record(folder / "c", part, examples=10, seconds=9, loading=90)


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        ("--epochs 1", 1000 * 0.2 + 20),
        ("--epochs 5 --train_sample_fraction 0.1", 100 * 5 * 0.2 + 20),
        ("--epochs 3 --max_train_samples 50 --lora_r 2 --seed 7", 50 * 3 * 0.2 + 20),
        ("--epochs 1 --max_train_samples 5000", 1000 * 0.2 + 20),
    ],
)
def test_a_training_is_estimated_by_the_median_speed_of_earlier_ones(tmp_path, words, seconds):
    leave_three(tmp_path, "train")
    got = estimate_of(tmp_path, "not started", *words.split(), name="train.json")
    assert got == pytest.approx((seconds, seconds / 100))


def test_the_speed_of_a_training_is_that_of_one_epoch(tmp_path):
    leave_record(tmp_path, "train", examples=10, epochs=4, seconds=8, loading=0)
    assert estimate_of(tmp_path, "not started", "--epochs", 2, name="train.json")[0] == pytest.approx(400)


@pytest.mark.parametrize(
    ("words", "seconds"),
    [("", 200 * 0.2 + 20), ("--max_eval_samples 10", 22), ("--max_eval_samples 999", 60)],
)
def test_an_evaluation_is_estimated_by_the_median_speed_of_earlier_ones(tmp_path, words, seconds):
    leave_three(tmp_path, "eval")
    assert estimate_of(tmp_path, "trained", *words.split()) == pytest.approx((seconds, seconds / 100))


def test_an_evaluation_takes_its_training_too_where_that_is_not_finished(tmp_path):
    leave_record(tmp_path, "train", seconds=1, loading=7)
    leave_record(tmp_path, "eval", seconds=1, loading=3)
    whole = (1000 * 0.1 + 7) + (200 * 0.1 + 3)
    for state in ("not started", "unfinished", "failed"):
        assert estimate_of(tmp_path, state, "--epochs", 1)[0] == pytest.approx(whole)
    assert estimate_of(tmp_path, "trained", "--epochs", 1)[0] == pytest.approx(23)


def test_a_training_on_two_gpus_costs_twice_and_its_evaluation_once(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "name", lambda: "NVIDIA A10G")
    path = leave_record(tmp_path, "train", seconds=1, loading=7, gpu="NVIDIA A10G")
    content = json.loads(path.read_text())
    content["train"]["batching"] = {"processes": 2}
    path.write_text(json.dumps(content))
    leave_record(tmp_path, "eval", seconds=1, loading=3, gpu="NVIDIA A10G")
    words = ("--gpu_name", "g5.2xlarge", "--epochs", "1", "--output_dir", str(tmp_path))
    seconds, usd, *training = estimate.estimate(
        cli.parse_args("summarization", "", words), "qlora", tmp_path / "eval.json", False
    )
    assert seconds == pytest.approx(107 + 23)
    assert usd == pytest.approx((2 * 107 + 23) * 1.212 / 3600)
    assert training == pytest.approx([107, 2 * 107 * 1.212 / 3600, 0, 0])


def test_a_baseline_is_estimated_by_those_of_its_prompt(tmp_path):
    leave_record(tmp_path / "a", "eval", method="zero-shot", seconds=1, loading=3)
    leave_record(tmp_path / "b", "eval", method="few-shot", seconds=5, loading=3)
    words = ("--task_type", "summarization", "--prompt_type")
    assert estimate_of(tmp_path, "not started", *words, "zero-shot", task=None)[0] == pytest.approx(23)
    assert estimate_of(tmp_path, "not started", *words, "few-shot", task=None)[0] == pytest.approx(103)


OTHERS = [
    {"model": "a/b"},
    {"gpu": "other card"},
    {"method": "few-shot"},
    {"task": "classification"},
    {"status": "failed"},
    {"train_file": "t.jsonl", "test_file": "t.jsonl"},
    {"dataset": "other"},
]


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: next(iter(other)))
@pytest.mark.parametrize("part", ["train", "eval"])
def test_a_run_of_another_kind_estimates_nothing(tmp_path, part, other):
    leave_record(tmp_path, part, seconds=1, loading=1, **other)
    state = "not started" if part == "train" else "trained"
    assert estimate_of(tmp_path, state, name=f"{part}.json") == (None, None)
    leave_record(tmp_path, part, seconds=1, loading=1)
    assert estimate_of(tmp_path, state, name=f"{part}.json")[0] > 0


def test_a_cell_has_no_estimate_where_half_of_it_is_unknown(tmp_path):
    leave_record(tmp_path, "train", seconds=1, loading=1)
    assert estimate_of(tmp_path, "not started") == (None, None)


@pytest.mark.parametrize("text", ['{"schema": 1, "sta', "[]", '{"schema": 1, "status": "finished"}'])
def test_a_damaged_record_does_not_keep_others_from_estimating(tmp_path, text):
    leave_record(tmp_path / "whole", "train", seconds=1, loading=1)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "train.json").write_text(text)
    assert estimate_of(tmp_path, "not started", name="train.json")[0] > 0


def test_a_speed_is_that_of_the_device_it_was_measured_on_whatever_its_price_is_called(tmp_path):
    record_of = {"gpu": "A10G"}
    path = leave_record(tmp_path, "train", seconds=1, loading=7, **record_of)
    assert estimate_of(tmp_path, "not started", name="train.json") == (
        None,
        None,
    )  # priced and measured alike
    content = json.loads(path.read_text())
    content["cost"]["device"] = device.processor()
    path.write_text(json.dumps(content))
    assert estimate_of(tmp_path, "not started", name="train.json")[0] == pytest.approx(107)


def test_a_device_with_several_prices_has_none_and_that_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(device, "gpu_name", lambda: "NVIDIA A10G")
    monkeypatch.setattr(device, "name", device.gpu_name)
    leave_record(tmp_path, "train", seconds=1, loading=7, gpu="NVIDIA A10G")
    words = ["--output_dir", str(tmp_path), "--epochs", "1"]
    for more, usd in (([], "?"), (["--gpu_name", "g5.4xlarge"], f"{107 * 1.624 / 3600:.6g}")):
        args = cli.parse_args("summarization", "", [*words, *more])
        estimate.say_dry_run(tmp_path / "run" / "train.json", args, "qlora", PROCESS)
        *lines, last = capsys.readouterr().out.splitlines()
        assert last == f"not started\t{tmp_path}/run\t107\t{usd}\t107\t{usd}\t0\t0"
        said = [line for line in lines if "$1.212 (g5.2xlarge) or $1.624 (g5.4xlarge)" in line]
        assert len(said) == (not more)


@pytest.mark.parametrize("visible", ["", "-1"])
def test_the_name_of_a_card_is_refused_where_there_is_none(tmp_path, monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    args = cli.parse_args("summarization", "", ["--gpu_name", "A10G", "--price_per_hour", "1"])
    with pytest.raises(UserError, match=r"--gpu_name A10G: no GPU is in sight here; .*--price_per_hour"):
        estimate.say_dry_run(tmp_path / "train.json", args, "qlora", PROCESS)
    with pytest.raises(UserError, match=r"--gpu_name A10G: no GPU"):
        estimate.check_gpu_name(args)
    monkeypatch.setattr(device, "gpu_name", lambda: "NVIDIA A10G")
    estimate.check_gpu_name(args)


def test_an_unknown_price_leaves_the_seconds_and_no_dollars(tmp_path, capsys):
    leave_record(tmp_path, "train", seconds=1, loading=1)
    words = ["--output_dir", str(tmp_path), "--epochs", "1"]
    estimate.say_dry_run(
        tmp_path / "run" / "train.json", cli.parse_args("summarization", "", words), "qlora", PROCESS
    )
    assert capsys.readouterr().out.splitlines()[-1] == f"not started\t{tmp_path}/run\t101\t?\t101\t?\t0\t0"


# Budgets

HOUR = {"RANKS": "4", "DROPOUTS": "0.1"}  # cells that take an hour and $36 an epoch


def leave_hour(folder: Path) -> None:
    leave_record(folder, "train", seconds=34, loading=100)
    leave_record(folder, "eval", seconds=1, loading=80)


def within(folder: Path, *flags: object, body: str = FINISH, script="run_lora.sh", **env: str):
    flags = ("--output_dir", "runs", *flags)
    return loop(script, *flags, cwd=folder, **{**launcher(folder, body), **HOUR, **env})


@pytest.mark.parametrize(
    "budget",
    [["--budget_hours", "1.5"], ["--budget-usd=54"], ["--budget_usd=1000", "--budget-hours=1.5"]],
    ids=" ".join,
)
def test_a_loop_ends_before_the_cell_that_exceeds_its_budget_and_names_those_left(tmp_path, budget):
    leave_hour(tmp_path / "runs")
    done = within(tmp_path, "--price_per_hour", "36", *budget, EPOCHS="1 2", RANKS="4 8")
    assert (done.returncode, done.stderr) == (0, "")
    train, score = calls(tmp_path)
    assert train[1:5] == ["--lora_r", "4", "--epochs", "1"]
    assert score[1:3] == ["--experiment_dir", f"runs/{tuned(rank='4', epochs='1')}"]
    assert not [word for call in calls(tmp_path) for word in call if "budget" in word or "1.5" in word]
    # The cells after the one that exceeds it are left, too, though one of them would fit.
    title, *left = done.stdout.splitlines()[-4:]
    assert title == "the budget ends here: 3 of 4 cells are left:"
    cells = (("4", "2"), ("8", "1"), ("8", "2"))
    assert left == [f"  runs/{tuned(rank=rank, epochs=epochs)}" for rank, epochs in cells]


def test_a_finished_cell_costs_no_budget(tmp_path, files):
    finish_cell(tmp_path / "runs", 4, files)
    env = {"RANKS": "2 4 8", "EPOCHS": "2", "TASK": "classification"}
    flags = (*files, "--output_dir", tmp_path / "runs", "--budget_hours", "0")
    done = within(tmp_path, *flags, **env)
    assert done.returncode == 0, done.stderr
    assert ranks_of(tmp_path) == [(TRAIN, "4"), (SCORE, "4")]
    assert "the budget ends here: 2 of 3 cells are left:" in done.stdout


@pytest.mark.parametrize(("spent", "runs"), [("0", True), ("3000", False)])
@pytest.mark.parametrize("budget", ["--budget_hours=1.5", "--budget_usd=54"])
def test_what_a_loop_has_taken_counts(tmp_path, budget, spent, runs):
    leave_hour(tmp_path / "runs")
    done = within(tmp_path, "--price_per_hour=36", budget, EPOCHS="1", SECONDS=spent)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls").exists() == runs


def test_what_a_loop_has_taken_is_not_told_by_the_clock_that_shows_the_time():
    lines = (ROOT / "study" / "loop.sh").read_text("utf-8").splitlines()
    assert [line for line in lines if "SECONDS" in line and "#" not in line] == ["spent_before=$SECONDS"]


@pytest.mark.parametrize(
    "words", [["--budget_hours", "two"], ["--budget_usd="], ["--budget-usd", "-1"], ["--budget_hours"]]
)
def test_a_budget_that_is_no_number_is_refused_before_anything_runs(tmp_path, words):
    done = within(tmp_path, *words)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: {words[0].rstrip('=')}")
    assert "it takes a number" in line
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(
    ("script", "words", "env", "mend"),
    [
        ("run_lora.sh", ["--lora-r=4"], {}, 'set RANKS="..."'),
        ("sample_ablate.sh", ["--train_sample_fraction", "0.5"], {}, 'set FRACTIONS="..."'),
        ("baseline_inference.sh", ["--pretrained_ckpt", "x"], {}, 'set MODELS="..."'),
        ("run_lora.sh", [], {"TASK": "translation"}, "TASK=translation: it is classification or"),
    ],
)
def test_a_flag_that_the_loop_sets_itself_is_refused(tmp_path, script, words, env, mend):
    done = within(tmp_path, *words, script=script, **env)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert mend in line
    assert not (tmp_path / "calls").exists()


def test_a_budget_in_dollars_needs_a_price(tmp_path):
    leave_hour(tmp_path / "runs")
    done = within(tmp_path, "--budget_usd", "54", EPOCHS="1")
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("error: --budget_usd: this device has no known price")
    assert "--price_per_hour" in line
    assert not (tmp_path / "calls").exists()


FEW = ["--max_eval_samples", "16", "--max_train_samples", "64", "--train_sample_fraction", "1.0"]
FEW += ["--epochs", "1"]


@pytest.mark.parametrize(("hours", "full"), [("0.5", 0), ("1.5", 1)])
def test_with_nothing_to_estimate_from_a_short_run_comes_first(tmp_path, hours, full):
    leave_hour(tmp_path / "speed")
    body = f"case $* in *max_eval_samples*) mkdir -p runs; cp -r speed runs ;; *) {FINISH} ;; esac"
    done = within(tmp_path, "--budget_hours", hours, body=body, EPOCHS="1")
    assert (done.returncode, done.stderr) == (0, "")
    short, long = calls(tmp_path)[:2], calls(tmp_path)[2:]
    assert len(short) == 2
    assert all(call[-8:] == FEW for call in short)
    scoring = [short[1][0], "--experiment_dir", f"runs/{tuned(rank='4', epochs='1')}", *short[1][9:-10]]
    assert long == [short[0][:-10], scoring] * full
    assert {call[-9].rpartition("/")[0] for call in short} == {"runs/.calibration"}
    assert ("the budget ends here: 1 of 1 cells" in done.stdout) == (not full)


def test_a_baselines_short_run_is_one_script(tmp_path):
    leave_record(tmp_path / "speed", "eval", method="zero-shot", seconds=34, loading=3000)
    body = "case $* in *max_eval_samples*) mkdir -p runs; cp -r speed runs ;; esac"
    env = {"MODELS": "NousResearch/Llama-2-7b-hf", "TASKS": "summarization"}
    done = within(tmp_path, "--budget_hours=0.5", body=body, script="baseline_inference.sh", **env)
    assert (done.returncode, done.stderr) == (0, "")
    [call] = calls(tmp_path)
    assert call[-2:] == FEW[:2]
    assert "--epochs" not in call
    assert "the budget ends here: 2 of 2 cells" in done.stdout


def test_a_cell_whose_short_run_fails_is_named_and_not_run(tmp_path):
    done = within(tmp_path, "--budget_hours", "9", body="exit 3", EPOCHS="1 2")
    assert done.returncode == 1
    assert "error: 2 of 2 cells failed:" in done.stderr
    assert done.stderr.count("(its training failed)") == 2
    assert "Traceback" not in done.stderr  # of a grid without a score
    assert [call[-8:] for call in calls(tmp_path)] == [FEW]  # which serves both


def test_a_cell_that_no_short_run_can_estimate_is_not_run_on_a_budget(tmp_path):
    done = within(tmp_path, "--budget_usd", "1", "--price_per_hour=36", EPOCHS="1")
    assert [call[-8:] for call in calls(tmp_path)] == [FEW, FEW]
    assert len(done.stderr.splitlines()) <= 2


# One training for all epochs of a row


def test_a_row_is_trained_once_and_its_cells_are_scored_by_one_process(tmp_path):
    env = {"EPOCHS": "2 1 3", "RANKS": "4 8", "DROPOUTS": "0.1"} | launcher(tmp_path, "exit 0")
    done = loop("run_lora.sh", "--output_dir", "runs", "--force", cwd=tmp_path, **env)
    own = ["--output_dir", "runs", "--force"]
    expected = []
    for rank in "48":
        row = ["--lora_r", rank, "--dropout", "0.1", "--seed", "42"]
        folders = [f"runs/{tuned(rank=rank, epochs=epochs)}" for epochs in "213"]
        expected.append(
            [f"{ROOT}/llama2_summarization.py", "--epochs", "3", "--also_epochs", "1", "2", *row, *own]
        )
        expected.append([f"{ROOT}/llama2_summarization_inference.py", "--experiment_dir", *folders, *own])
    assert calls(tmp_path) == expected
    assert done.stderr.count("(exit 0, but no finished record)") == 6


@pytest.mark.parametrize("spoilt", ["before", "after"])
def test_of_cells_scored_together_those_that_failed_are_named(tmp_path, files, spoilt):
    """One whose record is of data that are other data now, though it stands as finished, and one that was
    never scored."""
    for epochs in (1, 2, 3):
        finish_cell(tmp_path / "runs", 4, files, epochs)
    [path] = (tmp_path / "runs").glob("*_epochs-2_*/eval.json")
    if spoilt == "before":
        content = json.loads(path.read_text())
        content["data"]["test"]["sha256"] = "other"
        path.write_text(json.dumps(content))
    else:
        path.unlink()  # and no model is there to score it with
    env = {"RANKS": "4", "DROPOUTS": "0.1", "EPOCHS": "1 2 3", "TASK": "classification"}
    done = loop("run_lora.sh", *files, "--output_dir", "runs", cwd=tmp_path, **env)
    assert done.returncode == 1
    assert "error: 1 of 3 cells failed:" in done.stderr
    [named] = re.findall(rf"^  {SCORE} --lora_r 4 --epochs (\d) .*\(exit 1\)$", done.stderr, re.M)
    assert named == "2"
    assert done.stdout.count("finished   ") == 3 + 2


def test_a_dry_run_counts_one_loading_for_the_cells_that_are_scored_together(tmp_path):
    folder = tmp_path / "runs"
    leave_record(folder / "a", "train", seconds=10, loading=1000)  # 1 s for each example and epoch, of 1,000
    leave_record(folder / "a", "eval", seconds=10, loading=700)  # 1 s for each example, of 200
    path = leave_record(folder / "b", "eval", seconds=10, loading=100)
    content = json.loads(path.read_text())
    content["eval"]["loaded_by"] = "a"
    path.write_text(json.dumps(content))
    env = {"RANKS": "4 8", "EPOCHS": "1 2", "DROPOUTS": "0.1"}
    done = loop("run_lora.sh", *PRICED, "--output_dir", "runs", "--dry_run", cwd=tmp_path, **env)
    together = 2 * (2000 + 1000) + 2 * (700 + 200) + 2 * (100 + 200)
    alone = 2 * (1000 + 2000 + 2 * 1000) + 4 * (700 + 200)
    text = (
        f"in all: {together / 3600:.1f} h, ${together / 100:.2f}, 4 cells (one by one: {alone / 3600:.1f} h"
    )
    assert text in done.stdout


def test_where_the_training_of_a_row_fails_its_cells_have_failed_and_the_others_go_on(tmp_path):
    body = '[[ " $* " == *inference* || " $* " != *"--lora_r 4"* ]]'
    env = {"EPOCHS": "1 2", "RANKS": "4 8", "DROPOUTS": "0.1"} | launcher(tmp_path, body)
    done = loop("run_lora.sh", "--output_dir", "runs", cwd=tmp_path, **env)
    assert done.returncode == 1
    assert done.stderr.count("(its training failed)") == 2
    [scoring] = [call for call in calls(tmp_path) if "inference" in call[0]]
    assert scoring[2:4] == [f"runs/{tuned(rank='8', epochs=epochs)}" for epochs in "12"]


# A part of the cells


def test_only_the_cells_that_are_named_are_done_and_others_are_shown_as_they_are(tmp_path, files):
    env = {"RANKS": "2 4 8 16", "EPOCHS": "2", "DROPOUTS": "0.1", "TASK": "classification"}
    finish_cell(tmp_path / "runs", 2, files)
    env |= launcher(tmp_path, FINISH) | {"ONLY": "2 04-4"}
    done = loop("run_lora.sh", *files, "--output_dir", "runs", cwd=tmp_path, **env)
    assert (done.returncode, done.stderr) == (0, "")
    assert ranks_of(tmp_path) == [(TRAIN, "4"), (SCORE, "4"), (TRAIN, "16"), (SCORE, "16")]
    assert "ONLY=2 04-4: of 2 other cells 1 are not finished" in done.stdout
    assert "75.00" in done.stdout  # of the finished cell
    done = loop("run_lora.sh", *files, "--output_dir", "runs", cwd=tmp_path, **env | {"ONLY": "0"})
    assert "ONLY=0: of 4 other cells 1 are not finished" in done.stdout
    assert len(calls(tmp_path)) == 4


def test_of_a_row_only_the_epochs_of_the_named_cells_are_trained(tmp_path):
    env = {"EPOCHS": "2 1 3", "RANKS": "4 8", "DROPOUTS": "0.1"} | launcher(tmp_path, "exit 0")
    for only, epochs in (("1 6", [["2"], ["3"]]), ("2-3", [["3", "--also_epochs", "1"]])):
        (tmp_path / "calls").unlink(missing_ok=True)
        loop("run_lora.sh", "--output_dir", "runs", cwd=tmp_path, ONLY=only, **env)
        trained = [call for call in calls(tmp_path) if "inference" not in call[0]]
        assert [
            call[call.index("--epochs") + 1 :][: len(each)]
            for call, each in zip(trained, epochs, strict=True)
        ] == epochs


def test_the_best_is_chosen_by_a_start_of_the_whole_loop_alone(tmp_path, files):
    env = launcher(tmp_path, FINISH) | {
        "RANKS": "4 8",
        "EPOCHS": "2",
        "DROPOUTS": "0.1",
        "TASK": "classification",
    }
    flags = (*files, "--validation_fraction", "0.5", "--output_dir", "runs")
    done = loop("run_lora.sh", *flags, cwd=tmp_path, ONLY="1-2", **env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "best on the validation split" not in done.stdout
    assert "best on the validation split" in loop("run_lora.sh", *flags, cwd=tmp_path, **env).stdout


@pytest.mark.parametrize(
    ("only", "said"), [("1,2", "it takes numbers"), ("1-", "it takes"), ("2-9", "has 2 cells")]
)
def test_numbers_that_no_cell_has_are_refused(tmp_path, only, said):
    env = launcher(tmp_path, FINISH) | {"FRACTIONS": "0.5 1.0", "ONLY": only}
    done = loop("sample_ablate.sh", "--output_dir", "runs", cwd=tmp_path, **env)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"error: ONLY={only}: " in done.stderr
    assert said in done.stderr


# Chosen on validation, reported on test


@pytest.mark.parametrize(
    ("flags", "splits"),
    [
        (["--validation_fraction", "0.5"], ["validation", "validation", "test"]),
        (["--validation_fraction", "0.5", "--split", "test"], ["test", "test"]),
        ([], ["test", "test"]),
    ],
    ids=["a validation split", "on request", "no validation split"],
)
def test_cells_are_scored_on_validation_and_the_best_of_them_on_test(tmp_path, files, flags, splits):
    env = launcher(tmp_path, FINISH) | {"RANKS": "8 4", "EPOCHS": "2", "DROPOUTS": "0.1"}
    env |= {"TASK": "classification", "BETTER": "rank-8"}
    done = loop("run_lora.sh", *files, "--output_dir", "runs", *flags, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    scored = [call for call in calls(tmp_path) if call[0] == SCORE]
    split_of = lambda call: call[call.index("--split") + 1] if "--split" in call else "test"
    assert list(map(split_of, scored)) == splits
    if len(splits) == 3:
        [best] = (tmp_path / "runs").glob("*_rank-8_*")
        assert scored[2][1:3] == ["--experiment_dir", f"runs/{best.name}"]
        assert f"best on the validation split, scored on the test split:\nruns/{best.name}\n" in done.stdout
        assert len(list(best.glob("eval*.json"))) == 2
        [other] = (tmp_path / "runs").glob("*_rank-4_*")
        assert len(list(other.glob("eval*.json"))) == 1
    assert ("no validation split" in done.stdout) == (flags == [])


def test_the_best_is_scored_on_test_within_the_budget_only(tmp_path, files):
    env = {"RANKS": "8 4", "EPOCHS": "2", "DROPOUTS": "0.1", "TASK": "classification", "BETTER": "rank-8"}
    env |= launcher(tmp_path, FINISH)
    flags = (*files, "--output_dir", "runs", "--validation_fraction", "0.5")
    dry = loop("run_lora.sh", *flags, "--dry_run", cwd=tmp_path, **env)
    assert "the best on the validation split will be scored on the test split" in dry.stdout
    loop("run_lora.sh", *flags, cwd=tmp_path, **env)
    [best] = (tmp_path / "runs").glob("*_rank-8_*")
    (best / "eval.json").unlink()
    done = loop("run_lora.sh", *flags, "--budget_hours", "0.0001", cwd=tmp_path, **env)
    assert "the budget ends here: 1 of 2 cells are left:" in done.stdout
    assert done.stdout.rstrip().endswith(f"runs/{best.name}, on the test split")
    assert not (best / "eval.json").exists()


def test_a_cell_that_its_scorer_dies_of_does_not_keep_the_others_from_their_scores(tmp_path):
    body = f"case $* in *inference*Fraction-0.5_*) kill -9 $$ ;; esac\n{FINISH}"
    env = {"FRACTIONS": "0.25 0.5 1.0"} | launcher(tmp_path, body)
    done = loop("sample_ablate.sh", "--output_dir", "runs", cwd=tmp_path, **env)
    assert done.returncode == 1
    assert "error: 1 of 3 cells failed:" in done.stderr
    assert "--train_sample_fraction 0.5" in done.stderr.splitlines()[-1]
    found = {path.parent.name: record.status(path) for path in tmp_path.glob("runs/*/eval.json")}
    for fraction in ("0.25", "1.0"):
        [status] = [found[name] for name in found if f"Fraction-{fraction}_" in name]
        assert status == "finished"


def test_where_a_cell_has_failed_none_is_chosen(tmp_path, files):
    body = f"case $* in *rank-4*) exit 7 ;; esac\n{FINISH}"
    env = launcher(tmp_path, body) | {"RANKS": "4 8", "EPOCHS": "2", "DROPOUTS": "0.1"}
    flags = (*files, "--validation_fraction", "0.5", "--output_dir", "runs")
    done = loop("run_lora.sh", *flags, cwd=tmp_path, TASK="classification", **env)
    assert done.returncode == 1
    assert "the best is chosen once no cell is left and none has failed" in done.stdout
    assert not [call for call in calls(tmp_path) if call[0] == SCORE and "validation" not in call]


def test_learning_rates_are_a_list_of_the_grid(tmp_path):
    env = ONE_CELL | {"LEARNING_RATES": "1e-4 1e-3"}
    assert len(grid("run_lora.sh", cwd=tmp_path, **env)) == 2
    done = loop("run_lora.sh", "--learning_rate", 1, "--dry_run", cwd=tmp_path, **env)
    assert done.returncode == 2
    assert 'set LEARNING_RATES="..." before it instead' in done.stderr
    assert len(grid("run_lora.sh", "--learning_rate", "1e-3", cwd=tmp_path, **ONE_CELL)) == 1


# compare_models.sh


def named_cells(output: str) -> list[str]:
    """What each cell of a dry run is of: its checkpoint or its method."""
    return re.findall(r"^\[\d+\] .*?--(?:pretrained_ckpt|method) (\S+)", output, re.M)


@pytest.mark.parametrize("task", ["classification", "summarization"])
def test_the_models_of_a_task_are_compared_in_the_published_order_after_what_costs_nothing(tmp_path, task):
    from study.presets import PRESETS

    env = {"TASK": task, "FRACTIONS": "1.0"}
    done = loop("compare_models.sh", "--dry_run", "--output_dir", tmp_path, cwd=tmp_path, **env)
    assert (done.returncode, done.stderr) == (0, "")
    free, models = named_cells(done.stdout)[:2], named_cells(done.stdout)[2:]
    assert (
        free == {"classification": ["tfidf-nb", "tfidf-svm"], "summarization": ["lead-3", "longest-3"]}[task]
    )
    assert models == [about.checkpoint for about in PRESETS.values() if task in about.tasks]
    assert "google/flan-t5-large --tuning lora" in done.stdout


def test_shares_and_seeds_of_a_named_checkpoint_are_cells_and_what_learns_nothing_is_one(tmp_path):
    env = {
        "TASK": "summarization",
        "MODELS": "lead-3 causal=a/model t5=a/t5",
        "FRACTIONS": "0.5 1.0",
        "SEEDS": "1 2",
    }
    done = loop("compare_models.sh", "--dry_run", "--output_dir", tmp_path, cwd=tmp_path, **env)
    assert (done.returncode, done.stderr) == (0, "")
    assert named_cells(done.stdout) == ["lead-3", *["a/model"] * 4, *["a/t5"] * 4]
    assert done.stdout.count("a/t5 --tuning full") == 4


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"MODELS": "tfidf-nb gpt-5"}, "MODELS: gpt-5 is none of tfidf-nb tfidf-svm distilbert"),
        ({"MODELS": "tfidf-nb encodr=a/model"}, "MODELS: encodr=a/model is none of tfidf-nb"),
        ({"MODELS": "encoder="}, "MODELS: encoder= is none of tfidf-nb"),
        ({"MODELS": "tfidf-xy"}, "MODELS: tfidf-xy is none of tfidf-nb"),
        ({"MODELS": "tfidf-nb lead-3"}, "MODELS: lead-3 is for summarization alone"),
        ({"TASK": "summarization", "MODELS": "lead-3 tfidf-nb"}, "MODELS: tfidf-nb is for classification"),
        (
            {"TASK": "summarization", "MODELS": "bert"},
            "MODELS: bert is for classification alone, and TASK is",
        ),
        ({"TASK": "translation"}, "TASK=translation: it is classification or summarization"),
    ],
)
def test_a_model_or_task_that_the_loop_does_not_know_is_bad_usage(tmp_path, env, said):
    done = loop("compare_models.sh", "--dry_run", cwd=tmp_path, **env)
    assert said in error_line(done)
    assert (done.returncode, done.stdout) == (2, "")  # before the first cell
