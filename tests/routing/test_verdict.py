"""The verdict on hand-made records: every threshold from both sides, in the fixed order."""

from __future__ import annotations

import pytest

from mixturelens.behaviour.record import AccuracyChange, BehaviourRecord, Cell, Controls, CueBehaviour, CueSide, Nats
from mixturelens.behaviour.unannounced import Identified
from mixturelens.routing.verdict import Thresholds, VerdictRecord, judge
from mixturelens.types import NOT_MEASURED, Interval


def at(value: float, half: float = 0.001) -> Interval:
    return Interval(value=value, low=value - half, high=value + half)


def nats(**terms: Interval) -> Nats:
    zero = dict.fromkeys(Nats.model_fields, at(0.0))
    return Nats(**{**zero, **terms})


def cell(behaviour: Interval = NOT_MEASURED, accuracy: Interval = NOT_MEASURED, policy: str = "b") -> Cell:
    return Cell(
        cue="B",
        policy=policy,
        announcement=f"[{policy}]",
        behaviour="answer",
        shown_before={"answer": 1.0},
        shown_after={"answer": 0.4},
        accuracy_before=0.9,
        accuracy_after=0.8,
        behaviour_change=behaviour,
        accuracy_change=accuracy,
    )


def side(overall: float) -> CueSide:
    return CueSide(weights={"a": 1.0, "other": 0.0}, accuracy={"a": 1.0}, overall=overall, intervals={})


def record(**changes) -> BehaviourRecord:
    """A clear case of routing, but for the changes."""
    change = AccuracyChange(selector=at(-0.5), specialists=at(0.0), total=at(-0.5))
    base = {
        "method": "literal",
        "policies": ("a", "b"),
        "cues": ("A", "B"),
        "questions": 20,
        "coverage": {"before": at(0.99), "after": at(0.99)},
        "per_cue": {"B": CueBehaviour(before=side(0.5), after=side(0.0), accuracy_change=change)},
        "nats": nats(routing=at(0.5), total=at(0.5)),
        "moved": at(0.5),
        "routing_share": at(0.99),
        "router_share": at(0.99),
        "table": (cell(at(0.0), at(0.0)),),
        "controls": Controls(
            same_checkpoint=nats(), shuffled_routing_share=at(0.0), independent_total=at(0.5), sum_agrees=True
        ),
    }
    return BehaviourRecord(**{**base, **changes})


def verdict(**changes) -> str:
    return judge(record(**changes)).verdict


@pytest.mark.parametrize(
    ("share", "word"),
    [
        (at(0.99), "routing"),
        (Interval(value=0.95, low=0.9001, high=1.0), "routing"),
        (Interval(value=0.95, low=0.8999, high=1.0), "inconclusive"),
        (Interval(value=0.85, low=0.7, high=0.9001), "inconclusive"),
        (Interval(value=0.85, low=0.7, high=0.8999), "both"),
        (at(0.5, 0.2), "both"),
        (Interval(value=0.2, low=0.1001, high=0.3), "both"),
        (Interval(value=0.2, low=0.0999, high=0.3), "inconclusive"),
        (Interval(value=0.05, low=-0.1, high=0.1001), "inconclusive"),
        (Interval(value=0.05, low=-0.1, high=0.0999), "specialist"),
        (NOT_MEASURED, "inconclusive"),
        (at(0.5, 0.45), "inconclusive"),
    ],
)
def test_the_routing_share_decides_once_something_changed(share: Interval, word: str):
    assert verdict(routing_share=share) == word


