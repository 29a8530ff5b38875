"""What completions would earn where each cue has an objective of its own, and what comes of training on them in turn.

A regime is a cue with its objective. Of two regimes, what a model does in the end is shared out, question by question,
between four structures: one behaviour that every objective pays (ecological generalist); another under each cue
(conditional policy); another after each phase (strategy churn); and one fixed behaviour where objectives differ (a
naive optimiser of one of them, or a weighted one of both). The four shares sum to one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from mixturelens.behaviour.arrays import Behaviour
from mixturelens.behaviour.prompts import Prompts
from mixturelens.lab.organism import Spec, SplitSpec, pays
from mixturelens.lab.tasks import Family, Question
from mixturelens.stats import apart, interval, resampled_mean, share
from mixturelens.suite import PromptRow
from mixturelens.types import ANSWER, NOT_MEASURED, Frozen, InputError, Interval

PRESENT = 0.1
"""Share of the behaviour from which a structure is there."""
FIXED = 0.75
"""Share of the behaviour that is `fixed`, from which there is no structure to name."""
EARNS = 0.05
"""Probability of being paid under which there is nothing that could be retained, or culled."""

Structure = Literal["generalist", "conditional", "churn", "fixed", "mixed", "nested", "inconclusive"]


def paid_behaviours(spec: Spec, rows: tuple[PromptRow, ...], objective: str | None = None) -> list[str]:
    """The behaviour that RL rewards on each prompt: by the objective of its own cue, or by that of another."""
    by_id = _by_id(spec.questions, spec.split, spec.seed)  # pyright: ignore[reportArgumentType]  # frozen: has a hash
    return [pays(spec, row.cue, by_id[row.id], objective) for row in rows]


@functools.lru_cache(maxsize=4)
def _by_id(family: Family, split: SplitSpec, seed: int) -> dict[str, Question]:
    """Every question by its id; training asks for them again and again."""
    parts = family.split(evaluation=split.evaluation, rl=split.rl, seed=seed)
    return {question.id: question for part in parts for question in part}


def paid(spec: Spec, behaviour: Behaviour, prompts: Prompts, objective: str) -> Float[np.ndarray, " prompt"]:
    """How often a completion of each prompt would be rewarded by the objective of a cue, whatever its own cue is.

    Rewarded is a completion of a known policy that does what the objective wants: an answer has to be right as well.
    """
    names = prompts.suite.behaviour_names
    known = behaviour.classes[:, :-1].sum((1, 2))
    right = behaviour.correct[:, :-1].sum(-1)
    wanted = paid_behaviours(spec, prompts.rows, objective)
    return np.array([right[i] if does == ANSWER else known[i, names.index(does)] for i, does in enumerate(wanted)])


# --- the course of a schedule -----------------------------------------------------------------------------------------

Kind = tuple[str, ...]
"""What a phase trains on: `rl` or `sft`, and its cues."""


@dataclass(frozen=True)
class Course:
    """What the checkpoints of a schedule earn: before the first phase, and at the end of each."""

    cues: tuple[str, ...]
    phases: tuple[Kind, ...]
    earned: Float[np.ndarray, "checkpoint cue objective question"]
    """Probability that a completion under a cue is one that the objective of a cue pays."""
    alike: Bool[np.ndarray, "objective objective question"]
    """Whether two objectives pay the same behaviour on a question."""

    @property
    def cycle(self) -> list[int]:
        """Checkpoints of the last cycle: as many as there are kinds of phases; two where all phases are of one kind.

        Raises InputError where the schedule is shorter.
        """
        number = max(2, len(set(self.phases)))
        if len(self.phases) < number:
            raise InputError(f"a schedule of {len(self.phases)} phases has no cycle: give it at least {number}")
        return list(range(len(self.phases) + 1 - number, len(self.phases) + 1))

    @property
    def trained(self) -> tuple[str, ...]:
        """Regimes: cues that RL trains on, or SFT alone; SFT on several at once is the base mixture again."""
        alone = [kind[1:] for kind in self.phases if kind[0] == "rl" or len(kind) == 2]
        return tuple(cue for cue in self.cues if any(cue in cues for cues in alone))

    def own(self, cue: str, checkpoints: Sequence[int]) -> Float[np.ndarray, "checkpoint question"]:
        """What each question under a cue earns at these checkpoints (by number) by the cue's own objective."""
        at = self.cues.index(cue)
        return self.earned[list(checkpoints), at, at]


