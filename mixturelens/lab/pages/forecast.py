"""The section about the forecast: what S and the reward alone say that RL will do, and what it did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mixturelens.figures import DASH, show
from mixturelens.lab.figures.forecast import forecast
from mixturelens.pages.parts import Control, Picture, Pictures

if TYPE_CHECKING:
    from mixturelens.lab.forecast.record import ForecastRecord

_NAMES = {
    "forecast": "forecast",
    "softmax": "softmax drift, no kernel",
    "replicator": "replicator dynamics",
    "constant": "null: as in S",
    "renormalised": "null: S without what earns too little",
}
_KERNELS_ALIKE = 0.95
"""Reach from which cues move alike for the eye."""
_MOVED = 0.05
"""Change of a forced accuracy from which a specialist is said to have changed, as in the policy table."""


class Forecast(NamedTuple):
    """What the page says of RL on one cue."""

    cue: str
    pictures: list[Picture]
    columns: list[str]
    """Cues that RL does not train on."""
    errors: list[tuple[str, list[str]]]
    """(answer, mean absolute error a cue); empty before RL."""
    compared: int
    assumptions: list[Control]


def forecasts(records: Sequence[ForecastRecord], pictures: Pictures) -> list[Forecast]:
    """The section about the forecasts: one part for each cue that RL trains on."""
    return [_one(record, pictures) for record in records]


def _one(record: ForecastRecord, pictures: Pictures) -> Forecast:
    scores = {} if record.happened is None else record.happened.scores
    errors = [(name, [show(score.errors[key]) for score in scores.values()]) for key, name in _NAMES.items() if scores]
    if scores:
        errors.append(("steps in the forecast's interval", [show(score.covered, 2) for score in scores.values()]))
    picture = pictures.about(record.missing).add(
        forecast(record),
        f"RL on cue {record.trained_cue}, from S and the reward alone; points: what RL did. Bands: 95% of runs that "
        "sample as RL does, from questions drawn anew and other kernels.",
        read="a forecast holds where the points, which RL made, stay inside its band.",
    )
    compared = 0 if record.happened is None else len(record.happened.compared)
    return Forecast(record.trained_cue, [picture], list(record.off), errors, compared, _assumptions(record))


def _assumptions(record: ForecastRecord) -> list[Control]:
    """What the theory takes for granted, and whether it was so: where it fails, look here first."""
    reach = {cue: record.reach[cue] for cue in record.off}
    least = min(reach, key=lambda cue: reach[cue])
    happened = record.happened
    clock = None if happened is None else happened.clock
    return [
        Control(
            "Adam is gradient descent",
            "Epsilon far above every gradient; else each parameter moves at its own rate, which the kernel holds at "
            "what it is in S, and softmax drift without a kernel does not know.",
            f"{show(record.rescaled, 2)} of the squared gradient lies above epsilon",
            record.rescaled < 1 - _KERNELS_ALIKE,
        ),
        Control(
            "One kernel for all cues",
            "A step on the trained cue must move the log-weights of the others as far.",
            f"cue {least}: {show(reach[least])} times as far",
            reach[least] >= _KERNELS_ALIKE,
        ),
        Control(
            "Specialists stay",
            "Forced accuracy must not move along RL: the theory has only weights.",
            DASH if happened is None else f"by {show(happened.specialists)} at most",
            None if happened is None else happened.specialists < _MOVED,
        ),
        Control(
            "The clock",
            "The second answer: the trained cue's accuracy step by step must lie in its interval.",
            DASH
            if clock is None or clock.covered is None
            else f"{show(clock.covered, 2)} of the steps do; mean error {show(clock.errors['forecast'])}, "
            f"of no change {show(clock.errors['constant'])}",
            None if clock is None or clock.covered is None else clock.covered >= 0.9,
        ),
    ]
