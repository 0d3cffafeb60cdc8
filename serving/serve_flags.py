"""The flags of the servers, and what they name."""

import argparse
import socket
from pathlib import Path

from serving import load_flags, served
from study import cli
from study.errors import UserError

try:
    from serving.app import Limits
except ModuleNotFoundError as error:
    raise UserError(f"{error.name} is not installed: pip install -r requirements-serving.txt") from None

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def parser(description: str) -> argparse.ArgumentParser:
    """Flags that all servers have."""
    made = cli.Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("run", metavar="RUN", help="folder of a finished run, or an export of one")
    add = made.add_argument_group("where").add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen at (%(default)s)")
    add("--port", type=port, default=8000, metavar="N", help="port to listen at (%(default)s)")
    add("--served_model_name", metavar="NAME", help="name that clients ask for (that of RUN)")
    add(
        "--api_key_file",
        metavar="FILE",
        help="a file that holds the key clients must have, and nothing else (none)",
    )
    add = made.add_argument_group("model").add_argument
    add(
        "--merge",
        choices=("auto", "on", "off"),
        default="auto",
        help="make a run's weights dense, its adapter merged; auto: where a GPU's memory allows (auto)",
    )
    add(
        "--max_batch",
        type=cli.positive_int,
        metavar="N",
        help="requests that the model is at together; 1: one after the other (512 on CUDA, 16 elsewhere)",
    )
    add = made.add_argument_group("limits").add_argument
    add(
        "--max_queue",
        type=cli.positive_int,
        default=512,
        metavar="N",
        help="requests that may wait; more are answered with 429 (%(default)s)",
    )
    add(
        "--deadline_seconds",
        type=cli.positive_float,
        default=60.0,
        metavar="S",
        help="in which a request is answered, or given up with 504 (%(default)s)",
    )
    add(
        "--max_body_bytes",
        type=cli.positive_int,
        default=2**20,
        metavar="N",
        help="of a request; more is answered with 413 (%(default)s)",
    )
    return made


def port(word: str) -> int:
    number = int(word) if word.isdigit() else -1
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{word} is not between 0 and 65535")
    return number


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """What can be known before a model is loaded. Raises UserError."""
    folder = Path(args.run)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder: name a finished run or an export")
    served.look(folder)
    load_flags.read_key(args.api_key_file)
    args.served_model_name = args.served_model_name or folder.resolve().name
    return args


def limits_of(args: argparse.Namespace) -> Limits:
    return Limits(
        load_flags.read_key(args.api_key_file), args.max_body_bytes, args.max_queue, args.deadline_seconds
    )


def bound(host: str, port: int) -> socket.socket:
    """A socket at the address. Raises UserError where it is taken or not to be had."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise not_to_be_had(host, port, error) from None
    made.set_inheritable(True)
    return made


def not_to_be_had(host: str, port: int, error: OSError) -> UserError:
    return UserError(f"--host {host} --port {port} can't be listened at ({error.strerror}): name another")


def warn_of_strangers(args: argparse.Namespace) -> None:
    if args.host not in LOOPBACK:
        open_to = "anybody who reaches it" if args.api_key_file is None else "whoever has the key"
        print(
            f"warning    {args.host} is not this machine alone: the server is open to {open_to}", flush=True
        )
