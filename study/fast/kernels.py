"""Triton kernels for what a decoder layer does beside its matrix products and attention.

Matrices are row-major with a row stride of their own, so that an adapter's columns can lie beside them; sums
are float32. With TRITON_INTERPRET=1 the kernels run on the CPU.
"""

import numpy as np
import torch
import triton
import triton.language as tl

EXACT = tl.constexpr("ieee")  # float32 products in float32; bfloat16 ones are exact anyway


def power_of_2(number: int) -> int:
    """The least power of 2 that is no smaller."""
    return triton.next_power_of_2(number)


SWIGLU_TILES = {  # measured best on an H200: rows, columns, warps, splits of the rows
    "plain": (32, 64, 4, 24),
    "dropout": (32, 64, 8, 16),
}


def rank_tile(rank: int) -> int:
    """Columns of a rank that a kernel takes at once."""
    return min(64, max(16, power_of_2(rank)))


def to_device(array: np.ndarray, device) -> torch.Tensor:
    """Without waiting for the device: from pageable memory a copy would wait until it has caught up."""
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


# Dropout: a mask is never stored but drawn again, from a seed and the element's number: `numbers` [rows] says
# which row of the step each row of a pass is, so that its mask is the same in whatever pass it is computed.


@triton.jit
def dropout_mask(seed, number, column, width, probability):
    """1 / (1 - p) for the elements of rows [.., width] with these numbers that dropout keeps, and 0 for the
    others."""
    number = (number.to(tl.int64) * width + column).to(tl.uint32) ^ seed.to(tl.uint32)
    number = (number ^ (number >> 16)) * 0x7FEB352D  # the integer mixer lowbias32 (C. Wellons, 2018)
    number = (number ^ (number >> 15)) * 0x846CA68B
    number = number ^ (number >> 16)
    uniform = (number >> 8).to(tl.float32) * (1.0 / 16777216.0)
    return tl.where(uniform >= probability, 1.0 / (1.0 - probability), 0.0)


@triton.jit(do_not_specialize=["seed"])
def dropout_kernel(
    x, out, numbers, x_stride, out_stride, seed, probability, width: tl.constexpr, tile: tl.constexpr
):
    """A tile of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = column < width
    value = tl.load(x + row * x_stride + column, inside, 0.0).to(tl.float32)
    value *= dropout_mask(seed, tl.load(numbers + row), column, width, probability)
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), inside)


def dropout(x: torch.Tensor, out: torch.Tensor, numbers: torch.Tensor, seed: int, probability: float) -> None:
    """out = x [rows, width] after dropout."""
    tile = min(2048, power_of_2(x.shape[1]))
    dropout_kernel[(x.shape[0], triton.cdiv(x.shape[1], tile))](
        x, out, numbers, x.stride(0), out.stride(0), seed, probability, x.shape[1], tile
    )


@triton.jit(do_not_specialize=["rows", "seed"])
def add_adapter_kernel(
    dx,
    dh,
    a,
    numbers,
    dx_stride,
    dh_stride,
    rows,
    seed,
    probability,
    width: tl.constexpr,
    rank: tl.constexpr,
    tile_rank: tl.constexpr,
    tile_rows: tl.constexpr,
    tile: tl.constexpr,
):
    """A tile of rows and columns of dx."""
    row = (tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * tile + tl.arange(0, tile))[None, :]
    inside = (row < rows) & (column < width)
    adapter = tl.zeros([tile_rows, tile], tl.float32)  # dh @ a
    for first in range(0, rank, tile_rank):
        part = first + tl.arange(0, tile_rank)
        # [tile_rows, tile_rank] @ [tile_rank, tile]
        left = tl.load(dh + row * dh_stride + part[None, :], (row < rows) & (part[None, :] < rank), 0.0)
        right = tl.load(a + part[:, None] * width + column, (part[:, None] < rank) & (column < width), 0.0)
        adapter = tl.dot(left, right, adapter, input_precision=EXACT)
    adapter *= dropout_mask(seed, tl.load(numbers + row, row < rows, 0), column, width, probability)
    value = tl.load(dx + row * dx_stride + column, inside, 0.0).to(tl.float32) + adapter
    tl.store(dx + row * dx_stride + column, value.to(dx.dtype.element_ty), inside)


def add_adapter(
    dx: torch.Tensor, dh: torch.Tensor, a: torch.Tensor, numbers: torch.Tensor, seed: int, probability: float
) -> None:
    """dx [rows, width] += dropout's mask * (dh [rows, rank] @ a [rank, width])."""
    rows, width = dx.shape
    tile_rows, tile, rank = 64, 128, a.shape[0]
    add_adapter_kernel[(triton.cdiv(rows, tile_rows), triton.cdiv(width, tile))](
        *(dx, dh, a, numbers, dx.stride(0), dh.stride(0), rows, seed, probability),
        *(width, rank, rank_tile(rank), tile_rows, tile),
    )


