"""What tests of several rooms begin with: the behaviour of a stored pair, measured once; and few nulls."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from mixturelens.behaviour.pair import behaviour_record
from mixturelens.behaviour.record import BehaviourRecord
from mixturelens.models import Pair
from mixturelens.suite import load_suite

PAIRS = Path(__file__).parent / "pairs"


@functools.cache
def behaviour_of(shape: str, after: str) -> BehaviourRecord:
    """The record of the pair of S and this R. With room for one more token, completions of a suite of literals are too
    many to list: its bits are as exact, and sooner there."""
    folder = PAIRS / shape
    suite = load_suite(folder)
    if suite.literal:
        suite = suite.model_copy(update={"max_new_tokens": suite.max_new_tokens + 1})
    return behaviour_record(Pair(folder / "S", folder / after, suite))


FEW = {
    "behaviour.measure": {"ENUMERATE_AT_MOST": 0},
    "probing.erase": {"RANDOM": 4},
    "probing.pair": {"RANDOM": 4},
    "probing.readouts": {"SHUFFLES": 1, "DRAWS": 100},
    "probing.subspace": {"RANDOM": 4, "SHUFFLES": 1, "STEPS": 20},
    "routing.circuit": {"VERIFIED": 6, "DRAWS": 100},
    "routing.repair": {"RANDOM": 2, "DIRECTIONS": 1},
}


def few_nulls(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is done with records: as few nulls, draws and listed completions as instruments can have."""
    for room, sizes in FEW.items():
        for name, number in sizes.items():
            monkeypatch.setattr(f"mixturelens.{room}.{name}", number)
