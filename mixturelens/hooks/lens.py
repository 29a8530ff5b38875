"""A model under transformer-lens' bridge: its hook points by site, captures, and runs with hooks that must fire."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mixturelens.models import Pair, load_model, load_tokenizer
from mixturelens.types import PER_HEAD, Component, InputError, RunError, Side, Site

NAMES: Mapping[Component, str] = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "neurons": "mlp.hook_post",
    "z": "attn.hook_z",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "pattern": "attn.hook_pattern",
}
"""Component -> what transformer-lens calls its hook point inside a block."""

FINAL: Mapping[str, str] = {"final_norm": "ln_final", "unembed": "unembed"}
"""Component behind the last block -> what transformer-lens calls its module."""

Edit = Callable[[Tensor], Tensor | None]
"""Takes an activation and returns the one to put in its place, or None to leave it."""


@dataclass(frozen=True)
class Tokens:
    """Prompts of one width: shorter ones are padded on the left, so that the last token is in the last column."""

    ids: Int[Tensor, "row pos"]
    real: Bool[Tensor, "row pos"]

    @property
    def padded(self) -> bool:
        return not bool(self.real.all())

    @property
    def position_ids(self) -> Int[Tensor, "row pos"]:
        return (self.real.long().cumsum(1) - 1).clamp(min=0)

    def part(self, rows: Int[Tensor, " part"] | slice) -> Tokens:
        return Tokens(self.ids[rows], self.real[rows])

    def __len__(self) -> int:
        return len(self.ids)


def tokens(rows: Sequence[Sequence[int]], device: str = "cpu", width: int | None = None) -> Tokens:
    """Token ids of several lengths as one batch, padded on the left to the longest (or to `width`).

    >>> tokens([[5, 6, 7], [8]]).ids.tolist()
    [[5, 6, 7], [0, 0, 8]]
    """
    width = max(width or 0, *(len(row) for row in rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(list(row))
        real[i, width - len(row) :] = True
    return Tokens(ids.to(device), real.to(device))


class Lens:
    """A causal language model whose activations can be read and replaced, by site.

    The weights are those of the checkpoint (nothing is folded or centred), so logits are Hugging Face's own. The model
    given is changed in place: its modules become those of the bridge.
    """

    def __init__(self, model: Any, tokenizer: Any, device: str = "cpu") -> None:
        from transformer_lens.model_bridge import TransformerBridge

        self._parameters = {id(value): name for name, value in model.named_parameters()}  # before the bridge moves in
        model.set_attn_implementation("eager")  # so that every layer is told its mask, and shows its pattern
        try:
            self.bridge = TransformerBridge.boot_transformers(
                model.config.name_or_path or "model", hf_model=model, tokenizer=tokenizer, device=device
            )
        except (ValueError, NotImplementedError, RuntimeError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"transformer-lens has no bridge for this model ({why})") from None
        self.model = model
        self.tokenizer = tokenizer
        self.device = device
        self._points: dict[str, Any] = {}
        config = self.bridge.cfg
        self.layers = int(config.n_layers)
        self.heads = int(config.n_heads)
        self.kv_heads = int(getattr(config, "n_key_value_heads", None) or config.n_heads)
        self.d_model = int(config.d_model)
        self.d_head = int(config.d_head)
        self.d_mlp = int(getattr(config, "d_mlp", None) or 4 * self.d_model)

    def heads_of(self, component: Component) -> int:
        """Number of heads of a component: keys and values may have fewer. 1 where it has none."""
        if component not in PER_HEAD:
            return 1
        return self.kv_heads if component in ("k", "v") else self.heads

    def has(self, component: Component) -> bool:
        """Whether blocks have this component (those with parallel attention and MLP have no `resid_mid`)."""
        return f"blocks.0.{NAMES[component]}" in self.bridge.hook_dict

    def point(self, layer: int, component: Component) -> Any:
        """The hook point of a component. Raises InputError naming it, if the bridge does not have it."""
        return self.named_point(f"blocks.{layer}.{NAMES[component]}")

    def named_point(self, name: str) -> Any:
        if name in self._points:
            return self._points[name]
        found = self.bridge.hook_dict.get(name)  # resolves every alias anew, each time
        if found is None:
            kind = type(self.model).__name__
            raise InputError(
                f"the bridge of {kind} has no hook point {name!r} ({self.layers} layers); name another component"
            )
        self._points[name] = found
        return found

    def check(self, site: Site) -> None:
        """Refuse a site that does not exist, by name."""
        self.point(site.layer, site.component)
        if site.head is not None and site.head >= self.heads_of(site.component):
            raise InputError(
                f"{site}: there is no head {site.head}; heads are 0 to {self.heads_of(site.component) - 1}"
            )
        if site.neuron is not None and site.neuron >= self.d_mlp:
            raise InputError(f"{site}: there is no neuron {site.neuron}; neurons are 0 to {self.d_mlp - 1}")

    @contextlib.contextmanager
    def hooked(self, edits: Sequence[tuple[Any, Edit]]) -> Iterator[None]:
        """Put edits on hook points for the length of a block. Raises RunError naming a hook that never fired."""
        fired = [0] * len(edits)
        before = [list(point.fwd_hooks) for point, _ in edits]

        def counted(index: int, edit: Edit) -> Callable[..., Tensor | None]:
            def hook(activation: Tensor, hook: Any) -> Tensor | None:
                fired[index] += 1
                return edit(activation)

            return hook

        try:
            for index, (point, edit) in enumerate(edits):
                point.add_hook(counted(index, edit))
            yield
        finally:
            for (point, _), known in zip(edits, before, strict=True):
                for handle in [h for h in point.fwd_hooks if h not in known]:
                    handle.hook.remove()
                    point.fwd_hooks.remove(handle)
        silent = [point.name for (point, _), count in zip(edits, fired, strict=True) if not count]
        if silent:
            raise RunError(f"hook {silent[0]!r} did not fire: nothing that it should have seen or changed was run")

    def run(
        self, batch: Tokens, edits: Sequence[tuple[Any, Edit]] = (), last_only: bool = True, **options: Any
    ) -> Float[Tensor, "row kept vocabulary"]:
        """Logits (of the last column alone, unless asked otherwise) of a forward with edits in place."""
        return self.forward(batch, edits, last_only, **options).logits

    def forward(
        self, batch: Tokens, edits: Sequence[tuple[Any, Edit]] = (), last_only: bool = True, **options: Any
    ) -> Any:
        padded = {"attention_mask": batch.real.long(), "position_ids": batch.position_ids} if batch.padded else {}
        self.tell_width(len(batch))
        with self.hooked(edits):
            return self.model(
                input_ids=batch.ids, logits_to_keep=1 if last_only else 0, **{"use_cache": False, **padded, **options}
            )

    def tell_width(self, rows: int) -> None:
        # the bridge's position embedding expands itself to a batch size that its own forward would have set
        embedding = getattr(self.bridge, "pos_embed", None)
        if embedding is not None:
            embedding._current_batch_size = rows

    def capture(
        self, batch: Tokens, components: Sequence[tuple[int, Component]]
    ) -> tuple[dict[tuple[int, Component], Tensor], Float[Tensor, "row vocabulary"]]:
        """Activations of (layer, component) pairs, and the logits of the last column, from one forward.

        Shapes: [row, pos, d_model] for residual stream and outputs, [row, pos, d_mlp] for neurons, [row, pos, head,
        d_head] for z, q, k and v, [row, head, query, key] for patterns.
        """
        found: dict[tuple[int, Component], Tensor] = {}

        def keep(key: tuple[int, Component]) -> Edit:
            def store(activation: Tensor) -> None:
                kept = activation.detach()
                found[key] = kept.float() if kept.element_size() < 4 else kept  # no solver takes half precision

            return store

        keys = list(dict.fromkeys(components))
        with torch.no_grad():  # not inference mode: what is captured may meet autograd later
            logits = self.run(batch, [(self.point(*key), keep(key)) for key in keys])
        return found, logits[:, -1]

    def components(self) -> dict[str, tuple[str, ...]]:
        """Component -> names of the plain model's parameters, each of them once, in the order of the network.

        `embed`, `pos_embed`, `L0.attn`, `L0.mlp`, `L0.norms`, ..., `final_norm`, `unembed`, and `other` for what the
        bridge knows by no such name. A tied embedding belongs to `embed`, and there is no `unembed`.

        >>> load_lens(Path("checkpoints/sft")).components()["L0.mlp"]  # doctest: +SKIP
        ('model.layers.0.mlp.gate_proj.weight', 'model.layers.0.mlp.up_proj.weight', ...)
        """
        modules: list[tuple[str, nn.Module | None]] = [
            ("embed", getattr(self.bridge, "embed", None)),
            ("pos_embed", getattr(self.bridge, "pos_embed", None)),
        ]
        for layer, block in enumerate(self.bridge.blocks):
            modules += [(f"L{layer}.{name}", getattr(block, name, None)) for name in ("attn", "mlp")]
            modules += [(f"L{layer}.norms", module) for name, module in block.named_children() if name.startswith("ln")]
        modules += [(name, getattr(self.bridge, at, None)) for name, at in FINAL.items()]
        owner: dict[str, str] = {}
        for component, module in modules:
            for parameter in module.parameters() if module is not None else ():
                name = self._parameters.get(id(parameter))
                if name is not None:  # the bridge holds copies of its own, too
                    owner.setdefault(name, component)
        order = dict.fromkeys([*(component for component, _ in modules), "other"])
        found = {c: tuple(n for n in self._parameters.values() if owner.get(n, "other") == c) for c in order}
        return {component: names for component, names in found.items() if names}

    def output_weights(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """What each head writes: its share of the output projection, as a view of the model's own weights."""
        module, weight = self.output_projection(layer)
        if type(module).__name__ != "Conv1D":
            weight = weight.T  # Linear stores [out, in], Conv1D [in, out]
        return weight.detach().unflatten(0, (self.heads, self.d_head))

    def neuron_weights(self, layer: int) -> Float[Tensor, "neuron d_model"]:
        """What each hidden neuron of an MLP writes, as a view of the model's own weights."""
        module = cast(nn.Module, self.bridge.blocks[layer].mlp.out.original_component)
        weight = cast(Tensor, module.weight).detach()
        return weight if type(module).__name__ == "Conv1D" else weight.T

    def output_projection(self, layer: int) -> tuple[nn.Module, Tensor]:
        """The module and the weights that all heads of a layer write through."""
        module = cast(nn.Module, self.bridge.blocks[layer].attn.o.original_component)
        return module, cast(Tensor, module.weight)

    @contextlib.contextmanager
    def edited(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Other values in some of the plain model's parameters, for the length of a block; no model is copied."""
        old = {name: self.get_parameter(name).detach().clone() for name in weights}
        try:
            self._write(weights)
            yield
        finally:
            self._write(old)

    def get_parameter(self, name: str) -> nn.Parameter:
        """A parameter, by the plain model's name for it. Raises KeyError if there is none."""
        return {self._parameters.get(id(each)): each for each in self.model.parameters()}[name]

    @torch.no_grad()
    def _write(self, weights: Mapping[str, Tensor]) -> None:
        for name, values in weights.items():
            self.get_parameter(name).copy_(values)
        for block in self.bridge.blocks:
            joint = getattr(getattr(block.attn, "qkv", None), "original_component", None)
            if joint is not None and self._parameters.get(id(joint.weight)) in weights:  # the bridge runs copies of it
                attention = cast(Any, block.attn)
                parts = attention.split_qkv_matrix(attention.original_component)
                for which, part in zip("qkv", parts, strict=True):
                    cast(Tensor, getattr(attention, which).original_component.weight).copy_(part.weight)

    def projection(
        self, layer: int, which: Literal["q", "k", "v"]
    ) -> tuple[str, Int[Tensor, "head d_head d_model"], Float[Tensor, "head d_head d_model"]]:
        """Weights of the queries, keys or values of every head: the plain model's name of the parameter that holds
        them, the flat index of each weight in it, and the weights. Raises RunError if the parameter cannot be found.
        """
        attention = self.bridge.blocks[layer].attn
        heads = self.heads if which == "q" else self.kv_heads
        module = cast(nn.Module, getattr(attention, which).original_component)
        weight = cast(Tensor, module.weight).detach()
        name = self._parameters.get(id(module.weight))
        if name is not None:
            index = torch.arange(weight.numel(), device=weight.device).view_as(weight)
            if type(module).__name__ == "Conv1D":
                weight, index = weight.T, index.T
            return name, index.unflatten(0, (heads, -1)), weight.unflatten(0, (heads, -1))
        # one parameter holds all three: ask the bridge to split numbers that say where they come from
        joint = cast(nn.Module, attention.qkv.original_component)
        name, fused = self._parameters.get(id(joint.weight)), cast(nn.Parameter, joint.weight)
        if name is None:
            raise RunError(f"the {which} projection of layer {layer} is not a parameter of {type(self.model).__name__}")
        kept = fused.data
        try:
            fused.data = torch.arange(kept.numel(), dtype=torch.float64, device=kept.device).view_as(kept)
            parts = attention.split_qkv_matrix(attention.original_component)
            index = parts["qkv".index(which)].weight.detach().long()
        finally:
            fused.data = kept
        return name, index.unflatten(0, (heads, -1)), kept.view(-1)[index].unflatten(0, (heads, -1))


def load_lens(path: Path, device: str = "cpu") -> Lens:
    """A checkpoint folder under the bridge. Raises InputError if it cannot be loaded or bridged."""
    return Lens(load_model(path, device), load_tokenizer(path), device)


def lens_of(pair: Pair, side: Side) -> Lens:
    """One side of a pair under the bridge, with the pair's tokenizer and end tokens.

    Raises InputError if it cannot be bridged, or lies on several devices, which hooks cannot follow.
    """
    if pair.device_map is not None:
        raise InputError("--device-map spreads a model over devices; hooks need it on one: give --device instead")
    return Lens(pair.model(side), pair.tokenizer, pair.device)
