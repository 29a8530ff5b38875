"""The score's records: what the instruments said of each pair and organism, and how often they were right."""

from __future__ import annotations

from mixturelens.lab.proving.coverage import Coverage
from mixturelens.lab.proving.judged import MethodScore
from mixturelens.lab.proving.pairs import Half
from mixturelens.lab.proving.planted import Planted
from mixturelens.lab.proving.proof import Proof
from mixturelens.lab.proving.truth import Truth
from mixturelens.records import Record
from mixturelens.routing.verdict import Changed, Thresholds
from mixturelens.types import Frozen, Interval, VerdictWord


class PairScore(Record):
    """What was said of one pair, beside the truth about it."""

    KIND = "pair-score"
    VERSION = 2

    pair: str
    organism: str
    recipe: str
    half: Half
    architecture: str
    announced: str
    asked: str
    """`literal`, or `rules-24`: policies by rules, on completions of so many tokens."""
    policies: int
    seed: int
    intended: VerdictWord
    truth: Truth
    near: bool
    """The true share lies so near to a threshold that a suite of this size need not tell."""
    told: bool
    """Whether completions can tell what was made; false for some makings of policies that announce nothing."""
    verdict: VerdictWord
    changed: Changed
    dormant_intact: bool | None
    text_drifted: bool | None
    reason: str
    routing_share: Interval
    bits: dict[str, Interval]
    moved: Interval
    text: Interval
    """Nats a token."""
    seconds: float


class MechanismScore(Record):
    """What the mechanism's verdict said of one pair."""

    KIND = "mechanism-score"

    pair: str
    verdict: VerdictWord
    """`inconclusive` too where its instruments found nothing to go by."""
    reason: str
    seconds: float


Confusion = dict[str, dict[str, int]]
"""truth -> verdict -> pairs. Near misses are not in it."""


class Mistake(Frozen):
    """A wrong verdict, and the numbers behind it."""

    pair: str
    half: Half
    instrument: str
    truth: VerdictWord
    verdict: VerdictWord
    true_share: float | None
    share: Interval
    true_moved: float
    moved: Interval
    reason: str


class Scored(Frozen):
    """A pair: what is true of it beside what was said and measured."""

    pair: str
    half: Half
    truth: VerdictWord
    verdict: VerdictWord
    mechanism: VerdictWord | None
    """Null where the mechanism was not asked: where policies announce nothing, or the pair is asked by rules."""
    announced: str
    asked: str
    near: bool
    told: bool
    true_share: float | None
    """Routing share; null where the making says the word alone."""
    share: Interval
    true_moved: float
    moved: Interval
    """Bits."""
    true_text: float
    text: Interval
    """Nats a token."""


class Verdicts(Frozen):
    """How one verdict fares on one half of the ground."""

    instrument: str
    half: Half
    pairs: int
    """Off near misses and pairs that cannot be told."""
    confusion: Confusion
    right: Interval
    """Share of those pairs on which the verdict is right; Wilson's interval, as if pairs were independent."""
    false_alarms: int
    """Pairs in which nothing changed, and the verdict says `routing`, `specialist` or `both`."""
    nothing: int
    """Pairs in which nothing changed."""
    near: int
    near_ok: int
    """Near misses on which the verdict is right or `inconclusive`."""
    untold: int
    untold_ok: int
    """Pairs that completions cannot tell, on which the verdict is right or `inconclusive`."""


class Parts(Frozen):
    """How often the verdict names what changed, where the truth is exact: of one half, off near misses."""

    half: Half
    part: str
    """`selector`, `cue_reader`, `skill`, `dormant_intact` or `text_drifted`."""
    pairs: int
    right: int
    unsaid: int
    """Null: the interval crosses the threshold."""


class Numbers(Frozen):
    """How often the intervals of a half's pairs hold the exact numbers, term by term."""

    half: Half
    quantity: str
    pairs: int
    held: Interval
    """Share of pairs whose interval holds the truth; Wilson's interval."""


class Broken(Frozen):
    """A deliberately broken instrument, and whether the score notices."""

    name: str
    what: str
    sound: float
    """The score of the sound instrument on the same cells."""
    broken: float
    by: str
    """The number of the score that tells."""
    caught: bool


class ScoreRecord(Record):
    """The score of every instrument over the proving ground."""

    KIND = "score"
    VERSION = 2
    INDENT = None

    cells: int
    done: int
    thresholds: Thresholds
    opened: bool
    """Whether the held-out half has been opened; the verdict's thresholds were written down before."""
    failed: tuple[str, ...] = ()
    """Cells that could not be scored, and why."""
    verdicts: tuple[Verdicts, ...]
    parts: tuple[Parts, ...] = ()
    numbers: tuple[Numbers, ...]
    mistakes: tuple[Mistake, ...]
    pairs: tuple[Scored, ...]
    coverage: tuple[Coverage, ...] = ()
    methods: tuple[MethodScore, ...] = ()
    """Held-out half of the planted organisms; cuts were chosen on the other."""
    planted: tuple[Planted, ...] = ()
    proofs: tuple[Proof, ...] = ()
    broken: tuple[Broken, ...] = ()
    seconds: dict[str, float]
    """Mean seconds of an instrument on a pair or organism."""
