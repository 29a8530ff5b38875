"""Units of one site as vectors: what each reads, when it fires, what it writes. Features, neurons, directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Dictionary:
    """Units that read an activation x and write into it.

    f = read . x - offset where that exceeds `threshold`, and 0 elsewhere (a JumpReLU; Rajamanoharan et al. 2024, arXiv
    2407.14435). A threshold of minus infinity makes a unit linear: a neuron or a probe's direction.

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

    def __len__(self) -> int:
        return len(self.read)

    def encode(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch unit"]:
        found = x.to(self.read.dtype) @ self.read.T - self.offset
        return torch.where(found > self.threshold, found, 0.0)

    def decode(self, f: Float[Tensor, "*batch unit"]) -> Float[Tensor, "*batch d"]:
        return f @ self.write if self.bias is None else f @ self.write + self.bias

    def part(self, units: Int[Tensor, " part"]) -> Dictionary:
        """Some of the units, without the bias: they do not reconstruct alone."""
        return Dictionary(self.read[units], self.offset[units], self.threshold[units], self.write[units])

    def to(self, device: str) -> Dictionary:
        bias = None if self.bias is None else self.bias.to(device)
        return Dictionary(
            self.read.to(device), self.offset.to(device), self.threshold.to(device), self.write.to(device), bias
        )
