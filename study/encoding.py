"""Prompts and answers as tokens: the tokenizer's own beginning, an EOS that is learned, and texts shortened
so that nothing else has to be."""

import argparse
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from prompts import build_prompt, defuse, parse_label
from study.errors import UserError
from study.reading import Reader
from study.tokens import TokenRows, listed

TODAY = datetime(2024, 7, 26)  # for chat templates that write the date: prompts must not change by the day


@dataclass
class Example:
    """One sequence: prompt, answer, end of sequence. `answer_start` is the place of the answer's first
    token."""

    ids: list[int]
    answer_start: int


class ExampleRows(Sequence):
    """Many of them, kept small: each is made when it is asked for."""

    def __init__(self):
        self.rows, self.answer_starts = TokenRows(), array("i")

    def append(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        self.rows.append(prompt, answer)
        self.answer_starts.append(len(prompt))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        return Example(self.rows[i], self.answer_starts[i])

    def json_pieces(self) -> Iterator[bytes]:
        """As a list of [answer_start, ids]."""
        each = zip(self.answer_starts, self.rows.json_rows(), strict=True)
        return listed(b"[%d, %s]" % (start, ids) for start, ids in each)


def lengths(examples: Sequence[Example]) -> list[int]:
    """Tokens of each."""
    if isinstance(examples, ExampleRows):
        return examples.rows.lengths()
    return [len(example.ids) for example in examples]


def beginning(tokenizer) -> list[int]:
    """The tokens that the tokenizer itself puts before a text: none, a BOS, or others ([gMASK]<sop>)."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    places = [i for i in range(len(whole)) if bare and whole[i : i + len(bare)] == bare]
    return whole[: places[0]] if places else []


def prompts_ids(reader: Reader, prompts: Iterable[str]) -> Iterator[array]:
    """Prompts as the model sees them, in training and inference alike: with the tokenizer's own beginning,
    unless a chat template has written one, and no EOS."""
    begins = array("i", beginning(reader.tokenizer))
    return (ids if ids[:1] and ids[0] in begins else begins + ids for ids in reader.rows(prompts))


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    return next(prompts_ids(Reader(tokenizer), [prompt])).tolist()


def answer_ids(tokenizer, task: str, answer: str, cue: str | None = None) -> list[int]:
    """The answer's tokens, as they follow the cue that ends every prompt of the task, then EOS; behind a
    `cue` of another kind, that of a chat template, without a space before them.

    They are read in one go with the cue, which gives the tokens that natural text would have, and so that the
    prompt's own tokens stay what inference sees.
    """
    answer = defuse(answer, special_tokens(tokenizer))
    if cue is None:
        cue, answer = build_prompt(task, "instruction", ""), f" {answer}"
    start, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (cue, cue + answer))
    if whole[: len(start)] != start:  # the cue's last token merged with the answer's first
        start, whole = [], tokenizer(answer, add_special_tokens=False)["input_ids"]
    return [*whole[len(start) :], tokenizer.eos_token_id]


def label_answers(
    tokenizer, labels: Sequence[str], max_new_tokens: int | None = None, cue: str | None = None
) -> list[list[int]]:
    """The tokens of each class, EOS included, as training writes them: the `allowed` answers of --decoding
    constrained. Behind the `cue` of a chat template a class may follow a space, too, as chat models differ.

    Raises UserError for a class that is longer than `max_new_tokens` (without its EOS), that is not read back
    as itself from its tokens, or that has those of another one.
    """
    named: dict[tuple, str] = {}
    for label in labels:
        for answer in [label] if cue is None else [label, f" {label}"]:
            ids = answer_ids(tokenizer, "classification", answer, cue)
            if max_new_tokens is not None and len(ids) - 1 > max_new_tokens:
                raise UserError(
                    f'--max_new_tokens {max_new_tokens} is too few for class "{label}", of {len(ids) - 1}'
                )
            twin = named.setdefault(tuple(ids), label)
            if twin != label:
                raise UserError(
                    f'--label_column: classes "{twin}" and "{label}" have the same tokens in this tokenizer: '
                    "rename one"
                )
    for ids, label in named.items():
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if parse_label(text, labels) != label:
            raise UserError(
                f'--label_column: class "{label}" comes back from this tokenizer as {text.strip()!r}, '
                "which does not name it: rename it"
            )
    return [list(ids) for ids in named]


def fit(
    tokenizer, texts: Iterable[str], write: Callable[[str], str], budgets: Sequence[int]
) -> Iterator[tuple[str, bool, array]]:
    """For each text its longest beginning whose prompt `write(text)` has at most so many tokens, whether it
    was cut, and that prompt's tokens.

    Only the text gives way: instruction, labels and cue stay whole. Raises UserError where these alone exceed
    the budget.
    """
    reader = Reader(tokenizer)
    return reader.over(lambda some: fit_some(reader, some, write), zip(texts, budgets, strict=True))


def fit_some(
    reader: Reader, some: Sequence[tuple[str, int]], write: Callable[[str], str]
) -> Iterator[tuple[str, bool, array]]:
    """`fit` for these texts and budgets together."""
    # A token is rarely longer than 40 characters: cut a giant text before it is tokenized over and over.
    kept = [text[: 40 * max(budget, 1)] for text, budget in some]
    rows = list(prompts_ids(reader, map(write, kept)))
    shorten(reader, kept, rows, write, [budget for _, budget in some])
    return zip(kept, (now != text for (text, _), now in zip(some, kept, strict=True)), rows, strict=True)


def shorten(
    reader: Reader, kept: list[str], rows: list[array], write: Callable[[str], str], budgets: Sequence[int]
) -> None:
    """Cut those of the texts `kept` whose prompts, of the tokens `rows`, have more than `budgets`, until they
    fit."""
    while long := [i for i, (ids, budget) in enumerate(zip(rows, budgets, strict=True)) if len(ids) > budget]:
        for i in long:
            if not kept[i]:
                raise UserError(
                    f"the prompt without its text has {len(rows[i])} tokens and only {max(budgets[i], 0)} "
                    "fit: raise --max_seq_length, lower --max_new_tokens or --shots, or take a longer context"
                )
        for i, found in zip(long, reader.encodings([kept[i] for i in long]), strict=True):
            kept[i] = cut_behind(kept[i], found, len(found) - (len(rows[i]) - budgets[i]))
        for i, ids in zip(long, prompts_ids(reader, [write(kept[i]) for i in long]), strict=True):
            rows[i] = ids


def special_tokens(tokenizer) -> list[str]:
    """Every text that the tokenizer would read as one control token."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def token_count(tokenizer, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def first_tokens(tokenizer, text: str, count: int) -> str:
    """The beginning of `text` that its first `count` tokens cover."""
    return cut_behind(text, *Reader(tokenizer).encodings([text]), count)


def cut_behind(text: str, found, count: int) -> str:
    """The beginning of `text`, of which `found` is the `tokenizers.Encoding`, that so many tokens cover."""
    if count >= len(found):
        return text
    return text[: found.token_to_chars(count)[0]].rstrip() if count > 0 else ""


def fit_tuning(
    tokenizer, task: str, texts: Iterable[str], rooms: Sequence[int], max_seq_length: int
) -> Iterator[tuple[str, bool, array]]:
    """The texts as every prompt of their task shows them: shortened so that their tuning prompts, returned
    too, leave so much room."""
    special = special_tokens(tokenizer)
    return fit(
        tokenizer,
        (defuse(text, special) for text in texts),
        lambda text: build_prompt(task, "instruction", text),
        [max_seq_length - room for room in rooms],
    )


def encode_examples(
    tokenizer, task: str, pairs: Sequence[tuple[str, str]], args: argparse.Namespace
) -> tuple[ExampleRows, int]:
    """Training sequences of (text, answer) pairs and how many texts were shortened.

    The prompt keeps `--max_new_tokens` free for the answer, as inference does; only a longer answer makes it
    shorter.
    """
    answers = list(dict.fromkeys(answer for _, answer in pairs))
    if task == "classification":
        known = dict(zip(answers, label_answers(tokenizer, answers, args.max_new_tokens), strict=True))
    else:
        known = {answer: answer_ids(tokenizer, task, answer) for answer in answers}
    endings = [known[answer] for _, answer in pairs]
    least = len(prompt_ids(tokenizer, build_prompt(task, "instruction", "")))
    for (_, answer), ending in zip(pairs, endings, strict=True):
        if task == "classification" and len(ending) > args.max_new_tokens:
            raise UserError(
                f'--max_new_tokens {args.max_new_tokens} is too few for class "{answer}", of {len(ending)}'
            )
        if len(ending) > max(args.max_new_tokens, args.max_seq_length - least):
            raise UserError(
                f'--max_seq_length {args.max_seq_length} is too few for the answer "{answer[:60]}...", of '
                f"{len(ending)}, and {least} of the prompt without its text: raise it, or drop that example"
            )
    rooms = [max(len(ending), args.max_new_tokens) for ending in endings]
    fitted = fit_tuning(tokenizer, task, (text for text, _ in pairs), rooms, args.max_seq_length)
    examples, shortened = ExampleRows(), 0
    for (_, cut, ids), ending in zip(fitted, endings, strict=True):
        examples.append(ids, ending)
        shortened += cut
    return examples, shortened


def encode_prompts(
    tokenizer, task: str, texts: Sequence[str], args: argparse.Namespace
) -> tuple[TokenRows, int]:
    """The prompts of a fine-tuned model, shortened as in training, and how many were."""
    prompts, shortened = TokenRows(), 0
    for _, cut, ids in fit_tuning(
        tokenizer, task, texts, [args.max_new_tokens] * len(texts), args.max_seq_length
    ):
        prompts.append(ids)
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


def in_chat(tokenizer, prompt: str, args: argparse.Namespace) -> str:
    """The prompt as a user's turn by --chat_template, on a day that is always the same.

    Raises UserError for a template that is wrong, refuses the prompt or does not write all of it.
    """
    if args.chat_template != "auto" or not tokenizer.chat_template:
        return prompt
    parts = [{"type": "text", "text": prompt}]  # as models that see pictures, too, want it
    for content in (prompt, parts):
        try:
            written = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                tokenize=False,
                add_generation_prompt=True,
                strftime_now=TODAY.strftime,
            )
        except Exception as error:  # whatever the template's own code raises
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"--chat_template auto: the checkpoint's own template fails: {reason}") from None
        if prompt.strip() in written:
            return written
    raise UserError("--chat_template auto: the checkpoint's own template does not write the prompt as it is")


