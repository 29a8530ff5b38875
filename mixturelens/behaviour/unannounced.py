"""Policies that announce nothing: their weights by maximum likelihood, and what explains a change of behaviours.

The model is `P(b given x) = sum_m c(m) T(m, cue of x, b)`, with T the policy table but for a small slip. One assumption
carries it: **the weights c are shared across cues**. A selector that reads the cue moves behaviours under that cue
alone, and looks like a changed cue reader; completions alone cannot tell the two apart. So a change of behaviours from
S to R is explained by one of

- *nothing*: they are what they were;
- *routing*: the weights moved, and the table holds;
- *conditioning*: the weights hold, and one cell of the table moved, to any behaviours: seen under one cue only.

Each is fitted by maximum likelihood (weights by EM, Dempster, Laird and Rubin 1977). Its misfit is the mean over cues
of KL(behaviours of R || those of the fit), in nats, in excess of the misfit of S's own weights. Only if one explains,
and the other surely does not, is the change split under it. More than one thing that moved is left unexplained: weights
and a cell, or several cells, such as refusals unlearnt under every cue, can do the same to what completions do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from mixturelens.behaviour.arrays import Behaviour
from mixturelens.behaviour.bits import js
from mixturelens.behaviour.prompts import Prompts
from mixturelens.behaviour.split import kl
from mixturelens.stats import interval
from mixturelens.suite import Suite
from mixturelens.types import ANSWER, Frozen, Interval

SLIP = 1e-3
"""How often a policy does something else than its table says; also the weight that cannot be told from none."""
MISFIT = 0.01
UNEXPLAINED = 0.1
"""An explanation explains if its misfit is under so many nats, and under such a part of the change of behaviours."""
ITERATIONS = 5000
TOLERANCE = 1e-10
"""EM ends after so many iterations, or when no weight moves by more."""

Explanation = Literal["nothing", "routing", "conditioning"]


class Identified(Frozen):
    """Whether behaviours tell the policies apart, and what explains their change."""

    rank: int
    """Of the policy table as [cue x behaviour, policy]. The policies can be told apart if there are as many."""
    spare: int
    """Degrees of freedom of the behaviours in the table beyond those of the weights: 0 leaves no misfit to be seen."""
    condition: float | None
    """Condition number of that table: how much an error of behaviours grows in the weights; null where rank lacks."""
    slip: float = SLIP
    thresholds: tuple[float, float] = (MISFIT, UNEXPLAINED)
    """Misfit allowed: in nats, and as a part of the change of behaviours."""
    weights: dict[str, dict[str, Interval]]
    """`before`, `after` -> policy -> weight, shared across cues, with the table held."""
    misfit_before: Interval
    """KL(behaviours of S || those of its own weights)."""
    misfit: dict[Explanation, Interval] = {}
    """Of each explanation of R, in excess of `misfit_before`; of `nothing`: KL(R || S) of the behaviours."""
    explanation: Explanation | None = None
    cell: tuple[str, str] | None = None
    """(policy, cue) of the cell that explains best."""
    doubt: str | None = None
    """Why there is no explanation."""


@dataclass(frozen=True)
class Explained:
    """What explains a pair's behaviours, and the two terms under it; NaN where nothing does."""

    identified: Identified
    bits: tuple[Float[np.ndarray, "draw cue"], Float[np.ndarray, "draw cue"]]
    """Routing and conditioning."""
    nats: tuple[Float[np.ndarray, "draw cue"], Float[np.ndarray, "draw cue"]]
    after: tuple[Float[np.ndarray, " policy"], Float[np.ndarray, "policy cue behaviour"]]
    """Weights and table of R under the explanation."""


def table_of(suite: Suite) -> Float[np.ndarray, "policy cue behaviour"]:
    """The policy table of a suite as probabilities, a slip of SLIP included."""
    names, table = suite.behaviour_names, suite.table or {}
    result = np.full((len(table), len(suite.cues), len(names)), SLIP / (len(names) - 1))
    for m, row in enumerate(table.values()):
        for c, cue in enumerate(suite.cues):
            result[m, c, names.index(row[cue])] = 1 - SLIP
    return result


