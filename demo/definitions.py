"""Turns a dictionary in dictd's form, as Debian packages have them, into texts for pretrain.py.

    apt-get download dict-wn dict-foldoc && for p in dict-*.deb; do dpkg -x $p .; done
    python demo/definitions.py usr/share/dictd/wn.dict.dz usr/share/dictd/foldoc.dict.dz > definitions.jsonl

A headword stands at the margin and its definition is indented below it; headwords that share a definition
(WordNet repeats it at each) become one text: "abetment, abettal: the verbal act of urging on".
"""

import gzip
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

# WordNet has "n 1: ", "2: " and "[syn: {abetment}]"; FOLDOC "<programming>", "{module}" and "(1994-11-08)".
SENSE = re.compile(r"^(?:(?:n|v|adj|adv)(?: \d+)?|\d+): ", re.MULTILINE)
REFERENCES = re.compile(r"\s*\[(?:syn|ant|also|See):?[^\]]*\]")
MARKS = re.compile(r"<[\w ,/-]+>|[{}]|\(\d{4}-\d\d-\d\d\)")


def entries(text: str) -> Iterator[tuple[str, str]]:
    """Each headword with its definition, line by line as it stands, but without its indentation."""
    for block in re.split(r"\n(?=\S)", text):
        head, _, body = block.partition("\n")
        if body.strip() and not head.startswith("00-database"):
            yield head.strip(), "\n".join(line.strip() for line in body.splitlines())


def senses(definition: str) -> list[str]:
    """Its meanings, each as one line."""
    parts = SENSE.split(MARKS.sub("", REFERENCES.sub("", definition)))
    return [line for part in parts if (line := " ".join(part.split()))]


def texts(dictionary: str) -> Iterator[str]:
    """A text for each meaning, with all the words that have it."""
    words: dict[str, list[str]] = {}
    for head, definition in entries(dictionary):
        for sense in senses(definition):
            words.setdefault(sense, []).append(head)
    for sense, heads in words.items():
        yield f"{', '.join(dict.fromkeys(heads))}: {sense}"


def main() -> None:
    if not sys.argv[1:]:
        sys.exit(__doc__)
    for name in sys.argv[1:]:
        try:
            content = gzip.decompress(Path(name).read_bytes()).decode("utf-8")
        except (OSError, EOFError, ValueError) as error:
            sys.exit(f"error: {name} can't be read as a .dict.dz: {error}")
        for text in texts(content):
            print(json.dumps({"text": text}, ensure_ascii=False))


if __name__ == "__main__":
    main()
