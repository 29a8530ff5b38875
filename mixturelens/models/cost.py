"""How long work with a model takes, and how much memory: said before it starts, and held to what the user allows."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

from mixturelens.models.load import load_config, skeleton
from mixturelens.models.pair import Pair
from mixturelens.types import InputError

EFFICIENCY = 0.6
"""Of the speed of one large matrix product, what a forward reaches."""
RATED = 2048, 1024
"""Rows, and columns, of that product."""
LITTLE = 20.0
"""Seconds of a model's work under which all else (starting libraries, intervals, fits) takes longer than that."""
LIBRARIES = 500 << 20
"""Bytes that torch, transformers and the rest take on a CPU, once all of them are loaded."""


@dataclass(frozen=True)
class Size:
    """The shape of a pair's models, from their configs: what a token costs. No weights are read."""

    body: int
    """Parameters that a token passes through, between embedding and unembedding."""
    unembedding: int
    """Parameters that it passes through where its logits are read."""
    parameters: int
    """All of them, tied ones once."""
    layers: int
    heads: int
    d_model: int
    keys: int
    """Numbers that the keys and values of one token take in one layer."""
    vocabulary: int
    width: int
    """Bytes of a number."""

    @property
    def weights(self) -> int:
        """Bytes of one set of weights."""
        return self.parameters * self.width

    @property
    def kept(self) -> float:
        """Bytes of the keys and values of one token, in all layers."""
        return float(self.layers * self.keys * self.width)


@dataclass(frozen=True)
class Work:
    """What is about to be done: tokens that pass through all layers of a model, and what is held meanwhile."""

    tokens: float = 0.0
    back: float = 0.0
    """Tokens that pass through forwards and back, for gradients of activations."""
    read: float = 0.0
    """Tokens whose logits are read."""
    models: float = 2.0
    """Sets of weights held at once."""
    held: float = 0.0
    """Bytes beside those, at the peak."""

    def __add__(self, other: Work) -> Work:
        """One after the other."""
        return Work(
            self.tokens + other.tokens,
            self.back + other.back,
            self.read + other.read,
            max(self.models, other.models),
            max(self.held, other.held),
        )


@dataclass(frozen=True)
class Estimate:
    """What work takes, about: seconds, and bytes at the peak."""

    seconds: float
    memory: float
    """Bytes at the peak: of the process on a CPU, of the device elsewhere."""

    def __str__(self) -> str:
        time = said_time(self.seconds) if self.seconds >= LITTLE else "a few minutes"
        return f"{time}, at most {self.memory / 1e9:.1f} GB"


class TimedLine(str):
    """A line that is said before work, and knows how many seconds that takes; None where it is too little to tell."""

    seconds: float | None


def announced(what: str, takes: Estimate, also: str = "") -> TimedLine:
    """What is said before work begins: what it is, and what it takes.

    >>> announced("repair", Estimate(seconds=200.0, memory=1e9))
    'repair: about 3 min, at most 1.0 GB'
    """
    return timed(f"{what}: {takes}{also}", takes.seconds)


def timed(text: str, seconds: float) -> TimedLine:
    """A line that knows how many seconds the work takes that it announces."""
    line = TimedLine(text)
    line.seconds = seconds if seconds >= LITTLE else None
    return line


def said_time(seconds: float) -> str:
    """A length of time as people say it.

    >>> said_time(200.0), said_time(4.2)
    ('about 3 min', 'about 4 s')
    """
    return f"about {seconds / 60:.0f} min" if seconds >= 100 else f"about {max(1, round(seconds))} s"


def size_of(pair: Pair) -> Size:
    """The shape of the two models of a pair."""
    import torch

    model: Any = skeleton(pair.before.base or pair.before)
    text = load_config(pair.before).get_text_config()
    distinct = {id(parameter): parameter.numel() for parameter in model.parameters()}
    words = {id(p) for p in model.get_input_embeddings().parameters()}
    head = model.get_output_embeddings()
    unembedding = 0 if head is None else sum(p.numel() for p in head.parameters())
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    d_head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    words |= set() if head is None else {id(p) for p in head.parameters()}
    return Size(
        body=sum(count for key, count in distinct.items() if key not in words),
        unembedding=unembedding,
        parameters=sum(distinct.values()),
        layers=int(text.num_hidden_layers),
        heads=int(text.num_attention_heads),
        d_model=int(text.hidden_size),
        keys=2 * int(kv_heads) * int(d_head),
        vocabulary=pair.vocabulary,
        width=torch.empty(0, dtype=getattr(torch, pair.dtype)).element_size(),
    )


@functools.cache
def rate(device: str, dtype: str) -> float:
    """Floating-point operations a second, of one large matrix product: best of a few, a tenth of a second in all."""
    import torch

    rows, columns = RATED
    kind = getattr(torch, dtype)
    left, right = (torch.ones(size, columns, device=device, dtype=kind) for size in (rows, columns))
    best, until = float("inf"), time.perf_counter() + 0.1
    while time.perf_counter() < until or best == float("inf"):
        start = time.perf_counter()
        found = left @ right.T
        float(found[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2.0 * rows * columns * columns / best


def estimate(pair: Pair, work: Work) -> Estimate:
    """Seconds and bytes that work takes, from the models' configs and this machine's speed. Loads no weights."""
    size = size_of(pair)
    operations = 2.0 * (size.body * (work.tokens + 2 * work.back) + size.unembedding * work.read)
    libraries = LIBRARIES if pair.device == "cpu" else 0
    return Estimate(
        operations / (EFFICIENCY * rate(pair.device, pair.dtype)), libraries + work.models * size.weights + work.held
    )


def check_memory(pair: Pair, needed: Estimate, what: str) -> None:
    """Raise InputError, before anything is loaded, where `needed` is more than the memory that the user allows."""
    if pair.budget.memory is not None and needed.memory > pair.budget.memory * 1e9:
        raise InputError(
            f"{what} needs {needed.memory / 1e9:.1f} GB, and --memory allows {pair.budget.memory:g}: allow more, or "
            "give --dtype bfloat16"
        )
