"""The section about features: how well SAEs describe a pair, what their features do, and a card for single ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mixturelens import figures
from mixturelens.figures import DASH, show, show_interval
from mixturelens.pages.parts import Control, Group, Picture, Pictures, number

if TYPE_CHECKING:
    from mixturelens.features import record as of
    from mixturelens.routing.repair import RepairRecord
    from mixturelens.types import Side

_SIDES: tuple[Side, ...] = ("before", "after")


class _Quality(NamedTuple):
    site: str
    width: str
    """Features that are left, of those that were trained."""
    side: str
    explained: str
    active: str
    dead: str
    loss_recovered: tuple[str, str]


class _Scored(NamedTuple):
    concept: str
    kind: str
    unit: str
    among: int
    auroc: tuple[str, str]
    patch: tuple[str, str]
    clamp: tuple[str, str]
    ablate: tuple[str, str]
    random: str
    margin: tuple[str, str]


class _Token(NamedTuple):
    text: str
    activation: str
    shade: str
    """Its share of the card's maximum: how dark it is."""


class _Card(NamedTuple):
    """A feature on the page."""

    anchor: str
    title: str
    why: str
    tells: list[tuple[str, str]]
    fires: list[tuple[str, str, str]]
    """Checkpoint, share of tokens, mean activation where it fires."""
    promotes: list[tuple[str, str]]
    suppresses: list[tuple[str, str]]
    examples: list[list[_Token]]
    most: str
    """The maximum of its activation over the examples."""


class Featured(NamedTuple):
    """What features say about a pair."""

    name: str
    qualities: list[_Quality]
    groups: list[Group]
    scores: list[_Scored]
    cards: list[_Card]
    missing: tuple[str, ...]


def featured(
    name: str, number_of: int, record: of.FeatureRecord, repair: RepairRecord | None, pictures: Pictures
) -> Featured:
    """The section about a pair's features; `number_of`: its number on the page, which anchors of its cards carry."""
    pictures = pictures.about(record.missing)
    groups = [_units(record, pictures)] if record.tables else []
    if any(score.gap_closed.measured for table in record.tables for score in table.scores):
        groups.append(_clamping(record, repair, pictures))
    if record.changes:
        groups.append(_changes(record.changes, pictures))
    return Featured(
        name,
        [_quality(sae, side) for sae in record.saes for side in _SIDES if side in sae.quality],
        groups,
        [_scored(table, score) for table in record.tables for score in table.scores],
        [_card(*each) for each in zip(record.cards, anchors(record.cards, number_of), strict=True)],
        record.missing,
    )


def _quality(sae: of.Sae, side: Side) -> _Quality:
    found = sae.quality[side]
    return _Quality(
        str(sae.site),
        f"{sae.width} of {sae.trained}" if sae.pretrained is None else f"{sae.width}, pretrained",
        figures.SIDES[side],
        show(found.explained),
        show(found.active, 1),
        show(found.dead),
        number(found.loss_recovered),
    )


def _scored(table: of.Table, score: of.UnitScore) -> _Scored:
    return _Scored(
        table.concept,
        score.unit.kind,
        str(score.unit),
        score.among,
        number(score.auroc),
        number(score.patch),
        number(score.clamp),
        number(score.ablate),
        f"{show(min(score.random))} to {show(max(score.random))}" if score.random else DASH,
        number(score.margin),
    )


def _units(record: of.FeatureRecord, pictures: Pictures) -> Group:
    many = pictures.add(
        figures.needed(record),
        "Share of the contrast (1: all of it). Diamonds: the best one of its kind, put as it is on the clean side. "
        "Rings: the fewest that move 0.9 of it together, on the questions that chose them; “not enough”: no set that "
        "was tried does, and this one moves most. AUROC: how well the one tells the two sides apart. Grey: as many "
        "others of like strength.",
        read="a diamond near 1 is one unit that carries the contrast alone; a ring near 1 needs the others of its set.",
    )
    picture = pictures.add(
        figures.best_units(record),
        "The best ones again, in full. Diamonds: the unit's activation is that of the clean side; squares: it "
        "is the clean side's mean; crosses: what is lost without it. Grey: other units of the same kind and like "
        "strength, patched. AUROC: how well its activation alone tells the two sides apart.",
        read="the farther right a mark, the more of the contrast that one unit moves, far from grey if it is special.",
    )
    return Group(
        "Which unit carries it",
        "For each contrast the best feature, neuron, head and direction, and the fewest features, neurons and heads "
        "that carry it together; chosen on one half of the questions, judged on the other. To read a cue is not to "
        "carry it: a feature can tell the sides apart on every question (AUROC 1) and move next to nothing, because "
        "the dictionary split the cue over several features and what reads it works like a threshold. Then the set "
        "moves far more than its members do one by one, and a direction that no dictionary was needed for (the "
        "difference of means) moves all of it.",
        "Matched random units, or as many random others, that move as much (grey at the diamond or ring, a margin that "
        "reaches 0) would say that any unit does it. A set that stays far behind the direction would say that the "
        "dictionary does not hold the concept at all, in however many pieces.",
        [many, picture],
    )


