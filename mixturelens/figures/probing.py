"""What probes read where, what erasing it does, the subspaces that carry it, and how RL shifted activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mixturelens.figures.style import (
    DASH,
    DIVERGING,
    INK,
    SCALE,
    label,
    left,
    number,
    style,
    token,
    token_axis,
)
from mixturelens.types import NOT_MEASURED, Component, Interval, Site

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


def readable(record: ProbingRecord) -> Figure:
    """What can be read from the residual stream where: a row of panels a target; S, R, and S's probes put on R."""
    rows = [row for row in _rows(record.sites) if row[1] == "resid_post" or row[:2] == (0, "resid_pre")]
    return _maps(record, record.readouts, rows)


def readability(record: ProbingRecord, target: str) -> Figure:
    """Where one target can be read: every component of every layer, from below to above; S, R, and S's probes on R.

    Raises KeyError if the record has no such target.
    """
    readout = record.readout(target)
    if readout is None:
        raise KeyError(f"no probes for {target}")
    return _maps(record, [readout], _rows(record.sites))


def _rows(sites: Sequence[Site]) -> list[_Row]:
    """Components from below to above; the input of a layer only where it is not the output of the one before."""
    found: set[_Row] = {(site.layer, site.component, site.head) for site in sites}
    kept = [row for row in found if not (row[1] == "resid_pre" and (row[0] - 1, "resid_post", None) in found)]
    return sorted(kept, key=lambda row: (row[0], _FLOW.get(row[1], 9), row[2] or 0))


def _row_name(row: _Row) -> str:
    layer, component, head = row
    if head is not None:
        return f"L{layer} head {head}"
    words = {"resid_pre": "in", "resid_mid": "mid", "resid_post": "out", "mlp_out": "MLP", "attn_out": "attention"}
    return f"L{layer} {words.get(component, component)}"


def _places(sites: Sequence[Site]) -> list[str | int]:
    """Positions in the order of the prompt, then named spans in the order of the record."""
    found = list(dict.fromkeys(site.position for site in sites if site.position is not None))
    return sorted(found, key=lambda place: (0, place) if isinstance(place, int) else (1, 0))


