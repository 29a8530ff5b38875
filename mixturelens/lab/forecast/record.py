"""A forecast, and how right it was once RL has run: where both are known, and what is said of the difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from mixturelens.records import Record
from mixturelens.types import Frozen, InputError, Interval

UNSATURATED = 0.05
"""A step is compared where the trained cue's accuracy is at least so far from where it began and from its ceiling:
before, every curve is right; behind, every curve is at its end."""
ANSWERS = ("forecast", "softmax", "replicator", "constant", "renormalised")
"""The forecast, the two drifts without a kernel, and two nulls."""


class Start(Frozen):
    """S under one cue."""

    weights: dict[str, Interval]
    """Of the known policies among themselves."""
    right: dict[str, Interval]
    """How often each is rewarded: its forced accuracy, less what completions of no known policy take."""


class Curves(Frozen):
    """Accuracy under another cue where the trained cue's is `ForecastRecord.on`."""

    forecast: tuple[Interval, ...]
    """Softmax drift through the tangent kernel of S. The interval is of runs that sample groups as RL does, from
    questions drawn anew, with kernels from none at all (log-weights move alike everywhere) over S's to that of S moved
    along the forecast itself (AHEAD), and with completions of no known policy from none to twice as many as in S."""
    softmax: tuple[float, ...]
    """Plain policy gradient on weights that cues share: no kernel."""
    replicator: tuple[float, ...]
    """The natural policy gradient on them, which plain training does not follow."""
    constant: tuple[float, ...]
    """A null: RL on one cue leaves the others alone."""
    renormalised: tuple[float, ...]
    """A null: RL removes what earns less than the mean under the trained cue and keeps the rest of S in proportion,
    at the same pace everywhere: a straight line."""


class Point(Frozen):
    """What was measured at a step of RL."""

    step: int
    accuracy: dict[str, Interval]
    forced: dict[str, dict[str, Interval]]


class ForecastScore(Frozen):
    """Forecasts of another cue against what RL did, over the steps that are compared."""

    errors: dict[str, float | None]
    """Mean absolute error of each of ANSWERS at the trained cue's measured accuracy; null where no step is compared."""
    covered: float | None
    """Share of the compared steps that lie in the forecast's interval."""


class Happened(Frozen):
    """What RL did, step by step, and how far the forecasts were from it."""

    points: tuple[Point, ...]
    compared: tuple[int, ...]
    """Steps away from both ends (UNSATURATED)."""
    scores: dict[str, ForecastScore]
    clock: ForecastScore
    """The trained cue in time: the forecast and, as a null, the accuracy in S; over the same steps."""
    specialists: float
    """Largest change of any forced accuracy along RL; the theory has none."""


class ForecastRecord(Record):
    """What RL on one cue will do to every cue, and, once it is done, how right that was."""

    KIND = "forecast"

    trained_cue: str
    cues: tuple[str, ...]
    policies: tuple[str, ...]
    questions: int
    start: dict[str, Start]
    kernel: dict[str, tuple[tuple[float, ...], ...]]
    """cue -> tangent kernel of its log-weights with the trained cue's, times the rate: log-weights a step."""
    reach: dict[str, float]
    """How far a first step moves a cue along the drift, relative to the trained cue: 1 if the kernel is the same."""
    rescaled: float
    """Share of the squared gradient that Adam divides by itself more than by epsilon: 0 is plain gradient descent."""
    on: tuple[float, ...]
    """Accuracy under the trained cue: evenly spaced, from S's to the best policy's."""
    off: dict[str, Curves]
    steps: dict[str, tuple[Interval, ...]]
    """The second answer: accuracy under every cue after each step, the first being S."""
    happened: Happened | None = None
    missing: tuple[str, ...] = ()


def compare(record: ForecastRecord, points: Sequence[Point]) -> ForecastRecord:
    """The record with what happened: forecasts at the trained cue's measured accuracy, against what was measured.

    Raises InputError where a point lacks one of the record's cues.
    """
    points = [point for point in points if all(v.measured for v in point.accuracy.values())]
    for point in points:
        if set(point.accuracy) != set(record.cues):
            raise InputError(
                f"forecast: step {point.step} was measured under the cues {sorted(point.accuracy)}, and the "
                f"forecast is about {sorted(record.cues)}; forecast this run's own checkpoint"
            )
    measured = {cue: np.array([p.accuracy[cue].value for p in points], dtype=float) for cue in record.cues}
    on = measured[record.trained_cue]
    chosen = (on >= record.on[0] + UNSATURATED) & (on <= record.on[-1] - UNSATURATED)
    scores = {}
    for cue, curves in record.off.items():
        answers = {name: np.interp(on, record.on, _values(getattr(curves, name))) for name in ANSWERS}
        low, high = (np.interp(on, record.on, [getattr(v, end) for v in curves.forecast]) for end in ("low", "high"))
        scores[cue] = _score(measured[cue], answers, low, high, chosen)
    at = [min(p.step, len(record.steps[record.trained_cue]) - 1) for p in points]
    in_time = [record.steps[record.trained_cue][i] for i in at]
    low, high = (np.array([getattr(v, end) for v in in_time], dtype=float) for end in ("low", "high"))
    clock = {"forecast": np.array(_values(in_time)), "constant": np.full(len(points), record.on[0])}
    changes = [
        abs(value.value - first)
        for point in points
        for cue, forced in point.forced.items()
        for name, value in forced.items()
        if value.value is not None and (first := points[0].forced[cue][name].value) is not None
    ]
    happened = Happened(
        points=tuple(points),
        compared=tuple(p.step for p, yes in zip(points, chosen, strict=True) if yes),
        scores=scores,
        clock=_score(on, clock, low, high, chosen),
        specialists=max(changes, default=0.0),
    )
    return record.model_copy(update={"happened": happened})


def _values(values: Sequence[Interval | float]) -> list[float]:
    return [v.known if isinstance(v, Interval) else v for v in values]


def _score(
    measured: Float[np.ndarray, " point"],
    answers: Mapping[str, Float[np.ndarray, " point"]],
    low: Float[np.ndarray, " point"],
    high: Float[np.ndarray, " point"],
    chosen: np.ndarray,
) -> ForecastScore:
    if not chosen.any():
        return ForecastScore(errors=dict.fromkeys(answers), covered=None)
    inside = (measured >= low) & (measured <= high)
    errors: dict[str, float | None] = {
        name: float(np.abs(measured - answer)[chosen].mean()) for name, answer in answers.items()
    }
    return ForecastScore(errors=errors, covered=float(inside[chosen].mean()))
