"""Run names, records and what they survive: full disks, kills, failures, other settings."""

import argparse
import contextlib
import errno
import fcntl
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import MEASURED, PROCESS, ROOT, run_script

from prompts import prompt_sha256
from study import cli, device
from study.device import Process
from study.errors import UserError
from study.files import write_text
from study.records import cost, estimate, record, runs, summary
from study.records.schema import LATER, METHODS, settings_of

CLASSIFICATION = "experiments/classification-sampleFraction-1.0_epochs-5_rank-8_dropout-0.1_seed-42"
SUMMARIZATION = "experiments/summarization-sampleFraction-1.0_epochs-1_rank-64_dropout-0.1_seed-42"
DATA = {name: {"source": "t.jsonl", "sha256": "abc", "rows": 2} for name in ("train", "test")}


def flags(*words: object, task: str | None = "classification"):
    return cli.parse_args(task, "", list(map(str, words)))


def run_name(*words: object, task: str = "classification") -> str:
    return str(runs.folder_of(flags(*words, task=task), "qlora"))


def baseline_dir(*words: object) -> Path:
    args = flags(*words, task=None)
    return runs.folder_of(args, args.prompt_type)


def make_record(
    path: Path,
    *words: object,
    error: BaseException | None = None,
    task="classification",
    process=PROCESS,
    **more,
):
    """Write a record as a script does, by its own flags; return it as it then stands on the disk."""
    args = flags(*words, task=task)
    path.parent.mkdir(exist_ok=True)
    try:
        with record.recording(path, args, "qlora", process) as content:
            prompt = prompt_sha256(task, "instruction")
            parts = {"labels": ["a", "b"], "prompt_sha256": prompt, "quantization": {}}
            parts |= {
                ("train" if path.name == "train.json" else "eval"): MEASURED,
                "cost": {"gpu": "CPU", "price_per_hour": None},
            }
            content |= {"data": DATA, **parts, **more}
            if error:
                raise error
    except (UserError, KeyboardInterrupt):
        assert error
    return record.read(path)


# Names


@pytest.mark.parametrize(
    ("task", "words", "name"),
    [
        ("classification", [], CLASSIFICATION),
        ("summarization", [], SUMMARIZATION),
        (
            "classification",
            ["--train_sample_fraction", 0.1],
            "experiments/classification-sampleFraction-0.1_epochs-5_rank-8_dropout-0.1_seed-42",
        ),
        (
            "summarization",
            ["--lora_r=2", "--epochs=50", "--dropout=0.5", "--seed=7", "--train_sample_fraction=0.025"],
            "experiments/summarization-sampleFraction-0.025_epochs-50_rank-2_dropout-0.5_seed-7",
        ),
        ("classification", ["--experiment_dir", "my/run", "--lora_alpha", 32], "my/run"),
    ],
)
def test_a_run_is_named_as_published(task, words, name):
    assert run_name(*words, task=task) == name


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ([], "NousResearch--Llama-2-7b-hf/classification/zero-shot"),
        (["--prompt_type", "few-shot"], "NousResearch--Llama-2-7b-hf/classification/few-shot"),
        (["--task_type", "summarization", "--pretrained_ckpt", "a/b"], "a--b/summarization/zero-shot"),
        (["--pretrained_ckpt", ROOT / "study"], "study/classification/zero-shot"),
        (
            ["--price_per_hour", 1, "--eval_batch_size", 3],
            "NousResearch--Llama-2-7b-hf/classification/zero-shot",
        ),
    ],
)
def test_a_baseline_is_named_by_model_task_and_prompt(words, folder):
    assert str(baseline_dir(*words)) == f"experiments/baseline/{folder}"


@pytest.mark.parametrize(
    "words",
    ["--shots 3", "--chat_template auto", "--max_eval_samples 5", "--seed 1", "--decoding constrained"],
)
def test_a_baseline_with_other_settings_gets_a_short_hash(words):
    name = baseline_dir("--prompt_type", "few-shot", *words.split()).name
    assert re.fullmatch("few-shot_[0-9a-f]{8}", name)


@pytest.mark.parametrize("words", ["--shots 3", "--prompt_type few-shot --shots 1"])
def test_shots_that_change_nothing_name_no_other_run(words):
    assert "_" not in baseline_dir(*words.split()).name


SETTINGS = [  # every flag that changes what a training learns
    "--pretrained_ckpt a/b",
    "--dataset other",
    "--train_file t.jsonl",
    "--text_column body",
    "--text_column subject body",
    "--text_column body subject",
    "--label_column class",
    "--dialogue_column chat",
    "--summary_column short",
    "--drop_overlap",
    "--test_fraction 0.2",
    "--validation_fraction 0.2",
    "--merge_labels",
    "--max_train_samples 9",
    "--max_seq_length 99",
    "--max_new_tokens 9",
    "--lora_alpha 32",
    "--target_modules q_proj v_proj",
    "--learning_rate 1e-3",
    "--batch_size 4",
    "--loss_on all",
]
SPEED = [  # every flag that changes its speed, its score or its place only
    "--also_epochs 1",
    "--test_file t.jsonl",
    "--validation_file t.jsonl",
    "--max_eval_samples 9",
    "--max_tokens_per_batch 999",
    "--gradient_checkpointing on",
    "--attn_implementation eager",
    "--report_to tensorboard",
    "--split validation",
    "--predict_file new.csv",
    "--predictions_file out.csv --predict_file new.csv",
    "--delimiter ;",
    "--unseen_labels drop",
    "--eval_batch_size 3",
    "--merge on",
    "--decoding constrained",
    "--force",
    "--dry_run",
    "--show_repeated --dry_run",
    "--price_per_hour 2.5",
    "--gpu_name H100",
]


@pytest.mark.parametrize("words", SETTINGS)
def test_a_setting_of_the_result_adds_a_short_hash_of_its_own(words):
    assert re.fullmatch(re.escape(CLASSIFICATION) + "_[0-9a-f]{8}", run_name(*words.split()))
    assert len({run_name(*other.split()) for other in SETTINGS}) == len(SETTINGS)


@pytest.mark.parametrize("words", SPEED)
def test_a_flag_that_changes_speed_or_score_only_leaves_the_name(words):
    assert run_name(*words.split()) == CLASSIFICATION
    assert run_name("--batch_size", 4, *words.split()) == run_name("--batch_size", 4)