def _place_names(places: Sequence[str | int], labels: Sequence[str]) -> list[str]:
    return [labels[p] if isinstance(p, int) and p < len(labels) else str(p) for p in places]


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
    """Scores from chance (white) to perfect; written out where they surely exceed shuffled labels."""
    from plotly.subplots import make_subplots

    places = _places(record.sites)
    names = _place_names(places, record.labels)
    column = _WIDE / len(_VIEWS) / max(len(places), 1)
    (ticks,), axis, below = token_axis([names], column)
    high = len(rows) > 48 or len(rows) * len(readouts) > 96
    each = 12 if high else 26 if len(rows) <= 8 else 21
    plot, gap, top = each * max(len(rows), 1), 48, 96
    inner = plot * len(readouts) + gap * max(len(readouts) - 1, 0)
    figure = make_subplots(
        rows=max(len(readouts), 1),
        cols=len(_VIEWS),
        horizontal_spacing=0.02,
        vertical_spacing=gap / inner if len(readouts) > 1 else 0,
    )
    style(figure, inner + below + top)
    figure.update_layout(margin={"l": 92, "r": 70, "t": top, "b": below}, plot_bgcolor="#E9ECEF", showlegend=False)
    index = {(site.layer, site.component, site.head, site.position): i for i, site in enumerate(record.sites)}
    for i, readout in enumerate(readouts, start=1):
        for j, view in enumerate(_VIEWS, start=1):
            cells = [[index.get((*row, place)) for place in places] for row in rows]
            scores = view.column(readout)
            z = [[NOT_MEASURED if at is None else scores.at(at) for at in line] for line in cells]
            figure.add_heatmap(
                z=[[value.value for value in line] for line in z],
                x=list(range(len(places))),
                y=list(range(len(rows))),
                zmin=readout.chance,
                zmax=1.0,
                colorscale=[list(stop) for stop in SCALE],
                showscale=i == 1 and j == len(_VIEWS),
                colorbar={
                    "tickvals": [readout.chance, 1.0],
                    "ticktext": ["chance", "perfect"],
                    "thickness": 12,
                    "lenmode": "pixels",
                    "len": min(max(plot, 110), 220),
                    "y": 1,
                    "yanchor": "top",
                },
                text=[
                    [_score(value, readout, at, column) for value, at in zip(line, found, strict=True)]
                    for line, found in zip(z, cells, strict=True)
                ],
                texttemplate="%{text}",
                textfont={"color": INK, "size": 11 if each > 20 else 9},
                hovertext=[
                    [
                        _score_hover(record, readout, view.title, value, at, name)
                        for value, at, name in zip(line, found, names, strict=True)
                    ]
                    for line, found in zip(z, cells, strict=True)
                ],
                hoverinfo="text",
                xgap=1,
                ygap=1,
                row=i,
                col=j,
            )
            figure.update_xaxes(
                tickvals=list(range(len(places))),
                ticktext=ticks,
                showticklabels=i == len(readouts),
                range=[-0.5, max(len(places), 1) - 0.5],
                showgrid=False,
                zeroline=False,
                **axis,
                row=i,
                col=j,
            )
            figure.update_yaxes(**_row_axis(rows, each), showticklabels=j == 1, row=i, col=j)
            for y in range(1, len(rows)):
                if rows[y][0] != rows[y - 1][0] and len(rows) > 8:
                    figure.add_hline(y=y - 0.5, line={"color": "#999999", "width": 1}, row=i, col=j)  # pyright: ignore[reportArgumentType]
        panel: Any = figure.get_subplot(i, 1)
        _words(figure, _readout_title(readout), left(figure, i, 1), panel.yaxis.domain[1])
    for j, view in enumerate(_VIEWS, start=1):
        panel = figure.get_subplot(1, j)
        middle = sum(panel.xaxis.domain) / 2
        _words(figure, view.title, middle, 1.0, shift=34, anchor="center", size=14)
    return figure


def _words(
    figure: Figure, text: str, x: float, y: float, shift: float = 4, anchor: str = "left", size: int = 12
) -> None:
    """Text above a panel, `shift` pixels over its edge."""
    figure.add_annotation(
        text=text,
        x=x,
        y=y,
        xref="paper",
        yref="paper",
        xanchor=anchor,
        yanchor="bottom",
        yshift=shift,
        align="left",
        showarrow=False,
        font={"size": size, "color": INK},
    )


def _row_axis(rows: Sequence[_Row], each: int) -> dict[str, Any]:
    """Names of rows; where there are very many, of their layers alone, and of as many as there is room for."""
    at, names = [float(y) for y in range(len(rows))], [_row_name(row) for row in rows]
    if each <= 12:
        layers = list(dict.fromkeys(layer for layer, _, _ in rows))
        of = [[y for y, row in enumerate(rows) if row[0] == layer] for layer in layers]
        named: list[tuple[float, str]] = []
        for layer, ys in zip(layers, of, strict=True):
            middle = (ys[0] + ys[-1]) / 2
            if not named or middle - named[-1][0] >= 2:
                named.append((middle, f"layer {layer}"))
        at, names = [middle for middle, _ in named], [name for _, name in named]
    return {
        "tickvals": at,
        "ticktext": names,
        "tickfont": {"size": 12},
        "range": [-0.5, max(len(rows), 1) - 0.5],
        "showgrid": False,
        "zeroline": False,
    }


def _readout_title(readout: Readout) -> str:
    shuffled = "" if readout.shuffled_high is None else f", shuffled labels reach {number(readout.shuffled_high, 2)}"
    metric = "R<sup>2</sup>" if readout.metric == "R2" else readout.metric
    facts = f"{metric}, chance {number(readout.chance, 2)}{shuffled}; {readout.questions} questions"
    return f"<b>{label(readout.target)}</b>: {facts}"


def _score(value: Interval, readout: Readout, at: int | None, column: float) -> str:
    """The score where it surely exceeds what shuffled labels give; grey where random weights reach it as well."""
    if at is None or value.value is None:
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


