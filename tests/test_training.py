"""A training that is killed goes on and ends as it would have; how a step is split changes nothing; the
record tells."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from types import SimpleNamespace

import pytest
import torch
from conftest import DEMO_DATA, DEMO_MODEL, PROCESS, ROOT, error_line
from preloaded import kill, run_preloaded, start_until
from safetensors.torch import load_file

from study import resuming, training
from study.cli import parse_args
from study.errors import UserError

SCRIPT = "llama2_classification.py"
DATA = (
    f"--pretrained_ckpt={DEMO_MODEL}",
    f"--train_file={DEMO_DATA / 'posts_train.jsonl'}",
    f"--test_file={DEMO_DATA / 'posts_test.jsonl'}",
    "--learning_rate=3e-3",
)


WHOLE = ("--epochs=2", "--max_train_samples=240")


def train_until(seen: Callable[[], object], folder, *flags) -> ForkServerProcess:
    return start_until(seen, SCRIPT, *DATA, "--experiment_dir", folder, *flags)


def train(folder, *flags, script: object = SCRIPT) -> dict:
    done = run_preloaded(script, *DATA, "--experiment_dir", folder, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return {"stdout": done.stdout, **json.loads((folder / "train.json").read_text())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple:
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder, *WHOLE)


def test_killed_twice_and_started_again_it_ends_with_the_same_adapter(whole, tmp_path):
    reference, record = whole
    saved = lambda: set(tmp_path.glob("checkpoints/checkpoint-*"))
    marked = lambda: list(tmp_path.glob("checkpoints/checkpoint-*/progress.json"))
    kill(train_until(marked, tmp_path, *WHOLE))
    # The second time in the middle of a save: a folder is there and is not marked whole.
    seen = saved()
    kill(train_until(lambda: saved() - seen, tmp_path, *WHOLE))
    assert not (tmp_path / "train.json").exists()
    copy = tmp_path / "checkpoints" / "checkpoint-32.bak"  # someone's own
    shutil.copytree(sorted(seen)[0], copy)

    resumed = train(tmp_path, *WHOLE)
    assert "resumed from checkpoint-" in resumed["stdout"]
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / file).read_bytes() == (reference / file).read_bytes()
    for name in ("loss", "tokens", "steps", "learned_tokens", "loss_history"):
        assert resumed["train"][name] == record["train"][name]
    assert list((tmp_path / "checkpoints").iterdir()) == [copy]
    assert 0 < resumed["train"]["earlier_seconds"] < resumed["train"]["wall_seconds"]
    assert "spent_before" not in resumed


def test_checkpoints_of_the_run_are_told_from_copies_and_sorted_by_their_step(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-9 (copy)", "checkpoint-10.bak", "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert [path.name for path in resuming.checkpoints_in(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    resuming.remove_checkpoints(tmp_path, PROCESS)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_checkpoint_of_other_weights_tokens_or_schedule_is_refused(tmp_path):
    args = parse_args("classification", "", [])
    checkpoint = {"sha256": "a" * 64, "eos_token_id": []}
    run = {
        "method": "qlora",
        "config": vars(args),
        "data": {},
        "prompt_sha256": "p",
        "checkpoint": checkpoint,
    }
    run |= {"examples_sha256": "e", "schedule": "s"}
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / resuming.PROGRESS).write_text(json.dumps(run | {"spent": {}, "history": []}))
    assert resuming.resume(tmp_path, run, args, PROCESS)[0]
    for other, message in (
        (
            {"checkpoint": checkpoint | {"sha256": "b" * 64}},
            "another checkpoint than --pretrained_ckpt holds",
        ),
        ({"examples_sha256": "f"}, "other tokens"),
        ({"schedule": "t"}, "another schedule"),
    ):
        with pytest.raises(UserError, match=message):
            resuming.resume(tmp_path, run | other, args, PROCESS)


def test_a_resumed_run_keeps_its_plan_unless_other_flags_ask_for_another(tmp_path):
    args = parse_args("classification", "", [])
    plan = {"fused": False, "tokens": 300, "gradient_checkpointing": True}
    (tmp_path / resuming.PROGRESS).write_text(json.dumps({"config": vars(args), "plan": plan}))
    assert resuming.kept_plan(tmp_path, args) == plan
    assert resuming.kept_plan(None, args) is None
    for flags in (["--max_tokens_per_batch", "64"], ["--gradient_checkpointing", "on"]):
        assert resuming.kept_plan(tmp_path, parse_args("classification", "", flags)) is None


@pytest.mark.parametrize(("keep", "known"), [("residual", True), ("middle", False)])
def test_a_plan_that_other_code_kept_is_not_resumed(tmp_path, keep, known):
    args = parse_args("classification", "", [])
    plan = {"fused": True, "tokens": 300, "gradient_checkpointing": False, "keep": keep, "on_host": False}
    (tmp_path / resuming.PROGRESS).write_text(json.dumps({"config": vars(args), "plan": plan}))
    assert resuming.kept_plan(tmp_path, args) == (plan if known else None)


def test_the_warm_up_begins_above_0_and_does_not_depend_on_the_number_of_epochs():
    assert [training.warmup_steps(0.03, *sizes) for sizes in ((12, 16), (480, 8), (11_014, 16))] == [1, 2, 21]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    trainer = SimpleNamespace(lr_scheduler=None, warmup=4, optimizer=optimizer)
    schedule, rates = training.PackedTrainer.create_scheduler(trainer, 6), []
    for _ in range(6):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_checkpoint_of_other_settings_is_refused_and_kept(tmp_path):
    marked = lambda: list(tmp_path.glob("checkpoints/checkpoint-*/progress.json"))
    kill(train_until(marked, tmp_path, "--epochs=2"))
    line = error_line(run_preloaded(SCRIPT, *DATA, "--experiment_dir", tmp_path, "--epochs=3"))
    assert "--epochs 2, not 3" in line
    assert marked()


def test_ctrl_c_is_recorded_as_interrupted_with_a_cost_that_counts_once_when_it_goes_on(tmp_path):
    saved = lambda: list(tmp_path.glob("checkpoints/checkpoint-*/progress.json"))
    process = train_until(saved, tmp_path, *WHOLE, "--price_per_hour=3.6")
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    stopped = json.loads((tmp_path / "train.json").read_text())
    assert stopped["status"] == "interrupted"
    assert stopped["cost"]["usd"] == pytest.approx(stopped["wall_seconds"] / 1000)

    resumed = train(tmp_path, *WHOLE)
    [before], taken_over = resumed["spent_before"], resumed["train"]["earlier_seconds"]
    assert 0 < taken_over < min(stopped["wall_seconds"], resumed["train"]["wall_seconds"])
    assert before["wall_seconds"] + taken_over == pytest.approx(stopped["wall_seconds"])
    assert before["cost"]["usd"] == pytest.approx(before["wall_seconds"] / 1000)


def test_how_a_batch_is_split_changes_the_adapter_by_rounding_only(tmp_path):
    """Without dropout, whose masks depend on the rows; two steps, since rounding grows with every step."""
    flags = ("--epochs=1", "--dropout=0", "--max_train_samples=32", "--gradient_checkpointing=on")
    one = train(tmp_path / "one", *flags, "--max_tokens_per_batch=8192")
    many = train(tmp_path / "many", *flags, "--max_tokens_per_batch=100")
    assert many["train"]["loss"] == pytest.approx(one["train"]["loss"], rel=2e-3)
    a, b = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "many"))
    moved = sum(a[name].norm() ** 2 for name in a if "lora_B" in name) ** 0.5
    apart = sum((a[name] - b[name]).norm() ** 2 for name in a if "lora_B" in name) ** 0.5
    assert moved > 0
    assert apart < 0.25 * moved


ONE_SAVES = """
import os, runpy, sys
from study.training import Reporter

