"""Causal attention of training, forward and backward, as Triton kernels.

FlashAttention 2 (Dao, 2023), within each of the sequences that lie end to end, with tiles for the short
sequences of fine-tuning. The first `shared` rows may be what all sequences begin with: they are a sequence of
their own, and every other sees them in front of it, as its places 0, 1, ... A work item is (first row of the
sequence, its length, first row of the tile within it, first query row within it that is wanted). With
TRITON_INTERPRET=1 the kernels run on the CPU. README.md has the equations.
"""

from itertools import accumulate

import numpy as np
import torch
import triton
import triton.language as tl

from study.fast import memory
from study.fast.kernels import EXACT, to_device

LOG2_E = tl.constexpr(1.4426950408889634)  # kernels compute 2^x, not e^x
ATTENTION_TILES = {  # measured best on an H200, posts of some 230 tokens
    "forward": (64, 32, 4, 3),  # queries, keys, warps, stages
    "dq": (64, 32, 4, 2),
    "dkv": (32, 64, 4, 2),
}


@triton.jit
def row_of(place, start, before):
    """The row of a place in a sequence that begins in the row `start` with `before` shared rows in front."""
    return tl.where(place < before, place, start - before + place)


@triton.jit
def absorb(query, key, value, seen, log2_scale, largest, weight, total):
    """One more tile of keys: the `largest` score so far [queries], and the sums of weights [queries] and of
    weighted values, `total` [queries, size], both relative to it."""
    score = tl.dot(query, tl.trans(key), input_precision=EXACT) * log2_scale  # [queries, keys]
    score = tl.where(seen, score, -1e30)
    larger = tl.maximum(largest, tl.max(score, 1))
    share = tl.exp2(score - larger[:, None])
    fade = tl.exp2(largest - larger)  # [queries]
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
    """A tile of queries of one head, over the keys of its sequence in turn."""
    item = work + tl.program_id(0) * 4
    start, length, offset = tl.load(item).to(tl.int64), tl.load(item + 1), tl.load(item + 2)
    before = tl.where(start == 0, 0, shared)
    head = tl.program_id(1)
    column = tl.arange(0, size)[None, :]
    place = before + offset + tl.arange(0, tile_q)
    row, wanted = row_of(place, start, before), place < before + length
    query = tl.load(
        qkv + row[:, None] * stride + head * size + column, wanted[:, None], 0.0
    )  # [tile_q, size]
    keys = qkv + heads * size + head // (heads // key_heads) * size
    largest = tl.full([tile_q], -1e30, tl.float32)
    weight = tl.zeros([tile_q], tl.float32)
    total = tl.zeros([tile_q, size], tl.float32)
    log2_scale = scale * LOG2_E
    end = tl.minimum(before + offset + tile_q, before + length)
    for first in range(0, end, tile_k):
        other = first + tl.arange(0, tile_k)
        at = keys + row_of(other, start, before)[:, None] * stride + column
        key = tl.load(at, (other < end)[:, None], 0.0)  # [tile_k, size]
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
    """Gradients of a tile of queries of one head, and D of the equations, which the other kernels take."""
    item = work + tl.program_id(0) * 4
    start, length, offset = tl.load(item).to(tl.int64), tl.load(item + 1), tl.load(item + 2)
    before = tl.where(start == 0, 0, shared)
    head = tl.program_id(1)
    column, wide = tl.arange(0, half)[None, :], tl.arange(0, 2 * half)[None, :]
    place = before + offset + tl.arange(0, tile_q)
    row, inside = row_of(place, start, before), place < before + length
    wanted = inside[:, None]
    at = qkv + row[:, None] * stride + head * 2 * half + column
    query_1, query_2 = tl.load(at, wanted, 0.0), tl.load(at + half, wanted, 0.0)  # both [tile_q, half]
    slope = tl.load(d_out + row[:, None] * d_out_stride + head * 2 * half + wide, wanted, 0.0)
    output = tl.load(out + row[:, None] * out_stride + head * 2 * half + wide, wanted, 0.0)
    inner = tl.sum(slope.to(tl.float32) * output.to(tl.float32), 1)  # [tile_q], D of the equations
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
        share = tl.exp2(score * (scale * LOG2_E) - log_weight[:, None])  # [tile_q, tile_k], P
        share = tl.where(place[:, None] >= other[None, :], share, 0.0)
        d_share = tl.dot(slope, tl.trans(value), input_precision=EXACT)
        d_score = (share * (d_share - inner[:, None])).to(key_1.dtype)  # [tile_q, tile_k], dS
        dq_1 = tl.dot(d_score, key_1, dq_1, input_precision=EXACT)
        dq_2 = tl.dot(d_score, key_2, dq_2, input_precision=EXACT)
    # Turned back by each row's position, and the scale of the scores.
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
    share = tl.exp2(score * (scale * LOG2_E) - log_weight[None, :])  # [tile_k, tile_q], P^T
    share = tl.where(seen, share, 0.0)
    dv = tl.dot(share.to(slope.dtype), slope, dv, input_precision=EXACT)
    d_share = tl.dot(value, tl.trans(slope), input_precision=EXACT)
    d_score = (share * (d_share - inner[None, :])).to(query_1.dtype)  # [tile_k, tile_q], dS^T
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
    # Keys are turned back, values were never turned.
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
            tile = ATTENTION_TILES[kernel][over_keys]
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
            *(self.size**-0.5, self.heads, self.key_heads, self.size, *ATTENTION_TILES["forward"][:2]),
            num_warps=ATTENTION_TILES["forward"][2],
            num_stages=ATTENTION_TILES["forward"][3],
        )
        return logsumexp

    def backward(self, d_out, qkv, out, logsumexp, cos, sin, dqkv) -> None:
        """Write to `dqkv` the gradient of the qkv that `rotate` was given, from that of `out`, which is 0 in
        rows that are not wanted."""
        rows, delta = out.shape[0], torch.zeros_like(logsumexp)  # [heads, rows], D of the equations
        shape, scale = (self.heads, self.key_heads, self.size // 2), self.size**-0.5
        attention_dq_kernel[(len(self.work["dq"]), self.heads)](
            *(qkv, d_out, out, logsumexp, delta, dqkv, cos, sin, self.work["dq"]),
            *(qkv.stride(0), d_out.stride(0), out.stride(0), dqkv.stride(0), rows, self.shared, scale),
            *(*shape, *ATTENTION_TILES["dq"][:2]),
            num_warps=ATTENTION_TILES["dq"][2],
            num_stages=ATTENTION_TILES["dq"][3],
        )
        part = self.shared_dkv(d_out, qkv, logsumexp, delta)
        attention_dkv_kernel[(len(self.work["dkv"]), self.key_heads)](
            *(qkv, d_out, logsumexp, delta, dqkv, cos, sin, self.work["dkv"], part),
            *(qkv.stride(0), d_out.stride(0), dqkv.stride(0), rows, self.shared, len(part), scale),
            *(*shape, *ATTENTION_TILES["dkv"][:2]),
            num_warps=ATTENTION_TILES["dkv"][2],
            num_stages=ATTENTION_TILES["dkv"][3],
        )

    def shared_chunks(self, rows: int) -> int:
        """Chunks of the rows behind the shared prefix, each with its own sum for the prefix's gradient."""
        return triton.cdiv(rows - self.shared, memory.SHARED_CHUNK) if self.shared else 0

    def shared_dkv(self, d_out, qkv, logsumexp, delta) -> torch.Tensor:
        """Gradients of the shared keys and values [chunks, shared, key heads, 2 size] from all other rows."""
        rows, (tile_q, tile_k, warps, stages) = delta.shape[1], ATTENTION_TILES["dkv"]
        chunks = self.shared_chunks(rows)
        part = delta.new_empty(chunks, self.shared, self.key_heads, 2 * self.size)
        if chunks:
            attention_shared_dkv_kernel[(triton.cdiv(self.shared, tile_k), self.key_heads, chunks)](
                *(qkv, d_out, logsumexp, delta, part, qkv.stride(0), d_out.stride(0), rows, self.shared),
                *(
                    memory.SHARED_CHUNK,
                    self.size**-0.5,
                    self.heads,
                    self.key_heads,
                    self.size // 2,
                    tile_q,
                    tile_k,
                ),
                num_warps=warps,
                num_stages=stages,
            )
        return part
