"""Candidate policies: beginnings of completions that make a difference to what follows, or that R selects among.

Wordings that make none between them are one policy. Everything is asked at each prompt alone, so that no cue needs to
be known: do two beginnings, at the same prompt, differ in what follows them, or in which checkpoint writes them?
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from mixturelens.discovery.heads import (
    CUT,
    END,
    SLOT,
    Completion,
    Headed,
    Words,
    closed,
    headed,
    opened,
    slotted,
    written,
)
from mixturelens.discovery.information import ALPHA, Told, told
from mixturelens.types import ANSWER, OTHER

LEAST = 0.02
"""Share of the completions of S or R that a wording, a policy or a behaviour has, to be one."""
APART = 0.05
"""Bits by which two wordings differ that are not of one policy."""
COMMON = 0.98
"""A word goes on to another that follows it so often."""
REFUSAL = re.compile(
    r"(?i)\b(sorry|cannot|can.?t|won.?t|unable|rather not|not able|refuse|decline|apolog\w+|as an ai)\b"
)


@dataclass(frozen=True)
class Parted:
    """Completions with what was found about each; labels are indices into `policies` and `behaviours`, -1 is none."""

    drawn: tuple[Completion, ...]
    heads: frozenset[Words]
    common: Mapping[str, str]
    """First word behind a head -> the wording that it begins."""
    policies: tuple[tuple[Words, ...], ...]
    """Of each policy, the heads that are its wordings."""
    behaviours: tuple[str, ...]
    """Wordings of behaviours; the last is the answer, whatever it says."""
    policy: np.ndarray
    behaviour: np.ndarray
    right: np.ndarray
    rests: tuple[str, ...]
    names: tuple[str, ...]
    wordings: tuple[tuple[str, ...], ...]
    """Of each policy: what its completions begin with, as they spell it, most usual first."""
    anywhere: bool = False
    """`wordings` are texts that stand anywhere in completions, and not at their beginning."""

    def only(self, which: np.ndarray) -> Parted:
        """Some of the completions, by a mask."""
        kept = np.flatnonzero(which).tolist()
        return replace(
            self,
            drawn=tuple(self.drawn[i] for i in kept),
            policy=self.policy[kept],
            behaviour=self.behaviour[kept],
            right=self.right[kept],
            rests=tuple(self.rests[i] for i in kept),
        )

    @property
    def prompt(self) -> np.ndarray:
        """The number of the prompt of each completion."""
        return np.array([each.prompt for each in self.drawn])

    @property
    def after(self) -> np.ndarray:
        """Whether each completion is R's."""
        return np.array([each.after for each in self.drawn])

    @property
    def does(self) -> np.ndarray:
        """Policy, behaviour and whether it is right, as one number for each completion."""
        return (self.policy + 1) * 1000 + self.behaviour * 2 + self.right

    def weight(self, policy: int, after: bool) -> float:
        """Share of R's completions, or of S's unless `after`, that follow a policy; -1 stands for no known policy."""
        return float((self.policy[self.after == after] == policy).mean())


class Questions(NamedTuple):
    """What completions are asked: the text of each prompt, its answer where that is known, and what is right."""

    prompts: Sequence[str]
    answers: Sequence[str | None]
    correct: Callable[[int, str], bool]
    """(prompt, what follows the announcement) -> whether it is right."""


def part(drawn: Sequence[Completion], asked: Questions, seed: int, like: Parted | None = None) -> Parted:
    """Find the heads of completions, what follows them, and which heads are one policy.

    With `like`, nothing is looked for: completions are labelled by what was found in others.
    """
    paths = slotted(drawn, asked.prompts, asked.answers)
    heads = _with_closed(drawn, paths, seed) if like is None else like.heads
    found = [headed(each, path, heads) for each, path in zip(drawn, paths, strict=True)]
    common = _wordings(found) if like is None else like.common
    found = [Headed(each.head, common.get(each.follows, each.follows), each.rest) for each in found]
    behaviours = (*_behaviours(found), ANSWER) if like is None else like.behaviours
    last = len(behaviours) - 1
    place = {text: i for i, text in enumerate(behaviours)}
    behaviour = np.array([place.get(each.follows, last) for each in found])
    right = np.array(
        [
            int(b == last and asked.correct(each.prompt, one.rest))
            for each, one, b in zip(drawn, found, behaviour, strict=True)
        ]
    )
    policies = _merged(drawn, found, behaviour * 2 + right, seed) if like is None else like.policies
    of = {head: m for m, wordings in enumerate(policies) for head in wordings}
    policy = np.array([-1 if each.head is None else of.get(each.head, -1) for each in found])
    begun = tuple(_spelled(drawn, policy == m, found) for m in range(len(policies))) if like is None else like.wordings
    return Parted(
        drawn=tuple(drawn),
        heads=frozenset(heads),
        common=common,
        policies=policies,
        behaviours=behaviours,
        policy=policy,
        behaviour=behaviour,
        right=right,
        rests=tuple(each.rest for each in found),
        names=policy_names(begun) if like is None else like.names,
        wordings=begun,
    )


