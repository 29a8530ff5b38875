"""Drift against closed forms, an independent integration, and the enumeration of all groups."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixturelens.lab.theory import Drift, Sampling, curve, exact_path, group_pace, sampled_paths, shifted, velocity
from mixturelens.types import InputError

START, RIGHT = np.array([0.475, 0.475, 0.05]), np.array([1.0, 0.0, 1.0])


def _runs(number: int, *same: np.ndarray) -> list[np.ndarray]:
    """As many runs that all start alike."""
    return [np.broadcast_to(each, (number, *each.shape)) for each in same]


def test_two_policies_follow_the_closed_form():
    """Of log-odds x: x + sinh x grows with time under softmax drift, x itself under replicator dynamics."""
    start, right = np.array([0.2, 0.8]), np.array([0.9, 0.3])
    for drift, closed in (("softmax", lambda x: x + np.sinh(x)), ("replicator", lambda x: x)):
        path = exact_path(start, right, drift)
        odds = np.log(path.weights[:, 0] / path.weights[:, 1])
        grown = closed(odds) - closed(odds[0])
        np.testing.assert_allclose(grown, 0.6 * path.time, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("drift", ["softmax", "replicator"])
def test_an_independent_integration_of_the_weights_agrees(drift: Drift):
    """Runge-Kutta of fixed steps, on the weights instead of theta."""
    start, right = np.array([0.3, 0.5, 0.15, 0.05]), np.array([0.95, 0.1, 0.7, 0.97])
    path = exact_path(start, right, drift)
    here = 150
    pieces, end = 5_000, path.time[here]

    def slope(c: np.ndarray) -> np.ndarray:
        v = c * (right - c @ right) if drift == "softmax" else right - c @ right
        return c * (v - c @ v)

    c, h = start, end / pieces
    for _ in range(pieces):
        a = slope(c)
        b = slope(c + h / 2 * a)
        d = slope(c + h / 2 * b)
        c = c + h / 6 * (a + 2 * b + 2 * d + slope(c + h * d))
    np.testing.assert_allclose(path.weights[here], c, atol=1e-6)


def test_the_rich_get_richer_under_softmax_drift_alone():
    """A policy that is good everywhere keeps its share of the good under replicator dynamics, and loses it else."""
    fair, unfair = (exact_path(START, RIGHT, drift).weights[-1] for drift in ("replicator", "softmax"))
    assert fair[2] == pytest.approx(0.05 / 0.525, abs=1e-4)
    assert unfair[2] < 0.05
    equal = exact_path(np.array([0.25, 0.5, 0.25]), np.array([1.0, 0.0, 1.0])).weights
    np.testing.assert_allclose(equal[:, 0], equal[:, 2], atol=1e-9)


def test_a_path_is_evenly_spaced_and_ends_settled():
    path = exact_path(START, RIGHT)
    reached = path.weights @ RIGHT
    assert reached[0] == pytest.approx(0.525)
    assert reached[-1] == pytest.approx(1, abs=1.1e-4)
    np.testing.assert_allclose(np.diff(reached), np.diff(reached).mean(), rtol=0.05)
    np.testing.assert_allclose(path.weights, shifted(START, path.shift))


def test_a_curve_has_no_clock_and_sees_each_cue_from_its_own_weights():
    path = exact_path(START, RIGHT)
    off = np.array([0.0, 1.0, 1.0])
    here, there = curve(path, START, RIGHT, off)
    np.testing.assert_allclose(here, path.weights @ RIGHT)
    np.testing.assert_allclose(there, path.weights @ off)
    assert there[-1] < 0.05 < there[0]
    _, certain = curve(path, np.array([0.0, 0.0, 1.0]), RIGHT, off)
    np.testing.assert_allclose(certain, 1.0)


@pytest.mark.parametrize("scaled", [True, False])
def test_groups_move_along_the_drift_at_their_pace(scaled: bool):
    """Every group of three answers of two policies, weighed by its probability."""
    weights, right, group = np.array([0.3, 0.7]), np.array([0.8, 0.25]), 3
    outcomes = [(m, r, weights[m] * (right[m] if r else 1 - right[m])) for m in (0, 1) for r in (0, 1)]
    expected = np.zeros(2)
    for drawn in itertools.product(outcomes, repeat=group):
        rewards = np.array([r for _, r, _ in drawn], dtype=float)
        advantage = rewards - rewards.mean()
        if scaled:
            advantage /= rewards.std(ddof=1) + 1e-4
        moved = sum(a * (np.eye(2)[m] - weights) for a, (m, _, _) in zip(advantage, drawn, strict=True)) / group
        expected += np.prod([p for _, _, p in drawn]) * moved
    pace = group_pace(float(weights @ right), group, scaled=scaled)
    np.testing.assert_allclose(expected, pace * velocity(weights, right), atol=1e-12)


def test_without_division_the_pace_is_that_of_one_answer_less():
    assert group_pace(0.3, 5, scaled=False) == pytest.approx(0.8)
    assert group_pace(0.0, 5) == group_pace(1.0, 5) == 0.0


def test_sampled_runs_follow_the_exact_path_in_the_mean():
    """Small steps of many groups: the mean run lies on the drift, hurried by the pace of its groups."""
    group, rate, steps = 4, 0.05, 60
    kernel = rate * np.array([[2.0, 0.0, -0.5], [0.0, 1.0, 0.0], [-0.5, 0.0, 1.0]])
    moved = sampled_paths(*_runs(100, START, RIGHT, kernel), Sampling(group, 64, steps))
    last = shifted(START, moved[:, -1] @ kernel.T)
    shift = np.zeros(3)
    for _ in range(steps):
        now = shifted(START, kernel @ shift)
        shift += group_pace(float(now @ RIGHT), group) * velocity(now, RIGHT)
    np.testing.assert_allclose(last.mean(0), shifted(START, kernel @ shift), atol=0.01)
    assert last.std(0).max() < 0.05
    np.testing.assert_allclose(moved.sum(-1), 0, atol=1e-12)


def test_momentum_takes_a_mean_of_what_adam_has_seen():
    """One group a step, and certain rewards that never change: Adam's corrected mean is the gradient itself."""
    arguments = _runs(5, np.array([0.5, 0.5]), np.array([1.0, 0.0]), np.zeros((2, 2)))
    plain, slow = (sampled_paths(*arguments, Sampling(2, 1, 6, momentum=m)) for m in (0.0, 0.9))
    np.testing.assert_allclose(slow[:, 1], plain[:, 1])  # the first gradient is the mean of one
    steps = np.diff(plain, axis=1)
    for t in range(6):
        weighed = np.average(steps[:, : t + 1], axis=1, weights=0.9 ** np.arange(t, -1, -1))
        np.testing.assert_allclose(np.diff(slow, axis=1)[:, t], weighed, atol=1e-12)


