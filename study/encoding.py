"""Prompts and answers as tokens: one BOS, an EOS that is learned, and texts shortened so that nothing else
has to be."""

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prompts import build_prompt, defuse
from study.cli import UserError


@dataclass
class Example:
    """One sequence: prompt, answer, end of sequence. `answer_start` is the place of the answer's first
    token."""

    ids: list[int]
    answer_start: int


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """A prompt as the model sees it, in training and inference alike: one BOS if the model has one, no
    EOS."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    begins = tokenizer("", add_special_tokens=True)["input_ids"][:1]
    if begins and begins[0] == tokenizer.bos_token_id and ids[:1] != begins:
        return begins + ids
    return ids


def answer_ids(tokenizer, task: str, answer: str) -> list[int]:
    """The answer's tokens, as they follow the cue that ends every prompt of the task, then EOS.

    They are read in one go with the cue, which gives the tokens that natural text would have, and so that the
    prompt's own tokens stay what inference sees.
    """
    cue, answer = build_prompt(task, "instruction", ""), defuse(answer, tokenizer.all_special_tokens)
    start, whole = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (cue, f"{cue} {answer}")
    )
    if whole[: len(start)] != start:  # the cue's last token merged with the answer's first
        start, whole = [], tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
    return [*whole[len(start) :], tokenizer.eos_token_id]


def shorten(tokenizer, text: str, encode: Callable[[str], list[int]], budget: int) -> tuple[str, bool]:
    """The longest beginning of `text` whose prompt `encode(text)` has at most `budget` tokens, and whether it
    was cut.

    Only the text gives way: instruction, labels and cue stay whole. Raises UserError where these alone exceed
    the budget.
    """
    # A token is rarely longer than 40 characters: cut a giant text before it is tokenized over and over.
    kept = text[: 40 * max(budget, 1)]
    excess = len(encode(kept)) - budget
    while excess > 0:
        if not kept:
            raise UserError(
                f"the prompt without its text has {budget + excess} tokens and only {max(budget, 0)} fit: "
                "raise --max_seq_length, lower --max_new_tokens or --shots, or take a longer context"
            )
        kept = first_tokens(tokenizer, kept, token_count(tokenizer, kept) - excess)
        excess = len(encode(kept)) - budget
    return (text, False) if kept == text else (kept, True)


def token_count(tokenizer, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def first_tokens(tokenizer, text: str, count: int) -> str:
    """The beginning of `text` that its first `count` tokens cover."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text if count >= len(offsets) else text[: offsets[count][0]].rstrip() if count > 0 else ""


def tuning_text(tokenizer, task: str, text: str, room: int, max_seq_length: int) -> tuple[str, bool]:
    """`text` as every prompt of its task shows it: shortened so that its tuning prompt leaves `room`
    tokens."""
    return shorten(
        tokenizer,
        defuse(text, tokenizer.all_special_tokens),
        lambda kept: prompt_ids(tokenizer, build_prompt(task, "instruction", kept)),
        max_seq_length - room,
    )


def encode_examples(
    tokenizer, task: str, pairs: Sequence[tuple[str, str]], args: argparse.Namespace
) -> tuple[list[Example], int]:
    """Training sequences of (text, answer) pairs and how many texts were shortened.

    The prompt keeps `--max_new_tokens` free for the answer, as inference does; only a longer answer makes it
    shorter.
    """
    examples, shortened = [], 0
    for whole, answer in pairs:
        ending = answer_ids(tokenizer, task, answer)
        if task == "classification" and len(ending) > args.max_new_tokens:
            raise UserError(
                f'--max_new_tokens {args.max_new_tokens} is too few for class "{answer}", of {len(ending)}'
            )
        room = max(len(ending), args.max_new_tokens)
        text, cut = tuning_text(tokenizer, task, whole, room, args.max_seq_length)
        ids = prompt_ids(tokenizer, build_prompt(task, "instruction", text))
        examples.append(Example(ids + ending, len(ids)))
        shortened += cut
    return examples, shortened


