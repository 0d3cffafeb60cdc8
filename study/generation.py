"""Greedy decoding in batches of like length, with the answers in the order of the prompts."""

import importlib.metadata
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from study import record
from study.encoding import answer_ids
from study.metrics import VERSION
from study.model import device, peak_memory_gib

AUTO_EXAMPLES = 256


@dataclass
class Answers:
    """Generated texts, in the order of the prompts, and the tokens read and written for them."""

    texts: list[str]
    input_tokens: int
    output_tokens: int
    seconds: float


def generate(
    model,
    tokenizer,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int | str = "auto",
    allowed: Sequence[list[int]] | None = None,
) -> Answers:
    """Continue every prompt (token ids) greedily up to its EOS or `max_new_tokens`.

    With `allowed` (token ids of the possible answers, EOS included) only these can come out. A batch that
    exceeds the GPU's memory is halved; a single example that does raises torch.OutOfMemoryError.
    """
    began = time.time()
    model.eval()
    order = sorted(
        range(len(prompts)), key=lambda i: -len(prompts[i])
    )  # the longest first: too large shows at once
    answers: list[list[int]] = [[] for _ in prompts]
    size = batch_size
    while order:
        if batch_size == "auto":
            size = min(
                size if size != "auto" else AUTO_EXAMPLES,
                fitting(model, len(prompts[order[0]]) + max_new_tokens),
            )
        batch, rest = order[:size], order[size:]
        try:
            continuations = continue_batch(
                model, tokenizer, [prompts[i] for i in batch], max_new_tokens, allowed
            )
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            torch.cuda.empty_cache()
            size = batch_size = len(batch) // 2
            print(f"out of memory: going on with batches of {size}", flush=True)
            continue
        for i, continuation in zip(batch, continuations, strict=True):
            answers[i] = continuation
        order = rest
    return Answers(
        texts=[tokenizer.decode(ids, skip_special_tokens=True) for ids in answers],
        input_tokens=sum(map(len, prompts)),
        output_tokens=sum(map(len, answers)),
        seconds=time.time() - began,
    )


def describe(answers: Answers, metrics: dict, decoding: str) -> dict:
    """The `eval` of a record."""
    examples = len(answers.texts)
    invalid = metrics.get("invalid_answers")
    return {
        "examples": examples,
        "seconds": answers.seconds,
        "wall_seconds": record.wall_seconds(),
        "examples_per_second": examples / answers.seconds,
        "invalid_answers": None if invalid is None else round(invalid["value"] * examples / 100),
        "peak_memory_gib": peak_memory_gib(),
        "input_tokens": answers.input_tokens,
        "output_tokens": answers.output_tokens,
        "decoding": decoding,
        "metrics": metrics,
        "metrics_version": f"{VERSION}, rouge-score {importlib.metadata.version('rouge-score')}",
    }


def fitting(model, tokens: int) -> int:
    """Examples of `tokens` tokens that fit the free GPU memory, by the size of their key-value cache."""
    if not torch.cuda.is_available():
        return 16
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * size * 2 * tokens
    free = torch.cuda.mem_get_info(device())[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return max(
        1, int(0.8 * free / (3 * cache))
    )  # the cache is copied as it grows; the rest is for activations


def continue_batch(model, tokenizer, prompts, max_new_tokens, allowed) -> list[list[int]]:
    """The new tokens of each prompt up to and including its EOS; prompts are padded on the left."""
    width = max(map(len, prompts))
    ends = stop_tokens(model, tokenizer)
    ids = torch.tensor([[ends[0]] * (width - len(prompt)) + prompt for prompt in prompts], device=device())
    mask = torch.tensor(
        [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device()
    )
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, eos_token_id=ends, pad_token_id=ends[0]
    )
    following = None if allowed is None else follow_one_of(allowed, width, ends[0])
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=greedy, prefix_allowed_tokens_fn=following
        )
    return [up_to_end(row, ends) for row in output[:, width:].tolist()]


def stop_tokens(model, tokenizer) -> list[int]:
    """The tokenizer's EOS first, then those a chat checkpoint's generation_config adds."""
    more = getattr(model.generation_config, "eos_token_id", None) or []
    more = more if isinstance(more, list) else [more]
    return list(dict.fromkeys([tokenizer.eos_token_id, *more]))


def up_to_end(row: list[int], ends: Sequence[int]) -> list[int]:
    for i, token in enumerate(row):
        if token in ends:
            return row[: i + 1]
    return row


def follow_one_of(allowed: Sequence[list[int]], width: int, pad: int):
    """For `generate`: the tokens that keep a row, `width` prompt tokens and what follows, on one of the
    allowed answers."""
    nexts: dict[tuple[int, ...], set[int]] = {}
    for answer in allowed:
        for i, token in enumerate(answer):
            nexts.setdefault(tuple(answer[:i]), set()).add(token)
    return lambda row, ids: sorted(nexts.get(tuple(ids[width:].tolist()), {pad}))


def label_answers(tokenizer, labels: Sequence[str]) -> list[list[int]]:
    """Token ids of each class as training writes it, EOS included: the `allowed` answers of --decoding
    constrained."""
    return [answer_ids(tokenizer, "classification", label) for label in labels]
