"""Write one of the study's models, of full size with random weights, to measure where the real one can not be
had.

    python -m benchmarks.checkpoint 7b FOLDER --tokenizer CKPT

It takes the time and the memory of the real one and scores nothing. It never ends an answer by itself. A
causal model is in 4 bits already, and made layer by layer: of Llama-2-70B's 140 GB in full precision no more
than a layer and the embeddings are ever in memory.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from study import cli, device
from study.errors import UserError

VOCABULARY = {"falcon-7b": 65024, "redpajama-3b": 50432, "redpajama-7b": 50432, "flan-t5-base": 32128}
VOCABULARY["flan-t5-large"] = VOCABULARY["flan-t5-base"]
BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
FLAN = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "d_kv": 64}
FALCON = {"model_type": "falcon", "multi_query": True, "parallel_attn": True, "bias": False, "alibi": False}
NEOX = {"model_type": "gpt_neox", "max_position_embeddings": 2048, "rotary_pct": 1.0}
NEOX |= {"use_parallel_residual": False, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}


LAYER = re.compile(r"(\.(?:layers|h)\.)0\.")  # in a tensor's name, of the first layer


def llama(hidden: int, inner: int, layers: int, heads: int, key_heads: int | None = None) -> dict:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return LLAMA | sizes | {"num_attention_heads": heads, "num_key_value_heads": key_heads or heads}


def flan(width: int, inner: int, layers: int, heads: int) -> dict:
    return FLAN | {"d_model": width, "d_ff": inner, "num_layers": layers, "num_heads": heads}


MODELS = {  # as their hub pages have them
    "tiny": llama(64, 128, 2, 2),  # of no size, for what is not about the model
    "7b": llama(4096, 11008, 32, 32),  # Touvron et al., 2023
    "13b": llama(5120, 13824, 40, 40),
    "70b": llama(8192, 28672, 80, 64, 8),
    "falcon-7b": FALCON | {"hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71},
    "redpajama-3b": NEOX | {"hidden_size": 2560, "intermediate_size": 10240},
    "redpajama-7b": NEOX | {"hidden_size": 4096, "intermediate_size": 16384},
    "bert-base": BERT,  # whose sizes are the defaults
    "flan-t5-base": flan(768, 2048, 12, 12),
    "flan-t5-large": flan(1024, 2816, 24, 16),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=MODELS)
    sizes = "4 GB for 7b, 7 GB for 13b and 36 GB for 70b"
    parser.add_argument("folder", type=Path, help=f"where to write it, {sizes}")
    parser.add_argument("--tokenizer", required=True, metavar="CKPT", help="hub id or folder of a tokenizer")
    args = parser.parse_args()
    if args.folder.exists():
        raise UserError(f"{args.folder} exists: remove it or name another folder")

    import torch
    from transformers import AutoConfig, AutoTokenizer

    from study.model import use_plain_layers

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    config = AutoConfig.for_model(**MODELS[args.model])
    config.vocab_size = VOCABULARY.get(args.model, len(tokenizer))
    config.random_weights = True  # which every record of it says, and no table shows a score of
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    if config.model_type == "falcon":
        use_plain_layers()
    torch.manual_seed(0)
    causal = config.model_type not in ("bert", "t5")
    if causal:
        write_by_layers(in_4_bits, config, args.folder)
    else:
        dense(config, torch.float32).save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)
    print(f"{args.folder}: {args.model}, random weights" + " in 4 bits" * causal)


def dense(config, dtype):
    """A model of this configuration with random weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    kinds = {"bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}
    with torch.device(device.current()):
        return kinds.get(config.model_type, AutoModelForCausalLM).from_config(config, dtype=dtype)


def in_4_bits(config):
    """A causal one as it is loaded: bfloat16, its linear layers in 4 bits."""
    import torch

    from benchmarks.workers import nf4

    model = dense(config, torch.bfloat16)
    options = {"quantization_config": nf4(), "dtype": torch.bfloat16, "device_map": {"": device.current()}}
    return type(model).from_pretrained(None, config=config, state_dict=model.state_dict(), **options)


def write_by_layers(make: Callable, config, folder: Path) -> None:
    """Write the model of `config` as its save_pretrained would, a layer a file: of models of one layer, which
    `make` makes one after the other, each another one. The first has what is no layer's, too."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    count, files = config.num_hidden_layers, {}
    config.num_hidden_layers = 1
    for i in range(count):
        model, file = make(config), folder / f"model-{i + 1:05}-of-{count:05}.safetensors"
        model.config.num_hidden_layers = count
        if i == 0:
            model.save_pretrained(folder)
            os.replace(folder / "model.safetensors", file)
        else:
            of_layer = {name: tensor for name, tensor in model.state_dict().items() if LAYER.search(name)}
            tensors = {LAYER.sub(rf"\g<1>{i}.", name): tensor for name, tensor in of_layer.items()}
            save_file(tensors, file, metadata={"format": "pt"})
        with safe_open(file, "pt") as written:
            files |= dict.fromkeys(written.keys(), file.name)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(cli.run_script(lambda _: main()))
