"""Units beside each other: what the best feature, neuron, head and direction move, how many it takes, and clamps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mixturelens.figures.style import DASH, GREY, INK, SIDES, UNITS, jitter, label, left, number, style
from mixturelens.figures.trajectories import whiskers
from mixturelens.types import Interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.features.record import Concept, FeatureRecord, Several, Table, Unit, UnitScore
    from mixturelens.routing.repair import RepairRecord

_NAME = 44
"""Letters of a unit's name beside its row."""
_LISTED = 12
"""Units of a set that are named."""


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
    """What the best unit of each kind moves of the contrast, beside its controls; a panel a concept.

    `concept`: that one alone. Raises KeyError if the record has no table of it, ValueError if it has none at all.
    """
    from plotly.subplots import make_subplots

    tables = [each for each in record.tables if concept in (None, each.concept)]
    if not tables and concept is not None:
        raise KeyError(f"no units for {concept}")
    if not tables:
        raise ValueError("no units were compared")
    found = [_scores(table) for table in tables]
    each, gap, top = 58, 92, 106
    inner = sum(each * max(len(scores), 1) for scores in found) + gap * (len(tables) - 1)
    figure = make_subplots(
        rows=len(tables),
        cols=1,
        row_heights=[max(len(scores), 1) for scores in found],
        vertical_spacing=gap / inner if len(tables) > 1 else 0,
        subplot_titles=[_title(table) for table in tables],
    )
    style(figure, inner + top + 56)
    margin = _left([str(each.unit) for scores in found for each in scores])
    figure.update_layout(margin={"l": margin, "r": 160, "t": top, "b": 56}, hovermode="closest")
    figure.update_annotations(font_size=13, xanchor="left", align="left", x=left(figure, 1, 1))
    low, high = _span(
        [value for scores in found for each in scores for value in (each.patch, each.clamp, each.ablate)],
        [value for scores in found for each in scores for value in each.random],
    )
    for row, scores in enumerate(found, start=1):
        _strip(figure, [each.random for each in scores], "patch of controls", -0.22, row, 1)
        for mark in _MARKS:
            _effects(figure, scores, mark, row)
        figure.update_xaxes(
            range=[low, high],
            title_text="share of the contrast" if row == len(found) else None,
            zeroline=True,
            zerolinecolor="#999999",
            row=row,
            col=1,
        )
        _name_rows(figure, [(f"<b>{each.unit.kind}</b>", each.unit) for each in scores], row)
        _line_at_one(figure, row)
        texts = [
            f"{number(each.auroc, 2)}<br>{number(each.margin, 2)}" if each.margin.measured else number(each.auroc, 2)
            for each in scores
        ]
        _beside(figure, "<b>AUROC</b>; below it the<br><b>margin</b> over random", texts, row, 1)
    _legend(figure)
    return figure


# ---------------------------------------------------------------------------------------------------------------
# how many


