"""A frozen model in 4 bits too large for one GPU: its layers shared out among the processes of a run by
PyTorch's FSDP2 (fully_shard), where accelerate's launcher asks for that.

Each process holds its part of every layer. A layer's parts come together for as long as it computes, forward
and again backward, so all processes compute as many passes. What the layers do not have (embedding, head,
adapters) each process has whole: adapters, their gradients, the optimizer and checkpoints are those of a run
that is not sharded.
"""

import contextlib
import os
import re
from collections.abc import Iterator

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.integrations.bitsandbytes import Bnb4bitQuantize

from study import device, processes
from study.errors import UserError

ASKED = "ACCELERATE_USE_FSDP"  # by a config file of `accelerate launch`
FORGOTTEN = ("compress_statistics", "quant_type", "quant_state")  # by a parameter in parts; others ask for it


def asked() -> bool:
    """Whether the launcher asks for it, of several processes. Raises UserError where it asks for FSDP 1."""
    if device.launched() == 1 or os.environ.get(ASKED, "").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION") != "2":
        raise UserError("--config_file of the launcher: FSDP 1 can't share out 4 bits: set fsdp_version: 2")
    return True


def refuse(what: str) -> None:
    """Raise UserError if `what`, which needs the whole model, is asked for with shared layers."""
    if asked():
        raise UserError(
            f"{what} needs the whole model, in 4 bits, on one GPU: launch it without FSDP (--config_file)"
        )


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Let accelerate not see that FSDP is asked for: the model is in parts by then."""
    before = os.environ.pop(ASKED, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[ASKED] = before


@contextlib.contextmanager
def computing() -> Iterator[None]:
    """Raise UserError where another process has ended, whose parts a layer waits for."""
    try:
        yield
    except RuntimeError as error:
        if not asked() or not re.search("gloo|NCCL", str(error)):
            raise
        with processes.heard():
            raise


@contextlib.contextmanager
def loading() -> Iterator[torch.device]:
    """The device that a checkpoint is loaded to: this process's own, or the host, if it will be shared out;
    then, too, the GPU puts it in 4 bits, weight by weight."""
    if not asked():
        yield device.current()
        return
    convert = Bnb4bitQuantize.convert

    def on_the_gpu(self, weights: dict, *args, **options) -> dict:
        moved = {
            name: [value.to(device.current()) for value in (values if isinstance(values, list) else [values])]
            for name, values in weights.items()
        }
        return {name: weight.cpu() for name, weight in convert(self, moved, *args, **options).items()}

    Bnb4bitQuantize.convert = on_the_gpu
    try:
        with hidden():
            yield torch.device("cpu")
    finally:
        Bnb4bitQuantize.convert = convert


def share_out(model) -> None:
    """Give each process its part of every layer of a frozen `model` on the host, and all of the rest, on its
    device. One layer after the other is there whole."""
    where, base, kinds = device.current(), model.base_model, model._no_split_modules or ()
    mesh = init_device_mesh(where.type, (processes.count(),))
    layers = [module for module in base.modules() if type(module).__name__ in kinds]
    if not layers:
        raise UserError(f"FSDP knows no layers of {type(model).__name__}: launch it without --config_file")
    packed = [module for layer in layers for module in layer.modules() if isinstance(module, Linear4bit)]
    known = [{name: getattr(linear.weight, name) for name in FORGOTTEN} for linear in packed]
    whole = {}  # sums of each weight
    for layer in layers:
        for linear in set(packed) & {*layer.modules()}:
            linear.weight = as_float32(linear.weight.to(where))
            linear.support_avx512bf16_for_cpu = False  # it would repack what it is lent
            whole[linear] = sums(linear.weight)
        fully_shard(layer.to(where), mesh=mesh, reshard_after_forward=True)
    in_parts = {id(parameter) for layer in layers for parameter in layer.parameters()}
    model.to(where)
    fully_shard(base, mesh=mesh, ignored_params={p for p in base.parameters() if id(p) not in in_parts})
    for linear, facts in zip(packed, known, strict=True):
        vars(linear.weight).update(facts)
    model.hf_device_map = {"": where}
    prove_whole(base, whole)


def as_float32(weight: Params4bit) -> Params4bit:
    """The same bytes [n, 1] as float32 [n / 4, 1], bnb_4bit_quant_storage: a parameter in parts can't be of
    integers. Not as bfloat16: FSDP's copies on a GPU take its numbers through float32, and of what is no
    number, a thousandth of them, all bits become the same (bitsandbytes' issue 1945). No loss shows it."""
    weight.data = weight.data.view(-1).view(torch.float32).view(-1, 1)
    weight.quant_storage = torch.float32
    return weight


def sums(weight: torch.Tensor) -> torch.Tensor:
    """Of the bits of each eighth of a weight [n, 1], as integers [8]."""
    parts = weight.detach().view(-1).view(torch.int32).tensor_split(8)
    return torch.stack([part.sum(dtype=torch.int64) for part in parts])


def prove_whole(base, whole: dict[Linear4bit, torch.Tensor]) -> None:
    """Raise UserError where the parts of a weight do not come together as what they were before, by its sums,
    in a forward pass of one token. It may pass through some experts alone, but not through nothing."""
    found = {}

    def look(linear: Linear4bit, _) -> None:
        found[linear] = sums(linear.weight)

    hooks = [linear.register_forward_pre_hook(look) for linear in whole]
    with torch.no_grad():
        base(torch.zeros(1, 1, dtype=torch.long, device=device.current()), use_cache=False)
    for hook in hooks:
        hook.remove()
    why, other = None, sum(not torch.equal(now, whole[linear]) for linear, now in found.items())
    if other:
        changed = f"FSDP changes {other} of {len(found)} weights in 4 bits"
        why = f"{changed}: train with another torch, or without FSDP"
    elif whole and not found:
        why = f"a token passes through none of {len(whole)} weights in 4 bits: launch it without FSDP"
    if why := processes.first_reason(why):
        raise UserError(why)
