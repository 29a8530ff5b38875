"""Does RL make neutral prompts look, inside, like hinted ones? What it added to their activations, beside a hint's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from mixturelens.contrasts import span_positions
from mixturelens.hooks.lens import Lens, tokens
from mixturelens.probing.record import Shift
from mixturelens.spelling import encode_prompts
from mixturelens.stats import interval, resample_counts
from mixturelens.suite import PromptRow, Suite
from mixturelens.types import Component, InputError, Site

DRAWS = 1000
"""Bootstrap samples: each holds the activations of every site."""
HALVES = 200
"""Random halves of the neutral prompts, whose differences are the null."""
NOTHING = 1e-5
"""Length of a mean difference, relative to the activations', from which it is more than rounding."""


def shifts(before: Lens, after: Lens, suite: Suite, policies: tuple[str, str], seed: int = 0) -> tuple[Shift, ...]:
    """The shift of neutral prompts from S to R beside the direction of the hint, behind every layer.

    With `policies` (gained, lost): the shift is the mean over neutral prompts of R's activation less S's, the hint's
    direction the mean of S over prompts with the hint of the first policy less that with the hint of the second; both
    under the suite's trained cue (all cues, if it has none) and over the same questions. Positions are tokens where
    neutral and hinted prompts are aligned, else the spans that all of them have (mean over their tokens) and `last`.
    Sites that no hint can reach, before it, are left out.

    The null is the cosine of the hint's direction with differences between random halves of S's neutral prompts; where
    these do not differ at all, that with random directions. Intervals are over questions.

    Raises InputError if the suite has no neutral and hinted prompts of the same questions.
    """
    kinds, trained_cue = (None, *policies), suite.trained_cue
    asked: dict[tuple[str, str], dict[str | None, PromptRow]] = {}
    for row in (*suite.neutral, *suite.hinted):
        if trained_cue in (None, row.cue) and row.hint in kinds:
            asked.setdefault((row.id, row.cue), {})[row.hint] = row
    cues = suite.cues if trained_cue is None else (trained_cue,)
    whole = {key: rows for key, rows in asked.items() if len(rows) == len(kinds)}
    questions = [q for q in dict.fromkeys(q for q, _ in whole) if all((q, cue) in whole for cue in cues)]
    if not questions:
        raise InputError(
            "no hints: the direction of a hint needs prompts of one question without a hint and with the hints "
            f"{policies[0]!r} and {policies[1]!r}" + ("" if trained_cue is None else f" under cue {trained_cue!r}")
        )
    rows = {kind: [whole[q, cue][kind] for q in questions for cue in cues] for kind in kinds}
    places = _positions(before, suite, rows)
    if not places:
        raise InputError("neutral and hinted prompts share no position: name spans that all of them have")
    names = list(places[None][0])

    def means(lens: Lens, kind: str | None) -> Float[np.ndarray, "question site d"]:
        found = _activations(lens, suite, rows[kind], places[kind], names)
        return found.reshape(len(questions), len(cues), *found.shape[1:]).mean(1)

    s, r, gained, lost = means(before, None), means(after, None), *(means(before, each) for each in policies)
    counts = resample_counts(len(questions), seed, DRAWS)
    weights = counts / counts.sum(1, keepdims=True)
    halves = _halves(len(questions), seed)
    by_chance = np.random.default_rng(seed).normal(size=(HALVES, s.shape[-1]))
    result = []
    for at in range(s.shape[1]):
        moved, hint = weights @ (r[:, at] - s[:, at]), weights @ (gained[:, at] - lost[:, at])
        least = NOTHING * float(np.linalg.norm(s[:, at], axis=-1).mean())
        if np.linalg.norm(hint[0]) < least:
            continue
        null = halves @ s[:, at]
        null = null[np.linalg.norm(null, axis=-1) > least]
        along = (moved * hint).sum(-1)
        length, own = (np.linalg.norm(each, axis=-1) for each in (moved, hint))
        with np.errstate(invalid="ignore", divide="ignore"):
            # a shift of no length has no direction: not measured
            cosine = np.where(length > least, along / (length * own), np.nan)
        result.append(
            Shift(
                site=Site(layer=at // len(names), component="resid_post", position=names[at % len(names)]),
                cosine=interval(cosine, counts, digits=6),
                along=interval(along / own**2, counts, digits=6),
                null=round(float(np.percentile(_cosines(null if len(null) else by_chance, hint[0]), 95)), 6),
            )
        )
    return tuple(result)


def _cosines(rows: Float[np.ndarray, "row d"], direction: Float[np.ndarray, " d"]) -> Float[np.ndarray, " row"]:
    return np.abs(rows @ direction) / (np.linalg.norm(rows, axis=-1) * np.linalg.norm(direction))


def _halves(questions: int, seed: int) -> Float[np.ndarray, "half question"]:
    """Weights whose product with activations is the difference between the means of two random halves."""
    rng = np.random.default_rng(seed)
    size = max(1, questions // 2)
    result = np.zeros((HALVES, questions))
    for weights in result:
        order = rng.permutation(questions)
        weights[order[:size]] = 1 / size
        weights[order[size:]] = -1 / max(1, questions - size)
    return result


Places = dict[str | int, tuple[int, ...]]


def _positions(lens: Lens, suite: Suite, rows: dict[str | None, list[PromptRow]]) -> dict[str | None, list[Places]]:
    """kind -> for each prompt, its tokens at every position that all prompts have."""
    found: dict[str | None, list[tuple[int, dict[str, tuple[int, ...]]]]] = {}
    for kind, some in rows.items():
        ids = encode_prompts(suite, some, lens.tokenizer)
        found[kind] = [
            (len(each), {k: v for k, v in span_positions(suite, row, lens.tokenizer).items() if v})
            for each, row in zip(ids, some, strict=True)
        ]
    every = [each for some in found.values() for each in some]
    if all(each == every[0] for each in every):
        return {kind: [{at: (at,) for at in range(length)} for length, _ in some] for kind, some in found.items()}
    shared = [name for name in every[0][1] if all(name in spans for _, spans in every)]
    return {
        kind: [{**{name: spans[name] for name in shared}, "last": (length - 1,)} for length, spans in some]
        for kind, some in found.items()
    }


def _activations(
    lens: Lens, suite: Suite, rows: Sequence[PromptRow], places: Sequence[Places], names: Sequence[str | int]
) -> Float[np.ndarray, "row site d"]:
    """Behind every layer (outer) and at every position (inner), averaged over the tokens of a span."""
    batch = tokens(encode_prompts(suite, rows, lens.tokenizer), lens.device)
    keys: list[tuple[int, Component]] = [(layer, "resid_post") for layer in range(lens.layers)]
    found, _ = lens.capture(batch, keys)
    skip = (~batch.real).sum(1).tolist()
    mix = torch.zeros(len(rows), len(names), batch.ids.shape[1], device=lens.device)
    for row, place in enumerate(places):
        for n, name in enumerate(names):
            mix[row, n, [skip[row] + at for at in place[name]]] = 1 / len(place[name])
    return torch.cat([mix @ found[key].float() for key in keys], 1).double().cpu().numpy()
