"""The engine of a server: one thread that answers what others ask, as soon as it has room for it.

On CUDA, with a model that the fast path knows, requests join and leave between steps
(study/fast/continuous.py). Elsewhere `generate` takes, whenever it is free, what waits then as one batch.
"""

import asyncio
import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from study import generation

FAILURES = 3  # turns that fail in a row until the engine gives up
BATCH = 16  # requests that `generate` takes at once
QUIET = 60.0  # seconds without a turn, though there is work, from which on the engine counts as stuck


class Overloaded(Exception):
    """Too many requests wait already."""


class Stopped(Exception):
    """The engine takes no more requests."""


@dataclass(eq=False)
class Request:
    """A prompt (token ids) and what has become of it. `answer` grows while it is at work, with the end of
    sequence; `finish`, which the engine's thread alone sets, says why it ends: stop, length, expired,
    abandoned or failed."""

    tokens: list[int]
    max_new_tokens: int
    constrained: bool = False  # the answer is one of the classes
    seconds: float = 60.0  # from now on, until which it is to be answered
    answer: list[int] = field(default_factory=list)
    confidence: float | None = None
    finish: str | None = None
    abandoned: bool = False  # nobody waits for it any more
    watched: bool = False  # somebody wants each token as it comes
    came: float = field(default_factory=time.monotonic)
    first: float | None = None  # when its first token came
    inner: object = None  # what the backend calls it

    def __post_init__(self) -> None:
        self.done = asyncio.get_running_loop().create_future()
        self.news = asyncio.Event()

    def given_up(self) -> str | None:
        """Why it is to end before it is whole, or None."""
        if self.abandoned:
            return "abandoned"
        return "expired" if time.monotonic() > self.came + self.seconds else None

    def whole(self, ends: Iterable[int]) -> str | None:
        """Why the answer ends with its last token, or None."""
        if self.answer and self.answer[-1] in ends:
            return "stop"
        return "length" if len(self.answer) >= self.max_new_tokens else None


class Backend(Protocol):
    """What computes answers."""

    busy: bool  # whether a turn would do anything

    def join(self, request: Request) -> bool:
        """Put a request to work; False where there is no room now."""

    def leave(self, request: Request) -> None:
        """Take one back that is at work."""

    def turn(self, tell: Callable[[list[Request]], None]) -> None:
        """Go on with all; `tell` of those whose answers grew, with `finish` set where they are whole."""

    def reset(self) -> None:
        """Forget what was at work."""


class Fused:
    """Backend on CUDA: the fast path, with requests that join and leave between steps."""

    def __init__(self, model, memory: float, prefix, longest: int, ends, allowed, most: int | None = None):
        from study.fast.continuous import FREE, Continuous
        from study.fast.continuous import Request as Inner

        self.engine, self.ends = Continuous(model, memory, prefix, longest, ends, allowed, most), ends
        self.inner = lambda request: Inner(
            *(request, request.tokens),
            max_new_tokens=request.max_new_tokens,
            answer=request.answer,
            node=0 if request.constrained else FREE,
        )
        self.engine.warm_up()

    @property
    def busy(self) -> bool:
        return self.engine.busy

    def join(self, request: Request) -> bool:
        request.inner = self.inner(request)
        return self.engine.join(request.inner)

    def leave(self, request: Request) -> None:
        self.engine.leave(request.inner)

    def turn(self, tell: Callable[[list[Request]], None]) -> None:
        changed = self.engine.turn()
        for inner in changed:
            if inner.done:
                inner.index.finish = inner.index.whole(self.ends) or "stop"
                inner.index.confidence = inner.confidence
        asked = [inner.index for inner in changed]
        tell([request for request in asked if request.finish or request.watched or request.first is None])

    def reset(self) -> None:
        self.engine.reset()


class Plain:
    """Backend anywhere: transformers' `generate`, on batches of what waits when it is free."""

    def __init__(self, model, ends, allowed, most: int = BATCH):
        self.model, self.ends, self.allowed, self.most = model, ends, allowed, most
        self.batch: list[Request] = []

    @property
    def busy(self) -> bool:
        return bool(self.batch)

    def join(self, request: Request) -> bool:
        fits = not self.batch or (
            len(self.batch) < self.most and request.constrained == self.batch[0].constrained
        )
        if fits:
            self.batch.append(request)
        return fits

    def leave(self, request: Request) -> None:
        self.batch.remove(request)

    def turn(self, tell: Callable[[list[Request]], None]) -> None:
        batch, self.batch = self.batch, []

        def watch(number: int, tokens: list[int]) -> bool:
            request = batch[number]
            if request.finish is None and len(tokens) > len(request.answer):
                request.answer[:] = tokens[: request.max_new_tokens]
                if not request.constrained:  # its confidence is known at the end
                    request.finish = request.whole(self.ends)
                tell([request])
            return bool(request.finish or request.given_up())

        new = max(request.max_new_tokens for request in batch)
        allowed = self.allowed if batch[0].constrained else None
        prompts = [request.tokens for request in batch]
        found = generation.continue_batch(self.model, prompts, new, self.ends, allowed, watch)
        for request, (tokens, confidence) in zip(batch, found, strict=True):
            if request.finish is None:
                request.answer[:], request.confidence = tokens[: request.max_new_tokens], confidence
                request.finish = request.given_up() or request.whole(self.ends) or "stop"
        tell(batch)

    def reset(self) -> None:
        self.batch = []


