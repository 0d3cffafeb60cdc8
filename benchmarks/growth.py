"""What grows with the number of records, of cells and of rows: seconds, processor seconds and peak memory.

    python -m benchmarks.growth --records results/demo/experiments results/newsgroups/experiments \
        --train_file newsgroups_train.jsonl.gz --model CKPT --output growth.json

Records are copies of real ones with other settings, written as runs write theirs. `find` is what a report
does first, `report` prints every table, `plots` writes these and the plots. `dry run` lists so many cells of
run_lora.sh in a folder with as many records. Rows are real texts, cut to --row_bytes, no two alike; `train`
and `score` are the ordinary scripts, from their start to the first step and to the first batch of answers.
Each line is a process of its own, so that its peak memory is its own.
"""

import argparse
import gzip
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.provenance import headline, provenance
from benchmarks.workers import finish, names, numbers
from study import cli, device
from study.errors import UserError
from study.files import read_file
from study.records import record, runs
from study.records.schema import METHODS
from study.report import collect

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("records", "cells", "rows")
SEEDS = 8  # of each setting of the copies, before the next learning rate
OWN = {"schema", "status", "script", "task", "method", "model", "config", "config_hash", "started"}


def copies(folders: Sequence[Path], into: Path) -> Iterator[int]:
    """Write copies of the finished trainings in `folders`, each with its evaluations, and yield after each
    run how many records were written."""
    found, _ = collect.find_runs(folders)
    trained = [run for run in found if run.train and run.scored]
    if not trained:
        raise UserError(f"--records {' '.join(map(str, folders))}: no run there is trained and scored")
    for number in count():
        for run in trained:
            yield copy_run(run, number, into)


