"""Contrasts as batches of token ids for one model, and the metric that tells their sides apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from mixturelens.contrasts import Contrasts
from mixturelens.hooks.lens import Lens, Tokens, tokens
from mixturelens.hooks.metrics import LogOdds, log_odds
from mixturelens.suite import Suite
from mixturelens.types import InputError

TOLD = 0.5
"""Share of the questions whose completions must begin differently under the two cues, for the first token to tell."""


@dataclass(frozen=True)
class Sides:
    """Clean and corrupt prompts, aligned token by token: one row per question. The metric is of the next token."""

    clean: Tokens
    corrupt: Tokens
    metric: LogOdds
    spans: tuple[Mapping[str, Sequence[int]], ...] = ()
    """Named positions of each row, counted from the start of its clean prompt."""
    shifts: tuple[int, ...] = ()
    """How much further on they are in the corrupt prompt."""

    @property
    def corrupt_spans(self) -> tuple[Mapping[str, Sequence[int]], ...]:
        """Named positions of each row, counted from the start of its corrupt prompt."""
        return tuple(
            {name: [i + shift for i in at] for name, at in spans.items()}
            for spans, shift in zip(self.spans, self.shifts, strict=True)
        )

    def __len__(self) -> int:
        return len(self.clean)

    def part(self, rows: slice | Sequence[int]) -> Sides:
        """Some of the questions, with their prompts, metric, spans and shifts."""
        at = list(range(len(self))[rows]) if isinstance(rows, slice) else list(rows)
        index = torch.tensor(at, device=self.clean.ids.device, dtype=torch.long)
        return Sides(
            self.clean.part(index),
            self.corrupt.part(index),
            LogOdds(self.metric.target[index], self.metric.foil[index]),
            tuple(self.spans[i] for i in at) if self.spans else (),
            tuple(self.shifts[i] for i in at) if self.shifts else (),
        )


def sides(lens: Lens, contrasts: Contrasts) -> Sides:
    """The prompts of contrasts, padded on the left to one width, and the log-odds of their targets against foils."""
    rows = contrasts.rows
    vocabulary = lens.model.config.get_text_config().vocab_size
    width = max(len(side) for row in rows for side in (row.clean, row.corrupt))
    return Sides(
        clean=tokens([row.clean for row in rows], lens.device, width),
        corrupt=tokens([row.corrupt for row in rows], lens.device, width),
        metric=log_odds([row.target for row in rows], [row.foil for row in rows], vocabulary, lens.device),
        spans=tuple(row.spans for row in rows),
        shifts=tuple(row.shift for row in rows),
    )


@torch.inference_mode()
def as_begun(lens: Lens, suite: Suite, contrasts: Contrasts) -> Contrasts:
    """The same contrasts, told by how completions of S (`lens`) begin, where the suite cannot say how they do.

    Of a literal suite, answers and behaviours stand right behind the announcement, and nothing changes. Where they may
    come later, or are rules, the target of each question is the token that S most likely goes on with under the clean
    cue, and its foil the one under the corrupt cue; a question at which both are one token says nothing, and stays.
    Raises InputError if that is so at more than half of the questions.
    """
    if suite.literal:
        return contrasts
    both = sides(lens, contrasts)
    target, foil = (
        [int(lens.run(side.part(torch.tensor([i])))[0, -1].argmax()) for i in range(len(both))]
        for side in (both.clean, both.corrupt)
    )
    told = sum(t != f for t, f in zip(target, foil, strict=True))
    if told < TOLD * len(both):
        raise InputError(
            f"behind the announcement of {contrasts.policy!r}, what S writes begins alike under {contrasts.clean!r} "
            f"and {contrasts.corrupt!r} at {len(both) - told} of {len(both)} questions: the next token does not tell "
            "what it does; give announcements that reach to where the two part"
        )
    rows = zip(contrasts.rows, target, foil, strict=True)
    return replace(contrasts, rows=tuple(replace(row, target=(t,), foil=(f,)) for row, t, f in rows))
