"""Coverage: intervals of the instrument's own making on populations whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from mixturelens.lab.proving.coverage import _held
from mixturelens.stats import interval, mean_interval, resample_counts
from mixturelens.types import Interval


def test_what_is_held_above_and_below_is_counted():
    intervals = [Interval(value=v, low=v - 1, high=v + 1) for v in (0.0, 0.5, 3.0, -3.0)]
    found = _held("pair", "routing", 0.4, 0.5, intervals)
    assert (found.held, found.above, found.below) == (0.5, 0.25, 0.25)
    assert found.width == pytest.approx(2.0)
    assert not found.boundary


@pytest.mark.parametrize(
    ("quantity", "value", "boundary"),
    [
        ("routing_share", 0.99, True),
        ("routing_share", 0.9, False),
        ("skill", 0.001, True),
        ("skill", 0.1, False),
        ("text", 0.0001, True),
        ("text", 0.01, False),
    ],
)
def test_boundaries_are_named(quantity: str, value: float, boundary: bool):
    assert _held("pair", quantity, value, 1.0, [Interval(value=value, low=value, high=value)]).boundary is boundary


def test_bootstrap_intervals_of_a_mean_hold_it_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    intervals = [
        mean_interval(rng.normal(1.0, 1.0, size=80), resample_counts(80, seed=k, draws=500)) for k in range(400)
    ]
    assert _held("normal", "routing", 1.0, 1.0, intervals).held == pytest.approx(0.95, abs=0.03)


def test_an_interval_of_shuffled_draws_would_be_noticed():
    # intervals around the wrong number hold the truth hardly ever
    rng = np.random.default_rng(0)
    intervals = [interval(np.append(2.0, rng.normal(2.0, 0.1, size=200))) for _ in range(50)]
    assert _held("off", "routing", 1.0, 1.0, intervals).held == 0.0
