"""The sections about reading, changing and judging: probes, grafts, and the mechanism verdict they lead to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mixturelens import figures
from mixturelens.figures import DASH, show, show_interval
from mixturelens.pages.parts import Control, Group, Picture, Pictures, number

if TYPE_CHECKING:
    from mixturelens.grafting.record import GraftRecord
    from mixturelens.probing.record import Checked, ProbingRecord
    from mixturelens.routing.mechanism import Mechanism
    from mixturelens.routing.verdict import VerdictRecord

_READABLE = "the stronger the colour of a cell, the better a probe reads that target there."
_DETAILED = ("cue", "log-odds")
"""Targets shown for every component: what the router reads, and what it decides."""


class ReadingSection(NamedTuple):
    """What can be read in a pair, and what of it is used."""

    name: str
    groups: list[Group]
    missing: tuple[str, ...]


class _Sum(NamedTuple):
    metric: str
    change: str
    sum: str
    points: int


class _Back(NamedTuple):
    cue: str
    sides: tuple[tuple[str, str], ...]
    """S, R, and R with S's selector."""


class Changing(NamedTuple):
    """Which weights of a pair carry the change."""

    name: str
    forced: bool
    """Log-odds are those of forced texts."""
    groups: list[Group]
    components: str
    back: list[_Back]
    enough: bool
    """Whether R without these parts lost its change, on the questions that chose them."""
    checkpoint: str | None
    sums: list[_Sum]
    missing: tuple[str, ...]


class _Said(NamedTuple):
    source: str
    about: str
    effect: tuple[str, str]
    null: str
    says: str
    what: str


class MechanismSection(NamedTuple):
    """The mechanism verdict of a pair beside the behavioural one."""

    name: str
    who: str
    """Whose evidence it is."""
    verdict: str
    behaviour: str
    agrees: str
    share: str
    reason: str
    lines: list[_Said]
    pictures: list[Picture]


# --- reading ----------------------------------------------------------------------------------------------------------


def reading(name: str, record: ProbingRecord, cues: Sequence[str], pictures: Pictures) -> ReadingSection:
    """The section about what probes say of a pair. `cues`: all of the suite, which their colours go by."""
    pictures = pictures.about(record.missing)
    groups = [_readouts(record, pictures)] if record.readouts else []
    if record.erased or record.used is not None or record.unused is not None:
        groups.append(_erasure(record, cues, pictures))
    if record.subspaces:
        groups.append(_subspaces(record, pictures))
    if record.shifts:
        groups.append(_shifts(record, pictures))
    return ReadingSection(name, groups, record.missing)


def _readouts(record: ProbingRecord, pictures: Pictures) -> Group:
    how = (
        "Held-out questions. Written out: scores surely above those of shuffled labels; grey where a network with "
        "random weights reads it as well. –: cannot be asked there."
    )
    asked = "; ".join(f"{readout.target}: {readout.rows}" for readout in record.readouts)
    found = [
        pictures.add(
            figures.readable(record),
            f"The residual stream. {how} Of which prompts: {asked}.",
            read=_READABLE,
            whiskers=False,
        )
    ]
    found += [
        pictures.add(
            figures.readability(record, target),
            f"{target}, in every part of every layer. {how}",
            read=_READABLE,
            whiskers=False,
        )
        for target in _DETAILED
        if record.readout(target) is not None
    ]
    return Group(
        "What can be read where",
        "A probe is a linear rule that guesses from one activation something about the prompt (its cue, its hint, the "
        "answer) or about what the model will do. Left, S; in the middle, R; right, S's probes put on R as they are: "
        "where these still work, R writes it down the way S did.",
        "Something that shuffled labels or random weights read as well was not made by training. If S's probes "
        "failed in R where R's own succeed, R would have rebuilt what it knows, and not only how it chooses.",
        found,
    )


