"""How training computes: by the model's own layers (plain) or by those written out for a GPU (fast), behind
one interface.

    begin(seed, step)   the examples of the step that follows, and the seed of its dropout
    sizes()             tokens that each of them takes, by which processes share them out
    passes(places)      those of them at `places` in few passes, each within `max_tokens`
    loss_sum(places)    the cross-entropy summed over their learned tokens, in float32: one pass
    max_tokens          of a pass; a trainer that runs out of memory lowers it
    describe()          which path it is and why, in words
    batching()          what the record says of it
    plan()              what a resumed run goes on with

What dropout draws for a token depends on the step's seed and its place in the step alone: not on the pass or
the process that computes it.
"""

import importlib.util
import math
from collections.abc import Sequence

import torch

from study import checks, device, processes, sharding
from study.dropout import ByExample
from study.encoding import Example, lengths
from study.errors import is_out_of_memory
from study.fast import decoder, memory, self_check
from study.packing import learned_places, loss_sum, shared_prefix, split_to_fit, step_rows

ENOUGH_TOKENS = 4_096  # in a pass: where fewer fit, checkpointing pays
MOST_TOKENS = 16_384  # full speed on the largest cards; more only costs memory


class PlainPath:
    """The layers of a PEFT model as they are, packed or padded; `why` it is not the fast path."""

    def __init__(self, model, loss_on: str, padded: bool, why: str, max_tokens: int, checkpointing: bool):
        self.model, self.loss_on, self.padded, self.why = model, loss_on, padded, why
        self.max_tokens, self.checkpointing = max_tokens, checkpointing
        self.attention = model.config._attn_implementation
        self.device, self.dropout = next(model.parameters()).device, ByExample.of(model)

    def begin(self, seed: int, step: Sequence[Example]) -> None:
        self.step = step
        self.dropout.begin(seed)
        torch.manual_seed(seed)  # of what else a model may draw

    def sizes(self) -> list[int]:
        return [len(example.ids) for example in self.step]

    def passes(self, places: Sequence[int]) -> list[list[int]]:
        """One by one where the positions of an example would depend on the longest of them."""
        sizes, most = self.sizes(), checks.same_up_to(self.model)
        groups = split_to_fit(places, sizes, self.max_tokens, self.padded)
        together = lambda group: [group] if max(sizes[i] for i in group) <= most else [[i] for i in group]
        return [part for group in groups for part in together(group)]

    def loss_sum(self, places: Sequence[int]) -> torch.Tensor:
        examples, in_bfloat16 = [self.step[i] for i in places], device.compute_dtype() == torch.bfloat16
        self.dropout.place(places, [len(example.ids) for example in examples], self.padded)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=in_bfloat16):
            return loss_sum(self.model, examples, self.loss_on, self.padded, self.device)

    def describe(self) -> str:
        laid = "padded" if self.padded else "packed"
        checkpointing = f"checkpointing {'on' if self.checkpointing else 'off'}"
        return f"plain layers ({self.why}), {laid}, {self.attention} attention, {checkpointing}"

    def batching(self) -> dict:
        return {
            "padded": self.padded,
            "attention": self.attention,
            "max_tokens_per_batch": self.max_tokens,
            "gradient_checkpointing": self.checkpointing,
            "plan": None,
            "not_fused": self.why,
        }

    def plan(self) -> dict:
        return {"fused": False, "tokens": self.max_tokens, "gradient_checkpointing": self.checkpointing}


class FastPath:
    """The written-out layers of a PEFT model over bitsandbytes (study/fast), by a plan for its memory."""

    checkpointing = False

    def __init__(self, model, loss_on: str, plan: memory.Plan):
        from study.fast.train import FusedModel  # needs Triton

        self.fused, self.loss_on, self.max_tokens = FusedModel(model, plan), loss_on, plan.tokens

    def begin(self, seed: int, step: Sequence[Example]) -> None:
        self.seed, self.step = seed % 2**31, step
        self.shared, self.firsts = step_rows(step, self.loss_on)

    def sizes(self) -> list[int]:
        """Without what all of them begin with, which is computed once a pass."""
        return [len(example.ids) - self.shared for example in self.step]

    def passes(self, places: Sequence[int]) -> list[list[int]]:
        return split_to_fit(places, [len(example.ids) for example in self.step], self.max_tokens, False)

    def loss_sum(self, places: Sequence[int]) -> torch.Tensor:
        examples, rows = [self.step[i] for i in places], (self.shared, [self.firsts[i] for i in places])
        return self.fused.loss_sum(examples, self.loss_on, self.seed, rows)

    def describe(self) -> str:
        return f"fused layers, {self.fused.plan}"

    def batching(self) -> dict:
        return {
            "padded": False,
            "attention": "fused",
            "max_tokens_per_batch": self.max_tokens,
            "gradient_checkpointing": self.fused.plan.keep != "all",
            "plan": str(self.fused.plan),
            "not_fused": None,
        }

    def plan(self) -> dict:
        plan = self.fused.plan
        kept = {"keep": plan.keep, "on_host": plan.on_host}
        return {"fused": True, "tokens": self.max_tokens, "gradient_checkpointing": False, **kept}


