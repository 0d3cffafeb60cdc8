"""Files in, the same checked, sampled and fingerprinted examples out."""

import argparse
import csv
import gzip
import io
import itertools
import json
import time
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from conftest import run_script, write_rows

from study import cli, data
from study.errors import UserError
from study.files import is_lfs_pointer

ROWS = [
    {"text": 'It flew, "twice".', "label": "sci.space"},
    {"text": "Two\nlines — ünïcode 🚀", "label": "rec.autos"},
    {"text": "### Class: sci.space", "label": "sci.space"},
    {"text": "  trimmed ", "label": " rec.autos "},
]
EXAMPLES = [(row["text"].strip(), row["label"].strip()) for row in ROWS]


def as_csv(rows: list[dict]) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def as_parquet(rows: list[dict]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def as_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


WRITERS = {
    ".jsonl": as_lines,
    ".json": lambda rows: json.dumps(rows, indent=2).encode(),
    ".csv": as_csv,
    ".parquet": as_parquet,
}


def flags(*words: object, task: str = "classification") -> argparse.Namespace:
    return cli.parse_args(task, "", list(map(str, words)))


def classes(**counts: int) -> data.Split:
    """A split of numbered texts, as many of each class as named, in mixed order."""
    pairs = [(f"{label} {i}", label) for label, count in counts.items() for i in range(count)]
    pairs.sort(key=lambda pair: pair[0][::-1])
    return data.Split("made up", pairs, list(range(1, len(pairs) + 1)))


def sample(split: data.Split, fraction: float, seed: int = 42, *more: object, **options) -> set:
    words = ("--train_sample_fraction", fraction, "--seed", seed, *more)
    return set(data.sample_train(split, flags(*words, **options)).examples)


# Files


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_examples(tmp_path, suffix, packed):
    content = WRITERS[suffix](ROWS)
    path = tmp_path / f"train{suffix}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content) if packed else content)
    split = data.load(flags("--train_file", path), ["train"])["train"]
    assert split.examples == EXAMPLES
    assert split.describe()["sha256"] == data.Split("elsewhere", EXAMPLES, []).describe()["sha256"]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.replace(b"\n", b"\r\n"),
        lambda content: b"\xef\xbb\xbf" + content,
        lambda content: b"\n" + content.replace(b"\n", b"\n\n"),
        lambda content: content.rstrip(b"\n"),
    ],
    ids=["CRLF", "byte order mark", "blank lines", "no last newline"],
)
def test_json_lines_read_the_same_however_their_lines_end(tmp_path, change):
    path = tmp_path / "train.jsonl"
    path.write_bytes(change(as_lines(ROWS)))
    assert data.load(flags("--train_file", path), ["train"])["train"].examples == EXAMPLES


def test_columns_are_found_by_their_flags(tmp_path):
    row = {"id": 7, "said": "Ann: hi", "short": "Ann greets."}
    path = write_rows(tmp_path / "d.jsonl", [row])
    words = ("--train_file", path, "--dialogue_column", "said", "--summary_column", "short")
    assert data.load(flags(*words, task="summarization"), ["train"])["train"].examples == [
        ("Ann: hi", "Ann greets.")
    ]


@pytest.mark.parametrize(
    ("names", "validation"),
    [
        (["train.jsonl", "test.jsonl", "validation.jsonl"], "validation.jsonl"),
        (["posts_train.jsonl", "posts_test.jsonl", "posts_dev.jsonl"], "posts_dev.jsonl"),
        (["train-00000-of-00001.jsonl", "test-1.jsonl", "val.jsonl", "README.md"], "val.jsonl"),
        (["a.train.jsonl", "a.test.jsonl", "a.valid.jsonl", "latest.jsonl"], "a.valid.jsonl"),
    ],
)
def test_a_folder_s_splits_are_found_by_their_names(tmp_path, names, validation):
    for name in names:
        write_rows(tmp_path / name, [{"text": name, "label": label} for label in "ab"])
    splits = data.load(flags("--dataset", tmp_path), ["train", "test", "validation"])
    found = {name: split.examples[0][0] for name, split in splits.items()}
    assert found == {"train": names[0], "test": names[1], "validation": validation}
    assert splits["train"].source == str(tmp_path / names[0])


