"""The fast paths prove themselves before they are used: on some of the run's own examples, beside the model's
own layers.

Training: loss and every gradient of the adapters, set at random meanwhile, beside PEFT's, with the same
dropout. Scoring: logits after a prompt and a further token beside the model's own before merging.
All kernels that a run launches and all weights that it copies take part. What differs, and what can't be
compiled or launched, is the reason why the run goes on with the model's own layers. Where memory lacks, less
is compared.
"""

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from bitsandbytes.functional import dequantize_4bit

from study import checks
from study.encoding import Example, lengths
from study.errors import is_out_of_memory
from study.fast.decoder import NAMES, linear_layers
from study.model import base_of
from study.packing import common_prefix, loss_sum, shared_prefix, split_to_fit

MANY = 20_000  # examples, beyond which some must do
SEED = 20_240_229  # of the adapters and of dropout
STRENGTH = 0.25  # of an adapter beside its weight, in Frobenius norm: it matters, and doesn't drown the model

# The largest errors that are put down to rounding, relative to the norm of what is compared; or so many times
# the noise that one more rounding makes in each of the model's own layers, which deep models pass on. In
# float32 only the order of sums differs, by some 1e-6. In bfloat16 on an H200, gradients are off by 3e-2 in
# the demo's model of 6 layers, by 0.14 to 0.16 in a Llama-2-7B of random weights, logits by 7e-3 and 7e-2:
# 0.7 to 1.7 times the noise. What is broken is off by more than is tolerated: `python -m tests.mutations`.
ROUNDINGS = 3
TOLERANCES = {
    torch.float32: {"loss": 1e-4, "kind": 1e-3, "single": 1e-3, "logits": 1e-3},
    torch.bfloat16: {"loss": 0.02, "kind": 0.1, "single": 0.3, "logits": 0.05},
}


def attempt(check: Callable[[], str | None]) -> str | None:
    """What `check` returns, or the error that ends it, as one short line. Raises what lacks memory."""
    try:
        return check()
    except Exception as error:  # whatever Triton, its compiler or the driver raise: no one list has them all
        if is_out_of_memory(error):
            raise
        return describe(error)


def describe(error: Exception) -> str:
    """One short line, the same each time: without folders and addresses."""
    text = re.sub(r"(?:/[\w.+~-]+)+/|0x[0-9a-f]+", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:120].rstrip(": ")


def with_less(check: Callable[[list], object], items: Sequence, size: Callable[[object], int]):
    """`check(items)` or, where that exceeds the memory, of the two shortest; None where these do, too."""
    for some in (list(items), sorted(items, key=size)[:2]):
        try:
            return check(some)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print("self-check no memory for it: nothing was compared", flush=True)
    return None


# Training


def training(model, fast, examples: Sequence[Example], loss_on: str) -> str | None:
    """The reason not to train `model` (PEFT over bitsandbytes) by `fast` (train.FusedModel), or None."""

    def check(some: list[Example]) -> str | None:
        errors = training_errors(model, fast, groups_of(some, fast.plan.tokens, loss_on), loss_on)
        return too_large(errors, fast.embedding.dtype)

    some = some_of(examples)
    return with_less(lambda some: attempt(lambda: check(some)), some, lambda example: len(example.ids))


