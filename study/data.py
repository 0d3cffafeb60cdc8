"""A hub id or local files -> checked, cleaned, seeded and fingerprinted examples.

An example is a pair of strings: (text, class) or (dialogue, summary). Everything that a file can have wrong
is found here, before a model is loaded.
"""

import argparse
import hashlib
import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from study import classes
from study.classes import looks
from study.cli import DEFAULTS
from study.errors import UserError
from study.files import (
    FORMATS,
    Columns,
    NoSource,
    Row,
    bare_suffix,
    hub_splits,
    no_column,
    read_file,
    read_hub,
)

COLUMNS = {
    "classification": ("text_column", "label_column"),
    "summarization": ("dialogue_column", "summary_column"),
}
HOLDABLE = ("test", "validation")  # by --test_fraction and --validation_fraction


@dataclass
class Split:
    """The examples of one split. `numbers` are their rows in the source as errors name them, from 1 (lines of
    JSON lines), `places` the same from 0 without counting blank lines; `available` counts what a sample was
    taken from; `overlap` counts the train texts that also occur in test; `repeated` are those of a
    classification that occur more than once, with how often each class stands beside them; `merged` the rows
    whose class was spelled otherwise, by class and spelling. `fraction` is the share of train that became
    this split, `alone` how many classes of one row stayed there, and `held_out` what became of a train split
    in that way."""

    source: str
    examples: list[tuple[str, str]]
    numbers: list[int]
    places: list[int] = field(default_factory=list)
    dropped: Counter = field(default_factory=Counter)
    overlap: int | None = None
    repeated: dict[str, Counter] | None = None
    available: int | None = None
    merged: dict[str, dict[str, int]] = field(default_factory=dict)
    fraction: float | None = None
    alone: int = 0
    held_out: dict[str, dict] = field(default_factory=dict)
    hashed: list[int] | None = None

    def __post_init__(self):
        self.places = self.places or [number - 1 for number in self.numbers]

    def describe(self) -> dict:
        """What a record says of a split. `sha256` covers the examples as they are used."""
        return {
            "source": self.source,
            "rows": len(self.examples),
            "available": self.available or len(self.examples),
            "dropped": dict(self.dropped),
            **({} if self.overlap is None else {"also_in_test": self.overlap}),
            **({} if self.repeated is None else self.count_repeated()),
            **({"merged": self.merged} if self.merged else {}),
            **({} if self.fraction is None else {"fraction": self.fraction}),
            **({"held_out": self.held_out} if self.held_out else {}),
            "sha256": self.sha256(),
        }

    def sha256(self) -> str:
        digest, quoted = hashlib.sha256(), json.JSONEncoder(ensure_ascii=False).encode
        for text, answer in self.examples:  # each as JSON; the pair at once would take twice as long
            digest.update(f"[{quoted(text)}, {quoted(answer)}]\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def hashes(self) -> list[int]:
        """Of each text, but for white space. Two texts may share one; a copy of all would be large."""
        if self.hashed is None:
            self.hashed = [hash(" ".join(text.split())) for text, _ in self.examples]
        return self.hashed

    def count_repeated(self) -> dict[str, int]:
        """How many texts occur more than once, and how many of these with different classes."""
        different = sum(len(counts) > 1 for counts in self.repeated.values())
        return {"repeated": len(self.repeated), "contradicting": different}

    def keep(self, indices: Sequence[int]) -> "Split":
        columns = {name: getattr(self, name) for name in ("examples", "numbers", "places")}
        columns |= {"hashed": self.hashed} if self.hashed else {}
        return replace(self, **{name: [column[i] for i in indices] for name, column in columns.items()})


def load(
    args: argparse.Namespace, names: Sequence[str], optional: Sequence[str] = (), trained: dict | None = None
) -> dict[str, Split]:
    """The splits `names` of the data that the flags name, cleaned; sampling comes after (`sample_train`,
    `sample_eval`).

    A split of `optional` that the flags do not name is left out. With both train and test, texts of train
    that also occur in test are counted, and dropped by --drop_overlap. What --test_fraction and
    --validation_fraction hold out of train is what the record `trained` says, if that is given. Raises
    UserError for everything that is wrong with a file.
    """
    shares = shares_for({*names, *optional}, args)
    splits: dict[str, Split] = {}
    for name in dict.fromkeys(["train"] * bool(shares) + [*names, *optional]):
        if name in shares:
            continue
        try:
            splits[name] = read_split(args, name)
        except NoSource:
            if name in names or name == "train":
                raise
    for name, share in shares.items():
        if not trained or name in names:  # the training saw to the others
            refuse_another(args, name)
        splits["train"], splits[name] = hold_out(splits["train"], name, share, args.task)
        if trained and name in names:
            check_held_out(splits[name], name, trained)
    splits = {name: split for name, split in splits.items() if name in (*names, *optional)}
    if {"train", "test"} <= splits.keys():
        drop_overlap(splits, args.drop_overlap)
    elif args.drop_overlap and "train" in splits:
        raise UserError("--drop_overlap: there is no test split to compare with: name it with --test_file")
    if args.task == "classification" and (trained or "train" in splits):
        labels = trained["labels"] if trained else labels_of(splits["train"])
        for name in splits.keys() - {"train"}:
            splits[name] = classes.fit(splits[name], labels, args.merge_labels, args.unseen_labels)
        if "train" in splits:
            splits["train"].repeated = find_repeated(splits["train"])
    return splits


def read_split(args: argparse.Namespace, name: str) -> Split:
    columns = columns_of(args)
    source, rows = source_of(args, name, columns)
    split = clean(source, rows, columns, args.task, unlabelled(source))
    train = name == "train" and args.task == "classification"
    return classes.one_spelling(split, args.merge_labels) if train else split


def columns_of(args: argparse.Namespace) -> Columns:
    return {f"--{flag}": getattr(args, flag) for flag in COLUMNS[args.task]}


def source_of(args: argparse.Namespace, split: str, columns: Columns) -> tuple[str, Iterator[Row]]:
    """Where a split lies, as a record names it, and its rows."""
    file = getattr(args, f"{split}_file")
    if file:
        return file, read_file(Path(file), f"--{split}_file", columns, args.delimiter)
    if args.dataset == DEFAULTS[args.task]["dataset"] and (
        args.train_file or args.test_file or args.validation_file
    ):
        raise NoSource(
            f"--{split}_file is needed{or_a_share(split)}: the other split is a local file, and --dataset "
            "names no other source"
        )
    path = Path(args.dataset)
    if path.is_dir():
        file = find_in_folder(path, split)
        return str(file), read_file(file, "--dataset", columns, args.delimiter)
    if path.is_file():
        if split != "train":
            raise NoSource(
                f"--dataset {path} is one file, the train split: name the {split} split with --{split}_file"
                + or_a_share(split)
            )
        return str(path), read_file(path, "--dataset", columns, args.delimiter)
    if is_path(args.dataset):
        raise UserError(f"--dataset {args.dataset}: there is no such file or folder")
    return f"{args.dataset} ({split})", read_hub(args.dataset, split, columns)


def has_split(args: argparse.Namespace, split: str) -> bool:
    """Whether the data that the flags name have a split, or are to give a share for it; a hub that can't be
    asked has none."""
    if getattr(args, f"{split}_fraction", None):
        return True
    try:
        source_of(args, split, columns_of(args))
    except NoSource:
        return False
    return is_local(args) or split in hub_splits(args.dataset)


def is_path(dataset: str) -> bool:
    """Whether --dataset names a file or folder, there or not, rather than a data set of the hub."""
    path = Path(dataset)
    written = dataset.startswith((".", "/", "~")) or bare_suffix(path) in FORMATS or dataset.count("/") > 1
    return written or path.exists()


def is_local(args: argparse.Namespace) -> bool:
    """Whether the data lie in files alone."""
    if args.dataset != DEFAULTS[args.task]["dataset"]:
        return is_path(args.dataset)
    return any(getattr(args, f"{split}_file") for split in ("train", "test", "validation"))


def or_a_share(split: str) -> str:
    return f", or --{split}_fraction, which takes a share of train" if split in HOLDABLE else ""


def unlabelled(source: str) -> str | None:
    """How a source spells that a text has no class: the default data set of the hub does so by "None", which
    may be a class like any other elsewhere."""
    return "None" if source.startswith(f"{DEFAULTS['classification']['dataset']} (") else None


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
            + or_a_share(split)
        )
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(
            f"--dataset {folder} holds several {split} files ({names}): name one with --{split}_file"
        )
    return found[0]


