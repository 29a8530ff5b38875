"""The steps in order, resuming from what is on disk: spec -> checkpoints -> records -> report.

Every step reads what the step before wrote, so each can be run again alone. A step whose result is there, made from the
same weights, suite and seed, is not done again.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mixturelens.behaviour.forecast import ForecastRecord, Point, compare, forecast_records
from mixturelens.behaviour.pair import behaviour_record
from mixturelens.behaviour.record import BehaviourRecord
from mixturelens.discovery.asked import Asked, read_prompts
from mixturelens.discovery.draws import draw, stored
from mixturelens.discovery.judge import Judge
from mixturelens.discovery.propose import Proposal, check_suite, heard, propose, refine, save_suite
from mixturelens.discovery.record import DiscoveryRecord
from mixturelens.features.pair import feature_record, pretrained
from mixturelens.features.record import FeatureRecord
from mixturelens.grafting.pair import graft_record
from mixturelens.grafting.record import GraftRecord
from mixturelens.models import Budget, Pair, Source, open_pair
from mixturelens.models.source import fingerprint
from mixturelens.organism import (
    ModelSpec,
    Spec,
    build_model,
    build_suite,
    build_tokenizer,
    parse_spec,
    prompt_row,
    questions,
    recipes,
    safe_name,
)
from mixturelens.patching.pair import patching_record
from mixturelens.patching.record import PatchingRecord
from mixturelens.probing.pair import probing_record
from mixturelens.probing.record import ProbingRecord
from mixturelens.proving.record import ScoreRecord
from mixturelens.proving.score import run_score
from mixturelens.records import Provenance, Record, new_folder, provenance, write_text
from mixturelens.routing.circuit import CircuitRecord, circuit_record
from mixturelens.routing.repair import RepairRecord, repair_record
from mixturelens.routing.structure import StructureRecord, structure_record
from mixturelens.routing.verdict import VerdictRecord, judge
from mixturelens.suite import PromptRow, Suite, load_suite
from mixturelens.training import Progress, Trajectory, train_stage
from mixturelens.types import InputError

Say = Callable[[str], None]
R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Case:
    """A pair, and where the records about it go."""

    pair: Pair
    suite_path: Path
    out: Path

    @property
    def name(self) -> str:
        return self.pair.name

    @property
    def suite(self) -> Suite:
        return self.pair.suite

    @property
    def records(self) -> Path:
        return self.out / "records" / self.name

    def made(self, what: str) -> Path:
        """Where a checkpoint made from R goes: beside the run's others, or into the outside pair's folder."""
        after = self.pair.after
        if after is not None and after.folder.parent == self.out / "checkpoints":
            return self.out / "checkpoints" / f"{after.name}-{what}"
        return self.out / what

    @property
    def repaired(self) -> Path:
        return self.made("repaired")


def start_run(spec: Spec, out: Path) -> None:
    """Make the folder of a run, or recognise it. Raises InputError if it holds another run or something else."""
    file = out / "spec.json"
    if file.is_file():
        there = load_run(out)
        if there != spec:
            raise InputError(f"{out} holds another run ({_difference(there, spec)}); give another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty and holds no run; give another --out")
    else:
        write_text(file, spec.model_dump_json(indent=1) + "\n")


def load_run(run: Path) -> Spec:
    """The spec of a run folder."""
    try:
        data = json.loads((run / "spec.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "it has no spec.json" if run.is_dir() else "no such folder"
        raise InputError(f"{run}: not a run folder ({what}); make one with `mixturelens train`") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{run / 'spec.json'}: not JSON ({error})") from None
    return parse_spec(data, str(run / "spec.json"))


def _difference(there: Spec, wanted: Spec) -> str:
    """The first key in which two specs differ, as `rl.steps: 80, not 60`."""

    def flat(value: object, path: str = "") -> dict[str, object]:
        if not isinstance(value, dict):
            return {path: value}
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{path}.{key}" if path else key).items()}

    left, right = flat(there.model_dump(mode="json")), flat(wanted.model_dump(mode="json"))
    key = next(key for key in {**left, **right} if left.get(key) != right.get(key))
    return f"{key}: {left.get(key)}, not {right.get(key)}"


def train(spec: Spec, out: Path, device: str = "cpu", progress: Progress | None = None) -> list[Trajectory]:
    """Grow the organism: base, SFT, RL on each cue from SFT's checkpoint, phases. Resumes where it was stopped."""
    start_run(spec, out)
    build_suite(spec).save(out / "suite.yaml")
    base = out / "checkpoints" / "base"
    if isinstance(spec.model, ModelSpec) and not base.exists():
        tokenizer = build_tokenizer(spec)
        model = build_model(spec, tokenizer)
        with new_folder(base) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return [train_stage(spec, name, out, device, progress) for name in ("sft", *spec.stages)]


