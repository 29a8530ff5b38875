"""How well one completion tells S from R, and by what: Jensen-Shannon divergences in bits, of each prompt. Numpy only.

    routing      = JS(c_S, c_R)                                                   which policy is expressed
    conditioning = sum_m w_m JS(b_S given m, b_R given m)                         what it does under a cue
    skill        = sum_m w_m [JS((b, k)_S given m, (b, k)_R given m) - JS(b ...)]   how well it does it
    dormant      = the sum of both with equal weights: hears a silent policy

c are the weights of policies, b is the behaviour, k whether it is right, w_m = (c_S(m) + c_R(m)) / 2, and "given m"
means that policy m's announcement is put in place; where it has several wordings, each counts as often as the two use
it. Each term lies between 0 and 1, whatever the length of completions and however sure of a policy a checkpoint is.
Skill is at least 0, because what tells b tells no more than what tells (b, k) (data processing).
"""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Float

from mixturelens.behaviour.arrays import Behaviour, BitTerms

TABLED = 64
"""Samples a side up to which a table is fitted; of more, each so many count as often as the others."""
GRID = 41
"""Probabilities, a side, at which a table is fitted."""
ALIKE = 100.0
"""How much more the bias counts in the fit where both sides are alike: nothing must not look like something."""
CALM = 1e-3
"""Weight of a table's variance against its squared bias."""

SELDOM = 0.025
"""Chance that a bound for what was never drawn is too low."""


def never_drawn(draws: int) -> float:
    """The bits that an outcome may add to JS although none of `draws` completions of either side showed it.

    Its probability p is then at most -ln(SELDOM) / draws. If it is that on one side and 0 on the other, it adds p / 2.

    >>> round(never_drawn(60 * 16), 4)
    0.0019
    """
    return min(1.0, float(-np.log(SELDOM)) / draws / 2)


def js(p: Float[np.ndarray, "*batch k"], q: Float[np.ndarray, "*batch k"]) -> Float[np.ndarray, "*batch"]:
    """Jensen-Shannon divergence in bits along the last axis (Lin 1991, doi 10.1109/18.61115).

    >>> js(np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([[0.0, 1.0], [0.5, 0.5]]))
    array([1., 0.])
    """
    return np.asarray(np.maximum(_part(p, q).sum(-1), 0.0))


def _part(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """What one outcome adds to JS: it depends on this outcome's two probabilities alone."""
    return (_plogp(p) + _plogp(q)) / 2 - _plogp((p + q) / 2)


def _plogp(p: np.ndarray) -> np.ndarray:
    return np.where(p > 0, p * np.log2(np.maximum(p, 1e-300)), 0.0 * p)  # NaN stays NaN


def js_of_samples(
    p: Float[np.ndarray, "*batch k"], q: Float[np.ndarray, "*batch k"], samples: int
) -> Float[np.ndarray, "*batch"]:
    """Estimate of JS in bits from frequencies in `samples` draws a side, corrected for its bias.

    JS of frequencies is too large, by 0.1 bits at 4 draws of two outcomes. Each outcome's part is therefore read from a
    table of the two counts, whose mean comes as near to the true part as any table's of so many draws does, over all
    pairs of probabilities (least squares on a grid). Single estimates may be below 0; their mean is what counts.

    >>> js_of_samples(np.array([1.0, 0.0]), np.array([1.0, 0.0]), samples=4)
    array(0.)
    """
    unknown = np.isnan(p) | np.isnan(q)
    at = (np.rint(np.where(unknown, 0.0, side) * samples).astype(int) for side in (p, q))
    return np.asarray(np.where(unknown, np.nan, _table(samples)[*at]).sum(-1))


@functools.cache
def _table(samples: int) -> Float[np.ndarray, "count count"]:
    """Estimate of an outcome's part for each pair of counts. Nothing seen, or nothing else, on both sides is 0."""
    from scipy.stats import binom, hypergeom

    if samples > TABLED:  # the mean over all choices of TABLED samples a side has the same bias, and less variance
        counts = np.arange(samples + 1)[:, None]
        chosen = hypergeom.pmf(np.arange(TABLED + 1), samples, counts, TABLED)
        return np.asarray(chosen @ _table(TABLED) @ chosen.T)
    at = (1 - np.cos(np.linspace(0, np.pi, GRID))) / 2  # closer where the part bends: near 0 and 1
    seen = binom.pmf(np.arange(samples + 1), samples, at[:, None])
    chance = np.einsum("ia,jb->ijab", seen, seen).reshape(GRID * GRID, -1)
    true = _part(at[:, None], at[None, :]).ravel()
    counts = np.arange(samples + 1) / samples
    plain = _part(counts[:, None], counts[None, :]).ravel()
    weight = np.where(np.eye(GRID, dtype=bool), ALIKE, 1.0).ravel()[:, None]
    free = np.arange(1, len(plain) - 1)
    normal = (chance * weight).T @ chance + CALM * np.diag(chance.sum(0))
    wanted = (chance * weight).T @ (true - chance @ plain)
    found = plain.copy()
    found[free] += np.linalg.solve(normal[np.ix_(free, free)], wanted[free])
    return found.reshape(samples + 1, samples + 1)


def bit_terms(before: Behaviour, after: Behaviour, samples: int | None = None) -> BitTerms:
    """The terms of every prompt in bits, from what S (`before`) and R (`after`) do.

    `samples` is how many completions a prompt stand behind each probability, so that the bias of JS can be taken off;
    None means that probabilities are exact.
    """

    def apart(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return js(p, q) if samples is None else js_of_samples(p, q, samples)

    used = (before.classes.sum(-1) + after.classes.sum(-1))[:, :-1] / 2
    done = [behaviour.forced_behaviour for behaviour in (before, after)]
    right = [behaviour.forced_right for behaviour in (before, after)]
    joint = [
        np.stack([r, np.maximum(d - r, 0.0)], -1).reshape(*d.shape[:-1], -1) for d, r in zip(done, right, strict=True)
    ]
    by_behaviour, by_both = apart(*done), apart(*joint)
    return BitTerms(
        routing=apart(before.weights, after.weights),
        conditioning=np.nansum(used * by_behaviour, (1, 2)),
        specialist=np.nansum(used * by_both, (1, 2)),
        dormant=_evenly(used, by_both),
    )


def _evenly(
    used: Float[np.ndarray, "prompt known wording"], values: Float[np.ndarray, "prompt known wording"]
) -> Float[np.ndarray, " prompt"]:
    """Mean over policies; within one, wordings count as often as they are used."""
    measured = ~np.isnan(values)
    share = np.where(measured, np.maximum(used, 1e-300), 0.0)
    share = share / np.maximum(share.sum(-1, keepdims=True), 1e-300)
    per_policy = np.where(measured.any(-1), np.nansum(share * values, -1), np.nan)
    known = ~np.isnan(per_policy)
    with np.errstate(invalid="ignore"):
        return np.where(known.any(-1), np.nansum(per_policy, -1) / np.maximum(known.sum(-1), 1), np.nan)
