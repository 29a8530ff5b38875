"""The page of a score says what its record says, and what is missing; and so do the tables for the docs."""

from __future__ import annotations

import re

import pytest
from test_figure_score import make_score, make_verdicts
from test_report import Page, unpacked
from truths import make_truth

from mixturelens import figures
from mixturelens.lab.pages.score import answer, missing, score_markdown, write_score
from mixturelens.lab.proving.planted import plan
from mixturelens.lab.proving.proof import Proof
from mixturelens.lab.proving.sums import HALVES


def make_proof() -> Proof:
    return Proof(
        inert={"cue": 3e-6, "hint": 0.0},
        carried={"cue": 0.991, "hint": 1.0},
        accuracy=0.998,
        alone=(0.995,),
        blind=0.0,
        weights={"A": 0.5, "B": 0.5},
        change=make_truth("routing", 1.0, 0.3),
        grafted=(0.98, 0.01),
    )


def page(path, **changes) -> tuple[str, Page]:
    text = write_score(path / "score.html", make_score(**changes)).read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture
def light(monkeypatch):
    """Without plotly.js, which takes seconds to read."""
    monkeypatch.setattr(figures, "plotly_script", lambda: "")


def words(text: str) -> str:
    return " ".join(text.split())


def test_the_page_holds_all_it_needs(tmp_path):
    _, found = page(tmp_path, planted=(plan("llama", 0),), proofs=(make_proof(),))
    assert [link for link in found.links if not link.startswith(("#", "data:"))] == []
    assert unpacked(found, "plotly") == figures.plotly_script()
    assert len({i for i in found.ids if i.startswith("figure-")}) == 5  # two of verdicts, shares, coverage, methods


def test_the_page_says_what_the_record_says(tmp_path, light):
    written, found = page(tmp_path, planted=(plan("llama", 0),), proofs=(make_proof(),))
    text = words(found.text)
    for said in (
        "On the held-out half the behavioural verdict was right on 6 of 7 pairs (0.86 [",
        "and of the other 1 it called 1 inconclusive; of 2 in which nothing changed it called 0 changed.",
        "Near misses, apart: 1 of 2 right or inconclusive.",
        "the mechanism's verdict was right on 3 of 4 pairs",
        "of 2 in which nothing changed it called 1 changed",
        "1 of 2 cases (a quantity of a pair) lie within 0.93 to 0.97",
        "Outside that band: gpt2-token-2-0--grpo (moved 0.902).",
        "At a boundary, where no bootstrap need hold: gpt2-token-2-0--grpo (skill 1.000, dormant 0.310).",
        "cue: exact patching (0.90 [0.80, 1.00], chance 0.12); change: graft",
        "Of 1 instruments broken on purpose 1 were caught (S and R swapped 1.00 → 0.25).",
        "the share crosses 0.9 <b>",  # as text
        "0.940 → 0.930 0.910 to 0.950",
        "3e-06, 0",
        "0.991, 1.000",
    ):
        assert said in text, said
    assert page(tmp_path, planted=(plan("llama", 0),), proofs=(make_proof(),))[0] == written


def test_what_is_missing_is_said(tmp_path, light):
    bare = dict.fromkeys(("coverage", "methods", "broken", "numbers", "mistakes"), ())
    verdicts = tuple(make_verdicts(i, h, {}) for h in HALVES for i in ("behavioural", "mechanism"))
    _, found = page(tmp_path, **bare, pairs=(), verdicts=verdicts, done=0, opened=False, seconds={})
    text = words(found.text)
    assert "The behavioural verdict has not been scored on the held-out half." in text
    assert (
        "Not measured, or in part: 12 of 12 pairs; the held-out half, which has not been opened; coverage over "
        "resampled suites; planted addresses; broken instruments." in text
    )
    assert "Do the methods find" not in text


def test_nothing_is_missing_where_all_is_there():
    record = make_score(done=12, planted=(plan("llama", 0),))
    assert missing(record) == []  # policies that announce nothing are not asked for a mechanism
    silent = record.pairs[0].model_copy(update={"mechanism": None})
    assert missing(record.model_copy(update={"pairs": (silent, *record.pairs[1:])})) == [
        "the mechanism of 1 of 4 pairs"
    ]
    assert missing(record.model_copy(update={"failed": ("verdict of x: why",)})) == ["what failed: verdict of x: why"]


def test_an_instrument_that_is_not_caught_is_said():
    record = make_score()
    passed = record.broken[0].model_copy(update={"broken": 1.0, "caught": False})
    assert answer(record.model_copy(update={"broken": (passed,)}))[-1].startswith(
        "Of 1 instruments broken on purpose 0 "
    )


def test_markdown_has_a_row_a_truth_and_a_method():
    text = score_markdown(make_score())
    assert "| routing | 3 | 0 | 0 | 0 | 1 |" in text
    assert "| neither | 0 | 0 | 1 | 1 | 0 |" in text  # the mechanism's
    assert "\n| specialist |" not in text  # of the open half alone
    assert "| graft | change | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] | 0.80 [0.70, 0.90] | – | – | 0.20 |" in text
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert len(tables) == 3
    assert all(len({line.count("|") for line in table.splitlines()}) == 1 for table in tables)
    assert "Not scored yet: 2 of 12 pairs" in text


@pytest.mark.parametrize("half", HALVES)
def test_markdown_of_a_half_that_was_never_opened(half):
    text = score_markdown(make_score(verdicts=(make_verdicts("behavioural", half, {}),)))
    assert ("has not been scored on the held-out half" in text) == (half == "held-out")
