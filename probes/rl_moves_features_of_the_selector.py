"""Whose are the features that RL changed?  `python -m probes.rl_moves_features_of_the_selector RUN`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import mixturelens as ml
from mixturelens.models import Pair
from mixturelens.types import NOT_MEASURED, Interval
from probes.contract import Answer, Probe, ProbeRecord, ask, every, main, over, show, under

SHARE, NOTHING = 0.5, 0.005
"""Share of the routing of the whole site that the features must bring along, and bits under which nothing changed."""

NAME = "rl_moves_features_of_the_selector"
HYPOTHESIS = "The few features of S that RL moves most are those by which S chooses among its policies, and no others."
PREDICTION = (
    "Where R's activations carry what RL did, R's values of the features that moved most, put into S, bring at least "
    f"{SHARE} of the routing (bits) that all of R's activations there bring, and under {NOTHING} bits of what policies "
    "do once in place."
)
CONTROL = "None of the random sets of as many other features of like strength brings as much routing."


def run(run_folder: Path, seed: int = 0) -> ProbeRecord:
    """Raises InputError if the folder holds no finished run."""
    return ask(__name__, run_folder, seed, _answer, _clause)


def _answer(case: Pair, seed: int) -> Answer:
    change = ml.decompose(case, seed=seed).arrived
    if change is None:
        names = ("routing by the features", "specialists by the features")
        return Answer(holds=None, outcome=dict.fromkeys(names, NOT_MEASURED), control={"random set": NOT_MEASURED})
    moved, whole = change.together, change.whole
    most = max((each.routing.value or 0.0 for each in change.random), default=0.0)
    return Answer(
        holds=every(
            [
                over(moved.routing, SHARE * (whole.routing.value or 0.0)),
                under(moved.specialist, NOTHING),
                over(moved.routing, most),
            ]
        ),
        outcome={
            "routing by the features": moved.routing,
            "specialists by the features": moved.specialist,
            "routing by all activations": whole.routing,
            "specialists by all activations": whole.specialist,
        },
        control={"routing by the best random set": Interval(value=most)},
        sites=(str(change.site), *(f"feature {each.index}" for each in change.features)),
    )


def _clause(pair: str, answer: Answer) -> str:
    routing, specialists, *rest = answer.outcome.values()
    whole = rest[0] if rest else NOT_MEASURED
    return (
        f"in {pair} the features that moved most bring {show(routing)} bits of routing of {show(whole)}, and "
        f"{show(specialists)} of what policies do"
    )


if __name__ == "__main__":
    main(cast(Probe, sys.modules[__name__]))
