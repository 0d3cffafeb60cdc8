"""What a run proves before it begins, for training and scoring alike: that the loaded checkpoint, its
tokenizer and its attention are what they seem.

Each is held to a witness of its own: the tensors to those of the checkpoint's files, the tokenizer to its
tokenizer.json, the attention to the model's own ("eager") and to the rule that no token sees a later one.
What does not hold is refused in one line, or replaced by what does.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from study.checkpoint import OUTDATED
from study.errors import UserError

PROBE_TOKENS = 24
WINDOWS = ("sliding_window", "attention_chunk_size")
NARROW = 7
SMALL = 0.05  # a share of all weights that is not worth a word
LEAK = 1e-4  # of the logits' norm: what may change where nothing should, by rounding
# What a model may hand to its attention that sdpa and packed attention heed, or that changes no result.
HEEDED_NAMES = (
    "dropout scaling is_causal sliding_window attention_mask position_ids cache_position position_embeddings "
    "cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k use_cache past_key_values logits_to_keep "
    "output_attentions output_hidden_states output_router_logits return_dict num_items_in_batch target_dtype "
    "deterministic"
)
HEEDED = frozenset(HEEDED_NAMES.split())


# The checkpoint as loaded


def refuse_other_tensors(found: dict, where: str) -> None:
    """Raise UserError if loading (transformers' loading info) left a tensor of the model at random, or a
    tensor of the files unused."""
    kinds = {
        "missing_keys": "lacks the tensor",
        "unexpected_keys": "holds a tensor that its configuration has no place for,",
        "mismatched_keys": "holds in another shape than its configuration says the tensor",
        "error_msgs": "can't be loaded:",
        "conversion_errors": "can't be loaded:",
    }
    for kind, what in kinds.items():
        entries = (str(entry[0] if isinstance(entry, tuple) else entry) for entry in found.get(kind) or [])
        names = sorted(name for name in entries if kind != "unexpected_keys" or not OUTDATED.search(name))
        if names:
            more = f" and {len(names) - 1:,} more" if names[1:] else ""
            raise UserError(
                f"{where} {what} {names[0][:120]}{more}: its files and config.json don't belong together"
            )


def refuse_other_shapes(model, where: str) -> None:
    """Raise UserError for a tensor of another shape than the configuration gives it: where it quantizes,
    transformers does not look."""
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config))
    for name, parameter in plain.named_parameters():
        loaded, module = model.get_parameter(name), plain.get_submodule(name.rpartition(".")[0])
        shape = getattr(getattr(loaded, "quant_state", None), "shape", loaded.shape)
        turned = isinstance(module, Conv1D) and shape == parameter.shape[::-1]  # by bitsandbytes
        if shape != parameter.shape and not turned:
            raise UserError(
                f"{where} holds {name} in the shape {list(shape)}, where its config.json says "
                f"{list(parameter.shape)}: its files don't belong together"
            )


def refuse_other_bits(model, where: str) -> None:
    """Raise UserError if weights that should be in 4 bits are not, or not alike; and let the model's
    configuration say how they are, whatever the checkpoint's says."""
    kinds = set()
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            state = getattr(module.weight, "quant_state", None)
            if state is None:
                raise UserError(f"{where}: its config.json says that {name} is in 4 bits, and it is not")
            kinds.add((state.quant_type, bool(state.nested)))
    if len(kinds) > 1:
        raise UserError(f"{where}: its weights are in 4 bits in several ways ({sorted(kinds)})")
    if kinds:
        settings = model.config.quantization_config
        [(settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant)] = kinds


def refuse_untied_head(model, where: str) -> None:
    """Raise UserError for a head that the configuration ties to the embedding and the files do not."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    both = hasattr(head, "weight") and hasattr(table, "weight") and head.weight.shape == table.weight.shape
    if tied and both and head.weight.data_ptr() != table.weight.data_ptr():
        raise UserError(
            f"{where}: its config.json ties the head to the embedding (tie_word_embeddings), and its files "
            "hold another head: mend one of them"
        )


def left_out(model) -> str | None:
    """What of a model's weights is not in 4 bits, beside embeddings and head, as words; None where that is
    next to nothing (norms, biases, small projections)."""
    dense = [name for name, parameter in matrices(model).items() if not hasattr(parameter, "quant_state")]
    return in_words(model, dense)


def without_adapter(model) -> str | None:
    """Likewise what of a PEFT model has no adapter."""
    base = model.get_base_model()
    adapted = {name for name, module in base.named_modules() if hasattr(module, "lora_A")}
    bare = [
        name
        for name in matrices(base)
        if "lora_" not in name and not any(name.startswith(f"{a}.") for a in adapted)
    ]
    return in_words(base, bare)


def matrices(model) -> dict[str, torch.Tensor]:
    """A model's weights by name but for vectors, embeddings and head."""
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    known = {id(module.weight) for module in [*tables, model.get_output_embeddings()] if module is not None}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if (parameter.dim() > 1 or hasattr(parameter, "quant_state")) and id(parameter) not in known
    }


