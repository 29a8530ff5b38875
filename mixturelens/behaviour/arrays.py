"""What one checkpoint does on each prompt, and what changed between two: arrays that every way of measuring fills."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Behaviour:
    """What one checkpoint does on each prompt. NaN: not measured.

    `classes` are the probabilities of what it does of its own accord; `forced_*` are those with an announcement put in
    place, so they know a policy that is never heard, too.
    """

    classes: Float[np.ndarray, "prompt policy wording behaviour"]
    right: Float[np.ndarray, "prompt policy wording behaviour"]
    """Probability of the class and of being right."""
    forced_behaviour: Float[np.ndarray, "prompt known wording behaviour"]
    forced_right: Float[np.ndarray, "prompt known wording behaviour"]
    """Probability of showing the behaviour and being right."""

    def part(self, index: Sequence[int]) -> Behaviour:
        """The behaviour on some of the prompts, by number."""
        return Behaviour(*(getattr(self, field.name)[index] for field in fields(self)))

    @property
    def weights(self) -> Float[np.ndarray, "prompt policy"]:
        """Mixture weights c(m given x): the probability that a completion follows each policy, `other` last."""
        return self.classes.sum((-1, -2))

    @property
    def correct(self) -> Float[np.ndarray, "prompt policy"]:
        """Joint probability of following the policy and being right."""
        return self.right.sum((-1, -2))

    @property
    def forced_correct(self) -> Float[np.ndarray, "prompt known wording"]:
        """Probability of being right behind each announcement, whatever the behaviour."""
        return self.forced_right.sum(-1)

    @property
    def forced_accuracy(self) -> Float[np.ndarray, "prompt known"]:
        """Accuracy once a policy is put in place, its wordings weighed by how often the model itself uses them.

        Where the model never follows a policy, its wordings count alike. NaN where nothing can be put in place.
        """
        share = self.classes.sum(-1)[:, :-1]
        share = np.where(np.isnan(self.forced_correct), np.nan, share)
        total = np.nansum(share, -1, keepdims=True)
        number = (~np.isnan(share)).sum(-1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.where(total > 1e-300, share / total, np.where(np.isnan(share), np.nan, 1.0 / number))
        accuracy = np.nansum(share * self.forced_correct, -1)
        return np.where(number[..., 0] > 0, accuracy, np.nan)


@dataclass(frozen=True)
class BitTerms:
    """Terms of every prompt, in bits; NaN where nothing was put in place. `specialist` is conditioning + skill."""

    routing: Float[np.ndarray, " prompt"]
    conditioning: Float[np.ndarray, " prompt"]
    specialist: Float[np.ndarray, " prompt"]
    dormant: Float[np.ndarray, " prompt"]


@dataclass(frozen=True)
class NatTerms:
    """Terms of every prompt, in nats, summed along the completion."""

    routing: Float[np.ndarray, " prompt"]
    wording: Float[np.ndarray, " prompt"]
    conditioning: Float[np.ndarray, " prompt"]
    skill: Float[np.ndarray, " prompt"]
    """KL of right or wrong, given the behaviour."""
    text: Float[np.ndarray, " prompt"]
    """KL of the tokens, given all that. Style, not skill. NaN, as what follows, where it was not asked."""
    other: Float[np.ndarray, " prompt"]
    length: Float[np.ndarray, " prompt"]
    """Tokens of R's completions of known policies, behind their announcements, times the weight of those."""


@dataclass(frozen=True)
class Change:
    """What changed from S to R on each prompt, beside what either does: in bits, and by the chain rule in nats.

    KL(R || S) = routing + wording + conditioning + skill + text + other, where conditioning, skill and text are those
    of known policies and `other` is what completions of no known policy add: no specialist is behind those.
    Where policies announce nothing, no prompt alone tells them: `conditioning` is then all of KL(behaviour), and
    `unannounced` splits its mean.
    """

    before: Behaviour
    after: Behaviour
    bits: BitTerms
    nats: NatTerms
    method: str
    overlap: float | None = None
    """Of completions weighed under both checkpoints: the mean of 4 R S / (R + S)^2; 1 if alike, 0 if disjoint."""


def spread(
    values: Float[np.ndarray, " some *rest"], at: Sequence[int], number: int
) -> Float[np.ndarray, " prompt *rest"]:
    """Lay values of some prompts out over all `number` prompts; the others are NaN. `at` says which prompts they are
    of.

    >>> spread(np.array([1.0]), [2], 3)
    array([nan, nan,  1.])
    """
    found = np.full((number, *values.shape[1:]), np.nan)
    found[list(at)] = values
    return found
