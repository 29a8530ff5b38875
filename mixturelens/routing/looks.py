"""Where the heads of a circuit look: their attention from each token at which they write something of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from mixturelens.hooks.batches import Sides
from mixturelens.hooks.lens import Lens
from mixturelens.types import Component, Frozen

LEAST = 0.01
"""Share of attention from which a token is told."""


class Look(Frozen):
    """Mean attention of one head from one position, over questions, on each side of the contrast.

    Tokens that get less than LEAST are left out.
    """

    head: str
    """`L0.h3`."""
    position: int
    clean: dict[int, float]
    """Position -> attention."""
    corrupt: dict[int, float]


def looks(lens: Lens, on: Sides, writers: Iterable[tuple[str, int]]) -> tuple[Look, ...]:
    """The attention of each (head, position) of `writers`; one forward of either side, for all of them."""
    wanted = sorted({(*_numbers(name), position, name) for name, position in writers if ".h" in name})
    if not wanted:
        return ()
    keys: list[tuple[int, Component]] = [(layer, "pattern") for layer in dict.fromkeys(layer for layer, *_ in wanted)]
    clean, corrupt = (lens.capture(batch, keys)[0] for batch in (on.clean, on.corrupt))

    def shares(
        patterns: Mapping[tuple[int, Component], Tensor], layer: int, head: int, position: int
    ) -> dict[int, float]:
        row = patterns[layer, "pattern"][:, head, position].float().mean(0).tolist()
        return {at: round(share, 4) for at, share in enumerate(row) if share >= LEAST}

    return tuple(
        Look(
            head=name,
            position=position,
            clean=shares(clean, layer, head, position),
            corrupt=shares(corrupt, layer, head, position),
        )
        for layer, head, position, name in wanted
    )


def _numbers(name: str) -> tuple[int, int]:
    layer, head = name[1:].split(".h")
    return int(layer), int(head)
