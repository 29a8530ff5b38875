"""What grafts found on a pair: which components' weights carry the change of routing, and which that of specialists."""

from __future__ import annotations

from typing import Literal

from mixturelens.records import Record
from mixturelens.types import NOT_MEASURED, Frozen, Interval


class Part(Frozen):
    """One component of the network: parameters that are copied together."""

    name: str
    """`embed`, `L0.attn`, `L0.mlp`, `L0.norms`, `final_norm`, `unembed`, ..."""
    parameters: int
    change: float
    """Norm of R - S over the norm of S; 0 where RL left it as it was."""


class Effects(Frozen):
    """What a checkpoint (S, R, or a graft of both) does that S does not: means over questions, and over cues.

    The first three are shares of R's change of means, in which changes of single questions may cancel. The others are
    Jensen-Shannon divergences from S of each prompt, as those of `behaviour.bits` are, in which nothing does.
    """

    routing: Interval
    """Share of R's change of log(c_p / c_o): 0 as S, 1 as R. Null where S and R do not differ."""
    weight: Interval
    """The same of the weight of policy p, as a probability."""
    specialists: Interval
    """The same of the log-probability of what each policy usually does in S, over the cells that changed."""
    chosen: Interval
    """Bits from S of the choice of policy, 0 to 1: JS of policy weights, prompt by prompt."""
    done: Interval
    """Bits from S of what policies do once in place, 0 to 1: JS of [what S usually completes, anything else], prompt by
    prompt, each policy in each wording weighed as S and R use it, (c_S + c_R) / 2."""
    moved: Interval
    """chosen + done."""
    share: Interval
    """chosen / (chosen + done), of the same bootstrap samples."""


UNMEASURED = Effects(**dict.fromkeys(Effects.model_fields, NOT_MEASURED))
"""Of what was not grafted."""


class Graft(Frozen):
    """Some components of one checkpoint put into the other."""

    components: tuple[str, ...]
    """Taken from R; all others are S's."""
    effects: Effects


class Component(Frozen):
    """One changed component: alone in S (does it suffice?), missing from R (is it needed?), and along the way."""

    name: str
    suffices: Effects
    """S + R[g]."""
    without: Effects
    """R - R[g]: how much is left without it. 1 - routing is its necessity."""
    routing: Interval
    """Path attribution of log(c_p / c_o), nats, mean over cues."""
    specialists: dict[str, Interval]
    """Path attribution of each cell's log-probability, nats: `a@A` is policy a under cue A."""
    shapley: Interval
    """Shapley share of R's change of log(c_p / c_o); null where there are too many components."""


class Block(Frozen):
    """Components that were grafted together in a search: a group of layers, a layer, or one component."""

    name: str
    """`layers 8-15`, `layer 9`, `L9.attn`, ..."""
    components: tuple[str, ...]
    suffices: Effects
    without: Effects
    bound: float | None
    """The largest share of R's change, of routing or of specialists, that it moves alone in S or missing from R. It
    bounds what a part of it moves, if its parts do not cancel. Null where R changed nothing."""
    opened: bool = False
    """Whether its parts were grafted, too."""
    attributed: float | None = None
    """The largest share that path attribution gives one of its components: above `bound` parts cancel."""


class Search(Frozen):
    """How the components that matter were looked for: groups of layers first, halved where they matter."""

    questions: int
    """On which everything but `after`, `change` and what is judged on held-out questions was measured."""
    threshold: float
    """`bound` from which a block is opened."""
    grafts: int
    blocks: tuple[Block, ...]
    """All that were grafted, in the order of the network, groups before their parts."""
    short: tuple[str, ...] = ()
    """Blocks that should have been opened, and were not for want of time."""


class PathAttribution(Frozen):
    """Path attribution of one metric: what the components sum to, beside the change itself, nats."""

    metric: str
    """`routing@A`, ..., `a@A`, ..."""
    change: float
    sum: float
    points: int
    """Points of the quadrature."""


