"""Figures of grafts and of the mechanism verdict draw the numbers of their records."""

from __future__ import annotations

import json
import re

import pytest
from test_figures import HOSTILE, around, panel

from mixturelens import figures
from mixturelens.grafting.record import (
    UNMEASURED,
    Block,
    Component,
    Effects,
    Factorial,
    Graft,
    GraftRecord,
    Null,
    Part,
    PathAttribution,
    PlacedGraft,
    Rollback,
    Search,
)
from mixturelens.routing.mechanism import Line, Mechanism
from mixturelens.types import NOT_MEASURED, Interval

PARTS = ("L0.attn", "L0.mlp", "L1.attn", "L1.mlp", "L2.attn", "L2.mlp")


def make_effects(routing: float | None, specialists: float | None = None, done: float = 0.0004) -> Effects:
    if routing is None:
        return Effects(**dict.fromkeys(Effects.model_fields, NOT_MEASURED))
    return Effects(
        routing=around(routing, 0.02),
        weight=around(min(1.0, 1.4 * routing), 0.02),
        specialists=NOT_MEASURED if specialists is None else around(specialists, 0.05),
        chosen=around(max(0.0, 0.28 * routing), 0.01),
        done=Interval(value=done, low=0.5 * done, high=2 * done),
        moved=around(max(0.0, 0.28 * routing), 0.01),
        share=around(0.98, 0.01),
    )


def make_component(i: int, name: str, cells: tuple[str, ...], changed: bool) -> Component:
    """The first suffices and is not needed, the fourth is both, the others neither."""
    suffices, without = ((0.98, 0.81), (0.12, 0.95), (0.05, 0.99), (0.82, 0.3), (0.02, 1.0), (0.21, 0.93))[i % 6]
    return Component(
        name=name,
        suffices=make_effects(suffices, 0.9 if changed and i == 1 else 0.0 if changed else None),
        without=make_effects(without, 0.2 if changed and i == 1 else 1.0 if changed else None),
        routing=around((2.6, 0.3, 0.1, 2.1, 0.05, 0.4)[i % 6], 0.15),
        specialists={cell: around(0.01 * i - 0.02 * (j == 1), 0.01) for j, cell in enumerate(cells)},
        shapley=around((0.42, 0.06, 0.02, 0.4, 0.01, 0.09)[i % 6]),
    )


def make_graft(words: str = "", cues=("A", "B"), policies=("a", "b"), changed: bool = False, **changes) -> GraftRecord:
    cells = tuple(f"{policy}@{cue}" for policy in policies for cue in cues)
    fields = {
        "policies": policies[:2],
        "method": "literal",
        "cues": cues,
        "questions": 200,
        "change": {f"routing@{cue}": around(5.1) for cue in cues} | {cell: around(-0.004) for cell in cells},
        "after": make_effects(1.0, 1.0 if changed else None),
        "parts": tuple(Part(name=n, parameters=16384, change=0.05 * (n in PARTS)) for n in (*PARTS, "unembed")),
        "components": tuple(make_component(i, f"{n}{words}", cells, changed) for i, n in enumerate(PARTS)),
        "groups": {
            name: Graft(components=PARTS[start::2], effects=make_effects(share, 0.5 if changed else None))
            for name, start, share in ((f"attention{words}", 0, 0.99), ("MLPs", 1, 0.9))
        },
        "path": tuple(PathAttribution(metric=f"routing@{cue}", change=5.1, sum=5.1004, points=32) for cue in cues),
        "factorial": Factorial(
            selector=(f"L0.attn{words}",),
            enough=True,
            questions=100,
            selector_only=make_effects(0.98, 0.1 if changed else None),
            rest_only=make_effects(0.81, 0.9 if changed else None),
            both=make_effects(1.0, 1.0 if changed else None),
            noise=tuple(make_effects(0.01 * (-1) ** i * i, done=0.001 * i) for i in range(8)),
        ),
        "specialist_part": None,
        "placed": tuple(
            PlacedGraft(positions=positions, effects=make_effects(share, 0.3 if changed else None))
            for positions, share in (
                (("cue",), 0.02),
                (("hint",), 0.4),
                (("question",), 0.01),
                (("rest",), 0.0),
                (("last",), 0.55),
                (("policy",), 0.0),
                (("answer",), 0.0),
                (("cue", "hint", "question", "rest", "last"), 1.0),
                (("policy", "answer"), 0.0),
            )
        ),
        "rollback": Rollback(
            components=(f"L0.attn{words}",),
            enough=True,
            accuracy={
                cue: {"before": around(0.5), "after": around(0.97 if c == 0 else 0.02), "rollback": around(0.61)}
                for c, cue in enumerate(cues)
            },
            checkpoint=f"rl-A-rollback{words}",
        ),
        "null": Null(chosen=0.004, done=0.0006),
        "missing": (f"Shapley: too many{words}",),
        **changes,
    }
    return GraftRecord(**fields)


