"""Marks with intervals: dots a row each, controls beside them, bars, lines and bands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mixturelens.figures.panels import Panel
from mixturelens.figures.style import GREY, INK, jitter
from mixturelens.types import Interval

Places = Sequence[float | None]
"""Where marks stand along the axis that counts rows or steps."""


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


def dots(panel: Panel, values: Sequence[Interval], places: Places, hover: Sequence[str], **look: Any) -> None:
    """Numbers across with their intervals, each in its row. `whisker`: thickness, width at its ends, and colour."""
    error = whiskers(values, *look.pop("whisker", ()))
    points(panel, [value.value for value in values], places, hover, error_x=error, **look)


def columns(panel: Panel, values: Sequence[Interval], places: Places, hover: Sequence[str], **look: Any) -> None:
    """Numbers up with their intervals, each in its column."""
    error = whiskers(values, *look.pop("whisker", ()))
    points(panel, places, [value.value for value in values], hover, error_y=error, **look)


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


def bars(panel: Panel, values: Sequence[Interval], places: Places, hover: Sequence[str], **look: Any) -> None:
    """Bars across with their intervals, each in its row."""
    look = {"orientation": "h", "error_x": whiskers(values, 1.5, 4), "hovertext": list(hover), **look}
    x = [value.value for value in values]
    panel.figure.add_bar(x=x, y=list(places), hoverinfo="text", **look, **panel.at)


def line(panel: Panel, x: Sequence[float], y: Sequence[float | None], hover: Sequence[str] | None, **look: Any) -> None:
    """A line through numbers; where nothing was measured there is a gap."""
    points(panel, x, y, hover, **{"mode": "lines", **look})


def band(panel: Panel, x: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str) -> None:
    """The ground between two lines: intervals of what was measured everywhere."""
    outline = {"fill": "toself", "fillcolor": colour, "line": {"width": 0}, "showlegend": False}
    line(panel, [*x, *reversed(x)], [*high, *reversed(low)], None, **outline)


def old_whiskers(values: Sequence[Interval]) -> Any:
    error = whiskers(values)
    return error["array"], error["arrayminus"]
