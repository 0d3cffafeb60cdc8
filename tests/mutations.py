"""Break each kernel and each copy of the fast paths in turn: do the self-checks of a run notice?

    python -m tests.mutations --output mutations.json

On a small random model, in bfloat16 on CUDA; without it a tiny one in float32, under Triton's interpreter.
Beside what the self-checks of training and of scoring (study/fast/self_check.py) said stands the largest
error that they found, as a share of what they tolerate: below 1 they said yes. "—" where a check has nothing
to do with what was broken.
"""

import contextlib
import copy
import dataclasses
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from tabulate import tabulate

from benchmarks.provenance import headline, provenance
from study import packing
from study.fast import attention, cache, decode, kernels, memory, nf4, self_check
from study.fast.memory import OnHost, Plan
from study.fast.train import FusedModel, Group
from study.model import merge
from tests.exactness import CUDA, LARGE, TINY, arguments, llama, make_examples, with_adapters

UNBROKEN = "nothing"


class Broken:
    """A Triton kernel that is launched with other arguments, or not at all where these are None."""

    def __init__(self, kernel, change: Callable[[dict], dict | None]):
        self.kernel, self.change = kernel, change
        self.names = list(inspect.signature(kernel.fn).parameters)

    def __getitem__(self, grid):
        def launch(*args, **options) -> None:
            named = dict(zip(self.names, args, strict=False))
            changed = self.change(named)
            if changed is not None:
                self.kernel[grid](*(named | changed).values(), **options)

        return launch


@dataclass
class Mutation:
    """What is broken: an attribute, and what is made of it. `training` and `scoring` name the cases below
    that have to do with it."""

    name: str
    owner: object
    attribute: str
    make: Callable
    training: str | None = None
    scoring: str | None = None

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        original = getattr(self.owner, self.attribute)
        setattr(self.owner, self.attribute, self.make(original))
        try:
            yield
        finally:
            setattr(self.owner, self.attribute, original)


def launch(name: str, module, kernel: str, change: Callable = lambda given: None, **cases) -> Mutation:
    what = f"{module.__name__.removeprefix('study.fast.')}.{kernel}: {name}"
    return Mutation(what, module, kernel, lambda original: Broken(original, change), **cases)


def after(change: Callable) -> Callable:
    """A method, and then `change(self)`."""

    def make(original):
        def method(self, *args, **options):
            result = original(self, *args, **options)
            change(self)
            return result

        return method

    return make


def result(change: Callable) -> Callable:
    """A function whose result is another one."""
    return lambda original: lambda *args, **options: change(original(*args, **options))


