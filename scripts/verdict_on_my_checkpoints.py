# %% [markdown]
# # Did post-training change the router or the specialists of *my* model?
#
# Two checkpoints of one shape and tokenizer, and a behaviour suite: prompts under every cue, and how a
# completion shows its policy. Run it whole with
# `python scripts/verdict_on_my_checkpoints.py --before S --after R --suite suite.yaml`; without arguments it looks at a
# pair from `tests/pairs`, in which a policy learnt to answer where it used to refuse.

# %%
import argparse
from pathlib import Path

from mixturelens import figures
from mixturelens.behaviour.pair import behaviour_record
from mixturelens.models import Pair
from mixturelens.routing.verdict import judge
from mixturelens.suite import load_suite

PAIR = Path(__file__).resolve().parents[1] / "tests" / "pairs" / "llama"

parser = argparse.ArgumentParser(description="Did post-training change the router or the specialists of my model?")
parser.add_argument("--before", default=PAIR / "S", help="a folder, a hub id (org/name), or a LoRA adapter")
parser.add_argument("--after", default=PAIR / "R-conditioning", help="likewise")
parser.add_argument("--base", help="what adapters are applied on, where their configs do not say")
parser.add_argument("--suite", type=Path, default=PAIR / "suite.yaml")
parser.add_argument("--device", default="cpu")
arguments = parser.parse_args()

# %% [markdown]
# ## The suite
# Everything mixturelens knows about your task. Check that the policies cover what the model writes: completions of no
# known policy count as `other`, and with more than a tenth of them the verdict is `inconclusive`.

# %%
suite = load_suite(arguments.suite)
print(f"{len(suite.neutral)} prompts, cues {', '.join(suite.cues)}, policies {', '.join(suite.policies)}")
print("probabilities are", "exact, by teacher forcing" if suite.literal else f"sampled, {suite.samples} a prompt")

# %% [markdown]
# ## Behaviour: which policy, how often, and how well

# %%
pair = Pair(arguments.before, arguments.after, suite, base=arguments.base, device=arguments.device)
record = behaviour_record(pair, progress=print)
for cue, state in record.per_cue.items():
    for when, side in (("before", state.before), ("after", state.after)):
        if side is not None:
            weights = {name: round(value, 3) for name, value in side.weights.items()}
            forced = {name: value and round(value, 3) for name, value in side.accuracy.items()}
            print(f"{cue} {when:6} weights {weights}  forced accuracy {forced}  overall {side.overall:.3f}")

# %% [markdown]
# ## The verdict, and what it stands on
# First what became of accuracy, and whose doing it was. Then, in bits, how well one completion tells R from S (0: not
# at all, 1: for sure): `routing` by the policy that it follows, `conditioning` by what that policy does under a cue,
# `skill` by how well it does it; `dormant` weighs all policies alike, and so hears a silent one. `text`, how
# completions are worded, stands beside it. Every number has a 95% bootstrap interval over questions.

# %%
verdict = judge(record)
print(verdict.reason)
for cue, state in verdict.per_cue.items():
    change = state.accuracy_change
    if change is not None:
        print(f"accuracy under {cue}: routing {figures.show_interval(change.selector)}, ", end="")
        print(
            f"specialists {figures.show_interval(change.specialists)}, together {figures.show_interval(change.total)}"
        )
for term, value in verdict.bits:
    print(f"  {term:13} {figures.show_interval(value, 4)} bits")
drift = figures.show_interval(verdict.text.nats_per_token, 4)
print(f"  {'text':13} {drift} nats per token, drifted: {verdict.text_drifted}")
print("changed:", verdict.changed.model_dump(), " silent specialists intact:", verdict.dormant_intact)

# %% [markdown]
# ## What would have falsified it
# The same code on S against S must find nothing, labels shuffled among completions must carry no routing, and an
# independent estimate of KL(R || S) must agree with the sum of its terms by the chain rule (the record's `nats`).

# %%
control = verdict.controls.pair
same = max(value.value or 0.0 for _, value in control.same_checkpoint)
print(f"S against S: at most {figures.show(same, 6)} bits")
print("routing share of shuffled labels:", figures.show_interval(control.shuffled_routing_share))
print(f"independent KL(R || S): {figures.show_interval(control.independent_total)} nats, agrees: {control.sum_agrees}")