def run_pairs(run: Path, *, device: str = "cpu", dtype: str = "float32", budget: Budget | None = None) -> list[Case]:
    """The pairs of a run: before, SFT; after, where training ended: RL on each cue, and phases that no other follows.

    Raises InputError if none has been trained.
    """
    spec = load_run(run)
    started = {start for start, _ in spec.stages.values()}
    pairs = []
    for name, (_, phase) in spec.stages.items():
        after = run / "checkpoints" / name
        if after.exists() and (name not in started or name not in spec.phases):
            cue = phase.cues[0] if phase.train == "rl" and len(phase.cues) == 1 else None
            suite = _suite(run / "suite.yaml", cue)
            pair = open_pair(run / "checkpoints" / "sft", after, suite, device=device, dtype=dtype, budget=budget)
            pairs.append(Case(pair, run / "suite.yaml", run))
    if not pairs:
        raise InputError(f"{run}: no RL checkpoint yet; run `mixturelens train` with this --out to finish it")
    return pairs


def outside_pair(
    before: str | Path | Source,
    after: str | Path | Source | None,
    suite: Path,
    out: Path | None = None,
    trained_cue: str | None = None,
    *,
    base: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    device_map: str | None = None,
    budget: Budget | None = None,
) -> Case:
    """Checkpoints trained elsewhere. Records go to `artifacts/<before>--<after>` unless `out` says otherwise."""
    loaded = _suite(suite, trained_cue)
    pair = open_pair(before, after, loaded, base=base, device=device, dtype=dtype, device_map=device_map, budget=budget)
    return Case(pair, suite, out or Path("artifacts") / pair.name)


def discover(
    before: str | Path,
    after: str | Path,
    prompts: Path,
    out: Path | None = None,
    *,
    samples: int = 8,
    max_new_tokens: int = 64,
    chat: bool = False,
    base: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    judge: Callable[[Path], Judge] | None = None,
    judged_by: str = "",
    progress: Callable[[int, int], None] | None = None,
    say: Say | None = None,
) -> tuple[DiscoveryRecord, Path]:
    """Propose a suite from prompts alone: policies, behaviours and cue. Returns the record, and where results went.

    `judge` makes one that may keep its answers in a folder; how often it agrees with the rules is in the record.

    Writes `completions/`, `discover.json`, the page `discover.html`, and, where something was found, `suite.yaml`
    with its `prompts.jsonl`.
    """
    asked = read_prompts(prompts, chat=chat, max_new_tokens=max_new_tokens)
    pair = open_pair(before, after, asked.suite, base=base, device=device, dtype=dtype)
    folder = out or Path("artifacts") / f"discovered-{pair.name}"
    if (folder / "prompts.jsonl").resolve() == prompts.resolve():
        raise InputError(f"--out {folder}: the prompts of the proposed suite would be written over {prompts}")
    draws = draw(pair, asked, samples, folder, seed, progress or (lambda *_: None), say or (lambda _: None))
    digest = hashlib.sha256(asked.suite.model_dump_json(exclude_defaults=True).encode()).hexdigest()[:16]
    proposal = propose(asked, draws, seed, pair.provenance(seed, digest))
    if judge is not None:
        proposal = heard(asked, proposal, judge(folder / "judged"), judged_by, seed)
    check_suite(proposal, folder)
    _write_discovery(folder, "discover", asked, proposal)
    if proposal.suite is not None:
        save_suite(proposal, folder)
    return proposal.record, folder


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
    from mixturelens.report.discovered import write_discovered

    proposal.record.save(folder / f"{name}.json")
    made = proposal.record.provenance
    pair = " and ".join(str(name).split("@")[0] for name in (made.before, made.after))
    write_discovered(folder / f"{name}.html", asked, proposal, f"What completions of {pair} show")


def _suite(path: Path, trained_cue: str | None) -> Suite:
    suite = load_suite(path)
    if trained_cue is None:
        return suite
    if trained_cue not in suite.cues:
        raise InputError(f"{path}: no prompt has the trained cue {trained_cue!r}")
    return suite.model_copy(update={"trained_cue": trained_cue})


def behaviour(case: Case, *, seed: int = 0, say: Say | None = None) -> BehaviourRecord:
    """Measure a pair, or read the record if it is there and about the same weights, suite and seed."""
    expected = _provenance(case, seed)
    file = case.records / "behaviour.json"
    there = _same(BehaviourRecord, file, expected)
    if there is not None:
        return there
    record = behaviour_record(case.pair, suite_name=expected.suite, seed=seed, progress=say)
    record.save(file)
    return record


