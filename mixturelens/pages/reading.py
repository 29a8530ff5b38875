"""The section about reading: what probes read, and what of it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mixturelens import figures
from mixturelens.figures import DASH, show_interval
from mixturelens.pages.parts import Group, Pictures

if TYPE_CHECKING:
    from mixturelens.probing.record import Checked, ProbingRecord

_READABLE = "the stronger the colour of a cell, the better a probe reads that target there."
_DETAILED = ("cue", "log-odds")
"""Targets shown for every component: what the router reads, and what it decides."""


class ReadingSection(NamedTuple):
    """What can be read in a pair, and what of it is used."""

    name: str
    groups: list[Group]
    missing: tuple[str, ...]


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
        f"What training added to the activations of neutral prompts, beside what a hint for {policy} rather than "
        f"{other} adds in S. Written out: beyond what random halves of prompts differ by, with an interval without 0.",
        read="the stronger the colour, the more training's shift points the way that the hint does.",
        whiskers=False,
    )
    return Group(
        "Do neutral prompts look hinted?",
        "Training can change the choice by making every prompt look, inside, like one with a hint. Then the two "
        "directions agree: a cosine near 1, and a length near the hint's own.",
        "A cosine near 0 at all places would say that training found another way than the hint's.",
        [picture],
    )
