"""Prompts, announcements, answers and behaviours of a suite as token ids, ready for models of one tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mixturelens.behaviour.logits import END
from mixturelens.shown import wordings
from mixturelens.spelling import Ids, Speller, check_spelling, encode_prompts, normalised_row, normalised_suite
from mixturelens.suite import PromptRow, Suite
from mixturelens.types import ERR, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ASIDE = 16
"""Questions, at most, of which is asked what the verdict does not stand on: nats of text, and controls."""


@dataclass(frozen=True)
class Announcement:
    """A text that puts a policy in place: the policy's number, the wording's number within it, and the text."""

    policy: int
    wording: int
    text: str


@dataclass(frozen=True)
class Placed:
    """An announcement behind one prompt, and what may follow it, as token ids.

    Of several spellings of one text none begins another, so that their probabilities add up.
    """

    spellings: tuple[Ids, ...]
    """Ways to write the announcement; the first is that which puts the policy in place."""
    answer: tuple[Ids, ...]
    """Behind that one. Empty where answers are no literal texts."""
    err: tuple[Ids, ...]
    behaviours: tuple[tuple[int, Ids], ...]
    """(behaviour, token ids) of every spelling of every literal text of a behaviour."""

    @property
    def ids(self) -> Ids:
        """The spelling that puts the policy in place."""
        return self.spellings[0]


@dataclass(frozen=True)
class Prompts:
    """Prompts of a suite as token ids, ready for models of one tokenizer."""

    suite: Suite
    rows: tuple[PromptRow, ...]
    contexts: list[list[int]]
    announcements: tuple[Announcement, ...]
    placed: list[tuple[Placed, ...]]
    """Of each prompt, of each announcement."""
    bare: list[tuple[Ids, ...]]
    """Of each prompt: the answer without an announcement."""
    tokenizer: PreTrainedTokenizerBase

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(prompts, policies with `other`, wordings, behaviours) of the class arrays."""
        suite = self.suite
        most = max(max(1, len(wordings(shown))) for shown in suite.policies.values())
        return len(self.rows), len(suite.policies) + 1, most, max(1, len(suite.behaviour_names))

    def part(self, index: Sequence[int]) -> Prompts:
        """Some of the prompts, by number."""
        return replace(
            self,
            rows=tuple(self.rows[i] for i in index),
            contexts=[self.contexts[i] for i in index],
            placed=[self.placed[i] for i in index],
            bare=[self.bare[i] for i in index],
        )

    def of_questions(self, most: int) -> list[int]:
        """Numbers of the prompts of at most `most` questions, under all cues; always the same questions."""
        questions = list(dict.fromkeys(row.id for row in self.rows))
        kept = {questions[i] for i in np.random.default_rng(0).permutation(len(questions))[:most]}
        return [i for i, row in enumerate(self.rows) if row.id in kept]

    def only(self, kept: Sequence[int]) -> Prompts:
        """The same prompts with some of the announcements, by number."""
        return replace(
            self,
            announcements=tuple(self.announcements[k] for k in kept),
            placed=[tuple(placed[k] for k in kept) for placed in self.placed],
        )


def without_answers(prompts: Prompts) -> Prompts:
    """The same prompts, for work that asks only how completions begin, and which behaviour they show."""
    placed = [tuple(replace(each, answer=()) for each in of) for of in prompts.placed]
    return replace(prompts, placed=placed, bare=[() for _ in prompts.bare])


def without_behaviours(prompts: Prompts) -> Prompts:
    """The same prompts, for work that asks only for announcements, and whether answers are right."""
    placed = [tuple(replace(each, err=(), behaviours=()) for each in of) for of in prompts.placed]
    return replace(prompts, placed=placed)


