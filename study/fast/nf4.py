"""Frozen weights in 4 bits, as bitsandbytes has them (NF4, double quantized), on the GPU: unpacked for
products with many rows, multiplied as they are with few.

A byte holds two weights, the first in its high half, as indices into a code of 16 values. 64 weights share a
scale, itself a byte into a code of 256 values, times a factor that 256 scales share, plus an offset. With
TRITON_INTERPRET=1 the kernels run on the CPU.
"""

from itertools import accumulate

import torch
import triton
import triton.language as tl

from study.fast.decoder import NF4_BLOCK
from study.fast.kernels import EXACT, power_of_2, rank_tile

PERMUTED_COLUMNS = 128  # columns that lie in an order of their own where weights are multiplied from 4 bits
FEW_ROWS = 64  # up to which that is faster than to unpack; chosen for Llama-2-7B on H100 and H200
WARPS, STAGES, PROGRAMS = 4, 3, 256  # of that product, timed on an H100: so many programs keep it busy


@triton.jit
def scales_of(place, row, inside, scales, scale_code, outer, offsets, starts, second, third):
    """The scales of the blocks numbered `place`, of its shape. They lie in rows of weights whose second and
    third begin at those rows."""
    weight = (row >= second).to(tl.int32) + (row >= third).to(tl.int32)
    first_block, first_outer = tl.load(starts + 2 * weight), tl.load(starts + 2 * weight + 1)
    scale = tl.load(scale_code + tl.load(scales + place, inside, 0).to(tl.int32))
    scale = scale * tl.load(outer + first_outer + (place - first_block) // 256, inside, 0.0)
    return scale + tl.load(offsets + weight)


@triton.jit
def indices_of(words):
    """The indices into the code that `words` [..., n] of four bytes hold, in order, [..., n, 2, 2, 2]."""
    halves = tl.join(words, words >> 16)
    bytes = tl.join(halves, halves >> 8)
    return tl.join(bytes >> 4, bytes) & 15


@triton.jit
def unpack_nf4_kernel(
    packed,
    scales,
    scale_code,
    outer,
    offsets,
    starts,
    code,
    second,
    third,
    out,
    stride,
    blocks: tl.constexpr,
    tile: tl.constexpr,
):
    """Some blocks of one row."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = block < blocks
    place = row * blocks + block
    scale = scales_of(place, row, inside, scales, scale_code, outer, offsets, starts, second, third)
    words = tl.load(packed + place[:, None] * 8 + tl.arange(0, 8)[None, :], inside[:, None], 0)  # [tile, 8]
    table = tl.load(code + tl.arange(0, 16))
    weight = tl.gather(table, tl.reshape(indices_of(words), [tile * 64]), 0)
    weight = tl.reshape(weight, [tile, 64]) * scale[:, None]
    columns = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + row * stride + columns, weight.to(out.dtype.element_ty), inside[:, None])


@triton.jit(do_not_specialize=["rows", "chunk"])
def multiply_nf4_kernel(
    packed,
    scales,
    scale_code,
    outer,
    offsets,
    starts,
    code,
    second,
    third,
    x,
    a,
    part,
    stride,
    rows,
    size,
    chunk,
    rank: tl.constexpr,
    blocks: tl.constexpr,
    tile_x: tl.constexpr,
    warps: tl.constexpr,
):
    """Some outputs for all rows of x, from a chunk of the blocks of each weight's row; behind the tiles of
    outputs those of x a^T.

    A product may sum in any order, and its outputs may come in any. Both are chosen so that each thread
    multiplies the very bytes that it loads, 16 in a row of 64: of 16 weights that a tensor core takes at
    once, thread t of 4 holds numbers 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. x comes in that order: the first
    bytes of all threads, their second, and so on.
    """
    tile: tl.constexpr = 16 * warps
    split, tiles = tl.program_id(1), tl.cdiv(size, tile)
    first_output, number = tl.program_id(0) * tile, tl.arange(0, tile_x)
    output = (first_output + tl.arange(0, tile)).to(tl.int64)
    begin, end = split * chunk, tl.minimum(blocks, (split + 1) * chunk)
    x += tl.minimum(number, rows - 1).to(tl.int64)[:, None] * stride
    total = tl.zeros([tile, tile_x], tl.float32)
    if first_output < size:
        row = tl.minimum(output, size - 1)[:, None]
        table = tl.load(code + tl.arange(0, 16))
        for first in range(begin, end, 2):
            place = row * blocks + first + tl.arange(0, 2)[None, :]
            scale = scales_of(place, row, True, scales, scale_code, outer, offsets, starts, second, third)
            words = tl.load(packed + (row * blocks + first) * 8 + tl.arange(0, 16)[None, :])
            # words [tile, 16] hold [tile, 128] weights, two blocks of each of the rows
            weight = tl.gather(table, tl.reshape(indices_of(words), [tile * 128]), 0)
            weight = tl.reshape(weight, [tile, 2, 64]) * scale[:, :, None]
            # A row is 4 threads x 8 pairs of bytes x 2 weights. A warp's second eight rows lie half a tile
            # further.
            weight = tl.reshape(weight.to(x.dtype.element_ty), [2, warps, 8, 4, 8, 2, 2])
            weight = tl.reshape(tl.permute(weight, (1, 0, 2, 4, 5, 3, 6)), [tile, 128])
            value = tl.load(x + first * 64 + tl.arange(0, 128)[None, :])  # [tile_x, 128]
            total = tl.dot(weight, tl.trans(value), total, input_precision=EXACT)  # [tile, tile_x]
        output = tl.reshape(tl.permute(tl.reshape(output, [2, warps, 8]), (1, 0, 2)), [tile])
    else:
        row = tl.minimum(output - tiles * tile, rank - 1)[:, None]
        for first in range(begin, end):
            place = first * 64 + tl.arange(0, 64)[None, :]
            column = place // 2 % 4 * 32 + place // 16 % 8 * 4 + place // 8 % 2 * 2 + place % 2
            weight, value = tl.load(a + row * (blocks * 64) + place // 128 * 128 + column), tl.load(x + place)
            total = tl.dot(weight, tl.trans(value), total, input_precision=EXACT)
    width = tiles * tile + rank
    at = part + (split * rows + number[None, :]).to(tl.int64) * width + output[:, None]
    tl.store(at, total, (output[:, None] < width) & (number[None, :] < rows))


@triton.jit(do_not_specialize=["rows", "splits"])
def add_up_kernel(
    part,
    b,
    out,
    rows,
    size,
    splits,
    first_a,
    rank: tl.constexpr,
    tile_rank: tl.constexpr,
    tile_x: tl.constexpr,
    tile: tl.constexpr,
):
    """The sums over all splits, and of (x a^T) b^T if there is an adapter."""
    row, column = tl.arange(0, tile_x)[:, None], (tl.program_id(0) * tile + tl.arange(0, tile))[None, :]
    inside, width = (row < rows) & (column < size), first_a + rank
    total = tl.zeros([tile_x, tile], tl.float32)
    for split in range(splits):
        total += tl.load(part + (split * rows + row).to(tl.int64) * width + column, inside, 0.0)
    for first in range(0, rank, tile_rank):
        r = first + tl.arange(0, tile_rank)
        left = tl.zeros([tile_x, tile_rank], tl.float32)  # x a^T
        for split in range(splits):
            at = part + (split * rows + row).to(tl.int64) * width + first_a + r[None, :]
            left += tl.load(at, (row < rows) & (r[None, :] < rank), 0.0)
        # b^T [tile_rank, tile]
        right = tl.load(b + column * rank + r[:, None], (column < size) & (r[:, None] < rank), 0.0)
        total = tl.dot(left.to(b.dtype.element_ty), right, total, input_precision=EXACT)
    tl.store(out + row * size + column, total.to(out.dtype.element_ty), inside)


class PackedWeights:
    """bitsandbytes NF4 weights (Params4bit, double quantized, at most three) one below the other, which
    take their data from here from now on."""

    def __init__(self, weights: list):
        states = [weight.quant_state for weight in weights]
        self.packed = torch.cat([weight.data.flatten() for weight in weights])
        self.words = self.packed.view(torch.int32)
        self.scales = torch.cat([state.absmax for state in states])
        self.outer = torch.cat([state.state2.absmax for state in states])
        self.offsets = torch.stack([state.offset.reshape(()) for state in states])
        self.scale_code, self.code = states[0].state2.code, states[0].code
        self.size = sum(state.shape[0] for state in states)
        self.borders = ([*accumulate(state.shape[0] for state in states)] * 2)[:2]
        counts = [(state.absmax.numel(), state.state2.absmax.numel()) for state in states]
        starts = zip(*([0, *accumulate(column)][:-1] for column in zip(*counts, strict=True)), strict=True)
        self.starts = torch.tensor(list(starts), device=self.packed.device)
        pieces = self.packed.split([weight.data.numel() for weight in weights])
        for weight, piece in zip(weights, pieces, strict=True):
            weight.data = piece.view(weight.data.shape)
        for state, piece in zip(states, self.scales.split([count for count, _ in counts]), strict=True):
            state.absmax = piece

    def arguments(self) -> tuple:
        """What every kernel takes first."""
        numbers = self.words, self.scales, self.scale_code, self.outer, self.offsets, self.starts, self.code
        return *numbers, *self.borders

    def unpack(self, out: torch.Tensor) -> None:
        """Write the weights to `out` [rows, columns]."""
        blocks = out.shape[1] // NF4_BLOCK
        tile = min(64, power_of_2(blocks))
        unpack_nf4_kernel[(out.shape[0], triton.cdiv(blocks, tile))](
            *(*self.arguments(), out, out.stride(0), blocks, tile), **exact_scales(out)
        )

    def multiply(self, x: torch.Tensor, a=None, b=None) -> torch.Tensor:
        """x W^T + (x a^T) b^T [rows, size] for a few rows, at most FEW_ROWS, read from the 4 bits themselves;
        a [rank, width] and b [size, rank], or neither. The columns of x, a multiple of PERMUTED_COLUMNS, lie
        as `kernels.permuted_column` has them."""
        (rows, width), rank, tile = x.shape, 0 if a is None else len(a), 16 * WARPS
        blocks, tile_x = width // NF4_BLOCK, max(16, power_of_2(rows))
        tiles = triton.cdiv(self.size, tile)
        splits = min(triton.cdiv(blocks, 8), triton.cdiv(PROGRAMS, tiles))
        chunk = 2 * triton.cdiv(blocks, 2 * splits)
        splits = triton.cdiv(blocks, chunk)
        part = torch.empty(splits, rows, tiles * tile + rank, dtype=torch.float32, device=x.device)
        multiply_nf4_kernel[(tiles + triton.cdiv(rank, tile), splits)](
            *(*self.arguments(), x, x if a is None else a, part, x.stride(0), rows, self.size, chunk),
            *(rank, blocks, tile_x, WARPS),
            **{"num_warps": WARPS, "num_stages": STAGES} | exact_scales(x),
        )
        out = x.new_empty(rows, self.size)
        add_up_kernel[(triton.cdiv(self.size, 64),)](
            *(part, part if b is None else b, out, rows, self.size, splits, tiles * tile),
            *(rank, rank_tile(rank), tile_x, 64),
        )
        return out


def exact_scales(tensor: torch.Tensor) -> dict:
    """Without fusing, product and sum of a scale are rounded as in bitsandbytes' own kernel."""
    return {"enable_fp_fusion": False} if tensor.is_cuda else {}
