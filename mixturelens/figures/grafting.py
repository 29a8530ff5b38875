"""Which weights of R carry the change: components alone and missing, the plane, the 2 x 2, and token positions."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from mixturelens.figures.erasure import remaining
from mixturelens.figures.style import (
    GREY,
    INK,
    ROUTER,
    SPECIALIST,
    jitter,
    label,
    number,
    style,
)
from mixturelens.figures.trajectories import whiskers
from mixturelens.types import NOT_MEASURED, Interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.grafting.record import Block, Component, Effects, GraftRecord

HALF = 0.5
"""Share of R's change from which a component is said to suffice, or to be needed."""
COLUMNS = 5
"""Runs beside each other in `components`."""
PANEL, TALL, LINE = 700, 230, 15
"""Pixels of the panels of `plane` beside each other, of one's height, and of a line of text."""
_REDUNDANT = "#FBF3A6"
Change = Literal["routing", "weight", "specialists"]
"""Which change of R the components share in: of log(c_p / c_o), of c_p itself, or of what policies do. Log-odds add up
and probabilities saturate: parts that each suffice for the second show there as redundant."""
_COLOURS: Mapping[Change, str] = {"routing": ROUTER, "weight": ROUTER, "specialists": SPECIALIST}


def components(records: Mapping[str, GraftRecord], change: Change = "routing") -> Figure:
    """Which components suffice (S + R[g]) and which are needed (R less R - R[g]): a panel a run, in one figure.

    Yellow: it suffices and is not needed, so that others hold the same change as well. Crosses: Shapley shares. Below
    the line: groups of components. Of a search every block has a row, groups before their parts. `records`: runs by
    name.
    """
    from plotly.subplots import make_subplots

    runs = list(records.items())
    columns = min(max(len(runs), 1), COLUMNS)
    lines = -(-max(len(runs), 1) // columns)
    names = _in_order([record for _, record in runs])
    groups = list(dict.fromkeys(name for _, record in runs for name in record.groups))
    rows = [*names, *groups]
    each = 30 if len(rows) <= 12 else 24
    plot, gap, top = each * max(len(rows), 1), 84, 84
    inner = plot * lines + gap * (lines - 1)
    figure = make_subplots(
        rows=lines,
        cols=columns,
        horizontal_spacing=0.12 / columns if columns > 1 else 0,
        vertical_spacing=gap / inner if lines > 1 else 0,
        subplot_titles=[_cut(name, 96 // columns) for name, _ in runs],
    )
    style(figure, inner + top + 54)
    figure.update_layout(margin={"l": 104, "r": 16, "t": top, "b": 54}, hovermode="closest")
    figure.update_annotations(font_size=13)
    low, high = _range([record for _, record in runs], change)
    said: set[str] = set()
    for i, (_, record) in enumerate(runs):
        row, column = i // columns + 1, i % columns + 1
        known = _known(record)
        _marks(figure, record, known, rows, change, said, row, column)
        for y, name in enumerate(rows):
            if name in known and _redundant(known[name], change):
                figure.add_shape(
                    type="rect",
                    x0=low,
                    x1=high,
                    y0=y - 0.5,
                    y1=y + 0.5,
                    layer="below",
                    line={"width": 0},
                    fillcolor=_REDUNDANT,
                    row=row,
                    col=column,
                )
        if names and groups:
            figure.add_hline(y=len(names) - 0.5, line={"color": "#999999", "width": 1}, row=row, col=column)  # pyright: ignore[reportArgumentType]
        figure.update_xaxes(
            range=[low, high],
            tickvals=[0, 0.5, 1],
            title_text="share of change" if row == lines else None,
            title_font_size=12,
            zeroline=True,
            zerolinecolor="#999999",
            row=row,
            col=column,
        )
        figure.update_yaxes(
            tickvals=list(range(len(rows))),
            ticktext=[label(name, 16) for name in rows],
            tickfont={"size": 12},
            range=[len(rows) - 0.45, -0.55],
            showgrid=False,
            zeroline=False,
            showticklabels=column == 1,
            row=row,
            col=column,
        )
    if any(_redundant(each, change) for _, record in runs for each in _known(record).values()):
        figure.add_scatter(
            x=[None],
            y=[None],
            mode="markers",
            marker={"symbol": "square", "size": 13, "color": _REDUNDANT, "line": {"color": "#C9BE5A", "width": 1}},
            name="redundant: suffices, is not needed",
        )
    return figure


def _known(record: GraftRecord) -> dict[str, Component | Block]:
    """What was grafted alone: components, or the blocks of a search."""
    return {each.name: each for each in (record.components if record.search is None else record.search.blocks)}


def _in_order(records: Sequence[GraftRecord]) -> list[str]:
    """What was grafted alone in any run, in the order of the network."""
    searched = [name for record in records if record.search is not None for name in _known(record)]
    order = max((record.parts for record in records), key=len, default=())
    changed = {name for record in records for name in _known(record)}
    known = searched or [part.name for part in order if part.name in changed]
    return list(dict.fromkeys([*known, *(name for record in records for name in _known(record))]))


def _shapley(each: Component | Block) -> Interval:
    return getattr(each, "shapley", NOT_MEASURED)


def _cut(text: str, limit: int) -> str:
    return f"<b>{label(text, max(limit, 12))}</b>"


def _of(effects: Effects, change: Change) -> Interval:
    return getattr(effects, change)


def _needed(component: Component | Block, change: Change) -> Interval:
    return remaining(_of(component.without, change))


def _redundant(component: Component | Block, change: Change) -> bool:
    """Surely enough on its own, and surely not missed."""
    return _of(component.suffices, change).above(HALF) and _needed(component, change).below(HALF)


def _marks(
    figure: Figure,
    record: GraftRecord,
    known: Mapping[str, Component | Block],
    rows: Sequence[str],
    change: Change,
    said: set[str],
    row: int,
    column: int,
) -> None:
    """Three marks a component: alone in S, missing from R, and its Shapley share; of groups the first."""
    alone = [
        _of(known[name].suffices, change)
        if name in known
        else _of(record.groups[name].effects, change)
        if name in record.groups
        else NOT_MEASURED
        for name in rows
    ]
    needed = [_needed(known[name], change) if name in known else NOT_MEASURED for name in rows]
    shapley = [_shapley(known[name]) if name in known else NOT_MEASURED for name in rows]
    colour = _COLOURS[change]
    kinds = [
        ("suffices: S with R's", alone, {"symbol": "circle", "size": 10, "color": colour}, -0.2),
        (
            "needed: what R loses with S's",
            needed,
            {"symbol": "diamond", "size": 10, "color": "white", "line": {"color": colour, "width": 2}},
            0.06,
        ),
    ]
    if change == "routing":
        kinds.append(
            ("Shapley share", shapley, {"symbol": "x-thin", "size": 7, "line": {"width": 2, "color": INK}}, 0.3)
        )
    for name, values, marker, lift in kinds:
        if not any(value.measured for value in values):
            continue
        up, down = whiskers(values)
        figure.add_scatter(
            x=[value.value for value in values],
            y=[y + lift for y in range(len(rows))],
            error_x={
                "array": up,
                "arrayminus": down,
                "thickness": 1.5,
                "width": 3,
                "color": marker["color"] if name[0] == "s" else INK,
            },
            mode="markers",
            marker=marker,
            name=name,
            legendgroup=name,
            showlegend=name not in said,
            hovertext=[f"{label(of)}<br>{name}: {number(value)}" for of, value in zip(rows, values, strict=True)],
            hoverinfo="text",
            row=row,
            col=column,
        )
        said.add(name)


def _range(records: Sequence[GraftRecord], change: Change) -> tuple[float, float]:
    ends = [0.0, 1.0]
    for record in records:
        for each in _known(record).values():
            shapley = [_shapley(each)] if change == "routing" else []
            for value in (_of(each.suffices, change), _needed(each, change), *shapley):
                ends += [end for end in (value.low, value.value, value.high) if end is not None]
        for graft in record.groups.values():
            ends += [end for end in (_of(graft.effects, change).value,) if end is not None]
    low, high = max(min(ends), -1.0), min(max(ends), 2.0)  # what is further away would squeeze everything else
    return low - 0.08 * (high - low), high + 0.08 * (high - low)


# ---------------------------------------------------------------------------------------------------------------
# the plane


def plane(record: GraftRecord) -> Figure:
    """Path attribution, nats: every component a point (routing, specialist), a panel for each policy under each cue.

    What lies along the horizontal line changes the routing alone; the vertical scale never shows less than a third of
    the horizontal one, so that nothing looks larger than it is.
    """
    from plotly.subplots import make_subplots

    cells = list(dict.fromkeys(cell for each in record.components for cell in each.specialists))
    columns = min(max(len(record.cues), 1), 3)
    columns = columns if cells and len(cells) % columns == 0 else min(max(len(cells), 1), 3)
    lines = -(-max(len(cells), 1) // columns)
    plot, gap = TALL, 46
    inner = plot * lines + gap * (lines - 1)
    figure = make_subplots(
        rows=lines,
        cols=columns,
        horizontal_spacing=0.03,
        vertical_spacing=gap / inner if lines > 1 else 0,
        subplot_titles=[_cell_title(cell) for cell in cells],
    )
    style(figure, inner + 92)
    figure.update_layout(margin={"l": 84, "r": 20, "t": 36, "b": 56}, showlegend=False, hovermode="closest")
    figure.update_annotations(font_size=13)
    low, high = _ends([each.routing for each in record.components], 0.05)
    pad = 0.1 * (high - low)
    third = (high - low) / 6
    down, up = _ends([value for each in record.components for value in each.specialists.values()], third)
    for i, cell in enumerate(cells):
        row, column = i // columns + 1, i % columns + 1
        _points(figure, record.components, cell, (1.2 * (high - low), 1.28 * (up - down), columns), row, column)
        figure.update_xaxes(range=[low - pad, high + pad], showticklabels=row == lines, row=row, col=column)
        figure.update_yaxes(
            range=[down - 0.14 * (up - down), up + 0.14 * (up - down)],
            showticklabels=column == 1,
            row=row,
            col=column,
        )
        figure.add_hline(y=0, line={"color": "#999999", "width": 1}, row=row, col=column)  # pyright: ignore[reportArgumentType]
        figure.add_vline(x=0, line={"color": "#999999", "width": 1}, row=row, col=column)  # pyright: ignore[reportArgumentType]
    first, second = (label(name, 12) for name in record.policies)
    for column in range(1, columns + 1):
        figure.update_xaxes(title_text=f"log (c<sub>{first}</sub> / c<sub>{second}</sub>), nats", row=lines, col=column)
    for row in range(1, lines + 1):
        figure.update_yaxes(title_text="log-probability of<br>what it did in S, nats", row=row, col=1)
    return figure


def _cell_title(cell: str) -> str:
    policy, _, cue = cell.rpartition("@")
    return f"policy {label(policy, 20)} under cue {label(cue, 20)}"


def _points(
    figure: Figure, found: Sequence[Component], cell: str, size: tuple[float, float, int], row: int, column: int
) -> None:
    """Components with crosses for intervals, named where they are not at nothing. `size`: nats across a panel and up
    it, and how many are beside each other."""
    across, tall, columns = size
    values = [(each, each.routing, each.specialists.get(cell, NOT_MEASURED)) for each in found]
    values = [(each, x, y) for each, x, y in values if x.value is not None and y.value is not None]
    right, leftward = whiskers([x for _, x, _ in values])
    up, down = whiskers([y for _, _, y in values])
    figure.add_scatter(
        x=[x.value for _, x, _ in values],
        y=[y.value for _, _, y in values],
        error_x={"array": right, "arrayminus": leftward, "thickness": 1.5, "width": 0, "color": ROUTER},
        error_y={"array": up, "arrayminus": down, "thickness": 1.5, "width": 0, "color": SPECIALIST},
        mode="markers",
        marker={"color": INK, "size": 7},
        hovertext=[
            f"{label(each.name)}<br>routing {number(x)} nats<br>{label(cell)} {number(y)} nats" for each, x, y in values
        ],
        hoverinfo="text",
        name=label(cell),
        row=row,
        col=column,
    )
    known = [(each.name, x.value, y.value) for each, x, y in values]
    points = [(name, x, y) for name, x, y in known if x is not None and y is not None]
    away = [point for point in points if max(abs(point[1]), abs(point[2])) > 0.06 * across]
    for (name, x, y), lift in _named(away, PANEL / columns / across, TALL / tall):
        figure.add_annotation(
            text=label(name, 14), x=x, y=y, showarrow=False, yshift=lift, font={"size": 12}, row=row, col=column
        )


def _named(
    points: Sequence[tuple[str, float, float]], wide: float, high: float
) -> Iterator[tuple[tuple[str, float, float], int]]:
    """Points that have room for their name, the furthest from nothing first, and how far above them it goes.

    `wide` and `high`: pixels of a nat. Names never cover each other: who finds no room is named where one hovers.
    """
    taken: list[tuple[float, float, float]] = []
    for name, x, y in sorted(points, key=lambda point: -max(abs(point[1]), abs(point[2]))):
        half = 3.6 * min(len(name), 14) + 3
        for lift in (13, -13, 27, -27):
            middle, level = x * wide, y * high + lift
            if all(abs(middle - m) > half + h or abs(level - at) > LINE for m, at, h in taken):
                taken.append((middle, level, half))
                yield (name, x, y), lift
                break


def _ends(values: Sequence[Interval], least: float) -> tuple[float, float]:
    """From the lowest to the highest end of some intervals, and at least `least` on either side of 0."""
    ends = [end for value in values for end in (value.low, value.value, value.high) if end is not None]
    return min([-least, *ends]), max([least, *ends])


# ---------------------------------------------------------------------------------------------------------------
# effects of grafts, a row each


class _EvidenceLine(NamedTuple):
    name: str
    effects: Effects
    noise: tuple[Effects, ...] = ()
    """Drawn as grey points instead."""


def factorial(record: GraftRecord) -> Figure:
    """The 2 x 2 {selector} x {rest}: routing and specialists with R's selector in S, the rest, both, and noise."""
    of = record.factorial
    if of is None:
        raise ValueError("no factorial was measured")
    rows = [
        _EvidenceLine("R's selector,<br>S's rest", of.selector_only),
        _EvidenceLine("S's selector,<br>R's rest", of.rest_only),
        _EvidenceLine("R's selector,<br>R's rest", of.both),
        _EvidenceLine("random weights<br>for the selector", of.both, of.noise),
    ]
    return _effects(rows if of.noise else rows[:-1], record)


def placed(record: GraftRecord) -> Figure:
    """R's weights used at some token positions only, and S's at all others."""
    return _effects([_EvidenceLine(_joined(each.positions), each.effects) for each in record.placed], record)


def _joined(positions: Sequence[str]) -> str:
    """Names of positions on as many lines as they need."""
    text = " + ".join(positions)
    if len(text) <= 20 or len(positions) == 1:
        return label(text, 30)
    half = -(-len(positions) // 2)
    return f"{label(' + '.join(positions[:half]) + ' +', 30)}<br>{label(' + '.join(positions[half:]), 30)}"


def _effects(rows: Sequence[_EvidenceLine], record: GraftRecord) -> Figure:
    """A row a graft; panels: shares of R's change of the policy's weight and of specialists, and both in bits."""
    from plotly.subplots import make_subplots

    every = [each for row in rows for each in (row.noise or (row.effects,))]
    shared = any(each.specialists.measured for each in every)
    panels: list[tuple[str, str, str, float | None, str]] = [
        ("weight", "<b>Weight</b> of the policy", "share of R's change", None, ROUTER),
        ("chosen", "<b>Which policy</b>", "bits from S", record.null.chosen, ROUTER),
        ("done", "<b>What policies do</b>", "bits from S", record.null.done, SPECIALIST),
    ]
    if shared:
        panels.insert(1, ("specialists", "<b>Specialists</b>", "share of R's change", None, SPECIALIST))
    figure = make_subplots(
        rows=1,
        cols=len(panels),
        horizontal_spacing=0.03,
        subplot_titles=[title for _, title, *_ in panels],
    )
    style(figure, (46 if len(rows) <= 4 else 34) * max(len(rows), 1) + 130)
    longest = max((len(html.unescape(line)) for row in rows for line in row.name.split("<br>")), default=1)
    figure.update_layout(margin={"l": 24 + round(7.0 * longest), "t": 74, "b": 56, "r": 20}, hovermode="closest")
    figure.update_annotations(font_size=13)
    for column, (field, title, unit, null, colour) in enumerate(panels, start=1):
        _effect_panel(figure, rows, field, title, colour, column)
        values = [getattr(each, field) for each in every]
        ends = [end for value in values for end in (value.low, value.value, value.high) if end is not None]
        low, high = (-0.05, 1.0) if unit.startswith("share") else (0.0, 0.05)
        low, high = min([low, *ends]), max([high, *ends])
        if unit.startswith("share"):
            low, high = max(low, -1.0), min(high, 2.0)
        pad = 0.06 * (high - low)
        figure.update_xaxes(
            range=[low - pad, high + pad],
            title_text=unit,
            nticks=4,
            zeroline=True,
            zerolinecolor="#999999",
            row=1,
            col=column,
        )
        if null is not None:
            line = {"color": GREY, "width": 1.5, "dash": "dash"}
            figure.add_vline(x=null, line=line, layer="below", row=1, col=column)  # pyright: ignore[reportArgumentType]
        figure.update_yaxes(
            tickvals=list(range(len(rows))),
            ticktext=[row.name for row in rows],
            tickfont={"size": 12},
            range=[len(rows) - 0.45, -0.55],
            showgrid=False,
            zeroline=False,
            showticklabels=column == 1,
            row=1,
            col=column,
        )
    line = {"color": GREY, "width": 1.5, "dash": "dash"}
    figure.add_scatter(x=[None], y=[None], mode="lines", name="noise of the size of R's change", line=line)
    return figure


def _effect_panel(
    figure: Figure, rows: Sequence[_EvidenceLine], field: str, title: str, colour: str, column: int
) -> None:
    drawn = [(y, row, getattr(row.effects, field)) for y, row in enumerate(rows) if not row.noise]
    up, down = whiskers([value for _, _, value in drawn])
    figure.add_scatter(
        x=[value.value for _, _, value in drawn],
        y=[y for y, _, _ in drawn],
        error_x={"array": up, "arrayminus": down, "thickness": 2, "width": 5, "color": INK},
        mode="markers",
        marker={"color": colour, "symbol": "diamond", "size": 11},
        name=title,
        showlegend=False,
        hovertext=[f"{row.name}<br>{title}: {number(value)}" for _, row, value in drawn],
        hoverinfo="text",
        row=1,
        col=column,
    )
    noise = [(y, i, getattr(each, field)) for y, row in enumerate(rows) for i, each in enumerate(row.noise)]
    if noise:
        figure.add_scatter(
            x=[value.value for _, _, value in noise],
            y=[y + 0.5 * jitter(i) for y, i, _ in noise],
            mode="markers",
            marker={"color": GREY, "size": 7, "opacity": 0.7},
            name="random weights of the same norm",
            showlegend=column == 1,
            hovertext=[f"random weights<br>{title}: {number(value)}" for _, _, value in noise],
            hoverinfo="text",
            row=1,
            col=column,
        )
