"""A card that goes with a checkpoint: what post-training changed, in Markdown, with the verdict's record before it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from mixturelens.figures import show_interval
from mixturelens.files import dump_yaml
from mixturelens.pages.pair import Findings, falsify
from mixturelens.records import write_text
from mixturelens.types import NOT_MEASURED


def write_card(path: Path, findings: Sequence[Findings]) -> Path:
    """Write the card, whole or not at all.

    Its front matter holds each pair's verdict, as its record has it, under `mixturelens`: a hub shows what it knows of
    a front matter, and leaves the rest alone. Names and texts of the suite are written literally.
    """
    records = {" ".join(found.name.split()): json.loads(found.verdict.to_json()) for found in findings}
    front = dump_yaml({"tags": ["mixturelens"], "mixturelens": records})
    body = "\n".join(part for found in findings for part in _about(found))
    write_text(path, f"---\n{front}---\n\n# What post-training changed\n\n{body}")
    return path


def _about(found: Findings) -> list[str]:
    verdict, record = found.verdict, found.behaviour
    made = verdict.provenance
    rows = []
    for cue in record.cues:
        sides = (record.per_cue[cue].before, record.per_cue[cue].after)
        shown = [show_interval(NOT_MEASURED if side is None else side.intervals["overall"]) for side in sides]
        weights = [", ".join(f"{_(m)} {w:.2f}" for m, w in side.weights.items()) if side else "" for side in sides]
        trained = " (trained)" if cue == record.trained_cue else ""
        rows.append(f"| {_(cue)}{trained} | {shown[0]} | {shown[1]} | {weights[0]} | {weights[1]} |")
    return [
        f"## {_(found.name)}: {verdict.verdict}",
        "",
        _(verdict.reason),
        "",
        "| cue | accuracy before | after | policies before | after |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
        f"Routing share {show_interval(verdict.routing_share)}; routing {show_interval(verdict.bits.routing, 4)} bits, "
        f"specialists {show_interval(verdict.bits.specialist, 4)}; {record.questions} questions, over which intervals "
        "are of 95%. "
        f"Before: `{made.before}`; after: `{made.after}`; mixturelens {made.versions.get('mixturelens', '')}.",
        "",
        "What would falsify it:",
        "",
        *(f"- {_(line)}" for line in falsify(verdict)),
        *(f"- Note: {_(note)}" for note in verdict.notes),
        "",
    ]


def _(text: str) -> str:
    """A text as Markdown shows it literally, on one line."""
    return re.sub(r"([\\\\`*_{}\[\]<>#|~!&])", r"\\\1", " ".join(text.split()))
