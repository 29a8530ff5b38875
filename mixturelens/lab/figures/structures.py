"""What becomes of a schedule of objectives: behaviour along its phases, and structures over two knobs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mixturelens.figures.marks import Mark, columns
from mixturelens.figures.panels import Panel, panels
from mixturelens.figures.style import INK, SYMBOLS, cue_colour, new_figure
from mixturelens.figures.words import cue_title, label, number

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.lab.structure import StructureRecord

SHARES = {
    "generality": ("ecological generalist", "#4B9B6E"),
    "conditionality": ("conditional policy", "#6C8EBF"),
    "oscillation": ("strategy churn", "#D9825B"),
    "fixed": ("fixed where objectives differ", "#D4D4D4"),
}
"""Share -> the structure that it is of, and its colour."""
_WIDE, _HIGH = 0.9, 0.2
"""Of a bar, in cells: the whole behaviour, and one seed."""
_Cells = Mapping[tuple[float, float, int], "StructureRecord"]


def phase_diagram(cells: _Cells) -> Figure:
    """Cells by (distinguishability, shared structure, seed): a bar a seed, shared out by structure, and their names.

    A whole bar is all behaviour; shares have the record's intervals where one hovers. Of each record the first pair of
    regimes is shown.
    """
    across, up = (sorted({key[i] for key in cells}) for i in (0, 1))
    figure = new_figure(150 + 108 * len(up))
    _bars(figure, cells, across, up)
    for tells in across:
        for shared in up:
            found = Counter(r.structure for (t, s, _), r in cells.items() if (t, s) == (tells, shared))
            words = [name if len(found) == 1 else f"{name} {count}" for name, count in found.most_common()]
            place = {"x": across.index(tells), "y": up.index(shared) + 0.36}
            figure.add_annotation(text=", ".join(words), showarrow=False, font={"size": 12, "color": INK}, **place)
    figure.update_layout(barmode="overlay", width=1080, margin={"l": 96, "t": 60, "b": 60})
    title = "distinguishability: share of questions that show their cue"
    figure.update_xaxes(title=title, **_knob(across))
    title = "shared structure: share of operations<br>on which objectives agree"
    figure.update_yaxes(title=title, **_knob(up))
    return figure


def _knob(values: Sequence[float]) -> dict[str, Any]:
    """An axis of settings at equal distances."""
    ticks = {"tickvals": list(range(len(values))), "ticktext": [f"{value:g}" for value in values]}
    return {**ticks, "range": [-0.5, len(values) - 0.5], "showgrid": False, "zeroline": False}


def _bars(figure: Figure, cells: _Cells, across: Sequence[float], up: Sequence[float]) -> None:
    """A bar a record, its parts side by side: one trace a structure."""
    seeds = sorted({key[2] for key in cells})
    bases = {key: across.index(key[0]) - _WIDE / 2 for key in cells}
    for name, (title, colour) in SHARES.items():
        wide, high, text = [], [], []
        for (tells, shared, seed), record in cells.items():
            value = getattr(record.pairs[0].shares, name)
            wide.append(_WIDE * max(value.value or 0.0, 0.0))
            high.append(up.index(shared) - 0.1 + 1.15 * _HIGH * (seeds.index(seed) - (len(seeds) - 1) / 2))
            where = f"distinguishable {tells:g}, shared {shared:g}, seed {seed}: {record.structure}"
            text.append(f"{where}<br>{title}: {number(value)}")
        look = {"orientation": "h", "marker": {"color": colour}, "name": title}
        said = {"hovertext": text, "hoverinfo": "text"}
        figure.add_bar(x=wide, y=high, base=list(bases.values()), width=_HIGH, **look, **said)
        bases = {key: base + part for (key, base), part in zip(bases.items(), wide, strict=True)}


def schedule(records: Mapping[str, StructureRecord]) -> Figure:
    """A row a run, a panel a cue: how often each objective would pay a completion, at the end of each phase.

    Probabilities with the record's intervals over questions. The background has the colour of the cues that a phase
    trains on; objectives have the colour of their cue. The objective of a cue that no phase trains on is not drawn.
    """
    first = next(iter(records.values()))
    cues = first.cues
    objectives = list(dict.fromkeys(regime for pair in first.pairs for regime in (pair.first, pair.second)))
    titles = {
        "column_titles": [
            cue_title(cue, len(cues)) + ("" if cue in objectives else " (no phase trains on it)") for cue in cues
        ],
        "row_titles": [label(name) for name in records],
    }
    spacing = {"horizontal_spacing": 0.03, "vertical_spacing": 0.12 / len(records)}
    shared = {"shared_xaxes": True, "shared_yaxes": True}
    size, height = (len(records), len(cues)), 130 + 170 * len(records)
    figure, _ = panels(size, [], height, {"t": 84}, **titles, **spacing, **shared)
    for row, record in enumerate(records.values(), start=1):
        ends = [0]
        for point in record.checkpoints[1:]:
            ends.append(ends[-1] + point.steps)
        for column, cue in enumerate(cues, start=1):
            panel = Panel(figure, row, column)
            _phases(panel, record, ends)
            _paid(panel, record, cue, objectives, ends)
            look = {"tickvals": ends, "showgrid": False, "range": [-0.03 * ends[-1], 1.03 * ends[-1]]}
            figure.update_xaxes(title_text="GRPO step" if row == len(records) else None, **look, **panel.at)
            figure.update_yaxes(range=[-0.04, 1.04], tickvals=[0, 0.5, 1], **panel.at)
        figure.update_yaxes(title_text="probability", row=row, col=1)
    return figure


def _phases(panel: Panel, record: StructureRecord, ends: Sequence[int]) -> None:
    """The ground of each phase; of several cues that it trains on, a band each."""
    for start, end, point in zip(ends, ends[1:], record.checkpoints[1:], strict=False):
        for i, trained in enumerate(point.trained):
            box = {"x0": start, "x1": end, "y0": i / len(point.trained), "y1": (i + 1) / len(point.trained)}
            look = {"fillcolor": cue_colour(trained, record.cues), "opacity": 0.13, "line_width": 0, "layer": "below"}
            panel.figure.add_shape(type="rect", **box, **look, **panel.at)


def _paid(panel: Panel, record: StructureRecord, cue: str, objectives: Sequence[str], ends: Sequence[int]) -> None:
    """A line an objective: what it would pay under a cue."""
    for i, objective in enumerate(objectives):
        name = f"would be paid by the objective of {label(objective)}"
        marks = []
        for end, point in zip(ends, record.checkpoints, strict=True):
            value = point.earned[cue][objective]
            said = f"cue {label(cue)}, after {label(point.name)}<br>{name}: {number(value)}"
            marks.append(Mark(end, value, said))
        colour = cue_colour(objective, record.cues)
        look: dict[str, Any] = {"mode": "lines+markers", "line": {"color": colour, "width": 2}}
        look |= {"marker": {"symbol": SYMBOLS[i % len(SYMBOLS)], "size": 7}, "name": name, "legendgroup": name}
        legend = panel.row == panel.column == 1
        columns(panel, marks, whisker=(1.5, 3, colour), showlegend=legend, **look)
