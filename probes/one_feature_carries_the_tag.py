"""Does one sparse feature carry the tag where no neuron does?  `python -m probes.one_feature_carries_the_tag RUN`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import mixturelens as ml
from mixturelens.features.record import UnitScore
from mixturelens.models import Pair
from mixturelens.types import NOT_MEASURED, Interval
from probes.contract import Answer, Probe, ProbeRecord, ask, every, main, more, over, show

CARRIES, MARGIN = 0.5, 0.1
"""Share of the contrast between tags from which a unit carries it, and by which it must exceed every random feature."""

NAME = "one_feature_carries_the_tag"
HYPOTHESIS = (
    "A sparse autoencoder takes apart what single neurons mix: one of its features is the tag, and no neuron is."
)
PREDICTION = (
    "In every R, with the policy put in place, the activation under the trained tag of the best feature alone moves at "
    f"least {CARRIES} of the contrast between the tags, and more than that of the best of all neurons."
)
CONTROL = f"Features of like strength, drawn at random, all stay at least {MARGIN} below it."


def run(run_folder: Path, seed: int = 0) -> ProbeRecord:
    """Raises InputError if the folder holds no finished run."""
    return ask(__name__, run_folder, seed, _answer, _clause)


def _answer(case: Pair, seed: int) -> Answer:
    table = ml.decompose(case, seed=seed).table("cue")
    feature, neuron, head, direction = (
        table and table.best(kind) for kind in ("feature", "neuron", "head", "direction")
    )
    if feature is None or neuron is None:
        return Answer(
            holds=None,
            outcome={"best feature": _patch(feature), "best neuron": _patch(neuron)},
            control={"less the best random feature": NOT_MEASURED},
        )
    return Answer(
        holds=every([over(feature.patch, CARRIES), more(feature.patch, neuron.patch), over(feature.margin, MARGIN)]),
        outcome={
            "best feature": feature.patch,
            "best neuron": neuron.patch,
            "best head": _patch(head),
            "best probe direction": _patch(direction),
            "gap closed by the feature, clamped": feature.gap_closed,
        },
        control={
            "less the best random feature": feature.margin,
            "best random feature": Interval(value=max(feature.random, default=None)),
        },
        sites=(str(feature.unit), str(neuron.unit)),
    )


def _patch(score: UnitScore | None) -> Interval:
    return NOT_MEASURED if score is None else score.patch


def _clause(pair: str, answer: Answer) -> str:
    feature, neuron, *_ = answer.outcome.values()
    margin, *_ = answer.control.values()
    return (
        f"in {pair} the best feature moves {show(feature)} of the contrast, {show(margin)} more than the best random "
        f"one, and the best neuron {show(neuron)}"
    )


if __name__ == "__main__":
    main(cast(Probe, sys.modules[__name__]))
