"""Logits at every step of continuations, batch by batch: what all probabilities of behaviour are read from.

A *context* is a prompt's token ids, perhaps with an announcement behind it. Models are Hugging Face causal language
models, or anything that is called like one. Logits are taken to float64 before any logarithm, so that the probability
of everything *but* a literal is right even when the literal has probability 1 - 1e-9.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixturelens.models.beginnings import (
    BATCH_TOKENS,
    KEPT_BYTES,
    LONG,
    Known,
    Model,
    bytes_of,
    cut,
    grow,
    keeps,
    logits_behind,
)

Ids = Sequence[int]

END = -1
"""In a literal: any of the model's end tokens."""

BATCH_BYTES = 256 << 20
"""Bound on the logits of one batch."""
PART = 4 << 20
"""Logits that are summed at a time, in float64."""


def batches(lengths: Sequence[int], starts: Sequence[int], vocabulary: int, most: int) -> Iterator[list[int]]:
    """Rows sorted by length, in batches of at most `most` tokens, whose logits fit into BATCH_BYTES.

    Logits of row i are held from token `starts[i]` on, and `vocabulary` numbers at each (of all models together).
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], starts[i]))
    batch: list[int] = []
    widest, first = 0, 1 << 62
    for i in order:
        widest_then, first_then = max(widest, lengths[i]), min(first, starts[i])
        rows = len(batch) + 1
        logits = rows * (widest_then - first_then + 1) * vocabulary * 4
        if batch and (logits > BATCH_BYTES or rows * widest_then > most):
            yield batch
            batch, widest_then, first_then = [], lengths[i], starts[i]
        batch.append(i)
        widest, first = widest_then, first_then
    if batch:
        yield batch


Kept = dict[int, Known]
"""id of a model -> its beginnings."""


@dataclass(frozen=True)
class Logits:
    """Logits at every step of some rows, and what they are normalised by."""

    raw: Float[Tensor, "row step vocabulary"]

    @functools.cached_property
    def total(self) -> Float[Tensor, "row step"]:
        """log of the sum of exp, in float64."""
        return _logsumexp(self.raw)

    def of(self, targets: Int[Tensor, "row step"]) -> Float[Tensor, "row step"]:
        """Log-probability of one token a step."""
        return self.raw.gather(-1, targets[..., None])[..., 0].double() - self.total

    def ended(self, ends: Ids) -> Float[Tensor, "row step"]:
        """Log-probability of any end token."""
        if not len(ends):
            return torch.full_like(self.total, -torch.inf)
        return self.raw[..., list(ends)].double().logsumexp(-1) - self.total

    def at(self, row: int, step: int) -> Float[Tensor, " vocabulary"]:
        """Log-probabilities of all tokens."""
        return self.raw[row, step].double() - self.total[row, step]


def _logsumexp(raw: Float[Tensor, "row step vocabulary"]) -> Float[Tensor, "row step"]:
    flat = raw.reshape(-1, raw.shape[-1])
    size = max(1, PART // flat.shape[-1])
    return torch.cat([flat[i : i + size].double().logsumexp(-1) for i in range(0, len(flat), size)]).view(raw.shape[:2])


Forced = Iterator[tuple[list[int], list[Logits], Int[Tensor, "row step"]]]


class Forwards(NamedTuple):
    """What forwards of one tokenizer's models need beside the models and what is asked of them."""

    vocabulary: int
    """Rows of logits, by which batches are cut."""
    device: str
    kept: Kept | None = None
    """Beginnings of prompts that need not be computed again; None keeps them for one call alone."""


def forced_logits(
    models: Sequence[Model], contexts: Sequence[Ids], continuations: Sequence[Ids], on: Forwards
) -> Forced:
    """Logits at every step of each continuation of its context, batch by batch, for every model.

    Yields (rows, logits of each model, targets with -100 behind the end). Where contexts are long, what they share is
    computed once, and kept for what follows.
    """
    if all(map(keeps, models)) and min(map(len, contexts), default=0) >= LONG:
        yield from _behind_beginnings(models, contexts, continuations, on)
    else:
        yield from _whole_rows(models, contexts, continuations, on)


def grown(models: Sequence[Model], contexts: Sequence[Ids], kept: Kept, device: str) -> Iterator[list[int]]:
    """Rows whose contexts are known beginnings of all models for as long as the caller works on them."""
    order = sorted(range(len(contexts)), key=lambda i: tuple(contexts[i]))
    for part in _parts(models, contexts, order):
        before = [set(kept.setdefault(id(model), {})) for model in models]
        for model in models:
            grow(model, [tuple(contexts[i]) for i in part], kept[id(model)], device)
        yield part
        if sum(map(bytes_of, kept.values())) > KEPT_BYTES:
            for model, there in zip(models, before, strict=True):
                for each in [each for each in kept[id(model)] if each not in there]:
                    del kept[id(model)][each]


