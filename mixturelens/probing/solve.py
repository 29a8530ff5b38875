"""Linear probes for many sites and many labels at once: logistic (two classes or more) and ridge regression.

The objectives are scikit-learn's, on features standardised by the rows that are fitted: `LogisticRegression` minimises
C * (sum of log losses) + |w|^2 / 2, `Ridge` the sum of squares + alpha * |w|^2; the intercept is free.

Logistic regression is solved by L-BFGS in coordinates in which Boehning's bound on the Hessian (1992, Annals of the
Institute of Statistical Mathematics 44) is the identity. The bound depends on the rows and not on the labels, so one
Cholesky factor a site serves all of its labels, and no curvature exceeds 1: a whole step is nearly always right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixturelens.types import InputError

FLAT = 1e-5
"""A feature whose s.d. is below this share of the site's root mean square is constant: what varies is rounding."""
TOLERANCE = 1e-5
"""Relative distance to the least loss, as L-BFGS estimates it, at which a probe is done."""
MOST = 500
"""Iterations at most."""
HISTORY = 8
CHUNK_BYTES = 32 << 20
"""Rows, or logits if they are more, of the sites that are solved together."""


@dataclass(frozen=True)
class Probe:
    """Linear probes, one for every site and every set of labels. `weights` act on standardised features.

    With two classes (and in a regression) there is one row of weights: the log-odds of class 1 (or the number itself).
    """

    weights: Float[Tensor, "site labels class feature"]
    bias: Float[Tensor, "site labels class"]
    mean: Float[Tensor, "site feature"]
    scale: Float[Tensor, "site feature"]
    """1 / s.d. of each feature; 0 for a constant one."""

    def scores(self, x: Float[Tensor, "site row feature"]) -> Float[Tensor, "site labels row class"]:
        """Log-odds (two classes), logits (several) or predicted numbers, of rows that may be new."""
        site, labels, classes, features = self.weights.shape
        found = ((x - self.mean[:, None]) * self.scale[:, None]) @ self.weights.reshape(site, -1, features).mT
        return found.unflatten(-1, (labels, classes)).transpose(1, 2) + self.bias[:, :, None]

    @property
    def flat(self) -> Tensor:
        """[site] True where no feature varied, so that there was nothing to read."""
        return ~(self.scale != 0).any(-1)


