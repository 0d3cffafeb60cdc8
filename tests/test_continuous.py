"""Continuous batching: answers are those of plain `generate` to each alone, whoever joins and leaves.

Its kernels run on the CPU, with Triton's interpreter, in a process of its own: that is chosen at import.
"""

import json
import random

import pytest
from conftest import INTERPRETED, run_program

pytest.importorskip("triton")
from study.fast.continuous import Rows

PROGRAMS = [(INTERPRETED, "tests/continuous_cases.py")]
WEIGHTS = pytest.mark.parametrize("weights", ["4 bits", "merged"])


@pytest.fixture(scope="module")
def results():
    """Run every case of continuous_cases.py at once: its results by name."""
    done = run_program(*PROGRAMS[0])
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def stayed(found: dict) -> list[int]:
    return [i for i in range(len(found["answers"])) if i not in found["gone"]]


@WEIGHTS
def test_answers_are_those_of_plain_generate_one_at_a_time(results, weights):
    found = results[weights]
    assert [found["answers"][i] for i in stayed(found)] == [found["expected"][i] for i in stayed(found)]
    assert len(stayed(found)) > len(results["4 bits"]["gone"]) > 1 or weights == "merged"
    for i in found["gone"]:  # as far as they came
        assert found["answers"][i] == found["expected"][i][: len(found["answers"][i])]


@WEIGHTS
def test_confidences_are_those_of_every_answer_scored_by_hand(results, weights):
    found = results[weights]
    chosen = [i for i in stayed(found) if found["by hand"][i] is not None]
    expected = [found["by hand"][i] for i in chosen]
    assert [found["confidences"][i] for i in chosen] == pytest.approx(expected, rel=1e-5)
    assert len(expected) > 1
    assert all(0.05 < confidence < 0.95 for confidence in expected)


@WEIGHTS
def test_no_seat_is_given_twice_and_every_row_comes_back(results, weights):
    found = results[weights]
    assert 1 < found["most"] <= 2 * 4  # of two lanes with four seats each
    assert found["free"] == [[20, 90]]


@WEIGHTS
def test_prompts_that_begin_as_most_do_share_it_and_others_do_not(results, weights):
    assert results[weights]["lanes"] == [0, 20]


def test_of_one_that_left_the_next_at_its_place_has_no_trace(results):
    fresh, *after = results["after another"]
    assert after == [fresh, fresh]
    assert len(fresh) > 1


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_given_out_once_first_fit_and_taken_back_whole(seed):
    draw, rows, taken = random.Random(seed), Rows(5, 65), {}
    for _ in range(400):
        if taken and draw.random() < 0.45:
            first = draw.choice(sorted(taken))
            rows.give(first, taken.pop(first))
        else:
            size = draw.choice((1, 2, 5, 13, 30))
            used = {row for first, length in taken.items() for row in range(first, first + length)}
            fitting = (first for first in range(5, 66 - size) if used.isdisjoint(range(first, first + size)))
            expected = next(fitting, None)
            assert rows.take(size) == expected
            if expected is not None:
                taken[expected] = size
        runs = [row for first, end in rows.free for row in range(first, end)]
        used = {row for first, length in taken.items() for row in range(first, first + length)}
        assert runs == [row for row in range(5, 65) if row not in used]
        assert all(end < first for (_, end), (first, _) in zip(rows.free, rows.free[1:], strict=False))
    for first in draw.sample(sorted(taken), len(taken)):
        rows.give(first, taken.pop(first))
    assert rows.free == [(5, 65)]
