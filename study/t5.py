"""T5: texts as its tokens, batches packed or padded, an attention by PyTorch's kernels, answers.

T5 has no BOS: a text ends with EOS (1), and the decoder begins with the padding token (0). Its tokenizer
reads every white space as one blank, so prompts lose their line breaks, and so do answers. Never in float16,
in which T5 overflows.
"""

import contextlib
import copy
import functools
import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationConfig,
    T5ForConditionalGeneration,
)
from transformers.masking_utils import sdpa_mask
from transformers.models.t5.modeling_t5 import T5LayerNorm

from study import checkpoint as checkpoints
from study import checks, device, encoding, generation
from study.errors import UserError
from study.fast import self_check
from study.loop import Examples
from study.model import (
    CONFIG,
    fingerprint,
    fingerprints,
    from_checkpoint,
    load_adapter,
    place_of,
    refuse_other_model,
)
from study.tokens import Chosen
from study.training import save_adapter, save_whole


@dataclass
class Pair:
    """A prompt for the encoder and its answer for the decoder, both with EOS."""

    prompt: list[int]
    answer: list[int]

    @property
    def lengths(self) -> tuple[int, int]:
        return len(self.prompt), len(self.answer)


# Tokens


def encode_prompts(tokenizer, task: str, texts: Sequence[str], max_seq_length: int) -> tuple[list, int]:
    """The encoder's inputs, of at most `max_seq_length` tokens, and how many texts were shortened to fit."""
    fitted = list(encoding.fit_tuning(tokenizer, task, texts, [1] * len(texts), max_seq_length))
    return [[*ids, tokenizer.eos_token_id] for _, _, ids in fitted], sum(cut for _, cut, _ in fitted)


def encode_pairs(tokenizer, task: str, pairs: Sequence[tuple[str, str]], args) -> tuple[list[Pair], int]:
    """Training examples, and how many texts were shortened; answers stay whole. Raises UserError for a class
    that does not come back from its tokens, or not within --max_new_tokens, and for an answer that alone
    exceeds --max_seq_length."""
    answers = list(dict.fromkeys(answer for _, answer in pairs))
    if task == "classification":
        encoding.label_answers(tokenizer, answers, args.max_new_tokens, cue="")
    known = {answer: encoding.answer_ids(tokenizer, task, answer, cue="") for answer in answers}
    for answer, ids in known.items():
        if len(ids) > max(args.max_new_tokens, args.max_seq_length):
            raise UserError(
                f'--max_seq_length {args.max_seq_length} is too few for the answer "{answer[:60]}...", of '
                f"{len(ids)} tokens: raise it, or drop that example"
            )
    prompts, shortened = encode_prompts(tokenizer, task, [text for text, _ in pairs], args.max_seq_length)
    return [Pair(ids, known[answer]) for ids, (_, answer) in zip(prompts, pairs, strict=True)], shortened


def lost(tokenizer, rows: Sequence[Sequence[int]], answers: Sequence[str]) -> dict:
    """What a record says of what T5's tokenizer does not keep: the share of unknown tokens among those in
    `rows`, and how many answers have line breaks."""
    unknown = sum(row.count(tokenizer.unk_token_id) for row in rows)
    return {
        "unknown_tokens": unknown / sum(map(len, rows)),
        "answers_with_line_breaks": sum("\n" in answer.strip() for answer in answers),
    }


def say_lost(described: dict) -> None:
    print(
        f"{'':11}{described['truncated']:,} texts shortened to fit --max_seq_length; "
        f"{described['unknown_tokens']:.2%} of the tokens unknown; {described['answers_with_line_breaks']:,} "
        "answers have line breaks, which T5 writes as blanks",
        flush=True,
    )


# Batches


