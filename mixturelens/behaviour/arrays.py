"""What one checkpoint does on each prompt, and what changed between two: arrays that every way of measuring fills."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

NOVEL = 0.01
"""A behaviour that S shows less often than this under an announcement is new in R: S has no skill there to compare."""


@dataclass(frozen=True)
class Behaviour:
    """What one checkpoint does on each prompt. NaN: not measured.

    `classes` are the probabilities of what it does of its own accord; `forced_*` are those with an announcement put in
    place, so they know a policy that is never heard, too.
    """

    classes: Float[np.ndarray, "prompt policy wording behaviour"]
    correct: Float[np.ndarray, "prompt policy"]
    """Joint probability of following the policy and being right."""
    forced_behaviour: Float[np.ndarray, "prompt known wording behaviour"]
    forced_correct: Float[np.ndarray, "prompt known wording"]

    @property
    def weights(self) -> Float[np.ndarray, "prompt policy"]:
        return self.classes.sum((-1, -2))

    @property
    def forced_accuracy(self) -> Float[np.ndarray, "prompt known"]:
        """Accuracy once a policy is put in place, each wording as often as the model itself uses it."""
        share = self.classes.sum(-1)[:, :-1]
        share = np.where(np.isnan(self.forced_correct), np.nan, share)
        total = np.nansum(share, -1, keepdims=True)
        number = (~np.isnan(share)).sum(-1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.where(total > 1e-300, share / total, np.where(np.isnan(share), np.nan, 1.0 / number))
        accuracy = np.nansum(share * self.forced_correct, -1)
        return np.where(number[..., 0] > 0, accuracy, np.nan)


@dataclass(frozen=True)
class Change:
    """What changed from S to R on each prompt, in nats, beside what either does.

    KL(R || S) = routing + wording + conditioning + skill + other, where `skill` is that of known policies and `other`
    is what completions of no known policy add: no specialist is behind those.
    Where policies announce nothing, no prompt alone tells them: `conditioning` is then all of KL(behaviour), and
    `unannounced` splits its mean.
    """

    before: Behaviour
    after: Behaviour
    routing: Float[np.ndarray, " prompt"]
    wording: Float[np.ndarray, " prompt"]
    conditioning: Float[np.ndarray, " prompt"]
    skill: Float[np.ndarray, " prompt"]
    novel: Float[np.ndarray, " prompt"]
    """The part of `skill` in behaviours that S hardly shows there (under NOVEL)."""
    other: Float[np.ndarray, " prompt"]
    dormant: Float[np.ndarray, " prompt"]
    method: str
    overlap: float | None = None
    """Of completions weighed under both checkpoints: the mean of 4 R S / (R + S)^2; 1 if alike, 0 if disjoint."""


def log_ratio(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300))


def dormant(after: Behaviour, policy_kl: Float[np.ndarray, "prompt known wording"]) -> Float[np.ndarray, " prompt"]:
    """The specialist term with uniform policy weights: a silent policy counts as much as one that is heard."""
    used = after.classes.sum(-1)[:, :-1]
    measured = ~np.isnan(policy_kl)
    used = np.where(measured, np.maximum(used, 1e-300), 0.0)
    share = used / np.maximum(used.sum(-1, keepdims=True), 1e-300)
    per_policy = np.where(measured.any(-1), np.nansum(share * policy_kl, -1), np.nan)
    return per_policy.mean(-1)
