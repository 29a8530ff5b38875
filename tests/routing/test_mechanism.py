"""The mechanism verdict on evidence made by hand; on real pairs it is judged where the records are made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stored import behaviour_of

from mixturelens.features.record import FeatureRecord, MovedFeature, SiteChange, Terms
from mixturelens.grafting.pair import graft_record
from mixturelens.grafting.record import Effects, Factorial, Graft, GraftRecord, Null
from mixturelens.models import Pair
from mixturelens.routing import mechanism
from mixturelens.routing.mechanism import Mechanism, judge_mechanism, random_components, told
from mixturelens.routing.verdict import Thresholds, VerdictRecord, judge
from mixturelens.suite import load_suite
from mixturelens.types import NOT_MEASURED, Interval, Site

PAIRS = Path(__file__).parents[1] / "pairs"
NOTHING = Interval(value=0.0, low=0.0, high=0.0)


def about(value: float, spread: float = 0.005) -> Interval:
    return Interval(value=value, low=max(0.0, value - spread), high=value + spread)


def effects(chosen: float = 0.0, done: float = 0.0, **more: Interval) -> Effects:
    """Bits that are known to a hundredth, and what follows from them; but for what is given."""
    moved = chosen + done
    share = chosen / moved if moved else None
    given = {
        **dict.fromkeys(("routing", "weight", "specialists"), NOT_MEASURED),
        **{name: about(value, 0.01 * value) for name, value in (("chosen", chosen), ("done", done), ("moved", moved))},
        "share": NOT_MEASURED if share is None else about(share, 0.01 * min(share, 1 - share)),
    }
    return Effects(**(given | more))


def graft(chosen: float = 0.0, done: float = 0.0, **more: Any) -> GraftRecord:
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
        "null": Null(chosen=0.001, done=0.0),
    }
    return GraftRecord(**(given | more))


def two_by_two(chosen: float, noise: float) -> Factorial:
    return Factorial(
        selector=("L0.attn",),
        enough=True,
        questions=50,
        selector_only=effects(chosen, 0.001),
        rest_only=effects(),
        both=effects(chosen),
        noise=(effects(noise), effects(noise / 2)),
    )


def test_thresholds_are_those_of_behaviour() -> None:
    """Written twice, as neither verdict looks at the other's."""
    t = Thresholds()
    assert (t.bits, t.routing, t.specialist) == (mechanism.FLOOR, mechanism.ROUTING, mechanism.SPECIALIST)
    assert (t.questions, t.coverage) == (mechanism.FEWEST, mechanism.COVERAGE)


@pytest.mark.parametrize(
    ("chosen", "done", "word"),
    [
        (0.25, 0.0, "routing"),
        (0.0, 0.25, "specialist"),
        (0.2, 0.2, "both"),
        (0.25, 0.02, "routing"),  # 0.926
        (0.25, 0.04, "both"),  # 0.862
        (0.02, 0.25, "specialist"),
        (0.04, 0.25, "both"),
        (0.006, 0.0, "routing"),
        (0.0, 0.0, "neither"),
        (0.002, 0.002, "neither"),
        (0.003, 0.003, "both"),
    ],
)
def test_word_follows_the_two_distances(chosen: float, done: float, word: str) -> None:
    found = judge_mechanism(graft(chosen, done))
    assert found.verdict == word
    assert found.share == effects(chosen, done).share


@pytest.mark.parametrize(
    ("after", "says"),
    [
        (effects(0.25, 0.03, share=Interval(value=0.89, low=0.86, high=0.91)), "crosses 0.9"),
        (effects(0.03, 0.25, share=Interval(value=0.11, low=0.09, high=0.12)), "crosses 0.1"),
        (effects(0.005, 0.0, moved=Interval(value=0.005, low=0.004, high=0.006)), "crosses 0.005"),
        (effects(0.25, moved=NOT_MEASURED), "could not be measured"),
    ],
)
def test_intervals_that_cross_say_nothing(after: Effects, says: str) -> None:
    found = judge_mechanism(graft(after=after))
    assert found.verdict == "inconclusive"
    assert says in found.reason


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"questions": 7}, "7 questions are too few"),
        ({"coverage": 0.89}, "the announcements as written cover 0.89"),
        ({"shown": 0.89}, "shows a behaviour or the right answer on 0.89 of the prompts"),
        ({"usual": 0.49}, "has a probability of 0.49"),
    ],
)
@pytest.mark.parametrize("bits", [(0.25, 0.0), (0.2, 0.2), (0.0, 0.0)])
def test_what_the_record_cannot_tell_is_inconclusive(
    bits: tuple[float, float], more: dict[str, Any], says: str
) -> None:
    found = judge_mechanism(graft(*bits, **more))
    assert found.verdict == "inconclusive"
    assert says in found.reason


