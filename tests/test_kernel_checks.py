"""A run begins by proving its kernels: what is broken is found, what can't be launched falls back, and what
is not proven equal is left to the model's own layers."""

import copy
import json
import re
import tempfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import INTERPRETED, ROOT, run_program

from study import device

pytest.importorskip("triton")
from study import generation, paths
from study.encoding import Example
from study.fast import decoder, self_check
from study.fast.decode import shared_prefix_of_prompts
from study.packing import shared_prefix

MUTATIONS = Path(tempfile.mkdtemp()) / "mutations.json"
PROGRAMS = [
    (INTERPRETED, "tests/mutations.py", "--output", str(MUTATIONS)),
    (INTERPRETED, "tests/eligibility_cases.py"),
]


# Mutations


@pytest.fixture(scope="module")
def mutations() -> list[dict]:
    done = run_program(*PROGRAMS[0])
    assert MUTATIONS.exists(), done.stderr[-3000:]
    return json.loads(MUTATIONS.read_text())["mutations"]


def test_every_broken_kernel_and_copy_is_found_out_and_nothing_else(mutations):
    said = {
        (row["broken"], check, row[check]["case"]): row[check]["said"]
        for row in mutations
        for check in ("training", "scoring")
        if row[check]
    }
    assert len(said) > 70
    whole = {what[1:] for what, reason in said.items() if reason is None}
    assert whole == {
        *(("training", case) for case in ("plain", "dropout")),
        *(("scoring", case) for case in ("4 bits", "dense", "apart")),
    }
    assert {what[0] for what, reason in said.items() if reason is None} == {"nothing"}


def test_every_kernel_is_broken_in_turn(mutations):
    broken = {row["broken"] for row in mutations}
    others = {ROOT / "study" / "fast" / "t5_kernels.py"}  # test_loop.py
    for path in {*(ROOT / "study" / "fast").glob("*.py")} - others:
        source = path.read_text()
        for kernel in re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE):
            assert f"{path.stem}.{kernel}: does nothing" in broken


# Eligibility


@pytest.fixture(scope="module")
def eligibility() -> dict:
    done = run_program(*PROGRAMS[1])
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_field_of_a_configuration_is_tried_or_said_to_change_nothing(eligibility):
    assert eligibility["unlisted"] == []


def test_what_is_not_refused_is_equal_to_the_models_own_layers(eligibility):
    wrong = {
        name: found
        for name, found in eligibility["results"].items()
        if any(not isinstance(reason, str) and not reason < 1e-4 for reason in found)
    }
    assert wrong == {}
    whole = [
        name for name, found in eligibility["results"].items() if not any(isinstance(f, str) for f in found)
    ]
    assert {"llama", "mistral", "loaded: as it is", "reloaded: as it is"} <= {*whole}


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("llama: attention_dropout 0.3", "attention has dropout"),
        ("llama: attention_bias True", "have biases"),
        ("mistral: sliding_window 4", "has a window"),
        ("loaded: bnb_4bit_compute_dtype torch.float16", "compute in"),
        ("reloaded: bnb_4bit_compute_dtype torch.bfloat16", "compute in"),
        ("reloaded: load_in_8bit True", "Linear8bitLt"),
        ("reloaded: bnb_4bit_quant_type fp4", "not NF4"),
        ("adapter: use_dora True", "Dora"),
        ("changed: forward of a layer", "hooked"),
        ("changed: hook before", "hooked"),
        ("changed: a norm trained", "what is trained"),
        ("changed: adapters disabled", "disabled"),
    ],
)
def test_what_training_would_compute_wrongly_is_refused(eligibility, case, reason):
    assert reason in eligibility["results"][case][0]


def test_rotary_tables_of_another_kind_are_refused_and_fixed_ones_taken(eligibility):
    found = {
        re.search(r"'rope_type': '(\w+)'", name)[1] + ("partial" if "partial" in name else ""): outcome
        for name, outcome in eligibility["results"].items()
        if name.startswith("llama: rope_parameters")
    }
    for kind in ("dynamic", "longrope"):
        assert all("longest sequence" in reason for reason in found[kind])
    assert all("whole heads" in reason for reason in found["linearpartial"])
    for kind in ("linear", "yarn", "llama3"):
        assert not any(isinstance(error, str) for error in found[kind])


# No fallback, no run: here Triton finds no driver to launch anything with.


@pytest.fixture(scope="module")
def tuned():
    from tests.exactness import llama, with_adapters

    return with_adapters(llama(), 4, 0.1)


EXAMPLES = [Example(list(range(3, 3 + n)), n - 2) for n in (9, 7, 8)]


def test_training_whose_kernels_can_not_be_launched_goes_on_with_the_plain_layers(tuned, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 2**30))
    args = Namespace(max_tokens_per_batch=64, gradient_checkpointing="auto", batch_size=2, loss_on="answer")
    before = [parameter.clone() for parameter in tuned.parameters()]
    fast, slow = paths.fast_path(tuned, EXAMPLES, [16, 8], args)
    assert fast is None
    assert "driver" in slow
    assert "\n" not in slow
    assert all(torch.equal(one, other) for one, other in zip(before, tuned.parameters(), strict=True))


