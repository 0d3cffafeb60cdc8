"""A run begins by proving what it has: tensors, tokenizer, attention and positions, each against a witness of
its own."""

import copy
import json
import re
import shutil

import pytest
import torch
from conftest import DEMO_MODEL
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BitsAndBytesConfig,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2MoeConfig,
    RobertaConfig,
    RwkvConfig,
    XLNetConfig,
)

from study import checkpoint, checks, generation, model, packing, training
from study.cli import parse_args
from study.encoding import Example
from study.errors import UserError

CPU = torch.device("cpu")
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
IDS = {"vocab_size": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**IDS, **SHAPE, "intermediate_size": 128, "num_key_value_heads": 2}


def make(config, scale: float = 6.0, attention: str = "sdpa"):
    """A random model whose attention matters."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention).eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data *= scale
    return made


def saved(config, folder, scale: float = 1.0):
    attention = (
        "sdpa" if "GPTJ" not in type(config).__name__ and "GptOss" not in type(config).__name__ else "eager"
    )
    make(config, scale, attention).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, folder)
    return str(folder)


# Tensors


def without(name):
    return lambda weights: {key: weight for key, weight in weights.items() if name not in key}


TENSORS = {
    "a norm gone": (without("model.norm.weight"), r"lacks the tensor model\.norm\.weight"),
    "a layer gone": (without("layers.5."), r"lacks the tensor model\.layers\.5\.\S+ and 8 more"),
    "a projection gone": (
        without("mlp.down_proj"),
        r"lacks the tensor model\.layers\.0\.mlp\.down_proj\.weight",
    ),
    "a wrapper's names": (
        lambda w: {f"_orig_mod.{k}": v for k, v in w.items()},
        r"lacks the tensor lm_head\.weight and 56 more",
    ),
    "one too many": (
        lambda w: w | {"model.layers.0.self_attn.q_norm.weight": torch.ones(4)},
        r"no place for, model\.layers\.0\.self_attn\.q_norm\.weight",
    ),
    "another shape": (
        lambda w: w | {"model.norm.weight": torch.ones(7)},
        r"holds model\.norm\.weight in the shape \[7\], where its config\.json says \[128\]",
    ),
    "another shape in 4 bits": (
        lambda w: w | {"model.layers.0.mlp.up_proj.weight": torch.ones(64, 128)},
        r"holds model\.layers\.0\.mlp\.up_proj\.weight in the shape \[64, 128\]",
    ),
}


@pytest.mark.parametrize(("change", "message"), TENSORS.values(), ids=TENSORS)
def test_a_checkpoint_whose_tensors_are_not_its_configurations_is_refused_by_their_names(
    tmp_path, change, message
):
    folder = shutil.copytree(DEMO_MODEL, tmp_path / "model")
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        model.load_base(str(folder), NF4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": False}, r"lacks the tensor lm_head\.weight"),
        ({"num_hidden_layers": 3}, r"no place for, model\.layers\.3"),
        (
            {"model_type": "mystery", "auto_map": {"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}},
            "code of its own",
        ),
    ],
)
def test_a_configuration_of_another_model_is_refused_without_a_question(
    tmp_path, changes, message, monkeypatch
):
    folder = shutil.copytree(DEMO_MODEL, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    with pytest.raises(UserError, match=message) as error:
        model.load_base(str(folder), NF4)
    assert "trust_remote_code" not in str(error.value)


def test_token_ids_beyond_the_embedding_are_refused_with_the_token(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    base = make(LlamaConfig(**WIDE))
    checks.refuse_unknown_tokens(base, tokenizer, [[0, 2047]])
    with pytest.raises(
        UserError, match=r"writes token 2048 \('<\|im_end\|>'\), its embedding has 2,048 rows"
    ):
        generation.generate(base, tokenizer, [[1, 5]], 4)


def quantized_copy(folder, settings, name: str) -> str:
    options = {"quantization_config": settings, "dtype": torch.bfloat16, "device_map": {"": "cpu"}}
    made = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, **options)
    made.save_pretrained(folder / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / file, folder / name)
    return str(folder / name)


def test_a_checkpoint_in_8_bits_is_refused(tmp_path):
    folder = quantized_copy(tmp_path, BitsAndBytesConfig(load_in_8bit=True), "int8")
    with pytest.raises(UserError, match="quantized already, in 8 bits"):
        model.load_base(folder, NF4)


@pytest.mark.parametrize("kind", ["fp4", "nf4"])
def test_a_checkpoint_in_4_bits_stays_what_it_is_computes_in_our_dtype_and_is_recorded_so(tmp_path, kind):
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float16
    )
    base = model.load_base(quantized_copy(tmp_path, settings, kind), NF4)
    recorded = model.as_loaded(base, None)["quantization"]
    assert (recorded["bnb_4bit_quant_type"], recorded["bnb_4bit_use_double_quant"]) == (kind, False)
    assert recorded["bnb_4bit_compute_dtype"] == "bfloat16"
    layers = model.four_bit_layers(base).values()
    assert {layer.weight.quant_state.quant_type for layer in layers} == {kind}
    assert {layer.compute_dtype for layer in layers} == {torch.bfloat16}
    json.dumps(recorded)
    merged = model.merge(base.train())
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_how_weights_in_4_bits_are_is_read_off_them_whatever_the_configuration_says(tmp_path, storage):
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4",
        bnb_4bit_quant_storage=storage,
        bnb_4bit_use_double_quant=True,
    )
    folder = quantized_copy(tmp_path, settings, "fp4")
    config = json.loads((tmp_path / "fp4" / "config.json").read_text())
    config["quantization_config"] |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False}
    (tmp_path / "fp4" / "config.json").write_text(json.dumps(config))
    checkpoint.identify(folder)
    recorded = model.as_loaded(model.load_base(folder, NF4), None)["quantization"]
    assert (recorded["bnb_4bit_quant_type"], recorded["bnb_4bit_use_double_quant"]) == ("fp4", True)


def test_a_configuration_of_4_bits_over_dense_weights_is_refused(tmp_path):
    folder = shutil.copytree(DEMO_MODEL, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"in 4 bits, and it is not|can't be loaded|lacks the tensor"):
        model.load_base(str(folder), NF4)


def test_a_head_of_its_own_under_a_configuration_that_ties_it_is_refused(tmp_path):
    folder = shutil.copytree(DEMO_MODEL, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="ties the head to the embedding"):
        model.load_base(str(folder), NF4)


@pytest.mark.parametrize(
    "values", [{"num_hidden_layers": "6"}, {"hidden_act": "swishy"}, {"pad_token_id": 99_999}]
)
def test_a_configuration_of_wrong_values_is_one_line_that_names_the_checkpoint(tmp_path, values):
    folder = shutil.copytree(DEMO_MODEL, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(UserError, match=rf"--pretrained_ckpt {folder} can't be loaded: .*"):
        model.load_base(str(folder), NF4)


def test_gpt_2_whose_projections_lie_turned_loads(tmp_path):
    folder = saved(GPT2Config(vocab_size=2048, n_embd=64, n_layer=2, n_head=4), tmp_path / "gpt2")
    weights = load_file(tmp_path / "gpt2" / "model.safetensors")
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)  # as older files have it
    save_file(weights, tmp_path / "gpt2" / "model.safetensors", metadata={"format": "pt"})
    assert model.four_bit_layers(model.load_base(folder, NF4))


@pytest.mark.parametrize("rows", [16, 48])
def test_projections_of_16_rows_compute_on_the_cpu(tmp_path, rows):
    config = LlamaConfig(**{**WIDE, "hidden_size": rows, "num_attention_heads": 1, "num_key_value_heads": 1})
    base = model.load_base(saved(config, tmp_path / "model"), NF4).eval()
    assert torch.isfinite(base(torch.tensor([[5, 6, 7]])).logits).all()


# Tokenizers


def with_class(folder, name: str | None):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("tokenizer_class") if name is None else config.update(tokenizer_class=name)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    "name",
    [
        "GPTNeoXTokenizerFast",
        "T5TokenizerFast",
        "PegasusTokenizer",
        "LlamaTokenizerFast",
        "LlamaTokenizer",
        "GPT2TokenizerFast",
        "GemmaTokenizerFast",
        None,
    ],
)
def test_a_tokenizer_reads_as_its_file_says_whatever_its_class(tmp_path, name, capsys):
    folder = shutil.copytree(DEMO_MODEL, tmp_path / "model")
    tokenizer = model.load_tokenizer(with_class(folder, name))
    witness = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "Ella will buy  the pet\nat 4:30, naïve Müller 北京."
    assert (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        == witness.encode(text, add_special_tokens=False).ids
    )
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer(text)["input_ids"] == witness.encode(text).ids
    assert tokenizer.eos_token_id == 2
    assert ("would read texts otherwise" in capsys.readouterr().out) == (
        name not in ("GPT2TokenizerFast", None)
    )


def test_the_llama_2_tokenizer_is_taken_as_it_is(real_data, capsys):
    tokenizer = model.load_tokenizer(str(real_data / "llama2_tokenizer"))
    assert tokenizer("Hello world")["input_ids"] == [1, 15043, 3186]
    assert capsys.readouterr().out == ""


# Attention


def test_a_soft_cap_that_sdpa_would_drop_is_computed(capsys):
    config = Gemma2Config(
        **{**WIDE, "head_dim": 16, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 16}
    )
    capped, truth = make(config), make(config, attention="eager")
    row = checks.rows_of_tokens(truth, 1)[0]
    assert checks.apart(checks.logits_of(capped, row), checks.logits_of(truth, row)) > 0.1
    padded = packing.choose_batching(capped, "auto", CPU)
    assert "sdpa does not compute it (it drops softcap)" in capsys.readouterr().out
    examples = [Example(row, 3), Example(row[:9], 3)]
    expected = sum(packing.loss_sum(truth, [example], "all", True, CPU) for example in examples)
    assert packing.loss_sum(capped, examples, "all", padded, CPU).item() == pytest.approx(
        expected.item(), rel=1e-5
    )
    answers = [
        generation.continue_batch(made, [row, row[:5]], 6, [2], None) for made in (make(config), truth)
    ]
    assert answers[0] == answers[1]


def test_a_soft_cap_too_small_to_show_in_numbers_is_seen_by_its_name():
    config = Gemma2Config(
        **{**WIDE, "head_dim": 16, "attn_logit_softcapping": 1e6, "query_pre_attn_scalar": 16}
    )
    made = make(config)
    checks.prove_attention(made)
    assert made.config._attn_implementation == "eager"


def test_an_attention_that_was_asked_for_and_computes_something_else_is_refused():
    config = Gemma2Config(**{**WIDE, "head_dim": 16, "attn_logit_softcapping": 5.0})
    with pytest.raises(
        UserError, match="--attn_implementation sdpa does not compute the attention of Gemma2"
    ):
        packing.choose_batching(make(config), "sdpa", CPU)


SEES_LATER = {
    "roberta": RobertaConfig(**{**IDS, **SHAPE, "intermediate_size": 128}),
    "bert": BertConfig(**{**IDS, **SHAPE, "intermediate_size": 128}),
    "xlnet": XLNetConfig(vocab_size=2048, d_model=64, n_layer=2, n_head=4, d_inner=128),
}


@pytest.mark.parametrize("name", SEES_LATER)
def test_a_model_that_sees_later_tokens_is_refused(name):
    made = make(SEES_LATER[name], 3.0, "eager" if name == "xlnet" else "sdpa")
    with pytest.raises(UserError, match="a token sees those after it, so it is no causal language model"):
        packing.choose_batching(made, "auto", CPU)


def test_an_encoder_that_is_told_to_be_a_decoder_is_one():
    config = RobertaConfig(**{**IDS, **SHAPE, "intermediate_size": 128, "is_decoder": True})
    checks.prove_attention(make(config, 3.0))


def test_a_causal_model_with_a_mask_turned_off_is_found_out():
    made = make(LlamaConfig(**WIDE))
    for layer in made.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(UserError, match="a token sees those after it"):
        checks.prove_attention(made)


def test_a_model_that_computes_no_numbers_is_refused():
    made = make(LlamaConfig(**WIDE))
    made.model.norm.weight.data[3] = float("nan")
    with pytest.raises(UserError, match="computes no numbers"):
        checks.prove_attention(made)


def test_a_proof_is_made_once_and_changes_neither_modes_nor_random_numbers_nor_windows():
    made = make(MistralConfig(**WIDE, sliding_window=4096)).train()
    made.model.layers[0].eval()
    before = {module: module.training for module in made.modules()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    checks.prove_attention(made)
    packing.isolates(made, CPU)
    assert torch.equal(torch.rand(3), expected)
    assert {module: module.training for module in made.modules()} == before
    assert made.config.sliding_window == 4096
    made.forward = lambda *_, **__: pytest.fail("proven again")
    checks.prove_attention(made)


def test_a_proof_starts_no_gpu_that_the_model_is_not_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda gpu: pytest.fail(f"GPU {gpu} was started"))
    with checks.still(torch.nn.Linear(2, 2)):
        pass


def test_dropout_of_attention_is_not_packed_away():
    still, drops = (make(LlamaConfig(**WIDE, attention_dropout=share)) for share in (0.0, 0.3))
    assert not packing.choose_batching(still, "auto", CPU)
    assert packing.choose_batching(drops, "auto", CPU)
    row = checks.rows_of_tokens(drops, 1)[0]
    losses = {packing.loss_sum(drops.train(), [Example(row, 0)], "all", True, CPU).item() for _ in range(3)}
    assert len(losses) == 3


def test_a_window_that_packed_attention_would_drop_is_found_however_wide(monkeypatch):
    whole = packing.packed_attention

    def deaf(*args, sliding_window=None, **options):
        return whole(*args, **options)

    monkeypatch.setitem(packing.AttentionInterface._global_mapping, "packed", deaf)
    made = make(MistralConfig(**WIDE, sliding_window=1024))
    assert packing.choose_batching(made, "auto", CPU)
    assert not packing.choose_batching(make(MistralConfig(**WIDE, sliding_window=None)), "auto", CPU)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias", "anything_new"])
def test_packed_attention_refuses_what_it_does_not_heed(name):
    query = torch.rand(1, 2, 4, 8)
    borders = {"cu_seq_lens_q": torch.tensor([0, 4]), "max_length_q": 4}
    packing.packed_attention(None, query, query, query, None, **borders, **{name: None})
    with pytest.raises(ValueError, match=f"packed attention has no {name}"):
        packing.packed_attention(None, query, query, query, None, **borders, **{name: 1.0})


EAGER_ONLY = {
    "gptj": GPTJConfig(
        vocab_size=2048, bos_token_id=1, eos_token_id=2, n_embd=64, n_layer=2, n_head=4, rotary_dim=8
    ),
    "gpt_oss": GptOssConfig(**WIDE, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    "bloom": BloomConfig(vocab_size=2048, hidden_size=64, n_layer=2, n_head=4),
    "opt": OPTConfig(**IDS, **SHAPE, ffn_dim=128, word_embed_proj_dim=64),
}


@pytest.mark.parametrize("name", EAGER_ONLY)
def test_architectures_without_sdpa_load_for_training_and_scoring_alike(tmp_path, name):
    torch.manual_seed(0)
    config = EAGER_ONLY[name]
    folder = tmp_path / name
    AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(torch.bfloat16).save_pretrained(
        folder
    )
    base = model.load_base(str(folder), NF4, packing.training_attention("auto"))
    assert base.config._attn_implementation == ("sdpa" if name == "opt" else "eager")
    answers = generation.continue_batch(base, [[5, 6, 7], [8]], 3, [2], None)
    assert [len(ids) for ids, _ in answers] == [3, 3]


# Experts


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (
            "qwen2_moe",
            Qwen2MoeConfig(
                **WIDE, num_experts=4, moe_intermediate_size=64, shared_expert_intermediate_size=64
            ),
        ),
        ("mixtral", MixtralConfig(**WIDE, num_local_experts=4)),
    ],
)
def test_experts_that_stay_out_of_4_bits_are_said_and_what_peft_can_not_adapt_is_one_line(
    tmp_path, name, config, capsys
):
    base = model.load_base(saved(config, tmp_path / name), NF4)
    said = capsys.readouterr().out
    assert re.search(
        r"4 bits     not experts\.down_proj, experts\.gate_up_proj.*, \d+ % of all weights", said
    )
    lora = LoraConfig(r=2, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    args = parse_args("classification", "", [])
    if name == "mixtral":
        with pytest.raises(UserError, match="give --dropout 0"):
            training.with_adapter(base, lora, args)
    else:
        training.with_adapter(base, lora, args)
        assert "adapters   none on experts.down_proj, experts.gate_up_proj" in capsys.readouterr().out


# Rotary positions


def longrope(original: int = 32):
    factors = {"short_factor": [1.0] * 8, "long_factor": [6.0] * 8}
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": original,
        **factors,
    }
    return Phi3Config(
        **WIDE, max_position_embeddings=512, original_max_position_embeddings=original, rope_parameters=rope
    )


def test_positions_that_depend_on_the_longest_example_leave_losses_and_answers_as_if_alone():
    made = make(longrope()).train()
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 2048, (count,), generator=generator).tolist() for count in (9, 60, 20)]
    examples = [Example(row, 4) for row in rows]
    padded = packing.choose_batching(made, "auto", CPU)
    alone = sum(packing.loss_sum(made, [example], "answer", padded, CPU).item() for example in examples)
    assert packing.loss_sum(made, examples, "answer", padded, CPU).item() == pytest.approx(alone, rel=1e-5)
    made.eval().set_attn_implementation("sdpa")
    single = [generation.continue_batch(made, [row], 5, [2], None)[0] for row in rows]
    assert generation.continue_batch(made, rows, 5, [2], None) == single


def test_positions_are_the_same_up_to_where_their_table_changes():
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    yarn = {**dynamic, "rope_type": "yarn", "original_max_position_embeddings": 64}
    expected = {
        32: longrope(),
        128: LlamaConfig(**WIDE, max_position_embeddings=128, rope_parameters=dynamic),
        float("inf"): LlamaConfig(**WIDE, rope_parameters=yarn),
    }
    for limit, config in expected.items():
        assert checks.same_up_to(make(config)) == limit


# Padding


@pytest.mark.parametrize("name", ["llama", "rwkv"])
def test_a_model_that_padding_confuses_decodes_one_by_one_and_says_so(name, capsys):
    recurrent = RwkvConfig(vocab_size=2048, hidden_size=64, num_hidden_layers=2, attention_hidden_size=64)
    made = make(
        LlamaConfig(**WIDE) if name == "llama" else recurrent, 4.0, "sdpa" if name == "llama" else "eager"
    )
    rows = [row[:count] for row, count in zip(checks.rows_of_tokens(made, 3), (5, 24, 11), strict=True)]
    single = [generation.continue_batch(made, [row], 5, [2], None)[0] for row in rows]
    assert generation.continue_batch(made, rows, 5, [2], None) == single
    assert ("one by one: padding changes what Rwkv" in capsys.readouterr().out) == (name == "rwkv")
