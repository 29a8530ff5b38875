"""The score of the instruments: confusion matrices, shares beside true shares, coverage, and planted addresses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from mixturelens.figures.heat import HeatCell, across, heat, outline, scale
from mixturelens.figures.marks import Mark, columns, dots, points
from mixturelens.figures.panels import Panel, entry, panels, row_axis, rule, shade
from mixturelens.figures.style import GREY, INK, NEGATIVE, POSITIVE, ROUTER, SPECIALIST
from mixturelens.figures.words import DASH, label, number
from mixturelens.types import NOT_MEASURED, Interval, VerdictWord

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.lab.proving.coverage import Coverage
    from mixturelens.lab.proving.judged import MethodScore
    from mixturelens.lab.proving.record import Scored, ScoreRecord, Verdicts
    from mixturelens.routing.verdict import Thresholds

WORDS: tuple[VerdictWord, ...] = get_args(VerdictWord)
"""In the order in which they always stand."""
NOMINAL, BAND = 0.95, (0.93, 0.97)
"""What intervals claim, and how far off still counts as near."""
LEAST = 1e-5
"""Bits, or nats a token, from which a change is drawn where it is: a logarithm has no zero."""
_WRONG = "#B00020"
_DARK = "#777777"
_LEFT = 0.85
"""Left end of the axis of coverage; what is less is drawn there, with its number."""
_CLEAR, _EDGE, _OFF = "off boundaries", "at a boundary", f"less than {_LEFT:g}"
_CASES = ((_CLEAR, ROUTER, "circle"), (_EDGE, INK, "diamond-open"), (_OFF, _WRONG, "triangle-left"))
_LOOKS: dict[VerdictWord, tuple[str, str]] = {
    "routing": (ROUTER, "circle"),
    "specialist": (SPECIALIST, "square"),
    "both": ("#8A5FBF", "diamond"),
    "neither": (GREY, "cross"),
    "inconclusive": (INK, "x"),
}
"""Colour and symbol of what is true of a pair."""
METRICS = {
    "auroc": "AUROC",
    "top": "best is planted",
    "iou": "IoU",
    "decoys": "decoys rejected",
    "both": "both readers",
    "seconds": "seconds",
}
"""Numbers of a method, and how they are called everywhere."""


def confusion(halves: Sequence[Verdicts]) -> Figure:
    """Truth by verdict, counts of pairs off near misses, a panel a half; the right ones are outlined.

    Colours are shares of a row; a row without pairs has dashes. Counts have no intervals.
    """
    titles = [f"<b>{sums.half} half</b>: {_pairs(sums.pairs)}" for sums in halves]
    margin = {"l": 130, "t": 92, "b": 20}
    figure, panes = panels((1, len(halves)), titles, 370, margin, horizontal_spacing=0.14)
    figure.update_layout(showlegend=False)
    # ticks at the top stand between the panel and its title
    figure.update_annotations(yshift=32)
    for panel, sums in zip(panes, halves, strict=False):
        heat(panel, [_confused(sums, truth) for truth in WORDS], 15, xgap=3, ygap=3, showscale=False, **scale(0, 1))
        for place in range(len(WORDS)):
            outline(panel, place, place, (0.48, 0.47), 1.5)
        across(panel, WORDS, tickfont={"size": 12}, tickangle=0, side="top", zeroline=False)
        down = {"range": [len(WORDS) - 0.5, -0.5], "showticklabels": True}
        row_axis(panel, WORDS, title_text="true" if panel.first else None, **down)
    return figure


def _confused(sums: Verdicts, truth: VerdictWord) -> list[HeatCell]:
    """A row of the matrix: how often each verdict was given where this one is true."""
    counts = [sums.confusion.get(truth, {}).get(said, 0) for said in WORDS]
    total = sum(counts)
    return [
        HeatCell(n / max(total, 1), str(n) if total else DASH, f"true: {truth}, said: {said}<br>{n} of {total}")
        for said, n in zip(WORDS, counts, strict=True)
    ]


def _pairs(number: int) -> str:
    return "no pairs yet" if not number else "1 pair" if number == 1 else f"{number} pairs"


# ---------------------------------------------------------------------------------------------------------------
# shares


class _Against(NamedTuple):
    """One panel of true against measured numbers: which pairs, thresholds, and truths too near to one to count."""

    unit: str
    pairs: Sequence[Scored]
    lines: Sequence[float]
    near: Sequence[tuple[float, float]]


def shares(record: ScoreRecord) -> Figure:
    """The true routing share against the measured one, what moved in bits, and the text in nats a token.

    A point a pair, with its interval over questions. Open symbols are pairs of the open half; rings are wrong verdicts.
    Lines are thresholds; shaded truths are near misses.
    """
    titles = ["routing share", "what moved", "text"]
    figure, panes = panels((1, 3), titles, 500, {"t": 96}, horizontal_spacing=0.08)
    figure.update_layout(legend={"itemsizing": "constant"})
    told = [each for each in record.pairs if not untold(each)]
    wrong = {each.pair for each in record.mistakes if each.instrument == "behavioural"}
    found = [end for each in told for end in (each.true_moved, each.moved.high, each.true_text, each.text.high)]
    most = max([0.1, *(end for end in found if end is not None)])
    for column, (panel, of) in enumerate(zip(panes, _against(told, record.thresholds), strict=True), start=1):
        both = [0.0, 1.0] if panel.first else [LEAST, most]
        alike = {"mode": "lines", "line": {"color": "#BBBBBB", "width": 1}, "showlegend": False}
        points(panel, both, both, None, **alike)
        for word in _LOOKS:
            _true(panel, [each for each in of.pairs if each.truth == word], word)
        ringed = [each for each in of.pairs if each.pair in wrong and column < 3]  # text is no part of it
        _rings(panel, [_true_and_measured(each, column) for each in ringed])
        for near in of.near:
            shade(panel, near, "#EDE3C8")
        for at in of.lines:
            rule(panel, x=at, below=True, color=_DARK, width=1.2, dash="dash")
            rule(panel, y=at, below=True, color=_DARK, width=1.2, dash="dash")
        figure.update_xaxes(title_text=f"true ({of.unit})", zeroline=False, **panel.at)
        title = f"measured ({of.unit})" if column != 2 else None
        figure.update_yaxes(title_text=title, zeroline=False, **panel.at)
    for word, (colour, symbol) in _LOOKS.items():  # a legend's symbol is that of the first point, open or not
        entry(figure, f"true: {word}", marker={"color": colour, "symbol": symbol, "size": 9})
    for axes in (figure.update_xaxes, figure.update_yaxes):
        axes(range=[-0.03, 1.03], tickvals=[0, 0.1, 0.25, 0.5, 0.75, 0.9, 1], row=1, col=1)
        for column in (2, 3):
            axes(**_decades(LEAST, most), row=1, col=column)
    return figure


def _against(told: Sequence[Scored], thresholds: Thresholds) -> list[_Against]:
    from mixturelens.lab.proving.pairs import NEAR, NEAR_LEAST

    t = thresholds
    shared = [each for each in told if each.true_share is not None and each.truth != "neither"]
    near = [(at - NEAR, at + NEAR) for at in (t.specialist, t.routing)]
    return [
        _Against("share", shared, (t.specialist, t.routing), near),
        _Against("bits", told, (t.bits,), [(t.bits - NEAR_LEAST, t.bits + NEAR_LEAST)]),
        _Against("nats a token", told, (t.text,), []),
    ]


def _true(panel: Panel, pairs: Sequence[Scored], word: VerdictWord) -> None:
    """Pairs of which this is true."""
    if not pairs:
        return
    colour, symbol = _LOOKS[word]
    marks = [Mark(*_true_and_measured(each, panel.column), _hover(each)) for each in pairs]
    symbols = [symbol + ("-open" if each.half == "open" else "") for each in pairs]
    marker = {"color": colour, "symbol": symbols, "size": 9, "line": {"width": 1.5, "color": colour}}
    look: dict[str, Any] = {"marker": marker, "showlegend": False, "whisker": (1.2, 3, colour)}
    columns(panel, marks, **look)


def _rings(panel: Panel, found: Sequence[tuple[float | None, Interval]]) -> None:
    """Around wrong verdicts."""
    marker = {"symbol": "circle-open", "size": 19, "color": _WRONG, "line": {"width": 2}}
    look = {"marker": marker, "legendrank": 2000, "showlegend": panel.column == 2 and bool(found)}
    points(panel, [x for x, _ in found], [y.value for _, y in found], None, name="wrong verdict", **look)


def untold(pair: Scored) -> bool:
    """Whether there is no exact number to measure: policies that announce nothing leave the split to a model."""
    return pair.announced == "none"


def _decades(low: float, high: float) -> dict[str, Any]:
    """A logarithmic axis with every power of ten written at the size of other ticks."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    text = [f"{10.0**power:g}" if power > -3 else f"10<sup>−{-power}</sup>" for power in powers]
    ends = [math.log10(low) - 0.2, math.log10(high) + 0.2]
    return {"type": "log", "tickvals": [10.0**power for power in powers], "ticktext": text, "range": ends}


