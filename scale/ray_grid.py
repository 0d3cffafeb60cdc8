"""The cells of a loop on many machines: each unit of work is a Ray task, placed on whatever is free.

    python scale/ray_grid.py ./run_lora.sh FLAGS...                 # on this machine
    python scale/ray_grid.py --address auto ./run_lora.sh FLAGS...  # on a cluster

A unit is a cell, or cells that share a training or a loading. Every node needs this folder, the data and the
checkpoint at the same paths; --output_dir may be a folder that all share, or one of each. Started again, it
goes on. docs/many-machines.md has more.
"""

import argparse
import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scale import cluster, on_node, units
from scale.grid import Grid
from scale.on_node import Job
from scale.units import Budget, Unit
from study import cli, device
from study.files import write_text
from study.records import record

STORE = 200 * 2**20  # bytes of the object store of a Ray that is started here: all of it shares one folder


def main(process: device.Process) -> None:
    args = parse()
    variables = variables_of(args.gpus_per_cell)
    if {"--dry_run", "--help", "-h"} & {cli.underscored(word) for word in args.flags}:
        env = units.environment(variables)
        sys.exit(subprocess.run([args.loop, *args.flags], env=env, check=False).returncode)
    found = listed(args.loop, args.flags, variables)
    budget, grid = Budget(args.budget_hours, args.budget_usd), None
    with record.locked(Path(args.output_dir), process, "--output_dir"):
        todo = [unit for unit in found if not unit.finished]
        if todo:
            with (
                token(Path(args.output_dir)) as file,
                cluster.joined(args.address, STORE, "requirements-scale.txt") as ray,
                stdout_alone() as out,
            ):
                for signum in (signal.SIGTERM, signal.SIGINT):  # Ray has set its own, which abort
                    signal.signal(signum, signal.default_int_handler)
                job = job_of(args, variables, file, ray)
                grid = Grid(ray, job, budget, args.cpus_per_cell, out)
                grid.do(todo)
    end(args, variables, budget, grid)


def variables_of(gpus: float | None) -> dict[str, str]:
    """Those that say what the loop goes through, and of a GPU that cells share how much is a cell's: its dry
    runs go by that as the cells do."""
    names = [*units.VARIABLES.split(), "GPU_SHARE"]
    found = {name: os.environ[name] for name in names if os.environ.get(name)}
    return found | ({"GPU_SHARE": f"{gpus:g}"} if gpus and gpus < 1 else {})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags] LOOP [flags of the loop]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--address", metavar="HOST:PORT", help='of a Ray cluster, or "auto" (Ray is started here)')
    add("--gpus_per_cell", type=amount, metavar="N", help="1 where the cluster has GPUs, else 0")
    add("--cpus_per_cell", type=amount, default=1, metavar="N", help="cores, and threads (%(default)s)")
    add("loop", metavar="LOOP", help="run_lora.sh or another one")
    add("flags", nargs=argparse.REMAINDER, help="its own flags")
    words = sys.argv[1:]
    args = parser.parse_args([cli.underscored(word) for word in words])
    args.flags = words[len(words) - len(args.flags) :]
    if not os.access(args.loop, os.X_OK) or Path(args.loop).suffix != ".sh":
        parser.error(f"{args.loop} is none of the loops, such as ./run_lora.sh")
    if os.environ.get("ONLY"):
        parser.error(f"ONLY={os.environ['ONLY']} is for a loop by itself: unset it")
    args.loop = str(Path(args.loop).resolve())
    return read_loop_flags(args)


def amount(word: str) -> float:
    number = float(word)
    if not 0 <= number < 10000 or (number > 1 and number % 1):
        raise argparse.ArgumentTypeError(f"{word} is neither a share of one nor a whole number")
    return number


def most(word: str) -> float:
    if not re.fullmatch(r"[0-9]*[.]?[0-9]+", word):  # as study/loop.sh has it
        raise argparse.ArgumentTypeError(f"{word}: it takes a number")
    return float(word)


