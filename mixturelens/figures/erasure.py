"""Reading is not use: what erasing a concept does, and the subspaces that carry it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mixturelens.figures.marks import Mark, columns, controls, dots, points, whiskers
from mixturelens.figures.panels import Panel, beside, panels, reach, row_axis, rule, single
from mixturelens.figures.style import GREY, INK, ROUTER, SYMBOLS, cue_colour
from mixturelens.figures.words import DASH, SIDES, label, number
from mixturelens.types import NOT_MEASURED, PER_HEAD, Interval, Side, Site

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.probing.record import ErasedSite, Erasure, ProbingRecord, Subspace

_CONCEPTS = {"cue": "cue", "selector": "selector (hint)"}
_KINDS = (("residual stream", "#5B7A99", "circle"), ("heads", "#8A5FBF", "square"), ("MLPs", INK, "triangle-up"))


def erasure(record: ProbingRecord, cues: Sequence[str]) -> Figure:
    """Left: every site of R by how well the cue reads there (AUROC) and how much of the behaviour hangs on it, a share.
    Right: P(answer given policy) as it is, and with the cue erased. `cues`: all of the suite, for their colours.

    Whiskers are the record's intervals over questions; grey, random directions of equal rank.
    """
    chosen = [(name, one) for name, one in (("used", record.used), ("unused", record.unused)) if one is not None]
    titles = ["<b>Reading is not use</b>: erasing the cue in R", "<b>What the policy does</b> in R"]
    size, margin = (1, 2 if chosen else 1), {"l": 74, "r": 20, "t": 116, "b": 56}
    more = {"horizontal_spacing": 0.26, "column_widths": [0.58, 0.42][: size[1]]}
    figure, (panel, *other) = panels(size, titles[: size[1]], 460, margin, **more)
    _scan(panel, record)
    for lift, (name, one) in enumerate(chosen):
        _erased_point(panel, name, one, lift)
    figure.update_xaxes(title_text="readable: AUROC of the cue", range=[0.42, 1.04], **panel.at)
    used = [remaining(each.left) for each in (*record.erased, *(one for _, one in chosen))]
    low, high = reach(used, (0.0, 1.0), 0, (-1.0, 2.0))
    title = "used: share of the difference<br>between cues that erasing removes"
    room = [low - 0.12 * (high - low), high + 0.14 * (high - low)]
    figure.update_yaxes(title_text=title, range=room, **panel.at)
    rule(panel, y=0, dash="dot")
    rule(panel, y=1, dash="dot")
    if chosen:
        _behaviour(other[0], chosen, cues)
    return figure


def _scan(panel: Panel, record: ProbingRecord) -> None:
    """All sites, and random directions of equal rank at each."""
    sites = [each for each in record.erased if each.readable.measured and each.left.measured]
    random = [(each, value) for each in sites for value in each.random]
    points(
        panel,
        [each.readable.value for each, _ in random],
        [1 - value for _, value in random],
        [f"{label(str(each.site), 60)}<br>a random direction: used {number(1 - value)}" for each, value in random],
        marker={"color": GREY, "size": 5, "opacity": 0.5},
        name="random directions",
    )
    for name, colour, symbol in _KINDS:
        found = [each for each in sites if _kind(each.site) == name]
        if not found:
            continue
        marker = {
            "color": colour,
            "symbol": symbol,
            "size": 7,
            "opacity": 0.75,
            "line": {"width": 1.5, "color": colour},
        }
        across = {"error_x": whiskers([each.readable for each in found], 1, 0, colour)}
        marks = [
            Mark(each.readable.value, remaining(each.left), f"{label(str(each.site), 60)}<br>{_facts(each)}")
            for each in found
        ]
        columns(panel, marks, whisker=(1, 0, colour), marker=marker, name=name, **across)


def _facts(of: ErasedSite | Erasure) -> str:
    """What can be read there, what is used of it, and whether it was erased."""
    used = remaining(of.left)
    return f"AUROC {number(of.readable)}<br>used {number(used)}<br>of the cue left (check) {number(of.gap)}"


def _kind(site: Site) -> str:
    if site.component.startswith("resid"):
        return "residual stream"
    return "heads" if site.component in PER_HEAD else "MLPs"


def _erased_point(panel: Panel, name: str, one: Erasure, lift: int) -> None:
    """The site measured in full: its name beside a diamond, and its own random directions. `lift`: over other names."""
    used = remaining(one.left)
    title, colour = ("where the cue reader reads", ROUTER) if name == "used" else ("readable, unused", "#FFFFFF")
    marker = {"color": colour, "symbol": "diamond", "size": 13, "line": {"color": INK, "width": 1.5}}
    random = f"random directions: {_span([1 - value for value in one.random])}"
    hover = f"{title}: {label(str(one.site), 60)}<br>{_facts(one)}<br>{random}"
    columns(panel, [Mark(one.readable.value, used, hover)], marker=marker, name=title)
    if used.value is not None and one.readable.value is not None:
        text = f"{title}:<br><b>{label(str(one.site), 40)}</b>"
        # away from the points, most of which are at the right edge
        away = {"ax": -40, "ay": (-64 - 44 * lift) if used.value < 0.5 else (64 + 44 * lift)}
        look = {"xanchor": "right", "align": "right", "bgcolor": "rgba(255,255,255,0.85)", "font": {"size": 12}}
        arrow = {"arrowhead": 0, "arrowwidth": 1, "arrowcolor": INK}
        panel.figure.add_annotation(text=text, x=one.readable.value, y=used.value, **away, **look, **arrow, **panel.at)


def _behaviour(panel: Panel, chosen: Sequence[tuple[str, Erasure]], cues: Sequence[str]) -> None:
    """P(answer given policy) under each cue: as it is, and with the cue erased at the used and at the unused site."""
    first = chosen[0][1]
    rows = [("as it is", first.plain, "")]
    for name, one in chosen:
        check = {True: "cue erased", False: "cue not erased", None: "cue erased? cannot say"}[one.holds]
        facts = f"<br>{check}: {number(one.gap, 2)}<br>left {number(one.left, 2)}<br>random {_span(one.random)}"
        rows.append((f"erased where {name}:<br>{label(str(one.site), 24)}", one.erased, facts))
    for i, cue in enumerate(cues):
        lift, said = 0.16 * (i - (len(cues) - 1) / 2), f"cue {label(cue)}: P(answer given {label(first.policy)})"
        marks = []
        for y, (name, found, facts) in enumerate(rows):
            value = found.get(cue, NOT_MEASURED)
            marks.append(Mark(y + lift, value, f"{name}<br>{said} {number(value)}{facts}"))
        marker = {"color": cue_colour(cue, cues), "symbol": SYMBOLS[i % len(SYMBOLS)], "size": 11}
        dots(panel, marks, whisker=(2, 5, None), marker=marker, name=f"cue {label(cue)}")
    look = {"range": [-0.05, 1.05], "tickvals": [0, 0.5, 1], **panel.at}
    panel.figure.update_xaxes(title_text=f"P(answer given policy {label(first.policy, 16)})", **look)
    row_axis(panel, [name + facts for name, _, facts in rows], showticklabels=True)


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
    """Interchange accuracy of each subspace on S and on R, beside random subspaces and those of shuffled labels.

    Accuracy is a share of pairs of questions, with the record's intervals over questions.
    """
    rows: list[tuple[Subspace, Side]] = [
        (of, side) for of in record.subspaces for side in SIDES if of.accuracy.get(side, NOT_MEASURED).measured
    ]
    panel = single(62 * max(len(rows), 1) + 150, {"l": 190, "r": 140, "t": 84, "b": 56})
    _nulls(panel, rows)
    _accuracies(panel, rows)
    names = []
    for of, side in rows:
        size = f"{of.dimensions} dimension{'s' if of.dimensions > 1 else ''}"
        names.append(f"<b>{_CONCEPTS[of.concept]}</b>, {SIDES[side]}<br>{label(str(of.site), 24)}, {size}")
    rule(panel, x=0.5, below=True, dash="dot")
    shown = [v for of, side in rows for v in (*of.random.get(side, ()), *of.shuffled.get(side, ()))]
    shown += [v for of, side in rows for v in (of.accuracy[side].low, of.accuracy[side].value) if v is not None]
    title = "interchange accuracy (half of the pairs ask for no change)"
    panel.figure.update_xaxes(title_text=title, range=[min([0.4, *shown]) - 0.05, 1.03])
    row_axis(panel, names)
    margins = [number(of.margin.get(side, NOT_MEASURED), 2).replace(" [", "<br>[") for of, side in rows]
    beside(panel, "<b>above both nulls</b>", margins)
    return panel.figure


def _nulls(panel: Panel, rows: Sequence[tuple[Subspace, Side]]) -> None:
    """Random subspaces above the middle of a row, those learnt on shuffled labels below it."""
    for name, which, symbol, lift in (
        ("random subspaces", "random", "circle", -0.2),
        ("learnt on shuffled labels", "shuffled", "triangle-up", 0.2),
    ):
        found = [getattr(of, which).get(side, ()) for of, side in rows]

        def hover(y: int, i: int, name: str = name, found: Sequence[Sequence[float]] = found) -> str:
            return f"{name}<br>interchange accuracy {number(found[y][i])}"

        controls(panel, found, hover, (lift, 0.3), marker={"symbol": symbol}, name=name)


def _accuracies(panel: Panel, rows: Sequence[tuple[Subspace, Side]]) -> None:
    """The model itself, the subspace by sign, and the subspace, which alone has its whiskers drawn."""
    edge = {"width": 1.5, "color": INK}
    tick = {"color": INK, "symbol": "line-ns", "size": 24, "line": {"width": 2, "color": INK}}
    open_diamond = {"color": "rgba(0,0,0,0)", "symbol": "diamond", "size": 19, "line": {**edge, "color": ROUTER}}
    diamond = {"color": ROUTER, "symbol": "diamond", "size": 13, "line": edge}
    for name, which, marker in (
        ("the model itself on the source", "plain", tick),
        ("the subspace, by sign of the log-odds", "by_sign", open_diamond),
        ("the subspace", "accuracy", diamond),
    ):
        values = [getattr(of, which).get(side, NOT_MEASURED) for of, side in rows]
        hover = [
            f"{name}<br>{number(value)}, {of.pairs} pairs of {of.questions} questions"
            for (of, _), value in zip(rows, values, strict=True)
        ]
        error: dict[str, Any] = whiskers(values, 2, 6) if which == "accuracy" else {}
        x = [value.value for value in values]
        points(panel, x, range(len(rows)), hover, error_x=error, marker=marker, name=name)
