"""The prompts of a load test: from a file of ready ones, or built from test texts as a fine-tuned model sees
them; and which of them a run sends."""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from prompts import build_prompt
from study import data
from study.errors import UserError
from study.files import read_file

NEAR = 0.25  # by so much may a prompt be shorter or longer than --prompt_tokens


class Prompt(NamedTuple):
    text: str
    reference: str | None  # the answer to score by
    number: int  # its row in the source, from 1


def read_source(args: argparse.Namespace) -> tuple[str, data.Split]:
    """The name in a record of what prompts are made from, and that: prompts with their references of
    --prompts_file, or the examples of the test split."""
    if not args.prompts_file:
        return "test", data.sample_eval(data.load(args, ["test"])["test"], args)
    where, examples, numbers = f"--prompts_file {args.prompts_file}", [], []
    for number, row in read_file(Path(args.prompts_file), "--prompts_file", {"--prompts_file": "prompt"}):
        prompt, reference = row.get("prompt"), row.get("reference")
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f'{where} row {number}: "prompt" is no text: mend the row, or leave it out')
        if not isinstance(reference, str | None):
            raise UserError(f'{where} row {number}: "reference" is no text: mend it, or leave it out')
        examples.append((prompt, reference or None))
        numbers.append(number)
    if not examples:
        raise UserError(f'{where} holds no prompts: a row has "prompt" and, to score answers, "reference"')
    return "prompts", data.Split(args.prompts_file, examples, numbers)


def build(source: data.Split, args: argparse.Namespace) -> list[Prompt]:
    """The prompts that a run may send; of texts those whose prompt has --prompt_tokens tokens, a quarter more
    or less. Raises UserError where none has."""
    if args.prompts_file:
        return [
            Prompt(*example, number) for example, number in zip(source.examples, source.numbers, strict=True)
        ]
    from study import encoding, model  # which load torch

    tokenizer = model.load_tokenizer(args.pretrained_ckpt)
    texts = [text for text, _ in source.examples]
    rooms = [args.max_new_tokens] * len(texts)
    fitted = list(encoding.fit_tuning(tokenizer, args.task, texts, rooms, args.max_seq_length))
    lengths = [len(ids) for _, _, ids in fitted]
    most = NEAR * args.prompt_tokens
    found = [
        Prompt(build_prompt(args.task, "instruction", text), reference, number)
        for (text, _, _), length, (_, reference), number in zip(
            fitted, lengths, source.examples, source.numbers, strict=True
        )
        if abs(length - args.prompt_tokens) <= most
    ]
    if not found:
        raise UserError(
            f"--prompt_tokens {args.prompt_tokens}: no prompt of {source.source} has about so many tokens, "
            f"they have {min(lengths)} to {max(lengths)}: name another number"
        )
    return found


def draw(prompts: Sequence[Prompt], count: int, rate: float, args: argparse.Namespace) -> list[Prompt] | None:
    """`count` of the prompts by --seed, each at most once unless --repeat_prompts; None if they run out."""
    drawn = random.Random(f"prompts {args.seed} {rate:g}")
    if args.repeat_prompts:
        return drawn.choices(prompts, k=count)
    return drawn.sample(prompts, count) if count <= len(prompts) else None