def prepare(suite: Suite, rows: Sequence[PromptRow], tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Spell prompts, announcements, answers and behaviours as token ids, as the suite's `spelling` says.

    Raises InputError naming what the tokenizer cannot spell, or what does not fit into `max_new_tokens`.
    """
    announcements = [
        Announcement(m, w, text)
        for m, shown in enumerate(suite.policies.values())
        for w, text in enumerate(wordings(shown))
    ]
    behaviours = [
        (b, text)
        for b, name in enumerate(suite.behaviour_names)
        for text in wordings((suite.behaviours or {}).get(name, ()))
    ]
    errs = ERR in suite.behaviour_names and ERR not in (suite.behaviours or {})
    contexts = check_texts(suite, rows, tokenizer)
    placed: list[tuple[Placed, ...]] = []
    bare: list[tuple[Ids, ...]] = []
    for row in rows:
        answers = [row.answer] if suite.answer_match == "exact" else []
        speller = Speller(suite, row, tokenizer)
        literals = [*answers, *([row.err or ""] if errs else []), *(text for _, text in behaviours)]
        placed.append(tuple(_placed(speller, a, literals, bool(answers), errs, behaviours) for a in announcements))
        bare.append(speller.bare(row.answer) if answers else ())
    prompts = Prompts(
        suite=normalised_suite(suite, tokenizer),
        rows=tuple(normalised_row(suite, row, tokenizer) for row in rows),
        contexts=contexts,
        announcements=tuple(announcements),
        placed=placed,
        bare=bare,
        tokenizer=tokenizer,
    )
    _check_room(prompts)
    return prompts


def check_texts(suite: Suite, rows: Sequence[PromptRow], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the prompts, once every text of the suite is known to be spelled by the tokenizer.

    Raises InputError naming the text that it cannot spell.
    """
    contexts = encode_prompts(suite, rows, tokenizer)
    for kind, texts in (("policy", suite.policies), ("behaviour", suite.behaviours or {})):
        for name, shown in texts.items():
            for text in wordings(shown):
                check_spelling(text, f"{kind} {name!r}", tokenizer)
    for row in rows:
        if suite.answer_match == "exact":
            check_spelling(row.answer, f"the answer of prompt {row.id!r}", tokenizer)
        if row.err:
            check_spelling(row.err, f"the err of prompt {row.id!r}", tokenizer)
    return contexts


def _placed(
    speller: Speller,
    announcement: Announcement,
    literals: Sequence[str],
    has_answer: bool,
    has_err: bool,
    behaviours: Sequence[tuple[int, str]],
) -> Placed:
    found = speller.announced(announcement.text, literals)
    rests = list(found.rests)
    answer = rests.pop(0) if has_answer else ()
    err = rests.pop(0) if has_err else ()
    shown = tuple((b, ids) for (b, _), spellings in zip(behaviours, rests, strict=True) for ids in spellings)
    return Placed(found.spellings, answer, err, shown)


def _check_room(prompts: Prompts) -> None:
    most = prompts.suite.max_new_tokens
    for row, placed in zip(prompts.rows, prompts.placed, strict=True):
        for announcement, each in zip(prompts.announcements, placed, strict=True):
            answer = max((len(ids) for ids in each.answer), default=0)
            if prompts.suite.literal and len(each.ids) + answer > most:
                raise InputError(
                    f"max_new_tokens: {most} cannot hold announcement and answer of prompt {row.id!r} "
                    f"({len(each.ids) + answer} tokens); raise it"
                )
            if len(each.ids) >= most:
                raise InputError(
                    f"max_new_tokens: {most} leaves no room behind {announcement.text!r} ({len(each.ids)} tokens); "
                    "raise it"
                )


def ended(prompts: Prompts, tokens: Sequence[int], used: int) -> list[int]:
    """The tokens with END behind them, unless `used` tokens and these already fill `max_new_tokens`."""
    return [*tokens, END] if used + len(tokens) < prompts.suite.max_new_tokens else list(tokens)


def behind_announcements(prompts: Prompts) -> list[list[int]]:
    """Token ids of every prompt with every announcement behind it: all those of the first prompt, then of the next."""
    return [
        [*context, *each.ids]
        for context, placed in zip(prompts.contexts, prompts.placed, strict=True)
        for each in placed
    ]


def room_behind(prompts: Prompts) -> list[int]:
    """Tokens that are left of `max_new_tokens` behind each announcement, in the order of `behind_announcements`."""
    return [prompts.suite.max_new_tokens - len(each.ids) for placed in prompts.placed for each in placed]


def owners(prompts: Prompts) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the policy, and of the wording within it, of every announcement."""
    return np.array([a.policy for a in prompts.announcements]), np.array([a.wording for a in prompts.announcements])
