"""What a run cost: hourly prices with source and date, times the seconds of the whole process."""

import argparse

STUDY = "published study of Llama-2 fine-tuning (Georgian, LLM-Finetuning-Hub)"

PRICES = {  # part of the GPU's name as the driver gives it -> (USD per hour, source, date)
    "A10G": (1.212, f"{STUDY}: AWS g5.2xlarge", "2023-08"),
    "A100-SXM4-40GB": (3.81, f"{STUDY}: GCP, A100 40GB", "2023-08"),
    "A100-PCIE-40GB": (3.81, f"{STUDY}: GCP, A100 40GB", "2023-08"),
}


def price(gpu: str, price_per_hour: float | None) -> dict:
    """The price part of a record's `cost` for the device `gpu`; an unknown device has the price None, not
    0."""
    if price_per_hour is not None:
        return {
            "gpu": gpu,
            "price_per_hour": price_per_hour,
            "price_source": "--price_per_hour",
            "price_date": None,
        }
    for name, (usd, source, date) in PRICES.items():
        if name.lower() in gpu.lower():
            return {"gpu": gpu, "price_per_hour": usd, "price_source": source, "price_date": date}
    return {"gpu": gpu, "price_per_hour": None, "price_source": None, "price_date": None}


def usd(price_per_hour: float | None, seconds: float) -> float | None:
    return None if price_per_hour is None else price_per_hour * seconds / 3600


def of_run(args: argparse.Namespace, gpu: str, seconds: float) -> dict:
    """The `cost` of a record: price and dollars of `seconds` on the device `gpu`, or as --gpu_name calls
    it."""
    cost = price(args.gpu_name or gpu, args.price_per_hour)
    return {**cost, "usd": usd(cost["price_per_hour"], seconds)}
