"""The mechanism verdict: router or specialists, from grafts, patching and probes alone.

The two numbers that decide are those of the largest graft: all weights of R in S, and how far they move the choice of
policy and what policies do. Grafts of parts say which part it is. Patching says whether what RL did to the choice can
be undone in one place, probes whether what S's network shows can still be read in R the same way. Both are held against
the grafts, and where they disagree the verdict says so.

Distances are in nats, as those of behaviour are, so that the two verdicts can be compared: the KL divergence from S of
mean policy weights, and of the mean probability of what S usually does, cell by cell of the policy table. They are of
means over questions, because labels that mean nothing then give nothing: what turns one way on half of the questions
and the other way on the rest cancels. The split of behaviour, which is not used here, sees that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from mixturelens.features.record import FeatureRecord, Terms
from mixturelens.grafting.record import Effects, GraftRecord
from mixturelens.patching.record import Effect, PatchingRecord, Sweep
from mixturelens.patching.sweep import APART
from mixturelens.probing.record import ProbingRecord
from mixturelens.stats import FEWEST, TOO_FEW
from mixturelens.types import NOT_MEASURED, Frozen, Interval, Site, VerdictWord

FLOOR = 0.01
"""Nats under which nothing has changed."""
COVERAGE = 0.9
"""Weight of the announcements as written, under which the choice cannot be told."""
USUAL = 0.5
"""Probability of what S usually does in a cell, under which what it does there cannot be told."""
ROUTING, SPECIALIST = 0.9, 0.1
"""Shares of routing from which the verdict is `routing`, and up to which it is `specialist`."""
UNDONE = 0.5
"""Share of the change that one site must undo for patching to have found it."""
LOST = 0.1
"""Loss of a probe's score from which what it read has changed."""

Part = Literal["selector", "specialists"]


class Line(Frozen):
    """What one kind of evidence says about one part, beside what it would say of nothing."""

    source: Literal["grafts", "patching", "probes", "features"]
    about: Part
    effect: Interval
    null: float | None
    """The same number where there is nothing to find; null where there is no such control."""
    changed: bool | None
    """Null where the interval cannot tell."""
    what: str
    """What the numbers are, in one sentence."""


class Mechanism(Frozen):
    """The verdict from weights and activations, without looking at the KL split."""

    verdict: VerdictWord | None = None
    agrees: bool | None = None
    """Whether the behavioural verdict is the same; null where either is missing."""
    share: Interval = NOT_MEASURED
    """Change of the choice of policy over that and the change of what policies do."""
    reason: str = ""
    evidence: dict[str, Line] = {}
    disagree: tuple[str, ...] = ()
    """Lines that say otherwise than the grafts, which the verdict follows."""


def judge_mechanism(
    graft: GraftRecord,
    patching: PatchingRecord | None = None,
    probing: ProbingRecord | None = None,
    features: FeatureRecord | None = None,
) -> Mechanism:
    """Put the evidence together. Patching, probing and features add lines where they were run.

    >>> judge_mechanism(graft_record(sft, sft, suite, behaviour)).verdict   # doctest: +SKIP
    'neither'
    """
    selector, specialists = _grafts(graft)
    evidence = {"grafts, selector": selector, "grafts, specialists": specialists}
    if patching is not None:
        evidence |= _named(_patched_selector(patching), _patched_specialists(patching))
    if probing is not None:
        evidence |= _named(_read_selector(probing), _read_specialists(probing))
    if features is not None:
        evidence |= _named(*(_changed_features(features, part) for part in get_args(Part)))
    share = share_of(selector.effect, specialists.effect)
    verdict, why = _verdict(graft, selector, specialists, share)
    follows = {"selector": selector.changed, "specialists": specialists.changed}
    disagree = tuple(
        name
        for name, line in evidence.items()
        if line.source != "grafts"
        and None not in (line.changed, follows[line.about])
        and line.changed != follows[line.about]
    )
    return Mechanism(verdict=verdict, share=share, reason=why, evidence=evidence, disagree=disagree)


