"""The verdict: did the router change, or the specialists? Evidence in, one word and one sentence out."""

from __future__ import annotations

from typing import Any, Literal

from mixturelens.behaviour.record import BehaviourRecord, Bits, Controls, CueBehaviour, Nats, TableCell, Text
from mixturelens.behaviour.settle import SampleCheck, shorten
from mixturelens.behaviour.unannounced import Identified
from mixturelens.features.record import FeatureRecord
from mixturelens.grafting.record import GraftRecord
from mixturelens.records import Record
from mixturelens.routing.mechanism import Mechanism, judge_mechanism, random_components
from mixturelens.types import NOT_MEASURED, Frozen, Interval, VerdictWord


class Thresholds(Frozen):
    """Where the verdict changes its mind. All are written into the record."""

    coverage: float = 0.9
    """Weight of the known policies, under which the suite cannot say."""
    most: float = 0.5
    """Weight of the known policies, under which shares, bits and nats are not given either."""
    bits: float = 0.005
    """routing + specialist, under which nothing has changed; a single term under it has not changed either."""
    text: float = 0.01
    """Nats a token from which the text drifted."""
    routing: float = 0.9
    """Routing share from which the verdict is `routing`."""
    specialist: float = 0.1
    """Routing share up to which the verdict is `specialist`."""
    cell: float = 0.02
    """Change of a probability in the policy table from which a cell counts as moved."""
    questions: int = 8
    """Questions under which a bootstrap says nothing."""
    samples: int = 4
    """Completions a prompt under which the weights of a prompt cannot be told (rules only)."""


DEFAULT_THRESHOLDS = Thresholds()


NO_BITS = Bits(**dict.fromkeys(Bits.model_fields, NOT_MEASURED))
NO_NATS = Nats(**dict.fromkeys(Nats.model_fields, NOT_MEASURED))


class Changed(Frozen):
    """Which part changed; null where the interval crosses the threshold or nothing was measured."""

    selector: bool | None
    cue_reader: bool | None
    skill: bool | None


class VerdictControls(Frozen):
    """Controls from the pair alone; those that need grafts are null without them, those that need training always."""

    pair: Controls
    random_components: float | None = None
    """Largest change of the choice, bits, that random weights give, in the selector's place and of the same norm. (What
    they give in the place of all of R's change is the null of the mechanism's evidence.)"""
    continued_training: None = None


class VerdictRecord(Record):
    """Router or specialists, for one pair."""

    KIND = "verdict"
    VERSION = 2

    verdict: VerdictWord
    changed: Changed
    dormant_intact: bool | None
    text_drifted: bool | None
    """Whether completions are worded otherwise; no part of the verdict."""
    reason: str
    routing_share: Interval
    router_share: Interval
    bits: Bits
    text: Text
    nats: Nats
    """The second reading, which grows with the length of completions; no part of the verdict."""
    per_cue: dict[str, CueBehaviour]
    coverage: dict[str, Interval]
    moved_cells: tuple[TableCell, ...] = ()
    """Cells of the policy table that moved by more than the threshold, or whose interval cannot exclude it."""
    mechanism: Mechanism = Mechanism()
    controls: VerdictControls
    thresholds: Thresholds = Thresholds()
    identified: Identified | None = None
    """Where policies announce nothing: what the verdict stands on."""
    check: SampleCheck | None = None
    """Whether completions show what was computed from the suite's texts; where they do not, no share is given."""
    notes: tuple[str, ...] = ()
    """What differs between the checkpoints and may matter."""

    @classmethod
    def upgraded(cls, data: dict[str, Any]) -> dict[str, Any]:
        """The data of a record of version 1 as that of today, what cannot be carried over being null: version 1 judged
        by nats, style among them, so that its shares and its specialist are not those of today.
        """
        empty = dict.fromkeys(("value", "low", "high"))
        kept = ("routing", "conditioning", "wording", "other", "total")

        def nats(old: dict[str, Any]) -> dict[str, Any]:
            return {name: old[name] if name in kept else empty for name in Nats.model_fields}

        bits = dict.fromkeys(Bits.model_fields, empty)
        controls = {k: v for k, v in data["controls"].items() if k != "shuffled_mechanism"}
        return {
            **data,
            "version": cls.VERSION,
            "text_drifted": None,
            "routing_share": empty,
            "router_share": empty,
            "bits": bits,
            "text": {},
            "nats": nats(data["nats"]),
            "per_cue": {
                cue: {**state, "bits": bits, "nats": nats(state["nats"])} for cue, state in data["per_cue"].items()
            },
            "mechanism": {},
            "controls": {**controls, "random_components": None, "pair": {**controls["pair"], "same_checkpoint": bits}},
            "thresholds": {k: v for k, v in data["thresholds"].items() if k in Thresholds.model_fields},
        }


