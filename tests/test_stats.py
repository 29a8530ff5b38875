"""Intervals are percentiles of a bootstrap over questions, and contain what they are about."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixturelens.stats import DRAWS, interval, map_draws, mean_interval, resample_counts, resampled_mean
from mixturelens.types import NOT_MEASURED, Interval

values = st.lists(st.floats(-50, 50), min_size=2, max_size=12).map(np.array)


@given(st.integers(1, 30), st.integers(0, 5))
def test_every_bootstrap_sample_has_as_many_questions_and_the_first_is_the_sample_itself(questions: int, seed: int):
    counts = resample_counts(questions, seed, draws=20)
    assert counts.shape == (21, questions)
    assert (counts.sum(1) == questions).all()
    assert (counts[0] == 1).all()


def test_the_same_seed_draws_the_same_questions():
    assert (resample_counts(9, 4) == resample_counts(9, 4)).all()
    assert (resample_counts(9, 4) != resample_counts(9, 5)).any()


def test_resampled_mean_is_the_mean_over_repeated_questions():
    data = np.array([[1.0, 10.0], [2.0, 20.0], [6.0, np.nan]])
    counts = np.array([[1, 1, 1], [0, 1, 2], [0, 0, 3]])
    found = resampled_mean(data, counts)
    by_hand = np.array([[3.0, 15.0], [14 / 3, 20.0], [6.0, np.nan]])
    np.testing.assert_allclose(found, by_hand)


@given(values)
def test_the_interval_contains_the_estimate_and_lies_within_the_values(data: np.ndarray):
    found = mean_interval(data, resample_counts(len(data), 0, draws=50))
    assert found.low is not None
    assert found.value == pytest.approx(data.mean(), abs=1e-9)
    assert data.min() - 1e-9 <= found.low <= found.value <= found.high <= data.max() + 1e-9


def test_the_interval_has_the_percentiles_of_the_draws():
    draws = np.concatenate([[50.0], np.arange(101.0)])
    assert interval(draws) == Interval(value=50.0, low=2.5, high=97.5)


def test_the_interval_of_a_mean_agrees_with_the_normal_one():
    rng = np.random.default_rng(1)
    data = rng.normal(size=400)
    found = mean_interval(data, resample_counts(400, 0))
    assert found.high - found.low == pytest.approx(2 * 1.96 * data.std() / 20, rel=0.1)
    assert DRAWS >= 1000


def test_what_was_not_measured_is_null_and_never_zero():
    counts = resample_counts(3, 0)
    assert mean_interval(np.full(3, np.nan), counts) == NOT_MEASURED
    assert interval(np.array([np.inf, 1.0])) == NOT_MEASURED
    assert interval(np.array([1.0, np.nan])) == NOT_MEASURED
    # one question is known: draws without it are left out, and the others say its value
    assert mean_interval(np.array([2.0, np.nan, np.nan]), counts) == Interval(value=2.0, low=2.0, high=2.0)


def test_a_ratio_is_one_of_means_and_not_a_mean_of_ratios():
    counts = resample_counts(2, 0)
    numerator, whole = np.array([1.0, 0.0]), np.array([1.0, 3.0])
    found = map_draws(lambda a, b: a / b, resampled_mean(numerator, counts), resampled_mean(whole, counts))
    assert found.value == pytest.approx(0.25)
    assert (found.low, found.high) == (0.0, 1.0)


def test_a_question_keeps_its_cues_together():
    """Two cues that cancel on every question have a mean of zero in every draw."""
    rng = np.random.default_rng(0)
    column = rng.normal(size=(20, 1))
    means = resampled_mean(np.hstack([column, -column]), resample_counts(20, 0))
    np.testing.assert_allclose(means.sum(1), 0, atol=1e-12)


def test_an_interval_upside_down_is_refused():
    with pytest.raises(ValueError, match=r"low 2\.0 is above high 1\.0"):
        Interval(value=1.5, low=2.0, high=1.0)


def test_sides_of_a_threshold():
    found = Interval(value=0.5, low=0.4, high=0.6)
    assert found.above(0.4)
    assert not found.above(0.41)
    assert found.below(0.61)
    assert not found.below(0.6)
    assert found.excludes(0.3)
    assert found.excludes(0.7)
    assert not found.excludes(0.4)
    for nothing in (NOT_MEASURED.above(0), NOT_MEASURED.below(0), NOT_MEASURED.excludes(0)):
        assert nothing is False
