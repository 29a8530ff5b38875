"""The unit that carries a planted concept is found, one from which it can only be read is not, and tables add up."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import planted
import pytest
import torch
from torch.nn.functional import normalize

from mixturelens.behaviour.ground import Ground, Scale, make_ground, scale_of
from mixturelens.behaviour.harm import Harm
from mixturelens.checkpoints import load_model
from mixturelens.contrasts import Contrasts, checkpoint_contrasts, cue_contrasts
from mixturelens.features import units
from mixturelens.features.activations import collect
from mixturelens.features.dictionary import Dictionary
from mixturelens.features.effects import make_scene, unit_effects
from mixturelens.features.sae import load_sae, train_sae
from mixturelens.features.units import Place, best_of, clamp_of, clamped, directed, directions, find_table, make_trial
from mixturelens.hooks.intervened import Intervened, known_prompts
from mixturelens.hooks.lens import Lens, load_lens
from mixturelens.patching.sweep import head_sites, patch
from mixturelens.probing.record import Subspace
from mixturelens.probing.scores import auroc
from mixturelens.stats import half_of, resample_counts
from mixturelens.suite import load_suite
from mixturelens.types import NOT_MEASURED, InputError, Interval, Site

PAIRS = Path(__file__).parents[1] / "pairs"
POLICY = Site(layer=1, component="resid_pre", position="policy")


@functools.cache
def organism() -> tuple[Lens, Contrasts]:
    lens = Lens(planted.make_model(), planted.make_tokenizer())
    return lens, cue_contrasts(planted.make_suite(80), lens.tokenizer, "a", "A", "B", "refuse")


@functools.cache
def trained() -> Dictionary:
    """An SAE of the planted organism at the planted site."""
    lens, _ = organism()
    activations = collect([lens], planted.make_texts(), (1, "resid_pre"))
    with tempfile.TemporaryDirectory() as folder:
        name, out = "blocks.1.hook_resid_pre", Path(folder) / "sae"
        return load_sae(train_sae(activations, out, site_name=name, width=64, k=2.5, steps=800, batch=128))


@functools.cache
def pair() -> tuple[Ground, Scale]:
    folder = PAIRS / "llama"
    suite = load_suite(folder)
    change = Interval(value=-0.5, low=-0.6, high=-0.4)
    harm = Harm(trained_cue="A", harmed_cue="B", change=change, policy="a", shows="refuse", other="b")
    ground = make_ground(load_lens(folder / "R-routing"), suite, harm, seed=0)
    return ground, scale_of(ground, load_model(folder / "S"))


def some_features(contrasts: Contrasts, lens: Lens, site: Site = POLICY) -> Dictionary:
    """One feature along the difference of means that fires on the clean side alone, and random ones."""
    scene = make_scene(lens, contrasts, site)
    along = directions(scene)[0].part(torch.tensor([0]))
    x = torch.cat([scene.clean.values, scene.corrupt.values]).flatten(0, 1)
    middle = float((x @ along.read[0]).mean())
    others = torch.randn(9, x.shape[1], generator=torch.Generator().manual_seed(0)) / x.shape[1] ** 0.5
    offset = torch.tensor([0.0] * 9 + [middle])
    return Dictionary(
        torch.cat([others, along.read]), offset, torch.tensor([0.1] * 9 + [0.0]), torch.cat([others, 2 * along.write])
    )


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
        assert trial.auroc(lambda x, direction=direction: x @ direction).low > 0.95  # both can be read


@pytest.mark.filterwarnings("ignore:.*'utils' module has been deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
def test_the_feature_of_the_carrier_is_first_and_that_of_the_decoy_does_nothing():
    lens, contrasts = organism()
    features = trained()
    written = normalize(features.write)
    carries = int((written @ planted.CARRIER).abs().argmax())
    decoys = int((written @ planted.DECOY).argmax())  # it fires on the clean side
    assert abs(written[carries] @ planted.CARRIER) >= 0.95
    assert abs(written[decoys] @ planted.DECOY) >= 0.95
    table = find_table("cue", lens, contrasts, planted.SITE, features)
    best = table.best("feature")
    assert best.unit.index == carries
    assert best.among == len(features)
    assert best.patch.low > 0.9
    assert best.clamp.low > 0.9
    assert best.ablate.low > 0.9
    assert best.auroc.low >= 0.95
    assert best.margin.low > 0.5
    # first on the questions that judge, too
    trial = make_trial(lens, contrasts, planted.SITE)
    moved = trial.shares(unit_effects(trial.judge, features))[0]
    assert moved.argmax() == carries
    # the decoy: as readable, and no more than what random directions do that displace as much
    assert trial.auroc(lambda x: features.encode(x)[..., decoys]).value >= 0.95
    own = features.part(torch.tensor([decoys]))
    away = normalize(torch.randn(24, planted.D, generator=torch.Generator().manual_seed(1))) * own.write.norm()
    read = own.read.expand(24, -1), own.offset.expand(24), own.threshold.expand(24)
    null = trial.shares(unit_effects(trial.judge, Dictionary(*read, away)))[0]
    assert units.strength(trial.choose, own) > 0.5
    assert abs(moved[decoys]) < 0.03
    assert abs(moved[decoys]) <= np.abs(null).max()
    # other kinds: the head that was planted as the reader; a direction; no single neuron
    assert str(table.best("head").unit) == "L0.z.0@policy"
    assert table.best("head").patch.low > 0.9
    assert table.best("direction").patch.low > 0.9
    assert table.best("neuron").patch.high < 0.2


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
        "neuron": lambda: units.neurons(lens.d_mlp),
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


def test_the_table_of_a_pair(monkeypatch):
    monkeypatch.setattr(units, "RANDOM_GAP", 2)
    ground, scale = pair()
    lens, contrasts = ground.lens, ground.contrasts
    features = some_features(contrasts, lens)
    vector = directions(make_scene(lens, contrasts, POLICY))[0].read[0]
    nothing = {"before": NOT_MEASURED, "after": NOT_MEASURED}
    found = Subspace(
        concept="cue", site=POLICY.model_copy(update={"position": len(contrasts.rows[0].clean) - 1}), dimensions=1,
        directions=(tuple(vector.tolist()),), questions=1, pairs=1, plain=nothing, accuracy=nothing,
        random={}, shuffled={}, margin=nothing,
    )  # fmt: skip
    said: list[str] = []
    table = find_table(
        "cue", lens, contrasts, POLICY, features, subspace=found, ground=ground, scale=scale, say=said.append
    )
    assert [score.unit.kind for score in table.scores] == ["feature", "neuron", "head", "direction", "subspace"]
    assert said[0] == "cue: best feature"
    assert (table.clean, table.corrupt, table.checkpoint) == ("A", "B", "after")
    judging = half_of(len(contrasts.rows), 1)
    assert table.questions == len(judging)
    feature, neuron, head, direction, subspace = table.scores
    assert feature.unit.index == 9
    assert [score.among for score in table.scores] == [10, 2 * lens.d_mlp, 8, 2, 1]
    assert [len(score.random) for score in table.scores] == [9, 24, 7, 24, 24]
    assert [len(score.random_gap) for score in table.scores] == [2] * 5
    assert (neuron.unit.site.component, neuron.unit.site.position) == ("neurons", "policy")
    assert neuron.unit.site.neuron is not None
    # the effect of the head is that of the sweep, chosen on the other half
    sites = head_sites(lens, "policy")
    moved = [patch(lens, contrasts.half(half), sites) for half in (0, 1)]
    best = int((moved[0].patched - moved[0].base).mean(1).argmax())
    shares = (moved[1].patched - moved[1].base).mean(1) / (moved[1].goal - moved[1].base).mean()
    assert head.unit.site == sites[best]
    assert head.patch.value == pytest.approx(shares[best], abs=1e-4)
    assert head.random == pytest.approx(np.delete(shares, best), abs=1e-4)
    assert head.margin.value == pytest.approx(shares[best] - np.delete(shares, best).max(), abs=1e-4)
    # a direction's ablation leaves no difference along it, a patch brings all of it
    assert direction.patch.value > 0.8
    assert direction.ablate.value > 0.5
    assert subspace.patch.value == pytest.approx(
        _share(lens, contrasts.half(1), directed(vector[None], make_scene(lens, contrasts.half(0), POLICY))), abs=1e-3
    )
    for score in table.scores:
        assert score.margin.value == pytest.approx(score.patch.value - max(score.random), abs=1e-5)
        assert (score.intervention is None) == (score.unit.kind == "head")
        if score.intervention is not None:
            gap, change = clamped(ground, scale, [score.intervention])
            assert (score.gap_closed, score.trained_change) == (gap, change)
            assert score.intervention.site.position == "completion"
    assert direction.gap_closed.low > 0.8
    assert abs(direction.trained_change.value) < 0.05
    assert direction.gap_closed.value > max(direction.random_gap) + 0.5


def _share(lens: Lens, contrasts: Contrasts, dictionary: Dictionary) -> float:
    scene = make_scene(lens, contrasts, POLICY)
    return float(unit_effects(scene, dictionary).mean() / (scene.goal - scene.base).mean())


def test_random_gaps_are_gaps_on_fewer_questions(monkeypatch):
    ground, scale = pair()
    intervention = clamp_of(
        directions(make_scene(ground.lens, ground.contrasts, POLICY))[0], 0, POLICY, ground.contrasts, 3.0
    )
    monkeypatch.setattr(units, "FEW", 1000)
    found = units.random_gaps(ground, scale, [intervention])
    assert found[0] == pytest.approx(clamped(ground, scale, [intervention])[0].value, abs=1e-5)
    assert units.random_gaps(ground, Scale(scale.after, scale.after, scale.grid, scale.columns, scale.ceiling * 0), [
        intervention]) == (None,)  # fmt: skip


def test_matched_units_are_as_strong(monkeypatch):
    lens, contrasts = organism()
    trial = make_trial(lens, contrasts, planted.SITE)
    monkeypatch.setattr(units, "RANDOM", 2)
    base = torch.stack([planted.CARRIER, *planted.REST[:5]])
    # unit k displaces by what the carrier says, times its norm; the fourth never fires
    size = torch.tensor([1.0, 0.1, 0.9, 1.0, 1.2, 30.0])
    threshold = torch.tensor([-torch.inf] * 3 + [100.0] + [-torch.inf] * 2)
    made = Dictionary(planted.CARRIER.expand(6, -1), torch.zeros(6), threshold, base * size[:, None])
    np.testing.assert_allclose(units.strength(trial.choose, made), 3 * size * (threshold < 100), rtol=0.01)
    seen: list[list[tuple[int, int]]] = []
    whole = units._effects_of
    monkeypatch.setattr(units, "_effects_of", lambda places, which: seen.append(which) or whole(places, which))
    score = best_of([Place(trial, made)], lambda _, index: units.Unit(kind="feature", site=planted.SITE, index=index))
    assert score.unit.index == 0
    assert seen == [[(0, 2), (0, 4)]]  # 0.9 and 1.2, by their logarithms


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
    trial = make_trial(ground.lens, same, last, before, (ground, scale))
    assert {row.question for row in trial.judging.rows} == {row.id for row in ground.judge.rows}
    assert not {row.question for row in trial.contrasts.rows} & {row.id for row in ground.judge.rows}
    # clean activations are those of S: all of a site put into R is S again
    score = units.best_head(trial, before)
    assert score.gap_closed.measured
    assert len(score.random) == 7


def test_what_cannot_be_compared_is_said():
    lens, contrasts = organism()
    quiet = Dictionary(
        torch.eye(planted.D), torch.zeros(planted.D), torch.full((planted.D,), 1e6), torch.eye(planted.D)
    )
    with pytest.raises(InputError, match=r"none of 48 units has another activation on the other side"):
        find_table("cue", lens, contrasts, planted.SITE, quiet)
    missing: list[str] = []
    table = find_table("cue", lens, contrasts.first(8), planted.SITE, quiet, missing=missing)
    assert [score.unit.kind for score in table.scores] == ["neuron", "head", "direction"]
    assert table.best("feature") is None
    assert len(missing) == 1
    assert missing[0].startswith("cue, best feature: L1.resid_pre@policy: none of 48 units")
    with pytest.raises(InputError, match="give at least two"):
        find_table("cue", lens, contrasts.first(1), planted.SITE, quiet)
    row = contrasts.rows[0]
    alike = Contrasts("cue", "A", "B", "a", tuple(
        type(row)(each.question, each.clean, each.clean, each.spans, each.target, each.foil) for each in contrasts.rows
    ))  # fmt: skip
    with pytest.raises(InputError, match=r"the cue contrast differ by 0\.00 nats \(0\.5 are needed\)"):
        find_table("cue", lens, alike, planted.SITE, quiet)
    backwards = Contrasts("cue", "B", "A", "a", tuple(
        type(row)(each.question, each.corrupt, each.clean, each.spans, each.target, each.foil)
        for each in contrasts.rows
    ))  # fmt: skip
    with pytest.raises(InputError, match="differ by -"):
        find_table("cue", lens, backwards, planted.SITE, quiet)
    ground, scale = pair()
    for wrong in ({"ground": ground, "scale": scale}, {"ground": pair()[0]}):
        with pytest.raises(InputError, match="is measured on the model that is patched"):
            find_table("cue", lens, contrasts, planted.SITE, quiet, **wrong)
    with pytest.raises(InputError, match="units read 7 numbers"):
        find_table("cue", lens, contrasts, planted.SITE, units.neurons(7))
