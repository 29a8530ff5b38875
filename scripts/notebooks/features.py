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
# # What sparse features say about a router, and what they do not
#
# A sparse autoencoder (SAE) learns to write each activation of a network as a sum of a few out of many directions, its
# **features**. Most are silent on most tokens, so one can look at what each stands for. But a feature that *tells*
# something need not *do* anything. This notebook trains one SAE, live, on a model whose router is known, and asks of
# everything it finds: does changing it change what the model does?
#
# What comes out: the best feature tells the two tags apart on every question, and alone does next to nothing. Several
# together do nearly all. The reason can be tested, and is: what reads them works like a threshold. How many it takes
# depends on the SAE's seed. And what RL changed moves the choice of policy, and nothing else; no new direction was
# needed for it.
#
# Everything is measured live, on one CPU core, in less than two minutes; all outputs are stored, so that it can be
# read without running it. Numbers in brackets are 95% bootstrap intervals over questions. Every claim stands beside a
# control, and says what would falsify it. `circuit.ipynb` tells how the router was found.

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
import html
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import plotly.io
import torch
from IPython.display import HTML, Markdown, display
from torch import Tensor

import mixturelens as ml
from mixturelens import figures
from mixturelens.behaviour.harmed import find_harm
from mixturelens.behaviour.repair_questions import make_ground, scale_of
from mixturelens.features.activations import Activations, collect, texts
from mixturelens.features.cards import Album, card
from mixturelens.features.change import Splices, half_prompts, matched, of_features, site_change
from mixturelens.features.crosscoder import train_crosscoder
from mixturelens.features.dictionary import Dictionary
from mixturelens.features.effort import Training
from mixturelens.features.latents import judge_latents
from mixturelens.features.record import Card, FeatureRecord, Sae, Unit
from mixturelens.features.sae import JudgingTexts, Origin, load_sae, quality, train_sae
from mixturelens.features.sites import arrived_at, named_site
from mixturelens.features.splice import Crossing
from mixturelens.features.table import find_table
from mixturelens.features.together import fewest_features
from mixturelens.features.units import Place, TrialSettings, best_of, make_trial, pool_of
from mixturelens.features.vectors import strength
from mixturelens.figures.style import GREY, INK, UNITS, new_figure
from mixturelens.hooks.intervened import Intervened
from mixturelens.hooks.lens import NAMES, lens_of
from mixturelens.lab import runs
from mixturelens.lab.organism import prompt_row, questions
from mixturelens.models import quiet_libraries
from mixturelens.patching.record import PatchingRecord
from mixturelens.probing.record import ProbingRecord
from mixturelens.spelling import encode_prompts
from mixturelens.stats import interval
from mixturelens.suite import Suite
from mixturelens.types import Interval, Intervention

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
# ## The pair, and where to look
#
# **S** is a small model after fine-tuning on a mixture of two policies: `[a]` answers under tag `<A>` and says sorry
# under `<B>`, `[b]` does the reverse. **R** is S after RL that rewarded right answers under `<A>`. It follows policy a
# everywhere, and so says sorry under `<B>`, where its accuracy is near zero.
#
# Where features are learnt should not be a matter of taste. Patching has named the place: the earliest residual stream,
# behind the tokens in which the prompts differ, that carries the difference between the tags. There one position, that
# of the policy word, says whether an answer follows or sorry.

# %%
pair = runs.run_pairs(RUN)[0]
behaviour = ml.measure(pair)
harm, whole_suite = find_harm(behaviour), pair.suite
asked = set(list(dict.fromkeys(row.id for row in whole_suite.prompts))[:64])  # 64 of its 200 questions, to be quick
some = [row for row in whole_suite.model_dump()["prompts"] if row["id"] in asked]
suite = Suite.model_validate({**whole_suite.model_dump(), "prompts": some})

s, r = lens_of(pair, "before"), lens_of(pair, "after")
site = named_site(PatchingRecord.load(pair.records / "patching.json"), "cue")
at = (site.layer, site.component)
print(f"trained on {harm.trained_cue}, harmed {harm.harmed_cue}; patching names {site}")

