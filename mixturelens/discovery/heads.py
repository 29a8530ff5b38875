"""Completions as words that any prompt may have and a slot for those of its own, and what stands before that slot.

An announcement is told from what follows it by where answers begin: a *head* is a beginning of completions behind
which, at some prompts, words of the prompt's own follow. `Okay,` is one, where `Okay, lamp.` and `Okay, I would rather
not say.` are both written; `sure we can` is one, and `sure we` is not.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

SLOT = "\N{WHITE BULLET}"
"""Stands for words of the prompt's own: its answer, what it asks about, what is written seldom."""
END, CUT = "$", "\N{HORIZONTAL ELLIPSIS}"
"""A completion ended; or it was cut off."""
OF_ALL = 0.8
"""A word that so many of the prompts have says nothing about any of them."""
ECHO = 5.0
"""A word of a prompt is its own where it is written so many times as often as at prompts without it."""
SELDOM = 0.03
"""A word that is written at fewer of the questions, or at fewer than three, is one of theirs."""
LONGEST = 16
"""Words of a head, at most: what makes a difference only later is no announcement."""
BRANCH = 0.02
"""Share of the completions that go through a beginning, of which one is a branch."""
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
"""What stands between spaces; a character, where words need no space."""
_EDGES = ".,;:!?\"'\u201c\u201d\u2018\u2019`*"

Words = tuple[str, ...]


@dataclass(frozen=True)
class Completion:
    """One completion that a checkpoint wrote: which prompt's, whose, and whether it came to its end."""

    prompt: int
    after: bool
    text: str
    ended: bool = True


@dataclass(frozen=True)
class Headed:
    """A completion, parted: what it begins with, and what follows first, a slot or a common wording."""

    head: Words | None
    """None: no head is the beginning of it."""
    follows: str
    rest: str
    """All of the text behind the head."""


def words(text: str) -> list[str]:
    """Cut a text into words at its spaces; a character of a script without spaces is a word of its own.

    >>> words("Okay, lamp.")
    ['Okay,', 'lamp.']
    """
    return _WORD.findall(text)


def core(word: str) -> str:
    """A word in small letters, without punctuation at its edges; brackets stay, so that `[a]` is a word of its own."""
    return word.strip(_EDGES).lower()


def slotted(drawn: Sequence[Completion], prompts: Sequence[str], answers: Sequence[str | None]) -> list[Words]:
    """The words of each completion, where words of the prompt's own become one SLOT and repeated words one.

    `prompts` are texts, and `answers` the answer to each, where known. END or CUT stands last.
    """
    asked = [{core(word) for word in words(text)} for text in prompts]
    everywhere = {word for word, n in Counter(w for some in asked for w in some).items() if n >= OF_ALL * len(asked)}
    answered = {core(word) for answer in answers for word in words(answer or "")}
    spread: dict[str, set[int]] = defaultdict(set)
    written_at: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for each in drawn:
        for word in {core(word) for word in words(each.text)}:
            spread[word].add(each.prompt)
            written_at[word][word in asked[each.prompt]] += 1
    times = Counter(each.prompt for each in drawn)
    having = Counter(dict.fromkeys(written_at, 0))
    for i, some in enumerate(asked):
        having.update(dict.fromkeys(some & written_at.keys(), times[i]))
    echoed = {
        word
        for word, (without, within) in written_at.items()
        if within * (len(drawn) - having[word]) >= ECHO * without * having[word]
    }
    own = [(some - everywhere - {""}) & echoed for some in asked]
    least = max(3, SELDOM * len({each.prompt for each in drawn}))
    seldom = {word for word, at in spread.items() if len(at) < least}
    found = []
    for each in drawn:
        path: list[str] = []
        for word in words(each.text):
            bare = core(word)
            unit = SLOT if bare in own[each.prompt] or bare in answered or bare in seldom else word
            if not path or path[-1] != unit:
                path.append(unit)
        found.append((*path, END if each.ended else CUT))
    return found


def opened(paths: Sequence[Words], prompts: Sequence[int]) -> set[Words]:
    """Heads behind which prompts answer: beginnings that enough completions have, with a SLOT next at three prompts at
    least.

    `paths` are completions as `slotted` gives them, and `prompts` the prompt of each.
    """
    through: Counter[Words] = Counter()
    answered: dict[Words, list[int]] = defaultdict(list)
    for path, prompt in zip(paths, prompts, strict=True):
        for i in range(min(len(path), LONGEST + 1)):
            through[path[:i]] += 1
            if path[i] == SLOT:
                answered[path[:i]].append(prompt)
                break
    return {
        head
        for head, at in answered.items()
        if len(set(at)) >= 3 and len(at) >= BRANCH * through[head] and through[head] >= BRANCH * len(paths)
    }


def closed(paths: Sequence[Words], known: Collection[Words]) -> set[Words]:
    """Heads of completions that have none of the `known` ones: the longest beginnings that enough completions share."""
    without = [path for path in paths if not any(path[:size] in known for size in range(_before(path) + 1))]
    through = Counter(path[:size] for path in without for size in range(1, _before(path) + 1))
    often = {beginning for beginning, times in through.items() if times >= BRANCH * len(paths)}
    longest = (
        next((path[:size] for size in range(_before(path), 0, -1) if path[:size] in often), ()) for path in without
    )
    return set(longest) - {()}


def _before(path: Words) -> int:
    """Words that stand before the slot, or the end, or as many as a head may have."""
    return min(LONGEST, path.index(SLOT) if SLOT in path else len(path) - 1)


def headed(drawn: Completion, path: Words, known: Collection[Words]) -> Headed:
    """Part a completion at the longest of the known heads that it begins with; `path` are its words by `slotted`."""
    for size in range(_before(path), -1, -1):
        if path[:size] in known:
            rest = _behind(drawn.text, path[:size])
            return Headed(path[:size], path[size], rest)
    return Headed(None, path[0], drawn.text)


def _behind(text: str, head: Words) -> str:
    """What follows a head in the text, in which its words may be repeated."""
    at = 0
    for word in head:
        while (found := _WORD.match(text, _skip(text, at))) and found.group() == word:
            at = found.end()
    return text[at:].strip()


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def written(text: str, head: Words) -> str:
    """The head as the completion writes it, with its spaces and repeated words."""
    rest = _behind(text, head)
    return text[: len(text) - len(rest)].strip() if rest else text.strip()