def _score_hover(record: ProbingRecord, readout: Readout, view: str, value: Interval, at: int | None, name: str) -> str:
    if at is None:
        return "no such site"
    metric = "R<sup>2</sup>" if readout.metric == "R2" else readout.metric
    return (
        f"{view}: {label(readout.target)}, {label(str(record.sites[at]), 60)} ({token(name, 40)})<br>"
        f"{metric} {number(value)}<br>random weights {number(readout.untrained[at])}, "
        f"shuffled labels {number(readout.shuffled[at])}<br>{label(readout.rows, 100)}"
    )


# ---------------------------------------------------------------------------------------------------------------
# the shift


def shifts(record: ProbingRecord) -> Figure:
    """RL's shift of neutral prompts beside what a hint adds in S: their cosine, and the shift as a share of the hint's.

    Written out: where |cosine| exceeds the null of its site and the interval excludes 0.
    """
    from plotly.subplots import make_subplots

    rows = _rows([each.site for each in record.shifts])
    places = _places([each.site for each in record.shifts])
    names = _place_names(places, record.labels)
    column = _WIDE / 2 / max(len(places), 1)
    (ticks,), axis, below = token_axis([names], column)
    figure = make_subplots(
        rows=1,
        cols=2,
        horizontal_spacing=0.03,
        subplot_titles=["<b>cosine</b> with the hint's direction", "<b>along it</b>: 1 is the hint's own size"],
    )
    style(figure, 34 * max(len(rows), 1) + below + 60)
    figure.update_layout(margin={"l": 76, "r": 20, "t": 50, "b": below}, plot_bgcolor="#E9ECEF")
    figure.update_annotations(font_size=13)
    found = {(each.site.layer, each.site.component, each.site.head, each.site.position): each for each in record.shifts}
    for j, pick in enumerate((lambda each: each.cosine, lambda each: each.along), start=1):
        grid = [[found.get((*row, place)) for place in places] for row in rows]
        figure.add_heatmap(
            z=[[None if each is None else pick(each).value for each in line] for line in grid],
            x=list(range(len(places))),
            y=list(range(len(rows))),
            text=[[_shift_text(each, pick, column) for each in line] for line in grid],
            texttemplate="%{text}",
            textfont={"color": INK, "size": 11},
            hovertext=[[_shift_hover(each, name) for each, name in zip(line, names, strict=True)] for line in grid],
            hoverinfo="text",
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            row=1,
            col=j,
        )
        figure.update_xaxes(
            tickvals=list(range(len(places))),
            ticktext=ticks,
            range=[-0.5, max(len(places), 1) - 0.5],
            showgrid=False,
            zeroline=False,
            **axis,
            row=1,
            col=j,
        )
        figure.update_yaxes(**_row_axis(rows, 26), showticklabels=j == 1, row=1, col=j)
    figure.update_layout(
        coloraxis={
            "cmin": -1,
            "cmax": 1,
            "colorscale": [list(stop) for stop in DIVERGING],
            "colorbar": {
                "thickness": 12,
                "tickvals": [-1, 0, 1],
                "lenmode": "pixels",
                "len": 130,
                "y": 1,
                "yanchor": "top",
            },
        }
    )
    return figure


def _shift_text(each: Shift | None, pick: Callable[[Shift], Interval], column: float) -> str:
    if each is None or pick(each).value is None:
        return DASH if column >= 20 else ""
    value, cosine = pick(each), each.cosine
    if column < 24 or cosine.value is None or abs(cosine.value) <= each.null or not cosine.excludes(0.0):
        return ""
    text = number(value.value, 2)
    return text if column >= 38 else text.replace("0.", ".", 1) if abs(value.value or 0) < 0.995 else text[:-1]


def _shift_hover(each: Shift | None, name: str) -> str:
    if each is None:
        return "no such site"
    return (
        f"{label(str(each.site), 60)} ({token(name, 40)})<br>cosine {number(each.cosine)}, null {number(each.null)}"
        f"<br>along {number(each.along)}"
    )