def judge(
    record: BehaviourRecord,
    thresholds: Thresholds = DEFAULT_THRESHOLDS,
    graft: GraftRecord | None = None,
    features: FeatureRecord | None = None,
) -> VerdictRecord:
    """The behavioural verdict on a pair, from its behaviour record, and beside it the mechanism's from the others.

    Neither looks at what the other looks at. Raises ValueError if the record is about one checkpoint only.
    """
    if record.bits is None or record.nats is None or record.controls is None:
        raise ValueError("a verdict needs a pair: the record is about one checkpoint")
    verdict, doubt = _verdict(record, thresholds)
    # where most completions show no known policy, the little that is left says nothing about the pair
    trusted = _contradiction(record) is None and not any(c.below(thresholds.most) for c in record.coverage.values())
    bits, nats, text = (record.bits, record.nats, record.text) if trusted else (NO_BITS, NO_NATS, Text())
    per_cue = {
        cue: state if trusted else state.model_copy(update={"bits": NO_BITS, "nats": NO_NATS})
        for cue, state in record.per_cue.items()
    }
    changed = _changed(bits, thresholds)
    moved_cells = tuple(cell for cell in record.table if _cell_moved(cell, thresholds.cell) is not False)
    states = [_cell_moved(cell, thresholds.cell) for cell in record.table]
    intact = None if not states or (None in states and True not in states) else True not in states
    mechanism = Mechanism() if graft is None else judge_mechanism(graft, features)
    agrees = None if mechanism.verdict is None else mechanism.verdict == verdict
    return VerdictRecord(
        provenance=record.provenance,
        verdict=verdict,
        changed=changed,
        dormant_intact=intact,
        text_drifted=_exceeds(text.nats_per_token, thresholds.text),
        reason=_reason(record, verdict, doubt, changed, moved_cells, thresholds),
        routing_share=record.routing_share if trusted else NOT_MEASURED,
        router_share=record.router_share if trusted else NOT_MEASURED,
        bits=bits,
        text=text,
        nats=nats,
        per_cue=per_cue,
        coverage=record.coverage,
        moved_cells=moved_cells,
        mechanism=mechanism.model_copy(update={"agrees": agrees}),
        controls=VerdictControls(pair=record.controls, random_components=graft and random_components(graft)),
        thresholds=thresholds,
        identified=record.identified,
        check=record.check,
        notes=record.notes,
    )


def _contradiction(record: BehaviourRecord) -> str | None:
    """What samples contradict most, in words; None where they agree."""
    check = record.check
    if check is None or check.agrees:
        return None
    if check.foreign:
        return f"the completions given are not what the checkpoints write at temperature 1: {check.foreign[0]}"
    said = "its texts are not what the checkpoints write"
    if check.misspelled:
        return f"{said}: {check.misspelled[0]}"
    worst = check.disagreements[0]
    shown = ", ".join(map(shorten, check.examples.get(worst.checkpoint, {}).get(worst.cue, ())))
    return (
        f"{said}: under {worst.cue} {worst.checkpoint}, {worst.what} has probability {worst.literal:.2f} as the suite "
        f"spells it, and {worst.sampled:.2f} of the completions show it; they look like {shown}"
    )


def _verdict(record: BehaviourRecord, t: Thresholds) -> tuple[VerdictWord, str]:
    """(verdict, why not more) in the fixed order: can the suite say, did anything change, what."""
    contradiction = _contradiction(record)
    if contradiction is not None:
        return "inconclusive", contradiction
    for when, coverage in record.coverage.items():
        if coverage.low is None and record.questions < t.questions:
            continue  # one question has no interval: there are too few
        if not coverage.above(t.coverage):
            hints = record.check.hints if record.check is not None else ()
            return "inconclusive", (
                f"the known policies cover only {_show(coverage)} of the completions {when}, and {t.coverage} is needed"
                f"{''.join(f'; {hint}' for hint in hints[:2])}"
            )
    if record.questions < t.questions:
        return "inconclusive", f"{record.questions} questions are too few for an interval ({t.questions} are needed)"
    if record.samples is not None and record.samples < t.samples:
        return "inconclusive", (
            f"{record.samples} completion(s) a prompt cannot tell a prompt's weights; raise `samples` to {t.samples} "
            "or more"
        )
    if record.identified is not None and record.identified.doubt is not None:
        return "inconclusive", record.identified.doubt
    if not record.moved.measured:
        return "inconclusive", "the change could not be measured"
    more = "ask more questions"
    if record.samples is not None:
        more = f"draw more completions a prompt (`samples`, now {record.samples}) or {more}"
    if record.moved.below(t.bits):
        return "neither", ""
    if not record.moved.excludes(t.bits):
        return ("inconclusive", f"the change of {_show(record.moved)} bits crosses the threshold {t.bits}; {more}")
    share = record.routing_share
    for threshold in (t.routing, t.specialist):
        if not share.excludes(threshold):
            return ("inconclusive", f"the routing share {_show(share)} crosses the threshold {threshold}; {more}")
    assert share.value is not None
    return ("routing" if share.value >= t.routing else "specialist" if share.value <= t.specialist else "both"), ""


def _changed(bits: Bits, t: Thresholds) -> Changed:
    return Changed(
        selector=_exceeds(bits.routing, t.bits),
        cue_reader=_exceeds(bits.conditioning, t.bits),
        skill=_exceeds(bits.skill, t.bits),
    )


