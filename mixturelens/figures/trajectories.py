"""Figures along training, and before and after: weights, forced and expected accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mixturelens.figures.style import (
    GREY,
    INK,
    SYMBOLS,
    cue_colour,
    cue_title,
    is_rl,
    label,
    new_figure,
    number,
    policy_colour,
    policy_name,
    style,
)
from mixturelens.types import NOT_MEASURED, OTHER, Interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.behaviour.record import BehaviourRecord, CueSide
    from mixturelens.behaviour.trajectory import Trajectory
    from mixturelens.routing.repair import Repair, RepairRecord


class _CueState(NamedTuple):
    """What both a point of a trajectory and a side of a pair say about one cue."""

    weights: Mapping[str, Interval]
    forced: Mapping[str, Interval]
    accuracy: Interval


def trajectory(record: Trajectory) -> Figure:
    """One stage of training: a column a cue; weights, forced accuracy, expected accuracy and, for RL, reward."""
    cues = _cues_of(record)
    states = {cue: [_state_at(point.cues.get(cue)) for point in record.points] for cue in cues}
    steps = [float(point.step) for point in record.points]
    axis = "GRPO step" if is_rl(record) else "SFT step"
    figure = _panels(steps, [f"step {point.step}" for point in record.points], states, reward=bool(record.reward))
    pad = max(record.steps, 1) * 0.03
    figure.update_xaxes(range=[-pad, max(record.steps, 1) + pad])
    if record.reward:
        # the reward of step n is of the completions sampled for it, so the first belongs to the checkpoint before
        for name, values, colour, dash in (
            ("mean training reward", record.reward, INK, "solid"),
            ("groups without signal", record.no_signal, GREY, "dot"),
        ):
            if values:
                at = list(range(1, len(values) + 1))
                hover = [f"{name}<br>step {step}: {number(value)}" for step, value in zip(at, values, strict=True)]
                figure.add_scatter(
                    x=at,
                    y=list(values),
                    mode="lines",
                    name=name,
                    hovertext=hover,
                    hoverinfo="text",
                    line={"color": colour, "dash": dash, "width": 2},
                    row=4,
                    col=1,
                )
        figure.update_yaxes(title_text="reward, share", row=4, col=1)
        figure.update_xaxes(title_text=axis, row=4, col=1)
    else:
        for column in range(1, len(cues) + 1):
            figure.update_xaxes(title_text=axis, row=3, col=column)
    return figure


def before_after(record: BehaviourRecord) -> Figure:
    """The same panels as `trajectory` for two checkpoints, for pairs whose training was not watched."""
    sides: dict[str, list[_CueState]] = {}
    for cue in record.cues:
        both = (record.per_cue[cue].before, record.per_cue[cue].after)
        sides[cue] = [_state_of(side) for side in both if side is not None]
    names = ["before", "after"][: max(len(states) for states in sides.values())]
    figure = _panels([float(i) for i in range(len(names))], names, sides, reward=False)
    figure.update_xaxes(tickvals=list(range(len(names))), ticktext=names, range=[-0.3, len(names) - 0.7])
    return figure


def accuracy_along_rl(record: Trajectory, trained_cue: str | None, repair: RepairRecord | None = None) -> Figure:
    """Expected accuracy of all cues while RL trains on one; dotted, what the other cues' best policy could still do.

    With a `repair`, the best of them stands behind the last step.
    """
    cues = _cues_of(record)
    steps = [point.step for point in record.points]
    figure = new_figure(380)
    # no panel titles in the way: plotly makes room for as many lines as the legend takes
    figure.update_layout(margin={"t": 20}, legend={"y": 1.03, "yref": "paper", "yanchor": "bottom"})
    for i, cue in enumerate(cues):
        states = [_state_at(point.cues.get(cue)) for point in record.points]
        trained = cue == trained_cue
        role = " (trained)" if trained else ""
        line = {"color": cue_colour(cue, cues), "width": 3 if trained else 2.5}
        _line(
            figure,
            steps,
            [state.accuracy for state in states],
            f"cue {label(cue)}{role}",
            [f"cue {label(cue)}, step {step}" for step in steps],
            line,
            SYMBOLS[i % len(SYMBOLS)],
        )
        if trained or not states or not (best := _best_policy(states[0])):
            continue
        _line(
            figure,
            steps,
            [state.forced.get(best, NOT_MEASURED) for state in states],
            f"cue {label(cue)}, policy {label(best)} put in place",
            [f"cue {label(cue)}, policy {label(best)} put in place, step {step}" for step in steps],
            {**line, "width": 1.5, "dash": "dot"},
            None,
        )
    end = max(record.steps, 1)
    figure.update_xaxes(title_text="GRPO step", range=[-0.03 * end, 1.03 * end])
    figure.update_yaxes(title_text="accuracy (probability)", range=[-0.04, 1.04])
    if repair is not None and repair.best is not None:
        _behind(figure, repair.best, cues, end)
    return figure


def _behind(figure: Figure, best: Repair, cues: Sequence[str], end: float) -> None:
    """A repair, for every cue that it was judged on, behind the last step."""
    at = 1.12 * end
    for cue, accuracy in best.accuracy.items():
        colour = cue_colour(cue, cues)
        up, down = whiskers([accuracy])
        figure.add_scatter(
            x=[at],
            y=[accuracy.value],
            error_y={"array": up, "arrayminus": down, "color": colour, "thickness": 1.5, "width": 3},
            mode="markers",
            marker={"symbol": "diamond", "size": 12, "color": colour, "line": {"color": "white", "width": 1}},
            name=f"cue {label(cue)}, repaired ({label(best.kind)})",
            hovertext=[f"cue {label(cue)}, repaired by {label(best.kind)}<br>{number(accuracy)}"],
            hoverinfo="text",
        )
    ticks = sorted({0, *(round(end * part / 4) for part in range(1, 5))})
    figure.update_xaxes(range=[-0.03 * end, 1.2 * end], tickvals=[*ticks, at], ticktext=[*map(str, ticks), "repaired"])
    figure.add_vline(x=1.06 * end, line={"dash": "dot", "width": 1, "color": GREY})


def _cues_of(record: Trajectory) -> list[str]:
    return list(dict.fromkeys(cue for point in record.points for cue in point.cues))


def _state_at(state: Any) -> _CueState:
    return _CueState({}, {}, NOT_MEASURED) if state is None else _CueState(state.weights, state.forced, state.accuracy)


def _state_of(side: CueSide) -> _CueState:
    return _CueState(
        {name: side.intervals.get(f"weights.{name}", Interval(value=value)) for name, value in side.weights.items()},
        {name: side.intervals.get(f"accuracy.{name}", Interval(value=value)) for name, value in side.accuracy.items()},
        side.intervals.get("overall", Interval(value=side.overall)),
    )


def _best_policy(state: _CueState) -> str | None:
    known = {name: value.value for name, value in state.forced.items() if value.value is not None}
    return max(known, key=lambda name: known[name], default=None)


def _panels(
    x: Sequence[float], names: Sequence[str], states: Mapping[str, Sequence[_CueState]], reward: bool
) -> Figure:
    """A column a cue; rows: weights, forced accuracy, expected accuracy and room for the reward of all."""
    from plotly.subplots import make_subplots

    cues = list(states)
    columns = max(len(cues), 1)
    rows = 4 if reward else 3
    grid: list[list[dict[str, int] | None]] = [[{} for _ in range(columns)] for _ in range(3)]
    if reward:
        grid.append([{"colspan": columns}, *[None] * (columns - 1)])
    figure = make_subplots(
        rows=rows,
        cols=columns,
        specs=grid,
        column_titles=[cue_title(cue, columns) for cue in cues],
        vertical_spacing=0.24 / rows,
        horizontal_spacing=0.12 / columns,
    )
    style(figure, 130 + 190 * rows)
    policies = list(dict.fromkeys(name for run in states.values() for state in run for name in state.weights))
    known = [name for name in policies if name != OTHER]
    figure.update_layout(
        margin={"t": 70 + 24 * ((len(policies) + 2 * reward) // 6)}
    )  # a line of legend holds about six
    for column, (cue, run) in enumerate(states.items(), start=1):
        for i, policy in enumerate(policies):
            line = {"color": policy_colour(policy, known), "width": 2}
            for row, what, values in (
                (1, "weight of", [state.weights.get(policy, NOT_MEASURED) for state in run]),
                (2, "accuracy with", [state.forced.get(policy, NOT_MEASURED) for state in run]),
            ):
                if row == 2 and policy == OTHER:
                    continue  # there is no announcement to put in place
                _line(
                    figure,
                    x,
                    values,
                    policy_name(policy),
                    [f"cue {label(cue)}, {name}<br>{what} {policy_name(policy)}" for name in names],
                    line,
                    SYMBOLS[i % len(SYMBOLS)],
                    row,
                    column,
                    legend=row == 1 and column == 1,
                )
        _line(
            figure,
            x,
            [state.accuracy for state in run],
            f"expected accuracy, cue {label(cue)}",
            [f"cue {label(cue)}, {name}<br>expected accuracy" for name in names],
            {"color": cue_colour(cue, cues), "width": 2.5},
            "circle-open",
            3,
            column,
            legend=False,
        )
    for row, title in enumerate(("policy weight", "forced accuracy", "expected accuracy"), start=1):
        for column in range(1, columns + 1):
            figure.update_yaxes(range=[-0.05, 1.05], row=row, col=column, tickvals=[0, 0.25, 0.5, 0.75, 1])
        figure.update_yaxes(title_text=f"{title}<br>(probability)", row=row, col=1)
    return figure


def _line(
    figure: Figure,
    x: Sequence[float],
    values: Sequence[Interval],
    name: str,
    hover: Sequence[str],
    line: Mapping[str, Any],
    symbol: str | None,
    row: int | None = None,
    column: int | None = None,
    legend: bool = True,
) -> None:
    """A line with whiskers: a band would draw intervals between the steps, where nothing was measured."""
    up, down = whiskers(values)
    figure.add_scatter(
        x=list(x),
        y=[value.value for value in values],
        error_y={"array": up, "arrayminus": down, "color": line["color"], "thickness": 1.5, "width": 3},
        mode="lines+markers" if symbol else "lines",
        connectgaps=False,
        line=dict(line),
        marker={"symbol": symbol or "circle", "size": 7, "color": line["color"]},
        name=name,
        legendgroup=name,
        showlegend=legend,
        hovertext=[f"{text}<br>{number(value)}" for text, value in zip(hover, values, strict=True)],
        hoverinfo="text",
        row=row,
        col=column,
    )


def whiskers(values: Sequence[Interval]) -> tuple[list[float | None], list[float | None]]:
    """Lengths of the whiskers up and down, which is how plotly wants an interval."""
    up = [None if v.value is None or v.high is None else max(v.high - v.value, 0.0) for v in values]
    down = [None if v.value is None or v.low is None else max(v.value - v.low, 0.0) for v in values]
    return up, down