@triton.jit
def permuted_column(column, permuted: tl.constexpr):
    """Where to write a column: where it is or, if `permuted`, where `nf4.PackedWeights.multiply` wants it."""
    if permuted:
        own = column % 128  # as [4, 8, 2, 2], which becomes [8, 2, 4, 2]
        column += own // 4 % 8 * 16 + own // 2 % 2 * 8 + own // 32 * 2 + own % 2 - own
    return column


# RMSNorm (Zhang and Sennrich, 2019)


@triton.jit(do_not_specialize=["seed"])
def rms_norm_kernel(
    x,
    delta,
    weight,
    total,
    out,
    dropped,
    numbers,
    inverse,
    x_stride,
    delta_stride,
    out_stride,
    epsilon,
    seed,
    probability,
    width: tl.constexpr,
    tile: tl.constexpr,
    add: tl.constexpr,
    drop: tl.constexpr,
    permuted: tl.constexpr,
):
    """One row. With `add` x + delta is rounded into `total` first, as a layer of its own would leave it."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, tile)
    inside = column < width
    value = tl.load(x + row * x_stride + column, inside, 0.0).to(tl.float32)
    if add:
        value += tl.load(delta + row * delta_stride + column, inside, 0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * width + column, rounded, inside)
        value = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + epsilon)  # one number for the row
    tl.store(inverse + row, scale)
    value = value * scale * tl.load(weight + column, inside, 0.0).to(tl.float32)
    rounded = value.to(out.dtype.element_ty)
    tl.store(out + row * out_stride + permuted_column(column, permuted), rounded, inside)
    if drop:
        value = rounded.to(tl.float32) * dropout_mask(
            seed, tl.load(numbers + row), column, width, probability
        )
        tl.store(dropped + row * width + column, value.to(dropped.dtype.element_ty), inside)


def rms_norm(
    x,
    weight,
    epsilon: float,
    out,
    delta=None,
    dropped=None,
    numbers=None,
    seed: int = 0,
    probability: float = 0.0,
    permuted=False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm of x [rows, width], or of x + delta, into `out`, its columns as `permuted_column` has them, and
    what dropout leaves of it into `dropped`, if given. Returns that sum and the inverse root mean squares
    [rows]."""
    rows, width = x.shape
    inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
    total = x if delta is None else torch.empty(rows, width, dtype=x.dtype, device=x.device)
    drops = (out, inverse) if dropped is None else (dropped, numbers)
    rms_norm_kernel[(rows,)](
        *(x, x if delta is None else delta, weight, total, out, *drops, inverse),
        *(x.stride(0), 0 if delta is None else delta.stride(0), out.stride(0), epsilon, seed, probability),
        *(width, power_of_2(width), delta is not None, dropped is not None, permuted),
        num_warps=4 if width <= 4096 else 8,
    )
    return total, inverse


@triton.jit
def rms_norm_backward_kernel(
    dy, x, weight, inverse, dx, dy_stride, x_stride, dx_stride, width: tl.constexpr, tile: tl.constexpr
):
    """One row: dx += s * (dy * w - x * s^2 * mean(dy * w * x)), where s is its inverse root mean square."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, tile)
    inside = column < width
    value = tl.load(x + row * x_stride + column, inside, 0.0).to(tl.float32)
    slope = tl.load(dy + row * dy_stride + column, inside, 0.0).to(tl.float32)
    slope *= tl.load(weight + column, inside, 0.0).to(tl.float32)  # [width], dy * weight
    scale = tl.load(inverse + row)
    value *= tl.sum(slope * value, 0) / width * scale * scale
    result = tl.load(dx + row * dx_stride + column, inside, 0.0).to(tl.float32) + scale * (slope - value)
    tl.store(dx + row * dx_stride + column, result.to(dx.dtype.element_ty), inside)


def rms_norm_backward(dy, x, weight, inverse, dx) -> None:
    """dx [rows, width] += the gradient of the norm's input x, from that of its output."""
    rows, width = x.shape
    rms_norm_backward_kernel[(rows,)](
        *(dy, x, weight, inverse, dx, dy.stride(0), x.stride(0), dx.stride(0), width, power_of_2(width)),
        num_warps=4 if width <= 4096 else 8,
    )