def encode_prompts(
    tokenizer, task: str, texts: Sequence[str], args: argparse.Namespace
) -> tuple[list[list[int]], int]:
    """The prompts of a fine-tuned model, shortened as in training, and how many were."""
    prompts, shortened = [], 0
    for whole in texts:
        text, cut = tuning_text(tokenizer, task, whole, args.max_new_tokens, args.max_seq_length)
        prompts.append(prompt_ids(tokenizer, build_prompt(task, "instruction", text)))
        shortened += cut
    return prompts, shortened


# Prompts of untuned models


def choose_shots(pairs: Sequence[tuple[str, str]], task: str, shots: int, seed: int) -> list[tuple[str, str]]:
    """Few-shot examples out of the train split: `shots` of each class in mixed order, or `shots` dialogues,
    by the seed."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for pair in pairs:
        groups.setdefault(pair[1] if task == "classification" else "", []).append(pair)
    chosen = []
    for name, group in sorted(groups.items()):
        if len(group) < shots:
            what = f'class "{name}" has' if name else "the train split has"
            raise UserError(f"--shots {shots}: {what} {len(group)} examples only")
        chosen += random.Random(f"{seed} {name}").sample(group, shots)
    random.Random(seed).shuffle(chosen)
    return chosen


def shorten_examples(
    tokenizer, examples: Sequence[tuple[str, str]], room: int
) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """The examples with their longest texts cut to a common length so that all fit `room` tokens, and what
    was cut."""
    lengths = [token_count(tokenizer, text) for text, _ in examples]
    most = max(lengths)
    while most and sum(min(length, most) for length in lengths) > room:
        most -= 1
    if not most:
        raise UserError(f"--shots: {len(examples)} examples do not fit the model's context: take fewer shots")
    cut = {
        "examples": sum(length > most for length in lengths),
        "example_tokens": sum(max(0, length - most) for length in lengths),
    }
    return [(first_tokens(tokenizer, text, most), answer) for text, answer in examples], cut


def encode_baseline(
    tokenizer,
    texts: Sequence[str],
    labels: Sequence[str],
    examples: Sequence[tuple[str, str]],
    context: int,
    args: argparse.Namespace,
) -> tuple[list[list[int]], dict[str, int]]:
    """The prompts of an untuned model and what was cut: {"texts", "examples", "example_tokens"}.

    A text is first shortened as fine-tuning shows it, so that all methods read the same; then the examples
    are, the longest first, until instruction, examples, the longest query and the answer fit the model's
    context.
    """
    special, budget = tokenizer.all_special_tokens, context - args.max_new_tokens
    labels = [defuse(label, special) for label in labels]

    def view(text: str) -> tuple[str, bool]:
        return tuning_text(tokenizer, args.task, text, args.max_new_tokens, args.max_seq_length)

    def encode(text: str, shown: Sequence[tuple[str, str]]) -> list[int]:
        prompt = build_prompt(args.task, args.prompt_type, text, labels, shown)
        if args.chat_template == "auto" and tokenizer.chat_template:
            message = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return prompt_ids(tokenizer, prompt)

    views = [view(text) for text in texts]
    shown = [(view(text)[0], defuse(answer, special)) for text, answer in examples]
    cut = {"examples": 0, "example_tokens": 0}
    if shown:
        # A text's tokens change a little at its borders; what that takes comes off the query below.
        room = budget - len(encode("", [("", answer) for _, answer in shown]))
        longest = max(token_count(tokenizer, text) for text, _ in views)
        shown, cut = shorten_examples(tokenizer, shown, room - min(longest, room // 2))
    fitted = [shorten(tokenizer, text, lambda kept: encode(kept, shown), budget) for text, _ in views]
    cut["texts"] = sum(first or then for (_, first), (_, then) in zip(views, fitted, strict=True))
    return [encode(text, shown) for text, _ in fitted], cut
