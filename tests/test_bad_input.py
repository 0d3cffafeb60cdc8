"""Bad input to the real scripts: one clear line on stderr, exit status 1 or 2, and nothing is lost."""

import fcntl
import gzip
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import DEMO_DATA, DEMO_MODEL, MEASURED, PROCESS, ROOT, error_line, run_script, write_rows
from preloaded import run_preloaded

from prompts import prompt_sha256
from study import checkpoint, cli
from study.errors import UserError
from study.files import hub_answers as answers
from study.records import record

TRAINING = ["llama2_classification.py", "llama2_summarization.py"]
INFERENCE = ["llama2_classification_inference.py", "llama2_summarization_inference.py"]
SCRIPTS = [*TRAINING, *INFERENCE, "llama2_baseline_inference.py"]
ROWS = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(6)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture
def files(tmp_path) -> tuple:
    """Flags that name good data."""
    paths = [write_rows(tmp_path / f"{split}.jsonl", ROWS) for split in ("train", "test")]
    return "--train_file", paths[0], "--test_file", paths[1]


def fraction(share: object) -> tuple:
    return "--train_sample_fraction", share


def leave_record(folder: Path, *flags: object, task: str = "classification", error=None) -> Path:
    """A run's train.json, with the record machinery that the scripts use but without a model."""
    folder.mkdir()
    args = cli.parse_args(task, "", list(map(str, flags)))
    path = folder / "train.json"
    try:
        with record.recording(path, args, "qlora", PROCESS) as content:
            content |= {"labels": ["a", "b"], "data": {"train": {"sha256": "0"}}, "quantization": {}}
            content |= {"prompt_sha256": prompt_sha256(task, "instruction"), "train": MEASURED}
            content["cost"] = {"gpu": "CPU", "price_per_hour": None}
            if error:
                raise error
    except (UserError, KeyboardInterrupt):
        assert error
    return path


def refusal(script: str, *flags: object, status: int = 1, by=run_script) -> str:
    done = by(script, *flags)
    assert done.returncode == status, done.stderr
    line = error_line(done)
    assert line.startswith("error: ") if status == 1 else f"{script}: error: " in line
    return line


# Files