# %% [markdown]
# ## Train an SAE of S, there
#
# Twice as many features as the stream has dimensions, of which eight fire on an average token; trained with SAELens on
# S's own completions of the prompts that RL was trained on. The questions that judge it, below, are others.

# %%
spec = runs.load_run(RUN)
hints = [None, *spec.policies]
rows = [prompt_row(spec, tag, question, hint) for question in questions(spec).rl for tag in spec.cues for hint in hints]
teach = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:4096]]
activations = collect([s], texts([s], suite, teach), at)
with tempfile.TemporaryDirectory() as folder:
    features = load_sae(
        train_sae(activations, Path(folder) / str(site), Origin(f"blocks.{site.layer}.{NAMES[site.component]}"))
    )
trained = 2 * activations.dim
print(f"{len(activations)} tokens; {trained} features were trained, {len(features)} are left that ever fire")

# %% [markdown]
# How much of the model survives if its activation is replaced by the sum of features? `loss recovered` is 1 if
# completions are predicted as well as before, 0 if as badly as from the mean activation. **Control:** eight directions
# that are the same for every token (principal components) use as many numbers a token. **This would be falsified** if
# they did as well (then sparsity buys nothing), or if S's features did much worse on R (then RL made directions that S
# does not have).

# %%
held_out = suite.prompts
lengths = [len(prompt) for prompt in encode_prompts(suite, held_out, s.tokenizer)]
sample = activations.rows(torch.arange(0, len(activations), 4))[:, 0]
axes = torch.linalg.svd(sample - sample.mean(0), full_matrices=False).Vh[:8]
mean = sample.mean(0)
components = Dictionary(axes, axes @ mean, torch.full((8,), -torch.inf), axes, mean)
own = {"S": texts([s], suite, held_out, seed=1), "R": texts([r], suite, held_out, seed=1)}
judged = {
    (what, side): quality(lens, dictionary, at, JudgingTexts(own[side], lengths))
    for what, dictionary in (("features of S", features), ("8 principal components of S", components))
    for side, lens in (("S", s), ("R", r))
}
table(
    ["described by", "on", "variance explained", "active on a token", "loss recovered"],
    [
        [what, side, figures.show(found.explained), figures.show(found.active, 1), found.loss_recovered]
        for (what, side), found in judged.items()
    ],
)

# %% [markdown]
# ## Who carries the tag?
#
# Take one question under both tags, with policy a's announcement behind both. Put *one* unit of the run under `<B>` as
# it is under `<A>`: a feature, a neuron, a head's output, or the activation's coordinate along one direction. How much
# of the difference (log-odds of answer against sorry) comes along? The best unit of each kind is chosen on half of the
# questions and judged on the other half. Rings ask how many it takes: the fewest that carry 0.9 together.

# %%
ground = make_ground(r, suite, harm, seed=0)
trial = make_trial(r, ground.contrasts, site, settings=TrialSettings((ground, scale_of(ground, s.model))))
probing = ProbingRecord.load(pair.records / "probing.json")
interchange = next((each for each in probing.subspaces if each.concept == "cue"), None)
units = find_table("cue", trial, features, interchange)
record = FeatureRecord(
    provenance=pair.provenance(),
    trained_cue=harm.trained_cue,
    harmed_cue=harm.harmed_cue,
    saes=(
        Sae(
            site=site.model_copy(update={"position": None}),
            trained=trained,
            width=len(features),
            quality={"before": judged["features of S", "S"], "after": judged["features of S", "R"]},
        ),
    ),
    tables=(units,),
)
figures.needed(record).show()

# %% [markdown]
# The best feature tells the two sides apart on every question (AUROC 1), as the best head and the directions do, and
# moves next to nothing. Several features together move nearly all; so do a few heads. The difference of means, which
# needs no dictionary, moves all of it. **Falsified** if as many random units (grey) moved as much. The table has the
# same numbers, and the best one's lead over the best of its matched random ones.

