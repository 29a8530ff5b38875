"""What probing found on a pair: what can be read where, what erasing it does, and the subspace that carries it."""

from __future__ import annotations

from typing import Literal

from mixturelens.records import Record
from mixturelens.types import NOT_MEASURED, Frozen, Interval, Side, Site

Metric = Literal["AUROC", "accuracy", "R2"]
"""Score of a probe on questions it was not fitted on: of two classes, of several, of a number."""
Concept = Literal["cue", "selector"]


class Column(Frozen):
    """One number a site, with its 95% interval: `Interval`s by column, in the order of the record's sites."""

    value: tuple[float | None, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]

    def at(self, index: int) -> Interval:
        """The number of the site at `index`, with its interval."""
        return Interval(value=self.value[index], low=self.low[index], high=self.high[index])


class Readout(Frozen):
    """Linear probes for one target at every site, fitted on one half of the questions and scored on the other.

    Null where a target cannot be asked there: before the token that could tell, or without such prompts.
    """

    target: str
    """`cue`, `hint`, `policy`, `behaviour`, `answer` (first token of the answer) or `log-odds` (of two policies)."""
    metric: Metric
    classes: tuple[str, ...] = ()
    rows: str
    """Which prompts these are, in words."""
    questions: int
    """Questions that the scores are about."""
    chance: float
    """Score of a probe that reads nothing; of accuracy 0 where nothing was asked, and there is no score either."""
    before: Column
    """S's probes on S."""
    after: Column
    """R's probes on R."""
    carried: Column
    """S's probes on R, as they are."""
    untrained: tuple[float | None, ...]
    """Probes on the same network with random weights: what the architecture and the tokens alone give."""
    shuffled: tuple[float | None, ...]
    """S's probes fitted on labels shuffled in equal shares within each class (mean over shuffles): a floor, and no
    threshold of significance."""
    shuffled_high: float | None
    """95th percentile of single such shuffles over all sites."""

    @property
    def best(self) -> int | None:
        """The number of the site where S's probe reads best; None where nothing was measured."""
        known = {index: value for index, value in enumerate(self.before.value) if value is not None}
        return max(known, key=lambda index: known[index], default=None)


ERASED = 0.1
"""Share of the gap between cues, at most, that an eraser may leave for anything to follow from what it does."""


class Checked(Frozen):
    """What is said of every eraser before anything is concluded from it: does it erase the cue at all?"""

    gap: Interval = NOT_MEASURED
    """Manipulation check, on questions that did not fit the eraser: share of the gap between the cues' mean activations
    that it leaves there, along that gap. 0 all erased, 1 nothing."""

    @property
    def holds(self) -> bool | None:
        """Whether the cue is erased there, but for ERASED of it; null where that cannot be told."""
        if self.gap.above(-ERASED) and self.gap.below(ERASED):
            return True
        return False if self.gap.above(ERASED) or self.gap.below(-ERASED) else None


class ErasedSite(Checked):
    """The cue erased at one site (LEACE), with a policy put in place, by exact patching."""

    site: Site
    readable: Interval
    """AUROC of the cue probe there, on held-out questions."""
    left: Interval
    """Share of the difference between cues (log-odds of the policy's behaviours) that is left: 1 all, 0 nothing. Its
    interval also holds what would be left if what `gap` says of the cue had been erased, too (`behaviour_left`)."""
    random: tuple[float, ...]
    """The same for random directions of equal rank."""


class Erasure(Checked):
    """What is left of the difference between cues in P(answer given policy) when the cue is erased at one site."""

    site: Site
    readable: Interval
    """AUROC of the cue probe there."""
    policy: str
    plain: dict[str, Interval]
    """cue -> P(answer given policy) of the model as it is."""
    erased: dict[str, Interval]
    left: Interval
    """(difference between cues, erased) / (difference, plain); its interval as that of `ErasedSite.left`."""
    random: tuple[float, ...]
    """`left` for random directions of equal rank."""


class Subspace(Frozen):
    """A subspace that carries a concept (DAS): learnt on S, tested on S and on R, on held-out questions.

    Interchange accuracy: share of pairs (base, source) in which the model does what the source's concept asks for once
    the base's coordinates in the subspace are those of the source. Half of the pairs ask for no change.
    """

    concept: Concept
    site: Site
    dimensions: int
    directions: tuple[tuple[float, ...], ...]
    """Orthonormal rows."""
    questions: int
    pairs: int
    plain: dict[Side, Interval]
    """How often each model does what is asked without any interchange of base and source: on the source itself."""
    accuracy: dict[Side, Interval]
    """`before`, `after`."""
    threshold: dict[Side, float] = {}
    """Log-odds (nats) above which a model does what the clean side does: 0, or, for a model that does the same under
    both concepts, its own midpoint between them."""
    by_sign: dict[Side, Interval] = {}
    """Accuracy at 0 whatever the midpoint is: whether behaviour itself follows."""
    random: dict[Side, tuple[float, ...]]
    """Accuracy of random subspaces of as many dimensions."""
    shuffled: dict[Side, tuple[float, ...]]
    """Accuracy of subspaces learnt on shuffled labels."""
    margin: dict[Side, Interval]
    """`accuracy` less the best of both nulls."""


class Shift(Frozen):
    """What RL added to the activations of neutral prompts at one site, beside what a hint adds in S."""

    site: Site
    cosine: Interval
    """Of the mean shift (R less S, neutral prompts) with the hint's direction (for R's policy less for the other)."""
    along: Interval
    """The shift along the hint's direction, as a share of the hint's own: 1 looks like the hint."""
    null: float
    """95th percentile of |cosine| of the hint's direction with differences between random halves of prompts of S."""


class ProbingRecord(Record):
    """What can be read where in S and in R, what erasing the cue does, and the subspaces of cue and selector."""

    KIND = "probing"
    INDENT = None

    trained_cue: str | None
    policies: tuple[str, str]
    """Policies of the log-odds: the one that gained most weight under RL, and the one that lost most."""
    sites: tuple[Site, ...]
    labels: tuple[str, ...] = ()
    """Token (or span) at each position, where positions mean the same in every question."""
    readouts: tuple[Readout, ...]
    erased: tuple[ErasedSite, ...] = ()
    """In R, sites where the cue can be read: all of them, or of a large model some of the residual stream."""
    used: Erasure | None = None
    """Erased where the cue reader reads."""
    unused: Erasure | None = None
    """Erased at the site where the cue reads best among those whose erasure leaves the behaviour as it was; null if
    there is no such site."""
    subspaces: tuple[Subspace, ...] = ()
    shifts: tuple[Shift, ...] = ()
    exhaustive: bool = False
    """Whether every site was probed, on all questions."""
    missing: tuple[str, ...] = ()
    """What could not be measured on this pair, and why."""

    def readout(self, target: str) -> Readout | None:
        """The probes for a target; None where it was not asked."""
        return next((each for each in self.readouts if each.target == target), None)
