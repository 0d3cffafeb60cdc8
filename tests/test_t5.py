"""Flan-T5's script on a tiny random T5: it learns, how a step is split or padded changes nothing, a killed
training ends as it would have, and what T5's tokenizer loses is said."""

import json
import math
import re
import shutil
import string
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import DEMO_DATA, PROCESS, error_line
from peft import LoraConfig, PeftModel
from preloaded import kill, run_preloaded, start_until
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from study import cli, generation, loop, metrics, t5
from study.errors import UserError
from study.model import fingerprint, load_tokenizer

SCRIPT = "competitors/flan_t5.py"
FILES = {"classification": "posts", "summarization": "dialogues"}
RECIPE = loop.Recipe(learning_rate=0.0, warmup=1, falls=False, weight_decay=0.0, max_grad_norm=1.0)
ARGS = cli.parse_args(None, "", [], "t5")


def rows_of(task: str, split: str = "train") -> list[dict]:
    return [json.loads(line) for line in (DEMO_DATA / f"{FILES[task]}_{split}.jsonl").open()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A checkpoint like Flan-T5: gated GELU, a head of its own, SentencePiece's Unigram without backticks."""
    folder = tmp_path_factory.mktemp("t5") / "tiny-t5"
    texts = [str(value) for task in FILES for row in rows_of(task) for value in row.values()]
    words = Counter("▁" + word for text in texts for word in re.findall(r"[\w']+", text))
    letters = sorted({*"".join(texts), *string.printable, "▁"} - {*string.whitespace, "`"})
    special = ["<pad>", "</s>", "<unk>"]
    pieces = [(name, 0.0) for name in special] + [(letter, -15.0) for letter in letters]
    pieces += [(word, math.log(count / words.total())) for word, count in words.most_common(800)]
    metaspace = {"replacement": "▁", "prepend_scheme": "always"}
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**metaspace)]
    )
    tokenizer.decoder = decoders.Metaspace(**metaspace)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], special_tokens=[("</s>", 1)]
    )
    names = dict(zip(("pad_token", "eos_token", "unk_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=928,
        d_model=48,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(928, 48) / 48**0.5)
    model.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    content.pop("scale_decoder_outputs", None)  # as published, where it is not written
    (folder / "config.json").write_text(json.dumps(content | {"tie_word_embeddings": False}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(str(tiny))


@pytest.fixture
def model(tiny):
    return t5.load(str(tiny)).eval()


@pytest.fixture(scope="module")
def pairs(tokenizer) -> list[t5.Pair]:
    args = cli.parse_args(None, "", ["--task_type", "summarization"], "t5")
    given = [(row["dialogue"], row["summary"]) for row in rows_of("summarization")[:60]]
    return t5.encode_pairs(tokenizer, "summarization", given, args)[0]


def flags(tiny: Path, task: str = "summarization", *more: object) -> tuple:
    files = (f"--{split}_file={DEMO_DATA / FILES[task]}_{split}.jsonl" for split in ("train", "test"))
    return "--pretrained_ckpt", tiny, "--task_type", task, *files, "--learning_rate", "3e-3", *more


def run(*words: object) -> str:
    done = run_preloaded(SCRIPT, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    return done.stdout


def read(path: Path) -> dict:
    return json.loads(path.read_text())


# The model


def test_the_lean_model_is_transformers_own_with_a_head_that_is_not_tied(tiny, pairs):
    own = T5ForConditionalGeneration.from_pretrained(tiny, attn_implementation="eager").train()
    lean = t5.load(str(tiny)).train()
    assert not torch.equal(own.lm_head.weight, own.shared.weight)
    assert not own.config.scale_decoder_outputs
    for model in (own, lean):
        for module in model.modules():
            if hasattr(module, "dropout"):
                module.dropout = 0.0 if isinstance(module.dropout, float) else torch.nn.Identity()
    group = pairs[:7]
    learned = t5.Pairs(group, own.config)
    batch = learned.batch(range(7))
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    assert inputs["decoder_input_ids"][:, 0].tolist() == [0] * 7  # no BOS: the padding token begins
    assert all(pair.answer[-1] == pair.prompt[-1] == 1 for pair in group)
    logits = own(**inputs).logits
    loss = sum(
        torch.nn.functional.cross_entropy(row[: len(pair.answer)], torch.tensor(pair.answer), reduction="sum")
        for row, pair in zip(logits, group, strict=True)
    )
    loss.backward()
    ours = learned.loss_sum(lean, batch)
    ours.backward()
    torch.testing.assert_close(ours, loss)
    gradients = {name: p.grad for name, p in own.named_parameters()}
    for name, p in lean.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-4)


def test_loss_and_gradients_of_a_step_are_the_same_however_it_is_split(model, pairs):
    found, learned = [], t5.Pairs(pairs, model.config)
    for most in (10**6, 700, 1):
        groups = learned.split(range(24), most)
        training = loop.Training(model, learned, [list(range(24))], RECIPE, ARGS)
        model.eval()  # without dropout, which is drawn pass by pass
        found.append((training.backward(0, groups), [p.grad for p in model.parameters()]))
        model.zero_grad(set_to_none=True)
    for loss, gradients in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        torch.testing.assert_close(gradients, found[0][1], rtol=1e-4, atol=1e-5)
    assert len(learned.split(range(24), 700)) > 3


def test_batched_greedy_answers_are_those_one_by_one_by_transformers_own(tiny, model, tokenizer, pairs):
    prompts = [pair.prompt for pair in pairs[:9]]
    args = cli.parse_args(None, "", ["--task_type", "summarization", "--eval_batch_size", "4"], "t5")
    args.max_new_tokens = 12
    answers = t5.answer(model, tokenizer, prompts, args, generation.KeptAnswers(PROCESS))
    own = T5ForConditionalGeneration.from_pretrained(tiny, attn_implementation="eager").eval()
    greedy = GenerationConfig(max_new_tokens=12, eos_token_id=1, pad_token_id=0, decoder_start_token_id=0)
    plain = [own.generate(torch.tensor([ids]), generation_config=greedy)[0, 1:] for ids in prompts]
    assert answers.texts == [tokenizer.decode(ids, skip_special_tokens=True) for ids in plain]
    assert len({*answers.texts}) > 3
    assert answers.input_tokens == sum(map(len, prompts))


# What its tokenizer loses


def test_line_breaks_are_blanks_and_unknown_tokens_are_counted(tokenizer):
    [ids], _ = t5.encode_prompts(tokenizer, "summarization", ["Ann: hi\nBo: hello"], 512)
    assert ids == t5.encode_prompts(tokenizer, "summarization", ["Ann: hi Bo:  hello"], 512)[0][0]
    assert ids.count(2) == 2  # the fences
    lost = t5.lost(tokenizer, [ids], ["one\ntwo", "one"])
    assert lost == {"unknown_tokens": 2 / len(ids), "answers_with_line_breaks": 1}


def test_a_long_text_is_shortened_and_instruction_and_cue_stay(tokenizer):
    [ids], shortened = t5.encode_prompts(tokenizer, "summarization", ["word " * 300], 64)
    assert shortened == 1
    assert len(ids) == 64
    text = tokenizer.decode(ids)
    assert text.startswith("Summarize the dialogue")
    assert text.endswith("### Summary:</s>")


def test_classes_that_do_not_come_back_from_their_tokens_are_refused(tokenizer):
    args = cli.parse_args(None, "", [], "t5")
    with pytest.raises(UserError, match=r"comes back from this tokenizer as 'ab'.* rename it"):
        t5.encode_pairs(tokenizer, "classification", [("text", "a`b"), ("text", "b")], args)


def test_an_answer_that_no_length_has_room_for_is_refused(tokenizer):
    args = cli.parse_args(None, "", ["--task_type", "summarization"], "t5")
    with pytest.raises(
        UserError, match=r"--max_seq_length 512 is too few for the answer .* drop that example"
    ):
        t5.encode_pairs(tokenizer, "summarization", [("text", "they greet " * 1000)], args)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"quantization_config": {"load_in_4bit": True}}, "is quantized"),
        ({"pad_token_id": None}, "no pad_token_id"),
    ],
)
def test_a_checkpoint_that_can_not_be_trained_as_it_is_is_refused_before_it_loads(
    tiny, tmp_path, changed, said
):
    folder = shutil.copytree(tiny, tmp_path / "t5")
    (folder / "config.json").write_text(json.dumps(read(folder / "config.json") | changed))
    with pytest.raises(UserError, match=said):
        t5.load(str(folder))


