"""Encoders (BERT and its like) with a classification head: texts as tokens, loading, the loss and the
scoring of some of them, padded to the longest."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForSequenceClassification,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prompts import defuse
from study import checks, device, model
from study.encoding import special_tokens
from study.errors import UserError
from study.loop import Examples
from study.reading import TOGETHER
from study.training import save_whole

SCORED_TOKENS = {"cuda": 65_536, "cpu": 4_096}  # in a pass of scoring


def mask_at_once(*args, attention_mask=None, allow_is_bidirectional_skip=False, **options):
    """transformers' mask for sdpa, which would look whether the mask hides anything: for that the host waits
    for the GPU. Here one is given only where it does."""
    skip = allow_is_bidirectional_skip and attention_mask is None
    return sdpa_mask(*args, attention_mask=attention_mask, allow_is_bidirectional_skip=skip, **options)


AttentionInterface.register("sdpa_at_once", sdpa_attention_forward)
AttentionMaskInterface.register("sdpa_at_once", mask_at_once)


def encode(tokenizer, texts: Sequence[str], longest: int) -> tuple[list[list[int]], int]:
    """The tokens of every text with those that begin and end one, at most `longest`, and how many were cut.
    Raises UserError where these alone leave no room."""
    if len(tokenizer("")["input_ids"]) >= longest:
        raise UserError(f"--max_seq_length {longest} leaves no room for a text: give a higher one")
    special = special_tokens(tokenizer)
    # A token is rarely longer than 40 characters: a giant text is not tokenized whole.
    texts = [defuse(text[: 40 * (longest + 1)], special) for text in texts]

    def rows_of(texts: Sequence[str], most: int) -> list[list[int]]:
        parts = (texts[i : i + TOGETHER] for i in range(0, len(texts), TOGETHER))
        return [
            row for part in parts for row in tokenizer(part, truncation=True, max_length=most)["input_ids"]
        ]

    rows = rows_of(texts, longest + 1)
    cut = [i for i, row in enumerate(rows) if len(row) > longest]
    for i, row in zip(cut, rows_of([texts[i] for i in cut], longest), strict=True):
        rows[i] = row
    return rows, len(cut)


def load(checkpoint: str, labels: Sequence[str], seed: int):
    """The encoder in float32 with an output layer for `labels` that is drawn from the seed, whatever head the
    checkpoint has. Raises UserError for one that is no encoder, quantized, or lacks a part of it."""
    where = f"--pretrained_ckpt {checkpoint}"
    config = model.from_checkpoint(AutoConfig, checkpoint)
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise UserError(f"{where} is a {config.model_type}, no encoder: name one such as BERT or ModernBERT")
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"{where} is quantized, and all its weights are to be trained: name it in full precision"
        )
    config.problem_type, config.id2label = "single_label_classification", dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    options = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True, "config": config}
    options["ignore_mismatched_sizes"] = True  # of a head for other classes
    torch.manual_seed(seed)  # for whatever the checkpoint lacks
    loader = AutoModelForSequenceClassification
    encoder, found = model.load_with_attention(loader, checkpoint, "auto", options)
    encoder.name_or_path = checkpoint
    refuse_other_body(encoder, found, where)
    head = output_layer(encoder)
    [name] = (name for name, module in encoder.named_modules() if module is head)
    if f"{name}.weight" not in names_of(found["missing_keys"]):
        print("head       drawn anew: the checkpoint's own is not used", flush=True)
    torch.nn.init.normal_(head.weight, std=getattr(config, "initializer_range", 0.02))
    torch.nn.init.zeros_(head.bias)
    return ready(encoder)


def refuse_other_body(encoder, found: dict, where: str) -> None:
    """Raise UserError if loading (transformers' loading info) left a tensor at random or unused, but for
    those of heads, poolers and positions that are counted anyway."""
    inner = f"{encoder.base_model_prefix}."

    def counts(name: str) -> bool:
        return name.startswith(inner) and "pooler." not in name and not name.endswith("position_ids")

    kinds = "missing_keys", "unexpected_keys", "mismatched_keys"
    own = {kind: list(filter(counts, names_of(found[kind]))) for kind in kinds}
    checks.refuse_other_tensors({**found, **own}, where)


def names_of(entries) -> list[str]:
    return [entry[0] if isinstance(entry, tuple) else str(entry) for entry in entries]


def output_layer(encoder) -> torch.nn.Linear:
    """The last linear layer, which gives the logits."""
    return [module for module in encoder.modules() if isinstance(module, torch.nn.Linear)][-1]


def ready(encoder):
    """On the device that computes, with a mask for which the host does not wait."""
    device.attend_without_plans()
    if encoder.config._attn_implementation == "sdpa":
        encoder.set_attn_implementation("sdpa_at_once")
    return encoder.to(device.current())


def save(encoder, tokenizer, folder: Path) -> dict[str, str]:
    """Leave the model in `folder`/model, which loads in plain transformers. Returns its fingerprints."""
    final = save_whole(folder / "model", encoder.save_pretrained, tokenizer.save_pretrained)
    return model.fingerprints(final)


def load_trained(folder: Path, trained: dict):
    """The model that a training has left in `folder`, for scoring. Raises UserError if it is another one than
    its record `trained` tells of."""
    model.refuse_other_model(folder, trained)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # what training took
    options = {"dtype": torch.float32, "use_safetensors": True}
    loader = AutoModelForSequenceClassification
    return ready(model.load_with_attention(loader, str(folder), "auto", options)).eval()


class Texts(Examples):
    """Texts as tokens on the device, padded on the right, so that a batch is cut out of them there; with
    their `classes`, to learn from."""

    most = 16_384

    def __init__(self, rows: Sequence[Sequence[int]], pad: int, classes: Sequence[int] = ()):
        super().__init__([(len(row),) for row in rows], [1] * len(rows), multiples=(16,))
        self.device = device.current()
        ids = np.full((len(rows), *self.widest), pad, np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        # [texts, longest], [texts], [texts]
        self.ids, self.lengths, self.classes = (
            torch.from_numpy(np.asarray(array)).to(self.device) for array in (ids, self.tokens, classes)
        )

    def batch(self, group: Sequence[int]) -> dict[str, torch.Tensor]:
        """The model's inputs [n, width] of some texts, no mask without padding, and their classes [n]."""
        places, [width] = torch.tensor(group), self.widths(group)
        if self.device.type == "cuda":
            places = places.pin_memory().to(self.device, non_blocking=True)
        batch = {"input_ids": self.ids[:, :width].index_select(0, places).long()}
        if min(self.tokens[i] for i in group) < width:
            counted = torch.arange(width, device=self.device)
            batch["attention_mask"] = (counted < self.lengths[places][:, None]).long()
        return batch | ({"classes": self.classes[places]} if len(self.classes) else {})

    def loss_sum(self, encoder, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy summed over the texts, in float32."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "classes"}
        with in_bfloat16():
            logits = encoder(**inputs).logits
        return F.cross_entropy(logits.float(), batch["classes"], reduction="sum")


def in_bfloat16() -> contextlib.AbstractContextManager:
    """Products in bfloat16 on a GPU that has it; all in float32 elsewhere."""
    on = torch.cuda.is_available() and device.compute_dtype() == torch.bfloat16
    return torch.autocast(device.current().type, torch.bfloat16, enabled=on)


def classify(encoder, texts: Texts, at_once: int | str) -> tuple[list[int], list[float]]:
    """Of each text the most probable class, and its probability; `at_once` texts in a pass, or "auto"."""
    order, found = [], []
    with torch.no_grad(), in_bfloat16():
        for group in groups_of(texts, at_once):
            shares = encoder(**texts.batch(group)).logits.float().softmax(dim=1)
            found.append(torch.stack([*map(torch.Tensor.double, shares.max(dim=1))]))
            order += group
    sure, classes = torch.cat(found, dim=1).cpu()
    places = torch.tensor(order).argsort()
    return classes[places].long().tolist(), sure[places].tolist()


def groups_of(texts: Texts, at_once: int | str) -> Iterator[list[int]]:
    """All texts, the longest first."""
    order = sorted(range(len(texts.tokens)), key=lambda i: -texts.tokens[i])
    while order:
        fitting = SCORED_TOKENS[texts.device.type] // texts.tokens[order[0]]
        count = max(1, fitting) if at_once == "auto" else at_once
        yield order[:count]
        order = order[count:]
