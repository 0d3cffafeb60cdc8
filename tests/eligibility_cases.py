"""Print, as JSON, what the fast paths make of each field of a model's, an adapter's and a quantization's
configuration, changed in turn: the reason why they refuse it, or how far they are from the model's own
layers."""

import copy
import inspect
import json
import tempfile
from collections.abc import Callable
from dataclasses import fields

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, MistralConfig

from study.fast import nf4, self_check
from study.fast.decoder import NAMES, why_not, why_not_train
from study.fast.memory import Plan
from study.fast.train import FusedModel
from study.model import merge
from study.packing import learned_places
from tests.exactness import make_examples
from tests.mutations import interpret_quickly

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.08,
}
QUANTIZATION = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.float32,
}
LORA = {
    "r": 4,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}
PROJECTIONS = [name for names in NAMES for name in names]
EXAMPLES = make_examples(((6, 4), (5, 3)), 90)

# Each field is here with values to change it to, or below with the reason why it changes nothing.
rope = lambda kind, **more: {"rope_type": kind, "rope_theta": 1e4, **more}
MODEL = {
    "vocab_size": [100],
    "hidden_size": [128],
    "intermediate_size": [128, 96],
    "num_hidden_layers": [2],
    "num_attention_heads": [1, 4],
    "num_key_value_heads": [2],
    "hidden_act": ["gelu", "relu"],
    "max_position_embeddings": [32],
    "rms_norm_eps": [0.1],
    "pad_token_id": [5],
    "tie_word_embeddings": [True],
    "rope_parameters": [
        rope("default", rope_theta=100.0),
        rope("default", partial_rotary_factor=0.5),
        rope("linear", factor=4.0),
        rope("linear", factor=4.0, partial_rotary_factor=0.5),
        rope("dynamic", factor=4.0),
        rope("yarn", factor=4.0, original_max_position_embeddings=16),
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
        rope(
            "longrope",
            factor=4.0,
            original_max_position_embeddings=16,
            short_factor=[1.0] * 16,
            long_factor=[4.0] * 16,
        ),
        rope("proportional", factor=2.0, partial_rotary_factor=0.5),
    ],
    "attention_dropout": [0.3],
    "head_dim": [64, 16, 128],
}
ALL_MODELS = {  # what every configuration of transformers has
    "transformers_version": "says who wrote it",
    "architectures": "names the class, which is asked for itself",
    "output_hidden_states": "what is returned beside the logits",
    "return_dict": "how it is returned",
    "dtype": "the loader is told one",
    "chunk_size_feed_forward": "no module of these has it",
    "is_encoder_decoder": "belongs to other architectures",
    "id2label": "belongs to classifiers",
    "label2id": "belongs to classifiers",
    "problem_type": "belongs to classifiers",
    "initializer_range": "weights are loaded",
    "use_cache": "how generate keeps keys and values",
    "bos_token_id": "generate's and the tokenizer's",
    "eos_token_id": "generate's and the tokenizer's",
}
CONFIGS = {
    "llama": (
        LlamaConfig,
        MODEL | {"pretraining_tp": [2], "attention_bias": [True], "mlp_bias": [True]},
        ALL_MODELS,
    ),
    "mistral": (MistralConfig, MODEL | {"sliding_window": [4]}, ALL_MODELS),
}
# What a checkpoint's config.json may say without transformers' classes knowing it.
STRANGE = {
    "partial_rotary_factor": 0.5,
    "rope_scaling": {"type": "dynamic", "factor": 4.0},
    "sliding_window": 4,
    "layer_types": ["sliding_attention"],
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 5.0,
    "attention_multiplier": 0.5,
    "logits_scaling": 4.0,
    "embedding_multiplier": 4.0,
    "residual_multiplier": 0.5,
    "query_pre_attn_scalar": 7,
    "qk_norm": True,
}
ADAPTER = {
    "r": [2],
    "target_modules": [["q_proj", "v_proj"], r".*\.(\w+_proj|embed_tokens)", r".*\.\w+_proj|lm_head"],
    "exclude_modules": [["q_proj"]],
    "lora_alpha": [3],
    "lora_dropout": [0.3],
    "fan_in_fan_out": [True],
    "bias": ["all", "lora_only"],
    "use_rslora": [True],
    "modules_to_save": [["lm_head"], ["embed_tokens"], ["input_layernorm"]],
    "init_lora_weights": ["gaussian"],
    "layers_to_transform": [[0]],
    "rank_pattern": [{"q_proj": 2}],
    "alpha_pattern": [{"q_proj": 3}],
    "trainable_token_indices": [[1, 2]],
    "use_dora": [True],
    "velora_config": [{}],
    "alora_invocation_tokens": [[5, 6]],
    "use_qalora": [True],
    "monteclora_config": [{}],
    "layer_replication": [[(0, 2), (0, 2)]],
    "lora_bias": [True],
    "target_parameters": [["lm_head.weight"]],
    "use_bdlora": [{"target_modules_bd_a": ["q_proj"], "nblocks": 2}],
    "arrow_config": [{}],
    "kasa_config": [{}],
    "inference_mode": [True],
    "ensure_weight_tying": [True],
}
NOT_OF_ADAPTERS = {
    "task_type": "names PEFT's class, whose type is looked at",
    "peft_type": "is LoRA's",
    "auto_mapping": "is for loading",
    "peft_version": "says who wrote it",
    "base_model_name_or_path": "is for loading",
    "revision": "is for loading",
    "layers_pattern": "says where layers_to_transform counts",
    "megatron_config": "is for Megatron's layers, whose type is looked at",
    "megatron_core": "is for Megatron's layers, whose type is looked at",
    "loftq_config": "only says how weights begin",
    "eva_config": "only says how weights begin",
    "corda_config": "only says how weights begin",
    "lora_ga_config": "only says how weights begin",
    "qalora_group_size": "belongs to use_qalora",
    "runtime_config": "says where DoRA computes",
}
PACKED = {
    "load_in_8bit": [True],
    "load_in_4bit": [False],
    "llm_int8_skip_modules": [["q_proj", "lm_head"], ["model", "lm_head"], []],
    "llm_int8_enable_fp32_cpu_offload": [True],
    "bnb_4bit_compute_dtype": [torch.float16, torch.bfloat16, None],
    "bnb_4bit_quant_type": ["fp4"],
    "bnb_4bit_use_double_quant": [False],
    "bnb_4bit_quant_storage": [torch.float32, torch.bfloat16],
}


