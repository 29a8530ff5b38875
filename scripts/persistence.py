# %% [markdown]
# # Persistence: what brings a harmed cue back, and what it costs when the cue goes on shifting
#
# `python scripts/persistence.py [--seeds 3]`: four minutes a seed on one core. RL on A has driven B to zero. How many
# steps of SFT or RL on B bring it back, against an organism that was never taught B? How much does SFT on the base
# mixture restore, by length and order? And when RL follows a tag that shifts, what does each round cost?

# %%
import argparse
from pathlib import Path

from mixturelens import figures
from mixturelens.behaviour.trajectory import Trajectory
from mixturelens.lab import runs
from mixturelens.lab.figures.arms import arms
from mixturelens.lab.organism import load_spec
from mixturelens.stats import over_seeds

BACK = 0.9
parser = argparse.ArgumentParser(description="What brings a harmed cue back, and what shifts of the cue cost.")
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--out", type=Path, default=Path("artifacts"), help="runs go to OUT/<recipe>-<seed>")
arguments = parser.parse_args()


def stage(recipe: str, seed: int, name: str) -> Trajectory:
    return Trajectory.load(arguments.out / f"{recipe}-{seed}" / "trajectory" / f"{name}.json")


def steps(recipe: str, name: str, cue: str) -> list[float]:
    """Steps of the stage until the cue is back; where it never is, all that there were."""
    found = [(stage(recipe, seed, name), cue) for seed in range(arguments.seeds)]
    return [float(at.steps) if (n := at.steps_to(cue, BACK)) is None else n for at, cue in found]


def accuracy(name: str, cue: str) -> list[float]:
    ends = [stage("revival", seed, name).points[-1].cues[cue].accuracy.value for seed in range(arguments.seeds)]
    return [value or 0.0 for value in ends]


# %%
for recipe in ("revival", "never", "shifts"):
    for seed in range(arguments.seeds):
        runs.train(load_spec(recipe, seed=seed), arguments.out / f"{recipe}-{seed}")

found = {
    f"{kind.upper()} steps on B until {BACK}": {who: steps(recipe, f"{kind}-again", "B") for recipe, who in WHO}
    for WHO in [(("revival", "after RL on A"), ("never", "never taught"))]
    for kind in ("sft", "rl")
}
lengths = {f"{n} steps": accuracy(f"mixture-{n}", "B") for n in (10, 40, 160)}
found["B behind SFT on the mixture"] = lengths
orders = {f"{cue}, {name}": accuracy(name, cue) for name in ("A-then-B", "B-then-A") for cue in "AB"}
found["behind SFT on one, then the other"] = orders
found[f"RL steps a round until {BACK}"] = {f"t{n}": steps("shifts", f"round-{n}", f"t{n}") for n in range(5)}
for name, of in found.items():
    print(name, {arm: figures.show_interval(over_seeds(values)) for arm, values in of.items()})
figure = arms({name: {a: (v, over_seeds(v)) for a, v in of.items()} for name, of in found.items()}, "")
figure.write_html(arguments.out / "persistence.html", include_plotlyjs=True, config={"displayModeBar": False})