def make_mechanism(words: str = "", agrees: bool = True) -> Mechanism:
    lines = {
        "all weights, selector": ("selector", around(0.27), 0.004, True, "S with all of R's weights"),
        "all weights, specialists": ("specialists", around(0.0004, 0.0002), 0.0006, False, "What policies do"),
        "one part, selector": ("selector", around(0.21), 0.08, True, "R's L0.attn in S alone"),
        "one part, specialists": ("specialists", around(0.004, 0.003), None, None, "R's L1.mlp in S alone"),
        "features, selector": ("selector", around(0.1), 0.12, None, "R's values of 8 features"),
        "features, specialists": ("specialists", around(0.001, 0.001), 0.0, False, "R's values of 8 features"),
    }
    return Mechanism(
        verdict="routing",
        agrees=agrees,
        share=around(0.99, 0.005),
        reason=f"R's weights move S's choice by 0.270 bits{words}",
        evidence={
            name: Line(
                source=name.split(",")[0], about=about, effect=effect, null=null, changed=state, what=what + words
            )
            for name, (about, effect, null, state, what) in lines.items()
        },
    )


def marks(figure, row: int, column: int) -> dict[str, list[float | None]]:
    return {trace.name.split(":")[0]: list(trace.x) for trace in panel(figure, row, column)}


def yellow(figure) -> list[tuple[float, str]]:
    return [(shape.y0 + 0.5, shape.xref) for shape in figure.layout.shapes if shape.type == "rect"]


def test_components_draw_what_suffices_what_is_needed_and_shapley():
    record = make_graft()
    figure = figures.components({"one": record})
    found = marks(figure, 1, 1)
    assert found["suffices"] == [0.98, 0.12, 0.05, 0.82, 0.02, 0.21, 0.99, 0.9]
    assert found["needed"][:6] == pytest.approx([0.19, 0.05, 0.01, 0.7, 0.0, 0.07])
    assert found["needed"][6:] == [None, None], "of groups it was not measured"
    assert found["Shapley share"][:6] == [each.shapley.value for each in record.components]
    assert list(figure.layout.yaxis.ticktext) == [*PARTS, "attention", "MLPs"]
    (needed,) = [trace for trace in figure.data if trace.name.startswith("needed")]
    assert list(needed.error_x.array)[:6] == pytest.approx([0.02] * 6)


def make_searched(layers: int = 30) -> GraftRecord:
    """As of a model of 30 layers: groups, halved where they matter, and 92 components of which few were grafted."""
    names = ["embed", *(f"L{i}.{part}" for i in range(layers) for part in ("attn", "mlp", "norms")), "final_norm"]
    blocks: list[Block] = []

    def look(first: int, last: int) -> None:
        members = tuple(name for name in names if "." in name and first <= int(name[1:].split(".")[0]) <= last)
        share = (last - first + 1) / layers
        blocks.append(
            Block(
                name=f"layer {first}" if first == last else f"layers {first}-{last}",
                components=members,
                suffices=make_effects(share),
                without=make_effects(1 - share),
                bound=share,
                opened=share >= 0.1,
                attributed=0.03,
            )
        )
        if share >= 0.1:
            middle = (first + last) // 2
            look(first, middle)
            look(middle + 1, last)

    for i in (0, -1):
        effects = make_effects(0.01)
        block = Block(name=names[i], components=(names[i],), suffices=effects, without=make_effects(0.99), bound=0.01)
        blocks.append(block)
        if i == 0:
            look(0, layers - 1)
    parts = tuple(Part(name=name, parameters=1000, change=0.0005) for name in names)
    components = tuple(
        make_component(i, name, ("a@A", "a@B", "b@A", "b@B"), False).model_copy(
            update={"suffices": UNMEASURED, "without": UNMEASURED, "shapley": NOT_MEASURED}
        )
        for i, name in enumerate(names)
    )
    search = Search(questions=8, threshold=0.1, grafts=2 * len(blocks), blocks=tuple(blocks))
    return make_graft(parts=parts, components=components, search=search)


