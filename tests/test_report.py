"""The report: hand-checked tables, states, groups, published figures, prices, traces, paired tests, plots."""

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import PROCESS, ROOT, error_line, write_rows
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from study import cli, metrics
from study.errors import UserError
from study.records import record, runs, schema
from study.report import plots
from study.report.cells import Table
from study.report.classes import Confusion
from study.report.collect import comparable, find_runs
from study.report.compare import compare
from study.report.published import FIGURES
from study.report.selection import usual_runs
from study.report.tables import all_tables

GPU = "NVIDIA A10G"
TABLE_1 = "Table 1: classification: accuracy by training share"
UNTRAINED = "zero-shot, free decoding"
METHODS = "Table 2: classification: zero-shot, few-shot and fine-tuned"
CLASSES = "Classes: classification: precision, recall and F1, the lowest F1 first"
CONFUSIONS = "Confusions: classification: which class is taken for which, the most frequent first"
TRAINING, SERVING = "Tables 4 and 5: time and cost to train", "Inference: speed and cost to serve"
SERVED = "Inference, published: speed and cost to serve"
COST = {"gpu": GPU, "price_per_hour": 3.6, "price_source": "x", "price_date": "2024"}  # $0.001 a s


def save(folder: Path, part: str, task: str, words: str, method: str, /, **more) -> dict:
    """Write a finished record as the scripts do; `more` replaces or adds parts of it."""
    folder.mkdir(parents=True, exist_ok=True)
    baseline = method != "qlora"
    args = cli.parse_args(None if baseline else task, "", ["--pretrained_ckpt", "a/small", *words.split()])
    rows = more.get("eval", {}).get("examples", 1000)
    split = {"source": f"{part}.jsonl", "rows": rows, "sha256": "5" * 64}
    name = "baseline" if baseline else task + ("_inference" if part == "eval" else "")
    content = {
        **{"schema": 1, "status": "finished", "script": f"llama2_{name}.py", "task": args.task},
        **{"method": method, "model": args.pretrained_ckpt, "prompt_sha256": method[0] * 64, "cost": COST},
        "config": {name: value for name, value in vars(args).items() if name != "given"},
        "data": {"train" if part == "train" else args.split: split},
        "environment": {"git_commit": "c0ffee"},
        "finished": "2024-01-01T00:00:00.000+00:00",
    }
    record.write_json(folder / f"{part}.json", content | more)
    return content | more


def evaluation(value: float, task: str = "classification", examples: int = 1000, **more) -> dict:
    """The `eval` of a record: so many percent of the answers are right, and about half of the others invalid;
    or ROUGE-1 is so much on average, ROUGE-2 half of it and ROUGE-L 4/5."""
    right, order = round(examples * value / 100), np.random.default_rng(0).permutation(examples)
    if task == "classification":
        references = ["ab"[i % 2] for i in range(examples)]
        rows = [{"parsed": reference, "reference": reference} for reference in references]
        for i in order[right:]:
            rows[i]["parsed"] = None if i % 4 < 2 else {"a": "b", "b": "a"}[references[i]]
    else:
        each = [value + (8 if i % 2 else -8) for i in range(examples)]
        rows = [{"rouge1": v, "rouge2": v / 2, "rougeL": 0.8 * v, "rougeLsum": v} for v in each]
    sizes = {"examples": examples, "input_tokens": 100_000, "output_tokens": 2000, "peak_memory_gib": 5.0}
    speed = {"seconds": 50.0, "wall_seconds": 100.0, "examples_per_second": 20.0}
    scores = metrics.summed_up(task, rows) | {"metrics_version": "2, r"}
    return {**scores, "decoding": "free", **sizes, **speed, **more}


def tuned(folder: Path, value: float | None, words="", task="classification", train=None, **more):
    """A finished training and, unless `value` is None, its evaluation."""
    spent = {"seconds": 360.0, "wall_seconds": 400.0, "tokens_per_second": 1000.0, "peak_memory_gib": 10.0}
    history = [[step, 2 / step] for step in range(1, 41)]
    spent |= {"examples": 480, "loss_history": history, "schedule": "constant", **(train or {})}
    spent = {name: value for name, value in spent.items() if value is not None or name == "tokens_per_second"}
    when = {"finished": more["finished"]} if "finished" in more else {}
    content = save(folder, "train", task, words, "qlora", train=spent, **when)
    if value is not None:
        more = {"eval": evaluation(value, task), "training": content["finished"], **more}
        save(folder, "eval", task, words, "qlora", **more)
    return folder


def baseline(root: Path, value: float, words: str = "", task: str = "classification", **more) -> None:
    kind = "few-shot" if "few-shot" in words else "zero-shot"
    folder = root / "baseline" / "a--small" / task / kind
    more = {"eval": evaluation(value, task, seconds=20.0, examples_per_second=50.0), **more}
    save(folder, "eval", task, f"--task_type {task} {words}", kind, **more)


def competitor(root: Path, method: str, value: float, words: str, kind: str, prompt: str = "") -> None:
    """A finished run of another kind of script, by a model of its own name."""
    task = None if kind == "t5" else "classification"
    args = cli.parse_args(task, "", ["--pretrained_ckpt", f"a/{method}", *words.split()], kind)
    spent = {"seconds": 9.0, "wall_seconds": 9.0, "tokens_per_second": 9.0, "peak_memory_gib": 1.0}
    spent |= {"examples": 480, "loss_history": [[1, 2.0]]}
    for part, measured in (("train", spent), ("eval", evaluation(value))):
        more = {"method": method, "model": args.pretrained_ckpt, part: measured}
        more |= {"config": {name: flag for name, flag in vars(args).items() if name != "given"}}
        more |= {"training": "2024-01-01T00:00:00.000+00:00"} if part == "eval" else {}
        save(root / method, part, "classification", "", "qlora", **more, prompt_sha256=prompt)


def report(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "study.report", *map(str, words)]
    options = {"capture_output": True, "text": True, "errors": "replace"}
    return subprocess.run(command, cwd=ROOT, check=False, **options)


def printed(text: str) -> dict[str, list[list[str]]]:
    """The tables of Markdown: by heading the lines of cells, of which the first are the titles."""
    found = {}
    for section in re.split("^## ", text, flags=re.M)[1:]:
        lines = [line.strip("| ") for line in section.splitlines() if line.startswith("|")]
        rows = [re.split(r"\s+\|\s+", line) for line in lines if line[:2] != "--"]
        found[section.partition("\n")[0]] = rows
    return found


def tables(*folders: Path) -> dict:
    """By name and title."""
    found, problems = find_runs(folders)
    assert not problems
    return {f"{t.name}: {t.title}": t for t in all_tables(comparable(found), [])}


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """Two models, three seeds, a LoRA grid with a hole, a baseline, and both tasks."""
    root = tmp_path_factory.mktemp("study")
    for seed, value in ((1, 60), (2, 62), (3, 64)):
        words = f"--train_sample_fraction 0.1 --seed {seed}"
        tuned(root / f"seed {seed}", value, words, train={"examples": 48})
    tuned(root / "whole", 70)
    tuned(root / "rank", 75, "--lora_r 16")
    tuned(root / "epochs", 72.5, "--epochs 10")
    long = {"seconds": 7000.0, "wall_seconds": 7200.0}
    tuned(root / "big", 80, "--pretrained_ckpt b/big", train=long)
    baseline(root, 20)
    tuned(root / "summaries", 50, task="summarization")
    baseline(root, 30, "--prompt_type few-shot", task="summarization")
    return root


# Tables

SCORED = ("model", "method", "trained on")
GOLDEN = {
    TABLE_1: [
        ["training share", "examples", "a/small", "b/big", "b/big - a/small"],
        # 600 of 1000 are right with all seeds, 20 with two, 20 with one: MS_seed = 1000 (2 * 0.02^2) / 2,
        # MS_example = 0.6808, MS_rest = 0.0129, V = 0.000356 with 14.2 degrees of freedom: 0.0404.
        # By the seeds alone: 4.303 sqrt(0.4 / 3000) = 0.0497. Wilson bends 0.62 +- 0.0497.
        ["10 %", "48", "62.00 [56.9, 66.8] (3)", "—", "—"],
        # Wilson of 700 of 1000: (0.7 + 0.00192) / 1.00384 +- sqrt(0.00384 (0.21 + 0.00096)) / 1.00384
        # 100 of 1000 won and none lost: 0.1 +- 1.962 sqrt((101 - 100^2 / 1002) / 1001 / 1002)
        ["100 %", "480", "70.00 [67.1, 72.8] (1)", "80.00 [77.4, 82.4] (1)", "+10.00 [+8.1, +11.9] (1)"],
    ],
    METHODS: [
        [*SCORED, "accuracy", "macro F1", "invalid answers", "accuracy - a/small, zero-shot, free decoding"],
        *(
            line.split(" | ")
            for line in (
                "a/small | zero-shot, free decoding | — | 20.00 [17.6, 22.6] | 25.04 [22.2, 28.1]"
                " | 40.50 [37.5, 43.6] | reference",
                "a/small | few-shot | — | — | — | — | —",
                "a/small | fine-tuned | 480 | 70.00 [67.1, 72.8] (1) | 75.92 [73.3, 78.4] (1)"
                " | 15.60 [13.5, 18.0] (1) | +50.00 [+46.9, +53.1] (1)",
                "b/big | zero-shot | — | — | — | — | —",
                "b/big | few-shot | — | — | — | — | —",
                "b/big | fine-tuned | 480 | 80.00 [77.4, 82.4] (1) | 84.20 [81.9, 86.3] (1)"
                " | 10.00 [8.3, 12.0] (1) | +60.00 [+57.0, +63.0] (1)",
            )
        ),
    ],
    CLASSES: [
        ["model", "class", "test examples", "precision", "recall", "F1"],
        *(
            line.split(" | ")
            for line in (
                # 345 of 500 b are right, and 412 answers are b: Wilson of 345 / 412 and of 345 / 500. 567 are
                # of either: of 345 / 567 it is 56.8 to 64.8 %, as F1 2 x 0.568 / 1.568 to 2 x 0.648 / 1.648.
                "a/small | b | 500 | 83.74 [79.9, 87.0] (1)"
                " | 69.00 [64.8, 72.9] (1) | 75.66 [72.4, 78.6] (1)",
                "a/small | a | 500 | 82.18 [78.3, 85.5] (1)"
                " | 71.00 [66.9, 74.8] (1) | 76.18 [73.0, 79.1] (1)",
                "b/big | b | 500 | 91.08 [88.0, 93.4] (1) | 77.60 [73.7, 81.0] (1) | 83.80 [81.1, 86.2] (1)",
                "b/big | a | 500 | 86.92 [83.6, 89.7] (1) | 82.40 [78.8, 85.5] (1) | 84.60 [82.0, 86.9] (1)",
                f"a/small, {UNTRAINED} | b | 500"
                " | 33.21 [27.9, 39.0] | 18.40 [15.2, 22.0] | 23.68 [19.9, 27.9]",
                f"a/small, {UNTRAINED} | a | 500"
                " | 33.96 [29.0, 39.3] | 21.60 [18.2, 25.4] | 26.41 [22.6, 30.6]",
            )
        ),
    ],
    CONFUSIONS: [
        ["model", "reference", "answer", "count", "share of the reference"],
        *(
            line.split(" | ")
            for line in (
                "a/small | a | (invalid) | 78 | 15.6 %",
                "a/small | b | (invalid) | 78 | 15.6 %",
                "a/small | b | a | 77 | 15.4 %",
                "a/small | a | b | 67 | 13.4 %",
                "b/big | b | a | 62 | 12.4 %",
                "b/big | a | (invalid) | 50 | 10.0 %",
                "b/big | b | (invalid) | 50 | 10.0 %",
                "b/big | a | b | 38 | 7.6 %",
                "a/small, zero-shot, free decoding | b | a | 210 | 42.0 %",
                "a/small, zero-shot, free decoding | a | (invalid) | 207 | 41.4 %",
                "a/small, zero-shot, free decoding | b | (invalid) | 198 | 39.6 %",
                "a/small, zero-shot, free decoding | a | b | 185 | 37.0 %",
            )
        ),
    ],
    "LoRA ablation: classification: accuracy by rank, epochs and dropout, a/small, 100 % of the examples": [
        ["dropout", "rank", "5 epochs", "10 epochs"],
        ["0.1", "8", "70.00 [67.1, 72.8] (1)", "72.50 [69.7, 75.2] (1)"],
        ["0.1", "16", "**75.00 [72.2, 77.6] (1)** best", "—"],
    ],
    "LoRA effects: classification: accuracy by steps of one knob, a/small, 100 % of the examples": [
        ["knob", "from", "to", "difference in accuracy", "settings", "pairs"],
        # 50 of 1000 more are right: 0.05 +- 1.962 sqrt(0.05 * 0.95 / 999)
        ["rank", "8", "16", "+5.00 [+3.6, +6.4] (1)", "1", "1"],  # at 5 epochs: rank 16 has no score at 10
        ["epochs", "5", "10", "+2.50 [+1.5, +3.5] (1)", "1", "1"],
    ],
    "Table 2: summarization: zero-shot, few-shot and fine-tuned": [
        [*SCORED, "ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-1 - few-shot"],
        ["a/small", "zero-shot", "—", "—", "—", "—", "—"],
        # 8 points above and below the mean: 8 * 1.962 / sqrt(999) = 0.50
        *(
            line.split(" | ")
            for line in (
                "a/small | few-shot | — | 30.00 [29.5, 30.5] (1) | 15.00 [14.8, 15.3] (1)"
                " | 24.00 [23.6, 24.4] (1) | reference",
                "a/small | fine-tuned | 480 | 50.00 [49.5, 50.5] (1) | 25.00 [24.8, 25.2] (1)"
                " | 40.00 [39.6, 40.4] (1) | +20.00 [+20.0, +20.0] (1)",
            )
        ),
    ],
    "Table 3: summarization: models, each on all that it was fine-tuned on": [
        ["model", "trained on", "ROUGE-1", "ROUGE-2", "ROUGE-L"],
        [
            "a/small",
            "480",
            *(f"{v} (1)" for v in ("50.00 [49.5, 50.5]", "25.00 [24.8, 25.2]", "40.00 [39.6, 40.4]")),
        ],
    ],
    TRAINING: [
        [
            *("model", "task", "trained on", "epochs", "seeds", "loading", "training", "evaluation", "all"),
            *("tokens/s", "peak GiB", "GPU", "training cost", "evaluation cost", "cost"),
        ],
        [  # loading 400 - 360 s; $3.60/h is $0.001 per second of 400 and 100 s
            *("a/small", "classification", "480", "5", "1", "40 s", "6.0 min", "1.7 min", "8.3 min"),
            *("1,000", "10.0", GPU, "$0.40", "$0.10", "$0.50"),
        ],
        [  # 7,200 and 100 s are 2.03 h
            *("b/big", "classification", "480", "5", "1", "3.3 min", "1.9 h", "1.7 min", "2.0 h"),
            *("1,000", "10.0", GPU, "$7.20", "$0.10", "$7.30"),
        ],
        [
            *("a/small", "summarization", "480", "1", "1", "40 s", "6.0 min", "1.7 min", "8.3 min"),
            *("1,000", "10.0", GPU, "$0.40", "$0.10", "$0.50"),
        ],
    ],
    SERVING: [
        [
            *("model", "task", "method", "examples", "examples/s", "tokens in", "tokens out", "peak GiB"),
            *("GPU", "per 1,000 examples", "per 1K input tokens", "per 1K output tokens"),
        ],
        *(  # 50 s or 20 s at $0.001 for 1,000 examples, 100,000 tokens read and 2,000 written
            [*place, "1,000", speed, "100,000", "2,000", "5.0", GPU, *rates]
            for *place, speed, rates in (
                ("a/small", "classification", "fine-tuned", "20.0", ["$0.050", "$0.00050", "$0.025"]),
                (
                    "a/small",
                    "classification",
                    "zero-shot, free decoding",
                    "50.0",
                    ["$0.020", "$0.00020", "$0.010"],
                ),
                ("b/big", "classification", "fine-tuned", "20.0", ["$0.050", "$0.00050", "$0.025"]),
                ("a/small", "summarization", "few-shot", "50.0", ["$0.020", "$0.00020", "$0.010"]),
                ("a/small", "summarization", "fine-tuned", "20.0", ["$0.050", "$0.00050", "$0.025"]),
            )
        ),
    ],
}