def test_a_kernel_rescales_the_drift_and_may_differ_between_cues():
    """Twice the identity only hurries; a kernel under which g learns as fast as under replicator dynamics keeps it."""
    off = np.array([0.0, 1.0, 1.0])
    plain, twice = (exact_path(START, RIGHT, kernel=k) for k in (None, 2 * np.eye(3)))
    np.testing.assert_allclose(twice.weights, plain.weights, atol=1e-3)
    np.testing.assert_allclose(twice.time[-1], plain.time[-1] / 2, rtol=1e-3)
    natural = exact_path(START, RIGHT, kernel=np.diag(1 / START))
    assert natural.weights[10, 2] > plain.weights[10, 2]
    _, there = curve(plain, START, RIGHT, off, np.zeros((3, 3)))
    np.testing.assert_allclose(there, START @ off)  # a cue that nothing reaches stays
    with pytest.raises(InputError, match="did not settle"):
        exact_path(START, RIGHT, kernel=np.zeros((3, 3)))


def test_policies_right_alike_but_for_a_little_end_before_they_settle():
    path = exact_path(START, np.array([0.9958, 0.0, 0.9959]))
    assert path.weights[-1] @ RIGHT == pytest.approx(1, abs=1e-3)
    assert path.weights[-1, 2] < 0.05  # the better one would win, in some million steps


def test_what_is_never_sampled_is_never_selected():
    arguments = _runs(20, np.array([0.999999, 1e-6]), np.array([0.0, 1.0]), 5 * np.eye(2))
    assert not sampled_paths(*arguments, Sampling(8, 4, 20)).any()


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=5), st.integers(0, 100))
@settings(deadline=None, max_examples=40)
def test_the_drift_never_lowers_the_trained_accuracy_and_keeps_the_sum(masses: list[float], seed: int):
    weights = np.array(masses) / sum(masses)
    right = np.random.default_rng(seed).random(len(weights))
    for drift in ("softmax", "replicator"):
        v = velocity(weights, right, drift)
        moved = weights * (v - weights @ v)
        assert moved @ right >= -1e-12
    assert velocity(weights, right).sum() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("weights", "right", "says"),
    [([0.5, 0.6], [1.0, 0.0], "no distribution"), ([0.5, 0.5], [1.0, 1.0], "nothing to select")],
)
def test_what_cannot_move_is_refused(weights: list[float], right: list[float], says: str):
    with pytest.raises(InputError, match=says):
        exact_path(np.array(weights), np.array(right))
