"""How much of the metric circuits of each size keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mixturelens.figures.style import INK, SIDES, left, number, style
from mixturelens.types import Side

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.routing.circuit import FaithfulnessCurve, RoutingCircuit

_COLOURS: dict[Side, tuple[str, str]] = {"before": ("#8A5FBF", "138,95,191"), "after": (INK, "34,34,34")}
"""Of lines, and of the bands behind them."""


def faithfulness(circuits: Sequence[RoutingCircuit]) -> Figure:
    """What circuits keep of the metric by size, a panel a kind of contrast: found against random edges."""
    from plotly.subplots import make_subplots

    kinds = list(dict.fromkeys(of.kind for of in circuits))
    columns = max(len(kinds), 1)
    figure = make_subplots(
        rows=1,
        cols=columns,
        horizontal_spacing=0.08,
        subplot_titles=[f"{kind} contrast" for kind in kinds],
    )
    style(figure, 470)
    figure.update_layout(margin={"t": 44, "b": 160, "l": 64})
    for column, kind in enumerate(kinds, start=1):
        legend = "legend" if column == 1 else f"legend{column}"
        figure.update_layout(
            {
                legend: {
                    "orientation": "v",
                    "traceorder": "normal",
                    "font": {"size": 12},
                    "x": left(figure, 1, column),
                    "y": 0,
                    "yref": "container",
                    "yanchor": "bottom",
                }
            }
        )
        for of in circuits:
            if of.kind == kind:
                _curves(figure, of.checkpoint, of.faithfulness, {"row": 1, "col": column}, legend)
        figure.update_xaxes(
            type="log",
            title_text="edges kept (share of all, log scale)",
            tickvals=[1e-4, 1e-3, 1e-2, 1e-1, 1],
            ticktext=["0.01%", "0.1%", "1%", "10%", "100%"],
            row=1,
            col=column,
        )
        figure.add_hline(y=1, line={"color": "#999999", "width": 1, "dash": "dot"}, row=1, col=column)  # pyright: ignore[reportArgumentType]
    figure.update_yaxes(title_text="share of the contrast kept", row=1, col=1)
    return figure


def _curves(figure: Figure, side: Side, of: FaithfulnessCurve, where: dict[str, Any], legend: str) -> None:
    colour, rgb = _COLOURS[side]
    kept = [i for i, fraction in enumerate(of.fractions) if fraction > 0]  # a logarithm has no place for none
    x = [of.fractions[i] for i in kept]
    for what, values, cpr, cmd, dash, symbol in (
        ("found", of.found, of.cpr, of.cmd, "solid", "circle"),
        ("random", of.random, of.random_cpr, of.random_cmd, "dot", "circle-open"),
    ):
        drawn = [values[i] for i in kept]
        for edge, fill in (("low", None), ("high", "tonexty")):
            figure.add_scatter(
                x=x,
                y=[getattr(value, edge) for value in drawn],
                mode="lines",
                line={"width": 0, "color": colour},
                fill=fill,
                fillcolor=f"rgba({rgb},{0.22 if what == 'found' else 0.1})",
                hoverinfo="skip",
                showlegend=False,
                name=f"{side} {what} {edge}",
                **where,
            )
        figure.add_scatter(
            x=x,
            y=[value.value for value in drawn],
            mode="lines+markers",
            line={"color": colour, "width": 2, "dash": dash},
            marker={"symbol": symbol, "size": 7, "color": colour},
            legend=legend,
            name=f"{SIDES[side]}, {what}: CPR {number(cpr, 2)}, CMD {number(cmd, 2)}",
            hovertext=[
                f"{SIDES[side]}, {what}: {of.sizes[i]} edges ({of.fractions[i]:.2%})<br>keeps {number(values[i])}"
                for i in kept
            ],
            hoverinfo="text",
            **where,
        )
