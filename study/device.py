"""The machine: its name, its memory, the dtype that it computes in, and which of several processes this is.

Its name is the driver's, so that estimates, which do without torch, know it as runs do. What is asked of the
GPU's memory and abilities needs torch.
"""

import atexit
import ctypes
import gc
import os
import platform
import resource
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from study.errors import UserError

GIB = 2**30
KERNELS = 2**28  # bytes for the code of kernels, which CUDA loads at their first use
CONTEXT = 2**29  # bytes that CUDA takes for each process before its first tensor

# PyTorch's blocks grow in place, so that passes of unlike sizes leave no gaps between them: with gaps, a
# training of 7B ran out of 8 GiB (benchmarks/README.md, "Small cards"). PyTorch reads this when CUDA starts.
if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def name() -> str:
    """Of this process's GPU, "0.25 of NVIDIA H200" where others share it, or of the processor where there is
    none or torch was built for none."""
    torch = sys.modules.get("torch")
    if torch:
        gpu = torch.cuda.get_device_name(current()) if torch.cuda.is_available() else None
    else:
        gpu = gpu_name()
    share = gpu_share()
    return processor() if gpu is None else gpu if share == 1 else f"{share:g} of {gpu}"


def gpu_share() -> float:
    """What of its GPU, of the memory and of the price, is this process's, so that others can use it at the
    same time: GPU_SHARE, or all. Raises UserError."""
    word = os.environ.get("GPU_SHARE") or "1"
    try:
        share = float(word)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(f"GPU_SHARE={word}: it takes a share of a GPU, above 0 and at most 1")
    return share


def gpu_name() -> str | None:
    """Name of this process's GPU, by CUDA's driver as torch has it, CUDA_VISIBLE_DEVICES heeded; None where
    none is in sight."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    handle, found = ctypes.c_int(), ctypes.create_string_buffer(256)
    calls = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDeviceGet(ctypes.byref(handle), local_rank()),
        lambda: driver.cuDeviceGetName(found, len(found), handle),
    )
    return None if any(call() for call in calls) else found.value.decode()  # each returns 0 if it went well


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU, {os.cpu_count()} cores ({names[0] if names else platform.machine()})"


def local_rank() -> int:
    """Which of this machine's processes this is, of several that were launched together."""
    return int(os.environ.get("LOCAL_RANK") or 0) if launched() > 1 else 0


def launched() -> int:
    """How many processes run this script together (`accelerate launch`)."""
    return int(os.environ.get("WORLD_SIZE") or 1)


@dataclass(frozen=True)
class Process:
    """This process: its script, when that began, how many processes, each with its GPU, compute together, and
    whether of these it is the one that speaks and writes. A RANK that stands alone is none of a distributed
    launch. One that looks up many runs while none of them goes on keeps in `kept` what it has read."""

    script: str
    main: bool = field(default_factory=lambda: launched() <= 1 or int(os.environ.get("RANK") or 0) == 0)
    started: float = field(default_factory=time.time)  # for stamps: this clock may be set back or forward
    began: float = field(default_factory=time.monotonic)
    count: int = field(default_factory=lambda: max(1, launched()))
    kept: dict | None = field(default=None, compare=False)

    def seconds(self) -> float:
        """Since the script began: imports and loading count, since the machine is paid for them."""
        return time.monotonic() - self.began

    def from_here(self) -> "Process":
        """The same process for a part of a run that begins now; another has paid for what came before."""
        return replace(self, began=time.monotonic())


def current():
    """The torch.device that this process computes on."""
    import torch

    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype():
    """bfloat16, or float32 on GPUs before Ampere, which lack it. Never float16: it overflows on Llama-2."""
    import torch

    old_gpu = torch.cuda.is_available() and torch.cuda.get_device_capability(current()) < (8, 0)
    return torch.float32 if old_gpu else torch.bfloat16


def peak_memory_gib() -> float:
    """Peak memory so far: allocated on the GPU, or without one, or without torch, the resident set of the
    process."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(current()) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def pass_over_libraries() -> None:
    """Let the garbage collector look no more through what there is by now: of the libraries that takes a
    quarter of a second each time, in which nothing else runs."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or some of them tell at the end of what was never freed


def attend_without_plans() -> None:
    """Leave out cuDNN's attention, which plans anew for every shape of a batch: these are many where batches
    have the lengths of their texts."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def free_memory() -> int:
    """Bytes of the GPU that this process can still fill with tensors: what is free, without the gaps between
    its tensors and what CUDA will take for kernels."""
    import torch

    torch.cuda.empty_cache()
    return max(0, free_bytes() - KERNELS)


def free_bytes() -> int:
    """Of the GPU's memory, and of this process's share of it."""
    import torch

    share, (free, total) = gpu_share(), torch.cuda.mem_get_info(current())
    if share == 1:
        return free
    return max(0, min(free, int(share * total) - CONTEXT - torch.cuda.memory_reserved(current())))
