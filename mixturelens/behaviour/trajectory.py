"""What a training did to behaviour along its way: the record of its measurements."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
from jaxtyping import Float

from mixturelens.behaviour.arrays import Behaviour
from mixturelens.behaviour.prompts import Prompts
from mixturelens.records import Record
from mixturelens.stats import PROPORTION, mean_interval, resample_counts
from mixturelens.types import OTHER, Frozen, Interval

DRAWS = 500
"""Bootstrap samples of a point of a training, of which there are many."""


class CueState(Frozen):
    """What a checkpoint does under one cue: weights, accuracy with each policy put in place, expected accuracy."""

    weights: dict[str, Interval]
    forced: dict[str, Interval]
    accuracy: Interval
    paid: dict[str, Interval] = {}
    """By the objective of each cue, how often a completion would be rewarded; only where objectives differ."""


class TrajectoryPoint(Frozen):
    """What a checkpoint does under every cue after so many steps of training."""

    step: int
    cues: dict[str, CueState]


class Trajectory(Record):
    """A stage of training, measured every few steps under every cue on held-out questions."""

    KIND = "trajectory"

    stage: str
    steps: int
    """Steps that were taken; fewer than the spec's when reward had saturated."""
    points: tuple[TrajectoryPoint, ...]
    reward: tuple[float, ...] = ()
    """Mean training reward of every step (RL only)."""
    no_signal: tuple[float, ...] = ()
    """Share of groups without any spread of reward, which give no gradient (RL only)."""

    def steps_to(self, cue: str, accuracy: float) -> float | None:
        """Steps until the expected accuracy under a cue first reaches `accuracy`, read off the straight line between
        measurements.

        None where it never does: the stage was too short, or there was nothing to learn from.
        """
        before: tuple[int, float] | None = None
        for point in self.points:
            now = point.cues[cue].accuracy.value
            if now is None:
                continue
            if now >= accuracy:
                if before is None:
                    return float(point.step)
                step, then = before
                return step + (point.step - step) * (accuracy - then) / (now - then)
            before = point.step, now
        return None


def cue_states(
    behaviour: Behaviour, prompts: Prompts, paid: Mapping[str, Float[np.ndarray, " prompt"]] | None = None
) -> dict[str, CueState]:
    """What a checkpoint does under each cue: means over questions, with intervals.

    `paid`: of each objective, how often completions of each prompt are rewarded; only where objectives differ.
    """
    suite, states = prompts.suite, {}
    for cue in suite.cues:
        at = [i for i, row in enumerate(prompts.rows) if row.cue == cue]
        often = partial(mean_interval, counts=resample_counts(len(at), seed=0, draws=DRAWS), bounds=PROPORTION)
        weights, forced = behaviour.weights[at], behaviour.forced_accuracy[at]
        states[cue] = CueState(
            weights={name: often(weights[:, m]) for m, name in enumerate((*suite.policies, OTHER))},
            forced={name: often(forced[:, m]) for m, name in enumerate(suite.policies)},
            accuracy=often(behaviour.correct[at].sum(-1)),
            paid={objective: often(share[at]) for objective, share in (paid or {}).items()},
        )
    return states
