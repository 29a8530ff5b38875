"""What patching found on a pair: effects of sites with intervals, the heads that read cue and hint, their attention."""

from __future__ import annotations

from mixturelens.contrasts import Kind
from mixturelens.patching.coarse import Unseen
from mixturelens.patching.sweep import Direction
from mixturelens.records import Record
from mixturelens.types import Frozen, Interval, Side, Site


class Effect(Frozen):
    """Share of the contrast that patching one site moves: 0 nothing, 1 all of it."""

    site: Site
    effect: Interval


class Sweep(Frozen):
    """Every site of one checkpoint patched, on one kind of contrast."""

    kind: Kind
    checkpoint: Side
    """Which checkpoint was patched into."""
    direction: Direction
    clean: str
    """The cue, hint or checkpoint that clean activations come from."""
    corrupt: str
    policy: str | None = None
    """The policy put in place, for cue contrasts."""
    cue: str | None = None
    """The cue of the prompts, for hint and checkpoint contrasts."""
    questions: int
    target: str
    """What the metric, log P(target) - log P(foil) of the next token in nats, is about."""
    foil: str
    base: Interval
    """The metric in the run patched into, nats."""
    goal: Interval
    """The metric in the run that the activations come from, nats."""
    labels: tuple[str, ...] = ()
    """Token (or span) at each position; empty where prompts differ in length, and positions are span names."""
    spans: dict[str, tuple[int, ...]] = {}
    effects: tuple[Effect, ...]
    unseen: Unseen | None = None
    """What was not looked at; null where every site was."""


class ReaderHeads(Frozen):
    """Heads that carry a contrast, chosen on half of the questions and judged on the other half."""

    kind: Kind
    checkpoint: Side
    heads: tuple[Site, ...]
    questions: int
    """Questions of the half that judged."""
    chosen_effect: float
    """Joint effect on the half that chose."""
    effect: Interval
    """Joint effect on the half that judged."""
    margin: Interval
    """`effect` less that of the best other group of as many heads."""
    rival: tuple[Site, ...]
    first: bool | None
    """Whether these heads are ranked first on the other half, by a margin whose interval lies above zero; null with too
    few questions for an interval."""


class Attention(Frozen):
    """Mean attention of one head from one position, over questions, under each cue."""

    head: Site
    checkpoint: Side
    labels: tuple[str, ...]
    under: dict[str, tuple[float, ...]]
    """cue -> attention to each position (sums to one)."""


class PatchingRecord(Record):
    """Which sites carry cue and hint in S and in R, and where S's activations undo what RL did."""

    KIND = "patching"
    INDENT = None

    trained_cue: str
    harmed_cue: str
    policy: str
    """The policy that R follows under the trained cue, put in place in cue contrasts."""
    sweeps: tuple[Sweep, ...]
    readers: tuple[ReaderHeads, ...]
    attention: tuple[Attention, ...] = ()
    exhaustive: bool = True
    """Whether every site was patched, rather than those that slopes nominate."""
    missing: tuple[str, ...] = ()
    """What could not be measured on this pair, and why."""

    def heads(self, kind: Kind, checkpoint: Side) -> tuple[Site, ...]:
        """The heads that carry a contrast in a checkpoint; none where they were not found."""
        found = self.reader(kind, checkpoint)
        return found.heads if found is not None else ()

    def reader(self, kind: Kind, checkpoint: Side) -> ReaderHeads | None:
        """The reader of a contrast of this kind in one checkpoint; None where none was found or looked for."""
        return next((each for each in self.readers if (each.kind, each.checkpoint) == (kind, checkpoint)), None)

    def questions(self, kind: Kind, checkpoint: Side) -> int:
        """How many questions were asked, the first ones that a contrast has; 0 where it was not measured."""
        asked = (each.questions for each in self.sweeps if (each.kind, each.checkpoint) == (kind, checkpoint))
        return max(asked, default=0)
