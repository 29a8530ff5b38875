"""Beginnings that rows share: each of their tokens goes through a model once, and its keys and values are kept.

The contexts of a call form a tree: a system prompt, the prompts that begin with it, their announcements. Every piece of
it is computed behind the piece above it. Keys and values are kept piece by piece, so that no token is held twice, and
put together for the rows that go on from them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

Model = Callable[..., Any]
Ids = tuple[int, ...]

LONG = 32
"""Tokens from which it pays to keep a beginning; those of small organisms are recomputed."""
PAYS = 8
"""Tokens that must be saved for a beginning that is no context itself to be a piece of its own."""
BATCH_TOKENS = 4096
"""Bound on the tokens of one batch, with those it attends to: larger ones fall out of the cache of a CPU."""
KEPT_BYTES = 2 << 30
"""Bound on the keys and values that are kept."""


@dataclass(frozen=True, eq=False)
class Beginning:
    """A piece of the beginning of prompts, and the keys and values that a model computed there."""

    above: Beginning | None
    length: int
    """Tokens from the start to its end."""
    keys: Float[Tensor, "which layer head token d_head"]
    """Keys and values of its own tokens."""
    last: Float[Tensor, " vocabulary"]
    """Logits of the token behind it."""


Known = dict[Ids, Beginning]
"""The beginnings of one model, by all of their tokens."""


def keeps(model: Model) -> bool:
    """Whether a model gives keys and values of all tokens, to go on from for several rows.

    A plain model does, and a side of a shared base. Recurrent models keep a state instead; some keep fewer layers, or
    something else than keys.
    """
    plain = isinstance(model, torch.nn.Module) or hasattr(model, "under")
    config = getattr(model, "config", None)
    if not plain or not hasattr(config, "use_cache") or getattr(model, "_is_stateful", False):
        return False
    text: Any = config.get_text_config() if config is not None else None
    kinds = set(getattr(text, "layer_types", None) or ())
    other = any(getattr(text, name, None) for name in ("kv_lora_rank", "num_kv_shared_layers", "is_encoder_decoder"))
    return not other and kinds <= {"full_attention", "sliding_attention"}


class Growing(Protocol):
    """Rows that go on by a token at a time."""

    logits: Float[Tensor, "row vocabulary"]
    """Of the token behind each row."""

    def go_on(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Put a token behind each of some rows; a row may go on in several ways, each of which is a row then."""
        ...


