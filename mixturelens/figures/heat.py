"""Heat maps: cells that say what they hold, token labels below them, and outlines of some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mixturelens.figures.panels import Panel
from mixturelens.figures.style import DIVERGING, INK, SCALE

EMPTY = "#E9ECEF"
"""The ground of maps, seen where there is no cell."""


class HeatCell(NamedTuple):
    """What one cell shows: a number as a colour, a text in it, and a text where one hovers."""

    value: float | None
    text: str
    hover: str


def heat(panel: Panel, cells: Sequence[Sequence[HeatCell]], size: int, **look: Any) -> None:
    """A map of rows of cells, with texts of this size; `look` is what plotly's heat map takes, colours above all."""
    x = list(range(max((len(line) for line in cells), default=0)))
    panel.figure.add_heatmap(
        z=[[cell.value for cell in line] for line in cells],
        text=[[cell.text for cell in line] for line in cells],
        hovertext=[[cell.hover for cell in line] for line in cells],
        **{"x": x, "y": list(range(len(cells))), "xgap": 1, "ygap": 1, **look},
        texttemplate="%{text}",
        textfont={"color": INK, "size": size},
        hoverinfo="text",
        **panel.at,
    )


def across(panel: Panel, names: Sequence[str], **more: Any) -> None:
    """A column a name."""
    look = {"tickvals": list(range(len(names))), "ticktext": list(names), "range": [-0.5, max(len(names), 1) - 0.5]}
    panel.figure.update_xaxes(**{**look, "showgrid": False, **more}, **panel.at)


def up(panel: Panel, names: Mapping[float, str], rows: int) -> None:
    """Rows of a map from below to above, and names at some of them; the first panel alone shows these."""
    look: dict[str, Any] = {"tickvals": list(names), "ticktext": list(names.values()), "tickfont": {"size": 12}}
    look |= {"range": [-0.5, max(rows, 1) - 0.5], "showgrid": False, "zeroline": False}
    panel.figure.update_yaxes(**look, showticklabels=panel.first, **panel.at)


def outline(panel: Panel, x: float, y: float, half: tuple[float, float], width: float) -> None:
    """A frame around one cell; `half`: how far it goes from the middle of the cell."""
    box = {"x0": x - half[0], "x1": x + half[0], "y0": y - half[1], "y1": y + half[1]}
    panel.figure.add_shape(type="rect", line={"color": INK, "width": width}, **box, **panel.at)


def colour_bar(pixels: int, **more: Any) -> dict[str, Any]:
    """The scale beside a map, at its top."""
    return {"thickness": 12, "lenmode": "pixels", "len": pixels, "y": 1, "yanchor": "top", **more}


def scale(low: float, high: float, stops: Sequence[tuple[float, str]] = SCALE) -> dict[str, Any]:
    """The colours of one map, from its lowest to its highest number."""
    return {"zmin": low, "zmax": high, "colorscale": [list(stop) for stop in stops]}


def diverging(pixels: int, **more: Any) -> dict[str, Any]:
    """The colours of all maps of a figure, from -1 against to 1 for."""
    scale = [list(stop) for stop in DIVERGING]
    return {"cmin": -1, "cmax": 1, "colorscale": scale, "colorbar": colour_bar(pixels, **more)}
