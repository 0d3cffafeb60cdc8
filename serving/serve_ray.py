"""Serve a fine-tuned model over HTTP by Ray Serve: replicas on one machine or on many.

    python serving/serve_ray.py RUN [--replicas 2 --port 8000]
    python serving/serve_ray.py RUN --address auto --replicas 2 --max_replicas 8  # on a cluster, by load

RUN is a finished run or an export of one (serving/export.py). Without --address Ray is started here and ends
with this script; on a cluster every node needs this folder, RUN and its checkpoint at the same paths. SIGTERM
or Ctrl-C: no new requests, those under way are answered, exit 0.
"""

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scale import cluster
from study import cli, device
from study.errors import UserError

APP = "fine-tuned-model"
MARK = "can't serve:"
STORE = 100 * 2**20  # bytes of Ray's object store: nothing large goes through it
SLACK = 60  # seconds in which Ray ends replicas whose grace is over


def main(process: device.Process) -> None:
    from serving import serve_flags

    args = serve_flags.checked(parse(serve_flags.parser(__doc__)))
    serve_flags.warn_of_strangers(args)
    args.run = str(Path(args.run).resolve())
    if args.gpus_per_replica is None:
        args.gpus_per_replica = 1.0 if args.address or device.gpu_name() else 0.0
    stopped = threading.Event()
    if not args.address:
        # Of a port that is taken Ray would say at length what else can be the matter.
        serve_flags.bound(args.host, args.port).close()
    with ray_serve(args) as serve:
        for signum in (signal.SIGTERM, signal.SIGINT):  # Ray has set its own, which abort
            signal.signal(signum, lambda *_: stopped.set())
        start(serve, args)
        print(f"ready      http://{args.host}:{args.port} as {args.served_model_name}", flush=True)
        stopped.wait()
        print("stopping   once all is answered", flush=True)
        end(serve, grace_of(args.deadline_seconds) + SLACK)


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    add = parser.add_argument_group("replicas").add_argument
    add("--replicas", type=cli.positive_int, default=1, metavar="N", help="of the model; the least (1)")
    add("--max_replicas", type=cli.positive_int, metavar="N", help="scale up to so many by load (--replicas)")
    add("--gpus_per_replica", type=share, metavar="X", help="1, a part of one, or 0 (1 where there is one)")
    add("--address", metavar="HOST:PORT", help='of a Ray cluster, or "auto" (Ray is started here)')
    args = parser.parse_args([cli.underscored(word) for word in sys.argv[1:]])
    args.max_replicas = args.max_replicas or args.replicas
    if args.max_replicas < args.replicas:
        parser.error(f"--max_replicas {args.max_replicas} is below --replicas {args.replicas}")
    return args


def share(word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = -1
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{word} is not between 0 and 1")
    return number


@contextlib.contextmanager
def ray_serve(args: argparse.Namespace) -> Iterator:
    """Ray Serve, on the cluster at --address or on one started here. Raises UserError where there is none."""
    with cluster.joined(args.address, STORE, "requirements-serving.txt"):
        try:
            from ray import serve
        except ImportError:
            raise UserError("Ray Serve is not installed: pip install -r requirements-serving.txt") from None
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        try:
            serve.start(
                http_options={"host": args.host, "port": args.port}, logging_config={"log_level": "ERROR"}
            )
        except RuntimeError as error:  # the port was taken since, maybe by Ray itself; it quotes a traceback
            reason = str(error).strip().splitlines()[-1]
            raise UserError(
                f"--host {args.host} --port {args.port}: Ray can't listen there: {reason}"
            ) from None
        yield serve  # serve.shutdown() would wait 30 s for a controller that it has killed


def start(serve, args: argparse.Namespace) -> None:
    """Deploy, and wait until the replicas answer. Raises UserError."""
    from serving import serve_flags

    limits = serve_flags.limits_of(args)  # with the key, which other nodes have no file of
    scaling = {"num_replicas": args.replicas}
    if args.max_replicas > args.replicas:
        target = {"min_replicas": args.replicas, "max_replicas": args.max_replicas}
        scaling = {"autoscaling_config": target | {"target_ongoing_requests": limits.max_queue / 4}}
    deployed = serve.deployment(
        **scaling,
        ray_actor_options={"num_cpus": 1, "num_gpus": args.gpus_per_replica},
        max_ongoing_requests=2 * limits.max_queue,  # the engine itself says when it is too many
        graceful_shutdown_timeout_s=grace_of(limits.deadline_seconds),
        health_check_period_s=5,
        max_constructor_retry_count=1,
    )(serve.ingress()(Replica))
    try:
        serve.run(deployed.bind(args, limits), name=APP, route_prefix="/")
    except RuntimeError:
        deployments = serve.status().applications[APP].deployments.values()
        raise UserError(reason_of(" ".join(deployment.message for deployment in deployments))) from None


def grace_of(deadline_seconds: float) -> float:
    """The seconds in which a replica that is told to end answers what it has, before Ray kills it."""
    return deadline_seconds + 10


def end(serve, seconds: float) -> None:
    """Take no new requests, and return once those under way are answered and the replicas are gone. (A
    serve.delete() that waits gives up after 60 s.) Raises UserError after `seconds`."""
    serve.delete(APP, _blocking=False)
    until = time.monotonic() + seconds
    while APP in serve.status().applications:
        if time.monotonic() > until:
            raise UserError(f"Ray has not ended the replicas within {seconds:.0f} s")
        time.sleep(0.1)


def reason_of(said: str) -> str:
    """What a replica came to, out of the traceback that Ray quotes."""
    lines = [line.split(MARK, 1)[1] for line in said.splitlines() if MARK in line]
    return lines[-1].strip() if lines else f"Ray could not start it: {' '.join(said.split())[-300:]}"


class Replica:
    """One replica: a service, and the app over it."""

    async def __init__(self, args: argparse.Namespace, limits):
        from serving import start

        self.limits, share = limits, args.gpus_per_replica or 1.0
        try:
            self.service = await start.service(args, limits, share, gave_up=lambda: os._exit(1))
        except UserError as error:
            raise RuntimeError(f"{MARK} {error}") from None

    def __serve_build_asgi_app__(self):
        from serving import app

        return app.build(self.started, self.limits)

    @contextlib.asynccontextmanager
    async def started(self) -> AsyncIterator:
        yield self.service
        await self.service.engine.stop()


if __name__ == "__main__":
    cli.run_script(main)
