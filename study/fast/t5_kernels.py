"""Triton kernels of a T5 in training beside its matrix products, forward and backward, over packed examples.

Attention is FlashAttention 2 (Dao, 2023) with T5's bias by distance and dropout of its shares. Dropout's
masks are not stored but drawn again (kernels.dropout_mask), each by its own entry of `seeds`, which lie on
the device, so that a CUDA graph draws others every time. With TRITON_INTERPRET=1 the kernels run on the CPU.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from study.fast.kernels import EXACT, dropout_mask, power_of_2
from study.fast.train import product

LOG2_E = tl.constexpr(1.4426950408889634)  # kernels compute 2^x, not e^x
TILES = {  # queries, keys, warps, stages of attention: measured best on an H100, dialogues of some 170 tokens
    "forward": (64, 32, 4, 3),
    "dq": (64, 32, 4, 3),
    "dkv": (64, 32, 4, 2),
}


# Residuals, dropout and RMSNorm


@triton.jit(do_not_specialize=["site"])
def add_norm_kernel(
    x,
    delta,
    weight,
    total,
    out,
    inverse,
    seeds,
    site,
    epsilon,
    probability,
    width: tl.constexpr,
    tile: tl.constexpr,
    add: tl.constexpr,
):
    """One row: total = x + dropout(delta), out = RMSNorm(total)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, tile)
    inside = column < width
    value = tl.load(x + row * width + column, inside, 0.0).to(tl.float32)
    if add:
        more = tl.load(delta + row * width + column, inside, 0.0).to(tl.float32)
        value += more * dropout_mask(tl.load(seeds + site), row, column, width, probability)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * width + column, rounded, inside)
        value = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + epsilon)  # one number for the row
    tl.store(inverse + row, scale)
    value = value * scale * tl.load(weight + column, inside, 0.0).to(tl.float32)
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["site"])
def add_norm_backward_kernel(
    d_total,
    d_out,
    total,
    weight,
    inverse,
    d_x,
    d_delta,
    seeds,
    site,
    probability,
    width: tl.constexpr,
    tile: tl.constexpr,
    add: tl.constexpr,
    more: tl.constexpr,
):
    """One row: d_x = d_total + s * (dy * w - x * s^2 * mean(dy * w * x)), s the inverse root mean square of
    x, `total` here; d_delta is that under dropout's mask. Without `more` there is no d_total."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, tile)
    inside, at = column < width, row * width + column
    value = tl.load(total + at, inside, 0.0).to(tl.float32)
    slope = tl.load(d_out + at, inside, 0.0).to(tl.float32)
    slope *= tl.load(weight + column, inside, 0.0).to(tl.float32)
    scale = tl.load(inverse + row)
    result = scale * (slope - value * (tl.sum(slope * value, 0) / width * scale * scale))
    if more:
        result += tl.load(d_total + at, inside, 0.0).to(tl.float32)
    tl.store(d_x + at, result.to(d_x.dtype.element_ty), inside)
    if add:
        result *= dropout_mask(tl.load(seeds + site), row, column, width, probability)
        tl.store(d_delta + at, result.to(d_delta.dtype.element_ty), inside)


class AddNorm(torch.autograd.Function):
    """(x, delta, weight) -> (total, out): total = x + dropout(delta) [rows, width], and its RMSNorm in
    `dtype`. Without a `delta` (None) there is no total but x itself."""

    @staticmethod
    def forward(ctx, x, delta, weight, epsilon: float, dtype, seeds, site: int, probability: float):
        rows, width = x.shape
        inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
        total = x if delta is None else torch.empty_like(x)
        out = torch.empty(rows, width, dtype=dtype, device=x.device)
        add_norm_kernel[(rows,)](
            *(x, x if delta is None else delta, weight, total, out, inverse, seeds, site, epsilon),
            *(probability, width, power_of_2(width), delta is not None),
        )
        ctx.save_for_backward(total, weight, inverse, seeds)
        ctx.rest = site, probability, None if delta is None else delta.dtype
        ctx.set_materialize_grads(False)
        if delta is None:
            total = x.detach()
            ctx.mark_non_differentiable(total)
        return total, out

    @staticmethod
    def backward(ctx, d_total, d_out):
        total, weight, inverse, seeds = ctx.saved_tensors
        site, probability, dtype = ctx.rest
        rows, width = total.shape
        d_x, d_out = torch.empty_like(total), d_out.contiguous()
        d_delta = None if dtype is None else torch.empty(rows, width, dtype=dtype, device=total.device)
        more = d_total is not None
        add_norm_backward_kernel[(rows,)](
            *(d_total.contiguous() if more else total, d_out, total, weight, inverse, d_x),
            *(d_x if d_delta is None else d_delta, seeds, site, probability, width, power_of_2(width)),
            *(d_delta is not None, more),
        )
        d_weight = None
        if ctx.needs_input_grad[2]:
            d_weight = (d_out.float() * total.float() * inverse[:, None]).sum(0).to(weight.dtype)
        return d_x, d_delta, d_weight, None, None, None, None, None


# Gated GELU (Shazeer, 2020)


@triton.jit
def gelu_parts(gate):
    """GELU by tanh, and its slope: 0.5 g (1 + tanh(u)), u = sqrt(2 / pi) (g + 0.044715 g^3)."""
    inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    tanh = 2.0 * tl.sigmoid(2.0 * inner) - 1.0
    slope = 0.7978845608028654 * (1.0 + 0.134145 * gate * gate)
    return 0.5 * gate * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * gate * (1.0 - tanh * tanh) * slope


@triton.jit(do_not_specialize=["site"])
def gated_kernel(gate_up, out, seeds, site, probability, width: tl.constexpr, tile: tl.constexpr):
    """A tile of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    inside, at = column < width, row * 2 * width + column
    gelu, _ = gelu_parts(tl.load(gate_up + at, inside, 0.0).to(tl.float32))
    value = gelu * tl.load(gate_up + at + width, inside, 0.0).to(tl.float32)
    value *= dropout_mask(tl.load(seeds + site), row, column, width, probability)
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["site"])
def gated_backward_kernel(
    gate_up, d_out, d_gate_up, seeds, site, probability, width: tl.constexpr, tile: tl.constexpr
):
    """A tile of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    inside, at = column < width, row * 2 * width + column
    gelu, slope = gelu_parts(tl.load(gate_up + at, inside, 0.0).to(tl.float32))
    value = tl.load(d_out + row * width + column, inside, 0.0).to(tl.float32)
    value *= dropout_mask(tl.load(seeds + site), row, column, width, probability)
    tl.store(d_gate_up + at + width, (value * gelu).to(d_gate_up.dtype.element_ty), inside)
    value *= tl.load(gate_up + at + width, inside, 0.0).to(tl.float32) * slope
    tl.store(d_gate_up + at, value.to(d_gate_up.dtype.element_ty), inside)


class Gated(torch.autograd.Function):
    """dropout(gelu(gate) * up) [rows, width], which lie side by side in the columns of gate_up."""

    @staticmethod
    def forward(ctx, gate_up, seeds, site: int, probability: float):
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        tile = min(1024, power_of_2(width))
        grid = rows, triton.cdiv(width, tile)
        gated_kernel[grid](gate_up, out, seeds, site, probability, width, tile)
        ctx.save_for_backward(gate_up, seeds)
        ctx.rest = grid, site, probability, width, tile
        return out

    @staticmethod
    def backward(ctx, d_out):
        gate_up, seeds = ctx.saved_tensors
        grid, *rest = ctx.rest
        d_gate_up = torch.empty_like(gate_up)
        gated_backward_kernel[grid](gate_up, d_out.contiguous(), d_gate_up, seeds, *rest)
        return d_gate_up, None, None, None


# Linear layers with adapters


@triton.jit(do_not_specialize=["site"])
def dropped_kernel(
    x, out, seeds, site, probability, width: tl.constexpr, tile: tl.constexpr, add: tl.constexpr
):
    """A tile of one row: out = dropout(x), or out += dropout(x)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    inside, at = column < width, row * width + column
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    value *= dropout_mask(tl.load(seeds + site), row, column, width, probability)
    if add:
        value += tl.load(out + at, inside, 0.0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), inside)


