"""Print, as JSON, what the fast path of scoring and `generate`, one example at a time, answer with a small
random model in float32, and how far products with 4-bit weights are from those with unpacked ones."""

import copy
import itertools
import json

import bitsandbytes.functional as bnb
import torch
from transformers import GenerationConfig

from study.fast import cache, decode, nf4
from study.fast.decoder import why_not
from study.generation import follow_one_of, with_all_ends
from study.model import merge
from tests.conftest import confidence_by_hand
from tests.exactness import llama, with_adapters
from tests.mutations import interpret_quickly

ENDS = [7, 9, 79, 95]  # the last two come up in free answers
NEW_TOKENS = 5
ALLOWED = with_all_ends([[5, 6, 7], [5, 6, 8, 7], [11, 7], [12, 13, 14, 7], [12, 13, 15, 9]], ENDS)


def plain_answer(model, ids: list[int], allowed) -> list[int]:
    greedy = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=ENDS, pad_token_id=ENDS[0]
    )
    following = allowed and follow_one_of(allowed, len(ids), ENDS[0])
    ids = torch.tensor([ids])
    with torch.no_grad():
        output = model.generate(input_ids=ids, generation_config=greedy, prefix_allowed_tokens_fn=following)
    return output[0, ids.shape[1] :].tolist()


def make_prompts(shared: int, lengths) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda count: torch.randint(10, 96, (count,), generator=generator).tolist()
    beginning = draw(shared)
    return [beginning + draw(count) for count in lengths]


def multiply_error(sizes, width: int, rows: int) -> float:
    """The largest difference of x W^T + x a^T b^T, from 4 bits, to the product with the unpacked weights."""
    generator = torch.Generator().manual_seed(0)
    weights, dense = [], []
    for size in sizes:
        packed, state = bnb.quantize_4bit(
            torch.randn(size, width, generator=generator),
            blocksize=64,
            compress_statistics=True,
            quant_type="nf4",
        )
        weights.append(torch.nn.Parameter(packed, requires_grad=False))
        weights[-1].quant_state = state
        dense.append(bnb.dequantize_4bit(packed, state))
    x, a, b = (
        torch.randn(*shape, generator=generator) for shape in ((rows, width), (6, width), (sum(sizes), 6))
    )
    permuted = x.view(rows, -1, 4, 8, 2, 2).permute(0, 1, 3, 4, 2, 5).reshape(rows, width)
    got = nf4.PackedWeights(weights).multiply(permuted, a, b)
    expected = x @ torch.cat(dense).T + x @ a.T @ b.T
    return ((got - expected).abs().max() / expected.abs().max()).item()


def main() -> None:
    # Train mode, without dropout: bitsandbytes would repack the weights of a layer in eval mode on the CPU.
    interpret_quickly()
    base = llama(hidden_size=nf4.PERMUTED_COLUMNS, intermediate_size=2 * nf4.PERMUTED_COLUMNS)
    tuned, results = with_adapters(base, 4, 0.0).train(), {}
    prompts = make_prompts(20, (4, 11, 1, 23, 8))
    models = {"4 bits": tuned, "merged": merge(copy.deepcopy(tuned))}
    for allowed in (None, ALLOWED):
        expected = [plain_answer(tuned, ids, allowed) for ids in prompts]
        results[f"plain, {'constrained' if allowed else 'free'}"] = expected
        if allowed:
            results["by hand"] = [
                confidence_by_hand(tuned, *pair, allowed, ENDS)
                for pair in zip(prompts, expected, strict=True)
            ]
        for (name, model), (apart, memory, most) in itertools.product(
            models.items(), ((1000, 1e9, None), (10, 1e9, 2), (1000, 0.0, None))
        ):
            cache.APART = apart
            engine = decode.Engine(model, memory or 1e9)
            engine.few_rows = min(engine.few_rows, 64 if apart == 1000 else 8)  # some products by each way
            if not memory:  # a cache for two examples, so that places are used again
                engine.plan = lambda longest, shared: (30, shared + 2 * longest + 30, 9)
            answers = dict(engine.answers(dict(enumerate(prompts)), NEW_TOKENS, ENDS, allowed, most))
            kind, room = "constrained" if allowed else "free", f"{most or 'all'} at once"
            reading = "apart" if apart == 10 else "together"
            case = f"{name}, {kind}, {reading}, {room if memory else 'little room'}"
            results[case] = [answers[i][0] for i in range(len(prompts))]
            results[f"confidence, {case}"] = [answers[i][1] for i in range(len(prompts))]
    # As in Llama-2-70B, eight heads read the keys and values of one.
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 32}
    grouped = with_adapters(
        llama(hidden_size=nf4.PERMUTED_COLUMNS, intermediate_size=nf4.PERMUTED_COLUMNS, **sizes), 4, 0.0
    )
    few = dict(enumerate(prompts[:3]))
    results["eight heads a key head, plain"] = [plain_answer(grouped, ids, None) for ids in few.values()]
    for cache.APART in (1000, 10):
        answers = dict(decode.Engine(grouped, 1e9).answers(few, NEW_TOKENS, ENDS))
        results[f"eight heads a key head, {cache.APART}"] = [answers[i][0] for i in few]
    partly = copy.deepcopy(base)
    partly.model.layers[1].mlp.up_proj = torch.nn.Linear(
        nf4.PERMUTED_COLUMNS, 2 * nf4.PERMUTED_COLUMNS, bias=False
    )
    results["reasons"] = {
        "adapters": why_not(tuned),
        "merged": why_not(models["merged"]),
        "head": why_not(with_adapters(base, 4, 0.0, ["q_proj", "lm_head"])),
        "embedding": why_not(with_adapters(base, 4, 0.0, ["q_proj", "embed_tokens"])),
        "partly": why_not(partly),
    }
    results["multiply"] = [
        multiply_error(*case) for case in (((96, 32, 32), 256, 5), ((64,), 896, 17), ((80, 80), 128, 1))
    ]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
