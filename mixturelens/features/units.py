"""The best unit of every kind for one concept: a feature, a neuron, a head, a direction, compared by what they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mixturelens.behaviour.repair_questions import Ground, Scale
from mixturelens.contrasts import Contrasts
from mixturelens.features.clamps import FEW, Clamp, clamped, clamps_of, random_gaps, set_to
from mixturelens.features.dictionary import Dictionary
from mixturelens.features.effects import (
    Scene,
    check_size,
    heads_alone,
    make_scene,
    operations,
    site_effects,
    slopes,
    unit_effects,
)
from mixturelens.features.effort import EXACT, share_of
from mixturelens.features.record import Unit, UnitScore
from mixturelens.features.splice import At
from mixturelens.features.vectors import neurons, strength
from mixturelens.hooks.lens import Lens
from mixturelens.hooks.weights import neuron_weights
from mixturelens.patching.sweep import APART, head_sites
from mixturelens.probing.leace import leace
from mixturelens.probing.scores import auroc
from mixturelens.stats import PROPORTION, apart, interval, resample_counts, resampled_mean
from mixturelens.types import NOT_MEASURED, Component, InputError, Interval, Intervention, Site

RANDOM = 24
"""Matched random units that the best one is compared with, by patching."""
RANDOM_GAP = 8
"""The same in behaviour, which takes longer."""
QUESTIONS = 128
"""Questions of each half, at most."""
NOMINATED = 64
"""These are so many, at most."""
WATCHED = 256 << 20
"""Bytes of what all layers have at a position, up to which it is kept of all of them."""


@dataclass(frozen=True)
class TrialSettings:
    """What of units is measured, and how much of it."""

    ground: tuple[Ground, Scale] | None = None
    """Where behaviour under a clamp is measured; None: it is not."""
    layers: Sequence[int] | None = None
    """Those whose heads and neurons are compared with what is found at the site; None: all."""
    share: float = 1.0
    """Of questions and controls."""
    seed: int = 0


@dataclass(frozen=True)
class Trial:
    """One contrast in one model: the questions that choose a unit, and those that judge it."""

    choose: Scene
    judge: Scene
    contrasts: Contrasts
    """Of the questions that choose."""
    judging: Contrasts
    counts: Int[np.ndarray, "draw question"]
    """Bootstrap over the questions that judge."""
    before: Lens | None = None
    """Where clean activations come from, if from another checkpoint."""
    settings: TrialSettings = TrialSettings()

    @property
    def controls(self) -> int:
        """Random units, at most, that a unit's effect on the metric is compared with."""
        return share_of(RANDOM, self.settings.share, 8)

    @property
    def controls_in_behaviour(self) -> int:
        """Random units, at most, that are clamped in behaviour beside it: each costs a whole measurement."""
        return share_of(RANDOM_GAP, self.settings.share, 2)

    @property
    def lens(self) -> Lens:
        """The model that is patched."""
        return self.judge.corrupt.engine.lens

    def at(self, site: Site) -> Trial:
        """The same contrast and questions, looked at elsewhere. Raises InputError for a site that is not there."""
        return replace(self, choose=self.choose.at(site), judge=self.judge.at(site))

    def shares(self, moved: Float[np.ndarray, "unit question"]) -> Float[np.ndarray, "draw unit"]:
        """Nats by which units move each judging question's metric, as bootstrapped shares of the contrast."""
        return self.judge.shares(moved, self.counts)

    def auroc(self, read: Callable[[Float[Tensor, "question column d"]], Float[Tensor, "question column"]]) -> Interval:
        """AUROC, on the questions that judge, of a number that is read at the site (its mean over tokens) for telling
        the two sides apart. Which side has the greater number is taken from the questions that choose.
        """

        def draws(scene: Scene, counts: Int[np.ndarray, "draw question"]) -> Float[np.ndarray, " draw"]:
            found = torch.cat([read(run.values).mean(1) for run in (scene.clean, scene.corrupt)])
            row = torch.arange(2 * len(scene), device=found.device)
            return auroc(found[None], (row < len(scene)).long(), row % len(scene), counts)[:, 0]

        chosen = draws(self.choose, np.ones((1, len(self.choose)), dtype=int))[0]
        found = draws(self.judge, self.counts)
        return interval(found if chosen >= 0.5 else 1 - found, self.counts, bounds=PROPORTION, digits=6)


