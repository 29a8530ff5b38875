"""Two runs side by side: the same quantities with their intervals, and what differs. From their records alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixturelens import figures
from mixturelens.behaviour.record import BehaviourRecord
from mixturelens.features.record import FeatureRecord
from mixturelens.figures import DASH, SIDES, show_interval
from mixturelens.figures.compared import Beside
from mixturelens.grafting.record import GraftRecord
from mixturelens.pages.pair import Findings
from mixturelens.pages.parts import Pictures, number, render
from mixturelens.patching.record import PatchingRecord
from mixturelens.records import Record, write_text
from mixturelens.routing.circuit import CircuitRecord
from mixturelens.routing.repair import RepairRecord
from mixturelens.routing.verdict import VerdictRecord
from mixturelens.stats import difference
from mixturelens.types import NOT_MEASURED, Frozen, InputError, Interval

WORTH = 0.005
"""Difference from which it is told among what differs: half a point of accuracy, and bits that count in a verdict."""
_UNKNOWN = "cannot say"
_Key = tuple[str, str]
"""What a number is about, and its name."""


class Quantity(Frozen):
    """One number of both runs; not measured in one of them where that has no such number."""

    about: str
    name: str
    left: Interval
    right: Interval
    difference: Interval
    """right - left."""

    @property
    def differs(self) -> bool:
        """Whether the two surely differ, and by more than nobody minds."""
        return self.difference.excludes(0.0) and abs(self.difference.known) >= WORTH


class Said(Frozen):
    """One word of both runs: a verdict, the heads that were found, a checkpoint."""

    name: str
    left: str
    right: str

    @property
    def differs(self) -> bool:
        """Whether the two are not the same, both being known."""
        return self.left != self.right and not {DASH, _UNKNOWN} & {self.left, self.right}


class ComparedPair(Frozen):
    """A pair of checkpoints of either run."""

    left: str
    right: str
    words: tuple[Said, ...]
    made: tuple[Said, ...]
    """Where the numbers come from: checkpoints, suite, seed, dtype, versions."""
    quantities: tuple[Quantity, ...]


class ComparisonRecord(Record):
    """Two output folders, pair by pair."""

    KIND = "comparison"

    left: str
    right: str
    pairs: tuple[ComparedPair, ...]
    alone: dict[str, tuple[str, ...]]
    """Folder -> pairs that the other has not."""


# --- from folders -----------------------------------------------------------------------------------------------------


def compare(left: Path, right: Path) -> ComparisonRecord:
    """Compare what was measured in two output folders: pairs of one name; the only ones, whatever their names.

    Raises InputError where a folder has no verdict, or no pair of one has a counterpart in the other.
    """
    sides = [_findings(folder) for folder in (left, right)]
    if all(len(side) == 1 for side in sides):
        matched = [(next(iter(sides[0])), next(iter(sides[1])))]
    else:
        matched = [(name, name) for name in sides[0] if name in sides[1]]
    if not matched:
        named = "; ".join(f"{at}: {', '.join(side)}" for at, side in zip((left, right), sides, strict=True))
        raise InputError(f"the two folders have no pair of one name ({named}): give folders of one pair each")
    names = _names(left, right)
    alone = {
        name: tuple(pair for pair in side if pair not in {both[i] for both in matched})
        for i, (name, side) in enumerate(zip(names, sides, strict=True))
    }
    pairs = tuple(_pair(sides[0][here], sides[1][there]) for here, there in matched)
    return ComparisonRecord(left=names[0], right=names[1], pairs=pairs, alone=alone)


def _names(left: Path, right: Path) -> tuple[str, str]:
    """The folders' own names, with as many of their parents' as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in (left, right)]
    for many in range(1, max(map(len, parts)) + 1):
        here, there = ("/".join(each[-many:]) for each in parts)
        if here != there:
            return here, there
    raise InputError(f"{left} and {right} are one folder: give two")


def _findings(folder: Path) -> dict[str, Findings]:
    """Name of a pair -> its records, of those that are about the weights of its verdict."""
    files = sorted(folder.glob("records/*/verdict.json"))
    if not files:
        raise InputError(
            f"{folder}: no verdict in records/*/verdict.json; give the folder of a run, or what --out named, after "
            "`mixturelens verdict`"
        )
    found = {}
    for file in files:
        verdict = VerdictRecord.load(file)
        behaviour = BehaviourRecord.load(file.with_name("behaviour.json"))
        found[file.parent.name] = Findings(
            name=file.parent.name,
            behaviour=behaviour,
            verdict=verdict,
            patching=PatchingRecord.beside(verdict, file.parent),
            circuit=CircuitRecord.beside(verdict, file.parent),
            graft=GraftRecord.beside(verdict, file.parent),
            features=FeatureRecord.beside(verdict, file.parent),
            repair=RepairRecord.beside(verdict, file.parent),
        )
    return found


