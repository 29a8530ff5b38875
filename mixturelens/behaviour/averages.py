"""From terms of every prompt to the numbers of a record: averaged over questions and cues, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import numpy as np

from mixturelens.behaviour.arrays import Behaviour, BitTerms, Change
from mixturelens.behaviour.bits import never_drawn
from mixturelens.behaviour.grid import Grid
from mixturelens.behaviour.prompts import Prompts
from mixturelens.behaviour.record import AccuracyChange, Bits, CueSide, Nats, TableCell, Text
from mixturelens.behaviour.split import accuracy_split
from mixturelens.behaviour.unannounced import Explained
from mixturelens.stats import PROPORTION, interval, map_draws, mean_interval
from mixturelens.suite import Suite
from mixturelens.types import NOT_MEASURED, OTHER, Interval


def coverage(behaviour: Behaviour, grid: Grid) -> Interval:
    """Weight of the known policies under the cue where it is least."""
    return interval(grid.draws(1 - behaviour.weights[:, -1]).min(-1), grid.counts)


def cue_sides(behaviour: Behaviour, suite: Suite, grid: Grid) -> list[CueSide]:
    """What a checkpoint does under each cue: weights, forced and expected accuracy, with intervals."""
    names = (*suite.policies, OTHER)
    weights, forced = grid.draws(behaviour.weights), grid.draws(behaviour.forced_accuracy)
    overall = grid.draws(behaviour.correct.sum(-1))
    sides = []
    for c in range(len(suite.cues)):
        w = {name: interval(weights[:, c, m], grid.counts, bounds=PROPORTION) for m, name in enumerate(names)}
        a = {name: interval(forced[:, c, m], grid.counts, bounds=PROPORTION) for m, name in enumerate(suite.policies)}
        whole = interval(overall[:, c], grid.counts, bounds=PROPORTION)
        sides.append(
            CueSide(
                weights={name: value.known for name, value in w.items()},
                accuracy={name: value.value for name, value in a.items()},
                overall=whole.known,
                intervals={
                    **{f"weights.{name}": value for name, value in w.items()},
                    **{f"accuracy.{name}": value for name, value in a.items()},
                    "overall": whole,
                },
            )
        )
    return sides


def bits_of(
    found: BitTerms, grid: Grid, suite: Suite, explained: Explained | None
) -> tuple[Bits, list[Bits], dict[str, Interval]]:
    """The terms in bits, averaged over cues and per cue, with intervals over questions, and the record's shares."""
    routing, conditioning, specialist, dormant = (
        grid.draws(getattr(found, name)) for name in ("routing", "conditioning", "specialist", "dormant")
    )
    if explained:
        # no prompt alone tells policies apart: so far, conditioning is what tells behaviours
        skill = specialist - conditioning
        routing, conditioning = explained.bits
        specialist, dormant = conditioning + skill, np.full_like(skill, np.nan)
    drawn = {"routing": routing, "specialist": specialist, "conditioning": conditioning, "dormant": dormant}
    # averaged first and bounded then: what chance puts under one cue it takes from another
    terms, means = (
        _bounded(each, bool(suite.behaviour_names))
        for each in (drawn, {name: values.mean(-1) for name, values in drawn.items()})
    )
    routing, specialist, conditioning = means["routing"], means["specialist"], means["conditioning"]
    moved = interval(routing + specialist, grid.counts)
    shares = {
        "routing_share": map_draws(lambda r, s: r / (r + s), routing, specialist, counts=grid.counts),
        "router_share": map_draws(
            lambda r, s, c: (r + c) / (r + s), routing, specialist, conditioning, counts=grid.counts
        ),
    }
    asked = (grid.index >= 0).sum(0)  # prompts under each cue

    def unseen(prompts: int) -> float:
        return 0.0 if suite.literal else never_drawn(suite.samples * max(1, prompts))

    def bits(values: Mapping[str, np.ndarray], prompts: int) -> Bits:
        there = {name: interval(each, grid.counts) for name, each in values.items()}
        return Bits(**{name: _more(each, unseen(prompts)).within(0.0, 1.0) for name, each in there.items()})

    per_cue = [bits({name: values[:, c] for name, values in terms.items()}, int(asked[c])) for c in range(len(asked))]
    every = unseen(int(asked.sum()))
    shares = {name: _less_sure(share, every, moved).within(0.0, 1.0) for name, share in shares.items()}
    return bits(means, int(asked.sum())), per_cue, {"moved": _more(moved, every).within(0.0, 2.0), **shares}


def _more(of: Interval, unseen: float) -> Interval:
    """With room for what was never drawn: without any spread between questions, an interval has none."""
    if of.value is None or of.high is None:
        return of
    return of.model_copy(update={"high": max(of.high, of.value + unseen)})


def _less_sure(share: Interval, unseen: float, moved: Interval) -> Interval:
    """The same for a share of what moved: `unseen` may be missing from either side of it."""
    if share.value is None or share.low is None or share.high is None or not moved.value or moved.value <= 0:
        return share
    part, whole = share.value * moved.value, moved.value + unseen
    return share.model_copy(
        update={"low": min(share.low, part / whole), "high": max(share.high, (part + unseen) / whole)}
    )


