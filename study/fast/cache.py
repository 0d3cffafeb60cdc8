"""The cache of keys and values that decoding reads, and the Triton kernels that fill and read it.

A layer's keys and values [rows, key heads * size] hold a row for each token. The first `shared` rows are what
all prompts begin with; an example's own rows lie together, from its first row on. With TRITON_INTERPRET=1 the
kernels run on the CPU.
"""

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from study.fast.attention import LOG2_E, absorb
from study.fast.kernels import permuted_column, power_of_2, to_device

APART = 256  # shared rows from which on they are read once for many queries, apart; chosen on an H200
CACHE_TILES = {  # queries, keys, warps, stages; chosen on an H200
    "prompts": (64, 32, 4, 3),
    "tokens": (16, 64, 4, 3),
    "shared": (64, 64, 4, 3),
}


# The tensors of single numbers are rows of larger ones, so where they begin says nothing.
@triton.jit(do_not_specialize_on_alignment=["positions", "places"])
def rotate_and_store_kernel(
    qkv,
    positions,
    cos,
    sin,
    places,
    keys,
    values,
    stride,
    heads: tl.constexpr,
    key_heads: tl.constexpr,
    padded: tl.constexpr,
    half: tl.constexpr,
):
    """All heads of one row."""
    row = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, padded)[:, None], tl.arange(0, half)[None, :]
    angle = tl.load(positions + row) * half + column
    c, s = tl.load(cos + angle), tl.load(sin + angle)
    at = qkv + row * stride + head * 2 * half + column
    inside = head < heads + 2 * key_heads
    first = tl.load(at, inside, 0.0).to(tl.float32)  # [padded heads, half]
    second = tl.load(at + half, inside, 0.0).to(tl.float32)
    turned_1 = (first * c - second * s).to(keys.dtype.element_ty)
    turned_2 = (second * c + first * s).to(keys.dtype.element_ty)
    tl.store(at, turned_1, head < heads)
    tl.store(at + half, turned_2, head < heads)
    to = tl.load(places + row) * (key_heads * 2 * half) + (head - heads) * 2 * half + column
    is_key = (head >= heads) & (head < heads + key_heads)
    tl.store(keys + to, turned_1, is_key)
    tl.store(keys + to + half, turned_2, is_key)
    to -= key_heads * 2 * half
    is_value = inside & (head >= heads + key_heads)
    tl.store(values + to, first.to(values.dtype.element_ty), is_value)
    tl.store(values + to + half, second.to(values.dtype.element_ty), is_value)


@triton.jit
def absorb_rows(
    query,
    last,
    keys,
    values,
    column,
    start,
    begin,
    end,
    log2_scale,
    width: tl.constexpr,
    tile_k: tl.constexpr,
    largest,
    weight,
    total,
):
    """The cache's rows `start` + `begin` to `start` + `end`; a query sees those up to `start` + `last`
    [queries]. largest, weight and total are `absorb`'s."""
    for first in range(begin, end, tile_k):
        other = first + tl.arange(0, tile_k)
        at = (start + other).to(tl.int64)[:, None] * width + column  # [tile_k, size]
        key = tl.load(keys + at, (other < end)[:, None], 0.0)
        value = tl.load(values + at, (other < end)[:, None], 0.0)
        seen = last[:, None] >= other[None, :]
        largest, weight, total = absorb(query, key, value, seen, log2_scale, largest, weight, total)
    return largest, weight, total


@triton.jit
def add_parts(part, part_weight, place, width, wanted, splits, count, largest, weight, total):
    """What `prefix_attention_kernel` has found for the queries numbered `place` [queries], as more tiles of
    keys."""
    column = tl.arange(0, width)[None, :]
    for split in range(splits):
        at = split * count + place
        other = tl.load(part_weight + at, wanted, -1e30)
        output = tl.load(part + at[:, None] * width + column, wanted[:, None], 0.0)
        larger = tl.maximum(largest, other)
        fade, share = tl.exp2(largest - larger), tl.exp2(other - larger)
        weight = weight * fade + share
        total = total * fade[:, None] + output * share[:, None]
        largest = larger
    return largest, weight, total