def in_words(model, names: Sequence[str]) -> str | None:
    weights = dict(model.named_parameters())
    share = sum(original_size(weights[name]) for name in names) / sum(map(original_size, weights.values()))
    kinds = sorted({".".join(name.removesuffix(".weight").split(".")[-2:]) for name in names})
    return f"{', '.join(kinds)}, {100 * share:.0f} % of all weights" if share >= SMALL else None


def original_size(parameter) -> int:
    """How many weights a parameter holds, also in 4 bits."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state else parameter.numel()


def named(model) -> str:
    return f"--pretrained_ckpt {model.name_or_path}".rstrip()


def refuse_unknown_tokens(model, tokenizer, rows: Iterable[Sequence[int]]) -> None:
    """Raise UserError for a token id among `rows` that the model has no embedding for."""
    size = model.get_input_embeddings().weight.shape[0]
    largest = max((max(row, default=0) for row in rows), default=0)
    if largest >= size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"{named(model)}: its tokenizer writes token {largest} ({token!r}), its embedding has "
            f"{size:,} rows: tokens were added and the model was not resized"
        )


# The tokenizer

SPOKEN = (
    "Tell me, what's  new?\n\n### Text:\n```\nIt's 10:45 on 24.12.2023; she'll pay $3.50 (or 7 %).\n"
    "\tWell: I'd say so!\n```\n\n### Class:",
    " Müller naïve Ωμέγα Привет 北京 नमस्ते 😀",
    "rec.sport.hockey_2-A/B",
)


def reads_as_its_file(tokenizer, folder: Path, special: bool = False) -> bool:
    """Whether a tokenizer gives plain texts the tokens that its tokenizer.json gives them, those that begin
    and end a text too if `special`. Without that file, whether it reads plain English back."""
    path = folder / "tokenizer.json"
    if path.is_file():
        from tokenizers import Tokenizer

        witness = Tokenizer.from_file(str(path))
        witness.no_padding()
        witness.no_truncation()
        return all(
            tokenizer(text, add_special_tokens=special)["input_ids"]
            == witness.encode(text, add_special_tokens=special).ids
            for text in SPOKEN
        )
    ids = tokenizer(SPOKEN[0], add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids).casefold().split() == SPOKEN[0].casefold().split()


# Attention


def is_given(option) -> bool:
    """Whether a model asks its attention for something by an option."""
    return option is not None and option is not False


class Watched:
    """An attention for transformers that computes as sdpa does and notes what the model hands to it."""

    def __init__(self):
        self.given: dict[str, object] = {}

    def __call__(self, module, query, key, value, attention_mask, **options):
        for name, value_given in options.items():
            if is_given(value_given):
                self.given[name] = value_given
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


WATCHED = Watched()
AttentionInterface.register("watched", WATCHED)
AttentionMaskInterface.register("watched", sdpa_mask)


@contextlib.contextmanager
def still(model, training: bool = False) -> Iterator[None]:
    """No gradients, no change of modes or of random numbers drawn later, and no dropout unless `training`.
    Layers in 4 bits stay in train mode, since on the CPU bitsandbytes would repack their weights, for
    good."""
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        module.training = training or hasattr(module, "quant_state")
    gpus = {part.device for part in model.parameters() if part.is_cuda}
    try:
        with torch.no_grad(), torch.random.fork_rng(gpus):  # of all others none is started
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def narrowed(model) -> Iterator[None]:
    """Windows and chunks of attention so narrow that PROBE_TOKENS exceed them."""
    holders = [vars(holder) for holder in (model.config, model.config.get_text_config(), *model.modules())]
    wide = {
        (id(holder), name): (holder, holder[name])
        for holder in holders
        for name in WINDOWS
        if isinstance(holder.get(name), int) and holder[name] > NARROW
    }
    try:
        for (_, name), (holder, _) in wide.items():
            holder[name] = NARROW
        yield
    finally:
        for (_, name), (holder, width) in wide.items():
            holder[name] = width


def rows_of_tokens(model, count: int) -> list[list[int]]:
    """Random rows of PROBE_TOKENS tokens."""
    generator, size = torch.Generator().manual_seed(0), model.get_input_embeddings().weight.shape[0]
    least = min(3, size - 1)
    return [torch.randint(least, size, (PROBE_TOKENS,), generator=generator).tolist() for _ in range(count)]


def logits_of(model, row: Sequence[int], attention: str | None = None) -> torch.Tensor:
    """Logits [tokens, vocabulary] of one row alone, in float64, by a given attention."""
    used = model.config._attn_implementation
    with still(model):
        if attention:
            model.set_attn_implementation(attention)
        ids = torch.tensor([row], device=model.get_input_embeddings().weight.device)
        try:
            return model(input_ids=ids, use_cache=False).logits[0].double()
        finally:
            if attention:
                model.set_attn_implementation(used)


def rounding(model) -> float:
    """How far apart, relatively, logits may be that two attentions give which compute the same.

    Eager rounds scores and shares to bfloat16, where others keep float32: in a Llama-2-7B of random weights,
    which passes rounding on more than a trained one, that makes 6 % on an H200."""
    return 2e-3 if model.dtype == torch.float32 else 0.2


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The distance of two tensors, relative to the second."""
    return ((one - other).norm() / other.norm().clamp_min(1e-30)).item()


