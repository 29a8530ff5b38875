"""What a graft does, as shares of R's change and in nats from S, with intervals over questions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mixturelens.behaviour.record import Grid
from mixturelens.grafting.readings import Cells, Readings
from mixturelens.grafting.record import Effects, Null
from mixturelens.stats import POSITIVE, half_of, interval, resample_counts
from mixturelens.types import Interval

WORTH = 0.05
"""Nats by which a metric must surely differ between S and R for a share of its change to mean anything."""
WORTH_WEIGHT = 0.02
"""The same of a policy's weight, as a probability."""
LEAST = 1e-9
"""Probabilities below are rounding errors of float32 logits."""
SHUFFLES = 1000


@dataclass(frozen=True)
class Drawn:
    """Means over questions in every bootstrap sample."""

    odds: Float[np.ndarray, "draw cue"]
    """log c_p / c_o."""
    weights: Float[np.ndarray, "draw cue policy"]
    """Of the known policies, and last what is left: `other`."""
    done: Float[np.ndarray, "draw cue policy"]
    """Log-probability of the usual completion."""
    done_probability: Float[np.ndarray, "draw cue policy"]


@dataclass(frozen=True)
class Judge:
    """S and R, beside which every graft is held, and the questions that judge it."""

    cells: Cells
    policies: tuple[str, str]
    before: Readings
    after: Readings
    grid: Grid
    whole: Judge | None = None
    """The judge over all questions, where this one has some of them: it says what changed at all."""

    def half(self, which: Literal[0, 1]) -> Judge:
        """On half of the questions, the same as `Contrasts.half` would draw: choose on one, judge on the other."""
        rows = half_of(len(self.grid.index), which)
        grid = Grid(self.grid.index[rows], resample_counts(len(rows), self.cells.seed))
        return Judge(self.cells, self.policies, self.before, self.after, grid, self)

    def drawn(self, readings: Readings) -> Drawn:
        log_c, log_p = _numpy(readings.log_c), _numpy(readings.log_p)
        return Drawn(
            odds=self.grid.draws(self.odds(log_c)),
            weights=self.grid.draws(with_other(log_c)),
            done=self.grid.draws(log_p),
            done_probability=self.grid.draws(np.exp(log_p)),
        )

    def odds(self, log_c: Float[np.ndarray, "prompt policy"]) -> Float[np.ndarray, " prompt"]:
        p, o = (self.cells.policies.index(name) for name in self.policies)
        return log_c[:, p] - log_c[:, o]

    @cached_property
    def coverage(self) -> float:
        """Weight of the announcements as they are written, where it is least: under some cue, in S or in R."""
        return float(min(np.nanmin(1 - each.weights[0, :, -1]) for each in (self.s, self.r)))

    @cached_property
    def usual(self) -> float:
        """Probability of S's usual completion, where it is least: of some policy, under some cue."""
        return float(np.nanmin(self.s.done_probability[0]))

    @cached_property
    def s(self) -> Drawn:
        return self.drawn(self.before)

    @cached_property
    def r(self) -> Drawn:
        return self.drawn(self.after)

    @cached_property
    def moved_cues(self) -> Bool[np.ndarray, " cue"]:
        """Cues under which the routing surely changed."""
        return self.whole.moved_cues if self.whole else _surely(self.r.odds - self.s.odds, WORTH)

    @cached_property
    def moved_weights(self) -> Bool[np.ndarray, " cue"]:
        p = self.cells.policies.index(self.policies[0])
        return (
            self.whole.moved_weights
            if self.whole
            else _surely(self.r.weights[..., p] - self.s.weights[..., p], WORTH_WEIGHT)
        )

    @cached_property
    def moved_cells(self) -> Bool[np.ndarray, "cue policy"]:
        """Cells in which what a policy does surely changed."""
        return self.whole.moved_cells if self.whole else _surely(self.r.done - self.s.done, WORTH)

    def effects(self, readings: Readings) -> Effects:
        """What a graft with these readings does that S does not."""
        g, s, r = self.drawn(readings), self.s, self.r
        p = self.cells.policies.index(self.policies[0])
        used, counts = r.weights[..., :-1], self.grid.counts
        weight, whole = (x.weights[..., p] - s.weights[..., p] for x in (g, r))
        return Effects(
            routing=interval(aligned(g.odds - s.odds, r.odds - s.odds, self.moved_cues), counts),
            weight=interval(aligned(weight, whole, self.moved_weights), counts),
            specialists=interval(aligned(g.done - s.done, r.done - s.done, self.moved_cells), counts),
            chosen=interval(_chosen(g.weights, s.weights), counts, bounds=POSITIVE),
            done=interval(_done(g.done_probability, s.done_probability, used), counts, bounds=POSITIVE),
        )

    def routing_share(self, log_c: Float[np.ndarray, "prompt policy"]) -> float:
        """Share of R's change of log c_p / c_o, without an interval: what a search goes by."""
        s, r = (x.odds[:1] for x in (self.s, self.r))
        return float(aligned(self.mean(self.odds(log_c)) - s, r - s, self.moved_cues)[0])

    def choice_share(self, log_c: Float[np.ndarray, "prompt policy"]) -> float:
        """Share of R's change of the weight of policy p; of log c_p / c_o where that weight hardly changed."""
        if not self.moved_weights.any():
            return self.routing_share(log_c)
        p = self.cells.policies.index(self.policies[0])
        s, r = (x.weights[:1, :, p] for x in (self.s, self.r))
        return float(aligned(self.mean(np.exp(log_c[:, p])) - s, r - s, self.moved_weights)[0])

    def specialist_share(self, log_p: Float[np.ndarray, "prompt policy"]) -> float:
        s, r = (x.done[:1] for x in (self.s, self.r))
        return float(aligned(self.mean(log_p) - s, r - s, self.moved_cells)[0])

    def shares(self, odds: Float[np.ndarray, " prompt"]) -> Interval:
        """A part of R's change of log c_p / c_o, prompt by prompt, as a share of it."""
        part = aligned(self.grid.draws(odds), self.r.odds - self.s.odds, self.moved_cues)
        return interval(part, self.grid.counts)

    def mean(self, values: Float[np.ndarray, " prompt *rest"]) -> Float[np.ndarray, "1 cue *rest"]:
        """Over the questions themselves, without a bootstrap."""
        return Grid(self.grid.index, self.grid.counts[:1]).draws(values)


