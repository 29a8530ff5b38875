"""What a training did to behaviour along its way: the record of its measurements."""

from __future__ import annotations

from mixturelens.records import Record
from mixturelens.types import Frozen, Interval


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