@pytest.mark.parametrize(
    ("moved", "word"),
    [
        (Interval(value=0.005, low=0.0, high=0.0099), "neither"),
        (Interval(value=0.005, low=0.0, high=0.0101), "inconclusive"),
        (Interval(value=0.02, low=0.0099, high=0.05), "inconclusive"),
        (Interval(value=0.02, low=0.0101, high=0.05), "routing"),
        (NOT_MEASURED, "inconclusive"),
    ],
)
def test_whether_anything_changed_comes_before_what(moved: Interval, word: str):
    assert verdict(moved=moved) == word


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("coverage", "word"),
    [
        (Interval(value=0.95, low=0.9, high=1.0), "routing"),
        (Interval(value=0.95, low=0.8999, high=1.0), "inconclusive"),
        (Interval(value=0.5, low=0.4, high=0.6), "inconclusive"),
        (NOT_MEASURED, "inconclusive"),
    ],
)
def test_coverage_must_be_sure_on_both_sides(when: str, coverage: Interval, word: str):
    found = judge(record(coverage={"before": at(0.99), "after": at(0.99), when: coverage}))
    assert found.verdict == word
    assert word == "routing" or f"of the completions {when}, and 0.9 is needed" in found.reason


@pytest.mark.parametrize(("questions", "word"), [(7, "inconclusive"), (8, "routing")])
def test_too_few_questions_say_nothing(questions: int, word: str):
    assert verdict(questions=questions) == word


@pytest.mark.parametrize(
    ("samples", "word"), [(1, "inconclusive"), (3, "inconclusive"), (4, "routing"), (None, "routing")]
)
def test_too_few_samples_say_nothing(samples: int | None, word: str):
    assert verdict(samples=samples) == word


def test_the_order_of_the_checks_shows_in_the_reason():
    """All is wrong at once; put right one by one, each next doubt is heard."""
    wrong = {
        "coverage": {"before": at(0.5), "after": at(0.99)},
        "questions": 3,
        "samples": 1,
        "moved": Interval(value=0.01, low=0.0, high=0.02),
        "routing_share": at(0.9, 0.05),
    }
    for key, says in [
        ("coverage", "known policies cover only 0.500 [0.499, 0.501] of the completions before"),
        ("questions", "3 questions are too few"),
        ("samples", "1 completion(s) a prompt"),
        ("moved", "the change of 0.010 [0.000, 0.020] nats crosses the threshold 0.01"),
        ("routing_share", "the routing share 0.900 [0.850, 0.950] crosses the threshold 0.9"),
    ]:
        found = judge(record(**wrong))
        assert found.verdict == "inconclusive"
        assert found.reason.startswith("The suite cannot say: ")
        assert says in found.reason
        del wrong[key]
    assert verdict(**wrong) == "routing"


def test_nothing_changed_is_neither_whatever_the_share():
    assert verdict(moved=at(0.0), routing_share=NOT_MEASURED) == "neither"


@pytest.mark.parametrize(
    ("term", "part"), [("routing", "selector"), ("conditioning", "cue_reader"), ("skill", "skill")]
)
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Interval(value=0.2, low=0.0501, high=0.3), True),
        (Interval(value=0.02, low=0.0, high=0.0099), False),
        (Interval(value=0.02, low=0.005, high=0.06), None),
        (NOT_MEASURED, None),
    ],
)
def test_what_changed_is_true_false_or_unknown(term: str, part: str, value: Interval, expected: bool | None):
    changed = judge(record(nats=nats(**{term: value}))).changed
    assert getattr(changed, part) is expected


@pytest.mark.parametrize(("moved", "expected"), [(0.05, True), (5.0, False)])
def test_specialist_terms_are_judged_against_all_that_moved_and_routing_is_not(moved: float, expected: bool):
    found = judge(record(nats=nats(routing=at(0.1), conditioning=at(0.1), skill=at(0.1)), moved=at(moved)))
    assert found.changed.model_dump() == {"selector": True, "cue_reader": expected, "skill": expected}


def test_skill_behind_a_new_behaviour_is_not_a_skill_that_changed():
    terms = {"conditioning": at(2.4), "skill": at(0.6), "novel": at(0.6)}
    found = judge(record(nats=nats(**terms), moved=at(3.0), routing_share=at(0.0)))
    assert found.verdict == "specialist"
    assert found.changed.model_dump() == {"selector": False, "cue_reader": True, "skill": False}