def test_scores_of_other_weights_under_the_same_name_never_share_a_cell(tmp_path):
    for seed, digit in ((1, "a"), (2, "a"), (3, "b")):
        weights = {"checkpoint": {"sha256": digit * 64, "commit": None, "eos_token_id": []}}
        tuned(tmp_path / str(seed), 50.0 + seed, f"--seed {seed}", **weights)
    tuned(tmp_path / "again", 90.0, "--seed 1", checkpoint={"sha256": "b" * 64})
    tuned(tmp_path / "old", 10.0, "--seed 1")
    found, problems = find_runs([tmp_path])
    assert not problems
    [(_, _, runs)] = comparable(found)
    cells = {}
    for run in runs:
        cells.setdefault(run.model, []).append(run.config["seed"])
    assert {model: sorted(seeds) for model, seeds in cells.items()} == {
        "a/small (weights aaaaaaaa)": [1, 2],
        "a/small (weights bbbbbbbb)": [1, 3],
        "a/small (weights not recorded)": [1],
    }


def test_every_table_has_the_cells_worked_out_by_hand(study):
    done = report(study)
    assert (done.returncode, done.stderr) == (0, "")
    assert printed(done.stdout) == GOLDEN


def test_more_labels_are_forecast_from_four_shares_on_and_otherwise_a_line_says_why_not(tmp_path):
    for share in (0.025, 0.05, 0.1, 0.25, 0.5, 1.0):
        error = 8 + 37 * (40 * share) ** -0.45
        several = {"a/small": error, "b/rising": 40 - error / 2, "c/few": error}
        for name, value in list(several.items())[: 3 if share < 0.2 else 2]:
            words = f"--pretrained_ckpt {name} --train_sample_fraction {share}"
            more = {"train": {"examples": int(10000 * share)}, "eval": evaluation(100 - value, examples=5000)}
            tuned(tmp_path / f"{name[0]} {share}", 0, words, **more)
    shown = tables(tmp_path)
    table = next(table for name, table in shown.items() if name.startswith("What more labels would bring"))
    small, rising, few = ([cell.text for cell in row] for row in table.rows)
    assert small[:3] == ["a/small", "6 shares, 250 to 10,000", "15.04 [14.1, 16.1] (1)"]
    assert small[5].startswith("held, ")
    for times, cell in zip((2, 10), table.rows[0][3:5], strict=True):
        assert cell.value == pytest.approx(8 + 37 * (40 * times) ** -0.45, abs=0.1)
        assert cell.ends[0] < cell.value < cell.ends[1]
        assert len(cell.runs) == 6
    assert rising[3:] == ["—", "—", "error rises beyond noise: 17.5 at 250, 22.5 at 500"]
    assert few[3:] == ["—", "—", "3 training shares, 4 are needed"]
    groups = comparable(find_runs([tmp_path])[0])
    figure = next(plots.figures(groups, [], published=False))[2]
    labels = [line.get_label() for line in figure.axes[0].get_lines()]
    assert [label for label in labels if label.startswith("forecast")] == ["forecast, with its 95 % interval"]


def test_of_two_shares_no_more_labels_are_forecast(study):
    shown = tables(study)
    assert not any(name.startswith("What more labels") for name in shown)
    assert "What more labels would bring: that takes 4 training shares" in shown[TABLE_1].note


def test_a_cell_of_a_grid_may_have_several_seeds_and_dropouts_make_rows(tmp_path):
    for seed, value in ((1, 60), (2, 64)):
        tuned(tmp_path / f"{seed}", value, f"--seed {seed} --dropout 0.2")
    tuned(tmp_path / "other", 70, "--dropout 0.05")
    grid = next(table for name, table in tables(tmp_path).items() if name.startswith("LoRA ablation"))
    assert [[cell.text for cell in row] for row in grid.rows] == [
        ["0.05", "8", "**70.00 [67.1, 72.8] (1)** best"],
        ["0.2", "8", "60.00, 64.00 (2)"],  # no seed in common: the first of each is compared
    ]
    assert "(2): the scores of both seeds" in grid.note


def ablation(*folders: Path):
    return next(table for name, table in tables(*folders).items() if name.startswith("LoRA ablation"))


def bold(table) -> dict[str, str]:
    """The marked cells of a grid with one number of epochs, by rank."""
    return {row[1].text: row[2].text for row in table.rows if "**" in row[2].text}


def test_what_can_not_be_told_from_the_best_is_marked_with_it(tmp_path):
    for rank, value in ((2, 60), (4, 70), (8, 70.1), (16, 69.9)):
        tuned(tmp_path / str(rank), value, f"--lora_r {rank}")
    found = ablation(tmp_path)
    assert bold(found).keys() == {"4", "8", "16"}
    assert bold(found)["8"].endswith("best")
    # Wilson at 1 - 0.05 / 4: z = 2.498
    assert "chosen among 4 by these very scores, so its own is too high." in found.note
    assert "Its interval at such a choice is 66.4 to 73.6." in found.note
    assert (
        "Bold: it and 2 that are not shown to be worse (paired, 5 % for all of them, of these adapters"
        in found.note
    )


def validate(folder: Path, value: float, words: str) -> None:
    """Score a training on a validation split, too."""
    content = record.read(folder / "eval.json")
    content |= {"data": {"validation": OTHER_TEST["data"]["test"]}, "eval": evaluation(value)}
    content["config"] |= {"split": "validation"}
    record.write_json(folder / "eval-12345678.json", content)


def test_the_best_is_chosen_by_validation_where_every_cell_was_scored_there(tmp_path):
    for rank, value, validated in ((2, 60, 60), (4, 70, 75), (8, 72, 65)):
        validate(tuned(tmp_path / str(rank), value, f"--lora_r {rank}"), validated, "")
    found = {name: table for name, table in tables(tmp_path).items() if name.startswith("LoRA ablation")}
    on_test, on_validation = sorted(found.values(), key=lambda table: "validation" in table.title)
    assert {rank for rank, text in bold(on_test).items() if text.endswith("best")} == {"4"}
    assert bold(on_test).keys() == {"4", "8"}  # 8 can't be said to be worse
    assert "chosen among 3 by their validation scores" in on_test.note
    assert "apart: 1,000 validation examples of t.csv" in on_validation.title
    assert on_validation.note.startswith("Over 1,000 validation examples.")
    (tmp_path / "8" / "eval-12345678.json").unlink()
    assert "by these very scores" in ablation(tmp_path).note


@pytest.mark.parametrize(
    "other", [{"config": {"decoding": "constrained"}}, {"sha256": "7" * 64}], ids=["decoding", "examples"]
)
def test_scores_on_validation_by_other_decoding_or_on_other_examples_choose_nothing(tmp_path, other):
    for rank, value, on_validation in ((2, 60, 90), (4, 70, 75)):
        validate(tuned(tmp_path / str(rank), value, f"--lora_r {rank}"), on_validation, "")
    path = tmp_path / "2" / "eval-12345678.json"
    content = record.read(path)
    content["config"] |= other.get("config", {})
    content["data"]["validation"] = content["data"]["validation"] | {
        "sha256": other.get("sha256", content["data"]["validation"]["sha256"])
    }
    record.write_json(path, content)
    found = [table for name, table in tables(tmp_path).items() if name.startswith("LoRA ablation")]
    [on_test] = [table for table in found if "validation" not in table.title]
    assert "by these very scores" in on_test.note
    assert {rank for rank, text in bold(on_test).items() if text.endswith("best")} == {"4"}


def test_older_records_have_no_ties(tmp_path):
    for rank, value in ((2, 10), (4, 90), (8, 50)):
        make_old(tuned(tmp_path / str(rank), value, f"--lora_r {rank}") / "eval.json")
    found = ablation(tmp_path)
    assert bold(found) == {"4": "**90.00 (1)** best"}
    assert "Older records can't tell which of the others may be as good." in found.note