def random_components(graft: GraftRecord) -> float | None:
    """Largest change of the choice, nats, that random weights give in the selector's place."""
    return None if graft.factorial is None else max(_values(graft.factorial.noise), default=None)


def shuffled_verdict(graft: GraftRecord) -> VerdictWord | None:
    """What the same judgement says where policies are labelled at random, question by question."""
    if graft.null.shuffled is None:
        return None
    blind = graft.model_copy(update={"after": graft.null.shuffled, "factorial": None, "specialist_part": None})
    return judge_mechanism(blind).verdict


def share_of(chosen: Interval, done: Interval) -> Interval:
    """chosen / (chosen + done), as wide as both intervals at their ends make it.

    >>> share_of(Interval(value=0.3, low=0.2, high=0.4), Interval(value=0.0, low=0.0, high=0.1)).low
    0.6666666666666666
    """
    if chosen.value is None or done.value is None or chosen.value + done.value <= 0:
        return NOT_MEASURED
    value = chosen.value / (chosen.value + done.value)
    if chosen.low is None or chosen.high is None or done.low is None or done.high is None:
        return Interval(value=value)
    low, high = (c / (c + d) if c + d > 0 else 0.5 for c, d in ((chosen.low, done.high), (chosen.high, done.low)))
    return Interval(value=value, low=low, high=high)


def _verdict(graft: GraftRecord, selector: Line, specialists: Line, share: Interval) -> tuple[VerdictWord, str]:
    numbers = f"{_show(selector.effect)} nats of choice and {_show(specialists.effect)} nats of what policies do"
    if graft.questions < FEWEST:
        return "inconclusive", f"{graft.questions} {TOO_FEW}"
    if graft.coverage < COVERAGE:
        return "inconclusive", (
            f"the announcements as written cover {graft.coverage:.2f} of the completions, and {COVERAGE} is needed"
        )
    if graft.usual < USUAL:
        return "inconclusive", (
            f"what S usually does has a probability of {graft.usual:.2f} in one cell of the policy table, and {USUAL} "
            "is needed to tell whether it changed"
        )
    if selector.changed is False and specialists.changed is False:
        return "neither", f"R's weights move S by {numbers}: no more than labels that mean nothing, or than {FLOOR}"
    if True not in (selector.changed, specialists.changed):
        return "inconclusive", f"R's weights move S by {numbers}, which cannot be told from nothing"
    # what did not change may count for nothing
    if specialists.changed is False and selector.changed:
        share = share_of(selector.effect, _nothing(specialists))
    elif selector.changed is False and specialists.changed:
        share = share_of(_nothing(selector), specialists.effect)
    for threshold in (ROUTING, SPECIALIST):
        if not share.excludes(threshold):
            return "inconclusive", f"the share of the choice, {_show(share)}, crosses {threshold}; ask more questions"
    assert share.value is not None
    word: VerdictWord = "routing" if share.value >= ROUTING else "specialist" if share.value <= SPECIALIST else "both"
    return (
        word,
        f"R's weights move S by {numbers}; the share of the choice is {_show(share)}",
    )


def _nothing(line: Line) -> Interval:
    """May be nothing at all, or as much as its interval allows."""
    return Interval(value=line.effect.value, low=0.0, high=line.effect.high)


def _show(value: Interval) -> str:
    if value.value is None or value.low is None or value.high is None:
        return "-" if value.value is None else f"{value.value:.3f}"
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _named(*lines: Line | None) -> dict[str, Line]:
    return {f"{line.source}, {line.about}": line for line in lines if line is not None}


def told(effect: Interval, null: float) -> bool | None:
    """Whether a change in nats is more than nothing; None where it cannot be told from labels that mean nothing.

    >>> told(Interval(value=0.2, low=0.1, high=0.3), null=0.01), told(Interval(value=0.0, low=0.0, high=0.0), null=0.0)
    (True, False)
    """
    if effect.value is None or effect.low is None or effect.high is None:
        return None
    if effect.low > max(null, FLOOR):
        return True
    if effect.high < FLOOR:
        return False
    return False if effect.value <= null else None


# --- lines ------------------------------------------------------------------------------------------------------------


