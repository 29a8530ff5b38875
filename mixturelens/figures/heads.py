"""Heads: what patching each of their channels moves, and what the reader heads look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mixturelens.figures.heat import across
from mixturelens.figures.marks import Mark, bars
from mixturelens.figures.panels import Panel, heading, number_axis, panels, reach, row_axis, stacked
from mixturelens.figures.patching import WIDE, contrast, under
from mixturelens.figures.style import ROUTER, cue_colour
from mixturelens.figures.words import SIDES, label, number, token, token_axis
from mixturelens.types import NOT_MEASURED, Side, Site

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.patching.record import Attention, PatchingRecord, Sweep

HEADS = 8
"""Heads that `head_effects` shows."""
_CHANNELS = {"q": "queries", "k": "keys", "v": "values", "pattern": "attention pattern", "z": "output"}


def head_effects(sweep: Sweep) -> Figure:
    """Heads patched at all positions at once: a panel a channel, a row a head, strongest on top.

    Shares of the contrast with the record's intervals over questions.
    """
    whole = {e.site: e.effect for e in sweep.effects if e.site.head is not None and e.site.position is None}
    keys, queries = ({site.head for site in whole if site.component == channel} for channel in ("k", "q"))
    shared = len(keys) < len(queries)
    found = {(site.component, _head_name(site, shared)): effect for site, effect in whole.items()}
    channels = [c for c in _CHANNELS if any(component == c for component, _ in found)]
    strength: dict[str, float] = {}
    for (_, head), effect in found.items():
        strength[head] = max(strength.get(head, 0.0), abs(effect.value or 0.0))
    heads = sorted(strength, key=lambda head: -strength[head])[:HEADS]
    titles, margin = [_CHANNELS[channel] for channel in channels], {"l": 90, "t": 82}
    height = 26 * max(len(heads), 1) + 138
    figure, panes = panels((1, len(channels)), titles, height, margin, horizontal_spacing=0.02)
    figure.update_layout(showlegend=False)
    some = f", the {len(heads)} strongest of {len(strength)}" if len(heads) < len(strength) else ""
    facts = ", ".join(part for part in (under(sweep), sweep.direction, f"{sweep.questions} questions") if part)
    heading(figure, f"<b>{SIDES[sweep.checkpoint]}</b>, {contrast(sweep)}<br>{facts}{some}")
    shown = {channel: [found.get((channel, head), NOT_MEASURED) for head in heads] for channel in channels}
    span = reach([value for values in shown.values() for value in values], (-0.05, 1.0), 0.04)
    for panel, (channel, values) in zip(panes, shown.items(), strict=False):
        marks = [
            Mark(y, value, f"{_CHANNELS[channel]} of {head}, all positions<br>effect {number(value)}")
            for y, (head, value) in enumerate(zip(heads, values, strict=True))
        ]
        bars(panel, marks, width=0.6, marker={"color": ROUTER}, name=channel)
        number_axis(panel, span, "share of the contrast", tickvals=[-1, -0.5, 0, 0.5, 1])
        row_axis(panel, heads)
    return figure


def _head_name(site: Site, shared: bool) -> str:
    """Where heads share keys and values, these have another numbering."""
    return f"L{site.layer} {'shared k, v' if shared and site.component in ('k', 'v') else 'head'} {site.head}"


def attention(record: PatchingRecord, cues: Sequence[str]) -> Figure:
    """What the reader heads look at under each cue: a row a head, S beside R. `cues`: all of the suite, for colours.

    Means over questions of attention, which adds up to 1 over positions; the record has no intervals of it.
    """
    rows: dict[Site, dict[Side, Attention]] = {}
    for found in record.attention:
        rows.setdefault(found.head, {})[found.checkpoint] = found
    sides: list[Side] = [side for side in ("before", "after") if any(side in row for row in rows.values())]
    width = max((len(found.labels) for found in record.attention), default=1)
    column = WIDE / max(len(sides), 1) / max(width, 1)
    labels, axis, below = token_axis([found.labels for row in rows.values() for found in row.values()], column)
    inner, spacing = stacked(len(rows), 110, below + 34)
    titles = [f"<b>{SIDES[side]}</b>, {_site_words(head)}" for head in rows for side in sides]
    margin = {"l": 70, "t": 74, "b": below}
    more: dict[str, Any] = {"horizontal_spacing": 0.03, "vertical_spacing": spacing}
    figure, _ = panels((len(rows), len(sides)), titles, inner + below + 78, margin, **more)
    figure.update_layout(barmode="group", bargap=0.25, bargroupgap=0)
    named = iter(labels)
    known: set[str] = set()
    for i, row in enumerate(rows.values(), start=1):
        for found in row.values():
            panel = Panel(figure, i, sides.index(found.checkpoint) + 1)
            _looks(panel, found, cues, known)
            known |= set(found.under)
            across(panel, next(named), **axis)
            look = {"range": [0, 1.02], "tickvals": [0, 0.5, 1], "showticklabels": panel.first}
            figure.update_yaxes(title_text="attention" if panel.first else None, **look, **panel.at)
    return figure


def _looks(panel: Panel, found: Attention, cues: Sequence[str], known: set[str]) -> None:
    """Bars of every cue beside each other; cues that are `known` have their place in the legend."""
    for cue, shares in found.under.items():
        hover = [
            f"{token(name, 40)}, under cue {label(cue)}<br>attention {number(share)}"
            for name, share in zip(found.labels, shares, strict=True)
        ]
        name, marker = f"cue {label(cue)}", {"color": cue_colour(cue, cues)}
        look = {"legendgroup": name, "showlegend": cue not in known, "hovertext": hover, "hoverinfo": "text"}
        panel.figure.add_bar(x=list(range(len(shares))), y=list(shares), marker=marker, name=name, **look, **panel.at)


def _site_words(site: Site) -> str:
    at = "" if site.position is None else f", looking from {label(str(site.position), 16)}"
    return f"L{site.layer} head {site.head}{at}"