class Pairs(Examples):
    """Prompts for the encoder and their answers for the decoder."""

    most = 20_480  # 32 of the longest by default

    def __init__(self, pairs: Sequence[Pair], config, computed: torch.dtype | None = None):
        learned = [len(pair.answer) for pair in pairs]
        super().__init__([pair.lengths for pair in pairs], learned, multiples=(32, 16))
        self.pairs, self.pad, self.start = pairs, config.pad_token_id, start_of(config)
        self.dtype = computed or dtype()

    def products(self) -> contextlib.AbstractContextManager:
        place = device.current().type
        return torch.autocast(place, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def batch(self, group: Sequence[int]) -> dict[str, torch.Tensor]:
        """The model's inputs [n, width] and the answers' tokens [n, width], -100 where there is none."""
        pairs, (longest, width) = [self.pairs[i] for i in group], self.widths(group)
        begun = [[self.start, *pair.answer[:-1]] for pair in pairs]
        batch = {
            "input_ids": filled([pair.prompt for pair in pairs], longest, self.pad),
            "decoder_input_ids": filled(begun, width, self.pad),
            "labels": filled([pair.answer for pair in pairs], width, -100),
        }
        if min(len(pair.prompt) for pair in pairs) < longest:
            batch["attention_mask"] = filled([[1] * len(pair.prompt) for pair in pairs], longest, 0)
        return on_device(batch)

    def loss_sum(self, model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy summed over the answers' tokens, in float32."""
        inputs, labels = dict(batch), batch["labels"]
        del inputs["labels"]
        if "attention_mask" in inputs:  # in four dimensions transformers takes it as it is
            inputs["attention_mask"] = inputs["attention_mask"][:, None, None].bool()
        with self.products():
            logits = model(**inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")


def filled(rows: Sequence[Sequence[int]], width: int, fill: int) -> torch.Tensor:
    """[rows, width], `fill` on the right of each."""
    array = np.full((len(rows), width), fill)
    for i, row in enumerate(rows):
        array[i, : len(row)] = row
    return torch.from_numpy(array)


class PackedPairs(Pairs):
    """The same laid end to end, without padding, by the kernels of fast/t5.py."""

    packed = True

    def __init__(self, pairs: Sequence[Pair], model):
        from study.fast import t5  # needs triton

        super().__init__(pairs, model.config)
        self.path = t5.Packed(model, self.widest, self.dtype)

    def area(self, group: Sequence[int]) -> int:
        return sum(self.path.ends([self.sizes[i] for i in group]))

    def batch(self, group: Sequence[int]) -> dict[str, torch.Tensor]:
        pairs = [self.pairs[i] for i in group]
        batch = self.path.batch([pair.prompt for pair in pairs], [pair.answer for pair in pairs], self.start)
        return on_device(batch)

    def loss_sum(self, model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with self.products():
            logits = self.path.logits(batch)
        return F.cross_entropy(logits.float(), batch["labels"], reduction="sum")


def learnable(pairs: Sequence[Pair], model) -> Pairs:
    """The examples as `model` is trained on them: packed where that can be and computes the same, which one
    line says otherwise."""
    plain = Pairs(pairs, model.config)
    if not torch.cuda.is_available():
        return plain
    if dtype() != torch.bfloat16 or not importlib.util.find_spec("triton"):
        reason = "no bfloat16 or no triton here"
    else:
        reason = self_check.attempt(lambda: differs(model, pairs))
    if reason:
        print(f"padding batches: {reason}", flush=True)
    return plain if reason else PackedPairs(pairs, model)


def differs(model, pairs: Sequence[Pair]) -> str | None:
    """What packed examples compute otherwise than padded ones, or None: gradients of short, middling and long
    ones together, without dropout, beside those of padded ones in float32. What bfloat16 rounds, and deep
    models pass on, may be off as far as it is in the padded ones, and some more."""
    some = sorted(pairs, key=lambda pair: pair.lengths)
    some = [some[0], some[len(some) // 2], some[-1]]
    checked = copy.deepcopy(model).eval()
    for weight in checked.parameters():  # of a new adapter, of which nothing else would be seen
        if weight.requires_grad and not weight.any():
            torch.nn.init.normal_(weight, std=0.02)
    exact = copy.deepcopy(checked).float()
    ways = (
        (exact, Pairs(some, model.config, torch.float32)),
        (checked, Pairs(some, model.config)),
        (checked, PackedPairs(some, checked)),
    )
    found = []
    for computed, learned in ways:
        learned.loss_sum(computed, learned.batch(range(3))).backward()
        gradients = [p.grad.flatten() for p in computed.parameters() if p.grad is not None]
        found.append(torch.cat(gradients).double())
        computed.zero_grad()
    own, ours = (float((each - found[0]).norm() / found[0].norm()) for each in found[1:])
    print(
        f"self-check packed examples' gradients are off by {ours:.2g}, padded ones' by {own:.2g}", flush=True
    )
    return None if ours <= 2 * own + 0.02 else f"packed, their gradients are off by {ours:.2g}"


def on_device(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without waiting for what the device computes."""
    place = device.current()
    if place.type != "cuda":
        return batch
    return {name: tensor.pin_memory().to(place, non_blocking=True) for name, tensor in batch.items()}


# The model


def dtype() -> torch.dtype:
    """That matrix products are computed in."""
    return device.compute_dtype() if torch.cuda.is_available() else torch.float32


def start_of(config) -> int:
    """The token that the decoder begins with."""
    start = getattr(config, "decoder_start_token_id", None)
    return config.pad_token_id if start is None else start


def attend(module, query, key, value, attention_mask, dropout=0.0, position_bias=None, **kwargs):
    """T5's attention by PyTorch's kernels. Its bias [1, heads, queries, keys], which layers hand on, and the
    mask, True where a key is seen [examples, 1, queries or 1, keys], become one for all layers of a stack.
    Attention to the encoder has a mask alone."""
    if not module.is_decoder or module.is_causal:
        joint = getattr(position_bias, "joint", None)
        if joint is None:
            mask = attention_mask
            if mask is None and module.is_causal and query.shape[2] > 1:
                mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
            joint = position_bias.to(query.dtype, copy=True)
            if mask is not None:
                joint = joint.masked_fill(~mask, torch.finfo(query.dtype).min)
            position_bias.joint = joint
        attention_mask = joint
    if attention_mask is not None:
        attention_mask = attention_mask.expand(*query.shape[:3], key.shape[2])
    output = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout_p=dropout, scale=1.0)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register("t5", attend)
AttentionMaskInterface.register("t5", sdpa_mask)


class Norm(nn.RMSNorm):
    """T5LayerNorm in one kernel; under autocast at once in the dtype of the products that follow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        into = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(into)


def load(checkpoint: str):
    """The T5 model in float32, on the device. Raises UserError for a checkpoint of another architecture, one
    that is quantized or says no padding token, or whose tensors are not those of its configuration."""
    where = f"--pretrained_ckpt {checkpoint}"
    folder, _ = place_of(checkpoint)
    config = checkpoints.read_json(folder / "config.json", where)
    if config.get("model_type") != "t5":
        raise UserError(
            f"{where} is not a T5 (model_type in its config.json): name one, as google/flan-t5-base"
        )
    if config.get("quantization_config"):
        raise UserError(f"{where} is quantized, which flan_t5.py does not train: name it in full precision")
    if config.get("pad_token_id", 0) is None:
        raise UserError(
            f"{where}: its config.json has no pad_token_id, which T5 answers from: set it (T5's is 0)"
        )
    model, found = from_checkpoint(
        T5ForConditionalGeneration,
        checkpoint,
        dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
        generation_config=GenerationConfig(eos_token_id=checkpoints.ends_of(folder, where) or None),
    )
    checks.refuse_other_tensors(found, where)
    checks.refuse_other_shapes(model, where)
    model.name_or_path = checkpoint
    model.config.tie_word_embeddings = model.lm_head.weight is model.shared.weight  # it says yes in any case
    return lean(model).to(device.current())


def lean(model):
    """`model`, its attention, norms and activation computed in fewer kernels; the same weights by the same
    names."""
    device.attend_without_plans()
    for part in (model, model.encoder, model.decoder):  # each has a configuration of its own
        part.config._attn_implementation = "t5"
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, T5LayerNorm):
                norm = Norm(child.weight.shape[0], child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
            elif name == "act" and model.config.dense_act_fn == "gelu_new":
                module.act = nn.GELU(approximate="tanh")
    return model


def with_lora(model, lora, seed: int):
    """`model` frozen in the dtype that it computes in, with new adapters in float32, drawn by the seed."""
    torch.manual_seed(seed)
    model = get_peft_model(model.to(dtype()).requires_grad_(False), lora)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.forward = functools.partial(adapted, module)
    return model


def adapted(layer, x: torch.Tensor) -> torch.Tensor:
    """What PEFT computes in a linear layer with an adapter, in fewer kernels and no dtype but that of `x`."""
    down, up = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
    base, inner = layer.base_layer(x), F.linear(layer.lora_dropout["default"](x), down)
    rows = base.flatten(0, -2), inner.flatten(0, -2)
    return torch.addmm(*rows, up.t(), alpha=layer.scaling["default"]).view_as(base)


def save(model, checkpoint: str, tuning: str, tokenizer, folder: Path) -> dict[str, str]:
    """Leave `folder`/adapter, or `folder`/model with the configuration of the checkpoint that it was trained
    from. Returns its fingerprints."""
    if tuning == "lora":
        adapter = save_adapter(model, tokenizer, folder)
        return {"adapter_sha256": adapter, "adapter_config_sha256": fingerprint(folder / "adapter", CONFIG)}
    # transformers would write that the head is tied, which it is not in T5 v1.1.
    config = functools.partial(shutil.copy, place_of(checkpoint)[0] / "config.json")
    whole = functools.partial(model.save_pretrained, max_shard_size="1TB")  # in one file
    final = save_whole(folder / "model", whole, tokenizer.save_pretrained, config)
    return fingerprints(final)


def load_tuned(checkpoint: str, folder: Path, tuning: str, trained: dict):
    """The fine-tuned model for scoring, adapters merged in float32, then in the dtype that it computes in.
    Raises UserError for one that is not what its train.json tells of."""
    if tuning == "lora":
        hashes = (trained["train"].get(name) for name in ("adapter_sha256", "adapter_config_sha256"))
        model = load_adapter(load(checkpoint), folder / "adapter", *hashes, dtype()).merge_and_unload()
    else:
        final = folder / "model"
        refuse_other_model(final, trained["train"])
        model = load(str(final))
    return model.to(dtype()).eval()


# Answers


def continue_batch(model, prompts, max_new_tokens, ends, allowed) -> list[tuple[list[int], None]]:
    """Greedily the tokens that answer each prompt, up to and including EOS; padding stands on the right."""
    pad, width = model.config.pad_token_id, max(map(len, prompts))
    ids = torch.tensor([prompt + [pad] * (width - len(prompt)) for prompt in prompts], device=model.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    mask = torch.arange(width, device=model.device) < lengths[:, None]
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=list(ends),
        pad_token_id=pad,
        decoder_start_token_id=start_of(model.config),
    )
    with torch.inference_mode(), generation.nothing_else(model):
        output = model.generate(input_ids=ids, attention_mask=mask.long(), generation_config=greedy)
    return [(generation.up_to_end(row, ends), None) for row in output[:, 1:].tolist()]


def answer(model, tokenizer, prompts: Sequence[list[int]], args, kept) -> generation.Answers:
    """Greedy answers to every prompt, up to EOS or --max_new_tokens; those in `kept` are there."""
    ends = generation.stop_tokens(model, tokenizer)
    how = f"plain generate, weights in {str(dtype()).removeprefix('torch.')}"
    kept.resume(prompts, how)
    left = Chosen(prompts, (i for i in range(len(prompts)) if i not in kept.answers))
    most = None if args.eval_batch_size == "auto" else args.eval_batch_size
    for index, answer in generation.plain_answers(
        model, left, args.max_new_tokens, ends, None, most, continue_batch
    ):
        kept.add(index, answer)
    return generation.in_order(tokenizer, prompts, kept, how, ends)
