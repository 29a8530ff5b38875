"""The score: sums by hand, thresholds that stay frozen, and the quick part of the ground from end to end."""

from __future__ import annotations

from pathlib import Path

import pytest
from truths import make_truth

from mixturelens.lab.proving import score, sums
from mixturelens.lab.proving.pairs import QUICK
from mixturelens.lab.proving.record import PairScore
from mixturelens.records import Provenance, with_versions
from mixturelens.routing.verdict import Changed
from mixturelens.types import InputError, Interval


def pair(truth: str, verdict: str, near: bool = False, **more) -> PairScore:
    number = Interval(value=0.5, low=0.4, high=0.6)
    values = {
        "provenance": with_versions(Provenance()),
        "pair": f"{truth}-{verdict}-{near}",
        "organism": "gpt2-token-2-0",
        "recipe": "resampled",
        "half": "open",
        "architecture": "gpt2",
        "announced": "token",
        "asked": "literal",
        "policies": 2,
        "seed": 0,
        "intended": truth,
        "truth": make_truth(truth),
        "near": near,
        "told": True,
        "verdict": verdict,
        "changed": Changed(selector=True, cue_reader=False, skill=False),
        "dormant_intact": True,
        "text_drifted": True,
        "reason": "because",
        "routing_share": number,
        "bits": dict.fromkeys(("routing", "conditioning", "skill", "specialist", "dormant"), number),
        "moved": number,
        "text": Interval(value=0.02, low=0.01, high=0.03),
        "seconds": 1.0,
    }
    return PairScore(**(values | more))


def test_a_confusion_matrix_by_hand():
    said = [
        pair("routing", "routing"),
        pair("routing", "both"),
        pair("neither", "specialist"),
        pair("neither", "inconclusive"),
        pair("both", "inconclusive", near=True),
        pair("both", "routing", near=True),
    ]
    found = sums._verdicts("behavioural", "open", [(p, p.verdict) for p in said])
    assert found.confusion == {"routing": {"routing": 1, "both": 1}, "neither": {"specialist": 1, "inconclusive": 1}}
    assert (found.pairs, found.near, found.near_ok) == (4, 2, 1)
    untold = sums._verdicts("behavioural", "open", [(pair("both", "routing", told=False), "routing")])
    assert (untold.pairs, untold.untold, untold.untold_ok) == (0, 1, 0)
    assert (found.false_alarms, found.nothing) == (1, 2)
    assert found.right.value == 0.25


def test_near_misses_may_be_inconclusive_and_others_may_not():
    assert not sums._wrong(pair("both", "inconclusive", near=True), "inconclusive")
    mistake = sums._mistake(pair("both", "inconclusive"), "behavioural", "inconclusive", "too few")
    assert mistake is not None
    assert mistake.reason == "too few"


def test_numbers_are_held_to_the_truth():
    wrong = pair("both", "both", bits=dict.fromkeys(sums.QUANTITIES[:5], Interval(value=0.9, low=0.8, high=1.0)))
    found = sums._numbers("open", "routing", [pair("both", "both"), wrong])
    assert (found.pairs, found.held.value) == (2, 0.5)
    assert sums._numbers("open", "text", [wrong]).held.value == 1.0
    nothing = pair("neither", "neither").model_copy(update={"truth": make_truth("neither", 0.5, moved=0.001)})
    assert sums._numbers("open", "routing_share", [pair("both", "both"), nothing]).pairs == 1
    erring = pair("both", "both").model_copy(update={"truth": make_truth("both", skill=True)})
    assert sums._numbers("open", "text", [erring]).pairs == 0  # what is said where S never errs


def test_what_changed_is_held_to_the_truth_part_by_part():
    unsaid = pair("both", "both", changed=Changed(selector=None, cue_reader=True, skill=False))
    found = sums._parts("open", "selector", [pair("both", "both"), unsaid])
    assert (found.pairs, found.right, found.unsaid) == (2, 1, 1)
    assert sums._parts("open", "cue_reader", [unsaid]).right == 0
    assert sums._parts("open", "text_drifted", [unsaid]).right == 1


