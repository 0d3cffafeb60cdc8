"""Rows of token ids by the million: 4 bytes a token, where a list of Python's numbers takes up to 36, and
their fingerprint. A row comes out as a list whenever it is asked for.
"""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np


class TokenRows(Sequence):
    """Rows end to end: row i is ids[ends[i - 1] : ends[i]] of `ids` [tokens], int32."""

    def __init__(self, rows: Iterable[Sequence[int]] = ()):
        self.ids, self.ends = array("i"), array("q")
        for row in rows:
            self.append(row)

    def append(self, *parts: Sequence[int]) -> None:
        """A row of these parts."""
        for part in parts:
            self.ids.extend(part)
        self.ends.append(len(self.ids))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        i = range(len(self))[i]
        return self.ids[self.ends[i - 1] if i else 0 : self.ends[i]].tolist()

    def __eq__(self, other) -> bool:
        return len(self) == len(other) and all(map(list.__eq__, self, other))

    __hash__ = None

    def lengths(self) -> list[int]:
        return np.diff(self.ends, prepend=0).tolist()

    def largest(self) -> int:
        """The largest token id; 0 where there is none."""
        return int(np.frombuffer(self.ids, np.int32).max()) if self.ids else 0

    def json_rows(self) -> Iterator[bytes]:
        """Each row as json.dumps writes it, several times as fast: by a table of all numbers."""
        ids = np.frombuffer(self.ids, np.int32)
        table = np.array([f"{number}, " for number in range(self.largest() + 1)], "S")  # filled up with zeros
        for start, end in pairwise([0, *self.ends]):
            yield b"[" + table[ids[start:end]].tobytes().translate(None, b"\0")[:-2] + b"]"

    def json_pieces(self) -> Iterator[bytes]:
        return listed(self.json_rows())


class Chosen(Mapping):
    """Some of `rows`, by their numbers."""

    def __init__(self, rows: Sequence[list[int]], numbers: Iterable[int]):
        self.rows, self.numbers = rows, dict.fromkeys(numbers)

    def __getitem__(self, number: int) -> list[int]:
        return self.rows[number]

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)


def longest_first(rows: Mapping[int, Sequence[int]]) -> list[int]:
    """The numbers of rows, those of the longest first."""
    if isinstance(rows, Chosen):
        lengths = lengths_of(rows.rows)
        return sorted(rows, key=lambda number: -lengths[number])
    return sorted(rows, key=lambda number: -len(rows[number]))


def lengths_of(rows: Sequence[Sequence[int]]) -> list[int]:
    return rows.lengths() if isinstance(rows, TokenRows) else list(map(len, rows))


def largest_of(rows: Sequence[Sequence[int]]) -> int:
    """The largest token id; 0 where there is none."""
    if isinstance(rows, TokenRows):
        return rows.largest()
    return max((max(row, default=0) for row in rows), default=0)


def sha256_of(value) -> str:
    """Fingerprint of what the model sees: of the JSON of lists of token ids, or of a list of such lists and
    other values, as json.dumps writes it."""
    digest = hashlib.sha256()
    for piece in pieces_of(value):
        digest.update(piece)
    return digest.hexdigest()


def pieces_of(value) -> Iterator[bytes]:
    """What json.dumps writes, in pieces where it is large."""
    if hasattr(value, "json_pieces"):
        yield from value.json_pieces()
    elif isinstance(value, list) and any(hasattr(part, "json_pieces") for part in value):
        for number, part in enumerate(value):
            yield b", " if number else b"["
            yield from pieces_of(part)
        yield b"]"
    else:
        yield json.dumps(value).encode()


def listed(parts: Iterable[bytes]) -> Iterator[bytes]:
    """A JSON list of such parts."""
    before = b"["
    for part in parts:
        yield before + part
        before = b", "
    yield b"[]" if before == b"[" else b"]"