def dropped(x: torch.Tensor, out: torch.Tensor, seeds, site: int, probability: float, add=False) -> None:
    rows, width = x.shape
    tile = min(1024, power_of_2(width))
    dropped_kernel[(rows, triton.cdiv(width, tile))](x, out, seeds, site, probability, width, tile, add)


class Projection(torch.autograd.Function):
    """x [rows, width] times the frozen weights [size, width] of some linear layers, and their adapters.

    `group` has `a` [ranks, width] of all adapters, scaled, and `parts`: of each the columns that it adds to,
    its columns of `a`'s outputs, and its `b` [columns, rank]. Their parameters follow, all A, then all B;
    one mask is drawn for all.
    """

    @staticmethod
    def forward(ctx, x, weight, group, seeds, site: int, probability: float, *parameters):
        y, source = x @ weight.T, torch.empty_like(x)
        dropped(x, source, seeds, site, probability)
        h = source @ group.a.T  # [rows, ranks]
        for columns, ranks, b in group.parts:
            y[:, columns].addmm_(h[:, ranks], b.T)
        ctx.save_for_backward(source, weight, h, seeds)
        ctx.rest = group, site, probability
        return y

    @staticmethod
    def backward(ctx, dy):
        source, weight, h, seeds = ctx.saved_tensors
        group, site, probability = ctx.rest
        dh = torch.cat([dy[:, columns] @ b for columns, _, b in group.parts], dim=1)  # [rows, ranks]
        da = product(dh.T, source) * group.scale
        db = [product(dy[:, columns].T, h[:, ranks]) for columns, ranks, _ in group.parts]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            dropped(dh @ group.a, dx, seeds, site, probability, add=True)
        return dx, None, None, None, None, None, *(da[ranks] for _, ranks, _ in group.parts), *db


