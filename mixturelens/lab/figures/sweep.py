"""What a grid of runs came to: heat maps over two of its keys, of numbers and of words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mixturelens.figures.heat import EMPTY, HeatCell, heat, scale
from mixturelens.figures.heat import across as names
from mixturelens.figures.panels import Panel, panels, row_axis, stacked
from mixturelens.figures.style import DIVERGING, SCALE
from mixturelens.figures.words import DASH, label, number

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

WIDE = 1000
"""Pixels that panels share: less than the page leaves them."""
LEAST_COLUMN = 84
"""Pixels in which `0.994 to 0.999` can be read; in narrower columns it is left to hovering."""
EACH = 58
"""Pixels of a row."""
TINTS = {
    "routing": "#C9D3E0",
    "specialist": "#EBDCB2",
    "both": "#DDD0EE",
    "neither": "#E9E9E9",
    "inconclusive": "#FFFFFF",
}
"""Light, so that dark text can be read on them; other words get the tints of _MORE in turn."""
_MORE = ("#CDE7E0", "#F6D5C3", "#D3E3F3", "#F1D6E5", "#E4E8C4")

_PLAIN = {"zeroline": False, "ticks": ""}
_LOOK = {"showscale": False, "xgap": 2, "ygap": 2}


class Spread(NamedTuple):
    """A number over the seeds of one setting."""

    median: float | None
    low: float | None
    """The least of the seeds."""
    high: float | None
    measured: int
    """Seeds in which it was measured."""
    seeds: int


class NumberMap(NamedTuple):
    title: str
    cells: Sequence[Sequence[Spread]]
    """Row by row."""
    low: float
    """Where the colours begin; below zero they are those of for and against."""
    high: float


class WordMap(NamedTuple):
    title: str
    cells: Sequence[Sequence[Mapping[str, int]]]
    """How many seeds say which word, the most frequent first."""


class Axis(NamedTuple):
    key: str
    values: Sequence[str]


def heat_maps(maps: Sequence[NumberMap | WordMap], across: Axis, up: Axis) -> Figure:
    """A panel a number (median over seeds; below it the least and the most) or a word (how many seeds say it).

    A word's tint is that of more than half of the seeds. A dash stands where nothing was measured.
    """
    wide = LEAST_COLUMN * max(len(across.values), 1) + 24
    columns = max(1, min(len(maps), WIDE // wide, 4))
    rows = math.ceil(len(maps) / columns)
    inner, gap = stacked(rows, EACH * max(len(up.values), 1), 108)
    longest = max((len(value) for value in up.values), default=0)
    margin = {"l": 44 + 7 * min(longest, 20), "r": 12, "t": 40, "b": 62}
    spacing = {"horizontal_spacing": 0.03 if columns > 1 else 0, "vertical_spacing": gap}
    titles = [label(each.title, 40) for each in maps]
    figure, panes = panels((rows, columns), titles, inner + 102, margin, **spacing)
    figure.update_layout(plot_bgcolor=EMPTY)
    for panel, each in zip(panes, maps, strict=False):
        said = [[_where(across, x) + _where(up, y) for x in across.values] for y in up.values]
        draw = _draw_numbers if isinstance(each, NumberMap) else _draw_words
        draw(panel, each, said, wide <= WIDE)  # pyright: ignore[reportArgumentType]
        names(panel, [label(value, 20) for value in across.values], title_text=label(across.key), **_PLAIN)
        title = label(up.key) if panel.first else None
        look = {"title_text": title, "range": [-0.5, max(len(up.values), 1) - 0.5]}
        row_axis(panel, [label(value, 20) for value in up.values], ticks="", **look)
    return figure


def _where(axis: Axis, value: str) -> str:
    """One setting of a cell, as a line of its hover text."""
    return f"{label(axis.key)} {label(value)}<br>" if axis.key else ""


def _draw_numbers(panel: Panel, each: NumberMap, said: Sequence[Sequence[str]], roomy: bool) -> None:
    """Medians as colours, from white or on both sides of it."""
    cells = [
        [
            HeatCell(spread.median, _short(spread, roomy), where + _spread(spread))
            for spread, where in zip(*row, strict=True)
        ]
        for row in zip(each.cells, said, strict=True)
    ]
    colours = scale(each.low, each.high, SCALE if each.low >= 0 else DIVERGING)
    heat(panel, cells, 13, **colours, **_LOOK)


def _draw_words(panel: Panel, each: WordMap, said: Sequence[Sequence[str]], roomy: bool) -> None:
    """The tint of the word that more than half say; white where there is no such word."""
    tints = _tints(each)
    cells = [
        [
            HeatCell(_tint(words, list(tints)), _words(words) if roomy else "", where + _words(words))
            for words, where in zip(*row, strict=True)
        ]
        for row in zip(each.cells, said, strict=True)
    ]
    heat(panel, cells, 13, colorscale=_steps([*tints.values(), "#FFFFFF"]), zmin=0, zmax=len(tints), **_LOOK)


def _short(spread: Spread, roomy: bool) -> str:
    return _spread(spread) if roomy else number(spread.median, 1).replace("0.", ".")


def _spread(spread: Spread) -> str:
    if spread.median is None:
        return DASH
    lines = [number(spread.median)]
    if spread.measured > 1:
        lines.append(f"{number(spread.low)} to {number(spread.high)}")
    if spread.measured < spread.seeds:
        lines.append(f"{spread.measured} of {spread.seeds} seeds")
    return _small(lines)


def _words(words: Mapping[str, int]) -> str:
    if not words:
        return DASH
    if len(words) == 1:
        [(word, seeds)] = words.items()
        return _small([label(word), f"{seeds} of {seeds}"])
    return "<br>".join(f"{label(word, 14)} {seeds}" for word, seeds in words.items())


def _small(lines: Sequence[str]) -> str:
    first, *rest = lines
    return "<br>".join([first, *(f"<span style='font-size:10.5px'>{line}</span>" for line in rest)])


def _tints(each: WordMap) -> dict[str, str]:
    """Word -> tint."""
    said = dict.fromkeys(word for line in each.cells for words in line for word in words)
    others = [word for word in said if word not in TINTS]
    return {word: TINTS.get(word) or _MORE[others.index(word) % len(_MORE)] for word in said}


def _tint(words: Mapping[str, int], known: Sequence[str]) -> int | None:
    """The place of the tint of the word that more than half say; past all of them where there is no such word."""
    if not words:
        return None
    word = next(iter(words))
    return known.index(word) if 2 * words[word] > sum(words.values()) else len(known)


def _steps(colours: Sequence[str]) -> list[tuple[float, str]]:
    """A scale without shades: a colour an integer, from 0 to len - 1."""
    last = max(len(colours) - 1, 1)
    edges = [0.0, *((i + 0.5) / last for i in range(len(colours) - 1)), 1.0]
    return [(edge, colour) for i, colour in enumerate(colours) for edge in (edges[i], edges[i + 1])]
