"""Completions weighed under both checkpoints: all there are where they are few, else samples of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from mixturelens.behaviour.arrays import Behaviour, Change, NatTerms, spread
from mixturelens.behaviour.bits import bit_terms
from mixturelens.behaviour.forced import Labelled, forced_sample, label_completions, texts_of
from mixturelens.behaviour.likelihood import Completions, Model, Scorer
from mixturelens.behaviour.prompts import ASIDE, Prompts
from mixturelens.behaviour.split import class_terms, nat_terms, skill_term
from mixturelens.behaviour.unannounced import attributed
from mixturelens.completions import GivenCompletions
from mixturelens.types import InputError, Side

ENOUGH = 240
"""Completions of a checkpoint that are enough for controls."""


def _tally(
    prompts: Prompts, context: np.ndarray, label: Labelled, weight: np.ndarray
) -> tuple[Float[np.ndarray, "prompt policy wording behaviour"], Float[np.ndarray, "prompt policy wording behaviour"]]:
    """Sum weights into classes, and those of right completions, prompt by prompt."""
    classes, right = np.zeros(prompts.shape), np.zeros(prompts.shape)
    place = (context, label.policy, label.wording, label.behaviour)
    np.add.at(classes, place, weight)
    np.add.at(right, place, weight * label.correct)
    return classes, right


def enumerated_change(scorer: Scorer, before: Model, after: Model, prompts: Prompts) -> Change:
    """What changed from S (`before`) to R (`after`) on each prompt, from every completion that there is.

    All numbers are exact. It is meant for few tokens and short completions (`Scorer.number_of_completions`).
    """
    completions, logs = scorer.enumerate((after, before), prompts.contexts, prompts.suite.max_new_tokens)
    number = len(prompts.rows)
    drawn = Completions(np.repeat(np.arange(number), len(completions)), completions * number)
    log_r, log_s = logs.reshape(2, -1)
    label = label_completions(scorer, prompts, drawn)
    s, r = (_conditioned(prompts, drawn, label, np.exp(log)) for log in (log_s, log_r))
    # KL of what follows, given policy and wording, from the sums over their completions
    gain, tokens = (np.zeros(prompts.shape[:3]) for _ in range(2))
    place = (drawn.context, label.policy, label.wording)
    np.add.at(gain, place, np.exp(log_r) * (log_r - log_s))
    np.add.at(tokens, place, np.exp(log_r) * [len(each) for each in drawn.tokens])
    mass_r, mass_s = r.classes.sum(-1), s.classes.sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        stratum_kl = gain / mass_r - np.log(mass_r) + np.log(mass_s)
        length = tokens / mass_r
    # behaviours of no known policy are part of what `other` adds
    other = np.nansum(mass_r[:, -1] * stratum_kl[:, -1], -1)
    nats = nat_terms(_others_alike(s), _others_alike(r), stratum_kl[:, :-1], length[:, :-1], other)
    return Change(s, r, bit_terms(s, r), nats, method="enumerated")


def _others_alike(behaviour: Behaviour) -> Behaviour:
    """The same, with what completions of no known policy do not told apart."""
    classes, right = behaviour.classes.copy(), behaviour.right.copy()
    for each in (classes, right):
        each[:, -1, 0, -1] = each[:, -1].sum((-1, -2))
        each[:, -1, 1:] = each[:, -1, :, :-1] = 0.0
    return replace(behaviour, classes=classes, right=right)


def _conditioned(prompts: Prompts, drawn: Completions, label: Labelled, weight: np.ndarray) -> Behaviour:
    """Behaviour from weighted completions; what is forced follows by conditioning on the announcement."""
    classes, right = _tally(prompts, drawn.context, label, weight)
    mass = classes.sum(-1)[:, :-1, :, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        forced = [np.where(mass > 0, each[:, :-1] / mass, np.nan) for each in (classes, right)]
    return Behaviour(classes, right, *forced)


@dataclass(frozen=True)
class _Pool:
    """n completions of R and n of S for each prompt, all weighed under both; [prompt, source, sample] when reshaped."""

    context: np.ndarray
    number: int
    """n."""
    texts: list[str]
    label: Labelled
    length: np.ndarray
    """Tokens of each completion."""
    log_after: np.ndarray
    log_before: np.ndarray
    kl: np.ndarray
    """Token KL summed along R's own completions, [prompt, sample]."""

    def own(self, side: Side) -> np.ndarray:
        """Which completions are a checkpoint's own, those of a prompt beside each other."""
        return np.arange(len(self.context)).reshape(-1, 2, self.number)[:, 0 if side == "after" else 1].ravel()


def _draw_pool(scorer: Scorer, before: Model, after: Model, prompts: Prompts, n: int, seed: int) -> _Pool:
    limits = [prompts.suite.max_new_tokens] * len(prompts.rows)
    pools = [scorer.sample(model, prompts.contexts, n, limits, seed + k) for k, model in enumerate((after, before))]
    return _pool_of(scorer, (before, after), prompts, pools, n)