def _erasure(record: ProbingRecord, cues: Sequence[str], pictures: Pictures) -> Group:
    used, unused = (DASH if one is None else str(one.site) for one in (record.used, record.unused))
    absent = "" if record.unused is not None else " No site was found where the cue is surely erased and unused."
    checks = " ".join(
        f"Manipulation check where the cue is {name}: {_erased(one)}."
        for name, one in (("used", record.used), ("unused", record.unused))
        if one is not None
    )
    picture = pictures.add(
        figures.erasure(record, cues),
        f"Used where the cue reader reads: {used}; readable but unused: {unused}.{absent} "
        f"Grey: random directions of equal rank, erased at the same sites. {checks}",
        read="a site far from where nothing was erased is one that the policy takes the cue from.",
    )
    return Group(
        "Reading is not use",
        "At one site after another everything linear about the cue is erased, and nothing else. If the policy then "
        "behaves the same under all cues, the cue was taken from there (top). A site at the right and at the bottom "
        "holds the cue for all to see, and nobody looks. An eraser is fitted on some questions and may not erase the "
        "cue on others: how much of the gap between cues it leaves there is the manipulation check, and unless that is "
        "next to nothing for sure, nothing is said to be unused.",
        "If erasing random directions did as much, it is the damage that shows and not the cue. If erasing the cue "
        "where the cue reader reads left the difference between cues as it is, the cue reader is elsewhere.",
        [picture],
    )


def _erased(one: Checked) -> str:
    """The manipulation check in words."""
    found = {
        True: "it is erased",
        False: "it is not erased, so that nothing follows",
        None: "cannot say if it is erased",
    }
    return f"{found[one.holds]} (left of its gap on questions that did not fit the eraser: {show_interval(one.gap)})"


def _subspaces(record: ProbingRecord, pictures: Pictures) -> Group:
    picture = pictures.add(
        figures.subspaces(record),
        "Share of pairs in which the model does what the source asks for once its coordinates in the subspace are put "
        "into the base prompt. Diamonds: learnt on half of S's questions, tested on the other half. Upright line: the "
        "model on the source itself, the most that could be reached.",
        read="a diamond far right of its grey points is a subspace that carries what was exchanged.",
    )
    return Group(
        "The subspace that carries it",
        "A few directions are learnt in S such that exchanging them between two prompts exchanges the cue (or the "
        "choice of policy), while everything else stays. The same directions are then tried in R.",
        "Random directions, or directions learnt on shuffled labels, that do as well would say that any exchange does "
        "it. A subspace of S that does nothing in R would say that R carries it elsewhere, or no longer uses it.",
        [picture],
    )


def _shifts(record: ProbingRecord, pictures: Pictures) -> Group:
    policy, other = record.policies
    picture = pictures.add(
        figures.shifts(record),
        f"What RL added to the activations of neutral prompts, beside what a hint for {policy} rather than {other} "
        "adds in S. Written out: beyond what random halves of prompts differ by, with an interval without 0.",
        read="the stronger the colour, the more RL's shift points the way that the hint does.",
        whiskers=False,
    )
    return Group(
        "Do neutral prompts look hinted?",
        "RL can change the choice by making every prompt look, inside, like one with a hint. Then the two directions "
        "agree: a cosine near 1, and a length near the hint's own.",
        "A cosine near 0 at all places would say that RL found another way than the hint's.",
        [picture],
    )


# --- changing ---------------------------------------------------------------------------------------------------------


def changing(name: str, record: GraftRecord, pictures: Pictures) -> Changing:
    """The section about what grafts say of a pair."""
    groups, pictures = [], pictures.about(record.missing)
    if record.components:
        groups += [_components(name, record, pictures), _plane(record, pictures)]
    if record.factorial is not None:
        groups.append(_factorial(record, pictures))
    if record.placed:
        groups.append(_placed(record, pictures))
    rollback = record.rollback
    sides = ("before", "after", "rollback")
    back = (
        []
        if rollback is None
        else [
            _Back(cue, tuple(number(accuracy[side]) if side in accuracy else (DASH, "") for side in sides))
            for cue, accuracy in rollback.accuracy.items()
        ]
    )
    return Changing(
        name,
        record.method == "forced texts",
        groups,
        DASH if rollback is None else ", ".join(rollback.components),
        back,
        rollback is None or rollback.enough,
        None if rollback is None else rollback.checkpoint,
        [_Sum(path.metric, show(path.change, 4), show(path.sum, 4), path.points) for path in record.path],
        record.missing,
    )


