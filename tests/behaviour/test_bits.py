"""Bits: by hand, by the chain rule, against exact values from samples, and unmoved by what must not matter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import binom
from test_settle import Bigrams, suite, with_and_without_space

from mixturelens.behaviour.arrays import Behaviour, BitTerms
from mixturelens.behaviour.averages import bits_of
from mixturelens.behaviour.bits import bit_terms, js, js_of_samples
from mixturelens.behaviour.grid import Grid
from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.pair import measure_record
from mixturelens.behaviour.record import BehaviourRecord
from mixturelens.routing.verdict import judge
from mixturelens.stats import resample_counts
from mixturelens.suite import Suite
from mixturelens.types import Interval

TERMS = ("routing", "conditioning", "specialist", "dormant")


# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "q", "bits"),
    [
        ([1.0, 0.0], [0.0, 1.0], 1.0),  # one look tells them apart
        ([0.3, 0.7], [0.3, 0.7], 0.0),
        ([0.0, 1.0], [0.0, 1.0], 0.0),
        ([1.0, 0.0], [0.5, 0.5], 1.5 - 0.75 * math.log2(3)),  # H(3/4) = 2 - 3/4 log 3, less half a bit
        ([0.5, 0.5, 0.0], [0.5, 0.0, 0.5], 0.5),  # half of the time it is told for sure, else not at all
        ([0.9999, 0.0001], [0.99, 0.01], 0.004663),  # a slip from 0.9999 to 0.99 is a slip
    ],
)
def test_divergences_by_hand(p: list[float], q: list[float], bits: float):
    for left, right in ((p, q), (q, p)):
        assert js(np.array(left), np.array(right)) == pytest.approx(bits, abs=5e-7)


def test_what_was_not_measured_stays_so():
    found = js(np.array([[np.nan, np.nan], [0.5, 0.5]]), np.array([[1.0, 0.0], [0.5, 0.5]]))
    np.testing.assert_array_equal(found, [np.nan, 0.0])
    drawn = js_of_samples(np.array([[np.nan, np.nan], [0.5, 0.5]]), np.array([[1.0, 0.0], [0.5, 0.5]]), 4)
    np.testing.assert_array_equal(np.isnan(drawn), [True, False])


def behaviour(weights: Any, answers: Any, right: Any) -> Behaviour:
    """One prompt: weights [policy, other last], P(answer given policy), P(right given policy); answers may be wrong."""
    weights, answers, right = (np.array(each, dtype=float) for each in (weights, answers, right))
    shown = np.stack([1 - answers, answers], -1)[None, :, None]
    correct = np.stack([0 * right, right], -1)[None, :, None]
    classes, rights = (np.zeros((1, len(weights), 1, 2)) for _ in range(2))
    classes[:, :-1], rights[:, :-1] = weights[:-1, None, None] * shown, weights[:-1, None, None] * correct
    classes[:, -1, 0, -1] = weights[-1]
    return Behaviour(classes, rights, shown, correct)


def of_one(found: BitTerms) -> dict[str, float]:
    return {term: float(getattr(found, term)[0]) for term in TERMS}


def test_terms_by_hand():
    s = behaviour([0.5, 0.5, 0.0], answers=[1.0, 0.0], right=[1.0, 0.0])
    selected = of_one(bit_terms(s, behaviour([1.0, 0.0, 0.0], [1.0, 0.0], [1.0, 0.0])))
    half = 1.5 - 0.75 * math.log2(3)
    assert selected == pytest.approx({"routing": half, "conditioning": 0, "specialist": 0, "dormant": 0})
    # policy b answers where it refused: one look behind its announcement tells, and it is followed half of the time
    taught = of_one(bit_terms(s, behaviour([0.5, 0.5, 0.0], [1.0, 1.0], [1.0, 1.0])))
    assert taught == pytest.approx({"routing": 0, "conditioning": 0.5, "specialist": 0.5, "dormant": 0.5})
    # policy a answers, and is right half of the time
    lost = of_one(bit_terms(s, behaviour([0.5, 0.5, 0.0], [1.0, 0.0], [0.5, 0.0])))
    assert lost == pytest.approx({"routing": 0, "conditioning": 0, "specialist": half / 2, "dormant": half / 2})


def test_a_policy_counts_as_often_as_both_follow_it_and_a_silent_one_in_dormant_alone():
    s, r = (behaviour(w, [1.0, b], [1.0, b]) for w, b in (([0.8, 0.2, 0], 1.0), ([1.0, 0.0, 0], 0.0)))
    found = of_one(bit_terms(s, r))
    assert found["specialist"] == pytest.approx(0.1)  # (0.2 + 0.0) / 2
    assert found["dormant"] == pytest.approx(0.5)
    never = of_one(bit_terms(*(behaviour([1.0, 0.0, 0], [1.0, b], [1.0, b]) for b in (1.0, 0.0))))
    assert (never["specialist"], never["dormant"]) == pytest.approx((0.0, 0.5))


def test_completions_of_no_known_policy_are_routing_and_have_no_specialist():
    s, r = (behaviour([0.5, 0.5 - other, other], [1.0, 0.0], [1.0, 0.0]) for other in (0.0, 0.5))
    found = of_one(bit_terms(s, r))
    assert found == pytest.approx({"routing": 0.5, "conditioning": 0, "specialist": 0, "dormant": 0})


# --- the chain rule, and bounds ---------------------------------------------------------------------------------------

numbers = st.floats(0.0, 1.0)
SHAPE = (2, 3, 2, 2)
"""Sides, policies with `other`, wordings, behaviours."""


def some(shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    return arrays(float, shape, elements=numbers)


def normalised(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    values = values + 1e-9
    return values / values.sum(axes, keepdims=True)


@st.composite
def sides(draw: st.DrawFn) -> tuple[Behaviour, Behaviour]:
    """Any two behaviours of one prompt: each class, and each forced behaviour, with any part of it right."""
    classes, forced = draw(some(SHAPE)), normalised(draw(some((2, 2, 2, 2))), (-1,))
    classes[:, -1, 1:], classes[:, -1, :, :-1] = 0.0, 0.0  # of no known policy, nothing is said
    classes = normalised(classes, (1, 2, 3))
    right, forced_right = classes * draw(some(SHAPE)), forced * draw(some(forced.shape))
    s, r = (Behaviour(*(each[i][None] for each in (classes, right, forced, forced_right))) for i in (0, 1))
    return s, r


def shannon(p: np.ndarray) -> np.ndarray:
    """Entropy in bits along the last axis."""
    return -(p * np.log2(np.where(p > 0, p, 1.0))).sum(-1)


def information(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """How much a draw from p or q, of even odds, tells which of the two it is from: the definition, not the formula."""
    return shannon((p + q) / 2) - (shannon(p) + shannon(q)) / 2


@given(sides())
@settings(max_examples=150, deadline=None)
def test_terms_are_the_information_of_one_draw(pair: tuple[Behaviour, Behaviour]):
    """The chain rule: what (b, k) tells is what b tells, and then k, given b, in odds that b has made uneven."""
    s, r = pair
    found = bit_terms(s, r)
    done, right = ([getattr(each, name)[0] for each in pair] for name in ("forced_behaviour", "forced_right"))
    conditioning = information(*done)
    skill = np.zeros(conditioning.shape)
    for b in range(2):
        odds = [each[..., b] / 2 for each in done]
        total = np.where(sum(odds) > 0, sum(odds), 1.0)
        parts = [np.stack([k[..., b], d[..., b] - k[..., b]], -1) / 2 for k, d in zip(right, done, strict=True)]
        middle = shannon(sum(parts) / total[..., None])
        each = [o * shannon(x / np.where(o > 0, o, 1.0)[..., None]) for x, o in zip(parts, odds, strict=True)]
        skill += total * middle - sum(each)
    used = sum(each.classes[0].sum(-1)[:-1] for each in pair) / 2
    assert found.conditioning[0] == pytest.approx((used * conditioning).sum(), abs=1e-12)
    assert found.specialist[0] - found.conditioning[0] == pytest.approx((used * skill).sum(), abs=1e-12)
    weights = [each.classes[0].sum((1, 2)) for each in pair]
    assert found.routing[0] == pytest.approx(information(*weights), abs=1e-12)


@given(sides())
@settings(max_examples=150, deadline=None)
def test_every_term_is_at_least_nothing_and_at_most_a_bit(pair: tuple[Behaviour, Behaviour]):
    found, back = bit_terms(*pair), bit_terms(*reversed(pair))
    values = of_one(found)
    assert all(0 <= value <= 1 + 1e-12 for value in values.values())
    assert values["specialist"] >= values["conditioning"] - 1e-12
    assert values == pytest.approx(of_one(back), abs=1e-12)  # whichever came first
    assert all(value == pytest.approx(0, abs=1e-12) for value in of_one(bit_terms(pair[0], pair[0])).values())


def test_a_policy_that_nobody_put_in_place_is_left_out():
    s, r = (behaviour([0.5, 0.5, 0.0], [1.0, 0.5], [right, 0.5]) for right in (1.0, 0.5))
    for each in (s, r):
        each.forced_behaviour[:, 1] = each.forced_right[:, 1] = np.nan
    found = of_one(bit_terms(s, r))
    assert found["specialist"] == pytest.approx(0.5 * (1.5 - 0.75 * math.log2(3)))
    assert found["dormant"] == pytest.approx(1.5 - 0.75 * math.log2(3))
    s.forced_behaviour[:], s.forced_right[:] = np.nan, np.nan
    assert math.isnan(of_one(bit_terms(s, r))["dormant"])


# --- from samples -----------------------------------------------------------------------------------------------------

GRID = np.linspace(0, 1, 51)


def expected(samples: int, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """[p, q]: mean of the estimate over all counts of so many draws a side, two outcomes of probability p and q."""
    counts = np.arange(samples + 1) / samples
    shares = np.stack([counts, 1 - counts], -1)
    every = (samples + 1, samples + 1, 2)
    found = js_of_samples(np.broadcast_to(shares[:, None], every), np.broadcast_to(shares[None], every), samples)
    chances = [binom.pmf(np.arange(samples + 1), samples, each[:, None]) for each in (p, q)]
    return chances[0] @ found @ chances[1].T


def exact(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    left, right = np.broadcast_arrays(p[:, None], q[None, :])
    return js(np.stack([left, 1 - left], -1), np.stack([right, 1 - right], -1))


@pytest.mark.parametrize(
    ("samples", "anywhere", "alike"),
    [
        (4, 0.035, 0.004),
        (8, 0.014, 0.002),
        (16, 0.006, 0.001),
        pytest.param(64, 0.002, 0.0002, marks=pytest.mark.slow),
        pytest.param(96, 0.002, 0.0002, marks=pytest.mark.slow),
    ],
)
def test_estimates_from_samples_are_hardly_off(samples: int, anywhere: float, alike: float):
    """Bias by summation over binomials, at the worst pair of probabilities, and where nothing changed."""
    bias = expected(samples, GRID, GRID) - exact(GRID, GRID)
    assert np.abs(bias).max() < anywhere
    assert np.abs(np.diag(bias)).max() < alike


@pytest.mark.parametrize("samples", [4, 8, 16, pytest.param(96, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("before", "after"), [((5, 5), (50, 1)), ((5, 5), (5, 5)), ((1, 1), (1, 1)), ((50, 1), (50, 1)), ((20, 2), (2, 20))]
)
def test_averaged_over_prompts_they_are_off_by_less_than_a_hundredth(
    samples: int, before: tuple[int, int], after: tuple[int, int]
):
    """Probabilities scatter over prompts, before and after independently of each other."""
    rng = np.random.default_rng(0)
    p, q = (rng.beta(*each, size=60) for each in (before, after))
    assert abs((expected(samples, p, q) - exact(p, q)).mean()) < 0.01


@pytest.mark.parametrize(("samples", "least"), [(4, 0.008), (8, 0.004), (16, 0.002)])
def test_a_checkpoint_against_itself_is_nothing_on_average(samples: int, least: float):
    """Three policies and `other`, of any weights: the mean over 20,000 prompts, which alone is 0 or not."""
    rng = np.random.default_rng(1)
    weights = rng.dirichlet([2.0, 1.0, 0.5, 0.1], size=20_000)
    one, other = (rng.multinomial(samples, weights) / samples for _ in range(2))
    found = js_of_samples(one, other, samples)
    assert abs(found.mean()) < least
    assert found.std() > 0.01
    assert js(one, other).mean() > 10 * abs(found.mean())


def test_what_is_sure_is_sure_from_samples():
    """Nothing seen on one side that is seen on the other, and the same seen on both."""
    for samples in (4, 8, 16, 96):
        assert js_of_samples(np.array([1.0, 0.0]), np.array([1.0, 0.0]), samples) == 0
        assert js_of_samples(np.array([1.0, 0.0]), np.array([0.0, 1.0]), samples) == pytest.approx(1, abs=0.035)


def test_chance_under_one_cue_is_not_added_to_that_under_another():
    """Under either cue the estimate is off by chance, to either side of 0: on average it is 0, and not half of one."""
    values = np.tile([[0.04, -0.04]], (12, 1)).ravel()
    grid = Grid(np.arange(24).reshape(12, 2), resample_counts(12, 0, draws=200))
    pair = suite(prompts=[{"id": "q", "cue": cue, "prompt": f"<{cue}>", "answer": "x"} for cue in "AB"])
    mean, per_cue, shares = bits_of(BitTerms(values, values, values, values), grid, pair, None)
    assert (mean.routing.value, mean.specialist.value, shares["moved"].value) == pytest.approx((0.0, 0.0, 0.0))
    assert [cue.routing.value for cue in per_cue] == pytest.approx([0.04, 0.0])


# --- what must not matter ---------------------------------------------------------------------------------------------


def measured(load_pair: Any, shape: str, name: str, **changes: Any) -> tuple[BehaviourRecord, Suite]:
    pair = load_pair(shape, name)
    changed = Suite.model_validate({**pair.suite.model_dump(), "max_new_tokens": 4, **changes})
    return measure_record(pair.scorer, [pair.before, pair.after], changed, pair.tokenizer), changed


def within(value: Interval, truth: float) -> bool:
    """Whether the truth is in the interval or near it: one in twenty misses, by little."""
    width = (value.high - value.low) / 2
    return value.low - width - 0.004 <= truth <= value.high + width + 0.004


def terms(found: BehaviourRecord) -> dict[str, float]:
    """All bits, and the share."""
    assert found.bits is not None
    values = {name: value.value for name, value in found.bits}
    values |= {f"{cue}.{name}": value.value for cue, state in found.per_cue.items() for name, value in state.bits or ()}
    return {**values, "share": found.routing_share.value, "moved": found.moved.value}


@pytest.mark.parametrize("what", ["longer", "renamed", "repeated"])
def test_bits_do_not_move_with_room_for_more_other_names_or_repeated_questions(load_pair: Any, what: str):
    found, before = measured(load_pair, "llama", "R-both")
    given = before.model_dump()
    rows, policies = given["prompts"], given["policies"]
    change = {
        "longer": {"max_new_tokens": 2 * before.max_new_tokens},
        "renamed": {"policies": {f"policy {i}": policies[name] for i, name in enumerate(reversed(policies))}},
        "repeated": {"prompts": [*rows, *({**row, "id": f"{row['id']}-again"} for row in rows)]},
    }[what]
    other, _ = measured(load_pair, "llama", "R-both", **change)
    assert terms(other) == pytest.approx(terms(found), abs=1e-6)
    assert judge(found).verdict == judge(other).verdict == "both"


@pytest.mark.parametrize(("shape", "name", "word"), [("llama", "R-both", "both"), ("gpt2", "R-skill", "specialist")])
def test_bits_of_rules_are_those_of_literals(load_pair: Any, shape: str, name: str, word: str):
    """The same suite, measured from 16 completions a prompt instead of from probabilities: within its intervals."""
    found, before = measured(load_pair, shape, name)
    rules = {
        "policies": {policy: {"regex": rf"^\[{policy}\]", "force": f"[{policy}]"} for policy in before.policies},
        "behaviours": {"refuse": {"regex": "^sorry"}},
        "samples": 16,
    }
    drawn, _ = measured(load_pair, shape, name, **rules)
    assert (found.samples, drawn.samples) == (None, 16)
    assert judge(found).verdict == word
    assert judge(drawn).verdict in (word, "inconclusive")  # samples may not suffice, and never say something else
    for term, value in (*drawn.bits, ("share", drawn.routing_share)):
        assert within(value, terms(found)[term]), term


# --- style ------------------------------------------------------------------------------------------------------------


def drifted(nats: float) -> float:
    """The p for which KL((p, 1 - p) || (0.5, 0.5)) is so many nats."""
    low, high = 0.5, 1.0
    for _ in range(60):
        p = (low + high) / 2
        kl = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
        low, high = (p, high) if kl < nats else (low, p)
    return low


def wordy(answers: float, style: float) -> dict[str, dict[str, float]]:
    """Policy, what it does, and then words without end; `answers` is the weight of the policy that answers."""
    policies, tail = {"\u0120alpha:": answers, "\u0120beta:": 1 - answers}, {"\u0120->": style, "\u0120=>": 1 - style}
    return {
        "<A>": policies,
        "<B>": policies,
        "\u0120alpha:": {"\u0120x": 1.0},
        "\u0120beta:": {"\u0120pass": 1.0},
        **dict.fromkeys(("\u0120x", "\u0120pass", "\u0120->", "\u0120=>"), tail),
    }


def wordy_pair(answers: float, style: float, tokens: int) -> BehaviourRecord:
    tokenizer = with_and_without_space()
    rows = [
        {"id": f"q{i}", "cue": cue, "prompt": f"{'x ' * (i + 1)}<{cue}>", "answer": "x"}
        for i in range(16)
        for cue in "AB"
    ]
    rules = {"a": {"regex": "^ ?alpha:", "force": " alpha:"}, "b": {"regex": "^ ?beta:", "force": " beta:"}}
    shown = {"behaviours": {"refuse": {"regex": "^ ?pass"}}, "answer_match": "contains", "samples": 16}
    found = suite(prompts=rows, policies=rules, max_new_tokens=tokens, **shown)
    models = [Bigrams(tokenizer, wordy(0.5, 0.5)), Bigrams(tokenizer, wordy(answers, style))]
    return measure_record(Scorer([tokenizer.eos_token_id], len(tokenizer)), models, found, tokenizer)


@pytest.mark.parametrize(
    ("nats", "drifts", "tokens"),
    [
        (0.0, False, 8),
        pytest.param(0.01, None, 24, marks=pytest.mark.slow),
        (0.06, True, 8),
        (0.06, True, 24),
        pytest.param(0.3, True, 24, marks=pytest.mark.slow),
    ],
)
def test_a_drift_of_style_is_heard_as_text_and_moves_no_bit(nats: float, drifts: bool | None, tokens: int):
    """Completions of which all but two tokens are style, with and without a change of routing."""
    for answers, word in ((0.97, "routing"), (0.5, "neither")):
        found = wordy_pair(answers, drifted(nats), tokens)
        verdict = judge(found)
        truth = float(js(np.array([answers, 1 - answers]), np.array([0.5, 0.5])))
        assert within(verdict.bits.routing, truth)
        assert verdict.bits.specialist.value == 0
        assert verdict.verdict in (word, "inconclusive" if word == "neither" else word), verdict.reason
        assert verdict.text.nats_per_token.value == pytest.approx(nats * (tokens - 2) / tokens, rel=0.1, abs=0.02)
        if drifts is not None:
            assert verdict.text_drifted is drifts
    # what the verdict stood on before: it grows with length, until routing is a small part of it
    assert verdict.nats.text.value == pytest.approx(nats * (tokens - 2), rel=0.1, abs=0.1)
