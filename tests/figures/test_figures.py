"""Figures draw the numbers of records: nothing else, nothing less, and names literally."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from mixturelens import figures
from mixturelens.behaviour.record import (
    AccuracyChange,
    BehaviourRecord,
    Bits,
    Controls,
    CueBehaviour,
    CueSide,
    Nats,
    TableCell,
    Text,
)
from mixturelens.behaviour.trajectory import CueState, Trajectory, TrajectoryPoint
from mixturelens.records import Provenance
from mixturelens.routing.verdict import Changed, VerdictControls, VerdictRecord
from mixturelens.types import NOT_MEASURED, OTHER, Interval

HOSTILE = "</script><script>document.title='owned'</script><b>x</b>"
POLICIES = ("a", "b")
CUES = ("A", "B")


def around(value: float, width: float = 0.01) -> Interval:
    return Interval(value=value, low=value - width, high=value + width)


def make_terms(kind: type[Bits] | type[Nats], start: float = 0.1, split: bool = True) -> dict[str, Interval]:
    """Every term another number, so that none can be taken for another."""
    terms = {name: around(start + 0.01 * i, 0.001) for i, name in enumerate(kind.model_fields)}
    return terms if split else {**terms, "conditioning": NOT_MEASURED, "skill": NOT_MEASURED}


def make_side(weights: dict[str, float], accuracy: dict[str, float | None], overall: float) -> CueSide:
    intervals = {f"weights.{name}": around(value) for name, value in weights.items()}
    intervals |= {
        f"accuracy.{name}": NOT_MEASURED if value is None else around(value) for name, value in accuracy.items()
    }
    return CueSide(
        weights=weights, accuracy=accuracy, overall=overall, intervals={**intervals, "overall": around(overall)}
    )


def make_pair(
    policies: tuple[str, ...] = POLICIES,
    cues: tuple[str, ...] = CUES,
    wordings: int = 1,
    named: bool = True,
    after: str = "rl-A@1",
    words: str = "",
) -> tuple[BehaviourRecord, VerdictRecord]:
    """A pair in which the weights move to the first policy and the last policy breaks under the last cue."""
    per_cue = {}
    for c, cue in enumerate(cues):
        even = {name: round(0.9 / len(policies), 3) for name in policies} | {OTHER: 0.1}
        one = dict.fromkeys(policies, 0.0) | {policies[0]: 0.95, OTHER: 0.05}
        forced: dict[str, float | None] = {name: 0.9 - 0.1 * m - 0.05 * c for m, name in enumerate(policies)}
        per_cue[cue] = CueBehaviour(
            before=make_side(even, forced, 0.5 + 0.01 * c),
            after=make_side(one, {**forced, policies[-1]: None}, 0.75 - 0.3 * c),
            bits=Bits(**make_terms(Bits, 0.2 + 0.1 * c, named)),
            nats=Nats(**make_terms(Nats, 0.6 + 0.1 * c, named)),
            accuracy_change=AccuracyChange(
                selector=around(0.3 - 0.4 * c), specialists=around(-0.05), total=around(0.25 - 0.4 * c)
            ),
        )
    table = []
    for cue in cues:
        for name in policies:
            for w in range(wordings):
                moved = name == policies[-1] and cue == cues[-1]
                table.append(
                    TableCell(
                        cue=cue,
                        policy=name,
                        announcement=f"[{name}] {words}{w}",
                        behaviour="answer" if named else None,
                        shown_before={"refuse": 0.03, "answer": 0.97} if named else {},
                        shown_after=({"refuse": 0.6, "answer": 0.4} if moved else {"refuse": 0.04, "answer": 0.96})
                        if named
                        else {},
                        accuracy_before=0.95,
                        accuracy_after=0.35 if moved else 0.94,
                        behaviour_change=around(-0.57 if moved else -0.01) if named else NOT_MEASURED,
                        accuracy_change=around(-0.6 if moved else -0.01),
                    )
                )
    origin = Provenance(before="sft@0", after=after)
    controls = Controls(
        same_checkpoint=Bits(**dict.fromkeys(Bits.model_fields, around(0.0, 0.0))),
        noise=Bits(**dict.fromkeys(Bits.model_fields, around(0.01, 0.002))),
        shuffled_routing_share=NOT_MEASURED,
        independent_total=around(0.4),
        sum_agrees=False,
    )
    shared = {
        "routing_share": around(0.53),
        "router_share": NOT_MEASURED,
        "bits": Bits(**make_terms(Bits, split=named)),
        "text": Text(nats_per_token=around(0.0312)),
        "nats": Nats(**make_terms(Nats, 0.5, named)),
    }
    coverage = {"before": around(0.9), "after": around(0.95)}
    record = BehaviourRecord(
        provenance=origin,
        method="literal",
        policies=policies,
        cues=cues,
        trained_cue=cues[0],
        questions=20,
        coverage=coverage,
        per_cue=per_cue,
        moved=around(0.7),
        table=tuple(table),
        controls=controls,
        hinted={cues[0]: {"be-it": {"before": {policies[0]: 0.9}, "after": {policies[0]: 0.8}}}},
        **shared,
    )
    verdict = VerdictRecord(
        provenance=origin,
        verdict="both",
        changed=Changed(selector=True, cue_reader=None, skill=False),
        dormant_intact=False,
        text_drifted=True,
        reason=f"Both changed {words}.",
        per_cue=per_cue,
        coverage=coverage,
        controls=VerdictControls(pair=controls),
        **shared,
    )
    return record, verdict


def make_trajectory(
    policies: tuple[str, ...] = POLICIES, cues: tuple[str, ...] = CUES, stage: str = "rl-A", rl: bool = True
) -> Trajectory:
    """Three points; the last policy's forced accuracy was not measured at the second."""
    points = []
    for i in range(3):
        states = {}
        for c, cue in enumerate(cues):
            weights = {name: around(0.3 + 0.1 * i + 0.01 * m) for m, name in enumerate(policies)} | {
                OTHER: around(0.05)
            }
            forced = {name: around(0.9 - 0.2 * m - 0.01 * i) for m, name in enumerate(policies)}
            if i == 1:
                forced[policies[-1]] = NOT_MEASURED
            states[cue] = CueState(weights=weights, forced=forced, accuracy=around(0.5 + (0.2 if c == 0 else -0.2) * i))
        points.append(TrajectoryPoint(step=2 * i, cues=states))
    return Trajectory(
        provenance=Provenance(before="sft@0", after="rl-A@1"),
        stage=stage,
        steps=4,
        points=tuple(points),
        reward=(0.4, 0.6, 0.8, 1.0) if rl else (),
        no_signal=(0.0, 0.1, 0.5, 0.9) if rl else (),
    )


