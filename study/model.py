"""Load a checkpoint in 4 bits and its tokenizer, put a trained adapter on it."""

import hashlib
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from study import checkpoint as checkpoints
from study import checks, device, processes, sharding
from study.errors import UserError, is_out_of_memory

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
WEIGHTS = "model.safetensors"
WHOLE = {WEIGHTS: "model_sha256", "config.json": "model_config_sha256"}


def from_checkpoint(loader, checkpoint: str, **options):
    """`loader.from_pretrained` of --pretrained_ckpt, whatever can go wrong with it said in one line. No code
    that a checkpoint brings along is run."""
    folder = checkpoints.folder_of(checkpoint, fetch=True)
    try:
        return loader.from_pretrained(str(folder), trust_remote_code=False, **options)
    except Exception as error:  # whatever transformers and those below it raise for a broken checkpoint
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if "custom code" in reason or "remote code" in reason:
            raise UserError(
                f"--pretrained_ckpt {checkpoint} needs code of its own, which these scripts never run: name "
                "a checkpoint of an architecture that transformers has"
            ) from None
        if re.search("attn_implementation|attention implementation|FlashAttention", reason):
            name = options["attn_implementation"]
            raise UserError(f"--attn_implementation {name} can't be used, auto can: {reason}") from None
        if "above report" in reason:  # which is not shown
            reason = "a tensor that its config.json asks for is missing or has another shape"
        elif isinstance(error, KeyError):
            reason = f"a file of it names {reason}, which transformers does not know"
        raise UserError(f"--pretrained_ckpt {checkpoint} can't be loaded: {reason}") from None


