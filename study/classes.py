"""Names of classes: which are one and the same, which the train split lacks, and what a person should see of
them before training.

A `split` here is a data.Split of a classification.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations

from study.errors import UserError

SHOWN = 20  # classes, beyond which their number must do
LONG = {1: 6, 2: 10}  # letters of a name, from which so many edits are likely a slip
# What changes how a label looks though it can't be seen alone: joiners between letters that they shape
# (Arabic, Indic) or emoji, and the tags of a flag.
SHAPING = re.compile(
    "(?<=[^\u0000-\u05ff])[\u200c\u200d](?=[^\u0000-\u05ff\u2000-\u206f])|\U0001f3f4[\U000e0020-\U000e007f]+"
)
# Unicode's Default_Ignorable_Code_Point as far as they are letters or marks, and the blank of braille.
IGNORABLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def one_spelling(split, merge: bool | None):
    """The split with one spelling for each class, the most frequent, of those that differ only in case, white
    space or what can't be seen. Raises UserError if there are several and not `merge`."""
    spelled_so: dict[str, list[int]] = {}
    for (_, label), number in zip(split.examples, split.numbers, strict=True):
        spelled_so.setdefault(label, []).append(number)
    rows: dict[str, dict[str, list[int]]] = {}  # by what a class looks like but for case, and by its spelling
    for label, numbers in spelled_so.items():
        rows.setdefault(same(label), {})[label] = numbers
    several = [spellings for spellings in rows.values() if len(spellings) > 1]
    if several and not merge:
        groups = (" and ".join(where(*each) for each in spellings.items()) for spellings in several)
        raise UserError(
            f"{split.source} has classes that differ only in case, white space or characters that can't be "
            f"seen: {'; '.join(groups)}: spell them alike, or take each group as one by --merge_labels"
        )
    return renamed(split, [max(each, key=lambda label: len(each[label])) for each in several])


def where(label: str, numbers: Sequence[int]) -> str:
    more = ", ..." if len(numbers) > 3 else ""
    return f'"{spelled(label)}" (row {", ".join(map(str, numbers[:3]))}{more})'


def renamed(split, labels: Iterable[str]):
    """The split with each of `labels` in the place of what is the same but for its spelling."""
    names = {same(label): label for label in labels}
    if not names:
        return replace(split, merged={})
    spellings = {label: names.get(same(label), label) for label in {label for _, label in split.examples}}
    pairs = [(text, spellings[label]) for text, label in split.examples]
    merged: dict[str, Counter] = {}
    for (_, before), (_, label) in zip(split.examples, pairs, strict=True):
        if before != label:
            merged.setdefault(label, Counter())[before] += 1
    return replace(split, examples=pairs, merged={name: dict(counts) for name, counts in merged.items()})


def fit(split, labels: Sequence[str], merge: bool | None = None, unseen: str | None = None):
    """A split that keeps to the classes `labels` of train: other spellings of them taken as them by `merge`;
    rows of other classes left out or left in by `unseen` "drop" or "keep", or else refused by UserError, all
    classes at once."""
    split = renamed(split, labels) if merge else split
    known, rows = set(labels), {}
    for (_, label), number in zip(split.examples, split.numbers, strict=True):
        if label not in known:
            rows.setdefault(label, []).append(number)
    if not rows or unseen == "keep":
        return split
    if unseen == "drop":
        kept = split.keep([i for i, (_, label) in enumerate(split.examples) if label in known])
        lost = len(split.examples) - len(kept.examples)
        if not kept.examples:
            raise UserError(
                f"--unseen_labels drop leaves nothing of {split.source}: train has none of its classes"
            )
        return replace(kept, dropped=split.dropped + Counter({"class that train lacks": lost}))
    mend = "--unseen_labels drop leaves such rows out, keep counts them as wrong"
    if len(rows) == 1:
        [(label, found)] = rows.items()
        which = f'row {found[0]}: class "{spelled(label)}" does not occur in the train split'
        raise UserError(f"{split.source} {which} ({rows_of(found)}){twin_of(label, labels)}: {mend}")
    named = (
        f'"{spelled(label)}" ({rows_of(found)}, from row {found[0]}{twin_of(label, labels)})'
        for label, found in rows.items()
    )
    raise UserError(
        f"{split.source}: {len(rows):,} classes do not occur in the train split: {', '.join(named)}: {mend}"
    )