def patch(case: Case, *, exhaustive: bool = False, seed: int = 0, say: Say | None = None) -> PatchingRecord:
    """Where the router is: patch a pair, or read the record if it is there and about the same things."""
    options = {"seed": seed, "say": say}
    make = functools.partial(patching_record, exhaustive=exhaustive, **options)
    return _instrument(
        case, PatchingRecord, "patching", make, lambda there: there.exhaustive or not exhaustive, **options
    )


def circuit(
    case: Case,
    others: Sequence[Case] = (),
    *,
    exhaustive: bool = False,
    seed: int = 0,
    say: Say | None = None,
) -> CircuitRecord:
    """The routing circuits of a pair, compared with those of the other checkpoints of its run."""
    options = {"seed": seed, "say": say}
    also = {o.pair.after.name: o.pair for o in others if o.pair.after is not None and o.pair.after != case.pair.after}
    compared = tuple(fingerprint(o.after) for o in also.values() if o.after is not None)
    make = functools.partial(circuit_record, also=also, exhaustive=exhaustive, **options)
    return _instrument(case, CircuitRecord, "circuit", make, lambda there: there.compared == compared, **options)


def repair(case: Case, *, seed: int = 0, say: Say | None = None) -> RepairRecord:
    """Repair the harmed cue, beside it the repaired plain checkpoint; or read what is there about the same things."""
    options = {"seed": seed, "say": say}

    def make(pair: Pair, measured: BehaviourRecord) -> RepairRecord:
        there = _same(PatchingRecord, case.records / "patching.json", _provenance(case, seed))
        return repair_record(pair, measured, patching=there, save_to=case.repaired, **options)

    def whole(there: RepairRecord) -> bool:
        return there.checkpoint is None or case.repaired.exists()

    return _instrument(case, RepairRecord, "repair", make, whole, **options)


def graft(case: Case, *, exhaustive: bool = False, seed: int = 0, say: Say | None = None) -> GraftRecord:
    """Which components of R carry the change, beside it the checkpoint with S's selector; or read what is there.

    `exhaustive`: every component of a large model, too, and not only those in groups of layers that matter.
    """
    options = {"seed": seed, "say": say}
    make = functools.partial(graft_record, exhaustive=exhaustive, save_to=case.made("rollback"), **options)

    def whole(there: GraftRecord) -> bool:
        if exhaustive and there.search is not None and there.search.threshold > 0:
            return False
        return there.rollback is None or there.rollback.checkpoint is None or case.made("rollback").exists()

    return _instrument(case, GraftRecord, "graft", make, whole, **options)


def probe(case: Case, *, exhaustive: bool = False, seed: int = 0, say: Say | None = None) -> ProbingRecord:
    """What can be read where, what erasing it does, and which subspaces carry it; or read what is there.

    Patching says where the cue reader reads, and is done first. `exhaustive`: everywhere, whatever it takes.
    """
    options = {"seed": seed, "say": say}

    def make(pair: Pair, measured: BehaviourRecord) -> ProbingRecord:
        patching, why = _patched(case, **options)
        heads = patching.heads("cue", "after") if patching else ()
        if patching and not heads:
            why = "patching found no cue reader"
        return probing_record(
            pair, measured, reader=heads, no_reader=why, exhaustive=exhaustive, folder=case.out, **options
        )

    return _instrument(
        case, ProbingRecord, "probing", make, lambda there: there.exhaustive or not exhaustive, **options
    )


def _patched(case: Case, *, seed: int, say: Say | None) -> tuple[PatchingRecord | None, str]:
    """The patching of a pair, or why there is none: without a cue reader, everything else can still be measured."""
    try:
        return patch(case, seed=seed, say=say), ""
    except InputError as error:
        return None, str(error)


def features(case: Case, *, saes: Sequence[Path] = (), seed: int = 0, say: Say | None = None) -> FeatureRecord:
    """SAE features and crosscoder latents beside neurons, heads and directions; or read what is there.

    Patching says where to look, and is done first. The SAEs of S are kept in `features/`, in SAELens' format; `saes`:
    folders of pretrained ones, which take their place.
    """
    if case.pair.after is not None:
        pretrained(case.pair, saes)  # what does not fit is said before anything is measured
    options = {"seed": seed, "say": say}
    folder = case.out / "features"

    def probed() -> ProbingRecord | None:
        return _same(ProbingRecord, case.records / "probing.json", _provenance(case, seed))

    def make(pair: Pair, measured: BehaviourRecord) -> FeatureRecord:
        patching, why = _patched(case, **options)
        return feature_record(
            pair,
            measured,
            patching,
            no_patching=why,
            probing=probed(),
            more=_more_prompts(case),
            folder=folder,
            given=saes,
            **options,
        )

    def whole(there: FeatureRecord) -> bool:
        kept = all(sae.folder is None or (folder / sae.folder).exists() for sae in there.saes)
        given = [sae.pretrained for sae in there.saes if sae.pretrained is not None]
        return kept and sorted(given) == sorted(map(str, saes)) and (there.probed or probed() is None)

    return _instrument(case, FeatureRecord, "features", make, whole, **options)


