"""Write one of the study's models, of full size with random weights, to measure where the real one can not be
had.

    python -m benchmarks.checkpoint 7b FOLDER --tokenizer CKPT

It takes the time and the memory of the real one and scores nothing. It never ends an answer by itself. A
causal model is in 4 bits already.
"""

import argparse
import sys
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


def llama(hidden: int, inner: int, layers: int, heads: int) -> dict:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return LLAMA | sizes | {"num_attention_heads": heads, "num_key_value_heads": heads}


def flan(width: int, inner: int, layers: int, heads: int) -> dict:
    return FLAN | {"d_model": width, "d_ff": inner, "num_layers": layers, "num_heads": heads}


MODELS = {  # as their hub pages have them
    "7b": llama(4096, 11008, 32, 32),  # Touvron et al., 2023
    "13b": llama(5120, 13824, 40, 40),
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
    parser.add_argument("folder", type=Path, help="where to write it, 4 GB for 7b and 7 GB for 13b")
    parser.add_argument("--tokenizer", required=True, metavar="CKPT", help="hub id or folder of a tokenizer")
    args = parser.parse_args()
    if args.folder.exists():
        raise UserError(f"{args.folder} exists: remove it or name another folder")

    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
    )

    from benchmarks.workers import nf4
    from study.model import use_plain_layers

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    config = AutoConfig.for_model(**MODELS[args.model])
    config.vocab_size = VOCABULARY.get(args.model, len(tokenizer))
    config.random_weights = True  # which every record of it says, and no table shows a score of
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    kind = {"bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}.get(
        config.model_type, AutoModelForCausalLM
    )
    if config.model_type == "falcon":
        use_plain_layers()
    torch.manual_seed(0)
    causal = kind is AutoModelForCausalLM
    torch.set_default_dtype(torch.bfloat16 if causal else torch.float32)
    with torch.device(device.current()):
        model = kind.from_config(config)
    torch.set_default_dtype(torch.float32)
    if causal:
        options = {
            "quantization_config": nf4(),
            "dtype": torch.bfloat16,
            "device_map": {"": device.current()},
        }
        model = type(model).from_pretrained(None, config=config, state_dict=model.state_dict(), **options)
    model.save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)
    print(f"{args.folder}: {args.model}, random weights" + " in 4 bits" * causal)


if __name__ == "__main__":
    sys.exit(cli.run_script(lambda _: main()))
