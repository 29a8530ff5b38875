"""Units beside each other: what the best feature, neuron, head and direction move, how many it takes, and clamps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mixturelens.figures.marks import Mark, controls, dots, line
from mixturelens.figures.panels import Panel, beside, between, entry, number_axis, panels, reach, row_axis, rule
from mixturelens.figures.style import INK, UNITS
from mixturelens.figures.words import DASH, SIDES, label, number
from mixturelens.types import Interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.features.record import Concept, FeatureRecord, Several, Table, Unit, UnitScore
    from mixturelens.routing.repair import RepairRecord

_NAME = 44
"""Letters of a unit's name beside its row."""
_LISTED = 12
"""Units of a set that are named."""
_SHARES: Mapping[str, Any] = {"least": (0.0, 1.0), "within": (-1.0, 2.0)}
"""Of axes of shares: all of 0 to 1, and not so far that single ones squeeze everything else."""


class _Mark(NamedTuple):
    """One effect of a unit: which field of its score, in words, its symbol, and where in the row."""

    field: str
    name: str
    symbol: str
    size: int
    lift: float


_MARKS = (
    _Mark("patch", "patch: its activation from the clean side", "diamond", 13, -0.22),
    _Mark("clamp", "clamp: its mean there", "square-open", 10, 0.1),
    _Mark("ablate", "ablate: lost without it", "x-thin", 8, 0.32),
)


def best_units(record: FeatureRecord, concept: Concept | None = None) -> Figure:
    """What the best unit of each kind moves, as share of the contrast, beside its controls; a panel a concept.

    Whiskers are the record's intervals over questions. `concept`: that one alone. Raises KeyError if the record has no
    table of it, ValueError if it has none at all.
    """
    tables = [each for each in record.tables if concept in (None, each.concept)]
    if not tables and concept is not None:
        raise KeyError(f"no units for {concept}")
    if not tables:
        raise ValueError("no units were compared")
    found = [_scores(table) for table in tables]
    heights = [max(len(scores), 1) for scores in found]
    inner = 58 * sum(heights) + 92 * (len(tables) - 1)
    spacing = {"row_heights": heights, "vertical_spacing": 92 / inner if len(tables) > 1 else 0}
    margin = {"l": _left([str(each.unit) for scores in found for each in scores]), "r": 160, "t": 106, "b": 56}
    titles = [_title(table) for table in tables]
    figure, panes = panels((len(tables), 1), titles, inner + 162, margin, at_left=True, **spacing)
    every = [each for scores in found for each in scores]
    span = reach([v for each in every for v in (each.patch, each.clamp, each.ablate, *each.random)], **_SHARES)
    for panel, scores in zip(panes, found, strict=True):
        _controls(panel, [each.random for each in scores], "patch of controls", -0.22)
        for mark in _MARKS:
            _effects(panel, scores, mark)
        number_axis(panel, span, "share of the contrast" if panel.row == len(found) else None)
        _name_rows(panel, [(f"<b>{each.unit.kind}</b>", each.unit) for each in scores])
        rule(panel, x=1, below=True, dash="dot")
        beside(panel, "<b>AUROC</b>; below it the<br><b>margin</b> over random", [_auroc(each) for each in scores])
    for mark in _MARKS:  # in ink: colours are those of kinds, which have their names
        look = {"color": INK, "symbol": mark.symbol, "size": 10, "line": {"width": 2, "color": INK}}
        entry(figure, mark.name, marker=look)
    return figure


def _scores(table: Table) -> list[UnitScore]:
    order = list(UNITS)
    return sorted(table.scores, key=lambda each: order.index(each.unit.kind))


def _auroc(score: UnitScore) -> str:
    margin = f"<br>{number(score.margin, 2)}" if score.margin.measured else ""
    return number(score.auroc, 2) + margin


def _title(table: Table) -> str:
    clean, corrupt = _sides(table)
    return (
        f"<b>{table.concept}</b> in {SIDES[table.checkpoint]}: {clean} put into {corrupt}<br>"
        f"log-odds {number(table.base.value, 2)} → {number(table.goal.value, 2)} nats; site that patching named: "
        f"{label(str(table.site), 40)}; {table.questions} questions"
    )


