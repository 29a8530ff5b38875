# %% [markdown]
# # Which weights changed it?
#
# Copy one component's weights at a time from R into S, and see how much of what RL did comes along: in cells. Run it
# whole with `python scripts/graft_checkpoints.py --before S --after R --suite suite.yaml --trained-cue A`; without
# arguments it looks at the reference organism. A minute on one core.

# %%
import argparse
from collections.abc import Mapping
from pathlib import Path

from mixturelens import figures
from mixturelens.behaviour.grid import grid_of
from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.measure import measure
from mixturelens.behaviour.pair import behaviour_record
from mixturelens.behaviour.prompts import prepare
from mixturelens.figures import show, show_interval
from mixturelens.grafting.components import parts, weights_of
from mixturelens.grafting.graft import written
from mixturelens.grafting.pair import GraftSettings, graft_record
from mixturelens.grafting.record import Effects
from mixturelens.hooks.weights import components_of
from mixturelens.models import Pair, quiet_libraries
from mixturelens.stats import PROPORTION, interval
from mixturelens.suite import load_suite
from mixturelens.types import Interval

RUN = Path(__file__).resolve().parents[1] / "artifacts" / "reference"

parser = argparse.ArgumentParser(description="Which weights changed it?")
parser.add_argument("--before", default=RUN / "checkpoints" / "sft", help="S")
parser.add_argument("--after", default=RUN / "checkpoints" / "rl-A", help="R")
parser.add_argument("--suite", type=Path, default=RUN / "suite.yaml")
parser.add_argument("--trained-cue", help="the cue that RL trained on; default: what the suite says, else its first")
parser.add_argument("--out", type=Path, default=Path("artifacts") / "grafting", help="folder for record and figures")
parser.add_argument("--device", default="cpu")
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()
quiet_libraries()

# %% [markdown]
# ## What RL did

# %%
suite = load_suite(arguments.suite)
trained_cue = arguments.trained_cue or suite.trained_cue or suite.cues[0]
suite = suite.model_copy(update={"trained_cue": trained_cue})
pair = Pair(arguments.before, arguments.after, suite, device=arguments.device)
behaviour = behaviour_record(pair, seed=arguments.seed)
pair = pair.spelled(behaviour.spelling)
suite = pair.suite
for cue, state in behaviour.per_cue.items():
    if state.after is not None:
        print(f"accuracy under {cue}: {state.before.overall:.4f} before, {state.after.overall:.4f} after")

# %% [markdown]
# ## Which parameters belong together, and how far RL moved them
# A component is what one name of the network stands for, in any architecture. What did not change cannot carry
# anything.

# %%
tokenizer = pair.tokenizer
s, r = pair.model("before"), pair.model("after")
components = components_of(s, tokenizer)
state_s, state_r = weights_of(s), weights_of(r)
for part in parts(components, state_s, state_r):
    print(f"{part.name:12} {part.parameters:8} parameters, changed by {part.change:.5f} of their norm")
changed = [part.name for part in parts(components, state_s, state_r) if part.change > 0]

# %% [markdown]
# ## One graft by hand
# `written` puts other weights into a model for the length of a block, and the plain model is measured as ever.

# %%
prompts = prepare(suite, suite.neutral, tokenizer)
scorer = Scorer(pair.ends, pair.vocabulary, arguments.device)
grid = grid_of(prompts, arguments.seed)


def accuracies() -> Mapping[str, Interval]:
    """cue -> expected accuracy of what S has become, with its interval over questions."""
    draws = grid.draws(measure(scorer, s, prompts, arguments.seed).correct.sum(-1))
    return {cue: interval(draws[:, c], grid.counts, bounds=PROPORTION) for c, cue in enumerate(suite.cues)}


print(f"{'accuracy of':16}", *(f"cue {cue:22}" for cue in suite.cues))
for names in ([], changed[:1], changed):
    with written(s, {name: state_r[name] for each in names for name in components[each]}):
        found = accuracies()
    shown = "S" if not names else "R" if names == changed else f"S + R[{', '.join(names)}]"
    print(f"{shown:16}", *(f"{show_interval(found[cue]):26}" for cue in suite.cues))

# %% [markdown]
# ## All of them
# Grafts are judged by what they do to the policies' log-odds and weights (routing) and to what each policy usually does
# (specialists), with exact probabilities instead of samples. `weight` and `routing` are shares of R's change: 0 is S, 1
# is R. `chosen` and `done` say how far the graft is from S at all, in bits (0 to 1).

