# %% [markdown]
# # Schedules: how fast objectives switch, all at once, a phase of SFT at the end, and nested regimes
#
# From the organisms of `phase_diagram.py` whose objectives never agree, with every cue shown and with none: phases of
# 5 to 40 steps at 80 in all; both cues at once; SFT on answers under A, which culls what RL on B grew; and *nested*.
#
# `python scripts/schedules.py [--out DIR] [--jobs N]`: about half a minute a run, on one core each.

# %%
import argparse
import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
from joblib import Parallel, delayed

from mixturelens.lab import runs
from mixturelens.lab.figures.structures import schedule
from mixturelens.lab.organism import Phase, load_spec
from mixturelens.lab.structure import StructureSettings

parser = argparse.ArgumentParser(description="Switching speed, mixing at once, culling and nesting.")
parser.add_argument("--jobs", type=int, default=2)
parser.add_argument("--out", type=Path, default=Path("artifacts/phase-diagram"))
arguments = parser.parse_args()


ARMS = {}
for n in (5, 10, 20, 40):
    ARMS[f"every {n} steps"] = {f"{'AB'[i % 2]}-{i // 2}": Phase(cues=("AB"[i % 2],), steps=n) for i in range(80 // n)}
ARMS["at once"] = {f"mix-{i}": Phase(cues=("A", "B"), steps=40) for i in range(2)}
grown = {"A-1": Phase(cues=("A",), steps=10), "B-1": Phase(cues=("B",), steps=20)}
answers = Phase(train="sft", cues=("A",), weights={"x": 1.0}, steps=30, learning_rate=3e-4)
ARMS |= {"culled": {**grown, "sft-A": answers}, "nested": load_spec("nested").phases}


# %%
def grow(arm, seed):
    """One arm with every cue shown, and with none; (arm, tells, seed) -> record."""
    base, found = load_spec("nested" if arm == "nested" else "regimes", seed=seed), {}
    origin = arguments.out / f"sft--{'nested' if arm == 'nested' else 'agree-0'}--seed-{seed}"
    runs.train(base.model_copy(update={"phases": {}}), origin)
    for tells in (1.0, 0.0):
        run = arguments.out / f"{arm.replace(' ', '-')}--tells-{tells:g}--seed-{seed}"
        runs.start_run(base.model_copy(update={"tells": tells, "phases": ARMS[arm]}), run)
        for part in ("checkpoints/base", "checkpoints/sft", "trajectory"):
            shutil.copytree(origin / part, run / part, dirs_exist_ok=True)
        runs.train(runs.load_run(run), run)
        found[arm, tells, seed] = runs.structure(run, StructureSettings(mechanism=arm == "nested"))
        print(f"{arm}, tells {tells:g}, seed {seed}: {found[arm, tells, seed].structure}", flush=True)
    return found


wanted = [(arm, seed) for arm in reversed(ARMS) for seed in range(3)]
arms = Parallel(arguments.jobs)(delayed(grow)(*each) for each in wanted)
found = {key: record for each in arms if each for key, record in each.items()}
rows = [{"arm": k[0], "tells": k[1], "seed": k[2], **json.loads(v.to_json())} for k, v in found.items()]
(arguments.out / "schedules.json").write_text(json.dumps(rows))
figure = schedule({f"nested, shown {t:g}": found["nested", t, 0] for t in (1.0, 0.0)})
figure.write_html(arguments.out / "nested.html", include_plotlyjs=True, config={"displayModeBar": False})
