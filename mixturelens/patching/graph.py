"""The graph of the residual stream: who reads what whom has written, and runs in which some of its edges are patched.

The residual stream is a sum, so what a channel reads is the sum of what was written before it: by the input, by every
head, by every MLP. An edge is one term of one such sum. To patch an edge is to give its reader the term of the corrupt
run instead of the live one, and to leave every other reader as it is.

What is written is what arrives in the stream. Where outputs are scaled on their way (Granite), so are the terms. Where
a norm follows attention (Gemma 2 and 3, OLMo 2), it divides the sum of a layer's heads by one number per token, which
all of them have a part in: a head's term is its linear share, what it writes times that number as it is in this very
run. The terms then sum exactly to what attention adds. But a head that changes also changes the number, and with it the
terms of the heads beside it: that is counted to theirs, and patching all edges of a head is not patching its output.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mixturelens.hooks.batches import Sides
from mixturelens.hooks.lens import NAMES, Edit, Lens, Tokens
from mixturelens.hooks.weights import Reads, forks_of, head_writes, reads
from mixturelens.types import InputError, RunError

CHUNK = 2**25
"""Numbers in what all readers read, of the rows that run at a time: bounds memory (a backward keeps a few copies)."""
CHANNELS: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")
"""What a head reads the stream for."""
CHECKED = 2
"""Rows on which a new graph is checked."""
TOLERANCE = 1e-4
"""Of that check, relative to the largest number compared, or to 1."""


@dataclass(frozen=True)
class Readers:
    """The channels behind one hook point: columns `start` to `stop` of edge arrays."""

    point: Any
    start: int
    stop: int
    reach: int
    """They read the first `reach` writers."""
    stream: Any = None
    """Where the stream that they read is seen, if their own hook point shows what they make of it."""
    through: Reads | None = None
    """What they make of it."""


@dataclass(frozen=True)
class Writers:
    """The writers behind one hook point: rows of edge arrays from `start` on."""

    point: Any
    start: int
    layer: int | None = None
    """Of the output projection that heads write through; None where the hook point shows what is written."""


@dataclass(frozen=True)
class Graph:
    """The edges of a network, in the order in which it computes: made, and checked, by `edge_graph`.

    Writers are the input (embeddings, with those of positions), the heads (each with its share of the output
    projection, whose bias is nobody's, and of the norm or scale behind it) and the MLPs. Readers are the query, key and
    value inputs of every head (where heads share keys and values: of every key-value head), the inputs of MLPs, and the
    logits, all before their norm.
    """

    lens: Lens
    writers: tuple[str, ...]
    """Names: `input`, `L0.h3`, `L1.mlp`."""
    readers: tuple[str, ...]
    """Names: `L1.h2.q`, `L1.kv0.v` (where heads share it), `L2.mlp`, `logits`."""
    writing: tuple[Writers, ...]
    reading: tuple[Readers, ...]

    @functools.cached_property
    def exists(self) -> Bool[Tensor, "writer reader"]:
        """Which writers each reader reads: those that come before it."""
        reach = torch.tensor([group.reach for group in self.reading for _ in range(group.start, group.stop)])
        return torch.arange(len(self.writers))[:, None] < reach

    def __len__(self) -> int:
        return int(self.exists.sum())


def edge_graph(lens: Lens, on: Sides) -> Graph:
    """The graph of a model, checked on the first few rows of `on`.

    Raises InputError naming a hook point that the bridge does not have, and RunError if a hook does not fire, or if
    what is read is not the sum that edges are terms of.
    """
    writers: list[str] = []
    readers: list[str] = []
    writing: list[Writers] = []
    reading: list[Readers] = []

    def write(point: str, names: Sequence[str], layer: int | None = None) -> None:
        writing.append(Writers(lens.named_point(point), len(writers), layer))
        writers.extend(names)

    def read(point: str, names: Sequence[str], stream: str | None = None, through: Reads | None = None) -> None:
        start, seen = len(readers), stream and lens.named_point(stream)
        reading.append(Readers(lens.named_point(point), start, start + len(names), len(writers), seen, through))
        readers.extend(names)

    parallel = not lens.has("resid_mid")
    write("blocks.0.hook_resid_pre", ["input"])
    for layer in range(lens.layers):
        block, mlp, forks = f"blocks.{layer}", [f"L{layer}.mlp"], forks_of(lens, layer)
        heads = [f"L{layer}.h{head}" for head in range(lens.heads)]
        shared = heads if lens.kv_heads == lens.heads else [f"L{layer}.kv{head}" for head in range(lens.kv_heads)]
        entering, middle = f"{block}.{NAMES['resid_pre']}", f"{block}.{NAMES['resid_mid']}"
        for channel in CHANNELS:
            names = [f"{head}.{channel}" for head in (heads if channel == "q" else shared)]
            if forks.heads:
                read(f"{block}.attn.hook_{channel}_input", names)
            else:
                read(f"{block}.{NAMES[channel]}", names, entering, reads(lens, layer, channel))
        if not parallel:
            write(f"{block}.attn.hook_z", heads, layer)
        # in parallel blocks the MLP reads what its layer's heads read
        if forks.mlp:
            read(f"{block}.hook_mlp_in", mlp)
        else:
            at, stream = ("mlp.hook_in", entering) if parallel else ("ln2.hook_out", middle)
            read(f"{block}.{at}", mlp, stream, reads(lens, layer, "mlp"))
        if parallel:
            write(f"{block}.attn.hook_z", heads, layer)
        write(f"{block}.hook_mlp_out", mlp)
    read("ln_final.hook_in", ["logits"])
    graph = Graph(lens, tuple(writers), tuple(readers), tuple(writing), tuple(reading))
    _check(graph, on.part(slice(CHECKED)))
    return graph


@torch.no_grad()
def _check(graph: Graph, on: Sides) -> None:
    """Refuse a model whose edges are not what the graph says: wrong numbers would look like any others."""
    dtype = next(graph.lens.model.parameters()).dtype
    if torch.finfo(dtype).bits < 32:
        name = str(dtype).removeprefix("torch.")
        raise RunError(f"edges are checked more finely than {name} computes: give --dtype float32")

    def same(found: Tensor, wanted: Tensor, what: str) -> None:
        off = float((found - wanted).abs().max())
        if not off <= TOLERANCE * max(1.0, float(wanted.abs().max())):
            raise RunError(
                f"edges of {type(graph.lens.model).__name__} cannot be patched: {what} (off by {off:.2g}). Its stream "
                "is no sum of what embeddings, heads and MLPs write: something is added, or changed on its way"
            )

    inputs: list[dict[Readers, Tensor]] = [{}, {}]
    for batch, seen in zip((on.clean, on.corrupt), inputs, strict=True):
        run_graph(graph, batch, read=seen.__setitem__)
    corrupt = written(graph, on.corrupt)
    difference = written(graph, on.clean) - corrupt
    changes = difference.cumsum(2)
    for group in graph.reading:  # a missing edge would pass the two tests below: it stays live where all is corrupt
        change = changes[:, :, group.reach - 1 : group.reach]
        wanted = inputs[0][group] - inputs[1][group]
        same(change.expand_as(wanted), wanted, f"what {graph.readers[group.start]} reads is not the sum of its edges")
    for live, batch, name in ((1.0, on.clean, "the clean"), (0.0, on.corrupt, "the corrupt")):
        mask = torch.full(graph.exists.shape, live, device=graph.lens.device)
        found = masked_logits(graph, on.clean, corrupt, mask)
        same(found, graph.lens.run(batch)[:, -1], f"with every edge at {live:g} logits are not those of {name} run")


@contextlib.contextmanager
def _split_inputs(graph: Graph) -> Iterator[None]:
    """Give every head its own query, key and value input, and the MLP its own, for the length of a block."""
    lens, bridge, config = graph.lens, graph.lens.bridge, graph.lens.bridge.cfg
    left = [group.point.name for group in graph.reading if group.through is None]  # to the bridge
    before = bool(config.use_split_qkv_input), bool(config.use_hook_mlp_in)
    try:
        try:
            bridge.set_use_split_qkv_input(any(name.endswith("q_input") for name in left))
        except NotImplementedError as error:
            raise InputError(
                f"the bridge of {type(lens.model).__name__} cannot split inputs by head ({error})"
            ) from None
        bridge.set_use_hook_mlp_in(any(name.endswith("hook_mlp_in") for name in left))
        yield
    finally:
        bridge.set_use_split_qkv_input(before[0])
        bridge.set_use_hook_mlp_in(before[1])


Read = Callable[[Readers, Float[Tensor, "row pos reader d_model"]], Tensor | None]
"""Sees what a group of readers reads, and returns what to give them instead, or None."""


def run_graph(
    graph: Graph,
    batch: Tokens,
    read: Read | None = None,
    live: dict[int, Float[Tensor, "row pos writer d_model"]] | None = None,
    start: Float[Tensor, "row pos d_model"] | None = None,
) -> Float[Tensor, "row vocabulary"]:
    """Logits of the last column, from a run in which what readers read can be seen and changed.

    `read` gets what each group of readers reads, and returns what to put in its place; `live` is filled with what is
    written, by the number of the first writer; `start` takes the place of the input.
    """
    edits: list[tuple[Any, Edit]] = []
    if start is not None:
        edits.append((graph.writing[0].point, lambda x: start))
    if live is not None:
        edits += [(group.point, functools.partial(_note, graph.lens, live, group)) for group in graph.writing]
    if read is not None:
        streams: dict[Any, Tensor] = {}
        for point in dict.fromkeys(group.stream for group in graph.reading if group.stream is not None):
            edits.append((point, functools.partial(streams.__setitem__, point)))
        edits += [(group.point, functools.partial(_hand_over, read, group, streams)) for group in graph.reading]
    with _split_inputs(graph):
        return graph.lens.run(batch, edits)[:, -1]


def _hand_over(read: Read, group: Readers, streams: dict[Any, Tensor], x: Tensor) -> Tensor | None:
    if group.through is not None:
        # a copy for each reader: the gradient is to be this reader's alone
        stream = streams[group.stream][:, :, None].expand(-1, -1, group.stop - group.start, -1)
        put = read(group, stream)
        return None if put is None else group.through(put).reshape(x.shape)
    if x.ndim == 4:
        return read(group, x)
    # a view of its own, not the stream, which others read as well: the gradient is to be this reader's alone
    put = read(group, x[:, :, None])
    return None if put is None else put[:, :, 0]


def _note(lens: Lens, live: dict[int, Tensor], group: Writers, x: Tensor) -> None:
    live[group.start] = x[:, :, None] if group.layer is None else head_writes(lens, group.layer, x)


def _before(live: dict[int, Tensor], reach: int) -> Float[Tensor, "row pos writer d_model"]:
    """What the first `reach` writers have written."""
    return torch.cat([live[start] for start in sorted(live) if start < reach], 2)


@torch.no_grad()
def written(graph: Graph, batch: Tokens) -> Float[Tensor, "row pos writer d_model"]:
    """What every writer adds to the residual stream in a run of the batch."""
    live: dict[int, Tensor] = {}
    run_graph(graph, batch, live=live)
    return _before(live, len(graph.writers))


def masked_logits(
    graph: Graph,
    batch: Tokens,
    corrupt: Float[Tensor, "row pos writer d_model"],
    mask: Float[Tensor, "*#row_pos writer reader"],
) -> Float[Tensor, "row vocabulary"]:
    """Logits of the last column when each edge gives `mask` of its live term and `1 - mask` of the corrupt one.

        x_v' = x_v - sum_u (1 - mask[u, v]) (a_u - corrupt_u)

    a_u is what u writes in this very run, changed by the edges masked upstream. The mask is [writer, reader], or has
    axes for positions, or for rows and positions, before these. Differentiable in the mask.
    """
    off, live = 1 - mask, dict[int, Tensor]() if torch.is_grad_enabled() else _Changes(corrupt)

    @functools.cache  # queries, keys and values of a layer read the same writers
    def patched(reach: int) -> tuple[int, Tensor]:
        alike = [group for group in graph.reading if group.reach == reach]
        start, stop = alike[0].start, alike[-1].stop
        change = live.all if isinstance(live, _Changes) else _before(live, reach) - corrupt[:, :, :reach]
        return start, off[..., :reach, start:stop].mT @ change[:, :, :reach]

    def read(group: Readers, x: Tensor) -> Tensor:
        start, change = patched(group.reach)
        return x - change[:, :, group.start - start : group.stop - start]

    return run_graph(graph, batch, read, live)


class _Changes(dict[int, Tensor]):
    """What writers write in a run, less what they write in the corrupt one: in one place, so that nothing is copied."""

    def __init__(self, corrupt: Float[Tensor, "row pos writer d_model"]) -> None:
        self.corrupt, self.all = corrupt, torch.empty_like(corrupt)

    def __setitem__(self, start: int, value: Float[Tensor, "row pos part d_model"]) -> None:
        at = slice(start, start + value.shape[2])
        torch.sub(value, self.corrupt[:, :, at], out=self.all[:, :, at])


def chunks(graph: Graph, on: Sides) -> Iterator[slice]:
    """Slices of the rows of `on`, each of as many rows as the memory for them holds."""
    size = max(1, CHUNK // (on.clean.ids.shape[1] * len(graph.readers) * graph.lens.d_model))
    return (slice(start, min(start + size, len(on))) for start in range(0, len(on), size))


@torch.no_grad()
def masked(graph: Graph, on: Sides, masks: Sequence[Float[Tensor, "*#pos writer reader"]]) -> Float[Tensor, "mask row"]:
    """The metric of each row's clean prompt under each mask of edges (1: live, 0: as in the corrupt run), in nats."""
    found = torch.empty(len(masks), len(on))
    for rows in chunks(graph, on):
        part = on.part(rows)
        corrupt = written(graph, part.corrupt)
        for number, mask in enumerate(masks):
            mask = mask.to(corrupt)
            found[number, rows] = part.metric(masked_logits(graph, part.clean, corrupt, mask)).cpu()
    return found