@dataclass(frozen=True)
class Place:
    """Units of one site."""

    trial: Trial
    units: Dictionary

    @property
    def means(self) -> Float[Tensor, " unit"]:
        """Mean activation on the clean side of the questions that choose."""
        return self.units.encode(self.trial.choose.clean.values).mean((0, 1))

    def clamp(self, *which: int) -> Clamp:
        """What makes these units as active in behaviour as they are on the clean side, on average."""
        return clamps_of(self.units, which, self.trial.judge.site, self.trial.contrasts, self.means)

    def only(self, which: int) -> Place:
        """One of the units, as a place of its own."""
        return Place(self.trial, self.units.part(torch.tensor([which], device=self.units.read.device)))


@dataclass(frozen=True)
class Pool:
    """Units of one kind that are compared: of one site, or of several layers."""

    strong: Float[np.ndarray, " unit"]
    """How far each displaces the activation, on the questions that choose."""
    alone: Float[np.ndarray, " unit"]
    """Nats by which each alone moves the metric there; minus infinity where that was not looked at."""
    unit: Callable[[int], Unit]
    place: Callable[[int], Place]
    """A unit as a place of its own."""
    whole: Place | None = None
    """All of them, where they are those of one site."""

    @property
    def tried(self) -> int:
        """Units whose effect was measured, rather than guessed from slopes."""
        return int(np.isfinite(self.alone).sum())


def pool_of(place: Place, unit: Callable[[int], Unit]) -> Pool:
    """The units of one site with what each moves alone: of all of them, where EXACT operations suffice, else of those
    that slopes nominate. `unit` names one by its number.
    """
    scene, units = place.trial.choose, place.units
    check_size(scene, units)
    strong = strength(scene, units).double().cpu().numpy()
    change = units.scale(scene.corrupt.values) * (units.encode(scene.clean.values) - units.encode(scene.corrupt.values))
    runs = int((change != 0).any(1).sum())
    watched = (scene.site.layer, "resid_pre") in scene.corrupt.seen
    if runs * operations(scene, scene.site.layer) <= EXACT or not watched:
        alone = unit_effects(scene, units).mean(1)
    else:
        key = scene.site.layer, scene.site.component
        slope = slopes(scene, [key])[key]
        guess = ((slope @ units.write.T) * change).sum(1).mean(0).double().cpu().numpy()
        few = _nominated(guess, strong, scene, scene.site.layer)
        alone = np.full(len(units), -np.inf)
        alone[few] = unit_effects(scene, units.part(torch.tensor(few, device=units.read.device))).mean(1)
    return Pool(strong, alone, unit, place.only, place)


