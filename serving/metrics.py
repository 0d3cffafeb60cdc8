"""What /metrics shows, for Prometheus. Of several workers with PROMETHEUS_MULTIPROC_DIR set it is of all."""

import asyncio
import os
import time
from pathlib import Path

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

PATHS = {"/v1/completions", "/v1/classify", "/v1/summarize", "/v1/models", "/health", "/metrics"}
SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
REQUESTS = Counter("requests_total", "HTTP requests", ["path", "status"])
LATENCY = Histogram("request_seconds", "From a request to the end of its answer", ["path"], buckets=SECONDS)
FIRST = Histogram("first_token_seconds", "From a request to its first token", buckets=SECONDS)
READ = Counter("prompt_tokens_total", "Tokens of prompts that were answered")
WRITTEN = Counter("generated_tokens_total", "Tokens of answers")
QUEUED = Gauge("requests_queued", "Requests that wait", multiprocess_mode="livesum")
AT_WORK = Gauge("requests_at_work", "Requests that the model is at", multiprocess_mode="livesum")


def counted(path: str, status: int, seconds: float) -> None:
    path = path if path in PATHS else "other"
    REQUESTS.labels(path, status).inc()
    LATENCY.labels(path).observe(seconds)


def answered(request) -> None:
    """Of a request to the engine."""
    FIRST.observe((request.first or time.monotonic()) - request.came)
    READ.inc(len(request.tokens))
    WRITTEN.inc(len(request.answer))


async def keep_looking(engine) -> None:
    """So that what another worker shows of this one is not of old."""
    while True:
        look(engine)
        await asyncio.sleep(1)


def look(engine) -> None:
    QUEUED.set(engine.queued)
    AT_WORK.set(len(engine.at_work))


def forget_killed(folder: Path) -> None:
    """Workers that are no more have nothing at work."""
    for path in folder.glob("gauge_live*.db"):
        pid = int(path.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            multiprocess.mark_process_dead(pid)


def shown(engine) -> tuple[bytes, str]:
    """The text and its type."""
    look(engine)
    registry, folder = REGISTRY, os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if folder:
        forget_killed(Path(folder))
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
    return generate_latest(registry), CONTENT_TYPE_LATEST
