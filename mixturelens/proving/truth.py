"""The truth about a pair by exhaustive evaluation: a sum over completions, not a sample of them.

Deliberately independent: plain models and texts in, numbers out. Nothing here comes from the instruments that are
scored (`behaviour`, `routing`), not even the labels of completions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from mixturelens.organism import EOS, Spec, prompt_text
from mixturelens.tasks import Question
from mixturelens.types import ANSWER, ERR, OTHER, REFUSE, Frozen, VerdictWord

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RESOLVED = 1e-5
"""A beginning less likely than this under both checkpoints is not followed further; it counts as one completion."""
TOLERANCE = 1e-3
"""Nats that an interval may miss by: what the truth leaves unresolved, a beginning of small probability counting as one
completion, is of that order."""
CHUNK = 4096
"""Beginnings in one forward."""
SHARES, LEAST, CELL, COVERED = (0.1, 0.9), 0.01, 0.02, 0.9
"""By the definition of the verdict: shares between which it is `both`, nats under which nothing changed, the change of
a probability from which a cell of the policy table moved, and the weight that known policies must have."""
NEW = 0.01
"""A behaviour that S shows less often than this leaves no skill to compare."""


class Truth(Frozen):
    """What is so about a pair, on all the questions asked."""

    verdict: VerdictWord
    """The word that follows from the exact numbers; `inconclusive` where known policies cover too little."""
    routing_share: float | None
    moved: float
    """routing + specialist, nats."""
    nats: dict[str, float]
    selector: bool
    cue_reader: bool
    skill: bool
    dormant_intact: bool
    coverage: float
    unresolved: float
    """Largest probability, over prompts and checkpoints, of beginnings that were not followed to their end."""


@dataclass(frozen=True)
class PromptTruth:
    """Every term of every prompt, for means over any questions. Questions in order, each under every cue."""

    terms: dict[str, Float[np.ndarray, "question cue"]]
    weights: Float[np.ndarray, "side question cue policy"]
    """Sides: S, R. The last policy is `other`."""
    shown: Float[np.ndarray, "side question cue policy behaviour"]
    """Probability of (refusal, fixed wrong rule, right answer, other answer) given the policy."""
    unresolved: float


@dataclass(frozen=True)
class _Leaves:
    """Completions of all prompts, with their log-probabilities under S and R."""

    prompt: Int[np.ndarray, " leaf"]
    tokens: list[tuple[int, ...]]
    logs: Float[np.ndarray, "side leaf"]
    unresolved: float


def _leaves(models: Sequence[PreTrainedModel], prompts: Sequence[Sequence[int]], longest: int, eos: int) -> _Leaves:
    """Follow every beginning that either checkpoint gives at least RESOLVED, token by token."""
    import torch

    owner = np.arange(len(prompts))
    text: list[tuple[int, ...]] = [()] * len(prompts)
    reached = np.zeros((2, len(prompts)))
    done: list[tuple[np.ndarray, list[tuple[int, ...]], np.ndarray]] = []
    lost = np.zeros((2, len(prompts)))
    for depth in range(longest):
        if not len(owner):
            break
        ids = torch.tensor([[*prompts[i], *t] for i, t in zip(owner.tolist(), text, strict=True)])
        with torch.inference_mode():
            steps = [
                torch.cat(
                    [
                        model(input_ids=part, attention_mask=torch.ones_like(part), use_cache=False)
                        .logits[:, -1]
                        .double()
                        .log_softmax(-1)
                        for part in ids.split(CHUNK)
                    ]
                ).numpy()
                for model in models
            ]
        logs = reached[:, :, None] + np.stack(steps)
        parent, token = np.nonzero(logs.max(0) >= np.log(RESOLVED))
        found = logs[:, parent, token]
        # what is left of each beginning, as one completion of its own
        rest = np.exp(reached) - np.stack([np.bincount(parent, np.exp(f), len(owner)) for f in found])
        left = rest.max(0) > 0
        for side in range(2):
            np.add.at(lost[side], owner[left], np.maximum(rest[side][left], 0.0))
        done.append((owner[left], [text[i] for i in np.flatnonzero(left)], np.log(np.maximum(rest[:, left], 1e-30))))
        ended = (token == eos) | (depth == longest - 1)
        grown = [(*text[p], int(t)) for p, t in zip(parent, token, strict=True)]
        done.append((owner[parent[ended]], [grown[i] for i in np.flatnonzero(ended)], found[:, ended]))
        owner, reached = owner[parent[~ended]], found[:, ~ended]
        text = [grown[i] for i in np.flatnonzero(~ended)]
    return _Leaves(
        np.concatenate([d[0] for d in done]),
        [t for d in done for t in d[1]],
        np.concatenate([d[2] for d in done], axis=1),
        float(lost.max()),
    )


SHOWN = (REFUSE, ERR, "right", ANSWER)


def prompt_truth(
    spec: Spec,
    before: PreTrainedModel,
    after: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
) -> PromptTruth:
    """Every term of KL(R || S) on every prompt, from all completions of at most `spec.max_new_tokens` tokens.

    >>> prompt_truth(spec, s, r, tokenizer, questions(spec).evaluation).terms["routing"].mean()   # doctest: +SKIP
    0.54
    """
    vocabulary = tokenizer.get_vocab()
    words = {i: word for word, i in vocabulary.items()}
    asked = [(question, cue) for question in questions for cue in spec.cues]
    prompts = [[vocabulary[word] for word in prompt_text(spec, cue, question).split()] for question, cue in asked]
    leaves = _leaves((before, after), prompts, spec.max_new_tokens, vocabulary[EOS])
    named = any(ERR in policy.table.values() for policy in spec.policies.values())
    texts = [" ".join(words[t] for t in tokens if words[t] != EOS) for tokens in leaves.tokens]
    labels = [_label(spec, text, asked[i][0]) for text, i in zip(texts, leaves.prompt, strict=True)]
    policies = [*spec.policies, OTHER]
    policy = np.array([policies.index(m) for m, _, _ in labels])
    wording = np.array([w for _, w, _ in labels])
    shown = np.array([SHOWN.index(b) for _, _, b in labels])
    # a suite without a wrong rule of its own calls every answer an answer
    behaviour = np.where(policy == len(policies) - 1, 2, np.where((shown == 1) & named, 1, np.where(shown == 0, 0, 2)))
    return _terms(leaves, len(asked), len(spec.cues), policy, wording, behaviour, shown, len(policies))


def _label(spec: Spec, text: str, question: Question) -> tuple[str, int, str]:
    """(policy, wording, what it shows) of a completion, by reading it from the left.

    Where policies announce nothing, all completions are one policy's: then conditioning is all of KL(behaviours).
    """
    if spec.announcement == "none":
        return next(iter(spec.policies)), 0, _shows(spec, text, question)
    for name, policy in spec.policies.items():
        for wording, announced in enumerate(policy.announce):
            if text == announced or text.startswith(announced + " "):
                return name, wording, _shows(spec, text[len(announced) :].strip(), question)
    return OTHER, 0, _shows(spec, text, question)


def _shows(spec: Spec, rest: str, question: Question) -> str:
    if rest.split()[:1] == [spec.refusal]:
        return REFUSE
    return "right" if rest == question.answer else ERR if rest == question.wrong else ANSWER


def _terms(
    leaves: _Leaves,
    prompts: int,
    cues: int,
    policy: np.ndarray,
    wording: np.ndarray,
    behaviour: np.ndarray,
    shown: np.ndarray,
    policies: int,
) -> PromptTruth:
    log_s, log_r = leaves.logs
    s, r = np.exp(leaves.logs)
    x = leaves.prompt

    def divergence(*labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """KL(R || S) of these labels on each prompt, and the same of each leaf's own class, log R/S."""
        _, at = np.unique(np.stack([x, *labels]), axis=1, return_inverse=True)
        at = at.reshape(-1)
        of_r, of_s = (np.bincount(at, mass)[at] for mass in (r, s))
        ratio = np.log(np.maximum(of_r, 1e-300)) - np.log(np.maximum(of_s, 1e-300))
        return np.bincount(x, r * ratio, prompts), ratio

    known = policy < policies - 1
    routing, _ = divergence(policy)
    worded, by_wording = divergence(policy, wording)
    classed, by_class = divergence(policy, wording, behaviour)
    within = log_r - log_s - by_class
    total = np.bincount(x, r * (log_r - log_s), prompts)
    weights = np.zeros((2, prompts, policies))
    table = np.zeros((2, prompts, policies, len(SHOWN)))
    for side, mass in enumerate((s, r)):
        np.add.at(weights[side], (x, policy), mass)
        np.add.at(table[side], (x, policy, shown), mass)
    table /= np.maximum(weights, 1e-300)[..., None]
    # S's share of the leaf's behaviour, given its policy and wording
    _, stratum = np.unique(np.stack([x, policy, wording]), axis=1, return_inverse=True)
    _, cell = np.unique(np.stack([x, policy, wording, behaviour]), axis=1, return_inverse=True)
    stratum, cell = stratum.reshape(-1), cell.reshape(-1)
    in_s = np.bincount(cell, s)[cell] / np.maximum(np.bincount(stratum, s)[stratum], 1e-300)
    given = r / np.maximum(weights[1][x, policy], 1e-300)
    silent = np.bincount(x, np.where(known, given * (log_r - log_s - by_wording), 0.0), prompts) / (policies - 1)
    terms = {
        "routing": routing,
        "wording": worded - routing,
        "conditioning": classed - worded,
        "skill": np.bincount(x, np.where(known, r * within, 0.0), prompts),
        "novel": np.bincount(x, np.where(known & (in_s < NEW), r * within, 0.0), prompts),
        "other": np.bincount(x, np.where(known, 0.0, r * within), prompts),
        "dormant": silent,
        "total": total,
    }
    shape = (prompts // cues, cues)
    return PromptTruth(
        terms={name: values.reshape(shape) for name, values in terms.items()},
        weights=weights.reshape(2, *shape, policies),
        shown=table.reshape(2, *shape, policies, len(SHOWN)),
        unresolved=leaves.unresolved,
    )


def truth_of(found: PromptTruth) -> Truth:
    """The truth about the pair: means over questions and cues, and the word that follows by definition."""
    nats = {name: float(values.mean()) for name, values in found.terms.items()}
    moved = nats["routing"] + nats["conditioning"] + nats["skill"]
    coverage = float((1 - found.weights[..., -1]).mean(1).min())
    share = nats["routing"] / moved if moved > 0 else None
    floor = max(LEAST, SHARES[0] * moved)
    # of each cell of the policy table: how often it refuses, and how often it is right
    change = np.abs((found.shown[1] - found.shown[0])[..., :-1, [0, 2]].mean(0))
    return Truth(
        verdict=word(nats, coverage),
        routing_share=share,
        moved=moved,
        nats=nats,
        selector=nats["routing"] >= LEAST,
        cue_reader=nats["conditioning"] >= floor,
        skill=nats["skill"] - nats["novel"] >= floor,
        dormant_intact=bool(change.max() <= CELL),
        coverage=coverage,
        unresolved=found.unresolved,
    )


def word(nats: Mapping[str, float], coverage: float = 1.0) -> VerdictWord:
    """The verdict by its definition, of exact numbers.

    >>> word({"routing": 0.5, "conditioning": 0.0, "skill": 0.01})
    'routing'
    """
    if coverage < COVERED:
        return "inconclusive"
    moved = nats["routing"] + nats["conditioning"] + nats["skill"]
    if moved < LEAST:
        return "neither"
    share = nats["routing"] / moved
    return "routing" if share >= SHARES[1] else "specialist" if share <= SHARES[0] else "both"
