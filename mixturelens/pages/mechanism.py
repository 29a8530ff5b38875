"""The sections about the mechanism: where the router is, and the repair of transfer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mixturelens import figures
from mixturelens.figures import DASH, SIDES, show, show_interval
from mixturelens.pages.circuit import circuit_view
from mixturelens.pages.features import anchors
from mixturelens.pages.parts import Control, Group, Picture, Pictures, number
from mixturelens.routing.circuit import CARRIES

if TYPE_CHECKING:
    from mixturelens.behaviour.record import TableCell
    from mixturelens.contrasts import Kind
    from mixturelens.pages.pair import Findings
    from mixturelens.patching.record import PatchingRecord, ReaderHeads
    from mixturelens.routing.circuit import CircuitRecord, Overlap, RoutingCircuit
    from mixturelens.routing.repair import Repair, RepairRecord
    from mixturelens.types import Component, Site

_FOLLOW = "follow thick lines from the tokens at the bottom to the logits on top: they carry the contrast."
RANDOM = 0.05
"""Largest p of the repair among random ones: an error of 5%, as everywhere."""
ALIKE = 20
"""Strongest edges of two circuits that are compared on the page."""
_MAPS: tuple[tuple[Component, str], ...] = (
    ("resid_pre", "The residual stream before each layer: at which token the contrast is."),
    ("z", "What single heads write: who carries it from token to token."),
    ("mlp_out", "What single MLPs write: where it is worked on."),
)


class _ReaderRow(NamedTuple):
    kind: str
    checkpoint: str
    heads: str
    effect: tuple[str, str]
    margin: tuple[str, str]
    rival: str
    first: str


class _Alike(NamedTuple):
    kind: str
    checkpoints: str
    size: str
    jaccard: tuple[str, str]
    chance: str


class Where(NamedTuple):
    """Where the router of a pair is."""

    name: str
    groups: list[Group]
    readers: list[_ReaderRow]
    overlaps: list[_Alike]
    missing: tuple[str, ...]


class Damage(NamedTuple):
    """A cell of the policy table that a repair moved, and was not meant to."""

    repair: str
    policy: str
    cue: str
    accuracy: str
    behaviour: str


class _Score(NamedTuple):
    kind: str
    what: str
    gap_closed: tuple[str, str]
    trained_change: tuple[str, str]
    null: str


class Repaired(NamedTuple):
    """What the page says of a pair's repairs."""

    name: str
    policy: str
    trained_cue: str
    harmed_cue: str
    heads: str
    questions: int
    checkpoint: str | None
    pictures: list[Picture]
    scores: list[_Score]
    damage: list[Damage]
    threshold: str
    missing: tuple[str, ...]


def where(found: Findings, number_of: int, pictures: Pictures) -> Where:
    """The section about what patching and circuits say of a pair; `number_of`: its number on the page."""
    record, circuits, cues = found.patching, found.circuit, found.behaviour.cues
    missing = () if record is None else record.missing
    unmapped = () if circuits is None else tuple(f"circuit of the {why}" for why in circuits.missing)
    groups, pictures = [], pictures.about((*missing, *unmapped))
    if record is not None:
        kinds = {sweep.kind for sweep in record.sweeps}
        groups += [_maps(record, kind, pictures) for kind in ("cue", "hint", "checkpoint") if kind in kinds]
        if record.attention:
            groups.append(_attention(record, cues, pictures))
    if circuits is not None and circuits.circuits:
        groups.append(_circuits(found, circuits, number_of, pictures))
    overlaps = [] if circuits is None else [_alike(each) for each in circuits.overlaps if each.size == ALIKE]
    return Where(found.name, groups, [] if record is None else _readers(record), overlaps, (*missing, *unmapped))


def _alike(overlap: Overlap) -> _Alike:
    names = {"before": "S", "after": "R"}
    both = " and ".join(names.get(side, side) for side in (overlap.left, overlap.right))
    return _Alike(overlap.kind, both, str(overlap.size), number(overlap.jaccard), show(overlap.chance))


_TITLES: Mapping[Kind, str] = {
    "cue": "The cue reader: patching between cues",
    "hint": "The selector: patching between hints",
    "checkpoint": "What undoes training: patching S into R",
}
_TEXTS: Mapping[Kind, str] = {
    "cue": "Each question is put under two cues with the same policy in place. One activation at a time is replaced by "
    "the one from the other cue, and the colour says how much of the difference between the two behaviours moves "
    "with it: 0 nothing, 1 all of it. Coloured cells are where the cue is read and carried on.",
    "hint": "The same, for prompts that differ only in the hint that names a policy: the colour says how much of the "
    "choice between the two policies moves with one activation.",
    "checkpoint": "The same prompt in both checkpoints: one activation at a time of S is put into R, and the colour "
    "says how much of the old choice of policy comes back.",
}
_FALSIFY: Mapping[Kind, str] = {
    "cue": "If the cue reader is one thin place, few heads are coloured and the rest is blank; colour spread over many "
    "layers and heads would speak against it. Outlined cells in which S and R differ would say that training rebuilt "
    "it.",
    "hint": "A hint that moves nothing in R (blank where S has colour) would say that training cut the selector off, "
    "not that it leans to one side.",
    "checkpoint": "If no single place brings the old choice back, the change is not in one place.",
}