def _clamping(record: of.FeatureRecord, repair: RepairRecord | None, pictures: Pictures) -> Group:
    beside = "" if repair is None else " White squares: the repairs of heads; their own nulls are in their section."
    picture = pictures.add(
        figures.clamping(record, repair),
        "Share of the accuracy lost under the harmed cue that comes back with one unit of R clamped, nothing trained, "
        "and what it costs under the trained cue. Rings: all units of the set above clamped; their number stands with "
        f"the gap they close. Grey: controls, clamped (others of like strength, random directions).{beside}",
        read="left panel, far right: the lost accuracy is back; right panel, at 0: it cost nothing elsewhere.",
    )
    return Group(
        "One unit, clamped; or several at once",
        "Units are held at their mean on the clean side in R. If they carry what the router reads, R does under "
        "the harmed cue what it does under the trained one. Clamping the choice of policy brings the old choice back "
        "under both cues, and so costs accuracy under the trained one.",
        "Random units that close as much of the gap; or a gap that stays open where patching the same unit moved the "
        "contrast: then its mean is not its message, or it moves log-odds and not behaviour.",
        [picture],
    )


def _changes(changes: Sequence[of.SiteChange], pictures: Pictures) -> Group:
    found: list[Picture] = []
    for change in changes:
        found.append(
            pictures.add(
                figures.feature_change(change),
                f"{change.site}: R's activation of these features put into S, and how far S then is from itself, in "
                "bits, question by question. One scale for all three terms. Grey: random other "
                "features of like strength, as many.",
                read="bars in the first panel alone are features by which training changed the choice alone.",
            )
        )
        found.append(
            pictures.add(
                figures.firing(change),
                f"{change.site}: the same features in S and in R, by number. On the dotted line: as before.",
                read="a point above the dotted line fires more, or more strongly, after training than before.",
                whiskers=False,
            )
        )
    return Group(
        "What training changed of S's features",
        "The features that moved most from S to R, and which term of the split their change moves: routing (which "
        "policy is expressed), conditioning (what a policy does under a cue) or skill (how well it does it).",
        "If training changed the router alone, bars in conditioning and skill would refute it. If random features "
        "moved as much (grey beside “together”), or all features far less than R's whole activation, the change would "
        "be where this dictionary does not see it.",
        found,
    )


def crosscoders(records: Mapping[str, of.FeatureRecord], pictures: Pictures) -> Group | None:
    """The section about latents that one checkpoint has alone, of all pairs that have crosscoders."""
    found = {name: record.crosscoders for name, record in records.items() if record.crosscoders}
    if not found:
        return None
    picture = pictures.add(
        figures.crosscoder(found),
        "A row a crosscoder. False: exclusive by the norms of its decoders, and not once it is asked how much of the "
        "other checkpoint's activations it explains (latent scaling). Causal: of those of R alone that were taken out "
        "one by one, the ones without which R does something else, beyond nearly all matched shared ones. Bits: R "
        "without all latents of its own, against R.",
        read="short bars say that one checkpoint has next to no direction of its own.",
    )
    return Group(
        "Latents that one checkpoint has alone",
        "A crosscoder is one dictionary for S and R at once: each latent has a direction in either. A latent with a "
        "direction in R alone is something that training added; most of a change of the router should need none.",
        "As many latents of R alone between two checkpoints that do the same (a null pair, or another seed that finds "
        "others); or R without them that does what R without shared ones does (grey at the diamonds).",
        [picture],
    )


# --- cards ------------------------------------------------------------------------------------------------------------


def anchors(cards: Sequence[of.Card], number_of: int) -> list[str]:
    """Addresses of a pair's cards on the page; `number_of` as for `featured`."""
    found: list[str] = []
    for card in cards:
        slug = re.sub(r"[^A-Za-z0-9_]+", "-", str(card.unit).replace(" feature", "")).strip("-")
        anchor = f"feature-{number_of}-{slug}"
        taken = sum(each == anchor or each.startswith(f"{anchor}--") for each in found)
        found.append(f"{anchor}--{taken + 1}" if taken else anchor)
    return found


def _card(card: of.Card, anchor: str) -> _Card:
    most = max((value for example in card.examples for value in example.activations), default=0.0)
    return _Card(
        anchor,
        str(card.unit),
        card.why,
        [(concept, show(value)) for concept, value in card.auroc.items()],
        [(figures.SIDES[side], show(card.rate.get(side)), show(card.strength.get(side), 2)) for side in _SIDES],
        [(_visible(text), f"+{show(nats, 2)}" if nats > 0 else show(nats, 2)) for text, nats in card.promotes],
        [(_visible(text), show(nats, 2)) for text, nats in card.suppresses],
        [
            [
                _Token(_visible(text), show(value, 2), f"{max(value, 0.0) / most if most > 0 else 0.0:.2f}")
                for text, value in zip(example.tokens, example.activations, strict=True)
            ]
            for example in card.examples
        ],
        show(most, 2),
    )


def _visible(token: str) -> str:
    """A token on the page: a line break, and one of white space alone, can be seen."""
    text = token.replace("\n", "⏎")
    return text if text.strip() else "␣" * max(len(text), 1)


# --- controls ---------------------------------------------------------------------------------------------------------


def controls(record: of.FeatureRecord | None) -> list[Control]:
    """Whether the best feature for the cue does more than matched random ones, where one was scored."""
    table = None if record is None else record.table("cue")
    score = None if table is None else table.best("feature")
    if score is None:
        return []
    return [
        Control(
            "Random features",
            "The best feature for the cue must move more of the contrast than the best of as many matched random "
            "features: a margin above 0.",
            f"{show_interval(score.patch)} by {score.unit}; margin {show_interval(score.margin)}",
            None if score.margin.low is None else score.margin.low > 0,
        )
    ]
