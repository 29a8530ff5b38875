"""Does RL do inside what a hint does?  `python -m probes.rl_makes_neutral_prompts_look_hinted RUN`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import mixturelens as ml
from mixturelens.models import Pair
from mixturelens.probing.record import Shift
from mixturelens.types import NOT_MEASURED, InputError, Interval
from probes.contract import Answer, Probe, ProbeRecord, ask, every, main, more, over, places, show

ALIKE = 0.5
"""Cosine from which a shift counts as the hint's."""

NAME = "rl_makes_neutral_prompts_look_hinted"
HYPOTHESIS = "RL makes neutral prompts look, inside, as if they carried the hint for the policy that it selects."
PREDICTION = (
    "At the prompt's last token, behind some layer before the last, what RL adds to the activations of neutral prompts "
    f"has a cosine above {ALIKE} with what the hint adds in S (hint for R's policy less that for the other)."
)
CONTROL = (
    "That cosine exceeds the 95th percentile of those with differences between random halves of prompts; and behind "
    "the same layer the shift is less aligned at every token of the question, before anything is chosen."
)


def run(run_folder: Path, seed: int = 0) -> ProbeRecord:
    """Raises InputError if the folder holds no finished run, or its suite no hints."""
    return ask(__name__, run_folder, seed, _answer, _clause)


def _answer(case: Pair, seed: int) -> Answer:
    record = ml.probe(case, seed=seed)
    if not record.shifts:
        why = next((each for each in record.missing if each.startswith("shift")), "its suite has no hints")
        raise InputError(f"{case.name}: no shift beside that of a hint ({why})")
    inside, end = places(case), max(shift.site.layer for shift in record.shifts)
    last = [shift for shift in record.shifts if shift.site.position in inside["last"] and shift.site.layer < end]
    best = max(last, key=_cosine, default=None)
    question = [
        shift
        for shift in record.shifts
        if best is not None
        and shift.site.layer == best.site.layer
        and shift.site.position in set(inside.get("question", ())) - set(inside["last"])
    ]
    nearest = max(question, key=_cosine, default=None)
    cosine = best.cosine if best else NOT_MEASURED
    others = nearest.cosine if nearest else NOT_MEASURED
    null = best.null if best else None
    return Answer(
        holds=every([over(cosine, ALIKE), None if null is None else over(cosine, null), more(cosine, others)]),
        outcome={
            "cosine with the hint's direction": cosine,
            "length along it, as a share of the hint's": best.along if best else NOT_MEASURED,
        },
        control={
            "cosine of random halves, 95%": Interval(value=null),
            "cosine at the question's nearest token": others,
        },
        sites=tuple(str(shift.site) for shift in (best, nearest) if shift),
    )


def _cosine(shift: Shift) -> float:
    return -1.0 if shift.cosine.value is None else shift.cosine.value


def _clause(pair: str, answer: Answer) -> str:
    cosine, along = answer.outcome.values()
    null, question = answer.control.values()
    return (
        f"in {pair} what RL adds has a cosine of {show(cosine)} with the hint's direction and {show(along)} of its "
        f"length, where random halves stay below {show(null)} and the question's tokens below {show(question)} (sites: "
        f"{', '.join(answer.sites) or 'none'})"
    )


if __name__ == "__main__":
    main(cast(Probe, sys.modules[__name__]))
