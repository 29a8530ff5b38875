"""All three ways of measuring say what `truth.json` says; it was summed over all completions by other code."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mixturelens.behaviour import pair as instrument
from mixturelens.behaviour.likelihood import Ids, Model, Scorer
from mixturelens.behaviour.measure import measure, measure_change
from mixturelens.behaviour.pair import measure_record
from mixturelens.behaviour.prompts import ASIDE, prepare
from mixturelens.behaviour.record import BehaviourRecord, Bits, Controls
from mixturelens.behaviour.sampled import nulls
from mixturelens.routing.verdict import judge
from mixturelens.suite import Suite
from mixturelens.types import InputError, Interval

PAIRS = Path(__file__).parents[1] / "pairs"
TRUTH = {
    (file.parent.name, name): truth
    for file in sorted(PAIRS.glob("*/truth.json"))
    for name, truth in json.loads(file.read_text()).items()
}
every_pair = pytest.mark.parametrize(("shape", "name"), TRUTH, ids=lambda x: x)
QUICK = {(shape, name) for shape, name in TRUTH if name == "R-routing"} | {
    ("llama", "R-both"), ("gpt2", "R-skill"), ("qwen2", "R-conditioning"), ("gpt_neox", "R-neither"),
    ("llama", "R-routing-mild"), ("gpt2", "R-routing-other"), ("gpt_neox", "R-routing-dormant"),
}  # fmt: skip
"""Every shape and every kind of change."""
BITS = ("routing", "conditioning", "specialist", "dormant")
EVERY = 10**9
"""Completions, of which no suite here has as many: all are enumerated."""
UNTOLD = {"R-routing-dormant": "crosses the threshold 0.9"}
"""Half of the questions carry the specialist's change, and the share is near a threshold: so few cannot tell."""
NATS = ("routing", "wording", "conditioning", "skill", "text", "other")


@pytest.fixture
def no_controls(monkeypatch):
    """Controls measure everything twice again; test_behaviour_pair.py has them."""
    nothing = Bits(**dict.fromkeys(Bits.model_fields, Interval()))
    empty = Controls(
        same_checkpoint=nothing, shuffled_routing_share=Interval(), independent_total=Interval(), sum_agrees=None
    )
    monkeypatch.setattr(instrument, "_nulls_of_bits", lambda *_: (nothing, None))
    monkeypatch.setattr(instrument, "_controls", lambda *_, **__: empty)


@functools.cache
def enumerated(
    scorer: Scorer, model: Model, contexts: tuple[Ids, ...], limit: int
) -> tuple[list[list[int]], np.ndarray]:
    return Scorer.enumerate(scorer, [model], contexts, limit)


class Remembering(Scorer):
    """Enumerates the completions of a model once: S stands beside every R of its shape."""

    def enumerate(
        self, models: Sequence[Model], contexts: Sequence[Ids], max_new_tokens: int
    ) -> tuple[list[list[int]], np.ndarray]:
        every = [enumerated(self, model, tuple(map(tuple, contexts)), max_new_tokens) for model in models]
        return every[0][0], np.concatenate([logs for _, logs in every])


@functools.cache
def remembering(ends: tuple[int, ...], vocabulary: int) -> Scorer:
    return Remembering(ends, vocabulary)


def enumerate_at_most(completions: int, monkeypatch) -> None:
    """Enumerate where there are at most so many completions a prompt."""
    monkeypatch.setattr("mixturelens.behaviour.measure.ENUMERATE_AT_MOST", completions)


def as_rules(suite: Suite, **changes) -> Suite:
    """The same suite with rules instead of literals, which are measured by drawing."""
    rules = {
        "policies": {name: {"regex": rf"^\[{name}\]", "force": f"[{name}]"} for name in suite.policies},
        "behaviours": {"refuse": {"regex": "^sorry"}},
    }
    return Suite.model_validate({**suite.model_dump(), **rules, **changes})


def near(found: Interval, truth: float, wider: float, slack: float) -> bool:
    """Whether the truth is in the interval, widened by a factor about the estimate and by a constant."""
    low, high = found.value - wider * (found.value - found.low), found.value + wider * (found.high - found.value)
    return low - slack <= truth <= high + slack


