"""Where patching moves a contrast: maps over layers (and heads) and positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mixturelens.figures.style import (
    DASH,
    DIVERGING,
    INK,
    SIDES,
    apart,
    label,
    left,
    number,
    style,
    token,
    token_axis,
)
from mixturelens.types import NOT_MEASURED, PER_HEAD, Component, Interval, Site

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.contrasts import Kind
    from mixturelens.patching.record import PatchingRecord, Sweep

WORTH = 0.1
"""Share of the contrast from which an effect (or a difference of two) is written out or outlined."""
WIDE = 960
"""Pixels that panels share: less than the page leaves them, so that text which fits here fits there."""
_Cell = tuple[int, int | None]
"""Layer and head of a row."""


def patching_map(sweep: Sweep, component: Component) -> Figure:
    """Effects of one component: positions across, layers (and heads) up. Written out: what is surely there."""
    return _maps([[sweep]], component)


def patching_maps(record: PatchingRecord, kind: Kind, component: Component) -> Figure:
    """S beside R on one scale, a row for each contrast and direction of this kind.

    Outlined: cells whose intervals in S and R do not meet, and which differ by at least WORTH.
    """
    rows: dict[tuple[Any, ...], list[Sweep]] = {}
    for sweep in record.sweeps:
        if sweep.kind == kind:
            of = (sweep.direction, sweep.clean, sweep.corrupt, sweep.policy, sweep.cue)
            rows.setdefault(of, []).append(sweep)
    return _maps([sorted(row, key=lambda s: s.checkpoint == "after") for row in rows.values()], component)


def _maps(rows: Sequence[Sequence[Sweep]], component: Component) -> Figure:
    from plotly.subplots import make_subplots

    panels = [[panel for sweep in row if (panel := _panel(sweep, component)).grid] for row in rows]
    panels = [row for row in panels if row]
    columns = max((len(row) for row in panels), default=1)
    cells = list(dict.fromkeys(cell for row in panels for panel in row for cell, _ in panel.grid))
    cells.sort(key=lambda cell: (cell[0], cell[1] or 0))
    width = max((len(panel.places) for row in panels for panel in row), default=1)
    column = WIDE / columns / max(width, 1)
    labels, axis, below = token_axis([panel.names for row in panels for panel in row], column)
    each = 40 if len(cells) <= 3 else 26 if len(cells) <= 24 else 15
    plot = each * max(len(cells), 1)
    gap = below + 84  # token labels of one row of panels, titles of the next
    inner = plot * len(panels) + gap * (len(panels) - 1)
    figure = make_subplots(
        rows=max(len(panels), 1),
        cols=columns,
        horizontal_spacing=0.03,
        vertical_spacing=gap / inner if len(panels) > 1 else 0,
        subplot_titles=[_title(row[j].sweep) if j < len(row) else "" for row in panels for j in range(columns)],
    )
    style(figure, inner + below + 84)
    figure.update_layout(
        margin={"l": 92 if component in PER_HEAD else 76, "r": 20, "t": 78, "b": below}, plot_bgcolor="#E9ECEF"
    )
    figure.update_annotations(font_size=13, xanchor="left", align="left")
    titles: Any = figure.layout
    named = iter(labels)
    for i, row in enumerate(panels, start=1):
        for j, (_, grid, places, names) in enumerate(row, start=1):
            titles.annotations[(i - 1) * columns + j - 1].x = left(figure, i, j)
            z = [[grid.get((cell, place), NOT_MEASURED) for place in places] for cell in cells]
            figure.add_heatmap(
                z=[[value.value for value in line] for line in z],
                x=list(range(len(places))),
                y=list(range(len(cells))),
                text=[[_written(value, column) for value in line] for line in z],
                texttemplate="%{text}",
                textfont={"color": INK, "size": 12 if each > 20 and column >= 38 else 11},
                hovertext=[
                    [
                        _hover(Site(layer=cell[0], component=component, head=cell[1], position=place), name, value)
                        for place, name, value in zip(places, names, line, strict=True)
                    ]
                    for cell, line in zip(cells, z, strict=True)
                ],
                hoverinfo="text",
                coloraxis="coloraxis",
                xgap=1,
                ygap=1,
                row=i,
                col=j,
            )
            figure.update_xaxes(
                tickvals=list(range(len(places))),
                ticktext=next(named),
                range=[-0.5, max(len(places), 1) - 0.5],
                showgrid=False,
                zeroline=False,
                **axis,
                row=i,
                col=j,
            )
            figure.update_yaxes(**_layer_axis(cells, each), showticklabels=j == 1, row=i, col=j)
            # one line between layers of many heads
            for y in range(1, len(cells)):
                if cells[y][0] != cells[y - 1][0] and cells[y][1] is not None:
                    figure.add_hline(y=y - 0.5, line={"color": "#999999", "width": 1}, row=i, col=j)  # pyright: ignore[reportArgumentType]
        if len(row) == 2:
            for (cell, place), value in row[0].grid.items():
                if _differ(value, row[1].grid.get((cell, place), NOT_MEASURED)):
                    for j, panel in enumerate(row, start=1):
                        _outline(figure, panel.places.index(place), cells.index(cell), i, j)
    figure.update_layout(
        coloraxis={
            "cmin": -1,
            "cmax": 1,
            "colorscale": [list(stop) for stop in DIVERGING],
            "colorbar": {
                "title": {"text": "share of the contrast", "side": "right", "font": {"size": 12}},
                "thickness": 12,
                "lenmode": "pixels",
                "len": min(max(plot, 150), 260),
                "tickvals": [-1, -0.5, 0, 0.5, 1],
                "y": 1,
                "yanchor": "top",
            },
        }
    )
    return figure


class _Panel(NamedTuple):
    sweep: Sweep
    grid: dict[tuple[_Cell, str | int], Interval]
    places: list[str | int]
    """Positions in the order of the prompt, or named spans in the order of the record."""
    names: list[str]


def _panel(sweep: Sweep, component: Component) -> _Panel:
    grid = {
        ((e.site.layer, e.site.head), e.site.position): e.effect
        for e in sweep.effects
        if e.site.component == component and e.site.position is not None
    }
    shown = {place for _, place in grid}
    # spans in one order for all components
    found = [place for place in dict.fromkeys(e.site.position for e in sweep.effects) if place in shown]
    places = sorted(
        (place for place in found if place is not None), key=lambda place: place if isinstance(place, int) else -1
    )
    known = dict(enumerate(sweep.labels))
    return _Panel(sweep, grid, places, [known.get(p, str(p)) if isinstance(p, int) else p for p in places])


def _layer_axis(cells: Sequence[_Cell], each: int) -> dict[str, Any]:
    """Names of rows; where there are many heads, of their layers alone."""
    if each > 20 or all(head is None for _, head in cells):
        names = [f"layer {layer}" if head is None else f"L{layer} head {head}" for layer, head in cells]
        at = [float(y) for y in range(len(cells))]
    else:
        layers = list(dict.fromkeys(layer for layer, _ in cells))
        rows = [[y for y, cell in enumerate(cells) if cell[0] == layer] for layer in layers]
        at = [(row[0] + row[-1]) / 2 for row in rows]
        names = [_heads_of(layer, [cells[y][1] for y in row]) for layer, row in zip(layers, rows, strict=True)]
    return {
        "tickvals": at,
        "ticktext": names,
        "tickfont": {"size": 12},
        "range": [-0.5, max(len(cells), 1) - 0.5],
        "showgrid": False,
        "zeroline": False,
    }


def _heads_of(layer: int, heads: Sequence[int | None]) -> str:
    """A layer and which of its heads are shown: on one line where they are too few for two."""
    known = [head for head in heads if head is not None]
    whole = known == list(range(known[0], known[-1] + 1))
    named = f"{known[0]}–{known[-1]}" if whole and len(known) > 1 else ", ".join(map(str, known))
    if len(known) < 3:
        return f"L{layer}: {named}"
    return f"layer {layer},<br>heads {named}" if whole or len(known) < 5 else f"layer {layer},<br>{len(known)} heads"


def _written(value: Interval, column: float) -> str:
    """The effect where its interval excludes zero and it is worth it; short where the column is narrow."""
    if value.value is None:
        return DASH
    if not value.excludes(0.0) or abs(value.value) < WORTH:
        return ""
    text = number(value.value, 2)
    if column < 24:
        return ""
    return text if column >= 38 else text.replace("0.", ".", 1) if abs(value.value) < 0.995 else text[:-1]


def _hover(site: Site, name: str, value: Interval) -> str:
    return f"{label(str(site), 60)} ({token(name, 40)})<br>effect {number(value)}"


def _differ(before: Interval, after: Interval) -> bool:
    if before.value is None or after.value is None or abs(before.value - after.value) < WORTH:
        return False
    return apart(before, after)


def _outline(figure: Figure, x: float, y: float, row: int, column: int) -> None:
    line = {"color": INK, "width": 2}
    figure.add_shape(type="rect", x0=x - 0.47, x1=x + 0.47, y0=y - 0.46, y1=y + 0.46, line=line, row=row, col=column)


def contrast(sweep: Sweep) -> str:
    """What was put where, in words."""
    clean, corrupt = (label(name, 16) for name in (sweep.clean, sweep.corrupt))
    if sweep.direction == "noise":
        clean, corrupt = corrupt, clean
    return "S put into R" if sweep.kind == "checkpoint" else f"{sweep.kind} {clean} put into {sweep.kind} {corrupt}"


def under(sweep: Sweep) -> str:
    policy = [] if sweep.policy is None else [f"policy {label(sweep.policy, 16)} put in place"]
    return ", ".join(policy + ([] if sweep.cue is None else [f"prompts of cue {label(sweep.cue, 16)}"]))


def _title(sweep: Sweep) -> str:
    direction = "denoise (suffices)" if sweep.direction == "denoise" else "noise (is needed)"
    first = f"<b>{SIDES[sweep.checkpoint]}</b>, {direction}, {sweep.questions} questions"
    return f"{first}<br>{contrast(sweep)}<br>{under(sweep)}"
