"""What a patch is measured by: log-odds between the tokens that follow two behaviours or two policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class LogOdds:
    """log P(any target) - log P(any foil) of the next token, row by row, in nats.

    With one token on each side it is the logit difference. A row without foil is measured by log P(any target).

    >>> odds = log_odds([[0]], [[1]], vocabulary=3)
    >>> odds(torch.tensor([[2.0, 0.5, 9.0]])).tolist()
    [1.5]
    """

    target: Bool[Tensor, "row vocabulary"]
    foil: Bool[Tensor, "row vocabulary"]

    def __call__(
        self, logits: Float[Tensor, "part vocabulary"], rows: Tensor | slice = slice(None)
    ) -> Float[Tensor, " part"]:
        """Of the logits of `rows` (all of them, in order, if not said)."""
        target, foil = self.target[rows], self.foil[rows]
        without = ~foil.any(-1, keepdim=True)
        up, down = (torch.where(chosen, logits, -torch.inf).logsumexp(-1) for chosen in (target, foil | without))
        return up - down


def log_odds(
    target: Sequence[Sequence[int]], foil: Sequence[Sequence[int]], vocabulary: int, device: str = "cpu"
) -> LogOdds:
    """The metric of rows: log-odds of the tokens in `target[i]` against those in `foil[i]`, for row i."""

    def chosen(groups: Sequence[Sequence[int]]) -> Bool[Tensor, "row vocabulary"]:
        result = torch.zeros(len(groups), vocabulary, dtype=torch.bool, device=device)
        for row, group in enumerate(groups):
            result[row, list(group)] = True
        return result

    return LogOdds(chosen(target), chosen(foil))


def to_numpy(values: Tensor) -> np.ndarray:
    """The same numbers on the CPU, in double precision: what is resampled afterwards."""
    return values.double().cpu().numpy()
