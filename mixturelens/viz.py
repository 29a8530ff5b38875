"""Records to plotly figures: the only importer of plotly. Every number drawn is a number of the record."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mixturelens.types import NOT_MEASURED, OTHER, Interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mixturelens.behaviour.record import BehaviourRecord, Cell, CueSide, Nats
    from mixturelens.routing import VerdictRecord
    from mixturelens.training import Trajectory

DASH = "–"
"""Shown where nothing was measured."""
INTERVALS = "95% bootstrap over questions"

# Okabe-Ito, shared out so that no policy looks like a cue; what comes after are Tol's muted colours
_POLICIES = ("#0072B2", "#D55E00", "#CC79A7", "#332288", "#882255", "#117733")
_CUES = ("#009E73", "#E69F00", "#000000", "#56B4E9", "#AA4499", "#999933")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
_GREY = "#8C8C8C"
_INK = "#222222"
_ROUTER, _SPECIALIST = "#44546A", "#B8860B"
_TERMS = {
    "routing": _ROUTER,
    "wording": "#9AA5B4",
    "conditioning": "#DDAA33",
    "skill": _SPECIALIST,
    "specialist": _SPECIALIST,
    "other": _GREY,
    "dormant": "#C9C9C9",
}
_SCALE = ((0.0, "#FFFFFF"), (1.0, "#8CCFC0"))
"""Ends light, so that dark text can be read on every cell."""


def label(text: str, limit: int = 28) -> str:
    """User text as plotly shows it literally: plotly reads a subset of HTML in every label and hover text.

    >>> label("<A>")
    '&lt;A&gt;'
    """
    text = " ".join(text.split())
    return html.escape(text if len(text) <= limit else text[: limit - 1] + "…", quote=False)


def show(value: float | None, digits: int = 3) -> str:
    """A number for the eye; a dash where nothing was measured, and a tiny number is not a zero.

    >>> show(0.25), show(-1e-6), show(0.0), show(None)
    ('0.250', '>−0.001', '0', '–')
    """
    if value is None:
        return DASH
    least = 10**-digits
    if value != 0 and abs(value) < least / 2:
        return f"<{least:.{digits}f}" if value > 0 else f">−{least:.{digits}f}"
    return f"{value:.{digits}f}".replace("-", "−") if value else "0"


def show_interval(value: Interval, digits: int = 3) -> str:
    """A number and its interval, `0.998 [0.995, 1.000]`."""
    if value.value is None:
        return DASH
    if value.low is None or value.high is None:
        return show(value.value, digits)
    low, high = (show(x, digits) for x in (value.low, value.high))
    return f"{show(value.value, digits)} [{low}, {high}]"


def _number(value: Interval | float | None, digits: int = 3) -> str:
    """As `show`, for plotly, where the `<` of `<0.001` would open a tag."""
    text = show_interval(value, digits) if isinstance(value, Interval) else show(value, digits)
    return html.escape(text, quote=False)


def _cue_title(cue: str, columns: int) -> str:
    """The name of a cue over one of several panels, cut so that neighbours do not overlap."""
    return f"cue {label(cue, min(28, max(8, 100 // columns)))}"


def _policy_name(policy: str) -> str:
    return "other (no known policy)" if policy == OTHER else f"policy {label(policy)}"


def policy_colour(policy: str, policies: Sequence[str]) -> str:
    """The colour of a policy everywhere, by its place in the suite; completions of no known policy are grey."""
    return _GREY if policy == OTHER else _POLICIES[list(policies).index(policy) % len(_POLICIES)]


def cue_colour(cue: str, cues: Sequence[str]) -> str:
    return _CUES[list(cues).index(cue) % len(_CUES)]


def is_rl(record: Trajectory) -> bool:
    return bool(record.reward) or record.stage.startswith("rl")


# ---------------------------------------------------------------------------------------------------------------
# along training


class _State(NamedTuple):
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
            ("mean training reward", record.reward, _INK, "solid"),
            ("groups without signal", record.no_signal, _GREY, "dot"),
        ):
            if values:
                at = list(range(1, len(values) + 1))
                hover = [f"{name}<br>step {step}: {_number(value)}" for step, value in zip(at, values, strict=True)]
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
    sides: dict[str, list[_State]] = {}
    for cue in record.cues:
        both = (record.per_cue[cue].before, record.per_cue[cue].after)
        sides[cue] = [_state_of(side) for side in both if side is not None]
    names = ["before", "after"][: max(len(states) for states in sides.values())]
    figure = _panels([float(i) for i in range(len(names))], names, sides, reward=False)
    figure.update_xaxes(tickvals=list(range(len(names))), ticktext=names, range=[-0.3, len(names) - 0.7])
    return figure


def accuracy_along_rl(record: Trajectory, trained_cue: str | None) -> Figure:
    """Expected accuracy of all cues while RL trains on one; dotted, what the other cues' best policy could still do."""
    cues = _cues_of(record)
    steps = [point.step for point in record.points]
    figure = _figure(380)
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
            _SYMBOLS[i % len(_SYMBOLS)],
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
    figure.update_xaxes(title_text="GRPO step", range=[-0.03 * max(record.steps, 1), 1.03 * max(record.steps, 1)])
    figure.update_yaxes(title_text="accuracy (probability)", range=[-0.04, 1.04])
    return figure


