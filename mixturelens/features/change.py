"""Which term of the split a change of activations moves: what R has at one site put into S, feature by feature.

Patching across checkpoints (Prakash et al. 2024, arXiv 2402.14811) on the same tokens, at all of them, with behaviour
measured as on any other model. So a feature that RL changed belongs to the selector if its change alone moves the
routing, to the cue reader if it moves the conditioning, to the skill if it moves what is right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mixturelens.behaviour.arrays import Behaviour
from mixturelens.behaviour.bits import bit_terms
from mixturelens.behaviour.grid import Grid, grid_of
from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.literal import literal_behaviour
from mixturelens.behaviour.prompts import Prompts, prepare
from mixturelens.features.activations import up_to
from mixturelens.features.dictionary import Dictionary
from mixturelens.features.effort import share_of
from mixturelens.features.record import MovedFeature, SiteChange, Terms
from mixturelens.features.splice import BothModels, Crossing, Splice, Spliced, but_sinks, own, whole
from mixturelens.hooks.lens import Lens, tokens
from mixturelens.models import end_tokens
from mixturelens.stats import half_of, interval
from mixturelens.suite import Suite
from mixturelens.types import PER_HEAD, InputError, Side, Site

TOP = 8
"""Features that are looked at one by one, at most."""
RANDOM = 12
"""Sets of random other features."""
NEAREST = 8
"""A random feature is drawn from so many that are nearest in strength to the one it stands for."""
QUESTIONS = 48
"""Questions that judge, at most."""
ROWS = 64
"""Texts whose activations are compared at a time."""

# --- terms ------------------------------------------------------------------------------------------------------------


def terms(base: Behaviour, changed: Behaviour, grid: Grid) -> Terms:
    """Bits by which one completion tells `changed` from `base`, term by term: means over prompts, per cue and then over
    cues.

    They are those of `behaviour.bits`, question by question; a behaviour against itself is exactly 0. Without named
    behaviours conditioning and skill cannot be told apart, and are null.
    """
    found = bit_terms(base, changed)

    def over_cues(values: Float[np.ndarray, " prompt"]) -> Float[np.ndarray, " draw"]:
        draws = grid.draws(values)
        asked = ~np.isnan(draws[0])  # a cue that none of these questions has says nothing
        return draws[:, asked].mean(-1) if asked.any() else np.full(len(draws), np.nan)

    routing, conditioning, specialist = map(over_cues, (found.routing, found.conditioning, found.specialist))
    if base.classes.shape[-1] == 1:
        conditioning = np.full_like(specialist, np.nan)
    return Terms(
        routing=interval(routing, grid.counts),
        conditioning=interval(conditioning, grid.counts),
        skill=interval(specialist - conditioning, grid.counts),
        specialist=interval(specialist, grid.counts),
    )


# --- splices ----------------------------------------------------------------------------------------------------------


def of_features(dictionary: Dictionary, units: Sequence[int] | None = None) -> Splice:
    """The splice that puts in the other model's activations of some features (None: of all) and leaves all else, sinks
    of attention among it: x + sum over units of (f(x_other) - f(x)) write.
    """
    device = dictionary.read.device
    part = dictionary if units is None else dictionary.part(torch.tensor(list(units), dtype=torch.long, device=device))

    def splice(mine: Tensor, other: Tensor) -> Tensor:
        return part.moved(mine, part.encode(other) - part.encode(mine))

    return but_sinks(splice)


def elsewhere(dictionary: Dictionary, units: Sequence[int], generator: torch.Generator) -> Splice:
    """A null of `of_features`: the splice by which each of these features changes as much, but writes that along a
    random direction of the same norm.
    """
    part = dictionary.part(torch.tensor(list(units), device=dictionary.read.device))
    drawn = torch.randn(part.write.shape, generator=generator).to(part.write)
    drawn = drawn * part.write.norm(dim=1, keepdim=True) / drawn.norm(dim=1, keepdim=True)
    return of_features(part.writing(drawn))


class Splices:
    """What splices at one place make a model do on these prompts that it does not do as it is: bits from itself.

    What R's features do is judged in S (`into` S, other R); what R does without something of its own, in R:

    Raises InputError for a suite with rules, or a place that does not exist or has no one vector a token.
    """

    def __init__(self, crossing: Crossing, prompts: Prompts, seed: int = 0, base: Behaviour | None = None) -> None:
        if not prompts.suite.literal:
            raise InputError(
                "changes of features are judged by exact probabilities of literal texts; this suite has rules "
                "(policies, behaviours or `answer_match`), whose completions would have to be drawn anew for every "
                "feature"
            )
        into, other, (layer, component) = crossing.into, crossing.other, crossing.at
        if component in PER_HEAD:
            raise InputError(f"L{layer}.{component} has a vector for every head; give a place with one vector a token")
        for lens in (into, other):
            lens.check(Site(layer=layer, component=component))
        vocabulary = into.model.config.get_text_config().vocab_size
        self.scorer = Scorer(end_tokens(into.model, into.tokenizer), vocabulary, into.device)
        self.prompts, self.grid = prompts, grid_of(prompts, seed)
        self.ground = BothModels(into, other, crossing.at, prompts.contexts)
        self.given = base

    def behaviour(self, splice: Splice) -> Behaviour:
        """What the model does on the prompts with this splice in it, from exact probabilities of the suite's texts."""
        return literal_behaviour(self.scorer, Spliced(self.ground, splice), self.prompts)

    @cached_property
    def base(self) -> Behaviour:
        """The model as it is, which is the same at every place."""
        return self.behaviour(own) if self.given is None else self.given

    def terms(self, splices: Sequence[Splice]) -> list[Terms]:
        """For each splice: how far the model with it is from the model as it is, in bits, split by what changed."""
        return [terms(self.base, self.behaviour(splice), self.grid) for splice in splices]


