"""Training speed, beside the alternatives: real tokens per second and peak memory, on the same examples.

    python -m benchmarks.training --model CKPT --dataset FILE --modes fast,22,8,dropout,plain --peers trl
    python -m benchmarks.training --model CKPT --dataset FILE --samples 100,400,1600

Every mode and peer runs in a process of its own, on steps of the same examples. A mode is "fast" (whatever
fits the card), a number (as on a card of so many GiB), "dropout" (fast, with dropout 0.1) or "plain" (PEFT
and bitsandbytes without the fused layers). A step lasts from the end of the one before it to its own, by the
GPU's clock, so preparing its data counts. The first fifth of the steps is left out; the median of the others
stands in the table with their spread. The ceiling is what the products with the frozen weights alone reach,
sustained over seconds. With --samples the table shows instead how the time of an epoch grows with its
examples. The last line is all of it as JSON.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, pairwise, product
from pathlib import Path
from statistics import median

from benchmarks.profiling import kinds, show_kinds
from benchmarks.provenance import headline, provenance
from benchmarks.workers import (
    GIB,
    check_flags,
    finish,
    frozen_products,
    installed,
    limit_memory,
    measure,
    names,
    nf4,
    numbers,
    sustained,
)
from study import cli, data, device

MODES = ("fast", "dropout", "plain")
PEERS = {  # and what each needs
    "trl": ("trl", "liger_kernel"),
    "unsloth": ("unsloth",),
    "unsloth-fast": ("unsloth",),
    "published": ("trl",),
}


def flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="CKPT", help="hub id or local folder of a Llama")
    add("--dataset", required=True, metavar="FILE", help="train examples, .jsonl .json .csv or .parquet")
    add("--task", choices=tuple(cli.DEFAULTS), default="classification", help="of the examples (%(default)s)")
    add(
        "--modes",
        type=names,
        default="fast",
        help="comma-separated: fast, dropout, plain, or GiB (%(default)s)",
    )
    add("--peers", type=names, default="", help=f"comma-separated: {', '.join(PEERS)}")
    add("--tokens", type=numbers, default="16384", help="tokens of a step, comma-separated (%(default)s)")
    add(
        "--lengths",
        type=numbers,
        default="512",
        help="most tokens of an example, comma-separated (%(default)s)",
    )
    add(
        "--steps",
        type=cli.positive_int,
        default=20,
        help="steps that are timed, with the first fifth (%(default)s)",
    )
    add(
        "--samples",
        type=numbers,
        default="",
        metavar="N,N",
        help="time one epoch of each of these numbers of examples, in mode fast, and nothing else",
    )
    add("--profile", action="store_true", help="show where the time of a step goes, for each mode")
    add("--lora_r", type=int, default=8, help="rank (%(default)s)")
    add("--output", type=Path, metavar="FILE", help="write the table as JSON here, too")
    add("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    check_flags(parser, args, MODES, PEERS)
    return args


# Workers: one mode or peer, in a process of its own


def read_examples(args: argparse.Namespace, tokenizer, length: int) -> Iterator:
    """The train examples, each encoded when it is asked for."""
    from study import encoding

    words = ["--train_file", args.dataset, "--max_seq_length", str(length)]
    settings = cli.parse_args(args.task, "", words)
    for pair in data.sample_train(data.load(settings, ["train"])["train"], settings).examples:
        yield encoding.encode_examples(tokenizer, args.task, [pair], settings)[0][0]


def split_to_steps(examples: Iterable, tokens: int) -> Iterator[list]:
    """Steps of the examples, each of at most `tokens` tokens. The last may have fewer."""
    step, count = [], 0
    for example in examples:
        if step and count + len(example.ids) > tokens:
            yield step
            step, count = [], 0
        step.append(example)
        count += len(example.ids)
    yield step


def read_steps(args: argparse.Namespace, tokenizer, tokens: int, length: int) -> list[list]:
    """The first --steps steps that are full."""
    steps = split_to_steps(read_examples(args, tokenizer, length), tokens)
    full = [step for step, _ in islice(pairwise(steps), args.steps)]
    return full or sys.exit(f"{args.dataset} does not fill a step of {tokens} tokens")


def mark():
    """A moment on the GPU, when what has been asked of it so far is done."""
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(marks: Sequence) -> list[float]:
    marks[-1].synchronize()
    return [earlier.elapsed_time(later) / 1000 for earlier, later in pairwise(marks)]


def timed(steps: Sequence, run: Callable, count: Callable) -> dict:
    """Real tokens per second of each step, the first fifth left out, and the peak memory."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    marks = [mark()]
    for step in steps:
        run(step)
        marks.append(mark())
    return summary([count(step) / took for step, took in zip(steps, seconds_between(marks), strict=True)])


