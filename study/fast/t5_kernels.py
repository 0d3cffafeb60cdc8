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

LOG2_E = tl.constexpr(1.4426950408889634)  # kernels compute 2^x, not e^x
TILE, WARPS = 64, 4  # queries and keys of a tile


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
def gated_kernel(gate, up, out, seeds, site, probability, width: tl.constexpr, tile: tl.constexpr):
    """A tile of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    inside, at = column < width, row * width + column
    gelu, _ = gelu_parts(tl.load(gate + at, inside, 0.0).to(tl.float32))
    value = gelu * tl.load(up + at, inside, 0.0).to(tl.float32)
    value *= dropout_mask(tl.load(seeds + site), row, column, width, probability)
    tl.store(out + at, value.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["site"])
def gated_backward_kernel(
    gate, up, d_out, d_gate, d_up, seeds, site, probability, width: tl.constexpr, tile: tl.constexpr
):
    """A tile of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    inside, at = column < width, row * width + column
    gelu, slope = gelu_parts(tl.load(gate + at, inside, 0.0).to(tl.float32))
    value = tl.load(d_out + at, inside, 0.0).to(tl.float32)
    value *= dropout_mask(tl.load(seeds + site), row, column, width, probability)
    tl.store(d_up + at, (value * gelu).to(d_up.dtype.element_ty), inside)
    value *= tl.load(up + at, inside, 0.0).to(tl.float32) * slope
    tl.store(d_gate + at, value.to(d_gate.dtype.element_ty), inside)


class Gated(torch.autograd.Function):
    """(gate, up) -> dropout(gelu(gate) * up), all [rows, width]."""

    @staticmethod
    def forward(ctx, gate, up, seeds, site: int, probability: float):
        out, (rows, width) = torch.empty_like(gate), gate.shape
        tile = min(1024, power_of_2(width))
        grid = rows, triton.cdiv(width, tile)
        gated_kernel[grid](gate, up, out, seeds, site, probability, width, tile)
        ctx.save_for_backward(gate, up, seeds)
        ctx.rest = grid, site, probability, tile
        return out

    @staticmethod
    def backward(ctx, d_out):
        gate, up, seeds = ctx.saved_tensors
        grid, site, probability, tile = ctx.rest
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        gated_backward_kernel[grid](
            *(gate, up, d_out.contiguous(), d_gate, d_up, seeds, site, probability, gate.shape[1], tile)
        )
        return d_gate, d_up, None, None, None


# Attention


@dataclass(frozen=True)
class Span:
    """Whose queries see whose keys. Example i has the query rows from queries[i] to queries[i + 1], none of
    them more than `longest_query`, and likewise keys. `buckets` [2 reach - 1] are T5's of the distances from
    1 - reach to reach - 1 of a key behind its query; None has no bias."""

    queries: torch.Tensor  # [examples + 1], int32
    keys: torch.Tensor
    longest_query: int
    longest_key: int
    causal: bool = False
    buckets: torch.Tensor | None = None

    @property
    def reach(self) -> int:
        return 0 if self.buckets is None else (len(self.buckets) + 1) // 2


@triton.jit
def scores(query, key, place, other, length, bias, head, reach, has_bias: tl.constexpr, causal: tl.constexpr):
    """Of a tile of queries and keys, times log2(e); -1e30 where a query does not see a key."""
    score = tl.dot(query, tl.trans(key), input_precision=EXACT)  # [queries, keys]
    seen = other[None, :] < length
    if has_bias:
        distance = other[None, :] - place[:, None] + reach - 1
        bounded = tl.minimum(tl.maximum(distance, 0), 2 * reach - 2)
        score += tl.load(bias + head * (2 * reach - 1) + bounded)
    if causal:
        seen = seen & (other[None, :] <= place[:, None])
    return tl.where(seen, score * LOG2_E, -1e30)


@triton.jit
def share_mask(seeds, site, head, row, place, rows, widest: tl.constexpr, probability):
    """Dropout's mask of a tile of shares [rows, places], which stand in rows of `widest`."""
    numbers = head * rows + row
    return dropout_mask(tl.load(seeds + site), numbers[:, None], place[None, :], widest, probability)


