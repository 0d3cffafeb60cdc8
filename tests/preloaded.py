"""Scripts in processes that have the libraries already, whose loading takes longer than most of what tests
want of a script.

Each process is forked from one that has loaded the libraries and nothing of this project. In all else it is
as one of its own: it has its arguments, its streams and its exit status, and can be killed.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = "bitsandbytes peft transformers.trainer transformers.models.llama.modeling_llama"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(LIBRARIES.split())


def start_preloaded(
    script: str | Path,
    *flags: object,
    stdout: str = os.devnull,
    stderr: str = os.devnull,
    env: dict[str, str] | None = None,
) -> ForkServerProcess:
    """Start a script of this project, or one at a full path, that writes to the files `stdout` and `stderr`;
    the environment is the one in which the first was started, with `env`."""
    words = [str(ROOT / script), *map(str, flags)]
    process = FORKS.Process(target=run_here, args=(words, stdout, stderr, env or {}))
    process.start()
    return process


def start_until(seen: Callable[[], object], script: str | Path, *flags: object) -> ForkServerProcess:
    """Start a script and come back as soon as `seen` says so, with the script still running."""
    process = start_preloaded(script, *flags)
    while not seen():
        process.join(0.001)
        assert process.is_alive(), "it ended before it was seen"
    return process


def kill(process: ForkServerProcess) -> None:
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it ended before it was killed"


def run_preloaded(
    script: str | Path, *flags: object, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run a script to its end, as `conftest.run_script` does."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = start_preloaded(script, *flags, stdout=str(out), stderr=str(err), env=env)
        process.join()
        return subprocess.CompletedProcess(script, process.exitcode, out.read_text(), err.read_text())


def start_together(
    count: int, script: str | Path, *flags: object, folder: str, env: dict[str, str] | None = None
) -> list[ForkServerProcess]:
    """Start so many processes of a script, as `accelerate launch` does; each writes to out-N and err-N in
    `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | (env or {})
    one |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count))
    return [
        start_preloaded(
            script,
            *flags,
            stdout=f"{folder}/out-{rank}",
            stderr=f"{folder}/err-{rank}",
            env=one | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        )
        for rank in range(count)
    ]


def run_together(count: int, script: str | Path, *flags: object) -> list[subprocess.CompletedProcess]:
    """What came of each of so many processes of a script."""
    with tempfile.TemporaryDirectory() as folder:
        processes = start_together(count, script, *flags, folder=folder)
        for process in processes:
            process.join()
        texts = [[Path(folder, f"{name}-{i}").read_text() for name in ("out", "err")] for i in range(count)]
        return [
            subprocess.CompletedProcess(script, process.exitcode, *text)
            for process, text in zip(processes, texts, strict=True)
        ]


def run_here(words: list[str], stdout: str, stderr: str, env: dict[str, str]) -> None:
    """In the new process: what `python script flags` does."""
    os.environ |= env
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    gc.freeze()  # the libraries' objects: to look through them takes longer than many a script
    sys.argv = words
    sys.path.insert(0, str(ROOT))
    runpy.run_path(words[0], run_name="__main__")
