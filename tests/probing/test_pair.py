"""The whole instrument on stored pairs: what it says, and what it says it cannot."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hollow import hollow
from stored import behaviour_of

from mixturelens.contrasts import cue_contrasts
from mixturelens.hooks.lens import load_lens
from mixturelens.models import Budget, Pair
from mixturelens.probing import erase, pair, readouts
from mixturelens.probing.erase import Erasing
from mixturelens.probing.pair import least_used, probing_record, scan
from mixturelens.probing.plan import ProbingPlan, make_plan
from mixturelens.probing.readouts import sites_of, to_probe
from mixturelens.probing.record import ErasedSite, ProbingRecord
from mixturelens.suite import load_suite
from mixturelens.types import InputError, Interval, Site


@pytest.fixture(scope="module", autouse=True)
def _fewer_nulls() -> Iterator[None]:
    """Random directions, shuffles and draws, as few as show that they are there."""
    with pytest.MonkeyPatch.context() as fewer:
        for module, sizes in {
            erase: {"RANDOM": 4},
            pair: {"RANDOM": 4},
            readouts: {"SHUFFLES": 1, "DRAWS": 100},
        }.items():
            for name, number in sizes.items():
                fewer.setattr(module, name, number)
        yield


@pytest.fixture(scope="module")
def routing() -> ProbingRecord:
    folder = Path(__file__).parents[1] / "pairs" / "llama"
    suite = load_suite(folder)
    behaviour = behaviour_of("llama", "R-routing")
    reader = (Site(layer=0, component="z", head=0, position="policy"),)
    return probing_record(Pair(folder / "S", folder / "R-routing", suite), behaviour, reader)


def test_erasing_the_cue_at_the_tag_takes_the_difference_between_cues_away(routing: ProbingRecord) -> None:
    assert routing.used is not None
    assert routing.used.left.below(0.1)
    assert min(routing.used.random) > 0.9
    assert routing.unused is not None
    assert routing.unused.left.above(0.9)
    assert routing.unused.readable.value > 0.99
    assert routing.unused.readable.above(0.65)  # ten questions, all told apart, show no more than 0.69


def test_the_subspace_of_the_cue_beats_both_nulls_on_both_checkpoints(routing: ProbingRecord) -> None:
    (cue,) = routing.subspaces
    for side in ("before", "after"):
        assert cue.accuracy[side].value > 0.97
        assert cue.accuracy[side].above(0.65)
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
    behaviour = behaviour_of("gpt2", "R-conditioning")
    unknown = InputError("none was found")
    found = probing_record(Pair(folder / "S", folder / "R-conditioning", suite), behaviour, unknown)
    assert found.used is None
    assert any("cue" in reason for reason in found.missing)
    assert found.readout("behaviour") is not None


def test_least_used_wants_to_be_sure() -> None:
    erased = Interval(value=0.01, low=-0.02, high=0.05)

    def site(layer: int, left: Interval, read: float, gap: Interval = erased) -> ErasedSite:
        where = Site(layer=layer, component="resid_post", position="last")
        return ErasedSite(site=where, readable=Interval(value=read, low=read, high=read), left=left, random=(), gap=gap)

    kept = Interval(value=0.98, low=0.97, high=1.0)
    doubtful = site(0, Interval(value=0.99, low=0.5, high=1.0), 1.0)
    sure, better = site(1, kept, 0.97), site(2, kept, 0.99)
    assert least_used([doubtful]) is None
    assert least_used([doubtful, sure, better]) == better
    # nothing follows where the cue is not erased, or may not be
    there = site(3, kept, 1.0, Interval(value=0.5, low=0.4, high=0.6))
    unsure = site(4, kept, 1.0, Interval(value=0.05, low=-0.1, high=0.2))
    unknown = site(5, kept, 1.0, Interval())
    assert [each.holds for each in (sure, there, unsure, unknown)] == [True, False, None, None]
    assert least_used([there, unsure, unknown]) is None
    assert least_used([there, unsure, unknown, sure]) == sure


# --- what it takes ----------------------------------------------------------------------------------------------------


def planned(tmp_path: Path, budget: Budget | None = None, **shape: int) -> ProbingPlan:
    """The plan of a pair that has a config and a tokenizer, and a hole for weights."""
    from transformers import LlamaConfig

    source = Path(__file__).parents[1] / "pairs" / "llama"
    for side in ("S", "R"):
        folder = tmp_path / side
        folder.mkdir()
        for file in (source / "S").iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, folder / file.name)
        old = LlamaConfig.from_pretrained(source / "S").to_dict()
        LlamaConfig(**{**old, **shape}).save_pretrained(folder)
        hollow(folder)
    suite = load_suite(source)
    opened = Pair(tmp_path / "S", tmp_path / "R", suite, budget=budget or Budget())
    return make_plan(opened, *to_probe(suite, opened.tokenizer))


def test_eight_billion_parameters_are_estimated_without_weights(tmp_path: Path) -> None:
    plan = planned(
        tmp_path,
        num_hidden_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=14336,
    )
    assert plan.estimate.memory > 2 * 6.9e9 * 4
    assert plan.estimate.seconds > 60
    assert not plan.missing


def test_with_fewer_minutes_fewer_questions_are_asked_and_that_is_said(tmp_path: Path) -> None:
    plan = planned(tmp_path, Budget(minutes=0.05), num_hidden_layers=24, hidden_size=1024, intermediate_size=4096)
    assert plan.missing
    assert "of" in plan.missing[0]
    assert plan.questions < len({row.id for row in load_suite(Path(__file__).parents[1] / "pairs" / "llama").prompts})


def test_too_little_memory_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "pairs" / "llama"
    suite = load_suite(folder)
    behaviour = behaviour_of("llama", "R-routing")
    narrow = Pair(folder / "S", folder / "R-routing", suite, budget=Budget(memory=0.01))
    with pytest.raises(InputError, match=r"probing needs .* GB, and --memory allows 0\.01"):
        probing_record(narrow, behaviour)


# --- erasing in a few layers ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_scan_of_some_layers_finds_what_a_scan_of_all_finds_and_says_what_it_left_out() -> None:
    folder = Path(__file__).parents[2] / "artifacts" / "reference"
    suite = load_suite(folder)
    lens = load_lens(folder / "checkpoints" / "rl-A")
    cue = cue_contrasts(suite, lens.tokenizer, "a", ("A", "B"), "refuse").first(20)
    prompts, _ = to_probe(suite, lens.tokenizer)
    where = sites_of(lens, prompts)
    sure = Interval(value=1.0, low=1.0, high=1.0)
    readable = {site: sure for site in where.every if site.position in (0, 7, 8)}
    erasing = Erasing(lens, cue)
    every, spent, unsaid = scan(erasing, readable, where, math.inf)
    assert (len(every), unsaid) == (len(readable), [])
    some, less, said = scan(erasing, readable, where, spent / 4)
    assert less <= spent / 4
    assert len(some) < len(every) / 2
    assert f"{len(some)} of the {len(readable)} sites" in said[0]
    stream = [each for each in every if each.site in where.stream]
    strongest = min(stream, key=lambda each: each.left.value or 0.0)
    assert min(each.left.value or 0.0 for each in some) == pytest.approx(strongest.left.value, abs=0.02)
    by_site = {each.site: each for each in every}
    for each in some:
        assert each.left.value == pytest.approx(by_site[each.site].left.value, abs=1e-4)