def load_tokenizer(checkpoint: str, ends: bool = True):
    """The checkpoint's tokenizer: transformers' class for it, or where that reads texts otherwise than
    tokenizer.json says, the one that takes the file as it is. Raises UserError if neither does, or without an
    end of sequence for a model that `ends` its answers."""
    folder, where = place_of(checkpoint)
    try:
        tokenizer = from_checkpoint(AutoTokenizer, checkpoint)
        name = type(tokenizer).__name__
    except UserError:
        if not (folder / "tokenizer.json").is_file():
            raise
        tokenizer, name = None, "its tokenizer_class"
    # Where tokenizer_config.json itself says what begins a text, tokenizer.json need not say the same.
    special = not {"add_bos_token", "add_eos_token"} & read_config(folder).keys()
    if tokenizer is None or not all(checks.reads_as_its_file(tokenizer, folder, s) for s in {False, special}):
        if (folder / "tokenizer.json").is_file():
            tokenizer = from_checkpoint(PreTrainedTokenizerFast, checkpoint)
        if not checks.reads_as_its_file(tokenizer, folder):
            raise UserError(
                f"{where}: {name} does not read plain text as its files say: mend tokenizer_class in "
                "tokenizer_config.json"
            )
        print(f"tokenizer  by tokenizer.json: {name} would read texts otherwise", flush=True)
    if ends and tokenizer.eos_token_id is None:
        raise UserError(
            f"{where}: its tokenizer has no end-of-sequence token, by which answers "
            "end: set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def load_base(checkpoint: str, quantization, attn_implementation: str = "auto"):
    """The causal language model, frozen, its linear layers in 4 bits, its attention proven.

    Weights come from safetensors only, never pickle. A checkpoint that is in 4 bits already stays as it is
    but for the dtype that it computes in; `model.config.quantization_config` says how it is in fact. Raises
    UserError for a checkpoint whose tensors are not those of its configuration, or that can't be trained and
    scored alike. Where the launcher asks for FSDP, each process has a part of it (sharding.py)."""
    processes.join()
    if torch.cuda.is_available():
        torch.cuda.set_device(device.current())  # also for what is not told a device
    config = from_checkpoint(AutoConfig, checkpoint)
    settle_quantization(config, f"--pretrained_ckpt {checkpoint}")
    quantized = getattr(config, "quantization_config", None) is not None
    if torch.cuda.is_available():
        refuse_too_large(checkpoint, quantized, device.free_memory())
    if config.model_type == "falcon":
        use_plain_layers()
    options = {
        "config": config,
        "quantization_config": None if quantized else quantization,  # else its own counts
        "dtype": device.compute_dtype(),
        "use_safetensors": True,
        "output_loading_info": True,
        # Nothing of the checkpoint's own counts in greedy decoding but the ends of sequence.
        "generation_config": GenerationConfig(
            eos_token_id=checkpoints.ends_of(*place_of(checkpoint)) or None
        ),
    }
    with sharding.loading() as place:
        options["device_map"] = {"": place}
        model, found = load_with_attention(AutoModelForCausalLM, checkpoint, attn_implementation, options)
    where = f"--pretrained_ckpt {checkpoint}"
    checks.refuse_other_tensors(found, where)
    for refuse in (checks.refuse_other_shapes, checks.refuse_other_bits, checks.refuse_untied_head):
        refuse(model, where)
    model.name_or_path = checkpoint
    keep_unpacked(model)
    model.requires_grad_(False)
    if sharding.asked():
        sharding.share_out(model)
    try:
        checks.prove_attention(model)
    except (RuntimeError, ValueError, AttributeError, TypeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: {type(model).__name__} can't compute in 4 bits here: {reason}") from None
    say_what_differs(model, config)
    return model


def refuse_too_large(checkpoint: str, quantized: bool, free: int) -> None:
    """Raise UserError for a checkpoint that can't fit `free` bytes of a GPU in 4 bits, or of each that shares
    its layers."""
    parts = processes.count() if sharding.asked() else 1
    least = checkpoints.least_bytes(*place_of(checkpoint), quantized) / parts
    if least > free:
        shared, more = (" on each GPU", "more") if parts > 1 else ("", "several")
        least, free = (f"{size / device.GIB:.1f} GiB" for size in (least, free))
        raise UserError(
            f"--pretrained_ckpt {checkpoint} takes {least} in 4 bits or more{shared}, and {free} are free: "
            f"name a smaller one, or let {more} GPUs share its layers (docs/fsdp2.yaml)"
        )


def place_of(checkpoint: str) -> tuple[Path, str]:
    return checkpoints.folder_of(checkpoint, fetch=True), f"--pretrained_ckpt {checkpoint}"


def read_config(folder: Path) -> dict:
    path = folder / "tokenizer_config.json"
    return checkpoints.read_json(path, str(folder)) if path.is_file() else {}


def say_what_differs(model, config) -> None:
    """Print what of a checkpoint is not computed as its name promises."""
    dense, name = checks.left_out(model), type(model).__name__
    if dense:
        print(f"4 bits     not {dense}", flush=True)
    named = [own for own in config.architectures or [] if own != name]
    if named and getattr(config, "auto_map", None):
        print(f"model      by transformers' {name}: {named[0]}, the checkpoint's own code, is never run")


def as_loaded(model, tokenizer) -> dict:
    """What a record says of model and tokenizer as they are in fact, whatever was asked for."""
    return {
        "quantization": model.config.quantization_config.to_dict(),
        "loaded": {
            "model": type(model).__name__,
            "tokenizer": type(tokenizer).__name__,
            "attention": model.config._attn_implementation,
            "attention_disproven": getattr(model, "disproven", None),
            "not_in_4_bits": checks.left_out(model),
        },
    }


def load_with_attention(loader, checkpoint: str, wanted: str, options: dict) -> tuple:
    """The model and transformers' loading info; for "auto" with PyTorch's attention, or the model's own where
    transformers has no other for it."""
    if wanted != "auto":
        return from_checkpoint(loader, checkpoint, attn_implementation=wanted, **options)
    try:
        return from_checkpoint(loader, checkpoint, attn_implementation="sdpa", **options)
    except UserError as error:
        if "scaled_dot_product_attention" not in str(error):  # the reason why there is no sdpa
            raise
        return from_checkpoint(loader, checkpoint, attn_implementation="eager", **options)


def settle_quantization(config, where: str) -> None:
    """Let a checkpoint that is quantized already compute in our dtype. Raises UserError where it is not in
    bitsandbytes' 4 bits, which are what can be trained, merged and scored alike."""
    own = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if own is None:
        return
    own = own if isinstance(own, dict) else own.to_dict()
    if own.get("quant_method", "bitsandbytes") != "bitsandbytes" or not own.get("load_in_4bit"):
        kind = "8 bits" if own.get("load_in_8bit") else f"a format ({own.get('quant_method')}) of its own"
        raise UserError(
            f"{where} is quantized already, in {kind}: name the checkpoint in full precision, or one in 4 "
            "bits by bitsandbytes"
        )
    config.quantization_config = own | {
        "bnb_4bit_compute_dtype": str(device.compute_dtype()).removeprefix("torch.")
    }


def use_plain_layers() -> None:
    """Let Falcon's linear layers be torch.nn.Linear, which they differ from in the rounding of a bias alone:
    transformers puts that class in 4 bits and none made from it."""
    from transformers.models.falcon import modeling_falcon

    modeling_falcon.FalconLinear = torch.nn.Linear


def keep_unpacked(model) -> None:
    """Keep bitsandbytes from repacking weights on the CPU that it can't: of a number of rows that is no
    multiple of 32, or with other than its usual storage."""
    for layer in four_bit_layers(model).values():
        shape = layer.weight.quant_state.shape
        if shape[0] % 32 or shape[1] % layer.weight.quant_state.blocksize:
            layer.support_avx512bf16_for_cpu = False


def quantization_from(recorded: dict):
    """The 4-bit settings that a training recorded."""
    return BitsAndBytesConfig.from_dict(recorded)


def fingerprint(folder: Path, name: str = ADAPTER) -> str:
    """SHA-256 of an adapter's weights, or of another file of it."""
    with open(folder / name, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprints(folder: Path) -> dict[str, str]:
    """Of a whole model that was trained, by their names in its train.json."""
    return {name: fingerprint(folder, file) for file, name in WHOLE.items()}


def refuse_other_model(folder: Path, trained: dict) -> None:
    """Raise UserError unless `folder` holds the whole model that the `train` of a train.json tells of."""
    told = {name: trained.get(name) for name in WHOLE.values()}
    if not all((folder / file).is_file() for file in WHOLE) or fingerprints(folder) != told:
        raise UserError(
            f"{folder} is not the model that its train.json tells of: train it again with --force"
        )


def load_adapter(
    model, folder: Path, sha256: str | None = None, config_sha256: str | None = None, dtype=None
):
    """`model` with a trained adapter for inference, its weights in the `dtype` that training multiplied them
    in (device.compute_dtype). Raises UserError for one that is not whole, does not fit, or has another
    fingerprint than `sha256`."""
    if not (folder / ADAPTER).is_file():
        raise UserError(f"{folder} holds no {ADAPTER}: train the run again with --force")
    checkpoints.refuse_pointer(folder / ADAPTER, str(folder))
    whole = (folder / CONFIG).is_file()
    other = sha256 not in (None, fingerprint(folder))
    if other or (whole and config_sha256 not in (None, fingerprint(folder, CONFIG))):
        raise UserError(
            f"{folder} is not the adapter that its train.json tells of: train it again with --force"
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            model = PeftModel.from_pretrained(
                model, folder, autocast_adapter_dtype=False, low_cpu_mem_usage=True
            )
        with safe_open(folder / ADAPTER, "pt") as file:
            refuse_unplaced(model, file.keys())
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, UserWarning) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder} is damaged or not an adapter of --pretrained_ckpt: name the checkpoint that it was "
            f"trained on, or train the run again with --force ({reason})"
        ) from None
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            if not torch.isfinite(parameter).all():
                raise UserError(f"{folder}: {name} holds no numbers: train the run again with --force")
            parameter.data = parameter.data.to(dtype or device.compute_dtype())
    return model.eval()


def refuse_unplaced(model, names: Iterable[str]) -> None:
    """Raise ValueError if an adapter has more tensors than found a place: PEFT is silent about those."""
    held, placed = (
        sum("lora_" in name for name in every) for every in (names, dict(model.named_parameters()))
    )
    if held != placed:
        raise ValueError(f"it has {held} tensors, and the model a place for {placed}")


def four_bit_layers(model) -> dict:
    """The linear layers in 4 bits by name, each with its adapter around it if it has one."""
    found = {}
    for name, module in model.named_modules():
        layer = getattr(module, "base_layer", module)
        if hasattr(getattr(layer, "weight", None), "quant_state") and not name.endswith(".base_layer"):
            found[name] = module
    return found


def base_of(model):
    """A PEFT model's own model, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def should_merge(model, wanted: str) -> bool:
    """--merge, or for "auto" whether a GPU holds the dense weights and half as much again beside them."""
    if wanted != "auto" or not torch.cuda.is_available():
        return wanted == "on"
    layers = [getattr(module, "base_layer", module) for module in four_bit_layers(model).values()]
    dense = device.compute_dtype().itemsize * sum(layer.in_features * layer.out_features for layer in layers)
    return device.free_memory() >= 1.5 * dense


def merge(model):
    """The base model with dense weights in place of those in 4 bits, which it uses up: those of
    `merged_weight`."""
    base = base_of(model)
    for name, module in four_bit_layers(base).items():
        layer, weight = getattr(module, "base_layer", module), merged_weight(module)
        dense = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        dense.weight, dense.bias = torch.nn.Parameter(weight, requires_grad=False), layer.bias
        put(base, name, dense)
        layer.weight.data = layer.weight.data.new_empty(0)
    return base.eval()


def merged_weight(module) -> torch.Tensor:
    """The dense weight [out, in] of a layer in 4 bits: dequantized, its adapters, if any, added in float32,
    rounded once to the dtype that it computes in.

    Raises ValueError where bitsandbytes has repacked the weight: on the CPU, in eval mode, at first use.
    """
    layer = getattr(module, "base_layer", module)
    weight = dequantized(layer)
    for adapter in getattr(module, "active_adapters", []):
        a, b = (part[adapter].weight.float() for part in (module.lora_A, module.lora_B))
        weight = torch.addmm(weight.float(), b, a, alpha=module.scaling[adapter]).to(weight.dtype)
    return weight


def dequantized(layer) -> torch.Tensor:
    """The weight [out, in] of a layer without its adapter; one in 4 bits in the dtype that it computes in."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.data
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError("merge before the model computes anything: its weights are repacked")
    return dequantize_4bit(layer.weight.data, state).to(layer.compute_dtype)


def put(model, name: str, module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def remember(base) -> None:
    """Let `take_off` find the layers in 4 bits as they are now."""
    base.in_4_bits = {
        name: (layer, layer.weight.data, dict(vars(layer.weight.quant_state)))
        for name, layer in four_bit_layers(base).items()
    }


def take_off(tuned):
    """The base of a PEFT model, or a base itself, as `remember` saw it: without adapter, its layers in 4
    bits, whether `merge` has replaced them or bitsandbytes repacked them, as it does on the CPU at first use:
    with rounded scales, and what it unpacks of that when another adapter comes are other weights."""
    base = tuned.unload() if hasattr(tuned, "unload") else tuned
    vars(base).pop("peft_config", None)
    for name, (layer, data, state) in base.in_4_bits.items():
        layer.weight.data = data
        vars(layer.weight.quant_state).clear()
        vars(layer.weight.quant_state).update(state)
        put(base, name, layer)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return base


def context_length(model, tokenizer) -> int:
    """The most tokens that a sequence may have."""
    length = (
        getattr(model.config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    )
    return min(length, 2**20) - unused_positions(model)  # a tokenizer without a limit says 1e30


def unused_positions(model) -> int:
    """RoBERTa and its like count positions from the one behind that of padding."""
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    padding = (getattr(table, "padding_idx", None) for table in tables)
    return next((place + 1 for place in padding if place is not None), 0)


def check_length(model, tokenizer, args) -> None:
    """Raise UserError if --max_seq_length exceeds what the model can attend to."""
    most = context_length(model, tokenizer)
    if args.max_seq_length > most:
        raise UserError(
            f"--max_seq_length {args.max_seq_length} exceeds the {most} that {args.pretrained_ckpt} takes"
        )