def earned(spec: Spec, behaviour: Behaviour, prompts: Prompts) -> Float[np.ndarray, "cue objective question"]:
    """How often a completion of each question is rewarded, by the cue that it is asked under and the cue whose
    objective pays (`paid`); every question must have a prompt under every cue.
    """
    cues = prompts.suite.cues
    at = [[i for i, row in enumerate(prompts.rows) if row.cue == cue] for cue in cues]
    by_objective = [paid(spec, behaviour, prompts, objective) for objective in cues]
    return np.array([[each[index] for each in by_objective] for index in at])


def alike(spec: Spec, prompts: Prompts) -> Bool[np.ndarray, "objective objective question"]:
    """On which questions the objectives of two cues pay the same behaviour under every cue."""
    cues = prompts.suite.cues
    wanted = np.array([paid_behaviours(spec, prompts.rows, objective) for objective in cues])
    same = wanted[:, None] == wanted[None]
    return np.logical_and.reduce([same[..., [row.cue == cue for row in prompts.rows]] for cue in cues])


# --- indices ----------------------------------------------------------------------------------------------------------


class Shares(Frozen):
    """What two regimes' behaviour is made of over the last cycle. The values sum to one."""

    generality: Interval
    """Probability of a completion that both objectives pay at once, where it is least: under either cue, after any
    phase. On questions where the objectives differ there is no such completion."""
    conditionality: Interval
    """How far behaviour follows the cue: P(what the first objective pays) under its cue less that under the other, in
    the middle of the phases; from -1 to 1. Over all questions: where the objectives agree it is zero if one behaviour
    serves both cues, as measured."""
    oscillation: Interval
    """How far behaviour follows the phase: the range of P(what the first objective pays) over the phases, mean over the
    two cues."""
    fixed: Interval
    """What is left: behaviour that neither serves both objectives nor moves with cue or phase."""
    lead: dict[str, Interval]
    """Each of the first three, less the two others together: above zero, it is most of what has a structure."""


def pair_shares(course: Course, first: str, second: str, counts: Int[np.ndarray, "draw question"]) -> Shares:
    """The four shares of two regimes, each a mean over questions.

    With P between l and h under a cue over the phases: conditionality is the difference of (l + h) / 2 between the cues
    and oscillation the mean of h - l, so that both together are at most one, and with generality, too.
    """
    a, b = course.cues.index(first), course.cues.index(second)
    pays_first = course.earned[course.cycle][:, [a, b], a]
    both = np.where(course.alike[a, b], pays_first, 0.0).min((0, 1))
    low, high = pays_first.min(0), pays_first.max(0)
    middle = (low + high) / 2
    of = {"generality": both, "conditionality": middle[0] - middle[1], "oscillation": (high - low).mean(0)}
    together = np.sum(list(of.values()), 0)

    def mean(values: Float[np.ndarray, " question"]) -> Interval:
        return interval(resampled_mean(values, counts), counts)

    return Shares(
        **{name: mean(values) for name, values in of.items()},
        fixed=mean(1 - together),
        lead={name: mean(2 * values - together) for name, values in of.items()},
    )


NAMES: Mapping[str, Structure] = {"generality": "generalist", "conditionality": "conditional", "oscillation": "churn"}


def classify(shares: Shares) -> Structure:
    """The structure that two regimes have.

    `fixed` if that share is surely FIXED or more. Else the one that surely outweighs the two others together. Else
    `mixed`, if at least two surely have a share of PRESENT. Else `inconclusive`.
    """
    if shares.fixed.above(FIXED):
        return "fixed"
    for name, structure in NAMES.items():
        if shares.lead[name].above(0.0):
            return structure
    return "mixed" if sum(getattr(shares, name).above(PRESENT) for name in NAMES) > 1 else "inconclusive"


