"""From models and a suite to probabilities of policies and behaviours, prompt by prompt.

Three ways to the same arrays, chosen by what the suite allows:

- *enumerated*: every completion there is, where they are few enough; exact.
- *literal*: policies and behaviours are literal texts, so their probabilities are exact by teacher forcing, and only
  what follows an announcement is sampled, once that announcement is put in place.
- *sampled*: rules. Completions are drawn from both checkpoints and each is weighed under both (balance heuristic,
  Veach and Guibas 1995), so that a policy that one checkpoint never shows still has a weight, and S against S is
  exactly zero.

Where policies announce nothing, each measures what completions do, and `unannounced` infers the policies from that.
"""

from __future__ import annotations

from dataclasses import replace

from mixturelens.behaviour.arrays import Behaviour, Change
from mixturelens.behaviour.likelihood import Model, Scorer
from mixturelens.behaviour.literal import literal_behaviour, literal_change
from mixturelens.behaviour.prompts import Prompts
from mixturelens.behaviour.sampled import enumerated_change, given_change, sampled_behaviour, sampled_change
from mixturelens.behaviour.unannounced import attributed
from mixturelens.completions import GivenCompletions

ENUMERATE_AT_MOST = 4000
"""Completions a prompt, up to which all of them are enumerated."""


def measure(scorer: Scorer, model: Model, prompts: Prompts, seed: int = 0) -> Behaviour:
    """What one checkpoint does on each prompt: exact for a literal suite, else from samples drawn with `seed`."""
    if prompts.suite.literal:
        return literal_behaviour(scorer, model, prompts)
    return sampled_behaviour(scorer, model, prompts, seed)


def measure_change(scorer: Scorer, before: Model, after: Model, prompts: Prompts, seed: int = 0) -> Change:
    """What changed from `before` (S) to `after` (R) on each prompt, in the way that the suite allows.

    Completions are drawn with `seed` where the way draws any.
    """
    if scorer.number_of_completions(prompts.suite.max_new_tokens, ENUMERATE_AT_MOST) <= ENUMERATE_AT_MOST:
        change = enumerated_change(scorer, before, after, prompts)
    elif prompts.suite.literal:
        change = literal_change(scorer, before, after, prompts, seed)
    else:
        change = sampled_change(scorer, before, after, prompts, seed)
    return _attributed(prompts, change)


def measure_given(
    scorer: Scorer, models: tuple[Model, Model], prompts: Prompts, given: GivenCompletions, seed: int = 0
) -> Change:
    """What changed from S to R (`models`), from completions that were sampled elsewhere. What is put in place is drawn
    with `seed`."""
    return _attributed(prompts, given_change(scorer, models, prompts, given, seed))


def _attributed(prompts: Prompts, change: Change) -> Change:
    return replace(change, before=attributed(prompts, change.before), after=attributed(prompts, change.after))
