"""Marks with intervals: dots a row each, controls beside them, bars, lines and bands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mixturelens.figures.panels import Panel
from mixturelens.figures.style import GREY, INK, jitter
from mixturelens.types import Interval

Coordinates = Sequence[float | None]


class Mark(NamedTuple):
    """One number: where it stands along the axis that counts rows or steps, and what it says where one hovers."""

    place: float | None
    value: Interval
    hover: str


def whiskers(values: Sequence[Interval], thickness: float = 2, width: float = 5, colour: str | None = INK) -> Any:
    """Intervals as plotly wants them: lengths above and below each value, none where an end is not known."""
    up = [None if v.value is None or v.high is None else max(v.high - v.value, 0.0) for v in values]
    down = [None if v.value is None or v.low is None else max(v.value - v.low, 0.0) for v in values]
    look = {"array": up, "arrayminus": down, "thickness": thickness, "width": width}
    return look if colour is None else {**look, "color": colour}


def points(panel: Panel, x: Sequence[Any], y: Sequence[Any], hover: Sequence[str] | None, **look: Any) -> None:
    """Points with a text each that is shown where one hovers, or none."""
    said = {"hoverinfo": "skip"} if hover is None else {"hovertext": list(hover), "hoverinfo": "text"}
    panel.figure.add_scatter(x=list(x), y=list(y), **{"mode": "markers", **said, **look}, **panel.at)


def dots(panel: Panel, marks: Sequence[Mark], **look: Any) -> None:
    """Coordinates across with their intervals, each in its row. `whisker`: thickness, width at its ends, and colour."""
    error = whiskers([mark.value for mark in marks], *look.pop("whisker", ()))
    numbers, places, hover = _lists(marks)
    points(panel, numbers, places, hover, error_x=error, **look)


def columns(panel: Panel, marks: Sequence[Mark], **look: Any) -> None:
    """Coordinates up with their intervals, each in its column."""
    error = whiskers([mark.value for mark in marks], *look.pop("whisker", ()))
    numbers, places, hover = _lists(marks)
    points(panel, places, numbers, hover, error_y=error, **look)


def _lists(marks: Sequence[Mark]) -> tuple[list[float | None], list[float | None], list[str]]:
    """Coordinates, places and texts of marks."""
    return [mark.value.value for mark in marks], [mark.place for mark in marks], [mark.hover for mark in marks]


def controls(
    panel: Panel,
    rows: Sequence[Sequence[Interval | float | None]],
    hover: Callable[[int, int], str],
    place: tuple[float, float] = (0.0, 0.34),
    **look: Any,
) -> None:
    """What the same comes to by chance: grey points in the row that they belong to, spread so that each is seen.

    `hover` says what point i of row y is. `place`: how far below the middle of its row, and how far apart.
    """
    every = [(y, i, _plain(value)) for y, values in enumerate(rows) for i, value in enumerate(values)]
    found = [(y, i, value) for y, i, value in every if value is not None]
    lift, spread = place
    look["marker"] = {"color": GREY, "size": 7, "opacity": 0.6, **look.pop("marker", {})}
    y = [y + lift + spread * jitter(i) for y, i, _ in found]
    points(panel, [value for *_, value in found], y, [hover(y, i) for y, i, _ in found], **look)


def _plain(value: Interval | float | None) -> float | None:
    return value.value if isinstance(value, Interval) else value


def bars(panel: Panel, marks: Sequence[Mark], **look: Any) -> None:
    """Bars across with their intervals, each in its row."""
    numbers, places, hover = _lists(marks)
    look = {"orientation": "h", "error_x": whiskers([mark.value for mark in marks], 1.5, 4), **look}
    panel.figure.add_bar(x=numbers, y=places, hovertext=hover, hoverinfo="text", **look, **panel.at)


def line(
    panel: Panel, x: Sequence[float | None], y: Sequence[float | None], hover: Sequence[str] | None, **look: Any
) -> None:
    """A line through numbers; where nothing was measured there is a gap."""
    points(panel, x, y, hover, **{"mode": "lines", **look})


def band(panel: Panel, x: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str) -> None:
    """The ground between two lines: intervals of what was measured everywhere."""
    outline = {"fill": "toself", "fillcolor": colour, "line": {"width": 0}, "showlegend": False}
    line(panel, [*x, *reversed(x)], [*high, *reversed(low)], None, **outline)
