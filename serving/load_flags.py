"""The flags of the load test, and what they name."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from study import cli
from study.errors import UserError


def parse(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(
        usage="%(prog)s --url URL --rates 1,2,4 [flags] (--help lists them)",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("server").add_argument
    add("--url", type=url, required=True, help="of the server, without a path: http://127.0.0.1:8000")
    add(
        "--api",
        choices=("openai", "tgi"),
        default="openai",
        help="openai posts to /v1/completions, tgi to /generate (%(default)s)",
    )
    add("--model", metavar="NAME", help="to ask for (the first that the server names)")
    add("--server", type=label, metavar="NAME", help="what tables call it: vllm, tgi, ... (the url's host)")
    add("--api_key_file", metavar="FILE", help="a file that holds the server's key and nothing else (none)")
    add("--stream", action="store_true", help="stream answers, and measure when the first token comes")
    add = parser.add_argument_group("load").add_argument
    add("--rates", type=rates, required=True, metavar="R,R", help="requests a second, ascending")
    add(
        "--seconds",
        type=cli.positive_float,
        default=30,
        metavar="S",
        help="in which the requests of a rate are due; 20 times an answer's time or more (%(default)s)",
    )
    add(
        "--arrivals",
        choices=("constant", "poisson"),
        default="constant",
        help="evenly spaced, or at random (%(default)s)",
    )
    add(
        "--timeout_seconds",
        type=cli.positive_float,
        default=60,
        metavar="S",
        help="from sending a request on; what has no answer by then failed (%(default)s)",
    )
    add(
        "--slo_seconds",
        type=cli.positive_float,
        metavar="S",
        help="the p90 of latency that is still sustained (any)",
    )
    add(
        "--bisections",
        type=int,
        default=4,
        metavar="N",
        help="rates tried between good and bad (%(default)s)",
    )
    add(
        "--max_lag_seconds",
        type=cli.positive_float,
        default=0.05,
        metavar="S",
        help="a run whose requests were sent later than due by more, at p99, is void (%(default)s)",
    )
    add = parser.add_argument_group("prompts").add_argument
    add("--task_type", choices=tuple(cli.DEFAULTS), default="classification", help="task (%(default)s)")
    add(
        "--prompts_file",
        metavar="FILE",
        help='ready prompts: rows with "prompt" and, to score answers, "reference" (built from test texts)',
    )
    add(
        "--prompt_tokens",
        type=cli.positive_int,
        default=100,
        metavar="N",
        help="take the texts whose prompt has so many tokens, a quarter more or less (%(default)s)",
    )
    add(
        "--repeat_prompts",
        action="store_true",
        help="send a prompt more than once in a run; a server that caches prompts then looks too fast",
    )
    cli.add_data_flags(parser, None, "prompt")
    add = parser.add_argument_group("record").add_argument
    add("--output_dir", default="experiments/serving", metavar="DIR", help="for the record (%(default)s)")
    add("--force", action="store_true", help="begin anew, whatever is recorded")
    add(
        "--not_started",
        type=label,
        metavar="REASON",
        help="send nothing, and record that the server could not be started, and why",
    )
    add("--price_per_hour", type=cli.positive_float, metavar="USD", help="price of the server's machine")
    add("--gpu_name", metavar="NAME", help="price it as this one of study/records/prices.json (detected)")
    args = parser.parse_args([cli.underscored(word) for word in (sys.argv[1:] if argv is None else argv)])
    args.text_column = cli.one_or_several(args.text_column)
    args.task = args.task_type
    for name, value in cli.open_defaults(args).items():
        if getattr(args, name, 0) is None:
            setattr(args, name, value)
    if args.bisections < 0:
        parser.error(f"--bisections {args.bisections} is not 0 or more")
    cli.check_fractions(parser, args)
    return args


def url(word: str) -> str:
    try:
        parts = urlsplit(word)
        fits = parts.scheme in {"http", "https"} and parts.hostname and not parts.query and parts.port != 0
    except ValueError:  # of a port or an address that is no number
        fits = False
    if not fits:
        raise argparse.ArgumentTypeError(f"{word} is not like http://127.0.0.1:8000")
    return word.rstrip("/").removesuffix("/v1")


def label(word: str) -> str:
    """A text on one line."""
    line = " ".join(word.split())
    if not line or not line.isprintable():
        raise argparse.ArgumentTypeError("it should be a text that can be printed")
    return line


def rates(word: str) -> list[float]:
    try:
        found = [float(part) for part in word.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word} is not numbers with commas between them") from None
    if not all(low < high for low, high in zip([0, *found], [*found, float("inf")], strict=True)):
        raise argparse.ArgumentTypeError(f"{word} does not rise from above 0")
    return found


def read_key(file: str | None) -> str | None:
    if file is None:
        return None
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api_key_file {file} can't be read: {error}") from None
    if not key:
        raise UserError(f"--api_key_file {file} is empty: write the key into it")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"--api_key_file {file} should hold one key of plain letters, and nothing else")
    return key
