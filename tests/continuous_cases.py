"""Print, as JSON, what requests that join and leave between steps are answered with, and what `generate`
answers to each alone, with a small random model in float32."""

import copy
import json
import random

import torch
from transformers import GenerationConfig

from study.fast import continuous, nf4
from study.fast.continuous import FREE, Continuous, Request
from study.generation import follow_one_of
from study.model import merge
from tests.conftest import confidence_by_hand
from tests.engine_cases import ALLOWED, ENDS, make_prompts
from tests.exactness import llama, with_adapters
from tests.mutations import interpret_quickly

SEATS = 4
FEW = 6  # prompts with merged weights


def plain_answer(model, ids: list[int], allowed, new: int) -> list[int]:
    greedy = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=ENDS, pad_token_id=ENDS[0])
    following = allowed and follow_one_of(allowed, len(ids), ENDS[0])
    with torch.no_grad():
        output = model.generate(
            input_ids=torch.tensor([ids]), generation_config=greedy, prefix_allowed_tokens_fn=following
        )
    return output[0, len(ids) :].tolist()


def requests_of(prompts, draw: random.Random) -> list[Request]:
    """Every other one is constrained."""
    return [
        Request(i, list(prompt), max_new_tokens=draw.choice((1, 5, 5, 9)), node=0 if i % 2 else FREE)
        for i, prompt in enumerate(prompts)
    ]


def seated(engine: Continuous) -> list[Request]:
    return [request for lane in engine.lanes for request in lane.seats if request]


def served(engine: Continuous, requests: list[Request], draw: random.Random) -> tuple[list[int], int]:
    """Let them join by and by. Returns the numbers of those that left unanswered, and the most at work."""
    waiting, gone, most, busy = list(requests), [], 0, True
    while waiting or busy:
        at_work = seated(engine)
        while waiting and draw.random() < 0.7 and engine.join(waiting[0]):
            waiting.pop(0)
        most = max(most, len(seated(engine)))
        # In the midst of its answer, or as often before its prompt is read.
        leaving = draw.choice([at_work, seated(engine)])
        if leaving and draw.random() < 0.12:
            gone.append(draw.choice(leaving))
            engine.leave(gone[-1])
        engine.turn()
        busy = engine.busy
    return [request.index for request in gone], most


def after_another(engine: Continuous, prompts) -> list[list[int]]:
    """The answer to a prompt in an engine that has forgotten all; then to the same when it joins as another,
    whose step is on its way, has just left its seat and rows."""
    first = max((prompt for prompt in prompts if prompt[:20] == engine.prefix), key=len)
    answers = []
    engine.reset()
    for turns in (0, 1, 3):
        other = Request(0, list(first), max_new_tokens=9)
        request = Request(1, list(first[:-2]), max_new_tokens=9)
        if turns:
            assert engine.join(other)
            for _ in range(turns):
                engine.turn()
            assert engine.begun
            engine.leave(other)
        assert engine.join(request)
        assert not turns or (request.seat, request.place) == (other.seat, other.place)
        while engine.busy:
            engine.turn()
        answers.append(request.answer)
    return answers


def main() -> None:
    interpret_quickly()
    base = llama(hidden_size=nf4.PERMUTED_COLUMNS, intermediate_size=2 * nf4.PERMUTED_COLUMNS)
    tuned, draw = with_adapters(base, 4, 0.0).train(), random.Random(5)
    alike = make_prompts(20, (4, 11, 1, 23, 8, 2, 5, 9))
    others = [prompt[17:] for prompt in alike[::2]] + [alike[0][:20]]
    prompts = draw.sample(alike + others, len(alike + others))
    asked_of = lambda name: requests_of(prompts, random.Random(7))[: None if name == "4 bits" else FEW]
    results, asked = {}, asked_of("4 bits")
    alloweds = [None if r.node == FREE else ALLOWED for r in asked]
    expected = [
        plain_answer(tuned, prompts[r.index], allowed, r.max_new_tokens)
        for r, allowed in zip(asked, alloweds, strict=True)
    ]
    by_hand = [
        allowed and confidence_by_hand(tuned, prompts[r.index], answer, allowed, ENDS)
        for r, allowed, answer in zip(asked, alloweds, expected, strict=True)
    ]
    for name, model in {"4 bits": tuned, "merged": merge(copy.deepcopy(tuned))}.items():
        requests = asked_of(name)
        engine = Continuous(model, 1e9, alike[0][:20], 60, ENDS, ALLOWED, SEATS)
        engine.rows = continuous.Rows(20, 20 + 70)  # so that some wait for rows, and rows are used again
        engine.at_once, engine.few_rows = 40, 0  # products from 4 bits are engine_cases.py's to try
        gone, most = served(engine, requests, draw)
        results[name] = {
            "answers": [r.answer for r in requests],
            "expected": expected[: len(requests)],
            "confidences": [r.confidence for r in requests],
            "by hand": by_hand,
            "gone": gone,
            "most": most,
            "free": engine.rows.free,
            "lanes": sorted({len(prompts[r.index]) - len(r.tokens) for r in requests}),
        }
        if name == "merged":
            results["after another"] = after_another(engine, prompts)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