def half_prompts(suite: Suite, tokenizer: Any, which: Literal[0, 1], questions: int | None = None) -> Prompts:
    """Neutral prompts of one half of the suite's questions (`stats.half_of`), or of `questions` of that half, drawn.

    Raises InputError for a suite of one question.
    """
    ids = list(dict.fromkeys(row.id for row in suite.neutral))
    if len(ids) < 2:
        raise InputError("one half of the questions chooses features, the other judges them: give at least two")
    chosen = {ids[i] for i in half_of(len(ids), which, questions)}
    return prepare(suite, [row for row in suite.neutral if row.id in chosen], tokenizer)


# --- what RL changed of the features ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Firing:
    """How features fire in S and in R on the same tokens."""

    rate: Mapping[Side, Float[Tensor, " unit"]]
    """Share of tokens."""
    strength: Mapping[Side, Float[Tensor, " unit"]]
    """Mean activation where it fires; 0 where it never does."""
    moved: Float[Tensor, " unit"]
    """Mean |f_R - f_S| times the norm of what it writes."""
    written: Float[Tensor, " unit"]
    """Mean |f|, over S and R, times that norm."""


def firing(crossing: Crossing, dictionary: Dictionary, prompts: Prompts) -> Firing:
    """How features fire in S (`crossing.into`) and in R on prompts, and on each announcement with the right answer
    behind it (prompts count once).

    Raises InputError if the dictionary does not fit what is there.
    """
    texts, new = [], []
    for context, placed in zip(prompts.contexts, prompts.placed, strict=True):
        for number, each in enumerate(placed):
            texts.append([*context, *each.ids, *(each.answer[0] if each.answer else ())])
            new.append(len(context) if number else 0)
    at, before = crossing.at, crossing.into
    sides: tuple[tuple[Side, Lens], ...] = (("before", before), ("after", crossing.other))
    size = dictionary.read.new_zeros(len(dictionary), dtype=torch.double)
    fires, total, moved, number = {s: size for s, _ in sides}, {s: size for s, _ in sides}, size, 0
    amount = size
    for start in range(0, len(texts), ROWS):
        batch = tokens(texts[start : start + ROWS], before.device)
        first = torch.tensor(new[start : start + ROWS], device=before.device)
        counted = batch.real & (batch.position_ids >= first[:, None])
        found, scale = {}, {}
        for side, lens in sides:
            x = up_to(lens, batch, [at])[at][counted].float()
            if x.shape[-1] != dictionary.read.shape[1]:
                reads = dictionary.read.shape[1]
                raise InputError(f"L{at[0]}.{at[1]} has {x.shape[-1]} numbers a token, where features read {reads}")
            found[side], scale[side] = dictionary.encode(x).double(), dictionary.scale(x).double()
            fires[side] = fires[side] + (found[side] != 0).sum(0)
            total[side] = total[side] + found[side].sum(0)
            amount = amount + (scale[side] * found[side].abs()).sum(0) / 2
        moved = moved + (scale["before"] * (found["after"] - found["before"]).abs()).sum(0)
        number += int(counted.sum())
    norm = dictionary.write.norm(dim=1).double()
    return Firing(
        rate={side: fires[side] / number for side, _ in sides},
        strength={side: total[side] / fires[side].clamp(min=1) for side, _ in sides},
        moved=moved / number * norm,
        written=amount / number * norm,
    )


