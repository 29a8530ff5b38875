"""What RL on one side of a cue did to the other side, over seeds: lost, still there, and repaired."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mixturelens.figures.heat import across
from mixturelens.figures.marks import Mark, columns
from mixturelens.figures.panels import Panel, panels
from mixturelens.figures.style import SYMBOLS, cue_colour
from mixturelens.figures.words import label, number, show, show_interval
from mixturelens.types import NOT_MEASURED, Interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.behaviour.record import CueSide
    from mixturelens.routing.repair import RepairRecord
    from mixturelens.routing.verdict import VerdictRecord

KINDS = ("interchange", "reroute")
"""Repairs that are shown: through the cue reader, and through the selector."""


def transfer(pairs: Sequence[tuple[str, VerdictRecord, RepairRecord]]) -> Figure:
    """Expected accuracy, a probability: a panel for each cue that RL trained on; a point a seed.

    Whiskers are the records' intervals over questions.
    """
    cues = list(pairs[0][1].per_cue)
    trained = [cue for cue in cues if any(repair.trained_cue == cue for _, _, repair in pairs)]
    steps = ["trained side", "other side", "other side,<br>silent policy<br>put in place"]
    steps += [f"other side,<br>repaired:<br>{kind}" for kind in KINDS]
    titles = {"column_titles": [f"RL on {label(cue)}" for cue in trained]}
    spacing = {"shared_yaxes": True, "horizontal_spacing": 0.04}
    figure, panes = panels((1, len(trained)), [], 440, {}, **titles, **spacing)
    for panel, cue in zip(panes, trained, strict=False):
        shown = [pair for pair in pairs if pair[2].trained_cue == cue]
        for i, (name, verdict, repair) in enumerate(shown):
            values = [
                overall(verdict, cue),
                overall(verdict, repair.harmed_cue),
                silent(verdict, repair.harmed_cue),
                *(_repaired(repair, kind) for kind in KINDS),
            ]
            shift, said = 0.14 * (i - (len(shown) - 1) / 2), f"{label(name)}, RL on {label(cue)}<br>"
            marks = [
                Mark(x + shift, value, f"{said}{step.replace('<br>', ' ')}: {number(value)}")
                for x, (step, value) in enumerate(zip(steps, values, strict=True))
            ]
            colours = [cue_colour(cue, cues), *[cue_colour(repair.harmed_cue, cues)] * (len(steps) - 1)]
            marker = {"color": colours, "symbol": SYMBOLS[i % len(SYMBOLS)], "size": 10}
            look: dict[str, Any] = {"marker": marker, "name": label(name), "legendgroup": name}
            columns(panel, marks, whisker=(1.5, 4, None), showlegend=panel.first, **look)
    across(Panel(figure), steps, showgrid=None)
    figure.update_yaxes(range=[-0.04, 1.04])
    figure.update_yaxes(title_text="expected accuracy<br>(held-out questions)", col=1)
    return figure


COLUMNS = ("seed, RL on", "that side", "other side", "silent policy, forced", "verdict, routing share", "cue reader")


def transfer_table(pairs: Sequence[tuple[str, VerdictRecord, RepairRecord]]) -> str:
    """The same numbers as a Markdown table, with those of `KINDS` at the most that random places reach."""
    lines = [(*COLUMNS, *KINDS, "most at random places"), ("---",) * (len(COLUMNS) + len(KINDS) + 1)]
    for name, verdict, repair in pairs:
        harmed, null = repair.harmed_cue, [each for each in repair.repairs if each.kind in KINDS]
        lines.append(
            (
                f"{name}, {repair.trained_cue}",
                show_interval(overall(verdict, repair.trained_cue)),
                show_interval(overall(verdict, harmed), 4),
                show_interval(silent(verdict, harmed)),
                f"{verdict.verdict}, {show_interval(verdict.routing_share)}",
                " + ".join(f"L{head.layer}.{head.head}" for head in repair.heads),
                *(show_interval(_repaired(repair, kind)) for kind in KINDS),
                ", ".join(show(max(each.random.harmed, default=None)) for each in null),
            )
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _after(verdict: VerdictRecord, cue: str) -> CueSide | None:
    return verdict.per_cue[cue].after


def overall(verdict: VerdictRecord, cue: str) -> Interval:
    """Expected accuracy in R under a cue."""
    side = _after(verdict, cue)
    return NOT_MEASURED if side is None else side.intervals.get("overall", Interval(value=side.overall))


def silent(verdict: VerdictRecord, cue: str) -> Interval:
    """Forced accuracy in R of the policy that was best under this cue in S."""
    side, accuracy = _after(verdict, cue), verdict.per_cue[cue].before.accuracy
    known = {name: value for name, value in accuracy.items() if value is not None}
    best = max(known, key=lambda name: known[name], default=None)
    return (
        NOT_MEASURED
        if side is None or best is None
        else side.intervals.get(f"accuracy.{best}", Interval(value=side.accuracy[best]))
    )


def _repaired(repair: RepairRecord, kind: str) -> Interval:
    return next((each.accuracy[repair.harmed_cue] for each in repair.repairs if each.kind == kind), NOT_MEASURED)
