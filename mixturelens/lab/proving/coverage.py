"""Coverage: how often the intervals of the behaviour instrument hold the exhaustive truth, over resampled suites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from mixturelens.behaviour.arrays import BitTerms, Change, NatTerms
from mixturelens.behaviour.averages import bits_of, nats_of
from mixturelens.behaviour.grid import grid_of
from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.measure import measure_change
from mixturelens.behaviour.prompts import prepare
from mixturelens.lab.organism import Spec, prompt_row
from mixturelens.lab.proving.pairs import NEAR
from mixturelens.lab.proving.truth import LEAST, TEXT, PromptTruth
from mixturelens.lab.tasks import Question
from mixturelens.models import end_tokens
from mixturelens.suite import Suite
from mixturelens.types import Frozen, Interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T", BitTerms, NatTerms)

POPULATION, ASKED, SUITES = 250, 80, 1000
"""Questions whose truth is known, those of one suite, and suites. Suites are drawn with replacement."""
REPEATS = 8
"""Independent measurements of the population; a suite takes each question's numbers from any of them, so that the noise
of sampled completions is in the intervals' errors too."""
BOUNDARY = NEAR
"""Shares this near to 0 or 1 lie at a boundary, and so do terms that are as small a share of all that moved; text, as
small a share of what counts as drifted."""
QUANTITIES = ("routing", "conditioning", "skill", "specialist", "dormant", "moved", "routing_share", "text")


class Coverage(Frozen):
    """One quantity of one pair: how often its nominal 95% interval holds the truth."""

    pair: str
    quantity: str
    truth: float
    suites: int
    held: float
    """Share of the suites whose interval holds the truth."""
    above: float
    """Share of the suites whose interval lies above the truth."""
    below: float
    width: float
    """Mean width of the intervals."""
    boundary: bool


@dataclass(frozen=True)
class Population:
    """Questions whose truth is known, of which suites are drawn."""

    spec: Spec
    suite: Suite
    """Says how they are asked; its own prompts are not."""
    questions: Sequence[Question]
    truth: PromptTruth
    """About all of them, in their order."""


def coverage(
    name: str,
    population: Population,
    models: tuple[PreTrainedModel, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Coverage, ...]:
    """How often the intervals of S and R (`models`) hold the truth, over SUITES suites of ASKED questions each, drawn
    from a population. `name` is the pair's.

    Quantities that were never measured are left out.
    """
    spec, suite, exact, (before, after) = population.spec, population.suite, population.truth, models
    rows = tuple(prompt_row(spec, cue, question) for question in population.questions for cue in spec.cues)
    prompts = prepare(suite.model_copy(update={"prompts": rows}), rows, tokenizer)
    scorer = Scorer(end_tokens(before, tokenizer), before.config.vocab_size)
    measured = [measure_change(scorer, before, after, prompts, 100 * k) for k in range(REPEATS)]
    means = {term: float(values.mean()) for term, values in exact.bits.items()}
    means["moved"] = means["routing"] + means["specialist"]
    means["routing_share"] = means["routing"] / means["moved"]
    means["text"] = float(exact.terms["text"].mean() / exact.tokens.mean())
    rng = np.random.default_rng(0)
    cues = len(spec.cues)
    found: dict[str, list[Interval]] = {quantity: [] for quantity in QUANTITIES}
    for number in range(SUITES):
        questions = rng.integers(len(population.questions), size=ASKED)
        at = (questions[:, None] * cues + np.arange(cues)).reshape(-1)
        which = np.repeat(rng.integers(REPEATS, size=ASKED), cues)
        change = _mixed(measured, which, at)
        drawn = [
            rows[i].model_copy(update={"id": f"{place // cues}"}) for place, i in enumerate(at)
        ]  # a question drawn twice counts twice
        grid = grid_of(replace(prompts, rows=tuple(drawn)), seed=number)
        bits, _, shares = bits_of(change.bits, grid, suite, None)
        _, _, text = nats_of(change, grid, suite, None)
        measured_here = {**dict(bits), **shares, "text": text.nats_per_token}
        for quantity in QUANTITIES:
            found[quantity].append(measured_here[quantity])
    # what is said where R errs and S never did has nothing to be compared with; of literals, few questions are asked it
    if suite.literal or means["skill"] >= LEAST:
        del found["text"]
    return tuple(
        _held(name, quantity, means[quantity], means["moved"], intervals)
        for quantity, intervals in found.items()
        if all(each.measured for each in intervals)
    )


def _mixed(measured: Sequence[Change], which: np.ndarray, at: np.ndarray) -> Change:
    """Prompts of a suite, each with the numbers of one of the measurements."""

    def of(kind: type[T], unit: str) -> T:
        parts = {
            field.name: np.stack([getattr(getattr(each, unit), field.name) for each in measured])[which, at]
            for field in fields(kind)
        }
        return kind(**parts)

    return replace(measured[0], bits=of(BitTerms, "bits"), nats=of(NatTerms, "nats"))


def _held(pair: str, quantity: str, truth: float, moved: float, intervals: Sequence[Interval]) -> Coverage:
    low, high = (np.array([getattr(each, end) for each in intervals], dtype=float) for end in ("low", "high"))
    edge = truth <= BOUNDARY * (TEXT if quantity == "text" else moved)
    if quantity == "routing_share":
        edge = min(truth, 1 - truth) <= BOUNDARY
    return Coverage(
        pair=pair,
        quantity=quantity,
        truth=truth,
        suites=len(intervals),
        held=float(((low <= truth) & (truth <= high)).mean()),
        above=float((low > truth).mean()),
        below=float((high < truth).mean()),
        width=float((high - low).mean()),
        boundary=edge,
    )
