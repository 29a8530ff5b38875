"""Bootstrap over questions: the only source of intervals."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from mixturelens.types import NOT_MEASURED, Interval

DRAWS = 2000
LEVEL = 0.95
NORMAL = NormalDist()
TAIL = NORMAL.inv_cdf((1 + LEVEL) / 2)
FEW = 32
"""Questions, with fewer of which percentiles of draws are no wider than the values lie apart, or a little narrow yet:
Student's t has its say beside them."""
FEWEST = 8
"""Questions, with fewer of which no instrument decides anything: what is then called an interval is a guess."""
TOO_FEW = f"questions are too few for an interval ({FEWEST} are needed)"
PROPORTION, POSITIVE = (0.0, 1.0), (0.0, math.inf)
"""Bounds of what every question has: probabilities, shares, and right or wrong; distances."""
MOST_SKEWED = 0.6
"""Skewness of draws, up to which percentiles are corrected for it: by then to the 7.1th and 99.65th. A ratio whose
whole may be small has wild draws, and the outermost of them say nothing."""


def too_few(what: str, *questions: int) -> tuple[str, ...]:
    """The sentence of every record whose numbers stand on fewer than FEWEST questions, or nothing.

    `questions`: those that each of the numbers stands on.

    >>> too_few("repairs", 20, 5), too_few("repairs", 20, 10)
    (('repairs: 5 questions are too few for an interval (8 are needed)',), ())
    """
    least = min(questions, default=FEWEST)
    return (f"{what}: {least} {TOO_FEW}",) if least < FEWEST else ()


def said_too_few(missing: Sequence[str]) -> list[str]:
    """Those lines of a record's `missing` that `too_few` wrote: they belong beside every figure of the record."""
    return [line for line in missing if line.endswith(TOO_FEW)]


def half_of(number: int, which: Literal[0, 1], most: int | None = None) -> list[int]:
    """Which of so many questions are in each half, drawn once and for all: choose on one half, judge on the other.

    Drawn, because suites tend to list questions in turn by kind; so are the `most` of a half that are kept, if given.

    >>> half_of(5, 0), half_of(5, 1)
    ([1, 2, 3], [0, 4])
    """
    return sorted(np.random.default_rng(0).permutation(number)[which::2][:most].tolist())


def resample_counts(questions: int, seed: int, draws: int = DRAWS) -> Int[np.ndarray, "draw question"]:
    """How often each question occurs in each bootstrap sample; row 0 is the sample itself (all ones).

    A question is drawn with all its cues, because its prompts share the difficulty of the question. Samples are a
    little smaller than what they are drawn from, so that percentiles are as wide as t's interval of a mean: those of
    samples of full size are too narrow, by 2% at 80 questions and by more than a third at 5 (Hesterberg 2015, doi
    10.1080/00031305.2015.1089789).

    >>> resample_counts(80, seed=0).sum(1)[:3], resample_counts(5, seed=0).sum(1)[:3]
    (array([80, 77, 77]), array([5, 2, 2]))
    """
    rng = np.random.default_rng(seed)
    narrow = (TAIL / _t(questions)) ** 2 if questions > 1 else 1.0
    drawn = max(1, round((questions - 1) * narrow))
    counts = rng.multinomial(drawn, np.full(questions, 1.0 / questions), size=draws)
    return np.vstack([np.ones((1, questions), dtype=counts.dtype), counts])


def resampled_mean(
    values: Float[np.ndarray, " question *rest"], counts: Int[np.ndarray, "draw question"]
) -> Float[np.ndarray, " draw *rest"]:
    """Mean over questions in every bootstrap sample; NaN marks a question that was not measured.

    A mean over no question at all is NaN, never zero.
    """
    known = ~np.isnan(values)
    flat = np.where(known, values, 0.0).reshape(len(values), -1)
    total = counts @ flat
    number = counts @ known.reshape(len(values), -1).astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(number > 0, total / number, np.nan)
    return mean.reshape(len(counts), *values.shape[1:])


