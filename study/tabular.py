"""A file with all of its columns: read so that a row that can't be used stops nothing, and written again with
more columns, in its own format as it stood there or in another.

`study/files.py` reads what is learned and scored, where a fault in a row is a reason to stop.
"""

import codecs
import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

from study import files
from study.errors import UserError
from study.files import DELIMITERS, SPACE, Columns, bare_suffix

UNREADABLE = "unreadable"  # the column of a line of JSON that is no object


@dataclass
class Rows:
    """The rows of a file by `values` of their columns, and `places`, where they stand in it ("line 7"). A row
    in `faults` can't be read; there stands why.

    `origin` is what the same format is written from: the text of each JSON object, the cells of each row of
    CSV, or Arrow's table; `style` is how that file was written.
    """

    suffix: str
    names: list[str] = field(default_factory=list)
    values: list[dict] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    faults: dict[int, str] = field(default_factory=dict)
    origin: object = field(default_factory=list)
    style: tuple = ()


def read(path: Path, content: bytes, flag: str, columns: Columns, delimiters: str = "") -> Rows:
    """The rows of a file with this `content`, of CSV with the first of `delimiters`, or else of the usual
    ones, by which the header has `columns`. Raises UserError where the file as a whole can't be read or no
    row has one of `columns`."""
    suffix, where = bare_suffix(path), f"{flag} {path}"
    if suffix == ".parquet":
        rows = read_parquet(content, where, columns)
    else:
        text = files.decoded(content, where)
        if suffix in DELIMITERS:
            bom = "\ufeff" if content.startswith(codecs.BOM_UTF8) else ""
            rows = read_csv(text, where, columns, delimiters or DELIMITERS[suffix], bom)
        else:
            rows = read_json(text)
    rows.suffix = suffix
    if not rows.values:
        raise UserError(f"{where} is empty: it has no row")
    if len(rows.faults) == len(rows.values):
        raise UserError(f"{where} has no row that can be read: {rows.places[0]} {rows.faults[0]}")
    files.check_columns(rows.names, columns, where)
    return rows


def read_json(text: str) -> Rows:
    """JSON lines, an array, or objects one behind the other. A line, or a value of an array, that is no
    object is a fault."""
    decoder = json.JSONDecoder(object_pairs_hook=files.json_object, parse_int=files.json_integer)
    style, found = "lines", list(json_lines(text, decoder))
    several_lines = any(reason for *_, reason in found)
    if several_lines or (len(found) == 1 and isinstance(found[0][2], list)):
        for other, spans in (("array", array_spans), ("objects", object_spans)):
            try:
                found, style = list(spans(text, decoder)), other
                break
            except (ValueError, RecursionError):
                continue  # so each line stands for itself
    rows = Rows("", style=(style,))
    for i, (line, raw, value, reason) in enumerate(found):
        whole = isinstance(value, dict)
        if not whole:
            rows.faults[i] = reason or f"is no JSON object: {raw:.60}"
        rows.values.append(value if whole else {UNREADABLE: raw})
        rows.origin.append(raw if whole else json.dumps({UNREADABLE: raw}, ensure_ascii=False))
        rows.places.append(f"line {line}")
    rows.names = list(dict.fromkeys(chain.from_iterable(rows.values)))
    return rows


def json_lines(text: str, decoder: json.JSONDecoder) -> Iterator[tuple]:
    """Of each line that is not blank its number, its text, its value, and why it has none."""
    for number, line in enumerate(text.split("\n"), 1):
        raw = line.strip()
        if not raw:
            continue
        try:
            yield number, raw, decoder.decode(raw), None
        except (ValueError, RecursionError) as error:
            yield number, raw, None, files.not_json(error)


def array_spans(text: str, decoder: json.JSONDecoder) -> Iterator[tuple]:
    """The same of each value of the array that `text` is. Raises ValueError where it is none."""
    start = SPACE.match(text).end()
    if text[start : start + 1] != "[" or not isinstance(decoder.decode(text), list):
        raise ValueError
    yield from object_spans(text, decoder, start + 1)


def object_spans(text: str, decoder: json.JSONDecoder, place: int = 0) -> Iterator[tuple]:
    """The same of values that stand one behind the other from `place` on, with white space or, in an array,
    commas between. Raises ValueError for anything else."""
    line, counted, array = 1, 0, place > 0
    place = SPACE.match(text, place).end()
    while place < len(text) and not (array and text[place] == "]"):
        value, end = decoder.raw_decode(text, place)
        line, counted = line + text.count("\n", counted, place), place
        yield line, text[place:end], value, None
        place = SPACE.match(text, end).end()
        if array and text[place] == ",":
            place = SPACE.match(text, place + 1).end()


def read_csv(text: str, where: str, columns: Columns, delimiters: str, bom: str) -> Rows:
    """CSV or TSV. Cells that a row lacks are empty; a row with more cells than the header is a fault, and
    those it has too many stand in its last column."""
    csv.field_size_limit(2**31 - 1)
    mark, start = files.delimiter_of(text, delimiters, columns), 1
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    ends = "\r\n" if text[: text.find("\n")].endswith("\r") else "\n"
    rows = Rows("", style=(mark, ends, bom))
    try:
        rows.names = next(filter(None, reader), [])
        width, start = len(rows.names), reader.line_num + 1
        for cells in reader:
            if len(cells) > width:
                rows.faults[len(rows.values)] = f"has {len(cells)} cells, the header {width}: quote its texts"
            if cells:
                cells = [*cells, *[""] * (width - len(cells))]  # noqa: PLW2901
                cells[width - 1 :] = [mark.join(cells[width - 1 :])]
                rows.values.append(dict(zip(rows.names, cells, strict=True)))
                rows.origin.append(cells)
                rows.places.append(f"line {start}")
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{where} line {start} is not CSV: {error}") from None
    return rows


