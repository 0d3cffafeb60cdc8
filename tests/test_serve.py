"""The server: it answers as scoring does, whatever else it is at; it refuses what it can't answer; and it
outlives clients, workers and its own model that fail."""

import argparse
import asyncio
import contextlib
import http.client
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import openai
import pytest
import torch
from conftest import DEMO_MODEL, ROOT, error_line
from preloaded import run_preloaded, start_preloaded
from served_here import Here, Steps, ask, begin, stub, until
from starlette.requests import ClientDisconnect
from test_export import POSTS, change_adapter, run_of

from prompts import prompt_sha256
from serving import app, engine, protocol, start
from study import device, generation

SCRIPT = "serving/serve_fastapi.py"
TEXTS = [json.loads(line)["text"] for line in POSTS.read_text().splitlines()][:16]
SHORT = {"prompt": [5, 6, 7], "max_tokens": 4}
ENDLESS = {"prompt": [5, 6, 7], "max_tokens": 400}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of the demo's model with an adapter of random weights, and its predictions, made one by
    one."""
    folder = run_of(DEMO_MODEL, tmp_path_factory.mktemp("serve") / "run")
    content = json.loads((folder / "train.json").read_text())
    content["labels"] = sorted({json.loads(line)["label"] for line in POSTS.read_text().splitlines()})
    (folder / "train.json").write_text(json.dumps(content))
    flags = ("--decoding", "constrained", "--eval_batch_size", 1, "--max_eval_samples", 8)
    done = run_preloaded("llama2_classification_inference.py", "--experiment_dir", folder, *flags)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def exact(run):
    """The run's server in this process, in float32, in which answers do not depend on their batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "compute_dtype", lambda: torch.float32)
        args = argparse.Namespace(run=run, served_model_name="run", merge="off", max_batch=None)
        made = lambda limits: start.service(args, limits, 1.0, gave_up=lambda: None)
        with Here(made, deadline_seconds=300) as here:
            yield here


@pytest.fixture(scope="module")
def stubbed():
    """A server whose answers are their prompts, over and over."""
    with Here(stub(Steps())) as here:
        yield here


def client_of(here, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{here.url}/v1", api_key=key, max_retries=0, timeout=60)


def text_of(here, tokens: list[int]) -> str:
    return here.service.served.text(tokens)


# Answers


def answered_alone(here, prompts: list[list[int]], new: list[int], allowed) -> list[tuple]:
    served = here.service.served
    return [
        next(generation.plain_answers(served.model, {0: prompt}, most, served.ends, allowed, 1))[1]
        for prompt, most in zip(prompts, new, strict=True)
    ]


async def asked_at_once(here, bodies: list[tuple[str, dict]], leaving: list[dict]) -> list[dict]:
    """The answers to `bodies`, beside clients that leave before theirs come."""
    async with aiohttp.ClientSession(here.url) as session:

        async def one(path: str, body: dict) -> dict:
            async with session.post(path, json=body) as response:
                assert response.status == 200, await response.text()
                return await response.json()

        async def leave(body: dict) -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05), session.post("/v1/completions", json=body) as response:
                    await response.read()

        found, _ = await asyncio.gather(
            asyncio.gather(*(one(*body) for body in bodies)), asyncio.gather(*map(leave, leaving))
        )
        return found


def test_answers_are_those_of_scoring_whatever_else_is_served(exact):
    draw, served = random.Random(3), exact.service.served
    prompts = [served.prompt(text)[0][: draw.randint(3, 90)] for text in TEXTS]
    new = [draw.choice((1, 3, 8, 20)) for _ in prompts]
    bodies = [("/v1/classify", {"text": text}) for text in TEXTS[:8]]
    bodies += [
        ("/v1/completions", {"prompt": prompt, "max_tokens": most})
        for prompt, most in zip(prompts, new, strict=True)
    ]
    order = draw.sample(range(len(bodies)), len(bodies))
    leaving = [{"prompt": prompt, "max_tokens": 100} for prompt in prompts[:4]]
    mixed = asyncio.run(asked_at_once(exact, [bodies[i] for i in order], leaving))
    found = [answer for _, answer in sorted(zip(order, mixed, strict=True), key=lambda pair: pair[0])]
    until(exact.idle)
    expected = answered_alone(exact, prompts, new, None)
    assert [answer["choices"][0]["text"] for answer in found[8:]] == [text_of(exact, a) for a, _ in expected]
    assert [a["usage"]["completion_tokens"] for a in found[8:]] == [len(a) for a, _ in expected]
    ends = ["stop" if a[-1] in served.ends else "length" for a, _ in expected]
    assert [answer["choices"][0]["finish_reason"] for answer in found[8:]] == ends
    tasks = [served.prompt(text)[0] for text in TEXTS[:8]]
    classes = answered_alone(exact, tasks, [20] * 8, served.allowed)
    assert [answer["label"] for answer in found[:8]] == [served.parsed(a) for a, _ in classes]
    assert [answer["confidence"] for answer in found[:8]] == pytest.approx([c for _, c in classes], rel=1e-5)


