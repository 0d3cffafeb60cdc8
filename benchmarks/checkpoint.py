"""Write a Llama-2 of full size with random weights, in 4 bits, to measure where the real one can not be had.

    python -m benchmarks.checkpoint 7b FOLDER --tokenizer CKPT

It takes the time and the memory of the real one and scores nothing. It never ends an answer by itself.
"""

import argparse
import sys
from pathlib import Path

from study import cli, device
from study.errors import UserError

SIZES = {  # hidden size, MLP size, layers, heads (Touvron et al., 2023)
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path, help="where to write it, 4 GB for 7b and 7 GB for 13b")
    parser.add_argument("--tokenizer", required=True, metavar="CKPT", help="hub id or folder of a tokenizer")
    args = parser.parse_args()
    if args.folder.exists():
        raise UserError(f"{args.folder} exists: remove it or name another folder")

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.workers import nf4
    from study import model

    tokenizer = model.load_tokenizer(args.tokenizer)
    hidden, inner, layers, heads = SIZES[args.size]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device.current()):
        weights = LlamaForCausalLM(config).state_dict()
    torch.set_default_dtype(torch.float32)
    quantized = LlamaForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        quantization_config=nf4(),
        dtype=torch.bfloat16,
        device_map={"": device.current()},
    )
    quantized.save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)
    print(f"{args.folder}: Llama-2-{args.size}, random weights in 4 bits")


if __name__ == "__main__":
    sys.exit(cli.run_script(lambda _: main()))