def test_settings_alike_are_not_certain_to_be_so_and_two_seeds_have_no_interval_anywhere(tmp_path):
    for rank in (4, 8):
        for seed in (1, 2):
            tuned(tmp_path / f"{rank} {seed}", 70, f"--lora_r {rank} --seed {seed}")
    cells = {cell["column"]: cell for cell in json.loads(report(tmp_path, "--json").stdout)}
    effect = cells["difference in accuracy"]
    assert (effect["text"], effect["ci95"], effect["seeds"]) == ("+0.00, +0.00 (2)", None, 2)
    assert (cells["5 epochs"]["seeds"], cells["5 epochs"]["ci95"]) == (2, None)
    shutil.rmtree(tmp_path / "4 2")
    shutil.rmtree(tmp_path / "8 2")
    cells = {cell["column"]: cell for cell in json.loads(report(tmp_path, "--json").stdout)}
    assert cells["difference in accuracy"]["text"] == "+0.00 [-0.2, +0.2] (1)"


def test_effects_are_over_settings_with_the_same_seeds(tmp_path):
    # The step is worth 0 at dropout 0.1, where seed 2 was run too, and 3 at the others.
    for dropout, better, seeds in ((0.1, 0, (1, 2)), (0.2, 3, (1,)), (0.5, 3, (1,)), (0.7, 3, (1,))):
        for seed in seeds:
            for rank in (4, 8):
                words = f"--lora_r {rank} --dropout {dropout} --seed {seed}"
                tuned(tmp_path / words.replace(" ", ""), 60 + better * (rank == 8), words)
    found = next(table for name, table in tables(tmp_path).items() if name.startswith("LoRA effects"))
    rank = [cell.text for cell in found.rows[0]]
    assert rank[:3] + rank[4:] == ["rank", "4", "8", "4", "4"]
    assert rank[3].startswith("+2.25 [")


def test_one_test_example_gives_numbers_and_no_interval(tmp_path):
    for rank in (4, 8):
        for seed in (1, 2, 3):
            more = {"eval": evaluation(100, examples=1)}
            tuned(tmp_path / f"{rank} {seed}", 100, f"--lora_r {rank} --seed {seed}", **more)
    done = report(tmp_path, "--json", "--spread")
    assert (done.returncode, done.stderr) == (0, "")
    assert "NaN" not in done.stdout
    assert {cell["text"] for cell in json.loads(done.stdout) if cell["column"] == "5 epochs"} == {
        "**100.00 (3)** best",
        "**100.00 (3)**",
    }


def test_the_cheapest_is_by_dollars_where_all_have_a_price_and_else_by_time(tmp_path):
    tuned(tmp_path / "slow", 70, "--pretrained_ckpt a/slow")
    fast = {"seconds": 1.0, "wall_seconds": 2.0}
    tuned(tmp_path / "fast", 70, "--pretrained_ckpt b/fast", train=fast)
    dear = COST | {"price_per_hour": 3600.0}
    content = record.read(tmp_path / "fast" / "train.json")
    record.write_json(tmp_path / "fast" / "train.json", content | {"cost": dear})
    content = record.read(tmp_path / "fast" / "eval.json")
    record.write_json(tmp_path / "fast" / "eval.json", content | {"cost": dear})
    assert tables(tmp_path)[TABLE_1].columns[-1] == "b/fast - a/slow"
    record.write_json(tmp_path / "fast" / "eval.json", content | {"cost": dear | {"price_per_hour": None}})
    assert tables(tmp_path)[TABLE_1].columns[-1] == "a/slow - b/fast"


def test_effects_of_a_knob_are_paired_by_seed_so_that_a_lucky_seed_has_no_part_in_them(tmp_path):
    for rank, of in (
        (4, {1: 60, 2: 68}),
        (8, {1: 60, 2: 68, 3: 76}),
    ):  # seed 3 is 8 points better, at either rank
        for seed, value in of.items():
            tuned(tmp_path / f"{rank} {seed}", value, f"--lora_r {rank} --seed {seed}")
    found = next(table for name, table in tables(tmp_path).items() if name.startswith("LoRA effects"))
    [row] = [[cell.text for cell in row] for row in found.rows]
    assert row == ["rank", "4", "8", "+0.00, +0.00 (2)", "1", "2"]  # means of 64 and 68 would make it +4


def test_the_share_says_how_many_examples_were_really_taken_and_which_texts_stand_in_test(tmp_path):
    split = {"source": "t.jsonl", "rows": 10, "available": 480, "also_in_test": 13, "sha256": "5" * 64}
    folder = tuned(tmp_path, 60, "--train_sample_fraction 0.025", train={"examples": 10})
    content = record.read(folder / "train.json")
    record.write_json(folder / "train.json", content | {"data": {"train": split}})
    found = tables(tmp_path)[TABLE_1]
    assert [cell.text for cell in found.rows[0][:2]] == ["2.5 %", "10 of 480 (2.1 %)"]
    assert "13 texts of the training split occur in the test split, too." in found.note
    assert (
        "A seed draws the training examples, their order and dropout; at 100 % the last two only."
        in found.note
    )


def test_where_nothing_was_trained_no_table_is_by_training_share(tmp_path):
    baseline(tmp_path, 20)
    assert TABLE_1 not in tables(tmp_path)


def test_few_test_examples_carry_a_warning_and_a_run_without_a_seed_no_number_of_seeds(tmp_path):
    baseline(tmp_path, 20, eval=evaluation(50, examples=20))
    found = tables(tmp_path)[METHODS]
    assert found.rows[0][3].text == "50.00 [29.9, 70.1]"
    assert found.note.endswith("Fewer than 40 test examples: the intervals are rough.")
    assert "(1)" not in found.note


def test_differences_are_to_what_is_named_or_else_to_the_cheapest(study):
    named = printed(report(study, "--reference", "b/big").stdout)
    assert named[TABLE_1][0][-1] == "a/small - b/big"
    assert named[TABLE_1][-1][-1] == "-10.00 [-11.9, -8.1] (1)"
    methods = printed(report(study, "--reference", "fine-tuned").stdout)
    table = methods["Table 2: summarization: zero-shot, few-shot and fine-tuned"]
    assert [row[-1] for row in table] == [
        "ROUGE-1 - fine-tuned",
        "—",
        "-20.00 [-20.0, -20.0] (1)",
        "reference",
    ]
    assert "--reference nothing: no table has such a row or column" in error_line(
        report(study, "--reference", "nothing")
    )


def test_the_spread_of_seeds_and_of_test_examples_stand_apart_on_request(study):
    title = "Spread: classification: where the interval of accuracy comes from"
    assert title not in printed(report(study).stdout)
    columns, *rows = printed(report(study, "--spread").stdout)[title]
    found = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
    setting = "rank 8, epochs 5, dropout 0.1, learning rate 0.0002"
    seeds = found[f"a/small, fine-tuned, 10 %, {setting}"]
    # Of the mean squares in Table 1: sqrt((0.4 - 0.0129) / 1000) = 0.0197; 1.96 * 0.0197 / sqrt(3) = 0.0223;
    # 1.96 sqrt(0.000356 - 0.0114^2) = 0.0295
    assert (seeds["sd between seeds"], seeds["± of seeds"], seeds["± of test sampling"]) == (
        "1.97",
        "2.23",
        "2.95",
    )
    assert seeds["± in all"] == "4.97"
    assert float(seeds["± with one seed more"]) < 4.97
    # To zero-shot: 42 points apart, each seed alike
    assert float(seeds["smallest difference to show"]) > 0
    assert found[f"a/small, fine-tuned, 100 %, {setting}"]["sd between seeds"] == "—"
    assert found["a/small, zero-shot, free decoding"]["smallest difference to show"] == "—"


# Methods

NEAREST = schema.Method(
    title="nearest example",
    folder="{task}-nearest-{max_train_samples}_seed-{seed}",
    settings=("pretrained_ckpt", "train_file", "max_train_samples", "train_sample_fraction", "seed"),
    knobs={"max_train_samples": "examples kept"},
    trains=True,
    prompted=False,
)


def leave_nearest(root: Path, value: float) -> None:
    """The records of a training and a scoring by a method that only its entry in METHODS tells of."""
    args = flags(f"--max_train_samples 9 --output_dir {root}")
    folder = runs.folder_of(args, "nearest")
    for part, what in (
        ("train", {"train": LEAN}),
        ("eval", {"eval": evaluation(value), "training": "whenever"}),
    ):
        split = {"source": "s.jsonl", "rows": 1000, "sha256": "5" * 64}
        path = folder / f"{part}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with record.recording(path, args, "nearest", PROCESS) as content:
            content.update(what, data={"train" if part == "train" else "test": split}, cost=COST)
        if part == "train":
            record.write_json(path, record.read(path) | {"finished": "whenever"})


LEAN = {
    **{"examples": 9, "seconds": 1.0, "wall_seconds": 2.0, "peak_memory_gib": 0.1},
    **{"tokens_per_second": None, "loss_history": []},
}


# Classes


def answering(root: Path, *seeds: str, references: str = "aaaabbbbcc", model: str = "a/small") -> Path:
    """Runs of a setting, one for each seed's answers: a letter for each example's class, "-" for none."""
    for seed, letters in enumerate(seeds, 1):
        rows = [
            {"parsed": None if letter == "-" else letter, "reference": reference}
            for letter, reference in zip(letters, references, strict=True)
        ]
        scores = metrics.summed_up("classification", rows) | {"metrics_version": "2, r"}
        words = f"--seed {seed} --pretrained_ckpt {model}"
        scored = {"eval": evaluation(0, examples=len(rows)) | scores}
        tuned(root / f"{model} {seed}".replace("/", " "), 0, words, **scored)
    return root