def needed(record: FeatureRecord) -> Figure:
    """What the best one of each kind moves, and how many it takes to move nearly all; a panel a concept.

    Grey: as many matched others; where there is no set, the controls of the one. Raises ValueError if no units
    were compared.
    """
    from plotly.subplots import make_subplots

    tables = record.tables
    if not tables:
        raise ValueError("no units were compared")
    kinds = [kind for kind in UNITS if any(score.unit.kind == kind for table in tables for score in table.scores)]
    figure = make_subplots(
        rows=1,
        cols=len(tables),
        horizontal_spacing=0.22 / len(tables) if len(tables) > 1 else 0,
        subplot_titles=[_concept(table) for table in tables],
    )
    style(figure, 50 * len(kinds) + 150)
    figure.update_layout(margin={"l": 96, "r": 76, "t": 90, "b": 56}, hovermode="closest")
    figure.update_annotations(font_size=13, xanchor="left", align="left")
    drawn: Any = figure.layout
    scores = [{score.unit.kind: score for score in table.scores} for table in tables]
    sets = [{each.kind: each for each in table.several if each.patch.measured} for table in tables]
    low, high = _span(
        [each.patch for found in (*scores, *sets) for each in found.values()],
        [value for found in (*scores, *sets) for each in found.values() for value in each.random],
    )
    for column, (one, many) in enumerate(zip(scores, sets, strict=True), start=1):
        drawn.annotations[column - 1].x = left(figure, 1, column)
        random = [(many.get(kind) or one[kind]).random if kind in one else () for kind in kinds]
        _strip(figure, random, "controls", 0.24, 1, column)
        for y, kind in enumerate(kinds):
            if kind in one and kind in many:
                ends = one[kind].patch.value, many[kind].patch.value
                _between(figure, ends, y, UNITS[kind], column)
        rows = [(y, kind) for y, kind in enumerate(kinds)]
        _set_marks(figure, [(y, many[kind], many[kind].patch) for y, kind in rows if kind in many], column, (low, high))
        _one_marks(figure, [(y, one[kind]) for y, kind in rows if kind in one], column)
        figure.update_xaxes(
            range=[low, high],
            nticks=6,
            title_text="share of the contrast",
            zeroline=True,
            zerolinecolor="#999999",
            row=1,
            col=column,
        )
        figure.update_yaxes(
            tickvals=list(range(len(kinds))),
            ticktext=[f"<b>{kind}</b>" for kind in kinds],
            showticklabels=column == 1,
            range=[len(kinds) - 0.45, -0.55],
            showgrid=False,
            zeroline=False,
            row=1,
            col=column,
        )
        line = {"color": "#999999", "width": 1, "dash": "dot"}
        figure.add_vline(x=1, line=line, layer="below", row=1, col=column)  # pyright: ignore[reportArgumentType]
        texts = [number(one[kind].auroc.value, 2) if kind in one else "" for kind in kinds]
        _beside(figure, "AUROC", texts, 1, column)
    for name, symbol, colour in (("the best one", "diamond", INK), ("the fewest together", "circle", "white")):
        marker = {"color": colour, "symbol": symbol, "size": 11, "line": {"width": 2, "color": INK}}
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=name)
    return figure


def _count(several: Several) -> str:
    """`12 features`, and whether that is enough."""
    words = f"{len(several.units)} {several.kind}{'s' if len(several.units) != 1 else ''}"
    return words if several.enough else f"{words}, not enough"


def _between(figure: Figure, ends: tuple[float | None, float | None], y: float, colour: str, column: int) -> None:
    """From what one does to what the set does."""
    figure.add_scatter(
        x=list(ends),
        y=[y, y],
        mode="lines",
        line={"color": colour, "width": 2},
        opacity=0.45,
        hoverinfo="skip",
        name="from one to the set",
        showlegend=False,
        row=1,
        col=column,
    )


def _set_marks(
    figure: Figure,
    sets: Sequence[tuple[float, Several, Interval]],
    column: int,
    named: tuple[float, float] | None = None,
) -> None:
    """Sets of units as rings; their number is beside the ring where the ends of the axis are `named`."""
    low, high = named or (0.0, 1.0)
    values = [value for _, _, value in sets]
    up, down = whiskers(values)
    figure.add_scatter(
        x=[value.value for value in values],
        y=[y for y, _, _ in sets],
        error_x={"array": up, "arrayminus": down, "thickness": 1.5, "width": 4, "color": INK},
        mode="markers+text",
        text=[_count(each) if named else "" for _, each, _ in sets],
        textposition=[_beside_ring(((value.value or 0.0) - low) / (high - low)) for value in values],
        textfont={"size": 12, "color": INK},
        cliponaxis=False,
        marker={
            "color": "white",
            "symbol": "circle",
            "size": 12,
            "opacity": 1,
            "line": {"width": 3, "color": [UNITS[each.kind] for _, each, _ in sets]},
        },
        name="together",
        showlegend=False,
        hovertext=[
            f"{_count(each)}, of {each.among}<br>{number(value)}<br>"
            + "<br>".join(label(str(unit), 60) for unit in each.units[:_LISTED])
            + ("<br>…" if len(each.units) > _LISTED else "")
            for _, each, value in sets
        ],
        hoverinfo="text",
        row=1,
        col=column,
    )


