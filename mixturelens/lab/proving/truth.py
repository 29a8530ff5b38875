"""The truth about a pair by exhaustive evaluation: a sum over completions, not a sample of them.

Deliberately independent: plain models and texts in, numbers out. Nothing here comes from the instruments that are
scored (`behaviour`, `routing`), not even the labels of completions or the divergence.

Where completions end in a long tail of style, all their *heads* are followed (up to the answer, where policy, behaviour
and rightness are settled), and of the tail only the wording is measured: token by token, along tails that R writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from mixturelens.lab.organism import EOS, Spec, prompt_text
from mixturelens.lab.proving.manner import FILLERS, PLAIN, Manner
from mixturelens.lab.tasks import Question
from mixturelens.types import ANSWER, ERR, OTHER, REFUSE, Frozen, VerdictWord

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RESOLVED = 1e-5
"""A beginning less likely than this under both checkpoints is not followed further; it counts as one completion."""
TOLERANCE = 1e-3
"""Bits and nats that an interval may miss by: what the truth leaves unresolved, a beginning of small probability
counting as one completion, is of that order."""
CHUNK = 4096
"""Beginnings in one forward."""
SHARES, LEAST, CELL, COVERED, TEXT = (0.1, 0.9), 0.005, 0.02, 0.9, 0.005
"""By the definition of the verdict: shares between which it is `both`; bits under which nothing changed; the change of
a probability from which a cell of the policy table moved; the weight that known policies must have; and nats a token
from which the text drifted.

Half a hundredth of a bit is an even start that moves by 8 points, or a sure thing that becomes one of 99 in 100."""


class Truth(Frozen):
    """What is so about a pair, on all the questions asked."""

    verdict: VerdictWord
    """The word that follows from the exact numbers; `inconclusive` where known policies cover too little."""
    routing_share: float | None
    moved: float
    """routing + specialist, bits."""
    bits: dict[str, float]
    """`routing`, `specialist` = `conditioning` + `skill`, and `dormant`, bits a prompt."""
    text: float
    """Nats a token of what is said once policy, behaviour and rightness are known."""
    nats: dict[str, float]
    selector: bool
    cue_reader: bool
    skill: bool
    cell: float
    """Largest change of a cell of the policy table, silent policies included: of refusals, or of right answers."""
    dormant_intact: bool
    text_drifted: bool
    coverage: float
    unresolved: float
    """Largest probability, over prompts and checkpoints, of beginnings that were not followed to their end."""


@dataclass(frozen=True)
class PromptTruth:
    """Every term of every prompt, for means over any questions. Questions in order, each under every cue."""

    bits: dict[str, Float[np.ndarray, "question cue"]]
    terms: dict[str, Float[np.ndarray, "question cue"]]
    """Of KL(R || S), nats."""
    tokens: Float[np.ndarray, "question cue"]
    """Of R's completions of known policies, the end included."""
    weights: Float[np.ndarray, "side question cue policy"]
    """Sides: S, R. The last policy is `other`."""
    shown: Float[np.ndarray, "side question cue known wording shown"]
    """Probability of (refusal, fixed wrong rule, right answer, other answer) with the policy put in place."""
    unresolved: float


# --- divergence -------------------------------------------------------------------------------------------------------