def _grafts(graft: GraftRecord) -> tuple[Line, Line]:
    """All of R's weights, on all questions; and which part of them does it, on those that did not choose it."""
    factorial, part = graft.factorial, graft.specialist_part
    carried = "no part was looked for"
    if factorial is not None:
        noise = max(_values(factorial.noise), default=0.0)
        carried = (
            f"R's {_list(factorial.selector)} in S alone: {_show(factorial.selector_only.chosen)}; random weights of "
            f"the same norm there: at most {noise:.3f}"
        )
    done = "no part was looked for"
    if part is not None:
        done = f"R's {_list(part.components)} in S alone: {_show(part.effects.done)}"
    selector = Line(
        source="grafts",
        about="selector",
        effect=graft.after.chosen,
        null=graft.null.chosen,
        changed=told(graft.after.chosen, graft.null.chosen),
        what=f"Change of the choice of policy, nats; {carried}",
    )
    specialists = Line(
        source="grafts",
        about="specialists",
        effect=graft.after.done,
        null=graft.null.done,
        changed=told(graft.after.done, graft.null.done),
        what=f"Change of what policies do, once in place, nats; {done}",
    )
    return selector, specialists


def _values(noise: Sequence[Effects]) -> list[float]:
    return [each.chosen.value for each in noise if each.chosen.value is not None]


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _patched_selector(patching: PatchingRecord) -> Line | None:
    """S's activations in R: does one place undo the new choice?"""
    sweep = next((s for s in patching.sweeps if s.kind == "checkpoint"), None)
    if sweep is None or sweep.base.value is None or sweep.goal.value is None:
        return None
    between = abs(sweep.goal.value - sweep.base.value)
    if between < APART:
        gap = Interval(value=0.0, low=0.0, high=0.0)
        what = f"S and R choose alike (log-odds {between:.2f} nats apart), so that there is nothing to undo"
        return Line(source="patching", about="selector", effect=gap, null=None, changed=False, what=what)
    inner = [
        e for e in sweep.effects if e.site.component in ("z", "attn_out", "mlp_out") and e.effect.value is not None
    ]
    if not inner:
        return None
    best = max(inner, key=_value)
    rest = sorted(abs(_value(e)) for e in inner if e.site.position != best.site.position)
    null = rest[int(0.95 * (len(rest) - 1))] if rest else None
    return Line(
        source="patching",
        about="selector",
        effect=best.effect,
        null=null,
        changed=True if best.effect.above(UNDONE if null is None else max(UNDONE, null)) else None,
        what=f"Share of the new choice under {patching.harmed_cue} that S's {best.site} undoes in R (best of "
        f"{len(inner)} sites; null: 95% of those at other tokens)",
    )


def _patched_specialists(patching: PatchingRecord) -> Line | None:
    """Policy in place: is the contrast between cues in R what it was in S?"""

    def contrast(side: str) -> Sweep | None:
        found = (s for s in patching.sweeps if (s.kind, s.checkpoint, s.direction) == ("cue", side, "denoise"))
        return next(found, None)

    before, after = contrast("before"), contrast("after")
    if before is None or after is None:
        return None
    ends = [found for s in (before, after) if (found := _ends(s))]
    if len(ends) < 2:
        return None
    keeps = [base_high < 0 < goal_low for _, _, base_high, _, goal_low, _ in ends]
    gaps = [goal - base for base, _, _, goal, _, _ in ends]
    if not keeps[0] or gaps[0] < APART:
        return None  # S's policy does not read the cue for sure: nothing that R could have lost
    spread = [(b_high - b_low + g_high - g_low) / 2 for _, b_low, b_high, _, g_low, g_high in ends]
    lost = 1 - gaps[1] / gaps[0]
    margin = (spread[1] + spread[0] * abs(gaps[1] / gaps[0])) / gaps[0]
    return Line(
        source="patching",
        about="specialists",
        effect=Interval(value=lost, low=lost - margin, high=lost + margin),
        null=0.0,
        changed=not keeps[1] if lost - margin > UNDONE or lost + margin < UNDONE else None,
        what=f"Share of the contrast between cues (policy {patching.policy} in place, nats) that R has lost; "
        f"{'R still tells the cues apart' if keeps[1] else 'R no longer does under each cue what S did'}",
    )


