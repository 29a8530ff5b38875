"""Which parameters belong together, and how far each group of them moved from S to R."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mixturelens.grafting.record import Part

State = Mapping[str, Tensor]
"""Weights by the plain model's parameter names; a tied parameter is there once."""


CHUNK = 1 << 22
"""Numbers of a tensor that are taken to float64 at once."""


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's own tensors by name, and no copies: they stay what they are while others are put in their place.

    >>> list(weights_of(nn.Linear(2, 3)))
    ['weight', 'bias']
    """
    return {name: value.detach() for name, value in model.named_parameters()}


def parts(components: Mapping[str, tuple[str, ...]], before: State, after: State) -> tuple[Part, ...]:
    """Every component and how far it moved: the norm of R - S over the norm of S, in the order given.

    `components` are those of `hooks.weights.lens_components`.

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
    moved = sum(squares(after[name], before[name]) for name in members)
    # biases of a fresh model may all be 0 before
    size = sum(squares(before[name]) for name in members) or sum(squares(after[name]) for name in members)
    return (moved / size) ** 0.5 if moved else 0.0


def squares(values: Tensor, less: Tensor | None = None) -> float:
    """Sum of squares, or of those of a difference, in float64: chunk by chunk, as an embedding may be large."""
    total = 0.0
    for k, chunk in enumerate(values.flatten().split(CHUNK)):
        each = chunk.double() if less is None else chunk.double() - less.flatten().split(CHUNK)[k].double()
        total += float(each.square().sum())
    return total
