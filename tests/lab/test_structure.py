"""The record of a schedule: on organisms that follow their cue, and on one that cannot see it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixturelens.lab import runs
from mixturelens.lab.organism import Phase, Spec, load_spec
from mixturelens.lab.structure import StructureRecord, structure_record
from mixturelens.types import InputError

TINY = Path(__file__).parents[1] / "tiny.yaml"


def follows_cue(**changes: object) -> Spec:
    """SFT alone makes a model that answers under A and refuses under B; its phases are too gentle to change it."""
    spec = load_spec(
        TINY,
        policies={"v": {"weight": 1.0, "announce": ["[v]"], "table": {"A": "answer", "B": "refuse"}}},
        hints=None,
        objectives={"B": "refuse"},
        questions={"family": "sequence", "operations": ["copy"], "symbols": 8, "length": 2},
        split={"rl": 8, "evaluation": 24},
        phases={"A-1": {"cues": ["A"], "steps": 1}, "B-1": {"cues": ["B"], "steps": 1}},
        **changes,
    )
    return spec.model_copy(update={"rl": spec.rl.model_copy(update={"cues": (), "learning_rate": 1e-7})})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("structure") / "run"
    runs.train(follows_cue(), out)
    return out


def test_a_model_that_follows_its_cue_has_a_router(run: Path) -> None:
    record = runs.structure(run)
    assert record.structure == "conditional"
    assert record.pairs[0].shares.conditionality.above(0.8)
    assert record.retention["A"].above(0.9)
    assert record.retention["B"].above(0.9)
    assert not record.fragility.measured  # every cue is trained on
    found = record.pairs[0].mechanism
    assert found is not None
    assert found.decoded.above(0.6)
    assert found.shuffled < 0.6
    assert len(found.heads) == 1  # of two: another is left to compare with
    assert (found.carried.value or 0) > (found.rival.value or 0)
    assert found.ablated.measured
    assert found.overlap.value is not None
    assert 0 <= found.overlap.value < 1  # refusing takes fewer parts than answering
    assert [point.name for point in record.checkpoints] == ["sft", "A-1", "B-1"]
    assert record.checkpoints[1].trained == ("A",)
    assert StructureRecord.load(run / "records" / "sft--B-1" / "structure.json") == record
    assert runs.structure(run) == record


def test_a_cue_that_is_not_shown_is_neither_decoded_nor_routed(run: Path, tmp_path: Path) -> None:
    """The null: the same weights, asked on prompts that show the word of no cue."""
    spec = runs.load_run(run)
    blind = spec.model_copy(update={"tells": 0.0, "unclear": "<B>"})
    record = structure_record(blind, run)
    found = record.pairs[0].mechanism
    assert found is not None
    assert found.decoded.value == 0.5
    assert found.heads == ()
    assert not found.carried.measured
    assert found.separable is None
    assert record.structure == "fixed"


def test_where_objectives_agree_no_router_is_asked_for(run: Path) -> None:
    record = structure_record(runs.load_run(run).model_copy(update={"objectives": {}}), run)
    assert record.pairs[0].mechanism is None
    assert record.missing == ("mechanism of A and B: their objectives differ on 0 questions",)


def test_a_spec_without_a_schedule_of_two_regimes_is_refused(run: Path) -> None:
    spec = runs.load_run(run)
    with pytest.raises(InputError, match="has no `phases`: there is no schedule to judge"):
        structure_record(spec.model_copy(update={"phases": {}}), run)
    alone = {"A-1": Phase(cues=("A",), steps=1)}
    with pytest.raises(InputError, match="training is on 1 cue"):
        structure_record(spec.model_copy(update={"phases": alone}), run)