def test_a_split_s_own_flag_goes_before_the_folder(tmp_path):
    for name in ("train", "test", "other"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": name, "label": label} for label in "ab"])
    args = flags("--dataset", tmp_path, "--test_file", tmp_path / "other.jsonl")
    assert data.load(args, ["train", "test"])["test"].examples[0][0] == "other"


def test_several_files_for_one_split_are_refused_by_name(tmp_path):
    for name in ("posts_train.jsonl", "dialogues_train.csv"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"dialogues_train\.csv, posts_train\.jsonl.*--train_file"):
        data.load(flags("--dataset", tmp_path), ["train"])


def test_one_file_is_the_train_split_and_has_no_other(tmp_path):
    path = write_rows(tmp_path / "posts.jsonl", ROWS)
    assert data.load(flags("--dataset", path), ["train"])["train"].examples == EXAMPLES
    assert list(data.load(flags("--dataset", path), ["train"], optional=["test"])) == ["train"]
    with pytest.raises(UserError, match="--test_file"):
        data.load(flags("--dataset", path), ["train", "test"])


def test_a_train_file_without_a_test_file_trains_but_does_not_score_the_default_data(tmp_path):
    args = flags("--train_file", write_rows(tmp_path / "train.jsonl", ROWS))
    assert list(data.load(args, ["train"], optional=["test"])) == ["train"]
    with pytest.raises(UserError, match="--test_file is needed"):
        data.load(args, ["train", "test"])


def test_an_optional_split_that_is_named_must_be_there(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(UserError, match=r"--test_file .*no such file"):
        data.load(flags("--train_file", train, "--test_file", tmp_path / "no.jsonl"), ["train"], ["test"])


@pytest.fixture
def hub_rows(tmp_path, monkeypatch):
    """Rows of a data set with class numbers, read as one from the hub is, from a folder of its format."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    columns = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y"])}
    columns["id"] = datasets.Value("int64")

    def read(labels: list[int | None], **needed: str) -> list[tuple]:
        pairs = {"text": [f"text {i}" for i in range(len(labels))], "label": labels, "id": [7] * len(labels)}
        table = datasets.Dataset.from_dict(pairs, features=datasets.Features(columns))
        table.to_parquet(tmp_path / "train.parquet")
        rows = list(data.read_hub(str(tmp_path), "train", needed))
        return rows if needed else [(number, row["label"]) for number, row in rows]

    return read


def test_a_split_that_a_hub_data_set_lacks_is_no_source(hub_rows, tmp_path):
    hub_rows([0])
    with pytest.raises(data.NoSource, match="no validation split"):
        list(data.read_hub(str(tmp_path), "validation"))


def test_class_numbers_of_the_hub_become_their_names(hub_rows):
    assert hub_rows([0, 1, 0]) == [(1, "x"), (2, "y"), (3, "x")]


@pytest.mark.parametrize("label", [None, -1])  # the hub's ways to hide a label
def test_a_row_of_the_hub_without_a_label_has_none(hub_rows, label):
    assert hub_rows([0, label]) == [(1, "x"), (2, None)]


def test_columns_of_the_hub_that_are_not_needed_are_not_read(hub_rows):
    rows = [(1, {"text": "text 0", "label": "x"}), (2, {"text": "text 1", "label": "y"})]
    assert hub_rows([0, 1], text="text", label="label") == rows


def test_a_column_that_a_hub_data_set_lacks_is_named(hub_rows):
    with pytest.raises(UserError, match='has no column "body" but text, label, id: name it by --text_column'):
        hub_rows([0, 1], **{"--text_column": "body"})


# Columns

MAILS = [
    {"Subject": " Hi", "Body": "a\nb", "id": "x", "label": "x"},
    {"Subject": "", "Body": "c", "id": "x", "label": "y"},
    {"Subject": " ", "Body": None, "id": "x", "label": "y"},
]


@pytest.mark.parametrize("suffix", WRITERS)
def test_several_text_columns_are_a_line_each(tmp_path, suffix):
    (tmp_path / f"t{suffix}").write_bytes(WRITERS[suffix](MAILS))
    args = flags("--train_file", tmp_path / f"t{suffix}", "--text_column", "Subject", "Body")
    split = data.load(args, ["train"])["train"]
    assert split.examples == [("Subject: Hi\nBody: a\nb", "x"), ("Body: c", "y")]
    assert split.dropped == {"empty Subject and Body": 1}
    args.text_column = ["Body", "Subject"]
    assert data.load(args, ["train"])["train"].examples[0] == ("Body: a\nb\nSubject: Hi", "x")


def test_one_of_several_text_columns_that_is_not_there_is_named(tmp_path):
    for path in (
        write_rows(tmp_path / "t.jsonl", MAILS),
        parquet({"Subject": ["a"], "label": ["b"]}, tmp_path / "t.parquet"),
    ):
        args = flags("--train_file", path, "--text_column", "Subject", "Text")
        with pytest.raises(
            UserError, match=r'has no column "Text" but Subject, .*: name it by --text_column'
        ):
            data.load(args, ["train"])


def load_file(path: Path, content: str | bytes) -> data.Split:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return data.load(flags("--train_file", path), ["train"])["train"]


TWICE = {
    "t.csv": "text,label,label\nt,a,x\nu,b,x\n",
    "t.jsonl": '{"text": "t", "label": "a"}\n{"text": "u", "label": "b", "label": "x"}\n',
    "t.json": '[{"text": "t", "label": "a"}, {"label": "b", "text": "u", "label": "b"}]',
    "pretty.json": '{\n"text": "t",\n"label": "a"}\n{\n"text": "u",\n"label": "b",\n"label": "x"\n}',
}
IN = {"t.csv": "has 2 columns", "t.jsonl": "line 2 has the key", "t.json": "row 2 has the key"}


@pytest.mark.parametrize("name", TWICE)
def test_a_needed_column_that_is_named_twice_is_refused_by_name(tmp_path, name):
    with pytest.raises(UserError, match=rf"{IN.get(name, 'row 2 has the key')}.* \"label\"") as error:
        load_file(tmp_path / name, TWICE[name])
    assert f"--train_file {tmp_path / name}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "id,text,label,id\n1,t,a,2\n1,u,b,2\n"),
        ("t.jsonl", '{"id": 1, "text": "t", "label": "a", "id": 2}\n{"text": "u", "label": "b"}\n'),
        ("t.json", '[{"id": 1, "text": "t", "label": "a", "id": 2}, {"text": "u", "label": "b"}]'),
    ],
)
def test_another_column_that_is_named_twice_does_not_matter(tmp_path, name, content):
    assert load_file(tmp_path / name, content).examples == [("t", "a"), ("u", "b")]


def test_a_key_twice_in_an_object_within_a_row_does_not_matter(tmp_path):
    rows = [f'{{"text": "t", "label": "{label}", "more": {{"text": 1, "text": 2}}}}\n' for label in "ab"]
    assert len(load_file(tmp_path / "t.jsonl", "".join(rows)).examples) == 2


def parquet(columns: dict, path: Path) -> Path:
    """Arrays by name; a name with a star behind it stands for the same name again."""
    import pyarrow
    import pyarrow.parquet

    names = [name.rstrip("*") for name in columns]
    pyarrow.parquet.write_table(pyarrow.table(list(columns.values()), names=names), path)
    return path


@pytest.fixture
def odd() -> dict:
    """Two columns of Arrow's that hold what Python can't, and one twice."""
    import pyarrow

    return {
        "date": pyarrow.array([3_000_000, None], pyarrow.date32()),
        "span": pyarrow.array([2**62, 1], pyarrow.duration("s")),
        "again": ["x", "y"],
        "again*": ["x", "y"],
    }


def test_columns_of_a_parquet_file_that_are_not_needed_are_not_read(tmp_path, odd):
    path = parquet({**odd, "text": ["t", "u"], "label": ["a", "b"]}, tmp_path / "t.parquet")
    assert data.load(flags("--train_file", path), ["train"])["train"].examples == [("t", "a"), ("u", "b")]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("date", r'column "date" holds date32\[day\], not text'),
        ("span", r'column "span" holds duration\[s\], not text'),
        ("again", r'has 2 columns named "again"'),
        ("none", r'has no column "none" but date, span, again, again, label: name it by --text_column'),
    ],
)
def test_a_needed_column_of_a_parquet_file_that_can_not_be_read_is_one_line(tmp_path, odd, column, message):
    path = parquet({**odd, "label": ["a", "b"]}, tmp_path / "t.parquet")
    with pytest.raises(UserError, match=rf"--train_file .*t\.parquet:? {message}") as error:
        data.load(flags("--train_file", path, "--text_column", column), ["train"])
    assert "\n" not in str(error.value)


def test_a_parquet_file_may_hold_texts_as_dictionaries_and_classes_as_integers(tmp_path):
    import pyarrow

    texts = pyarrow.array(["t", "u", "t"]).dictionary_encode()
    path = parquet({"text": texts, "label": [1, None, 3]}, tmp_path / "t.parquet")
    split = data.load(flags("--train_file", path), ["train"])["train"]
    assert (split.examples, split.numbers) == ([("t", "1"), ("t", "3")], [1, 3])


# Delimiters


def parted(mark: str, rows: list[dict] = ROWS) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0].keys(), delimiter=mark)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz", "t.tsv.gz"])
@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_the_delimiter_is_recognised_from_the_header(tmp_path, name, mark):
    rows = [{"id": i, "a,b;c\td": "x;,\ty", **row} for i, row in enumerate(ROWS)]
    content = parted(mark, rows)
    content = gzip.compress(content) if name.endswith(".gz") else content
    assert load_file(tmp_path / name, content).examples == EXAMPLES


@pytest.mark.parametrize(("mark", "word"), [("|", "|"), (";", ";"), ("\t", "tab"), ("\t", "\\t")])
def test_the_delimiter_may_be_given(tmp_path, mark, word):
    (tmp_path / "t.csv").write_bytes(parted(mark))
    args = flags("--train_file", tmp_path / "t.csv", "--delimiter", word)
    assert data.load(args, ["train"])["train"].examples == EXAMPLES


def test_a_folder_s_tsv_files_are_its_splits(tmp_path):
    for name in ("train.tsv", "test.tsv"):
        (tmp_path / name).write_bytes(parted("\t"))
    assert data.load(flags("--dataset", tmp_path), ["train", "test"])["test"].examples == EXAMPLES


def test_columns_that_a_file_with_another_delimiter_lacks_are_named_apart(tmp_path):
    with pytest.raises(UserError, match='has no column "text" but body, topic, id: name it by'):
        load_file(tmp_path / "t.csv", "body;topic;id\na, b;c;1\n")


# JSON of every form


@pytest.mark.parametrize("indent", [None, 1, 4])
@pytest.mark.parametrize("between", ["\n", "\n\n", " ", "", "\r\n", "\r"])
def test_objects_one_behind_the_other_are_rows_however_they_are_spread(tmp_path, indent, between):
    content = between.join(json.dumps(row, indent=indent, ensure_ascii=False) for row in ROWS)
    split = load_file(tmp_path / "t.json", content)
    assert split.examples == EXAMPLES
    assert split.numbers == [1, 2, 3, 4] or (indent, between) == (None, "\n\n")  # the lines there


@pytest.mark.parametrize("name", ["t.json", "t.jsonl"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"version": 1, "data": ROWS}, 'is one JSON object that holds rows, 4 under "data": save the rows'),
        ({"a": {"b": ROWS}, "text": "t"}, 'holds rows, 4 under "a.b"'),
        ({"train": ROWS, "test": ROWS[:1]}, 'holds rows, 4 under "train", 1 under "test"'),
        ({"text": ["a", "b"], "label": ["x", "y"]}, 'row 1: column "text" holds a list'),
        ({"body": "t"}, 'row 1 has no column "text" but body'),
        (3, r"1 is not a JSON object such as"),
        ([[1]], r"row 1 is not a JSON object such as"),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_json_that_holds_no_rows_of_its_own_is_refused_for_what_it_is(
    tmp_path, name, content, message, indent
):
    with pytest.raises(UserError, match=message) as error:
        load_file(tmp_path / name, json.dumps(content, indent=indent))
    assert "is not JSON" not in str(error.value)


def test_a_row_may_hold_lists_of_objects_beside_its_columns(tmp_path):
    row = {"text": "t", "label": "a", "spans": [{"from": 1}]}
    assert load_file(tmp_path / "t.json", json.dumps([row, {**row, "label": "b"}])).numbers == [1, 2]
    args = flags("--train_file", write_rows(tmp_path / "t.jsonl", [row]))
    with pytest.raises(UserError, match="has one class only"):
        data.load(args, ["train"])


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"text": "t", "label": "a"}\n{"text": "t", "label": }\n', 2),
        ('{\n"text": "t",\n"label": "a"\n}\n{\n"text": "t"\n"label": "a"\n}', 7),
        ('[\n{"text": "t", "label": "a"},\n{"text": "t" "label": "a"}\n]', 3),
        ("{'text': 't'}", 1),
    ],
)
def test_broken_json_is_named_with_its_line(tmp_path, content, line):
    with pytest.raises(UserError, match=rf"t\.json line {line} is not JSON: "):
        load_file(tmp_path / "t.json", content)


def test_a_number_too_long_for_python_elsewhere_does_not_matter(tmp_path):
    rows = [f'{{"text": "t", "label": "{label}", "id": {"9" * 5000}}}\n' for label in "ab"]
    assert len(load_file(tmp_path / "t.jsonl", "".join(rows)).examples) == 2


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 3089528\n" % 7


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv", "t.parquet", "t.jsonl.gz", "t.csv.gz"])
def test_a_git_lfs_pointer_in_place_of_a_file_is_said_with_the_mend(tmp_path, name):
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer, .*git lfs pull"):
        load_file(tmp_path / name, POINTER)


@pytest.mark.parametrize("head", [b"", b"version: 1", b"\x00" * 64, b'{"text": "version https://git-lfs"}'])
def test_what_is_no_git_lfs_pointer_is_not_taken_for_one(head):
    assert is_lfs_pointer(POINTER[:60])
    assert not is_lfs_pointer(head)


# Classes


def labelled(folder: Path, *labels: object) -> data.Split:
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
    return data.load(flags("--train_file", write_rows(folder / "t.jsonl", rows)), ["train"])["train"]


def test_integers_are_names_of_classes(tmp_path):
    split = labelled(tmp_path, 3, "3", 0, -1, None)
    assert [label for _, label in split.examples] == ["3", "3", "0", "-1"]
    assert split.dropped == {"empty label": 1}


@pytest.mark.parametrize("label", [True, False, 1.0, 2.5, [1], {"a": 1}])
def test_other_values_are_none(tmp_path, label):
    with pytest.raises(UserError, match='row 2: column "label" holds a'):
        labelled(tmp_path, 3, label)


def test_an_integer_is_no_text_and_no_summary(tmp_path):
    args = flags("--train_file", write_rows(tmp_path / "a.jsonl", [{"text": 3, "label": "a"}]))
    with pytest.raises(UserError, match='row 1: column "text" holds a number'):
        data.load(args, ["train"])
    rows = [{"dialogue": "A: hi", "summary": 3}]
    args = flags("--train_file", write_rows(tmp_path / "b.jsonl", rows), task="summarization")
    with pytest.raises(UserError, match='row 1: column "summary" holds a number'):
        data.load(args, ["train"])


def test_the_unicode_forms_of_a_class_are_one_class(tmp_path):
    composed, apart = "Caf\u00e9", "Cafe\u0301"
    split = labelled(tmp_path, composed, apart, "Tee")
    assert data.labels_of(split) == [composed, "Tee"]
    assert split.describe()["sha256"] == labelled(tmp_path, composed, composed, "Tee").describe()["sha256"]


UNSEEN = {
    "zero-width space": ("a\u200b", "a", "U+200B"),
    "zero-width joiner": ("a\u200db", "ab", "U+200D"),
    "soft hyphen": ("co\u00adop", "coop", "U+00AD"),
    "byte order mark": ("\ufeffa", "a", "U+FEFF"),
    "no-break space": ("a\u00a0b", "a b", "U+00A0"),
    "narrow no-break space": ("a\u202fb", "a\u00a0b", "U+202F"),
    "ideographic space": ("a\u3000b", "a b", "U+3000"),
    "tab": ("a\tb", "a b", "U+0009"),
    "control": ("a\u0007", "a", "U+0007"),
    "variation selector": ("\u2764\ufe0f", "\u2764", "U+FE0F"),
    "right-to-left mark": ("\u200fa", "a", "U+200F"),
    "tag": ("a\U000e0061", "a", "U+E0061"),
    "Hangul filler": ("a\u3164", "a", "U+3164"),
    "joiner in a composed letter": ("e\u034f\u0301", "\u00e9", "U+034F"),
}


@pytest.mark.parametrize(("one", "other", "point"), UNSEEN.values(), ids=UNSEEN)
def test_classes_that_look_the_same_are_refused_by_code_point_and_row(tmp_path, one, other, point):
    with pytest.raises(UserError) as error:
        labelled(tmp_path, "x", one, other, one)
    line = str(error.value)
    assert "\n" not in line
    assert f"<{point}>" in line
    assert "(row 2, 4)" in line
    assert "(row 3)" in line


@pytest.mark.parametrize("label", [one for one, _, _ in UNSEEN.values()])
def test_one_class_may_hold_what_can_not_be_seen(tmp_path, label):
    assert label.strip() in data.labels_of(labelled(tmp_path, label, "x"))


def test_a_class_that_shows_nothing_is_none(tmp_path):
    split = labelled(tmp_path, "a", "\u200b", "\ufeff\u00ad", "b", "\u00a0")
    assert (split.numbers, split.dropped) == ([1, 4], {"empty label": 3})


def test_classes_that_can_be_told_apart_are_accepted(tmp_path):
    labels = {"a b", "ab", "a-b", "A-c", "\u0430 b", "a\u2011b", "a_b", "a\u0301 b", "\u00c5", "\uff41 b"}
    assert set(data.labels_of(labelled(tmp_path, *labels))) == {
        unicodedata.normalize("NFC", x) for x in labels
    }


def test_classes_that_joiners_or_tags_make_look_different_are_two():
    england, scotland = (
        "\U0001f3f4" + "".join(chr(0xE0000 + ord(letter)) for letter in f"{code}\x7f")
        for code in ("gbeng", "gbsct")
    )
    for one, other in ((england, scotland), ("👨‍👩‍👧", "👨👩👧"), ("می‌خواهم", "میخواهم")):
        assert data.looks(one) != data.looks(other)
    for one, other in (("a", "a\u200d"), ("ab", "a\u200cb"), ("é", "é\u00ad"), ("a", "a\U000e0067")):
        assert data.looks(one) == data.looks(other)


def test_an_index_counts_rows_and_not_blank_lines(tmp_path):
    lines = [
        json.dumps({"text": text, "label": label}) for text, label in (("a", "x"), ("", "y"), ("b", "y"))
    ]
    split = load_file(tmp_path / "t.jsonl", "\n\n".join(lines))
    assert (split.numbers, split.places) == ([1, 5], [0, 2])
    assert split.keep([1]).places == [2]


def test_a_test_class_that_looks_like_one_of_train_is_spelled(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", [{"text": "t", "label": label} for label in "ab"])
    test = write_rows(tmp_path / "test.jsonl", [{"text": "t", "label": "a\u200b"}])
    with pytest.raises(UserError, match=r'row 1: class "a<U\+200B>" does not occur .* "a" does, which looks'):
        data.load(flags("--train_file", train, "--test_file", test), ["train", "test"])


TWINS = ("Billing", "Billing", "billing", "Card  lost", "Card lost", "card lost", "Card lost", "Other")


def test_classes_equal_but_for_case_and_white_space_are_refused_all_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        labelled(tmp_path, *TWINS)
    line = str(error.value)
    assert (
        '"Billing" (row 1, 2) and "billing" (row 3); "Card  lost" (row 4) and "Card lost" (row 5, 7)' in line
    )
    assert line.endswith("spell them alike, or take each group as one by --merge_labels")
    assert "\n" not in line


def test_merge_labels_takes_the_most_frequent_spelling_of_train_everywhere(tmp_path):
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(TWINS)]
    train = write_rows(tmp_path / "train.jsonl", rows)
    test = write_rows(
        tmp_path / "test.jsonl", [{"text": "t", "label": label} for label in ("BILLING", "other")]
    )
    args = flags("--train_file", train, "--test_file", test, "--merge_labels")
    splits = data.load(args, ["train", "test"])
    assert data.labels_of(splits["train"]) == ["Billing", "Card lost", "Other"]
    merged = {"Billing": {"billing": 1}, "Card lost": {"Card  lost": 1, "card lost": 1}}
    assert splits["train"].describe()["merged"] == merged
    assert [label for _, label in splits["test"].examples] == ["Billing", "Other"]
    assert "3 with a class spelled otherwise" in data.say_split("train", splits["train"], splits["train"])
    trained = {"labels": ["Card lost", "billing", "other"], "data": {"train": {}}}  # of another train file
    assert data.load(args, ["test"], trained=trained)["test"].examples == [("t", "billing"), ("t", "other")]


def test_classes_are_merged_before_a_share_of_each_is_held_out(tmp_path):
    path = write_rows(
        tmp_path / "t.jsonl", [{"text": f"t {i}", "label": ("a", "A", "b", "b")[i % 4]} for i in range(40)]
    )
    splits = data.load(
        flags("--train_file", path, "--merge_labels", "--test_fraction", 0.1), ["train", "test"]
    )
    assert Counter(label for _, label in splits["test"].examples) == {"a": 2, "b": 2}


@pytest.fixture
def unseen(tmp_path) -> tuple:
    labels = ("a", "c", "a", "d", "c", "B")
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
    train = write_rows(tmp_path / "train.jsonl", [{"text": "t", "label": label} for label in "ab"])
    return "--train_file", train, "--test_file", write_rows(tmp_path / "test.jsonl", rows)


def test_classes_that_train_lacks_are_named_all_at_once_with_their_rows(unseen):
    with pytest.raises(UserError) as error:
        data.load(flags(*unseen), ["train", "test"])
    line = str(error.value)
    assert (
        'test.jsonl: 3 classes do not occur in the train split: "c" (2 rows, from row 2), "d" (1 row, '
        in line
    )
    assert '"B" (1 row, from row 6, but "b" does, and --merge_labels takes them as one)' in line
    assert line.endswith("--unseen_labels drop leaves such rows out, keep counts them as wrong")


def test_unseen_labels_drop_leaves_them_out_and_counts_them(unseen):
    split = data.load(flags(*unseen, "--unseen_labels", "drop"), ["train", "test"])["test"]
    assert split.numbers == [1, 3]
    assert split.dropped == {"class that train lacks": 4}


def test_unseen_labels_keep_leaves_them_in_and_they_count_as_wrong(unseen):
    from study import metrics

    splits = data.load(flags(*unseen, "--unseen_labels", "keep"), ["train", "test"])
    references, labels = [label for _, label in splits["test"].examples], data.labels_of(splits["train"])
    assert (references, labels) == (["a", "c", "a", "d", "c", "B"], ["a", "b"])
    scores, _ = metrics.score("classification", ["a", "c", "a", "d", "a", "B"], references, labels)
    assert scores["metrics"]["accuracy"]["value"] == pytest.approx(100 / 3)


def test_unseen_labels_drop_that_leaves_nothing_is_refused(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", ROWS)
    test = write_rows(tmp_path / "test.jsonl", [{"text": "t", "label": "z"}])
    with pytest.raises(UserError, match=r"--unseen_labels drop leaves nothing of .*test\.jsonl"):
        data.load(
            flags("--train_file", train, "--test_file", test, "--unseen_labels", "drop"), ["train", "test"]
        )


def say(whole: data.Split, used: data.Split | None = None) -> list[str]:
    return data.classes.say(used or whole, whole).splitlines()


def test_classes_are_said_with_their_counts_in_few_lines():
    few = say(classes(billing=3, other=12, x=1))
    assert [line.split() for line in few[:4]] == [
        ["classes", "3"],
        ["12", "other"],
        ["3", "billing"],
        ["1", "x"],
    ]
    assert few[4:] == ['           one row only: "x"']
    many = say(classes(**{f"class{i}": i + 2 for i in range(150)}))
    assert (len(many), many[-1]) == (22, "           and 130 more, of 2 to 131 rows")


def test_likely_misspellings_are_said():
    counts = {"Refund request": 40, "Refund requst": 2, "Refnd requets": 1, "increase": 9, "decrease": 4}
    counts |= {"label 10": 50, "label 11": 3, "cat": 9, "cot": 2, "accounting": 30, "acounting": 20}
    lines = say(classes(**counts))
    assert lines[-1] == '           likely a misspelling: "Refund requst" (2) of "Refund request" (40)'
    few = classes(increase=2, decrease=2)
    assert say(classes(**counts), few)[:3] == say(few)
    assert say(classes(**counts), few)[-1] == lines[-1]


@pytest.mark.parametrize(
    ("one", "other", "edits"),
    [
        ("kitten", "kitten", 0),
        ("kitten", "kittn", 1),
        ("kitten", "sittin", 2),
        ("kitten", "sitting", 3),
        ("", "ab", 2),
    ],
)
def test_edits_are_those_of_levenshtein(one, other, edits):
    found = [
        data.classes.edits_at_most(most, *pair) for most in range(4) for pair in ((one, other), (other, one))
    ]
    assert found == [most >= edits for most in range(4) for _ in "12"]


# Rows


def test_dropped_rows_are_counted_by_reason(tmp_path):
    bad = [{"text": "", "label": "x"}, {"text": " \n", "label": "x"}, {"text": "t", "label": None}]
    split = data.load(flags("--train_file", write_rows(tmp_path / "t.jsonl", bad + ROWS)), ["train"])["train"]
    assert split.dropped == {"empty text": 2, "empty label": 1}
    assert split.describe()["dropped"] == {"empty text": 2, "empty label": 1}
    assert split.examples == EXAMPLES
    assert split.numbers == [4, 5, 6, 7]


def test_a_split_says_how_many_rows_its_source_has(tmp_path):
    rows = [*ROWS, {"text": "", "label": "x"}, {"text": "t", "label": ""}]
    split = data.load(flags("--train_file", write_rows(tmp_path / "t.jsonl", rows)), ["train"])["train"]
    line = data.say_split("train", split, split.keep([0]))
    assert line.split(maxsplit=1)[1].startswith("1 of 6 rows of ")
    assert line.endswith(", 1 dropped: empty text, 1 dropped: empty label")


STANCES = [{"text": f"text {i}", "label": ("Favor", "Against", "None")[i % 3]} for i in range(6)]


@pytest.mark.parametrize("by", ["file", "folder", "other dataset"])
def test_a_class_called_none_stays_in_a_users_data(tmp_path, monkeypatch, by):
    write_rows(tmp_path / "train.jsonl", STANCES)
    words = {"file": ("--train_file", tmp_path / "train.jsonl"), "folder": ("--dataset", tmp_path)}
    monkeypatch.setattr(data, "read_hub", lambda name, split, columns: enumerate(STANCES, 1))
    split = data.load(flags(*words.get(by, ("--dataset", "somebody/stances"))), ["train"])["train"]
    assert (split.dropped, data.labels_of(split)) == ({}, ["Against", "Favor", "None"])


def test_rows_of_the_default_data_set_without_a_class_are_dropped(monkeypatch):
    monkeypatch.setattr(data, "read_hub", lambda name, split, columns: enumerate(STANCES, 1))
    split = data.load(flags(), ["train"])["train"]
    assert (split.dropped, data.labels_of(split)) == ({'class "None"': 2}, ["Against", "Favor"])
    assert split.numbers == [1, 2, 4, 5]


def test_a_summary_may_be_the_word_none(tmp_path):
    rows = [{"dialogue": "A: what?", "summary": "None"}, {"dialogue": "", "summary": "s"}]
    args = flags("--train_file", write_rows(tmp_path / "t.jsonl", rows), task="summarization")
    split = data.load(args, ["train"])["train"]
    assert (split.examples, split.dropped) == ([("A: what?", "None")], {"empty dialogue": 1})


def test_a_test_class_outside_train_is_refused_by_row(tmp_path):
    rows = [{"text": "t", "label": label} for label in ("sci.space", "", "rec.autos", "rec.boats")]
    test = write_rows(tmp_path / "test.jsonl", rows)
    args = flags("--train_file", write_rows(tmp_path / "train.jsonl", ROWS), "--test_file", test)
    with pytest.raises(UserError, match=r'test\.jsonl row 4: class "rec\.boats" does not occur in the train'):
        data.load(args, ["train", "test"])


@pytest.mark.parametrize("end", ["\n", "\r", "\f", "\u2028"])  # an answer is read up to any of them
def test_a_class_of_several_lines_is_refused_by_row(tmp_path, end):
    path = write_rows(tmp_path / "t.jsonl", [*ROWS, {"text": "t", "label": f"a{end}b"}])
    with pytest.raises(UserError, match=r"t\.jsonl row 5: a class is one line"):
        data.load(flags("--train_file", path), ["train"])


def test_a_csv_row_with_more_cells_than_the_header_is_refused_by_row(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("text,label\nfine,a\nhello, not quoted,b\n")
    with pytest.raises(UserError, match=r"t\.csv (row 2|line 3)"):
        data.load(flags("--train_file", path), ["train"])


@pytest.fixture
def overlapping(tmp_path) -> tuple:
    train = write_rows(tmp_path / "train.jsonl", [*ROWS, {"text": "trimmed", "label": "sci.space"}])
    rows = [{"text": text, "label": "sci.space"} for text in (" trimmed\n", "new", "Two")]
    return "--train_file", train, "--test_file", write_rows(tmp_path / "test.jsonl", rows)


def test_train_texts_that_occur_in_test_are_counted(overlapping):
    splits = data.load(flags(*overlapping), ["train", "test"])
    assert splits["train"].describe()["also_in_test"] == 2
    assert len(splits["train"].examples) == 5
    assert splits["train"].dropped == {}
    assert "2 texts occur in test too" in data.say_split("train", splits["train"], splits["train"])


def test_drop_overlap_takes_them_out_of_train_and_leaves_test(overlapping):
    splits = data.load(flags(*overlapping, "--drop_overlap"), ["train", "test"])
    assert splits["train"].examples == EXAMPLES[:3]
    assert splits["train"].numbers == [1, 2, 3]
    assert splits["train"].dropped == {"also in test": 2}
    assert len(splits["test"].examples) == 3


def test_texts_that_differ_in_white_space_only_overlap(tmp_path):
    train = [{"text": text, "label": label} for text, label in (("a  b\nc", "x"), ("other", "y"))]
    files = [write_rows(tmp_path / "train.jsonl", train), tmp_path / "test.jsonl"]
    write_rows(files[1], [{"text": "a b c", "label": "x"}])
    splits = data.load(flags("--train_file", files[0], "--test_file", files[1]), ["train", "test"])
    assert splits["train"].overlap == 1


CONTRADICTING = [  # text, class: three texts occur more than once, two of them with two classes
    *(("same", "a"), ("same\n", "a"), ("odd", "a"), ("odd", "b"), (" odd", "b"), ("x  y", "a"), ("x y", "c")),
    *(("one", "b"), ("two", "c")),
]


def contradicting(folder: Path, name: str = "train.jsonl") -> Path:
    return write_rows(folder / name, [{"text": text, "label": label} for text, label in CONTRADICTING])


def test_train_texts_that_occur_again_and_with_other_classes_are_counted(tmp_path):
    train = data.load(flags("--train_file", contradicting(tmp_path)), ["train"])["train"]
    described = train.describe()
    assert (described["repeated"], described["contradicting"]) == (3, 2)
    line = data.say_split("train", train, train)
    assert "3 texts occur more than once, 2 of them with different classes" in line
    sampled = data.sample_train(train, flags("--train_sample_fraction", 0.5))
    assert sampled.describe()["repeated"] == 3  # of the split, like the texts that occur in test


def test_nothing_is_said_of_a_split_without_repeated_texts(tmp_path):
    train = data.load(flags("--train_file", write_rows(tmp_path / "t.jsonl", ROWS)), ["train"])["train"]
    assert (train.describe()["repeated"], train.describe()["contradicting"]) == (0, 0)
    assert "more than once" not in data.say_split("train", train, train)


def test_texts_that_were_dropped_do_not_count_as_repeated(tmp_path):
    test = write_rows(tmp_path / "test.jsonl", [{"text": "odd", "label": "a"}])
    words = "--train_file", contradicting(tmp_path), "--test_file", test, "--drop_overlap"
    described = data.load(flags(*words), ["train", "test"])["train"].describe()
    assert (described["repeated"], described["contradicting"]) == (2, 1)


def test_test_splits_and_summaries_are_not_searched_for_repeated_texts(tmp_path):
    splits = data.load(
        flags("--train_file", contradicting(tmp_path), "--test_file", tmp_path / "train.jsonl"),
        ["train", "test"],
    )
    assert "repeated" not in splits["test"].describe()
    rows = write_rows(tmp_path / "s.jsonl", 2 * [{"dialogue": "a: hi", "summary": "a greets"}])
    assert (
        "repeated"
        not in data.load(flags("--train_file", rows, task="summarization"), ["train"])["train"].describe()
    )


def test_the_worst_of_the_repeated_texts_are_listed_with_their_classes(tmp_path):
    train = data.load(flags("--train_file", contradicting(tmp_path)), ["train"])["train"]
    assert data.say_repeated(train).splitlines() == [
        "3 texts occur more than once, 2 of them with different classes",
        "  3 times: 2 b, 1 a: odd",
        "  2 times: 1 a, 1 c: x y",
        "  2 times: 2 a: same",
    ]
    assert len(data.say_repeated(train, most=1).splitlines()) == 2


def test_a_dry_run_lists_the_repeated_texts_on_request_before_its_line_for_programs(tmp_path):
    words = "--train_file", contradicting(tmp_path), "--output_dir", tmp_path, "--dry_run", "--show_repeated"
    done = run_script("llama2_classification.py", *words)
    assert (done.returncode, done.stderr) == (0, "")
    head, *listed, _, last = done.stdout.splitlines()
    assert head == "train: 3 texts occur more than once, 2 of them with different classes"
    assert listed[0] == "  3 times: 2 b, 1 a: odd"
    assert last.startswith("not started\t")


@pytest.mark.parametrize(("task", "words"), [("classification", ()), ("summarization", ("--dry_run",))])
def test_repeated_texts_are_listed_by_a_dry_run_of_a_classification_only(task, words, capsys):
    with pytest.raises(SystemExit):
        flags("--show_repeated", *words, task=task)
    assert "--show_repeated goes with --dry_run" in capsys.readouterr().err


def test_a_million_rows_are_searched_for_repeated_texts_in_seconds():
    examples = [(f"text {i % 900_000} of some words", "ab"[i % 2]) for i in range(1_000_000)]
    began = time.perf_counter()
    assert len(data.find_repeated(data.Split("file", examples, []))) == 100_000
    assert time.perf_counter() - began < 20


def test_drop_overlap_without_a_test_split_is_refused(overlapping):
    with pytest.raises(UserError, match="--drop_overlap: there is no test split"):
        data.load(flags(*overlapping[:2], "--drop_overlap"), ["train"], optional=["test"])


def test_a_class_that_drop_overlap_takes_away_is_missed_before_training(tmp_path):
    rows = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(4)] + [{"text": "both", "label": "c"}]
    train, test = (
        write_rows(tmp_path / f"{name}.jsonl", rows[first:]) for name, first in (("a", 0), ("b", 4))
    )
    files = ("--train_file", train, "--test_file", test)
    assert len(data.labels_of(data.load(flags(*files), ["train", "test"])["train"])) == 3
    with pytest.raises(UserError, match='class "c" does not occur in the train split'):
        data.load(flags(*files, "--drop_overlap"), ["train", "test"])


def test_drop_overlap_that_would_leave_nothing_is_refused(tmp_path):
    path = write_rows(tmp_path / "same.jsonl", ROWS)
    with pytest.raises(UserError, match="--drop_overlap leaves no train example"):
        data.load(flags("--train_file", path, "--test_file", path, "--drop_overlap"), ["train", "test"])


# Shares of train that become another split


def one_file(folder: Path, **counts: int) -> Path:
    return write_rows(
        folder / "posts.jsonl",
        [dict(zip(("text", "label"), pair, strict=True)) for pair in classes(**counts).examples],
    )


@pytest.mark.parametrize("name", ["test", "validation"])
@pytest.mark.parametrize("by", ["--train_file", "--dataset"])
def test_a_share_of_one_file_becomes_a_split_that_train_lacks(tmp_path, name, by):
    path = one_file(tmp_path, a=40, b=100)
    whole = data.load(flags(by, path), ["train"])["train"]
    splits = data.load(flags(by, path, f"--{name}_fraction", 0.2), ["train", name])
    assert Counter(label for _, label in splits[name].examples) == {"a": 8, "b": 20}
    both = splits["train"].examples + splits[name].examples
    assert sorted(both) == sorted(whole.examples)
    assert splits[name].describe()["fraction"] == 0.2
    held_out = {"rows": 28, "sha256": splits[name].describe()["sha256"]}
    assert splits["train"].describe()["held_out"] == {name: held_out}
    assert whole.describe().keys() & {"fraction", "held_out"} == set()


def test_the_share_is_the_same_whatever_the_seed_the_samples_and_the_order_of_rows(tmp_path):
    path = one_file(tmp_path, a=40, b=100)
    words = ("--train_file", path, "--test_fraction", 0.25)
    first = data.load(flags(*words), ["test"])["test"]
    more = (
        "--seed",
        7,
        "--train_sample_fraction",
        0.5,
        "--max_train_samples",
        50,
        "--validation_fraction",
        0.1,
    )
    assert data.load(flags(*words, *more), ["train", "test"])["test"].examples == first.examples
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert data.load(flags(*words), ["test"])["test"].examples == first.examples[::-1]


def test_two_shares_and_train_have_no_example_in_common(tmp_path):
    words = (
        "--train_file",
        one_file(tmp_path, a=40, b=100),
        "--test_fraction",
        0.2,
        "--validation_fraction",
        0.25,
    )
    splits = data.load(flags(*words), ["train", "test", "validation"])
    assert {name: len(split.examples) for name, split in splits.items()} == {
        "train": 84,
        "test": 28,
        "validation": 28,
    }
    assert len({pair for split in splits.values() for pair in split.examples}) == 140
    assert set(splits["train"].describe()["held_out"]) == {"test", "validation"}
    assert list(data.load(flags(*words), ["train"], optional=["test"])) == ["train", "test"]


def test_equal_texts_are_not_torn_apart(tmp_path):
    rows = [{"text": f"{' ' * (i % 2)}text  {i // 4}", "label": "ab"[i // 4 % 2]} for i in range(80)]
    args = flags("--train_file", write_rows(tmp_path / "t.jsonl", rows), "--test_fraction", 0.3)
    splits = data.load(args, ["train", "test"])
    assert splits["train"].overlap == 0
    assert len(splits["test"].examples) == 24


def test_summaries_are_held_out_as_one_class(tmp_path):
    rows = [{"dialogue": f"A: {i}", "summary": f"s {i}"} for i in range(10)]
    args = flags(
        "--train_file",
        write_rows(tmp_path / "d.jsonl", rows),
        "--validation_fraction",
        0.3,
        task="summarization",
    )
    assert len(data.load(args, ["validation"])["validation"].examples) == 3


@pytest.mark.parametrize("name", ["test", "validation"])
def test_a_share_beside_a_split_of_that_name_is_refused(tmp_path, name):
    for split in ("train", name):
        write_rows(tmp_path / f"{split}.jsonl", ROWS)
    with pytest.raises(
        UserError, match=rf"--{name}_fraction 0.5: there is a {name} split already, .*{name}.jsonl"
    ):
        data.load(flags("--dataset", tmp_path, f"--{name}_fraction", 0.5), ["train"])


def test_a_share_beside_a_split_of_the_hub_is_refused(monkeypatch):
    monkeypatch.setattr(data, "read_hub", lambda name, split, columns: enumerate(ROWS, 1))
    with pytest.raises(
        UserError, match=r"--test_fraction 0.5: there is a test split already, somebody/posts \(test"
    ):
        data.load(flags("--dataset", "somebody/posts", "--test_fraction", 0.5), ["train"])


@pytest.mark.parametrize(
    ("share", "counts", "message"),
    [
        (
            0.1,
            {"a": 40, "b": 3, "c": 1},
            r'no validation example .*: "b" \(3\), "c" \(1\): give a larger share',
        ),
        (0.9, {"a": 40, "b": 3, "c": 1}, r'no train example .*: "b" \(3\), "c" \(1\): give a smaller share'),
    ],
)
def test_a_share_that_would_leave_a_class_empty_is_refused_with_all_such_classes(
    tmp_path, share, counts, message
):
    args = flags("--train_file", one_file(tmp_path, **counts), "--validation_fraction", share)
    with pytest.raises(UserError, match=message):
        data.load(args, ["train"])


def test_a_class_of_one_row_stays_in_train_and_is_said(tmp_path):
    splits = data.load(
        flags("--train_file", one_file(tmp_path, a=40, b=20, c=1), "--test_fraction", 0.1), ["train", "test"]
    )
    assert data.labels_of(splits["train"]) == ["a", "b", "c"]
    line = data.say_split("test", splits["test"], splits["test"])
    assert line.startswith("test       6 of 6 rows: --test_fraction 0.1 of ")
    assert line.endswith("posts.jsonl, the same in every run; classes of one row, which stay in train: 1")
    assert ", 6 held out for test" in data.say_split("train", splits["train"], splits["train"])


def test_a_share_that_is_not_what_a_training_held_out_is_refused(tmp_path):
    path = one_file(tmp_path, a=40, b=20)
    args = flags("--train_file", path, "--test_fraction", 0.1)
    trained = {"data": {"train": data.load(args, ["train"])["train"].describe()}, "labels": ["a", "b"]}
    assert len(data.load(args, ["test"], trained=trained)["test"].examples) == 6
    path.write_text(path.read_text().replace("a 1", "changed 1"))
    with pytest.raises(UserError, match="other rows than the training held out"):
        data.load(args, ["test"], trained=trained)


def test_a_split_that_is_not_scored_may_have_a_file_beside_the_share_that_the_training_held_out(tmp_path):
    words = ("--train_file", one_file(tmp_path, a=40, b=20), "--test_fraction", 0.1)
    args = flags(*words, "--validation_fraction", 0.2)
    splits = data.load(args, ["train", "validation"])
    trained = {"data": {"train": splits["train"].describe()}, "labels": ["a", "b"]}
    args.test_file = str(write_rows(tmp_path / "other.jsonl", ROWS))  # --split validation --test_file
    assert data.load(args, ["validation"], trained=trained)["validation"].examples == (
        splits["validation"].examples
    )
    with pytest.raises(UserError, match=r"--test_fraction 0.1: there is a test split already"):
        data.load(args, ["train"])


@pytest.mark.parametrize(("scored", "other"), [("test", "validation"), ("validation", "test")])
def test_a_split_with_a_file_is_scored_without_reading_what_a_share_was_held_out_of(tmp_path, scored, other):
    file = write_rows(tmp_path / "scored.jsonl", ROWS)
    gone = ("--train_file", tmp_path / "gone.jsonl", f"--{other}_fraction", 0.1)
    args = flags(*gone, f"--{scored}_file", file)
    trained = {"data": {"train": {}}, "labels": sorted({row["label"] for row in ROWS})}
    assert len(data.load(args, [scored], trained=trained)[scored].examples) == len(ROWS)


# Samples


@pytest.mark.parametrize("seed", range(8))
def test_a_smaller_sample_lies_inside_a_larger_one(seed):
    split = classes(a=40, b=97, c=333)
    samples = [sample(split, fraction, seed) for fraction in (0.025, 0.05, 0.1, 0.25, 0.5, 0.9, 1.0)]
    assert all(small < large for small, large in itertools.pairwise(samples))
    assert samples[-1] == set(split.examples)


@pytest.mark.parametrize("fraction", [0.025, 0.05, 0.1, 0.25, 0.5, 1.0])
def test_a_sample_keeps_the_share_of_every_class(fraction):
    counts = {"a": 40, "b": 100, "c": 400}
    taken = Counter(label for _, label in sample(classes(**counts), fraction))
    assert taken == {label: round(count * fraction + 1e-9) for label, count in counts.items()}


def test_a_sample_depends_on_the_seed_alone():
    split = classes(a=50, b=50)
    assert sample(split, 0.2, 1) == sample(split, 0.2, 1)
    assert sample(split, 0.2, 1) != sample(split, 0.2, 2)


def test_summaries_are_sampled_as_one_class():
    split = data.Split("made up", [(f"text {i}", f"summary {i}") for i in range(200)], list(range(200)))
    small, large = (sample(split, fraction, task="summarization") for fraction in (0.025, 0.05))
    assert (len(small), len(large), small < large) == (5, 10, True)


def test_a_sample_keeps_the_order_of_the_file():
    split = classes(a=30, b=30)
    kept = data.sample_train(split, flags("--train_sample_fraction", 0.3, "--max_train_samples", 50))
    assert kept.examples == [pair for pair in split.examples if pair in set(kept.examples)]
    assert kept.examples == [split.examples[number - 1] for number in kept.numbers]


@pytest.mark.parametrize("smallest", [*range(1, 200), 999, 1000, 4999])
def test_the_least_fraction_that_is_named_works_and_is_the_least(smallest):
    split = classes(a=smallest, b=5000)
    with pytest.raises(UserError, match="the least that works here is") as error:
        sample(split, 0.00001)
    least = float(str(error.value).rpartition(" ")[2])
    assert {label for _, label in sample(split, least)} == {"a", "b"}
    with pytest.raises(UserError, match="the least that works here is"):
        sample(split, f"{least - 0.0001:.6f}")


def test_max_train_samples_takes_so_many_by_the_seed():
    split = classes(a=50, b=50)
    ten, thirty = (sample(split, 1.0, 42, "--max_train_samples", n) for n in (10, 30))
    assert (len(ten), len(thirty), ten < thirty) == (10, 30, True)
    assert ten != sample(split, 1.0, 43, "--max_train_samples", 10)
    assert sample(split, 1.0, 42, "--max_train_samples", 1000) == set(split.examples)


def test_max_eval_samples_takes_the_same_ones_whatever_the_seed():
    split = classes(a=50, b=50)
    five, ten, other = (
        data.sample_eval(split, flags("--max_eval_samples", n, "--seed", seed)).examples
        for n, seed in ((5, 1), (10, 1), (10, 2))
    )
    assert (len(ten), ten == other, set(five) < set(ten)) == (10, True, True)
    assert data.sample_eval(split, flags()).examples == split.examples


# Fingerprints


def test_the_fingerprint_changes_with_text_label_order_and_count():
    variants = [
        EXAMPLES,
        EXAMPLES[::-1],
        EXAMPLES[:-1],
        [(EXAMPLES[0][0] + ".", EXAMPLES[0][1]), *EXAMPLES[1:]],
        [(EXAMPLES[0][0], "other"), *EXAMPLES[1:]],
        [(EXAMPLES[0][0] + EXAMPLES[0][1], ""), *EXAMPLES[1:]],
    ]
    assert len({data.Split("s", rows, []).describe()["sha256"] for rows in variants}) == len(variants)


def test_the_fingerprint_covers_the_examples_that_are_used():
    split = classes(a=10, b=10)
    used = split.keep([0, 3])
    assert used.describe()["sha256"] != split.describe()["sha256"]
    assert used.describe()["rows"] == 2


# Real data


@pytest.fixture
def newsgroups(real_data: Path) -> tuple:
    files = [real_data / f"newsgroups_{split}.jsonl.gz" for split in ("train", "test")]
    return "--train_file", files[0], "--test_file", files[1]


def test_real_newsgroups_load_whole(newsgroups):
    splits = data.load(flags(*newsgroups), ["train", "test"])
    assert {name: len(split.examples) for name, split in splits.items()} == {"train": 11014, "test": 7317}
    assert {name: split.dropped for name, split in splits.items()} == {"train": {}, "test": {}}
    assert len(data.labels_of(splits["train"])) == 20


def test_real_newsgroups_have_posts_that_stand_in_two_groups(newsgroups):
    described = data.load(flags(*newsgroups), ["train"])["train"].describe()
    assert (described["repeated"], described["contradicting"]) == (42, 8)


def test_real_newsgroups_lose_every_post_that_stands_in_test_too(newsgroups):
    def bare(split: data.Split) -> list[str]:
        return [" ".join(text.split()) for text, _ in split.examples]

    splits = data.load(flags(*newsgroups), ["train", "test"])
    train, test = bare(splits["train"]), bare(splits["test"])
    assert sum(map(set(train).__contains__, test)) == 17
    apart = data.load(flags(*newsgroups, "--drop_overlap"), ["train", "test"])["train"]
    assert splits["train"].overlap == apart.dropped["also in test"] == 11014 - len(apart.examples)
    assert not set(bare(apart)) & set(test)


def test_real_newsgroups_sample_at_every_published_fraction(newsgroups):
    train = data.load(flags(*newsgroups), ["train"])["train"]
    samples = [sample(train, fraction) for fraction in (0.025, 0.05, 0.1, 0.25, 0.5)]
    assert all(small < large for small, large in itertools.pairwise(samples))
    assert all(len({label for _, label in taken}) == 20 for taken in samples)


def test_real_samsum_drops_its_one_empty_dialogue(real_data):
    args = flags("--train_file", real_data / "samsum_train.jsonl.gz", task="summarization")
    split = data.load(args, ["train"])["train"]
    assert (len(split.examples), split.dropped) == (14731, {"empty dialogue": 1})


@pytest.mark.parametrize(
    ("words", "there"),
    [
        (["--train_file", "t.jsonl", "--validation_file", "v.jsonl"], True),
        (["--train_file", "t.jsonl", "--validation_fraction", "0.2"], True),
        (["--train_file", "t.jsonl"], False),
        (["--dataset", "FOLDER"], False),
        (["--dataset", "some/hub-id"], False),  # which can't be asked
    ],
)
def test_whether_there_is_a_validation_split_is_known_before_anything_is_read(
    tmp_path, monkeypatch, words, there
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    for name in ("t.jsonl", "v.jsonl"):
        (tmp_path / name).touch()
    folder = tmp_path / "data"
    folder.mkdir()
    words = [str(folder) if word == "FOLDER" else word for word in words]
    args = cli.parse_args("classification", "", words)
    assert data.has_split(args, "validation") is there
    (folder / "dev.jsonl").touch()
    assert data.has_split(args, "validation") is (there or str(folder) in words)
