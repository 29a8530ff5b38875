"""Prompts as questions times cues, and how often each bootstrap sample draws a question. Numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from mixturelens.behaviour.prompts import Prompts
from mixturelens.stats import resample_counts, resampled_mean


@dataclass(frozen=True)
class Grid:
    """Prompts as questions x cues, so that a question is resampled with all its cues."""

    index: Int[np.ndarray, "question cue"]
    counts: Int[np.ndarray, "draw question"]

    def spread(self, values: Float[np.ndarray, " prompt *rest"]) -> Float[np.ndarray, "question cue *rest"]:
        """Values of the prompts laid out by question and cue; NaN where a question has no prompt under a cue."""
        return np.where(
            (self.index >= 0).reshape(*self.index.shape, *[1] * (values.ndim - 1)), values[self.index], np.nan
        )

    def counts_where(self, values: Float[np.ndarray, " prompt"]) -> Int[np.ndarray, "draw question"]:
        """The draws of as many questions as have a value (not NaN) under some cue, for the interval of these values."""
        return self.counts[:, : int((~np.isnan(self.spread(values))).any(1).sum())]

    def draws(self, values: Float[np.ndarray, " prompt *rest"]) -> Float[np.ndarray, "draw cue *rest"]:
        """Means over questions under each cue in every bootstrap sample; row 0 is the sample itself."""
        return resampled_mean(self.spread(values), self.counts)


def grid_of(prompts: Prompts, seed: int) -> Grid:
    """Lay prompts out by question and cue, and draw the bootstrap samples of their questions."""
    ids = list(dict.fromkeys(row.id for row in prompts.rows))
    cues = prompts.suite.cues
    index = np.full((len(ids), len(cues)), -1)
    position = {question: i for i, question in enumerate(ids)}
    for i, row in enumerate(prompts.rows):
        index[position[row.id], cues.index(row.cue)] = i
    return Grid(index, resample_counts(len(ids), seed))