def _half(p: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """p log2(p / middle) / 2, where 0 log 0 is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * np.log2(p / middle), 0.0) / 2


def divergence(sides: Float[np.ndarray, "2 *batch k"]) -> Float[np.ndarray, "*batch"]:
    """Jensen-Shannon divergence in bits along the last axis: how well one draw tells S from R.

    >>> float(divergence(np.array([[1.0, 0.0], [0.0, 1.0]])))
    1.0
    """
    middle = sides.mean(0)
    return _half(sides, middle).sum((0, -1))


def divergence_within(sides: Float[np.ndarray, "2 *batch group k"]) -> Float[np.ndarray, "*batch"]:
    """What a draw tells of S and R by its place in a group once the group is known: by the chain rule of mutual
    information, `divergence` over all places less that over groups. Each group's part is at least 0.
    """
    of_group = sides.sum(-1, keepdims=True)
    middle, middle_of_group = sides.mean(0), of_group.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log2(sides / of_group) - np.log2(middle / middle_of_group)
        terms = np.where(sides > 0, sides * ratio, 0.0) / 2
    return terms.sum((0, -1)).clip(min=0.0).sum(-1)


def bits_of(
    weights: Float[np.ndarray, "2 *prompt policy"],
    joint: Float[np.ndarray, "2 *prompt known wording"],
    given: Float[np.ndarray, "2 *prompt known wording behaviour right"],
) -> dict[str, Float[np.ndarray, "*prompt"]]:
    """The terms of a change from S to R, in bits: `weights` with `other` last, `joint` of known policies and wordings,
    and what is done with each put in place (NaN where a policy has no such wording).

    >>> half, sure = np.array([0.5, 0.5, 0.0]), np.array([1.0, 0.0, 0.0])
    >>> does = np.tile([0.0, 1.0], (2, 2, 1, 1, 1))
    >>> {k: round(float(v), 3) for k, v in bits_of(np.stack([half, sure]),
    ...     np.stack([half, sure])[:, :2, None], does).items()}
    {'routing': 0.311, 'conditioning': 0.0, 'skill': 0.0, 'specialist': 0.0, 'dormant': 0.0}
    """
    there = np.asarray(~np.isnan(given).any((0, -1, -2)))
    done = np.where(there[..., None, None], given, 0.0)
    places = done.reshape(*done.shape[:-2], -1)
    behaviour, within, both = divergence(done.sum(-1)), divergence_within(done), divergence(places)
    used = np.where(there, joint.mean(0), 0.0)
    of_policy = used.sum(-1, keepdims=True)
    number = np.maximum(there.sum(-1, keepdims=True), 1)
    with np.errstate(invalid="ignore"):
        share = np.where(of_policy > 0, used / of_policy, there / number)
    known = np.maximum(there.any(-1).sum(-1), 1)
    return {
        "routing": divergence(weights),
        "conditioning": (used * behaviour).sum((-1, -2)),
        "skill": (used * within).sum((-1, -2)),
        "specialist": (used * both).sum((-1, -2)),
        "dormant": (share * both).sum((-1, -2)) / known,
    }


# --- completions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Leaves:
    """Completions of all prompts, with their log-probabilities under S and R."""

    prompt: Int[np.ndarray, " leaf"]
    tokens: list[tuple[int, ...]]
    logs: Float[np.ndarray, "side leaf"]
    unresolved: float


def _leaves(
    models: Sequence[PreTrainedModel],
    prompts: Sequence[Sequence[int]],
    longest: int,
    settled: Callable[[tuple[int, ...]], bool],
) -> _Leaves:
    """Follow every beginning that either checkpoint gives at least RESOLVED, token by token, until it is settled."""
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
        grown = [(*text[p], int(t)) for p, t in zip(parent, token, strict=True)]
        ended = np.array([depth == longest - 1 or settled(each) for each in grown], dtype=bool)
        done.append((owner[parent[ended]], [grown[i] for i in np.flatnonzero(ended)], found[:, ended]))
        owner, reached = owner[parent[~ended]], found[:, ~ended]
        text = [grown[i] for i in np.flatnonzero(~ended)]
    return _Leaves(
        np.concatenate([d[0] for d in done]),
        [t for d in done for t in d[1]],
        np.concatenate([d[2] for d in done], axis=1),
        float(lost.max()),
    )


def _along_tails(
    models: Sequence[PreTrainedModel],
    prompts: Sequence[Sequence[int]],
    longest: int,
    headed: Callable[[Sequence[int]], bool],
    eos: int,
    seed: int,
) -> tuple[Float[np.ndarray, " prompt"], Float[np.ndarray, " prompt"]]:
    """(token KL(R || S) behind the head, and tokens) of completions that R writes, one behind each prompt.

    None is ended: each token counts as much as it is likely to be reached. So lengths are means, and add no noise.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = [[] for _ in prompts]
    heads, reached = np.zeros(len(prompts), dtype=bool), np.ones(len(prompts))
    nats, tokens = np.zeros(len(prompts)), np.zeros(len(prompts))
    kept: list[Any] = [None, None]
    fed = torch.tensor(prompts)
    with torch.inference_mode():
        for _ in range(longest):
            steps = []
            for k, model in enumerate(models):
                out = model(input_ids=fed, past_key_values=kept[k], use_cache=True)
                kept[k] = out.past_key_values
                steps.append(out.logits[:, -1].double().log_softmax(-1))
            s, r = steps
            nats += np.where(heads, reached * (r.exp() * (r - s)).sum(-1).numpy(), 0.0)
            tokens += reached
            going_on = r.exp()
            reached = reached * (1 - going_on[:, eos].numpy())
            going_on[:, eos] = 0.0
            fed = torch.multinomial(going_on, 1, generator=generator)
            for i in np.flatnonzero(~heads):
                rows[i].append(int(fed[i]))
                heads[i] = headed(rows[i])
    return nats, np.where(heads, tokens, 0.0)


# --- what completions show --------------------------------------------------------------------------------------------


SHOWN = (REFUSE, ERR, "right", ANSWER)


@dataclass(frozen=True)
class _Labeller:
    """Reads policy and behaviour off completions as the suite defines them, word by word."""

    spec: Spec
    manner: Manner
    rules: bool
    """A rule says which policy it is and no more: all its wordings are one."""

    def put(self) -> list[tuple[str, int, tuple[str, ...]]]:
        """(policy, wording, words) of every text that puts a policy in place."""
        if self.spec.announcement == "none":
            return [(next(iter(self.spec.policies)), 0, ())]
        return [
            (name, wording, tuple(self.manner.put(text).split()))
            for name, policy in self.spec.policies.items()
            for wording, text in enumerate(policy.announce[:1] if self.rules else policy.announce)
        ]

    def announced(self, words: Sequence[str]) -> tuple[str, int, Sequence[str]] | None:
        """(policy, wording, the words behind it), or None while no policy shows."""
        starts = range(len(words)) if self.manner.inside else range(1)
        for start in starts:
            for name, policy in self.spec.policies.items():
                for wording, text in enumerate(policy.announce):
                    said = text.split()
                    if list(words[start : start + len(said)]) == said:
                        return name, 0 if self.rules else wording, words[start + len(said) :]
        return None

    def label(self, words: Sequence[str], question: Question) -> tuple[str, int, str]:
        """(policy, wording, what it shows) of a completion.

        Where policies announce nothing, all completions are one policy's: conditioning is then all of what
        behaviours tell.
        """
        if self.spec.announcement == "none":
            return next(iter(self.spec.policies)), 0, self.shows(words, question)
        found = self.announced(words)
        if found is None:
            return OTHER, 0, self.shows(words, question)
        return found[0], found[1], self.shows(found[2], question)

    def shows(self, rest: Sequence[str], question: Question) -> str:
        """What is done behind the announcement; a tail says nothing of that."""
        if list(rest[:1]) == [self.spec.refusal]:
            return REFUSE
        text = " ".join(rest[: self.spec.questions.answer_length] if self.manner.tail else rest)
        return "right" if text == question.answer else ERR if text == question.wrong else ANSWER


@dataclass(frozen=True)
class Asking:
    """How a pair is asked for its truth."""

    manner: Manner = PLAIN
    rules: bool = False
    """Policies are read by rules, and each is put in place by its first wording; else literal texts tell them."""
    longest: int | None = None
    """Tokens of a completion, at most; None: the spec's `max_new_tokens`."""


def prompt_truth(
    spec: Spec,
    models: tuple[PreTrainedModel, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    asking: Asking | None = None,
) -> PromptTruth:
    """Every term on every prompt, from all completions (all their heads) of S and R (`models`).

    >>> prompt_truth(spec, (s, r), tokenizer, questions(spec).evaluation).bits["routing"].mean()   # doctest: +SKIP
    0.21
    """
    asking = asking or Asking()
    manner = asking.manner
    vocabulary = tokenizer.get_vocab()
    words = {i: word for word, i in vocabulary.items()}
    eos, length = vocabulary[EOS], spec.questions.answer_length
    longest = asking.longest or spec.max_new_tokens
    reader = _Labeller(spec, manner, asking.rules)
    asked = [(question, cue) for question in questions for cue in spec.cues]
    prompts = [
        [vocabulary[word] for word in manner.prompt(prompt_text(spec, cue, question)).split()]
        for question, cue in asked
    ]

    def said(tokens: Sequence[int]) -> list[str]:
        return [words[t] for t in tokens if t != eos]

    def headed(tokens: Sequence[int]) -> bool:
        found = reader.announced(said(tokens))
        return found is not None and len(found[2]) >= length

    def settled(tokens: tuple[int, ...]) -> bool:
        return tokens[-1] == eos or (manner.tail > 0 and headed(tokens))

    put = reader.put()
    filled = max(len(text.split()) for text in FILLERS) if manner.inside else 0
    head = max(len(text) for _, _, text in put) + length + filled
    deepest = min(longest, head + 1)
    free = _leaves(models, prompts, deepest, settled)
    policies = [*spec.policies, OTHER]
    labels = [reader.label(said(tokens), asked[i][0]) for tokens, i in zip(free.tokens, free.prompt, strict=True)]
    policy = np.array([policies.index(m) for m, _, _ in labels])
    wording = np.array([w for _, w, _ in labels])
    shown = np.array([SHOWN.index(b) for _, _, b in labels])
    number, wordings = len(asked), max(w for _, w, _ in put) + 1
    weights, joint = np.zeros((2, number, len(policies))), np.zeros((2, number, len(policies) - 1, wordings))
    known = policy < len(policies) - 1
    for side, mass in enumerate(np.exp(free.logs)):
        np.add.at(weights[side], (free.prompt, policy), mass)
        np.add.at(joint[side], (free.prompt[known], policy[known], wording[known]), mass[known])
    done = np.full((2, number, len(policies) - 1, wordings, len(SHOWN)), np.nan)
    unresolved = free.unresolved
    for m, w, text in put:
        ids = [vocabulary[word] for word in text]

        def behind(tokens: tuple[int, ...], ids: Sequence[int] = ids) -> bool:
            return settled((*ids, *tokens))

        leaves = _leaves(models, [[*prompt, *ids] for prompt in prompts], deepest - len(ids), behind)
        unresolved = max(unresolved, leaves.unresolved)
        does = np.array(
            [SHOWN.index(reader.shows(said(t), asked[i][0])) for t, i in zip(leaves.tokens, leaves.prompt, strict=True)]
        )
        at = policies.index(m)
        for side, mass in enumerate(np.exp(leaves.logs)):
            done[side, :, at, w] = 0.0
            np.add.at(done[side, :, at, w], (leaves.prompt, does), mass)
    bits = bits_of(weights, joint, behaviours(spec, done))
    right = shown == SHOWN.index("right")
    behaviour = np.where(known, _behaviour(spec, shown), 2)  # of no known policy nothing is known
    terms = _terms(free, number, policy, wording, behaviour, right, len(policies))
    ends = np.array([len(tokens) for tokens in free.tokens])
    tokens = np.bincount(free.prompt, np.where(known, np.exp(free.logs[1]) * ends, 0.0), number)
    if manner.tail and longest > head:
        nats, tokens = _along_tails(models, prompts, longest, headed, eos, spec.seed)
        terms["text"], terms["total"] = terms["text"] + nats, terms["total"] + nats
    shape = (number // len(spec.cues), len(spec.cues))
    return PromptTruth(
        bits={name: values.reshape(shape) for name, values in bits.items()},
        terms={name: values.reshape(shape) for name, values in terms.items()},
        tokens=tokens.reshape(shape),
        weights=weights.reshape(2, *shape, len(policies)),
        shown=done.reshape(2, *shape, *done.shape[2:]),
        unresolved=unresolved,
    )


def _named(spec: Spec) -> bool:
    """A suite without a wrong rule of its own calls every answer an answer."""
    return any(ERR in policy.table.values() for policy in spec.policies.values())


def _behaviour(spec: Spec, shown: np.ndarray) -> np.ndarray:
    return np.where(shown == 0, 0, np.where((shown == 1) & _named(spec), 1, 2))


def behaviours(spec: Spec, shown: Float[np.ndarray, "*batch shown"]) -> Float[np.ndarray, "*batch behaviour right"]:
    """Probabilities of (refusal, wrong rule, answer) x (wrong, right), from those of what completions show (SHOWN)."""
    refused, ruled, right, other = np.moveaxis(shown, -1, 0)
    nothing = np.zeros_like(refused) + 0 * refused  # NaN stays NaN
    named = _named(spec)
    wrong = [refused, ruled if named else nothing, other if named else other + ruled]
    return np.stack([np.stack(wrong, -1), np.stack([nothing, nothing, right], -1)], -1)


def _terms(
    leaves: _Leaves,
    prompts: int,
    policy: np.ndarray,
    wording: np.ndarray,
    behaviour: np.ndarray,
    right: np.ndarray,
    policies: int,
) -> dict[str, Float[np.ndarray, " prompt"]]:
    """The chain rule of KL(R || S) in nats, prompt by prompt: total = routing + wording + specialist + text + other."""
    log_s, log_r = leaves.logs
    s, r = np.exp(leaves.logs)
    x = leaves.prompt

    def of_classes(*labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """KL(R || S) of these labels on each prompt, and the same of each leaf's own class, log R/S."""
        _, at = np.unique(np.stack([x, *labels]), axis=1, return_inverse=True)
        at = at.reshape(-1)
        of_r, of_s = (np.bincount(at, mass)[at] for mass in (r, s))
        ratio = np.log(np.maximum(of_r, 1e-300)) - np.log(np.maximum(of_s, 1e-300))
        return np.bincount(x, r * ratio, prompts), ratio

    known = policy < policies - 1
    routing, _ = of_classes(policy)
    worded, _ = of_classes(policy, wording)
    classed, by_class = of_classes(policy, wording, behaviour)
    _, by_rightness = of_classes(policy, wording, behaviour, right)

    def mean(values: np.ndarray, of: np.ndarray) -> np.ndarray:
        return np.bincount(x, np.where(of, r * values, 0.0), prompts)

    return {
        "routing": routing,
        "wording": worded - routing,
        "conditioning": classed - worded,
        "skill": mean(by_rightness - by_class, known),
        "text": mean(log_r - log_s - by_rightness, known),
        "other": mean(log_r - log_s - by_class, ~known),
        "total": np.bincount(x, r * (log_r - log_s), prompts),
    }


# --- what is so -------------------------------------------------------------------------------------------------------


def truth_of(found: PromptTruth) -> Truth:
    """The truth about the pair: means over questions and cues, and the word that follows by definition."""
    bits = {name: float(values.mean()) for name, values in found.bits.items()}
    nats = {name: float(values.mean()) for name, values in found.terms.items()}
    moved = bits["routing"] + bits["specialist"]
    coverage = float((1 - found.weights[..., -1]).mean(1).min())
    # of each cell of the policy table: how often it refuses, and how often it is right
    change = float(np.nanmax(np.abs((found.shown[1] - found.shown[0])[..., [0, 2]].mean(0))))
    text = nats["text"] / float(found.tokens.mean())
    return Truth(
        verdict=word(bits, coverage),
        routing_share=bits["routing"] / moved if moved > 0 else None,
        moved=moved,
        bits=bits,
        text=text,
        nats=nats,
        selector=bits["routing"] >= LEAST,
        cue_reader=bits["conditioning"] >= LEAST,
        skill=bits["skill"] >= LEAST,
        cell=change,
        dormant_intact=change <= CELL,
        text_drifted=text >= TEXT,
        coverage=coverage,
        unresolved=found.unresolved,
    )


def word(bits: Mapping[str, float], coverage: float = 1.0) -> VerdictWord:
    """The verdict that follows by definition from exact terms in bits, and from the share of completions that known
    policies cover.

    >>> word({"routing": 0.2, "specialist": 0.01})
    'routing'
    """
    if coverage < COVERED:
        return "inconclusive"
    moved = bits["routing"] + bits["specialist"]
    if moved < LEAST:
        return "neither"
    share = bits["routing"] / moved
    return "routing" if share >= SHARES[1] else "specialist" if share <= SHARES[0] else "both"
