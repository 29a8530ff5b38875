"""The score: every instrument over the whole ground, one cell at a time, and what comes of it.

Each cell is a file of its own, so that a score resumes where it was stopped, and grows when the ground does. The
thresholds are frozen when the open half is done, before anything of the other half is measured.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mixturelens.behaviour import unannounced
from mixturelens.behaviour.pair import behaviour_record
from mixturelens.files import read_text
from mixturelens.grafting.pair import graft_record
from mixturelens.lab.organism import questions
from mixturelens.lab.proving.coverage import POPULATION, Coverage, Population, coverage
from mixturelens.lab.proving.localise import BROKEN, METHODS, OF_PAIRS, Found, localise
from mixturelens.lab.proving.localise import score as score_methods
from mixturelens.lab.proving.pairs import (
    ARCHITECTURES,
    NEAR_LEAST,
    QUICK,
    GroundCell,
    Half,
    Organism,
    exact_of,
    grid,
    make_organism,
    make_pair,
    near,
)
from mixturelens.lab.proving.planted import Planted, grow, plan
from mixturelens.lab.proving.proof import Proof, proof
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
from mixturelens.lab.stage import alone
from mixturelens.models import load_tokenizer
from mixturelens.models.source import fingerprint
from mixturelens.records import Provenance, Record, with_versions, write_text
from mixturelens.routing.verdict import DEFAULT_THRESHOLDS, judge
from mixturelens.types import InputError, Interval, RunError, VerdictWord

R = TypeVar("R", bound=Record)
HALVES: tuple[Half, ...] = ("open", "held-out")
Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, all)."""

PLANTED = tuple(plan(architecture, number) for number in range(6, 9) for architecture in ARCHITECTURES)
SLOW, ASKED_OF = ("SAE feature", "DAS"), ("llama", "gpt_neox")
"""Methods that train something for every node, which takes most of an hour on all organisms; and whose they are."""
COVERED = (
    "resampled-mildly",
    "grpo",
    "noise",
    "sometimes-answers",
    "better-skill",
    "skill-damaged",
    "both-with-reader",
    "both-with-skill",
    "near-routing",
    "near-specialist",
)
"""Recipes of which one pair each, the first of the ground, shows how often intervals hold the truth."""
COVERED_BY_RULES = ("style-and-routing", "style-and-skill", "style-and-both")
"""The same of pairs asked by rules, where completions are samples and have a tail."""
FEW_SAMPLES = 16
"""Completions a prompt behind those: as few as people draw."""
PARTS = ("selector", "cue_reader", "skill", "dormant_intact", "text_drifted")
QUANTITIES = ("routing", "conditioning", "skill", "specialist", "dormant", "moved", "routing_share", "text")


def score_pair(cell: GroundCell, ground: Path) -> PairScore:
    """Make the pair, and hear what the behavioural verdict says of it."""
    made = make_pair(cell, ground)
    start = time.perf_counter()
    pair = made.open()
    record = behaviour_record(pair)
    said = judge(record)
    bits = {name: value for name, value in said.bits if isinstance(value, Interval)}
    return PairScore(
        provenance=pair.provenance(),
        pair=cell.name,
        organism=cell.organism.name,
        recipe=cell.recipe.name,
        half=cell.half,
        architecture=cell.organism.architecture,
        announced=cell.organism.announced,
        asked=cell.asked,
        policies=cell.organism.policies,
        seed=cell.organism.seed,
        intended=cell.recipe.intended,
        truth=made.truth,
        near=near(made.truth),
        told=cell.told,
        verdict=said.verdict,
        changed=said.changed,
        dormant_intact=said.dormant_intact,
        text_drifted=said.text_drifted,
        reason=said.reason,
        routing_share=said.routing_share,
        bits=bits,
        moved=record.moved,
        text=said.text.nats_per_token,
        seconds=time.perf_counter() - start,
    )


def score_mechanism(cell: GroundCell, ground: Path) -> MechanismScore:
    """The mechanism's verdict on the pair: from grafts alone."""
    made = make_pair(cell, ground)
    pair = made.open()
    record = behaviour_record(pair)
    start = time.perf_counter()
    graft = graft_record(pair, record)
    said = judge(record, graft=graft).mechanism
    return MechanismScore(
        provenance=pair.provenance(),
        pair=cell.name,
        verdict=said.verdict or "inconclusive",
        reason=said.reason or "",
        seconds=time.perf_counter() - start,
    )


