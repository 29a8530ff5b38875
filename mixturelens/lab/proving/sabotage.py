"""Instruments broken on purpose: a score that does not notice them would be worth nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from mixturelens.behaviour import pair
from mixturelens.behaviour.arrays import Change
from mixturelens.behaviour.bits import bit_terms
from mixturelens.behaviour.split import class_terms
from mixturelens.lab.proving.judged import MethodScore
from mixturelens.lab.proving.localise import INTACT
from mixturelens.lab.proving.pairs import GroundCell, make_pair
from mixturelens.lab.proving.record import Broken
from mixturelens.lab.proving.truth import TOLERANCE
from mixturelens.routing.verdict import judge

Measure = Callable[..., Change]
BITS, NATS = ("routing", "conditioning", "skill"), ("routing", "conditioning")
"""Terms that must hold the truth. Bits are the same either way round, and nats are not."""


def _swapped(measure: Measure) -> Measure:
    """S taken for R."""
    return lambda scorer, before, after, prompts, seed=0: measure(scorer, after, before, prompts, seed)


def _dropped(measure: Measure) -> Measure:
    """The conditioning left out of the split."""

    def broken(*arguments: Any) -> Change:
        change = measure(*arguments)
        skill, nothing = change.bits.specialist - change.bits.conditioning, np.zeros_like(change.bits.routing)
        bits = replace(change.bits, conditioning=nothing, specialist=skill)
        return replace(change, bits=bits, nats=replace(change.nats, conditioning=nothing))

    return broken


def _shuffled(measure: Measure) -> Measure:
    """Which policy a completion of R follows, told at random on each prompt."""

    def broken(*arguments: Any) -> Change:
        change = measure(*arguments)
        rng, classes = np.random.default_rng(0), change.after.classes.copy()
        known = classes.shape[1] - 1
        for row in classes:
            row[:known] = row[rng.permutation(known)]
        after = replace(change.after, classes=classes)
        routing, wording, conditioning = class_terms(classes, change.before.classes)
        nats = replace(change.nats, routing=routing, wording=wording, conditioning=conditioning)
        return replace(change, after=after, bits=bit_terms(change.before, after), nats=nats)

    return broken


BROKEN: dict[str, tuple[Callable[[Measure], Measure], str]] = {
    "S and R swapped": (_swapped, "the pair given the wrong way round"),
    "a term dropped": (_dropped, "the split without its conditioning"),
    "labels shuffled": (_shuffled, "policies of R's completions told at random"),
}


HOOKS = {
    "one layer off": ("the hook on the wrong layer", "auroc"),
    "sides shuffled": ("clean and corrupt mixed up", "iou"),
}


def broken_methods(methods: Sequence[MethodScore]) -> Iterator[Broken]:
    """What the score of planted addresses says of broken patching, beside the sound one, on the cue."""
    of = {each.method: each for each in methods if each.contrast == "cue"}
    for name, (what, number) in HOOKS.items():
        if INTACT in of:
            sound, broken = (getattr(of[method], number).value for method in (INTACT, f"{INTACT}, {name}"))
            by = f"{'AUROC' if number == 'auroc' else 'IoU'} of planted addresses"
            yield Broken(name=name, what=what, sound=sound, broken=broken, by=by, caught=sound >= 0.9 and broken <= 0.6)


def broken_verdicts(cells: Sequence[GroundCell], ground: Path) -> Iterator[Broken]:
    """Score each broken behaviour instrument on these pairs beside the sound one: are its words and numbers right?"""
    sound = _right(cells, ground, pair.measure_change)
    for name, (breaks, what) in BROKEN.items():
        found = _right(cells, ground, breaks(pair.measure_change))
        yield Broken(
            name=name,
            what=what,
            sound=sound,
            broken=found,
            by="share of the pairs whose word is right, and whose routing, conditioning and skill hold the truth",
            caught=sound >= 0.9 and found <= 0.5,
        )


def _right(cells: Sequence[GroundCell], ground: Path, measure: Measure) -> float:
    right = []
    for cell in cells:
        made = make_pair(cell, ground)
        with patch.object(pair, "measure_change", measure):
            found = pair.behaviour_record(made.open())
        terms = [(getattr(found.bits, name), made.truth.bits[name]) for name in BITS]
        terms += [(getattr(found.nats, name), made.truth.nats[name]) for name in NATS]
        held = [
            each.low is not None and each.high is not None and each.low - TOLERANCE <= truth <= each.high + TOLERANCE
            for each, truth in terms
        ]
        right.append(all(held) and judge(found).verdict == made.truth.verdict)
    return sum(right) / len(right)
