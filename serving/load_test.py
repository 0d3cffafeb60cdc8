"""Load a server at rising rates, and find the highest that it sustains.

    python serving/load_test.py --url http://127.0.0.1:8000 --rates 1,2,4,8,16 --seconds 30 \\
        --test_file test.jsonl --pretrained_ckpt llama-2-7b --price_per_hour 4
    python serving/load_test.py --url http://127.0.0.1:8080 --api tgi --server tgi --rates 1,2,4 \\
        --prompts_file prompts.jsonl

The load is open: a request is sent when it is due, whatever became of those before. Rates go up to the first
that is not sustained (an error, less than 95 % served, or p90 over --slo_seconds); then the middle between
that and the last good one is tried, --bisections times. Latency counts from when a request was due, over all
requests, a failure as the timeout at least; every answer is waited for. It leaves serve-HASH.json, the
record, and requests-HASH.jsonl, one line for each request, in --output_dir; python -m study.report DIR makes
tables of these.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prompts import prompt_sha256
from serving import client, load_flags, load_prompts, load_shown, measuring
from serving.load_prompts import Prompt
from study import checkpoint, cli, data, device, tokens
from study.errors import UserError
from study.records import cost, record, runs
from study.records.schema import READ, SCHEMA, lookup

SETTINGS = (  # that name a sweep
    *("url", "api", "model", "task", "prompts_file", *READ, "test_file", "max_eval_samples"),
    *("prompt_tokens", "rates", "seconds", "bisections", "arrivals", "seed", "repeat_prompts", "stream"),
    *("timeout_seconds", "slo_seconds", "max_lag_seconds"),
)
LOCAL = ("localhost", "127.0.0.1", "::1")


def main(process: device.Process) -> None:
    args = load_flags.parse(__doc__)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {"server": args.server} if args.server else {}  # which older records have not
    path = Path(args.output_dir) / f"serve-{record.short_hash(settings)}.json"
    if args.not_started:
        return write_not_started(path, args, process)
    key = load_flags.read_key(args.api_key_file)
    name, source = load_prompts.read_source(args)
    with record.locked(path.parent, process, "--output_dir"):
        before = None if args.force else record.read(record.beside(path)) or record.read(path)
        if lookup(before, "serve.rates"):  # else nothing was measured
            runs.check_same_data(before.get("data"), {name: source.describe()}, path)
        if before and before["status"] == "finished":
            return print(f"finished   {path}\n{load_shown.result_block(before)}")

        prompts = load_prompts.build(source, args)
        server = client.Server(
            args.url, args.api, args.model, args.max_new_tokens, args.stream, args.timeout_seconds, key
        )
        server = client.run(reach(server, prompts[0].text))
        with recording(path, args, process, before) as content:
            content["model"] = server.model or args.url
            content["data"] = {name: source.describe()}
            content["checkpoint"] = weights_of(args)
            if not args.prompts_file:
                content["prompt_sha256"] = prompt_sha256(args.task, "instruction")
            texts = [prompt.text for prompt in prompts]
            content["serve"] |= {"prompts": len(texts), "prompts_sha256": tokens.sha256_of(texts)}
            device.pass_over_libraries()
            say_sweep(args, server, prompts, content["serve"]["rates"])
            sweep(server, prompts, labels_of(source, args), content, path, args, process)
        record.beside(rows_beside(path)).unlink(missing_ok=True)
    print(load_shown.result_block(content))


def rows_beside(path: Path) -> Path:
    """requests-HASH.jsonl of a serve-HASH.json."""
    return path.with_name(path.name.replace("serve", "requests", 1) + "l")


async def reach(server: client.Server, prompt: str) -> client.Server:
    """The server with the name of its model, once it has answered one request."""
    client.more_files()
    if server.api == "openai" and server.model is None:
        server = replace(server, model=await client.served_model(server))
    await client.check(server, prompt)
    return server


@contextlib.contextmanager
def recording(
    path: Path, args: argparse.Namespace, process: device.Process, before: dict | None
) -> Iterator[dict]:
    """Yield the record of a sweep to fill, with the rates of the record `before` that are not void; write it
    at the end as finished, void or how it failed. Out of the block come only UserError and
    KeyboardInterrupt."""
    content = begun(path, args, process, before)
    try:
        fill(content, args, process)
        yield content
        record.close(path, content | {"status": "finished"})
    except Void as error:
        record.close(path, content | {"status": "void"})
        raise UserError(str(error)) from None
    except (Exception, KeyboardInterrupt) as error:
        content |= record.describe_error(error)
        with contextlib.suppress(UserError):  # the error at hand says more than that it can't be recorded
            record.close(path, content)
        if isinstance(error, UserError | KeyboardInterrupt):
            raise
        raise UserError(f"{content['error']['message']}; {content['error']['advice']}") from error


def begun(path: Path, args: argparse.Namespace, process: device.Process, before: dict | None) -> dict:
    """What is known of a sweep before it begins, with what the record `before` has measured."""
    part = (before or {}).get("serve") or {"rates": [], "wall_seconds": 0}
    kept = [step for step in part["rates"] if step["status"] != "void"]
    where = {"url": args.url, "api": args.api, "server": args.server}
    return {
        "schema": SCHEMA,
        "status": "running",
        "script": process.script,
        "task": args.task,
        "config": dict(vars(args)),
        "config_hash": path.stem.removeprefix("serve-"),
        "started": (before or {}).get("started") or record.utc(process.started),
        "serve": {**where, "rates": kept, "earlier_seconds": part["wall_seconds"]},
    }


def write_not_started(path: Path, args: argparse.Namespace, process: device.Process) -> None:
    """Record a sweep as failed for --not_started, so that tables show a gap and why. A finished sweep stays;
    rates that were measured are kept, for a server that does start."""
    with record.locked(path.parent, process, "--output_dir"):
        before = record.read(record.beside(path)) or record.read(path)
        if before and before["status"] == "finished":
            return print(f"finished   {path}: it stays as it is")
        content = begun(path, args, process, before)
        content |= {"model": args.model or args.url} | {
            name: before[name] for name in ("model", "data") if name in (before or {})
        }
        fill(content, args, process)
        advice = "start the server, then the same command without --not_started"
        error = {"type": "NotStarted", "message": args.not_started, "advice": advice}
        record.close(path, content | {"status": "failed", "error": error})
    print(f"failed     {path}: {args.not_started}")


class Void(Exception):
    """A run that says nothing of the server."""


def sweep(
    server: client.Server,
    prompts: Sequence[Prompt],
    labels: Sequence[str],
    content: dict,
    path: Path,
    args: argparse.Namespace,
    process: device.Process,
) -> None:
    """Try one rate after the other, and keep each in the record `content` as soon as it is measured; the rows
    stand beside their place until the end. Raises Void where a rate says nothing of the server."""
    steps, file = content["serve"]["rates"], rows_beside(path)
    so_far = record.beside(file)
    rows = kept_rows(so_far, [step["rate"] for step in steps])
    while True:
        tried = {step["rate"]: step["status"] == "sustained" for step in steps}
        rate = measuring.next_rate(tried, args.rates, args.bisections)
        if rate is None:
            return record.write_rows(file, rows)
        step, more = one_run(server, prompts, labels, rate, args)
        rows += more
        record.write_rows(so_far, rows)
        steps.append(step)
        fill(content, args, process)
        record.write_json(record.beside(path), content)
        if step["status"] == "void":
            best = measuring.sustained(tried)
            so_far = f"; sustained so far: {best:g} requests/s" if best else ""
            raise Void(f"void at {rate:g} requests/s: {step['why']}{so_far}")
        print(load_shown.say_step(step), flush=True)


def one_run(
    server: client.Server,
    prompts: Sequence[Prompt],
    labels: Sequence[str],
    rate: float,
    args: argparse.Namespace,
) -> tuple[dict, list[dict]]:
    """What a record says of one rate, and the rows of its requests."""
    due = measuring.arrivals(args.arrivals, rate, args.seconds, args.seed)
    drawn = load_prompts.draw(prompts, len(due), rate, args)
    if drawn is None:
        why = (
            f"{len(due):,} requests and {len(prompts):,} prompts: give more of these, --repeat_prompts or "
            "fewer --seconds"
        )
        return {"rate": rate, "status": "void", "why": why}, []
    from tqdm import tqdm

    with tqdm(total=len(due), desc=f"{rate:g}/s", leave=False, disable=not sys.stderr.isatty()) as bar:
        counts = client.run(client.cache_counts(server))
        rows = client.run(client.send_all(server, [prompt.text for prompt in drawn], due, bar.update))
        cached = measuring.cached_share(counts, client.run(client.cache_counts(server)))
    rows = [
        {"rate": rate, "row": prompt.number, **row, "reference": prompt.reference}
        for prompt, row in zip(drawn, rows, strict=True)
    ]
    measured = measuring.measure(rows, args.seconds, args.timeout_seconds)
    void = measuring.why_void(measured, args.max_lag_seconds)
    why = void or measuring.why_not_sustained(measured, args.slo_seconds)
    status = "void" if void else "not sustained" if why else "sustained"
    step = {"rate": rate, "status": status, "why": why, **measured, "cached_prompt_share": cached}
    return step | scores(rows, labels, args.task), rows


def scores(rows: Sequence[dict], labels: Sequence[str], task: str) -> dict:
    """`scored` and `metrics` of the answers that came and have a reference; a failure is no wrong answer.
    Intervals hold for answers to different prompts alone."""
    from study import metrics  # here, so that bad input answers at once

    rows = [row for row in rows if row["status"] == "ok" and row["reference"] is not None]
    if not rows:
        return {"scored": 0, "metrics": {}}
    columns = [[row[name] for row in rows] for name in ("answer", "reference")]
    found, _ = metrics.score(task, *columns, labels)
    if len({row["row"] for row in rows}) < len(rows):
        found["metrics"] = {name: metric | {"ci95": None} for name, metric in found["metrics"].items()}
    return {"scored": len(rows), "metrics": found["metrics"], "metrics_version": found["metrics_version"]}


def labels_of(source: data.Split, args: argparse.Namespace) -> list[str]:
    """The classes that an answer may name: those of the source."""
    if args.task != "classification":
        return []
    return sorted({reference for _, reference in source.examples if reference is not None})


def kept_rows(file: Path, rates: Sequence[float]) -> list[dict]:
    """The rows of the rates that are recorded, of an earlier start."""
    if not rates:
        return []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if row["rate"] in rates]
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"{file} can't be read ({error}): --force begins the sweep anew") from None
    return rows


def fill(content: dict, args: argparse.Namespace, process: device.Process) -> None:
    """Set what the record says of the whole sweep so far."""
    part = content["serve"]
    used = [step for step in part["rates"] if step["status"] != "void"]
    tried = {step["rate"]: step["status"] == "sustained" for step in used}
    part["sustained"] = measuring.sustained(tried)
    part["knee"] = not all(tried.values())
    part["requests"] = sum(step["requests"] for step in used)
    part["seconds"] = sum(step["seconds"] for step in used)
    part["wall_seconds"] = part["earlier_seconds"] + process.seconds()
    content["cost"] = cost.of(args, device_of(args), part["wall_seconds"])


def device_of(args: argparse.Namespace) -> str:
    """That the server runs on, as far as this machine knows."""
    return device.name() if urlsplit(args.url).hostname in LOCAL else "unknown"


def weights_of(args: argparse.Namespace) -> dict:
    """`checkpoint.is_random` by the configuration beside --pretrained_ckpt's tokenizer, if one is there."""
    folder = checkpoint.folder_of(args.pretrained_ckpt) if args.pretrained_ckpt else None
    path = folder and folder / "config.json"
    return checkpoint.is_random(checkpoint.read_json(path, str(folder))) if path and path.is_file() else {}


def say_sweep(args: argparse.Namespace, server: client.Server, prompts: Sequence, steps: Sequence) -> None:
    """What is about to be done, what of it is recorded, and the head of the table."""
    streamed = ", streamed" if args.stream else ""
    named = f"{args.server}, " if args.server else ""
    print(f"server     {named}{server.place}, model {server.model or 'its own'}{streamed}")
    print(f"load       {args.arrivals} arrivals, {args.seconds:g} s a rate, {len(prompts):,} prompts")
    cost.say_ambiguity(args, device_of(args))
    print(load_shown.HEAD)
    for step in steps:
        print(f"{load_shown.say_step(step)} (recorded)")


if __name__ == "__main__":
    cli.run_script(main)
