"""What RL was forecast to do to other cues, and what it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mixturelens.figures.marks import old_whiskers as whiskers
from mixturelens.figures.style import GREY, INK, SYMBOLS, cue_colour, label, number, style
from mixturelens.types import Interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.lab.forecast import Curves, ForecastRecord

_LINES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "forecast": ("forecast: softmax drift through the kernel of S", {"color": INK, "width": 2.5}),
    "softmax": ("softmax drift, no kernel", {"color": "#5B7A99", "width": 2, "dash": "dash"}),
    "replicator": ("replicator dynamics", {"color": "#C1272D", "width": 2, "dash": "dashdot"}),
    "renormalised": ("null: S without what earns too little", {"color": GREY, "width": 1.5, "dash": "longdash"}),
    "constant": ("null: as in S", {"color": GREY, "width": 1.5, "dash": "dot"}),
}
"""Of each answer: its name, and a line that looks like that of no policy and no cue."""
_BAND = "rgba(34,34,34,0.13)"


def forecast(record: ForecastRecord) -> Figure:
    """A panel a cue that RL does not train on: its accuracy over the trained cue's. The last one: all, step by step."""
    from plotly.subplots import make_subplots

    trained, columns = label(record.trained_cue), len(record.off) + 1
    figure = make_subplots(
        rows=1,
        cols=columns,
        column_titles=[*(f"cue {label(cue)}, without a clock" for cue in record.off), "step by step"],
        horizontal_spacing=0.2 / columns,
    )
    style(figure, 540)
    figure.update_layout(margin={"t": 40, "b": 160}, legend={"y": 0, "yanchor": "bottom"})
    points = record.happened.points if record.happened else ()
    for column, (cue, curves) in enumerate(record.off.items(), start=1):
        at: dict[str, Any] = {"row": 1, "col": column}
        _band(figure, record.on, curves.forecast, at)
        for name in _LINES:
            _answer(figure, record.on, _values(curves, name), name, at, column == 1)
        _measured(
            figure,
            [point.accuracy[record.trained_cue] for point in points],
            [point.accuracy[cue] for point in points],
            f"measured, cue {label(cue)}",
            [f"step {point.step}" for point in points],
            cue_colour(cue, record.cues),
            at,
        )
        figure.update_xaxes(title_text=f"accuracy under cue {trained}, trained (probability)", **at)
        figure.update_yaxes(title_text=f"accuracy under cue {label(cue)}<br>(probability)", **at)
    at: dict[str, Any] = {"row": 1, "col": columns}
    for i, cue in enumerate(record.cues):
        expected = record.steps[cue]
        steps = list(range(len(expected)))
        _band(figure, steps, expected, at)
        colour = cue_colour(cue, record.cues)
        figure.add_scatter(
            x=steps,
            y=[value.value for value in expected],
            mode="lines",
            line={"color": colour, "width": 2},
            name=f"forecast, cue {label(cue)}",
            hovertext=[f"cue {label(cue)}, step {s}<br>{number(v)}" for s, v in zip(steps, expected, strict=True)],
            hoverinfo="text",
            **at,
        )
        values = [point.accuracy[cue] for point in points]
        up, down = whiskers(values)
        figure.add_scatter(
            x=[point.step for point in points],
            y=[value.value for value in values],
            error_y={"array": up, "arrayminus": down, "thickness": 1.5, "width": 3},
            mode="markers",
            marker={"color": colour, "symbol": SYMBOLS[i % len(SYMBOLS)], "size": 7},
            name=f"measured, cue {label(cue)}",
            showlegend=cue == record.trained_cue,
            hovertext=[f"cue {label(cue)}, step {p.step}<br>{number(v)}" for p, v in zip(points, values, strict=True)],
            hoverinfo="text",
            **at,
        )
    last = max([point.step for point in points], default=len(record.on))
    figure.update_xaxes(title_text="GRPO step", range=[-0.02 * last, 1.3 * last], **at)
    figure.update_yaxes(title_text="accuracy (probability)", **at)
    figure.update_yaxes(range=[-0.04, 1.04])
    return figure