@triton.jit(
    do_not_specialize=["rows", "shared", "splits"], do_not_specialize_on_alignment=["starts", "lengths"]
)
def cached_attention_kernel(
    qkv,
    keys,
    values,
    out,
    work,
    starts,
    lengths,
    part,
    part_weight,
    stride,
    out_stride,
    rows,
    shared,
    splits,
    log2_scale,
    heads: tl.constexpr,
    key_heads: tl.constexpr,
    size: tl.constexpr,
    tile_q: tl.constexpr,
    tile_k: tl.constexpr,
    reading: tl.constexpr,
    permuted: tl.constexpr,
):
    """The shared rows of the cache and an example's own, for a tile of queries.

    `reading` prompts, these are one head of a tile of rows; a work item is (first row of the prompt, its
    length, first row of the tile within it, first row of its keys in the cache). Otherwise they are those
    heads of one row that share a key head, and the keys are `lengths` rows of the cache from `starts` on.
    """
    column = tl.arange(0, size)[None, :]
    if reading:
        item = work + tl.program_id(0) * 4
        start, length, offset = tl.load(item).to(tl.int64), tl.load(item + 1), tl.load(item + 2)
        own = tl.load(item + 3).to(tl.int64)
        head = tl.program_id(1)
        last = offset + tl.arange(0, tile_q)  # [tile_q], the own key that a query sees last: itself
        wanted = last < length
        row = (start + last)[:, None]
        place = (start + last) * heads + head  # [tile_q], of each query's row and head
        key_head, end = head // (heads // key_heads), tl.minimum(offset + tile_q, length)
    else:
        row, key_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        own, length = tl.load(starts + row), tl.load(lengths + row)
        group: tl.constexpr = heads // key_heads
        within = tl.arange(0, tile_q)
        place = row * heads + (key_head * group + within)
        head, wanted = (key_head * group + within)[:, None], within < group
        last, end = tl.full([tile_q], length - 1, tl.int64), length
    query = tl.load(qkv + row * stride + head * size + column, wanted[:, None], 0.0)  # [tile_q, size]
    column += key_head * size
    width: tl.constexpr = key_heads * size
    largest = tl.full([tile_q], -1e30, tl.float32)
    weight = tl.zeros([tile_q], tl.float32)
    total = tl.zeros([tile_q, size], tl.float32)
    last_shared = tl.full([tile_q], shared - 1, tl.int32)
    largest, weight, total = absorb_rows(
        *(query, last_shared, keys, values, column, 0, 0, shared, log2_scale, width, tile_k),
        *(largest, weight, total),
    )
    largest, weight, total = absorb_rows(
        *(query, last, keys, values, column, own, 0, end, log2_scale, width, tile_k, largest, weight, total)
    )
    largest, weight, total = add_parts(
        part, part_weight, place, size, wanted, splits, rows * heads, largest, weight, total
    )
    result = (total / weight[:, None]).to(out.dtype.element_ty)
    to = permuted_column(head * size + tl.arange(0, size)[None, :], permuted)
    tl.store(out + row * out_stride + to, result, wanted[:, None])