def test_every_flag_is_known_to_change_the_result_or_not():
    named = {f"--{name}" for name in (*METHODS["qlora"].spelled, "output_dir", "experiment_dir", "help")}
    known = named - {"--task"} | {words.split()[0] for words in SETTINGS + SPEED}
    parser = cli.build_parser("classification", "")
    assert {action.option_strings[-1] for action in parser._actions} == known


def test_one_text_column_names_a_run_as_a_flag_of_one_word_does():
    assert flags("--text_column", "body").text_column == "body"
    assert flags("--text_column", "body", "body").text_column == "body"
    assert run_name("--text_column", "text") == CLASSIFICATION
    assert flags("--text_column", "subject", "body").text_column == ["subject", "body"]
    content = {"config": vars(flags("--text_column", "a b", "c")), "task": "classification", "script": "s.py"}
    assert runs.command(content) == "python s.py --text_column 'a b' c"


def test_the_same_flags_make_the_same_name_however_they_are_written():
    names = {
        run_name("--batch_size", 4, "--lora_alpha", 32),
        run_name("--lora-alpha=32", "--batch-size=4", "--learning_rate", "0.0002", "--dropout", ".1"),
        run_name("--batch_size", "4", "--lora_alpha", "32", "--max_new_tokens", "20"),
    }
    assert len(names) == 1


def test_the_test_file_counts_where_training_drops_its_overlap():
    names = [run_name("--drop_overlap", "--test_file", file) for file in ("a.jsonl", "b.jsonl")]
    assert names[0] != names[1]


@pytest.mark.parametrize("part", ["train", "eval"])
def test_flags_that_are_newer_than_a_record_leave_its_hash(part):
    found = [record.read(path) for path in (ROOT / "results").rglob(f"{part}.json")]
    for content in found:
        args, settings = runs.flags_of(content), settings_of(content["method"], part)
        assert record.hash_of_settings(args, settings) == content["config_hash"]
        unused = [name for name in LATER if content["config"].get(name) is None]
        plain = vars(runs.flags_of(content)) | dict.fromkeys(unused)
        assert record.hash_of_settings(argparse.Namespace(**plain), settings) == content["config_hash"]
    assert found


# Files

ATOMIC = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from study.errors import UserError
from study.records import record
path = Path(sys.argv[1]) / "train.json"
record.write_json(path, {"old": 1})
try:
    record.write_json(path, {"new": "x" * 1_000_000})
except UserError as error:
    print(json.dumps([str(error), [file.name for file in path.parent.iterdir()], path.read_text()]))
"""


def write_on_full_disk(folder: Path, kind: str) -> list:
    """Message, files left and old record's text after a write that the disk has no room for."""
    command, options = [sys.executable, "-c", ATOMIC, str(folder)], {}
    if kind == "full disk":  # a small file system that exists for this command only
        mount = f'mount -t tmpfs -o size=64k none {folder} && exec "$@"'
        command = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh", *command]
        probe = [*command[:5], f"mount -t tmpfs none {folder}"]
        if not shutil.which("unshare") or subprocess.run(probe, capture_output=True, check=False).returncode:
            pytest.skip("no file system of its own can be mounted here")
    else:
        options["preexec_fn"] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, **options)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("kind", "reason"), [("full disk", "No space left on device"), ("file size limit", "File too large")]
)
def test_a_write_without_room_keeps_the_old_record_and_says_so(tmp_path, kind, reason):
    message, left, text = write_on_full_disk(tmp_path, kind)
    assert message.startswith(f"{tmp_path}/train.json can't be written: {reason}; make room")
    assert left == ["train.json"]
    assert json.loads(text) == {"old": 1}


def test_a_reader_has_all_of_the_old_record_or_all_of_the_new(tmp_path):
    path = tmp_path / "train.json"
    record.write_json(path, {"text": "old" * 10_000})
    with open(path) as reader:
        start = reader.read(1000)
        record.write_json(path, {"text": "new" * 5_000})
        assert json.loads(start + reader.read()) == {"text": "old" * 10_000}
    assert json.loads(path.read_text()) == {"text": "new" * 5_000}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_refused_and_the_old_record_kept(tmp_path, value):
    path = tmp_path / "train.json"
    record.write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.write_json(path, {"loss": value})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_text_that_can_not_be_encoded_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "predictions.jsonl"
    with pytest.raises((UserError, UnicodeEncodeError)):
        record.write_rows(path, [{"prediction": "half a pair: \ud83d"}])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 2}', "\x00\xff"])
def test_a_file_that_is_no_record_is_refused_with_the_way_out(tmp_path, text):
    path = tmp_path / "train.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"train\.json is not a .*record.*--force"):
        record.read(path)