def _sides(table: Table) -> tuple[str, str]:
    """The clean and the corrupt side, in words."""
    if table.concept == "selector":
        return SIDES["before"], SIDES["after"]
    clean, corrupt = (f"{table.concept} {label(name, 16)}" for name in (table.clean, table.corrupt))
    return clean, corrupt


def _effects(panel: Panel, scores: Sequence[UnitScore], mark: _Mark) -> None:
    """One effect of every unit, in the colour of its kind; the first mark has the stronger whiskers."""
    colours = [UNITS[each.unit.kind] for each in scores]
    first = mark is _MARKS[0]
    edge = {"width": 1, "color": INK} if first else {"width": 2.5, "color": colours}
    marks = [
        Mark(y + mark.lift, value := getattr(each, mark.field), _said(each, f"{mark.name}: {number(value)}"))
        for y, each in enumerate(scores)
    ]
    look: dict[str, Any] = {"name": mark.field, "showlegend": False, "whisker": (2, 5) if first else (1.5, 3)}
    look["marker"] = {"color": colours, "symbol": mark.symbol, "size": mark.size, "line": edge}
    dots(panel, marks, **look)


def _said(score: UnitScore, effect: str) -> str:
    return f"{label(str(score.unit), 60)}, best of {score.among}<br>{effect}<br>AUROC {number(score.auroc)}"


# ---------------------------------------------------------------------------------------------------------------
# how many


def needed(record: FeatureRecord) -> Figure:
    """What the best one of each kind moves, and how many it takes to move nearly all, as shares of the contrast.

    A panel a concept; whiskers are the record's intervals over questions. Grey: as many matched others; where there is
    no set, the controls of the one. Raises ValueError if no units were compared.
    """
    tables = record.tables
    if not tables:
        raise ValueError("no units were compared")
    kinds = [kind for kind in UNITS if any(score.unit.kind == kind for table in tables for score in table.scores)]
    titles = ["<b>{}</b> in {}<br>{} put into {}".format(t.concept, SIDES[t.checkpoint], *_sides(t)) for t in tables]
    spacing = 0.22 / len(tables) if len(tables) > 1 else 0
    margin = {"l": 96, "r": 76, "t": 90, "b": 56}
    more = {"at_left": True, "horizontal_spacing": spacing}
    figure, panes = panels((1, len(tables)), titles, 50 * len(kinds) + 150, margin, **more)
    scores = [{score.unit.kind: score for score in table.scores} for table in tables]
    sets = [{each.kind: each for each in table.several if each.patch.measured} for table in tables]
    every = [each for found in (*scores, *sets) for each in found.values()]
    span = reach([value for each in every for value in (each.patch, *each.random)], **_SHARES)
    for panel, one, many in zip(panes, scores, sets, strict=True):
        random = [(many.get(kind) or one[kind]).random if kind in one else () for kind in kinds]
        _controls(panel, random, "controls", 0.24)
        _one_and_many(panel, kinds, one, many, span)
        number_axis(panel, span, "share of the contrast", nticks=6)
        row_axis(panel, [f"<b>{kind}</b>" for kind in kinds])
        rule(panel, x=1, below=True, dash="dot")
        beside(panel, "AUROC", [number(one[kind].auroc.value, 2) if kind in one else "" for kind in kinds])
    _symbols(figure, [("the best one", "diamond", INK), ("the fewest together", "circle", "white")])
    return figure


def _one_and_many(
    panel: Panel,
    kinds: Sequence[str],
    one: Mapping[Any, UnitScore],
    many: Mapping[Any, Several],
    span: tuple[float, float],
) -> None:
    """The best one of each kind, the set of its kind, and a line from what one does to what the set does."""
    for y, kind in enumerate(kinds):
        if kind in one and kind in many:
            look = {"line": {"color": UNITS[kind], "width": 2}, "opacity": 0.45, "showlegend": False}
            both = [one[kind].patch.value, many[kind].patch.value]
            line(panel, both, [y, y], None, name="from one to the set", **look)
    rows = list(enumerate(kinds))
    _rings(panel, [(y, many[kind], many[kind].patch) for y, kind in rows if kind in many], span)
    ones = [(y, one[kind]) for y, kind in rows if kind in one]
    colours = [UNITS[each.unit.kind] for _, each in ones]
    marker = {"symbol": "diamond", "size": 13, "line": {"width": 1, "color": INK}, "color": colours}
    marks = [Mark(y, each.patch, _said(each, number(each.patch))) for y, each in ones]
    dots(panel, marks, marker=marker, name="one", showlegend=False)


