"""Training written out: Llama's decoder layers, forward and backward, over packed examples.

A step's time is the products with the frozen weights, and what comes on top of them. So here a weight is
unpacked into one shared buffer just before each product, the adapter rides along in the same product,

    forward   [x, h] [W, B]^T      h = dropout(x) A^T
    backward  [dy, dh] [W; A]      dh = dy B          (B holds the scale alpha / r)

projections with the same input (q, k, v; gate, up) are one product, and what is cheap to compute again is not
kept. What such projections have in common is dropout's mask, too, where PEFT draws one for each; each alone
sees what it would there. The layers take the weights of a PEFT model over bitsandbytes and give its adapters
their gradients: one autograd function spans all layers, so that optimizer, checkpoints and saved adapters are
those of PEFT. README.md has the equations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from study.encoding import Example
from study.fast import kernels, nf4
from study.fast.attention import Attention
from study.fast.decoder import dropout_of, head_size, linear_groups
from study.fast.memory import HEAD_ROWS, Activations, Buffers, OnDevice, OnHost, Plan
from study.packing import counting, learned_places, seed_of, shared_prefix, starts, step_rows


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in float32, also of bfloat16 matrices."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class Group:
    """Linear layers with the same input: frozen weights [size, width], adapters A [padded_ranks, width] and B
    [size, padded_ranks], block-diagonal and scaled. `ranks` is the sum of theirs, rounded up to whole 16
    bytes; from there to `padded_ranks`, whole tiles of a product, the adapters are zero."""

    def __init__(self, modules: Sequence, dtype: torch.dtype):
        self.weights = nf4.PackedWeights([module.base_layer.weight for module in modules])
        self.sizes = [module.out_features for module in modules]
        self.width, self.rank = modules[0].in_features, modules[0].r["default"]
        self.scale = modules[0].scaling["default"]
        self.dropout = dropout_of(modules[0])
        self.size, self.ranks = sum(self.sizes), math.ceil(self.rank * len(modules) / 8) * 8
        self.padded_ranks = math.ceil(self.ranks / 64) * 64
        self.a_parameters = [module.lora_A["default"].weight for module in modules]
        self.b_parameters = [module.lora_B["default"].weight for module in modules]
        device = self.weights.packed.device
        self.a = torch.zeros(self.padded_ranks, self.width, dtype=dtype, device=device)
        self.b = torch.zeros(self.size, self.padded_ranks, dtype=dtype, device=device)
        self.a_views = self.a[: self.rank * len(modules)].split(self.rank)
        self.b_views = self.blocks(self.b)

    def blocks(self, matrix: torch.Tensor) -> list[torch.Tensor]:
        """The diagonal blocks [sizes[i], rank] of a matrix like B."""
        rows = matrix.split(self.sizes)
        return [row[:, i * self.rank : (i + 1) * self.rank] for i, row in enumerate(rows)]

    def forward(self, x: torch.Tensor, out: torch.Tensor, buffers: Buffers) -> torch.Tensor:
        """out [rows, size] = x W^T + h B^T, from x in the first columns of `x`, where h is written beside it,
        and what dropout leaves of it in `buffers`; returns h [rows, ranks] times the scale, as B's gradient
        takes it."""
        source = buffers.dropped(len(x), self.width) if self.dropout else x[:, : self.width]
        wide = self.width + self.padded_ranks
        h = torch.mm(source, self.a.T, out=x[:, self.width : wide])  # [rows, padded_ranks]
        weight = buffers.weight[: self.size * wide].view(self.size, wide)
        self.weights.unpack(weight[:, : self.width])
        weight[:, self.width :] = self.b  # [W, B]
        torch.mm(x[:, :wide], weight.T, out=out)  # [rows, wide] @ [wide, size]
        return h[:, : self.ranks] * self.scale

    def backward_h(self, dy: torch.Tensor) -> torch.Tensor:
        """dh [rows, ranks], from dy [rows, size] in the first columns of `dy`, written beside it."""
        dh = dy[:, self.size : self.size + self.ranks]
        return torch.mm(dy[:, : self.size], self.b[:, : self.ranks], out=dh)

    def backward(
        self,
        dy: torch.Tensor,
        buffers: Buffers,
        numbers: torch.Tensor,
        seed: int,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """dx [rows, width] and dh [rows, ranks], from dy [rows, size] in the first columns of `dy`, beside
        which dh is written.

        With dropout dx needs the adapter's share apart, masked; with `out`, where dx is to be written, that
        is left to the caller.
        """
        wide, dh = self.size + self.ranks, self.backward_h(dy)
        weight = buffers.weight[: wide * self.width].view(wide, self.width)
        self.weights.unpack(weight[: self.size])
        if not self.dropout:
            weight[self.size :] = self.a[: self.ranks]  # [W; A]
            return torch.mm(dy[:, :wide], weight, out=out), dh  # [rows, wide] @ [wide, width]
        dx = torch.mm(dy[:, : self.size], weight[: self.size], out=out)
        if out is None:
            kernels.add_adapter(dx, dh, self.a[: self.ranks], numbers, seed, self.dropout)
        return dx, dh

    def gradients(self, da: torch.Tensor, db: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The gradients of `parameters`: da [ranks, width] cut by linear layer, db as it is."""
        return [*da[: self.rank * len(self.sizes)].split(self.rank), *db]

    def parameters(self) -> list[torch.Tensor]:
        """All A [rank, width], then all B [sizes[i], rank]."""
        return [*self.a_parameters, *self.b_parameters]


