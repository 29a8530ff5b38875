"""The sections about changing and judging: grafts, and the mechanism verdict they lead to."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mixturelens import figures
from mixturelens.figures import DASH, show, show_interval
from mixturelens.pages.parts import Control, Group, Picture, Pictures, number

if TYPE_CHECKING:
    from mixturelens.grafting.record import GraftRecord
    from mixturelens.probing.record import ProbingRecord
    from mixturelens.routing.mechanism import Mechanism
    from mixturelens.routing.verdict import VerdictRecord


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


class _EvidenceRow(NamedTuple):
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
    lines: list[_EvidenceRow]
    pictures: list[Picture]


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
        _EvidenceRow(line.source, line.about, number(line.effect), show(line.null), _says(line.changed), line.what)
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
