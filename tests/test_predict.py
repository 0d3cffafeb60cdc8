"""Answers to new texts: those that scoring gives, beside all columns of the file, whatever is in its rows."""

import csv
import gzip
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import DEMO_DATA, DEMO_MODEL, ROOT, error_line, write_rows
from preloaded import kill, run_preloaded, start_until

from study import files, tabular

NAMES = {"classification": ("posts", "text"), "summarization": ("dialogues", "dialogue")}
COLUMNS = {"--text_column": "text"}
# What CSV has to quote, what it need not, and numbers that a number would spell otherwise.
HARD = [
    {"id": "007", "text": 'a "quoted", text;\nof two lines', "n": "1.10"},
    {"id": "-0", "text": "\0NUL\0, tab\t, return\r alone, both\r\n, \u2028 and \u0085", "n": "1e400"},
    {"id": "", "text": " '=cmd()' blanks around ", "n": "12345678901234567890.12345678901234567890"},
    {"id": '"', "text": "é北京😀", "n": "NaN"},
]


def flags_of(task: str) -> tuple:
    name = NAMES[task][0]
    data = (f"--{split}_file={DEMO_DATA / f'{name}_{split}.jsonl'}" for split in ("train", "test"))
    size = ("--max_train_samples", 24, "--batch_size", 4, "--lora_r", 4, "--learning_rate", "3e-3")
    return ("--pretrained_ckpt", DEMO_MODEL, *data, *size, "--epochs", 1, "--price_per_hour", 36)


def rows_of(task: str, count: int) -> list[dict]:
    lines = (DEMO_DATA / f"{NAMES[task][0]}_test.jsonl").read_text().splitlines()[:count]
    return [json.loads(line) for line in lines]


def predict(task: str, folder: Path, file: Path, *flags: object):
    flags = ("--experiment_dir", folder, "--predict_file", file, *flags)
    return run_preloaded(f"llama2_{task}_inference.py", *flags)