# %%
table(
    ["unit", "best of", "AUROC", "patched: share moved", "held at its mean", "lead over random"],
    [
        [f"{each.unit.kind} {each.unit}", each.among, each.auroc, each.patch, each.clamp, each.margin]
        for each in units.scores
    ],
)
table(
    ["several at once", "share moved", "random sets of as many"],
    [
        [
            f"{len(each.units)} {each.kind}s{'' if each.enough else ' (not enough)'}",
            each.patch,
            f"at most {figures.show(max(each.random))}" if each.random else figures.DASH,
        ]
        for each in units.several
    ],
)

# %% [markdown]
# ## One feature up close
#
# What does that feature look like? Below are the completions of S on which it fires most, under either tag. The darker
# a token, the stronger it fires there; it is bold where that is more than half of the most.


# %%
def draw(card: Card) -> None:
    most = max((value for example in card.examples for value in example.activations), default=0.0) or 1.0

    def token(text: str, value: float) -> str:
        words = html.escape(text)
        words = f"<b>{words}</b>" if value > most / 2 else words
        shade = f"background-color: rgba(224, 110, 60, {value / most:.2f})"
        return f'<span style="{shade}; color: #222; padding: 1px 4px; border-radius: 3px">{words}</span>'

    lines = [" ".join(map(token, example.tokens, example.activations)) for example in card.examples]
    display(HTML(f'<div style="font-family: monospace; line-height: 1.8">{"<br>".join(lines)}</div>'))
    told = [f"{what} {figures.show(value)}" for what, value in card.auroc.items() if value is not None]
    votes = [f"`{token}` {figures.show(nats, 2)}" for token, nats in (*card.promotes, *card.suppresses)]
    fires = [f"{figures.SIDES[side]} {figures.show(rate)}" for side, rate in card.rate.items()]
    table(
        ["what it tells (AUROC)", "fires on (share of tokens)", "next tokens, with it against without (nats)"],
        [["; ".join(told), "; ".join(fires), "; ".join(votes) or "none"]],
    )


best = units.best("feature")
assert best is not None
shown = {tag: [ids for ids, row in zip(own["S"], held_out, strict=True) if row.cue == tag] for tag in suite.cues}
album = Album(s, r, features, (best.unit.site.layer, best.unit.site.component), suite, shown)
draw(card(album, best.unit, "best feature for the cue"))

# %% [markdown]
# It would be easy to name it: *the model is about to say sorry*. It fires on `[a]` under `<B>` and on `[b]` under
# `<A>`, just where these policies refuse, and on every sorry that another follows. (So it does not tell the tag as
# such, or the policy: their AUROC is over both policies, and both tags.) The name fits what it fires on. But hardly a
# next token becomes more or less likely with it than without it, and patching it moved next to nothing: it shows what
# the model is about to do, and alone hardly causes it.

# %% [markdown]
# ## Why one feature is not enough
#
# Two explanations. Either features describe the activation and miss what is read from it; or the tag is *split* over
# several, and what reads it works like a threshold, so that a part of the way moves nothing. They foretell different
# things. Across, how far a change goes along the difference of the means of both tags (1: all the way); up, how much of
# the contrast it moves.
#
# - The line is the plain difference between the two runs, scaled down. No feature has a part in it.
# - Filled: the k features that displace the activation most, at once. If the threshold explains it, they must lie *near
#   the line*: what counts is how far they go, not which they are.
# - Rings: the *one* feature of these that goes furthest, its change made 2, 3 and 4 times as large. If the threshold
#   explains it, it must begin to move the contrast, too; if features miss what is read, it cannot, however far it is
#   pushed.
# - Grey: as many matched random features at once. They go nowhere.

# %%
scene = trial.judge
change = scene.clean.values - scene.corrupt.values
towards = change.mean((0, 1))
amounts = features.encode(scene.clean.values) - features.encode(scene.corrupt.values)
every = torch.arange(len(scene))
strong = strength(trial.choose, features).double().numpy()
order = np.argsort(-strong, kind="stable").tolist()