@pytest.mark.parametrize("part", ["train", "eval"])
@pytest.mark.parametrize("name", ["seconds", "wall_seconds"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-0.5", '"12"', "null", "[1]"])
def test_a_record_of_impossible_times_is_refused_with_the_way_out(tmp_path, part, name, value):
    path = tmp_path / f"{part}.json"
    path.write_text(f'{{"schema": 1, "status": "finished", "{part}": {{"examples": 4, "{name}": {value}}}}}')
    with pytest.raises(UserError, match=rf"{part}\.json .*--force redoes the run"):
        record.read(path)


def test_a_number_that_is_none_is_refused_wherever_it_stands(tmp_path):
    path = tmp_path / "eval.json"
    path.write_text('{"schema": 1, "status": "finished", "eval": {"metrics": {"accuracy": [NaN]}}}')
    with pytest.raises(UserError, match=r"not a readable record \(NaN is no measurement\)"):
        record.read(path)


@pytest.mark.parametrize("number", ["NaN", "1e999"])
@pytest.mark.parametrize("missing", [False, True])
def test_orjson_and_the_standard_library_read_a_record_alike(tmp_path, monkeypatch, number, missing):
    if missing:
        monkeypatch.setitem(sys.modules, "orjson", None)
    path = tmp_path / "eval.json"
    text = '{"schema": 1, "status": "finished", "eval": {"a": [0.1, -0.0, 1e-7, 2147483648, "\\u00e9"]}}'
    path.write_text(text)
    assert record.read(path) == json.loads(text)
    path.write_text(text.replace("0.1", number))
    with pytest.raises(UserError, match=rf"{number} is no measurement"):
        record.read(path)


def test_no_file_is_no_record(tmp_path):
    assert record.read(tmp_path / "train.json") is None


# Records


def test_a_record_says_what_ran_with_what_and_when(tmp_path):
    content = make_record(tmp_path / "train.json", "--batch_size", 4, train=MEASURED | {"loss": 1.5})
    assert (content["schema"], content["status"], content["task"]) == (1, "finished", "classification")
    assert (content["method"], content["model"]) == ("qlora", "NousResearch/Llama-2-7b-hf")
    assert content["config"] == {k: v for k, v in vars(flags("--batch_size", 4)).items() if k != "given"}
    assert content["train"] == MEASURED | {"loss": 1.5}
    started, finished = (datetime.fromisoformat(content[name]) for name in ("started", "finished"))
    assert started <= finished
    assert started.utcoffset().total_seconds() == 0
    assert content["environment"]["versions"]["python"] == sys.version.split()[0]
    assert content["environment"]["seeds"]["run"] == 42


def test_the_config_hash_follows_the_settings_of_the_result_only(tmp_path):
    words = [[], ["--price_per_hour", 3], ["--seed", 1], ["--lora_alpha", 32], ["--max_tokens_per_batch", 9]]
    plain, price, seed, alpha, tokens = (
        make_record(tmp_path / str(i) / "train.json", *more)["config_hash"] for i, more in enumerate(words)
    )
    assert plain == price == tokens
    assert len({plain, seed, alpha}) == 3


class OutOfMemoryError(RuntimeError):
    """As torch names its own."""


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "oom", "OutOfMemoryError"),
        (RuntimeError("CUDA error: out of memory"), "oom", "RuntimeError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "oom", "RuntimeError"),
        (MemoryError(), "oom", "MemoryError"),
        (ZeroDivisionError("by\nzero"), "failed", "ZeroDivisionError"),
        (UserError("--train_file x: mend it"), "failed", "UserError"),
    ],
)
def test_a_failure_is_recorded_as_what_it_was(tmp_path, error, status, kind):
    content = make_record(tmp_path / "train.json", error=error)
    assert (content["status"], content["error"]["type"]) == (status, kind)
    assert content["error"]["message"]
    assert content["error"]["advice"]
    assert record.status(tmp_path / "train.json") == status


@pytest.mark.parametrize("error", [OutOfMemoryError("CUDA"), RuntimeError("CUDA error: out of memory")])
def test_out_of_memory_names_the_flags_that_mend_it(tmp_path, error):
    with (
        pytest.raises(UserError) as shown,
        record.recording(tmp_path / "train.json", flags(), "qlora", PROCESS),
    ):
        raise error
    assert "smaller --max_tokens_per_batch" in str(shown.value)
    assert "--gradient_checkpointing on" in str(shown.value)
    assert "\n" not in str(shown.value)
    for kind, has in (("encoder", True), ("t5", True), ("cheap", False)):
        args = cli.parse_args(None if kind != "encoder" else "classification", "", [], kind)
        advice = record.describe_error(error, vars(args))["error"]["advice"]
        assert "--gradient_checkpointing" not in advice
        assert ("--max_tokens_per_batch" in advice) == has


def test_an_unforeseen_error_is_shown_as_one_line_and_its_traceback_kept(tmp_path):
    path = tmp_path / "train.json"
    with pytest.raises(UserError) as shown, record.recording(path, flags(), "qlora", PROCESS):
        json.loads("first\nsecond")
    assert str(shown.value).startswith("JSONDecodeError: Expecting value")
    assert "\n" not in str(shown.value)
    assert "in test_an_unforeseen_error" in record.read(path)["error"]["traceback"]


def test_a_result_that_is_no_number_is_a_failure_in_one_line(tmp_path):
    path = tmp_path / "train.json"
    with pytest.raises(UserError) as shown, record.recording(path, flags(), "qlora", PROCESS) as content:
        content["train"] = {"loss": math.nan}
    assert "\n" not in str(shown.value)
    assert record.read(path)["status"] == "failed"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("--flag: mend it")])
def test_an_interruption_and_a_known_error_pass_through_as_they_are(tmp_path, error):
    with (
        pytest.raises(type(error)) as shown,
        record.recording(tmp_path / "train.json", flags(), "qlora", PROCESS),
    ):
        raise error
    assert shown.value is error
    state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    assert record.read(tmp_path / "train.json")["status"] == state


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), MemoryError(), UserError("x")])
def test_a_failure_never_replaces_a_finished_record(tmp_path, error):
    path = tmp_path / "train.json"
    before = make_record(path, train=MEASURED | {"loss": 1.0})
    after = make_record(path, error=error)
    assert len(after.pop("spent_before")) == 1
    assert after == before


def test_a_finished_record_replaces_a_failure_an_older_one_and_a_damaged_one(tmp_path):
    path = tmp_path / "train.json"
    make_record(path, error=ValueError("x"))
    for damaged, loss in ((False, 1.0), (False, 2.0), (True, 3.0)):
        path.write_text("{") if damaged else None
        assert make_record(path, train=MEASURED | {"loss": loss})["train"]["loss"] == loss
    path.write_text("{")
    assert make_record(path, error=ValueError("x"))["status"] == "failed"


def test_a_run_without_a_record_is_not_started_or_unfinished(tmp_path):
    assert record.status(tmp_path / "run" / "train.json") == "not started"
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert record.status(tmp_path / "run" / "train.json") == "unfinished"


@pytest.mark.parametrize("error", [None, ValueError("x"), KeyboardInterrupt()])
@pytest.mark.parametrize("earlier", [None, ValueError("x")], ids=["new", "failed before"])
def test_a_run_that_goes_on_is_running_and_leaves_its_record_alone(tmp_path, error, earlier):
    path = tmp_path / "run" / "train.json"
    if earlier:
        make_record(path, error=earlier)
    with (
        record.locked(path.parent, PROCESS),
        contextlib.suppress(UserError, KeyboardInterrupt),
        record.recording(path, flags("--seed", 7), "qlora", PROCESS),
    ):
        meanwhile = record.status(path), record.read(record.beside(path)), record.read(path)
        if error:
            raise error
    state, so_far, old = meanwhile
    assert state == so_far["status"] == "running"
    assert (so_far["config"]["seed"], so_far["method"]) == (7, "qlora")
    assert (old["status"] if old else None) == ("failed" if earlier else None)
    assert {file.name for file in path.parent.iterdir()} == {"train.json", ".lock"}
    assert record.status(path) == record.read(path)["status"] != "running"


