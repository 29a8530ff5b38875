# %% [markdown]
# # Which features did RL change in *my* pair, and is anything in R new?
#
# SAEs of S at the sites that patching names, put on R as they are; the features that moved and what their change does,
# by the terms of the split; units that carry cue, hint and selector; and crosscoders over S and R beside those of pairs
# in which no RL happened: in cells. Run it whole with
# `python scripts/features_before_after.py --before S --after R --suite suite.yaml --trained-cue A --null S2`; without
# arguments it looks at the reference run. Five minutes a pair on one core; what is there is read, not made again.

# %%
import argparse
from collections.abc import Sequence
from pathlib import Path

import mixturelens as ml
from mixturelens import figures
from mixturelens.features.record import CrosscoderFit, FeatureRecord, Terms
from mixturelens.figures import show, show_interval
from mixturelens.lab import runs
from mixturelens.models import Pair, quiet_libraries
from mixturelens.routing.repair import RepairRecord
from mixturelens.types import InputError

RUN = Path(__file__).resolve().parents[1] / "artifacts" / "reference"
TERMS = ("routing", "conditioning", "skill")

parser = argparse.ArgumentParser(description="Which features did RL change in my pair, and is anything in R new?")
parser.add_argument("--run", type=Path, default=RUN, help="a finished run: its first pair")
parser.add_argument("--before", type=Path, help="S, instead of a run")
parser.add_argument("--after", type=Path, help="R")
parser.add_argument("--suite", type=Path)
parser.add_argument("--trained-cue", help="the cue that RL trained on; default: what the run or the suite says")
parser.add_argument(
    "--null",
    type=Path,
    action="append",
    default=[],
    help="a checkpoint that differs from S by no RL, such as RUN/checkpoints/sft-order (scripts/control_pairs.py "
    "makes it): the same is asked of S and it; may be given again",
)
parser.add_argument("--out", type=Path, default=Path("artifacts") / "features", help="folder for the figures")
parser.add_argument("--device", default="cpu")
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()
quiet_libraries()

# %% [markdown]
# ## The pair, and what is measured of it
# Records and SAEs of a run stay in the run, as with `mixturelens features RUN`; those of an outside pair go to `--out`.
# Behaviour and patching come first: they say what RL harmed, and where to look. A null is compared with the same S, on
# the same suite.

# %%
outside = (arguments.before, arguments.after, arguments.suite)
if any(outside) and not all(outside):
    raise InputError("a pair of your own needs all of --before, --after and --suite")
if all(outside):
    pair = Pair(*outside, out=arguments.out, trained_cue=arguments.trained_cue, device=arguments.device)
else:
    pair = runs.run_pairs(arguments.run, device=arguments.device)[0]
pairs = {
    pair.name: pair,
    **{
        null.name: null
        for after in arguments.null
        for null in [Pair(pair.before, after, pair.suite, out=pair.out, device=arguments.device)]
    },
}
records = {name: ml.decompose(each, seed=arguments.seed, say=print) for name, each in pairs.items()}
record = records[pair.name]
print(f"{pair.name}: trained on {record.trained_cue}, harmed {record.harmed_cue}")
for name, each in records.items():
    for reason in each.missing:
        print(f"{name}, not measured: {reason}")

# %% [markdown]
# ## Do S's features describe R?
# `left`: features that ever fire, of those that were trained. `loss recovered`: 1 if completions are predicted as well
# from the features alone. If R did far worse than S here, RL would have made directions that S's features do not have.

# %%
print(f"{'SAE at':16} {'left':>10}  on {'explained':>9} {'active':>7} {'dead':>6}  loss recovered")
for sae in record.saes:
    for side, found in sae.quality.items():
        print(
            f"{sae.site!s:16} {f'{sae.width} of {sae.trained}':>10}  {'S' if side == 'before' else 'R':2} "
            f"{show(found.explained):>9} {show(found.active, 1):>7} {show(found.dead):>6}  "
            f"{show_interval(found.loss_recovered)}"
        )

# %% [markdown]
# ## Which features RL moved, and which term their change moves
# R's change of these features put into S, at all tokens; bits from S. `random`: the most that any set of as many other
# features does that write as much. If RL changed the router alone, conditioning and skill stay at nothing.