def _more_prompts(case: Case) -> tuple[PromptRow, ...]:
    """Prompts of a run beside those of its suite, to learn features from: RL's questions, under every cue and hint."""
    if not (case.out / "spec.json").is_file():
        return ()
    spec = load_run(case.out)
    hints = (None, *(spec.policies if spec.hints else ()))
    return tuple(
        prompt_row(spec, cue, question, hint) for question in questions(spec).rl for cue in spec.cues for hint in hints
    )


def _instrument(
    case: Case,
    kind: type[R],
    name: str,
    make: Callable[[Pair, BehaviourRecord], R],
    current: Callable[[R], bool] = lambda _: True,
    *,
    seed: int,
    say: Say | None,
) -> R:
    """The record of an instrument that needs a pair and its behaviour: the one on disk if current, or made anew."""
    if case.pair.after is None:
        raise InputError(f"{name} needs a checkpoint after: give --after")
    if case.pair.device_map is not None:
        raise InputError("--device-map spreads a model over devices; hooks need it on one: give --device instead")
    expected = _provenance(case, seed)
    file = case.records / f"{name}.json"
    there = _same(kind, file, expected)
    if there is not None and current(there):
        return there
    measured = behaviour(case, seed=seed, say=say)
    record = make(case.pair, measured).model_copy(update={"provenance": expected})
    record.save(file)
    return record


def _provenance(case: Case, seed: int) -> Provenance:
    said = case.suite.model_dump_json(exclude_defaults=True)
    digest = hashlib.sha256(said.encode()).hexdigest()[:16]
    return case.pair.provenance(seed, digest)


def _same(kind: type[R], file: Path, expected: Provenance) -> R | None:
    """The record in a file, if it is about the same weights, suite and seed, and made by the same versions."""
    if not file.is_file():
        return None
    try:
        there = kind.load(file)
    except InputError:
        return None  # written by another version: measure again
    return there if there.provenance == expected else None


def verdict(case: Case, *, seed: int = 0, say: Say | None = None) -> VerdictRecord:
    """The verdict on a pair, written beside its behaviour record; with the mechanism's, where grafts have been made."""
    if case.pair.after is None:
        raise InputError("a verdict needs a checkpoint after: give --after")
    measured = behaviour(case, seed=seed, say=say)
    expected = _provenance(case, seed)
    record = judge(
        measured,
        graft=_same(GraftRecord, case.records / "graft.json", expected),
        features=_same(FeatureRecord, case.records / "features.json", expected),
    )
    record.save(case.records / "verdict.json")
    return record


def forecast(run: Path, *, device: str = "cpu", seed: int = 0, say: Say | None = None) -> list[ForecastRecord]:
    """What RL on each cue will do, from SFT and the reward alone; where it is done, against what it did."""
    spec, sft = load_run(run), run / "checkpoints" / "sft"
    if not sft.exists():
        raise InputError(f"{run}: no SFT checkpoint yet; run `mixturelens train` with this --out to finish it")
    if not spec.rl.cues:
        raise InputError(f"{run}: its spec trains on no cue (rl.cues), so there is nothing to forecast")
    found = _forecasts(run, spec, device, seed)
    missing = [cue for cue in spec.rl.cues if cue not in found]
    if missing:
        for cue, made in forecast_records(sft, spec, missing, device=device, seed=seed, say=say).items():
            about = _forecast_provenance(run, spec, cue, device, seed)
            found[cue] = _with_rl(run, made).model_copy(update={"provenance": about})
            found[cue].save(_forecast_file(run, cue))
    return [found[cue] for cue in spec.rl.cues]


def _forecasts(run: Path, spec: Spec, device: str, seed: int) -> dict[str, ForecastRecord]:
    """Cue -> forecast that is there, about these very checkpoints and this very spec."""
    found = {
        cue: _same(ForecastRecord, _forecast_file(run, cue), _forecast_provenance(run, spec, cue, device, seed))
        for cue in spec.rl.cues
    }
    return {cue: record for cue, record in found.items() if record is not None}


