"""Intervals are moved percentiles of a bootstrap over questions, and hold what they are about as often as they say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from mixturelens.stats import POSITIVE, PROPORTION, interval, map_draws, mean_interval, resample_counts, resampled_mean
from mixturelens.types import NOT_MEASURED, Interval

values = st.lists(st.floats(-50, 50), min_size=2, max_size=12).map(np.array)


@given(st.integers(1, 30), st.integers(0, 5))
@settings(deadline=None)
def test_bootstrap_samples_are_a_little_smaller_than_the_first_which_is_the_sample_itself(questions: int, seed: int):
    counts = resample_counts(questions, seed, draws=20)
    assert counts.shape == (21, questions)
    assert (counts[0] == 1).all()
    sizes = counts[1:].sum(1)
    assert len(set(sizes)) == 1
    assert 1 <= sizes[0] <= max(1, questions - 1)


@pytest.mark.parametrize("number", [12, 80, 400])
def test_the_interval_of_a_mean_is_as_wide_as_that_of_t(number: int):
    half = np.random.default_rng(1).normal(size=number // 2)
    data = np.concatenate([half, -half])  # without skew
    found = mean_interval(data, resample_counts(number, 0, draws=20_000))
    low, high = stats.t.interval(0.95, number - 1, data.mean(), stats.sem(data))
    assert found.high - found.low == pytest.approx(high - low, rel=0.04)


def test_skewed_draws_are_corrected_as_by_bca():
    data = np.random.default_rng(2).exponential(size=150)
    draws = np.append(data.mean(), np.random.default_rng(3).choice(data, (20_000, 150)).mean(1))
    found, plain = interval(draws), np.percentile(draws[1:], [2.5, 97.5])
    with np.errstate(invalid="ignore"):
        bca = stats.bootstrap((data,), np.mean, n_resamples=20_000, random_state=4).confidence_interval
    width = bca.high - bca.low
    assert (found.low, found.high) == (
        pytest.approx(bca.low, abs=0.03 * width),
        pytest.approx(bca.high, abs=0.03 * width),
    )
    assert plain[1] < found.high - 0.03 * width


def test_intervals_hold_a_skewed_mean_oftener_than_percentiles_do_and_nearly_as_often_as_they_say():
    rng = np.random.default_rng(5)
    held = np.zeros(2)
    for number in range(400):
        data = rng.exponential(size=15)
        found = mean_interval(data, resample_counts(15, number, draws=300))
        low, high = np.percentile(rng.choice(data, (300, 15)).mean(1), [2.5, 97.5])
        held += [found.low <= 1.0 <= found.high, low <= 1.0 <= high]
    intervals, percentiles = held / 400
    assert percentiles < 0.9 < 0.92 < intervals < 0.97


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
@example(np.array([0.0, 5e-148]))
@example(np.array([0.0, 5e-200]))
def test_the_interval_contains_the_estimate_and_lies_within_the_values_or_students(data: np.ndarray):
    found = mean_interval(data, resample_counts(len(data), 0, draws=50))
    assert found.low is not None
    assert found.value == pytest.approx(data.mean(), abs=1e-9)
    wide = stats.t.ppf(0.975, len(data) - 1) * stats.sem(data) * 1.5 + 1e-9  # 50 draws know their spread roughly
    assert min(data.min(), data.mean() - wide) <= found.low <= found.value
    assert found.value <= found.high <= max(data.max(), data.mean() + wide)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12).map(np.array))
def test_a_proportion_stays_within_its_bounds_and_is_never_certain(data: np.ndarray):
    found = mean_interval(data, resample_counts(len(data), 0, draws=50), bounds=PROPORTION)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.high - found.low > 0.2  # of 12 questions or fewer


def test_the_interval_has_the_percentiles_of_the_draws():
    draws = np.concatenate([[50.0], np.arange(101.0)])
    assert interval(draws) == Interval(value=50.0, low=2.5, high=97.5)


def test_what_was_not_measured_is_null_and_never_zero():
    counts = resample_counts(3, 0)
    assert mean_interval(np.full(3, np.nan), counts) == NOT_MEASURED
    assert interval(np.array([np.inf, 1.0])) == NOT_MEASURED
    assert interval(np.array([1.0, np.nan])) == NOT_MEASURED
    # one question is known: it has a value, and says nothing of how far others lie
    assert mean_interval(np.array([2.0, np.nan, np.nan]), counts) == Interval(value=2.0)


def test_what_is_exact_has_no_width_and_what_was_seen_in_all_questions_has():
    counts = resample_counts(8, 0)
    assert mean_interval(np.zeros(8), counts) == Interval(value=0.0, low=0.0, high=0.0)  # S against S
    right = mean_interval(np.ones(8), counts, bounds=PROPORTION)
    assert (right.value, right.high) == (1.0, 1.0)
    assert right.low == pytest.approx(stats.binomtest(8, 8).proportion_ci(0.95, "exact").low)
    wrong = mean_interval(np.zeros(8), counts, bounds=PROPORTION)
    assert (wrong.low, wrong.high) == (pytest.approx(1 - right.high), pytest.approx(1 - right.low))
    distance = interval(resampled_mean(np.array([0.0, 0.1, 0.3]), resample_counts(3, 0)), resample_counts(3, 0))
    assert distance.low < 0
    bounded = interval(resampled_mean(np.array([0.0, 0.1, 0.3]), counts[:, :3]), counts[:, :3], bounds=POSITIVE)
    assert bounded.low == 0


Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
KINDS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, shape: rng.normal(size=shape), 0.0),
    "exponential": (lambda rng, shape: rng.exponential(size=shape), 1.0),
    "lognormal": (lambda rng, shape: np.exp(rng.normal(size=shape)), float(np.exp(0.5))),
    "0.02": (lambda rng, shape: (rng.random(shape) < 0.02).astype(float), 0.02),
    "0.1": (lambda rng, shape: (rng.random(shape) < 0.1).astype(float), 0.1),
    "0.98": (lambda rng, shape: (rng.random(shape) < 0.98).astype(float), 0.98),
    # probabilities as saturated policies have them: nearly 1 in most questions, and nearly 0 in one of twenty
    "saturated": (
        lambda rng, shape: np.where(rng.random(shape) < 0.05, rng.beta(1, 20, shape), rng.beta(50, 1, shape)),
        0.05 / 21 + 0.95 * 50 / 51,
    ),
}


def coverage(kind: str, questions: int, repetitions: int = 1000, draws: int = 400) -> tuple[float, float]:
    """How often the interval of a mean holds the truth, and how often that of t does."""
    draw, truth = KINDS[kind]
    bounds = None if kind in ("normal", "exponential", "lognormal") else PROPORTION
    data = draw(np.random.default_rng(questions), (questions, repetitions))
    counts = resample_counts(questions, 1, draws)
    found = [interval(each, counts, bounds=bounds) for each in resampled_mean(data, counts).T]
    wide = stats.t.ppf(0.975, questions - 1) * stats.sem(data)
    held = np.mean([each.low <= truth <= each.high for each in found])
    return float(held), float((np.abs(data.mean(0) - truth) <= wide).mean())


@pytest.mark.parametrize("questions", [2, 3, 4, 8])
def test_intervals_of_means_hold_as_often_as_those_of_t(questions: int):
    held, by_t = coverage("normal", questions)
    assert held > 0.93
    assert held > by_t - 0.01


@pytest.mark.parametrize("kind", ["0.02", "saturated"])
@pytest.mark.parametrize("questions", [2, 16])
def test_intervals_hold_proportions_of_rare_events_although_none_may_have_been_seen(kind: str, questions: int):
    held, by_t = coverage(kind, questions)
    assert held > 0.95
    assert by_t < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("questions", [2, 3, 4, 6, 8, 12, 16, 24, 32, 100])
def test_coverage_at_every_size(kind: str, questions: int):
    held, by_t = coverage(kind, questions, 2000, 1000)
    least = {"normal": 0.935, "exponential": 0.86, "lognormal": 0.81}.get(kind, 0.94)
    assert held > least
    assert held > by_t - 0.015


def test_a_ratio_of_means_of_few_questions_holds_as_often_as_t():
    """That of fewer than four is one of two or three draws, and its spread is theirs all the same."""
    rng = np.random.default_rng(0)
    for questions in (2, 3, 4, 8):
        counts = resample_counts(questions, 1, 400)
        whole = 4 + rng.normal(size=(questions, 600))
        part = 0.5 * whole + rng.normal(size=(questions, 600))
        means = zip(resampled_mean(part, counts).T, resampled_mean(whole, counts).T, strict=True)
        found = [map_draws(np.divide, *each, counts=counts) for each in means]
        assert np.mean([each.low <= 0.5 <= each.high for each in found]) > 0.91


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
