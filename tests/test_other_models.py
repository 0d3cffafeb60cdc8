"""Models of the shapes of Falcon-7B and RedPajama-INCITE, with such tokenizers, from tokens to scores."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import DEMO_DATA
from peft import LoraConfig, get_peft_model
from preloaded import run_preloaded
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FalconConfig, GPTNeoXConfig

from prompts import build_prompt
from study import checks, cli, encoding, generation, model, packing
from study.encoding import Example
from study.errors import UserError

CPU, END = torch.device("cpu"), "<|endoftext|>"
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
LINES = [line for path in sorted(DEMO_DATA.glob("*_train.jsonl")) for line in path.open(encoding="utf-8")]
WORDS = "TITLE ABSTRACT INTRODUCTION SUMMARY COMMENT ANSWER QUESTION DOMAIN PREFIX SUFFIX MIDDLE"
FALCON = re.sub(r"(\w+)", r">>\1<<", WORDS).split()
FILES = {"classification": "posts", "summarization": "dialogues"}


def byte_pairs(special: list[str], *before) -> Tokenizer:
    made = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence(list(before)), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=special, initial_alphabet=level.alphabet(), show_progress=False
    )
    made.train_from_iterator((text for line in LINES for text in json.loads(line).values()), trainer)
    return made


def make_falcon(folder: Path) -> None:
    """As tiiuae/falcon-7b: one key head, attention beside the MLP, no biases, no context in config.json, no
    post-processor, and end of sequence 11 behind eleven other special tokens."""
    tokenizer = byte_pairs(
        [*FALCON, END],
        pre_tokenizers.Punctuation("contiguous"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    )
    config = FalconConfig(vocab_size=1024, hidden_size=192, num_hidden_layers=2, num_attention_heads=3)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": FALCON}
    save(folder, config, tokenizer, settings)
    config = json.loads((folder / "config.json").read_text())
    del config["max_position_embeddings"], config["num_kv_heads"], config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")  # the head, too, as converted files have it
    weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def make_redpajama(folder: Path) -> None:
    """As RedPajama-INCITE: GPT-NeoX with residuals in a row and whole heads turned, a head of its own, more
    rows than tokens, and end of sequence 0, which opens a text, too."""
    tokenizer = byte_pairs([END, "<|padding|>"], pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.normalizer, tokenizer.post_processor = normalizers.NFC(), processors.ByteLevel()
    config = GPTNeoXConfig(
        vocab_size=1152,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        bos_token_id=0,
        eos_token_id=0,
        rotary_pct=1.0,
        use_parallel_residual=False,
    )
    save(
        folder, config, tokenizer, {"tokenizer_class": "GPTNeoXTokenizer", "bos_token": END, "unk_token": END}
    )


def make_redpajama_with_bos(folder: Path) -> None:
    make_redpajama(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(f"{END} $A", special_tokens=[(END, 0)])
    tokenizer.save(str(folder / "tokenizer.json"))


def save(folder: Path, config, tokenizer: Tokenizer, settings: dict) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings |= {"eos_token": END, "model_max_length": 2048, "add_prefix_space": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


MAKERS = {"falcon": make_falcon, "redpajama": make_redpajama, "redpajama with bos": make_redpajama_with_bos}


@pytest.fixture(scope="module", params=MAKERS)
def tokenized(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / request.param.replace(" ", "-")
    MAKERS[request.param](folder)
    return folder


@pytest.fixture(scope="module", params=["falcon", "redpajama"])
def made(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / request.param
    MAKERS[request.param](folder)
    return folder


# Tokens


def flags(*more: object):
    return cli.parse_args("classification", "", list(map(str, more)))


def test_prompts_open_as_the_tokenizer_opens_a_text_and_answers_end_with_a_learned_end(tokenized, capsys):
    tokenizer = model.load_tokenizer(str(tokenized))
    first = [0] if "bos" in tokenized.name else []
    end = 11 if tokenized.name == "falcon" else 0
    assert tokenizer.eos_token_id == end
    assert tokenizer.pad_token_id is None or tokenized.name != "falcon"
    text, prompt = "the lamp\n in 2023", build_prompt("classification", "instruction", "the lamp\n in 2023")
    witness = Tokenizer.from_file(str(tokenized / "tokenizer.json"))
    [example], _ = encoding.encode_examples(tokenizer, "classification", [(text, "home")], flags())
    assert example.ids[: example.answer_start] == [
        *first,
        *witness.encode(prompt, add_special_tokens=False).ids,
    ]
    assert example.ids.count(end) == 1 + len(first)
    assert example.ids[-1] == end
    assert len(example.ids) - 2 in packing.learned_places(example, "answer")
    assert tokenizer.decode(example.ids[example.answer_start : -1]) == " home"


def test_special_tokens_inside_a_text_stay_text_and_cut_nothing(tokenized):
    tokenizer, args = model.load_tokenizer(str(tokenized)), flags()
    text = f"one {END} two >>TITLE<< three <|padding|> four"
    [ids], shortened = encoding.encode_prompts(tokenizer, "classification", [text], args)
    begins = len(encoding.beginning(tokenizer))
    assert not set(ids[begins:]) & set(tokenizer.all_special_ids)
    assert re.sub(r"[< >]", "", text) in re.sub(r"[< >]", "", tokenizer.decode(ids))
    assert shortened == 0
    with pytest.raises(UserError, match=r"class .* comes back from this tokenizer as"):
        encoding.label_answers(tokenizer, ["home", f"home{END}"], 20)
    [example], _ = encoding.encode_examples(tokenizer, "summarization", [(text, text)], args)
    assert example.ids.count(tokenizer.eos_token_id) == 1 + (tokenizer.eos_token_id in ids[:begins])


# Models


def test_every_linear_layer_but_the_head_is_in_4_bits_and_gets_an_adapter(made, capsys):
    base = model.load_base(str(made), NF4)
    assert "not" not in capsys.readouterr().out
    layers = {name.rpartition(".")[2] for name in model.four_bit_layers(base)}
    assert layers == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    assert len(model.four_bit_layers(base)) == 8
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    names = {name for name, module in adapted.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert names == set(model.four_bit_layers(base))


def test_the_context_is_2048_tokens_also_where_the_configuration_does_not_say(made):
    base, tokenizer = model.load_base(str(made), NF4), model.load_tokenizer(str(made))
    model.check_length(base, tokenizer, flags("--max_seq_length", 2048))
    with pytest.raises(UserError, match="--max_seq_length 2049 exceeds the 2048"):
        model.check_length(base, tokenizer, flags("--max_seq_length", 2049))


def test_batches_are_packed_or_padded_and_lose_nothing_by_it(made):
    base = model.load_base(str(made), NF4).train()
    assert base.config._attn_implementation == "sdpa"
    padded = packing.choose_batching(base, "auto", CPU)
    assert padded == (made.name == "falcon")  # whose attention can't be exchanged
    rows = [row[:length] for row, length in zip(checks.rows_of_tokens(base, 3), (24, 9, 17), strict=True)]
    examples = [Example(row, 3) for row in rows]
    alone = sum(packing.loss_sum(base, [example], "answer", padded, CPU) for example in examples)
    assert packing.loss_sum(base, examples, "answer", padded, CPU) == pytest.approx(alone.item(), rel=1e-2)


def test_an_answer_stops_at_its_end_beside_one_that_goes_on(made):
    base, tokenizer = model.load_base(str(made), NF4).eval(), model.load_tokenizer(str(made))
    prompts, end = (
        [encoding.prompt_ids(tokenizer, prompt) for prompt in ("the lamp", "a much longer prompt")],
        tokenizer.eos_token_id,
    )
    whole = generation.continue_batch(base, prompts, 6, [end], None)
    head, token = base.get_output_embeddings().weight, whole[0][0][3]
    head.data[end] = 2 * head[token]  # now more likely
    answers = generation.continue_batch(base, prompts, 6, [end], None)
    assert answers[0][0] == [*whole[0][0][: whole[0][0].index(token)], end]
    assert END not in generation.generate(base, tokenizer, prompts, 6).texts[0]


# Scripts


SHORT = ("--epochs=12", "--max_train_samples=16", "--batch_size=4", "--learning_rate=5e-3", "--lora_r=8")


@pytest.mark.parametrize(
    ("made", "task"), [("falcon", "classification"), ("redpajama", "summarization")], indirect=["made"]
)
def test_the_scripts_teach_a_model_to_stop_and_its_merged_adapter_is_the_adapter(made, tmp_path, task):
    files = [f"--{split}_file={DEMO_DATA / FILES[task]}_{split}.jsonl" for split in ("train", "test")]
    folder = ("--experiment_dir", tmp_path)
    done = run_preloaded(f"llama2_{task}.py", "--pretrained_ckpt", made, *files, *SHORT, *folder)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "train.json").read_text())
    assert content["loaded"]["not_in_4_bits"] is content["train"]["without_adapter"] is None
    assert content["train"]["batching"]["padded"] == (made.name == "falcon")
    done = run_preloaded(f"llama2_{task}_inference.py", *folder, "--max_eval_samples", 6, "--merge", "on")
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("eval-*.json")
    content = json.loads(path.read_text())
    assert 0 < content["eval"]["output_tokens"] < 6 * content["config"]["max_new_tokens"]

    plain, tuned, merged = (model.load_base(str(made), NF4) for _ in range(3))
    tuned, merged = (model.load_adapter(base, tmp_path / "adapter") for base in (tuned, merged))
    row = checks.rows_of_tokens(plain, 1)[0]
    plain, tuned, merged = (
        checks.logits_of(each, row) for each in (plain, tuned.get_base_model(), model.merge(merged))
    )
    assert checks.apart(merged, tuned) < 0.05
    assert checks.apart(plain, tuned) > 0.5