class _Coverages(Record):
    KIND = "coverage"

    of: tuple[Coverage, ...]


def score_coverage(cell: GroundCell, ground: Path) -> _Coverages:
    """How often intervals hold the truth, over resampled suites of this pair."""
    made = make_pair(cell, ground)
    spec, models, tokenizer = cell.organism.spec, made.models(), load_tokenizer(made.before)
    population = [question for pool in reversed(questions(spec)) for question in pool][:POPULATION]
    exact = exact_of(cell, *models, tokenizer, population)
    suite = made.load_suite()
    suite = suite if suite.literal else suite.model_copy(update={"samples": FEW_SAMPLES})
    found = coverage(cell.name, Population(spec, suite, population, exact), models, tokenizer)
    return _Coverages(provenance=made.open().provenance(), of=found)


class _Localisation(Record):
    KIND = "localisation"

    planted: Planted
    proof: Proof
    found: tuple[Found, ...]


def score_planted(planted: Planted, ground: Path) -> _Localisation:
    """Grow an organism with planted addresses, prove it, and let every method look for them."""
    folder = ground / "planted" / planted.name
    grow(planted, folder)
    methods = [name for name in (*METHODS, *BROKEN, *OF_PAIRS) if name not in SLOW or planted.architecture in ASKED_OF]
    found = localise(folder, methods)
    return _Localisation(
        provenance=with_versions(Provenance(before=fingerprint(folder / "checkpoints/sft"))),
        planted=planted,
        proof=proof(folder),
        found=found,
    )


# --- the whole ground -------------------------------------------------------------------------------------------------


Step = tuple[Callable[[Any, Path], Record], Any, Path]
"""What to do, with what, and the file that it ends in."""


def run_score(ground: Path, *, quick: bool = False, jobs: int = 1, progress: Progress | None = None) -> ScoreRecord:
    """Score every cell that has no file yet, then sum up what there is in `ground/score.json`.

    The open half goes first; then the thresholds are frozen, and the other half is opened. Raises InputError if the
    thresholds have changed since this ground's held-out half was opened.
    """
    cells, planted = (QUICK, ()) if quick else (grid(), PLANTED)
    for half in HALVES:
        _do(
            [_verdict(cell, ground) for cell in cells if cell.half == half], ground, jobs, progress, f"verdicts, {half}"
        )
        if half == "open":
            _freeze(ground)
    _do(
        [_mechanism(cell, ground) for cell in cells if has_mechanism(cell) and not quick],
        ground,
        jobs,
        progress,
        "mechanism",
    )
    _do([_address(each, ground) for each in planted], ground, jobs, progress, "planted addresses")
    _do([_cover(cell, ground) for cell in covered(cells)], ground, jobs, progress, "coverage")
    record = sum_up(ground, cells, planted)
    record.save(ground / "score.json")
    return record


def has_mechanism(cell: GroundCell) -> bool:
    """Whether the mechanism is asked: the same pair asked by rules has the same, and nothing can be put in place where
    policies announce nothing."""
    return cell.organism.announced != "none" and not cell.tokens


def covered(cells: Sequence[GroundCell]) -> list[GroundCell]:
    """The first pair of each recipe whose intervals are put to the test."""
    if len(cells) <= len(QUICK):
        return []
    literal = {cell.made: cell for cell in reversed(cells) if has_mechanism(cell)}
    by_rules = {cell.made: cell for cell in reversed(cells) if cell.tokens}
    return [*(literal[name] for name in COVERED), *(by_rules[name] for name in COVERED_BY_RULES)]


def _verdict(cell: GroundCell, ground: Path) -> Step:
    return score_pair, cell, ground / "cells/verdict" / f"{cell.key}.json"


def _mechanism(cell: GroundCell, ground: Path) -> Step:
    return score_mechanism, cell, ground / "cells/mechanism" / f"{cell.key}.json"


def _cover(cell: GroundCell, ground: Path) -> Step:
    return score_coverage, cell, ground / "cells/coverage" / f"{cell.key}.json"


def _address(planted: Planted, ground: Path) -> Step:
    return score_planted, planted, ground / "cells/planted" / f"{planted.name}.json"