def clean(source: str, rows: Iterator[Row], columns: Columns, task: str, unlabelled: str | None) -> Split:
    """The examples in `columns` of `rows`, trimmed; rows that can't be used are dropped and counted by
    reason."""
    split, classes_as_read = Split(source, [], []), {}
    for place, (number, row) in enumerate(rows):
        text, answer = (read_text(row, flag, columns, f"{source} row {number}") for flag in columns)
        if task == "classification":
            answer = classes_as_read.get(answer) or classes_as_read.setdefault(answer, as_class(answer))
        reason = reason_to_drop((text, answer), columns, unlabelled)
        if reason:
            split.dropped[reason] += 1
            continue
        if task == "classification" and len(answer.splitlines()) > 1:
            raise UserError(
                f"{source} row {number}: a class is one line, this one has several: {answer!r:.60}"
            )
        split.examples.append((text, answer))
        split.numbers.append(number)
        split.places.append(place)
    if not split.examples:
        dropped = ", ".join(f"{count} rows with {reason}" for reason, count in split.dropped.items())
        raise UserError(f"{source} has no usable row" + (f": {dropped}" if dropped else ": it is empty"))
    return split


def as_class(answer: str) -> str:
    """Its Unicode forms look the same; one that shows nothing is none."""
    return unicodedata.normalize("NFC", answer) if looks(answer) else ""


