"""What RL changed of S's features, by the terms of the split; and latents that one of two checkpoints has alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mixturelens.figures.marks import Mark, bars, controls, dots, points
from mixturelens.figures.panels import (
    Panel,
    at_edge,
    beside,
    between,
    ends,
    heading,
    number_axis,
    panels,
    row_axis,
    rule,
    widest,
)
from mixturelens.figures.style import INK, TERMS, UNITS
from mixturelens.figures.words import DASH, SIDES, label, number
from mixturelens.types import NOT_MEASURED, Interval, Side

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.features.record import CrosscoderFit, SiteChange, Terms

_TERMS: Mapping[Literal["routing", "conditioning", "skill"], str] = {
    "routing": "which policy",
    "conditioning": "what it does",
    "skill": "how well",
}


class _TermLine(NamedTuple):
    """A row of terms; with `random` alone, a strip of grey points instead of a mark."""

    name: str
    terms: Terms | None = None
    random: tuple[Terms, ...] = ()

    def of(self, term: str) -> Interval:
        return NOT_MEASURED if self.terms is None else getattr(self.terms, term)


def feature_change(change: SiteChange) -> Figure:
    """R's change of features put into S, in bits of each term on one scale: the whole site, all features, single ones.

    Whiskers are the record's intervals over questions. Grey: as many random other features of like strength at once, to
    be held against the row above it.
    """
    number_of = len(change.features)
    lines = [
        _TermLine("<b>R's activation</b>, whole", change.whole),
        _TermLine("<b>all features</b>", change.every),
        _TermLine(f"<b>these {number_of}</b> together", change.together),
    ]
    if change.random:
        lines.append(_TermLine(f"{number_of} random others", random=change.random))
    single = len(lines)
    lines += [_TermLine(f"feature {each.index}, moved {number(each.moved, 2)}", each.terms) for each in change.features]
    titles = [f"<b>{term}</b>: {words}" for term, words in _TERMS.items()]
    margin = {"l": 186, "r": 16, "t": 62, "b": 54}
    height = 28 * len(lines) + 118
    figure, panes = panels((1, len(titles)), titles, height, margin, at_left=True, horizontal_spacing=0.02)
    figure.update_layout(showlegend=False)
    heading(figure, _site(change, "R's change put into S"))
    _terms(panes, lines, "bits from S", bar=True)
    if single < len(lines):
        rule(Panel(figure), y=single - 0.5)
    return figure


def firing(change: SiteChange) -> Figure:
    """The features that moved most, in S across and in R up: how often they fire, and how strongly. Dotted: alike.

    Shares of tokens, and mean activations where it fires; the record has no intervals of them.
    """
    titles = ["<b>how often</b>: share of tokens", "<b>how strongly</b>: mean activation where it fires"]
    margin, more = {"l": 74, "r": 24, "t": 62, "b": 56}, {"horizontal_spacing": 0.08}
    figure, panes = panels((1, 2), titles, 380, margin, at_left=True, **more)
    figure.update_layout(showlegend=False)
    heading(figure, _site(change, "the features that moved most"))
    for panel, field in zip(panes, ("rate", "strength"), strict=True):
        found = [(each.index, getattr(each, field)) for each in change.features]
        pairs = [(index, of["before"], of["after"]) for index, of in found if {"before", "after"} <= set(of)]
        high = 1.12 * max([1e-3, *(value for _, x, y in pairs for value in (x, y))])
        dotted = {"color": "#999999", "width": 1, "dash": "dot"}
        points(panel, [0, high], [0, high], None, mode="lines", line=dotted, name="alike")
        marker = {"color": UNITS["feature"], "size": 9, "line": {"color": INK, "width": 1}}
        places = _sides([(x / high, y / high) for _, x, y in pairs])
        look: dict[str, Any] = {"mode": "markers+text", "textposition": places, "textfont": {"size": 12}}
        look |= {"text": [str(index) for index, *_ in pairs], "marker": marker, "cliponaxis": False, "name": field}
        hover = [f"feature {index}<br>S {number(x)}<br>R {number(y)}" for index, x, y in pairs]
        points(panel, [x for _, x, _ in pairs], [y for *_, y in pairs], hover, **look)
        axis = {"range": [-0.03 * high, high], "nticks": 6, **panel.at}
        figure.update_xaxes(title_text=SIDES["before"], **axis)
        figure.update_yaxes(title_text=SIDES["after"] if panel.first else None, showticklabels=True, **axis)
    return figure


def _site(change: SiteChange, what: str) -> str:
    return f"<b>{label(str(change.site), 40)}</b>: {what}, {change.questions} questions"


def _sides(found: Sequence[tuple[float, float]]) -> list[str]:
    """Where each point's name stands: away from a neighbour that has one at that side."""
    taken: list[tuple[float, float]] = []
    names = []
    offsets = {
        "middle right": (0.03, 0.0),
        "middle left": (-0.03, 0.0),
        "top center": (0.0, 0.05),
        "bottom center": (0.0, -0.05),
    }
    for x, y in found:
        free = [
            name
            for name, (dx, dy) in offsets.items()
            if all(abs(x + dx - a) > 0.05 or abs(y + dy - b) > 0.05 for a, b in taken)
        ]
        name = free[0] if free else "middle right"
        taken.append((x + offsets[name][0], y + offsets[name][1]))
        names.append(name)
    return names


