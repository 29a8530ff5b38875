"""What measuring behaviour will take, from configs and prompts alone, and how many questions the time allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mixturelens.behaviour.logits import BATCH_BYTES
from mixturelens.models import Pair
from mixturelens.models.beginnings import KEPT_BYTES, LONG, tree
from mixturelens.models.cost import Estimate, Work, estimate, size_of
from mixturelens.shown import wordings
from mixturelens.suite import Suite

TIMES = 2.0
"""How often a completion is gone through: as it is scored, and as it is drawn and weighed."""
DISTINCT = 0.5
"""Share of the samples of one prompt that differ from each other, where policies are rules."""
BATCHES = 4
"""Times the logits of a batch that are held at once: as they are, in float64, and on their way."""
LEAST = 8
"""Questions, at least, that --minutes leaves: with fewer there is no verdict."""


@dataclass(frozen=True)
class BehaviourPlan:
    """What measuring behaviour takes: questions that are measured, time and memory, and what is left out, in words."""

    questions: int
    takes: Estimate
    missing: tuple[str, ...] = ()


def make_plan(pair: Pair, contexts: Sequence[Sequence[int]]) -> BehaviourPlan:
    """How many questions can be measured in the time that the pair's budget allows, and what that takes.

    `contexts` are the token ids of the neutral prompts. No weights are read.
    """
    questions = len({row.id for row in pair.suite.neutral})
    takes = _estimate(pair, contexts, 1.0)
    some = questions
    if pair.budget.minutes is not None and takes.seconds > 60 * pair.budget.minutes:
        some = min(questions, max(LEAST, int(questions * 60 * pair.budget.minutes / takes.seconds)))
    if some == questions:
        return BehaviourPlan(questions, takes)
    why = (
        f"behaviour was measured on {some} of {questions} questions: all that --minutes {pair.budget.minutes:g} allows"
    )
    return BehaviourPlan(some, _estimate(pair, contexts, some / questions), (why,))


def first_questions(suite: Suite, number: int) -> Suite:
    """The suite with the prompts of its first `number` questions alone."""
    kept = set(list(dict.fromkeys(row.id for row in suite.neutral))[:number])
    return suite.model_copy(update={"prompts": tuple(row for row in suite.prompts if row.id in kept)})


def _estimate(pair: Pair, contexts: Sequence[Sequence[int]], share: float) -> Estimate:
    suite, size, sides = pair.suite, size_of(pair), len(pair.sides)
    ways = 1 + sum(max(1, len(wordings(shown))) for shown in suite.policies.values())
    drawn = 1.0 if suite.literal else 1 + DISTINCT * suite.samples
    behind = share * len(contexts) * ways * suite.max_new_tokens * TIMES * drawn
    long = min(map(len, contexts), default=0) >= LONG
    above = tree(tuple(context) for context in contexts)
    once = sum(len(each) - len(beginning) for each, beginning in above.items())
    # short prompts are gone through again with each completion
    before = share * (once if long else sum(map(len, contexts)) * ways * TIMES * drawn)
    kept = size.kept * (before + behind / TIMES) * sides if long else 0.0
    logits = min(BATCH_BYTES, 4 * behind * size.vocabulary)
    return estimate(
        pair,
        Work(
            tokens=sides * (before + behind),
            read=sides * behind,
            models=1 if pair.shares_base else sides,
            held=min(kept, KEPT_BYTES) + BATCHES * logits,
        ),
    )