# Attention


@dataclass(frozen=True)
class Span:
    """Whose queries see whose keys. Example i has the query rows from queries[i] to queries[i + 1], none of
    them more than `longest_query`, and likewise keys. `bias` [heads, 2 reach - 1], float32, are added to
    scores by the distance of a key behind its query, from 1 - reach to reach - 1; `buckets` are T5's of the
    distances."""

    queries: torch.Tensor  # [examples + 1], int32
    keys: torch.Tensor
    longest_query: int
    longest_key: int
    causal: bool
    bias: torch.Tensor
    buckets: torch.Tensor


@triton.jit
def scores(query, key, place, other, length, bias, head, reach, causal):
    """Of a tile of queries and keys, times log2(e); -1e30 where a query does not see a key."""
    score = tl.dot(query, tl.trans(key), input_precision=EXACT)  # [queries, keys]
    distance = other[None, :] - place[:, None]
    bounded = tl.minimum(tl.maximum(distance + reach - 1, 0), 2 * reach - 2)
    score += tl.load(bias + head * (2 * reach - 1) + bounded)
    seen = (other[None, :] < length) & ((distance <= 0) | (causal == 0))
    return tl.where(seen, score * LOG2_E, -1e30)


@triton.jit
def share_mask(seeds, site, head, row, place, rows, widest: tl.constexpr, probability):
    """Dropout's mask of a tile of shares [rows, places], which stand in rows of `widest`."""
    numbers = head * rows + row
    return dropout_mask(tl.load(seeds + site), numbers[:, None], place[None, :], widest, probability)


