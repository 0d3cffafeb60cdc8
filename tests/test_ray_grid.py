"""Many machines: the cells of a loop as tasks of Ray, on a cluster whose nodes are all on this machine."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import DEMO_DATA, ROOT, error_line, run_script, write_rows
from served_here import until
from test_loops import FINISH, launcher

from scale import carry, on_node, ray_grid, units
from scale.grid import Grid, last_words
from scale.on_node import Job, Outcome
from scale.units import Budget, Unit
from study.dry_run import Cell, Sum
from study.errors import UserError
from study.records import record

SCRIPT = "scale/ray_grid.py"
POSTS = ("--train_file", DEMO_DATA / "posts_train.jsonl", "--test_file", DEMO_DATA / "posts_test.jsonl")
CELLS = {"MODELS": "tfidf-nb", "FRACTIONS": "0.25 1.0", "SEEDS": "1 2"}
LOOP = (ROOT / "compare_models.sh", *POSTS, "--output_dir", "runs")
# At the first attempt of a cell of seed 2: hold the run's folder, as a script does, and wait to be killed.
HANG = """
folder=$(python "$@" --dry_run | tail -n 1 | cut -f 2)
if [[ " $* " == *" --seed 2 "* && ! -e hung ]]; then
  mkdir -p "$folder"
  exec 9>"$folder/.lock"
  flock 9
  echo $$ $RAY_RAYLET_PID >hung.part && mv hung.part hung
  exec sleep 600
fi
exec python "$@"
"""
SEEN_BY_A_WORKER = """
import sys
if any("default_worker" in word for word in sys.orig_argv):
    open(__file__.replace("sitecustomize.py", "seen by a worker"), "w").close()
"""


@pytest.fixture(scope="module", autouse=True)
def own_ray():
    """A folder for Ray alone: what runs beside these tests must not take their cluster for its own."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # a path of pytest's is too long for a socket's name
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def cluster():
    """Three nodes: the driver's, without a core, and two with one each."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            made.add_node(num_cpus=1)
        yield made
    finally:
        made.shutdown()


@contextlib.contextmanager
def grid(*words: object, cwd: Path, **env: str):
    """The script, started with SIGINT ignored as a shell's "&" does, and what it has said so far."""
    command = ["bash", "-c", 'trap "" INT; exec "$@"', "ignoring"]
    command += [sys.executable, str(ROOT / SCRIPT), *map(str, words)]
    with open(cwd / "out", "w") as out:
        process = subprocess.Popen(command, cwd=cwd, env=os.environ | env, stdout=out, stderr=out)
    try:
        yield process, (cwd / "out").read_text
    finally:
        process.kill()
        process.wait()


def timeless(value):
    """A record without what no two runs have alike."""
    other = re.compile("started|finished|training|cost|peak_memory_gib|.*seconds|.*_per_second")
    if isinstance(value, dict):
        return {name: timeless(inner) for name, inner in value.items() if not other.fullmatch(name)}
    return value


