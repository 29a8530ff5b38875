"""Is the router in the unembedding?  `python -m probes.the_unembedding_chooses RUN`"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import cast

import mixturelens as ml
from mixturelens.grafting.record import GraftRecord
from mixturelens.models import Pair
from mixturelens.types import NOT_MEASURED, Interval
from probes.contract import Answer, Probe, ProbeRecord, ask, every, main, over, show, under

ENOUGH = 0.9
"""Share of the change of log(c_a / c_b) from which a component carries it."""
NOTHING = 0.1
"""Share under which a component counts as having no part in it."""

NAME = "the_unembedding_chooses"
HYPOTHESIS = "RL chooses among policies in the simplest way: it raises the unembedding rows of one policy's words."
PREDICTION = (
    "In every R the unembedding alone, put into S, carries at least "
    f"{ENOUGH} of RL's change of the log-odds of the policy that gained most against the one that lost most."
)
CONTROL = (
    f"Along the straight line from S to R, path attribution gives every other component less than {NOTHING} of that "
    "change, either way."
)


def run(run_folder: Path, seed: int = 0) -> ProbeRecord:
    """Raises InputError if the folder holds no finished run."""
    return ask(__name__, run_folder, seed, _answer, _clause)


def _answer(case: Pair, seed: int) -> Answer:
    record = ml.graft(case, seed=seed)
    names = {part.name for part in record.parts}
    unembedding = "unembed" if "unembed" in names else "embed"  # a tied one is both
    carried = _carried(record, unembedding)
    shares = _shares(record)
    others = {name: share for name, share in shares.items() if name != unembedding}
    largest = max(others, key=lambda name: abs(others[name].value or 0.0), default=None)
    return Answer(
        holds=every(
            [
                over(carried, ENOUGH),
                *(under(share, NOTHING) for share in others.values()),
                *(over(share, -NOTHING) for share in others.values()),
            ]
        ),
        outcome={
            "carried by the unembedding": carried,
            "attributed to the unembedding": shares.get(unembedding, _nothing(record)),
        },
        control={"attributed to the largest other component": others[largest] if largest else _nothing(record)},
        sites=(unembedding, *([largest] if largest else [])),
    )


def _carried(record: GraftRecord, name: str) -> Interval:
    """What RL left as it was carries nothing, exactly."""
    found = next((each for each in record.components if each.name == name), None)
    return found.suffices.routing if found else _nothing(record)


def _nothing(record: GraftRecord) -> Interval:
    return Interval(value=0.0, low=0.0, high=0.0) if record.after.routing.measured else NOT_MEASURED


def _shares(record: GraftRecord) -> dict[str, Interval]:
    """Component -> what path attribution gives it of the change, mean over cues.

    Intervals are those of the part, over the change as measured: the change's own spread is left out.
    """
    whole = [path.change for path in record.path if path.metric.startswith("routing@")]
    if not whole or not record.after.routing.measured:
        return {}
    change = math.fsum(whole) / len(whole)
    return {each.name: _over(each.routing, change) for each in record.components}


def _over(part: Interval, whole: float) -> Interval:
    if part.value is None or part.low is None or part.high is None or not whole:
        return NOT_MEASURED
    low, value, high = sorted(round(end / whole, 6) for end in (part.low, part.value, part.high))
    return Interval(value=value, low=low, high=high)


def _clause(pair: str, answer: Answer) -> str:
    carried, _ = answer.outcome.values()
    (other,) = answer.control.values()
    largest = answer.sites[1] if len(answer.sites) > 1 else "any other component"
    return (
        f"in {pair} the unembedding alone carries {show(carried)} of the change, and path attribution gives {largest} "
        f"{show(other)} of it"
    )


if __name__ == "__main__":
    main(cast(Probe, sys.modules[__name__]))