def reason_to_drop(pair: tuple[str, str], columns: Columns, unlabelled: str | None) -> str | None:
    for value, column in zip(pair, columns.values(), strict=True):
        if not value:
            return f"empty {column if isinstance(column, str) else ' and '.join(column)}"
    return f'class "{unlabelled}"' if pair[1] == unlabelled else None


def read_text(row: dict, flag: str, columns: Columns, where: str) -> str:
    """What stands in the column that `flag` names, or of several a line "Column: ..." for each that holds
    anything."""
    if isinstance(columns[flag], str):
        return cell(row, flag, columns[flag], columns, where)
    cells = {column: cell(row, flag, column, columns, where) for column in columns[flag]}
    return "\n".join(f"{column}: {text}" for column, text in cells.items() if text)


def cell(row: dict, flag: str, column: str, columns: Columns, where: str) -> str:
    """The text in a column that `flag` names, trimmed; "" for none. A class may be an integer."""
    if column not in row:
        raise no_column(column, row, columns, where)
    value = row[column]
    if flag == "--label_column" and type(value) is int:  # True is an int, too
        value = str(value)
    if not isinstance(value, str | None):
        kind = "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
        raise UserError(
            f'{where}: column "{column}" holds {kind}, not text; name another column or make it text'
        )
    if value and not value.isascii():  # half of a surrogate pair, which JSON can spell, is no character
        value = value.encode("utf-8", "replace").decode()
    return (value or "").strip()


def labels_of(split: Split) -> list[str]:
    """The classes of the train split, sorted; every other split has to keep to them."""
    labels = sorted({label for _, label in split.examples})
    if len(labels) == 1:
        raise UserError(f'{split.source} has one class only, "{labels[0]}": classification needs two or more')
    return labels


def drop_overlap(splits: dict[str, Split], drop: bool) -> None:
    """Count the train texts that stand in test too, but for white space; with `drop`, take them out of
    train."""
    train, places = splits["train"], {}
    for i, number in enumerate(splits["test"].hashes()):
        places.setdefault(number, []).append(i)

    def stands_in_test(text: str, number: int) -> bool:
        same = (splits["test"].examples[i][0] for i in places.get(number, ()))
        return any(text.split() == other.split() for other in same)

    apart = [
        i
        for i, ((text, _), number) in enumerate(zip(train.examples, train.hashes(), strict=True))
        if not stands_in_test(text, number)
    ]
    shared = len(train.examples) - len(apart)
    if drop and not apart:
        raise UserError(
            f"--drop_overlap leaves no train example: every text of {train.source} occurs in test"
        )
    if drop and shared:
        splits["train"] = train.keep(apart)
        splits["train"].dropped["also in test"] += shared
    splits["train"].overlap = shared


