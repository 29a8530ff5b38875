"""Is the router redundant?  `python -m probes.one_component_suffices_and_none_is_needed RUN`"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import mixturelens as ml
from mixturelens.grafting.record import Component
from mixturelens.models import Pair
from mixturelens.types import NOT_MEASURED, Interval
from probes.contract import Answer, Probe, ProbeRecord, ask, every, main, over, show, under

ENOUGH = 0.9
"""Share of R's change of the policy's weight from which a component suffices, or the others suffice without it."""
NOTHING = 0.1
"""Share under which random weights count as doing nothing, either way."""

NAME = "one_component_suffices_and_none_is_needed"
HYPOTHESIS = "RL writes the same change of routing into several components at once, each of them enough on its own."
PREDICTION = (
    "In every R there is one component (the attention or the MLP of a layer, say) whose weights, put into S, carry at "
    f"least {ENOUGH} of the change of the policy's weight; and R without any one component, whichever it is, keeps at "
    f"least {ENOUGH} of it."
)
CONTROL = (
    "Random changes of the same size, tensor by tensor, in place of R's in the components that were chosen as the "
    f"selector on half of the questions carry less than {NOTHING} of it either way, each of them."
)


def run(run_folder: Path, seed: int = 0) -> ProbeRecord:
    """Raises InputError if the folder holds no finished run."""
    return ask(__name__, run_folder, seed, _answer, _clause)


def _answer(case: Pair, seed: int) -> Answer:
    record = ml.graft(case, seed=seed)
    alone = _extreme(record.components, max, lambda each: each.suffices.weight)
    missed = _extreme(record.components, min, lambda each: each.without.weight)
    suffices = alone.suffices.weight if alone else NOT_MEASURED
    without = missed.without.weight if missed else NOT_MEASURED
    factorial = record.factorial
    chosen = factorial is not None and alone is not None and factorial.selector == (alone.name,)
    noise = [each.weight for each in factorial.noise] if factorial else []
    loudest = max(noise, key=lambda value: abs(value.value or 0.0), default=NOT_MEASURED)
    return Answer(
        holds=every(
            [
                over(suffices, ENOUGH),
                # chosen on half of the questions, so that the other half can say it again
                *([over(factorial.selector_only.weight, ENOUGH)] if factorial and chosen else []),
                over(without, ENOUGH),
                *(under(value, NOTHING) for value in noise or [NOT_MEASURED]),
                *(over(value, -NOTHING) for value in noise),
            ]
        ),
        outcome={
            "carried by the best component alone": suffices,
            "left without the one that is missed most": without,
            "carried by the selector, on the half that did not choose it": (
                factorial.selector_only.weight if factorial else NOT_MEASURED
            ),
            "components of the selector": Interval(value=len(factorial.selector)) if factorial else NOT_MEASURED,
        },
        control={"carried by random weights in the selector's place, the most": loudest},
        sites=tuple(each.name for each in (alone, missed) if each),
    )


def _extreme(
    components: tuple[Component, ...], choose: Callable[..., Component | None], share: Callable[[Component], Interval]
) -> Component | None:
    """The component whose share is most (or least); None where no share was measured."""
    known = [each for each in components if share(each).measured]
    return choose(known, key=lambda each: share(each).value, default=None)


def _clause(pair: str, answer: Answer) -> str:
    suffices, without, *_ = answer.outcome.values()
    best, worst = answer.sites if answer.sites else ("no component", "any")
    return (
        f"in {pair} {best} alone carries {show(suffices)} of the change, and without {worst}, which is missed most, "
        f"{show(without)} is left"
    )


if __name__ == "__main__":
    main(cast(Probe, sys.modules[__name__]))
