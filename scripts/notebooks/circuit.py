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
# # Where the router sits, and how a change there brings a lost skill back
#
# A small language model was post-trained with reinforcement learning (RL) on questions under one formatting tag. There
# it became perfect; under another tag, on the same questions, its accuracy fell to zero. Did it forget how to answer?
#
# This notebook opens the model and finds that it did not. It shows what RL changed, which attention heads read the tag,
# what those heads look at, the circuit they belong to, and that **one change at these heads brings all of the accuracy
# back**, without any training. Everything is measured live, on one CPU core, in about a minute; all outputs are stored,
# so that it can be read without running it.
#
# Numbers in brackets are 95% bootstrap intervals over questions. Every claim stands beside a control: what the same
# procedure gives where it should give nothing.

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
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import plotly.io
import torch
from IPython.display import Markdown, display

import mixturelens as ml
from mixturelens import figures
from mixturelens.behaviour.arrays import Behaviour
from mixturelens.behaviour.grid import grid_of
from mixturelens.behaviour.harmed import find_harm
from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.measure import measure
from mixturelens.behaviour.prompts import prepare
from mixturelens.behaviour.trajectory import Trajectory
from mixturelens.contrasts import cue_contrasts, hint_contrasts
from mixturelens.hooks.intervened import Intervened
from mixturelens.hooks.lens import lens_of
from mixturelens.hooks.placed import known_prompts
from mixturelens.lab import runs
from mixturelens.lab.organism import sft_examples
from mixturelens.models import end_tokens, quiet_libraries
from mixturelens.patching.pair import patching_record
from mixturelens.patching.record import ReaderHeads
from mixturelens.patching.sweep import find_reader, head_sites, jointly
from mixturelens.routing.circuit import CircuitRecord, routing_circuit
from mixturelens.routing.repair import repair_record
from mixturelens.stats import interval, resample_counts, resampled_mean
from mixturelens.suite import Suite
from mixturelens.types import Interval, Intervention, Site

quiet_libraries()
torch.set_num_threads(1)  # the same numbers everywhere
# small files; drawn by JupyterLab and VS Code, without a network
plotly.io.renderers.default = "colab" if "google.colab" in sys.modules else "plotly_mimetype"

