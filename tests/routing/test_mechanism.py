"""The mechanism verdict on evidence made by hand; on real pairs it is judged where the records are made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixturelens.behaviour.record import behaviour_record
from mixturelens.features.record import Changed, FeatureRecord, SiteChange, Terms
from mixturelens.grafting.pair import graft_record
from mixturelens.grafting.record import Effects, Factorial, Graft, GraftRecord, Null
from mixturelens.models import open_pair
from mixturelens.probing.record import Column, ProbingRecord, Readout, Shift
from mixturelens.routing.mechanism import (
    Mechanism,
    judge_mechanism,
    random_components,
    share_of,
    shuffled_verdict,
    told,
)
from mixturelens.routing.verdict import VerdictRecord, judge
from mixturelens.suite import load_suite
from mixturelens.types import NOT_MEASURED, Interval, Site

PAIRS = Path(__file__).parents[1] / "pairs"
NOTHING = Interval(value=0.0, low=0.0, high=0.0)


def about(value: float, spread: float = 0.005) -> Interval:
    return Interval(value=value, low=max(0.0, value - spread), high=value + spread)


def effects(chosen: Interval = NOTHING, done: Interval = NOTHING) -> Effects:
    return Effects(routing=NOT_MEASURED, weight=NOT_MEASURED, specialists=NOT_MEASURED, chosen=chosen, done=done)


def graft(chosen: Interval = NOTHING, done: Interval = NOTHING, **more: Any) -> GraftRecord:
    given: dict[str, Any] = {
        "policies": ("a", "b"),
        "method": "literal",
        "cues": ("A", "B"),
        "questions": 100,
        "change": {},
        "after": effects(chosen, done),
        "parts": (),
        "components": (),
        "groups": {},
        "path": (),
        "factorial": None,
        "specialist_part": None,
        "null": Null(chosen=0.001, done=0.001),
    }
    return GraftRecord(**(given | more))


def two_by_two(chosen: Interval, noise: float) -> Factorial:
    return Factorial(
        selector=("L0.attn",),
        enough=True,
        questions=50,
        selector_only=effects(chosen),
        rest_only=effects(),
        both=effects(chosen),
        noise=(effects(about(noise, 0.0)),),
    )


@pytest.mark.parametrize(
    ("chosen", "done", "word"),
    [
        (about(0.25), NOTHING, "routing"),
        (NOTHING, about(0.25), "specialist"),
        (about(0.2), about(0.2), "both"),
        (NOTHING, NOTHING, "neither"),
        (about(0.001, 0.001), about(0.0005, 0.0005), "neither"),  # less than labels that mean nothing
        (about(0.25), about(0.028, 0.02), "inconclusive"),  # the share may lie on either side of 0.9
        (Interval(value=0.006, low=0.0, high=0.03), NOTHING, "inconclusive"),
        (about(0.25), about(0.006, 0.0065), "routing"),  # what cannot be told from nothing is small
    ],
)
def test_word_follows_the_two_distances(chosen: Interval, done: Interval, word: str) -> None:
    assert judge_mechanism(graft(chosen, done)).verdict == word


def test_few_questions_say_nothing() -> None:
    assert judge_mechanism(graft(about(0.25), questions=7)).verdict == "inconclusive"


def test_random_weights_are_shown_beside_the_selector() -> None:
    found = judge_mechanism(graft(about(0.25), factorial=two_by_two(about(0.25), noise=0.001)))
    assert found.verdict == "routing"
    assert "random weights of the same norm there: at most 0.001" in found.evidence["grafts, selector"].what


def test_the_part_that_carries_the_specialists_is_named() -> None:
    part = Graft(components=("L1.mlp", "L2.mlp"), effects=effects(NOTHING, about(0.3)))
    found = judge_mechanism(graft(NOTHING, about(0.25), specialist_part=part))
    assert found.verdict == "specialist"
    assert "R's L1.mlp and L2.mlp in S alone: 0.300" in found.evidence["grafts, specialists"].what
    assert found.evidence["grafts, specialists"].effect.value == 0.25


def test_controls_judge_labels_that_mean_nothing() -> None:
    blind = Null(chosen=0.01, done=0.01, shuffled=effects(about(0.006, 0.004), about(0.004, 0.003)))
    found = graft(about(0.25), null=blind, factorial=two_by_two(about(0.25), noise=0.002))
    assert (random_components(found), shuffled_verdict(found)) == (0.002, "neither")
    assert (random_components(graft()), shuffled_verdict(graft())) == (None, None)


def test_probes_may_disagree_and_do_not_decide() -> None:
    site = Site(layer=1, component="resid_post", position="policy")
    column, low = Column(value=(0.99,), low=(0.98,), high=(1.0,)), Column(value=(0.5,), low=(0.45,), high=(0.55,))
    readout = Readout(
        target="behaviour",
        metric="AUROC",
        rows="",
        questions=100,
        chance=0.5,
        before=column,
        after=column,
        carried=low,
        untrained=(0.5,),
        shuffled=(0.5,),
        shuffled_high=0.6,
    )
    shift = Shift(
        site=Site(layer=0, component="resid_post", position="last"), cosine=about(0.6), along=about(0.5), null=0.3
    )
    behind = shift.model_copy(update={"site": Site(layer=1, component="resid_post", position="last")})
    probing = ProbingRecord(
        trained_cue="A", policies=("a", "b"), sites=(site,), readouts=(readout,), shifts=(shift, behind)
    )
    found = judge_mechanism(graft(about(0.25)), probing=probing)
    assert found.verdict == "routing"
    assert found.disagree == ("probes, specialists",)
    assert found.evidence["probes, selector"].changed is True
    assert found.evidence["probes, selector"].what.startswith("Cosine at L0.resid_post@last")


def moved(routing: float, conditioning: float = 0.0, skill: float = 0.0) -> Terms:
    return Terms(routing=about(routing, 0.002), conditioning=about(conditioning, 0.002), skill=about(skill, 0.002))


def features(together: Terms, whole: Terms, random: tuple[Terms, ...] = (), number: int = 2, **more: Any) -> Any:
    sides = {"before": 0.1, "after": 0.2}
    changed = tuple(Changed(index=i, rate=sides, strength=sides, moved=1.0, terms=together) for i in range(number))
    change = SiteChange(
        site=Site(layer=1, component="resid_pre"), features=changed, together=together, every=whole, whole=whole,
        random=random, questions=48,
    )  # fmt: skip
    return FeatureRecord(trained_cue="A", saes=(), **({"changes": (change,)} | more))


@pytest.mark.parametrize(
    ("record", "selector", "specialists"),
    [
        # the features bring all of it
        (features(moved(0.3), moved(0.31), (moved(0.02), moved(0.1))), True, False),
        (features(moved(0.0, 0.2, 0.1), moved(0.0, 0.2, 0.1)), False, True),
        # as much as random others bring: nothing that these features do, but something the site does
        (features(moved(0.3), moved(0.31), (moved(0.4),)), None, False),
        # the dictionary does not see what R's activations do
        (features(moved(0.0), moved(0.3)), None, False),
        (features(moved(0.3), moved(0.3, 0.05)), True, None),
        # R's activations bring nothing there: what R does differently, if anything, lies behind
        (features(moved(0.0), moved(0.0)), None, None),
        # the dictionary makes up what R's activations do not do
        (features(moved(0.3), moved(0.0, 0.2, 0.1)), None, None),
    ],
)
def test_features_say_which_part_they_move(
    record: FeatureRecord, selector: bool | None, specialists: bool | None
) -> None:
    evidence = judge_mechanism(graft(about(0.25)), features=record).evidence
    found = [evidence[f"features, {part}"] for part in ("selector", "specialists")]
    assert [line.changed for line in found] == [selector, specialists]
    assert [line.source for line in found] == ["features"] * 2
    (change,) = record.changes
    assert found[0].effect == change.together.routing
    assert found[1].effect.value == pytest.approx(change.together.specialists.value)
    assert found[0].null == max((each.routing.value for each in change.random), default=None)
    assert "the 2 features of L1.resid_pre that RL moved most" in found[0].what


def test_features_that_say_otherwise_disagree_and_do_not_decide() -> None:
    found = judge_mechanism(graft(about(0.25)), features=features(moved(0.0, 0.2), moved(0.3, 0.2)))
    assert found.verdict == "routing"
    assert found.disagree == ("features, specialists",)


def test_the_place_where_most_has_arrived_is_the_one_that_counts() -> None:
    early = features(moved(0.01), moved(0.02)).changes[0]
    late = features(moved(0.3), moved(0.31)).changes[0].model_copy(
        update={"site": Site(layer=2, component="mlp_out")}
    )  # fmt: skip
    record = features(moved(0.0), moved(0.0), changes=(early, late))
    line = judge_mechanism(graft(about(0.25)), features=record).evidence["features, selector"]
    assert "features of L2.mlp_out" in line.what
    assert line.changed is True


def test_features_without_changes_add_no_line() -> None:
    nothing = moved(0.0)
    for record in (features(nothing, nothing, changes=()), features(nothing, moved(0.3), number=0)):
        assert set(judge_mechanism(graft(about(0.25)), features=record).evidence) == {
            "grafts, selector",
            "grafts, specialists",
        }


def test_share_is_as_wide_as_both_ends() -> None:
    share = share_of(Interval(value=0.3, low=0.2, high=0.4), Interval(value=0.1, low=0.0, high=0.2))
    assert share.value == pytest.approx(0.75)
    assert (share.low, share.high) == (pytest.approx(0.5), pytest.approx(1.0))
    assert share_of(NOTHING, NOTHING) == NOT_MEASURED


@pytest.mark.parametrize(
    ("effect", "null", "answer"),
    [
        (about(0.1), 0.01, True),
        (about(0.1), 0.2, False),
        (about(0.01), 0.02, False),
        (Interval(value=0.009, low=0.001, high=0.02), 0.0, None),
        (NOT_MEASURED, 0.0, None),
    ],
)
def test_told(effect: Interval, null: float, answer: bool | None) -> None:
    assert told(effect, null) is answer


def test_record_round_trips() -> None:
    found = judge_mechanism(graft(about(0.25)))
    assert Mechanism.model_validate_json(found.model_dump_json()) == found


KINDS = ["llama/R-routing", "qwen2/R-skill", "gpt2/R-both"]
"""One of every verdict; `neither` is the same checkpoint twice. The others, of which one takes 17 s, are slow."""
ALL = sorted(
    f"{folder.parent.name}/{folder.name}" for folder in PAIRS.glob("*/R*") if (folder.parent / "truth.json").is_file()
)


def verdict_on(name: str) -> VerdictRecord:
    shape, after = name.split("/")
    suite = load_suite(PAIRS / shape)
    pair = open_pair(PAIRS / shape / "S", PAIRS / shape / after, suite)
    behaviour = behaviour_record(pair)
    grafted = graft_record(pair, behaviour)
    return judge(behaviour, graft=grafted)


@pytest.mark.parametrize(
    "name", [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
)
def test_the_mechanism_knows_the_truth_and_agrees_with_behaviour(name: str) -> None:
    shape, after = name.split("/")
    found = verdict_on(name)
    truth = json.loads((PAIRS / shape / "truth.json").read_text())[after]["verdict"]
    assert found.mechanism.verdict == truth
    assert found.mechanism.agrees is (found.verdict == truth)
    assert found.controls.shuffled_mechanism == "neither"


def test_the_same_checkpoint_twice_is_neither() -> None:
    found = verdict_on("llama/S")
    assert found.mechanism.verdict == "neither"
    assert found.mechanism.agrees
