"""LEACE (Belrose et al. 2023, arXiv 2306.03819) in numbers of float64: of all affine maps after which no linear probe
reads the labels, the one that changes the activations least. It is an oblique projection, so an eraser is also a tuple
of `erase` interventions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixturelens.types import InputError, Intervention, Site

VARIANCE = 1e-10
"""Share of the largest variance below which a direction counts as constant (rounding errors of float32)."""
CORRELATION = 1e-4
"""Largest correlation of labels with activations that counts as none."""
FLOOR = 1e-6
"""Of the largest variance: what directions vary at least, for random directions to be drawn from all."""


@dataclass(frozen=True)
class Eraser:
    """x -> x - sum_i (reads_i . x - offsets_i) vectors_i, with reads_i . vectors_j = 1 where i = j, else 0."""

    vectors: Float[Tensor, "rank d"]
    reads: Float[Tensor, "rank d"]
    offsets: Float[Tensor, " rank"]

    @property
    def rank(self) -> int:
        return len(self.offsets)

    def found(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows rank"]:
        """What is read of the concept: coordinates with mean 0 on the rows that the eraser was fitted on."""
        return x.double() @ self.reads.T - self.offsets

    def apply(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        return (x.double() - self.found(x) @ self.vectors).to(x.dtype)

    def interventions(self, site: Site) -> tuple[Intervention, ...]:
        """The eraser as values: one oblique projection a dimension, which may be applied one after the other."""
        return tuple(
            Intervention(site=site, do="erase", vector=tuple(vector), read=tuple(read), offset=offset)
            for vector, read, offset in zip(
                self.vectors.tolist(), self.reads.tolist(), self.offsets.tolist(), strict=True
            )
        )


def leace(x: Float[Tensor, "row d"], labels: Int[Tensor, " row"]) -> Eraser:
    """Least-squares concept erasure: r(x) = x - W^+ P W (x - mean), where W = cov(x)^(-1/2) whitens the activations and
    P projects on what of the whitened activations goes with the labels (Belrose et al. 2023, theorem 4.3).

    Afterwards all classes of these rows have one mean, so no linear probe does better than a constant. The rank is the
    number of classes less one, or less where they do not differ: 0 if there is nothing to erase. Directions that are
    constant over the rows stay as they are. Raises InputError for one class alone.

    >>> x = torch.tensor([[1.0, 5.0], [1.0, 7.0], [3.0, 5.0], [3.0, 7.0]])
    >>> leace(x, torch.tensor([0, 0, 1, 1])).apply(x)[:, 0].tolist()
    [2.0, 2.0, 2.0, 2.0]
    """
    classes = labels.unique()
    if len(classes) < 2:
        raise InputError("a concept to erase needs rows of two classes at least")
    space = _Whitened.of(x)
    centred = x.double() - space.mean
    hot = (labels[:, None] == classes).double()
    hot = (hot - hot.mean(0)) / hot.std(0, correction=0)
    together = space.into @ (centred.T @ hot / len(x))
    u, s, _ = torch.linalg.svd(together, full_matrices=False)
    u = torch.where(u.T @ together[:, -1:] < 0, -1.0, 1.0).T * u  # what is read grows towards the last class
    return space.eraser(u[:, (s > CORRELATION).nonzero()[:, 0][: len(classes) - 1]])


def random_erasers(x: Float[Tensor, "row d"], rank: int, number: int, seed: int) -> list[Eraser]:
    """The same formula for random directions of the whitened activations: what erasing any such part does.

    Drawn from all d dimensions, each removes rank / d of the (whitened) variance on average. Directions in which the
    rows hardly vary count as varying a little: where activations take but two values, as at a tag, a random
    direction among those in which they do vary would be the concept itself.
    """
    space = _Whitened.of(x, least=FLOOR)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(number, x.shape[1], rank, generator=generator, dtype=torch.float64).to(x.device)
    return [space.eraser(directions) for directions in torch.linalg.qr(drawn)[0]]


@dataclass(frozen=True)
class _Whitened:
    """The space in which activations vary by 1 in every direction (by 0 where they are constant)."""

    mean: Float[Tensor, " d"]
    into: Float[Tensor, "d d"]
    back: Float[Tensor, "d d"]

    @staticmethod
    def of(x: Float[Tensor, "row d"], least: float = 0.0) -> _Whitened:
        x = x.double()
        mean = x.mean(0)
        centred = x - mean
        variance, directions = torch.linalg.eigh(centred.T @ centred / len(x))
        # rounding makes constant activations vary, by the last bits of their mean
        top = variance[-1].clamp(min=0)
        top = torch.where(top > (1e-7 * mean.abs().max()) ** 2, top, torch.zeros_like(top))
        known = variance > VARIANCE * top if top > 0 else torch.zeros_like(variance, dtype=torch.bool)
        deviation = torch.where(known, variance.clamp(min=0).sqrt(), 0.0)
        if least:
            deviation, known = deviation.clamp(min=(least * (top if top > 0 else 1.0)) ** 0.5), known | True
        inverse = torch.where(known, 1 / deviation.where(known, torch.ones_like(deviation)), 0.0)
        return _Whitened(mean, (directions * inverse) @ directions.T, (directions * deviation) @ directions.T)

    def eraser(self, directions: Float[Tensor, "d rank"]) -> Eraser:
        """Removes orthonormal directions of this space."""
        reads = directions.T @ self.into
        return Eraser(directions.T @ self.back, reads, reads @ self.mean)