def _true_and_measured(pair: Scored, column: int | None) -> tuple[float | None, Interval]:
    """(true, measured) routing share; or what moved, or the text, from LEAST on."""
    if column == 1:
        return pair.true_share, pair.share
    true, found = (pair.true_moved, pair.moved) if column == 2 else (pair.true_text, pair.text)
    value, low, high = (None if end is None else max(end, LEAST) for end in (found.value, found.low, found.high))
    return max(true, LEAST), Interval(value=value, low=low, high=high)


def _hover(pair: Scored) -> str:
    return "<br>".join(
        (
            f"<b>{label(pair.pair, 60)}</b> ({pair.half} half{', near miss' if pair.near else ''})",
            f"true: {pair.truth}, said: {pair.verdict}, mechanism: {pair.mechanism or DASH}",
            f"routing share {number(pair.true_share)}, measured {number(pair.share)}",
            f"moved {number(pair.true_moved, 4)} bits, measured {number(pair.moved, 4)}",
            f"text {number(pair.true_text, 4)} nats a token, measured {number(pair.text, 4)}",
        )
    )


# ---------------------------------------------------------------------------------------------------------------
# coverage


def coverage(found: Sequence[Coverage]) -> Figure:
    """How often 95% intervals hold the truth, a share of resampled suites: a row a pair, a panel a quantity.

    Whiskers are binomial (Wilson); shaded, 0.93 to 0.97. Open diamonds lie at a boundary, where no bootstrap can be
    expected to hold. What lies left of the axis points there, with its number, in bold if not at a boundary.
    """
    names, quantities = (list(dict.fromkeys(getattr(each, key) for each in found)) for key in ("pair", "quantity"))
    titles = [label(quantity.replace("_", " ")) for quantity in quantities]
    spacing = {"shared_yaxes": True, "horizontal_spacing": 0.012}
    height = 30 * max(len(names), 1) + 140
    figure, panes = panels((1, len(quantities)), titles, height, {"l": 275, "t": 84}, **spacing)
    for panel, quantity in zip(panes, quantities, strict=False):
        for name, colour, symbol in _CASES:
            drawn = [each for each in found if each.quantity == quantity and _case(each) == name]
            marker = {"color": colour, "symbol": symbol, "size": 9}
            _held(panel, drawn, names, name == _OFF, marker)
        shade(panel, BAND, "#DCEFEA")
        rule(panel, x=NOMINAL, below=True, color=_DARK)
    for name, colour, symbol in _CASES:
        entry(figure, name, marker={"color": colour, "symbol": symbol, "size": 9})
    figure.update_xaxes(range=[_LEFT - 0.012, 1.012], tickvals=[0.9, 0.95, 1], tickfont={"size": 11}, zeroline=False)
    look = {"tickfont": {"size": 12}, "range": [len(names) - 0.4, -0.6], "zeroline": False}
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=[label(name, 40) for name in names], **look)
    return figure


