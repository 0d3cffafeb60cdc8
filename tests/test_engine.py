"""The fast path of scoring answers as plain `generate` does, whatever it shares, merges, batches or has to
wait for.

Its kernels run on the CPU, with Triton's interpreter, in a process of its own: that is chosen at import.
"""

import itertools
import json
import math

import pytest
import torch
from conftest import INTERPRETED, run_program

from study import device

pytest.importorskip("triton")
from study import generation
from study.fast import decode
from study.fast.decode import Choices, Places, shared_prefix_of_prompts
from study.tokens import Chosen

ANSWERS = [[5, 6, 7], [5, 6, 8, 7], [11, 7]]


PROGRAMS = [(INTERPRETED, "tests/engine_cases.py")]


@pytest.fixture(scope="module")
def results():
    """Run every case of engine_cases.py at once: its results by name."""
    done = run_program(*PROGRAMS[0])
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("decoding", ["free", "constrained"])
@pytest.mark.parametrize("weights", ["4 bits", "merged"])
@pytest.mark.parametrize("how", ["together, all at once", "apart, 2 at once", "together, little room"])
def test_answers_are_those_of_plain_generate_one_at_a_time(results, decoding, weights, how):
    expected = results[f"plain, {decoding}"]
    assert results[f"{weights}, {decoding}, {how}"] == expected
    assert len({tuple(answer) for answer in expected}) > 1


@pytest.mark.parametrize("apart", [1000, 10])
def test_answers_are_those_of_plain_generate_where_eight_heads_share_a_key_head(results, apart):
    expected = results["eight heads a key head, plain"]
    assert results[f"eight heads a key head, {apart}"] == expected
    assert len({tuple(answer) for answer in expected}) > 1


@pytest.mark.parametrize("weights", ["4 bits", "merged"])
@pytest.mark.parametrize("how", ["together, all at once", "apart, 2 at once", "together, little room"])
def test_confidences_are_those_of_every_answer_scored_by_hand(results, weights, how):
    expected, answers = results["by hand"], results["plain, constrained"]
    assert results[f"confidence, {weights}, constrained, {how}"] == pytest.approx(expected, rel=1e-5)
    assert results[f"confidence, {weights}, free, {how}"] == [None] * len(expected)
    assert [5, 6, 79] in answers  # one of four ends, beside a token
    assert [12, 13, 15, 9] in answers
    assert all(0.05 < confidence < 0.95 for confidence in expected)


def test_some_answers_end_early(results):
    assert len({len(answer) for answer in results["plain, free"]}) > 1


def test_what_it_would_compute_wrongly_is_left_to_generate(results):
    reasons = results["reasons"]
    assert reasons["adapters"] is None
    assert reasons["merged"] is None
    assert "has an adapter" in reasons["head"]
    assert "has an adapter" in reasons["embedding"]
    assert "others not" in reasons["partly"]


def test_products_from_4_bits_are_those_with_the_unpacked_weights(results):
    assert max(results["multiply"]) < 1e-5


def test_an_answer_is_decided_as_soon_as_one_path_is_left():
    choices = Choices(ANSWERS, "cpu")
    after_5 = choices.next[0][5]
    assert choices.forced(after_5) is None
    assert choices.forced(choices.next[0][11]) == [7]
    assert choices.forced(choices.next[choices.next[after_5][6]][8]) == [7]
    assert choices.forced(choices.next[choices.next[after_5][6]][7]) == []


def test_the_likeliest_allowed_token_is_chosen():
    choices, logits = Choices(ANSWERS, "cpu"), torch.zeros(2, 20)
    logits[0, [3, 5, 11]] = torch.tensor([9.0, 1.0, 2.0])
    tokens, nodes, shares = choices.choose(logits, torch.tensor([0, choices.next[0][5]]))
    assert tokens.tolist() == [11, 6]
    assert nodes.tolist() == [choices.next[0][11], choices.next[choices.next[0][5]][6]]
    assert shares.tolist() == pytest.approx([math.e**2 / (math.e + math.e**2), 1])


def test_the_share_of_an_end_is_that_of_all_ends():
    choices, logits = Choices([*ANSWERS, [5, 6, 9]], "cpu"), torch.zeros(2, 20)
    logits[0, [7, 8, 9]] = torch.tensor([3.0, 2.0, 1.0])
    logits[1, [7, 8, 9]] = torch.tensor([1.0, 2.0, 1.0])
    after_6 = choices.next[choices.next[0][5]][6]
    tokens, _, shares = choices.choose(logits, torch.tensor([after_6, after_6]))
    assert tokens.tolist() == [7, 8]
    one, two, three = (math.exp(i) for i in (1, 2, 3))
    assert shares.tolist() == pytest.approx([(one + three) / (one + two + three), two / (2 * one + two)])


