"""The mechanism verdict: router or specialists, from weights, in the bits and with the thresholds of behaviour.

What decides is the largest graft, all of R's weights in S: how far they move the choice of policy, and what policies do
once in place, question by question. Grafts of parts say which part of R it is, and features which activations bring it;
beside them stands what noise of the same size does.

No line here rests on activations of one checkpoint being read by the other, unless they do there what R does: two
networks may write the same things in other places, and then patching between them moves much where nothing changed (SFT
anew in another order). Nor on log-odds, which go on where the choice is made; nor on probes, as what can be read need
not be used.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from mixturelens.features.record import FeatureRecord, SiteChange, Terms
from mixturelens.grafting.record import Effects, Factorial, Graft, GraftRecord
from mixturelens.stats import FEWEST, TOO_FEW
from mixturelens.types import NOT_MEASURED, Frozen, Interval, VerdictWord

FLOOR = 0.005
"""Bits under which nothing has changed."""
ROUTING, SPECIALIST = 0.9, 0.1
"""Shares of the choice from which the verdict is `routing`, and up to which it is `specialist`."""
COVERAGE = 0.9
"""Weight of the announcements as written, and share of questions on which what S usually completes shows anything,
under which choice and specialists cannot be told."""
USUAL = 0.5
"""Probability of what S usually does in a cell, under which a specialist may change unseen."""
FAITHFUL = 0.2
"""Share of R's bits by which its activations, put into S, may do otherwise than R."""

Part = Literal["selector", "specialists"]
Source = Literal["all weights", "one part", "features"]


class Line(Frozen):
    """What one kind of evidence says about one part, in bits from S, beside what noise of the same size does."""

    source: Source
    about: Part
    effect: Interval
    null: float | None
    """The same number of random changes of the same size; null where there are none."""
    changed: bool | None
    """Null where the interval cannot tell."""
    what: str
    """What the numbers are, in one sentence."""


class Mechanism(Frozen):
    """The verdict from weights, without looking at completions."""

    verdict: VerdictWord | None = None
    agrees: bool | None = None
    """Whether the behavioural verdict is the same; null where either is missing."""
    share: Interval = NOT_MEASURED
    """Bits of the choice of policy over those and the bits of what policies do."""
    reason: str = ""
    evidence: dict[str, Line] = {}


def judge_mechanism(graft: GraftRecord, features: FeatureRecord | None = None) -> Mechanism:
    """The mechanism's verdict on a pair, from its grafts and, where there are any, its features: each line of evidence,
    and the word that follows from the grafts.
    """
    lines = [*_all_weights(graft), _selector(graft.factorial), _specialists(graft.specialist_part)]
    if features is not None:
        lines += [_features(features, graft.after, part) for part in get_args(Part)]
    verdict, why = _verdict(graft)
    evidence = {f"{line.source}, {line.about}": line for line in lines if line is not None}
    return Mechanism(verdict=verdict, share=graft.after.share, reason=why, evidence=evidence)


def random_components(graft: GraftRecord) -> float | None:
    """The largest change of the choice, bits, that random weights give in the selector's place."""
    return None if graft.factorial is None else _most(each.chosen.value for each in graft.factorial.noise)


def _verdict(graft: GraftRecord) -> tuple[VerdictWord, str]:
    """(verdict, why), in the order of the behavioural one: can it be told, did anything change, what."""
    moved, share = graft.after.moved, graft.after.share
    if graft.questions < FEWEST:
        return "inconclusive", f"{graft.questions} {TOO_FEW}"
    if graft.coverage < COVERAGE:
        return "inconclusive", (
            f"the announcements as written cover {graft.coverage:.2f} of the completions, and {COVERAGE} is needed"
        )
    if graft.shown < COVERAGE:
        return "inconclusive", (
            f"what S usually completes shows a behaviour or the right answer on {graft.shown:.2f} of the prompts in "
            f"one cell of the policy table, and {COVERAGE} is needed to tell skill from style"
        )
    if not moved.measured:
        return "inconclusive", "the change could not be measured"
    only_specialists = moved.above(FLOOR) and share.below(SPECIALIST)
    if graft.usual < USUAL and not only_specialists:  # more of a change there would not make it less of one
        return "inconclusive", (
            f"what S usually does has a probability of {graft.usual:.2f} in one cell of the policy table, and {USUAL} "
            "is needed to tell whether it changed"
        )
    numbers = (
        f"R's weights move S's choice of policy by {_beside(graft.after.chosen, graft.null.chosen)}, and what policies "
        f"do by {_beside(graft.after.done, graft.null.done)}"
    )
    if moved.below(FLOOR):
        return "neither", f"{numbers}: together less than {FLOOR}"
    if not moved.excludes(FLOOR):
        return "inconclusive", f"{numbers}: together {_show(moved)}, which crosses {FLOOR}; ask more questions"
    for threshold in (ROUTING, SPECIALIST):
        if not share.excludes(threshold):
            return "inconclusive", f"the share of the choice, {_show(share)}, crosses {threshold}; ask more questions"
    assert share.value is not None
    word: VerdictWord = "routing" if share.value >= ROUTING else "specialist" if share.value <= SPECIALIST else "both"
    return word, f"{numbers}; the share of the choice is {_show(share)}"


