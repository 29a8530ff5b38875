"""LEACE (Belrose et al. 2023, arXiv 2306.03819) in numbers of float64: of all affine maps after which no linear probe
reads the labels, the one that changes the activations least. It is an oblique projection, so an eraser is also a tuple
of `erase` interventions.

That is proved of the rows it is fitted on. Of others something is left, the more the fewer rows there are for as many
dimensions: `gap_left` says how much.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mixturelens.stats import half_of, interval, share
from mixturelens.types import InputError, Interval, Intervention, Site

VARIANCE = 1e-10
"""Share of the largest variance below which a direction counts as constant (rounding errors of float32)."""
CORRELATION = 1e-4
"""Largest correlation of labels with activations that counts as none."""
FLOOR = 1e-6
"""Of the largest variance: what directions vary at least, for random directions to be drawn from all."""
ERASING = 0.1
"""Share of a gap that must be erased, for what erasing all of it would do to be told from it."""
AGREE = 0.2
"""Share of the gap that one half of the questions reads in itself, which it must read in the other half, too."""
MANY = 10
"""Rows a dimension, from which the covariance is taken as it is."""


@dataclass(frozen=True)
class Eraser:
    """x -> x - sum_i (reads_i . x - offsets_i) vectors_i, with reads_i . vectors_j = 1 where i = j, else 0."""

    vectors: Float[Tensor, "rank d"]
    reads: Float[Tensor, "rank d"]
    offsets: Float[Tensor, " rank"]

    @property
    def rank(self) -> int:
        """How many directions are erased."""
        return len(self.offsets)

    def found(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows rank"]:
        """The concept's coordinates in activations: they have mean 0 on the rows that the eraser was fitted on."""
        return x.double() @ self.reads.T - self.offsets

    def apply(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """Activations without the concept."""
        return (x.double() - self.found(x) @ self.vectors).to(x.dtype)

    def interventions(self, site: Site) -> tuple[Intervention, ...]:
        """The eraser as interventions at a site: one oblique projection a dimension, to be applied in turn."""
        return tuple(
            Intervention(site=site, do="erase", vector=tuple(vector), read=tuple(read), offset=offset)
            for vector, read, offset in zip(
                self.vectors.tolist(), self.reads.tolist(), self.offsets.tolist(), strict=True
            )
        )


def leace(
    x: Float[Tensor, "row d"], labels: Int[Tensor, " row"], question: Int[Tensor, " row"] | None = None
) -> Eraser:
    """Least-squares concept erasure (Belrose et al. 2023, arXiv 2306.03819, theorem 4.3).

    r(x) = x - W^+ P W (x - mean), where W = cov(x)^(-1/2) whitens the activations and P projects on what of the
    whitened activations goes with the labels. Afterwards all classes of these rows have one mean, so no linear probe
    does better than a constant. The rank is the number of classes less one, or less where they do not differ: 0 if
    there is nothing to erase. Directions that are constant over the rows stay as they are.

    Of fewer than MANY rows a dimension the covariance is shrunk (`shrinkage`): that of the rows themselves says too
    little of others. And of two classes what is read and what is removed come from different questions, if `question`
    says which row is whose: the gap between the means of few rows is as much noise as concept, an eraser that reads its
    own noise takes it for the concept, and leaves as much of that. Then the other rows' means are equal on average, and
    these rows' no longer exactly.

    Raises InputError for one class alone.

    >>> x = torch.tensor([[1.0, 5.0], [1.0, 7.0], [3.0, 5.0], [3.0, 7.0]])
    >>> leace(x, torch.tensor([0, 0, 1, 1])).apply(x)[:, 0].tolist()
    [2.0, 2.0, 2.0, 2.0]
    """
    classes = labels.unique()
    if len(classes) < 2:
        raise InputError("a concept to erase needs rows of two classes at least")
    if question is not None and len(classes) == 2 and len(x) < MANY * x.shape[1]:
        crossed = _crossed(x, labels == classes[1], question)
        if crossed is not None:
            return crossed
    space = _Whitened.of(x)
    centred = x.double() - space.mean
    hot = (labels[:, None] == classes).double()
    hot = (hot - hot.mean(0)) / hot.std(0, correction=0)
    together = space.into(hot.T @ centred / len(x)).T
    u, s, _ = torch.linalg.svd(together, full_matrices=False)
    u = torch.where(u.T @ together[:, -1:] < 0, -1.0, 1.0).T * u  # what is read grows towards the last class
    return space.eraser(u[:, (s > CORRELATION).nonzero()[:, 0][: len(classes) - 1]].T)


def _crossed(x: Float[Tensor, "row d"], last: Bool[Tensor, " row"], question: Int[Tensor, " row"]) -> Eraser | None:
    """What one half of the questions reads, and the other half removes; None where they hardly agree on a gap."""
    names = question.unique()
    if len(names) < 2:
        return None
    first, second = (torch.isin(question, names[half_of(len(names), which)]) for which in (0, 1))
    reader, remover = (leace(x[half], last[half].long()) for half in (first, second))
    if not reader.rank or not remover.rank:
        return None
    own, other = (x[half & last].double().mean(0) - x[half & ~last].double().mean(0) for half in (first, second))
    if not reader.reads @ other >= AGREE * (reader.reads @ own):
        return None
    reads = reader.reads / (reader.reads @ remover.vectors.T)
    return Eraser(remover.vectors, reads, reads @ x.double().mean(0))


def random_erasers(x: Float[Tensor, "row d"], rank: int, number: int, seed: int) -> list[Eraser]:
    """Erasers of random directions of the whitened activations, by the formula of `leace`: the null of every erasure.

    They are drawn from all d dimensions, so each removes rank / d of the (whitened) variance on average. Directions in
    which the rows hardly vary count as varying a little: where activations take but two values, as at a tag, a random
    direction among those in which they do vary would be the concept itself.
    """
    space = _Whitened.of(x, least=FLOOR)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(number, x.shape[1], rank, generator=generator, dtype=torch.float64).to(x.device)
    return [space.eraser(directions.T) for directions in torch.linalg.qr(drawn)[0]]


def shrinkage(centred: Float[Tensor, "row d"], variance: Float[Tensor, " rank"]) -> float:
    """How far to move a covariance towards one of equal variance everywhere, from 0 to 1, to be nearest to the truth.

    Nearest on average (Ledoit and Wolf 2004, doi 10.1016/S0047-259X(03)00096-4). `centred` are the rows less their
    mean, and `variance` the eigenvalues of their covariance above 0.

    >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> shrinkage(x, torch.tensor([0.5, 0.5])), shrinkage(x[:2], torch.tensor([1.0]))
    (0.0, 0.0)
    """
    rows, size = centred.shape
    away = float(variance.square().sum() - variance.sum() ** 2 / size)
    noise = float(centred.square().sum(1).square().mean() - variance.square().sum()) / rows
    return min(1.0, max(0.0, noise) / away) if away > 0 else 0.0


def gap_left(
    eraser: Eraser,
    one: Float[Tensor, "question d"],
    other: Float[Tensor, "question d"],
    counts: Int[np.ndarray, "draw question"],
) -> Float[np.ndarray, " draw"]:
    """How much of the gap between the means of two classes an eraser leaves, along the gap: 0 nothing, 1 all of it.

    The result is per bootstrap sample. Rows are those of the same questions in both classes, and none of them fitted
    the eraser. The gap of one question is held against that of others, never against itself: their noise would look
    like a gap. NaN where a sample has one question alone.

    >>> x, y = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    >>> half = Eraser(torch.tensor([[0.5, 0.0]]).double(), torch.tensor([[1.0, 0.0]]).double(), torch.zeros(1).double())
    >>> gap_left(half, x, y, np.ones((1, 2), dtype=int))
    array([0.5])
    """
    gap = one.double() - other.double()
    left = gap - (gap @ eraser.reads.T) @ eraser.vectors
    sums = []
    for each in (left, gap):
        table = (each @ gap.T).cpu().numpy()
        sums.append(((counts @ table) * counts).sum(1) - counts**2 @ np.diag(table))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((counts > 0).sum(1) > 1, sums[0] / sums[1], np.nan)


def behaviour_left(
    left: Float[np.ndarray, " draw"],
    gap: Float[np.ndarray, " draw"],
    counts: Int[np.ndarray, "draw question"],
    digits: int = 10,
) -> Interval:
    """Share of an effect that is left with the concept erased, with an interval that allows for what was not erased.

    If `gap` of the concept is left, and the effect goes by how much of it there is, erasing the rest would leave (left
    - gap) / (1 - gap) of the effect: the interval holds that as well. Where nearly nothing is erased for sure (1 - gap
    may be next to 0) nothing is known of it, and there is no interval.

    >>> every = np.ones((3, 40), dtype=int)
    >>> behaviour_left(np.full(3, 0.4), np.full(3, 0.4), every)
    Interval(value=0.4, low=0.0, high=0.4)
    """
    found = interval(left, counts, digits=digits)
    complete = interval(share(left - gap, 1 - gap, ERASING), counts, digits=digits)
    if found.low is None or found.high is None or complete.low is None or complete.high is None:
        return Interval(value=found.value)
    return Interval(value=found.value, low=min(found.low, complete.low), high=max(found.high, complete.high))


@dataclass(frozen=True)
class _Whitened:
    """The space in which activations vary by 1 in every direction (by 0 where they are constant).

    Of few rows, in few directions: whatever `directions` do not span varies by `rest`, and a covariance of d x d
    numbers is never made.
    """

    mean: Float[Tensor, " d"]
    directions: Float[Tensor, "rank d"]
    deviation: Float[Tensor, " rank"]
    rest: float

    @staticmethod
    def of(x: Float[Tensor, "row d"], least: float | None = None) -> _Whitened:
        """`least`: share of the largest variance that every direction varies by; without it, as few rows suggest."""
        x = x.double()
        rows, size = x.shape
        mean = x.mean(0)
        centred = x - mean
        if rows < size:
            found = torch.linalg.eigh(centred @ centred.T)[1].flip(1)
            directions = torch.linalg.qr(centred.T @ found)[0].T
        else:
            directions = torch.linalg.eigh(centred.T @ centred)[1].flip(1).T
        variance = (centred @ directions.T).square().mean(0)
        # rounding makes constant activations vary, by the last bits of their mean
        top = float(variance.max()) if rows else 0.0
        top = top if top > (1e-7 * float(mean.abs().max())) ** 2 else 0.0
        known = variance > VARIANCE * top if top else torch.zeros_like(variance, dtype=torch.bool)
        directions, variance = directions[known], variance[known]
        if least is not None:
            floor = least * (top or 1.0)
            return _Whitened(mean, directions, variance.clamp(min=floor).sqrt(), floor**0.5)
        if rows < MANY * size:
            shrunk = shrinkage(centred, variance)
            variance = (1 - shrunk) * variance + shrunk * variance.sum() / size
        return _Whitened(mean, directions, variance.sqrt(), 0.0)

    def into(self, x: Float[Tensor, "some d"]) -> Float[Tensor, "some d"]:
        """Differences of activations, in this space."""
        return self._scaled(x, 1 / self.deviation, 1 / self.rest if self.rest else 0.0)

    def eraser(self, directions: Float[Tensor, "rank d"]) -> Eraser:
        """Removes orthonormal directions of this space."""
        reads = self.into(directions)
        return Eraser(self._scaled(directions, self.deviation, self.rest), reads, reads @ self.mean)

    def _scaled(self, x: Float[Tensor, "some d"], by: Float[Tensor, " rank"], rest: float) -> Float[Tensor, "some d"]:
        along = x @ self.directions.T
        return (along * by) @ self.directions + rest * (x - along @ self.directions)