def test_prompts_share_what_all_begin_with_and_keep_a_token_of_their_own():
    assert shared_prefix_of_prompts([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 9]]) == 2
    assert shared_prefix_of_prompts([[1, 2, 3], [1, 2, 3]]) == 2
    assert shared_prefix_of_prompts([[1, 2], [1, 2, 3]]) == 1
    assert shared_prefix_of_prompts([[1, 2, 3]]) == 0


def test_places_do_not_overlap_and_a_freed_one_is_taken_again():
    places = Places(first=10, rows=100)
    starts = [places.take(size) for size in (40, 30, 20, 1)]
    assert starts == [10, 50, 80, None]
    places.freed.append(50)
    assert [places.take(25), places.take(25)] == [50, None]


class TooLarge:
    """An engine that runs out of memory after each answer until it has a quarter of what is free."""

    error = torch.OutOfMemoryError

    def __init__(self, model):
        pass

    def answers(self, prompts, max_new_tokens, ends, allowed, most):
        for index in sorted(prompts):
            yield index, ([index], 0.5)
            if self.memory > 100 / 4:
                raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_is_tried_again_with_half_of_it_and_loses_nothing(error, monkeypatch, capsys):
    monkeypatch.setattr(TooLarge, "error", error)
    monkeypatch.setattr(decode, "Engine", TooLarge)
    monkeypatch.setattr(device, "free_memory", lambda: 100)
    got = list(generation.fast_answers(None, Chosen([[1]] * 5, range(5)), 4, [2], None, None))
    assert got == [(i, ([i], 0.5)) for i in range(5)]
    assert capsys.readouterr().out.count("out of memory") == 2


def test_another_error_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(TooLarge, "error", RuntimeError("CUDA error: an illegal memory access"))
    monkeypatch.setattr(decode, "Engine", TooLarge)
    monkeypatch.setattr(device, "free_memory", lambda: 100)
    with pytest.raises(RuntimeError, match="illegal"):
        list(generation.fast_answers(None, Chosen([[1]], [0]), 4, [2], None, None))


@pytest.mark.parametrize("free", [0, 100])
def test_what_never_fits_ends_in_out_of_memory(free, monkeypatch):
    class Hopeless(TooLarge):
        def answers(self, *_):
            raise torch.OutOfMemoryError

    monkeypatch.setattr(decode, "Engine", Hopeless)
    monkeypatch.setattr(device, "free_memory", lambda: free)
    with pytest.raises(torch.OutOfMemoryError):
        list(generation.fast_answers(None, Chosen([[1]], [0]), 4, [2], None, None))


def test_examples_wait_for_room_and_are_read_when_there_are_enough():
    engine = decode.Engine.__new__(decode.Engine)
    engine.at_once, engine.most = 20, 9
    engine.cache = type("Cache", (), {"shared": 1})
    prompts = {i: [0] * (1 + size) for i, size in enumerate((8, 6, 6, 4, 4))}
    waiting, places = decode.deque(prompts), Places(first=1, rows=1 + 3 * 10)
    first = engine.admit(prompts, waiting, places, 9, True, 2)
    assert [(example.index, example.place) for example in first] == [(0, 1), (1, 11), (2, 19)]
    places.freed.append(11)
    assert engine.admit(prompts, waiting, places, 9, False, 2) == []  # 4 tokens are too few to stop for
    assert list(waiting) == [3, 4]
    assert places.freed == [11]
    places.freed.append(1)
    assert [example.index for example in engine.admit(prompts, waiting, places, 9, False, 2)] == [3, 4]
    assert list(itertools.chain(waiting)) == []


def test_few_at_once_are_refilled_by_few():
    engine = decode.Engine.__new__(decode.Engine)
    engine.at_once, engine.most = 1000, 8
    engine.cache = type("Cache", (), {"shared": 0})
    prompts = {i: [0] * 10 for i in range(20)}
    waiting, places = decode.deque(prompts), Places(first=0, rows=1000)
    assert engine.admit(prompts, waiting, places, 1, False, 5) == []
    assert len(engine.admit(prompts, waiting, places, 2, False, 5)) == 2
