"""A T5 in training over packed examples: no padding, its attention, norms and gated layers by kernels.

The modules are those of transformers or of PEFT around them, so that weights, adapters and what is saved are
theirs; here is only what lies between their matrix products.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from transformers.models.t5.modeling_t5 import T5Attention

from study.fast.t5_kernels import AddNorm, Attend, Gated, Span
from study.model import base_of

ROUNDED = 512, 256  # a batch's tokens in the encoder and in the decoder are multiples of these


class Packed:
    """Batches of examples (prompt, answer) laid end to end, and what `model` computes of them in `dtype`.

    What fills a batch up is an example of its own, which nothing is learned of. `longest` are the most tokens
    of a prompt and of an answer.
    """

    def __init__(self, model, longest: tuple[int, int], dtype: torch.dtype, rounded=ROUNDED):
        self.dtype, self.rounded = dtype, rounded
        self.base = base_of(model)
        self.longest = [max(pair) for pair in zip(longest, rounded, strict=True)]
        self.config, self.place = model.config, model.device
        self.buckets = [self.buckets_of(stack) for stack in (self.base.encoder, self.base.decoder)]
        # Of dropout: each block's norms, attentions and gated layer, and the last norms.
        self.sites = 4 * self.config.num_layers + 6 * self.config.num_decoder_layers + 2
        self.gated = self.config.is_gated_act and self.config.dense_act_fn == "gelu_new"

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
        return [-(-n // rounded) * rounded for n, rounded in zip(sums, self.rounded, strict=True)]

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
        sites = ((batch["seeds"], site) for site in itertools.count())  # of dropout, one after another
        (read, written), (from_read, from_written) = self.longest, batch["borders"]
        seen = Span(from_read, from_read, read, read, buckets=self.buckets[0])
        memory = self.stack(self.base.encoder, batch["encoder_ids"], sites, seen)
        seen = Span(from_written, from_written, written, written, causal=True, buckets=self.buckets[1])
        across = Span(from_written, from_read, written, read)
        x = self.stack(self.base.decoder, batch["decoder_ids"], sites, seen, memory, across)
        return self.base.lm_head(x * self.config.d_model**-0.5 if self.config.scale_decoder_outputs else x)

    def stack(self, stack, ids, sites: Iterator, seen: Span, memory=None, across=None) -> torch.Tensor:
        """[tokens, width] of an encoder or, with the `memory` that it reads, a decoder."""
        drop = self.config.dropout_rate if self.base.training else 0.0
        table = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # [buckets, heads]
        bias = table.detach().float()[seen.buckets].T.contiguous()  # [heads, distances]

        def add_norm(x, delta, norm) -> tuple:
            total, h = AddNorm.apply(x, delta, norm.weight, norm.eps, self.dtype, *next(sites), drop)
            return (x if delta is None else total), h

        def attend(attention, h, source, span: Span, *biases) -> torch.Tensor:
            rows = attention.q(h), attention.k(source), attention.v(source)
            heads = (row.view(len(row), attention.n_heads, -1) for row in rows)
            return attention.o(Attend.apply(*heads, *biases, span, *next(sites), drop).flatten(1))

        x, delta = F.dropout(stack.embed_tokens(ids), drop), None
        for block in stack.block:
            own, *cross, last = block.layer
            x, h = add_norm(x, delta, own.layer_norm)
            delta = attend(own.SelfAttention, h, h, seen, table, bias)
            for layer in cross:
                x, h = add_norm(x, delta, layer.layer_norm)
                delta = attend(layer.EncDecAttention, h, memory, across, None, None)
            x, h = add_norm(x, delta, last.layer_norm)
            dense = last.DenseReluDense
            if self.gated:
                inner = Gated.apply(dense.wi_0(h), dense.wi_1(h), *next(sites), drop)
                delta = dense.wo(inner)
            else:
                delta = dense(h)
        _, h = add_norm(x, delta, stack.final_layer_norm)
        return F.dropout(h, drop)


def laid(rows: Sequence[list[int]], end: int, fill: int) -> torch.Tensor:
    """Rows end to end, filled up to the place `end`."""
    array = np.full(end, fill)
    flat = np.concatenate(rows)
    array[: len(flat)] = flat
    return torch.from_numpy(array)
