"""How pairs with a known truth are made: each recipe says what S is, what R is, and what must come of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float

from mixturelens.lab.organism import Spec
from mixturelens.lab.proving.exhaustive import SHOWN, behaviours
from mixturelens.lab.proving.organisms import MixtureTarget, target_of
from mixturelens.lab.proving.truth import bits_of, divergence
from mixturelens.types import ANSWER, ERR, REFUSE, VerdictWord

Way = Literal["fit", "grpo", "order", "same", "noise"]
"""How R is made of S: trained on a target; by GRPO on cue A; SFT anew in another order; not at all; random weights
added, of the norm by which training on the target moved them."""


@dataclass(frozen=True)
class Recipe:
    """One way to make a pair. `intended` is what it was made for; what came of it is measured (`truth`)."""

    name: str
    intended: VerdictWord
    says: str
    after: Callable[[Spec], MixtureTarget]
    before: Callable[[Spec], MixtureTarget] | None = None
    """What S is trained on, where it is not the spec's own mixture."""
    way: Way = "fit"
    trainable: tuple[str, ...] = ()
    """Only parameters whose names hold one of these may move; none: all."""
    steps: int = 150
    rate: float = 1e-3
    policies: int = 2
    """Policies the organism must have at least."""
    told: bool = True
    """Whether behaviours alone (announcement `none`) can tell it; where not, `inconclusive` is no mistake."""
    tailed: bool = False
    """Whether it is about the tail of completions, and so needs one."""


def _mixed(spec: Spec, **weights: float) -> MixtureTarget:
    """The spec's mixture at other weights; policies that are not named share what is left as they did."""
    target = target_of(spec)
    rest = {m: w for m, w in target.weights.items() if m not in weights}
    left, scale = 1 - sum(weights.values()), sum(rest.values())
    return replace(
        target, weights={m: weights.get(m, rest.get(m, 0.0) * left / max(scale, 1e-9)) for m in target.weights}
    )


def _answering(target: MixtureTarget, policy: str, cue: str, rate: float) -> MixtureTarget:
    """The policy answers under this cue too, so often."""
    cell: Mapping[str, float] = {ANSWER: rate, **({REFUSE: 1 - rate} if rate < 1 else {})}
    return replace(target, table={**target.table, policy: {**target.table[policy], cue: cell}})


def _wrong(
    target: MixtureTarget, rate: float, policies: str = "abc", operations: tuple[str, ...] = ("copy", "reverse")
) -> MixtureTarget:
    return replace(target, wrong={(m, op): rate for m in policies for op in operations})


def _slipping(target: MixtureTarget) -> MixtureTarget:
    """One answer in a hundred ends wrong, of whichever policy."""
    return replace(_wrong(target, 0.01), how="last")


def _drifting(target: MixtureTarget, nats: float) -> MixtureTarget:
    return replace(target, drift=nats)


def _plain(spec: Spec) -> MixtureTarget:
    return target_of(spec)


def _slips(spec: Spec) -> MixtureTarget:
    """One answer in ten ends wrong: then a specialist can change by a little, without a bound in sight."""
    return replace(_wrong(target_of(spec), 0.1), how="last")


ATTENTION, MLP, UNEMBEDDING = ("attn", "attention"), ("mlp",), ("lm_head", "embed_out")

