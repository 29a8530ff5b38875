"""The routing circuit: edges that carry hint, policy and cue, each with a score, and how faithful they are."""

from __future__ import annotations

from mixturelens.contrasts import Kind
from mixturelens.types import Frozen, Interval, Side


class CircuitNode(Frozen):
    """The input, a head, an MLP or the logits."""

    name: str
    """`input`, `L0.h3`, `L1.mlp` or `logits`."""
    layer: int
    """-1 for the input, the number of layers for the logits."""
    score: Interval
    """Sum of |score| of the edges through it, as share of the metric's difference."""


class CircuitEdge(Frozen):
    """What one node writes, as one other reads it, at one position."""

    sender: str
    """A node's name."""
    receiver: str
    """A node's name; of a head, one of its three inputs: `L1.h2.q`, `L1.h2.k`, `L1.h2.v`."""
    position: int
    score: Interval
    """Share of the metric's difference between clean and corrupt; negative where the edge works against it."""


class Faithfulness(Frozen):
    """What circuits of growing size keep of the metric's difference: 0 nothing, 1 all of it."""

    sizes: tuple[int, ...]
    """Edges kept."""
    fractions: tuple[float, ...]
    """The same, as fractions of all edges."""
    found: tuple[Interval, ...]
    """Circuits of the strongest edges."""
    random: tuple[Interval, ...]
    """Mean of random circuits of equal size; the interval is over questions and circuits."""
    cpr: Interval
    """Area under `found` over the fraction of edges."""
    cmd: Interval
    """Area between `found` and 1."""
    random_cpr: Interval
    random_cmd: Interval


class RoutingCircuit(Frozen):
    """The strongest edges of one checkpoint on one kind of contrast."""

    kind: Kind
    checkpoint: Side
    clean: str
    corrupt: str
    questions: int
    method: str
    labels: tuple[str, ...]
    """Token (or span) at each position."""
    edges_total: int
    """Edges of the whole graph, of which `edges` are the strongest."""
    nodes: tuple[CircuitNode, ...]
    edges: tuple[CircuitEdge, ...]
    faithfulness: Faithfulness