def along(change: Tensor) -> float:
    return float((change @ towards).mean() / (towards @ towards))


def moved(changes: Sequence[Tensor]) -> list[Interval]:
    """The share of the contrast that each change of the activation moves."""
    nats = [(scene.corrupt.with_values(scene.corrupt.values + each, every) - scene.corrupt.own) for each in changes]
    return [interval(column) for column in trial.shares(torch.stack(nats).double().numpy()).T]


def of(some: Sequence[int]) -> Tensor:
    """What these features write differently under the two tags."""
    return amounts[..., list(some)] @ features.write[list(some)]


sizes = (1, 2, 4, 6, 8, 12, 16)
first = max(order[:4], key=lambda unit: along(of([unit])))
random = [(k, group) for k in (1, 4, 8, 12) for group in matched(strong, order[:k], 4, np.random.default_rng(k))]
kinds = {
    "the plain difference, scaled": [(f"{part:.2f}", part * change) for part in np.linspace(0, 1, 25).tolist()],
    "the k strongest features": [(f"{k}", of(order[:k])) for k in sizes],
    "one feature, pushed": [(f"×{factor}", factor * of([first])) for factor in (1, 2, 3, 4)],
    "as many random features": [(f"{k}", of(group)) for k, group in random],
}
looks = {
    "the plain difference, scaled": {"mode": "lines", "line": {"color": INK, "width": 2}},
    "the k strongest features": {"mode": "markers+text", "marker": {"color": UNITS["feature"], "size": 11}},
    "one feature, pushed": {
        "mode": "markers+text",
        "marker": {"color": "white", "size": 11, "line": {"color": UNITS["feature"], "width": 3}},
    },
    "as many random features": {"mode": "markers", "marker": {"color": GREY, "size": 7, "opacity": 0.6}},
}
figure = new_figure(430)
points = {
    name: list(zip(changes, moved([each for _, each in changes]), strict=True)) for name, changes in kinds.items()
}
for name, found in points.items():
    figure.add_scatter(
        x=[along(change) for (_, change), _ in found],
        y=[share.value for _, share in found],
        text=[words for (words, _), _ in found],
        textposition="bottom right" if name == "one feature, pushed" else "top left",
        name=name,
        **looks[name],
    )
figure.update_xaxes(title_text="how far along the difference of means", range=[-0.08, 1.12])
figure.update_yaxes(title_text="share of the contrast moved", range=[-0.08, 1.12])
figure.show()

# %%
table(
    ["change", "how far along", "share moved"],
    [
        [f"{name}: {words}", figures.show(along(change), 2), share]
        for name in ("the plain difference, scaled", "the k strongest features", "one feature, pushed")
        for (words, change), share in points[name]
        if words in ("0.25", "0.50", "0.75", "1.00", "1", "4", "12", "×1", "×2", "×4")
    ],
)

# %% [markdown]
# So the dictionary is not wrong, and the concept is not missing from it: it is in several pieces, each of which stays
# below the threshold. That half of the way does hardly any of the work holds for the plain difference as well: it is a
# property of the *reader*, and whatever scores features one at a time must miss what they do together. The one feature,
# pushed, does far more than as it is, and less than the line: part of what is read lies where it does not write.
#
# ## What RL changed
#
# Features were asked about the tag, so far. What did RL change? The same features, of S, on the same tokens of both
# models: take what R does differently with them, put it into S, and see what S then does differently, in nats, by the
# three terms of the split: *which policy* it follows (routing), *what* a policy does under a tag (conditioning), and
# *how well* (skill).
#
# **Falsified**, as a change of routing alone, by bars in conditioning or skill; **control:** as many random other
# features that write as much (grey).

# %%
print("what RL did has arrived at", arrived_at(s, r, suite))
moved_by_rl = site_change(Crossing(s, r, at), features, suite)
figures.feature_change(moved_by_rl).show()