@dataclass
class Batch:
    """Packed examples, behind the prefix that all of them share, on the device. The last layer needs only
    `rows`, from the first learned place of each example on."""

    ids: torch.Tensor  # [tokens]
    cos: torch.Tensor  # [tokens, head size / 2]
    sin: torch.Tensor
    attention: Attention
    last_attention: Attention  # of `rows` only
    rows: torch.Tensor  # [rows], of the tokens
    learned: torch.Tensor  # [learned], of `rows`
    targets: torch.Tensor  # [learned], the tokens behind those
    numbers: torch.Tensor  # [tokens], by which dropout knows them
    last_numbers: torch.Tensor  # [rows]
    seed: int


@dataclass
class Layout:
    """Where packed examples lie: the shared prefix once, then of each example what is its own."""

    shared: int  # tokens of the prefix
    own: np.ndarray  # [examples], tokens behind it
    firsts: np.ndarray  # [examples], of those the first that is learned
    ids: np.ndarray  # these and what follows as in `Batch`
    positions: np.ndarray
    rows: np.ndarray
    learned: np.ndarray
    numbers: np.ndarray

    def columns(self) -> list[np.ndarray]:
        """ids, positions, rows, learned, targets, numbers and those of the rows."""
        targets, last = self.ids[self.rows[self.learned] + 1], self.numbers[self.rows]
        columns = self.ids, self.positions, self.rows, self.learned, targets, self.numbers, last
        return [column.astype(np.int64) for column in columns]

    def sequences(self) -> tuple[list[int], list[int]]:
        """Lengths of what attention keeps apart, and of each the first query of the last layer's. The shared
        prefix is the first of them: there the last layer has none."""
        lengths, firsts = self.own.tolist(), self.firsts.tolist()
        return ([self.shared, *lengths], [self.shared, *firsts]) if self.shared else (lengths, firsts)


def lay_out(
    examples: Sequence[Example], loss_on: str, of_step: tuple[int, Sequence[int]] | None = None
) -> Layout:
    """Where the tokens of a pass lie, and which of them are learned (`learned_places`). Of a pass that is not
    its whole step, `of_step` says where they would lie in that (`packing.step_rows`)."""
    learned = [learned_places(example, loss_on) for example in examples]
    prefix, offsets = of_step or step_rows(examples, loss_on)
    # What more these few happen to share is dropped for each.
    shared = min(prefix, shared_prefix(examples, loss_on))
    firsts, counts = np.array([places.start for places in learned]), np.array([len(p) for p in learned])
    own = np.array([len(example.ids) for example in examples]) - shared
    firsts -= shared
    wanted = own - firsts  # [examples], rows of the last layer
    positions = np.concatenate([np.arange(shared), counting(own) + shared])
    offsets = np.concatenate([np.zeros(shared, int), np.repeat(offsets, own)])
    return Layout(
        shared=shared,
        own=own,
        firsts=firsts,
        ids=np.concatenate([examples[0].ids[:shared], *(example.ids[shared:] for example in examples)]),
        positions=positions,
        rows=counting(wanted) + np.repeat(shared + starts(own) + firsts, wanted),
        learned=counting(counts) + np.repeat(starts(wanted), counts),
        numbers=positions + np.where(positions < prefix, 0, offsets),
    )