def pool_of_neurons(trial: Trial, layers: Sequence[int]) -> Pool:
    """The neurons of several layers, at the position of a trial; what they displace is the residual stream."""
    scene, lens, position = trial.choose, trial.lens, trial.judge.site.position
    keys: list[At] = [(layer, "neurons") for layer in layers]
    change = [scene.clean.seen[key] - scene.corrupt.seen[key] for key in keys]
    writes = [neuron_weights(lens, layer).float().norm(dim=1) for layer in layers]
    strong = torch.cat([(each.abs().mean((0, 1)) * norm) for each, norm in zip(change, writes, strict=True)])
    strong = strong.double().cpu().numpy()
    size = change[0].shape[-1]
    firing = np.flatnonzero(strong > 0)
    if len(firing) * len(scene) * operations(scene, layers[len(layers) // 2]) <= EXACT:
        few = firing.tolist()
    else:
        slope = slopes(scene, keys)
        guess = [(slope[key] * each).sum(1).mean(0) for key, each in zip(keys, change, strict=True)]
        few = _nominated(torch.cat(guess).double().cpu().numpy(), strong, scene, layers[len(layers) // 2])

    def site(number: int) -> Site:
        return Site(layer=layers[number // size], component="neurons", position=position)

    def place(number: int) -> Place:
        return Place(trial.at(site(number)), neurons(size, [number % size], lens.device))

    def unit(number: int) -> Unit:
        return Unit(kind="neuron", site=site(number).model_copy(update={"neuron": number % size}))

    alone = np.full(len(strong), -np.inf)
    by_layer: dict[int, list[int]] = {}
    for number in few:
        by_layer.setdefault(number // size, []).append(number)
    for layer, mine in by_layer.items():
        units = neurons(size, [number % size for number in mine], lens.device)
        alone[mine] = unit_effects(scene.at(site(layer * size)), units).mean(1)
    return Pool(strong, alone, unit, place)


def _nominated(guess: np.ndarray, strong: np.ndarray, scene: Scene, layer: int) -> list[int]:
    """Units that would move most if the model were linear: as many as EXACT allows, NOMINATED at most."""
    number = int(EXACT / (len(scene) * operations(scene, layer)))
    order = np.argsort(np.where(strong > 0, -guess, np.inf), kind="stable")
    return [int(i) for i in order[: max(8, min(NOMINATED, number))] if strong[i] > 0]


def best_of(pool: Pool) -> UnitScore:
    """The unit that moves most of the contrast, of all units of a pool that were patched.

    Controls: the others that displace the activation about as much as the chosen one does (nearest in the logarithm of
    `strength`, on the questions that choose; where it is the strongest of all, they are weaker), and as many times its
    own change, written along random directions of the same norm. Raises
    InputError if no unit tells the sides apart at all.
    """
    strong = pool.strong
    if not strong.any():
        raise InputError(
            f"{pool.place(0).trial.choose.site}: none of {len(strong)} units has another activation on the other side"
        )
    best = int(np.where(strong > 0, pool.alone, -np.inf).argmax())
    own = pool.place(best)
    trial = own.trial
    with np.errstate(divide="ignore"):
        far = np.where(strong > 0, np.abs(np.log(strong) - np.log(strong[best])), np.inf)
    alike = [int(i) for i in np.argsort(far, kind="stable") if i != best and strong[i] > 0]
    alike = alike[: trial.controls // 2]
    others = [pool.place(i) for i in alike]
    elsewhere = along_random(own, trial.controls - trial.controls // 2)
    random = np.concatenate([_shares(each) for each in (*others, elsewhere)], 1)
    number = trial.controls_in_behaviour
    clamps = [each.clamp(0) for each in others[: number // 2]]
    clamps += [elsewhere.clamp(i) for i in range(min(number - number // 2, len(elsewhere.units)))]
    return _judged(own, pool.unit(best), pool.tried, random, clamps)


class _Moved(NamedTuple):
    """Bootstrapped shares of the contrast that one unit moves in each way, and those of random others, patched."""

    patch: Float[np.ndarray, " draw"]
    clamp: Float[np.ndarray, " draw"]
    ablate: Float[np.ndarray, " draw"]
    random: Float[np.ndarray, "draw random"]


def _score(
    trial: Trial, unit: Unit, among: int, read: Interval, moved: _Moved, do: Clamp, random_do: Sequence[Clamp]
) -> UnitScore:
    """The record of one unit: what it tells, what it moves beside random others, what its clamp does in behaviour.

    Behaviour is measured where the trial has a ground; elsewhere its numbers are null.
    """
    gap, trained, gaps = NOT_MEASURED, NOT_MEASURED, ()
    settings, counts, random = trial.settings, trial.counts, moved.random
    if settings.ground is not None:
        gap, trained = clamped(*settings.ground, do)
        gaps = random_gaps(*settings.ground, random_do, share_of(FEW, settings.share, 8))
    return UnitScore(
        unit=unit,
        among=among,
        auroc=read,
        patch=interval(moved.patch, counts, digits=6),
        clamp=interval(moved.clamp, counts, digits=6),
        ablate=interval(moved.ablate, counts, digits=6),
        random=tuple(random[0].round(6).tolist()),
        margin=interval(moved.patch - random.max(1), counts, digits=6) if random.shape[1] else NOT_MEASURED,
        gap_closed=gap,
        trained_change=trained,
        random_gap=gaps,
        intervention=next((each for each in do if isinstance(each, Intervention) and each.do == "clamp"), None),
    )


def _shares(place: Place) -> Float[np.ndarray, "draw unit"]:
    return place.trial.shares(unit_effects(place.trial.judge, place.units))


def along_random(own: Place, number: int) -> Place:
    """The change of a single unit, written along random directions of the same norm: units that read what it reads."""
    units, trial = own.units, own.trial
    generator = torch.Generator().manual_seed(trial.settings.seed)
    elsewhere = torch.randn(number, units.read.shape[1], generator=generator).to(units.read)
    elsewhere = elsewhere * units.write.norm() / elsewhere.norm(dim=1, keepdim=True)
    same = units.part(torch.zeros(number, dtype=torch.long, device=units.read.device))
    return Place(trial, same.writing(elsewhere))


def _judged(
    own: Place, unit: Unit, among: int, random: Float[np.ndarray, "draw random"], random_do: Sequence[Clamp]
) -> UnitScore:
    """The score of a single unit."""
    trial, units = own.trial, own.units
    read = trial.auroc(lambda x: units.encode(x)[..., 0])
    moved = _Moved(
        patch=trial.shares(unit_effects(trial.judge, units, "patch"))[:, 0],
        clamp=trial.shares(unit_effects(trial.judge, units, "clamp", own.means))[:, 0],
        ablate=trial.shares(unit_effects(trial.judge, units, "ablate"))[:, 0],
        random=random,
    )
    return _score(trial, unit, among, read, moved, own.clamp(0), random_do)


def best_direction(place: Place, unit: Callable[[int], Unit]) -> UnitScore:
    """The direction, of those of one place, that moves most of the contrast.

    Random ones are displaced as far as it is, row by row, along random unit vectors: they read it, and write elsewhere.
    """
    best = int(unit_effects(place.trial.choose, place.units).mean(1).argmax())
    own = place.only(best)
    others = along_random(own, place.trial.controls)
    clamps = [others.clamp(i) for i in range(place.trial.controls_in_behaviour)]
    return _judged(own, unit(best), len(place.units), _shares(others), clamps)


def best_head(trial: Trial) -> UnitScore:
    """The head whose output at the position moves most of the contrast. Random: all other heads.

    Its clamp is its mean clean output on the questions that choose, its ablation zero. It is read along the direction
    that LEACE would erase, fitted on these questions. Raises InputError for a model of one head.
    """
    lens = trial.lens
    position, seen = trial.judge.site.position, trial.choose.corrupt.seen
    sites = [site for site in head_sites(lens, position) if (site.layer, "z") in seen]
    if len(sites) < 2:
        raise InputError("the model has one head: there is no other that it could be compared with")
    sites = promising_heads(trial.choose, sites)
    best = int(heads_alone(trial.choose, sites).mean(1).argmax())
    judged = trial.shares(heads_alone(trial.judge, sites))
    here = trial.at(sites[best])
    mean = here.choose.clean.values.mean((0, 1))
    runs = (here.choose.clean, here.choose.corrupt)
    sets = [rearrange(run.values, "question position d -> (question position) d") for run in runs]
    eraser = leace(torch.cat(sets), torch.arange(2, device=mean.device).flip(0).repeat_interleave(len(sets[0])))
    others = [i for i in range(len(sites)) if i != best]
    drawn = (
        np.random.default_rng(trial.settings.seed).permutation(others)[: trial.controls_in_behaviour].tolist()
        if trial.settings.ground
        else []
    )
    read = here.auroc(lambda x: eraser.found(x)[..., 0]) if eraser.rank else Interval(value=0.5, low=0.5, high=0.5)
    moved = _Moved(
        patch=judged[:, best],
        clamp=here.shares(site_effects(here.judge, "clamp", mean)[None])[:, 0],
        ablate=here.shares(site_effects(here.judge, "ablate")[None])[:, 0],
        random=judged[:, others],
    )
    return _score(
        trial,
        Unit(kind="head", site=sites[best]),
        len(sites),
        read,
        moved,
        [set_to(sites[best], trial.contrasts, mean)],
        [[set_to(sites[i], trial.contrasts, trial.choose.at(sites[i]).clean.values.mean((0, 1)))] for i in drawn],
    )


def promising_heads(scene: Scene, sites: list[Site]) -> list[Site]:
    """The heads that are worth patching: all, where EXACT operations suffice, else those that slopes nominate."""
    if len(sites) * len(scene) * operations(scene, sites[len(sites) // 2].layer) <= EXACT:
        return sites
    keys: list[At] = [(layer, "z") for layer in dict.fromkeys(site.layer for site in sites)]
    slope = slopes(scene, keys)
    guess = {key: (slope[key] * (scene.clean.seen[key] - scene.corrupt.seen[key])).sum((1, 3)).mean(0) for key in keys}
    values = np.array([float(guess[site.layer, "z"][site.head or 0]) for site in sites])
    return [sites[i] for i in _nominated(values, np.ones(len(sites)), scene, sites[len(sites) // 2].layer)]


def make_trial(
    lens: Lens, contrasts: Contrasts, site: Site, before: Lens | None = None, settings: TrialSettings | None = None
) -> Trial:
    """Both halves of a contrast's questions at a site: those on which repairs choose, if repairs are measured.

    `lens` is the model that is patched; clean activations come from it, too, unless `before` is another. Raises
    InputError as `make_scene` does, for fewer than two questions, and where the two sides do not differ.
    """
    settings = settings or TrialSettings()
    ground, share, seed = settings.ground, settings.share, settings.seed
    halves = _halves(contrasts, ground[0] if ground else None)
    questions = share_of(QUESTIONS, share / 2 if share < 1 else 1.0, 12)
    if not all(half.rows for half in halves):
        raise InputError("one half of the questions chooses units and the other judges them: give at least two")
    watch = _watch(lens, halves[0].first(questions), site, settings.layers)
    choose, judge = (make_scene(lens, half.first(questions), site, before, watch) for half in halves)
    counts = resample_counts(len(judge), seed)
    for scene in (choose, judge):
        whole = resampled_mean(scene.goal - scene.base, resample_counts(len(scene), seed))
        between = float(whole[0])
        if not between > 0 or not apart(whole, APART):
            raise InputError(
                f"the sides of the {contrasts.kind} contrast differ by {between:.2f} nats ({APART} are needed): "
                "nothing to carry"
            )
    first, second = (half.first(questions) for half in halves)
    return Trial(choose, judge, first, second, counts, before, settings)


def _watch(lens: Lens, contrasts: Contrasts, site: Site, layers: Sequence[int] | None) -> list[At]:
    """Places that are kept of every layer, where they fit; else of these layers alone."""
    spans = [row.spans.get(site.position, (0,)) if isinstance(site.position, str) else (0,) for row in contrasts.rows]
    columns = max(map(len, spans)) if site.position is not None else max(len(row.clean) for row in contrasts.rows)
    each = 4 * len(contrasts.rows) * columns * (lens.d_model + lens.d_mlp + lens.heads * lens.d_head)
    if layers is None or each * lens.layers <= WATCHED:
        layers = range(lens.layers)
    kinds: tuple[Component, ...] = ("resid_pre", "neurons", "z")
    return [(layer, kind) for layer in sorted({*layers, site.layer}) for kind in kinds if lens.has(kind)]


def _halves(contrasts: Contrasts, ground: Ground | None) -> tuple[Contrasts, Contrasts]:
    if ground is None:
        return contrasts.half(0), contrasts.half(1)
    choosing = {row.question for row in ground.contrasts.half(0).rows}
    first, second = (
        tuple(row for row in contrasts.rows if (row.question in choosing) == side) for side in (True, False)
    )
    words = contrasts.kind, contrasts.clean, contrasts.corrupt, contrasts.policy
    return Contrasts(*words, first), Contrasts(*words, second)
