"""A checkpoint of another kind than a script takes is refused by its config.json; the models of the study."""

import json
import re
from pathlib import Path

import pytest
from transformers import (
    BartConfig,
    BertConfig,
    CLIPConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    ModernBertConfig,
    MT5Config,
    RobertaConfig,
    T5Config,
)

from study import checkpoint, cli, presets
from study.errors import UserError
from study.report.published import FIGURES

SCRIPTS = {
    "causal": "a causal language model ({}): llama2_classification.py or llama2_summarization.py fine-tunes",
    "encoder": "an encoder ({}): competitors/encoder_classification.py fine-tunes those",
    "t5": "a T5 ({}): competitors/flan_t5.py fine-tunes those",
    "other": "an encoder-decoder other than T5 ({}): no script here takes those",
}
DECODER = {"is_decoder": True, "is_encoder_decoder": False}
MODELS = [
    ("encoder", BertConfig(), "BertForMaskedLM"),
    ("encoder", BertConfig(), "BertLMHeadModel"),  # in which a token sees those after it
    ("encoder", DistilBertConfig(), "DistilBertForSequenceClassification"),
    ("encoder", RobertaConfig(), "RobertaForMaskedLM"),
    ("encoder", ModernBertConfig(), "ModernBertForMaskedLM"),
    ("encoder", DebertaV2Config(), "DebertaV2ForMaskedLM"),
    ("encoder", ElectraConfig(), "ElectraForPreTraining"),
    ("causal", BertConfig(is_decoder=True), "BertLMHeadModel"),
    ("causal", BartConfig(**DECODER), "BartForCausalLM"),
    ("causal", LlamaConfig(), "LlamaForCausalLM"),
    ("causal", GPT2Config(), "GPT2LMHeadModel"),
    ("causal", FalconConfig(), "FalconForCausalLM"),
    ("causal", GPTNeoXConfig(), "GPTNeoXForCausalLM"),
    ("t5", T5Config(), "T5ForConditionalGeneration"),
    ("other", MT5Config(), "MT5ForConditionalGeneration"),
    ("other", BartConfig(), "BartForConditionalGeneration"),
]


def saved(folder: Path, config, architecture: str) -> str:
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("kind", "config", "name"), MODELS, ids=[name for _, _, name in MODELS])
def test_a_checkpoint_goes_with_the_scripts_of_its_kind_alone(tmp_path, kind, config, name):
    folder = saved(tmp_path, config, name)
    line = f"--pretrained_ckpt {folder} is {SCRIPTS[kind].format(name)}"
    for wanted in ("causal", "encoder", "t5"):
        if wanted == kind:
            checkpoint.refuse_other_kind(folder, wanted)
        else:
            with pytest.raises(UserError, match=re.escape(line)):
                checkpoint.refuse_other_kind(folder, wanted)


def test_without_architectures_the_type_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match=r"is a T5 \(t5\)"):
        checkpoint.refuse_other_kind(str(tmp_path), "causal")


def test_what_is_not_there_or_of_no_kind_is_left_to_those_who_load_it(tmp_path):
    (tmp_path / "empty").mkdir()
    unknown = saved(tmp_path / "clip", CLIPConfig(), "CLIPModel")
    for name in (unknown, tmp_path / "empty", tmp_path / "gone", "nobody/no-such-model"):
        checkpoint.refuse_other_kind(str(name), "causal")


def test_an_adapter_in_place_of_a_model_is_named_with_what_it_was_trained_on(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')
    with pytest.raises(UserError, match=r"is an adapter, no whole model: .* trained on \(some/model\)"):
        checkpoint.refuse_other_kind(str(tmp_path), "causal")


@pytest.mark.parametrize("content", [{}, {"model_type": None}, {"model_type": ["llama"]}])
def test_a_configuration_that_does_not_say_what_it_is_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"its config\.json does not say what it is \(model_type\)"):
        checkpoint.refuse_other_kind(str(tmp_path), "causal")


@pytest.mark.parametrize("cached", [True, False])
def test_of_a_hub_id_the_configuration_alone_is_fetched_where_it_is_not_in_the_cache(
    tmp_path, monkeypatch, cached
):
    saved(tmp_path, BertConfig(), "BertForMaskedLM")
    asked = []

    def snapshot(name, local_files_only, files=checkpoint.HUB):
        asked.append(files)
        if local_files_only and not cached:
            raise FileNotFoundError
        return tmp_path

    monkeypatch.setattr(checkpoint, "snapshot", snapshot)
    with pytest.raises(UserError, match="--pretrained_ckpt some/bert is an encoder"):
        checkpoint.refuse_other_kind("some/bert", "causal")
    assert asked[1:] == ([] if cached else [("config.json", "adapter_config.json")])


ADAPTERS = {
    "of another architecture": (LlamaConfig, {}, GPTNeoXConfig, {}),
    "whose layers have the same names": (FalconConfig, {}, GPTNeoXConfig, {}),
    "of a deeper model": (LlamaConfig, {"num_hidden_layers": 3}, LlamaConfig, {}),
    "of a wider model": (LlamaConfig, {"hidden_size": 64}, LlamaConfig, {}),
    "of an encoder": (BertConfig, {}, LlamaConfig, {}),
}


@pytest.mark.parametrize("case", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_of_another_model_is_one_line(tmp_path, case):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from study import model

    def make(kind, changes: dict):
        loader = AutoModelForSequenceClassification if kind is BertConfig else AutoModelForCausalLM
        small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        return loader.from_config(kind(**{**small, **changes}))

    trained, changes, base, others = case
    task = "SEQ_CLS" if trained is BertConfig else "CAUSAL_LM"
    lora = LoraConfig(r=2, target_modules="all-linear", task_type=task)
    get_peft_model(make(trained, changes), lora).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} is damaged or not an adapter of") as error:
        model.load_adapter(make(base, others), tmp_path)
    assert "\n" not in str(error.value)


# The models of the study


def test_the_presets_stand_in_the_published_order_and_name_the_scripts_own_defaults():
    published = [name.lower() for name in FIGURES["tables"]["Table 1"]["columns"][2:]]
    short = {"redpajama": "rp", "llama-2": "llama2"}
    names = [
        next((name.replace(long, word) for long, word in short.items() if long in name), name)
        for name, about in presets.PRESETS.items()
        if "classification" in about.tasks
    ]
    assert names == [name.replace(" ", "-") for name in published]
    ids = {about.checkpoint: about.kind for about in presets.PRESETS.values()}
    assert {name: kind for kind, name in cli.CHECKPOINTS.items() if kind in SCRIPTS}.items() <= ids.items()
    assert presets.preset("falcon-7b") == ("tiiuae/falcon-7b", "causal", 2048, tuple(cli.DEFAULTS))


def test_a_model_that_is_not_of_the_study_is_refused_with_those_that_are():
    with pytest.raises(
        UserError, match="there is no model gpt-5: it is one of distilbert, bert, flan-t5-base"
    ):
        presets.preset("gpt-5")
