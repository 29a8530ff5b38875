"""The exact splits of a change by the chain rule: of KL(R || S) in nats, and of accuracy. Numpy only.

Arrays of classes are [..., policy, wording, behaviour]: the joint probability that a completion follows the policy (the
last one is `other`), in the wording, with the behaviour. They sum to one.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from mixturelens.behaviour.arrays import Behaviour, NatTerms

ROUNDING = 1e-12
"""Of a probability that is the difference of two."""


def kl(p: Float[np.ndarray, "*batch k"], q: Float[np.ndarray, "*batch k"]) -> Float[np.ndarray, "*batch"]:
    """KL(p || q) in nats along the last axis of unnormalised rows of equal mass; 0 log 0 is 0.

    >>> kl(np.array([[1.0, 0.0]]), np.array([[0.5, 0.5]])).round(4)
    array([0.6931])
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0)
    return terms.sum(-1)


def class_terms(
    after: Float[np.ndarray, "*batch policy wording behaviour"],
    before: Float[np.ndarray, "*batch policy wording behaviour"],
) -> tuple[Float[np.ndarray, "*batch"], Float[np.ndarray, "*batch"], Float[np.ndarray, "*batch"]]:
    """(routing, wording, conditioning) in nats, by the chain rule, in the order in which a completion is written.

    They are KL(policy), E KL(wording given policy) and E KL(behaviour given policy and wording), of R against S;
    expectations are under R.
    """
    routing = kl(after.sum((-1, -2)), before.sum((-1, -2)))
    through_wording = kl(_flat(after.sum(-1)), _flat(before.sum(-1)))
    through_behaviour = kl(_flat(_flat(after)), _flat(_flat(before)))
    return routing, through_wording - routing, through_behaviour - through_wording


def skill_term(
    after: Float[np.ndarray, "*batch known wording behaviour"],
    after_right: Float[np.ndarray, "*batch known wording behaviour"],
    before: Float[np.ndarray, "*batch known wording behaviour"],
    before_right: Float[np.ndarray, "*batch known wording behaviour"],
) -> Float[np.ndarray, "*batch"]:
    """E KL(right or wrong given policy, wording and behaviour) in nats; `*_right` is the part of each class that is
    right.

    What is wrong is the difference of the two, and is known no better than to ROUNDING of its class.
    """
    terms = np.zeros(after.shape)
    for part, other in ((after_right, before_right), (_rest(after, after_right), _rest(before, before_right))):
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.log(part) - np.log(other) - (np.log(after) - np.log(before))
        terms += np.where((part > 0) & np.isfinite(ratio), part * ratio, 0.0)
    return terms.sum((-1, -2, -3))


def nat_terms(
    before: Behaviour,
    after: Behaviour,
    policy_kl: Float[np.ndarray, "prompt known wording"],
    length: Float[np.ndarray, "prompt known wording"],
    other: Float[np.ndarray, " prompt"],
) -> NatTerms:
    """The terms of KL(R || S) of every prompt, from what S and R do and from what follows each announcement.

    `policy_kl` is KL(R || S), in nats, of all that follows an announcement, and `length` the tokens of both together;
    NaN where none was put in place. `other` is what completions of no known policy add.
    """
    routing, wording, conditioning = class_terms(after.classes, before.classes)
    known = (after.classes[:, :-1], after.right[:, :-1], before.classes[:, :-1], before.right[:, :-1])
    skill = skill_term(*known)
    heard = after.classes.sum(-1)[:, :-1]
    return NatTerms(
        routing=routing,
        wording=wording,
        conditioning=conditioning,
        skill=skill,
        text=_over_policies(heard * policy_kl) - conditioning - skill,
        other=other,
        length=_over_policies(heard * length),
    )


def _over_policies(values: Float[np.ndarray, "prompt known wording"]) -> Float[np.ndarray, " prompt"]:
    """Sum, of those that were measured; NaN where none was."""
    return np.where(np.isnan(values).all((1, 2)), np.nan, np.nansum(values, (1, 2)))


def _rest(classes: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.maximum(classes - right, ROUNDING * classes)


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(*array.shape[:-2], -1)


def accuracy_split(
    weights_before: Float[np.ndarray, "*batch policy"],
    accuracy_before: Float[np.ndarray, "*batch policy"],
    weights_after: Float[np.ndarray, "*batch policy"],
    accuracy_after: Float[np.ndarray, "*batch policy"],
) -> tuple[Float[np.ndarray, "*batch"], Float[np.ndarray, "*batch"]]:
    """(selector, specialists): the exact split of the change of `sum_m c_m p_m`.

    A policy of weight zero has no accuracy of its own (NaN) there; the other checkpoint's is taken, so that a policy
    that is gone counts as selected away rather than as unlearnt.

    >>> accuracy_split(*map(np.array, ([[0.5, 0.5]], [[1.0, 0.0]], [[1.0, 0.0]], [[1.0, np.nan]])))
    (array([0.5]), array([0.]))
    """
    p_before = np.where(np.isnan(accuracy_before), accuracy_after, accuracy_before)
    p_after = np.where(np.isnan(accuracy_after), accuracy_before, accuracy_after)
    p_before, p_after = np.nan_to_num(p_before), np.nan_to_num(p_after)
    selector = ((weights_after - weights_before) * (p_before + p_after) / 2).sum(-1)
    specialists = ((weights_before + weights_after) / 2 * (p_after - p_before)).sum(-1)
    return selector, specialists
