"""One pair: what has been measured of it, in words and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from mixturelens.behaviour.record import BehaviourRecord, Bits, CueSide, Nats
from mixturelens.behaviour.settle import SampleCheck
from mixturelens.figures import DASH, show, show_interval
from mixturelens.pages import evidence, mechanism
from mixturelens.pages import features as units
from mixturelens.pages.parts import Control, number
from mixturelens.records import Provenance
from mixturelens.routing.verdict import VerdictRecord
from mixturelens.types import NOT_MEASURED, Interval

if TYPE_CHECKING:
    from mixturelens.features.record import FeatureRecord
    from mixturelens.grafting.record import GraftRecord
    from mixturelens.patching.record import PatchingRecord
    from mixturelens.probing.record import ProbingRecord
    from mixturelens.routing.circuit import CircuitRecord
    from mixturelens.routing.repair import RepairRecord

_BITS = {
    "routing": "which policy is expressed",
    "specialist": "conditioning + skill",
    "conditioning": "what a policy does under a cue",
    "skill": "how well it does it",
    "dormant": "specialist with every policy weighed alike, which hears a silent one; no part of the share",
}
_NATS = {
    "routing": "which policy is expressed",
    "wording": "how the policy is announced",
    "specialist": "conditioning + skill",
    "conditioning": "what a policy does under a cue",
    "skill": "how well it does it",
    "text": "what completions say, once all that is known: style",
    "other": "completions of no known policy",
    "total": "routing + wording + specialist + text + other",
}


_ROUNDING = 1e-6
"""Bits that float32 can make out of nothing."""


class _Row(NamedTuple):
    """One quantity of a table: its name, its numbers as (text, interval) per column."""

    name: str
    cells: tuple[tuple[str, str], ...]
    note: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Findings:
    """What has been measured of one pair: its records. What was not measured has no section."""

    name: str
    behaviour: BehaviourRecord
    verdict: VerdictRecord
    patching: PatchingRecord | None = None
    circuit: CircuitRecord | None = None
    probing: ProbingRecord | None = None
    graft: GraftRecord | None = None
    features: FeatureRecord | None = None
    repair: RepairRecord | None = None


def in_words(found: Findings) -> dict[str, object]:
    """What a page's template says of a pair."""
    record, verdict = found.behaviour, found.verdict
    t, check = verdict.thresholds, verdict.check
    return {
        "name": found.name,
        "verdict": verdict.verdict,
        "reason": verdict.reason,
        "facts": [
            ("Routing share", show_interval(verdict.routing_share), "of routing + specialist"),
            ("Router share", show_interval(verdict.router_share), "routing and conditioning together"),
            (
                "Moved",
                f"{show_interval(_moved(record, verdict))} bits",
                "; ".join(filter(None, ("routing + specialist", _times_noise(_moved(record, verdict), verdict)))),
            ),
            ("Coverage", " → ".join(show_interval(value) for value in verdict.coverage.values()), "by known policies"),
        ],
        "changed": [
            ("Selector", _word(verdict.changed.selector, "changed", "unchanged"), "which policy is expressed"),
            ("Cue reader", _word(verdict.changed.cue_reader, "changed", "unchanged"), "what a policy does under a cue"),
            ("Skill", _word(verdict.changed.skill, "changed", "unchanged"), "how well it does it"),
            (
                "Silent specialists",
                _word(verdict.dormant_intact, "intact", "not intact"),
                "with each policy put in place",
            ),
            (
                "Text",
                _word(verdict.text_drifted, "drifted", "as before"),
                f"how completions are worded: {show_interval(verdict.text.nats_per_token, 4)} nats per token",
            ),
            (
                "Mechanism",
                DASH
                if verdict.mechanism.verdict is None
                else f"{verdict.mechanism.verdict} "
                f"({_word(verdict.mechanism.agrees, 'agrees', 'disagrees')} with behaviour)",
                "from grafts" if verdict.mechanism.verdict else "not measured for this pair",
            ),
        ],
        "trained_cue": record.trained_cue,
        "cues": [(cue, cue == record.trained_cue) for cue in record.cues],
        "sides": _side_rows(record),
        "questions": record.questions,
        "method": "exact probabilities" if record.samples is None else f"{record.samples} sampled completions a prompt",
        "terms": {
            "bits": _term_rows(_BITS, verdict.bits, [verdict.per_cue[cue].bits for cue in record.cues]),
            "nats": _term_rows(_NATS, verdict.nats, [verdict.per_cue[cue].nats for cue in record.cues]),
        },
        "hinted": _hinted_rows(record),
        "mechanism": evidence.judged(found.name, verdict),
        "controls": [
            *_controls(record, verdict, found.repair),
            *evidence.controls(found.graft, found.probing),
            *units.controls(found.features),
        ],
        "notes": [*verdict.notes, *((*check.misspelled, *check.hints) if check is not None else ())],
        "examples": _examples(verdict),
        "falsify": falsify(verdict),
        "thresholds": [(key, f"{value:g}") for key, value in t.model_dump().items()],
        "provenance": _provenance_rows(verdict.provenance),
    }