@triton.jit(do_not_specialize=["site", "rows", "reach", "causal"])
def t5_attention_kernel(
    q,
    k,
    v,
    bias,
    out,
    logsumexp,
    queries,
    keys,
    seeds,
    q_stride,
    k_stride,
    site,
    rows,
    reach,
    causal,
    probability,
    heads: tl.constexpr,
    size: tl.constexpr,
    widest: tl.constexpr,
    tile_q: tl.constexpr,
    tile_k: tl.constexpr,
):
    """A tile of an example's queries, of one head."""
    example, head = tl.program_id(1), tl.program_id(2)
    start, end = tl.load(queries + example), tl.load(queries + example + 1)
    place = tl.program_id(0) * tile_q + tl.arange(0, tile_q)
    if tl.program_id(0) * tile_q < end - start:
        first, length = tl.load(keys + example), tl.load(keys + example + 1) - tl.load(keys + example)
        row, wanted = start + place, place < end - start
        column = head * size + tl.arange(0, size)[None, :]
        far = row.to(tl.int64)[:, None]
        query = tl.load(q + far * q_stride + column, wanted[:, None], 0.0)
        largest = tl.full([tile_q], -1e30, tl.float32)
        weight = tl.zeros([tile_q], tl.float32)
        total = tl.zeros([tile_q, size], tl.float32)
        last = tl.where(causal != 0, tl.minimum(length, tl.program_id(0) * tile_q + tile_q), length)
        for begin in range(0, last, tile_k):
            other = begin + tl.arange(0, tile_k)
            at = (first + other).to(tl.int64)[:, None] * k_stride + column
            key = tl.load(k + at, (other < length)[:, None], 0.0)  # [tile_k, size]
            value = tl.load(v + at, (other < length)[:, None], 0.0)
            score = scores(query, key, place, other, length, bias, head, reach, causal)
            larger = tl.maximum(largest, tl.max(score, 1))
            share = tl.exp2(score - larger[:, None])
            fade = tl.exp2(largest - larger)
            weight = weight * fade + tl.sum(share, 1)
            share *= share_mask(seeds, site, head, row, other, rows, widest, probability)
            total = tl.dot(share.to(value.dtype), value, total * fade[:, None], input_precision=EXACT)
            largest = larger
        weight = tl.maximum(weight, 1e-30)  # an example without keys
        result = (total / weight[:, None]).to(out.dtype.element_ty)
        tl.store(out + far * heads * size + column, result, wanted[:, None])
        tl.store(logsumexp + head.to(tl.int64) * rows + row, largest + tl.log2(weight), wanted)


