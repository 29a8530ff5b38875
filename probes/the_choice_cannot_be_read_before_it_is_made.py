"""Does S know which policy it will announce?  `python -m probes.the_choice_cannot_be_read_before_it_is_made RUN`"""

from __future__ import annotations

import sys
from collections.abc import Container
from pathlib import Path
from typing import cast

import mixturelens as ml
from mixturelens.models import Pair
from mixturelens.probing.record import ProbingRecord, Readout
from mixturelens.types import NOT_MEASURED, InputError, Interval
from probes.contract import Answer, Probe, ProbeRecord, ask, every, main, over, places, show, some, under

UNREADABLE, READABLE = 0.6, 0.95
"""AUROC under which the choice counts as unreadable; from which the hint, and the announcement, count as read: a
hundred questions, all told apart, show no more than 0.96."""

NAME = "the_choice_cannot_be_read_before_it_is_made"
HYPOTHESIS = (
    "SFT makes the choice of a policy a throw of dice: on neutral prompts nothing inside decides it beforehand."
)
PREDICTION = (
    "In S the policy that the completion of a neutral prompt announces cannot be read at the prompt's last token: the "
    f"interval of its AUROC lies below {UNREADABLE} behind every layer. On hinted prompts the hint can be read there, "
    f"behind the last layer, with at least {READABLE}."
)
CONTROL = (
    f"At the announcement's own last token, behind some layer, the policy is read with at least {READABLE}: the probe "
    "finds what is there."
)


def run(run_folder: Path, seed: int = 0) -> ProbeRecord:
    """Raises InputError if the folder holds no finished run, or its suite no hints or but one policy."""
    return ask(__name__, run_folder, seed, _answer, _clause)


def _answer(case: Pair, seed: int) -> Answer:
    record = ml.probe(case, seed=seed)
    policy, hint = (_readout(case, record, target) for target in ("policy", "hint"))
    last = places(case)["last"]
    choice, hinted = _stream(record, policy, last), _stream(record, hint, last)
    # where positions are tokens, those of the announcement follow the prompt's
    tokens = [site.position for site in record.sites if isinstance(site.position, int)]
    announced = _stream(record, policy, {"policy", *([max(tokens)] if tokens else [])} - set(last))
    read, there = list(hinted.values())[-1], _highest(announced)
    return Answer(
        holds=every(
            [
                *(under(value, _level(policy, UNREADABLE)) for value in choice.values()),
                over(read, _level(hint, READABLE)),
                some(over(value, _level(policy, READABLE)) for value in announced.values()) if announced else None,
            ]
        ),
        outcome={
            **{f"{policy.metric} of the coming policy behind layer {n}": value for n, value in choice.items()},
            f"{hint.metric} of the hint behind the last layer": read,
        },
        control={f"{policy.metric} of the policy at its announcement": there},
        sites=tuple(f"L{layer}.resid_post@last" for layer in choice),
    )


def _readout(case: Pair, record: ProbingRecord, target: str) -> Readout:
    found = record.readout(target)
    if found is None:
        why = next((each for each in record.missing if target in each), "")
        raise InputError(f"{case.name}: no probes for {target}, which this question is about ({why})")
    return found


def _stream(record: ProbingRecord, readout: Readout, positions: Container[str | int | None]) -> dict[int, Interval]:
    """Layer -> what S's probes read behind it, at one of these positions."""
    return {
        site.layer: readout.before.at(number)
        for number, site in enumerate(record.sites)
        if site.component == "resid_post" and site.position in positions
    }


def _highest(scores: dict[int, Interval]) -> Interval:
    return max(scores.values(), key=lambda value: value.value or 0.0, default=NOT_MEASURED)


def _level(readout: Readout, auroc: float) -> float:
    """A threshold for two classes as one for any number of them: as far from chance to perfect."""
    return readout.chance + (auroc - 0.5) / 0.5 * (1 - readout.chance)


def _clause(pair: str, answer: Answer) -> str:
    *choice, hint = answer.outcome.values()
    highest = max(choice, key=lambda value: value.value or 0.0)
    return (
        f"in the S of {pair} the policy to come reads with {show(highest)} at best at the last token, the hint with "
        f"{show(hint)}, and the announced policy with {show(*answer.control.values())}"
    )


if __name__ == "__main__":
    main(cast(Probe, sys.modules[__name__]))