def left_in(folder: Path) -> dict[str, object]:
    """Every file of the runs, records without their times."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return {
        name: timeless(json.loads(content)) if name.endswith(".json") else content
        for name, content in found.items()
    }


def ended(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def test_a_node_dies_and_every_cell_is_there_once_as_the_loop_by_itself_leaves_it(tmp_path):
    env, plain = CELLS | launcher(tmp_path, HANG), tmp_path / "plain"
    plain.mkdir()
    (tmp_path / "sitecustomize.py").write_text(SEEN_BY_A_WORKER)
    env["PYTHONPATH"] = str(tmp_path)
    with cluster() as made, grid("--address", made.address, *LOOP, cwd=tmp_path, **env) as (process, said):
        until(lambda: (tmp_path / "hung").exists() or process.poll() is not None)
        pid, raylet = map(int, (tmp_path / "hung").read_text().split())
        second = run_script(SCRIPT, *LOOP, cwd=tmp_path, env=CELLS)
        assert "runs is in use by another run: wait for it, or use another --output_dir" in error_line(second)
        [node] = [n for n in made.worker_nodes if n.all_processes["raylet"][0].process.pid == raylet]
        made.remove_node(node, allow_graceful=False)
        assert process.wait(120) == 0, said()
    assert ended(pid)
    assert (tmp_path / "seen by a worker").exists()  # what PYTHONPATH names, which may be where Ray itself is
    states = re.findall(r"^cells (\d) +(\w+) +[\d.]+ s  \S+/\w{6}$", said(), re.M)
    assert sorted(states) == [(number, "finished") for number in "1234"]
    sequential = [str(LOOP[0]), *map(str, LOOP[1:])]
    subprocess.run(sequential, cwd=plain, env=units.environment(CELLS), capture_output=True, check=True)
    alone = left_in(plain / "runs")
    assert left_in(tmp_path / "runs") == alone
    assert sum(name.endswith("eval.json") for name in alone) == 4
    [counted] = re.findall(r"^\| 100 % .*$", said(), re.M)
    assert "(2)" in counted
    assert not (tmp_path / "runs" / ".ray_grid").exists()


def test_an_interrupted_grid_ends_what_it_runs_and_goes_on_when_started_again(tmp_path):
    env = CELLS | {"FRACTIONS": "0.25"}
    with grid("--cpus_per_cell", "1", *LOOP, cwd=tmp_path, **env | launcher(tmp_path, HANG)) as (
        process,
        said,
    ):
        until(lambda: (tmp_path / "hung").exists() or process.poll() is not None)
        until(lambda: "cells 1 " in said())
        process.send_signal(signal.SIGINT)
        assert process.wait(on_node.PATIENCE) == 130, said()
    assert ended(int((tmp_path / "hung").read_text().split()[0]))
    assert said().splitlines()[-1] == "interrupted: start it again and it goes on"
    assert [path.parent.name.split("_")[1] for path in tmp_path.glob("runs/*/eval.json")] == ["seed-1"]
    done = run_script(SCRIPT, *LOOP, cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^cells (\d) +(\w+)", done.stdout, re.M) == [("2", "finished")]


def test_a_cell_that_fails_is_named_with_its_reason_stops_no_other_and_is_not_run_again(tmp_path):
    body = f'case $* in *"fraction 0.5"*) echo "error: no such luck" >&2; exit 7 ;; esac\n{FINISH}'
    env = launcher(tmp_path, body) | {"FRACTIONS": "0.5 1.0"}
    done = run_script(SCRIPT, ROOT / "sample_ablate.sh", "--output_dir", "runs", cwd=tmp_path, env=env)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: 1 of 2 units failed:", "  cells 1: no such luck (exit 1)"]
    assert re.findall(r"^cells (\d) +(\w+)", done.stdout, re.M) == [("1", "failed"), ("2", "finished")]
    assert "ONLY=0: of 2 other cells 1 are not finished" in done.stdout
    assert len((tmp_path / "calls").read_text().splitlines()) == 3
    assert "| failed" in done.stdout


# Units, without Ray


def units_of(script: str, folder: Path, **env: str) -> list[str]:
    cells, status, errors = units.list_cells(str(ROOT / script), ["--output_dir", "runs"], env, str(folder))
    assert (status, errors) == (0, "")
    return [unit.only for unit in units.units_of(cells)]


@pytest.mark.parametrize(
    ("script", "env", "expected"),
    [
        ("run_lora.sh", {"RANKS": "2 4", "EPOCHS": "1 2", "DROPOUTS": "0.1"}, ["1-2", "3-4"]),
        ("run_lora.sh", {"RANKS": "2 4", "EPOCHS": "1", "DROPOUTS": "0.1"}, ["1", "2"]),
        ("sample_ablate.sh", {"FRACTIONS": "0.5 1.0 0.5"}, ["1", "2"]),
        ("baseline_inference.sh", {"MODELS": "a/b c/d"}, ["1-4", "5-8"]),
        (
            "compare_models.sh",
            {"MODELS": "tfidf-nb causal=a/b", "FRACTIONS": "0.5 1.0"},
            ["1", "2", "3", "4"],
        ),
    ],
)
def test_a_unit_is_a_row_of_one_training_or_what_shares_a_loading_or_a_cell(tmp_path, script, env, expected):
    assert units_of(script, tmp_path, **env) == expected


def test_a_node_is_told_every_variable_that_a_loop_goes_through():
    text = "".join(
        (ROOT / name).read_text()
        for name in (
            "run_lora.sh",
            "sample_ablate.sh",
            "baseline_inference.sh",
            "compare_models.sh",
            "study/loop.sh",
        )
    )
    assert {*re.findall(r"\$\{([A-Z_]+):-", text)} - {"ONLY"} == {*units.VARIABLES.split()}


def test_the_estimate_of_a_unit_is_the_sum_of_its_cells_and_unknown_where_one_is():
    line = "4\tnot started\truns/a b\t12.5\t?"
    cell = Cell.read(line)
    assert (cell, str(cell)) == (Cell(4, "not started", "runs/a b", Sum(12.5, None)), line)
    known = Cell(1, "trained", "b", Sum(1.0, 2.0))
    assert Unit(1, [cell, known]).left == (13.5, None)
    assert Unit(1, [known, known]).left == (2.0, 4.0)


# Budgets


def test_units_begin_while_what_runs_and_what_is_spent_leaves_room_for_them():
    budget = Budget(hours=1.0, usd=10.0)
    budget.spent = Sum(600.0, 1.0)
    assert budget.admits(Sum(3000.0, 9.0), [])
    assert not budget.admits(Sum(3001.0, 9.0), [])
    assert not budget.admits(Sum(3000.0, 9.1), [])
    assert budget.admits(Sum(1000.0, 3.0), [Sum(2000.0, 6.0)])
    assert not budget.admits(Sum(1001.0, 3.0), [Sum(2000.0, 6.0)])
    assert budget.flags([Sum(1200.0, 4.0)]) == ["--budget_hours", "0.500000", "--budget_usd", "5.000000"]
    assert budget.flags([Sum(9000.0, 4.0)]) == ["--budget_hours", "0.000000", "--budget_usd", "5.000000"]


def test_what_a_unit_has_taken_beyond_its_estimate_is_reserved_for_others():
    budget = Budget(hours=1.0, usd=36.0)
    budget.spend(Sum(100.0, 1.0), 400.0, 36.0)
    assert (budget.spent, budget.beyond) == ((400.0, 4.0), 300.0)
    assert budget.admits(Sum(1300.0, 13.0), [Sum(1300.0, 13.0)])
    assert not budget.admits(Sum(1301.0, 13.0), [Sum(1300.0, 13.0)])
    assert not budget.admits(Sum(1300.0, 13.1), [Sum(1300.0, 13.0)])
    budget.spend(Sum(None, None), 900.0, None)
    assert (budget.spent, budget.beyond) == ((1300.0, 4.0), 300.0)


def test_a_unit_that_nobody_can_estimate_runs_alone():
    budget, unknown = Budget(hours=1.0, usd=None), Sum(None, None)
    assert budget.admits(unknown, [])
    assert not budget.admits(unknown, [Sum(1.0, None)])
    assert not budget.admits(Sum(1.0, None), [unknown])
    assert budget.admits(Sum(1.0, None), [Sum(1.0, None)])  # no limit is on what is unknown of these
    assert Budget(None, None).admits(unknown, [unknown])
    assert Budget(None, None).flags([unknown]) == []


# Nodes, in place of Ray's


class Nodes(SimpleNamespace):
    """As much of Ray as asks nodes; `answers` has each host's clock, in seconds ahead, and what it lacks."""

    exceptions = SimpleNamespace(RayError=KeyError)

    def nodes(self) -> list[dict]:
        about = {"Alive": True, "Resources": {"CPU": 4.0}}
        return [
            about | {"NodeManagerHostname": host, "NodeID": host.encode().hex().ljust(56, "0")}
            for host in self.answers
        ]

    def remote(self, function):
        asked = lambda scheduling_strategy, **_: SimpleNamespace(remote=lambda _: scheduling_strategy.node_id)
        return SimpleNamespace(options=asked)

    def get(self, node_id: str, timeout: float) -> tuple:
        host = bytes.fromhex(node_id).rstrip(b"\0").decode()
        ahead, lacks = self.answers[host]
        return lacks, time.time() + ahead, True


