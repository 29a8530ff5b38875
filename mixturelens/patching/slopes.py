"""Which heads and MLPs are worth patching exactly: slopes of the metric, for all of them from a few runs.

Attribution patching (Nanda; Syed et al., arXiv 2310.10348) estimates what a patch moves by the activation's difference
times the metric's gradient. AtP* (Kramar et al. 2024, arXiv 2403.00745) says where that fails, and two of its remedies
are here: gradients are also taken with those through some layers dropped, so that what a node does directly and what it
does through later layers do not cancel (GradDrop); and nodes that slopes passed over are sampled and patched exactly,
which bounds what was missed. (The third, for queries and keys, is not needed: only outputs are nominated.)

AtP* drops one layer at a time, which takes a pass back for each; here a few blocks of layers are dropped in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mixturelens.hooks.batches import Sides
from mixturelens.hooks.columns import Columns
from mixturelens.hooks.engine import no_gradient_for
from mixturelens.hooks.lens import Edit, Lens, Tokens
from mixturelens.types import Component, Site

Place = tuple[int, Component]

DROPPED = 4
"""Blocks of layers whose gradients are dropped in turn."""
BYTES = 256 << 20
"""Bound on the activations that are held for a way back."""


def strengths(lens: Lens, on: Sides, sites: Sequence[Site], before: Lens | None = None) -> Float[Tensor, " site"]:
    """How much patching each site's clean output into the corrupt run should move, in the metric's units, unsigned.

    The largest of some numbers: the plain estimate, mean over rows, and what it is where gradients are dropped, mean
    over the blocks of layers that are dropped in turn; each with the gradients of the corrupt run and with those of the
    clean one, as a network that saturates is flat at one end. With `before`, the clean activations are that
    checkpoint's, and gradients are those of the corrupt run alone.
    """
    found = _strengths(lens, on, sites, before)
    if before is not None:
        return found
    shifts = tuple(-shift for shift in on.shifts)
    return torch.maximum(
        found, _strengths(lens, Sides(on.corrupt, on.clean, on.metric, on.corrupt_spans, shifts), sites)
    )


def _strengths(lens: Lens, on: Sides, sites: Sequence[Site], before: Lens | None = None) -> Float[Tensor, " site"]:
    places: list[Place] = list(dict.fromkeys((site.layer, site.component) for site in sites))
    columns = Columns(on.corrupt, on.corrupt_spans)
    masks = {position: columns.mask(position) for position in dict.fromkeys(site.position for site in sites)}
    blocks = [block.tolist() for block in torch.arange(lens.layers).tensor_split(min(DROPPED, lens.layers))]
    found = torch.zeros(1 + len(blocks), len(sites))
    width = on.corrupt.ids.shape[1]
    # what comes before the first site is the same with and without the patch: only its keys and values are needed
    first = min(int(mask.any(0).nonzero()[0]) for mask in masks.values())
    window = width - first
    each = 4 * lens.layers * window * (8 * lens.d_model + 3 * lens.d_mlp + 2 * lens.heads * width)
    size = max(1, BYTES // each)
    for start in range(0, len(on), size):
        rows = slice(start, start + size)
        part = on.part(rows)
        clean, _ = (before or lens).capture(part.clean, places, first)
        for which, products in enumerate(_products(lens, part, clean, places, blocks, first)):
            for number, site in enumerate(sites):
                value = products[site.layer, site.component]
                if site.head is not None:
                    value = value[:, :, site.head]
                mask = masks[site.position][rows, first:]
                found[which, number] += float((value * mask).sum()) / len(on)
    plain, *dropped = found.abs()
    # a block says nothing of its own nodes
    others = torch.tensor([[float(site.layer not in block) for site in sites] for block in blocks])
    return torch.maximum(plain, (torch.stack(dropped) * others).sum(0) / others.sum(0).clamp(min=1))


Products = dict[Place, Tensor]
"""(layer, component) -> (clean - corrupt) . gradient, [row, pos] or [row, pos, head]."""


def _products(
    lens: Lens,
    on: Sides,
    clean: dict[Place, Tensor],
    places: Sequence[Place],
    blocks: Sequence[Sequence[int]],
    first: int,
) -> list[Products]:
    """With all gradients, then with those through each block of layers dropped."""
    kept: dict[Place, Tensor] = {}
    dropped: list[int] = []

    def keep(key: Place) -> Edit:
        def edit(activation: Tensor) -> Tensor:
            kept[key] = activation
            if key[1] in ("attn_out", "mlp_out"):
                activation.register_hook(lambda grad: torch.zeros_like(grad) if key[0] in dropped else grad)
            return activation  # what is read may be a view of its own, which is on the way only if it is given back

        return edit

    def begin(activation: Tensor) -> Tensor:
        return activation.detach().requires_grad_()

    written: tuple[Component, ...] = ("attn_out", "mlp_out")
    outputs: list[Place] = [(layer, component) for layer in range(lens.layers) for component in written]
    keys: list[Place] = list(dict.fromkeys([*places, *outputs]))
    edits = [(lens.point(0, "resid_pre"), begin), *((lens.point(*key), keep(key)) for key in keys)]
    result = []
    cache = _behind(lens, on.corrupt, first)
    with torch.enable_grad(), no_gradient_for(lens.model):
        metric = on.metric(_rest(lens, on.corrupt, first, edits, cache)[:, -1]).sum()
        for block in ((), *blocks):
            dropped[:] = block
            some = [kept[key] for key in places]
            gradients = torch.autograd.grad(metric, some, retain_graph=True, allow_unused=True)
            result.append(
                {
                    key: (
                        activation.new_zeros(activation.shape[:-1])  # nothing that it writes is read
                        if gradient is None
                        else ((clean[key] - activation.detach()) * gradient).sum(-1).float()
                    )
                    for key, activation, gradient in zip(places, some, gradients, strict=True)
                }
            )
    kept.clear()  # else the graph lives on in the hooks that are part of it
    return result


def _behind(lens: Lens, batch: Tokens, first: int) -> Any:
    """Keys and values of the columns before the first one in question."""
    from transformers import DynamicCache

    cache = DynamicCache()
    if first:
        with torch.no_grad():
            part = Tokens(batch.ids[:, :first], batch.real[:, :first])
            lens.run(part, past_key_values=cache, use_cache=True)
    return cache


def _rest(
    lens: Lens, batch: Tokens, first: int, edits: Sequence[tuple[Any, Edit]], cache: Any
) -> Float[Tensor, "row 1 vocabulary"]:
    """Logits of the last column, from the first one in question on."""
    if not first:
        return lens.run(batch, edits)
    part = Tokens(batch.ids[:, first:], torch.ones_like(batch.real[:, first:]))
    options: dict[str, Any] = {
        "position_ids": batch.position_ids[:, first:],
        "past_key_values": cache,
        "use_cache": True,
    }
    if batch.padded:
        options["attention_mask"] = batch.real.long()
    return lens.run(part, edits, **options)
