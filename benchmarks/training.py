"""Training speed, beside the alternatives: real tokens per second and peak memory, on the same examples.

    python -m benchmarks.training --model CKPT --dataset FILE --modes fast,22,7,dropout,plain --peers trl

Every mode and peer runs in a process of its own, on steps of the same examples. A mode is "fast" (whatever
fits the card), a number (within so many GiB), "dropout" (fast, with dropout 0.1) or "plain" (PEFT and
bitsandbytes without the fused layers). The first fifth of the steps is left out; the median of the others
stands in the table with their spread. The ceiling is what the products with the frozen weights alone reach,
sustained over seconds. The last line is the table as JSON.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from study import cli, data, plan

MODES = ("fast", "dropout", "plain")
PEERS = ("trl", "unsloth", "unsloth-fast", "published")
GIB = 2**30


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
    add("--tokens", default="16384", help="tokens of a step, comma-separated (%(default)s)")
    add("--lengths", default="512", help="most tokens of an example, comma-separated (%(default)s)")
    add("--steps", type=int, default=20, help="steps that are timed, with the first fifth (%(default)s)")
    add("--lora_r", type=int, default=8, help="rank (%(default)s)")
    add("--output", type=Path, metavar="FILE", help="write the table as JSON here, too")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for flag, given, known in (("--modes", args.modes, MODES), ("--peers", args.peers, PEERS)):
        for name in given:
            if name not in known and not (flag == "--modes" and name.isdigit()):
                parser.error(f"{flag} {name}: choose among {', '.join(known)}")
    return args


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


# Workers: one mode or peer, in a process of its own


def read_steps(args: argparse.Namespace, tokenizer, tokens: int, length: int) -> list[list]:
    """Steps of the examples, each of at most `tokens` tokens."""
    from study import encoding

    words = ["--train_file", args.dataset, "--max_seq_length", str(length)]
    settings = cli.parse_args(args.task, "", words)
    train = data.sample_train(data.load(settings, ["train"])["train"], settings)
    examples, _ = encoding.encode_examples(tokenizer, args.task, train.examples, settings)
    steps, step, count = [], [], 0
    for example in examples:
        if count + len(example.ids) > tokens:
            steps.append(step)
            step, count = [], 0
            if len(steps) == args.steps:
                return steps
        step.append(example)
        count += len(example.ids)
    return steps


def timed(steps: Iterable, run, count) -> dict:
    """Real tokens per second of each step, the first fifth left out, and the peak memory."""
    import torch

    rates = []
    torch.cuda.reset_peak_memory_stats()
    for step in steps:
        torch.cuda.synchronize()
        began = time.perf_counter()
        run(step)
        torch.cuda.synchronize()
        rates.append(count(step) / (time.perf_counter() - began))
    return summary(rates)


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
    import torch
    from peft import LoraConfig, get_peft_model

    from study import fused, model, packing

    tokenizer = model.load_tokenizer(args.model)
    base = model.load_base(args.model, nf4(), packing.training_attention("auto"))
    dropout = 0.1 if mode == "dropout" else 0.0
    lora = LoraConfig(
        r=args.lora_r, lora_alpha=16, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    device = torch.device("cuda")
    padded = mode == "plain" and packing.choose_batching(base, "auto", device)
    tuned = get_peft_model(base, lora).train()
    steps = read_steps(args, tokenizer, tokens, length)
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0, fused=True)
    learned = max(sum(len(packing.learned_places(example, "answer")) for example in step) for step in steps)
    if mode != "plain":
        free = 0.92 * torch.cuda.mem_get_info()[0]
        if mode.isdigit():
            free = int(mode) * GIB - torch.cuda.memory_allocated() - 0.2 * GIB
        path = fused.FusedModel(tuned, fused.choose_plan(tuned, free, length, (tokens, learned)))

    def run(step) -> None:
        if mode == "plain":
            with torch.autocast("cuda", torch.bfloat16):
                (packing.loss_sum(tuned, step, "answer", padded, device) / learned).backward()
        else:
            lengths = [len(example.ids) for example in step]
            for group in packing.split_to_fit(range(len(step)), lengths, path.plan.tokens, False):
                (path.loss_sum([step[i] for i in group], "answer", group[0]) / learned).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    how = "plain layers" if mode == "plain" else f"{path.plan.tokens:,} at once, {path.plan}"
    return timed(steps, run, step_tokens) | {"how": how}


def nf4():
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def ceiling(args: argparse.Namespace, mode: str, tokens: int, length: int, seconds: float = 5) -> dict:
    """The products of the frozen linear layers alone, forward and backward, over `seconds`."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(args.model)
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    shapes = [(3 * hidden, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]
    weights = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
    widths = {size for shape in shapes for size in shape}
    inputs = {size: torch.randn(tokens, size, dtype=torch.bfloat16, device="cuda") for size in widths}

    def run(step) -> None:
        for _ in range(layers):
            for weight in weights:
                torch.mm(inputs[weight.shape[1]], weight.T)
                torch.mm(inputs[weight.shape[0]], weight)

    began, rounds = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        run(None)
        torch.cuda.synchronize()
        rounds += 1
    return timed(range(rounds), run, lambda step: tokens) | {"how": "frozen products alone"}


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
    """The tokenizer and the same examples as rows of token ids, enough for all steps."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    steps = read_steps(args, tokenizer, tokens, length)
    return tokenizer, Dataset.from_list([{"input_ids": example.ids} for step in steps for example in step])


def sft(model, tokenizer, rows, args, length, lora, batch, accumulation, checkpointing) -> dict:
    """Train with TRL on `rows` packed to blocks of `length`, and time its steps."""
    import tempfile

    import torch
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            torch.cuda.synchronize()
            times.append([time.perf_counter()])

        def on_step_end(self, *_, **__):
            torch.cuda.synchronize()
            times[-1].append(time.perf_counter())

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
    return summary([batch * accumulation * length / (end - begin) for begin, end in times])


WORKERS = {"ceiling": ceiling, "trl": trl, "published": trl, "unsloth": unsloth, "unsloth-fast": unsloth}


# The table


def measure(args: argparse.Namespace, mode: str, tokens: int, length: int) -> dict:
    """Run a mode or peer in a fresh process. Its row, or why there is none."""
    words = [
        sys.executable,
        "-m",
        "benchmarks.training",
        *sys.argv[1:],
        "--worker",
        f"{mode}/{tokens}/{length}",
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    row = {"mode": mode, "tokens": tokens, "length": length}
    try:
        return row | json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        lines = (done.stderr.strip() or "it printed nothing").splitlines()
        print("\n".join(lines[-6:]), file=sys.stderr)
        return row | {"failed": lines[-1][:200]}


def show(rows: Sequence[dict]) -> str:
    from tabulate import tabulate

    lines = []
    speeds = [(row["mode"] == "ceiling", row["tokens_per_second"]) for row in rows if "failed" not in row]
    top = next((speed for is_ceiling, speed in speeds if is_ceiling), None)
    first = next((speed for is_ceiling, speed in speeds if not is_ceiling), top)
    for row in rows:
        start = [row["mode"], f"{row['tokens']:,}", row["length"]]
        if "failed" in row:
            lines.append([*start, "—", "—", "—", "—", "—", row["failed"]])
            continue
        speed, (low, high) = row["tokens_per_second"], row["spread"]
        share = f"{100 * speed / top:.0f} %" if top else "—"
        ratio = f"{speed / first:.2f}"
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


def main() -> None:
    args = flags()
    if args.worker:
        mode, tokens, length = args.worker.split("/")
        row = WORKERS.get(mode, ours)(args, mode, int(tokens), int(length))
        return print(json.dumps(row))
    rows = []
    for length in map(int, args.lengths.split(",")):
        for tokens in map(int, args.tokens.split(",")):
            for name in ("ceiling", *args.modes, *args.peers):
                rows.append(measure(args, name, tokens, length))
                print(show(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(f"{plan.this_device()}, {args.model}, {args.dataset}\n\n{show(rows)}\n")
    result = {"device": plan.this_device(), "rows": rows}
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
