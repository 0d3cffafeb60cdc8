"""What grows with records, cells and rows grows no faster than these: counted as work, never as time."""

import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from conftest import DEMO_MODEL, ROOT, write_rows
from test_loops import loop
from test_report import evaluation, tuned

from study import classes, cli, data, encoding, files, reading, tokens
from study.dry_run import DryRun
from study.model import load_tokenizer
from study.records import record, runs
from study.report import __main__ as report
from study.report import collect, tables

ONE = {"RANKS": "4", "EPOCHS": "2", "DROPOUTS": "0.1"}


def as_linear(work: list[int]) -> bool:
    """Whether work on n, 2 n and 4 n things grows by a line, but for a tenth."""
    one, two, four = work
    return four - two <= 2.2 * (two - one)


def runs_like(folder: Path, configs: Iterable[dict]) -> list[collect.Run]:
    """Runs like that in `folder` but for these settings."""
    [run] = collect.runs_of(folder)
    found = []
    for config in configs:
        content = run.content | {"config": run.config | config}
        found.append(collect.Run(run.path, content, run.train, run.state, examples=run.examples))
    return found


def test_a_report_reads_each_record_once(tmp_path, monkeypatch, capsys):
    for seed in range(3):
        tuned(tmp_path / str(seed), 70, f"--seed {seed}", eval=evaluation(70, examples=50))
    looked_at, read = Counter(), record.read

    def counting(path: Path) -> dict | None:
        looked_at[path] += path.exists()
        return read(path)

    monkeypatch.setattr(record, "read", counting)
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    report.main()
    assert "Spent in all" in capsys.readouterr().out
    assert {path: count for path, count in looked_at.items() if count} == dict.fromkeys(
        (tmp_path / str(seed) / f"{part}.json" for seed in range(3) for part in ("train", "eval")), 1
    )


@pytest.mark.parametrize("setting", ["seed", "learning_rate", "batch_size"])
def test_tables_look_at_each_run_as_often_whatever_their_number(tmp_path, monkeypatch, setting):
    folder, looks = tuned(tmp_path / "run", 70, eval=evaluation(70, examples=50)), Counter()

    def looking(run: collect.Run, name: str):
        looks[len(found)] += 1
        return object.__getattribute__(run, name)

    for count in (20, 40, 80):
        found = runs_like(folder, ({setting: number + 1} for number in range(count)))
        with monkeypatch.context() as patch:
            patch.setattr(collect.Run, "__getattribute__", looking)
            tables.all_tables(collect.comparable(found), [])
    assert as_linear([*looks.values()]), looks


def test_a_script_has_its_flags_built_once_for_all_runs(monkeypatch):
    built, build = [], cli.build_parser
    monkeypatch.setattr(cli, "build_parser", lambda *about: built.append(about) or build(*about))
    runs.plain_flags.cache_clear()
    args = cli.parse_args("classification", "", [])
    built.clear()
    assert {runs.folder_of(args, "qlora") for args.seed in range(9)}
    assert len(built) == 1


def test_a_dry_run_starts_as_many_processes_whatever_the_number_of_cells(tmp_path):
    counter = tmp_path / "bin" / "python"
    counter.parent.mkdir()
    counter.write_text(f'#!/bin/sh\necho >> "$STARTED"\nexec {sys.executable} "$@"\n')
    counter.chmod(0o755)
    for name in ("awk", "sed", "grep", "tail"):
        found = shutil.which(name)
        (counter.parent / name).write_text(f'#!/bin/sh\necho >> "$STARTED"\nexec {found} "$@"\n')
        (counter.parent / name).chmod(0o755)
    started = []
    for seeds in ("1", "1 2 3"):
        env = {"PATH": f"{counter.parent}{os.pathsep}{os.environ['PATH']}", "STARTED": str(tmp_path / seeds)}
        done = loop(
            "run_lora.sh", "--dry_run", "--output_dir", tmp_path, cwd=tmp_path, SEEDS=seeds, **ONE, **env
        )
        assert f"{len(seeds.split())} cells" in done.stdout.splitlines()[-1]
        started.append((tmp_path / seeds).read_text().count("\n"))
    assert started[0] == started[1] < 4


