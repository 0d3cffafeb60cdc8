"""Batches without padding: examples laid end to end in one row, kept apart by the attention, and the loss
over them.

Where a model can't keep packed examples apart, a probe finds out and the examples are padded instead.
"""

import hashlib
import importlib.util
import inspect
import random
from collections.abc import Collection, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from study import checks, device
from study.encoding import Example
from study.errors import UserError, is_out_of_memory

POOL = 50  # steps among whose examples those of like length are put together
SHARED_LEAST = 8  # tokens that examples begin with alike, from which on the fused layers compute them once


def seed_of(*parts: int) -> int:
    """A seed in [0, 2^63) for what `parts` name, unrelated to those of other parts: the first 63 bits of the
    SHA-256 of their decimals with spaces between, so that any program can compute it."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def plan_steps(examples: int, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """The examples of every optimizer step: each epoch in an order of its own, drawn from the seed."""
    steps = []
    for epoch in range(epochs):
        order = list(range(examples))
        random.Random(f"{seed} {epoch}").shuffle(order)
        steps += [order[i : i + batch_size] for i in range(0, examples, batch_size)]
    return steps


def steps_of_like_length(lengths: Sequence, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """Like `plan_steps`, with examples of like length in a step: of every POOL steps' examples, which are
    drawn at random, each step takes neighbours in length; the steps of an epoch then go in an order drawn
    anew, so that long and short ones mix."""
    steps, many = [], POOL * batch_size
    for epoch, order in enumerate(plan_steps(len(lengths), len(lengths), epochs, seed)):
        pools = (order[i : i + many] for i in range(0, len(order), many))
        ordered = [i for pool in pools for i in sorted(pool, key=lambda i: lengths[i])]
        mine = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
        random.Random(f"{seed} {epoch} steps").shuffle(mine)
        steps += mine
    return steps


def split_to_fit(
    indices: Sequence[int], lengths: Sequence[int], max_tokens: int, padded: bool
) -> list[list[int]]:
    """The examples of a step in few groups of at most `max_tokens` tokens, or one example where it alone
    exceeds that."""
    groups: list[list[int]] = []
    for i in sorted(indices, key=lambda i: (-lengths[i], i)):
        for group in groups:
            # Longest first, so a padded group is as wide as its first example.
            tokens = (
                lengths[group[0]] * (len(group) + 1)
                if padded
                else sum(lengths[j] for j in group) + lengths[i]
            )
            if tokens <= max_tokens:
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


def common_prefix(rows: Collection[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    return common_beginning(min(rows), max(rows))


def common_beginning(first: Sequence[int], last: Sequence[int]) -> int:
    shorter = min(len(first), len(last))
    return next((i for i in range(shorter) if first[i] != last[i]), shorter)


def learned_places(example: Example, loss_on: str) -> range:
    """Places whose next token is learned: those before the answer's tokens and the EOS, or all ("all")."""
    return range(
        example.answer_start - 1 if loss_on == "answer" and example.answer_start else 0, len(example.ids) - 1
    )


def shared_prefix(examples: Sequence[Example], loss_on: str) -> int:
    """How many tokens that none learns all of several examples begin with; 0 where to compute them once is
    not worth it."""
    most = min(learned_places(example, loss_on).start for example in examples)
    first, last = (end(example.ids[:most] for example in examples) for end in (min, max))
    count = common_beginning(first, last)
    return count if len(examples) > 1 and count >= SHARED_LEAST else 0


def step_rows(step: Sequence[Example], loss_on: str) -> tuple[int, list[int]]:
    """The rows of a step whose examples lie end to end behind the prefix that all of them share, by which the
    fused layers' dropout knows them wherever they are computed: how many the prefix has, and of each example
    which row its token at place 0 would have without it."""
    shared = shared_prefix(step, loss_on)
    own = np.array([len(example.ids) for example in step]) - shared
    return shared, starts(own).tolist()


def starts(lengths: np.ndarray) -> np.ndarray:
    """Where each of several runs begins that lie end to end."""
    return np.cumsum(lengths) - lengths


