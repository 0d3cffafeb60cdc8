"""The flags that the scripts share, and how a script ends: one clear line on stderr and a truthful exit
status.

A training script and its inference script take the same flags, so one command line serves both: the inference
script finds the run that the training flags name, and the training script leaves the decoding flags alone.
"""

import argparse
import atexit
import contextlib
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from study.device import Process, gpu_share
from study.errors import UserError

DEFAULTS = {  # by task; the other defaults are the same for both and stand at their flag
    "classification": {
        "dataset": "rungalileo/20_Newsgroups_Fixed",
        "lora_r": 8,
        "epochs": 5,
        "max_new_tokens": 20,
    },
    "summarization": {"dataset": "knkarthick/samsum", "lora_r": 64, "epochs": 1, "max_new_tokens": 100},
}
T5 = {  # by task, and by --tuning
    "classification": {"epochs": 5},
    "summarization": {"epochs": 3},
    "full": {"learning_rate": 3e-4},
    "lora": {"learning_rate": 1e-3},
}
SHOTS = {"classification": 1, "summarization": 2}  # per class, or in all
CHECKPOINTS = {  # by kind of script: each has its own flags and defaults
    "causal": "NousResearch/Llama-2-7b-hf",
    "prompt": "NousResearch/Llama-2-7b-hf",
    "encoder": "google-bert/bert-base-uncased",
    "t5": "google/flan-t5-base",
    "cheap": None,
}
RATES = {  # by kind of script: the default learning rate, and its schedule
    "causal": (2e-4, "after a warm-up over 3 %% of an epoch's steps, constant (%(default)s)"),
    "encoder": (2e-5, "after a warm-up over 10 %% of the steps, falling to 0 (%(default)s)"),
    "t5": (None, "after a warm-up over 3 %% of an epoch's steps, constant (full 3e-4, lora 1e-3)"),
}
LENGTHS = {  # what --max_seq_length is of
    "causal": "prompt and answer of one example; longer texts are shortened to fit",
    "encoder": "tokens of one example; longer texts are cut",
    "t5": "prompt alone; longer texts are shortened to fit",
}
MODELS = {"causal": "a causal language model", "encoder": "an encoder", "t5": "a T5"}
CHEAP = {  # by task; the first is the default
    "classification": ("tfidf-nb", "tfidf-svm", "tfidf-lr"),
    "summarization": ("lead-3", "longest-3"),
}


class Parser(argparse.ArgumentParser):
    """One that names the flag that a mistyped one is most like."""

    def error(self, message: str) -> None:
        found = re.fullmatch(r"unrecognized arguments: (--\w+).*", message, re.DOTALL)
        like = get_close_matches(found[1], self._option_string_actions, n=1) if found else []
        super().error(f"{message} (did you mean {like[0]}?)" if like else message)


