"""The loop over servers and the scripts that start them: what they refuse, what can't start here, what is
found again, what is left running."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DEMO_DATA, DEMO_MODEL, ROOT, error_line

ADAPTER = "5e" * 32
SETTINGS = {"task_type": "classification", "pretrained_ckpt": str(DEMO_MODEL), "max_new_tokens": 20}
SETTINGS |= {"test_file": str(DEMO_DATA / "posts_test.jsonl"), "text_column": ["text", "my label"]}
STARTS = ("vllm", "transformers", "tgi")


def ran(script: str, *words: object, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(ROOT / script), *map(str, words)],
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        check=False,
    )


def environment(**env: str) -> dict[str, str]:
    """With the interpreter of these tests as `python`."""
    kept = {name: value for name, value in os.environ.items() if name not in {"SERVERS", "WORKERS"}}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | env


@pytest.fixture
def run(tmp_path) -> Path:
    """The record of a finished training."""
    folder = tmp_path / "run"
    folder.mkdir()
    content = {"schema": 1, "status": "finished", "task": "classification", "method": "qlora"}
    content |= {"config": SETTINGS, "train": {"adapter_sha256": ADAPTER}}
    (folder / "train.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def exported(tmp_path) -> Path:
    """A folder as serving/export.py writes it, but for the weights, which no test loads."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("")
    about = {"run": str(tmp_path / "gone"), "task": "classification", "adapter_sha256": ADAPTER}
    (folder / "export.json").write_text(json.dumps(about | {"max_new_tokens": 20, "max_seq_length": 512}))
    return folder


@pytest.fixture
def without_docker(tmp_path) -> dict[str, str]:
    """PATH with a docker that has no daemon."""
    (tmp_path / "bin").mkdir()
    docker = tmp_path / "bin" / "docker"
    docker.write_text("#!/bin/sh\nexit 1\n")
    docker.chmod(0o755)
    path = (str(docker.parent), str(Path(sys.executable).parent), os.environ["PATH"])
    return {"PATH": os.pathsep.join(path), "SERVERS": "tgi"}


# The scripts that start a server


