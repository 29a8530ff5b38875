"""Which weights of R carry the change: components alone and missing, the plane, the 2 x 2, and token positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mixturelens.figures.erasure import remaining
from mixturelens.figures.marks import Mark, controls, dots, points, whiskers
from mixturelens.figures.panels import Panel, entry, number_axis, panels, reach, row_axis, rule, stacked, widest
from mixturelens.figures.style import GREY, INK, ROUTER, SPECIALIST
from mixturelens.figures.words import label, number
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
_FAR = (-1.0, 2.0)
"""Shares that are drawn: what is further away would squeeze everything else."""
_NOISE = {"color": GREY, "width": 1.5, "dash": "dash"}
Change = Literal["routing", "weight", "specialists"]
"""Which change of R the components share in: of log(c_p / c_o), of c_p itself, or of what policies do. Log-odds add up
and probabilities saturate: parts that each suffice for the second show there as redundant."""
_COLOURS: Mapping[Change, str] = {"routing": ROUTER, "weight": ROUTER, "specialists": SPECIALIST}


def components(records: Mapping[str, GraftRecord], change: Change = "routing") -> Figure:
    """Which components suffice (S + R[g]) and which are needed (R less R - R[g]): a panel a run, in one figure.

    Shares of R's change with the record's intervals over questions. Yellow: it suffices and is not needed, so that
    others hold the same change as well. Crosses: Shapley shares. Below the line: groups of components. Of a search
    every block has a row, groups before their parts. `records`: runs by name.
    """
    columns = min(max(len(records), 1), COLUMNS)
    lines = -(-max(len(records), 1) // columns)
    names = _in_order(list(records.values()))
    rows = [*names, *dict.fromkeys(name for record in records.values() for name in record.groups)]
    inner, spacing = stacked(lines, (30 if len(rows) <= 12 else 24) * max(len(rows), 1), 84)
    more = {"horizontal_spacing": 0.12 / columns if columns > 1 else 0, "vertical_spacing": spacing}
    titles = [f"<b>{label(name, max(96 // columns, 12))}</b>" for name in records]
    figure, panes = panels((lines, columns), titles, inner + 138, {"l": 104, "r": 16, "t": 84, "b": 54}, **more)
    span = reach(_shares(records.values(), change), (0.0, 1.0), 0.08, _FAR)
    said: set[str] = set()
    for panel, record in zip(panes, records.values(), strict=False):
        said |= _marks(panel, record, rows, change, said)
        known = _known(record)
        for y, name in enumerate(rows):
            if name in known and _redundant(known[name], change):
                box = {"x0": span[0], "x1": span[1], "y0": y - 0.5, "y1": y + 0.5, "fillcolor": _REDUNDANT}
                figure.add_shape(type="rect", layer="below", line={"width": 0}, **box, **panel.at)
        if names and len(rows) > len(names):
            rule(panel, y=len(names) - 0.5)
        title = "share of change" if panel.row == lines else None
        number_axis(panel, span, title, tickvals=[0, 0.5, 1], title_font_size=12)
        row_axis(panel, [label(name, 16) for name in rows])
    if any(_redundant(each, change) for record in records.values() for each in _known(record).values()):
        look = {"symbol": "square", "size": 13, "color": _REDUNDANT, "line": {"color": "#C9BE5A", "width": 1}}
        entry(figure, "redundant: suffices, is not needed", marker=look)
    return figure


def _known(record: GraftRecord) -> Mapping[str, Component | Block]:
    """What was grafted alone: components, or the blocks of a search."""
    return {each.name: each for each in (record.components if record.search is None else record.search.blocks)}


def _in_order(records: Sequence[GraftRecord]) -> list[str]:
    """What was grafted alone in any run, in the order of the network."""
    searched = [name for record in records if record.search is not None for name in _known(record)]
    order = max((record.parts for record in records), key=len, default=())
    changed = {name for record in records for name in _known(record)}
    known = searched or [part.name for part in order if part.name in changed]
    return list(dict.fromkeys([*known, *(name for record in records for name in _known(record))]))


def _of(effects: Effects, change: Change) -> Interval:
    return getattr(effects, change)


def _needed(component: Component | Block, change: Change) -> Interval:
    return remaining(_of(component.without, change))


def _shapley(component: Component | Block, change: Change) -> Interval:
    """Its share of the log-odds, which add up; of nothing else."""
    return getattr(component, "shapley", NOT_MEASURED) if change == "routing" else NOT_MEASURED


def _redundant(component: Component | Block, change: Change) -> bool:
    """Surely enough on its own, and surely not missed."""
    return _of(component.suffices, change).above(HALF) and _needed(component, change).below(HALF)


def _shares(records: Any, change: Change) -> Iterator[Interval | float | None]:
    """All that `components` draws; of groups no intervals."""
    for record in records:
        for each in _known(record).values():
            yield from (_of(each.suffices, change), _needed(each, change), _shapley(each, change))
        yield from (_of(graft.effects, change).value for graft in record.groups.values())


def _marks(panel: Panel, record: GraftRecord, rows: Sequence[str], change: Change, said: set[str]) -> set[str]:
    """Three marks a component: alone in S, missing from R, and its Shapley share; of groups the first.

    Returns the names of marks that it drew; those in `said` have their place in the legend.
    """
    known, colour = _known(record), _COLOURS[change]
    alone = {name: _of(each.suffices, change) for name, each in known.items()}
    alone = {name: _of(each.effects, change) for name, each in record.groups.items()} | alone
    white = {"symbol": "diamond", "size": 10, "color": "white", "line": {"color": colour, "width": 2}}
    cross = {"symbol": "x-thin", "size": 7, "line": {"width": 2, "color": INK}}
    needed = {name: _needed(each, change) for name, each in known.items()}
    shapley = {name: _shapley(each, change) for name, each in known.items()}
    drawn = set()
    for name, of, marker, lift, ink in (
        ("suffices: S with R's", alone, {"symbol": "circle", "size": 10, "color": colour}, -0.2, colour),
        ("needed: what R loses with S's", needed, white, 0.06, INK),
        ("Shapley share", shapley, cross, 0.3, INK),
    ):
        values = [of.get(row, NOT_MEASURED) for row in rows]
        if not any(value.measured for value in values):
            continue
        named = enumerate(zip(rows, values, strict=True))
        marks = [Mark(y + lift, value, f"{label(row)}<br>{name}: {number(value)}") for y, (row, value) in named]
        look: dict[str, Any] = {"name": name, "legendgroup": name, "showlegend": name not in said, "marker": marker}
        dots(panel, marks, whisker=(1.5, 3, ink), **look)
        drawn.add(name)
    return drawn


# ---------------------------------------------------------------------------------------------------------------
# the plane


def plane(record: GraftRecord) -> Figure:
    """Path attribution, nats: every component a point (routing, specialist), a panel for each policy under each cue.

    Crosses are the record's intervals over questions. What lies along the horizontal line changes the routing alone;
    the vertical scale never shows less than a third of the horizontal one, so that nothing looks larger than it is.
    """
    cells = list(dict.fromkeys(cell for each in record.components for cell in each.specialists))
    columns = min(max(len(record.cues), 1), 3)
    columns = columns if cells and len(cells) % columns == 0 else min(max(len(cells), 1), 3)
    lines = -(-max(len(cells), 1) // columns)
    inner, spacing = stacked(lines, TALL, 46)
    more: dict[str, Any] = {"horizontal_spacing": 0.03, "vertical_spacing": spacing}
    margin = {"l": 84, "r": 20, "t": 36, "b": 56}
    titles = [_cell_title(cell) for cell in cells]
    figure, panes = panels((lines, columns), titles, inner + 92, margin, **more)
    figure.update_layout(showlegend=False)
    low, high = reach([each.routing for each in record.components], (-0.05, 0.05), 0.1)
    third = (high - low) / 1.2 / 6  # without the room at both ends
    values = [value for each in record.components for value in each.specialists.values()]
    down, up = reach(values, (-third, third), 0.14)
    for panel, cell in zip(panes, cells, strict=False):
        _points(panel, record.components, cell, (high - low, up - down), columns)
        figure.update_xaxes(range=[low, high], showticklabels=panel.row == lines, **panel.at)
        figure.update_yaxes(range=[down, up], showticklabels=panel.first, **panel.at)
        rule(panel, y=0)
        rule(panel, x=0)
    first, second = (label(name, 12) for name in record.policies)
    for column in range(1, columns + 1):
        figure.update_xaxes(title_text=f"log (c<sub>{first}</sub> / c<sub>{second}</sub>), nats", row=lines, col=column)
    for row in range(1, lines + 1):
        figure.update_yaxes(title_text="log-probability of<br>what it did in S, nats", row=row, col=1)
    return figure


def _cell_title(cell: str) -> str:
    policy, _, cue = cell.rpartition("@")
    return f"policy {label(policy, 20)} under cue {label(cue, 20)}"


def _points(panel: Panel, found: Sequence[Component], cell: str, nats: tuple[float, float], columns: int) -> None:
    """Components with crosses for intervals, named where they are not at nothing. `nats`: across a panel and up it."""
    every = [(each, each.routing, each.specialists.get(cell, NOT_MEASURED)) for each in found]
    values = [(each, x, y) for each, x, y in every if x.measured and y.measured]
    hover = [
        f"{label(each.name)}<br>routing {number(x)} nats<br>{label(cell)} {number(y)} nats" for each, x, y in values
    ]
    across, up = [x for _, x, _ in values], [y for *_, y in values]
    crosses = {"error_x": whiskers(across, 1.5, 0, ROUTER), "error_y": whiskers(up, 1.5, 0, SPECIALIST)}
    look = {"marker": {"color": INK, "size": 7}, "name": label(cell), **crosses}
    points(panel, [x.value for x in across], [y.value for y in up], hover, **look)
    known = [(each.name, x.known, y.known) for each, x, y in values]
    away = [point for point in known if max(abs(point[1]), abs(point[2])) > 0.06 * nats[0]]
    for (name, x, y), lift in _named(away, PANEL / columns / nats[0], TALL / nats[1]):
        text = {"text": label(name, 14), "x": x, "y": y, "yshift": lift, "font": {"size": 12}}
        panel.figure.add_annotation(showarrow=False, **text, **panel.at)


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


# ---------------------------------------------------------------------------------------------------------------
# effects of grafts, a row each


class _EvidenceLine(NamedTuple):
    name: str
    effects: Effects
    noise: tuple[Effects, ...] = ()
    """Drawn as grey points instead."""


class _Reading(NamedTuple):
    """One panel of effects: a field of them, in which unit, and the size of noise where it has one."""

    field: str
    title: str
    unit: str
    colour: str
    null: float | None = None

    @property
    def span(self) -> dict[str, Any]:
        """What its axis shows at least, and at most."""
        return {"least": (0.0, 0.05)} if self.unit.startswith("bits") else {"least": (-0.05, 1.0), "within": _FAR}


def factorial(record: GraftRecord) -> Figure:
    """The 2 x 2 {selector} x {rest}: routing and specialists with R's selector in S, the rest, both, and noise.

    Panels and intervals are those of `placed`. Raises ValueError if no factorial was measured.
    """
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
    """R's weights used at some token positions only, and S's at all others: a row for each set of positions.

    Panels: the policy's weight and specialists as shares of R's change, and both in bits from S, with the record's
    intervals over questions; dashed, noise of the size of R's change.
    """
    return _effects([_EvidenceLine(_joined(each.positions), each.effects) for each in record.placed], record)


def _joined(positions: Sequence[str]) -> str:
    """Names of positions on as many lines as they need."""
    text = " + ".join(positions)
    if len(text) <= 20 or len(positions) == 1:
        return label(text, 30)
    half = -(-len(positions) // 2)
    return f"{label(' + '.join(positions[:half]) + ' +', 30)}<br>{label(' + '.join(positions[half:]), 30)}"


def _effects(rows: Sequence[_EvidenceLine], record: GraftRecord) -> Figure:
    """A row a graft, a panel a reading; that of specialists' shares only where they were measured."""
    every = [each for row in rows for each in (row.noise or (row.effects,))]
    share = "share of R's change"
    specialists = [_Reading("specialists", "<b>Specialists</b>", share, SPECIALIST)]
    readings = [
        _Reading("weight", "<b>Weight</b> of the policy", share, ROUTER),
        *(specialists if any(each.specialists.measured for each in every) else []),
        _Reading("chosen", "<b>Which policy</b>", "bits from S", ROUTER, record.null.chosen),
        _Reading("done", "<b>What policies do</b>", "bits from S", SPECIALIST, record.null.done),
    ]
    names = [row.name for row in rows]
    margin = {"l": 24 + round(7.0 * widest(names)), "t": 74, "b": 56, "r": 20}
    height = (46 if len(rows) <= 4 else 34) * max(len(rows), 1) + 130
    titles = [each.title for each in readings]
    figure, panes = panels((1, len(readings)), titles, height, margin, horizontal_spacing=0.03)
    for panel, each in zip(panes, readings, strict=True):
        _effect_panel(panel, rows, each)
        number_axis(panel, reach([getattr(effects, each.field) for effects in every], **each.span), each.unit, nticks=4)
        if each.null is not None:
            rule(panel, x=each.null, below=True, **_NOISE)
        row_axis(panel, names)
    entry(figure, "noise of the size of R's change", line=_NOISE)
    return figure


def _effect_panel(panel: Panel, rows: Sequence[_EvidenceLine], of: _Reading) -> None:
    marks = [
        Mark(y, value := getattr(row.effects, of.field), f"{row.name}<br>{of.title}: {number(value)}")
        for y, row in enumerate(rows)
        if not row.noise
    ]
    marker = {"color": of.colour, "symbol": "diamond", "size": 11}
    look: dict[str, Any] = {"marker": marker, "name": of.title, "showlegend": False}
    dots(panel, marks, **look)
    noise = [[getattr(each, of.field) for each in row.noise] for row in rows]
    if any(noise):
        said, name = f"random weights<br>{of.title}: ", "random weights of the same norm"
        legend = panel.first
        controls(panel, noise, lambda y, i: said + number(noise[y][i]), (0.0, 0.5), name=name, showlegend=legend)
