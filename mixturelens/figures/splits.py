"""The two splits as bars: of the change of accuracy, and of what tells R from S, in bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mixturelens.figures.marks import Mark, bars
from mixturelens.figures.panels import Panel, at_edge, number_axis, panels, row_axis, rule
from mixturelens.figures.style import INK, ROUTER, SPECIALIST, TERMS
from mixturelens.figures.words import cue_title, label, number
from mixturelens.types import Interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.behaviour.record import AccuracyChange, Bits
    from mixturelens.routing.verdict import VerdictRecord


class _Bar(NamedTuple):
    name: str
    value: Interval
    colour: str
    apart: bool = False
    """Not part of the sum: drawn hatched, below a line."""
    note: str = ""


class _Unit(NamedTuple):
    name: str
    low: float
    high: float
    ticks: tuple[float, ...]
    digits: int


_BITS = _Unit("bits", 0.0, 1.0, (0, 0.5, 1), 3)
_POINTS = _Unit("points of accuracy", -100.0, 100.0, (-100, -50, 0, 50, 100), 1)
_Row = Sequence[tuple[str, Sequence[_Bar]]]
"""Panels beside each other, each with its title."""


def bits_split(pairs: Sequence[tuple[str, VerdictRecord]]) -> Figure:
    """How well a completion tells after from before, in bits, a row of panels a pair: the mean over cues, every cue.

    Whiskers are the record's intervals over questions.
    """
    rows = []
    for _, verdict in pairs:
        # the specialist's term stands alone where the suite names no behaviours to split it by
        split = verdict.bits.conditioning.measured and verdict.bits.skill.measured
        row = [("mean over cues", _terms(verdict.bits, split))]
        for cue, state in verdict.per_cue.items():
            title = cue_title(cue, 1 + len(verdict.per_cue))
            row.append((title, [] if state.bits is None else _terms(state.bits, split)))
        rows.append(row)
    return _bar_grid([name for name, _ in pairs], rows, _BITS)


def accuracy_split(pairs: Sequence[tuple[str, VerdictRecord]]) -> Figure:
    """Change of expected accuracy, in points: a row of panels a pair and a column a cue, by routing and by specialists.

    Whiskers are the record's intervals over questions.
    """
    rows = []
    for _, verdict in pairs:
        found = [(cue, state.accuracy_change) for cue, state in verdict.per_cue.items()]
        rows.append([(cue_title(cue, len(found)), [] if each is None else _shares(each)) for cue, each in found])
    return _bar_grid([name for name, _ in pairs], rows, _POINTS)


def _shares(change: AccuracyChange) -> list[_Bar]:
    return [
        _Bar("routing", _points(change.selector), ROUTER),
        _Bar("specialists", _points(change.specialists), SPECIALIST),
        _Bar("total", _points(change.total), INK),
    ]


def _terms(bits: Bits, split: bool) -> list[_Bar]:
    names = ["routing", "conditioning", "skill", *([] if split else ["specialist"]), "dormant"]
    notes = {"dormant": "<br>specialist at equal weights of policies; not part of the sum"}
    return [_Bar(name, getattr(bits, name), TERMS[name], name == "dormant", notes.get(name, "")) for name in names]


def _points(value: Interval) -> Interval:
    """A change of a probability in points of accuracy: so many more of 100 completions are right."""
    return Interval(**{end: x and 100 * x for end, x in value})


def _bar_grid(pairs: Sequence[str], rows: Sequence[_Row], unit: _Unit) -> Figure:
    """Horizontal bars with whiskers, and each number at the right edge of its panel."""
    columns = max((len(row) for row in rows), default=1)
    height = 34 * max((len(found) for row in rows for _, found in row), default=1) + 74
    titles = [title for pair, row in zip(pairs, rows, strict=True) for title in _titles(pair, row, columns)]
    high = max(len(rows), 1)
    spacing: dict[str, Any] = {
        "horizontal_spacing": 0.06 / max(columns, 1),
        "vertical_spacing": min(0.5, 74 / (height * high)),
    }
    size, margin = (len(rows), columns), {"l": 105, "t": 56}
    figure, panes = panels(size, titles, height * high + 50, margin, **spacing)
    figure.update_layout(showlegend=False)
    room = unit.high - unit.low
    span = (unit.low - 0.04 * room, unit.high + 0.55 * room)  # a third of the panel is left for the numbers
    for i, row in enumerate(rows):
        for panel, (title, found) in zip(panes[i * columns :], row, strict=False):
            places = [-k - (0.5 if bar.apart else 0.0) for k, bar in enumerate(found)]
            _draw(panel, list(zip(found, places, strict=True)), title, unit)
            number_axis(panel, span, unit.name if panel.row == len(rows) else None, tickvals=unit.ticks, showgrid=False)
            below = {"tickvals": places, "range": [min(places, default=0) - 0.6, 0.6]}
            row_axis(panel, [bar.name for bar in found], **below)
    return figure


def _titles(pair: str, row: _Row, columns: int) -> list[str]:
    """Of a row of panels: the pair stands over the first."""
    titles = [f"<br>{title}" for title, _ in row] + [""] * (columns - len(row))
    return [f"<b>{label(pair, 40)}</b>{title}" if j == 0 and title else title for j, title in enumerate(titles)]


def _draw(panel: Panel, found: Sequence[tuple[_Bar, float]], title: str, unit: _Unit) -> None:
    """Those that add up as one trace, those apart as another."""
    for apart in (False, True):
        drawn = [(bar, place) for bar, place in found if bar.apart == apart]
        if not drawn:
            continue
        # plotly.js cannot draw a pattern over a list of colours
        marker: dict[str, Any] = {"color": drawn[0][0].colour if apart else [bar.colour for bar, _ in drawn]}
        marker |= {"pattern": {"shape": "/", "fgcolor": "#666666"}} if apart else {}
        marks = [
            Mark(place, bar.value, f"{title}<br>{bar.name}: {number(bar.value, unit.digits)}{bar.note}")
            for bar, place in drawn
        ]
        bars(panel, marks, width=0.62, marker=marker, name=title)
    for bar, place in found:
        at_edge(panel, number(bar.value.value, unit.digits), place, 13)
        if bar.apart:
            rule(panel, y=place + 0.75, color="#BBBBBB", dash="dot")
