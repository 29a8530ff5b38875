"""The mechanism verdict: every line of evidence beside its null."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from mixturelens.figures.marks import old_whiskers as whiskers
from mixturelens.figures.style import GREY, INK, ROUTER, SPECIALIST, label, new_figure, number

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.routing.mechanism import Line, Mechanism


def evidence(mechanism: Mechanism) -> Figure:
    """A row a line of evidence: its bits from S, those of noise of the same size, and what it says."""
    rows = sorted(mechanism.evidence.items(), key=lambda row: row[1].about != "selector")
    figure = new_figure(48 * max(len(rows), 1) + 132)
    figure.update_layout(margin={"l": 190, "r": 170, "t": 84, "b": 56}, hovermode="closest")
    nulls = [(y, line.null) for y, (_, line) in enumerate(rows) if line.null is not None]
    figure.add_scatter(
        x=[null for _, null in nulls],
        y=[y for y, _ in nulls],
        mode="markers",
        marker={"symbol": "line-ns", "size": 22, "line": {"width": 3, "color": GREY}},
        name="noise of the same size",
        hovertext=[f"noise {number(null)} bits" for _, null in nulls],
        hoverinfo="text",
    )
    for about, colour, symbol in (("selector", ROUTER, "circle"), ("specialists", SPECIALIST, "square")):
        found = [(y, name, line) for y, (name, line) in enumerate(rows) if line.about == about]
        if not found:
            continue
        up, down = whiskers([line.effect for _, _, line in found])
        figure.add_scatter(
            x=[line.effect.value for _, _, line in found],
            y=[y for y, _, _ in found],
            error_x={"array": up, "arrayminus": down, "thickness": 2, "width": 6, "color": INK},
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 12},
            name=about,
            hovertext=[
                f"{label(name, 60)}: {number(line.effect)} bits<br>{_wrapped(line.what)}" for _, name, line in found
            ],
            hoverinfo="text",
        )
    split = sum(line.about == "selector" for _, line in rows)
    if 0 < split < len(rows):
        figure.add_hline(y=split - 0.5, line={"color": "#BBBBBB", "width": 1})  # pyright: ignore[reportArgumentType]
    ends = [end for _, line in rows for end in (line.effect.low, line.effect.value, line.effect.high, line.null)]
    known = [end for end in ends if end is not None]
    low, high = min([0.0, *known]), max([0.05, *known])
    pad = 0.05 * (high - low)
    figure.update_xaxes(
        title_text="bits from S",
        range=[low - pad, high + pad],
        zeroline=True,
        zerolinecolor="#999999",
    )
    figure.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=[f"<b>{line.source}</b><br>{line.about}" for _, line in rows],
        range=[len(rows) - 0.45, -0.55],
        showgrid=False,
        zeroline=False,
    )
    says = [_says(line) for _, line in rows]
    for y, text in enumerate(["<b>it says</b>", *says], start=-1):
        at = {"y": 1, "yref": "paper", "yanchor": "bottom"} if y < 0 else {"y": y, "yref": "y", "yanchor": "middle"}
        figure.add_annotation(
            text=text, x=1.015, xref="paper", xanchor="left", align="left", showarrow=False, font={"size": 13}, **at
        )
    return figure


def _says(line: Line) -> str:
    return "cannot say" if line.changed is None else "changed" if line.changed else "unchanged"


def _wrapped(text: str, width: int = 60) -> str:
    """A sentence on as many lines as it needs: hover texts do not break by themselves."""
    return "<br>".join(label(line, width) for line in textwrap.wrap(text, width))
