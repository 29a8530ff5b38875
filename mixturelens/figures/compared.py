"""Two runs side by side: one row a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mixturelens.figures.marks import Mark, dots
from mixturelens.figures.panels import between, number_axis, reach, row_axis, single
from mixturelens.figures.style import NEGATIVE, POSITIVE
from mixturelens.figures.words import label, number
from mixturelens.types import Interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


class Beside(NamedTuple):
    """A number of two runs."""

    about: str
    name: str
    left: Interval
    right: Interval
    differs: bool


def compared(names: tuple[str, str], rows: Sequence[Beside]) -> Figure:
    """The same numbers of two runs with their intervals; bold where they differ."""
    panel = single(110 + 24 * max(len(rows), 1), {"l": 380, "r": 24, "t": 50, "b": 50})
    for i, (run, colour, symbol) in enumerate(zip(names, (NEGATIVE, POSITIVE), ("circle", "diamond"), strict=True)):
        marks = [
            Mark(y + (0.17 if i else -0.17), value, f"{label(row.about)}: {label(row.name, 60)}<br>{number(value)}")
            for y, row in enumerate(rows)
            for value in [row.right if i else row.left]
        ]
        marker = {"color": colour, "symbol": symbol, "size": 8}
        dots(panel, marks, marker=marker, name=label(run, 40), whisker=(1.5, 3, colour))
    texts = [f"{label(row.about, 20)}: {label(row.name, 44)}" for row in rows]
    row_axis(panel, [f"<b>{text}</b>" if row.differs else text for text, row in zip(texts, rows, strict=True)])
    between(panel, [row.about for row in rows])
    ends: list[Any] = [value for row in rows for value in (row.left, row.right)]
    number_axis(panel, reach(ends, (0.0, 1.0), within=(-1.5, 2.0)), "share, probability, bits, or change of accuracy")
    return panel.figure