# ---------------------------------------------------------------------------------------------------------------
# crosscoders

_LOOKS: Mapping[Side | Literal["false"], tuple[str, str]] = {
    "after": ("R alone", UNITS["feature"]),
    "before": ("S alone", "white"),
    "false": ("by norm alone, false", "#C9C9C9"),
}


def crosscoder(records: Mapping[str, Sequence[CrosscoderFit]]) -> Figure:
    """Latents of crosscoders that look like those of one checkpoint, and R without those of R; a row a fit.

    Left: counts; false are those exclusive by norm that latent scaling takes back. Right: bits from R with the record's
    intervals, on one scale, without all latents of R alone (diamonds) and without as many matched shared ones (grey).
    `records`: pairs by name.
    """
    fits = [(name, fit) for name, found in records.items() for fit in found]
    titles = ["<b>latents</b> of one checkpoint", *(f"<b>{term}</b> without" for term in _TERMS)]
    names = [
        f"<b>{label(name, 26)}</b><br>{label(str(fit.site), 24)}, seed {fit.seed}: {fit.shared} shared"
        for name, fit in fits
    ]
    margin = {"l": 24 + round(6.2 * (widest(names) if names else 10)), "r": 156, "t": 84, "b": 54}
    spacing = {"horizontal_spacing": 0.02, "column_widths": [1.5, 1.0, 1.0, 1.0]}
    height = 46 * max(len(fits), 1) + 150
    figure, (first, *others) = panels((1, 4), titles, height, margin, at_left=True, **spacing)
    figure.update_layout(barmode="stack", legend_traceorder="normal")
    _counts(first, fits)
    lines = [_TermLine(name, fit.without, fit.random) for name, (_, fit) in zip(names, fits, strict=True)]
    _terms(others, lines, "bits from R", bar=False)
    row_axis(first, names)
    between(Panel(figure), [name for name, _ in fits], color="#BBBBBB")
    causal = [_causal(fit) for _, fit in fits]
    beside(others[-1], "<b>causal</b> of those<br>of R alone tested", causal)
    return figure