KILLED = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from study import cli
from study.device import Process
from study.records import record
path = Path(sys.argv[1]) / "train.json"
args, process = cli.parse_args("classification", "", []), Process("script")
with record.locked(path.parent, process), record.recording(path, args, "qlora", process):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_is_unfinished_until_another_one_ends(tmp_path):
    path = tmp_path / "train.json"
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert record.read(record.beside(path))["status"] == "running"
    assert record.status(path) == "unfinished"
    make_record(path)
    assert record.status(path) == "finished"
    assert not record.beside(path).exists()


def test_a_finished_run_stays_finished_while_it_is_redone(tmp_path):
    path = tmp_path / "train.json"
    before = make_record(path, train=MEASURED | {"loss": 1.0})
    with (
        record.locked(tmp_path, PROCESS),
        record.recording(path, flags("--force"), "qlora", PROCESS) as content,
    ):
        meanwhile = record.status(path), record.read(path)
        content |= {name: before[name] for name in before.keys() - content.keys()}
    assert meanwhile == ("finished", before)


def test_further_processes_of_a_launch_leave_record_and_lock_to_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    process = Process("script")
    assert not process.main
    with (
        record.locked(tmp_path / "run", process),
        record.recording(tmp_path / "train.json", flags(), "qlora", process),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("world", [None, "", "0", "1"])
def test_a_rank_without_other_processes_is_none(monkeypatch, capsys, world):
    monkeypatch.setenv("RANK", "8")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    assert Process("script").main
    cli.run_script(lambda process: print("it runs"))
    assert capsys.readouterr().out == "it runs\n"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_said_and_the_run_goes_on(tmp_path, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with record.locked(tmp_path / "run", PROCESS):
        [line] = capsys.readouterr().out.splitlines()
    assert f"{tmp_path}/run lies where files can't be locked; start no second run in it" in line


def test_a_lock_that_fails_otherwise_is_one_line(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(UserError, match="can't be locked: Input/output error"),
        record.locked(tmp_path, PROCESS),
    ):
        pass


# What was spent


def lasting(seconds: float) -> Process:
    """A process that began so long ago."""
    return Process("test", began=time.monotonic() - seconds)


def fail(path: Path, seconds: float, *words: object, error: BaseException | None = None) -> dict:
    """A run at $3.60 an hour, which is $0.001 a second, that fails after so many."""
    words = ("--price_per_hour", 3.6, *words)
    return make_record(path, *words, error=error or ValueError("x"), process=lasting(seconds))


def finish(path: Path, seconds: float, earlier: float = 0.0) -> dict:
    """The same run, finished; `earlier` of its seconds are of attempts that it went on from."""
    spent = MEASURED | {"wall_seconds": seconds, "earlier_seconds": earlier, "loss": 1.0}
    cost = {"device": "CPU", "gpus": 1, "gpu": "CPU", "price_per_hour": 3.6, "usd": seconds / 1000}
    part = path.name.removesuffix(".json")
    return make_record(path, "--price_per_hour", 3.6, cost=cost, **{part: spent})


def before(content: dict) -> list[tuple]:
    """Status, seconds and dollars of each attempt before that of a record."""
    return [
        (of["status"], pytest.approx(of["wall_seconds"], abs=1), pytest.approx(of["cost"]["usd"], abs=0.001))
        for of in content["spent_before"]
    ]


@pytest.mark.parametrize("part", ["train", "eval"])
@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), MemoryError(), UserError("x")])
def test_a_run_without_a_result_has_the_seconds_and_the_cost_of_its_process(tmp_path, part, error):
    content = fail(tmp_path / f"{part}.json", 1000, error=error)
    assert 1000 <= content["wall_seconds"] < 1001
    assert content["cost"]["usd"] == pytest.approx(content["wall_seconds"] / 1000)
    assert content["cost"]["device"] == content["cost"]["gpu"] == device.name()
    assert content["cost"]["price_per_hour"] == 3.6
    assert "spent_before" not in content