def _held(panel: Panel, drawn: Sequence[Coverage], rows: Sequence[str], off: bool, marker: dict[str, Any]) -> None:
    """How often the truth was held; without whiskers where that is `off` the axis."""
    from mixturelens.lab.proving.sums import wilson

    marks = []
    for each in drawn:
        value = wilson(round(each.held * each.suites), each.suites)
        said = (
            f"<b>{label(each.pair, 60)}</b>, {each.quantity}: {number(each.truth, 4)}<br>{each.suites} suites: "
            f"held by {number(value)}<br>intervals above {number(each.above)}, below {number(each.below)}, "
            f"mean width {number(each.width, 4)}"
        )
        marks.append(Mark(rows.index(each.pair), Interval(value=_LEFT) if off else value, said))
    shown = [(number(each.held, 2), each.boundary) for each in drawn]
    text = ["" if not off else held if boundary else f"<b>{held}</b>" for held, boundary in shown]
    look = {"mode": "markers+text", "text": text, "textposition": "middle right", "marker": marker, "showlegend": False}
    dots(panel, marks, whisker=(1.5, 3, None), **look)


def _case(each: Coverage) -> str:
    return _OFF if each.held < _LEFT else _EDGE if each.boundary else _CLEAR


# ---------------------------------------------------------------------------------------------------------------
# methods