def _beside_ring(place: float) -> str:
    """Where its words stand, so that they stay in the panel; `place`: 0 is its left end, 1 its right end."""
    return "top right" if place < 0.3 else "top center" if place < 0.72 else "top left"


def _one_marks(figure: Figure, ones: Sequence[tuple[float, UnitScore]], column: int) -> None:
    up, down = whiskers([each.patch for _, each in ones])
    figure.add_scatter(
        x=[each.patch.value for _, each in ones],
        y=[y for y, _ in ones],
        error_x={"array": up, "arrayminus": down, "thickness": 2, "width": 5, "color": INK},
        mode="markers",
        marker={
            "color": [UNITS[each.unit.kind] for _, each in ones],
            "symbol": "diamond",
            "size": 13,
            "line": {"width": 1, "color": INK},
        },
        name="one",
        showlegend=False,
        hovertext=[
            f"{label(str(each.unit), 60)}, best of {each.among}<br>{number(each.patch)}<br>AUROC {number(each.auroc)}"
            for _, each in ones
        ],
        hoverinfo="text",
        row=1,
        col=column,
    )


def _scores(table: Table) -> list[UnitScore]:
    order = list(UNITS)
    return sorted(table.scores, key=lambda each: order.index(each.unit.kind))


def _title(table: Table) -> str:
    clean, corrupt = _ends_of(table)
    return (
        f"<b>{table.concept}</b> in {SIDES[table.checkpoint]}: {clean} put into {corrupt}<br>"
        f"log-odds {number(table.base.value, 2)} → {number(table.goal.value, 2)} nats; site that patching named: "
        f"{label(str(table.site), 40)}; {table.questions} questions"
    )


def _concept(table: Table) -> str:
    clean, corrupt = _ends_of(table)
    return f"<b>{table.concept}</b> in {SIDES[table.checkpoint]}<br>{clean} put into {corrupt}"


def _ends_of(table: Table) -> tuple[str, str]:
    """The clean and the corrupt side, in words."""
    if table.concept == "selector":
        return SIDES["before"], SIDES["after"]
    clean, corrupt = (f"{table.concept} {label(name, 16)}" for name in (table.clean, table.corrupt))
    return clean, corrupt


def _effects(figure: Figure, scores: Sequence[UnitScore], mark: _Mark, row: int) -> None:
    """One effect of every unit, in the colour of its kind."""
    values: list[Interval] = [getattr(each, mark.field) for each in scores]
    colours = [UNITS[each.unit.kind] for each in scores]
    up, down = whiskers(values)
    first = mark.field == "patch"
    figure.add_scatter(
        x=[value.value for value in values],
        y=[y + mark.lift for y in range(len(scores))],
        error_x={
            "array": up,
            "arrayminus": down,
            "thickness": 2 if first else 1.5,
            "width": 5 if first else 3,
            "color": INK,
        },
        mode="markers",
        marker={
            "color": colours,
            "symbol": mark.symbol,
            "size": mark.size,
            "line": {"width": 1 if first else 2.5, "color": INK if first else colours},
        },
        name=mark.field,
        showlegend=False,
        hovertext=[
            f"{label(str(each.unit), 60)}, best of {each.among}<br>{mark.name}: {number(value)}"
            f"<br>AUROC {number(each.auroc)}"
            for each, value in zip(scores, values, strict=True)
        ],
        hoverinfo="text",
        row=row,
        col=1,
    )


