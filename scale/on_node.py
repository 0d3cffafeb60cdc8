"""What a node of the cluster does for scale/ray_grid.py: it says whether it can do cells, and does them."""

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from scale import carry, units
from scale.cluster import ROOT
from study import device
from study.errors import UserError
from study.records import cost, record

# The loop and all that it starts end with the process at the other end of this stdin, however that ends: what
# outlived a dead worker would hold the folder that the next attempt needs.
WATCH = 'exec 3<&0; "$@" </dev/null 3<&- & loop=$!; (cat >/dev/null; kill -KILL 0) <&3 & wait "$loop"'
PATIENCE = 20  # seconds that a loop has to record that it was interrupted


class Job(NamedTuple):
    """What is the same for all units of a grid."""

    loop: str
    flags: list[str]
    variables: dict[str, str]
    cwd: str
    paths: list[str]  # what flags and variables name, where the driver has it
    code: tuple[str | None, str]
    token: tuple[str, str]  # a file in --output_dir and its content, for who shares the folder
    gpus: float
    price: tuple[str | None, float | None]  # --gpu_name, --price_per_hour


class Outcome(NamedTuple):
    """What has come of a unit on a node."""

    node: str
    node_id: str
    refused: str = ""  # why this node can't do it
    status: int = 0
    said: str = ""  # the end of what the loop has said
    seconds: float = 0.0
    usd_per_hour: float | None = None
    left: dict[str, bytes] | None = None  # files by path; None where the folder is shared


def code_of(root: Path = ROOT) -> tuple[str | None, str]:
    """The commit of the code here, and the SHA-256 of what can change a number: two trees that were changed
    since may say the same commit."""
    files = [*root.glob("*.py"), *root.glob("*.sh")]
    for folder in ("study", "competitors", "scale"):
        files += [path for path in (root / folder).rglob("*") if path.suffix in {".py", ".sh", ".json"}]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(root)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return record.commit(), digest.hexdigest()


def here() -> tuple[str, str]:
    """This node's name for a person, and its id in Ray."""
    import ray

    node_id = ray.get_runtime_context().get_node_id()
    return f"{socket.gethostname()}/{node_id[:6]}", node_id


def look(job: Job) -> tuple[str, float, bool]:
    """Why this node can't do cells ("" if it can), its clock, and whether it shares the folder."""
    return why_not(job), time.time(), shares(job)


def why_not(job: Job) -> str:
    commit, content = code_of()
    if commit != job.code[0]:
        return f"its code is of commit {commit}, not {job.code[0]}: check that out there"
    if content != job.code[1]:
        return f"its code was changed since commit {commit}, or here: copy the folder there again"
    lacking = [path for path in (job.cwd, *job.paths) if not Path(job.cwd, path).exists()]
    if lacking:
        return f"it lacks {', '.join(lacking)}: copy that there, to the same path"
    return ""


def shares(job: Job) -> bool:
    """Whether the driver's --output_dir is the folder that has its name here."""
    with contextlib.suppress(OSError):
        return Path(job.cwd, job.token[0]).read_text("utf-8") == job.token[1]
    return False


def run_unit(job: Job, only: str, budget: list[str], folders: list[str], sent: dict[str, bytes]) -> Outcome:
    """Do the cells `only` within the rest of a budget. Where the folder is not shared, with what the driver
    has `sent` of their runs, and what they leave is in the outcome."""
    # Ignored, as it is below a shell's "&", Ray can't cancel.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    name, node_id = here()
    refused, shared, began = why_not(job), shares(job), time.monotonic()
    if refused or no_gpu(job):
        return Outcome(name, node_id, refused or no_gpu(job))
    if not shared:
        carry.unpack(sent, Path(job.cwd))
    wait_for_locks([Path(job.cwd, folder) for folder in folders])
    env = units.environment(job.variables) | {"ONLY": only}
    status, said = run_loop([job.loop, *job.flags, *budget], job.cwd, env)
    if status and no_gpu(job):
        return Outcome(name, node_id, no_gpu(job))
    share = float(job.variables.get("GPU_SHARE", 1)) if device.gpu_name() else 1.0
    price = cost.price(job.price[0] or device.name(), job.price[1], share=share)["price_per_hour"]
    left = None if shared else carry.pack(folders, Path(job.cwd))
    return Outcome(name, node_id, "", status, said, time.monotonic() - began, price, left)


def no_gpu(job: Job) -> str:
    """Why no GPU can be used where one should be. Asked in a process of its own: a driver that has begun to
    answer a process goes on to."""
    if not job.gpus:
        return ""
    ask = "import sys; from study import device; sys.exit(not device.gpu_name())"
    done = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, check=False, capture_output=True)
    return "Ray counts a GPU there, and none can be used: look at nvidia-smi there" if done.returncode else ""


def wait_for_locks(folders: list[Path], seconds: float = 60) -> None:
    """Until an attempt whose node or worker has died, and which is ending, holds no folder; the loop says so
    of one that is held on."""
    process, until = device.Process("ray_grid.py"), time.monotonic() + seconds
    for folder in filter(Path.is_dir, folders):
        while is_held(folder, process) and time.monotonic() < until:
            time.sleep(0.5)


def is_held(folder: Path, process: device.Process) -> bool:
    """Whether another process holds the lock of a folder, on whichever machine."""
    try:
        with contextlib.redirect_stdout(None), record.locked(folder, process):
            return False
    except UserError:
        return True


def run_loop(command: list[str], cwd: str, env: dict[str, str]) -> tuple[int, str]:
    """Exit status of a loop, and the end of what it says. An interrupt here ends all that it has started."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            ["bash", "-c", WATCH, "watch", *command],
            cwd=cwd,
            env=env,
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while process.poll() is None:  # and no wait(), which Ray's interrupt would not end
                time.sleep(0.1)
        finally:
            end_group(process)
        said.seek(max(0, said.tell() - 20000))
        return process.returncode, said.read().decode("utf-8", "replace")


def end_group(process: subprocess.Popen) -> None:
    """SIGTERM to a group that goes on, which scripts take as an interrupt, and SIGKILL to what is left."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and going_on(process.pid):
            time.sleep(0.1)
    process.stdin.close()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def going_on(group: int) -> bool:
    """Whether a process of a group is left that has not ended."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = path.read_text("utf-8", "replace").rpartition(")")[2].split()[:3]
            if state != "Z" and int(its_group) == group:
                return True
    return False
