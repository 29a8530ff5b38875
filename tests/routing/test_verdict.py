"""The verdict on hand-made records: every threshold from both sides, in the fixed order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

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
from mixturelens.behaviour.unannounced import Identified
from mixturelens.routing.verdict import Thresholds, VerdictRecord, judge
from mixturelens.types import NOT_MEASURED, InputError, Interval


def at(value: float, half: float = 0.001) -> Interval:
    return Interval(value=value, low=value - half, high=value + half)


def bits(**terms: Interval) -> Bits:
    return Bits(**{**dict.fromkeys(Bits.model_fields, at(0.0)), **terms})


def nats(**terms: Interval) -> Nats:
    return Nats(**{**dict.fromkeys(Nats.model_fields, at(0.0)), **terms})


def cell(behaviour: Interval = NOT_MEASURED, accuracy: Interval = NOT_MEASURED, policy: str = "b") -> TableCell:
    return TableCell(
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
        "cues": ("B",),
        "questions": 20,
        "coverage": {"before": at(0.99), "after": at(0.99)},
        "per_cue": {"B": CueBehaviour(before=side(0.5), after=side(0.0), accuracy_change=change)},
        "bits": bits(routing=at(0.311)),
        "text": Text(nats_per_token=at(0.0)),
        "nats": nats(routing=at(0.693), total=at(0.693)),
        "moved": at(0.311),
        "routing_share": at(0.99),
        "router_share": at(0.99),
        "table": (cell(at(0.0), at(0.0)),),
        "controls": Controls(
            same_checkpoint=bits(), shuffled_routing_share=at(0.0), independent_total=at(0.693), sum_agrees=True
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
        (Interval(value=0.002, low=0.0, high=0.0049), "neither"),
        (Interval(value=0.002, low=0.0, high=0.0051), "inconclusive"),
        (Interval(value=0.02, low=0.0049, high=0.05), "inconclusive"),
        (Interval(value=0.02, low=0.0051, high=0.05), "routing"),
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
        ("moved", "the change of 0.010 [0.000, 0.020] bits crosses the threshold 0.005"),
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
        (Interval(value=0.2, low=0.0051, high=0.3), True),
        (Interval(value=0.002, low=0.0, high=0.0049), False),
        (Interval(value=0.02, low=0.002, high=0.06), None),
        (NOT_MEASURED, None),
    ],
)
def test_what_changed_is_true_false_or_unknown(term: str, part: str, value: Interval, expected: bool | None):
    changed = judge(record(bits=bits(**{term: value}))).changed
    assert getattr(changed, part) is expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Interval(value=0.06, low=0.0101, high=0.1), True),
        (Interval(value=0.001, low=-0.001, high=0.0099), False),
        (at(0.01), None),
        (NOT_MEASURED, None),
    ],
)
def test_text_that_drifts_is_said_and_changes_no_verdict(value: Interval, expected: bool | None):
    found = judge(record(text=Text(nats_per_token=value), nats=nats(routing=at(0.693), text=at(30.0), total=at(30.7))))
    assert found.text_drifted is expected
    assert (found.verdict, found.changed.skill, found.reason) == ("routing", False, judge(record()).reason)


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


def test_the_reason_says_first_what_became_of_accuracy():
    found = judge(record())
    assert found.reason == (
        "Under B 50 points of accuracy were lost: 50 by routing, 0 by specialists. "
        "Routing changed, not the specialists: 0.990 [0.989, 0.991] of the 0.311 bits that tell after from before are "
        "routing; what changed is which policy is expressed; every policy put in place still does what it did."
    )
    broken = judge(record(table=(cell(at(-0.6), at(-0.1)),)))
    assert "policy b put in place under B shows `answer` with probability 0.40, where it was 1.00" in broken.reason
    assert broken.moved_cells == (cell(at(-0.6), at(-0.1)),)


@pytest.mark.parametrize(
    ("selector", "specialists", "total", "says"),
    [
        (at(-0.3), at(0.1), at(-0.2), "Under B 20 points of accuracy were lost: 30 by routing, -10 by specialists. "),
        (at(0.0), at(0.25), at(0.25), "Under B 25 points of accuracy were gained: 0 by routing, 25 by specialists. "),
        (NOT_MEASURED, NOT_MEASURED, at(-0.5), "Under B 50 points of accuracy were lost. "),
        (at(0.2), at(-0.2), at(0.0), "Accuracy changed under no cue by a point. "),
        (NOT_MEASURED, NOT_MEASURED, NOT_MEASURED, "What became of accuracy was not measured. "),
    ],
)
def test_accuracy_is_shared_out_between_routing_and_specialists(
    selector: Interval, specialists: Interval, total: Interval, says: str
):
    change = AccuracyChange(selector=selector, specialists=specialists, total=total)
    changed = CueBehaviour(before=side(0.5), after=side(0.0), accuracy_change=change)
    still = CueBehaviour(before=side(0.5), after=side(0.5), accuracy_change=change.model_copy(update={"total": at(0)}))
    cues = {"A": still, "B": changed} if total.measured else {"B": changed}
    assert judge(record(per_cue=cues)).reason.startswith(says)


def test_thresholds_can_be_moved_and_are_written_down():
    strict = Thresholds(routing=0.995)
    found = judge(record(), strict)
    assert found.verdict == "both"
    assert found.thresholds == strict


def test_the_record_has_the_shape_of_the_contract():
    """Null is written where nothing was measured: mechanism, and controls that need more than the pair."""
    data = VerdictRecord.model_validate_json(judge(record()).to_json()).model_dump(mode="json")
    assert (data["kind"], data["version"]) == ("verdict", 2)
    assert set(data["changed"]) == {"selector", "cue_reader", "skill"}
    assert {key: data["mechanism"][key] for key in ("verdict", "agrees", "evidence")} == {
        "verdict": None,
        "agrees": None,
        "evidence": {},
    }
    assert set(data["routing_share"]) == {"value", "low", "high"}
    assert set(data["bits"]) == {"routing", "specialist", "conditioning", "skill", "dormant"}
    assert set(data["text"]) == {"nats_per_token"}
    terms = {"routing", "specialist", "conditioning", "skill", "text", "wording", "other", "total"}
    assert set(data["nats"]) == terms
    assert data["controls"]["pair"]["sum_agrees"] is True
    assert data["controls"]["random_components"] is None
    for key in ("reason", "dormant_intact", "text_drifted", "router_share", "per_cue", "thresholds", "provenance"):
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


@pytest.mark.parametrize("overlap", [None, 0.5, 0.0])
def test_no_overlap_of_completions_is_needed(overlap: float | None):
    assert verdict(samples=16, overlap=overlap) == "routing"


def test_where_hardly_any_policy_is_known_nothing_is_given():
    """What little is left says nothing about the pair."""
    found = judge(record(coverage={"before": at(0.4), "after": at(0.99)}))
    given = (found.routing_share, found.router_share, found.text.nats_per_token, *dict(found.bits).values())
    assert not any(value.measured for value in (*given, *dict(found.nats).values()))
    assert all(not value.measured for state in found.per_cue.values() for _, value in state.bits or ())
    assert found.changed.model_dump() == dict.fromkeys(("selector", "cue_reader", "skill"))
    assert found.text_drifted is None


def version_1() -> dict[str, Any]:
    """A stored verdict as the version before wrote it."""
    data = judge(record()).model_dump(mode="json")
    known = {"value": 0.9, "low": 0.8, "high": 1.0}
    names = ("routing", "specialist", "conditioning", "skill", "novel", "wording", "other", "total", "dormant")
    terms = dict.fromkeys(names, known)
    for key in ("bits", "text", "text_drifted"):
        del data[key]
    for state in data["per_cue"].values():
        del state["bits"]
        state["nats"] = terms
    data["controls"]["pair"]["same_checkpoint"] = terms
    old = {**data["thresholds"], "nats": 0.01, "overlap": 0.1}
    thresholds = {name: value for name, value in old.items() if name not in ("bits", "text")}
    return {**data, "version": 1, "nats": terms, "thresholds": thresholds}


def test_a_record_of_version_1_is_read_without_what_meant_something_else(tmp_path: Path):
    file = tmp_path / "verdict.json"
    file.write_text(json.dumps(version_1()))
    found = VerdictRecord.load(file)
    assert (found.version, found.verdict, found.text_drifted) == (2, "routing", None)
    judged_by_nats = (found.routing_share, found.router_share, found.nats.specialist, found.nats.skill, found.nats.text)
    assert not any(value.measured for value in (*judged_by_nats, *dict(found.bits).values()))
    assert not any(value.measured for _, value in found.controls.pair.same_checkpoint)
    state = found.per_cue["B"]
    assert (state.after.overall, state.accuracy_change.total.value) == (0.0, -0.5)
    kept = (found.nats.routing, found.nats.total, state.nats.conditioning)
    assert {value.value for value in kept} == {0.9}
    assert VerdictRecord.model_validate_json(found.to_json()) == found


def test_older_records_are_refused(tmp_path: Path):
    file = tmp_path / "verdict.json"
    file.write_text(json.dumps({**version_1(), "version": 0}))
    with pytest.raises(InputError, match="version 0"):
        VerdictRecord.load(file)


def test_a_record_of_version_1_that_lacks_what_it_had_is_refused(tmp_path: Path):
    file = tmp_path / "verdict.json"
    for change in ({"controls": None}, {"per_cue": {"A": {}}}, {"nats": []}):
        file.write_text(json.dumps(version_1() | change))
        with pytest.raises(InputError, match=rf"^{file}: not a verdict record of version 1 \("):
            VerdictRecord.load(file)
