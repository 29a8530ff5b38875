"""Units as vectors, their scores and their clamps: by hand, and against the engine that patches."""

from __future__ import annotations

import dataclasses

import numpy as np
import planted
import pytest
import torch
from scenes import PAIRS, POLICY, organism, pair, some_features
from torch.nn.functional import normalize

from mixturelens.behaviour.repair_questions import Scale
from mixturelens.contrasts import Contrasts, checkpoint_contrasts
from mixturelens.features import clamps, units, vectors
from mixturelens.features.clamps import clamp_of, clamped
from mixturelens.features.dictionary import Dictionary
from mixturelens.features.effects import make_scene, unit_effects
from mixturelens.features.units import Place, TrialSettings, best_head, best_of, make_trial
from mixturelens.features.vectors import directed, directions
from mixturelens.hooks.intervened import Intervened
from mixturelens.hooks.lens import load_lens
from mixturelens.hooks.placed import known_prompts
from mixturelens.probing.scores import auroc
from mixturelens.stats import resample_counts
from mixturelens.types import InputError, Site

# --- the planted organism ---------------------------------------------------------------------------------------------


def test_the_planted_directions_are_what_they_are_meant_to_be():
    lens, contrasts = organism()
    scene = make_scene(lens, contrasts, planted.SITE)
    both = directed(torch.stack([planted.CARRIER, planted.DECOY]), scene)
    moved = scene.shares(unit_effects(scene, both), resample_counts(len(scene), 0, draws=10))[0]
    assert scene.goal.min() > 3
    assert scene.base.max() < -2
    assert moved[0] == pytest.approx(1, abs=0.02)
    assert abs(moved[1]) < 0.005
    trial = make_trial(lens, contrasts, planted.SITE)
    for direction in (planted.CARRIER, planted.DECOY):
        read = trial.auroc(lambda x, direction=direction: x @ direction)  # both can be read
        assert read.value > 0.99
        assert read.low > 0.9  # forty questions, all told apart, show no more


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["feature", "direction", "neuron"])
@pytest.mark.parametrize("which", ["cue", "checkpoint"])
def test_a_clamp_in_behaviour_is_the_clamp_of_the_engine(kind: str, which: str):
    """The same number at the same token: the metric of an intervened model is that of the effect."""
    ground, _ = pair()
    lens, suite = ground.lens, ground.suite
    contrasts = ground.contrasts.first(5)
    if which == "checkpoint":
        contrasts = checkpoint_contrasts(suite, lens.tokenizer, "B", "b", "a").first(5)
    position = "policy" if which == "cue" else "last"
    site = Site(layer=1, component="neurons" if kind == "neuron" else "resid_pre", position=position)
    scene = make_scene(lens, contrasts, site)
    dictionary = {
        "feature": lambda: some_features(ground.contrasts, lens),
        "direction": lambda: directed(normalize(torch.randn(3, lens.d_model)), scene),
        "neuron": lambda: vectors.neurons(lens.d_mlp, range(lens.d_mlp)),
    }[kind]()
    to = torch.linspace(-1, 2, len(dictionary))
    expected = scene.base + unit_effects(scene, dictionary, "clamp", to)
    known = known_prompts(suite, suite.neutral, lens.tokenizer)
    for index in (0, len(dictionary) - 1):
        intervention = clamp_of(dictionary, index, site, contrasts, float(to[index]))
        assert intervention.site.position == ("completion" if which == "cue" else "last")
        with torch.no_grad():
            logits = Intervened(lens, [intervention], known)(scene.corrupt.engine.base.ids).logits[:, -1]
        np.testing.assert_allclose(scene.corrupt.metric(logits).numpy(), expected[index], atol=2e-5)


def test_random_gaps_are_gaps_on_fewer_questions(monkeypatch):
    ground, scale = pair()
    intervention = clamp_of(
        directions(make_scene(ground.lens, ground.contrasts, POLICY))[0], 0, POLICY, ground.contrasts, 3.0
    )
    monkeypatch.setattr(units, "FEW", 1000)
    found = clamps.random_gaps(ground, scale, [[intervention]])
    assert found[0] == pytest.approx(clamped(ground, scale, [intervention])[0].value, abs=1e-5)
    assert clamps.random_gaps(ground, Scale(scale.after, scale.after, scale.grid, scale.columns, scale.ceiling * 0), [
        [intervention]]) == (None,)  # fmt: skip


def test_matched_units_are_as_strong(monkeypatch):
    lens, contrasts = organism()
    trial = make_trial(lens, contrasts, planted.SITE)
    monkeypatch.setattr(units, "RANDOM", 4)
    base = torch.stack([planted.CARRIER, *planted.REST[:5]])
    # unit k displaces by what the carrier says, times its norm; the fourth never fires
    size = torch.tensor([1.0, 0.1, 0.9, 1.0, 1.2, 30.0])
    threshold = torch.tensor([-torch.inf] * 3 + [100.0] + [-torch.inf] * 2)
    made = Dictionary(planted.CARRIER.expand(6, -1), torch.zeros(6), threshold, base * size[:, None])
    np.testing.assert_allclose(vectors.strength(trial.choose, made), 3 * size * (threshold < 100), rtol=0.01)
    pool = units.pool_of(Place(trial, made), lambda index: units.Unit(kind="feature", site=planted.SITE, index=index))
    asked: list[int] = []
    score = best_of(dataclasses.replace(pool, place=lambda index: asked.append(index) or pool.place(index)))
    assert score.unit.index == 0
    assert asked == [0, 2, 4]  # 0.9 and 1.2, by their logarithms
    assert len(score.random) == 4  # and as many random directions


