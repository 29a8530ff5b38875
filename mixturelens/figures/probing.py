"""What probes read where, and how RL shifted activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mixturelens.figures.heat import EMPTY, HeatCell, across, colour_bar, diverging, heat, scale, up
from mixturelens.figures.panels import Panel, between, panels, stacked
from mixturelens.figures.style import INK, left
from mixturelens.figures.words import DASH, label, number, short, token, token_axis
from mixturelens.types import Component, Interval, Site

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.probing.record import Column, ProbingRecord, Readout, Shift

_WIDE = 900
"""Pixels that panels share: less than the page leaves them."""
_FLOOR = "#8A8A8A"
"""Of scores that random weights reach as well."""
_Row = tuple[int, Component, int | None]
"""Layer, component and head of a row."""
_FLOW: Mapping[Component, int] = {"resid_pre": 0, "z": 1, "attn_out": 2, "resid_mid": 3, "mlp_out": 4, "resid_post": 5}
"""The order in which a layer computes, from below to above."""
_WORDS = {"resid_pre": "in", "resid_mid": "mid", "resid_post": "out", "mlp_out": "MLP", "attn_out": "attention"}


def readable(record: ProbingRecord) -> Figure:
    """What can be read from the residual stream where: a row of panels a target; S, R, and S's probes put on R.

    Colours go from chance to perfect; written out is what surely exceeds shuffled labels, in the target's metric.
    Intervals over questions are in the hover text.
    """
    rows = [row for row in _rows(record.sites) if row[1] == "resid_post" or row[:2] == (0, "resid_pre")]
    return _maps(record, record.readouts, rows)


def readability(record: ProbingRecord, target: str) -> Figure:
    """Where one target can be read: every component of every layer, from below to above; S, R, and S's probes on R.

    Colours, numbers and intervals are those of `readable`. Raises KeyError if the record has no such target.
    """
    readout = record.readout(target)
    if readout is None:
        raise KeyError(f"no probes for {target}")
    return _maps(record, [readout], _rows(record.sites))


class _MapPlan(NamedTuple):
    """Rows and columns of a map, and the pixels of a row and of a column."""

    rows: Sequence[_Row]
    places: Sequence[str | int]
    names: Sequence[str]
    each: int
    column: float


def _plan(sites: Sequence[Site], rows: Sequence[_Row], labels: Sequence[str], each: int, columns: int) -> _MapPlan:
    """Positions in the order of the prompt, then named spans in the order of the record."""
    found = list(dict.fromkeys(site.position for site in sites if site.position is not None))
    places = sorted(found, key=lambda place: (0, place) if isinstance(place, int) else (1, 0))
    names = [labels[p] if isinstance(p, int) and p < len(labels) else str(p) for p in places]
    return _MapPlan(rows, places, names, each, _WIDE / columns / max(len(places), 1))


def _rows(sites: Sequence[Site]) -> list[_Row]:
    """Components from below to above; the input of a layer only where it is not the output of the one before."""
    found: set[_Row] = {(site.layer, site.component, site.head) for site in sites}
    kept = [row for row in found if not (row[1] == "resid_pre" and (row[0] - 1, "resid_post", None) in found)]
    return sorted(kept, key=lambda row: (row[0], _FLOW.get(row[1], 9), row[2] or 0))


def _row_names(rows: Sequence[_Row], each: int) -> dict[float, str]:
    """Names of rows; where there are very many, of their layers alone, and of as many as there is room for."""
    if each > 12:
        return {
            y: f"L{layer} {_WORDS.get(component, component) if head is None else f'head {head}'}"
            for y, (layer, component, head) in enumerate(rows)
        }
    named: dict[float, str] = {}
    for layer in dict.fromkeys(layer for layer, _, _ in rows):
        ys = [y for y, row in enumerate(rows) if row[0] == layer]
        middle = (ys[0] + ys[-1]) / 2
        if not named or middle - max(named) >= 2:
            named[middle] = f"layer {layer}"
    return named


class _View(NamedTuple):
    """One column of panels: its title and the scores it shows."""

    title: str
    column: Callable[[Readout], Column]


_VIEWS = (
    _View("<b>S</b>", lambda readout: readout.before),
    _View("<b>R</b>", lambda readout: readout.after),
    _View("<b>S's probes on R</b>", lambda readout: readout.carried),
)


def _maps(record: ProbingRecord, readouts: Sequence[Readout], rows: Sequence[_Row]) -> Figure:
    """A row of maps a target: S, R, and S's probes on R."""
    high = len(rows) > 48 or len(rows) * len(readouts) > 96
    each = 12 if high else 26 if len(rows) <= 8 else 21
    plan = _plan(record.sites, rows, record.labels, each, len(_VIEWS))
    (ticks,), axis, below = token_axis([plan.names], plan.column)
    plot = each * max(len(rows), 1)
    inner, spacing = stacked(len(readouts), plot, 48)
    margin = {"l": 92, "r": 70, "t": 96, "b": below}
    more: dict[str, Any] = {"horizontal_spacing": 0.02, "vertical_spacing": spacing}
    figure, _ = panels((len(readouts), len(_VIEWS)), [], inner + below + 96, margin, **more)
    figure.update_layout(plot_bgcolor=EMPTY, showlegend=False)
    index = {(site.layer, site.component, site.head, site.position): i for i, site in enumerate(record.sites)}
    for i, readout in enumerate(readouts, start=1):
        for j, view in enumerate(_VIEWS, start=1):
            panel = Panel(figure, i, j)
            cells = [[_cell(record, readout, view, index.get((*row, p)), plan) for p in plan.places] for row in rows]
            bar = colour_bar(min(max(plot, 110), 220), tickvals=[readout.chance, 1.0], ticktext=["chance", "perfect"])
            shown = {"showscale": i == 1 and j == len(_VIEWS), "colorbar": bar, "x": list(range(len(ticks)))}
            heat(panel, cells, 11 if each > 20 else 9, **scale(readout.chance, 1.0), **shown)
            across(panel, ticks, showticklabels=i == len(readouts), zeroline=False, **axis)
            up(panel, _row_names(rows, each), len(rows))
            between(panel, [layer if len(rows) > 8 else None for layer, _, _ in rows])
        over: Any = figure.get_subplot(i, 1)
        _over(figure, _readout_title(readout), left(figure, i, 1), over.yaxis.domain[1], xanchor="left", yshift=4)
    for j, view in enumerate(_VIEWS, start=1):
        over = figure.get_subplot(1, j)
        look = {"xanchor": "center", "yshift": 34, "font": {"size": 14, "color": INK}}
        _over(figure, view.title, sum(over.xaxis.domain) / 2, 1.0, **look)
    return figure