def test_precision_recall_and_f1_of_each_class_are_scikit_learns_and_of_seeds_added_up(tmp_path):
    generator = np.random.default_rng(0)
    references = "".join(generator.choice(list("abcd"), 200))
    seeds = [
        "".join(of if generator.random() < 0.6 else generator.choice(list("abcd-")) for of in references)
        for _ in range(3)
    ]
    found = tables(answering(tmp_path, *seeds, references=references))
    truth = list(3 * references), list("".join(seeds))
    expected = precision_recall_fscore_support(*truth, labels=list("abcd"))
    shown = {row[1].text: row for row in found[CLASSES].rows}
    for i, label in enumerate("abcd"):
        assert [cell.value for cell in shown[label][3:]] == pytest.approx(
            [100 * of[i] for of in expected[:3]]
        )
        assert shown[label][2].text == str(expected[3][i] // 3)
        assert all(cell.ends[0] < cell.value < cell.ends[1] and cell.seeds == 3 for cell in shown[label][3:])
    f1 = [row[5].value for row in found[CLASSES].rows]
    assert f1 == sorted(f1)
    matrix = confusion_matrix(*truth, labels=list("abcd-"))[:-1]
    for _, reference, answer, count, share in found[CONFUSIONS].rows:
        i, j = "abcd".index(reference.text), "abcd-".index(answer.text.replace("(invalid)", "-"))
        assert count.value == matrix[i, j]
        assert share.value == pytest.approx(100 * matrix[i, j] / matrix[i].sum())
    assert "a/small: counts of 3 seeds, added up." in found[CONFUSIONS].note


def test_of_two_seeds_both_scores_of_a_class_are_shown_and_where_none_can_be_a_dash(tmp_path):
    rows = tables(answering(tmp_path, "aaaabbb-aa", "aaabbbb-dd"))[CLASSES].rows
    assert [[cell.text for cell in row[1:]] for row in rows] == [
        ["c", "2", "—", "0.00, 0.00 (2)", "0.00, 0.00 (2)"],
        ["d", "0", "0.00, 0.00 (2)", "—", "0.00, 0.00 (2)"],
        ["b", "4", "100.00, 75.00 (2)", "75.00, 75.00 (2)", "85.71, 75.00 (2)"],
        ["a", "4", "66.67, 100.00 (2)", "100.00, 75.00 (2)", "80.00, 85.71 (2)"],
    ]


def test_of_each_model_the_worst_classes_are_shown_and_all_on_request(tmp_path):
    answering(tmp_path, "bcdefgh" * 3, references="abcdefg" * 3)
    answering(tmp_path, "abcdefg" * 3, references="abcdefg" * 3, model="b/big")
    few, every = report(tmp_path).stdout, report(tmp_path, "--classes").stdout
    rows = printed(few)[CLASSES][1:]
    assert [row[0] for row in rows] == ["a/small"] * 5 + ["b/big"] * 5
    assert "a/small: 5 of 8 classes; --classes shows all." in few
    assert "a/small: 5 of 7 pairs of classes; --classes shows all." in few
    assert len(printed(every)[CLASSES][1:]) == 8 + 7
    assert len(printed(every)[CONFUSIONS][1:]) == 7  # b/big confuses none
    assert "--classes" not in every


def test_a_class_with_a_bar_in_its_name_stays_one_cell_of_markdown():
    table = Table("Classes", "t", ["class", "F1"], 1)
    table.add("a | b", "50.00")
    assert "| a \\| b  | 50.00 |" in table.markdown()
    assert table.csv_rows()[1] == ["a | b", "50.00"]


def test_an_older_record_has_no_classes_and_summaries_have_none(tmp_path):
    tuned(tmp_path / "summaries", 50, task="summarization")
    tuned(tmp_path / "old", 60)
    make_old(tmp_path / "old" / "eval.json")
    assert not [name for name in tables(tmp_path) if name.startswith(("Classes", "Confusions"))]


@pytest.mark.parametrize(("classes", "named", "numbers"), [(20, 20, True), (150, 50, False)])
def test_a_confusion_matrix_of_many_classes_names_as_many_as_can_be_read(classes, named, numbers):
    names = [f"$_{i}" for i in range(classes)]  # which TeX would not set
    examples = list(range(classes)) * 2
    per_example = {"classes": names, "references": examples, "answers": [0, *examples[:-1]]}
    figure = plots.plot_confusion(Confusion.of([per_example]))
    axes = figure.axes[0]
    figure.canvas.draw()
    assert len(axes.get_yticklabels()) == named
    assert axes.get_xticklabels()[-1].get_text() == "(invalid)"
    assert bool(axes.texts) == numbers
    sizes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(low.y1 <= high.y0 or low.y0 >= high.y1 for low, high in pairwise(sizes))  # none on another
    plots.plt.close(figure)


def test_a_new_method_is_shown_by_its_entry_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(schema.METHODS, "nearest", NEAREST)
    tuned(tmp_path / "tuned", 70)
    leave_nearest(tmp_path, 40)
    assert len(list(tmp_path.glob("classification-nearest-9_seed-42_*/eval.json"))) == 1
    found = tables(tmp_path)
    shares, methods = (
        found[title]
        for title in (TABLE_1, f"Table 2: classification: {', '.join(TITLES)} and nearest example")
    )
    assert shares.columns[2:4] == ["a/small, fine-tuned", "a/small, nearest example"]
    assert [cell.text for cell in shares.rows[-1]][2:][:2] == [
        "70.00 [67.1, 72.8] (1)",
        "40.00 [37.0, 43.1] (1)",
    ]
    assert "a/small, nearest example: examples kept 9." in shares.note
    rows = [[cell.text for cell in row[:4]] for row in methods.rows]
    assert rows[-2:] == [
        ["a/small", "fine-tuned", "480", "70.00 [67.1, 72.8] (1)"],
        ["a/small", "nearest example", "9", "40.00 [37.0, 43.1] (1)"],
    ]
    [row] = [row for row in found[SERVING].rows if row[2].text == "nearest example"]
    assert row[0].text == "a/small"
    [row] = [row for row in found[TRAINING].rows if row[0].text.endswith("nearest example")]
    assert row[9].text == "unknown"  # it learns no tokens
    drawn = {name for name, _, _ in plots.figures(comparable(find_runs([tmp_path])[0]), [], published=False)}
    assert "classification-accuracy-by-number-of-training-examples" in drawn


TITLES = ("zero-shot", "few-shot", "fine-tuned")


def test_a_record_of_a_method_that_nobody_knows_is_left_out_by_name(tmp_path):
    save(tmp_path / "run", "train", "classification", "", "qlora", train=LEAN, method="guessed")
    [problem] = find_runs([tmp_path])[1]
    assert "train.json is of the method 'guessed', and study/records/schema.py knows zero-shot, " in problem


# States


def test_a_run_without_a_score_shows_how_it_stands_and_no_number(tmp_path):
    for share, error in ((0.025, ValueError("x")), (0.05, MemoryError()), (0.1, KeyboardInterrupt())):
        leave_unfinished(tmp_path / str(share), f"--train_sample_fraction {share}", error)
    tuned(tmp_path / "trained", None, "--train_sample_fraction 0.25")
    leave_unfinished(tuned(tmp_path / "eval", None), "", MemoryError(), "eval")
    tuned(tmp_path / "good", 70, "--seed 1")
    path, args = tmp_path / "now" / "train.json", flags("--train_sample_fraction 0.5")
    with record.locked(path.parent, PROCESS), record.recording(path, args, "qlora", PROCESS) as content:
        column = tables(tmp_path)[TABLE_1].rows
        whole = record.read(tmp_path / "good" / "train.json")
        content.update({name: whole[name] for name in whole.keys() - content.keys()})
    states = [(text, None) for text in ("failed", "OOM", "interrupted", "not scored", "running")]
    assert [(row[2].text, row[2].value) for row in column] == [*states, ("70.00 [67.1, 72.8] (1); 1 OOM", 70)]


def test_random_weights_have_time_and_cost_and_a_score_nowhere(tmp_path):
    tuned(tmp_path / "ours", 70)
    known = {"checkpoint": {"sha256": "a" * 64, "random_weights": True}}
    folder = tuned(tmp_path / "shape", 5, "--pretrained_ckpt a/7b", model="a/7b", **known)
    train = record.read(folder / "train.json") | known | {"model": "a/7b"}
    record.write_json(folder / "train.json", train)
    found = tables(tmp_path)
    scores = [table.markdown() for name, table in found.items() if "classification:" in name]
    assert scores
    assert not [text for text in scores if "a/7b" in text]
    spent = next(table for name, table in found.items() if name.startswith("Tables 4 and 5"))
    shape = next(row for row in spent.rows if row[0].text == "a/7b (random weights)")
    assert [cell.text for cell in shape[5:9]] == ["40 s", "6.0 min", "1.7 min", "8.3 min"]
    with pytest.raises(UserError, match="random weights"):
        compare([tmp_path / "ours"], [folder])


def flags(words: str):
    return cli.parse_args("classification", "", ["--pretrained_ckpt", "a/small", *words.split()])


def leave_unfinished(folder: Path, words: str, error: BaseException, part: str = "train") -> None:
    folder.mkdir(exist_ok=True)
    path, known = folder / f"{part}.json", (UserError, KeyboardInterrupt)
    with pytest.raises(known), record.recording(path, flags(words), "qlora", PROCESS):
        raise error


def test_a_run_that_was_killed_is_unfinished_and_costs_nothing_known(tmp_path):
    content = save(tmp_path / "run", "train", "classification", "", "qlora", status="running")
    record.write_json(tmp_path / "run" / ".train.json", content)
    (tmp_path / "run" / "train.json").unlink()
    found = tables(tmp_path)
    assert found[TABLE_1].rows[-1][2].text == "unfinished"
    assert TRAINING not in found


# Groups


OTHER_TEST = {"data": {"test": {"source": "t.csv", "rows": 1000, "sha256": "9" * 64}}}


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (OTHER_TEST, "1,000 test examples of t.csv (sha256 99999999)"),
        ({"prompt_sha256": "b" * 64}, "fine-tuned prompt bbbbbbbb"),
        ({"eval": evaluation(90, metrics_version="1, r")}, "metrics of version 1, r"),
    ],
)
def test_scores_that_can_not_be_compared_stand_apart_and_the_title_says_why(tmp_path, more, why):
    tuned(tmp_path / "one", 70)
    tuned(tmp_path / "two", 72, "--seed 1")
    tuned(tmp_path / "other", 90, "--seed 2", **more)
    found = tables(tmp_path)
    assert found[TABLE_1].rows[-1][2].value == 71
    assert found[f"{TABLE_1}, apart: {why}"].rows[-1][2].value == 90


def test_a_training_from_before_schedules_were_recorded_stands_apart_from_later_ones(tmp_path):
    tuned(tmp_path / "one", 70)
    tuned(tmp_path / "two", 72, "--seed 1")
    tuned(tmp_path / "old", 90, "--seed 2", train={"schedule": None})
    baseline(tmp_path, 20)
    found = tables(tmp_path)
    assert found[TABLE_1].rows[-1][2].value == 71
    why = "fine-tuned by a learning rate's unnamed schedule"
    assert found[f"{TABLE_1}, apart: {why}"].rows[-1][2].value == 90
    for name in ("one", "two"):  # an older study as a whole has one reason less
        path = tmp_path / name / "train.json"
        content = record.read(path)
        del content["train"]["schedule"]
        record.write_json(path, content)
    assert not [title for title in tables(tmp_path) if "apart" in title]


def test_the_same_test_data_under_another_name_stand_together(tmp_path):
    tuned(tmp_path / "one", 70)
    same = {"source": "/data/eval.jsonl", "rows": 1000, "sha256": "5" * 64}
    tuned(tmp_path / "two", 72, "--seed 1", data={"test": same})
    found = tables(tmp_path)
    assert found[TABLE_1].rows[-1][2].value == 71
    assert not [title for title in found if "apart" in title]


def test_settings_without_a_place_in_the_tables_make_models_of_their_own(tmp_path):
    tuned(tmp_path / "one", 70)
    tuned(tmp_path / "two", 60, "--lora_alpha 32 --seed 1")
    tuned(tmp_path / "three", 50, "--lora_alpha 32 --loss_on all --seed 2")
    shares = tables(tmp_path)[TABLE_1]
    told = (("16", "answer"), ("32", "all"), ("32", "answer"))
    assert shares.columns[2:5] == [f"a/small (lora_alpha {alpha}, loss_on {on})" for alpha, on in told]
    assert [cell.value for cell in shares.rows[-1][2:5]] == [70, 50, 60]


@pytest.mark.parametrize("decoding", ["free", "constrained"])
def test_what_is_not_trained_names_the_decoding_of_its_classes(tmp_path, decoding):
    baseline(tmp_path, 20, f"--decoding {decoding}")
    [row] = [row for row in tables(tmp_path)[METHODS].rows if row[3].value]
    assert [cell.text for cell in row[:2]] == ["a/small", f"zero-shot, {decoding} decoding"]


def test_two_decodings_of_one_model_are_named_once(tmp_path):
    for value, decoding in ((20, "free"), (40, "constrained")):
        baseline(tmp_path / decoding, value, f"--decoding {decoding}")
    rows = [row for row in tables(tmp_path)[METHODS].rows if row[3].value]
    assert [(row[0].text, row[1].text) for row in rows] == [
        ("a/small (decoding constrained)", "zero-shot"),
        ("a/small (decoding free)", "zero-shot"),
    ]


def test_a_setting_that_only_some_runs_have_is_not_named_of_the_others(tmp_path):
    baseline(tmp_path / "one", 20, "--prompt_type few-shot")
    baseline(tmp_path / "four", 30, "--prompt_type few-shot --shots 4")
    baseline(tmp_path / "merged", 40, "--prompt_type few-shot --merge_labels")
    names = [row[0].text for row in tables(tmp_path)[METHODS].rows if row[3].value]
    assert names == ["a/small (merge_labels, shots 1)", "a/small (shots 1)", "a/small (shots 4)"]


def test_a_look_at_a_few_examples_of_what_was_scored_in_whole_stays_out_of_the_tables(tmp_path):
    def look(name: str, **more) -> None:
        few = {"test": {"source": "t.jsonl", "rows": 20, "sha256": "2" * 64}}
        words = f"--max_eval_samples 20 --seed {more.pop('seed', 42)}"
        tuned(tmp_path / name, 50, words, eval=evaluation(50, examples=20), data=few)

    tuned(tmp_path / "whole", 70)
    look("look")
    found, _ = find_runs([tmp_path])
    groups = comparable(found)
    assert [(why, [run.path.parent.name for run in group]) for _, why, group in groups] == [("", ["whole"])]
    assert "Left out: 1 evaluation of fewer examples (--max_eval_samples) of what was scored in whole." in (
        report(tmp_path).stdout
    )
    look("other", seed=1)  # which was scored in no other way
    assert [len(group) for _, _, group in comparable(find_runs([tmp_path])[0])] == [2, 1]
    assert "Left out" not in report(tmp_path).stdout


