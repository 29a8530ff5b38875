"""What RL changed of S's features, by the terms of the split; and latents that one of two checkpoints has alone."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mixturelens.figures.style import DASH, GREY, INK, SIDES, TERMS, UNITS, jitter, label, left, number, style
from mixturelens.figures.trajectories import whiskers
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
    """A row of terms; with `random`, a strip of grey points instead of a bar."""

    name: str
    terms: Terms | None = None
    random: tuple[Terms, ...] = ()


def feature_change(change: SiteChange) -> Figure:
    """R's change of features put into S, in bits of each term on one scale: the whole site, all features, single ones.

    Grey: as many random other features of like strength at once, to be held against the row above it.
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
    figure = _panels(
        [f"<b>{term}</b>: {words}" for term, words in _TERMS.items()], [1.0] * len(_TERMS), 28 * len(lines) + 118
    )
    figure.update_layout(margin={"l": 186, "r": 16, "t": 62, "b": 54})
    _site(figure, change, "R's change put into S")
    _terms(figure, lines, 1, {term: TERMS[term] for term in _TERMS}, "bar", "bits from S")
    if single < len(lines):
        figure.add_hline(y=single - 0.5, line={"color": "#999999", "width": 1})  # pyright: ignore[reportArgumentType]
    figure.update_layout(showlegend=False)
    return figure


def firing(change: SiteChange) -> Figure:
    """The features that moved most, in S across and in R up: how often they fire, and how strongly. Dotted: alike."""
    figure = _panels(
        ["<b>how often</b>: share of tokens", "<b>how strongly</b>: mean activation where it fires"], [1.0, 1.0], 380
    )
    figure.update_layout(margin={"l": 74, "r": 24, "t": 62, "b": 56}, showlegend=False)
    _site(figure, change, "the features that moved most")
    for column, field in enumerate(("rate", "strength"), start=1):
        points = [(each.index, getattr(each, field)) for each in change.features]
        pairs = [(index, of["before"], of["after"]) for index, of in points if {"before", "after"} <= set(of)]
        high = 1.12 * max([1e-3, *(value for _, x, y in pairs for value in (x, y))])
        figure.add_scatter(
            x=[0, high],
            y=[0, high],
            mode="lines",
            line={"color": "#999999", "width": 1, "dash": "dot"},
            hoverinfo="skip",
            name="alike",
            row=1,
            col=column,
        )
        figure.add_scatter(
            x=[x for _, x, _ in pairs],
            y=[y for _, _, y in pairs],
            mode="markers+text",
            text=[str(index) for index, _, _ in pairs],
            textposition=_sides([(x / high, y / high) for _, x, y in pairs]),
            textfont={"size": 12},
            marker={"color": UNITS["feature"], "size": 9, "line": {"color": INK, "width": 1}},
            cliponaxis=False,
            hovertext=[f"feature {index}<br>S {number(x)}<br>R {number(y)}" for index, x, y in pairs],
            hoverinfo="text",
            name=field,
            row=1,
            col=column,
        )
        figure.update_xaxes(range=[-0.03 * high, high], title_text=SIDES["before"], nticks=6, row=1, col=column)
        figure.update_yaxes(
            range=[-0.03 * high, high],
            title_text=SIDES["after"] if column == 1 else None,
            showticklabels=True,
            nticks=6,
            row=1,
            col=column,
        )
    return figure


def _site(figure: Figure, change: SiteChange, what: str) -> None:
    """The site and what is shown of it, over all panels."""
    text = f"<b>{label(str(change.site), 40)}</b>: {what}, {change.questions} questions"
    figure.update_layout(
        title={"text": text, "font": {"size": 13}, "x": 0.01, "y": 0.97, "yanchor": "top", "yref": "container"}
    )


def _sides(points: Sequence[tuple[float, float]]) -> list[str]:
    """Where each point's name stands: away from a neighbour that has one at that side."""
    taken: list[tuple[float, float]] = []
    found = []
    offsets = {
        "middle right": (0.03, 0.0),
        "middle left": (-0.03, 0.0),
        "top center": (0.0, 0.05),
        "bottom center": (0.0, -0.05),
    }
    for x, y in points:
        free = [
            name
            for name, (dx, dy) in offsets.items()
            if all(abs(x + dx - a) > 0.05 or abs(y + dy - b) > 0.05 for a, b in taken)
        ]
        name = free[0] if free else "middle right"
        taken.append((x + offsets[name][0], y + offsets[name][1]))
        found.append(name)
    return found


