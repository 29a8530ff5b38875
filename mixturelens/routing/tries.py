"""How many random repairs there is time for, and what repairing takes: from configs and prompts alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mixturelens.behaviour.harmed import Harm
from mixturelens.behaviour.plan import DISTINCT
from mixturelens.behaviour.prompts import Prompts, prepare, without_behaviours
from mixturelens.contrasts import cue_contrasts
from mixturelens.hooks.kept import MOST
from mixturelens.models import Pair
from mixturelens.models.beginnings import LONG
from mixturelens.models.cost import Estimate, Work, estimate, size_of
from mixturelens.types import InputError

FEW = 4
"""Random places or directions, at least, that a repair is compared with."""
BEYOND = 1.0
"""Random repairs may take so many times what reading the prompts takes, on a large model."""
SOME = 12
"""Questions, at most, on which strengths are chosen and random repairs measured where prompts are long."""
ALWAYS = 3e12
"""Operations that they may take in any case: all that there is to do on a small one."""
CHOSEN = 4
"""Strengths that steering chooses from."""


@dataclass(frozen=True)
class RepairPlan:
    """How many random repairs a pair's time allows, and what the repairs take."""

    places: int
    """Random groups of heads that interventions at the reader are compared with."""
    directions: int
    """Random directions that steering is compared with."""
    edits: int
    """Random groups whose weights are edited."""
    estimate: Estimate
    beginning: float
    """Share of it that goes into measuring S and R as they are, which comes first."""
    missing: tuple[str, ...] = ()

    def behind(self, seconds: float) -> Estimate:
        """What is left to do, now that the beginning has taken so many seconds: the clock knows better than configs."""
        return replace(self.estimate, seconds=seconds * (1 - self.beginning) / self.beginning)


def brief(prompts: Prompts) -> Prompts:
    """Prompts on which strengths are chosen and random repairs measured: of whether completions are right, no more is
    asked (where completions are drawn, no policy is put in place), and of long prompts SOME questions alone."""
    asked = without_behaviours(prompts) if prompts.suite.literal else prompts.only(())
    some = list(dict.fromkeys(row.id for row in prompts.rows))
    if min(map(len, prompts.contexts), default=0) >= LONG:
        some = some[:SOME]
    return asked.part([i for i, row in enumerate(asked.rows) if row.id in set(some)])


def make_plan(pair: Pair, harm: Harm, places: int, directions: int) -> RepairPlan:
    """What repairing takes, held to what the user allows, with so many random places and directions at most.

    Loads no weights.
    """
    suite, tokenizer, size = pair.suite, pair.tokenizer, size_of(pair)
    contrasts = cue_contrasts(suite, tokenizer, harm.policy, harm.cues, harm.shows)
    choosing = {row.question for row in contrasts.half(0).rows}
    if len(contrasts.rows) < 2:
        raise InputError("one question is not enough: one half chooses what to repair, the other half judges it")
    judge = prepare(suite, [row for row in suite.neutral if row.id not in choosing], tokenizer)
    choose = prepare(suite, [row for row in suite.neutral if row.id in choosing], tokenizer)
    prompts = float(sum(map(len, judge.contexts)) + sum(map(len, choose.contexts)))
    judged = float(sum(map(len, judge.contexts)))
    whole, some, some_choose = _behind(judge), _behind(brief(judge)), _behind(brief(choose))
    if min(map(len, judge.contexts), default=0) < LONG:  # prompts of small organisms are read again each time
        whole, some, some_choose = 5 * judged, 3 * judged, 3 * (prompts - judged)
    heads = size.layers * size.heads
    window = max(len(row.clean) - row.spans["policy"][0] for row in contrasts.rows)
    finding = 2 * heads * len(contrasts.rows) / 2 * window / 2
    # R and S as they are, captures for directions, and every repair itself
    read = 3 * prompts + 2 * whole + finding
    own = 6 * whole + 2 * CHOSEN * some_choose
    # of one random group: interchanged, zeroed, averaged; of one direction: steered at each strength, rerouted
    place, direction = some * (1 + 2 + 1 + len(suite.cues)), CHOSEN * some_choose + 2 * some
    edit = float(sum(map(len, brief(judge).contexts))) + some
    most = max(BEYOND * (read - finding), ALWAYS / (2.0 * size.body))
    if pair.budget.minutes is not None:
        each = max(estimate(pair, Work(tokens=1.0)).seconds, 1e-12)
        most = max(0.0, pair.budget.minutes * 60 / each - read - own)
    start = 2 * judged + 2 * whole
    share = most / 3
    numbers = [
        min(full, max(FEW, int(share / cost)))
        for full, cost in ((places, place), (directions, direction), (places, edit))
    ]
    fewer = len({row.id for row in brief(judge).rows})
    judging = len({row.id for row in judge.rows})
    missing = tuple(
        f"{what}: {number} of {full} random ones to compare with, to save time"
        for what, number, full in zip(
            ("repairs at heads", "steering and reroute", "edit"), numbers, (places, directions, places), strict=True
        )
        if number < full
    )
    if fewer < judging:
        missing = (*missing, f"random repairs: measured on {fewer} of {judging} questions")
    tokens = read + own + sum(n * cost for n, cost in zip(numbers, (place, direction, edit), strict=True))
    engines = 2 * len(contrasts.rows) / 2 * max(len(row.clean) for row in contrasts.rows)
    held = min(MOST, prompts * size.kept) + engines * ((size.layers + 1) * size.d_model * size.width + size.kept)
    needed = estimate(pair, Work(tokens=tokens, read=tokens / 3, models=2.0, held=held + 512e6))
    if pair.budget.minutes is not None and needed.seconds > 60 * pair.budget.minutes:
        missing = (*missing, f"--minutes {pair.budget.minutes:g}: repair takes {needed} at least")
    return RepairPlan(numbers[0], numbers[1], numbers[2], needed, start / tokens, missing)


def _behind(prompts: Prompts) -> float:
    """Tokens that come behind prompts where behaviour is measured once, the prompts' last ones among them."""
    suite, total = prompts.suite, 0
    if not suite.literal:  # completions are drawn, behind prompts and behind every announcement
        ways = 1 + len(prompts.announcements)
        return len(prompts.rows) * ways * max(1.0, DISTINCT * suite.samples) * suite.max_new_tokens
    for placed, bare in zip(prompts.placed, prompts.bare, strict=True):
        total += sum(len(ids) for ids in bare)
        for each in placed:
            total += sum(len(ids) for ids in each.spellings)
            behind = [*each.answer, *each.err, *(ids for _, ids in each.behaviours)]
            total += sum(1 + len(each.ids) + len(ids) for ids in behind)
    return float(total)
