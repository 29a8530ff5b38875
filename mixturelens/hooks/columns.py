"""Where named positions lie in a padded batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from mixturelens.hooks.lens import Tokens
from mixturelens.types import InputError

Spans = Mapping[str, Sequence[int]]


class Columns:
    """Where the positions of a batch lie, row by row: as columns, counted with the padding."""

    def __init__(self, base: Tokens, spans: Sequence[Spans] | None = None) -> None:
        self.real, self.spans = base.real, spans
        self.width = base.real.shape[1]
        self._skip = (~base.real).sum(1).tolist()

    def of(self, position: str | int | None, row: int) -> tuple[int, ...]:
        """The columns of a position in one row. Raises InputError if the row has no such span or token."""
        skip = self._skip[row]
        if position is None:
            return tuple(range(skip, self.width))
        if isinstance(position, int):
            at: Sequence[int] = (position,)
        else:
            spans = self.spans[row] if self.spans is not None else {}
            if position not in spans:
                raise InputError(f"row {row} has no span {position!r}; it has {', '.join(sorted(spans)) or 'none'}")
            at = spans[position]
        if not at:
            raise InputError(f"row {row}: span {position!r} is empty: no token lies in it")
        if not all(0 <= i < self.width - skip for i in at):
            raise InputError(f"row {row}: position {position} is outside its {self.width - skip} tokens")
        return tuple(sorted(skip + i for i in at))

    def mask(self, position: str | int | None) -> Bool[Tensor, "row pos"]:
        """True at the columns of a position, in every row."""
        chosen = torch.zeros_like(self.real)
        for row in range(len(chosen)):
            chosen[row, list(self.of(position, row))] = True
        return chosen