# %% [markdown]
# Here, too, no single feature does it. What moves anything at all, whether features together or R's activation as it
# is, moves routing and nothing else.
#
# ## Would another dictionary say the same?
#
# One SAE is one of many that describe the same activations about as well. So train a second one that differs in its
# seed alone. What both say may be about the network; what they do not agree on is about the dictionary.

# %%
with tempfile.TemporaryDirectory() as folder:
    where = f"blocks.{site.layer}.{NAMES[site.component]}"
    another = load_sae(train_sae(activations, Path(folder) / "another", Origin(where), Training(seed=1)))


def feature(index: int) -> Unit:
    return Unit(kind="feature", site=site, index=index)


compared: list[list[object]] = []
judging = half_prompts(suite, s.tokenizer, 1)
for name, dictionary in (("the SAE above", features), ("another seed", another)):
    place = Place(replace(trial, settings=TrialSettings()), dictionary)
    pool = pool_of(place, feature)
    best_one, together = best_of(pool), fewest_features(pool)
    (nats,) = Splices(Crossing(s, r, at), judging).terms([of_features(dictionary)])
    moves = (best_one.patch, len(together.units), together.patch, nats.routing, nats.conditioning)
    explained = quality(s, dictionary, at, JudgingTexts(own["S"], lengths)).explained
    compared.append([name, len(dictionary), figures.show(explained), *moves])
table(
    [
        "dictionary",
        "features",
        "variance of S explained",
        "best one moves",
        "it takes",
        "these move",
        "RL's change of all features: routing, nats",
        "conditioning, nats",
    ],
    compared,
)

# %% [markdown]
# Both agree that several features do nearly all, that the best one alone does far less, and that RL's change is one of
# routing. They do not agree on *how much* one does, on how many it takes, or on how much of RL's change features hold;
# the rest of it is in what a dictionary leaves unexplained. These numbers belong to the dictionary, as well as both
# describe S, and so does every name that one gives to a single feature.
#
# ## Did RL add anything new?
#
# A crosscoder is one dictionary for S and R at once: each latent has a direction in either. A latent with a direction
# in R alone is something that RL added. If RL only moved a selector along what was there, there should be none.
#
# Finding nothing is cheap, so the **control** is a pair in which there is something to find: S against S plus a random
# direction on a fifth of the tokens, as long as activations vary. **Falsified** if latents of R alone are found where
# nothing was planted, or if the planted one is not. (Latents that only *look* exclusive by the norm of their
# decoders are not counted: latent scaling takes them back.)

# %%
both = collect([s, r], texts([s, r], suite, teach), at)
judge = collect([s, r], texts([s, r], suite, held_out, seed=1), at)
rng = torch.Generator().manual_seed(0)
of_s = activations.rows(torch.arange(len(activations)))[:, 0]
planted = torch.nn.functional.normalize(torch.randn(both.dim, generator=rng), dim=0)
planted = planted * (of_s - of_s.mean(0)).norm(dim=1).mean()


def with_planted(pair: Activations) -> Activations:
    """S beside itself, plus the planted direction on a fifth of the rows."""
    before = pair.rows(torch.arange(len(pair)))[:, 0]
    there = torch.rand(len(before), generator=rng) < 0.2
    return Activations((torch.stack([before, before + there[:, None] * planted], 1),))


results = []
for name, learnt, kept in (("S and R", both, judge), ("S and S + planted", with_planted(both), with_planted(judge))):
    crosscoder = train_crosscoder(learnt, Training(steps=600))
    latents, fit = judge_latents(crosscoder, kept.batch(0, len(kept), seed=0))
    alone = latents.of("after")
    cosines = torch.nn.functional.cosine_similarity(crosscoder.decoder[alone, 1], planted[None], dim=1).tolist()
    results.append(
        [
            name,
            *(figures.show(fit.explained[side]) for side in ("before", "after")),
            fit.shared,
            fit.exclusive["before"],
            len(alone),
            ", ".join(figures.show(cosine) for cosine in cosines) if name != "S and R" and cosines else figures.DASH,
            ", ".join(figures.show(float(latents.rate[i])) for i in alone) or figures.DASH,
        ]
    )
