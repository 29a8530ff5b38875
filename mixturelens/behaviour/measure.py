"""From models and a suite to probabilities of policies and behaviours, prompt by prompt.

Three ways to the same arrays, chosen by what the suite allows:

- *enumerated*: every completion there is, where they are few enough; exact.
- *literal*: policies and behaviours are literal texts, so their probabilities are exact by teacher forcing, and only
  what follows an announcement is sampled, once that announcement is put in place.
- *sampled*: rules. Completions are drawn from both checkpoints and each is weighed under both (balance heuristic,
  Veach and Guibas 1995), so that a policy that one checkpoint never shows still has a weight, and S against S is
  exactly zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from mixturelens.behaviour.likelihood import END, Completions, Ids, Model, Scorer, without_end
from mixturelens.behaviour.split import class_terms
from mixturelens.suite import PromptRow, Suite, encode_prompts, encode_text, wordings
from mixturelens.types import ERR, OTHER, InputError

ENUMERATE_AT_MOST = 4000
"""Completions a prompt, up to which all of them are enumerated."""
FORCED_SAMPLES = 4
"""Completions behind each announcement of a literal suite, for what comes after policy and behaviour."""
NOVEL = 0.01
"""A behaviour that S shows less often than this under an announcement is new in R: S has no skill there to compare."""


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


@dataclass(frozen=True)
class Behaviour:
    """What one checkpoint does on each prompt. NaN: not measured.

    `classes` are the probabilities of what it does of its own accord; `forced_*` are those with an announcement put in
    place, so they know a policy that is never heard, too.
    """

    classes: Float[np.ndarray, "prompt policy wording behaviour"]
    correct: Float[np.ndarray, "prompt policy"]
    """Joint probability of following the policy and being right."""
    forced_behaviour: Float[np.ndarray, "prompt known wording behaviour"]
    forced_correct: Float[np.ndarray, "prompt known wording"]

    @property
    def weights(self) -> Float[np.ndarray, "prompt policy"]:
        return self.classes.sum((-1, -2))

    @property
    def forced_accuracy(self) -> Float[np.ndarray, "prompt known"]:
        """Accuracy once a policy is put in place, each wording as often as the model itself uses it."""
        share = self.classes.sum(-1)[:, :-1]
        share = np.where(np.isnan(self.forced_correct), np.nan, share)
        total = np.nansum(share, -1, keepdims=True)
        number = (~np.isnan(share)).sum(-1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.where(total > 1e-300, share / total, np.where(np.isnan(share), np.nan, 1.0 / number))
        accuracy = np.nansum(share * self.forced_correct, -1)
        return np.where(number[..., 0] > 0, accuracy, np.nan)


@dataclass(frozen=True)
class Change:
    """What changed from S to R on each prompt, in nats, beside what either does.

    KL(R || S) = routing + wording + conditioning + skill + other, where `skill` is that of known policies and `other`
    is what completions of no known policy add: no specialist is behind those.
    """

    before: Behaviour
    after: Behaviour
    routing: Float[np.ndarray, " prompt"]
    wording: Float[np.ndarray, " prompt"]
    conditioning: Float[np.ndarray, " prompt"]
    skill: Float[np.ndarray, " prompt"]
    novel: Float[np.ndarray, " prompt"]
    """The part of `skill` in behaviours that S hardly shows there (under NOVEL)."""
    other: Float[np.ndarray, " prompt"]
    dormant: Float[np.ndarray, " prompt"]
    method: str


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
            behaviours.append((b, tuple(encode_text(_behind(text, texts), f"behaviour {name!r}", tokenizer))))
    prompts = Prompts(
        suite=suite,
        rows=tuple(rows),
        contexts=encode_prompts(suite, rows, tokenizer),
        announcements=tuple(announcements),
        answers=[encode_text(_behind(row.answer, texts), f"the answer of prompt {row.id!r}", tokenizer) for row in rows]
        if suite.answer_match == "exact"
        else [[] for _ in rows],
        errs=None
        if ERR not in suite.behaviour_names or ERR in (suite.behaviours or {})
        else [encode_text(_behind(row.err or "", texts), f"the err of prompt {row.id!r}", tokenizer) for row in rows],
        behaviours=tuple(behaviours),
        tokenizer=tokenizer,
    )
    if suite.literal:
        longest = max(len(a.ids) for a in announcements)
        for row, answer in zip(rows, prompts.answers, strict=True):
            if longest + len(answer) > suite.max_new_tokens:
                raise InputError(
                    f"max_new_tokens: {suite.max_new_tokens} cannot hold announcement and answer of prompt {row.id!r} "
                    f"({longest + len(answer)} tokens); raise it"
                )
    return prompts


def _behind(text: str, announcements: Sequence[str]) -> str:
    """A text as it is spelled behind an announcement: separated by a space unless either brings its own."""
    if not announcements or not text or text[0].isspace() or any(a[-1:].isspace() for a in announcements):
        return text
    return f" {text}"


def _ended(prompts: Prompts, tokens: Sequence[int], used: int) -> list[int]:
    """Tokens and the end token, where there is still room for one."""
    return [*tokens, END] if used + len(tokens) < prompts.suite.max_new_tokens else list(tokens)


# --- literal suites ---------------------------------------------------------------------------------------------------


def _behind_announcements(prompts: Prompts) -> list[list[int]]:
    return [[*context, *a.ids] for context in prompts.contexts for a in prompts.announcements]


def literal_behaviour(scorer: Scorer, model: Model, prompts: Prompts) -> Behaviour:
    """Exact probabilities by teacher forcing; nothing is drawn."""
    number, policies, most, behaviours = prompts.shape
    announcements = prompts.announcements
    log_announced, log_other = scorer.literals(model, prompts.contexts, [[a.ids for a in announcements]] * number)
    forced = _behind_announcements(prompts)
    right = [_ended(prompts, answer, len(a.ids)) for answer in prompts.answers for a in announcements]
    correct = np.exp(scorer.sequences(model, forced, right)).reshape(number, -1)
    unannounced = [_ended(prompts, answer, 0) for answer in prompts.answers]
    correct_other = np.exp(scorer.sequences(model, prompts.contexts, unannounced))
    shown = np.ones((number, len(announcements), behaviours))
    if prompts.suite.behaviour_names:
        shown[:] = 0.0
        literals = []
        for i in range(number):
            for a in announcements:
                group: list[Ids] = [ids for _, ids in prompts.behaviours]
                if prompts.errs:
                    group.append(tuple(_ended(prompts, prompts.errs[i], len(a.ids))))
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


def _literal_change(scorer: Scorer, before: Model, after: Model, prompts: Prompts, seed: int) -> Change:
    s, r = (literal_behaviour(scorer, model, prompts) for model in (before, after))
    policy_kl, novel = _forced_kl(scorer, before, after, prompts, FORCED_SAMPLES, seed, s, r)
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
        other=r.weights[:, -1] * _other_kl(scorer, before, after, prompts, seed),
        dormant=_dormant(r, policy_kl),
        method="literal",
    )


def _forced_kl(
    scorer: Scorer,
    before: Model,
    after: Model,
    prompts: Prompts,
    samples: int,
    seed: int,
    s: Behaviour,
    r: Behaviour,
) -> tuple[Float[np.ndarray, "prompt known wording"], Float[np.ndarray, "prompt known wording"]]:
    """KL(y_R || y_S) of what follows each announcement once in place, from completions of R; and its novel part."""
    number, policies, most, _ = prompts.shape
    result, novel = (np.full((number, policies - 1, most), np.nan) for _ in range(2))
    if not prompts.announcements:
        return result, novel
    drawn, label, k = _draw_forced(scorer, after, prompts, samples, seed)
    forced = _behind_announcements(prompts)
    log_r, log_s, kl = scorer.compare(after, before, [forced[i] for i in drawn.context], drawn.tokens)
    place = (drawn.context // len(prompts.announcements), _owners(prompts)[0][k], _owners(prompts)[1][k])
    shown_r, shown_s = (b.forced_behaviour[*place, label.behaviour] for b in (r, s))
    excess = np.where(shown_s < NOVEL, (log_r - log_s) - _log_ratio(shown_r, shown_s), 0.0)
    for owner in zip(*_owners(prompts), strict=True):
        result[:, *owner], novel[:, *owner] = 0.0, 0.0
    np.add.at(result, place, kl / samples)
    np.add.at(novel, place, excess / samples)
    return result, novel


def _owners(prompts: Prompts) -> tuple[np.ndarray, np.ndarray]:
    """(policy, wording) of every announcement."""
    return np.array([a.policy for a in prompts.announcements]), np.array([a.wording for a in prompts.announcements])


def _log_ratio(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300))


def _draw_forced(
    scorer: Scorer, model: Model, prompts: Prompts, samples: int, seed: int
) -> tuple[Completions, _Labelled, np.ndarray]:
    """Completions behind every announcement of every prompt, their labels, and which announcement it was."""
    count = len(prompts.announcements)
    room = [prompts.suite.max_new_tokens - len(a.ids) for a in prompts.announcements] * len(prompts.rows)
    drawn = scorer.sample(model, _behind_announcements(prompts), samples, room, seed)
    k = drawn.context % count
    owned = replace(drawn, context=drawn.context // count)
    return drawn, _label(scorer, prompts, owned, [prompts.announcements[i].text for i in k]), k


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


def _dormant(after: Behaviour, policy_kl: Float[np.ndarray, "prompt known wording"]) -> Float[np.ndarray, " prompt"]:
    """The specialist term with uniform policy weights: a silent policy counts as much as one that is heard."""
    used = after.classes.sum(-1)[:, :-1]
    measured = ~np.isnan(policy_kl)
    used = np.where(measured, np.maximum(used, 1e-300), 0.0)
    share = used / np.maximum(used.sum(-1, keepdims=True), 1e-300)
    per_policy = np.where(measured.any(-1), np.nansum(share * policy_kl, -1), np.nan)
    return per_policy.mean(-1)


# --- enumerated and sampled suites ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Labelled:
    """Class and correctness of completions, as flat arrays."""

    policy: np.ndarray
    wording: np.ndarray
    behaviour: np.ndarray
    correct: np.ndarray


def _label(scorer: Scorer, prompts: Prompts, drawn: Completions, forced: Sequence[str] | None = None) -> _Labelled:
    """Label completions; `forced[i]` is the announcement that was put before completion i."""
    suite = prompts.suite
    policies = [*suite.policies, OTHER]
    names = suite.behaviour_names
    memo: dict[tuple[int, str], tuple[int, int, int, bool]] = {}
    found = np.zeros((len(drawn.tokens), 4), dtype=int)
    ids = [tuple(without_end(tokens, scorer.ends)) for tokens in drawn.tokens]
    distinct = list(dict.fromkeys(ids))
    # literals are judged by their tokens: a special token before or between them is not nothing
    decoded = prompts.tokenizer.batch_decode(distinct, skip_special_tokens=not suite.literal)  # type: ignore[attr-defined]
    texts = dict(zip(distinct, decoded, strict=True))
    for i, text in enumerate(texts[tokens] for tokens in ids):
        if forced is not None:
            text = f"{forced[i]}{'' if text[:1].isspace() or forced[i][-1:].isspace() else ' '}{text}"
        key = (int(drawn.context[i]), text)
        if key not in memo:
            row = prompts.rows[key[0]]
            label = suite.label(text, row)
            b = names.index(label.behaviour) if label.behaviour is not None else len(names) - 1
            memo[key] = (policies.index(label.policy), label.wording, max(b, 0), suite.correct(label.rest, row))
        found[i] = memo[key]
    return _Labelled(found[:, 0], found[:, 1], found[:, 2], found[:, 3].astype(bool))


def _tally(
    prompts: Prompts, context: np.ndarray, label: _Labelled, weight: np.ndarray
) -> tuple[Float[np.ndarray, "prompt policy wording behaviour"], Float[np.ndarray, "prompt policy"]]:
    """Sum weights into classes, and into (policy, correct), prompt by prompt."""
    classes, correct = np.zeros(prompts.shape), np.zeros(prompts.shape[:2])
    np.add.at(classes, (context, label.policy, label.wording, label.behaviour), weight)
    np.add.at(correct, (context, label.policy), weight * label.correct)
    return classes, correct


def _enumerated_change(scorer: Scorer, before: Model, after: Model, prompts: Prompts) -> Change:
    completions, logs = scorer.enumerate((after, before), prompts.contexts, prompts.suite.max_new_tokens)
    number = len(prompts.rows)
    drawn = Completions(np.repeat(np.arange(number), len(completions)), completions * number)
    log_r, log_s = logs.reshape(2, -1)
    label = _label(scorer, prompts, drawn)
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
    excess = gain - r.classes * _log_ratio(r.classes, s.classes)
    return Change(
        before=s,
        after=r,
        routing=routing,
        wording=wording,
        conditioning=conditioning,
        skill=gain.sum((1, 2, 3)) - routing - wording - conditioning - other,
        novel=np.where(s.forced_behaviour < NOVEL, excess[:, :-1], 0.0).sum((1, 2, 3)),
        other=other,
        dormant=_dormant(r, stratum_kl[:, :-1]),
        method="enumerated",
    )


def _conditioned(prompts: Prompts, drawn: Completions, label: _Labelled, weight: np.ndarray) -> Behaviour:
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
    label: _Labelled
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
    label = _label(scorer, prompts, Completions(context, tokens))
    return _Pool(context, label, log_r, log_s, kl.reshape(number, 2, n)[:, 0])


def _pool_terms(
    prompts: Prompts, pool: _Pool, label: _Labelled
) -> tuple[Float[np.ndarray, "term prompt"], tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(routing, wording, conditioning) of each prompt, and (classes, correct) of S and of R."""
    n, number = prompts.suite.samples, len(prompts.rows)
    share_r = 1 / (1 + np.exp(np.clip(pool.log_before - pool.log_after, -200, 200)))
    keep = np.ones((n + 1, number, 2, n))
    keep[np.arange(1, n + 1), :, :, np.arange(n)] = 0.0
    estimates = []
    for chosen in keep.reshape(n + 1, -1):
        pair = []
        for share in (1 - share_r, share_r):
            weight = share * chosen
            mass = np.bincount(pool.context, weight, minlength=number)
            pair.append(_tally(prompts, pool.context, label, weight / np.maximum(mass, 1e-300)[pool.context]))
        estimates.append(pair)
    plug_in = np.array([class_terms(r[0], s[0]) for s, r in estimates])
    # the plug-in KL of a few samples is biased upwards by O(1/n): jackknife; one sample cannot say
    terms = n * plug_in[0] - (n - 1) * plug_in[1:].mean(0) if n > 1 else np.full_like(plug_in[0], np.nan)
    return terms, estimates[0][0], estimates[0][1]