def shares_for(wanted: set[str], args: argparse.Namespace) -> dict[str, float]:
    """The shares of train to hold out where the splits `wanted` are asked for: what the last of them is taken
    from lacks those before it, and train lacks all."""
    shares = {name: share for name in HOLDABLE if (share := getattr(args, f"{name}_fraction"))}
    while shares and not wanted & {"train", [*shares][-1]}:
        shares.popitem()
    return shares


def refuse_another(args: argparse.Namespace, name: str) -> None:
    """Raise UserError where the flags name a split `name` beside the share of train that should become it."""
    try:
        source, rows = source_of(args, name, columns_of(args))
        next(rows, None)
    except NoSource:
        return
    flag = f"--{name}_fraction {getattr(args, f'{name}_fraction'):g}"
    raise UserError(f"{flag}: there is a {name} split already, {source}: leave the flag out")


def hold_out(train: Split, name: str, share: float, task: str) -> tuple[Split, Split]:
    """What is left of `train`, and the `share` of each of its classes (of all, for summaries) that becomes
    the split `name`: the texts with the smallest hashes, whatever the seed and the order of rows. Equal texts
    of a class stay together.

    A class of one row stays in train and is no part of a test split. Raises UserError for any other that
    would be left without an example here or there.
    """
    strata: dict[str, list[tuple[str, int]]] = {}
    for i, (text, label) in enumerate(train.examples):
        order = hashlib.sha256(f"{name} {' '.join(text.split())}".encode()).hexdigest()
        strata.setdefault(label if task == "classification" else "", []).append((order, i))
    alone = [label for label, rows in strata.items() if len(rows) == 1 and name == "test"]
    taken, lacking = [], {name: [], "train": []}
    for label in strata.keys() - {*alone}:
        rows = sorted(strata[label])
        count = round_half_up(share * len(rows))
        while 0 < count < len(rows) and rows[count][0] == rows[count - 1][0]:
            count += 1
        for side, left in ((name, count), ("train", len(rows) - count)):
            if not left:
                lacking[side].append(f'"{label}" ({len(rows):,})' if label else f"all {len(rows):,}")
        taken += [i for _, i in rows[:count]]
    for side, labels in lacking.items():
        if labels:
            raise UserError(
                f"--{name}_fraction {share:g} of {train.source} leaves no {side} example of these classes "
                f"(rows): {', '.join(sorted(labels))}: give a "
                f"{'larger' if side == name else 'smaller'} share, or them more rows"
            )
    if not taken:
        raise UserError(f"--{name}_fraction {share:g}: every class of {train.source} has one row only")
    left = sorted({*range(len(train.examples))} - {*taken})
    part = replace(
        train.keep(sorted(taken)), dropped=Counter(), merged={}, held_out={}, fraction=share, alone=len(alone)
    )
    held_out = train.held_out | {name: {"rows": len(taken), "sha256": part.sha256()}}
    return replace(train.keep(left), held_out=held_out), part


def check_held_out(split: Split, name: str, trained: dict) -> None:
    """Raise UserError unless the training of the record `trained` held out what is in `split` now."""
    before = trained["data"]["train"].get("held_out", {}).get(name, {})
    if before.get("sha256") != split.sha256():
        raise UserError(
            f"--{name}_fraction {split.fraction:g} of {split.source} are other rows than the training held "
            "out: put back the file that it read, or train again with --force"
        )


