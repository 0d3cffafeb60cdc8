"""Files: a local one or a hub data set -> rows, of which only the needed columns are held to anything; and a
text written whole or not at all.

`columns` here names the needed ones, {flag: column}: {"--text_column": "text", "--label_column": "label"}.
The texts may stand in several, which then are a list.
"""

import contextlib
import csv
import functools
import gzip
import io
import json
import os
import re
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from study.errors import UserError

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
DELIMITERS = {".csv": ",;\t", ".tsv": "\t;,"}  # in the order in which they are tried
SPACE = re.compile(r"[ \t\n\r]*")  # between JSON values
NAMES = {",": "commas", ";": "semicolons", "\t": "tabs"}
Columns = dict[str, str | list[str]]
Row = tuple[int, dict]  # number in its file (line or row, from 1), columns


class NoSource(UserError):
    """The flags name no source for a split."""


class Repeating(dict):
    """A JSON object in which the keys `twice` occur more than once; as in any JSON reader the last counts."""

    twice: Sequence[str] = ()


def bare_suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file that begins with `head` is a pointer that Git LFS left in its place
    (github.com/git-lfs/git-lfs, docs/spec.md)."""
    return head.startswith(b"version https://git-lfs.github.com/spec/")


def read_file(path: Path, flag: str, columns: Columns, delimiter: str | None = None) -> Iterator[Row]:
    """The rows of one local file, of CSV with `delimiter` or the one that its header has; JSON lines and CSV
    are never held as a whole text. Raises UserError, naming the line where there is one."""
    suffix = bare_suffix(path)
    if suffix == ".parquet":
        return read_parquet(content_of(path, flag), f"{flag} {path}", columns)
    refuse_no_file(path, flag)
    if suffix not in DELIMITERS:
        return read_json(path, flag, columns)
    return read_csv(path, flag, columns, delimiter or DELIMITERS[suffix])


def content_of(path: Path, flag: str) -> bytes:
    """What a file of one of our formats holds, unpacked."""
    refuse_no_file(path, flag)
    with opened(path, flag) as file:
        return file.read()


def refuse_no_file(path: Path, flag: str) -> None:
    where = f"{flag} {path}"
    if path.is_dir():
        mend = "" if flag == "--predict_file" else ", or the folder by --dataset"
        raise UserError(f"{where} is a folder: name a file{mend}")
    if not path.is_file():
        raise UserError(f"{where}: there is no such file")
    refuse_other_formats(path, flag)


@contextlib.contextmanager
def opened(path: Path, flag: str) -> Iterator[BinaryIO]:
    """A file to read, unpacked. Raises UserError where it can't be read, then or later."""
    where = f"{flag} {path}"
    try:
        with open(path, "rb") as packed:
            if is_lfs_pointer(packed.read(64)):
                raise UserError(
                    f"{where} is a Git LFS pointer, not the file itself: fetch it with git lfs pull"
                )
            packed.seek(0)
            yield io.BufferedReader(gzip.GzipFile(fileobj=packed), 2**17) if path.suffix == ".gz" else packed
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{where} is damaged or half-written ({error}): fetch or write it again") from None
    except OSError as error:
        raise UserError(f"{where} can't be read: {error.strerror}") from None


def refuse_other_formats(path: Path, flag: str) -> None:
    if bare_suffix(path) not in FORMATS:
        raise UserError(f"{flag} {path}: the name must end in {', '.join(FORMATS)}, or one of these with .gz")


def decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(where, content.count(b"\n", 0, error.start) + 1) from None


def named(columns: Columns) -> list[str]:
    """The needed columns, each once."""
    lists = (column if isinstance(column, list) else [column] for column in columns.values())
    return list(dict.fromkeys(chain.from_iterable(lists)))


def check_columns(names: Sequence[str], columns: Columns, where: str) -> None:
    """Raise UserError unless each needed column is among `names`, and once."""
    counts = Counter(names)
    for column in named(columns):
        if column not in counts:
            raise no_column(column, names, columns, where)
        if counts[column] > 1:
            raise UserError(f'{where} has {counts[column]} columns named "{column}": leave one of them')


def no_column(column: str, names: Iterable, columns: Columns, where: str) -> UserError:
    have = ", ".join(map(str, names)) or "none"
    return UserError(f'{where} has no column "{column}" but {have:.300}: name it by {", ".join(columns)}')


def lines_of(path: Path, flag: str) -> Iterator[tuple[int, str]]:
    """The lines of a text, by number from 1."""
    with opened(path, flag) as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.removesuffix(b"\n").decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise not_utf8(f"{flag} {path}", number) from None