def rows_of(numbers: Sequence[int]) -> str:
    return f"{len(numbers):,} row{'s' * (len(numbers) > 1)}"


def twin_of(label: str, labels: Sequence[str]) -> str:
    """What is said of a class that is one of `labels` but for its spelling."""
    twin = next((name for name in labels if same(name) == same(label)), None)
    if twin is None:
        return ""
    if looks(twin) == looks(label):
        return f', but "{spelled(twin)}" does, which looks the same'
    return f', but "{spelled(twin)}" does, and --merge_labels takes them as one'


def say(split, whole) -> str:
    """The classes with their rows in `split`, the most frequent first, and what may be wrong with those of
    the `whole` that it is a sample of."""
    counts, in_all = (Counter(label for _, label in of.examples).most_common() for of in (split, whole))
    lines = [f"{count:>7,}  {spelled(label)[:80]}" for label, count in counts[:SHOWN]]
    if len(counts) > SHOWN:
        fewest, most = counts[-1][1], counts[SHOWN][1]
        lines.append(f"and {len(counts) - SHOWN:,} more, of {fewest:,} to {most:,} rows")
    lines += listed("one row only", [f'"{spelled(label)}"' for label, count in in_all if count == 1])
    slips = [f'"{slip}" ({few:,}) of "{name}" ({many:,})' for (name, many), (slip, few) in misspelled(in_all)]
    lines += listed("likely a misspelling", slips)
    return "\n".join([f"classes    {len(counts):,}", *(f"{'':11}{line}" for line in lines)])


def listed(what: str, names: Sequence[str], most: int = 10) -> list[str]:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return [f"{what}: {', '.join(names[:most])}{more}"] if names else []


def misspelled(counts: Sequence[tuple[str, int]]) -> list[tuple]:
    """The pairs of classes (name, rows) of which the second is likely a slip of the first: a long name, one
    or two edits away, at most half as frequent. Other numbers in a name are no slips."""
    found = []
    for (name, many), (slip, few) in combinations(counts, 2):
        edits = next((edits for edits, least in LONG.items() if edits_at_most(edits, name, slip)), None)
        long = edits and min(len(name), len(slip)) >= LONG[edits]
        if long and 2 * few <= many and re.findall(r"\d+", name) == re.findall(r"\d+", slip):
            found.append(((name, many), (slip, few)))
    return found


def edits_at_most(most: int, one: str, other: str) -> bool:
    """Whether `most` letters put in, left out or changed make `one` the `other` (Levenshtein, 1966)."""
    if abs(len(one) - len(other)) > most:
        return False
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        before, row = row, [i, *[most + 1] * len(other)]
        for j in range(max(1, i - most), min(len(other), i + most) + 1):
            row[j] = min(before[j - 1] + (letter != other[j - 1]), before[j] + 1, row[j - 1] + 1)
        if min(row[max(0, i - most) : i + most + 1]) > most:
            return False
    return row[-1] <= most


def same(label: str) -> str:
    return looks(label).casefold()


def looks(label: str) -> str:
    """A class as it looks: without the characters that can't be seen, all white space as one space."""
    label = SHAPING.sub(lambda found: ascii(found.group()), label)
    shown = "".join(" " if mark.isspace() else mark for mark in label if mark.isspace() or not unseen(mark))
    return unicodedata.normalize("NFC", " ".join(shown.split()))


def unseen(mark: str) -> bool:
    """Control and format characters (zero-width, soft hyphen, byte order mark), variation selectors and the
    other characters that Unicode lets a font leave out."""
    return unicodedata.category(mark) in ("Cc", "Cf") or bool(IGNORABLE.match(mark))


def spelled(label: str) -> str:
    """A class with the code points of what can't be seen in it, e.g. "a<U+200B>"."""
    return "".join(
        f"<U+{ord(mark):04X}>" if unseen(mark) or (mark.isspace() and mark != " ") else mark for mark in label
    )
