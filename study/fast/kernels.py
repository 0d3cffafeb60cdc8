"""Triton kernels for what a decoder layer does beside its matrix products, attention included.

Matrices are row-major with a row stride of their own, so that an adapter's columns can lie beside them; sums
are float32. With TRITON_INTERPRET=1 the kernels run on the CPU.
"""

from itertools import accumulate

import numpy as np
import torch
import triton
import triton.language as tl

EXACT = tl.constexpr("ieee")  # float32 products in float32; bfloat16 ones are exact anyway


def power_of_2(number: int) -> int:
    return triton.next_power_of_2(number)


SHARED_CHUNK = 1024  # query rows that a program goes through for the keys that all of them see
MOST_RANK = 128  # of an adapter: more do not fit the kernels that hold the whole rank
TILES = {  # measured best on an H200
    "swiglu": (32, 64, 4, 24),  # rows, columns, warps, splits of the rows
    "swiglu dropout": (32, 64, 8, 16),
    "forward": (64, 32, 4, 3),  # queries, keys, warps, stages
    "dq": (64, 32, 4, 2),
    "dkv": (32, 64, 4, 2),
}


def rank_tile(rank: int) -> int:
    """Columns of a rank that a kernel takes at once."""
    return min(64, max(16, power_of_2(rank)))


def to_device(array: np.ndarray, device) -> torch.Tensor:
    """Without waiting for the device: from pageable memory a copy would wait until it has caught up."""
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


# Dropout: a mask is never stored but drawn again, from a seed and the element's number.


@triton.jit
def keep(seed, row, column, width, probability):
    """1 / (1 - p) for the elements of x [rows, width] that dropout keeps, and 0 for the others."""
    number = (row * width + column).to(tl.uint32) ^ seed.to(tl.uint32)
    number = (number ^ (number >> 16)) * 0x7FEB352D  # the integer mixer lowbias32 (C. Wellons, 2018)
    number = (number ^ (number >> 15)) * 0x846CA68B
    number = number ^ (number >> 16)
    uniform = (number >> 8).to(tl.float32) * (1.0 / 16777216.0)
    return tl.where(uniform >= probability, 1.0 / (1.0 - probability), 0.0)


@triton.jit(do_not_specialize=["seed"])
def dropout_kernel(x, out, x_stride, out_stride, seed, probability, width: tl.constexpr, tile: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = column < width
    value = tl.load(x + row * x_stride + column, inside, 0.0).to(tl.float32)
    value *= keep(seed, row, column, width, probability)
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), inside)


def dropout(x: torch.Tensor, out: torch.Tensor, seed: int, probability: float) -> None:
    """out = x [rows, width] after dropout."""
    tile = min(2048, power_of_2(x.shape[1]))
    dropout_kernel[(x.shape[0], triton.cdiv(x.shape[1], tile))](
        x, out, x.stride(0), out.stride(0), seed, probability, x.shape[1], tile
    )


@triton.jit(do_not_specialize=["rows", "seed"])
def add_adapter_kernel(
    dx,
    dh,
    a,
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
    row = (tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * tile + tl.arange(0, tile))[None, :]
    inside = (row < rows) & (column < width)
    adapter = tl.zeros([tile_rows, tile], tl.float32)
    for first in range(0, rank, tile_rank):
        part = first + tl.arange(0, tile_rank)
        left = tl.load(dh + row * dh_stride + part[None, :], (row < rows) & (part[None, :] < rank), 0.0)
        right = tl.load(a + part[:, None] * width + column, (part[:, None] < rank) & (column < width), 0.0)
        adapter = tl.dot(left, right, adapter, input_precision=EXACT)
    adapter *= keep(seed, row, column, width, probability)
    value = tl.load(dx + row * dx_stride + column, inside, 0.0).to(tl.float32) + adapter
    tl.store(dx + row * dx_stride + column, value.to(dx.dtype.element_ty), inside)


def add_adapter(dx: torch.Tensor, dh: torch.Tensor, a: torch.Tensor, seed: int, probability: float) -> None:
    """dx [rows, width] += dropout's mask * (dh [rows, rank] @ a [rank, width])."""
    rows, width = dx.shape
    tile_rows, tile, rank = 64, 128, a.shape[0]
    add_adapter_kernel[(triton.cdiv(rows, tile_rows), triton.cdiv(width, tile))](
        *(dx, dh, a, dx.stride(0), dh.stride(0), rows, seed, probability),
        *(width, rank, rank_tile(rank), tile_rows, tile),
    )


@triton.jit
def place_of(column, mixed: tl.constexpr):
    """Where to write a column: where it is or, if `mixed`, where `nf4.PackedWeights.multiply` wants it."""
    if mixed:
        own = column % 128  # 4 x 8 x 2 x 2 become 8 x 2 x 4 x 2
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
    left,
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
    mixed: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, tile)
    inside = column < width
    value = tl.load(x + row * x_stride + column, inside, 0.0).to(tl.float32)
    if add:
        value += tl.load(delta + row * delta_stride + column, inside, 0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * width + column, rounded, inside)
        value = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + epsilon)
    tl.store(inverse + row, scale)
    value = value * scale * tl.load(weight + column, inside, 0.0).to(tl.float32)
    rounded = value.to(out.dtype.element_ty)
    tl.store(out + row * out_stride + place_of(column, mixed), rounded, inside)
    if drop:
        value = rounded.to(tl.float32) * keep(seed, row, column, width, probability)
        tl.store(left + row * width + column, value.to(left.dtype.element_ty), inside)