def _pool_of(
    scorer: Scorer, models: tuple[Model, Model], prompts: Prompts, pools: Sequence[Completions], n: int
) -> _Pool:
    """`pools` are n completions of each prompt of R, and of S."""
    number, (before, after) = len(prompts.rows), models
    tokens = [pool.tokens[x * n + i] for x in range(number) for pool in pools for i in range(n)]
    context = np.repeat(np.arange(number), 2 * n)
    log_r, log_s, kl = scorer.compare(after, before, [prompts.contexts[i] for i in context], tokens)
    drawn = Completions(context, tokens)
    label = label_completions(scorer, prompts, drawn)
    return _Pool(
        context=context,
        number=n,
        texts=texts_of(scorer, prompts, drawn),
        label=label,
        length=np.array([len(each) for each in tokens]),
        log_after=log_r,
        log_before=log_s,
        kl=kl.reshape(number, 2, n)[:, 0],
    )


def _shares(pool: _Pool) -> tuple[np.ndarray, np.ndarray]:
    """R / (R + S) and S / (R + S) of every completion; neither underflows to zero."""
    ahead = np.clip(pool.log_after - pool.log_before, -200, 200)
    return 1 / (1 + np.exp(-ahead)), 1 / (1 + np.exp(ahead))


def _pool_terms(prompts: Prompts, pool: _Pool, label: Labelled) -> Float[np.ndarray, "term prompt"]:
    """(routing, wording, conditioning, skill) of each prompt, in nats; NaN from one completion, which cannot say."""
    n, number = pool.number, len(prompts.rows)
    if n < 2:
        return np.full((4, number), np.nan)
    share_r, share_s = _shares(pool)
    keep = np.ones((n + 1, number, 2, n))
    keep[np.arange(1, n + 1), :, :, np.arange(n)] = 0.0
    found = []
    for chosen in keep.reshape(n + 1, -1):
        sides = []
        for share in (share_s, share_r):
            weight = share * chosen
            mass = np.bincount(pool.context, weight, minlength=number)
            sides.append(_tally(prompts, pool.context, label, weight / np.maximum(mass, 1e-300)[pool.context]))
        (s, s_right), (r, r_right) = sides
        found.append([*class_terms(r, s), skill_term(r[:, :-1], r_right[:, :-1], s[:, :-1], s_right[:, :-1])])
    plug_in = np.array(found)
    # the plug-in KL of a few samples is biased upwards by O(1/n): jackknife
    return n * plug_in[0] - (n - 1) * plug_in[1:].mean(0)


def sampled_change(scorer: Scorer, before: Model, after: Model, prompts: Prompts, seed: int) -> Change:
    """What changed from S (`before`) to R (`after`) on each prompt, from n = `suite.samples` completions of each
    checkpoint's own, and n behind each announcement.

    Bits stand on those alone. For nats, completions of either are weighed under both (balance heuristic, Veach and
    Guibas 1995), which says the less the less they overlap.
    """
    pool = _draw_pool(scorer, before, after, prompts, prompts.suite.samples, seed)
    return _change_of(scorer, (before, after), prompts, pool, seed)


def given_change(
    scorer: Scorer, models: tuple[Model, Model], prompts: Prompts, given: GivenCompletions, seed: int
) -> Change:
    """What changed from S to R (`models`), from completions of each checkpoint that were sampled elsewhere.

    What is put in place is drawn here, as in `sampled_change`: nobody else has put it in place. Bits stand on what the
    texts say; nats on their tokens as the tokenizer spells them, which a model may have written in another way.
    """
    pools = [spelled(scorer, prompts, given, side) for side in ("after", "before")]
    pool = _pool_of(scorer, models, prompts, pools, prompts.suite.samples)
    return _change_of(scorer, models, prompts, pool, seed)


def spelled(scorer: Scorer, prompts: Prompts, given: GivenCompletions, side: Side) -> Completions:
    """Completions that were given of one checkpoint, as tokens, prompt by prompt; cut where a drawn one would be."""
    context, tokens = [], []
    ends, tokenizer = sorted(scorer.ends), prompts.tokenizer
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in scorer.ends else ends[0]
    for i, row in enumerate(prompts.rows):
        lead = prompts.suite.spelling.lead.get(row.cue, ("",))[0]
        for text, ended in given.texts[side][row.id, row.cue]:
            ids = tokenizer.encode(text if text[:1].isspace() else lead + text, add_special_tokens=False)
            if any(each >= scorer.vocabulary for each in ids):
                raise InputError(
                    f"completions of {row.id!r} {side}: {text[:40]!r} has tokens that the models do not have"
                )
            at = next((k for k, each in enumerate(ids) if each in scorer.ends), len(ids))
            whole = [*ids[:at], end] if ended or at < len(ids) else ids
            context.append(i)
            tokens.append(whole[: prompts.suite.max_new_tokens])
    return Completions(np.array(context), tokens)


