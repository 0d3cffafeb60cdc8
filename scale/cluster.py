"""Ray, on a cluster that is there or on this machine."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from study.errors import UserError

ROOT = Path(__file__).resolve().parent.parent  # this folder, where a task finds its modules


@contextlib.contextmanager
def joined(address: str | None, store: int, requirements: str) -> Iterator:
    """The module ray, at the cluster of an address (HOST:PORT, or "auto"); without one, at a Ray that is
    started here with `store` bytes for its objects. Raises UserError where there is none."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 would leave them what others of this machine leave
    try:
        import ray
    except ImportError:
        raise UserError(f"Ray is not installed: pip install -r {requirements}") from None
    settings = {"address": address or "local", "log_to_driver": False, "logging_level": "error"}
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))  # where Ray itself may be
    settings["runtime_env"] = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
    if not address:
        settings |= {
            "include_dashboard": False,
            "object_store_memory": store,
            "_node_ip_address": "127.0.0.1",
        }
    try:
        refuse_silent(address or "local")
        ray.init(**settings)
    except (RuntimeError, ValueError, OSError, OverflowError) as error:
        what = (
            f"--address {address}: there is no Ray cluster to be had"
            if address
            else "Ray does not start here"
        )
        raise UserError(f"{what}: {' '.join(str(error).split())[:200]}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def refuse_silent(address: str) -> None:
    """Raise OSError, or OverflowError, where nothing listens at HOST:PORT: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit():  # not "auto" and the like
        socket.create_connection((host, int(port)), timeout=10).close()
