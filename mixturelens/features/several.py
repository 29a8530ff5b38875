"""How many units of a kind it takes: what no one unit carries may be spread over a few, or over all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int

from mixturelens.features.change import matched
from mixturelens.features.effects import Scene, joint_effects
from mixturelens.features.record import Several, Unit, UnitKind
from mixturelens.features.units import Clamp, Place, Trial, clamped, set_to, strength
from mixturelens.patching.sweep import ENOUGH, head_sites, jointly
from mixturelens.stats import interval, resample_counts
from mixturelens.types import NOT_MEASURED

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Numbers of units that are tried, fewest first."""
RANDOM = 8
"""Random sets of as many others."""
FEW = 200
"""Bootstrap samples where only the estimate is needed."""

Set = Sequence[int]
Together = Callable[[Sequence[Set], bool], Float[np.ndarray, "draw set"]]
"""(sets of units, whether on the questions that judge) -> share of the contrast that each set moves at once."""


def fewest_features(place: Place, unit: Callable[[int], Unit]) -> Several:
    """The fewest features of one site that carry a contrast together.

    They are taken in the order of how far they displace the activation, and in that of what each moves alone: whichever
    needs fewer. Clamped in behaviour at once, each to its mean clean activation.
    """
    trial, features = place.trial, place.units

    def together(sets: Sequence[Set], judging: bool) -> Float[np.ndarray, "draw set"]:
        scene = trial.judge if judging else trial.choose
        return scene.shares(joint_effects(scene, features, sets), _counts(trial, scene, judging))

    strong = strength(trial.choose, features).double().cpu().numpy()
    units = [unit(index) for index in range(len(features))]
    return _fewest("feature", units, strong, place.alone, together, lambda some: place.clamp(*some), trial)


def fewest_neurons(places: Sequence[Place], units: Sequence[Unit]) -> Several:
    """The same for the neurons of all layers; what they displace is the residual stream."""
    trial = places[0].trial
    at = [(place, index) for place in places for index in range(len(place.units))]
    strong = [
        strength(place.trial.choose, place.units) * trial.lens.neuron_weights(place.trial.judge.site.layer).norm(dim=1)
        for place in places
    ]
    return _fewest(
        "neuron",
        units,
        torch.cat(strong).double().cpu().numpy(),
        np.concatenate([place.alone for place in places]),
        _sites(trial, units),
        lambda some: [do for i in some for do in at[i][0].clamp(at[i][1])],
        trial,
    )


def fewest_heads(trial: Trial) -> Several:
    """The same for heads; clamped to mean clean outputs."""
    units = [Unit(kind="head", site=site) for site in head_sites(trial.lens, trial.judge.site.position)]
    strong, means = [], []
    for unit in units:
        scene = trial.choose.at(unit.site)
        writes = trial.lens.output_weights(unit.site.layer)[unit.site.head or 0]
        strong.append(float(((scene.clean.values - scene.corrupt.values) @ writes.float()).norm(dim=-1).mean()))
        means.append(scene.clean.values.mean((0, 1)))
    together = _sites(trial, units)
    return _fewest(
        "head",
        units,
        np.array(strong),
        together([[number] for number in range(len(units))], False)[0],
        together,
        lambda some: [set_to(units[i].site, trial.contrasts, means[i]) for i in some],
        trial,
    )


def _sites(trial: Trial, units: Sequence[Unit]) -> Together:
    """Sites of several layers are patched by full forwards."""

    def together(sets: Sequence[Set], judging: bool) -> Float[np.ndarray, "draw set"]:
        contrasts, scene = (trial.judging, trial.judge) if judging else (trial.contrasts, trial.choose)
        groups = [[units[i].site for i in some] for some in sets]
        return jointly(trial.lens, contrasts, groups, trial.before).effects(_counts(trial, scene, judging))

    return together


def _fewest(
    kind: UnitKind,
    units: Sequence[Unit],
    strong: Float[np.ndarray, " unit"],
    alone: Float[np.ndarray, " unit"],
    together: Together,
    clamps: Callable[[Set], Clamp],
    trial: Trial,
) -> Several:
    """More and more units, in either order, until they move ENOUGH on the questions that choose; then judged."""
    chosen: Set = ()
    reached = -np.inf
    fires = strong > 0
    for by in (strong, np.where(fires, alone, -np.inf)):
        order = [int(i) for i in np.argsort(-by, kind="stable") if fires[i]]
        for size in (size for size in SIZES if size <= len(order)):
            share = float(together([order[:size]], False)[0, 0])
            enough = share >= ENOUGH
            if (reached < ENOUGH and share > reached) or (enough and size < len(chosen)):
                chosen, reached = order[:size], share
            if enough:
                break
    if not chosen:
        return Several(kind=kind, units=(), among=len(units), enough=False, patch=NOT_MEASURED, random=())
    others = matched(strong, chosen, RANDOM, np.random.default_rng(trial.seed))
    found = together([chosen, *others], True)
    gap, trained = clamped(*trial.ground, clamps(chosen)) if trial.ground else (NOT_MEASURED, NOT_MEASURED)
    return Several(
        kind=kind,
        units=tuple(units[i] for i in chosen),
        among=len(units),
        enough=reached >= ENOUGH,
        patch=interval(found[:, 0], digits=6),
        random=tuple(found[0, 1:].round(6).tolist()),
        gap_closed=gap,
        trained_change=trained,
    )


def _counts(trial: Trial, scene: Scene, judging: bool) -> Int[np.ndarray, "draw question"]:
    return trial.counts if judging else resample_counts(len(scene), trial.seed, FEW)