# ---------------------------------------------------------------------------------------------------------------
# crosscoders

_LOOKS: Mapping[Side | Literal["false"], tuple[str, dict[str, Any]]] = {
    "after": ("R alone", {"color": UNITS["feature"]}),
    "before": ("S alone", {"color": "white"}),
    "false": ("by norm alone, false", {"color": "#C9C9C9"}),
}


def crosscoder(records: Mapping[str, Sequence[CrosscoderFit]]) -> Figure:
    """Latents of crosscoders that look like those of one checkpoint, and R without those of R; a row a fit.

    Left: counts; false are those exclusive by norm that latent scaling takes back. Right: bits from R, on one scale,
    without all latents of R alone (diamonds) and without as many matched shared ones (grey). `records`: pairs by name.
    """
    fits = [(name, fit) for name, found in records.items() for fit in found]
    figure = _panels(
        ["<b>latents</b> of one checkpoint", *(f"<b>{term}</b> without" for term in _TERMS)],
        [1.5, 1.0, 1.0, 1.0],
        46 * max(len(fits), 1) + 150,
    )
    names = [
        f"<b>{label(name, 26)}</b><br>{label(str(fit.site), 24)}, seed {fit.seed}: {fit.shared} shared"
        for name, fit in fits
    ]
    longest = max((len(html.unescape(line)) for name in names for line in name.split("<br>")), default=10)
    figure.update_layout(
        margin={"l": 24 + round(6.2 * longest), "r": 156, "t": 84, "b": 54},
        barmode="stack",
        legend_traceorder="normal",
    )
    counts = [
        {"after": fit.exclusive.get("after", 0), "before": fit.exclusive.get("before", 0), "false": fit.false}
        for _, fit in fits
    ]
    for kind, (words, marker) in _LOOKS.items():
        figure.add_bar(
            x=[count[kind] for count in counts],
            y=list(range(len(fits))),
            orientation="h",
            width=0.5,
            marker={**marker, "line": {"color": INK, "width": 1}},
            text=[str(count[kind]) if count[kind] else "" for count in counts],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            textfont={"size": 12, "color": "white" if kind == "after" else INK},
            constraintext="none",
            name=words,
            hovertext=[
                f"{label(name, 40)}, seed {fit.seed}<br>{words}: {count[kind]}, shared: {fit.shared}<br>"
                f"dead {number(fit.dead)}, explained of S {number(fit.explained.get('before'))}, of R "
                f"{number(fit.explained.get('after'))}"
                for (name, fit), count in zip(fits, counts, strict=True)
            ],
            hoverinfo="text",
            row=1,
            col=1,
        )
    for y, count in enumerate(counts):
        if not any(count.values()):
            figure.add_annotation(
                text="none", x=0, xanchor="left", xshift=6, y=y, showarrow=False, font_size=12, row=1, col=1
            )
    most = max((sum(count.values()) for count in counts), default=0)
    figure.update_xaxes(range=[0, 1.08 * max(most, 4)], nticks=5, title_text="latents", row=1, col=1)
    lines = [_TermLine(name, fit.without, fit.random) for name, (_, fit) in zip(names, fits, strict=True)]
    _terms(figure, lines, 2, {term: TERMS[term] for term in _TERMS}, "diamond", "bits from R")
    rows = [name for name, _ in fits]
    for y in range(1, len(rows)):
        if rows[y] != rows[y - 1]:
            figure.add_hline(y=y - 0.5, line={"color": "#BBBBBB", "width": 1})  # pyright: ignore[reportArgumentType]
    for y, text in enumerate(
        ["<b>causal</b> of those<br>of R alone tested", *(_causal(fit) for _, fit in fits)], start=-1
    ):
        at: dict[str, Any] = (
            {"y": 1, "yref": "paper", "yanchor": "bottom", "yshift": 4} if y < 0 else {"y": y, "yanchor": "middle"}
        )
        figure.add_annotation(
            text=text, x=1, xshift=12, xref="paper", xanchor="left", align="left", showarrow=False, font_size=12, **at
        )
    return figure


