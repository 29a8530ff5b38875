"""The steps in order, resuming from what is on disk: pair -> records -> report.

Every step reads what the step before wrote, so each can be run again alone. A step whose result is there, made from the
same weights, suite and seed, is not done again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mixturelens.behaviour.pair import behaviour_record
from mixturelens.behaviour.record import BehaviourRecord
from mixturelens.discovery.asked import Asked
from mixturelens.discovery.draws import draw, stored
from mixturelens.discovery.propose import DiscoverySettings, Proposal, heard, propose, refine
from mixturelens.discovery.proposed import check_suite, save_suite
from mixturelens.discovery.record import DiscoveryRecord
from mixturelens.features.pair import FeatureSettings, feature_record, pretrained
from mixturelens.features.record import FeatureRecord
from mixturelens.grafting.pair import GraftSettings, graft_record
from mixturelens.grafting.record import GraftRecord
from mixturelens.models import Pair
from mixturelens.models.source import fingerprint
from mixturelens.patching.pair import PatchingSettings, patching_record
from mixturelens.patching.record import PatchingRecord
from mixturelens.probing.pair import ProbingSettings, probing_record
from mixturelens.probing.record import ProbingRecord
from mixturelens.records import Provenance, Record, check_writable, held
from mixturelens.routing.circuit import CircuitRecord, CircuitSettings, circuit_record
from mixturelens.routing.repair import RepairRecord, RepairSettings, repair_record
from mixturelens.routing.verdict import VerdictRecord, judge
from mixturelens.suite import PromptRow, load_suite
from mixturelens.types import InputError
from mixturelens.unfinished import Unfinished, whole

if TYPE_CHECKING:
    from mixturelens.pages import ComparisonRecord, Findings, Grown

Say = Callable[[str], None]
R = TypeVar("R", bound=Record)
Measured = TypeVar("Measured", PatchingRecord, CircuitRecord, ProbingRecord, GraftRecord, FeatureRecord, RepairRecord)
"""Records of instruments, which say what is missing."""


def discover(
    pair: Pair,
    asked: Asked,
    settings: DiscoverySettings | None = None,
    *,
    seed: int = 0,
    say: Say | None = None,
) -> DiscoveryRecord:
    """Propose a suite from prompts alone: policies, behaviours and cue.

    `asked`: prompts from `read_prompts`, whose suite is that of the pair, too. `settings`: a judge beside
    the rules, and an encoder for texts.

    Writes `completions/`, `discover.json`, the page `discover.html`, and, where something was found, `suite.yaml` with
    its `prompts.jsonl`, all into `pair.out`. Raises InputError where any of that would be written over.
    """
    draws = draw(pair, asked, seed, say or (lambda _: None))
    digest = hashlib.sha256(asked.suite.model_dump_json(exclude_defaults=True).encode()).hexdigest()[:16]
    settings = settings or DiscoverySettings()
    proposal = propose(asked, draws, seed, pair.provenance(seed, digest), settings.embed)
    if settings.second is not None:
        proposal = heard(asked, proposal, settings.second, pair.out / "judged", seed)
    check_suite(proposal.suite, pair.out)
    _write_discovery(pair.out, "discover", asked, proposal)
    if proposal.suite is not None:
        save_suite(proposal.suite, proposal.record, pair.out)
    return proposal.record


def refine_discovery(suite: Path, out: Path | None = None, *, seed: int = 0) -> tuple[DiscoveryRecord, Path]:
    """Measure an edited suite on the completions that `discover` left beside it (or in `out`), without any model.

    Writes `refine.json` and the page `refine.html`; what was proposed stays as it is.
    """
    edited, folder = load_suite(suite), out or suite.parent
    asked, draws = stored(folder)
    made = DiscoveryRecord.load(folder / "discover.json").provenance
    proposal = refine(asked, draws, edited, seed, made)
    _write_discovery(folder, "refine", asked, proposal)
    return proposal.record, folder


def _write_discovery(folder: Path, name: str, asked: Asked, proposal: Proposal) -> None:
    from mixturelens.pages.discovered import write_discovered

    proposal.record.save(folder / f"{name}.json")
    made = proposal.record.provenance
    pair = " and ".join(str(name).split("@")[0] for name in (made.before, made.after))
    write_discovered(folder / f"{name}.html", asked, proposal, f"What completions of {pair} show")


def measure(pair: Pair, *, seed: int = 0, say: Say | None = None) -> BehaviourRecord:
    """Measure the behaviour of a pair, or read the record that is there about the same weights, suite and seed."""
    expected = provenance_of(pair, seed)
    file = pair.records / "behaviour.json"
    there = kept(BehaviourRecord, file, expected)
    if there is not None:
        return there
    check_writable(pair.records)
    record = behaviour_record(pair, suite_name=expected.suite, seed=seed, progress=say)
    record.save(file)
    return record


def patch(pair: Pair, *, exhaustive: bool = False, seed: int = 0, say: Say | None = None) -> PatchingRecord:
    """Find where the router is, by patching; or read the record that is there about the same things.

    `exhaustive`: every site is patched, and not only those that slopes nominate. Raises InputError where the pair has
    no checkpoint after, or no cue contrast.
    """
    options = {"seed": seed, "say": say}

    def make(pair: Pair, measured: BehaviourRecord, parts: Unfinished) -> PatchingRecord:
        return patching_record(pair, measured, PatchingSettings(exhaustive, parts), **options)

    return _instrument(
        pair, PatchingRecord, "patching", make, lambda there: there.exhaustive or not exhaustive, **options
    )


def circuit(
    pair: Pair,
    others: Sequence[Pair] = (),
    *,
    exhaustive: bool = False,
    seed: int = 0,
    say: Say | None = None,
) -> CircuitRecord:
    """Find the routing circuits of a pair, and compare them with those of `others`, the other checkpoints of its run.

    Or read what is there about the same things.
    """
    options = {"seed": seed, "say": say}
    also = {other.after.name: other for other in others if other.after is not None and other.after != pair.after}
    compared = tuple(fingerprint(other.after) for other in also.values() if other.after is not None)

    def make(pair: Pair, measured: BehaviourRecord, _: Unfinished) -> CircuitRecord:
        return circuit_record(pair, measured, CircuitSettings(also, exhaustive), **options)

    return _instrument(pair, CircuitRecord, "circuit", make, lambda there: there.compared == compared, **options)


def repair(pair: Pair, *, seed: int = 0, say: Say | None = None) -> RepairRecord:
    """Repair the harmed cue, and write the repaired checkpoint beside the record; or read what is there.

    Raises InputError where nothing is harmed.
    """
    options = {"seed": seed, "say": say}

    def make(pair: Pair, measured: BehaviourRecord, parts: Unfinished) -> RepairRecord:
        there = kept(PatchingRecord, pair.records / "patching.json", provenance_of(pair, seed))
        return repair_record(pair, measured, RepairSettings(there, pair.made("repaired"), parts), **options)

    def complete(there: RepairRecord) -> bool:
        return there.checkpoint is None or pair.made("repaired").exists()

    return _instrument(pair, RepairRecord, "repair", make, complete, **options)


def graft(pair: Pair, *, exhaustive: bool = False, seed: int = 0, say: Say | None = None) -> GraftRecord:
    """Find which components of R carry the change, and write the checkpoint with S's selector; or read what is there.

    `exhaustive`: every component of a large model, too, and not only those in groups of layers that matter.
    """
    options = {"seed": seed, "say": say}

    def make(pair: Pair, measured: BehaviourRecord, parts: Unfinished) -> GraftRecord:
        return graft_record(pair, measured, GraftSettings(exhaustive, pair.made("rollback"), parts), **options)

    def complete(there: GraftRecord) -> bool:
        if exhaustive and there.search is not None and there.search.threshold > 0:
            return False
        return there.rollback is None or there.rollback.checkpoint is None or pair.made("rollback").exists()

    return _instrument(pair, GraftRecord, "graft", make, complete, **options)


def probe(pair: Pair, *, exhaustive: bool = False, seed: int = 0, say: Say | None = None) -> ProbingRecord:
    """Find what can be read where, what erasing it does, and which subspaces carry it; or read what is there.

    Patching says where the cue reader reads, and is done first. `exhaustive`: everything is probed, whatever that
    takes.
    """
    options = {"seed": seed, "say": say}

    def make(pair: Pair, measured: BehaviourRecord, parts: Unfinished) -> ProbingRecord:
        patching, why = _patched(pair, **options)
        heads = patching.heads("cue", "after") if patching else ()
        reader = heads or InputError(why or "patching found no cue reader")
        return probing_record(pair, measured, reader, ProbingSettings(exhaustive, seed, parts), say)

    return _instrument(
        pair, ProbingRecord, "probing", make, lambda there: there.exhaustive or not exhaustive, **options
    )


def _patched(pair: Pair, *, seed: int, say: Say | None) -> tuple[PatchingRecord | None, str]:
    """The patching of a pair, or why there is none: without a cue reader, everything else can still be measured."""
    try:
        return patch(pair, seed=seed, say=say), ""
    except InputError as error:
        return None, str(error)


def decompose(
    pair: Pair,
    *,
    saes: Sequence[Path] = (),
    more: Sequence[PromptRow] = (),
    seed: int = 0,
    say: Say | None = None,
) -> FeatureRecord:
    """Find SAE features and crosscoder latents that matter, beside neurons, heads and directions; or read what is
    there.

    Patching says where to look, and is done first. The SAEs of S are kept in `features/`, in SAELens' format; `saes`
    are folders of pretrained ones, which take their place. `more`: prompts beside those of the suite, to learn from.
    """
    if pair.after is not None:
        pretrained(pair, saes)  # what does not fit is said before anything is measured
    options = {"seed": seed, "say": say}
    folder = pair.out / "features"

    def probed() -> ProbingRecord | None:
        return kept(ProbingRecord, pair.records / "probing.json", provenance_of(pair, seed))

    def make(pair: Pair, measured: BehaviourRecord, _: Unfinished) -> FeatureRecord:
        patching, why = _patched(pair, **options)
        settings = FeatureSettings(
            folder, patching=patching, no_patching=why, probing=probed(), more=tuple(more), given=tuple(saes)
        )
        with held(folder, _waiting("features", say)):  # those of S are shared by all pairs of a run
            return feature_record(pair, measured, settings, **options)

    def complete(there: FeatureRecord) -> bool:
        kept = all(sae.folder is None or (folder / sae.folder).exists() for sae in there.saes)
        given = [sae.pretrained for sae in there.saes if sae.pretrained is not None]
        return kept and sorted(given) == sorted(map(str, saes)) and (there.probed or probed() is None)

    return _instrument(pair, FeatureRecord, "features", make, complete, **options)


def _instrument(
    pair: Pair,
    kind: type[Measured],
    name: str,
    make: Callable[[Pair, BehaviourRecord, Unfinished], Measured],
    current: Callable[[Measured], bool] = lambda _: True,
    *,
    seed: int,
    say: Say | None,
) -> Measured:
    """The record of an instrument that needs a pair and its behaviour: the one on disk if current, or made anew.

    What is measured on the way is kept in a folder beside the record until that is written: an instrument that was
    killed goes on from there, and so does one of which a part failed. Of two processes one waits for the other, and
    reads what that has written.
    """
    if pair.after is None:
        raise InputError(f"{name} needs a checkpoint after: give --after")
    if pair.device_map is not None:
        raise InputError("--device-map spreads a model over devices; hooks need it on one: give --device instead")
    expected = provenance_of(pair, seed)
    file, folder = pair.records / f"{name}.json", pair.records / f".{name}"

    def look() -> Measured | None:
        there = kept(kind, file, expected)
        return there if there is not None and current(there) and whole(there.missing) else None

    there = look()
    if there is not None and not list(pair.records.glob(f".{name}*")):
        return there
    check_writable(pair.records)
    measured = measure(pair, seed=seed, say=say)
    with held(folder, _waiting(name, say)):
        there = look()
        parts = Unfinished(folder, expected.model_dump_json())
        record = there or make(pair, measured, parts).model_copy(update={"provenance": expected})
        if there is None:
            record.save(file)
        if whole(record.missing):
            parts.done()
        else:
            parts.write()
    return record


def _waiting(name: str, say: Say | None) -> Callable[[], None]:
    return lambda: (say or (lambda _: None))(f"note: another process is at work on {name} there; this one waits for it")


def provenance_of(pair: Pair, seed: int) -> Provenance:
    """What a record about this pair, made now with this seed, says of where it comes from."""
    said = pair.suite.model_dump_json(exclude_defaults=True)
    if pair.completions is not None:
        said += pair.completions.digest
    digest = hashlib.sha256(said.encode()).hexdigest()[:16]
    return pair.provenance(seed, digest)


def kept(kind: type[R], file: Path, expected: Provenance) -> R | None:
    """The record in a file, if it is about the same weights, suite and seed, and of the same versions; else None."""
    if not file.is_file():
        return None
    try:
        there = kind.load(file)
    except InputError:
        return None  # written by another version: measure again
    return there if there.provenance.measures_as(expected) else None


def verdict(pair: Pair, *, seed: int = 0, say: Say | None = None) -> VerdictRecord:
    """Judge what changed in a pair, and write the verdict beside its other records.

    The mechanism is judged too, where grafts or features are there. Raises InputError for a pair without a checkpoint
    after.
    """
    if pair.after is None:
        raise InputError("a verdict needs a checkpoint after: give --after")
    measured = measure(pair, seed=seed, say=say)
    expected = provenance_of(pair, seed)
    record = judge(
        measured,
        graft=kept(GraftRecord, pair.records / "graft.json", expected),
        features=kept(FeatureRecord, pair.records / "features.json", expected),
    )
    record.save(pair.records / "verdict.json")
    return record


def report(
    pairs: Pair | Sequence[Pair],
    path: str | os.PathLike[str] | None = None,
    *,
    grown: Grown | None = None,
    seed: int = 0,
    say: Say | None = None,
) -> Path:
    """Write one page about a pair, or about several of one run, with all that has been measured of them; returns its
    path.

    It goes to `path`, by default `report.html` in the folder of the first; `grown`: how they were made, where that is
    known.
    """
    from mixturelens.pages import Grown, write_report

    several = [pairs] if isinstance(pairs, Pair) else list(pairs)
    found = _findings(several, seed, say)
    file = Path(path) if path is not None else several[0].out / "report.html"
    return write_report(file, found, grown or Grown(title=found[0].name))


def compare(
    left: str | os.PathLike[str], right: str | os.PathLike[str], out: str | os.PathLike[str] | None = None
) -> tuple[ComparisonRecord, Path]:
    """Compare what was measured in two output folders, by their records alone; the record, and the page about it.

    Both go to `out`, by default a folder of its own under artifacts/. Raises InputError where a folder has no verdict,
    or the two have no pair in common.
    """
    from mixturelens.pages import compare, write_comparison

    record = compare(Path(left), Path(right))
    named = "--against--".join(name.replace("/", "-") for name in (record.left, record.right))
    folder = Path("artifacts") / named if out is None else Path(out)
    record.save(folder / "comparison.json")
    return record, write_comparison(folder / "report.html", record)


def card(
    pairs: Pair | Sequence[Pair],
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    say: Say | None = None,
) -> Path:
    """Write a card that goes with a checkpoint: the verdicts in Markdown, with their records in its front matter."""
    from mixturelens.pages import write_card

    return write_card(Path(path), _findings([pairs] if isinstance(pairs, Pair) else pairs, seed, say))


def _findings(pairs: Sequence[Pair], seed: int, say: Say | None) -> list[Findings]:
    """What has been measured of each pair; its verdict is made where it is not there."""
    from mixturelens.pages import Findings

    found = []
    for pair in pairs:
        judged, expected = verdict(pair, seed=seed, say=say), provenance_of(pair, seed)
        found.append(
            Findings(
                name=pair.name,
                behaviour=measure(pair, seed=seed),
                verdict=judged,
                patching=kept(PatchingRecord, pair.records / "patching.json", expected),
                circuit=kept(CircuitRecord, pair.records / "circuit.json", expected),
                probing=kept(ProbingRecord, pair.records / "probing.json", expected),
                graft=kept(GraftRecord, pair.records / "graft.json", expected),
                features=kept(FeatureRecord, pair.records / "features.json", expected),
                repair=kept(RepairRecord, pair.records / "repair.json", expected),
            )
        )
    return found