@triton.jit(do_not_specialize=["site", "rows", "reach"])
def attention_kernel(
    q,
    k,
    v,
    bias,
    out,
    logsumexp,
    queries,
    keys,
    seeds,
    site,
    rows,
    reach,
    probability,
    heads: tl.constexpr,
    size: tl.constexpr,
    tile: tl.constexpr,
    widest: tl.constexpr,
    has_bias: tl.constexpr,
    causal: tl.constexpr,
    drop: tl.constexpr,
):
    """A tile of an example's queries, of one head."""
    example, head, stride = tl.program_id(1), tl.program_id(2), heads * size
    start, end = tl.load(queries + example), tl.load(queries + example + 1)
    place = tl.program_id(0) * tile + tl.arange(0, tile)
    if tl.program_id(0) * tile < end - start:
        first, length = tl.load(keys + example), tl.load(keys + example + 1) - tl.load(keys + example)
        row, wanted = start + place, place < end - start
        column = head * size + tl.arange(0, size)[None, :]
        query = tl.load(q + row.to(tl.int64)[:, None] * stride + column, wanted[:, None], 0.0)
        largest = tl.full([tile], -1e30, tl.float32)
        weight = tl.zeros([tile], tl.float32)
        total = tl.zeros([tile, size], tl.float32)
        last = tl.minimum(length, tl.program_id(0) * tile + tile) if causal else length
        for begin in range(0, last, tile):
            other = begin + tl.arange(0, tile)
            at = (first + other).to(tl.int64)[:, None] * stride + column
            key = tl.load(k + at, (other < length)[:, None], 0.0)  # [tile, size]
            value = tl.load(v + at, (other < length)[:, None], 0.0)
            score = scores(query, key, place, other, length, bias, head, reach, has_bias, causal)
            larger = tl.maximum(largest, tl.max(score, 1))
            share = tl.exp2(score - larger[:, None])
            fade = tl.exp2(largest - larger)
            weight = weight * fade + tl.sum(share, 1)
            if drop:
                share *= share_mask(seeds, site, head, row, other, rows, widest, probability)
            total = tl.dot(share.to(value.dtype), value, total * fade[:, None], input_precision=EXACT)
            largest = larger
        weight = tl.maximum(weight, 1e-30)  # an example without keys
        result = (total / weight[:, None]).to(out.dtype.element_ty)
        tl.store(out + row.to(tl.int64)[:, None] * stride + column, result, wanted[:, None])
        tl.store(logsumexp + head.to(tl.int64) * rows + row, largest + tl.log2(weight), wanted)


@triton.jit(do_not_specialize=["site", "rows", "reach"])
def attention_dq_kernel(
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
    site,
    rows,
    reach,
    probability,
    heads: tl.constexpr,
    size: tl.constexpr,
    tile: tl.constexpr,
    widest: tl.constexpr,
    has_bias: tl.constexpr,
    causal: tl.constexpr,
    drop: tl.constexpr,
    count: tl.constexpr,
):
    """Gradients of a tile of queries; their rows' sums of gradient * output, which the keys' kernel takes;
    and what they add to the bias of each of `count` buckets (0: to none)."""
    example, head, stride = tl.program_id(1), tl.program_id(2), heads * size
    start, end = tl.load(queries + example), tl.load(queries + example + 1)
    place = tl.program_id(0) * tile + tl.arange(0, tile)
    if tl.program_id(0) * tile < end - start:
        first, length = tl.load(keys + example), tl.load(keys + example + 1) - tl.load(keys + example)
        row, wanted = start + place, place < end - start
        column = head * size + tl.arange(0, size)[None, :]
        mine, saved = row.to(tl.int64)[:, None] * stride + column, head.to(tl.int64) * rows + row
        query = tl.load(q + mine, wanted[:, None], 0.0)
        slope = tl.load(d_out + mine, wanted[:, None], 0.0)
        output = tl.load(out + mine, wanted[:, None], 0.0)
        inner = tl.sum(slope.to(tl.float32) * output.to(tl.float32), 1)  # [tile]
        tl.store(delta + saved, inner, wanted)
        log_weight = tl.load(logsumexp + saved, wanted, 1e30)
        total = tl.zeros([tile, size], tl.float32)
        if count:
            bucket = tl.arange(0, count)
            found = tl.zeros([count], tl.float32)
        last = tl.minimum(length, tl.program_id(0) * tile + tile) if causal else length
        for begin in range(0, last, tile):
            other = begin + tl.arange(0, tile)
            at = (first + other).to(tl.int64)[:, None] * stride + column
            key = tl.load(k + at, (other < length)[:, None], 0.0)
            value = tl.load(v + at, (other < length)[:, None], 0.0)
            score = scores(query, key, place, other, length, bias, head, reach, has_bias, causal)
            share = tl.exp2(score - log_weight[:, None])  # [queries, keys]
            d_share = tl.dot(slope, tl.trans(value), input_precision=EXACT)
            if drop:
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
        tl.store(d_q + mine, total.to(d_q.dtype.element_ty), wanted[:, None])
        if count:
            tl.atomic_add(d_bias + bucket * heads + head, found)