def _maps(record: PatchingRecord, kind: Kind, pictures: Pictures) -> Group:
    sites = [effect.site for sweep in record.sweeps if sweep.kind == kind for effect in sweep.effects]
    placed = {site.component for site in sites if site.position is not None}
    differ = f" Outlined: S and R differ by at least {figures.WORTH:g}, and their intervals do not meet."
    if kind == "checkpoint":
        differ = ""  # S has nothing to be put into
    found = [
        pictures.add(
            figures.patching_maps(record, kind, component),
            f"{what} Written out: effects of at least {figures.WORTH:g} whose interval excludes 0.{differ}",
            read="the stronger the colour of a cell, the more of the contrast moves with that one place.",
            whiskers=False,
        )
        for component, what in _MAPS
        if component in placed
    ]
    if kind == "cue" and any(site.head is not None and site.position is None for site in sites):
        found += [
            pictures.add(
                figures.head_effects(sweep),
                "What each channel of a head carries, at all positions at once: queries, keys and pattern say where "
                "a head looks, values what it takes from there.",
                read="one row a head: the channel farthest right is the way in which this head carries the contrast.",
            )
            for sweep in record.sweeps
            if sweep.kind == kind and sweep.direction == "denoise"
        ]
    passed = [sweep.unseen for sweep in record.sweeps if sweep.kind == kind and sweep.unseen]
    looked = ""
    if passed:
        most = max(passed, key=lambda each: each.largest)
        looked = (
            " A dash is what was not patched. Of up to "
            f"{max(each.sites for each in passed)} outputs that were passed over, {most.sampled} drawn at random were "
            f"patched, too, and move {most.largest:.2f} at most: with 95% confidence no more than {most.share:.0%} of "
            "the others move more."
        )
    return Group(_TITLES[kind], _TEXTS[kind] + looked, _FALSIFY[kind], found)


def _attention(record: PatchingRecord, cues: Sequence[str], pictures: Pictures) -> Group:
    picture = pictures.add(
        figures.attention(record, cues),
        "Mean attention over questions; each cue adds up to 1.",
        read="a tall bar is a token that the head looks at; where colours differ, it looks elsewhere by cue.",
        whiskers=False,
    )
    return Group(
        "What the reader heads look at",
        "A head can read the cue in two ways: look at another token under another cue, or look at the same token and "
        "find something else there. Bars of two colours that differ show the first.",
        "A reader that pays the cue's token no attention under any cue does not read it there itself: it would be "
        "handed the cue by an earlier layer.",
        [picture],
    )


def _circuits(of_pair: Findings, record: CircuitRecord, number_of: int, pictures: Pictures) -> Group:
    circuits = record.circuits
    links = [] if of_pair.features is None else anchors(of_pair.features.cards, number_of)
    found = []
    kinds: dict[Kind, None] = dict.fromkeys(of.kind for of in circuits)
    for kind in kinds:
        view = circuit_view(record, kind, patching=of_pair.patching, features=of_pair.features, anchors=links)
        shown = [of for of in circuits if of.kind == kind]
        caption = (
            f"The {kind} contrast: each line runs from who writes (below) to who reads (above), at one token. "
            "Width: share of the contrast; dashed: a head carries it from one token to another; yellow: S and R "
            f"differ.{_complete(shown)}{_verified(shown)}"
        )
        found.append(pictures.draw(view.html, caption, read=_FOLLOW))
    found.append(
        pictures.add(
            figures.faithfulness(circuits),
            "What is left of the contrast when only the strongest edges (or as many random ones) keep their clean "
            "values. CPR: area under the curve over the share of edges, the higher the better; CMD: area between the "
            f"curve and 1, the lower the better. Bands: {figures.INTERVALS}. A circuit without edges keeps 0.",
            read="the sooner a line climbs to 1, the fewer edges carry the contrast; grey is as many edges at random.",
            whiskers=False,
        )
    )
    return Group(
        "The routing circuit",
        "The network as a graph: every node adds to one stream, and every later node reads the sum. Drawn are the "
        "connections that carry the contrast by their slopes; then single heads and MLPs are patched exactly. Dotted: "
        "lines from or to one that moves next to nothing, so that its slopes mislead.",
        "A circuit that keeps no more of the contrast than random edges of equal number is a picture and no finding.",
        found,
    )


def _complete(circuits: Sequence[RoutingCircuit]) -> str:
    """Whether slopes add up, in single questions, too."""
    return "".join(
        f" {SIDES[of.checkpoint]}: slopes miss {of.missed.mean:.1%} of the mean change, and of a question's own "
        f"{of.missed.median:.1%} (median) and at worst {of.missed.worst:.1%}."
        for of in circuits
        if of.missed is not None
    )


