"""The score of the instruments: confusion matrices, shares beside true shares, coverage, and planted addresses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from mixturelens.figures.style import (
    DASH,
    GREY,
    INK,
    NEGATIVE,
    POSITIVE,
    ROUTER,
    SCALE,
    SPECIALIST,
    label,
    number,
    style,
)
from mixturelens.figures.trajectories import whiskers
from mixturelens.types import Interval, VerdictWord

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.lab.proving.coverage import Coverage
    from mixturelens.lab.proving.localise import MethodScore
    from mixturelens.lab.proving.record import Scored, ScoreRecord, Verdicts

WORDS: tuple[VerdictWord, ...] = get_args(VerdictWord)
"""In the order in which they always stand."""
NOMINAL, BAND = 0.95, (0.93, 0.97)
"""What intervals claim, and how far off still counts as near."""
LEAST = 1e-5
"""Bits, or nats a token, from which a change is drawn where it is: a logarithm has no zero."""
_WRONG = "#B00020"
_LEFT = 0.85
"""Left end of the axis of coverage; what is less is drawn there, with its number."""
_CLEAR, _EDGE, _OFF = "off boundaries", "at a boundary", f"less than {_LEFT:g}"
_CASES = ((_CLEAR, ROUTER, "circle", 9), (_EDGE, INK, "diamond-open", 9), (_OFF, _WRONG, "triangle-left", 9))
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

    Colours are shares of a row; a row without pairs has dashes.
    """
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=1,
        cols=max(len(halves), 1),
        horizontal_spacing=0.14,
        subplot_titles=[f"<b>{sums.half} half</b>: {_pairs(sums.pairs)}" for sums in halves],
    )
    style(figure, 370)
    figure.update_layout(margin={"l": 130, "t": 92, "b": 20}, showlegend=False)
    figure.update_annotations(yshift=32)  # ticks at the top stand between the panel and its title
    places = list(range(len(WORDS)))
    for column, sums in enumerate(halves, start=1):
        counts = [[sums.confusion.get(truth, {}).get(said, 0) for said in WORDS] for truth in WORDS]
        totals = [sum(row) for row in counts]
        figure.add_heatmap(
            z=[[n / max(total, 1) for n in row] for row, total in zip(counts, totals, strict=True)],
            x=places,
            y=places,
            text=[[str(n) if total else DASH for n in row] for row, total in zip(counts, totals, strict=True)],
            texttemplate="%{text}",
            textfont={"color": INK, "size": 15},
            hovertext=[
                [f"true: {truth}, said: {said}<br>{n} of {total}" for said, n in zip(WORDS, row, strict=True)]
                for truth, row, total in zip(WORDS, counts, totals, strict=True)
            ],
            hoverinfo="text",
            zmin=0,
            zmax=1,
            colorscale=[list(stop) for stop in SCALE],
            showscale=False,
            xgap=3,
            ygap=3,
            row=1,
            col=column,
        )
        for place in places:
            box = {"x0": place - 0.48, "x1": place + 0.48, "y0": place - 0.47, "y1": place + 0.47}
            figure.add_shape(type="rect", line={"color": INK, "width": 1.5}, row=1, col=column, **box)
        figure.update_xaxes(
            tickvals=places,
            ticktext=list(WORDS),
            tickfont={"size": 12},
            tickangle=0,
            side="top",
            showgrid=False,
            zeroline=False,
            range=[-0.5, len(WORDS) - 0.5],
            row=1,
            col=column,
        )
        figure.update_yaxes(
            tickvals=places,
            ticktext=list(WORDS),
            title_text="true" if column == 1 else None,
            showgrid=False,
            zeroline=False,
            range=[len(WORDS) - 0.5, -0.5],
            row=1,
            col=column,
        )
    return figure


def _pairs(number: int) -> str:
    return "no pairs yet" if not number else "1 pair" if number == 1 else f"{number} pairs"


