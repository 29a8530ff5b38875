"""Arms and transfer: every seed is drawn, under its own name, at its own number."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixturelens import figures
from mixturelens.behaviour.trajectory import Trajectory
from mixturelens.lab.figures.arms import arms
from mixturelens.routing.repair import RepairRecord
from mixturelens.routing.verdict import VerdictRecord
from mixturelens.stats import over_seeds

REFERENCE = Path(__file__).parents[3] / "artifacts" / "reference" / "records"


def test_arms_show_every_seed_and_the_mean_with_its_interval() -> None:
    values = {"none": [0.1, 0.3], "some": [0.8, 0.8]}
    figure = arms({"trait": {arm: (v, over_seeds(v)) for arm, v in values.items()}})
    seeds, means = figure.data
    assert list(seeds.y) == [0.1, 0.3, 0.8, 0.8]
    assert list(means.y) == pytest.approx([0.2, 0.8])
    assert means.error_y.array[0] == pytest.approx(12.7062 * 0.1, rel=1e-4)  # t of one degree of freedom
    assert means.error_y.array[1] == 0
    assert list(figure.layout.yaxis.range) == [-0.05, 1.05]


def test_transfer_shows_what_was_lost_what_is_still_there_and_what_was_repaired() -> None:
    pairs = [
        (name, VerdictRecord.load(folder / "verdict.json"), RepairRecord.load(folder / "repair.json"))
        for name, folder in (("seed 0", REFERENCE / "sft--rl-A"), ("seed 0", REFERENCE / "sft--rl-B"))
    ]
    figure = figures.transfer(pairs)
    assert len(figure.data) == 2
    for drawn, (_, verdict, repair) in zip(figure.data, pairs, strict=True):
        trained, harmed = (verdict.per_cue[cue].after for cue in (repair.trained_cue, repair.harmed_cue))
        assert trained is not None
        assert harmed is not None
        by_kind = {each.kind: each.accuracy[repair.harmed_cue].value for each in repair.repairs}
        silent = max(value or 0 for value in harmed.accuracy.values())
        expected = [trained.overall, harmed.overall, silent, by_kind["interchange"], by_kind.get("reroute")]
        assert list(drawn.y)[:4] == pytest.approx(expected[:4], abs=1e-6)
        assert drawn.y[4] == expected[4]


def test_the_table_of_transfer_has_a_line_for_every_pair() -> None:
    folder = REFERENCE / "sft--rl-A"
    pair = ("seed 0", VerdictRecord.load(folder / "verdict.json"), RepairRecord.load(folder / "repair.json"))
    head, rule, line = (text.split(" | ") for text in figures.transfer_table([pair]).splitlines())
    assert len(head) == len(rule) == len(line) == 9
    assert line[0] == "| seed 0, A"
    assert line[4].startswith(f"{pair[1].verdict}, {pair[1].routing_share.value:.3f}")


def test_accuracy_along_rl_ends_in_the_best_repair() -> None:
    record = RepairRecord.load(REFERENCE / "sft--rl-A" / "repair.json")
    run = Trajectory.load(REFERENCE.parent / "trajectory" / "rl-A.json")
    figure = figures.accuracy_along_rl(run, "A", record)
    best = record.best
    assert best is not None
    assert best.gap_closed.known == max(each.gap_closed.known for each in record.repairs if each.gap_closed.measured)
    drawn = {trace.name: trace.y for trace in figure.data if "repaired" in trace.name}
    assert drawn == {f"cue {cue}, repaired ({best.kind})": (best.accuracy[cue].value,) for cue in "AB"}
    assert all(trace.x[0] > run.steps for trace in figure.data if "repaired" in trace.name)