class TrainingLayer:
    """One decoder layer. `forward` keeps what `backward` needs for the adapters' gradients."""

    def __init__(self, layer, config, number: int, last: bool):
        dtype = layer.input_layernorm.weight.dtype
        self.groups = tuple(Group(modules, dtype) for modules in linear_groups(layer))
        self.qkv, self.out, self.gate_up, self.down = self.groups
        self.norm_1, self.norm_2 = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.number, self.last, self.epsilon = number, last, config.rms_norm_eps
        self.hidden, self.inner = config.hidden_size, config.intermediate_size
        self.rotated_heads = config.num_attention_heads + config.num_key_value_heads

    def parameters(self) -> list[torch.Tensor]:
        """The adapters of the groups in turn."""
        return [parameter for group in self.groups for parameter in group.parameters()]

    def seed(self, batch: Batch, group: Group) -> int:
        """Of the dropout of a group's input."""
        # Far apart: of seeds close by, one's mask is the other's with columns swapped.
        return seed_of(batch.seed, self.number, self.groups.index(group)) % 2**31

    def numbers(self, batch: Batch, group: Group) -> torch.Tensor:
        """Of the rows of a group's input, by which dropout knows them."""
        return batch.last_numbers if self.last and group is not self.qkv else batch.numbers

    def attention(self, batch: Batch) -> Attention:
        """Of the rows whose queries this layer needs."""
        return batch.last_attention if self.last else batch.attention

    # Forward

    def forward(self, x, delta, batch: Batch, buffers: Buffers, keep: str) -> tuple:
        """The layer's input is x + delta [rows, hidden], and so is its output: that of the rows of the batch
        that the last layer needs, if it is the last. Returns (x, delta, what `keep` keeps)."""
        a = Activations()
        a.x, a.inverse_1 = self.normalize(x, self.norm_1, self.qkv, batch, buffers, delta)
        self.attend(a, batch, buffers)
        self.project_out(a, batch, buffers)
        self.project_gate_up(a, buffers)
        inner, delta = buffers.inner[: len(a.residual)], torch.empty_like(a.residual)
        dropped = buffers.dropped(len(inner), self.inner)
        p = inner[:, : self.inner]  # [rows, inner]
        of_dropout = dropped, self.numbers(batch, self.down), self.seed(batch, self.down)
        kernels.swiglu(a.gate_up, p, *of_dropout, self.down.dropout)
        a.h_down = self.down.forward(inner, delta, buffers)
        residual = a.residual
        a.drop(keep)
        return residual, delta, a

    def normalize(self, x, weight, group: Group, batch: Batch, buffers: Buffers, delta=None) -> tuple:
        """The norm of x + delta [rows, hidden], the input of `group`, into `buffers`. Returns that sum and
        its inverse root mean squares [rows]."""
        dropped, out = buffers.dropped(len(x), self.hidden), buffers.input[: len(x)]
        of_dropout = dropped, self.numbers(batch, group), self.seed(batch, group)
        return kernels.rms_norm(x, weight, self.epsilon, out, delta, *of_dropout, group.dropout)

    def attend(self, a: Activations, batch: Batch, buffers: Buffers) -> None:
        """From the normed input in `buffers`: rotated qkv, attention's output and softmax denominators, those
        of them that are not there."""
        rows = len(a.x)
        if a.qkv is None:
            a.qkv = a.x.new_empty(rows, self.qkv.size)
            a.h_qkv = self.qkv.forward(buffers.input[:rows], a.qkv, buffers)
            kernels.rotate(a.qkv, batch.cos, batch.sin, self.rotated_heads)
        if a.attended is None:
            a.attended = a.x.new_empty(rows, self.out.width + buffers.adapter_columns)
            a.logsumexp = self.attention(batch).forward(a.qkv, a.attended[:, : self.out.width])

    def project_out(self, a: Activations, batch: Batch, buffers: Buffers) -> None:
        """The residual stream behind attention, and its norm in `buffers`; in the last layer of the rows of
        the batch only."""
        attended, x = (a.attended[batch.rows], a.x[batch.rows]) if self.last else (a.attended, a.x)
        delta = torch.empty_like(x)
        self.drop_attended(attended, batch, buffers)
        a.h_out = self.out.forward(attended, delta, buffers)
        a.residual, a.inverse_2 = self.normalize(x, self.norm_2, self.gate_up, batch, buffers, delta)

    def drop_attended(self, attended: torch.Tensor, batch: Batch, buffers: Buffers) -> torch.Tensor:
        """Attention's output [rows, out] after dropout."""
        x = attended[:, : self.out.width]
        if self.out.dropout:
            dropped = buffers.dropped(*x.shape)
            of_row = self.numbers(batch, self.out), self.seed(batch, self.out)
            kernels.dropout(x, dropped, *of_row, self.out.dropout)
            return dropped
        return x

    def project_gate_up(self, a: Activations, buffers: Buffers) -> None:
        """From the normed residual stream in `buffers`."""
        rows = len(a.residual)
        a.gate_up = a.residual.new_empty(rows, self.gate_up.size + buffers.adapter_columns)
        out = a.gate_up[:, : self.gate_up.size]
        a.h_gate_up = self.gate_up.forward(buffers.input[:rows], out, buffers)

    def compute_again(self, a: Activations, batch: Batch, buffers: Buffers) -> None:
        """What `forward` did not keep."""
        if a.attended is None or a.qkv is None:
            self.normalize(a.x, self.norm_1, self.qkv, batch, buffers)
            self.attend(a, batch, buffers)
        if a.residual is None:
            self.project_out(a, batch, buffers)
            self.project_gate_up(a, buffers)
        elif a.gate_up is None:
            self.normalize(a.residual, self.norm_2, self.gate_up, batch, buffers)
            self.project_gate_up(a, buffers)

    # Backward

    def backward(self, grad: torch.Tensor, a: Activations, batch: Batch, buffers: Buffers) -> tuple:
        """Turn `grad` [rows, hidden + adapter_columns], the gradient of the output, into that of the input,
        in place where the rows are the same. Returns it and the gradients of `parameters`."""
        self.compute_again(a, batch, buffers)
        seeds = {group: (self.numbers(batch, group), self.seed(batch, group)) for group in self.groups}
        of_gate_up, of_down = self.backward_mlp(grad, a, batch, buffers, seeds)
        d_attended, of_out = self.backward_out(grad, a, batch, buffers, seeds)
        if self.last:  # back to all rows
            grad, d_attended = (scatter(part, batch.rows, len(a.x)) for part in (grad, d_attended))
        dqkv = self.backward_attention(d_attended, a, batch, buffers)
        del d_attended
        of_qkv = self.backward_qkv(grad, dqkv, a, batch, buffers, seeds)
        return grad, [*of_qkv, *of_out, *of_gate_up, *of_down]

    def backward_mlp(self, grad, a: Activations, batch: Batch, buffers: Buffers, seeds: dict) -> tuple:
        """Add to `grad` what comes through the MLP. Returns the gradients of the adapters of gate and up, and
        of down."""
        down, gate_up = self.down, self.gate_up
        dy = grad[:, : self.hidden]  # [rows, hidden]
        dp = buffers.inner[: len(dy), : self.inner]  # [rows, inner], p = silu(gate) * up
        _, dh = down.backward(grad, buffers, *seeds[down], out=dp)
        db_down = product(dy.T, a.h_down)  # [hidden, ranks]
        da_down, db_gate_up = kernels.swiglu_backward(  # from here on a.gate_up is its gradient
            a.gate_up, dp, dh, down.a[: down.rank], a.h_gate_up, *seeds[down], down.dropout
        )
        dx, dh = gate_up.backward(a.gate_up, buffers, *seeds[gate_up])  # [rows, hidden], [rows, ranks]
        da_gate_up = self.norm_gradient(gate_up, dh, a.residual, self.norm_2, a.inverse_2, batch, buffers)
        kernels.rms_norm_backward(dx, a.residual, self.norm_2, a.inverse_2, dy)
        a.gate_up = a.residual = None
        db_gate_up = db_gate_up.split(gate_up.sizes)
        return gate_up.gradients(da_gate_up, db_gate_up), down.gradients(da_down, down.blocks(db_down))

    def backward_out(self, grad, a: Activations, batch: Batch, buffers: Buffers, seeds: dict) -> tuple:
        """The gradient of attention's output [rows, out], and those of o_proj's adapter."""
        attended = a.attended[batch.rows] if self.last else a.attended
        dy = grad[:, : self.hidden]  # [rows, hidden]
        d_attended, dh = self.out.backward(grad, buffers, *seeds[self.out])
        db = product(dy.T, a.h_out)  # [hidden, ranks]
        da = product(dh.T, self.drop_attended(attended, batch, buffers))  # [ranks, out]
        return d_attended, self.out.gradients(da, self.out.blocks(db))

    def backward_attention(self, d_attended, a: Activations, batch: Batch, buffers: Buffers) -> torch.Tensor:
        """The gradient of qkv before it was rotated [rows, qkv + adapter_columns], in `buffers`."""
        dqkv = buffers.inner[: len(a.x)]
        if self.last:
            dqkv.zero_()  # queries of other rows have none
        out = a.attended[:, : self.out.width]
        attention = self.attention(batch)
        attention.backward(d_attended, a.qkv, out, a.logsumexp, batch.cos, batch.sin, dqkv)
        a.attended = a.qkv = None
        return dqkv

    def backward_qkv(self, grad, dqkv, a: Activations, batch: Batch, buffers: Buffers, seeds: dict) -> list:
        """Add to `grad` what comes through attention. Returns the gradients of the adapters of q, k and v."""
        qkv = self.qkv
        if self.number:
            dx, dh = qkv.backward(dqkv, buffers, *seeds[qkv])  # [rows, hidden], [rows, ranks]
            kernels.rms_norm_backward(dx, a.x, self.norm_1, a.inverse_1, grad[:, : self.hidden])
        else:  # its input is the embedding, which is frozen
            dh = qkv.backward_h(dqkv)
        db = product(dqkv[:, : qkv.size].T, a.h_qkv)  # [qkv, ranks]
        da = self.norm_gradient(qkv, dh, a.x, self.norm_1, a.inverse_1, batch, buffers)
        return qkv.gradients(da, qkv.blocks(db))

    def norm_gradient(
        self, group: Group, dh, x, weight, inverse, batch: Batch, buffers: Buffers
    ) -> torch.Tensor:
        """A's gradient [ranks, hidden], dh^T dropout(norm(x)); without dropout the norm is not computed
        again."""
        if not group.dropout:
            return product((dh * inverse[:, None]).to(dh.dtype).T, x) * weight
        self.normalize(x, weight, group, batch, buffers)
        return product(dh.T, buffers.dropped(len(x), self.hidden))


