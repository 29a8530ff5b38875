# %% [markdown]
# # Cues that are no tags: task families, dates, whole formats
#
# RL on one side of the cue; then: what the other side lost, whether the silent specialist can still do it, which heads
# read the cue, and what repairs it. `python scripts/other_cues.py [coverage|years|formats] [--seeds 3]`: about six
# minutes a seed on one core, where training takes two; what is finished is not done again.

# %%
import argparse
from pathlib import Path

import mixturelens as ml
from mixturelens import figures
from mixturelens.lab import runs
from mixturelens.lab.organism import load_spec
from mixturelens.types import InputError

parser = argparse.ArgumentParser(description="Cues that are no tags: task families, dates, formats.")
parser.add_argument("recipe", nargs="?", default="coverage")
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--out", type=Path, default=Path("artifacts"), help="runs go to OUT/<recipe>-<seed>")
arguments = parser.parse_args()

# %% [markdown]
# ## Train, judge, find the reader, repair; a page for each run

# %%
shown = []
for seed in range(arguments.seeds):
    run = arguments.out / f"{arguments.recipe}-{seed}"
    runs.train(load_spec(arguments.recipe, seed=seed), run)
    pairs = runs.run_pairs(run)
    for pair in pairs:
        verdict = ml.verdict(pair)
        try:
            shown.append((f"seed {seed}", verdict, ml.repair(pair)))
        except InputError as error:
            print(f"{run.name} {pair.name}: not repaired: {error}")
    print(f"page: {ml.report(pairs)}")
print(figures.transfer_table(shown))

# %% [markdown]
# ## All seeds in one figure

# %%
file = arguments.out / f"{arguments.recipe}.html"
figures.transfer(shown).write_html(file, include_plotlyjs=True, config={"displayModeBar": False})
print(f"figure: {file}")