def interval(
    draws: Float[np.ndarray, " draw"],
    counts: Int[np.ndarray, "draw question"] | None = None,
    *,
    bounds: tuple[float, float] | None = None,
    digits: int = 10,
) -> Interval:
    """Interval from draws whose first entry is the estimate itself: percentiles, moved where the draws are skewed.

    A long tail of the draws means that the truth may lie further out on that side than the draws do: percentiles alone
    lean the wrong way. They are moved as by BCa (Efron 1987, doi 10.1080/01621459.1987.10478410), with acceleration and
    bias correction both a sixth of the draws' skewness, which is what they are for a mean.

    `counts` are those that the draws were made with, if they are over questions: no draw lies beyond the values of 2 or
    3 questions, however far the truth may, so that of few questions the interval is Student's t at least, with the
    draws' own standard error. One question says nothing of how far others lie: a value without an interval.

    `bounds`: what the quantity lies within. That all questions seen are right does not show that all are: of a mean
    over questions of what has two ends, such as a PROPORTION, as many as the exact binomial bound says may be of a kind
    that was never drawn (Clopper and Pearson 1934, doi 10.1093/biomet/26.4.404: 37% if there are 8 questions, 4% if
    100), and lie at either end. Without bounds, what is equal in all draws has an interval of no width: a checkpoint
    moves from itself by exactly 0.

    Draws in which the quantity is undefined (NaN) are left out; if the estimate itself is undefined, nothing was
    measured. The interval always contains the estimate.

    >>> interval(np.array([50.0, *range(101)]))
    Interval(value=50.0, low=2.5, high=97.5)
    """
    value = float(draws[0])
    usable = _ordered(draws)
    if not math.isfinite(value) or not len(usable):
        return NOT_MEASURED
    questions = None if counts is None else counts.shape[1]
    least, most = bounds or (-math.inf, math.inf)
    ends = math.isfinite(most - least)
    if questions == 1 and not ends:
        return Interval(value=round(value, digits))
    low, high = _percentiles(usable)
    if counts is not None and 1 < counts.shape[1] < FEW and usable[0] < usable[-1]:
        wide = _t(counts.shape[1]) * _standard_error(usable, counts)
        low, high = min(low, value - wide), max(high, value + wide)
    if questions is not None and ends:
        unseen = 1 - ((1 - LEVEL) / 2) ** (1 / questions)
        low, high = min(low, value - (value - least) * unseen), max(high, value + (most - value) * unseen)
    value, low, high = (round(x, digits) for x in (value, min(max(low, least), value), max(min(high, most), value)))
    return Interval(value=value, low=low, high=high)


@functools.cache
def _t(questions: int) -> float:
    """Student's t of so many questions, for the level of all intervals."""
    from scipy.special import stdtrit

    return float(stdtrit(questions - 1, (1 + LEVEL) / 2))


def _ordered(draws: Float[np.ndarray, " draw"]) -> Float[np.ndarray, " usable"]:
    """The draws behind the estimate that are defined, in order."""
    return np.sort(draws[1:][np.isfinite(draws[1:])])


def _quantile(ordered: Float[np.ndarray, " usable"], share: float) -> float:
    """Between two draws, in proportion: what `np.quantile` says, which orders them anew every time."""
    place = share * (len(ordered) - 1)
    below = min(int(place), max(0, len(ordered) - 2))
    low, high = float(ordered[below]), float(ordered[min(below + 1, len(ordered) - 1)])
    return low + (high - low) * (place - below)


def _standard_error(ordered: Float[np.ndarray, " usable"], counts: Int[np.ndarray, "draw question"]) -> float:
    """Of a sample of full size, from draws of smaller ones; their outermost say nothing (see `MOST_SKEWED`)."""
    spread = np.clip(ordered, _quantile(ordered, 0.025), _quantile(ordered, 0.975)).std()
    drawn = counts[1:].sum() / (len(counts) - 1)
    return float(spread * (drawn / (counts.shape[1] - 1)) ** 0.5)


def _percentiles(ordered: Float[np.ndarray, " usable"]) -> tuple[float, float]:
    """The ends of what holds LEVEL of the draws, moved where they are skewed."""
    if ordered[0] == ordered[-1]:
        return float(ordered[0]), float(ordered[0])
    a = max(-MOST_SKEWED, min(MOST_SKEWED, _skewness(ordered))) / 6
    # BCa's places, in normal units, of what would be at -TAIL and TAIL in draws without skew
    low, high = (a + (a + z) / (1 - a * (a + z)) for z in (-TAIL, TAIL))
    return _quantile(ordered, NORMAL.cdf(low)), _quantile(ordered, NORMAL.cdf(high))


def _skewness(ordered: Float[np.ndarray, " usable"]) -> float:
    """0 where draws differ by no more than rounding."""
    off = ordered - ordered.mean()
    spread = off.std()
    if not spread > 1e-12 * max(abs(ordered[0]), abs(ordered[-1])):
        return 0.0
    off = off / spread  # before the cube, which of tiny numbers is zero
    return float((off * off * off).mean())


