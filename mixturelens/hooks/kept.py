"""Keys and values of prompts, computed once: whatever comes behind a prompt goes on from there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mixturelens.hooks.lens import Edit, Lens

Keys = tuple[tuple[Tensor, Tensor], ...]
"""Of one row, layer by layer: keys and values, [key head, token, d_head] each."""

MOST = 1 << 30
"""Bytes of keys and values that are kept, unless asked otherwise; what is beyond is computed anew."""
BATCH_TOKENS = 2048
"""Tokens of one forward: larger batches fall out of the cache and are slower on a CPU."""


def cache_of(behind: Sequence[Keys]) -> Any:
    """Keys and values of rows of one length as a cache."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, rows in enumerate(zip(*behind, strict=True)):
        cache.update(torch.stack([key for key, _ in rows]), torch.stack([value for _, value in rows]), layer)
    return cache


def forward(
    lens: Lens,
    ids: Int[Tensor, "row window"],
    cache: Any = None,
    edits: Sequence[tuple[Any, Edit]] = (),
    keep: int | Tensor = 1,
) -> Any:
    """Run a model on tokens that follow what a cache holds, with edits in place.

    Every row has as many tokens before. `keep` is what the model takes as `logits_to_keep`. The cache holds these
    tokens, too, afterwards: in the layers that were run, where an edit ended the run.
    """
    cache = cache_of(()) if cache is None else cache
    start = cache.get_seq_length()
    positions = torch.arange(start, start + ids.shape[1], device=ids.device).expand(len(ids), -1)
    lens.tell_width(len(ids))
    with lens.hooked(edits):
        return lens.model(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=keep
        )


def keys_of(output: Any) -> list[Keys]:
    """Keys and values of each row of a forward."""
    layers = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
    return [tuple((key[row], value[row]) for key, value in layers) for row in range(len(layers[0][0]))]


def cut(keys: Keys, end: int) -> Keys:
    """The keys and values of the first `end` tokens alone."""
    return tuple((key[:, :end], value[:, :end]) for key, value in keys)


class KeptBeginnings:
    """Keys and values that a lens' model has at prompts, up to the token before the last.

    They are those of the weights as they were when a prompt was first asked about: changed weights need another one.
    """

    def __init__(self, lens: Lens, most: int = MOST) -> None:
        self.lens, self.most = lens, most
        self._held: dict[tuple[int, ...], Keys] = {}
        self._bytes = 0

    def of(self, prompts: Sequence[tuple[int, ...]]) -> list[Keys]:
        """Keys and values of each prompt, without any intervention; computed where they are not yet kept."""
        found: dict[tuple[int, ...], Keys] = {}
        by_length: dict[int, list[tuple[int, ...]]] = {}
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._held:
                by_length.setdefault(len(prompt), []).append(prompt)
        for length, some in by_length.items():
            step = max(1, BATCH_TOKENS // length)
            for start in range(0, len(some), step):
                part = some[start : start + step]
                ids = torch.tensor([prompt[:-1] for prompt in part], device=self.lens.device)
                with torch.no_grad():
                    found |= dict(zip(part, keys_of(forward(self.lens, ids)), strict=True))
        for prompt, keys in found.items():
            size = sum(part.nbytes for layer in keys for part in layer)
            if self._bytes + size <= self.most:
                self._held[prompt] = keys
                self._bytes += size
        return [found.get(prompt) or self._held[prompt] for prompt in prompts]

    @property
    def known(self) -> int:
        """Prompts that are kept."""
        return len(self._held)
