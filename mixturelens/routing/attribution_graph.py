"""A circuit as the graph that circuit-tracer writes and Neuronpedia shows: its JSON, version 1.0.0 of the schema.

https://github.com/safety-research/circuit-tracer, and `graph-schema.json` of https://github.com/hijohnnylin/neuronpedia.
Their nodes are features of transcoders; ours are heads and MLPs, and say so in `feature_type` and `clerp`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypedDict

from mixturelens.routing.circuit import CircuitEdge, RoutingCircuit
from mixturelens.types import Interval

_MLP = 1000
"""Number of an MLP among the nodes of its layer, behind all heads; `kv0` and so on follow."""


class GraphLink(TypedDict):
    """What one node writes and another reads, by all of its inputs together."""

    source: str
    target: str
    weight: float
    inputs: dict[str, dict[str, float | None]]
    """Not of the schema: the score of each input (`q`, `k`, `v`, or `in`) with its interval."""


def attribution_graph(circuit: RoutingCircuit, slug: str, model: str) -> dict[str, object]:
    """The graph of one checkpoint, as JSON can hold it. `model` is what the viewer calls the model.

    A head that takes keys and values from one token and writes at another is a node at either; between them there is a
    link of input `attention`, whose weight is the share of attention that the record holds, and no share of the
    contrast.
    """
    edges = [edge for edge in circuit.edges if edge.score.measured]
    ends = [(name, edge.position) for edge in edges for name in (edge.sender, _reader(edge))]
    nodes = list(dict.fromkeys(ends))
    through = dict.fromkeys(nodes, 0.0)
    for edge in edges:
        for name in (edge.sender, _reader(edge)):
            through[name, edge.position] += abs(edge.score.known)
    total, so_far, influence = sum(through.values()) or 1.0, 0.0, {}
    for node in sorted(nodes, key=lambda node: -through[node]):
        so_far += through[node]
        influence[node] = round(so_far / total, 6)
    layers = max((node.layer for node in circuit.nodes if node.name == "logits"), default=1)
    words = list(circuit.labels) or [str(at) for at in range(1 + max((at for _, at in nodes), default=0))]
    return {
        "metadata": {
            "slug": slug,
            "scan": model,
            "prompt_tokens": words,
            "prompt": " ".join(words),
            "node_threshold": 1.0,
            "transcoder_list": [],
            "info": {
                "description": f"{circuit.kind} contrast, {circuit.clean} against {circuit.corrupt}, {circuit.method}, "
                f"{circuit.questions} questions. Weights are shares of the contrast; tokens that differ between "
                "questions are named by their span.",
                "generator": {"name": "mixturelens"},
            },
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": [_node(name, at, layers, influence[name, at], circuit) for name, at in nodes],
        "links": [*_links(edges, layers), *_attention(circuit, nodes, layers)],
    }


def _reader(edge: CircuitEdge) -> str:
    return edge.receiver.rsplit(".", 1)[0] if edge.receiver.count(".") == 2 else edge.receiver


def _address(name: str, layers: int) -> tuple[str, int]:
    """(layer, number in it)."""
    if name in ("input", "logits"):
        return ("E", 0) if name == "input" else (str(layers + 1), 0)
    layer, unit = name[1:].split(".")
    number = int(unit.lstrip("hkv")) if unit != "mlp" else 0
    return layer, number if unit.startswith("h") else _MLP + (1 + number if unit.startswith("kv") else 0)


def _id(name: str, at: int, layers: int) -> str:
    layer, number = _address(name, layers)
    return f"{layer}_{number}_{at}"


def _node(name: str, at: int, layers: int, influence: float, circuit: RoutingCircuit) -> dict[str, object]:
    layer, number = _address(name, layers)
    kind = {"input": "embedding", "logits": "logit"}.get(name, "mlp" if name.endswith(".mlp") else "attention head")
    return {
        "node_id": _id(name, at, layers),
        "feature": at if name == "input" else number,
        "layer": layer,
        "ctx_idx": at,
        "feature_type": kind,
        "token_prob": 0.0,
        "is_target_logit": name == "logits",
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{layer}_{number}-{at}",
        "clerp": f"log-odds, {circuit.clean} against {circuit.corrupt}" if name == "logits" else name,
        "influence": influence,
        "activation": None,
    }


def _links(edges: Sequence[CircuitEdge], layers: int) -> list[GraphLink]:
    found: dict[tuple[str, str], GraphLink] = {}
    for edge in edges:
        source, target = (_id(name, edge.position, layers) for name in (edge.sender, _reader(edge)))
        link = found.setdefault((source, target), {"source": source, "target": target, "weight": 0.0, "inputs": {}})
        link["weight"] = round(link["weight"] + edge.score.known, 6)
        link["inputs"][edge.receiver.rsplit(".", 1)[1] if edge.receiver.count(".") == 2 else "in"] = _number(edge.score)
    return list(found.values())


def _number(value: Interval) -> dict[str, float | None]:
    return {"value": value.value, "low": value.low, "high": value.high}


def _attention(circuit: RoutingCircuit, nodes: Sequence[tuple[str, int]], layers: int) -> Iterator[GraphLink]:
    for look in circuit.looks:
        for at, share in look.clean.items():
            if at != look.position and (look.head, at) in nodes:
                yield {
                    "source": _id(look.head, at, layers),
                    "target": _id(look.head, look.position, layers),
                    "weight": share,
                    "inputs": {"attention": {"value": share, "low": None, "high": None}},
                }
