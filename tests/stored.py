"""What several rooms begin with: the behaviour of a stored pair, measured once a session."""

from __future__ import annotations

import functools
from pathlib import Path

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
