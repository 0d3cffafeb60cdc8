"""An open-loop client: it sends each request when that is due, whatever became of those before, and waits for
every answer."""

import asyncio
import errno
import json
import resource
import signal
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass

import aiohttp

from study.errors import UserError

AT_ITS_END = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS)  # the client, not the server
PAUSE = (
    2  # seconds that a connection may rest: less than servers wait (uvicorn 5), or a request meets its end
)
# Of vLLM's /metrics: the prompts' tokens that it looked up in its cache of earlier prompts, and found there
LOOKED_UP, FOUND = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"
HEAD_START = 0.05  # seconds before the first request is due
UNTOLD = dict.fromkeys(("first_token", "input_tokens", "output_tokens", "answer"))


@dataclass(frozen=True)
class Server:
    """Where requests go, and what all of them ask for."""

    url: str  # without a path
    api: str  # "openai" or "tgi"
    model: str | None
    max_new_tokens: int
    stream: bool
    timeout: float  # seconds from when a request is sent
    key: str | None = None

    @property
    def place(self) -> str:
        if self.api == "openai":
            return f"{self.url}/v1/completions"
        return f"{self.url}/generate{'_stream' if self.stream else ''}"

    def body(self, prompt: str) -> dict:
        """One greedy answer to `prompt`."""
        if self.api == "openai":
            usage = {"stream_options": {"include_usage": True}} if self.stream else {}
            asked = {"prompt": prompt, "max_tokens": self.max_new_tokens, "temperature": 0}
            return {"model": self.model, **asked, "stream": self.stream, **usage}
        # TGI lists the prompt's tokens, which is how it counts them, only where it does not stream.
        details = {"details": True, "decoder_input_details": not self.stream}
        return {
            "inputs": prompt,
            "parameters": {"max_new_tokens": self.max_new_tokens, "do_sample": False, **details},
        }

    def session(self) -> aiohttp.ClientSession:
        """With as many connections as there are requests under way."""
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=PAUSE),
            timeout=aiohttp.ClientTimeout(total=self.timeout),
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
        )


def read_answer(api: str, content: dict) -> dict:
    """Answer and tokens, of one that came in one go."""
    if api == "openai":
        answer, counts = content["choices"][0]["text"], counts_of(content)
    else:
        answer, details = content["generated_text"], content.get("details") or {}
        prefill = details.get("prefill") or []
        counts = {"input_tokens": len(prefill) or None, "output_tokens": details.get("generated_tokens")}
    if not isinstance(answer, str):
        raise ValueError("the answer is no text")
    return {"answer": answer, **counts}


def counts_of(content: dict) -> dict:
    """The tokens that an OpenAI-compatible server counts, where it does."""
    usage = content.get("usage") or {}
    names = {"input_tokens": "prompt_tokens", "output_tokens": "completion_tokens"}
    return {ours: usage[theirs] for ours, theirs in names.items() if usage.get(theirs) is not None}


def read_event(api: str, content: dict) -> tuple[str, bool, dict]:
    """Of one event of a stream the text that it adds, whether the answer ends with it, and the tokens that it
    counts."""
    if api == "openai":
        choice = (content.get("choices") or [{}])[0]
        return choice.get("text") or "", bool(choice.get("finish_reason")), counts_of(content)
    token, details = content["token"], content.get("details") or {}
    text = "" if token.get("special") else token["text"]
    tokens = {"output_tokens": details["generated_tokens"]} if details else {}
    return text, content.get("generated_text") is not None, tokens


async def read_stream(api: str, response: aiohttp.ClientResponse, now: Callable[[], float]) -> dict:
    """Answer, tokens and time of the first, of server-sent events. A server that counts no tokens is taken to
    send one an event. Raises ValueError for an error among them, and for an answer that does not end."""
    told, texts, ended = dict(UNTOLD), [], False
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            ended = True
            continue
        event = json.loads(data)
        if event.get("error"):
            raise ValueError(f"error in the stream: {event['error']}")
        text, last, counted = read_event(api, event)
        ended = ended or last
        told |= counted
        if text:
            texts.append(text)
            told["first_token"] = told["first_token"] or now()
    if not ended:
        raise ValueError("the stream ends before the answer does")
    counted = len(texts) if told["output_tokens"] is None else told["output_tokens"]
    return told | {"answer": "".join(texts), "output_tokens": counted}