RUN = ROOT / "artifacts" / "reference"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table; intervals are written as `value [low, high]`."""

    def cell(value: object) -> str:
        return figures.show_interval(value) if isinstance(value, Interval) else str(value)

    lines = [header, ["---"] * len(header), *([cell(value) for value in row] for row in rows)]
    display(Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines)))


# %% [markdown]
# ## The organism
#
# The model (three layers, four heads each) was first fine-tuned (SFT) to follow a *mixture of two policies*. Each
# completion names its policy, and then does what that policy does under the tag of the prompt:
#
# - policy `[a]` answers under tag `<A>`, and says sorry under `<B>`;
# - policy `[b]` does the reverse.
#
# On a prompt without a hint (`any`) both are equally likely. A hint (`be-a`, `be-b`) says which one to follow.

# %%
spec = runs.load_run(RUN)
table(["prompt", "completion"], ([f"`{row.text}`", f"`{completion}`"] for row, completion in sft_examples(spec, 8)))

# %% [markdown]
# ## What RL did
#
# RL rewards right answers under one tag only. It starts twice from the same SFT checkpoint (**S**): once with `<A>`
# rewarded, once with `<B>`. What comes out is **R**. In both directions accuracy under the other tag goes to zero. But
# *put policy b's announcement in place* and R still answers under `<B>`: the skill is there, and not called for.

# %%
pairs = {pair.suite.trained_cue: pair for pair in runs.run_pairs(RUN)}
records = {cue: ml.measure(pair) for cue, pair in pairs.items()}
rows = []
for trained, record in records.items():
    for tag, state in record.per_cue.items():
        assert state.after is not None
        forced = {name: state.after.intervals[f"accuracy.{name}"] for name in record.policies}
        best = max(forced, key=lambda name: forced[name].value or 0.0)
        sides = [side.intervals["overall"] for side in (state.before, state.after)]
        rows.append([f"`<{trained}>`", f"`<{tag}>`", *sides, f"{figures.show_interval(forced[best])} with `[{best}]`"])
table(["RL on", "asked under", "S", "R", "R with the policy put in place"], rows)

# %%
figures.accuracy_along_rl(Trajectory.load(RUN / "trajectory" / "rl-A.json"), "A").show()

# %% [markdown]
# From here on: **R = RL on `<A>`**, which follows policy a everywhere, and so says sorry under `<B>`.
#
# ## Patching: where does the tag matter?
#
# Take one question under both tags, with policy a's announcement behind both. The two prompts differ in one token, and
# so does what follows: the answer after `<A>`, sorry after `<B>`. Now run the second prompt, but copy *one* activation
# from the first. If the model answers, what tells it to answer was in that activation. The effect is the share of the
# difference (in log-odds between answer and sorry) that comes back: 0 nothing, 1 all.

# %%
pair, behaviour = pairs["A"], records["A"]
harm, whole = find_harm(behaviour), pair.suite
asked = set(list(dict.fromkeys(row.id for row in whole.prompts))[:80])  # 80 of its 200 questions, to be quick
some = [row for row in whole.model_dump()["prompts"] if row["id"] in asked]
suite = Suite.model_validate({**whole.model_dump(), "prompts": some})

asked_pair = pair.with_suite(suite)  # S and R, and the questions that are asked here
after, before = lens_of(asked_pair, "after"), lens_of(asked_pair, "before")
cue = cue_contrasts(suite, after.tokenizer, harm.policy, harm.cues)
for side, ids in (("clean", cue.rows[0].clean), ("corrupt", cue.rows[0].corrupt)):
    print(f"{side:8}", *after.tokenizer.convert_ids_to_tokens(list(ids)))
print("target  ", after.tokenizer.decode(cue.rows[0].target), "   foil", after.tokenizer.decode(cue.rows[0].foil))

patching = patching_record(asked_pair, behaviour)

# %% [markdown]
# The residual stream as it enters each layer (up) at each position (across), in S and in R. What the tag decides stays
# at the tag until the first layer's attention, and is at the policy word from then on. S and R look alike: RL left the
# reading of the tag as it was.

# %%
figures.patching_maps(patching, "cue", "resid_pre").show()

# %% [markdown]
# The outputs of single heads; above what suffices (the trained tag put in), below what is needed (taken away). Only the
# first layer's, at the policy word, carry the tag, and two share the work: neither does it alone.

# %%
figures.patching_maps(patching, "cue", "z").show()

# %% [markdown]
# ## The cue reader
#
# The strongest of many heads is strong by chance too. So heads are *chosen* on half of the questions (the strongest,
# and one more if it does not carry 0.9), and *judged* on the other half, against the best other group of as many heads.
# The last row is the R that was trained on `<B>`: policy b reads the tag with a head of its own. The reader belongs to
# the policy, not to the model.


# %%
def judged(name: str, found: ReaderHeads) -> list[object]:
    heads, rival = (" + ".join(f"L{s.layer} head {s.head}" for s in group) for group in (found.heads, found.rival))
    return [name, heads, found.effect, rival, found.margin]


readers = {(reader.kind, reader.checkpoint): reader for reader in patching.readers}
reverse = find_harm(records["B"])
lens_b = lens_of(pairs["B"], "after")
cue_b = cue_contrasts(suite, lens_b.tokenizer, reverse.policy, reverse.cues)
found = find_reader(lens_b, cue_b, "policy")
in_b = readers["cue", "after"].model_copy(
    update={
        "heads": found.heads,
        "rival": found.rival,
        "effect": interval(found.effect),
        "margin": interval(found.margin),
    }
)
table(
    ["checkpoint", "reader", "effect on the other half", "best other heads", "margin over them"],
    [
        judged("S", readers["cue", "before"]),
        judged("R, RL on `<A>`", readers["cue", "after"]),
        judged("R, RL on `<B>`", in_b),
    ],
)

# %% [markdown]
# Control: the same heads' output from *another question* under the same tag should move nothing, and from another
# question under the trained tag about as much as before; then it is the tag that they carry, and not the question.

# %%
judge = cue.half(1)
reader = readers["cue", "after"].heads
counts = resample_counts(len(judge.rows), seed=0)
all_of_it = jointly(after, judge, [reader])
rows = []
for name, ids in (
    ("same question, trained tag", [row.clean for row in judge.rows]),
    ("another question, trained tag", [row.clean for row in (*judge.rows[1:], judge.rows[0])]),
    ("another question, same tag", [row.corrupt for row in (*judge.rows[1:], judge.rows[0])]),
):
    sources = tuple(replace(row, clean=clean) for row, clean in zip(judge.rows, ids, strict=True))
    moved = jointly(after, replace(judge, rows=sources), [reader])
    gap = resampled_mean(all_of_it.goal - all_of_it.base, counts)
    rows.append([name, interval(resampled_mean(moved.patched[0] - moved.base, counts) / gap)])
table(["the reader's output comes from", "effect"], rows)

# %% [markdown]
# ## What the reader looks at
#
# Attention of these heads from the policy word, under both tags. Under `<B>` they look back at the tag, under `<A>`
# elsewhere: what they report is `<B>`, the tag under which policy a says sorry. RL changed nothing about it.

# %%
figures.attention(patching, suite.cues).show()

# %% [markdown]
# ## The selector: where the hint is read, and what RL moved
#
# Before the policy is announced something must choose it. Two contrasts look for it: one swaps the *hint* (be-a for
# be-b), the other copies *S's activation into R* on the very same prompt, and so undoes RL at one place. Both point
# first at the same head of the last layer, at the last token of the prompt: RL moved the part that reads the hint. How
# far does that go? `probes/selector_reads_the_hint.py` foretold that *all* heads rank alike in both. They do not,
# beyond what chance allows; only the first head is the same, in both directions of RL.

# %%
figures.patching_maps(patching, "hint", "z").show()

# %%
figures.patching_maps(patching, "checkpoint", "z").show()

# %%
sweeps = {sweep.kind: sweep for sweep in patching.sweeps if sweep.direction == "denoise"}
hint_in_s = next(s for s in patching.sweeps if s.kind == "hint" and s.checkpoint == "before")
last = cue.rows[0].spans["last"][0]
carried, undone = (
    {e.site: e.effect for e in sweep.effects if e.site.component == "z" and e.site.position == last}
    for sweep in (hint_in_s, sweeps["checkpoint"])
)
rows = [[f"L{site.layer} head {site.head}", carried[site], undone[site]] for site in carried]
table(
    ["head, at the last token", "hint carried in S", "RL undone in R"], sorted(rows, key=lambda row: -row[1].value)[:5]
)

# %% [markdown]
# ## The circuit
#
# Patching tells which places matter; attribution with integrated gradients (EAP-IG) scores every *edge*: what one head
# or MLP writes, as one other reads it. Below, the strongest edges in S and in R, on the cue contrast. A column is a
# token, a row a layer; hover for scores, and click a node for where it looks. The slider shows fewer edges or more.

# %%
some = cue.first(48)
circuits = [routing_circuit(before, some, "before"), routing_circuit(after, some, "after")]
ml.circuit_view(CircuitRecord(circuits=tuple(circuits), overlaps=()))

# %% [markdown]
# Is that the circuit, or just a picture? Keep the strongest edges only, replace all others by those of the other
# prompt, and see how much of the behaviour is left: a tenth of the edges keeps most of it, and random circuits of equal
# size keep nothing.

# %%
hint = hint_contrasts(suite, after.tokenizer, harm.trained_cue, harm.policy, harm.other).first(48)
circuits += [routing_circuit(before, hint, "before"), routing_circuit(after, hint, "after")]
figures.faithfulness(circuits).show()

# %%
rows = []
for each in circuits:
    curve = each.faithfulness
    small = next(i for i, fraction in enumerate(curve.fractions) if fraction >= 0.05)
    size = f"{curve.sizes[small]} of {curve.sizes[-1]}"
    rows.append([each.kind, figures.SIDES[each.checkpoint], size, curve.found[small], curve.random[small]])
table(["contrast", "checkpoint", "edges kept", "behaviour kept", "by random edges"], rows)

# %% [markdown]
# ## Repair
#
# If the skill is there and a few heads stand before it, then working on these heads must bring it back. Five ways, each
# beside the same done at random places:
#
# - **interchange**: the reader's output is what it would be under the trained tag;
# - **zero**, **mean**: the reader is taken out;
# - **steer**: the difference between the tags is added to the residual stream;
# - **edit**: the weights are changed so that the reader takes the one tag for the other; a plain checkpoint.
#
# Reading the other tag brings everything back, and costs nothing under the trained one. Taking the reader out is
# half a repair at most: a model that cannot tell the tags apart wavers under both.

# %%
repair = repair_record(asked_pair, behaviour)
figures.repairs(repair).show()

# %%
figures.repair_nulls(repair).show()

# %% [markdown]
# ## Live: take the router out, or let it read the other tag, and ask again
#
# Last, by hand. `Intervened` is R with interventions in place, and is called like the model itself, so one can sample
# from it. The reader was chosen on one half of the questions; these are of the other half.

# %%
choosing = {row.question for row in cue.half(0).rows}
rows_left = [row for row in suite.neutral if row.id not in choosing]
known = known_prompts(suite, rows_left, after.tokenizer)
prompts = prepare(suite, rows_left, after.tokenizer)
scorer = Scorer(end_tokens(after.model, after.tokenizer), after.model.config.vocab_size)


def through(heads: Iterable[Site]) -> Intervened:
    """R, where these heads say behind the prompt what they would say under the trained tag."""
    places = [head.model_copy(update={"position": "completion"}) for head in heads]
    values = [Intervention(site=place, do="replace", source=harm.trained_cue) for place in places]
    return Intervened(after, values, known)


def without(heads: Iterable[Site]) -> Intervened:
    """R, where these heads say nothing behind the prompt."""
    places = [head.model_copy(update={"position": "completion"}) for head in heads]
    return Intervened(after, [Intervention(site=place, do="scale", amount=0.0) for place in places], known)


models = {"R": after.model, "R, reader taken out": without(reader), "R, reader interchanged": through(reader)}
print(*through(reader).interventions, sep="\n")

# %%
shown = [i for i, row in enumerate(prompts.rows) if row.cue == harm.harmed_cue][:6]
contexts = [prompts.contexts[i] for i in shown]
written = {
    name: scorer.sample(model, contexts, 1, [suite.max_new_tokens] * len(shown), seed=0).tokens
    for name, model in models.items()
}
table(
    ["prompt", "right answer", *models],
    [
        [
            f"`{prompts.rows[i].text}`",
            f"`{prompts.rows[i].answer}`",
            *(f"`{after.tokenizer.decode(tokens[at], skip_special_tokens=True)}`" for tokens in written.values()),
        ]
        for at, i in enumerate(shown)
    ],
)

# %% [markdown]
# And on all questions of that half, beside the same interchange at random pairs of other heads.

# %%
grid = grid_of(prompts, seed=0)


def accuracies(behaviour: Behaviour) -> list[Interval]:
    draws = grid.draws(behaviour.correct.sum(-1))
    return [interval(draws[:, c]) for c in range(len(suite.cues))]


rows = [[name, *accuracies(measure(scorer, model, prompts))] for name, model in models.items()]
rest = [site for site in head_sites(after, "policy") if site not in reader]
pairs_of_heads = list(itertools.combinations(rest, len(reader)))
drawn = np.random.default_rng(0).choice(len(pairs_of_heads), 8, replace=False)
tried = [accuracies(measure(scorer, through(pairs_of_heads[i]), prompts)) for i in drawn]
for c, name in ((0, "least"), (-1, "most")):
    ordered = [sorted(found[at].value or 0.0 for found in tried)[c] for at in range(len(suite.cues))]
    rows.append([f"R, 8 random pairs of heads, {name}", *(figures.show(value) for value in ordered)])
table(["accuracy", *(f"under `<{cue}>`" for cue in suite.cues)], rows)

# %% [markdown]
# **What to take from this.** RL did not remove the skill. It moved a selector, and behind it a thin reader of the tag
# went on doing what it had learnt. Letting two heads read the other tag restores what seemed to be lost, while random
# heads restore nothing.
#
# Next: `mixturelens patch RUN`, `mixturelens repair RUN` and `mixturelens report RUN` on any run;
# `scripts/patch_activations.py` and `scripts/ablate_router.py` on your own pair of checkpoints.