def read_parquet(content: bytes, where: str, columns: Columns) -> Rows:
    """Only `columns` are read into `values`, since others may hold what Python can't."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content)).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{where} is not a Parquet file: {str(error).splitlines()[0]}") from None
    files.check_columns(table.column_names, columns, where)
    try:
        values = table.select(files.named(columns)).to_pylist()
    except ValueError as error:  # of UnicodeDecodeError, that is
        raise UserError(f"{where} holds text that is not UTF-8 ({error}): write it again") from None
    places = [f"row {number}" for number in range(1, len(values) + 1)]
    return Rows("", table.column_names, values, places, origin=table)


# Writing


def write(path: Path, rows: Rows, more: dict[str, list]) -> None:
    """Write `rows`, each with its values of the columns `more` behind its own, in the format that the file's
    name says. Raises UserError where that can't hold them."""
    suffix = bare_suffix(path)
    if suffix == ".parquet":
        content = to_parquet(path, rows, more)
    else:
        to_text = to_csv if suffix in DELIMITERS else to_json
        try:
            content = to_text(path, rows, more, suffix).encode("utf-8")
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
            raise UserError(
                f"{path} can't hold all texts, some of which are not Unicode: name a .jsonl"
            ) from None
    if path.suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    files.write_bytes(path, content)


def to_json(path: Path, rows: Rows, more: dict[str, list], suffix: str) -> str:
    """Objects as they stood in their file, digit for digit, with the members `more` at their ends."""
    style = rows.style[0] if suffix == rows.suffix else {".json": "array", ".jsonl": "lines"}[suffix]
    if rows.suffix in (".json", ".jsonl"):
        objects = rows.origin
    else:
        objects = (dump(path, row) for row in all_values(path, rows))
    lines = []
    for text, values in zip(objects, zip(*more.values(), strict=True), strict=True):
        body = text.removesuffix("}").rstrip()
        body += "" if body == "{" else ", "
        body += json.dumps(dict(zip(more, values, strict=True)), ensure_ascii=False)[1:]
        # Between the tokens of JSON a line break is as good as a blank, and within them there is none.
        lines.append(body.replace("\r", " ").replace("\n", " ") if style == "lines" else body)
    return "[\n" + ",\n".join(lines) + "\n]\n" if style == "array" else "\n".join(lines) + "\n"


def to_csv(path: Path, rows: Rows, more: dict[str, list], suffix: str) -> str:
    """Text stays the same strings; null is an empty cell, and what else is no text stands as JSON."""
    mark, ends, bom = rows.style if suffix == rows.suffix else (DELIMITERS[suffix][0], "\n", "")
    if rows.suffix in DELIMITERS:
        cells = rows.origin
    else:
        cells = ([cell(path, row.get(name)) for name in rows.names] for row in all_values(path, rows))
    lines: list[str] = []
    # Only with "\r\n" at the ends of lines it quotes a cell that holds either alone.
    writer = csv.writer(SimpleNamespace(write=lines.append), delimiter=mark, lineterminator="\r\n")
    writer.writerow([*rows.names, *more])
    for row, values in zip(cells, zip(*more.values(), strict=True), strict=True):
        writer.writerow([*row, *(cell(path, value) for value in values)])
    return bom + "".join(line[:-2] + ends for line in lines)


def cell(path: Path, value: object) -> str:
    return value if isinstance(value, str) else "" if value is None else dump(path, value)


def to_parquet(path: Path, rows: Rows, more: dict[str, list]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    try:
        if rows.suffix == ".parquet":
            table = rows.origin
        else:
            values = all_values(path, rows)
            table = pyarrow.table({name: [row.get(name) for row in values] for name in rows.names})
        for name, column in more.items():
            kind = pyarrow.float64() if name == "confidence" else pyarrow.string()
            table = table.append_column(name, pyarrow.array(column, kind))
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(table, buffer)
    except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path} can't be written as Parquet ({reason}): name a .jsonl") from None
    return buffer.getvalue()


def all_values(path: Path, rows: Rows) -> Sequence[dict]:
    """The values of every column, to write them in another format."""
    twice = {name for name in rows.names if rows.names.count(name) > 1}
    if twice:
        raise UserError(f'{path} can\'t hold two columns named "{min(twice)}": name a {rows.suffix}')
    if rows.suffix != ".parquet":
        return rows.values
    try:
        return rows.origin.to_pylist()
    except ValueError as error:
        raise UserError(f"{path} can't hold what Python can't read ({error}): name a .parquet") from None


def dump(path: Path, value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=spelled(path))


def spelled(path: Path) -> Callable:
    """How a value that JSON does not have (a date, a decimal number) stands in it."""

    def spell(value: object) -> str:
        if isinstance(value, bytes):
            raise UserError(f"{path} can't hold bytes: name a .parquet")
        return str(value)

    return spell
