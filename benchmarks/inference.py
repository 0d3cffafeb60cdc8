"""Inference speed, beside the alternatives: examples per second and peak memory, on the same test prompts.

    python -m benchmarks.inference --model CKPT --train_file FILE --test_file FILE \\
        --modes fast,8,few-shot,constrained --peers published,generate,generate-merged,vllm
    python -m benchmarks.inference --model CKPT --adapter DIR --train_file FILE --test_file FILE \\
        --modes fast --equality 500

Every mode and peer runs in a process of its own. A mode is "fast" (whatever fits the card), a number (as on
a card of so many GiB), "few-shot" or "zero-shot" (fast, with the prompts of an untuned model), or
"constrained" (fast, among the classes). Unless --stop is given, no answer but a constrained one ends before
--max_new_tokens. A few prompts warm up; then the whole set is timed by the clock on the wall, three times if
that is short: the median stands in the table. Slow peers take an evenly spaced sample of the prompts, equally
long on average.

The ceiling is what the products of the prompts with the frozen weights alone reach, sustained over seconds,
for the mean length of the tuned prompts; few-shot prompts are longer, and read what they share only once.
With --equality the answers are compared, token by token, with those that `generate` gives one by one, and
both with those that the weights give in float32: where rounding decides, no two ways need agree. The last
line is all of it as JSON.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
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

UNTUNED = ("few-shot", "zero-shot")
MODES = ("fast", *UNTUNED, "constrained")
PROFILED = ("fast", "few-shot")
PEERS = {"published": (), "generate": (), "generate-merged": (), "vllm": ("vllm",)}  # and what each needs
BATCHES = {  # at once (None: as many as fit, up to 256), in all
    "published": (1, 8),
    "generate": (64, 256),
    "generate-merged": (None, 1024),
}
CEILING_TOKENS = 16_384
STEP_MOST = 512  # examples of the step that is profiled
EQUALITY_BATCH = 32  # prompts that `generate` takes at once, to see what rounding alone changes
ENOUGH = 10  # seconds from which on one round is enough


def flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="CKPT", help="hub id or local folder of a Llama")
    add("--adapter", type=Path, metavar="DIR", help="a trained adapter (random weights, rank 8)")
    add("--train_file", required=True, metavar="FILE", help="train examples: classes, few-shot examples")
    add("--test_file", required=True, metavar="FILE", help="test examples, .jsonl .json .csv or .parquet")
    add("--task", choices=tuple(cli.DEFAULTS), default="classification", help="of the examples (%(default)s)")
    known = f"{', '.join(MODES)}, or GiB"
    add("--modes", type=names, default="fast", help=f"comma-separated: {known} (%(default)s)")
    add("--peers", type=names, default="", help=f"comma-separated: {', '.join(PEERS)}")
    add("--examples", type=numbers, default="", metavar="N,N", help="numbers of test examples (all)")
    add("--max_new_tokens", type=cli.positive_int, metavar="N", help="of an answer (by task, as the scripts)")
    add("--stop", action="store_true", help="let the end of sequence end an answer")
    add("--profile", action="store_true", help="show where the time of reading and of a step goes")
    add("--equality", type=cli.positive_int, metavar="N", help="compare N answers with those of generate")
    add("--output", type=Path, metavar="FILE", help="write the tables as JSON here, too")
    add("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    check_flags(parser, args, MODES, PEERS)
    if args.task == "summarization" and "constrained" in args.modes:
        parser.error("--modes constrained chooses among classes: it goes with classification")
    args.max_new_tokens = args.max_new_tokens or cli.DEFAULTS[args.task]["max_new_tokens"]
    return args


# What all workers read


@dataclass
class Tests:
    """Test prompts (token ids by index), what they should be answered with, and the classes."""

    prompts: dict[int, list[int]]
    references: list[str]
    labels: list[str]


def read_tests(args: argparse.Namespace, tokenizer, count: int, mode: str = "", base=None) -> Tests:
    """The test examples, or `count` of them, as the scripts prompt for them. An untuned model, `base`, is
    prompted by its `mode`."""
    from study import encoding, model

    words = ["--train_file", args.train_file, "--test_file", args.test_file]
    words += ["--max_new_tokens", str(args.max_new_tokens)]
    words += ["--max_eval_samples", str(count)] if count else []
    untuned = mode in UNTUNED
    words += ["--task_type", args.task, "--prompt_type", mode] if untuned else []
    settings = cli.parse_args(None if untuned else args.task, "", words)
    splits = data.load(settings, ["train", "test"])
    examples = data.sample_eval(splits["test"], settings).examples
    labels = data.labels_of(splits["train"]) if args.task == "classification" else []
    texts = [text for text, _ in examples]
    if untuned:
        shown = []
        if mode == "few-shot":
            shots = cli.SHOTS[args.task]
            shown = encoding.choose_shots(splits["train"].examples, args.task, shots, settings.seed)
        context = model.context_length(base, tokenizer)
        prompts, _ = encoding.encode_baseline(tokenizer, texts, labels, shown, context, settings)
    else:
        prompts, _ = encoding.encode_prompts(tokenizer, args.task, texts, settings)
    return Tests(dict(enumerate(prompts)), [answer for _, answer in examples], labels)


def spaced(prompts: Mapping[int, list[int]], most: int) -> dict[int, list[int]]:
    """At most `most` of the prompts, evenly spaced over their order by length: as long on average."""
    order = sorted(prompts, key=lambda index: len(prompts[index]))
    count = min(most, len(order))
    chosen = [order[int((i + 0.5) * len(order) / count)] for i in range(count)]
    return {index: prompts[index] for index in chosen}


def load(args: argparse.Namespace, adapted: bool):
    """The model in 4 bits, with the adapter if it is to be `adapted`."""
    import torch
    from peft import LoraConfig, get_peft_model

    from study import model

    base = model.load_base(args.model, nf4())
    if not adapted:
        return base.eval()
    if args.adapter:
        return model.load_adapter(base, args.adapter)
    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(base, lora)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
        if "lora_" in name:
            parameter.data = parameter.data.to(device.compute_dtype())
    return tuned.eval()


def ends_of(args: argparse.Namespace, tuned, tokenizer) -> list[int]:
    """What ends an answer, for the engine. Without --stop nothing does, under `generate` neither."""
    from study import generation

    if args.stop:
        return generation.stop_tokens(tuned, tokenizer)
    tuned.generation_config.min_new_tokens = args.max_new_tokens
    return [-1]


# Workers: one mode or peer, in a process of its own


def ours(args: argparse.Namespace, mode: str, count: int) -> dict:
    from study import encoding, model

    limit_memory(mode)
    tokenizer, tuned = model.load_tokenizer(args.model), load(args, mode not in UNTUNED)
    tests = read_tests(args, tokenizer, count, mode, tuned)
    ends = ends_of(args, tuned, tokenizer)
    allowed = encoding.label_answers(tokenizer, tests.labels) if mode == "constrained" else None
    engine, how = make_engine(tuned, mode)

    def answer(prompts: dict, new: int) -> Iterator:
        return engine.answers(prompts, new, ends, allowed)

    row = timed(answer, tests.prompts, args.max_new_tokens, (64, 32, 16))
    row["how"] = f"{how}, {engine.at_once:,} tokens read at once, cache of {engine.cache.keys.shape[1]:,}"
    if args.profile and (mode in PROFILED or mode.isdigit()):
        row["kinds"] = profile(engine, tests.prompts, args.max_new_tokens)
    return row


def make_engine(tuned, mode: str) -> tuple:
    """The engine in what is free, and what its weights are."""
    from study import model
    from study.fast import decode

    merged = mode != "unmerged" and model.should_merge(tuned, "auto")
    engine = decode.Engine(model.merge(tuned) if merged else tuned)
    engine.memory = 0.92 * device.free_memory()
    return engine, "dense weights" if merged else "weights in 4 bits"


def timed(
    answer: Callable[[dict, int], Iterator], prompts: dict[int, list[int]], new: int, warm: Sequence[int]
) -> dict:
    """Examples per second over whole rounds of `prompts`, after rounds of the `warm` shortest, which fit any
    memory together, so that kernels for so many are compiled."""
    import torch

    shortest = sorted(prompts.items(), key=lambda item: len(item[1]))
    for count in warm:
        for _ in answer(dict(shortest[:count]), new):
            pass
    torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    while len(seconds) < (3 if not seconds or seconds[0] < ENOUGH else 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        answers = dict(answer(prompts, new))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    rates = sorted(len(prompts) / each for each in seconds)
    return {
        "examples": len(prompts),
        "input_tokens": sum(map(len, prompts.values())),
        "output_tokens": sum(len(tokens) for tokens, _ in answers.values()),
        "seconds": median(seconds),
        "examples_per_second": median(rates),
        "spread": [rates[0], rates[-1]],
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
    }


def profile(engine, prompts: dict[int, list[int]], new: int) -> dict:
    """Kinds of kernels, by what was profiled: a read of prompts, and a step of as many examples as fit."""
    import torch

    from study.fast.decode import GRAPH_USES

    new = max(new, GRAPH_USES + 2)  # the first token, steps until there is a graph, and the one to see
    with torch.inference_mode():
        running = start(engine, list(spaced(prompts, STEP_MOST).values()), new)
        group, tokens = [], 0
        for example in running:
            tokens += len(example.tokens)
            if tokens <= engine.at_once:
                group.append(example)
        for example, token in zip(running, engine.read_all(running)[0].tolist(), strict=True):
            example.answer.append(token)
        read = kinds(lambda: engine.read(group), engine.layers[0].qkv.a is not None)
        engine.load(running)
        for _ in range(GRAPH_USES):
            engine.step(len(running))()
        step = kinds(lambda: engine.step(len(running)), adapters=False)
    count = sum(len(example.tokens) for example in group)
    shared = f" behind {engine.cache.shared:,} shared ones"
    return {f"reading {count:,} tokens{shared}": read, f"a step of {len(running)} examples{shared}": step}


def start(engine, prompts: Sequence[list[int]], new: int) -> list:
    """Prompts as examples with places in a new cache that holds what they share: as many as fit, in random
    order."""
    from study.fast.decode import Running

    places, running = engine.prepare(prompts, new, None, len(prompts)), []
    shared = engine.cache.shared
    for prompt in random.Random(0).sample(prompts, len(prompts)):
        place = places.take(len(prompt) - shared + new)
        if place is not None:
            running.append(Running(len(running), prompt[shared:], place))
    return running


def by_generate(args: argparse.Namespace, mode: str, count: int) -> dict:
    """transformers' `generate`, in batches of like length; "published" is the study's way, which samples."""
    import torch

    from study import generation, model

    tokenizer, tuned = model.load_tokenizer(args.model), load(args, True)
    tests = read_tests(args, tokenizer, count)
    size, most = BATCHES[mode]
    prompts = spaced(tests.prompts, most)
    ends_of(args, tuned, tokenizer)
    ends = generation.stop_tokens(tuned, tokenizer)
    if mode == "generate-merged":
        tuned = model.merge(tuned)

    def sample(batch: list, new: int) -> list[list[int]]:
        ids = torch.tensor(batch, device=device.current())
        settings = {"max_new_tokens": new, "do_sample": True, "top_p": 0.95, "temperature": 1e-3}
        return tuned.generate(input_ids=ids, pad_token_id=ends[0], **settings)[:, ids.shape[1] :].tolist()

    def answer(prompts: dict, new: int) -> Iterator:
        if mode != "published":
            yield from generation.plain_answers(tuned, prompts, new, ends, None, size)
            return
        for index, prompt in prompts.items():
            yield index, (sample([prompt], new)[0], None)

    weights = "dense weights" if mode == "generate-merged" else "weights in 4 bits"
    how = f"{weights}, {size or 'up to 256'} at once; {len(prompts):,} of {len(tests.prompts):,} examples"
    return timed(answer, prompts, args.max_new_tokens, [size or 64]) | {"how": how}


def vllm(args: argparse.Namespace, mode: str, count: int) -> dict:
    """vLLM on merged weights, with its defaults, in this process so that its memory counts."""
    import os

    import torch

    from study import model

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    tokenizer = model.load_tokenizer(args.model)
    tests = read_tests(args, tokenizer, count)
    with tempfile.TemporaryDirectory() as folder:
        save_merged(args, folder)
        tokenizer.save_pretrained(folder)
        torch.cuda.empty_cache()
        from vllm import LLM, SamplingParams

        engine = LLM(folder, dtype="bfloat16")

    def answer(prompts: dict, new: int) -> Iterator:
        settings = SamplingParams(temperature=0, max_tokens=new, ignore_eos=not args.stop)
        results = engine.generate([{"prompt_token_ids": ids} for ids in prompts.values()], settings)
        return zip(prompts, (list(result.outputs[0].token_ids) for result in results), strict=True)

    row = timed(answer, tests.prompts, args.max_new_tokens, [64])
    return row | {"how": "dense weights, vLLM's defaults"}


def save_merged(args: argparse.Namespace, folder: str) -> None:
    """A checkpoint without quantization."""
    from study import model

    merged = model.merge(load(args, True))
    merged.hf_quantizer = None
    del merged.config.quantization_config
    merged.save_pretrained(folder)


def ceiling(args: argparse.Namespace, mode: str, count: int, seconds: float = 4) -> dict:
    """The products of the tuned prompts with the frozen weights alone, over `seconds`."""
    from study import model

    prompts = read_tests(args, model.load_tokenizer(args.model), count).prompts
    tokens = sum(map(len, prompts.values()))
    took = sorted(sustained(frozen_products(args.model, CEILING_TOKENS, backward=False), seconds))
    rates = [CEILING_TOKENS / each / (tokens / len(prompts)) for each in (took[-1], median(took), took[0])]
    return {
        "examples": len(prompts),
        "input_tokens": tokens,
        "examples_per_second": rates[1],
        "spread": [rates[0], rates[2]],
        "how": "frozen products alone, forward",
    }


def in_float32(args: argparse.Namespace):
    """The weights as bitsandbytes dequantizes them, to bfloat16, with the adapter added: from there on
    nothing is rounded."""
    import torch

    from study import model

    tuned = load(args, True)
    for layer in model.four_bit_layers(tuned).values():
        getattr(layer, "base_layer", layer).compute_dtype = torch.float32
    return torch.nn.Module.float(model.merge(tuned))  # transformers' own refuses what was quantized


def equality(args: argparse.Namespace, mode: str, count: int) -> dict:
    """Answers by the engine and, one example at a time, by `generate` with the same weights; by `generate`
    in batches, where rounding alone differs, too; and how many of each are those of float32."""
    import torch

    from study import generation, metrics, model

    tokenizer, tuned = model.load_tokenizer(args.model), load(args, True)
    tests = read_tests(args, tokenizer, 0)
    ends = generation.stop_tokens(tuned, tokenizer)
    prompts = spaced(tests.prompts, count)
    engine, how = make_engine(tuned, mode)
    found = {"engine": dict(engine.answers(prompts, args.max_new_tokens, ends))}
    engine.cache, engine.graphs = None, {}
    torch.cuda.empty_cache()
    plain = tuned if mode == "unmerged" else tuned.get_base_model()
    for way, size in (("generate", 1), ("batches", EQUALITY_BATCH)):
        found[way] = dict(generation.plain_answers(plain, prompts, args.max_new_tokens, ends, None, size))
    exact = in_float32(args)
    truth = dict(generation.plain_answers(exact, prompts, args.max_new_tokens, ends, None, EQUALITY_BATCH))

    def compare(answers: dict) -> dict:
        texts = [tokenizer.decode(answers[index][0], skip_special_tokens=True) for index in prompts]
        references = [tests.references[index] for index in prompts]
        scores = metrics.score(args.task, texts, references, tests.labels)[0]["metrics"]
        return {
            "same": sum(answers[index] == found["generate"][index] for index in prompts),
            "exact": sum(answers[index] == truth[index] for index in prompts),
            "scores": {name: metric["value"] for name, metric in scores.items()},
        }

    return {"examples": len(prompts), "how": how} | {way: compare(found[way]) for way in found}


WORKERS = {
    "ceiling": ceiling,
    "published": by_generate,
    "generate": by_generate,
    "generate-merged": by_generate,
    "vllm": vllm,
}


# The tables


def show(rows: Sequence[dict], first: float | None = None, top: float | None = None) -> str:
    """`first` and `top`: examples per second of the first of our modes, and of the ceiling."""
    from tabulate import tabulate

    lines = []
    for row in rows:
        if "failed" in row:
            lines.append([row["mode"], row["examples"] or "all", *["—"] * 8, row["failed"]])
            continue
        count, speed = row["examples"], row["examples_per_second"]
        cost = ["—", "—"]
        if "output_tokens" in row:
            cost = [f"{row['output_tokens'] / count:.1f}", f"{row['seconds']:.1f}"]
        lines.append(
            [
                *(row["mode"], f"{count:,}", f"{row['input_tokens'] / count:,.0f}", *cost, f"{speed:,.3g}"),
                "{:,.3g} to {:,.3g}".format(*row["spread"]),
                f"{speed / first:.2f}" if first else "—",
                f"{100 * speed / top:.0f} %" if top else "—",
                f"{row['peak_gib']:.1f}" if "peak_gib" in row else "—",
                row["how"],
            ]
        )
    start = ["mode", "examples", "tokens a prompt", "new tokens", "seconds", "examples/s"]
    titles = [*start, "spread", "ratio", "of the ceiling", "peak GiB", "how"]
    return tabulate(lines, titles, tablefmt="github", disable_numparse=True)


def show_all(rows: Sequence[dict]) -> str:
    speeds = {"ceiling": None, "ours": None}
    for row in rows:
        which = "ceiling" if row["mode"] == "ceiling" else "ours"
        if "failed" not in row and row["mode"] not in PEERS:
            speeds[which] = speeds[which] or row["examples_per_second"]
    return show(rows, speeds["ours"], speeds["ceiling"])


def show_equality(rows: Sequence[dict]) -> str:
    from tabulate import tabulate

    lines = []
    for row in rows:
        if "failed" in row:
            lines.append([row["mode"], *["—"] * 5, row["failed"]])
            continue
        ways = [row[way] for way in ("engine", "generate", "batches")]
        same, exact = (
            [f"{way[what]} ({100 * way[what] / row['examples']:.1f} %)" for way in ways]
            for what in ("same", "exact")
        )
        scores = []
        for name in ways[0]["scores"]:
            values = (f"{way['scores'][name]:.1f}" for way in ways)
            scores.append(f"{name} {', '.join(values)}")
        shares = same[0], same[2], ", ".join(exact)
        lines.append([row["mode"], row["how"], row["examples"], *shares, "; ".join(scores)])
    titles = ["mode", "how", "examples", "the same tokens", "by generate in batches"]
    titles += [f"{what} of engine, generate, in batches" for what in ("those of float32", "metrics")]
    return tabulate(lines, titles, tablefmt="github", disable_numparse=True)


def main() -> None:
    args = flags()
    if args.worker:
        mode, count = args.worker["mode"], args.worker["examples"]
        work = equality if args.worker.get("equality") else WORKERS.get(mode, ours)
        return print(json.dumps(work(args, mode, count)))
    counts = args.examples or [0]  # 0: all
    jobs = [*product(args.modes, counts), *product(installed(args.peers, PEERS), counts[-1:])]
    jobs[:0] = [("ceiling", counts[-1])] if jobs else []
    rows = []
    for mode, count in jobs:
        job = {"mode": mode, "examples": count}
        rows.append(job | measure("benchmarks.inference", job))
        print(*show(rows[-1:]).splitlines()[2:], sep="\n", file=sys.stderr, flush=True)
    same = [
        {"mode": mode}
        | measure("benchmarks.inference", {"mode": mode, "examples": args.equality, "equality": True})
        for mode in (("fast", "unmerged") if args.equality else ())
    ]
    result = provenance() | {"rows": rows, "equality": same}
    print(f"{headline(result)}\n")
    if rows:
        print(f"{show_all(rows)}\n")
    if same:
        print(f"{show_equality(same)}\n")
    for row in rows:
        for what, table in row.get("kinds", {}).items():
            print(f"{row['mode']}, {what}:\n\n{show_kinds(table)}\n")
    finish(result, [*rows, *same], args.output)


if __name__ == "__main__":
    main()
