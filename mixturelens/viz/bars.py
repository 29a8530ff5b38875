"""Bars of the two splits: of KL(R || S) in nats, and of the change of accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mixturelens.types import Interval
from mixturelens.viz.style import INK, ROUTER, SPECIALIST, TERMS, cue_title, label, number, style
from mixturelens.viz.trajectories import whiskers

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.behaviour.record import Nats
    from mixturelens.routing.verdict import VerdictRecord


class _Bar(NamedTuple):
    name: str
    value: Interval
    colour: str
    apart: bool = False
    """Not part of the sum: drawn hatched, below a line."""
    note: str = ""


def kl_split(pairs: Sequence[tuple[str, VerdictRecord]]) -> Figure:
    """KL(after || before) in nats, a row of panels a pair: the mean over cues, then every cue."""
    rows: list[list[tuple[str, list[_Bar]]]] = []
    for _, verdict in pairs:
        nats = {cue: state.nats for cue, state in verdict.per_cue.items()}
        # the specialist's term stands alone where the suite names no behaviours to split it by
        split = verdict.nats.conditioning.measured and verdict.nats.skill.measured
        rows.append(
            [("mean over cues", _terms(verdict.nats, split))]
            + [
                (cue_title(cue, 1 + len(nats)), [] if part is None else _terms(part, split))
                for cue, part in nats.items()
            ]
        )
    return _bar_grid([name for name, _ in pairs], rows, "nats", None)


def accuracy_split(pairs: Sequence[tuple[str, VerdictRecord]]) -> Figure:
    """Change of expected accuracy, a row of panels a pair and a column a cue: what the selector and specialists did."""
    rows: list[list[tuple[str, list[_Bar]]]] = []
    for _, verdict in pairs:
        panels: list[tuple[str, list[_Bar]]] = []
        for cue, state in verdict.per_cue.items():
            change = state.accuracy_change
            bars = (
                []
                if change is None
                else [
                    _Bar("selector", change.selector, ROUTER),
                    _Bar("specialists", change.specialists, SPECIALIST),
                    _Bar("total", change.total, INK),
                ]
            )
            panels.append((cue_title(cue, len(verdict.per_cue)), bars))
        rows.append(panels)
    return _bar_grid([name for name, _ in pairs], rows, "change of accuracy (probability)", (-1.0, 1.0))


def _terms(nats: Nats, split: bool) -> list[_Bar]:
    names = ["routing", "wording", "conditioning", "skill", *([] if split else ["specialist"]), "other", "dormant"]
    notes = {
        "skill": f"<br>of which behaviours new to a policy: {number(nats.novel)}",
        "dormant": "<br>specialist term at equal policy weights; not part of the sum",
    }
    return [_Bar(name, getattr(nats, name), TERMS[name], name == "dormant", notes.get(name, "")) for name in names]


def _bar_grid(
    pairs: Sequence[str],
    rows: Sequence[Sequence[tuple[str, Sequence[_Bar]]]],
    unit: str,
    span: tuple[float, float] | None,
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
    ends = [end for row in rows for _, bars in row for bar in bars for end in _ends(bar.value)]
    low, high = span or (min([0.0, *ends]), max([1e-3, *ends]))
    for i, row in enumerate(rows, start=1):
        for j, (panel, bars) in enumerate(row, start=1):
            places = [-k - (0.5 if bar.apart else 0.0) for k, bar in enumerate(bars)]
            _draw_bars(figure, bars, places, panel, i, j)
            # a third of the panel is left for the numbers
            figure.update_xaxes(
                range=[low - 0.04 * (high - low), high + 0.55 * (high - low)],
                tickvals=[-1, -0.5, 0, 0.5, 1] if span else None,
                nticks=5,
                showgrid=False,
                title_text=unit if i == len(rows) else None,
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
    figure: Figure, bars: Sequence[_Bar], places: Sequence[float], panel: str, row: int, column: int
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
            hovertext=[f"{panel}<br>{bar.name}: {number(bar.value)}{bar.note}" for bar, _ in drawn],
            hoverinfo="text",
            name=panel,
            row=row,
            col=column,
        )
    for bar, place in zip(bars, places, strict=True):
        figure.add_annotation(
            text=number(bar.value.value),
            x=1,
            xref="x domain",
            xanchor="right",
            y=place,
            showarrow=False,
            font={"size": 13, "color": INK},
            row=row,
            col=column,
        )
        if bar.apart:
            figure.add_hline(y=place + 0.75, line={"color": "#BBBBBB", "width": 1, "dash": "dot"}, row=row, col=column)  # pyright: ignore[reportArgumentType]


def _ends(value: Interval) -> list[float]:
    return [end for end in (value.low, value.value, value.high) if end is not None]
