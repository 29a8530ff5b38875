"""Is the tag used wherever it can be read?  `python -m probes.the_tag_is_readable_where_nothing_uses_it RUN`"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import cast

import mixturelens as ml
from mixturelens.models import Pair
from mixturelens.probing.pair import READABLE
from mixturelens.types import NOT_MEASURED, Interval
from probes.contract import Answer, Probe, ProbeRecord, ask, every, main, over, show, some, under

KEPT = 0.9
"""Share of the difference between tags from which behaviour counts as what it was."""
NOTHING = 0.1
"""Share under which nothing counts as left."""

NAME = "the_tag_is_readable_where_nothing_uses_it"
HYPOTHESIS = "Reading is not use: after RL the tag can be read in far more places than those that behaviour hangs on."
PREDICTION = (
    f"Every R has a site where the tag is read with an AUROC of at least {READABLE} on held-out questions and whose "
    f"erasure leaves at least {KEPT} of the difference between tags in P(answer given policy); erased where the cue "
    f"reader reads, less than {NOTHING} of it is left."
)
CONTROL = (
    f"Erasing random directions of equal rank (the median of them) leaves at least {KEPT} of the difference at both "
    "sites, so that it is the tag whose loss does it, where anything does."
)


def run(run_folder: Path, seed: int = 0) -> ProbeRecord:
    """Raises InputError if the folder holds no finished run."""
    return ask(__name__, run_folder, seed, _answer, _clause)


def _answer(case: Pair, seed: int) -> Answer:
    record = ml.probe(case, seed=seed)
    used, unused = record.used, record.unused
    readable = unused.readable if unused else NOT_MEASURED
    kept = unused.left if unused else NOT_MEASURED
    left = used.left if used else NOT_MEASURED
    control = {
        f"left by a random erasure where it is {where}": _median(found.random if found else ())
        for where, found in (("unused", unused), ("used", used))
    }
    # where no site is surely unused, the scan says whether one may be; where the tag is not erased, nothing follows
    scanned = some(over(each.left, KEPT) and (each.holds or None) for each in record.erased) if record.erased else None
    found = [over(readable, READABLE), over(kept, KEPT)] if unused else [scanned]
    checks = [erased.holds or None for erased in (unused, used) if erased]
    return Answer(
        holds=every(
            [
                *found,
                *checks,
                under(left, NOTHING),
                *(None if value.value is None else value.value > KEPT for value in control.values()),
            ]
        ),
        outcome={
            "AUROC where it is unused": readable,
            "left when erased where it is unused": kept,
            "left when erased where the cue reader reads": left,
        },
        control=control,
        sites=tuple(str(erasure.site) for erasure in (unused, used) if erasure),
    )


def _median(shares: tuple[float, ...]) -> Interval:
    return Interval(value=statistics.median(shares)) if shares else NOT_MEASURED


def _clause(pair: str, answer: Answer) -> str:
    readable, kept, left = answer.outcome.values()
    return (
        f"in {pair} the tag reads with {show(readable)} at a site whose erasure leaves {show(kept)} of what it does, "
        f"and erased where its reader reads {show(left)} is left (sites: {', '.join(answer.sites) or 'none'})"
    )


if __name__ == "__main__":
    main(cast(Probe, sys.modules[__name__]))
