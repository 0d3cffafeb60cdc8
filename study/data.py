"""A hub id or local files -> checked, cleaned, seeded and fingerprinted examples.

An example is a pair of strings: (text, class) or (dialogue, summary). Everything that a file can have wrong
is found here, before a model is loaded.
"""

import argparse
import csv
import gzip
import hashlib
import io
import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from study.cli import DEFAULTS, UserError

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
Row = tuple[int, dict]  # number in its file (line or row, from 1), columns


@dataclass
class Split:
    """The examples of one split. `numbers` are their rows in the source, from 1; `available` counts what a
    sample was taken from; `overlap` counts the train texts that also occur in test."""

    source: str
    examples: list[tuple[str, str]]
    numbers: list[int]
    dropped: Counter = field(default_factory=Counter)
    overlap: int | None = None
    available: int | None = None

    def describe(self) -> dict:
        """What a record says of a split. `sha256` covers the examples as they are used."""
        rows = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in self.examples)
        return {
            "source": self.source,
            "rows": len(self.examples),
            "available": self.available or len(self.examples),
            "dropped": dict(self.dropped),
            **({} if self.overlap is None else {"also_in_test": self.overlap}),
            "sha256": hashlib.sha256(rows.encode("utf-8", "surrogatepass")).hexdigest(),
        }

    def keep(self, indices: Sequence[int]) -> "Split":
        return replace(
            self, examples=[self.examples[i] for i in indices], numbers=[self.numbers[i] for i in indices]
        )


class NoSource(UserError):
    """The flags name no source for a split."""


def load(args: argparse.Namespace, names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Split]:
    """The splits `names` of the data that the flags name, cleaned; sampling comes after (`sample_train`,
    `sample_eval`).

    A split of `optional` that the flags do not name is left out. With both train and test, texts of train
    that also occur in test are counted, and dropped by --drop_overlap. Raises UserError for everything that
    is wrong with a file.
    """
    columns = (
        (args.text_column, args.label_column)
        if args.task == "classification"
        else (args.dialogue_column, args.summary_column)
    )
    splits: dict[str, Split] = {}
    for name in (*names, *optional):
        try:
            splits[name] = clean(*source_of(args, name), columns, args.task)
        except NoSource:
            if name in names:
                raise
    if {"train", "test"} <= splits.keys():
        drop_overlap(splits, args.drop_overlap)
    elif args.drop_overlap and "train" in splits:
        raise UserError("--drop_overlap: there is no test split to compare with: name it with --test_file")
    if "train" in splits and args.task == "classification":
        labels = labels_of(splits["train"])
        for split in splits.values():
            check_labels(split, labels)
    return splits


def source_of(args: argparse.Namespace, split: str) -> tuple[str, Iterator[Row]]:
    """Where a split lies, as a record names it, and its rows."""
    file = getattr(args, f"{split}_file")
    if file:
        return file, read_file(Path(file), f"--{split}_file")
    if args.dataset == DEFAULTS[args.task]["dataset"] and (
        args.train_file or args.test_file or args.validation_file
    ):
        raise NoSource(
            f"--{split}_file is needed: the other split is a local file, and --dataset names no other source"
        )
    path = Path(args.dataset)
    if path.is_dir():
        file = find_in_folder(path, split)
        return str(file), read_file(file, "--dataset")
    if path.is_file():
        if split != "train":
            raise NoSource(
                f"--dataset {path} is one file, the train split: name the {split} split with --{split}_file"
            )
        return str(path), read_file(path, "--dataset")
    if (
        args.dataset.startswith((".", "/", "~"))
        or bare_suffix(path) in FORMATS
        or args.dataset.count("/") > 1
    ):
        raise UserError(f"--dataset {args.dataset}: there is no such file or folder")
    return f"{args.dataset} ({split})", read_hub(args.dataset, split)


def find_in_folder(folder: Path, split: str) -> Path:
    names = {"validation": "validation|valid|val|dev"}.get(split, split)
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"--dataset {folder} can't be read: {error.strerror}") from None
    found = [
        file
        for file in files
        if bare_suffix(file) in FORMATS and re.search(rf"(^|[-_.])({names})[-_.]", file.name)
    ]
    if not found:
        raise NoSource(
            f"--dataset {folder} holds no {split} file ({split}.jsonl, say): name it with --{split}_file"
        )
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(
            f"--dataset {folder} holds several {split} files ({names}): name one with --{split}_file"
        )
    return found[0]


