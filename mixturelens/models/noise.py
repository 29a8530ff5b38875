"""A null for a change of weights: as much of it, tensor by tensor, and in no direction in particular."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mixturelens.models.pair import View


def noised(models: Sequence[Any], seed: int = 0) -> Any:
    """S with Gaussian noise, which has the norm of R's change in every tensor, as a model of its own.

    It takes R's place in memory, and R is gone. Where both sides are adapters of one base, the noise has the norm of
    the change of each adapted weight and is added to the base, so that neither side is left as it was. No tensor is
    held twice but the one that is being changed.
    """
    before, after = models
    generator = torch.Generator().manual_seed(seed)
    if isinstance(before, View):
        for weight, change in _adapted(before, after):
            weight.data += _like(change, generator).to(weight)
        return before
    start = dict(before.named_parameters())
    for name, weight in after.named_parameters():
        weight.data.copy_(start[name].data + _like(weight.data - start[name].data, generator))
    return after


def _adapted(before: View, after: View) -> Iterator[tuple[Tensor, Tensor]]:
    """(a weight of the base, what R's adapter adds to it and S's does not)."""
    for module in before.under.modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        sides = [
            module.get_delta_weight(side.adapter) if side.adapter in module.lora_A else None for side in (before, after)
        ]
        s, r = (torch.zeros_like(module.base_layer.weight) if each is None else each for each in sides)
        yield module.base_layer.weight, r.detach() - s.detach()


def _like(change: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(change.shape, generator=generator).to(change)
    return noise * (change.norm() / noise.norm())
