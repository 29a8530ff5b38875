"""Random changes of weights of the size of R's: how far just any change of that size moves S.

W' = W_S + e,  e Gaussian with |e| = |W_R - W_S|, tensor by tensor (of an adapter: of the merged weights)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mixturelens.grafting.components import CHUNK, State, squares
from mixturelens.types import RunError


@contextlib.contextmanager
def noised(model: nn.Module, after: State, seed: int) -> Iterator[None]:
    """The model with noise on the parameters that `after` names, each of the norm of its change, for a block.

    A module's parameters hold noise while it runs, drawn when it is called and the same at every call, and then their
    own tensors again: weights stay bit for bit what they are, and no more than one module's are ever held twice. Tied
    weights have the same noise wherever they are used. Raises RunError if a parameter was never used.

    >>> model = nn.Linear(2, 2)
    >>> with noised(model, {"weight": model.weight.detach() + 1}, seed=0):
    ...     moved = model(torch.eye(2)) - model.bias
    >>> float((moved.T - model.weight).norm().detach().round(decimals=4))
    2.0
    """
    names = {id(model.get_parameter(name)): name for name in after}
    drawn = {
        name: _Drawn.of(model.get_parameter(name).data, values, _seed(seed, k))
        for k, (name, values) in enumerate(after.items())
    }
    own: dict[str, Tensor] = {}
    depth = dict.fromkeys(after, 0)
    used: set[str] = set()
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            mine = [names[id(p)] for p in module.parameters(recurse=False) if id(p) in names]
            if not mine:
                continue

            def enter(*_: object, mine: list[str] = mine) -> None:
                for name in mine:
                    depth[name] += 1
                    if depth[name] == 1:
                        parameter = model.get_parameter(name)
                        own[name] = parameter.data
                        parameter.data = drawn[name].on(own[name])
                used.update(mine)

            def leave(*_: object, mine: list[str] = mine) -> None:
                for name in mine:
                    depth[name] -= 1
                    if depth[name] == 0:
                        model.get_parameter(name).data = own.pop(name)

            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        try:
            yield
        finally:
            for name, values in own.items():  # of modules that never returned
                model.get_parameter(name).data = values
    unused = next((name for name in after if name not in used), None)
    if unused is not None:
        raise RunError(f"the module of {unused!r} was never called, so that its noise did nothing")


@dataclass(frozen=True)
class _Drawn:
    """Noise on one tensor: drawn again whenever it is wanted, and never kept."""

    seed: int
    scale: float

    @classmethod
    def of(cls, before: Tensor, after: Tensor, seed: int) -> _Drawn:
        """Of the norm of the change."""
        generator = torch.Generator(before.device).manual_seed(seed)
        norm = sum(squares(_chunk(len(each), generator)) for each in before.flatten().split(CHUNK))
        return cls(seed, (squares(after, before) / norm) ** 0.5 if norm else 0.0)

    def on(self, before: Tensor) -> Tensor:
        """A tensor with this noise. Chunk by chunk, so that not much more than it is held."""
        generator = torch.Generator(before.device).manual_seed(self.seed)
        found = before.clone().flatten()
        for chunk in found.split(CHUNK):
            chunk.copy_(chunk.float() + self.scale * _chunk(len(chunk), generator))
        return found.view(before.shape)


def _chunk(size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(size, generator=generator, device=generator.device)


def _seed(seed: int, number: int) -> int:
    """Of each tensor its own, so that they can be drawn one by one."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
