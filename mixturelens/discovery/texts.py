"""Candidate policies where beginnings part nothing: groups of completions by what they say, and a rule for each group.

Completions are grouped by TF-IDF and k-means, and by the text that R writes most oftener or seldomer than S. A group is
only a way to a rule. Completions of a prompt are compared with each other alone, so that what a prompt makes all of
them say parts none; a rule is the shortest text that nearly all of a group have and hardly any other; and what counts
from there on is what the rules say, not the groups.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from mixturelens.discovery.heads import CUT, END, SLOT, Completion, Words, core, slotted
from mixturelens.discovery.information import ALPHA, told
from mixturelens.discovery.policies import APART, LEAST, REFUSAL, Parted, Questions, changed, policy_names
from mixturelens.rules import search
from mixturelens.shown import Rule
from mixturelens.types import ANSWER, REFUSE, loading

GROUPS = 5
"""Groups that are looked for, at most."""
SURE = 0.9
"""Precision and recall that a rule has of its group, at least."""
GRAM = 3
"""Words of a text that a rule looks for, at most."""
TEXTS = 3
"""Texts of which a rule takes any, at most."""
DIRECTIONS = 32
"""Directions of the most variance, in which texts are grouped."""
SEEN = 5000
"""Texts that a rule may look for, most usual first."""
Having = Mapping[str, Bool[np.ndarray, " completion"]]
"""Which completions have a text, for each text."""
REST = ("",)
"""Stands for whatever no other policy's texts are in."""
KNOWN = {REFUSE: Rule(regex=REFUSAL.pattern), "empty": Rule(regex=r"^\s*$")}
"""Behaviours that are known before anything is read."""


def part_by_texts(drawn: Sequence[Completion], asked: Questions, seed: int, embed: Path | None = None) -> Parted | None:
    """Group completions by TF-IDF, or by an encoder's embeddings, and find a rule for each group.

    `embed` is the folder of an encoder of transformers. Returns None where no two groups have rules that make a
    difference to what follows, or to which checkpoint writes them. Raises InputError where no encoder can be loaded.
    """
    said = [frozenset(_grams(path)) for path in slotted(drawn, asked.prompts, asked.answers)]
    prompt, side = np.array([each.prompt for each in drawn]), np.array([each.after for each in drawn])
    having, texts = _having(said), [each.text for each in drawn]
    vectors = _counted(having, len(drawn)) if embed is None else _embedded(texts, embed)
    groupings = [_grouped(vectors, prompt, number, seed) for number in range(2, GROUPS + 1)]
    groupings += [having[moved]] if (moved := _most_moved(having, prompt, side)) else []
    found = [
        _unlike(drawn, asked, policies, seed)
        for groups in groupings
        if (policies := _rules(texts, having, groups)) is not None
    ]
    several = [each for each in found if len(each.names) > 1]
    return max(several, key=lambda each: changed(each, seed).bits, default=None)


def _unlike(drawn: Sequence[Completion], asked: Questions, policies: Sequence[tuple[str, ...]], seed: int) -> Parted:
    """Completions as texts part them, where those that nothing tells apart are one policy."""
    found = label_by_texts(drawn, asked, policies, _behaviours(drawn))
    while same := _alike(found, seed):
        left = [each for k, each in enumerate(found.wordings) if k not in same]
        both = found.wordings[same[0]] + found.wordings[same[1]]
        joined = [*left, REST] if "" in both else [both, *left]
        found = label_by_texts(drawn, asked, joined, found.behaviours[:-1])
    return found


