"""Rules say which policy a completion follows; grafts weigh policies by texts: those by which S and R announce them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from mixturelens.behaviour.likelihood import Model, Scorer
from mixturelens.behaviour.prompts import Prompts, prepare
from mixturelens.grafting.usual import beginnings, enough_of
from mixturelens.shown import Rule
from mixturelens.spelling import Ids
from mixturelens.types import InputError

PROMPTS, SAMPLES = 32, 4
"""Prompts, drawn, and completions of each from S and from R, that texts are looked for in."""
ROOM = 24
"""Tokens in which a policy must be announced."""
TEXTS = 4
"""Texts of a policy, at most, beside the one that its rule forces."""
MOST = 0.98
"""Share of its completions that they cover: what is left is rare."""


def as_announced(prompts: Prompts, models: Sequence[Model], scorer: Scorer, seed: int = 0) -> Prompts:
    """The prompts, of a suite with texts in place of rules: those by which S and R (`models`) announce a policy most
    often, and the one that the rule forces.

    A text ends where its policy has shown, so that how the completion goes on does not matter. How much of the
    completions these texts cover is measured afterwards, exactly. Where they cannot be spelled, or there is no rule,
    the prompts are given back as they are.
    """
    suite, rows = prompts.suite, prompts.rows
    ruled = [name for name, shown in suite.policies.items() if isinstance(shown, Rule) and shown.force is not None]
    if not ruled:
        return prompts
    some = sorted(np.random.default_rng(seed).permutation(len(rows))[:PROMPTS].tolist())
    asked = prompts.part(some)
    room = [min(ROOM, suite.max_new_tokens - 1)] * len(some)
    seen: Counter[tuple[int, Ids]] = Counter()
    for model in models:
        drawn = scorer.sample(model, asked.contexts, SAMPLES, room, seed)
        bodies = [tuple(t[:-1] if t and t[-1] in scorer.ends else t) for t in drawn.tokens]
        for body, labels in zip(bodies, beginnings(asked, bodies, drawn.context, scorer), strict=True):
            if labels.policy[-1] < len(suite.policies) and (count := enough_of(labels.policy)):
                seen[int(labels.policy[-1]), body[:count]] += 1
    texts = _told_apart(seen, asked)
    policies = dict(suite.policies)
    for m, name in enumerate(policies):
        if name in ruled and texts[m]:
            policies[name] = texts[m]
    found = suite.model_copy(update={"policies": policies})
    try:
        return prepare(found, rows, prompts.tokenizer)
    except InputError:
        return prompts


def _told_apart(seen: Counter[tuple[int, Ids]], prompts: Prompts) -> list[tuple[str, ...]]:
    """Texts of each policy, of which none begins another: what they add up to is counted once.

    A text that begins one of another policy tells neither; of two of one policy the shorter one says all.
    """
    forced = {(a.policy, prompts.placed[0][k].ids) for k, a in enumerate(prompts.announcements)}
    known = [*(each for each, _ in seen.most_common()), *sorted(forced - set(seen))]

    def begins(ids: Ids, other: Ids) -> bool:
        return len(ids) < len(other) and other[: len(ids)] == ids

    kept: list[tuple[int, Ids]] = []
    for m, ids in known:
        ambiguous = any(n != m and (begins(ids, other) or ids == other) for n, other in known)
        if not ambiguous and not any(begins(other, ids) for n, other in known if n == m):
            kept.append((m, ids))
    found: list[tuple[str, ...]] = []
    for m in range(len(prompts.suite.policies)):
        mine = [ids for n, ids in kept if n == m]
        heard = np.cumsum([0, *(seen[m, ids] for ids in mine)])
        enough = MOST * sum(count for (n, _), count in seen.items() if n == m)
        often = [ids for ids, before in zip(mine, heard[:-1], strict=True) if before < enough][:TEXTS]
        chosen = [ids for ids in mine if ids in often or (m, ids) in forced]
        found.append(tuple(dict.fromkeys(str(prompts.tokenizer.decode(list(ids))).strip() for ids in chosen)))
    return found
