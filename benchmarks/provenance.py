"""How a result came about: what stands above its table and in its JSON."""

import contextlib
import importlib.metadata
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

from study import device
from study.records import record

PACKAGES = (
    *("torch", "transformers", "peft", "bitsandbytes", "triton"),
    *("trl", "unsloth", "liger-kernel", "vllm"),
)


def provenance() -> dict:
    """Device, commit, versions of the packages that are installed, date in UTC, and the command line, where
    absolute paths are cut to their last part."""
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    spec = sys.modules["__main__"].__spec__  # None where a file is run instead of a module
    program = ["-m", spec.name] if spec else [Path(sys.argv[0]).name]
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "device": device.name(),
        "commit": record.commit(),
        "versions": versions,
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": shlex.join(["python", *program, *words]),
    }


def headline(about: dict) -> str:
    """One line of Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    commit = f"commit {(about['commit'] or 'unknown')[:8]}"
    return f"{about['device']}; {commit}; {versions}; {about['date']}; `{about['command']}`"
