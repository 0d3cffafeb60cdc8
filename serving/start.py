"""From flags to a service that answers."""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from serving import engine as engines
from serving import served
from serving.app import Limits, Service
from study import device
from study.errors import UserError, is_out_of_memory

SWITCH = 0.0001  # seconds after which threads give way: the engine's must launch the next step in time


async def service(
    args: argparse.Namespace, limits: Limits, share: float, gave_up: Callable[[], None]
) -> Service:
    """The service of RUN, once it has answered a first request, within `share` of the GPU's memory. Raises
    UserError."""
    sys.setswitchinterval(SWITCH)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises on optional CPU kernels
    try:
        loaded = served.load(Path(args.run), args.served_model_name, args.merge)
        backend = backend_of(loaded, share, args.max_batch)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{args.run}: the GPU has too little memory for it: stop what else is there, or --merge off"
        ) from None
    made = Service(loaded, engines.Engine(backend, limits.max_queue, gave_up), limits)
    first = engines.Request(loaded.prompt("Hello")[0], 2, seconds=600)
    made.engine.submit([first])
    await first.done
    if first.finish not in {"stop", "length"}:
        raise UserError(f"{args.run}: the model does not answer here")
    device.pass_over_libraries()
    print(f"ready      {args.served_model_name} answers", flush=True)
    return made


def backend_of(loaded: served.Served, share: float, most: int | None) -> engines.Backend:
    """The fast path where it has proven itself, else `generate`; for at most so many requests at once."""
    if loaded.slow:
        return engines.Plain(loaded.model, loaded.ends, loaded.allowed, most or engines.BATCH)
    memory = 0.92 * device.free_memory() * share
    shape = loaded.prefix, loaded.longest, loaded.ends, loaded.allowed
    return engines.Fused(loaded.model, memory, *shape, most)
