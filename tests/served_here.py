"""A server in a thread of the tests' process: uvicorn, the app and the engine as they are, over a model or
over a backend whose answers are known."""

import argparse
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable

import uvicorn
from conftest import DEMO_MODEL

from serving import app, engine, serve_fastapi, serve_flags
from serving.app import Limits, Service
from serving.served import Served


def until(seen: Callable[[], object], seconds: float = 60) -> None:
    """Wait for what is to come about by itself."""
    late = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < late, "it never came about"
        time.sleep(0.005)


class Steps:
    """A backend that answers a prompt with its own tokens, over and over, one each turn, as long as `go` lets
    it. Of `errors` every turn raises one."""

    def __init__(self, most: int = 4, seconds: float = 0.0):
        self.requests, self.most, self.seconds = [], most, seconds
        self.errors, self.resets, self.go = [], 0, threading.Event()
        self.go.set()

    @property
    def busy(self) -> bool:
        return bool(self.requests)

    def join(self, request) -> bool:
        if request.tokens == [666]:
            raise ValueError("a prompt that it can't even take")
        fits = len(self.requests) < self.most
        self.requests += [request] * fits
        return fits

    def leave(self, request) -> None:
        self.requests.remove(request)

    def turn(self, tell) -> None:
        if self.errors:
            raise self.errors.pop()
        if not self.go.wait(0.005):
            return
        time.sleep(self.seconds)
        for request in self.requests:
            request.answer.append(request.tokens[len(request.answer) % len(request.tokens)])
            request.finish = request.whole([2])
        changed, self.requests = self.requests, [r for r in self.requests if not r.finish]
        tell(changed)

    def reset(self) -> None:
        self.requests, self.resets = [], self.resets + 1


def stub(backend: Steps, task: str = "classification") -> Callable[[Limits], Awaitable[Service]]:
    """Makes a service over `backend`."""
    from study.model import load_tokenizer

    labels = ["red", "blue"] if task == "classification" else None
    settings = argparse.Namespace(max_seq_length=256, max_new_tokens=8)
    served = Served(
        *(
            "served",
            task,
            labels,
            settings,
            load_tokenizer(str(DEMO_MODEL)),
            None,
            "",
            [2],
            None,
            512,
            2048,
            [],
        )
    )

    async def made(limits: Limits) -> Service:
        gave_up = lambda: setattr(backend, "gave_up", True)
        return Service(served, engine.Engine(backend, limits.max_queue, gave_up), limits)

    return made


class Here:
    """Serves while the `with` block goes on."""

    def __init__(self, made: Callable[[Limits], Awaitable[Service]], **limits):
        self.made, self.limits = made, Limits(**limits)
        flags = {"host": "127.0.0.1", "port": 0, "workers": 1}
        args = argparse.Namespace(**flags, deadline_seconds=self.limits.deadline_seconds)
        config = serve_fastapi.configured(lambda: app.build(self.start, self.limits), args)
        self.socket, self.server = serve_flags.bound(args.host, args.port), uvicorn.Server(config)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    @contextlib.asynccontextmanager
    async def start(self):
        self.service = await self.made(self.limits)
        self.engine = self.service.engine
        yield self.service
        await self.engine.stop()

    def __enter__(self) -> "Here":
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()
        until(lambda: self.server.started or not self.thread.is_alive())
        return self

    def __exit__(self, *_) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive(), "it did not end"

    def ask(
        self, path: str, body: object = None, key: str | None = None, **headers
    ) -> tuple[int, dict, dict]:
        """(status, headers, answer) of one request: GET without a body; what is no bytes is sent as JSON."""
        return ask(self.port, path, body, key, **headers)

    def begin(self, path: str, body: dict, key: str | None = None) -> socket.socket:
        """A connection on which a request is on its way."""
        return begin(self.port, path, body, key)

    def idle(self) -> bool:
        """Whether nothing is at work, waits, or is counted as waiting."""
        left = self.engine.open or self.engine.waiting or self.engine.at_work
        return not (left or self.engine.backend.busy)


def ask(port: int, path: str, body: object = None, key: str | None = None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("GET" if body is None else "POST", path, raw, headers)
        response = connection.getresponse()
        content = response.read()
        plain = path == "/metrics" and response.status == 200
        return response.status, dict(response.headers), content.decode() if plain else json.loads(content)


def begin(port: int, path: str, body: dict, key: str | None = None) -> socket.socket:
    connection, content = socket.create_connection(("127.0.0.1", port), timeout=60), json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Length: {len(content)}\r\n"
    head += f"Authorization: Bearer {key}\r\n" if key else ""
    connection.sendall(head.encode() + b"\r\n" + content)
    return connection