def _pair(left: Findings, right: Findings) -> ComparedPair:
    numbers = [dict(_numbers(each)) for each in (left, right)]
    words, made = ([dict(of(each)) for each in (left, right)] for of in (_words, _made))
    return ComparedPair(
        left=left.name,
        right=right.name,
        words=_said(*words),
        made=_said(*made),
        quantities=tuple(
            Quantity(about=key[0], name=key[1], left=here, right=there, difference=difference(here, there))
            for key in _keys(*numbers)
            for here, there in [[side.get(key, NOT_MEASURED) for side in numbers]]
            if here.measured or there.measured
        ),
    )


def _keys(left: Mapping[Any, Any], right: Mapping[Any, Any]) -> list[Any]:
    """The keys of both, in the order of the first; what the second has alone comes last in what it is about."""
    keys = list(left)
    for key in right:
        if key not in left:
            same = [i for i, each in enumerate(keys) if each[0] == key[0]] if isinstance(key, tuple) else []
            keys.insert(same[-1] + 1 if same else len(keys), key)
    return keys


def _said(left: Mapping[str, str], right: Mapping[str, str]) -> tuple[Said, ...]:
    return tuple(Said(name=key, left=left.get(key, DASH), right=right.get(key, DASH)) for key in _keys(left, right))


# --- what is compared -------------------------------------------------------------------------------------------------


def _numbers(found: Findings) -> Iterator[tuple[_Key, Interval]]:
    """Every number that another run may have, too."""
    verdict = found.verdict
    yield ("verdict", "routing share"), verdict.routing_share
    for term, value in verdict.bits:
        yield ("verdict", f"{term}, bits"), value
    yield ("verdict", "text, nats per token"), verdict.text.nats_per_token
    yield ("verdict", "share of the choice, by the mechanism"), verdict.mechanism.share
    yield from _behaviour(found)
    for reader in () if found.patching is None else found.patching.readers:
        name = f"{reader.kind} reader of {SIDES[reader.checkpoint]}"
        yield ("patching", f"{name}: effect"), reader.effect
        yield ("patching", f"{name}: margin"), reader.margin
    for of in () if found.circuit is None else found.circuit.circuits:
        yield ("circuit", f"{of.kind}, {SIDES[of.checkpoint]}: CPR"), of.faithfulness.cpr
    yield from _grafts(found)
    for table in () if found.features is None else found.features.tables:
        best = table.best("feature")
        if best is not None:
            yield ("features", f"best for the {table.concept}: contrast moved"), best.patch
    for repair in () if found.repair is None else found.repair.repairs:
        yield ("repair", f"{repair.kind}: gap closed"), repair.gap_closed
        yield ("repair", f"{repair.kind}: change under the trained cue"), repair.trained_change


def _behaviour(found: Findings) -> Iterator[tuple[_Key, Interval]]:
    record = found.behaviour
    for cue in record.cues:
        state, about = record.per_cue[cue], f"cue {cue}"
        if state.accuracy_change is not None:
            for part, value in state.accuracy_change:
                yield (about, f"change of accuracy, {part}"), value
        for when, side in (("before", state.before), ("after", state.after)):
            for key, value in {} if side is None else side.intervals.items():
                what, _, policy = key.partition(".")
                name = {"weights": f"weight of {policy}", "accuracy": f"accuracy with {policy} put in place"}
                yield (about, f"{name.get(what, 'expected accuracy')}, {when}"), value


def _grafts(found: Findings) -> Iterator[tuple[_Key, Interval]]:
    graft = found.graft
    if graft is None:
        return
    effects = {"all of R's weights": graft.after}
    if graft.factorial is not None:
        effects |= {"the selector alone": graft.factorial.selector_only, "the rest alone": graft.factorial.rest_only}
    for name, of in effects.items():
        yield ("grafts", f"{name}: choice, bits"), of.chosen
        yield ("grafts", f"{name}: what policies do, bits"), of.done
    for cue, accuracy in {} if graft.rollback is None else graft.rollback.accuracy.items():
        if "rollback" in accuracy:
            yield ("grafts", f"accuracy under {cue}, rolled back"), accuracy["rollback"]


