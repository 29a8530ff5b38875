"""How alike two circuits are: the edges that are among the strongest of both."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from torch import Tensor

from mixturelens.contrasts import Kind
from mixturelens.stats import interval, resample_counts, resampled_mean
from mixturelens.types import Frozen, Interval

COMPARED = (10, 20, 50, 100)
"""Sizes at which two circuits are compared."""
MOST = 0.4
"""Share of all edges up to which it says anything that two circuits share them."""


class Overlap(Frozen):
    """How many of their strongest edges the circuits of two checkpoints share, on the same contrasts."""

    kind: Kind
    left: str
    right: str
    size: int
    jaccard: Interval
    """Shared edges over edges of either: 1 if the two are the same."""
    chance: float
    """What two random circuits of this size share."""


def overlaps(kind: Kind, found: Mapping[str, Float[Tensor, "row edge"]], seed: int, draws: int) -> list[Overlap]:
    """Every two checkpoints: the Jaccard index of their strongest edges, resampled over questions."""
    names = list(found)
    result = []
    for i, left in enumerate(names):
        for right in names[i + 1 :]:
            flat = [found[name] for name in (left, right)]
            edges = flat[0].shape[1]
            counts = resample_counts(len(flat[0]), seed, draws=draws)
            means = [np.abs(resampled_mean(each.double().numpy(), counts)) for each in flat]
            for size in COMPARED:
                if size > MOST * edges:
                    continue
                tops = [np.argpartition(-each, size, axis=1)[:, :size] for each in means]
                shared = np.array([len(np.intersect1d(x, y)) for x, y in zip(*tops, strict=True)])
                expected = size * size / edges
                result.append(
                    Overlap(
                        kind=kind,
                        left=left,
                        right=right,
                        size=size,
                        jaccard=interval(shared / (2 * size - shared), counts),
                        chance=round(expected / (2 * size - expected), 6),
                    )
                )
    return result
