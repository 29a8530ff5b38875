"""How much of a metric each edge carries, and how much of it a circuit of the best edges keeps.

on = sides(lens, contrasts)
graph = edge_graph(lens, on)
scores = eap_ig(graph, on)
curve = faithfulness(graph, on, scores.mean, resample_counts(len(on), seed=0))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixturelens.hooks.batches import Sides
from mixturelens.patching.graph import Graph, Readers, chunks, masked, run_graph, written
from mixturelens.stats import interval, resampled_mean
from mixturelens.types import InputError, Interval

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Circuit sizes of the MIB benchmark, as fractions of all edges. 0 and 1 always belong to them."""
STEPS = 32
"""Pieces of the path of integrated gradients."""
MOST = 9 * STEPS
"""The same of a question whose scores do not add up to its change with fewer: pieces are cut in three, and in three
again. Fewer steps than STEPS are asked for where there is little time, and then all questions have as many."""
CLOSE, LEAST = 0.02, 0.1
"""Share of a question's change that its scores may miss; and nats that count as a change at least."""
KEPT = 2**26
"""Scores, at most, that are kept of every question at every position as they are; KEPT_ROUNDED of them in half
precision, which is far finer than their intervals."""
KEPT_ROUNDED = 2**29


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
    missed: Float[Tensor, " row"]
    """Share of each question's change that the scores of the input's edges miss: of integrated gradients the error of
    the steps, of plain gradients what is not straight."""
    whole: Float[Tensor, "row pos writer reader"] | None = None
    """Both, where that is not too much to keep."""

    @property
    def mean(self) -> Float[Tensor, "writer reader"]:
        """Scores summed over positions, mean over questions."""
        return self.per_question.mean(0)


def eap(graph: Graph, on: Sides) -> EdgeScores:
    """Edge attribution patching: every edge from two forwards and one backward (Nanda 2023; Syed et al., arXiv
    2310.10348).

        score(u -> v at p) = (a_u clean - a_u corrupt)[p] . dM/dx_v[p]  at the clean run

    This is dM/dmask of `masked_logits` where every mask is 1.
    """
    return _attribute(graph, on, None)


def eap_ig(graph: Graph, on: Sides, steps: int = STEPS) -> EdgeScores:
    """Edge attribution patching with integrated gradients (Hanna et al., arXiv 2403.17806).

    Gradients are means over the straight line from the corrupt input to the clean one, taken in the middle of each of
    `steps` equal pieces. The scores of the input's edges then sum to M(clean) - M(corrupt), and what is missing is the
    error of the steps. On the reference organism, where the metric saturates, 32 steps miss 1% of the mean and yet up
    to half of a single question's change: questions that miss more than CLOSE are given more steps, up to MOST.
    """
    return _attribute(graph, on, steps)


def eap_ig_of(graph: Graph, on: Sides, edges: Int[Tensor, "edge 3"], steps: int = STEPS) -> Float[Tensor, "row edge"]:
    """The scores that `eap_ig` gives single edges at single positions, question by question.

    Each row of `edges` is (position, writer, reader), by number.
    """
    found = [scores[:, edges[:, 0], edges[:, 1], edges[:, 2]] for _, scores, _ in _scored(graph, on, steps)]
    return torch.cat(found)


def _attribute(graph: Graph, on: Sides, steps: int | None) -> EdgeScores:
    shape = len(graph.writers), len(graph.readers)
    width = on.clean.ids.shape[1]
    per_question = torch.zeros(len(on), *shape)
    per_position = torch.zeros(width, *shape)
    number = per_question.numel() * width
    keep, dtype = number <= KEPT_ROUNDED, torch.float32 if number <= KEPT else torch.float16
    parts, missed = [], torch.zeros(len(on))
    for rows, scores, missed[rows] in _scored(graph, on, steps):
        per_question[rows] = scores.sum(1)
        per_position += scores.sum(0) / len(on)
        if keep:
            parts.append(scores.to(dtype))
    return EdgeScores(per_question, per_position, missed, torch.cat(parts) if keep else None)


def _scored(
    graph: Graph, on: Sides, steps: int | None
) -> Iterator[tuple[slice, Float[Tensor, "row pos writer reader"], Float[Tensor, " row"]]]:
    """Scores of some rows at a time, and what they miss. Without `steps`, gradients are those of the clean run."""
    for rows in chunks(graph, on):
        part = on.part(rows)
        corrupt = written(graph, part.corrupt)
        difference = written(graph, part.clean) - corrupt
        line = _InputLine(graph, part, corrupt[:, :, 0], difference[:, :, 0])
        gradients = line.gradients([1.0] if steps is None else _middles(steps), range(len(part)))
        missed, pieces = line.missed(gradients), steps or MOST
        while pieces >= STEPS and 3 * pieces <= MOST and len(far := (missed > CLOSE).nonzero()[:, 0].tolist()):
            # pieces cut in three: their middles are the old ones, and twice as many new ones
            more = line.gradients([x for i, x in enumerate(_middles(3 * pieces)) if i % 3 != 1], far)
            for each, new in zip(gradients, more, strict=True):
                each[far] = (each[far] + 2 * new) / 3
            missed, pieces = line.missed(gradients), 3 * pieces
        scores = torch.zeros(*difference.shape[:3], len(graph.readers))
        for group, gradient in zip(graph.reading, gradients, strict=True):
            reached = difference[:, :, : group.reach]
            scores[:, :, : group.reach, group.start : group.stop] = torch.einsum(
                "rpwd,rpvd->rpwv", reached, gradient
            ).cpu()
        yield rows, scores, missed.cpu()


