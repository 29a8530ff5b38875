"""How RL moves the weights of policies where it moves nothing else: exact drift, and runs of finite groups.

The weights of M policies are a softmax of M numbers theta that all cues share, and an answer of policy m is right with
probability p_m under the trained cue. Nothing here knows of a network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from mixturelens.types import InputError

Drift = Literal["softmax", "replicator"]
"""`softmax`: the policy gradient, theta_m' = c_m (p_m - mean p). `replicator`: the natural gradient,
theta_m' = p_m - mean p, an alternative that plain training does not follow."""

SETTLED = 1e-4
"""An exact path ends where the trained cue's accuracy is this near to the best policy's."""
STABLE = 1e-4
"""What TRL adds to a group's standard deviation."""
LONG = 1e6
"""Units of drift after which a path ends, settled or not: no RL lasts as long."""
ALIKE = 0.01
"""Two policies right alike but for so much decide it among themselves too slowly for a path to settle."""
POINTS = 400
"""Of an exact path, evenly spaced in accuracy under the trained cue."""


@dataclass(frozen=True)
class WeightPath:
    """Weights on their way, from those of S on; by time in units of drift (`clock`), not of steps."""

    time: Float[np.ndarray, " point"]
    weights: Float[np.ndarray, "point policy"]
    shift: Float[np.ndarray, "point policy"]
    """theta - theta of S: what cues share, up to their kernels."""


def velocity(
    weights: Float[np.ndarray, "*at policy"], right: Float[np.ndarray, " policy"], drift: Drift = "softmax"
) -> Float[np.ndarray, "*at policy"]:
    """How fast theta moves along a drift where policies have these weights and are right so often: one number a policy.

    With A = right - weights . right (the advantage) it is weights * A for plain policy gradient (`softmax`), and A
    itself for the natural one (`replicator`).

    >>> velocity(np.array([0.5, 0.5]), np.array([1.0, 0.0]))
    array([ 0.25, -0.25])
    >>> velocity(np.array([0.5, 0.5]), np.array([1.0, 0.0]), "replicator")
    array([ 0.5, -0.5])
    """
    advantage = right - (weights @ right)[..., None]
    return weights * advantage if drift == "softmax" else advantage


def exact_path(
    weights: Float[np.ndarray, " policy"],
    right: Float[np.ndarray, " policy"],
    drift: Drift = "softmax",
    kernel: Float[np.ndarray, "policy policy"] | None = None,
) -> WeightPath:
    """The path that weights take along a drift, from `weights` until the trained cue is as right as the best policy
    that has any weight, or nearly (ALIKE). `right`: how often each policy is rewarded.

    A network moves log-weights by its tangent `kernel` (of the trained cue with itself) times theta; without one, by
    theta. Raises InputError for weights that are no distribution, and where nothing can be selected: no policy is
    righter than another, or the kernel does not let it win.

    >>> path = exact_path(np.array([0.5, 0.5]), np.array([1.0, 0.0]))
    >>> path.weights[0].round(3), path.weights[-1].round(3)
    (array([0.5, 0.5]), array([1., 0.]))
    """
    from scipy.integrate import solve_ivp

    start, right = _checked(weights, right)
    through = np.eye(len(start)) if kernel is None else kernel.T
    best = right[start > 0].max()
    if not best - start @ right > SETTLED:
        raise InputError("no policy is righter under the trained cue than all are together: nothing to select")

    def settled(_: float, shift: Float[np.ndarray, " policy"]) -> float:
        return best - float(shifted(start, shift @ through) @ right) - SETTLED

    settled.terminal = True  # pyright: ignore[reportFunctionMemberAccess]
    found = solve_ivp(
        lambda _, shift: velocity(shifted(start, shift @ through), right, drift),
        (0.0, LONG),
        np.zeros_like(start),
        method="LSODA",
        events=settled,
        rtol=1e-10,
        atol=1e-12,
        dense_output=True,
    )
    reached = shifted(start, found.y.T @ through) @ right
    if best - reached[-1] > ALIKE:
        raise InputError("the drift did not settle: does the kernel hold back what is right?")
    time = np.interp(np.linspace(reached[0], reached[-1], POINTS), reached, found.t)
    shift = found.sol(time).T
    return WeightPath(time, shifted(start, shift @ through), shift)


def shifted(
    weights: Float[np.ndarray, "*at policy"], shift: Float[np.ndarray, "*to policy"]
) -> Float[np.ndarray, "*to policy"]:
    """Weights once theta has moved by so much: softmax(log c + shift).

    >>> shifted(np.array([0.5, 0.5]), np.array([np.log(3), 0.0]))
    array([0.75, 0.25])
    """
    with np.errstate(divide="ignore"):
        logits = np.log(weights) + shift
    grown = np.exp(logits - logits.max(-1, keepdims=True))
    return grown / grown.sum(-1, keepdims=True)