def _forecast_file(run: Path, cue: str) -> Path:
    return run / "records" / f"forecast-{safe_name(cue)}.json"


def _with_rl(run: Path, record: ForecastRecord) -> ForecastRecord:
    """The forecast against the trajectory of RL, once that is there."""
    file = run / "trajectory" / f"rl-{safe_name(record.trained_cue)}.json"
    if not file.is_file():
        return record
    points = Trajectory.load(file).points
    return compare(
        record,
        [
            Point(
                step=point.step,
                accuracy={cue: state.accuracy for cue, state in point.cues.items()},
                forced={cue: state.forced for cue, state in point.cues.items()},
            )
            for point in points
        ],
    )


def _forecast_provenance(run: Path, spec: Spec, cue: str, device: str, seed: int) -> Provenance:
    """Of S, of what RL made of it if it has, and of the spec, which holds rate and reward."""
    after = run / "checkpoints" / f"rl-{safe_name(cue)}"
    digest = hashlib.sha256(spec.model_dump_json().encode()).hexdigest()[:16]
    before = run / "checkpoints" / "sft"
    return provenance(
        before=fingerprint(before),
        after=fingerprint(after) if after.exists() else None,
        suite=digest,
        seed=seed,
        device=device,
    )


def structure(
    run: Path,
    end: str | None = None,
    *,
    mechanism: bool = True,
    device: str = "cpu",
    seed: int = 0,
    say: Say | None = None,
) -> StructureRecord:
    """What structure a schedule of the run left behind, and the router behind it; or read what is there about it.

    The schedule ends in the phase `end`, which no other follows; by default in the last one.
    """
    spec, pairs = load_run(run), {case.name: case for case in run_pairs(run, device=device)}
    if end is not None and f"sft--{end}" not in pairs:
        raise InputError(
            f"{end!r} ends no schedule of this run; {', '.join(p.removeprefix('sft--') for p in pairs)} do"
        )
    case = pairs[f"sft--{end}"] if end else list(pairs.values())[-1]
    expected = _provenance(case, seed)
    file = case.records / "structure.json"
    there = _same(StructureRecord, file, expected)
    if there is not None and (there.looked or not mechanism):
        return there
    record = structure_record(spec, run, end, mechanism=mechanism, device=device, seed=seed, say=say)
    record = record.model_copy(update={"provenance": expected})
    record.save(file)
    return record


def report(cases: list[Case], *, seed: int = 0, say: Say | None = None) -> Path:
    """One page about all pairs of a run, or about one outside pair."""
    from mixturelens.report import write_report

    out = cases[0].out
    measured = []
    for case in cases:
        judged = verdict(case, seed=seed, say=say)
        measured.append((case.name, behaviour(case, seed=seed), judged))
    is_run = (out / "spec.json").is_file()
    spec = load_run(out) if is_run else None
    files = sorted((out / "trajectory").glob("*.json"), key=lambda file: (file.stem != "sft", file.stem))
    return write_report(
        out / "report.html",
        title=f"Organism {spec.name}, seed {spec.seed}" if spec else cases[0].name,
        spec_text=spec.model_dump_json(indent=1) if spec else None,
        recipe_note=recipes().get(spec.name) if spec else None,
        pairs=measured,
        trajectories=[Trajectory.load(file) for file in files],
        patching=_there(cases, PatchingRecord, "patching", seed),
        probing=_there(cases, ProbingRecord, "probing", seed),
        grafts=_there(cases, GraftRecord, "graft", seed),
        features=_there(cases, FeatureRecord, "features", seed),
        repair=_there(cases, RepairRecord, "repair", seed),
        circuits=_there(cases, CircuitRecord, "circuit", seed),
        forecasts=list(_forecasts(out, spec, cases[0].pair.device, seed).values()) if spec else [],
    )


def score(
    ground: Path, *, quick: bool = False, jobs: int = 1, progress: Callable[[str, int, int], None] | None = None
) -> tuple[ScoreRecord, Path]:
    """Score every instrument over the proving ground, what is left of it; the record, and a page about it."""
    from mixturelens.report.score import write_score

    record = run_score(ground, quick=quick, jobs=jobs, progress=progress)
    return record, write_score(ground / "score.html", record)


def _there(cases: list[Case], kind: type[R], name: str, seed: int) -> dict[str, R]:
    """Records of an instrument that has been run on these very pairs."""
    found = {case.name: _same(kind, case.records / f"{name}.json", _provenance(case, seed)) for case in cases}
    return {name: record for name, record in found.items() if record is not None}
