"""Completions weighed under both checkpoints: all there are where they are few, else samples of both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mixturelens.behaviour.arrays import NOVEL, Behaviour, Change, dormant, log_ratio
from mixturelens.behaviour.forced import Labelled, forced_kl, forced_sample, label_completions, texts_of
from mixturelens.behaviour.likelihood import Completions, Model, Scorer
from mixturelens.behaviour.prompts import Prompts
from mixturelens.behaviour.split import class_terms
from mixturelens.behaviour.unannounced import attributed
from mixturelens.types import Side


def _tally(
    prompts: Prompts, context: np.ndarray, label: Labelled, weight: np.ndarray
) -> tuple[Float[np.ndarray, "prompt policy wording behaviour"], Float[np.ndarray, "prompt policy"]]:
    """Sum weights into classes, and into (policy, correct), prompt by prompt."""
    classes, correct = np.zeros(prompts.shape), np.zeros(prompts.shape[:2])
    np.add.at(classes, (context, label.policy, label.wording, label.behaviour), weight)
    np.add.at(correct, (context, label.policy), weight * label.correct)
    return classes, correct


def enumerated_change(scorer: Scorer, before: Model, after: Model, prompts: Prompts) -> Change:
    completions, logs = scorer.enumerate((after, before), prompts.contexts, prompts.suite.max_new_tokens)
    number = len(prompts.rows)
    drawn = Completions(np.repeat(np.arange(number), len(completions)), completions * number)
    log_r, log_s = logs.reshape(2, -1)
    label = label_completions(scorer, prompts, drawn)
    s = _conditioned(prompts, drawn, label, np.exp(log_s))
    r = _conditioned(prompts, drawn, label, np.exp(log_r))
    # KL of what follows, given policy and wording, from the sums over their completions
    gain = np.zeros(prompts.shape)
    place = (drawn.context, label.policy, label.wording, label.behaviour)
    np.add.at(gain, place, np.exp(log_r) * (log_r - log_s))
    mass_r, mass_s = r.classes.sum(-1), s.classes.sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        stratum_kl = gain.sum(-1) / mass_r - np.log(mass_r) + np.log(mass_s)
    routing, wording, conditioning = class_terms(r.classes, s.classes)
    other = np.nansum(mass_r[:, -1] * stratum_kl[:, -1], -1)
    excess = gain - r.classes * log_ratio(r.classes, s.classes)
    return Change(
        before=s,
        after=r,
        routing=routing,
        wording=wording,
        conditioning=conditioning,
        skill=gain.sum((1, 2, 3)) - routing - wording - conditioning - other,
        novel=np.where(s.forced_behaviour < NOVEL, excess[:, :-1], 0.0).sum((1, 2, 3)),
        other=other,
        dormant=dormant(r, stratum_kl[:, :-1]),
        method="enumerated",
    )


def _conditioned(prompts: Prompts, drawn: Completions, label: Labelled, weight: np.ndarray) -> Behaviour:
    """Behaviour from weighted completions; what is forced follows by conditioning on the announcement."""
    classes, correct = _tally(prompts, drawn.context, label, weight)
    right = np.zeros(prompts.shape[:3])
    np.add.at(right, (drawn.context, label.policy, label.wording), weight * label.correct)
    mass = classes.sum(-1)[:, :-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        forced_behaviour = np.where(mass[..., None] > 0, classes[:, :-1] / mass[..., None], np.nan)
        forced_correct = np.where(mass > 0, right[:, :-1] / mass, np.nan)
    return Behaviour(classes, correct, forced_behaviour, forced_correct)


@dataclass(frozen=True)
class _Pool:
    """n completions of R and n of S for each prompt, all weighed under both; [prompt, source, sample] when reshaped."""

    context: np.ndarray
    texts: list[str]
    label: Labelled
    log_after: np.ndarray
    log_before: np.ndarray
    kl: np.ndarray
    """Token KL summed along R's own completions, [prompt, sample]."""


def _draw_pool(scorer: Scorer, before: Model, after: Model, prompts: Prompts, seed: int) -> _Pool:
    n, number = prompts.suite.samples, len(prompts.rows)
    limits = [prompts.suite.max_new_tokens] * number
    pools = [scorer.sample(model, prompts.contexts, n, limits, seed + k) for k, model in enumerate((after, before))]
    tokens = [pool.tokens[x * n + i] for x in range(number) for pool in pools for i in range(n)]
    context = np.repeat(np.arange(number), 2 * n)
    log_r, log_s, kl = scorer.compare(after, before, [prompts.contexts[i] for i in context], tokens)
    drawn = Completions(context, tokens)
    label = label_completions(scorer, prompts, drawn)
    return _Pool(context, texts_of(scorer, prompts, drawn), label, log_r, log_s, kl.reshape(number, 2, n)[:, 0])


def _shares(pool: _Pool) -> tuple[np.ndarray, np.ndarray]:
    """R / (R + S) and S / (R + S) of every completion; neither underflows to zero."""
    ahead = np.clip(pool.log_after - pool.log_before, -200, 200)
    return 1 / (1 + np.exp(-ahead)), 1 / (1 + np.exp(ahead))


