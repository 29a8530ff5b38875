# %% [markdown]
# # Ablate the router of *my* model, and see whether the harmed cue comes back
#
# Find the heads that read the cue on half of the questions; on the other half, take them out (zero, mean) or let them
# read the trained cue (interchange), beside the same done to random heads. Then write the repair into the weights, and
# talk to the plain checkpoint. Run it whole with
# `python scripts/ablate_router.py --before S --after R --suite suite.yaml --trained-cue A`; without arguments it looks
# at the reference organism. A minute on one core.

# %%
import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixturelens import figures
from mixturelens.behaviour.arrays import Behaviour
from mixturelens.behaviour.grid import grid_of
from mixturelens.behaviour.harmed import find_harm
from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.measure import measure
from mixturelens.behaviour.pair import behaviour_record
from mixturelens.behaviour.prompts import prepare
from mixturelens.behaviour.repair_questions import make_ground
from mixturelens.contrasts import cue_contrasts
from mixturelens.grafting.graft import save_with
from mixturelens.hooks.intervened import Intervened
from mixturelens.hooks.lens import lens_of
from mixturelens.hooks.placed import known_prompts
from mixturelens.models import Pair, quiet_libraries
from mixturelens.patching.sweep import find_reader, head_sites
from mixturelens.routing.edit import edited, fit_edit
from mixturelens.spelling import encode_prompts
from mixturelens.stats import PROPORTION, interval
from mixturelens.suite import load_suite
from mixturelens.types import Interval, Intervention, Site

RUN = Path(__file__).resolve().parents[1] / "artifacts" / "reference"

parser = argparse.ArgumentParser(
    description="Ablate the router of my model, and see whether the harmed cue comes back."
)
parser.add_argument("--before", default=RUN / "checkpoints" / "sft", help="S")
parser.add_argument("--after", default=RUN / "checkpoints" / "rl-A", help="R, which is repaired")
parser.add_argument("--suite", type=Path, default=RUN / "suite.yaml")
parser.add_argument("--trained-cue", help="the cue that RL trained on; default: what the suite says, else its first")
parser.add_argument("--random", type=int, default=8, help="groups of random heads to compare with")
parser.add_argument("--out", type=Path, default=Path("artifacts") / "ablated", help="folder of the repaired checkpoint")
parser.add_argument("--device", default="cpu")
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()
quiet_libraries()

# %% [markdown]
# ## What RL harmed

# %%
suite = load_suite(arguments.suite)
trained_cue = arguments.trained_cue or suite.trained_cue or suite.cues[0]
suite = suite.model_copy(update={"trained_cue": trained_cue})
pair = Pair(arguments.before, arguments.after, suite, device=arguments.device)
behaviour = behaviour_record(pair, seed=arguments.seed)
pair = pair.spelled(behaviour.spelling)
suite = pair.suite
harm = find_harm(behaviour)
print(f"trained on {harm.trained_cue}, harmed {harm.harmed_cue}; the policy it follows: {harm.policy}")

# %% [markdown]
# ## The cue reader, found on half of the questions
# `find_reader` chooses on the first half and judges on the second; what follows is measured on the second half alone.

# %%
lens = lens_of(pair, "after")
contrasts = cue_contrasts(suite, lens.tokenizer, harm.policy, harm.cues)
reader = find_reader(lens, contrasts, "policy", arguments.seed)
print("cue reader:", " + ".join(map(str, reader.heads)))
print("  carries", figures.show_interval(interval(reader.effect)), "of the cue contrast on the half that judges")

choosing = {row.question for row in contrasts.half(0).rows}
rows = [row for row in suite.neutral if row.id not in choosing]
judge = prepare(suite, rows, lens.tokenizer)
grid = grid_of(judge, arguments.seed)
scorer = Scorer(pair.ends, pair.vocabulary, arguments.device)


def accuracies(found: Behaviour) -> dict[str, Interval]:
    """cue -> expected accuracy of completions sampled at temperature 1, with its interval over questions."""
    draws = grid.draws(found.correct.sum(-1))
    return {cue: interval(draws[:, c], grid.counts, bounds=PROPORTION) for c, cue in enumerate(suite.cues)}


