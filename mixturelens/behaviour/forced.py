"""Completions and their labels, and what a checkpoint does once an announcement is put in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from mixturelens.behaviour.arrays import NOVEL, Behaviour, log_ratio
from mixturelens.behaviour.likelihood import Completions, Model, Scorer
from mixturelens.behaviour.prompts import Prompts, behind_announcements, owners, room_behind
from mixturelens.suite import wordings
from mixturelens.types import OTHER


@dataclass(frozen=True)
class Labelled:
    """Class and correctness of completions, as flat arrays."""

    policy: np.ndarray
    wording: np.ndarray
    behaviour: np.ndarray
    correct: np.ndarray

    def part(self, at: np.ndarray) -> Labelled:
        return Labelled(self.policy[at], self.wording[at], self.behaviour[at], self.correct[at])


def texts_of(scorer: Scorer, prompts: Prompts, drawn: Completions) -> list[str]:
    """Completions as texts, without the end token. A special token in the middle is not nothing: it stays."""
    ids = [tuple(tokens[:-1] if tokens and tokens[-1] in scorer.ends else tokens) for tokens in drawn.tokens]
    distinct = list(dict.fromkeys(ids))
    decoded = prompts.tokenizer.batch_decode([list(each) for each in distinct], skip_special_tokens=False)
    texts = dict(zip(distinct, decoded, strict=True))
    return [texts[each] for each in ids]


def label_completions(
    scorer: Scorer, prompts: Prompts, drawn: Completions, forced: Sequence[str] | None = None
) -> Labelled:
    """Label completions; `forced[i]` is the announcement that was put before completion i.

    Where policies announce nothing, all completions go to the first place: what they do is all that is known.
    """
    suite = prompts.suite
    policies = [*suite.policies, OTHER]
    names = suite.behaviour_names
    memo: dict[tuple[str, str | None], tuple[tuple[int, int, int], str]] = {}
    found = np.zeros((len(drawn.tokens), 4), dtype=int)
    for i, text in enumerate(texts_of(scorer, prompts, drawn)):
        if forced is not None:
            text = f"{forced[i]}{'' if text[:1].isspace() or forced[i][-1:].isspace() else ' '}{text}"
        row = prompts.rows[drawn.context[i]]
        key = text, row.err  # of a prompt, a label depends on nothing else
        if key not in memo:
            label = suite.label(text, row)
            b = names.index(label.behaviour) if label.behaviour is not None else len(names) - 1
            m = 0 if label.policy is None else policies.index(label.policy)
            memo[key] = (m, label.wording, max(b, 0)), label.rest
        label_of, rest = memo[key]
        found[i] = *label_of, suite.correct(rest, row)
    return Labelled(found[:, 0], found[:, 1], found[:, 2], found[:, 3].astype(bool))


def draw_forced(
    scorer: Scorer, model: Model, prompts: Prompts, samples: int, seed: int
) -> tuple[Completions, Labelled, np.ndarray]:
    """Completions behind every announcement of every prompt, their labels, and which announcement it was."""
    count = len(prompts.announcements)
    drawn = scorer.sample(model, behind_announcements(prompts), samples, room_behind(prompts), seed)
    k = drawn.context % count
    owned = replace(drawn, context=drawn.context // count)
    policies = list(prompts.suite.policies.values())  # their texts as completions show them
    texts = [(wordings(policies[a.policy]) or ("",))[a.wording] for a in prompts.announcements]
    return drawn, label_completions(scorer, prompts, owned, [texts[i] for i in k]), k


def forced_kl(
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
    drawn, label, k = draw_forced(scorer, after, prompts, samples, seed)
    forced = behind_announcements(prompts)
    log_r, log_s, kl = scorer.compare(after, before, [forced[i] for i in drawn.context], drawn.tokens)
    place = (drawn.context // len(prompts.announcements), owners(prompts)[0][k], owners(prompts)[1][k])
    shown_r, shown_s = (b.forced_behaviour[*place, label.behaviour] for b in (r, s))
    excess = np.where(shown_s < NOVEL, (log_r - log_s) - log_ratio(shown_r, shown_s), 0.0)
    for owner in zip(*owners(prompts), strict=True):
        result[:, *owner], novel[:, *owner] = 0.0, 0.0
    np.add.at(result, place, kl / samples)
    np.add.at(novel, place, excess / samples)
    return result, novel


def forced_sample(
    scorer: Scorer, model: Model, prompts: Prompts, seed: int
) -> tuple[Float[np.ndarray, "prompt known wording behaviour"], Float[np.ndarray, "prompt known wording"]]:
    """Behaviour and correctness with each announcement put in place, from the model's own completions."""
    number, policies, most, behaviours = prompts.shape
    shown = np.full((number, policies - 1, most, behaviours), np.nan)
    correct = np.full((number, policies - 1, most), np.nan)
    if not prompts.announcements:
        return shown, correct
    n = prompts.suite.samples
    drawn, label, k = draw_forced(scorer, model, prompts, n, seed)
    policy, wording = owners(prompts)
    context = drawn.context // len(prompts.announcements)
    shown[:, policy, wording], correct[:, policy, wording] = 0.0, 0.0
    np.add.at(shown, (context, policy[k], wording[k], label.behaviour), 1.0 / n)
    np.add.at(correct, (context, policy[k], wording[k]), label.correct / n)
    return shown, correct
