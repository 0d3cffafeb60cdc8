"""Processes that share the layers of a model train what one does that has them all, each with its part in
memory."""

import json
import re
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import DEMO_DATA, ROOT
from preloaded import run_preloaded, run_together
from test_processes import (
    DATA,
    IN_FLOAT32,
    SCORING,
    SHORT,
    TRAINING,
    kill_when,
    record,
    run,
    said_at_the_end,
    same_training,
)

from study import device, sharding
from study.errors import UserError

LAUNCHED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # by docs/fsdp2.yaml
IN_PARTS = f"import os\nos.environ |= {LAUNCHED}\n"
# Leaves the bytes of each process's weights in 4 bits and of those of all.
HELD = """
import json
from pathlib import Path
from bitsandbytes.nn import Linear4bit
from study import sharding

def share_out(model, share_out=sharding.share_out):
    share_out(model)
    weights = [module.weight for module in model.modules() if isinstance(module, Linear4bit)]
    held = [sum(weight.to_local().nbytes for weight in weights), sum(weight.nbytes for weight in weights)]
    Path("{folder}", "held-" + os.environ["RANK"]).write_text(json.dumps(held))

sharding.share_out = share_out
"""
# What copies of lists compute on a GPU: numbers of 16 bits pass through float32, where what is none is one.
COPIES = """
import torch

def copy(targets, sources):
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source.float() if source.is_floating_point() else source)

torch._foreach_copy_ = copy
"""
IN_BFLOAT16 = """
import runpy, sys
sys.argv[0] = "{script}"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
AS_BFLOAT16 = """
from study import sharding

def as_bfloat16(weight):
    weight.data = weight.data.view(-1).view(torch.bfloat16).view(-1, 1)
    weight.quant_storage = torch.bfloat16
    return weight

sharding.as_float32 = as_bfloat16
"""


def script(folder: Path, name: str, before: str = "") -> Path:
    """A script in float32 that begins with these lines."""
    path = folder / name
    path.write_text(before + IN_FLOAT32.format(script=ROOT / name))
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """What one process trains."""
    folder = tmp_path_factory.mktemp("alone")
    run(1, script(folder, TRAINING), folder / "run", *SHORT)
    return folder / "run"


def test_processes_that_share_the_layers_train_in_float32_what_one_does(alone, tmp_path):
    watched, folder = script(tmp_path, TRAINING, IN_PARTS + HELD.format(folder=tmp_path)), tmp_path / "run"
    # Several passes a step, of one process more than of the other.
    stdout = run(2, watched, folder, *SHORT, "--max_tokens_per_batch=120", "--gradient_checkpointing=on")
    assert "plain layers (each process has a part of every layer, by FSDP2)" in stdout
    same_training(folder, alone)
    for held, whole in (json.loads((tmp_path / f"held-{rank}").read_text()) for rank in (0, 1)):
        assert held * 2 == whole > 0
    one, parts = (record(path, "train.json") for path in (alone, folder))
    assert parts["loaded"] == one["loaded"]
    assert parts["quantization"] == one["quantization"]


def test_what_they_leave_when_killed_one_goes_on_with_that_has_the_whole_model(alone, tmp_path):
    folder, logs = tmp_path / "run", tmp_path / "logs"
    logs.mkdir()
    marked = lambda: list(folder.glob("checkpoints/checkpoint-*/progress.json"))
    line = kill_when(marked, 2, script(tmp_path, TRAINING, IN_PARTS), folder, logs, *SHORT)
    assert line == "error: another process of this run has ended: start it again and it goes on\n"
    assert "resumed from checkpoint-" in run(1, script(tmp_path, TRAINING), folder, *SHORT)
    same_training(folder, alone)


def test_weights_come_together_as_they_were_though_copies_know_numbers_alone(tmp_path):
    for name, before in (("as_it_is", COPIES), ("as_bfloat16", COPIES + AS_BFLOAT16)):
        (tmp_path / name).write_text(IN_PARTS + before + IN_BFLOAT16.format(script=ROOT / TRAINING))
    flags = (
        *DATA,
        "--max_train_samples=4",
        "--batch_size=2",
        "--epochs=1",
        "--experiment_dir",
        tmp_path / "run",
    )
    first, other = run_together(2, tmp_path / "as_bfloat16", *flags)
    assert (first.returncode, other.returncode) == (1, 1)
    assert re.match("error: FSDP changes [1-9].* weights in 4 bits", said_at_the_end(first.stderr)), (
        first.stderr
    )
    first, other = run_together(2, tmp_path / "as_it_is", *flags)
    assert (first.returncode, other.returncode) == (0, 0), first.stderr


def test_scoring_which_needs_the_whole_model_is_refused(alone, tmp_path):
    scoring = script(tmp_path, SCORING, IN_PARTS)
    first, other = run_together(2, scoring, *DATA, "--max_eval_samples=5", "--experiment_dir", alone)
    assert (first.returncode, other.returncode) == (1, 1)
    assert "scoring needs the whole model, in 4 bits, on one GPU" in said_at_the_end(first.stderr)


def test_one_process_has_the_whole_model_whatever_the_launcher_asks_for(tmp_path):
    flags = (f"--train_file={DEMO_DATA / 'posts_train.jsonl'}", "--max_train_samples=4", "--epochs=1")
    done = run_preloaded(TRAINING, DATA[0], *flags, "--experiment_dir", tmp_path, env=LAUNCHED)
    assert done.returncode == 0, done.stderr
    assert "plain layers (no CUDA)" in done.stdout


def test_fsdp_1_which_shares_out_no_4_bits_is_refused(monkeypatch):
    for name, value in {**LAUNCHED, "FSDP_VERSION": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="set fsdp_version: 2"):
        sharding.asked()


def test_the_pages_config_file_asks_for_it():
    launch = pytest.importorskip("accelerate.commands.launch")
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = ["--config_file", str(ROOT / "docs" / "fsdp2.yaml"), "--num_processes", "3", TRAINING]
    args, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    assert LAUNCHED.items() <= prepare_multi_gpu_env(args).items()


class Passed(torch.nn.Module):
    """A linear layer in 4 bits, through which a token passes, or not."""

    def __init__(self, passes: bool):
        super().__init__()
        self.passes, self.linear = passes, Linear4bit(64, 64, quant_type="nf4").to(device.current())
        self.linear.weight = sharding.as_float32(self.linear.weight)

    def forward(self, tokens, use_cache):
        return self.linear(torch.zeros(1, 64, device=tokens.device)) if self.passes else tokens


def test_a_weight_that_is_another_or_that_no_token_passes_through_is_refused():
    model = Passed(True)
    as_it_is = sharding.sums(model.linear.weight)
    sharding.prove_whole(model, {model.linear: as_it_is})
    with pytest.raises(UserError, match="FSDP changes 1 of 1 weights"):
        sharding.prove_whole(model, {model.linear: as_it_is + torch.tensor([0] * 7 + [1])})
    model.passes = False
    with pytest.raises(UserError, match="a token passes through none of 1 weights"):
        sharding.prove_whole(model, {model.linear: as_it_is})
