"""The packed T5 beside transformers' own, in float32: loss and all gradients; and with dropout beside the
slopes that its loss has.

    TRITON_INTERPRET=1 python -m tests.t5_cases

The last line is JSON: the largest error of each case, relative to the norm of what is compared, and what the
self-check says of the kernels, whole and broken in turn.
"""

import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig
from transformers import T5Config, T5ForConditionalGeneration

from study import t5
from study.fast import t5 as fast_t5
from study.fast import t5_kernels
from study.fast.t5 import Packed
from tests.mutations import Mutation, interpret_quickly, launch

SIZE = {"vocab_size": 61, "d_model": 40, "d_kv": 16, "d_ff": 48, "num_heads": 2, "num_layers": 1}
KINDS = {
    "gated": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "first": {"feed_forward_proj": "relu"},  # as T5 was published first: tied, scaled
    "lora": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_layers": 2},
}
# What the self-check is tried on, with every kernel broken in turn, which takes longest.
SMALLEST = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
LENGTHS = [(70, 4), (9, 66), (1, 1)]
ADAPTERS = LoraConfig(
    r=4, lora_alpha=6, lora_dropout=0.2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"
)


def model_of(settings: dict, adapted: bool):
    torch.manual_seed(0)
    config = T5Config(**SIZE | settings, decoder_start_token_id=0, dropout_rate=0.3)
    model = t5.lean(T5ForConditionalGeneration(config))
    if adapted:
        model = t5.with_lora(model, ADAPTERS, 1)
    for name, weight in model.named_parameters():
        if "relative_attention_bias" in name or "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
        elif "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


def examples(lengths=LENGTHS) -> list[t5.Pair]:
    draw = lambda n: [*torch.randint(3, 61, (n,)).tolist(), 1]
    return [t5.Pair(draw(prompt), draw(answer)) for prompt, answer in lengths]


def loss_of(packed: Packed, batch: dict) -> torch.Tensor:
    return F.cross_entropy(packed.logits(batch), batch["labels"], reduction="sum")


def gradient(model, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def slope_of(model, packed: Packed, batch: dict, wanted: torch.Tensor) -> float:
    """The error of the gradient along itself: beside the difference of the losses there."""
    step, learned = 3e-4 * wanted / wanted.norm(), [p for p in model.parameters() if p.grad is not None]
    moves, losses = step.split([p.numel() for p in learned]), []
    with torch.no_grad():
        for way in (1, -2):
            for p, move in zip(learned, moves, strict=True):
                p.add_(move.view_as(p), alpha=way)
            losses.append(float(loss_of(packed, batch)))
    found = (losses[0] - losses[1]) / 2
    return abs(found - float((step * wanted).sum())) / abs(found)


def case(kind: str) -> dict[str, float]:
    model = model_of(KINDS[kind], kind == "lora")
    pairs = examples()
    plain, packed = t5.Pairs(pairs, model.config), Packed(model, (71, 67), torch.float32)
    batch = packed.batch([pair.prompt for pair in pairs], [pair.answer for pair in pairs], 0)
    model.eval()
    own, ours = plain.loss_sum(model, plain.batch(range(3))), loss_of(packed, batch)
    wanted, found = gradient(model, own), gradient(model, ours)
    errors = {"loss": apart(ours.detach(), own.detach()), "gradients": apart(found, wanted)}
    model.train()
    dropped = loss_of(packed, batch)
    errors["dropped"] = apart(dropped.detach(), own.detach())
    errors["slope"] = slope_of(model, packed, batch, gradient(model, dropped))
    return errors


def mutations() -> list[Mutation]:
    """Every kernel left out, and some that are given something else."""
    source = Path(t5_kernels.__file__).read_text()
    names = re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)
    other = {
        "t5_attention_kernel": lambda given: {"bias": given["bias"].flip(1).contiguous()},
        "t5_dq_kernel": lambda given: {"causal": 0},
        "t5_dkv_kernel": lambda given: {"keys": given["keys"].clamp(max=5)},
        "add_norm_kernel": lambda given: {"epsilon": 1.0},
        "add_norm_backward_kernel": lambda given: {"inverse": torch.ones_like(given["inverse"])},
    }
    unscaled = Mutation("adapters without their scale", torch, "_foreach_mul_", lambda _: lambda *_: None)
    return [
        *(launch("does nothing", t5_kernels, name) for name in names),
        *(launch("another argument", t5_kernels, name, change) for name, change in other.items()),
        unscaled,
    ]


def self_checks() -> dict[str, str | None]:
    """What it says of each, and of the whole."""
    pairs, model = examples([(12, 3), (9, 7), (1, 1)]), model_of(SMALLEST, adapted=True)
    found = {"nothing": t5.differs(model, pairs)}
    for mutation in mutations():
        with mutation.applied():
            found[mutation.name] = t5.differs(model, pairs)
    return found


if __name__ == "__main__":
    interpret_quickly()
    F.dropout = lambda x, *_: x  # drawn by torch, and anew each time
    fast_t5.ROUNDED = 32, 16
    found = {kind: case(kind) for kind in KINDS}
    print(json.dumps(found | {"self-check": self_checks()}))