@triton.jit(do_not_specialize=["site", "rows", "reach"])
def attention_dkv_kernel(
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
    site,
    rows,
    reach,
    probability,
    heads: tl.constexpr,
    size: tl.constexpr,
    tile: tl.constexpr,
    widest: tl.constexpr,
    has_bias: tl.constexpr,
    causal: tl.constexpr,
    drop: tl.constexpr,
):
    """Gradients of a tile of an example's keys and values, of one head."""
    example, head, stride = tl.program_id(1), tl.program_id(2), heads * size
    start, end = tl.load(keys + example), tl.load(keys + example + 1)
    other = tl.program_id(0) * tile + tl.arange(0, tile)
    if tl.program_id(0) * tile < end - start:
        first = tl.load(queries + example)
        length = tl.load(queries + example + 1) - first
        wanted = other < end - start
        column = head * size + tl.arange(0, size)[None, :]
        mine = (start + other).to(tl.int64)[:, None] * stride + column
        key = tl.load(k + mine, wanted[:, None], 0.0)
        value = tl.load(v + mine, wanted[:, None], 0.0)
        total_k = tl.zeros([tile, size], tl.float32)
        total_v = tl.zeros([tile, size], tl.float32)
        for begin in range(tl.program_id(0) * tile if causal else 0, length, tile):
            place = begin + tl.arange(0, tile)
            row, inside = first + place, place < length
            at, saved = row.to(tl.int64)[:, None] * stride + column, head.to(tl.int64) * rows + row
            query = tl.load(q + at, inside[:, None], 0.0)
            slope = tl.load(d_out + at, inside[:, None], 0.0)
            log_weight, inner = tl.load(logsumexp + saved, inside, 1e30), tl.load(delta + saved, inside, 0.0)
            score = scores(query, key, place, other, end - start, bias, head, reach, has_bias, causal)
            share = tl.exp2(score - log_weight[:, None])  # [queries, keys]
            d_share = tl.dot(slope, tl.trans(value), input_precision=EXACT)
            kept = share
            if drop:
                mask = share_mask(seeds, site, head, row, other, rows, widest, probability)
                kept, d_share = share * mask, d_share * mask
            total_v = tl.dot(tl.trans(kept.to(slope.dtype)), slope, total_v, input_precision=EXACT)
            d_score = share * (d_share - inner[:, None])
            total_k = tl.dot(tl.trans(d_score.to(query.dtype)), query, total_k, input_precision=EXACT)
        tl.store(d_k + mine, total_k.to(d_k.dtype.element_ty), wanted[:, None])
        tl.store(d_v + mine, total_v.to(d_v.dtype.element_ty), wanted[:, None])


class Attend(torch.autograd.Function):
    """q [query rows, heads, size], k and v [key rows, heads, size], T5's table of biases [buckets, heads] or
    None -> [query rows, heads, size]; rows of no example are left as they are. `bias` [heads, 2 reach - 1] is
    the table by distance, float32."""

    @staticmethod
    def forward(ctx, q, k, v, table, bias, span: Span, seeds, site: int, probability: float):
        rows, heads, size = q.shape
        out = torch.empty_like(q)
        logsumexp = torch.empty(heads, rows, dtype=torch.float32, device=q.device)
        shape = (
            heads,
            size,
            TILE,
            power_of_2(span.longest_key),
            bias is not None,
            span.causal,
            probability > 0,
        )
        bias = logsumexp if bias is None else bias
        grid = triton.cdiv(span.longest_query, TILE), len(span.queries) - 1, heads
        attention_kernel[grid](
            *(q, k, v, bias, out, logsumexp, span.queries, span.keys, seeds, site, rows, span.reach),
            *(probability, *shape),
            num_warps=WARPS,
        )
        ctx.save_for_backward(q, k, v, table, bias, out, logsumexp, seeds)
        ctx.rest = span, site, probability, shape, grid
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, table, bias, out, logsumexp, seeds = ctx.saved_tensors
        span, site, probability, shape, grid = ctx.rest
        rows, d_out, delta = q.shape[0], d_out.contiguous(), torch.empty_like(logsumexp)
        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        d_table = torch.zeros_like(table, dtype=torch.float32) if ctx.needs_input_grad[3] else None
        more = seeds, site, rows, span.reach, probability
        attention_dq_kernel[grid](
            *(q, k, v, bias, d_out, out, logsumexp, delta, d_q, delta if d_table is None else d_table),
            *(span.queries, span.keys, delta if span.buckets is None else span.buckets, *more, *shape),
            0 if d_table is None else len(d_table),
            num_warps=WARPS,
        )
        attention_dkv_kernel[(triton.cdiv(span.longest_key, TILE), *grid[1:])](
            *(q, k, v, bias, d_out, logsumexp, delta, d_k, d_v, span.queries, span.keys, *more, *shape),
            num_warps=WARPS,
        )
        d_table = None if d_table is None else d_table.to(table.dtype)
        return d_q, d_k, d_v, d_table, None, None, None, None, None