def fit_logistic(
    x: Float[Tensor, "site row feature"], y: Int[Tensor, "labels row"], c: float = 1.0, tolerance: float = TOLERANCE
) -> Probe:
    """L2-regularised logistic regression of every set of labels on every site, binary or multinomial.

    Labels are 0 .. K-1, and each class occurs in every set. Exact for any shape: with more features than rows the
    solution lies in the span of the rows and is found there. Raises InputError for a class without rows.

    >>> x = torch.tensor([[[0.0], [1.0], [2.0], [3.0]]])
    >>> probe = fit_logistic(x, torch.tensor([[0, 0, 1, 1]]))
    >>> (probe.scores(x)[0, 0, :, 0] > 0).tolist()
    [False, False, True, True]
    """
    classes = int(y.max()) + 1
    counted = torch.stack([(y == k).sum(1) for k in range(classes)], 1)
    if classes < 2 or not bool((counted > 0).all()):
        raise InputError("a probe needs rows of every class, and two classes at least, in every set of labels")
    sites, rows, features = x.shape
    outputs = len(y) * (1 if classes == 2 else classes)
    step = max(1, CHUNK_BYTES // (x.element_size() * rows * max(features, outputs)))
    parts = []
    for start in range(0, sites, step):
        z, mean, scale = _standardised(x[start : start + step])
        basis = None
        if features > rows:
            basis, upper = torch.linalg.qr(z.mT)
            z = upper.mT
        solved = _Problem(z, y, classes, c).solve(tolerance)
        weights = solved[..., :-1] if basis is None else solved[..., :-1] @ basis.mT[:, None]
        parts.append(Probe(weights, solved[..., -1], mean, scale))
    return _joined(parts)


def fit_ridge(x: Float[Tensor, "site row feature"], y: Float[Tensor, "labels row"], alpha: float = 1.0) -> Probe:
    """Ridge regression of every set of numbers on every site, in closed form.

    >>> probe = fit_ridge(torch.tensor([[[0.0], [1.0], [2.0]]]), torch.tensor([[0.0, 2.0, 4.0]]), alpha=0.0)
    >>> probe.scores(torch.tensor([[[5.0]]])).round().item()
    10.0
    """
    sites, rows, features = x.shape
    step = max(1, CHUNK_BYTES // (x.element_size() * rows * features))
    middle = y.mean(1)
    target = (y - middle[:, None]).mT
    parts = []
    for start in range(0, sites, step):
        z, mean, scale = _standardised(x[start : start + step])
        gram = z @ z.mT if features > rows else z.mT @ z
        # a constant feature has no equation of its own; its weight is 0 whatever stands on the diagonal
        diagonal = torch.full_like(gram[..., 0], alpha)
        if features <= rows:
            diagonal = torch.where(scale != 0, diagonal, diagonal.clamp(min=1.0))
        factor = torch.linalg.cholesky(gram + torch.diag_embed(diagonal))
        if features > rows:
            weights = z.mT @ torch.cholesky_solve(target.expand(len(z), -1, -1), factor)
        else:
            weights = torch.cholesky_solve(z.mT @ target, factor)
        bias = middle[None, :, None].expand(len(z), -1, -1)
        parts.append(Probe(weights.mT[:, :, None], bias, mean, scale))
    return _joined(parts)


def _standardised(
    x: Float[Tensor, "site row feature"],
) -> tuple[Float[Tensor, "site row feature"], Float[Tensor, "site feature"], Float[Tensor, "site feature"]]:
    mean = x.mean(1)
    centred = x - mean[:, None]
    deviation = centred.square().mean(1).sqrt()
    size = x.square().mean((1, 2)).sqrt()[:, None]
    scale = torch.where(deviation > FLAT * size, 1 / deviation.clamp(min=torch.finfo(x.dtype).tiny), 0.0)
    return centred * scale[:, None], mean, scale


def _joined(parts: list[Probe]) -> Probe:
    return Probe(*(torch.cat([getattr(p, name) for p in parts]) for name in ("weights", "bias", "mean", "scale")))


class _Problem:
    """Logistic regressions that share their rows, in coordinates in which the bound on the Hessian is the identity.

    A problem is a (site, set of labels); its unknowns are [class, feature + 1], the intercept last.
    """

    def __init__(
        self, z: Float[Tensor, "site row feature"], y: Int[Tensor, "labels row"], classes: int, c: float
    ) -> None:
        self.binary, self.c, self.labels = classes == 2, c, len(y)
        self.outputs = 1 if self.binary else classes
        free = torch.cat([z, torch.ones_like(z[..., :1])], -1)
        size = free.shape[-1]
        kept = torch.ones(size, dtype=z.dtype, device=z.device)
        kept[-1] = 0.0  # the intercept is free
        bound = (0.25 if self.binary else 0.5) * c
        lower = torch.linalg.cholesky(bound * (free.mT @ free) + torch.diag(kept))
        identity = torch.eye(size, dtype=z.dtype, device=z.device).expand(len(z), -1, -1)
        self.back: Float[Tensor, "site size size"] = torch.linalg.solve_triangular(lower, identity, upper=False)
        self.rows = free @ self.back.mT
        self.penalty = (self.back * kept) @ self.back.mT
        # targets as [row, labels, class]
        one_hot = torch.nn.functional.one_hot(y.mT, classes).to(z.dtype)
        self.target = one_hot
        self.sign = 1 - 2 * one_hot[..., 1:]

    def _losses(self, logits: Float[Tensor, "site row labels class"]) -> Float[Tensor, "site labels"]:
        if self.binary:
            return self.c * torch.nn.functional.softplus(self.sign * logits).flatten(2).sum(1)
        return self.c * (logits.logsumexp(-1) - (logits * self.target).sum(-1)).sum(1)

    def _residuals(self, logits: Float[Tensor, "site row labels class"]) -> Float[Tensor, "site row labels class"]:
        if self.binary:
            return self.sign * (self.sign * logits).sigmoid() * self.c
        return (logits.softmax(-1) - self.target) * self.c

    def solve(self, tolerance: float) -> Float[Tensor, "site labels class size"]:
        """The weights on the features, and the intercepts, of every problem."""
        sites, count, size = self.rows.shape
        rows, penalty = self.rows, self.penalty

        def dot(a: Tensor, b: Tensor) -> Float[Tensor, "site labels"]:
            return (a * b).flatten(2).sum(-1)

        def slopes(logits: Float[Tensor, "site row labels class"]) -> Float[Tensor, "site labels class size"]:
            return (self._residuals(logits).flatten(2).mT @ rows).view(len(rows), self.labels, self.outputs, size)

        result = rows.new_zeros(sites, self.labels, self.outputs, size)
        at = torch.arange(sites, device=rows.device)
        u = torch.zeros_like(result)
        pulled = torch.zeros_like(u)  # penalty @ u
        logits = rows.new_zeros(sites, count, self.labels, self.outputs)
        loss, gradient = self._losses(logits), slopes(logits)
        history: list[tuple[Tensor, Tensor, Tensor]] = []
        done = torch.zeros_like(loss, dtype=torch.bool)
        slack = 4 * torch.finfo(u.dtype).eps
        for _ in range(MOST):
            direction = _two_loop(gradient, history, dot)
            slope = dot(gradient, direction)
            done = done | (-slope / 2 <= tolerance * loss)
            going = ~done.all(1)
            if not bool(going.any()):
                break
            if 4 * int(going.sum()) <= 3 * len(going):  # go on with those that are not done
                result[at] = u
                at, rows, penalty, u, pulled, logits, loss, gradient, direction, slope, done = (
                    v[going] for v in (at, rows, penalty, u, pulled, logits, loss, gradient, direction, slope, done)
                )
                history = [(move[going], change[going], inverse[going]) for move, change, inverse in history]
            ahead = (rows @ direction.flatten(1, 2).mT).view_as(logits)
            pull = (direction.flatten(1, 2) @ penalty).view_as(u)
            here, linear, square = dot(pulled, u) / 2, dot(pulled, direction), dot(pull, direction)
            step = torch.where(done, 0.0, torch.ones_like(loss))
            # a whole step is right but for few problems; logits are linear in the step, so that shorter ones are cheap
            trial, reached = logits, loss
            for _ in range(30):
                trial = logits + step[:, None, :, None] * ahead
                reached = self._losses(trial) + here + step * linear + step.square() * square / 2
                poor = (step > 0) & (reached > loss + 1e-4 * step * slope + slack * loss)
                if not bool(poor.any()):
                    break
                step = torch.where(poor, step / 2, step)
            move = step[..., None, None] * direction
            u, logits, loss = u + move, trial, reached
            pulled = pulled + step[..., None, None] * pull
            new = slopes(logits) + pulled
            change = new - gradient
            curvature = dot(move, change)
            useful = curvature > slack * dot(change, change)
            inverse = torch.where(useful, 1 / torch.where(useful, curvature, 1.0), 0.0)
            history = [*history[1 - HISTORY :], (move, change, inverse)]
            gradient = new
        result[at] = u
        return (result.flatten(1, 2) @ self.back).view_as(result)


def _two_loop(
    gradient: Float[Tensor, "site labels class size"],
    history: list[tuple[Tensor, Tensor, Tensor]],
    dot: Callable[[Tensor, Tensor], Float[Tensor, "site labels"]],
) -> Float[Tensor, "site labels class size"]:
    """The L-BFGS direction (Nocedal 1980) from (move, change of gradient, 1 / their product); product 0: no pair."""
    q = -gradient
    shares = []
    for move, change, inverse in reversed(history):
        share = inverse * dot(move, q)
        shares.append(share)
        q = q - share[..., None, None] * change
    if history:
        _, change, inverse = history[-1]
        size = torch.where(inverse > 0, 1 / (inverse * dot(change, change)), 1.0)
        q = size[..., None, None] * q
    for (move, change, inverse), share in zip(history, reversed(shares), strict=True):
        q = q + (share - inverse * dot(change, q))[..., None, None] * move
    return q
