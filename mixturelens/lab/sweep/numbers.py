"""What each instrument puts into the table of a sweep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mixturelens.behaviour.record import BehaviourRecord
from mixturelens.features.record import FeatureRecord
from mixturelens.grafting.record import GraftRecord
from mixturelens.patching.record import PatchingRecord
from mixturelens.probing.record import ProbingRecord
from mixturelens.routing.repair import RepairRecord
from mixturelens.routing.verdict import VerdictRecord
from mixturelens.types import Interval

Scalar = bool | int | float | str | None
Numbers = dict[str, Interval | Scalar]
"""Column -> number, word, or number with interval (three columns)."""

TAKEN = ("cell", "recipe", "seed", "after", "trained_cue", "verdict", "routing_share", "router_share")
"""Columns without a dot, and first those that say what a row is about: no label of a grid may be called so."""


def _behaviour(record: BehaviourRecord | VerdictRecord) -> Numbers:
    found: Numbers = {}
    for cue, state in record.per_cue.items():
        for when, side in (("before", state.before), ("after", state.after)):
            for name, value in side.intervals.items() if side else ():
                if name == "overall":
                    found[f"accuracy.{cue}.{when}"] = value
                elif name.startswith("weights."):
                    found[f"weight.{name.removeprefix('weights.')}.{cue}.{when}"] = value
    return found


def _verdict(record: VerdictRecord) -> Numbers:
    return {
        "verdict": record.verdict,
        "routing_share": record.routing_share,
        "router_share": record.router_share,
        **{f"bits.{term}": value for term, value in record.bits},
        "text.nats_per_token": record.text.nats_per_token,
        **{f"changed.{part}": changed for part, changed in record.changed},
        "changed.dormant": None if record.dormant_intact is None else not record.dormant_intact,
        "changed.text": record.text_drifted,
        "mechanism.verdict": record.mechanism.verdict,
        **_behaviour(record),
    }


def _patch(record: PatchingRecord) -> Numbers:
    found: Numbers = {}
    for reader in record.readers:
        name = f"patch.{reader.kind}.{reader.checkpoint}"
        found |= {f"{name}.heads": " + ".join(map(str, reader.heads)), f"{name}.effect": reader.effect}
    return found


def _graft(record: GraftRecord) -> Numbers:
    found: Numbers = {}
    for each in record.components:
        found[f"graft.suffices.{each.name}"] = each.suffices.routing
        found[f"graft.without.{each.name}"] = each.without.routing
    return found


def _probe(record: ProbingRecord) -> Numbers:
    found: Numbers = {}
    for each in record.readouts:
        if each.best is not None:
            found[f"probe.{each.target}.site"] = str(record.sites[each.best])
            found[f"probe.{each.target}.before"] = each.before.at(each.best)
            found[f"probe.{each.target}.after"] = each.after.at(each.best)
    return found


def _features(record: FeatureRecord) -> Numbers:
    return {
        f"features.{table.concept}.{score.unit.kind}": score.patch for table in record.tables for score in table.scores
    }


def _repair(record: RepairRecord) -> Numbers:
    found: Numbers = {}
    for each in record.repairs:
        found[f"repair.{each.kind}.gap_closed"] = each.gap_closed
        found[f"repair.{each.kind}.trained_change"] = each.trained_change
        found[f"repair.{each.kind}.random"] = each.random.median
    return found


INSTRUMENTS: dict[str, Callable[[Any], Numbers]] = {
    "behaviour": _behaviour,
    "patch": _patch,
    "graft": _graft,
    "probe": _probe,
    "features": _features,
    "repair": _repair,
    "verdict": _verdict,
}
"""Command -> what its record puts into the table. They are done in this order: the verdict hears what
the others found. Names of columns have a dot, but for those in TAKEN."""


def flat(numbers: Numbers) -> dict[str, Scalar]:
    """Numbers and intervals as columns of the table: an interval x becomes `x`, `x.low` and `x.high`."""
    found: dict[str, Scalar] = {}
    for column, value in numbers.items():
        if isinstance(value, Interval):
            found |= {column: value.value, f"{column}.low": value.low, f"{column}.high": value.high}
        else:
            found[column] = value
    return found
