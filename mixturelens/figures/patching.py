"""Where patching moves a contrast: maps over layers (and heads) and positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mixturelens.figures.heat import EMPTY, HeatCell, across, diverging, heat, outline, up
from mixturelens.figures.panels import Panel, between, panels, stacked
from mixturelens.figures.style import apart
from mixturelens.figures.words import DASH, SIDES, label, number, short, token, token_axis
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
    """Effects of one component, shares of the contrast: positions across, layers (and heads) up.

    Written out: what is at least WORTH and whose interval over questions excludes 0. Raises ValueError for a component
    that was not patched at single positions.
    """
    return _maps([[sweep]], component)


def patching_maps(record: PatchingRecord, kind: Kind, component: Component) -> Figure:
    """S beside R on one scale, a row for each contrast and direction of this kind; cells are those of `patching_map`.

    Outlined: cells whose intervals in S and R do not meet, and which differ by at least WORTH.
    """
    rows: dict[tuple[Any, ...], list[Sweep]] = {}
    for sweep in record.sweeps:
        if sweep.kind == kind:
            of = (sweep.direction, sweep.clean, sweep.corrupt, sweep.policy, sweep.cue)
            rows.setdefault(of, []).append(sweep)
    return _maps([sorted(row, key=lambda s: s.checkpoint == "after") for row in rows.values()], component)


def _maps(rows: Sequence[Sequence[Sweep]], component: Component) -> Figure:
    """A row of maps for each row of sweeps, all with the same rows of cells and on one scale."""
    grids = [[grid for sweep in row if (grid := _grid(sweep, component)).effects] for row in rows]
    grids = [row for row in grids if row]
    if not grids:
        raise ValueError(f"nothing to draw: {component} was not patched at any position")
    every = [grid for row in grids for grid in row]
    columns = max((len(row) for row in grids), default=1)
    cells = list(dict.fromkeys(cell for grid in every for cell, _ in grid.effects))
    cells.sort(key=lambda cell: (cell[0], cell[1] or 0))
    column = WIDE / columns / max((len(grid.places) for grid in every), default=1)
    labels, axis, below = token_axis([grid.names for grid in every], column)
    each = 40 if len(cells) <= 3 else 26 if len(cells) <= 24 else 15
    plot = each * max(len(cells), 1)
    inner, spacing = stacked(len(grids), plot, below + 84)  # token labels of one row of panels, titles of the next
    titles = [_title(row[j].sweep) if j < len(row) else "" for row in grids for j in range(columns)]
    margin = {"l": 92 if component in PER_HEAD else 76, "r": 20, "t": 78, "b": below}
    more = {"horizontal_spacing": 0.03, "vertical_spacing": spacing}
    figure, panes = panels((len(grids), columns), titles, inner + below + 84, margin, at_left=True, **more)
    named = iter(labels)
    for i, row in enumerate(grids):
        beside = panes[i * columns :]
        for panel, grid in zip(beside, row, strict=False):
            _map(panel, grid, component, cells, column)
            across(panel, next(named), zeroline=False, **axis)
            up(panel, _row_names(cells, each), len(cells))
            between(panel, [layer if head is not None else None for layer, head in cells])
        if len(row) == 2:
            _outlines(beside, row, cells)
    bar = {"title": {"text": "share of the contrast", "side": "right", "font": {"size": 12}}}
    scale = diverging(min(max(plot, 150), 260), tickvals=[-1, -0.5, 0, 0.5, 1], **bar)
    figure.update_layout(plot_bgcolor=EMPTY, coloraxis=scale)
    return figure


class _Grid(NamedTuple):
    """The effects of one component in one sweep, by cell and position."""

    sweep: Sweep
    effects: dict[tuple[_Cell, str | int], Interval]
    places: list[str | int]
    """Positions in the order of the prompt, or named spans in the order of the record."""
    names: list[str]


def _grid(sweep: Sweep, component: Component) -> _Grid:
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
    return _Grid(sweep, grid, places, [known.get(p, str(p)) if isinstance(p, int) else p for p in places])


def _map(panel: Panel, grid: _Grid, component: Component, cells: Sequence[_Cell], column: float) -> None:
    """One map; `column`: pixels of a cell across."""

    def cell(of: _Cell, place: str | int, name: str) -> HeatCell:
        value = grid.effects.get((of, place), NOT_MEASURED)
        site = Site(layer=of[0], component=component, head=of[1], position=place)
        hover = f"{label(str(site), 60)} ({token(name, 40)})<br>effect {number(value)}"
        return HeatCell(value.value, _written(value, column), hover)

    places = list(zip(grid.places, grid.names, strict=True))
    size = 12 if len(cells) <= 24 and column >= 38 else 11
    heat(panel, [[cell(of, *place) for place in places] for of in cells], size, coloraxis="coloraxis")


def _outlines(maps: Sequence[Panel], grids: Sequence[_Grid], cells: Sequence[_Cell]) -> None:
    """Around cells that differ between the two maps of a row."""
    for (cell, place), value in grids[0].effects.items():
        other = grids[1].effects.get((cell, place), NOT_MEASURED)
        if value.value is None or other.value is None or abs(value.value - other.value) < WORTH:
            continue
        if apart(value, other):
            for panel, grid in zip(maps, grids, strict=False):
                outline(panel, grid.places.index(place), cells.index(cell), (0.47, 0.46), 2)


def _row_names(cells: Sequence[_Cell], each: int) -> dict[float, str]:
    """Names of rows; where there are many heads, of their layers alone."""
    if each > 20 or all(head is None for _, head in cells):
        names = [f"layer {layer}" if head is None else f"L{layer} head {head}" for layer, head in cells]
        return dict(enumerate(names))
    named: dict[float, str] = {}
    for layer in dict.fromkeys(layer for layer, _ in cells):
        rows = [y for y, cell in enumerate(cells) if cell[0] == layer]
        named[(rows[0] + rows[-1]) / 2] = _heads_of(layer, [cells[y][1] for y in rows])
    return named


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
    if column < 24 or not value.excludes(0.0) or abs(value.value) < WORTH:
        return ""
    return short(value.value, column)


def contrast(sweep: Sweep) -> str:
    """What was put where, in words."""
    clean, corrupt = (label(name, 16) for name in (sweep.clean, sweep.corrupt))
    if sweep.direction == "noise":
        clean, corrupt = corrupt, clean
    return "S put into R" if sweep.kind == "checkpoint" else f"{sweep.kind} {clean} put into {sweep.kind} {corrupt}"


def under(sweep: Sweep) -> str:
    """The policy put in place and the cue of the prompts, in words; nothing where there is neither."""
    policy = [] if sweep.policy is None else [f"policy {label(sweep.policy, 16)} put in place"]
    return ", ".join(policy + ([] if sweep.cue is None else [f"prompts of cue {label(sweep.cue, 16)}"]))


def _title(sweep: Sweep) -> str:
    direction = "denoise (suffices)" if sweep.direction == "denoise" else "noise (is needed)"
    first = f"<b>{SIDES[sweep.checkpoint]}</b>, {direction}, {sweep.questions} questions"
    return f"{first}<br>{contrast(sweep)}<br>{under(sweep)}"
