"""The routing circuit: edges that carry hint, policy and cue, each with a score, and how faithful they are.

Slopes nominate, exact patching verifies (as AtP*, Kramar et al. 2024, arXiv 2403.00745, verifies its top nodes with
their true effects). A head that carries the cue to where nothing reads it has slopes all the same where its x and -x
leave the norm equal at both ends of the path and not in between; patching it moves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from mixturelens.behaviour.harmed import find_harm
from mixturelens.behaviour.record import BehaviourRecord
from mixturelens.contrasts import Contrasts, Kind, check_even, cue_contrasts, hint_contrasts, position_labels
from mixturelens.hooks.batches import Sides, as_begun, sides
from mixturelens.hooks.lens import Lens, lens_of
from mixturelens.models import Pair
from mixturelens.models.cost import Work, estimate, said_time, size_of, timed
from mixturelens.models.source import fingerprint
from mixturelens.patching.attribution import (
    FRACTIONS,
    LEAST,
    STEPS,
    Circuits,
    EdgeScores,
    eap_ig,
    eap_ig_of,
    faithfulness,
)
from mixturelens.patching.graph import Graph, edge_graph, masked
from mixturelens.patching.sweep import APART, Direction, patch
from mixturelens.records import Record
from mixturelens.routing.looks import Look, looks
from mixturelens.routing.overlap import Overlap, overlaps
from mixturelens.stats import FEWEST, apart, interval, resample_counts, resampled_mean, share, too_few
from mixturelens.types import NOT_MEASURED, Frozen, InputError, Interval, RunError, Side, Site

SHOWN = 120
"""Edges, at most, that a record holds: the strongest."""
DRAWS = 400
"""Bootstrap samples of a circuit: there are many edges."""
VERIFIED = 48
"""Heads and MLPs, at most, that are patched exactly: the strongest by slopes. Two directions of so many are 96 runs, as
many as the slopes take (STEPS forwards and backwards), and of most runs only the later layers are computed."""
OPERATIONS = 1e13
"""Floating-point operations that a circuit may take without being asked: about three minutes on one core."""
CARRIES = 0.01
"""Share of the contrast that a node which is used must surely move: slopes themselves are off by about this much
(`eap_ig`), so a circuit says nothing of less."""


@dataclass(frozen=True)
class Effort:
    """What a circuit is made with."""

    steps: int = STEPS
    """Of integrated gradients."""
    fractions: tuple[float, ...] = FRACTIONS
    random: int = 5
    verified: int = VERIFIED

    @property
    def forwards(self) -> float:
        """Forwards that it takes for each question: those there and back count for five, as they go edge by edge."""
        masked = 1 + len(self.fractions) * (1 + self.random) / 2
        return 5 * self.steps + 2 * masked + self.verified


FULL, LESS = Effort(), Effort(steps=8, fractions=(0.01, 0.05, 0.2), random=1, verified=16)


_NODE = r"(input|logits|L\d{1,4}\.(mlp|(h|kv)\d{1,4}))"


class CircuitNode(Frozen):
    """The input, a head, an MLP or the logits."""

    name: Annotated[str, Field(pattern=f"^{_NODE}$")]
    """`input`, `L0.h3`, `L1.mlp` or `logits`."""
    layer: int
    """-1 for the input, the number of layers for the logits."""
    score: Interval
    """Sum of |score| of the edges through it, as share of the metric's difference."""
    patched: Interval = NOT_MEASURED
    """Share of the contrast that it moves alone, exactly: its clean output, at all positions, in the corrupt run. Not
    measured of the input, the logits, and nodes beyond the VERIFIED strongest."""
    needed: Interval = NOT_MEASURED
    """The same with its corrupt output in the clean run. A node that works only beside another is not found without."""

    @property
    def used(self) -> bool | None:
        """Whether patching it moves at least CARRIES of the contrast, one way or the other: False refutes its slope.

        None where it was not patched, or intervals leave it open.
        """
        both = (self.patched, self.needed)
        if any(each.above(CARRIES) or each.below(-CARRIES) for each in both):
            return True
        return False if all(each.above(-CARRIES) and each.below(CARRIES) for each in both) else None