def matched(
    written: Float[np.ndarray, " unit"], chosen: Sequence[int], sets: int, rng: np.random.Generator
) -> list[list[int]]:
    """Sets of random other units, one for each chosen one, of the NEAREST to it in what they write.

    Units that never fire are no match for anything; no set at all where fewer others fire than are chosen.

    >>> matched(np.array([1.0, 1.0, 5.0, 5.0, 0.0]), [0, 2], 1, np.random.default_rng(0))[0] in ([1, 3], [3, 1])
    True
    """
    others = [unit for unit in np.flatnonzero(written > 0).tolist() if unit not in set(chosen)]
    if not chosen or len(others) < len(chosen):
        return []
    found = []
    for _ in range(sets):
        free, drawn = list(others), []
        for unit in rng.permutation(chosen).tolist():  # whoever comes last has less to choose from
            near = sorted(free, key=lambda other: abs(np.log(written[other] / max(written[unit], 1e-300))))[:NEAREST]
            drawn.append(near[rng.integers(len(near))])
            free.remove(drawn[-1])
        found.append(drawn)
    return found


def site_change(
    crossing: Crossing, dictionary: Dictionary, suite: Suite, seed: int = 0, share: float = 1.0
) -> SiteChange:
    """What RL changed of S's features at one place (`crossing`: from R into S), and which term of the split each change
    moves.

    One half of the questions ranks features by how far they moved; the other half (QUESTIONS of it) judges: S with the
    change of each of the TOP alone, of all of these, of every feature, R's whole activations, and RANDOM nulls: as many
    random other features that write as much, and the changes of the TOP written along random directions.
    Features that did not move at all are not among the TOP. `share`: of questions, features and nulls.
    The same seed gives the same numbers.

    Raises InputError for a suite with rules, a single question, or a dictionary that does not fit the place.
    """
    choose, judge = (
        half_prompts(suite, crossing.into.tokenizer, which, share_of(QUESTIONS, share, 8)) for which in (0, 1)
    )
    nulls = share_of(RANDOM, share)
    fired = firing(crossing, dictionary, choose)
    order = fired.moved.argsort(descending=True, stable=True)[: share_of(TOP, share)].tolist()
    top = [unit for unit in order if float(fired.moved[unit]) > 0]
    random = matched(fired.written.cpu().numpy(), top, nulls // 2, np.random.default_rng(seed))
    generator = torch.Generator().manual_seed(seed)
    splices = [
        *(of_features(dictionary, [unit]) for unit in top),
        of_features(dictionary, top),
        of_features(dictionary),
        whole,
        *(of_features(dictionary, units) for units in random),
        *(elsewhere(dictionary, top, generator) for _ in range(nulls - nulls // 2 if top else 0)),
    ]
    found = Splices(crossing, judge, seed).terms(splices)
    alone, (together, every, everything), chance = found[: len(top)], found[len(top) :][:3], found[len(top) + 3 :]
    sides: tuple[Side, Side] = ("before", "after")
    return SiteChange(
        site=Site(layer=crossing.at[0], component=crossing.at[1]),
        features=tuple(
            MovedFeature(
                index=unit,
                rate={side: round(float(fired.rate[side][unit]), 6) for side in sides},
                strength={side: round(float(fired.strength[side][unit]), 6) for side in sides},
                moved=round(float(fired.moved[unit]), 6),
                terms=each,
            )
            for unit, each in zip(top, alone, strict=True)
        ),
        together=together,
        every=every,
        whole=everything,
        random=tuple(chance),
        questions=len({row.id for row in judge.rows}),
    )