def _moved(record: BehaviourRecord, verdict: VerdictRecord) -> Interval:
    """Nothing where the verdict trusts no number."""
    return record.moved if verdict.bits.routing.measured else NOT_MEASURED


def _examples(verdict: VerdictRecord) -> list[tuple[str, str, list[str]]]:
    """(checkpoint, cue, completions as they are)."""
    check = verdict.check
    found = {} if check is None else check.examples
    return [(when, cue, list(texts)) for when, by_cue in found.items() for cue, texts in by_cue.items()]


def _word(state: bool | None, yes: str, no: str) -> str:
    return "cannot say" if state is None else yes if state else no


def _side_rows(record: BehaviourRecord) -> list[_Row]:
    """Weights, forced accuracies and expected accuracy; before and after under every cue."""
    sides = [side for cue in record.cues for side in (record.per_cue[cue].before, record.per_cue[cue].after)]
    policies = list(dict.fromkeys(name for side in sides if side is not None for name in side.weights))
    quantities = [(f"weight of {policy}", f"weights.{policy}") for policy in policies]
    quantities += [(f"accuracy with {policy} put in place", f"accuracy.{policy}") for policy in record.policies]
    quantities += [("expected accuracy", "overall")]
    return [
        _Row(name, tuple(number(_of(side, key)) for side in sides), strong=key == "overall") for name, key in quantities
    ]


def _of(side: CueSide | None, key: str) -> Interval:
    return NOT_MEASURED if side is None else side.intervals.get(key, NOT_MEASURED)


def _term_rows(notes: Mapping[str, str], mean: Bits | Nats, per_cue: Sequence[Bits | Nats | None]) -> list[_Row]:
    return [
        _Row(
            term,
            tuple(number(NOT_MEASURED if terms is None else getattr(terms, term), 4) for terms in (mean, *per_cue)),
            note,
            term == "total",
        )
        for term, note in notes.items()
    ]


def _hinted_rows(record: BehaviourRecord) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(cue, hint, [(policy, `before → after`)])."""
    return [
        (
            cue,
            hint,
            [
                (policy, " → ".join(show(weights.get(policy)) for weights in sides.values()))
                for policy in next(iter(sides.values()), {})
            ],
        )
        for cue, hints in record.hinted.items()
        for hint, sides in hints.items()
    ]


def _noise(verdict: VerdictRecord) -> float | None:
    """What noise of the size of R's change moves, in bits."""
    noise = verdict.controls.pair.noise
    if noise is None or noise.routing.value is None or noise.specialist.value is None:
        return None
    return noise.routing.value + noise.specialist.value


def _times_noise(moved: Interval, verdict: VerdictRecord) -> str:
    """How many times what noise moves, in words, of what is a change; nothing where noise moves nothing."""
    noise = _noise(verdict)
    if moved.value is None or not noise or moved.below(verdict.thresholds.bits):
        return ""
    times = moved.value / noise
    return f"{times:,.{0 if times >= 10 else 1}f} times that of noise"


def _against_noise(record: BehaviourRecord, verdict: VerdictRecord) -> Control:
    moved, noise = _moved(record, verdict), _noise(verdict)
    said = (f"{show_interval(moved, 4)} bits; noise: {show(noise, 4)}", _times_noise(moved, verdict))
    return Control(
        "Noise",
        "As much change in every tensor, but in no direction in particular, must move routing + specialist less than R "
        "surely does.",
        "; R's are ".join(filter(None, said)),
        None if noise is None or moved.low is None or verdict.verdict == "neither" else moved.low > noise,
    )