def _exceeds(value: Interval, threshold: float) -> bool | None:
    if value.above(threshold):
        return True
    return False if value.below(threshold) else None


def _cell_moved(cell: TableCell, threshold: float) -> bool | None:
    """True if behaviour or accuracy moved by more than the threshold for sure; None if the interval cannot tell."""
    states = []
    for change in (cell.behaviour_change, cell.accuracy_change):
        if change.low is None or change.high is None:
            states.extend([None] if change.measured else [])  # one question alone cannot tell
            continue
        if change.low > threshold or change.high < -threshold:
            states.append(True)
        else:
            states.append(False if -threshold <= change.low and change.high <= threshold else None)
    return True if True in states else None if None in states or not states else False


def _show(value: Interval) -> str:
    if value.value is None:
        return "an unmeasured share"
    if value.low is None or value.high is None:
        return f"{value.value:.3f}"
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"


_LEAD: dict[VerdictWord, str] = {
    "routing": "Routing changed, not the specialists",
    "specialist": "The specialists changed, not the routing",
    "both": "Both the routing and the specialists changed",
    "neither": "Neither the routing nor the specialists changed",
    "inconclusive": "The suite cannot say",
}
_PARTS: dict[Literal["selector", "cue_reader", "skill"], str] = {
    "selector": "which policy is expressed",
    "cue_reader": "what a policy does under a cue",
    "skill": "how well it does it",
}


def _reason(
    record: BehaviourRecord,
    verdict: VerdictWord,
    doubt: str,
    changed: Changed,
    moved: tuple[TableCell, ...],
    t: Thresholds,
) -> str:
    """Plain sentences: what became of accuracy and whose doing it was, then the verdict and what it stands on."""
    if verdict == "inconclusive":
        return f"{_LEAD[verdict]}: {doubt}."
    put_in_place = _put_in_place(record, moved, t)
    if verdict == "neither":
        return (
            f"{_accuracy(record)}. {_LEAD[verdict]}: together they moved by {_show(record.moved)} bits; {put_in_place}."
        )
    parts = [text for name, text in _PARTS.items() if getattr(changed, name)]
    lead = _LEAD[verdict]
    if verdict == "specialist" and changed.selector:
        lead = "The specialists changed, far more than the routing"
    share, whole = _show(record.routing_share), record.moved.value
    clauses = [f"{lead}: {share} of the {whole:.3g} bits that tell after from before are routing"]
    if parts:
        clauses.append(f"what changed is {' and '.join(parts)}")
    clauses.append(put_in_place)
    return f"{_accuracy(record)}. {'; '.join(clauses)}."


def _accuracy(record: BehaviourRecord) -> str:
    """What became of accuracy under the cue where most did, in points: of 100 completions, so many more are right."""
    changes = {cue: state.accuracy_change for cue, state in record.per_cue.items() if state.accuracy_change is not None}
    measured = {cue: change for cue, change in changes.items() if change.total.measured}
    if not measured:
        return "What became of accuracy was not measured"
    cue, change = max(measured.items(), key=lambda item: abs(item[1].total.known))
    total = _points(change.total.known)
    if not total:
        return "Accuracy changed under no cue by a point"
    lost = change.total.known < 0
    said = f"Under {cue} {abs(total)} points of accuracy were {'lost' if lost else 'gained'}"
    by = {"routing": change.selector.value, "specialists": change.specialists.value}
    known = {name: _points(-value if lost else value) for name, value in by.items() if value is not None}
    return said + (": " if known else "") + ", ".join(f"{points} by {name}" for name, points in known.items())


def _points(accuracy: float) -> int:
    return round(100 * accuracy)


def _put_in_place(record: BehaviourRecord, moved: tuple[TableCell, ...], t: Thresholds) -> str:
    """What the policy table says, silent policies included."""
    if record.identified is not None:
        found = record.identified
        if found.explanation == "conditioning" and found.cell is not None:
            return f"what moved is what policy {found.cell[0]} does under {found.cell[1]}"
        return "policies announce nothing, so that a silent one is not seen"
    if not record.table:
        return "no policy could be put in place (no rule has a `force`)"
    if not moved:
        return "every policy put in place still does what it did"
    sure = [cell for cell in moved if _cell_moved(cell, t.cell)]
    if not sure:
        return "whether every policy put in place still does what it did cannot be told"
    cell = max(sure, key=lambda c: max(abs(x.known) for x in (c.behaviour_change, c.accuracy_change) if x.measured))
    return f"policy {cell.policy} put in place under {cell.cue} {_cell_words(cell)}"


def _cell_words(cell: TableCell) -> str:
    assert cell.accuracy_after is not None, "a cell that moved has two sides"
    if cell.behaviour is not None and cell.shown_after is not None:
        before, after = cell.shown_before[cell.behaviour], cell.shown_after[cell.behaviour]
        if abs(after - before) >= abs(cell.accuracy_after - cell.accuracy_before):
            return f"shows `{cell.behaviour}` with probability {after:.2f}, where it was {before:.2f}"
    return f"is right with probability {cell.accuracy_after:.2f}, where it was {cell.accuracy_before:.2f}"