def _words(found: Findings) -> Iterator[tuple[str, str]]:
    verdict, known = found.verdict, {True: "yes", False: "no", None: _UNKNOWN}
    yield "verdict", verdict.verdict
    yield "verdict of the mechanism", verdict.mechanism.verdict or DASH
    for name, value in verdict.changed:
        yield f"{name.replace('_', ' ')} changed", known[value]
    yield "silent specialists intact", known[verdict.dormant_intact]
    yield "text drifted", known[verdict.text_drifted]
    for reader in () if found.patching is None else found.patching.readers:
        yield f"{reader.kind} reader of {SIDES[reader.checkpoint]}", ", ".join(map(str, reader.heads)) or DASH
    if found.graft is not None and found.graft.factorial is not None:
        yield "parts of the selector", ", ".join(found.graft.factorial.selector)
    if found.repair is not None and found.repair.best is not None:
        yield "best repair", found.repair.best.kind


def _made(found: Findings) -> Iterator[tuple[str, str]]:
    yield "questions", str(found.behaviour.questions)
    yield "trained cue", found.behaviour.trained_cue or DASH
    made = found.verdict.provenance
    for name, value in made.model_dump(exclude={"versions"}).items():
        yield name, DASH if value is None else str(value)
    yield from made.versions.items()


# --- the page ---------------------------------------------------------------------------------------------------------


def write_comparison(path: Path, record: ComparisonRecord) -> Path:
    """Write the page of a comparison, whole or not at all."""
    pictures = Pictures()
    context = {
        "title": f"{record.left} and {record.right}, side by side",
        "left": record.left,
        "right": record.right,
        "plainly": _plainly(record),
        "pairs": [_shown(record, each, pictures) for each in record.pairs],
        "alone": [f"{name}: {', '.join(pairs)}" for name, pairs in record.alone.items() if pairs],
        "intervals": figures.INTERVALS,
    }
    write_text(path, render("compared.html.j2", context, pictures))
    return path


def differing(pair: ComparedPair) -> list[Quantity]:
    """The numbers that surely differ, the farthest apart first."""
    return sorted((each for each in pair.quantities if each.differs), key=lambda each: -abs(each.difference.known))


def _plainly(record: ComparisonRecord) -> list[str]:
    lines = [
        f"Two runs side by side: {record.left} (left) and {record.right} (right). Each compares a model before "
        "training (S) with the same model after it (R); this page asks where the two runs came out "
        "differently. A number in brackets, or a whisker, is a range that would hold the true value in 95 of 100 such "
        "measurements; two numbers differ where 0 lies outside the range of their difference."
    ]
    for pair in record.pairs:
        known = [each for each in pair.quantities if each.difference.measured]
        word = next(each for each in pair.words if each.name == "verdict")
        found = differing(pair)
        verdicts = f"the verdicts are “{word.left}” and “{word.right}”" if word.differs else f"both say “{word.left}”"
        few = (
            f"{len(found)} of {len(known)} numbers that both have differ"
            if found
            else "no number that both have differs"
        )
        most = (
            f", most of all {found[0].about}: {found[0].name} ({show_interval(found[0].difference)})" if found else ""
        )
        lines.append(
            f"{_name(pair)}: {verdicts}; {few}{most}. By chance alone about {len(known) / 20:.0f} would seem to."
        )
    return lines


def _name(pair: ComparedPair) -> str:
    return pair.left if pair.left == pair.right else f"{pair.left} and {pair.right}"


def _shown(record: ComparisonRecord, pair: ComparedPair, pictures: Pictures) -> dict[str, object]:
    rows = [Beside(each.about, each.name, each.left, each.right, each.differs) for each in pair.quantities]
    picture = pictures.add(
        figures.compared((record.left, record.right), [row for row in rows if "nats" not in row.name]),
        "Shares, probabilities, bits and changes of accuracy; bold: the two surely differ.",
        read="one row a number: where the two marks lie apart, whiskers and all, the runs differ.",
    )
    abouts = dict.fromkeys(each.about for each in pair.quantities)
    return {
        "name": _name(pair),
        "differing": [_row(each) for each in differing(pair)],
        "words": pair.words,
        "made": pair.made,
        "picture": picture,
        "groups": [(about, [_row(each) for each in pair.quantities if each.about == about]) for about in abouts],
    }


def _row(each: Quantity) -> tuple[Sequence[Any], bool]:
    return (each.about, each.name, number(each.left), number(each.right), number(each.difference)), each.differs
