"""Words, numbers, colours and the look of every figure; and figures as HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mixturelens.types import OTHER, Interval, Side

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.behaviour.trajectory import Trajectory

DASH = "–"
"""Shown where nothing was measured."""
INTERVALS = "95% bootstrap over questions"

# Okabe-Ito, shared out so that no policy looks like a cue; what comes after are Tol's muted colours
_POLICIES = ("#0072B2", "#D55E00", "#CC79A7", "#332288", "#882255", "#117733")
_CUES = ("#009E73", "#E69F00", "#000000", "#56B4E9", "#AA4499", "#999933")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
GREY = "#8C8C8C"
INK = "#222222"
ROUTER, SPECIALIST = "#44546A", "#B8860B"
TERMS = {
    "routing": ROUTER,
    "conditioning": "#DDAA33",
    "skill": SPECIALIST,
    "specialist": SPECIALIST,
    "dormant": "#C9C9C9",
}
UNITS = {
    "feature": "#C1272D",
    "neuron": "#8C6D46",
    "head": "#8A5FBF",
    "direction": "#5B7A99",
    "subspace": "#2B8C8C",
}
"""Kinds of units, in the order in which they are shown; no policy, cue or term looks like one."""
SCALE = ((0.0, "#FFFFFF"), (1.0, "#8CCFC0"))
"""Ends light, so that dark text can be read on every cell."""
POSITIVE, NEGATIVE = "#C8502D", "#2F7FB8"
"""For, and against: lines. Cells have the same two hues, light."""
DIVERGING = ((0.0, "#67A9CF"), (0.5, "#FFFFFF"), (1.0, "#EF8A62"))
SIDES: Mapping[Side, str] = {"before": "S (before)", "after": "R (after)"}


def label(text: str, limit: int = 28) -> str:
    """User text as plotly shows it literally: plotly reads a subset of HTML in every label and hover text.

    >>> label("<A>")
    '&lt;A&gt;'
    """
    text = " ".join(text.split())
    return html.escape(text if len(text) <= limit else text[: limit - 1] + "…", quote=False)


def show(value: float | None, digits: int = 3) -> str:
    """A number for the eye; a dash where nothing was measured, and a tiny number is not a zero.

    >>> show(0.25), show(-1e-6), show(0.0), show(None)
    ('0.250', '>−0.001', '0', '–')
    """
    if value is None:
        return DASH
    least = 10**-digits
    if value != 0 and abs(value) < least / 2:
        return f"<{least:.{digits}f}" if value > 0 else f">−{least:.{digits}f}"
    return f"{value:.{digits}f}".replace("-", "−") if value else "0"


def show_interval(value: Interval, digits: int = 3) -> str:
    """A number and its interval, `0.998 [0.995, 1.000]`."""
    if value.value is None:
        return DASH
    if value.low is None or value.high is None:
        return show(value.value, digits)
    low, high = (show(x, digits) for x in (value.low, value.high))
    return f"{show(value.value, digits)} [{low}, {high}]"


def number(value: Interval | float | None, digits: int = 3) -> str:
    """As `show`, for plotly, where the `<` of `<0.001` would open a tag."""
    text = show_interval(value, digits) if isinstance(value, Interval) else show(value, digits)
    return html.escape(text, quote=False)


def short(value: float, column: float) -> str:
    """Two digits in a cell that is so many pixels wide: without what goes without saying where that is little.

    >>> short(0.25, 40), short(0.25, 30), short(-1.0, 30)
    ('0.25', '.25', '−1.0')
    """
    text = number(value, 2)
    return text if column >= 38 else text.replace("0.", ".", 1) if abs(value) < 0.995 else text[:-1]


def cue_title(cue: str, columns: int) -> str:
    """The name of a cue over one of several panels, cut so that neighbours do not overlap."""
    return f"cue {label(cue, min(28, max(8, 100 // columns)))}"


def policy_name(policy: str) -> str:
    return "other (no known policy)" if policy == OTHER else f"policy {label(policy)}"


def policy_colour(policy: str, policies: Sequence[str]) -> str:
    """The colour of a policy everywhere, by its place in the suite; completions of no known policy are grey."""
    return GREY if policy == OTHER else _POLICIES[list(policies).index(policy) % len(_POLICIES)]


def cue_colour(cue: str, cues: Sequence[str]) -> str:
    return _CUES[list(cues).index(cue) % len(_CUES)]


def token(text: str, limit: int = 14) -> str:
    """A token as a label: one of white space alone can be seen."""
    return label(text.replace("\n", "⏎"), limit) or "␣"


def token_axis(panels: Iterable[Sequence[str]], column: float) -> tuple[list[list[str]], dict[str, Any], int]:
    """Tick labels of tokens (a list a panel), how to set them, and the pixels they need below the axis.

    `column`: pixels that a label has; upright where the longest needs more.
    """
    named = [[token(text) for text in labels] for labels in panels]
    longest = max((len(html.unescape(text)) for labels in named for text in labels), default=1)
    upright = 7.2 * longest + 4 > column
    axis = {"tickangle": -90 if upright else 0, "tickfont": {"size": 12}, "ticks": ""}
    return named, axis, 24 + round(7.4 * longest) if upright else 36


def apart(x: Interval, y: Interval) -> bool:
    """Two intervals that do not meet: not even the ends nearest to each other agree."""
    if x.low is None or x.high is None or y.low is None or y.high is None:
        return False
    return x.high < y.low or y.high < x.low


def left(figure: Figure, row: int, column: int) -> float:
    """The left end of a panel, as share of the figure."""
    panel: Any = figure.get_subplot(row, column)
    return panel.xaxis.domain[0]


def is_rl(record: Trajectory) -> bool:
    return bool(record.reward) or record.stage.startswith("rl")


def new_figure(height: int) -> Figure:
    from plotly.graph_objects import Figure

    return style(Figure(), height)


def style(figure: Figure, height: int) -> Figure:
    """The look of a figure, set on it alone: other figures of the session stay as they are."""
    figure.update_layout(
        template="plotly_white",
        height=height,
        font={"family": "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif", "size": 13, "color": INK},
        margin={"l": 80, "r": 24, "t": 70, "b": 56},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top"},
        hoverlabel={"align": "left", "bgcolor": "white"},
    )
    figure.update_xaxes(showline=True, linecolor="#BBBBBB", gridcolor="#EEEEEE", type="linear", title_font_size=13)
    figure.update_yaxes(showline=True, linecolor="#BBBBBB", gridcolor="#EEEEEE", type="linear", title_font_size=13)
    figure.update_annotations(font_size=14)
    return figure


def figure_html(figure: Figure, name: str) -> str:
    """A figure as a `<div id=name>` for a page that holds `plotly_script()`."""
    import plotly.io

    config = {"displaylogo": False, "responsive": True, "displayModeBar": False}
    return plotly.io.to_html(figure, config=config, full_html=False, include_plotlyjs=False, div_id=name)


def plotly_script() -> str:
    """plotly.js itself, for the inside of a `<script>` element."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


_GOLDEN = 0.618
"""Multiples of it, less their whole part, are spread evenly: jitter that is the same every time."""


def jitter(index: int) -> float:
    """Evenly spread over -0.5 to 0.5, the same every time."""
    return index * _GOLDEN % 1 - 0.5