def _cues_of(record: Trajectory) -> list[str]:
    return list(dict.fromkeys(cue for point in record.points for cue in point.cues))


def _state_at(state: Any) -> _State:
    return _State({}, {}, NOT_MEASURED) if state is None else _State(state.weights, state.forced, state.accuracy)


def _state_of(side: CueSide) -> _State:
    return _State(
        {name: side.intervals.get(f"weights.{name}", Interval(value=value)) for name, value in side.weights.items()},
        {name: side.intervals.get(f"accuracy.{name}", Interval(value=value)) for name, value in side.accuracy.items()},
        side.intervals.get("overall", Interval(value=side.overall)),
    )


def _best_policy(state: _State) -> str | None:
    known = {name: value.value for name, value in state.forced.items() if value.value is not None}
    return max(known, key=lambda name: known[name], default=None)


def _panels(x: Sequence[float], names: Sequence[str], states: Mapping[str, Sequence[_State]], reward: bool) -> Figure:
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
        column_titles=[_cue_title(cue, columns) for cue in cues],
        vertical_spacing=0.24 / rows,
        horizontal_spacing=0.12 / columns,
    )
    _style(figure, 130 + 190 * rows)
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
                    _policy_name(policy),
                    [f"cue {label(cue)}, {name}<br>{what} {_policy_name(policy)}" for name in names],
                    line,
                    _SYMBOLS[i % len(_SYMBOLS)],
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
    up, down = _whiskers(values)
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
        hovertext=[f"{text}<br>{_number(value)}" for text, value in zip(hover, values, strict=True)],
        hoverinfo="text",
        row=row,
        col=column,
    )


def _whiskers(values: Sequence[Interval]) -> tuple[list[float | None], list[float | None]]:
    """Lengths of the whiskers up and down, which is how plotly wants an interval."""
    up = [None if v.value is None or v.high is None else max(v.high - v.value, 0.0) for v in values]
    down = [None if v.value is None or v.low is None else max(v.value - v.low, 0.0) for v in values]
    return up, down


# ---------------------------------------------------------------------------------------------------------------
# what changed between two checkpoints


class _Bar(NamedTuple):
    name: str
    value: Interval
    colour: str
    apart: bool = False
    """Not part of the sum: drawn hatched, below a line."""
    note: str = ""


def kl_split(pairs: Sequence[tuple[str, VerdictRecord]]) -> Figure:
    """KL(after || before) in nats, a row of panels a pair: the mean over cues, then every cue."""
    rows: list[list[tuple[str, list[_Bar]]]] = []
    for _, verdict in pairs:
        nats = {cue: state.nats for cue, state in verdict.per_cue.items()}
        # the specialist's term stands alone where the suite names no behaviours to split it by
        split = verdict.nats.conditioning.measured and verdict.nats.skill.measured
        rows.append(
            [("mean over cues", _terms(verdict.nats, split))]
            + [
                (_cue_title(cue, 1 + len(nats)), [] if part is None else _terms(part, split))
                for cue, part in nats.items()
            ]
        )
    return _bar_grid([name for name, _ in pairs], rows, "nats", None)


def accuracy_split(pairs: Sequence[tuple[str, VerdictRecord]]) -> Figure:
    """Change of expected accuracy, a row of panels a pair and a column a cue: what the selector and specialists did."""
    rows: list[list[tuple[str, list[_Bar]]]] = []
    for _, verdict in pairs:
        panels: list[tuple[str, list[_Bar]]] = []
        for cue, state in verdict.per_cue.items():
            change = state.accuracy_change
            bars = (
                []
                if change is None
                else [
                    _Bar("selector", change.selector, _ROUTER),
                    _Bar("specialists", change.specialists, _SPECIALIST),
                    _Bar("total", change.total, _INK),
                ]
            )
            panels.append((_cue_title(cue, len(verdict.per_cue)), bars))
        rows.append(panels)
    return _bar_grid([name for name, _ in pairs], rows, "change of accuracy (probability)", (-1.0, 1.0))