def test_a_search_has_a_row_for_every_block_and_none_for_what_was_not_grafted():
    record = make_searched()
    assert record.search is not None
    figure = figures.components({"one": record})
    rows = list(figure.layout.yaxis.ticktext)
    assert rows == [*(block.name for block in record.search.blocks), "attention", "MLPs"]
    assert 20 < len(rows) < 50
    assert marks(figure, 1, 1)["suffices"][0] == 0.01
    assert figure.layout.height >= 24 * len(rows)


def test_of_many_components_the_plane_names_those_that_have_room():
    record = make_searched()
    figure = figures.plane(record)
    names = {part.name for part in record.parts}
    for at in {a.xref for a in figure.layout.annotations if a.text in names}:
        axis = figure.layout[at.replace("x", "xaxis")]
        wide = 350 / (axis.range[1] - axis.range[0])
        found = [
            a for a in figure.layout.annotations if a.text in names and (a.xref, a.yref) == (at, at.replace("x", "y"))
        ]
        up = figure.layout[at.replace("x", "yaxis")].range
        places = [(a.x * wide, a.y * 230 / (up[1] - up[0]) + a.yshift, 3.6 * len(a.text)) for a in found]
        assert found
        for i, (x, y, half) in enumerate(places):
            assert all(abs(x - u) > half + w or abs(y - v) > 14 for u, v, w in places[:i])


def test_redundant_components_are_marked_and_needed_ones_are_not():
    """L0.attn suffices and is not needed; L1.mlp suffices and is needed."""
    assert yellow(figures.components({"one": make_graft()})) == [(0, "x")]
    wide = make_graft().components[0]
    unsure = wide.model_copy(
        update={"suffices": wide.suffices.model_copy(update={"routing": Interval(value=0.9, low=0.4, high=1.2)})}
    )
    assert not yellow(figures.components({"one": make_graft(components=(unsure,))}))


def test_components_of_ten_runs_share_one_figure_and_one_order():
    late = make_graft()
    late = late.model_copy(update={"components": late.components[2:], "groups": {}})
    runs = {f"seed {seed}, RL on {cue}": make_graft() for seed in range(5) for cue in "AB"} | {"<late>": late}
    figure = figures.components(runs)
    titles = [a.text for a in figure.layout.annotations]
    assert titles[:2] == ["<b>seed 0, RL on A</b>", "<b>seed 0, RL on B</b>"]
    assert titles[-1] == "<b>&lt;late&gt;</b>"
    assert marks(figure, 3, 1)["suffices"] == [None, None, 0.05, 0.82, 0.02, 0.21, None, None]
    assert sum(bool(trace.showlegend) for trace in figure.data if trace.name.startswith("suffices")) == 1


def test_components_of_specialists_are_their_own_share():
    figure = figures.components({"one": make_graft(changed=True)}, "specialists")
    found = marks(figure, 1, 1)
    assert found["suffices"][:3] == [0.0, 0.9, 0.0]
    assert found["needed"][1] == pytest.approx(0.8)
    assert "Shapley share" not in found


def test_components_of_the_weight_saturate():
    """Where the log-odds of L1.mlp are still short of R's, its weight is not."""
    found = marks(figures.components({"one": make_graft()}, "weight"), 1, 1)
    assert found["suffices"][:4] == pytest.approx([1.0, 0.168, 0.07, 1.0])
    assert found["needed"][0] == pytest.approx(0.0)