def _bounded(found: Mapping[str, np.ndarray], told: bool) -> dict[str, np.ndarray]:
    """All terms, within what there can be, from which estimates from samples may lie a little away.

    Not `told` which behaviour is which: the specialist's term can only be measured, not told apart.
    """
    routing, specialist, dormant = (found[name].clip(0.0, 1.0) for name in ("routing", "specialist", "dormant"))
    conditioning = found["conditioning"].clip(0.0, specialist) if told else np.full_like(specialist, np.nan)
    return {
        "routing": routing,
        "specialist": specialist,
        "conditioning": conditioning,
        "skill": specialist - conditioning,
        "dormant": dormant,
    }


def nats_of(change: Change, grid: Grid, suite: Suite, explained: Explained | None) -> tuple[Nats, list[Nats], Text]:
    """The terms in nats, averaged over cues and per cue, with intervals over questions, and those of text per token."""
    terms = {field.name: grid.draws(getattr(change.nats, field.name)) for field in fields(change.nats)}
    length = terms.pop("length")
    if explained:
        # no prompt alone tells policies apart: so far, conditioning is all of KL(behaviours)
        terms["other"] = terms["conditioning"] - explained.nats[0] - explained.nats[1]
        terms["total"] = terms["conditioning"] + terms["skill"] + terms["text"]
        terms["routing"], terms["conditioning"] = explained.nats
        terms["wording"] = np.full_like(length, np.nan)
    else:
        terms["total"] = sum(terms.values(), np.zeros_like(length))
    terms["specialist"] = terms["conditioning"] + terms["skill"]
    if not suite.behaviour_names:
        terms["conditioning"] = terms["skill"] = np.full_like(length, np.nan)
    means = {name: values.mean(-1) for name, values in terms.items()}
    # text, and what it is part of, may have been asked of some questions alone
    some = grid.counts_where(change.nats.text)
    counts = {name: some if name in ("text", "other", "total") else grid.counts for name in terms}
    per_cue = [
        Nats(**{name: interval(values[:, c], counts[name]) for name, values in terms.items()})
        for c in range(grid.index.shape[1])
    ]
    per_token = map_draws(lambda text, tokens: text / tokens, means["text"], length.mean(-1), counts=some)
    whole = Nats(**{name: interval(values, counts[name]) for name, values in means.items()})
    return whole, per_cue, Text(nats_per_token=per_token)


def accuracy_changes(change: Change, grid: Grid, *, told: bool) -> list[AccuracyChange]:
    """The split of the change of expected accuracy under each cue.

    It is taken prompt by prompt where each policy's accuracy is known on each prompt, and from the means under a cue
    where behaviour was sampled. Unless `told` which policy did what, there is the total alone.
    """
    pairs = [(b.weights, b.correct) for b in (change.before, change.after)]
    with np.errstate(divide="ignore", invalid="ignore"):
        if change.method == "sampled":
            (w_s, j_s), (w_r, j_r) = [(grid.draws(w), grid.draws(j)) for w, j in pairs]
            selector, specialists = accuracy_split(w_s, j_s / w_s, w_r, j_r / w_r)
        else:
            (w_s, j_s), (w_r, j_r) = pairs
            split = accuracy_split(w_s, j_s / w_s, w_r, j_r / w_r)
            selector, specialists = (grid.draws(values) for values in split)
    return [
        AccuracyChange(
            selector=interval(selector[:, c], grid.counts) if told else NOT_MEASURED,
            specialists=interval(specialists[:, c], grid.counts) if told else NOT_MEASURED,
            total=interval(selector[:, c] + specialists[:, c], grid.counts),
        )
        for c in range(grid.index.shape[1])
    ]


def policy_table(before: Behaviour, after: Behaviour | None, prompts: Prompts, grid: Grid) -> tuple[TableCell, ...]:
    """The cells of the policy table: what happens with a policy put in place under a cue, and what changed there."""
    suite = prompts.suite
    names = suite.behaviour_names
    cells = []
    for c, cue in enumerate(suite.cues):
        at = grid.index[:, c]
        known = at >= 0
        counts = grid.counts[:, known]
        rows = at[known]
        for a in prompts.announcements:
            cell = rows, a.policy, a.wording
            shown = [b.forced_behaviour[cell] for b in (before, after) if b is not None]
            right = [b.forced_correct[cell] for b in (before, after) if b is not None]
            means = [{name: float(np.nanmean(s[:, b])) for b, name in enumerate(names)} for s in shown]
            usual = max(means[0], key=lambda name: means[0][name]) if names else None
            changes = {}
            if after is not None:
                changes["accuracy_change"] = mean_interval(right[1] - right[0], counts)
                if usual is not None:
                    b = names.index(usual)
                    changes["behaviour_change"] = mean_interval(shown[1][:, b] - shown[0][:, b], counts)
            cells.append(
                TableCell(
                    cue=cue,
                    policy=list(suite.policies)[a.policy],
                    announcement=a.text,
                    behaviour=usual,
                    shown_before=means[0],
                    shown_after=means[1] if after is not None else None,
                    accuracy_before=float(np.nanmean(right[0])),
                    accuracy_after=float(np.nanmean(right[1])) if after is not None else None,
                    **changes,
                )
            )
    return tuple(cells)