def test_a_specialist_that_changed_may_have_changed_more() -> None:
    """What S usually does is rare, so that a change of it may be larger than it looks: the share is lower still."""
    assert judge_mechanism(graft(0.001, 0.25, usual=0.24)).verdict == "specialist"
    assert judge_mechanism(graft(0.001, 0.25, usual=0.24, shown=0.5)).verdict == "inconclusive"


def test_bits_are_so_many_times_those_of_noise() -> None:
    found = judge_mechanism(graft(0.25, null=Null(chosen=0.005, done=0.001)))
    assert "choice of policy by 0.250 [0.247, 0.253] bits (50 times noise of the same size)" in found.reason
    assert "what policies do by 0.000 [0.000, 0.000] bits;" in found.reason  # nothing is no number of times
    assert "bits, and" in judge_mechanism(graft(0.25, null=Null(chosen=0.0, done=None))).reason
    assert "(1.2 times noise" in judge_mechanism(graft(0.25, null=Null(chosen=0.2, done=0.0))).reason
    # noise that moves more does not make a change none
    assert judge_mechanism(graft(0.25, null=Null(chosen=0.4, done=0.4))).verdict == "routing"


def test_parts_stand_beside_random_weights_in_their_place() -> None:
    part = Graft(components=("L1.mlp", "L2.mlp"), effects=effects(0.01, 0.2))
    found = graft(0.25, 0.2, factorial=two_by_two(0.24, noise=0.02), specialist_part=part)
    evidence = judge_mechanism(found).evidence
    assert list(evidence) == [
        "all weights, selector",
        "all weights, specialists",
        "one part, selector",
        "one part, specialists",
    ]
    assert [line.null for line in evidence.values()] == [0.001, 0.0, 0.02, None]
    assert [line.effect.value for line in evidence.values()] == [0.25, 0.2, 0.24, 0.2]
    assert all(line.changed for line in evidence.values())
    assert evidence["one part, selector"].what.startswith("R's L0.attn in S alone; what policies do moves by 0.001")
    assert evidence["one part, specialists"].what.startswith("R's L1.mlp and L2.mlp in S alone; the choice moves by")
    assert random_components(found) == 0.02
    assert random_components(graft()) is None
    # a part that does no more than noise in its place says nothing
    assert judge_mechanism(graft(0.25, factorial=two_by_two(0.02, 0.03))).evidence["one part, selector"].changed is None


# --- features ---------------------------------------------------------------------------------------------------------


def moved(routing: float, specialist: float = 0.0) -> Terms:
    return Terms(
        routing=about(routing, 0.002), conditioning=NOTHING, skill=NOTHING, specialist=about(specialist, 0.002)
    )


def features(together: Terms, whole: Terms, random: tuple[Terms, ...] = (), number: int = 2, **more: Any) -> Any:
    sides = {"before": 0.1, "after": 0.2}
    changed = tuple(MovedFeature(index=i, rate=sides, strength=sides, moved=1.0, terms=together) for i in range(number))
    change = SiteChange(
        site=Site(layer=1, component="resid_pre"), features=changed, together=together, every=whole, whole=whole,
        random=random, questions=48,
    )  # fmt: skip
    return FeatureRecord(trained_cue="A", saes=(), **({"changes": (change,)} | more))


