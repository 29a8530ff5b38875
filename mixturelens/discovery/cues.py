"""Candidate cues: what about a prompt tells what its completions do, on prompts that it was not chosen on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from mixturelens.discovery.heads import words
from mixturelens.discovery.information import ALPHA, SHUFFLES, information
from mixturelens.discovery.policies import Parted
from mixturelens.stats import interval, resample_counts
from mixturelens.types import Interval

SELDOM, OFTEN = 0.05, 0.95
"""A feature that fewer or more of the prompts have parts nothing."""
LEAST = 0.02
"""Bits a completion that a cue tells, at least."""
SAME = 0.95
"""Correlation over prompts from which two features are one cue."""
TRIED = 40
"""Features that the joint choice is made among: those that tell most by themselves."""
MOST = 5
STRENGTH = 0.02
"""Of the L1 penalty, against a completion's share of the log-likelihood."""
_YEAR = re.compile(r"(?<!\d)(?:1[5-9]|20|21)\d\d(?!\d)")


@dataclass(frozen=True)
class Prompt:
    """A prompt as cues see it: its text, what its system turn says, and fields that its user gave."""

    id: str
    text: str
    system: str = ""
    fields: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Cue:
    """A way to part prompts into kinds, and what it tells of their completions on prompts that did not choose it."""

    kinds: tuple[str, ...]
    """What shows each kind; the last may be `none of these`."""
    of: Int[np.ndarray, " prompt"]
    """The kind of every prompt."""
    bits: Interval
    p: float


def features(prompts: Sequence[Prompt]) -> dict[str, Bool[np.ndarray, " prompt"]]:
    """What each prompt has or has not: name of the feature, in words that a reader understands -> one truth value a
    prompt.

    Features that fewer than SELDOM or more than OFTEN of the prompts have are left out.

    >>> sorted(features([Prompt("1", "<A> two lamps"), Prompt("2", "<B> two lamps")]))
    ['“<A>”', '“<B>”']
    """
    found: dict[str, np.ndarray] = {}
    total = len(prompts)

    def add(name: str, has: Sequence[bool] | np.ndarray) -> None:
        values = np.asarray(has, dtype=bool)
        if SELDOM * total <= values.sum() <= OFTEN * total:
            found.setdefault(name, values)

    spoken = [set(words(prompt.text)) for prompt in prompts]
    for word in sorted(set().union(*spoken)):
        add(f"“{word}”", [word in some for some in spoken])
    for system in sorted({prompt.system for prompt in prompts} - {""}):
        add(f"system: {system[:60]}", [prompt.system == system for prompt in prompts])
    for name in sorted({name for prompt in prompts for name in dict(prompt.fields)}):
        given = [dict(prompt.fields).get(name) for prompt in prompts]
        for value in sorted({each for each in given if each is not None}):
            add(f"{name}: {value}", [each == value for each in given])
    years = [[int(year) for year in _YEAR.findall(prompt.text)] for prompt in prompts]
    distinct = sorted({max(each) for each in years if each})
    for year in distinct[1:]:
        add(f"a year from {year} on", [bool(each) and max(each) >= year for each in years])
        add(f"a year before {year}", [bool(each) and max(each) < year for each in years])
    size = np.array([len(words(prompt.text)) for prompt in prompts])
    add("longer than most", size > np.median(size))
    add("a digit", [any(char.isdigit() for char in prompt.text) for prompt in prompts])
    add("a letter beyond ASCII", [not prompt.text.isascii() for prompt in prompts])
    add("more than a line", ["\n" in prompt.text.strip() for prompt in prompts])
    add("a question mark", ["?" in prompt.text for prompt in prompts])
    return found


def find_cues(
    prompts: Sequence[Prompt], parted: Parted, chosen_on: Bool[np.ndarray, " prompt"], seed: int
) -> tuple[Cue, ...]:
    """The cues that tell most of what completions of these prompts do, the best first.

    Features are chosen on some of the prompts by a sparse logistic regression (L1), and judged on the others. There is
    no cue where shuffled prompts tell as much.
    """
    given = features(prompts)
    counts = _table(parted, len(prompts))
    held = ~chosen_on
    alone = {name: _bits(counts[chosen_on], has[chosen_on].astype(int)) for name, has in given.items()}
    tried = _distinct(given, sorted(given, key=lambda name: (-alone[name], len(name))))
    kept = _sparse(np.stack([given[name] for name in tried], 1), counts, chosen_on) if tried else []
    chosen = sorted((tried[i] for i in kept), key=lambda name: -alone[name])
    found: list[Cue] = []
    taken: set[str] = set()
    for name in chosen:
        if name in taken or len(found) >= MOST:
            continue
        kinds = [name]
        covered = given[name].copy()
        for other in chosen:
            if other not in taken and not (given[other] & covered).any():
                kinds.append(other)
                covered |= given[other]
        taken.update(kinds)
        of = np.full(len(prompts), len(kinds))
        for k, kind in enumerate(kinds):
            of[given[kind]] = k
        labels = tuple(kinds) if covered.all() else (*kinds, "none of these")
        bits, p = _judged(counts[held], of[held], [prompts[i].id for i in np.flatnonzero(held).tolist()], seed)
        if p <= ALPHA and bits.value is not None and bits.value >= LEAST:
            found.append(Cue(labels, of, bits, p))
    return tuple(sorted(found, key=lambda cue: -(cue.bits.value or 0.0)))


