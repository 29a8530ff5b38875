"""Which parameters belong together, and how far each group of them moved from S to R."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mixturelens.grafting.record import Part

State = Mapping[str, Tensor]
"""Weights by the plain model's parameter names; a tied parameter is there once."""


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's parameters, by name.

    >>> list(weights_of(nn.Linear(2, 3)))
    ['weight', 'bias']
    """
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def parts(components: Mapping[str, tuple[str, ...]], before: State, after: State) -> tuple[Part, ...]:
    """Every component and how far it moved: the norm of R - S over the norm of S, in the order given.

    `components` are those of `hooks.lens.Lens.components`.

    >>> import torch
    >>> one, two = torch.ones(4), torch.full((4,), 1.5)
    >>> parts({"embed": ("w",)}, {"w": one}, {"w": two})
    (Part(name='embed', parameters=4, change=0.5),)
    """
    return tuple(
        Part(
            name=name,
            parameters=sum(before[each].numel() for each in members),
            change=_relative(members, before, after),
        )
        for name, members in components.items()
    )


def _relative(members: tuple[str, ...], before: State, after: State) -> float:
    moved = sum(float((after[name].double() - before[name].double()).square().sum()) for name in members)
    # biases of a fresh model may all be 0 before
    size = sum(float(before[name].double().square().sum()) for name in members)
    size = size or sum(float(after[name].double().square().sum()) for name in members)
    return (moved / size) ** 0.5 if moved else 0.0
