"""Bars of the two splits: of the change of accuracy, and of what tells R from S, in bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mixturelens.figures.marks import old_whiskers as whiskers
from mixturelens.figures.style import INK, ROUTER, SPECIALIST, TERMS, cue_title, label, number, style
from mixturelens.types import Interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.behaviour.record import Bits
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


def bits_split(pairs: Sequence[tuple[str, VerdictRecord]]) -> Figure:
    """How well a completion tells after from before, in bits, a row of panels a pair: the mean over cues, every cue."""
    rows: list[list[tuple[str, list[_Bar]]]] = []
    for _, verdict in pairs:
        bits = {cue: state.bits for cue, state in verdict.per_cue.items()}
        # the specialist's term stands alone where the suite names no behaviours to split it by
        split = verdict.bits.conditioning.measured and verdict.bits.skill.measured
        rows.append(
            [("mean over cues", _terms(verdict.bits, split))]
            + [
                (cue_title(cue, 1 + len(bits)), [] if part is None else _terms(part, split))
                for cue, part in bits.items()
            ]
        )
    return _bar_grid([name for name, _ in pairs], rows, _BITS)


def accuracy_split(pairs: Sequence[tuple[str, VerdictRecord]]) -> Figure:
    """Change of expected accuracy, a row of panels a pair and a column a cue: by routing and by specialists."""
    rows: list[list[tuple[str, list[_Bar]]]] = []
    for _, verdict in pairs:
        panels: list[tuple[str, list[_Bar]]] = []
        for cue, state in verdict.per_cue.items():
            change = state.accuracy_change
            bars = (
                []
                if change is None
                else [
                    _Bar("routing", _points(change.selector), ROUTER),
                    _Bar("specialists", _points(change.specialists), SPECIALIST),
                    _Bar("total", _points(change.total), INK),
                ]
            )
            panels.append((cue_title(cue, len(verdict.per_cue)), bars))
        rows.append(panels)
    return _bar_grid([name for name, _ in pairs], rows, _POINTS)


def _terms(bits: Bits, split: bool) -> list[_Bar]:
    names = ["routing", "conditioning", "skill", *([] if split else ["specialist"]), "dormant"]
    notes = {"dormant": "<br>specialist at equal weights of policies; not part of the sum"}
    return [_Bar(name, getattr(bits, name), TERMS[name], name == "dormant", notes.get(name, "")) for name in names]


def _points(value: Interval) -> Interval:
    """A change of a probability in points of accuracy: so many more of 100 completions are right."""
    return Interval(**{end: x and 100 * x for end, x in value})


def _bar_grid(
    pairs: Sequence[str],
    rows: Sequence[Sequence[tuple[str, Sequence[_Bar]]]],
    unit: _Unit,
) -> Figure:
    """Horizontal bars with whiskers, and each number at the right edge of its panel."""
    from plotly.subplots import make_subplots

    columns = max((len(row) for row in rows), default=1)
    longest = max((len(bars) for row in rows for _, bars in row), default=1)
    height = 34 * longest + 74
    figure = make_subplots(
        rows=max(len(rows), 1),
        cols=max(columns, 1),
        horizontal_spacing=0.06 / max(columns, 1),
        vertical_spacing=min(0.5, 74 / (height * max(len(rows), 1))),
        subplot_titles=[_panel_title(pairs, row, i, j) for i, row in enumerate(rows) for j in range(columns)],
    )
    style(figure, height * max(len(rows), 1) + 50)
    figure.update_layout(showlegend=False, margin={"l": 105, "t": 56})
    room = unit.high - unit.low
    for i, row in enumerate(rows, start=1):
        for j, (panel, bars) in enumerate(row, start=1):
            places = [-k - (0.5 if bar.apart else 0.0) for k, bar in enumerate(bars)]
            _draw_bars(figure, bars, places, panel, unit, {"row": i, "col": j})
            # a third of the panel is left for the numbers
            figure.update_xaxes(
                range=[unit.low - 0.04 * room, unit.high + 0.55 * room],
                tickvals=unit.ticks,
                showgrid=False,
                title_text=unit.name if i == len(rows) else None,
                zeroline=True,
                zerolinecolor="#999999",
                row=i,
                col=j,
            )
            figure.update_yaxes(
                tickvals=places,
                ticktext=[bar.name for bar in bars],
                showticklabels=j == 1,
                showgrid=False,
                range=[min(places, default=0) - 0.6, 0.6],
                zeroline=False,
                row=i,
                col=j,
            )
    return figure


def _panel_title(pairs: Sequence[str], row: Sequence[tuple[str, Sequence[_Bar]]], i: int, j: int) -> str:
    if j >= len(row):
        return ""
    return f"<b>{label(pairs[i], 40)}</b><br>{row[j][0]}" if j == 0 else f"<br>{row[j][0]}"


def _draw_bars(
    figure: Figure, bars: Sequence[_Bar], places: Sequence[float], panel: str, unit: _Unit, at: Mapping[str, int]
) -> None:
    for apart in (False, True):
        drawn = [(bar, place) for bar, place in zip(bars, places, strict=True) if bar.apart == apart]
        if not drawn:
            continue
        up, down = whiskers([bar.value for bar, _ in drawn])
        pattern = {"pattern": {"shape": "/", "fgcolor": "#666666"}} if apart else {}
        figure.add_bar(
            x=[bar.value.value for bar, _ in drawn],
            y=[place for _, place in drawn],
            orientation="h",
            width=0.62,
            error_x={"array": up, "arrayminus": down, "color": INK, "thickness": 1.5, "width": 4},
            # plotly.js cannot draw a pattern over a list of colours
            marker={"color": drawn[0][0].colour if apart else [bar.colour for bar, _ in drawn], **pattern},
            hovertext=[f"{panel}<br>{bar.name}: {number(bar.value, unit.digits)}{bar.note}" for bar, _ in drawn],
            hoverinfo="text",
            name=panel,
            **at,
        )
    for bar, place in zip(bars, places, strict=True):
        figure.add_annotation(
            text=number(bar.value.value, unit.digits),
            x=1,
            xref="x domain",
            xanchor="right",
            y=place,
            showarrow=False,
            font={"size": 13, "color": INK},
            **at,
        )
        if bar.apart:
            figure.add_hline(y=place + 0.75, line={"color": "#BBBBBB", "width": 1, "dash": "dot"}, **at)  # pyright: ignore[reportArgumentType]
