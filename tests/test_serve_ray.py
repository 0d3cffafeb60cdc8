"""Ray Serve: replicas that answer as one server, outlive each other, and end when all is answered."""

import contextlib
import math
import os
import random
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import DEMO_MODEL
from preloaded import run_preloaded
from served_here import ask, begin, until
from test_export import run_of
from test_serve import Alone, closed, keep_asking, own_lines, refused, refuses, start_alone

from serving import serve_ray
from study.errors import UserError

SCRIPT = "serving/serve_ray.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of the demo's model with an adapter of random weights."""
    return run_of(DEMO_MODEL, tmp_path_factory.mktemp("ray") / "run")


def free_port() -> int:
    """A port below those that the system gives away, of which Ray's own processes take some."""
    while True:
        port = random.randrange(20000, 32000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@contextlib.contextmanager
def serving(run: Path, folder: Path, *flags: object):
    """The script in a Ray of its own: process, port, and what it said so far."""
    port, out, errors = free_port(), folder / "out", folder / "errors"
    process = start_alone(SCRIPT, run, "--port", port, *flags, stdout=str(out), stderr=str(errors))
    try:
        until(lambda: "ready " in out.read_text() or process.poll() is not None, 300)
        yield process, port, lambda: out.read_text() + own_lines(errors.read_text())
    finally:
        process.terminate()
        process.wait(300)


def replicas_of(process: Alone) -> set[int]:
    """Of the Ray that is the script's own: the children of its raylet that hold a replica."""
    found = set()
    for child in children(process.pid):
        found |= {pid for pid in children(child) if b"ServeReplica" in said_by(pid)}
    return found


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    return []


def said_by(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def test_of_two_replicas_one_is_killed_and_comes_back_and_both_end_when_all_is_answered(run, tmp_path):
    (tmp_path / "key").write_text("secret")
    flags = ("--replicas", 2, "--api_key_file", tmp_path / "key")
    with serving(run, tmp_path, *flags) as (process, port, said):
        assert ask(port, "/v1/models")[0] == 401
        assert ask(port, "/v1/classify", {"text": "a"}, "secret")[2]["label"] in {"a", "b"}
        assert ask(port, "/v1/classify", {"text": 5}, "secret")[2]["error"]["param"] == "text"
        until(lambda: len(replicas_of(process)) == 2)
        statuses, over, before = [], threading.Event(), replicas_of(process)
        with ThreadPoolExecutor(2) as pool:
            load = [pool.submit(keep_asking, port, over, statuses, "secret") for _ in range(2)]
            until(lambda: statuses.count(200) > 8)
            os.kill(min(before), signal.SIGKILL)
            until(lambda: len(replicas_of(process) - {min(before)}) == 2, 300)
            count = len(statuses)
            until(lambda: statuses[count:].count(200) > 8, 300)
            over.set()
            assert not [future.exception() for future in load if future.exception()]
        assert {*statuses} <= {200, 500, "failed"}  # its own are Ray's to answer
        assert len(statuses) - statuses.count(200) <= 2
        body = {"prompt": "a", "max_tokens": 60, "stream": True}
        under_way = [begin(port, "/v1/completions", body, "secret") for _ in range(4)]
        assert all(b" 200 " in connection.recv(1024) for connection in under_way)
        process.terminate()
        assert all(b"[DONE]" in closed(connection) for connection in under_way)
        assert process.wait(300) == 0, said()
        assert refuses(port)
        assert "Traceback" not in said()


def test_a_port_that_is_taken_is_named_in_one_line(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "can't be listened at" in refused(SCRIPT, run, "--port", taken.getsockname()[1])


def test_flags_that_do_not_fit_are_named(run):
    assert "--address 127.0.0.1:1: there is no Ray" in refused(SCRIPT, run, "--address", "127.0.0.1:1")
    done = run_preloaded(SCRIPT, run, "--replicas", 3, "--max_replicas", 2)
    assert done.returncode == 2
    assert "--max_replicas 2 is below --replicas 3" in done.stderr
    assert (
        "--gpus_per_replica: 2 is not between" in run_preloaded(SCRIPT, run, "--gpus_per_replica", 2).stderr
    )


def test_what_a_replica_came_to_is_told_without_its_traceback():
    quoted = f"""The deployment failed to start 2 times in a row: \x1b[36mray::Replica()\x1b[39m
  File "start.py", line 20, in service
RuntimeError: {serve_ray.MARK} run/adapter is not the adapter that its train.json tells of"""
    assert serve_ray.reason_of(quoted) == "run/adapter is not the adapter that its train.json tells of"
    assert serve_ray.reason_of("No node\n has a GPU") == "Ray could not start it: No node has a GPU"


class Serve:
    """Of Ray Serve: an application that is still there when it is asked for, `times` times."""

    def __init__(self, times: float):
        self.left = times

    def delete(self, name: str, _blocking: bool) -> None:
        assert (name, _blocking) == (serve_ray.APP, False)

    def status(self) -> SimpleNamespace:
        self.left -= 1
        return SimpleNamespace(applications={serve_ray.APP: None} if self.left >= 0 else {})


def test_the_end_waits_for_its_replicas_as_long_as_their_requests_may_take():
    serve = Serve(2)
    serve_ray.end(serve, 600)
    assert serve.left == -1
    with pytest.raises(UserError, match="has not ended the replicas within 0 s"):
        serve_ray.end(Serve(math.inf), 0)
