"""What becomes of a schedule of objectives: behaviour along its phases, and structures over two knobs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mixturelens.figures.marks import old_whiskers as whiskers
from mixturelens.figures.style import INK, SYMBOLS, cue_colour, cue_title, label, number, style

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


def phase_diagram(cells: Mapping[tuple[float, float, int], StructureRecord]) -> Figure:
    """Cells by (distinguishability, shared structure, seed): a bar a seed, shared out by structure, and their names.

    Of each record the first pair of regimes is shown.
    """
    from plotly.graph_objects import Figure

    across, up = (sorted({key[i] for key in cells}) for i in (0, 1))
    figure = style(Figure(), 150 + 108 * len(up))
    seeds = sorted({key[2] for key in cells})
    drawn: dict[str, dict[str, list[Any]]] = {name: {"x": [], "y": [], "base": [], "text": []} for name in SHARES}
    for (tells, shared, seed), record in cells.items():
        shares = record.pairs[0].shares
        base = across.index(tells) - _WIDE / 2
        for name, bars in drawn.items():
            value = getattr(shares, name)
            bars["x"].append(_WIDE * max(value.value or 0.0, 0.0))
            bars["y"].append(up.index(shared) - 0.1 + 1.15 * _HIGH * (seeds.index(seed) - (len(seeds) - 1) / 2))
            bars["base"].append(base)
            bars["text"].append(
                f"distinguishable {tells:g}, shared {shared:g}, seed {seed}: {record.structure}<br>"
                f"{SHARES[name][0]}: {number(value)}"
            )
            base += bars["x"][-1]
    for name, bars in drawn.items():
        title, colour = SHARES[name]
        figure.add_bar(
            x=bars["x"],
            y=bars["y"],
            base=bars["base"],
            width=_HIGH,
            orientation="h",
            marker={"color": colour},
            name=title,
            hovertext=bars["text"],
            hoverinfo="text",
        )
    for tells in across:
        for shared in up:
            found = Counter(r.structure for (t, s, _), r in cells.items() if (t, s) == (tells, shared))
            words = [name if len(found) == 1 else f"{name} {count}" for name, count in found.most_common()]
            figure.add_annotation(
                x=across.index(tells),
                y=up.index(shared) + 0.36,
                text=", ".join(words),
                showarrow=False,
                font={"size": 12, "color": INK},
            )
    figure.update_layout(barmode="overlay", width=1080, margin={"l": 96, "t": 60, "b": 60})
    for axis, at, title in (
        ("xaxis", across, "distinguishability: share of questions that show their cue"),
        ("yaxis", up, "shared structure: share of operations<br>on which objectives agree"),
    ):
        figure.update_layout(
            {
                axis: {
                    "title": title,
                    "tickvals": list(range(len(at))),
                    "ticktext": [f"{value:g}" for value in at],
                    "range": [-0.5, len(at) - 0.5],
                    "showgrid": False,
                    "zeroline": False,
                }
            }
        )
    return figure


def schedule(records: Mapping[str, StructureRecord]) -> Figure:
    """A row a run, a panel a cue: how often each objective would pay a completion, at the end of each phase.

    The background has the colour of the cues that a phase trains on; objectives have the colour of their cue. The
    objective of a cue that no phase trains on is not drawn.
    """
    from plotly.subplots import make_subplots

    first = next(iter(records.values()))
    cues = first.cues
    objectives = list(dict.fromkeys(regime for pair in first.pairs for regime in (pair.first, pair.second)))
    figure = make_subplots(
        rows=len(records),
        cols=len(cues),
        shared_xaxes=True,
        shared_yaxes=True,
        column_titles=[
            cue_title(cue, len(cues)) + ("" if cue in objectives else " (no phase trains on it)") for cue in cues
        ],
        row_titles=[label(name) for name in records],
        horizontal_spacing=0.03,
        vertical_spacing=0.12 / len(records),
    )
    style(figure, 130 + 170 * len(records))
    figure.update_layout(margin={"t": 84})
    for row, record in enumerate(records.values(), start=1):
        ends = [0]
        for point in record.checkpoints[1:]:
            ends.append(ends[-1] + point.steps)
        for column, cue in enumerate(cues, start=1):
            where: dict[str, Any] = {"row": row, "col": column}
            for start, end, point in zip(ends, ends[1:], record.checkpoints[1:], strict=False):
                for i, trained in enumerate(point.trained):  # of several, a band each
                    figure.add_shape(
                        type="rect",
                        x0=start,
                        x1=end,
                        y0=i / len(point.trained),
                        y1=(i + 1) / len(point.trained),
                        fillcolor=cue_colour(trained, cues),
                        opacity=0.13,
                        line_width=0,
                        layer="below",
                        **where,
                    )
            for i, objective in enumerate(objectives):
                values = [point.earned[cue][objective] for point in record.checkpoints]
                over, under = whiskers(values)
                colour = cue_colour(objective, cues)
                name = f"would be paid by the objective of {label(objective)}"
                figure.add_scatter(
                    x=ends,
                    y=[value.value for value in values],
                    error_y={"array": over, "arrayminus": under, "color": colour, "thickness": 1.5, "width": 3},
                    mode="lines+markers",
                    line={"color": colour, "width": 2},
                    marker={"symbol": SYMBOLS[i % len(SYMBOLS)], "size": 7},
                    name=name,
                    legendgroup=name,
                    showlegend=row == column == 1,
                    hovertext=[
                        f"cue {label(cue)}, after {label(point.name)}<br>{name}: {number(value)}"
                        for point, value in zip(record.checkpoints, values, strict=True)
                    ],
                    hoverinfo="text",
                    **where,
                )
            figure.update_xaxes(tickvals=ends, showgrid=False, range=[-0.03 * ends[-1], 1.03 * ends[-1]], **where)
            figure.update_yaxes(range=[-0.04, 1.04], tickvals=[0, 0.5, 1], **where)
            if row == len(records):
                figure.update_xaxes(title_text="GRPO step", **where)
        figure.update_yaxes(title_text="probability", row=row, col=1)
    return figure