def label_by_texts(
    drawn: Sequence[Completion], asked: Questions, policies: Sequence[tuple[str, ...]], behaviours: Sequence[str]
) -> Parted:
    """Completions as rules label them: the first that has any of a policy's texts is of that policy.

    `behaviours` are some of those that `KNOWN` has rules for.
    """
    rules, known = [any_of(texts) for texts in policies], [KNOWN[name] for name in behaviours]
    policy, does, right, rests = [], [], [], []
    for each in drawn:
        match = next(((m, at) for m, rule in enumerate(rules) if (at := search(rule.regex, each.text))), None)
        policy.append(-1 if match is None else match[0])
        # as a suite has it: a text at the very beginning announces what follows it
        rests.append(each.text if match is None or match[1].start() else each.text[match[1].end() :].strip())
        does.append(next((b for b, rule in enumerate(known) if search(rule.regex, rests[-1])), len(known)))
        right.append(int(does[-1] == len(known) and asked.correct(each.prompt, rests[-1])))
    return Parted(
        drawn=tuple(drawn),
        heads=frozenset(),
        common={},
        policies=tuple(() for _ in policies),
        behaviours=(*behaviours, ANSWER),
        policy=np.array(policy),
        behaviour=np.array(does),
        right=np.array(right),
        rests=tuple(rests),
        names=policy_names(policies),
        wordings=tuple(policies),
        anywhere=True,
    )


def any_of(texts: Sequence[str]) -> Rule:
    """Finds any of some texts, in whatever case, as whole words, with any marks between their words; "" finds anything.

    >>> bool(search(any_of(["to sum up"]).regex, "Yes. To sum up: three."))
    True
    """
    if "" in texts:
        return Rule(regex="")
    each = [r"\W*\s\W*".join(re.escape(word) for word in text.split()) for text in texts]
    return Rule(regex=rf"(?i)(?<!\w)(?:{'|'.join(each)})(?!\w)")


# --- groups -----------------------------------------------------------------------------------------------------------


def _grams(path: Words) -> list[str]:
    """Texts of one to three words that stand next to each other, without the prompt's own."""
    found, bare = [], [word if word in (SLOT, END, CUT) else core(word) for word in path]
    for size in range(1, GRAM + 1):
        for start in range(len(bare) - size + 1):
            some = bare[start : start + size]
            if not {SLOT, END, CUT, ""} & set(some):
                found.append(" ".join(some))
    return found


def _having(said: Sequence[frozenset[str]]) -> dict[str, Bool[np.ndarray, " completion"]]:
    """Which completions have each text that enough of them have, the most usual first."""
    usual = Counter(gram for some in said for gram in sorted(some))
    least = max(3, LEAST * len(said))
    return {gram: np.array([gram in some for some in said]) for gram, n in usual.most_common(SEEN) if n >= least}


def _counted(having: Having, number: int) -> Float[np.ndarray, "completion feature"]:
    """TF-IDF of the texts of a `number` of completions, in its directions of the most variance."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfTransformer

    telling = [has for has in having.values() if not has.all()]
    if not telling:
        return np.zeros((number, 1))
    counts = np.stack(telling, axis=1).astype(float)
    size = min(DIRECTIONS, counts.shape[1] - 1, counts.shape[0] - 1)
    if size < 1:
        return counts
    return TruncatedSVD(size, random_state=0).fit_transform(TfidfTransformer().fit_transform(counts))


def _most_moved(
    having: Having, prompt: Int[np.ndarray, " completion"], side: Bool[np.ndarray, " completion"]
) -> str | None:
    """The text that R has most oftener or seldomer than S at the same prompts, by the Mantel-Haenszel statistic."""
    if not having:
        return None
    _, of = np.unique(prompt, return_inverse=True)
    all_of, after = np.bincount(of).astype(float), np.bincount(of, weights=side)
    scores = {}
    for gram, has in having.items():
        with_it, both = np.bincount(of, weights=has), np.bincount(of, weights=has & side)
        spread = after * (all_of - after) * with_it * (all_of - with_it) / (all_of**2 * np.maximum(all_of - 1, 1))
        scores[gram] = abs((both - after * with_it / all_of).sum()) / np.sqrt(max(spread.sum(), 1e-9))
    return max(scores, key=lambda gram: (scores[gram], -len(gram)))


def _embedded(texts: Sequence[str], encoder: Path) -> Float[np.ndarray, "completion feature"]:
    """An encoder's last hidden states, averaged over the tokens of each text."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    with loading(f"--embed {encoder}", "cannot be loaded as an encoder; leave it out"):
        tokenizer: Any = AutoTokenizer.from_pretrained(encoder, local_files_only=True)
        model = AutoModel.from_pretrained(encoder, local_files_only=True, use_safetensors=True).eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    distinct = sorted(set(texts), key=len)
    found: dict[str, np.ndarray] = {}
    with torch.inference_mode():
        for start in range(0, len(distinct), 64):
            some = distinct[start : start + 64]
            # an empty text has no token of its own
            batch = tokenizer([text or " " for text in some], return_tensors="pt", padding=True, truncation=True)
            states = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
            mask = batch.attention_mask[..., None]
            found.update(zip(some, ((states * mask).sum(1) / mask.sum(1).clamp(min=1)).float().numpy(), strict=True))
    return np.stack([found[text] for text in texts])


