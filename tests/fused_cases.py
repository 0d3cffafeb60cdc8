"""Print, as JSON, how far the fast path is from the plain layers in float64, on small random models."""

import copy
import json
import tempfile

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from study import fused, kernels
from study.encoding import Example

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SEED = 77


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
    config = LlamaConfig(
        vocab_size=96,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.08,
        **SIZES | sizes,
    )
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


def make_examples(lengths, vocabulary: int) -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, vocabulary, (count,), generator=generator).tolist() for count, _ in lengths]
    return [Example(row, start) for row, (_, start) in zip(rows, lengths, strict=True)]


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
    within = layer.last and group is not layer.qkv  # the last layer computes only these rows
    ones = torch.ones(len(batch.rows) if within else rows, group.width, device=batch.ids.device)
    mask = torch.empty_like(ones)
    kernels.dropout(ones, mask, layer.seed(batch, group), group.dropout)
    if within:
        whole = torch.ones(rows, group.width, device=mask.device)
        whole[batch.rows] = mask
        mask = whole
    return mask.double()


def truth(model, path, examples, loss_on: str):
    """Loss and gradients of the plain layers in float64, packed, with the fast path's dropout."""
    batch = path.batch(examples, loss_on, SEED)
    rows, device = len(batch.ids), batch.ids.device
    base = copy.deepcopy(model.get_base_model())
    adapters = []
    for layer, ours in zip(base.model.layers, path.layers, strict=True):
        for i, (names, group) in enumerate(zip(fused.NAMES, ours.groups, strict=True)):
            parent = layer.self_attn if i < 2 else layer.mlp
            mask = mask_of(ours, group, batch, rows)
            plain = [Plain(getattr(parent, name), mask) for name in names]
            for name, module in zip(names, plain, strict=True):
                setattr(parent, name, module)
            adapters += [module.a for module in plain] + [module.b for module in plain]
    torch.nn.Module.to(base, torch.float64)
    base.set_attn_implementation("eager")
    number = torch.cat([torch.full((len(example.ids),), i) for i, example in enumerate(examples)]).to(device)
    seen = (number[:, None] == number) & torch.ones(rows, rows, dtype=torch.bool, device=device).tril()
    positions = torch.cat([torch.arange(len(example.ids)) for example in examples]).to(device)
    mask = torch.where(seen, 0.0, -1e30).double()[None, None]
    output = base(batch.ids[None], position_ids=positions[None], attention_mask=mask, use_cache=False)
    loss = F.cross_entropy(output.logits[0, batch.rows[batch.places]], batch.targets, reduction="sum")
    return loss.item(), torch.autograd.grad(loss, adapters)


def ours(path, examples, loss_on: str):
    loss = path.loss_sum(examples, loss_on, SEED)
    return loss.item(), torch.autograd.grad(loss, path.parameters)


def error(got, expected) -> tuple[float, float]:
    """Relative error of the loss, and the largest of a gradient."""
    worst = max(
        ((one.double() - other).norm() / other.norm()).item()
        for one, other in zip(got[1], expected[1], strict=True)
    )
    return abs(got[0] - expected[0]) / expected[0], worst


def isolation(path, examples) -> tuple[float, bool]:
    """How far an example's loss moves, and whether it has one, when another example changes."""
    other = Example([5] * len(examples[0].ids), examples[0].answer_start)

    def last_loss(first: Example) -> float:
        both = path.loss_sum([first, examples[1]], "answer", SEED)
        return (both - path.loss_sum([first], "answer", SEED)).item()

    alone = path.loss_sum([examples[1]], "answer", SEED).item()
    moved = abs(last_loss(other) - last_loss(examples[0]))
    return round(moved / alone, 5), alone > 0


def main() -> None:
    base, results = llama(), {}
    lengths = ((12, 8), (5, 2), (19, 15))  # the interpreter is slow
    examples, tokens = make_examples(lengths, 96), 36
    attention = copy.deepcopy(base.model.layers[0].self_attn)
    weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    expected = torch.cat([bnb.dequantize_4bit(weight.data, weight.quant_state) for weight in weights])
    unpacked = torch.empty_like(expected)
    kernels.PackedWeights(weights).unpack(unpacked)
    results["unpacked"] = (unpacked - expected).abs().max().item()
    still = torch.cat([bnb.dequantize_4bit(weight.data, weight.quant_state) for weight in weights])
    results["still readable"] = torch.equal(still, expected)

    model = with_adapters(base, 4, 0.0)
    for loss_on in ("answer", "all"):
        expected = truth(model, fused.FusedModel(model, fused.Plan(tokens, "all")), examples, loss_on)
        for keep in fused.KEEPS if loss_on == "answer" else ("all", "input"):
            path = fused.FusedModel(model, fused.Plan(tokens, keep))
            results[f"{keep}, loss on {loss_on}"] = error(ours(path, examples, loss_on), expected)
    results["isolation"] = isolation(path, examples)

    for rank, dropout in ((2, 0.0), (2, 0.3), (64, 0.3)):
        model = with_adapters(base, rank, dropout)
        path = fused.FusedModel(model, fused.Plan(tokens, "input" if dropout else "all"))
        expected = truth(model, path, examples, "answer")
        results[f"rank {rank}, dropout {dropout}"] = error(ours(path, examples, "answer"), expected)

    ones = torch.ones(64, 300)
    masks = [torch.empty_like(ones) for _ in range(5)]
    for mask, (seed, dropout) in zip(masks, ((1, 0.1), (1, 0.3), (1, 0.5), (2, 0.5), (1, 0.5)), strict=True):
        kernels.dropout(ones, mask, seed, dropout)
    assert torch.equal(masks[2], masks[4])
    shares = [(mask > 0).float().mean().item() for mask in masks[:3]]
    results["dropout"] = shares, ((masks[2] > 0) == (masks[3] > 0)).float().mean().item()

    neox = GPTNeoXConfig(vocab_size=96, max_position_embeddings=128, **SIZES)
    results["reasons"] = {
        "llama": fused.why_not(model),
        "some layers only": fused.why_not(with_adapters(base, 4, 0.0, ["q_proj", "v_proj"])),
        "neox": fused.why_not(with_adapters(quantized(GPTNeoXForCausalLM, neox), 4, 0.0)),
    }

    seven = copy.copy(model)  # with the shape of Llama-2-7B, for planning only
    seven.config = LlamaConfig(num_key_value_heads=32)
    plans = {
        f"{size} GiB": fused.choose_plan(seven, size * 2**30, 512, (16384, 400)) for size in (80, 22, 14, 3)
    }
    plans["checkpointing on"] = fused.choose_plan(seven, 80 * 2**30, 512, (16384, 400), None, "on")
    plans["1000 tokens"] = fused.choose_plan(seven, 80 * 2**30, 512, (16384, 400), 1000)
    results["plans"] = {name: (plan.keep, plan.tokens, plan.on_host) for name, plan in plans.items()}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
