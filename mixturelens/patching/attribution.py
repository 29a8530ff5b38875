"""How much of a metric each edge carries, and how much of it a circuit of the best edges keeps.

on = sides(lens, contrasts)
graph = edge_graph(lens, on)
scores = eap_ig(graph, on)
curve = faithfulness(graph, on, scores.mean, resample_counts(len(on), seed=0))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixturelens.hooks.sides import Sides
from mixturelens.patching.graph import Graph, Readers, chunks, masked, run_graph, written
from mixturelens.stats import interval, resampled_mean
from mixturelens.types import InputError, Interval

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Circuit sizes of the MIB benchmark, as fractions of all edges. 0 and 1 always belong to them."""
STEPS = 32
"""Pieces of the path of integrated gradients."""
KEPT = 2**26
"""Scores, at most, that are kept of every question at every position."""


@dataclass(frozen=True)
class EdgeScores:
    """What each edge carries of the metric, in nats; 0 where there is no edge.

    A positive edge carries the metric: patching it would lower the metric by about its score. (Syed et al. give the
    change, which has the other sign.)
    """

    per_question: Float[Tensor, "row writer reader"]
    """Summed over positions."""
    per_position: Float[Tensor, "pos writer reader"]
    """Mean over questions. A position is a column: prompts end in the last one, and their padding carries nothing."""
    whole: Float[Tensor, "row pos writer reader"] | None = None
    """Both, where that is not too much to keep."""

    @property
    def mean(self) -> Float[Tensor, "writer reader"]:
        """Over questions, summed over positions."""
        return self.per_question.mean(0)


def eap(graph: Graph, on: Sides) -> EdgeScores:
    """Edge attribution patching (Nanda; Syed et al., arXiv 2310.10348): every edge from two forwards and one backward.

        score(u -> v at p) = (a_u clean - a_u corrupt)[p] . dM/dx_v[p]  at the clean run

    which is dM/dmask of `masked_logits` where every mask is 1.
    """
    return _attribute(graph, on, (1.0,))


def eap_ig(graph: Graph, on: Sides, steps: int = STEPS) -> EdgeScores:
    """EAP with integrated gradients (Hanna et al., arXiv 2403.17806): gradients are means over the straight line from
    the corrupt input to the clean one, taken in the middle of each of `steps` equal pieces.

    The scores of the input's edges then sum to M(clean) - M(corrupt), and what is missing is the error of the steps:
    the usual 5 leave up to half of it on the reference organism, where the metric saturates; 32 leave about 1%.
    """
    return _attribute(graph, on, _middles(steps))


def eap_ig_of(graph: Graph, on: Sides, edges: Int[Tensor, "edge 3"], steps: int = STEPS) -> Float[Tensor, "row edge"]:
    """What `eap_ig` gives single edges at single positions, question by question. Edges are (pos, writer, reader)."""
    found = [scores[:, edges[:, 0], edges[:, 1], edges[:, 2]] for _, scores in _scored(graph, on, _middles(steps))]
    return torch.cat(found)


def _middles(steps: int) -> list[float]:
    return [(step + 0.5) / steps for step in range(steps)]


def _attribute(graph: Graph, on: Sides, points: Sequence[float]) -> EdgeScores:
    shape = len(graph.writers), len(graph.readers)
    width = on.clean.ids.shape[1]
    per_question = torch.zeros(len(on), *shape)
    per_position = torch.zeros(width, *shape)
    keep = per_question.numel() * width <= KEPT
    parts = []
    for rows, scores in _scored(graph, on, points):
        per_question[rows] = scores.sum(1)
        per_position += scores.sum(0) / len(on)
        if keep:
            parts.append(scores)
    return EdgeScores(per_question, per_position, torch.cat(parts) if keep else None)


def _scored(
    graph: Graph, on: Sides, points: Sequence[float]
) -> Iterator[tuple[slice, Float[Tensor, "row pos writer reader"]]]:
    """Scores of some rows at a time."""
    for rows in chunks(graph, on):
        part = on.part(rows)
        corrupt = written(graph, part.corrupt)
        difference = written(graph, part.clean) - corrupt
        gradients = [corrupt.new_zeros(())] * len(graph.reading)
        for at in points:
            here = _gradients(graph, part, corrupt[:, :, 0] + at * difference[:, :, 0])
            gradients = [total + one / len(points) for total, one in zip(gradients, here, strict=True)]
        scores = torch.zeros(*difference.shape[:3], len(graph.readers))
        for group, gradient in zip(graph.reading, gradients, strict=True):
            reached = difference[:, :, : group.reach]
            scores[:, :, : group.reach, group.start : group.stop] = torch.einsum(
                "rpwd,rpvd->rpwv", reached, gradient
            ).cpu()
        yield rows, scores


@torch.enable_grad()
def _gradients(
    graph: Graph, on: Sides, start: Float[Tensor, "row pos d_model"]
) -> tuple[Float[Tensor, "row pos reader d_model"], ...]:
    """Gradients of each row's metric in what every group of readers reads, in a run from `start`."""
    seen: dict[Readers, Tensor] = {}

    def keep(group: Readers, x: Tensor) -> Tensor:
        seen[group] = x
        return x

    logits = run_graph(graph, on.clean, keep, start=start.detach().requires_grad_())
    return torch.autograd.grad(on.metric(logits).sum(), [seen[group] for group in graph.reading])


