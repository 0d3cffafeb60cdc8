"""A checkpoint is known by its content: other weights have another fingerprint; what is broken is named."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import DEMO_MODEL
from safetensors.torch import load_file, save_file

from study import checkpoint
from study.errors import UserError

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{7:064d}\nsize 3089528\n"


@pytest.fixture(autouse=True)
def no_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(DEMO_MODEL, tmp_path / "model")


def change_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def change_json(folder, name: str, **changes) -> None:
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def nudge(weights: dict) -> dict:
    name = sorted(weights)[-1]
    weights[name].view(-1)[-1] += 1
    return weights


CHANGES = {
    "one weight": lambda folder: change_weights(folder, nudge),
    "configuration": lambda folder: change_json(folder, "config.json", rms_norm_eps=1e-3),
    "tokenizer": lambda folder: change_json(folder, "tokenizer_config.json", model_max_length=9),
    "chat template": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_checkpoint_has_another_fingerprint(folder, change):
    before = checkpoint.identify(str(folder))
    change(folder)
    assert checkpoint.identify(str(folder))["sha256"] != before["sha256"]


def test_a_copy_elsewhere_is_the_same_checkpoint_whatever_it_says_of_decoding(folder, tmp_path):
    change_json(folder, "generation_config.json", min_new_tokens=9, eos_token_id=[2, 7])
    change_json(folder, "config.json", _name_or_path="elsewhere", transformers_version="1")
    one, other = (checkpoint.identify(str(place)) for place in (DEMO_MODEL, folder))
    assert one["sha256"] == other["sha256"]
    assert (one["eos_token_id"], other["eos_token_id"]) == ([2], [2, 7])
    checkpoint.check_same(one, other, "the adapter", "mend")
    with pytest.raises(UserError, match=r"ends of sequence \[2\].* has \[2, 7\] now"):
        checkpoint.check_same(one, other, "the score", "mend", ends=True)


def test_other_weights_are_refused_and_unknown_ones_are_not_compared():
    a, b = ({"sha256": digit * 64, "eos_token_id": []} for digit in "ab")
    with pytest.raises(
        UserError, match=r"run was made with another checkpoint .*aaaaaaaa, not bbbbbbbb\): mend"
    ):
        checkpoint.check_same(a, b, "run", "mend")
    checkpoint.check_same(a, None, "run", "mend")
    checkpoint.check_same(None, b, "run", "mend")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_named(folder, dtype, value):
    def break_one(weights):
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
        weights["model.layers.3.mlp.down_proj.weight"][5, 7] = value
        return weights

    change_weights(folder, break_one)
    with pytest.raises(
        UserError, match=r"model\.layers\.3\.mlp\.down_proj\.weight in model\.safetensors holds"
    ):
        checkpoint.identify(str(folder))


def test_the_largest_and_smallest_numbers_are_numbers(folder):
    def stretch(weights):
        for name, weight in weights.items():
            limits = torch.finfo(weight.dtype)
            weight.view(-1)[:3] = torch.tensor([limits.max, limits.min, limits.smallest_normal / 2])
            weights[name] = weight
        return weights

    change_weights(folder, stretch)
    assert checkpoint.identify(str(folder))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "generation_config.json"]
)
def test_a_pointer_of_git_lfs_in_place_of_a_file_is_named(folder, name):
    (folder / name).write_text(POINTER)
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        checkpoint.identify(str(folder))


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_weights_cut_short_are_said_to_be_damaged(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or half-written"):
        checkpoint.identify(str(folder))


def test_several_files_of_weights_are_one_checkpoint_and_a_missing_one_is_named(folder):
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    (folder / "model.safetensors").unlink()
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, held in parts.items():
        save_file({name: weights[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    before = checkpoint.identify(str(folder))["sha256"]
    second = folder / "model-00002-of-00002.safetensors"
    save_file(nudge(load_file(second)), second)
    assert checkpoint.identify(str(folder))["sha256"] != before
    second.unlink()
    with pytest.raises(UserError, match=r"lacks model-00002-of-00002\.safetensors"):
        checkpoint.identify(str(folder))


def test_a_hub_id_is_the_snapshot_in_the_hubs_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    commit, cache = "a" * 40, tmp_path / "hub"
    repo = cache / "models--someone--small"
    shutil.copytree(DEMO_MODEL, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    found = checkpoint.identify("someone/small")
    assert found["commit"] == commit
    assert found["sha256"] == checkpoint.identify(str(DEMO_MODEL))["sha256"]
    assert checkpoint.identify("someone/else") is None
    (repo / "snapshots" / commit / "model.safetensors").rename(tmp_path / "apart")
    assert checkpoint.identify("someone/small") is None  # not whole yet
    (tmp_path / "apart").rename(repo / "snapshots" / commit / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert checkpoint.folder_of("someone/small", fetch=True).name == commit
    (repo / "refs" / "main").write_text("b" * 40)  # the hub moves while a run loads
    assert checkpoint.folder_of("someone/small", fetch=True).name == commit


def test_a_folder_that_is_not_there_is_unknown_until_it_is_needed(tmp_path):
    missing = str(tmp_path / "gone")
    assert checkpoint.identify(missing) is None
    with pytest.raises(UserError, match="there is no such folder"):
        checkpoint.identify(missing, fetch=True)


def test_hashes_of_files_that_have_settled_are_remembered_and_of_changed_ones_taken_anew(folder, monkeypatch):
    path = folder / "model.safetensors"
    monkeypatch.setattr(checkpoint.time, "time_ns", lambda: path.stat().st_ctime_ns + 10**10)
    first = checkpoint.identify(str(folder))
    monkeypatch.setattr(checkpoint, "header_of", lambda *_: pytest.fail("the weights were read again"))
    assert checkpoint.identify(str(folder)) == first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
    times = path.stat()
    change_weights(folder, nudge)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as cp -p or rsync would
    assert checkpoint.identify(str(folder))["sha256"] != first["sha256"]


@pytest.mark.parametrize("content", ["not JSON", "[]", '{"/x": 3}', '{"/x": []}'])
def test_a_damaged_memory_of_hashes_is_as_none(folder, content):
    expected = checkpoint.identify(str(folder))
    checkpoint.memory().parent.mkdir(parents=True)
    checkpoint.memory().write_text(content)
    assert checkpoint.identify(str(folder)) == expected


def test_numbers_are_looked_through_to_the_last_one(tmp_path):
    size = 2**18 + 1  # words: one more than is looked through at once
    numbers = np.zeros(size, dtype="<u2")
    numbers[-1] = 0x7F80
    (tmp_path / "x").write_bytes(numbers.tobytes())
    import mmap

    with open(tmp_path / "x", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        assert checkpoint.holds_no_number(content, "x", "BF16", 0, 2 * size) == "x"
        assert checkpoint.holds_no_number(content, "x", "BF16", 0, 2 * size - 2) is None


def test_an_adapter_in_the_checkpoints_folder_is_refused_since_it_would_be_applied(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter too"):
        checkpoint.identify(str(folder))


def test_other_chat_templates_are_part_of_the_fingerprint(folder):
    before = checkpoint.identify(str(folder))["sha256"]
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "default.jinja").write_text("{{ messages }}")
    assert checkpoint.identify(str(folder))["sha256"] != before


def test_masks_of_older_checkpoints_may_be_infinite(folder):
    mask = {"model.layers.0.attention.masked_bias": torch.tensor(-float("inf"), dtype=torch.float16)}
    change_weights(folder, lambda weights: weights | mask)
    assert checkpoint.identify(str(folder))


def test_weights_of_8_bits_are_refused_unless_the_configuration_says_how_to_read_them(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(folder, lambda weights: weights | {name: weights[name].to(torch.int8)})
    with pytest.raises(
        UserError, match=rf"{re.escape(name)} in I8, and config.json has no quantization_config"
    ):
        checkpoint.identify(str(folder))
    change_json(folder, "config.json", quantization_config={"load_in_8bit": True})
    assert checkpoint.identify(str(folder))


def test_what_was_allowed_beside_one_configuration_is_not_remembered_for_another(folder, monkeypatch):
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(folder, lambda weights: weights | {name: weights[name].to(torch.int8)})
    later = (folder / "model.safetensors").stat().st_ctime_ns + 10**10
    monkeypatch.setattr(checkpoint.time, "time_ns", lambda: later)
    change_json(folder, "config.json", quantization_config={"load_in_8bit": True})
    assert checkpoint.identify(str(folder))
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="in I8, and config"):
        checkpoint.identify(str(folder))


def test_a_checkpoint_that_says_its_weights_are_random_is_recorded_as_such(folder):
    assert "random_weights" not in checkpoint.identify(str(folder))
    change_json(folder, "config.json", random_weights=True)
    assert checkpoint.identify(str(folder))["random_weights"] is True