def test_two_checkpoints_share_no_cell_though_their_folders_have_the_same_name(tmp_path):
    tuned(tmp_path / "one", 70, "--pretrained_ckpt v1/llama/7b")
    tuned(tmp_path / "two", 50, "--pretrained_ckpt v2/llama/7b")
    assert [cell.value for cell in tables(tmp_path)[TABLE_1].rows[-1][2:4]] == [70, 50]


def test_rows_of_cost_can_be_told_apart_where_a_training_is_scored_on_two_splits(tmp_path):
    content = json.loads((tuned(tmp_path / "one", 70) / "eval.json").read_text())
    content["data"] = {"validation": OTHER_TEST["data"]["test"]}
    content["config"]["split"] = "validation"
    record.write_json(tmp_path / "one" / "eval-12345678.json", content)
    found = tables(tmp_path)
    for table in (found[TRAINING], found[SERVING]):
        keys = [tuple(cell.text for cell in row[: table.keys]) for row in table.rows]
        assert len(set(keys)) == len(keys)


# Published figures


@pytest.fixture(scope="module")
def load_test() -> dict[str, dict[str, str]]:
    """The published rows of serving, as printed: the cells by column of each model, task, GPU and server."""
    columns, *rows = printed(report("--published").stdout)[SERVED]
    cells = [dict(zip(columns, row, strict=True)) for row in rows]
    name = "{model} {task} {GPU} {server}"
    return {name.format(**row).removeprefix("Llama-").replace(" †", ""): row for row in cells}


def test_published_figures_leave_ours_as_they_are_and_are_marked(study):
    alone, beside = (printed(report(study, *words).stdout) for words in ((), ("--published",)))
    for title, (columns, *rows) in alone.items():
        theirs, *others = beside[title]
        assert theirs[: len(columns)] == columns
        if title == TABLE_1:  # the published shares stand among ours
            assert [row[0] for row in others] == ["2.5 %", "5 %", "10 %", "25 %", "50 %", "100 %"]
            assert [row[: len(columns)] for row in others if row[0] in ("10 %", "100 %")] == rows
        else:
            assert [row[: len(columns)] for row in others[: len(rows)]] == rows
            assert all(row[0].endswith(" †") for row in others[len(rows) :])
    names = FIGURES["tables"]["Table 1"]["columns"][1:]
    assert beside[TABLE_1][0][5:] == [f"{name} †" for name in names]
    assert sum(cell != "—" for row in beside[TABLE_1][1:] for cell in row[6:]) == 48


def test_no_published_cell_has_a_value_or_records(study):
    alone, both = (json.loads(report(study, "--json", *words).stdout) for words in ((), ("--published",)))
    added = [cell for cell in both if cell not in alone]
    assert len(added) == len(both) - len(alone) > 48
    assert not any(cell["value"] or cell["ci95"] or cell["records"] or cell["seeds"] for cell in added)


def test_the_published_figures_stand_alone_and_add_up():
    done = report("--published")
    assert (done.returncode, done.stderr) == (0, "")
    _, *rows = printed(done.stdout)[TABLE_1]
    sums = [sum(float(row[i]) for row in rows) for i in range(2, 10)]
    assert sums == pytest.approx([348.02, 316.41, 425.27, 412.50, 388.36, 401.71, 376.38, 434.67])
    columns, *served = printed(done.stdout)[SERVED]
    # FastApi on A10G, Llama-7B: 1.624 / 3600 / 0.11 * 1000 / 100 = 0.0410; 4 / 0.11 = 36.4
    assert columns[-3:] == ["per 1K tokens, served", "offered / served", "fits the formula"]
    assert served[0][:5] == ["Llama-7B †", "classification", "A10G", "1.624", "FastApi"]
    assert served[0][-3:] == ["$0.041", "36.4", "yes"]
    assert "times more" not in done.stdout
    assert "times the" not in done.stdout


def test_the_published_rate_offered_is_a_factor_of_the_rate_served_and_a_bound_stays_one(load_test):
    factors = {row: cells["offered / served"] for row, cells in load_test.items()}
    numbers = [float(factor.removeprefix("> ")) for factor in factors.values()]
    assert (len(numbers), min(numbers), max(numbers)) == (30, 1.7, 36.4)
    bounds = {row: factor for row, factor in factors.items() if factor.startswith(">")}
    assert bounds == {
        "7B classification A10G vLLm": "> 8.8",  # 185 / 21.03
        "7B classification A100 40GB vLLm": "> 3.2",  # 280 / 87.96
        "13B classification A100 40GB vLLm": "> 5.4",  # 280 / 51.46
    }
    prices = [cells["per 1K tokens"] for cells in load_test.values()]
    assert [price for price in prices if not price.startswith("$")] == [
        *("< $0.00002", "< $0.00001", "< $0.00003", "< $0.00001", "< $0.00002")
    ]


def test_the_formula_gives_15_of_the_30_published_prices_and_the_others_are_flagged(load_test):
    fits = {row for row, cells in load_test.items() if cells["fits the formula"] == "yes"}
    classification = {row for row in load_test if "classification" in row}
    assert classification - fits == {"7B classification A100 40GB vLLm", "13B classification A100 40GB Ray"}
    assert fits - classification == {"7B summarization A10G vLLm", "13B summarization A100 40GB FastApi"}
    assert (len(fits), len(load_test)) == (15, 30)
    rounded = 0
    for cells in load_test.values():
        number, offered = cells["per 1K tokens"].strip("< $"), float(cells["requests/s offered"].strip("> "))
        rounded += f"{float(cells['USD per hour']) / 360 / offered:.{len(number) - 2}f}" == number
    assert rounded == 8  # docs/numbers.md: what rounding alone would give
    assert "gives 15 of the 30 published prices" in FIGURES["tables"]["Inference, published"]["note"]


def test_a_published_price_that_does_not_fit_says_which_hourly_prices_would(load_test):
    found = {row: cells["fits the formula"] for row, cells in load_test.items()}
    # 0.000055 to 0.00007 * 360 * 55: 0.00006 by rounding up or by cutting off
    assert found["13B summarization A10G Ray"] == "no: $1.09 to 1.39 an hour would"
    assert found["7B classification A100 40GB vLLm"] == "no: < $2.02 an hour would"  # < 0.00002 * 360 * 280
    ranges = {"A10G": [], "A100": []}
    for row, text in found.items():
        if "summarization" in row and text != "yes":
            low, high = re.fullmatch(r"no: (?:\$(\S+) to |< \$)(\S+) an hour would", text).groups("0")
            ranges[row.split()[2]].append((float(low), float(high)))
    shared = {
        gpu: (max(low for low, _ in ends), min(high for _, high in ends)) for gpu, ends in ranges.items()
    }
    assert shared == {"A10G": (1.09, 1.35), "A100": (2.67, 3.13)}


# Prices


PRICE = '[{"gpu": "A10G", "instance": "none", "usd_per_hour": 7.2, "source": "x", "date": "2025"}]'


def with_prices(folder: Path, path: Path, text: str) -> subprocess.CompletedProcess:
    path.write_text(text)
    return report(folder, "--prices", path)


def test_other_prices_apply_without_a_new_run(study, tmp_path):
    found = printed(with_prices(study, tmp_path / "prices.json", PRICE).stdout)
    assert found[TRAINING][1][-3:] == ["$0.80", "$0.20", "$1.00"]
    assert found[SERVING][1][-3:] == ["$0.10", "$0.0010", "$0.050"]
    others = PRICE.replace("A10G", "H100")
    assert printed(with_prices(study, tmp_path / "prices.json", others).stdout) == GOLDEN


def test_each_gpu_has_rows_of_its_own(tmp_path):
    tuned(tmp_path / "A10G", 70)
    other = COST | {"gpu": "NVIDIA H100"}
    tuned(tmp_path / "H100", 72, "--seed 2", cost=other)
    save(
        tmp_path / "H100",
        "train",
        "classification",
        "--seed 2",
        "qlora",
        cost=other,
        train=json.loads((tmp_path / "H100/train.json").read_text())["train"],
    )
    found = printed(report(tmp_path).stdout)
    for title, column in ((TRAINING, 11), (SERVING, 8)):
        assert [row[column] for row in found[title][1:]] == [GPU, "NVIDIA H100"]
    assert found[TABLE_1][-1][2].endswith("(2)")


def test_a_list_with_several_prices_for_a_card_leaves_it_unknown_and_says_so(study, tmp_path):
    several = f"[{PRICE[1:-1]}, {PRICE[1:-1].replace('none', 'other').replace('7.2', '9')}]"
    done = with_prices(study, tmp_path / "prices.json", several)
    assert done.returncode == 0
    [line] = done.stderr.splitlines()
    assert line.endswith(
        f"{GPU} costs $7.2 (none) or $9 (other) an hour, so its price is unknown: leave one entry"
    )
    found = printed(done.stdout)
    assert found[TRAINING][1][-3:] == found[SERVING][1][-3:] == ["unknown"] * 3


def test_a_device_that_is_priced_as_another_says_so_beside_its_speed(tmp_path):
    measured = COST | {"device": "CPU, 2 cores"}
    tuned(tmp_path, 70, cost=measured)
    content = json.loads((tmp_path / "train.json").read_text())
    record.write_json(tmp_path / "train.json", content | {"cost": measured})
    found = printed(report(tmp_path).stdout)
    assert found[TRAINING][1][11] == found[SERVING][1][8] == f"CPU, 2 cores, priced as {GPU}"


def test_an_unknown_price_is_unknown_and_not_zero(tmp_path):
    tuned(tmp_path / "one", 70, cost=COST | {"price_per_hour": None})
    tuned(tmp_path / "two", 70, "--seed 1")
    found = printed(report(tmp_path).stdout)
    assert found[TRAINING][1][-3:] == ["$0.40", "unknown", "unknown"]
    assert found[SERVING][1][-3:] == ["unknown"] * 3


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("per_hour", "per_hours"),
        ("7.2", "-7.2"),
        ("7.2", "NaN"),
        ("7.2", '"7"'),
        (PRICE, "{}"),
        ("}]", ""),
        ("none", ""),
    ],
)
def test_a_price_list_that_is_none_is_refused_by_name(study, tmp_path, old, new):
    done = with_prices(study, tmp_path / "prices.json", PRICE.replace(old, new))
    assert f"--prices {tmp_path}/prices.json" in error_line(done)
    assert done.returncode == 1


# What was spent in all


def tried(status: str, seconds: float | None, **cost) -> dict:
    """An attempt before that of a record, or what a record of a failure has of its own."""
    return {"status": status, "wall_seconds": seconds, "cost": COST | {"gpus": 1} | cost}


def note(text: str, heading: str = TRAINING) -> str:
    """What is said of the spending below a table."""
    [section] = [part for part in text.split("## ") if part.startswith(heading)]
    return section[section.index("Spent in all") :].strip()


@pytest.fixture
def spending(tmp_path) -> Path:
    """Records of every kind; a second is $0.001."""
    root = tmp_path / "runs"
    # 400 s and 100 s; before the evaluation 1,000 s and, at twice the price, 2,000 s
    before = [tried("failed", 1000.0), tried("finished", 2000.0, price_per_hour=7.2)]
    content = json.loads((tuned(root / "kept", 70, spent_before=before) / "eval.json").read_text())
    # 50 s: another evaluation of the same training
    content["data"] = {"validation": OTHER_TEST["data"]["test"]}
    content["config"]["split"], content["eval"]["wall_seconds"] = "validation", 50.0
    record.write_json(root / "kept" / "eval-12345678.json", content | {"spent_before": []})
    # 400 s and 100 s: an older twin
    tuned(root / "twin", 60, finished="2023-01-01T00:00:00.000+00:00")
    failures = {
        "memory": tried("oom", 30.0),
        "stopped": tried("interrupted", 20.0, gpu="CPU", price_per_hour=None),
        "old": {"status": "failed"},  # as earlier versions left it
    }
    for name, failure in failures.items():
        save(root / name, "train", "classification", "--seed 9", "qlora", **failure)
    (root / "damaged").mkdir()
    (root / "damaged" / "train.json").write_text("{")
    shutil.copytree(root / "twin", root / ".calibration")  # counts nowhere
    return root


