"""A server with a known service time and capacity, for tests of the load test: `workers` requests at once,
`service` seconds each, so workers / service requests a second."""

import asyncio
import json
import threading

from aiohttp import web

CLOSED, OTHER = 0, 1  # in place of an HTTP status: the connection; an answer of another API
WORDS = ["one", "two", "three", "four", "five"]


class LoadedServer:
    """Answers a prompt with its last word: over HTTP while the `with` block goes on, in a thread."""

    def __init__(
        self, workers: int = 1000, service: float = 0.0, status=lambda number: 200, token: float = 0
    ):
        self.free = [0.0] * workers  # when each worker will be
        self.service, self.status, self.token = service, status, token
        self.asked: list[dict] = []
        self.cut: int | None = None  # words after which a stream ends, that is cut
        self.cached: int | None = None  # tokens of each prompt that its cache has, of the 7 that it counts

    def __enter__(self) -> "LoadedServer":
        self.loop, started = asyncio.new_event_loop(), threading.Event()
        self.thread = threading.Thread(target=self.serve, args=(started,))
        self.thread.start()
        started.wait()
        return self

    def __exit__(self, *_) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    def serve(self, started: threading.Event) -> None:
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/metrics", self.metrics)
        for place in ("/v1/completions", "/generate", "/generate_stream"):
            app.router.add_post(place, self.answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        self.loop.run_until_complete(runner.setup())
        self.loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", 0).start())
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        started.set()
        self.loop.run_forever()
        self.loop.run_until_complete(runner.cleanup())
        self.loop.close()

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "served"}]})

    async def metrics(self, _: web.Request) -> web.Response:
        """As vLLM counts, for two engines."""
        if self.cached is None:
            return web.Response(text="requests_total 1\n")
        counts = {"queries": 7 * len(self.asked), "hits": self.cached * len(self.asked)}
        lines = [
            f'vllm:prefix_cache_{name}_{end}{{engine="{engine}",model_name="a b"}} {count / 2:e}'
            for name, count in counts.items()
            for engine in (0, 1)
            for end in ("total", "created")
        ]
        return web.Response(text="\n".join(["# HELP vllm:prefix_cache_hits_total x", *lines, ""]))

    async def wait_for_a_worker(self) -> None:
        """Until one has done this request. Due times are kept, so that a busy machine takes no capacity."""
        now, worker = self.loop.time(), self.free.index(min(self.free))
        self.free[worker] = max(now, self.free[worker]) + self.service
        await asyncio.sleep(self.free[worker] - now)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body | {"key": request.headers.get("Authorization")})
        status = self.status(len(self.asked))
        if status == CLOSED:
            request.transport.close()
        if status == OTHER:
            return web.json_response({"detail": "hello"})
        if status != 200:
            return web.json_response({"error": {"message": "no such luck"}}, status=status)
        await self.wait_for_a_worker()
        if request.path == "/generate_stream" or body.get("stream"):
            return await self.stream(request)
        answer = " " + (body.get("prompt") or body["inputs"]).split()[-1]
        if request.path == "/generate":
            details = {"generated_tokens": 2, "prefill": [{}] * 7}
            return web.json_response({"generated_text": answer, "details": details})
        usage = {"prompt_tokens": 7, "completion_tokens": 2}
        told = {"object": "text_completion", "usage": usage}  # without it AIPerf reads no answer
        return web.json_response({"choices": [{"text": answer, "finish_reason": "stop"}], **told})

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """WORDS, `token` seconds between two."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        ours = request.path == "/v1/completions"
        for i, word in enumerate(WORDS):
            if i == self.cut:
                return response
            last = i == len(WORDS) - 1
            if ours:
                event = {"choices": [{"text": word, "finish_reason": "length" if last else None}]}
            else:
                event = {"token": {"text": word}, "generated_text": "".join(WORDS) if last else None}
                event["details"] = {"generated_tokens": len(WORDS)} if last else None
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
            if not last:
                await asyncio.sleep(self.token)
        if ours:
            usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(WORDS)}}
            await response.write(f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())
        return response
