"""What RL was forecast to do to other cues, and what it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mixturelens.figures.marks import Mark, band, columns, line, whiskers
from mixturelens.figures.panels import Panel, panels
from mixturelens.figures.style import GREY, INK, SYMBOLS, cue_colour
from mixturelens.figures.words import label, number
from mixturelens.types import Interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.lab.forecast.record import Curves, ForecastRecord

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
    """A panel a cue that RL does not train on: its accuracy over the trained cue's. The last one: all, step by step.

    Probabilities; bands and whiskers are the record's intervals over questions, of the forecast and of what happened.
    """
    count = len(record.off) + 1
    titles = [*(f"cue {label(cue)}, without a clock" for cue in record.off), "step by step"]
    margin, spacing = {"t": 40, "b": 160}, 0.2 / count
    figure, (*panes, last_panel) = panels((1, count), [], 540, margin, column_titles=titles, horizontal_spacing=spacing)
    figure.update_layout(legend={"y": 0, "yanchor": "bottom"})
    points = record.happened.points if record.happened else ()
    on = [point.accuracy[record.trained_cue] for point in points]
    for panel, (cue, curves) in zip(panes, record.off.items(), strict=True):
        _band(panel, record.on, curves.forecast)
        for name in _LINES:
            _answer(panel, record.on, _values(curves, name), name, showlegend=panel.first)
        hover = [f"step {point.step}" for point in points]
        look = {"color": cue_colour(cue, record.cues), "symbol": "circle"}
        _measured(panel, on, [point.accuracy[cue] for point in points], hover, look, name=f"measured, cue {label(cue)}")
        title = f"accuracy under cue {label(record.trained_cue)}, trained (probability)"
        figure.update_xaxes(title_text=title, **panel.at)
        figure.update_yaxes(title_text=f"accuracy under cue {label(cue)}<br>(probability)", **panel.at)
    for i in range(len(record.cues)):
        _by_step(last_panel, record, i)
    last = max([point.step for point in points], default=len(record.on))
    figure.update_xaxes(title_text="GRPO step", range=[-0.02 * last, 1.3 * last], **last_panel.at)
    figure.update_yaxes(title_text="accuracy (probability)", **last_panel.at)
    figure.update_yaxes(range=[-0.04, 1.04])
    return figure


def _by_step(panel: Panel, record: ForecastRecord, i: int) -> None:
    """One cue step by step: its band, its line, and what was measured."""
    cue = record.cues[i]
    colour, expected = cue_colour(cue, record.cues), record.steps[cue]
    steps = list(range(len(expected)))
    _band(panel, steps, expected)
    hover = [f"cue {label(cue)}, step {step}<br>{number(v)}" for step, v in zip(steps, expected, strict=True)]
    y = [value.value for value in expected]
    line(panel, steps, y, hover, line={"color": colour, "width": 2}, name=f"forecast, cue {label(cue)}")
    points = record.happened.points if record.happened else ()
    marks = [
        Mark(p.step, value := p.accuracy[cue], f"cue {label(cue)}, step {p.step}<br>{number(value)}") for p in points
    ]
    look: dict[str, Any] = {"marker": {"color": colour, "symbol": SYMBOLS[i % len(SYMBOLS)], "size": 7}}
    look |= {"name": f"measured, cue {label(cue)}", "showlegend": cue == record.trained_cue}
    columns(panel, marks, whisker=(1.5, 3, None), **look)


def drifts(columns: Mapping[str, Sequence[ForecastRecord]], cue: str) -> Figure:
    """Runs of several seeds, a column a setting: accuracy under a cue over the trained cue's; below, the same less what
    softmax drift without a kernel says of that very run.

    Probabilities with the records' intervals over questions.
    """
    spacing = {"vertical_spacing": 0.09, "horizontal_spacing": 0.13 / len(columns)}
    shared = {"shared_xaxes": True, "shared_yaxes": True, "column_titles": list(columns)}
    figure, _ = panels((2, len(columns)), [], 680, {"t": 34, "b": 110, "l": 90}, **spacing, **shared)
    figure.update_layout(legend={"y": 0, "yanchor": "bottom"})
    for column, records in enumerate(columns.values(), start=1):
        for row in (1, 2):
            for i, record in enumerate(records):
                _one(Panel(figure, row, column), record, cue, i)
        figure.update_xaxes(title_text="trained cue's accuracy (probability)", row=2, col=column)
    figure.update_yaxes(title_text=f"accuracy under cue {label(cue)}<br>(probability)", row=1, col=1)
    figure.update_yaxes(title_text="the same less<br>softmax drift", row=2, col=1)
    return figure


def _one(panel: Panel, record: ForecastRecord, cue: str, seed: int) -> None:
    """One run: its band, its lines, its points; in the second row less softmax drift."""
    curves, legend = record.off[cue], panel.row == panel.column == 1 and seed == 0
    base = np.array(curves.softmax if panel.row == 2 else np.zeros(len(record.on)))
    _band(panel, record.on, curves.forecast, base)
    for name in ("forecast", "softmax", "replicator"):
        values = (np.array(_values(curves, name)) - base).tolist()
        _answer(panel, record.on, values, name, showlegend=legend, line={**_LINES[name][1], "width": 1.5})
    points = record.happened.points if record.happened else ()
    on = [point.accuracy[record.trained_cue] for point in points]
    here = np.interp([value.known for value in on], record.on, base)
    off = [_moved(point.accuracy[cue], -float(by)) for point, by in zip(points, here, strict=True)]
    hover = [f"{record.provenance.after}<br>step {point.step}" for point in points]
    look = {"color": cue_colour(cue, record.cues), "symbol": SYMBOLS[seed % len(SYMBOLS)]}
    name = f"measured, cue {label(cue)}, a shape a seed"
    _measured(panel, on, off, hover, look, name=name, showlegend=legend)


def _moved(value: Interval, by: float) -> Interval:
    return Interval(**{name: None if end is None else end + by for name, end in value.model_dump().items()})


def _values(curves: Curves, name: str) -> list[float | None]:
    return [value.value if isinstance(value, Interval) else value for value in getattr(curves, name)]


def _band(panel: Panel, x: Sequence[float], values: Sequence[Interval], less: np.ndarray | float = 0.0) -> None:
    """The intervals of the forecast."""
    low, high = (np.array([getattr(value, end) for value in values], dtype=float) - less for end in ("low", "high"))
    band(panel, x, low.tolist(), high.tolist(), _BAND)


def _answer(panel: Panel, on: Sequence[float], values: Sequence[float | None], name: str, **look: Any) -> None:
    title, drawn = _LINES[name]
    hover = [f"{title}<br>{number(x)}: {number(y)}" for x, y in zip(on, values, strict=True)]
    line(panel, on, values, hover, **{"line": dict(drawn), "name": title, "legendgroup": name, **look})


def _measured(
    panel: Panel, on: Sequence[Interval], off: Sequence[Interval], where: Sequence[str], marker: Any, **look: Any
) -> None:
    """Points with crosses for intervals: accuracy under both cues at each step."""
    marks = [Mark(x.value, y, f"{w}<br>{number(x)}: {number(y)}") for w, x, y in zip(where, on, off, strict=True)]
    look = {"marker": {**marker, "size": 6}, "legendgroup": look["name"], "error_x": whiskers(on, 1, 0, None), **look}
    columns(panel, marks, whisker=(1, 0, None), **look)
