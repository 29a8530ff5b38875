# %% [markdown]
# # What can be read in *my* pair, and what is used?
#
# Linear probes at every site of S and R, the cue erased where it is used and where it is not, the subspaces that carry
# cue and selector, and what RL added beside what a hint adds: in cells. Run it whole with
# `python scripts/run_probes.py --before S --after R --suite suite.yaml --trained-cue A`; without arguments it looks at
# the reference organism. With `--run RUN` it asks, at the end, every question of `probes/` of a finished run. A minute
# or two on one core.

# %%
import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from mixturelens import figures
from mixturelens.behaviour.harmed import find_harm, gained_and_lost
from mixturelens.behaviour.pair import behaviour_record
from mixturelens.contrasts import cue_contrasts, hint_contrasts
from mixturelens.figures import show, show_interval
from mixturelens.hooks.lens import Lens, lens_of
from mixturelens.models import Pair, quiet_libraries
from mixturelens.patching.sweep import find_reader
from mixturelens.probing.erase import Erasing
from mixturelens.probing.pair import READABLE, least_used
from mixturelens.probing.prompts import Own, ProbedSuite, own_policies
from mixturelens.probing.reader import reading_site
from mixturelens.probing.reading import Reading, read
from mixturelens.probing.readouts import Network, readouts, sites_of, to_probe, untrained_lens
from mixturelens.probing.record import Erasure, ProbingRecord, Readout, Subspace
from mixturelens.probing.shift import shifts
from mixturelens.probing.subspace import find_subspace
from mixturelens.suite import load_suite
from mixturelens.types import InputError, Side
from probes.contract import all_probes

RUN = Path(__file__).resolve().parents[1] / "artifacts" / "reference"

parser = argparse.ArgumentParser(description="What can be read in my pair, and what is used?")
parser.add_argument("--before", default=RUN / "checkpoints" / "sft", help="S")
parser.add_argument("--after", default=RUN / "checkpoints" / "rl-A", help="R")
parser.add_argument("--suite", type=Path, default=RUN / "suite.yaml")
parser.add_argument("--trained-cue", help="the cue that RL trained on; default: what the suite says, else its first")
parser.add_argument("--run", type=Path, help="a finished run: ask it every question of probes/")
parser.add_argument("--out", type=Path, default=Path("artifacts") / "probing", help="folder for record and figures")
parser.add_argument("--device", default="cpu")
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()
quiet_libraries()

# %% [markdown]
# ## What RL did, which says what to ask
# The policy that gained and the one that lost, the cue that was harmed, and the policy that R follows everywhere.

# %%
suite = load_suite(arguments.suite)
trained_cue = arguments.trained_cue or suite.trained_cue or suite.cues[0]
suite = suite.model_copy(update={"trained_cue": trained_cue})
pair = Pair(arguments.before, arguments.after, suite, device=arguments.device)
behaviour = behaviour_record(pair, seed=arguments.seed)
pair = pair.spelled(behaviour.spelling)
suite = pair.suite
policies = gained_and_lost(behaviour)
harm = find_harm(behaviour)
print(f"gained: {policies[0]}, lost: {policies[1]}; trained on {harm.trained_cue}, harmed {harm.harmed_cue}")

# %% [markdown]
# ## Linear probes at every site
# One probe for each target, layer, component, head and position, fitted on one half of the questions and scored on the
# other. What a score means is said by the three beside it: `S on R` are S's probes on R as they are, `untrained` the
# same on random weights (what the tokens alone give), `shuffled` what a probe makes of meaningless labels.

# %%
before, after = lens_of(pair, "before"), lens_of(pair, "after")
lenses: dict[Network, Lens] = {"before": before, "after": after, "untrained": untrained_lens(pair, arguments.seed)}
prompts, announcements = to_probe(suite, pair.tokenizer)
where = sites_of(before, prompts)
networks: dict[Network, Reading] = {
    name: read(lens, prompts, where.keys, announcements) for name, lens in lenses.items()
}
both: tuple[Side, Side] = ("before", "after")
own: dict[Side, Own] = {
    side: own_policies(lenses[side], suite, prompts.rows["neutral"], networks[side].logs, arguments.seed)
    for side in both
}
probed = ProbedSuite(suite, pair.tokenizer, prompts, behaviour, policies)
scores = readouts(networks, own, where, probed, arguments.seed)
sites, labels, found, missing = scores.sites, scores.labels, scores.readouts, scores.missing
print(f"{len(sites)} sites x {len(found)} targets; positions: {', '.join(labels) or 'named spans'}")
print(f"{'target':10} {'best site in S':20} {'':8} {'S':24} {'R there':24} {'S on R':24} untrained shuffled chance")


def line(readout: Readout, at: int) -> str:
    columns = (readout.before, readout.after, readout.carried)
    three = " ".join(f"{show_interval(column.at(at)):24}" for column in columns)
    floor = f"{show(readout.untrained[at]):9} {show(readout.shuffled_high):8} {show(readout.chance)}"
    return f"{readout.target:10} {sites[at]!s:20} {readout.metric:8} {three} {floor}"


def learnt(readout: Readout) -> int | None:
    """The site that reads best beyond what the tokens alone give."""
    both = enumerate(zip(readout.before.value, readout.untrained, strict=True))
    gains = {n: score - floor for n, (score, floor) in both if score is not None and floor is not None}
    return max(gains, key=lambda n: gains[n], default=None)


for readout in found:
    at = readout.best
    print(line(readout, at) if at is not None else f"{readout.target:10} nowhere measured")
print("where S reads most beyond the untrained network:")
for readout in found:
    at = learnt(readout)
    if at is not None:
        print(line(readout, at))
for reason in missing:
    print("not asked:", reason)