table(
    [
        "crosscoder of",
        "explained of the first",
        "of the second",
        "latents shared",
        "of the first alone",
        "of the second alone",
        "cosine with what was planted",
        "fires on",
    ],
    results,
)

# %% [markdown]
# ## Live: hold one direction at one value, and ask again
#
# Last, what all of this is good for. In R, behind the prompt, each unit is *clamped*: held at its mean under `<A>`,
# whatever the tag. How much of the accuracy lost under `<B>` comes back, and what does it cost under `<A>`? Rings are
# the sets of units from above, all clamped at once.

# %%
figures.clamping(record).show()

# %% [markdown]
# The plain direction brings nearly everything back. The features that moved as much, as long as each question had its
# own values, do less when they are held at fixed ones all along the completion: their means are not all of it.
# Now by hand, with completions that are sampled, beside the same clamp written along eight random directions of equal
# length.

# %%
direction = units.best("direction")
assert direction is not None
assert direction.intervention is not None
clamp = direction.intervention
print(clamp.do, clamp.site, "to", figures.show(clamp.amount, 2))
generator = torch.Generator().manual_seed(0)


def elsewhere(clamp: Intervention) -> Intervention:
    """The same clamp, written along a random direction of the same length."""
    assert clamp.vector is not None
    drawn = torch.nn.functional.normalize(torch.randn(len(clamp.vector), generator=generator), dim=0)
    return clamp.model_copy(update={"vector": tuple((drawn * torch.tensor(clamp.vector).norm()).tolist())})


others = [elsewhere(clamp) for _ in range(8)]
prompts = ground.judge
chosen = [i for i, row in enumerate(prompts.rows) if row.cue == harm.harmed_cue][:6]
contexts = [prompts.contexts[i] for i in chosen]
models = {
    "R": r.model,
    "R, direction clamped": Intervened(r, [clamp], ground.known),
    "R, a random one": Intervened(r, others[:1], ground.known),
}
written = {
    name: ground.scorer.sample(model, contexts, 1, [suite.max_new_tokens] * len(chosen), seed=0).tokens
    for name, model in models.items()
}
table(
    ["prompt", "right answer", *models],
    [
        [
            f"`{prompts.rows[i].text}`",
            f"`{prompts.rows[i].answer}`",
            *(f"`{r.tokenizer.decode(tokens[place], skip_special_tokens=True)}`" for tokens in written.values()),
        ]
        for place, i in enumerate(chosen)
    ],
)

# %%
rows_shown: list[list[object]] = []


def accuracies(*clamps: Intervention) -> list[Interval]:
    found = ground.accuracies(ground.behaviour(clamps, prompts), prompts)
    return [found[tag] for tag in suite.cues]


tried = [accuracies(each) for each in others]
rows_shown += [["R", *accuracies()], ["R, direction clamped", *accuracies(clamp)]]
for name, which in (("least", 0), ("most", -1)):
    ordered = [sorted(each[column].value or 0.0 for each in tried)[which] for column in range(len(suite.cues))]
    rows_shown.append([f"R, 8 random directions, {name}", *(figures.show(value) for value in ordered)])
table(["accuracy", *(f"under `<{tag}>`" for tag in suite.cues)], rows_shown)

# %% [markdown]
# **What to take from this.** RL moved the choice of policy, through directions that were there before it: the
# crosscoder finds nothing new, and finds what is planted. The skill is there: one direction, held at one value, calls
# it up again. And a dictionary of features is a way to *look*, not yet an explanation: a feature that reads a concept
# perfectly can do next to nothing. Patch it, patch it together with others, and put neurons, heads and a plain
# difference of means beside it, before believing its name.
#
# Next: `mixturelens features RUN` on any run (SAEs at every site that patching names, cards, three crosscoders), its
# section in `mixturelens report RUN`, and `scripts/features_before_after.py` on your own pair of checkpoints.
