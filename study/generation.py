"""Greedy decoding, with the answers in the order of the prompts: by the fast path, or by `generate` in
batches of like length.

Answers are written down as they come, so an evaluation that was killed goes on with those it has. Of several
processes each answers its share of the prompts.
"""

import contextlib
import glob
import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from study import checks, device, processes
from study.device import Process
from study.errors import UserError, is_out_of_memory
from study.fast import decoder, self_check
from study.files import write_text
from study.model import base_of, four_bit_layers, merge, should_merge
from study.packing import common_prefix
from study.tokens import Chosen, largest_of, lengths_of, longest_first, sha256_of

AUTO_EXAMPLES = 256


@dataclass
class Answers:
    """Generated texts, in the order of the prompts, the tokens read and written for them, and how; of answers
    out of a set also how sure each is, between 0 and 1."""

    texts: list[str]
    input_tokens: int
    output_tokens: int
    seconds: float  # of decoding, those of killed attempts included
    earlier_seconds: float  # of the killed attempts as a whole
    how: str
    prompts_sha256: str
    ends: list[int]
    confidences: list[float] | None = None


class KeptAnswers:
    """The answers of an evaluation so far, each its tokens and its confidence (or None), in a file beside its
    record to be until that is written. Of several processes each has a file; what they leave, the first one
    takes over, so an evaluation goes on with any number of processes."""

    def __init__(
        self, process: Process, path: Path | None = None, run: dict | None = None, force: bool = False
    ):
        self.stem, self.folder = path and f".{path.stem}.answers", path and path.parent
        self.process, self.run, self.answers, self.file = process, run, {}, None
        self.seconds = self.wall_seconds = 0.0
        self.began = time.monotonic()
        if self.folder and force and process.main:
            self.remove()

    def path(self) -> Path:
        """Of this process's file."""
        number = processes.number()
        return self.folder / (f"{self.stem}-{number}.jsonl" if number else f"{self.stem}.jsonl")

    def files(self) -> list[Path]:
        """Those of all processes, of any number, the first one's first."""
        others = self.folder.glob(f"{glob.escape(self.stem)}-*.jsonl")
        return [path for path in (self.folder / f"{self.stem}.jsonl", *sorted(others)) if path.exists()]

    def remove(self) -> None:
        for path in self.files():
            path.unlink(missing_ok=True)

    def resume(self, prompts: Sequence[list[int]], how: str) -> None:
        """Take over the answers of an earlier attempt at the same run and prompts, answered alike; a broken
        last line is left out."""
        self.began = time.monotonic()
        if not self.folder:
            return
        same = sha256_of([self.run, prompts, "tokens, confidence"])
        if self.process.main:
            self.take_over(same, how, len(prompts))
            self.begin(f"{same} {how}\n")
            for path in set(self.files()) - {self.path()}:
                path.unlink()
        # The others begin when theirs of before are taken over.
        known = processes.everyone((self.answers, self.seconds, self.wall_seconds))[0]
        self.answers, self.seconds, self.wall_seconds = known
        if not self.process.main:
            self.begin(f"{same} {how}\n")

    def take_over(self, same: str, how: str, count: int) -> None:
        """The answers to `count` prompts that files hold which are headed alike."""
        other = None
        for path in self.files():
            head, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
            if head != f"{same} {how}":
                decoded = f"decoded with {head[len(same) + 1 :]}"
                other = decoded if head.startswith(same) else "was of another run or of other prompts"
                continue
            for line in lines:
                with contextlib.suppress(ValueError):
                    step = json.loads(line)
                    self.answers |= {int(index): tuple(answer) for index, answer in step["answers"].items()}
                    self.seconds = max(self.seconds, step["seconds"])
                    self.wall_seconds = max(self.wall_seconds, step["wall_seconds"])
        if self.answers or (self.files() and other is None):
            print(f"resumed    {len(self.answers):,} of {count:,} answers are there", flush=True)
        elif other:
            print(f"resumed    no answer: the earlier attempt {other}", flush=True)

    def begin(self, head: str) -> None:
        """This process's file, with what it knows already, if it is the first."""
        known = self.answers if self.process.main else {}
        write_text(self.path(), head + self.step(known, self.seconds, self.wall_seconds))
        self.file = open(self.path(), "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def step(self, answers: dict, seconds: float, wall_seconds: float) -> str:
        """A line of the file."""
        step = {"answers": answers, "seconds": seconds, "wall_seconds": wall_seconds}
        return json.dumps(step) + "\n"

    def spent(self) -> float:
        return self.seconds + time.monotonic() - self.began

    def add(self, index: int, answer: tuple[list[int], float | None]) -> None:
        self.answers[index] = answer
        if self.file:
            wall_seconds = self.wall_seconds + self.process.seconds()
            self.file.write(self.step({index: answer}, self.spent(), wall_seconds))

    def gather(self) -> None:
        """Let every process have the answers of all."""
        for answers in processes.everyone(self.answers):
            self.answers |= answers

    def discard(self) -> None:
        """Once the record is written."""
        if self.file:
            self.file.close()
        if self.folder and self.process.main:
            self.remove()


def generate(
    model,
    tokenizer,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int | str = "auto",
    allowed: Sequence[list[int]] | None = None,
    merging: str = "off",
    kept: KeptAnswers | None = None,
) -> Answers:
    """Continue every prompt (token ids) greedily up to its EOS or `max_new_tokens`.

    With `allowed` (token ids of the possible answers, EOS included) only these can come out, each with its
    confidence: the product, over the places where several tokens are allowed, of the chosen one's share of
    their softmax. `merging` is --merge; a merged `model` is used up. What exceeds the GPU's memory is tried
    again with half of it, until next to nothing is left: then its error is raised. Raises UserError if
    `allowed` does not fit `max_new_tokens`.
    """
    longest = max(map(len, allowed or [[]])) - 1  # without EOS
    if longest > max_new_tokens:
        raise UserError(
            f"--max_new_tokens {max_new_tokens} cuts class names: the longest has {longest} tokens"
        )
    kept = kept or KeptAnswers(Process("generate"))
    ends = stop_tokens(model, tokenizer)
    written = [ends[:1], [largest_of(prompts)], *(allowed or [])]
    checks.refuse_unknown_tokens(base_of(model), tokenizer, written)
    allowed = allowed and with_all_ends(allowed, ends)
    model, slow, how = made_ready(model, prompts, merging)
    kept.resume(prompts, how)
    answer = fast_answers if slow is None else plain_answers
    left = share(prompts, [i for i in range(len(prompts)) if i not in kept.answers], max_new_tokens)
    most = None if batch_size == "auto" else batch_size
    for index, found in answer(model, left, max_new_tokens, ends, allowed, most) if left else ():
        kept.add(index, found)
    kept.gather()
    return in_order(tokenizer, prompts, kept, how, ends)


def share(prompts: Sequence[list[int]], left: Sequence[int], new: int) -> Chosen:
    """Those of the prompts `left` that this process answers: of all lengths, and of as many tokens as the
    others', of which each reads what all prompts begin with once."""
    if processes.count() == 1:
        return Chosen(prompts, left)
    chosen, lengths = Chosen(prompts, left), lengths_of(prompts)
    shared = common_prefix(chosen.values()) if left else 0
    mine = processes.mine([lengths[i] - shared + new for i in left])
    return Chosen(prompts, (left[i] for i in mine))


def made_ready(model, prompts: Sequence[list[int]], merging: str) -> tuple:
    """The model as it will decode, merged or not, the reason why `generate` will do it or None where the fast
    path has proven itself on `prompts`, and how, in words."""
    checks.prove_attention(base_of(model))
    slow = why_generate(model)
    witnesses = [] if slow or not prompts else self_check.witnesses(model, prompts)
    packed = bool(four_bit_layers(base_of(model)))
    if packed and all(processes.everyone(should_merge(model, merging))):
        model, packed = merge(model), False
    slow = processes.first_reason(slow or self_check.scoring(model, witnesses))  # every GPU proves itself
    if slow:
        device.attend_without_plans()
    dtype = str(device.compute_dtype()).removeprefix("torch.")
    how = f"plain generate ({slow})" if slow else "fused layers"
    how += ", weights in 4 bits" if packed else f", weights dense in {dtype}"
    print(f"decoding   {how}", flush=True)
    return model.eval(), slow, how


def in_order(
    tokenizer, prompts: Sequence[list[int]], kept: KeptAnswers, how: str, ends: list[int]
) -> Answers:
    """The answers to all prompts, once every one is kept."""
    answers = [kept.answers[i] for i in range(len(prompts))]
    confidences = [confidence for _, confidence in answers]
    return Answers(
        texts=[tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in answers],
        input_tokens=sum(lengths_of(prompts)),
        output_tokens=sum(len(ids) for ids, _ in answers),
        seconds=kept.spent(),
        earlier_seconds=kept.wall_seconds,
        how=how,
        prompts_sha256=sha256_of(prompts),
        ends=ends,
        confidences=None if None in confidences else confidences,
    )


def describe(answers: Answers, process: Process, scores: dict, decoding: str) -> dict:
    """The `eval` of a record, with what `metrics.score` says of the answers."""
    examples = len(answers.texts)
    invalid = scores["metrics"].get("invalid_answers")
    return {
        "examples": examples,
        "seconds": answers.seconds,
        "wall_seconds": answers.earlier_seconds + process.seconds(),
        "earlier_seconds": answers.earlier_seconds,
        "examples_per_second": examples / answers.seconds,
        "invalid_answers": None if invalid is None else round(invalid["value"] * examples / 100),
        "peak_memory_gib": device.peak_memory_gib(),
        "input_tokens": answers.input_tokens,
        "output_tokens": answers.output_tokens,
        "processes": process.count,
        "decoding": decoding,
        "how": answers.how,
        "prompts_sha256": answers.prompts_sha256,
        "ends": answers.ends,
        **scores,
    }


def why_generate(model) -> str | None:
    """The reason why decoding can't take the fast path, or None."""
    if not torch.cuda.is_available():
        return "no CUDA"
    if device.compute_dtype() != torch.bfloat16 or not importlib.util.find_spec("triton"):
        return "no bfloat16 or no triton here"

    return self_check.attempt(lambda: decoder.why_not(model))


def fast_answers(model, prompts: Chosen, max_new_tokens, ends, allowed, most) -> Iterator:
    """(index, answer) of each of `prompts`, by the fast path in what memory is free."""
    from study.fast import decode

    left, engine = Chosen(prompts.rows, prompts), decode.Engine(model)
    given = engine.memory = 0.92 * device.free_memory()
    while left:
        try:
            for index, answer in engine.answers(left, max_new_tokens, ends, allowed, most):
                yield index, answer
                del left.numbers[index]
        except RuntimeError as error:
            engine.memory /= 2
            if not is_out_of_memory(error) or engine.memory <= 0.05 * given:  # both may be 0
                raise
        else:
            continue
        # Here, where the error holds no tensors any more.
        engine.cache, engine.graphs = None, {}
        torch.cuda.empty_cache()  # what runs out may be wanted outside PyTorch
        print("out of memory: going on with half of it", flush=True)


def plain_answers(model, prompts: Chosen, max_new_tokens, ends, allowed, most, write=None) -> Iterator:
    """The same by transformers' `generate`, in batches of like length; `write` stands for continue_batch."""
    write = write or continue_batch
    order = longest_first(prompts)  # too large shows at once
    size = most or AUTO_EXAMPLES
    while order:
        room = fitting(model, len(prompts[order[0]]) + max_new_tokens)
        batch = order[: size if most else min(size, room)]
        try:
            continuations = write(model, [prompts[i] for i in batch], max_new_tokens, ends, allowed)
        except RuntimeError as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
            torch.cuda.empty_cache()
            size = len(batch) // 2
            print(f"out of memory: going on with batches of {size}", flush=True)
            continue
        yield from zip(batch, continuations, strict=True)
        order = order[len(batch) :]


def fitting(model, tokens: int) -> int:
    """Examples of `tokens` tokens that fit the free GPU memory, by the size of their key-value cache."""
    if not torch.cuda.is_available():
        return 16
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    if not heads:
        return AUTO_EXAMPLES
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * size * 2 * tokens
    # The cache is copied as it grows; the rest is for activations.
    return max(1, int(0.8 * device.free_memory() / (3 * cache)))


def continue_batch(
    model, prompts, max_new_tokens, ends, allowed, watch: Callable | None = None
) -> list[tuple[list[int], float | None]]:
    """The new tokens of each prompt up to and including its EOS, greedily, and of `allowed` ones the
    confidence; prompts are padded on the left, or taken one by one where what else is in the batch would
    change their answers. After each step `watch(number, tokens)` of each prompt says whether it is to end
    there."""
    base = base_of(model)
    checks.prove_attention(base)
    longest, shortest = max(map(len, prompts)), min(map(len, prompts))
    other_positions = longest + max_new_tokens > checks.same_up_to(base)
    if len(prompts) > 1 and (other_positions or (longest > shortest and not heeds_padding(model))):
        answers = []
        for i, prompt in enumerate(prompts):
            alone = watch and (lambda _, tokens, i=i: watch(i, tokens))
            answers += continue_batch(model, [prompt], max_new_tokens, ends, allowed, alone)
        return answers
    if other_positions:
        checks.forget_longer(base)
    options = {"stopping_criteria": [Watched(watch, longest, ends)]} if watch else {}
    if allowed is None:
        output, sure = greedily(model, prompts, max_new_tokens, ends, **options), [None] * len(prompts)
    else:
        following, confidence = follow_one_of(allowed, longest, ends[0]), Confidence(len(prompts), allowed)
        options |= {"prefix_allowed_tokens_fn": following, "logits_processor": [confidence]}
        output = greedily(model, prompts, max_new_tokens, ends, **options)
        sure = confidence.products.tolist()
    answers = (up_to_end(row, ends) for row in output[:, longest:].tolist())
    return list(zip(answers, sure, strict=True))


def greedily(model, prompts: Sequence[list[int]], max_new_tokens: int, ends: Sequence[int], **options):
    """What `generate` makes of prompts padded on the left, with none of the checkpoint's own settings."""
    width = max(map(len, prompts))
    ids = torch.tensor(
        [[ends[0]] * (width - len(prompt)) + prompt for prompt in prompts], device=device.current()
    )
    mask = torch.tensor(
        [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device.current()
    )
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
    )
    with torch.inference_mode(), nothing_else(base_of(model)):
        return model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy, **options)