def _terms(nats: Nats, split: bool) -> list[_Bar]:
    names = ["routing", "wording", "conditioning", "skill", *([] if split else ["specialist"]), "other", "dormant"]
    notes = {
        "skill": f"<br>of which behaviours new to a policy: {_number(nats.novel)}",
        "dormant": "<br>specialist term at equal policy weights; not part of the sum",
    }
    return [_Bar(name, getattr(nats, name), _TERMS[name], name == "dormant", notes.get(name, "")) for name in names]


def _bar_grid(
    pairs: Sequence[str],
    rows: Sequence[Sequence[tuple[str, Sequence[_Bar]]]],
    unit: str,
    span: tuple[float, float] | None,
) -> Figure:
    """Horizontal bars with whiskers, and each number at the right edge of its panel."""
    from plotly.subplots import make_subplots

    columns = max((len(row) for row in rows), default=1)
    longest = max((len(bars) for row in rows for _, bars in row), default=1)
    height = 34 * longest + 74
    figure = make_subplots(
        rows=max(len(rows), 1),
        cols=max(columns, 1),
        horizontal_spacing=0.06 / max(columns, 1),
        vertical_spacing=min(0.5, 74 / (height * max(len(rows), 1))),
        subplot_titles=[_panel_title(pairs, row, i, j) for i, row in enumerate(rows) for j in range(columns)],
    )
    _style(figure, height * max(len(rows), 1) + 50)
    figure.update_layout(showlegend=False, margin={"l": 105, "t": 56})
    ends = [end for row in rows for _, bars in row for bar in bars for end in _ends(bar.value)]
    low, high = span or (min([0.0, *ends]), max([1e-3, *ends]))
    for i, row in enumerate(rows, start=1):
        for j, (panel, bars) in enumerate(row, start=1):
            places = [-k - (0.5 if bar.apart else 0.0) for k, bar in enumerate(bars)]
            _draw_bars(figure, bars, places, panel, i, j)
            # a third of the panel is left for the numbers
            figure.update_xaxes(
                range=[low - 0.04 * (high - low), high + 0.55 * (high - low)],
                tickvals=[-1, -0.5, 0, 0.5, 1] if span else None,
                nticks=5,
                showgrid=False,
                title_text=unit if i == len(rows) else None,
                zeroline=True,
                zerolinecolor="#999999",
                row=i,
                col=j,
            )
            figure.update_yaxes(
                tickvals=places,
                ticktext=[bar.name for bar in bars],
                showticklabels=j == 1,
                showgrid=False,
                range=[min(places, default=0) - 0.6, 0.6],
                zeroline=False,
                row=i,
                col=j,
            )
    return figure


def _panel_title(pairs: Sequence[str], row: Sequence[tuple[str, Sequence[_Bar]]], i: int, j: int) -> str:
    if j >= len(row):
        return ""
    return f"<b>{label(pairs[i], 40)}</b><br>{row[j][0]}" if j == 0 else f"<br>{row[j][0]}"


def _draw_bars(
    figure: Figure, bars: Sequence[_Bar], places: Sequence[float], panel: str, row: int, column: int
) -> None:
    for apart in (False, True):
        drawn = [(bar, place) for bar, place in zip(bars, places, strict=True) if bar.apart == apart]
        if not drawn:
            continue
        up, down = _whiskers([bar.value for bar, _ in drawn])
        pattern = {"pattern": {"shape": "/", "fgcolor": "#666666"}} if apart else {}
        figure.add_bar(
            x=[bar.value.value for bar, _ in drawn],
            y=[place for _, place in drawn],
            orientation="h",
            width=0.62,
            error_x={"array": up, "arrayminus": down, "color": _INK, "thickness": 1.5, "width": 4},
            # plotly.js cannot draw a pattern over a list of colours
            marker={"color": drawn[0][0].colour if apart else [bar.colour for bar, _ in drawn], **pattern},
            hovertext=[f"{panel}<br>{bar.name}: {_number(bar.value)}{bar.note}" for bar, _ in drawn],
            hoverinfo="text",
            name=panel,
            row=row,
            col=column,
        )
    for bar, place in zip(bars, places, strict=True):
        figure.add_annotation(
            text=_number(bar.value.value),
            x=1,
            xref="x domain",
            xanchor="right",
            y=place,
            showarrow=False,
            font={"size": 13, "color": _INK},
            row=row,
            col=column,
        )
        if bar.apart:
            figure.add_hline(y=place + 0.75, line={"color": "#BBBBBB", "width": 1, "dash": "dot"}, row=row, col=column)  # pyright: ignore[reportArgumentType]


