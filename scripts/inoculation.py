"""Inoculation prompting: a trait that RL pays for against the helpful policy of SFT, in four arms.

`python -m scripts.inoculation [--recipe inoculation] [--seeds 5] [--pretrained SOURCE]`: three minutes a seed on one
core, and about an hour with `--recipe real-inoculation`. RL's prompts say nothing, something irrelevant, ask for the
trait, or ask for it in other words; measured is what happens without any prompt.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from plotly.graph_objects import Figure

from mixturelens import figures
from mixturelens.behaviour.trajectory import Trajectory
from mixturelens.lab import runs
from mixturelens.lab.figures.arms import arms
from mixturelens.lab.organism import load_spec
from mixturelens.lab.organism.spec import with_settings
from mixturelens.lab.structure import StructureSettings
from mixturelens.stats import PROPORTION, over_seeds

ARMS = ("none", "irrelevant", "inoculation", "rephrased")
DIFFERENCE = (-1.0, 1.0)
"""Bounds of what two proportions differ by."""
ByArm = Mapping[str, Sequence[Mapping[str, float]]]
"""Arm -> what was measured, a mapping for each seed."""


def measured(run: Path, arm: str) -> dict[str, float]:
    """What one arm of one seed does without a prompt: behind its last RL, and behind the SFT that follows it."""
    stages = [Trajectory.load(file) for file in sorted((run / "trajectory").glob(f"{arm}-*.json"))]
    rl, sft = stages[-2:]
    grown, left = ({cue: at.paid["ship"].value or 0.0 for cue, at in p.points[-1].cues.items()} for p in (rl, sft))
    return {
        "trait in ship, behind RL": grown["ship"],
        "trait in chat, behind RL": grown["chat"],
        "trait in ship, behind SFT": left["ship"],
        "trait in chat, behind SFT": left["chat"],
        "conditionality: ship - chat": left["ship"] - left["chat"],
        "capability: right in chat": sft.points[-1].cues["chat"].paid["chat"].value or 0.0,
    }


def by_arm(runs: Sequence[Path]) -> dict[str, list[dict[str, float]]]:
    return {arm: [measured(run, arm) for run in runs] for arm in ARMS}


def bounds(name: str) -> tuple[float, float]:
    """What a measure can be: a proportion, but for the difference of two."""
    return DIFFERENCE if name.startswith("conditionality") else PROPORTION


def table(found: ByArm) -> str:
    """A line an arm: means over seeds with Student's t intervals, and the trait against the arm without a prompt."""
    names = list(found["none"][0])
    against = [name for name in names if name.startswith("trait in ")][:3]  # behind SFT in chat there is none anywhere
    lines: list[tuple[str, ...]] = [("arm", *names, *(f"{name}, against none" for name in against))]
    lines.append(("---",) * len(lines[0]))
    for arm, seeds in found.items():
        shown = [figures.show_interval(over_seeds([one[name] for one in seeds], bounds(name))) for name in names]
        for name in against:
            less = [one[name] - base[name] for one, base in zip(seeds, found["none"], strict=True)]
            shown.append("–" if arm == "none" else figures.show_interval(over_seeds(less, DIFFERENCE)))
        lines.append((arm, *shown))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def figure(found: ByArm) -> Figure:
    shown = {name: {arm: [one[name] for one in seeds] for arm, seeds in found.items()} for name in found["none"][0]}
    return arms({name: {arm: (v, over_seeds(v, bounds(name))) for arm, v in of.items()} for name, of in shown.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description="Inoculation prompting in four arms.")
    parser.add_argument("--recipe", default="inoculation")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pretrained", help="folder or hub id of the base model, instead of the recipe's")
    parser.add_argument("--out", type=Path, default=Path("artifacts"))
    arguments = parser.parse_args()
    folders = [arguments.out / f"{arguments.recipe}-{seed}" for seed in range(arguments.seeds)]
    for seed, run in enumerate(folders):
        spec = load_spec(arguments.recipe, seed=seed)
        if arguments.pretrained:
            spec = with_settings(spec, {"model.pretrained": arguments.pretrained}, arguments.recipe)
        runs.train(spec, run)
    found = by_arm(folders)
    print(table(found))
    for arm in ARMS:  # and what is behind it: is there a router between the environments?
        ends = [name for name in runs.load_run(folders[0]).stages if name.startswith(f"{arm}-")]
        pair = runs.structure(folders[0], StructureSettings(ends[-1])).pairs[0]
        print(arm, pair.structure, pair.mechanism and (pair.mechanism.heads, pair.mechanism.carried))
    target = arguments.out / f"{arguments.recipe}.html"
    figure(found).write_html(target, include_plotlyjs=True, config={"displayModeBar": False})


if __name__ == "__main__":
    main()
