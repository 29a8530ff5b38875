"""What sparse features say about a pair: how well they describe it, what they do, what RL changed of them."""

from __future__ import annotations

from typing import Literal

from mixturelens.records import Record
from mixturelens.types import NOT_MEASURED, Frozen, Interval, Intervention, Side, Site

Concept = Literal["cue", "hint", "selector"]
"""What a unit is asked to carry: the cue (a policy in place), the hint (in S), or the choice of policy (S's activations
in R, same neutral prompt)."""
UnitKind = Literal["feature", "neuron", "head", "direction", "subspace"]
"""A feature of S's SAE; a neuron of an MLP; a head's output; a linear probe's direction; a direction found by
interchange (DAS)."""
Part = Literal["selector", "cue_reader", "skill"]


class Unit(Frozen):
    """One unit of a network, with the position at which it is looked at.

    >>> str(Unit(kind="feature", site=Site(layer=1, component="resid_pre", position="policy"), index=17))
    'L1.resid_pre@policy feature 17'
    """

    kind: UnitKind
    site: Site
    index: int | None = None
    """Number of a feature in its dictionary."""
    name: str = ""
    """Of a direction: how it was found."""

    def __str__(self) -> str:
        if self.kind == "feature":
            return f"{self.site} feature {self.index}"
        return f"{self.site} ({self.name})" if self.name else str(self.site)


class Quality(Frozen):
    """How well a dictionary describes one checkpoint's activations at a site, on held-out questions."""

    explained: float
    """Share of the variance that the reconstruction explains."""
    active: float
    """Features that fire on a token, mean (L0)."""
    dead: float
    """Share of features that fire on none of these tokens."""
    loss_recovered: Interval
    """(mean-ablated - reconstructed) / (mean-ablated - plain) next-token loss of completions: 1 loses nothing."""
    tokens: int


class Sae(Frozen):
    """An SAE at one site, in SAELens' format: trained on S here, or by others."""

    site: Site
    folder: str | None = None
    """In the pair's folder, as `SAE.load_from_disk` reads it; null where it was not kept."""
    trained: int
    """Features that were trained."""
    width: int
    """Features that are left: those that practically never fire are not saved."""
    quality: dict[Side, Quality]
    """On S, and on R as it is."""
    pretrained: str | None = None
    """The folder of an SAE that others trained."""
    notes: tuple[str, ...] = ()
    """What may matter about it."""


class UnitScore(Frozen):
    """The best unit of one kind for one concept: chosen on one half of the questions, judged on the other."""

    unit: Unit
    among: int
    """Units that it was chosen from."""
    auroc: Interval
    """How well its activation tells the two sides of the contrast apart."""
    patch: Interval
    """Share of the contrast that its activation from the clean side moves."""
    clamp: Interval
    """The same with its mean clean activation instead."""
    ablate: Interval
    """Share of the contrast that is lost without it."""
    random: tuple[float, ...]
    """`patch` of controls: other units nearest in strength, and its own change written along random directions of equal
    norm (heads: all other heads)."""
    margin: Interval
    """`patch` less that of the best of these, in every bootstrap sample."""
    gap_closed: Interval = NOT_MEASURED
    """In R, clamped: (repaired - R) / (best forced accuracy of S - R) under the harmed cue."""
    trained_change: Interval = NOT_MEASURED
    """Change of the accuracy under the trained cue by that."""
    random_gap: tuple[float | None, ...] = ()
    """`gap_closed` by matched random units."""
    intervention: Intervention | None = None
    """The clamp as a value; null for a head, which takes one for all of its output."""


class Several(Frozen):
    """The fewest units of a kind that carry a concept together: chosen on half of the questions, judged on the rest."""

    kind: UnitKind
    units: tuple[Unit, ...]
    among: int
    enough: bool
    """Whether they carry 0.9 of the contrast on the questions that chose; if not, these are as many as were tried."""
    patch: Interval
    """Share of the contrast that they move, patched at once."""
    random: tuple[float, ...]
    """That of as many matched random others."""
    gap_closed: Interval = NOT_MEASURED
    """In R, each clamped to its mean clean activation, all at once."""
    trained_change: Interval = NOT_MEASURED


class Table(Frozen):
    """The best unit of every kind for one concept."""

    concept: Concept
    checkpoint: Side
    """Where the units were patched and clamped."""
    clean: str
    """The cue, hint or checkpoint of the clean side."""
    corrupt: str
    questions: int
    base: Interval
    """Log-odds of the corrupt side, nats."""
    goal: Interval
    """Log-odds of the clean side, nats."""
    site: Site
    """The site that patching named, where features and directions were looked for."""
    scores: tuple[UnitScore, ...]
    several: tuple[Several, ...] = ()

    def together(self, kind: UnitKind) -> Several | None:
        """The fewest units of a kind that carry the concept together; None where that was not looked for."""
        return next((each for each in self.several if each.kind == kind), None)

    def best(self, kind: UnitKind) -> UnitScore | None:
        """The best single unit of a kind; None where none was scored."""
        return next((each for each in self.scores if each.unit.kind == kind), None)


