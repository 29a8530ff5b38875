"""Effects of units are patches: of everything, of one neuron, of one direction by hand; of nothing, exactly nothing."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mixturelens.contrasts import Contrasts, checkpoint_contrasts, cue_contrasts
from mixturelens.features import effects
from mixturelens.features.dictionary import Dictionary
from mixturelens.features.effects import Scene, joint_effects, make_scene, site_effects, unit_effects
from mixturelens.hooks.batches import sides
from mixturelens.hooks.engine import Engine
from mixturelens.hooks.lens import Lens, load_lens
from mixturelens.patching.sweep import patch
from mixturelens.stats import resample_counts
from mixturelens.suite import load_suite
from mixturelens.types import InputError, RunError, Site

PAIRS = Path(__file__).parents[1] / "pairs"
every_shape = pytest.mark.parametrize("shape", ["llama", "gpt2", "gpt_neox", "qwen2"])
EXACT = {"atol": 2e-5, "rtol": 1e-5}


@functools.cache
def setting(shape: str) -> tuple[Lens, Contrasts]:
    folder = PAIRS / shape
    lens = load_lens(folder / "S")
    return lens, cue_contrasts(load_suite(folder), lens.tokenizer, "a", ("A", "B")).first(6)


def linear(read: Tensor, write: Tensor | None = None, offset: float = 0.0) -> Dictionary:
    number = len(read)
    write = read if write is None else write
    return Dictionary(read, torch.full((number,), offset), torch.full((number,), -torch.inf), write)


def sparse(size: int, number: int, seed: int = 0) -> Dictionary:
    """Features that are off on many tokens, as those of an SAE are."""
    generator = torch.Generator().manual_seed(seed)
    read, write = (torch.randn(number, size, generator=generator) / size**0.5 for _ in range(2))
    return Dictionary(read, torch.full((number,), 0.2), torch.rand(number, generator=generator), write)


def run_with(scene: Scene, values: Tensor, side: str = "corrupt") -> np.ndarray:
    """One full forward with other values at the scene's site."""
    run = getattr(scene, side)
    lens, site = run.engine.lens, scene.site
    mask = effects.Columns(run.engine.base, run.spans).mask(site.position)

    def edit(activation: Tensor) -> Tensor:
        activation[mask] = values.flatten(0, 1).to(activation.dtype)
        return activation

    with torch.no_grad():
        logits = lens.run(run.engine.base, [(lens.point(site.layer, site.component), edit)])[:, -1]
    return run.metric(logits).double().numpy()


@every_shape
@pytest.mark.parametrize("position", ["cue", "question", "policy"])
def test_all_units_of_a_complete_basis_together_are_the_site(shape: str, position: str):
    lens, contrasts = setting(shape)
    site = Site(layer=0, component="resid_post", position=position)
    scene = make_scene(lens, contrasts, site)
    basis = linear(torch.linalg.qr(torch.randn(lens.d_model, lens.d_model))[0], offset=0.3)
    expected = patch(lens, contrasts, [site])
    together = joint_effects(scene, basis, [range(lens.d_model), []])
    np.testing.assert_allclose(scene.base + together[0], expected.patched[0], **EXACT)
    np.testing.assert_allclose(together[1], 0, atol=2e-5)
    np.testing.assert_allclose(scene.base + site_effects(scene), expected.patched[0], **EXACT)
    np.testing.assert_allclose(scene.base, expected.base, **EXACT)
    np.testing.assert_allclose(scene.goal, expected.goal, **EXACT)


@every_shape
@pytest.mark.parametrize("place", [(0, "resid_post", "question"), (1, "resid_pre", "policy"), (0, "neurons", "cue")])
def test_every_unit_is_what_a_full_forward_says(shape: str, place):
    """With features that are off on some rows: what was skipped is what running it would have given."""
    lens, contrasts = setting(shape)
    layer, component, position = place
    scene = make_scene(lens, contrasts.first(3), Site(layer=layer, component=component, position=position))
    units, to = sparse(scene.corrupt.values.shape[-1], 3), torch.arange(3.0) / 4
    clean, corrupt = units.encode(scene.clean.values), units.encode(scene.corrupt.values)
    found = {do: unit_effects(scene, units, do, to) for do in ("patch", "clamp", "ablate")}
    for unit in range(3):

        def moved(side: str, change: Tensor, unit: int = unit) -> np.ndarray:
            run = getattr(scene, side)
            values = run.values + change[..., unit, None] * units.write[unit]
            return run_with(scene, values, side) - run.own.double().numpy()

        np.testing.assert_allclose(found["patch"][unit], moved("corrupt", clean - corrupt), atol=5e-5)
        np.testing.assert_allclose(found["clamp"][unit], moved("corrupt", to - corrupt), atol=5e-5)
        lost = moved("corrupt", -corrupt) - moved("clean", -clean)
        np.testing.assert_allclose(found["ablate"][unit], lost, atol=5e-5)
    np.testing.assert_allclose(joint_effects(scene, units, [[0], [1], [2]]), found["patch"], atol=5e-5)


