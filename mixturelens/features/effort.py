"""How much is looked at: all of it on small models, less where a model is large or time is short."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mixturelens.models import Pair
from mixturelens.models.cost import Estimate, Size, Work, estimate, said_time, size_of
from mixturelens.spelling import encode_prompts

EXACT = 4e11
"""Operations up to which every unit of a kind is patched; of more, those that slopes nominate."""
SHARES = (1.0, 0.5, 0.25, 0.125)
"""Of the questions, nulls and units that are looked at at most."""
OPERATIONS = 4.5e13
"""What is done at most, unless a time is named: ten minutes of two cores that are not fast."""
ROOM = 300e6
"""Bytes of what is in flight while models run, beside what grows with the suite."""
WIDTH = 4
"""Latents for each dimension, where there are tokens enough."""
STEPS, BATCH = 1200, 1024
"""Of a training, at most."""
EPOCHS, FEWEST = 32, 300
"""How often each token is seen, at most; but so many steps are taken."""
LEAST = 4
TEXTS = 256
"""Prompts to learn features from, and to judge them on, at least, where there are as many."""


def share_of(number: int, share: float, least: int = LEAST) -> int:
    """A share of a number, but not too few.

    >>> share_of(48, 0.25), share_of(12, 0.125), share_of(2, 0.125)
    (12, 4, 2)
    """
    return max(min(number, least), round(number * share))


def texts_of(number: int, share: float) -> int:
    """How many of these prompts features are learnt from, or judged on: they are what takes longest on a large model.

    >>> texts_of(4096, 1.0), texts_of(4096, 0.125), texts_of(60, 0.125)
    (4096, 256, 60)
    """
    return share_of(number, share**2, TEXTS)


@dataclass(frozen=True)
class Training:
    """How a dictionary (an SAE or a crosscoder) is trained: the same values give the same weights."""

    width: int | None = None
    """Features or latents; None: twice as many as an SAE's site has dimensions, four times for a crosscoder."""
    k: float = 8
    """How many of them fire on an average token; of a crosscoder's, a whole number."""
    steps: int = 1200
    batch: int = 1024
    """Rows (tokens) of a step."""
    seed: int = 0


def training(d: int, tokens: int, seed: int = 0) -> Training:
    """How a crosscoder of models `d` wide is trained that learns from so many tokens.

    >>> training(64, 40_000).width, training(576, 4_500).steps
    (256, 300)
    """
    width = WIDTH * d if tokens >= 4 * WIDTH * d else WIDTH * d // 2
    batch = min(BATCH, max(64, 1 << int(tokens // 8).bit_length() - 1))
    return Training(width=width, steps=min(STEPS, max(FEWEST, EPOCHS * tokens // batch)), batch=batch, seed=seed)


@dataclass(frozen=True)
class FeaturePlan:
    """How much is looked at, and what that takes."""

    share: float
    needs: Estimate
    missing: tuple[str, ...] = ()


def make_plan(pair: Pair, teach: int, held_out: int) -> FeaturePlan:
    """The largest share of questions, nulls and units (of SHARES) that the pair's budget of time and memory allows, or,
    without one, OPERATIONS; `teach` and `held_out` are numbers of prompts. Reads configs and tokenizer, no weights.
    """
    plans = [(share, estimate(pair, work_of(pair, teach, held_out, share))) for share in SHARES]
    size = size_of(pair)
    allowed = 60 * pair.budget.minutes if pair.budget.minutes is not None else None

    def fits(share: float, needs: Estimate) -> bool:
        if pair.budget.memory is not None and needs.memory > pair.budget.memory * 1e9:
            return False
        if allowed is not None:
            return needs.seconds <= allowed
        return operations_of(size, work_of(pair, teach, held_out, share)) <= OPERATIONS

    share, needs = next(((share, needs) for share, needs in plans if fits(share, needs)), plans[-1])
    missing = []
    if share < 1:
        missing.append(
            f"features: at most {share:g} of the texts, questions, nulls and latents that are usual were looked at, "
            f"for a model of {size.parameters / 1e6:,.0f} million parameters ({needs})"
        )
    if allowed is not None and needs.seconds > allowed:
        missing.append(f"features: the least there is takes {said_time(needs.seconds)}, and --minutes allows less")
    return FeaturePlan(share, needs, tuple(missing))


def operations_of(size: Size, work: Work) -> float:
    """Floating-point operations that some work takes in a model of this size: two for each parameter and token."""
    return 2.0 * (size.body * (work.tokens + 2 * work.back) + size.unembedding * work.read)


def work_of(pair: Pair, teach: int, held_out: int, share: float) -> Work:
    """What looking at a share of everything takes, in tokens through all layers, and the bytes held meanwhile."""
    suite, size = pair.suite, size_of(pair)
    teach, held_out = (texts_of(number, share) for number in (teach, held_out))
    rows = suite.neutral
    lengths = [len(ids) for ids in encode_prompts(suite, rows[:: max(1, len(rows) // 32)], pair.tokenizer)]
    prompt = sum(lengths) / len(lengths)
    text = prompt + min(suite.max_new_tokens, 32)
    questions, cues = len({row.id for row in rows}), len(suite.cues)
    half = questions / 2

    def few(number: int, least: int = LEAST) -> float:
        return min(half, share_of(number, share, least))

    answers = len(suite.policies) * (len(suite.behaviour_names) + 1)
    asked = prompt + 5 * answers  # a prompt with all that is asked behind it
    texts = teach * (2 * text + text) + held_out * (2 * text + 3 * text)
    judged = 2 * 2 * 2 * min(held_out, share_of(256, share / 4, 16)) * text
    arrived = (3 + math.log2(size.layers)) * few(24, 8) * cues * asked
    tables = 2 * 4 * few(128 if share == 1 else 64, 12) * prompt + half * cues * asked * 2
    clamped = half if share == 1 else few(64, 12)
    random = 4 * share_of(8, share, 2) * few(32, 8) / (clamped * cues)
    clamps = 2 * (7 + random) * clamped * cues * 8 * answers
    changes = 2 * (2 + 0.5 * (share_of(8, share) + share_of(12, share) + 4)) * few(48, 8) * cues * asked
    latents = (2 + 3 * 0.5 * (share_of(24, share) + 2 * share_of(12, share))) * few(24, 8) * cues * asked
    cards = 2 * 3 * few(64, 8) * cues * prompt + 2 * 7 * share_of(32, share, 8) * prompt
    tokens = texts + judged + arrived + tables + clamps + changes + latents + cards
    d, learnt = size.d_model, teach * text
    trained = 2 * 3 * d * 2 * d * max(300 * 512, min(1200 * 1024, 32 * learnt))
    fit = training(d, int(learnt))
    trained += 3 * 4 * 2 * d * (fit.width or WIDTH * d) * fit.steps * fit.batch
    units = 2 * 6 * min(EXACT, 1024 * half * 2 * size.body)
    extra = (trained + units) / (2 * size.body)
    held = ROOM + 4 * d * text * (2 * teach + 3 * held_out) * 2
    held += 4 * 4 * few(128 if share == 1 else 64, 12) * prompt * size.layers * 2 * d
    held += 3 * 4 * 4 * d * 2 * d * 4
    return Work(tokens=tokens + extra, read=tokens / 8, models=2.0, held=held)
