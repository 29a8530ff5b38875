"""A model under transformer-lens' bridge: its hook points by site, captures, and runs with hooks that must fire."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

PROBED = 6
"""Tokens of the prompt with which a lens is held against its model, and sites are tried."""
SAME = 1e-3
"""Largest difference between logits of a model and of its lens, relative to their spread, in single precision."""
SAME_HALF = 0.1
"""The same in half precision, in which a bridge that computes attention in another order rounds otherwise."""
DEAD = 1e-5
"""Largest change of logits or stream, relative to their size, by an edit that did not reach them."""

FOREIGN = (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What code of others may raise where it meets a model that it was not made for."""

Edit = Callable[[Tensor], Tensor | None]
"""Takes an activation and returns the one to put in its place, or None to leave it."""


@dataclass(frozen=True)
class Tokens:
    """Prompts of one width: shorter ones are padded on the left, so that the last token is in the last column."""

    ids: Int[Tensor, "row pos"]
    real: Bool[Tensor, "row pos"]

    @property
    def padded(self) -> bool:
        """Whether some row has padding."""
        return not bool(self.real.all())

    @property
    def position_ids(self) -> Int[Tensor, "row pos"]:
        """The position of every token in its own prompt, from 0; padding has position 0."""
        return (self.real.long().cumsum(1) - 1).clamp(min=0)

    def part(self, rows: Int[Tensor, " part"] | slice) -> Tokens:
        """Some of the rows."""
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

    The weights are those of the checkpoint (nothing is folded or centred), so logits are Hugging Face's own, which is
    checked on a few tokens: InputError where they are not, as for a model without a bridge. The model given is changed
    in place: its modules become those of the bridge.
    """

    def __init__(self, model: Any, tokenizer: Any, device: str = "cpu") -> None:
        from transformer_lens.model_bridge import TransformerBridge

        self.parameter_names = {
            id(value): name for name, value in model.named_parameters()
        }  # before the bridge moves in
        ids = _some_tokens(model)
        with torch.no_grad():
            plain = model(input_ids=ids, use_cache=False).logits[0]
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
        self._refusals: dict[Component, str | None] = {}
        self._round_rotations()
        self._check_logits(ids.to(device), plain.float().to(device))
        config = self.bridge.cfg
        self.layers = int(config.n_layers)
        self.heads = int(config.n_heads)
        self.kv_heads = int(getattr(config, "n_key_value_heads", None) or config.n_heads)
        self.d_model = int(config.d_model)
        self.d_head = int(config.d_head)
        wide = getattr(model.config, "ffn_dim", None)  # OPT's word for it, which the bridge does not know
        self.d_mlp = int(wide or getattr(config, "d_mlp", None) or 4 * self.d_model)

    @functools.cached_property
    def _hooks(self) -> dict[str, Any]:
        """Hook points by name; the bridge would resolve every alias anew each time that it is asked."""
        return dict(self.bridge.hook_dict)

    def _round_rotations(self) -> None:
        """Where rotations are kept in single precision (OLMo), the model rounds what it has rotated; so must we."""
        dtype = self.model.dtype
        if torch.finfo(dtype).bits < 32:
            for name, point in self._hooks.items():
                if name.endswith((".hook_rot_q", ".hook_rot_k")):
                    point.register_forward_hook(lambda _, __, rotated: rotated.to(dtype))

    def _check_logits(self, ids: Int[Tensor, "1 pos"], plain: Float[Tensor, "pos vocabulary"]) -> None:
        """Refuse a model that is another one under the bridge."""
        kind = type(self.model).__name__
        batch = Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
        try:
            with torch.no_grad():
                found = self.run(batch, last_only=False)[0].float()
        except torch.OutOfMemoryError:
            raise
        except FOREIGN as error:
            why = (str(error).splitlines() or [""])[0]
            raise InputError(f"the bridge of {kind} cannot run it ({type(error).__name__}: {why})") from None
        off = (found - plain).norm(dim=-1) / _spread(plain)
        twice = bool(getattr(self.model.config, "alibi", False))
        allowed = SAME if twice or torch.finfo(self.model.dtype).bits >= 32 else SAME_HALF
        if bool((off <= allowed).all()):
            return
        if twice:
            why = "transformer-lens adds ALiBi to a mask that holds it already"
        elif bool(off[0] <= allowed):  # nothing but positions and attention can tell the first token from the others
            why = "from the second token on, so it computes positions or attention otherwise"
        else:
            why = "from the first token on"
        raise InputError(
            f"under transformer-lens {kind} is another model: its logits are off by {float(off.max()):.2g} of their "
            f"spread ({why}); this version has no use for it, and what needs no lens (`behaviour`, `verdict`) works"
        )

    def why_not(self, component: Component) -> str | None:
        """Why a component cannot be patched in this model, in words; None where it can.

        Tried out once, on a few tokens: in each layer in turn everything there is replaced by noise. Where that reaches
        neither the stream behind a block nor the logits, from no layer, the bridge shows what the model computes, and
        ignores what is put in its place.
        """
        if component not in self._refusals:
            self._refusals[component] = self._try_out(component)
        return self._refusals[component]

    def _try_out(self, component: Component) -> str | None:
        kind = type(self.model).__name__
        layers = [at for at in range(self.layers) if f"blocks.{at}.{NAMES[component]}" in self._hooks]
        if not layers and component == "resid_mid":
            return f"attention and MLP of {kind} read the same stream, and there is none between them"
        if not layers:
            return f"the bridge of {kind} has no hook point {NAMES[component]!r}"
        ids = _some_tokens(self.model).to(self.device).expand(1 + len(layers), -1)  # the first row stays as it is
        rows, width = ids.shape
        per_head = (rows, width, self.heads_of(component), self.d_head)
        expected = {
            **dict.fromkeys(("z", "q", "k", "v"), per_head),
            "pattern": (rows, self.heads, width, width),
            "neurons": (rows, width, self.d_mlp),
        }.get(component, (rows, width, self.d_model))
        odd: list[tuple[int, ...]] = []

        def noise(row: int) -> Edit:
            def edit(activation: Tensor) -> Tensor:
                if tuple(activation.shape) != expected:
                    odd.append(tuple(activation.shape))
                    return activation
                now = activation[row].detach()
                drawn = torch.randn(now.shape, generator=torch.Generator().manual_seed(row)).to(now)
                activation[row] = 3 * drawn * now.float().square().mean().sqrt().clamp(min=1e-3).to(now)
                return activation

            return edit

        moved: list[Tensor] = []

        def arrives(rows_of: list[int]) -> Edit:
            def look(stream: Tensor) -> None:
                off = (stream[rows_of] - stream[:1]).float().flatten(1).norm(dim=1)
                moved.append(off > DEAD * stream[0].float().norm())

            return look

        edits = [(self.point(at, component), noise(row)) for row, at in enumerate(layers, 1)]
        for end in range(self.layers):  # behind the blocks: a weight of zero may keep it from the logits
            reached = [row for row, at in enumerate(layers, 1) if at < end or (at == end and component != "resid_post")]
            edits += [(self.point(end, "resid_post"), arrives(reached))] if reached else []
        batch = Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
        with torch.no_grad():
            logits = self.run(batch, edits)[:, -1].float()
        moved.append((logits[1:] - logits[:1]).norm(dim=-1) > DEAD * _spread(logits[:1]))
        if odd:
            shown = f"{list(odd[0][1:])} a prompt, where {list(expected[1:])} is meant"
            return f"the bridge of {kind} shows something else there ({shown})"
        if not bool(torch.cat(moved).any()):
            return f"the bridge of {kind} shows it, but what is put in its place does not reach the logits"
        return None

    def heads_of(self, component: Component) -> int:
        """Number of heads of a component: keys and values may have fewer. 1 where it has none."""
        if component not in PER_HEAD:
            return 1
        return self.kv_heads if component in ("k", "v") else self.heads

    def has(self, component: Component) -> bool:
        """Whether blocks have this component (those with parallel attention and MLP have no `resid_mid`)."""
        return f"blocks.0.{NAMES[component]}" in self._hooks

    def point(self, layer: int, component: Component) -> Any:
        """The hook point of a component. Raises InputError naming it, if the bridge does not have it."""
        return self.named_point(f"blocks.{layer}.{NAMES[component]}")

    def named_point(self, name: str) -> Any:
        """The hook point that transformer-lens calls `name`. Raises InputError if the bridge does not have it."""
        found = self._hooks.get(name)
        if found is None:
            kind = type(self.model).__name__
            raise InputError(
                f"the bridge of {kind} has no hook point {name!r} ({self.layers} layers); name another component"
            )
        return found

    def check(self, site: Site) -> None:
        """Raise InputError naming a site that does not exist in this model, or that cannot be patched."""
        self.point(site.layer, site.component)
        if site.head is not None and site.head >= self.heads_of(site.component):
            raise InputError(
                f"{site}: there is no head {site.head}; heads are 0 to {self.heads_of(site.component) - 1}"
            )
        if site.neuron is not None and site.neuron >= self.d_mlp:
            raise InputError(f"{site}: there is no neuron {site.neuron}; neurons are 0 to {self.d_mlp - 1}")
        if why := self.why_not(site.component):
            raise InputError(f"{site} cannot be patched: {why}; name another component")

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
        """The model's whole output for a batch, with edits in place: `run` gives its logits alone.

        `options` go to the model as they are. Raises RunError naming a hook that never fired.
        """
        padded = {"attention_mask": batch.real.long(), "position_ids": batch.position_ids} if batch.padded else {}
        self.tell_width(len(batch))
        with self.hooked(edits):
            return self.model(
                input_ids=batch.ids, logits_to_keep=1 if last_only else 0, **{"use_cache": False, **padded, **options}
            )

    def tell_width(self, rows: int) -> None:
        """Tell the bridge how many rows the next forward has, where the model is called without `forward`."""
        # the bridge's position embedding expands itself to a batch size that its own forward would have set
        embedding = getattr(self.bridge, "pos_embed", None)
        if embedding is not None:
            embedding._current_batch_size = rows

    def unembed(self, hidden: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row vocabulary"]:
        """Logits of the residual stream behind the last layer; they are scaled and capped where the model does that."""
        config = self.model.config.get_text_config()
        norm = getattr(self.bridge, "ln_final", None)
        logits = self.bridge.unembed(hidden if norm is None else norm(hidden))
        logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if not cap else cap * torch.tanh(logits / cap)

    def capture(
        self, batch: Tokens, components: Sequence[tuple[int, Component]], first: int = 0
    ) -> tuple[dict[tuple[int, Component], Tensor], Float[Tensor, "row vocabulary"]]:
        """Activations of (layer, component) pairs, and the logits of the last column, from one forward.

        Columns before `first` are left out.

        Shapes: [row, pos, d_model] for residual stream and outputs, [row, pos, d_mlp] for neurons, [row, pos, head,
        d_head] for z, q, k and v, [row, head, query, key] for patterns.
        """
        found: dict[tuple[int, Component], Tensor] = {}
        with torch.no_grad():  # not inference mode: what is captured may meet autograd later
            logits = self.run(batch, self.keeping(components, found, first))
        return found, logits[:, -1]

    def keeping(
        self, components: Sequence[tuple[int, Component]], found: dict[tuple[int, Component], Tensor], first: int = 0
    ) -> list[tuple[Any, Edit]]:
        """Edits that change nothing and store what passes in `found`, by (layer, component), from column `first` on."""

        def keep(key: tuple[int, Component]) -> Edit:
            def store(activation: Tensor) -> None:
                kept = activation.detach()
                if first:
                    kept = (kept[:, :, first:] if key[1] == "pattern" else kept[:, first:]).clone()
                found[key] = kept.float() if kept.element_size() < 4 else kept  # no solver takes half precision

            return store

        return [(self.point(*key), keep(key)) for key in dict.fromkeys(components)]

    def get_parameter(self, name: str) -> nn.Parameter:
        """A parameter, by the plain model's name for it. Raises KeyError if there is none."""
        return {self.parameter_names.get(id(each)): each for each in self.model.parameters()}[name]


def _some_tokens(model: Any) -> Int[Tensor, "1 pos"]:
    """Ids from all over the vocabulary, on the model's device."""
    words = model.get_input_embeddings().weight
    return (torch.arange(1, PROBED + 1, device=words.device) * len(words) // (PROBED + 2))[None]


def _spread(logits: Float[Tensor, "row vocabulary"]) -> Float[Tensor, " row"]:
    """How far logits lie from their mean, which no probability depends on."""
    return (logits - logits.mean(-1, keepdim=True)).norm(dim=-1).clamp(min=1e-6)


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