def rms_norm(
    x,
    weight,
    epsilon: float,
    out,
    delta=None,
    left=None,
    seed: int = 0,
    probability: float = 0.0,
    mixed=False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm of x [rows, width], or of x + delta, into `out`, its columns as `place_of` has them, and what
    dropout leaves of it into `left`, if given. Returns that sum and the inverse root mean squares [rows]."""
    rows, width = x.shape
    inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
    total = x if delta is None else torch.empty(rows, width, dtype=x.dtype, device=x.device)
    rms_norm_kernel[(rows,)](
        *(x, x if delta is None else delta, weight, total, out, out if left is None else left, inverse),
        *(x.stride(0), 0 if delta is None else delta.stride(0), out.stride(0), epsilon, seed, probability),
        *(width, power_of_2(width), delta is not None, left is not None, mixed),
        num_warps=4 if width <= 4096 else 8,
    )
    return total, inverse


@triton.jit
def rms_norm_backward_kernel(
    dy, x, weight, inverse, dx, dy_stride, x_stride, dx_stride, width: tl.constexpr, tile: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, tile)
    inside = column < width
    value = tl.load(x + row * x_stride + column, inside, 0.0).to(tl.float32)
    slope = tl.load(dy + row * dy_stride + column, inside, 0.0).to(tl.float32)
    slope *= tl.load(weight + column, inside, 0.0).to(tl.float32)
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
    row = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, padded)[:, None], tl.arange(0, half)[None, :]
    inside = head < heads
    c, s = tl.load(cos + row * half + column), tl.load(sin + row * half + column)
    place = x + row * stride + head * 2 * half + column
    first = tl.load(place, inside, 0.0).to(tl.float32)
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
    left,
    stride,
    out_stride,
    seed,
    probability,
    width: tl.constexpr,
    tile: tl.constexpr,
    drop: tl.constexpr,
    mixed: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = column < width
    gate = tl.load(gate_up + row * stride + column, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + column, inside, 0.0).to(tl.float32)
    rounded = (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + place_of(column, mixed), rounded, inside)
    if drop:
        value = rounded.to(tl.float32) * keep(seed, row, column, width, probability)
        tl.store(left + row * width + column, value.to(left.dtype.element_ty), inside)


def swiglu(
    gate_up: torch.Tensor, out: torch.Tensor, left=None, seed: int = 0, probability: float = 0.0, mixed=False
) -> None:
    """out [rows, width] = silu(gate) * up, which lie side by side in the columns of gate_up, its columns as
    `place_of` has them, and what dropout leaves of it into `left`, if given."""
    rows, width = out.shape
    tile = min(2048, power_of_2(width))
    swiglu_kernel[(rows, triton.cdiv(width, tile))](
        *(gate_up, out, out if left is None else left, gate_up.stride(0), out.stride(0), seed, probability),
        *(width, tile, left is not None, mixed),
    )


@triton.jit(do_not_specialize=["rows", "split", "seed"])
def swiglu_backward_kernel(
    gate_up,
    dp,
    dh,
    a,
    h,
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
    column = tl.program_id(0) * tile + tl.arange(0, tile)[None, :]
    part = tl.arange(0, padded)[None, :]
    in_width = column < width
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
        slope = tl.load(dp + row * dp_stride + column, inside, 0.0).to(tl.float32)
        small = tl.load(dh + row * dh_stride + part, in_rank, 0.0)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        product = silu * up
        if drop:
            mask = keep(seed, row, column, width, probability)
            slope += tl.dot(small, right, input_precision=EXACT) * mask
            product *= mask
        da = tl.dot(tl.trans(small), product.to(small.dtype), da, input_precision=EXACT)
        d_gate = (slope * up * (sigmoid + silu * (1.0 - sigmoid))).to(gate_up.dtype.element_ty)
        d_up = (slope * silu).to(gate_up.dtype.element_ty)
        tl.store(gate_up + row * stride + column, d_gate, inside)
        tl.store(gate_up + row * stride + width + column, d_up, inside)
        h_gate = tl.load(h + row * h_stride + part, in_rank, 0.0)
        h_up = tl.load(h + row * h_stride + rank + part, in_rank, 0.0)
        db_gate = tl.dot(tl.trans(d_gate), h_gate, db_gate, input_precision=EXACT)
        db_up = tl.dot(tl.trans(d_up), h_up, db_up, input_precision=EXACT)
    part_a = sum_a + tl.program_id(1).to(tl.int64) * rank * width
    tl.store(part_a + tl.trans(part) * width + column, da, (tl.trans(part) < rank) & in_width)
    part_b = sum_b + tl.program_id(1).to(tl.int64) * 2 * width * rank + tl.trans(column) * rank + part
    tl.store(part_b, db_gate, tl.trans(in_width) & (part < rank))
    tl.store(part_b + width * rank, db_up, tl.trans(in_width) & (part < rank))


def swiglu_backward(gate_up, dp, dh, a, h, seed: int, probability: float):
    """Backward of p = swiglu(gate_up), the down projection's input; gate_up [rows, 2 width] becomes its own
    gradient.

    `dp` [rows, width] is the gradient of p, which with dropout still lacks the adapter's share, mask *
    (dh @ a). `dh` [rows, rank] and `a` [rank, width] are of the down projection's adapter, `h` [rows, 2 rank]
    is x A^T of gate and up. Returns the adapters' gradients that come from the same reading: dh^T p
    [rank, width] and, for gate and up one below the other, dgate^T h [2 width, rank].
    """
    rows, width, rank = dp.shape[0], a.shape[1], a.shape[0]
    tile_rows, tile, warps, most = TILES["swiglu dropout" if probability else "swiglu"]
    splits = max(1, min(most, rows // 512))
    split = triton.cdiv(triton.cdiv(rows, splits), tile_rows) * tile_rows
    splits = triton.cdiv(rows, split)
    sum_a = torch.empty(splits, rank, width, dtype=torch.float32, device=dp.device)
    sum_b = torch.empty(splits, 2 * width, rank, dtype=torch.float32, device=dp.device)
    swiglu_backward_kernel[(triton.cdiv(width, tile), splits)](
        *(gate_up, dp, dh, a, h, sum_a, sum_b, gate_up.stride(0), dp.stride(0), dh.stride(0), h.stride(0)),
        *(rows, split, seed, probability, width, rank, max(16, power_of_2(rank)), tile_rows, tile),
        probability > 0,
        num_warps=warps,
    )
    return sum_a.sum(0), sum_b.sum(0)


# Causal attention within each of the sequences that lie end to end: FlashAttention 2 (Dao, 2023), with tiles
# for the short sequences of fine-tuning. The first `shared` rows may be what all sequences begin with: they
# are a sequence of their own, and every other sees them in front of it, as its places 0, 1, ... A work item
# is (first row of the sequence, its length, first row of the tile within it, first query row within it that
# is wanted).


@triton.jit
def row_of(place, start, before):
    """The row of a place in a sequence that begins in the row `start` with `before` shared rows in front."""
    return tl.where(place < before, place, start - before + place)


@triton.jit
def absorb(query, key, value, seen, log2_scale, largest, weight, total):
    """One more tile of keys: the largest score so far, and the sums of weights and of weighted values."""
    score = tl.dot(query, tl.trans(key), input_precision=EXACT) * log2_scale
    score = tl.where(seen, score, -1e30)
    larger = tl.maximum(largest, tl.max(score, 1))
    share = tl.exp2(score - larger[:, None])
    fade = tl.exp2(largest - larger)
    weight = weight * fade + tl.sum(share, 1)
    total = tl.dot(share.to(value.dtype), value, total * fade[:, None], input_precision=EXACT)
    return larger, weight, total


@triton.jit(do_not_specialize=["rows", "shared"])
def attention_kernel(
    qkv,
    out,
    logsumexp,
    work,
    stride,
    out_stride,
    rows,
    shared,
    scale,
    heads: tl.constexpr,
    key_heads: tl.constexpr,
    size: tl.constexpr,
    tile_q: tl.constexpr,
    tile_k: tl.constexpr,
):
    item = work + tl.program_id(0) * 4
    start, length, offset = tl.load(item).to(tl.int64), tl.load(item + 1), tl.load(item + 2)
    before = tl.where(start == 0, 0, shared)
    head = tl.program_id(1)
    column = tl.arange(0, size)[None, :]
    place = before + offset + tl.arange(0, tile_q)
    row, wanted = row_of(place, start, before), place < before + length
    query = tl.load(qkv + row[:, None] * stride + head * size + column, wanted[:, None], 0.0)
    keys = qkv + heads * size + head // (heads // key_heads) * size
    largest = tl.full([tile_q], -1e30, tl.float32)
    weight = tl.zeros([tile_q], tl.float32)
    total = tl.zeros([tile_q, size], tl.float32)
    log2_scale = scale * 1.4426950408889634
    end = tl.minimum(before + offset + tile_q, before + length)
    for first in range(0, end, tile_k):
        other = first + tl.arange(0, tile_k)
        at = keys + row_of(other, start, before)[:, None] * stride + column
        key = tl.load(at, (other < end)[:, None], 0.0)
        value = tl.load(at + key_heads * size, (other < end)[:, None], 0.0)
        seen = place[:, None] >= other[None, :]
        largest, weight, total = absorb(query, key, value, seen, log2_scale, largest, weight, total)
    result = (total / weight[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * out_stride + head * size + column, result, wanted[:, None])
    tl.store(logsumexp + head.to(tl.int64) * rows + row, largest + tl.log2(weight), wanted)


@triton.jit(do_not_specialize=["rows", "shared"])
def attention_dq_kernel(
    qkv,
    d_out,
    out,
    logsumexp,
    delta,
    dqkv,
    cos,
    sin,
    work,
    stride,
    d_out_stride,
    out_stride,
    dqkv_stride,
    rows,
    shared,
    scale,
    heads: tl.constexpr,
    key_heads: tl.constexpr,
    half: tl.constexpr,
    tile_q: tl.constexpr,
    tile_k: tl.constexpr,
):
    item = work + tl.program_id(0) * 4
    start, length, offset = tl.load(item).to(tl.int64), tl.load(item + 1), tl.load(item + 2)
    before = tl.where(start == 0, 0, shared)
    head = tl.program_id(1)
    column, wide = tl.arange(0, half)[None, :], tl.arange(0, 2 * half)[None, :]
    place = before + offset + tl.arange(0, tile_q)
    row, inside = row_of(place, start, before), place < before + length
    wanted = inside[:, None]
    at = qkv + row[:, None] * stride + head * 2 * half + column
    query_1, query_2 = tl.load(at, wanted, 0.0), tl.load(at + half, wanted, 0.0)
    slope = tl.load(d_out + row[:, None] * d_out_stride + head * 2 * half + wide, wanted, 0.0)
    output = tl.load(out + row[:, None] * out_stride + head * 2 * half + wide, wanted, 0.0)
    inner = tl.sum(slope.to(tl.float32) * output.to(tl.float32), 1)
    saved = head.to(tl.int64) * rows + row
    tl.store(delta + saved, inner, inside)
    log_weight = tl.load(logsumexp + saved, inside, 0.0)
    keys = qkv + heads * 2 * half + head // (heads // key_heads) * 2 * half
    dq_1 = tl.zeros([tile_q, half], tl.float32)
    dq_2 = tl.zeros([tile_q, half], tl.float32)
    end = tl.minimum(before + offset + tile_q, before + length)
    for first in range(0, end, tile_k):
        other = first + tl.arange(0, tile_k)
        in_reach = (other < end)[:, None]
        source = keys + row_of(other, start, before)[:, None] * stride
        key_1, key_2 = (
            tl.load(source + column, in_reach, 0.0),
            tl.load(source + half + column, in_reach, 0.0),
        )
        value = tl.load(source + key_heads * 2 * half + wide, in_reach, 0.0)
        score = tl.dot(query_1, tl.trans(key_1), input_precision=EXACT)
        score = tl.dot(query_2, tl.trans(key_2), score, input_precision=EXACT)
        share = tl.exp2(score * (scale * 1.4426950408889634) - log_weight[:, None])
        share = tl.where(place[:, None] >= other[None, :], share, 0.0)
        d_share = tl.dot(slope, tl.trans(value), input_precision=EXACT)
        d_score = (share * (d_share - inner[:, None])).to(key_1.dtype)
        dq_1 = tl.dot(d_score, key_1, dq_1, input_precision=EXACT)
        dq_2 = tl.dot(d_score, key_2, dq_2, input_precision=EXACT)
    c = tl.load(cos + row[:, None] * half + column, wanted, 0.0) * scale
    s = tl.load(sin + row[:, None] * half + column, wanted, 0.0) * scale
    at = dqkv + row[:, None] * dqkv_stride + head * 2 * half + column
    tl.store(at, (dq_1 * c + dq_2 * s).to(dqkv.dtype.element_ty), wanted)
    tl.store(at + half, (dq_2 * c - dq_1 * s).to(dqkv.dtype.element_ty), wanted)


@triton.jit
def add_queries(
    row,
    wanted,
    seen,
    key_1,
    key_2,
    value,
    qkv,
    d_out,
    logsumexp,
    delta,
    stride,
    d_out_stride,
    rows,
    head,
    scale,
    half: tl.constexpr,
    dk_1,
    dk_2,
    dv,
):
    """What a tile of query rows adds to the gradients of the keys and values that it has `seen`."""
    column, wide = tl.arange(0, half)[None, :], tl.arange(0, 2 * half)[None, :]
    source = qkv + row[:, None] * stride + head * 2 * half + column
    query_1, query_2 = tl.load(source, wanted[:, None], 0.0), tl.load(source + half, wanted[:, None], 0.0)
    source_out = d_out + row[:, None] * d_out_stride + head * 2 * half + wide
    slope = tl.load(source_out, wanted[:, None], 0.0)
    saved = head.to(tl.int64) * rows + row
    log_weight, inner = tl.load(logsumexp + saved, wanted, 0.0), tl.load(delta + saved, wanted, 0.0)
    score = tl.dot(key_1, tl.trans(query_1), input_precision=EXACT)
    score = tl.dot(key_2, tl.trans(query_2), score, input_precision=EXACT)
    share = tl.exp2(score * (scale * 1.4426950408889634) - log_weight[None, :])
    share = tl.where(seen, share, 0.0)
    dv = tl.dot(share.to(slope.dtype), slope, dv, input_precision=EXACT)
    d_share = tl.dot(value, tl.trans(slope), input_precision=EXACT)
    d_score = (share * (d_share - inner[None, :])).to(query_1.dtype)
    dk_1 = tl.dot(d_score, query_1, dk_1, input_precision=EXACT)
    dk_2 = tl.dot(d_score, query_2, dk_2, input_precision=EXACT)
    return dk_1, dk_2, dv


@triton.jit(do_not_specialize=["rows", "shared", "chunk"])
def attention_shared_dkv_kernel(
    qkv,
    d_out,
    logsumexp,
    delta,
    part,
    stride,
    d_out_stride,
    rows,
    shared,
    chunk,
    scale,
    heads: tl.constexpr,
    key_heads: tl.constexpr,
    half: tl.constexpr,
    tile_q: tl.constexpr,
    tile_k: tl.constexpr,
):
    """Gradients of the shared keys and values from a chunk of the queries behind them, which all see them:
    part [chunks, shared, key heads, 4 half]."""
    key_head, split = tl.program_id(1), tl.program_id(2)
    column, wide = tl.arange(0, half)[None, :], tl.arange(0, 2 * half)[None, :]
    place = (tl.program_id(0) * tile_k + tl.arange(0, tile_k)).to(tl.int64)
    inside = (place < shared)[:, None]
    at = qkv + place[:, None] * stride + (heads + key_head) * 2 * half
    key_1, key_2 = tl.load(at + column, inside, 0.0), tl.load(at + half + column, inside, 0.0)
    value = tl.load(at + key_heads * 2 * half + wide, inside, 0.0)
    dk_1 = tl.zeros([tile_k, half], tl.float32)
    dk_2 = tl.zeros([tile_k, half], tl.float32)
    dv = tl.zeros([tile_k, 2 * half], tl.float32)
    end = tl.minimum(rows, shared + (split + 1) * chunk)
    for sharer in range(heads // key_heads):
        head = key_head * (heads // key_heads) + sharer
        for first in range(shared + split * chunk, end, tile_q):
            row = (first + tl.arange(0, tile_q)).to(tl.int64)
            wanted = row < end
            dk_1, dk_2, dv = add_queries(
                *(row, wanted, wanted[None, :], key_1, key_2, value, qkv, d_out, logsumexp, delta, stride),
                *(d_out_stride, rows, head, scale, half, dk_1, dk_2, dv),
            )
    at = part + (((split * shared + place) * key_heads + key_head) * 4 * half)[:, None]
    tl.store(at + column, dk_1, inside)
    tl.store(at + half + column, dk_2, inside)
    tl.store(at + 2 * half + wide, dv, inside)


@triton.jit(do_not_specialize=["rows", "shared", "chunks"])
def attention_dkv_kernel(
    qkv,
    d_out,
    logsumexp,
    delta,
    dqkv,
    cos,
    sin,
    work,
    part,
    stride,
    d_out_stride,
    dqkv_stride,
    rows,
    shared,
    chunks,
    scale,
    heads: tl.constexpr,
    key_heads: tl.constexpr,
    half: tl.constexpr,
    tile_q: tl.constexpr,
    tile_k: tl.constexpr,
):
    """Gradients of a sequence's own keys and values; the shared rows take those in `part` along."""
    item = work + tl.program_id(0) * 4
    start, length, offset = tl.load(item).to(tl.int64), tl.load(item + 1), tl.load(item + 2)
    first_query = tl.load(item + 3)
    key_head = tl.program_id(1)
    column, wide = tl.arange(0, half)[None, :], tl.arange(0, 2 * half)[None, :]
    place = offset + tl.arange(0, tile_k)
    row, inside = (start + place)[:, None], (place < length)[:, None]
    at = qkv + row * stride + (heads + key_head) * 2 * half
    key_1, key_2 = tl.load(at + column, inside, 0.0), tl.load(at + half + column, inside, 0.0)
    value = tl.load(at + key_heads * 2 * half + wide, inside, 0.0)
    dk_1 = tl.zeros([tile_k, half], tl.float32)
    dk_2 = tl.zeros([tile_k, half], tl.float32)
    dv = tl.zeros([tile_k, 2 * half], tl.float32)
    for chunk in range(tl.where(start == 0, chunks, 0)):
        found = part + (((chunk * shared + place).to(tl.int64) * key_heads + key_head) * 4 * half)[:, None]
        dk_1 += tl.load(found + column, inside, 0.0)
        dk_2 += tl.load(found + half + column, inside, 0.0)
        dv += tl.load(found + 2 * half + wide, inside, 0.0)
    for sharer in range(heads // key_heads):
        head = key_head * (heads // key_heads) + sharer
        for first in range(tl.maximum(offset, first_query) // tile_q * tile_q, length, tile_q):
            other = first + tl.arange(0, tile_q)
            wanted = (other < length) & (other >= first_query)
            seen = (place[:, None] <= other[None, :]) & wanted[None, :]
            dk_1, dk_2, dv = add_queries(
                *(start + other, wanted, seen, key_1, key_2, value, qkv, d_out, logsumexp, delta, stride),
                *(d_out_stride, rows, head, scale, half, dk_1, dk_2, dv),
            )
    c = tl.load(cos + row * half + column, inside, 0.0) * scale
    s = tl.load(sin + row * half + column, inside, 0.0) * scale
    at = dqkv + row * dqkv_stride + (heads + key_head) * 2 * half
    tl.store(at + column, (dk_1 * c + dk_2 * s).to(dqkv.dtype.element_ty), inside)
    tl.store(at + half + column, (dk_2 * c - dk_1 * s).to(dqkv.dtype.element_ty), inside)
    tl.store(at + key_heads * 2 * half + wide, dv.to(dqkv.dtype.element_ty), inside)


class Attention:
    """Causal attention of packed sequences, for each from the first query row on that is wanted. If `shared`,
    the first of them, of that length, is what all others begin with."""

    def __init__(
        self,
        lengths: list[int],
        first_queries: list[int],
        heads: int,
        key_heads: int,
        size: int,
        device,
        shared: int = 0,
    ):
        self.heads, self.key_heads, self.size, self.shared = heads, key_heads, size, shared
        starts = [0, *accumulate(lengths)]
        sequences = list(zip(starts, lengths, first_queries, strict=False))

        def work(kernel: str, over_keys: bool) -> torch.Tensor:
            tile = TILES[kernel][over_keys]
            items = [
                (start, length, place, first)
                for start, length, first in sequences
                for place in range(0 if over_keys else first // tile * tile, length, tile)
            ]
            # The longest work first: keys are seen by the queries after them, queries see the keys before.
            items.sort(key=lambda item: max(item[2], item[3]) - item[1] if over_keys else -item[2])
            return to_device(np.array(items, dtype=np.int32), device)

        self.work = {"forward": work("forward", False), "dq": work("dq", False), "dkv": work("dkv", True)}

    def forward(self, qkv: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """qkv [rows, (heads + 2 key heads) size] -> out [rows, heads size]. Returns log2 of the softmax's
        denominators [heads, rows], endless for rows that are not wanted."""
        rows = out.shape[0]
        logsumexp = torch.full((self.heads, rows), 1e30, dtype=torch.float32, device=out.device)
        attention_kernel[(len(self.work["forward"]), self.heads)](
            *(qkv, out, logsumexp, self.work["forward"], qkv.stride(0), out.stride(0), rows, self.shared),
            *(self.size**-0.5, self.heads, self.key_heads, self.size, *TILES["forward"][:2]),
            num_warps=TILES["forward"][2],
            num_stages=TILES["forward"][3],
        )
        return logsumexp

    def backward(self, d_out, qkv, out, logsumexp, cos, sin, dqkv) -> None:
        """Write to `dqkv` the gradient of the qkv that `rotate` was given, from that of `out`, which is 0 in
        rows that are not wanted."""
        rows, delta = out.shape[0], torch.zeros_like(logsumexp)
        shape, scale = (self.heads, self.key_heads, self.size // 2), self.size**-0.5
        attention_dq_kernel[(len(self.work["dq"]), self.heads)](
            *(qkv, d_out, out, logsumexp, delta, dqkv, cos, sin, self.work["dq"]),
            *(qkv.stride(0), d_out.stride(0), out.stride(0), dqkv.stride(0), rows, self.shared, scale),
            *(*shape, *TILES["dq"][:2]),
            num_warps=TILES["dq"][2],
            num_stages=TILES["dq"][3],
        )
        part = self.shared_dkv(d_out, qkv, logsumexp, delta)
        attention_dkv_kernel[(len(self.work["dkv"]), self.key_heads)](
            *(qkv, d_out, logsumexp, delta, dqkv, cos, sin, self.work["dkv"], part),
            *(qkv.stride(0), d_out.stride(0), dqkv.stride(0), rows, self.shared, len(part), scale),
            *(*shape, *TILES["dkv"][:2]),
            num_warps=TILES["dkv"][2],
            num_stages=TILES["dkv"][3],
        )

    def shared_chunks(self, rows: int) -> int:
        return triton.cdiv(rows - self.shared, SHARED_CHUNK) if self.shared else 0

    def shared_dkv(self, d_out, qkv, logsumexp, delta) -> torch.Tensor:
        """Gradients of the shared keys and values [chunks, shared, key heads, 2 size] from all other rows."""
        rows, (tile_q, tile_k, warps, stages) = delta.shape[1], TILES["dkv"]
        chunks = self.shared_chunks(rows)
        part = delta.new_empty(chunks, self.shared, self.key_heads, 2 * self.size)
        if chunks:
            attention_shared_dkv_kernel[(triton.cdiv(self.shared, tile_k), self.key_heads, chunks)](
                *(qkv, d_out, logsumexp, delta, part, qkv.stride(0), d_out.stride(0), rows, self.shared),
                *(SHARED_CHUNK, self.size**-0.5, self.heads, self.key_heads, self.size // 2, tile_q, tile_k),
                num_warps=warps,
                num_stages=stages,
            )
        return part
