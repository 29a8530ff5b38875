"""Prompts, announcements, answers and behaviours of a suite as token ids, ready for models of one tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mixturelens.behaviour.likelihood import END
from mixturelens.suite import PromptRow, Suite, behind, encode_prompts, encode_text, wordings
from mixturelens.types import ERR, InputError


@dataclass(frozen=True)
class Announcement:
    """Text that puts a policy in place, and its token ids."""

    policy: int
    wording: int
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Prompts:
    """Prompts of a suite as token ids, ready for models of one tokenizer."""

    suite: Suite
    rows: tuple[PromptRow, ...]
    contexts: list[list[int]]
    announcements: tuple[Announcement, ...]
    answers: list[list[int]]
    errs: list[list[int]] | None
    behaviours: tuple[tuple[int, tuple[int, ...]], ...]
    """(behaviour, token ids) of every literal text of a behaviour."""
    tokenizer: object

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(prompts, policies with `other`, wordings, behaviours) of the class arrays."""
        suite = self.suite
        most = max(max(1, len(wordings(shown))) for shown in suite.policies.values())
        return len(self.rows), len(suite.policies) + 1, most, max(1, len(suite.behaviour_names))

    def part(self, index: Sequence[int]) -> Prompts:
        """Some of the prompts."""
        return replace(
            self,
            rows=tuple(self.rows[i] for i in index),
            contexts=[self.contexts[i] for i in index],
            answers=[self.answers[i] for i in index],
            errs=self.errs and [self.errs[i] for i in index],
        )


def prepare(suite: Suite, rows: Sequence[PromptRow], tokenizer) -> Prompts:
    """Spell prompts, announcements, answers and behaviours as token ids.

    Raises InputError naming what the tokenizer cannot spell, or what does not fit into `max_new_tokens`.
    """
    announcements, texts = [], []
    for m, (policy, shown) in enumerate(suite.policies.items()):
        for w, text in enumerate(wordings(shown)):
            ids = tuple(encode_text(text, f"policy {policy!r}", tokenizer))
            announcements.append(Announcement(m, w, text, ids))
            texts.append(text)
    behaviours: list[tuple[int, tuple[int, ...]]] = []
    for b, name in enumerate(suite.behaviour_names):
        for text in wordings((suite.behaviours or {}).get(name, ())):
            behaviours.append((b, tuple(encode_text(behind(text, texts), f"behaviour {name!r}", tokenizer))))
    prompts = Prompts(
        suite=suite,
        rows=tuple(rows),
        contexts=encode_prompts(suite, rows, tokenizer),
        announcements=tuple(announcements),
        answers=[encode_text(behind(row.answer, texts), f"the answer of prompt {row.id!r}", tokenizer) for row in rows]
        if suite.answer_match == "exact"
        else [[] for _ in rows],
        errs=None
        if ERR not in suite.behaviour_names or ERR in (suite.behaviours or {})
        else [encode_text(behind(row.err or "", texts), f"the err of prompt {row.id!r}", tokenizer) for row in rows],
        behaviours=tuple(behaviours),
        tokenizer=tokenizer,
    )
    if suite.literal:
        longest = max((len(a.ids) for a in announcements), default=0)
        for row, answer in zip(rows, prompts.answers, strict=True):
            if longest + len(answer) > suite.max_new_tokens:
                raise InputError(
                    f"max_new_tokens: {suite.max_new_tokens} cannot hold announcement and answer of prompt {row.id!r} "
                    f"({longest + len(answer)} tokens); raise it"
                )
    for announcement in announcements:
        if len(announcement.ids) >= suite.max_new_tokens:
            raise InputError(
                f"max_new_tokens: {suite.max_new_tokens} leaves no room behind {announcement.text!r} "
                f"({len(announcement.ids)} tokens); raise it"
            )
    return prompts


def ended(prompts: Prompts, tokens: Sequence[int], used: int) -> list[int]:
    """Tokens and the end token, where there is still room for one."""
    return [*tokens, END] if used + len(tokens) < prompts.suite.max_new_tokens else list(tokens)


def behind_announcements(prompts: Prompts) -> list[list[int]]:
    return [[*context, *a.ids] for context in prompts.contexts for a in prompts.announcements]


def owners(prompts: Prompts) -> tuple[np.ndarray, np.ndarray]:
    """(policy, wording) of every announcement."""
    return np.array([a.policy for a in prompts.announcements]), np.array([a.wording for a in prompts.announcements])