@pytest.mark.parametrize(
    ("behaviour", "accuracy", "intact"),
    [
        (at(0.0), at(0.0), True),
        (at(0.019, 0.0009), at(-0.019, 0.0009), True),
        (at(0.022), at(0.0), False),
        (at(0.0), at(-0.022), False),
        (at(0.02, 0.01), at(0.0), None),
        (at(-0.02, 0.01), at(0.0), None),
        (at(0.02, 0.01), at(-0.5), False),
        (NOT_MEASURED, at(0.0), True),
        (NOT_MEASURED, at(0.3), False),
        (NOT_MEASURED, NOT_MEASURED, None),
    ],
)
def test_silent_specialists_are_intact_where_no_cell_moved(
    behaviour: Interval, accuracy: Interval, intact: bool | None
):
    assert judge(record(table=(cell(behaviour, accuracy),))).dormant_intact is intact


def test_one_broken_cell_outweighs_doubt_and_no_cells_say_nothing():
    doubtful, broken, fine = cell(at(0.02, 0.01)), cell(at(-0.6), policy="a"), cell(at(0.0))
    assert judge(record(table=(fine, doubtful))).dormant_intact is None
    assert judge(record(table=(fine, doubtful, broken))).dormant_intact is False
    assert judge(record(table=())).dormant_intact is None


def test_the_reason_is_one_sentence_with_the_numbers():
    found = judge(record())
    assert found.reason == (
        "Routing changed, not the specialists: 0.990 [0.989, 0.991] of the 0.5 nats are routing; "
        "what changed is which policy is expressed; accuracy under B went from 0.50 to 0.00; "
        "every policy put in place still does what it did."
    )
    broken = judge(record(table=(cell(at(-0.6), at(-0.1)),)))
    assert "policy b put in place under B shows `answer` with probability 0.40, where it was 1.00" in broken.reason
    assert broken.moved_cells == (cell(at(-0.6), at(-0.1)),)


def test_thresholds_can_be_moved_and_are_written_down():
    strict = Thresholds(routing=0.995)
    found = judge(record(), strict)
    assert found.verdict == "both"
    assert found.thresholds == strict


def test_the_record_has_the_shape_of_the_contract():
    """Null is written where nothing was measured: mechanism, and controls that need more than the pair."""
    data = VerdictRecord.model_validate_json(judge(record()).to_json()).model_dump(mode="json")
    assert (data["kind"], data["version"]) == ("verdict", 1)
    assert set(data["changed"]) == {"selector", "cue_reader", "skill"}
    assert {key: data["mechanism"][key] for key in ("verdict", "agrees", "evidence")} == {
        "verdict": None,
        "agrees": None,
        "evidence": {},
    }
    assert set(data["routing_share"]) == {"value", "low", "high"}
    assert {"routing", "specialist", "conditioning", "skill", "dormant", "wording"} <= set(data["nats"])
    assert data["controls"]["pair"]["sum_agrees"] is True
    assert data["controls"]["random_components"] is None
    for key in ("reason", "dormant_intact", "router_share", "per_cue", "thresholds", "provenance"):
        assert key in data


@pytest.mark.parametrize(("doubt", "word"), [(None, "routing"), ("both explain it", "inconclusive")])
def test_policies_that_announce_nothing_need_an_explanation(doubt: str | None, word: str):
    found = Identified(rank=2, spare=1, condition=1.0, weights={}, misfit_before=at(0.0), doubt=doubt)
    verdict = judge(record(identified=found, table=()))
    assert (verdict.verdict, verdict.identified) == (word, found)
    if doubt:
        assert verdict.reason == "The suite cannot say: both explain it."
    else:
        assert verdict.reason.endswith("policies announce nothing, so that a silent one is not seen.")


def test_one_checkpoint_has_no_verdict():
    with pytest.raises(ValueError, match="about one checkpoint"):
        judge(record(nats=None))


@pytest.mark.parametrize(("overlap", "word"), [(None, "routing"), (0.5, "routing"), (0.05, "inconclusive")])
def test_samples_that_do_not_overlap_say_nothing(overlap: float | None, word: str):
    """Each completion is weighed under both checkpoints; what only one writes is no evidence about the other."""
    assert verdict(samples=16, overlap=overlap) == word
