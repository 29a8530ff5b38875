"""The behaviour record: what a checkpoint, or a pair, does on a suite, with intervals and controls."""

from __future__ import annotations

from pydantic import model_validator

from mixturelens.behaviour.settle import SampleCheck
from mixturelens.behaviour.unannounced import Identified
from mixturelens.records import Record
from mixturelens.suite import Spelling
from mixturelens.types import NOT_MEASURED, Frozen, Interval


class Bits(Frozen):
    """How well one completion tells S from R, 0 to 1, and by what: specialist = conditioning + skill."""

    routing: Interval
    specialist: Interval
    conditioning: Interval
    skill: Interval
    dormant: Interval
    """The specialist's with equal weights of policies: hears a silent one."""


class Nats(Frozen):
    """The split of KL(R || S): total = routing + wording + specialist + text + other.

    specialist = conditioning + skill. It grows with the length of completions, and without bound where S is sure of
    what R does not do.
    """

    routing: Interval
    specialist: Interval
    conditioning: Interval
    skill: Interval
    text: Interval
    """What completions say, given policy, behaviour and whether they are right: style."""
    wording: Interval
    other: Interval
    """What completions of no known policy add; no specialist is behind them. Where policies announce nothing: what the
    explanation leaves unexplained, less what moved unseen; so that `total` is KL(R || S) of completions."""
    total: Interval


class Text(Frozen):
    """How completions are worded once policy, behaviour and rightness are known."""

    nats_per_token: Interval = NOT_MEASURED


class CueSide(Frozen):
    """One checkpoint under one cue. `accuracy` is forced: with the policy's announcement put in place.

    Where policies announce nothing, weights are shares of what completions do, by the fitted weights, and accuracy is
    that of answers, where the policy table answers; else null.
    """

    weights: dict[str, float]
    accuracy: dict[str, float | None]
    overall: float
    intervals: dict[str, Interval]
    """`weights.a`, `accuracy.a`, ..., `overall`."""


class AccuracyChange(Frozen):
    """The exact split of the change of expected accuracy: `total = selector + specialists`."""

    selector: Interval
    specialists: Interval
    total: Interval


class CueBehaviour(Frozen):
    """What each checkpoint does under one cue and, for a pair, what changed there."""

    before: CueSide
    after: CueSide | None = None
    bits: Bits | None = None
    nats: Nats | None = None
    accuracy_change: AccuracyChange | None = None


class TableCell(Frozen):
    """One cell of the policy table: what happens under a cue once an announcement is put in place."""

    cue: str
    policy: str
    announcement: str
    behaviour: str | None
    """What the checkpoint before does there most often; null where the suite names no behaviours."""
    shown_before: dict[str, float]
    shown_after: dict[str, float] | None = None
    accuracy_before: float
    accuracy_after: float | None = None
    behaviour_change: Interval = NOT_MEASURED
    """Change of the probability of `behaviour`."""
    accuracy_change: Interval = NOT_MEASURED


class Controls(Frozen):
    """What the same code says where the truth is known from the pair alone."""

    same_checkpoint: Bits
    """S against S: every term must be zero, or not surely more where it stands on samples."""
    noise: Bits | None = None
    """S against S with Gaussian noise of the norm of R's change, tensor by tensor: what a change of that size does
    that has no direction in particular. Null where S and R are no plain checkpoints."""
    shuffled_routing_share: Interval
    """Routing's share of KL(R || S) for labels that have nothing to do with the text; null where too few samples can
    say, and where policies announce nothing."""
    independent_total: Interval
    """KL(R || S) as the mean log-ratio of independently drawn completions."""
    sum_agrees: bool | None
    """Whether the intervals of that and of the sum of the terms overlap (within a thousandth of a nat)."""


class BehaviourRecord(Record):
    """What a checkpoint does on a suite and, for a pair, what changed."""

    KIND = "behaviour"
    VERSION = 2

    method: str
    policies: tuple[str, ...]
    cues: tuple[str, ...]
    trained_cue: str | None = None
    questions: int
    coverage: dict[str, Interval]
    """`before`, `after`: weight of the known policies under the cue where it is least."""
    per_cue: dict[str, CueBehaviour]
    samples: int | None = None
    """Completions a prompt behind every number; null where probabilities are exact."""
    overlap: float | None = None
    """How far the sampled completions of each checkpoint are likely under the other, 0 to 1; null where exact."""
    bits: Bits | None = None
    moved: Interval = NOT_MEASURED
    """routing + specialist, in bits: what the shares are shares of."""
    routing_share: Interval = NOT_MEASURED
    router_share: Interval = NOT_MEASURED
    text: Text = Text()
    nats: Nats | None = None
    table: tuple[TableCell, ...] = ()
    hinted: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    """cue -> hint -> `before`/`after` -> weights, on prompts with a hint."""
    controls: Controls | None = None
    identified: Identified | None = None
    """Where policies announce nothing: whether what completions do tells them apart, and what explains its change."""
    check: SampleCheck | None = None
    """Whether completions show what was computed from the suite's texts."""
    spelling: Spelling = Spelling()
    """Whitespace before completions and behind announcements, as the models write it."""
    notes: tuple[str, ...] = ()
    """What differs between the checkpoints and may matter, and what the suite names that never occurs."""

    @model_validator(mode="after")
    def _of_its_cues(self) -> BehaviourRecord:
        for cue in self.cues:
            if cue not in self.per_cue:
                raise ValueError(f"per_cue has no cue {cue!r}, which is one of its cues")
        return self
