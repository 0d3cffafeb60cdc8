"""The HTTP side of a server: a FastAPI app over an engine.

    POST /v1/completions   as OpenAI's, greedy; also streamed
    POST /v1/classify      {"text"} -> {"label", "confidence", "shortened"}
    POST /v1/summarize     {"dialogue"} -> {"summary", "shortened"}
    GET  /v1/models  /health  /metrics

Every error is OpenAI's error object. The prompts of the two tasks are built, and their answers read, as
scoring does it.
"""

import asyncio
import contextlib
import hmac
import json
import sys
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serving import engine as engines
from serving import metrics
from serving.bodies import Classify, Completion, Refused, Strict, Summarize, read
from serving.served import Served

BODY_SECONDS = 15  # in which a request's body is to come
LATE = 1  # seconds behind a request's deadline in which the engine itself may say that it is late
UNSURE = "\ufffd"  # what a decoder shows of a character whose last bytes are in the next token


@dataclass(frozen=True)
class Limits:
    """What a server lets a client do."""

    key: str | None = None
    max_body_bytes: int = 2**20
    max_queue: int = 512
    deadline_seconds: float = 60.0


class Service:
    """A model, its engine, and how requests reach it."""

    def __init__(self, served: Served, engine: engines.Engine, limits: Limits):
        self.served, self.engine, self.limits = served, engine, limits
        self.created = int(time.time())

    def asked(self, tokens: list[int], new: int, constrained: bool = False) -> engines.Request:
        """A request to the engine. Raises Refused with 400 for what the model can't take."""
        if max(tokens, default=0) >= self.served.vocabulary:
            raise Refused(400, f"prompt: a token is not below {self.served.vocabulary}", param="prompt")
        if not tokens:
            raise Refused(400, "prompt: it has no tokens", param="prompt")
        if len(tokens) + new > self.served.longest:
            message = f"prompt and max_tokens are {len(tokens)} + {new} tokens, {self.served.longest} at most"
            raise Refused(400, message, param="max_tokens", code="context_length_exceeded")
        return engines.Request(tokens, new, constrained, self.limits.deadline_seconds)

    def submit(self, requests: list[engines.Request]) -> None:
        """Raises Refused with 429 where too many wait, 503 where none is taken any more."""
        try:
            self.engine.submit(requests)
        except engines.Overloaded:
            raise Refused(
                429, "too many requests wait", "overloaded_error", headers={"Retry-After": "1"}
            ) from None
        except engines.Stopped:
            raise Refused(503, "the server stops", "server_error") from None

    async def answers(self, requests: list[engines.Request], http: Request) -> None:
        """Wait until all are answered; those of a client that leaves are abandoned. Raises Refused."""
        self.submit(requests)
        left = asyncio.create_task(gone(http))
        try:
            whole = asyncio.gather(*(request.done for request in requests))
            late = self.limits.deadline_seconds + LATE  # where the engine is at something long
            await asyncio.wait([whole, left], timeout=late, return_when=asyncio.FIRST_COMPLETED)
            if left.done() and not whole.done():
                raise ClientDisconnect
        finally:
            left.cancel()
            self.engine.abandon([request for request in requests if not request.finish])
        for request in requests:
            refuse_unanswered(request)
            metrics.answered(request)

    async def answer(self, text: str, http: Request) -> tuple[engines.Request, bool]:
        """The task's answer about one text, constrained to the classes where there are any."""
        tokens, shortened = self.served.prompt(text)
        request = self.asked(tokens, self.served.settings.max_new_tokens, bool(self.served.allowed))
        await self.answers([request], http)
        return request, shortened


async def gone(http: Request) -> None:
    """Wait until the client has left. The body has been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def refuse_unanswered(request: engines.Request) -> None:
    """Raise Refused for a request that ended without a whole answer."""
    if request.finish in {"expired", None}:
        raise Refused(504, "there was no answer within the server's deadline", "timeout_error")
    if request.finish not in {"stop", "length"}:
        raise Refused(500, "the model failed at this request", "server_error")


async def body_of(http: Request, most: int) -> bytes:
    """Raises Refused with 413 for more than `most` bytes, 408 for one that does not come."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in http.stream():
                body += chunk
                if len(body) > most:
                    raise too_large(most)
    except TimeoutError:
        raise Refused(
            408, f"the body did not come within {BODY_SECONDS} s", headers={"Connection": "close"}
        ) from None
    return bytes(body)


