"""Tables and plots of load tests: by hand-made records worked out by hand, and by one real sweep."""

import json
import shlex
import sys
from pathlib import Path

import pytest
from conftest import PROCESS, run_script
from loaded_server import LoadedServer
from matplotlib.colors import to_rgb
from test_load import flags_for
from test_report import printed, report

from serving import load_flags, load_test, measuring
from study.records import record, schema
from study.report import serving_plots
from study.report.published import FIGURES
from study.report.sweeps import comparable_sweeps, find_sweeps

H100, LOAD = "NVIDIA H100 80GB HBM3", "Inference under load: cost, rate and latency, as the published study has them"
SUSTAINED = "Sustained: the highest rate that each server sustains, and how it answers there"
COSTS = "Cost under load: what the sustained rate costs"
PUBLISHED = "Inference, published: speed and cost to serve"
METRICS = {"accuracy": {"value": 75.0, "ci95": [60.0, 86.0]}, "rouge1": {"value": 40.0, "ci95": [38.0, 42.0]}}


def step(rate: float, share: float = 1.0, p90: float = 0.5, seconds: float = 30, **more) -> dict:
    """What a record says of a rate of which `share` is served: 100 tokens in and 5 out of each request."""
    count = round(rate * seconds)
    places = {"mean": 0.6 * p90, "p50": 0.5 * p90, "p90": p90, "p99": 2 * p90}
    took = count / (rate * share)
    return {
        **{"rate": rate, "status": "sustained" if share >= 0.95 else "not sustained"},
        "why": None if share >= 0.95 else f"{100 * share:.1f} % of the offered rate were served",
        **{"requests": count, "answered": count, "failures": {}, "seconds": took},
        **{"offered": count / seconds, "sent": rate, "served": count / took},
        **{"latency": places, "lag": places, "time_to_first_token": None, "seconds_per_token": None},
        **{"input_tokens": 100 * count, "output_tokens": 5 * count, "scored": count},
        **{"metrics": METRICS, "metrics_version": "2, r", **more},
    }


def save(folder: Path, server: str | None, rates: list[dict], words: str = "", gpu: str = H100, **more) -> Path:
    """Write the record of a finished sweep as the script does; `more` replaces or adds parts of it."""
    named = ["--server", server] if server else []
    args = load_flags.parse("", ["--url", "http://127.0.0.1:8000", *named, *shlex.split(words), "--rates", "1"])
    args.rates = [each["rate"] for each in rates]
    tried = {each["rate"]: each["status"] == "sustained" for each in rates}
    part = {"url": args.url, "api": args.api, "server": args.server, "rates": rates}
    part |= {"sustained": measuring.sustained(tried), "knee": not all(tried.values()), "requests": 9}
    part |= {"seconds": 90.0, "wall_seconds": 100.0, "earlier_seconds": 0, "prompts": 40}
    content = {
        **{"schema": 1, "status": "finished", "script": "serving/load_test.py", "task": args.task},
        **{"model": "meta/Llama-2-7b-hf", "config": dict(vars(args)), "data": {}, "environment": {}},
        "cost": {"device": gpu, "gpus": 1, "gpu": gpu, "price_per_hour": 3.6, "usd": 0.1},  # $0.001 a second
        "config_hash": record.short_hash({"server": server, "words": words, "rates": args.rates, "gpu": gpu}),
        "serve": part | {"prompts_sha256": "a" * 64},
        "finished": "2026-01-01T00:00:00.000+00:00",
    }
    content |= {name: value for name, value in more.items() if name != "serve"}
    content["serve"] |= more.get("serve", {})
    path = folder / f"serve-{content['config_hash']}.json"
    folder.mkdir(parents=True, exist_ok=True)
    if content["status"] == "finished":
        schema.check(content, path)
    record.write_json(path, content)
    return path
