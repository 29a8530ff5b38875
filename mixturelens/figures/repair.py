"""Repair of transfer: what it brings back, and what the same repair does at random places."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mixturelens.figures.marks import Mark, controls, dots
from mixturelens.figures.panels import Panel, beside, entry, row_axis, rule, single
from mixturelens.figures.style import INK, SYMBOLS, cue_colour
from mixturelens.figures.words import DASH, label, number
from mixturelens.types import NOT_MEASURED, Interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.routing.repair import Random, RepairRecord


def repairs(record: RepairRecord) -> Figure:
    """Accuracy under every cue before RL, after it and repaired; dotted, the most that a repair could reach.

    Probabilities with the record's intervals over questions.
    """
    rows: list[tuple[str, str, dict[str, Interval]]] = [
        ("before training (S)", "", record.before),
        ("after training (R)", "", record.after),
    ]
    for each in record.repairs:
        rows.append((each.kind, "".join(f"<br>{label(line, 90)}" for line in each.what), each.accuracy))
    height = 22 + 12 * len(record.cues)
    panel = _rows([name for name, _, _ in rows], height)
    _ceiling(panel, record)
    for i, cue in enumerate(record.cues):
        role = " (trained)" if cue == record.trained_cue else " (harmed)" if cue == record.harmed_cue else ""
        lift, marks = 12 / height * (i - (len(record.cues) - 1) / 2), []
        for y, (name, what, accuracy) in enumerate(rows):
            value = accuracy.get(cue, NOT_MEASURED)
            marks.append(Mark(y + lift, value, f"{name}, cue {label(cue)}<br>accuracy {number(value)}{what}"))
        marker = {"color": cue_colour(cue, record.cues), "symbol": SYMBOLS[i % len(SYMBOLS)], "size": 11}
        dots(panel, marks, whisker=(2, 5, None), marker=marker, name=f"cue {label(cue)}{role}")
    closed = [DASH, DASH, *(number(each.gap_closed, 2) for each in record.repairs)]
    beside(panel, "<b>gap closed</b>", closed, 13)
    rule(panel, y=1.5, color="#BBBBBB")  # between what RL did and what repairs it
    return panel.figure


def repair_nulls(record: RepairRecord) -> Figure:
    """Accuracy under the harmed cue with the same repair at random places, and with the repair itself.

    Probabilities with the record's intervals over questions; of random places their median.
    """
    panel = _rows([each.kind for each in record.repairs], 70)
    _ceiling(panel, record)
    at = record.after.get(record.harmed_cue, NOT_MEASURED)
    if at.measured:
        dashed = {"color": INK, "width": 1.5, "dash": "dash"}
        rule(panel, x=at.value, below=True, **dashed)
        entry(panel.figure, "R, not repaired", line=dashed)

    def hover(y: int, i: int) -> str:
        each = record.repairs[y]
        return (
            f"{each.kind} at {label(each.random.places[i], 80)}<br>cue {label(record.harmed_cue)} "
            f"{number(each.random.harmed[i])}, cue {label(record.trained_cue)} {number(each.random.trained[i])}"
        )

    controls(panel, [each.random.harmed for each in record.repairs], hover, (0.0, 0.56), name="at random places")
    found = [(each.kind, each.accuracy.get(record.harmed_cue, NOT_MEASURED)) for each in record.repairs]
    marks = [Mark(y, value, f"{kind}: accuracy {number(value)}") for y, (kind, value) in enumerate(found)]
    colour = cue_colour(record.harmed_cue, record.cues)
    marker = {"color": colour, "symbol": "diamond", "size": 14, "line": {"color": INK, "width": 1.5}}
    dots(panel, marks, whisker=(2, 6), marker=marker, name="the repair itself")
    medians = [
        DASH
        if each.random.above is None
        else f"median {number(each.random.median, 2)}<br>{reaching(each.random)} reach it"
        for each in record.repairs
    ]
    beside(panel, "<b>random places</b>", medians, 13)
    panel.figure.update_xaxes(title_text=f"accuracy under cue {label(record.harmed_cue)} (probability)")
    return panel.figure


def reaching(random: Random) -> str:
    """How many random places do as well as the repair, in words."""
    number = len(random.harmed)
    return DASH if random.above is None else f"{round(random.above * number)} of {number}"


def _rows(names: list[str], each: int) -> Panel:
    """Accuracy across, named rows down, and a margin at the right for what stands beside them."""
    panel = single(each * max(len(names), 1) + 130, {"l": 110, "r": 190, "t": 74, "b": 56})
    look = {"range": [-0.03, 1.04], "tickvals": [0, 0.25, 0.5, 0.75, 1], "zeroline": False}
    panel.figure.update_xaxes(title_text="accuracy (probability)", **look)
    row_axis(panel, names)
    return panel


def _ceiling(panel: Panel, record: RepairRecord) -> None:
    """Dotted: the best forced accuracy of S under the harmed cue."""
    if not record.ceiling.measured:
        return
    line = {"color": cue_colour(record.harmed_cue, record.cues), "width": 2, "dash": "dot"}
    rule(panel, x=record.ceiling.value, below=True, **line)
    # lines that are shapes have no place in the legend
    entry(panel.figure, f"ceiling {number(record.ceiling, 2)}", line=line)