def _searched(record: GraftRecord) -> str:
    """How a large model was looked through, and what that leaves open."""
    of = record.search
    if of is None:
        return ""
    opened = (
        f" Groups of layers were grafted first, and opened where they move at least {of.threshold:g} of R's change"
        if of.threshold
        else " Groups of layers were grafted first, and then all that they are made of"
    )
    return (
        f"{opened} ({of.grafts} grafts on {of.questions} questions). A part of a closed group moves at most what the "
        "group does, if parts do not cancel."
    )


def _components(name: str, record: GraftRecord, pictures: Pictures) -> Group:
    found = [
        pictures.add(
            figures.components({name: record}),
            "Routing: share of R's change of the log-odds between the two policies. Yellow: suffices and is not "
            "needed, so that other parts hold the same change. Crosses: Shapley shares, which add up to 1. Below the "
            f"line: groups, of which only whether they suffice was measured.{_searched(record)}",
            read="a part whose filled mark lies at 1 makes S choose as R does all by itself; at 0 it does nothing.",
        ),
        pictures.add(
            figures.components({name: record}, "weight"),
            f"The same of the weight of policy {record.policies[0]} as a probability. It saturates, so that several "
            "parts can each be enough.",
            read="as the figure before, in probabilities: far right is enough, at 0 does nothing.",
        ),
    ]
    if record.after.specialists.measured:
        found.append(
            pictures.add(
                figures.components({name: record}, "specialists"),
                "Specialists: the same share of R's change of what policies do, once in place.",
                read="a part at 1 brings all of the change in what policies do; at 0 it leaves them as they were.",
            )
        )
    return Group(
        "Which parts suffice, and which are needed",
        "Each part's weights are copied from R into S: if S then chooses as R does, they suffice (filled). And from S "
        "into R: if R then loses the change, they are needed (open).",
        "If no part or group moved the routing alone, the change is not in one place; if parts that move the routing "
        "moved what policies do as well, router and specialists are not apart.",
        found,
    )


def _plane(record: GraftRecord, pictures: Pictures) -> Group:
    picture = pictures.add(
        figures.plane(record),
        "Nats that each part adds on the way from S to R: to the choice (across, mean over cues), and to the "
        "log-probability of what a policy does under a cue (up). All parts together add up to the whole change.",
        read="parts along the horizontal line change what is chosen; parts off it change what a policy does.",
    )
    return Group(
        "Routing against specialists",
        "The weights are moved in a straight line from S to R, and each part is credited with what it adds on the way. "
        "Parts along the horizontal line change the choice alone; parts along the vertical one change what a policy "
        "does.",
        "If the parts that change the choice lay far off the horizontal line, they would change specialists too. Sums "
        "that miss the change (below) would mean that the path was followed too coarsely.",
        [picture],
    )


def _factorial(record: GraftRecord, pictures: Pictures) -> Group:
    assert record.factorial is not None
    of = record.factorial
    enough = "" if of.enough else " They do not carry enough of it there."
    picture = pictures.add(
        figures.factorial(record),
        f"Selector: {', '.join(of.selector)}, the fewest parts that carry the change of the weight on one half of the "
        f"questions, judged here on the other ({of.questions} questions).{enough} Bits from S, question by question: "
        "0 as S; dashed: noise of the size of all of R's change.",
        read="where only the router changed, selectors of R lie far right in the choice and at 0 in what policies do.",
    )
    return Group(
        "Selector and rest, two by two",
        "The parts that carry the choice are taken from R and all others from S, and the other way round. If only the "
        "router changed, the first does what R does, and what policies do stays at 0 in every row.",
        "Random weights of the same size in the selector's place that move the routing as far (grey at the diamonds) "
        "would say that any disturbance does it.",
        [picture],
    )


def _placed(record: GraftRecord, pictures: Pictures) -> Group:
    picture = pictures.add(
        figures.placed(record),
        "R's weights at these tokens only, S's at all others. last: the prompt's last token, where the policy is "
        "chosen; policy: its announcement; answer: what follows. Bits from S, question by question; dashed: noise of "
        "the size of all of R's change, at all tokens.",
        read="the row that lies farthest right names the tokens at which R's weights make the difference.",
    )
    return Group(
        "At which tokens the weights matter",
        "The same weights work on every token. Used at one kind of token alone, they show where the change acts: at "
        "the cue, at the hint, or where the policy is chosen.",
        "Routing that changes with R's weights behind the policy's announcement alone would not be routing: by then "
        "the policy is chosen.",
        [picture],
    )


