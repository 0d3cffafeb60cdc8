"""The scripts as their users run them: train, score, find again, few-shot, both tasks, on the demo's and on
real data."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import DEMO_DATA, DEMO_MODEL, ROOT, error_line, run_script
from preloaded import kill, run_preloaded, start_until
from safetensors.torch import load_file, save_file

MODEL = ("--pretrained_ckpt", DEMO_MODEL, "--learning_rate", "3e-3", "--price_per_hour", "0.5")
FILES = {"classification": "posts", "summarization": "dialogues"}


def data_flags(task: str) -> tuple:
    name = FILES[task]
    return "--train_file", DEMO_DATA / f"{name}_train.jsonl", "--test_file", DEMO_DATA / f"{name}_test.jsonl"


def run(script: str, *flags, by=run_preloaded) -> str:
    done = by(script, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_eval(folder: Path, name: str = "eval.json") -> tuple[dict, list[dict]]:
    rows = (folder / name.replace("eval", "predictions").replace(".json", ".jsonl")).read_text().splitlines()
    return json.loads((folder / name).read_text()), [json.loads(row) for row in rows]


@pytest.fixture(scope="module", params=FILES)
def tuned(request, tmp_path_factory) -> tuple[str, Path]:
    """A short training of each task and its evaluation by --experiment_dir alone; those of one task in
    interpreters of their own, as a user starts them."""
    by = run_script if request.param == "summarization" else run_preloaded
    folder = tmp_path_factory.mktemp(request.param) / "run"
    length = {
        "classification": ("--epochs", 3, "--max_train_samples", 240, "--batch_size", 4),
        "summarization": ("--epochs", 2, "--max_train_samples", 80, "--batch_size", 4),
    }[request.param]
    flags = (*length, "--experiment_dir", folder)
    run(f"llama2_{request.param}.py", *MODEL, *data_flags(request.param), *flags, by=by)
    flags = ("--experiment_dir", folder, "--price_per_hour", "0.5")
    run(f"llama2_{request.param}_inference.py", *flags, by=by)
    return request.param, folder


def test_every_test_example_has_its_row_in_order_and_the_record_adds_up(tuned):
    task, folder = tuned
    content, rows = read_eval(folder)
    answer = "label" if task == "classification" else "summary"
    references = [json.loads(line)[answer] for line in (DEMO_DATA / f"{FILES[task]}_test.jsonl").open()]
    assert [row["reference"] for row in rows] == references
    assert [row["index"] for row in rows] == list(range(len(rows)))
    metrics = content["eval"]["metrics"]
    if task == "classification":
        assert all(row["correct"] == (row["parsed"] == row["reference"]) for row in rows)
        assert metrics["accuracy"]["value"] == pytest.approx(
            100 * sum(r["correct"] for r in rows) / len(rows)
        )
        assert content["eval"]["invalid_answers"] == sum(row["parsed"] is None for row in rows)
    else:
        assert metrics["rouge1"]["value"] == pytest.approx(sum(row["rouge1"] for row in rows) / len(rows))
    assert content["status"] == "finished"
    assert content["method"] == "qlora"
    assert content["cost"]["usd"] == pytest.approx(0.5 * content["eval"]["wall_seconds"] / 3600)
    assert 0 < content["eval"]["output_tokens"] < content["eval"]["input_tokens"]


def test_a_short_training_scores_far_above_the_tenth_or_the_13_points_of_the_untuned_model(tuned):
    task, folder = tuned
    content, _ = read_eval(folder)
    score = content["eval"]["metrics"]["accuracy" if task == "classification" else "rouge1"]["value"]
    assert score > 30


def test_a_finished_evaluation_is_found_and_another_setting_stands_beside_it(tuned):
    task, folder = tuned
    script = f"llama2_{task}_inference.py"
    before, others = (folder / "eval.json").read_bytes(), set(folder.glob("eval-*.json"))
    assert run(script, "--experiment_dir", folder).startswith("finished")
    run(script, "--experiment_dir", folder, "--max_eval_samples", 8)
    assert (folder / "eval.json").read_bytes() == before
    [other] = {*folder.glob("eval-*.json")} - others
    content, rows = read_eval(folder, other.name)
    assert content["eval"]["examples"] == len(rows) == 8
    check_rows(rows, task)


def check_rows(rows: list[dict], task: str) -> None:
    """Each prediction of a part of the demo's test set names its row there."""
    lines = (DEMO_DATA / f"{FILES[task]}_test.jsonl").read_text("utf-8").splitlines()
    answers = [json.loads(line)["label" if task == "classification" else "summary"] for line in lines]
    assert [row["reference"] for row in rows] == [answers[row["index"]] for row in rows]
    assert (
        [row["index"] for row in rows] == sorted({row["row"] - 1 for row in rows}) != list(range(len(rows)))
    )


