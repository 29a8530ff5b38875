"""The mechanism verdict: every line of evidence beside its null."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from mixturelens.figures.marks import Mark, dots, points
from mixturelens.figures.panels import beside, number_axis, reach, row_axis, rule, single
from mixturelens.figures.style import GREY, ROUTER, SPECIALIST
from mixturelens.figures.words import label, number

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.routing.mechanism import Line, Mechanism


def evidence(mechanism: Mechanism) -> Figure:
    """A row a line of evidence: its bits from S, those of noise of the same size, and what it says.

    Whiskers are the record's intervals over questions.
    """
    rows = sorted(mechanism.evidence.items(), key=lambda row: row[1].about != "selector")
    panel = single(48 * max(len(rows), 1) + 132, {"l": 190, "r": 170, "t": 84, "b": 56})
    nulls = [(y, line.null) for y, (_, line) in enumerate(rows) if line.null is not None]
    tick = {"symbol": "line-ns", "size": 22, "line": {"width": 3, "color": GREY}}
    hover = [f"noise {number(null)} bits" for _, null in nulls]
    points(panel, [null for _, null in nulls], [y for y, _ in nulls], hover, marker=tick, name="noise of the same size")
    for about, colour, symbol in (("selector", ROUTER, "circle"), ("specialists", SPECIALIST, "square")):
        found = [(y, name, line) for y, (name, line) in enumerate(rows) if line.about == about]
        if found:
            marks = []
            for y, name, line in found:  # hover texts do not break by themselves
                what = "<br>".join(label(text, 60) for text in textwrap.wrap(line.what, 60))
                marks.append(Mark(y, line.effect, f"{label(name, 60)}: {number(line.effect)} bits<br>{what}"))
            marker = {"color": colour, "symbol": symbol, "size": 12}
            dots(panel, marks, whisker=(2, 6), marker=marker, name=about)
    split = sum(line.about == "selector" for _, line in rows)
    if 0 < split < len(rows):
        rule(panel, y=split - 0.5, color="#BBBBBB")
    effects = [value for _, line in rows for value in (line.effect, line.null)]
    number_axis(panel, reach(effects, (0.0, 0.05), 0.05), "bits from S")
    row_axis(panel, [f"<b>{line.source}</b><br>{line.about}" for _, line in rows])
    beside(panel, "<b>it says</b>", [_says(line) for _, line in rows], 13)
    return panel.figure


def _says(line: Line) -> str:
    return "cannot say" if line.changed is None else "changed" if line.changed else "unchanged"