def choose(
    model, examples: Sequence[Example], tokens: Sequence[int], args, padded: bool, kept: dict | None, training
) -> PlainPath | FastPath:
    """The path for a PEFT model, of `examples` in steps of so many `tokens`: the fast one where it can be
    taken and computes the same, as `kept` of a killed run if that is given. `training` are transformers'
    TrainingArguments."""
    why = processes.first_reason(why_plain(model, args, padded, training))
    if why is None and kept and not kept["fused"]:
        why = "as before it was stopped"
    if why is None:
        path, why = fast_path(model, examples, tokens, args, kept)
        if path:
            return path
    if kept and kept["fused"]:
        print("resumed    by other layers than it began with: its adapter will be another one by rounding")
        kept = None
    fitting = (
        (kept["tokens"], kept["gradient_checkpointing"])
        if kept
        else fit_memory(model, examples, args, padded, training.device)
    )
    return PlainPath(model, args.loss_on, padded, why, *fitting)


def why_plain(model, args, padded: bool, training) -> str | None:
    """The reason why training can't take the fast path, or None."""
    if sharding.asked():
        return "each process has a part of every layer, by FSDP2"
    if training.device.type != "cuda":
        return "no CUDA"
    if device.compute_dtype() != torch.bfloat16 or not importlib.util.find_spec("triton"):
        return "no bfloat16 or no triton here"
    if padded:
        return "padded"
    if args.attn_implementation != "auto":
        return f"--attn_implementation {args.attn_implementation}"
    return self_check.attempt(lambda: decoder.why_not_train(model))


def fast_path(
    model, examples: Sequence[Example], tokens: Sequence[int], args, kept: dict | None = None
) -> tuple[FastPath | None, str | None]:
    """The fast path, with the plan that was `kept` or that fits the device's free memory, and None; or None
    and the reason why it can't be taken."""
    made = []
    why = self_check.attempt(
        lambda: made.append(FastPath(model, args.loss_on, plan_for(model, examples, tokens, args, kept)))
    )
    why = why or self_check.training(model, made[0].fused, examples, args.loss_on)
    why = processes.first_reason(why)  # every GPU proves itself, and all take the same path
    return (None, why) if why else (made[0], None)


def plan_for(
    model, examples: Sequence[Example], tokens: Sequence[int], args, kept: dict | None
) -> memory.Plan:
    if kept:
        return memory.Plan(kept["tokens"], kept["keep"], kept["on_host"])
    longest = max(lengths(examples))
    given = args.max_tokens_per_batch
    wanted = None if given == "auto" else max(longest, min(given, max(tokens)))
    torch.cuda.empty_cache()
    free = int(0.92 * device.free_bytes())
    learned = args.batch_size * max(len(learned_places(example, args.loss_on)) for example in examples)
    most, learned = (math.ceil(count / processes.count()) for count in (max(tokens), learned))  # of a share
    step = min(MOST_TOKENS, most), learned
    shared = shared_prefix(examples, args.loss_on)
    return memory.choose_plan(model, free, longest, step, wanted, args.gradient_checkpointing, shared)


def fit_memory(
    model, examples: Sequence[Example], args, padded: bool, where: torch.device
) -> tuple[int, bool]:
    """Tokens of a plain pass and whether to checkpoint: the flags', and for "auto" what the device's memory
    allows.

    On CUDA the memory of a token is measured, without checkpointing and, where less than a few examples would
    fit, with.
    """
    tokens, checkpointing = args.max_tokens_per_batch, args.gradient_checkpointing
    longest = max(lengths(examples))
    if where.type != "cuda" or (tokens != "auto" and checkpointing != "auto"):
        return (4096 if tokens == "auto" else tokens), checkpointing == "on"
    enough = max(longest, min(ENOUGH_TOKENS, args.batch_size * longest)) if tokens == "auto" else tokens
    # Processes that share layers can't try what may not fit: one that stops leaves the others waiting.
    both = checkpointing == "auto" and not sharding.asked()
    for on in [False, True] if both else [checkpointing != "off"]:
        fitting = min(processes.everyone(tokens_that_fit(model, examples, args.loss_on, padded, on, where)))
        if fitting >= enough:
            break
    return (max(longest, min(MOST_TOKENS, fitting)) if tokens == "auto" else tokens), on


def tokens_that_fit(
    model, examples, loss_on: str, padded: bool, checkpointing: bool, where: torch.device
) -> int:
    """How many tokens one forward and backward pass can take, from the memory that a small one takes."""
    each = lengths(examples)
    longest = sorted(range(len(examples)), key=each.__getitem__)[-4:]
    group, count = [examples[i] for i in longest], sum(each[i] for i in longest)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.cuda.synchronize(where)
    before = torch.cuda.memory_allocated(where)
    torch.cuda.reset_peak_memory_stats(where)
    try:
        path = PlainPath(model, loss_on, padded, "", count, checkpointing)
        path.begin(0, group)
        path.loss_sum(range(len(group))).backward()
        used = torch.cuda.max_memory_allocated(where) - before
    except RuntimeError as error:
        if sharding.asked() or not is_out_of_memory(error):
            raise
        used = math.inf
    model.zero_grad(set_to_none=True)
    if checkpointing:
        model.gradient_checkpointing_disable()
    torch.cuda.empty_cache()
    free = device.free_bytes() - trainable * 12  # gradients and two AdamW moments in float32
    torch.cuda.reset_peak_memory_stats(where)
    return int(0.85 * free / (used / count))
