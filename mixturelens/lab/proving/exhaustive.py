"""All completions of a pair, followed token by token, and what they show: a sum over completions, not a sample of them.

Where completions end in a long tail of style, all their *heads* are followed (up to the answer, where policy, behaviour
and rightness are settled), and of the tail only the wording is measured: token by token, along tails that R writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from mixturelens.lab.organism import EOS, Spec, prompt_text
from mixturelens.lab.proving.manner import FILLERS, PLAIN, Manner
from mixturelens.lab.proving.truth import PromptTruth, bits_of
from mixturelens.lab.tasks import Question
from mixturelens.types import ANSWER, ERR, OTHER, REFUSE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RESOLVED = 1e-5
"""A beginning less likely than this under both checkpoints is not followed further; it counts as one completion."""
CHUNK = 4096
"""Beginnings in one forward."""


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
    """Every term on every prompt, from all completions (all their heads) of S and R (`models`)."""
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
