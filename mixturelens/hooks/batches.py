"""Contrasts as batches of token ids for one model, and the metric that tells their sides apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mixturelens.contrasts import Contrasts
from mixturelens.hooks.lens import Lens, Tokens, tokens
from mixturelens.hooks.metrics import LogOdds, log_odds


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
