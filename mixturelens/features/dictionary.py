"""Units of one site as vectors: what each reads, when it fires, what it writes. Features, neurons, directions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Norm = Literal["length", "layer"]
"""What is done to each token's activation before it is read, and undone in what is written: its length is made that of
a vector of ones; or its mean is taken off, and its standard deviation made 1."""

TINY = 1e-12


@dataclass(frozen=True)
class Dictionary:
    """Units that read an activation x and write into it.

    f = read . x - offset where that exceeds `threshold`, and 0 elsewhere (a JumpReLU; Rajamanoharan et al. 2024, arXiv
    2407.14435). A threshold of minus infinity makes a unit linear: a neuron or a probe's direction. With `top`, only
    that many of a token's largest f are kept. With a `norm`, units read each token's activation behind it, and write
    at its scale.

    >>> one = Dictionary(torch.eye(2), torch.zeros(2), torch.tensor([0.5, -torch.inf]), torch.eye(2))
    >>> one.encode(torch.tensor([[0.4, -3.0]])).tolist()
    [[0.0, -3.0]]
    """

    read: Float[Tensor, "unit d"]
    offset: Float[Tensor, " unit"]
    threshold: Float[Tensor, " unit"]
    write: Float[Tensor, "unit d"]
    bias: Float[Tensor, " d"] | None = None
    """What a reconstruction adds; None where the units are not meant to reconstruct."""
    norm: Norm | None = None
    top: int | None = None
    whole: tuple[Dictionary, Int[Tensor, " unit"]] | None = None
    """Where units compete: the dictionary that they are a part of, and which of its units they are."""

    def __len__(self) -> int:
        return len(self.read)

    @property
    def alone(self) -> bool:
        """Whether f is a function of what its own unit reads: affine, with a threshold."""
        return self.norm is None and self.top is None and self.whole is None

    def encode(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch unit"]:
        """How strongly each unit fires on each x; 0 where it does not reach its threshold, or loses to others."""
        if self.whole is not None:
            everything, units = self.whole
            return everything.encode(x)[..., units]
        found = self._normed(x.to(self.read.dtype)) @ self.read.T - self.offset
        fires = found > self.threshold
        if self.top is not None:
            fires &= found >= found.topk(self.top, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        return torch.where(fires, found, 0.0)

    def decode(
        self, f: Float[Tensor, "*batch unit"], x: Float[Tensor, "*batch d"] | None = None
    ) -> Float[Tensor, "*batch d"]:
        """The activation that these strengths f reconstruct, bias included. `x` is what f was encoded from: a
        dictionary with a norm needs its scale.
        """
        made = f @ self.write if self.bias is None else f @ self.write + self.bias
        if self.norm is None:
            return made
        assert x is not None
        x = x.to(self.read.dtype)
        middle = x.mean(-1, keepdim=True) if self.norm == "layer" else 0.0
        return made * self.scale(x) + middle

    def scale(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch 1"]:
        """How much of its vector a unit of strength 1 writes at each token: 1, unless the dictionary has a norm."""
        x = x.to(self.read.dtype)
        if self.norm is None:
            return torch.ones_like(x[..., :1])
        return x.std(-1, keepdim=True) if self.norm == "layer" else x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5

    def moved(self, x: Float[Tensor, "*batch d"], change: Float[Tensor, "*batch unit"]) -> Float[Tensor, "*batch d"]:
        """x with the strength of each unit changed by `change`: what the units do not write stays as it is."""
        return x + (self.scale(x) * change @ self.write).to(x.dtype)

    def part(self, units: Int[Tensor, " part"]) -> Dictionary:
        """Some of the units, without the bias: they do not reconstruct alone. What they compete with stays."""
        if self.whole is not None:
            whole = self.whole[0], self.whole[1][units]
        else:
            whole = None if self.top is None else (self, units)
        return Dictionary(
            *(each[units] for each in (self.read, self.offset, self.threshold, self.write)), norm=self.norm, whole=whole
        )

    def writing(self, vectors: Float[Tensor, "unit d"]) -> Dictionary:
        """The same units, which read as they did and write these vectors instead."""
        return replace(self, write=vectors)

    def to(self, device: str) -> Dictionary:
        """The same dictionary on another device."""
        return Dictionary(
            *(each.to(device) for each in (self.read, self.offset, self.threshold, self.write)),
            bias=None if self.bias is None else self.bias.to(device),
            norm=self.norm,
            top=self.top,
            whole=self.whole and (self.whole[0].to(device), self.whole[1].to(device)),
        )

    def _normed(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        if self.norm == "layer":
            return (x - x.mean(-1, keepdim=True)) / (self.scale(x) + 1e-5)
        return x if self.norm is None else x / self.scale(x).clamp(min=TINY)
