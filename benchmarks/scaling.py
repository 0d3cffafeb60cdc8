"""How much faster several GPUs are than one: training and scoring by the scripts' own paths.

    python -m benchmarks.scaling --model CKPT --train_file FILE --test_file FILE --gpus 2

One GPU, and then --gpus of them in processes that are launched together, train on the same steps of so many
tokens (of all GPUs together) and answer the same prompts. A step lasts from the end of the one before it to
its own, by the clock of the first GPU, so preparing its data counts. The first fifth of the steps is left
out; the median of the others stands in the table with their spread. "Exchange" is the share of a step from
the end of a GPU's own gradients until all are added up: of the GPU with the least, which waits for nobody,
and of the one with the most. Scoring is timed by the clock on the wall, once, from all GPUs ready until all
answers are gathered; loading and a warm-up do not count. The last line is all of it as JSON.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks import inference, training
from benchmarks.provenance import headline, provenance
from benchmarks.workers import check_output, finish, numbers
from study import cli, device


def flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="CKPT", help="hub id or local folder of a Llama")
    add("--train_file", required=True, metavar="FILE", help="train examples")
    add("--test_file", required=True, metavar="FILE", help="test examples, whose prompts are answered")
    add("--task", choices=tuple(cli.DEFAULTS), default="classification", help="of the examples (%(default)s)")
    add("--gpus", type=cli.positive_int, default=2, help="beside one (%(default)s)")
    add("--tokens", type=numbers, default="16384,32768", help="tokens of a step, or none: '' (%(default)s)")
    add("--steps", type=cli.positive_int, default=20, help="of each training (%(default)s)")
    add("--length", type=cli.positive_int, default=512, help="most tokens of an example (%(default)s)")
    add("--examples", type=int, default=7317, help="prompts to answer, or 0 (%(default)s)")
    add("--lora_r", type=int, default=8, help="rank (%(default)s)")
    add("--max_new_tokens", type=cli.positive_int, metavar="N", help="of an answer (by task)")
    add("--output", type=Path, metavar="FILE", help="write the table as JSON here, too")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    check_output(parser, args.output)
    args.max_new_tokens = args.max_new_tokens or cli.DEFAULTS[args.task]["max_new_tokens"]
    args.dataset, args.adapter, args.stop = args.train_file, None, False  # as the other benchmarks know them
    return args


# Workers: one of several processes, which returns the rows of the table


def train(args: argparse.Namespace) -> list[dict]:
    """Steps of so many tokens, for each of --tokens, shared out among the processes."""
    tuned, tokenizer = training.load(args, "fast")
    rows = []
    for tokens in args.tokens:
        steps = training.read_steps(args, tokenizer, tokens, args.length)
        rows.append({"size": tokens} | train_on(tuned, steps, tokens, args.length))
    return rows


def train_on(tuned, steps: Sequence[list], tokens: int, length: int) -> dict:
    import torch

    from study import packing, processes

    parameters = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0, fused=True)
    counts = [sum(len(packing.learned_places(example, "answer")) for example in step) for step in steps]
    share = [-(-count // processes.count()) for count in (tokens, max(counts))]
    torch.cuda.empty_cache()  # of the steps before
    path = training.path_for(tuned, "fast", share[0], length, share[1])
    torch.cuda.reset_peak_memory_stats()
    marks, exchanges = [training.mark()], []
    for step, learned in zip(steps, counts, strict=True):
        path.begin(len(step), step)
        total = torch.zeros((), device=device.current())
        for group in path.passes(processes.mine(path.sizes())):
            loss = path.loss_sum(group) / learned
            loss.backward()
            total += loss.detach()
        exchanges.append([training.mark()])
        processes.add_up(parameters, total)
        exchanges[-1].append(training.mark())
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks.append(training.mark())
    took, kept = training.seconds_between(marks), len(steps) // 5
    row = training.summary([training.step_tokens(step) / s for step, s in zip(steps, took, strict=True)])
    waits = [seconds for pair in exchanges for seconds in training.seconds_between(pair)]
    shares = processes.everyone(median(waits[kept:]) / median(took[kept:]))
    return row | {"exchange": [min(shares), max(shares)], "how": path.describe()}


def score(args: argparse.Namespace) -> list[dict]:
    """Answers to prompts, each process its share, gathered at the first."""
    import torch

    from study import model, processes

    tokenizer, tuned = model.load_tokenizer(args.model), inference.load(args, True)
    prompts = inference.read_tests(args, tokenizer, args.examples).prompts
    engine, how = inference.make_engine(tuned, "fast")

    shortest = sorted(prompts, key=lambda index: len(prompts[index]))
    for count in (128, 64, 32):  # so that kernels are compiled, as in `inference.timed`
        round_of(engine, [prompts[index] for index in shortest[:count]], args.max_new_tokens)
    torch.cuda.reset_peak_memory_stats()
    seconds, own = round_of(engine, [*prompts.values()], args.max_new_tokens)
    return [
        {
            "size": len(prompts),
            "examples_per_second": len(prompts) / seconds,
            "own_seconds": processes.everyone(own),
            "peak_gib": torch.cuda.max_memory_allocated() / training.GIB,
            "how": how,
        }
    ]


def round_of(engine, prompts: Sequence[list[int]], new: int) -> tuple[float, float]:
    """Seconds until all answers are at the first process, and until this one has its own."""
    from study import generation, processes

    processes.everyone(None)
    began = time.perf_counter()
    mine = generation.share(prompts, range(len(prompts)), new)
    answers = dict(engine.answers(mine, new, [-1]))
    own = time.perf_counter() - began
    count = sum(map(len, processes.everyone(answers)))
    assert count == len(prompts), f"{count} answers to {len(prompts)} prompts"
    return time.perf_counter() - began, own


WORKERS = {"train": train, "score": score}


def work(args: argparse.Namespace) -> None:
    """The rows of a worker, which the first process prints."""
    rows = WORKERS[args.worker](args)
    if os.environ["RANK"] == "0":
        print(json.dumps(rows), flush=True)
    os._exit(0)  # as the scripts end


# The launches


def launch(gpus: int, what: str, words: Sequence[str]) -> list[dict]:
    """The rows of a worker in so many processes, or one with why there are none; one that fails ends them
    all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.scaling", *words, "--worker", what]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(gpus))
    with tempfile.TemporaryDirectory() as folder:
        files = [(Path(folder, f"out-{rank}"), Path(folder, f"err-{rank}")) for rank in range(gpus)]
        started = []
        for rank, (out, err) in enumerate(files):
            own = env | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
            with out.open("w", encoding="utf-8") as stdout, err.open("w", encoding="utf-8") as stderr:
                started.append(subprocess.Popen(command, env=own, stdout=stdout, stderr=stderr))
        while None in (codes := [process.poll() for process in started]) and not any(codes):
            time.sleep(0.1)
        for process in started:  # the others would wait for one that failed
            process.kill()
            process.wait()
        if not any(codes):
            return json.loads(files[0][0].read_text().splitlines()[-1])
        failed = next(err for code, (_, err) in zip(codes, files, strict=True) if code)
        lines = failed.read_text().strip().splitlines() or ["it printed nothing"]
    print("\n".join(lines[-6:]), file=sys.stderr)
    return [{"size": 0, "failed": lines[-1][:200]}]