def fit_weights(
    shown: Float[np.ndarray, "draw cue behaviour"], table: Float[np.ndarray, "policy cue behaviour"]
) -> Float[np.ndarray, "draw policy"]:
    """The mixture weights that make what completions show most likely, every cue counted equally.

    They are fitted by EM, in all bootstrap samples at once.
    """
    weights = np.full((len(shown), len(table)), 1 / len(table))
    for _ in range(ITERATIONS):
        ratio = shown / np.einsum("dm,mcb->dcb", weights, table)
        update = weights * np.einsum("dcb,mcb->dm", ratio, table) / shown.shape[1]
        moved = np.abs(update - weights)
        weights = update
        if not (moved > TOLERANCE).any():
            break
    return weights


def fit_cell(
    shown: Float[np.ndarray, "draw behaviour"],
    rest: Float[np.ndarray, "draw behaviour"],
    weight: Float[np.ndarray, "draw 1"],
) -> Float[np.ndarray, "draw behaviour"]:
    """The behaviours q of one cell that make `rest + weight q` most likely, in closed form (water-filling)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(shown > 0, rest / shown, np.inf)
    order = ratio.argsort(-1)
    sums = [np.take_along_axis(each, order, -1).cumsum(-1) for each in (rest, shown)]
    levels = (weight + sums[0]) / np.maximum(sums[1], 1e-300)
    number = (np.take_along_axis(ratio, order, -1) < levels).sum(-1, keepdims=True)
    level = np.take_along_axis(levels, np.maximum(number, 1) - 1, -1)
    return np.maximum(shown * level - rest, 0) / np.maximum(weight, 1e-300)


def attributed(
    prompts: Prompts,
    behaviour: Behaviour,
    fit: tuple[Float[np.ndarray, " policy"], Float[np.ndarray, "policy cue behaviour"]] | None = None,
) -> Behaviour:
    """Behaviours shared out over the policies that show them under a cue, in proportion to the weights of these.

    `fit` holds weights and table; without it the weights are fitted, for each hint. What no policy shows under a cue
    goes to `other`. Forced accuracy is that of answers where the table answers, and NaN elsewhere: nothing can be put
    in place. Policies that announce themselves are left as they are.
    """
    suite = prompts.suite
    if suite.table is None:
        return behaviour
    plain = table_of(suite)
    shown, right = behaviour.classes.sum((1, 2)), behaviour.correct.sum(1)
    cue = np.array([suite.cues.index(row.cue) for row in prompts.rows])
    share = np.zeros((len(cue), *plain.shape[::2]))
    for hint in dict.fromkeys(row.hint for row in prompts.rows):
        at = np.array([row.hint == hint for row in prompts.rows])
        present = np.unique(cue[at])
        if fit is None:
            means = np.stack([shown[at & (cue == c)].mean(0) for c in present])
            weights, table = fit_weights(means[None], plain[:, present])[0], plain
        else:
            weights, table = fit
        joint = weights[:, None, None] * np.where(table > SLIP, table, 0.0)
        total = joint.sum(0)
        posterior = np.divide(joint, total, out=np.zeros_like(joint), where=total > 0)
        share[at] = posterior.transpose(1, 0, 2)[cue[at]]
    share = np.concatenate([share, 1 - share.sum(1, keepdims=True)], 1)
    classes = (share * shown[:, None])[:, :, None]
    answer = suite.behaviour_names.index(ANSWER)
    answers = plain[:, cue, answer].T > SLIP
    joint, unknown = np.zeros_like(classes), np.full(classes[:, :-1].shape, np.nan)
    joint[:, :, 0, answer] = share[:, :, answer] * right[:, None]
    forced = np.where(answers[:, :, None, None], 0.0, unknown)
    with np.errstate(divide="ignore", invalid="ignore"):
        forced[:, :, 0, answer] += (right / shown[:, answer])[:, None]
    return Behaviour(classes, joint, forced_behaviour=unknown, forced_right=forced)


def identify(suite: Suite, shown: Float[np.ndarray, "draw cue behaviour"]) -> Identified:
    """Whether what one checkpoint does tells its policies apart, and the weights of these."""
    table = table_of(suite)
    clean = np.where(table > SLIP, 1.0, 0.0)
    stacked = clean.reshape(len(table), -1).T
    rank = int(np.linalg.matrix_rank(stacked))
    spare = int((clean.max(0).sum(-1) - 1).sum()) - (rank - 1)
    weights = fit_weights(shown, table)
    return Identified(
        rank=rank,
        spare=spare,
        condition=float(np.linalg.cond(stacked)) if rank == len(table) else None,
        weights={"before": _named(suite, weights)},
        misfit_before=interval(_misfit(shown, weights, table)),
        doubt=_unidentified(rank, len(table), spare),
    )


def _unidentified(rank: int, policies: int, spare: int) -> str | None:
    if rank < policies:
        return (
            f"what completions do cannot tell the policies apart (the policy table has rank {rank} for {policies} "
            "policies); give another cue or behaviour"
        )
    if spare < 1:
        return (
            f"some weights of the {policies} policies fit whatever completions do, so that nothing is left to check "
            "them by; give another cue or behaviour"
        )
    return None


def explain(
    suite: Suite, before: Float[np.ndarray, "draw cue behaviour"], after: Float[np.ndarray, "draw cue behaviour"]
) -> Explained:
    """What explains the change of behaviours from S to R, and routing and conditioning under it.

    In nats, routing = KL(c_R || c_S), the same under every cue, and conditioning = c(m) KL(T_R || T_S given m) under
    the cue of the cell that moved; in bits, JS takes the place of KL. Weights and cells under the slip cannot be told
    from it, so both are lower bounds: where a cell of probability 0 fills up, the size of conditioning says as much of
    the slip as of R, and what counts is its direction and its policy.
    """
    found, table = identify(suite, before), table_of(suite)
    c_s, c_r = fit_weights(before, table), fit_weights(after, table)
    own = _misfit(before, c_s, table)
    cells = [_moved_cell(after, c_s, table, m, c) for m in range(len(table)) for c in range(len(suite.cues))]
    # of cells that explain as well, the one that takes the least change
    best = min(range(len(cells)), key=lambda k: (round(float(cells[k][1][0]), 6), float(cells[k][2][0])))
    moved, _, cell_nats = cells[best]
    m, c = divmod(best, len(suite.cues))
    draws: dict[Explanation, Float[np.ndarray, " draw"]] = {
        # blurred by the slip: a behaviour that S happened never to show is not infinitely far
        "nothing": kl(_blurred(after), _blurred(before)).mean(-1),
        "routing": _misfit(after, c_r, table) - own,
        # whichever cell a sample would choose: that of the estimate alone would seem surer than it is
        "conditioning": np.min([misfit for _, misfit, _ in cells], axis=0) - own,
    }
    misfit: dict[Explanation, Interval] = {name: interval(values) for name, values in draws.items()}
    cell = (list(suite.policies)[m], suite.cues[c])
    allowed = np.minimum(MISFIT, UNEXPLAINED * draws["nothing"])
    explains: dict[Explanation, bool | None] = {
        name: _under_zero(values - (MISFIT if name == "nothing" else allowed)) for name, values in draws.items()
    }
    explanation, doubt = _choose(found, misfit, explains, cell)
    bits, nats = ([np.full(after.shape[:2], 0.0 if explanation else np.nan) for _ in range(2)] for _ in range(2))
    weights, changed = c_s[0], table
    if explanation == "routing":
        nats[0][:] = kl(_floored(c_r), _floored(c_s))[:, None]
        bits[0][:] = js(_floored(c_r), _floored(c_s))[:, None]
    if explanation == "conditioning":
        nats[1][:, c] = cell_nats
        bits[1][:, c] = c_s[:, m] * js(moved, np.broadcast_to(table[m, c], moved.shape))
        changed = table.copy()
        changed[m, c] = moved[0]
    else:
        weights = c_r[0]
    identified = found.model_copy(
        update={
            "weights": {**found.weights, "after": _named(suite, c_r)},
            "misfit": misfit,
            "explanation": explanation,
            "cell": cell,
            "doubt": doubt,
        }
    )
    return Explained(identified, (bits[0], bits[1]), (nats[0], nats[1]), (weights, changed))


def _choose(
    found: Identified,
    misfit: dict[Explanation, Interval],
    explains: dict[Explanation, bool | None],
    cell: tuple[str, str],
) -> tuple[Explanation | None, str | None]:
    """The explanation that alone explains, or why none does."""
    if found.doubt is not None:
        return None, found.doubt
    if explains["nothing"]:
        return "nothing", None
    fits = "; ".join(f"{name} {_show(value)}" for name, value in misfit.items() if name != "nothing")
    if found.misfit_before.above(MISFIT):
        return None, (
            f"the policy table does not describe the checkpoint before (misfit {_show(found.misfit_before)} nats, and "
            f"{MISFIT} is allowed): the weights that explain one cue do not explain the others"
        )
    for what, value in (
        ("behaviours changed", misfit["nothing"]),
        ("the policy table describes S", found.misfit_before),
    ):
        if not value.excludes(MISFIT):
            return None, f"whether {what} cannot be told ({_show(value)} nats, about {MISFIT}); ask more questions"
    if (explains["routing"], explains["conditioning"]) == (True, False):
        return "routing", None
    if (explains["routing"], explains["conditioning"]) == (False, True):
        return "conditioning", None
    if explains["routing"] is False and explains["conditioning"] is False:
        return None, (
            "neither other weights nor one moved cell of the policy table explains what changed: the weights that "
            f"explain one cue do not explain the others (misfit in nats: {fits})"
        )
    if explains["routing"] and explains["conditioning"]:
        return None, (
            f"other weights and a moved cell of the policy table ({cell[0]} under {cell[1]}) both explain what changed "
            f"(misfit in nats: {fits}); give another cue or behaviour"
        )
    return None, f"what explains the change cannot be told (misfit in nats: {fits}); ask more questions"


def _under_zero(values: Float[np.ndarray, " draw"]) -> bool | None:
    found = interval(values)
    return True if found.below(0) else False if found.above(0) else None


def _moved_cell(
    after: Float[np.ndarray, "draw cue behaviour"],
    weights: Float[np.ndarray, "draw policy"],
    table: Float[np.ndarray, "policy cue behaviour"],
    m: int,
    c: int,
) -> tuple[Float[np.ndarray, "draw behaviour"], Float[np.ndarray, " draw"], Float[np.ndarray, " draw"]]:
    """The cell (m, c) fitted to R with the weights of S: its behaviours, the misfit, and its nats under that cue."""
    fitted = np.einsum("dm,mcb->dcb", weights, table)
    weight = weights[:, m, None]
    rest = np.maximum(fitted[:, c] - weight * table[m, c], 0)
    moved = fit_cell(after[:, c], rest, weight)
    fitted[:, c] = rest + weight * moved
    nats = weight[:, 0] * kl(moved, np.broadcast_to(table[m, c], moved.shape))
    return moved, kl(after, fitted).mean(-1), nats


def _misfit(
    shown: Float[np.ndarray, "draw cue behaviour"],
    weights: Float[np.ndarray, "draw policy"],
    table: Float[np.ndarray, "policy cue behaviour"],
) -> Float[np.ndarray, " draw"]:
    return kl(shown, np.einsum("dm,mcb->dcb", weights, table)).mean(-1)


def _blurred(shown: Float[np.ndarray, "draw cue behaviour"]) -> Float[np.ndarray, "draw cue behaviour"]:
    return (1 - SLIP) * shown + SLIP / shown.shape[-1]


def _floored(weights: Float[np.ndarray, "draw policy"]) -> Float[np.ndarray, "draw policy"]:
    floored = np.maximum(weights, SLIP)
    return floored / floored.sum(-1, keepdims=True)


def _named(suite: Suite, weights: Float[np.ndarray, "draw policy"]) -> dict[str, Interval]:
    return {name: interval(weights[:, m]) for m, name in enumerate(suite.policies)}


def _show(value: Interval) -> str:
    if value.value is None:
        return "unknown"
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"
