"""What a run cost: hourly prices with source and date (prices.json), times the seconds of the whole process.

A price list is a JSON list of {gpu, instance, usd_per_hour, source, date}. A device costs what the
first entry says whose `instance` stands in its name as whole words, or else the first whose `gpu` does; of
several, each costs that.
"""

import argparse
import json
import math
import re
from pathlib import Path

from study.cli import UserError

PRICES = Path(__file__).with_name("prices.json")
ENTRY = {"gpu": str, "instance": str, "usd_per_hour": (int, float), "source": str, "date": str}


def read_prices(path: Path) -> list[dict]:
    """A price list. Raises UserError, naming the entry, for one that is not as it should be."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--prices {path} is not a readable price list: {error}") from None
    if not isinstance(entries, list):
        raise UserError(f"--prices {path} is not a list of prices like study/prices.json")
    for number, entry in enumerate(entries, 1):
        fits = isinstance(entry, dict) and entry.keys() == ENTRY.keys()
        if not fits or not all(isinstance(entry[name], kind) for name, kind in ENTRY.items()):
            raise UserError(f"--prices {path}, entry {number}: it should have {', '.join(ENTRY)}")
        if not entry["gpu"].strip() or not entry["instance"].strip():
            raise UserError(f"--prices {path}, entry {number}: gpu and instance should not be empty")
        if not 0 < entry["usd_per_hour"] < math.inf:
            raise UserError(f"--prices {path}, entry {number}: usd_per_hour should be above 0")
    return entries


def price(
    gpu: str, price_per_hour: float | None = None, prices: list[dict] | None = None, gpus: int = 1
) -> dict:
    """The price part of a record's `cost` for `gpus` devices `gpu`, or for a machine at `price_per_hour`; an
    unknown device has the price None, not 0."""
    found = {"usd_per_hour": price_per_hour, "source": "--price_per_hour"}
    if price_per_hour is None:
        entries = read_prices(PRICES) if prices is None else prices
        names = (entry for name in ("instance", "gpu") for entry in entries if stands_in(entry[name], gpu))
        found = dict(next(names, {}))
        if found:
            found["usd_per_hour"] *= gpus
    per_hour, source, date = map(found.get, ("usd_per_hour", "source", "date"))
    return {"gpu": gpu, "price_per_hour": per_hour, "price_source": source, "price_date": date}


def stands_in(name: str, device: str) -> bool:
    """Whether `name` is whole words of the name of a device: "L4" is none of "NVIDIA L40S"."""
    return bool(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", device, re.IGNORECASE))


def usd(price_per_hour: float | None, seconds: float) -> float | None:
    return None if price_per_hour is None else price_per_hour * seconds / 3600


def gpus_of(train: dict) -> int:
    """How many GPUs the `train` of a record took: one for each process."""
    return train.get("batching", {}).get("processes", 1)


def of_run(args: argparse.Namespace, gpu: str, seconds: float, gpus: int = 1) -> dict:
    """The `cost` of a record: price and dollars of `seconds` on `gpus` devices `gpu`, or as --gpu_name calls
    them."""
    cost = price(args.gpu_name or gpu, args.price_per_hour, gpus=gpus)
    return {**cost, "usd": usd(cost["price_per_hour"], seconds)}


def repriced(cost: dict, prices: list[dict], gpus: int = 1) -> float | None:
    """USD per hour of a record's devices: by `prices` where they are listed there, else as recorded."""
    listed = price(cost["gpu"], prices=prices, gpus=gpus)["price_per_hour"]
    return cost["price_per_hour"] if listed is None else listed
