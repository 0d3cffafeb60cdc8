"""A model that no GPU of the machine has room for, trained by several: the scripts' own path through FSDP2.

    python -m benchmarks.sharding --model CKPT --train_file FILE --test_file FILE --gib 8 --gpus 2

All but --gib of every GPU's memory is held by a process beside it while a training is to have no more; one
GPU then runs out of it. Two trainings by plain layers on one GPU with all its memory, which differ in the
tokens they compute at once alone, say how far apart bfloat16's rounding leaves the same training. Beside
them stand that of --gpus which share the layers, and the same again, killed after its first checkpoint and
resumed. The last line is all of it as JSON; an adapter that is further apart than rounding explains ends the
benchmark with an error behind it.
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.provenance import headline, provenance
from benchmarks.workers import check_output, finish
from study import cli

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(ROOT / "llama2_classification.py")


def flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="CKPT", help="hub id or local folder of a causal model")
    add("--train_file", required=True, metavar="FILE", help="train examples")
    add("--test_file", required=True, metavar="FILE", help="test examples")
    add("--gpus", type=cli.positive_int, default=2, help="that share the layers (%(default)s)")
    add("--gib", type=float, required=True, help="memory that a GPU is to have")
    add("--tokens", type=cli.positive_int, default=1024, help="computed at once (%(default)s)")
    add("--examples", type=cli.positive_int, default=320, help="to train on, once (%(default)s)")
    add("--output", type=Path, metavar="FILE", help="write the table as JSON here, too")
    args = parser.parse_args(argv)
    check_output(parser, args.output)
    return args


@contextlib.contextmanager
def little_memory(gpus: int, gib: float) -> Iterator[None]:
    """Hold all of the GPUs' free memory but `gib`, in a process that ends with the block."""
    code = (
        "import sys, torch\n"
        "held = [torch.empty(max(0, torch.cuda.mem_get_info(i)[0] - int(float(sys.argv[2]) * 2**30)), "
        "dtype=torch.uint8, device=i) for i in range(int(sys.argv[1]))]\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    words = [sys.executable, "-c", code, str(gpus), str(gib)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        if holder.stdout.readline() != "held\n":
            sys.exit("error: the GPUs' memory can't be held: see above")
        yield
        holder.stdin.close()


def command(args: argparse.Namespace, folder: Path, gpus: int, tokens: int) -> list[str]:
    start = [sys.executable, SCRIPT]
    if gpus > 1:
        config = ["--config_file", str(ROOT / "docs" / "fsdp2.yaml"), "--num_processes", str(gpus)]
        start = [sys.executable, "-m", "accelerate.commands.launch", *config, SCRIPT]
    of = ["--pretrained_ckpt", args.model, "--train_file", args.train_file, "--test_file", args.test_file]
    size = ["--max_train_samples", str(args.examples), "--epochs", "1", "--dropout", "0"]
    plain = ["--attn_implementation", "sdpa", "--max_tokens_per_batch", str(tokens)]
    return [*start, *of, *size, *plain, "--gradient_checkpointing", "on", "--experiment_dir", str(folder)]


def train(args: argparse.Namespace, folder: Path, gpus: int, tokens: int, killed: bool = False) -> dict:
    """A row: the run's losses, speed and memory, or {"failed": its last line}. One to be `killed` is so
    after its first checkpoint, and started again."""
    resumed = None
    words = command(args, folder, gpus, tokens)
    with (folder.parent / f"{folder.name}.log").open("w+", encoding="utf-8") as log:
        if killed:
            resumed = kill_after_checkpoint(words, folder, log)
        code = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        log.seek(0)
        lines = [line for line in log.read().replace("\r", "\n").splitlines() if line.strip()] or [""]
    if code:
        errors = [line for line in lines if line.startswith("error:")] or lines[-1:]
        print(*lines[-6:], sep="\n", file=sys.stderr)
        return {"failed": errors[0][:200], "exit": code}
    content = json.loads((folder / "train.json").read_text(encoding="utf-8"))["train"]
    names = ("tokens_per_second", "peak_memory_gib", "loss_history", "steps", "batching")
    return {name: content[name] for name in names} | {"resumed_from": resumed}


def kill_after_checkpoint(words: Sequence[str], folder: Path, log) -> str:
    """Run until there is a checkpoint, kill all its processes, and say which it was."""
    import psutil

    started = psutil.Popen(words, stdout=log, stderr=subprocess.STDOUT)
    while not (found := sorted(folder.glob("checkpoints/checkpoint-*/progress.json"))):
        if started.poll() is not None:
            return "none: it ended before its first checkpoint"
        time.sleep(0.05)
    every = [started, *started.children(recursive=True)]  # a launcher's are in sessions of their own
    for process in every:
        process.kill()
    psutil.wait_procs(every)
    return found[0].parent.name


def adapter_of(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def apart(row: dict, folder: Path, reference: dict, other: Path) -> dict:
    """How far a training is from the reference: the largest difference of a loss, and that of the adapters
    relative to how far the reference's came from where it began, |a - b| / |b - b_0|."""
    losses = [abs(a[1] - b[1]) for a, b in zip(row["loss_history"], reference["loss_history"], strict=True)]
    ours, theirs = adapter_of(folder), adapter_of(other)
    # B begins at 0, so all of it is what was learned; A's beginning is not kept.
    learned = [name for name in theirs if "lora_B" in name]
    off = sum(float((ours[name].float() - theirs[name].float()).square().sum()) for name in learned)
    size = sum(float(theirs[name].float().square().sum()) for name in learned)
    return {"loss_apart": max(losses), "adapter_apart": (off / size) ** 0.5}


def too_far(rows: Sequence[dict]) -> str | None:
    """The trainings whose adapters are more than three times as far from the first row's as that of the
    second, which differs by rounding alone; None without any."""
    rounding, *others = (row.get("adapter_apart", 0.0) for row in rows[1:])
    found = [row["what"] for row, apart in zip(rows[2:], others, strict=True) if apart > 3 * rounding > 0]
    return (
        f"{' and '.join(found)}: another adapter than rounding explains ({rounding:.1e})" if found else None
    )


def show(rows: Sequence[dict]) -> str:
    from tabulate import tabulate

    lines = []
    for row in rows:
        start = [row["what"], row["gpus"], "all" if row["gib"] is None else f"{row['gib']:g}"]
        if "failed" in row:
            lines.append([*start, *["—"] * 5, row["failed"]])
            continue
        loss = row["loss_history"]
        lines.append(
            [
                *start,
                f"{loss[0][1]:.4f} to {loss[-1][1]:.4f}",
                f"{row['loss_apart']:.1e}" if "loss_apart" in row else "—",
                f"{row['adapter_apart']:.1e}" if "adapter_apart" in row else "—",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['peak_memory_gib']:.1f}",
                row["resumed_from"] or "",
            ]
        )
    titles = ["what", "GPUs", "GiB each", "loss", "losses apart", "adapters apart", "tokens/s", "peak GiB"]
    return tabulate(lines, [*titles, "remark"], tablefmt="github", disable_numparse=True)


def main() -> None:
    import torch

    args, rows = flags(), []
    if torch.cuda.device_count() < args.gpus:
        sys.exit(f"error: --gpus {args.gpus}: this machine has {torch.cuda.device_count()} GPUs")
    plan = (
        ("one GPU", 1, None, args.tokens, False),
        ("one GPU, other passes", 1, None, 2 * args.tokens, False),
        ("one GPU", 1, args.gib, args.tokens, False),
        ("shared layers", args.gpus, args.gib, args.tokens, False),
        ("shared layers, killed, resumed", args.gpus, args.gib, args.tokens, True),
    )
    with tempfile.TemporaryDirectory() as work:
        for number, (what, gpus, gib, tokens, killed) in enumerate(plan):
            folder = Path(work, str(number))
            with little_memory(args.gpus, gib) if gib else contextlib.nullcontext():
                row = {"what": what, "gpus": gpus, "gib": gib} | train(args, folder, gpus, tokens, killed)
            if number and "failed" not in row and "failed" not in rows[0]:
                row |= apart(row, folder, rows[0], Path(work, "0"))
            rows.append(row)
            print(show(rows).splitlines()[-1], file=sys.stderr, flush=True)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    result = provenance() | {"rows": rows}
    print(f"{headline(result)}\n\n{show(rows)}\n")
    finish(result, rows, args.output)
    if why := too_far(rows):
        sys.exit(f"error: {why}")


if __name__ == "__main__":
    main()
