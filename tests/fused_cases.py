"""Print, as JSON, how far the fast path is from the plain layers in float64, on small random models."""

import copy
import json

import bitsandbytes.functional as bnb
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, MambaConfig, MambaForCausalLM

from study.fast import kernels, memory, nf4, self_check
from study.fast.attention import Attention
from study.fast.decoder import head_size, why_not, why_not_train
from study.fast.memory import KEEPS, Plan, choose_plan, costs
from study.fast.train import FusedModel
from study.paths import FastPath
from tests.exactness import (
    TINY,
    TINY_LENGTHS,
    error,
    isolation,
    llama,
    make_examples,
    ours,
    quantized,
    theirs,
    truth,
    with_adapters,
)
from tests.mutations import interpret_quickly


def left_as_it_was(model, examples) -> dict[str, bool]:
    """What of a model a self-check that says yes leaves bit by bit as it was."""
    fused = FusedModel(model, Plan(36, "input"))
    model.base_model.eval()
    model.base_model.model.model.layers[1].train()

    def state() -> dict:
        return {
            "tensors": [tensor.clone() for tensor in (*model.parameters(), *model.buffers())],
            "gradients": [parameter.grad for parameter in model.parameters()],
            "modes": [module.training for module in model.modules()],
            "modules": [*model.modules()],
            "random numbers": torch.get_rng_state().tolist(),
            "checkpointing": model.get_base_model().is_gradient_checkpointing,
            "dropout of groups": [group.dropout for layer in fused.layers for group in layer.groups],
        }

    before = state()
    assert self_check.training(model, fused, examples, "answer") is None
    after = state()
    same = {name: after[name] == before[name] for name in before if name != "tensors"}
    pairs = zip(before["tensors"], after["tensors"], strict=True)
    return same | {"tensors": all(torch.equal(one, other) for one, other in pairs)}


def in_parts(model, examples) -> tuple[float, float, float]:
    """How far loss and gradients of a step are in passes of some of its examples from those in one."""
    path, found = FastPath(model, "answer", Plan(45, "input")), []
    for parts in ([[0, 1, 2]], [[2, 0], [1]]):
        path.begin(5, examples)
        loss = sum(path.loss_sum(places) for places in parts)
        found.append((loss.item(), torch.autograd.grad(loss, path.fused.parameters)))
    return error(*found)


def shared_gradient(model) -> list[bool]:
    """Whether the memory formula has room for the shared rows' gradient, for several numbers of rows."""
    c, shared, fits = model.config, 50, []
    for rows in (shared + 1, 1000, 16384):
        without, with_shared = (costs(model, "all", False, 400, count) for count in (0, shared))
        room = with_shared[0] - without[0] + rows * (with_shared[1] - without[1])
        lengths = [shared, rows - shared]
        shape = c.num_attention_heads, c.num_key_value_heads, head_size(c)
        attention = Attention(lengths, [0, 0], *shape, torch.device("cpu"), shared)
        fits.append(attention.shared_chunks(rows) * shared * shape[1] * 2 * shape[2] * 4 <= room)
    return fits


def grouped(keep: str, examples) -> tuple:
    """The errors where eight heads read the keys and values of one, as in Llama-2-70B."""
    model = with_adapters(llama(num_attention_heads=16, num_key_value_heads=2, head_dim=32), 4, 0.3)
    fused = FusedModel(model, Plan(45, keep))
    return error(ours(fused, examples, "answer"), truth(model, fused, examples, "answer"))


