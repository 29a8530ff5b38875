"""As few units as carry a concept together are found: two where it was split over two, and a pair of heads on the
reference.
"""

from __future__ import annotations

import dataclasses

import planted
import pytest
import torch
from scenes import POLICY, REFERENCE, linear, organism, pair, some_features

from mixturelens.contrasts import Contrasts, cue_contrasts
from mixturelens.features import together
from mixturelens.features.clamps import clamped, set_to
from mixturelens.features.dictionary import Dictionary
from mixturelens.features.effects import joint_effects
from mixturelens.features.record import Unit
from mixturelens.features.together import SIZES, fewest_features, fewest_heads, fewest_neurons
from mixturelens.features.units import Place, Trial, TrialSettings, make_trial, pool_of, pool_of_neurons
from mixturelens.hooks.lens import load_lens
from mixturelens.patching.sweep import ENOUGH, jointly
from mixturelens.suite import load_suite
from mixturelens.types import NOT_MEASURED

NONE = Dictionary(torch.eye(planted.D), torch.zeros(planted.D), torch.full((planted.D,), 1e6), torch.eye(planted.D))


def number(index: int) -> Unit:
    return Unit(kind="feature", site=planted.SITE, index=index)


def planted_trial() -> Trial:
    lens, contrasts = organism()
    return make_trial(lens, contrasts.first(40), planted.SITE)


# --- features ---------------------------------------------------------------------------------------------------------


def test_a_concept_split_over_two_units_takes_two(monkeypatch: pytest.MonkeyPatch):
    """Each of two orthonormal units writes half of the carrier; the decoy displaces the activation more than either."""
    one, other = planted.CARRIER + planted.REST[0], planted.CARRIER - planted.REST[0]
    halves = torch.stack([one, other]) / 2**0.5
    basis = linear(torch.cat([halves, planted.DECOY[None], planted.COMMON[None], planted.REST[1:]]))
    trial = planted_trial()
    place = Place(trial, basis)
    alone = pool_of(place, number).alone / (trial.choose.goal - trial.choose.base).mean()
    assert min(alone[:2]) > 0.3
    assert max(alone) < 0.7
    found = fewest_features(pool_of(place, number))
    assert {unit.index for unit in found.units} == {0, 1}  # in the order of strength alone the decoy would be a third
    assert found.enough
    assert (found.kind, found.among) == ("feature", planted.D)
    assert found.patch.low > ENOUGH
    assert len(found.random) == together.RANDOM
    assert max(found.random) < 0.1
    moved = trial.shares(joint_effects(trial.judge, basis, [[0, 1]]))[:, 0]
    assert found.patch.value == pytest.approx(moved[0], abs=1e-6)
    assert (found.gap_closed, found.trained_change) == (NOT_MEASURED, NOT_MEASURED)
    # where sets of two are not tried, it takes the next size
    monkeypatch.setattr(together, "SIZES", (1, 3))
    three = fewest_features(pool_of(place, number))
    assert len(three.units) == 3
    assert {0, 1} < {unit.index for unit in three.units}


def test_what_does_not_carry_it_is_not_enough():
    trial = planted_trial()
    rest = linear(torch.cat([planted.DECOY[None], planted.REST]))
    found = fewest_features(pool_of(Place(trial, rest), number))
    assert found.enough is False
    assert 0 < len(found.units) <= max(SIZES)
    assert found.patch.high < 0.3
    nothing = fewest_features(pool_of(Place(trial, NONE), number))  # none fires
    assert (nothing.units, nothing.enough, nothing.patch, nothing.random) == ((), False, NOT_MEASURED, ())


def test_features_are_clamped_together_in_behaviour():
    ground, scale = pair()
    trial = make_trial(ground.lens, ground.contrasts, POLICY, settings=TrialSettings((ground, scale)))
    place = Place(trial, some_features(ground.contrasts, ground.lens))
    found = fewest_features(pool_of(place, lambda index: Unit(kind="feature", site=POLICY, index=index)))
    clamps = place.clamp(*(unit.index for unit in found.units))
    assert (found.gap_closed, found.trained_change) == clamped(ground, scale, clamps)
    assert found.gap_closed.measured


# --- heads and neurons ------------------------------------------------------------------------------------------------


def test_two_heads_of_the_reference_read_the_cue_together():
    lens = load_lens(REFERENCE / "checkpoints" / "rl-A")
    contrasts = cue_contrasts(load_suite(REFERENCE), lens.tokenizer, "a", ("A", "B"), "refuse")
    found = fewest_heads(make_trial(lens, contrasts, POLICY))
    assert {str(unit.site) for unit in found.units} == {"L0.z.2@policy", "L0.z.3@policy"}
    assert found.enough
    assert found.patch.low > ENOUGH
    assert max(found.random) < 0.2
    assert all(unit.kind == "head" for unit in found.units)


def test_the_planted_head_suffices_alone_and_neurons_do_not():
    trial = planted_trial()
    heads = fewest_heads(trial)
    assert [str(unit.site) for unit in heads.units] == ["L0.z.0@policy"]
    assert heads.patch.low > ENOUGH
    found = fewest_neurons(trial, pool_of_neurons(trial, range(trial.lens.layers)))
    assert found.among == 2 * trial.lens.d_mlp
    assert found.enough is False
    sites = [unit.site for unit in found.units]
    assert len(set(sites)) == len(sites) <= max(SIZES)
    # each neuron goes by the site that it was given, whatever its layer
    moved = jointly(trial.lens, trial.judging, [sites]).effects(trial.counts)[:, 0]
    assert found.patch.value == pytest.approx(moved[0], abs=1e-5)


def test_heads_are_set_to_their_mean_clean_output_in_behaviour():
    ground, scale = pair()
    trial = make_trial(ground.lens, ground.contrasts, POLICY, settings=TrialSettings((ground, scale)))
    found = fewest_heads(trial)
    clamps = [
        set_to(unit.site, trial.contrasts, trial.choose.at(unit.site).clean.values.mean((0, 1))) for unit in found.units
    ]
    assert (found.gap_closed, found.trained_change) == clamped(ground, scale, clamps)


def test_the_half_that_chooses_does_not_judge():
    """Judged on questions of which the chosen units say nothing, a set that was enough is seen to be none."""
    trial = planted_trial()
    basis = linear(torch.cat([planted.CARRIER[None], planted.REST]))
    found = fewest_features(pool_of(Place(trial, basis), number))
    assert [unit.index for unit in found.units] == [0]
    swapped = Contrasts("cue", "A", "B", "a", trial.contrasts.rows)
    other = dataclasses.replace(trial, judge=trial.choose, judging=swapped)
    again = fewest_features(pool_of(Place(other, basis), number))
    assert again.units == found.units
    assert again.patch != found.patch
