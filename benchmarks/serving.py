"""How fast a fine-tuned model can be served: prompts answered as one set, by the server's engine without
HTTP, and by its HTTP side without a model.

    python -m benchmarks.serving RUN --test_file posts.jsonl --output serving.json

The prompts are those of the load test: test texts near --prompt_tokens, drawn with repetition. Answers are
free, of --new tokens at most. The sustained rate over HTTP is serving/load_test.py's, on the same prompts.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path

from benchmarks.provenance import headline, provenance
from serving import app, engine, load_flags, load_prompts, measuring, served, start
from study import device

ROUNDS = 3
HTTP_RATES = (250, 500, 1000, 2000)


class Nothing:
    """A backend that answers every prompt at once with as many tokens as asked for."""

    def __init__(self):
        self.requests: list = []

    @property
    def busy(self) -> bool:
        return bool(self.requests)

    def join(self, request) -> bool:
        self.requests.append(request)
        return True

    def leave(self, request) -> None:
        self.requests.remove(request)

    def reset(self) -> None:
        self.requests = []

    def turn(self, tell) -> None:
        done, self.requests = self.requests, []
        for request in done:
            request.answer += request.tokens[:1] * request.max_new_tokens
            request.finish = "length"
        tell(done)


def main() -> None:
    args = parse()
    loaded = served.load(Path(args.run), "model", "auto")
    flags = ["--url", "http://x", "--rates", "1", "--task_type", loaded.task, "--test_file", args.test_file]
    flags += ["--pretrained_ckpt", loaded.settings.pretrained_ckpt, "--max_new_tokens", str(args.new)]
    flags += ["--prompt_tokens", str(args.prompt_tokens), "--repeat_prompts"]
    flags = load_flags.parse("", flags)
    prompts = load_prompts.build(load_prompts.read_source(flags)[1], flags)
    texts = [prompt.text for prompt in load_prompts.draw(prompts, args.examples, 1, flags)]
    rows = [loaded.tokens(text) for text in texts]
    result = provenance() | {"run": args.run, "new": args.new, "examples": len(rows), "prompts": len(prompts)}
    result["prompt_tokens"] = statistics.mean(map(len, rows))
    result["tokenizing_seconds_each"] = timed(lambda: [loaded.tokens(text) for text in texts[:500]]) / 500
    modes = {
        "http": lambda: asyncio.run(http(loaded, texts, args.new)),
        "offline": lambda: offline(loaded, rows, args.new),
        "engine": lambda: asyncio.run(by_engine(loaded, rows, args.new)),
        "arrivals": lambda: asyncio.run(by_arrivals(loaded, rows, args)),
    }
    result |= {mode: modes[mode]() for mode in args.modes.split(",")}
    print(headline(result))
    print(json.dumps({mode: result[mode] for mode in args.modes.split(",")}, indent=1))
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="a finished run or an export")
    parser.add_argument("--test_file", required=True, help="texts, as of the scripts")
    parser.add_argument("--new", type=int, default=20, help="tokens of an answer")
    parser.add_argument("--prompt_tokens", type=int, default=100, help="of a prompt, a quarter more or less")
    parser.add_argument("--modes", default="http,offline,engine", help="what to measure; http alone on a CPU")
    parser.add_argument("--rates", default="200,300,350,400", help="of arrivals, requests a second")
    parser.add_argument("--seconds", type=float, default=6, help="of arrivals at a rate")
    parser.add_argument("--least", nargs="+", default=["1024,4"], help="tokens, turns: continuous.LEAST_*")
    parser.add_argument("--examples", type=int, default=3000, help="prompts")
    parser.add_argument("--output", help="JSON file for the result")
    return parser.parse_args()


def timed(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def offline(loaded, rows: list[list[int]], new: int) -> dict:
    """All prompts as one set, as scoring answers them."""
    import torch

    from study.fast.decode import Engine

    decoding = Engine(loaded.model, 0.92 * device.free_memory())
    prompts = dict(enumerate(rows))
    seconds = [timed(lambda: list(decoding.answers(prompts, new, loaded.ends))) for _ in range(ROUNDS + 1)]
    del decoding.cache, decoding.graphs
    torch.cuda.empty_cache()
    return rates(rows, seconds[1:])


async def by_engine(loaded, rows: list[list[int]], new: int) -> dict:
    """All prompts given at once to the engine that joins and leaves between steps."""
    made = engine.Engine(start.backend_of(loaded, 1.0, None), len(rows))
    seconds = []
    for _ in range(ROUNDS + 1):
        requests = [engine.Request(row, new, seconds=600) for row in rows]
        began = time.perf_counter()
        made.submit(requests)
        await asyncio.gather(*(request.done for request in requests))
        seconds.append(time.perf_counter() - began)
        assert all(request.finish in {"stop", "length"} for request in requests)
    await made.stop()
    return rates(rows, seconds[1:])


async def by_arrivals(loaded, rows: list[list[int]], args: argparse.Namespace) -> list[dict]:
    """Latencies of the engine at constant rates, without HTTP, for several ways of reading prompts."""
    from study.fast import continuous

    made, found = engine.Engine(start.backend_of(loaded, 1.0, None), len(rows)), []
    for least in args.least:
        continuous.LEAST_TOKENS, continuous.LEAST_TURNS = map(int, least.split(","))
        for rate in map(int, args.rates.split(",")):
            latencies = await arriving(made, rows, rate, args)
            percentiles = {f"p{p}": measuring.percentile(latencies, p) for p in (50, 90, 99)}
            found.append({"least": least, "rate": rate, "requests": len(latencies), **percentiles})
            print(found[-1], flush=True)
    await made.stop()
    return found


async def arriving(made: engine.Engine, rows, rate: int, args: argparse.Namespace) -> list[float]:
    """Seconds from when each request was due to its answer."""
    loop, tasks = asyncio.get_running_loop(), []
    began = loop.time()

    async def one(row: list[int], due: float) -> float:
        request = engine.Request(row, args.new, seconds=600)
        made.submit([request])
        await request.done
        return loop.time() - began - due

    for i in range(round(rate * args.seconds)):
        await asyncio.sleep(began + i / rate - loop.time())
        tasks.append(asyncio.create_task(one(rows[i % len(rows)], i / rate)))
    return await asyncio.gather(*tasks)


def rates(rows, seconds: list[float]) -> dict:
    return {
        "seconds": seconds,
        "examples_per_second": len(rows) / statistics.median(seconds),
        "prompt_tokens": sum(map(len, rows)),
    }


async def http(loaded, texts: list[str], new: int) -> list[dict]:
    """The server with a backend that takes no time, at rising rates, the client in a process of its own."""
    import contextlib

    import uvicorn

    sys.setswitchinterval(start.SWITCH)
    device.pass_over_libraries()
    made = app.Service(loaded, engine.Engine(Nothing(), 10_000), app.Limits(max_queue=10_000))

    @contextlib.asynccontextmanager
    async def started():
        yield made

    config = uvicorn.Config(app.build(started, made.limits), port=0, log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    found = []
    for rate in HTTP_RATES:
        used = time.process_time()
        row = await load(port, texts, rate, new)
        found.append(row | {"cpu_seconds_each": (time.process_time() - used) / row["requests"]})
        if row["served"] < 0.9 * rate:
            break
    server.should_exit = True
    await task
    await made.engine.stop()
    return found


async def load(port: int, texts: list[str], rate: float, new: int) -> dict:
    """What serving/client.py sees of one rate, for some seconds, in a process of its own."""
    code = (
        "import sys, json; from serving import client, measuring\n"
        "port, rate, new = map(int, sys.argv[1:]); texts = json.load(sys.stdin); client.more_files()\n"
        "server = client.Server(f'http://127.0.0.1:{port}', 'openai', None, new, False, 30)\n"
        "due = measuring.arrivals('constant', rate, 5, 0)\n"
        "texts = [texts[i % len(texts)] for i in range(len(due))]\n"
        "rows = client.run(client.send_all(server, texts, due, lambda: None))\n"
        "times = sorted(row['end'] - row['due'] for row in rows)\n"
        "good = sum(row['status'] == 'ok' for row in rows)\n"
        "lag = max(row['sent'] - row['due'] for row in rows)\n"
        "served = good / max(row['end'] for row in rows)\n"
        "print(json.dumps({'rate': rate, 'requests': len(rows), 'good': good, 'served': served, 'lag': lag,\n"
        "  'p50': times[len(times) // 2], 'p90': times[9 * len(times) // 10]}))\n"
    )
    client = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, str(port), str(rate), str(new)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await client.communicate(json.dumps(texts).encode())
    return json.loads(out)


if __name__ == "__main__":
    main()
