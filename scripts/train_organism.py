# %% [markdown]
# # Train a conditional-policy organism, step by step
#
# What `mixturelens train` does, in cells: look at the prompts, train SFT and RL, look at the trajectory. Run it whole
# with `python scripts/train_organism.py [RECIPE] [--seed N] [--out DIR]`, or by cell in an editor that knows `# %%`.

# %%
import argparse
from pathlib import Path

from mixturelens import figures
from mixturelens.lab import runs
from mixturelens.lab.organism import load_spec, sft_examples

parser = argparse.ArgumentParser(description="Train a conditional-policy organism, step by step.")
parser.add_argument("recipe", nargs="?", default="default", help="a recipe by name, or a YAML file")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, help="default: artifacts/<recipe>-<seed>")
arguments = parser.parse_args()

# %% [markdown]
# ## What SFT sees
# Each prompt has a cue (the tag), perhaps a hint, and a question; each completion announces a policy and then does what
# that policy does under that cue.

# %%
spec = load_spec(arguments.recipe, seed=arguments.seed)
for row, completion in sft_examples(spec, 8):
    print(f"{row.text:32} -> {completion}")

# %% [markdown]
# ## Train
# SFT makes the mixture; RL on each cue starts from the same SFT checkpoint. A run that was stopped goes on.

# %%
run = arguments.out or Path("artifacts") / f"{spec.name}-{spec.seed}"


def show(stage: str, step: int, steps: int, numbers: dict[str, float]) -> None:
    if step % max(1, steps // 8) == 0:
        print(f"{stage} {step}/{steps}", *(f"{name} {value:.3f}" for name, value in numbers.items()))


trajectories = runs.train(spec, run, progress=show)

# %% [markdown]
# ## The headline: accuracy under every cue along RL on one of them

# %%
for cue, trajectory in zip(spec.rl.cues, trajectories[1:], strict=True):
    figure = figures.accuracy_along_rl(trajectory, cue)
    file = run / "figures" / f"{trajectory.stage}.html"
    file.parent.mkdir(exist_ok=True)
    figure.write_html(file, include_plotlyjs="directory")
    last = trajectory.points[-1].cues
    print(
        f"RL on {cue}, {trajectory.steps} steps:", {name: round(s.accuracy.value or 0, 4) for name, s in last.items()}
    )
    print(f"  figure: {file}")
