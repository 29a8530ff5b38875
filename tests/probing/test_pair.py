"""The whole instrument on stored pairs: what it says, and what it says it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixturelens.behaviour.record import behaviour_record
from mixturelens.models import open_pair
from mixturelens.probing.pair import least_used, probing_record
from mixturelens.probing.record import ErasedSite, ProbingRecord
from mixturelens.suite import load_suite
from mixturelens.types import Interval, Site


@pytest.fixture(scope="module")
def routing() -> ProbingRecord:
    folder = Path(__file__).parents[1] / "pairs" / "llama"
    suite = load_suite(folder)
    behaviour = behaviour_record(open_pair(folder / "S", folder / "R-routing", suite))
    reader = (Site(layer=0, component="z", head=0, position="policy"),)
    return probing_record(open_pair(folder / "S", folder / "R-routing", suite), behaviour, reader=reader)


def test_erasing_the_cue_at_the_tag_takes_the_difference_between_cues_away(routing: ProbingRecord) -> None:
    assert routing.used is not None
    assert routing.used.left.below(0.1)
    assert min(routing.used.random) > 0.9
    assert routing.unused is not None
    assert routing.unused.left.above(0.9)
    assert routing.unused.readable.above(0.95)


def test_the_subspace_of_the_cue_beats_both_nulls_on_both_checkpoints(routing: ProbingRecord) -> None:
    (cue,) = routing.subspaces
    for side in ("before", "after"):
        assert cue.accuracy[side].above(0.9)
        assert (cue.margin[side].low or 0.0) > 0


def test_a_suite_without_hints_has_no_selector_to_read(routing: ProbingRecord) -> None:
    assert routing.readout("hint") is None
    assert not routing.shifts
    assert routing.policies == ("a", "b")


def test_it_round_trips(routing: ProbingRecord, tmp_path: Path) -> None:
    assert ProbingRecord.load(routing.save(tmp_path / "probing.json")) == routing


def test_without_a_reader_the_rest_is_measured_and_the_reason_said() -> None:
    folder = Path(__file__).parents[1] / "pairs" / "gpt2"
    suite = load_suite(folder)
    behaviour = behaviour_record(open_pair(folder / "S", folder / "R-conditioning", suite))
    found = probing_record(
        open_pair(folder / "S", folder / "R-conditioning", suite), behaviour, no_reader="none was found"
    )
    assert found.used is None
    assert any("cue" in reason for reason in found.missing)
    assert found.readout("behaviour") is not None


def test_least_used_wants_to_be_sure() -> None:
    def site(layer: int, left: Interval, read: float) -> ErasedSite:
        where = Site(layer=layer, component="resid_post", position="last")
        return ErasedSite(site=where, readable=Interval(value=read, low=read, high=read), left=left, random=())

    doubtful = site(0, Interval(value=0.99, low=0.5, high=1.0), 1.0)
    sure = site(1, Interval(value=0.98, low=0.97, high=1.0), 0.97)
    better = site(2, Interval(value=0.98, low=0.97, high=1.0), 0.99)
    assert least_used([doubtful]) is None
    assert least_used([doubtful, sure, better]) == better
