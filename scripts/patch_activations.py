# %% [markdown]
# # Where does *my* model read the cue?
#
# Activation patching by hand, in cells: take a question under two cues with the same policy put in place, run both,
# copy one activation at a time from the one run into the other, and see how far the next word follows. Run it whole
# with `python scripts/patch_activations.py --before S --after R --suite suite.yaml --trained-cue A`; without arguments
# it looks at the reference organism. A minute on one core.

# %%
import argparse
import itertools
from dataclasses import replace
from pathlib import Path

from mixturelens import figures
from mixturelens.behaviour.harmed import find_harm
from mixturelens.behaviour.pair import behaviour_record
from mixturelens.contrasts import cue_contrasts
from mixturelens.figures import show_interval
from mixturelens.hooks.lens import lens_of
from mixturelens.models import Pair, quiet_libraries
from mixturelens.patching.record import Effect, Sweep
from mixturelens.patching.sweep import find_reader, patch
from mixturelens.stats import interval, mean_interval, resample_counts, resampled_mean
from mixturelens.suite import load_suite
from mixturelens.types import PER_HEAD, Site

RUN = Path(__file__).resolve().parents[1] / "artifacts" / "reference"

parser = argparse.ArgumentParser(description="Where does my model read the cue?")
parser.add_argument("--before", default=RUN / "checkpoints" / "sft", help="S")
parser.add_argument("--after", default=RUN / "checkpoints" / "rl-A", help="R, which is patched")
parser.add_argument("--suite", type=Path, default=RUN / "suite.yaml")
parser.add_argument("--trained-cue", help="the cue that RL trained on; default: what the suite says, else its first")
parser.add_argument("--components", nargs="+", default=["resid_pre", "attn_out", "mlp_out", "z"])
parser.add_argument("--out", type=Path, default=Path("artifacts") / "patching", help="folder for the heat maps")
parser.add_argument("--device", default="cpu")
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()
quiet_libraries()

# %% [markdown]
# ## What RL did, which says what to look at
# The cue whose accuracy it harmed, and the policy that it made the model follow everywhere.

# %%
suite = load_suite(arguments.suite)
trained_cue = arguments.trained_cue or suite.trained_cue or suite.cues[0]
suite = suite.model_copy(update={"trained_cue": trained_cue})
pair = Pair(arguments.before, arguments.after, suite, device=arguments.device)
behaviour = behaviour_record(pair, seed=arguments.seed)
pair = pair.spelled(behaviour.spelling)
suite = pair.suite
harm = find_harm(behaviour)
for cue, state in behaviour.per_cue.items():
    if state.after is not None:
        print(f"accuracy under {cue}: {state.before.overall:.4f} before, {state.after.overall:.4f} after")
print(f"trained on {harm.trained_cue}, harmed {harm.harmed_cue}; the policy it follows: {harm.policy}")

# %% [markdown]
# ## The contrast
# Two prompts that differ in the cue alone, token by token, with the policy's announcement behind both. The metric is
# how much likelier the first word of the answer is than the other behaviour, in nats.

# %%
lens = lens_of(pair, "after")
contrasts = cue_contrasts(suite, lens.tokenizer, harm.policy, harm.cues)
row = contrasts.rows[0]
for side, ids in (("clean", row.clean), ("corrupt", row.corrupt)):
    print(f"{side:8}", *lens.tokenizer.convert_ids_to_tokens(list(ids)))
print("spans   ", row.spans)
print("metric   log P", lens.tokenizer.decode(row.target), "- log P", lens.tokenizer.decode(row.foil))

# %% [markdown]
# ## Patch every component, at every named position
# `patch` captures the clean run once and sweeps the sites through the exact engine, which computes only what a patch
# can change. An effect is `(patched - corrupt) / (clean - corrupt)`, with a bootstrap interval over questions. The same
# the other way round (corrupt into clean, `noise`) tells what is needed from what suffices.

