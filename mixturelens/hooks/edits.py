"""What an intervention does to an activation: set, add, scale, project, erase, replace, clamp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mixturelens.hooks.lens import Edit
from mixturelens.types import PER_HEAD, Intervention, Site


@dataclass(frozen=True)
class Rewrite:
    """What is put in place of each token's activation at a site, as a function: for what no `Intervention` can say."""

    site: Site
    put: Callable[[Float[Tensor, "token d"]], Float[Tensor, "token d"]]
    do: Literal["rewrite"] = "rewrite"
    vector: None = None
    source: None = None


def edit_of(each: Intervention | Rewrite, columns: Bool[Tensor, "row window"], source: Tensor | None) -> Edit:
    """Everything but a clamp, at some columns; `source` is what it reads from elsewhere."""

    def edit(activation: Tensor) -> Tensor:
        # views, changed in place: the residual stream between attention and MLP is read twice
        pick = _picked(each.site)
        target, value = activation[pick], None if source is None else source[pick]
        now = target[columns]
        vector = None if each.vector is None else torch.tensor(each.vector, dtype=now.dtype, device=now.device)
        if isinstance(each, Rewrite):
            now = each.put(now.float()).to(now.dtype)
        elif each.do == "set":
            assert vector is not None
            now = vector.expand_as(now)
        elif each.do == "add":
            assert vector is not None
            now = now + each.amount * vector
        elif each.do == "scale":
            now = now * each.amount
        elif each.do == "project":
            assert vector is not None
            unit_vector = vector / vector.norm()
            now = now - (now @ unit_vector)[..., None] * unit_vector
        elif each.do == "erase":
            assert each.read is not None
            assert vector is not None
            exact = now.float()  # what is read may be a small difference of large numbers
            found = exact @ exact.new_tensor(each.read) - each.offset
            now = (exact - found[..., None] * vector.float()).to(now.dtype)
        else:
            assert value is not None
            now = value[columns].to(now.dtype)
        target[columns] = now
        return activation

    return edit


def clamp_of(some: Sequence[Intervention], columns: Bool[Tensor, "row window"]) -> Edit:
    """Units of one site made their amounts at once: each reads the activation as it was."""

    def edit(activation: Tensor) -> Tensor:
        target = activation[_picked(some[0].site)]
        now = target[columns]
        exact = now.float()
        read, write = (exact.new_tensor([getattr(each, name) for each in some]) for name in ("read", "vector"))
        offset, amount = (exact.new_tensor([getattr(each, name) for each in some]) for name in ("offset", "amount"))
        least = exact.new_tensor([-torch.inf if each.threshold is None else each.threshold for each in some])
        found = exact @ read.T - offset
        found = torch.where(found > least, found, 0.0)
        target[columns] = (exact + (amount - found) @ write).to(now.dtype)
        return activation

    return edit


def _picked(site: Site) -> tuple[Any, ...]:
    """Where a site's unit lies in an activation."""
    if site.component in PER_HEAD and site.head is not None:
        return (..., site.head, slice(None))
    return (..., slice(site.neuron, site.neuron + 1)) if site.neuron is not None else (...,)