class PlacedGraft(Frozen):
    """R's weights used at some token positions only, S's at all others."""

    positions: tuple[str, ...]
    """Spans, `last`, `policy`, `answer`, ..."""
    effects: Effects


class Factorial(Frozen):
    """The 2 x 2 {selector} x {rest}: which of R's weights are in place, on held-out questions."""

    selector: tuple[str, ...]
    """The fewest components that carry R's change of the weight of p, chosen on the other half of the questions."""
    also: tuple[tuple[str, ...], ...] = ()
    """Other sets of as many that carry enough, the best first; empty as well where there were too many to try."""
    enough: bool
    """Whether they carry ENOUGH of it on the half that judges, too."""
    questions: int
    selector_only: Effects
    rest_only: Effects
    both: Effects
    noise: tuple[Effects, ...]
    """S with random weights of the same norm added to the selector's parameters, instead of R's change."""


class Rollback(Frozen):
    """R with S's weights in some parts, as a plain checkpoint, scored against S on questions that did not choose it.

    What suffices in S need not be needed in R: here it is the fewest components without which R chooses as S does.
    """

    components: tuple[str, ...]
    also: tuple[tuple[str, ...], ...] = ()
    """Other sets of as many that do as well."""
    enough: bool
    """Whether R without them lost ENOUGH of its change on the half that judges, too."""
    accuracy: dict[str, dict[str, Interval]]
    """cue -> `before` (S), `after` (R), `rollback` -> expected accuracy."""
    checkpoint: str | None


class Null(Frozen):
    """How far just any change of the weights moves S: Gaussian noise on it of the norm of R's change, tensor by tensor.

    Means of a few draws, in bits as those of `Effects`. Labels of policies that mean nothing, permuted on every
    question, were the null of means over questions; prompt by prompt a divergence does not depend on labels.
    """

    chosen: float | None
    done: float | None


class GraftRecord(Record):
    """Which components suffice and which are needed, for routing and for specialists."""

    KIND = "graft"
    VERSION = 2  # 1 had nats of means over questions, beside another null, and is not read

    policies: tuple[str, str]
    """(p, o) of log(c_p / c_o): the policy that gained most weight, and the one that lost most."""
    method: Literal["literal", "forced texts"]
    """`forced texts`: policies are rules, and weighed by texts."""
    texts: dict[str, tuple[str, ...]] = {}
    """Of each policy: those by which S and R announce it, and which put it in place. Empty where they are the
    suite's."""
    cues: tuple[str, ...]
    questions: int
    coverage: float = 1.0
    """Weight of the announcements as these texts, where it is least: what `chosen` does not see is the rest."""
    usual: float = 1.0
    """Probability of what S usually completes, where it is least: `done` sees little of a cell that has no usual."""
    shown: float = 1.0
    """Share of prompts on which that shows a behaviour or the right answer, where it is least: on the others `done` is
    how completions are worded, too."""
    change: dict[str, Interval]
    """Metric (`routing@A`, `a@A`, ...) -> R less S, nats."""
    after: Effects
    """R itself."""
    parts: tuple[Part, ...]
    components: tuple[Component, ...]
    """Changed parts, in the order of the network."""
    groups: dict[str, Graft]
    """Name of a group (`attention`, `MLPs`, `layer 0`, ...) -> S + R[group]."""
    search: Search | None = None
    """Null where every component was grafted. Else `selector`, `rollback` and the like may name its blocks, and
    `suffices` and `without` of a component that is only part of a block are null."""
    path: tuple[PathAttribution, ...]
    factorial: Factorial | None
    specialist_part: Graft | None
    """S with the fewest components that carry R's change of what policies do, chosen on the other half."""
    placed: tuple[PlacedGraft, ...] = ()
    rollback: Rollback | None = None
    null: Null
    missing: tuple[str, ...] = ()