# Rotary positions (Su et al., 2021), a head's halves as pairs, as transformers has them


@triton.jit
def rotate_kernel(x, cos, sin, stride, heads: tl.constexpr, padded: tl.constexpr, half: tl.constexpr):
    """All heads of one row."""
    row = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, padded)[:, None], tl.arange(0, half)[None, :]
    inside = head < heads
    c, s = tl.load(cos + row * half + column), tl.load(sin + row * half + column)
    place = x + row * stride + head * 2 * half + column
    first = tl.load(place, inside, 0.0).to(tl.float32)  # [padded heads, half]
    second = tl.load(place + half, inside, 0.0).to(tl.float32)
    tl.store(place, (first * c - second * s).to(x.dtype.element_ty), inside)
    tl.store(place + half, (second * c + first * s).to(x.dtype.element_ty), inside)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int) -> None:
    """Turn the first `heads` heads of x [rows, ...] in place; cos and sin [rows, size / 2]."""
    rotate_kernel[(x.shape[0],)](x, cos, sin, x.stride(0), heads, power_of_2(heads), cos.shape[1])


# SwiGLU (Shazeer, 2020)


@triton.jit(do_not_specialize=["seed"])
def swiglu_kernel(
    gate_up,
    out,
    dropped,
    numbers,
    stride,
    out_stride,
    seed,
    probability,
    width: tl.constexpr,
    tile: tl.constexpr,
    drop: tl.constexpr,
    permuted: tl.constexpr,
):
    """A tile of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = column < width
    gate = tl.load(gate_up + row * stride + column, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + column, inside, 0.0).to(tl.float32)
    rounded = (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + permuted_column(column, permuted), rounded, inside)
    if drop:
        value = rounded.to(tl.float32) * dropout_mask(
            seed, tl.load(numbers + row), column, width, probability
        )
        tl.store(dropped + row * width + column, value.to(dropped.dtype.element_ty), inside)


def swiglu(
    gate_up: torch.Tensor,
    out: torch.Tensor,
    dropped=None,
    numbers=None,
    seed: int = 0,
    probability: float = 0.0,
    permuted=False,
) -> None:
    """out [rows, width] = silu(gate) * up, which lie side by side in the columns of gate_up, its columns as
    `permuted_column` has them, and what dropout leaves of it into `dropped`, if given."""
    rows, width = out.shape
    tile = min(2048, power_of_2(width))
    drops = (out, out) if dropped is None else (dropped, numbers)
    swiglu_kernel[(rows, triton.cdiv(width, tile))](
        *(gate_up, out, *drops, gate_up.stride(0), out.stride(0), seed, probability),
        *(width, tile, dropped is not None, permuted),
    )


@triton.jit(do_not_specialize=["rows", "split", "seed"])
def swiglu_backward_kernel(
    gate_up,
    dp,
    dh,
    a,
    h,
    numbers,
    sum_a,
    sum_b,
    stride,
    dp_stride,
    dh_stride,
    h_stride,
    rows,
    split,
    seed,
    probability,
    width: tl.constexpr,
    rank: tl.constexpr,
    padded: tl.constexpr,
    tile_rows: tl.constexpr,
    tile: tl.constexpr,
    drop: tl.constexpr,
):
    """A tile of columns of gate and of up, for a split of the rows; the caller adds the splits' sums up."""
    column = tl.program_id(0) * tile + tl.arange(0, tile)[None, :]  # [1, tile] of the width
    part = tl.arange(0, padded)[None, :]  # [1, padded] of the rank
    in_width = column < width
    # [padded, tile], A of the down projection
    right = tl.load(a + tl.trans(part) * width + column, (tl.trans(part) < rank) & in_width, 0.0)
    da = tl.zeros([padded, tile], tl.float32)
    db_gate = tl.zeros([tile, padded], tl.float32)
    db_up = tl.zeros([tile, padded], tl.float32)
    for first in range(0, split, tile_rows):
        row = (tl.program_id(1) * split + first + tl.arange(0, tile_rows)).to(tl.int64)[:, None]
        inside = (row < rows) & in_width
        in_rank = (row < rows) & (part < rank)
        gate = tl.load(gate_up + row * stride + column, inside, 0.0).to(tl.float32)
        up = tl.load(gate_up + row * stride + width + column, inside, 0.0).to(tl.float32)
        slope = tl.load(dp + row * dp_stride + column, inside, 0.0).to(tl.float32)  # [tile_rows, tile]
        small = tl.load(dh + row * dh_stride + part, in_rank, 0.0)  # [tile_rows, padded]
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        product = silu * up
        if drop:
            number = tl.load(numbers + row, row < rows, 0)  # [tile_rows, 1]
            mask = dropout_mask(seed, number, column, width, probability)
            slope += tl.dot(small, right, input_precision=EXACT) * mask
            product *= mask
        # [padded, tile_rows] @ [tile_rows, tile]
        da = tl.dot(tl.trans(small), product.to(small.dtype), da, input_precision=EXACT)
        d_gate = (slope * up * (sigmoid + silu * (1.0 - sigmoid))).to(gate_up.dtype.element_ty)
        d_up = (slope * silu).to(gate_up.dtype.element_ty)
        tl.store(gate_up + row * stride + column, d_gate, inside)
        tl.store(gate_up + row * stride + width + column, d_up, inside)
        h_gate = tl.load(h + row * h_stride + part, in_rank, 0.0)
        h_up = tl.load(h + row * h_stride + rank + part, in_rank, 0.0)
        # [tile, tile_rows] @ [tile_rows, padded]
        db_gate = tl.dot(tl.trans(d_gate), h_gate, db_gate, input_precision=EXACT)
        db_up = tl.dot(tl.trans(d_up), h_up, db_up, input_precision=EXACT)
    part_a = sum_a + tl.program_id(1).to(tl.int64) * rank * width
    tl.store(part_a + tl.trans(part) * width + column, da, (tl.trans(part) < rank) & in_width)
    part_b = sum_b + tl.program_id(1).to(tl.int64) * 2 * width * rank + tl.trans(column) * rank + part
    tl.store(part_b, db_gate, tl.trans(in_width) & (part < rank))
    tl.store(part_b + width * rank, db_up, tl.trans(in_width) & (part < rank))