def _change_of(scorer: Scorer, models: tuple[Model, Model], prompts: Prompts, pool: _Pool, seed: int) -> Change:
    n, (before, after) = pool.number, models
    s, r = (
        _side(scorer, before, prompts, pool, "before", seed + 3),
        _side(scorer, after, prompts, pool, "after", seed + 4),
    )
    terms = _pool_terms(prompts, pool, pool.label)
    own, is_other = pool.own("after"), pool.label.policy == len(prompts.suite.policies)
    others = [np.bincount(pool.context, each * is_other) / np.bincount(pool.context, each) for each in _shares(pool)]
    # what R's own completions of no known policy add beyond that they are that
    said = (pool.log_after - pool.log_before)[own].reshape(-1, n)
    apart = np.subtract(*(np.log(np.maximum(each, 1e-300)) for each in others))
    is_other = is_other[own].reshape(-1, n)
    other = np.where(is_other, said - apart[:, None], 0.0).mean(-1)
    routing, wording, conditioning, skill = terms
    nats = NatTerms(
        routing=routing,
        wording=wording,
        conditioning=conditioning,
        skill=skill,
        text=pool.kl.mean(-1) - terms.sum(0) - other,
        other=other,
        length=np.where(is_other, 0, pool.length[own].reshape(-1, n)).mean(-1),
    )
    overlap = float(4 * np.prod(_shares(pool), axis=0).mean())
    return Change(s, r, bit_terms(s, r, n), nats, method="sampled", overlap=overlap)


def _side(scorer: Scorer, model: Model, prompts: Prompts, pool: _Pool, side: Side, seed: int) -> Behaviour:
    """What a checkpoint does, from its own completions."""
    own = pool.own(side)
    return _seen(scorer, model, prompts, pool.context[own], pool.label.part(own), seed)


def _seen(scorer: Scorer, model: Model, prompts: Prompts, context: np.ndarray, label: Labelled, seed: int) -> Behaviour:
    n = prompts.suite.samples
    classes, right = _tally(prompts, context, label, np.full(len(context), 1.0 / n))
    if prompts.suite.table:  # nothing to put in place: all completions stand behind an announcement of no words
        return Behaviour(classes, right, classes[:, :-1], right[:, :-1])
    return Behaviour(classes, right, *forced_sample(scorer, model, prompts, seed))


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
    """What one checkpoint does on each prompt, from completions of its own, `suite.samples` a prompt."""
    number, n = len(prompts.rows), prompts.suite.samples
    drawn = scorer.sample(model, prompts.contexts, n, [prompts.suite.max_new_tokens] * number, seed)
    label = label_completions(scorer, prompts, drawn)
    return attributed(prompts, _seen(scorer, model, prompts, drawn.context, label, seed + 3))


@dataclass(frozen=True)
class Nulls:
    """Controls from completions that were drawn without forcing: they use nothing of what was computed elsewhere."""

    shuffled: Float[np.ndarray, " prompt"]
    """Routing of labels permuted among the completions of a cue: what a meaningless partition would call routing."""
    kl: Float[np.ndarray, " prompt"]
    """Token KL; its mean is KL(R || S), a check on the sum of the terms."""
    ratio: Float[np.ndarray, " prompt"]
    """log R - log S of completions of R, with the same mean."""
    drawn: dict[Side, tuple[np.ndarray, Labelled, list[str]]]
    """Of each checkpoint's own completions: the prompt of each, what it shows, its text."""


def nulls(scorer: Scorer, before: Model, after: Model, prompts: Prompts, seed: int) -> Nulls:
    """Draw completions of both checkpoints on at most ASIDE questions, for controls; NaN on the other questions."""
    aside = np.array(prompts.of_questions(ASIDE))
    n = max(2, min(prompts.suite.samples, round(ENOUGH / len(aside))))
    some = prompts.part(aside.tolist())
    pool = _draw_pool(scorer, before, after, some, n, seed)
    shuffled = _pool_terms(some, pool, _permuted(some, pool.context, pool.label, seed))[0]
    ratio = (pool.log_after - pool.log_before)[pool.own("after")].reshape(-1, n)
    shuffled, kl, ratio = (
        spread(each, aside.tolist(), len(prompts.rows)) for each in (shuffled, pool.kl.mean(-1), ratio.mean(-1))
    )
    drawn: dict[Side, tuple[np.ndarray, Labelled, list[str]]] = {}
    for side in ("before", "after"):
        at = pool.own(side)
        drawn[side] = (aside[pool.context[at]], pool.label.part(at), [pool.texts[i] for i in at])
    return Nulls(shuffled, kl, ratio, drawn)