def main() -> None:
    base, results = llama(), {}
    interpret_quickly()
    examples, tokens = make_examples(TINY_LENGTHS, TINY["vocab_size"]), 36
    attention = copy.deepcopy(base.model.layers[0].self_attn)
    weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    expected = torch.cat([bnb.dequantize_4bit(weight.data, weight.quant_state) for weight in weights])
    unpacked = torch.empty_like(expected)
    nf4.PackedWeights(weights).unpack(unpacked)
    results["unpacked"] = (unpacked - expected).abs().max().item()
    still = torch.cat([bnb.dequantize_4bit(weight.data, weight.quant_state) for weight in weights])
    results["still readable"] = torch.equal(still, expected)

    model = with_adapters(base, 4, 0.0)
    for loss_on in ("answer", "all"):
        expected = truth(model, FusedModel(model, Plan(tokens, "all")), examples, loss_on)
        for keep in KEEPS if loss_on == "answer" else ("all", "input"):
            fused = FusedModel(model, Plan(tokens, keep))
            results[f"{keep}, loss on {loss_on}"] = error(ours(fused, examples, loss_on), expected)
    results["isolation"] = isolation(fused, examples)
    results["left as it was"] = left_as_it_was(with_adapters(base, 4, 0.3), examples)

    memory.SHARED_CHUNK = 8  # so that there are several
    alike = make_examples(((14, 11), (12, 10), (19, 15)), TINY["vocab_size"], shared=9)
    for keep, dropout in (("all", 0.0), ("input", 0.3)):
        model = with_adapters(base, 4, dropout)
        fused = FusedModel(model, Plan(45, keep))
        got = ours(fused, alike, "answer")
        results[f"alike, dropout {dropout}"] = error(got, truth(model, fused, alike, "answer"))
        if not dropout:
            results["alike, PEFT"] = error(got, theirs(model, fused, alike, "answer"))
    results["computed once"] = (
        fused.batch(alike, "answer", 0).attention.shared,
        len(fused.batch(alike, "answer", 0).ids),
    )

    results["in parts"] = in_parts(model, alike)

    for rank, dropout in ((2, 0.0), (2, 0.3), (64, 0.3)):
        model = with_adapters(base, rank, dropout)
        fused = FusedModel(model, Plan(tokens, "input" if dropout else "all"))
        expected = truth(model, fused, examples, "answer")
        results[f"rank {rank}, dropout {dropout}"] = error(ours(fused, examples, "answer"), expected)

    results |= {f"eight heads a key head, {keep}": grouped(keep, alike) for keep in ("all", "input")}

    ones = torch.ones(64, 300)
    masks = [torch.empty_like(ones) for _ in range(5)]
    for mask, (seed, dropout) in zip(masks, ((1, 0.1), (1, 0.3), (1, 0.5), (2, 0.5), (1, 0.5)), strict=True):
        kernels.dropout(ones, mask, torch.arange(len(ones)), seed, dropout)
    assert torch.equal(masks[2], masks[4])
    shares = [(mask > 0).float().mean().item() for mask in masks[:3]]
    results["dropout"] = shares, ((masks[2] > 0) == (masks[3] > 0)).float().mean().item()

    neox = GPTNeoXConfig(**TINY)
    results["reasons"] = {
        "llama": why_not_train(model),
        "some layers only": why_not_train(with_adapters(base, 4, 0.0, ["q_proj", "v_proj"])),
        "embedding": why_not_train(with_adapters(base, 4, 0.0, r".*\.(\w+_proj|embed_tokens)")),
        "head": why_not_train(with_adapters(base, 4, 0.0, r".*\.(\w+_proj)|lm_head")),
        "mamba": why_not(MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=1))),
        "rank": why_not_train(with_adapters(base, 256, 0.0)),
        "neox": why_not_train(with_adapters(quantized(GPTNeoXForCausalLM, neox), 4, 0.0)),
    }

    seven = copy.copy(model)  # with the shape of Llama-2-7B, for planning only
    seven.config = LlamaConfig(num_key_value_heads=32)
    plans = {f"{size} GiB": choose_plan(seven, size * 2**30, 512, (16384, 400)) for size in (80, 22, 14, 3)}
    plans["checkpointing on"] = choose_plan(seven, 80 * 2**30, 512, (16384, 400), None, "on")
    plans["1000 tokens"] = choose_plan(seven, 80 * 2**30, 512, (16384, 400), 1000)
    plans["a long example"] = choose_plan(seven, 80 * 2**30, 20000, (16384, 400))
    results["shared gradient fits"] = shared_gradient(seven)
    results["plans"] = {name: (plan.keep, plan.tokens, plan.on_host) for name, plan in plans.items()}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
