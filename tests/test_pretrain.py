"""The study's base learns from plain texts alone, and a killed pretraining goes on to the same weights."""

import json
import shlex
import sys

import pytest
from conftest import DEMO_DATA, PROCESS, ROOT, write_rows
from safetensors.torch import load_file

from study import checkpoint
from study.errors import UserError

sys.path.insert(0, str(ROOT / "demo"))

import definitions
import pretrain

SMALL = shlex.split("--vocabulary 300 --hidden 64 --inner 64 --layers 1 --block 32 --rows 64 --passes 3")


@pytest.fixture(autouse=True)
def deterministic_here_alone(monkeypatch):
    """What the script sets of PyTorch and the environment ends with the test."""
    import torch

    for name in ("CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC"):
        monkeypatch.setenv(name, "")  # so that it is put back
    precision = torch.get_float32_matmul_precision()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_float32_matmul_precision(precision)


def run(monkeypatch, folder, *more: object) -> None:
    texts = ["--texts", f"{DEMO_DATA / 'posts_train.jsonl'}:text"]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", str(folder), *texts, *SMALL, *map(str, more)])
    pretrain.main(PROCESS)


def test_a_killed_pretraining_goes_on_to_the_same_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "SAVE_SECONDS", 0)
    run(monkeypatch, tmp_path / "whole")
    keep = pretrain.Training.keep

    def keep_and_stop(training) -> None:
        keep(training)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Training, "keep", keep_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(monkeypatch, tmp_path / "killed")
    with pytest.raises(UserError, match="killed is of other settings: remove it"):
        run(monkeypatch, tmp_path / "killed", "--seed", 1)
    run(monkeypatch, tmp_path / "killed")
    assert "resumed at" in capsys.readouterr().out
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    about = json.loads((tmp_path / "killed" / "pretraining.json").read_text())
    losses = [entry["bits_per_byte"] for entry in about["history"]]
    assert losses == sorted(losses, reverse=True)
    assert about["best"] == about["history"][-1]
    assert checkpoint.identify(str(tmp_path / "killed"))["eos_token_id"] == [2]
    run(monkeypatch, tmp_path / "killed")
    assert f"finished   {tmp_path / 'killed'}" in capsys.readouterr().out


def test_no_excluded_text_is_learned_spaces_apart_and_none_twice(tmp_path):
    rows = [{"text": f"text {i}"} for i in range(400)]
    train = write_rows(tmp_path / "train.jsonl", [*rows, {"text": " text  7\n"}, {"text": "  "}])
    test = write_rows(tmp_path / "test.jsonl", [{"text": "text\n8"}, {"text": "elsewhere"}])
    [source] = pretrain.read_sources([f"{train}:text"], [f"{test}:text"])
    assert (source.excluded, source.repeated) == (1, 1)
    assert sorted(source.learned + source.held) == sorted(f"text {i}" for i in range(400) if i != 8)
    assert not {*source.learned} & {*source.held}


def test_a_held_out_perplexity_that_no_longer_falls_ends_it():
    training = pretrain.Training.__new__(pretrain.Training)
    training.args = pretrain.argparse.Namespace(patience=2)
    training.history = [{"bits_per_byte": bits} for bits in (3.0, 2.0, 2.5)]
    assert (training.best(), training.is_past_its_best()) == (1, False)
    training.history.append({"bits_per_byte": 2.1})
    assert training.is_past_its_best()


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("posts.jsonl", "--texts .*posts.jsonl: name the column too, as in .*:text"),
        ("posts.jsonl:words", 'row 1 has no column "words" but text: name it by --texts'),
        ("few.jsonl:text", "--texts .*few.jsonl:text: no text is left to hold out"),
    ],
)
def test_bad_input_is_one_line(tmp_path, place, line):
    write_rows(tmp_path / "posts.jsonl", [{"text": f"text {i}"} for i in range(99)])
    write_rows(tmp_path / "few.jsonl", [{"text": "one"}])
    with pytest.raises(UserError, match=line):
        pretrain.read_sources([str(tmp_path / place)], [])


def test_two_files_of_one_name_and_a_width_without_whole_heads_are_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "a").mkdir()
    for folder in (tmp_path, tmp_path / "a"):
        write_rows(folder / "posts.jsonl", [{"text": f"{folder} {i}"} for i in range(200)])
    with pytest.raises(UserError, match="another file has that name: rename one"):
        pretrain.read_sources(
            [f"{tmp_path / 'posts.jsonl'}:text", f"{tmp_path / 'a' / 'posts.jsonl'}:text"], []
        )
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "base", "--hidden", 100)
    assert "--hidden 100 is no multiple of 64" in capsys.readouterr().err


def test_words_that_share_a_meaning_become_one_text_without_marks():
    dictionary = (
        "00-database-info\nnone of this\nabet\n    v 1: assist or encourage, usually\n       in wrongdoing\n"
        "abettal\n    n 1: the act of urging on [syn: {abetment},\n         {abettal}]\n    2: help\n"
        "abetment\n    n 1: the act of urging on [syn: {abetment}]\n"
        "ADT\n\n   <programming> (ADT) A kind of {data\n   abstraction}.\n\n   (2003-07-03)\n"
    )
    assert list(definitions.texts(dictionary)) == [
        "abet: assist or encourage, usually in wrongdoing",
        "abettal, abetment: the act of urging on",
        "abettal: help",
        "ADT: (ADT) A kind of data abstraction.",
    ]