def looked_at(folder: Path, cpus: float = 1, **answers: tuple[float, str]) -> Grid:
    made = Grid(Nodes(answers=answers), job(folder), Budget(None, None), cpus, io.StringIO())
    made.look_at_nodes()
    return made


def said_of(made: Grid) -> list[str]:
    return re.sub(r"/\w{6}", "", made.out.getvalue()).splitlines()


def test_nodes_whose_clock_is_another_and_that_lack_something_are_named_once(tmp_path):
    made = looked_at(tmp_path, good=(0.0, ""), fast=(100.4, ""), slow=(-7.2, ""), bare=(1.0, "it lacks x"))
    first = [
        "clock      that of fast is 100 s ahead",
        "clock      that of slow is 7 s behind",
        "node       bare is left out: it lacks x",
    ]
    assert sorted(said_of(made)) == first
    made.look_at_nodes()
    assert sorted(said_of(made)) == first
    del made.ray.answers["fast"]
    made.look_at_nodes()
    assert said_of(made)[3:] == ["node       fast has gone; what it did is done again elsewhere"]


def test_where_no_node_can_that_is_told_with_the_reasons(tmp_path):
    with pytest.raises(UserError, match=r"no node is left that can do cells \(bare/\w+: it lacks x\)"):
        looked_at(tmp_path, bare=(0.0, "it lacks x"))
    with pytest.raises(UserError, match="no node that is left has 0 GPUs and 5 CPUs, which a cell takes"):
        looked_at(tmp_path, cpus=5, good=(0.0, ""))


