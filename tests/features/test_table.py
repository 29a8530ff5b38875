"""The unit that carries a planted concept is found, one from which it can only be read is not, and tables add up."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import planted
import pytest
import torch
from scenes import POLICY, organism, pair, some_features
from torch.nn.functional import normalize

from mixturelens.contrasts import Contrasts
from mixturelens.features import together, units, vectors
from mixturelens.features.activations import collect
from mixturelens.features.clamps import clamped
from mixturelens.features.dictionary import Dictionary
from mixturelens.features.effects import make_scene, unit_effects
from mixturelens.features.effort import Training
from mixturelens.features.sae import Origin, load_sae, train_sae
from mixturelens.features.table import find_table
from mixturelens.features.units import TrialSettings, make_trial
from mixturelens.features.vectors import directed, directions
from mixturelens.hooks.lens import Lens
from mixturelens.patching.sweep import head_sites, patch
from mixturelens.probing.record import Subspace
from mixturelens.stats import half_of
from mixturelens.types import NOT_MEASURED, InputError


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch):
    """How many units it takes is asked elsewhere."""
    monkeypatch.setattr(together, "SIZES", (1, 2))
    monkeypatch.setattr(together, "RANDOM", 2)


@functools.cache
def trained() -> Dictionary:
    """An SAE of the planted organism at the planted site."""
    lens, _ = organism()
    activations = collect([lens], planted.make_texts(), (1, "resid_pre"))
    with tempfile.TemporaryDirectory() as folder:
        name, out = "blocks.1.hook_resid_pre", Path(folder) / "sae"
        return load_sae(train_sae(activations, out, Origin(name), Training(width=64, k=2.5, steps=800, batch=128)))


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
    trial = make_trial(lens, contrasts, planted.SITE)
    table = find_table("cue", trial, features)
    best = table.best("feature")
    assert best.unit.index == carries
    assert best.among == len(features)
    assert best.patch.low > 0.9
    assert best.clamp.low > 0.9
    assert best.ablate.low > 0.9
    assert best.auroc.value >= 0.99
    assert best.auroc.low >= 0.9  # forty questions, all told apart, show no more
    assert best.margin.low > 0.5
    # first on the questions that judge, too
    moved = trial.shares(unit_effects(trial.judge, features))[0]
    assert moved.argmax() == carries
    # the decoy: as readable, and no more than what random directions do that displace as much
    assert trial.auroc(lambda x: features.encode(x)[..., decoys]).value >= 0.95
    own = features.part(torch.tensor([decoys]))
    away = normalize(torch.randn(24, planted.D, generator=torch.Generator().manual_seed(1))) * own.write.norm()
    read = own.read.expand(24, -1), own.offset.expand(24), own.threshold.expand(24)
    null = trial.shares(unit_effects(trial.judge, Dictionary(*read, away)))[0]
    assert vectors.strength(trial.choose, own) > 0.5
    assert abs(moved[decoys]) < 0.03
    assert abs(moved[decoys]) <= np.abs(null).max()
    # other kinds: the head that was planted as the reader; a direction; no single neuron
    assert str(table.best("head").unit) == "L0.z.0@policy"
    assert table.best("head").patch.low > 0.9
    assert table.best("direction").patch.low > 0.9
    assert table.best("neuron").patch.high < 0.2


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
    missing: list[str] = []
    trial = make_trial(lens, contrasts, POLICY, settings=TrialSettings((ground, scale)))
    table = find_table("cue", trial, features, found, missing)
    assert not missing
    assert [score.unit.kind for score in table.scores] == ["feature", "neuron", "head", "direction", "subspace"]
    assert (table.clean, table.corrupt, table.checkpoint) == ("A", "B", "after")
    judging = half_of(len(contrasts.rows), 1)
    assert table.questions == len(judging)
    feature, neuron, head, direction, subspace = table.scores
    assert feature.unit.index == 9
    assert [score.among for score in table.scores] == [10, 2 * lens.d_mlp, 8, 2, 1]
    assert [len(score.random) for score in table.scores] == [6 + 12, 12 + 12, 7, 24, 24]
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


def test_what_cannot_be_found_is_said():
    lens, contrasts = organism()
    quiet = Dictionary(
        torch.eye(planted.D), torch.zeros(planted.D), torch.full((planted.D,), 1e6), torch.eye(planted.D)
    )
    trial = make_trial(lens, contrasts.first(8), planted.SITE)
    with pytest.raises(InputError, match=r"none of 48 units has another activation on the other side"):
        find_table("cue", trial, quiet)
    missing: list[str] = []
    table = find_table("cue", trial, quiet, missing=missing)
    assert [score.unit.kind for score in table.scores] == ["neuron", "head", "direction"]
    assert [each.kind for each in table.several] == ["neuron", "head"]
    assert table.best("feature") is None
    assert table.together("feature") is None
    assert len(missing) == 1
    assert missing[0].startswith("cue, features: L1.resid_pre@policy: none of 48 units")
    with pytest.raises(InputError, match="units read 7 numbers"):
        find_table("cue", trial, vectors.neurons(7, range(7)))
