"""Load a checkpoint in 4 bits and its tokenizer, put an adapter on it, and attend within examples laid end to end."""

import importlib.util
import os
import platform
import resource
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)

from study.cli import UserError

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

GIB = 2**30


def device() -> torch.device:
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def device_name() -> str:
    """Name of the GPU, or of the processor where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(device())
    names = [
        line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")
    ]
    return f"CPU, {os.cpu_count()} cores ({names[0] if names else platform.machine()})"


def compute_dtype() -> torch.dtype:
    """bfloat16, or float32 on GPUs before Ampere, which lack it. Never float16: it overflows on Llama-2."""
    old_gpu = torch.cuda.is_available() and torch.cuda.get_device_capability(device()) < (8, 0)
    return torch.float32 if old_gpu else torch.bfloat16


def peak_memory_gib() -> float:
    """Peak memory so far: allocated on the GPU, or without one the resident set of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(device()) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def check_checkpoint(checkpoint: str) -> None:
    """Raise UserError if a local checkpoint folder lacks its configuration, weights or tokenizer."""
    folder = Path(checkpoint)
    if not folder.exists() and (checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") > 1):
        raise UserError(f"--pretrained_ckpt {checkpoint}: there is no such folder")
    if not folder.is_dir():
        return
    parts = {
        "a configuration (config.json)": ["config.json"],
        "weights (model.safetensors)": ["*.safetensors"],
        "a tokenizer (tokenizer.json)": ["tokenizer.json", "tokenizer.model", "vocab.json"],
    }
    for part, patterns in parts.items():
        if not any(path for pattern in patterns for path in folder.glob(pattern)):
            raise UserError(
                f"--pretrained_ckpt {checkpoint} has not {part}: name a whole checkpoint folder or a hub id"
            )


def from_checkpoint(loader, checkpoint: str, **options):
    """`loader.from_pretrained`, with what can go wrong with a checkpoint said in one line."""
    try:
        return loader.from_pretrained(checkpoint, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        hint = "" if Path(checkpoint).is_dir() else " (offline? fetch it first, or name a local folder)"
        raise UserError(f"--pretrained_ckpt {checkpoint} can't be loaded{hint}: {reason[:300]}") from None


def load_tokenizer(checkpoint: str):
    check_checkpoint(checkpoint)
    return from_checkpoint(AutoTokenizer, checkpoint)


def load_base(checkpoint: str, quantization, attn_implementation: str = "sdpa"):
    """The causal language model, frozen, its linear layers in 4 bits. Weights come from safetensors only, never pickle."""
    check_checkpoint(checkpoint)
    config = from_checkpoint(AutoConfig, checkpoint)
    model = from_checkpoint(
        AutoModelForCausalLM,
        checkpoint,
        config=config,
        quantization_config=quantization,
        dtype=compute_dtype(),
        device_map={"": device()},
        attn_implementation=attn_implementation,
        use_safetensors=True,
    )
    return model.requires_grad_(False)


def quantization_from(recorded: dict):
    """The 4-bit settings that a training recorded."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig.from_dict(recorded)


def load_adapter(model, folder: Path):
    """`model` with a trained adapter for inference, its weights in the dtype that training multiplied them in."""
    from peft import PeftModel

    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder} holds no adapter_model.safetensors: train the run again with --force")
    model = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(compute_dtype())
    return model.eval()


def context_length(model, tokenizer) -> int:
    """The most tokens that a sequence may have."""
    length = (
        getattr(model.config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    )
    return min(length, 2**20)  # a tokenizer without a limit says 1e30


def check_length(model, tokenizer, args) -> None:
    """Raise UserError if --max_seq_length exceeds what the model can attend to."""
    most = context_length(model, tokenizer)
    if args.max_seq_length > most:
        raise UserError(
            f"--max_seq_length {args.max_seq_length} exceeds the {most} tokens that {args.pretrained_ckpt} takes"
        )


# Attention within examples laid end to end


def training_attention(wanted: str) -> str:
    """The attention to load a model with: --attn_implementation, or for "auto" the best of this machine."""
    if wanted != "auto":
        return wanted
    flash = (
        torch.cuda.is_available()
        and importlib.util.find_spec("flash_attn")
        and compute_dtype() == torch.bfloat16
    )
    return "flash_attention_2" if flash else "sdpa"


def packed_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    sliding_window=None,
    cu_seq_lens_q=None,
    max_length_q=None,
    **unused,
):
    """Causal attention of each of the sequences that lie end to end in one row, for transformers' AttentionInterface.

    query [1, heads, tokens, size], key and value [1, key heads, tokens, size]; cu_seq_lens_q [sequences + 1] are their
    borders. Returns ([1, tokens, heads, size], None). On CUDA one call of PyTorch's variable-length kernel; elsewhere one
    call a sequence.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        left = -1 if sliding_window is None else sliding_window - 1
        rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        borders = cu_seq_lens_q.to(torch.int32)
        longest = int(max_length_q)
        output = varlen_attn(*rows, borders, borders, longest, longest, scale=scaling, window_size=(left, 0))
        return output[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    pieces = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [
        F.scaled_dot_product_attention(
            *piece,
            attn_mask=window_mask(piece[0], sliding_window),
            scale=scaling,
            is_causal=not exceeds(piece[0], sliding_window),
        )
        for piece in pieces
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def exceeds(query: torch.Tensor, window: int | None) -> bool:
    return window is not None and query.shape[2] > window


def window_mask(query: torch.Tensor, window: int | None) -> torch.Tensor | None:
    """Boolean [tokens, tokens]: each token sees itself and the `window` - 1 before it; None where all are in reach."""
    if not exceeds(query, window):
        return None
    place = torch.arange(query.shape[2], device=query.device)
    distance = place[:, None] - place[None, :]
    return (distance >= 0) & (distance < window)


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", lambda *args, **kwargs: None)