def check_verdict(found: BehaviourRecord, name: str, truth: str) -> None:
    verdict = judge(found)
    if name in UNTOLD:
        assert verdict.verdict == "inconclusive"
        assert UNTOLD[name] in verdict.reason
    else:
        assert verdict.verdict == truth


@pytest.mark.parametrize(
    ("shape", "name"), [each if each in QUICK else pytest.param(*each, marks=pytest.mark.slow) for each in TRUTH]
)
def test_enumeration_is_the_truth(load_pair, no_controls, shape: str, name: str):
    pair, truth = load_pair(shape, name), TRUTH[shape, name]
    scorer = remembering(pair.scorer.ends, pair.scorer.vocabulary)
    found = measure_record(scorer, [pair.before, pair.after], pair.suite, pair.tokenizer)
    assert found.method == "enumerated"
    for unit in ("bits", "nats"):
        for term, value in truth[unit].items():
            assert getattr(getattr(found, unit), term).value == pytest.approx(value, abs=1e-5), (unit, term)
        for cue, sides in truth["per_cue"].items():
            for term, value in sides[unit].items():
                there = getattr(getattr(found.per_cue[cue], unit), term)
                assert there.value == pytest.approx(value, abs=1e-5), (cue, unit, term)
    for cue, sides in truth["per_cue"].items():
        state = found.per_cue[cue]
        for term, value in sides["accuracy_change"].items():
            assert getattr(state.accuracy_change, term).value == pytest.approx(value, abs=1e-5), (cue, term)
        for when, side in (("before", state.before), ("after", state.after)):
            assert side.weights == pytest.approx(sides[when]["weights"], abs=1e-5)
            assert side.accuracy == pytest.approx(sides[when]["accuracy"], abs=1e-5)
            assert side.overall == pytest.approx(sides[when]["overall"], abs=1e-5)
    check_verdict(found, name, truth["verdict"])
    if truth["verdict"] != "neither":  # of nearly nothing, the share means nothing
        assert found.routing_share.value == pytest.approx(truth["routing_share"], abs=1e-4)
        assert found.router_share.value == pytest.approx(truth["router_share"], abs=1e-4)


@every_pair
def test_the_literal_way_agrees(load_pair, no_controls, monkeypatch, shape: str, name: str):
    pair, truth = load_pair(shape, name), TRUTH[shape, name]
    enumerate_at_most(0, monkeypatch)
    found = measure_record(pair.scorer, [pair.before, pair.after], pair.suite, pair.tokenizer)
    assert found.method == "literal"
    for term, value in truth["bits"].items():  # exact
        assert getattr(found.bits, term).value == pytest.approx(value, abs=1e-6), term
    for term in ("routing", "conditioning", "skill", "specialist", "wording"):  # exact, too
        assert getattr(found.nats, term).value == pytest.approx(truth["nats"][term], abs=1e-5), term
    for term in ("text", "total"):  # from what follows, sampled
        assert near(getattr(found.nats, term), truth["nats"][term], wider=2, slack=0.01), term
    for cue, sides in truth["per_cue"].items():
        state = found.per_cue[cue]
        for term, value in sides["accuracy_change"].items():
            assert getattr(state.accuracy_change, term).value == pytest.approx(value, abs=1e-5), (cue, term)
        for when, side in (("before", state.before), ("after", state.after)):
            assert side.weights == pytest.approx(sides[when]["weights"], abs=1e-5)
            assert side.accuracy == pytest.approx(sides[when]["accuracy"], abs=1e-5)
    check_verdict(found, name, truth["verdict"])


