"""A card says what the records say, holds the verdict, and lets no text of a suite out of its place."""

from __future__ import annotations

from pathlib import Path

import yaml
from test_figures import HOSTILE, make_pair

from mixturelens.pages import Findings, write_card
from mixturelens.routing.verdict import VerdictRecord


def front_and_body(path: Path) -> tuple[dict, str]:
    _, front, body = path.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_holds_the_record_and_says_it(tmp_path: Path) -> None:
    record, verdict = make_pair()
    front, body = front_and_body(write_card(tmp_path / "card.md", [Findings("S--R", record, verdict)]))
    assert VerdictRecord.model_validate(front["mixturelens"]["S--R"]) == verdict
    assert f"## S--R: {verdict.verdict}" in body
    for cue in record.cues:
        after = record.per_cue[cue].after
        assert after is not None
        assert f"{after.overall:.3f}" in body
    assert "What would falsify it:" in body


def test_names_are_written_literally(tmp_path: Path) -> None:
    record, verdict = make_pair((HOSTILE, "[x](http://y.invalid)"), ("| a |", "# b"), words=HOSTILE)
    _, body = front_and_body(write_card(tmp_path / "card.md", [Findings("---\n# S", record, verdict)]))
    assert "<" not in body.replace("\\<", "")
    assert "[x](" not in body
    assert [line for line in body.splitlines() if line.startswith("#")] == [
        "# What post-training changed",
        f"## --- \\# S: {verdict.verdict}",
    ]
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {6}