def swiglu_backward(gate_up, dp, dh, a, h, numbers, seed: int, probability: float):
    """Backward of p = swiglu(gate_up), the down projection's input; gate_up [rows, 2 width] becomes its own
    gradient.

    `dp` [rows, width] is the gradient of p, which with dropout still lacks the adapter's share, mask *
    (dh @ a). `dh` [rows, rank] and `a` [rank, width] are of the down projection's adapter, `h` [rows, 2 rank]
    is x A^T of gate and up. Returns the adapters' gradients that come from the same reading: dh^T p
    [rank, width] and, for gate and up one below the other, dgate^T h [2 width, rank].
    """
    rows, width, rank = dp.shape[0], a.shape[1], a.shape[0]
    tile_rows, tile, warps, most = SWIGLU_TILES["dropout" if probability else "plain"]
    splits = max(1, min(most, rows // 512))  # few rows do not pay for sums of their own
    split = triton.cdiv(triton.cdiv(rows, splits), tile_rows) * tile_rows
    splits = triton.cdiv(rows, split)
    sum_a = torch.empty(splits, rank, width, dtype=torch.float32, device=dp.device)
    sum_b = torch.empty(splits, 2 * width, rank, dtype=torch.float32, device=dp.device)
    swiglu_backward_kernel[(triton.cdiv(width, tile), splits)](
        *(gate_up, dp, dh, a, h, numbers, sum_a, sum_b),
        *(gate_up.stride(0), dp.stride(0), dh.stride(0), h.stride(0)),
        *(rows, split, seed, probability, width, rank, max(16, power_of_2(rank)), tile_rows, tile),
        probability > 0,
        num_warps=warps,
    )
    return sum_a.sum(0), sum_b.sum(0)  # [rank, width], [2 width, rank]