def panel(figure, row: int, column: int) -> list:
    """The traces of one panel."""
    axes = figure.get_subplot(row, column)
    name = axes.xaxis.plotly_name.replace("axis", "")
    return [trace for trace in figure.data if (trace.xaxis or "x") == name]


def drawn(trace) -> list[Interval]:
    """The intervals that a trace of whiskers shows."""
    found = []
    for y, up, down in zip(trace.y, trace.error_y.array, trace.error_y.arrayminus, strict=True):
        found.append(NOT_MEASURED if y is None else Interval(value=y, low=y - down, high=y + up))
    return found


def same(found: list[Interval], expected: list[Interval]) -> bool:
    return [x.value for x in found] == [x.value for x in expected] and all(
        x.value is None or (x.low, x.high) == pytest.approx((y.low, y.high))
        for x, y in zip(found, expected, strict=True)
    )


def all_figures(policies=POLICIES, cues=CUES, words=""):
    record, verdict = make_pair(policies, cues, words=words)
    run = make_trajectory(policies, cues, stage=f"rl-{cues[0]}")
    return [
        figures.trajectory(run),
        figures.accuracy_along_rl(run, cues[0]),
        figures.before_after(record),
        figures.accuracy_split([(words or "pair", verdict)]),
        figures.bits_split([(words or "pair", verdict)]),
        figures.policy_table(record),
    ]


def test_trajectory_draws_every_number_of_the_record():
    run = make_trajectory()
    figure = figures.trajectory(run)
    for column, cue in enumerate(CUES, start=1):
        states = [point.cues[cue] for point in run.points]
        weights, forced, expected = (panel(figure, row, column) for row in (1, 2, 3))
        for trace, policy in zip(weights, (*POLICIES, OTHER), strict=True):
            assert list(trace.x) == [0, 2, 4]
            assert same(drawn(trace), [state.weights[policy] for state in states])
        for trace, policy in zip(forced, POLICIES, strict=True):
            assert same(drawn(trace), [state.forced[policy] for state in states])
        assert same(drawn(expected[0]), [state.accuracy for state in states])
    reward, no_signal = panel(figure, 4, 1)
    assert list(reward.x) == [1, 2, 3, 4]
    assert tuple(reward.y) == run.reward
    assert tuple(no_signal.y) == run.no_signal