@pytest.mark.parametrize("server", STARTS)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name the folder of an exported model"),
        (["gone"], "gone is no folder"),
        (["run"], "run is a run, which servers do not load: python serving/export.py run --output_dir MODEL"),
        (["empty"], "it has no config.json"),
        (["model", "--port", "http"], "--port http: it is a number from 1 to 65535"),
        (["model", "--port=70000"], "--port 70000: it is a number"),
        (["model", "--port"], "--port: it takes a value"),
        (["model", "--api_key_file", "gone"], "--api_key_file gone can't be read"),
        (["model", "--api-key-file=empty.txt"], "--api_key_file empty.txt is empty"),
    ],
)
def test_bad_input_is_one_line(tmp_path, run, exported, server, words, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n")
    done = ran(f"serving/serve_{server}.sh", *words, cwd=tmp_path)
    assert said in error_line(done)
    assert done.returncode == 2


@pytest.mark.parametrize("server", STARTS)
def test_a_port_that_is_taken_is_named(tmp_path, exported, server):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = ran(f"serving/serve_{server}.sh", exported, "--port", port, cwd=tmp_path)
    assert f"--port {port}: can't listen on 127.0.0.1:{port} (address already in use)" in error_line(done)


@pytest.mark.parametrize("server", ["transformers", "tgi"])
def test_what_a_server_does_not_have_is_refused(tmp_path, exported, server):
    (exported / "adapter").mkdir()
    done = ran(f"serving/serve_{server}.sh", exported, "--port", free_port(), cwd=tmp_path)
    assert "without --adapter_on_dequantized" in error_line(done)


def test_tgi_gets_the_folder_read_only_and_a_key_that_no_list_of_processes_shows(tmp_path, exported):
    (tmp_path / "bin").mkdir()
    docker = tmp_path / "bin" / "docker"
    docker.write_text('#!/bin/sh\n[ "$1" = info ] || { echo "$@"; echo "key $API_KEY"; }\n')
    docker.chmod(0o755)
    (tmp_path / "key").write_text("sesame\n")
    port = free_port()
    done = ran(
        "serving/serve_tgi.sh",
        *(exported, "--port", port, "--api_key_file", "key", "--max-concurrent-requests", "512"),
        cwd=tmp_path,
        PATH=f"{docker.parent}{os.pathsep}{os.environ['PATH']}",
        CUDA_VISIBLE_DEVICES="",
    )
    command, key = done.stdout.splitlines()
    assert f"-p 127.0.0.1:{port}:80 -v {exported}:/model:ro " in command
    assert "text-generation-inference:3.3.5-intel-cpu --model-id /model --cuda-graphs 0" in command
    assert command.endswith(" --max-concurrent-requests 512")
    assert "sesame" not in command
    assert key == "key sesame"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


# The loop


@pytest.mark.parametrize(
    ("words", "env", "said"),
    [
        ([], {}, "name at least one model"),
        (["--rates", "1"], {}, "name at least one model"),
        (["run", "--url", "http://a"], {}, "--url is what this loop sets itself"),
        (["run", "--model=a"], {}, "--model is what this loop sets itself"),
        (["run"], {"SERVERS": "vllm sglang"}, "SERVERS: sglang is none of fastapi, ray, transformers"),
        (["gone"], {}, "gone is neither a finished run of llama2_*.py nor an export of one"),
        (["run", "--output_dir"], {}, "--output_dir: it takes a folder"),
    ],
)
def test_the_loop_refuses_in_one_line(tmp_path, run, words, env, said):
    assert said in error_line(ran("serve_and_load.sh", *words, cwd=tmp_path, **env))
    assert not (tmp_path / "experiments").exists()


def test_a_dry_run_lists_every_server_of_every_model_and_starts_none(tmp_path, run, exported):
    done = ran("serve_and_load.sh", run, exported, "--dry_run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    heads = [line for line in done.stdout.splitlines() if line.startswith("[")]
    servers = ("fastapi", "ray", "transformers", "vllm", "tgi")
    assert [head.partition("] ")[2] for head in heads] == [
        f"{server}, classification of {model}" for model in (run, exported) for server in servers
    ]
    assert done.stdout.count("not yet ") == 10
    assert not (tmp_path / "experiments").exists()


def test_a_server_that_can_not_start_is_a_named_gap_and_the_loop_goes_on(tmp_path, exported, without_docker):
    words = (
        exported,
        exported,
        "--output_dir",
        "out",
        "--rates",
        "1",
        "--test_file",
        DEMO_DATA / "posts_test.jsonl",
    )
    done = ran("serve_and_load.sh", *words, cwd=tmp_path, **without_docker)
    assert done.returncode == 1
    assert "2 cells, 2 gaps, 0 failed" in done.stdout
    gaps = done.stderr.splitlines()
    assert len(gaps) == 2
    [log] = (tmp_path / "out").glob("tgi/*/server.log")
    why = "docker has no daemon that this user may use"
    assert gaps[0].startswith(f"gap: tgi, {exported}: {why}")
    assert gaps[0].endswith(f"({log.relative_to(tmp_path)})")
    assert why in log.read_text()
    [found] = log.parent.glob("serve-*.json")
    content = json.loads(found.read_text())
    assert (content["status"], content["serve"]["server"]) == ("failed", "tgi")
    assert why in content["error"]["message"]


def test_what_is_finished_is_found_and_its_server_not_started(tmp_path, exported, without_docker):
    words = ("serve_and_load.sh", exported, "--output_dir", "out", "--rates", "1")
    ran(*words, cwd=tmp_path, **without_docker)
    [found] = (tmp_path / "out").glob("tgi/*/serve-*.json")
    found.write_text(found.read_text().replace('"status": "failed"', '"status": "finished"'))
    log = found.parent / "server.log"
    log.unlink()
    again = ran(*words, cwd=tmp_path, **without_docker)
    assert again.returncode == 0
    assert f"finished  {found.parent.relative_to(tmp_path)}" in again.stdout
    assert not log.exists()
    other = ran(*words[:-1], "2", "--dry_run", cwd=tmp_path, **without_docker)
    assert "not yet" in other.stdout


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_loop_leaves_nothing_running(tmp_path, exported, how):
    """Of a server that is not up yet, and of its child, which it does not end."""
    (tmp_path / "bin").mkdir()
    docker = tmp_path / "bin" / "docker"
    docker.write_text('#!/bin/sh\n[ "$1" = info ] && exit\nsleep 100 &\necho $$ $! >pids\nwait\n')
    docker.chmod(0o755)
    path = os.pathsep.join((str(docker.parent), str(Path(sys.executable).parent), os.environ["PATH"]))
    words = [str(ROOT / "serve_and_load.sh"), str(exported), "--output_dir", "out"]
    loop = subprocess.Popen(
        words,
        cwd=tmp_path,
        env=environment(PATH=path, SERVERS="tgi"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pids = tmp_path / "pids"
    while not (pids.exists() and pids.read_text().endswith("\n")):
        assert loop.poll() is None, loop.communicate()
        time.sleep(0.05)
    os.killpg(loop.pid, how)  # as a terminal sends Ctrl-C: to the loop and not to the server's group
    loop.communicate(timeout=20)
    assert loop.returncode == 128 + how
    for pid in map(int, pids.read_text().split()):
        assert not is_running(pid)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


# What a model tells of itself


def told(folder: Path) -> list[str]:
    done = ran("serve_and_load.sh", "--help", cwd=folder)
    assert done.returncode == 0
    words = [sys.executable, str(ROOT / "serving" / "cells.py"), "about", str(folder)]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()


def test_a_run_names_its_test_split_and_an_export_its_own_tokenizer(run, exported):
    task, adapter, kind, flags = told(run)
    assert (task, adapter, kind) == ("classification", ADAPTER, "run")
    assert shlex.split(flags)[:4] == ["--task_type", "classification", "--pretrained_ckpt", str(DEMO_MODEL)]
    assert "--text_column text 'my label'" in flags
    *_, kind, flags = told(exported)
    assert kind == "export"
    assert f"--pretrained_ckpt {exported} --max_seq_length 512 --max_new_tokens 20" in flags
