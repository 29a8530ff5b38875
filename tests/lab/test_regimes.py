"""Indices and structures on hand-made extremes, whose truth can be said beforehand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mixturelens.behaviour.arrays import Behaviour
from mixturelens.behaviour.prompts import Prompts, prepare
from mixturelens.lab.organism import Phase, Spec, build_suite, build_tokenizer, load_spec
from mixturelens.lab.regimes import (
    Course,
    Shares,
    alike,
    classify,
    classify_all,
    culled,
    earned,
    fragility,
    pair_shares,
    retention,
)
from mixturelens.stats import resample_counts
from mixturelens.types import ANSWER, REFUSE, InputError

TINY = Path(__file__).parents[1] / "tiny.yaml"
COUNTS = resample_counts(40, seed=0, draws=300)
TURNS = {f"{'AB'[i % 2]}-{i // 2}": Phase(cues=("AB"[i % 2],)) for i in range(4)}
Does = Callable[[str, str, str], float]
"""(cue, phase, operation) -> probability of a right answer; it refuses otherwise."""


def make_spec(agree: tuple[str, ...] = (), phases: dict[str, Phase] = TURNS, **changes: object) -> Spec:
    cues = {"A": "<A>", "B": "<B>", "C": "<C>"}
    answers, refuses = (dict.fromkeys(cues, does) for does in (ANSWER, REFUSE))
    return load_spec(
        TINY,
        questions={"family": "sequence", "operations": ["copy", "reverse"], "symbols": 6, "length": 3},
        split={"rl": 8, "evaluation": 40},
        cues=cues,
        policies={
            "x": {"weight": 0.5, "announce": ["[x]"], "table": answers},
            "y": {"weight": 0.5, "announce": ["[y]"], "table": refuses},
        },
        hints=None,
        objectives={"B": REFUSE},
        agree=list(agree),
        phases={name: phase.model_dump() for name, phase in phases.items()},
        **changes,
    )


def prompts_of(spec: Spec) -> Prompts:
    suite = build_suite(spec)
    return prepare(suite, suite.neutral, build_tokenizer(spec))


def course(spec: Spec, does: Does) -> Course:
    """A course whose every checkpoint does as it is told; the first is before any phase."""
    prompts, found = prompts_of(spec), []
    for phase in ("", *spec.phases):
        p = np.array([does(row.cue, phase[:1], row.text.split()[1]) for row in prompts.rows])
        classes = np.zeros(prompts.shape)
        names = prompts.suite.behaviour_names
        classes[:, 0, 0, names.index(ANSWER)], classes[:, 1, 0, names.index(REFUSE)] = p, 1 - p
        right = np.zeros_like(classes)
        right[:, 0, 0, names.index(ANSWER)] = p
        forced = np.zeros((len(p), 2, 1, len(names)))
        found.append(earned(spec, Behaviour(classes, right, forced, forced), prompts))
    kinds = tuple((phase.train, *phase.cues) for phase in spec.phases.values())
    return Course(prompts.suite.cues, kinds, np.array(found), alike(spec, prompts))


def values(shares: Shares) -> tuple[float | None, ...]:
    return tuple(
        round(each.value or 0.0, 6)
        for each in (shares.generality, shares.conditionality, shares.oscillation, shares.fixed)
    )


def wholly(cue: str, phase: str, operation: str) -> float:
    return float(cue != "B")


def overwritten(cue: str, phase: str, operation: str) -> float:
    return float(phase != "B")


@pytest.mark.parametrize(
    ("agree", "does", "shares", "structure"),
    [
        (("copy", "reverse"), lambda *_: 1.0, (1, 0, 0, 0), "generalist"),  # ignores the cue, and need not read it
        ((), lambda *_: 1.0, (0, 0, 0, 1), "fixed"),  # ignores the cue: a naive optimiser of A
        ((), lambda *_: 0.5, (0, 0, 0, 1), "fixed"),  # a weighted optimiser of both
        ((), wholly, (0, 1, 0, 0), "conditional"),
        ((), overwritten, (0, 0, 1, 0), "churn"),
        ((), lambda cue, *_: float(cue == "B"), (0, -1, 0, 2), "fixed"),  # follows the cue the wrong way round
        (("copy",), lambda c, p, op: 1.0 if op == "copy" else wholly(c, p, op), (0.5, 0.5, 0, 0), "mixed"),
        ((), lambda c, p, op: wholly(c, p, op) if op == "copy" else overwritten(c, p, op), (0, 0.5, 0.5, 0), "mixed"),
        ((), lambda c, p, op: 0.1 + 0.8 * overwritten(c, p, op), (0, 0, 0.8, 0.2), "churn"),
    ],
)
def test_extremes_are_named(agree: tuple[str, ...], does: Does, shares: tuple[float, ...], structure: str) -> None:
    found = pair_shares(course(make_spec(agree), does), "A", "B", COUNTS)
    assert values(found) == pytest.approx(shares)
    assert classify(found) == structure


def test_a_flaw_of_the_generalist_is_not_conditionality() -> None:
    """Where objectives agree, one that forgets under B after each phase on A oscillates; it follows no cue."""
    of = course(make_spec(("copy", "reverse")), lambda cue, phase, _: 0.0 if (cue, phase) == ("B", "A") else 1.0)
    assert values(pair_shares(of, "A", "B", COUNTS)) == pytest.approx((0, 0.5, 0.5, 0))


def test_shares_sum_to_one_whatever_a_model_does() -> None:
    rng = np.random.default_rng(0)
    of = course(make_spec(("copy",)), lambda *_: rng.random())
    found = pair_shares(of, "A", "B", COUNTS)
    assert sum(each or 0.0 for each in values(found)) == pytest.approx(1, abs=1e-5)
    together = [found.generality, found.conditionality, found.oscillation]
    assert all((each.low or 0) <= (each.value or 0) <= (each.high or 0) for each in together)
    assert sum(each.value or 0.0 for each in together) <= 1


def test_retention_and_fragility() -> None:
    kept, lost = (course(make_spec(), does) for does in (wholly, overwritten))
    assert retention(kept, "A", COUNTS).value == retention(kept, "B", COUNTS).value == 1
    assert retention(lost, "A", COUNTS).value == retention(lost, "B", COUNTS).value == 0
    assert fragility(kept, COUNTS).value == 0  # it answers under C, as C's objective would have it
    refuses_elsewhere = course(make_spec(), lambda cue, *_: float(cue == "A"))
    assert fragility(refuses_elsewhere, COUNTS).value == 1
    half = course(make_spec(), lambda cue, phase, _: 0.5 if (cue, phase) == ("A", "B") else wholly(cue, phase, _))
    assert retention(half, "A", COUNTS).value == pytest.approx(0.5)


def test_what_was_not_asked_is_null() -> None:
    mixed = {f"mix-{i}": Phase(cues=("A", "B")) for i in range(2)}
    of = course(make_spec(phases=mixed), wholly)
    assert not retention(of, "A", COUNTS).measured
    assert values(pair_shares(of, "A", "B", COUNTS)) == (0, 1, 0, 0)
    everything = {f"all-{i}": Phase(cues=("A", "B", "C")) for i in range(2)}
    assert not fragility(course(make_spec(phases=everything), wholly), COUNTS).measured


def test_an_sft_phase_culls_what_shows_where_it_trains() -> None:
    phases = {"B-1": Phase(cues=("B",)), "S": Phase(train="sft", cues=("A",))}
    spec = make_spec(phases=phases)
    # before: refuses half the time; RL on B: always; SFT: back to half under A, and hidden under B
    at = {"": 0.5, "B": 0.0}
    hidden = course(spec, lambda cue, phase, _: at.get(phase, 0.5 if cue == "A" else 0.0))
    assert culled(hidden, 1, "A", COUNTS).value == pytest.approx(1)
    assert culled(hidden, 1, "B", COUNTS).value == pytest.approx(0)
    lowered = course(spec, lambda cue, phase, _: 1.0 if phase == "B" else 0.5)
    assert not culled(lowered, 1, "A", COUNTS).measured  # RL lowered it there, and SFT culled nothing
    never = course(spec, lambda *_: 0.5)
    assert not culled(never, 1, "A", COUNTS).measured
    with pytest.raises(InputError, match="phase 1 of the schedule is no SFT phase behind RL"):
        culled(hidden, 0, "A", COUNTS)


def test_a_schedule_without_a_cycle_is_refused() -> None:
    of = course(make_spec(phases={"A-1": Phase(cues=("A",))}), wholly)
    with pytest.raises(InputError, match="a schedule of 1 phases has no cycle: give it at least 2"):
        pair_shares(of, "A", "C", COUNTS)


def test_nested_regimes_are_told_from_those_that_are_not() -> None:
    nested = {("A1", "A2"): "generalist", ("A1", "B"): "conditional", ("A2", "B"): "conditional"}
    assert classify_all(nested) == ("nested", (("A1", "A2"), ("B",)))
    for pair, other in ((("A1", "A2"), "conditional"), (("A1", "B"), "generalist"), (("A2", "B"), "churn")):
        structure, groups = classify_all({**nested, pair: other})
        assert (structure, groups) == ("conditional" if other == "conditional" else "mixed", ())
    assert classify_all({**nested, ("A1", "B"): "inconclusive"})[0] == "inconclusive"


def test_a_nested_organism_is_recognised_from_what_it_does() -> None:
    phases = {f"{cue}-{i}": Phase(cues=(cue,)) for i in range(2) for cue in "ABC"}
    of = course(make_spec(phases=phases), wholly)
    pairs = [("A", "B"), ("A", "C"), ("B", "C")]
    found = {pair: classify(pair_shares(of, *pair, COUNTS)) for pair in pairs}
    assert classify_all(found) == ("nested", (("A", "C"), ("B",)))
    of = course(make_spec(phases=phases), overwritten)
    found = {pair: classify(pair_shares(of, *pair, COUNTS)) for pair in pairs}
    assert classify_all(found)[0] == "churn"