def test_a_unit_that_does_not_change_moves_exactly_nothing_and_is_not_run(monkeypatch):
    lens, contrasts = setting("llama")
    scene = make_scene(lens, contrasts, Site(layer=1, component="resid_pre", position="policy"))
    x = torch.cat([scene.clean.values, scene.corrupt.values]).flatten(0, 1)
    read = torch.eye(lens.d_model)[:1]
    off = Dictionary(read, torch.zeros(1), (x @ read[0]).max()[None] + 1, read)
    ran = []
    whole = Engine.logits_with
    monkeypatch.setattr(Engine, "logits_with", lambda *a: ran.append(len(a[-1])) or whole(*a))
    for do in ("patch", "ablate"):
        assert not unit_effects(scene, off, do).any()
    assert not ran
    # a feature that fires twice is run where it does
    few = Dictionary(read, torch.zeros(1), (x @ read[0]).sort().values[-3][None], read)
    changes = (few.encode(scene.clean.values) != few.encode(scene.corrupt.values)).any(1).sum()
    unit_effects(scene, few)
    assert 0 < sum(ran) == int(changes) <= 2


@every_shape
def test_a_neuron_is_the_sweep_at_that_neuron(shape: str):
    lens, contrasts = setting(shape)
    both = sides(lens, contrasts)
    for position in ("question", "policy"):
        for layer in range(lens.layers):
            scene = make_scene(lens, contrasts, Site(layer=layer, component="neurons", position=position))
            neurons = [0, 7, lens.d_mlp - 1]
            sites = [scene.site.model_copy(update={"neuron": n}) for n in neurons]
            source, _ = lens.capture(both.clean, [(layer, "neurons")])
            swept = Engine(lens, both.corrupt, both.corrupt_spans).sweep(sites, source, both.metric).numpy()
            found = unit_effects(scene, linear(torch.eye(lens.d_mlp)[neurons]))
            np.testing.assert_allclose(scene.base + found, swept, atol=1e-5)


@every_shape
def test_a_direction_that_is_all_the_difference_is_the_patch_of_the_site(shape: str):
    """One dimension by hand: where clean and corrupt differ along a single vector, its unit is the whole site."""
    lens, contrasts = setting(shape)
    row = contrasts.first(1)
    site = Site(layer=0, component="resid_post", position="policy")
    scene = make_scene(lens, row, site)
    apart = (scene.clean.values - scene.corrupt.values)[0, 0]
    along = apart / apart.norm()
    other = torch.linalg.qr(torch.stack([along, torch.randn(lens.d_model)]).T)[0].T[1]
    found = unit_effects(scene, linear(torch.stack([along, other])))
    expected = patch(lens, row, [site])
    np.testing.assert_allclose(found[0], expected.patched[0] - expected.base, **EXACT)
    np.testing.assert_allclose(found[1], 0, atol=1e-4)  # it lies across the difference
    np.testing.assert_allclose(scene.shares(found, resample_counts(1, 0, draws=1))[0], [expected.effects(
        resample_counts(1, 0, draws=1))[0, 0], 0], atol=1e-4)  # fmt: skip


@every_shape
def test_a_head_patched_set_and_ablated(shape: str):
    lens, contrasts = setting(shape)
    site = Site(layer=0, component="z", head=2, position="policy")
    scene = make_scene(lens, contrasts, site)
    expected = patch(lens, contrasts, [site])
    np.testing.assert_allclose(scene.base + site_effects(scene), expected.patched[0], **EXACT)
    basis, every = linear(torch.eye(lens.d_head)), [range(lens.d_head)]  # the units of a head, all at once
    rows = torch.arange(len(scene))
    np.testing.assert_allclose(joint_effects(scene, basis, every)[0], site_effects(scene), **EXACT)
    zeros = torch.zeros(lens.d_head)
    at_zero = site_effects(scene, "clamp", zeros)
    lost = at_zero - (scene.clean.with_values(torch.zeros_like(scene.clean.values), rows) - scene.clean.own).numpy()
    np.testing.assert_allclose(site_effects(scene, "ablate"), lost, **EXACT)


