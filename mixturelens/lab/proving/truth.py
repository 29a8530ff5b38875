"""The truth about a pair, from all its completions, and the word that follows by definition.

Deliberately independent: plain numbers in and out. Nothing here and in `exhaustive` comes from the instruments that are
scored (`behaviour`, `routing`), not even the labels of completions or the divergence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mixturelens.types import Frozen, VerdictWord

TOLERANCE = 1e-3
"""Bits and nats that an interval may miss by: what the truth leaves unresolved, a beginning of small probability
counting as one completion, is of that order."""
SHARES, LEAST, CELL, COVERED, TEXT = (0.1, 0.9), 0.005, 0.02, 0.9, 0.005
"""By the definition of the verdict: shares between which it is `both`; bits under which nothing changed; the change of
a probability from which a cell of the policy table moved; the weight that known policies must have; and nats a token
from which the text drifted.

Half a hundredth of a bit is an even start that moves by 8 points, or a sure thing that becomes one of 99 in 100."""


class Truth(Frozen):
    """What is so about a pair, on all the questions asked."""

    verdict: VerdictWord
    """The word that follows from the exact numbers; `inconclusive` where known policies cover too little."""
    routing_share: float | None
    moved: float
    """routing + specialist, bits."""
    bits: dict[str, float]
    """`routing`, `specialist` = `conditioning` + `skill`, and `dormant`, bits a prompt."""
    text: float
    """Nats a token of what is said once policy, behaviour and rightness are known."""
    nats: dict[str, float]
    selector: bool
    cue_reader: bool
    skill: bool
    cell: float
    """Largest change of a cell of the policy table, silent policies included: of refusals, or of right answers."""
    dormant_intact: bool
    text_drifted: bool
    coverage: float
    unresolved: float
    """Largest probability, over prompts and checkpoints, of beginnings that were not followed to their end."""


@dataclass(frozen=True)
class PromptTruth:
    """Every term of every prompt, for means over any questions. Questions in order, each under every cue."""

    bits: dict[str, Float[np.ndarray, "question cue"]]
    terms: dict[str, Float[np.ndarray, "question cue"]]
    """Of KL(R || S), nats."""
    tokens: Float[np.ndarray, "question cue"]
    """Of R's completions of known policies, the end included."""
    weights: Float[np.ndarray, "side question cue policy"]
    """Sides: S, R. The last policy is `other`."""
    shown: Float[np.ndarray, "side question cue known wording shown"]
    """Probability of (refusal, fixed wrong rule, right answer, other answer) with the policy put in place."""
    unresolved: float


# --- divergence -------------------------------------------------------------------------------------------------------


def divergence(sides: Float[np.ndarray, "2 *batch k"]) -> Float[np.ndarray, "*batch"]:
    """Jensen-Shannon divergence in bits along the last axis: how well one draw tells S from R.

    >>> float(divergence(np.array([[1.0, 0.0], [0.0, 1.0]])))
    1.0
    """
    middle = sides.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(sides > 0, sides * np.log2(sides / middle), 0.0) / 2  # 0 log 0 is 0
    return terms.sum((0, -1))


def divergence_within(sides: Float[np.ndarray, "2 *batch group k"]) -> Float[np.ndarray, "*batch"]:
    """What a draw tells of S and R by its place in a group once the group is known: by the chain rule of mutual
    information, `divergence` over all places less that over groups. Each group's part is at least 0.
    """
    of_group = sides.sum(-1, keepdims=True)
    middle, middle_of_group = sides.mean(0), of_group.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log2(sides / of_group) - np.log2(middle / middle_of_group)
        terms = np.where(sides > 0, sides * ratio, 0.0) / 2
    return terms.sum((0, -1)).clip(min=0.0).sum(-1)


def bits_of(
    weights: Float[np.ndarray, "2 *prompt policy"],
    joint: Float[np.ndarray, "2 *prompt known wording"],
    given: Float[np.ndarray, "2 *prompt known wording behaviour right"],
) -> dict[str, Float[np.ndarray, "*prompt"]]:
    """The terms of a change from S to R, in bits: `weights` with `other` last, `joint` of known policies and wordings,
    and what is done with each put in place (NaN where a policy has no such wording).

    >>> half, sure = np.array([0.5, 0.5, 0.0]), np.array([1.0, 0.0, 0.0])
    >>> does = np.tile([0.0, 1.0], (2, 2, 1, 1, 1))
    >>> {k: round(float(v), 3) for k, v in bits_of(np.stack([half, sure]),
    ...     np.stack([half, sure])[:, :2, None], does).items()}
    {'routing': 0.311, 'conditioning': 0.0, 'skill': 0.0, 'specialist': 0.0, 'dormant': 0.0}
    """
    there = np.asarray(~np.isnan(given).any((0, -1, -2)))
    done = np.where(there[..., None, None], given, 0.0)
    places = done.reshape(*done.shape[:-2], -1)
    behaviour, within, both = divergence(done.sum(-1)), divergence_within(done), divergence(places)
    used = np.where(there, joint.mean(0), 0.0)
    of_policy = used.sum(-1, keepdims=True)
    number = np.maximum(there.sum(-1, keepdims=True), 1)
    with np.errstate(invalid="ignore"):
        share = np.where(of_policy > 0, used / of_policy, there / number)
    known = np.maximum(there.any(-1).sum(-1), 1)
    return {
        "routing": divergence(weights),
        "conditioning": (used * behaviour).sum((-1, -2)),
        "skill": (used * within).sum((-1, -2)),
        "specialist": (used * both).sum((-1, -2)),
        "dormant": (share * both).sum((-1, -2)) / known,
    }


# --- what is so -------------------------------------------------------------------------------------------------------


def truth_of(found: PromptTruth) -> Truth:
    """The truth about the pair: means over questions and cues, and the word that follows by definition."""
    bits = {name: float(values.mean()) for name, values in found.bits.items()}
    nats = {name: float(values.mean()) for name, values in found.terms.items()}
    moved = bits["routing"] + bits["specialist"]
    coverage = float((1 - found.weights[..., -1]).mean(1).min())
    # of each cell of the policy table: how often it refuses, and how often it is right
    change = float(np.nanmax(np.abs((found.shown[1] - found.shown[0])[..., [0, 2]].mean(0))))
    text = nats["text"] / float(found.tokens.mean())
    return Truth(
        verdict=word(bits, coverage),
        routing_share=bits["routing"] / moved if moved > 0 else None,
        moved=moved,
        bits=bits,
        text=text,
        nats=nats,
        selector=bits["routing"] >= LEAST,
        cue_reader=bits["conditioning"] >= LEAST,
        skill=bits["skill"] >= LEAST,
        cell=change,
        dormant_intact=change <= CELL,
        text_drifted=text >= TEXT,
        coverage=coverage,
        unresolved=found.unresolved,
    )


def word(bits: Mapping[str, float], coverage: float = 1.0) -> VerdictWord:
    """The verdict that follows by definition from exact terms in bits, and from the share of completions that known
    policies cover.

    >>> word({"routing": 0.2, "specialist": 0.01})
    'routing'
    """
    if coverage < COVERED:
        return "inconclusive"
    moved = bits["routing"] + bits["specialist"]
    if moved < LEAST:
        return "neither"
    share = bits["routing"] / moved
    return "routing" if share >= SHARES[1] else "specialist" if share <= SHARES[0] else "both"
