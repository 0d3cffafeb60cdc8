"""The loop that trains encoders and T5: its rates, what it does where memory runs out, its checkpoints; and
the packed T5's kernels, interpreted."""

import dataclasses
import json
import re
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from conftest import INTERPRETED, PROCESS, ROOT, run_program

from study import loop
from study.errors import UserError

PROGRAMS = [(INTERPRETED, "tests/t5_cases.py")]
RECIPE = loop.Recipe(learning_rate=0.1, warmup=2, falls=False, weight_decay=0.01, max_grad_norm=1.0)
RUN = {"method": "encoder", "data": {}, "examples_sha256": "0"}


class Rows(loop.Examples):
    """Rows of numbers whose sum a layer learns to tell; more than `room` tokens at once do not fit."""

    most, room = 64, 10**6

    def __init__(self, rows: list[list[float]]):
        super().__init__([(len(row),) for row in rows], [1] * len(rows), multiples=(1,))
        self.rows = rows

    def batch(self, group: Sequence[int]) -> dict[str, torch.Tensor]:
        if self.area(group) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        [width] = self.widths(group)
        return {"x": torch.tensor([self.rows[i] + [0.0] * (width - len(self.rows[i])) for i in group])}

    def loss_sum(self, model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x = batch["x"]
        weighed = torch.nn.functional.dropout(x, 0.5) * model.weight[0, : x.shape[1]]
        return ((weighed.sum(1) + model.bias - x.sum(1)) ** 2).sum()


def training(folder=None, most: int | str = "auto", steps: int = 12, **other) -> loop.Training:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    model.config = SimpleNamespace(_attn_implementation="none")
    rows = [torch.randn(3 + i % 6).tolist() for i in range(16)]
    config = {
        "force": False,
        "learning_rate": 0.1,
        "epochs": 1,
        "seed": 3,
        "max_tokens_per_batch": most,
        "drop_overlap": False,
    }
    return loop.Training(
        model, Rows(rows), [list(range(16))] * steps, RECIPE, SimpleNamespace(**config | other)
    )


def train(folder, of: loop.Training) -> dict:
    config = {name: value for name, value in vars(of.args).items() if name != "force"}
    run = RUN | {"config": config}
    return loop.train(of, folder, run, PROCESS, lambda: {"model_sha256": "0"})


def test_the_rate_rises_and_then_falls_to_a_last_step_above_0_or_stays():
    falling = dataclasses.replace(RECIPE, learning_rate=1.0, falls=True)
    assert [falling.rate(i, 10) for i in range(10)] == pytest.approx(
        [0.5, 1, *(i / 8 for i in range(8, 0, -1))]
    )
    assert dataclasses.replace(falling, warmup=1).rate(0, 1) == 1
    constant = dataclasses.replace(falling, falls=False)
    assert [constant.rate(i, 4) for i in range(4)] == [0.5, 1, 1, 1]
    assert str(constant) == "constant after a linear warm-up of 2 steps"


def test_decay_is_of_matrices_alone():
    decayed, others = training().optimizer.param_groups
    assert [p.dim() for p in decayed["params"]] == [2]
    assert [p.dim() for p in others["params"]] == [1]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.01, 0.0)


def test_a_step_that_does_not_fit_is_begun_again_in_smaller_passes(tmp_path, capsys):
    fits, small, tight = training(), training(most=20), training()
    tight.examples.room = 20
    for each in (fits, small, tight):
        each.step(0)
    assert "out of memory: going on with 32 tokens at once" in capsys.readouterr().out
    assert tight.most < 20 < fits.most
    assert not torch.equal(fits.model.weight, tight.model.weight)  # dropout is drawn pass by pass
    again = training(most=tight.most)
    again.step(0)
    assert torch.equal(again.model.weight, tight.model.weight)
    tight.examples.room = 1
    with pytest.raises(torch.OutOfMemoryError):
        tight.step(1)


def test_a_resumed_run_goes_on_with_the_passes_that_it_had(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "WRITTEN", 1e12)
    monkeypatch.setattr(loop.resuming.runs, "check_same", lambda *_: None)
    whole, stopped = training(), training()
    whole.examples.room = stopped.examples.room = 20
    train(tmp_path / "whole", whole)
    mark = loop.resuming.mark

    def stop(*given):
        mark(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.resuming, "mark", stop)
    monkeypatch.setattr(loop.time, "monotonic", iter(range(0, 10**6, 100)).__next__)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", stopped)
    monkeypatch.undo()
    monkeypatch.setattr(loop.resuming.runs, "check_same", lambda *_: None)
    resumed = training()  # where all fits at once
    found = train(tmp_path / "stopped", resumed)
    assert found["batching"]["max_tokens_per_batch"] == whole.most < 20
    assert torch.equal(resumed.model.weight, whole.model.weight)
    assert [entry[1] for entry in resumed.history] == [entry[1] for entry in whole.history]

    state = loop.resuming.checkpoints_in(tmp_path / "stopped" / "checkpoints")[-1] / loop.STATE
    state.write_bytes(state.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"checkpoint-\d+ is damaged .*remove it and start again"):
        train(tmp_path / "stopped", training())


def test_checkpoints_take_at_most_a_twentieth_of_the_time(tmp_path, monkeypatch):
    spent, now, step = [], [0.0], loop.Training.step

    def slowly(*_):
        spent.append(0.01)
        now[0] += 0.01

    def at_leisure(self, number: int):
        now[0] += 0.005
        step(self, number)

    monkeypatch.setattr(loop, "save_file", slowly)
    monkeypatch.setattr(loop.Training, "step", at_leisure)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    train(tmp_path, training(steps=200))
    assert len(spent) > 1
    assert sum(spent) < now[0] / 15


# The packed T5


@pytest.fixture(scope="module")
def t5_errors() -> dict:
    pytest.importorskip("triton")
    done = run_program(*PROGRAMS[0])
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["gated", "first", "lora"])
def test_packed_examples_have_the_loss_and_gradients_of_padded_ones(t5_errors, kind):
    errors = t5_errors[kind]
    assert errors["loss"] < 1e-5
    assert errors["gradients"] < 1e-4
    assert errors["dropped"] > 0.02
    assert errors["slope"] < 0.02  # a mask drawn otherwise in the backward pass would be off by far more


def test_the_self_check_sees_every_kernel_that_is_broken(t5_errors):
    found = t5_errors["self-check"]
    assert found.pop("nothing") is None
    assert not [broken for broken, reason in found.items() if reason is None]
    source = (ROOT / "study" / "fast" / "t5_kernels.py").read_text()
    kernels = re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)
    assert {f"t5_kernels.{kernel}: does nothing" for kernel in kernels} < found.keys()