def _over(figure: Figure, text: str, x: float, y: float, **look: Any) -> None:
    """Text above a panel."""
    place = {"x": x, "y": y, "xref": "paper", "yref": "paper", "yanchor": "bottom", "align": "left"}
    look = {"font": {"size": 12, "color": INK}, **look}
    figure.add_annotation(text=text, showarrow=False, **place, **look)


def _metric(readout: Readout) -> str:
    return "R<sup>2</sup>" if readout.metric == "R2" else readout.metric


def _readout_title(readout: Readout) -> str:
    shuffled = "" if readout.shuffled_high is None else f", shuffled labels reach {number(readout.shuffled_high, 2)}"
    facts = f"{_metric(readout)}, chance {number(readout.chance, 2)}{shuffled}; {readout.questions} questions"
    return f"<b>{label(readout.target)}</b>: {facts}"


def _cell(record: ProbingRecord, readout: Readout, view: _View, at: int | None, plan: _MapPlan) -> HeatCell:
    """The score at one site of the record, with its controls; none where there is no such site."""
    if at is None:
        return HeatCell(None, DASH if plan.column >= 20 else "", "no such site")
    site, value = record.sites[at], view.column(readout).at(at)
    name = plan.names[plan.places.index(site.position)] if site.position is not None else ""
    hover = (
        f"{view.title}: {label(readout.target)}, {label(str(site), 60)} ({token(name, 40)})<br>"
        f"{_metric(readout)} {number(value)}<br>random weights {number(readout.untrained[at])}, "
        f"shuffled labels {number(readout.shuffled[at])}<br>{label(readout.rows, 100)}"
    )
    return HeatCell(value.value, _score(value, readout, at, plan.column), hover)


def _score(value: Interval, readout: Readout, at: int, column: float) -> str:
    """The score where it surely exceeds what shuffled labels give; grey where random weights reach it as well."""
    if value.value is None:
        return DASH if column >= 20 else ""
    noise = readout.chance if readout.shuffled_high is None else max(readout.chance, readout.shuffled_high)
    if column < 20 or value.low is None or value.low <= noise:
        return ""
    text = number(value.value, 2)
    text = text if column >= 44 else text[1:] if text.startswith("0.") else text[:-1]
    untrained = readout.untrained[at]
    if untrained is not None and untrained >= value.low:
        return f'<span style="color:{_FLOOR}">{text}</span>'
    return text


# ---------------------------------------------------------------------------------------------------------------
# the shift


def shifts(record: ProbingRecord) -> Figure:
    """RL's shift of neutral prompts beside what a hint adds in S: their cosine, and the shift as a share of the hint's.

    Written out: where |cosine| exceeds the null of its site and its interval over questions excludes 0.
    """
    sites = [each.site for each in record.shifts]
    plan = _plan(sites, _rows(sites), record.labels, 26, 2)
    (ticks,), axis, below = token_axis([plan.names], plan.column)
    titles = ["<b>cosine</b> with the hint's direction", "<b>along it</b>: 1 is the hint's own size"]
    margin = {"l": 76, "r": 20, "t": 50, "b": below}
    height = 34 * max(len(plan.rows), 1) + below + 60
    figure, panes = panels((1, 2), titles, height, margin, horizontal_spacing=0.03)
    found = {(each.site.layer, each.site.component, each.site.head, each.site.position): each for each in record.shifts}
    named = list(zip(plan.places, plan.names, strict=True))
    for panel, field in zip(panes, ("cosine", "along"), strict=True):
        cells = [
            [_shift(found.get((*row, place)), field, name, plan.column) for place, name in named] for row in plan.rows
        ]
        heat(panel, cells, 11, coloraxis="coloraxis", x=list(range(len(ticks))))
        across(panel, ticks, zeroline=False, **axis)
        up(panel, _row_names(plan.rows, 26), len(plan.rows))
    figure.update_layout(plot_bgcolor=EMPTY, coloraxis=diverging(130, tickvals=[-1, 0, 1]))
    return figure


def _shift(each: Shift | None, field: str, name: str, column: float) -> HeatCell:
    if each is None:
        return HeatCell(None, DASH if column >= 20 else "", "no such site")
    hover = (
        f"{label(str(each.site), 60)} ({token(name, 40)})<br>cosine {number(each.cosine)}, null {number(each.null)}"
        f"<br>along {number(each.along)}"
    )
    value: Interval = getattr(each, field)
    return HeatCell(value.value, _shift_text(each, value, column), hover)


def _shift_text(each: Shift, value: Interval, column: float) -> str:
    """The number where its direction is surely none of chance."""
    cosine = each.cosine
    if value.value is None:
        return DASH if column >= 20 else ""
    if column < 24 or cosine.value is None or abs(cosine.value) <= each.null or not cosine.excludes(0.0):
        return ""
    return short(value.value, column)
