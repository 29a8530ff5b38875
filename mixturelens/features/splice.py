"""A model with something of another put into it at one place, at all tokens of texts: asked many times about the same.

Below the place nothing depends on what is put there. So both models are run up to it once, and each splice runs the
layers from it on: of every prompt once, and of what follows a prompt behind its keys and values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixturelens.features.activations import At, massive
from mixturelens.hooks.intervened import EnoughRead
from mixturelens.hooks.lens import Edit, Lens
from mixturelens.types import InputError

Splice = Callable[[Float[Tensor, "row pos d"], Float[Tensor, "row pos d"]], Float[Tensor, "row pos d"]]
"""(the model's own activations, the other model's) -> what is put in place of the model's own."""

TOKENS = 4096
"""Tokens of one forward: larger batches fall out of the cache and are slower on a CPU."""


@dataclass(frozen=True)
class Crossing:
    """One place (layer, component) in two models of one shape: what `other` has there can be put into `into`."""

    into: Lens
    other: Lens
    at: At


def own(mine: Tensor, other: Tensor) -> Tensor:
    """The splice that leaves the model as it is."""
    return mine


def whole(mine: Tensor, other: Tensor) -> Tensor:
    """The splice that puts in the other model's activations whole."""
    return other


def but_sinks(splice: Splice) -> Splice:
    """The same splice, but for sinks of attention, which stay as they are: dictionaries do not learn them."""

    def careful(mine: Tensor, other: Tensor) -> Tensor:
        return torch.where(massive(mine)[..., None], mine, splice(mine, other))

    return careful


@dataclass(frozen=True)
class _Below:
    """A model below the place, on some tokens: what enters the place's block, what is at the place, keys and values."""

    entering: Float[Tensor, "row pos d_model"]
    there: Float[Tensor, "row pos d"]
    keys: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class _Window:
    """Rows that go on behind prompts: which prompt each does, its tokens from the prompt's last one on."""

    owner: Int[Tensor, " row"]
    ids: Int[Tensor, "row pos"]

    @cached_property
    def key(self) -> tuple[bytes, bytes]:
        return self.owner.cpu().numpy().tobytes(), self.ids.cpu().numpy().tobytes()


class BothModels:
    """Both models up to one place, on known prompts and whatever follows them."""

    def __init__(self, into: Lens, other: Lens, at: At, prompts: Sequence[Sequence[int]]) -> None:
        self.into, self.other, self.at = into, other, at
        self.prompts = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
        self.number = {prompt: k for k, prompt in enumerate(self.prompts)}
        self.lengths = sorted({len(prompt) for prompt in self.prompts}, reverse=True)
        if self.lengths[-1] < 2:
            raise InputError("a prompt of a single token has nothing before what follows it: give longer prompts")
        width = self.lengths[0] - 1
        self.ids = torch.zeros(len(self.prompts), width, dtype=torch.long)
        self.real = torch.zeros_like(self.ids)
        for k, prompt in enumerate(self.prompts):
            self.ids[k, width + 1 - len(prompt) :] = torch.tensor(prompt[:-1])
            self.real[k, width + 1 - len(prompt) :] = 1
        self.ids, self.real = self.ids.to(into.device), self.real.to(into.device)
        self.tuples = False
        """Whether the model's blocks give tuples."""
        self._below: dict[Any, tuple[_Below, _Below]] = {}

    @property
    def parts(self) -> list[slice]:
        """Prompts, so many that a forward of them stays within bounds."""
        step = max(1, TOKENS // self.ids.shape[1])
        return [slice(start, start + step) for start in range(0, len(self.prompts), step)]

    def window(self, ids: Int[Tensor, "row pos"], end: int) -> tuple[_Window, list[int]]:
        """Whole rows up to column `end`, as windows behind their prompts; and the column of each row's first token.

        Padding is left out: of the zeros that a row ends in, all but the first, which may be its last token. Raises
        InputError for a row that begins with none of the prompts.
        """
        owner, first = [], []
        rows = ids.tolist()
        columns = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        ends = ((ids != 0) * columns).amax(1).add(1).clamp(max=end).tolist()
        for row in rows:
            found = next((k for n in self.lengths if (k := self.number.get(tuple(row[:n]))) is not None), None)
            if found is None:
                raise InputError("a spliced model was asked about a prompt that is not among those it was made for")
            owner.append(found)
            first.append(len(self.prompts[found]) - 1)
        width = max(1, *(last - start for last, start in zip(ends, first, strict=True)))
        new = torch.zeros(len(rows), width, dtype=torch.long)
        for number, (row, start) in enumerate(zip(rows, first, strict=True)):
            some = row[start : start + width]
            new[number, : len(some)] = torch.tensor(some)
        return _Window(torch.tensor(owner, device=ids.device), new.to(ids.device)), first

    def below(self, where: slice | _Window) -> tuple[_Below, _Below]:
        """What both models have below the place, on prompts or on windows behind them; each is run once and kept."""
        key = (where.start, where.stop) if isinstance(where, slice) else where.key
        if key not in self._below:
            lenses = [self.into] if self.other is self.into else [self.into, self.other]
            found = [self._run_below(lens, number, where) for number, lens in enumerate(lenses)]
            self._below[key] = (found[0], found[-1])
        return self._below[key]

    @cached_property
    def keys_below(self) -> list[list[tuple[Tensor, Tensor]]]:
        """Keys and values of all prompts in the layers below the place: of `into`, and of the other model."""
        found = [self.below(part) for part in self.parts]
        return [_joined([pair[number].keys for pair in found]) for number in (0, 1)]

    def _run_below(self, lens: Lens, number: int, where: slice | _Window) -> _Below:
        layer, component = self.at
        found: dict[At, Tensor] = {}

        def keep(key: At, last: bool) -> Edit:
            def store(activation: Tensor) -> None:
                found[key] = activation.clone()
                if last:
                    raise EnoughRead

            return store

        entering: At = (layer, "resid_pre")
        edits = [(lens.point(*entering), keep(entering, component == "resid_pre"))]
        if component != "resid_pre":
            edits.append((lens.point(*self.at), keep(self.at, True)))
        keys = [] if isinstance(where, slice) else self.keys_below[number]
        cache = _cache()
        handle = lens.bridge.blocks[0].register_forward_hook(self._see) if number == 0 else None
        try:
            with contextlib.suppress(EnoughRead):
                _run(lens, self, where, edits, keys, cache, 1)
        finally:
            if handle is not None:
                handle.remove()
        # of prompts, what follows them attends to: in the place's own layer, too, unless it ended before that
        layers = cache.layers[: layer + (component != "resid_pre")] if isinstance(where, slice) else []
        held = [(each.keys, each.values) for each in layers]
        return _Below(found[entering], found[self.at], tuple(held))

    def _see(self, _: Any, __: Any, output: Any) -> None:
        self.tuples = isinstance(output, tuple)


def _cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


def _run(
    lens: Lens,
    ground: BothModels,
    where: slice | _Window,
    edits: Sequence[tuple[Any, Edit]],
    keys: Sequence[tuple[Tensor, Tensor]],
    cache: Any,
    keep: int,
) -> Any:
    """A forward of some prompts, or of windows behind prompts with these keys and values of all prompts."""
    if isinstance(where, slice):
        ids, mask = ground.ids[where], ground.real[where]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
    else:
        ids, before = where.ids, ground.real[where.owner]
        mask = torch.cat([before, torch.ones_like(ids)], 1)
        positions = before.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=ids.device)
        for layer, (key, value) in enumerate(keys):
            cache.update(key[where.owner], value[where.owner], layer)
    padded = not bool(mask.all())
    lens.tell_width(len(ids))
    with lens.hooked(edits):
        return lens.model(
            input_ids=ids,
            attention_mask=mask if padded else None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        )