@pytest.mark.parametrize(
    ("part", "truth", "expected"),
    [
        ("dormant_intact", make_truth(cell=0.017), True),
        ("dormant_intact", make_truth(cell=0.5), False),
        ("text_drifted", make_truth(text=0.006), True),
        ("text_drifted", make_truth(text=0.02), False),
        ("selector", make_truth(), False),
        ("cue_reader", make_truth(bits={"conditioning": 0.004}), True),
    ],
)
def test_near_misses_of_a_part_are_those_of_its_own_number(part: str, truth, expected: bool):
    assert sums.near_part(truth, part) is expected


def test_what_cannot_be_scored_is_said_and_the_rest_goes_on(tmp_path: Path):
    def fails(of, ground):
        raise InputError(f"{of}: nothing to find")

    file = tmp_path / "cells/verdict/x.json"
    score._step(fails, "x", file, tmp_path)
    assert not file.exists()
    assert "nothing to find" in file.with_suffix(".failed").read_text()
    score._step(lambda *_: pair("both", "both"), "x", file, tmp_path)
    assert file.exists()
    assert not file.with_suffix(".failed").exists()


def test_broken_patching_is_told_by_its_own_number():
    from mixturelens.lab.proving.judged import MethodScore
    from mixturelens.lab.proving.localise import INTACT
    from mixturelens.lab.proving.sabotage import broken_methods

    def found(method: str, auroc: float, iou: float) -> MethodScore:
        numbers = {"auroc": auroc, "top": auroc, "iou": iou, "decoys": 1.0, "both": 1.0}
        shown = {name: Interval(value=value, low=value, high=value) for name, value in numbers.items()}
        return MethodScore(method=method, contrast="cue", cut=0.1, organisms=6, seconds=1.0, **shown)  # type: ignore[arg-type]

    methods = [
        found(INTACT, 1.0, 1.0),
        found(f"{INTACT}, one layer off", 0.45, 0.1),
        found(f"{INTACT}, sides shuffled", 1.0, 0.9),
    ]
    assert [(each.name, each.caught) for each in broken_methods(methods)] == [
        ("one layer off", True),
        ("sides shuffled", False),
    ]
    assert not list(broken_methods([]))


def test_wilson_of_none_is_not_measured():
    assert not sums.wilson(0, 0).measured
    assert sums.wilson(20, 20).low == pytest.approx(0.839)


def test_thresholds_stay_as_they_were_when_the_other_half_was_opened(tmp_path: Path, monkeypatch):
    score._freeze(tmp_path)
    score._freeze(tmp_path)
    changed = score.DEFAULT_THRESHOLDS.model_copy(update={"routing": 0.8})
    monkeypatch.setattr(score, "DEFAULT_THRESHOLDS", changed)
    with pytest.raises(InputError, match="thresholds have changed"):
        score._freeze(tmp_path)


@pytest.mark.slow
def test_the_quick_ground_from_end_to_end(tmp_path: Path, monkeypatch):
    """Four pairs made, evaluated and judged; broken instruments caught; and a second run that measures nothing."""
    steps: list[tuple[str, int, int]] = []
    record = score.run_score(tmp_path, quick=True, progress=lambda *step: steps.append(step))
    assert record.done == record.cells == 4
    behavioural = [sums for sums in record.verdicts if sums.instrument == "behavioural"]
    assert [sums.right.value for sums in behavioural] == [1.0, 1.0]
    truths = {word for sums in behavioural for word in sums.confusion}
    assert truths == {"routing", "specialist", "both", "neither"}
    assert all(numbers.held.value == 1.0 for numbers in record.numbers)
    assert [each.caught for each in record.broken] == [True, True, True]
    assert steps[-1][1:] == (2, 2)
    monkeypatch.setitem(score.WORK, "verdict", lambda *_: pytest.fail("scored again"))
    assert sums.sum_up(tmp_path, QUICK, ()).verdicts == record.verdicts
