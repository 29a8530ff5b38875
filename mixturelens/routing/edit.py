"""A weight edit that repairs: the cue reader reads the harmed cue as the trained one, in a plain checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mixturelens.behaviour.repair_questions import Ground
from mixturelens.contrasts import check_cue_span
from mixturelens.hooks.batches import sides
from mixturelens.hooks.columns import Columns
from mixturelens.hooks.lens import Lens
from mixturelens.hooks.weights import projection
from mixturelens.types import Site

RIDGE = 0.01
"""Keeps the spread of inputs invertible, in mean squares of an input."""

WeightEdit = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Name of a parameter of the plain model -> (flat indices, new values)."""


def fit_edit(ground: Ground, heads: Sequence[Site]) -> WeightEdit:
    """Keys and values with which the heads read the harmed cue's tokens as if they were the trained cue's.

    For each token of the cue, the mean input under the harmed cue is to give the keys and values that the mean input
    under the trained cue gives, while inputs at all other tokens (and at the trained cue's) give what they gave: the
    constrained least squares of ROME and MEMIT (Meng et al. 2022, arXiv 2202.05262 and 2210.07229), for an attention
    head. Where keys and values are shared by several heads, all of them are edited. Raises InputError as
    `contrasts.check_cue_span` does.
    """
    lens, harm = ground.lens, ground.harm
    check_cue_span(ground.suite, ground.contrasts)
    edit: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for layer in dict.fromkeys(head.layer for head in heads):
        trained, kept = _inputs(ground, layer, harm.trained_cue)
        harmed, rest = _inputs(ground, layer, harm.harmed_cue)
        kept = torch.cat([kept, rest, trained.flatten(0, 1)])
        moved, target = harmed.mean(0), trained.mean(0)  # [token, d_model]
        spread = shrunk(kept.T @ kept / len(kept))
        away = torch.linalg.solve(spread, moved.T)  # [d_model, token]: answers to the cue's tokens, and to little else
        # [token, d_model], with read @ moved.T the identity (on tokens that differ)
        read = torch.linalg.pinv(moved @ away, hermitian=True) @ away.T
        shared = {int(head.head or 0) * lens.kv_heads // lens.heads for head in heads if head.layer == layer}
        for which in ("k", "v"):
            name, index, weights = projection(lens, layer, which)
            for head in shared:
                new = weights[head].double() + weights[head].double() @ (target - moved).T @ read
                old = edit.get(name, (index.new_empty(0), weights.new_empty(0)))
                edit[name] = (
                    torch.cat([old[0], index[head].flatten()]),
                    torch.cat([old[1], new.to(weights.dtype).flatten()]),
                )
    return edit


def _inputs(ground: Ground, layer: int, cue: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What keys and values are computed from: [question, token of the cue, d_model], and at all other tokens."""
    found: list[torch.Tensor] = []
    lens = ground.lens
    contrasts = ground.contrasts.half(0)
    both = sides(lens, contrasts)
    batch = both.clean if cue == contrasts.clean else both.corrupt

    def keep(activation: torch.Tensor) -> None:
        found.append(activation.double())

    with torch.no_grad():
        lens.run(batch, [(lens.named_point(f"blocks.{layer}.attn.k.hook_in"), keep)])
    spans = both.spans if cue == contrasts.clean else both.corrupt_spans
    mask = Columns(batch, spans).mask("cue")
    at_cue = found[0][mask].unflatten(0, (len(batch), -1))
    return at_cue, found[0][batch.real & ~mask]


def edited(model: torch.nn.Module | Lens, edit: WeightEdit) -> dict[str, torch.Tensor]:
    """The parameters that an edit changes, whole, by name: what a lens puts in place, or `save_with` saves."""
    weights = {name: model.get_parameter(name).detach().clone() for name in edit}
    for name, (index, values) in edit.items():
        weights[name].view(-1)[index] = values
    return weights


def shrunk(spread: torch.Tensor) -> torch.Tensor:
    """A spread of inputs (second moments) with RIDGE mean squares of an input added to each: kept invertible."""
    return spread + RIDGE * spread.diagonal().mean() * torch.eye(len(spread), dtype=spread.dtype, device=spread.device)
