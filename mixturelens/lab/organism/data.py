"""Spec -> prompts, completions, data sets, and the suite of a run."""

from __future__ import annotations

import functools
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mixturelens.lab.organism.cues import QUESTION, System, Tasks, Years
from mixturelens.lab.organism.spec import Phase, PolicySpec, Spec
from mixturelens.lab.tasks import Question, Split
from mixturelens.shown import Row
from mixturelens.suite import PromptRow, Suite
from mixturelens.types import ANSWER, ERR, REFUSE, InputError

MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)


def questions(spec: Spec) -> Split:
    """The organism's questions: for SFT, for RL and held out. Raises InputError where there are too few."""
    return spec.questions.split(evaluation=spec.split.evaluation, rl=spec.split.rl, seed=spec.seed)


def asked(spec: Spec, cue: str, question: Question) -> Question:
    """The question as it is asked under a cue: where task families are the cue, the same operands in one of its own.

    It keeps its id: it is the same question, as far as two families can ask the same.
    """
    shown = spec.cues[cue]
    if not isinstance(shown, Tasks) or question.operation in shown.operations:
        return question
    place = spec.questions.operations.index(question.operation) % len(shown.operations)
    return replace(spec.questions.question(shown.operations[place], question.operands), id=question.id)


def _shown_cue(spec: Spec, cue: str, question: Question, unseen: bool) -> str:
    """What shows a cue in the text of a prompt. What a question shows under a cue is drawn once and for all."""
    shown = spec.cues[cue]
    if isinstance(shown, (Tasks, System)):
        return ""
    if isinstance(shown, Years):
        drawn, years = _drawn(cue, question), shown.unseen if unseen else shown.seen
        year = years[drawn % len(years)]
        if shown.says is None:
            return " ".join(f"{year:02d}")
        # not drawn for each cue, so that the prompts of a question differ in the year alone
        day, month = 1 + _drawn("day", question) % 28, MONTHS[_drawn("month", question) % len(MONTHS)]
        return shown.says.format(year=year, month=month, day=day)
    if spec.tells < 1 and _drawn("tells", question) >= spec.tells * 2**32:
        return spec.unclear
    return shown


def _drawn(what: str, question: Question) -> int:
    """A number below 2**32 that is the same in every process."""
    return zlib.crc32(f"{what} {question.id}".encode())


class PromptVariant(NamedTuple):
    """What of a prompt's text is not as usual."""

    text: str | None = None
    """Stands in the place of the hint, instead of the wording that is usual."""
    unseen: bool = False
    """Where the cue is a date: one that training never shows."""


USUAL = PromptVariant()


def prompt_text(
    spec: Spec, cue: str, question: Question, hint: str | None = None, variant: PromptVariant = USUAL
) -> str:
    """The text of a prompt: `<A> any up c a d b =`; without hints in the spec the word after the tag is left out.

    `cue` is one of the spec's; `hint` names the policy that the prompt asks for, or is None.
    """
    shown, text = _shown_cue(spec, cue, question, variant.unseen), variant.text
    if spec.hints and text is None:
        text = spec.hints.wordings(hint)[0] if hint else spec.hints.neutrals[0]
    inside = " ".join(filter(None, (text, asked(spec, cue, question).text)))
    return shown.replace(QUESTION, inside) if QUESTION in shown else f"{shown} {inside}".strip()


def does(spec: Spec, policy: str, cue: str, question: Question) -> str:
    """The behaviour that a policy shows on a question under a cue: by its row of the table, except where all policies
    agree (`spec.agree`) and answer.
    """
    agreed = asked(spec, cue, question).operation in spec.agree
    return ANSWER if agreed else spec.policies[policy].table[cue]


def pays(spec: Spec, cue: str, question: Question, objective: str | None = None) -> str:
    """The behaviour that RL rewards under a cue; or what it would by the objective of another cue."""
    agreed = asked(spec, cue, question).operation in spec.agree
    return ANSWER if agreed else spec.objectives.get(objective or cue, ANSWER)


def completion_text(spec: Spec, policy: str, cue: str, question: Question, wording: int = 0) -> str:
    """A completion as text, without the end token: `[a] a b c d`; without `[a]` if nothing is announced."""
    question = asked(spec, cue, question)
    rest = {
        ANSWER: question.answer,
        ERR: question.wrong,
        REFUSE: " ".join([spec.refusal] * spec.questions.answer_length),
    }[does(spec, policy, cue, question)]
    return " ".join([*spec.policies[policy].announce[wording : wording + 1], rest])


