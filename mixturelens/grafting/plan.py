"""How much grafts look at: everything on a small model; on a large one what the time allows, which is said before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mixturelens.behaviour.logits import BATCH_BYTES
from mixturelens.behaviour.prompts import Prompts
from mixturelens.grafting import path
from mixturelens.grafting.graft import NOISE, NULLS, PLAYERS
from mixturelens.grafting.search import MANY
from mixturelens.models import Pair
from mixturelens.models.beginnings import BATCH_TOKENS, LONG
from mixturelens.models.cost import Estimate, Size, Work, estimate, size_of

QUESTIONS = 256
"""Of more questions, so many are drawn."""
SEARCHED = 8
"""Questions of a search."""
JUDGED = 12
"""Questions, at most, that judge what a search chose."""
USUAL = 8
"""Tokens of a completion that are reckoned with."""
SLOPE = 4.5
"""Forwards that a slope costs."""
BEGUN = 0.5
"""Of the layers, what a graft computes where it starts from what S and R gave."""
POSITIONS = 9
"""Sets of positions that are grafted, about."""
CHOSEN = 12
"""Sets of components that are tried for selector, rollback and specialists, where only their number is searched for."""


@dataclass(frozen=True)
class GraftingPlan:
    """What is looked at."""

    searched: int | None
    """Questions of a search from coarse to fine; None: every component, on all questions."""
    everything: bool = False
    """Whether the search opens all groups."""
    grafts: int = 100
    """Of the search, at most."""
    path: bool = True
    positions: bool = True
    missing: tuple[str, ...] = ()
    """What the time does not allow."""


def plan(pair: Pair, prompts: Prompts, components: int, exhaustive: bool = False) -> tuple[GraftingPlan, Estimate]:
    """The first of several plans, from much to little, that takes no longer than the user allows; and what it takes.

    Reads no weights. The least of them is done even where it takes longer.
    """
    size = size_of(pair)
    allowed = None if pair.budget.minutes is None else 60 * pair.budget.minutes
    plans = [
        (each, estimate(pair, work(each, prompts, components, size))) for each in _plans(components > MANY, exhaustive)
    ]
    for each, needed in plans:
        if allowed is None or needed.seconds <= allowed:
            return each, needed
    least, needed = plans[-1]
    return replace(least, missing=(*least.missing, f"--minutes: grafts take {needed} at least")), needed


def _plans(large: bool, exhaustive: bool) -> Sequence[GraftingPlan]:
    said = "--minutes allows no more"
    first = GraftingPlan(SEARCHED) if large else GraftingPlan(None)
    if exhaustive and large:
        first = GraftingPlan(SEARCHED, everything=True)
    coarse = GraftingPlan(SEARCHED, missing=() if large else (f"grafts of every component: {said} than a search",))
    fewer = replace(coarse, grafts=40)
    no_places = replace(fewer, positions=False, missing=(*fewer.missing, f"grafts at some positions: {said}"))
    no_path = replace(no_places, path=False, missing=(*no_places.missing, f"path attribution: {said}"))
    least = replace(no_path, searched=SEARCHED // 2, grafts=20)
    return (first, *(() if first == coarse else (coarse,)), fewer, no_places, no_path, least)


def work(plan: GraftingPlan, prompts: Prompts, components: int, size: Size) -> Work:
    """What a plan takes: tokens that go through the models, and bytes held meanwhile."""
    lengths = [len(context) for context in prompts.contexts]
    behind = [sum(len(each.ids) + USUAL for each in placed) for placed in prompts.placed]
    rows = len(prompts.announcements)
    long = min(lengths, default=0) >= LONG
    plain = sum(length * rows + more for length, more in zip(lengths, behind, strict=True))
    whole = sum(lengths) + sum(behind) if long else plain
    widest = max((length + more for length, more in zip(lengths, behind, strict=True)), default=0)
    part = 1.0 if plan.searched is None else min(1.0, plan.searched / max(1, len({row.id for row in prompts.rows})))
    judged = min(0.5, JUDGED / max(1, len({row.id for row in prompts.rows})))
    some, half = part * whole, judged * whole
    if plan.searched is None:
        shares = 2.0 ** min(components, PLAYERS)
        tried = (2 * components + 10 + 2 * components + NOISE / 2 + NULLS + shares / 2) * whole
    else:
        grafts = 2.0 * (2 * components if plan.everything else 0) or plan.grafts * 0.7
        tried = (BEGUN * (grafts + CHOSEN + NOISE) + NULLS + 5) * some + 3 * half
    along = path.NODES if plan.searched is None else path.FEW_NODES
    tokens = 3 * whole + tried + 3 * 2 * some
    tokens += POSITIONS * 2 * some if plan.positions else 0
    tokens += SLOPE * along * min(part, path.QUESTIONS / max(1, len(prompts.rows))) * plain if plan.path else 0
    logits = min(BATCH_BYTES, len(lengths) * widest * size.vocabulary * 8) * 2.5
    at_once = min(BATCH_TOKENS, whole) * size.body / size.layers / size.d_model * 2 * size.width
    kept = 2 * some * size.layers * size.d_model * size.width if plan.searched is not None else 0.0
    way_back = path.KEPT * size.body / size.d_model * size.width * rows * (max(lengths, default=0) + 2 * USUAL)
    # of the largest tensor, while its slope is taken: as it is between S and R, its change, and both on the way back
    change = 4 * size.unembedding * size.width
    back = max(path.BATCH_BYTES if long else 0, way_back) + logits / 4 + change
    held = max(kept + logits + at_once, back if plan.path else 0)
    return Work(tokens=tokens, read=tokens / max(1, widest) * rows * USUAL, held=held)
