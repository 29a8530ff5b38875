"""What all figures share: panels and their axes, lines through them, what stands beside rows, and legends."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mixturelens.figures.style import INK, left, new_figure, style
from mixturelens.types import Interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

RULE = "#999999"
"""Of lines that say where a number stands, as 0 does."""


class Panel(NamedTuple):
    """One pair of axes of a figure; without a row and a column, the whole of it."""

    figure: Any
    row: int | None = None
    column: int | None = None

    @property
    def at(self) -> dict[str, Any]:
        """Where plotly puts what is drawn in it."""
        return {} if self.row is None else {"row": self.row, "col": self.column}

    @property
    def first(self) -> bool:
        """Whether it stands at the left, where the names of rows are."""
        return self.column in (None, 1)


def panels(
    size: tuple[int, int],
    titles: Sequence[str],
    height: int,
    margin: Mapping[str, int],
    at_left: bool = False,
    **more: Any,
) -> tuple[Figure, list[Panel]]:
    """A figure of rows x columns of panels, and these row by row; a title stands over each, and begins where its panel
    does if `at_left`. `more` is what plotly's make_subplots takes.
    """
    from plotly.subplots import make_subplots

    rows, columns = (max(number, 1) for number in size)
    figure = make_subplots(rows=rows, cols=columns, subplot_titles=list(titles) or None, **more)
    style(figure, height)
    figure.update_layout(margin=dict(margin))
    found = [Panel(figure, row, column) for row in range(1, rows + 1) for column in range(1, columns + 1)]
    if at_left:
        drawn: Any = figure.layout
        figure.update_annotations(xanchor="left", align="left")
        for title, panel in zip(drawn.annotations, found, strict=False):
            title.x = left(figure, panel.row, panel.column)
    return figure, found


def single(height: int, margin: Mapping[str, int]) -> Panel:
    """The one panel of a figure."""
    panel = Panel(new_figure(height))
    panel.figure.update_layout(margin=dict(margin))
    return panel


def stacked(rows: int, plot: int, gap: int) -> tuple[int, float]:
    """Pixels of rows of panels with gaps between them, and the gap as plotly wants it: a share of all."""
    inner = plot * max(rows, 1) + gap * max(rows - 1, 0)
    return inner, gap / inner if rows > 1 else 0


def heading(figure: Figure, text: str) -> None:
    """A line over all panels: what they are about."""
    place = {"x": 0.01, "y": 0.97, "yanchor": "top", "yref": "container"}
    figure.update_layout(title={"text": text, "font": {"size": 13}, **place})


def widest(lines: Iterable[str]) -> int:
    """Letters of the longest line of some texts, as they are seen."""
    return max((len(html.unescape(line)) for text in lines for line in text.split("<br>")), default=1)


def row_axis(panel: Panel, names: Sequence[str], **more: Any) -> None:
    """One row a name, the first on top; the names stand at the left of the first panel."""
    look: dict[str, Any] = {
        "tickfont": {"size": 12},
        "range": [len(names) - 0.45, -0.55],
        "showticklabels": panel.first,
    }
    look |= {"tickvals": list(range(len(names))), "ticktext": list(names), "showgrid": False, "zeroline": False}
    panel.figure.update_yaxes(**{**look, **more}, **panel.at)


def number_axis(panel: Panel, span: Sequence[float], title: str | None, **more: Any) -> None:
    """Numbers across, from one end of the span to the other, with a line at 0."""
    look = {"range": list(span), "title_text": title, "zeroline": True, "zerolinecolor": RULE}
    panel.figure.update_xaxes(**{**look, **more}, **panel.at)


def rule(panel: Panel, x: float | None = None, y: float | None = None, below: bool = False, **line: Any) -> None:
    """A line through a panel, upright at x or across at y."""
    look = {"line": {"color": RULE, "width": 1, **line}, **({"layer": "below"} if below else {}), **panel.at}
    if x is not None:
        panel.figure.add_vline(x=x, **look)
    else:
        panel.figure.add_hline(y=y, **look)


def between(panel: Panel, groups: Sequence[Any], **look: Any) -> None:
    """A line between rows of which the groups differ; `look` is what `rule` takes."""
    for y in range(1, len(groups)):
        if groups[y] != groups[y - 1]:
            rule(panel, y=y - 0.5, **look)


def shade(panel: Panel, x: tuple[float, float], colour: str) -> None:
    """A light ground between two numbers."""
    panel.figure.add_vrect(x0=x[0], x1=x[1], fillcolor=colour, line_width=0, layer="below", **panel.at)


def beside(panel: Panel, title: str, texts: Sequence[str], size: int = 12) -> None:
    """Text at the right of each row of a panel, under a title."""
    own = {} if panel.row else {"yref": "y"}
    for y, text in enumerate([title, *texts], start=-1):
        at = {"y": 1, "yref": "y domain", "yanchor": "bottom", "yshift": 4} if y < 0 else {"y": y, "yanchor": "middle"}
        at = {**own, **at, "x": 1, "xref": "x domain", "xshift": 12, "xanchor": "left", "align": "left"}
        panel.figure.add_annotation(text=text, showarrow=False, font={"size": size}, **at, **panel.at)


def at_edge(panel: Panel, text: str, y: float, size: int) -> None:
    """Text inside a panel, at its right edge."""
    look = {"x": 1, "xref": "x domain", "xanchor": "right", "font": {"size": size, "color": INK}}
    panel.figure.add_annotation(text=text, y=y, showarrow=False, **look, **panel.at)


def entry(figure: Figure, name: str, **look: Any) -> None:
    """A line or a marker of the legend that stands for no trace of its own."""
    mode = "markers" if "marker" in look else "lines"
    figure.add_scatter(x=[None], y=[None], mode=mode, name=name, **look)


def ends(values: Iterable[Interval | float | None]) -> list[float]:
    """Numbers, and the ends of their intervals, where they were measured."""
    found: list[float | None] = []
    for value in values:
        found += [value.low, value.value, value.high] if isinstance(value, Interval) else [value]
    return [end for end in found if end is not None]


def reach(
    values: Iterable[Interval | float | None],
    least: tuple[float, float],
    pad: float = 0.06,
    within: tuple[float, float] | None = None,
) -> tuple[float, float]:
    """An axis on which all is seen: at least `least`, with room at both ends as a share of it.

    `within`: what is further away would squeeze everything else, and is left out.
    """
    found = ends(values)
    low, high = min([least[0], *found]), max([least[1], *found])
    if within is not None:
        low, high = max(low, within[0]), min(high, within[1])
    return low - pad * (high - low), high + pad * (high - low)