@triton.jit(do_not_specialize=["site", "rows", "reach", "causal"])
def t5_dq_kernel(
    q,
    k,
    v,
    bias,
    d_out,
    out,
    logsumexp,
    delta,
    d_q,
    d_bias,
    queries,
    keys,
    buckets,
    seeds,
    q_stride,
    k_stride,
    site,
    rows,
    reach,
    causal,
    probability,
    heads: tl.constexpr,
    size: tl.constexpr,
    widest: tl.constexpr,
    tile_q: tl.constexpr,
    tile_k: tl.constexpr,
    count: tl.constexpr,
):
    """Gradients of a tile of queries; their rows' sums of gradient * output, which the keys' kernel takes;
    and what they add to the bias of each of `count` buckets (0: to none)."""
    example, head = tl.program_id(1), tl.program_id(2)
    start, end = tl.load(queries + example), tl.load(queries + example + 1)
    place = tl.program_id(0) * tile_q + tl.arange(0, tile_q)
    if tl.program_id(0) * tile_q < end - start:
        first, length = tl.load(keys + example), tl.load(keys + example + 1) - tl.load(keys + example)
        row, wanted = start + place, place < end - start
        column = head * size + tl.arange(0, size)[None, :]
        far, saved = row.to(tl.int64)[:, None], head.to(tl.int64) * rows + row
        mine = far * heads * size + column
        query = tl.load(q + far * q_stride + column, wanted[:, None], 0.0)
        slope = tl.load(d_out + mine, wanted[:, None], 0.0)
        output = tl.load(out + mine, wanted[:, None], 0.0)
        inner = tl.sum(slope.to(tl.float32) * output.to(tl.float32), 1)  # [tile_q]
        tl.store(delta + saved, inner, wanted)
        log_weight = tl.load(logsumexp + saved, wanted, 1e30)
        total = tl.zeros([tile_q, size], tl.float32)
        if count:
            bucket = tl.arange(0, count)
            found = tl.zeros([count], tl.float32)
        last = tl.where(causal != 0, tl.minimum(length, tl.program_id(0) * tile_q + tile_q), length)
        for begin in range(0, last, tile_k):
            other = begin + tl.arange(0, tile_k)
            at = (first + other).to(tl.int64)[:, None] * k_stride + column
            key = tl.load(k + at, (other < length)[:, None], 0.0)
            value = tl.load(v + at, (other < length)[:, None], 0.0)
            score = scores(query, key, place, other, length, bias, head, reach, causal)
            share = tl.exp2(score - log_weight[:, None])  # [queries, keys]
            d_share = tl.dot(slope, tl.trans(value), input_precision=EXACT)
            d_share *= share_mask(seeds, site, head, row, other, rows, widest, probability)
            d_score = share * (d_share - inner[:, None])
            total = tl.dot(d_score.to(key.dtype), key, total, input_precision=EXACT)
            if count:
                distance = other[None, :] - place[:, None] + reach - 1
                bounded = tl.minimum(tl.maximum(distance, 0), 2 * reach - 2)
                which = tl.load(buckets + bounded)
                for each in range(count):
                    hit = tl.sum(tl.sum(tl.where(which == each, d_score, 0.0), 1), 0)
                    found += tl.where(bucket == each, hit, 0.0)
        tl.store(d_q + far * q_stride + column, total.to(d_q.dtype.element_ty), wanted[:, None])
        if count:
            tl.atomic_add(d_bias + bucket * heads + head, found)


