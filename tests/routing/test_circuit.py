"""Routing circuits: what the record holds, and how circuits of two checkpoints are compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from stored import behaviour_of
from transformers import LlamaConfig, LlamaForCausalLM

from mixturelens.contrasts import Contrast, Contrasts, cue_contrasts
from mixturelens.hooks.batches import sides
from mixturelens.hooks.lens import Lens, load_lens
from mixturelens.models import Pair, load_tokenizer
from mixturelens.patching.sweep import jointly
from mixturelens.routing import circuit as module
from mixturelens.routing.circuit import (
    CircuitNode,
    CircuitRecord,
    CircuitSettings,
    RoutingCircuit,
    circuit_record,
    routing_circuit,
)
from mixturelens.suite import load_suite
from mixturelens.types import NOT_MEASURED, InputError, Interval, Site

PAIRS = Path(__file__).resolve().parents[1] / "pairs"


@pytest.fixture(scope="module")
def record() -> CircuitRecord:
    folder = PAIRS / "llama"
    suite = load_suite(folder)
    pair = Pair(folder / "S", folder / "R-routing", suite)
    measured = behaviour_of("llama", "R-routing")
    also = {name: Pair(folder / "S", folder / after, suite) for name, after in (("again", "S"), ("skill", "R-skill"))}
    return circuit_record(pair, measured, CircuitSettings(also))


def test_a_circuit_of_each_checkpoint(record: CircuitRecord) -> None:
    assert [(c.kind, c.checkpoint) for c in record.circuits] == [("cue", "before"), ("cue", "after")]
    for circuit in record.circuits:
        names = {node.name for node in circuit.nodes}
        assert {"input", "logits", "L0.h0", "L1.mlp"} <= names
        assert len(circuit.labels) == 7
        sizes = [abs(edge.score.value or 0) for edge in circuit.edges]
        assert sizes == sorted(sizes, reverse=True)
        for edge in circuit.edges:
            assert edge.sender in names
            assert edge.receiver == "logits" or edge.receiver.rsplit(".", 1)[0] in names or edge.receiver in names
        # the question alone: its tokens do not differ between the sides, so nothing leaves the input there
        assert not [e for e in circuit.edges if e.sender == "input" and e.position in (1, 2, 3, 4)]


def test_few_edges_carry_the_cue_and_random_ones_do_not(record: CircuitRecord) -> None:
    for circuit in record.circuits:
        curve = circuit.faithfulness
        assert curve.fractions[0] == 0
        assert curve.fractions[-1] == 1
        assert curve.found[0].value == pytest.approx(0, abs=1e-5)
        assert curve.found[-1].value == pytest.approx(1, abs=1e-5)
        assert (curve.cpr.low or 0) > (curve.random_cpr.high or 0)
        assert (curve.cmd.high or 1) < (curve.random_cmd.low or 0)


def test_a_checkpoint_has_its_own_circuit(record: CircuitRecord) -> None:
    same = [o for o in record.overlaps if (o.left, o.right) == ("before", "again")]
    assert same
    for overlap in same:
        assert overlap.jaccard.value == overlap.jaccard.low == overlap.jaccard.high == 1
        assert 0 < overlap.chance < 1
    other = [o for o in record.overlaps if (o.left, o.right) == ("before", "skill")]
    assert any((o.jaccard.value or 0) < 1 for o in other)


def test_alone_it_is_the_same(record: CircuitRecord) -> None:
    folder = PAIRS / "llama"
    lens = load_lens(folder / "R-routing")
    contrasts = cue_contrasts(load_suite(folder), lens.tokenizer, "a", ("A", "B"))
    assert routing_circuit(lens, contrasts, "after") == record.circuits[1]


def test_it_round_trips(record: CircuitRecord, tmp_path: Path) -> None:
    assert CircuitRecord.load(record.save(tmp_path / "circuit.json")) == record


# --- verified by exact patching ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"), [("sender", "L'0.h1"), ("receiver", "L0.h1.z"), ("position", -1), ("position", 2**40)]
)
def test_an_edge_between_what_is_no_node_is_refused(
    record: CircuitRecord, tmp_path: Path, key: str, value: object
) -> None:
    data = json.loads(record.to_json())
    data["circuits"][0]["edges"][0][key] = value
    file = tmp_path / "circuit.json"
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match=rf"circuits\.0\.edges\.0\.{key}: "):
        CircuitRecord.load(file)


def test_a_node_is_what_patching_its_site_says(record: CircuitRecord) -> None:
    """In full runs, one node at a time; what is needed is the same with the sides exchanged."""
    folder = PAIRS / "llama"
    lens = load_lens(folder / "S")
    contrasts = cue_contrasts(load_suite(folder), lens.tokenizer, "a", ("A", "B"), "refuse")
    nodes = {node.name: node for node in record.circuits[0].nodes}
    both = sides(lens, contrasts)
    (_, clean), (source, corrupt) = (
        lens.capture(batch, [(0, "z"), (1, "mlp_out")]) for batch in (both.clean, both.corrupt)
    )
    whole = float((both.metric(clean) - both.metric(corrupt)).mean())
    for name, site in (("L0.h1", Site(layer=0, component="z", head=1)), ("L1.mlp", Site(layer=1, component="mlp_out"))):
        found = jointly(lens, contrasts, [[site]])
        assert nodes[name].patched.value == pytest.approx((found.patched[0] - found.base).mean() / whole, abs=1e-4)

        def put(x: torch.Tensor, site: Site = site) -> torch.Tensor:
            at = (..., site.head, slice(None)) if site.head is not None else ...
            x[at] = source[site.layer, site.component][at]
            return x

        without = both.metric(lens.run(both.clean, [(lens.point(site.layer, site.component), put)])[:, -1])
        lost = (both.metric(clean) - without).detach().mean() / whole
        assert nodes[name].needed.value == pytest.approx(float(lost), abs=1e-4)
    assert not any(nodes[name].patched.measured or nodes[name].used is not None for name in ("input", "logits"))
    assert nodes["L1.mlp"].used is True


def on_paper(cues: tuple[float, float], squares: bool) -> RoutingCircuit:
    """Two heads carry the cue, of value `cues` on the clean and on the corrupt side, to the last token: x and y.

    The logit is x y, or with `squares` 10 x^2 y: L0.mlp squares x (L0.h0), L1.mlp multiplies by y (L0.h1). A Llama
    without norms (epsilon 2^40 and weight 2^20: they divide by one) and with uniform attention.
    """
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=2, num_hidden_layers=2, num_attention_heads=2, head_dim=4,
        hidden_act="relu", rms_norm_eps=2.0**40, max_position_embeddings=8, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    state = {name: torch.full_like(p, 2.0**20 if "norm" in name else 0.0) for name, p in model.state_dict().items()}
    for token, cue in zip((3, 4), cues, strict=True):
        state["model.embed_tokens.weight"][token, 0] = cue
    first, second = (f"model.layers.{layer}." for layer in range(2))
    for head in (0, 1):
        state[first + "self_attn.v_proj.weight"][4 * head, 0] = 1.0
        state[first + "self_attn.o_proj.weight"][1 + head, 4 * head] = 2.0  # half of attention goes to the cue
    if squares:  # relu(x) x + relu(-x) (-x)
        for name in ("gate_proj", "up_proj"):
            state[f"{first}mlp.{name}.weight"][:, 1] = torch.tensor([1.0, -1.0])
        state[first + "mlp.down_proj.weight"][3] = 1.0
    state[second + "mlp.gate_proj.weight"][0, 3 if squares else 1] = 1.0
    state[second + "mlp.up_proj.weight"][0, 2] = 1.0
    state[second + "mlp.down_proj.weight"][4, 0] = 10.0
    state["lm_head.weight"][7, 4] = 1.0
    model.load_state_dict(state)
    model.config.architectures = ["LlamaForCausalLM"]
    row = Contrast("q", (3, 5), (4, 5), {"cue": (0,), "policy": (1,)}, (7,), (8,))
    contrasts = Contrasts("cue", "A", "B", None, (row,) * 8)
    return routing_circuit(Lens(model, load_tokenizer(PAIRS / "llama" / "S")), contrasts, "before")


def test_a_decoy_has_the_larger_slope_and_is_refuted() -> None:
    """With the cue at 1 and -1, x^2 is the same on both sides, and M = 10 x^2 y goes from -10 to 10 with y alone.

    On the straight line x = y = t the slopes of x are 20 t^2, of mean 20/3, and those of y are half of that.
    """
    nodes = {node.name: node for node in on_paper((1.0, -1.0), squares=True).nodes}
    decoy, reader = nodes["L0.h0"], nodes["L0.h1"]
    assert (decoy.score.value, reader.score.value) == pytest.approx((2 / 3, 1 / 3), abs=1e-3)
    assert (decoy.patched.value, decoy.needed.value) == pytest.approx((0, 0), abs=1e-5)
    assert (reader.patched.value, reader.needed.value) == pytest.approx((1, 1), abs=1e-5)
    assert (decoy.used, reader.used) == (False, True)
    assert nodes["L0.mlp"].used is False
    assert nodes["L1.mlp"].used is True


def test_a_node_that_works_only_beside_another_is_not_refuted() -> None:
    """M = 10 x y from 0 to 10: neither head moves it alone in the corrupt run, and without either all is lost."""
    nodes = {node.name: node for node in on_paper((1.0, 0.0), squares=False).nodes}
    for name in ("L0.h0", "L0.h1"):
        assert (nodes[name].patched.value, nodes[name].needed.value) == pytest.approx((0, 1), abs=1e-5)
        assert nodes[name].used is True


@pytest.mark.parametrize(
    ("patched", "needed", "used"),
    [
        ((0.02, 0.3), (0.0, 0.0), True),
        ((0.0, 0.0), (-0.3, -0.02), True),  # it works against the contrast
        ((0.0, 0.004), (-0.004, 0.0), False),
        ((0.0, 0.02), (0.0, 0.0), None),
        ((0.0, 0.0), None, None),
    ],
)
def test_used_is_what_intervals_surely_say(
    patched: tuple[float, float], needed: tuple[float, float] | None, used: bool | None
) -> None:
    def of(ends: tuple[float, float] | None) -> Interval:
        return NOT_MEASURED if ends is None else Interval(value=sum(ends) / 2, low=ends[0], high=ends[1])

    node = CircuitNode(name="L0.h0", layer=0, score=NOT_MEASURED, patched=of(patched), needed=of(needed))
    assert node.used is used


def test_only_the_strongest_are_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FULL", module.Effort(verified=2))
    nodes = on_paper((1.0, -1.0), squares=True).nodes
    assert {node.name for node in nodes if node.patched.measured and node.needed.measured} == {"L0.h0", "L1.mlp"}
    assert {node.used for node in nodes if not node.patched.measured} == {None}


def test_a_record_from_before_nodes_were_patched_loads(record: CircuitRecord, tmp_path: Path) -> None:
    stored = json.loads(record.save(tmp_path / "circuit.json").read_text())
    for circuit in stored["circuits"]:
        for node in circuit["nodes"]:
            del node["patched"], node["needed"]
    (tmp_path / "old.json").write_text(json.dumps(stored))
    old = CircuitRecord.load(tmp_path / "old.json")
    assert {node.used for circuit in old.circuits for node in circuit.nodes} == {None}
    assert old.circuits[0].edges == record.circuits[0].edges
