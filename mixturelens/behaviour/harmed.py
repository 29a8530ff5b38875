"""What RL harmed, and by which policy: where patching and repair have to look."""

from __future__ import annotations

from mixturelens.behaviour.record import BehaviourRecord
from mixturelens.types import Frozen, InputError, Interval

HALF = 0.5
"""Forced accuracy from which a policy counts as answering."""


class Harm(Frozen):
    """Which cue RL trained on, which one it harmed, and the policies in question."""

    trained_cue: str
    harmed_cue: str
    """The cue, of those RL did not train on, whose accuracy fell most."""
    change: Interval
    """Of its expected accuracy."""
    policy: str
    """Which R follows under the trained cue: of the policies that answer there and not under the harmed one."""
    shows: str | None
    """What that policy shows under the harmed cue; null where the suite names no behaviours."""
    other: str
    """What else S followed under the trained cue, most often."""

    @property
    def cues(self) -> tuple[str, str]:
        """The trained cue and the harmed one: the clean and the corrupt side of cue contrasts."""
        return self.trained_cue, self.harmed_cue


def find_harm(record: BehaviourRecord) -> Harm:
    """Find which cue RL harmed most, and the policies in question, from the behaviour of a pair.

    Raises InputError if the trained cue is not known, if there is but one cue or policy, if policies announce nothing,
    or if no policy answers under the trained cue and does something else under the harmed one: then no cue reader is at
    work.
    """
    _refuse_unannounced(record)
    trained = record.trained_cue
    if trained is None:
        raise InputError("patching and repair need the cue that was trained on: set `trained_cue` or --trained-cue")
    rest = [cue for cue in record.cues if cue != trained]
    if not rest or len(record.policies) < 2:
        raise InputError("patching and repair need prompts under two cues and two policies at least")
    after = {cue: state.after for cue, state in record.per_cue.items() if state.after is not None}
    changes = {cue: state.accuracy_change.total for cue, state in record.per_cue.items() if state.accuracy_change}
    if not after or not changes:
        raise InputError("patching and repair need a checkpoint after: give --after")
    measured = [cue for cue in rest if cue in changes and changes[cue].measured]
    if not measured:
        raise InputError("patching and repair need to know under which cue accuracy was lost, and none was measured")
    harmed = min(measured, key=lambda cue: changes[cue].known)
    right = {
        name: (on, off)
        for name in record.policies
        if (on := after[trained].accuracy[name]) is not None and (off := after[harmed].accuracy[name]) is not None
    }
    candidates = [name for name, (on, off) in right.items() if on >= HALF > off]
    if not candidates:
        seen = "; ".join(
            f"{name}: {on:.2f} under {trained}, {off:.2f} under {harmed}" for name, (on, off) in right.items()
        )
        raise InputError(
            f"no policy, put in place, answers under {trained!r} and not under {harmed!r} (forced accuracy: "
            f"{seen or 'no policy can be put in place'}); there is no cue reader to find"
        )
    policy = max(candidates, key=lambda name: after[trained].weights[name])
    cell = next((c for c in record.table if (c.policy, c.cue) == (policy, harmed)), None)
    before = record.per_cue[trained].before
    other = max((name for name in record.policies if name != policy), key=lambda name: before.weights[name])
    return Harm(
        trained_cue=trained,
        harmed_cue=harmed,
        change=changes[harmed],
        policy=policy,
        shows=cell.behaviour if cell is not None else None,
        other=other,
    )


def gained_and_lost(record: BehaviourRecord) -> tuple[str, str]:
    """The policy that gained most weight from S to R, mean over cues, and the one that lost most.

    Where nothing changed they are the first and the last policy. Raises InputError for fewer than two policies, or
    for a record of one checkpoint, and where policies announce nothing.
    """
    _refuse_unannounced(record)
    if len(record.policies) < 2:
        raise InputError("two policies at least are needed to say which one gained")
    change = dict.fromkeys(record.policies, 0.0)
    for state in record.per_cue.values():
        if state.after is None:
            raise InputError("which policy gained can be said of a pair: give --after")
        for name in change:
            change[name] += state.after.weights[name] - state.before.weights[name]
    gained = max(record.policies, key=lambda name: change[name])
    lost = min((name for name in reversed(record.policies) if name != gained), key=lambda name: change[name])
    return gained, lost


def _refuse_unannounced(record: BehaviourRecord) -> None:
    if record.identified is not None:
        raise InputError(
            "the policies of this suite announce nothing, so none can be put in place: patching, grafts, probes and "
            "repair need announcements (`policies:` as texts or rules)"
        )
