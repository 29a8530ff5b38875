"""What a graft does, as shares of R's change and in bits from S, with intervals over questions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from mixturelens.behaviour.bits import js
from mixturelens.behaviour.grid import Grid
from mixturelens.grafting.cells import Cells
from mixturelens.grafting.readings import Readings
from mixturelens.grafting.record import Effects
from mixturelens.stats import half_of, interval, map_draws, resample_counts
from mixturelens.types import Interval

WORTH = 0.05
"""Nats by which a metric must surely differ between S and R for a share of its change to mean anything."""
WORTH_WEIGHT = 0.02
"""The same of a policy's weight, as a probability."""


@dataclass(frozen=True)
class Resampled:
    """Means over questions in every bootstrap sample."""

    odds: Float[np.ndarray, "draw cue"]
    """log c_p / c_o."""
    weights: Float[np.ndarray, "draw cue choice"]
    """Of the known policies, and last what is left: `other`."""
    done: Float[np.ndarray, "draw cue policy"]
    """Log-probability of the usual completion."""


@dataclass(frozen=True)
class BitSamples:
    """How well one completion tells a graft from S, 0 to 1, in every bootstrap sample: means over prompts."""

    chosen: Float[np.ndarray, " draw"]
    done: Float[np.ndarray, " draw"]


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
        """The judge over one half of the questions, the same half that `Contrasts.half` draws."""
        rows = half_of(len(self.grid.index), which)
        grid = Grid(self.grid.index[rows], resample_counts(len(rows), self.cells.seed))
        return Judge(self.cells, self.policies, self.before, self.after, grid, self)

    def drawn(self, readings: Readings) -> Resampled:
        """Readings (one row a prompt) as means over questions for every cue, in every bootstrap sample."""
        log_c, log_p = _numpy(readings.log_c), _numpy(readings.log_p)
        return Resampled(
            odds=self.grid.draws(self.odds(log_c)),
            weights=self.grid.draws(with_other(log_c)),
            done=self.grid.draws(log_p),
        )

    def bits(self, readings: Readings) -> BitSamples:
        """How far readings are from those of S, in bits. They are compared question by question, so that changes which
        go one way on some questions and the other way on others do not cancel.

        All grafts weigh a policy, and each of its wordings, alike: by how much S and R use it.
        """
        chosen = js(with_other(_numpy(readings.log_c)), with_other(_numpy(self.before.log_c)))
        done = js(*(_usual_or_else(_numpy(each.completed)) for each in (readings, self.before)))
        return BitSamples(*(_over_cues(self.grid.draws(each)) for each in (chosen, (self._used * done).sum(-1))))

    @cached_property
    def _used(self) -> Float[np.ndarray, "prompt announcement"]:
        return (np.exp(_numpy(self.before.announced)) + np.exp(_numpy(self.after.announced))) / 2

    def odds(self, log_c: Float[np.ndarray, "prompt policy"]) -> Float[np.ndarray, " prompt"]:
        """log c_p - log c_o of each prompt, in nats, where (p, o) are `policies`."""
        p, o = (self.cells.policies.index(name) for name in self.policies)
        return log_c[:, p] - log_c[:, o]

    @cached_property
    def coverage(self) -> float:
        """Weight of the announcements as they are written, where it is least: under some cue, in S or in R."""
        return float(min(np.nanmin(1 - each.weights[0, :, -1]) for each in (self.s, self.r)))

    @cached_property
    def usual(self) -> float:
        """Probability of S's usual completion, where it is least: of some policy, under some cue."""
        return self._least(np.exp(_numpy(self.before.completed)))

    @cached_property
    def shown(self) -> float:
        """Share of prompts on which it shows a behaviour or the right answer, where it is least, as `usual`."""
        return self._least(np.array(self.cells.shown, dtype=float).reshape(self._used.shape))

    def _least(self, values: Float[np.ndarray, "prompt announcement"]) -> float:
        """Of the means of a policy under a cue, each wording as often as it is used."""
        owner = np.array(self.cells.owner)
        per_policy = []
        for policy in range(len(self.cells.policies)):
            used = self._used[:, owner == policy]
            per_policy.append((values[:, owner == policy] * used).sum(-1) / np.maximum(used.sum(-1), 1e-300))
        return float(np.nanmin(self.mean(np.stack(per_policy, -1))))

    @cached_property
    def s(self) -> Resampled:
        """S itself."""
        return self.drawn(self.before)

    @cached_property
    def r(self) -> Resampled:
        """R itself."""
        return self.drawn(self.after)

    @cached_property
    def moved_cues(self) -> Bool[np.ndarray, " cue"]:
        """Cues under which the routing surely changed."""
        return self.whole.moved_cues if self.whole else _surely(self.r.odds - self.s.odds, WORTH)

    @cached_property
    def moved_weights(self) -> Bool[np.ndarray, " cue"]:
        """Cues under which the weight of policy p surely changed."""
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
        g, s, r, bits = self.drawn(readings), self.s, self.r, self.bits(readings)
        p = self.cells.policies.index(self.policies[0])
        weight, whole = (x.weights[..., p] - s.weights[..., p] for x in (g, r))
        counts = self.grid.counts
        return Effects(
            routing=interval(aligned(g.odds - s.odds, r.odds - s.odds, self.moved_cues), counts),
            weight=interval(aligned(weight, whole, self.moved_weights), counts),
            specialists=interval(aligned(g.done - s.done, r.done - s.done, self.moved_cells), counts),
            chosen=interval(bits.chosen, counts),
            done=interval(bits.done, counts),
            moved=interval(bits.chosen + bits.done, counts),
            share=map_draws(lambda chosen, done: chosen / (chosen + done), bits.chosen, bits.done, counts=counts),
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
        """Share of R's change of what policies do, without an interval: what the search for that part goes by."""
        s, r = (x.done[:1] for x in (self.s, self.r))
        return float(aligned(self.mean(log_p) - s, r - s, self.moved_cells)[0])

    def shares(self, odds: Float[np.ndarray, " prompt"]) -> Interval:
        """The share of R's change of log c_p / c_o that a part makes up; `odds`: the part on each prompt, nats."""
        part = aligned(self.grid.draws(odds), self.r.odds - self.s.odds, self.moved_cues)
        return interval(part, self.grid.counts)

    def mean(self, values: Float[np.ndarray, " prompt *rest"]) -> Float[np.ndarray, "1 cue *rest"]:
        """Means of values of prompts over the questions of each cue, without a bootstrap: one draw."""
        return Grid(self.grid.index, self.grid.counts[:1]).draws(values)


def with_other(log_c: Float[np.ndarray, "prompt policy"]) -> Float[np.ndarray, "prompt label"]:
    """Weights of the known policies, and last of all that they leave (`other`), from the policies' log-weights."""
    weights = np.exp(log_c)
    return np.concatenate([weights, np.clip(1 - weights.sum(-1, keepdims=True), 0, 1)], -1)


def aligned(
    part: Float[np.ndarray, " draw *metric"],
    whole: Float[np.ndarray, " draw *metric"],
    kept: Bool[np.ndarray, "*metric"],
) -> Float[np.ndarray, " draw"]:
    """The share of a whole change that a part makes up: the sum of the part's changes over that of the whole's, each
    counted in the direction in which the whole goes. `kept` says which metrics count; NaN if none does.

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


def _over_cues(values: Float[np.ndarray, "draw cue"]) -> Float[np.ndarray, " draw"]:
    """Mean over the cues that these questions have."""
    asked = np.isfinite(values[0])
    return values[:, asked].mean(-1) if asked.any() else np.full(len(values), np.nan)


def _usual_or_else(log_p: Float[np.ndarray, "*rest"]) -> Float[np.ndarray, "*rest 2"]:
    """Probability of the usual completion, and of all else."""
    return np.stack([np.exp(log_p), -np.expm1(np.minimum(log_p, 0.0))], -1)


def _surely(changes: Float[np.ndarray, " draw *metric"], least: float) -> Bool[np.ndarray, "*metric"]:
    flat = changes.reshape(len(changes), -1)
    bounds = [interval(flat[:, k]) for k in range(flat.shape[1])]
    found = [b.low is not None and b.high is not None and (b.low > least or b.high < -least) for b in bounds]
    return np.array(found).reshape(changes.shape[1:])


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()