def chat_cue(tokenizer, args: argparse.Namespace) -> str | None:
    """What ends a prompt where that is not the task's own cue: the end of the chat template. Raises UserError
    for a template that draws at random."""
    mark = "\u241fprompt\u241f"
    written = in_chat(tokenizer, mark, args)
    if any(in_chat(tokenizer, mark, args) != written for _ in range(9)):
        raise UserError("--chat_template auto: the checkpoint's own template writes something else each time")
    return None if written == mark else written.rpartition(mark)[2] or written


def encode_baseline(
    tokenizer,
    texts: Sequence[str],
    labels: Sequence[str],
    examples: Sequence[tuple[str, str]],
    context: int,
    args: argparse.Namespace,
) -> tuple[TokenRows, dict[str, int]]:
    """The prompts of an untuned model and what was cut: {"texts", "examples", "example_tokens"}.

    A text is first shortened as fine-tuning shows it, so that all methods read the same; then the examples
    are, the longest first, until instruction, examples, the longest query and the answer fit the model's
    context.
    """
    special, budget = special_tokens(tokenizer), context - args.max_new_tokens
    labels = [defuse(label, special) for label in labels]

    def views(texts: Sequence[str]) -> list[tuple[str, bool]]:
        rooms = [args.max_new_tokens] * len(texts)
        fitted = fit_tuning(tokenizer, args.task, texts, rooms, args.max_seq_length)
        return [(text, cut) for text, cut, _ in fitted]

    def write(text: str, shown: Sequence[tuple[str, str]]) -> str:
        return in_chat(tokenizer, build_prompt(args.task, args.prompt_type, text, labels, shown), args)

    queries, cut = views(texts), {"examples": 0, "example_tokens": 0}
    kept = [text for text, _ in queries]
    answers = [defuse(answer, special) for _, answer in examples]
    shown = [
        (text, answer)
        for (text, _), answer in zip(views([text for text, _ in examples]), answers, strict=True)
    ]
    if shown:
        # A text's tokens change a little at its borders; what that takes comes off the query below.
        room = budget - len(prompt_ids(tokenizer, write("", [("", answer) for answer in answers])))
        longest = max(map(len, Reader(tokenizer).rows(kept)))
        shown, cut = shorten_examples(tokenizer, shown, room - min(longest, room // 2))
    prompts, cut["texts"] = TokenRows(), 0
    fitted = fit(tokenizer, kept, lambda text: write(text, shown), [budget] * len(kept))
    for (_, first), (_, then, ids) in zip(queries, fitted, strict=True):
        prompts.append(ids)
        cut["texts"] += first or then
    return prompts, cut