class Engine:
    """Answers requests by a backend, in a thread of its own. All but `serve` is for the event loop's
    thread."""

    def __init__(self, backend: Backend, max_queue: int, gave_up: Callable[[], None] = lambda: None):
        """`gave_up` is called where the backend keeps failing."""
        self.backend, self.max_queue, self.gave_up = backend, max_queue, gave_up
        self.loop = asyncio.get_running_loop()
        self.inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self.open: set[Request] = set()  # not answered yet
        self.waiting: deque[Request] = deque()
        self.at_work: set[Request] = set()
        self.beat, self.stopping, self.failed = time.monotonic(), False, False
        self.thread = threading.Thread(target=self.serve, name="engine", daemon=True)
        self.thread.start()

    # For the event loop

    def submit(self, requests: Sequence[Request]) -> None:
        """Let all of these be answered: then their futures `done` are. Raises Overloaded or Stopped."""
        if self.stopping or self.failed:
            raise Stopped
        if len(self.open) - len(self.at_work) + len(requests) > self.max_queue:
            raise Overloaded
        for request in requests:
            self.open.add(request)
            self.inbox.put(request)

    def abandon(self, requests: Sequence[Request]) -> None:
        """Nobody waits for these any more."""
        for request in requests:
            request.abandoned = True
            self.inbox.put(None)  # wakes it

    @property
    def queued(self) -> int:
        return max(0, len(self.open) - len(self.at_work))

    @property
    def healthy(self) -> bool:
        """Whether it works, or could."""
        stuck = self.open and time.monotonic() - self.beat > QUIET
        return self.thread.is_alive() and not (self.failed or self.stopping or stuck)

    async def stop(self) -> None:
        """End the thread, once all is answered."""
        while self.open and self.thread.is_alive():
            await asyncio.wait([request.done for request in self.open], timeout=0.5)
        self.stopping = True
        self.inbox.put(None)
        await asyncio.to_thread(self.thread.join)

    def deliver(self, changed: list[Request]) -> None:
        for request in changed:
            if request.answer and request.first is None:
                request.first = time.monotonic()
            request.news.set()
            if request.finish:
                self.open.discard(request)
                if not request.done.done():  # nor cancelled, by who waited
                    request.done.set_result(None)

    # For the thread

    def serve(self) -> None:
        failures, broken = 0, False
        while not self.stopping and failures < FAILURES:
            self.beat = time.monotonic()
            try:
                if broken:
                    self.backend.reset()
                broken = False
                self.fetch()
                self.drop()
                self.admit()
                if self.backend.busy:
                    self.backend.turn(self.tell)
                    failures = 0
            except Exception:  # whatever a device or a library can come to: those at work pay for it, not all
                failures, broken = failures + 1, True
                traceback.print_exc(file=sys.stderr)
                self.fail(self.at_work)
        if failures == FAILURES:
            self.failed = True
            self.fail(self.waiting)
            self.loop.call_soon_threadsafe(self.gave_up)

    def fetch(self) -> None:
        """Take over what came; wait for it where there is nothing else to do."""
        idle = not (self.backend.busy or self.waiting)
        try:
            while True:
                request = self.inbox.get(timeout=1) if idle else self.inbox.get_nowait()
                idle = False
                if request:
                    self.waiting.append(request)
        except queue.Empty:
            return

    def drop(self) -> None:
        """Those that are late or abandoned leave."""
        for request in [*self.at_work, *self.waiting]:
            request.finish = request.given_up()
            if request.finish:
                if request in self.at_work:
                    self.backend.leave(request)
                else:
                    self.waiting.remove(request)
                self.tell([request])

    def admit(self) -> None:
        """Those that there is room for go to work; one that the backend fails at is of them by then."""
        while self.waiting:
            request = self.waiting.popleft()
            self.at_work.add(request)
            if not self.backend.join(request):
                self.at_work.remove(request)
                self.waiting.appendleft(request)
                return

    def tell(self, changed: list[Request]) -> None:
        """Let the event loop know of answers that grew or ended."""
        self.at_work -= {request for request in changed if request.finish}
        if changed:
            self.loop.call_soon_threadsafe(self.deliver, changed)

    def fail(self, requests: Iterable[Request]) -> None:
        """Those end without an answer."""
        failed = list(requests)
        for request in failed:
            request.finish = "failed"
        self.waiting = deque(request for request in self.waiting if not request.finish)
        self.tell(failed)