def _pool_terms(
    prompts: Prompts, pool: _Pool, label: Labelled
) -> tuple[Float[np.ndarray, "term prompt"], tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(routing, wording, conditioning) of each prompt, and (classes, correct) of S and of R."""
    n, number = prompts.suite.samples, len(prompts.rows)
    share_r, share_s = _shares(pool)
    keep = np.ones((n + 1, number, 2, n))
    keep[np.arange(1, n + 1), :, :, np.arange(n)] = 0.0
    estimates = []
    for chosen in keep.reshape(n + 1, -1):
        pair = []
        for share in (share_s, share_r):
            weight = share * chosen
            mass = np.bincount(pool.context, weight, minlength=number)
            pair.append(_tally(prompts, pool.context, label, weight / np.maximum(mass, 1e-300)[pool.context]))
        estimates.append(pair)
    plug_in = np.array([class_terms(r[0], s[0]) for s, r in estimates])
    # the plug-in KL of a few samples is biased upwards by O(1/n): jackknife; one sample cannot say
    terms = n * plug_in[0] - (n - 1) * plug_in[1:].mean(0) if n > 1 else np.full_like(plug_in[0], np.nan)
    return terms, estimates[0][0], estimates[0][1]


def sampled_change(scorer: Scorer, before: Model, after: Model, prompts: Prompts, seed: int) -> Change:
    """Rules: n completions from each checkpoint, all weighed under both."""
    n = prompts.suite.samples
    pool = _draw_pool(scorer, before, after, prompts, seed)
    terms, of_s, of_r = _pool_terms(prompts, pool, pool.label)
    s, r = (
        Behaviour(classes, correct, *forced_sample(scorer, model, prompts, seed + 3))
        for (classes, correct), model in ((of_s, before), (of_r, after))
    )
    policy_kl, _ = forced_kl(scorer, before, after, prompts, n, seed + 5, s, r)
    # R's own completions beyond what their class already says: the part of unknown policies, and of new behaviours
    label = pool.label
    place = (pool.context, label.policy, label.wording, label.behaviour)
    with np.errstate(divide="ignore", invalid="ignore"):
        shown_s = (s.classes / s.classes.sum(-1, keepdims=True))[place]
    excess = pool.log_after - pool.log_before - log_ratio(r.classes[place], s.classes[place])
    is_other = label.policy == len(prompts.suite.policies)
    other, novel = (
        np.where(chosen, excess, 0.0).reshape(len(prompts.rows), 2, n)[:, 0].mean(-1)
        for chosen in (is_other, ~is_other & (shown_s < NOVEL))
    )
    return Change(
        before=s,
        after=r,
        routing=terms[0],
        wording=terms[1],
        conditioning=terms[2],
        skill=pool.kl.mean(-1) - terms.sum(0) - other,
        novel=novel,
        other=other,
        dormant=dormant(r, policy_kl),
        method="sampled",
        overlap=float(4 * np.prod(_shares(pool), axis=0).mean()),
    )


def _permuted(prompts: Prompts, context: np.ndarray, label: Labelled, seed: int) -> Labelled:
    """The same labels on other completions of the same cue: labels that have nothing to do with the text."""
    rng = np.random.default_rng(seed)
    order = np.arange(len(context))
    cue_of = np.array([prompts.suite.cues.index(row.cue) for row in prompts.rows])[context]
    for cue in np.unique(cue_of):
        at = np.flatnonzero(cue_of == cue)
        order[at] = rng.permutation(at)
    return Labelled(label.policy[order], label.wording[order], label.behaviour[order], label.correct)


def sampled_behaviour(scorer: Scorer, model: Model, prompts: Prompts, seed: int) -> Behaviour:
    """One checkpoint, from its own completions."""
    number, n = len(prompts.rows), prompts.suite.samples
    drawn = scorer.sample(model, prompts.contexts, n, [prompts.suite.max_new_tokens] * number, seed)
    label = label_completions(scorer, prompts, drawn)
    classes, correct = _tally(prompts, drawn.context, label, np.full(len(drawn.tokens), 1.0 / n))
    return attributed(prompts, Behaviour(classes, correct, *forced_sample(scorer, model, prompts, seed + 3)))


@dataclass(frozen=True)
class Nulls:
    """What completions say that were drawn without forcing, by ways that know nothing of what was computed."""

    shuffled: Float[np.ndarray, " prompt"]
    """Routing of labels permuted among the completions of a cue: what a meaningless partition would call routing."""
    kl: Float[np.ndarray, " prompt"]
    """Token KL; its mean is KL(R || S), a check on the sum of the terms."""
    ratio: Float[np.ndarray, " prompt"]
    """log R - log S of completions of R, with the same mean."""
    drawn: dict[Side, tuple[np.ndarray, Labelled, list[str]]]
    """Of each checkpoint's own completions: the prompt of each, what it shows, its text."""


def nulls(scorer: Scorer, before: Model, after: Model, prompts: Prompts, seed: int) -> Nulls:
    """Controls from completions that both checkpoints write of their own accord."""
    pool = _draw_pool(scorer, before, after, prompts, seed)
    shuffled, _, _ = _pool_terms(prompts, pool, _permuted(prompts, pool.context, pool.label, seed))
    ratio = (pool.log_after - pool.log_before).reshape(len(prompts.rows), 2, -1)[:, 0]
    source = np.arange(len(pool.texts)).reshape(len(prompts.rows), 2, -1)
    own: dict[Side, np.ndarray] = {"before": source[:, 1].ravel(), "after": source[:, 0].ravel()}
    drawn: dict[Side, tuple[np.ndarray, Labelled, list[str]]] = {
        side: (pool.context[at], pool.label.part(at), [pool.texts[i] for i in at]) for side, at in own.items()
    }
    return Nulls(shuffled[0], pool.kl.mean(-1), ratio.mean(-1), drawn)
