# %% [markdown]
# # A policy that is good everywhere: does RL keep it?
#
# Three initial weights, five seeds, RL on A alone, forecast from SFT. Softmax drift lets the rich get richer and drives
# it out; replicator dynamics would keep its share. The control, where the two differ most: plain gradient descent from
# the same SFT checkpoints. The recipe's Adam has an epsilon below the gradients that matter.
#
# `python scripts/forecast_good_everywhere.py [--out DIR]`: one core, about 40 minutes; what is finished is kept.

# %%
import argparse
import shutil
from pathlib import Path

import numpy as np

from mixturelens import figures
from mixturelens.lab import runs
from mixturelens.lab.figures.forecast import drifts
from mixturelens.lab.forecast.record import ANSWERS
from mixturelens.lab.organism import Spec, load_spec
from mixturelens.stats import mean_interval, resample_counts

parser = argparse.ArgumentParser(description="Does RL keep a policy that is good everywhere?")
parser.add_argument("--out", type=Path, default=Path("artifacts/good-everywhere"))
out, plainly = parser.parse_args().out, "10%, plain gradient descent"


# %%
def organism(percent: int, seed: int, **rl: float) -> Spec:
    """The recipe, with this much of policy g."""
    base, share = load_spec("good-everywhere", seed=seed), percent / 100
    weights = {"a": (1 - share) / 2, "b": (1 - share) / 2, "g": share}
    policies = {name: row.model_copy(update={"weight": weights[name]}) for name, row in base.policies.items()}
    return base.model_copy(update={"policies": policies, "rl": base.rl.model_copy(update=rl)})


columns = {name: [] for name in ("1%", "5%", "10%", plainly)}
for percent in (1, 5, 10):
    for seed in range(5):
        run = out / f"good-{percent}-{seed}"
        runs.train(organism(percent, seed), run)
        columns[f"{percent}%"] += runs.forecast(run)
        if percent == 10:
            plain = out / f"{run.name}-plain"
            runs.start_run(organism(percent, seed, adam_epsilon=1.0, learning_rate=0.05), plain)
            for part in ("checkpoints", "trajectory") if not (plain / "trajectory").exists() else ():
                shutil.copytree(run / part, plain / part, ignore=shutil.ignore_patterns("rl-*"), dirs_exist_ok=True)
            runs.train(runs.load_run(plain), plain)
            columns[plainly] += runs.forecast(plain)

# %%
for column, records in columns.items():
    happened = [record.happened for record in records if record.happened]
    errors = {key: np.array([h.scores["B"].errors[key] for h in happened], dtype=float) for key in ANSWERS}
    errors["replicator less softmax"] = errors["replicator"] - errors["softmax"]
    counts = resample_counts(len(happened), seed=0)
    shown = ", ".join(f"{key} {figures.show_interval(mean_interval(each, counts))}" for key, each in errors.items())
    covered = np.average([h.scores["B"].covered for h in happened], weights=[len(h.compared) for h in happened])
    print(f"{column}: mean absolute error {shown}; covered {covered:.3f}", flush=True)
page = out / "good-everywhere.html"
drifts(columns, "B").write_html(page, include_plotlyjs=True, config={"displayModeBar": False})