def _counts(panel: Panel, fits: Sequence[tuple[str, CrosscoderFit]]) -> None:
    """Stacked bars of latents: of R alone, of S alone, and those that are falsely so."""
    counts = [{"after": 0, "before": 0, **fit.exclusive, "false": fit.false} for _, fit in fits]
    for kind, (words, colour) in _LOOKS.items():
        found = [count[kind] for count in counts]
        marks = []
        for y, ((name, fit), count) in enumerate(zip(fits, found, strict=True)):
            first = f"{label(name, 40)}, seed {fit.seed}<br>{words}: {count}, shared: {fit.shared}<br>"
            explained = [number(fit.explained.get(side)) for side in SIDES]
            last = "dead {}, explained of S {}, of R {}".format(number(fit.dead), *explained)
            marks.append(Mark(y, Interval(value=count), first + last))
        inside = {"textposition": "inside", "insidetextanchor": "middle", "textangle": 0, "constraintext": "none"}
        inside |= {"text": [str(count) if count else "" for count in found], "error_x": None}
        inside["textfont"] = {"size": 12, "color": "white" if kind == "after" else INK}
        marker = {"color": colour, "line": {"color": INK, "width": 1}}
        bars(panel, marks, width=0.5, marker=marker, name=words, **inside)
    for y, count in enumerate(counts):
        if not any(count.values()):
            none = {"x": 0, "xanchor": "left", "xshift": 6, "y": y, "showarrow": False, "font_size": 12}
            panel.figure.add_annotation(text="none", **none, **panel.at)
    most = max((sum(count[kind] for kind in _LOOKS) for count in counts), default=0)
    panel.figure.update_xaxes(range=[0, 1.08 * max(most, 4)], nticks=5, title_text="latents", **panel.at)


def _causal(fit: CrosscoderFit) -> str:
    words = {"selector": "routing", "cue_reader": "conditioning", "skill": "skill"}
    if not fit.tested:
        return DASH
    named = [f"{count} {words[part]}" for part, count in fit.causal_terms.items() if count]
    return f"{fit.causal} of {fit.tested}" + (f"<br>{', '.join(named)}" if named else "")


# ---------------------------------------------------------------------------------------------------------------
# parts of both


def _terms(shown: Sequence[Panel], lines: Sequence[_TermLine], unit: str, bar: bool) -> None:
    """A panel a term, all on one scale: what is longer is more. Bars, or diamonds; numbers at the right edge."""
    every = [terms for line in lines for terms in (*((line.terms,) if line.terms else ()), *line.random)]
    found = ends(getattr(terms, term) for terms in every for term in _TERMS)
    low, high = min([0.0, *found]), max([0.01, *found])
    before, after = (0.04, 0.45) if bar else (0.1, 0.8)  # with room for the numbers
    span = (low - before * (high - low), high + after * (high - low))
    for panel, term in zip(shown, _TERMS, strict=True):
        _random(panel, lines, term, legend=panel is shown[0])
        marks = [
            Mark(y, value := line.of(term), f"{line.name}<br>{term}: {number(value)} bits")
            for y, line in enumerate(lines)
        ]
        marker: dict[str, Any] = {"color": TERMS[term]}
        if bar:
            bars(panel, marks, width=0.6, marker=marker, name=term, showlegend=False)
        else:
            marker |= {"symbol": "diamond", "size": 12, "line": {"color": INK, "width": 1}}
            look: dict[str, Any] = {"marker": marker, "name": term, "showlegend": False}
            dots(panel, marks, whisker=(1.5, 4), **look)
        for y, line in enumerate(lines):
            at_edge(panel, "" if line.terms is None and line.random else number(line.of(term).value), y, 12)
        number_axis(panel, span, unit, nticks=4, showgrid=False)
        row_axis(panel, [line.name for line in lines])


def _random(panel: Panel, lines: Sequence[_TermLine], term: str, legend: bool) -> None:
    random = [[getattr(terms, term) for terms in line.random] for line in lines]

    def hover(y: int, i: int) -> str:
        return f"random<br>{term}: {number(random[y][i])} bits"

    controls(panel, random, hover, (0.0, 0.4), name="as many random ones", showlegend=legend)