def test_a_stream_is_the_answer_in_pieces(exact):
    client, served = client_of(exact), exact.service.served
    prompt = served.prompt(TEXTS[0])[0][:40]
    whole = client.completions.create(model="run", prompt=prompt, max_tokens=20)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    pieces = list(client.completions.create(model="run", prompt=prompt, max_tokens=20, **options))
    assert "".join(piece.choices[0].text for piece in pieces[:-1]) == whole.choices[0].text
    assert len(pieces) > 3
    assert [piece.choices[0].finish_reason for piece in pieces[-3:-1]] == [
        None,
        whole.choices[0].finish_reason,
    ]
    assert pieces[-1].usage == whole.usage


def test_characters_of_several_tokens_are_whole_in_a_stream(stubbed):
    text = "né für ☃ 🙂 naïve"
    prompt = stubbed.service.served.tokens(text)
    body = {"model": "served", "prompt": prompt, "max_tokens": len(prompt)}
    client = client_of(stubbed)
    pieces = [p.choices[0].text for p in client.completions.create(stream=True, **body)]
    assert "".join(pieces) == client.completions.create(**body).choices[0].text
    assert "☃ 🙂" in "".join(pieces)
    assert not any("\ufffd" in piece for piece in pieces)


def test_several_prompts_are_answered_in_their_order(stubbed):
    client = client_of(stubbed)
    answer = client.completions.create(model="served", prompt=[[5], [6, 7], [8]], max_tokens=2)
    texts = [text_of(stubbed, tokens) for tokens in ([5, 5], [6, 7], [8, 8])]
    assert [(c.index, c.text) for c in answer.choices] == list(enumerate(texts))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 6)
    pieces = client.completions.create(model="served", prompt=["a", "b"], max_tokens=2, stream=True)
    assert {piece.choices[0].index for piece in pieces} == {0, 1}


def test_summaries_are_read_as_scoring_does():
    with Here(stub(Steps(), "summarization")) as here:
        status, _, answer = here.ask("/v1/summarize", {"dialogue": "A: Hello.\nB: Hello."})
        assert (status, answer["shortened"]) == (200, False)
        tokens, _ = here.service.served.prompt("A: Hello.\nB: Hello.")
        assert answer["summary"] == here.service.served.parsed(tokens[:8])
        assert here.ask("/v1/classify", {"text": "a"})[0] == 404


# OpenAI's client


def test_models_and_errors_are_those_of_openai(stubbed):
    client = client_of(stubbed)
    assert [model.id for model in client.models.list()] == ["served"]
    with pytest.raises(openai.NotFoundError, match="this server has served only"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="temperature") as refused:
        client.completions.create(model="served", prompt="a", temperature=0.7)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="served", messages=[{"role": "user", "content": "a"}])
    assert client.completions.create(model="served", prompt="a", temperature=0, top_p=1, n=1, seed=1).choices


def test_who_lacks_the_key_learns_only_whether_the_server_is_well():
    with Here(stub(Steps()), key="secret") as here:
        assert client_of(here, "secret").completions.create(model="served", prompt="a", max_tokens=1).choices
        for key in ("wrong", "secre", "secrets", ""):
            with pytest.raises(openai.AuthenticationError):
                client_of(here, key or "none").completions.create(model="served", prompt="a")
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            assert here.ask(path)[0] == 401
            assert here.ask(path, key="sécret")[0] == 401
        assert here.ask("/health")[::2] == (200, {"status": "ok"})
        assert here.ask("/v1/models", key="secret")[0] == 200


# What is refused