def on_train_begin(self, *args, begin=Reporter.on_train_begin, **kwargs):
    begin(self, *args, **kwargs)
    self.saving = 1e9 * int(os.environ["RANK"])

def on_save(self, args, state, control, save=Reporter.on_save, **kwargs):
    print("saved", state.global_step)
    save(self, args, state, control, **kwargs)
    self.saving = 1e9

Reporter.on_train_begin, Reporter.on_save = on_train_begin, on_save
sys.argv[0] = "{script}"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_two_processes_train_what_one_does(tmp_path):
    flags = ("--epochs=1", "--dropout=0", "--max_train_samples=36", "--batch_size=5")  # a last step of one
    one = train(tmp_path / "one", *flags)
    (tmp_path / "script.py").write_text(ONE_SAVES.format(script=ROOT / SCRIPT))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", tmp_path / "script.py"]
    done = subprocess.run(
        [*launch, *DATA, *flags, f"--experiment_dir={tmp_path / 'two'}"],
        capture_output=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert b"saved 1" in done.stdout
    two = json.loads((tmp_path / "two" / "train.json").read_text())
    assert two["train"]["batching"]["processes"] == 2
    for (_, ours), (_, theirs) in zip(
        two["train"]["loss_history"], one["train"]["loss_history"], strict=True
    ):
        assert ours == pytest.approx(theirs, rel=2e-2)


def test_the_record_says_what_was_trained_and_what_it_took(whole):
    folder, record = whole
    train = record["train"]
    assert record["status"] == "finished"
    rows = len((DEMO_DATA / "posts_train.jsonl").read_text().splitlines())
    assert (record["data"]["train"]["rows"], record["data"]["train"]["available"]) == (240, rows)
    assert (train["examples"], train["steps"]) == (240, 2 * 240 // 16)
    assert train["tokens_per_second"] == pytest.approx(train["tokens"] / train["seconds"])
    assert 0 < train["seconds"] < train["wall_seconds"]
    assert train["loss_history"][-1][1] < 0.5 * train["loss_history"][0][1]
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == train["trainable_parameters"]
    assert record["quantization"]["bnb_4bit_quant_type"] == "nf4"
    assert record["quantization"]["bnb_4bit_use_double_quant"]
    assert record["quantization"]["bnb_4bit_compute_dtype"] == "bfloat16"


@pytest.fixture(scope="module")
def tracked(tmp_path_factory) -> tuple:
    folder = tmp_path_factory.mktemp("tracked") / "run"
    return folder, train(folder, "--epochs=1", "--max_train_samples=64", "--report_to=tensorboard")


def test_a_tracker_gets_loss_learning_rate_speed_and_memory_of_every_step(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, record = tracked
    [file] = folder.rglob("*tfevents*")
    assert file.parent == folder / "tensorboard"
    events = EventAccumulator(str(file)).Reload()

    def curve(name: str) -> list:
        return [[event.step, event.value] for event in events.Scalars(f"train/{name}")]

    steps = [step for step, _ in record["train"]["loss_history"]]
    losses = [value for _, value in curve("loss")]
    assert steps == [1, 2, 3, 4]
    assert [step for step, _ in curve("loss")] == steps
    # transformers rounds what it logs.
    assert losses == pytest.approx([loss for _, loss in record["train"]["loss_history"]], rel=1e-3)
    rates = [value for _, value in curve("learning_rate")]
    assert rates[-1] == pytest.approx(3e-3)
    assert all(0 < rate <= 3.001e-3 for rate in rates)
    speeds, memory = ([value for _, value in curve(name)] for name in ("tokens_per_second", "memory_gib"))
    assert len(speeds) == len(memory) == 4
    assert speeds[-1] == pytest.approx(record["train"]["tokens_per_second"], rel=0.5)
    assert all(0 < value <= 1.001 * record["train"]["peak_memory_gib"] for value in memory)
    assert memory == sorted(memory)


def test_a_tracker_leaves_the_record_as_any_other(tracked, whole):
    content, plain = tracked[1], whole[1]
    assert content["status"] == "finished"
    assert content["config"]["report_to"] == "tensorboard"
    assert content.keys() == plain.keys()
    assert content["train"].keys() == plain["train"].keys()


def test_without_a_tracker_a_run_leaves_its_adapter_and_record_only(whole):
    assert {path.name for path in whole[0].iterdir()} == {"adapter", "train.json", ".lock"}


def test_a_finished_run_is_found_and_changed_data_under_it_is_not_overlooked(whole, tmp_path):
    folder, _ = whole
    assert train(folder, *WHOLE, "--max_tokens_per_batch=64")["stdout"].startswith("finished")
    file = tmp_path / "posts.jsonl"
    file.write_text((DEMO_DATA / "posts_train.jsonl").read_text())
    flags = (f"--train_file={file}", "--epochs=1", "--max_train_samples=16")
    train(tmp_path / "run", *flags)
    learned = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")  # in one step
    assert all(weight.any() for name, weight in learned.items() if "lora_B" in name)
    file.write_text(file.read_text().replace(" the ", " teh "))
    line = error_line(run_preloaded(SCRIPT, *DATA, *flags, "--experiment_dir", tmp_path / "run"))
    assert "--force" in line
    assert str(file) in line


PATCHED = """
import runpy, sys, torch
from study import paths

plain = paths.loss_sum

def loss_sum(model, examples, *more):
    {first}
    return plain(model, examples, *more)

paths.loss_sum = loss_sum
sys.argv[0] = "{script}"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# In eval mode checkpointing is off, and on the CPU weights in 4 bits are repacked.
CHECK_MODE = "assert all(module.training for module in model.modules()), 'a module is in eval mode'"
RUN_SHORT = """if sum(len(example.ids) for example in examples) > 600:
        raise {error}"""
ALLOCATION = 'RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")'


def train_with(first: str, folder, *flags) -> dict:
    """Train with a loss of plain layers that does `first` before anything else."""
    script = folder.with_suffix(".py")
    script.write_text(PATCHED.format(first=first, script=ROOT / SCRIPT))
    return train(folder, *flags, script=script)


def test_every_module_is_in_train_mode_while_it_trains(tmp_path):
    train_with(CHECK_MODE, tmp_path / "run", "--epochs=1", "--max_train_samples=32")


SHORT = ("--epochs=1", "--dropout=0", "--max_train_samples=60")


@pytest.fixture(scope="module")
def at_once(tmp_path_factory) -> dict:
    """A training whose steps fit the memory as they are."""
    return train(tmp_path_factory.mktemp("at_once"), *SHORT)


@pytest.mark.parametrize("error", ['torch.OutOfMemoryError("CUDA out of memory")', ALLOCATION])
def test_a_step_that_exceeds_the_memory_goes_on_in_smaller_passes_and_learns_the_same(
    at_once, tmp_path, error
):
    short = train_with(RUN_SHORT.format(error=error), tmp_path / "short", *SHORT)
    assert "out of memory: going on with" in short["stdout"]
    sizes = [run["train"]["batching"]["max_tokens_per_batch"] for run in (short, at_once)]
    assert sizes[0] <= 600 < sizes[1]
    assert short["train"]["loss"] == pytest.approx(at_once["train"]["loss"], rel=2e-3)


def test_a_name_of_no_layer_is_refused(tmp_path):
    flags = ("--target_modules", "q_proj", "v_porj", "--experiment_dir", tmp_path)
    assert "--target_modules v_porj: the model has no" in error_line(run_preloaded(SCRIPT, *DATA, *flags))


def test_a_checkpoint_of_another_prompt_is_refused(tmp_path):
    args = parse_args("classification", "", [])
    run = {"method": "qlora", "config": vars(args), "data": {}, "prompt_sha256": "a"}
    (tmp_path / "checkpoint-3").mkdir()
    progress = run | {"spent": {"seconds": 1.0}, "history": [[0, 1.0, 9]]}
    (tmp_path / "checkpoint-3" / resuming.PROGRESS).write_text(json.dumps(progress))
    assert resuming.resume(tmp_path, run, args, PROCESS)[1:] == ({"seconds": 1.0}, [[0, 1.0, 9]])
    with pytest.raises(UserError, match="another prompt"):
        resuming.resume(tmp_path, run | {"prompt_sha256": "b"}, args, PROCESS)


def test_the_newest_checkpoints_are_kept_though_the_clock_was_set_back(tmp_path):
    for step, written in ((8, 4000), (9, 5000), (10, 1000), (11, 2000)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (written, written))
    (tmp_path / "checkpoint-8.bak").mkdir()
    resuming.discard_older(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint-10", "checkpoint-11", "checkpoint-8.bak"}
    assert training.settings(tmp_path, "none").save_total_limit is None


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_learning_rate(tmp_path):
    flags = ("--epochs", "4", "--max_train_samples", "64", "--learning_rate", "1e30")
    done = run_preloaded(SCRIPT, *DATA, *flags, "--experiment_dir", tmp_path)
    assert done.returncode == 1
    assert "--learning_rate 1e+30 is too high for these examples" in error_line(done)
    assert not (tmp_path / "adapter").exists()
    assert json.loads((tmp_path / "train.json").read_text())["status"] == "failed"
