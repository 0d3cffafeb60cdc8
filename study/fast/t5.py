"""A T5 in training over packed examples: no padding, its attention, norms and gated layers by kernels.

The modules are those of transformers or of PEFT around them, so that weights, adapters and what is saved are
theirs; here is only what lies between their matrix products.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from transformers.models.t5.modeling_t5 import T5Attention

from study.fast.t5_kernels import AddNorm, Attend, Gated, Projection, Span
from study.model import base_of

ROUNDED = 512, 256  # a batch's tokens in the encoder and in the decoder are multiples of these


class Packed:
    """Batches of examples (prompt, answer) laid end to end, and what `model` computes of them in `dtype`.

    What fills a batch up is an example of its own, which nothing is learned of. `longest` are the most tokens
    of a prompt and of an answer.
    """

    def __init__(self, model, longest: tuple[int, int], dtype: torch.dtype):
        self.dtype = dtype
        self.base = base_of(model)
        self.longest = [max(pair) for pair in zip(longest, ROUNDED, strict=True)]
        self.config, self.place = model.config, model.device
        self.buckets = [self.buckets_of(stack) for stack in (self.base.encoder, self.base.decoder)]
        self.sites = 16 * (self.config.num_layers + self.config.num_decoder_layers)  # of dropout, at most
        self.gated = self.config.is_gated_act and self.config.dense_act_fn == "gelu_new"
        self.stacked = {}  # by linear layers with the same input
        for block in [*self.base.encoder.block, *self.base.decoder.block]:
            own, *cross, last = block.layer
            layer, dense = own.SelfAttention, last.DenseReluDense
            self.stack_up(layer.q, layer.k, layer.v)
            for other in cross:
                layer = other.EncDecAttention
                self.stack_up(layer.q)
                self.stack_up(layer.k, layer.v)
            if self.gated:
                self.stack_up(dense.wi_0, dense.wi_1)
        self.groups = [group for _, group in self.stacked.values() if group]

    def buckets_of(self, stack) -> torch.Tensor:
        reach = self.longest[stack.is_decoder]
        return T5Attention._relative_position_bucket(
            torch.arange(1 - reach, reach, device=self.place),
            bidirectional=not stack.is_decoder,
            num_buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
        ).int()

    def ends(self, sizes: Iterable[tuple[int, int]]) -> list[int]:
        """Tokens of a batch in the encoder and in the decoder, what fills it up included."""
        sums = map(sum, zip(*sizes, strict=True))
        return [-(-n // rounded) * rounded for n, rounded in zip(sums, ROUNDED, strict=True)]

    def batch(self, prompts: Sequence[list[int]], answers: Sequence[list[int]], start: int) -> dict:
        """Tensors on the CPU; torch's random state gives the seeds of dropout."""
        begun = [[start, *answer[:-1]] for answer in answers]
        pad, lengths = self.config.pad_token_id, [list(map(len, rows)) for rows in (prompts, answers)]
        ends = self.ends(zip(*lengths, strict=True))
        borders = [np.cumsum([0, *row, end - sum(row)]) for row, end in zip(lengths, ends, strict=True)]
        return {
            "encoder_ids": laid(prompts, ends[0], pad),
            "decoder_ids": laid(begun, ends[1], pad),
            "labels": laid(answers, ends[1], -100),
            "borders": torch.from_numpy(np.stack(borders).astype(np.int32)),
            "seeds": torch.randint(2**31, (self.sites,), dtype=torch.int32),
        }

    def logits(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """[decoder's tokens, vocabulary], in the model's training or evaluation mode."""
        refresh(self.groups)
        sites = ((batch["seeds"], site) for site in itertools.count())  # of dropout, one after another
        read, written = batch["borders"]
        memory = self.stack(self.base.encoder, batch["encoder_ids"], sites, read)
        x = self.stack(self.base.decoder, batch["decoder_ids"], sites, written, memory, read)
        return self.base.lm_head(x * self.config.d_model**-0.5 if self.config.scale_decoder_outputs else x)

    def stack(self, stack, ids, sites: Iterator, borders, memory=None, others=None) -> torch.Tensor:
        """[tokens, width] of an encoder or, with the `memory` that it reads, a decoder."""
        drop = self.config.dropout_rate if self.base.training else 0.0
        table = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # [buckets, heads]
        buckets, longest = self.buckets[stack.is_decoder], self.longest[stack.is_decoder]
        bias = table.detach().float()[buckets].T.contiguous()  # [heads, distances]
        seen = Span(borders, borders, longest, longest, stack.is_decoder, bias, buckets)
        across = Span(
            borders, others, longest, self.longest[0], False, torch.zeros_like(bias[:, :1]), buckets
        )

        def add_norm(x, delta, norm) -> tuple:
            total, h = AddNorm.apply(x, delta, norm.weight, norm.eps, self.dtype, *next(sites), drop)
            return (x if delta is None else total), h

        def attend(layer, table, span: Span, qkv, kv=None) -> torch.Tensor:
            return layer.o(Attend.apply(qkv, kv, table, span, *next(sites), drop))

        x, delta = F.dropout(stack.embed_tokens(ids), drop), None
        for block in stack.block:
            own, *cross, last = block.layer
            x, h = add_norm(x, delta, own.layer_norm)
            layer = own.SelfAttention
            delta = attend(layer, table, seen, self.project(h, sites, layer.q, layer.k, layer.v))
            for other in cross:
                x, h = add_norm(x, delta, other.layer_norm)
                layer = other.EncDecAttention
                q, kv = self.project(h, sites, layer.q), self.project(memory, sites, layer.k, layer.v)
                delta = attend(layer, None, across, q, kv)
            x, h = add_norm(x, delta, last.layer_norm)
            dense = last.DenseReluDense
            if self.gated:
                gate_up = self.project(h, sites, dense.wi_0, dense.wi_1)
                delta = dense.wo(Gated.apply(gate_up, *next(sites), drop))
            else:
                delta = dense(h)
        _, h = add_norm(x, delta, stack.final_layer_norm)
        return F.dropout(h, drop)

    def project(self, x: torch.Tensor, sites: Iterator, *layers) -> torch.Tensor:
        """What linear layers make of x, side by side; those with frozen weights in one product."""
        weight, group = self.stacked[layers]
        if group is None:
            return F.linear(x, torch.cat([layer.weight for layer in layers]) if weight is None else weight)
        drop = group.dropout if self.base.training else 0.0
        return Projection.apply(x, weight, group, *next(sites), drop, *group.parameters)

    def stack_up(self, *layers) -> None:
        """Keep frozen weights of layers one below the other, None where they learn, and their adapters."""
        weights = [getattr(layer, "base_layer", layer).weight for layer in layers]
        learn = any(weight.requires_grad for weight in weights)
        adapted = any(isinstance(layer, LoraLayer) for layer in layers)
        self.stacked[layers] = None if learn else torch.cat(weights), Group(layers) if adapted else None


class Group:
    """The adapters of linear layers with the same input, as Projection takes them."""

    def __init__(self, layers):
        sizes = [layer.out_features for layer in layers]
        ends = np.cumsum(sizes)
        adapted = [i for i, layer in enumerate(layers) if isinstance(layer, LoraLayer)]
        first = layers[adapted[0]]
        self.scale, rank = first.scaling["default"], first.r["default"]
        self.dropout = getattr(first.lora_dropout["default"], "p", 0.0)
        self.full_a = [layers[i].lora_A["default"].weight for i in adapted]
        self.full_b = [layers[i].lora_B["default"].weight for i in adapted]
        self.parameters = self.full_a + self.full_b
        dtype = first.base_layer.weight.dtype
        self.a = torch.empty(
            rank * len(adapted), first.in_features, dtype=dtype, device=self.full_a[0].device
        )
        self.parts = [
            (
                slice(int(ends[i]) - sizes[i], int(ends[i])),
                slice(rank * j, rank * (j + 1)),
                torch.empty_like(b, dtype=dtype),
            )
            for j, (i, b) in enumerate(zip(adapted, self.full_b, strict=True))
        ]
        self.half = [*self.a.split(rank), *(b for *_, b in self.parts)]


@torch.no_grad()
def refresh(groups: Sequence[Group]) -> None:
    """Take over what the adapters' parameters are now."""
    if groups:
        torch._foreach_copy_([h for g in groups for h in g.half], [p for g in groups for p in g.parameters])
        torch._foreach_mul_([group.a for group in groups], [group.scale for group in groups])


def laid(rows: Sequence[list[int]], end: int, fill: int) -> torch.Tensor:
    """Rows end to end, filled up to the place `end`."""
    array = np.full(end, fill)
    flat = np.concatenate(rows)
    array[: len(flat)] = flat
    return torch.from_numpy(array)
