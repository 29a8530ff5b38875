"""Write what runs on pretrained models say: `python scripts/real_page.py`.

The records lie in artifacts/real/<recipe>-<seed>/, as a run has them. `--collect RUN ...` takes those of finished runs
first; `--adapters RUN ...` takes the adapters of S and of the first R, too, so that a pair can be measured again.
Written are the blocks of artifacts/real/README.md and, where chromium is there to draw them, the figures beside it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from plotly.graph_objects import Figure

from mixturelens import figures
from mixturelens.behaviour.record import BehaviourRecord
from mixturelens.behaviour.trajectory import Trajectory
from mixturelens.figures import show, show_interval
from mixturelens.figures.transfer import overall, silent
from mixturelens.lab import runs
from mixturelens.lab.forecast.record import ANSWERS, ForecastRecord
from mixturelens.records import write_text
from mixturelens.routing.repair import RepairRecord
from mixturelens.routing.verdict import VerdictRecord
from scripts import inoculation
from scripts.run_notebooks import CHROMIUM, picture
from scripts.seed_tables import ROOT, put

REAL = ROOT / "artifacts" / "real"
PAGE = REAL / "README.md"
HUB = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct", "gemma3": "google/gemma-3-270m"}
"""What a local folder of these weights is on the hub."""


def collect(run: Path, adapters: bool) -> None:
    spec = runs.load_run(run)
    target = REAL / f"{spec.name}-{spec.seed}"
    for name in ("suite.yaml", "prompts.jsonl"):
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(run / name, target)
    data = json.loads((run / "spec.json").read_text(encoding="utf-8"))
    local = data["model"]["pretrained"]
    data["model"]["pretrained"] = HUB.get(Path(local).name, local)
    write_text(target / "spec.json", json.dumps(data, indent=1) + "\n")
    for folder in ("trajectory", "records"):
        if (run / folder).is_dir():  # of arms, no pair need have been judged
            shutil.copytree(run / folder, target / folder, dirs_exist_ok=True)
    for name in ("sft", next(iter(spec.stages))) if adapters else ():
        checkpoint = run / "checkpoints" / name
        there = target / "checkpoints" / name
        there.mkdir(parents=True, exist_ok=True)
        shutil.copy(checkpoint / "adapter_model.safetensors", there)
        config = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = data["model"]["pretrained"]
        write_text(there / "adapter_config.json", json.dumps(config, indent=1) + "\n")


class Pair:
    """The records of one pair of a run."""

    def __init__(self, run: Path, name: str) -> None:
        self.run, self.stage = run, name.split("--")[-1]
        folder = run / "records" / name
        self.behaviour = BehaviourRecord.load(folder / "behaviour.json")
        self.verdict = VerdictRecord.load(folder / "verdict.json")
        repair = folder / "repair.json"
        self.repair = RepairRecord.load(repair) if repair.is_file() else None
        self.trajectory = Trajectory.load(run / "trajectory" / f"{self.stage}.json")

    @property
    def label(self) -> str:
        return f"{self.run.name}, {self.stage}"


def collected() -> list[Pair]:
    return [
        Pair(run, folder.name)
        for run in sorted(REAL.iterdir())
        if (run / "spec.json").is_file()
        for folder in sorted((run / "records").glob("*"))
        if (folder / "verdict.json").is_file()
    ]


HEAD = (
    "run, stage",
    "RL steps",
    "trained cue",
    "other cue",
    "silent policy, put in place",
    "verdict",
    "share",
    "repair",
)


def table(pairs: list[Pair]) -> str:
    """A line a pair: expected accuracy before -> after, and whose doing it was."""
    lines = [HEAD, ("---",) * len(HEAD)]
    for pair in pairs:
        trained = pair.behaviour.trained_cue
        others = [cue for cue in pair.behaviour.cues if cue != trained]

        def moved(cue: str, pair: Pair = pair) -> str:
            before = pair.verdict.per_cue[cue].before.overall
            return f"{cue}: {show(before)} -> {show_interval(overall(pair.verdict, cue), 4)}"

        best = None if pair.repair is None else pair.repair.best
        lines.append(
            (
                pair.label,
                str(pair.trajectory.steps),
                moved(trained) if trained else "none",
                "; ".join(map(moved, others)),
                "; ".join(show_interval(silent(pair.verdict, cue), 4) for cue in others),
                pair.verdict.verdict,
                show_interval(pair.verdict.routing_share),
                "not run" if best is None else f"{best.kind}: {show_interval(best.accuracy[others[0]])}",
            )
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


CELLS = ("run, stage", "cue", "policy put in place", "accuracy before", "after", "change", "usual behaviour, change")


def cells(pairs: list[Pair]) -> str:
    """Every cell of every policy table."""
    lines = [CELLS, ("---",) * len(CELLS)]
    for pair in pairs:
        for cell in pair.behaviour.table:
            lines.append(
                (
                    pair.label,
                    cell.cue,
                    f"{cell.policy} (`{cell.announcement}`)" if cell.announcement else cell.policy,
                    show(cell.accuracy_before, 4),
                    show(cell.accuracy_after, 4),
                    show_interval(cell.accuracy_change, 4),
                    f"{cell.behaviour}: {show_interval(cell.behaviour_change, 4)}",
                )
            )
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


FORECASTS = ("run, RL on", "cue", "measured", *ANSWERS, "in time", "in the interval")


def forecasts() -> str:
    """A line a cue: mean errors of what is said before RL, at the steps that tell, and of the trained cue in time."""
    lines = [FORECASTS, ("---",) * len(FORECASTS)]
    for file in sorted(REAL.glob("*/records/forecast-*.json")):
        record = ForecastRecord.load(file)
        happened, trained = record.happened, record.trained_cue
        if happened is None or not happened.compared:
            continue
        points = [point.accuracy for point in happened.points if point.step in happened.compared]
        for cue, score in happened.scores.items():
            seen = "; ".join(f"{show(at[cue].value)} where {trained} is at {show(at[trained].value)}" for at in points)
            errors = [show(score.errors[name]) for name in ANSWERS]
            in_time = show(happened.clock.errors["forecast"])
            covered = f"{show(score.covered)}, in time {show(happened.clock.covered)}"
            lines.append((f"{file.parents[1].name}, {trained}", cue, seen, *errors, in_time, covered))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write what runs on pretrained models say.")
    parser.add_argument("--collect", nargs="*", type=Path, default=[], metavar="RUN")
    parser.add_argument("--adapters", nargs="*", type=Path, default=[], metavar="RUN")
    arguments = parser.parse_args()
    for run in arguments.collect:
        collect(run, adapters=False)
    for run in arguments.adapters:
        collect(run, adapters=True)
    pairs = collected()
    put("pairs", table(pairs), "real_page", PAGE)
    put("cells", cells(pairs), "real_page", PAGE)
    put("forecasts", forecasts(), "real_page", PAGE)
    for pair in pairs:
        if pair.trajectory.reward:
            figure = figures.accuracy_along_rl(pair.trajectory, pair.behaviour.trained_cue, pair.repair)
            draw(figure, pair.label.replace(", ", "--"))
    arms = sorted(REAL.glob("real-inoculation-*"))
    if arms:
        found = inoculation.by_arm(arms)
        put("arms", inoculation.table(found), "real_page", PAGE)
        draw(inoculation.figure(found), "real-inoculation")


def draw(figure: Figure, name: str) -> None:
    """The figure as PNG beside the page, where chromium is there to draw it."""
    chromium = next((there for each in CHROMIUM if (there := shutil.which(each))), None)
    if chromium is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        drawn = picture(json.loads(str(figure.to_json())), chromium, Path(folder) / "figure")
    if drawn is not None:
        (REAL / f"{name}.png").write_bytes(drawn)


if __name__ == "__main__":
    main()
