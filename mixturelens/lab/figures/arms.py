"""Arms of an experiment side by side: a point a seed, and their mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mixturelens.figures.marks import old_whiskers as whiskers
from mixturelens.figures.style import GREY, INK, jitter, label, number, style
from mixturelens.types import Interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def arms(found: Mapping[str, Mapping[str, tuple[Sequence[float], Interval]]], unit: str = "probability") -> Figure:
    """A panel for each quantity: arm -> (one number a seed, mean with its interval over seeds).

    A panel whose numbers all lie within 0 and 1 shows all of that range.
    """
    from plotly.subplots import make_subplots

    columns = len(found)
    figure = make_subplots(rows=1, cols=columns, column_titles=[_lines(name) for name in found])
    style(figure, 400)
    figure.update_layout(margin={"t": 80})
    figure.update_annotations(font_size=13)
    for column, (quantity, by_arm) in enumerate(found.items(), start=1):
        names = list(by_arm)
        points = [(x, i, name) for x, name in enumerate(names) for i in range(len(by_arm[name][0]))]
        means = [by_arm[name][1] for name in names]
        up, down = whiskers(means)
        figure.add_scatter(
            x=[x + 0.4 * jitter(i) for x, i, _ in points],
            y=[by_arm[name][0][i] for _, i, name in points],
            mode="markers",
            marker={"color": GREY, "size": 7, "opacity": 0.7},
            name="a seed",
            showlegend=column == 1,
            hovertext=[
                f"{label(name)}, seed {i}<br>{label(quantity, 60)}: {number(by_arm[name][0][i])}"
                for _, i, name in points
            ],
            hoverinfo="text",
            row=1,
            col=column,
        )
        figure.add_scatter(
            x=list(range(len(names))),
            y=[mean.value for mean in means],
            error_y={"array": up, "arrayminus": down, "thickness": 2, "width": 6, "color": INK},
            mode="markers",
            marker={"color": INK, "symbol": "diamond", "size": 11},
            name="mean, 95% over seeds",
            showlegend=column == 1,
            hovertext=[
                f"{label(name)}<br>{label(quantity, 60)}: {number(mean)}"
                for name, mean in zip(names, means, strict=True)
            ],
            hoverinfo="text",
            row=1,
            col=column,
        )
        figure.update_xaxes(
            tickvals=list(range(len(names))),
            ticktext=[label(name) for name in names],
            tickangle=-35,
            range=[-0.5, len(names) - 0.5],
            row=1,
            col=column,
        )
        numbers = [value for values, _ in by_arm.values() for value in values]
        if numbers and min(numbers) >= 0 and max(numbers) <= 1:
            figure.update_yaxes(range=[-0.05, 1.05], row=1, col=column)
    figure.update_yaxes(title_text=unit, row=1, col=1)
    return figure


def _lines(quantity: str) -> str:
    """A title in two lines, where it has two parts: panels are narrow."""
    return label(quantity, 60).replace(", ", ",<br>", 1).replace(": ", ":<br>", 1)