def test_an_adapter_that_is_not_the_trained_one_is_refused(tuned, tmp_path):
    task, folder = tuned
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    save_file(dict(list(weights.items())[:14]), path, {"format": "pt"})
    flags = ("--experiment_dir", tmp_path / "run", "--force")
    line = error_line(run_preloaded(f"llama2_{task}_inference.py", *flags))
    assert "is not the adapter that its train.json tells of" in line
    content = json.loads((tmp_path / "run" / "train.json").read_text())
    del content["train"]["adapter_sha256"]  # as in records of earlier versions
    (tmp_path / "run" / "train.json").write_text(json.dumps(content))
    line = error_line(run_preloaded(f"llama2_{task}_inference.py", *flags))
    assert "is damaged or not an adapter of" in line


def test_an_evaluation_that_is_killed_goes_on_and_ends_with_the_same_answers(tuned, tmp_path):
    task, folder = tuned
    # One at a time: in bfloat16 an answer can depend on what it is batched with.
    script, flags = f"llama2_{task}_inference.py", ("--eval_batch_size", "1", "--max_eval_samples", "10")
    flags += ("--decoding", "constrained") * (task == "classification")  # whose confidences go on, too
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for copy in (whole, killed):
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("eval*", "predictions*"))
    run(script, "--experiment_dir", whole, *flags)
    answers = lambda: [path.read_text().splitlines() for path in killed.glob(".eval-*.answers.jsonl")]
    begun = lambda: any(len(lines) > 2 for lines in answers())
    kill(start_until(begun, script, "--experiment_dir", killed, *flags))
    assert re.search(r"resumed +[1-9]\d* of 10", run(script, "--experiment_dir", killed, *flags))
    [expected], [got] = (list(copy.glob("predictions-*.jsonl")) for copy in (whole, killed))
    assert got.read_bytes() == expected.read_bytes()
    assert not list(killed.glob(".*answers*"))


@pytest.mark.parametrize("tuned", ["classification"], indirect=True)
def test_constrained_answers_are_always_classes_and_the_record_says_so(tuned):
    _, folder = tuned
    others = set(folder.glob("eval-*.json"))
    flags = ("--experiment_dir", folder, "--decoding", "constrained", "--max_eval_samples", 16)
    run("llama2_classification_inference.py", *flags)
    [other] = {*folder.glob("eval-*.json")} - others
    content, rows = read_eval(folder, other.name)
    assert content["eval"]["decoding"] == "constrained"
    assert content["eval"]["invalid_answers"] == 0
    assert {row["parsed"] for row in rows} <= set(content_labels(folder))
    assert all(0 < row["confidence"] <= 1 for row in rows)
    assert len({row["confidence"] for row in rows}) > 9
    assert content["eval"]["per_example"]["confidences"] == [round(row["confidence"], 6) for row in rows]
    assert "confidence" not in read_eval(folder)[1][0]  # free answers are not chosen among


def content_labels(folder: Path) -> list[str]:
    return json.loads((folder / "train.json").read_text())["labels"]


@pytest.mark.parametrize("task", FILES)
def test_few_shot_scores_the_untuned_model_where_the_design_says(tmp_path, task):
    flags = (*MODEL[:2], *data_flags(task), "--task_type", task, "--output_dir", tmp_path)
    flags += ("--prompt_type", "few-shot", "--max_eval_samples", 6)
    by = run_script if task == "classification" else run_preloaded
    shown = run("llama2_baseline_inference.py", *flags, by=by)
    assert "examples, by 0 tokens in all" in shown
    [path] = tmp_path.glob(f"baseline/model/{task}/few-shot_*/eval.json")
    content, rows = read_eval(path.parent)
    assert content["method"] == "few-shot"
    assert content["few_shot"]["examples"] == (10 if task == "classification" else 2)
    assert len(rows) == 6
    check_rows(rows, task)


def test_the_demos_test_examples_do_not_occur_in_training_nor_its_classes_go_below_eight():
    for name, key in (("posts", "text"), ("dialogues", "dialogue")):
        train, test = (
            [json.loads(line) for line in (DEMO_DATA / f"{name}_{split}.jsonl").open()]
            for split in ("train", "test")
        )
        assert not {row[key] for row in train} & {row[key] for row in test}
        assert name != "posts" or len({row["label"] for row in train}) >= 8
        assert name == "posts" or len(train) + len(test) >= 200
    size = sum(path.stat().st_size for part in ("model", "data") for path in (ROOT / "demo" / part).iterdir())
    assert size < 5e6


def test_real_posts_through_training_and_inference(real_data, tmp_path):
    files = [f"--{split}_file={real_data / f'newsgroups_{split}.jsonl.gz'}" for split in ("train", "test")]
    flags = (*MODEL, *files, "--train_sample_fraction", 0.025, "--epochs", 1, "--output_dir", tmp_path)
    out = run("llama2_classification.py", *flags)
    assert "274 of 11,014 rows" in out
    assert "texts shortened" in out
    run("llama2_classification_inference.py", *flags, "--max_eval_samples", 32)
    [path] = tmp_path.glob("classification-sampleFraction-0.025_epochs-1_rank-8_*/eval-*.json")
    content, rows = read_eval(path.parent, path.name)
    assert len(rows) == 32
    assert len(content_labels(path.parent)) == 20
    assert content["eval"]["metrics"]["accuracy"]["ci95"][1] <= 100