# What a node does, without Ray


def job(folder: Path, **other: object) -> Job:
    loop, *flags = map(str, LOOP)
    cells = CELLS | {"FRACTIONS": "0.25", "SEEDS": "1"}
    plain = Job(
        loop, flags, cells, str(folder), [], on_node.code_of(), ("runs/.ray_grid", "here"), 0, (None, 3.6)
    )
    return plain._replace(**other)


@pytest.fixture
def node(monkeypatch):
    monkeypatch.setattr(on_node, "here", lambda: ("node", "id"))


def test_units_that_share_a_gpu_are_told_their_share(monkeypatch):
    """And so are the dry runs that estimate them."""
    monkeypatch.delenv("GPU_SHARE", raising=False)
    monkeypatch.setenv("SEEDS", "1 2")
    env = units.environment(ray_grid.variables_of(0.25))
    assert (env["GPU_SHARE"], env["SEEDS"]) == ("0.25", "1 2")
    for gpus in (None, 0, 1, 2):
        assert "GPU_SHARE" not in ray_grid.variables_of(gpus)
    monkeypatch.setenv("GPU_SHARE", "0.5")
    assert [ray_grid.variables_of(gpus)["GPU_SHARE"] for gpus in (0.25, 1)] == ["0.25", "0.5"]


def test_a_unit_is_told_the_share_and_its_price_is_that_share(tmp_path, node, monkeypatch):
    loop = tmp_path / "loop.sh"
    loop.write_text('#!/bin/sh\necho "share $GPU_SHARE of cells $ONLY"\n')
    loop.chmod(0o755)
    (tmp_path / "here").write_text("token")
    whole = Job(str(loop), [], {}, str(tmp_path), [], on_node.code_of(), ("here", "token"), 0, (None, 3.6))
    shared = whole._replace(variables={"GPU_SHARE": "0.25"})
    monkeypatch.delenv("GPU_SHARE", raising=False)
    for gpu, job, said, price in (
        ("NVIDIA L4", whole, "share  of cells 3-8", 3.6),
        ("NVIDIA L4", shared, "share 0.25 of cells 3-8", 0.9),
        (None, shared, "share 0.25 of cells 3-8", 3.6),  # a processor's price is whole
    ):
        monkeypatch.setattr(on_node.device, "gpu_name", lambda name=gpu: name)
        outcome = on_node.run_unit(job, "3-8", [], [], {})
        assert outcome.status == 0
        assert said in outcome.said
        assert outcome.usd_per_hour == pytest.approx(price)


def test_where_the_folder_is_not_shared_a_run_is_brought_back_and_none_is_overwritten(tmp_path, node):
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    [cell] = units.list_cells(str(LOOP[0]), [*map(str, LOOP[1:])], job(there).variables, str(here))[0]
    outcome = on_node.run_unit(job(there), "1", [], [cell.folder], {})
    assert (outcome.refused, outcome.status, outcome.usd_per_hour) == ("", 0, 3.6), outcome.said
    assert {Path(path).name for path in outcome.left} == {"train.json", "eval.json", "predictions.jsonl"}
    assert carry.unpack(outcome.left, here) == []
    assert left_in(here / "runs") == left_in(there / "runs")
    assert carry.pack([cell.folder], here) == outcome.left
    other = {path: content.replace(b"qlora", b"") + b" " for path, content in outcome.left.items()}
    assert carry.unpack(other, here) == [cell.folder]
    assert carry.pack([cell.folder], here) == outcome.left
    shared = here / "runs" / ".ray_grid"
    shared.write_text("here")
    assert on_node.run_unit(job(here), "1", [], [cell.folder], {}).left is None