@pytest.mark.parametrize(
    ("shape", "name"),
    [("llama", "R-routing"), ("gpt2", "R-skill"), ("gpt_neox", "R-routing-dormant"), ("qwen2", "R-both"),
     ("llama", "R-routing-mild"), ("gpt2", "R-neither")],
)  # fmt: skip
def test_the_sampled_way_agrees(load_pair, no_controls, monkeypatch, shape: str, name: str):
    pair, truth = load_pair(shape, name), TRUTH[shape, name]
    enumerate_at_most(0, monkeypatch)
    found = measure_record(pair.scorer, [pair.before, pair.after], as_rules(pair.suite, samples=16), pair.tokenizer)
    assert found.method == "sampled"
    assert found.samples == 16
    for term, value in truth["bits"].items():
        assert near(getattr(found.bits, term), value, wider=2, slack=0.01), term
    for term in ("routing", "conditioning", "wording", "total"):  # rightness and text share out what few samples show
        assert near(getattr(found.nats, term), truth["nats"][term], wider=2, slack=0.01), term
    for cue, sides in truth["per_cue"].items():
        state = found.per_cue[cue]
        for when, side in (("before", state.before), ("after", state.after)):
            for policy, weight in sides[when]["weights"].items():
                assert near(side.intervals[f"weights.{policy}"], weight, wider=2, slack=0.01), (cue, when, policy)
            for policy, accuracy in sides[when]["accuracy"].items():
                assert near(side.intervals[f"accuracy.{policy}"], accuracy, wider=2, slack=0.02), (cue, when, policy)
        for term, value in sides["accuracy_change"].items():
            # a policy that R hardly speaks has no accuracy of its own among R's samples, only where it is forced
            if name != "R-routing-dormant" or term == "total":
                assert near(getattr(state.accuracy_change, term), value, wider=2, slack=0.02), (cue, term)
    assert judge(found).verdict in (truth["verdict"], "inconclusive")


@pytest.mark.parametrize("way", ["enumerated", "literal", "sampled"])
@pytest.mark.parametrize("name", ["R-both", "R-routing"])
def test_the_terms_add_up_to_the_kl_on_every_prompt(load_pair, monkeypatch, way: str, name: str):
    pair = load_pair("llama", name)
    suite = as_rules(pair.suite) if way == "sampled" else pair.suite
    prompts = prepare(suite, suite.neutral[:16], pair.tokenizer)
    enumerate_at_most(EVERY if way == "enumerated" else 0, monkeypatch)
    change = measure_change(pair.scorer, pair.before, pair.after, prompts)
    assert change.method == way
    total = sum(getattr(change.nats, term) for term in NATS)
    completions, (log_r, log_s) = pair.scorer.enumerate((pair.after, pair.before), prompts.contexts, 3)
    assert len(completions) == 3616
    truth = (np.exp(log_r) * (log_r - log_s)).sum(-1)
    if way == "enumerated":
        np.testing.assert_allclose(total, truth, atol=1e-6)
    else:
        assert total.mean() == pytest.approx(truth.mean(), abs=0.12)


@pytest.mark.parametrize("way", ["enumerated", "literal"])
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_a_checkpoint_against_itself_is_exactly_zero(load_pair, monkeypatch, way: str, shape: str):
    pair = load_pair(shape, "R-routing")
    prompts = prepare(pair.suite, pair.suite.neutral[:8], pair.tokenizer)
    enumerate_at_most(EVERY if way == "enumerated" else 0, monkeypatch)
    change = measure_change(pair.scorer, pair.before, pair.before, prompts)
    for terms, names in ((change.bits, BITS), (change.nats, NATS)):
        for term in names:
            assert np.abs(getattr(terms, term)).max() < (1e-12 if way != "enumerated" else 1e-10), (way, term)


def test_a_checkpoint_against_itself_is_zero_but_for_what_samples_say(load_pair, monkeypatch):
    pair = load_pair("llama", "R-routing")
    suite = as_rules(pair.suite)
    prompts = prepare(suite, suite.neutral, pair.tokenizer)
    enumerate_at_most(0, monkeypatch)
    change = measure_change(pair.scorer, pair.before, pair.before, prompts)
    for term in BITS:
        values = getattr(change.bits, term)
        assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values)) + 0.004, term
    for term in NATS:
        assert np.abs(getattr(change.nats, term)).max() < 1e-12, term