def _sampled_change(scorer: Scorer, before: Model, after: Model, prompts: Prompts, seed: int) -> Change:
    """Rules: n completions from each checkpoint, all weighed under both."""
    n = prompts.suite.samples
    pool = _draw_pool(scorer, before, after, prompts, seed)
    terms, of_s, of_r = _pool_terms(prompts, pool, pool.label)
    s, r = (
        Behaviour(classes, correct, *_forced_sample(scorer, model, prompts, seed + 3))
        for (classes, correct), model in ((of_s, before), (of_r, after))
    )
    policy_kl, _ = _forced_kl(scorer, before, after, prompts, n, seed + 5, s, r)
    # R's own completions beyond what their class already says: the part of unknown policies, and of new behaviours
    label = pool.label
    place = (pool.context, label.policy, label.wording, label.behaviour)
    with np.errstate(divide="ignore", invalid="ignore"):
        shown_s = (s.classes / s.classes.sum(-1, keepdims=True))[place]
    excess = pool.log_after - pool.log_before - _log_ratio(r.classes[place], s.classes[place])
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
        dormant=_dormant(r, policy_kl),
        method="sampled",
    )


def _permuted(prompts: Prompts, context: np.ndarray, label: _Labelled, seed: int) -> _Labelled:
    """The same labels on other completions of the same cue: labels that have nothing to do with the text."""
    rng = np.random.default_rng(seed)
    order = np.arange(len(context))
    cue_of = np.array([prompts.suite.cues.index(row.cue) for row in prompts.rows])[context]
    for cue in np.unique(cue_of):
        at = np.flatnonzero(cue_of == cue)
        order[at] = rng.permutation(at)
    return _Labelled(label.policy[order], label.wording[order], label.behaviour[order], label.correct)


