"""Routing circuits: what the record holds, and how circuits of two checkpoints are compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixturelens.behaviour.record import behaviour_record
from mixturelens.contrasts import cue_contrasts
from mixturelens.hooks.lens import load_lens
from mixturelens.routing.circuit import CircuitRecord, circuit_record, routing_circuit
from mixturelens.suite import load_suite

PAIRS = Path(__file__).resolve().parents[1] / "pairs"


@pytest.fixture(scope="module")
def record() -> CircuitRecord:
    folder = PAIRS / "llama"
    suite = load_suite(folder)
    measured = behaviour_record(folder / "S", folder / "R-routing", suite)
    also = {"again": folder / "S", "skill": folder / "R-skill"}
    return circuit_record(folder / "S", folder / "R-routing", suite, measured, also=also)


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
    contrasts = cue_contrasts(load_suite(folder), lens.tokenizer, "a", "A", "B")
    assert routing_circuit(lens, contrasts, "after") == record.circuits[1]


def test_it_round_trips(record: CircuitRecord, tmp_path: Path) -> None:
    assert CircuitRecord.load(record.save(tmp_path / "circuit.json")) == record