@pytest.mark.parametrize("kind", ["features", "neurons", "heads"])
def test_where_all_are_too_many_slopes_nominate_and_patching_chooses(monkeypatch, kind: str):
    lens, contrasts = organism()
    trial = make_trial(lens, contrasts, planted.SITE)
    every = torch.cat([planted.CARRIER[None], planted.DECOY[None], planted.REST])
    place = Place(trial, Dictionary(every, torch.zeros(len(every)), torch.full((len(every),), -torch.inf), every))

    def made() -> np.ndarray:
        if kind == "features":
            return units.pool_of(place, lambda n: units.Unit(kind="feature", site=planted.SITE, index=n)).alone
        if kind == "neurons":
            return units.pool_of_neurons(trial, range(lens.layers)).alone
        sites = units.head_sites(lens, "policy")
        tried = units.promising_heads(trial.choose, sites)
        alone = np.full(len(sites), -np.inf)
        alone[[sites.index(site) for site in tried]] = units.heads_alone(trial.choose, tried).mean(1)
        return alone

    exact = made()
    monkeypatch.setattr(units, "EXACT", 0.0)
    some = made()
    looked = np.isfinite(some)
    assert looked.sum() == min(8, len(exact)) <= np.isfinite(exact).sum()
    np.testing.assert_allclose(some[looked], exact[looked], atol=1e-5)
    assert int(some.argmax()) == int(exact.argmax())


def test_slopes_are_those_of_finite_differences():
    lens, contrasts = organism()
    scene = make_trial(lens, contrasts, planted.SITE).choose
    for key in ((1, "resid_pre"), (0, "neurons"), (1, "neurons")):
        slope = units.slopes(scene, [key])[key]
        run = scene.corrupt.at(Site(layer=key[0], component=key[1], position="policy"))
        rows = torch.arange(len(scene))
        for unit in (0, 5):
            step = torch.zeros_like(run.values)
            step[..., unit] = 1e-2
            up, down = (run.with_values(run.values + sign * step, rows) for sign in (1, -1))
            torch.testing.assert_close(slope[:, 0, unit], (up - down) / 2e-2, atol=2e-3, rtol=2e-2)


def test_auroc_is_of_the_side_that_the_choosing_half_says():
    lens, contrasts = organism()
    trial = make_trial(lens, contrasts, planted.SITE)
    up = trial.auroc(lambda x: x @ planted.DECOY)
    down = trial.auroc(lambda x: -(x @ planted.DECOY))
    assert up.value == down.value > 0.95
    scores = torch.cat([trial.judge.clean.values[:, 0], trial.judge.corrupt.values[:, 0]]) @ planted.DECOY
    n = len(trial.judge)
    expected = auroc(scores[None], (torch.arange(2 * n) < n).long(), torch.arange(2 * n) % n, np.ones((1, n), int))
    assert up.value == pytest.approx(expected[0, 0], abs=1e-6)


def test_halves_are_those_of_the_repairs():
    ground, scale = pair()
    same = checkpoint_contrasts(ground.suite, ground.lens.tokenizer, "B", "b", "a")
    before = load_lens(PAIRS / "llama" / "S")
    last = Site(layer=1, component="resid_pre", position="last")
    trial = make_trial(ground.lens, same, last, before, TrialSettings((ground, scale)))
    assert {row.question for row in trial.judging.rows} == {row.id for row in ground.judge.rows}
    assert not {row.question for row in trial.contrasts.rows} & {row.id for row in ground.judge.rows}
    # clean activations are those of S: all of a site put into R is S again
    assert trial.before is before
    score = best_head(trial)
    assert score.gap_closed.measured
    assert len(score.random) == 7


def test_what_cannot_be_compared_is_said():
    lens, contrasts = organism()
    with pytest.raises(InputError, match="give at least two"):
        make_trial(lens, contrasts.first(1), planted.SITE)
    row = contrasts.rows[0]
    alike = Contrasts("cue", "A", "B", "a", tuple(
        type(row)(each.question, each.clean, each.clean, each.spans, each.target, each.foil) for each in contrasts.rows
    ))  # fmt: skip
    with pytest.raises(InputError, match=r"the cue contrast differ by 0\.00 nats \(0\.5 are needed\)"):
        make_trial(lens, alike, planted.SITE)
    backwards = Contrasts("cue", "B", "A", "a", tuple(
        type(row)(each.question, each.corrupt, each.clean, each.spans, each.target, each.foil)
        for each in contrasts.rows
    ))  # fmt: skip
    with pytest.raises(InputError, match="differ by -"):
        make_trial(lens, backwards, planted.SITE)
    trial = make_trial(lens, contrasts.first(8), planted.SITE)
    with pytest.raises(InputError, match="units read 7 numbers"):
        unit_effects(trial.choose, vectors.neurons(7, range(7)))