def scatter(part: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """`part` [rows, columns] in its rows of a matrix [count, columns], which is 0 elsewhere."""
    whole = part.new_zeros(count, part.shape[1])
    whole[rows] = part
    return whole


class Stack(torch.autograd.Function):
    """All decoder layers: packed examples -> the residual stream [rows of the last layer, hidden]."""

    @staticmethod
    def forward(ctx, fused: "FusedModel", batch: Batch, *parameters: torch.Tensor) -> torch.Tensor:
        x, delta, ctx.kept = F.embedding(batch.ids, fused.embedding), None, []
        for layer in fused.layers:
            x, delta, kept = layer.forward(x, delta, batch, fused.buffers, fused.plan.keep)
            fused.store.put(layer.number, kept)
            ctx.kept.append(kept)
        ctx.fused, ctx.batch = fused, batch
        return x + delta

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        fused, gradients = ctx.fused, []
        grad = F.pad(grad, (0, fused.buffers.adapter_columns))
        for layer in reversed(fused.layers):
            kept = ctx.kept.pop()
            fused.store.get(layer.number, kept)
            grad, more = layer.backward(grad, kept, ctx.batch, fused.buffers)
            gradients = more + gradients
        return None, None, *gradients


class FusedModel:
    """The decoder layers, embedding and head of a PEFT model, for training on packed examples."""

    def __init__(self, model, plan: Plan):
        base, self.config, self.plan = model.get_base_model(), model.config, plan
        self.rotary, self.head = base.model.rotary_emb, base.lm_head
        self.embedding, self.norm = base.model.embed_tokens.weight, base.model.norm.weight
        count = len(base.model.layers)
        self.layers = [
            TrainingLayer(layer, self.config, i, i == count - 1) for i, layer in enumerate(base.model.layers)
        ]
        self.parameters = [parameter for layer in self.layers for parameter in layer.parameters()]
        self.buffers = self.make_buffers()
        self.store = OnDevice()
        if plan.on_host:
            shape, dtype = (plan.tokens, self.config.hidden_size), self.embedding.dtype
            self.store = OnHost([torch.empty(shape, dtype=dtype, pin_memory=True) for _ in self.layers])

    def make_buffers(self) -> Buffers:
        """Buffers for any group of any layer, and for `plan.tokens` rows."""
        groups, config = [group for layer in self.layers for group in layer.groups], self.config
        columns = max(group.padded_ranks for group in groups)
        widest = max(max(g.size * (g.width + g.padded_ranks), (g.size + g.ranks) * g.width) for g in groups)
        tokens, make = self.plan.tokens, self.embedding.new_empty
        return Buffers(
            weight=make(widest),
            input=make(tokens, config.hidden_size + columns),
            inner=make(tokens, max(config.intermediate_size, groups[0].size) + columns),
            masked=make(tokens * max(group.width for group in groups)) if groups[0].dropout else None,
            adapter_columns=columns,
        )

    def refresh(self) -> None:
        """Take the adapters' weights over into the layers."""
        groups = [group for layer in self.layers for group in layer.groups]
        for views, parameters, scale in (
            ([v for g in groups for v in g.a_views], [p for g in groups for p in g.a_parameters], 1.0),
            (
                [v for g in groups for v in g.b_views],
                [p for g in groups for p in g.b_parameters],
                groups[0].scale,
            ),
        ):
            torch._foreach_copy_(views, torch._foreach_mul([p.detach() for p in parameters], scale))

    def batch(self, examples: Sequence[Example], loss_on: str, seed: int, of_step=None) -> Batch:
        """The examples of a pass on the device; `of_step` as in `lay_out`."""
        layout, c = lay_out(examples, loss_on, of_step), self.config
        columns = layout.columns()
        table = kernels.to_device(np.concatenate(columns), self.embedding.device)  # in one copy
        ids, positions, rows, learned, targets, numbers, last_numbers = table.split(list(map(len, columns)))
        cos, sin = self.rotary(torch.empty(0, dtype=torch.float32, device=table.device), positions[None])
        half = cos.shape[-1] // 2  # transformers' tables [1, tokens, head size] hold each angle twice
        shape = c.num_attention_heads, c.num_key_value_heads, head_size(c), table.device, layout.shared
        lengths, firsts = layout.sequences()
        return Batch(
            ids=ids,
            cos=cos[0, :, :half].contiguous(),
            sin=sin[0, :, :half].contiguous(),
            attention=Attention(lengths, [0] * len(lengths), *shape),
            last_attention=Attention(lengths, firsts, *shape),
            rows=rows,
            learned=learned,
            targets=targets,
            numbers=numbers,
            last_numbers=last_numbers,
            seed=seed,
        )

    def loss_sum(
        self,
        examples: Sequence[Example],
        loss_on: str,
        seed: int,
        of_step: tuple[int, Sequence[int]] | None = None,
    ) -> torch.Tensor:
        """Cross-entropy summed over the learned tokens of `examples`, in float32; dropout follows from the
        step's seed and, of a pass that is not its whole step, from where they stand in it (`step_rows`)."""
        with torch.autocast(self.embedding.device.type, enabled=False):
            self.refresh()
            batch = self.batch(examples, loss_on, seed, of_step)
            hidden = Stack.apply(self, batch, *self.parameters)[batch.learned]  # [learned, hidden]
            if len(hidden) <= HEAD_ROWS:
                return self.head_loss(hidden, batch.targets)
            pieces = zip(hidden.split(HEAD_ROWS), batch.targets.split(HEAD_ROWS), strict=True)
            return sum(checkpoint(self.head_loss, *piece, use_reentrant=False) for piece in pieces)

    def head_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy summed over rows [learned, hidden] of the residual stream, by PyTorch."""
        normed = F.rms_norm(hidden.float(), hidden.shape[1:], self.norm.float(), self.config.rms_norm_eps)
        logits = self.head(normed.to(hidden.dtype)).float()  # [learned, vocabulary]
        return F.cross_entropy(logits, targets, reduction="sum")