def of_kernels() -> list[Mutation]:
    plain, dropout = {"training": "plain"}, {"training": "dropout"}
    dense, apart, packed = {"scoring": "dense"}, {"scoring": "apart"}, {"scoring": "4 bits"}
    ones = lambda name: lambda given: {name: torch.ones_like(given[name])}
    another_seed = lambda given: {"seed": given["seed"] + 1}
    less = lambda name, by=1: lambda given: {name: given[name] - by}
    half = lambda name: lambda given: {name: given[name] // 2}
    no_shared, no_parts = lambda given: {"shared": 0}, lambda given: {"splits": 0}
    nothing = lambda given: None
    prompts = lambda change: lambda given: change(given) if given["reading"] else {}
    tokens = lambda change: lambda given: {} if given["reading"] else change(given)
    return [
        launch("does nothing", nf4, "unpack_nf4_kernel", **plain, **packed),
        launch(
            "no offset", nf4, "unpack_nf4_kernel", lambda g: {"offsets": 0 * g["offsets"]}, **plain, **packed
        ),
        launch("does nothing", nf4, "multiply_nf4_kernel", **packed),
        launch("blocks left out", nf4, "multiply_nf4_kernel", less("chunk", 2), **packed),
        launch("does nothing", nf4, "add_up_kernel", **packed),
        launch("a split left out", nf4, "add_up_kernel", less("splits"), **packed),
        launch("does nothing", kernels, "rms_norm_kernel", **plain, **dense),
        launch("no weight", kernels, "rms_norm_kernel", ones("weight"), **plain, **dense),
        launch("another mask", kernels, "rms_norm_kernel", another_seed, **dropout),
        launch("does nothing", kernels, "rms_norm_backward_kernel", **plain),
        launch("no weight", kernels, "rms_norm_backward_kernel", ones("weight"), **plain),
        launch("does nothing", kernels, "rotate_kernel", **plain),
        launch("turns back", kernels, "rotate_kernel", lambda g: {"sin": -g["sin"]}, **plain),
        launch("does nothing", kernels, "swiglu_kernel", **plain, **dense),
        launch("another mask", kernels, "swiglu_kernel", another_seed, **dropout),
        launch("does nothing", kernels, "swiglu_backward_kernel", **plain),
        launch("another mask", kernels, "swiglu_backward_kernel", another_seed, **dropout),
        launch("rows left out", kernels, "swiglu_backward_kernel", less("rows"), **plain),
        launch("does nothing", kernels, "dropout_kernel", **dropout),
        launch("another mask", kernels, "dropout_kernel", another_seed, **dropout),
        launch("another share", kernels, "dropout_kernel", lambda g: {"probability": 0.2}, **dropout),
        launch("does nothing", kernels, "add_adapter_kernel", **dropout),
        launch("another mask", kernels, "add_adapter_kernel", another_seed, **dropout),
        launch("does nothing", attention, "attention_kernel", **plain),
        launch("shared rows unseen", attention, "attention_kernel", no_shared, **plain),
        launch("another scale", attention, "attention_kernel", lambda g: {"scale": g["scale"] / 2}, **plain),
        launch("does nothing", attention, "attention_dq_kernel", **plain),
        launch("shared rows unseen", attention, "attention_dq_kernel", no_shared, **plain),
        launch("not turned back", attention, "attention_dq_kernel", lambda g: {"sin": 0 * g["sin"]}, **plain),
        launch("does nothing", attention, "attention_dkv_kernel", **plain),
        launch(
            "shared gradient left out", attention, "attention_dkv_kernel", lambda g: {"chunks": 0}, **plain
        ),
        launch("does nothing", attention, "attention_shared_dkv_kernel", **plain),
        launch("rows left out", attention, "attention_shared_dkv_kernel", half("chunk"), **plain),
        launch("does nothing", cache, "rotate_and_store_kernel", **dense),
        launch(
            "next place", cache, "rotate_and_store_kernel", lambda g: {"places": g["places"] + 1}, **dense
        ),
        launch(
            "no positions",
            cache,
            "rotate_and_store_kernel",
            lambda g: {"positions": 0 * g["positions"]},
            **dense,
        ),
        launch("does nothing", cache, "cached_attention_kernel", **dense),
        launch("does nothing for prompts", cache, "cached_attention_kernel", prompts(nothing), **dense),
        launch("does nothing for tokens", cache, "cached_attention_kernel", tokens(nothing), **dense),
        launch("prompts' shared rows unseen", cache, "cached_attention_kernel", prompts(no_shared), **dense),
        launch("tokens' shared rows unseen", cache, "cached_attention_kernel", tokens(no_shared), **dense),
        launch("last row unseen", cache, "cached_attention_kernel", tokens(less("lengths")), **dense),
        launch("does nothing", cache, "prefix_attention_kernel", **apart),
        launch("rows left out", cache, "prefix_attention_kernel", half("shared"), **apart),
        launch(
            "prompts' parts of the shared rows unseen",
            cache,
            "cached_attention_kernel",
            prompts(no_parts),
            **apart,
        ),
        launch(
            "tokens' parts of the shared rows unseen",
            cache,
            "cached_attention_kernel",
            tokens(no_parts),
            **apart,
        ),
    ]


def of_copies() -> list[Mutation]:
    plain, dense, packed = {"training": "plain"}, {"scoring": "dense"}, {"scoring": "4 bits"}
    groups = lambda fused: [group for layer in fused.layers for group in layer.groups]
    batch = lambda **new: result(
        lambda b: dataclasses.replace(b, **{name: change(getattr(b, name)) for name, change in new.items()})
    )
    flipped = lambda tensor: tensor.flip(0)
    rolled, one_less = lambda tensor: tensor.roll(1, 0), lambda tensor: tensor - 1

    def each(change) -> Callable:
        return after(lambda fused: [change(group) for group in groups(fused)])

    def with_(name: str, change) -> Callable:
        return after(lambda owner: setattr(owner, name, change(getattr(owner, name))))

    def of_first_layer(name: str) -> Callable:
        return after(
            lambda owner: setattr(owner.layers[0], name, torch.ones_like(getattr(owner.layers[0], name)))
        )

    def modules(order) -> Callable:
        """A constructor that takes its list of modules in another order."""
        return lambda original: lambda self, given, *rest: original(self, order(list(given)), *rest)

    def unscaled(linear) -> None:
        if linear.a is not None:
            linear.b.div_(4.0)

    keys_values = lambda given: [given[0], given[2], given[1]] if len(given) == 3 else given
    gate_up = lambda given: given[::-1] if len(given) == 2 else given
    head = lambda linear: type("Head", (), {"__call__": lambda _, x: linear(x).roll(1, -1)})()
    return [
        Mutation("adapters never copied", FusedModel, "refresh", lambda original: lambda self: None, **plain),
        Mutation("A not copied", FusedModel, "refresh", each(lambda group: group.a.zero_()), **plain),
        Mutation("B not copied", FusedModel, "refresh", each(lambda group: group.b.zero_()), **plain),
        Mutation(
            "B not scaled", FusedModel, "refresh", each(lambda group: group.b.div_(group.scale)), **plain
        ),
        Mutation("first norm's weight", FusedModel, "__init__", of_first_layer("norm_1"), **plain),
        Mutation("second norm's weight", FusedModel, "__init__", of_first_layer("norm_2"), **plain),
        Mutation("last norm's weight", FusedModel, "__init__", with_("norm", torch.ones_like), **plain),
        Mutation("embedding", FusedModel, "__init__", with_("embedding", rolled), **plain),
        Mutation("head", FusedModel, "__init__", with_("head", head), **plain),
        Mutation("rows off by one", FusedModel, "batch", batch(rows=one_less), **plain),
        Mutation("places off by one", FusedModel, "batch", batch(learned=one_less), **plain),
        Mutation("targets off by one", FusedModel, "batch", batch(targets=rolled), **plain),
        Mutation("positions backwards", FusedModel, "batch", batch(cos=flipped, sin=flipped), **plain),
        Mutation("k and v swapped", Group, "__init__", modules(keys_values), **plain),
        Mutation("gate and up swapped", Group, "__init__", modules(gate_up), **plain),
        Mutation(
            "A not copied",
            decode.Linear,
            "__init__",
            with_("a", lambda a: a if a is None else 0 * a),
            **packed,
        ),
        Mutation("B not scaled", decode.Linear, "__init__", after(unscaled), **packed),
        Mutation("k and v swapped", decode.Linear, "__init__", modules(keys_values), **dense),
        Mutation("gate and up swapped", decode.Linear, "__init__", modules(gate_up), **dense),
        Mutation("first norm's weight", decode.Engine, "__init__", of_first_layer("norm_1"), **dense),
        Mutation("second norm's weight", decode.Engine, "__init__", of_first_layer("norm_2"), **dense),
        Mutation("last norm's weight", decode.Engine, "__init__", with_("norm", torch.ones_like), **dense),
        Mutation("embedding", decode.Engine, "__init__", with_("embedding", rolled), **dense),
        Mutation("head", decode.Engine, "__init__", with_("head", rolled), **dense),
        Mutation(
            "a step's position", decode.Engine, "load", after(lambda engine: engine.state[1].add_(1)), **dense
        ),
        Mutation(
            "a step's place", decode.Engine, "load", after(lambda engine: engine.state[2].sub_(1)), **dense
        ),
        Mutation("merged without adapters", None, "", None, scoring="merged without"),
        Mutation("merged unscaled", None, "", None, scoring="merged unscaled"),
    ]


def of_host() -> list[Mutation]:
    """Layer inputs that wait in the host's memory."""
    another = lambda original: lambda self, number, saved: original(self, max(number, 1) - 1, saved)
    return [Mutation("another layer's input", OnHost, "get", another, training="host")]


class Cases:
    """What is broken in turn, and beside it what the checks hold it to."""

    def __init__(self):
        dtype, device = (torch.bfloat16, "cuda") if CUDA else (torch.float32, "cpu")
        self.dtype = dtype
        sizes, lengths, shared = LARGE, ((200, 180), (90, 80), (110, 101)), 70
        memory.SHARED_CHUNK, self.apart = (64, 16) if CUDA else (2, 3)
        if not CUDA:  # the interpreter is slow
            sizes, lengths, shared = TINY, ((8, 6), (6, 5)), 4
            packing.SHARED_LEAST = 4
            interpret_quickly()
        base = llama(device, dtype, **sizes)
        self.examples = make_examples(lengths, sizes["vocab_size"], shared)
        self.tuned = {name: with_adapters(base, 4, p) for name, p in (("plain", 0.0), ("dropout", 0.3))}
        if not CUDA:
            base = llama(
                device,
                dtype,
                **sizes | {"hidden_size": nf4.PERMUTED_COLUMNS, "intermediate_size": nf4.PERMUTED_COLUMNS},
            )
        self.scored = with_adapters(base, 4, 0.0).train()
        for name, parameter in self.scored.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)  # as `model.load_adapter` has them
        prompts = [example.ids for example in self.examples]
        # A single row or place shows in bfloat16 only where a token sees few.
        few = [example.ids for example in make_examples(((9, 1), (6, 1), (7, 1)), sizes["vocab_size"], 4)]
        self.witnesses = {
            "few": self_check.witnesses(self.scored, few),
            "many": self_check.witnesses(self.scored, prompts),
        }
        self.merged = merge(copy.deepcopy(self.scored))

    def train(self, name: str) -> dict[str, float]:
        model = self.tuned["dropout" if name == "dropout" else "plain"]
        fused = FusedModel(model, Plan(600, "all" if name == "plain" else "input", name == "host"))
        groups = self_check.groups_of(self.examples, 600, "answer")
        return self_check.training_errors(model, fused, groups, "answer")

    def score(self, name: str) -> dict[str, float]:
        model = {"4 bits": self.scored}.get(name, self.merged)
        if name.startswith("merged"):
            model = copy.deepcopy(self.scored)
            for module in model.modules():
                if hasattr(module, "lora_A"):
                    module.scaling["default"] = 0.0 if name.endswith("without") else 1.0
            model = merge(model)
        cache.APART = self.apart if name == "apart" else 10_000
        return self_check.scoring_errors(model, self.witnesses["few" if name == "dense" else "many"])

    def said(self, check: Callable[[str], dict], name: str) -> tuple[str | None, float]:
        """What a check says, and its largest error as a share of what is tolerated."""
        errors, tolerated = check(name), self_check.TOLERANCES[self.dtype]
        shares = torch.tensor([error / tolerated[what] for what, error in errors.items()])
        return self_check.too_large(errors, self.dtype), shares.max().item()