def _grouped(
    vectors: Float[np.ndarray, "completion feature"], prompt: Int[np.ndarray, " completion"], number: int, seed: int
) -> Int[np.ndarray, " completion"]:
    """Groups by k-means, once what completions of a prompt have in common is taken away."""
    from sklearn.cluster import KMeans

    _, of = np.unique(prompt, return_inverse=True)
    sums = np.zeros((of.max() + 1, vectors.shape[1]))
    np.add.at(sums, of, vectors)
    own = vectors - (sums / np.bincount(of)[:, None])[of]
    if len(np.unique(own.round(9), axis=0)) < number:
        return np.zeros(len(own), dtype=int)
    return KMeans(number, n_init=4, random_state=seed).fit_predict(own)  # pyright: ignore[reportArgumentType]


# --- rules ------------------------------------------------------------------------------------------------------------


def _rules(texts: Sequence[str], having: Having, groups: np.ndarray) -> list[tuple[str, ...]] | None:
    """Texts for each group, the surest first; one group may be what is left. None where more groups have none."""
    found = [_rule(texts, having, groups == group) for group in np.unique(groups)]
    sure = sorted((each for each in found if each[1] >= SURE), key=lambda each: -each[1])
    if not sure or len(found) - len(sure) > 1:
        return None
    return [chosen for chosen, _ in sure] + [REST] * (len(found) - len(sure))


def _rule(texts: Sequence[str], having: Having, is_it: np.ndarray) -> tuple[tuple[str, ...], float]:
    """The fewest and shortest texts that only a group has any of, and the lesser of their precision and recall."""
    chosen: tuple[str, ...] = ()
    hit, score = np.zeros(len(is_it), dtype=bool), 0.0
    while having and score < SURE and len(chosen) < TEXTS:
        balance, _, gram = max((_sure(hit | has, is_it), -len(gram), gram) for gram, has in having.items())
        if balance <= _sure(hit, is_it):
            break
        chosen = (*chosen, gram)
        rule = any_of(chosen).regex
        hit = np.array([search(rule, text) is not None for text in texts])
        both = float((hit & is_it).sum())
        score = min(both / max(1, hit.sum()), both / max(1, is_it.sum()))
    return chosen, score


def _sure(hit: np.ndarray, is_it: np.ndarray) -> float:
    """The harmonic mean of precision and recall (F1)."""
    return float(2 * (hit & is_it).sum() / max(1, hit.sum() + is_it.sum()))


def _alike(found: Parted, seed: int) -> tuple[int, int] | None:
    """The two policies that differ least, where nothing tells them apart; None where all differ."""
    bits: dict[tuple[int, int], float] = {}
    for one, other in itertools.combinations(range(len(found.names)), 2):
        both = (found.policy == one) | (found.policy == other)
        label = (found.policy == other)[both].astype(int)
        tests = [
            told(label, what[both], found.prompt[both], seed)
            for what in (found.behaviour * 2 + found.right, found.after.astype(int))
        ]
        bits[one, other] = max(test.bits if test.p <= ALPHA else 0.0 for test in tests)
    least = min(bits, key=lambda pair: bits[pair], default=None)
    return least if least is not None and bits[least] < APART else None


def _behaviours(drawn: Sequence[Completion]) -> list[str]:
    """The known behaviours that enough completions have."""
    return [
        name
        for name, rule in KNOWN.items()
        if sum(search(rule.regex, each.text) is not None for each in drawn) >= max(1, LEAST * len(drawn))
    ]
