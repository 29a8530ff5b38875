"""What discovery found: candidate policies, behaviours and cues, and how sure each is."""

from __future__ import annotations

from mixturelens.records import Record
from mixturelens.types import Frozen, Interval


class PolicyExample(Frozen):
    """A prompt and a completion of it that follows the policy, both cut to a length that can be read."""

    prompt: str
    completion: str


class PolicyCandidate(Frozen):
    """A policy, as completions show it. Weights, precision and recall are of questions that it was not found on."""

    name: str
    wordings: tuple[str, ...]
    """What its completions begin with, or have `anywhere`, most usual first; empty: what is like no other."""
    before: Interval
    after: Interval
    precision: float | None
    """Of the rule in the proposed suite, against what the completion was found to begin with; null: it labels none, or
    texts stand `anywhere` and are the rule."""
    recall: float | None
    examples_before: tuple[PolicyExample, ...]
    examples_after: tuple[PolicyExample, ...]


class BehaviourCandidate(Frozen):
    """What follows an announcement at many prompts, with its share of S's and of R's completions."""

    name: str
    wording: str
    before: Interval
    after: Interval


class CueCandidate(Frozen):
    """A way to part prompts, and the bits that it tells of what a completion does, beyond shuffled prompts."""

    kinds: tuple[str, ...]
    prompts: tuple[int, ...]
    """How many prompts are of each kind."""
    bits: Interval
    p: float
    contrast: tuple[str, str] | None = None
    """A prompt, and the same with the cue of another kind, where one word stands for each."""


class Moved(Frozen):
    """Bits by which what a completion does tells R from S, at each prompt, beyond shuffled sides."""

    bits: float
    p: float
    shuffles: int


class SecondOpinion(Frozen):
    """What a judge says of some completions, against the rule."""

    by: str
    completions: int
    agreement: Interval
    none: float
    """Share of completions of which it names no candidate."""


class DiscoveryRecord(Record):
    """What completions of two checkpoints show: policies, behaviours, where they part, and the cue that tells them."""

    KIND = "discovery"

    found: bool
    """Whether what completions do tells R from S. If not, nothing is proposed."""
    reason: str
    questions: int
    prompts: int
    completions: int
    moved: Moved
    where: dict[str, float]
    """Shares of KL(R || S) along R's completions: `announcement`, `behaviour` (the word that follows it), `rest`."""
    nats: float
    """KL(R || S) of a completion."""
    policies: tuple[PolicyCandidate, ...]
    behaviours: tuple[BehaviourCandidate, ...]
    cues: tuple[CueCandidate, ...]
    anywhere: bool = False
    """Policies are told by texts that stand anywhere in completions, since beginnings told none."""
    judged: SecondOpinion | None = None
    other: dict[str, float]
    """Share of S's and of R's completions that are of no candidate."""
