"""What the benchmarks of speed share: flags, a fresh process for every row, and the products that nothing can
do without."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from study import cli, device
from study.errors import UserError

GIB = 2**30


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def numbers(text: str) -> list[int]:
    return [cli.positive_int(word) for word in names(text)]


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace, modes, peers) -> None:
    """Refuse a mode or peer that is not known, and an --output without a folder; a mode may be a number of
    GiB, too."""
    check_output(parser, args.output)
    for flag, given, known in (("--modes", args.modes, modes), ("--peers", args.peers, peers)):
        for name in given:
            if name not in known and not (flag == "--modes" and name.isdigit()):
                parser.error(f"{flag} {name}: choose among {', '.join(known)}")


def limit_memory(mode: str) -> None:
    """If `mode` is a number, let this process have what a card of so many GiB would give it, and plan for it
    as the scripts do: PyTorch's blocks, with the gaps between them, take no more than CUDA leaves of it.
    Raises UserError for more than this card has, or for nothing."""
    import torch

    if not mode.isdigit():
        return
    size, total = int(mode) * GIB, torch.cuda.mem_get_info()[1]
    if not device.CONTEXT < size <= total:
        raise UserError(f"--modes {mode}: it takes 1 to {total // GIB} GiB on this card")
    os.environ["GPU_SHARE"] = f"{size / total}"
    torch.cuda.set_per_process_memory_fraction((size - device.CONTEXT) / total)


def check_output(parser: argparse.ArgumentParser, output: Path | None) -> None:
    """Refuse an --output without a folder, before anything is measured."""
    if output and not output.parent.is_dir():
        parser.error(f"--output {output}: there is no folder {output.parent}: make it first")


def installed(peers: Sequence[str], needs: Mapping[str, Sequence[str]]) -> list[str]:
    """Those of `peers` that can run here; one line says what the others lack."""
    found = []
    for peer in peers:
        missing = [package for package in needs[peer] if not find_spec(package)]
        if missing:
            print(f"{peer} is left out: {' and '.join(missing)} not installed", file=sys.stderr)
        else:
            found.append(peer)
    return found


def measure(module: str, job: dict) -> dict:
    """Do a benchmark's `job` with the flags of this command in a fresh process, which takes it as JSON. The
    row that this prints last, or {"failed": why there is none}."""
    words = [sys.executable, "-m", module, *sys.argv[1:], "--worker", json.dumps(job)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        lines = (done.stderr.strip() or "it printed nothing").splitlines()
        print("\n".join(lines[-6:]), file=sys.stderr)
        return {"failed": lines[-1][:200]}


def finish(result: dict, rows: Sequence[dict], output: Path | None) -> None:
    """Write and print the result. Exits with 1, and writes nothing, if none of the `rows` was measured."""
    if all("failed" in row for row in rows):
        sys.exit("error: nothing could be measured: see above")
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def nf4():
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


# The ceiling


def frozen_shapes(config) -> list[tuple[int, int]]:
    """[out, in] of a Llama layer's weights, those with the same input as one."""
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    qkv = (heads + 2 * config.num_key_value_heads) * size
    return [(qkv, hidden), (hidden, heads * size), (2 * inner, hidden), (hidden, inner)]


def frozen_products(checkpoint: str, tokens: int, backward: bool) -> Callable[[], None]:
    """What multiplies `tokens` tokens with a checkpoint's frozen weights (dense), and does nothing else."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint)
    shapes = frozen_shapes(config)
    weights = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
    widths = {size for shape in shapes for size in shape}
    inputs = {size: torch.randn(tokens, size, dtype=torch.bfloat16, device="cuda") for size in widths}

    def run() -> None:
        for _ in range(config.num_hidden_layers):
            for weight in weights:
                torch.mm(inputs[weight.shape[1]], weight.T)
                if backward:
                    torch.mm(inputs[weight.shape[0]], weight)

    return run


def sustained(run: Callable[[], None], seconds: float) -> list[float]:
    """Seconds of every `run` over `seconds`, after as long a time that does not count: the clock falls under
    load."""
    import torch

    began, marks = time.perf_counter(), []
    while time.perf_counter() - began < 2 * seconds:
        run()
        torch.cuda.synchronize()
        marks.append(time.perf_counter() - began)
    counted = [mark for mark in marks if mark >= seconds]
    return [later - earlier for earlier, later in pairwise(counted)]
