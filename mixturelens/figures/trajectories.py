"""Figures along training, and before and after: weights, forced and expected accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mixturelens.behaviour.trajectory import CueState
from mixturelens.figures.marks import Mark, columns, line
from mixturelens.figures.panels import Panel, panels, rule
from mixturelens.figures.style import GREY, INK, SYMBOLS, cue_colour, is_rl, new_figure, policy_colour
from mixturelens.figures.words import cue_title, label, number, policy_name
from mixturelens.types import NOT_MEASURED, OTHER, Interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.behaviour.record import BehaviourRecord, CueSide
    from mixturelens.behaviour.trajectory import Trajectory
    from mixturelens.routing.repair import Repair, RepairRecord


_NOTHING = CueState(weights={}, forced={}, accuracy=NOT_MEASURED)
"""Of a cue that was not measured."""


class _Run(NamedTuple):
    """Points of measurement along a line: where each is, and its name."""

    x: Sequence[float]
    names: Sequence[str]


def trajectory(record: Trajectory) -> Figure:
    """One stage of training: a column a cue; weights, forced accuracy, expected accuracy and, for RL, reward.

    Probabilities with the record's intervals over questions, by step; rewards are means over a step's completions.
    """
    cues = _cues_of(record)
    states = {cue: [point.cues.get(cue, _NOTHING) for point in record.points] for cue in cues}
    steps = [float(point.step) for point in record.points]
    axis = "GRPO step" if is_rl(record) else "SFT step"
    run = _Run(steps, [f"step {point.step}" for point in record.points])
    figure = _panels(run, states, reward=bool(record.reward))
    pad = max(record.steps, 1) * 0.03
    figure.update_xaxes(range=[-pad, max(record.steps, 1) + pad])
    if record.reward:
        _rewards(Panel(figure, 4, 1), record)
        figure.update_yaxes(title_text="reward, share", row=4, col=1)
        figure.update_xaxes(title_text=axis, row=4, col=1)
    else:
        for column in range(1, len(cues) + 1):
            figure.update_xaxes(title_text=axis, row=3, col=column)
    return figure


def _rewards(panel: Panel, record: Trajectory) -> None:
    """The reward of step n is of the completions sampled for it, so the first belongs to the checkpoint before."""
    for name, values, colour, dash in (
        ("mean training reward", record.reward, INK, "solid"),
        ("groups without signal", record.no_signal, GREY, "dot"),
    ):
        if values:
            at = list(range(1, len(values) + 1))
            hover = [f"{name}<br>step {step}: {number(value)}" for step, value in zip(at, values, strict=True)]
            line(panel, at, values, hover, name=name, line={"color": colour, "dash": dash, "width": 2})


def before_after(record: BehaviourRecord) -> Figure:
    """The same panels as `trajectory` for two checkpoints, for pairs whose training was not watched."""
    sides: dict[str, list[CueState]] = {}
    for cue in record.cues:
        both = (record.per_cue[cue].before, record.per_cue[cue].after)
        sides[cue] = [_state_of(side) for side in both if side is not None]
    names = ["before", "after"][: max(len(states) for states in sides.values())]
    figure = _panels(_Run([float(i) for i in range(len(names))], names), sides, reward=False)
    figure.update_xaxes(tickvals=list(range(len(names))), ticktext=names, range=[-0.3, len(names) - 0.7])
    return figure


def accuracy_along_rl(record: Trajectory, trained_cue: str | None, repair: RepairRecord | None = None) -> Figure:
    """Expected accuracy of all cues while RL trains on one; dotted, what the other cues' best policy could still do.

    Probabilities with the record's intervals over questions, by step. With a `repair`, the best of them stands behind
    the last step.
    """
    cues = _cues_of(record)
    figure = new_figure(380)
    # no panel titles in the way: plotly makes room for as many lines as the legend takes
    figure.update_layout(margin={"t": 20}, legend={"y": 1.03, "yref": "paper", "yanchor": "bottom"})
    steps = [point.step for point in record.points]
    for i, cue in enumerate(cues):
        states = [point.cues.get(cue, _NOTHING) for point in record.points]
        trained = cue == trained_cue
        run = _Run(steps, [f"cue {label(cue)}, step {step}" for step in steps])
        look = {"color": cue_colour(cue, cues), "width": 3 if trained else 2.5}
        title = f"cue {label(cue)}" + (" (trained)" if trained else "")
        symbol = SYMBOLS[i % len(SYMBOLS)]
        _line(Panel(figure), run, [state.accuracy for state in states], title, line=look, symbol=symbol)
        if trained or not states or not (best := _best_policy(states[0])):
            continue
        title = f"cue {label(cue)}, policy {label(best)} put in place"
        run = _Run(steps, [f"{title}, step {step}" for step in steps])
        values = [state.forced.get(best, NOT_MEASURED) for state in states]
        _line(Panel(figure), run, values, title, line={**look, "width": 1.5, "dash": "dot"}, mode="lines")
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
        marker = {"symbol": "diamond", "size": 12, "color": colour, "line": {"color": "white", "width": 1}}
        name = f"cue {label(cue)}, repaired ({label(best.kind)})"
        mark = Mark(at, accuracy, f"cue {label(cue)}, repaired by {label(best.kind)}<br>{number(accuracy)}")
        columns(Panel(figure), [mark], whisker=(1.5, 3, colour), marker=marker, name=name)
    ticks = sorted({0, *(round(end * part / 4) for part in range(1, 5))})
    figure.update_xaxes(range=[-0.03 * end, 1.2 * end], tickvals=[*ticks, at], ticktext=[*map(str, ticks), "repaired"])
    rule(Panel(figure), x=1.06 * end, dash="dot", color=GREY)


def _cues_of(record: Trajectory) -> list[str]:
    return list(dict.fromkeys(cue for point in record.points for cue in point.cues))


def _state_of(side: CueSide) -> CueState:
    """What a side of a pair says about a cue, as a point of a trajectory says it."""

    def interval(key: str, value: float | None) -> Interval:
        return side.intervals.get(key, Interval(value=value))

    return CueState(
        weights={name: interval(f"weights.{name}", value) for name, value in side.weights.items()},
        forced={name: interval(f"accuracy.{name}", value) for name, value in side.accuracy.items()},
        accuracy=interval("overall", side.overall),
    )


def _best_policy(state: CueState) -> str | None:
    known = {name: value.value for name, value in state.forced.items() if value.value is not None}
    return max(known, key=lambda name: known[name], default=None)


def _panels(run: _Run, states: Mapping[str, Sequence[CueState]], reward: bool) -> Figure:
    """A column a cue; rows: weights, forced accuracy, expected accuracy and room for the reward of all."""
    cues = list(states)
    figure = _grid(cues, 4 if reward else 3)
    policies = list(dict.fromkeys(name for row in states.values() for state in row for name in state.weights))
    # a line of legend holds about six
    figure.update_layout(margin={"t": 70 + 24 * ((len(policies) + 2 * reward) // 6)})
    for column, (cue, row) in enumerate(states.items(), start=1):
        _policies(figure, column, run, (cue, row), policies)
        look = {"color": cue_colour(cue, cues), "width": 2.5}
        named = _Run(run.x, [f"cue {label(cue)}, {name}<br>expected accuracy" for name in run.names])
        more = {"line": look, "symbol": "circle-open", "showlegend": False}
        values = [state.accuracy for state in row]
        _line(Panel(figure, 3, column), named, values, f"expected accuracy, cue {label(cue)}", **more)
    for row, title in enumerate(("policy weight", "forced accuracy", "expected accuracy"), start=1):
        for column in range(1, max(len(cues), 1) + 1):
            figure.update_yaxes(range=[-0.05, 1.05], row=row, col=column, tickvals=[0, 0.25, 0.5, 0.75, 1])
        figure.update_yaxes(title_text=f"{title}<br>(probability)", row=row, col=1)
    return figure


def _grid(cues: Sequence[str], rows: int) -> Figure:
    """Empty panels, a column a cue; the fourth row is one panel for all."""
    columns = max(len(cues), 1)
    grid: list[list[dict[str, int] | None]] = [[{} for _ in range(columns)] for _ in range(3)]
    if rows == 4:
        grid.append([{"colspan": columns}, *[None] * (columns - 1)])
    titles = [cue_title(cue, columns) for cue in cues]
    more: dict[str, Any] = {"specs": grid, "column_titles": titles}
    more |= {"vertical_spacing": 0.24 / rows, "horizontal_spacing": 0.12 / columns}
    return panels((rows, columns), [], 130 + 190 * rows, {}, **more)[0]


def _policies(
    figure: Figure, column: int, run: _Run, of: tuple[str, Sequence[CueState]], policies: Sequence[str]
) -> None:
    """Weights of all policies under a cue, and below them the accuracy with each put in place."""
    cue, states = of
    known = [name for name in policies if name != OTHER]
    for i, policy in enumerate(policies):
        look: dict[str, Any] = {"line": {"color": policy_colour(policy, known), "width": 2}}
        look["symbol"] = SYMBOLS[i % len(SYMBOLS)]
        weights = [state.weights.get(policy, NOT_MEASURED) for state in states]
        rows = [(1, "weight of", weights)]
        if policy != OTHER:  # else there is no announcement to put in place
            rows.append((2, "accuracy with", [state.forced.get(policy, NOT_MEASURED) for state in states]))
        for row, what, values in rows:
            named = _Run(run.x, [f"cue {label(cue)}, {name}<br>{what} {policy_name(policy)}" for name in run.names])
            legend = row == column == 1
            _line(Panel(figure, row, column), named, values, policy_name(policy), showlegend=legend, **look)


def _line(panel: Panel, run: _Run, values: Sequence[Interval], name: str, **look: Any) -> None:
    """A line with whiskers: a band would draw intervals between the steps, where nothing was measured."""
    named = zip(run.x, values, run.names, strict=True)
    marks = [Mark(x, value, f"{text}<br>{number(value)}") for x, value, text in named]
    colour = look["line"]["color"]
    look["marker"] = {"symbol": look.pop("symbol", "circle"), "size": 7, "color": colour}
    look = {"mode": "lines+markers", "connectgaps": False, "legendgroup": name, **look}
    columns(panel, marks, whisker=(1.5, 3, colour), name=name, **look)
