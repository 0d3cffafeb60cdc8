"""Several processes of one run, one for each GPU of a machine (`accelerate launch`): who computes what, and
what they tell each other.

Each has the whole model and takes a share of the examples, by tokens. In training they add up the gradients
of the adapters once a step; in scoring they put their answers together at the end. The first one alone speaks
and writes. A process that is alone gets back at once what it gives.
"""

import contextlib
import heapq
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from study import device
from study.errors import UserError, is_out_of_memory

PATIENCE = timedelta(hours=12)  # for one that is slow; of one that has ended the others hear at once


def join() -> None:
    """Meet the other processes of this launch, once. Raises UserError where there are fewer GPUs than
    processes, or where these are not alike."""
    count = device.launched()
    if count == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE") or count), torch.cuda.device_count()
        if gpus < here:
            raise UserError(f"{here} processes, and {gpus} GPUs in sight: launch with --num_processes {gpus}")
        torch.cuda.set_device(device.current())
    else:  # where accelerate would say cpu:0, to which no checkpoint can be loaded
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    meet("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    names = everyone(device.name())
    if len(set(names)) > 1:
        raise UserError(
            f"the GPUs are not alike ({', '.join(dict.fromkeys(names))}): choose some by CUDA_VISIBLE_DEVICES"
        )


def meet(backend: str) -> None:
    """Make the connections, and the memory that they take, now: what is free is asked for later."""
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
        dist.all_reduce(torch.zeros(1, device=device.current()))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the processes can't exchange anything by {backend} ({reason})") from error


def count() -> int:
    """How many processes compute together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def number() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Raise UserError where another process has ended in the middle of the block."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise UserError("another process of this run has ended: start it again and it goes on") from None


def everyone(value) -> list:
    """What each process has for `value`, in their order."""
    if count() == 1:
        return [value]
    found = [None] * count()
    with heard():
        dist.all_gather_object(found, value)
    return found


def first_reason(why: str | None) -> str | None:
    """The reason that a process has against something, or None if none has."""
    return next(filter(None, everyone(why)), None)


def share_out(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """The indices of `sizes` in so many parts, in their order, whose sums are nearly equal: each, from the
    largest on, goes to the part that has least (Graham, 1969)."""
    shares, heap = [[] for _ in range(parts)], [(0, part) for part in range(parts)]
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        total, part = heapq.heappop(heap)
        shares[part].append(i)
        heapq.heappush(heap, (total + sizes[i], part))
    return [sorted(share) for share in shares]


def mine(sizes: Sequence[int]) -> list[int]:
    """The indices of `sizes` that are this process's share."""
    return share_out(sizes, count())[number()]


def add_up(parameters: Sequence[torch.nn.Parameter], total: torch.Tensor) -> torch.Tensor:
    """Let the gradients of `parameters`, in float32, be the sums of those of all processes, in one exchange;
    a process without a share has none yet. Returns the sum of `total`."""
    if count() == 1:
        return total
    parts = [p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters]
    flat = torch.cat([*parts, total.view(1)])  # [numbers of all parameters + 1]
    with heard():
        dist.all_reduce(flat)
    *parts, total = flat.split([*(p.numel() for p in parameters), 1])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)
    return total[0].clone()  # a view would keep `flat` for as long as the step's loss is kept
