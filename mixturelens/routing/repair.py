"""Repair of transfer: bring the harmed cue back without training, by what the cue reader says, and score it."""

from __future__ import annotations

from typing import Literal

from mixturelens.behaviour.record import Cell
from mixturelens.records import Record
from mixturelens.types import Frozen, Interval, Intervention, Site

RepairKind = Literal["interchange", "zero", "mean", "steer", "edit"]
"""`interchange`: the cue reader's output is that of the trained cue; `zero`, `mean` (over all cues equally): it is
ablated; `steer`: the mean difference between cues is added behind its layer; `edit`: its output weights are changed."""


class Random(Frozen):
    """The same repair at random places of equal size: the distribution that a repair has to leave behind."""

    places: tuple[str, ...]
    harmed: tuple[float, ...]
    """Accuracy under the harmed cue."""
    trained: tuple[float, ...]
    median: float | None
    """Of `harmed`."""
    above: float | None
    """Share of random repairs that reach at least what the repair itself reaches."""


class Repair(Frozen):
    """One way to repair, judged on questions that chose neither heads nor strength."""

    kind: RepairKind
    what: tuple[str, ...]
    """The interventions, in words."""
    interventions: tuple[Intervention, ...] = ()
    """As values; empty for an edit of the weights."""
    accuracy: dict[str, Interval]
    """cue -> expected accuracy."""
    gap_closed: Interval
    """(repaired - R) / (best forced accuracy of S - R) under the harmed cue."""
    trained_change: Interval
    """Change of the expected accuracy under the trained cue."""
    cells: tuple[Cell, ...]
    """The policy table: R (before) and repaired (after)."""
    random: Random


class RepairRecord(Record):
    """Repairs of one pair's harmed cue."""

    KIND = "repair"

    trained_cue: str
    harmed_cue: str
    policy: str
    heads: tuple[Site, ...]
    """The cue reader, found by patching on the other half of the questions."""
    questions: int
    policies: tuple[str, ...]
    cues: tuple[str, ...]
    before: dict[str, Interval]
    """cue -> expected accuracy of S."""
    after: dict[str, Interval]
    """cue -> expected accuracy of R."""
    ceiling: Interval
    """Best forced accuracy of S under the harmed cue: what a repair could reach."""
    repairs: tuple[Repair, ...]
    checkpoint: str | None = None
    """Folder of the repaired plain checkpoint, beside the run's others."""