def shares(record: ScoreRecord) -> Figure:
    """The true routing share against the measured one, likewise what moved, and the text; a point a pair, with its
    interval.

    Open symbols are pairs of the open half; rings are wrong verdicts. Lines are thresholds; shaded truths are near
    misses.
    """
    from plotly.subplots import make_subplots

    from mixturelens.lab.proving.pairs import NEAR, NEAR_LEAST

    t = record.thresholds
    titles = ["routing share", "what moved", "text"]
    figure = make_subplots(rows=1, cols=3, horizontal_spacing=0.08, subplot_titles=titles)
    style(figure, 500)
    figure.update_layout(margin={"t": 96}, hovermode="closest", legend={"itemsizing": "constant"})
    told = [each for each in record.pairs if not untold(each)]
    shared = [each for each in told if each.true_share is not None and each.truth != "neither"]
    wrong = {each.pair for each in record.mistakes if each.instrument == "behavioural"}
    ends = [end for each in told for end in (each.true_moved, each.moved.high, each.true_text, each.text.high)]
    most = max([0.1, *(end for end in ends if end is not None)])
    shares_near = [(at - NEAR, at + NEAR) for at in (t.specialist, t.routing)]
    bands = [shares_near, [(t.bits - NEAR_LEAST, t.bits + NEAR_LEAST)], []]
    lines, units = ((t.specialist, t.routing), (t.bits,), (t.text,)), ("share", "bits", "nats a token")
    line = {"color": "#777777", "width": 1.2, "dash": "dash"}
    for column, pairs in enumerate((shared, told, told), start=1):
        start, end = (0.0, 1.0) if column == 1 else (LEAST, most)
        figure.add_scatter(
            x=[start, end],
            y=[start, end],
            mode="lines",
            line={"color": "#BBBBBB", "width": 1},
            hoverinfo="skip",
            showlegend=False,
            row=1,
            col=column,
        )
        for word, (colour, symbol) in _LOOKS.items():
            drawn = [each for each in pairs if each.truth == word]
            if not drawn:
                continue
            points = [_points(each, column) for each in drawn]
            up, down = whiskers([measured for _, measured in points])
            figure.add_scatter(
                x=[true for true, _ in points],
                y=[measured.value for _, measured in points],
                error_y={"array": up, "arrayminus": down, "thickness": 1.2, "width": 3, "color": colour},
                mode="markers",
                marker={
                    "color": colour,
                    "symbol": [symbol + ("-open" if each.half == "open" else "") for each in drawn],
                    "size": 9,
                    "line": {"width": 1.5, "color": colour},
                },
                showlegend=False,
                hovertext=[_hover(each) for each in drawn],
                hoverinfo="text",
                row=1,
                col=column,
            )
        ringed = [_points(each, column) for each in pairs if each.pair in wrong and column < 3]  # text is no part of it
        figure.add_scatter(
            x=[true for true, _ in ringed],
            y=[measured.value for _, measured in ringed],
            mode="markers",
            marker={"symbol": "circle-open", "size": 19, "color": _WRONG, "line": {"width": 2}},
            name="wrong verdict",
            legendrank=2000,
            showlegend=column == 2 and bool(ringed),
            hoverinfo="skip",
            row=1,
            col=column,
        )
        for low, high in bands[column - 1]:
            figure.add_vrect(x0=low, x1=high, fillcolor="#EDE3C8", line_width=0, layer="below", row=1, col=column)  # pyright: ignore[reportArgumentType]
        for at in lines[column - 1]:
            figure.add_vline(x=at, line=line, layer="below", row=1, col=column)  # pyright: ignore[reportArgumentType]
            figure.add_hline(y=at, line=line, layer="below", row=1, col=column)  # pyright: ignore[reportArgumentType]
        unit = units[column - 1]
        figure.update_xaxes(title_text=f"true ({unit})", zeroline=False, row=1, col=column)
        figure.update_yaxes(title_text=f"measured ({unit})" if column != 2 else None, zeroline=False, row=1, col=column)
    for word, (colour, symbol) in _LOOKS.items():  # a legend's symbol is that of the first point, open or not
        figure.add_scatter(
            x=[None],
            y=[None],
            mode="markers",
            name=f"true: {word}",
            marker={"color": colour, "symbol": symbol, "size": 9},
        )
    for axes in (figure.update_xaxes, figure.update_yaxes):
        axes(range=[-0.03, 1.03], tickvals=[0, 0.1, 0.25, 0.5, 0.75, 0.9, 1], row=1, col=1)
        for column in (2, 3):
            axes(**_decades(LEAST, most), row=1, col=column)
    return figure