def not_utf8(where: str, line: int) -> UserError:
    return UserError(f"{where} line {line} is not UTF-8 text: save it as UTF-8")


def read_json(path: Path, flag: str, columns: Columns) -> Iterator[Row]:
    """The rows of JSON lines, of an array, or of objects one behind the other, over whatever lines."""
    where, (kind, values) = f"{flag} {path}", json_values(path, flag)
    if len(values) == 1 and isinstance(values[0][1], list):
        kind, values = "row", list(enumerate(values[0][1], 1))
    count, values = len(values), values[::-1]
    while values:  # each is given up as it goes, so that its texts are not held twice
        number, row = values.pop()
        place = f"{where} {kind} {number}"
        if not isinstance(row, dict):
            raise UserError(f'{place} is not a JSON object such as {{"text": ..., "label": ...}}')
        twice = [column for column in named(columns) if column in getattr(row, "twice", ())]
        if twice:
            raise UserError(f'{place} has the key "{twice[0]}" twice: leave one of them')
        held = [f'{count:,} under "{key}"' for key, count in held_rows(row)] if count == 1 else []
        if held and not all(column in row for column in named(columns)):
            raise UserError(
                f"{where} is one JSON object that holds rows, {', '.join(held)}: save the rows alone, as an "
                "array or one a line"
            )
        yield number, row


def json_values(path: Path, flag: str) -> tuple[str, list[tuple[int, object]]]:
    """Every JSON value of a text, numbered by its "line" where each line is one, or else as a "row"."""
    where = f"{flag} {path}"
    decoder = json.JSONDecoder(object_pairs_hook=json_object, parse_int=json_integer)
    values: list[tuple[int, object]] = []
    try:
        for number, line in lines_of(path, flag):
            if line.strip():
                values.append((number, decoder.decode(line)))
        return "line", values
    except (ValueError, RecursionError) as error:
        reason = f"{where} line {number} {not_json(error)}"
    text = decoded(content_of(path, flag), where)
    try:
        return "row", list(enumerate(json_stream(text, decoder), 1))
    except (ValueError, RecursionError) as error:
        if not values and isinstance(error, json.JSONDecodeError):  # its first value is longer than a line
            reason = f"{where} line {error.lineno} {not_json(error)}"
        raise UserError(reason) from None


def json_stream(text: str, decoder: json.JSONDecoder) -> Iterator:
    """The values that stand in `text` one behind the other, with white space around them or not."""
    place = SPACE.match(text).end()
    while place < len(text):
        value, place = decoder.raw_decode(text, place)
        yield value
        place = SPACE.match(text, place).end()


