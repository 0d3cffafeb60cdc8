"""Every word a model sees, and how its answer is read. Pure functions of strings; standard library only.

A prompt is built from a template of TEMPLATES and blocks of BLOCKS. The text stands between two fences of
backticks, and a fence is always longer than any run of backticks in the text, so nothing inside a text can
close it. An answer is read from the generated text alone, so a heading inside a text cannot pass for one.
"""

import hashlib
import re
import string
import unicodedata
from collections.abc import Sequence

BLOCKS = {
    "classification": "### Text:\n{fence}\n{text}\n{fence}\n\n### Class:",
    "summarization": "### Dialogue:\n{fence}\n{text}\n{fence}\n\n### Summary:",
}

TEMPLATES = {  # by task and type of prompt; "instruction" is that of fine-tuned models
    "classification": {
        "instruction": "Name the class of the text between the fences.\n\n{query}",
        "zero-shot": (
            "Each text belongs to exactly one of these {count} classes:\n\n{labels}\n\n"
            "Decide which class the text between the fences belongs to. Answer with the name of that "
            "class, spelled as in the list, and with nothing else.\n\n{query}"
        ),
        "few-shot": (
            "Each text belongs to exactly one of these {count} classes:\n\n{labels}\n\n"
            "Decide which class the last text between the fences belongs to. Answer with the name of that "
            "class, spelled as in the list, and with nothing else. The texts before it show how it is "
            "done.\n\n{examples}\n\n{query}"
        ),
    },
    "summarization": {
        "instruction": "Summarize the dialogue between the fences.\n\n{query}",
        "zero-shot": (
            "Summarize the dialogue between the fences in one to three short sentences. Write in the third "
            "person, name the speakers, and add nothing that is not said.\n\n{query}"
        ),
        "few-shot": (
            "Summarize the last dialogue between the fences in one to three short sentences. Write in the "
            "third person, name the speakers, and add nothing that is not said. The dialogues before it show "
            "how it is done.\n\n{examples}\n\n{query}"
        ),
    },
}

_PUNCTUATION = string.punctuation + string.whitespace + "“”‘’«»„…–—"


def fence(text: str) -> str:
    """The shortest fence, of three backticks or more, that is longer than every run of backticks in
    `text`."""
    runs = re.findall("`+", text) if "`" in text else ()  # most texts have none, which is seen sooner
    return "`" * max(3, 1 + max(map(len, runs), default=0))


def build_block(task: str, text: str, answer: str | None = None) -> str:
    """One text between fences and the cue for its answer; with `answer`, a solved example."""
    block = BLOCKS[task].format(fence=fence(text), text=text)
    return block if answer is None else f"{block} {answer}"


def build_prompt(
    task: str,
    prompt_type: str,
    text: str,
    labels: Sequence[str] = (),
    examples: Sequence[tuple[str, str]] = (),
) -> str:
    """The whole prompt, ending in the answer's cue (no space, no newline behind it).

    `labels` are listed by the zero-shot and few-shot prompts of classification; `examples` are the solved
    (text, answer) pairs of the few-shot prompts. The model's answer, and the answer it is trained on, follow
    the cue after one space.
    """
    return TEMPLATES[task][prompt_type].format(
        count=len(labels),
        labels="\n".join(f"- {label}" for label in labels),
        examples="\n\n".join(build_block(task, *example) for example in examples),
        query=build_block(task, text),
    )


def defuse(text: str, special_tokens: Sequence[str]) -> str:
    """`text` with a space put into every special token spelled out in it ("</s>" -> "< /s>"), so that a
    tokenizer reads letters and not a control token."""
    for token in filter(lambda token: len(token) > 1 and token in text, special_tokens):
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def parse_label(answer: str, labels: Sequence[str]) -> str | None:
    """The class that a generated answer names, or None where it names none (an invalid answer).

    Read is the first line, trimmed. It names a class if it equals the class's name, in whichever of Unicode's
    forms, or does so but for case, or but for case and the punctuation around it; a looser reading counts
    only where it fits exactly one class.
    """
    line = (answer.strip().splitlines() or [""])[0].strip()
    for reading in (_composed, _caseless, lambda name: _caseless(name).strip(_PUNCTUATION)):
        key = reading(line)
        named = [label for label in labels if key and reading(label) == key]
        if len(named) == 1:
            return named[0]
    return None


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _caseless(name: str) -> str:
    return _composed(_composed(name).casefold())


def parse_summary(answer: str) -> str:
    """The summary in a generated answer: all of it, trimmed, up to a line where the model begins another
    block."""
    heading = r"^### (?:Dialogue|Summary):"
    return re.split(heading, answer, maxsplit=1, flags=re.MULTILINE)[0].strip()


def prompt_sha256(task: str, prompt_type: str) -> str:
    """Fingerprint of the wording that a score was made with."""
    return hashlib.sha256((TEMPLATES[task][prompt_type] + BLOCKS[task]).encode()).hexdigest()