def test_plane_has_a_panel_for_each_policy_under_each_cue():
    record = make_graft(cues=("A", "B", "C"))
    figure = figures.plane(record)
    for i, policy in enumerate(("a", "b"), start=1):
        for j, cue in enumerate(("A", "B", "C"), start=1):
            (points,) = panel(figure, i, j)
            assert list(points.x) == [each.routing.value for each in record.components]
            values = [each.specialists[f"{policy}@{cue}"] for each in record.components]
            assert list(points.y) == [value.value for value in values]
            assert list(points.error_y.array) == pytest.approx([0.01] * 6)
            assert list(points.error_x.array) == pytest.approx([0.15] * 6)
    axes = figure.get_subplot(1, 1)
    # small changes of specialists look small beside large ones of routing
    wide, high = (axis.range[1] - axis.range[0] for axis in (axes.xaxis, axes.yaxis))
    assert high > wide / 4
    assert {"L0.attn", "L1.mlp"} <= {a.text for a in figure.layout.annotations}


def test_factorial_shows_routing_specialists_and_noise():
    record = make_graft()
    figure = figures.factorial(record)
    assert record.factorial is not None
    rows = list(figure.get_subplot(1, 1).yaxis.ticktext)
    assert rows[0] == "R's selector,<br>S's rest"
    for j, field in enumerate(("weight", "chosen", "done"), start=1):
        grafts, noise = panel(figure, 1, j)[:2]
        assert list(grafts.x) == [
            getattr(each, field).value
            for each in (record.factorial.selector_only, record.factorial.rest_only, record.factorial.both)
        ]
        assert list(noise.x) == [getattr(each, field).value for each in record.factorial.noise]
        assert set(noise.y) != {3}
        assert all(abs(y - 3) < 0.3 for y in noise.y)
    dashed = [(shape.x0, shape.xref) for shape in figure.layout.shapes if shape.line.dash == "dash"]
    assert dashed == [(0.004, "x2"), (0.0006, "x3")]


def test_specialists_have_a_panel_where_they_changed():
    titles = [a.text for a in figures.factorial(make_graft(changed=True)).layout.annotations]
    assert titles == [
        "<b>Weight</b> of the policy",
        "<b>Specialists</b>",
        "<b>Which policy</b>",
        "<b>What policies do</b>",
    ]
    with pytest.raises(ValueError, match="no factorial"):
        figures.factorial(make_graft(factorial=None))


def test_placed_draws_positions_and_their_unions():
    record = make_graft()
    figure = figures.placed(record)
    (routing,) = panel(figure, 1, 1)[:1]
    assert list(routing.x) == [each.effects.weight.value for each in record.placed]
    rows = list(figure.get_subplot(1, 1).yaxis.ticktext)
    assert rows[0] == "cue"
    assert rows[7] == "cue + hint + question +<br>rest + last"


def test_effects_that_were_not_measured_are_no_points():
    gone = make_graft().placed[0].model_copy(update={"effects": make_effects(None)})
    (routing, *_) = panel(figures.placed(make_graft(placed=(gone,))), 1, 1)
    assert list(routing.x) == [None]
    assert routing.hovertext[0].endswith(figures.DASH)


def test_evidence_stands_beside_its_null():
    mechanism = make_mechanism()
    figure = figures.evidence(mechanism)
    lines = sorted(mechanism.evidence.values(), key=lambda line: line.about != "selector")
    traces = {trace.name: trace for trace in figure.data}
    assert list(traces["selector"].x) == [line.effect.value for line in lines[:3]]
    assert list(traces["specialists"].x) == [line.effect.value for line in lines[3:]]
    assert list(traces["noise of the same size"].x) == [line.null for line in lines if line.null is not None]
    says = [a.text for a in figure.layout.annotations][1:]
    assert says == ["changed", "changed", "cannot say", "unchanged", "cannot say", "unchanged"]
    assert figure.layout.xaxis.title.text == "bits from S"


def test_names_of_grafts_are_shown_literally():
    cues, policies = ("<A>", HOSTILE), (HOSTILE, "<b>")
    record = make_graft(HOSTILE, cues, policies)
    drawn = [
        figures.components({HOSTILE: record}),
        figures.plane(record),
        figures.factorial(record),
        figures.placed(record),
        figures.evidence(make_mechanism(HOSTILE)),
    ]
    for figure in drawn:
        text = json.dumps(figure.to_plotly_json(), default=list, ensure_ascii=False)
        assert not re.search(r"</?script|<A>|<[0-9]|<- ", text)
