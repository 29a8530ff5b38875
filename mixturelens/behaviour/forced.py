"""Completions and their labels, and what a checkpoint does once an announcement is put in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from mixturelens.behaviour.likelihood import Completions, Model, Scorer
from mixturelens.behaviour.prompts import Prompts, behind_announcements, owners, room_behind
from mixturelens.shown import wordings
from mixturelens.types import OTHER

FORCED_SAMPLES, ENOUGH = 4, 240
"""Completions behind each announcement, for what comes after policy and behaviour: fewer where so many are drawn."""


@dataclass(frozen=True)
class Labelled:
    """Class and correctness of completions, as flat arrays."""

    policy: np.ndarray
    wording: np.ndarray
    behaviour: np.ndarray
    correct: np.ndarray

    def part(self, at: np.ndarray) -> Labelled:
        """The labels of some completions: `at` holds their numbers, or a mask over all of them."""
        return Labelled(self.policy[at], self.wording[at], self.behaviour[at], self.correct[at])


def texts_of(scorer: Scorer, prompts: Prompts, drawn: Completions) -> list[str]:
    """Decode completions, without the end token. A special token in the middle is not nothing: it stays in the text."""
    ids = [tuple(tokens[:-1] if tokens and tokens[-1] in scorer.ends else tokens) for tokens in drawn.tokens]
    distinct = list(dict.fromkeys(ids))
    decoded = prompts.tokenizer.batch_decode([list(each) for each in distinct], skip_special_tokens=False)
    texts = dict(zip(distinct, decoded, strict=True))
    return [texts[each] for each in ids]


def label_completions(
    scorer: Scorer, prompts: Prompts, drawn: Completions, forced: Sequence[str] | None = None
) -> Labelled:
    """Label completions by the rules of the suite.

    `forced[i]` is the announcement that was put before completion i; None where completions are the model's own. Where
    policies announce nothing, every completion is counted under the first policy and wording, and only its behaviour
    and whether it is right mean anything.
    """
    suite = prompts.suite
    policies = [*suite.policies, OTHER]
    names = suite.behaviour_names
    memo: dict[tuple[str, str | None], tuple[tuple[int, int, int], str]] = {}
    right: dict[tuple[str, str], bool] = {}
    found: list[tuple[int, int, int, bool]] = []
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
        if (rest, row.answer) not in right:
            right[rest, row.answer] = suite.correct(rest, row)
        found.append((*label_of, right[rest, row.answer]))
    policy, wording, behaviour, correct = np.array(found, dtype=int).reshape(-1, 4).T
    return Labelled(policy, wording, behaviour, correct.astype(bool))


def draw_forced(
    scorer: Scorer, model: Model, prompts: Prompts, samples: int, seed: int
) -> tuple[Completions, Labelled, np.ndarray]:
    """Draw `samples` completions behind every announcement of every prompt.

    Returns the completions (their `context` counts prompts times announcements), their labels, and the number of the
    announcement that each was drawn behind.
    """
    count = len(prompts.announcements)
    drawn = scorer.sample(model, behind_announcements(prompts), samples, room_behind(prompts), seed)
    k = drawn.context % count
    owned = replace(drawn, context=drawn.context // count)
    policies = list(prompts.suite.policies.values())  # their texts as completions show them
    texts = [(wordings(policies[a.policy]) or ("",))[a.wording] for a in prompts.announcements]
    return drawn, label_completions(scorer, prompts, owned, [texts[i] for i in k]), k


def forced_kl(
    scorer: Scorer, before: Model, after: Model, prompts: Prompts, seed: int
) -> tuple[Float[np.ndarray, "prompt known wording"], Float[np.ndarray, "prompt known wording"]]:
    """How far R parts from S behind each announcement, from completions of R that are drawn there.

    Returns KL(R || S) of what follows the announcement, in nats, and the tokens of announcement and completion
    together; both are means over completions, and NaN where a policy has no such wording.
    """
    number, policies, most, _ = prompts.shape
    result, length = (np.full((number, policies - 1, most), np.nan) for _ in range(2))
    if not prompts.announcements:
        return result, length
    forced = behind_announcements(prompts)
    samples = max(1, min(FORCED_SAMPLES, round(ENOUGH / len(forced))))
    drawn, _, k = draw_forced(scorer, after, prompts, samples, seed)
    _, _, kl = scorer.compare(after, before, [forced[i] for i in drawn.context], drawn.tokens)
    place = (drawn.context // len(prompts.announcements), owners(prompts)[0][k], owners(prompts)[1][k])
    announced = [len(each.ids) for placed in prompts.placed for each in placed]
    for owner in zip(*owners(prompts), strict=True):
        result[:, *owner], length[:, *owner] = 0.0, 0.0
    np.add.at(result, place, kl / samples)
    tokens = [announced[i] + len(each) for i, each in zip(drawn.context, drawn.tokens, strict=True)]
    np.add.at(length, place, np.array(tokens) / samples)
    return result, length


def forced_sample(
    scorer: Scorer, model: Model, prompts: Prompts, seed: int
) -> tuple[Float[np.ndarray, "prompt known wording behaviour"], Float[np.ndarray, "prompt known wording behaviour"]]:
    """Frequencies of behaviours behind each announcement, and of behaviours that are also right, from the model's own
    `suite.samples` completions there. NaN where a policy has no such wording.
    """
    number, policies, most, behaviours = prompts.shape
    shown, right = (np.full((number, policies - 1, most, behaviours), np.nan) for _ in range(2))
    if not prompts.announcements:
        return shown, right
    n = prompts.suite.samples
    drawn, label, k = draw_forced(scorer, model, prompts, n, seed)
    policy, wording = owners(prompts)
    shown[:, policy, wording], right[:, policy, wording] = 0.0, 0.0
    place = (drawn.context // len(prompts.announcements), policy[k], wording[k], label.behaviour)
    np.add.at(shown, place, 1.0 / n)
    np.add.at(right, place, label.correct / n)
    return shown, right