def _show(value: Interval) -> str:
    if value.value is None or value.low is None or value.high is None:
        return "-" if value.value is None else f"{value.value:.3f}"
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _beside(value: Interval, null: float | None) -> str:
    """Bits, and how many times what noise of the same size does, where they are a change.

    >>> _beside(Interval(value=0.2, low=0.1, high=0.3), 0.004)
    '0.200 [0.100, 0.300] bits (50 times noise of the same size)'
    """
    if value.value is None or not null or value.below(FLOOR):
        return f"{_show(value)} bits"
    times = value.value / null
    return f"{_show(value)} bits ({times:,.{0 if times >= 10 else 1}f} times noise of the same size)"


def told(effect: Interval, null: float | None = None) -> bool | None:
    """Whether an effect in bits is a change (more than FLOOR), and more than a null, if there is one; None where its
    interval leaves that open.

    >>> told(Interval(value=0.2, low=0.1, high=0.3)), told(Interval(value=0.0, low=0.0, high=0.0))
    (True, False)
    """
    if effect.above(FLOOR if null is None else max(FLOOR, null)):
        return True
    return False if effect.below(FLOOR) else None


# --- lines ------------------------------------------------------------------------------------------------------------


def _all_weights(graft: GraftRecord) -> tuple[Line, Line]:
    """All of R's weights, on all questions. A real change may be smaller than what noise does: the null does not say
    whether there is one."""
    after, null = graft.after, graft.null
    choice = "JS of policy weights, S with all of R's weights against S, prompt by prompt"
    doing = "JS of what S usually completes once a policy is in place and anything else, prompt by prompt"
    return (
        _line("all weights", "selector", after.chosen, null.chosen, told(after.chosen), choice),
        _line("all weights", "specialists", after.done, null.done, told(after.done), doing),
    )


def _selector(of: Factorial | None) -> Line | None:
    """The fewest parts that carry the choice, on questions that did not choose them."""
    if of is None:
        return None
    alone, null = of.selector_only, _most(each.chosen.value for each in of.noise)
    what = f"R's {_list(of.selector)} in S alone; what policies do moves by {_show(alone.done)}"
    return _line("one part", "selector", alone.chosen, null, told(alone.chosen, null), what)


def _specialists(of: Graft | None) -> Line | None:
    if of is None:
        return None
    what = f"R's {_list(of.components)} in S alone; the choice moves by {_show(of.effects.chosen)}"
    return _line("one part", "specialists", of.effects.done, None, told(of.effects.done), what)


def _features(features: FeatureRecord, after: Effects, part: Part) -> Line | None:
    """R's values of the features that RL moved most, in S; None unless all of R's activations there do what R does."""
    change = features.arrived
    if change is None or not change.features or not _faithful(change, after):
        return None

    def bits(terms: Terms) -> Interval:
        return terms.routing if part == "selector" else terms.specialist

    null = _most(bits(each).value for each in change.random)
    what = (
        f"R's values of the {len(change.features)} features of {change.site} that training moved most, in S (all of "
        f"R's activations there: {_show(bits(change.whole))}; null: most of random sets of other features)"
    )
    return _line("features", part, bits(change.together), null, told(bits(change.together), null), what)


def _faithful(change: SiteChange, after: Effects) -> bool:
    pairs = ((change.whole.routing.value, after.chosen.value), (change.whole.specialist.value, after.done.value))
    return all(
        found is not None and known is not None and abs(found - known) <= max(FLOOR, FAITHFUL * known)
        for found, known in pairs
    )


def _line(source: Source, about: Part, effect: Interval, null: float | None, changed: bool | None, what: str) -> Line:
    return Line(source=source, about=about, effect=effect, null=null, changed=changed, what=what)


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _list(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
