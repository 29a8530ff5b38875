"""Arms of an experiment side by side: a point a seed, and their mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mixturelens.figures.heat import across
from mixturelens.figures.marks import Mark, columns, points
from mixturelens.figures.panels import Panel, panels
from mixturelens.figures.style import GREY, INK, jitter
from mixturelens.figures.words import label, number
from mixturelens.types import Interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Arms = Mapping[str, tuple[Sequence[float], Interval]]
"""Arm -> one number a seed, and their mean with its interval over seeds."""


def arms(found: Mapping[str, Arms], unit: str = "probability") -> Figure:
    """A panel for each quantity, all in one unit: of each arm a point a seed, and the mean with its interval.

    A panel whose numbers all lie within 0 and 1 shows all of that range.
    """
    titles: dict[str, Any] = {"column_titles": [_lines(name) for name in found]}
    figure, panes = panels((1, len(found)), [], 400, {"t": 80}, **titles)
    for panel, (quantity, by_arm) in zip(panes, found.items(), strict=False):
        _seeds(panel, quantity, by_arm)
        _means(panel, quantity, by_arm)
        across(panel, [label(name) for name in by_arm], tickangle=-35, showgrid=None)
        numbers = [value for values, _ in by_arm.values() for value in values]
        if numbers and min(numbers) >= 0 and max(numbers) <= 1:
            figure.update_yaxes(range=[-0.05, 1.05], **panel.at)
    figure.update_yaxes(title_text=unit, row=1, col=1)
    return figure


def _seeds(panel: Panel, quantity: str, by_arm: Arms) -> None:
    drawn = [(x, i, name, value) for x, (name, of) in enumerate(by_arm.items()) for i, value in enumerate(of[0])]
    hover = [f"{label(name)}, seed {i}<br>{label(quantity, 60)}: {number(value)}" for _, i, name, value in drawn]
    look: dict[str, Any] = {"marker": {"color": GREY, "size": 7, "opacity": 0.6}, "name": "a seed"}
    x = [x + 0.4 * jitter(i) for x, i, *_ in drawn]
    points(panel, x, [value for *_, value in drawn], hover, showlegend=panel.first, **look)


def _means(panel: Panel, quantity: str, by_arm: Arms) -> None:
    marks = [
        Mark(x, mean, f"{label(name)}<br>{label(quantity, 60)}: {number(mean)}")
        for x, (name, (_, mean)) in enumerate(by_arm.items())
    ]
    look: dict[str, Any] = {"marker": {"color": INK, "symbol": "diamond", "size": 11}, "name": "mean, 95% over seeds"}
    columns(panel, marks, whisker=(2, 6), showlegend=panel.first, **look)


def _lines(quantity: str) -> str:
    """A title in two lines, where it has two parts: panels are narrow."""
    return label(quantity, 60).replace(", ", ",<br>", 1).replace(": ", ":<br>", 1)