def not_json(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "is not JSON that can be read: it is nested too deeply"
    return f"is not JSON: {error}"


def json_object(pairs: list[tuple[str, object]]) -> dict:
    row = {sys.intern(name): value for name, value in pairs}  # which a million rows share
    if len(row) < len(pairs):
        row = Repeating(row)
        row.twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    return row


def json_integer(digits: str) -> int | float:
    """An integer; one that is longer than Python reads (4,300 digits) as a float."""
    return int(digits) if len(digits) <= 4000 else float(digits)


def held_rows(value: dict) -> Iterator[tuple[str, int]]:
    """Where a JSON object holds lists of objects, by keys with dots between, and how many each."""
    for key, inner in value.items():
        if isinstance(inner, list) and inner and isinstance(inner[0], dict):
            yield key, len(inner)
        elif isinstance(inner, dict):
            yield from ((f"{key}.{name}", count) for name, count in held_rows(inner))


def delimiter_of(text: str, candidates: str, columns: Columns) -> str:
    """The first of `candidates` by which the header holds the needed columns, or else the most columns."""

    def fits(delimiter: str) -> tuple[bool, int]:
        header = next(csv.reader(io.StringIO(text[:65536], newline=""), delimiter=delimiter), [])
        return {*named(columns)} <= {*header}, len(header)

    return max(candidates, key=fits)


def read_csv(path: Path, flag: str, columns: Columns, delimiters: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    where, as_text = f"{flag} {path}", {"encoding": "utf-8-sig", "newline": ""}
    try:
        with opened(path, flag) as file:
            mark = delimiter_of(io.TextIOWrapper(file, **as_text).read(65536), delimiters, columns)
        with opened(path, flag) as file:
            yield from csv_rows(io.TextIOWrapper(file, **as_text), where, columns, mark)
    except UnicodeDecodeError:
        decoded(content_of(path, flag), where)  # says which line


def csv_rows(text: Iterable[str], where: str, columns: Columns, mark: str) -> Iterator[Row]:
    try:
        rows = csv.DictReader(text, delimiter=mark, strict=True)
        if rows.fieldnames:
            check_columns(rows.fieldnames, columns, where)
        for number, row in enumerate(rows, 1):
            if None in row:
                marks = NAMES.get(mark, mark)
                raise UserError(
                    f"{where} row {number} has more cells than the header: quote texts with {marks}"
                )
            yield number, row
    except csv.Error as error:
        raise UserError(f"{where} is not CSV: {error}") from None


def read_parquet(content: bytes, where: str, columns: Columns) -> Iterator[Row]:
    """Nothing but the needed columns is read, so that others may hold what Python can't."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        check_columns(file.schema_arrow.names, columns, where)
        names = named(columns)
        table = file.read(columns=names).select(names)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{where} is not a Parquet file: {str(error).splitlines()[0]}") from None
    for field in table.schema:
        check_type(field, where)
    try:
        rows = table.to_pylist()
    except ValueError as error:  # of UnicodeDecodeError, that is
        raise UserError(f"{where} holds text that is not UTF-8 ({error}): write it again") from None
    yield from enumerate(rows, 1)


def check_type(field, where: str) -> None:
    """Raise UserError for a column of Arrow's whose values are no text, numbers or nothing in Python."""
    from pyarrow import types

    kind = field.type.value_type if types.is_dictionary(field.type) else field.type
    kind = getattr(kind, "storage_type", kind)
    plain = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    if not any(of(kind) for of in (*plain, types.is_integer, types.is_floating, types.is_boolean)):
        raise UserError(
            f'{where}: column "{field.name}" holds {kind}, not text; name another column or make it text'
        )


@functools.cache
def hub_answers(seconds: float = 3) -> bool:
    """Whether the hub can be asked. Where nothing takes the call in so many seconds, or does not answer in as
    many as the hub's library waits for an answer, HF_HUB_OFFLINE is set for this process: the library would
    try again for minutes."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    import httpx

    taken, answered = threading.Event(), threading.Event()
    patience = float(os.environ.get("HF_HUB_ETAG_TIMEOUT", "10"))

    def hear(event: str, _: dict) -> None:
        if event.endswith("connect_tcp.complete"):
            taken.set()

    def ask() -> None:
        with contextlib.suppress(httpx.HTTPError, httpx.InvalidURL, OSError):
            with httpx.Client(timeout=patience) as client:
                address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
                client.head(address, extensions={"trace": hear})
            answered.set()
        taken.set()  # or refused

    thread = threading.Thread(target=ask, daemon=True)  # no timeout holds for looking up a name
    thread.start()
    if taken.wait(seconds):
        thread.join(patience)
    if not answered.is_set():
        os.environ["HF_HUB_OFFLINE"] = "1"
        if "huggingface_hub" in sys.modules:
            sys.modules["huggingface_hub"].constants.HF_HUB_OFFLINE = True
    return answered.is_set()


def hub_splits(name: str) -> list[str]:
    """The splits of a hub data set; none where the hub can't be asked."""
    if not hub_answers():
        return []
    import datasets
    import httpx

    try:
        return datasets.get_dataset_split_names(name)
    except (OSError, ValueError, httpx.HTTPError, datasets.exceptions.DatasetsError):
        return []  # loading says why


def read_hub(name: str, split: str, columns: Columns | None = None) -> Iterator[Row]:
    """The rows of a hub data set, from its cache where the hub can't be reached; class numbers become class
    names."""
    hub_answers()
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
    if columns:
        check_columns(rows.column_names, columns, f"--dataset {name}")
        rows = rows.select_columns(named(columns))
    for column, feature in rows.features.items():
        if isinstance(feature, datasets.ClassLabel):
            names = [named_label(feature.names, number) for number in rows[column]]
            rows = rows.remove_columns(column).add_column(column, names)
    yield from enumerate(rows, 1)


def named_label(names: Sequence[str], number: int | None) -> str | None:
    """The class that a hub data set has as a number; -1 stands for none."""
    return None if number is None or number < 0 else names[number]


# Writing


def write_text(path: Path, text: str) -> None:
    """Write `text` so that `path` holds all of it or what it held before, whatever happens meanwhile."""
    try:
        write_bytes(path, text.encode("utf-8"))
    except UnicodeEncodeError as error:
        near = error.object[max(0, error.start - 40) : error.end]
        raise UserError(f"{path} can't be written: {near!r} is not Unicode: rename it") from None


def write_bytes(path: Path, content: bytes) -> None:
    """Likewise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path} can't be written: {error.strerror}; make room or name another --output_dir"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
