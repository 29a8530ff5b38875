"""Colours and the look of every figure; and figures as HTML."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mixturelens.types import OTHER, Interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.behaviour.trajectory import Trajectory


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
UNITS = {"feature": "#C1272D", "neuron": "#8C6D46", "head": "#8A5FBF", "direction": "#5B7A99", "subspace": "#2B8C8C"}
"""Kinds of units, in the order in which they are shown; no policy, cue or term looks like one."""
SCALE = ((0.0, "#FFFFFF"), (1.0, "#8CCFC0"))
"""Ends light, so that dark text can be read on every cell."""
POSITIVE, NEGATIVE = "#C8502D", "#2F7FB8"
"""For, and against: lines. Cells have the same two hues, light."""
DIVERGING = ((0.0, "#67A9CF"), (0.5, "#FFFFFF"), (1.0, "#EF8A62"))


def policy_colour(policy: str, policies: Sequence[str]) -> str:
    """The colour of a policy everywhere, by its place in the suite; completions of no known policy are grey."""
    return GREY if policy == OTHER else _POLICIES[list(policies).index(policy) % len(_POLICIES)]


def cue_colour(cue: str, cues: Sequence[str]) -> str:
    """The colour of a cue everywhere, by its place in the suite."""
    return _CUES[list(cues).index(cue) % len(_CUES)]


def apart(x: Interval, y: Interval) -> bool:
    """Two intervals that do not meet: not even the ends nearest to each other agree."""
    if x.low is None or x.high is None or y.low is None or y.high is None:
        return False
    return x.high < y.low or y.high < x.low


def left(figure: Figure, row: int | None, column: int | None) -> float:
    """The left end of a panel, as share of the figure."""
    panel: Any = figure.get_subplot(row, column)
    return panel.xaxis.domain[0]


def is_rl(record: Trajectory) -> bool:
    """Whether a stage of training was RL: it has rewards, or its name says so."""
    return bool(record.reward) or record.stage.startswith("rl")


def new_figure(height: int) -> Figure:
    """A figure of one panel, with the look of all."""
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
    figure.update_annotations(font_size=13)
    return figure


def figure_json(figure: Figure) -> str:
    """A figure as plotly.js reads it: `{"data": [...], "layout": {...}}`."""
    import plotly.io

    return str(plotly.io.to_json(figure, validate=False))


@functools.cache
def plotly_script() -> str:
    """plotly.js itself, of the version that is installed."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


_GOLDEN = 0.618
"""Multiples of it, less their whole part, are spread evenly: jitter that is the same every time."""


def jitter(index: int) -> float:
    """Evenly spread over -0.5 to 0.5, the same every time."""
    return index * _GOLDEN % 1 - 0.5