async def ask(session: aiohttp.ClientSession, server: Server, prompt: str, now: Callable[[], float]) -> dict:
    """What came of one request: `status`, `end` and, answered, the rest of a row; else `error`, in words."""
    told, error = dict(UNTOLD), None
    try:
        async with session.post(server.place, json=server.body(prompt)) as response:
            status = "ok" if response.status == 200 else f"http {response.status}"
            if status != "ok":
                error = await response.text(errors="replace")
            elif server.stream:
                told |= await read_stream(server.api, response, now)
            else:
                told |= read_answer(server.api, await response.json(content_type=None))
    except TimeoutError:
        status, error = "timeout", f"no answer within {server.timeout:g} s"
    except aiohttp.ClientConnectorError as failure:
        ours = failure.os_error.errno in AT_ITS_END
        status, error = "client at its end" if ours else "no connection", str(failure.os_error)
    except (aiohttp.ClientError, OSError) as failure:
        status, error = "broken", f"{type(failure).__name__}: {failure}"
    except (ValueError, LookupError, TypeError, AttributeError) as failure:
        status, error = "no answer of this API", f"{type(failure).__name__}: {failure}"
    failed = UNTOLD | {"error": " ".join(error.split())[:200]} if error is not None else {}
    return {"status": status, "end": now(), **told, **failed}


async def send_all(
    server: Server, prompts: Sequence[str], due: Sequence[float], progress: Callable[[], None]
) -> list[dict]:
    """The rows of one run: every prompt sent when it is due, and every answer waited for."""
    loop = asyncio.get_running_loop()
    async with server.session() as session:
        began = loop.time() + HEAD_START

        def now() -> float:
            return loop.time() - began

        async def send(prompt: str, at: float) -> dict:
            row = {"due": at, "sent": now()}
            row |= await ask(session, server, prompt, now)
            progress()
            return row

        tasks = []
        for prompt, at in zip(prompts, due, strict=True):
            await asyncio.sleep(at - now())
            tasks.append(asyncio.create_task(send(prompt, at)))
        return await asyncio.gather(*tasks)


def run(work: Coroutine):
    """What `work` comes to, as asyncio.run says it. SIGTERM ends that as Ctrl-C does: not in the midst of a
    task, but by cancelling them all; also where Ctrl-C is ignored, as in the background of a script."""

    async def stoppable():
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        before = signal.signal(signal.SIGTERM, lambda *_: loop.call_soon_threadsafe(task.cancel))
        try:
            return await work
        finally:
            signal.signal(signal.SIGTERM, before)

    try:
        return asyncio.run(stoppable())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def more_files() -> None:
    """Let this process have as many connections open as the machine allows it."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def served_model(server: Server) -> str:
    """The first model that an OpenAI-compatible server names. Raises UserError where it names none."""
    try:
        async with server.session() as session, session.get(f"{server.url}/v1/models") as response:
            return str((await response.json(content_type=None))["data"][0]["id"])
    except aiohttp.ClientConnectorError as error:
        raise nothing_listens(server, str(error.os_error)) from None
    except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError):
        raise UserError(f"--url {server.url}/v1/models names no model: name one by --model") from None


async def cache_counts(server: Server) -> tuple[float, float] | None:
    """Tokens of prompts that the server has looked up in its cache so far, and found there; None where it
    says nothing of these."""
    try:
        async with server.session() as session, session.get(f"{server.url}/metrics") as response:
            lines = (await response.text(errors="replace")).splitlines() if response.status == 200 else []
        counts: dict[str, list[float]] = {LOOKED_UP: [], FOUND: []}
        for line in lines:
            name = line.partition("{")[0].partition(" ")[0]
            if name in counts:  # once for each engine
                counts[name].append(float(line.rpartition(" ")[2]))
    except (aiohttp.ClientError, OSError, ValueError):
        return None
    return (sum(counts[LOOKED_UP]), sum(counts[FOUND])) if all(counts.values()) else None


async def check(server: Server, prompt: str) -> None:
    """Raise UserError unless the server answers one request."""
    async with server.session() as session:
        row = await ask(session, server, prompt, asyncio.get_running_loop().time)
    status, said = row["status"], row.get("error", "")
    if status == "ok":
        return
    if status == "no connection":
        raise nothing_listens(server, said)
    mend = {
        "http 401": "name the file of its key by --api_key_file",
        "http 403": "name the file of its key by --api_key_file",
        "http 404": "name the server by --url, its kind by --api and a model that it has by --model",
        "timeout": "wait until it is up, or raise --timeout_seconds",
        "no answer of this API": "name its kind by --api, and look whether it takes --stream",
    }.get(status, "look into the server's log")
    said = f" ({said})" if said else ""
    raise UserError(f"--url {server.place}: the first request came to {status}{said}: {mend}")


def nothing_listens(server: Server, said: str) -> UserError:
    return UserError(f"--url {server.url}: nothing listens there ({said}): start the server, or name another")
