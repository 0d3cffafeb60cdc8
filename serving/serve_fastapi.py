"""Serve a fine-tuned model over HTTP by FastAPI and uvicorn.

    python serving/serve_fastapi.py RUN [--workers 2 --port 8000 --api_key_file KEY]
    curl http://127.0.0.1:8000/v1/classify -d '{"text": "The puck hit the post."}'

RUN is a finished run or an export of one (serving/export.py). One worker answers many requests at once; each
further one is a process with the model in its memory again. SIGTERM or Ctrl-C: no new requests, those under
way are answered, exit 0.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from study import cli, device
from study.errors import UserError

FLAGS = "SERVE_FLAGS"  # a worker's, as JSON in its environment


def main(process: device.Process) -> None:
    from serving import serve_flags

    parser = serve_flags.parser(__doc__)
    parser.add_argument(
        "--workers", type=cli.positive_int, default=1, metavar="N", help="processes, each with a model (1)"
    )
    args = serve_flags.checked(parser.parse_args([cli.underscored(word) for word in sys.argv[1:]]))
    serve_flags.warn_of_strangers(args)
    os.environ[FLAGS] = json.dumps(vars(args))
    with contextlib.ExitStack() as stack:
        if args.workers > 1:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = stack.enter_context(tempfile.TemporaryDirectory())
        run(args)


def run(args: argparse.Namespace) -> None:
    """Serve until a signal comes. Raises UserError where that can't begin."""
    import uvicorn

    from serving import serve_flags
    from serving.protocol import Workers

    config = configured("serving.serve_fastapi:app", args)
    socket = serve_flags.bound(args.host, args.port)
    print(f"listening  http://{args.host}:{socket.getsockname()[1]} as {args.served_model_name}", flush=True)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: None)  # uvicorn raises it again once it has stopped
    if args.workers > 1:
        workers = Workers(config, [socket])
        workers.run()
        good = not workers.failed
    else:
        server = uvicorn.Server(config)
        try:
            server.run([socket])
        except OSError as error:  # of another server that began at the same time
            raise serve_flags.not_to_be_had(args.host, args.port, error) from None
        good = server.started
    if not good:
        sys.exit(1)


def configured(app, args: argparse.Namespace):
    """uvicorn's settings. `app` makes the app, or is the name of what does."""
    import uvicorn

    return uvicorn.Config(
        app,
        factory=True,
        http="serving.protocol:BoundedHead",
        host=args.host,
        port=args.port,
        workers=args.workers,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(args.deadline_seconds) + 30,
        server_header=False,
    )


def app():
    """For uvicorn, in each worker: the app of the flags that `main` has left."""
    from serving import app as apps
    from serving import serve_flags

    args = argparse.Namespace(**json.loads(os.environ[FLAGS]))
    limits = serve_flags.limits_of(args)
    return apps.build(lambda: started(args, limits), limits)


@contextlib.asynccontextmanager
async def started(args: argparse.Namespace, limits) -> AsyncIterator:
    """The service, from loading on until all is answered."""
    from uvicorn.config import STARTUP_FAILURE

    from serving import start

    try:
        made = await start.service(args, limits, share=1 / args.workers, gave_up=lambda: failed(args))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(STARTUP_FAILURE if args.workers > 1 else 1)  # uvicorn would show a traceback
    yield made
    await made.engine.stop()


def failed(args: argparse.Namespace) -> None:
    """The engine keeps failing: nothing is gained by going on in this process."""
    from serving.protocol import GAVE_UP

    what = "this worker is replaced" if args.workers > 1 else "the server stops"
    print(f"error: the model keeps failing: {what}", file=sys.stderr, flush=True)
    os._exit(GAVE_UP if args.workers > 1 else 1)


if __name__ == "__main__":
    cli.run_script(main)
