"""The weights behind a lens: which parameter is whose, and what heads and neurons read and write with them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from mixturelens.hooks.lens import Lens
from mixturelens.types import RunError

FINAL: Mapping[str, str] = {"final_norm": "ln_final", "unembed": "unembed"}
"""Component behind the last block -> what transformer-lens calls its module."""

Reads = Callable[[Float[Tensor, "row pos reader d_model"]], Tensor]
"""From what readers read of the residual stream, each for itself, to what they make of it."""


@dataclass(frozen=True)
class Forks:
    """Which inputs of a block the bridge can change for one reader alone: those of heads, and that of the MLP."""

    heads: bool
    mlp: bool


def lens_components(lens: Lens) -> dict[str, tuple[str, ...]]:
    """Component -> names of the plain model's parameters, each of them once, in the order of the network.

    `embed`, `pos_embed`, `L0.attn`, `L0.mlp`, `L0.norms`, ..., `final_norm`, `unembed`, and `other` for what the
    bridge knows by no such name. A tied embedding belongs to `embed`, and there is no `unembed`.

    >>> lens_components(load_lens(Path("checkpoints/sft")))["L0.mlp"]  # doctest: +SKIP
    ('model.layers.0.mlp.gate_proj.weight', 'model.layers.0.mlp.up_proj.weight', ...)
    """
    modules: list[tuple[str, nn.Module | None]] = [
        ("embed", getattr(lens.bridge, "embed", None)),
        ("pos_embed", getattr(lens.bridge, "pos_embed", None)),
    ]
    for layer, block in enumerate(lens.bridge.blocks):
        modules += [(f"L{layer}.{name}", getattr(block, name, None)) for name in ("attn", "mlp")]
        modules += [(f"L{layer}.norms", module) for name, module in block.named_children() if name.startswith("ln")]
    modules += [(name, getattr(lens.bridge, at, None)) for name, at in FINAL.items()]
    owner: dict[str, str] = {}
    for component, module in modules:
        for parameter in module.parameters() if module is not None else ():
            name = lens.parameter_names.get(id(parameter))
            if name is not None:  # the bridge holds copies of its own, too
                owner.setdefault(name, component)
    order = dict.fromkeys([*(component for component, _ in modules), "other"])
    found = {c: tuple(n for n in lens.parameter_names.values() if owner.get(n, "other") == c) for c in order}
    return {component: names for component, names in found.items() if names}


def components_of(model: Any, tokenizer: Any) -> dict[str, tuple[str, ...]]:
    """What `lens_components` says of a plain model, which is left as it is: the bridge is given its shape alone."""
    hollow: dict[int, Any] = {
        id(value): nn.Parameter(torch.zeros((), dtype=value.dtype).expand(value.shape), requires_grad=False)
        for value in model.parameters()
    }
    return lens_components(Lens(copy.deepcopy(model, hollow), tokenizer))


def output_weights(lens: Lens, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """What each head writes: its share of the output projection, as a view of the model's own weights."""
    module = cast(nn.Module, lens.bridge.blocks[layer].attn.o.original_component)
    weight = cast(Tensor, module.weight).detach()
    if type(module).__name__ != "Conv1D":
        weight = weight.T  # Linear stores [out, in], Conv1D [in, out]
    return rearrange(weight, "(head d_head) d_model -> head d_head d_model", head=lens.heads)


def head_writes(
    lens: Lens, layer: int, z: Float[Tensor, "row pos head d_head"]
) -> Float[Tensor, "row pos head d_model"]:
    """What each head adds to the residual stream; over heads it sums to what attention adds, up to a bias.

    Where attention's output passes a norm, z must be that of all heads: the norm divides their sum by its root mean
    square, token by token, and a head's share is what it writes divided by that number, as it is in this run.
    """
    heads = torch.einsum("rphe,hed->rphd", z, output_weights(lens, layer))
    block = lens.bridge.blocks[layer]
    behind = [norm for name in ("ln1_post", "ln1") if (norm := getattr(block, name, None)) is not None]
    norm = next((each for each in behind if each.hook_out is lens.point(layer, "attn_out")), None)
    if norm is None:
        return heads * float(getattr(block, "residual_contribution_scale", 1.0))
    plain = norm.original_component
    whole = heads.sum(2)
    weighed = whole * plain(torch.ones_like(whole[:1, :1]))  # its weights, up to one number
    scale = (plain(whole) * weighed).sum(-1) / weighed.square().sum(-1).clamp(min=1e-30)
    return heads * plain(torch.ones_like(whole[:1, :1]))[:, :, None] * scale[..., None, None]


def neuron_weights(lens: Lens, layer: int) -> Float[Tensor, "neuron d_model"]:
    """What each hidden neuron of an MLP writes, as a view of the model's own weights."""
    module = cast(nn.Module, lens.bridge.blocks[layer].mlp.out.original_component)
    weight = cast(Tensor, module.weight).detach()
    return weight if type(module).__name__ == "Conv1D" else weight.T


