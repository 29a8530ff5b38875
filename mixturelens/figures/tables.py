"""The policy table before and after, and verdicts over a grid of settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mixturelens.figures.heat import HeatCell, across, heat, outline, scale
from mixturelens.figures.panels import Panel, between, panels, row_axis
from mixturelens.figures.style import new_figure, policy_colour
from mixturelens.figures.words import DASH, cue_title, label, number

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.behaviour.record import BehaviourRecord, TableCell
    from mixturelens.routing.verdict import VerdictRecord


def policy_table(record: BehaviourRecord, threshold: float = 0.02) -> Figure:
    """What each policy does under each cue once put in place, before and after; cells that moved are outlined.

    Colours are forced accuracies, probabilities; the intervals of changes are in the hover text.
    """
    rows = list(dict.fromkeys((cell.policy, cell.announcement) for cell in record.table))
    rows.sort(key=lambda row: record.policies.index(row[0]))
    cells = {(cell.policy, cell.announcement, cell.cue): cell for cell in record.table}
    grid = [[cells.get((*row, cue)) for cue in record.cues] for row in rows]
    sides = ["before", "after"] if any(cell.accuracy_after is not None for cell in record.table) else ["before"]
    spacing = {"column_titles": sides, "horizontal_spacing": 0.03}
    margin = {"l": 230, "t": 84, "b": 20}
    figure, panes = panels((1, len(sides)), [], 58 * max(len(rows), 1) + 104, margin, **spacing)
    figure.update_layout(showlegend=False)
    # ticks at the top stand between the panel and its title
    figure.update_annotations(yshift=26)
    narrow = len(record.cues) * 3 if len(sides) > 1 else len(record.cues)  # a column here is narrower than a panel
    title = {"text": "forced accuracy<br>(probability)", "side": "right", "font": {"size": 12}}
    bar = {"title": title, "thickness": 12, "lenmode": "pixels", "len": 150}
    for panel in panes:
        after = panel.column == 2
        drawn = [[HeatCell(_accuracy(c, after), _cell_text(c, after), _cell_hover(c, after)) for c in r] for r in grid]
        heat(panel, drawn, 13, showscale=panel is panes[-1], xgap=3, ygap=3, colorbar=bar, **scale(0, 1))
        names = [cue_title(cue, narrow) for cue in record.cues]
        across(panel, names, side="top", tickangle=0, zeroline=False)
        down = {"range": [len(rows) - 0.5, -0.5]}
        row_axis(panel, [_row_name(*row, record.policies) for row in rows], **down)
        if after:
            _outlines(panel, grid, threshold)
        between(panel, [policy for policy, _ in rows], color="#777777")
    return figure


def _outlines(panel: Panel, grid: Sequence[Sequence[TableCell | None]], threshold: float) -> None:
    """Around cells that moved by more than the threshold."""
    for y, line in enumerate(grid):
        for x, cell in enumerate(line):
            if cell is not None and _moved(cell, threshold):
                outline(panel, x, y, (0.48, 0.46), 3)


def _moved(cell: TableCell, threshold: float) -> bool:
    changes = (cell.behaviour_change.value, cell.accuracy_change.value)
    return any(change is not None and abs(change) > threshold for change in changes)


def _accuracy(cell: TableCell | None, after: bool) -> float | None:
    return None if cell is None else cell.accuracy_after if after else cell.accuracy_before


def _cell_text(cell: TableCell | None, after: bool) -> str:
    accuracy = _accuracy(cell, after)
    if cell is None or accuracy is None:
        return DASH
    right = f"right {number(accuracy)}"
    shown = (cell.shown_after if after else cell.shown_before) or {}
    if not shown:
        return right
    usual = max(shown, key=lambda name: shown[name])
    return f"<b>{label(usual, 16)}</b> {number(shown[usual])}<br>{right}"


def _cell_hover(cell: TableCell | None, after: bool) -> str:
    if cell is None:
        return "not measured"
    lines = [f"policy {label(cell.policy)} put in place by {label(cell.announcement, 60)}", f"cue {label(cell.cue)}"]
    shown = (cell.shown_after if after else cell.shown_before) or {}
    lines += [f"shows {label(name)}: {number(value, 4)}" for name, value in shown.items()]
    lines.append(f"right: {number(_accuracy(cell, after), 4)}")
    if after:
        if cell.behaviour is not None:
            lines.append(f"change of {label(cell.behaviour)}: {number(cell.behaviour_change, 4)}")
        lines.append(f"change of accuracy: {number(cell.accuracy_change, 4)}")
    return "<br>".join(lines)


def _row_name(policy: str, announcement: str, policies: Sequence[str]) -> str:
    square = f'<span style="color:{policy_colour(policy, policies)}">■</span>'
    return f"{square} {label(policy, 14)}" + (f"  {label(announcement, 27)}" if announcement.strip() else "")


def regimes(verdicts: Mapping[tuple[float, float], VerdictRecord], trained_cue: str) -> Figure:
    """Verdicts of RL on one cue over a grid of (Adam's epsilon, learning rate), coloured by routing share.

    A cell says its verdict, the routing share with its interval, what changed, and the expected accuracy under each cue
    after RL.
    """
    epsilons, rates = (sorted({key[i] for key in verdicts}) for i in (0, 1))
    figure = new_figure(160 + 120 * len(epsilons))
    found = [[verdicts.get((epsilon, rate)) for rate in rates] for epsilon in epsilons]
    cells = [[HeatCell(_share(each), text := _regime_text(each), text) for each in line] for line in found]
    look = {"x": [_power(rate) for rate in rates], "y": [_power(epsilon) for epsilon in epsilons], "xgap": 3, "ygap": 3}
    scale = {"colorscale": [(0.0, "#F2D79B"), (1.0, "#A9B7CC")], "colorbar": {"title": {"text": "routing share"}}}
    heat(Panel(figure), cells, 13, zmin=0, zmax=1, **look, **scale)
    figure.update_layout(
        title=f"RL on {label(trained_cue)}: what changed, by epsilon and learning rate",
        width=980,
        # numbers written out would be read as a linear axis
        xaxis={"title": "learning rate", "type": "category"},
        yaxis={"title": "Adam's epsilon", "type": "category"},
    )
    return figure


def _power(value: float) -> str:
    """A rate as it is spoken of: 3 × 10⁻⁴."""
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa} × 10<sup>{int(exponent)}</sup>".removeprefix("1 × ").replace("-", "−")


def _share(record: VerdictRecord | None) -> float | None:
    """The routing share, where there was any change to share out."""
    return None if record is None or record.verdict == "neither" else record.routing_share.value


def _regime_text(record: VerdictRecord | None) -> str:
    if record is None:
        return DASH
    changed = [name.replace("_", " ") for name, yes in record.changed.model_dump().items() if yes]
    after = [f"{label(cue)} {number(s.after.overall, 2)}" for cue, s in record.per_cue.items() if s.after]
    share = f"share {number(record.routing_share, 2)}"
    return f"<b>{record.verdict}</b><br>{share}<br>{', '.join(changed) or 'nothing'}<br>{', '.join(after)}"