def _forced_sample(
    scorer: Scorer, model: Model, prompts: Prompts, seed: int
) -> tuple[Float[np.ndarray, "prompt known wording behaviour"], Float[np.ndarray, "prompt known wording"]]:
    """Behaviour and correctness with each announcement put in place, from the model's own completions."""
    number, policies, most, behaviours = prompts.shape
    shown = np.full((number, policies - 1, most, behaviours), np.nan)
    correct = np.full((number, policies - 1, most), np.nan)
    if not prompts.announcements:
        return shown, correct
    n = prompts.suite.samples
    drawn, label, k = _draw_forced(scorer, model, prompts, n, seed)
    policy, wording = _owners(prompts)
    context = drawn.context // len(prompts.announcements)
    shown[:, policy, wording], correct[:, policy, wording] = 0.0, 0.0
    np.add.at(shown, (context, policy[k], wording[k], label.behaviour), 1.0 / n)
    np.add.at(correct, (context, policy[k], wording[k]), label.correct / n)
    return shown, correct


# --- entry points -----------------------------------------------------------------------------------------------------


def measure(scorer: Scorer, model: Model, prompts: Prompts, seed: int = 0) -> Behaviour:
    """What one checkpoint does on each prompt."""
    if prompts.suite.literal:
        return literal_behaviour(scorer, model, prompts)
    number, n = len(prompts.rows), prompts.suite.samples
    drawn = scorer.sample(model, prompts.contexts, n, [prompts.suite.max_new_tokens] * number, seed)
    label = _label(scorer, prompts, drawn)
    classes, correct = _tally(prompts, drawn.context, label, np.full(len(drawn.tokens), 1.0 / n))
    return Behaviour(classes, correct, *_forced_sample(scorer, model, prompts, seed + 3))


