# %% [markdown]
# # Pairs whose verdict is known: two nulls and a positive, from the spec of a run
#
# What an instrument finds in (S, R) means little until it has seen pairs in which nothing of that kind happened, and
# one in which it did. From the spec of a run this trains, into its `checkpoints/`:
#
# - `sft-order`: SFT anew, from the same base on the same questions, in another order. Expected: neither
# - `sft-continued`: S trained on, on the same mixture, 100 steps at a small constant rate. Expected: neither
# - `taught`: S taught that one policy answers where it refused; the mixture stays as it is. Expected: specialist
#
# `python scripts/control_pairs.py [RUN]`: one core, about three minutes; checkpoints that are there are kept.

# %%
import argparse
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import mixturelens as ml
from mixturelens import figures
from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.literal import literal_behaviour
from mixturelens.behaviour.prompts import prepare
from mixturelens.lab import runs
from mixturelens.lab.organism import Spec, build_model, build_suite, build_tokenizer, sft_examples
from mixturelens.lab.stage import MEASURED_QUESTIONS
from mixturelens.models import Pair, end_tokens, load_model, load_tokenizer, quiet_libraries
from mixturelens.records import new_folder
from mixturelens.suite import PromptRow
from mixturelens.types import ANSWER, OTHER, InputError

CONTINUED_STEPS, CONTINUED_RATE = 100, 1e-4
TAUGHT_STEPS, TAUGHT_RATE = 400, 3e-4
TAUGHT = 0.95
"""Forced accuracy from which the policy has learnt to answer where it refused."""
TAUGHT_LEAST = 150
"""Steps of teaching at least: the mixture is to settle again once the skill is there."""
CHECK = 25
"""Steps between two looks at the forced accuracy."""
CLIP = 1.0
"""Largest norm of a gradient, as in TRL's training of S."""
EXPECTED = {"sft-order": "neither", "sft-continued": "neither", "taught": "specialist"}

parser = argparse.ArgumentParser(description="Pairs whose verdict is known, from the spec of a run.")
parser.add_argument("run", nargs="?", type=Path, default=Path(__file__).resolve().parents[1] / "artifacts/reference")
parser.add_argument("--only", choices=EXPECTED, action="append", help="make this one; may be given again")
arguments = parser.parse_args()
torch.set_num_threads(1)
quiet_libraries()

spec = runs.load_run(arguments.run)
checkpoints = arguments.run / "checkpoints"
tokenizer = load_tokenizer(checkpoints / "sft")
vocabulary = tokenizer.get_vocab()


# %% [markdown]
# ## Training, as plainly as can be
# The same loss as TRL's SFT of S: next-token cross-entropy of the completion and its end.


# %%
def encode(row: PromptRow, completion: str) -> tuple[list[int], list[int]]:
    context = [vocabulary[word] for word in row.text.split()]
    target = [*(vocabulary[word] for word in completion.split()), tokenizer.eos_token_id]
    return context + target, [-100] * len(context) + target


def train(
    model: Any,
    examples: list[tuple[PromptRow, str]],
    rate: float,
    *,
    warmup: int | None = None,
    enough: Callable[[Any, int], bool] = lambda *_: False,
) -> int:
    """AdamW, one batch of the spec's size a step. With `warmup` steps, the rate then falls to zero along a cosine.

    Returns the steps that were taken: fewer than there are batches, if it was `enough` after some step.
    """
    from transformers import get_cosine_schedule_with_warmup

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    steps = len(examples) // spec.sft.batch
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps) if warmup is not None else None
    pad = tokenizer.pad_token_id
    for step in range(steps):
        rows = [encode(*each) for each in examples[step * spec.sft.batch : (step + 1) * spec.sft.batch]]
        width = max(len(ids) for ids, _ in rows)  # wordings of phrases may differ in length
        ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])
        labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        if enough(model, step + 1):
            return step + 1
    return steps


# %% [markdown]
# ## The two nulls
# The second half of twice as many examples: other draws of questions, cues, policies and hints from the same pools.

# %%
batch = spec.sft.batch


def sft_order() -> Any:
    model = (
        load_model(checkpoints / "base")
        if (checkpoints / "base").exists()
        else build_model(spec, build_tokenizer(spec))
    )
    number = spec.sft.steps * batch
    examples = list(islice(sft_examples(spec, 2 * number), number, None))
    train(model, examples, spec.sft.learning_rate, warmup=round(spec.sft.warmup * spec.sft.steps))
    return model


def sft_continued() -> Any:
    model = load_model(checkpoints / "sft")
    train(model, list(sft_examples(spec, CONTINUED_STEPS * batch)), CONTINUED_RATE)
    return model


# %% [markdown]
# ## The positive
# The first policy that refuses somewhere learns to answer there. Everything else of the spec stays: weights, hints, and
# the other policies, which SFT goes on showing, so that they are not forgotten.


# %%
def taught_spec(spec: Spec) -> tuple[Spec, str, str]:
    """The spec with one cell of its policy table turned to `answer`, and that cell: policy and cue."""
    for name, policy in spec.policies.items():
        for cue, behaviour in policy.table.items():
            if behaviour != ANSWER:
                row = policy.model_copy(update={"table": {**policy.table, cue: ANSWER}})
                return spec.model_copy(update={"policies": {**spec.policies, name: row}}), name, cue
    raise InputError(f"{arguments.run}: every policy answers everywhere; there is nothing to teach")


def taught() -> Any:
    changed, policy, cue = taught_spec(spec)
    suite = build_suite(spec)
    ids = list(dict.fromkeys(row.id for row in suite.neutral))[:MEASURED_QUESTIONS]
    prompts = prepare(suite, [row for row in suite.neutral if row.id in ids and row.cue == cue], tokenizer)
    model = load_model(checkpoints / "sft")
    scorer = Scorer(end_tokens(model, tokenizer), model.config.vocab_size)

    def learnt(model: Any, step: int) -> bool:
        if step % CHECK:
            return False
        model.eval()
        found = literal_behaviour(scorer, model, prompts)
        model.train()
        forced = float(found.forced_accuracy[:, list(spec.policies).index(policy)].mean())
        weights = dict(zip((*spec.policies, OTHER), found.weights.mean(0).round(3).tolist(), strict=True))
        print(f"  step {step}: {policy} under {cue}: forced accuracy {forced:.4f}, weights {weights}", flush=True)
        return step >= TAUGHT_LEAST and forced > TAUGHT

    steps = train(model, list(sft_examples(changed, TAUGHT_STEPS * batch)), TAUGHT_RATE, enough=learnt)
    print(f"  taught in {steps} steps", flush=True)
    return model


# %% [markdown]
# ## Make them, and hear what the verdict says
# Each is a pair with S, judged on the suite of the run.

# %%
makers: dict[str, Callable[[], Any]] = {"sft-order": sft_order, "sft-continued": sft_continued, "taught": taught}
for name in arguments.only or EXPECTED:
    if not (checkpoints / name).exists():
        model = makers[name]()
        with new_folder(checkpoints / name) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    pair = Pair(checkpoints / "sft", checkpoints / name, arguments.run / "suite.yaml", out=arguments.run)
    found = ml.verdict(pair)
    changed = [what for what, yes in found.changed.model_dump().items() if yes]
    bits = ", ".join(f"{term} {figures.show(value.value, 5)}" for term, value in found.bits)
    print(
        f"{name}: {found.verdict} (expected {EXPECTED[name]}); changed {changed or 'nothing'}; bits: {bits}", flush=True
    )