# --- judging ----------------------------------------------------------------------------------------------------------


def judged(name: str, verdict: VerdictRecord, pictures: Pictures | None = None) -> MechanismSection | None:
    """The mechanism verdict, or None where nothing was grafted. Without `pictures`, in words alone."""
    mechanism = verdict.mechanism
    if mechanism.verdict is None:
        return None
    activations = any(line.source == "features" for line in mechanism.evidence.values())
    lines = [
        _Said(
            line.source,
            line.about,
            number(line.effect),
            show(line.null),
            _says(line.changed),
            line.what,
        )
        for line in mechanism.evidence.values()
    ]
    return MechanismSection(
        name,
        "Grafts and features say" if activations else "Grafts say",
        mechanism.verdict,
        verdict.verdict,
        DASH if mechanism.agrees is None else "agrees" if mechanism.agrees else "disagrees",
        show_interval(mechanism.share),
        mechanism.reason,
        lines,
        [] if pictures is None else [_evidence(mechanism, pictures)],
    )


def _says(changed: bool | None) -> str:
    return "cannot say" if changed is None else "changed" if changed else "unchanged"


def _evidence(mechanism: Mechanism, pictures: Pictures) -> Picture:
    return pictures.add(
        figures.evidence(mechanism),
        "Each line of evidence, in bits from S: 0 if one completion says nothing, 1 if it tells for sure. Grey: what "
        "random changes of the same size do. All of R's weights decide; a part says which of them it is.",
        read="a diamond right of its grey marks is a change that random weights of the same size do not make.",
    )


# --- controls ---------------------------------------------------------------------------------------------------------


def controls(graft: GraftRecord | None, probing: ProbingRecord | None) -> list[Control]:
    """Controls of grafts and probes, where these were run."""
    found = [] if graft is None else [_noise(graft), _size(graft)]
    if probing is not None and (control := _probes(probing)) is not None:
        found.append(control)
    return found


def _noise(graft: GraftRecord) -> Control:
    must = (
        "Random weights of the same norm in the selector's place must not move the choice as R's do: none may reach "
        "the low end of what these do."
    )
    of = graft.factorial
    values = [] if of is None else [each.chosen.value for each in of.noise if each.chosen.value is not None]
    if of is None or not values or of.selector_only.chosen.low is None:
        return Control("Random weights", must, DASH, None)
    low = of.selector_only.chosen.low
    reach = sum(value >= low for value in values)
    measured = (
        f"{show_interval(of.selector_only.chosen)} bits; random: at most {show(max(values))}, "
        f"{reach} of {len(values)} reach it"
    )
    return Control("Random weights", must, measured, reach == 0)


def _size(graft: GraftRecord) -> Control:
    after, null = graft.after, graft.null
    must = (
        "Noise of the norm of R's change, tensor by tensor, must not move S as far as R does. Where R moved "
        "nothing, or little beside its size, this cannot be said."
    )
    if null.chosen is None or null.done is None or not after.moved.measured:
        return Control("Noise of R's size", must, DASH, None)
    measured = (
        f"choice {show_interval(after.chosen)} bits, noise {show(null.chosen, 4)}; what policies do "
        f"{show_interval(after.done)}, noise {show(null.done, 4)}"
    )
    return Control("Noise of R's size", must, measured, after.moved.above(null.chosen + null.done) or None)


def _probes(probing: ProbingRecord) -> Control | None:
    readout = probing.readout("cue")
    if readout is None or readout.best is None or readout.shuffled_high is None:
        return None
    best = readout.before.at(readout.best)
    return Control(
        "Shuffled labels, probes",
        "Probes for the cue that are fitted on shuffled labels must stay below the best one fitted on the true labels.",
        f"{readout.metric} {show_interval(best)} at {probing.sites[readout.best]}; shuffled: 95% under "
        f"{show(readout.shuffled_high)}",
        best.above(readout.shuffled_high),
    )
