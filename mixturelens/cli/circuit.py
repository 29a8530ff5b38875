"""What `mixturelens circuit` does: find the records, write the files, print the strongest edges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import mixturelens as ml
from mixturelens.cli.tables import print_table, tell, unmeasured
from mixturelens.types import InputError

if TYPE_CHECKING:
    from mixturelens.cli.core import Given
    from mixturelens.contrasts import Kind
    from mixturelens.features.record import FeatureRecord
    from mixturelens.pages.circuit import CircuitView
    from mixturelens.patching.record import PatchingRecord
    from mixturelens.routing.circuit import CircuitRecord

_ROWS = 12
"""Edges of each side that are printed."""


class Export(NamedTuple):
    """What to show and to write."""

    files: Sequence[Path]
    kind: Kind | None
    edges: int
    side: Literal["before", "after"]


class PairCircuits(NamedTuple):
    """A pair's circuits, and what else its folder holds."""

    record: CircuitRecord
    patching: PatchingRecord | None
    features: FeatureRecord | None

    def view(self, kind: Kind | None) -> CircuitView:
        """To look at, with what the other records say of its nodes."""
        return ml.circuit_view(self.record, kind, patching=self.patching, features=self.features)


def asked(files: Sequence[Path], kind: str | None, edges: int, side: str) -> Export:
    """The options, checked before anything is measured. Raises InputError."""
    from mixturelens.pages.circuit import check_export

    if kind not in (None, "cue", "hint"):
        raise InputError(f"--contrast {kind}: cue or hint")
    if side not in ("before", "after"):
        raise InputError(f"--side {side}: before or after")
    if edges < 1:
        raise InputError(f"--edges {edges}: one or more")
    for file in files:
        check_export(file)
    return Export(files, cast(Any, kind), edges, cast(Any, side))


def circuits_given(given: Given, options: Mapping[str, Any]) -> dict[str, PairCircuits]:
    """Name of a pair -> its circuits: measured where they are not there; of a folder without a spec, read."""
    from mixturelens.features.record import FeatureRecord
    from mixturelens.patching.record import PatchingRecord
    from mixturelens.routing.circuit import CircuitRecord

    def found(record: CircuitRecord, folder: Path) -> PairCircuits:
        return PairCircuits(record, PatchingRecord.beside(record, folder), FeatureRecord.beside(record, folder))

    if given.run is not None and not (given.run / "spec.json").is_file():
        files = sorted(given.run.glob("records/*/circuit.json"))
        if not files:
            raise InputError(f"{given.run}: no circuit in records/*/circuit.json; `mixturelens patch` finds it")
        return {file.parent.name: found(CircuitRecord.load(file), file.parent) for file in files}
    pairs = given.pairs()
    return {pair.name: found(ml.circuit(pair, pairs, **options), pair.records) for pair in pairs}


def export_circuits(found: Mapping[str, PairCircuits], wanted: Export) -> list[Path]:
    """Write each file; of several pairs each its own, with the pair's name in the file's."""
    written = []
    for name, each in found.items() if wanted.files else ():
        view = each.view(wanted.kind)
        for file in wanted.files:
            path = file if len(found) == 1 else file.with_name(f"{file.stem}-{name}{file.suffix}")
            view.save(path, wanted.edges, wanted.side)
            written.append(path)
    return written


def show_circuits(found: Mapping[str, PairCircuits], wanted: Export, written: Sequence[Path]) -> None:
    """The strongest edges of each pair, S beside R, and what was written."""
    from mixturelens.figures import DASH, SIDES, show_interval

    for name, each in found.items():
        for reason in each.record.missing:
            tell(f"{name}: {unmeasured(f'circuit of the {reason}')}")
        kinds: dict[Kind, None] = dict.fromkeys(
            of.kind for of in each.record.circuits if wanted.kind in (None, of.kind)
        )
        for kind in kinds:
            drawing = each.view(kind).drawing
            strongest = sorted(drawing.ranks, key=lambda key: drawing.ranks[key])[:_ROWS]
            sides = [SIDES[of.checkpoint] for of in drawing.circuits]
            words = drawing.circuits[0].labels
            rows = [
                (f"{sender} → {receiver}", words[at] if words else str(at), *shown)
                for key in strongest
                for sender, receiver, at in [key]
                for shown in [[show_interval(side[key].score) if key in side else DASH for side in drawing.edges]]
            ]
            print(f"{name}, {kind}: the strongest edges, shares of the contrast")
            print_table(("edge", "at", *sides), rows)
    for path in written:
        print(path)