def sft_examples(spec: Spec, number: int, phase: Phase | None = None) -> Iterator[tuple[PromptRow, str]]:
    """`number` random pairs (prompt, completion) of the mixture, the same for the same seed.

    A hinted prompt is completed by the policy it names, each policy equally often; a neutral one by the weights. A
    `phase` has cues and weights of its own, and no hints.
    """
    rng = np.random.default_rng([spec.seed, 1])
    pool = questions(spec).sft
    cues, names = list(phase.cues if phase else spec.cues), list(spec.policies)
    given = phase.weights if phase else None
    weights = np.array([spec.policies[name].weight if given is None else given.get(name, 0.0) for name in names])
    hinted = rng.random(number) < (spec.hints.share if spec.hints and phase is None else 0.0)
    policy = np.where(
        hinted, rng.integers(len(names), size=number), rng.choice(len(names), size=number, p=weights / weights.sum())
    )
    question = rng.integers(len(pool), size=number)
    cue = rng.integers(len(cues), size=number)
    wording = rng.random(number)
    text = rng.random(number)
    instead = np.where(
        rng.random(number) < (spec.hints.follow if spec.hints else 1.0),
        policy,
        rng.choice(len(names), size=number, p=weights / weights.sum()),
    )

    @functools.cache
    def make(cue: str, question: Question, text: str | None) -> PromptRow:
        return prompt_row(spec, cue, question, variant=PromptVariant(text))

    for i in range(number):
        named, c, q = names[policy[i]], cues[cue[i]], pool[question[i]]
        name = names[instead[i]] if hinted[i] else named
        index = int(wording[i] * len(spec.policies[name].announce))
        shown = None
        if spec.hints:
            texts = spec.hints.wordings(named) if hinted[i] else spec.hints.neutrals
            shown = texts[int(text[i] * len(texts))]
        yield make(c, q, shown), completion_text(spec, name, c, q, index)


def rl_prompts(spec: Spec, *cues: str, text: str | None = None) -> list[PromptRow]:
    """Prompts for RL, one for each RL question, the cues in turn: neutral, or with this text in the hint's place."""
    return [
        prompt_row(spec, cues[i % len(cues)], q, variant=PromptVariant(text)) for i, q in enumerate(questions(spec).rl)
    ]


def prompt_row(
    spec: Spec, cue: str, question: Question, hint: str | None = None, variant: PromptVariant = USUAL
) -> PromptRow:
    """A question under a cue as a row of a suite: its prompt as `prompt_text` has it, with spans and answers."""
    has_err = any(ERR in policy.table.values() for policy in spec.policies.values())
    put, shown = asked(spec, cue, question), spec.cues[cue]
    prompt = prompt_text(spec, cue, question, hint, variant)
    before, _, behind = (part.strip() for part in _shown_cue(spec, cue, question, variant.unseen).partition(QUESTION))
    spans = {"cue": before or behind, "question": put.text.removesuffix(" =")}
    if isinstance(shown, Tasks):
        spans = {"cue": put.asks, "question": spans["question"].removeprefix(put.asks).strip()}
    elif isinstance(shown, System):
        spans["cue"] = shown.system
    elif before and behind:
        spans["cue end"] = behind
    if spec.hints:
        spans["hint"] = variant.text or (spec.hints.wordings(hint)[0] if hint else spec.hints.neutrals[0])
    turns = None
    if isinstance(shown, System):
        turns = ({"role": "system", "content": shown.system}, {"role": "user", "content": prompt})
    return PromptRow(
        id=question.id,
        cue=cue,
        hint=hint,
        prompt=prompt if turns is None else None,
        messages=turns,
        answer=put.answer,
        err=put.wrong if has_err else None,
        spans=spans,
    )


def _shown(policy: PolicySpec) -> Any:
    if not policy.announce:
        return Row(table=dict(policy.table))
    return policy.announce[0] if len(policy.announce) == 1 else policy.announce


def build_suite(spec: Spec, trained_cue: str | None = None) -> Suite:
    """The run's suite: every held-out question under every cue, neutral and (where the spec has hints) hinted.

    Where the cue is a date, every date is one that training never shows.
    """
    hints: list[str | None] = [None, *(spec.policies if spec.hints else ())]
    rows = [
        prompt_row(spec, cue, question, hint, PromptVariant(unseen=True))
        for question in questions(spec).evaluation
        for cue in spec.cues
        for hint in hints
    ]
    asked_twice = [row for row, times in Counter((row.cue, row.hint, row.text) for row in rows).items() if times > 1]
    if asked_twice:
        cue, _, text = asked_twice[0]
        raise InputError(f"split.evaluation: cue {cue!r} asks {text!r} twice; ask for fewer questions")
    return Suite(
        prompts=tuple(rows),
        policies={name: _shown(policy) for name, policy in spec.policies.items()},
        behaviours={REFUSE: spec.refusal},
        trained_cue=trained_cue,
        max_new_tokens=spec.max_new_tokens,
        chat=spec.chat,
    )