def projection(
    lens: Lens, layer: int, which: Literal["q", "k", "v"]
) -> tuple[str, Int[Tensor, "head d_head d_model"], Float[Tensor, "head d_head d_model"]]:
    """Weights of the queries, keys or values of every head in a layer.

    Returns the plain model's name of the parameter that holds them, the flat index of each weight in it, and the
    weights. Raises RunError if the parameter cannot be found.
    """
    attention = lens.bridge.blocks[layer].attn
    heads = lens.heads if which == "q" else lens.kv_heads
    module = cast(nn.Module, getattr(attention, which).original_component)
    weight = cast(Tensor, module.weight).detach()
    name = lens.parameter_names.get(id(module.weight))
    if name is not None:
        index = torch.arange(weight.numel(), device=weight.device).view_as(weight)
        if type(module).__name__ == "Conv1D":
            weight, index = weight.T, index.T
        pattern = "(head d_head) ... -> head d_head ..."
        return name, rearrange(index, pattern, head=heads), rearrange(weight, pattern, head=heads)
    # one parameter holds all three: ask the bridge to split numbers that say where they come from
    joint = cast(nn.Module, attention.qkv.original_component)
    name, fused = lens.parameter_names.get(id(joint.weight)), cast(nn.Parameter, joint.weight)
    if name is None:
        raise RunError(f"the {which} projection of layer {layer} is not a parameter of {type(lens.model).__name__}")
    kept = fused.data
    try:
        fused.data = torch.arange(kept.numel(), dtype=torch.float64, device=kept.device).view_as(kept)
        parts = attention.split_qkv_matrix(attention.original_component)
        index = parts["qkv".index(which)].weight.detach().long()
    finally:
        fused.data = kept
    of_heads = rearrange(index, "(head d_head) ... -> head d_head ...", head=heads)
    return name, of_heads, kept.view(-1)[of_heads]


@contextlib.contextmanager
def rewritten(lens: Lens, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Other values in some of the plain model's parameters, by name, for the length of a block, without a copy."""

    @torch.no_grad()
    def write(weights: Mapping[str, Tensor]) -> None:
        for name, values in weights.items():
            lens.get_parameter(name).copy_(values)
        for block in lens.bridge.blocks:
            joint = getattr(getattr(block.attn, "qkv", None), "original_component", None)
            if joint is not None and lens.parameter_names.get(id(joint.weight)) in weights:  # the bridge runs copies
                attention = cast(Any, block.attn)
                parts = attention.split_qkv_matrix(attention.original_component)
                for which, part in zip("qkv", parts, strict=True):
                    cast(Tensor, getattr(attention, which).original_component.weight).copy_(part.weight)

    old = {name: lens.get_parameter(name).detach().clone() for name in weights}
    try:
        write(weights)
        yield
    finally:
        write(old)


def forks_of(lens: Lens, layer: int) -> Forks:
    """Which inputs of a block the bridge can change for one reader alone; `reads` stands in for the others."""
    from transformer_lens.model_bridge.generalized_components import (
        ALiBiJointQKVAttentionBridge,
        BlockBridge,
        JointQKVAttentionBridge,
        PositionEmbeddingsAttentionBridge,
    )

    block = lens.bridge.blocks[layer]
    attention = getattr(block, "attn", None)
    wired = type(block).forward is BlockBridge.forward  # it keeps the stream from before the norm
    able = isinstance(attention, (JointQKVAttentionBridge, PositionEmbeddingsAttentionBridge))
    return Forks(
        heads=wired and able and not isinstance(attention, ALiBiJointQKVAttentionBridge),
        mlp=wired and (getattr(block, "ln2", None) is not None or block.mlp_reads_resid_directly),
    )


def reads(lens: Lens, layer: int, what: Literal["q", "k", "v", "mlp"]) -> Reads:
    """A function from the residual stream to queries, keys, values or the MLP's input, through the norm before
    them.

    Raises RunError where they have no norm of their own in front.
    """
    block = lens.bridge.blocks[layer]
    before = getattr(block, "ln2", None) if what == "mlp" else None
    before = before or getattr(block, "ln1", None)  # parallel blocks may have one norm for both
    if before is None:
        kind = type(lens.model).__name__
        raise RunError(f"the lens shows no input of {what} on {kind}: there is no norm in front of it")
    norm = before.original_component
    if what == "mlp":
        return norm
    weights = projection(lens, layer, what)[2]
    bias = getattr(getattr(block.attn, what).original_component, "bias", None)

    def read(stream: Tensor) -> Tensor:
        found = torch.einsum("rphd,hed->rphe", norm(stream), weights)
        return found if bias is None else found + bias.detach().view(weights.shape[:2])

    return read
