"""Heads: what patching each of their channels moves, and what the reader heads look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mixturelens.figures.marks import old_whiskers as whiskers
from mixturelens.figures.patching import WIDE, contrast, under
from mixturelens.figures.style import INK, ROUTER, SIDES, cue_colour, label, number, style, token, token_axis
from mixturelens.types import NOT_MEASURED, Side, Site

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.patching.record import Attention, PatchingRecord, Sweep

HEADS = 8
"""Heads that `head_effects` shows."""
_CHANNELS = {"q": "queries", "k": "keys", "v": "values", "pattern": "attention pattern", "z": "output"}


def head_effects(sweep: Sweep) -> Figure:
    """Heads patched at all positions at once: a panel a channel, a row a head, strongest on top."""
    from plotly.subplots import make_subplots

    whole = {e.site: e.effect for e in sweep.effects if e.site.head is not None and e.site.position is None}
    keys, queries = ({site.head for site in whole if site.component == channel} for channel in ("k", "q"))
    shared = len(keys) < len(queries)
    found = {(site.component, _head_name(site, shared)): effect for site, effect in whole.items()}
    channels = [c for c in _CHANNELS if any(component == c for component, _ in found)]
    strength: dict[str, float] = {}
    for (_, head), effect in found.items():
        strength[head] = max(strength.get(head, 0.0), abs(effect.value or 0.0))
    heads = sorted(strength, key=lambda head: -strength[head])[:HEADS]
    figure = make_subplots(
        rows=1,
        cols=max(len(channels), 1),
        horizontal_spacing=0.02,
        subplot_titles=[_CHANNELS[channel] for channel in channels],
    )
    style(figure, 26 * max(len(heads), 1) + 138)
    some = f", the {len(heads)} strongest of {len(strength)}" if len(heads) < len(strength) else ""
    figure.update_layout(
        margin={"l": 90, "t": 82},
        showlegend=False,
        title={
            "text": f"<b>{SIDES[sweep.checkpoint]}</b>, {contrast(sweep)}<br>"
            + ", ".join(part for part in (under(sweep), sweep.direction, f"{sweep.questions} questions") if part)
            + some,
            "font": {"size": 13},
            "x": 0.01,
            "y": 0.97,
            "yanchor": "top",
            "yref": "container",
        },
    )
    shown = [found.get((channel, head), NOT_MEASURED) for channel in channels for head in heads]
    ends = [end for value in shown for end in (value.low, value.value, value.high) if end is not None]
    low, high = min([-0.05, *ends]), max([1.0, *ends])
    for column, channel in enumerate(channels, start=1):
        values = [found.get((channel, head), NOT_MEASURED) for head in heads]
        up, down = whiskers(values)
        figure.add_bar(
            x=[value.value for value in values],
            y=list(range(len(heads))),
            orientation="h",
            width=0.6,
            marker={"color": ROUTER},
            error_x={"array": up, "arrayminus": down, "color": INK, "thickness": 1.5, "width": 4},
            hovertext=[
                f"{_CHANNELS[channel]} of {head}, all positions<br>effect {number(value)}"
                for head, value in zip(heads, values, strict=True)
            ],
            hoverinfo="text",
            name=channel,
            row=1,
            col=column,
        )
        figure.update_xaxes(
            range=[low - 0.04 * (high - low), high + 0.04 * (high - low)],
            tickvals=[-1, -0.5, 0, 0.5, 1],
            title_text="share of the contrast",
            zeroline=True,
            zerolinecolor="#999999",
            row=1,
            col=column,
        )
        figure.update_yaxes(
            tickvals=list(range(len(heads))),
            ticktext=heads,
            range=[len(heads) - 0.4, -0.6],
            showgrid=False,
            zeroline=False,
            showticklabels=column == 1,
            row=1,
            col=column,
        )
    return figure


def _head_name(site: Site, shared: bool) -> str:
    """Where heads share keys and values, these have another numbering."""
    return f"L{site.layer} {'shared k, v' if shared and site.component in ('k', 'v') else 'head'} {site.head}"


def attention(record: PatchingRecord, cues: Sequence[str]) -> Figure:
    """What the reader heads look at under each cue: a row a head, S beside R. `cues`: all of the suite, for colours."""
    from plotly.subplots import make_subplots

    rows: dict[Site, dict[Side, Attention]] = {}
    for found in record.attention:
        rows.setdefault(found.head, {})[found.checkpoint] = found
    sides: list[Side] = [side for side in ("before", "after") if any(side in row for row in rows.values())]
    width = max((len(found.labels) for found in record.attention), default=1)
    column = WIDE / max(len(sides), 1) / max(width, 1)
    labels, axis, below = token_axis([found.labels for row in rows.values() for found in row.values()], column)
    gap = below + 34
    inner = 110 * max(len(rows), 1) + gap * max(len(rows) - 1, 0)
    figure = make_subplots(
        rows=max(len(rows), 1),
        cols=max(len(sides), 1),
        horizontal_spacing=0.03,
        vertical_spacing=gap / inner if len(rows) > 1 else 0,
        subplot_titles=[f"<b>{SIDES[side]}</b>, {_site_words(head)}" for head in rows for side in sides],
    )
    style(figure, inner + below + 78)
    figure.update_layout(margin={"l": 70, "t": 74, "b": below}, barmode="group", bargap=0.25, bargroupgap=0)
    figure.update_annotations(font_size=13)
    named = iter(labels)
    known: set[str] = set()
    for i, row in enumerate(rows.values(), start=1):
        for found in row.values():
            j = sides.index(found.checkpoint) + 1
            names = next(named)
            for cue, shares in found.under.items():
                figure.add_bar(
                    x=list(range(len(shares))),
                    y=list(shares),
                    marker={"color": cue_colour(cue, cues)},
                    name=f"cue {label(cue)}",
                    legendgroup=f"cue {label(cue)}",
                    showlegend=cue not in known,
                    hovertext=[
                        f"{token(name, 40)}, under cue {label(cue)}<br>attention {number(share)}"
                        for name, share in zip(found.labels, shares, strict=True)
                    ],
                    hoverinfo="text",
                    row=i,
                    col=j,
                )
                known.add(cue)
            figure.update_xaxes(
                tickvals=list(range(len(names))),
                ticktext=names,
                range=[-0.5, len(names) - 0.5],
                showgrid=False,
                **axis,
                row=i,
                col=j,
            )
            figure.update_yaxes(
                range=[0, 1.02],
                tickvals=[0, 0.5, 1],
                title_text="attention" if j == 1 else None,
                showticklabels=j == 1,
                row=i,
                col=j,
            )
    return figure


def _site_words(site: Site) -> str:
    at = "" if site.position is None else f", looking from {label(str(site.position), 16)}"
    return f"L{site.layer} head {site.head}{at}"