def bare_suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def read_file(path: Path, flag: str) -> Iterator[Row]:
    """The rows of one local file. Raises UserError, naming the line where there is one."""
    if not path.is_file():
        raise UserError(f"{flag} {path}: there is no such file")
    suffix = bare_suffix(path)
    if suffix not in FORMATS:
        raise UserError(f"{flag} {path}: the name must end in {', '.join(FORMATS)}, or one of these with .gz")
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{flag} {path} is damaged or half-written ({error}): fetch or write it again"
        ) from None
    except OSError as error:
        raise UserError(f"{flag} {path} can't be read: {error.strerror}") from None
    where = f"{flag} {path}"
    if suffix == ".parquet":
        return read_parquet(content, where)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where} line {line} is not UTF-8 text: save it as UTF-8") from None
    if suffix == ".csv":
        return read_csv(text, where)
    return read_json_array(text, where) if text.lstrip().startswith("[") else read_json_lines(text, where)


def read_json_lines(text: str, where: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, json_object(line, f"{where} line {number}")


def read_json_array(text: str, where: str) -> Iterator[Row]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(
                f'{where} row {number} is not a JSON object such as {{"text": ..., "label": ...}}'
            )
        yield number, row


def json_object(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f'{where} is not a JSON object such as {{"text": ..., "label": ...}}')
    return row


def read_csv(text: str, where: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    try:
        for number, row in enumerate(csv.DictReader(io.StringIO(text, newline=""), strict=True), 1):
            if None in row:
                raise UserError(
                    f"{where} row {number} has more cells than the header: quote texts with commas"
                )
            yield number, row
    except csv.Error as error:
        raise UserError(f"{where} is not CSV: {error}") from None


def read_parquet(content: bytes, where: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{where} is not a Parquet file: {str(error).splitlines()[0]}") from None
    yield from enumerate(table.to_pylist(), 1)


def read_hub(name: str, split: str) -> Iterator[Row]:
    """The rows of a hub data set, from its cache where the hub can't be reached; class numbers become class
    names."""
    import datasets
    import httpx

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        kind = NoSource if "Unknown split" in reason else UserError
        raise kind(
            f"--dataset {name}: no {split} split on the hub or in its cache ({reason[:160]}); check name and "
            f"network, or give local files with --train_file and --test_file"
        ) from None
    for column, feature in rows.features.items():
        if isinstance(feature, datasets.ClassLabel):
            names = [named_label(feature.names, number) for number in rows[column]]
            rows = rows.remove_columns(column).add_column(column, names)
    yield from enumerate(rows, 1)


def named_label(names: Sequence[str], number: int | None) -> str | None:
    """The class that a hub data set has as a number; -1 stands for none."""
    return None if number is None or number < 0 else names[number]


def clean(source: str, rows: Iterator[Row], columns: tuple[str, str], task: str) -> Split:
    """The examples in `columns` of `rows`, trimmed; rows that can't be used are dropped and counted by
    reason."""
    split = Split(source, [], [])
    number = 0
    for number, row in rows:
        pair = []
        for column in columns:
            if column not in row:
                have = ", ".join(str(name) for name in row) or "none"
                flag = "_column, --".join(
                    ("--text", "label") if task == "classification" else ("--dialogue", "summary")
                )
                raise UserError(
                    f'{source} row {number} has no column "{column}" but {have}: name it by {flag}_column'
                )
            if not isinstance(row[column], str | None):
                kind = (
                    "a number" if isinstance(row[column], int | float) else f"a {type(row[column]).__name__}"
                )
                raise UserError(
                    f'{source} row {number}: column "{column}" holds {kind}, not text; name another '
                    "column or make it text"
                )
            # Half of a surrogate pair, which JSON can spell, is no character.
            pair.append((row[column] or "").encode("utf-8", "replace").decode().strip())
        reason = reason_to_drop(pair, columns, task)
        if reason:
            split.dropped[reason] += 1
            continue
        if task == "classification" and len(pair[1].splitlines()) > 1:
            raise UserError(
                f"{source} row {number}: a class is one line, this one has several: {pair[1]!r:.60}"
            )
        split.examples.append((pair[0], pair[1]))
        split.numbers.append(number)
    if not split.examples:
        dropped = ", ".join(f"{count} rows with {reason}" for reason, count in split.dropped.items())
        raise UserError(f"{source} has no usable row" + (f": {dropped}" if dropped else ": it is empty"))
    return split


def reason_to_drop(pair: list[str], columns: tuple[str, str], task: str) -> str | None:
    for value, column in zip(pair, columns, strict=True):
        if not value:
            return f"empty {column}"
    return 'class "None"' if task == "classification" and pair[1] == "None" else None


def labels_of(split: Split) -> list[str]:
    """The classes of the train split, sorted; every other split must keep to them."""
    labels = sorted({label for _, label in split.examples})
    if len(labels) == 1:
        raise UserError(f'{split.source} has one class only, "{labels[0]}": classification needs two or more')
    return labels


def check_labels(split: Split, labels: Sequence[str]) -> None:
    for (_, label), number in zip(split.examples, split.numbers, strict=True):
        if label not in labels:
            raise UserError(f'{split.source} row {number}: class "{label}" does not occur in the train split')


def drop_overlap(splits: dict[str, Split], drop: bool) -> None:
    """Count the train texts that stand in test too, but for white space; with `drop`, take them out of
    train."""
    train, seen = splits["train"], {tuple(text.split()) for text, _ in splits["test"].examples}
    apart = [i for i, (text, _) in enumerate(train.examples) if tuple(text.split()) not in seen]
    shared = len(train.examples) - len(apart)
    if drop and not apart:
        raise UserError(
            f"--drop_overlap leaves no train example: every text of {train.source} occurs in test"
        )
    if drop and shared:
        splits["train"] = train.keep(apart)
        splits["train"].dropped["also in test"] += shared
    splits["train"].overlap = shared


def sample_train(split: Split, args: argparse.Namespace) -> Split:
    """--max_train_samples, then --train_sample_fraction of each class (of all, for summaries), by --seed.

    Each class is shuffled once by the seed and cut at the fraction, so a smaller sample lies inside a larger
    one.
    """
    kept = choose(len(split.examples), args.max_train_samples, args.seed)
    strata: dict[str, list[int]] = {}
    for i in kept:
        strata.setdefault(split.examples[i][1] if args.task == "classification" else "", []).append(i)
    smallest = min(map(len, strata.values()))
    if round_half_up(args.train_sample_fraction * smallest) < 1:
        raise UserError(
            f"--train_sample_fraction {args.train_sample_fraction} takes no example of the smallest class: "
            f"the least that works here is {-(-5000 // smallest) / 10000:g}"
        )
    taken = []
    for label, indices in strata.items():
        random.Random(f"{args.seed} {label}").shuffle(indices)
        taken += indices[: round_half_up(args.train_sample_fraction * len(indices))]
    return replace(split.keep(sorted(taken)), available=len(split.examples))


def round_half_up(number: float) -> int:
    return int(number + 0.5)


def sample_eval(split: Split, args: argparse.Namespace) -> Split:
    """--max_eval_samples of a split; the same ones whatever --seed says, so that scores stay comparable."""
    kept = split.keep(choose(len(split.examples), args.max_eval_samples, seed=0))
    return replace(kept, available=len(split.examples))


def choose(count: int, limit: int | None, seed: int) -> list[int]:
    """`limit` of the indices below `count`, in order; a smaller choice lies inside a larger one of the same
    seed."""
    indices = list(range(count))
    if limit is not None and limit < count:
        random.Random(seed).shuffle(indices)
    return sorted(indices[:limit])


def say_split(name: str, split: Split, used: Split) -> str:
    """One line on a split: rows used, rows there are, rows dropped and why, and train texts that occur in
    test."""
    dropped = "".join(f", {count:,} dropped: {reason}" for reason, count in split.dropped.items())
    overlap = f", {split.overlap:,} texts occur in test too" if split.overlap else ""
    count = f"{len(used.examples):,} of {len(split.examples):,} rows"
    return f"{name:<11}{count} of {split.source}{dropped}{overlap}"
