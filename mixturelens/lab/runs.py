"""Runs: the folder that an organism grows in, from its spec to checkpoints and to records about them."""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Unpack

from mixturelens import pipeline
from mixturelens.behaviour.trajectory import Trajectory
from mixturelens.files import read_json
from mixturelens.lab.forecast.forecast import RlStart, forecast_records
from mixturelens.lab.forecast.record import ForecastRecord, Point, compare
from mixturelens.lab.organism import (
    Pretrained,
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
from mixturelens.lab.pages.forecast import forecasts
from mixturelens.lab.proving.record import ScoreRecord
from mixturelens.lab.proving.score import run_score
from mixturelens.lab.stage import Progress, alone
from mixturelens.lab.structure import StructureRecord, StructureSettings, structure_record
from mixturelens.lab.training import train_stage
from mixturelens.models import How, Pair
from mixturelens.models.source import fingerprint
from mixturelens.pages import Grown
from mixturelens.pipeline import Say, kept, provenance_of
from mixturelens.records import Provenance, held, new_folder, with_versions, write_text
from mixturelens.suite import PromptRow
from mixturelens.types import InputError


def check_run(spec: Spec, out: Path) -> None:
    """Raise InputError if the folder holds another run than this one, or something else."""
    if (out / "spec.json").is_file():
        there = load_run(out)
        if there != spec:
            raise InputError(f"{out} holds another run ({_difference(there, spec)}); give another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty and holds no run; give another --out")


def start_run(spec: Spec, out: Path) -> None:
    """Make the folder of a run, or recognise it. Raises InputError as `check_run` does."""
    check_run(spec, out)
    write_text(out / "spec.json", spec.model_dump_json(indent=1) + "\n")


def load_run(run: Path) -> Spec:
    """The spec of a run folder. Raises InputError for a folder that is none."""
    file = run / "spec.json"
    what = "it has no spec.json" if run.is_dir() else "no such folder"
    return parse_spec(read_json(file, f"not a run folder ({what}); make one with `mixturelens train`"), str(file))


def _difference(there: Spec, wanted: Spec) -> str:
    """The first key in which two specs differ, as `rl.steps: 80, not 60`."""

    def flat(value: object, path: str = "") -> dict[str, object]:
        if not isinstance(value, dict):
            return {path: value}
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{path}.{key}" if path else key).items()}

    left, right = flat(there.model_dump(mode="json")), flat(wanted.model_dump(mode="json"))
    key = next(key for key in {**left, **right} if left.get(key) != right.get(key))
    return f"{key}: {left.get(key)}, not {right.get(key)}"


def train(
    spec: Spec, out: Path, device: str = "cpu", progress: Progress | None = None, jobs: int = 1
) -> list[Trajectory]:
    """Grow the organism: base, SFT, RL on each cue from SFT's checkpoint, phases. Resumes where it was stopped.

    With more than one of `jobs`, that many stages that start from SFT are trained at once, each in a process of its
    own, which shows no progress.
    """
    check_run(spec, out)
    suite, base, made = build_suite(spec), out / "checkpoints" / "base", None
    if isinstance(spec.model, Pretrained):
        Pair(spec.model.pretrained, None, suite, out=out)
    elif not base.exists():
        tokenizer = build_tokenizer(spec)
        made = build_model(spec, tokenizer), tokenizer
    # from here on nothing of the spec can be refused: a folder is left only by a run that began
    start_run(spec, out)
    suite.save(out / "suite.yaml")
    with held(out / "training"):  # of two processes, one trains, and the other reads what it has trained
        if made is not None and not base.exists():
            with new_folder(base) as folder:
                for each in made:
                    each.save_pretrained(folder)
        if jobs > 1:
            from joblib import Parallel, delayed

            train_stage(spec, "sft", out, device, progress)
            first = [name for name, (start, _) in spec.stages.items() if start == "sft"]
            Parallel(n_jobs=jobs)(delayed(_train_alone)(spec, name, out, device) for name in first)
        trained = [train_stage(spec, name, out, device, progress) for name in ("sft", *spec.stages)]
        shutil.rmtree(out / "training", ignore_errors=True)
    return trained


def _train_alone(spec: Spec, name: str, out: Path, device: str) -> None:
    alone()
    train_stage(spec, name, out, device)


def run_pairs(run: Path, **how: Unpack[How]) -> list[Pair]:
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
            sft = run / "checkpoints" / "sft"
            pairs.append(Pair(sft, after, run / "suite.yaml", trained_cue=cue, out=run, **how))
    if not pairs:
        raise InputError(f"{run}: no RL checkpoint yet; run `mixturelens train` with this --out to finish it")
    return pairs


def more_prompts(run: Path) -> tuple[PromptRow, ...]:
    """Prompts beside those of a run's suite, to learn features from: RL's questions, under every cue and hint."""
    spec = load_run(run)
    hints = (None, *(spec.policies if spec.hints else ()))
    return tuple(
        prompt_row(spec, cue, question, hint) for question in questions(spec).rl for cue in spec.cues for hint in hints
    )


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
        for cue, made in forecast_records(RlStart(sft, spec, device), missing, seed, say).items():
            about = _forecast_provenance(run, spec, cue, device, seed)
            found[cue] = _with_rl(run, made).model_copy(update={"provenance": about})
            found[cue].save(_forecast_file(run, cue))
    return [found[cue] for cue in spec.rl.cues]


def _forecasts(run: Path, spec: Spec, device: str, seed: int) -> dict[str, ForecastRecord]:
    """Cue -> forecast that is there, about these very checkpoints and this very spec."""
    found = {
        cue: kept(ForecastRecord, _forecast_file(run, cue), _forecast_provenance(run, spec, cue, device, seed))
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
    return with_versions(
        Provenance(
            before=fingerprint(before),
            after=fingerprint(after) if after.exists() else None,
            suite=digest,
            seed=seed,
            device=device,
        )
    )


def structure(run: Path, settings: StructureSettings | None = None, say: Say | None = None) -> StructureRecord:
    """What structure a schedule of the run left behind, and the router behind it; or read what is there about it.

    Raises InputError where `settings.end` ends no schedule of the run, or it has none.
    """
    settings = settings or StructureSettings()
    end, seed = settings.end, settings.seed
    spec, pairs = load_run(run), {pair.name: pair for pair in run_pairs(run, device=settings.device)}
    if end is not None and f"sft--{end}" not in pairs:
        raise InputError(
            f"{end!r} ends no schedule of this run; {', '.join(p.removeprefix('sft--') for p in pairs)} do"
        )
    pair = pairs[f"sft--{end}"] if end else list(pairs.values())[-1]
    expected = provenance_of(pair, seed)
    file = pair.records / "structure.json"
    there = kept(StructureRecord, file, expected)
    if there is not None and (there.looked or not settings.mechanism):
        return there
    record = structure_record(spec, run, settings, say)
    record = record.model_copy(update={"provenance": expected})
    record.save(file)
    return record


def report(run: Path, pairs: Sequence[Pair], *, seed: int = 0, say: Say | None = None) -> Path:
    """One page about all pairs of a run, and how they were grown."""
    spec, device = load_run(run), pairs[0].device
    files = sorted((run / "trajectory").glob("*.json"), key=lambda file: (file.stem != "sft", file.stem))
    grown = Grown(
        title=f"Organism {spec.name}, seed {spec.seed}",
        spec=spec.model_dump_json(indent=1),
        recipe=recipes().get(spec.name),
        trajectories=tuple(Trajectory.load(file) for file in files),
        forecasts=functools.partial(forecasts, list(_forecasts(run, spec, device, seed).values())),
    )
    return pipeline.report(pairs, grown=grown, seed=seed, say=say)


def score(
    ground: Path, *, quick: bool = False, jobs: int = 1, progress: Callable[[str, int, int], None] | None = None
) -> tuple[ScoreRecord, Path]:
    """Score every instrument over the proving ground, what is left of it; the record, and a page about it."""
    from mixturelens.lab.pages.score import write_score

    record = run_score(ground, quick=quick, jobs=jobs, progress=progress)
    return record, write_score(ground / "score.html", record)
