"""Words, numbers and tokens, as figures show them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mixturelens.types import OTHER, Interval, Side

DASH = "–"
"""Shown where nothing was measured."""
INTERVALS = "95% bootstrap over questions"
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
    """A policy as legends name it, and completions of none."""
    return "other (no known policy)" if policy == OTHER else f"policy {label(policy)}"


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
