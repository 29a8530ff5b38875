"""Reading is not use: what erasing a concept does, and the subspaces that carry it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mixturelens.figures.style import (
    DASH,
    GREY,
    INK,
    ROUTER,
    SIDES,
    SYMBOLS,
    cue_colour,
    jitter,
    label,
    new_figure,
    number,
    style,
)
from mixturelens.figures.trajectories import whiskers
from mixturelens.types import NOT_MEASURED, PER_HEAD, Interval, Side, Site

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.probing.record import Erasure, ProbingRecord, Subspace

_CONCEPTS = {"cue": "cue", "selector": "selector (hint)"}
_KINDS = (("residual stream", "#5B7A99", "circle"), ("heads", "#8A5FBF", "square"), ("MLPs", INK, "triangle-up"))


def erasure(record: ProbingRecord, cues: Sequence[str]) -> Figure:
    """Left: every site of R by how well the cue reads there and how much of the behaviour hangs on it.
    Right: P(answer given policy) as it is, and with the cue erased. `cues`: all of the suite, for their colours.
    """
    from plotly.subplots import make_subplots

    chosen = [(name, one) for name, one in (("used", record.used), ("unused", record.unused)) if one is not None]
    columns = 2 if chosen else 1
    figure = make_subplots(
        rows=1,
        cols=columns,
        horizontal_spacing=0.26,
        column_widths=[0.58, 0.42][:columns],
        subplot_titles=["<b>Reading is not use</b>: erasing the cue in R", "<b>What the policy does</b> in R"][
            :columns
        ],
    )
    style(figure, 460)
    figure.update_layout(margin={"l": 74, "r": 20, "t": 116, "b": 56}, hovermode="closest")
    figure.update_annotations(font_size=13)
    _scan(figure, record)
    for lift, (name, one) in enumerate(chosen):
        _erased_point(figure, name, one, lift)
    figure.update_xaxes(title_text="readable: AUROC of the cue", range=[0.42, 1.04], row=1, col=1)
    shares = [1.0, 0.0]
    for each in (*record.erased, *(one for _, one in chosen)):
        shares += [1 - value for value in (each.left.low, each.left.high, each.left.value) if value is not None]
    low, high = max(min(shares), -1.0), min(max(shares), 2.0)
    figure.update_yaxes(
        title_text="used: share of the difference<br>between cues that erasing removes",
        range=[low - 0.12 * (high - low), high + 0.14 * (high - low)],
        row=1,
        col=1,
    )
    for y in (0, 1):
        figure.add_hline(y=y, line={"color": "#999999", "width": 1, "dash": "dot"}, row=1, col=1)  # pyright: ignore[reportArgumentType]
    if chosen:
        _behaviour(figure, chosen, cues)
    return figure


def _scan(figure: Figure, record: ProbingRecord) -> None:
    """All sites, and random directions of equal rank at each."""
    sites = [each for each in record.erased if each.readable.measured and each.left.measured]
    random = [(each, value) for each in sites for value in each.random]
    figure.add_scatter(
        x=[each.readable.value for each, _ in random],
        y=[1 - value for _, value in random],
        mode="markers",
        marker={"color": GREY, "size": 5, "opacity": 0.5},
        name="random directions",
        hovertext=[f"{label(str(each.site), 60)}<br>a random direction: used {number(1 - v)}" for each, v in random],
        hoverinfo="text",
        row=1,
        col=1,
    )
    for name, colour, symbol in _KINDS:
        found = [each for each in sites if _kind(each.site) == name]
        if not found:
            continue
        used = [remaining(each.left) for each in found]
        up, down = whiskers(used)
        right, leftward = whiskers([each.readable for each in found])
        figure.add_scatter(
            x=[each.readable.value for each in found],
            y=[value.value for value in used],
            error_y={"array": up, "arrayminus": down, "thickness": 1, "width": 0, "color": colour},
            error_x={"array": right, "arrayminus": leftward, "thickness": 1, "width": 0, "color": colour},
            mode="markers",
            marker={
                "color": colour,
                "symbol": symbol,
                "size": 7,
                "opacity": 0.75,
                "line": {"width": 1.5, "color": colour},
            },
            name=name,
            hovertext=[
                f"{label(str(each.site), 60)}<br>AUROC {number(each.readable)}<br>used {number(value)}<br>"
                f"of the cue left (check) {number(each.gap)}"
                for each, value in zip(found, used, strict=True)
            ],
            hoverinfo="text",
            row=1,
            col=1,
        )


def _kind(site: Site) -> str:
    if site.component.startswith("resid"):
        return "residual stream"
    return "heads" if site.component in PER_HEAD else "MLPs"


def _erased_point(figure: Figure, name: str, one: Erasure, lift: int) -> None:
    """The site measured in full: its name beside a diamond, and its own random directions. `lift`: over other names."""
    used = remaining(one.left)
    up, down = whiskers([used])
    title = "where the cue reader reads" if name == "used" else "readable, unused"
    figure.add_scatter(
        x=[one.readable.value],
        y=[used.value],
        error_y={"array": up, "arrayminus": down, "thickness": 2, "width": 5, "color": INK},
        mode="markers",
        marker={
            "color": ROUTER if name == "used" else "#FFFFFF",
            "symbol": "diamond",
            "size": 13,
            "line": {"color": INK, "width": 1.5},
        },
        name=title,
        hovertext=[
            f"{title}: {label(str(one.site), 60)}<br>AUROC {number(one.readable)}<br>used {number(used)}<br>"
            f"of the cue left (check) {number(one.gap)}<br>"
            f"random directions: {_span([1 - value for value in one.random])}"
        ],
        hoverinfo="text",
        row=1,
        col=1,
    )
    if used.value is not None and one.readable.value is not None:
        figure.add_annotation(
            text=f"{title}:<br><b>{label(str(one.site), 40)}</b>",
            x=one.readable.value,
            y=used.value,
            # away from the points, most of which are at the right edge
            ax=-40,
            ay=(-64 - 44 * lift) if used.value < 0.5 else (64 + 44 * lift),
            xanchor="right",
            align="right",
            arrowhead=0,
            arrowwidth=1,
            arrowcolor=INK,
            bgcolor="rgba(255,255,255,0.85)",
            font={"size": 12},
            row=1,
            col=1,
        )


def _behaviour(figure: Figure, chosen: Sequence[tuple[str, Erasure]], cues: Sequence[str]) -> None:
    """P(answer given policy) under each cue: as it is, and with the cue erased at the used and at the unused site."""
    first = chosen[0][1]
    rows = [("as it is", first.plain, "")]
    for name, one in chosen:
        check = {True: "cue erased", False: "cue not erased", None: "cue erased? cannot say"}[one.holds]
        beside = f"<br>{check}: {number(one.gap, 2)}<br>left {number(one.left, 2)}<br>random {_span(one.random)}"
        rows.append((f"erased where {name}:<br>{label(str(one.site), 24)}", one.erased, beside))
    for i, cue in enumerate(cues):
        values = [found.get(cue, NOT_MEASURED) for _, found, _ in rows]
        up, down = whiskers(values)
        figure.add_scatter(
            x=[value.value for value in values],
            y=[y + 0.16 * (i - (len(cues) - 1) / 2) for y in range(len(rows))],
            error_x={"array": up, "arrayminus": down, "thickness": 2, "width": 5},
            mode="markers",
            marker={"color": cue_colour(cue, cues), "symbol": SYMBOLS[i % len(SYMBOLS)], "size": 11},
            name=f"cue {label(cue)}",
            hovertext=[
                f"{name}<br>cue {label(cue)}: P(answer given {label(first.policy)}) {number(value)}{beside}"
                for (name, _, beside), value in zip(rows, values, strict=True)
            ],
            hoverinfo="text",
            row=1,
            col=2,
        )
    figure.update_xaxes(
        title_text=f"P(answer given policy {label(first.policy, 16)})",
        range=[-0.05, 1.05],
        tickvals=[0, 0.5, 1],
        row=1,
        col=2,
    )
    figure.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=[name + beside for name, _, beside in rows],
        tickfont={"size": 12},
        range=[len(rows) - 0.45, -0.55],
        showgrid=False,
        zeroline=False,
        row=1,
        col=2,
    )


def remaining(value: Interval) -> Interval:
    """What a share leaves: 1 less it."""
    if value.value is None:
        return NOT_MEASURED
    low = None if value.high is None else 1 - value.high
    return Interval(value=1 - value.value, low=low, high=None if value.low is None else 1 - value.low)


def _span(values: Sequence[float]) -> str:
    """The least and the greatest of some numbers."""
    return f"{number(min(values), 2)} to {number(max(values), 2)}" if values else DASH


# ---------------------------------------------------------------------------------------------------------------
# subspaces


def subspaces(record: ProbingRecord) -> Figure:
    """Interchange accuracy of each subspace on S and on R, beside random subspaces and those of shuffled labels."""
    rows: list[tuple[Subspace, Side]] = [
        (of, side) for of in record.subspaces for side in SIDES if of.accuracy.get(side, NOT_MEASURED).measured
    ]
    figure = new_figure(62 * max(len(rows), 1) + 150)
    figure.update_layout(margin={"l": 190, "r": 140, "t": 84, "b": 56}, hovermode="closest")
    for name, which, symbol, lift in (
        ("random subspaces", "random", "circle", -0.2),
        ("learnt on shuffled labels", "shuffled", "triangle-up", 0.2),
    ):
        points = [
            (y, i, value)
            for y, (of, side) in enumerate(rows)
            for i, value in enumerate(getattr(of, which).get(side, ()))
        ]
        figure.add_scatter(
            x=[value for _, _, value in points],
            y=[y + lift + 0.3 * jitter(i) for y, i, _ in points],
            mode="markers",
            marker={"color": GREY, "size": 7, "opacity": 0.7, "symbol": symbol},
            name=name,
            hovertext=[f"{name}<br>interchange accuracy {number(value)}" for _, _, value in points],
            hoverinfo="text",
        )
    for name, which, marker in (
        (
            "the model itself on the source",
            "plain",
            {"color": INK, "symbol": "line-ns", "size": 24, "line": {"width": 2, "color": INK}},
        ),
        (
            "the subspace, by sign of the log-odds",
            "by_sign",
            {"color": "rgba(0,0,0,0)", "symbol": "diamond", "size": 19, "line": {"width": 1.5, "color": ROUTER}},
        ),
        (
            "the subspace",
            "accuracy",
            {"color": ROUTER, "symbol": "diamond", "size": 13, "line": {"width": 1.5, "color": INK}},
        ),
    ):
        values = [getattr(of, which).get(side, NOT_MEASURED) for of, side in rows]
        up, down = whiskers(values)
        figure.add_scatter(
            x=[value.value for value in values],
            y=list(range(len(rows))),
            error_x={
                "array": up,
                "arrayminus": down,
                "thickness": 2,
                "width": 6,
                "color": INK,
                "visible": which == "accuracy",
            },
            mode="markers",
            marker=marker,
            name=name,
            hovertext=[
                f"{name}<br>{number(value)}, {of.pairs} pairs of {of.questions} questions"
                for (of, _), value in zip(rows, values, strict=True)
            ],
            hoverinfo="text",
        )
    names = []
    for of, side in rows:
        size = f"{of.dimensions} dimension{'s' if of.dimensions > 1 else ''}"
        names.append(f"<b>{_CONCEPTS[of.concept]}</b>, {SIDES[side]}<br>{label(str(of.site), 24)}, {size}")
    figure.add_vline(x=0.5, line={"color": "#999999", "width": 1, "dash": "dot"}, layer="below")  # pyright: ignore[reportArgumentType]
    shown = [v for of, side in rows for v in (*of.random.get(side, ()), *of.shuffled.get(side, ()))]
    shown += [v for of, side in rows for v in (of.accuracy[side].low, of.accuracy[side].value) if v is not None]
    least = min([0.4, *shown])
    figure.update_xaxes(
        title_text="interchange accuracy (half of the pairs ask for no change)", range=[least - 0.05, 1.03]
    )
    figure.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=names,
        tickfont={"size": 12},
        range=[len(rows) - 0.45, -0.55],
        showgrid=False,
        zeroline=False,
    )
    margins = [number(of.margin.get(side, NOT_MEASURED), 2).replace(" [", "<br>[") for of, side in rows]
    for y, text in enumerate(["<b>above both nulls</b>", *margins], start=-1):
        at = {"y": 1, "yref": "paper", "yanchor": "bottom"} if y < 0 else {"y": y, "yref": "y", "yanchor": "middle"}
        figure.add_annotation(
            text=text, x=1.015, xref="paper", xanchor="left", align="left", showarrow=False, font={"size": 12}, **at
        )
    return figure
