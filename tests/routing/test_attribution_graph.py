"""The graph is one that circuit-tracer's and Neuronpedia's viewers can read, and says what the record says."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from mixturelens.routing.attribution_graph import attribution_graph
from mixturelens.routing.circuit import CircuitRecord, RoutingCircuit

RECORDS = Path(__file__).parents[2] / "artifacts" / "reference" / "records"

TEXT, WHOLE, NUMBER, MAYBE = ({"type": kind} for kind in ("string", "integer", "number", ["number", "null"]))
# what version 1.0.0 of Neuronpedia's graph-schema.json asks for, in our words; closed, so that what it knows under
# another name is found, and with what circuit-tracer's own models (frontend/graph_models.py) ask for besides
NODE = {
    "node_id": TEXT,
    "feature": {"type": ["integer", "null"]},
    "layer": {"type": ["string", "integer"]},
    "ctx_idx": WHOLE,
    "feature_type": TEXT,
    "jsNodeId": TEXT,
    "clerp": TEXT,
    "influence": MAYBE,
    "activation": MAYBE,
    "token_prob": NUMBER,
    "is_target_logit": {"type": "boolean"},
    "run_idx": WHOLE,
    "reverse_ctx_idx": WHOLE,
}
LINK = {"source": TEXT, "target": TEXT, "weight": NUMBER, "inputs": {"type": "object"}}
METADATA = {
    "slug": TEXT,
    "scan": TEXT,
    "prompt_tokens": {"type": "array", "items": TEXT},
    "prompt": TEXT,
    "node_threshold": NUMBER,
    "transcoder_list": {"type": "array", "items": TEXT},
    "info": {
        "type": "object",
        "properties": {"description": TEXT, "generator": {"type": "object", "properties": {"name": TEXT}}},
    },
}
QUERY = {
    "pinnedIds": {"type": "array", "items": TEXT},
    "supernodes": {"type": "array"},
    "linkType": TEXT,
    "clickedId": TEXT,
    "sg_pos": TEXT,
}


def closed(properties: dict) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMA = closed(
    {
        "metadata": closed(METADATA),
        "qParams": closed(QUERY),
        "nodes": {"type": "array", "items": closed(NODE)},
        "links": {"type": "array", "items": closed(LINK)},
    }
)


def circuits() -> list[RoutingCircuit]:
    return list(CircuitRecord.load(RECORDS / "sft--rl-A" / "circuit.json").circuits)


@pytest.mark.parametrize("of", circuits(), ids=lambda of: f"{of.kind}-{of.checkpoint}")
def test_the_graph_fits_the_schema_and_hangs_together(of: RoutingCircuit) -> None:
    graph = attribution_graph(of, "reference", "sft")
    jsonschema.validate(graph, SCHEMA)
    nodes = {node["node_id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]), "no two nodes of one name"
    assert {end for link in graph["links"] for end in (link["source"], link["target"])} == set(nodes)
    pairs = [(link["source"], link["target"]) for link in graph["links"]]
    assert len(pairs) == len(set(pairs))
    assert max(node["influence"] for node in nodes.values()) == pytest.approx(1.0)
    assert all(0 <= node["ctx_idx"] < len(graph["metadata"]["prompt_tokens"]) for node in nodes.values())
    kinds = {node["feature_type"] for node in nodes.values()}
    assert kinds == {"embedding", "attention head", "mlp", "logit"}


def test_weights_are_the_scores_of_all_inputs_with_their_intervals() -> None:
    of = circuits()[0]
    graph = attribution_graph(of, "reference", "sft")
    written = [link for link in graph["links"] if "attention" not in link["inputs"]]
    assert sum(link["weight"] for link in written) == pytest.approx(sum(e.score.known for e in of.edges), abs=1e-3)
    assert sum(len(link["inputs"]) for link in written) == len(of.edges)
    strongest = max(of.edges, key=lambda edge: abs(edge.score.known))
    assert (strongest.sender, strongest.receiver, strongest.position) == ("L2.mlp", "logits", 8)
    (link,) = [link for link in written if (link["source"], link["target"]) == ("2_1000_8", "4_0_8")]
    assert link["inputs"]["in"] == strongest.score.model_dump()


def test_attention_links_a_head_where_it_reads_to_itself_where_it_writes() -> None:
    of = circuits()[0]
    moved = [link for link in attribution_graph(of, "r", "sft")["links"] if "attention" in link["inputs"]]
    (look,) = [look for look in of.looks if (look.head, look.position) == ("L0.h2", 8)]
    (link,) = [link for link in moved if (link["source"], link["target"]) == ("0_2_0", "0_2_8")]
    assert link["weight"] == look.clean[0]