NOT_OF_4_BITS = {
    "llm_int8_threshold": "belongs to 8-bit layers",
    "llm_int8_has_fp16_weight": "belongs to 8-bit layers",
}


def loaded(config, quantization=None, again=False, dtype=torch.float32, saved=torch.float32):
    """A random model as it loads from a checkpoint, dense there or, loaded `again`, quantized."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(saved)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    options = {"dtype": dtype, "device_map": {"": "cpu"}}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        quantization = BitsAndBytesConfig(**quantization or QUANTIZATION)
        first = options | ({"dtype": saved} if again else {})
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, **first)
        if again:
            model.save_pretrained(f"{folder}/packed")
            model = AutoModelForCausalLM.from_pretrained(f"{folder}/packed", **options)
    return model.requires_grad_(False)


def adapted(base, **changed):
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**LORA | changed))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)
    return model.train()


def own_loss(model) -> torch.Tensor:
    """By the model itself, one example at a time, with transformers' eager attention."""
    total = 0.0
    for example in EXAMPLES:
        ids, places = torch.tensor(example.ids), learned_places(example, "answer")
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        total += F.cross_entropy(logits[list(places)].float(), ids[[p + 1 for p in places]], reduction="sum")
    return total


def trained(model) -> str | float:
    """The reason against training, or the error of loss and gradients."""
    reason = why_not_train(model)
    if reason:
        return reason
    fused = FusedModel(model, Plan(20, "all"))
    if fused.layers[0].qkv.dropout:  # PEFT's is random: its layers are given the same masks
        model.get_base_model().set_attn_implementation("packed")
        return max(self_check.training_errors(model, fused, [EXAMPLES], "answer").values())
    model.get_base_model().set_attn_implementation("eager")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours, own = fused.loss_sum(EXAMPLES, "answer", 0), own_loss(model)
    got, expected = torch.autograd.grad(ours, parameters), torch.autograd.grad(own, parameters)
    off = [((a - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)]
    return max(*off, (abs(ours - own) / own).item())


def scored(model, merging: bool) -> str | float:
    """The reason against the engine, or the error of its logits."""
    reason = why_not(model)
    if reason:
        return reason
    model.config._attn_implementation = "eager"
    found = self_check.witnesses(model, [example.ids for example in EXAMPLES])
    return self_check.scoring_errors(merge(model) if merging else model, found)["logits"]


def outcome(make: Callable) -> list:
    """What training, scoring in 4 bits and scoring of merged weights make of it, or who else refuses it."""
    try:
        model = make()
    except Exception as error:  # transformers, PEFT or bitsandbytes
        return [f"can't be made: {type(error).__name__}: {error}"[:200]] * 3
    tuned = model if hasattr(model, "get_base_model") else adapted(model)
    return [
        trained(copy.deepcopy(tuned)),
        scored(copy.deepcopy(tuned).train(), False),
        scored(copy.deepcopy(tuned).train(), True),
    ]


def of_models(results: dict) -> None:
    for family, (config, table, _) in CONFIGS.items():
        sizes = SIZES | ({"sliding_window": None} if family == "mistral" else {})
        results[family] = outcome(lambda config=config, sizes=sizes: loaded(config(**sizes)))
        changes = [(name, value) for name, values in table.items() for value in values]
        for name, value in [*changes, *STRANGE.items()]:
            changed = sizes | {name: value}
            results[f"{family}: {name} {value}"] = outcome(lambda c=config, s=changed: loaded(c(**s)))


def of_adapters(results: dict) -> None:
    base = loaded(LlamaConfig(**SIZES))
    two = loaded(LlamaConfig(**SIZES | {"num_hidden_layers": 2}))
    for name, values in ADAPTER.items():
        for value in values:
            of, more = (two, {"target_modules": PROJECTIONS}) if name.startswith("layer") else (base, {})
            results[f"adapter: {name} {value}"] = outcome(
                lambda o=of, c=more | {name: value}: adapted(o, **c)
            )

    def changed(change: Callable) -> Callable:
        def make():
            model = adapted(base)
            change(model, model.get_base_model().model.layers[0])
            return model

        return make

    def second(model, layer) -> None:
        model.add_adapter("other", LoraConfig(**LORA))

    def other(model, layer) -> None:
        second(model, layer)
        model.set_adapter("other")

    def exchanged(module) -> None:
        own = module.forward
        module.forward = lambda *args, **options: own(*args, **options)  # noqa: PLW0108

    def hooked(model, layer) -> None:
        layer.mlp.register_forward_hook(lambda module, args, output: 2 * output)

    def hooked_before(model, layer) -> None:
        layer.register_forward_pre_hook(lambda module, args: None)

    def unfrozen(model, layer) -> None:
        layer.input_layernorm.weight.requires_grad_(True)

    def subclassed(model, layer) -> None:
        layer.mlp.__class__ = type("OtherMLP", (type(layer.mlp),), {})

    def biased(model, layer) -> None:
        model.get_base_model().lm_head.bias = torch.nn.Parameter(torch.randn(96), requires_grad=False)

    results |= {
        f"changed: {name}": outcome(changed(change))
        for name, change in {
            "second adapter": second,
            "another adapter active": other,
            "adapters disabled": lambda model, layer: model.base_model.disable_adapter_layers(),
            "adapter merged": lambda model, layer: layer.mlp.up_proj.merge(),
            "forward of a layer": lambda model, layer: exchanged(layer.self_attn),
            "forward of the model": lambda model, layer: exchanged(model.get_base_model()),
            "forward of the adapted model": lambda model, layer: exchanged(model),
            "hook": hooked,
            "hook before": hooked_before,
            "a norm trained": unfrozen,
            "a frozen A": lambda model, layer: layer.mlp.up_proj.lora_A["default"].requires_grad_(False),
            "subclass": subclassed,
            "head with a bias": biased,
            "scale": lambda model, layer: setattr(layer.self_attn, "scaling", 1.0),
            "epsilon": lambda model, layer: setattr(layer.input_layernorm, "variance_epsilon", 0.1),
            "norm in another dtype": lambda model, layer: layer.input_layernorm.bfloat16(),
            "scale of an adapter": lambda model, layer: layer.mlp.up_proj.scaling.update(default=1.0),
            "dropout of an adapter": lambda model, layer: layer.mlp.up_proj.lora_dropout.update(
                {"default": torch.nn.Dropout(0.5)}
            ),
        }.items()
    }


def of_quantizations(results: dict) -> None:
    config = LlamaConfig(**SIZES)
    for again in (False, True):
        when = "reloaded" if again else "loaded"
        results[f"{when}: as it is"] = outcome(lambda again=again: loaded(config, again=again))
        for name, values in PACKED.items():
            for value in values:
                changed = QUANTIZATION | {name: value}
                if name == "load_in_8bit":
                    changed |= {"load_in_4bit": False}
                results[f"{when}: {name} {value}"] = outcome(
                    lambda changed=changed, again=again: loaded(config, changed, again)
                )
    results["reloaded: saved in float16"] = outcome(lambda: loaded(config, None, True, saved=torch.float16))


def quickly_unpacked() -> None:
    """Unpacking by bitsandbytes, for configurations of models, which have nothing to do with it."""
    make = nf4.PackedWeights.__init__

    def remember(self, weights) -> None:
        make(self, weights)
        self.dense = torch.cat([bnb.dequantize_4bit(w.data, w.quant_state) for w in weights])

    nf4.PackedWeights.__init__ = remember
    nf4.PackedWeights.unpack = lambda self, out: out.copy_(self.dense)


def unlisted() -> list[str]:
    """Fields that are in no table, of a later version perhaps, and those in a table that no longer are."""
    found = []
    for what, names, *tables in (
        *((family, [f.name for f in fields(c)], *tables) for family, (c, *tables) in CONFIGS.items()),
        ("adapter", [f.name for f in fields(LoraConfig)], ADAPTER, NOT_OF_ADAPTERS),
        ("quantization", [*inspect.signature(BitsAndBytesConfig).parameters][:-1], PACKED, NOT_OF_4_BITS),
    ):
        found += [f"{what}: {name}" for name in {*names} ^ {name for table in tables for name in table}]
    return found


def main() -> None:
    results: dict = {}
    interpret_quickly()
    of_quantizations(results)
    quickly_unpacked()
    of_models(results)
    of_adapters(results)
    print(json.dumps({"unlisted": unlisted(), "results": results}))


if __name__ == "__main__":
    main()