def measure_change(
    scorer: Scorer, before: Model, after: Model, prompts: Prompts, seed: int = 0, *, enumerate_all: bool | None = None
) -> Change:
    """What changed from `before` (S) to `after` (R) on each prompt.

    `enumerate_all` overrides the choice to enumerate every completion where they are few (tests compare both ways).
    """
    few = scorer.number_of_completions(prompts.suite.max_new_tokens) <= ENUMERATE_AT_MOST
    if few if enumerate_all is None else enumerate_all:
        return _enumerated_change(scorer, before, after, prompts)
    if prompts.suite.literal:
        return _literal_change(scorer, before, after, prompts, seed)
    return _sampled_change(scorer, before, after, prompts, seed)


def nulls(
    scorer: Scorer, before: Model, after: Model, prompts: Prompts, seed: int
) -> tuple[Float[np.ndarray, " prompt"], Float[np.ndarray, " prompt"], Float[np.ndarray, " prompt"]]:
    """(routing of shuffled labels, token KL, log R - log S) of each prompt, from completions drawn without forcing.

    The first: labels permuted among the completions of a cue, so what a meaningless partition would call routing. The
    second and third have the mean KL(R || S), by ways that know nothing of policies: a check on the sum of the terms.
    """
    pool = _draw_pool(scorer, before, after, prompts, seed)
    shuffled, _, _ = _pool_terms(prompts, pool, _permuted(prompts, pool.context, pool.label, seed))
    ratio = (pool.log_after - pool.log_before).reshape(len(prompts.rows), 2, -1)[:, 0]
    return shuffled[0], pool.kl.mean(-1), ratio.mean(-1)