def find_repeated(split: Split) -> dict[str, Counter]:
    """The texts that occur more than once, but for white space, with how often each class stands beside them;
    those with the most rows of other than their usual class first, then the most frequent."""
    several = {number for number, count in Counter(split.hashes()).items() if count > 1}
    found: dict[str, Counter] = {}
    for (text, label), number in zip(split.examples, split.hashes(), strict=True):
        if number in several:
            found.setdefault(" ".join(text.split()), Counter())[label] += 1

    def badness(item: tuple[str, Counter]) -> tuple[int, int]:
        total = item[1].total()
        return max(item[1].values()) - total, -total

    return dict(sorted(((text, of) for text, of in found.items() if of.total() > 1), key=badness))


def sample_train(split: Split, args: argparse.Namespace) -> Split:
    """--max_train_samples, then --train_sample_fraction of each class (of all, for summaries), by --seed.

    Each class is shuffled once by the seed and cut at the fraction, so a smaller sample lies inside a larger
    one. Raises UserError if that leaves one class alone, or none of the smallest.
    """
    kept = choose(len(split.examples), args.max_train_samples, args.seed)
    strata: dict[str, list[int]] = {}
    for i in kept:
        strata.setdefault(split.examples[i][1] if args.task == "classification" else "", []).append(i)
    if len(strata) == 1 and args.task == "classification":
        raise UserError(
            f'--max_train_samples {len(kept)} takes examples of one class only, "{next(iter(strata))}": '
            "give a higher one"
        )
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
    """--max_eval_samples of a split; the same ones whatever --seed says, so that scores stay comparable.

    Raises UserError for a summary that ROUGE could score as nothing but 0.
    """
    kept = split.keep(choose(len(split.examples), args.max_eval_samples, seed=0))
    if args.task == "summarization":
        check_summaries(kept)
    return replace(kept, available=len(split.examples))


def check_summaries(split: Split) -> None:
    from study.words import words  # which loads NLTK

    for (_, summary), number in zip(split.examples, split.numbers, strict=True):
        if not words(summary):
            raise UserError(
                f"{split.source} row {number}: its summary {summary!r:.60} holds no word that ROUGE could "
                "count: leave the row out, or write it in words"
            )


def choose(count: int, limit: int | None, seed: int) -> list[int]:
    """`limit` of the indices below `count`, in order; a smaller choice lies inside a larger one of the same
    seed."""
    indices = list(range(count))
    if limit is not None and limit < count:
        random.Random(seed).shuffle(indices)
    return sorted(indices[:limit])


def say_split(name: str, split: Split, used: Split) -> str:
    """One line on a split: rows used, rows of its source, rows held out, dropped and why, and train texts
    that occur in test, or more than once."""
    if split.fraction:
        alone = f"; classes of one row, which stay in train: {split.alone:,}" if split.alone else ""
        share = f"--{name}_fraction {split.fraction:g} of {split.source}, the same in every run{alone}"
        return f"{name:<11}{len(used.examples):,} of {len(split.examples):,} rows: {share}"
    held_out = "".join(f", {part['rows']:,} held out for {other}" for other, part in split.held_out.items())
    dropped = "".join(f", {count:,} dropped: {reason}" for reason, count in split.dropped.items())
    overlap = f", {split.overlap:,} texts occur in test too" if split.overlap else ""
    merged = sum(count for spellings in split.merged.values() for count in spellings.values())
    merged = f", {merged:,} with a class spelled otherwise" if merged else ""
    repeated = f", {say_repeated(split, 0)}" if split.repeated else ""
    held = sum(part["rows"] for part in split.held_out.values())
    count = f"{len(used.examples):,} of {len(split.examples) + split.dropped.total() + held:,} rows"
    return f"{name:<11}{count} of {split.source}{held_out}{dropped}{merged}{overlap}{repeated}"


def say_repeated(split: Split, most: int = 10) -> str:
    """How many train texts occur more than once, and of each of the worst how often with which class."""
    counts = split.count_repeated()
    told = f"{counts['repeated']:,} texts occur more than once"
    lines = [f"{told}, {counts['contradicting']:,} of them with different classes"]
    for text, labels in list(split.repeated.items())[:most]:
        named = ", ".join(f"{count:,} {label}" for label, count in labels.most_common())
        lines.append(f"  {labels.total():,} times: {named}: {text:.60}")
    return "\n".join(lines)
