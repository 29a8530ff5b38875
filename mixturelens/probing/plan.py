"""What probing a pair will take, from configs and prompts alone, and what is left out where less is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mixturelens.models import Pair
from mixturelens.models.cost import Estimate, Size, Work, estimate, size_of
from mixturelens.probing.erase import RANDOM, SCANNED, SOME
from mixturelens.probing.prompts import ProbePrompts
from mixturelens.spelling import Ids

NETWORKS = 3
"""S, R and the untrained one."""
BEYOND = 2.0
"""Erasing and subspaces may take so many times what reading takes, on a large model."""
ALWAYS = 3e12
"""Operations that they may take in any case: all that there is to do on a small one."""
HELD = 1 << 30
"""Bytes of activations that are held in memory, unless --memory allows less; else they go to disk."""
KEPT = 1 << 30
"""Bytes of keys and values that are kept at most."""
LEAST = 8
"""Questions, at least, that --minutes leaves."""


@dataclass(frozen=True)
class ProbingPlan:
    """What probing takes, and what is left out of it where less is allowed."""

    questions: int
    """Questions that are asked about."""
    tokens: float
    """Tokens through all layers that erasing and subspaces may take."""
    on_disk: bool
    """Whether activations are kept in files."""
    estimate: Estimate
    missing: tuple[str, ...] = ()


def make_plan(
    pair: Pair, prompts: ProbePrompts, announcements: Sequence[tuple[Ids, Ids]], exhaustive: bool = False
) -> ProbingPlan:
    """What probing these prompts takes, cut down to the minutes and memory that the user allows. No weights are loaded.

    `announcements` are (prompt, what may stand behind it); `exhaustive` erases at every site, whatever that takes.
    """
    size = size_of(pair)
    questions = len({row.question for row in prompts.rows["neutral"]})
    reading = Work(tokens=NETWORKS * _tokens(prompts, announcements), read=NETWORKS * _runs(prompts, announcements))
    every = _erasing(prompts, size.layers, size.heads)
    most = every if exhaustive else max(BEYOND * reading.tokens, ALWAYS / (2.0 * size.body))
    missing: tuple[str, ...] = ()
    if pair.budget.minutes is not None:
        allowed = pair.budget.minutes * 60 / max(estimate(pair, Work(tokens=1.0)).seconds, 1e-12)
        some = min(questions, max(LEAST, int(questions * allowed * SHARE / reading.tokens)))
        if some < questions:
            missing = (f"probes ask about {some} of {questions} questions: all that --minutes allows",)
            reading = Work(tokens=reading.tokens * some / questions, read=reading.read * some / questions)
            questions = some
        most = max(0.0, allowed - reading.tokens) if not exhaustive else most
    places = sum(len(rows) * len(prompts.positions[group]) for group, rows in prompts.rows.items())
    acts = NETWORKS * places * size.layers * 5 * size.d_model * 4.0
    allowed_bytes = HELD if pair.budget.memory is None else min(HELD, pair.budget.memory * 1e9 / 4)
    on_disk = acts > allowed_bytes
    held = max((0 if on_disk else acts) + FITTING, _patching(size, prompts)) + _batch(size)
    needed = Work(tokens=reading.tokens + min(most, every), read=reading.read, models=2.0, held=held)
    return ProbingPlan(questions, most, on_disk, estimate(pair, needed), missing)


SHARE = 0.5
"""Of the minutes that are allowed, what reading may take."""
FITTING = 512 << 20
"""Bytes that fitting probes takes."""
BATCH = 2048
"""Tokens of one forward."""


def _tokens(prompts: ProbePrompts, announcements: Sequence[tuple[Ids, Ids]]) -> float:
    """Tokens that one network reads: every prompt, and every announcement behind it, once."""
    inside = {row.ids for rows in prompts.rows.values() for row in rows}
    return float(sum(map(len, inside)) + sum(len(behind) for _, behind in _behind(prompts, announcements)))


def _runs(prompts: ProbePrompts, announcements: Sequence[tuple[Ids, Ids]]) -> float:
    inside = {row.ids for rows in prompts.rows.values() for row in rows}
    return float(len(inside) + sum(max(1, len(behind)) for _, behind in _behind(prompts, announcements)))


def _behind(prompts: ProbePrompts, announcements: Sequence[tuple[Ids, Ids]]) -> set[tuple[Ids, Ids]]:
    return {(row.ids, row.run[len(row.ids) :]) for row in prompts.rows["placed"]} | set(announcements)


def _erasing(prompts: ProbePrompts, layers: int, heads: int) -> float:
    """Tokens, through all layers, of erasing the cue at every site by patching, and at two sites in behaviour."""
    total = 0.0
    half = len(prompts.halves[1])
    for group, rows in prompts.rows.items():
        for position in prompts.positions[group] if group != "hinted" and rows else ():
            window = sum(len(row.run) - row.at[position] for row in rows) / len(rows)
            runs = 2 * (half + SCANNED * min(half, SOME))
            total += window * runs * (layers / 2) * (heads + 3)
    longest = max(len(row.ids) for rows in prompts.rows.values() for row in rows)
    return total + 4.0 * (half + RANDOM * min(half, SOME)) * longest / 2


def _patching(size: Size, prompts: ProbePrompts) -> float:
    """Bytes of what the patch engine keeps of both prompts of the questions that judge, and of kept keys and values."""
    longest = max(len(row.run) for rows in prompts.rows.values() for row in rows)
    tokens = 2.0 * len(prompts.halves[1]) * longest
    stream = (size.layers + 1) * size.d_model * size.width
    return tokens * (stream + size.kept) + min(KEPT, tokens * size.kept)


def _batch(size: Size) -> float:
    """Bytes of one forward, with all that is noted on the way."""
    return BATCH * (4.0 * size.layers * size.d_model * size.width + size.kept + 8.0 * size.d_model)