@triton.jit(do_not_specialize=["site", "rows", "reach", "causal"])
def t5_dkv_kernel(
    q,
    k,
    v,
    bias,
    d_out,
    logsumexp,
    delta,
    d_k,
    d_v,
    queries,
    keys,
    seeds,
    q_stride,
    k_stride,
    site,
    rows,
    reach,
    causal,
    probability,
    heads: tl.constexpr,
    size: tl.constexpr,
    widest: tl.constexpr,
    tile_q: tl.constexpr,
    tile_k: tl.constexpr,
):
    """Gradients of a tile of an example's keys and values, of one head."""
    example, head = tl.program_id(1), tl.program_id(2)
    start, end = tl.load(keys + example), tl.load(keys + example + 1)
    other = tl.program_id(0) * tile_k + tl.arange(0, tile_k)
    if tl.program_id(0) * tile_k < end - start:
        first = tl.load(queries + example)
        length = tl.load(queries + example + 1) - first
        wanted = other < end - start
        column = head * size + tl.arange(0, size)[None, :]
        mine = (start + other).to(tl.int64)[:, None] * k_stride + column
        key = tl.load(k + mine, wanted[:, None], 0.0)
        value = tl.load(v + mine, wanted[:, None], 0.0)
        total_k = tl.zeros([tile_k, size], tl.float32)
        total_v = tl.zeros([tile_k, size], tl.float32)
        for begin in range(
            tl.where(causal != 0, tl.program_id(0) * tile_k // tile_q * tile_q, 0), length, tile_q
        ):
            place = begin + tl.arange(0, tile_q)
            row, inside = first + place, place < length
            far, saved = row.to(tl.int64)[:, None], head.to(tl.int64) * rows + row
            query = tl.load(q + far * q_stride + column, inside[:, None], 0.0)
            slope = tl.load(d_out + far * heads * size + column, inside[:, None], 0.0)
            log_weight, inner = tl.load(logsumexp + saved, inside, 1e30), tl.load(delta + saved, inside, 0.0)
            score = scores(query, key, place, other, end - start, bias, head, reach, causal)
            share = tl.exp2(score - log_weight[:, None])  # [queries, keys]
            d_share = tl.dot(slope, tl.trans(value), input_precision=EXACT)
            mask = share_mask(seeds, site, head, row, other, rows, widest, probability)
            kept, d_share = share * mask, d_share * mask
            total_v = tl.dot(tl.trans(kept.to(slope.dtype)), slope, total_v, input_precision=EXACT)
            d_score = share * (d_share - inner[:, None])
            total_k = tl.dot(tl.trans(d_score.to(query.dtype)), query, total_k, input_precision=EXACT)
        tl.store(d_k + mine, total_k.to(d_k.dtype.element_ty), wanted[:, None])
        tl.store(d_v + mine, total_v.to(d_v.dtype.element_ty), wanted[:, None])


class Attend(torch.autograd.Function):
    """Attention over `span`'s examples: queries, keys and values, [rows, heads size] each, side by side in
    `qkv`, or the last two in `kv` -> [query rows, heads size]. `table` [buckets, heads] are the biases that
    those of the span are made of, or None."""

    @staticmethod
    def forward(ctx, qkv, kv, table, span: Span, seeds, site: int, probability: float):
        heads, reach = len(span.bias), (span.bias.shape[1] + 1) // 2
        q, k, v = parts(qkv, kv)
        rows, width = q.shape
        out = qkv.new_empty(rows, width)
        logsumexp = torch.empty(heads, rows, dtype=torch.float32, device=qkv.device)
        grid = len(span.queries) - 1, heads
        rest = (seeds, q.stride(0), k.stride(0), site, rows, reach, int(span.causal), probability)
        rest += (heads, width // heads, power_of_2(span.longest_key))
        launch(
            t5_attention_kernel,
            "forward",
            (span.longest_query, *grid),
            *(q, k, v, span.bias, out, logsumexp, span.queries, span.keys, *rest),
        )
        ctx.save_for_backward(qkv, kv, table, out, logsumexp)
        ctx.rest = span, rest, grid
        return out

    @staticmethod
    def backward(ctx, d_out):
        qkv, kv, table, out, logsumexp = ctx.saved_tensors
        span, rest, grid = ctx.rest
        d_qkv, d_kv = torch.empty_like(qkv), None if kv is None else torch.empty_like(kv)
        (q, k, v), (d_q, d_k, d_v) = parts(qkv, kv), parts(d_qkv, d_kv)
        d_out, delta = d_out.contiguous(), torch.empty_like(logsumexp)
        d_table = torch.zeros_like(table, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        launch(
            t5_dq_kernel,
            "dq",
            (span.longest_query, *grid),
            *(q, k, v, span.bias, d_out, out, logsumexp, delta, d_q, delta if d_table is None else d_table),
            *(span.queries, span.keys, span.buckets, *rest),
            count=0 if d_table is None else len(d_table),
        )
        launch(
            t5_dkv_kernel,
            "dkv",
            (span.longest_key, *grid),
            *(q, k, v, span.bias, d_out, logsumexp, delta, d_k, d_v, span.queries, span.keys, *rest),
        )
        return d_qkv, d_kv, None if d_table is None else d_table.to(table.dtype), None, None, None, None


def launch(kernel, kind: str, grid: tuple[int, ...], *given, **constants) -> None:
    """`grid` is of the most rows that a program's tile cuts up, examples and heads."""
    tile_q, tile_k, warps, stages = TILES[kind]
    tiles = triton.cdiv(grid[0], tile_k if kind == "dkv" else tile_q)
    kernel[(tiles, *grid[1:])](
        *given, tile_q=tile_q, tile_k=tile_k, num_warps=warps, num_stages=stages, **constants
    )


def parts(qkv: torch.Tensor, kv: torch.Tensor | None) -> list[torch.Tensor]:
    """Queries, keys and values as columns of what they lie in."""
    return list(qkv.chunk(3, dim=1)) if kv is None else [qkv, *kv.chunk(2, dim=1)]
