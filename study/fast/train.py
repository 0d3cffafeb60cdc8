"""The fast path of fine-tuning: Llama's decoder layers with forward and backward written out.

A step's time is the products with the frozen weights, and what comes on top of them. So here a weight is
unpacked into one shared buffer just before each product, the adapter rides along in the same product,

    forward   [x, h] [W, B]^T      h = dropout(x) A^T
    backward  [dy, dh] [W; A]      dh = dy B          (B holds the scale alpha / r)

projections with the same input (q, k, v; gate, up) are one product, and what is cheap to compute again is not
kept. What such projections have in common is dropout's mask, too, where PEFT draws one for each; each alone
sees what it would there. The layers take the weights of a PEFT model over bitsandbytes and give its adapters
their gradients: one autograd function spans all layers, so that optimizer, checkpoints and saved adapters are
those of PEFT.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from study.encoding import Example
from study.fast import kernels, nf4
from study.model import base_of
from study.packing import common_beginning, learned_places, seed_of

KEEPS = ("all", "attention", "middle", "input")  # what a layer keeps for its backward, from most to least
NAMES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
HEAD_ROWS = 4096  # logits at a time; more are computed again in the backward
SHARED_LEAST = 8  # tokens that examples begin with alike, from which on they are computed once
UNPACK_TOKENS = 300  # tokens in whose time a pass unpacks all weights (7B on an H200)
LAUNCH_TOKENS = 2400  # and in whose time its kernels are launched


def why_not(model) -> str | None:
    """The reason why a PEFT model can't be trained on this path, or None if it can."""
    reason = why_not_base(model)
    if reason:
        return reason
    base = model.get_base_model()
    modules = [module for layer in base.model.layers for module in linear_layers(layer)]
    if any("default" not in getattr(module, "lora_A", {}) for module in modules):
        return "not every linear layer has an adapter"
    adapters = {id(part["default"].weight) for module in modules for part in (module.lora_A, module.lora_B)}
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    kinds = {(module.r["default"], module.scaling["default"], dropout_of(module)) for module in modules}
    reasons = {
        "its weights are not in 4 bits": not all(
            hasattr(module.base_layer.weight, "quant_state") for module in modules
        ),
        f"its adapters' rank exceeds {kernels.MOST_RANK}": modules[0].r["default"] > kernels.MOST_RANK,
        "its adapters differ in rank, scale or dropout": len(kinds) > 1,
        "what is trained is not the adapters of its layers": trained != adapters,
        "its attention has dropout": any(layer.self_attn.attention_dropout for layer in base.model.layers),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def why_not_base(model) -> str | None:
    """The reason why layers written out for Llama can't take the place of a model's own, with adapters or
    without, or None.

    What they compute is known of the very classes that are listed here, and nothing is known of others, of
    hooks, or of methods that someone has exchanged.
    """
    base = base_of(model)
    config, name = base.config, type(base).__name__
    if type(base) not in known_models():
        return f"{name} is not Llama or Mistral"
    plain = type(base.model.embed_tokens) is torch.nn.Embedding and type(base.lm_head) is torch.nn.Linear
    reasons = {
        "its embedding or head is quantized or has an adapter": not plain,
        "its head has a bias": plain and base.lm_head.bias is not None,
        "its embedding limits norms": plain and base.model.embed_tokens.max_norm is not None,
        "its attention has a window": getattr(config, "sliding_window", None),
        "its activation is not SiLU": getattr(config, "hidden_act", None) != "silu",
        f"its heads have {head_size(config)} columns": head_size(config) not in (32, 64, 128),
        "its layers are not as many as configured": len(base.model.layers) != config.num_hidden_layers,
    }
    for reason, holds in reasons.items():
        if holds:
            return reason
    return why_not_modules(model) or why_not_numbers(base) or why_not_rotary(base)


def known_models() -> set[type]:
    from transformers import LlamaForCausalLM, MistralForCausalLM

    return {LlamaForCausalLM, MistralForCausalLM}


def known_modules() -> set[type]:
    """The classes of all modules that a model and its adapters may consist of."""
    from bitsandbytes.nn import Linear4bit
    from peft import LoraModel, PeftModel, PeftModelForCausalLM
    from peft.tuners.lora import Linear, bnb
    from transformers.activations import SiLUActivation
    from transformers.models.llama import modeling_llama
    from transformers.models.mistral import modeling_mistral

    parts = ("RMSNorm", "RotaryEmbedding", "MLP", "Attention", "DecoderLayer", "Model", "ForCausalLM")
    own = {getattr(modeling_llama, f"Llama{part}") for part in parts}
    own |= {getattr(modeling_mistral, f"Mistral{part}") for part in parts}
    n = torch.nn
    plain = {n.Embedding, n.Linear, n.SiLU, n.Dropout, n.Identity}
    plain |= {n.ModuleList, n.ModuleDict, n.ParameterDict, SiLUActivation, Linear4bit}
    adapted = {Linear, bnb.Linear4bit, LoraModel, PeftModel, PeftModelForCausalLM}
    return own | plain | adapted


def why_not_modules(model) -> str | None:
    """Likewise for what its modules are, whoever made them."""
    layers = base_of(model).model.layers
    modules = [module for layer in layers for module in linear_layers(layer)]
    packed = {hasattr(getattr(module, "base_layer", module).weight, "quant_state") for module in modules}
    if len(packed) > 1:
        return "some of its weights are in 4 bits, others not"
    known = known_modules()
    for name, module in model.named_modules():
        if type(module) not in known:
            return f"{name.removeprefix('base_model.model.')} is a {type(module).__name__}"
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if "forward" in vars(module) or any(getattr(module, hook) for hook in hooks):
            return f"something is hooked into its {type(module).__name__}"
    return next(filter(None, map(why_not_layer, modules)), None)


def why_not_layer(module) -> str | None:
    """Likewise for a linear layer, with an adapter or without."""
    layer = getattr(module, "base_layer", module)
    state = getattr(layer.weight, "quant_state", None)
    if state and (state.quant_type != "nf4" or not state.nested or state.blocksize != nf4.NF4_BLOCK):
        return "its 4-bit weights are not NF4 with double quantization"
    if state and layer.in_features % nf4.NF4_BLOCK:
        return "its weights have rows of broken blocks"
    adapters = dict(getattr(module, "lora_A", {}))
    both = [*adapters.values(), *getattr(module, "lora_B", {}).values()]
    if layer.bias is not None or any(adapter.bias is not None for adapter in both):
        return "its linear layers have biases"
    if any(type(adapter) is not torch.nn.Linear for adapter in both) or getattr(module, "lora_variant", None):
        return "its adapters are not plain LoRA"
    if adapters and (set(adapters) != {"default"} or module.active_adapters != ["default"]):
        return "its adapters are several or not active"
    return (
        "its adapters are merged or disabled"
        if adapters and (module.merged or module.disable_adapters)
        else None
    )


def why_not_numbers(base) -> str | None:
    """Likewise for the precision, the scale and the epsilon that it computes with."""
    linear = [getattr(m, "base_layer", m) for layer in base.model.layers for m in linear_layers(layer)]
    packed = [layer for layer in linear if hasattr(layer.weight, "quant_state")]
    norms = [
        norm
        for layer in base.model.layers
        for norm in (layer.input_layernorm, layer.post_attention_layernorm)
    ]
    dense = [base.model.embed_tokens, base.model.norm, base.lm_head, *norms, *({*linear} - {*packed})]
    dtype, scale = dense[0].weight.dtype, head_size(base.config) ** -0.5
    computing = {layer.compute_dtype for layer in packed}
    # Values that were coarser than the dtype once are so in the model's own layers alone.
    coarse = any(torch.finfo(layer.weight.quant_state.dtype).eps > torch.finfo(dtype).eps for layer in packed)
    reasons = {
        "some of its layers are the same ones": len({id(layer.weight) for layer in linear}) < len(linear),
        "its weights have several dtypes": any(module.weight.dtype != dtype for module in dense),
        f"its 4-bit layers don't compute in {dtype}": computing and computing != {dtype},
        "its 4-bit weights stand for coarser ones": coarse,
        "its norms differ in epsilon": any(
            norm.variance_epsilon != base.config.rms_norm_eps for norm in (*norms, base.model.norm)
        ),
        "its attention has a scale of its own": any(
            layer.self_attn.scaling != scale for layer in base.model.layers
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def why_not_rotary(base) -> str | None:
    """Likewise for the rotary table, found out by use of a copy, which some kinds change."""
    table, device = copy.deepcopy(base.model.rotary_emb), base.model.embed_tokens.weight.device
    near = torch.arange(8, device=device)[None]
    far = torch.cat([near, near.new_full((1, 1), 8 * base.config.max_position_embeddings)], 1)
    x = torch.empty(0, dtype=torch.float32, device=device)
    alone, beside = torch.stack(table(x, near)), torch.stack(table(x, far))[:, :, :8]
    size = head_size(base.config)
    if alone.shape[-1] != size or not torch.allclose(alone[..., : size // 2], alone[..., size // 2 :]):
        return "its rotary embedding does not turn whole heads"
    same = torch.allclose(alone, beside, atol=1e-4)
    return None if same else "its rotary embedding depends on the longest sequence"


def dropout_of(module) -> float:
    """Of a linear layer's adapter."""
    return getattr(module.lora_dropout["default"], "p", 0.0)


@dataclass(frozen=True)
class Plan:
    """How a step is computed: at most `tokens` at once, what each layer keeps, and whether on the host."""

    tokens: int
    keep: str
    on_host: bool = False

    def __str__(self) -> str:
        kept = {
            "all": "nothing computed twice",
            "attention": "MLPs computed twice",
            "middle": "MLPs and attention's projections computed twice",
            "input": "layers computed twice",
        }
        return kept[self.keep] + (", their inputs in host memory" if self.on_host else "")


def choose_plan(
    model,
    free: float,
    longest: int,
    step: tuple[int, int],
    tokens: int | None = None,
    checkpointing: str = "auto",
    shared: int = 0,
) -> Plan:
    """The fastest plan for steps of `step` (tokens, learned tokens) that fits `free` bytes, of those that
    --max_tokens_per_batch (or None) and --gradient_checkpointing allow; if none fits, the most frugal.
    `shared` is how many tokens all examples begin with."""
    step_tokens, learned = max(step[0], longest), step[1]
    plans = []
    keeps = {"on": ("input",), "off": ("all",)}.get(checkpointing, KEEPS)
    for keep, on_host in [
        *((keep, False) for keep in keeps),
        *([("input", True)] if "input" in keeps else []),
    ]:
        fixed, each, extra = costs(model, keep, on_host, learned, shared)
        fitting = int((free - fixed) / each)
        if fitting >= (tokens or longest):
            most = tokens or min(fitting, step_tokens)
            passes = math.ceil(step_tokens / most)
            each_pass = max(LAUNCH_TOKENS, step_tokens / passes + UNPACK_TOKENS)
            slower = (1 + extra) * each_pass * passes
            plans.append((slower, Plan(min(most, math.ceil(step_tokens / passes) + longest), keep, on_host)))
    return (
        min(plans, key=lambda plan: plan[0])[1]
        if plans
        else Plan(tokens or longest, keeps[-1], keeps[-1] == "input")
    )


def costs(model, keep: str, on_host: bool, learned: int, shared: int) -> tuple[float, float, float]:
    """What a plan takes: bytes, bytes for each token, and the share of a step's time that it adds.

    Examples that share more than `shared` tokens save more rows than that takes.
    """
    lora = next(iter(model.peft_config.values()))
    config, trainable = model.config, sum(p.numel() for p in model.parameters() if p.requires_grad)
    rank, layers = lora.r, config.num_hidden_layers
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    out = heads * head_size(config)
    qkv, room = out + 2 * key_heads * head_size(config), math.ceil(3 * rank / 64) * 64
    parts = {"gate_up": 2 * inner + room, "qkv": qkv, "rest": out + room + hidden}
    left_out = KEEPS.index(keep)
    kept = sum(list(parts.values())[left_out:]) + (0 if on_host else hidden) + 8 * rank
    work = sum(parts.values()) + max(inner, qkv) + 3 * (hidden + room)  # of one layer
    work += max(inner, hidden) if lora.lora_dropout else 0
    logits = min(HEAD_ROWS, learned) * config.vocab_size * 14
    fixed = 2 * max(qkv, 2 * inner) * (hidden + room) + trainable * 20 + logits
    chunk = shared * key_heads * 2 * head_size(config) * 4  # `Attention.shared_dkv`, for each chunk of rows
    again = hidden * sum((2 * inner, qkv, out)[:left_out])
    return (
        fixed + chunk,
        2 * (kept * layers + work) + chunk / kernels.SHARED_CHUNK,
        0.45 * again / (hidden * (3 * inner + qkv + out)) + 0.01 * on_host,
    )


def head_size(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def linear_layers(layer) -> list:
    return [
        getattr(layer.self_attn if i < 2 else layer.mlp, name)
        for i, group in enumerate(NAMES)
        for name in group
    ]


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in float32, also of bfloat16 matrices."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@dataclass
class Space:
    """Memory that all layers share: one unpacked weight, inputs of the products with room for h, what dropout
    leaves of them. `product` also holds the gradients of the MLP's product and of qkv."""

    weight: torch.Tensor
    input: torch.Tensor
    product: torch.Tensor
    dropped: torch.Tensor | None
    room: int

    def left(self, rows: int, width: int) -> torch.Tensor | None:
        """A matrix for what dropout leaves, or None without dropout."""
        return None if self.dropped is None else self.dropped[: rows * width].view(rows, width)


class Group:
    """Linear layers with the same input: frozen weights [sizes, width], adapters A [room, width] and B
    [sizes, room], block-diagonal and scaled. `ranks` is the sum of theirs, rounded up to whole 16 bytes; from
    there to `room`, whole tiles of a product, the adapters are zero."""

    def __init__(self, modules: Sequence, dtype: torch.dtype):
        self.weights = nf4.PackedWeights([module.base_layer.weight for module in modules])
        self.sizes = [module.out_features for module in modules]
        self.width, self.rank = modules[0].in_features, modules[0].r["default"]
        self.scale = modules[0].scaling["default"]
        self.dropout = dropout_of(modules[0])
        self.size, self.ranks = sum(self.sizes), math.ceil(self.rank * len(modules) / 8) * 8
        self.a_parameters = [module.lora_A["default"].weight for module in modules]
        self.b_parameters = [module.lora_B["default"].weight for module in modules]
        device = self.weights.packed.device
        self.room = math.ceil(self.ranks / 64) * 64
        self.a = torch.zeros(self.room, self.width, dtype=dtype, device=device)
        self.b = torch.zeros(self.size, self.room, dtype=dtype, device=device)
        self.a_views = self.a[: self.rank * len(modules)].split(self.rank)
        self.b_views = self.blocks(self.b)

    def blocks(self, matrix: torch.Tensor) -> list[torch.Tensor]:
        """The diagonal blocks of a matrix like B."""
        rows = matrix.split(self.sizes)
        return [row[:, i * self.rank : (i + 1) * self.rank] for i, row in enumerate(rows)]

    def forward(self, x: torch.Tensor, out: torch.Tensor, space: Space) -> torch.Tensor:
        """out [rows, size] = x W^T + h B^T, from x in the first columns of `x`, and what dropout leaves of it
        in `space`; returns h [rows, ranks] times the scale, as B's gradient takes it."""
        source = space.left(len(x), self.width) if self.dropout else x[:, : self.width]
        wide = self.width + self.room
        h = torch.mm(source, self.a.T, out=x[:, self.width : wide])
        weight = space.weight[: self.size * wide].view(self.size, wide)
        self.weights.unpack(weight[:, : self.width])
        weight[:, self.width :] = self.b
        torch.mm(x[:, :wide], weight.T, out=out)
        return h[:, : self.ranks] * self.scale

    def backward_h(self, dy: torch.Tensor) -> torch.Tensor:
        """dh [rows, ranks], from dy in the first columns of `dy`, written beside it."""
        dh = dy[:, self.size : self.size + self.ranks]
        return torch.mm(dy[:, : self.size], self.b[:, : self.ranks], out=dh)

    def backward(self, dy: torch.Tensor, space: Space, seed: int, out: torch.Tensor | None = None) -> tuple:
        """dx [rows, width] and dh [rows, ranks], from dy in the first columns of `dy`, which has room for dh.

        With dropout dx needs the adapter's share apart, masked; with `out`, where dx is to be written, that
        is left to the caller.
        """
        wide, dh = self.size + self.ranks, self.backward_h(dy)
        weight = space.weight[: wide * self.width].view(wide, self.width)
        self.weights.unpack(weight[: self.size])
        if not self.dropout:
            weight[self.size :] = self.a[: self.ranks]
            return torch.mm(dy[:, :wide], weight, out=out), dh
        dx = torch.mm(dy[:, : self.size], weight[: self.size], out=out)
        if out is None:
            kernels.add_adapter(dx, dh, self.a[: self.ranks], seed, self.dropout)
        return dx, dh


@dataclass
class Batch:
    """Packed examples, behind the tokens that all of them begin with. The last layer needs only `rows`, from
    the first learned place of each example on."""

    ids: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    attention: kernels.Attention
    last_attention: kernels.Attention
    rows: torch.Tensor
    places: torch.Tensor  # of the learned places among `rows`
    targets: torch.Tensor
    seed: int


class Layer:
    """One decoder layer. `forward` saves what `backward` needs for the adapters' gradients."""

    def __init__(self, layer, config, number: int, last: bool):
        modules, self.config = linear_layers(layer), config
        dtype = layer.input_layernorm.weight.dtype
        self.qkv, self.out = Group(modules[:3], dtype), Group(modules[3:4], dtype)
        self.gate_up, self.down = Group(modules[4:6], dtype), Group(modules[6:], dtype)
        self.groups = (self.qkv, self.out, self.gate_up, self.down)
        self.norm_1, self.norm_2 = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.number, self.last, self.epsilon = number, last, config.rms_norm_eps
        self.hidden, self.inner = config.hidden_size, config.intermediate_size

    def parameters(self) -> list:
        return [p for group in self.groups for p in (*group.a_parameters, *group.b_parameters)]

    def seed(self, batch: Batch, group: Group) -> int:
        # Far apart: of seeds close by, one's mask is the other's with columns swapped.
        return seed_of(batch.seed, self.number, self.groups.index(group)) % 2**31

    def forward(self, x, delta, batch: Batch, space: Space, keep: str) -> tuple:
        """The layer's input is x + delta [rows, hidden], and so is its output. Returns (x, delta, saved)."""
        s = SimpleNamespace()
        s.x, s.inverse_1 = self.normalize(x, self.norm_1, self.qkv, batch, space, delta)
        self.attend(s, batch, space)
        self.project_out(s, batch, space)
        self.project_gate_up(s, batch, space)
        inner, delta = space.product[: len(s.middle)], torch.empty_like(s.middle)
        left = space.left(len(inner), self.inner)
        kernels.swiglu(
            s.gate_up, inner[:, : self.inner], left, self.seed(batch, self.down), self.down.dropout
        )
        s.h_down = self.down.forward(inner, delta, space)
        middle = s.middle
        for name in {"all": (), "attention": ("gate_up",), "middle": ("gate_up", "qkv")}.get(
            keep, ("gate_up", "qkv", "attended", "logsumexp", "middle")
        ):
            delattr(s, name)
        return middle, delta, s

    def normalize(self, x, weight, group: Group, batch: Batch, space: Space, delta=None) -> tuple:
        """The norm of x + delta, the input of `group`, into `space`. Returns that sum and its inverse root
        mean squares."""
        left, seed = space.left(len(x), self.hidden), self.seed(batch, group)
        out = space.input[: len(x)]
        return kernels.rms_norm(x, weight, self.epsilon, out, delta, left, seed, group.dropout)

    def attend(self, s, batch: Batch, space: Space) -> None:
        """From the normed input in `space`: rotated qkv, attention's output and softmax denominators."""
        c, rows = self.config, len(s.x)
        if not hasattr(s, "qkv"):
            s.qkv = s.x.new_empty(rows, self.qkv.size)
            s.h_qkv = self.qkv.forward(space.input[:rows], s.qkv, space)
            kernels.rotate(s.qkv, batch.cos, batch.sin, c.num_attention_heads + c.num_key_value_heads)
        if not hasattr(s, "attended"):
            s.attended = s.x.new_empty(rows, self.out.width + space.room)
            attention = batch.last_attention if self.last else batch.attention
            s.logsumexp = attention.forward(s.qkv, s.attended[:, : self.out.width])

    def project_out(self, s, batch: Batch, space: Space) -> None:
        """The middle of the residual stream, and its norm in `space`; in the last layer of `rows` only."""
        attended, x = (s.attended[batch.rows], s.x[batch.rows]) if self.last else (s.attended, s.x)
        delta = torch.empty_like(x)
        self.drop_attended(attended, batch, space)
        s.h_out = self.out.forward(attended, delta, space)
        s.middle, s.inverse_2 = self.normalize(x, self.norm_2, self.gate_up, batch, space, delta)

    def drop_attended(self, attended: torch.Tensor, batch: Batch, space: Space) -> torch.Tensor:
        """Attention's output after dropout."""
        x = attended[:, : self.out.width]
        if self.out.dropout:
            left = space.left(*x.shape)
            kernels.dropout(x, left, self.seed(batch, self.out), self.out.dropout)
            return left
        return x

    def project_gate_up(self, s, batch: Batch, space: Space) -> None:
        rows = len(s.middle)
        s.gate_up = s.x.new_empty(rows, self.gate_up.size + space.room)
        out = s.gate_up[:, : self.gate_up.size]
        s.h_gate_up = self.gate_up.forward(space.input[:rows], out, space)

    def compute_again(self, s, batch: Batch, space: Space) -> None:
        """What `forward` did not keep."""
        if not hasattr(s, "attended") or not hasattr(s, "qkv"):
            self.normalize(s.x, self.norm_1, self.qkv, batch, space)
            self.attend(s, batch, space)
        if not hasattr(s, "middle"):
            self.project_out(s, batch, space)
            self.project_gate_up(s, batch, space)
        elif not hasattr(s, "gate_up"):
            self.normalize(s.middle, self.norm_2, self.gate_up, batch, space)
            self.project_gate_up(s, batch, space)

    def backward(self, grad: torch.Tensor, s, batch: Batch, space: Space) -> tuple[torch.Tensor, list]:
        """Turn `grad` [rows, hidden + room], the gradient of the output, into that of the input, in place
        where the rows are the same. Returns it and the gradients of `parameters`."""
        self.compute_again(s, batch, space)
        seeds = {group: self.seed(batch, group) for group in self.groups}

        dy = grad[:, : self.hidden]
        dp = space.product[: len(dy), : self.inner]
        _, dh = self.down.backward(grad, space, seeds[self.down], out=dp)
        db_down = product(dy.T, s.h_down)
        da_down, db_gate_up = self.through_swiglu(s, dp, dh, seeds[self.down])

        dx, dh = self.gate_up.backward(s.gate_up, space, seeds[self.gate_up])
        da_gate_up = self.norm_gradient(self.gate_up, dh, s.middle, self.norm_2, s.inverse_2, batch, space)
        kernels.rms_norm_backward(dx, s.middle, self.norm_2, s.inverse_2, dy)
        del dx, s.gate_up, s.middle

        attended = s.attended[batch.rows] if self.last else s.attended
        d_attended, dh = self.out.backward(grad, space, seeds[self.out])
        db_out = product(dy.T, s.h_out)
        da_out = product(dh.T, self.drop_attended(attended, batch, space))
        del attended
        if self.last:  # back to all rows
            grad, d_attended = (scatter(part, batch.rows, len(s.x)) for part in (grad, d_attended))
            dy = grad[:, : self.hidden]

        dqkv = space.product[: len(s.x)]
        if self.last:
            dqkv.zero_()
        attention = batch.last_attention if self.last else batch.attention
        out = s.attended[:, : self.out.width]
        attention.backward(d_attended, s.qkv, out, s.logsumexp, batch.cos, batch.sin, dqkv)
        del d_attended, out, s.attended, s.qkv

        if self.number:
            dx, dh = self.qkv.backward(dqkv, space, seeds[self.qkv])
            kernels.rms_norm_backward(dx, s.x, self.norm_1, s.inverse_1, dy)
        else:  # its input is the embedding, which is frozen
            dh = self.qkv.backward_h(dqkv)
        db_qkv = product(dqkv[:, : self.qkv.size].T, s.h_qkv)
        da_qkv = self.norm_gradient(self.qkv, dh, s.x, self.norm_1, s.inverse_1, batch, space)
        gradients = []
        for group, da, db in (
            (self.qkv, da_qkv, self.qkv.blocks(db_qkv)),
            (self.out, da_out, self.out.blocks(db_out)),
            (self.gate_up, da_gate_up, db_gate_up),
            (self.down, da_down, self.down.blocks(db_down)),
        ):
            gradients += [*da[: group.rank * len(group.sizes)].split(group.rank), *db]
        return grad, gradients

    def through_swiglu(self, s, dp, dh, seed: int) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Turn s.gate_up into its gradient; A's of down and B's of gate and of up come with it."""
        down = self.down
        da, db = kernels.swiglu_backward(
            s.gate_up, dp, dh, down.a[: down.rank], s.h_gate_up, seed, down.dropout
        )
        return da, db.split(self.gate_up.sizes)

    def norm_gradient(self, group: Group, dh, x, weight, inverse, batch: Batch, space: Space) -> torch.Tensor:
        """A's gradient, dh^T dropout(norm(x)); without dropout the norm is not computed again."""
        if not group.dropout:
            return product((dh * inverse[:, None]).to(dh.dtype).T, x) * weight
        self.normalize(x, weight, group, batch, space)
        return product(dh.T, space.left(len(x), self.hidden))


def scatter(part: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    whole = part.new_zeros(count, part.shape[1])
    whole[rows] = part
    return whole


class Stack(torch.autograd.Function):
    """All decoder layers: packed examples -> the residual stream [rows of the last layer, hidden]."""

    @staticmethod
    def forward(ctx, fused: "FusedModel", batch: Batch, *parameters: torch.Tensor) -> torch.Tensor:
        x, delta, ctx.saved = F.embedding(batch.ids, fused.embedding), None, []
        for layer in fused.layers:
            x, delta, saved = layer.forward(x, delta, batch, fused.space, fused.plan.keep)
            fused.store.put(layer.number, saved)
            ctx.saved.append(saved)
        ctx.fused, ctx.batch = fused, batch
        return x + delta

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        fused, gradients = ctx.fused, []
        grad = F.pad(grad, (0, fused.space.room))
        for layer in reversed(fused.layers):
            saved = ctx.saved.pop()
            fused.store.get(layer.number, saved)
            grad, more = layer.backward(grad, saved, ctx.batch, fused.space)
            gradients = more + gradients
        return None, None, *gradients


class Kept:
    """Layer inputs stay on the device."""

    def put(self, number: int, saved) -> None:
        pass

    get = put


@dataclass
class OnHost:
    """Layer inputs wait in pinned host memory; each is fetched while the layer above it is at work."""

    host: list[torch.Tensor]
    stream: torch.cuda.Stream = field(default_factory=torch.cuda.Stream)
    coming: dict[int, tuple] = field(default_factory=dict)

    def put(self, number: int, saved) -> None:
        rows = len(saved.x)
        self.coming.pop(number, None)  # of a pass that ran out of memory
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.host[number][:rows].copy_(saved.x, non_blocking=True)
        saved.x.record_stream(self.stream)
        saved.rows, saved.x = rows, None

    def get(self, number: int, saved) -> None:
        if number not in self.coming:
            self.fetch(number, saved.rows)
        saved.x, ready = self.coming.pop(number)
        torch.cuda.current_stream().wait_event(ready)
        if number:
            self.fetch(number - 1, saved.rows)

    def fetch(self, number: int, rows: int) -> None:
        x = torch.empty(rows, self.host[number].shape[1], dtype=self.host[number].dtype, device="cuda")
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            x.copy_(self.host[number][:rows], non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(self.stream)
        x.record_stream(self.stream)
        self.coming[number] = x, ready


def starts(lengths: np.ndarray) -> np.ndarray:
    """Where each of several runs begins that lie end to end."""
    return np.cumsum(lengths) - lengths


def counting(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... lengths[0] - 1, 0, 1, ... lengths[1] - 1, ..."""
    return np.arange(lengths.sum()) - np.repeat(starts(lengths), lengths)


def shared_tokens(examples: Sequence[Example], loss_on: str) -> int:
    """How many tokens that none learns all of several examples begin with; 0 where that is not worth it."""
    most = min(learned_places(example, loss_on).start for example in examples)
    count = common_beginning([example.ids[:most] for example in examples])
    return count if len(examples) > 1 and count >= SHARED_LEAST else 0


class FusedModel:
    """The decoder layers, embedding and head of a PEFT model, for training on packed examples."""

    def __init__(self, model, plan: Plan):
        base, config = model.get_base_model(), model.config
        self.config, self.rotary = config, base.model.rotary_emb
        self.embedding, self.norm, self.head = (
            base.model.embed_tokens.weight,
            base.model.norm.weight,
            base.lm_head,
        )
        layers = base.model.layers
        self.layers = [Layer(layer, config, i, i == len(layers) - 1) for i, layer in enumerate(layers)]
        self.plan = plan
        self.parameters = [parameter for layer in self.layers for parameter in layer.parameters()]
        groups = [group for layer in self.layers for group in layer.groups]
        room = max(group.room for group in groups)
        widest = max(max(g.size * (g.width + g.room), (g.size + g.ranks) * g.width) for g in groups)
        make = self.embedding.new_empty
        self.space = Space(
            weight=make(widest),
            input=make(plan.tokens, config.hidden_size + room),
            product=make(plan.tokens, max(config.intermediate_size, groups[0].size) + room),
            dropped=make(plan.tokens * max(group.width for group in groups)) if groups[0].dropout else None,
            room=room,
        )
        self.store = Kept()
        if plan.on_host:
            shape, dtype = (plan.tokens, config.hidden_size), self.embedding.dtype
            self.store = OnHost([torch.empty(shape, dtype=dtype, pin_memory=True) for _ in layers])

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

    def batch(self, examples: Sequence[Example], loss_on: str, seed: int) -> Batch:
        learned = [learned_places(example, loss_on) for example in examples]
        shared = shared_tokens(examples, loss_on)
        firsts, counts = np.array([places.start for places in learned]), np.array([len(p) for p in learned])
        own = np.array([len(example.ids) for example in examples]) - shared
        firsts -= shared
        ids = np.concatenate([examples[0].ids[:shared], *(example.ids[shared:] for example in examples)])
        positions = np.concatenate([np.arange(shared), counting(own) + shared])
        rows = counting(own - firsts) + np.repeat(shared + starts(own) + firsts, own - firsts)
        places = counting(counts) + np.repeat(starts(own - firsts), counts)
        columns = [
            column.astype(np.int64) for column in (ids, positions, rows, places, ids[rows[places] + 1])
        ]
        table = kernels.to_device(np.concatenate(columns), self.embedding.device)
        ids, positions, rows, places, targets = table.split([len(column) for column in columns])
        cos, sin = self.rotary(torch.empty(0, dtype=torch.float32, device=table.device), positions[None])
        half, c = cos.shape[-1] // 2, self.config
        lengths, all_queries, wanted = own.tolist(), [0] * len(own), firsts.tolist()
        if shared:
            lengths, all_queries, wanted = [shared, *lengths], [0, *all_queries], [shared, *wanted]
        shape = c.num_attention_heads, c.num_key_value_heads, head_size(c), table.device, shared
        return Batch(
            ids=ids,
            cos=cos[0, :, :half].contiguous(),
            sin=sin[0, :, :half].contiguous(),
            attention=kernels.Attention(lengths, all_queries, *shape),
            last_attention=kernels.Attention(lengths, wanted, *shape),
            rows=rows,
            places=places,
            targets=targets,
            seed=seed,
        )

    def loss_sum(self, examples: Sequence[Example], loss_on: str, seed: int) -> torch.Tensor:
        """Cross-entropy summed over the learned tokens of `examples`, in float32; dropout follows from the
        seed."""
        with torch.autocast(self.embedding.device.type, enabled=False):
            self.refresh()
            batch = self.batch(examples, loss_on, seed)
            hidden = Stack.apply(self, batch, *self.parameters)[batch.places]
            if len(hidden) <= HEAD_ROWS:
                return self.head_loss(hidden, batch.targets)
            pieces = zip(hidden.split(HEAD_ROWS), batch.targets.split(HEAD_ROWS), strict=True)
            return sum(checkpoint(self.head_loss, *piece, use_reentrant=False) for piece in pieces)

    def head_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(hidden.float(), hidden.shape[1:], self.norm.float(), self.config.rms_norm_eps)
        return F.cross_entropy(self.head(normed.to(hidden.dtype)).float(), targets, reduction="sum")
