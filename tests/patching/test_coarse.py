"""From coarse to fine: what is found is what patching everything finds, at a part of the patches."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from mixturelens.contrasts import Contrasts, checkpoint_contrasts, cue_contrasts
from mixturelens.hooks.batches import sides
from mixturelens.hooks.lens import Lens, load_lens
from mixturelens.models import Budget, Pair
from mixturelens.patching import coarse as room
from mixturelens.patching import sweep
from mixturelens.patching.coarse import coarse, coarse_tokens, outputs, patched_tokens
from mixturelens.patching.pair import _plan, shared_spans
from mixturelens.patching.slopes import strengths
from mixturelens.patching.sweep import Bench, Direction, find_reader, head_sites, jointly, patch
from mixturelens.stats import resample_counts
from mixturelens.suite import load_suite
from mixturelens.types import RunError, Site

PAIRS = Path(__file__).parents[1] / "pairs"
REFERENCE = Path(__file__).parents[2] / "artifacts" / "reference"
SHAPES = ("llama", "gpt2", "gpt_neox", "qwen2")


@functools.cache
def setting(shape: str, number: int = 12) -> tuple[Lens, Contrasts]:
    folder = PAIRS / shape
    lens = load_lens(folder / "R-routing")
    return lens, cue_contrasts(load_suite(folder), lens.tokenizer, "a", ("A", "B")).first(number)


@pytest.mark.parametrize("shape", SHAPES)
def test_slopes_are_those_of_the_patch(shape: str) -> None:
    """A small step towards the clean output moves the metric by the slope: checked by differences."""
    lens, contrasts = setting(shape)
    on = sides(lens, contrasts)
    site = Site(layer=0, component="z", head=1, position="policy")
    clean, _ = lens.capture(on.clean, [(0, "z")])
    column = on.corrupt.ids.shape[1] - 1
    step = 1e-2

    def moved(share: float) -> torch.Tensor:
        def edit(activation: torch.Tensor) -> torch.Tensor:
            activation[:, column, 1] += share * (clean[0, "z"][:, column, 1] - activation[:, column, 1])
            return activation

        return on.metric(lens.run(on.corrupt, [(lens.point(0, "z"), edit)])[:, -1]).double()

    with torch.no_grad():
        expected = float(((moved(step) - moved(-step)) / (2 * step)).mean().abs())
    found = float(strengths(lens, on, [site])[0])
    assert found > 0.95 * expected  # dropped gradients, and those of the clean run, may say more


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_in_the_last_layer_are_exact_to_first_order_and_others_have_signs_dropped(shape: str) -> None:
    lens, contrasts = setting(shape)
    found = strengths(lens, sides(lens, contrasts), outputs(lens.layers, lens.heads, ["cue", "policy"]))
    assert bool((found >= 0).all())
    assert bool(found.isfinite().all())
    assert float(found.max()) > 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_coarse_finds_the_reader_that_patching_everything_finds(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lens, contrasts = setting(shape, 40)
    monkeypatch.setattr(room, "LEAST", 20)
    monkeypatch.setattr(room, "SAMPLED", 4)
    spans = shared_spans(contrasts)
    bench = Bench(lens, contrasts, spans)
    found, unseen = coarse(bench, spans)
    every = find_reader(lens, contrasts, "policy")
    some = find_reader(lens, contrasts, "policy", searched=(bench, found))
    assert set(some.heads) == set(every.heads)
    every_output = len(outputs(lens.layers, lens.heads, spans))
    assert len([s for s in found.sites if s.component != "resid_pre"]) == every_output - unseen.sites + 4
    assert unseen.sites > 10
    assert unseen.sampled == 4
    assert 0 < unseen.share < 0.6


def test_coarse_effects_are_those_of_the_patch() -> None:
    lens, contrasts = setting("llama")
    found, unseen = coarse(Bench(lens, contrasts, ["cue", "last", "policy"]), ["cue", "last", "policy"])
    exact = patch(lens, contrasts, found.sites)
    np.testing.assert_allclose(found.patched, exact.patched, atol=1e-5)
    np.testing.assert_allclose(found.base, exact.base, atol=1e-5)
    assert (unseen.sites, unseen.sampled) == (0, 0) or unseen.sampled <= unseen.sites


def test_what_was_passed_over_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound holds for all that was passed over, where all of it is patched."""
    lens, contrasts = setting("llama", 40)
    monkeypatch.setattr(room, "LEAST", 8)
    monkeypatch.setattr(room, "SAMPLED", 8)
    positions = shared_spans(contrasts)
    found, unseen = coarse(Bench(lens, contrasts, positions), positions)
    looked = set(found.sites)
    rest = [site for site in outputs(lens.layers, lens.heads, positions) if site not in looked]
    effects = np.abs(patch(lens, contrasts, rest).effects(resample_counts(len(contrasts.rows), 0, draws=1))[0])
    above = float((effects > unseen.largest).sum() / unseen.sites)
    assert above <= unseen.share
    assert effects.max() < 0.2  # slopes passed over nothing that matters