# %%
record = graft_record(
    pair,
    behaviour,
    GraftSettings(save_to=arguments.out / "rollback"),
    seed=arguments.seed,
    say=lambda step: print("...", step),
)
p, o = record.policies
print(f"{record.questions} questions; routing is log c_{p} / c_{o}")
for metric, change in record.change.items():
    print(f"  {metric:12} R less S: {show_interval(change)} nats")


def row(name: str, effects: Effects) -> str:
    of = (effects.weight, effects.routing, effects.specialists, effects.chosen, effects.done)
    return f"{name:22} " + " ".join(f"{show_interval(value):24}" for value in of)


header = f"{'':22} " + " ".join(f"{name:24}" for name in ("weight", "routing", "specialists", "chosen", "done"))

# %% [markdown]
# ## Who suffices, and who is needed
# S with one component of R, and R with one component of S. Where several suffice and none is needed, RL has written the
# same change more than once.

# %%
print("S + R[g]: is g enough?\n" + header)
for component in record.components:
    print(row(component.name, component.suffices))
for name, group in record.groups.items():
    print(row(name, group.effects))
print("\nR - R[g]: how much is left without g?\n" + header)
for component in record.components:
    print(row(component.name, component.without))
print("\nShapley shares of the routing:")
for component in record.components:
    print(f"  {component.name:12} {show_interval(component.shapley)}")

# %% [markdown]
# ## The 2 x 2: {selector} x {rest}
# The selector is the fewest components that carry the change, chosen on half of the questions and judged on the other
# half. If RL changed the routing, the selector alone makes S choose as R does, and the rest alone makes it choose as S.
# Random changes of the same size in the selector's place say what any change would do.

# %%
factorial = record.factorial
if factorial is not None:
    print(f"selector: {' + '.join(factorial.selector)}{'' if factorial.enough else ' (not enough)'}\n{header}")
    print(row("R's selector, S's rest", factorial.selector_only))
    print(row("S's selector, R's rest", factorial.rest_only))
    print(row("R", factorial.both))
    for number, noise in enumerate(factorial.noise[:3]):
        print(row(f"random weights {number + 1}", noise))
if record.specialist_part is not None:
    print(row(f"what policies do: {' + '.join(record.specialist_part.components)}", record.specialist_part.effects))

# %% [markdown]
# ## Path attribution: every component a point (routing, specialists)
# The integral of the gradient along the straight line from S to R, times the change of the weights. Components sum to
# the whole change, which is checked.

# %%
for path in record.path:
    print(f"{path.metric:12} change {path.change:9.4f}, sum of components {path.sum:9.4f} nats ({path.points} points)")
for component in record.components:
    cells = ", ".join(f"{cell} {show(value.value)}" for cell, value in component.specialists.items())
    print(f"{component.name:12} routing {show_interval(component.routing):26} specialists: {cells}")

# %% [markdown]
# ## R's weights at some tokens only
# The same question by position: where in the prompt are the new weights at work?

# %%
print(header)
for each in record.placed:
    print(row(" + ".join(each.positions), each.effects))

# %% [markdown]
# ## The rollback: R with S's selector
# Scored against S under both cues, on questions that did not choose what is put back: what suffices in S need not be
# needed in R. It is a plain checkpoint, which `from_pretrained` loads.

# %%
if record.rollback is not None:
    print("put back:", " + ".join(record.rollback.components))
    for cue, accuracy in record.rollback.accuracy.items():
        print(f"  cue {cue}:", *(f"{name} {show_interval(value)} " for name, value in accuracy.items()))
    print("checkpoint:", arguments.out / "rollback")

# %% [markdown]
# ## What would have falsified it
# Noise of the norm of R's change, tensor by tensor, that moves S as far as R's change does.

# %%
print(f"R itself: chosen {show_interval(record.after.chosen)}, done {show_interval(record.after.done)} bits")
print(f"noise of the same size: chosen {show(record.null.chosen, 6)}, done {show(record.null.done, 6)} bits")
for reason in record.missing:
    print("not measured:", reason)

# %% [markdown]
# ## The record, and its figures

# %%
print("record:", record.save(arguments.out / "graft.json"))
drawn = {
    "components": figures.components({"": record}),
    "plane": figures.plane(record),
    **({"factorial": figures.factorial(record)} if record.factorial else {}),
    **({"placed": figures.placed(record)} if record.placed else {}),
}
for name, figure in drawn.items():
    file = arguments.out / f"{name}.html"
    figure.write_html(file, include_plotlyjs="directory", config={"displayModeBar": False})
    print(f"figure: {file}")