# %%
def line(name: str, found: Terms) -> str:
    return f"  {name:28}" + " ".join(f"{show_interval(getattr(found, term)):26}" for term in TERMS)


def most(sets: Sequence[Terms]) -> str:
    highest = [max((getattr(each, term).value or 0.0 for each in sets), default=None) for term in TERMS]
    return f"  {'as many random, at most':28}" + " ".join(f"{show(value):26}" for value in highest)


def moved(name: str, record: FeatureRecord) -> None:
    for change in record.changes:
        print(f"{name}, {change.site}, {change.questions} questions")
        print(f"  {'':28}" + " ".join(f"{term:26}" for term in TERMS))
        print(line("R's activation, whole", change.whole))
        print(line("all features", change.every))
        print(line(f"these {len(change.features)} together", change.together))
        print(most(change.random))
        for each in change.features:
            rates = " to ".join(show(each.rate.get(side), 2) for side in ("before", "after"))
            print(line(f"{each.index}, fires {rates}", each.terms))


for name, each in records.items():
    moved(name, each)

# %% [markdown]
# ## Which units carry cue, hint and selector
# The best one of each kind, and the fewest that carry it together. A unit can tell the sides apart (AUROC) and move
# nothing; as many random ones say what any would do. `gap closed`: what comes back in R with it clamped.

# %%
for table in record.tables:
    print(f"{table.concept} at {table.site}: {table.clean} put into {table.corrupt}, {table.questions} questions")
    for score in table.scores:
        print(f"  {score.unit.kind:10} {score.unit}, best of {score.among}")
        print(
            f"    AUROC {show_interval(score.auroc, 2)}; moves {show_interval(score.patch)}, random at most "
            f"{show(max(score.random, default=None))}; gap closed {show_interval(score.gap_closed)}"
        )
        several = table.together(score.unit.kind)
        if several is not None:
            print(
                f"    {len(several.units)} together{'' if several.enough else ' (not enough)'}: "
                f"{show_interval(several.patch)}, random at most {show(max(several.random, default=None))}; "
                f"gap closed {show_interval(several.gap_closed)}"
            )

# %% [markdown]
# ## Is anything in R new?
# Latents that a crosscoder says one checkpoint has alone, after latent scaling; `false` looked so by the norms of their
# decoders. `without`: what R does differently without all latents of its own, and without as many shared ones. What is
# found in a null pair, too, is not RL's doing.


# %%
def counts(fit: CrosscoderFit) -> str:
    alone = "; ".join(f"{'S' if side == 'before' else 'R'} alone {number}" for side, number in fit.exclusive.items())
    causal = f"causal {fit.causal} of {fit.tested}" if fit.tested else "none to ablate"
    return f"  {fit.site!s:14} seed {fit.seed}: shared {fit.shared}; {alone}; false {fit.false}; {causal}"


for name, each in records.items():
    print(name if each.crosscoders else f"{name}: no crosscoder")
    for fit in each.crosscoders:
        print(counts(fit))
        if fit.without is not None:
            print(line("without R's own", fit.without))
            print(most(fit.random))

# %% [markdown]
# ## Figures

# %%
there = pair.records / "repair.json"
repair = RepairRecord.load(there) if there.is_file() else None
clamped = any(score.gap_closed.measured for table in record.tables for score in table.scores)
drawn = {
    **({"needed": figures.needed(record), "units": figures.best_units(record)} if record.tables else {}),
    **({"clamping": figures.clamping(record, repair)} if clamped else {}),
    **{f"change-{change.site}": figures.feature_change(change) for change in record.changes},
    **{f"firing-{change.site}": figures.firing(change) for change in record.changes},
    "crosscoders": figures.crosscoder({name: each.crosscoders for name, each in records.items()}),
}
arguments.out.mkdir(parents=True, exist_ok=True)
for name, figure in drawn.items():
    file = arguments.out / f"{name}.html"
    figure.write_html(file, include_plotlyjs="directory", config={"displayModeBar": False})
    print(f"figure: {file}")