def test_the_total_is_that_of_every_record_and_every_attempt_worked_out_by_hand(spending, tmp_path):
    seconds = (400 + 100 + 1000 + 2000) + 50 + (400 + 100) + 30 + 20
    usd = (0.4 + 0.1 + 1.0 + 4.0) + 0.05 + (0.4 + 0.1) + 0.03
    assert (seconds, usd) == (4100, pytest.approx(6.08))  # 68.3 min
    said = "Spent in all, with 4 failed and 1 repeated runs: {} "
    said += "(and 1 run of unknown price and 1 run of unknown time); not counted: 1 unreadable record."
    for folders in ([spending], [spending, spending / "kept", spending]):  # each once
        assert note(report(*folders).stdout) == said.format("68.3 min, $6.08")
    # All 4,080 s of an A10G, of which 2,000 were at this price before, at $0.002.
    repriced = with_prices(spending, tmp_path / "prices.json", PRICE).stdout
    assert note(repriced) == said.format("68.3 min, $8.16")


def test_the_total_on_two_gpus_is_priced_for_both(tmp_path):
    train = {"batching": {"processes": 2}}
    tuned(tmp_path / "run", 70, train=train, spent_before=[tried("failed", 500.0, gpus=2)])
    # 400 s of two, 100 s of one, and 500 s of two at $0.002
    assert note(with_prices(tmp_path, tmp_path / "prices.txt", PRICE).stdout).endswith(": 16.7 min, $3.80.")


def test_runs_that_none_failed_or_was_repeated_are_added_up(study):
    seconds, usd = 6 * 500 + 7300 + 500 + 100 + 100, 6 * 0.5 + 7.3 + 0.5 + 0.1 + 0.1
    assert f"{seconds / 3600:.1f} h, ${usd:.2f}" == "3.1 h, $11.00"
    assert note(report(study).stdout) == "Spent in all: 3.1 h, $11.00."


def test_where_nothing_was_trained_the_total_stands_under_the_last_table(tmp_path):
    baseline(tmp_path / "scored", 20)
    assert note(report(tmp_path / "scored").stdout, SERVING) == "Spent in all: 1.7 min, $0.10."
    leave_unfinished(tmp_path / "failed", "", ValueError("x"))
    said = r"Spent in all, with 1 failed run: [\d.]+ \w+, unknown price\.$"
    assert re.search(said, report(tmp_path / "failed").stdout.strip())


def test_a_run_that_goes_on_or_was_killed_is_of_unknown_time(tmp_path):
    content = save(tmp_path / "run", "train", "classification", "", "qlora", status="running")
    (tmp_path / "run" / "train.json").rename(tmp_path / "run" / ".train.json")
    assert report(tmp_path).stdout.strip().endswith("Spent in all: unknown time, unknown price.")
    record.write_json(tmp_path / "run" / "train.json", content | tried("failed", 600.0))
    said = "Spent in all, with 1 failed run: 10.0 min, $0.60 (and 1 run of unknown time)."
    assert report(tmp_path).stdout.strip().endswith(said)


# For programs, and traces


def test_every_cell_is_given_to_programs_with_its_records(study):
    found = json.loads(report(study, "--json").stdout)
    (cell,) = [cell for cell in found if cell["column"] == "a/small" and cell["row"] == ["10 %", "48"]]
    assert (cell["value"], cell["seeds"], cell["text"]) == (62, 3, "62.00 [56.9, 66.8] (3)")
    assert cell["ci95"] == pytest.approx([56.93, 66.82], abs=0.005)
    folders = [f"{study}/seed {seed}" for seed in (1, 2, 3)]
    files = [f"{folder}/{part}.json" for folder in folders for part in ("eval", "train")]
    assert sorted(cell["records"]) == files


def test_a_trace_names_records_commands_and_commit(study):
    done = report(study, "--trace", "table 1, 10 %")
    assert done.returncode == 0
    head, *lines = done.stdout.splitlines()
    title = "Table 1 | classification: accuracy by training share"
    assert head == f"{title} | 10 % | 48 | a/small = 62.00 [56.9, 66.8] (3)"
    stamp = "finished 2024-01-01T00:00:00.000+00:00, commit c0ffee"
    assert f"  {study}/seed 2/eval.json: {stamp}" in lines
    command = "--pretrained_ckpt a/small --seed 2 --train_sample_fraction 0.1"
    assert f"    python llama2_classification_inference.py {command}" in lines
    assert lines.count(f"    python llama2_classification.py {command}") == 1
    assert len(lines) == 12


def test_a_trace_takes_words_side_by_side(tmp_path):
    tuned(tmp_path / "10 %", 60, "--train_sample_fraction 0.1")
    tuned(tmp_path / "10 examples", 50, "--train_sample_fraction 0.025", train={"examples": 10})
    heads = [
        line for line in report(tmp_path, "--trace", "table 1, 10 %").stdout.splitlines() if line[0] != " "
    ]
    assert {head.split(" | ")[2] for head in heads} == {"10 %"}


def test_a_trace_without_a_match_is_one_line(study):
    done = report(study, "--trace", "table 9")
    assert (done.returncode, done.stdout) == (1, "")
    assert "--trace table 9: no cell" in error_line(done)


# Paired tests


def predict(folder: Path, right: str, words: str = "", **more) -> Path:
    """An evaluation with an answer for each letter of `right`, correct where it is "1"."""
    rows = [{"parsed": "yx"[int(mark)], "reference": "x", "correct": mark == "1"} for mark in right]
    score = evaluation(50, examples=len(right)) | metrics.summed_up("classification", rows)
    save(folder, "eval", "classification", words, "qlora", **{"eval": score, **more})
    rows = [{"index": i, "prediction": "x\x85\u2028y", **row} for i, row in enumerate(rows)]
    write_rows(folder / "predictions.jsonl", rows)
    return folder


def rows_of(text: str) -> dict[str, list[str]]:
    """The rows of a comparison's table, by metric."""
    lines = [
        re.split(r" +\| +", line.strip("| ")) for line in text.splitlines() if re.match(r"\| [amiR]", line)
    ]
    return {name: cells for name, *cells in lines}


def test_two_runs_are_compared_as_worked_out_by_hand(tmp_path):
    one, two = predict(tmp_path / "one", "1111111100"), predict(tmp_path / "two", "1110000000")
    done = report("--compare", one, two)
    assert done.returncode == 0, done.stderr
    a, b, difference, ends, p = rows_of(done.stdout)["accuracy"]
    assert (a, b, difference) == ("80.00", "30.00", "+50.00")
    # 5 of 10 won, two more half won and half lost: t(11) = 2.201; sqrt((6 - 25 / 12) / 11 / 12) = 0.172
    assert ends == "+12.09 to +87.91"
    assert float(p) == pytest.approx(2 / 2**5, abs=0.01)  # of the 2^5 ways to swap what differs
    assert "A alone is right 5 times, B alone 0 times, p = 0.062." in done.stdout  # 2 * 0.5^5
    assert "Of these two adapters, not of the settings" in done.stdout


def test_p_that_is_as_small_as_swaps_can_make_it_says_so(tmp_path):
    one, two = predict(tmp_path / "one", "1" * 60), predict(tmp_path / "two", "0" * 60)
    assert rows_of(compare([one], [two]))["accuracy"][-1] == "<= 0.0002"


def test_four_examples_that_differ_are_not_significant_whatever_they_are_among(tmp_path):
    one, two = predict(tmp_path / "one", "1" * 160), predict(tmp_path / "two", "1" * 156 + "0000")
    text = compare([one], [two])
    _, _, difference, ends, p = rows_of(text)["accuracy"]
    assert difference == "+2.50"
    assert ends.startswith("-")
    assert float(p) == pytest.approx(0.125, abs=0.02)
    assert "p = 0.12." in text


SEEDS = ("110100", "110110", "100111")  # of 6 examples with 3 seeds


def sides(root: Path, ours=SEEDS, theirs=("100100", "110000", "000111")) -> list[list[Path]]:
    return [
        [
            predict(root / f"{rank} {i}", right, f"--lora_r {rank} --seed {i}")
            for i, right in enumerate(side, 1)
        ]
        for rank, side in ((8, ours), (16, theirs))
    ]


def test_several_seeds_a_side_are_paired_and_compared_by_the_two_way_variance(tmp_path):
    from scipy.stats import t

    ours, theirs = sides(tmp_path)
    done = report("--compare", *ours, "--against", *theirs)
    assert done.returncode == 0, done.stderr
    a, b, difference, ends, p = rows_of(done.stdout)["accuracy"]
    # Of 18 answers each: 11 against 7 right; by seed 3 - 2, 4 - 2, 4 - 3 of 6.
    assert (a, b, difference) == ("61.11", "38.89", "+22.22")
    assert "Of the settings: 3 pairs of seeds (1, 2, 3) on the same 6 test examples." in done.stdout
    assert "McNemar" not in done.stdout
    by_seed = np.array([1, 2, 1]) / 6
    error = by_seed.std(ddof=1) / np.sqrt(3)
    low, high = map(float, ends.split(" to "))
    assert (high - low) / 200 >= t.ppf(0.975, 2) * error * 0.75  # less only for the two examples more
    assert 0.05 < float(p) < 1


def test_runs_beyond_those_of_the_other_side_are_left_out_by_name(tmp_path):
    ours, theirs = sides(tmp_path)
    text = compare(ours, theirs[:2])
    assert "2 pairs of seeds (1, 2)" in text
    assert f"Left out, for the other side has fewer runs: {ours[2]}" in text
    assert rows_of(text)["accuracy"][0] == "58.33"  # 3 and 4 of 6


def test_seeds_that_no_side_shares_are_paired_in_their_order(tmp_path):
    ours, _ = sides(tmp_path)
    others = [predict(tmp_path / f"x{i}", "110000", f"--lora_r 16 --seed {i}") for i in (7, 8, 9)]
    assert "3 pairs of seeds (1 with 7, 2 with 8, 3 with 9)" in compare(ours, others)


def test_of_seeds_that_both_have_in_part_none_is_wasted(tmp_path):
    ours, _ = sides(tmp_path)
    others = [predict(tmp_path / f"x{i}", "110000", f"--lora_r 16 --seed {i}") for i in (3, 4, 5)]
    assert "3 pairs of seeds (3, 1 with 4, 2 with 5)" in compare(ours, others)


def test_other_references_to_the_same_examples_are_refused(tmp_path):
    one, two = predict(tmp_path / "one", "1100"), predict(tmp_path / "two", "1100")
    content = record.read(two / "eval.json")
    content["eval"]["per_example"]["references"][0] = 1 - content["eval"]["per_example"]["references"][0]
    content["eval"]["per_example"]["answers"][0] = content["eval"]["per_example"]["references"][0]
    content["eval"]["metrics"] = metrics.metrics_of(content["eval"]["per_example"])
    record.write_json(two / "eval.json", content)
    assert "have other classes as references of the same test examples" in error_line(
        report("--compare", one, two)
    )


def test_a_method_without_a_seed_stands_against_every_seed_of_the_other(tmp_path):
    ours, _ = sides(tmp_path)
    plain = predict(tmp_path / "plain", "100000")
    content = record.read(plain / "eval.json") | {"method": "zero-shot"}
    record.write_json(plain / "eval.json", content)
    text = compare(ours, [plain])
    assert rows_of(text)["accuracy"][:3] == ["61.11", "16.67", "+44.44"]
    assert "3 pairs of seeds" in text


@pytest.mark.parametrize(
    ("words", "reason"),
    [("--lora_r 16 --seed 2", "differ in --lora_r"), ("--seed 1", "have the same seed (1)")],
)
def test_a_side_is_one_setting_with_several_seeds(tmp_path, words, reason):
    one, two = predict(tmp_path / "one", "1101", "--seed 1"), predict(tmp_path / "two", "1100", words)
    other = predict(tmp_path / "other", "0101", "--epochs 9 --seed 1")
    done = report("--compare", one, two, "--against", other)
    assert reason in error_line(done)
    assert done.returncode == 1