def counting(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... lengths[0] - 1, 0, 1, ... lengths[1] - 1, ..."""
    return np.arange(lengths.sum()) - np.repeat(starts(lengths), lengths)


def pack(examples: Sequence[Example], loss_on: str, device) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Examples end to end: the model's inputs [1, tokens], the learned places [n] in the row, and their next
    tokens [n]."""
    ids, positions, borders, places = [], [], [0], []
    for example in examples:
        places += [len(ids) + place for place in learned_places(example, loss_on)]
        ids += example.ids
        positions += range(len(example.ids))
        borders.append(len(ids))
    row = torch.tensor([ids, positions], device=device)
    places = torch.tensor(places, device=device)
    borders = torch.tensor(borders, dtype=torch.int32, device=device)
    longest = max(len(example.ids) for example in examples)
    inputs = {
        "input_ids": row[:1],
        "position_ids": row[1:],
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
        "logits_to_keep": places,
    }
    return inputs, places, row[0, places + 1]


def pad(examples: Sequence[Example], loss_on: str, device) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Like `pack`, one example a row, padded on the right: inputs [examples, longest], places in the
    flattened rows."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    places = []
    for i, example in enumerate(examples):
        ids[i, : len(example.ids)] = torch.tensor(example.ids)
        mask[i, : len(example.ids)] = 1
        places += [i * longest + place for place in learned_places(example, loss_on)]
    places = torch.tensor(places)
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    return inputs, places.to(device), ids.flatten()[places + 1].to(device)


def loss_sum(model, examples: Sequence[Example], loss_on: str, padded: bool, device) -> torch.Tensor:
    """Cross-entropy summed over the learned tokens of `examples`, in float32; one by one where their
    positions would depend on the longest of them."""
    longest = max(len(example.ids) for example in examples)
    if longest > checks.same_up_to(model):
        if len(examples) > 1:
            return sum(loss_sum(model, [example], loss_on, padded, device) for example in examples)
        checks.forget_longer(model)
    inputs, places, targets = (pad if padded else pack)(examples, loss_on, device)
    logits = model(**inputs, use_cache=False).logits
    rows = logits.flatten(0, 1)[places] if padded else logits[0]
    return F.cross_entropy(rows.float(), targets, reduction="sum")


def isolates(model, device) -> bool:
    """Whether packed examples stay apart: exchanging the first must not touch the second, which must be as if
    alone.

    Decided by running the model, so that no list of architectures has to be kept. Alone means through the
    model's own attention (eager), and more closely through that which was proven beside it. What the
    attention can't do in training (dropout), it raises."""
    first, other, second = checks.rows_of_tokens(model, 3)

    def logits(*rows: list[int]) -> torch.Tensor:
        inputs, _, _ = pack([Example(row, 0) for row in rows], "all", device)
        end = sum(map(len, rows))
        inputs["logits_to_keep"] = torch.arange(end - len(second), end, device=device)
        return model(**inputs, use_cache=False).logits[0, -len(second) :].double()

    with checks.narrowed(model):
        with checks.still(model, training=True):
            logits(first, second)
        with checks.still(model):
            packed, exchanged = logits(first, second), logits(other, second)
        proven = getattr(model, "proven", "eager")
        own, closer = (checks.logits_of(model, second, name) for name in ("eager", proven))
    leaks = checks.apart(packed, exchanged) > checks.LEAK
    rounding = checks.rounding(model)
    return (
        not leaks and checks.apart(packed, own) <= rounding and checks.apart(packed, closer) <= rounding / 4
    )


def choose_batching(model, wanted_attention: str, device) -> bool:
    """Set the model's attention for training, proven. Returns whether examples must be padded, and says so in
    one line. Raises UserError for a model that sees later tokens."""
    checks.prove_attention(model)
    if wanted_attention != "auto" and getattr(model, "disproven", None):
        raise UserError(
            f"--attn_implementation {wanted_attention} does not compute the attention of "
            f"{type(model).__name__} ({model.disproven}): auto does"
        )
    if wanted_attention == "auto" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("packed")  # stays sdpa where the model's code can't exchange it
    try:
        if "logits_to_keep" in inspect.signature(model.forward).parameters and isolates(model, device):
            model.proven = model.config._attn_implementation
            return False
        reason = "examples laid end to end would see each other"
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if model.config._attn_implementation == "packed":
        model.set_attn_implementation("sdpa")
    print(
        f"padding batches: {type(model).__name__} with {model.config._attn_implementation} can't be packed "
        f"here ({reason})"
    )
    return True


# Attention


def training_attention(wanted: str) -> str:
    """The attention to load a model with: --attn_implementation, or for "auto" flash-attn where this machine
    has it."""
    if wanted != "auto":
        return wanted
    flash = (
        torch.cuda.is_available()
        and importlib.util.find_spec("flash_attn")
        and device.compute_dtype() == torch.bfloat16
    )
    return "flash_attention_2" if flash else "auto"


def packed_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    sliding_window=None,
    cu_seq_lens_q=None,
    max_length_q=None,
    dropout=0.0,
    **others,
):
    """Causal attention of each of the sequences that lie end to end in one row, for transformers'
    AttentionInterface.

    query [1, heads, tokens, size], key and value [1, key heads, tokens, size]; cu_seq_lens_q [sequences + 1]
    are their borders. Returns ([1, tokens, heads, size], None). On CUDA one call of PyTorch's variable-length
    kernel; elsewhere one call a sequence. Raises ValueError for what these don't heed: dropout, soft caps,
    sinks, whatever a model may hand over.
    """
    unheeded = [
        name for name, given in others.items() if checks.is_given(given) and name not in checks.HEEDED
    ]
    if unheeded or dropout:
        raise ValueError(f"packed attention has no {', '.join(unheeded) or 'dropout'}")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        left = -1 if sliding_window is None else sliding_window - 1
        rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        borders = cu_seq_lens_q.to(torch.int32)
        longest = int(max_length_q)
        output = varlen_attn(*rows, borders, borders, longest, longest, scale=scaling, window_size=(left, 0))
        return output[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    outputs = []
    with torch.autocast(
        query.device.type, enabled=False
    ):  # the CPU's kernel is three times faster in float32
        for piece in zip(
            *(tensor.float().split(lengths, dim=2) for tensor in (query, key, value)), strict=True
        ):
            mask = window_mask(piece[0], sliding_window)
            attended = F.scaled_dot_product_attention(
                *piece, attn_mask=mask, scale=scaling, is_causal=mask is None
            )
            outputs.append(attended)
    return torch.cat(outputs, dim=2).transpose(1, 2).to(query.dtype), None


def window_mask(query: torch.Tensor, window: int | None) -> torch.Tensor | None:
    """Boolean [tokens, tokens]: each token sees itself and the `window` - 1 before it; None where all are in
    reach."""
    if window is None or query.shape[2] <= window:
        return None
    place = torch.arange(query.shape[2], device=query.device)
    distance = place[:, None] - place[None, :]
    return (distance >= 0) & (distance < window)


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", lambda *args, **kwargs: None)
