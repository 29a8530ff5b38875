"""A gate lets a routing pair through where that is allowed, and none whose specialists may have moved."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from mixturelens.routing.gate import Check, gate, junit
from mixturelens.routing.verdict import VerdictRecord
from mixturelens.types import NOT_MEASURED, Interval

RECORDS = Path(__file__).parents[2] / "artifacts" / "reference" / "records"


def record(word: str = "routing", high: float | None = 0.01) -> VerdictRecord:
    found = VerdictRecord.load(RECORDS / "sft--rl-A" / "verdict.json")
    moved = NOT_MEASURED if high is None else Interval(value=high / 2, low=0.0, high=high)
    return found.model_copy(
        update={"verdict": word, "bits": found.bits.model_copy(update={"specialist": moved, "routing": moved})}
    )


@pytest.mark.parametrize(
    ("word", "allow", "holds"),
    [
        ("routing", ["routing"], True),
        ("routing", [], False),
        ("neither", [], True),
        ("inconclusive", ["routing"], False),
        ("both", ["routing"], False),
        ("both", ["routing", "both"], True),
    ],
)
def test_only_what_is_allowed_passes(word: str, allow: list[str], holds: bool) -> None:
    (check,) = gate(record(word), allow)
    assert check.holds is holds
    assert check.said.startswith(word)


@pytest.mark.parametrize(("high", "most", "holds"), [(0.01, 0.05, True), (0.06, 0.05, False), (None, 0.05, False)])
def test_all_of_the_interval_must_be_allowed(high: float | None, most: float, holds: bool) -> None:
    _, check = gate(record(high=high), ["routing"], most)
    assert check.holds is holds


def test_junit_names_what_failed() -> None:
    text = junit({"S--R<": [Check("verdict", False, 'both; "<A>"\x00'), Check("specialist", True, "fine")]})
    suite = ElementTree.fromstring(text)
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    first, second = suite
    assert (first.get("classname"), first.get("name")) == ("S--R<", "verdict")
    assert first[0].get("message") == 'both; "<A>"\N{REPLACEMENT CHARACTER}'
    assert not len(second)