def _ends(value: Interval) -> list[float]:
    return [end for end in (value.low, value.value, value.high) if end is not None]


# ---------------------------------------------------------------------------------------------------------------
# the policy table


def policy_table(record: BehaviourRecord, threshold: float = 0.02) -> Figure:
    """What each policy does under each cue once put in place, before and after; cells that moved are outlined."""
    from plotly.subplots import make_subplots

    rows = list(dict.fromkeys((cell.policy, cell.announcement) for cell in record.table))
    rows.sort(key=lambda row: record.policies.index(row[0]))
    cells = {(cell.policy, cell.announcement, cell.cue): cell for cell in record.table}
    sides = [False, True] if any(cell.accuracy_after is not None for cell in record.table) else [False]
    figure = make_subplots(
        rows=1, cols=len(sides), column_titles=["before", "after"][: len(sides)], horizontal_spacing=0.03
    )
    _style(figure, 58 * max(len(rows), 1) + 104)
    figure.update_layout(margin={"l": 230, "t": 84, "b": 20}, showlegend=False)
    narrow = len(record.cues) * 3 if len(sides) > 1 else len(record.cues)  # a column here is narrower than a panel
    # ticks at the top stand between the panel and its title
    figure.update_annotations(yshift=26)
    for column, after in enumerate(sides, start=1):
        grid = [[cells.get((*row, cue)) for cue in record.cues] for row in rows]
        figure.add_heatmap(
            z=[[_accuracy(cell, after) for cell in line] for line in grid],
            x=list(range(len(record.cues))),
            y=list(range(len(rows))),
            text=[[_cell_text(cell, after) for cell in line] for line in grid],
            texttemplate="%{text}",
            textfont={"color": _INK, "size": 13},
            hovertext=[[_cell_hover(cell, after) for cell in line] for line in grid],
            hoverinfo="text",
            zmin=0,
            zmax=1,
            colorscale=[list(stop) for stop in _SCALE],
            showscale=column == len(sides),
            colorbar={
                "title": {"text": "forced accuracy<br>(probability)", "side": "right", "font": {"size": 12}},
                "thickness": 12,
                "lenmode": "pixels",
                "len": 150,
            },
            xgap=3,
            ygap=3,
            row=1,
            col=column,
        )
        figure.update_xaxes(
            tickvals=list(range(len(record.cues))),
            ticktext=[_cue_title(cue, narrow) for cue in record.cues],
            side="top",
            tickangle=0,
            showgrid=False,
            zeroline=False,
            range=[-0.5, len(record.cues) - 0.5],
            row=1,
            col=column,
        )
        figure.update_yaxes(
            tickvals=list(range(len(rows))),
            ticktext=[_row_name(*row, record.policies) for row in rows],
            showgrid=False,
            zeroline=False,
            range=[len(rows) - 0.5, -0.5],
            showticklabels=column == 1,
            row=1,
            col=column,
        )
        for y, line in enumerate(grid):
            for x, cell in enumerate(line):
                if after and cell is not None and _moved(cell, threshold):
                    figure.add_shape(
                        type="rect",
                        x0=x - 0.48,
                        x1=x + 0.48,
                        y0=y - 0.46,
                        y1=y + 0.46,
                        line={"color": _INK, "width": 3},
                        row=1,
                        col=column,
                    )
        for y in range(1, len(rows)):
            if rows[y][0] != rows[y - 1][0]:
                figure.add_hline(y=y - 0.5, line={"color": "#777777", "width": 1}, row=1, col=column)  # pyright: ignore[reportArgumentType]
    return figure


def _moved(cell: Cell, threshold: float) -> bool:
    changes = (cell.behaviour_change.value, cell.accuracy_change.value)
    return any(change is not None and abs(change) > threshold for change in changes)


def _accuracy(cell: Cell | None, after: bool) -> float | None:
    return None if cell is None else cell.accuracy_after if after else cell.accuracy_before


