"""The figures of the pages that tell what came out are those of the reports, which are made from records."""

import re
from collections.abc import Iterator

import pytest
from conftest import ROOT, run_program

STUDY, DEMO = (ROOT / "results" / name for name in ("study", "demo"))
NUMBER = r"[-+]?[\d,]*\.?\d+"
SCORE = re.compile(rf"({NUMBER}) (?:% )?\[({NUMBER}), ({NUMBER})\]")


def scores(text: str) -> Iterator[tuple[str, list[float]]]:
    """Each score with an interval: the words, and the three numbers."""
    for found in SCORE.finditer(text):
        yield found[0], [float(number.replace(",", "")) for number in found.groups()]


def decimals(words: str) -> int:
    return len(words.split(" ", maxsplit=1)[0].partition(".")[2])


def stands_in(words: str, score: list[float], others: list[list[float]]) -> bool:
    """Whether one of `others` rounds to it, as it stands or with the sides of a difference changed over."""
    turned = [-score[0], -score[2], -score[1]]
    return any(
        round(other[0], decimals(words)) == pytest.approx(way[0]) and other[1:] == pytest.approx(way[1:])
        for other in others
        for way in (score, turned)
    )


def compared(one: str, other: str) -> list[list[float]]:
    """The differences that --compare tells of the study's runs whose folders these patterns name."""
    sides = [sorted(map(str, (STUDY / "experiments").glob(pattern))) for pattern in (one, other)]
    assert all(sides)
    done = run_program("-m", "study.report", "--compare", *sides[0], "--against", *sides[1])
    assert done.returncode == 0, done.stderr
    rows = re.findall(rf"\| ({NUMBER}) +\| ({NUMBER}) to ({NUMBER}) +\|", done.stdout)
    return [[float(row[0]), *(round(float(number), 1) for number in row[1:])] for row in rows]


def test_the_readmes_tables_are_of_the_reports():
    reports = "".join((folder / "report.md").read_text("utf-8") for folder in (STUDY, DEMO))
    page = (ROOT / "README.md").read_text("utf-8")
    section = page[page.index("## What comes out") : page.index("## Where everything is")]
    found = [words for row in section.splitlines() if row.startswith("|") for words, _ in scores(row)]
    assert len(found) > 15
    assert [words for words in found if words not in reports] == []


def test_the_studys_figures_are_those_of_its_report_or_of_two_settings_compared():
    others = [score for _, score in scores((STUDY / "report.md").read_text("utf-8"))]
    confidence = run_program("-m", "study.report", str(STUDY / "confidence"))
    others += [score for _, score in scores(confidence.stdout)]
    for pair in (
        ("classification-all-*Fraction-0.025_*", "classification-sampleFraction-0.025_*"),
        ("summarization-*Fraction-1.0_epochs-4*_9b570639", "cheap/summarization/longest-3_*"),
    ):
        others += compared(*pair)
    found = dict(scores((STUDY / "README.md").read_text("utf-8")))
    assert len(found) > 50
    assert [words for words, score in found.items() if not stands_in(words, score, others)] == []
