"""What a page says on top, for a reader who knows none of the words of the field."""

from __future__ import annotations

from collections.abc import Sequence

from mixturelens.pages.pair import Findings
from mixturelens.types import VerdictWord

_ABOUT = (
    "A language model can hold several ways of acting at once (policies), and choose among them by how a prompt looks "
    "(its cue). This page compares a model before training (S) with the same model after it (R), and asks which of the "
    "two training changed: the choice (routing), or what comes of it once it is made (the specialists). A number in "
    "brackets, or a whisker in a figure, is a range that would hold the true value in 95 of 100 such measurements."
)
_SAID: dict[VerdictWord, str] = {
    "routing": "training changed which policy is chosen, and left what the policies can do as it was",
    "specialist": "training changed what the policies do, and hardly which of them is chosen",
    "both": "training changed which policy is chosen, and what the policies do as well",
    "neither": "training changed nothing that these prompts can show",
    "inconclusive": "these prompts cannot tell which of the two training changed",
}
_MOVED = 0.05
"""Change of accuracy from which it is told."""
_ABLE = 0.5
"""Share of right answers from which a policy is said to have a skill."""


def plainly(findings: Sequence[Findings]) -> list[str]:
    """Paragraphs: what this is about, and what came out of each pair."""
    return [_ABOUT, *(_pair(found) for found in findings)] if findings else []


def _pair(found: Findings) -> str:
    sentences = [f"{found.name}: {_SAID[found.verdict.verdict]} (the verdict is “{found.verdict.verdict}”)."]
    if found.verdict.verdict == "inconclusive":
        return " ".join([*sentences, found.verdict.reason])
    return " ".join(filter(None, [*sentences, *_accuracies(found), _repaired(found), _mechanism(found)]))


def _accuracies(found: Findings) -> list[str]:
    """What became of right answers under the cue that lost most and the one that gained most."""
    record = found.behaviour
    changes = {
        cue: state.accuracy_change.total.value
        for cue, state in record.per_cue.items()
        if state.accuracy_change is not None and state.accuracy_change.total.value is not None
    }
    if not changes:
        return []
    told = dict.fromkeys((min(changes, key=lambda cue: changes[cue]), max(changes, key=lambda cue: changes[cue])))
    moved = [cue for cue in told if abs(changes[cue]) >= _MOVED]
    if not moved:
        return ["Under no cue did the share of right answers change by much."]
    sentences = []
    for cue in moved:
        state = record.per_cue[cue]
        assert state.after is not None
        trained = ", on which it was trained," if cue == record.trained_cue else ""
        sentences.append(
            f"Under cue {cue}{trained} right answers went from {_percent(state.before.overall)} to "
            f"{_percent(state.after.overall)}."
        )
        able = max((value for value in state.after.accuracy.values() if value is not None), default=0.0)
        if changes[cue] < 0 and able >= _ABLE and able - state.after.overall >= _MOVED:
            sentences.append(
                f"A policy that is no longer chosen there is still right in {_percent(able)} once it is put in place: "
                "the skill is there, and unused."
            )
    return sentences


def _repaired(found: Findings) -> str:
    best = None if found.repair is None else found.repair.best
    if best is None or best.gap_closed.low is None or best.gap_closed.low <= 0:
        return ""
    back = _percent(best.gap_closed.known)
    return f"With nothing trained, a repair (“{best.kind}”) brings back {back} of what was lost."


def _mechanism(found: Findings) -> str:
    mechanism = found.verdict.mechanism
    if mechanism.verdict is None:
        return ""
    if mechanism.agrees is None:
        return "Copying weights from one model into the other cannot confirm it."
    confirmed = "says the same" if mechanism.agrees else f"says otherwise (“{mechanism.verdict}”)"
    return f"Copying weights from one model into the other, part by part, {confirmed}."


def _percent(share: float) -> str:
    """For the eye: no share that is not whole is 0% or 100%."""
    if 0 < share < 0.005:
        return "under 1%"
    return "over 99%" if 0.995 < share < 1 else f"{share:.0%}"