@triton.jit(do_not_specialize=["rows", "shared"])
def prefix_attention_kernel(
    qkv,
    keys,
    values,
    part,
    part_weight,
    stride,
    rows,
    shared,
    chunk,
    log2_scale,
    heads: tl.constexpr,
    key_heads: tl.constexpr,
    size: tl.constexpr,
    tile_q: tl.constexpr,
    tile_k: tl.constexpr,
):
    """A tile of queries, whichever examples they are of, over a chunk of the shared rows."""
    group: tl.constexpr = heads // key_heads
    key_head, split = tl.program_id(1), tl.program_id(2)
    number = tl.program_id(0) * tile_q + tl.arange(0, tile_q)  # [tile_q], of rows and heads of the group
    row, head = (number // group).to(tl.int64), key_head * group + number % group
    wanted = row < rows
    column = tl.arange(0, size)[None, :]
    query = tl.load(qkv + row[:, None] * stride + head[:, None] * size + column, wanted[:, None], 0.0)
    width: tl.constexpr = key_heads * size
    largest = tl.full([tile_q], -1e30, tl.float32)
    weight = tl.zeros([tile_q], tl.float32)
    total = tl.zeros([tile_q, size], tl.float32)
    begin, end = split * chunk, tl.minimum(shared, (split + 1) * chunk)
    last_shared = tl.full([tile_q], shared - 1, tl.int32)
    column += key_head * size
    largest, weight, total = absorb_rows(
        *(query, last_shared, keys, values, column, 0, begin, end, log2_scale, width, tile_k),
        *(largest, weight, total),
    )
    column -= key_head * size
    place = (split * rows + row) * heads + head
    tl.store(part + place[:, None] * size + column, total / weight[:, None], wanted[:, None])
    tl.store(part_weight + place, largest + tl.log2(weight), wanted)


@dataclass
class Cache:
    """Keys and values of all layers, and how attention reads them. `shared` is set once those rows are
    filled."""

    keys: torch.Tensor  # [layers, rows, key heads * size]
    values: torch.Tensor
    heads: int
    key_heads: int
    size: int
    shared: int = 0

    def put(self, layer: int, qkv, positions, cos, sin, places) -> None:
        """Turn the queries in qkv [tokens, (heads + 2 key heads) size] by their positions, in place; keys,
        turned too, and values go to the rows `places` of the cache. cos and sin [positions, size / 2]."""
        rotate_and_store_kernel[(len(qkv),)](
            *(qkv, positions, cos, sin, places, self.keys[layer], self.values[layer], qkv.stride(0)),
            *(self.heads, self.key_heads, power_of_2(self.heads + 2 * self.key_heads), self.size // 2),
        )

    def attend_prompts(self, layer: int, qkv, permuted: bool, work: torch.Tensor) -> torch.Tensor:
        """Causal attention of prompts that lie end to end, behind the shared rows: [tokens, heads size], its
        columns as `permuted_column` has them."""
        return self.attend("prompts", (len(work), self.heads), layer, qkv, permuted, (work, work, work))

    def attend_tokens(self, layer: int, qkv, permuted: bool, starts, lengths) -> torch.Tensor:
        """Attention of one token of each example over its own rows, `lengths` from `starts` on."""
        grid = len(qkv), self.key_heads
        return self.attend("tokens", grid, layer, qkv, permuted, (qkv, starts, lengths))

    def attend(self, name: str, grid: tuple, layer: int, qkv, permuted: bool, which: tuple) -> torch.Tensor:
        """`which` are the kernel's work, starts and lengths: for what it doesn't read, any tensor that begins
        alike at each launch, since Triton compiles a kernel for each alignment."""
        out = qkv.new_empty(len(qkv), self.heads * self.size)
        apart = self.shared >= APART
        part, part_weight, splits = self.attend_shared(layer, qkv) if apart else (out, out, 0)
        tile_q, tile_k, warps, stages = CACHE_TILES[name]
        if name == "tokens":
            tile_q = max(tile_q, power_of_2(self.heads // self.key_heads))
        cached_attention_kernel[grid](
            *(qkv, self.keys[layer], self.values[layer], out, *which, part, part_weight),
            *(qkv.stride(0), out.stride(0), len(qkv), 0 if apart else self.shared, splits),
            *(self.size**-0.5 * LOG2_E.value, self.heads, self.key_heads, self.size, tile_q, tile_k),
            *(name == "prompts", permuted),
            num_warps=warps,
            num_stages=stages,
        )
        return out

    def attend_shared(self, layer: int, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Attention over the shared rows alone, in so many splits of them that the device is busy: outputs
        [splits, tokens, heads, size], log2 of their softmax denominators, splits."""
        rows, (tile_q, tile_k, warps, stages) = len(qkv), CACHE_TILES["shared"]
        group = self.heads // self.key_heads
        tile_q = min(tile_q, max(16, power_of_2(rows * group)))
        tiles = triton.cdiv(rows * group, tile_q)
        splits = min(triton.cdiv(self.shared, APART), triton.cdiv(256, tiles * self.key_heads))
        chunk = triton.cdiv(triton.cdiv(self.shared, splits), tile_k) * tile_k
        splits = triton.cdiv(self.shared, chunk)
        part = torch.empty(splits, rows, self.heads, self.size, dtype=torch.float32, device=qkv.device)
        part_weight = torch.empty(splits, rows, self.heads, dtype=torch.float32, device=qkv.device)
        prefix_attention_kernel[(tiles, self.key_heads, splits)](
            *(qkv, self.keys[layer], self.values[layer], part, part_weight, qkv.stride(0), rows),
            *(self.shared, chunk, self.size**-0.5 * LOG2_E.value, self.heads, self.key_heads, self.size),
            *(tile_q, tile_k),
            num_warps=warps,
            num_stages=stages,
        )
        return part, part_weight, splits


def prompts_work(lengths: list[int], places: list[int], device) -> torch.Tensor:
    """Work items of `cached_attention_kernel` for prompts end to end, the longest first."""
    tile, start, items = CACHE_TILES["prompts"][0], 0, []
    for length, place in zip(lengths, places, strict=True):
        items += [(start, length, offset, place) for offset in range(0, length, tile)]
        start += length
    items.sort(key=lambda item: -item[2])
    return to_device(np.array(items, dtype=np.int32), device)
