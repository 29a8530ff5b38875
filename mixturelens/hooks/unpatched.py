"""A run of a model whose blocks can then be called alone, at some layers, columns and rows.

Blocks are the model's own, called with the arguments that the model itself gave them, cut to the positions in question.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mixturelens.hooks.lens import FOREIGN, Edit, Lens, Tokens
from mixturelens.types import Component, RunError

TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the largest logit, at which blocks called alone are taken to be exact."""


class _Keys:
    """Stands in for the model's key-value cache: says what the queries of this call may attend to."""

    is_compileable = False

    def __init__(self, complete: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self._complete = complete

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._complete(key, value)


class _KeysKnown(Exception):
    """Ends a block once its keys and values are known."""


class Watched(NamedTuple):
    """Activations of the base run that an engine keeps: what of which layer, and from which column on."""

    places: Sequence[tuple[int, Component]] = ()
    first: int = 0


NOTHING = Watched()


class Unpatched:
    """One batch of prompts, run once: what went into every block, and the keys and values that came of it.

    `resid[layer]` is the residual stream before a layer, and `resid[layers]` that behind the last; `keys[layer]` the
    keys and values; `seen` what was asked for by `watch`; `logits` those of the last column; `apart` whether columns
    that are no neighbours can go through a block together.
    """

    def __init__(self, lens: Lens, base: Tokens, watch: Watched = NOTHING) -> None:
        """Runs the batch. Raises RunError if blocks called alone do not give back what the model gives."""
        self.lens, self.base = lens, base
        self.width = base.ids.shape[1]
        self.seen: dict[tuple[int, Component], Tensor] = {}
        with torch.no_grad():  # not inference mode: `Engine.logits_with` computes gradients through what is kept
            try:
                self._run(watch)
                self._check()
                if watch.first:  # nothing before is ever patched
                    self.resid = [stream[:, watch.first :].clone() for stream in self.resid]
            except torch.OutOfMemoryError:
                raise
            except FOREIGN as error:
                why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                raise RunError(
                    f"the blocks of {type(lens.model).__name__} cannot be called alone ({why}): no exact engine"
                ) from None

    def _run(self, watch: Watched) -> None:
        from transformers import Cache, DynamicCache

        blocks = list(self.lens.bridge.blocks)
        arguments: list[dict[str, Any]] = []

        def keep(block: Any) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
            names = list(inspect.signature(type(block.original_component).forward).parameters)[1:]

            def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                arguments.append({**dict(zip(names, args, strict=False)), **kwargs})

            return hook

        handles = [block.register_forward_pre_hook(keep(block), with_kwargs=True) for block in blocks]
        final: list[Tensor] = []
        cache = DynamicCache()
        try:
            last = (self.lens.point(self.lens.layers - 1, "resid_post"), final.append)
            watched = self.lens.keeping(watch.places, self.seen, watch.first)
            output = self.lens.forward(self.base, [last, *watched], past_key_values=cache, use_cache=True)
        finally:
            for handle in handles:
                handle.remove()
        self.logits: Float[Tensor, "row vocabulary"] = output.logits[:, -1]
        if any("hidden_states" not in given for given in arguments):
            raise RunError(f"the blocks of {type(self.lens.model).__name__} take no `hidden_states`: no exact engine")
        self.resid: list[Float[Tensor, "row pos d_model"]] = [given.pop("hidden_states") for given in arguments]
        self.resid.append(final[0])
        self.keys = [cast(tuple[Tensor, Tensor], (layer.keys, layer.values)) for layer in cast(Any, cache.layers)]
        self._arguments = [self._understood(given, Cache) for given in arguments]

    def _understood(self, given: dict[str, Any], cache_class: type) -> dict[str, Any]:
        """The arguments of a block; tensors that the engine would not know how to cut are refused."""
        positional = ("attention_mask", "position_ids", "cache_position")
        for name, value in given.items():
            if isinstance(value, Tensor) and name not in (*positional, "alibi"):
                raise RunError(f"the blocks of {type(self.lens.model).__name__} take {name!r}, which cannot be cut")
        named = {name: value for name, value in given.items() if not isinstance(value, cache_class)}
        caches = [name for name, value in given.items() if isinstance(value, cache_class)]
        if len(caches) != 1:
            raise RunError(f"the blocks of {type(self.lens.model).__name__} take no key-value cache: no exact engine")
        named["_cache"] = caches[0]
        if named.get("attention_mask") is None:
            allowed = torch.ones(self.width, self.width, dtype=torch.bool, device=self.base.ids.device).tril()
            least = torch.finfo(self.resid[0].dtype).min
            named["attention_mask"] = torch.where(allowed, 0.0, least)[None, None]
        return named

    def _check(self) -> None:
        """Blocks called alone, from the middle of the prompt on, must give the model's own logits."""
        rows = torch.arange(min(2, len(self.base)), device=self.base.ids.device)
        start = self.width // 2
        hidden = self.resid[0][rows, start:]
        for layer in range(self.lens.layers):
            hidden = self.advance(layer, hidden, rows, start)
        found, expected = self.logits_of(hidden), self.logits[rows]
        error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))
        if not error < TOLERANCE:
            raise RunError(
                f"the blocks of {type(self.lens.model).__name__}, called alone, give other logits than the model "
                f"(relative difference {error:.2g}); the patch engine does not support this architecture"
            )
        self.apart = all(self._same_apart(layer, rows) for layer in range(self.lens.layers))

    def _same_apart(self, layer: int, rows: Int[Tensor, " run"]) -> bool:
        """Whether columns that are no neighbours can go through a block together: GPT-Neo's count from the last one."""
        columns = sorted({0, self.width - 1})
        found = self.block(layer, self.resid[layer][rows][:, columns], rows, columns, self.unchanged(layer, rows))
        expected = self.resid[layer + 1][rows][:, columns]
        return float((found - expected).abs().max()) < TOLERANCE * max(1.0, float(expected.abs().max()))

    def block(
        self,
        layer: int,
        hidden: Float[Tensor, "run window d_model"],
        rows: Int[Tensor, " run"],
        columns: Sequence[int],
        keys: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        edits: Sequence[tuple[Any, Edit]] = (),
    ) -> Float[Tensor, "run window d_model"]:
        """One block at some columns of some rows, which attend to what `keys` says (all columns up to the last)."""
        window = list(columns)
        upto = window[-1] + 1
        # a slice is a view where a list would be a copy
        at = slice(window[0], upto) if window == list(range(window[0], upto)) else window

        def mine(value: Tensor) -> Tensor:
            return value if len(value) == 1 else value[rows]

        given = dict(self._arguments[layer])
        given[given.pop("_cache")] = _Keys(keys)
        given["attention_mask"] = mine(given["attention_mask"][:, :, at, :upto])
        if given.get("position_ids") is not None:
            given["position_ids"] = mine(given["position_ids"][:, at])
        if given.get("alibi") is not None:  # [row x head, 1, key]
            slopes = rearrange(given["alibi"], "(row head) one key -> row head one key", row=len(self.base))
            given["alibi"] = rearrange(slopes[rows, :, :, :upto], "row head one key -> (row head) one key")
        if given.get("cache_position") is not None:
            given["cache_position"] = given["cache_position"][at]
        if given.get("position_embeddings") is not None:
            given["position_embeddings"] = tuple(mine(part[:, at]) for part in given["position_embeddings"])
        with self.lens.hooked(edits):
            output = self.lens.bridge.blocks[layer](hidden_states=hidden, **given)
        return output[0] if isinstance(output, tuple) else output

    def advance(
        self,
        layer: int,
        hidden: Float[Tensor, "run window d_model"],
        rows: Int[Tensor, " run"],
        start: int,
        edits: Sequence[tuple[Any, Edit]] = (),
    ) -> Float[Tensor, "run window_after d_model"]:
        """Through one layer, from column `start` on. After the last layer only the last column is left."""
        if layer == self.lens.layers - 1:
            return self.at_last(hidden, rows, range(start, self.width), edits)
        return self.onwards(layer, hidden, rows, start, edits)

    def onwards(
        self,
        layer: int,
        hidden: Float[Tensor, "run window d_model"],
        rows: Int[Tensor, " run"],
        start: int,
        edits: Sequence[tuple[Any, Edit]] = (),
    ) -> Float[Tensor, "run window d_model"]:
        """Through one layer, from column `start` on, all columns."""

        def keys(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            before = [part[rows, :, :start] for part in self.keys[layer]]
            return torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)

        return self.block(layer, hidden, rows, range(start, self.width), keys, edits)

    def at_last(
        self,
        changed: Float[Tensor, "run column d_model"],
        rows: Int[Tensor, " run"],
        columns: Sequence[int],
        edits: Sequence[tuple[Any, Edit]] = (),
    ) -> Float[Tensor, "run 1 d_model"]:
        """The last layer at the last column alone, where its input changed at `columns`.

        Of the other changed columns only keys and values are needed, so their block is left once those are known.
        """
        layer, last = self.lens.layers - 1, self.width - 1
        earlier = [column for column in columns if column != last]
        found: list[Tensor] = []
        if earlier:

            def stop(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
                found.extend((key, value))
                raise _KeysKnown

            with contextlib.suppress(_KeysKnown):
                self.block(layer, changed[:, : len(earlier)], rows, earlier, stop)

        def keys(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            whole = [part[rows] for part in self.keys[layer]]
            for part, new in zip(whole, (key, value), strict=True):
                part[:, :, last:] = new
            for part, new in zip(whole, found, strict=False):
                part[:, :, earlier] = new
            return whole[0], whole[1]

        hidden = changed[:, -1:] if last in columns else self.resid[layer][rows, -1:]
        return self.block(layer, hidden, rows, [last], keys, edits)

    def logits_of(self, hidden: Float[Tensor, "run window d_model"]) -> Float[Tensor, "run vocabulary"]:
        return self.lens.unembed(hidden[:, -1:])[:, 0]

    def unchanged(
        self, layer: int, rows: Int[Tensor, " run"], upto: int | None = None
    ) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Attention to the keys and values of the unpatched run."""

        def keys(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            before = [part[rows, :, :upto] for part in self.keys[layer]]
            return before[0], before[1]

        return keys