def test_records_are_written_last(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(carry, "write_bytes", lambda path, content: order.append(path.name))
    names = (
        "runs/a/eval.json",
        "runs/a/train.json",
        "runs/a/adapter/adapter_config.json",
        "runs/a/predictions.jsonl",
    )
    carry.unpack(dict.fromkeys(names, b"{}"), tmp_path)
    assert {*order[-2:]} == {"eval.json", "train.json"}


def test_a_node_with_other_code_or_without_the_data_or_a_gpu_is_refused_with_the_reason(
    tmp_path, node, monkeypatch
):
    commit, content = on_node.code_of()
    refused = lambda **other: on_node.run_unit(job(tmp_path, **other), "1", [], [], {}).refused
    assert f"its code is of commit {commit}, not 12ab:" in refused(code=("12ab", content))
    assert "its code was changed since commit" in refused(code=(commit, "other"))
    assert "it lacks none.jsonl, no/model: copy" in refused(paths=["none.jsonl", "no/model", "."])
    assert f"it lacks {tmp_path}/gone: copy" in refused(cwd=str(tmp_path / "gone"))
    assert "Ray counts a GPU there, and none can be used" in refused(gpus=1)
    assert not list(tmp_path.iterdir())


def test_what_the_flags_name_is_looked_for_and_what_runs_leave_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs", "model", "t5", "4"):
        (tmp_path / name).mkdir()
    write_rows(tmp_path / "a b.jsonl", [])
    words = [
        "--train_file",
        "a b.jsonl",
        "--test_file=model",
        "--epochs",
        "4",
        "--output_dir",
        "runs",
        "bert t5=t5",
    ]
    assert ray_grid.paths_in(words, "runs/") == ["a b.jsonl", "model", "t5"]


def test_a_loop_ends_with_the_worker_that_has_started_it(tmp_path):
    program = (
        "import os, sys; from scale import on_node; "
        "on_node.run_loop(['bash', '-c', 'echo $$ >pid; sleep 600; true'], sys.argv[1], dict(os.environ))"
    )
    worker = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT)
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    worker.kill()
    worker.wait()
    until(lambda: ended(int((tmp_path / "pid").read_text())))


def test_exit_status_and_last_words_of_a_loop_are_told(tmp_path):
    body = (
        "printf 'error: %s\\n' '--train_file x: there is none' '1 of 2 cells failed:' >&2; echo '  y'; exit 3"
    )
    status, said = on_node.run_loop(["bash", "-c", body], str(tmp_path), dict(os.environ))
    assert status == 3
    assert last_words(Outcome("n", "i", "", status, said)) == "--train_file x: there is none (exit 3)"
    assert last_words(Outcome("n", "i", "", -9, "")) == "it said nothing (exit -9)"


# Bad input


def test_no_cluster_no_ray_no_loop_and_wrong_flags_are_told_in_one_line(tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError")
    run = lambda *words, **env: run_script(SCRIPT, *words, cwd=tmp_path, env=CELLS | env)
    absent = run(*LOOP, PYTHONPATH=str(tmp_path))
    assert "Ray is not installed: pip install -r requirements-scale.txt" in error_line(absent)
    assert "--address 127.0.0.1:1: there is no Ray cluster" in error_line(
        run("--address", "127.0.0.1:1", *LOOP)
    )
    assert "run_lora.py is none of the loops" in error_line(run("run_lora.py", "--force"))
    assert "ONLY=3 is for a loop by itself: unset it" in error_line(run(*LOOP, ONLY="3"))
    assert "--budget_hours: two: it takes a number" in error_line(run(*LOOP, "--budget_hours", "two"))
    assert "unrecognized arguments: --no_such_flag" in error_line(run(*LOOP, "--no_such_flag"))
    assert not list(tmp_path.glob("runs/[!.]*"))


def test_a_dry_run_is_the_loops_own(tmp_path):
    done = run_script(SCRIPT, *LOOP, "--dry-run", cwd=tmp_path, env=CELLS)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("not started  runs/") == 4
    assert not (tmp_path / "runs").exists()


def test_a_finished_grid_starts_no_ray_and_prints_the_table(tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError")
    env = launcher(tmp_path, FINISH) | {"FRACTIONS": "0.5", "PYTHONPATH": str(tmp_path)}
    words = (ROOT / "sample_ablate.sh", "--output_dir", "runs")
    subprocess.run(map(str, words), cwd=tmp_path, env=units.environment(env), capture_output=True, check=True)
    done = run_script(SCRIPT, *words, cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "| 50 %" in done.stdout
    assert record.status(next(tmp_path.glob("runs/*/eval.json"))) == "finished"
