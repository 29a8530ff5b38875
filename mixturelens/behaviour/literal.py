"""Literal suites: policies and behaviours are texts, so that their probabilities are exact by teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from mixturelens.behaviour.arrays import Behaviour, Change, spread
from mixturelens.behaviour.bits import bit_terms
from mixturelens.behaviour.forced import forced_kl
from mixturelens.behaviour.likelihood import Ids, Model, Scorer
from mixturelens.behaviour.prompts import ASIDE, Announcement, Placed, Prompts, behind_announcements, ended
from mixturelens.behaviour.split import nat_terms
from mixturelens.behaviour.unannounced import attributed
from mixturelens.shown import wordings
from mixturelens.spelling import Speller
from mixturelens.types import ERR


def literal_behaviour(scorer: Scorer, model: Model, prompts: Prompts) -> Behaviour:
    """What one checkpoint does on each prompt, exactly, by teacher forcing of the suite's texts; nothing is drawn."""
    return attributed(prompts, _behaviour(scorer, model, _placed(prompts)))


def _placed(prompts: Prompts) -> Prompts:
    """Where policies announce nothing, all completions are measured behind an announcement of no words."""
    if prompts.announcements:
        return prompts
    errs, names = prompts.suite.behaviour_names, prompts.suite.behaviours or {}
    placed = []
    for row, answer in zip(prompts.rows, prompts.bare, strict=True):
        speller = Speller(prompts.suite, row, prompts.tokenizer)
        shown = tuple(
            (b, ids)
            for b, name in enumerate(errs)
            for text in wordings(names.get(name, ()))
            for ids in speller.bare(text)
        )
        err = speller.bare(row.err or "") if ERR in errs and ERR not in names else ()
        placed.append((Placed(((),), answer, err, shown),))
    return replace(prompts, announcements=(Announcement(0, 0, ""),), placed=placed)


def _total(logs: np.ndarray, count: list[int]) -> Float[np.ndarray, " text"]:
    """Probability of each text, from the log-probabilities of its spellings, flat; 0 where it has none."""
    return np.array([np.exp(part).sum() for part in np.split(logs, np.cumsum(count)[:-1])])


def _behaviour(scorer: Scorer, model: Model, prompts: Prompts) -> Behaviour:
    number, policies, most, behaviours = prompts.shape
    announcements = prompts.announcements
    spelled = [[ids for each in placed for ids in each.spellings] for placed in prompts.placed]
    log_spelled, log_other = scorer.literals(model, prompts.contexts, spelled)
    weights = np.stack(
        [
            _total(logs, [len(each.spellings) for each in placed])
            for logs, placed in zip(log_spelled, prompts.placed, strict=True)
        ]
    )
    forced = behind_announcements(prompts)
    places = [each for placed in prompts.placed for each in placed]
    answers = [[ended(prompts, ids, len(each.ids)) for ids in each.answer] for each in places]
    bare = [] if prompts.suite.table else [[ended(prompts, ids, 0) for ids in spelled] for spelled in prompts.bare]
    # in one call, so that answers behind a prompt and behind its announcements share the prompt
    found = _probability(scorer, model, [*forced, *prompts.contexts[: len(bare)]], [*answers, *bare])
    correct = found[: len(answers)].reshape(number, -1)
    correct_other = found[len(answers) :] if bare else np.zeros(number)
    shown = np.ones((number, len(announcements), behaviours))
    if prompts.suite.behaviour_names:
        err = prompts.suite.behaviour_names.index(ERR) if ERR in prompts.suite.behaviour_names else -1
        # an err is a whole completion, other behaviours are how one begins
        literals = [
            [*each.behaviours, *((err, tuple(ended(prompts, ids, len(each.ids)))) for ids in each.err)]
            for each in places
        ]
        logs, log_answer = scorer.literals(model, forced, [[ids for _, ids in group] for group in literals])
        flat = shown.reshape(-1, behaviours)
        flat[:] = 0.0
        for row, (group, each) in enumerate(zip(literals, logs, strict=True)):
            np.add.at(flat[row], [b for b, _ in group], np.exp(each))
        flat[:, -1] = np.exp(log_answer)
    classes = np.zeros((number, policies, most, behaviours))
    forced_behaviour = np.full((number, policies - 1, most, behaviours), np.nan)
    right, forced_right = np.zeros_like(classes), forced_behaviour.copy()
    for k, a in enumerate(announcements):
        place, weight = (slice(None), a.policy, a.wording), weights[:, k]
        forced_behaviour[place], forced_right[place] = shown[:, k], 0.0
        forced_right[*place, -1] = correct[:, k]  # a right answer is an answer
        classes[place] = weight[:, None] * forced_behaviour[place]
        right[place] = weight[:, None] * forced_right[place]
    classes[:, -1, 0, -1] = np.exp(log_other)
    right[:, -1, 0, -1] = correct_other
    return Behaviour(classes, right, forced_behaviour, forced_right)


