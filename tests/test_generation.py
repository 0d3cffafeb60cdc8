"""Answers do not depend on batching, come back in order, end where the model ends them, and keep to the
labels if asked."""

import json

import pytest
import torch
from conftest import DEMO_DATA, DEMO_MODEL
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from prompts import build_prompt
from study import generation
from study.encoding import prompt_ids

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture(scope="module")
def model():
    """The demo checkpoint in real 4-bit weights, computing in float32 so that a tie can't be decided by
    rounding."""
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, quantization_config=NF4, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    rows = [json.loads(line) for line in (DEMO_DATA / "dialogues_test.jsonl").read_text().splitlines()[:10]]
    texts = [row["dialogue"][: 60 * (1 + i % 4)] for i, row in enumerate(rows)]
    return [prompt_ids(tokenizer, build_prompt("summarization", "instruction", text)) for text in texts]


def test_batched_and_single_answers_agree_and_keep_their_order(model, tokenizer, prompts):
    batched = generation.generate(model, tokenizer, prompts, 16, batch_size=4)
    plain = []
    for ids in prompts:  # plain generate, one prompt at a time, without padding
        config = GenerationConfig(max_new_tokens=16, do_sample=False, eos_token_id=2, pad_token_id=2)
        output = model.generate(input_ids=torch.tensor([ids]), generation_config=config)[0, len(ids) :]
        plain.append(tokenizer.decode(output, skip_special_tokens=True))
    assert batched.texts == plain
    assert len(set(plain)) > 3
    assert batched.texts == generation.generate(model, tokenizer, prompts, 16, "auto").texts
    assert batched.input_tokens == sum(map(len, prompts))


def test_every_answer_is_one_of_the_labels_when_constrained(model, tokenizer, prompts):
    labels = ["rec.autos", "rec.autos.old", "sci.space", "C++", "a longer class name"]
    allowed = generation.label_answers(tokenizer, labels)
    answers = generation.generate(model, tokenizer, prompts, 20, 4, allowed)
    assert all(text.strip() in labels for text in answers.texts)
    free = generation.generate(model, tokenizer, prompts, 20, 4)
    assert not any(text.strip() in labels for text in free.texts)


def test_constrained_greedy_takes_the_likeliest_allowed_token(model, tokenizer, prompts):
    first = [[token, tokenizer.eos_token_id] for token in (300, 500, 700, 900)]
    answers = generation.continue_batch(model, prompts[:3], 5, [tokenizer.eos_token_id], first)
    for ids, answer in zip(prompts[:3], answers, strict=True):
        logits = model(torch.tensor([ids])).logits[0, -1]
        assert answer[0] == max((300, 500, 700, 900), key=lambda token: logits[token])
        assert answer[1:] == [tokenizer.eos_token_id]


def test_an_answer_ends_at_the_first_end_token_and_counts_it():
    assert generation.up_to_end([5, 6, 2, 2, 2], [2]) == [5, 6, 2]
    assert generation.up_to_end([5, 6, 7], [2]) == [5, 6, 7]
    assert generation.up_to_end([5, 9, 2], [2, 9]) == [5, 9]
