"""The sweep says what transformer-lens' own patching says, and choosing heads is judged on questions that did not."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from stored import behaviour_of
from transformer_lens import patching

from mixturelens.contrasts import Contrasts, cue_contrasts
from mixturelens.hooks.batches import sides
from mixturelens.hooks.engine import Engine
from mixturelens.hooks.lens import NAMES, Lens, lens_of, load_lens, tokens
from mixturelens.models import Pair
from mixturelens.patching import sweep
from mixturelens.patching.pair import patching_record
from mixturelens.patching.sweep import all_sites, find_reader, head_sites, jointly, patch
from mixturelens.stats import resample_counts
from mixturelens.suite import load_suite
from mixturelens.types import PER_HEAD, InputError, RunError, Site

PAIRS = Path(__file__).parents[1] / "pairs"
REFERENCE = Path(__file__).parents[2] / "artifacts" / "reference"
every_shape = pytest.mark.parametrize("shape", ["llama", "gpt2", "gpt_neox", "qwen2"])
POINT = resample_counts(4, seed=0, draws=1)


@functools.cache
def setting(shape: str) -> tuple[Lens, Contrasts]:
    folder = PAIRS / shape
    lens = load_lens(folder / "S")
    return lens, cue_contrasts(load_suite(folder), lens.tokenizer, "a", ("A", "B")).first(4)


@functools.cache
def reference() -> tuple[Lens, Contrasts]:
    lens = load_lens(REFERENCE / "checkpoints" / "rl-A")
    return lens, cue_contrasts(load_suite(REFERENCE), lens.tokenizer, "a", ("A", "B"))


# their function -> the component, and the order of their axes
THEIRS = {
    "resid_pre": ("resid_pre", "lp"),
    "resid_mid": ("resid_mid", "lp"),
    "attn_out": ("attn_out", "lp"),
    "mlp_out": ("mlp_out", "lp"),
    "attn_head_out_by_pos": ("z", "lph"),
    "attn_head_q_by_pos": ("q", "lph"),
    "attn_head_k_by_pos": ("k", "lph"),
    "attn_head_v_by_pos": ("v", "lph"),
    "attn_head_pattern_by_pos": ("pattern", "lhp"),
    "attn_head_out_all_pos": ("z", "lh"),
    "attn_head_q_all_pos": ("q", "lh"),
    "attn_head_k_all_pos": ("k", "lh"),
    "attn_head_v_all_pos": ("v", "lh"),
    "attn_head_pattern_all_pos": ("pattern", "lh"),
}


@every_shape
def test_the_sweep_is_the_patching_of_transformer_lens(shape: str, monkeypatch):
    monkeypatch.setattr(patching, "tqdm", lambda rows: rows)
    lens, contrasts = setting(shape)
    both = sides(lens, contrasts)
    metric = lambda logits: both.metric(logits[:, -1]).mean()  # noqa: E731
    compared = []
    with torch.no_grad():
        _, cache = lens.bridge.run_with_cache(both.clean.ids)
        for name, (component, axes) in THEIRS.items():
            if not lens.has(component):
                continue
            size = {"l": 2, "p": 7, "h": lens.heads_of(component)}
            places = list(itertools.product(*(range(size[axis]) for axis in axes)))
            call = getattr(patching, f"get_act_patch_{name}")
            if len(axes) < 3:
                theirs = call(lens.bridge, both.corrupt.ids, cache, metric)
                assert theirs.shape == tuple(size[axis] for axis in axes)
            else:  # theirs is a forward for each place: a third of them has every layer, head and token
                places = places[::3]
                some = pd.DataFrame(places, columns=call.keywords["index_axis_names"])
                assert some.nunique().tolist() == [size[axis] for axis in axes]
                theirs = call(lens.bridge, both.corrupt.ids, cache, metric, index_axis_names=None, index_df=some)
            named = [dict(zip(axes, at, strict=True)) for at in places]
            sites = [Site(layer=at["l"], component=component, head=at.get("h"), position=at.get("p")) for at in named]
            ours = patch(lens, contrasts, sites).patched.mean(1)
            np.testing.assert_allclose(ours, theirs.flatten().numpy(), atol=1e-4)
            compared.append(name)
    assert len(compared) == len(THEIRS) - (shape == "gpt_neox")


@every_shape
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_patching_everything_is_the_whole_effect(shape: str, direction):
    lens, contrasts = setting(shape)
    everything = [Site(layer=0, component="resid_pre"), Site(layer=1, component="resid_post", position="policy")]
    found = patch(lens, contrasts, everything, direction=direction)
    np.testing.assert_allclose(found.effects(POINT)[0], 1.0, atol=1e-5)
    both = sides(lens, contrasts)
    clean, corrupt = (both.metric(lens.capture(side, [])[1]).numpy() for side in (both.clean, both.corrupt))
    base, goal = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
    np.testing.assert_allclose(found.base, base, atol=1e-5)
    np.testing.assert_allclose(found.goal, goal, atol=1e-5)
    assert (clean - corrupt > 3).all()


def test_effects_are_ratios_of_means():
    sites = (Site(layer=0, component="z"),)
    found = sweep.Patched(sites, np.array([0.0, 1.0]), np.array([2.0, 3.0]), np.array([[1.0, 1.0]]))
    counts = np.array([[1, 1], [2, 0], [0, 2]])
    np.testing.assert_allclose(found.effects(counts)[:, 0], [0.25, 0.5, 0.0])
    nothing = sweep.Patched(sites, np.zeros(2), np.zeros(2), np.ones((1, 2)))
    assert not np.isfinite(nothing.effects(counts)).any()  # no contrast to move: not measured


@every_shape
def test_one_site_jointly_is_the_patch_of_that_site(shape: str):
    lens, contrasts = setting(shape)
    sites = [
        Site(layer=layer, component=component, head=head, neuron=neuron, position=position)
        for layer in range(2)
        for component in NAMES
        if lens.has(component)
        for head in ((None, lens.heads_of(component) - 1) if component in PER_HEAD else (None,))
        for neuron in ((None, 5) if component == "neurons" else (None,))
        for position in ("cue", "question", 6, None)
    ]
    alone = patch(lens, contrasts, sites)
    together = jointly(lens, contrasts, [[site] for site in sites])
    assert together.sites == alone.sites
    for name in ("base", "goal", "patched"):
        np.testing.assert_allclose(getattr(together, name), getattr(alone, name), atol=1e-5)


@every_shape
def test_a_group_is_replaced_at_once(shape: str):
    lens, contrasts = setting(shape)
    last = Site(layer=1, component="resid_post", position="last")  # nothing, one token before the end
    heads = [Site(layer=0, component="z", head=head, position="policy") for head in range(4)]
    cut = [[Site(layer=0, component="resid_pre", position=i) for i in range(7)], [*heads, last]]
    found = jointly(lens, contrasts, cut)
    np.testing.assert_allclose(found.effects(POINT)[0, 0], 1.0, atol=1e-5)
    assert found.sites == (cut[0][0], heads[0])
    all_heads = patch(lens, contrasts, [Site(layer=0, component="z", position="policy")])
    np.testing.assert_allclose(found.patched[1], all_heads.patched[0], atol=1e-5)


def test_prompts_of_several_lengths_are_patched_like_each_alone():
    lens, contrasts = setting("llama")
    row = contrasts.rows[1]
    shifted = {name: tuple(i + 2 for i in at) for name, at in row.spans.items()}
    longer = type(row)("longer", (7, 8, *row.clean), (7, 8, *row.corrupt), shifted, row.target, row.foil)
    mixed = Contrasts("cue", "A", "B", "a", (contrasts.rows[0], longer))
    sites = [*head_sites(lens, "policy"), *head_sites(lens, "cue"), Site(layer=1, component="pattern", head=0)]
    groups = [[site, Site(layer=0, component="mlp_out", position="question")] for site in sites]
    for of in (lambda some: patch(lens, some, sites), lambda some: jointly(lens, some, groups)):
        together = of(mixed)
        for number in range(2):
            alone = of(Contrasts("cue", "A", "B", "a", mixed.rows[number : number + 1]))
            for name in ("base", "goal", "patched"):
                np.testing.assert_allclose(
                    getattr(together, name)[..., number], getattr(alone, name)[..., 0], atol=1e-5
                )


def test_activations_of_another_checkpoint():
    lens, contrasts = setting("llama")
    before = load_lens(PAIRS / "llama" / "R-routing")
    site = Site(layer=1, component="resid_post")
    found = patch(lens, contrasts, [Site(layer=0, component="resid_post"), site], before=before)
    both = sides(lens, contrasts)
    source, goal = before.capture(both.clean, [(0, "resid_post"), (1, "resid_post")])
    np.testing.assert_allclose(found.goal, both.metric(goal).numpy(), atol=1e-5)
    with torch.no_grad():
        for layer, patched in enumerate(found.patched):
            value = source[layer, "resid_post"]
            edit = (lens.point(layer, "resid_post"), lambda _, value=value: value)
            np.testing.assert_allclose(patched, both.metric(lens.run(both.corrupt, [edit])[:, -1]).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("site", "says"),
    [
        (Site(layer=2, component="z"), r"blocks\.2\.attn\.hook_z"),
        (Site(layer=0, component="z", head=4), "there is no head 4"),
        (Site(layer=0, component="z", position="hint"), "no span 'hint'"),
        (Site(layer=0, component="z", position=7), "outside its 7 tokens"),
        (Site(layer=0, component="neurons", neuron=50), "there is no neuron 50"),
    ],
    ids=str,
)
def test_a_site_that_does_not_exist_is_refused(site: Site, says: str):
    lens, contrasts = setting("llama")
    with pytest.raises(InputError, match=says):
        patch(lens, contrasts, [site])
    with pytest.raises(InputError, match=says):
        jointly(lens, contrasts, [[site]])


def test_all_sites_exist_and_are_different():
    lens, contrasts = setting("qwen2")
    sites = all_sites(lens, range(7))
    assert len(set(sites)) == len(sites) == 2 * (3 * 7 + 4 * 7 + 4 + 2 + 2 + 4)
    assert {site.position for site in all_sites(lens, ("cue", "last"))} == {"cue", "last", None}
    found = patch(lens, contrasts, sites)
    assert np.isfinite(found.patched).all()


# --- the reader -------------------------------------------------------------------------------------------------------


def test_the_reader_of_the_reference_is_found_and_stable():
    lens, contrasts = reference()
    found = find_reader(lens, contrasts, "policy")
    assert found.chosen_effect > 0.9
    assert found.effect[0] > 0.9
    assert np.quantile(found.margin, 0.025) > 0
    assert 1 <= len(found.heads) <= 2
    assert all(site.position == "policy" and site.component == "z" for site in found.heads)
    assert set(found.rival) != set(found.heads)
    assert len(found.rival) == len(found.heads)
    for other in (contrasts.first(60), Contrasts("cue", "A", "B", "a", contrasts.rows[::-1])):
        assert set(find_reader(lens, other, "policy", seed=1).heads) == set(found.heads)


def test_the_reader_is_judged_on_questions_that_did_not_choose_it(monkeypatch):
    lens, contrasts = setting("llama")
    seen: list[tuple[str, ...]] = []
    whole = sweep.jointly

    def watched(lens, contrasts, groups, before=None):
        seen.append(tuple(row.question for row in contrasts.rows))
        return whole(lens, contrasts, groups, before)

    monkeypatch.setattr(sweep, "jointly", watched)
    find_reader(lens, contrasts, "policy")
    assert seen[-1] == tuple(row.question for row in contrasts.half(1).rows)
    assert set(seen[:-1]) <= {tuple(row.question for row in contrasts.half(0).rows)}


def test_a_reader_cannot_be_judged_without_a_second_half_or_a_rival(monkeypatch):
    lens, contrasts = setting("llama")
    with pytest.raises(InputError, match="give at least two"):
        find_reader(lens, contrasts.first(1), "policy")
    only = [Site(layer=0, component="z", head=0, position="policy")]
    monkeypatch.setattr(sweep, "head_sites", lambda *_: only)
    with pytest.raises(InputError, match="the model has one head"):
        find_reader(lens, contrasts, "policy")


def test_sides_of_several_lengths_end_in_one_column():
    lens, contrasts = setting("llama")
    row = contrasts.rows[0]
    longer = type(row)("longer", (7, *row.clean), (7, *row.corrupt), row.spans, row.target, row.foil)
    found = sides(lens, Contrasts("cue", "A", "B", "a", (row, longer)))
    assert found.clean.ids.tolist() == tokens([row.clean, longer.clean]).ids.tolist()
    assert found.corrupt.real.sum(1).tolist() == [7, 8]
    assert found.metric.target.shape == (2, 16)


def test_without_the_engine_patches_are_the_same(monkeypatch: pytest.MonkeyPatch):
    """Architectures whose blocks cannot be called alone go the long way."""
    lens, contrasts = setting("llama")
    sites = [
        *head_sites(lens, "policy"),
        Site(layer=0, component="resid_pre", position=0),
        Site(layer=1, component="q"),
    ]
    quick = {way: patch(lens, contrasts, sites, direction=way) for way in ("denoise", "noise")}

    def refuse(*_: object, **__: object) -> None:
        raise RunError("no exact engine")

    monkeypatch.setattr(sweep, "Engine", refuse)
    for way, found in quick.items():
        slow = patch(lens, contrasts, sites, direction=way)
        np.testing.assert_allclose(slow.patched, found.patched, atol=1e-5)
        np.testing.assert_allclose(slow.base, found.base, atol=1e-5)
        np.testing.assert_allclose(slow.goal, found.goal, atol=1e-5)


def test_sides_that_do_not_differ_have_no_shares_and_no_reader():
    lens, contrasts = setting("llama")
    same = replace(contrasts, rows=tuple(replace(row, corrupt=row.clean) for row in contrasts.rows))
    found = patch(lens, same, head_sites(lens, "policy"))
    assert np.isnan(found.effects(resample_counts(4, seed=0))).all()
    with pytest.raises(InputError, match=r"no cue reader: the sides of the contrast differ by 0\.00 nats"):
        find_reader(lens, same, "policy")


def test_what_cannot_be_patched_is_left_out_of_the_record_and_named(monkeypatch):
    """As on GPT-J, GPT-Neo and OPT, whose bridge ignores what is put in place of a pattern."""
    able = Lens.why_not
    monkeypatch.setattr(Lens, "why_not", lambda lens, c: "nobody listens" if c == "pattern" else able(lens, c))
    pair = Pair(PAIRS / "llama" / "S", PAIRS / "llama" / "R-routing", load_suite(PAIRS / "llama"))
    record = patching_record(pair, behaviour_of("llama", "R-routing"))
    assert record.missing[0] == "patching pattern: nobody listens"
    patched = {effect.site.component for sweep in record.sweeps for effect in sweep.effects}
    assert patched == {"resid_pre", "attn_out", "mlp_out", "z", "q", "k", "v"}
    with pytest.raises(InputError, match=r"L0\.pattern\.1 cannot be patched: nobody listens"):
        lens_of(pair, "before").check(Site(layer=0, component="pattern", head=1))


@pytest.mark.parametrize("position", ["cue", "question", "policy", 6, None])
@every_shape
def test_groups_across_layers_are_the_same_without_the_engine(shape: str, position, monkeypatch: pytest.MonkeyPatch):
    lens, contrasts = setting(shape)
    every = [
        Site(layer=layer, component=component, head=head, position=position)
        for layer in range(lens.layers)
        for component in ("z", "attn_out", "mlp_out")
        for head in (range(lens.heads) if component == "z" else (None,))
    ]
    draw = np.random.default_rng(0)
    groups = [[every[i] for i in draw.permutation(len(every))[: int(draw.integers(1, 6))]] for _ in range(12)]
    groups = [[s for s in group if s.component == "z" or s.head is None] for group in groups]
    quick = jointly(lens, contrasts, groups)

    def refuse(*_: object, **__: object) -> None:
        raise RunError("no exact engine")

    monkeypatch.setattr(sweep, "Engine", refuse)
    slow = jointly(lens, contrasts, groups)
    for name in ("base", "goal", "patched"):
        np.testing.assert_allclose(getattr(quick, name), getattr(slow, name), atol=1e-4)


def test_groups_that_cannot_be_replaced_together_are_refused():
    lens, contrasts = setting("llama")
    both = sides(lens, contrasts)
    engine = Engine(lens, both.corrupt, both.corrupt_spans)
    for group in (
        [Site(layer=0, component="k", head=0)],
        [Site(layer=0, component="z", head=0, position=p) for p in (1, 2)],
    ):
        with pytest.raises(InputError, match="only outputs at one position are replaced together"):
            engine.sweep_groups([group], {}, both.metric)
