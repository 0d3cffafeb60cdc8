"""Texts -> their tokens. Which these are the checkpoint's tokenizer says. Many texts are read by gigatoken in
a fifth of the time or less, where it is installed and as far as it is seen to give the same.
"""

import random
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice

from study.errors import UserError

TOGETHER = 512  # texts that are read at once: the tokenizer's notes on them take memory
AHEAD = 2  # times so many are read at the same time, each in a thread
CHECKED = 100  # of so many texts that gigatoken reads, the tokenizer reads one, too

ASCII = [chr(number) for number in range(128)]
PIECES = [*"\n\t._1e", " ", "  ", "\n\n", "\r\n", ", ", "```", "'s", "'LL", "1999", "The", "word", "<0x0A>"]


class Reader:
    """Reads texts as `tokenizer` does: rows of tokens, int32, without those that begin or end one."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.backend = self.gigatoken = None  # until there are many texts

    def rows(self, texts: Iterable[str]) -> Iterator[array]:
        """The tokens of every text."""
        return self.over(self.read, texts)

    def over(self, work: Callable[[list], Iterable], values: Iterable) -> Iterator:
        """What `work` makes of the values, some at a time. Where there are many it is called in threads, in
        which it reads quicker, and ahead of what is asked for."""
        values = iter(values)
        chunks = iter(lambda: list(islice(values, TOGETHER)), [])
        first, second = next(chunks, []), next(chunks, None)
        if second is None:
            yield from work(first) if first else ()
            return
        self.hurry()
        ahead = deque()
        threads = 1 if self.backend is None else AHEAD  # nobody knows what a class of its own shares
        with ThreadPoolExecutor(threads) as beside:
            for chunk in chain([first, second], chunks):
                ahead.append(beside.submit(work, chunk))
                if len(ahead) > AHEAD:
                    yield from ahead.popleft().result()
            for made in ahead:
                yield from made.result()

    def read(self, texts: list[str]) -> list[array]:
        """Raises UserError where gigatoken reads a text otherwise than the tokenizer."""
        if self.gigatoken is None:
            return self.by_tokenizer(texts)
        # Where forms of Unicode may part them the tokenizer reads.
        plain = [text for text in texts if text.isascii()]
        rows = by_gigatoken(self.gigatoken, plain)
        if rows[::CHECKED] != self.by_tokenizer(plain[::CHECKED]):
            raise UserError(
                "gigatoken reads a text otherwise than the checkpoint's tokenizer: pip uninstall gigatoken, "
                "and the tokenizer reads all"
            )
        if len(plain) == len(texts):
            return rows
        quick, others = iter(rows), iter(self.by_tokenizer([text for text in texts if not text.isascii()]))
        return [next(quick if text.isascii() else others) for text in texts]

    def by_tokenizer(self, texts: list[str]) -> list[array]:
        if self.backend is not None:  # which leaves out the places of tokens in their texts
            found = self.backend.encode_batch_fast(texts, add_special_tokens=False)
            return [array("i", encoding.ids) for encoding in found]
        return [array("i", ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def encodings(self, texts: list[str]) -> Sequence:
        """Of each text the `tokenizers.Encoding`, which knows where each token stands in it."""
        if self.backend is not None:
            return self.backend.encode_batch(texts, add_special_tokens=False)
        return self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True).encodings

    def hurry(self) -> None:
        """Read by what is quicker, from now on: by what the tokenizer is made of, where its class adds
        nothing to it, and by gigatoken; either if it reads `probes` as the tokenizer does."""
        from transformers import PreTrainedTokenizerFast

        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        plain = getattr(type(self.tokenizer), "_encode_plus", None) is PreTrainedTokenizerFast._encode_plus
        if self.backend is not None or backend is None or not plain:
            return
        texts = probes([token.content for token in self.tokenizer.added_tokens_decoder.values()])
        known = self.by_tokenizer(texts)  # which also turns off what its file may say on cutting texts
        self.backend = backend
        if self.by_tokenizer(texts) != known:
            self.backend = None
            return
        giga = gigatoken_of(backend)
        if giga is not None and by_gigatoken(giga, texts) == known:
            self.gigatoken = giga


def gigatoken_of(backend):
    """gigatoken's tokenizer by the same file; None where it is not installed or does not know its kind."""
    try:
        import gigatoken

        return gigatoken.Tokenizer.from_json(backend.to_str())
    except Exception:  # whatever it has against this file
        return None


def by_gigatoken(giga, texts: list[str]) -> list[array]:
    rows, counts = giga.encode_batch_padded(texts, 0)  # [texts, tokens] uint32, filled up with zeros; [texts]
    return [array("i", row[:count].tobytes()) for row, count in zip(rows, counts.tolist(), strict=True)]


def probes(added: Sequence[str]) -> list[str]:
    """ASCII texts in which readers would differ if they did: every pair of characters, and pieces and the
    tokenizer's added tokens in any order."""
    pairs = ["".join(first + second for second in ASCII) for first in ASCII]
    added, draw = [token for token in added if token.isascii()], random.Random(0)
    return pairs + ["".join(draw.choices(PIECES + added, k=20)) for _ in range(300 + 3 * len(added))]