class CircuitEdge(Frozen):
    """What one node writes, as one other reads it, at one position."""

    sender: Annotated[str, Field(pattern=f"^{_NODE}$")]
    """A node's name."""
    receiver: Annotated[str, Field(pattern=rf"^{_NODE}(\.[qkv])?$")]
    """A node's name; of a head, one of its three inputs: `L1.h2.q`, `L1.h2.k`, `L1.h2.v`."""
    position: Annotated[int, Field(ge=0, lt=2**20)]
    score: Interval
    """Share of the metric's difference between clean and corrupt; negative where the edge works against it."""


class FaithfulnessCurve(Frozen):
    """What circuits of growing size keep of the metric's difference: 0 nothing, 1 all of it.

    Edges are ranked on one half of the questions, and circuits judged on the other.
    """

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


class Missed(Frozen):
    """What the scores of the input's edges, which should add up to a question's change of the metric, miss of it."""

    mean: float
    """Of the mean change over questions: errors of single questions cancel in it."""
    median: float
    """Of a question's own change."""
    worst: float


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
    missed: Missed | None = None
    nodes: tuple[CircuitNode, ...]
    edges: tuple[CircuitEdge, ...]
    looks: tuple[Look, ...] = ()
    """Of every head from every position at which it is a sender of `edges`; none in records from before they were
    kept."""
    faithfulness: FaithfulnessCurve


class CircuitRecord(Record):
    """The routing circuits of a pair, and how alike those of all checkpoints at hand are."""

    KIND = "circuit"
    INDENT = None

    circuits: tuple[RoutingCircuit, ...]
    overlaps: tuple[Overlap, ...]
    compared: tuple[str, ...] = ()
    """Weights of the further checkpoints that were compared."""
    missing: tuple[str, ...] = ()
    """Contrasts without a circuit, and why."""


@dataclass(frozen=True)
class CircuitSettings:
    """What circuits are made of, beside the pair."""

    also: Mapping[str, Pair] = field(default_factory=dict)
    """More pairs by name (after RL on another cue, say): the circuits of their R are compared with the pair's."""
    exhaustive: bool = False
    """All questions, steps and sizes, whatever time they take; else, on a large model, as many as OPERATIONS or the
    pair's budget allow."""