class Terms(Frozen):
    """What S does differently with something of R in it: bits from S, 0 to 1, by the terms of `behaviour.bits`.

    specialist = conditioning + skill; without named behaviours it is all that can be told of the two.
    """

    routing: Interval
    conditioning: Interval
    skill: Interval
    specialist: Interval

    @property
    def moved(self) -> float | None:
        """Routing and specialist together, as far as they were measured; null where neither was."""
        known = [each.value for each in (self.routing, self.specialist) if each.value is not None]
        return sum(known) if known else None

    def of(self, part: Part) -> Interval:
        """The term that a part of the network answers for: routing (selector), conditioning (cue reader) or skill."""
        return {"selector": self.routing, "cue_reader": self.conditioning, "skill": self.skill}[part]


class MovedFeature(Frozen):
    """A feature of S that RL changed, and what its change does alone."""

    index: int
    rate: dict[Side, float]
    """Share of tokens on which it fires."""
    strength: dict[Side, float]
    """Mean activation where it fires."""
    moved: float
    """Mean |change of activation| times the norm of what it writes, over these tokens."""
    terms: Terms


class SiteChange(Frozen):
    """What RL changed of S's features at one site: the features that moved most, their change put into S.

    Nulls: as many random other features of like strength, and the same changes written along random directions; the
    whole site shows what there is to explain.
    """

    site: Site
    features: tuple[MovedFeature, ...]
    """Most moved first, by one half of the questions; judged on the other."""
    together: Terms
    """Of these features at once."""
    every: Terms
    """Of all features."""
    whole: Terms
    """Of R's activations themselves: what no dictionary sees is in the difference."""
    random: tuple[Terms, ...]
    """Of the nulls."""
    questions: int


class FiringExample(Frozen):
    """A prompt with its completion, and how strongly a feature fires on each token."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]


class Card(Frozen):
    """One interesting feature: what it fires on, what it tells, what it does."""

    unit: Unit
    why: str
    auroc: dict[str, float | None]
    """`cue`, `hint`, `policy`: how well its activation at the unit's position tells them."""
    rate: dict[Side, float]
    strength: dict[Side, float]
    promotes: tuple[tuple[str, float], ...]
    """Next tokens whose log-probability it raises most where it fires (measured against without it), nats."""
    suppresses: tuple[tuple[str, float], ...]
    examples: tuple[FiringExample, ...]


class CrosscoderFit(Frozen):
    """One crosscoder over S and R, and what its exclusive latents do."""

    site: Site
    seed: int
    explained: dict[Side, float]
    dead: float
    shared: int
    exclusive: dict[Side, int]
    """After latent scaling."""
    false: int
    """Exclusive by norm, and not after latent scaling."""
    tested: int = 0
    """Latents exclusive to R that were ablated one by one: those that write most."""
    causal: int
    """Of these, latents without which R does something else, beyond nearly all of as many matched shared latents."""
    causal_terms: dict[Part, int] = {}
    """Of those, by the term they move most."""
    without: Terms | None = None
    """R without all latents exclusive to R: bits from R."""
    random: tuple[Terms, ...] = ()
    """R without as many matched shared latents."""


class FeatureRecord(Record):
    """SAE features and crosscoder latents of a pair, beside neurons, heads and directions."""

    KIND = "features"
    VERSION = 2  # 1 had the terms in nats, and is not read
    INDENT = None

    probed: bool = False
    """Whether directions found by interchange were at hand."""
    trained_cue: str | None
    harmed_cue: str | None = None
    saes: tuple[Sae, ...]
    tables: tuple[Table, ...] = ()
    changes: tuple[SiteChange, ...] = ()
    cards: tuple[Card, ...] = ()
    crosscoders: tuple[CrosscoderFit, ...] = ()
    missing: tuple[str, ...] = ()
    """What could not be measured on this pair, and why."""

    def table(self, concept: Concept) -> Table | None:
        """The table of a concept; None where it could not be made (`missing` says why)."""
        return next((each for each in self.tables if each.concept == concept), None)

    @property
    def arrived(self) -> SiteChange | None:
        """What RL changed where R's activations bring most of it along."""
        known = [(moved, -i) for i, change in enumerate(self.changes) if (moved := change.whole.moved) is not None]
        return self.changes[-max(known)[1]] if known else None
