"""Erasers of few rows: what is shrunk and what is crossed, and whether the concept is erased on other questions."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor

from mixturelens.probing import leace as of
from mixturelens.probing.leace import Eraser, behaviour_left, gap_left, leace, random_erasers, shrinkage
from mixturelens.probing.record import ErasedSite
from mixturelens.stats import interval, resample_counts, resampled_mean, share
from mixturelens.types import Interval, Site

Rows = tuple[Tensor, Tensor, Tensor]


def questions(number: int, size: int, gap: float, noise: float, seed: int) -> Rows:
    """[question, size] under two cues, and the gap between the cues' true means: of length `gap`, in one direction.

    Questions differ by 1 in every direction, and every prompt by `noise`.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    direction = drawn(size)
    truth = gap * direction / direction.norm()
    own = drawn(number, size)
    return own + noise * drawn(number, size) + truth / 2, own + noise * drawn(number, size) - truth / 2, truth


def crossed(one: Tensor, other: Tensor) -> Eraser:
    """As contrasts are erased: every question under both cues."""
    return leace(*both(one, other), torch.arange(len(one)).repeat(2))


def plain(one: Tensor, other: Tensor) -> Eraser:
    """Without asking which question a row is of."""
    return leace(*both(one, other))


def both(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([one, other]), torch.arange(2).flip(0).repeat_interleave(len(one))


def judged(fit: Callable[[Tensor, Tensor], Eraser], rows: Rows) -> tuple[Interval, Interval, Interval, float]:
    """(the check, what is left of behaviour, the same without what the check says, the true share of the gap left).

    The behaviour goes by the cue alone: of a prompt without it nothing is left. One half fits, the other judges.
    """
    one, other, truth = rows
    half = len(one) // 2
    eraser = fit(one[:half], other[:half])
    mine, yours = one[half:], other[half:]
    counts = resample_counts(len(mine), 0, 400)
    of_cue = truth / (truth @ truth)
    whole = resampled_mean(((mine - yours) @ of_cue).numpy(), counts)
    part = resampled_mean(((eraser.apply(mine) - eraser.apply(yours)) @ of_cue).numpy(), counts)
    gap, left = gap_left(eraser, mine, yours, counts), share(part, whole, 0.1)
    true = float(1 - (eraser.reads[0] @ truth) * (eraser.vectors[0] @ of_cue))
    return interval(gap, counts), behaviour_left(left, gap, counts), interval(left, counts), true


def holds(gap: Interval) -> bool | None:
    site = Site(layer=0, component="resid_pre")
    return ErasedSite(site=site, readable=Interval(), left=Interval(), random=(), gap=gap).holds


# --- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "size"), [(20, 50), (60, 60), (200, 7)])
def test_shrinkage_is_that_of_ledoit_and_wolf(rows: int, size: int):
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * torch.linspace(0.2, 3, size) + 5
    centred = x - x.mean(0)
    variance = torch.linalg.svdvals(centred).square() / rows
    assert shrinkage(centred, variance) == pytest.approx(ledoit_wolf_shrinkage(x.numpy()))


@pytest.mark.parametrize(("rows", "size"), [(30, 80), (80, 30)])
def test_few_rows_are_whitened_as_the_shrunk_covariance_says(rows: int, size: int):
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.arange(rows) % 2
    x[labels == 1] += torch.linspace(0, 1, size)
    centred = x - x.mean(0)
    covariance = centred.T @ centred / rows
    alpha = ledoit_wolf_shrinkage(x.numpy())
    assert 0.05 < alpha < 1
    covariance = (1 - alpha) * covariance + alpha * covariance.trace() / size * torch.eye(size, dtype=torch.float64)
    gap = x[labels == 1].mean(0) - x[labels == 0].mean(0)
    read = torch.linalg.solve(covariance, gap)
    expected = x - (centred @ read / (read @ gap))[:, None] * gap
    erased = leace(x, labels).apply(x)
    torch.testing.assert_close(erased, expected)
    torch.testing.assert_close(erased[labels == 1].mean(0), erased[labels == 0].mean(0))  # of these rows, all of it


def test_a_wide_model_takes_no_time():
    x = torch.randn(400, 4096, generator=torch.Generator().manual_seed(0))
    labels, question = torch.arange(400) % 2, torch.arange(200).repeat_interleave(2)
    x[labels == 1, 0] += 30.0
    start = time.process_time()
    eraser = leace(x, labels, question)
    random = random_erasers(x, 1, 8, seed=0)
    assert time.process_time() - start < 5  # a covariance of 4096 x 4096 takes a minute
    for each in (eraser, *random):
        assert float(each.reads[0] @ each.vectors[0]) == pytest.approx(1.0, abs=1e-6)


# --- what is left on other questions ----------------------------------------------------------------------------------


def test_the_gap_left_is_that_of_other_questions_by_hand():
    eraser = Eraser(*(torch.tensor(v).double() for v in ([[0.5, 0.0]], [[2.0, 0.0]], [0.0])))
    one, other = torch.tensor([[1.0, 1.0], [3.0, 0.0], [2.0, -1.0]]), torch.zeros(3, 2)
    # what stays of (1, 1), (3, 0), (2, -1) is (0, 1), (0, 0), (0, -1): of six products of two different ones
    counts = np.array([[1, 1, 1], [2, 1, 0], [3, 0, 0]])
    found = gap_left(eraser, one, other, counts)
    assert found[0] == pytest.approx((0 - 1 + 0 + 0 - 1 + 0) / (2 * (3 + 1 + 6)))
    assert found[1] == pytest.approx(0.0)
    assert np.isnan(found[2])  # one question alone
    nothing = Eraser(eraser.vectors[:0], eraser.reads[:0], eraser.offsets[:0])
    assert gap_left(nothing, one, other, counts)[0] == 1.0


def test_the_check_tells_an_eraser_of_few_rows_that_leaves_the_cue_from_one_that_does_not():
    """Sixty rows of 1,024 numbers: half of what the plain eraser takes for the cue is the noise of those rows."""
    rows = questions(100, 1024, gap=8.0, noise=0.5, seed=0)
    few = rows[0][20:], rows[1][20:], rows[2]  # 40 fit a plain eraser, and as many judge
    check, _, _, true = judged(plain, few)
    assert true > 0.12
    assert check.low < true < check.high
    assert holds(check) is False
    check, _, _, true = judged(crossed, few)
    assert abs(true) < 0.05
    assert check.low < true < check.high
    assert holds(check) is True


def test_shrinkage_steadies_an_eraser_of_as_many_rows_as_dimensions(monkeypatch: pytest.MonkeyPatch):
    every = [questions(60, 60, gap=6.0, noise=1.0, seed=seed) for seed in range(20)]
    shrunk = [judged(crossed, rows)[3] for rows in every]
    monkeypatch.setattr(of, "shrinkage", lambda *_: 0.0)
    bare = [judged(crossed, rows)[3] for rows in every]
    assert abs(np.mean(shrunk)) < 0.03
    assert 1.5 * np.std(shrunk) < np.std(bare)


@pytest.mark.parametrize("number", [20, 100])
def test_intervals_of_what_is_left_do_not_exclude_that_all_hangs_on_the_cue(number: int):
    """Behaviour that goes by the cue alone: without the cue nothing of it is left, whatever an eraser leaves of it."""
    held, bare, sure = [], [], []
    for seed in range(12):
        _, left, alone, true = judged(plain, questions(number, 512, gap=4.0, noise=0.5, seed=seed))
        assert true > 0.2
        held.append(left.low is None or left.low <= 0 <= left.high)
        bare.append(alone.low <= 0 <= alone.high)
        check, left, _, true = judged(crossed, questions(number, 512, gap=4.0, noise=0.5, seed=seed))
        held.append(left.low is None or left.low <= 0 <= left.high)
        sure.append(holds(check) is True and abs(true) > 0.15)
    assert np.mean(held) > 0.9
    assert not any(bare)
    assert not any(sure)


def test_where_nothing_may_be_erased_there_is_no_interval():
    rows = questions(20, 512, gap=4.0, noise=1.0, seed=0)
    check, left, alone, true = judged(crossed, rows)
    assert true > 0.8
    assert not holds(check)
    assert (left.value, left.low, left.high) == (alone.value, None, None)


def test_halves_that_find_no_common_gap_are_not_crossed():
    one, other, _ = questions(20, 200, gap=0.0, noise=1.0, seed=0)
    assert torch.equal(crossed(one, other).reads, plain(one, other).reads)
