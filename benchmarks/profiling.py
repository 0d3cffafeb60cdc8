"""Where the time of GPU work goes, by kind of kernel.

Kernels are told apart by their names. Of matrix products these tell the tile only, so small tiles and split
sums count as the adapters' and large tiles as the frozen weights', the head among them. That holds for small
ranks: at rank 64 some of the adapters' products take large tiles, too. Where there are no adapters, or where
the rows are so few that every tile is small, as in decoding, all products count as the frozen weights'.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable

KINDS = (  # the first pattern that is found in a kernel's name gives its kind
    (r"attention|flash|fmha|t5_(dq|dkv)", "attention"),
    (r"swiglu", "SwiGLU"),
    (r"gated_", "gated GELU"),
    (r"rms_norm|add_norm", "RMSNorm"),
    (r"rotate", "rotary positions"),
    (r"unpack_nf4|Dequantize", "unpacking NF4"),
    (r"dropout|dropped", "dropout"),
    (r"multi_tensor_apply", "optimizer and refresh"),
    (r"Memcpy (HtoD|DtoH)", "host copies"),
    (r"add_adapter|splitK", "adapters' products"),
    (r"nvjet_sm\d+_[a-z]+_(\d+x)?(\d|[1-5]\d|6[0-3])(x\d+)?_", "adapters' products"),  # a side below 64
    (r"nvjet|gemm|gemv|cutlass|multiply_nf4|add_up", "products with the frozen weights"),
    (r"", "head, loss and rest"),
)


def kind_of(kernel: str, adapters: bool = True) -> str:
    kind = next(kind for pattern, kind in KINDS if re.search(pattern, kernel))
    return "products with the frozen weights" if kind == "adapters' products" and not adapters else kind


def kinds(run: Callable[[], None], adapters: bool = True) -> list[tuple[str, float, int]]:
    """Profile `run` once: milliseconds and launches of each kind, the longest first, "idle" last. Without
    `adapters` no product counts as theirs.

    Idle is what `run` takes, from an empty queue and with the profiler at work, less all kernels.
    """
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
    kernels = [
        (event.key, event.self_device_time_total / 1000, event.count)
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return by_kind(kernels, begin.elapsed_time(end), adapters)


def by_kind(
    kernels: Iterable[tuple[str, float, int]], wall: float, adapters: bool = True
) -> list[tuple[str, float, int]]:
    """Sum (name, milliseconds, launches) over the kernels of each kind, and what is left of `wall`
    milliseconds."""
    sums = defaultdict(lambda: (0.0, 0))
    for name, milliseconds, launches in kernels:
        kind = kind_of(name, adapters)
        before, count = sums[kind]
        sums[kind] = before + milliseconds, count + launches
    rows = sorted(((kind, *both) for kind, both in sums.items()), key=lambda row: -row[1])
    return [*rows, ("idle", max(0.0, wall - sum(row[1] for row in rows)), 0)]


def show_kinds(rows: Iterable[tuple[str, float, int]]) -> str:
    """The rows of `kinds` as a table, with each kind's share of the whole."""
    from tabulate import tabulate

    rows = list(rows)
    whole = sum(milliseconds for _, milliseconds, _ in rows)
    lines = [
        (
            kind,
            f"{milliseconds:.1f}",
            f"{100 * milliseconds / whole:.1f} %",
            f"{launches:,}" if launches else "",
        )
        for kind, milliseconds, launches in rows
    ]
    titles = ("where the time goes", "ms", "share", "launches")
    return tabulate(
        lines, titles, tablefmt="github", disable_numparse=True, colalign=("left", *["right"] * 3)
    )
