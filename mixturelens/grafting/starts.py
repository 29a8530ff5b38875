"""Where a graft leaves the first layers as they are in S or in R, a reading begins behind them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mixturelens.grafting.cells import Batch, Cells


@dataclass(frozen=True)
class Starts:
    """What every layer of S, and of R, gives on some prompts, to begin from. It is good for these prompts alone."""

    layers: nn.ModuleList
    """Of the working model."""
    cells: Cells
    _given: dict[tuple[str, int], list[Any]] = field(default_factory=dict)
    """(side, number of a batch) -> what each layer gives."""

    def has(self, side: str) -> bool:
        """Whether what the layers of this side give has been kept."""
        return (side, 0) in self._given

    @contextlib.contextmanager
    def kept(self, side: str) -> Iterator[Callable[[Batch], None]]:
        """While this lasts the working model is `side`, and what its layers give is kept; `read` is to tell it."""
        number: list[int] = []

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._given[side, number[0]].append(output)

        def tell(batch: Batch) -> None:
            number[:] = [next(k for k, each in enumerate(self.cells.batches) if each is batch)]
            self._given[side, number[0]] = []

        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                stack.callback(layer.register_forward_hook(hook).remove)
            yield tell

    @contextlib.contextmanager
    def behind(self, side: str, count: int) -> Iterator[Callable[[Batch], None]]:
        """While this lasts the first `count` layers give what they gave in `side`, without being computed."""
        given: list[Any] = []

        def tell(batch: Batch) -> None:
            number = next(k for k, each in enumerate(self.cells.batches) if each is batch)
            given[:] = self._given[side, number]

        def known(k: int) -> Callable[..., Any]:
            return lambda *_, **__: given[k]

        skipped = list(self.layers)[:count]
        try:
            for k, layer in enumerate(skipped):
                layer.forward = known(k)
            yield tell
        finally:
            for layer in skipped:
                vars(layer).pop("forward", None)


def starts_of(model: Any, cells: Cells) -> Starts | None:
    """Starts of a working model, still empty; None where its layers are no list, or prompts are too short to pay."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return Starts(lists[0], cells) if cells.long and len(lists) == 1 else None