def opened(planted: Sequence[Planted]) -> list[str]:
    """Organisms whose scores may choose a method's cut: every other one, of every architecture."""
    return [each.name for i, each in enumerate(planted) if (i // len(ARCHITECTURES) + i) % 2 == 0]


def _do(steps: list[Step], ground: Path, jobs: int, progress: Progress | None, what: str) -> None:
    """The steps that have no file yet; so many at once, each on one thread; organisms first."""
    from joblib import Parallel, delayed

    left = [step for step in steps if not step[2].is_file()]
    done = len(steps) - len(left)
    if progress is not None and steps:
        progress(what, done, len(steps))
    organisms = dict.fromkeys(of.organism for _, of, _ in left if isinstance(of, GroundCell))
    missing = [each for each in organisms if not (ground / "organisms" / each.name / "checkpoints/sft").exists()]
    run = Parallel(n_jobs=jobs, return_as="generator_unordered")
    for number, _ in enumerate(run(delayed(_organism)(each, ground) for each in missing), start=1):
        if progress is not None:
            progress(f"organisms of {what}", number, len(missing))
    for _ in run(delayed(_step)(*step, ground) for step in left):
        done += 1
        if progress is not None:
            progress(what, done, len(steps))


def _organism(organism: Organism, ground: Path) -> None:
    alone()
    make_organism(organism, ground)


def _step(work: Callable[[Any, Path], Record], of: Any, file: Path, ground: Path) -> None:
    """What cannot be scored is written down beside, and tried again by the next run; the rest goes on."""
    alone()
    failure = file.with_suffix(".failed")
    try:
        work(of, ground).save(file)
        failure.unlink(missing_ok=True)
    except (InputError, RunError) as error:
        write_text(failure, f"{error}\n")


def _freeze(ground: Path) -> None:
    """Write down what verdicts are told by, or refuse to go on with something else."""
    told_by = {"verdict": DEFAULT_THRESHOLDS.model_dump(), "unannounced": [unannounced.MISFIT, unannounced.UNEXPLAINED]}
    now, file = json.dumps(told_by, indent=1) + "\n", ground / "frozen.json"
    if not file.is_file():
        write_text(file, now)
    elif read_text(file, "is gone") != now:
        raise InputError(
            f"{file}: the thresholds have changed since the held-out half was opened; score a new ground (--out)"
        )


# --- sums -------------------------------------------------------------------------------------------------------------


def sum_up(ground: Path, cells: Sequence[GroundCell], planted: Sequence[Planted]) -> ScoreRecord:
    """What the finished cells say together."""
    folder, names = ground / "cells", [cell.key for cell in cells]
    pairs = _there(PairScore, folder / "verdict", names)
    by_pair = {each.pair: each for each in _there(MechanismScore, folder / "mechanism", names)}
    places = _there(_Localisation, folder / "planted", [each.name for each in planted])
    covers = _there(_Coverages, folder / "coverage", names)
    truths = {each.planted.name: each.planted for each in places}
    founds = [found for each in places for found in each.found]
    known = opened(planted)
    methods = score_methods(_of_both_halves(founds, known), truths, known)
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
            sums
            for half in HALVES
            for sums in (
                _verdicts("behavioural", half, [(p, p.verdict) for p in pairs if p.half == half]),
                _verdicts(
                    "mechanism",
                    half,
                    [(p, by_pair[p.pair].verdict) for p in pairs if p.half == half and p.pair in by_pair],
                ),
            )
        ),
        failed=tuple(
            f"{file.parent.name} of {file.stem}: {read_text(file, 'is gone').strip()}"
            for file in sorted(folder.glob("*/*.failed"))
        ),
        parts=tuple(_parts(half, part, pairs) for half in HALVES for part in PARTS),
        numbers=tuple(_numbers(half, name, pairs) for half in HALVES for name in QUANTITIES),
        mistakes=tuple(
            mistake
            for p in pairs
            for mistake in (
                _mistake(p, "behavioural", p.verdict, p.reason),
                _mistake(p, "mechanism", by_pair[p.pair].verdict, by_pair[p.pair].reason)
                if p.pair in by_pair
                else None,
            )
            if mistake is not None
        ),
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


NEAR_CELL, NEAR_TEXT = 0.005, 0.002
"""What is this near to the change of a cell, or to the nats a token, that count as one is a near miss of that part."""


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


def _mistake(pair: PairScore, instrument: str, word: VerdictWord, reason: str) -> Mistake | None:
    if not _wrong(pair, word):
        return None
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
