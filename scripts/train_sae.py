# %% [markdown]
# # Which features does *my* checkpoint have at one site?
#
# A sparse autoencoder of S at one site, in SAELens' format, and how much of S (and of R, as it is) it keeps: in cells.
# Run it whole with `python scripts/train_sae.py --checkpoint S --after R --suite suite.yaml --site L1.resid_pre`;
# without arguments it looks at the reference organism. About a minute on one core.

# %%
import argparse
import re
import time
from pathlib import Path
from typing import cast, get_args

from mixturelens.features.activations import Storage, collect, texts
from mixturelens.features.effort import Training
from mixturelens.features.sae import JudgingTexts, Origin, load_sae, quality, train_sae
from mixturelens.figures import show_interval
from mixturelens.hooks.lens import NAMES, load_lens
from mixturelens.lab.organism import prompt_row, questions
from mixturelens.lab.runs import load_run
from mixturelens.models import quiet_libraries
from mixturelens.spelling import encode_prompts
from mixturelens.stats import half_of
from mixturelens.suite import PromptRow, load_suite
from mixturelens.types import Component, InputError

RUN = Path(__file__).resolve().parents[1] / "artifacts" / "reference"

parser = argparse.ArgumentParser(description="Train a sparse autoencoder of a checkpoint at one site, and judge it.")
parser.add_argument("--checkpoint", type=Path, default=RUN / "checkpoints" / "sft", help="S")
parser.add_argument("--after", type=Path, help="R: judge the same SAE on it, too")
parser.add_argument("--suite", type=Path, default=RUN / "suite.yaml")
parser.add_argument("--prompts", type=Path, help="prompts.jsonl to learn from, beside the suite's first half")
parser.add_argument("--run", type=Path, help="a run folder: learn from its RL questions, beside the suite's first half")
parser.add_argument("--site", default="L1.resid_pre")
parser.add_argument("--width", type=int, help="features; default: twice the site's dimensions")
parser.add_argument("--k", type=float, default=8, help="features that fire on an average token")
parser.add_argument("--steps", type=int, default=1200)
parser.add_argument("--out", type=Path, default=Path("artifacts") / "sae", help="folder for the SAE, by its site")
parser.add_argument("--device", default="cpu")
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()
quiet_libraries()

# %% [markdown]
# ## Texts: prompts, each with a completion of S's own
# The suite's questions are split in half: one teaches, the other judges. More prompts to learn from are welcome: with
# few, an SAE knows these prompts and no others. The reference run comes with 2,000 questions that RL was trained on.

# %%
found = re.fullmatch(r"L(\d+)\.(\w+)", arguments.site)
if found is None or found[2] not in get_args(Component):
    raise InputError(f"--site {arguments.site}: a site is written like L1.resid_pre or L2.mlp_out")
at = (int(found[1]), cast(Component, found[2]))
suite = load_suite(arguments.suite)
lens = load_lens(arguments.checkpoint, arguments.device)
ids = list(dict.fromkeys(row.id for row in suite.prompts))
teach, judge = ({ids[i] for i in half_of(len(ids), which)} for which in (0, 1))
rows = [row for row in suite.prompts if row.id in teach]
if arguments.prompts is not None:
    lines = arguments.prompts.read_text(encoding="utf-8").splitlines()
    rows += [PromptRow.model_validate_json(line) for line in lines if line.strip()]
run = arguments.run or (RUN if arguments.suite == RUN / "suite.yaml" else None)
if run is not None:
    spec = load_run(run)
    hints = [None, *(spec.policies if spec.hints else ())]
    rows += [prompt_row(spec, cue, q, hint) for q in questions(spec).rl for cue in spec.cues for hint in hints]
own = texts([lens], suite, rows, arguments.seed)
held_out = [row for row in suite.prompts if row.id in judge]
lengths = [len(prompt) for prompt in encode_prompts(suite, held_out, lens.tokenizer)]
print(f"{len(own)} texts to learn from, {len(held_out)} to be judged on")

# %% [markdown]
# ## Activations and training
# Every token of every text counts. A training that was killed goes on where it was, one that is done is not repeated.

# %%
start = time.perf_counter()
activations = collect([lens], own, at, Storage(arguments.out / f".{arguments.site}.activations"))
print(f"{len(activations)} activations of {activations.dim} dimensions in {time.perf_counter() - start:.1f} s")
start = time.perf_counter()
folder = train_sae(
    activations,
    arguments.out / arguments.site,
    Origin(f"blocks.{at[0]}.{NAMES[at[1]]}", arguments.checkpoint.resolve().name),
    Training(width=arguments.width, k=arguments.k, steps=arguments.steps, seed=arguments.seed),
)
dictionary = load_sae(folder)
print(
    f"{folder}: {len(dictionary)} features, trained in {time.perf_counter() - start:.1f} s (SAELens' import included)"
)

# %% [markdown]
# ## What it keeps
# `loss recovered`: of what completions lose when the site is replaced by its mean, the share that the reconstruction
# gives back, on held-out questions. Both models are judged on completions of their own.

# %%
print(f"{'':12} loss recovered               variance explained   features a token   dead")
for name, path in {"S": arguments.checkpoint, "S's on R": arguments.after}.items():
    if path is None:
        continue
    model = lens if name == "S" else load_lens(path, arguments.device)
    judged = quality(model, dictionary, at, JudgingTexts(texts([model], suite, held_out, arguments.seed + 1), lengths))
    print(
        f"{name:12} {show_interval(judged.loss_recovered):28} {judged.explained:<20.4f} {judged.active:<18.2f} "
        f"{judged.dead:.3f}"
    )