def mean_interval(
    values: Float[np.ndarray, " question"],
    counts: Int[np.ndarray, "draw question"],
    *,
    bounds: tuple[float, float] | None = None,
) -> Interval:
    """Interval of the mean over questions; those that were not measured (NaN) count for nothing.

    >>> counts = resample_counts(5, seed=0)
    >>> mean_interval(np.ones(5), counts), mean_interval(np.ones(5), counts, bounds=PROPORTION)
    (Interval(value=1.0, low=1.0, high=1.0), Interval(value=1.0, low=0.4781762499, high=1.0))
    """
    known = ~np.isnan(values)
    if not known.any():
        return NOT_MEASURED
    return interval(resampled_mean(values[known], counts[:, known]), counts[:, known], bounds=bounds)


def over_seeds(values: Sequence[float], bounds: tuple[float, float] = (-np.inf, np.inf)) -> Interval:
    """Mean of a few independent runs with Student's t interval: a bootstrap of five numbers would be too narrow.

    One run alone has a value without an interval. No interval reaches beyond the `bounds` of what is measured.

    >>> over_seeds([0.1, 0.2, 0.3])
    Interval(value=0.2, low=-0.0484137712, high=0.4484137712)
    """
    if not len(values):
        return NOT_MEASURED
    mean = round(float(np.mean(values)), 10)
    if len(values) == 1:
        return Interval(value=mean)
    wide = float(_t(len(values)) * np.std(values, ddof=1) / np.sqrt(len(values)))
    low, high = max(mean - wide, bounds[0]), min(mean + wide, bounds[1])
    return Interval(value=mean, low=round(low, 10), high=round(high, 10))


def apart(whole: Float[np.ndarray, " draw"], least: float) -> bool:
    """Whether a quantity surely differs from 0 by `least`, to one side of it, so that shares of it mean something.

    >>> apart(np.array([0.6, 0.7, 0.8]), least=0.5), apart(np.array([0.1, -0.2, 0.3]), least=0.5)
    (True, False)
    """
    usable = _ordered(whole)
    if not np.isfinite(whole[0]) or not len(usable):
        return False
    low, high = _percentiles(usable)
    return bool(min(low, whole[0]) >= least or max(high, whole[0]) <= -least)


def share(
    part: Float[np.ndarray, " draw *rest"], whole: Float[np.ndarray, " draw"], least: float
) -> Float[np.ndarray, " draw *rest"]:
    """part / whole in every bootstrap sample; all NaN, not measured, unless the whole is `apart` from 0.

    The bootstrap of a ratio whose denominator may be 0 means nothing.

    >>> share(np.ones(3), np.array([0.1, -0.2, 0.3]), least=0.5)
    array([nan, nan, nan])
    """
    if not apart(whole, least):
        return np.full_like(part, np.nan, dtype=float)
    return part / whole.reshape(-1, *[1] * (part.ndim - 1))


def map_draws(
    function: Callable[..., Float[np.ndarray, " draw"]],
    *means: Float[np.ndarray, " draw *rest"],
    counts: Int[np.ndarray, "draw question"] | None = None,
) -> Interval:
    """Interval of a function of several resampled means, such as a ratio; the means are per bootstrap sample."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return interval(function(*means), counts)


def difference(left: Interval, right: Interval) -> Interval:
    """right - left of two numbers that were measured apart, with the interval that follows from theirs.

    The ends of both are combined by MOVER (Zou and Donner 2008, doi 10.1002/sim.3095), as if the two were independent:
    where both were asked the same questions, the interval is wider than it need be. Not measured where either is not.

    >>> difference(Interval(value=0.5, low=0.2, high=0.6), Interval(value=1.0, low=0.6, high=1.3))
    Interval(value=0.5, low=0.0876894374, high=0.9242640687)
    """
    if None in (left.value, left.low, left.high, right.value, right.low, right.high):
        return NOT_MEASURED
    assert left.value is not None
    assert right.value is not None
    below = math.hypot(right.value - (right.low or 0.0), (left.high or 0.0) - left.value)
    above = math.hypot((right.high or 0.0) - right.value, left.value - (left.low or 0.0))
    value = right.value - left.value
    return Interval(value=round(value, 10), low=round(value - below, 10), high=round(value + above, 10))