def _with_closed(drawn: Sequence[Completion], paths: Sequence[Words], seed: int) -> set[Words]:
    """Heads, and beginnings behind which no slot ever follows: a policy that never answers has only these.

    `I can't say.` and the head `I can't but` are one, `I can't`, if no checkpoint prefers one to the other.
    """
    heads = opened(paths, [each.prompt for each in drawn])
    shut = closed(paths, heads)
    prompt = np.array([each.prompt for each in drawn])
    side = np.array([each.after for each in drawn], dtype=int)

    def begin(head: Words) -> np.ndarray:
        return np.array([path[: len(head)] == head for path in paths])

    def alike(one: Words, other: Words) -> bool:
        left, right = begin(one), begin(other)
        test = told(left[left | right].astype(int), side[left | right], prompt[left | right], seed)
        return test.p > ALPHA or test.bits < APART

    for head in sorted(shut, key=len, reverse=True):
        for size in range(len(head) - 1, 0, -1):
            others = [other for other in (heads | shut) - {head} if other[:size] == head[:size]]
            if others:
                if all(alike(head, other) for other in others):
                    heads, shut = (heads - set(others)) | {head[:size]}, shut - {head, *others}
                break
    return heads | shut


def _often(items: Sequence[object], after: Sequence[bool]) -> set[object]:
    """What makes up a share of what S writes, or R."""
    kept: set[object] = set()
    for side in (False, True):
        some = Counter(item for item, of in zip(items, after, strict=True) if of == side)
        total = max(1, sum(some.values()))
        kept |= {item for item, n in some.items() if n >= LEAST * total}
    return kept


def _wordings(found: Sequence[Headed]) -> dict[str, str]:
    """First word of what follows a head -> the words that always follow it, as far as they do."""
    behind: dict[str, list[list[str]]] = {}
    for each in found:
        if each.follows not in (SLOT, END, CUT):
            behind.setdefault(each.follows, []).append(each.rest.split())
    glued = {}
    for first, rests in behind.items():
        text = [first]
        while True:
            size = len(text)
            following = Counter(rest[size] for rest in rests if rest[:size] == text and len(rest) > size)
            word, times = following.most_common(1)[0] if following else ("", 0)
            if times < COMMON * len(rests) or word == text[-1]:
                break
            text.append(word)
        glued[first] = " ".join(text)
    return glued


def _behaviours(found: Sequence[Headed]) -> tuple[str, ...]:
    """What follows a head often, and is no prompt's own."""
    follows = Counter(each.follows for each in found if each.head is not None)
    total = max(1, sum(follows.values()))
    return tuple(text for text, n in follows.most_common() if n >= LEAST * total and text not in (SLOT, END, CUT))


def _merged(
    drawn: Sequence[Completion], found: Sequence[Headed], follows: np.ndarray, seed: int
) -> tuple[tuple[Words, ...], ...]:
    """Heads as policies: those of which nothing tells them apart are one, the most alike first."""
    after = [each.after for each in drawn]
    often = _often([each.head for each in found], after)
    kept = sorted((head for head in often if isinstance(head, tuple)), key=lambda head: (len(head), head))
    prompt, side = np.array([each.prompt for each in drawn]), np.array(after, dtype=int)
    at = {head: np.array([each.head == head for each in found]) for head in kept}

    def apart(left: tuple[Words, ...], right: tuple[Words, ...]) -> Told:
        first, second = (np.stack([at[head] for head in each]).max(0) for each in (left, right))
        both = np.maximum(first, second)
        label = np.asarray(first)[both].astype(int)
        tests = [told(label, what[both], prompt[both], seed) for what in (follows, side)]
        return max(tests, key=lambda test: test.bits if test.p <= ALPHA else 0.0)

    groups: list[tuple[Words, ...]] = [(head,) for head in kept]
    known: dict[tuple[tuple[Words, ...], tuple[Words, ...]], Told] = {}
    while len(groups) > 1:
        pairs = list(itertools.combinations(groups, 2))
        for pair in pairs:
            if pair not in known:
                known[pair] = apart(*pair)
        same = [pair for pair in pairs if known[pair].p > ALPHA or known[pair].bits < APART]
        if not same:
            break
        left, right = min(same, key=lambda pair: known[pair].bits)
        groups = [group for group in groups if group not in (left, right)] + [(*left, *right)]
    return tuple(sorted(groups, key=lambda group: -sum(int(at[head].sum()) for head in group)))


def changed(parted: Parted, seed: int) -> Told:
    """Bits that what a completion does tells of whose it is, R's or S's, given its prompt, beyond shuffled sides."""
    return told(parted.does, parted.after.astype(int), parted.prompt, seed)


def _spelled(drawn: Sequence[Completion], which: np.ndarray, found: Sequence[Headed]) -> tuple[str, ...]:
    """What some completions begin with, as they spell it, most usual first."""
    texts = Counter(
        written(drawn[i].text, head) for i in np.flatnonzero(which).tolist() if (head := found[i].head) is not None
    )
    return tuple(text for text, _ in texts.most_common())


def policy_names(wordings: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """A short name for each policy, from its most usual wording."""
    found: list[str] = []
    for texts in wordings:
        name = slug(texts[0] if texts else "") or "plain"
        name = f"{name}-said" if name == OTHER else name
        while name in found:
            name += "-2"
        found.append(name)
    return tuple(found)


def slug(text: str) -> str:
    """A text as a name: small letters, digits and dashes.

    >>> slug("I'd rather not say.")
    'i-d-rather-not-say'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:24].strip("-")