def _verified(circuits: Sequence[RoutingCircuit]) -> str:
    """What exact patching says of the nodes: how many are used, and which slopes it refutes."""
    found = []
    for of in circuits:
        known = [node for node in of.nodes if node.patched.measured]
        if not known:
            continue
        scored = [(node, node.score.value) for node in known if node.used is False]
        refuted = [node for node, score in scored if score is not None and score >= CARRIES]
        named = [
            f"{node.name} (slopes {show(node.score.value)}, patched {show(node.patched.value)}, "
            f"needed {show(node.needed.value)})"
            for node in refuted
        ]
        found.append(
            f" {SIDES[of.checkpoint]}: {sum(node.used is True for node in known)} of {len(known)} heads and MLPs "
            f"move at least {CARRIES:g} of the contrast when they alone are patched, exactly"
            + (f"; slopes alone speak for {', '.join(named)}, drawn dotted." if named else ".")
        )
    return "".join(found)


def _heads(sites: Sequence[Site]) -> str:
    return ", ".join(str(site) for site in sites) or DASH


def _readers(record: PatchingRecord) -> list[_ReaderRow]:
    """S and R of one contrast beside each other."""
    kinds = list(dict.fromkeys(reader.kind for reader in record.readers))
    return [_reader(reader) for reader in sorted(record.readers, key=lambda reader: kinds.index(reader.kind))]


def _reader(reader: ReaderHeads) -> _ReaderRow:
    first = "cannot say" if reader.first is None else "yes" if reader.first else "no"
    return _ReaderRow(
        reader.kind,
        SIDES[reader.checkpoint],
        _heads(reader.heads),
        number(reader.effect),
        number(reader.margin),
        _heads(reader.rival),
        first,
    )


def repaired(name: str, record: RepairRecord, threshold: float, pictures: Pictures) -> Repaired:
    """The section about what repairs of a pair bring back, and what they break. `threshold`: how far a cell of the
    policy table must move to count as damage.
    """
    pictures = pictures.about(record.missing)
    found = [
        pictures.add(
            figures.repairs(record),
            "Accuracy under each cue before training, after it, and after each repair of R without training. Dotted: "
            "what the best policy of S, put in place, reaches under the harmed cue; gap closed says how much of the "
            "way from R to there a repair goes. If the skill was gone and not only unused, no repair could come near.",
            read="a repair has worked where its mark under the harmed cue is back near the dotted line.",
        ),
        pictures.add(
            figures.repair_nulls(record),
            "The same repair at random places of equal size. If they did as well as the cue "
            "reader (grey points at the diamond), the repair would say nothing about where the router is.",
            read="the diamond is the repair, grey points are the same done elsewhere: far apart, the place matters.",
        ),
    ]
    damage = [moved for repair in record.repairs for moved in _damage(record, repair, threshold)]
    scores = [
        _Score(
            repair.kind, "; ".join(repair.what), number(repair.gap_closed), number(repair.trained_change), _null(repair)
        )
        for repair in record.repairs
    ]
    return Repaired(
        name,
        record.policy,
        record.trained_cue,
        record.harmed_cue,
        _heads(record.heads),
        record.questions,
        record.checkpoint,
        found,
        scores,
        damage,
        f"{threshold:g}",
        record.missing,
    )


def _null(repair: Repair) -> str:
    if repair.random.above is None:
        return DASH
    return f"median {show(repair.random.median)}, {figures.reaching(repair.random)} reach the repair"


def not_meant(record: RepairRecord, repair: Repair) -> list[TableCell]:
    """Cells of the policy table but for the one that the repair is about: what changes there is its cost."""
    return [cell for cell in repair.cells if (cell.policy, cell.cue) != (record.policy, record.harmed_cue)]


def _damage(record: RepairRecord, repair: Repair, threshold: float) -> list[Damage]:
    """Cells that moved, but for the one that the repair is about."""
    found = []
    for cell in not_meant(record, repair):
        changes = (cell.behaviour_change.value, cell.accuracy_change.value)
        if any(change is not None and abs(change) > threshold for change in changes):
            behaviour = DASH if cell.behaviour is None else f"{cell.behaviour} {show_interval(cell.behaviour_change)}"
            accuracy = f"{show(cell.accuracy_before)} → {show(cell.accuracy_after)}"
            found.append(Damage(repair.kind, cell.policy, cell.cue, accuracy, behaviour))
    return found


def random_control(record: RepairRecord | None) -> Control:
    """Whether an interchange repairs at the cue reader alone. One way, named beforehand: the best of many wins."""
    name = "Random components"
    must = (
        "The interchange at other heads, as many at a time, must not bring the harmed cue back: p = (k + 1) / (n + 1), "
        f"k of n reaching what the cue reader's reaches, is at most {RANDOM:g}. With few heads it cannot be that small."
    )
    one = None if record is None else next((each for each in record.repairs if each.kind == "interchange"), None)
    if record is None or one is None or one.random.p is None:
        return Control(name, must, DASH, None)
    reached = show_interval(one.accuracy[record.harmed_cue])
    number = len(one.random.places)
    holds = None if number + 1 < 1 / RANDOM and one.random.above == 0 else one.random.p <= RANDOM
    return Control(name, must, f"{reached}; random: {_null(one)} (p = {one.random.p:.2g})", holds)
