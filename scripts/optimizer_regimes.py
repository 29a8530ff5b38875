# %% [markdown]
# # Where routing turns into specialist change: Adam's epsilon against the learning rate
#
# RL from one SFT checkpoint under a grid of (epsilon, learning rate). A large epsilon makes Adam behave like plain
# gradient descent, which moves what has a gradient: the selector. A small one rescales the tiny gradients of saturated
# specialists, which then move as well. Each cell gets a verdict; the figure shows where it flips.
#
# `python scripts/optimizer_regimes.py [RECIPE] [--out DIR]`: one core, about ten minutes; finished cells are kept.

# %%
import argparse
import shutil
from pathlib import Path

import mixturelens as ml
from mixturelens import figures
from mixturelens.lab import runs
from mixturelens.lab.organism import load_spec
from mixturelens.routing.verdict import VerdictRecord

EPSILONS = (1e-8, 1e-5, 1e-2)
RATES = (3e-4, 1e-3, 3e-3)

parser = argparse.ArgumentParser(description="Where routing turns into specialist change.")
parser.add_argument("recipe", nargs="?", default="default")
parser.add_argument("--steps", type=int, default=60, help="RL steps of every cell; none stops early")
parser.add_argument("--cue", default="A", help="the cue that RL trains on")
parser.add_argument("--out", type=Path, help="default: artifacts/regimes-<recipe>")
arguments = parser.parse_args()
out = arguments.out or Path("artifacts") / f"regimes-{arguments.recipe}"

# %% [markdown]
# ## One SFT checkpoint for all cells

# %%
base = load_spec(arguments.recipe)
origin = out / "sft"
runs.train(base.model_copy(update={"rl": base.rl.model_copy(update={"cues": ()})}), origin)


# %%
def cell(epsilon: float, rate: float) -> VerdictRecord:
    """RL with these settings from the shared SFT checkpoint, and its verdict."""
    rl = base.rl.model_copy(
        update={
            "adam_epsilon": epsilon,
            "learning_rate": rate,
            "steps": arguments.steps,
            "stop_reward": None,
            "cues": (arguments.cue,),
        }
    )
    run = out / f"epsilon-{epsilon:g}--rate-{rate:g}"
    runs.start_run(base.model_copy(update={"rl": rl}), run)
    if not (run / "checkpoints" / "sft").exists():
        shutil.copytree(origin / "checkpoints" / "sft", run / "checkpoints" / "sft")
    (run / "trajectory").mkdir(exist_ok=True)
    shutil.copy(origin / "trajectory" / "sft.json", run / "trajectory")
    runs.train(runs.load_run(run), run)
    return ml.verdict(runs.run_pairs(run)[0])


verdicts = {}
for epsilon in EPSILONS:
    for rate in RATES:
        verdicts[epsilon, rate] = found = cell(epsilon, rate)
        changed = [name for name, yes in found.changed.model_dump().items() if yes]
        accuracy = {cue: round(s.after.overall, 3) for cue, s in found.per_cue.items() if s.after is not None}
        print(f"epsilon {epsilon:g}, rate {rate:g}: {found.verdict}, changed {changed}, {accuracy}", flush=True)

# %% [markdown]
# ## The figure

# %%
figure = figures.regimes(verdicts, arguments.cue)
file = out / "regimes.html"
figure.write_html(file, include_plotlyjs=True, config={"displayModeBar": False})
print(f"figure: {file}")
