# %% [markdown]
# # Inoculation prompting: a trait that RL pays for against the persona of SFT, in four arms
#
# `python scripts/inoculation.py [--seeds 5]`: three minutes a seed on one core. RL's prompts say nothing, something
# irrelevant, ask for the trait, or ask for it in other words; measured is what happens without any prompt.

# %%
import argparse
from pathlib import Path

from mixturelens import pipeline, viz
from mixturelens.organism import load_spec
from mixturelens.stats import over_seeds
from mixturelens.training import Trajectory

ARMS = ("none", "irrelevant", "inoculation", "rephrased")
parser = argparse.ArgumentParser(description="Inoculation prompting in four arms.")
parser.add_argument("--seeds", type=int, default=5)
parser.add_argument("--out", type=Path, default=Path("artifacts"))
arguments = parser.parse_args()


# %%
def measured(run: Path, arm: str) -> dict[str, float]:
    """What one arm of one seed does without a prompt: behind its last RL, and behind the SFT that follows it."""
    rl, sft = (Trajectory.load(run / "trajectory" / f"{arm}-{phase}.json") for phase in (3, 4))
    end = sft.points[-1].cues
    grown, trait = ({cue: at.paid["ship"].value or 0.0 for cue, at in p.points[-1].cues.items()} for p in (rl, sft))
    return {
        "trait in ship, behind RL": grown["ship"],
        "trait in chat, behind RL": grown["chat"],
        "trait in ship, behind SFT": trait["ship"],
        "trait in chat, behind SFT": trait["chat"],
        "conditionality: ship - chat": trait["ship"] - trait["chat"],
        "capability: right in chat": end["chat"].paid["chat"].value or 0.0,
    }


runs = [arguments.out / f"inoculation-{seed}" for seed in range(arguments.seeds)]
for seed, run in enumerate(runs):
    pipeline.train(load_spec("inoculation", seed=seed), run)
by_arm = {arm: [measured(run, arm) for run in runs] for arm in ARMS}
for name in by_arm["none"][0]:
    print(name)
    for arm in ARMS:
        values = [seed[name] for seed in by_arm[arm]]
        less = [value - base[name] for value, base in zip(values, by_arm["none"], strict=True)]
        print(
            f"  {arm:12} {viz.show_interval(over_seeds(values))}   against none {viz.show_interval(over_seeds(less))}"
        )

for arm in ARMS:  # and what is behind it: is there a router between the environments?
    found = pipeline.structure(runs[0], f"{arm}-4").pairs[0]
    print(arm, found.structure, found.mechanism and (found.mechanism.heads, found.mechanism.carried))

# %%
shown = {n: {a: [seed[n] for seed in by_arm[a]] for a in ARMS} for n in by_arm["none"][0]}
figure = viz.arms({name: {arm: (v, over_seeds(v)) for arm, v in of.items()} for name, of in shown.items()})
figure.write_html(arguments.out / "inoculation.html", include_plotlyjs=True, config={"displayModeBar": False})