# The script


@pytest.fixture(scope="module")
def tuned(tiny, tmp_path_factory) -> tuple[tuple, Path]:
    folder = tmp_path_factory.mktemp("full") / "run"
    words = flags(tiny, "summarization", "--experiment_dir", folder, "--batch_size", 8, "--epochs", 3)
    run(*words)
    return words, folder


def test_it_learns_the_dialogues_and_its_records_add_up(tuned, tiny, tokenizer):
    _, folder = tuned
    trained, content = read(folder / "train.json"), read(folder / "eval.json")
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").open()]
    assert [row["reference"] for row in rows] == [row["summary"] for row in rows_of("summarization", "test")]
    assert content["eval"]["metrics"]["rouge1"]["value"] > 20
    untrained = t5.load(str(tiny)).eval()
    prompts, _ = t5.encode_prompts(
        tokenizer, "summarization", [row["dialogue"] for row in rows_of("summarization", "test")[:20]], 512
    )
    texts = [tokenizer.decode(ids) for ids, _ in t5.continue_batch(untrained, prompts, 30, [1], None)]
    scores, _ = metrics.score("summarization", texts, [row["reference"] for row in rows[:20]])
    assert scores["metrics"]["rouge1"]["value"] < 10
    assert trained["method"] == content["method"] == "t5-full"
    assert trained["train"]["trainable_parameters"] == sum(p.numel() for p in untrained.parameters())
    assert 0 < trained["train"]["batching"]["padding_share"] < 0.3
    assert content["model_sha256"] == trained["train"]["model_sha256"]
    assert 0 < content["data"]["test"]["unknown_tokens"] < 0.1
    assert content["eval"]["wall_seconds"] < trained["train"]["wall_seconds"]
    saved = T5ForConditionalGeneration.from_pretrained(folder / "model")
    assert not torch.equal(saved.lm_head.weight, saved.shared.weight)