def test_parts_are_the_whole(monkeypatch):
    lens, contrasts = setting("llama")
    site = Site(layer=0, component="resid_post", position="question")
    units = sparse(lens.d_model, 12)
    whole = unit_effects(make_scene(lens, contrasts, site), units)
    scene = make_scene(lens, contrasts, site)
    scene.corrupt.__dict__["most"] = 5
    np.testing.assert_allclose(unit_effects(scene, units), whole, atol=1e-5)
    scene.corrupt.engine.memory = 1
    assert scene.corrupt.at(site).most == 1


def test_clean_activations_of_another_checkpoint():
    lens, _ = setting("llama")
    before = load_lens(PAIRS / "llama" / "R-routing")
    same = checkpoint_contrasts(load_suite(PAIRS / "llama"), lens.tokenizer, "B", "a", "b").first(6)
    site = Site(layer=1, component="resid_pre", position="last")
    scene = make_scene(lens, same, site, before)
    expected = patch(lens, same, [site], before=before)
    np.testing.assert_allclose(scene.goal, expected.goal, **EXACT)
    np.testing.assert_allclose(scene.base + site_effects(scene), expected.patched[0], **EXACT)
    basis = linear(torch.eye(lens.d_model))
    # ablation takes the unit away in both checkpoints
    found = unit_effects(scene, basis, "ablate")
    clean, corrupt = scene.clean.values.clone(), scene.corrupt.values.clone()
    clean[..., 3], corrupt[..., 3] = 0, 0
    left = run_with(scene, clean, "clean") - run_with(scene, corrupt)
    np.testing.assert_allclose(found[3], (scene.goal - scene.base) - left, atol=5e-5)


def test_shares_are_ratios_of_means_and_null_without_a_contrast():
    lens, contrasts = setting("llama")
    scene = make_scene(lens, contrasts, Site(layer=0, component="resid_post", position="policy"))
    counts = np.array([[1] * 6, [6, 0, 0, 0, 0, 0]])
    moved = np.stack([scene.goal - scene.base, np.zeros(6), np.arange(6.0)])
    found = scene.shares(moved, counts)
    np.testing.assert_allclose(found[:, :2], [[1, 0], [1, 0]])
    assert found[0, 2] == pytest.approx(15 / (scene.goal - scene.base).sum())
    alike = Scene(scene.corrupt, scene.corrupt)
    assert np.isnan(alike.shares(moved, counts)).all()


def test_what_is_no_unit_is_refused(monkeypatch):
    lens, contrasts = setting("llama")
    scene = make_scene(lens, contrasts, Site(layer=0, component="resid_post", position="policy"))
    with pytest.raises(InputError, match=r"units read 7 numbers, where there are 32"):
        unit_effects(scene, linear(torch.eye(7)))
    units = linear(torch.eye(32)[:2])
    with pytest.raises(InputError, match="a clamp needs a number for each of the 2 units"):
        unit_effects(scene, units, "clamp")
    with pytest.raises(InputError, match="a clamp needs a number for each of the 2 units"):
        unit_effects(scene, units, "clamp", torch.zeros(3))
    with pytest.raises(InputError, match="a clamp needs a vector of 32 numbers"):
        site_effects(scene, "clamp", torch.zeros(3))
    for bad in (
        Site(layer=0, component="pattern", head=1, position="policy"),
        Site(layer=0, component="z", position="policy"),
        Site(layer=0, component="neurons", neuron=3, position="policy"),
    ):
        with pytest.raises(InputError, match="units read the residual stream"):
            scene.at(bad)
    with pytest.raises(InputError, match="layers"):
        scene.at(Site(layer=9, component="resid_pre", position="policy"))
    with pytest.raises(InputError, match="no span 'tail'"):
        scene.at(Site(layer=0, component="resid_pre", position="tail"))
    row = contrasts.rows[0]
    wide = type(row)("wide", row.clean, row.corrupt, {**row.spans, "question": row.spans["question"][:1]}, row.target,
                     row.foil)  # fmt: skip
    with pytest.raises(InputError, match="differ in their number of tokens"):
        make_scene(lens, Contrasts("cue", "A", "B", "a", (row, wide)),
                   Site(layer=0, component="resid_pre", position="question"))  # fmt: skip
    longer = type(row)("longer", row.clean, (7, *row.corrupt), row.spans, row.target, row.foil)
    with pytest.raises(InputError, match="name a span"):
        make_scene(lens, Contrasts("cue", "A", "B", "a", (longer,)), Site(layer=0, component="resid_pre", position=2))

    def cannot(*_: object) -> None:
        raise RunError("no exact engine")

    monkeypatch.setattr(effects, "Engine", cannot)
    with pytest.raises(InputError, match="need the patch engine: no exact engine"):
        make_scene(lens, contrasts, Site(layer=0, component="resid_pre", position="policy"))