def methods(found: Sequence[MethodScore]) -> Figure:
    """How well methods find planted addresses: a row of panels a contrast, a panel a number (shares, and seconds).

    Whiskers are the record's intervals over organisms. Dashed is chance; open symbols are broken on purpose; a dash
    stands where there was nothing to measure.
    """
    from mixturelens.lab.proving.localise import RANDOM

    contrasts = list(dict.fromkeys(each.contrast for each in found))
    rows = {kind: [each for each in found if each.contrast == kind and each.method != RANDOM] for kind in contrasts}
    chance = {each.contrast: each for each in found if each.method == RANDOM}
    heights = [24 * len(scores) + 12 for scores in rows.values()]
    inner = sum(heights) + 92 * max(len(rows) - 1, 0)
    spacing = {"horizontal_spacing": 0.014, "vertical_spacing": 92 / inner if len(rows) > 1 else 0}
    titles = [*METRICS.values()] * max(len(rows), 1)
    size, margin = (len(rows), len(METRICS)), {"l": 205, "t": 40, "b": 36}
    figure, _ = panels(size, titles, inner + 76, margin, row_heights=heights or None, **spacing)
    figure.update_layout(showlegend=False)
    seconds = [each.seconds for each in found if each.seconds > 0]
    for i, (kind, scores) in enumerate(rows.items(), start=1):
        if not scores:
            continue
        for j, name in enumerate(METRICS, start=1):
            panel = Panel(figure, i, j)
            _scores(panel, scores, name, chance.get(kind))
            if name == "seconds":
                figure.update_xaxes(**_decades(min(seconds, default=1), max(seconds, default=10)), **panel.at)
            else:
                figure.update_xaxes(range=[-0.06, 1.06], tickvals=[0, 0.5, 1], **panel.at)
            look = {"range": [len(scores) - 0.5, -0.5], "showgrid": None}
            row_axis(panel, [label(each.method, 32) for each in scores], **look)
        title = {"x": -0.01, "xref": "x domain", "xanchor": "right", "y": 1, "yref": "y domain", "yanchor": "bottom"}
        figure.add_annotation(text=f"<b>{label(kind)}</b>", showarrow=False, font_size=15, row=i, col=1, **title)
    figure.update_xaxes(zeroline=False, tickfont={"size": 11})
    figure.update_yaxes(zeroline=False)
    return figure


def _scores(panel: Panel, scores: Sequence[MethodScore], name: str, chance: MethodScore | None) -> None:
    """One number of all methods, a row each, and chance."""
    from mixturelens.lab.proving.localise import BROKEN

    values = [metric(each, name) for each in scores]
    for bad, colour, symbol in ((False, NEGATIVE, "circle"), (True, POSITIVE, "circle-open")):
        marks = []
        for y, (each, value) in enumerate(zip(scores, values, strict=True)):
            if (each.method in BROKEN) == bad:
                first = f"<b>{label(each.method, 60)}</b>, {each.contrast}, {each.organisms} organisms"
                marks.append(Mark(y, value, f"{first}<br>{METRICS[name]} {number(value)}"))
        marker = {"color": colour, "symbol": symbol, "size": 9, "line": {"width": 2, "color": colour}}
        dots(panel, marks, whisker=(1.5, 4, None), marker=marker)
    none = [y for y, value in enumerate(values) if not value.measured]
    dashes = {"mode": "text", "text": [DASH] * len(none), "textfont": {"color": GREY, "size": 16}}
    points(panel, [0.5] * len(none), none, None, **dashes)
    by_chance = NOT_MEASURED if chance is None or name == "seconds" else metric(chance, name)
    if by_chance.measured:
        rule(panel, x=by_chance.value, below=True, color=GREY, width=1.5, dash="dash")


def metric(score: MethodScore, name: str) -> Interval:
    """A number of METRICS; without an interval where there is none."""
    value = getattr(score, name)
    return value if isinstance(value, Interval) else Interval(value=value)