def too_large(most: int) -> Refused:
    return Refused(413, f"the body has more than {most:,} bytes", headers={"Connection": "close"})


def build(start: Callable[[], AsyncIterator[Service]], limits: Limits) -> "Guard":
    """The app. `start` is an async context manager of the service, entered before the first request and left
    after the last."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        async with start() as service:
            app.state.service, looking = service, asyncio.create_task(metrics.keep_looking(service.engine))
            yield
            looking.cancel()

    app = FastAPI(title="A fine-tuned model", lifespan=lifespan, docs_url=None, redoc_url=None)
    paths = {}
    app.openapi = lambda: {"openapi": "3.1.0", "info": {"title": app.title, "version": "1"}, "paths": paths}

    def add(path: str, kind: type[Strict]):
        """As a plain route: FastAPI's own reading of a request would take as long as all the rest."""
        paths[path] = {"post": described(kind)}
        return lambda answer: app.add_route(path, answer, methods=["POST"])

    def service_of(http: Request) -> Service:
        return http.app.state.service

    async def asked(http: Request, kind: type[Strict]):
        return read(kind, await body_of(http, limits.max_body_bytes))

    @add("/v1/completions", Completion)
    async def completions(http: Request) -> Response:
        return await complete(service_of(http), await asked(http, Completion), http)

    @add("/v1/classify", Classify)
    async def classify(http: Request) -> Response:
        service, content = service_of(http), await asked(http, Classify)
        refuse_other_task(service, "classification")
        request, shortened = await service.answer(content.text, http)
        label = service.served.parsed(request.answer)
        return JSONResponse({"label": label, "confidence": request.confidence, "shortened": shortened})

    @add("/v1/summarize", Summarize)
    async def summarize(http: Request) -> Response:
        service, content = service_of(http), await asked(http, Summarize)
        refuse_other_task(service, "summarization")
        request, shortened = await service.answer(content.dialogue, http)
        return JSONResponse({"summary": service.served.parsed(request.answer), "shortened": shortened})

    @app.get("/v1/models")
    async def models(http: Request) -> Response:
        service = service_of(http)
        model = {"id": service.served.name, "object": "model", "created": service.created, "owned_by": "user"}
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/health")
    async def health(http: Request) -> Response:
        healthy = service_of(http).engine.healthy
        return JSONResponse({"status": "ok" if healthy else "failing"}, 200 if healthy else 503)

    @app.get("/metrics")
    async def all_metrics(http: Request) -> Response:
        content, kind = metrics.shown(service_of(http).engine)
        return Response(content, media_type=kind)

    app.add_exception_handler(Refused, lambda _, error: refusal(error))
    app.add_exception_handler(
        HTTPException, lambda _, error: refusal(Refused(error.status_code, error.detail))
    )
    app.add_exception_handler(ClientDisconnect, lambda *_: Response(status_code=499))
    app.add_exception_handler(Exception, lambda *_: refusal(failed()))  # and it is raised again
    return Guard(app, limits)


def described(kind: type[Strict]) -> dict:
    """For /openapi.json."""
    schema = {"schema": kind.model_json_schema()}
    answered = {"200": {"description": "The answer"}, "4XX": {"description": "An error object"}}
    return {"requestBody": {"content": {"application/json": schema}}, "responses": answered}


def failed() -> Refused:
    return Refused(500, "the server failed", "server_error")


def refusal(error: Refused) -> JSONResponse:
    return JSONResponse(error.content, error.status, error.headers)


def refuse_other_task(service: Service, task: str) -> None:
    if service.served.task != task:
        raise Refused(404, f"this model is for {service.served.task}", code="model_not_found")


# Completions