def read_loop_flags(args: argparse.Namespace) -> argparse.Namespace:
    """Add those of the loop's flags that concern the grid; `flags` keeps all but the budget, as written."""
    usage = "%(prog)s [flags of the loop]"
    parser = argparse.ArgumentParser(Path(args.loop).name, usage, allow_abbrev=False, add_help=False)
    parser.add_argument("--budget_hours", type=most)
    parser.add_argument("--budget_usd", type=most)
    parser.add_argument("--price_per_hour", type=cli.positive_float)
    parser.add_argument("--output_dir", default="experiments")
    parser.add_argument("--gpu_name")
    known, _ = parser.parse_known_args([cli.underscored(word) for word in args.flags])
    kept, words = [], iter(args.flags)
    for word in words:
        if not cli.underscored(word).startswith("--budget_"):
            kept.append(word)
        elif "=" not in word:
            next(words, None)
    args.flags = kept
    return argparse.Namespace(**vars(known), **vars(args))


def listed(loop: str, flags: list[str], variables: dict[str, str]) -> list[Unit]:
    """The units of a loop. Exits as its dry run does where that lists nothing."""
    cells, status, errors = units.list_cells(loop, flags, variables, os.getcwd())
    if not cells:
        print(errors or "error: the loop has no cells", end="", file=sys.stderr)
        sys.exit(status or 1)
    return units.units_of(cells)


@contextlib.contextmanager
def token(folder: Path) -> Iterator[tuple[str, str]]:
    """A file in `folder` by which a node knows that it shares it, and its content."""
    path, content = folder / ".ray_grid", secrets.token_hex(16)
    write_text(path, content)
    try:
        yield str(path), content
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def stdout_alone() -> Iterator:
    """What is stdout, without the state of its daemons that Ray prints there."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield sys.__stdout__


def job_of(args: argparse.Namespace, variables: dict[str, str], file: tuple[str, str], ray) -> Job:
    gpus = args.gpus_per_cell
    if gpus is None:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
    price = args.gpu_name, args.price_per_hour
    paths = paths_in([*args.flags, *variables.values()], args.output_dir)
    return Job(args.loop, args.flags, variables, os.getcwd(), paths, on_node.code_of(), file, gpus, price)


def paths_in(words: list[str], output_dir: str) -> list[str]:
    """The files and folders that stand in words, or behind a "=" in them, but for what the runs leave."""
    parts = [part for word in words for each in word.split() for part in (word, each, each.partition("=")[2])]
    there = (part for part in parts if part and not part.isdigit() and os.path.exists(part))
    return [*dict.fromkeys(path for path in there if Path(path) != Path(output_dir))]


def end(args: argparse.Namespace, variables: dict[str, str], budget: Budget, grid: Grid | None) -> None:
    """The loop itself once more, which finds what is finished, scores the best where it should and prints the
    table; its exit status is the grid's. Where units are missing it runs none of them."""
    flags = [word for word in args.flags if word != "--force"]  # which calls nothing finished
    found = listed(args.loop, flags, variables)
    missing = [unit.only for unit in found if not unit.finished]
    failed = dict(grid.failed) if grid else {}
    for only in missing:
        if grid and only in grid.done:
            failed[only] = f"it ended well, and its records are not in --output_dir {args.output_dir} here"
    env = units.environment(variables)
    sys.stdout.flush()
    if not missing and not failed:
        os.execve(args.loop, [args.loop, *flags, *budget.flags([])], env)
    done = subprocess.run([args.loop, *flags], env=env | {"ONLY": "0"}, check=False)
    left = [only for only in missing if only not in failed]
    if left:
        print(f"the budget ends here: cells {', '.join(left)} are left")
    if failed:
        print(f"error: {len(failed)} of {len(found)} units failed:", file=sys.stderr)
        print(*(f"  cells {only}: {why}" for only, why in failed.items()), sep="\n", file=sys.stderr)
    sys.exit(1 if failed else done.returncode)


if __name__ == "__main__":
    cli.run_script(main)