def unheeded(model, row: Sequence[int]) -> list[str]:
    """The names of what the model hands to its attention that sdpa would not heed; none where its attention
    can't be exchanged, since that is its own."""
    WATCHED.given.clear()
    logits_of(model, row, "watched")
    return sorted(WATCHED.given.keys() - HEEDED)


def prove_attention(model) -> None:
    """Hold the model's attention to its own, eager one, and set that where the other computes something else,
    with a line that says why (`model.disproven` keeps it).

    Raises UserError for a model that sees later tokens or computes no numbers.
    """
    if getattr(model, "proven", None) != model.config._attn_implementation:
        with narrowed(model):
            prove_narrowed(model)
        model.proven = model.config._attn_implementation


def prove_narrowed(model) -> None:
    used, name = model.config._attn_implementation, type(model).__name__
    row, other = rows_of_tokens(model, 2)
    logits = {attention: logits_of(model, row, attention) for attention in ("eager", used)}
    if not torch.isfinite(logits["eager"]).all():
        raise UserError(f"{named(model)}: {name} computes no numbers with these weights: they are broken")
    for attention, before in logits.items():
        changed = logits_of(model, [*row[:-1], other[-1]], attention)
        if not apart(changed[:-1], before[:-1]) <= LEAK:
            raise UserError(
                f"{named(model)}: in {name} a token sees those after it, so it is no causal language "
                "model: name one that is"
            )
    dropped = unheeded(model, row) if used == "sdpa" else []
    off = apart(logits[used], logits["eager"])
    if dropped or not off <= rounding(model):
        model.disproven = (
            f"it drops {', '.join(dropped)}" if dropped else f"its logits are {100 * off:.0f} % off"
        )
        print(
            f"attention  eager, the model's own: {used} does not compute it ({model.disproven})", flush=True
        )
        model.set_attn_implementation("eager")


# Rotary positions


def forget_longer(model) -> None:
    """Dynamic NTK goes on with the table of the longest sequence so far: let it begin anew."""
    for module in model.modules():
        if "dynamic" in str(vars(module).get("rope_type")) and hasattr(module, "original_inv_freq"):
            module.register_buffer("inv_freq", module.original_inv_freq, persistent=False)
            module.max_seq_len_cached = module.original_max_seq_len


def same_up_to(model) -> float:
    """Tokens up to which rotary positions are the same whatever else is in the batch: dynamic NTK and
    LongRoPE take another table where the longest sequence at hand exceeds that."""
    limits = [float("inf")]
    for module in model.modules():
        kinds = vars(module).get("rope_type")
        if "longrope" in (kinds.values() if isinstance(kinds, dict) else [kinds]):
            settings = module.config.rope_parameters
            settings = settings.values() if isinstance(kinds, dict) else [settings]
            limits += [
                part["original_max_position_embeddings"]
                for part in settings
                if part["rope_type"] == "longrope"
            ]
        elif "dynamic" in str(kinds):
            limits.append(module.original_max_seq_len)
    return min(limits)