def _cell_text(cell: Cell | None, after: bool) -> str:
    accuracy = _accuracy(cell, after)
    if cell is None or accuracy is None:
        return DASH
    right = f"right {_number(accuracy)}"
    shown = (cell.shown_after if after else cell.shown_before) or {}
    if not shown:
        return right
    usual = max(shown, key=lambda name: shown[name])
    return f"<b>{label(usual, 16)}</b> {_number(shown[usual])}<br>{right}"


def _cell_hover(cell: Cell | None, after: bool) -> str:
    if cell is None:
        return "not measured"
    lines = [f"policy {label(cell.policy)} put in place by {label(cell.announcement, 60)}", f"cue {label(cell.cue)}"]
    shown = (cell.shown_after if after else cell.shown_before) or {}
    lines += [f"shows {label(name)}: {_number(value, 4)}" for name, value in shown.items()]
    lines.append(f"right: {_number(_accuracy(cell, after), 4)}")
    if after:
        if cell.behaviour is not None:
            lines.append(f"change of {label(cell.behaviour)}: {_number(cell.behaviour_change, 4)}")
        lines.append(f"change of accuracy: {_number(cell.accuracy_change, 4)}")
    return "<br>".join(lines)


def _row_name(policy: str, announcement: str, policies: Sequence[str]) -> str:
    square = f'<span style="color:{policy_colour(policy, policies)}">■</span>'
    return f"{square} {label(policy, 14)}" + (f"  {label(announcement, 27)}" if announcement.strip() else "")


# ---------------------------------------------------------------------------------------------------------------
# how figures look and travel


def _figure(height: int) -> Figure:
    from plotly.graph_objects import Figure

    return _style(Figure(), height)


def _style(figure: Figure, height: int) -> Figure:
    """The look of a figure, set on it alone: other figures of the session stay as they are."""
    figure.update_layout(
        template="plotly_white",
        height=height,
        font={"family": "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif", "size": 13, "color": _INK},
        margin={"l": 80, "r": 24, "t": 70, "b": 56},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top"},
        hoverlabel={"align": "left", "bgcolor": "white"},
    )
    figure.update_xaxes(showline=True, linecolor="#BBBBBB", gridcolor="#EEEEEE", type="linear", title_font_size=13)
    figure.update_yaxes(showline=True, linecolor="#BBBBBB", gridcolor="#EEEEEE", type="linear", title_font_size=13)
    figure.update_annotations(font_size=14)
    return figure


def regimes(verdicts: Mapping[tuple[float, float], VerdictRecord], trained_cue: str) -> Figure:
    """Verdicts of RL on one cue over a grid of (Adam's epsilon, learning rate), coloured by routing share.

    A cell says its verdict, the routing share with its interval, what changed, and the expected accuracy under each cue
    after RL.
    """
    from plotly.graph_objects import Figure, Heatmap

    epsilons, rates = (sorted({key[i] for key in verdicts}) for i in (0, 1))
    shares = [[_share(verdicts.get((e, r))) for r in rates] for e in epsilons]
    texts = [[_regime_text(verdicts.get((e, r))) for r in rates] for e in epsilons]
    figure = Figure(
        Heatmap(
            z=shares,
            x=[_power(rate) for rate in rates],
            y=[_power(epsilon) for epsilon in epsilons],
            text=texts,
            texttemplate="%{text}",
            textfont={"size": 13},
            hoverinfo="text",
            zmin=0,
            zmax=1,
            colorscale=[(0.0, "#F2D79B"), (1.0, "#A9B7CC")],
            colorbar={"title": {"text": "routing share"}},
            xgap=3,
            ygap=3,
        )
    )
    _style(figure, 160 + 120 * len(epsilons))
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
    after = [f"{label(cue)} {_number(s.after.overall, 2)}" for cue, s in record.per_cue.items() if s.after]
    share = f"share {_number(record.routing_share, 2)}"
    return f"<b>{record.verdict}</b><br>{share}<br>{', '.join(changed) or 'nothing'}<br>{', '.join(after)}"


def figure_html(figure: Figure, name: str) -> str:
    """A figure as a `<div id=name>` for a page that holds `plotly_script()`."""
    import plotly.io

    config = {"displaylogo": False, "responsive": True, "displayModeBar": False}
    return plotly.io.to_html(figure, config=config, full_html=False, include_plotlyjs=False, div_id=name)


def plotly_script() -> str:
    """plotly.js itself, for the inside of a `<script>` element."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()