def _rings(
    panel: Panel, sets: Sequence[tuple[float, Several, Interval]], named: tuple[float, float] | None = None
) -> None:
    """Sets of units as rings; their number is beside the ring where the ends of the axis are `named`."""
    low, high = named or (0.0, 1.0)
    marks = [
        Mark(y, value, f"{_count(each)}, of {each.among}<br>{number(value)}<br>{_listed(each)}")
        for y, each, value in sets
    ]
    edge = {"width": 3, "color": [UNITS[each.kind] for _, each, _ in sets]}
    marker = {"symbol": "circle", "size": 12, "color": "white", "opacity": 1, "line": edge}
    text = [_count(each) if named else "" for _, each, _ in sets]
    places = [_beside_ring(((value.value or 0.0) - low) / (high - low)) for *_, value in sets]
    words = {"text": text, "textposition": places, "textfont": {"size": 12, "color": INK}, "cliponaxis": False}
    look: dict[str, Any] = {"mode": "markers+text", "name": "together", "showlegend": False, **words}
    dots(panel, marks, whisker=(1.5, 4), marker=marker, **look)


def _count(several: Several) -> str:
    """`12 features`, and whether that is enough."""
    words = f"{len(several.units)} {several.kind}{'s' if len(several.units) != 1 else ''}"
    return words if several.enough else f"{words}, not enough"


def _listed(several: Several) -> str:
    more = ["…"] if len(several.units) > _LISTED else []
    return "<br>".join([*(label(str(unit), 60) for unit in several.units[:_LISTED]), *more])


def _beside_ring(place: float) -> str:
    """Where its words stand, so that they stay in the panel; `place`: 0 is its left end, 1 its right end."""
    return "top right" if place < 0.3 else "top center" if place < 0.72 else "top left"


# ---------------------------------------------------------------------------------------------------------------
# clamping


class _ClampLine(NamedTuple):
    """A row of `clamping`."""

    kind: str
    what: Unit | str
    gap: Interval
    change: Interval
    random: tuple[float | None, ...] = ()
    concept: str = ""
    words: str = ""
    several: Several | None = None
    """The fewest of its kind that carry the contrast together, where they were clamped."""


def clamping(record: FeatureRecord, repair: RepairRecord | None = None) -> Figure:
    """How much of the lost accuracy comes back with one unit of R clamped, or several, beside the repairs of heads.

    Left: gap closed under the harmed cue, a share of what was lost; right: the change of accuracy under the trained
    one, a probability. Whiskers are the record's intervals. Rings: the fewest units of the kind that carry the contrast
    together, each clamped. Raises ValueError if no unit was clamped.
    """
    lines = _clamp_lines(record, repair)
    harmed, trained = (DASH if cue is None else label(cue, 16) for cue in (record.harmed_cue, record.trained_cue))
    titles = [f"<b>gap closed</b> under cue {harmed}", f"<b>change of accuracy</b> under cue {trained}"]
    margin = {"l": _left([str(each.what) for each in lines]), "r": 206, "t": 100, "b": 56}
    spacing = {"horizontal_spacing": 0.03, "column_widths": [0.6, 0.4]}
    figure, (gap, change) = panels((1, 2), titles, 46 * len(lines) + 166, margin, **spacing)
    _controls(gap, [each.random for each in lines], "controls, clamped", 0.0)
    sets = [(y + 0.2, each.several) for y, each in enumerate(lines) if each.several is not None]
    gaps = [(y, each, each.gap_closed) for y, each in sets]
    changes = [(y, each, each.trained_change) for y, each in sets]
    for panel, field, rings in ((gap, "gap", gaps), (change, "change", changes)):
        _clamped(panel, lines, field)
        _rings(panel, rings)
    symbols = [("the best unit clamped", "diamond", INK)]
    symbols += [("the fewest together, clamped", "circle", "white")] if sets else []
    _symbols(figure, symbols + ([] if repair is None else [("heads repaired", "square", "white")]))
    shares = [*(v for each in lines for v in (each.gap, *each.random)), *(value for *_, value in gaps)]
    number_axis(gap, reach(shares, **_SHARES), "share of what was lost")
    found = [*(each.change for each in lines), *(value for *_, value in changes)]
    number_axis(change, reach(found, (-0.05, 0.05)), "probability", nticks=5)
    _name_rows(gap, [(_words(each), each.what) for each in lines])
    bare = {"showgrid": False, "zeroline": False, "showticklabels": False}
    figure.update_yaxes(range=[len(lines) - 0.45, -0.55], **bare, **change.at)
    rule(gap, x=1, below=True, dash="dot")
    between(Panel(figure), [each.concept for each in lines], color="#BBBBBB")
    beside(change, "<b>gap closed</b>", [_closed(each) for each in lines])
    return figure