# %% [markdown]
# ## Take it out, or let it read the trained cue
# `Intervened` is called like the model, so the same code measures it. Zero and mean ask whether the reader is needed
# for the harm; interchange asks what the model would do if it read the other cue.

# %%
known = known_prompts(suite, suite.neutral, lens.tokenizer)


def intervene(kind: str, heads: tuple[Site, ...]) -> list[Intervention]:
    """At everything behind the prompt: the policy word, where the reader reads, and after."""
    places = [head.model_copy(update={"position": "completion"}) for head in heads]
    if kind == "interchange":
        return [Intervention(site=place, do="replace", source=harm.trained_cue) for place in places]
    if kind == "zero":
        return [Intervention(site=place, do="scale", amount=0.0) for place in places]
    return [Intervention(site=place, do="mean") for place in places]


def tried(kind: str, heads: tuple[Site, ...]) -> dict[str, Interval]:
    model = Intervened(lens, intervene(kind, heads), known)
    return accuracies(measure(scorer, model, judge, arguments.seed))


plain = {
    "S": accuracies(measure(scorer, pair.model("before"), judge, arguments.seed)),
    "R": accuracies(measure(scorer, lens.model, judge, arguments.seed)),
}
repaired = {kind: tried(kind, reader.heads) for kind in ("interchange", "zero", "mean")}
print(f"{'accuracy':22}", *(f"cue {cue:22}" for cue in suite.cues))
for name, found in {**plain, **repaired}.items():
    print(f"{name:22}", *(f"{figures.show_interval(found[cue]):26}" for cue in suite.cues))

# %% [markdown]
# ## The control: the same at random heads
# Groups of as many heads, none of them the reader's. A repair that random heads reach as well is no evidence.

# %%
rest = [site for site in head_sites(lens, "policy") if site not in reader.heads]
groups = list(itertools.combinations(rest, len(reader.heads)))
drawn = np.random.default_rng(arguments.seed).choice(len(groups), min(arguments.random, len(groups)), replace=False)
for kind, found in repaired.items():
    others = [tried(kind, groups[i])[harm.harmed_cue].value or 0.0 for i in drawn]
    reached = found[harm.harmed_cue].value or 0.0
    print(
        f"{kind:12} cue {harm.harmed_cue}: {reached:.4f}; {len(others)} random groups: median {np.median(others):.4f}, "
        f"best {max(others):.4f}"
    )

# %% [markdown]
# ## The repair as a plain checkpoint
# The reader's keys and values are changed so that they answer to the harmed cue's tokens as to the trained one's, and
# to everything else as before. What is saved needs nothing of mixturelens: `from_pretrained` loads it.

# %%
edit = fit_edit(make_ground(lens, suite, harm, arguments.seed), reader.heads)
original = pair.model("after")
save_with(original, edited(original, edit), lens.tokenizer, arguments.out)
edited = AutoModelForCausalLM.from_pretrained(arguments.out).to(arguments.device).eval()
tokenizer = AutoTokenizer.from_pretrained(arguments.out)
found = accuracies(measure(scorer, edited, judge, arguments.seed))
print(f"{'edited':22}", *(f"{figures.show_interval(found[cue]):26}" for cue in suite.cues))
print(f"{sum(len(index) for index, _ in edit.values())} weights changed; checkpoint: {arguments.out}")

# %% [markdown]
# ## Talk to it
# A few questions that did not choose the heads, greedily, before and after.


# %%
def answer(model: torch.nn.Module, ids: list[int]) -> str:
    """What the model writes behind a prompt, taking the likeliest token every time."""
    given = torch.tensor([ids], device=arguments.device)
    written = model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=suite.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True)


some = [row for row in rows if row.cue == harm.harmed_cue][:3] + [row for row in rows if row.cue == harm.trained_cue][
    :2
]
for row, ids in zip(some, encode_prompts(suite, some, tokenizer), strict=True):
    print(f"{row.text:28} answer {row.answer:12} before: {answer(original, ids):18} after: {answer(edited, ids)}")
