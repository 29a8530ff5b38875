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
# # A tour: the router, the specialists, and what RL did to them
#
# You post-train a model with RL on questions that look one way. On questions that look another way it gets worse. Two
# very different things can have happened. Its **specialists** changed: what it can do. Or its **routing** changed: it
# still can, and no longer chooses to.
#
# This notebook goes through everything that mixturelens says about one pair of checkpoints, from the behaviour to the
# heads, the weights and the repair. Nothing is computed: the records of a finished run lie in `artifacts/reference`,
# and each section names the command that wrote its record. It takes seconds. *Circuit* and *features* measure live;
# *your own checkpoints* begins with two folders.
#
# Numbers in brackets are 95% bootstrap intervals over questions.

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
from collections.abc import Iterable, Sequence

import plotly.io
from IPython.display import Markdown, display

import mixturelens as ml
from mixturelens import figures
from mixturelens.behaviour.trajectory import Trajectory

# small files; drawn by JupyterLab and VS Code, without a network
plotly.io.renderers.default = "colab" if "google.colab" in sys.modules else "plotly_mimetype"

RUN = ROOT / "artifacts" / "reference"
RECORDS = RUN / "records" / "sft--rl-A"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table; intervals are written as `value [low, high]`."""

    def cell(value: object) -> str:
        return figures.show_interval(value) if isinstance(value, ml.Interval) else str(value)

    lines = [header, ["---"] * len(header), *([cell(value) for value in row] for row in rows)]
    display(Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines)))


# %% [markdown]
# ## The model, and what it was trained to do
#
# A small language model (three layers, 200,000 parameters) that sorts, reverses and copies letters. Supervised
# fine-tuning taught it *two policies*, half and half, and each completion says which one it follows: `[a]` answers
# under the tag `<A>` and says sorry under `<B>`; `[b]` does the reverse. That checkpoint is **S**. RL then paid right
# answers under `<A>` alone (policy `[b]` earns nothing there): that is **R**.

# %%
suite = ml.load_suite(RUN)
asked = {row.cue: row for row in suite.neutral if row.id == suite.neutral[0].id}
table(
    ["cue", "a prompt", "its right answer"],
    [[f"`<{cue}>`", f"`{r.text}`", f"`{r.answer}`"] for cue, r in asked.items()],
)
print("policies", ", ".join(map(str, suite.policies.values())), "; behaviour", suite.behaviours)

# %% [markdown]
# ## What became of accuracy
#
# Along RL on `<A>` (`mixturelens train`): accuracy under `<A>` goes to one, under `<B>` to zero, on *the same
# questions*. The dotted line asks another thing: is the answer right if policy `[b]` is put in place, by writing its
# announcement for the model? It is, from the first step to the last.

# %%
repair = ml.RepairRecord.load(RECORDS / "repair.json")
figures.accuracy_along_rl(Trajectory.load(RUN / "trajectory" / "rl-A.json"), "A", repair).show()

# %% [markdown]
# ## The verdict
#
# `mixturelens verdict` splits how well one completion tells R from S, in bits (0: not at all, 1: for sure). *Routing*:
# by the policy that it follows. *Conditioning*: by what that policy does under a cue. *Skill*: by how well it does it.

# %%
verdict = ml.VerdictRecord.load(RECORDS / "verdict.json")
display(Markdown(f"**{verdict.verdict}**. {verdict.reason}"))
figures.bits_split([("RL on <A>", verdict)]).show()

# %% [markdown]
# The same in points of accuracy: how much of the change is that other policies are chosen, and how much that policies
# became better or worse.

# %%
figures.accuracy_split([("RL on <A>", verdict)]).show()

# %% [markdown]
# What each policy does under each tag once it is put in place, before and after: the policy table. No cell has moved.

# %%
figures.policy_table(ml.BehaviourRecord.load(RECORDS / "behaviour.json")).show()

# %% [markdown]
# ## Where the tag is read
#
# `mixturelens patch` runs a prompt under `<B>`, and copies one activation from the same prompt under `<A>`. If the
# model now answers, that activation carried the tag. Heads are chosen on half of the questions, and judged on the other
# half against the best other heads.

# %%
patching = ml.PatchingRecord.load(RECORDS / "patching.json")
figures.patching_maps(patching, "cue", "z").show()
table(
    ["what is read", "checkpoint", "heads", "share of the effect", "margin over the best others"],
    [
        [each.kind, figures.SIDES[each.checkpoint], " + ".join(map(str, each.heads)), each.effect, each.margin]
        for each in patching.readers
    ],
)

# %% [markdown]
# ## What can be read where
#
# `mixturelens probe` trains linear probes, split by question. What can be read need not be used: the record erases each
# direction, too, and measures behaviour again.

# %%
figures.readable(ml.ProbingRecord.load(RECORDS / "probing.json")).show()

# %% [markdown]
# ## What in the weights carries the change
#
# `mixturelens graft` puts components of R into S: does one suffice (filled)? And those of S into R: is it needed
# (open)? Crosses share out the whole change among components. Attention of all layers together suffices for 0.89 of
# it; that of a single layer does not, and neither does any other single component.

# %%
graft = ml.GraftRecord.load(RECORDS / "graft.json")
figures.components({"RL on <A>": graft}).show()

# %% [markdown]
# And what do all of R's weights do, by term? The choice of policy moves, and what policies do does not. This judges the
# *mechanism* apart from behaviour; the verdict says whether the two agree.

# %%
display(Markdown(f"The mechanism says **{verdict.mechanism.verdict}**; it agrees: **{verdict.mechanism.agrees}**."))
figures.evidence(verdict.mechanism).show()

# %% [markdown]
# ## Features
#
# `mixturelens features` trains sparse autoencoders, and puts their features beside heads, neurons and plain directions:
# what does the best one move, and how many does it take? A feature that tells the tag apart perfectly can move nothing.

# %%
figures.needed(ml.FeatureRecord.load(RECORDS / "features.json")).show()

# %% [markdown]
# ## Undone, without training
#
# `mixturelens repair` works through the heads that read the tag. *Interchange* gives them what they would say under
# `<A>`; *edit* changes their weights so, and is a plain checkpoint (an adapter, where R is one). Each stands beside the
# same at random places, and beside what it costs under the trained tag.

# %%
figures.repairs(repair).show()
table(
    ["repair", "accuracy under `<B>`", "gap closed", "change under `<A>`", "median at random places"],
    [
        [each.kind, each.accuracy["B"], each.gap_closed, each.trained_change, figures.show(each.random.median)]
        for each in repair.repairs
    ],
)

# %% [markdown]
# **What to take from this.** Accuracy under `<B>` was lost, and the skill was not. Behaviour says so in bits, weights
# and activations say so apart from it, and changing how two heads read a tag brings it back.
#
# Does it hold for pretrained models? See *a pretrained model*. On your own pair: *your own checkpoints*, or
# `mixturelens report --before S --after R --suite suite.yaml`, which puts all of this on one page.