def _controls(record: BehaviourRecord, verdict: VerdictRecord, repair: RepairRecord | None) -> list[Control]:
    pair, t, exact = verdict.controls.pair, verdict.thresholds, record.samples is None
    terms = {name: value for name, value in pair.same_checkpoint if value.measured}
    worst = max(terms, key=lambda name: terms[name].known, default=None)
    shuffled = pair.shuffled_routing_share
    return [
        Control(
            "Same checkpoint",
            "The first checkpoint against itself: every term must be "
            + ("zero." if exact else f"under {t.bits:g} bits, or not surely more."),
            DASH
            if worst is None
            else f"largest term {show_interval(terms[worst], 4)} bits ({worst})"
            if terms[worst].value
            else "all terms 0 bits",
            None if worst is None else all(_nothing(value, exact, t.bits) for value in terms.values()),
        ),
        _against_noise(record, verdict),
        Control(
            "Shuffled labels",
            "Policy labels that have nothing to do with the text carry no routing: the share must stay below "
            f"{t.specialist:g}, where the verdict is “specialist”.",
            show_interval(shuffled),
            None if shuffled.high is None else shuffled.high < t.specialist,
        ),
        Control(
            "Independent sum",
            "KL(after || before) as the mean log-ratio of freshly drawn completions, which knows of no policies, must "
            "agree with the sum of the terms.",
            f"{show_interval(pair.independent_total)} nats, terms sum to {show_interval(verdict.nats.total)}",
            pair.sum_agrees,
        ),
        *([] if verdict.check is None else [_by_samples(verdict.check)]),
        mechanism.random_control(repair),
        Control(
            "Continued training",
            "Training on without a reward for either policy must leave the weights where they are.",
            DASH,
            None,
        ),
    ]


def _nothing(value: Interval, exact: bool, threshold: float) -> bool:
    return value.known < _ROUNDING if exact else not value.above(threshold)


def _by_samples(check: SampleCheck) -> Control:
    worst = next(iter(check.disagreements), None)
    return Control(
        "Check by samples",
        "What was computed from the suite's texts must be what the checkpoints' own completions show.",
        f"{check.completions} completions, no contradiction"
        if worst is None
        else f"{worst.what} under {worst.cue} {worst.checkpoint}: {worst.literal:.2f}, and {worst.sampled:.2f} seen",
        check.agrees,
    )


def falsify(verdict: VerdictRecord) -> list[str]:
    """What would have to be seen for the verdict to be wrong, with the numbers that were seen."""
    t, share = verdict.thresholds, show_interval(verdict.routing_share)
    by_word = {
        "routing": [
            f"A routing share below {t.routing:g}; it is {share}.",
            f"A policy that, put in place, does something else than before (by more than {t.cell:g}): then specialists "
            "changed too, even silent ones.",
            "Expected accuracy that stays where it is when the old weights are put back: then the loss is not in the "
            "routing.",
        ],
        "specialist": [
            f"A routing share above {t.specialist:g}; it is {share}.",
            "A policy table in which every cell stayed where it was: then no specialist changed.",
            "Expected accuracy that follows the policy weights at the old forced accuracies: then routing did it.",
        ],
        "both": [
            f"A routing share of {t.routing:g} or more, or of {t.specialist:g} or less; it is {share}.",
            "An accuracy split in which the selector or the specialists have nothing.",
        ],
        "neither": [
            f"More than {t.bits:g} bits of routing + specialist on these or on other prompts.",
            "A change outside the suite: what no prompt asks for, no term sees.",
        ],
        "inconclusive": [
            "Nothing yet: the suite cannot say. More questions, more samples or rules that cover more could."
        ],
    }
    return [
        *by_word[verdict.verdict],
        f"Known policies that cover less than {t.coverage:g} of the completions, or labels that miss what completions "
        "really do: every term stands on them.",
        "A control above that does not hold.",
    ]


def _provenance_rows(provenance: Provenance) -> list[tuple[str, str]]:
    fields = provenance.model_dump(exclude={"versions"})
    rows = [(key, DASH if value is None else str(value)) for key, value in fields.items()]
    return [*rows, *(provenance.versions.items())]