def test_scoring_whose_kernels_can_not_be_launched_goes_on_with_generate(tuned, monkeypatch, capsys):
    model = copy.deepcopy(tuned).train()
    tokenizer = type("Tokenizer", (), {"eos_token_id": 2, "decode": lambda self, ids, **options: str(ids)})()
    prompts = [example.ids for example in EXAMPLES]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    monkeypatch.setattr(model, "eval", lambda: model)  # bitsandbytes would repack its weights on the CPU
    expected = generation.generate(model, tokenizer, prompts, 3)
    monkeypatch.setattr(generation, "why_generate", lambda model: None)
    got = generation.generate(model, tokenizer, prompts, 3)
    assert got.texts == expected.texts
    assert "plain generate (" in got.how
    assert "driver" in got.how
    assert got.how in capsys.readouterr().out


def test_what_breaks_before_the_check_is_a_reason_too(tuned, monkeypatch):
    def broken(model):
        raise ImportError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(device, "compute_dtype", lambda: torch.bfloat16)
    monkeypatch.setattr(decoder, "why_not_train", broken)
    settings = Namespace(device=torch.device("cuda"), world_size=1)
    slow = paths.why_plain(tuned, Namespace(attn_implementation="auto"), False, settings)
    assert slow == "ImportError: libcuda.so.1: cannot open shared object file"
    monkeypatch.setattr(device, "compute_dtype", lambda: torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(decoder, "why_not", broken)
    assert generation.why_generate(tuned) == slow


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            FileNotFoundError(2, "No such file or directory", "/tmp/tmp1x2/gcc"),
            "FileNotFoundError: [Errno 2] No such file or directory: 'gcc'",
        ),
        (RuntimeError("one\n  two at 0x7f00ab12"), "RuntimeError: one two at"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_an_error_is_one_short_line_the_same_each_time(error, line):
    def check():
        raise error

    assert self_check.attempt(check) == line


class OutOfResources(Exception):
    """As Triton's, which is no RuntimeError."""


def test_every_error_but_lack_of_memory_is_a_reason():
    def check(error):
        raise error

    reason = self_check.attempt(lambda: check(OutOfResources("out of resource: shared memory, " + "x" * 999)))
    assert reason.startswith("OutOfResources: out of resource: shared memory")
    assert len(reason) <= 120
    for error in (torch.OutOfMemoryError(), RuntimeError("Triton Error [CUDA]: out of memory")):
        with pytest.raises(type(error)):
            self_check.attempt(lambda error=error: check(error))


def test_where_memory_lacks_the_shortest_are_compared_and_then_nothing(capsys):
    tried = []

    def check(most):
        def run(some):
            tried.append(some)
            if sum(some) > most:
                raise torch.OutOfMemoryError
            return "compared"

        return run

    assert self_check.with_less(check(9), [9, 3, 8, 2], int) == "compared"
    assert tried == [[9, 3, 8, 2], [2, 3]]
    assert capsys.readouterr().out == ""
    assert self_check.with_less(check(1), [9, 3], int) is None
    assert "no memory" in capsys.readouterr().out


# What is compared


def example(count: int, first: int, answer: int = 2) -> Example:
    return Example([*range(first, first + 10), *range(50, 50 + count - 10)], count - answer)


def test_the_longest_and_the_shortest_examples_are_compared_in_passes_that_fit_the_plan():
    examples = [example(count, 3) for count in (14, 30, 12, 20)]
    sizes = lambda most: [
        [len(e.ids) for e in group] for group in self_check.groups_of(examples, most, "answer")
    ]
    assert sizes(100) == [[30, 14, 12]]
    assert sizes(30) == [[30], [14, 12]]
    assert [len(e.ids) for e in self_check.groups_of(examples[:1], 30, "answer")[0]] == [14]


def test_two_that_share_a_beginning_are_compared_where_the_longest_and_shortest_share_none():
    examples = [example(40, 1), example(12, 20), example(13, 33), example(20, 3), example(21, 3)]
    *_, pair = self_check.groups_of(examples, 100, "answer")
    assert [len(e.ids) for e in pair] == [20, 21]
    assert shared_prefix(pair, "answer") >= 10


def test_the_prompts_compared_have_in_common_what_all_have():
    prompts = [[1, 2, 3, 4, 9], [1, 2, 3, 5, 6, 7, 8], [1, 2, 8], [1, 2, 3, 4, 4, 4]]
    chosen = self_check.telling(prompts)
    assert len(chosen) <= 4
    assert shared_prefix_of_prompts(chosen) == shared_prefix_of_prompts(prompts)
    assert {3, 7} <= {len(prompt) for prompt in chosen}
