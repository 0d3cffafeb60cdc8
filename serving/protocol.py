"""What uvicorn leaves open: the head of a request, which a client may send at any length and for ever, and
in a parent of workers the socket once they end, and how soon it sees that one was killed."""

import time

from uvicorn.config import STARTUP_FAILURE
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.supervisors import Multiprocess

HEAD_BYTES = 2**16  # of a request's line and headers
HEAD_SECONDS = 15  # in which they are to come, from their first byte or from the connection on
GAVE_UP = 4  # the exit status of a worker whose model keeps failing
GIVE_UPS, WITHIN = 3, 600  # so many within so many seconds, and no worker is replaced any more


class BoundedHead(HttpToolsProtocol):
    """A connection. What is over the bounds is cut off."""

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.begin_head()

    def on_message_begin(self) -> None:
        self.begin_head()
        super().on_message_begin()

    def begin_head(self) -> None:
        self.end_head()
        self.head_bytes = 0
        self.head_late = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def end_head(self) -> None:
        if getattr(self, "head_late", None):
            self.head_late.cancel()
        self.head_late = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.head_bytes += len(data)
        if self.head_late and self.head_bytes > HEAD_BYTES:
            self.transport.abort()

    def on_headers_complete(self) -> None:
        self.end_head()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self.end_head()
        super().connection_lost(exc)


class Workers(Multiprocess):
    """Processes that serve. Once they end, nobody is let in to wait for none."""

    def __init__(self, config, sockets):
        super().__init__(config, sockets)
        self.give_ups: list[float] = []  # when

    @property
    def failed(self) -> bool:
        """Whether it ended since its workers can't serve."""
        unable = any(worker.exitcode == STARTUP_FAILURE for worker in self.processes)
        return unable or len(self.give_ups) >= GIVE_UPS

    def terminate_all(self) -> None:
        for socket in self.sockets:
            socket.close()
        super().terminate_all()

    def keep_subprocess_alive(self) -> None:
        """One that died is replaced. uvicorn also asks each whether it is well: one that is killed meanwhile
        is waited for as long as the slowest answer may take, and so are signals."""
        for i, worker in enumerate(self.processes):
            if worker.process.is_alive() or self.should_exit.is_set():
                continue
            worker.join()
            if worker.exitcode == GAVE_UP:
                now = time.monotonic()
                self.give_ups = [*(when for when in self.give_ups if when > now - WITHIN), now]
            if self.failed:  # as they would be again
                self.should_exit.set()
                return
            self.processes[i] = type(worker)(self.config, self.sockets)
            self.processes[i].start()