# %% [markdown]
# ## Reading is not use
# The cue is erased (LEACE: the least change after which no linear probe reads it) at every site of R where it can be
# read, with R's policy put in place. What is left of the difference between cues says whether anything hangs on it.
# Erasers are fitted on half of the questions and judged on the other; random directions of equal rank are the null.

# %%
contrasts = cue_contrasts(suite, after.tokenizer, harm.policy, harm.cues, harm.shows)
cue = next(readout for readout in found if readout.target == "cue")
readable = [number for number, value in enumerate(cue.after.value) if value is not None and value >= READABLE]
erasing = Erasing(after, contrasts, arguments.seed)
erased = erasing.sites([sites[n] for n in readable], [cue.after.at(n) for n in readable])
needed = sorted((each for each in erased if each.left.measured), key=lambda each: each.left.value or 0.0)
print(f"the cue reads with at least {READABLE} at {len(readable)} of {len(sites)} sites")
print(f"{'erased at':20} {'readable':26} {'left of what it does':26} random directions, median")
for each in [*needed[:4], *needed[-4:]]:
    print(
        f"{each.site!s:20} {show_interval(each.readable):26} {show_interval(each.left):26} "
        f"{show(statistics.median(each.random) if each.random else None)}"
    )

# %% [markdown]
# ## In behaviour: P(answer given policy), erased where the cue is used and where it is not
# `used` is where the cue reader's heads take the cue from; `unused` the site that reads best among those whose erasure
# changes nothing.


# %%
def in_behaviour(name: str, one: Erasure) -> None:
    print(f"{name} at {one.site}: the cue reads with {show_interval(one.readable)}")
    for each, plain in one.plain.items():
        print(f"  P(answer) under {each}: {show_interval(plain)}, erased {show_interval(one.erased[each])}")
    null = f"random directions {show(min(one.random))} to {show(max(one.random))}"
    print(f"  left of the difference: {show_interval(one.left)}; {null}")
    print(f"  of the cue itself, on questions that did not fit the eraser: {show_interval(one.gap)}")


reader = find_reader(after, contrasts, "policy", arguments.seed)
print("cue reader:", " + ".join(map(str, reader.heads)))
used = erasing.in_behaviour(suite, reading_site(after, reader.heads, contrasts))
in_behaviour("used", used)
candidate = least_used(erased)
unused = erasing.in_behaviour(suite, candidate.site, candidate.readable) if candidate else None
if unused is not None:
    in_behaviour("unused", unused)
else:
    print("no site where the cue reads is surely unused")

# %% [markdown]
# ## The subspaces that carry cue and selector
# A few directions, learnt on S, such that a prompt that is given another prompt's coordinates does what the other's cue
# (or hint) asks for. Tested in R as they are, beside random subspaces and those learnt on shuffled labels.


# %%
def carried(subspace: Subspace) -> None:
    print(f"{subspace.concept}: {subspace.dimensions} direction(s) at {subspace.site}")
    for side, accuracy in subspace.accuracy.items():
        print(
            f"  interchange accuracy {side}: {show_interval(accuracy)}; random at most "
            f"{show(max(subspace.random[side]))}, shuffled at most {show(max(subspace.shuffled[side]))}"
        )


subspaces = [find_subspace(before, after, contrasts, "cue", arguments.seed)]
if suite.hinted:
    hint = hint_contrasts(suite, before.tokenizer, harm.trained_cue, *policies)
    subspaces.append(find_subspace(before, after, hint, "selector", arguments.seed))
for subspace in subspaces:
    carried(subspace)

# %% [markdown]
# ## Does RL make neutral prompts look, inside, like hinted ones?
# The mean of what R adds to S's activations on neutral prompts, beside the direction in which a hint for R's policy
# differs from one for the other. The null: differences between random halves of the same prompts.

# %%
moved = shifts(before, after, suite, policies, arguments.seed) if suite.hinted else ()
for each in sorted(moved, key=lambda shift: -(shift.cosine.value or 0.0))[:6]:
    print(f"{each.site!s:20} cosine {show_interval(each.cosine):24} null {show(each.null)}", end="  ")
    print(f"length along it, of the hint's own: {show_interval(each.along)}")

# %% [markdown]
# ## One record, and its figures

# %%
record = ProbingRecord(
    provenance=pair.provenance(arguments.seed),
    trained_cue=trained_cue,
    policies=policies,
    sites=sites,
    labels=labels,
    readouts=found,
    erased=erased,
    used=used,
    unused=unused,
    subspaces=tuple(subspaces),
    shifts=moved,
    missing=missing,
)
print("record:", record.save(arguments.out / "probing.json"))
drawn = {
    "readable": figures.readable(record),
    "cue": figures.readability(record, "cue"),
    "erasure": figures.erasure(record, suite.cues),
    "subspaces": figures.subspaces(record),
    **({"shifts": figures.shifts(record)} if moved else {}),
}
for name, figure in drawn.items():
    file = arguments.out / f"{name}.html"
    figure.write_html(file, include_plotlyjs="directory", config={"displayModeBar": False})
    print(f"figure: {file}")

# %% [markdown]
# ## Every question of `probes/`
# Each says beforehand what it foretells, and at which threshold it would be wrong. A refuted prediction is a result.


# %%
def ask_all(run: Path, names: Sequence[str] = ()) -> None:
    for name, probe in all_probes().items():
        if names and name not in names:
            continue
        try:
            answer = probe.run(run, arguments.seed)
        except InputError as error:
            print(f"{name}: cannot be asked here: {error}")
            continue
        word = {True: "holds", False: "refuted", None: "cannot say"}[answer.holds]
        print(f"{name}: {word}\n  foretold: {answer.prediction}\n  found: {answer.finding}")


if arguments.run is not None:
    ask_all(arguments.run)
