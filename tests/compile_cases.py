"""Compile, without a GPU, every kernel that training and scoring launch, with heads as in Llama-2-7B, for the
GPU architecture named by the first argument.
Print, as JSON, the most shared memory that each takes, in bytes, and its products with a stride in 32 bits,
which a large matrix overflows.

Nothing is computed: each launch is only compiled, with the arguments that it would have.
"""

import json
import re
import sys
from collections import defaultdict

import torch
from peft import LoraConfig
from transformers import T5Config, T5ForConditionalGeneration
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from study import t5
from study.fast import cache, decode
from study.fast.decoder import MOST_RANK
from study.fast.memory import Plan
from study.fast.t5 import Packed
from study.fast.train import FusedModel
from study.model import merge
from tests.exactness import llama, make_examples, with_adapters

SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 2}


class NoDevice:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device) -> int:
        return 0


def collect(variants: dict) -> None:
    """From now on a launch compiles its kernel and leaves it in `variants`, by name and hash."""
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        variants[self.fn.__name__][kernel.hash] = kernel

    JITFunction.run = compile_only


def narrow_products(ttir: str) -> set[str]:
    """The lines of Triton's intermediate code that multiply a stride in 32 bits."""
    names = set(re.findall(r"(%\w*stride\w*): i32", ttir))
    names |= {name for name, of in re.findall(r"(%\S+) = tt\.splat (%\S+) : i32", ttir) if of in names}
    products = re.findall(r"arith\.muli (%\S+), (%\S+) : (?:tensor<\S+x)?i32", ttir)
    return {" * ".join(both) for both in products if names & {*both}}


def train(base) -> None:
    """A pass without dropout, and one with it and with tokens that all examples begin with."""
    lengths = ((40, 30), (70, 60), (33, 31))
    for shared, rank, dropout, keep in ((0, 8, 0.0, "all"), (20, MOST_RANK, 0.1, "input")):
        model = with_adapters(base, rank, dropout)
        fused = FusedModel(model, Plan(150, keep))
        fused.loss_sum(make_examples(lengths, 96, shared), "answer", 1).backward()


def score(base) -> None:
    """Reading and a step, with weights in 4 bits and dense, shared rows read apart and not."""
    for merged, apart in ((False, 10), (True, 1000)):
        cache.APART = apart
        tuned = with_adapters(base, MOST_RANK, 0.0)
        engine = decode.Engine(merge(tuned) if merged else tuned, 1e9)
        prompts = [example.ids for example in make_examples(((90, 1), (30, 1)), 96, shared=20)]
        list(engine.answers(dict(enumerate(prompts)), 3, [-1]))


def train_t5() -> None:
    """A pass with adapters, and one where all weights learn."""
    config = T5Config(d_model=128, d_ff=256, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
    lora = LoraConfig(r=8, target_modules=["q", "v"], lora_dropout=0.1, task_type="SEQ_2_SEQ_LM")
    for adapted in (True, False):
        model = t5.lean(T5ForConditionalGeneration(config))
        model = (t5.with_lora(model, lora, 1) if adapted else model).bfloat16()
        packed = Packed(model, (40, 9), torch.bfloat16)
        batch = packed.batch([[5] * 40, [6] * 7], [[7] * 9, [8]], 0)
        packed.logits(batch).float().sum().backward()


def main() -> None:
    driver.set_active(NoDevice(int(sys.argv[1])))
    variants: dict = defaultdict(dict)
    collect(variants)
    for key_heads in (2, 1):
        base = llama(dtype=torch.bfloat16, **SIZES | {"num_key_value_heads": key_heads})
        train(base)
        score(base)
    train_t5()
    shared = {
        name: max(kernel.metadata.shared for kernel in found.values()) for name, found in variants.items()
    }
    kernels_of = {name: list(found.values()) for name, found in variants.items()}
    assert all("stride" in kernel.asm["ttir"] for kernel in kernels_of["attention_dkv_kernel"])
    narrow = {
        name: sorted(set().union(*(narrow_products(kernel.asm["ttir"]) for kernel in found)))
        for name, found in kernels_of.items()
    }
    print(json.dumps({"shared": shared, "narrow": {name: found for name, found in narrow.items() if found}}))


if __name__ == "__main__":
    main()