def test_trajectory_of_sft_has_no_reward_panel():
    figure = figures.trajectory(make_trajectory(stage="sft", rl=False))
    assert all("reward" not in (trace.name or "") for trace in figure.data)
    assert "SFT step" in {axis.title.text for axis in figure.select_xaxes()}


def test_what_was_not_measured_is_a_gap_and_not_a_zero():
    forced_b = panel(figures.trajectory(make_trajectory()), 2, 1)[1]
    assert forced_b.y[1] is None
    assert forced_b.connectgaps is False
    assert forced_b.hovertext[1].endswith(figures.DASH)


def test_a_policy_and_a_cue_keep_their_colour():
    policies, cues = ("x", "y", "z"), ("C", "D")
    record, _ = make_pair(policies, cues)
    run = make_trajectory(policies, cues)
    colours: dict[str, set[str]] = {}
    for figure in (figures.trajectory(run), figures.before_after(record), figures.accuracy_along_rl(run, "C")):
        for trace in figure.data:
            colours.setdefault(re.sub(r"expected accuracy, | \(trained\)|, policy.*", "", trace.name), set()).add(
                trace.line.color
            )
    known = [f"policy {name}" for name in policies] + [f"cue {cue}" for cue in cues] + ["other (no known policy)"]
    assert all(len(colours[name]) == 1 for name in known)
    assert len(set.union(*(colours[name] for name in known))) == len(known)


def test_accuracy_along_rl_has_all_cues_in_one_panel_and_what_was_lost():
    run = make_trajectory()
    figure = figures.accuracy_along_rl(run, "A")
    assert [trace.name for trace in figure.data] == ["cue A (trained)", "cue B", "cue B, policy a put in place"]
    for trace, cue in zip(figure.data, CUES, strict=False):
        assert same(drawn(trace), [point.cues[cue].accuracy for point in run.points])
    assert same(drawn(figure.data[2]), [point.cues["B"].forced["a"] for point in run.points])
    assert figures.accuracy_along_rl(run, None).data[0].name == "cue A"


def test_before_after_draws_both_sides_or_the_only_one():
    record, _ = make_pair()
    figure = figures.before_after(record)
    side = record.per_cue["B"]
    assert side.after is not None
    trace = panel(figure, 2, 2)[1]
    assert same(drawn(trace), [side.before.intervals["accuracy.b"], NOT_MEASURED])
    alone = record.model_copy(update={"per_cue": {c: CueBehaviour(before=s.before) for c, s in record.per_cue.items()}})
    assert {len(trace.x) for trace in figures.before_after(alone).data} == {1}


def bars(figure, row: int, column: int) -> dict[str, tuple[float | None, float | None, float | None]]:
    """Term -> (value, whisker down, whisker up) in one panel."""
    axis = figure.get_subplot(row, column).yaxis
    names = dict(zip(axis.tickvals, axis.ticktext, strict=True))
    return {
        names[y]: (x, down, up)
        for trace in panel(figure, row, column)
        for x, y, down, up in zip(trace.x, trace.y, trace.error_x.arrayminus, trace.error_x.array, strict=True)
    }


def test_bits_split_draws_every_term_with_its_whiskers():
    pairs = [("one", make_pair()[1]), ("two", make_pair(cues=("A", "B", "C"))[1])]
    figure = figures.bits_split(pairs)
    for row, (_, verdict) in enumerate(pairs, start=1):
        for column, bits in enumerate([verdict.bits, *(s.bits for s in verdict.per_cue.values())], start=1):
            assert bits is not None
            found = bars(figure, row, column)
            assert list(found) == ["routing", "conditioning", "skill", "dormant"]
            for name, (value, down, up) in found.items():
                term = getattr(bits, name)
                assert value == term.value
                assert (down, up) == pytest.approx((term.value - term.low, term.high - term.value))
    assert {axis.title.text for axis in figure.select_xaxes()} >= {"bits"}


def test_bits_have_one_scale_whatever_they_are():
    """A small change looks small, on every page."""
    for verdict in (make_pair()[1], make_pair(named=False)[1]):
        ranges = {axis.range for axis in figures.bits_split([("pair", verdict)]).select_xaxes()}
        assert len(ranges) == 1
        ((low, high),) = ranges
        assert low < 0 < 1 < high


def test_bits_split_without_behaviours_shows_dashes_and_the_specialist_as_a_whole():
    verdict = make_pair(named=False)[1]
    figure = figures.bits_split([("pair", verdict)])
    found = bars(figure, 1, 1)
    assert found["conditioning"] == found["skill"] == (None, None, None)
    assert found["specialist"][0] == verdict.bits.specialist.value
    shown = [a.text for a in figure.layout.annotations if a.xref == "x domain"]
    assert shown.count(figures.DASH) == 2


