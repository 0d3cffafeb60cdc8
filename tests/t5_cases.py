"""The packed T5 beside transformers' own, in float32: loss and all gradients, with and without dropout.

    TRITON_INTERPRET=1 python -m tests.t5_cases

The last line is JSON: the largest error of each case, relative to the norm of what is compared. With dropout
a batch is computed twice, to find the same, and its mean over many seeds beside what it is without.
"""

import json

import torch
import torch.nn.functional as F
from transformers import T5Config, T5ForConditionalGeneration

from study import t5
from study.fast.t5 import Packed

SIZE = {"vocab_size": 97, "d_model": 48, "d_kv": 16, "d_ff": 80, "num_layers": 2, "num_heads": 3}
KINDS = {
    "gated": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "first": {"feed_forward_proj": "relu"},  # as T5 was published first: tied, scaled
}


def examples(seed: int, many: int = 5) -> list[t5.Pair]:
    draw = torch.Generator().manual_seed(seed)
    row = lambda most: torch.randint(
        3, 97, (int(torch.randint(1, most, (), generator=draw)),), generator=draw
    )
    return [t5.Pair([*row(150).tolist(), 1], [*row(80).tolist(), 1]) for _ in range(many)]


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def loss_of(packed: Packed, batch: dict) -> torch.Tensor:
    return F.cross_entropy(packed.logits(batch), batch["labels"], reduction="sum")


def case(kind: str) -> dict[str, float]:
    torch.manual_seed(0)
    model = t5.lean(T5ForConditionalGeneration(T5Config(**SIZE, decoder_start_token_id=0, **KINDS[kind])))
    for name, weight in model.named_parameters():
        if "relative_attention_bias" in name:
            torch.nn.init.normal_(weight)
        elif "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    pairs = examples(1)
    plain, packed = t5.Pairs(pairs, model.config), Packed(model, (150, 80), torch.float32)
    batch = packed.batch([pair.prompt for pair in pairs], [pair.answer for pair in pairs], 0)
    model.eval()
    own = plain.loss_sum(model, plain.batch(range(len(pairs))))
    ours, wanted = loss_of(packed, batch), gradients(model, own)
    found = gradients(model, ours)
    assert (
        found.keys()
        == wanted.keys()
        >= {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"}
    )
    errors = {"loss": apart(ours, own), "gradients": max(apart(found[name], wanted[name]) for name in wanted)}
    model.train()
    torch.manual_seed(1)
    one = loss_of(packed, batch)
    torch.manual_seed(1)
    errors["again"] = apart(loss_of(packed, batch), one)
    return errors


if __name__ == "__main__":
    print(json.dumps({kind: case(kind) for kind in KINDS}))