def test_sides_are_named_by_two_flags(tmp_path):
    one = predict(tmp_path / "one", "1101")
    for words in (["--compare", one], ["--compare", one, one, one], ["--against", one]):
        assert "--compare: it takes two runs, or some runs and the others by --against" in error_line(
            report(*words)
        )


def test_of_a_folder_with_one_evaluation_that_one_is_compared_and_of_several_one_must_be_named(tmp_path):
    one, two = predict(tmp_path / "one", "1100"), predict(tmp_path / "two", "1101")
    (two / "eval.json").rename(two / "eval-0a.json")
    assert "A alone is right 0 times, B alone 1 times" in compare([one], [two])
    (two / "eval-0b.json").write_text((two / "eval-0a.json").read_text())
    with pytest.raises(UserError, match=r"several evaluations: name one of eval-0a\.json, eval-0b\.json"):
        compare([one], [two])


def test_a_run_does_not_differ_from_itself_but_may_elsewhere(tmp_path):
    text = compare([predict(tmp_path / "one", "1" * 90 + "0" * 70)], [tmp_path / "one"])
    # Half a win and half a loss among 162: 1.975 sqrt(1 / 161 / 162)
    assert {(cells[2], cells[3], cells[4]) for cells in rows_of(text).values()} == {
        ("+0.00", "-1.22 to +1.22", "1.0000"),
        ("+0.00", "—", "1.0000"),  # macro F1, where a class has no test example
    }
    assert "0 times, B alone 0 times, p = 1." in text


def test_a_paired_interval_of_rouge_is_students(tmp_path):
    from scipy.stats import ttest_rel

    generator, names = np.random.default_rng(7), ("rouge1", "rouge2", "rougeL", "rougeLsum")
    scores = generator.uniform(20, 60, (2, 40)).round(4)
    for folder, row in zip(("one", "two"), scores, strict=True):
        rows = [dict.fromkeys(names, value) for value in row]
        entry = evaluation(50, "summarization", 40) | metrics.summed_up("summarization", rows)
        save(tmp_path / folder, "eval", "summarization", "", "qlora", eval=entry)
    _, _, difference, ends, p = rows_of(compare([tmp_path / "one"], [tmp_path / "two"]))["ROUGE-1"]
    theirs = ttest_rel(*scores)
    assert float(difference) == pytest.approx((scores[0] - scores[1]).mean(), abs=0.005)
    assert [float(end) for end in ends.split(" to ")] == pytest.approx(
        list(theirs.confidence_interval()), abs=0.01
    )
    assert float(p) == pytest.approx(theirs.pvalue, abs=0.03)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (
            {"data": {"test": {"source": "t", "rows": 4, "sha256": "9" * 64}}},
            "different test examples: 55555555, 99",
        ),
        ({"eval": evaluation(75, metrics_version="1, r", examples=4)}, "different metric versions"),
        ({"status": "failed"}, "no finished evaluation"),
        ({"eval": evaluation(75, examples=4) | {"per_example": None}}, "--rescore"),
    ],
)
def test_a_pair_that_can_not_be_compared_is_refused_in_one_line(tmp_path, more, reason):
    one, two = predict(tmp_path / "one", "0111"), predict(tmp_path / "two", "1101", **more)
    done = report("--compare", one, two)
    assert reason in error_line(done)
    assert (done.returncode, done.stdout) == (1, "")


# Older records


def make_old(path: Path) -> None:
    """As a record was before each example stood in it."""
    content = record.read(path)
    content["eval"].pop("per_example")
    content["eval"]["metrics_version"] = "1, r"
    content["eval"]["metrics"]["accuracy"]["ci95"] = [0.0, 100.0]
    record.write_json(path, content)


def test_an_older_record_is_read_without_an_interval_and_made_anew_from_its_predictions(tmp_path):
    folder = predict(tmp_path / "runs", "1110" * 10)
    new = record.read(folder / "eval.json")
    make_old(folder / "eval.json")
    shown = report(tmp_path).stdout
    assert printed(shown)[METHODS][3][3] == "75.00 (1)"
    assert "Older records have no intervals: --rescore makes them anew." in shown
    done = report(tmp_path, "--rescore")
    assert (done.returncode, done.stderr) == (0, "")
    assert "accuracy 75.00 -> 75.00, metrics 1, r -> 2, rouge-score" in done.stdout
    again = record.read(folder / "eval.json")
    assert again["eval"] == new["eval"]
    assert again.pop("rescored")["from"] == "1, r"
    assert again == new
    assert report(tmp_path, "--rescore").stdout.endswith("eval.json: as it was\n")


def rewrite(change):
    return lambda path: path.write_text(change(path.read_text()))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (Path.unlink, "No such file"),
        (rewrite(lambda text: text[:-20]), "not readable"),
        (rewrite(lambda text: text.partition("\n")[0]), "not whole"),
        (rewrite(lambda text: "{}\n" * 4), "not whole"),
        (rewrite(lambda text: "1\n" * 4), "not whole"),
        (rewrite(lambda text: text.replace('"y"', '"x"')), "accuracy 75.00, its predictions 100.00"),
    ],
)
def test_a_record_whose_predictions_are_not_its_own_stays_as_it_is(tmp_path, spoil, reason):
    one, two = predict(tmp_path / "one", "0111"), predict(tmp_path / "two", "1101")
    for folder in (one, two):
        make_old(folder / "eval.json")
    before = (two / "eval.json").read_bytes()
    spoil(two / "predictions.jsonl")
    done = report(tmp_path, "--rescore")
    assert reason in error_line(done)
    assert done.returncode == 1
    assert "one/eval.json: accuracy 75.00 -> 75.00" in done.stdout
    assert (two / "eval.json").read_bytes() == before


def test_older_summaries_are_scored_anew_by_the_words_as_they_are_now(tmp_path):
    scores, rows = metrics.score("summarization", ["Ann is late", "Bo waits"], ["Ann is late", "Cy came"])
    entry = evaluation(50, "summarization", 2) | scores
    save(tmp_path, "eval", "summarization", "", "qlora", eval=entry)
    write_rows(tmp_path / "predictions.jsonl", rows)
    make = record.read(tmp_path / "eval.json")
    make["eval"].pop("per_example")
    record.write_json(tmp_path / "eval.json", make | {"eval": make["eval"] | {"metrics_version": "1, r"}})
    assert "rouge1 50.00 -> 50.00" in report(tmp_path, "--rescore").stdout
    assert record.read(tmp_path / "eval.json")["eval"]["per_example"] == scores["per_example"]


def test_rescoring_nothing_says_so(tmp_path):
    assert "the folders hold no evaluation" in error_line(report(tmp_path, "--rescore"))


# Bad input

