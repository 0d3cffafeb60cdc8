"""The fast path computes what the plain layers compute: loss and every gradient, against float64.

On the CPU, with Triton's interpreter, in a process of its own, since that is chosen at import.
"""

import json

import pytest
from conftest import INTERPRETED, run_program

pytest.importorskip("triton")
from study.fast.memory import KEEPS

PROGRAMS = [(INTERPRETED, "tests/fused_cases.py")]


@pytest.fixture(scope="module")
def errors():
    """Run every case of fused_cases.py at once: its results by name."""
    done = run_program(*PROGRAMS[0])
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_weights_are_unpacked_as_bitsandbytes_does(errors):
    assert errors["unpacked"] == 0
    assert errors["still readable"]


@pytest.mark.parametrize(
    "case", [*(f"{keep}, loss on answer" for keep in KEEPS), "all, loss on all", "input, loss on all"]
)
def test_loss_and_gradients_are_right_whatever_a_layer_keeps(errors, case):
    loss, _, gradient = errors[case]
    assert loss < 1e-6
    assert gradient < 1e-5


@pytest.mark.parametrize(("rank", "dropout"), [(2, 0.0), (2, 0.3), (64, 0.3)])
def test_loss_and_gradients_are_right_for_every_rank_and_with_dropout(errors, rank, dropout):
    loss, _, gradient = errors[f"rank {rank}, dropout {dropout}"]
    assert loss < 1e-6
    assert gradient < 1e-5


@pytest.mark.parametrize("case", ["dropout 0.0", "dropout 0.3", "PEFT"])
def test_what_examples_begin_with_alike_is_computed_once_and_changes_nothing(errors, case):
    assert errors["computed once"] == [9, 14 + 12 + 19 - 2 * 9]
    loss, gradients, worst = errors[f"alike, {case}"]
    assert loss < 1e-6
    assert gradients < 1e-5
    assert worst < 1e-5


@pytest.mark.parametrize("keep", ["all", "input"])
def test_loss_and_gradients_are_right_where_eight_heads_share_a_key_head(errors, keep):
    loss, gradients, worst = errors[f"eight heads a key head, {keep}"]
    assert loss < 1e-6
    assert gradients < 1e-5
    assert worst < 1e-5


def test_dropout_keeps_the_share_it_should_and_differs_by_seed(errors):
    shares, agreement = errors["dropout"]
    assert shares == pytest.approx([0.9, 0.7, 0.5], abs=0.01)
    assert agreement == pytest.approx(0.5, abs=0.02)  # two masks of one half each


def test_dropout_is_that_of_the_whole_step_in_whatever_passes_it_is_computed(errors):
    loss, gradients, worst = errors["in parts"]
    assert loss < 1e-6
    assert gradients < 1e-5
    assert worst < 1e-5


def test_one_example_does_not_change_anothers_loss(errors):
    assert errors["isolation"] == [0.0, True]


def test_the_self_check_leaves_everything_as_it_was(errors):
    same = errors["left as it was"]
    assert len(same) == 7
    assert all(same.values()), same


def test_the_memory_formula_has_room_for_the_gradient_of_shared_rows(errors):
    assert errors["shared gradient fits"] == [True, True, True]


def test_models_that_can_not_take_the_path_say_why(errors):
    reasons = errors["reasons"]
    assert reasons["llama"] is None
    assert "not every linear layer" in reasons["some layers only"]
    assert "has an adapter" in reasons["embedding"]
    assert "has an adapter" in reasons["head"]
    assert "Mamba" in reasons["mamba"]  # whose configuration knows no heads
    assert "GPTNeoX" in reasons["neox"]
    assert "rank exceeds 128" in reasons["rank"]


def test_a_plan_fits_the_memory_and_prefers_speed(errors):
    plans = errors["plans"]
    assert plans["80 GiB"] == ["all", 16384, False]
    assert [plans[name][0] for name in ("22 GiB", "14 GiB")] == ["all", "all"]  # in more passes
    assert plans["22 GiB"][1] > plans["14 GiB"][1]
    assert (plans["3 GiB"][0], plans["3 GiB"][2]) == ("input", True)
    assert plans["checkpointing on"][0] == "input"
    assert plans["1000 tokens"][1] == 1000
    assert plans["a long example"][1] >= 20000