def predicted(task: str, folder: Path, file: Path, *flags: object) -> str:
    done = predict(task, folder, file, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def answers_in(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def output_of(folder: Path) -> Path:
    [path] = (path for path in folder.glob(f"predictions-{'?' * 12}.*") if not path.name.endswith(".json"))
    return path


@pytest.fixture(scope="module", params=NAMES)
def trained(request, tmp_path_factory) -> tuple[str, Path]:
    """A short training of each task whose test file is gone since, and its scores."""
    task, folder = request.param, tmp_path_factory.mktemp(request.param) / "run"
    done = run_preloaded(f"llama2_{task}.py", *flags_of(task), "--experiment_dir", folder)
    assert done.returncode == 0, done.stderr
    return task, folder


@pytest.fixture
def run(trained, tmp_path) -> tuple[str, Path]:
    task, folder = trained
    return task, Path(shutil.copytree(folder, tmp_path / "run"))


@pytest.fixture
def classifier(tmp_path_factory, request) -> Path:
    """A finished training by its record alone, for what needs no model."""
    from leave_finished import leave

    folder = tmp_path_factory.mktemp("classifier") / "run"
    leave("llama2_classification.py", [*map(str, flags_of("classification")), f"--experiment_dir={folder}"])
    return folder


@pytest.mark.parametrize("flags", [(), ("--decoding", "constrained")])
def test_answers_are_those_of_scoring_and_labels_need_not_be_there(run, tmp_path, flags):
    task, folder = run
    flags = flags if task == "classification" else flags and ("--max_new_tokens", 10)
    scoring = ("--experiment_dir", folder, "--max_eval_samples", 12, *flags)
    done = run_preloaded(f"llama2_{task}_inference.py", *scoring)
    assert done.returncode == 0, done.stderr
    [path] = folder.glob("predictions*.jsonl")
    scored = answers_in(path)
    path.unlink()
    column = NAMES[task][1]
    rows = rows_of(task, 200)
    new = [{"id": row["index"], column: rows[row["index"]][column]} for row in scored]
    out = predicted(task, folder, write_rows(tmp_path / "new.jsonl", new), *flags)
    assert "texts      12 of 12 rows" in out
    assert "spent " in out
    answers = answers_in(output_of(folder))
    added = ["prediction", "parsed"] + ["confidence"] * ("constrained" in flags)
    assert [list(row) for row in answers] == [["id", column, *added]] * 12
    for row, other in zip(answers, scored, strict=True):
        assert {name: row[name] for name in added} == {name: other[name] for name in added}
    assert [{name: row[name] for name in ("id", column)} for row in answers] == new


def test_bad_rows_are_named_by_their_lines_and_kept_with_null(run, tmp_path):
    task, folder = run
    column, good = NAMES[task][1], [row[NAMES[task][1]] for row in rows_of(task, 2)]
    lines = [
        json.dumps({column: good[0], "n": 1}),
        '{"n": 2.50}',
        "",
        f'{{"{column}": "  ", "n": 3}}',
        f'{{"{column}": 4, "n": 1e400}}',
        "no JSON at all",
        '["a list"]',
        f'{{"{column}": null}}',
        "{}",
        json.dumps({column: good[1]}),
    ]
    (tmp_path / "new.jsonl").write_text("\n".join(lines))
    out = predicted(task, folder, tmp_path / "new.jsonl")
    assert "texts      2 of 9 rows" in out
    assert "7 without a text" in out
    assert f'line 2 has no column "{column}"' in out
    assert f"line 4 is empty in {column}" in out
    assert f'line 5: column "{column}" holds a number' in out
    assert "line 6 is not JSON" in out
    assert "line 7 is no JSON object" in out
    assert "and 2 more" in out
    written = output_of(folder).read_text().splitlines()
    null = '"prediction": null, "parsed": null}'
    assert written[1:-1] == [
        f'{{"n": 2.50, {null}',
        f'{{"{column}": "  ", "n": 3, {null}',
        f'{{"{column}": 4, "n": 1e400, {null}',
        f'{{"unreadable": "no JSON at all", {null}',
        f'{{"unreadable": "[\\"a list\\"]", {null}',
        f'{{"{column}": null, {null}',
        f"{{{null}",
    ]
    assert all(json.loads(written[i])["prediction"] for i in (0, -1))


@pytest.mark.parametrize("run", ["classification"], indirect=True)
def test_a_killed_prediction_goes_on_and_ends_with_the_same_bytes(run, tmp_path):
    task, folder = run
    file = write_rows(tmp_path / "new.jsonl", rows_of(task, 10))
    whole, flags = tmp_path / "whole.jsonl", ("--eval_batch_size", 1, "--max_new_tokens", 10)
    predicted(task, folder, file, *flags, "--predictions_file", whole)
    before = whole.read_bytes()

    def some_are_there() -> bool:
        kept = [*folder.glob(".predictions-*.answers.jsonl")]
        return bool(kept) and kept[0].read_text().count("\n") > 2

    words = ("--experiment_dir", folder, "--predict_file", file, *flags)
    kill(start_until(some_are_there, f"llama2_{task}_inference.py", *words))
    assert [path.suffix for path in folder.glob("predictions-*")] == [".json"]
    assert "unfinished\t" in predicted(task, folder, file, "--dry_run", *flags)
    out = predicted(task, folder, file, *flags)
    assert "resumed    " in out
    assert "resumed    no answer" not in out
    assert output_of(folder).read_bytes() == before
    assert not [*folder.glob(".predictions*")]
    again = predicted(task, folder, file, *flags)
    assert again.startswith(f"finished   {output_of(folder)}\npredicted  10 texts")
    assert "finished\t" in predicted(task, folder, file, "--dry_run", *flags)
    record = Path(f"{output_of(folder)}.json")
    record.write_text(record.read_text().replace('"finished",', '"running",', 1))  # killed before its end
    assert "decoding " in predicted(task, folder, file, *flags)
    assert json.loads(record.read_text())["status"] == "finished"
    assert "decoding " in predicted(task, folder, file, "--force", *flags)
    assert output_of(folder).read_bytes() == before


@pytest.mark.parametrize("run", ["classification"], indirect=True)
def test_what_exists_from_anything_else_is_refused(run, tmp_path):
    task, folder = run
    file = write_rows(tmp_path / "new.jsonl", rows_of(task, 2))
    output = "--predictions_file", tmp_path / "out.jsonl"
    predicted(task, folder, file, *output)
    length = error_line(predict(task, folder, file, *output, "--max_seq_length", 300))
    assert f"{output[1]} was made from --max_seq_length 512, not 300: name another" in length
    other = write_rows(tmp_path / "other.jsonl", rows_of(task, 3))
    assert "was made from another input" in error_line(predict(task, folder, other, *output))
    more = ("--learning_rate", "1e-3", "--force", "--experiment_dir", folder)
    assert run_preloaded(f"llama2_{task}.py", *flags_of(task), *more).returncode == 0
    line = error_line(predict(task, folder, file, *output))
    assert "was made from another adapter: name another --predictions_file, or --force" in line
    assert "predicted  3 texts" in predicted(task, folder, other, *output, "--force")
    assert len(answers_in(output[1])) == 3


def test_a_failure_is_recorded_and_leaves_no_predictions(run, tmp_path):
    task, folder = run
    file = write_rows(tmp_path / "new.jsonl", rows_of(task, 2))
    weights = folder / "adapter/adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-64])
    assert "is not the adapter" in error_line(predict(task, folder, file))
    [record] = folder.glob("predictions-*")
    assert json.loads(record.read_text())["status"] == "failed"
    weights.write_bytes(whole)
    predicted(task, folder, file)
    assert json.loads(record.read_text())["status"] == "finished"
    assert output_of(folder)


@pytest.mark.parametrize("run", ["classification"], indirect=True)
def test_tables_and_trainings_see_nothing_of_predictions(run, tmp_path):
    task, folder = run

    def report() -> str:
        command = [sys.executable, "-m", "study.report", str(folder)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    scoring = (f"llama2_{task}_inference.py", "--experiment_dir", folder, "--max_eval_samples", 4)
    assert run_preloaded(*scoring).returncode == 0
    before = report()
    predicted(task, folder, write_rows(tmp_path / "new.jsonl", rows_of(task, 2)))
    assert report() == before
    training = (f"llama2_{task}.py", *flags_of(task), "--experiment_dir", folder)
    assert run_preloaded(*training).stdout.startswith("finished")
    assert run_preloaded(*training, "--force").returncode == 0
    assert len(answers_in(output_of(folder))) == 2
    assert run_preloaded(*scoring).stdout.startswith("finished")


def test_several_columns_make_a_text_and_a_file_of_semicolons_stays_one(run, tmp_path):
    task, folder = run
    file, column = tmp_path / "new.csv", NAMES[task][1]
    file.write_bytes("\ufeffSubject;Body;n\r\nHockey;the puck;1,50\r\n;;2\r\nSpace;;\r\n".encode())
    flags = (
        ("--text_column", "Subject", "Body") if task == "classification" else ("--dialogue_column", "Body")
    )
    out = predicted(task, folder, file, *flags, "--predictions_file", tmp_path / "out.csv")
    assert (
        "line 3 is empty in Subject, Body" if task == "classification" else "line 3 is empty in Body"
    ) in out
    content = (tmp_path / "out.csv").read_bytes().decode()
    assert content.startswith("\ufeffSubject;Body;n;prediction;parsed\r\nHockey;the puck;1,50;")
    assert "\r\n;;2;;\r\n" in content
    assert f'has no column "{column}" but Subject, Body, n: name it by' in error_line(
        predict(task, folder, file)
    )


# Without a model


def rows_from(path: Path, delimiters: str = "") -> tabular.Rows:
    return tabular.read(path, files.content_of(path, "--predict_file"), "--predict_file", COLUMNS, delimiters)


def written(path: Path, rows: tabular.Rows) -> Path:
    count = len(rows.values)
    tabular.write(
        path,
        rows,
        {"prediction": [None, *["a, b"] * (count - 1)], "confidence": [None, *[0.1] * (count - 1)]},
    )
    return path


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["new.csv", "new.csv.gz", "new.tsv"])
def test_csv_keeps_every_string(tmp_path, mark, ends, name):
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=mark, lineterminator=ends, quoting=csv.QUOTE_ALL)
    writer.writerows([list(HARD[0]), *(row.values() for row in HARD)])
    content = text.getvalue().encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    rows = rows_from(tmp_path / name, mark if mark == "|" else "")
    assert rows.values == HARD
    again = files.content_of(written(tmp_path / f"out-{name}", rows), "").decode()
    header, *cells = csv.reader(io.StringIO(again, newline=""), delimiter=mark, strict=True)
    assert header == ["id", "text", "n", "prediction", "confidence"]
    assert [dict(zip(header[:3], row[:3], strict=True)) for row in cells] == HARD
    assert [row[3:] for row in cells] == [["", ""], *[["a, b", "0.1"]] * 3]
    assert again.count(ends) > 4
    assert ends == "\r\n" or again.splitlines()[0] + "\n" == again[: again.find("\n") + 1]


def test_csv_names_a_row_with_too_many_cells_and_fills_one_with_too_few(tmp_path):
    (tmp_path / "new.csv").write_text('id,text,n\n1,"two\nlines",2\n2,too,many,cells\n3,few\n\n4,last,1\n')
    rows = rows_from(tmp_path / "new.csv")
    assert rows.places == ["line 2", "line 4", "line 5", "line 7"]
    assert list(rows.faults) == [1]
    assert rows.faults[1].startswith("has 4 cells, the header 3")
    out = written(tmp_path / "out.csv", rows).read_text().splitlines()
    assert out[3:] == ['2,too,"many,cells","a, b",0.1', '3,few,,"a, b",0.1', '4,last,1,"a, b",0.1']


def test_json_stays_as_it_is_spelled_in_lines_arrays_and_over_several_lines(tmp_path):
    hard = '"text": "caf\\u00e9 \\ud800", "n": 1.10, "big": 12345678901234567890123, '
    hard += '"deep": {"a": [1.0, null]}, "x": 1, "x": 2'
    more = ['"prediction": null, "confidence": null}', '"prediction": "a, b", "confidence": 0.1}']
    contents = {
        "lines.jsonl": (f"{{{hard}}}\r\n\n {{ }}\n", f"{{{hard}, {more[0]}\n{{{more[1]}\n"),
        "array.json": (
            f'[{{{hard}}}, \n "no object"]',
            f'[\n{{{hard}, {more[0]},\n{{"unreadable": "\\"no object\\"", {more[1]}\n]\n',
        ),
        "several.json": (f"{{\n {hard}\n}}\n{{\n}}", f"{{\n {hard}, {more[0]}\n{{{more[1]}\n"),
    }
    for name, (before, after) in contents.items():
        (tmp_path / name).write_text(before)
        rows = rows_from(tmp_path / name)
        assert rows.places == [
            "line 1",
            {"lines.jsonl": "line 3", "array.json": "line 2", "several.json": "line 4"}[name],
        ]
        assert written(tmp_path / f"out-{name}", rows).read_text() == after
    lines = written(tmp_path / "out.jsonl", rows).read_text()
    assert lines == f"{{  {hard}, {more[0]}\n{{{more[1]}\n"


def test_parquet_keeps_its_types(tmp_path):
    from datetime import UTC, datetime
    from decimal import Decimal

    columns = {
        "text": pyarrow.array(["a", None, "c"]).dictionary_encode(),
        "small": pyarrow.array([1, None, 3], pyarrow.int8()),
        "when": pyarrow.array([datetime(2024, 1, 1, tzinfo=UTC)] * 3, pyarrow.timestamp("ns", "UTC")),
        "exact": pyarrow.array([Decimal("1.10")] * 3),
        "lists": pyarrow.array([[1.5], [], None]),
        "bytes": pyarrow.array([b"\xff"] * 3),
    }
    table = pyarrow.table(columns).replace_schema_metadata({"mine": "kept"})
    pyarrow.parquet.write_table(table, tmp_path / "new.parquet")
    rows = rows_from(tmp_path / "new.parquet")
    assert [row["text"] for row in rows.values] == ["a", None, "c"]
    again = pyarrow.parquet.read_table(written(tmp_path / "out.parquet", rows))
    assert again.select(table.column_names).equals(table)
    assert again.schema.metadata[b"mine"] == b"kept"
    assert again.column("confidence").to_pylist() == [None, 0.1, 0.1]
    with pytest.raises(files.UserError, match=r"out.jsonl can't hold bytes: name a .parquet"):
        written(tmp_path / "out.jsonl", rows)
    rows.origin = table.drop_columns(["bytes"])
    first = answers_in(written(tmp_path / "out.jsonl", rows))[0]
    assert first == {
        "text": "a",
        "small": 1,
        "when": "2024-01-01 00:00:00+00:00",
        "exact": "1.10",
        "lists": [1.5],
    } | {"prediction": None, "confidence": None}


def test_the_name_of_the_output_chooses_its_format(tmp_path):
    write_rows(tmp_path / "new.jsonl", [{"text": "a\rb", "n": 1.5, "l": [1]}, {"text": "c", "extra": True}])
    rows = rows_from(tmp_path / "new.jsonl")
    table = written(tmp_path / "out.tsv", rows).read_bytes()
    assert (
        table
        == b'text\tn\tl\textra\tprediction\tconfidence\n"a\rb"\t1.5\t[1]\t\t\t\nc\t\t\ttrue\ta, b\t0.1\n'
    )
    found = pyarrow.parquet.read_table(written(tmp_path / "out.parquet", rows)).to_pylist()
    assert found[1] == {
        "text": "c",
        "n": None,
        "l": None,
        "extra": True,
        "prediction": "a, b",
        "confidence": 0.1,
    }
    mixed = write_rows(tmp_path / "mixed.jsonl", [{"text": "a", "n": 1}, {"text": "b", "n": "one"}])
    with pytest.raises(files.UserError, match=r"can't be written as Parquet \(.*\): name a .jsonl"):
        written(tmp_path / "mixed.parquet", rows_from(mixed))
    (tmp_path / "twice.csv").write_text("text,n,n\na,1,2\nb,3,4\n")
    twice = rows_from(tmp_path / "twice.csv")
    assert (
        written(tmp_path / "out.csv", twice)
        .read_text()
        .startswith("text,n,n,prediction,confidence\na,1,2,,\n")
    )
    with pytest.raises(files.UserError, match=r'can\'t hold two columns named "n": name a .csv'):
        written(tmp_path / "out.jsonl", twice)


REFUSED = [
    ({"new.csv": "id,body\n1,a\n"}, (), 'has no column "text" but id, body: name it by --text_column'),
    ({"new.jsonl": '{"body": 1}\n'}, (), 'has no column "text" but body: name it by --text_column'),
    ({"new.csv": "text,parsed\na,b\n"}, (), 'has a column "parsed" already'),
    ({"new.jsonl": '{"text": "a"}\n{"confidence": 1}\n'}, (), 'has a column "confidence" already'),
    ({"new.csv": ""}, (), "is empty"),
    ({"new.jsonl": "\n"}, (), "is empty"),
    ({"new.csv": "text\n"}, (), "is empty"),
    ({"new.jsonl": '{"text": " "}\n{"text": 1}\n'}, (), "has no text to answer: line 1 is empty in text"),
    ({"new.jsonl": "text\nmore\n"}, (), "has no row that can be read: line 1 is not JSON"),
    ({"new.csv": 'text\n"a\n'}, (), "line 2 is not CSV"),
    ({"new.csv": b"text\n\xff\n"}, (), "line 2 is not UTF-8 text"),
    ({"new.txt": "a"}, (), "the name must end in .jsonl"),
    ({}, (), "there is no such file"),
    ({"new.csv/a": ""}, (), "is a folder: name a file"),
    ({"new.parquet": "text"}, (), "is not a Parquet file"),
    ({"new.csv": "text\na\n"}, ("--predictions_file", "new.csv"), "would replace the --predict_file itself"),
    (
        {"a.csv.json": '{"text": "a"}'},
        ("--predictions_file", "a.csv"),
        "would replace the --predict_file itself",
    ),
    ({"new.csv": "text\na\n"}, ("--predictions_file", "none/a.csv"), "no such folder"),
    ({"new.csv": "text\na\n"}, ("--predictions_file", "a.xlsx"), "the name must end in .jsonl"),
    ({"new.csv": "text\na\n"}, ("--predictions_file", "."), "the name must end in .jsonl"),
    (
        {"new.csv": "text\na\n"},
        ("--predictions_file", "eval-1.csv"),
        "is the name of what an evaluation leaves",
    ),
    (
        {"new.csv": "text\na\n"},
        ("--predictions_file", "train.json"),
        "is the name of what an evaluation leaves",
    ),
    ({"new.csv": "text\na\n", "a.csv": "mine"}, ("--predictions_file", "a.csv"), "is there already"),
    (
        {"new.csv": "text\na\n", "a.csv": "mine"},
        ("--predictions_file", "a.csv", "--force"),
        "is there already",
    ),
    (
        {"new.csv": "text\na\n", "a.csv.json": "{}"},
        ("--predictions_file", "a.csv"),
        "is no record of predictions",
    ),
]


@pytest.mark.parametrize(("contents", "flags", "message"), REFUSED)
def test_each_bad_file_is_refused_in_a_line(classifier, tmp_path, monkeypatch, contents, flags, message):
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    words = [tmp_path / flag if i and not flag.startswith("--") else flag for i, flag in enumerate(flags)]
    source = tmp_path / (next(iter(contents), "new.csv").partition("/")[0])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for more in ((), ("--dry_run",)):
        done = predict("classification", classifier, source, *words, *more)
        assert message in error_line(done)
        assert done.returncode == 1
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_the_predictions_of_an_evaluation_are_not_replaced(classifier, tmp_path):
    file = write_rows(tmp_path / "new.jsonl", [{"text": "a"}])
    for name in ("predictions.jsonl", "predictions-0a1b2c3d.jsonl"):
        line = error_line(
            predict("classification", classifier, file, "--predictions_file", classifier / name)
        )
        assert "is the name of what an evaluation leaves" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--predict_file", "a.csv", "--experiment_dir", "a", "b"),
            "of one run, and --experiment_dir names several",
        ),
        (("--predict_file", "a.csv", "--also_epochs", "1"), "of one run, and --also_epochs names several"),
        (("--predict_file", "a.csv", "--max_eval_samples", "5"), "--max_eval_samples chooses what is scored"),
        (("--predict_file", "a.csv", "--split", "test"), "--split chooses what is scored"),
        (("--predictions_file", "a.csv"), "--predictions_file goes with --predict_file"),
    ],
)
def test_flags_that_contradict_are_bad_usage(flags, message):
    done = run_preloaded("llama2_classification_inference.py", *flags)
    assert message in error_line(done)
    assert done.returncode == 2


def test_loops_leave_it_to_the_scripts(tmp_path):
    command = [ROOT / "sample_ablate.sh", "--predict_file", "a.csv", "--output_dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: --predict_file: a loop trains and scores; the inference script of a run takes it\n"
    )


def test_a_dry_run_says_what_would_be_done(classifier, tmp_path):
    file = tmp_path / "new.csv"
    file.write_text("text;n\n" + "".join(f"{'a' * (i > 7)};{i}\n" for i in range(20)))
    out = predicted("classification", classifier, file, "--dry_run")
    assert "texts      12 of 20 rows" in out
    assert "8 without a text" in out
    assert "line 2 is empty in text" in out
    assert "and 3 more" in out
    last = out.splitlines()[-1]
    assert last.startswith(f"not started\t{classifier}/predictions-")
    assert last.endswith(".csv")
    assert not [*classifier.glob("predictions*")]