def build_parser(task: str | None, description: str, kind: str | None = None) -> argparse.ArgumentParser:
    """Every flag of a `kind` of script (CHECKPOINTS): by default "causal", which fine-tunes for a task, or
    with `task=None`, where a flag says the task, "prompt"."""
    kind = kind or ("causal" if task else "prompt")
    parser = Parser(
        usage="%(prog)s [flags] (--help lists them)",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if task is None:
        group = parser.add_argument_group("baseline" if kind == "prompt" else "task and method")
        add = group.add_argument
        add(
            "--task_type",
            choices=tuple(DEFAULTS),
            default="classification",
            help="task to score (%(default)s)",
        )
    if kind == "t5":
        add(
            "--tuning",
            choices=("full", "lora"),
            default="full",
            help="train all weights, or adapters of rank --lora_r (%(default)s)",
        )
    if kind == "cheap":
        each = (f"{task}: {', '.join(methods)}" for task, methods in CHEAP.items())
        methods = sum(CHEAP.values(), ())
        add("--method", choices=methods, help=f"what to score; {'; '.join(each)} (the first of its task)")
    if kind == "prompt":
        add(
            "--prompt_type",
            choices=("zero-shot", "few-shot"),
            default="zero-shot",
            help="prompt (%(default)s)",
        )
        add(
            "--shots",
            type=positive_int,
            help="few-shot examples: per class in classification (1), in all in summarization (2)",
        )
        add(
            "--chat_template",
            choices=("none", "auto"),
            default="none",
            help="auto wraps the prompt in the tokenizer's own chat template where it has one (%(default)s)",
        )
    add_data_flags(parser, task, kind)
    if kind == "causal":
        add_lora_flags(parser, DEFAULTS[task]["lora_r"], alpha=16, dropout=0.1)
    elif kind == "t5":
        add_lora_flags(parser, 16, alpha=32, dropout=0.05, everywhere=False)
    if kind in RATES:
        add_training_flags(parser, task, kind)
    if kind == "cheap":
        add_share(parser.add_argument_group("training").add_argument)
    add_decoding_flags(parser, task, kind)
    add_run_flags(parser, kind)
    return parser


def add_data_flags(parser: argparse.ArgumentParser, task: str | None, kind: str) -> None:
    add = parser.add_argument_group("model and data").add_argument
    if CHECKPOINTS[kind]:
        add(
            "--pretrained_ckpt",
            default=CHECKPOINTS[kind],
            metavar="CKPT",
            help=f"hub id or local folder of {MODELS.get(kind, MODELS['causal'])} (%(default)s)",
        )
    shown = "%(default)s" if task else "by task: " + ", ".join(d["dataset"] for d in DEFAULTS.values())
    add(
        "--dataset",
        default=DEFAULTS[task]["dataset"] if task else None,
        metavar="NAME",
        help="hub id, or a local folder with train, test and validation files, or one local file, which is "
        f"the train split ({shown})",
    )
    for split in ("train", "test", "validation"):
        add(
            f"--{split}_file",
            metavar="FILE",
            help=f"the {split} split: .jsonl .json .csv .tsv or .parquet, plain or .gz (from --dataset)",
        )
    add(
        "--delimiter",
        type=delimiter,
        metavar="CHAR",
        help="what parts the columns of .csv and .tsv, a character or the word tab (the header's)",
    )
    for split, more in (("test", ", the same in every run"), ("validation", ", which no run trains on")):
        add(
            f"--{split}_fraction",
            type=part,
            metavar="F",
            help=f"the share of each class of train that becomes a {split} split where there is none{more}",
        )
    add(
        "--text_column",
        nargs="+",
        default="text",
        metavar="COLUMN",
        help='column of the texts to classify, or several: a line "COLUMN: ..." of each (%(default)s)',
    )
    add("--label_column", default="label", help="column of their classes (%(default)s)")
    add(
        "--merge_labels",
        action="store_true",
        default=None,  # as in older records
        help="take classes that differ only in case or white space as one, by its most frequent spelling",
    )
    add(
        "--unseen_labels",
        choices=("drop", "keep"),
        help="rows to score whose class train lacks: leave them out, or count them as wrong (refused)",
    )
    add("--dialogue_column", default="dialogue", help="column of the dialogues to summarize (%(default)s)")
    add("--summary_column", default="summary", help="column of their summaries (%(default)s)")
    add("--drop_overlap", action="store_true", help="drop the train texts that also occur in test")
    add(
        "--max_train_samples",
        type=positive_int,
        metavar="N",
        help="use N train examples, chosen by --seed (all)",
    )
    add(
        "--max_eval_samples",
        type=positive_int,
        metavar="N",
        help="score N examples, always the same ones (all)",
    )
    if CHECKPOINTS[kind]:
        add(
            "--max_seq_length",
            type=positive_int,
            default=512,
            metavar="TOKENS",
            help=LENGTHS.get(kind, LENGTHS["causal"]) + " (%(default)s)",
        )
    if CHECKPOINTS[kind] and kind != "encoder":
        add(
            "--max_new_tokens",
            type=positive_int,
            default=DEFAULTS[task]["max_new_tokens"] if task else None,
            metavar="TOKENS",
            help=(
                "longest answer "
                if kind == "t5"
                else "longest answer, and the room kept for it within --max_seq_length "
            )
            + ("(%(default)s)" if task else "(classification 20, summarization 100)"),
        )
    add("--seed", type=seed, default=42, help="order, dropout, samples and few-shot examples (%(default)s)")


def add_share(add: Callable) -> None:
    add(
        "--train_sample_fraction",
        type=fraction,
        default=1.0,
        metavar="F",
        help="share of the train examples in (0, 1], stratified by class; smaller ones lie inside larger "
        "(%(default)s)",
    )


def add_lora_flags(
    parser: argparse.ArgumentParser, rank: int, alpha: int, dropout: float, everywhere: bool = True
) -> None:
    add = parser.add_argument_group("LoRA").add_argument
    add("--lora_r", type=positive_int, default=rank, metavar="RANK", help="rank (%(default)s)")
    add(
        "--lora_alpha",
        type=positive_int,
        default=alpha,
        metavar="ALPHA",
        help="scale is ALPHA / RANK (%(default)s)",
    )
    add("--dropout", type=probability, default=dropout, help="dropout before the adapters (%(default)s)")
    if everywhere:
        add(
            "--target_modules",
            nargs="+",
            default=["all-linear"],
            metavar="NAME",
            help="layers with an adapter, e.g. q_proj v_proj (all-linear: all but the head)",
        )


def add_training_flags(parser: argparse.ArgumentParser, task: str | None, kind: str) -> None:
    add = parser.add_argument_group("training").add_argument
    add(
        "--epochs",
        type=positive_int,
        default=DEFAULTS[task]["epochs"] if task else None,
        help="passes over the examples "
        + ("(%(default)s)" if task else "({classification[epochs]}, {summarization[epochs]})".format(**T5)),
    )
    if kind == "causal":
        add(
            "--also_epochs",
            type=positive_int,
            nargs="+",
            default=[],
            metavar="N",
            help="leave the runs of these fewer epochs, too, each in its own folder as if trained by itself",
        )
    add_share(add)
    add("--learning_rate", type=positive_float, default=RATES[kind][0], metavar="LR", help=RATES[kind][1])
    add(
        "--batch_size",
        type=positive_int,
        default=32 if kind == "t5" else 16,
        metavar="N",
        help="examples per optimizer step (%(default)s)",
    )
    add(
        "--max_tokens_per_batch",
        type=auto_int,
        default="auto",
        metavar="TOKENS",
        help="tokens on the device at once; splits a batch, changes speed and memory only (%(default)s)",
    )
    if kind in {"encoder", "t5"}:
        return
    add(
        "--gradient_checkpointing",
        choices=("auto", "on", "off"),
        default="auto",
        help="recompute activations to save memory; auto turns it on where they would not fit (%(default)s)",
    )
    add(
        "--loss_on",
        choices=("answer", "all"),
        default="answer",
        help="tokens that are learned: the answer's, or the prompt's too, as published (%(default)s)",
    )
    add(
        "--attn_implementation",
        default="auto",
        metavar="NAME",
        help="auto takes flash_attention_2 if installed, else PyTorch's own kernels; or a name that "
        "transformers knows (%(default)s)",
    )
    add(
        "--report_to",
        default="none",
        help="a tracker that transformers knows, e.g. tensorboard (%(default)s)",
    )


def add_decoding_flags(parser: argparse.ArgumentParser, task: str | None, kind: str) -> None:
    add = parser.add_argument_group("decoding" if CHECKPOINTS[kind] else "scoring").add_argument
    add("--split", choices=("test", "validation"), default="test", help="split to score (%(default)s)")
    if kind == "causal":
        add(
            "--predict_file",
            metavar="FILE",
            help="instead of scoring, answer the texts of this file, which needs no labels, by the run",
        )
        add(
            "--predictions_file",
            metavar="FILE",
            help="that file with the answers in more columns (predictions-HASH in the run's folder)",
        )
    if not CHECKPOINTS[kind]:
        return
    add(
        "--eval_batch_size",
        type=auto_int,
        default="auto",
        metavar="N",
        help="examples scored at once (%(default)s)"
        if kind == "encoder"
        else "examples decoded at once (%(default)s)",
    )
    if kind in {"encoder", "t5"}:
        return
    add(
        "--merge",
        choices=("auto", "on", "off"),
        default="auto",
        help="decode with dense weights that the adapter is merged into, or with those in 4 bits; auto "
        "merges on a GPU with room for it (%(default)s)",
    )
    if task != "summarization":
        add(
            "--decoding",
            choices=("free", "constrained"),
            default="free",
            help="constrained lets the model choose among the class names only (%(default)s)",
        )


def add_run_flags(parser: argparse.ArgumentParser, kind: str) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default="experiments", metavar="DIR", help="where runs are kept (%(default)s)")
    add(
        "--experiment_dir",
        metavar="DIR",
        nargs="+" if kind == "causal" else None,
        help="folder of this run (a name built from the flags, in --output_dir)"
        + ("; scoring takes several" if kind == "causal" else ""),
    )
    add("--force", action="store_true", help="redo a finished run, from the start")
    add("--dry_run", action="store_true", help="print the run's folder and whether it is finished, and stop")
    add(
        "--show_repeated",
        action="store_true",
        help="with --dry_run: list train texts that occur more than once, those with different classes first",
    )
    add(
        "--price_per_hour",
        type=positive_float,
        metavar="USD",
        help="price of this machine (by GPU, study/records/prices.json)",
    )
    add(
        "--gpu_name",
        metavar="NAME",
        help="price the GPU as this one, or this instance, of study/records/prices.json (detected)",
    )