def untold(pair: Scored) -> bool:
    """Whether there is no exact number to measure: policies that announce nothing leave the split to a model."""
    return pair.announced == "none"


def _decades(low: float, high: float) -> dict[str, Any]:
    """A logarithmic axis with every power of ten written at the size of other ticks."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    text = [f"{10.0**power:g}" if power > -3 else f"10<sup>−{-power}</sup>" for power in powers]
    ends = [math.log10(low) - 0.2, math.log10(high) + 0.2]
    return {"type": "log", "tickvals": [10.0**power for power in powers], "ticktext": text, "range": ends}


def _points(pair: Scored, column: int) -> tuple[float | None, Interval]:
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


def coverage(found: Sequence[Coverage]) -> Figure:
    """How often 95% intervals hold the truth, over resampled suites: a row a pair, a panel a quantity.

    Whiskers are binomial (Wilson); shaded, 0.93 to 0.97. Open diamonds lie at a boundary, where no bootstrap can be
    expected to hold. What lies left of the axis points there, with its number, in bold if not at a boundary.
    """
    from plotly.subplots import make_subplots

    from mixturelens.lab.proving.score import wilson

    names, quantities = (list(dict.fromkeys(getattr(each, key) for each in found)) for key in ("pair", "quantity"))
    figure = make_subplots(
        rows=1,
        cols=max(len(quantities), 1),
        shared_yaxes=True,
        horizontal_spacing=0.012,
        subplot_titles=[label(quantity.replace("_", " ")) for quantity in quantities],
    )
    style(figure, 30 * max(len(names), 1) + 140)
    figure.update_layout(margin={"l": 275, "t": 84}, hovermode="closest")
    for column, quantity in enumerate(quantities, start=1):
        for name, colour, symbol, size in _CASES:
            drawn = [each for each in found if each.quantity == quantity and _case(each) == name]
            spread = [wilson(round(each.held * each.suites), each.suites) for each in drawn]
            off = name == _OFF
            up, down = whiskers([] if off else spread)
            figure.add_scatter(
                x=[max(each.held, _LEFT) for each in drawn],
                y=[names.index(each.pair) for each in drawn],
                error_x={"array": up, "arrayminus": down, "thickness": 1.5, "width": 3},
                mode="markers+text",
                text=[_bold(number(each.held, 2), not each.boundary) if off else "" for each in drawn],
                textposition="middle right",
                marker={"color": colour, "symbol": symbol, "size": size},
                showlegend=False,
                hovertext=[
                    f"<b>{label(each.pair, 60)}</b>, {each.quantity}: {number(each.truth, 4)}<br>{each.suites} suites: "
                    f"held by {number(value)}<br>intervals above {number(each.above)}, below {number(each.below)}, "
                    f"mean width {number(each.width, 4)}"
                    for each, value in zip(drawn, spread, strict=True)
                ],
                hoverinfo="text",
                row=1,
                col=column,
            )
        figure.add_vrect(x0=BAND[0], x1=BAND[1], fillcolor="#DCEFEA", line_width=0, layer="below", row=1, col=column)  # pyright: ignore[reportArgumentType]
        figure.add_vline(x=NOMINAL, line={"color": "#777777", "width": 1}, layer="below", row=1, col=column)  # pyright: ignore[reportArgumentType]
    for name, colour, symbol, size in _CASES:
        look = {"color": colour, "symbol": symbol, "size": size}
        figure.add_scatter(x=[None], y=[None], mode="markers", name=name, marker=look)
    figure.update_xaxes(range=[_LEFT - 0.012, 1.012], tickvals=[0.9, 0.95, 1], tickfont={"size": 11}, zeroline=False)
    figure.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=[label(name, 40) for name in names],
        tickfont={"size": 12},
        range=[len(names) - 0.4, -0.6],
        zeroline=False,
    )
    return figure


def _bold(text: str, so: bool) -> str:
    return f"<b>{text}</b>" if so else text


def _case(each: Coverage) -> str:
    return _OFF if each.held < _LEFT else _EDGE if each.boundary else _CLEAR


def methods(found: Sequence[MethodScore]) -> Figure:
    """How well methods find planted addresses: a row of panels a contrast, a panel a number.

    Dashed is chance; open symbols are broken on purpose; a dash stands where there was nothing to measure.
    """
    from plotly.subplots import make_subplots

    from mixturelens.lab.proving.localise import BROKEN, RANDOM

    contrasts = list(dict.fromkeys(each.contrast for each in found))
    rows = {kind: [each for each in found if each.contrast == kind and each.method != RANDOM] for kind in contrasts}
    chance = {each.contrast: each for each in found if each.method == RANDOM}
    heights = [24 * len(scores) + 12 for scores in rows.values()]
    gap = 92
    figure = make_subplots(
        rows=max(len(rows), 1),
        cols=len(METRICS),
        horizontal_spacing=0.014,
        vertical_spacing=gap / (sum(heights) + gap * (len(rows) - 1)) if len(rows) > 1 else 0,
        row_heights=heights or None,
        subplot_titles=[*METRICS.values()] * max(len(rows), 1),
    )
    style(figure, sum(heights) + gap * max(len(rows) - 1, 0) + 76)
    figure.update_layout(margin={"l": 205, "t": 40, "b": 36}, showlegend=False, hovermode="closest")
    ends = [each.seconds for each in found if each.seconds > 0]
    for i, (kind, scores) in enumerate(rows.items(), start=1):
        if not scores:
            continue
        for j, name in enumerate(METRICS, start=1):
            values = [metric(each, name) for each in scores]
            for bad, colour, symbol in ((False, NEGATIVE, "circle"), (True, POSITIVE, "circle-open")):
                drawn = [y for y, each in enumerate(scores) if (each.method in BROKEN) == bad]
                up, down = whiskers([values[y] for y in drawn])
                figure.add_scatter(
                    x=[values[y].value for y in drawn],
                    y=drawn,
                    error_x={"array": up, "arrayminus": down, "thickness": 1.5, "width": 4},
                    mode="markers",
                    marker={"color": colour, "symbol": symbol, "size": 9, "line": {"width": 2, "color": colour}},
                    hovertext=[
                        f"<b>{label(scores[y].method, 60)}</b>, {kind}, {scores[y].organisms} organisms<br>"
                        f"{METRICS[name]} {number(values[y])}"
                        for y in drawn
                    ],
                    hoverinfo="text",
                    row=i,
                    col=j,
                )
            none = [y for y, value in enumerate(values) if not value.measured]
            dashes = {"mode": "text", "text": [DASH] * len(none), "textfont": {"color": GREY, "size": 16}}
            figure.add_scatter(x=[0.5] * len(none), y=none, hoverinfo="skip", row=i, col=j, **dashes)
            by_chance = metric(chance[kind], name) if kind in chance and name != "seconds" else Interval()
            if by_chance.measured:
                line = {"color": GREY, "width": 1.5, "dash": "dash"}
                figure.add_vline(x=by_chance.value, line=line, layer="below", row=i, col=j)  # pyright: ignore[reportArgumentType]
            if name == "seconds":
                figure.update_xaxes(**_decades(min(ends, default=1), max(ends, default=10)), row=i, col=j)
            else:
                figure.update_xaxes(range=[-0.06, 1.06], tickvals=[0, 0.5, 1], row=i, col=j)
            figure.update_yaxes(
                tickvals=list(range(len(scores))),
                ticktext=[label(each.method, 32) for each in scores],
                tickfont={"size": 12},
                showticklabels=j == 1,
                range=[len(scores) - 0.5, -0.5],
                row=i,
                col=j,
            )
        title = {"x": -0.01, "xref": "x domain", "xanchor": "right", "y": 1, "yref": "y domain", "yanchor": "bottom"}
        figure.add_annotation(text=f"<b>{label(kind)}</b>", showarrow=False, font_size=15, row=i, col=1, **title)
    figure.update_xaxes(zeroline=False, tickfont={"size": 11})
    figure.update_yaxes(zeroline=False)
    return figure


def metric(score: MethodScore, name: str) -> Interval:
    """A number of METRICS; without an interval where there is none."""
    value = getattr(score, name)
    return value if isinstance(value, Interval) else Interval(value=value)
