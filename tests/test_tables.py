"""What tables on the terminal say below them and beside their numbers, of a reference run."""

from __future__ import annotations

from pathlib import Path

import pytest

import mixturelens as ml
from mixturelens.cli.tables import show_patching, show_repairs
from mixturelens.types import Interval

REFERENCE = Path(__file__).parents[1] / "artifacts/reference"
RECORDS = REFERENCE / "records/sft--rl-B"


@pytest.fixture(scope="module")
def pair() -> ml.Pair:
    checkpoints = REFERENCE / "checkpoints"
    return ml.Pair(checkpoints / "sft", checkpoints / "rl-B", REFERENCE / "suite.yaml", out=REFERENCE)


def test_heads_that_hardly_read_the_cue_are_said_to_with_what_carries_more(pair: ml.Pair, capsys) -> None:
    record = ml.PatchingRecord.load(RECORDS / "patching.json")
    circuit = ml.CircuitRecord.load(RECORDS / "circuit.json")
    show_patching([pair], [record], [circuit])
    assert "hardly a reader" not in capsys.readouterr().out
    first, *others = record.readers
    weak = first.model_copy(update={"effect": Interval(value=0.3, low=0.2, high=0.4)})
    unsure = others[0].model_copy(update={"effect": Interval(value=0.3, low=0.2, high=0.6)})
    show_patching([pair], [record.model_copy(update={"readers": (weak, unsure)})], [circuit])
    (said,) = (line for line in capsys.readouterr().out.splitlines() if "hardly a reader" in line)
    assert said == (
        "sft--rl-B: cue reader, before: hardly a reader: these heads carry 0.300 [0.200, 0.400] of the cue, and a "
        "reader carries 0.5 or more; the strongest at one place: attention 1.001 (L0.attn_out@8), MLP 0.998 "
        "(L0.mlp_out@8), and the stream 1.001 from L1.resid_pre@8 on"
    )


def test_a_repair_is_shown_with_what_it_costs(pair: ml.Pair, capsys) -> None:
    record = ml.RepairRecord.load(RECORDS / "repair.json")
    show_repairs([pair], [record])
    lines = capsys.readouterr().out.splitlines()
    (zero,) = (line for line in lines if " zero " in line)
    # the trained cue loses, by its own policy, put in place
    for words in ("-0.185 [-0.257, -0.125]", "b, B 0.997 -> 0.812"):
        assert words in zero
    (reroute,) = (line for line in lines if " reroute " in line)
    assert reroute.rstrip().endswith(" none")