def circuit_record(
    pair: Pair,
    behaviour: BehaviourRecord,
    settings: CircuitSettings | None = None,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> CircuitRecord:
    """Circuits of S and R on the cue contrast and, where the suite has hints, on the hint contrast.

    `behaviour` is what was measured of the pair; `say` is told each step. A contrast without a circuit is named in
    `missing`. Raises InputError as `find_harm` does.
    """
    settings, say = settings or CircuitSettings(), say or (lambda _: None)
    also = settings.also
    harm = find_harm(behaviour)
    pair = pair.spelled(behaviour.spelling)
    suite = pair.suite
    checkpoints: dict[str, tuple[Pair, Side]] = {"before": (pair, "before"), "after": (pair, "after")}
    checkpoints |= {name: (other, "after") for name, other in also.items()}
    circuits: list[RoutingCircuit] = []
    missing: list[str] = []
    found: dict[str, dict[str, Float[Tensor, "row edge"]]] = {}
    told: Contrasts | None = None  # the cue contrast is the same in all checkpoints
    for name, (of, which) in checkpoints.items():
        lens = lens_of(of, which)
        cue = cue_contrasts(suite, lens.tokenizer, harm.policy, harm.cues, harm.shows)
        missing += [f"circuit: {line}" for line in cue.left_out if name == "before"]
        contrasts = [cue]
        hints = {row.hint for row in suite.hinted if row.cue == harm.trained_cue}
        if {harm.policy, harm.other} <= hints:
            contrasts.append(hint_contrasts(suite, lens.tokenizer, harm.trained_cue, harm.policy, harm.other))
        for each in contrasts:
            what = f"circuit of the {each.kind}, {name}"
            say(what)
            try:
                _even(sides(lens, each.first(2)))
                if each.kind == "cue":
                    each = told = told or as_begun(lens_of(pair, "before"), suite, each)
                parts = len(checkpoints) * len(contrasts)
                effort, number = (FULL, len(each.rows)) if settings.exhaustive else _affordable(of, each, parts)
                each = each.first(number)
                takes = estimate(of, Work(tokens=_tokens(each, effort))).seconds
                say(timed(f"{what}: {said_time(takes)}", takes))
                on = _even(sides(lens, each))
                graph = edge_graph(lens, on)
                scores = eap_ig(graph, on, effort.steps)
                if name in ("before", "after"):
                    side: Side = "before" if name == "before" else "after"
                    circuits.append(_circuit(graph, on, scores, each, side, seed, effort))
            except (InputError, RunError) as error:
                missing.append(f"{each.kind}, {name}: {error}")
                continue
            found.setdefault(each.kind, {})[name] = scores.per_question[:, graph.exists]
    alike = [each for kind in ("cue", "hint") for each in overlaps(kind, found.get(kind, {}), seed, DRAWS)]
    compared = tuple(fingerprint(other.after) for other in also.values() if other.after is not None)
    # each is ranked by one half of its questions and judged on the other
    missing += too_few(" and ".join(found), *(each.questions // 2 for each in circuits))
    return CircuitRecord(circuits=tuple(circuits), overlaps=tuple(alike), compared=compared, missing=tuple(missing))


def routing_circuit(
    lens: Lens, contrasts: Contrasts, side: Side, seed: int = 0, effort: Effort | None = None
) -> RoutingCircuit:
    """The edges that carry a contrast in one checkpoint, by EAP with integrated gradients, and how faithful they are.

    Of the strongest nodes (`effort.verified`) `used` says whether exact patching bears them out. A node of less slope
    is not looked at: what slopes do not see in a large model, this does not find.

    >>> routing_circuit(lens, cue_contrasts(suite, tokenizer, "a", ("A", "B")), "after").edges[0]   # doctest: +SKIP
    CircuitEdge(sender='input', receiver='L0.h2.v', position=0, score=Interval(value=0.5, ...))
    """
    on = _even(sides(lens, contrasts))
    graph = edge_graph(lens, on)
    effort = effort or FULL
    return _circuit(graph, on, eap_ig(graph, on, effort.steps), contrasts, side, seed, effort)


def _affordable(pair: Pair, contrasts: Contrasts, parts: int) -> tuple[Effort, int]:
    """Effort and questions that the time allows, of which so many circuits have a part each. Raises InputError where
    those are too few."""
    size, allowed = size_of(pair), OPERATIONS
    if pair.budget.minutes is not None:
        allowed *= 60 * pair.budget.minutes / parts / estimate(pair, Work(tokens=OPERATIONS / (2 * size.body))).seconds
    each = {effort: 2 * size.body * _tokens(contrasts, effort) / len(contrasts.rows) for effort in (FULL, LESS)}
    if each[FULL] * len(contrasts.rows) <= allowed:
        return FULL, len(contrasts.rows)
    number = min(len(contrasts.rows), int(allowed / each[LESS]))
    if number < min(FEWEST, len(contrasts.rows)):
        needed = estimate(pair, Work(tokens=FEWEST * each[LESS] / (2 * size.body)))
        raise InputError(
            f"a circuit of {FEWEST} questions takes {said_time(needed.seconds)}, and there are {parts}; give --minutes "
            f"{math.ceil(parts * needed.seconds / 60)} or more, or --exhaustive"
        )
    return LESS, number


def _tokens(contrasts: Contrasts, effort: Effort) -> float:
    """Tokens that pass through the model for a circuit of these questions."""
    return len(contrasts.rows) * max(len(row.clean) for row in contrasts.rows) * effort.forwards


def _even(on: Sides) -> Sides:
    if len(on) < 2:
        raise InputError("one half of the questions ranks the edges and the other judges them: give at least two")
    check_even(on.shifts)
    return on


def _circuit(
    graph: Graph,
    on: Sides,
    scores: EdgeScores,
    contrasts: Contrasts,
    side: Side,
    seed: int,
    effort: Effort,
) -> RoutingCircuit:
    counts = resample_counts(len(on), seed, draws=DRAWS)
    ends = masked(graph, on, [torch.ones(graph.exists.shape), torch.zeros(graph.exists.shape)])
    whole = resampled_mean((ends[0] - ends[1]).double().numpy(), counts)
    if not apart(whole, APART):
        raise InputError(f"the two sides of the {contrasts.kind} contrast differ by {whole[0]:.2f} nats: no circuit")
    place = scores.per_position.abs().flatten().topk(min(SHOWN, int((scores.per_position != 0).sum()))).indices
    edges = torch.stack(torch.unravel_index(place, scores.per_position.shape), 1)
    at = edges.unbind(1)
    of_question = (
        (eap_ig_of(graph, on, edges, effort.steps) if scores.whole is None else scores.whole[:, *at]).double().numpy()
    )
    draws = share(resampled_mean(of_question, counts), whole, APART)
    # ranked by one half of the questions, judged on the other
    judge = sides(graph.lens, contrasts.half(1))
    ranking = scores.per_question[contrasts.rows_of(0)].mean(0)
    few = resample_counts(len(judge), seed)
    curve = faithfulness(graph, judge, ranking, few, Circuits(effort.fractions, range(effort.random)))
    writers = {(graph.writers[writer], position) for position, writer, _ in edges.tolist()}
    total = len(graph)
    random = [[one.kept[i] for one in curve.random] for i in range(len(curve.edges))]
    return RoutingCircuit(
        kind=contrasts.kind,
        checkpoint=side,
        clean=contrasts.clean,
        corrupt=contrasts.corrupt,
        questions=len(on),
        method=f"EAP-IG, {effort.steps} steps",
        labels=position_labels(contrasts, graph.lens.tokenizer),
        edges_total=total,
        missed=_missed(scores, (ends[0] - ends[1]).double()),
        nodes=_nodes(graph, scores, contrasts, counts, whole, effort.verified),
        edges=tuple(
            CircuitEdge(
                sender=graph.writers[writer],
                receiver=graph.readers[reader],
                position=position,
                score=interval(draws[:, i], counts, digits=5),
            )
            for i, (position, writer, reader) in enumerate(edges.tolist())
        ),
        looks=looks(graph.lens, on, writers),
        faithfulness=FaithfulnessCurve(
            sizes=curve.edges,
            fractions=tuple(round(size / total, 6) for size in curve.edges),
            found=curve.ranked.kept,
            random=tuple(_envelope(values) for values in random),
            cpr=curve.ranked.cpr,
            cmd=curve.ranked.cmd,
            random_cpr=_envelope([one.cpr for one in curve.random]),
            random_cmd=_envelope([one.cmd for one in curve.random]),
        ),
    )


def _missed(scores: EdgeScores, change: Float[Tensor, " row"]) -> Missed:
    found = scores.per_question[:, 0].sum(-1).double()
    return Missed(
        mean=round(float((found.mean() - change.mean()).abs() / change.mean().abs().clamp(min=LEAST)), 6),
        median=round(float(scores.missed.median()), 6),
        worst=round(float(scores.missed.max()), 6),
    )


def _nodes(
    graph: Graph,
    scores: EdgeScores,
    contrasts: Contrasts,
    counts: Int[np.ndarray, "draw row"],
    whole: Float[np.ndarray, " draw"],
    verified: int,
) -> tuple[CircuitNode, ...]:
    """What each node's outgoing edges carry (of the logits: the incoming ones), signs dropped; and what it moves."""
    layers = {"input": -1, **{name: int(name[1:].split(".")[0]) for name in graph.writers[1:]}}
    per_question = scores.per_question.double().numpy()
    through = {name: per_question[:, writer] for writer, name in enumerate(graph.writers)}
    through["logits"] = per_question[:, :, -1]
    carried = {name: np.abs(resampled_mean(each, counts)).sum(-1) / np.abs(whole) for name, each in through.items()}
    strongest = sorted(graph.writers[1:], key=lambda name: -carried[name][0])[:verified]

    def exact(direction: Direction) -> dict[str, Interval]:
        moved = patch(graph.lens, contrasts, [_site(name) for name in strongest], direction=direction).effects(counts)
        return {name: interval(draws, counts, digits=5) for name, draws in zip(strongest, moved.T, strict=True)}

    patched, needed = exact("denoise"), exact("noise")
    return tuple(
        CircuitNode(
            name=name,
            layer=layers.get(name, graph.lens.layers),
            score=interval(draws, counts, digits=5),
            patched=patched.get(name, NOT_MEASURED),
            needed=needed.get(name, NOT_MEASURED),
        )
        for name, draws in carried.items()
    )


def _site(name: str) -> Site:
    """The output of a head or an MLP, at all positions."""
    layer, unit = name[1:].split(".")
    if unit == "mlp":
        return Site(layer=int(layer), component="mlp_out")
    return Site(layer=int(layer), component="z", head=int(unit[1:]))


def _envelope(values: Sequence[Interval]) -> Interval:
    """The mean of random circuits; from the lowest end of their intervals to the highest."""
    known = [
        (v.value, v.low, v.high) for v in values if v.value is not None and v.low is not None and v.high is not None
    ]
    if not known:
        return NOT_MEASURED
    value, low, high = zip(*known, strict=True)
    return Interval(value=round(float(np.mean(value)), 10), low=min(low), high=max(high))
