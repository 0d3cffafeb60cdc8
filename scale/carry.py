"""Runs as bytes, between a node and the driver where they share no folder; what is finished stays."""

import contextlib
from pathlib import Path

from study.errors import UserError
from study.files import write_bytes
from study.records import record


def pack(folders: list[str], cwd: Path) -> dict[str, bytes]:
    """What runs have left, by path, without checkpoints and what is hidden."""
    found = {}
    for folder in folders:
        for path in sorted((cwd / folder).rglob("*")):
            parts = path.relative_to(cwd / folder).parts
            if path.is_file() and parts[0] != "checkpoints" and not any(part[0] == "." for part in parts):
                found[str(Path(folder, *parts))] = path.read_bytes()
    return found


def unpack(files: dict[str, bytes], cwd: Path) -> list[str]:
    """Write what `pack` has found; of each run its records last, so that it is finished once all is there.
    Where a finished record stands that `files` has otherwise, that run stays as it is, and is returned."""
    kept = {
        str(Path(path).parent)
        for path in files
        if is_record(path) and is_finished(cwd / path) and (cwd / path).read_bytes() != files[path]
    }
    run_of = lambda path: next((folder for folder in kept if Path(path).is_relative_to(folder)), None)
    for path in sorted(files, key=is_record):
        if not run_of(path):
            (cwd / path).parent.mkdir(parents=True, exist_ok=True)
            write_bytes(cwd / path, files[path])
    return sorted(kept)


def is_record(path: str) -> bool:
    return path.endswith(".json") and Path(path).name.startswith(("train", "eval"))


def is_finished(path: Path) -> bool:
    with contextlib.suppress(UserError):
        return record.status(path) == "finished"
    return False
