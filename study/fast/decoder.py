"""What a decoder layer is, and which models have the layers that are written out here.

A layer has two norms and seven linear layers in four groups, those of a group with the same input (NAMES).
What the fast paths compute is known of the very classes of ARCHITECTURES, and nothing is known of others, of
hooks, or of methods that someone has exchanged: `why_not` and `why_not_train` say why a model is left to its
own layers. Nothing here needs Triton.
"""

import copy
import importlib

import torch

from study.model import base_of

ARCHITECTURES = ("Llama", "Mistral")  # as transformers' classes begin
PARTS = ("RMSNorm", "RotaryEmbedding", "MLP", "Attention", "DecoderLayer", "Model", "ForCausalLM")
NAMES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
NF4_BLOCK = 64  # weights that share a scale
MOST_RANK = 128  # of an adapter: more do not fit the kernels that hold the whole rank


def linear_groups(layer) -> list[list]:
    """The linear layers of a transformers decoder layer, in groups with the same input, as NAMES has them."""
    parents = (layer.self_attn, layer.self_attn, layer.mlp, layer.mlp)
    return [[getattr(parent, name) for name in names] for parent, names in zip(parents, NAMES, strict=True)]


def linear_layers(layer) -> list:
    """The same in a row."""
    return [module for group in linear_groups(layer) for module in group]


def head_size(config) -> int:
    """Columns of a head, of a transformers configuration."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def dropout_of(module) -> float:
    """The probability of dropout before a linear layer's adapter."""
    return getattr(module.lora_dropout["default"], "p", 0.0)


def why_not_train(model) -> str | None:
    """The reason why a PEFT model can't be trained by the layers written out, or None if it can."""
    reason = why_not(model)
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
        f"its adapters' rank exceeds {MOST_RANK}": modules[0].r["default"] > MOST_RANK,
        "its adapters differ in rank, scale or dropout": len(kinds) > 1,
        "what is trained is not the adapters of its layers": trained != adapters,
        "its attention has dropout": any(layer.self_attn.attention_dropout for layer in base.model.layers),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def why_not(model) -> str | None:
    """The reason why the layers written out can't take the place of a model's own, with adapters, merged ones
    or none, or None if they can."""
    base = base_of(model)
    config, name = base.config, type(base).__name__
    if type(base) not in known_models():
        return f"{name} is not {' or '.join(ARCHITECTURES)}"
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
    """The classes of ARCHITECTURES with a head for the next token."""
    return {classes_of(name)["ForCausalLM"] for name in ARCHITECTURES}


def classes_of(architecture: str) -> dict[str, type]:
    """transformers' classes of an architecture by the part of a model that they are."""
    name = architecture.lower()
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    return {part: getattr(modeling, architecture + part) for part in PARTS}


def known_modules() -> set[type]:
    """The classes of all modules that a model and its adapters may consist of."""
    from bitsandbytes.nn import Linear4bit
    from peft import LoraModel, PeftModel, PeftModelForCausalLM
    from peft.tuners.lora import Linear, bnb
    from transformers.activations import SiLUActivation

    own = {known for name in ARCHITECTURES for known in classes_of(name).values()}
    n = torch.nn
    plain = {n.Embedding, n.Linear, n.SiLU, n.Dropout, n.Identity}
    plain |= {n.ModuleList, n.ModuleDict, n.ParameterDict, SiLUActivation, Linear4bit}
    adapted = {Linear, bnb.Linear4bit, LoraModel, PeftModel, PeftModelForCausalLM}
    return own | plain | adapted


def why_not_modules(model) -> str | None:
    """Like `why_not`, for what its modules are, whoever made them."""
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
    """Like `why_not`, for a linear layer, with an adapter or without."""
    layer = getattr(module, "base_layer", module)
    state = getattr(layer.weight, "quant_state", None)
    if state and (state.quant_type != "nf4" or not state.nested or state.blocksize != NF4_BLOCK):
        return "its 4-bit weights are not NF4 with double quantization"
    if state and layer.in_features % NF4_BLOCK:
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
    """Like `why_not`, for the precision, the scale and the epsilon that it computes with."""
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
    """Like `why_not`, for the rotary table, found out by use of a copy, which some kinds change."""
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
