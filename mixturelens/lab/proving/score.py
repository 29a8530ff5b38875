"""The score: every instrument over the whole ground, one cell at a time, and what comes of it.

Each cell is a file of its own, so that a score resumes where it was stopped, and grows when the ground does. The
thresholds are frozen when the open half is done, before anything of the other half is measured.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixturelens.behaviour import unannounced
from mixturelens.behaviour.pair import behaviour_record
from mixturelens.files import read_text
from mixturelens.grafting.pair import graft_record
from mixturelens.lab.organism import questions
from mixturelens.lab.proving.coverage import POPULATION, Population, coverage
from mixturelens.lab.proving.localise import BROKEN, METHODS, OF_PAIRS, localise
from mixturelens.lab.proving.pairs import (
    ARCHITECTURES,
    QUICK,
    GroundCell,
    Organism,
    exact_of,
    grid,
    make_organism,
    make_pair,
    near,
)
from mixturelens.lab.proving.planted import Planted, grow, plan
from mixturelens.lab.proving.proof import proof
from mixturelens.lab.proving.record import (
    MechanismScore,
    PairScore,
    ScoreRecord,
)
from mixturelens.lab.proving.sums import HALVES, Coverages, Localisation, sum_up
from mixturelens.lab.stage import alone
from mixturelens.models import load_tokenizer
from mixturelens.models.source import fingerprint
from mixturelens.records import Provenance, Record, with_versions, write_text
from mixturelens.routing.verdict import DEFAULT_THRESHOLDS, judge
from mixturelens.types import InputError, Interval, RunError

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


def score_coverage(cell: GroundCell, ground: Path) -> Coverages:
    """How often intervals hold the truth, over resampled suites of this pair."""
    made = make_pair(cell, ground)
    spec, models, tokenizer = cell.organism.spec, made.models(), load_tokenizer(made.before)
    population = [question for pool in reversed(questions(spec)) for question in pool][:POPULATION]
    exact = exact_of(cell, *models, tokenizer, population)
    suite = made.load_suite()
    suite = suite if suite.literal else suite.model_copy(update={"samples": FEW_SAMPLES})
    found = coverage(cell.name, Population(spec, suite, population, exact), models, tokenizer)
    return Coverages(provenance=made.open().provenance(), of=found)


def score_planted(planted: Planted, ground: Path) -> Localisation:
    """Grow an organism with planted addresses, prove it, and let every method look for them."""
    folder = ground / "planted" / planted.name
    grow(planted, folder)
    methods = [name for name in (*METHODS, *BROKEN, *OF_PAIRS) if name not in SLOW or planted.architecture in ASKED_OF]
    found = localise(folder, methods)
    return Localisation(
        provenance=with_versions(Provenance(before=fingerprint(folder / "checkpoints/sft"))),
        planted=planted,
        proof=proof(folder),
        found=found,
    )


# --- the whole ground -------------------------------------------------------------------------------------------------


def run_score(ground: Path, *, quick: bool = False, jobs: int = 1, progress: Progress | None = None) -> ScoreRecord:
    """Score every cell that has no file yet, then sum up what there is in `ground/score.json`.

    The open half goes first; then the thresholds are frozen, and the other half is opened. Raises InputError if the
    thresholds have changed since this ground's held-out half was opened.
    """
    cells, planted = (QUICK, ()) if quick else (grid(), PLANTED)
    for half in HALVES:
        _do("verdict", [cell for cell in cells if cell.half == half], ground, jobs, progress, f"verdicts, {half}")
        if half == "open":
            _freeze(ground)
    asked = [cell for cell in cells if has_mechanism(cell) and not quick]
    _do("mechanism", asked, ground, jobs, progress, "mechanism")
    _do("planted", planted, ground, jobs, progress, "planted addresses")
    _do("coverage", covered(cells), ground, jobs, progress, "coverage")
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


WORK: Mapping[str, Callable[[Any, Path], Record]] = {
    "verdict": score_pair,
    "mechanism": score_mechanism,
    "planted": score_planted,
    "coverage": score_coverage,
}
"""Name of a folder in `ground/cells` -> what makes a file there of one cell, or of one planted organism."""


def _do(
    kind: str,
    each: Sequence[GroundCell] | Sequence[Planted],
    ground: Path,
    jobs: int,
    progress: Progress | None,
    what: str,
) -> None:
    """The work that has no file yet; so many at once, each on one thread; organisms first."""
    from joblib import Parallel, delayed

    folder = ground / "cells" / kind
    steps = [(of, folder / f"{of.key if isinstance(of, GroundCell) else of.name}.json") for of in each]
    left = [step for step in steps if not step[1].is_file()]
    done = len(steps) - len(left)
    if progress is not None and steps:
        progress(what, done, len(steps))
    organisms = dict.fromkeys(of.organism for of, _ in left if isinstance(of, GroundCell))
    missing = [each for each in organisms if not (ground / "organisms" / each.name / "checkpoints/sft").exists()]
    run = Parallel(n_jobs=jobs, return_as="generator_unordered")
    for number, _ in enumerate(run(delayed(_organism)(each, ground) for each in missing), start=1):
        if progress is not None:
            progress(f"organisms of {what}", number, len(missing))
    for _ in run(delayed(_step)(WORK[kind], of, file, ground) for of, file in left):
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