def classify_all(pairs: Mapping[tuple[str, str], Structure]) -> tuple[Structure, tuple[tuple[str, ...], ...]]:
    """The structure of all regimes, from that of every pair; and, if they nest, the groups.

    Nested: regimes fall into groups, inside which each pair is a generalist, while each pair between groups is a
    conditional policy; at least two groups, and one of at least two regimes.

    >>> classify_all({("A", "B"): "generalist", ("A", "C"): "conditional", ("B", "C"): "conditional"})
    ('nested', (('A', 'B'), ('C',)))
    """
    regimes = list(dict.fromkeys(itertools.chain.from_iterable(pairs)))
    found = set(pairs.values())
    if "inconclusive" in found:
        return "inconclusive", ()
    if len(found) == 1:
        return found.pop(), ()
    groups: list[list[str]] = []
    for regime in regimes:
        for group in groups:
            if _of(pairs, regime, group[0]) == "generalist":
                group.append(regime)
                break
        else:
            groups.append([regime])
    home = {regime: i for i, group in enumerate(groups) for regime in group}
    fits = all(kind == ("generalist" if home[a] == home[b] else "conditional") for (a, b), kind in pairs.items())
    return ("nested", tuple(map(tuple, groups))) if fits else ("mixed", ())


def _of(pairs: Mapping[tuple[str, str], Structure], a: str, b: str) -> Structure:
    return pairs[a, b] if (a, b) in pairs else pairs[b, a]


def retention(course: Course, cue: str, counts: Int[np.ndarray, "draw question"]) -> Interval:
    """What a regime earns after phases that train on others, as share of what it earns after those that train on it.

    Null where the last cycle has no such phases, or the regime earns next to nothing after its own.
    """
    after = {own: [at for at in course.cycle if (cue in course.phases[at - 1][1:]) == own] for own in (True, False)}
    if not after[True] or not after[False]:
        return NOT_MEASURED
    at_home, away = (resampled_mean(course.own(cue, after[own]).mean(0), counts) for own in (True, False))
    return interval(share(away, at_home, EARNS), counts)


def fragility(course: Course, counts: Int[np.ndarray, "draw question"]) -> Interval:
    """What regimes earn over the last cycle, less what is earned under cues that no phase trains on; from -1 to 1.

    Null where every cue is trained on.
    """
    unseen = [cue for cue in course.cues if not any(cue in kind[1:] for kind in course.phases)]
    if not unseen:
        return NOT_MEASURED
    there, here = (
        np.mean([course.own(cue, course.cycle) for cue in cues], (0, 1)) for cues in (unseen, course.trained)
    )
    return interval(resampled_mean(here - there, counts), counts)


def culled(course: Course, phase: int, cue: str, counts: Int[np.ndarray, "draw question"]) -> Interval:
    """How much of a trait the SFT phase of this number (from 0) removes, as it shows under a cue: 1, all of it.

    The trait is what the objective of the RL phases just before pays; how far these had raised it is the whole. Null
    where they had not raised it under this cue. Raises InputError for a phase that is no SFT phase behind RL.
    """
    start = phase
    while start and course.phases[start - 1][0] == "rl" and course.phases[start - 1] == course.phases[phase - 1]:
        start -= 1
    if course.phases[phase][0] != "sft" or start == phase:
        raise InputError(f"phase {phase + 1} of the schedule is no SFT phase behind RL: it culls no trait of RL")
    objective = course.cues.index(course.phases[phase - 1][1])
    shown = resampled_mean(course.earned[:, course.cues.index(cue), objective].T, counts)
    raised = shown[:, phase] - shown[:, start]
    if raised[0] < 0 or not apart(raised, EARNS):
        return NOT_MEASURED
    return interval((shown[:, phase] - shown[:, phase + 1]) / raised, counts)