async def complete(service: Service, content: Completion, http: Request) -> Response:
    """POST /v1/completions."""
    served = service.served
    if content.model not in {None, served.name}:
        message = f"model: this server has {served.name} only"
        raise Refused(404, message, param="model", code="model_not_found")
    prompts = content.prompts()
    if len(prompts) > service.limits.max_queue:
        raise Refused(
            400, f"prompt: {len(prompts)} prompts, {service.limits.max_queue} at most", param="prompt"
        )
    new = content.max_tokens or served.settings.max_new_tokens
    rows = [served.tokens(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    requests = [service.asked(row, new) for row in rows]
    for request in requests:
        request.watched = bool(content.stream)
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
    head["model"] = served.name
    if content.stream:
        service.submit(requests)
        usage = content.stream_options is not None and content.stream_options.include_usage
        return Stream(service, requests, stream(requests, head, usage, served.text))
    await service.answers(requests, http)
    choices = [choice(i, served.text(request.answer), request.finish) for i, request in enumerate(requests)]
    return JSONResponse(head | {"choices": choices, "usage": usage_of(requests)})


def choice(index: int, text: str, finish: str | None) -> dict:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}


def usage_of(requests: list[engines.Request]) -> dict:
    read, written = (
        sum(map(len, rows)) for rows in zip(*((r.tokens, r.answer) for r in requests), strict=True)
    )
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


class Stream(StreamingResponse):
    """Of `requests`, which are abandoned as soon as nobody reads it any more."""

    def __init__(self, service: Service, requests: list[engines.Request], events: AsyncIterator[bytes]):
        super().__init__(events, media_type="text/event-stream")
        self.service, self.requests = service, requests

    async def __call__(self, scope, receive, send) -> None:
        try:
            async with asyncio.timeout(2 * self.service.limits.deadline_seconds):  # a client may never read
                await super().__call__(scope, receive, send)
        except TimeoutError:
            raise ClientDisconnect from None
        finally:
            self.service.engine.abandon([request for request in self.requests if not request.finish])


async def stream(requests: list[engines.Request], head: dict, usage: bool, text_of: Callable):
    """Server-sent events: what each answer grew by, how it ended, and where asked for what was used."""
    try:
        for index, request in enumerate(requests):
            async for grown, finish in growth(request, text_of):
                yield event(head | {"choices": [choice(index, grown, finish)]})
            metrics.answered(request)
        if usage:
            yield event(head | {"choices": [], "usage": usage_of(requests)})
        yield b"data: [DONE]\n\n"
    except Refused as error:
        yield event(error.content)


async def growth(request: engines.Request, text_of: Callable):
    """(what the text of an answer grew by, how it ended or None), up to its end. Raises Refused."""
    sent, finish = "", None
    while not finish:
        await request.news.wait()
        request.news.clear()
        finish, text = request.finish, text_of(request.answer[:])  # in this order: then it is whole
        if finish:
            refuse_unanswered(request)
        if finish or (len(text) > len(sent) and not text.endswith(UNSURE)):
            grown, sent = text[len(sent) :], text
            yield grown, finish


def event(content: dict) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


# Before all that


class Guard:
    """Around the app, as ASGI: the key, the size that a body says it has, what is counted, and that no error
    shows a client more than that there was one."""

    def __init__(self, app: FastAPI, limits: Limits):
        self.app, self.limits = app, limits

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.perf_counter(), 500

        async def counted(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refused = self.refused(scope)
            await (refusal(refused) if refused else self.app)(scope, receive, counted)
        except (ClientDisconnect, asyncio.CancelledError):
            status = 499  # the client left
        except Exception:
            traceback.print_exc(file=sys.stderr)
            with contextlib.suppress(RuntimeError):  # the answer has begun: it is cut
                await refusal(failed())(scope, receive, counted)
        finally:
            metrics.counted(scope["path"], status, time.perf_counter() - began)

    def refused(self, scope) -> Refused | None:
        """Why a request is not even looked at."""
        headers = dict(scope["headers"])
        if self.limits.key and scope["path"] != "/health":
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {self.limits.key}".encode()):
                return Refused(
                    401, "the API key is missing or wrong", "authentication_error", code="invalid_api_key"
                )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.limits.max_body_bytes:
            return too_large(self.limits.max_body_bytes)
        return None
