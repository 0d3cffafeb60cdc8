"""Many texts are read quickly, and as the checkpoint's tokenizer reads each alone."""

import gzip
import json
import sys
import threading
import time

import pytest
from conftest import DEMO_MODEL
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from study import encoding, reading
from study.errors import UserError

PLAIN = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
MANY = 2 * reading.TOGETHER + 3


def texts() -> list[str]:
    """Of several kinds: of no characters, with special tokens and spaces, outside ASCII."""
    kinds = ("the lamp {}\n\n  it's No. {}", "", "\t</s> <s>{}\r\n", "Grüße, 漢字 {} 👩‍👧", "x" * 300 + "{}")
    return [kinds[i % len(kinds)].replace("{}", str(i)) for i in range(MANY)]


def changed(**changes) -> PreTrainedTokenizerFast:
    """The demo's tokenizer, otherwise in its file."""
    content = json.loads((DEMO_MODEL / "tokenizer.json").read_text())
    content["model"] |= changes.pop("model", {})
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content | changes)))


def check(tokenizer, some: list[str]) -> reading.Reader:
    """That each comes out as it does alone."""
    reader = reading.Reader(tokenizer)
    rows = [row.tolist() for row in reader.rows(some)]
    assert rows == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in some]
    return reader


def test_many_texts_have_the_tokens_that_each_has_alone(monkeypatch):
    by_gigatoken, seen = reading.by_gigatoken, []
    monkeypatch.setattr(
        reading, "by_gigatoken", lambda giga, some: seen.extend(some) or by_gigatoken(giga, some)
    )
    assert check(AutoTokenizer.from_pretrained(DEMO_MODEL), texts()).gigatoken
    assert all(map(str.isascii, seen))  # what else there is the tokenizer reads
    assert len(seen) > MANY * 0.7
    assert not check(AutoTokenizer.from_pretrained(DEMO_MODEL), texts()[:5]).gigatoken  # not worth its start


def test_so_have_posts_by_the_llama_2_tokenizer(real_data):
    with gzip.open(real_data / "newsgroups_test.jsonl.gz", "rt", encoding="utf-8") as file:
        posts = [json.loads(line)["text"] for _, line in zip(range(MANY), file, strict=False)]
    assert check(AutoTokenizer.from_pretrained(real_data / "llama2_tokenizer"), posts + texts()).gigatoken


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {**PLAIN, "use_regex": False}},
        {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_file_that_says_something_else_is_read_as_it_says(change):
    tokenizer = changed(**change)
    assert bool(check(tokenizer, texts()).gigatoken) == ("truncation" in change)  # which never counted


def test_a_tokenizer_that_draws_is_read_by_itself():
    reader = reading.Reader(changed(model={"dropout": 0.2}))
    assert len([*reader.rows(texts())]) == MANY
    assert reader.backend is None


class Own(PreTrainedTokenizerFast):
    """One whose class has a say, and code that two threads at once would upset."""

    def _encode_plus(self, *args, **options):
        assert self.free.acquire(blocking=False)
        time.sleep(0.001)
        self.free.release()
        return super()._encode_plus(*args, **options)


def test_a_tokenizer_of_a_class_of_its_own_is_called_by_one_thread_at_a_time():
    tokenizer = Own.from_pretrained(DEMO_MODEL)
    tokenizer.free = threading.Lock()
    some = [f"{text} {'and on ' * (i % 40)}" for i, text in enumerate(texts())]
    assert check(tokenizer, some).backend is None
    fitted = list(encoding.fit_tuning(tokenizer, "classification", some, [20] * MANY, 80))
    assert sum(cut for _, cut, _ in fitted) > MANY / 5


@pytest.mark.parametrize("missing", [True, False])
def test_without_gigatoken_or_with_one_that_fails_the_tokenizer_reads(monkeypatch, missing):
    if missing:
        monkeypatch.setitem(sys.modules, "gigatoken", None)
    else:
        wrong = lambda giga, some: [row[1:] for row in by_gigatoken(giga, some)]
        by_gigatoken = reading.by_gigatoken
        monkeypatch.setattr(reading, "by_gigatoken", wrong)
    reader = check(AutoTokenizer.from_pretrained(DEMO_MODEL), texts())
    assert (reader.gigatoken, bool(reader.backend)) == (None, True)


def test_gigatoken_that_errs_on_a_later_text_is_refused(monkeypatch):
    by_gigatoken = reading.by_gigatoken

    def wrong(giga, some: list[str]) -> list:
        return [
            row[:1] if "No. " in text else row
            for text, row in zip(some, by_gigatoken(giga, some), strict=True)
        ]

    monkeypatch.setattr(reading, "by_gigatoken", wrong)
    with pytest.raises(UserError, match=r"gigatoken reads a text otherwise .* pip uninstall gigatoken"):
        list(reading.Reader(AutoTokenizer.from_pretrained(DEMO_MODEL)).rows(texts()))


def test_what_is_wrong_with_one_of_many_is_said_as_of_one():
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    rooms = [20] * (MANY - 1) + [190]
    with pytest.raises(UserError, match=r"the prompt without its text has .* and only 10 fit"):
        list(encoding.fit_tuning(tokenizer, "classification", ["the lamp"] * MANY, rooms, 200))