def exact(graph: Graph, on: Sides) -> Float[Tensor, "row writer reader"]:
    """The drop of each row's metric when that one edge is patched, at all positions: one forward per edge, in nats."""
    edges = graph.exists.nonzero()
    drop = torch.zeros(len(on), *graph.exists.shape)
    drop[:, edges[:, 0], edges[:, 1]] = _drops(graph, on, [edge[None] for edge in edges])
    return drop


def patch_paths(graph: Graph, on: Sides, paths: Sequence[tuple[str, Sequence[str]]]) -> Float[Tensor, "row path"]:
    """Path patching (Wang et al. 2022, arXiv 2211.00593): the drop of each row's metric, in nats, when each sender in
    turn is corrupt for its receivers alone, along the residual stream, and live for everything else.

    Raises InputError for a name that the graph does not have, or a receiver that does not read the sender.

    >>> patch_paths(graph, on, [("L0.h2", ["L0.mlp", "L1.mlp"])]).mean(0)   # doctest: +SKIP
    tensor([7.1])
    """
    edges = []
    for sender, receivers in paths:
        for name, known in ((sender, graph.writers), *((receiver, graph.readers) for receiver in receivers)):
            if name not in known:
                raise InputError(f"the graph has no {name!r}; it has {', '.join(known[:3])}, ..., {known[-1]}")
        writer = graph.writers.index(sender)
        chosen = [graph.readers.index(receiver) for receiver in receivers]
        for receiver, reader in zip(receivers, chosen, strict=True):
            if not graph.exists[writer, reader]:
                raise InputError(f"there is no path from {sender} to {receiver}: it is not computed later")
        edges.append(torch.tensor([[writer, reader] for reader in chosen]))
    return _drops(graph, on, edges)


def _drops(graph: Graph, on: Sides, groups: Sequence[Int[Tensor, "edge 2"]]) -> Float[Tensor, "row group"]:
    """What the metric loses when the edges of each group are patched together."""
    masks = torch.ones(len(groups) + 1, *graph.exists.shape)  # the last one leaves every edge in place
    for mask, edges in zip(masks, groups, strict=False):
        mask[edges[:, 0], edges[:, 1]] = 0
    found = masked(graph, on, list(masks))
    return (found[-1] - found[:-1]).T


@dataclass(frozen=True)
class Faithfulness:
    """How much of the metric's difference between clean and corrupt circuits of growing size keep."""

    kept: tuple[Interval, ...]
    """f = (M(circuit) - M(corrupt)) / (M(clean) - M(corrupt)), a ratio of means over questions, for every size."""
    cpr: Interval
    """Integral of f over the fraction of edges that are kept: the higher, the fewer edges carry the metric."""
    cmd: Interval
    """Integral of |1 - f|: 0 if every circuit does as the whole network."""


@dataclass(frozen=True)
class Curve:
    """Faithfulness across sizes (MIB, arXiv 2504.13151), of a ranking of edges and of random ones."""

    edges: tuple[int, ...]
    """Circuit sizes, from 0 to all edges of the graph."""
    ranked: Faithfulness
    random: tuple[Faithfulness, ...]
    """One for each seed."""


def faithfulness(
    graph: Graph,
    on: Sides,
    scores: Float[Tensor, "writer reader"],
    counts: Int[np.ndarray, "draw row"],
    fractions: Sequence[float] = FRACTIONS,
    seeds: Sequence[int] = range(5),
) -> Curve:
    """Keep the edges of largest |score|, patch all others, and measure what is left of the metric, size by size.

    By |score|, because an edge that works against the metric is part of the computation as well: without such edges a
    circuit overshoots, which CPR would count for it. `counts` resample the rows (`stats.resample_counts`), the same way
    for every size, so that the integrals have intervals too.
    """
    total = len(graph)
    inner = sorted({round(fraction * total) for fraction in fractions} - {0, total})
    rankings = [scores.abs().cpu()]
    rankings += [torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    masks = [_top(graph, ranking, size) for ranking in rankings for size in inner]
    ends = [torch.zeros(graph.exists.shape), torch.ones(graph.exists.shape)]
    corrupt, clean, *values = resampled_mean(masked(graph, on, [*ends, *masks]).double().numpy().T, counts).T
    sizes = (0, *inner, total)
    every = []
    for of in np.array(values).reshape(len(rankings), len(inner), -1):
        with np.errstate(invalid="ignore", divide="ignore"):
            kept = (np.vstack([corrupt, of, clean]) - corrupt) / (clean - corrupt)
        every.append(_faithfulness(kept, np.array(sizes) / total, counts))
    return Curve(sizes, every[0], tuple(every[1:]))


def _top(graph: Graph, ranking: Float[Tensor, "writer reader"], size: int) -> Float[Tensor, "writer reader"]:
    mask = torch.zeros(ranking.shape)
    edges = graph.exists.nonzero()[ranking[graph.exists].topk(size).indices]
    mask[edges[:, 0], edges[:, 1]] = 1
    return mask


def _faithfulness(
    kept: Float[np.ndarray, "size draw"], fractions: Float[np.ndarray, " size"], counts: Int[np.ndarray, "draw row"]
) -> Faithfulness:
    cpr, cmd = (np.trapezoid(of, fractions, axis=0) for of in (kept, np.abs(1 - kept)))
    return Faithfulness(tuple(interval(each, counts) for each in kept), interval(cpr, counts), interval(cmd, counts))