@dataclass(frozen=True)
class _InputLine:
    """The straight line from the corrupt input to the clean one."""

    graph: Graph
    on: Sides
    corrupt: Float[Tensor, "row pos d_model"]
    difference: Float[Tensor, "row pos d_model"]

    def gradients(
        self, points: Sequence[float], rows: Sequence[int]
    ) -> list[Float[Tensor, "part pos _reader d_model"]]:
        """Means over points of the line of `_gradients`, of some rows."""
        at, on = list(rows), self.on.part(rows)
        total: list[Tensor] = []
        for point in points:
            here = _gradients(self.graph, on, self.corrupt[at] + point * self.difference[at])
            total = [one + each for one, each in zip(total, here, strict=True)] if total else list(here)
        return [one / len(points) for one in total]

    @cached_property
    def change(self) -> Float[Tensor, " row"]:
        """What the metric changes by from one end to the other."""
        with torch.no_grad():
            clean, corrupt = (self.on.metric(run_graph(self.graph, side)) for side in (self.on.clean, self.on.corrupt))
        return clean - corrupt

    def missed(self, gradients: Sequence[Float[Tensor, "row pos _reader d_model"]]) -> Float[Tensor, " row"]:
        found = sum(torch.einsum("rpd,rpvd->r", self.difference, each) for each in gradients)
        return (found - self.change).abs() / self.change.abs().clamp(min=LEAST)


def _middles(steps: int) -> list[float]:
    return [(step + 0.5) / steps for step in range(steps)]


@torch.enable_grad()
def _gradients(
    graph: Graph, on: Sides, start: Float[Tensor, "row pos d_model"]
) -> tuple[Float[Tensor, "row pos _reader d_model"], ...]:
    """Gradients of each row's metric in what every group of readers reads, in a run from `start`."""
    seen: dict[Readers, Tensor] = {}

    def keep(group: Readers, x: Tensor) -> Tensor:
        seen[group] = x
        return x

    logits = run_graph(graph, on.clean, keep, start=start.detach().requires_grad_())
    return torch.autograd.grad(on.metric(logits).sum(), [seen[group] for group in graph.reading])


def exact(graph: Graph, on: Sides) -> Float[Tensor, "row writer reader"]:
    """How much each row's metric drops, in nats, with one edge patched at all positions: one forward an edge."""
    edges = graph.exists.nonzero()
    drop = torch.zeros(len(on), *graph.exists.shape)
    drop[:, edges[:, 0], edges[:, 1]] = _drops(graph, on, [edge[None] for edge in edges])
    return drop


def patch_paths(graph: Graph, on: Sides, paths: Sequence[tuple[str, Sequence[str]]]) -> Float[Tensor, "row path"]:
    """Path patching (Wang et al. 2022, arXiv 2211.00593): how much each row's metric drops, in nats, for each path.

    In each, what the sender writes is that of the corrupt run for its receivers alone, along the residual stream, and
    live for everything else. Raises InputError for a name that the graph does not have, or a receiver that does not
    read the sender.
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


def _drops(graph: Graph, on: Sides, groups: Sequence[Int[Tensor, "_edge 2"]]) -> Float[Tensor, "row group"]:
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


class Circuits(NamedTuple):
    """Circuits that are measured: their sizes, as fractions of all edges, and the seeds of random ones beside them."""

    fractions: Sequence[float] = FRACTIONS
    seeds: Sequence[int] = range(5)


CIRCUITS = Circuits()


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
    which: Circuits = CIRCUITS,
) -> Curve:
    """Keep the edges of largest |score|, patch all others, and measure what is left of the metric, size by size.

    By |score|, because an edge that works against the metric is part of the computation as well: without such edges a
    circuit overshoots, which CPR would count for it. `counts` resample the rows (`stats.resample_counts`), the same way
    for every size, so that the integrals have intervals too. `which` says how large circuits are, and how many random
    ones are beside them.
    """
    total = len(graph)
    inner = sorted({round(fraction * total) for fraction in which.fractions} - {0, total})
    rankings = [scores.abs().cpu()]
    rankings += [torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)) for seed in which.seeds]
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