DAMAGE = {  # a file's text to another one
    "no JSON": lambda text: "hello",
    "truncated": lambda text: text[: len(text) // 2],
    "NaN": lambda text: re.sub(r'"peak_memory_gib": [\d.]+', '"peak_memory_gib": NaN', text),
    "schema": lambda text: text.replace('"schema": 1', '"schema": 2'),
}
LACKING = {
    "train": "status script cost train.examples",
    "eval": "status script prompt_sha256 config config.split config.train_sample_fraction data.test.sha256 "
    "cost.gpu eval.metrics eval.metrics.accuracy",
}
ODD = {
    "train": {
        **{"train.seconds": "360", "train.wall_seconds": -1, "train.examples": "480"},
        **{"spent_before": [{"status": "failed", "wall_seconds": -1}], "cost.gpus": "2"},
    },
    "eval": {
        **{"eval": "x", "eval.seconds": -1, "eval.metrics.accuracy.value": "70", "config.lora_r": "8"},
        **{
            "cost.price_per_hour": "3",
            "cost.device": 1,
            "task": "translation",
            "training": "2023-01-01T00:00:00.000+00:00",
        },
        **{
            "cost.device": 1,
            "wall_seconds": -1,
            "spent_before": {"failed": 1},
            "status": ["finished"],
            "config": ["a"],
            "data.test": [],
            "eval.metrics.accuracy": [60, 58, 62],
            "eval.metrics.accuracy.ci95": [58],
            "eval.per_example": {"classes": ["a"], "references": [0], "answers": [0]},
            "eval.per_example.answers": [99] * 1000,
            "eval.per_example.classes": [1, 2],
            "eval.metrics.macro_f1.classes": "ten",
            "eval.examples": 999,
        },
    },
}
KEYS = [(part, key, None) for part, keys in LACKING.items() for key in keys.split()]
KEYS += [(part, key, value) for part, odd in ODD.items() for key, value in odd.items()]


@pytest.fixture
def two_runs(tmp_path) -> Path:
    """A good run, and one to damage in the folder "bad"."""
    tuned(tmp_path / "good", 70)
    tuned(tmp_path / "bad", 60, "--train_sample_fraction 0.5")
    return tmp_path


@pytest.mark.parametrize("part", ["train", "eval"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_is_named_and_left_out(two_runs, part, damage):
    path = two_runs / "bad" / f"{part}.json"
    path.write_text(DAMAGE[damage](path.read_text()))
    done = report(two_runs)
    assert str(path) in error_line(done)
    assert done.returncode == 1
    assert [row[2] for row in printed(done.stdout)[TABLE_1][1:]] == ["70.00 [67.1, 72.8] (1)"]


@pytest.mark.parametrize(("part", "key", "value"), KEYS)
def test_a_record_that_lacks_a_key_or_has_an_odd_value_is_named_and_left_out(two_runs, part, key, value):
    path = two_runs / "bad" / f"{part}.json"
    content = json.loads(path.read_text())
    *parents, last = key.split(".")
    place = content
    for name in parents:
        place = place[name]
    place.pop(last) if value is None else place.update({last: value})
    record.write_json(path, content)
    found, problems = find_runs([two_runs])
    shares, *_ = all_tables(comparable(found), [])
    assert [row[2].text for row in shares.rows] == ["70.00 [67.1, 72.8] (1)"]
    assert [str(path) in problem for problem in problems] == [True]


def test_a_folder_without_records_is_named_and_the_others_show(study, tmp_path):
    done = report(study, tmp_path)
    assert (done.returncode, printed(done.stdout)) == (1, GOLDEN)
    assert f"{tmp_path} holds no records" in error_line(done)
    assert f"{tmp_path}/none holds no records" in error_line(report(tmp_path / "none"))


def test_of_two_records_of_one_cell_and_seed_the_newer_counts(tmp_path):
    for name, value, year in (("a", 50, 2023), ("b", 70, 2025), ("c", 60, 2024)):
        tuned(tmp_path / name, value, finished=f"{year}-01-01T00:00:00.000+00:00")
    done = report(tmp_path)
    assert printed(done.stdout)[TABLE_1][-1][2] == "70.00 [67.1, 72.8] (1)"
    assert done.returncode == 1
    kept = f"is left out: {tmp_path}/b/eval.json is of the same cell and seed, and newer"
    assert done.stderr.splitlines() == [f"error: {tmp_path}/{name}/eval.json {kept}" for name in "ac"]


def test_methods_of_one_title_have_prompts_of_their_own(tmp_path):
    competitor(tmp_path, "t5-full", 60, "", "t5", prompt="1" * 64)
    competitor(tmp_path, "encoder", 70, "", "encoder")
    [(_, why, runs)] = comparable(find_runs([tmp_path])[0])
    assert (why, len(runs)) == ("", 2)


def test_between_settings_run_as_often_a_script_has_its_own_defaults(tmp_path):
    competitor(tmp_path / "usual", "t5-lora", 60, "--tuning lora", "t5")
    competitor(tmp_path / "other", "t5-lora", 70, "--tuning lora --epochs 9 --lora_r 8 --dropout 0.1", "t5")
    found, problems = find_runs([tmp_path])
    assert not problems
    [run] = usual_runs(found)
    assert (run.config["lora_r"], run.config["dropout"], run.config["epochs"]) == (16, 0.05, 5)


def test_a_folder_named_twice_counts_once(study):
    done = report(study, study / "whole", study)
    assert (done.returncode, printed(done.stdout)) == (0, GOLDEN)


# Files


@pytest.fixture(scope="module")
def written(study, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "results"
    done = report(study, "--published", "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_report_is_written_with_each_table_as_csv(written):
    text = (written / "report.md").read_text()
    found = printed(text)
    assert found[TRAINING][1] == GOLDEN[TRAINING][1]
    files = sorted(written.glob("*.csv"))
    assert len(files) == sum(bool(rows) for rows in found.values()) == 11
    with open(files[0], newline="") as file:
        rows = list(csv.DictReader(file))
    assert (rows[2]["a/small"], rows[2]["training share"]) == ("62.0", "10 %")
    ends = [float(rows[2][f"a/small {end}"]) for end in ("low", "high")]
    assert ends == pytest.approx([56.93, 66.82], abs=0.005)
    assert (rows[2]["b/big"], rows[5]["b/big"], rows[5]["b/big low"][:4]) == ("—", "80.0", "77.4")
    assert rows[2]["Llama2-7B †"] == "55.97"


PLOTS = {
    "classification-accuracy-by-number-of-training-examples": [
        *("training examples", "accuracy (%)", "b/big", "Llama2-7B (published)")
    ],
    "classification-accuracy-by-training-cost": [
        *("training cost (USD)", "accuracy (%)", "b/big, on the front or not told from it"),
        "Pareto front, found by 7 trainings for $9.60",
    ],
    "classification-lora-grid-a-small-100-of-the-examples": ["epochs", "LoRA rank", "dropout 0.1"],
    "classification-confusion-matrix-a-small": ["reference", "answer", "a", "b", "(invalid)", "69", "16"],
    "classification-confusion-matrix-a-small-zero-shot-free-decoding": [
        "reference",
        "answer",
        "a",
        "(invalid)",
        "42",
    ],
    "classification-confusion-matrix-b-big": ["reference", "answer", "a", "b", "(invalid)", "78", "10"],
    "classification-training-loss": ["optimizer step"],
    "summarization-rouge-1-by-number-of-training-examples": ["training examples", "ROUGE-1 (%)"],
    "summarization-rouge-1-by-training-cost": ["training cost (USD)", "ROUGE-1 (%)"],
    "summarization-training-loss": ["optimizer step"],
}


def test_every_plot_is_drawn_with_its_axes_named_and_shown_in_the_report(study, written):
    assert {path.stem for path in written.glob("*.png")} == set(PLOTS)
    groups = comparable(find_runs([study])[0])
    texts = {
        name: {text.get_text() for text in figure.findobj(Text)}
        for name, _, figure in plots.figures(groups, [], published=True)
    }
    assert texts.keys() == PLOTS.keys()
    for name, labels in PLOTS.items():
        assert (written / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert (written / f"{name}.png").stat().st_size > 3_000
        with Image.open(written / f"{name}.png") as image:
            assert (image.mode, image.info["dpi"]) == ("P", pytest.approx((150, 150), abs=0.1))
        assert texts[name] >= set(labels), name
        assert f"({name}.png)" in (written / "report.md").read_text()


def test_colours_can_be_told_apart_in_grey_and_styles_do_not_recur_soon():
    luma = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in map(to_rgb, plots.COLORS)]  # of ITU-R BT.601
    assert all(after - before > 0.06 for before, after in pairwise(luma))
    assert luma[-1] < 0.75  # and from white
    sizes = map(len, (plots.COLORS, plots.MARKERS, plots.DASHES))
    assert math.lcm(*sizes) > 100


def test_what_needs_no_training_is_a_level_in_the_plots_and_a_cheap_method_a_line(tmp_path):
    baseline(tmp_path, 20)
    for share, value in ((0.1, 50), (1.0, 70)):
        words = f"--train_sample_fraction {share}"
        tuned(tmp_path / f"{share}", value, words, train={"examples": round(480 * share)})
        cheap = {"method": "tfidf-nb", "model": "TF-IDF + naive Bayes"}
        folder = tuned(tmp_path / f"cheap {share}", value - 5, words, train={"examples": round(480 * share)})
        for path in folder.glob("*.json"):
            record.write_json(path, json.loads(path.read_text()) | cheap)
    drawn = plots.figures(comparable(find_runs([tmp_path])[0]), [], published=False)
    for (name, _, figure), _ in zip(drawn, range(2), strict=False):
        lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
        level = lines["a/small, zero-shot, free decoding, no training"]
        assert list(level.get_ydata()) == [20, 20], name
    figure = next(plots.figures(comparable(find_runs([tmp_path])[0]), [], published=False))[2]
    _, labels = figure.axes[0].get_legend_handles_labels()
    assert {"a/small", "TF-IDF + naive Bayes"} <= {*labels}
    looks = {(bars[0].get_color(), bars[0].get_linestyle()) for bars in figure.axes[0].containers}
    assert len(looks) == 2


def test_a_picture_of_what_stands_apart_is_named_after_that(tmp_path):
    tuned(tmp_path / "one", 70)
    tuned(tmp_path / "two", 72, "--seed 1")
    other = {"test": {"source": "data/t.csv", "rows": 1000, "sha256": "9" * 64}}
    tuned(tmp_path / "other", 90, "--seed 2", data=other)
    tuned(tmp_path / "more", 90, "--seed 3", data={"test": other["test"] | {"sha256": "8" * 64}})
    drawn = [name for name, *_ in plots.figures(comparable(find_runs([tmp_path])[0]), [], published=False)]
    beside = "classification-training-loss-apart-1-000-test-examples-of-t"
    assert [name for name in drawn if "loss" in name] == [
        "classification-training-loss",
        beside,
        f"{beside}-too",
    ]


def test_the_confusion_matrix_is_not_drawn_of_what_stands_beside_the_test_split_to_choose_by(tmp_path):
    validation = {"validation": {"source": "v.csv", "rows": 1000, "sha256": "7" * 64}}
    for rank in (8, 16):
        words = f"--split validation --validation_fraction 0.1 --lora_r {rank}"
        tuned(tmp_path / f"chosen {rank}", 50, words, data=validation)

    def matrices() -> list[str]:
        groups = comparable(find_runs([tmp_path])[0])
        return [name for name, *_ in plots.figures(groups, [], published=False) if "matrix" in name]

    assert len(matrices()) == 1
    tuned(tmp_path / "one", 50, "--seed 1")
    tuned(tmp_path / "two", 50, "--seed 2")
    assert matrices() == ["classification-confusion-matrix-a-small"]


def test_plots_with_long_titles_have_files_of_their_own_and_no_loss_is_no_plot(tmp_path):
    for rank in (8, 16):
        for column in "ab":
            words = f"--lora_r {rank} --text_column {column * 120} --label_column {column * 120}"
            tuned(tmp_path / f"{column} {rank}", 60, words, train={"loss_history": []})
    assert report(tmp_path, "--output_dir", tmp_path / "out").returncode == 0
    assert len(list(tmp_path.glob("out/classification-lora-grid*.png"))) == 2
    assert not list(tmp_path.glob("out/*loss*"))


def test_the_same_records_give_the_same_files(study, written, tmp_path):
    assert report(study, "--published", "--output_dir", tmp_path).returncode == 0
    names = [path.name for path in written.iterdir() if path.suffix in {".png", ".csv"}]
    assert [name for name in names if (written / name).read_bytes() != (tmp_path / name).read_bytes()] == []


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_that_is_not_utf_8_shows_what_it_can(study, tmp_path, monkeypatch, encoding):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    monkeypatch.setenv("PYTHONUTF8", "0")
    done = report(study, tmp_path / "—", "--output_dir", tmp_path / "out")
    assert done.returncode == 1
    assert "? holds no records" in error_line(done)
    assert "70.00" in done.stdout
    assert "—" in (tmp_path / "out" / "report.md").read_text("utf-8")


def test_an_output_folder_that_is_a_file_is_refused_in_one_line(study, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / "file") in error_line(report(study, "--output_dir", tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_the_pareto_front_has_no_point_that_a_cheaper_one_equals():
    from study.report.plots import pareto

    points = dict(enumerate([(4, 70), (2, 40), (1, 50), (3, 60), (2, 60), (5, 65)]))
    assert [points[name] for name in pareto(points)] == [(1, 50), (2, 60), (4, 70)]


# Chosen on validation


def validated(folder: Path, value: float, words: str, **more) -> Path:
    """A run that was scored on the validation split."""
    data = {"validation": {"source": "v.jsonl", "rows": 1000, "sha256": "6" * 64}}
    return tuned(folder, value, f"{words} --split validation", data=data, **more)


def test_the_best_cell_on_validation_is_named_and_grids_say_which_split_they_are_of(tmp_path):
    for rank, rate, value in ((2, "1e-4", 60), (4, "1e-4", 70), (2, "1e-3", 65), (4, "1e-3", 64)):
        validated(tmp_path / f"{rank} {rate}", value, f"--lora_r {rank} --learning_rate {rate}")
    best = report("--best", tmp_path)
    assert best.stdout == f"{tmp_path / '4 1e-4'}\n", best.stderr
    test = {"test": {"source": "t.jsonl", "rows": 1000, "sha256": "5" * 64}}
    tuned(tmp_path / "best, on test", 68, "--lora_r 4 --learning_rate 1e-4", data=test)
    found = tables(tmp_path)
    assert found[TABLE_1].rows[-1][2].value == 68
    [grid] = [table for title, table in found.items() if title.startswith("LoRA ablation")]
    assert "apart: 1,000 validation examples of v.jsonl" in grid.title
    assert grid.columns[:3] == ["learning rate", "dropout", "rank"]
    assert [row[3].text.count("best") for row in grid.rows] == [0, 1, 0, 0]
    assert "what counts is its score on the test split" in grid.note
    [validation] = [table for title, table in found.items() if title.startswith(f"{TABLE_1}, apart")]
    assert validation.rows[-1][2].value == 70
    assert "learning rate 0.0001, the best of 4 settings by these very scores. " in validation.note
    assert "very scores" not in found[TABLE_1].note


def test_a_setting_without_a_score_is_not_among_those_that_the_best_is_of(tmp_path):
    for rate, value in (("1e-4", 70), ("1e-3", 64), ("5e-4", 66)):
        folder = validated(tmp_path / rate, value, f"--learning_rate {rate}")
    content = record.read(folder / "eval.json")
    failed = {"status": "failed", "error": {"type": "X", "message": "x", "advice": "x"}}
    record.write_json(folder / "eval.json", {k: v for k, v in content.items() if k != "eval"} | failed)
    [table] = [table for name, table in tables(tmp_path).items() if name.startswith(TABLE_1)]
    assert table.rows[-1][2].value == 70
    assert "learning rate 0.0001, the best of 2 settings by these very scores. " in table.note


def test_no_setting_is_chosen_by_its_scores_on_the_test_split(tmp_path):
    for rate, value in (("1e-4", 70), ("1e-3", 64), ("5e-4", 80)):
        tuned(tmp_path / rate, value, f"--learning_rate {rate}")
    found = tables(tmp_path)
    assert found[TABLE_1].rows[-1][2].value == 64
    assert "very scores" not in found[TABLE_1].note


def test_without_scores_on_validation_no_cell_is_named(tmp_path):
    tuned(tmp_path / "run", 70)
    done = report("--best", tmp_path)
    assert done.returncode == 1
    assert "--best: 0 groups of runs are scored on a validation split" in done.stderr


def test_the_best_is_that_of_the_evaluations_that_are_named(tmp_path):
    """Of free decoding, with those of constrained decoding beside them."""
    for rank, free, constrained in ((2, 60, 80), (4, 70, 75)):
        folder = validated(tmp_path / str(rank), free, f"--lora_r {rank}")
        content = record.read(folder / "eval.json") | {"eval": evaluation(constrained)}
        content["config"] |= {"decoding": "constrained"}
        record.write_json(folder / "eval-12345678.json", content)
    for name, rank in (("eval.json", "4"), ("eval-12345678.json", "2")):
        best = report("--best", *(tmp_path / folder / name for folder in "24"))
        assert (best.stdout, best.stderr) == (f"{tmp_path / rank}\n", "")
