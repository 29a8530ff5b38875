"""How many units of a kind it takes: what no one unit carries may be spread over a few, or over all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from mixturelens.features.change import matched
from mixturelens.features.clamps import Clamp, clamped, set_to
from mixturelens.features.effects import Scene, heads_alone, joint_effects, sites_together
from mixturelens.features.record import Several, Unit, UnitKind
from mixturelens.features.units import Place, Pool, Trial, promising_heads
from mixturelens.hooks.weights import output_weights
from mixturelens.patching.sweep import ENOUGH, head_sites
from mixturelens.stats import interval, resample_counts
from mixturelens.types import NOT_MEASURED, InputError, Site

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Numbers of units that are tried, fewest first."""
RANDOM = 8
"""Random sets of as many others."""
FEW = 200
"""Bootstrap samples where only the estimate is needed."""

Set = Sequence[int]
Together = Callable[[Sequence[Set], bool], Float[np.ndarray, "draw set"]]
"""(sets of units, whether on the questions that judge) -> share of the contrast that each set moves at once."""


def fewest_features(pool: Pool) -> Several:
    """The fewest features of one site that carry a contrast together.

    They are taken in the order of how far they displace the activation, and in that of what each moves alone: whichever
    needs fewer. Clamped in behaviour at once, each to its mean clean activation.
    """
    place = pool.whole
    assert place is not None
    trial, features = place.trial, place.units

    def together(sets: Sequence[Set], judging: bool) -> Float[np.ndarray, "draw set"]:
        scene = trial.judge if judging else trial.choose
        return scene.shares(joint_effects(scene, features, sets), _counts(trial, scene, judging))

    return _fewest("feature", pool, together, lambda some: place.clamp(*some), trial)


def fewest_neurons(trial: Trial, pool: Pool) -> Several:
    """The fewest neurons, of all layers of a pool, that carry a contrast together; chosen as `fewest_features` does."""
    return _fewest(
        "neuron",
        pool,
        _sites(trial, lambda number: pool.unit(number).site),
        lambda some: [do for number in some for do in pool.place(number).clamp(0)],
        trial,
    )


def fewest_heads(trial: Trial) -> Several:
    """The fewest heads that carry a contrast together; in behaviour they are set to their mean clean outputs."""
    position, scene = trial.judge.site.position, trial.choose
    sites = [site for site in head_sites(trial.lens, position) if (site.layer, "z") in scene.corrupt.seen]

    def mean(site: Site) -> Tensor:
        return scene.at(site).clean.values.mean((0, 1))

    strong = []
    for site in sites:
        clean, corrupt = (run.seen[site.layer, "z"][:, :, site.head or 0] for run in (scene.clean, scene.corrupt))
        writes = output_weights(trial.lens, site.layer)[site.head or 0]
        strong.append(float(((clean - corrupt) @ writes.float()).norm(dim=-1).mean()))
    tried = promising_heads(scene, sites)
    alone = np.full(len(sites), -np.inf)
    alone[[sites.index(site) for site in tried]] = heads_alone(scene, tried).mean(1)

    def place(number: int) -> Place:
        raise InputError(f"{sites[number]} is a head, and no unit of a dictionary")

    pool = Pool(np.array(strong), alone, lambda number: Unit(kind="head", site=sites[number]), place)
    return _fewest(
        "head",
        pool,
        _sites(trial, sites.__getitem__),
        lambda some: [set_to(sites[i], trial.contrasts, mean(sites[i])) for i in some],
        trial,
    )


def _sites(trial: Trial, site: Callable[[int], Site]) -> Together:
    def together(sets: Sequence[Set], judging: bool) -> Float[np.ndarray, "draw set"]:
        scene = trial.judge if judging else trial.choose
        moved = sites_together(scene, [[site(number) for number in some] for some in sets])
        return scene.shares(moved, _counts(trial, scene, judging))

    return together


def _fewest(kind: UnitKind, pool: Pool, together: Together, clamps: Callable[[Set], Clamp], trial: Trial) -> Several:
    """More and more units, in either order, until they move ENOUGH on the questions that choose; then judged."""
    chosen: Set = ()
    reached = -np.inf
    strong = pool.strong
    for by in (strong, pool.alone):
        order = [int(i) for i in np.argsort(-by, kind="stable") if strong[i] > 0 and np.isfinite(by[i])]
        for size in (size for size in SIZES if size <= len(order)):
            share = float(together([order[:size]], False)[0, 0])
            enough = share >= ENOUGH
            if (reached < ENOUGH and share > reached) or (enough and size < len(chosen)):
                chosen, reached = order[:size], share
            if enough:
                break
    if not chosen:
        return Several(kind=kind, units=(), among=len(strong), enough=False, patch=NOT_MEASURED, random=())
    others = matched(strong, chosen, RANDOM, np.random.default_rng(trial.settings.seed))
    found = together([chosen, *others], True)
    gap, trained = (
        clamped(*trial.settings.ground, clamps(chosen)) if trial.settings.ground else (NOT_MEASURED, NOT_MEASURED)
    )
    return Several(
        kind=kind,
        units=tuple(pool.unit(i) for i in chosen),
        among=len(strong),
        enough=reached >= ENOUGH,
        patch=interval(found[:, 0], trial.counts, digits=6),
        random=tuple(found[0, 1:].round(6).tolist()),
        gap_closed=gap,
        trained_change=trained,
    )


def _counts(trial: Trial, scene: Scene, judging: bool) -> Int[np.ndarray, "draw question"]:
    return trial.counts if judging else resample_counts(len(scene), trial.settings.seed, FEW)
