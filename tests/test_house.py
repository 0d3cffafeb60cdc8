"""The house: which module imports which. Arrows go one way, in no circle; records are read without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

# From the ground up. A module imports from its own line and from those above it.
FLOORS = (
    "prompts study.errors study.device study.words",
    "study.cli study.classes study.files study.intervals study.presets study.reading",
    "study.tabular study.tokens",
    "study.data study.encoding study.metrics study.checkpoint",
    "study.records",
    "study.report",
    "study.checks study.dropout study.model study.packing study.processes study.sharding",
    "study.fast",
    "study.dense study.paths study.resuming",
    "study.training study.generation study.also study.several study.predict study.dry_run",
    "study.loop",
    "study.encoder study.t5",
    "llama2_classification llama2_classification_inference llama2_summarization",
    "llama2_summarization_inference llama2_baseline_inference",
)
# What a report is made from: records, and what metrics.py makes of each example's score.
READ_BY_REPORT = {
    "study.report",
    "study.records",
    "study.errors",
    "study.cli",
    "study.files",
    "study.metrics",
    "study.intervals",
}


def name_of(path: Path) -> str:
    words = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(words[:-1] if words[-1] == "__init__" else words)


MODULES = {name_of(path): path for path in [*ROOT.glob("*.py"), *(ROOT / "study").rglob("*.py")]}


def imported_by(path: Path) -> Iterator[str]:
    """The modules of this project that a file imports anywhere, within functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found = whole if whole in MODULES else node.module
                if found in MODULES:
                    yield found


ARROWS = {name: {*imported_by(path)} - {name} for name, path in MODULES.items()}


def room_of(name: str) -> str:
    """study.records.cost stands in the room study.records."""
    return ".".join(name.split(".")[:2])


def floor_of(name: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room_of(name) in rooms.split())


def test_every_module_has_a_floor_and_arrows_go_down():
    upward = {
        f"{name} -> {other}"
        for name, others in ARROWS.items()
        for other in others
        if name != "study" and floor_of(other) > floor_of(name)
    }
    assert not upward


def test_there_is_no_circle():
    TopologicalSorter(ARROWS).prepare()  # raises CycleError, which names it
    assert ARROWS["study.records.estimate"] >= {"study.records.runs", "study.records.record"}


def test_a_report_is_made_from_records_alone_and_nothing_but_scripts_asks_for_one():
    reading = {room_of(other) for name in ARROWS if room_of(name) == "study.report" for other in ARROWS[name]}
    assert "study.records" in reading
    assert reading <= READ_BY_REPORT
    asking = {name for name, others in ARROWS.items() if "study.report" in map(room_of, others)}
    assert {room_of(name) for name in asking} == {"study.report"}


@pytest.mark.parametrize("room", ["study.records", "study.report"])
def test_records_and_reports_answer_without_torch(room):
    modules = sorted(name for name in MODULES if room_of(name) == room)
    program = (
        f"import sys, {', '.join(modules)}\nprint(*({{'torch', 'transformers', 'peft'}} & {{*sys.modules}}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert len(modules) > 5
    assert done.stdout.strip() == ""


def test_no_module_keeps_a_clock_or_reads_the_command_line():
    kept, read = [], set()
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign):
                kept += [name for part in ast.walk(node) if isinstance(part, ast.Name) and part.id == "time"]
        if any(isinstance(node, ast.Attribute) and node.attr == "argv" for node in ast.walk(tree)):
            read.add(name)
    assert not kept
    assert read == {"study.cli", "study.dry_run", "study.report.__main__"}  # where a command begins