def test_a_dry_run_reads_each_earlier_record_once(tmp_path, monkeypatch, capsys):
    for seed in range(3):
        tuned(tmp_path / str(seed), 70, f"--seed {seed}", eval=evaluation(70, examples=50))
    looked_at, read = Counter(), record.read
    monkeypatch.setattr(record, "read", lambda path: looked_at.update([path]) or read(path))
    monkeypatch.setattr(sys, "argv", [])  # which look-ups set, as this
    monkeypatch.setenv("DATA_CHECKED", "")
    asked = DryRun()
    for seed in range(5, 8):
        asked.cell("", str(ROOT / "llama2_classification_inference.py"), *lookup_of(tmp_path, seed))
    assert capsys.readouterr().out.count("\nnot started") == 3
    earlier = {path: count for path, count in looked_at.items() if path.parent.name in "012"}
    assert set(earlier.values()) == {1}
    assert len(earlier) == 6


def lookup_of(folder: Path, seed: int) -> list[str]:
    return ["--output_dir", str(folder), "--seed", str(seed), "--dry_run"]


# Rows

SEVERAL = [[5, 70_000, 0], [], [31_999], [7] * 9]


def test_rows_of_tokens_come_out_as_they_went_in_and_have_the_fingerprint_of_their_lists():
    rows = tokens.TokenRows(SEVERAL)
    assert [rows[0], rows[-1], rows[1:3], list(rows)] == [SEVERAL[0], SEVERAL[-1], SEVERAL[1:3], SEVERAL]
    assert (rows.lengths(), rows.largest(), rows == SEVERAL) == ([3, 0, 1, 9], 70_000, True)
    for held, plain in ((rows, SEVERAL), ([{"a": 1}, rows, "x"], [{"a": 1}, SEVERAL, "x"])):
        assert tokens.sha256_of(held) == hashlib.sha256(json.dumps(plain).encode()).hexdigest()
    assert tokens.sha256_of(tokens.TokenRows()) == hashlib.sha256(b"[]").hexdigest()


def test_many_examples_have_the_fingerprint_of_their_lists_and_take_5_bytes_a_token():
    examples = encoding.ExampleRows()
    for row in SEVERAL * 1000:
        examples.append(row, [2, 1])
    plain = [[example.answer_start, example.ids] for example in examples]
    assert plain[0] == [3, [5, 70_000, 0, 2, 1]]
    assert tokens.sha256_of(examples) == hashlib.sha256(json.dumps(plain).encode()).hexdigest()
    held = [examples.rows.ids, examples.rows.ends, examples.answer_starts]
    assert sum(map(sys.getsizeof, held[:1])) <= 5 * sum(encoding.lengths(examples))


def test_texts_are_tokenized_some_at_a_time_in_their_order_each_once(monkeypatch):
    tokenizer, seen = load_tokenizer(str(DEMO_MODEL)), []
    texts = [f"text {i} of several" for i in range(9 * reading.TOGETHER)]

    def counting() -> Iterator[str]:
        for text in texts:
            seen.append(text)
            yield text

    found = reading.Reader(tokenizer).rows(counting())
    first = next(found)
    assert len(seen) <= (2 + reading.AHEAD) * reading.TOGETHER  # the others have not been asked for
    rows = [first.tolist(), *(row.tolist() for row in found)]
    assert rows == tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert seen == texts


def test_a_class_is_looked_at_once_however_many_rows_it_has(tmp_path, monkeypatch):
    looked, looks = Counter(), classes.looks
    for module in (classes, data):
        monkeypatch.setattr(module, "looks", lambda label: looked.update([label]) or looks(label))
    for rows in (100, 400):
        looked.clear()
        file = write_rows(
            tmp_path / "r.jsonl", [{"text": f"t {i}", "label": "ab"[i % 2]} for i in range(rows)]
        )
        data.load(cli.parse_args("classification", "", ["--train_file", str(file)]), ["train"])
        assert looked == {"a": 2, "b": 2}


def test_lines_of_json_are_read_once_and_one_by_one(tmp_path, monkeypatch):
    file = write_rows(tmp_path / "rows.jsonl", [{"text": f"t {i}", "label": "a"} for i in range(100)])
    monkeypatch.setattr(files, "content_of", None)  # which would hold all of it
    columns = {"--text_column": "text", "--label_column": "label"}
    found = list(files.read_file(file, "--train_file", columns))
    assert found == [(i + 1, {"text": f"t {i}", "label": "a"}) for i in range(100)]
