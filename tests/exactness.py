"""The fast path computes what the plain layers compute: relative errors against float64, on random models.

    python -m tests.exactness --output exactness.json

Fused layers in float32 and bfloat16 stand beside PEFT and bitsandbytes in bfloat16, on the same packed
examples; without CUDA it is a tiny model in float32, under Triton's interpreter. The layers in float64 take
their dropout from the fused path, which PEFT can't, so it is compared without. Two more checks: a changed
example leaves the loss of another as it was, and an adapter that the fused path trained is the same in plain
PEFT.
"""

import argparse
import copy
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from tabulate import tabulate
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.provenance import headline, provenance
from study import packing
from study.encoding import Example
from study.fast import kernels
from study.fast.decoder import NAMES
from study.fast.memory import Plan
from study.fast.train import FusedModel

CUDA = torch.cuda.is_available()
TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
LARGE = {
    "vocab_size": 2048,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
TINY_LENGTHS = ((12, 8), (5, 2), (19, 15))  # tokens, place of the answer; the interpreter is slow
LARGE_LENGTHS = [(20 + 280 * i // 11, 15 + 210 * i // 11) for i in range(12)]
SEED = 77
TITLES = ("key heads", "r", "dropout", "what", "loss", "all gradients", "worst gradient")


# The reference: models, examples, and the plain layers in float64


def quantized(make, config, dtype=torch.float32, device="cpu"):
    """A random model as it loads in 4 bits from a checkpoint."""
    torch.manual_seed(0)
    model = make(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = 1 + 0.2 * torch.randn_like(parameter)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        options = {"quantization_config": nf4, "dtype": dtype, "device_map": {"": device}}
        return AutoModelForCausalLM.from_pretrained(folder, **options).requires_grad_(False)


def llama(device="cpu", dtype=torch.float32, **sizes):
    sizes = TINY | sizes
    config = LlamaConfig(initializer_range=0.64 / sizes["hidden_size"] ** 0.5, **sizes)
    return quantized(LlamaForCausalLM, config, dtype, device)


def with_adapters(base, rank: int, dropout: float, targets="all-linear"):
    lora = LoraConfig(
        r=rank, lora_alpha=16, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn_like(parameter)
    return model.train()


def make_examples(lengths, vocabulary: int, shared: int = 0) -> list[Example]:
    """Random examples of (tokens, start of the answer) in `lengths`, the first `shared` tokens alike."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, vocabulary, (count,), generator=generator).tolist() for count, _ in lengths]
    beginning = rows[0][:shared]
    return [Example(beginning + row[shared:], start) for row, (_, start) in zip(rows, lengths, strict=True)]


class Plain(torch.nn.Module):
    """A linear layer with an adapter, in float64, whose dropout is the given mask [rows, width]."""

    def __init__(self, module, mask):
        super().__init__()
        base = module.base_layer
        weight = bnb.dequantize_4bit(base.weight.data, base.weight.quant_state)
        self.weight, self.mask, self.scale = weight.double(), mask, module.scaling["default"]
        self.a = torch.nn.Parameter(module.lora_A["default"].weight.detach().double())
        self.b = torch.nn.Parameter(module.lora_B["default"].weight.detach().double())

    def forward(self, x):
        return F.linear(x, self.weight) + self.scale * F.linear(F.linear(x * self.mask, self.a), self.b)


def mask_of(layer, group, batch, rows: int) -> torch.Tensor:
    """What the fast path's dropout multiplies the group's input with."""
    ones = torch.ones(rows, group.width, device=batch.ids.device)
    mask = torch.empty_like(ones)
    kernels.dropout(ones, mask, batch.numbers, layer.seed(batch, group), group.dropout)
    return mask.double()


def in_float64(model, fused, batch) -> tuple:
    """The plain layers in float64, with the fast path's dropout, and their adapters in its order."""
    base, adapters = copy.deepcopy(model.get_base_model()), []
    for layer, ours in zip(base.model.layers, fused.layers, strict=True):
        for i, (names, group) in enumerate(zip(NAMES, ours.groups, strict=True)):
            parent = layer.self_attn if i < 2 else layer.mlp
            mask = mask_of(ours, group, batch, len(batch.ids))
            plain = [Plain(getattr(parent, name), mask) for name in names]
            for name, module in zip(names, plain, strict=True):
                setattr(parent, name, module)
            adapters += [module.a for module in plain] + [module.b for module in plain]
    torch.nn.Module.to(base, torch.float64)
    base.set_attn_implementation("eager")
    return base, adapters


def true_logits(model, fused, examples, loss_on: str) -> tuple:
    """In float64, packed: the logits at the learned places, the tokens to learn there, and the adapters."""
    batch = fused.batch(examples, loss_on, SEED)
    rows, device = len(batch.ids), batch.ids.device
    base, adapters = in_float64(model, fused, batch)
    shared = batch.attention.shared  # rows that all see, number -1
    own = [len(example.ids) - shared for example in examples]
    number = torch.arange(-1, len(own)).repeat_interleave(torch.tensor([shared, *own])).to(device)
    seen = (number[:, None] == number) | (number == -1)
    seen &= torch.ones(rows, rows, dtype=torch.bool, device=device).tril()
    positions = [torch.arange(shared), *(torch.arange(shared, shared + count) for count in own)]
    positions = torch.cat(positions).to(device)
    mask = torch.where(seen, 0.0, -1e30).double()[None, None]
    output = base(batch.ids[None], position_ids=positions[None], attention_mask=mask, use_cache=False)
    return output.logits[0, batch.rows[batch.learned]], batch.targets, adapters


# Losses and gradients of the adapters, three ways


def truth(model, fused, examples, loss_on: str):
    logits, targets, adapters = true_logits(model, fused, examples, loss_on)
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return loss.item(), torch.autograd.grad(loss, adapters)


def ours(fused, examples, loss_on: str):
    loss = fused.loss_sum(examples, loss_on, SEED)
    return loss.item(), torch.autograd.grad(loss, fused.parameters)


def theirs(model, fused, examples, loss_on: str):
    """By PEFT and bitsandbytes."""
    loss = plain_loss(model, examples, loss_on)
    return loss.item(), torch.autograd.grad(loss, fused.parameters)


def plain_loss(model, examples, loss_on: str) -> torch.Tensor:
    model.get_base_model().set_attn_implementation("packed")
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        return packing.loss_sum(model, examples, loss_on, False, model.device)


def relative(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Relative error of all the tensors together."""
    pairs = list(zip(got, expected, strict=True))
    off = sum((one.double() - other).square().sum() for one, other in pairs)
    return (off / sum(other.square().sum() for _, other in pairs)).sqrt().item()


def error(got, expected) -> tuple[float, float, float]:
    """Relative error of the loss, of all gradients together, and the largest of a single gradient."""
    worst = max(relative([one], [other]) for one, other in zip(got[1], expected[1], strict=True))
    return abs(got[0] - expected[0]) / expected[0], relative(got[1], expected[1]), worst


# What is printed


def errors(base, examples, rank: int, dropout: float) -> dict[str, tuple]:
    """The errors of the fused path and, where the comparison is fair, of PEFT."""
    model = with_adapters(base, rank, dropout)
    fused = fused_model(model, examples)
    expected = truth(model, fused, examples, "answer")
    found = {f"fused, {short(base.dtype)}": error(ours(fused, examples, "answer"), expected)}
    if not dropout and base.dtype == (torch.bfloat16 if CUDA else torch.float32):
        got = theirs(model, fused, examples, "answer")
        found[f"PEFT + bitsandbytes, {short(base.dtype)}"] = error(got, expected)
    return found


def fused_model(model, examples):
    return FusedModel(model, Plan(sum(len(example.ids) for example in examples), "all"))


def isolation(fused, examples) -> tuple[float, bool]:
    """How far an example's loss moves, and whether it has one, when another example changes."""
    other = Example([5] * len(examples[0].ids), examples[0].answer_start)

    def last_loss(first: Example) -> float:
        both = fused.loss_sum([first, examples[1]], "answer", SEED)
        return (both - fused.loss_sum([first], "answer", SEED)).item()

    alone = fused.loss_sum([examples[1]], "answer", SEED).item()
    moved = abs(last_loss(other) - last_loss(examples[0]))
    return round(moved / alone, 5), alone > 0


def reloaded(base, examples, steps: int = 5) -> dict[str, float]:
    """Train `steps` steps by the fused path, load the saved adapter in plain PEFT on a fresh copy of the
    base, and compare the logits at the learned places."""
    model = with_adapters(base, 8, 0.0)
    fused = fused_model(model, examples)
    optimizer = torch.optim.AdamW(fused.parameters, lr=1e-3)
    for _ in range(steps):
        fused.loss_sum(examples, "answer", SEED).backward()
        optimizer.step()
        optimizer.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)  # True by default asks the hub
        # In eval mode bitsandbytes computes in bfloat16 on the CPU.
        plain = PeftModel.from_pretrained(copy.deepcopy(base), folder).train()
    with torch.no_grad():
        expected = true_logits(model, fused, examples, "answer")[0]
        fast = head_output(model, lambda: fused.loss_sum(examples, "answer", SEED))
        slow = head_output(plain, lambda: plain_loss(plain, examples, "answer"))
    return {
        "fused": relative([fast], [expected]),
        "plain PEFT": relative([slow], [expected]),
        "from each other": relative([fast], [slow]),
    }


def head_output(model, run: Callable[[], object]) -> torch.Tensor:
    """The logits [learned places, vocabulary] that the head computes in `run`, in float64."""
    parts = []
    head = model.get_base_model().lm_head
    hook = head.register_forward_hook(lambda module, given, logits: parts.append(logits))
    run()
    hook.remove()
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).double()


def measure(sizes: dict, examples, dtypes) -> dict:
    rows, after_training, moved = [], {}, {}
    few, heads = sizes["num_key_value_heads"], sizes["num_attention_heads"]
    cases = [*product((few,), (2, 8, 64), (0.0, 0.1)), (heads, 8, 0.0)]
    for dtype in dtypes:
        bases = {
            count: llama("cuda" if CUDA else "cpu", dtype, **sizes | {"num_key_value_heads": count})
            for count in (few, heads)
        }
        for key_heads, rank, dropout in cases:
            for what, found in errors(bases[key_heads], examples, rank, dropout).items():
                rows.append((key_heads, rank, dropout, what, *found))
        after_training[short(dtype)] = reloaded(bases[few], examples)
        fused = fused_model(with_adapters(bases[few], 8, 0.0), examples)
        moved[short(dtype)] = isolation(fused, examples)[0]
    rows.sort(key=lambda row: row[:3])
    rows = [dict(zip(TITLES, row, strict=True)) for row in rows]
    return {"errors": rows, "moved": moved, "reloaded": after_training}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def show(results: dict) -> str:
    lines = [
        [f"{value:.1e}" if title in TITLES[-3:] else value for title, value in row.items()]
        for row in results["errors"]
    ]
    text = [tabulate(lines, TITLES, tablefmt="github", disable_numparse=True), ""]
    for precision, moved in results["moved"].items():
        text += [f"{precision}: a changed example moves the loss of another by {moved:.5f} of itself"]
    for precision, found in results["reloaded"].items():
        values = ", ".join(f"{what} {value:.1e}" for what, value in found.items())
        text += [f"{precision}: error of the logits after 5 steps, the adapter saved and loaded: {values}"]
    return "\n".join(text)


def arguments(about: str) -> argparse.Namespace:
    """The flags of this benchmark and of mutations.py, which without CUDA begin anew under Triton's
    interpreter: it is chosen at import."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON here, too")
    args = parser.parse_args()
    if not CUDA and "TRITON_INTERPRET" not in os.environ:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "TRITON_INTERPRET": "1"})
    return args


def main() -> None:
    args = arguments(__doc__)
    sizes, lengths = (LARGE, LARGE_LENGTHS) if CUDA else (TINY, TINY_LENGTHS)
    dtypes = (torch.float32, torch.bfloat16) if CUDA else (torch.float32,)
    examples = make_examples(lengths, sizes["vocab_size"], shared=12 if CUDA else 0)
    result = provenance() | measure(sizes, examples, dtypes)
    print(f"{headline(result)}\n\n{show(result)}")
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