class Rows:
    """Rows that go on behind kept beginnings of a model."""

    def __init__(self, model: Model, behind: Sequence[Beginning], device: str) -> None:
        self.logits = torch.stack([each.last for each in behind])
        self._model, self._device = model, device
        self._cache, self._real = together(behind, device)
        self._lengths = torch.tensor([each.length for each in behind], device=device)

    @torch.inference_mode()
    def go_on(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """As `Growing` says."""
        at, ids = (torch.tensor(list(each), device=self._device) for each in (rows, tokens))
        if list(rows) != list(range(len(self.logits))):
            self._cache.batch_select_indices(at)
        positions, ids = self._lengths[at], ids[:, None]
        self._lengths = positions + 1
        self._real = None if self._real is None else torch.cat([self._real[at], torch.ones_like(ids)], 1)
        self.logits = self._model(
            input_ids=ids,
            attention_mask=self._real,
            position_ids=positions[:, None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]


def tree(contexts: Iterable[Ids]) -> dict[Ids, Ids]:
    """Every context, and what several contexts share where that is PAYS tokens or more: beginning -> the one it goes on
    from.

    At the top is `()`. Each beginning comes after the one that it goes on from.

    >>> tree([(1, 2, 3), (1, 2, 3, 4)])
    {(1, 2, 3): (), (1, 2, 3, 4): (1, 2, 3)}
    """
    rows = sorted(set(contexts))
    found: dict[Ids, Ids] = {}
    # rows[low:high] agree in their first `at` tokens, and `above` is a beginning of all of them
    open_ones: list[tuple[int, int, int, Ids]] = [(0, len(rows), 0, ())] if rows else []
    while open_ones:
        low, high, at, above = open_ones.pop()
        first, last = rows[low], rows[high - 1]
        while at < len(first) and at < len(last) and first[at] == last[at]:
            at += 1
        is_context = at == len(first)
        if is_context or (high - low - 1) * (at - len(above)) >= PAYS:
            found[first[:at]] = above
            above = first[:at]
            low += is_context
        starts = [i for i in range(low, high) if i == low or rows[i][at] != rows[i - 1][at]]
        open_ones += [(i, j, at, above) for i, j in itertools.pairwise([*starts, high])]
    return found


def grow(model: Model, contexts: Iterable[Ids], known: Known, device: str) -> None:
    """Compute what a model has at every context, adding to `known`; what is known already is not run again."""
    wanted = {context for context in contexts if context not in known}
    lengths = sorted({len(each) for each in known})
    there = {each[:n] for each in wanted for n in lengths if n < len(each) and each[:n] in known}
    above = tree(wanted | there)
    waiting = [each for each in above if each not in known]
    while waiting:
        ready = [each for each in waiting if not above[each] or above[each] in known]
        behind = [known.get(above[each]) for each in ready]
        pieces = [each[len(above[each]) :] for each in ready]
        for some in cut([0 if b is None else b.length for b in behind], [len(piece) for piece in pieces]):
            made = _computed(model, [behind[i] for i in some], [pieces[i] for i in some], device)
            known.update((ready[i], one) for i, one in zip(some, made, strict=True))
        waiting = [each for each in waiting if each not in known]


def cut(behind: Sequence[int], more: Sequence[int], most: int = 1 << 62) -> Iterator[list[int]]:
    """Batches of rows of like lengths, of at most `most` new tokens: `more[i]` tokens follow `behind[i]` others."""
    batch: list[int] = []
    widest = longest = 0
    # padding on the left is only attended to, padding on the right is computed
    for i in sorted(range(len(behind)), key=lambda i: (more[i], behind[i])):
        widest_then, longest_then = max(widest, behind[i]), max(longest, more[i])
        rows = len(batch) + 1
        if batch and (rows * (widest_then + longest_then) > BATCH_TOKENS or rows * longest_then > most):
            yield batch
            batch, widest_then, longest_then = [], behind[i], more[i]
        batch.append(i)
        widest, longest = widest_then, longest_then
    if batch:
        yield batch


@torch.inference_mode()
def _computed(model: Model, behind: Sequence[Beginning | None], pieces: Sequence[Ids], device: str) -> list[Beginning]:
    """Beginnings from their last pieces: one forward."""
    lengths = [len(piece) for piece in pieces]
    ends = sorted(set(lengths))
    keep = torch.tensor([end - 1 for end in ends], device=device)
    width, logits, cache = _forward(model, behind, pieces, device, keep)
    keys = torch.stack([torch.stack([layer.keys, layer.values]) for layer in cache.layers], 1)
    return [
        Beginning(
            above=above,
            length=length + (0 if above is None else above.length),
            keys=keys[:, :, row, :, width : width + length].clone(),
            last=logits[row, ends.index(length)].clone(),
        )
        for row, (above, length) in enumerate(zip(behind, lengths, strict=True))
    ]


@torch.inference_mode()
def logits_behind(
    model: Model, behind: Sequence[Beginning], more: Sequence[Ids], device: str
) -> Float[Tensor, "row step vocabulary"]:
    """Logits of the token that follows each beginning, and of those that follow each token of `more` there."""
    first = torch.stack([each.last for each in behind])[:, None]
    if not any(more):
        return first
    return torch.cat([first, _forward(model, behind, more, device, 0)[1]], 1)


def _forward(
    model: Model, behind: Sequence[Beginning | None], pieces: Sequence[Ids], device: str, keep: int | Tensor
) -> tuple[int, Tensor, Any]:
    """Pieces behind beginnings: padded on the right, where a causal model does not look; beginnings on the left.

    (width of the beginnings, logits of the kept tokens, keys and values of all).
    """
    cache, real = together(behind, device)
    width = max(0 if each is None else each.length for each in behind)
    longest = max(len(piece) for piece in pieces)
    ids = torch.tensor([[*piece, *[0] * (longest - len(piece))] for piece in pieces], device=device)
    start = torch.tensor([0 if each is None else each.length for each in behind], device=device)
    seen = None if real is None else torch.cat([real, torch.ones_like(ids)], 1)
    output = model(
        input_ids=ids,
        attention_mask=seen,
        position_ids=start[:, None] + torch.arange(longest, device=device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=keep,
    )
    return width, output.logits, output.past_key_values


def together(behind: Sequence[Beginning | None], device: str) -> tuple[Any, Int[Tensor, "row pos"] | None]:
    """Keys and values of beginnings as one batch, padded on the left, and a mask of what is none (None: all)."""
    from transformers import DynamicCache

    lengths = [0 if each is None else each.length for each in behind]
    width, cache = max(lengths), DynamicCache()
    if width:
        some = next(each for each in behind if each is not None).keys
        which, layers, heads, _, size = some.shape
        whole = some.new_zeros(which, layers, len(behind), heads, width, size)
        for row, each in enumerate(behind):
            end = width
            while each is not None:
                start = end - each.keys.shape[3]
                whole[:, :, row, :, start:end] = each.keys
                each, end = each.above, start
        for layer in range(layers):
            cache.update(whole[0, layer], whole[1, layer], layer)
    if len(set(lengths)) == 1:
        return cache, None
    real = torch.arange(width, device=device) >= width - torch.tensor(lengths, device=device)[:, None]
    return cache, real.long()


def bytes_of(known: Known) -> int:
    """Bytes that the keys and values of all these beginnings take."""
    return sum(each.keys.nbytes + each.last.nbytes for each in known.values())