def _joined(parts: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of several parts of the prompts, layer by layer, as those of all."""
    return [
        (torch.cat([key for key, _ in layer]), torch.cat([value for _, value in layer]))
        for layer in zip(*parts, strict=True)
    ]


class Spliced:
    """A model into which something of another is put at one place, at all tokens: called like the model itself.

    It is asked about whole rows, each a prompt that the ground knows with something behind it. Logits before a prompt's
    last token, and at padding, are NaN.
    """

    def __init__(self, ground: BothModels, splice: Splice) -> None:
        self.ground, self.splice = ground, splice

    @torch.inference_mode()
    def __call__(
        self, input_ids: Int[Tensor, "row pos"], *, logits_to_keep: int | Tensor = 0, use_cache: bool = False
    ) -> Any:
        if use_cache:
            raise InputError("a spliced model keeps no cache: ask it for the logits of whole texts")
        width = input_ids.shape[1]
        columns = logits_to_keep
        if not isinstance(columns, Tensor):
            columns = torch.arange(width - columns if columns else 0, width)
        columns = columns.tolist()
        window, first = self.ground.window(input_ids, max(columns) + 1)
        found = self._forward(window, self._keys).logits
        logits = found.new_full((len(input_ids), len(columns), found.shape[-1]), torch.nan)
        for row, start in enumerate(first):
            inside = [(k, column - start) for k, column in enumerate(columns) if 0 <= column - start < found.shape[1]]
            if inside:
                logits[row, [k for k, _ in inside]] = found[row, [at for _, at in inside]]
        return SimpleNamespace(logits=logits)

    @cached_property
    def _keys(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of all prompts: from the place's layer on those with the splice in place.

        Of the layers below, which are not run, the first one's stand for all: a cache needs them to know its length.
        """
        layer, parts = self.ground.at[0], self.ground.parts
        above = []
        for part in parts:
            cache = _cache()
            self._forward(part, (), cache)
            above.append([(each.keys, each.values) for each in cache.layers[layer:]])
        return [*self.ground.keys_below[0][:1] * layer, *_joined(above)]

    def _forward(self, where: slice | _Window, keys: Sequence[tuple[Tensor, Tensor]], cache: Any = None) -> Any:
        ground = self.ground
        (layer, component), lens = ground.at, ground.into
        mine, other = ground.below(where)
        put = self.splice(mine.there, other.there)

        def place(values: Tensor) -> Edit:
            # in place: the residual stream between attention and MLP is read twice
            return lambda activation: activation.copy_(values)

        edits = [(lens.point(layer, component), place(put))]
        if component != "resid_pre":
            edits.insert(0, (lens.point(layer, "resid_pre"), place(mine.entering)))
        with _skipping(lens, layer, ground.tuples):
            keep = 1 if isinstance(where, slice) else 0
            return _run(lens, ground, where, edits, keys, _cache() if cache is None else cache, keep)


@contextlib.contextmanager
def _skipping(lens: Lens, layers: int, tuples: bool) -> Iterator[None]:
    """The first blocks hand on what they are given, for the length of a block: their output is put in place later."""

    def passing(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if tuples else hidden

    blocks = list(lens.bridge.blocks)[:layers]
    try:
        for block in blocks:
            block.__dict__["forward"] = passing
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