def _probability(
    scorer: Scorer, model: Model, contexts: Sequence[Ids], spellings: Sequence[Sequence[Ids]]
) -> Float[np.ndarray, " context"]:
    """Probability of any of several continuations of each context."""
    count = [len(group) for group in spellings]
    flat = [context for context, k in zip(contexts, count, strict=True) for _ in range(k)]
    return _total(scorer.sequences(model, flat, [ids for group in spellings for ids in group]), count)


def literal_change(scorer: Scorer, before: Model, after: Model, prompts: Prompts, seed: int) -> Change:
    """What changed from S (`before`) to R (`after`) on each prompt, where policies and behaviours are literal texts.

    Classes and bits are exact. Of the nats, `text` and `other` need completions: these are drawn, with `seed`, on at
    most ASIDE questions, and both terms are NaN on the others.
    """
    prompts = _placed(prompts)
    s, r = (_behaviour(scorer, model, prompts) for model in (before, after))
    aside = prompts.of_questions(ASIDE)
    some = prompts.part(aside)
    policy_kl, length = (
        spread(each, aside, len(prompts.rows)) for each in forced_kl(scorer, before, after, some, seed)
    )
    other = np.zeros(len(prompts.rows))
    if not prompts.suite.table:
        kl = _other_kl(scorer, (before, s.part(aside)), (after, r.part(aside)), some, seed)
        other = r.weights[:, -1] * spread(kl, aside, len(prompts.rows))
    return Change(s, r, bit_terms(s, r), nat_terms(s, r, policy_kl, length, other), method="literal")


def measured_again(scorer: Scorer, model: Model, prompts: Prompts) -> Behaviour:
    """The same as `literal_behaviour`, with the prompts in another order and so in other batches."""
    turned = list(reversed(range(len(prompts.rows))))
    return literal_behaviour(scorer, model, prompts.part(turned)).part(turned)


def _other_kl(
    scorer: Scorer, before: tuple[Model, Behaviour], after: tuple[Model, Behaviour], prompts: Prompts, seed: int
) -> Float[np.ndarray, " prompt"]:
    """KL(y_R || y_S given `other`): one completion of no known policy a prompt, drawn from R."""
    (model_s, s), (model_r, r) = before, after
    literals = [[ids for each in placed for ids in each.spellings] for placed in prompts.placed]
    heads = scorer.escapes(model_r, prompts.contexts, literals, seed + 1)
    log_r, log_s, _ = scorer.compare(model_r, model_s, prompts.contexts, heads)
    open_ended = [i for i, head in enumerate(heads) if head[-1] not in scorer.ends]
    result = (log_r - np.log(r.weights[:, -1])) - (log_s - np.log(s.weights[:, -1]))
    room = [prompts.suite.max_new_tokens - len(heads[i]) for i in open_ended]
    contexts = [[*prompts.contexts[i], *heads[i]] for i in open_ended]
    tails = scorer.sample(model_r, contexts, 1, room, seed + 2)
    some = [i for i, tokens in enumerate(tails.tokens) if tokens]
    if some:
        _, _, kl = scorer.compare(model_r, model_s, [contexts[i] for i in some], [tails.tokens[i] for i in some])
        result[[open_ended[i] for i in some]] += kl
    return result