def _value(of: Effect) -> float:
    return math.nan if of.effect.value is None else of.effect.value


def _ends(sweep: Sweep) -> list[float]:
    """Base and goal with their intervals; empty where one of these was not measured."""
    found = [end for each in (sweep.base, sweep.goal) for end in (each.value, each.low, each.high)]
    known = [end for end in found if end is not None]
    return known if len(known) == len(found) else []


def _read_selector(probing: ProbingRecord) -> Line | None:
    """Do neutral prompts look in R like hinted ones?"""
    last = max((shift.site.layer for shift in probing.shifts), default=0)
    # behind the last layer the stream is nearly the logits, and says what the model does rather than what it looks like
    end = _end((shift.site for shift in probing.shifts), "last")
    some = [s for s in probing.shifts if s.site.position == end and s.site.layer < last and s.cosine.value is not None]
    if not some:
        return None
    best = max(some, key=lambda s: -1.0 if s.cosine.value is None else s.cosine.value)
    return Line(
        source="probes",
        about="selector",
        effect=best.cosine,
        null=best.null,
        changed=True if best.cosine.above(best.null) else None,
        what=f"Cosine at {best.site} between what RL added to neutral prompts and what a hint adds in S",
    )


def _read_specialists(probing: ProbingRecord) -> Line | None:
    """Does S's probe for the behaviour still read it in R, behind the policy word?"""
    readout = probing.readout("behaviour")
    if readout is None:
        return None
    end = _end(probing.sites, "policy")
    there = [
        index
        for index, site in enumerate(probing.sites)
        if site.component == "resid_post" and site.position == end and readout.before.value[index] is not None
    ]
    known = {i: readout.before.at(i).value for i in there if readout.carried.value[i] is not None}
    scores = {i: value for i, value in known.items() if value is not None}
    if not scores:
        return None
    best = max(scores, key=lambda index: scores[index])
    here, carried = readout.before.at(best), readout.carried.at(best)
    assert here.value is not None
    assert carried.value is not None
    if here.value - readout.chance < LOST or carried.low is None or carried.high is None:
        return None
    lost = Interval(value=here.value - carried.value, low=here.value - carried.high, high=here.value - carried.low)
    return Line(
        source="probes",
        about="specialists",
        effect=lost,
        null=0.0,
        changed=True if lost.above(LOST) else False if lost.below(LOST) else None,
        what=f"Loss of {readout.metric} of S's behaviour probe at {probing.sites[best]} when it reads R",
    )


def _changed_features(features: FeatureRecord, part: Part) -> Line | None:
    """What the features that RL moved most do in S, where R's activations bring most of R's change along."""

    def nats(terms: Terms) -> Interval:
        return terms.routing if part == "selector" else terms.specialists

    change = features.arrived
    if change is None or not change.features:
        return None
    effect, whole = nats(change.together), nats(change.whole)
    null = max((value for each in change.random if (value := nats(each).value) is not None), default=None)
    changed = told(effect, 0.0 if null is None else null)
    # what the dictionary does not see may have changed all the same, and so may what lies behind this place
    all_of_it = change.whole.moved
    unseen = changed is False and (told(whole, 0.0) is not False or all_of_it is None or all_of_it < FLOOR)
    # a part of the features may move what all of R's activations leave alone, or any features may: no change of R
    made_up = changed is True and (told(whole, 0.0) is not True or null is None)
    what = "the choice of policy" if part == "selector" else "what policies do, once in place"
    return Line(
        source="features",
        about=part,
        effect=effect,
        null=null,
        changed=None if unseen or made_up else changed,
        what=f"Change of {what}, nats, by R's values of the {len(change.features)} features of {change.site} that RL "
        f"moved most, in S (all of R's activations there: {_show(whole)}; null: most of random sets of other features)",
    )


def _end(sites: Iterable[Site], name: str) -> int | str:
    """The last position: a token's index where positions are such, else the name."""
    return max((site.position for site in sites if isinstance(site.position, int)), default=name)