def test_what_fails_on_two_gpus_pays_for_both(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words, spent = ("--gpu_name", "g5.2xlarge"), []  # $1.212 an hour
    for name in ("train.json", "eval.json"):
        make_record(tmp_path / name, *words, error=ValueError("x"), process=lasting(3600))
        spent.append(record.read(tmp_path / name)["cost"])
    assert [(of["gpus"], round(of["usd"], 3)) for of in spent] == [(2, 2.424)] * 2


def test_a_second_interrupt_does_not_keep_the_first_from_being_recorded(tmp_path, monkeypatch):
    write = record.write_json

    def interrupted(path, content):
        os.kill(os.getpid(), signal.SIGINT)
        write(path, content)

    monkeypatch.setattr(record, "write_json", interrupted)
    path = tmp_path / "train.json"
    with pytest.raises(KeyboardInterrupt), record.recording(path, flags(), "qlora", PROCESS):
        pass
    assert record.read(path)["status"] == "interrupted"


def break_device(monkeypatch):
    monkeypatch.setattr(device, "name", lambda: 1 / 0)


def break_prices(monkeypatch):
    monkeypatch.setattr(cost, "PRICES", ROOT / "no such file")


@pytest.mark.parametrize("break_one", [break_device, break_prices])
def test_a_price_that_can_not_be_told_hides_no_error_and_no_time(tmp_path, monkeypatch, break_one):
    break_one(monkeypatch)
    path = tmp_path / "train.json"
    with (
        pytest.raises(UserError, match="KeyError: 'mine'"),
        record.recording(path, flags(), "qlora", PROCESS),
    ):
        raise KeyError("mine")
    content = record.read(path)
    assert (content["status"], content["error"]["type"]) == ("failed", "KeyError")
    assert content["wall_seconds"] > 0
    assert "cost" not in content


def test_what_a_record_replaces_is_not_forgotten(tmp_path):
    path = tmp_path / "train.json"
    fail(path, 100)
    assert before(fail(path, 200, error=MemoryError())) == [("failed", 100, 0.1)]
    assert before(finish(path, 400)) == [("failed", 100, 0.1), ("oom", 200, 0.2)]
    content = finish(path, 800)  # by --force
    assert before(content) == [("failed", 100, 0.1), ("oom", 200, 0.2), ("finished", 400, 0.4)]
    assert content["train"]["wall_seconds"] == 800


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_what_fails_over_a_finished_record_is_added_to_what_that_has_spent(tmp_path, error):
    path = tmp_path / "eval.json"
    fail(path, 50)
    whole = finish(path, 100)
    for seconds in (200, 400):
        fail(path, seconds, "--force", error=error)
    content, status = record.read(path), record.describe_error(error)["status"]
    assert before(content) == [("failed", 50, 0.05), (status, 200, 0.2), (status, 400, 0.4)]
    assert content | {"spent_before": whole["spent_before"]} == whole
    assert not record.beside(path).exists()
    assert len(before(finish(path, 100))) == 4


def test_seconds_that_a_later_attempt_goes_on_with_are_counted_once(tmp_path):
    path = tmp_path / "train.json"
    finish(path, 1000)
    fail(path, 100)  # its checkpoint has 90 of them
    fail(path, 200)  # went on from there; the next one has 90 + 180
    content = finish(path, 670, earlier=270)
    assert before(content) == [("failed", 30, 0.03), ("failed", 0, 0), ("finished", 1000, 1)]
    assert sum(of["wall_seconds"] for of in content["spent_before"]) + 670 == pytest.approx(1700, abs=1)


def test_seconds_of_attempts_that_left_no_record_take_none_from_those_that_did(tmp_path):
    content = finish(tmp_path / "train.json", 500, earlier=300)  # killed after 300
    assert "spent_before" not in content
    assert before(finish(tmp_path / "train.json", 500, earlier=300)) == [("finished", 500, 0.5)]


def test_a_record_of_an_earlier_version_tells_of_what_it_has(tmp_path):
    path = tmp_path / "train.json"
    failed = fail(path, 100)
    record.write_json(path, {name: failed[name] for name in failed.keys() - {"wall_seconds", "cost"}})
    assert record.read_whole(path)["status"] == "failed"
    finished = finish(path, 400)
    [attempt] = finished["spent_before"]
    assert (attempt["status"], attempt["wall_seconds"], attempt["cost"]) == ("failed", None, None)
    on_two = MEASURED | {"wall_seconds": 400, "batching": {"processes": 2}}
    old = finished | {"cost": {"gpu": "CPU", "price_per_hour": 3.6}, "train": on_two}
    record.write_json(path, {name: old[name] for name in old.keys() - {"spent_before"}})
    [attempt] = finish(path, 500)["spent_before"]
    assert (attempt["wall_seconds"], attempt["cost"]["gpus"], attempt["cost"]["price_per_hour"]) == (
        400,
        2,
        3.6,
    )


@pytest.mark.parametrize(
    "more", [{"spent_before": "x"}, {"train": MEASURED | {"batching": {"processes": "2"}}}]
)
@pytest.mark.parametrize("error", [None, ValueError("x")])
def test_an_earlier_record_that_is_damaged_stops_no_other(tmp_path, more, error):
    path = tmp_path / "train.json"
    record.write_json(path, finish(path, 100) | more)
    content = make_record(path, error=error)
    assert content["status"] == "finished"
    assert len(content.get("spent_before", [])) == (1 if error else 0)


def test_a_failure_that_a_loop_records_for_a_script_is_of_unknown_time(tmp_path, monkeypatch):
    monkeypatch.setenv("CELL_FAILED", "exit 1")
    path = tmp_path / "run" / "train.json"
    estimate.say_dry_run(path, flags("--price_per_hour", 3.6, "--dry_run"), "qlora", lasting(100))
    content = record.read(path)
    assert (content["status"], content["wall_seconds"]) == ("failed", None)
    assert (content["cost"]["price_per_hour"], content["cost"]["usd"]) == (3.6, None)


# Clocks


@pytest.fixture(params=[-3600, -(10.0**9), 10.0**9], ids=["an hour back", "to 1995", "far forward"])
def jump(request, monkeypatch):
    """The wall clock, set otherwise from now on."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + request.param)


def test_a_clock_that_is_set_otherwise_leaves_good_times(tmp_path, jump):
    assert 0 <= PROCESS.seconds() < 10_000
    content = make_record(tmp_path / "train.json", train={**MEASURED, "wall_seconds": PROCESS.seconds()})
    assert find(tmp_path / "train.json") == content


def test_no_duration_comes_from_the_wall_clock():
    calls = [
        (path.name, line.strip())
        for path in sorted((ROOT / "study").rglob("*.py"))
        for line in path.read_text("utf-8").splitlines()
        if re.search(r"\btime\.time\b|from time import|datetime\.now", line)
    ]
    stamps = [
        ("device.py", "started: float = field(default_factory=time.time)"),
        ("record.py", "return utc(time.time())"),
    ]
    assert [(name, line.partition("  #")[0]) for name, line in calls] == stamps
    sources = [path.read_text("utf-8") for path in (ROOT / "study").rglob("*.py")]
    assert sum(len(re.findall(r"\.started\b", source)) for source in sources) == 1  # the record's stamp


def test_a_lock_is_held_by_one_and_free_again_when_that_one_fails(tmp_path):
    def take_and_fail():
        with record.locked(tmp_path, PROCESS):
            with pytest.raises(UserError, match="in use by another run"), record.locked(tmp_path, PROCESS):
                pass
            raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            take_and_fail()


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("classification", "--dropout 0.0 --seed 0 --target_modules q_proj v_proj --force"),
        ("summarization", "--epochs 3 --train_file it.jsonl"),
        (None, "--task_type summarization --prompt_type few-shot --shots 3"),
    ],
)
def test_the_command_of_a_record_has_the_flags_it_was_made_with(task, words):
    args = flags(*words.split(), task=task)
    config = {name: value for name, value in vars(args).items() if name != "given"}
    command = runs.command({"task": args.task, "script": "script.py", "config": config})
    assert sorted(command.split()) == sorted(["python", "script.py", *words.split()])


# Finding finished runs


def find(path: Path, *words: object, data: dict = DATA, trained: dict | None = None):
    return runs.find_finished(path, flags(*words), "qlora", data, trained)


def test_a_finished_run_is_found_and_force_redoes_it(tmp_path):
    path = tmp_path / "train.json"
    assert find(path) is None
    content = make_record(path, "--target_modules", "q_proj", "v_proj")
    assert find(path, "--target_modules", "q_proj", "v_proj", "--price_per_hour", 9) == content
    assert find(path, "--target_modules", "q_proj", "v_proj", "--force") is None


def test_a_finished_record_that_lacks_something_is_refused_in_one_line(tmp_path):
    record.write_json(tmp_path / "train.json", {"schema": 1, "status": "finished"})
    with pytest.raises(UserError, match="lacks a task of ours: --force"):
        find(tmp_path / "train.json")
    content = make_record(tmp_path / "eval.json", training="x")
    record.write_json(tmp_path / "eval.json", {name: content[name] for name in content if name != "cost"})
    with pytest.raises(UserError, match=r"lacks cost\.gpu"):
        find(tmp_path / "eval.json", trained={"finished": "x"})


def test_text_that_is_not_unicode_can_not_be_recorded_and_that_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"train\.json can't be written: .*caf\\udce9' is not Unicode"):
        write_text(tmp_path / "train.json", f"{'x' * 1000}caf\udce9.jsonl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), MemoryError()])
def test_an_unfinished_run_is_not_found(tmp_path, error):
    make_record(tmp_path / "train.json", error=error)
    assert find(tmp_path / "train.json") is None


@pytest.mark.parametrize("words", ["--lora_r 4", "--seed 1", "--dropout 0", "--loss_on all", "--dataset x"])
def test_a_finished_run_with_another_setting_is_refused_by_flag(tmp_path, words):
    make_record(tmp_path / "train.json")
    with pytest.raises(
        UserError, match=f"belongs to a run with {words.split()[0]} .*--experiment_dir, or --force"
    ):
        find(tmp_path / "train.json", *words.split())


@pytest.mark.parametrize("name", ["train.json", "eval.json"])
def test_a_finished_run_of_another_method_is_refused_whatever_its_settings(tmp_path, name):
    content = make_record(tmp_path / name)
    record.write_json(tmp_path / name, content | {"method": "encoder"})
    with pytest.raises(UserError, match=rf"{name} belongs to a run of encoder, not of qlora: .*--force"):
        find(tmp_path / name, trained=training("2024", "a"))


def test_a_finished_run_on_other_data_is_refused(tmp_path):
    make_record(tmp_path / "train.json")
    other = {"train": {"source": "t.jsonl", "sha256": "abd"}}
    with pytest.raises(UserError, match=r"made from other train data than t\.jsonl holds now: --force"):
        find(tmp_path / "train.json", data=other)


def training(finished: str, sha256: str, *words: object) -> dict:
    return {"finished": finished, "train": {"adapter_sha256": sha256}, "config": vars(flags(*words))}


def test_a_score_of_another_adapter_is_not_found_and_of_the_same_one_is_whenever_it_was_trained(tmp_path):
    content = make_record(tmp_path / "eval.json", **runs.scored_adapter(training("2024", "a")))
    assert content["adapter_sha256"] == "a"
    for again in (training("2024", "a"), training("2025", "a")):
        assert find(tmp_path / "eval.json", trained=again) == content
    assert find(tmp_path / "eval.json", trained=training("2024", "b")) is None


def test_a_training_redone_with_another_test_file_has_no_score_though_the_adapter_is_the_same(tmp_path):
    make_record(tmp_path / "eval.json", **runs.scored_adapter(training("2024", "a")))
    redone = training("2025", "a", "--test_file", "other.jsonl")
    assert find(tmp_path / "eval.json", "--test_file", "other.jsonl", trained=redone) is None


@pytest.mark.parametrize("config", [None, [], {}], ids=["none", "a list", "empty"])
def test_a_score_whose_config_is_damaged_is_refused_in_one_line(tmp_path, capsys, config):
    trained = make_record(tmp_path / "train.json", train=MEASURED | {"adapter_sha256": "a"})
    content = make_record(tmp_path / "eval.json", **runs.scored_adapter(trained))
    record.write_json(tmp_path / "eval.json", content | {"config": config})
    with pytest.raises(UserError, match=r"eval\.json lacks config.*--force"):
        find(tmp_path / "eval.json", trained=trained)
    with pytest.raises(UserError, match=r"eval\.json lacks config.*--force"):
        estimate.say_dry_run(tmp_path / "eval.json", flags(), "qlora", PROCESS)


def test_a_score_is_found_by_what_its_record_says_of_the_task_whatever_its_config_does(tmp_path):
    content = make_record(tmp_path / "eval.json", **runs.scored_adapter(training("2024", "a")))
    config = {name: value for name, value in content["config"].items() if name != "task"}
    record.write_json(tmp_path / "eval.json", content | {"config": config})
    assert find(tmp_path / "eval.json", trained=training("2024", "a"))


def test_a_score_of_a_training_without_a_fingerprint_is_told_by_when_that_ended(tmp_path):
    old, newer = ({"finished": stamp, "train": {}} for stamp in ("2024-01-01", "2024-01-02"))
    content = make_record(tmp_path / "eval.json", **runs.scored_adapter(old))
    assert find(tmp_path / "eval.json", trained=old) == content
    assert find(tmp_path / "eval.json", trained=newer) is None


# Inference


@pytest.fixture
def trained(tmp_path) -> dict:
    """The record of a training whose settings are not the defaults."""
    words = "--pretrained_ckpt small --train_file a.jsonl --test_file b.jsonl --lora_r 2 --max_seq_length 99"
    return make_record(tmp_path / "run" / "train.json", *words.split(), "--experiment_dir", tmp_path / "run")


def test_a_training_whose_record_lacks_all_is_not_scored(tmp_path):
    record.write_json(tmp_path / "train.json", {"schema": 1, "status": "finished"})
    with pytest.raises(UserError, match=r"lacks config, .*, train: train the run again with --force"):
        runs.finished_training(tmp_path, flags("--experiment_dir", tmp_path))


@pytest.mark.parametrize("method", ["guessed", None, ["qlora"], "zero-shot", "encoder"])
def test_a_training_of_another_method_or_an_unknown_one_is_not_scored(tmp_path, trained, method):
    path = tmp_path / "run" / "train.json"
    record.write_json(path, trained | {"method": method})
    with pytest.raises(UserError, match=r"train\.json .*method"):
        runs.finished_training(tmp_path / "run", flags("--experiment_dir", tmp_path / "run"))


def test_a_finished_training_of_unknown_speed_is_shown(tmp_path):
    spent = MEASURED | {"tokens_per_second": None}
    content = make_record(tmp_path / "train.json", train=spent, cost={"gpu": "CPU", "usd": None})
    assert "at unknown speed" in summary.result_block(content)


def test_an_adapter_of_another_prompt_is_not_scored(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(runs, "prompt_sha256", lambda *_: "other")
    with pytest.raises(UserError, match=r"another prompt than prompts\.py has now: .*--force"):
        runs.finished_training(tmp_path / "run", flags("--experiment_dir", tmp_path / "run"))


def settings_for(folder: Path, *words: object):
    """The flags of an evaluation of the training in `folder`."""
    args = flags("--experiment_dir", folder, *words)
    before = dict(vars(args))
    taken = runs.with_settings_of(runs.finished_training(folder, args), args)
    assert vars(args) == before  # a look-up changes nothing
    return taken


def test_inference_takes_over_the_settings_of_the_training(tmp_path, trained):
    words = ("--test_file", "c.jsonl", "--pretrained_ckpt", "moved/small")
    args = settings_for(tmp_path / "run", *words)
    assert runs.finished_training(tmp_path / "run", args) == trained
    assert (args.train_file, args.lora_r, args.max_seq_length) == ("a.jsonl", 2, 99)
    assert (args.test_file, args.pretrained_ckpt) == ("c.jsonl", "moved/small")
    assert args.experiment_dir == str(tmp_path / "run")


def test_inference_takes_over_what_the_training_held_out_unless_a_file_is_given_instead(tmp_path):
    make_record(tmp_path / "train.json", "--test_fraction", 0.1, "--validation_fraction", 0.2)
    args = settings_for(tmp_path)
    assert (args.test_fraction, args.validation_fraction) == (0.1, 0.2)
    assert settings_for(tmp_path, "--test_file", "c.jsonl").test_fraction is None


@pytest.mark.parametrize(("split", "other"), [("test", "validation"), ("validation", "test")])
def test_a_file_of_a_split_that_is_not_scored_makes_no_other_evaluation_of_a_share(tmp_path, split, other):
    held_out = ("--test_fraction", 0.1, "--validation_fraction", 0.2)
    trained = make_record(tmp_path / "train.json", *held_out)["config"]
    words = ("--split", split)
    plain, beside = settings_for(tmp_path, *words), settings_for(tmp_path, *words, f"--{other}_file", "c.csv")
    assert runs.eval_name(plain, trained) == runs.eval_name(beside, trained)
    assert (beside.test_fraction, beside.validation_fraction) == (0.1, 0.2)


@pytest.mark.parametrize(
    ("words", "price"),
    [("", (2.5, "A10G")), ("--price_per_hour 3", (3.0, None)), ("--gpu_name H100", (None, "H100"))],
)
def test_inference_takes_over_the_price_of_the_training_unless_one_is_given(
    tmp_path, words, price, monkeypatch
):
    monkeypatch.setattr(device, "name", lambda: "CPU")  # as the record has it
    make_record(tmp_path / "train.json", "--price_per_hour", 2.5, "--gpu_name", "A10G")
    args = settings_for(tmp_path, *words.split())
    assert (args.price_per_hour, args.gpu_name) == price


def test_inference_on_another_device_than_the_trainings_leaves_its_price_and_says_so(tmp_path, capsys):
    make_record(tmp_path / "train.json", "--price_per_hour", 2.5, "--gpu_name", "A10G")
    args = settings_for(tmp_path)
    assert (args.price_per_hour, args.gpu_name) == (None, None)
    assert "price      not the training's, which ran on CPU, and this is " in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        "--lora_r 4",
        "--epochs 9",
        "--dropout 0.2",
        "--seed 1",
        "--train_sample_fraction 0.5",
        "--lora_alpha 32",
        "--target_modules q_proj",
        "--learning_rate 1e-3",
        "--batch_size 4",
        "--loss_on all",
        "--test_fraction 0.1",
        "--validation_fraction 0.1",
    ],
)
def test_an_inference_flag_that_contradicts_the_training_is_refused_by_name(tmp_path, trained, words):
    with pytest.raises(UserError, match=f"belongs to a run with {words.split()[0]} "):
        runs.finished_training(tmp_path / "run", flags(*words.split()))


def eval_name(trained: dict, *words: object) -> str:
    args = flags(*words)
    for name in ("pretrained_ckpt", "train_file", "test_file", "max_seq_length"):
        if name not in args.given:
            setattr(args, name, trained["config"][name])
    return runs.eval_name(args, trained["config"])


def test_a_plain_evaluation_is_eval_json_whatever_its_speed(trained):
    assert eval_name(trained) == "eval.json"
    assert eval_name(trained, "--eval_batch_size", 3, "--price_per_hour", 2, "--force") == "eval.json"
    assert eval_name(trained, "--test_file", "b.jsonl", "--decoding", "free") == "eval.json"


def test_an_evaluation_with_other_settings_has_a_name_and_predictions_of_its_own(trained):
    words = [
        "--unseen_labels keep",
        "--decoding constrained",
        "--split validation",
        "--max_eval_samples 9",
        "--test_file c.jsonl",
    ]
    names = {eval_name(trained, *more.split()) for more in [*words, " ".join(words)]}
    assert len(names) == 6
    for name in names:
        assert re.fullmatch(r"eval-[0-9a-f]{8}\.json", name)
        assert runs.predictions_beside(Path("eval", name)) == Path("eval", f"predictions{name[4:]}l")
    assert runs.predictions_beside(Path("eval/eval.json")) == Path("eval/predictions.jsonl")


def test_a_dry_run_by_experiment_dir_finds_the_evaluation_that_inference_wrote(tmp_path, trained):
    args = flags("--experiment_dir", tmp_path / "run")
    args, path = runs.planned_eval(tmp_path / "run", args)
    make_record(path, **runs.scored_adapter(trained))
    words = ("--experiment_dir", tmp_path / "run", "--price_per_hour", 2)
    done = run_script("llama2_classification_inference.py", *words, "--dry_run")
    assert done.stdout.splitlines()[-1] == f"finished\t{tmp_path / 'run'}\t0\t0\t0\t0\t0\t0"


@pytest.mark.parametrize(
    ("training", "state"),
    [(None, "not started"), ({}, "trained"), ({"error": ValueError("x")}, "failed")],
    ids=["none", "finished", "failed"],
)
def test_a_dry_run_of_an_evaluation_says_how_its_training_stands(tmp_path, capsys, training, state):
    if training is not None:
        make_record(tmp_path / "run" / "train.json", **training)
    estimate.say_dry_run(
        tmp_path / "run" / "eval.json", flags("--output_dir", tmp_path / "none"), "qlora", PROCESS
    )
    training = "0\t0" if state == "trained" else "?\t?"
    assert capsys.readouterr().out.splitlines()[-1] == f"{state}\t{tmp_path / 'run'}\t?\t?\t{training}\t0\t?"


@pytest.mark.parametrize("damaged", [False, True])
def test_what_force_will_redo_is_not_started(tmp_path, capsys, damaged):
    trained = make_record(tmp_path / "run" / "train.json")
    make_record(tmp_path / "run" / "eval.json", training=trained["finished"])
    if damaged:
        (tmp_path / "run" / "train.json").write_text("{")
    args = flags("--output_dir", tmp_path / "none", "--force")
    args, path = runs.planned_eval(tmp_path / "run", args)
    estimate.say_dry_run(path, args, "qlora", PROCESS)
    assert capsys.readouterr().out.splitlines()[-1] == f"not started\t{tmp_path / 'run'}\t?\t?\t?\t?\t0\t?"


def test_a_score_of_an_older_training_is_not_finished(tmp_path, capsys):
    make_record(tmp_path / "run" / "train.json")
    make_record(tmp_path / "run" / "eval.json", training="2024-01-01")
    estimate.say_dry_run(
        tmp_path / "run" / "eval.json", flags("--output_dir", tmp_path / "none"), "qlora", PROCESS
    )
    assert capsys.readouterr().out.splitlines()[-1] == f"trained\t{tmp_path / 'run'}\t?\t?\t0\t0\t0\t?"


def test_a_dry_run_leaves_nothing_behind(tmp_path):
    for script in (
        "llama2_classification.py",
        "llama2_summarization_inference.py",
        "llama2_baseline_inference.py",
    ):
        done = run_script(script, "--output_dir", tmp_path / "runs", "--dry_run")
        assert done.stdout.splitlines()[-1].startswith("not started\t")
    assert not list(tmp_path.iterdir())


def test_the_commit_is_that_of_the_repository_or_what_a_copy_outside_it_is_told(monkeypatch):
    monkeypatch.setenv("STUDY_COMMIT", "c0ffee")
    assert record.commit() == "c0ffee"
    monkeypatch.delenv("STUDY_COMMIT")
    words = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    assert (record.commit() or "").removesuffix("-dirty") == head  # "" where there is no repository


def test_a_device_is_what_torch_computes_on_and_without_torch_what_the_driver_sees(monkeypatch):
    monkeypatch.setattr(device, "gpu_name", lambda: "NVIDIA A10G")
    monkeypatch.setattr(device, "current", lambda: "cuda:0")
    for available, name in ((True, "NVIDIA L4"), (False, device.processor())):
        cuda = SimpleNamespace(is_available=lambda a=available: a, get_device_name=lambda _: "NVIDIA L4")
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
        assert device.name() == name  # a build of torch for no GPU computes on the processor
    monkeypatch.delitem(sys.modules, "torch")
    assert device.name() == "NVIDIA A10G"


def test_a_share_of_a_gpu_has_its_share_of_memory_and_price(monkeypatch):
    import torch

    gib, held = 2**30, 3 * 2**30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-40GB")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60 * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: held)
    assert (device.name(), device.free_bytes()) == ("NVIDIA A100-SXM4-40GB", 60 * gib)
    monkeypatch.setenv("GPU_SHARE", "0.25")
    assert (device.name(), device.free_bytes()) == (
        "0.25 of NVIDIA A100-SXM4-40GB",
        20 * gib - held - device.CONTEXT,
    )
    held = 40 * gib
    assert device.free_bytes() == 0
    for words, whole in ([], 3.81), (["--price_per_hour", "2"], 2), (["--gpu_name", "g5.2xlarge"], 1.212):
        args = cli.parse_args("classification", "", words)
        own, shared = (cost.of(args, name, 3600) for name in ("NVIDIA A100-SXM4-40GB", device.name()))
        assert (own["usd"], shared["usd"]) == pytest.approx((whole, whole / 4))
        assert cost.repriced(shared, []) == pytest.approx(whole / 4)
    listed = [
        {"gpu": "A100-SXM4-40GB", "instance": "x", "usd_per_hour": 4, "source": "s", "date": "2026-01-01"}
    ]
    args = cli.parse_args("classification", "", [])
    assert cost.repriced(cost.of(args, device.name(), 1), listed) == 1
    assert cost.shown(cost.of(args, device.name(), 1)) == "0.25 of NVIDIA A100-SXM4-40GB"


@pytest.mark.parametrize("word", ["0", "1.5", "-1", "half", "nan"])
def test_a_share_that_is_none_is_refused_at_once(word, monkeypatch, capsys):
    monkeypatch.setenv("GPU_SHARE", word)
    with pytest.raises(SystemExit) as ended:
        cli.run_script(lambda process: pytest.fail("it began"))
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        f"error: GPU_SHARE={word}: it takes a share of a GPU, above 0 and at most 1\n"
    )


def invalid_lines(folder: Path, share: float, **config: object) -> list[str]:
    """What the result block says of invalid answers."""
    metric = {"value": share, "ci95": [0, 100]}
    scored = {"commonest_invalid": [["It is b\nor a", 1200], ["", 3]]}
    scored |= {"metrics": MEASURED["metrics"] | {"invalid_answers": metric}}
    content = make_record(folder / "eval.json", eval=MEASURED | scored, cost={"gpu": "CPU", "usd": None})
    content["config"] |= config
    lines = summary.result_block(content).splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith("invalid    ")), len(lines))
    return [line.strip() for line in lines[first:] if not line.startswith(("scored", "spent"))]


def test_where_many_answers_are_invalid_the_commonest_are_shown_with_the_flag_that_helps(tmp_path):
    shown = ["invalid    answers that name no class, the commonest:", r'1,200  "It is b\nor a"', '3  ""']
    mend = "--decoding constrained lets the model choose among the class names only"
    assert invalid_lines(tmp_path, 10.1) == [*shown, mend]
    assert invalid_lines(tmp_path, 10.0) == []
    assert invalid_lines(tmp_path, 90.0, decoding=None) == shown  # of a T5, which has no such flag
