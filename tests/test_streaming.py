"""A checkpoint in many files is quantized tensor by tensor: what is alive at once stays near the model's own
size in 4 bits, whatever it has in full precision."""

import shutil
import weakref

import pytest
import torch
from conftest import DEMO_MODEL
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.workers import nf4
from study.errors import UserError
from study.model import load_base, refuse_too_large


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within it: those alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.storages, self.now, self.most = set(), 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.count(tensor.untyped_storage())
        return made

    def count(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.storages:
            self.storages.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.now -= size


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a Llama in bfloat16 in many files, and the bytes of these."""
    folder = tmp_path_factory.mktemp("many-files")
    sizes = {"hidden_size": 256, "intermediate_size": 896, "vocab_size": 2048, "num_hidden_layers": 12}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=1)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="2MB")
    for path in DEMO_MODEL.glob("tokenizer*"):
        shutil.copy(path, folder)
    files = [*folder.glob("*.safetensors")]
    assert len(files) > 8
    return folder, sum(path.stat().st_size for path in files)


def test_full_precision_is_never_in_memory_but_for_a_few_tensors(checkpoint):
    folder, size = checkpoint
    with Alive() as alive:
        model = load_base(str(folder), nf4())
    own = sum(parameter.nbytes for parameter in model.parameters())
    assert own < 0.4 * size
    assert alive.most < 0.5 * size
    assert alive.most < own + 0.1 * size  # which some tensors and a small forward pass take


def test_what_is_in_4_bits_already_is_in_memory_once(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # what other threads make is not counted
    folder, size = checkpoint
    load_base(str(folder), nf4()).save_pretrained(tmp_path, max_shard_size="1MB")
    with Alive() as alive:
        model = load_base(str(tmp_path), nf4())
    own = sum(parameter.nbytes for parameter in model.parameters())
    assert alive.most < own + 0.1 * size


def test_what_can_not_fit_the_gpu_in_4_bits_is_refused_with_what_it_takes(checkpoint, tmp_path):
    folder, size = checkpoint
    model = load_base(str(folder), nf4())
    model.save_pretrained(tmp_path)
    own = sum(parameter.nbytes for parameter in model.parameters())
    refuse_too_large(str(folder), False, size // 4)
    refuse_too_large(str(tmp_path), True, 2 * own)
    for place, quantized, free in ((folder, False, size // 4.1), (tmp_path, True, own)):
        with pytest.raises(UserError, match="GiB are free: name a smaller one, or let several GPUs"):
            refuse_too_large(str(place), quantized, free)