HALF = gzip.compress(LINES * 50)
BAD_FILES = {
    "half-written gz": ("t.jsonl.gz", HALF[: len(HALF) // 2], "damaged or half-written"),
    "garbage gz": ("t.jsonl.gz", b"not gzip at all", "damaged or half-written"),
    "gz with a wrong byte": ("t.jsonl.gz", HALF[:40] + b"\0\0\0\0" + HALF[44:], "damaged or half-written"),
    "gz cut in its checksum": ("t.jsonl.gz", HALF[:-3], "damaged or half-written"),
    "malformed JSON line": ("t.jsonl", LINES + b'{"text": "cut\n', "line 7 is not JSON"),
    "JSON line that is no object": ("t.jsonl", LINES + b'"text"\n', "line 7 is not a JSON object"),
    "JSON array cut short": ("t.json", b'[{"text": "t", "label": "a"},', "is not JSON"),
    "JSON array of strings": ("t.json", b'["text"]', "row 1 is not a JSON object"),
    "JSON nested without end": ("t.jsonl", LINES + b'{"text": ' + b"[" * 100_000, "line 7 is not JSON"),
    "open quote in CSV": ("t.csv", b'text,label\n"never closed,a\n', "is not CSV"),
    "garbage parquet": ("t.parquet", b"PAR1garbage", "is not a Parquet file"),
    "no UTF-8": ("t.jsonl", LINES + b'{"text": "\xff\xfe"}\n', "line 7 is not UTF-8"),
    "unknown kind of file": (
        "t.xlsx",
        LINES,
        r"the name must end in \.jsonl, \.json, \.csv, \.tsv, \.parquet",
    ),
    "empty file": ("t.jsonl", b"", "has no usable row: it is empty"),
    "empty gz": ("t.jsonl.gz", gzip.compress(b""), "has no usable row: it is empty"),
    "CSV of a header alone": ("t.csv", b"text,label\n", "has no usable row: it is empty"),
    "empty JSON array": ("t.json", b"[]", "has no usable row: it is empty"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    line = refusal("llama2_classification.py", "--train_file", path, "--output_dir", tmp_path / "runs")
    assert re.search(rf"{re.escape(str(path))}.* {message}", line)
    assert not list(tmp_path.rglob("train.json"))


BAD_ROWS = {
    "missing column": (
        [{"body": "t", "label": "a"}],
        'row 1 has no column "text" but body, label.*--text_column',
    ),
    "column missing further down": ([*ROWS, {"text": "t"}], 'row 7 has no column "label" but text'),
    "numbers": ([{"text": 1.5, "label": "a"}], 'row 1: column "text" holds a number'),
    "class numbers": ([*ROWS, {"text": "t", "label": 3.5}], 'row 7: column "label" holds a number'),
    "lists": ([{"text": ["t"], "label": "a"}], 'row 1: column "text" holds a list'),
    "objects": ([{"text": {"t": 1}, "label": "a"}], 'row 1: column "text" holds a dict'),
    "nulls": ([{"text": None, "label": "a"}] * 3, "has no usable row: 3 rows with empty text"),
    "one class": ([{"text": "t", "label": "a"}] * 3, 'has one class only, "a"'),
}


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_an_unusable_row_is_named_with_what_is_wrong(tmp_path, rows, message):
    path = write_rows(tmp_path / "t.jsonl", rows)
    line = refusal("llama2_classification.py", "--train_file", path, "--output_dir", tmp_path / "runs")
    assert re.search(rf"{re.escape(str(path))} {message}", line)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_name_of_a_card_is_refused_on_a_machine_without_one(tmp_path, files, script):
    folder, tuned = tmp_path / "run", script in INFERENCE
    if tuned:
        leave_record(folder, *files, task=script.split("_")[1])
    for more in ((), ("--dry_run",)):
        line = refusal(script, *files, "--experiment_dir", folder, "--gpu_name", "A10G", *more)
        assert re.search("--gpu_name A10G: no GPU is in sight here; .* by --price_per_hour", line)
    assert len(list(tmp_path.rglob("*.json"))) == tuned


@pytest.mark.parametrize(("named", "lines"), [(2, 1), (4, 0)])
def test_a_training_without_a_test_file_says_so_at_once(tmp_path, files, named, lines):
    unreadable = incomplete_checkpoint(tmp_path / "checkpoint", "config.json")
    flags = (*files[:named], "--pretrained_ckpt", unreadable, "--experiment_dir", tmp_path / "run")
    done = run_script("llama2_classification.py", *flags)
    assert done.stdout.count("test       none named: scoring will need --test_file\n") == lines
    assert "has not a configuration" in error_line(done)


def test_a_folder_in_place_of_a_file_is_said(tmp_path, files):
    line = refusal("llama2_classification.py", "--train_file", tmp_path, "--output_dir", tmp_path / "runs")
    assert line == f"error: --train_file {tmp_path} is a folder: name a file, or the folder by --dataset"


@pytest.mark.parametrize("script", [*TRAINING, "llama2_baseline_inference.py"])
def test_a_missing_file_is_named_with_its_flag(tmp_path, script):
    missing = tmp_path / "no.jsonl"
    flags = ("--train_file", missing, "--test_file", missing, "--output_dir", tmp_path / "runs")
    assert f"_file {missing}: there is no such file" in refusal(script, *flags)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_checks_the_files_unless_the_run_is_finished(tmp_path, files, script):
    if "summar" in script:
        files = tuple(f"--{name}_file={DEMO_DATA}/dialogues_{name}.jsonl" for name in ("train", "test"))
    flags = ("--output_dir", tmp_path / "runs", "--dry_run")
    assert run_script(script, *files, *flags).stdout.splitlines()[-1].startswith("not started\t")
    missing = tmp_path / "no.jsonl"
    assert "no such file" in refusal(script, *files[:2], "--test_file", missing, *flags)
    assert not (tmp_path / "runs").exists()


def test_a_missing_summary_column_is_named_with_its_flag(tmp_path, files):
    line = refusal("llama2_summarization.py", *files, "--output_dir", tmp_path / "runs")
    assert re.search(
        r'no column "dialogue" but text, label: name it by --dialogue_column, --summary_column', line
    )


@pytest.mark.parametrize("name", ["./no/such", "/no/such", "no/such/folder", "nothing.jsonl"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(tmp_path, name):
    line = refusal("llama2_classification.py", "--dataset", name, "--output_dir", tmp_path / "runs")
    assert line == f"error: --dataset {name}: there is no such file or folder"


def test_a_test_class_outside_train_stops_training_and_names_the_row(tmp_path, files):
    rows = [*ROWS, {"text": "t", "label": "c"}]
    flags = (*files[:3], write_rows(tmp_path / "other.jsonl", rows), "--output_dir", tmp_path / "runs")
    for script in ("llama2_classification.py", "llama2_baseline_inference.py"):
        assert 'other.jsonl row 7: class "c" does not occur in the train split' in refusal(script, *flags)


def test_a_test_class_that_training_never_saw_stops_inference_and_names_the_row(tmp_path, files):
    path = leave_record(tmp_path / "run", *files)
    test = write_rows(tmp_path / "other.jsonl", [*ROWS, {"text": "t", "label": "c"}])
    flags = ("--experiment_dir", path.parent, "--test_file", test)
    assert 'row 7: class "c"' in refusal("llama2_classification_inference.py", *flags)


# Flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_sample_fraction", "0"], "--train_sample_fraction: 0 is not in (0, 1]"),
        (["--train_sample_fraction", "1.5"], "--train_sample_fraction: 1.5 is not in (0, 1]"),
        (["--train_sample_fraction", "-0.1"], "--train_sample_fraction: -0.1 is not in (0, 1]"),
        (["--train_sample_fraction", "nan"], "--train_sample_fraction: nan is not in (0, 1]"),
        (["--train_sample_fraction", "half"], "--train_sample_fraction: invalid fraction value: 'half'"),
        (["--dropout", "1"], "--dropout: 1 is not in [0, 1)"),
        (["--test_fraction", "1"], "--test_fraction: 1 is not in (0, 1)"),
        (
            ["--test_fraction", "0.1"],
            "--test_fraction takes a share of train, --test_file names another split",
        ),
        (
            ["--validation_fraction", "0.1", "--validation_file", "v.jsonl"],
            "--validation_fraction takes a share of train, --validation_file names another split",
        ),
        (["--delimiter", "||"], "--delimiter: '||' is not one character, or tab"),
        (["--epochs", "0"], "--epochs: 0 is not 1 or more"),
        (["--lora-r", "2.5"], "--lora_r: invalid positive_int value: '2.5'"),
        (["--learning_rate", "inf"], "--learning_rate: inf is not above 0"),
        (["--seed", "-1"], "--seed: -1 is not in [0, 4294967296)"),
        (["--gradient_checkpointing", "maybe"], "--gradient_checkpointing: invalid choice: 'maybe'"),
        (["--no_such_flag", "1"], "unrecognized arguments: --no_such_flag 1"),
        (["--epoch", "1"], "unrecognized arguments: --epoch 1 (did you mean --epochs?)"),
        (["--learning-rat=1"], "unrecognized arguments: --learning_rat=1 (did you mean --learning_rate?)"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_a_bad_flag_is_named_with_status_2(tmp_path, files, flags, message):
    assert message in refusal("llama2_classification.py", *files, *flags, status=2)
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl", "test.jsonl"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_refuses_an_unknown_flag(script):
    assert "unrecognized arguments: --no_such_flag" in refusal(script, "--no_such_flag", status=2)


def test_a_fraction_too_small_for_a_class_says_the_least_that_works(tmp_path, files):
    line = refusal("llama2_classification.py", *files, "--experiment_dir", tmp_path / "a", *fraction(0.01))
    least = line.rpartition(" ")[2]
    assert f"the least that works here is {least}" in line
    # With that fraction the sample is drawn, and turns out to be another than the finished run's.
    path = leave_record(tmp_path / "run", *files, *fraction(least))
    flags = (*files, *fraction(least), "--experiment_dir", path.parent)
    assert "was made from other train data" in refusal("llama2_classification.py", *flags)


@pytest.mark.parametrize("script", ["llama2_summarization.py", "llama2_summarization_inference.py"])
def test_constrained_decoding_is_unknown_to_summarization_scripts(script):
    assert "--decoding constrained" in refusal(script, "--decoding", "constrained", status=2)


def test_constrained_decoding_goes_with_classification_alone():
    flags = ("--task_type", "summarization", "--decoding", "constrained")
    assert "it goes with classification" in refusal("llama2_baseline_inference.py", *flags, status=2)


def test_a_label_tree_with_one_class_is_refused(tmp_path):
    path = write_rows(tmp_path / "t.jsonl", [{"text": "t", "label": "a"}] * 3)
    flags = ("--task_type", "classification", "--decoding", "constrained", "--output_dir", tmp_path)
    line = refusal("llama2_baseline_inference.py", *flags, "--train_file", path, "--test_file", path)
    assert 'has one class only, "a": classification needs two or more' in line


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_flag_and_loads_no_library(script):
    done = run_script(script, "--help", env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not {"torch", "transformers", "datasets", "peft", "numpy", "pyarrow"} & imported
    task = {True: "classification", False: "summarization"}["classification" in script]
    parser = cli.build_parser(None if "baseline" in script else task, "")
    for action in parser._actions:
        assert action.help
        assert action.option_strings[-1] in done.stdout


# Runs


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupted_script_says_so_with_status_130(name):
    code = (
        f"import signal; from study import cli; cli.run_script(lambda _: signal.raise_signal(signal.{name}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted: start it again and it goes on\n")


@pytest.mark.parametrize(("flag", "status"), [("--help", 0), ("-h", 0), ("--hlep", 2)])
def test_the_demo_says_what_it_does_and_stops(tmp_path, flag, status):
    env = {"PATH": "/usr/bin:/bin"}  # without a Python it could do nothing else
    done = subprocess.run(
        [ROOT / "demo.sh", flag], cwd=tmp_path, capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == status
    assert done.stdout.startswith("One command on a fresh machine: set up .venv, then score") == (not status)
    assert done.stderr == ("error: --hlep: the demo takes no flags but --help\n" if status else "")


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["-m", "study.report", "results/demo"], 0),
        (["-m", "study.report", "--help"], 0),
        (["llama2_classification.py", "--dry_run"], 0),
        (["llama2_classification.py", "--dry_run", "--train_file", "no.jsonl"], 1),
    ],
)
def test_a_reader_that_has_enough_is_no_error(buffered, words, status):
    reader, writer = os.pipe()
    os.close(reader)
    env = os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"}
    command = [sys.executable, *words]
    done = subprocess.run(
        command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, env=env, check=False
    )
    os.close(writer)
    assert done.returncode == status
    assert done.stderr.count("\n") == status


@pytest.mark.parametrize("script", INFERENCE)
def test_inference_without_a_run_says_to_train_it(tmp_path, script):
    line = refusal(script, "--experiment_dir", tmp_path / "none")
    assert line.startswith(
        f"error: --experiment_dir {tmp_path / 'none'}: there is no such run; train it first"
    )
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (ValueError("x"), "failed"),
        (KeyboardInterrupt(), "interrupted"),
        (MemoryError(), "oom"),
        (None, "unfinished"),
    ],
    ids=["failed", "interrupted", "oom", "killed"],
)
@pytest.mark.parametrize("script", INFERENCE)
def test_inference_on_an_unfinished_training_says_how_it_stands(tmp_path, files, script, error, state):
    task = script.split("_")[1]
    path = leave_record(tmp_path / "run", *files, task=task, error=error)
    if error is None:  # killed before its end: checkpoints, but no record
        path.unlink()
        (path.parent / "checkpoints").mkdir()
    line = refusal(script, "--experiment_dir", path.parent)
    assert f"its training is {state}; start the training script again" in line


def test_inference_on_a_run_of_the_other_task_says_so(tmp_path):
    rows = [{"text": "t", "label": label, "dialogue": "A: hi", "summary": "s"} for label in "ab"]
    both = write_rows(tmp_path / "both.jsonl", rows)
    flags = ("--train_file", both, "--test_file", both, "--pretrained_ckpt", tmp_path / "no" / "model")
    path = leave_record(tmp_path / "run", *flags)
    line = refusal("llama2_summarization_inference.py", "--experiment_dir", path.parent)
    assert "classification" in line


def test_all_linear_beside_other_names_is_refused(files):
    flags = ("--target_modules", "all-linear", "lm_head")
    assert "all-linear stands alone" in refusal("llama2_classification.py", *files, *flags, status=2)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_second_run_in_the_same_folder_refuses_and_touches_nothing(tmp_path, files, script):
    path = leave_record(
        tmp_path / "run", *files, task="summarization" if "summar" in script else "classification"
    )
    (path.parent / "checkpoints").mkdir()
    (path.parent / "checkpoints" / "half").write_text("precious")
    if "summar" in script:
        files = tuple(f"--{name}_file={DEMO_DATA}/dialogues_{name}.jsonl" for name in ("train", "test"))
    with open(path.parent / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()}
        line = refusal(script, *files, "--experiment_dir", path.parent, "--force")
        assert f"{path.parent} is in use by another run" in line
        assert {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["plain", "force"])
def test_bad_input_leaves_a_finished_record_as_it_is(tmp_path, files, force):
    path = leave_record(tmp_path / "run", *files)
    before = path.read_bytes()
    files[1].write_bytes(LINES + b"{broken")
    assert "line 7" in refusal("llama2_classification.py", *files, "--experiment_dir", path.parent, *force)
    assert path.read_bytes() == before


def test_a_folder_that_is_a_file_is_refused(tmp_path, files):
    flags = (*files, "--experiment_dir", files[1])
    assert f"--experiment_dir {files[1]} can't be used" in refusal("llama2_classification.py", *flags)
    assert files[1].read_bytes() == LINES


def test_a_damaged_record_is_named_with_the_way_out(tmp_path, files):
    path = leave_record(tmp_path / "run", *files)
    path.write_text('{"schema": 1, "stat')
    line = refusal("llama2_classification.py", *files, "--experiment_dir", path.parent)
    assert f"{path} is not a readable record" in line
    assert "--force" in line


# Checkpoints and the hub; these load the libraries


LACKING = {
    "model.safetensors": "has not weights (model.safetensors)",
    "tokenizer.json": "has not a tokenizer (tokenizer.json)",
    "config.json": "has not a configuration (config.json)",
}


def incomplete_checkpoint(folder: Path, lacking: str) -> Path:
    folder.mkdir()
    for name in LACKING.keys() - {lacking}:
        (folder / name).write_text('{"model_type": "llama"}')
    return folder


@pytest.mark.parametrize(("lacking", "message"), LACKING.items(), ids=LACKING)
def test_an_incomplete_checkpoint_is_named_with_what_it_lacks(tmp_path, lacking, message):
    folder = incomplete_checkpoint(tmp_path / "checkpoint", lacking)
    with pytest.raises(UserError, match=re.escape(f"--pretrained_ckpt {folder} {message}")):
        checkpoint.identify(str(folder), fetch=True)


def test_weights_as_pickle_alone_are_named_with_the_way_out(tmp_path):
    folder = incomplete_checkpoint(tmp_path / "checkpoint", "model.safetensors")
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"pickle")
    with pytest.raises(
        UserError, match=r"as pickle alone .* no script here loads: fetch its model\.safetensors"
    ):
        checkpoint.identify(str(folder), fetch=True)


def test_a_checkpoint_without_weights_ends_the_run_in_one_line(tmp_path, files):
    folder = incomplete_checkpoint(tmp_path / "checkpoint", "model.safetensors")
    line = refusal(
        "llama2_baseline_inference.py", *files, "--pretrained_ckpt", folder, "--output_dir", tmp_path
    )
    assert f"--pretrained_ckpt {folder} has not weights" in line


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_encoder_is_refused_with_the_script_that_takes_it_before_any_weight_is_read(
    tmp_path, files, script
):
    task, folder, encoder = script.split("_")[1].removesuffix(".py"), tmp_path / "run", tmp_path / "bert"
    if script in INFERENCE:
        leave_record(folder, *files, task=task)
    elif task == "summarization":
        files = tuple(f"--{name}_file={DEMO_DATA}/dialogues_{name}.jsonl" for name in ("train", "test"))
    encoder.mkdir()
    (encoder / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}')
    if script == INFERENCE[1]:
        files = ("--test_file", DEMO_DATA / "dialogues_test.jsonl")
    flags = (*files, "--pretrained_ckpt", encoder, "--experiment_dir", folder)
    line = refusal(script, *flags, by=run_preloaded)
    assert f"--pretrained_ckpt {encoder} is an encoder (BertForMaskedLM): competitors/encoder_class" in line


@pytest.mark.parametrize("tracker", ["nosuch", "wandb"])
def test_a_tracker_that_is_not_there_is_named_before_the_model_loads(tmp_path, files, tracker):
    if importlib.util.find_spec(tracker):
        pytest.skip(f"{tracker} is installed")
    unreadable = shutil.copytree(DEMO_MODEL, tmp_path / "checkpoint")
    (unreadable / "config.json").write_text('{"model_type": "mystery"}')
    flags = (*files, "--pretrained_ckpt", unreadable, "--report_to", tracker)
    flags += ("--experiment_dir", tmp_path / "run")
    line = refusal("llama2_classification.py", *flags, by=run_preloaded)
    assert line.startswith(f"error: --report_to {tracker}: ")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"train.json", ".lock"}


def test_a_hub_checkpoint_while_offline_is_named(tmp_path, files):
    flags = (*files, "--pretrained_ckpt", "nobody/no-such-model", "--experiment_dir", tmp_path / "run")
    line = refusal("llama2_classification.py", *flags)
    assert record.status(tmp_path / "run" / "train.json") == "failed"
    assert line.startswith("error: --pretrained_ckpt nobody/no-such-model can't be loaded (offline?")


@pytest.fixture
def hub(monkeypatch):
    """A hub at a port of this machine, for this process and those that it starts; as it stands it takes a
    call and says nothing, as behind many a firewall."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
        yield server


def hub_answers(seconds: float) -> bool:
    return answers.__wrapped__(seconds)


@pytest.mark.parametrize("named", ["--pretrained_ckpt", "--dataset"])
def test_a_hub_that_does_not_answer_is_not_waited_for(tmp_path, files, hub, named):
    flags = (
        named,
        "nobody/no-such",
        *(files if named == "--pretrained_ckpt" else ()),
        "--output_dir",
        tmp_path,
    )
    done = run_script("llama2_classification.py", *flags, env={"HF_HUB_OFFLINE": ""}, timeout=20)
    assert error_line(done).startswith(f"error: {named} nobody/no-such")


def test_a_hub_that_takes_a_call_may_take_longer_to_answer_than_to_be_reached(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "30")

    def answer_late() -> None:
        with hub.accept()[0] as call:
            threading.Event().wait(0.5)
            call.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    thread = threading.Thread(target=answer_late)
    thread.start()
    assert hub_answers(0.2)
    thread.join()
    assert "HF_HUB_OFFLINE" not in os.environ


@pytest.mark.parametrize("at", ["", "http://no-such-hub.invalid", "no address"])
def test_a_hub_that_refuses_or_has_no_address_is_given_up_at_once(hub, monkeypatch, at):
    hub.close()
    monkeypatch.setenv("HF_ENDPOINT", at or os.environ["HF_ENDPOINT"])
    assert not hub_answers(10)
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(("word", "left"), [("true", "true"), ("0", "1"), ("", "1")])
def test_offline_means_what_it_does_to_the_hubs_library(hub, monkeypatch, word, left):
    hub.close()
    monkeypatch.setenv("HF_HUB_OFFLINE", word)
    assert not hub_answers(10)
    assert os.environ["HF_HUB_OFFLINE"] == left  # 1 where it was asked


def test_a_hub_data_set_while_offline_is_named(tmp_path):
    flags = ("--dataset", "nobody/no-such-data", "--experiment_dir", tmp_path / "run")
    line = refusal("llama2_summarization.py", *flags)
    assert line.startswith("error: --dataset nobody/no-such-data: no train split on the hub or in its cache")
    assert "--train_file" in line


def test_a_record_that_lacks_a_part_is_named_with_the_way_out(tmp_path, files):
    path = leave_record(tmp_path / "run", *files)
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "labels"}))
    line = refusal("llama2_classification_inference.py", "--experiment_dir", path.parent)
    assert f"{path} lacks labels: train the run again with --force" in line


@pytest.mark.parametrize("damage", ["another model", "weights", "configuration"])
def test_an_adapter_that_does_not_fit_is_said_in_one_short_line(tmp_path, damage):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from study import model

    def llama(width: int) -> LlamaForCausalLM:
        sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))

    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(llama(16), lora).save_pretrained(tmp_path)
    model.load_adapter(llama(16), tmp_path)
    if damage == "weights":
        (tmp_path / "adapter_model.safetensors").write_bytes(b"half")
    elif damage == "configuration":
        (tmp_path / "adapter_config.json").write_text('{"peft_type"')
    with pytest.raises(UserError) as error:
        model.load_adapter(llama(32 if damage == "another model" else 16), tmp_path)
    assert f"{tmp_path} is damaged or not an adapter of --pretrained_ckpt" in str(error.value)
    assert len(str(error.value)) < 500