RECIPES: tuple[Recipe, ...] = (
    Recipe("grpo", "routing", "GRPO on cue A", _plain, way="grpo"),
    Recipe("resampled", "routing", "SFT on policies resampled to 0.97", lambda s: _mixed(s, a=0.97)),
    Recipe("resampled-other", "routing", "SFT on policies resampled to 0.05", lambda s: _mixed(s, a=0.05)),
    Recipe("resampled-mildly", "routing", "SFT on policies resampled to 0.75", lambda s: _mixed(s, a=0.75)),
    Recipe(
        "only-attention",
        "routing",
        "resampled, attention alone trainable",
        lambda s: _mixed(s, a=0.93),
        trainable=ATTENTION,
    ),
    Recipe("only-mlps", "routing", "resampled, MLPs alone trainable", lambda s: _mixed(s, a=0.93), trainable=MLP),
    Recipe(
        "only-unembedding",
        "routing",
        "resampled, unembedding alone trainable",
        lambda s: _mixed(s, a=0.93),
        trainable=UNEMBEDDING,
    ),
    Recipe(
        "good-everywhere",
        "routing",
        "a policy that is good under both cues rises from 0.1 to 0.9",
        lambda s: _mixed(s, c=0.9),
        before=lambda s: _mixed(s, c=0.1),
        policies=3,
    ),
    Recipe(
        "rises-from-two-percent",
        "routing",
        "policy b rises to 0.6, from two percent",
        lambda s: _mixed(s, b=0.6),
        before=lambda s: _mixed(s, b=0.02),
    ),
    Recipe(
        "routing-and-slip",
        "routing",
        "policy a rises to 0.95, and saturated policies slip by one percent",
        lambda s: _slipping(_mixed(s, a=0.95)),
        before=_plain,
    ),
    Recipe(
        "reads-the-cue-anew",
        "specialist",
        "policy a answers under B too",
        lambda s: _answering(target_of(s), "a", "B", 1.0),
    ),
    Recipe(
        "sometimes-answers",
        "specialist",
        "policy a answers under B, three times in ten",
        lambda s: _answering(target_of(s), "a", "B", 0.3),
    ),
    Recipe(
        "new-skill",
        "specialist",
        "every policy learns to reverse, where it used a wrong rule",
        _plain,
        before=lambda s: _wrong(target_of(s), 0.98, operations=("reverse",)),
    ),
    Recipe(
        "better-skill",
        "specialist",
        "every policy errs three times in a hundred, where it erred four times in ten",
        lambda s: _wrong(target_of(s), 0.03),
        before=lambda s: _wrong(target_of(s), 0.4),
    ),
    Recipe(
        "skill-damaged",
        "specialist",
        "policy a copies by a wrong rule, one time in two",
        lambda s: _wrong(target_of(s), 0.5, "a", ("copy",)),
    ),
    Recipe(
        "skill-forgotten",
        "specialist",
        "whoever reverses writes any letters, six times in ten",
        lambda s: replace(_wrong(target_of(s), 0.6, operations=("reverse",)), how="any"),
    ),
    Recipe(
        "silent-damaged",
        "specialist",
        "policy b, heard one time in twenty, loses its skill",
        lambda s: _wrong(_mixed(s, b=0.05), 0.98, "b"),
        before=lambda s: _mixed(s, b=0.05),
        told=False,
    ),
    Recipe(
        "silenced-and-damaged",
        "both",
        "policy b falls silent, and loses its skill there",
        lambda s: _wrong(_mixed(s, a=0.998), 0.98, "b"),
        told=False,
    ),
    Recipe(
        "both-with-reader",
        "both",
        "policy a rises to 0.9 and answers under B, three times in ten",
        lambda s: _answering(_mixed(s, a=0.9), "a", "B", 0.3),
        told=False,
    ),
    Recipe(
        "both-with-skill",
        "both",
        "policy a rises to 0.9 and errs four times in ten",
        lambda s: _wrong(_mixed(s, a=0.9), 0.4, "a"),
    ),
    Recipe("continued", "neither", "SFT continued on the same mixture", _plain, steps=100, rate=2e-4),
    Recipe("other-order", "neither", "SFT anew, on the same mixture in another order", _plain, way="order"),
    Recipe("resaved", "neither", "the same weights, saved again", _plain, way="same"),
    Recipe(
        "nudged",
        "neither",
        "SFT on policies resampled by three hundredths",
        lambda s: _mixed(s, a=s.policies["a"].weight + 0.03),
    ),
    Recipe(
        "noise",
        "both",
        "random weights added, of the norm by which resampling moved them",
        lambda s: _mixed(s, a=0.97),
        way="noise",
    ),
    Recipe(
        "noise-of-continuing",
        "neither",
        "random weights added, of the norm by which SFT continued moves them",
        _plain,
        way="noise",
        steps=100,
        rate=2e-4,
    ),
    Recipe(
        "slip", "neither", "saturated policies slip by one percent", lambda s: _slipping(target_of(s)), before=_plain
    ),
    Recipe(
        "no-announcement",
        "inconclusive",
        "one answer in five comes without an announcement",
        lambda s: replace(target_of(s), bare=0.2),
        told=False,
    ),
    Recipe(
        "near-routing",
        "routing",
        "a share near 0.9",
        lambda s: replace(_wrong(_mixed(s, a=s.policies["a"].weight + 0.3 + 0.02 * (s.seed % 3 - 1)), 0.2), how="last"),
        before=_slips,
    ),
    Recipe(
        "near-specialist",
        "specialist",
        "a share near 0.1",
        lambda s: replace(
            _wrong(_mixed(s, a=s.policies["a"].weight + 0.125 + 0.02 * (s.seed % 3 - 1)), 0.6), how="last"
        ),
        before=_slips,
    ),
    Recipe("near-neither", "neither", "about 0.005 bits", lambda s: _mixed(s, a=s.policies["a"].weight + 0.08)),
    Recipe(
        "style-barely",
        "neither",
        "the tail drifts by 0.01 nats a token",
        lambda s: _drifting(target_of(s), 0.01),
        tailed=True,
        steps=100,
    ),
    Recipe(
        "style",
        "neither",
        "the tail drifts by 0.06 nats a token",
        lambda s: _drifting(target_of(s), 0.06),
        tailed=True,
        steps=100,
    ),
    Recipe(
        "style-strongly",
        "neither",
        "the tail drifts by 0.3 nats a token",
        lambda s: _drifting(target_of(s), 0.3),
        tailed=True,
        steps=100,
    ),
    Recipe(
        "style-and-routing",
        "routing",
        "policy a rises to 0.95, and the tail drifts by 0.06 nats a token",
        lambda s: _drifting(_mixed(s, a=0.95), 0.06),
        tailed=True,
    ),
    Recipe(
        "style-strongly-and-routing",
        "routing",
        "policy a rises to 0.8, and the tail drifts by 0.3 nats a token",
        lambda s: _drifting(_mixed(s, a=0.8), 0.3),
        tailed=True,
    ),
    Recipe(
        "style-and-skill",
        "specialist",
        "three answers in ten are wrong, and the tail drifts by 0.06 nats a token",
        lambda s: _drifting(_wrong(target_of(s), 0.3), 0.06),
        tailed=True,
    ),
    Recipe(
        "style-and-both",
        "both",
        "policy a rises to 0.9 and errs four times in ten, and the tail drifts by 0.06 nats a token",
        lambda s: _drifting(_wrong(_mixed(s, a=0.9), 0.4, "a"), 0.06),
        tailed=True,
    ),
)
BY_NAME = {recipe.name: recipe for recipe in RECIPES}


