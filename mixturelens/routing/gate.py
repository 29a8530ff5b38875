"""Whether a verdict is one that somebody is willing to ship: for continuous integration."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple
from xml.etree import ElementTree

from mixturelens.routing.verdict import VerdictRecord


class Check(NamedTuple):
    """One thing that was asked of a pair: its name, whether it holds, and the numbers."""

    name: str
    holds: bool
    said: str


def gate(record: VerdictRecord, allow: Collection[str], most: float | None = None) -> tuple[Check, ...]:
    """What is asked of a verdict: that its word is allowed, and that specialists have not moved by more than `most`.

    `neither` is always allowed, and so is every word of `allow`. `most` is in bits; it holds where the upper end of the
    interval is not above it, so that what cannot be told does not pass.
    """
    word = record.verdict
    checks = [Check("verdict", word == "neither" or word in allow, f"{word}; {record.reason}")]
    if most is not None:
        high, value = record.bits.specialist.high, record.bits.specialist.value
        moved = "not measured" if high is None or value is None else f"{value:.4f} bits, at most {high:.4f}"
        checks.append(Check("specialist", high is not None and high <= most, f"{moved}; allowed: {most:g}"))
    return tuple(checks)


def junit(found: Mapping[str, Collection[Check]]) -> str:
    """Checks of each pair, by its name, as JUnit XML: a test case a check."""
    suite = ElementTree.Element("testsuite", name="mixturelens")
    for pair, checks in found.items():
        for check in checks:
            case = ElementTree.SubElement(suite, "testcase", classname=_written(pair), name=check.name)
            if not check.holds:
                ElementTree.SubElement(case, "failure", message=_written(check.said))
    cases = [check for checks in found.values() for check in checks]
    suite.set("tests", str(len(cases)))
    suite.set("failures", str(sum(not check.holds for check in cases)))
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _written(text: str) -> str:
    """Without the control characters that XML has no way to write."""
    return "".join(char if char.isprintable() or char == " " else "\N{REPLACEMENT CHARACTER}" for char in text)