def _causal(fit: CrosscoderFit) -> str:
    words = {"selector": "routing", "cue_reader": "conditioning", "skill": "skill"}
    if not fit.tested:
        return DASH
    named = [f"{count} {words[part]}" for part, count in fit.causal_terms.items() if count]
    return f"{fit.causal} of {fit.tested}" + (f"<br>{', '.join(named)}" if named else "")


# ---------------------------------------------------------------------------------------------------------------
# parts of both


def _panels(titles: Sequence[str], widths: Sequence[float], height: int) -> Figure:
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=1,
        cols=len(titles),
        horizontal_spacing=0.02 if len(titles) > 2 else 0.08,
        column_widths=list(widths),
        subplot_titles=list(titles),
    )
    style(figure, height)
    figure.update_layout(hovermode="closest")
    figure.update_annotations(font_size=13, xanchor="left")
    drawn: Any = figure.layout
    for column in range(len(titles)):
        drawn.annotations[column].x = left(figure, 1, column + 1)
    return figure


def _terms(
    figure: Figure,
    lines: Sequence[_TermLine],
    first: int,
    colours: Mapping[str, str],
    mark: Literal["bar", "diamond"],
    unit: str,
) -> None:
    """A panel a term from the `first` on, all on one scale: what is longer is more."""
    every = [terms for line in lines for terms in (*((line.terms,) if line.terms else ()), *line.random)]
    values = [getattr(terms, term) for terms in every for term in colours]
    ends = [end for value in values for end in (value.low, value.value, value.high) if end is not None]
    low, high = min([0.0, *ends]), max([0.01, *ends])
    room = 0.45 if mark == "bar" else 0.8  # for the numbers
    for column, (term, colour) in enumerate(colours.items(), start=first):
        found: list[Interval] = [NOT_MEASURED if line.terms is None else getattr(line.terms, term) for line in lines]
        up, down = whiskers(found)
        error = {"array": up, "arrayminus": down, "color": INK, "thickness": 1.5, "width": 4}
        hover = [f"{line.name}<br>{term}: {number(value)} bits" for line, value in zip(lines, found, strict=True)]
        random = [(y, i, getattr(terms, term)) for y, line in enumerate(lines) for i, terms in enumerate(line.random)]
        figure.add_scatter(
            x=[value.value for _, _, value in random],
            y=[y + 0.4 * jitter(i) for y, i, _ in random],
            mode="markers",
            marker={"color": GREY, "size": 7, "opacity": 0.6},
            name="as many random ones",
            showlegend=column == first,
            hovertext=[f"random<br>{term}: {number(value)} bits" for _, _, value in random],
            hoverinfo="text",
            row=1,
            col=column,
        )
        shared: dict[str, Any] = {
            "x": [value.value for value in found],
            "y": list(range(len(lines))),
            "error_x": error,
            "hovertext": hover,
            "hoverinfo": "text",
            "name": term,
            "showlegend": False,
            "row": 1,
            "col": column,
        }
        if mark == "bar":
            figure.add_bar(orientation="h", width=0.6, marker={"color": colour}, **shared)
        else:
            marker = {"color": colour, "symbol": "diamond", "size": 12, "line": {"color": INK, "width": 1}}
            figure.add_scatter(mode="markers", marker=marker, **shared)
        for y, (line, value) in enumerate(zip(lines, found, strict=True)):
            figure.add_annotation(
                text="" if line.terms is None and line.random else number(value.value),
                x=1,
                xref="x domain",
                xanchor="right",
                y=y,
                showarrow=False,
                font={"size": 12, "color": INK},
                row=1,
                col=column,
            )
        figure.update_xaxes(
            range=[low - (0.04 if mark == "bar" else 0.1) * (high - low), high + room * (high - low)],
            title_text=unit,
            nticks=4,
            showgrid=False,
            zeroline=True,
            zerolinecolor="#999999",
            row=1,
            col=column,
        )
    figure.update_yaxes(
        tickvals=list(range(len(lines))),
        ticktext=[line.name for line in lines],
        tickfont={"size": 12},
        range=[len(lines) - 0.45, -0.55],
        showgrid=False,
        zeroline=False,
        showticklabels=False,
    )
    figure.update_yaxes(showticklabels=True, row=1, col=1)