def summary(rates: Sequence[float]) -> dict:
    import torch

    kept = sorted(rates[len(rates) // 5 :])
    return {
        "tokens_per_second": median(kept),
        "spread": [kept[len(kept) // 10], kept[-1 - len(kept) // 10]],
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
    }


def step_tokens(step: Sequence) -> int:
    return sum(len(example.ids) for example in step)


def ours(args: argparse.Namespace, mode: str, tokens: int, length: int) -> dict:
    """The fused layers within `mode`, or the plain ones."""
    tuned, tokenizer = load(args, mode)
    steps = read_steps(args, tokenizer, tokens, length)
    run, how = trainer(tuned, mode, tokens, length, steps)
    row = timed(steps, run, step_tokens) | {"how": how}
    return row | ({"kinds": kinds(lambda: run(steps[-1]))} if args.profile else {})


def by_samples(args: argparse.Namespace, mode: str, tokens: int, length: int) -> dict:
    """Seconds of an epoch of the first N examples, for each N of --samples, after two steps to warm up."""
    tuned, tokenizer = load(args, "fast")
    examples = list(islice(read_examples(args, tokenizer, length), max(args.samples)))
    if len(examples) < max(args.samples):
        sys.exit(f"--samples {max(args.samples)}: {args.dataset} has {len(examples)} examples")
    epochs = [list(split_to_steps(examples[:count], tokens)) for count in args.samples]
    longest = max(epochs, key=len)
    run, how = trainer(tuned, "fast", tokens, length, longest)
    for _ in range(2):
        run(longest[0])
    return {"epochs": [timed_epoch(steps, run) for steps in epochs], "how": how}


def timed_epoch(steps: Sequence, run: Callable) -> dict:
    import torch

    torch.cuda.reset_peak_memory_stats()
    began = mark()
    for step in steps:
        run(step)
    [seconds] = seconds_between([began, mark()])
    return {
        "examples": sum(map(len, steps)),
        "tokens": sum(map(step_tokens, steps)),
        "seconds": seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
    }


def load(args: argparse.Namespace, mode: str) -> tuple:
    """The model with its adapter, and its tokenizer."""
    from peft import LoraConfig, get_peft_model

    from study import model, packing

    limit_memory(mode)
    base = model.load_base(args.model, nf4(), packing.training_attention("auto"))
    dropout = 0.1 if mode == "dropout" else 0.0
    lora = LoraConfig(
        r=args.lora_r, lora_alpha=16, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(base, lora).train(), model.load_tokenizer(args.model)


def trainer(tuned, mode: str, tokens: int, length: int, steps: Sequence) -> tuple[Callable, str]:
    """What trains on one of the steps, by the scripts' own paths, and how it goes about it."""
    import torch

    from study import packing

    parameters = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0, fused=True)
    learned = max(sum(len(packing.learned_places(example, "answer")) for example in step) for step in steps)
    path = path_for(tuned, mode, tokens, length, learned)

    def run(step: Sequence) -> None:
        path.begin(len(step), step)
        for group in path.passes(range(len(step))):
            (path.loss_sum(group) / learned).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run, f"{path.max_tokens:,} at once, {path.describe()}"


def path_for(tuned, mode: str, tokens: int, length: int, learned: int):
    """The plain path, or the fast one in what is free."""
    import torch

    from study import packing, paths
    from study.fast.memory import choose_plan

    if mode == "plain":
        padded = packing.choose_batching(tuned.get_base_model(), "auto", torch.device("cuda"))
        tuned.train()  # the choice was made without dropout
        return paths.PlainPath(tuned, "answer", padded, "as asked for", tokens, False)
    free = 0.92 * device.free_bytes()
    return paths.FastPath(tuned, "answer", choose_plan(tuned, free, length, (tokens, learned)))


def ceiling(args: argparse.Namespace, mode: str, tokens: int, length: int, seconds: float = 5) -> dict:
    """The products of the frozen linear layers alone, forward and backward, over `seconds`."""
    took = sustained(frozen_products(args.model, tokens, backward=True), seconds)
    return summary([tokens / each for each in took]) | {"how": "frozen products alone"}


def trl(args: argparse.Namespace, mode: str, tokens: int, length: int) -> dict:
    """TRL's SFTTrainer with PEFT, bitsandbytes and Liger's kernels; "published" is the study's recipe."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    tokenizer, rows = rows_for_peers(args, tokens, length)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, quantization_config=nf4(), dtype="bfloat16", device_map={"": 0}
    )
    published = mode == "published"
    lora = LoraConfig(
        r=args.lora_r,
        lora_alpha=16,
        lora_dropout=0.1 if published else 0.0,
        target_modules=["q_proj", "v_proj"] if published else "all-linear",
        task_type="CAUSAL_LM",
    )
    batch, accumulation = (6, 2) if published else (tokens // length, 1)
    return sft(model, tokenizer, rows, args, length, lora, batch, accumulation, published) | {
        "how": "q and v, packed, checkpointing, 6 x 2" if published else "packed, Liger, no checkpointing"
    }


def unsloth(args: argparse.Namespace, mode: str, tokens: int, length: int) -> dict:
    """Unsloth's kernels under TRL's trainer, with its own checkpointing ("unsloth") or none."""
    from unsloth import FastLanguageModel  # before transformers: it replaces parts of it

    model, _ = FastLanguageModel.from_pretrained(args.model, max_seq_length=length, load_in_4bit=True)
    tokenizer, rows = rows_for_peers(args, tokens, length)
    checkpointing = "unsloth" if mode == "unsloth" else False
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model,
        r=args.lora_r,
        lora_alpha=16,
        lora_dropout=0,
        target_modules=names,
        use_gradient_checkpointing=checkpointing,
    )
    how = "packed, " + ("its checkpointing" if checkpointing else "no checkpointing")
    return sft(model, tokenizer, rows, args, length, None, tokens // length, 1, False) | {"how": how}


def rows_for_peers(args: argparse.Namespace, tokens: int, length: int) -> tuple:
    """The tokenizer and the same examples as rows of token ids, one step more than is timed: a peer fills
    its steps to the last token."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    steps = split_to_steps(read_examples(args, tokenizer, length), tokens * (args.steps + 1))
    return tokenizer, Dataset.from_list([{"input_ids": example.ids} for example in next(steps)])


def sft(model, tokenizer, rows, args, length, lora, batch, accumulation, checkpointing) -> dict:
    """Train with TRL on `rows` packed to blocks of `length`, and time its steps."""
    import tempfile

    import torch
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    marks = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            marks.append(mark())

        on_train_begin = on_step_end

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            gradient_checkpointing=checkpointing,
            packing=True,
            packing_strategy="wrapped",
            max_length=length,
            learning_rate=2e-4,
            bf16=True,
            use_liger_kernel=lora is not None and not checkpointing,
            optim="adamw_torch_fused",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            dataset_kwargs={"skip_prepare_dataset": False},
        )
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[Clock()],
        )
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
    return summary([batch * accumulation * length / seconds for seconds in seconds_between(marks)])


WORKERS = {
    "ceiling": ceiling,
    "samples": by_samples,
    "trl": trl,
    "published": trl,
    "unsloth": unsloth,
    "unsloth-fast": unsloth,
}


# The tables


def show(rows: Sequence[dict]) -> str:
    from tabulate import tabulate

    lines = []
    done = [row for row in rows if "failed" not in row]
    tops = {row["tokens"]: row["tokens_per_second"] for row in done if row["mode"] == "ceiling"}
    first = next((row["tokens_per_second"] for row in done if row["mode"] != "ceiling"), None)
    for row in rows:
        start = [row["mode"], f"{row['tokens']:,}", row["length"]]
        if "failed" in row:
            lines.append([*start, "—", "—", "—", "—", "—", row["failed"]])
            continue
        speed, (low, high) = row["tokens_per_second"], row["spread"]
        share = f"{100 * speed / tops[row['tokens']]:.0f} %" if row["tokens"] in tops else "—"
        ratio = f"{speed / first:.2f}" if first else "—"
        spread, peak = f"{low:,.0f} to {high:,.0f}", f"{row['peak_gib']:.1f}"
        lines.append([*start, f"{speed:,.0f}", spread, ratio, share, peak, row["how"]])
    titles = [
        "mode",
        "tokens a step",
        "length",
        "tokens/s",
        "spread",
        "ratio",
        "of the ceiling",
        "peak GiB",
        "how",
    ]
    return tabulate(lines, titles, tablefmt="github", disable_numparse=True)


def show_samples(rows: Sequence[dict]) -> str:
    from tabulate import tabulate

    lines = []
    for row in rows:
        start = [f"{row['tokens']:,}", row["length"]]
        if "failed" in row:
            lines.append([*start, *["—"] * 6, row["failed"]])
        for epoch in row.get("epochs", ()):
            examples, tokens, seconds = epoch["examples"], epoch["tokens"], epoch["seconds"]
            cost = f"{seconds:.2f}", f"{tokens / seconds:,.0f}", f"{seconds / examples:.4f}"
            peak = f"{epoch['peak_gib']:.1f}"
            lines.append([*start, f"{examples:,}", f"{tokens:,}", *cost, peak, row["how"]])
    titles = [
        "tokens a step",
        "length",
        "examples",
        "tokens",
        "seconds",
        "tokens/s",
        "seconds an example",
        "peak GiB",
        "how",
    ]
    return tabulate(lines, titles, tablefmt="github", disable_numparse=True)


def main() -> None:
    args = flags()
    if args.worker:
        return print(json.dumps(WORKERS.get(args.worker["mode"], ours)(args, **args.worker)))
    if args.samples:
        table, jobs = show_samples, product(["samples"], args.tokens, args.lengths)
    else:
        modes = [*args.modes, *installed(args.peers, PEERS)]
        ceilings = product(["ceiling"], args.tokens, args.lengths[:1])  # they depend on the tokens alone
        table, jobs = show, [*ceilings, *product(modes, args.tokens, args.lengths)]
    rows = []
    for mode, tokens, length in jobs:
        job = {"mode": mode, "tokens": tokens, "length": length}
        rows.append(job | measure("benchmarks.training", job))
        print(*table(rows[-1:]).splitlines()[2:], sep="\n", file=sys.stderr, flush=True)
    result = provenance() | {"rows": rows}
    print(f"{headline(result)}\n\n{table(rows)}\n")
    for row in rows:
        if "kinds" in row:
            print(f"{row['mode']}, {row['tokens']:,} tokens a step:\n\n{show_kinds(row['kinds'])}\n")
    finish(result, rows, args.output)


if __name__ == "__main__":
    main()