def test_the_stream_is_looked_at_closely_where_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    lens, contrasts = setting("llama")
    monkeypatch.setattr(room, "STEP", 2)
    found, _ = coarse(Bench(lens, contrasts, ["cue", "policy"]), ["cue", "policy"])
    layers = {
        position: sorted(s.layer for s in found.sites if (s.component, s.position) == ("resid_pre", position))
        for position in ("cue", "policy")
    }
    assert layers == {"cue": [0, 1], "policy": [0, 1]}  # the contrast leaves the one and arrives at the other
    monkeypatch.setattr(room, "MOVED", 2.0)
    found, _ = coarse(Bench(lens, contrasts, ["cue", "policy"]), ["cue", "policy"])
    assert {s.layer for s in found.sites if s.component == "resid_pre"} == {0}


def test_a_patch_costs_what_comes_after_it() -> None:
    _, contrasts = setting("llama")
    width, rows = len(contrasts.rows[0].clean), len(contrasts.rows)
    first = patched_tokens(4, contrasts, [Site(layer=0, component="resid_pre", position=0)])
    assert first == rows * width
    assert patched_tokens(4, contrasts, [Site(layer=2, component="z", head=0, position=width - 1)]) == rows / 2
    forward, back = coarse_tokens(30, 9, contrasts, ["last", "policy"])
    every = patched_tokens(30, contrasts, outputs(30, 9, ["last", "policy"]))
    assert forward > 0
    assert back > 0
    assert every > patched_tokens(30, contrasts, head_sites(setting("llama")[0], "policy"))


@pytest.mark.parametrize(("direction", "held"), [("denoise", 1 << 30), ("noise", 1 << 30), ("denoise", 20_000)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_bench_patches_what_patch_patches(
    shape: str, direction: Direction, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With both runs kept, some questions at a time, and of activations the last columns alone."""
    monkeypatch.setattr(sweep, "HELD", held)
    lens, contrasts = setting(shape, 6)
    positions = ["last", "policy"]
    bench = Bench(lens, contrasts, positions)
    assert (len(bench.parts) == 1) == (held > 1 << 20)
    stream = [Site(layer=n, component="resid_pre", position=p) for n in range(lens.layers) for p in positions]
    sites = [*stream, *outputs(lens.layers, lens.heads, positions)]
    for _ in range(2):
        found = bench.patch(sites, direction)
    exact = patch(lens, contrasts, sites, direction=direction)
    for name in ("base", "goal", "patched"):
        np.testing.assert_allclose(getattr(found, name), getattr(exact, name), atol=1e-4)
    groups = [sites[-1:], [s for s in sites if s.component == "z" and s.position == "policy"]]
    np.testing.assert_allclose(bench.jointly(groups).patched, jointly(lens, contrasts, groups).patched, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_bench_of_two_checkpoints(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lens, _ = setting(shape)
    folder = PAIRS / shape
    before, suite = load_lens(folder / "S"), load_suite(folder)
    contrasts = checkpoint_contrasts(suite, lens.tokenizer, "B", "b", "a")
    sites = outputs(lens.layers, lens.heads, ["last"])
    found = Bench(lens, contrasts, ["last"], before=before).patch(sites)
    exact = patch(lens, contrasts, sites, before=before)
    np.testing.assert_allclose(found.patched, exact.patched, atol=1e-4)

    def refuse(*_: object, **__: object) -> None:
        raise RunError("no exact engine")

    monkeypatch.setattr(sweep, "Engine", refuse)
    slow = Bench(lens, contrasts, ["last"], before=before).patch(sites)
    np.testing.assert_allclose(slow.patched, exact.patched, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_slopes_behind_kept_keys_are_those_of_whole_prompts(shape: str) -> None:
    """Sites in the last columns need only these; a site that begins at the start needs all of them."""
    lens, contrasts = setting(shape)
    on = sides(lens, contrasts)
    late = outputs(lens.layers, lens.heads, ["policy"])
    early = outputs(lens.layers, lens.heads, ["cue"])
    torch.testing.assert_close(
        strengths(lens, on, late), strengths(lens, on, [*late, *early])[: len(late)], atol=1e-4, rtol=1e-3
    )


def test_minutes_that_are_too_few_for_any_patching_are_said(pairs: Path) -> None:
    suite = load_suite(pairs / "llama")
    pair = Pair(pairs / "llama" / "S", pairs / "llama" / "R-routing", suite, budget=Budget(minutes=1e-9))
    missing: list[str] = []
    plan = _plan(pair, cue_contrasts(suite, pair.tokenizer, "a", ("A", "B"), "refuse"), False, True, missing)
    assert plan.questions < len(suite.neutral)
    assert missing[-1].startswith("--minutes 1e-09: patching takes ")
