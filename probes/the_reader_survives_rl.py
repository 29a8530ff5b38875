"""Is R's cue reader still that of S?  `python -m probes.the_reader_survives_rl RUN`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import mixturelens as ml
from mixturelens.models import Pair
from mixturelens.types import NOT_MEASURED, Interval
from probes.contract import Answer, Probe, ProbeRecord, ask, every, main, over, show

WORKS, MARGIN = 0.9, 0.1
"""Interchange accuracy from which a subspace carries the tag, and by how much it must exceed both nulls."""

NAME = "the_reader_survives_rl"
HYPOTHESIS = "RL leaves the cue reader as SFT made it: the subspace through which S reads the tag is the one R reads."
PREDICTION = (
    "The subspace of the tag that is learnt on S (DAS, on half of the questions) has in every R, unchanged, an "
    f"interchange accuracy of at least {WORKS} on the other half."
)
CONTROL = (
    f"The best of random subspaces of equal size and the best of those learnt on shuffled labels both stay at least "
    f"{MARGIN} below it in R."
)


def run(run_folder: Path, seed: int = 0) -> ProbeRecord:
    """Raises InputError if the folder holds no finished run."""
    return ask(__name__, run_folder, seed, _answer, _clause)


def _answer(case: Pair, seed: int) -> Answer:
    found = next((each for each in ml.probe(case, seed=seed).subspaces if each.concept == "cue"), None)
    if found is None:
        return Answer(
            holds=None,
            outcome={"interchange accuracy in S": NOT_MEASURED, "interchange accuracy in R": NOT_MEASURED},
            control={"less the best null in R": NOT_MEASURED},
        )
    margin = found.margin["after"]
    return Answer(
        holds=every([over(found.accuracy["after"], WORKS), over(margin, MARGIN)]),
        outcome={
            "interchange accuracy in S": found.accuracy["before"],
            "interchange accuracy in R": found.accuracy["after"],
            "dimensions": Interval(value=found.dimensions),
        },
        control={
            "less the best null in R": margin,
            "best random subspace in R": Interval(value=max(found.random["after"])),
            "best of shuffled labels in R": Interval(value=max(found.shuffled["after"])),
        },
        sites=(str(found.site),),
    )


def _clause(pair: str, answer: Answer) -> str:
    before, after, *_ = answer.outcome.values()
    margin, *_ = answer.control.values()
    return (
        f"in {pair} the tag's subspace has an interchange accuracy of {show(before)} in S and of {show(after)} in R, "
        f"{show(margin)} more than the best null (site: {', '.join(answer.sites) or 'none'})"
    )


if __name__ == "__main__":
    main(cast(Probe, sys.modules[__name__]))