# %%
shared = set.intersection(*(set(each.spans) for each in contrasts.rows))
positions = sorted(shared, key=lambda name: row.spans[name])
sites = [
    Site(layer=layer, component=component, head=head, position=position)
    for layer in range(lens.layers)
    for component in arguments.components
    for head, position in itertools.product(
        range(lens.heads_of(component)) if component in PER_HEAD else (None,), positions
    )
]
counts = resample_counts(len(contrasts.rows), arguments.seed)
sweeps = {}
for direction in ("denoise", "noise"):
    patched = patch(lens, contrasts, sites, direction=direction)
    draws = patched.effects(counts)
    sweeps[direction] = Sweep(
        kind="cue",
        checkpoint="after",
        direction=direction,
        clean=contrasts.clean,
        corrupt=contrasts.corrupt,
        policy=harm.policy,
        questions=len(contrasts.rows),
        target=f"answer under {harm.trained_cue}",
        foil=f"behaviour under {harm.harmed_cue}",
        base=mean_interval(patched.base, counts),
        goal=mean_interval(patched.goal, counts),
        effects=tuple(Effect(site=site, effect=interval(draws[:, i], counts)) for i, site in enumerate(sites)),
    )
print(f"{len(sites)} sites x {len(contrasts.rows)} questions, both ways")
print(f"metric: corrupt {show_interval(sweeps['denoise'].base)}, clean {show_interval(sweeps['denoise'].goal)}")

# %% [markdown]
# ## The strongest sites
# Most of the residual stream only hands on what others wrote: look for the first site that carries the cue, and for
# heads.

# %%
needed = {effect.site: effect.effect for effect in sweeps["noise"].effects}
ranked = sorted(sweeps["denoise"].effects, key=lambda effect: -(effect.effect.value or 0.0))
print(f"{'site':24} {'suffices':26} is needed")
for kind in arguments.components:
    for effect in [effect for effect in ranked if effect.site.component == kind][:4]:
        suffices, needs = show_interval(effect.effect), show_interval(needed[effect.site])
        print(f"{effect.site!s:24} {suffices:26} {needs}")

# %% [markdown]
# ## Heads that read the cue, judged on questions that did not choose them
# The strongest of many sites is strong by chance too. So the heads are chosen on half of the questions, and their joint
# effect is measured on the other half, beside that of the best other heads there.

# %%
if lens.heads > 1 and "policy" in shared:
    reader = find_reader(lens, contrasts, "policy", arguments.seed)
    print("cue reader:", " + ".join(map(str, reader.heads)))
    print(f"  chosen at {reader.chosen_effect:.3f} of the contrast")
    print(f"  on the other half {show_interval(interval(reader.effect))}")
    print(f"  which is {show_interval(interval(reader.margin))} more than {' + '.join(map(str, reader.rival))}")

# %% [markdown]
# ## What would have falsified it
# An activation of *another question under the same cue* carries the question and not the cue. If it moved the metric as
# well, the effects above would be about questions.

# %%
turned = (*contrasts.rows[1:], contrasts.rows[0])
same_cue = tuple(replace(row, clean=other.corrupt) for row, other in zip(contrasts.rows, turned, strict=True))
best = [effect.site for effect in ranked if effect.site.component not in ("resid_pre", "resid_mid", "resid_post")][:5]
clean = patch(lens, contrasts, best)
control = patch(lens, replace(contrasts, rows=same_cue), best)
gap = resampled_mean(clean.goal - clean.base, counts)
for i, site in enumerate(best):
    nothing = interval(resampled_mean(control.patched[i] - control.base, counts) / gap, counts)
    print(f"{site!s:24} effect {show_interval(interval(clean.effects(counts)[:, i], counts)):26}", end=" ")
    print(f"same cue, another question {show_interval(nothing)}")

# %% [markdown]
# ## Heat maps
# One page a component; hover for intervals.

# %%
arguments.out.mkdir(parents=True, exist_ok=True)
for direction, sweep in sweeps.items():
    for component in arguments.components:
        file = arguments.out / f"{direction}-{component}.html"
        figure = figures.patching_map(sweep, component)
        figure.write_html(file, include_plotlyjs="directory", config={"displayModeBar": False})
        print(f"figure: {file}")