def _legend(figure: Figure) -> None:
    """Symbols in ink: colours are those of kinds, which have their names."""
    for mark in _MARKS:
        figure.add_scatter(
            x=[None],
            y=[None],
            mode="markers",
            marker={"color": INK, "symbol": mark.symbol, "size": 10, "line": {"width": 2, "color": INK}},
            name=mark.name,
        )


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

    Left: gap closed under the harmed cue; right: what it costs under the trained one. Rings: the fewest units of the
    kind that carry the contrast together, each clamped. Raises ValueError if no unit was clamped.
    """
    from plotly.subplots import make_subplots

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
    harmed, trained = (DASH if cue is None else label(cue, 16) for cue in (record.harmed_cue, record.trained_cue))
    figure = make_subplots(
        rows=1,
        cols=2,
        horizontal_spacing=0.03,
        column_widths=[0.6, 0.4],
        subplot_titles=[
            f"<b>gap closed</b> under cue {harmed}",
            f"<b>change of accuracy</b> under cue {trained}",
        ],
    )
    style(figure, 46 * len(lines) + 166)
    margin = _left([str(line.what) for line in lines])
    figure.update_layout(margin={"l": margin, "r": 206, "t": 100, "b": 56}, hovermode="closest")
    figure.update_annotations(font_size=13)
    _strip(figure, [line.random for line in lines], "controls, clamped", 0.0, 1, 1)
    sets = [(y + 0.2, line.several) for y, line in enumerate(lines) if line.several is not None]
    for column, field in enumerate(("gap", "change"), start=1):
        _clamped(figure, lines, field, column)
        both = [(y, each, each.gap_closed if field == "gap" else each.trained_change) for y, each in sets]
        _set_marks(figure, both, column)
    for name, symbol, colour, drawn in (
        ("the best unit clamped", "diamond", INK, True),
        ("the fewest together, clamped", "circle", "white", bool(sets)),
        ("heads repaired", "square", "white", repair is not None),
    ):
        if drawn:
            marker = {"color": colour, "symbol": symbol, "size": 11, "line": {"width": 2, "color": INK}}
            figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=name)
    gaps = _span(
        [line.gap for line in lines] + [each.gap_closed for _, each in sets],
        [value for line in lines for value in line.random],
    )
    changes = [line.change for line in lines] + [each.trained_change for _, each in sets]
    ends = [end for value in changes for end in _ends(value)]
    low, high = min([-0.05, *ends]), max([0.05, *ends])
    pad = 0.06 * (high - low)
    figure.update_xaxes(range=list(gaps), title_text="share of what was lost", row=1, col=1)
    figure.update_xaxes(range=[low - pad, high + pad], title_text="probability", nticks=5, row=1, col=2)
    figure.update_xaxes(zeroline=True, zerolinecolor="#999999")
    _name_rows(figure, [(_words(line), line.what) for line in lines], 1)
    figure.update_yaxes(
        range=[len(lines) - 0.45, -0.55], showgrid=False, zeroline=False, showticklabels=False, row=1, col=2
    )
    _line_at_one(figure, 1)
    for y in range(1, len(lines)):
        if lines[y].concept != lines[y - 1].concept:
            figure.add_hline(y=y - 0.5, line={"color": "#BBBBBB", "width": 1})  # pyright: ignore[reportArgumentType]
    _beside(figure, "<b>gap closed</b>", [_closed(line) for line in lines], 1, 2)
    return figure


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


def _clamped(figure: Figure, lines: Sequence[_ClampLine], field: str, column: int) -> None:
    """Units as diamonds in the colour of their kind, repairs of heads as white squares."""
    values: list[Interval] = [getattr(line, field) for line in lines]
    up, down = whiskers(values)
    figure.add_scatter(
        x=[value.value for value in values],
        y=[y - 0.16 * (line.several is not None) for y, line in enumerate(lines)],
        error_x={"array": up, "arrayminus": down, "thickness": 2, "width": 5, "color": INK},
        mode="markers",
        marker={
            "color": [UNITS[line.kind] if line.concept else "white" for line in lines],
            "symbol": ["diamond" if line.concept else "square" for line in lines],
            "size": [13 if line.concept else 11 for line in lines],
            "opacity": 1,
            "line": {"width": [1 if line.concept else 2 for line in lines], "color": INK},
        },
        name=field,
        showlegend=False,
        hovertext=[
            f"{label(str(line.what), 60)}<br>{'gap closed' if field == 'gap' else 'change'} {number(value)}"
            + (f"<br>{label(line.words, 90)}" if line.words else "")
            for line, value in zip(lines, values, strict=True)
        ],
        hoverinfo="text",
        row=1,
        col=column,
    )


# ---------------------------------------------------------------------------------------------------------------
# parts of both


def _strip(
    figure: Figure, random: Sequence[Sequence[float | None]], name: str, lift: float, row: int, column: int
) -> None:
    """Matched random units, a strip a row."""
    points = [(y, i, value) for y, values in enumerate(random) for i, value in enumerate(values) if value is not None]
    figure.add_scatter(
        x=[value for _, _, value in points],
        y=[y + lift + 0.34 * jitter(i) for y, i, _ in points],
        mode="markers",
        marker={"color": GREY, "size": 7, "opacity": 0.6},
        name=name,
        showlegend=row == 1 and column == 1,
        hovertext=[f"{name}<br>{number(value)}" for _, _, value in points],
        hoverinfo="text",
        row=row,
        col=column,
    )


def _name_rows(figure: Figure, rows: Sequence[tuple[str, Unit | str]], row: int) -> None:
    """A kind, as plotly shows it, and below it the unit itself."""
    figure.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=[f"{kind}<br>{label(str(what), _NAME)}" for kind, what in rows],
        tickfont={"size": 12},
        range=[len(rows) - 0.45, -0.55],
        showgrid=False,
        zeroline=False,
        row=row,
        col=1,
    )
    for y in range(1, len(rows)):
        figure.add_hline(y=y - 0.5, line={"color": "#E6E6E6", "width": 1}, layer="below", row=row, col=1)  # pyright: ignore[reportArgumentType]


def _left(names: Sequence[str]) -> int:
    """Pixels that the names of rows need."""
    return 24 + round(6.3 * min(_NAME, max((len(name) for name in names), default=0)))


def _line_at_one(figure: Figure, row: int) -> None:
    line = {"color": "#999999", "width": 1, "dash": "dot"}
    figure.add_vline(x=1, line=line, layer="below", row=row, col=1)  # pyright: ignore[reportArgumentType]


def _beside(figure: Figure, title: str, texts: Sequence[str], row: int, column: int) -> None:
    """Text at the right of each row of a panel, under a title."""
    for y, text in enumerate([title, *texts], start=-1):
        at: dict[str, Any] = (
            {"y": 1, "yref": "y domain", "yanchor": "bottom", "yshift": 4} if y < 0 else {"y": y, "yanchor": "middle"}
        )
        figure.add_annotation(
            text=text,
            x=1,
            xref="x domain",
            xshift=12,
            xanchor="left",
            align="left",
            showarrow=False,
            font={"size": 12},
            row=row,
            col=column,
            **at,
        )


def _ends(value: Interval) -> list[float]:
    return [end for end in (value.low, value.value, value.high) if end is not None]


def _span(values: Sequence[Interval], points: Sequence[float | None]) -> tuple[float, float]:
    """Shares that are drawn: at least 0 to 1, and not so far that single ones squeeze everything else."""
    ends = [0.0, 1.0, *(end for value in values for end in _ends(value)), *(x for x in points if x is not None)]
    low, high = max(min(ends), -1.0), min(max(ends), 2.0)
    return low - 0.06 * (high - low), high + 0.06 * (high - low)
