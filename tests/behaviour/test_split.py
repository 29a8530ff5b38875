"""Both splits add up exactly, and say what they should where the answer is known by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mixturelens.behaviour import split

SHAPE = (3, 2, 2)


def class_terms(after: np.ndarray, before: np.ndarray) -> list[float]:
    """The terms of one prompt."""
    return [float(term[0]) for term in split.class_terms(after[None], before[None])]


def accuracy_split(*arrays: np.ndarray) -> list[float]:
    return [float(side[0]) for side in split.accuracy_split(*(array[None] for array in arrays))]


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(split.kl(p[None], q[None])[0])


positive = arrays(float, SHAPE, elements=st.floats(1e-6, 1.0)).map(lambda x: x / x.sum())
weights = arrays(float, (2, 3), elements=st.floats(1e-3, 1.0)).map(lambda x: x / x.sum(-1, keepdims=True))
accuracies = arrays(float, (2, 3), elements=st.floats(0.0, 1.0))


@given(positive, positive)
def test_the_chain_rule_adds_up_to_the_kl_of_the_joint(after: np.ndarray, before: np.ndarray):
    terms = class_terms(after, before)
    whole = float((after * np.log(after / before)).sum())
    assert sum(terms) == pytest.approx(whole, abs=1e-9)
    assert min(terms) >= -1e-12


@given(positive, positive)
def test_each_term_is_the_conditional_kl_of_its_name(after: np.ndarray, before: np.ndarray):
    routing, wording, conditioning = class_terms(after, before)
    by_hand = [0.0, 0.0, 0.0]
    for m in range(3):
        r, s = after[m].sum(), before[m].sum()
        by_hand[0] += r * np.log(r / s)
        for w in range(2):
            r_w, s_w = after[m, w].sum(), before[m, w].sum()
            by_hand[1] += r_w * np.log((r_w / r) / (s_w / s))
            for b in range(2):
                r_b, s_b = after[m, w, b], before[m, w, b]
                by_hand[2] += r_b * np.log((r_b / r_w) / (s_b / s_w))
    assert [routing, wording, conditioning] == pytest.approx(by_hand, abs=1e-9)


@given(positive, st.integers(0, 2**32 - 1))
def test_moving_weight_between_policies_is_routing_alone(before: np.ndarray, seed: int):
    mixture = np.random.default_rng(seed).dirichlet(np.ones(3))
    after = before / before.sum((1, 2), keepdims=True) * mixture[:, None, None]
    routing, wording, conditioning = class_terms(after, before)
    assert routing == pytest.approx(float((mixture * np.log(mixture / before.sum((1, 2)))).sum()), abs=1e-9)
    assert [wording, conditioning] == pytest.approx([0, 0], abs=1e-9)


@given(positive)
@settings(max_examples=20)
def test_nothing_changed_is_exactly_zero(same: np.ndarray):
    assert class_terms(same, same) == [0.0, 0.0, 0.0]


def test_from_half_and_half_routing_is_at_most_ln_2():
    before, after = np.zeros((3, 1, 1)), np.zeros((3, 1, 1))
    before[:2] = 0.5
    after[0] = 1.0
    assert class_terms(after, before)[0] == pytest.approx(np.log(2))


def test_kl_of_what_was_impossible_is_infinite_and_of_what_vanished_is_not():
    assert kl(np.array([0.5, 0.5]), np.array([1.0, 0.0])) == np.inf
    assert kl(np.array([1.0, 0.0]), np.array([0.5, 0.5])) == pytest.approx(np.log(2))


@given(weights, accuracies)
def test_the_accuracy_split_is_exact(c: np.ndarray, p: np.ndarray):
    selector, specialists = accuracy_split(c[0], p[0], c[1], p[1])
    change = float((c[1] * p[1]).sum() - (c[0] * p[0]).sum())
    assert selector + specialists == pytest.approx(change, abs=1e-12)


@given(weights, accuracies)
def test_each_side_of_the_accuracy_split_is_blind_to_the_other(c: np.ndarray, p: np.ndarray):
    assert accuracy_split(c[0], p[0], c[1], p[0])[1] == pytest.approx(0, abs=1e-12)
    assert accuracy_split(c[0], p[0], c[0], p[1])[0] == pytest.approx(0, abs=1e-12)


def test_a_policy_that_is_gone_was_selected_away_and_not_unlearnt():
    half, one = np.array([0.5, 0.5]), np.array([0.0, 1.0])
    selector, specialists = accuracy_split(half, np.array([1.0, 0.0]), one, np.array([np.nan, 0.0]))
    assert (selector, specialists) == (-0.5, 0.0)