def some_of(examples: Sequence[Example]) -> list[Example]:
    """All of few examples; of many those at equal distances, beside the longest and the two shortest."""
    each = lengths(examples)
    order = sorted(range(len(examples)), key=each.__getitem__)
    chosen = {*range(0, len(examples), -(-len(examples) // MANY)), order[-1], *order[:2]}
    return [examples[i] for i in sorted(chosen)]


@contextlib.contextmanager
def shaken(model) -> Iterator[None]:
    """What each decoder layer returns is rounded once more, at random."""
    base = base_of(model)
    width = torch.finfo(base.model.embed_tokens.weight.dtype).eps / 2

    def shake(module, args, output: torch.Tensor) -> torch.Tensor:
        return (output.float() * (1 + width * (2 * torch.rand_like(output.float()) - 1))).to(output.dtype)

    hooks = [layer.register_forward_hook(shake) for layer in base.model.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def beyond_rounding(
    errors: dict[str, float], noise: dict[str, float], dtype: torch.dtype
) -> dict[str, float]:
    """`errors` as shares of what this model tolerates, times TOLERANCES: a deep model passes rounding on, so
    it tolerates more, by the `noise` that rounding once more makes in its own layers."""
    return {
        name: error / max(1.0, ROUNDINGS * noise[name] / TOLERANCES[dtype][name])
        for name, error in errors.items()
    }


def too_large(errors: dict[str, float], dtype: torch.dtype) -> str | None:
    """The reason that `errors` are, or None if all are tolerable."""
    wrong = [name for name, error in errors.items() if not error <= TOLERANCES[dtype][name]]  # NaN is, too
    what = {"loss": "loss is another one", "logits": "logits are others"}
    return f"the fused layers' {what.get(wrong[0], 'gradients are others')}" if wrong else None


def groups_of(examples: Sequence[Example], most: int, loss_on: str) -> list[list[Example]]:
    """The longest and the two shortest of `examples` in passes of at most `most` tokens, and two that share
    their beginning, if there are such and none of these passes shares one."""
    order = sorted(examples, key=lambda example: len(example.ids))
    chosen = [order[-1], *order[:2]] if len(order) > 2 else order
    lengths = [len(example.ids) for example in chosen]
    groups = [[chosen[i] for i in group] for group in split_to_fit(range(len(chosen)), lengths, most, False)]
    if not any(shared_prefix(group, loss_on) for group in groups):
        alike = sorted(examples, key=lambda example: example.ids)  # so that those most alike are neighbours
        pairs = [pair for pair in itertools.pairwise(alike) if sum(len(e.ids) for e in pair) <= most]
        pair = max(pairs, key=lambda pair: common_prefix([e.ids for e in pair]), default=())
        if pair and shared_prefix(pair, loss_on):
            groups.append(list(pair))
    return groups


def training_errors(model, fast, groups: Sequence[Sequence[Example]], loss_on: str) -> dict[str, float]:
    """Errors of the fused layers beside PEFT's, `beyond_rounding`: of the loss; of the adapters' gradients,
    the largest of all those of a kind (A or B of q_proj, ...) together, and of a single one."""
    dtype, kinds = fast.embedding.dtype, kinds_of(fast)
    with random_adapters(model):
        with plain_layers(model), torch.autocast(model.device.type, torch.bfloat16, dtype == torch.bfloat16):
            expected = by_plain_layers(model, fast, groups, loss_on)
            with shaken(model):
                noise = compare(expected, by_plain_layers(model, fast, groups, loss_on), kinds)
        got = [0.0, None]
        for seed, group in enumerate(groups):
            add(got, fast.loss_sum(group, loss_on, seed), fast.parameters)
    return beyond_rounding(compare(got, expected, kinds), noise, dtype)


def by_plain_layers(model, fast, groups, loss_on: str) -> list:
    """Loss and gradients by PEFT's layers, with the fused ones' dropout."""
    total = [0.0, None]
    for seed, group in enumerate(groups):
        with same_dropout(model, fast, group, loss_on, seed):
            add(total, loss_sum(model, group, loss_on, False, fast.embedding.device), fast.parameters)
    return total


def add(total: list, loss: torch.Tensor, parameters: Sequence[torch.Tensor]) -> None:
    """Add a loss and its gradients to `total`."""
    gradients = torch.autograd.grad(loss, parameters)
    if total[1] is None:
        total[1] = list(gradients)
    else:
        torch._foreach_add_(total[1], gradients)
    total[0] += loss.detach().double()


def kinds_of(fast) -> list[str]:
    """What each of `fast.parameters` is."""
    return [f"{part} of {name}" for _ in fast.layers for names in NAMES for part in "AB" for name in names]


def compare(got: list, expected: list, kinds: Sequence[str]) -> dict[str, float]:
    """Errors of a loss and its gradients, whose kinds these are; `expected` is used up."""
    sizes = torch.stack(torch._foreach_norm(expected[1])).double()
    torch._foreach_sub_(expected[1], got[1])
    off = torch.stack(torch._foreach_norm(expected[1])).double()
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    which = torch.tensor([numbers[kind] for kind in kinds], device=sizes.device)
    kind_sizes, kind_off = (
        sizes.new_zeros(len(numbers)).index_add_(0, which, values.square()).sqrt() for values in (sizes, off)
    )
    # A gradient far smaller than the others of its kind may be rounding alone.
    least = 0.3 * kind_sizes[which] / (len(kinds) / len(numbers)) ** 0.5
    errors = {
        "loss": (got[0] - expected[0]).abs() / expected[0],
        "kind": (kind_off / kind_sizes).max(),
        "single": (off / torch.maximum(sizes, least)).max(),
    }
    return {name: error.item() for name, error in errors.items()}


@contextlib.contextmanager
def random_adapters(model) -> Iterator[None]:
    """A and B at random, so that neither's gradient is 0; afterwards they are as they were."""
    modules = [module for layer in base_of(model).model.layers for module in linear_layers(layer)]
    pairs = [(module.lora_A["default"].weight, module.lora_B["default"].weight) for module in modules]
    before = [[part.detach().clone() for part in pair] for pair in pairs]
    generator = torch.Generator(pairs[0][0].device).manual_seed(SEED)
    try:
        with torch.no_grad():
            for module, (a, b) in zip(modules, pairs, strict=True):
                weight = dequantize_4bit(module.base_layer.weight.data, module.base_layer.weight.quant_state)
                a.normal_(generator=generator).mul_(a.shape[1] ** -0.5)
                b.normal_(generator=generator).mul_((len(b) * len(a)) ** -0.5)
                b.mul_(STRENGTH * weight.float().norm() / module.scaling["default"])
        yield
    finally:
        for pair, old in zip(pairs, before, strict=True):
            for part, values in zip(pair, old, strict=True):
                part.data.copy_(values)


@contextlib.contextmanager
def plain_layers(model) -> Iterator[None]:
    """The model's own layers in little memory: each layer is computed twice. Random numbers, modes and
    checkpointing are as they were afterwards."""
    modes = {module: module.training for module in model.modules()}
    checkpointed = base_of(model).is_gradient_checkpointing
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.train()
        if not checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            yield
        finally:
            if not checkpointed:
                model.gradient_checkpointing_disable()
            for module, mode in modes.items():
                module.training = mode


# Dropout: the reference draws the masks of the fused layers by other code.


class Masked(torch.nn.Module):
    """In place of the dropout of `sharers` linear layers with the same input, which are computed one after
    the other: keeps of [1, tokens, width] what the fused layers keep."""

    def __init__(self, rows: torch.Tensor, seed: int, probability: float, sharers: int):
        super().__init__()
        self.rows, self.seed, self.probability = rows, seed, probability
        self.sharers, self.waiting, self.kept = sharers, 0, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.waiting:
            parts = self.rows.to(x.device).split(256)  # drawing takes ten times the memory of the mask
            self.kept = torch.cat([kept_of(p, x.shape[-1], self.seed, self.probability) for p in parts])
        kept, self.waiting = self.kept, (self.waiting or self.sharers) - 1
        if not self.waiting:
            self.kept = None
        return torch.where(kept, x.float() * (1 / (1 - self.probability)), 0).to(x.dtype)


@contextlib.contextmanager
def same_dropout(model, fast, examples: Sequence[Example], loss_on: str, seed: int) -> Iterator[None]:
    """The model's own layers drop what the fused ones do in a pass over `examples`."""
    rows, batch, before = rows_of(examples, loss_on), fast.batch(examples, loss_on, seed), {}
    try:
        for layer, ours in zip(base_of(model).model.layers, fast.layers, strict=True):
            modules = iter(linear_layers(layer))
            for group in ours.groups:
                masked = Masked(rows, ours.seed(batch, group), group.dropout, len(group.sizes))
                for module in itertools.islice(modules, len(group.sizes)):
                    before[module] = module.lora_dropout["default"]
                    if group.dropout:
                        module.lora_dropout["default"] = masked
        yield
    finally:
        for module, dropout in before.items():
            module.lora_dropout["default"] = dropout


def rows_of(examples: Sequence[Example], loss_on: str) -> torch.Tensor:
    """Of each token of `examples` end to end, its row in the fused layers, by which dropout knows it."""
    shared, rows, own = shared_prefix(examples, loss_on), [], 0
    for example in examples:
        length = len(example.ids)
        rows += [place if place < shared else own + place for place in range(length)]
        own += length - shared
    return torch.tensor(rows)


def kept_of(rows: torch.Tensor, width: int, seed: int, probability: float) -> torch.Tensor:
    """Whether dropout keeps each of [rows, width], by the mixer that `kernels.dropout_mask` names."""
    low = 2**32 - 1
    number = (rows[:, None] * width + torch.arange(width, device=rows.device)) & low ^ seed
    number = (number ^ number >> 16) * 0x7FEB352D & low
    number = (number ^ number >> 15) * 0x846CA68B & low
    number = number ^ number >> 16
    return (number >> 8).float() / 2**24 >= probability


# Scoring


@dataclass
class Witness:
    """What a model's own layers say: the logits after a prompt, and after one more token [2, vocabulary], and
    how far these go apart by rounding once more in each layer."""

    prompt: list[int]
    token: int
    logits: torch.Tensor
    noise: float


def witnesses(model, prompts: Sequence[list[int]]) -> list[Witness]:
    """By the model's own layers, as it was loaded; to be asked before it is merged."""
    return with_less(lambda some: [own_logits(model, prompt) for prompt in some], telling(prompts), len) or []


@torch.inference_mode()
def own_logits(model, prompt: list[int]) -> Witness:
    ids = torch.tensor([[*prompt, prompt[-1]]], device=next(model.parameters()).device)
    asked = {"input_ids": ids, "use_cache": False, "logits_to_keep": 2}
    with checks.still(model):
        logits = model(**asked).logits[0].float()
        with shaken(model):
            noise = distances(model(**asked).logits[0].float(), logits).max().item()
    return Witness(list(prompt), prompt[-1], logits, noise)


def distances(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How far logits [..., vocabulary] are from others, relative to these without their mean [...]."""
    return (logits - expected).norm(dim=-1) / (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)


def scoring(model, found: Sequence[Witness]) -> str | None:
    """The reason not to decode by the engine with `model`, merged or in 4 bits, or None."""

    def check(some: list[Witness]) -> str | None:
        return too_large(scoring_errors(model, some), base_of(model).model.embed_tokens.weight.dtype)

    if not found:
        return None
    return with_less(lambda some: attempt(lambda: check(some)), found, lambda one: len(one.prompt))


def telling(prompts: Sequence[list[int]]) -> list[list[int]]:
    """At most four: the longest, the shortest, and two that have no more in common than all."""
    chosen = max(prompts, key=len), min(prompts), max(prompts), min(prompts, key=len)
    return [list(prompt) for prompt in dict.fromkeys(map(tuple, chosen))]


def scoring_errors(model, found: Sequence[Witness]) -> dict[str, float]:
    """The largest error of a prompt's logits by the engine."""
    from study.fast.decode import Engine  # needs Triton

    engine, errors = Engine(model, float(2**62)), []
    few, expected = engine.few_rows, torch.stack([one.logits for one in found])
    # Products with few rows and with many, prompts read end to end and alone.
    for few_rows, together in ((few, True), (few, False), (0, True)) if few else ((0, True), (0, False)):
        engine.few_rows = few_rows
        errors.append(distances(engine_logits(engine, found, together), expected).max())
    noise = {"logits": max(one.noise for one in found)}
    return beyond_rounding({"logits": torch.stack(errors).max().item()}, noise, engine.embedding.dtype)


@torch.inference_mode()
def engine_logits(engine, found: Sequence[Witness], together: bool) -> torch.Tensor:
    """What the engine makes of the prompts, all at once or one after the other [prompts, 2, vocabulary]."""
    from study.fast.decode import GRAPH_USES, Running  # needs Triton

    seen: list[torch.Tensor] = []

    def choose(logits, nodes):
        seen.append(logits.float())
        return nodes, nodes, None  # what follows is given

    engine.choose = choose
    engine.prepare([one.prompt for one in found], 2, None, len(found))
    place = shared = engine.cache.shared
    examples, rows = [], []
    for one in found:
        examples.append(Running(len(examples), one.prompt[shared:], place))
        place += len(one.prompt) - shared + 2
    for group in [examples] if together else [[example] for example in examples]:
        seen.clear()
        engine.read_all(group)
        first = torch.cat(seen)
        for example in group:
            example.answer.append(found[example.index].token)
        for _ in range(GRAPH_USES if together else 1):  # on CUDA the last one is by a graph
            engine.load(group)
            engine.step(len(group))() if together else engine.advance(engine.padded(len(group)))
        rows.append(torch.stack([first, seen[-1][: len(group)]], 1))
    return torch.cat(rows)