def _checked(
    weights: Float[np.ndarray, " policy"], right: Float[np.ndarray, " policy"]
) -> tuple[Float[np.ndarray, " policy"], Float[np.ndarray, " policy"]]:
    weights, right = np.asarray(weights, dtype=float), np.asarray(right, dtype=float)
    if weights.shape != right.shape or weights.min() < 0 or not np.isclose(weights.sum(), 1):
        raise InputError(f"weights {weights.tolist()} of policies that are right {right.tolist()}: no distribution")
    return weights, right


def curve(
    path: WeightPath,
    weights: Float[np.ndarray, " policy"],
    on: Float[np.ndarray, " policy"],
    off: Float[np.ndarray, " policy"],
    kernel: Float[np.ndarray, "policy policy"] | None = None,
) -> tuple[Float[np.ndarray, " point"], Float[np.ndarray, " point"]]:
    """Accuracy under the trained cue and under another one along a path: an answer without a clock.

    `weights` are those of S under the other cue, where policies are right `off` as often; log-weights move there by the
    tangent `kernel` of the other cue with the trained one, and without it as theta does. What only hurries or slows the
    drift (the rate, GRPO's division) leaves the curve as it is.

    >>> path = exact_path(np.array([0.5, 0.5]), np.array([1.0, 0.0]))
    >>> here, there = curve(path, np.array([0.5, 0.5]), np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    >>> np.allclose(here + there, 1)
    True
    """
    return path.weights @ on, shifted(weights, path.shift if kernel is None else path.shift @ kernel.T) @ off


def group_pace(reached: float, group: int, *, scaled: bool = True) -> float:
    """How much faster than the drift theta moves in groups of so many samples, rewarded 1 or 0.

    In expectation a group moves theta along the softmax drift itself, times

        E[k/G (1 - k/G) / s_k] / (p (1 - p)),   k of G samples being right, p of all.

    GRPO divides by s, the standard deviation of the group's rewards (Shao et al. 2024, arXiv 2402.03300; as in TRL, of
    G - 1 degrees of freedom, plus 1e-4); not `scaled`, s is 1 and the pace 1 - 1/G.

    >>> round(group_pace(0.5, 8), 3), round(group_pace(0.5, 8, scaled=False), 3)
    (1.735, 0.875)
    """
    from scipy.stats import binom

    if not 0 < reached < 1:
        return 0.0  # all rewards are alike
    share = np.arange(group + 1) / group
    spread = share * (1 - share)
    s = np.sqrt(spread * group / (group - 1)) + STABLE if scaled else 1.0
    return float(binom.pmf(np.arange(group + 1), group, reached) @ (spread / s)) / (reached * (1 - reached))


@dataclass(frozen=True)
class Sampling:
    """How a run of RL samples: every step, `groups` groups of `group` answers."""

    group: int
    groups: int
    steps: int
    momentum: float = 0.0
    """Of Adam's running mean of gradients; 0: each step takes its own."""
    scaled: bool = True
    """Whether advantages are divided by the standard deviation of their group's rewards, as `group_pace` says."""


def sampled_paths(
    weights: Float[np.ndarray, "run policy"],
    right: Float[np.ndarray, "run policy"],
    kernel: Float[np.ndarray, "run policy policy"],
    sampling: Sampling,
    seed: int = 0,
) -> Float[np.ndarray, "run step policy"]:
    """Theta - theta of S in runs that sample: every step, groups of answers move theta by the mean of advantage x
    gradient of log c, or by Adam's running mean of those; log-weights move by the `kernel` times theta.

    `weights` are those of S, and `right` how often each policy is rewarded. The first step is that of S: zero. A policy
    that no group samples is not selected, whatever it could: the initial weight has to be about 1 / `sampling.group`.

    >>> start, right = np.full((50, 2), 0.5), np.tile([1.0, 0.0], (50, 1))
    >>> moved = sampled_paths(start, right, np.tile(np.eye(2), (50, 1, 1)), Sampling(8, 32, 20))
    >>> moved.shape, bool(shifted(start, moved[:, -1])[:, 0].mean() > 0.95)
    ((50, 21, 2), True)
    """
    rng = np.random.default_rng(seed)
    group, steps, momentum = sampling.group, sampling.steps, sampling.momentum
    runs, number = weights.shape
    mean_gradient, moved = np.zeros((runs, number)), np.zeros((runs, steps + 1, number))
    for step in range(steps):
        now = shifted(weights, np.einsum("rij,rj->ri", kernel, moved[:, step]))
        outcomes = np.concatenate([now * right, now * (1 - right)], -1)
        drawn = rng.multinomial(group, outcomes[:, None], size=(runs, sampling.groups)) / group
        succeeded, failed = drawn[..., :number], drawn[..., number:]
        reached = succeeded.sum(-1, keepdims=True)
        s = np.sqrt(reached * (1 - reached) * group / (group - 1)) + STABLE if sampling.scaled else 1.0
        # advantages sum to 0 in a group, so that of the gradient 1[m] - c only 1[m] is left
        gradient = ((succeeded * (1 - reached) - failed * reached) / s).mean(1)
        mean_gradient = momentum * mean_gradient + (1 - momentum) * gradient
        moved[:, step + 1] = moved[:, step] + mean_gradient / (1 - momentum ** (step + 1))
    return moved
