"""Is what RL moved the part that reads the hint?  `python -m probes.selector_reads_the_hint RUN`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import numpy as np
from jaxtyping import Float

import mixturelens as ml
from mixturelens.behaviour.harmed import find_harm
from mixturelens.contrasts import checkpoint_contrasts, cue_contrasts, hint_contrasts
from mixturelens.hooks.lens import lens_of
from mixturelens.models import Pair
from mixturelens.patching.sweep import head_sites, patch
from mixturelens.stats import interval, resample_counts
from mixturelens.types import Interval
from probes.contract import Answer, Probe, ProbeRecord, ask, every, main, over, show

LEVEL = 95
"""Percentile of shuffled heads that a rank agreement must pass."""
SHUFFLES = 10_000
_CHANCE = f"rank agreement of shuffled heads, {LEVEL}%"

NAME = "selector_reads_the_hint"
HYPOTHESIS = "RL moves the heads that read the hint: they are the selector, and RL sets it as a hint would."
PREDICTION = (
    "The head that carries most of the hint contrast in S (at the last token of the prompt, on half of the questions) "
    "is in every R also the head at which S's activation undoes most of what RL did (on the other half), and over all "
    f"heads the two rank alike: their rank agreement lies above the {LEVEL}th percentile of shuffled heads."
)
CONTROL = (
    "Heads ranked by the cue contrast (at the policy word) agree less with what undoes RL than heads ranked by the "
    "hint contrast: it is the hint's heads that moved, not just any that matter."
)

Draws = Float[np.ndarray, "draw head"]


def run(run_folder: Path, seed: int = 0) -> ProbeRecord:
    """Raises InputError if the folder holds no finished run, or its suite no hints."""
    return ask(__name__, run_folder, seed, _answer, _clause)


def _clause(pair: str, answer: Answer) -> str:
    here, best = (answer.outcome[key] for key in ("undone at it", "undone at the best other head"))
    agreement, chance = answer.outcome["rank agreement with the hint"], answer.control[_CHANCE]
    return (
        f"in {pair} the hint's first head {answer.sites[0]} undoes {show(here)} of RL and the best other, "
        f"{answer.sites[1]}, {show(best)}; over all heads the ranks agree by {show(agreement)}, where {LEVEL}% of "
        f"shuffled ones stay below {show(chance)}"
    )


def _answer(case: Pair, seed: int) -> Answer:
    harm, suite = find_harm(ml.measure(case)), case.suite
    before, after = lens_of(case, "before"), lens_of(case, "after")
    tokenizer = before.tokenizer
    hint = hint_contrasts(suite, tokenizer, harm.harmed_cue, harm.other, harm.policy)
    cue = cue_contrasts(suite, tokenizer, harm.policy, harm.cues)
    moved = checkpoint_contrasts(suite, tokenizer, harm.harmed_cue, harm.other, harm.policy)
    last, policy = head_sites(before, "last"), head_sites(before, "policy")

    chosen = int(
        patch(before, hint.half(0), last).effects(resample_counts(len(hint.half(0).rows), seed, 1))[0].argmax()
    )
    # each contrast has its own prompts, so that each is resampled on its own
    carries, reads, undoes = (
        patch(lens, contrasts.half(1), sites, before=source).effects(resample_counts(len(contrasts.half(1).rows), at))
        for at, (lens, contrasts, sites, source) in enumerate(
            ((before, hint, last, None), (before, cue, policy, None), (after, moved, last, before)), start=3 * seed
        )
    )
    others = np.delete(undoes, chosen, axis=1)
    best = int(others[0].argmax())
    with_hint, with_cue = _agreement(carries, undoes), _agreement(reads, undoes)
    chance = float(np.percentile(_shuffled(undoes.shape[1], seed), LEVEL))
    outcome = {
        "hint carried by its first head": interval(carries[:, chosen]),
        "undone at it": interval(undoes[:, chosen]),
        "undone at the best other head": interval(others[:, best]),
        "undone at it, less at the best other head": interval(undoes[:, chosen] - others[:, best]),
        "rank agreement with the hint": interval(with_hint),
    }
    control = {
        _CHANCE: Interval(value=chance),
        "rank agreement with the cue": interval(with_cue),
        "agreement with the hint less with the cue": interval(with_hint - with_cue),
    }
    rest = [site for i, site in enumerate(last) if i != chosen]
    return Answer(
        holds=every(
            [
                over(outcome["undone at it, less at the best other head"], 0.0),
                over(outcome["rank agreement with the hint"], chance),
                over(control["agreement with the hint less with the cue"], 0.0),
            ]
        ),
        outcome=outcome,
        control=control,
        sites=(str(last[chosen]), str(rest[best])),
    )


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, centred. Effects are real numbers, so that none are tied."""
    ranks = values.argsort(-1).argsort(-1)
    return ranks - (values.shape[-1] - 1) / 2


def _agreement(x: Draws, y: Draws) -> Float[np.ndarray, " draw"]:
    """Spearman's rank correlation over heads; NaN where an effect was not measured."""
    a, b = _ranks(x), _ranks(y)
    found = (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    return np.where(np.isnan(x + y).any(-1), np.nan, found)


def _shuffled(heads: int, seed: int) -> Float[np.ndarray, " shuffle"]:
    drawn = np.random.default_rng(seed).normal(size=(2, SHUFFLES, heads))
    return _agreement(*drawn)


if __name__ == "__main__":
    main(cast(Probe, sys.modules[__name__]))
