"""What a plan takes and keeps, and what study/fast/README.md says of both. None of it needs Triton."""

import importlib
import math
import os
import re
import subprocess
import sys
from dataclasses import fields
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from study.fast.decoder import head_size
from study.fast.memory import KEEPS, Activations, Plan, choose_plan, costs, sizes_of


def model(rank: int, dropout: float, trained: int, **config):
    """What planning asks of a PEFT model."""
    weight = torch.empty(trained, device="meta", requires_grad=True)
    return SimpleNamespace(
        config=SimpleNamespace(**config),
        peft_config={"default": SimpleNamespace(r=rank, lora_dropout=dropout)},
        parameters=lambda: [weight, torch.empty(7)],
    )


SEVEN = model(  # Llama-2-7B
    *(8, 0.0, 19_988_480),
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
)
SEVENTY = model(  # Llama-2-70B, dropout as classification has it
    *(8, 0.1, 103_546_880),
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)
FEW = model(  # Mistral-7B, few key heads, with dropout
    *(64, 0.1, 167_772_160),
    vocab_size=32768,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
WIDE = model(  # heads wider than the residual stream
    *(2, 0.3, 4096),
    vocab_size=96,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=128,
)


# Numbers of the formula as it was when its plans were measured on GPUs


@pytest.mark.parametrize(
    ("of", "keep", "on_host", "learned", "shared", "expected"),
    [
        (SEVEN, "all", False, 400, 21, (762830848, 3129632.0, 0.0)),
        (SEVEN, "attention", False, 400, 21, (762830848, 1716512.0, 0.20051813471502591)),
        (SEVEN, "residual", False, 400, 21, (762830848, 930080.0, 0.3124352331606218)),
        (SEVEN, "input", False, 400, 21, (762830848, 401696.0, 0.34974093264248707)),
        (SEVEN, "input", True, 400, 21, (762830848, 139552.0, 0.3597409326424871)),
        (SEVEN, "all", False, 9000, 0, (2417950720, 3128960.0, 0.0)),
        (FEW, "all", False, 400, 21, (3785007104, 3242024.0, 0.0)),
        (FEW, "attention", False, 400, 21, (3785007104, 1394728.0, 0.2423076923076923)),
        (FEW, "residual", False, 400, 21, (3785007104, 1001512.0, 0.29423076923076924)),
        (FEW, "input", False, 400, 21, (3785007104, 464936.0, 0.3288461538461539)),
        (FEW, "input", True, 400, 21, (3785007104, 202792.0, 0.3388461538461539)),
        (FEW, "all", False, 9000, 0, (5480382464, 3241856.0, 0.0)),
        (WIDE, "all", False, 400, 21, (772096, 8789.0, 0.0)),
        (WIDE, "attention", False, 400, 21, (772096, 8021.0, 0.060000000000000005)),
        (WIDE, "residual", False, 400, 21, (772096, 5973.0, 0.3)),
        (WIDE, "input", False, 400, 21, (772096, 4437.0, 0.42)),
        (WIDE, "input", True, 400, 21, (772096, 4181.0, 0.43)),
        (WIDE, "all", False, 9000, 0, (5718016, 8768.0, 0.0)),
    ],
)
def test_a_plan_costs_what_was_measured_to_fit(of, keep, on_host, learned, shared, expected):
    assert costs(of, keep, on_host, learned, shared) == expected


@pytest.mark.parametrize(
    ("of", "gib", "asked", "expected"),
    [
        (SEVEN, 80, {}, (16384, "all", False)),
        (SEVEN, 80, {"tokens": 2000}, (2000, "all", False)),
        (SEVEN, 22, {}, (5974, "all", False)),
        (SEVEN, 22, {"checkpointing": "on"}, (16384, "input", False)),
        (SEVEN, 22, {"checkpointing": "off"}, (5974, "all", False)),
        (SEVEN, 22, {"tokens": 2000}, (2000, "all", False)),
        (SEVEN, 22, {"shared": 300}, (5974, "all", False)),
        (SEVEN, 14, {}, (4560, "all", False)),
        (SEVEN, 14, {"tokens": 2000}, (2000, "all", False)),
        (SEVEN, 10, {}, (3188, "all", False)),
        (SEVEN, 10, {"tokens": 2000}, (2000, "all", False)),
        (SEVEN, 7, {}, (2158, "all", False)),
        (SEVEN, 7, {"checkpointing": "on"}, (16384, "input", False)),
        (SEVEN, 7, {"checkpointing": "off"}, (2158, "all", False)),
        (SEVEN, 7, {"tokens": 2000}, (2000, "all", False)),
        (SEVEN, 7, {"shared": 300}, (2148, "all", False)),
        (SEVEN, 5, {}, (2684, "attention", False)),
        (SEVEN, 5, {"checkpointing": "on"}, (16384, "input", True)),
        (SEVEN, 5, {"checkpointing": "off"}, (1472, "all", False)),
        (SEVEN, 5, {"tokens": 2000}, (2000, "attention", False)),
        (SEVEN, 5, {"shared": 300}, (2664, "attention", False)),
        (SEVEN, 3, {}, (16384, "input", True)),
        (SEVEN, 3, {"checkpointing": "on"}, (16384, "input", True)),
        (SEVEN, 3, {"checkpointing": "off"}, (785, "all", False)),
        (SEVEN, 3, {"tokens": 2000}, (2000, "residual", False)),
        (SEVEN, 3, {"shared": 300}, (16384, "input", True)),
        (FEW, 22, {}, (5974, "all", False)),
        (FEW, 22, {"checkpointing": "on"}, (16384, "input", False)),
        (FEW, 22, {"checkpointing": "off"}, (5974, "all", False)),
        (FEW, 22, {"tokens": 2000}, (2000, "all", False)),
        (FEW, 22, {"shared": 300}, (5974, "all", False)),
        (FEW, 10, {}, (2144, "all", False)),
        (FEW, 10, {"checkpointing": "on"}, (16384, "input", True)),
        (FEW, 10, {"checkpointing": "off"}, (2144, "all", False)),
        (FEW, 10, {"tokens": 2000}, (2000, "all", False)),
        (FEW, 10, {"shared": 300}, (2142, "all", False)),
        (FEW, 7, {}, (16384, "input", True)),
        (FEW, 7, {"checkpointing": "on"}, (16384, "input", True)),
        (FEW, 7, {"checkpointing": "off"}, (1150, "all", False)),
        (FEW, 7, {"tokens": 2000}, (2000, "attention", False)),
        (FEW, 7, {"shared": 300}, (16384, "input", True)),
        (FEW, 5, {}, (5974, "input", True)),
        (FEW, 5, {"checkpointing": "on"}, (5974, "input", True)),
        (FEW, 5, {"checkpointing": "off"}, (512, "all", False)),
        (FEW, 5, {"tokens": 2000}, (2000, "input", False)),
        (FEW, 5, {"shared": 300}, (5974, "input", True)),
    ],
)
def test_the_fastest_plan_that_fits_is_chosen(of, gib, asked, expected):
    plan = choose_plan(of, gib * 2**30, 512, (16384, 400), **asked)
    assert (plan.tokens, plan.keep, plan.on_host) == expected


# Of a card's bytes Llama-2-70B takes 36.4e9: 68.45e9 weights of 0.5 + 1/64 + 4/(64 * 256) bytes, embedding
# and head in bfloat16. What is left but for 0.7 GiB of CUDA's own times 0.92, as paths.plan_for plans.


@pytest.mark.parametrize(
    ("gib", "step", "expected"),
    [
        (79.1, 3072, (2048, "all")),  # an H100: 16 posts of the default batch
        (79.1, 8192, (2560, "all")),
        (79.1, 16384, (2700, "all")),
        (139.8, 3072, (3072, "all")),  # an H200
        (139.8, 8192, (4608, "all")),
        (139.8, 16384, (5974, "all")),
    ],
)
def test_llama_2_70b_trains_on_one_card(gib, step, expected):
    weights = 68_451_041_280 * (1 / 2 + 1 / 64 + 4 / (64 * 256)) + 2 * 32000 * 8192 * 2
    free = 0.92 * ((gib - 0.7) * 2**30 - weights)
    plan = choose_plan(SEVENTY, free, 512, (step, 400), shared=21)
    assert (plan.tokens, plan.keep) == expected
    fixed, each, _ = costs(SEVENTY, plan.keep, plan.on_host, 400, 21)
    assert fixed + each * plan.tokens <= free


def test_a_post_longer_than_fits_is_computed_twice_before_it_is_refused():
    plans = [choose_plan(SEVENTY, 41 * 2**30, longest, (longest, 400)) for longest in (2048, 4096, 20000)]
    assert [plan.keep for plan in plans] == ["all", "attention", "input"]


def test_a_plan_says_what_it_computes_twice():
    assert [str(Plan(1, keep)) for keep in KEEPS] == [
        "nothing computed twice",
        "MLPs computed twice",
        "MLPs and attention's projections computed twice",
        "layers computed twice",
    ]
    assert str(Plan(1, "input", True)) == "layers computed twice, their inputs in host memory"


def test_a_level_keeps_no_more_than_the_one_before_it_and_always_the_input():
    everything = [part.name for part in fields(Activations)]
    left = []
    for keep in KEEPS:
        kept = Activations(**dict.fromkeys(everything, 1))
        kept.drop(keep)
        left.append({name for name in everything if getattr(kept, name)})
    assert left[0] == {*everything}
    assert all(less < more for more, less in pairwise(left))
    assert left[-1] == {"x", "inverse_1", "inverse_2", "h_qkv", "h_out", "h_gate_up", "h_down"}


# study/fast/README.md

PAGE = (ROOT / "study" / "fast" / "README.md").read_text(encoding="utf-8")


def rows_of(heading: str) -> list[list[str]]:
    """The cells of the first table behind a heading, without its titles; code loses its backquotes."""
    lines = PAGE.partition(f"\n{heading}\n")[2].split("\n\n|", 1)[1].split("\n\n")[0].splitlines()
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


def symbols(of) -> dict:
    """The page's notation for a model."""
    lora, c = of.peft_config["default"], of.config
    s, m = sizes_of(c, lora.r), head_size(c)
    return {"H": c.num_attention_heads, "K": c.num_key_value_heads, "m": m, "N": c.num_hidden_layers} | {
        "d": s.hidden,
        "f": s.inner,
        "r": s.rank,
        "out": s.out,
        "qkv": s.qkv,
        "a": 64 * math.ceil(3 * s.rank / 64),
        "vocab": c.vocab_size,
        "trained": sum(p.numel() for p in of.parameters() if p.requires_grad),
        "dropout": lora.lora_dropout > 0,
    }


@pytest.mark.parametrize("of", [SEVEN, FEW, WIDE, SEVENTY])
def test_the_pages_table_of_what_is_kept_is_the_dataclass(of):
    rows, known = rows_of("## What a layer keeps"), symbols(of)
    assert [row[0] for row in rows] == [part.name for part in fields(Activations)]
    sizes = sizes_of(of.config, of.peft_config["default"].r)
    for (_, _, *plans, columns, product), part in zip(rows, fields(Activations), strict=True):
        about = part.metadata
        assert [keep for keep, cell in zip(KEEPS, plans, strict=True) if cell == "yes"] == [*about["plans"]]
        assert eval(columns or "0", known) == about["columns"](sizes)
        assert eval(product or "0", known) == about["product"](sizes)


@pytest.mark.parametrize("of", [SEVEN, FEW, WIDE, SEVENTY])
@pytest.mark.parametrize(("learned", "shared"), [(400, 21), (9000, 0)])
@pytest.mark.parametrize(("keep", "on_host"), [*((keep, False) for keep in KEEPS), ("input", True)])
def test_the_pages_memory_formula_is_the_codes(of, keep, on_host, learned, shared):
    known = symbols(of) | {"learned": learned, "shared": shared, "on_host": on_host}
    rows, which = rows_of("## What a layer keeps"), 2 + KEEPS.index(keep)
    known["kept"] = sum(eval(row[6] or "0", known) for row in rows if row[which] == "yes")
    known["again"] = sum(eval(row[7] or "0", known) for row in rows if row[which] != "yes")
    exec(re.search(r"## The memory formula.*?```python\n(.*?)```", PAGE, re.DOTALL)[1], known)
    expected = pytest.approx(costs(of, keep, on_host, learned, shared), rel=1e-12)
    assert (known["fixed"], known["each"], known["extra"]) == expected


def test_the_pages_constants_are_the_codes():
    rows = [row for row in rows_of("## The memory formula") if "." in row[0]]
    assert len(rows) >= 12
    for name, value, _ in rows:
        module, constant = name.split(".")
        folder = "study" if module == "packing" else "study.fast"
        if module in {"cache", "nf4"}:
            pytest.importorskip("triton")
        assert getattr(importlib.import_module(f"{folder}.{module}"), constant) == float(value), name


def test_arrows_in_the_folder_go_one_way():
    order = re.search(r"those before it in this row: ([^.]*)\.", PAGE)[1].split(", ")
    folder = ROOT / "study" / "fast"
    assert {*order} == {path.stem for path in folder.glob("*.py")} - {"__init__"}
    for name in order:
        source = (folder / f"{name}.py").read_text(encoding="utf-8")
        words = " ".join(re.findall(r"from study\.fast import ([\w, ]+)", source)).replace(",", " ").split()
        read = {*words, *re.findall(r"from study\.fast\.(\w+) import", source)}
        assert read <= {*order[: order.index(name)]}, name


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "None"),
    ],
)
def test_blocks_of_memory_grow_in_place_unless_the_user_says_otherwise(given, taken):
    names = [path.stem for path in ROOT.glob("*.py") if path.stem != "prompts"]
    code = f"import {', '.join(names)}, os, sys\n"
    code += "print(os.environ.get('PYTORCH_ALLOC_CONF'), 'torch' in sys.modules)"
    env = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name} | given
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert len(names) == 5
    assert done.stdout.split() == [taken, "False"]  # PyTorch, which reads it, comes later
