# %% [markdown]
# # What becomes of objectives that take turns
#
# RL pays answers under A and refusals under B, phase after phase. Two knobs: how many questions show their tag
# (`tells`), and the share of operations on which both objectives pay the answer (`agree`). Every cell of the grid, with
# its seeds, is a run folder; finished ones are kept. `--mix` trains on both cues at once instead: the baseline.
#
# `python scripts/phase_diagram.py [--out DIR] [--jobs N]`: about half a minute a run, on one core each.

# %%
import argparse
import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
from joblib import Parallel, delayed

from mixturelens.lab import runs
from mixturelens.lab.figures.structures import phase_diagram, schedule
from mixturelens.lab.organism import load_spec
from mixturelens.lab.structure import StructureSettings
from mixturelens.records import write_text

KNOBS = (0.0, 0.25, 0.5, 0.75, 1.0)
parser = argparse.ArgumentParser(description="Structures over distinguishability and shared structure.")
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--mix", action="store_true", help="both cues in every phase")
parser.add_argument("--jobs", type=int, default=2, help="runs at once, each on one thread")
parser.add_argument("--out", type=Path, default=Path("artifacts/phase-diagram"))
arguments = parser.parse_args()
name = "mixed-at-once" if arguments.mix else "phase-diagram"


# %%
def column(shared, seed):
    """One SFT run, and RL from it at every distinguishability; (tells, agree, seed) -> record."""
    base, cells = load_spec("regimes", seed=seed), {}
    phases = {n: p.model_copy(update={"cues": ("A", "B")} if arguments.mix else {}) for n, p in base.phases.items()}
    base = base.model_copy(update={"agree": base.questions.operations[: round(4 * shared)]})
    origin = arguments.out / f"sft--agree-{shared:g}--seed-{seed}"
    runs.train(base.model_copy(update={"phases": {}}), origin)
    for tells in KNOBS:
        run = arguments.out / f"{'mix--' * arguments.mix}tells-{tells:g}--agree-{shared:g}--seed-{seed}"
        runs.start_run(base.model_copy(update={"tells": tells, "phases": phases}), run)
        for part in ("checkpoints/base", "checkpoints/sft", "trajectory"):
            shutil.copytree(origin / part, run / part, dirs_exist_ok=True)
        runs.train(runs.load_run(run), run)
        cells[tells, shared, seed] = found = runs.structure(run, StructureSettings(mechanism=shared == 0))
        print(f"tells {tells:g}, agree {shared:g}, seed {seed}: {found.structure}", flush=True)
    return cells


wanted = [(shared, seed) for seed in range(arguments.seeds) for shared in KNOBS]
columns = Parallel(arguments.jobs)(delayed(column)(*each) for each in wanted)
cells = {key: record for each in columns if each for key, record in each.items()}
rows = [{"tells": k[0], "agree": k[1], "seed": k[2], **json.loads(v.to_json())} for k, v in cells.items()]
write_text(arguments.out / f"{name}.json", json.dumps(rows))
corners = {f"shown {t:g}, shared {s:g}": cells[t, s, 0] for t, s in ((1, 0), (0, 0), (0.5, 0.5), (0, 1))}
for what, figure in ((name, phase_diagram(cells)), (f"{name}-schedule", schedule(corners))):
    figure.write_html(arguments.out / f"{what}.html", include_plotlyjs=True, config={"displayModeBar": False})
