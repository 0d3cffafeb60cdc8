"""Records: one JSON object for each training and each evaluation, which appears whole or not at all.

A run that fails is recorded as failed; a finished record is replaced by a finished one only. What a record
replaces and what fails over it were paid for, so it keeps what they took as `spent_before`. While a run goes
on, its record so far stands beside it as .train.json or .eval.json, with the status "running".
"""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Container, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from study import device
from study.device import Process
from study.errors import UserError, is_out_of_memory
from study.files import write_text
from study.records import attempts, cost, schema

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
LESS_MEMORY = {  # what helps, by the flag that a script must have
    "max_tokens_per_batch": "train with a smaller --max_tokens_per_batch",
    "gradient_checkpointing": "train with --gradient_checkpointing on",
    "eval_batch_size": "score with a smaller --eval_batch_size or --max_seq_length",
}
PACKAGES = (
    "torch transformers tokenizers gigatoken peft bitsandbytes accelerate datasets rouge-score numpy "
    "flash-attn"
)


def short_hash(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def hash_of_settings(args: argparse.Namespace, settings: Iterable[str]) -> str:
    """Of those that older records lack only where they are set, so that these have the same hash."""
    values = {name: getattr(args, name, None) for name in settings}
    return short_hash({name: value for name, value in values.items() if value or name not in schema.LATER})


def write_json(path: Path, content: dict) -> None:
    """Indented, with a list of numbers on one line."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    text = re.sub(r"\[\n[-+.\dEe\s,nul]*\]", lambda found: "[" + " ".join(found[0][1:-1].split()) + "]", text)
    write_text(path, text + "\n")


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read(path: Path) -> dict | None:
    """A record, or None where there is none. Raises UserError for a file that is not one, or that holds a
    NaN or a negative time."""
    try:
        content = parsed(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable record ({error}): --force redoes the run") from None
    if (
        not isinstance(content, dict)
        or content.get("schema") != schema.SCHEMA
        or not isinstance(content.get("status"), str)
    ):
        raise UserError(f"{path} is not a record of schema {schema.SCHEMA}: --force redoes the run")
    for part in (content[name] for name in schema.PARTS if name in content):
        times = (
            [part]
            if not isinstance(part, dict)
            else [part[name] for name in part if name.endswith("seconds")]
        )
        if not all(isinstance(value, int | float) and value >= 0 for value in times):
            raise UserError(f"{path} has a time that is negative or no number: --force redoes the run")
    return content


def read_whole(path: Path, part: str | None = None) -> dict | None:
    """A record, of a run that goes on what there is. Raises UserError for one that lacks what tables need of
    its `part`, or of the one that its name says."""
    return read_standing(path, part)[0]


def read_standing(path: Path, part: str | None = None) -> tuple[dict | None, str]:
    """What `read_whole` gives, and the `status`, from one look at the file."""
    content = read(path)
    state = state_of(path, content)
    if state != "finished":
        content = read(beside(path)) or content
    if content is not None:
        schema.check(content, path, part)
    return content, state


def parsed(text: bytes) -> object:
    """By orjson where it is installed, in a fifth of the time for the records of a large report; what it
    refuses, NaN among others, the standard library names."""
    with contextlib.suppress(ImportError, ValueError):
        import orjson

        return orjson.loads(text)
    return json.loads(text.decode("utf-8"), parse_constant=finite, parse_float=finite)


def finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no measurement")
    return number


def beside(path: Path) -> Path:
    """Where the record `path` stands while its run goes on."""
    return path.with_name(f".{path.name}")


def status(path: Path) -> str:
    """How a run stands: a record's status, "running", "unfinished" (begun, no record) or "not started"."""
    return state_of(path, read(path))


def state_of(path: Path, content: dict | None) -> str:
    """The `status` of the record `path`, which holds `content`."""
    if content and content["status"] == "finished":
        return "finished"
    if beside(path).exists():
        return "running" if is_locked(path.parent) else "unfinished"
    if content:
        return content["status"]
    return "unfinished" if (path.parent / "checkpoints").is_dir() else "not started"


@contextlib.contextmanager
def locked(folder: Path, process: Process, flag: str = "--experiment_dir") -> Iterator[None]:
    """Hold `folder`, which `flag` names, for `process` alone, until it ends however it ends; on a file system
    without locks say so and go on. Raises UserError if another one holds it."""
    if not process.main:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{flag} {folder} can't be used: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder} is in use by another run: wait for it, or use another {flag}"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UserError(f"{flag} {folder} can't be locked: {error.strerror}") from None
            print(f"lock       none: {folder} lies where files can't be locked; start no second run in it")
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process of this machine holds `folder`, looked up without touching the lock."""
    with contextlib.suppress(OSError):
        inode = str((folder / ".lock").stat().st_ino)
        return any(
            line.split()[5].endswith(f":{inode}")
            for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines()
        )
    return False


@contextlib.contextmanager
def recording(path: Path, args: argparse.Namespace, method: str, process: Process) -> Iterator[dict]:
    """Yield the record to fill, of a part of a run by `method`; write it at the end, as finished, failed, oom
    or interrupted. One without a result has the `wall_seconds` and the `cost` of the process until then; a
    block that knows better sets them.

    Out of the block come only UserError and KeyboardInterrupt.
    """
    settings = schema.settings_of(method, schema.part_of(path), getattr(args, "drop_overlap", False))
    content = {
        "schema": schema.SCHEMA,
        "status": "running",
        "script": process.script,
        "task": args.task,
        "method": method,
        "model": schema.METHODS[method].model or args.pretrained_ckpt,
        "config": {name: value for name, value in vars(args).items() if name != "given"},
        "config_hash": hash_of_settings(args, settings),
        "started": utc(process.started),
    }
    try:
        if process.main:
            write_json(beside(path), content)
        yield content
        if process.main:
            close(path, content | {"status": "finished"})
    except (Exception, KeyboardInterrupt) as error:
        with undisturbed():
            for part in schema.PARTS:
                content.pop(part, None)
            content.update(describe_error(error, vars(args)))
            content.setdefault("wall_seconds", process.seconds())
            with contextlib.suppress(Exception):  # without a price; the error at hand is the one to raise
                content["cost"] = cost.of(args, device.name(), content["wall_seconds"], process.count)
            with contextlib.suppress(UserError):  # the error at hand says more than that it can't be recorded
                if process.main:
                    close(path, content)
        if isinstance(error, UserError | KeyboardInterrupt):
            raise
        raise UserError(f"{content['error']['message']}; {content['error']['advice']}") from error


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No second Ctrl-C or SIGTERM, such as a launcher of several processes sends, ends the block early."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(each, lambda *_: None) for each in signals]
    try:
        yield
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)


def describe_error(error: BaseException, flags: Container[str] = ()) -> dict:
    """The `status` and `error` of a record; its advice for lack of memory names those of a script's `flags`
    that help."""
    text, kind = " ".join(str(error).split()), type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return {"status": "interrupted"}
    if isinstance(error, UserError):
        found = {"message": text, "advice": "mend it and start again"}
    elif is_out_of_memory(error):
        advice = "; ".join(text for flag, text in LESS_MEMORY.items() if flag in flags)
        advice = advice or "take fewer examples"
        return {"status": "oom", "error": {"type": kind, "message": "out of memory", "advice": advice}}
    else:
        trace = "".join(traceback.format_exception(error))
        found = {"message": f"{kind}: {text}", "advice": "the record has the traceback", "traceback": trace}
    return {"status": "failed", "error": {"type": kind, **found}}


def close(path: Path, content: dict) -> None:
    """Write a record with the attempts before it, but none as finished that readers would refuse. A failure
    over a finished one adds itself to that one's attempts alone."""
    content["environment"] = environment(content["config"].get("seed"))
    content["finished"] = now()
    if content["status"] == "finished":
        schema.check(content, path)
    earlier, before = None, []
    with contextlib.suppress(UserError):  # what can't be read tells of no attempts
        earlier = read(path)
        if earlier:
            schema.check(earlier, path)
            before = attempts.of_record(earlier)
    if content["status"] != "finished" and earlier and earlier["status"] == "finished":
        content = earlier | {"spent_before": [*before[:-1], *attempts.of_record(content)]}
    elif before:
        resumed = attempts.measured(content).get("earlier_seconds", 0)
        content["spent_before"] = attempts.without(before, resumed)
    write_json(path, content)
    beside(path).unlink(missing_ok=True)


def now() -> str:
    return utc(time.time())


def utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def environment(seed: int | None) -> dict:
    """Versions, device, commit and seeds, as a record keeps them."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES.split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None
    found = {"versions": versions, "gpu": gpu, "cpus": os.cpu_count(), "git_commit": commit()}
    return found | {"seeds": {"run": seed}}


def commit() -> str | None:
    """That this code is of: what the variable STUDY_COMMIT says, for a copy outside its repository, or else
    the repository, with "-dirty" behind it where the code was changed since. (Not GIT_COMMIT, by which build
    servers mean whatever they build.)"""
    if os.environ.get("STUDY_COMMIT"):
        return os.environ["STUDY_COMMIT"]
    here = str(Path(__file__).resolve().parent)
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
