"""An encoder that is fine-tuned in full: what it learns, that padding and passes change nothing, that a
killed run ends as it would have, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DEMO_DATA, DEMO_MODEL, error_line, write_rows
from preloaded import kill, run_preloaded, start_until
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertTokenizerFast,
    DebertaV2Config,
    DistilBertConfig,
    ModernBertConfig,
    RobertaConfig,
)

from study import encoder, loop, model, packing
from study.cli import parse_args
from study.errors import UserError

SCRIPT = "competitors/encoder_classification.py"
POSTS = [json.loads(line) for line in (DEMO_DATA / "posts_train.jsonl").open()]
LABELS = sorted({row["label"] for row in POSTS})
DATA = (
    f"--train_file={DEMO_DATA / 'posts_train.jsonl'}",
    f"--test_file={DEMO_DATA / 'posts_test.jsonl'}",
    "--learning_rate=1e-3",
)
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
CONFIGS = {
    "bert": lambda words: BertConfig(vocab_size=words, max_position_embeddings=128, **SIZE),
    "distilbert": lambda words: DistilBertConfig(
        vocab_size=words, max_position_embeddings=128, dim=64, n_layers=2, n_heads=2, hidden_dim=128
    ),
    "modernbert": lambda words: ModernBertConfig(
        vocab_size=words, max_position_embeddings=128, local_attention=16, pad_token_id=0, **SIZE
    ),
    "deberta-v2": lambda words: DebertaV2Config(
        vocab_size=words, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=16, **SIZE
    ),
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Small encoders of random weights, with a WordPiece vocabulary of the demo's posts."""
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=1000, special_tokens=[*SPECIAL.values()], show_progress=False
    )
    words.train_from_iterator([row["text"] for row in POSTS], trainer)
    around = [(SPECIAL[name], words.token_to_id(SPECIAL[name])) for name in ("cls", "sep")]
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    named = {f"{name}_token": token for name, token in SPECIAL.items()}
    tokenizer, folders = BertTokenizerFast(tokenizer_object=words, **named), {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp("checkpoints") / name
        AutoModelForMaskedLM.from_config(config(words.get_vocab_size())).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def run(folder: Path, checkpoint: Path, *flags: object) -> str:
    done = run_preloaded(SCRIPT, *DATA, "--pretrained_ckpt", checkpoint, "--experiment_dir", folder, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read(folder: Path, name: str = "eval.json") -> dict:
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def whole(checkpoints, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder, checkpoints["bert"], "--epochs=8", "--max_seq_length=128")
    return folder


def test_it_learns_the_demos_posts(whole):
    assert read(whole)["eval"]["metrics"]["accuracy"]["value"] > 30  # of 10 classes; the vocabulary varies


def test_the_record_says_what_was_trained_and_the_model_loads_in_plain_transformers(whole):
    trained, scored = read(whole, "train.json"), read(whole)
    train, rows = trained["train"], (whole / "predictions.jsonl").read_text().splitlines()
    assert (train["examples"], train["steps"]) == (480, 8 * 480 // 16)
    assert train["tokens_per_second"] == pytest.approx(train["tokens"] / train["seconds"])
    assert train["batching"]["padding_share"] < 0.03
    assert train["loss_history"][-1][1] < 0.7 * train["loss_history"][0][1]
    assert {path.name for path in whole.iterdir()} == {
        *("model", "train.json", "eval.json", "predictions.jsonl", ".lock")
    }
    assert (
        scored["model_sha256"] == train["model_sha256"] == model.fingerprint(whole / "model", model.WEIGHTS)
    )
    plain = AutoModelForSequenceClassification.from_pretrained(whole / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(whole / "model")
    texts = [json.loads(line)["text"] for line in (DEMO_DATA / "posts_test.jsonl").open()]
    for text, row in list(zip(texts, map(json.loads, rows), strict=True))[:20]:
        with torch.no_grad():
            shares = plain(**tokenizer(text, return_tensors="pt")).logits.softmax(1)[0]
        assert plain.config.id2label[int(shares.argmax())] == row["prediction"] == row["parsed"]
        assert row["confidence"] == pytest.approx(float(shares.max()), abs=1e-5)
    sure = [json.loads(row)["confidence"] for row in rows]
    assert scored["eval"]["per_example"]["confidences"] == [round(of, 6) for of in sure]


def test_a_finished_run_is_found_and_another_split_of_it_is_scored_without_training(whole, checkpoints):
    flags = ("--epochs=8", "--max_seq_length=128")
    assert run(whole, checkpoints["bert"], *flags).startswith("finished")
    assert "training" not in run(whole, checkpoints["bert"], *flags, "--max_eval_samples=9")
    [other] = whole.glob("eval-*.json")
    assert read(whole, other.name)["eval"]["examples"] == 9
    for path in [other, *whole.glob("predictions-*")]:
        path.unlink()


@pytest.fixture(params=CONFIGS)
def each(request, checkpoints) -> tuple:
    """An encoder in eval mode, and texts of several lengths."""
    tokenizer = model.load_tokenizer(str(checkpoints[request.param]), ends=False)
    rows, _ = encoder.encode(tokenizer, [row["text"] for row in POSTS[:24]], 64)
    loaded = encoder.load(str(checkpoints[request.param]), LABELS, 1).eval()
    classes = [LABELS.index(row["label"]) for row in POSTS[:24]]
    return loaded, encoder.Texts(rows, tokenizer.pad_token_id, classes)


def test_loss_and_gradients_of_a_step_are_the_same_however_it_is_split(each):
    loaded, texts = each
    assert len(set(texts.tokens)) > 5
    found = []
    for most in (10_000, 200, 1):
        flags = ["--max_tokens_per_batch", str(most), "--batch_size", "24"]
        args = parse_args("classification", "", flags, kind="encoder")
        training = loop.Training(loaded, texts, [[*range(24)]], loop.Recipe(0, 1, False, 0, 1), args)
        groups = texts.split([*range(24)], training.most)
        loaded.eval()  # without dropout, which is drawn pass by pass
        loaded.zero_grad()
        loss = float(training.backward(0, groups))
        gradients = torch.cat([p.grad.flatten() for p in loaded.parameters() if p.grad is not None])
        found.append((len(groups), loss, gradients))
    assert found[0][0] == 1 < found[1][0] < found[2][0] == 24
    for _, loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][1], rel=1e-5)
        assert (gradients - found[0][2]).norm() < 1e-4 * found[0][2].norm()


def test_answers_do_not_depend_on_what_they_are_batched_with(each):
    loaded, texts = each
    torch.nn.init.normal_(encoder.output_layer(loaded).weight, std=1.0)  # far from ties
    alone, together = encoder.classify(loaded, texts, 1), encoder.classify(loaded, texts, "auto")
    assert alone[0] == together[0]
    assert alone[1] == pytest.approx(together[1], abs=1e-5)


def test_the_order_depends_on_the_seed_only_and_puts_like_lengths_into_a_step():
    lengths = [(7 * i) % 400 + 1 for i in range(1000)]
    steps = packing.steps_of_like_length(lengths, 16, 2, 3)
    assert steps == packing.steps_of_like_length(lengths, 16, 2, 3)
    assert steps != packing.steps_of_like_length(lengths, 16, 2, 4)
    epochs = steps[:63], steps[63:]
    for epoch in epochs:
        assert sorted(i for step in epoch for i in step) == [*range(1000)]
    assert sorted(map(len, steps)) == [8, 8] + [16] * 124
    assert epochs[0] != epochs[1]
    padded = sum(len(step) * max(lengths[i] for i in step) for step in steps)
    assert padded < 1.05 * 2 * sum(lengths)
    means = [sum(lengths[i] for i in step) / len(step) for step in steps]
    assert max(means[:9]) - min(means[:9]) > 100  # long and short ones mix


LONG = ("--epochs=6", "--max_train_samples=240", "--max_seq_length=128", "--batch_size=8")


def test_killed_and_started_again_it_ends_with_the_same_weights(checkpoints, tmp_path):
    run(tmp_path / "whole", checkpoints["bert"], *LONG)
    killed = tmp_path / "killed"
    flags = (*DATA, "--pretrained_ckpt", checkpoints["bert"], "--experiment_dir", killed, *LONG)
    saved = lambda: set(killed.glob("checkpoints/checkpoint-*"))
    marked = lambda: list(killed.glob("checkpoints/checkpoint-*/progress.json"))
    kill(start_until(marked, SCRIPT, *flags))
    line = error_line(run_preloaded(SCRIPT, *flags, "--epochs=7"))
    assert "--epochs 6, not 7" in line
    seen = saved()
    kill(start_until(lambda: saved() - seen, SCRIPT, *flags))  # in the middle of a save
    assert not (killed / "train.json").exists() or read(killed, "train.json")["status"] != "finished"
    assert "resumed from checkpoint-" in run(killed, checkpoints["bert"], *LONG)
    names = ("model/model.safetensors", "model/config.json", "predictions.jsonl")
    for name in names:
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    ours, theirs = (read(folder, "train.json")["train"] for folder in (killed, tmp_path / "whole"))
    assert ours["loss_history"] == theirs["loss_history"]
    assert 0 < ours["earlier_seconds"] < ours["wall_seconds"]
    assert not (killed / "checkpoints").exists()


SHORT = ("--epochs=1", "--max_train_samples=64", "--max_seq_length=128")


def test_an_evaluation_of_another_training_is_stale_and_a_changed_model_refused(checkpoints, tmp_path):
    run(tmp_path, checkpoints["bert"], *SHORT)
    before = read(tmp_path)
    trained = read(tmp_path, "train.json")
    weights = tmp_path / "model" / model.WEIGHTS
    tensors = load_file(weights)
    save_file(tensors | {"classifier.bias": tensors["classifier.bias"] + 1}, weights, {"format": "pt"})
    (tmp_path / "eval.json").unlink()
    flags = (*DATA, *SHORT, "--pretrained_ckpt", checkpoints["bert"], "--experiment_dir", tmp_path)
    assert "is not the model that its train.json tells of" in error_line(run_preloaded(SCRIPT, *flags))
    trained["train"]["model_sha256"] = model.fingerprint(weights.parent, model.WEIGHTS)  # as if trained anew
    (tmp_path / "train.json").write_text(json.dumps(trained))
    (tmp_path / "eval.json").write_text(json.dumps(before))
    assert "trained\t" in run(tmp_path, checkpoints["bert"], *SHORT, "--dry_run")
    assert run(tmp_path, checkpoints["bert"], *SHORT).startswith("run ")
    assert read(tmp_path)["model_sha256"] == trained["train"]["model_sha256"] != before["model_sha256"]


def test_a_head_of_other_classes_is_drawn_anew_by_the_seed_and_said(checkpoints, tmp_path, capsys):
    other = AutoModelForSequenceClassification.from_pretrained(checkpoints["distilbert"], num_labels=3)
    shutil.copytree(checkpoints["distilbert"], tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    one, same, seeded = (encoder.load(str(tmp_path / "other"), LABELS, seed) for seed in (1, 1, 2))
    assert "drawn anew" in capsys.readouterr().out
    heads = [encoder.output_layer(loaded).weight for loaded in (one, same, seeded)]
    assert heads[0].shape == (10, 64)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    encoder.load(str(checkpoints["distilbert"]), LABELS, 1)
    assert "drawn anew" not in capsys.readouterr().out


def test_what_can_not_be_trained_is_refused_in_one_line(checkpoints, tmp_path):
    with pytest.raises(UserError, match="is a llama, no encoder"):
        encoder.load(str(DEMO_MODEL), LABELS, 1)
    broken = tmp_path / "broken"
    shutil.copytree(checkpoints["bert"], broken)
    tensors = load_file(broken / model.WEIGHTS)
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, broken / model.WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks the tensor bert.encoder.layer.1.output.dense.weight"):
        encoder.load(str(broken), LABELS, 1)
    unknown = write_rows(tmp_path / "test.jsonl", [{"text": "a text", "label": "unheard of"}])
    flags = (*DATA, *SHORT, "--pretrained_ckpt", checkpoints["bert"], "--experiment_dir", tmp_path / "run")
    for more, message in (
        (("--max_seq_length=129",), "--max_seq_length 129 exceeds the 128"),
        (("--max_seq_length=2",), "--max_seq_length 2 leaves no room"),
        (("--learning_rate=1e30",), "--learning_rate 1e+30 is too high"),
        (("--test_file", unknown), 'class "unheard of" does not occur in the train split'),
    ):
        assert message in error_line(run_preloaded(SCRIPT, *flags, *more)), more


def test_positions_that_roberta_never_uses_are_not_counted(checkpoints, tmp_path):
    config = RobertaConfig(vocab_size=1000, max_position_embeddings=130, pad_token_id=1, **SIZE)
    shutil.copytree(checkpoints["bert"], tmp_path / "roberta")
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "roberta")
    loaded = encoder.load(str(tmp_path / "roberta"), LABELS, 1)
    tokenizer = model.load_tokenizer(str(tmp_path / "roberta"), ends=False)
    assert model.context_length(loaded, tokenizer) == 128
    rows, _ = encoder.encode(tokenizer, ["the dog " * 200], 128)
    encoder.classify(loaded, encoder.Texts(rows, 1), "auto")
    with pytest.raises((IndexError, RuntimeError)):
        encoder.classify(loaded, encoder.Texts([[*rows[0], 5]], 1), "auto")


def test_a_long_text_is_cut_and_a_control_token_in_it_is_read_as_letters(checkpoints):
    tokenizer = model.load_tokenizer(str(checkpoints["bert"]), ends=False)
    texts = ["a cat", "the dog " * 1000, "a [SEP] b"]
    rows, cut = encoder.encode(tokenizer, texts, 16)
    assert cut == 1
    assert len(rows[1]) == 16
    ends = tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]"])
    assert all([row[0], row[-1]] == ends and row.count(ends[1]) == 1 for row in rows)
