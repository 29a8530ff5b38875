"""How much of the metric circuits of each size keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mixturelens.figures.marks import line
from mixturelens.figures.panels import Panel, panels, rule
from mixturelens.figures.style import INK, left
from mixturelens.figures.words import SIDES, number
from mixturelens.types import Side

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.routing.circuit import FaithfulnessCurve, RoutingCircuit

_COLOURS: dict[Side, tuple[str, str]] = {"before": ("#8A5FBF", "138,95,191"), "after": (INK, "34,34,34")}
"""Of lines, and of the bands behind them."""
_SHARES = {1e-4: "0.01%", 1e-3: "0.1%", 1e-2: "1%", 1e-1: "10%", 1: "100%"}


def faithfulness(circuits: Sequence[RoutingCircuit]) -> Figure:
    """What circuits keep of the metric, a share of the contrast, by the share of edges kept: found and random edges.

    A panel a kind of contrast; bands are the record's intervals over questions.
    """
    kinds = list(dict.fromkeys(of.kind for of in circuits))
    titles, margin = [f"{kind} contrast" for kind in kinds], {"t": 44, "b": 160, "l": 64}
    figure, panes = panels((1, len(kinds)), titles, 470, margin, horizontal_spacing=0.08)
    for panel, kind in zip(panes, kinds, strict=False):
        legend = "legend" if panel.first else f"legend{panel.column}"
        look = {"orientation": "v", "traceorder": "normal", "font": {"size": 12}, "x": left(figure, 1, panel.column)}
        figure.update_layout({legend: {**look, "y": 0, "yref": "container", "yanchor": "bottom"}})
        for of in circuits:
            if of.kind == kind:
                _curves(panel, of.checkpoint, of.faithfulness, legend)
        ticks = {"tickvals": list(_SHARES), "ticktext": list(_SHARES.values())}
        figure.update_xaxes(type="log", title_text="edges kept (share of all, log scale)", **ticks, **panel.at)
        rule(panel, y=1, dash="dot")
    figure.update_yaxes(title_text="share of the contrast kept", row=1, col=1)
    return figure


def _curves(panel: Panel, side: Side, of: FaithfulnessCurve, legend: str) -> None:
    """The circuit that was found and random edges, each with its band."""
    colour, rgb = _COLOURS[side]
    kept = [i for i, fraction in enumerate(of.fractions) if fraction > 0]  # a logarithm has no place for none
    x = [of.fractions[i] for i in kept]
    for what, values, cpr, cmd, dash, symbol, shade in (
        ("found", of.found, of.cpr, of.cmd, "solid", "circle", 0.22),
        ("random", of.random, of.random_cpr, of.random_cmd, "dot", "circle-open", 0.1),
    ):
        drawn = [values[i] for i in kept]
        for edge, fill in (("low", None), ("high", "tonexty")):
            look = {"line": {"width": 0, "color": colour}, "fill": fill, "fillcolor": f"rgba({rgb},{shade})"}
            ends = [getattr(value, edge) for value in drawn]
            line(panel, x, ends, None, showlegend=False, name=f"{side} {what} {edge}", **look)
        hover = [
            f"{SIDES[side]}, {what}: {of.sizes[i]} edges ({of.fractions[i]:.2%})<br>keeps {number(values[i])}"
            for i in kept
        ]
        name = f"{SIDES[side]}, {what}: CPR {number(cpr, 2)}, CMD {number(cmd, 2)}"
        look: dict[str, Any] = {"line": {"color": colour, "width": 2, "dash": dash}, "mode": "lines+markers"}
        look["marker"] = {"symbol": symbol, "size": 7, "color": colour}
        line(panel, x, [value.value for value in drawn], hover, legend=legend, name=name, **look)
