"""Layers and positions in which what can be read from the residual stream changes: where it pays to look closer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence, Set

from mixturelens.probing.record import Readout
from mixturelens.types import Interval, Site

STEP = 0.05
"""Least difference between two scores that counts as a change."""


def turning(sites: Sequence[Site], stream: Set[Site], found: Sequence[Readout]) -> set[tuple[int, str | int | None]]:
    """Layers and positions in which what can be read from the residual stream changes.

    That is where the score behind a layer surely differs from that before it, in S or in R; where R begins to differ
    from S, or to be like it again; or where a target is readable for the first time. `found` are readouts in the order
    of `sites`, and `stream` the sites of the residual stream.
    """
    places: set[tuple[int, str | int | None]] = set()
    positions = dict.fromkeys(site.position for site in sites)
    number = {site: i for i, site in enumerate(sites)}
    for readout, position in itertools.product(found, positions):
        levels = [s for s in sites if s in stream and s.position == position]
        rows = [(readout.before.at(number[s]), readout.after.at(number[s])) for s in levels]
        floor = readout.chance if readout.shuffled_high is None else max(readout.chance, readout.shuffled_high)

        def shows(score: Interval, floor: float = floor) -> bool:
            return score.low is not None and score.low > floor

        for site, was, now in zip(levels[1:], rows, rows[1:], strict=False):
            changed = any(_apart(x, y) for x, y in zip(was, now, strict=True))
            parted = _apart(*was) != _apart(*now)
            read = any(shows(y) and not shows(x) for x, y in zip(was, now, strict=True))
            if changed or parted or read:
                places.add((site.layer, position))
    return places


def _apart(one: Interval, other: Interval) -> bool:
    """Whether two scores surely differ, by more than STEP."""
    if one.value is None or other.value is None:
        return one.value is not other.value
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return False
    return (one.high < other.low or other.high < one.low) and abs(one.value - other.value) >= STEP