def heeds_padding(model) -> bool:
    """Whether a prompt has the same logits alone and padded beside a longer one; found out once, by decoding
    two steps of both, and said where it has not."""
    base = base_of(model)
    if not hasattr(base, "heeds_padding"):
        other, row = checks.rows_of_tokens(base, 2)
        ends = [base.get_input_embeddings().weight.shape[0] - 1]
        options = {"min_new_tokens": 2, "output_logits": True, "return_dict_in_generate": True}
        alone, padded = (
            torch.stack(greedily(model, rows, 2, ends, **options).logits)[:, -1].double()  # [2, vocabulary]
            for rows in ([row[:9]], [other, row[:9]])
        )
        off = checks.apart(padded, alone)
        base.heeds_padding = off <= checks.rounding(base)
        if not base.heeds_padding:
            what = f"padding changes what {type(base).__name__} computes, by {100 * off:.0f} %"
            print(f"decoding   one by one: {what}", flush=True)
    return base.heeds_padding


@contextlib.contextmanager
def nothing_else(model) -> Iterator[None]:
    """`generate` takes what its settings leave open from the checkpoint's generation_config: here from
    none."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def stop_tokens(model, tokenizer) -> list[int]:
    """The tokenizer's EOS first, then those a chat checkpoint's generation_config adds."""
    more = getattr(model.generation_config, "eos_token_id", None) or []
    more = more if isinstance(more, list) else [more]
    return list(dict.fromkeys([tokenizer.eos_token_id, *more]))


def up_to_end(row: list[int], ends: Sequence[int]) -> list[int]:
    for i, token in enumerate(row):
        if token in ends:
            return row[: i + 1]
    return row


def follow_one_of(allowed: Sequence[list[int]], width: int, pad: int):
    """For `generate`: the tokens that keep a row, `width` prompt tokens and what follows, on one of the
    allowed answers."""
    nexts: dict[tuple[int, ...], set[int]] = {}
    for answer in allowed:
        for i, token in enumerate(answer):
            nexts.setdefault(tuple(answer[:i]), set()).add(token)
    return lambda row, ids: sorted(nexts.get(tuple(ids[width:].tolist()), {pad}))


class Watched(StoppingCriteria):
    """Ends the rows of a `generate`, `width` prompt tokens and what follows, of which `watch` says so."""

    def __init__(self, watch: Callable, width: int, ends: Sequence[int]):
        self.watch, self.width, self.ends = watch, width, ends

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        rows = input_ids[:, self.width :].tolist()
        done = [self.watch(i, up_to_end(row, self.ends)) for i, row in enumerate(rows)]
        return torch.tensor(done, device=input_ids.device)


class Confidence(LogitsProcessor):
    """Of each row of a greedy `generate` the product of the chosen tokens' shares of the softmax over what is
    allowed; all ends of sequence are one choice. It comes last, when other tokens have -inf, and changes no
    score."""

    def __init__(self, rows: int, allowed: Sequence[list[int]]):
        self.ends = torch.tensor(sorted({answer[-1] for answer in allowed}), device=device.current())
        self.products = torch.ones(rows, dtype=torch.double, device=device.current())

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        shares, chosen = scores.float().softmax(1), scores.argmax(1)  # [rows, vocabulary], [rows]
        ended = shares[:, self.ends].sum(1).clamp(max=1)
        self.products *= torch.where(
            torch.isin(chosen, self.ends), ended, shares.gather(1, chosen[:, None])[:, 0]
        )
        return scores


def with_all_ends(allowed: Sequence[list[int]], ends: Sequence[int]) -> list[list[int]]:
    """The allowed answers; one that another goes on from may end with any of the ends of sequence."""
    ended = [answer[:-1] for answer in allowed]
    more = [
        [*answer, end]
        for answer in ended
        for end in ends[1:]
        if any(len(other) > len(answer) and other[: len(answer)] == answer for other in ended)
    ]
    return [*allowed, *more]