def _parts(models: Sequence[Model], contexts: Sequence[Ids], order: Sequence[int]) -> Iterator[list[int]]:
    """Rows in order, in parts whose keys and values surely fit."""
    most = KEPT_BYTES // max(1, sum(map(_token_bytes, models)))
    part: list[int] = []
    tokens, last = 0, None
    for i in order:
        more = 0 if contexts[i] == last else len(contexts[i])
        if part and tokens + more > most:
            yield part
            part, tokens, more = [], 0, len(contexts[i])
        part.append(i)
        tokens, last = tokens + more, contexts[i]
    if part:
        yield part


def _token_bytes(model: Any) -> int:
    """Keys and values of one token, in fp32."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 8 * text.num_hidden_layers * heads * size


def _behind_beginnings(
    models: Sequence[Model], contexts: Sequence[Ids], continuations: Sequence[Ids], on: Forwards
) -> Forced:
    vocabulary, device = on.vocabulary, on.device
    kept: Kept = {} if on.kept is None else on.kept
    for part in grown(models, contexts, kept, device):
        fed = [tuple(max(token, 0) for token in continuations[i][:-1]) for i in part]
        lengths = [len(contexts[i]) for i in part]
        most = BATCH_BYTES // (4 * vocabulary * len(models))
        for batch in cut(lengths, [len(each) + 1 for each in fed], most):
            rows = [part[n] for n in batch]
            targets = torch.full((len(rows), max(1, *(len(continuations[i]) for i in rows))), -100, dtype=torch.long)
            for row, i in enumerate(rows):
                targets[row, : len(continuations[i])] = torch.tensor(list(continuations[i]), dtype=torch.long)
            found = []
            for model in models:
                behind = [kept[id(model)][tuple(contexts[i])] for i in rows]
                found.append(Logits(logits_behind(model, behind, [fed[n] for n in batch], device)))
            yield rows, found, targets.to(device)


def _whole_rows(models: Sequence[Model], contexts: Sequence[Ids], continuations: Sequence[Ids], on: Forwards) -> Forced:
    """Rows padded on the right: a causal model cannot see the padding, so no mask and no position ids are needed."""
    device = on.device
    starts = [len(context) for context in contexts]
    lengths = [start + len(c) for start, c in zip(starts, continuations, strict=True)]
    for rows in batches(lengths, starts, on.vocabulary * len(models), BATCH_TOKENS):
        width = max(lengths[i] for i in rows)
        first = min(starts[i] for i in rows) - 1
        steps = max(1, *(len(continuations[i]) for i in rows))
        # lists first: a tensor of each row takes longer than the forward of a small model
        filled, aimed, placed = [], [], []
        for i in rows:
            known, count = continuations[i], len(continuations[i])
            filled.append([*contexts[i], *(max(t, 0) for t in known), *[END] * (width - lengths[i])])
            aimed.append([*known, *[-100] * (steps - count)])
            at = starts[i] - 1 - first
            placed.append([*range(at, at + count), *[0] * (steps - count)])
        ids, targets, at = (torch.tensor(each, dtype=torch.long) for each in (filled, aimed, placed))
        real = ids != END
        keep = torch.arange(first, width - 1) if width - 1 > first else torch.arange(first, width)
        found = []
        with torch.inference_mode():  # not around the yield: it would hold for the caller, too
            for model in models:
                # an intervened model is told where there is nothing to compute
                fed = ids.masked_fill(~real, getattr(model, "padding", 0))
                logits = model(input_ids=fed.to(device), logits_to_keep=keep.to(device), use_cache=False).logits
                index = at.to(device)[:, :, None].expand(-1, -1, logits.shape[-1])
                found.append(Logits(logits.gather(1, index)))
        yield rows, found, targets.to(device)


def target_logprobs(logits: Logits, targets: Int[Tensor, "row step"], ends: Ids) -> Float[Tensor, "row step"]:
    """Log-probability of each target; END gathers every end token; 0 behind the end."""
    plain = logits.of(targets.clamp(min=0))
    return torch.where(targets == END, logits.ended(ends), torch.where(targets < 0, 0.0, plain))


def token_kl(r: Logits, s: Logits) -> Float[Tensor, "row step"]:
    """KL(r || s) of the next token at every step, over the whole vocabulary."""
    apart, found = (r.total - s.total)[..., None], torch.zeros_like(r.total)
    size = max(1, PART // (r.raw.shape[1] * r.raw.shape[2]))
    for i in range(0, len(found), size):
        some = slice(i, i + size)
        log_r = r.raw[some].double()
        ratio = log_r - s.raw[some].double() - apart[some]
        found[some] = ((log_r - r.total[some, :, None]).exp_() * ratio).nan_to_num_(0.0).sum(-1)
    return found.clamp(min=0)


def entropy(logits: Logits) -> Float[Tensor, "row step"]:
    """Of the next token at every step, over the whole vocabulary, in nats."""
    found = torch.zeros_like(logits.total)
    size = max(1, PART // (logits.raw.shape[1] * logits.raw.shape[2]))
    for i in range(0, len(found), size):
        log_p = logits.raw[i : i + size].double() - logits.total[i : i + size, :, None]
        found[i : i + size] = -(log_p.exp() * log_p).nan_to_num_(0.0).sum(-1)
    return found.clamp(min=0)