def parse_args(
    task: str | None, description: str, argv: Sequence[str] | None = None, kind: str | None = None
) -> argparse.Namespace:
    """The flags as used. `args.given` lists the names of those that stood on the command line, `args.kind` is
    the script's.

    Hyphens in flag names are accepted for underscores.
    """
    parser = build_parser(task, description, kind)
    words = [underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    args = parser.parse_args(words)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    args.given = sorted(vars(parser.parse_args(words)))
    args.text_column = one_or_several(args.text_column)
    args.task = task or args.task_type
    args.kind = kind or ("causal" if task else "prompt")
    for name, value in open_defaults(args).items():
        if getattr(args, name, 0) is None:
            setattr(args, name, value)
    if args.kind == "cheap":
        args.method = args.method or CHEAP[args.task][0]
        if args.method not in CHEAP[args.task]:
            parser.error(f"--method {args.method}: for {args.task} it is {' or '.join(CHEAP[args.task])}")
    check_fractions(parser, args)
    lora = sorted({"lora_r", "lora_alpha", "dropout"} & {*args.given})
    if args.kind == "t5" and args.tuning == "full" and lora:
        parser.error(f"--{lora[0]} goes with --tuning lora")
    if args.kind == "prompt" and (args.prompt_type == "zero-shot" or args.shots == SHOTS[args.task]):
        args.shots = None  # names no other run
    check_folders(parser, args)
    check_predicting(parser, args)
    targets = getattr(args, "target_modules", [])
    if "all-linear" in targets and len(targets) > 1:
        parser.error("--target_modules all-linear stands alone")
    if args.task == "summarization" and getattr(args, "decoding", "free") == "constrained":
        parser.error("--decoding constrained chooses among classes: it goes with classification")
    if args.show_repeated and not (args.dry_run and args.task == "classification"):
        parser.error("--show_repeated goes with --dry_run, and with classification")
    return args


def one_or_several(columns: str | list[str]) -> str | list[str]:
    """--text_column with each name once; a single one, which names the run as it always did, as a word."""
    several = [*dict.fromkeys([columns] if isinstance(columns, str) else columns)]
    return several if len(several) > 1 else several[0]


def check_fractions(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for split in ("test", "validation"):
        if getattr(args, f"{split}_file") and getattr(args, f"{split}_fraction"):
            parser.error(
                f"--{split}_fraction takes a share of train, --{split}_file names another split: give one"
            )


def check_folders(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse --also_epochs and --experiment_dir that say no or two folders of a run; one stands as a word."""
    if isinstance(args.experiment_dir, list):
        twice = {folder for folder in args.experiment_dir if args.experiment_dir.count(folder) > 1}
        if twice:
            parser.error(f"--experiment_dir {min(twice)}: it is named twice")
        if len(args.experiment_dir) == 1:
            [args.experiment_dir] = args.experiment_dir
    also = getattr(args, "also_epochs", [])
    for epochs in also:
        if epochs >= args.epochs or also.count(epochs) > 1:
            why = "twice" if epochs < args.epochs else f"not below --epochs {args.epochs}"
            parser.error(f"--also_epochs {epochs}: it is {why}")
    if also and args.experiment_dir:
        parser.error(
            "--also_epochs leaves runs in folders of their own: give --output_dir, not --experiment_dir"
        )


def check_predicting(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse beside --predict_file what chooses what is scored, and several runs; and its output alone."""
    if not getattr(args, "predict_file", None):
        if getattr(args, "predictions_file", None):
            parser.error("--predictions_file goes with --predict_file")
        return
    others = [name for name in ("split", "max_eval_samples", "show_repeated") if name in args.given]
    if others:
        parser.error(f"--{others[0]} chooses what is scored: --predict_file answers all of its file instead")
    if isinstance(args.experiment_dir, list) or args.also_epochs:
        flag = "--also_epochs" if args.also_epochs else "--experiment_dir"
        parser.error(f"--predict_file takes the answers of one run, and {flag} names several")


def open_defaults(args: argparse.Namespace) -> dict:
    """The defaults that depend on other flags, on the task above all."""
    kind = T5[args.task] | T5[args.tuning] if getattr(args, "kind", None) == "t5" else {}
    return DEFAULTS[args.task] | kind


def underscored(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if word.startswith("--") else word


def positive_int(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} is not 1 or more")
    return number


def seed(word: str) -> int:
    number = int(word)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{word} is not in [0, 4294967296)")
    return number


def delimiter(word: str) -> str:
    mark = "\t" if word in ("tab", "\\t") else word
    if len(mark) != 1 or mark in '"\r\n ':
        raise argparse.ArgumentTypeError(f"{word!r} is not one character, or tab")
    return mark


def auto_int(word: str) -> int | str:
    return word if word == "auto" else positive_int(word)


def positive_float(word: str) -> float:
    number = float(word)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{word} is not above 0")
    return number


def fraction(word: str) -> float:
    number = float(word)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{word} is not in (0, 1]")
    return number


def part(word: str) -> float:
    number = float(word)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{word} is not in (0, 1)")
    return number


def probability(word: str) -> float:
    number = float(word)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{word} is not in [0, 1)")
    return number


def script_name(path: Path) -> str:
    """As a record names it: its file, in the folders competitors and serving with that."""
    folder = path.resolve().parent.name
    return f"{folder}/{path.name}" if folder in {"competitors", "serving"} else path.name


def flush_stdout() -> None:
    """Write what is left; where nobody reads on, the interpreter's own try at its end fails no more."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


STUCK = 10  # seconds after a signal until a process that waits in a library for another is ended
FIRST_SPEAKS = 5  # seconds that the others leave the first process to say what all of them refuse


def run_script(main: Callable[[Process], None], distributed: bool = False) -> None:
    """Run `main` and exit: 0 done; 1 with one line on stderr for a UserError; 130 interrupted (Ctrl-C or
    SIGTERM).

    Of several processes (`accelerate launch`) only the first speaks, unless something goes wrong in another
    alone, and unless `distributed` only the first runs, by itself.
    """
    process = Process(script_name(Path(sys.argv[0])))
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises on optional CPU kernels
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?" for what it can't
    if process.count > 1 and not distributed:
        if not process.main:
            return
        leave_the_others()
        process = replace(process, count=1)
    code = run(main, process) if process.count == 1 else run_together(main, process)
    if code:
        sys.exit(code)


def run_together(main: Callable[[Process], None], process: Process) -> NoReturn:
    """Run this one of several processes, and exit."""
    if not process.main:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    end_though_stuck(process)
    try:
        code = run(main, process)
    except SystemExit as error:  # of wrong usage, or --help
        code = error.code
        if code and not process.main:
            let_the_first_speak()
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    # With gloo's threads, leaving the process group may hang and the interpreter's end abort.
    os._exit(code)


def run(main: Callable[[Process], None], process: Process) -> int:
    """The exit status of `main`, which has been said on stderr."""
    try:
        gpu_share()  # what it says is refused before anything is read
        main(process)
    except UserError as error:
        if process.main:
            print(f"error: {error}", file=sys.stderr)
        elif error.__cause__:  # it went wrong here: the first process has nothing to say of it
            print(f"error: process {os.environ['RANK']}: {error}", file=sys.__stderr__, flush=True)
        else:
            let_the_first_speak()
        return 1
    except BrokenPipeError:  # of `| head`: whoever read has enough
        pass
    except KeyboardInterrupt:
        if process.main:
            print(interrupted(), file=sys.stderr)
        return 130
    finally:
        flush_stdout()
    return 0


def let_the_first_speak() -> None:
    """Of what all processes refuse: as soon as one has ended, the launcher ends the others."""
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(FIRST_SPEAKS)


def interrupted() -> str:
    forced = "--force" in sys.argv
    then = "started again with --force it begins anew" if forced else "start it again and it goes on"
    return f"interrupted: {then}"


def leave_the_others() -> None:
    """From here on this process is one that was started alone."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)


def end_though_stuck(process: Process) -> None:
    """Let Ctrl-C or SIGTERM end this process even where it waits in a library for another one that is gone,
    and no handler in Python can run. Of the two, or of several, only the first one counts: a launcher sends
    more."""

    def interrupt(number, frame) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda *_: None)
        raise KeyboardInterrupt

    def watch() -> None:
        os.read(signals, 1)
        time.sleep(STUCK)
        if process.main:
            print(interrupted(), file=sys.stderr, flush=True)
        os._exit(130)

    signals, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, interrupt)
    threading.Thread(target=watch, daemon=True).start()
