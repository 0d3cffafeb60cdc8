"""A fine-tuned model's weights made dense, one after the other and never all at once: computed with, and
written as safetensors in shards.

Beside the model in 4 bits lies one weight, or the shard that is being written.
"""

import contextlib
import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from study import checks, model
from study.errors import UserError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


# Computing


@contextlib.contextmanager
def as_merged(base) -> Iterator[None]:
    """Let `base` compute what `model.merge` would make of it, each layer's dense weight made when its turn
    comes."""
    layers = model.four_bit_layers(base).values()
    try:
        for module in layers:
            module.forward = lambda x, module=module: torch.nn.functional.linear(
                x, model.merged_weight(module), getattr(module, "base_layer", module).bias
            )
        yield
    finally:
        for module in layers:
            vars(module).pop("forward", None)


def merged_logits(base, prompts: Sequence[list[int]]) -> list[torch.Tensor]:
    """Logits [tokens, vocabulary] of each prompt by the merged model, in float32 on the CPU."""
    with as_merged(base):
        return logits(base, prompts)


def logits(base, prompts: Sequence[list[int]]) -> list[torch.Tensor]:
    """Likewise by the model as it is."""
    return [checks.logits_of(base, row).float().cpu() for row in prompts]


# Writing


def refuse_unmergeable(base, where: str) -> None:
    """Raise UserError for an adapter on what is no linear layer with a weight of its own, into which alone it
    can be merged."""
    table = getattr(base.get_input_embeddings(), "base_layer", base.get_input_embeddings()).weight
    for name, module in base.named_modules():
        if not any(getattr(module, each, None) for each in ("lora_A", "lora_embedding_A")):
            continue
        if not isinstance(module.base_layer, torch.nn.Linear) or module.base_layer.weight is table:
            raise UserError(
                f"{where}: its adapter on {name} can't be merged (no linear layer with a weight of its own): "
                "export it with --adapter_on_dequantized"
            )


def tensors_of(base) -> dict[str, tuple[torch.nn.Module, str, bool]]:
    """What plain transformers stores of the model, by name there, once where tensors are tied: its module
    here, its name in that, and whether it is stored with rows and columns exchanged."""
    with torch.device("meta"):
        plain = type(base)(copy.deepcopy(base.config))
    found, known = {}, set()
    for name in plain.state_dict():
        parent, _, leaf = name.rpartition(".")
        module = base.get_submodule(parent)
        tensor = getattr(getattr(module, "base_layer", module), leaf)
        if id(tensor) not in known:
            turned = isinstance(plain.get_submodule(parent), Conv1D) and hasattr(tensor, "quant_state")
            found[name] = module, leaf, turned
            known.add(id(tensor))
    return found


def dense(module, leaf: str, turned: bool, merged: bool) -> torch.Tensor:
    """A tensor as it is stored, on the CPU; a weight with its adapter if `merged`."""
    layer = getattr(module, "base_layer", module)
    if leaf != "weight" or not isinstance(layer, torch.nn.Linear):
        return getattr(layer, leaf).data.cpu().contiguous()
    weight = model.merged_weight(module) if merged else model.dequantized(layer)
    return (weight.T if turned else weight).cpu().contiguous()


def size_of(module, leaf: str) -> int:
    """Bytes of a tensor as it is stored."""
    layer = getattr(module, "base_layer", module)
    tensor = getattr(layer, leaf)
    if hasattr(tensor, "quant_state"):
        return tensor.quant_state.shape.numel() * layer.compute_dtype.itemsize
    return tensor.nbytes


def shards_of(sizes: dict[str, int], most: int) -> list[list[str]]:
    """The names, in order, in as few shards as hold at most `most` bytes each; a larger tensor has its
    own."""
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write(base, folder: Path, most: int, merged: bool) -> list[Path]:
    """Write the model's weights into `folder`, in files of at most `most` bytes as transformers names them,
    with an index where there are several; the adapters' are in them if `merged`."""
    tensors = tensors_of(base)
    sizes = {name: size_of(module, leaf) for name, (module, leaf, _) in tensors.items()}
    shards, paths, index = shards_of(sizes, most), [], {}
    for number, names in enumerate(tqdm(shards, "shards", disable=None), 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else WHOLE
        paths.append(folder / file)
        save_file({name: dense(*tensors[name], merged) for name in names}, paths[-1], {"format": "pt"})
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(content, indent=2), encoding="utf-8")
    return paths


def bytes_of(base) -> int:
    """Of all weights as they are stored."""
    return sum(size_of(module, leaf) for module, leaf, _ in tensors_of(base).values())