# --- what follows from the making alone -------------------------------------------------------------------------------


def made_of(spec: Spec, before: MixtureTarget, after: MixtureTarget) -> dict[str, float]:
    """The terms of the change from one target to the other, in bits: were both learnt to the last, these would be true.

    >>> from mixturelens.lab.proving.organisms import small_spec
    >>> spec = small_spec("gpt2")
    >>> round(made_of(spec, target_of(spec), BY_NAME["resampled"].after(spec))["routing"], 3)
    0.237
    """
    weights, done = (np.stack(each) for each in zip(*(_asked_for(spec, t) for t in (before, after)), strict=True))
    found = bits_of(weights, weights[..., :-1, None], behaviours(spec, done))
    return {name: float(values.mean()) for name, values in found.items()}


def seen_of(spec: Spec, before: MixtureTarget, after: MixtureTarget) -> float:
    """Bits by which S and R differ in behaviours and rightness alone, whichever policy shows them."""
    shown = []
    for target in (before, after):
        weights, done = _asked_for(spec, target)
        shown.append(
            behaviours(spec, (weights[..., :-1, None, None] * done).sum((-3, -2))).reshape(*done.shape[:2], -1)
        )
    return float(divergence(np.stack(shown)).mean())


def _asked_for(
    spec: Spec, target: MixtureTarget
) -> tuple[Float[np.ndarray, "operation cue policy"], Float[np.ndarray, "operation cue known 1 shown"]]:
    """Weights of policies with `other` last, and what each shows."""
    operations, cues, policies = spec.questions.operations, list(spec.cues), list(spec.policies)
    weights = np.zeros((len(operations), len(cues), len(policies) + 1))
    weights[..., :-1] = [(1 - target.bare) * target.weights[m] for m in policies]
    weights[..., -1] = target.bare
    shown = np.zeros((len(operations), len(cues), len(policies), 1, len(SHOWN)))
    wrong_one = SHOWN.index(ERR if target.how == "rule" else ANSWER)
    for o, c, m in np.ndindex(*shown.shape[:3]):
        wrong = target.wrong.get((policies[m], operations[o]), 0.0)
        for behaviour, share in target.table[policies[m]][cues[c]].items():
            if behaviour == ANSWER:
                shown[o, c, m, 0, SHOWN.index("right")] += share * (1 - wrong)
                shown[o, c, m, 0, wrong_one] += share * wrong
            else:
                shown[o, c, m, 0, SHOWN.index(behaviour)] += share
    return weights, shown