def _clamp_lines(record: FeatureRecord, repair: RepairRecord | None) -> list[_ClampLine]:
    """The best units that were clamped, then the repairs of heads."""
    lines = [
        _ClampLine(
            each.unit.kind,
            each.unit,
            each.gap_closed,
            each.trained_change,
            each.random_gap,
            table.concept,
            several=_clamped_set(table, each),
        )
        for table in record.tables
        for each in _scores(table)
        if each.gap_closed.measured
    ]
    if not lines:
        raise ValueError("no unit was clamped")
    if repair is not None:
        heads = ", ".join(str(site) for site in repair.heads)
        lines += [
            _ClampLine(each.kind, heads, each.gap_closed, each.trained_change, words="; ".join(each.what))
            for each in repair.repairs
        ]
    return lines


def _clamped_set(table: Table, score: UnitScore) -> Several | None:
    """The set beside a unit, where it was clamped and is more than this unit."""
    several = table.together(score.unit.kind)
    if several is None or not several.gap_closed.measured or several.units == (score.unit,):
        return None
    return several


def _closed(line: _ClampLine) -> str:
    """The gap that the unit closes, and below it that of the set."""
    one = number(line.gap, 2)
    return one if line.several is None else f"{one}<br>{len(line.several.units)}: {number(line.several.gap_closed, 2)}"


def _words(line: _ClampLine) -> str:
    return f"<b>{line.kind}</b> for the {line.concept}" if line.concept else f"<b>repair</b>: {line.kind}"


def _clamped(panel: Panel, lines: Sequence[_ClampLine], field: str) -> None:
    """Units as diamonds in the colour of their kind, repairs of heads as white squares."""
    units = [bool(each.concept) for each in lines]
    said = "gap closed" if field == "gap" else "change"
    marks = []
    for y, each in enumerate(lines):
        value = getattr(each, field)
        words = f"<br>{label(each.words, 90)}" if each.words else ""
        hover = f"{label(str(each.what), 60)}<br>{said} {number(value)}{words}"
        marks.append(Mark(y - 0.16 * (each.several is not None), value, hover))
    marker = {
        "color": [UNITS[each.kind] if each.concept else "white" for each in lines],
        "symbol": ["diamond" if unit else "square" for unit in units],
        "size": [13 if unit else 11 for unit in units],
        "opacity": 1,
        "line": {"width": [1 if unit else 2 for unit in units], "color": INK},
    }
    dots(panel, marks, marker=marker, name=field, showlegend=False)


# ---------------------------------------------------------------------------------------------------------------
# parts of all


def _controls(panel: Panel, random: Sequence[Sequence[float | None]], name: str, lift: float) -> None:
    """Matched random units, a strip a row."""
    legend = (panel.row, panel.column) == (1, 1)
    controls(
        panel, random, lambda y, i: f"{name}<br>{number(random[y][i])}", (lift, 0.34), name=name, showlegend=legend
    )


def _name_rows(panel: Panel, rows: Sequence[tuple[str, Unit | str]]) -> None:
    """A kind, as plotly shows it, and below it the unit itself."""
    row_axis(panel, [f"{kind}<br>{label(str(what), _NAME)}" for kind, what in rows])
    between(panel, range(len(rows)), below=True, color="#E6E6E6")


def _symbols(figure: Figure, symbols: Sequence[tuple[str, str, str]]) -> None:
    """What symbols of these colours stand for."""
    for name, symbol, colour in symbols:
        entry(figure, name, marker={"color": colour, "symbol": symbol, "size": 11, "line": {"width": 2, "color": INK}})


def _left(names: Sequence[str]) -> int:
    """Pixels that the names of rows need."""
    return 24 + round(6.3 * min(_NAME, max((len(name) for name in names), default=0)))