def test_dormant_is_apart_from_the_sum():
    traces = panel(figures.bits_split([("pair", make_pair()[1])]), 1, 1)
    assert [len(trace.x) for trace in traces] == [3, 1]
    assert traces[1].marker.pattern.shape == "/"
    assert min(traces[0].y) - traces[1].y[0] > 1


def test_accuracy_split_draws_points_by_routing_and_by_specialists():
    _, verdict = make_pair()
    figure = figures.accuracy_split([("pair", verdict)])
    for column, state in enumerate(verdict.per_cue.values(), start=1):
        change = state.accuracy_change
        assert change is not None
        found = bars(figure, 1, column)
        assert list(found) == ["routing", "specialists", "total"]
        terms = (change.selector, change.specialists, change.total)
        for (value, down, up), term in zip(found.values(), terms, strict=True):
            assert value == pytest.approx(100 * term.value)
            assert (down, up) == pytest.approx((100 * (term.value - term.low), 100 * (term.high - term.value)))
    assert "points of accuracy" in {axis.title.text for axis in figure.select_xaxes()}


def test_accuracy_that_is_not_told_apart_has_its_total_alone():
    _, verdict = make_pair()
    untold = AccuracyChange(selector=NOT_MEASURED, specialists=NOT_MEASURED, total=around(-0.5))
    state = verdict.per_cue["A"].model_copy(update={"accuracy_change": untold})
    figure = figures.accuracy_split([("pair", verdict.model_copy(update={"per_cue": {"A": state}}))])
    assert {name: value for name, (value, _, _) in bars(figure, 1, 1).items()} == {
        "routing": None,
        "specialists": None,
        "total": -50.0,
    }


def test_policy_table_with_wordings_and_three_policies():
    record, _ = make_pair(("x", "y", "z"), wordings=2)
    before, after = figures.policy_table(record).data
    cells = {(cell.policy, cell.announcement, cell.cue): cell for cell in record.table}
    order = list(dict.fromkeys((cell.policy, cell.announcement) for cell in record.table))
    assert len(before.z) == 6
    for i, row in enumerate(order):
        for j, cue in enumerate(CUES):
            assert before.z[i][j] == cells[(*row, cue)].accuracy_before
            assert after.z[i][j] == cells[(*row, cue)].accuracy_after
    assert before.text[0][0].startswith("<b>answer</b> 0.970")
    assert after.text[5][1].startswith("<b>refuse</b> 0.600")


def test_policy_table_outlines_what_moved_and_nothing_else():
    record, _ = make_pair(wordings=2)
    outlined = [s for s in figures.policy_table(record, 0.02).layout.shapes if s.type == "rect"]
    assert [(round(s.x0 + 0.48), round(s.y0 + 0.46), s.xref) for s in outlined] == [(1, 2, "x2"), (1, 3, "x2")]
    assert not [s for s in figures.policy_table(record, 0.7).layout.shapes if s.type == "rect"]


def test_policy_table_without_behaviours_and_of_one_checkpoint():
    record, _ = make_pair(named=False)
    assert figures.policy_table(record).data[1].text[1][1] == "right 0.350"
    alone = record.model_copy(
        update={"table": tuple(cell.model_copy(update={"accuracy_after": None}) for cell in record.table[:-1])}
    )
    (only,) = figures.policy_table(alone).data
    assert only.z[1][1] is None
    assert only.text[1][1] == figures.DASH


def test_numbers_for_the_eye():
    assert figures.show(None) == figures.DASH
    assert figures.show_interval(NOT_MEASURED) == figures.DASH
    assert figures.show_interval(Interval(value=-0.5)) == "−0.500"
    assert figures.show(0.0004) == "<0.001"
    assert figures.show(0.0006) == "0.001"


def test_names_are_shown_literally():
    policies, cues = (HOSTILE, "%{x} $y$"), ("<A>", "2024-01-01")
    for figure in all_figures(policies, cues, words=HOSTILE):
        text = json.dumps(figure.to_plotly_json(), default=list, ensure_ascii=False)
        assert "&lt;A&gt;" in text
        # a tiny number must not open a tag either
        assert not re.search(r"</?script|<A>|<[0-9]", text)
        assert {axis.type for axis in [*figure.select_xaxes(), *figure.select_yaxes()]} == {"linear"}


def test_figures_leave_the_template_of_the_session_alone():
    import plotly.io

    before = plotly.io.templates.default
    all_figures()
    assert plotly.io.templates.default == before


def test_importing_viz_does_not_import_plotly():
    code = "import sys, mixturelens.figures; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