def test_a_finished_run_is_found_and_a_redone_training_makes_its_evaluation_stale(tuned, tmp_path):
    words, folder = tuned
    assert run(*words).startswith("finished")
    assert run(*words, "--dry_run").splitlines()[-1].startswith("finished\t")
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    words = [copy if word == folder else word for word in words]
    content = read(copy / "train.json")
    content["train"]["model_sha256"] = "0" * 64
    (copy / "train.json").write_text(json.dumps(content))
    assert run(*words, "--dry_run").splitlines()[-1].startswith("trained\t")
    line = error_line(run_preloaded(SCRIPT, *words))
    assert "is not the model that its train.json tells of: train it again with --force" in line
    path = copy / "model" / "model.safetensors"
    save_file({name: 0.9 * weight for name, weight in load_file(path).items()}, path, {"format": "pt"})
    content["train"]["model_sha256"] = fingerprint(path.parent, path.name)
    (copy / "train.json").write_text(json.dumps(content))
    assert "\nscored " in run(*words)
    assert read(copy / "eval.json")["model_sha256"] == content["train"]["model_sha256"]
    assert run(*words).startswith("finished")


@pytest.mark.parametrize("changed", [{"feed_forward_proj": "gated-silu"}, None], ids=["changed", "gone"])
def test_a_model_whose_configuration_was_changed_or_is_gone_is_not_scored(tuned, tmp_path, changed):
    shutil.copytree(tuned[1], tmp_path / "run")
    path = tmp_path / "run" / "model" / "config.json"
    content = read(path)
    path.write_text(json.dumps(content | changed)) if changed else path.unlink()
    with pytest.raises(UserError, match=r"is not the model that its train\.json tells of: train it again"):
        t5.load_tuned("", tmp_path / "run", "full", read(tmp_path / "run" / "train.json"))


def test_adapters_load_in_plain_peft_and_score(tiny, tmp_path):
    words = flags(tiny, "classification", "--tuning", "lora", "--max_train_samples", 32, "--epochs", 1)
    run(*words, "--max_eval_samples", 8, "--output_dir", tmp_path)
    [path] = tmp_path.glob("classification-tiny-t5-lora_sampleFraction-1.0_epochs-1_rank-16_*/eval-*.json")
    assert read(path)["eval"]["examples"] == 8
    base = T5ForConditionalGeneration.from_pretrained(tiny)
    plain = PeftModel.from_pretrained(base, path.parent / "adapter")
    names = {name for name in plain.base_model.targeted_module_names if name.endswith((".q", ".v"))}
    assert len(names) == len(plain.base_model.targeted_module_names) == 12


def test_killed_and_started_again_it_ends_with_the_same_weights(tuned, tmp_path):
    words, folder = tuned
    words = [tmp_path if word == folder else word for word in words]
    marked = lambda: list(tmp_path.glob("checkpoints/checkpoint-*/progress.json"))
    kill(start_until(marked, SCRIPT, *words))
    assert not (tmp_path / "train.json").exists()
    line = error_line(run_preloaded(SCRIPT, *words, "--learning_rate", "1e-3"))
    assert "belongs to a run with --learning_rate 0.003, not 0.001" in line
    assert "resumed from checkpoint-" in run(*words)
    assert not (tmp_path / "checkpoints").exists()
    one, other = (load_file(path / "model" / "model.safetensors") for path in (folder, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [read(path / "train.json")["train"]["model_sha256"] for path in (folder, tmp_path)] == [
        read(folder / "eval.json")["model_sha256"]
    ] * 2
    assert read(tmp_path / "train.json")["train"]["earlier_seconds"] > 0
    assert (tmp_path / "predictions.jsonl").read_bytes() == (folder / "predictions.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lora_r", "8"], "--lora_r goes with --tuning lora"),
        (["--pretrained_ckpt", "demo/model"], "is a causal language model (LlamaForCausalLM)"),
        (["--learning_rate", "1e30"], "is too high for these examples"),
    ],
)
def test_what_can_not_be_is_refused_in_one_line(tiny, tmp_path, more, said):
    more = [str(DEMO_DATA.parent / "model") if word == "demo/model" else word for word in more]
    done = run_preloaded(SCRIPT, *flags(tiny, "summarization", "--experiment_dir", tmp_path / "run", *more))
    assert said in error_line(done)


def test_an_adapter_computes_what_peft_computes(tiny):
    lora = LoraConfig(r=4, lora_alpha=32, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    layer = t5.with_lora(t5.load(str(tiny)), lora, 1).base_model.encoder.block[0].layer[0].SelfAttention.q
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(2, 5, 48)
    torch.testing.assert_close(layer(x), type(layer).forward(layer, x))
    assert not torch.allclose(layer(x), layer.base_layer(x))