def with_other(log_c: Float[np.ndarray, "prompt policy"]) -> Float[np.ndarray, "prompt label"]:
    """Weights of the known policies, and of all else."""
    weights = np.exp(log_c)
    return np.concatenate([weights, np.clip(1 - weights.sum(-1, keepdims=True), 0, 1)], -1)


def aligned(
    part: Float[np.ndarray, " draw *metric"],
    whole: Float[np.ndarray, " draw *metric"],
    kept: Bool[np.ndarray, "*metric"],
) -> Float[np.ndarray, " draw"]:
    """Sum of changes over that of the whole's, each counted in the direction of the whole's; NaN if none is kept.

    What R lowers counts as much as what it raises, so that two changes never cancel.

    >>> kept = np.array([True, True, False])
    >>> aligned(np.array([[1.0, 0.0, 7.0]]), np.array([[2.0, -2.0, 0.0]]), kept)
    array([0.25])
    """
    kept = kept & np.isfinite(whole[0])  # a cue that none of these questions has says nothing
    sign = np.sign(whole[0])[kept]
    if not kept.any():
        return np.full(len(whole), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (part[:, kept] * sign).sum(-1) / (whole[:, kept] * sign).sum(-1)


def divergence(p: Float[np.ndarray, "*rest label"], q: Float[np.ndarray, "*rest label"]) -> Float[np.ndarray, "*rest"]:
    """KL(p || q) in nats; a probability under LEAST counts as LEAST.

    >>> divergence(np.array([1.0, 0.0]), np.array([0.5, 0.5])).round(4)
    0.6931
    """
    p, q = np.maximum(p, LEAST), np.maximum(q, LEAST)
    # with - p + q every term is positive, and what is alike gives 0 after rounding, too
    return (p * np.log(p / q) - p + q).sum(-1)


def _chosen(
    graft: Float[np.ndarray, "draw cue label"], before: Float[np.ndarray, "draw cue label"]
) -> Float[np.ndarray, " draw"]:
    return _over_cues(divergence(graft, before))


def _done(
    graft: Float[np.ndarray, "draw cue policy"],
    before: Float[np.ndarray, "draw cue policy"],
    used: Float[np.ndarray, "draw cue policy"],
) -> Float[np.ndarray, " draw"]:
    distance = divergence(_bernoulli(graft), _bernoulli(before))
    return _over_cues((used * distance).sum(-1))


def _over_cues(values: Float[np.ndarray, "draw cue"]) -> Float[np.ndarray, " draw"]:
    """Mean over the cues that these questions have."""
    asked = np.isfinite(values[0])
    return values[:, asked].mean(-1) if asked.any() else np.full(len(values), np.nan)


def _bernoulli(p: Float[np.ndarray, "*rest"]) -> Float[np.ndarray, "*rest 2"]:
    return np.stack([p, np.clip(1 - p, 0, 1)], -1)


def _surely(changes: Float[np.ndarray, " draw *metric"], least: float) -> Bool[np.ndarray, "*metric"]:
    flat = changes.reshape(len(changes), -1)
    bounds = [interval(flat[:, k]) for k in range(flat.shape[1])]
    found = [b.low is not None and b.high is not None and (b.low > least or b.high < -least) for b in bounds]
    return np.array(found).reshape(changes.shape[1:])


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


# --- null -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """Labels that mean nothing: permuted at random on every question, the same under all its cues, in S and in R."""

    order: Int[np.ndarray, "prompt label"]
    """Of the policies and `other`, for weights: a change of `other` is one of the choice, too."""
    known: Int[np.ndarray, "prompt policy"]
    """Of the policies, for what they do."""
    swap: Bool[np.ndarray, "prompt policy"]
    """Whether the usual completion passes for any other, and any other for the usual."""

    def weights(self, weights: Float[np.ndarray, "prompt label"]) -> Float[np.ndarray, "prompt label"]:
        return np.take_along_axis(weights, self.order, -1)

    def usual(self, probability: Float[np.ndarray, "prompt policy"]) -> Float[np.ndarray, "prompt policy"]:
        found = np.take_along_axis(probability, self.known, -1)
        return np.where(self.swap, 1 - found, found)

    def readings(self, readings: Readings) -> Readings:
        weights = self.weights(with_other(_numpy(readings.log_c)))[:, :-1]
        usual = self.usual(np.exp(_numpy(readings.log_p)))
        return Readings(*(torch.from_numpy(np.log(np.maximum(each, 1e-300))) for each in (weights, usual)))


def random_labels(grid: Grid, policies: int, rng: np.random.Generator) -> Labels:
    questions, prompts = len(grid.index), int(grid.index.max()) + 1
    owner = np.zeros(prompts, dtype=int)
    for question, row in enumerate(grid.index):
        owner[row[row >= 0]] = question
    return Labels(
        order=rng.random((questions, policies + 1)).argsort(-1)[owner],
        known=rng.random((questions, policies)).argsort(-1)[owner],
        swap=(rng.random((questions, policies)) < 0.5)[owner],
    )


def null(judge: Judge, seed: int = 0) -> Null:
    """R's distance from S under labels that mean nothing: the 95th percentile of many, and one of them in full.

    Means over questions then are alike, so what is left is chance.
    """
    rng = np.random.default_rng(seed)
    number = len(judge.cells.policies)
    weights = [with_other(_numpy(each.log_c)) for each in (judge.before, judge.after)]
    usual = [np.exp(_numpy(each.log_p)) for each in (judge.before, judge.after)]
    found = np.zeros((SHUFFLES, 2))
    for k in range(SHUFFLES):
        labels = random_labels(judge.grid, number, rng)
        s, r = (judge.mean(labels.weights(each)) for each in weights)
        s_did, r_did = (judge.mean(labels.usual(each)) for each in usual)
        used = r[..., :-1] / r[..., :-1].sum(-1, keepdims=True)  # labels of `other` took some of it
        found[k] = _chosen(r, s)[0], _done(r_did, s_did, used)[0]
    labels = random_labels(judge.grid, number, rng)
    blind = replace(judge, before=labels.readings(judge.before), after=labels.readings(judge.after))
    chosen, done = np.percentile(found, 95, axis=0)
    return Null(chosen=round(float(chosen), 10), done=round(float(done), 10), shuffled=blind.effects(blind.after))
