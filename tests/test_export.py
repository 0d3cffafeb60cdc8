"""serving/export.py: what it leaves is the run's own merged model to anybody, whole or not at all."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DEMO_DATA, DEMO_MODEL, ROOT, error_line
from leave_finished import leave
from peft import LoraConfig, PeftModel, get_peft_model
from preloaded import kill, run_preloaded, start_preloaded, start_until
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_other_models import NF4, make_falcon, make_redpajama
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

from prompts import build_prompt
from study import dense, model
from study.errors import UserError

POSTS = DEMO_DATA / "posts_test.jsonl"
TRAIN = ("--train_file", DEMO_DATA / "posts_train.jsonl", "--test_file", POSTS)


def export(run: Path, folder: Path, *flags: object):
    return run_preloaded("serving/export.py", run, "--output_dir", folder, *flags)


def exported(run: Path, folder: Path, *flags: object) -> dict:
    done = export(run, folder, *flags)
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout
    return json.loads((folder / "export.json").read_text())


def program_of(path: Path, before: str) -> Path:
    """The script, which does `before` before anything else."""
    path.write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'serving')!r}]\n"
        f"import export\nfrom study import cli, dense\n{before}\ncli.run_script(export.main)\n"
    )
    return path


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """A training of the demo's model for one step, and an adapter that matters as a long one's does."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    flags = ("--pretrained_ckpt", DEMO_MODEL, *TRAIN, "--epochs", 1, "--max_train_samples", 8)
    done = run_preloaded("llama2_classification.py", *flags, "--experiment_dir", folder)
    assert done.returncode == 0, done.stderr
    path = folder / "adapter" / "adapter_model.safetensors"
    torch.manual_seed(1)
    weights = {name: 0.1 * torch.randn_like(tensor) for name, tensor in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    content = json.loads((folder / "train.json").read_text())
    content["train"]["adapter_sha256"] = model.fingerprint(folder / "adapter")
    (folder / "train.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def merged(tuned, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "model"
    exported(tuned, folder)
    return folder


def run_of(checkpoint: Path, folder: Path, targets: object = "all-linear") -> Path:
    """A finished run by its record, with an adapter of random weights that matter, for a checkpoint that
    none was trained on."""
    flags = ("--pretrained_ckpt", checkpoint, *TRAIN, "--experiment_dir", folder)
    leave("llama2_classification.py", list(map(str, flags)))
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    torch.manual_seed(1)
    settings = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(base, settings).save_pretrained(folder / "adapter")
    content = json.loads((folder / "train.json").read_text())
    content |= {"quantization": NF4.to_dict(), "labels": ["a", "b"]}
    content["train"]["adapter_sha256"] = model.fingerprint(folder / "adapter")
    (folder / "train.json").write_text(json.dumps(content))
    return folder


def save(folder: Path, config) -> None:
    """A model of random weights, biases and norms among them, that reads as the demo's does."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config)
    for parameter in made.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    made.to(torch.bfloat16).save_pretrained(folder)
    for path in DEMO_MODEL.glob("tokenizer*"):
        shutil.copy(path, folder)


def tiny_llama(layers: int = 2, hidden: int = 128, **settings) -> LlamaConfig:
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    settings = {"vocab_size": 2048, "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2} | settings
    return LlamaConfig(**sizes, **settings)


MAKERS = {
    "falcon": make_falcon,
    "redpajama": make_redpajama,
    "tied": lambda folder: save(folder, tiny_llama(tie_word_embeddings=True)),
    "biases": lambda folder: save(folder, tiny_llama(attention_bias=True, mlp_bias=True)),
    "gpt2": lambda folder: save(
        folder, GPT2Config(vocab_size=2048, n_embd=128, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    ),
}


def make_partly_dense(folder: Path) -> None:
    """In 4 bits already, but for one projection."""
    save(folder / "whole", tiny_llama())
    settings = NF4.to_dict() | {"llm_int8_skip_modules": ["lm_head", "up_proj"]}
    loaded = AutoModelForCausalLM.from_pretrained(
        folder / "whole", quantization_config=type(NF4).from_dict(settings), dtype=torch.bfloat16
    )
    loaded.save_pretrained(folder)
    for path in (folder / "whole").glob("tokenizer*"):
        shutil.copy(path, folder)


MAKERS["partly dense"] = make_partly_dense


@pytest.fixture(scope="module", params=MAKERS)
def made(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / request.param.replace(" ", "-")
    MAKERS[request.param](folder)
    return folder


# It is the run's model


def test_plain_transformers_gives_the_answers_of_scoring_with_the_merged_model(tuned, merged):
    done = run_preloaded(
        "llama2_classification_inference.py",
        "--experiment_dir",
        tuned,
        "--merge",
        "on",
        "--eval_batch_size",
        1,
        "--max_eval_samples",
        24,
    )
    assert done.returncode == 0, done.stderr
    [path] = tuned.glob("predictions*.jsonl")
    scored, posts = ([json.loads(line) for line in of.read_text().splitlines()] for of in (path, POSTS))
    tokenizer, loaded = AutoTokenizer.from_pretrained(merged), AutoModelForCausalLM.from_pretrained(merged)
    assert loaded.dtype == torch.bfloat16
    assert not hasattr(loaded.config, "quantization_config")
    most, answers = json.loads((merged / "export.json").read_text())["max_new_tokens"], []
    for row in scored:
        text = posts[row["index"]]["text"]
        prompt = tokenizer(build_prompt("classification", "instruction", text), return_tensors="pt")
        tokens = loaded.generate(**prompt, max_new_tokens=most)[0, prompt["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(tokens, skip_special_tokens=True))
    assert len({*answers}) > 2
    assert answers == [row["prediction"] for row in scored]


def test_weights_are_those_that_merging_makes_bit_by_bit(made, tmp_path):
    run, folder = run_of(made, tmp_path / "run"), tmp_path / "model"
    about = exported(run, folder)
    own = model.merge(model.load_adapter(model.load_base(str(made), NF4), run / "adapter"))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    tensors, expected = loaded.state_dict(), own.state_dict()
    for name, tensor in tensors.items():
        if "up_proj" in name and made.name == "partly-dense":
            continue  # which the run computes with its adapter beside it
        turned = isinstance(loaded.get_submodule(name.rpartition(".")[0]), Conv1D) and tensor.dim() == 2
        assert torch.equal(tensor.T if turned else tensor, expected[name]), name
        assert tensor.dtype == torch.bfloat16
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert len(file.keys()) == len({tensor.data_ptr() for tensor in tensors.values()})
    assert loaded.config.tie_word_embeddings == (made.name in {"falcon", "tied", "gpt2"})
    off = about["verified"]["relative"]
    assert off < 0.01 if made.name == "partly-dense" else off == 0


def test_the_adapter_on_the_dequantized_base_is_the_runs_model(tuned, tmp_path):
    folder = tmp_path / "model"
    about = exported(tuned, folder, "--adapter_on_dequantized")
    assert about["adapter"] == "adapter"
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(folder)
    assert model.fingerprint(folder / "adapter") == model.fingerprint(tuned / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder)
    plain = model.load_base(str(DEMO_MODEL), NF4)
    for name, layer in model.four_bit_layers(plain).items():
        assert torch.equal(base.get_submodule(name).weight, model.dequantized(layer))
    PeftModel.from_pretrained(base, folder / "adapter")


def test_an_adapter_that_has_no_weight_of_its_own_to_be_merged_into_is_refused():
    for targets, tied, place in (("lm_head", True, "lm_head"), ("embed_tokens", False, "model.embed_tokens")):
        base = AutoModelForCausalLM.from_config(tiny_llama(tie_word_embeddings=tied))
        tuned = get_peft_model(base, LoraConfig(target_modules=["q_proj", targets])).get_base_model()
        with pytest.raises(UserError, match=f"RUN: its adapter on {place} can.t be merged .*--adapter_on"):
            dense.refuse_unmergeable(tuned, "RUN")
    base = AutoModelForCausalLM.from_config(tiny_llama(tie_word_embeddings=False))
    tuned = get_peft_model(base, LoraConfig(target_modules=["q_proj", "lm_head"])).get_base_model()
    dense.refuse_unmergeable(tuned, "RUN")


# What it leaves


def test_a_server_finds_all_that_it_needs_and_may_read_it(tuned, merged):
    trained, about = (json.loads(path.read_text()) for path in (tuned / "train.json", merged / "export.json"))
    for name in ("task", "labels", "prompt_sha256", "checkpoint"):
        assert about[name] == trained[name]
    assert about["adapter_sha256"] == trained["train"]["adapter_sha256"]
    assert about["weights"] == {"model.safetensors": model.fingerprint(merged, "model.safetensors")}
    assert about["dtype"] == "bfloat16"
    assert about["verified"]["largest_difference"] == 0
    assert about["verified"]["equal_next_tokens"] == 100
    assert about["verified"]["text_gives_same_tokens"]
    assert {path.stat().st_mode & 0o777 for path in merged.iterdir()} == {0o644}
    assert merged.stat().st_mode & 0o777 == 0o755
    settings = json.loads((merged / "generation_config.json").read_text())
    assert (settings["eos_token_id"], settings["do_sample"]) == ([2], False)
    assert (
        json.loads((merged / "tokenizer_config.json").read_text())["tokenizer_class"] != "TokenizersBackend"
    )
    assert not [path for path in merged.parent.iterdir() if path.name.startswith(".")]


def test_shards_are_no_larger_than_asked_and_the_index_names_every_tensor_once(tuned, merged, tmp_path):
    about = exported(tuned, tmp_path / "model", "--max_shard_gb", 0.001)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    found = {}
    for name in about["weights"]:
        with safe_open(tmp_path / "model" / name, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 1e6
        assert {key: name for key in tensors} == {k: v for k, v in index["weight_map"].items() if v == name}
        found |= tensors
    assert len(about["weights"]) > 2
    assert found.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    with safe_open(merged / "model.safetensors", "pt") as file:
        assert {*file.keys()} == {*found}
        assert all(torch.equal(file.get_tensor(key), tensor) for key, tensor in found.items())


# Refusals


def unfinish(run: Path) -> None:
    (run / "train.json").unlink()


def change_adapter(run: Path) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_checkpoint(run: Path) -> None:
    content = json.loads((run / "train.json").read_text())
    content["checkpoint"]["sha256"] = "0" * 64
    (run / "train.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (shutil.rmtree, "there is no such run"),
        (unfinish, "its training is unfinished"),
        (change_adapter, "is not the adapter that its train.json tells of"),
        (change_checkpoint, "another checkpoint than --pretrained_ckpt holds now"),
    ],
)
def test_what_scoring_refuses_is_not_exported(tuned, tmp_path, spoil, words):
    run = Path(shutil.copytree(tuned, tmp_path / "run"))
    spoil(run)
    assert words in error_line(export(run, tmp_path / "model"))
    assert left_in(tmp_path) in ([], ["run"])


def test_a_folder_that_is_there_is_replaced_by_force_alone_and_only_an_export(tuned, merged, tmp_path):
    folder = Path(shutil.copytree(merged, tmp_path / "model"))
    assert "is there already: name another, or --force" in error_line(export(tuned, folder))
    (folder / "leftover").touch()
    exported(tuned, folder, "--force")
    assert left_in(folder) == left_in(merged)
    assert left_in(tmp_path) == ["model"]
    (folder / "export.json").unlink()
    assert "is no export" in error_line(export(tuned, folder, "--force"))
    assert left_in(folder)


def test_a_folder_that_can_not_be_written_is_named_in_one_line(tuned, tmp_path):
    (tmp_path / "file").touch()
    assert "--output_dir" in error_line(export(tuned, tmp_path / "file" / "model"))
    (tmp_path / "file").unlink()
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))"  # 1 MB a file
    program = program_of(tmp_path / "full.py", full)
    line = error_line(run_preloaded(program, tuned, "--output_dir", tmp_path / "model"))
    assert "can't be written" in line
    assert "make room" in line
    assert left_in(tmp_path) == ["full.py"]


def test_a_model_that_is_not_the_runs_is_not_left(tuned, tmp_path):
    program = program_of(
        tmp_path / "wrong.py",
        "right = dense.dense\n"
        "dense.dense = lambda module, leaf, turned, merged: right(module, leaf, turned, False)",
    )
    line = error_line(run_preloaded(program, tuned, "--output_dir", tmp_path / "model"))
    assert "it is not the run's model, logits at most" in line
    assert left_in(tmp_path) == ["wrong.py"]


# Killed, and large


def test_a_killed_export_leaves_nothing_that_looks_finished_and_the_next_one_works(tuned, merged, tmp_path):
    folder = tmp_path / "model"
    begun = lambda: list(tmp_path.glob(".model.partial/*.safetensors"))
    kill(start_until(begun, "serving/export.py", tuned, "--output_dir", folder, "--max_shard_gb", 0.0005))
    assert left_in(tmp_path) == [".model.partial"]
    exported(tuned, folder)
    assert left_in(tmp_path) == ["model"]
    assert model.fingerprint(folder, "model.safetensors") == model.fingerprint(merged, "model.safetensors")


def peak_of(program: Path, *flags: object) -> int:
    """The most memory, in bytes, that a program had for itself: not what it maps of files, which goes where
    others need it."""
    peak, process = 0, start_preloaded(program, *flags)
    while process.is_alive():
        with contextlib.suppress(OSError, StopIteration):
            status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            own = next(line for line in status if line.startswith("RssAnon"))
            peak = max(peak, 1024 * int(own.split()[1]))
        process.join(0.002)
    assert process.exitcode == 0
    return peak


def test_memory_grows_with_the_model_in_4_bits_not_with_the_dense_one(tmp_path):
    # malloc gives back at once what is as large as a large model's matrices; those here are small.
    threshold = "import ctypes; ctypes.CDLL(None).mallopt(-3, 100_000)"  # M_MMAP_THRESHOLD
    peaks, weights = {}, {}
    for layers in (1, 6):
        root = tmp_path / str(layers)
        save(root / "checkpoint", tiny_llama(layers, 1024))
        run, place = run_of(root / "checkpoint", root / "run"), root / "model"
        program = program_of(root / "export.py", threshold)
        peaks[layers] = peak_of(program, run, "--output_dir", place, "--max_shard_gb", 0.05)
        weights[layers] = json.loads((place / "export.json").read_text())["bytes"]
        shutil.rmtree(root)
    dense_grown = weights[6] - weights[1]
    assert dense_grown > 130e6
    assert peaks[6] - peaks[1] < 0.516 / 2 * dense_grown + 30e6  # bytes of a weight in 4 bits and in 16