def copy_run(run: collect.Run, number: int, into: Path) -> int:
    """Its settings are the `number`th of seeds and, where its method has them, learning rates."""
    args, rated = runs.flags_of(run.train), "learning_rate" in METHODS[run.content["method"]].settings
    args.output_dir, args.experiment_dir = str(into), None
    args.seed = run.seed + 1000 * (1 + (number % SEEDS if rated else number))
    if rated:
        args.learning_rate = 1e-5 * (1 + number // SEEDS)
    folder = runs.folder_of(args, run.content["method"])
    changed = {name: value for name, value in vars(args).items() if value != run.train["config"].get(name)}
    scored = argparse.Namespace(**vars(runs.flags_of(run.content)) | changed)
    before = len(list(folder.glob("*.json")))  # a training may have several evaluations
    if not before:
        write_copy(folder / "train.json", run.train, args)
    if not (folder / run.path.name).exists():
        of = runs.scored_adapter(record.read(folder / "train.json"))
        write_copy(folder / run.path.name, run.content | of, scored)
    return len(list(folder.glob("*.json"))) - before


def write_copy(path: Path, content: dict, args: argparse.Namespace) -> None:
    process = device.Process(content["script"])
    with (
        record.locked(path.parent, process),
        record.recording(path, args, content["method"], process) as left,
    ):
        left |= {name: value for name, value in content.items() if name not in OWN}


# Rows


class Ready(BaseException):
    """Everything before the first step is done. (No Exception, which a run would record as its failure.)"""


def write_rows(source: Path, row_bytes: int, number: int, into: Path) -> None:
    """So many rows in the order of the texts, which are cut into pieces and, from the second round on, begin
    with the number of their round."""
    columns = {"--text_column": "text", "--label_column": "label"}
    pieces = []
    for _, row in read_file(source, "--train_file", columns):
        text = row["text"] or ""
        cut = (text[i : i + row_bytes].strip() for i in range(0, len(text), row_bytes))
        pieces += dict.fromkeys((piece, row["label"]) for piece in cut if len(piece) > row_bytes / 2)
    pieces = list(dict.fromkeys(pieces))
    with gzip.open(into, "wt", compresslevel=1, encoding="utf-8") as file:
        for i in range(number):
            again, (text, label) = i // len(pieces), pieces[i % len(pieces)]
            print(json.dumps({"text": f"{again} {text}" if again else text, "label": label}), file=file)


def prepare(script: str, words: Sequence[str]) -> None:
    """A script up to its first step, or its first batch of answers."""
    import transformers

    from study import generation

    def ready(*_, **__):
        raise Ready

    transformers.Trainer.train = generation.fast_answers = generation.plain_answers = ready
    sys.argv = [script, *words]
    try:
        runpy.run_path(str(ROOT / script))["main"](device.Process(script))
    except Ready:
        return
    raise UserError(f"{script} never began")


def of_rows(args: argparse.Namespace, folder: Path) -> Iterator[dict]:
    trainer, scorer = "llama2_classification.py", "llama2_classification_inference.py"
    model = ("--pretrained_ckpt", args.model)
    run, few = folder / "run", folder / "few.jsonl.gz"
    write_rows(args.train_file, args.row_bytes, 20_000, few)
    words = (*model, "--train_file", few, "--max_train_samples", 64, "--epochs", 1, "--experiment_dir", run)
    measured([ROOT / trainer, *words])
    for number in args.rows:
        rows = folder / f"{number}.jsonl.gz"
        write_rows(args.train_file, args.row_bytes, number, rows)
        for what, script, more in (
            ("train", trainer, (*model, "--train_file", rows, "--output_dir", folder / "training")),
            ("score", scorer, ("--experiment_dir", run, "--test_file", rows)),
        ):
            done = measured(["-m", "benchmarks.growth", "--worker", script, *more])
            yield {"what": what, "rows": number, "megabytes": size_of(rows) / 1e6} | done
        rows.unlink()


def size_of(packed: Path) -> int:
    with gzip.open(packed) as file:
        return sum(map(len, file))


# Records and cells


def of_records(args: argparse.Namespace, folder: Path) -> Iterator[dict]:
    finding = "import sys; from pathlib import Path; from study.report import collect; "
    finding += "collect.find_runs([Path(sys.argv[1])])"
    for number, place, _ in grown(args, folder):
        for what, words in (
            ("find", ["-c", finding, place]),
            ("report", ["-m", "study.report", place]),
            ("plots", ["-m", "study.report", place, "--output_dir", folder / "plots"]),
        ):
            yield {"what": what, "records": number} | measured(words)


def of_cells(args: argparse.Namespace, folder: Path) -> Iterator[dict]:
    """Of the demo's grid on summarization: ranks, epochs, dropouts and as many seeds as it takes."""
    os.environ |= {
        "RANKS": "2 4 8 16",
        "EPOCHS": "1 2 5 10 20",
        "DROPOUTS": "0.1 0.5",
        "TASK": "summarization",
    }
    flags = ["--pretrained_ckpt", "demo/model", "--learning_rate", "1e-5", "--batch_size", "8", "--dry_run"]
    flags += [f"--{name}_file=demo/data/dialogues_{name}.jsonl" for name in ("train", "test")]
    for number, place, written in grown(args, folder):
        os.environ["SEEDS"] = " ".join(str(1001 + seed) for seed in range(-(-number // 40)))
        done = measured([ROOT / "run_lora.sh", *flags, "--output_dir", place], program=[])
        yield {"what": "dry run", "records": written, "cells": -(-number // 40) * 40} | done


def grown(args: argparse.Namespace, folder: Path) -> Iterator[tuple[int, Path, int]]:
    """Each number, and a folder with so many records or, where a step before has left more, these."""
    place, written = folder / "experiments", len(list((folder / "experiments").glob("*/*.json")))
    kept = copies(args.records, place) if written < max(args.numbers) else iter(())
    for number in args.numbers:
        while written < number:
            written += next(kept)
        yield number, place, written


# Measuring


def measured(words: Sequence[object], program: Sequence[str] = (sys.executable,)) -> dict:
    """A process, with those that it starts: its seconds, processor seconds, and the peak memory of the
    largest. Raises UserError where it fails."""
    began = time.monotonic()
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.Popen(
        [*program, *map(str, words)], env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    error = done.stderr.read().decode()
    _, status, used = os.wait4(done.pid, 0)
    if status:
        raise UserError(f"{words[0]} failed: {error.strip()[-300:]}")
    return {
        "seconds": time.monotonic() - began,
        "processor_seconds": used.ru_utime + used.ru_stime,
        "peak_memory_gib": used.ru_maxrss / 2**20,  # KiB on Linux
    }


def show(rows: Sequence[dict]) -> str:
    from tabulate import tabulate

    lines = [
        [
            row["what"],
            *(f"{row[name]:,}" if name in row else "" for name in ("records", "cells", "rows")),
            f"{row['seconds']:.1f}",
            f"{row['processor_seconds']:.1f}",
            f"{row['peak_memory_gib']:.2f}",
        ]
        for row in rows
    ]
    titles = ["", "records", "cells", "rows", "seconds", "processor seconds", "peak GiB"]
    return tabulate(lines, titles, tablefmt="github", disable_numparse=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--records", nargs="+", type=Path, metavar="FOLDER", help="finished runs, to copy")
    add("--numbers", type=numbers, default=[100, 1000, 4000, 10_000], help="of records (100,1000,4000,10000)")
    add("--train_file", type=Path, metavar="FILE", help="real texts with classes, columns text and label")
    add("--model", default="demo/model", metavar="CKPT", help="whose tokenizer counts (%(default)s)")
    add("--rows", type=numbers, default=[10_000, 100_000, 1_000_000], help="(10000,100000,1000000)")
    add("--row_bytes", type=int, default=1000, help="of a text (%(default)s)")
    add("--steps", type=names, default=list(STEPS), help=f"of {','.join(STEPS)} (all)")
    add("--output", type=Path, metavar="FILE", help="write the table as JSON here, too")
    return parser


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return prepare(sys.argv[2], sys.argv[3:])
    parser = build_parser()
    args, about, rows = parser.parse_args(), provenance(), []
    for step in args.steps:
        needed = "train_file" if step == "rows" else "records"
        if step not in STEPS or not getattr(args, needed):
            parser.error(f"--steps {step}: it is of {', '.join(STEPS)}, and needs --{needed}")
    os.environ["STUDY_COMMIT"] = about["commit"] or ""  # not asked for anew for each copied record
    with TemporaryDirectory() as folder:
        for step in args.steps:
            for row in {"records": of_records, "cells": of_cells, "rows": of_rows}[step](args, Path(folder)):
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    print(f"{headline(about)}\n\n{show(rows)}\n")
    finish({**about, "rows": rows}, rows, args.output)


if __name__ == "__main__":
    sys.exit(cli.run_script(lambda _: main()))