def cue_of(
    prompts: Sequence[Prompt], kinds: Sequence[str], of: Int[np.ndarray, " prompt"], parted: Parted, seed: int
) -> Cue | None:
    """The cue whose kinds somebody names, judged by what it tells of completions.

    `of` is the kind of each prompt, by number; prompts of a higher number are of no kind, and are left out. None where
    there are not two kinds.
    """
    if len(kinds) < 2:
        return None
    counts = _table(parted, len(prompts))
    asked = np.flatnonzero((of < len(kinds)) & (counts.sum((1, 2)) > 0)).tolist()
    bits, p = _judged(counts[asked], of[asked], [prompts[i].id for i in asked], seed)
    return Cue(tuple(kinds), of, bits, p)


def _table(parted: Parted, prompts: int) -> np.ndarray:
    """Completions counted: [prompt, side, what they do]."""
    _, does = np.unique(parted.does, return_inverse=True)
    shape = prompts, 2, int(does.max(initial=0)) + 1
    flat = np.ravel_multi_index((parted.prompt, parted.after.astype(int), does), shape)
    return np.bincount(flat, minlength=int(np.prod(shape))).reshape(shape).astype(float)


def _bits(counts: np.ndarray, of: np.ndarray) -> float:
    """I(kind of the prompt; what a completion does | whose it is), in bits a completion."""
    kinds = np.eye(int(of.max(initial=0)) + 1)[of]
    joint = np.einsum("pk,psd->skd", kinds, counts)

    total = joint.sum()
    return float(information(joint)) / total if total else 0.0


def _distinct(given: Mapping[str, np.ndarray], order: Sequence[str]) -> list[str]:
    """The first TRIED features of which no two are the same over prompts."""
    kept: list[str] = []
    for name in order:
        if len(kept) == TRIED:
            break
        has = given[name].astype(float)
        if not any(np.corrcoef(has, given[other])[0, 1] > SAME for other in kept):
            kept.append(name)
    return kept


def _sparse(has: np.ndarray, counts: np.ndarray, chosen_on: np.ndarray) -> list[int]:
    """Features that a logistic regression of what completions do keeps under an L1 penalty."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    rows, labels, weights = [], [], []
    for i in np.flatnonzero(chosen_on).tolist():
        for side in range(2):
            for kind in np.flatnonzero(counts[i, side]).tolist():
                rows.append([*has[i], side])
                labels.append(kind)
                weights.append(counts[i, side, kind])
    if len(set(labels)) < 2:
        return []
    total = float(np.sum(weights))
    model = LogisticRegression(l1_ratio=1.0, C=1 / (STRENGTH * total), solver="saga", max_iter=200, tol=1e-2)
    with warnings.catch_warnings():
        # it chooses, and others judge: a coefficient's third digit does not matter
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(np.array(rows, dtype=float), labels, sample_weight=weights)
    size = np.abs(model.coef_[:, :-1]).max(0)
    return [int(i) for i in np.flatnonzero(size > 1e-3).tolist()]


def _judged(counts: np.ndarray, of: np.ndarray, ids: Sequence[str], seed: int) -> tuple[Interval, float]:
    """Bits beyond those of shuffled prompts, with an interval over questions; how often shuffled ones tell as much."""
    rng = np.random.default_rng(seed)
    found = _bits(counts, of)
    null = np.array([_bits(counts, rng.permutation(of)) for _ in range(SHUFFLES)])
    _, question = np.unique(ids, return_inverse=True)
    draws = resample_counts(int(question.max()) + 1, seed, 200)
    each = np.array([_bits(counts * times[question][:, None, None], of) for times in draws]) - null.mean()
    return interval(each, draws), float((1 + (null >= found - 1e-12).sum()) / (1 + SHUFFLES))
