"""Several runs scored by one process, which loads their base model once: each as if it were scored alone."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DEMO_DATA, DEMO_MODEL, error_line
from preloaded import run_preloaded

from study import several

TASKS = {"classification": "posts", "summarization": "dialogues"}
MEASURED = {"seconds", "wall_seconds", "earlier_seconds", "examples_per_second", "peak_memory_gib"}
BASELINE = "llama2_baseline_inference.py"
SCORED = ("--price_per_hour", 36, "--max_eval_samples", 8)


def flags_of(task: str) -> tuple:
    files = (f"--{split}_file={DEMO_DATA / f'{TASKS[task]}_{split}.jsonl'}" for split in ("train", "test"))
    size = ("--max_train_samples", 24, "--max_eval_samples", 8, "--batch_size", 4, "--lora_r", 4)
    return ("--pretrained_ckpt", DEMO_MODEL, *files, *size, "--learning_rate", "3e-3", "--price_per_hour", 36)


def score(task: str, *flags: object):
    return run_preloaded(f"llama2_{task}_inference.py", *SCORED, *flags)


@pytest.fixture(scope="module", params=TASKS)
def trained(request, tmp_path_factory) -> tuple[str, list[Path]]:
    """Runs of 1, 2 and 3 epochs."""
    root = tmp_path_factory.mktemp(request.param)
    flags = (*flags_of(request.param), "--epochs", 3, "--also_epochs", 1, 2, "--output_dir", root)
    done = run_preloaded(f"llama2_{request.param}.py", *flags)
    assert done.returncode == 0, done.stderr
    return request.param, sorted(root.glob("*_epochs-*"))


def copies(folders: list[Path], root: Path) -> list[Path]:
    return [Path(shutil.copytree(folder, root / folder.name)) for folder in folders]


def content_of(folder: Path) -> dict:
    [path] = folder.glob("eval*.json")
    return plain(path)


def plain(path: Path) -> dict:
    """A record but for what was measured and where it lies."""
    content = json.loads(path.read_text())
    for name in ("started", "finished", "cost"):
        content.pop(name)
    for name in ("experiment_dir", "output_dir"):
        content["config"].pop(name)
    for name in MEASURED:
        content["eval"].pop(name)
    content["eval"].pop("loaded_by", None)
    return content


def loaded_by(folder: Path) -> str | None:
    [path] = folder.glob("eval*.json")
    return json.loads(path.read_text())["eval"].get("loaded_by")


@pytest.mark.parametrize(
    ("trained", "merge"), [("classification", "on"), ("summarization", "off")], indirect=["trained"]
)
def test_each_is_scored_as_if_it_were_alone(trained, tmp_path, merge):
    task, folders = trained
    alone, together = (copies(folders, tmp_path / name) for name in ("alone", "together"))
    for folder in alone:
        assert score(task, "--experiment_dir", folder, "--merge", merge).returncode == 0
    done = score(task, "--experiment_dir", *together, "--merge", merge)
    assert done.returncode == 0, done.stderr
    for one, other in zip(alone, together, strict=True):
        assert content_of(one) == content_of(other)
        [rows], [others] = (list(folder.glob("predictions*.jsonl")) for folder in (one, other))
        assert rows.read_bytes() == others.read_bytes()
    assert len({str(content_of(folder)["eval"]["metrics"]) for folder in alone}) > 1  # the adapters differ
    assert list(map(loaded_by, together)) == [None, together[0].name, together[0].name]
    assert score(task, "--experiment_dir", *together, "--merge", merge).stdout.count("finished   ") == 3


@pytest.mark.parametrize("trained", ["summarization"], indirect=True)
def test_one_that_fails_does_not_stop_the_others(trained, tmp_path):
    task, folders = trained
    runs = copies(folders, tmp_path)
    weights = runs[1] / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    done = score(task, "--experiment_dir", *runs, tmp_path / "none")
    assert done.returncode == 1
    first, second, last = done.stderr.strip().splitlines()
    assert re.match(f"error: {runs[1]}: .*is not the adapter that its train.json tells of", first)
    assert re.match(f"error: {tmp_path}/none: .*there is no such run", second)
    assert last == f"error: 2 of 4 runs failed: {runs[1]}, {tmp_path / 'none'}"
    statuses = [json.loads(next(folder.glob("eval*.json")).read_text())["status"] for folder in runs]
    assert statuses == ["finished", "failed", "finished"]


@pytest.mark.parametrize("trained", ["summarization"], indirect=True)
def test_the_flags_of_a_nested_training_score_all_of_its_runs(trained, tmp_path):
    task, folders = trained
    runs = copies(folders, tmp_path)
    flags = (*flags_of(task), "--epochs", 3, "--also_epochs", 1, 2, "--output_dir", tmp_path)
    done = score(task, *flags)
    assert done.returncode == 0, done.stderr
    assert list(map(loaded_by, runs)) == [None, runs[0].name, runs[0].name]


@pytest.mark.parametrize("trained", ["summarization"], indirect=True)
@pytest.mark.parametrize("what", ["task", "prompt_sha256", "checkpoint", "quantization"])
def test_runs_of_different_bases_tasks_or_prompts_are_refused_before_any_is_scored(trained, tmp_path, what):
    task, folders = trained
    runs = copies(folders[:2], tmp_path)
    path = runs[1] / "train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {what: "other"}))
    line = error_line(score(task, "--experiment_dir", *runs))
    assert f"--experiment_dir {runs[1]}: its {what} is not that of {runs[0]}" in line
    assert not list(tmp_path.glob("*/eval*.json"))


@pytest.mark.parametrize("trained", ["summarization"], indirect=True)
def test_a_loop_scores_also_runs_whose_bases_other_versions_describe_otherwise(trained, tmp_path):
    task, folders = trained
    runs = copies(folders[:2], tmp_path)
    path = runs[1] / "train.json"
    content = json.loads(path.read_text())
    content["quantization"]["a_setting_of_other_versions"] = None
    path.write_text(json.dumps(content))
    env = {"FAILED_RUNS": str(tmp_path / "failed")}
    done = run_preloaded(f"llama2_{task}_inference.py", *SCORED, "--experiment_dir", *runs, env=env)
    assert done.returncode == 0, done.stderr
    assert list(map(loaded_by, runs)) == [None, None]


def test_a_base_that_is_forgotten_leaves_no_peak_of_memory_to_the_next(monkeypatch):
    called = []
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: called.append(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    several.Base(True).forget()
    assert called == ["empty_cache", "reset_peak_memory_stats"]


@pytest.mark.parametrize("trained", ["summarization"], indirect=True)
def test_a_training_has_one_folder_and_none_is_named_twice(trained, tmp_path):
    task, folders = trained
    script = f"llama2_{task}.py"
    two = "--experiment_dir", tmp_path / "a", tmp_path / "b"
    line = error_line(run_preloaded(script, *flags_of(task), *two))
    assert "--experiment_dir: a training has one folder" in line
    done = score(task, "--experiment_dir", folders[0], folders[0])
    assert done.returncode == 2
    assert f"--experiment_dir {folders[0]}: it is named twice" in done.stderr


def test_baselines_of_one_process_are_as_if_each_were_alone(tmp_path):
    own = ("--pretrained_ckpt", DEMO_MODEL, "--max_eval_samples", 6, "--price_per_hour", 36)
    each = [
        (*own, "--task_type", task, "--prompt_type", prompt, *flags_of(task)[2:4], *more)
        for task, prompt, more in (
            ("classification", "zero-shot", ("--decoding", "constrained")),
            ("summarization", "few-shot", ()),
        )
    ]
    for flags in each:
        done = run_preloaded(BASELINE, *flags, "--output_dir", tmp_path / "alone")
        assert done.returncode == 0, done.stderr
    words = [[*map(str, flags), "--output_dir", str(tmp_path / "together")] for flags in each]
    (tmp_path / "runs").write_text("".join("\0".join(run) + "\0\x1e\0" for run in words))
    done = run_preloaded(BASELINE, *each[0], env={"RUNS_TO_SCORE": str(tmp_path / "runs")})
    assert done.returncode == 0, done.stderr
    paths = sorted((tmp_path / "alone").rglob("eval.json"))
    assert len(paths) == 2
    for path in paths:
        other = tmp_path / "together" / path.relative_to(tmp_path / "alone")
        assert plain(path) == plain(other)
        rows = [place.with_name("predictions.jsonl").read_bytes() for place in (path, other)]
        assert rows[0] == rows[1]


def test_a_variable_named_runs_that_somebody_has_set_names_no_runs(tmp_path):
    done = run_preloaded(BASELINE, *flags_of("classification")[:4], "--dry_run", env={"RUNS": "3"})
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_that_was_exchanged_meanwhile_is_loaded_anew(monkeypatch):
    from study import model, several

    loaded = []
    monkeypatch.setattr(model, "load_base", lambda *_: loaded.append(object()) or loaded[-1])
    monkeypatch.setattr(model, "remember", lambda base: None)
    monkeypatch.setattr(model, "take_off", lambda base: base)
    base = several.Base(several=True)
    for sha256 in ("a", "a", "b"):
        base.load(Path("run"), "same/name", {"sha256": sha256}, {"load_in_4bit": True})
    assert len(loaded) == 2
