"""What a run cost: hourly prices with source and date (prices.json), times the seconds of the whole process.

A price list is a JSON list of {gpu, instance, usd_per_hour, source, date}. A device costs what the entries
say whose `instance`, or else whose `gpu`, is its name, or else stands in it as whole words. Where these say
different prices, its price is unknown until somebody chooses. Of several devices each costs that.

The `cost` of a record names the `device` that was measured and the `gpu` that it is priced as, which
--gpu_name may call otherwise; older records have no `device`.
"""

import argparse
import json
import math
import re
from pathlib import Path

from study.errors import UserError
from study.records.schema import lookup

PRICES = Path(__file__).with_name("prices.json")
ENTRY = {"gpu": str, "instance": str, "usd_per_hour": (int, float), "source": str, "date": str}


def read_prices(path: Path) -> list[dict]:
    """A price list. Raises UserError, naming the entry, for one that is not as it should be."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--prices {path} is not a readable price list: {error}") from None
    if not isinstance(entries, list):
        raise UserError(f"--prices {path} is not a list of prices like study/records/prices.json")
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
    gpu: str,
    price_per_hour: float | None = None,
    prices: list[dict] | None = None,
    gpus: int = 1,
    share: float = 1,
) -> dict:
    """The price part of a record's `cost` for `gpus` devices `gpu`, or for a machine at `price_per_hour`, or
    for a `share` of these; an unknown device has the price None, not 0."""
    found = {"usd_per_hour": price_per_hour, "source": "--price_per_hour"}
    if price_per_hour is None:
        entries = listed(gpu, prices)
        found = {} if not entries or ambiguity(gpu, prices) else dict(entries[0])
        if found:
            found["usd_per_hour"] *= gpus
    if found.get("usd_per_hour") is not None:
        found["usd_per_hour"] *= share
    per_hour, source, date = map(found.get, ("usd_per_hour", "source", "date"))
    return {"gpu": gpu, "price_per_hour": per_hour, "price_source": source, "price_date": date}


def listed(gpu: str, prices: list[dict] | None = None) -> list[dict]:
    """The entries of `prices`, or of prices.json, that are for a device of this name."""
    entries = read_prices(PRICES) if prices is None else prices
    for fits in (lambda name, gpu: name.casefold() == gpu.casefold(), stands_in):
        for name in ("instance", "gpu"):
            found = [entry for entry in entries if fits(entry[name], gpu)]
            if found:
                return found
    return []


def ambiguity(gpu: str, prices: list[dict] | None = None) -> str | None:
    """What a device costs, in words, where its entries say different prices."""
    entries = listed(gpu, prices)
    if len({entry["usd_per_hour"] for entry in entries}) < 2:
        return None
    each = " or ".join(f"${entry['usd_per_hour']:g} ({entry['instance']})" for entry in entries)
    return f"{gpu} costs {each} an hour"


def say_ambiguity(args: argparse.Namespace, device: str) -> None:
    """Print that a run has no price because its device has several."""
    several = None if args.price_per_hour else ambiguity(args.gpu_name or device)
    if several:
        print(f"price      unknown: {several}; choose by --gpu_name INSTANCE or --price_per_hour")


def stands_in(name: str, device: str) -> bool:
    """Whether `name` is whole words of the name of a device: "L4" is none of "NVIDIA L40S"."""
    return bool(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", device, re.IGNORECASE))


def usd(price_per_hour: float | None, seconds: float | None) -> float | None:
    return None if price_per_hour is None or seconds is None else price_per_hour * seconds / 3600


def of_served(price_per_hour: float | None, served: dict) -> dict[str, float | None]:
    """Dollars per 1,000 requests, and per 1M tokens in and out, at the rate that was served: the whole price
    on each of the three. `served` is a rate of a `serve` record; None where price or tokens are not known."""
    spent = usd(price_per_hour, served["seconds"])
    counts = {
        "1,000 requests": (1e3, served["answered"]),
        "1M tokens in": (1e6, served["input_tokens"]),
        "1M tokens out": (1e6, served["output_tokens"]),
    }
    return {
        what: None if spent is None or not count else spent / count * many
        for what, (many, count) in counts.items()
    }


def usd_text(usd: float | None) -> str:
    """Dollars and cents; below one cent, two digits that are not 0."""
    if usd is None:
        return "unknown price"
    return f"${usd:,.{2 if usd >= 0.1 or usd == 0 else 1 - math.floor(math.log10(usd))}f}"


def gpus_of(part: dict) -> int:
    """How many GPUs the `train` or `eval` of a record took: one for each process."""
    return lookup(part, "batching.processes") or lookup(part, "processes") or 1


def device_of(cost: dict) -> str:
    """The device that a record's times were measured on; of an older record what it was priced as."""
    return cost.get("device", cost["gpu"])


def share_of(device: str) -> float:
    """Of a device that several processes shared, as device.name says it."""
    found = re.match(r"(0\.\d+|\d+e-\d+) of ", device)
    return float(found[1]) if found else 1.0


def measured_on(content: dict) -> str | None:
    """The device of a record; None for an older one of a processor that --gpu_name called a card."""
    name, environment = device_of(content["cost"]), content.get("environment", {})
    renamed = "device" not in content["cost"] and environment.get("gpu", name) is None
    return None if renamed and not name.startswith("CPU") else name


def shown(cost: dict) -> str:
    """A record's device, or devices, with what it is priced as where that has another name."""
    device, gpu, count = device_of(cost), cost["gpu"], cost.get("gpus") or 1
    named = device if device == gpu else f"{device}, priced as {gpu}"
    return named if count == 1 else f"{count} x {named}"


def of_run(args: argparse.Namespace, device: str, seconds: float, gpus: int = 1) -> dict:
    """The `cost` of a record, see `of`. Says so where the price is ambiguous."""
    say_ambiguity(args, device)
    return of(args, device, seconds, gpus)


def of(args: argparse.Namespace, device: str, seconds: float, gpus: int = 1) -> dict:
    """Price and dollars of `seconds` on `gpus` devices `device`, priced as --gpu_name calls them."""
    cost = price(args.gpu_name or device, args.price_per_hour, gpus=gpus, share=share_of(device))
    return {"device": device, "gpus": gpus, **cost, "usd": usd(cost["price_per_hour"], seconds)}


def repriced(cost: dict, prices: list[dict], gpus: int = 1) -> float | None:
    """USD per hour of a record's devices: by `prices` where they are listed there, else as recorded."""
    if listed(cost["gpu"], prices):
        share = share_of(device_of(cost))
        return price(cost["gpu"], prices=prices, gpus=gpus, share=share)["price_per_hour"]
    return cost.get("price_per_hour")