def interpret_quickly() -> None:
    """Triton's interpreter without what it does over and over: it puts the language's stand-ins in place at
    every call, and seeks overflows that it would name in debug mode alone."""
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def patch_once(kernel) -> SimpleNamespace:
        if kernel.__module__ not in patched:
            patch(kernel)
            patched.add(kernel.__module__)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_once
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    remember_unpacked()


def remember_unpacked() -> None:
    """Unpack the same weights once: that is most of the interpreter's time."""
    unpack, known = nf4.PackedWeights.unpack, {}

    def remembered(self, out) -> None:
        if isinstance(nf4.unpack_nf4_kernel, Broken):
            return unpack(self, out)
        parts = (self.packed, self.scales, self.outer, self.offsets, self.scale_code, self.code)
        key = out.shape, out.dtype, *(bytes(part.view(torch.uint8).numpy()) for part in parts)
        if key not in known:
            unpack(self, out)
            known[key] = out.clone()
        return out.copy_(known[key])

    nf4.PackedWeights.unpack = remembered


def measure() -> list[dict]:
    """A row for what is broken and each check that has to do with it."""
    cases, rows = Cases(), []

    def row(name: str, training: str | None, scoring: str | None) -> None:
        found = {"broken": name, "training": None, "scoring": None}
        for check, run, case in (("training", cases.train, training), ("scoring", cases.score, scoring)):
            if case:
                reason, share = cases.said(run, case)
                found[check] = {"case": case, "said": reason, "share of tolerance": share}
        rows.append(found)

    for case in ("plain", "dropout", "host")[: 3 if CUDA else 2]:
        row(UNBROKEN, case, None)
    for case in ("4 bits", "dense", "apart"):
        row(UNBROKEN, None, case)
    for mutation in of_kernels() + of_copies() + (of_host() if CUDA else []):
        with mutation.applied() if mutation.owner else contextlib.nullcontext():
            row(mutation.name, mutation.training, mutation.scoring)
    return rows


def unnoticed(rows: list[dict]) -> list[str]:
    """What a check said wrongly, a no to what is whole or a yes to what is broken."""
    return [
        f"{row['broken']} ({check}, {row[check]['case']})"
        for row in rows
        for check in ("training", "scoring")
        if row[check] and (row[check]["said"] is None) != (row["broken"] == UNBROKEN)
    ]


def show(rows: list[dict]) -> str:
    def cell(found: dict | None) -> str:
        if not found:
            return "—"
        return f"{found['said'] or 'yes'} ({found['case']}, {found['share of tolerance']:.2g})"

    lines = [[row["broken"], cell(row["training"]), cell(row["scoring"])] for row in rows]
    return tabulate(lines, ("broken", "training's check", "scoring's check"), tablefmt="github")


def main() -> int:
    args = arguments(__doc__)
    rows = measure()
    wrong, result = unnoticed(rows), provenance() | {"mutations": rows}
    print(f"{headline(result)}\n\n{show(rows)}\n")
    print(f"said wrongly: {', '.join(wrong) or 'nothing'}")
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