def show(rows: Sequence[dict]) -> str:
    from tabulate import tabulate

    lines, alone = [], {}
    for row in rows:
        start = [row["what"], f"{row['size']:,}", row["gpus"]]
        if "failed" in row:
            lines.append([*start, *["—"] * 5, row["failed"]])
            continue
        speed = row.get("tokens_per_second") or row["examples_per_second"]
        if row["gpus"] == 1:
            alone[row["what"], row["size"]] = speed
        first = alone.get((row["what"], row["size"]))
        exchange = "{:.1%} to {:.1%}".format(*row["exchange"]) if "exchange" in row else "—"
        spread = "{:,.0f} to {:,.0f}".format(*row["spread"]) if "spread" in row else "—"
        ratio = f"{speed / first:.2f}" if first else "—"
        cells = f"{speed:,.0f}", spread, ratio, exchange, f"{row['peak_gib']:.1f}"
        lines.append([*start, *cells, row["how"]])
    titles = ["what", "tokens a step, or posts", "GPUs", "tokens/s, or posts/s", "spread", "of one GPU"]
    titles += ["exchange", "peak GiB", "how"]
    return tabulate(lines, titles, tablefmt="github", disable_numparse=True)


def main() -> None:
    args = flags()
    if args.worker:
        return work(args)
    rows = []
    for what in [name for name, wanted in (("train", args.tokens), ("score", args.examples)) if wanted]:
        for gpus in dict.fromkeys((1, args.gpus)):
            rows += [{"what": what, "gpus": gpus} | row for row in launch(gpus, what, sys.argv[1:])]
            print(*show(rows).splitlines()[2:], sep="\n", file=sys.stderr, flush=True)
    result = provenance() | {"rows": rows}
    print(f"{headline(result)}\n\n{show(rows)}\n")
    finish(result, rows, args.output)


if __name__ == "__main__":
    main()