def drifts(columns: Mapping[str, Sequence[ForecastRecord]], cue: str) -> Figure:
    """Runs of several seeds, a column a setting: accuracy under a cue over the trained cue's; below, the same less what
    softmax drift without a kernel says of that very run."""
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=2,
        cols=len(columns),
        column_titles=list(columns),
        vertical_spacing=0.09,
        horizontal_spacing=0.13 / len(columns),
        shared_xaxes=True,
        shared_yaxes=True,
    )
    style(figure, 680)
    figure.update_layout(margin={"t": 34, "b": 110, "l": 90}, legend={"y": 0, "yanchor": "bottom"})
    for column, records in enumerate(columns.values(), start=1):
        for row in (1, 2):
            at: dict[str, Any] = {"row": row, "col": column}
            for i, record in enumerate(records):
                _one(figure, record, cue, i, less=row == 2, at=at, legend=row == column == 1 and i == 0)
        figure.update_xaxes(title_text="trained cue's accuracy (probability)", row=2, col=column)
    figure.update_yaxes(title_text=f"accuracy under cue {label(cue)}<br>(probability)", row=1, col=1)
    figure.update_yaxes(title_text="the same less<br>softmax drift", row=2, col=1)
    return figure


def _one(
    figure: Figure, record: ForecastRecord, cue: str, seed: int, *, less: bool, at: dict[str, Any], legend: bool
) -> None:
    """One run: its band, its lines, its points."""
    curves = record.off[cue]
    base = np.array(curves.softmax if less else np.zeros(len(record.on)))
    _band(figure, record.on, curves.forecast, at, base)
    for name in ("forecast", "softmax", "replicator"):
        _answer(figure, record.on, (np.array(_values(curves, name)) - base).tolist(), name, at, legend, thin=True)
    points = record.happened.points if record.happened else ()
    on = [point.accuracy[record.trained_cue] for point in points]
    here = np.interp([value.known for value in on], record.on, base)
    _measured(
        figure,
        on,
        [_moved(point.accuracy[cue], -float(by)) for point, by in zip(points, here, strict=True)],
        f"measured, cue {label(cue)}, a shape a seed",
        [f"{record.provenance.after}<br>step {point.step}" for point in points],
        cue_colour(cue, record.cues),
        at,
        SYMBOLS[seed % len(SYMBOLS)],
        legend,
    )


def _moved(value: Interval, by: float) -> Interval:
    ends = {name: None if end is None else end + by for name, end in value.model_dump().items()}
    return Interval(**ends)


def _values(curves: Curves, name: str) -> list[float | None]:
    return [value.value if isinstance(value, Interval) else value for value in getattr(curves, name)]


def _band(
    figure: Figure,
    x: Sequence[float],
    values: Sequence[Interval],
    at: dict[str, Any],
    less: np.ndarray | float = 0.0,
) -> None:
    low, high = (np.array([getattr(value, end) for value in values], dtype=float) - less for end in ("low", "high"))
    figure.add_scatter(
        x=[*x, *reversed(x)],
        y=[*high.tolist(), *reversed(low.tolist())],
        fill="toself",
        fillcolor=_BAND,
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        **at,
    )


def _answer(
    figure: Figure,
    on: Sequence[float],
    values: Sequence[float | None],
    name: str,
    at: dict[str, Any],
    legend: bool,
    thin: bool = False,
) -> None:
    title, line = _LINES[name]
    figure.add_scatter(
        x=list(on),
        y=list(values),
        mode="lines",
        line={**line, "width": 1.5} if thin else dict(line),
        name=title,
        legendgroup=name,
        showlegend=legend,
        hovertext=[f"{title}<br>{number(x)}: {number(y)}" for x, y in zip(on, values, strict=True)],
        hoverinfo="text",
        **at,
    )


def _measured(
    figure: Figure,
    on: Sequence[Interval],
    off: Sequence[Interval],
    name: str,
    where: Sequence[str],
    colour: str,
    at: dict[str, Any],
    symbol: str = "circle",
    legend: bool = True,
) -> None:
    right, left = whiskers(on)
    up, down = whiskers(off)
    figure.add_scatter(
        x=[value.value for value in on],
        y=[value.value for value in off],
        error_x={"array": right, "arrayminus": left, "thickness": 1, "width": 0},
        error_y={"array": up, "arrayminus": down, "thickness": 1, "width": 0},
        mode="markers",
        marker={"color": colour, "symbol": symbol, "size": 6},
        name=name,
        legendgroup=name,
        showlegend=legend,
        hovertext=[f"{w}<br>{number(x)}: {number(y)}" for w, x, y in zip(where, on, off, strict=True)],
        hoverinfo="text",
        **at,
    )