@pytest.mark.parametrize(
    ("record", "selector", "specialists"),
    [
        # the features bring all of it
        (features(moved(0.2), moved(0.25), (moved(0.02), moved(0.1))), True, False),
        (features(moved(0.0), moved(0.25)), False, False),
        # as much as random others bring
        (features(moved(0.2), moved(0.25), (moved(0.3),)), None, False),
        (features(moved(0.2, 0.1), moved(0.25)), True, True),
    ],
)
def test_features_say_which_part_they_bring(
    record: FeatureRecord, selector: bool | None, specialists: bool | None
) -> None:
    evidence = judge_mechanism(graft(0.25), features=record).evidence
    found = [evidence[f"features, {part}"] for part in ("selector", "specialists")]
    assert [line.changed for line in found] == [selector, specialists]
    (change,) = record.changes
    assert (found[0].effect, found[1].effect) == (change.together.routing, change.together.specialist)
    assert found[0].null == max((each.routing.value for each in change.random), default=None)
    assert "the 2 features of L1.resid_pre that training moved most" in found[0].what


@pytest.mark.parametrize(
    "record",
    [
        features(moved(0.2), moved(0.25), changes=()),
        features(moved(0.2), moved(0.25), number=0),
        # S does not do with R's activations what R does: more, less, or something else
        features(moved(0.2), moved(0.4)),
        features(moved(0.2), moved(0.15)),
        features(moved(0.2), moved(0.25, 0.02)),
    ],
)
def test_activations_that_do_not_do_in_s_what_r_does_are_no_evidence(record: FeatureRecord) -> None:
    found = judge_mechanism(graft(0.25), features=record)
    assert not [line for line in found.evidence.values() if line.source == "features"]
    assert found.verdict == "routing"


def test_the_place_where_most_has_arrived_is_the_one_that_counts() -> None:
    early = features(moved(0.01), moved(0.02)).changes[0]
    late = features(moved(0.2), moved(0.25)).changes[0].model_copy(
        update={"site": Site(layer=2, component="mlp_out")}
    )  # fmt: skip
    record = features(moved(0.0), moved(0.0), changes=(early, late))
    assert "features of L2.mlp_out" in judge_mechanism(graft(0.25), record).evidence["features, selector"].what


@pytest.mark.parametrize(
    ("effect", "null", "answer"),
    [
        (about(0.1), 0.01, True),
        (about(0.1), 0.2, None),
        (about(0.002, 0.001), 0.02, False),
        (Interval(value=0.009, low=0.001, high=0.02), 0.0, None),
        (NOT_MEASURED, 0.0, None),
    ],
)
def test_told(effect: Interval, null: float, answer: bool | None) -> None:
    assert told(effect, null) is answer


def test_record_round_trips() -> None:
    found = judge_mechanism(graft(0.25))
    assert Mechanism.model_validate_json(found.model_dump_json()) == found


# --- pairs whose truth is known ---------------------------------------------------------------------------------------

KINDS = ["llama/R-routing", "qwen2/R-skill", "gpt2/R-both"]
"""One of every verdict; `neither` is the same checkpoint twice. The others are slow."""
WIDE = ["gpt_neox/R-routing-dormant"]
"""Where 20 questions cannot tell a share from 0.9: it is 0.862."""
ALL = sorted(
    f"{folder.parent.name}/{folder.name}" for folder in PAIRS.glob("*/R*") if (folder.parent / "truth.json").is_file()
)


def verdict_on(name: str) -> tuple[VerdictRecord, GraftRecord]:
    shape, after = name.split("/")
    suite = load_suite(PAIRS / shape)
    pair = Pair(PAIRS / shape / "S", PAIRS / shape / after, suite)
    behaviour = behaviour_of(shape, after)
    grafted = graft_record(pair, behaviour)
    return judge(behaviour, graft=grafted), grafted


@pytest.mark.parametrize(
    "name", [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
)
def test_the_mechanism_knows_the_truth_and_agrees_with_behaviour(name: str) -> None:
    shape, after = name.split("/")
    found, grafted = verdict_on(name)
    truth = json.loads((PAIRS / shape / "truth.json").read_text())[after]
    assert found.mechanism.verdict == ("inconclusive" if name in WIDE else truth["verdict"])
    assert found.mechanism.agrees
    # what completions tell of S and R, all of R's weights do in S
    assert grafted.after.chosen.value == pytest.approx(truth["bits"]["routing"], abs=1e-4)
    assert grafted.after.done.value == pytest.approx(truth["bits"]["specialist"], abs=1e-3)


def test_the_same_checkpoint_twice_is_neither() -> None:
    found, _ = verdict_on("llama/S")
    assert found.mechanism.verdict == "neither"
    assert found.mechanism.agrees