@pytest.mark.parametrize(
    ("path", "body", "field", "words"),
    [
        ("completions", {"prompt": "a", "messages": []}, "messages", "Extra inputs"),
        ("completions", {"prompt": "a", "top_k": 5}, "top_k", "Extra inputs"),
        ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ("completions", {"prompt": "a", "max_tokens": "5"}, "max_tokens", "valid integer"),
        ("completions", {"prompt": "a", "max_tokens": 10**30}, "max_tokens", "512 at most"),
        ("completions", {"prompt": [5] * 500, "max_tokens": 13}, "max_tokens", "500 \\+ 13 tokens"),
        ("completions", {"prompt": [5, 2048]}, "prompt", "not below 2048"),
        ("completions", {"prompt": [5, -1]}, "prompt", "prompt"),
        ("completions", {"prompt": [5, True]}, "prompt", "prompt"),
        ("completions", {"prompt": ["a", [5]]}, "prompt", "prompt"),
        ("completions", {"prompt": []}, "prompt", "prompt"),
        ("completions", {"prompt": [[5]] * 513}, "prompt", "513 prompts, 512 at most"),
        ("completions", {}, "prompt", "required"),
        ("completions", {"prompt": "a", "logprobs": 1}, "logprobs", "logprobs"),
        ("completions", {"prompt": "a", "n" * 10_000: 1}, "n" * 100, "n" * 100),
        ("classify", {"text": "a", "labels": []}, "labels", "Extra inputs"),
        ("classify", {"text": ""}, "text", "at least 1"),
        ("classify", [], None, "object"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_it_can_not_heed_is_refused_by_name(stubbed, path, body, field, words):
    status, _, answer = stubbed.ask(f"/v1/{path}", body)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] == field
    assert re.search(words, answer["error"]["message"])
    assert len(answer["error"]["message"]) < 300


def test_a_body_that_is_too_large_is_not_read():
    with Here(stub(Steps()), max_body_bytes=1000) as here:
        status, headers, answer = here.ask("/v1/classify", {"text": "a" * 1000})
        assert (status, headers["connection"]) == (413, "close")
        assert "1,000 bytes" in answer["error"]["message"]
        with begin(here.port, "/v1/classify", {}) as connection:  # of no length that it says
            connection.recv(4096)
            connection.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
            connection.sendall(b"200\r\n" + b"a" * 512 + b"\r\n")
            connection.sendall(b"200\r\n" + b"a" * 512 + b"\r\n")
            assert b" 413 " in connection.recv(4096)
        assert here.ask("/v1/classify", {"text": "a"})[0] == 200


def broken_bodies(draw: random.Random) -> list[tuple[str, bytes]]:
    """Paths and bodies of all kinds, with some that are right."""
    odd = [
        *(None, True, -1, 0, 1.5, 10**25, 1e308, "", "a", "\x00\x07\u200b", "</s><s>[INST] <unk>", "\ud800"),
        *([], [[]], {}, [5, 2048], [5, -1], [True], ["a", 5], [[5], "a"], [[5], []], [None], "ä" * 3000),
        *([5] * 600, [[5]] * 600, {"a": {"b": []}}, [5, 10**40], "\n\t " * 50, "🙂" * 40),
    ]
    options = ["max_tokens", "stream", "temperature", "top_p", "seed", "n", "stop", "model", "user", "text"]
    raw = [
        b"",
        b"null",
        b"[" * 100_000,
        b'{"prompt":' * 20_000,
        b'{"text": "\xff\xfe"}',
        b'{"text": "\\ud800"}',
        b'{"prompt": "a", "max_tokens": NaN}',
        b'{"prompt": "a", "temperature": -Infinity}',
        b'{"prompt": "a", "top_p": NaN}',
        b'{"prompt": "a", "seed": ' + b"9" * 6000 + b"}",
        b'{"prompt": [' + b"9" * 4000 + b"]}",
        b'{"prompt": "a", "max_tokens": 1e2}',
        b'{"text": "a", "text": 5}',
        b'\xef\xbb\xbf{"text": "a"}',
        '{"text": "a"}'.encode("utf-16"),
        json.dumps({"text": "word " * 60_000}).encode(),
        json.dumps({"text": "a" * 300_000}).encode(),
    ]
    found = [(path, body) for path in ("completions", "classify") for body in raw]
    while len(found) < 500:
        path = draw.choice(("completions", "classify"))
        main = "prompt" if path == "completions" else "text"
        body = {main: draw.choice([*odd, *["Hello"] * len(odd)])}
        body |= {"max_tokens": 2} if main == "prompt" else {}
        body |= {draw.choice(options): draw.choice(odd)} if draw.random() < 0.4 else {}
        changed = bytearray(
            json.dumps(body, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
        )
        for _ in range(draw.choice((0, 0, 1, 4))):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        found.append((path, bytes(changed)))
    return found


def test_no_body_is_a_fault_of_the_server(stubbed, capfd):
    counts = {}
    with ThreadPoolExecutor(4) as pool:
        ask_one = lambda pair: stream_or_answer(stubbed.port, f"/v1/{pair[0]}", pair[1])
        answers = list(pool.map(ask_one, broken_bodies(random.Random(11))))
    assert len(answers) == 500
    for status, content in answers:
        counts[status] = counts.get(status, 0) + 1
        assert not [word for word in (b"Traceback", b".py", str(ROOT).encode()) if word in content]
        assert status == 200 or set(json.loads(content)["error"]) == {"message", "type", "param", "code"}
    assert set(counts) == {200, 400, 404}  # 404: another model
    assert min(counts[200], counts[400]) > 50, counts
    until(stubbed.idle)
    assert "Traceback" not in capfd.readouterr().err


def stream_or_answer(port: int, path: str, body: bytes) -> tuple[int, bytes]:
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head.encode() + body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, content = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), content


# Too many, too late


def test_what_is_over_the_queue_is_told_to_come_again():
    backend = Steps(most=2)
    with Here(stub(backend), max_queue=3) as here, contextlib.ExitStack() as stack:
        backend.go.clear()
        for number in range(5):
            stack.enter_context(here.begin("/v1/completions", SHORT))
            until(
                lambda n=number: len(here.engine.open) == n + 1 and len(here.engine.at_work) == min(n + 1, 2)
            )
        assert here.engine.queued == 3
        status, headers, answer = here.ask("/v1/completions", SHORT)
        assert (status, headers["retry-after"]) == (429, "1")
        assert answer["error"]["type"] == "overloaded_error"
        with pytest.raises(openai.RateLimitError):
            client_of(here).completions.create(model="served", prompt="a", stream=True)
        assert here.ask("/health")[0] == 200
        assert "requests_queued 3.0" in here.ask("/metrics")[2]
        backend.go.set()
        until(here.idle)
        assert here.ask("/v1/completions", SHORT)[0] == 200


@pytest.mark.parametrize("stuck", [False, True], ids=["waiting", "engine at something long"])
def test_what_is_late_is_given_up(stuck, monkeypatch):
    monkeypatch.setattr(app, "LATE", 0.1)
    backend = Steps(most=1)
    with Here(stub(backend), deadline_seconds=0.2) as here:
        backend.go.clear()
        if stuck:
            monkeypatch.setattr(backend, "turn", lambda _: backend.go.wait())
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(here.ask, "/v1/completions", SHORT) for _ in range(2)]
            assert [answer.result()[0] for answer in both] == [504, 504]
        backend.go.set()
        monkeypatch.undo()
        until(here.idle)
        backend.go.clear()
        with pytest.raises(openai.APIError, match="deadline"):
            list(client_of(here).completions.create(model="served", prompt="a", stream=True))
        until(here.idle)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("at_work", [False, True])
def test_a_client_that_leaves_frees_its_place(streamed, at_work):
    backend = Steps(most=1)
    with Here(stub(backend), max_queue=2, deadline_seconds=1000) as here:
        for _ in range(4):  # more than the queue holds, one after the other
            backend.go.clear()
            with contextlib.ExitStack() as stack:
                if not at_work:
                    stack.enter_context(here.begin("/v1/completions", ENDLESS))
                    until(lambda: here.engine.at_work)
                with here.begin("/v1/completions", ENDLESS | {"stream": streamed}):
                    until(lambda: len(here.engine.open) == 2 - at_work)
                    until(lambda: bool(here.engine.waiting) != at_work)
                until(lambda: len(here.engine.open) == 1 - at_work)
            until(here.idle)
        backend.go.set()
        assert here.ask("/v1/completions", SHORT)[0] == 200


def test_a_client_that_leaves_in_the_midst_of_a_stream_frees_its_place(stubbed):
    backend, endless = stubbed.engine.backend, ENDLESS | {"stream": True}
    with stubbed.begin("/v1/completions", endless) as connection:
        until(lambda: b"data: " in connection.recv(4096))
        backend.go.clear()
    until(stubbed.idle)
    backend.go.set()


def test_a_client_that_never_reads_is_given_up():
    async def main() -> list[engine.Request]:
        service = await stub(Steps(most=1))(app.Limits(deadline_seconds=0.1))
        requests = [engine.Request([5], 400, seconds=1000), engine.Request([5], 400, seconds=1000)]
        service.submit(requests)
        served = service.served
        events = app.stream(requests, {}, usage=True, text_of=served.text)
        never = asyncio.get_running_loop().create_future()
        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        with pytest.raises(ClientDisconnect):
            await app.Stream(service, requests, events)(scope, lambda: never, lambda _: never)
        await service.engine.stop()
        return requests

    assert {request.finish for request in asyncio.run(main())} <= {"abandoned", "length"}


# Slow and broken clients


def closed(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            received += part
    return received


def test_half_a_body_is_not_waited_for(stubbed, monkeypatch):
    monkeypatch.setattr(app, "BODY_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", stubbed.port), timeout=60) as connection:
        connection.sendall(b'POST /v1/classify HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{"te')
        assert b" 408 " in closed(connection)


@pytest.mark.parametrize("sent", [b"", b"POST /v1/cl", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /he"])
def test_half_a_head_is_not_waited_for(stubbed, sent, monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", stubbed.port), timeout=60) as connection:
        connection.sendall(sent)
        assert (b" 200 " in closed(connection)) == (b"/health" in sent)


def test_a_head_without_end_is_cut_off(stubbed):
    with socket.create_connection(("127.0.0.1", stubbed.port), timeout=60) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        with pytest.raises(OSError, match=r"reset|pipe"):
            connection.sendall((b"X-Name: " + b"a" * 10_000 + b"\r\n") * 10_000)
    assert stubbed.ask("/health")[0] == 200


def test_what_is_no_http_is_refused(stubbed):
    for sent in (b"\x16\x03\x01" + b"\x00" * 200, b"GET\r\n\r\n", b"POST /v1/classify HTTP/9.9\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", stubbed.port), timeout=60) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            assert b" 400 " in closed(connection)
    assert stubbed.ask("/health")[0] == 200


# A flood


async def flood(url: str, rate: float, seconds: float) -> dict:
    """How many of `rate` requests a second were answered with which status, or with none."""
    counts, loop = {}, asyncio.get_running_loop()
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(120)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:

        async def one() -> None:
            try:
                async with session.post("/v1/completions", json=SHORT) as response:
                    await response.read()
                    status = response.status
            except (aiohttp.ClientError, TimeoutError) as error:
                status = type(error).__name__
            counts[status] = counts.get(status, 0) + 1

        began = loop.time()
        async with asyncio.TaskGroup() as group:
            for number in range(int(rate * seconds)):
                await asyncio.sleep(began + number / rate - loop.time())
                group.create_task(one())
    return counts


def test_of_a_flood_every_request_is_answered_or_refused():
    backend = Steps(most=2, seconds=0.02)  # 2 requests of 4 tokens in 80 ms: 25 a second
    with Here(stub(backend), max_queue=20, deadline_seconds=0.6) as here:
        counts = asyncio.run(flood(here.url, rate=250, seconds=3))
        assert sum(counts.values()) == 750
        assert set(counts) <= {200, 429, 504}
        assert counts[200] > 10
        assert counts[429] > 300
        until(here.idle)
        assert here.ask("/v1/completions", SHORT)[0] == 200


# A model that fails


def test_of_a_turn_that_fails_those_at_work_pay_and_others_go_on(capfd):
    backend = Steps(most=2)
    with Here(stub(backend)) as here:
        for _ in range(4):  # more than FAILURES, but not in a row
            backend.go.clear()
            with ThreadPoolExecutor(4) as pool:
                asked = [pool.submit(here.ask, "/v1/completions", SHORT) for _ in range(4)]
                until(lambda: len(here.engine.open) == 4 and len(here.engine.at_work) == 2)
                backend.errors = [RuntimeError(f"secret of {ROOT}")]
                until(lambda: not backend.errors)
                backend.go.set()
                answers = [future.result() for future in asked]
            assert sorted(status for status, _, _ in answers) == [200, 200, 500, 500]
            assert not [answer for _, _, answer in answers if "secret" in str(answer)]
        assert backend.resets == 4
        assert here.ask("/health")[0] == 200
        assert not hasattr(backend, "gave_up")
    assert "secret of" in capfd.readouterr().err  # for who runs it


def test_a_prompt_that_the_model_fails_at_does_not_end_the_server():
    with Here(stub(Steps())) as here:
        for _ in range(4):
            assert here.ask("/v1/completions", {"prompt": [666]})[0] == 500
            assert here.ask("/v1/completions", SHORT)[0] == 200
        backend = here.engine.backend
        backend.errors = [RuntimeError()]
        assert here.ask("/v1/completions", SHORT)[0] == 500
        until(lambda: backend.resets == 5)
    assert not hasattr(backend, "gave_up")  # though it ends after a failure


def test_after_three_failures_in_a_row_it_gives_up():
    backend = Steps(most=1)
    backend.errors = [RuntimeError()] * 3
    with Here(stub(backend)) as here:
        assert [here.ask("/v1/completions", SHORT)[0] for _ in range(3)] == [500] * 3
        until(lambda: hasattr(backend, "gave_up"))
        assert here.ask("/v1/completions", SHORT)[0] == 503
        assert here.ask("/health")[::2] == (503, {"status": "failing"})


def test_a_fault_of_the_app_shows_a_client_nothing_of_it(stubbed, monkeypatch, capfd):
    def fail(_):
        raise RuntimeError(f"secret of {ROOT}")

    monkeypatch.setattr(stubbed.service.served, "prompt", fail)
    status, _, answer = stubbed.ask("/v1/classify", {"text": "a"})
    assert (status, answer["error"]["message"]) == (500, "the server failed")
    until(lambda: "secret of" in capfd.readouterr().err)


# The script


class Alone(subprocess.Popen):
    """A process, with the names that multiprocessing has for its doings."""

    exitcode = property(lambda self: self.returncode)

    def join(self, timeout: float) -> None:
        self.wait(timeout)


def start_alone(script: str, *flags: object, stdout: str, stderr: str):
    """As `start_preloaded`, but not forked: uvicorn makes its workers out of the script that was started."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    return Alone(command, stdout=open(stdout, "w"), stderr=open(stderr, "w"))


@contextlib.contextmanager
def serving(run: Path, *flags: object, script: str | Path = SCRIPT):
    """The script on a port that is free, once every worker has answered: process, port, what it said so far,
    and its errors."""
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as errors:
        begin_script = start_alone if "--workers" in flags else start_preloaded
        process = begin_script(script, run, "--port", 0, *flags, stdout=out.name, stderr=errors.name)
        said, faults = lambda: Path(out.name).read_text(), lambda: own_lines(Path(errors.name).read_text())
        try:
            until(lambda: said().count("ready ") == (2 if "--workers" in flags else 1), 300)
            port = int(re.search(r"listening .*:(\d+) ", said())[1])
            until(lambda: not refuses(port))
            yield process, port, said, faults
        finally:
            process.terminate()
            process.join(120)


def own_lines(errors: str) -> str:
    """Without what a library says of the kernels that it lacks."""
    return "".join(line for line in errors.splitlines(keepends=True) if "Failed to load CPU" not in line)


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=60).close()
    except ConnectionError:
        return True
    return False


def begin_stream(port: int) -> socket.socket:
    """A connection on which an answer has begun."""
    connection = begin(port, "/v1/completions", {"prompt": "a", "max_tokens": 60, "stream": True})
    assert b" 200 " in connection.recv(1024)
    return connection


def ends_well(process, port: int, under_way: list[socket.socket]) -> bool:
    """By SIGTERM: no new requests, those under way are answered, status 0."""
    process.terminate()
    until(lambda: refuses(port))
    whole = [closed(connection).rstrip().endswith(b"[DONE]\n\n\r\n0") for connection in under_way]
    process.join(120)
    return all(whole) and process.exitcode == 0


def test_labels_and_confidences_are_those_of_the_runs_predictions_and_it_ends_when_all_is_answered(run):
    [predictions] = run.glob("predictions*.jsonl")
    expected = [json.loads(line) for line in predictions.read_text().splitlines()]
    posts = [json.loads(line) for line in POSTS.read_text().splitlines()]
    with serving(run, "--served_model_name", "named") as (process, port, said, faults):
        answers = [ask(port, "/v1/classify", {"text": posts[row["index"]]["text"]})[2] for row in expected]
        assert [answer["label"] for answer in answers] == [row["parsed"] for row in expected]
        assert [answer["confidence"] for answer in answers] == [row["confidence"] for row in expected]
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["named"]
        assert client.completions.create(model="named", prompt="a", max_tokens=3).usage.completion_tokens <= 3
        assert ends_well(process, port, [begin_stream(port) for _ in range(2)])
        assert faults() == ""
        assert "warning" not in said()


def children_of(process) -> set[int]:
    """Those of its child processes that serve."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return {int(pid) for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()}


@pytest.mark.parametrize(("seconds", "ends"), [(0, True), (protocol.WITHIN, False)])
def test_a_worker_whose_model_keeps_failing_is_replaced_twice_within_ten_minutes(monkeypatch, seconds, ends):
    """By processes that end at once as such a worker does; `seconds` pass between two of them."""

    class Failing:
        def __init__(self, *_):
            self.process = multiprocessing.get_context("fork").Process(
                target=os._exit, args=(protocol.GAVE_UP,)
            )
            self.start, self.join = self.process.start, self.process.join

        @property
        def exitcode(self):
            return self.process.exitcode

    monkeypatch.setattr("uvicorn.supervisors.multiprocess.signal.signal", lambda *_: None)  # this process's
    workers = protocol.Workers(argparse.Namespace(workers=1), [])
    workers.processes = [Failing()]
    workers.processes[0].start()
    for i in range(protocol.GIVE_UPS):
        assert not workers.failed
        monkeypatch.setattr(protocol.time, "monotonic", lambda now=i * seconds: now)
        workers.processes[0].join()
        workers.keep_subprocess_alive()
    assert (workers.failed, workers.should_exit.is_set()) == (ends, ends)


def test_of_two_workers_one_is_killed_and_comes_back_and_both_end_when_all_is_answered(run):
    with serving(run, "--workers", 2) as (process, port, said, faults):
        statuses, over, workers = [], threading.Event(), children_of(process)
        with ThreadPoolExecutor(2) as pool:
            load = [pool.submit(keep_asking, port, over, statuses) for _ in range(2)]
            until(lambda: statuses.count(200) > 8)
            os.kill(min(workers), signal.SIGKILL)
            until(lambda: said().count("ready ") == 3, 300)
            over.set()
            assert not [future.exception() for future in load if future.exception()]
        assert {*statuses} <= {200, "failed"}
        assert statuses.count("failed") <= 2  # what was under way there
        assert len(children_of(process)) == 2
        until(lambda: "requests_at_work 0.0" in ask(port, "/metrics")[2])  # the killed one is not counted
        assert ends_well(process, port, [begin_stream(port) for _ in range(4)])
        assert faults() == ""


def keep_asking(port: int, over: threading.Event, statuses: list, key: str | None = None) -> None:
    """One request after the other, with the pauses of a client that has other work."""
    while not over.wait(0.05):
        try:
            statuses.append(ask(port, "/v1/completions", {"prompt": "a", "max_tokens": 5}, key)[0])
        except (OSError, http.client.HTTPException, ValueError):  # cut off, or with an answer that is none
            statuses.append("failed")


def test_a_model_that_keeps_failing_ends_the_server_in_one_line(run, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(root=ROOT, script=ROOT / SCRIPT))
    with serving(run, script=script) as (process, port, _, faults):
        for _ in range(2):
            assert ask(port, "/v1/classify", {"text": "a"})[0] == 500
        with contextlib.suppress(OSError, http.client.HTTPException):  # it may be gone before it answers
            ask(port, "/v1/classify", {"text": "a"})
        process.join(60)
        assert process.exitcode == 1
        lines = faults().splitlines()
        assert lines[-1] == "error: the model keeps failing: the server stops"
        assert len([line for line in lines if line.startswith("error")]) == 1


FAILING = """
import runpy, sys
sys.path.insert(0, "{root}")
from serving import engine
def turn(*words, whole=engine.Plain.turn):
    engine.Plain.turn = fail
    whole(*words)
def fail(*_):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
engine.Plain.turn = turn
runpy.run_path("{script}", run_name="__main__")
"""


# What it does not start with


def refused(*words: object) -> str:
    """The one line of a script that does not start."""
    done = run_preloaded(*words)
    return error_line(
        subprocess.CompletedProcess(words, done.returncode, done.stdout, own_lines(done.stderr))
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "65536"], "65536 is not between 0 and 65535"),
        (["--port", "http"], "http is not between 0 and 65535"),
        (["--workers", "0"], "0 is not 1 or more"),
        (["--max_queue", "-1"], "-1 is not 1 or more"),
        (["--deadline_seconds", "0"], "0 is not above 0"),
        (["--merge", "maybe"], "invalid choice"),
        (["--api_key_file", "nowhere"], "--api_key_file nowhere can't be read"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid --port 8000 can't be listened at"),
    ],
    ids=lambda value: value[0][2:] if isinstance(value, list) else "",
)
def test_flags_that_are_wrong_are_named(run, flags, words):
    done = run_preloaded(SCRIPT, run, *flags)
    assert done.returncode == (1 if "can't be" in words else 2)
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("taken", [True, False], ids=["taken", "not this machine's"])
def test_an_address_that_is_not_to_be_had_is_named(run, taken):
    with socket.create_server(("127.0.0.1", 0)) as other:
        flags = ("--port", other.getsockname()[1]) if taken else ("--port", 0, "--host", "192.0.2.1")
        assert "can't be listened at" in refused(SCRIPT, run, *flags)


def about(folder: Path, **changes: object) -> None:
    """Write or change what an export says of itself."""
    path = folder / "export.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


FOLDERS = {
    "is neither a run": lambda folder: (folder / "train.json").unlink(),
    "lacks": lambda folder: about(folder, task="classification"),
    "export.json is damaged": lambda folder: (folder / "export.json").write_text("{"),
    "is not a JSON object": lambda folder: (folder / "export.json").write_text("[]"),
    "another prompt": lambda folder: about(folder, **WHOLE, prompt_sha256="0"),
    "lacks task": lambda folder: about(folder, **WHOLE | {"task": "poetry"}, prompt_sha256="0"),
    "lacks max_seq_length": lambda folder: about(folder, **WHOLE | {"max_seq_length": "9"}, prompt_sha256=""),
    "is not the file": lambda folder: about(folder, **WHOLE | {"weights": {"a": ""}}, prompt_sha256=SHA256),
    "is not the adapter": change_adapter,
}
WHOLE = {"max_seq_length": 512, "max_new_tokens": 20, "weights": {}, "task": "classification"}

SHA256 = prompt_sha256("classification", "instruction")


@pytest.mark.parametrize("words", FOLDERS)
def test_a_folder_that_holds_no_whole_model_is_named(run, tmp_path, words):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    FOLDERS[words](folder)
    assert words in refused(SCRIPT, folder, "--port", 0)
    shutil.rmtree(folder)
    assert "there is no such folder" in refused(SCRIPT, folder)


def test_two_adapters_mixed_up_are_not_served(run, tmp_path):
    other = run_of(DEMO_MODEL, tmp_path / "other", targets=["q_proj"])
    shutil.rmtree(other / "adapter")
    shutil.copytree(run / "adapter", other / "adapter")
    assert "is not the adapter" in refused(SCRIPT, other, "--port", 0)


def test_an_export_with_the_weights_of_another_is_not_served(run, tmp_path):
    done = run_preloaded("serving/export.py", run, "--output_dir", tmp_path / "export")
    assert done.returncode == 0, done.stderr
    [weights] = (tmp_path / "export").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "is not the file that export.json tells of" in refused(SCRIPT, tmp_path / "export", "--port", 0)


def test_it_listens_to_this_machine_alone_and_warns_where_it_does_not(capsys):
    from serving import serve_flags

    assert serve_flags.parser("").parse_args(["run"]).host == "127.0.0.1"
    for host, key, words in (
        ("127.0.0.1", None, ""),
        ("0.0.0.0", None, "open to anybody who reaches it"),
        ("::", "file", "open to whoever has the key"),
    ):
        serve_flags.warn_of_strangers(argparse.Namespace(host=host, api_key_file=key))
        said = capsys.readouterr().out
        assert (words in said) == bool(words or not said)


@pytest.mark.parametrize("script", ["serve_fastapi.py", "serve_ray.py"])
def test_what_is_not_installed_is_said_in_one_line(script):
    code = (
        "import runpy, sys; sys.modules['fastapi'] = None; path = sys.argv[1]; "
        "sys.argv = [path, 'run']; runpy.run_path(path, run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(ROOT / "serving" / script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert error_line(done) == "error: fastapi is not installed: pip install -r requirements-serving.txt"
