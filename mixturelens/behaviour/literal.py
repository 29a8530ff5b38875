"""Literal suites: policies and behaviours are texts, so that their probabilities are exact by teacher forcing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Float

from mixturelens.behaviour.arrays import Behaviour, Change, dormant
from mixturelens.behaviour.forced import forced_kl
from mixturelens.behaviour.likelihood import Ids, Model, Scorer
from mixturelens.behaviour.prompts import Announcement, Prompts, behind_announcements, ended
from mixturelens.behaviour.split import class_terms
from mixturelens.behaviour.unannounced import attributed
from mixturelens.types import ERR

FORCED_SAMPLES = 4
"""Completions behind each announcement, for what comes after policy and behaviour."""


def literal_behaviour(scorer: Scorer, model: Model, prompts: Prompts) -> Behaviour:
    """Exact probabilities by teacher forcing; nothing is drawn."""
    return attributed(prompts, _behaviour(scorer, model, _placed(prompts)))


def _placed(prompts: Prompts) -> Prompts:
    """Where policies announce nothing, all completions are measured behind an announcement of no words."""
    return prompts if prompts.announcements else replace(prompts, announcements=(Announcement(0, 0, "", ()),))


def _behaviour(scorer: Scorer, model: Model, prompts: Prompts) -> Behaviour:
    number, policies, most, behaviours = prompts.shape
    announcements = prompts.announcements
    log_announced, log_other = scorer.literals(model, prompts.contexts, [[a.ids for a in announcements]] * number)
    forced = behind_announcements(prompts)
    right = [ended(prompts, answer, len(a.ids)) for answer in prompts.answers for a in announcements]
    correct = np.exp(scorer.sequences(model, forced, right)).reshape(number, -1)
    correct_other = np.zeros(number)
    if not prompts.suite.table:
        unannounced = [ended(prompts, answer, 0) for answer in prompts.answers]
        correct_other = np.exp(scorer.sequences(model, prompts.contexts, unannounced))
    shown = np.ones((number, len(announcements), behaviours))
    if prompts.suite.behaviour_names:
        shown[:] = 0.0
        literals = []
        for i in range(number):
            for a in announcements:
                group: list[Ids] = [ids for _, ids in prompts.behaviours]
                if prompts.errs:
                    group.append(tuple(ended(prompts, prompts.errs[i], len(a.ids))))
                literals.append(group)
        owners = [b for b, _ in prompts.behaviours]
        if prompts.errs:
            owners.append(prompts.suite.behaviour_names.index(ERR))
        logs, log_answer = scorer.literals(model, forced, literals)
        flat = shown.reshape(-1, behaviours)
        for k, b in enumerate(owners):
            flat[:, b] += np.exp(logs[:, k])
        flat[:, -1] = np.exp(log_answer)
    classes = np.zeros((number, policies, most, behaviours))
    forced_behaviour = np.full((number, policies - 1, most, behaviours), np.nan)
    forced_correct = np.full((number, policies - 1, most), np.nan)
    joint = np.zeros((number, policies))
    for k, a in enumerate(announcements):
        weight = np.exp(log_announced[:, k])
        classes[:, a.policy, a.wording] = weight[:, None] * shown[:, k]
        joint[:, a.policy] += weight * correct[:, k]
        forced_behaviour[:, a.policy, a.wording] = shown[:, k]
        forced_correct[:, a.policy, a.wording] = correct[:, k]
    classes[:, -1, 0, -1] = np.exp(log_other)
    joint[:, -1] = correct_other
    return Behaviour(classes, joint, forced_behaviour, forced_correct)


def literal_change(scorer: Scorer, before: Model, after: Model, prompts: Prompts, seed: int) -> Change:
    prompts = _placed(prompts)
    s, r = (_behaviour(scorer, model, prompts) for model in (before, after))
    policy_kl, novel = forced_kl(scorer, before, after, prompts, FORCED_SAMPLES, seed, s, r)
    routing, wording, conditioning = class_terms(r.classes, s.classes)
    heard = r.classes.sum(-1)[:, :-1]
    return Change(
        before=s,
        after=r,
        routing=routing,
        wording=wording,
        conditioning=conditioning,
        skill=np.nansum(heard * policy_kl, (1, 2)) - conditioning,
        novel=np.nansum(heard * novel, (1, 2)),
        other=np.zeros(len(prompts.rows))
        if prompts.suite.table
        else r.weights[:, -1] * _other_kl(scorer, before, after, prompts, seed),
        dormant=dormant(r, policy_kl),
        method="literal",
    )


def _other_kl(scorer: Scorer, before: Model, after: Model, prompts: Prompts, seed: int) -> Float[np.ndarray, " prompt"]:
    """KL(y_R || y_S given `other`): one completion of no known policy a prompt, drawn from R."""
    literals = [[a.ids for a in prompts.announcements]] * len(prompts.rows)
    heads = scorer.escapes(after, prompts.contexts, literals, seed + 1)
    log_r, log_s, _ = scorer.compare(after, before, prompts.contexts, heads)
    _, none_r = scorer.literals(after, prompts.contexts, literals)
    _, none_s = scorer.literals(before, prompts.contexts, literals)
    open_ended = [i for i, head in enumerate(heads) if head[-1] not in scorer.ends]
    result = (log_r - none_r) - (log_s - none_s)
    room = [prompts.suite.max_new_tokens - len(heads[i]) for i in open_ended]
    contexts = [[*prompts.contexts[i], *heads[i]] for i in open_ended]
    tails = scorer.sample(after, contexts, 1, room, seed + 2)
    some = [i for i, tokens in enumerate(tails.tokens) if tokens]
    if some:
        _, _, kl = scorer.compare(after, before, [contexts[i] for i in some], [tails.tokens[i] for i in some])
        result[[open_ended[i] for i in some]] += kl
    return result
