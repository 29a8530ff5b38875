"""Repair of transfer: what it brings back, and what the same repair does at random places."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mixturelens.figures.marks import old_whiskers as whiskers
from mixturelens.figures.style import DASH, GREY, INK, SYMBOLS, cue_colour, jitter, label, new_figure, number
from mixturelens.types import Interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.routing.repair import Random, RepairRecord


def repairs(record: RepairRecord) -> Figure:
    """Accuracy under every cue before RL, after it and repaired; dotted, the most that a repair could reach."""
    rows: list[tuple[str, str, dict[str, Interval]]] = [
        ("before RL (S)", "", record.before),
        ("after RL (R)", "", record.after),
        *(
            (repair.kind, "<br>".join(label(line, 90) for line in repair.what), repair.accuracy)
            for repair in record.repairs
        ),
    ]
    figure = _rows([name for name, _, _ in rows], 22 + 12 * len(record.cues))
    _ceiling(figure, record)
    step = 12 / (22 + 12 * len(record.cues))
    for i, cue in enumerate(record.cues):
        values = [accuracy.get(cue, Interval()) for _, _, accuracy in rows]
        up, down = whiskers(values)
        role = "trained" if cue == record.trained_cue else "harmed" if cue == record.harmed_cue else ""
        figure.add_scatter(
            x=[value.value for value in values],
            y=[y + step * (i - (len(record.cues) - 1) / 2) for y in range(len(rows))],
            error_x={"array": up, "arrayminus": down, "thickness": 2, "width": 5},
            mode="markers",
            marker={"color": cue_colour(cue, record.cues), "symbol": SYMBOLS[i % len(SYMBOLS)], "size": 11},
            name=f"cue {label(cue)}" + (f" ({role})" if role else ""),
            hovertext=[
                f"{name}, cue {label(cue)}<br>accuracy {number(value)}" + (f"<br>{what}" if what else "")
                for (name, what, _), value in zip(rows, values, strict=True)
            ],
            hoverinfo="text",
        )
    _beside(figure, "<b>gap closed</b>", [DASH, DASH, *(number(repair.gap_closed, 2) for repair in record.repairs)])
    # between what RL did and what repairs it
    figure.add_hline(y=1.5, line={"color": "#BBBBBB", "width": 1})  # pyright: ignore[reportArgumentType]
    return figure


def repair_nulls(record: RepairRecord) -> Figure:
    """Accuracy under the harmed cue with the same repair at random places, and with the repair itself."""
    figure = _rows([repair.kind for repair in record.repairs], 70)
    _ceiling(figure, record)
    if record.harmed_cue in record.after and record.after[record.harmed_cue].measured:
        at = record.after[record.harmed_cue].value
        figure.add_vline(x=at, line={"color": INK, "width": 1.5, "dash": "dash"}, layer="below")  # pyright: ignore[reportArgumentType]
        figure.add_scatter(
            x=[None], y=[None], mode="lines", name="R, not repaired", line={"color": INK, "width": 1.5, "dash": "dash"}
        )
    colour = cue_colour(record.harmed_cue, record.cues)
    points = [(y, i, repair) for y, repair in enumerate(record.repairs) for i in range(len(repair.random.harmed))]
    figure.add_scatter(
        x=[repair.random.harmed[i] for _, i, repair in points],
        y=[y + 0.56 * jitter(i) for y, i, _ in points],
        mode="markers",
        marker={"color": GREY, "size": 7, "opacity": 0.7},
        name="at random places",
        hovertext=[
            f"{repair.kind} at {label(repair.random.places[i], 80)}<br>cue {label(record.harmed_cue)} "
            f"{number(repair.random.harmed[i])}, cue {label(record.trained_cue)} {number(repair.random.trained[i])}"
            for _, i, repair in points
        ],
        hoverinfo="text",
    )
    values = [repair.accuracy.get(record.harmed_cue, Interval()) for repair in record.repairs]
    up, down = whiskers(values)
    figure.add_scatter(
        x=[value.value for value in values],
        y=list(range(len(values))),
        error_x={"array": up, "arrayminus": down, "thickness": 2, "width": 6, "color": INK},
        mode="markers",
        marker={"color": colour, "symbol": "diamond", "size": 14, "line": {"color": INK, "width": 1.5}},
        name="the repair itself",
        hovertext=[
            f"{repair.kind}: accuracy {number(value)}" for repair, value in zip(record.repairs, values, strict=True)
        ],
        hoverinfo="text",
    )
    _beside(
        figure,
        "<b>random places</b>",
        [
            DASH
            if repair.random.above is None
            else f"median {number(repair.random.median, 2)}<br>{reaching(repair.random)} reach it"
            for repair in record.repairs
        ],
    )
    figure.update_xaxes(title_text=f"accuracy under cue {label(record.harmed_cue)} (probability)")
    return figure


def reaching(random: Random) -> str:
    """How many random places do as well as the repair, in words."""
    number = len(random.harmed)
    return DASH if random.above is None else f"{round(random.above * number)} of {number}"


def _rows(names: list[str], each: int) -> Figure:
    """Accuracy across, named rows down, and a margin at the right for what stands beside them."""
    figure = new_figure(each * max(len(names), 1) + 130)
    figure.update_layout(margin={"l": 110, "r": 190, "t": 74, "b": 56}, hovermode="closest")
    figure.update_xaxes(
        title_text="accuracy (probability)", range=[-0.03, 1.04], tickvals=[0, 0.25, 0.5, 0.75, 1], zeroline=False
    )
    figure.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=names,
        range=[len(names) - 0.45, -0.55],
        showgrid=False,
        zeroline=False,
    )
    return figure


def _ceiling(figure: Figure, record: RepairRecord) -> None:
    """Dotted: the best forced accuracy of S under the harmed cue."""
    if not record.ceiling.measured:
        return
    line = {"color": cue_colour(record.harmed_cue, record.cues), "width": 2, "dash": "dot"}
    figure.add_vline(x=record.ceiling.value, line=line, layer="below")  # pyright: ignore[reportArgumentType]
    # lines that are shapes have no place in the legend
    figure.add_scatter(x=[None], y=[None], mode="lines", name=f"ceiling {number(record.ceiling, 2)}", line=line)


def _beside(figure: Figure, title: str, texts: list[str]) -> None:
    """Text at the right of each row, under a title."""
    for y, text in enumerate([title, *texts], start=-1):
        at = {"y": 1, "yref": "paper", "yanchor": "bottom"} if y < 0 else {"y": y, "yref": "y", "yanchor": "middle"}
        figure.add_annotation(
            text=text, x=1.015, xref="paper", xanchor="left", align="left", showarrow=False, font={"size": 13}, **at
        )
