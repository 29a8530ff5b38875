"""What one thing about completions tells of another, at each prompt, in bits, and against shuffled labels. Numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

SHUFFLES = 200
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

    def plogp(values: np.ndarray) -> np.ndarray:
        return (values * np.log2(np.maximum(values, 1.0))).reshape(draws, -1).sum(1)

    apart = plogp(joint) - plogp(joint.sum(3)) - plogp(joint.sum(2)) + plogp(joint.sum((2, 3)))
    return apart / len(prompt)