@pytest.mark.parametrize("shape", ["llama", "qwen2"])
def test_independent_estimates_agree_with_the_sum_of_the_terms(load_pair, shape: str):
    pair, truth = load_pair(shape, "R-both"), TRUTH[shape, "R-both"]["nats"]["total"]
    prompts = prepare(pair.suite.model_copy(update={"samples": 32}), pair.suite.neutral, pair.tokenizer)
    found = nulls(pair.scorer, pair.before, pair.after, prompts, seed=3)
    asked = ~np.isnan(found.kl)
    assert {row.id for row, one in zip(prompts.rows, asked, strict=True) if one} < {row.id for row in prompts.rows}
    assert asked.sum() == ASIDE * len(pair.suite.cues)
    shuffled, token_kl, ratio = (values[asked] for values in (found.shuffled, found.kl, found.ratio))
    for values in (token_kl, ratio):
        assert values.mean() == pytest.approx(truth, abs=4 * values.std() / np.sqrt(len(values)))
    assert abs(shuffled.mean()) < 0.1 * truth  # labels that mean nothing explain nothing


def test_a_single_checkpoint_is_measured_alike_by_rules_and_literals(load_pair):
    pair = load_pair("llama", "R-both")
    exact = measure(pair.scorer, pair.after, pair.prompts)
    suite = as_rules(pair.suite, samples=64)
    drawn = measure(pair.scorer, pair.after, prepare(suite, suite.neutral, pair.tokenizer))
    np.testing.assert_allclose(exact.weights.sum(-1), 1.0, atol=1e-9)
    np.testing.assert_allclose(drawn.weights.sum(-1), 1.0, atol=1e-9)
    np.testing.assert_allclose(drawn.weights.mean(0), exact.weights.mean(0), atol=0.02)
    np.testing.assert_allclose(drawn.forced_accuracy.mean(0), exact.forced_accuracy.mean(0), atol=0.02)
    np.testing.assert_allclose(drawn.forced_behaviour.mean(0), exact.forced_behaviour.mean(0), atol=0.02)


def test_several_wordings_of_a_policy_are_summed(load_pair, monkeypatch):
    """[a] and [b] as two wordings of one policy: their routing becomes wording, and nothing else moves."""
    pair, truth = load_pair("llama", "R-routing"), TRUTH["llama", "R-routing"]["nats"]
    suite = Suite.model_validate({**pair.suite.model_dump(), "policies": {"either": ["[a]", "[b]"]}})
    prompts = prepare(suite, suite.neutral, pair.tokenizer)
    for most in (EVERY, 0):
        enumerate_at_most(most, monkeypatch)
        change = measure_change(pair.scorer, pair.before, pair.after, prompts)
        # routing is now between `either` and `other` alone
        nats = change.nats
        assert nats.routing.mean() < 1e-3
        assert change.bits.routing.mean() < 1e-3
        assert (nats.routing + nats.wording).mean() == pytest.approx(truth["routing"], abs=1e-4)
        assert nats.conditioning.mean() == pytest.approx(truth["conditioning"], abs=1e-4)
    shared = [b.forced_accuracy for b in (change.before, change.after)]
    assert [x.shape for x in shared] == [(40, 1)] * 2


def test_a_force_that_leaves_no_room_is_refused_by_name(load_pair):
    pair = load_pair("llama", "R-both")
    rules = {"a": {"regex": r"^\[a\]", "force": "[a] = ="}, "b": {"regex": r"^\[b\]", "force": "[b]"}}
    suite = Suite.model_validate({**pair.suite.model_dump(), "policies": rules})
    with pytest.raises(InputError, match=r"max_new_tokens: 3 leaves no room behind '\[a\] = ='"):
        prepare(suite, suite.neutral, pair.tokenizer)


def test_an_answer_that_does_not_fit_is_refused_by_name(load_pair):
    pair = load_pair("llama", "R-both")
    suite = pair.suite.model_copy(update={"max_new_tokens": 1})
    with pytest.raises(InputError, match=r"max_new_tokens: 1 cannot hold announcement and answer of prompt 'q00' \(2"):
        prepare(suite, suite.neutral, pair.tokenizer)


def test_parts_of_the_prompts_keep_their_answers(load_pair):
    prompts = load_pair("llama", "R-both").prompts
    part = prompts.part([3, 1])
    assert part.rows == (prompts.rows[3], prompts.rows[1])
    assert part.contexts == [prompts.contexts[3], prompts.contexts[1]]
    assert part.placed == [prompts.placed[3], prompts.placed[1]]
    assert part.bare == [prompts.bare[3], prompts.bare[1]]
