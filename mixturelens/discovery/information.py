"""What one thing about completions tells of another, at each prompt, in bits, and against shuffled labels. Numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from mixturelens.stats import PROPORTION, mean_interval, resample_counts
from mixturelens.types import Interval

SHUFFLES = 200
ALPHA = 0.01
"""What shuffles tell as much no oftener than this is found."""
AT_ONCE = 1 << 20
"""Labels that are shuffled at once."""


@dataclass(frozen=True)
class Told:
    """Bits that are told beyond what shuffled labels tell, and how often these tell as much."""

    bits: float
    p: float


def told(
    left: Int[np.ndarray, " completion"],
    right: Int[np.ndarray, " completion"],
    prompt: Int[np.ndarray, " completion"],
    seed: int,
    shuffles: int = SHUFFLES,
) -> Told:
    """Mutual information of two labels of completions, given their prompt, in bits a completion.

    Labels are shuffled within prompts, so that what a prompt says of both is no information; the mean over shuffles is
    the bias of the plug-in estimate, and is taken off.

    >>> sides = np.array([0, 0, 1, 1] * 20)
    >>> told(sides, sides, np.repeat(np.arange(20), 4), seed=0).bits > 0.6
    True
    """
    if not len(left):
        return Told(0.0, 1.0)
    rng = np.random.default_rng(seed)
    order = np.argsort(prompt, kind="stable")
    left, right, prompt = (np.unique(each[order], return_inverse=True)[1] for each in (left, right, prompt))
    found = float(_bits(left, right[None], prompt)[0])
    null = np.empty(0)
    while len(null) < shuffles:
        some = min(shuffles - len(null), max(1, AT_ONCE // len(left)))
        within = np.argsort(prompt + rng.random((some, len(prompt))), axis=1)
        null = np.append(null, _bits(left, right[within], prompt))
    return Told(float(found - null.mean()), float((1 + (null >= found - 1e-12).sum()) / (1 + shuffles)))


def _bits(
    left: Int[np.ndarray, " completion"],
    right: Int[np.ndarray, "draw completion"],
    prompt: Int[np.ndarray, " completion"],
) -> Float[np.ndarray, " draw"]:
    """Plug-in information of each row of labels: H(left) + H(right) - H(both), of all prompts."""
    sizes = int(prompt.max()) + 1, int(left.max()) + 1, int(right.max()) + 1
    kinds = int(np.prod(sizes))
    draws = len(right)
    flat = (prompt * sizes[1] + left) * sizes[2] + right + kinds * np.arange(draws)[:, None]
    joint = np.bincount(flat.ravel(), minlength=draws * kinds).reshape(draws, *sizes).astype(float)

    return information(joint) / len(prompt)


def information(joint: Float[np.ndarray, "*draws given left right"]) -> Float[np.ndarray, "*draws"]:
    """Mutual information of left and right given a third label, in bits, times the number of what was counted.

    `joint` holds counts, as [given, left, right].

    >>> information(np.array([[[1.0, 0.0], [0.0, 1.0]]]))
    array(2.)
    """

    def plogp(values: np.ndarray) -> np.ndarray:
        return (values * np.log2(np.maximum(values, 1.0))).reshape(*joint.shape[:-3], -1).sum(-1)

    return np.asarray(plogp(joint) - plogp(joint.sum(-1)) - plogp(joint.sum(-2)) + plogp(joint.sum((-2, -1))))


def share_of_questions(ids: Sequence[str], hit: Bool[np.ndarray, " completion"], seed: int = 0) -> Interval:
    """Mean over questions of the share of their completions that are hit, with an interval over questions.

    `ids` is the question of each completion.
    """
    names, place = np.unique(ids, return_inverse=True)
    shares = np.bincount(place, weights=hit.astype(float)) / np.bincount(place)
    return mean_interval(shares, resample_counts(len(names), seed), bounds=PROPORTION)
