"""What the finished cells of the ground say together: what was right, and which intervals held the truth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from mixturelens.files import read_text
from mixturelens.lab.proving.coverage import Coverage
from mixturelens.lab.proving.judged import score as score_methods
from mixturelens.lab.proving.localise import Found
from mixturelens.lab.proving.pairs import ARCHITECTURES, NEAR_LEAST, QUICK, GroundCell, Half
from mixturelens.lab.proving.planted import Planted
from mixturelens.lab.proving.proof import Proof
from mixturelens.lab.proving.record import (
    Confusion,
    MechanismScore,
    Mistake,
    Numbers,
    PairScore,
    Parts,
    Scored,
    ScoreRecord,
    Verdicts,
)
from mixturelens.lab.proving.sabotage import broken_methods, broken_verdicts
from mixturelens.lab.proving.truth import CELL, LEAST, TEXT, TOLERANCE, Truth
from mixturelens.records import Provenance, Record, with_versions
from mixturelens.routing.verdict import DEFAULT_THRESHOLDS
from mixturelens.types import Interval, VerdictWord

HALVES: tuple[Half, ...] = ("open", "held-out")
PARTS = ("selector", "cue_reader", "skill", "dormant_intact", "text_drifted")
NEAR_CELL, NEAR_TEXT = 0.005, 0.002
"""What is this near to the change of a cell, or to the nats a token, that count as one is a near miss of that part."""
QUANTITIES = ("routing", "conditioning", "skill", "specialist", "dormant", "moved", "routing_share", "text")
R = TypeVar("R", bound=Record)


class Coverages(Record):
    """How often intervals hold the truth, over resampled suites of one pair."""

    KIND = "coverage"

    of: tuple[Coverage, ...]


class Localisation(Record):
    """What every method finds in one organism with planted addresses."""

    KIND = "localisation"

    planted: Planted
    proof: Proof
    found: tuple[Found, ...]


def opened(planted: Sequence[Planted]) -> list[str]:
    """Organisms whose scores may choose a method's cut: every other one, of every architecture."""
    return [each.name for i, each in enumerate(planted) if (i // len(ARCHITECTURES) + i) % 2 == 0]


def sum_up(ground: Path, cells: Sequence[GroundCell], planted: Sequence[Planted]) -> ScoreRecord:
    """What the finished cells say together."""
    folder, names = ground / "cells", [cell.key for cell in cells]
    pairs = _there(PairScore, folder / "verdict", names)
    by_pair = {each.pair: each for each in _there(MechanismScore, folder / "mechanism", names)}
    places = _there(Localisation, folder / "planted", [each.name for each in planted])
    covers = _there(Coverages, folder / "coverage", names)
    truths = {each.planted.name: each.planted for each in places}
    founds = [found for each in places for found in each.found]
    known = opened(planted)
    methods = score_methods(_of_both_halves(founds, known), truths, known)
    said: list[tuple[PairScore, str, VerdictWord, str]] = [
        (p, by, of.verdict, of.reason)
        for p in pairs
        for by, of in (("behavioural", p), ("mechanism", by_pair.get(p.pair)))
        if of is not None
    ]
    seconds = {
        "behavioural verdict": [p.seconds for p in pairs],
        "mechanism's verdict": [m.seconds for m in by_pair.values()],
    }
    return ScoreRecord(
        provenance=with_versions(Provenance()),
        cells=len(cells),
        done=len(pairs),
        thresholds=DEFAULT_THRESHOLDS,
        opened=(ground / "frozen.json").is_file(),
        verdicts=tuple(
            _verdicts(by, half, [(p, word) for p, of, word, _ in said if (p.half, of) == (half, by)])
            for half in HALVES
            for by in ("behavioural", "mechanism")
        ),
        failed=tuple(
            f"{file.parent.name} of {file.stem}: {read_text(file, 'is gone').strip()}"
            for file in sorted(folder.glob("*/*.failed"))
        ),
        parts=tuple(_parts(half, part, pairs) for half in HALVES for part in PARTS),
        numbers=tuple(_numbers(half, name, pairs) for half in HALVES for name in QUANTITIES),
        mistakes=tuple(_mistake(*each) for each in said if _wrong(each[0], each[2])),
        pairs=tuple(
            Scored(
                pair=p.pair,
                half=p.half,
                truth=p.truth.verdict,
                verdict=p.verdict,
                mechanism=by_pair[p.pair].verdict if p.pair in by_pair else None,
                announced=p.announced,
                asked=p.asked,
                near=p.near,
                told=p.told,
                true_share=p.truth.routing_share,
                share=p.routing_share,
                true_moved=p.truth.moved,
                moved=p.moved,
                true_text=p.truth.text,
                text=p.text,
            )
            for p in pairs
        ),
        coverage=tuple(each for one in covers for each in one.of),
        methods=methods,
        planted=tuple(truths.values()),
        proofs=tuple(each.proof for each in places),
        broken=(*broken_verdicts(QUICK[1:3], ground), *broken_methods(methods)),
        seconds={name: round(float(np.mean(values)), 2) for name, values in seconds.items() if values},
    )


def _of_both_halves(founds: Sequence[Found], known: Sequence[str]) -> list[Found]:
    """What methods found that have an organism to choose their cut on, and another to be judged on."""
    halves: dict[tuple[str, str], set[bool]] = {}
    for found in founds:
        halves.setdefault((found.contrast, found.method), set()).add(found.organism in known)
    return [found for found in founds if len(halves[found.contrast, found.method]) == 2]


def _there(kind: type[R], folder: Path, names: Iterable[str]) -> list[R]:
    files = [folder / f"{name}.json" for name in names]
    return [kind.load(file) for file in files if file.is_file()]


def _wrong(pair: PairScore, word: VerdictWord) -> bool:
    return word != pair.truth.verdict and not (word == "inconclusive" and (pair.near or not pair.told))


def _verdicts(instrument: str, half: Half, said: list[tuple[PairScore, VerdictWord]]) -> Verdicts:
    clear = [(p, word) for p, word in said if p.told and not p.near]
    close = [not _wrong(p, word) for p, word in said if p.told and p.near]
    untold = [not _wrong(p, word) for p, word in said if not p.told]
    confusion: Confusion = {}
    for p, word in clear:
        row = confusion.setdefault(p.truth.verdict, {})
        row[word] = row.get(word, 0) + 1
    nothing = [word for p, word in said if p.truth.verdict == "neither"]
    return Verdicts(
        instrument=instrument,
        half=half,
        pairs=len(clear),
        confusion=confusion,
        right=wilson(sum(word == p.truth.verdict for p, word in clear), len(clear)),
        false_alarms=sum(word in ("routing", "specialist", "both") for word in nothing),
        nothing=len(nothing),
        near=len(close),
        near_ok=sum(close),
        untold=len(untold),
        untold_ok=sum(untold),
    )


def _parts(half: Half, part: str, pairs: Sequence[PairScore]) -> Parts:
    """Off announcement `none`, where the parts are not all exact, and off near misses of this part."""
    mine = [p for p in pairs if p.half == half and p.announced != "none" and not near_part(p.truth, part)]
    said = [getattr(p if part in ("dormant_intact", "text_drifted") else p.changed, part) for p in mine]
    right = sum(word == getattr(p.truth, part) for p, word in zip(mine, said, strict=True))
    return Parts(half=half, part=part, pairs=len(mine), right=right, unsaid=said.count(None))


def near_part(truth: Truth, part: str) -> bool:
    """Whether the exact number lies so near to its threshold that a suite of this size need not tell."""
    if part == "dormant_intact":
        return abs(truth.cell - CELL) <= NEAR_CELL
    if part == "text_drifted":
        return abs(truth.text - TEXT) <= NEAR_TEXT
    name = {"selector": "routing", "cue_reader": "conditioning", "skill": "skill"}[part]
    return abs(truth.bits[name] - LEAST) <= NEAR_LEAST


def _numbers(half: Half, quantity: str, pairs: Sequence[PairScore]) -> Numbers:
    """Off announcement `none`, whose terms no completion tells, and off shares of nothing."""
    held = []
    for pair in pairs:
        found, truth = _number(pair, quantity)
        if pair.half != half or pair.announced == "none" or truth is None or found.low is None or found.high is None:
            continue
        held.append(found.low - TOLERANCE <= truth <= found.high + TOLERANCE)
    return Numbers(half=half, quantity=quantity, pairs=len(held), held=wilson(sum(held), len(held)))


def _number(pair: PairScore, quantity: str) -> tuple[Interval, float | None]:
    """What was measured, and what is true: bits, a share of them, or nats a token.

    Not of text where skill changed: what is said where R errs and S never did has nothing to be compared with.
    """
    truth = pair.truth
    if quantity == "text" and truth.skill:
        return pair.text, None
    if quantity == "routing_share":
        return pair.routing_share, truth.routing_share if truth.moved >= LEAST else None
    if quantity in ("moved", "text"):
        return getattr(pair, quantity), getattr(truth, quantity)
    return pair.bits[quantity], truth.bits[quantity]


def wilson(hits: int, number: int) -> Interval:
    """A share with Wilson's 95% interval (Wilson 1927); not measured for none at all.

    >>> wilson(19, 20)
    Interval(value=0.95, low=0.764, high=0.991)
    """
    if not number:
        return Interval()
    from scipy.stats import binomtest

    bounds = binomtest(hits, number).proportion_ci(method="wilson")
    return Interval(value=hits / number, low=round(bounds.low, 3), high=round(bounds.high, 3))


def _mistake(pair: PairScore, instrument: str, word: VerdictWord, reason: str) -> Mistake:
    return Mistake(
        pair=pair.pair,
        half=pair.half,
        instrument=instrument,
        truth=pair.truth.verdict,
        verdict=word,
        true_share=pair.truth.routing_share,
        share=pair.routing_share,
        true_moved=pair.truth.moved,
        moved=pair.moved,
        reason=reason,
    )
