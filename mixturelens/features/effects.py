"""What single units do to a contrast: the metric with one unit patched, clamped or ablated, exactly.

A unit reads an activation and writes into it (`Dictionary`): a feature of an SAE, a neuron, a probe's direction. Only
what it writes is changed, so what its dictionary leaves unexplained stays in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixturelens.contrasts import Contrasts
from mixturelens.features.dictionary import Dictionary
from mixturelens.features.splice import At
from mixturelens.hooks.batches import sides
from mixturelens.hooks.columns import Columns, Spans
from mixturelens.hooks.engine import Engine
from mixturelens.hooks.lens import Edit, Lens, Tokens
from mixturelens.hooks.metrics import LogOdds, to_numpy
from mixturelens.patching.sweep import APART
from mixturelens.stats import resampled_mean, share
from mixturelens.types import PER_HEAD, InputError, RunError, Site

Do = Literal["patch", "clamp", "ablate"]
"""`patch`: the unit's activation is that of the clean side, token by token; `clamp`: a fixed number; `ablate`: what the
unit writes is taken away, on both sides."""


Seen = dict[At, Float[Tensor, "question column *unit"]]
"""Place -> its activations at the tokens of a position."""


@dataclass(frozen=True)
class Run:
    """One side of contrasts in its model, as it is, and its activations at one site (of the position's tokens)."""

    engine: Engine
    spans: tuple[Spans, ...]
    metric: LogOdds
    site: Site
    seen: Seen
    """At the site's position, and of as many places as were asked for, from one forward."""
    own: Float[Tensor, " question"]
    """The metric (log-odds, nats)."""

    @property
    def values(self) -> Float[Tensor, "question column d"]:
        """Activations at the site, of every question and token of the position; of one head where it names one."""
        found = self.seen[self.site.layer, self.site.component]
        return found if self.site.head is None else found[:, :, self.site.head]

    @cached_property
    def columns(self) -> dict[tuple[int, ...], Int[Tensor, " question"]]:
        """Columns of the position -> the rows that have it there."""
        rows: dict[tuple[int, ...], list[int]] = {}
        columns = Columns(self.engine.base, self.spans)
        for row in range(len(self.own)):
            rows.setdefault(columns.of(self.site.position, row), []).append(row)
        return {at: torch.tensor(some, device=self.own.device) for at, some in rows.items()}

    @property
    def window(self) -> int:
        """Columns that a patch at the position changes, at most: its first one and all behind it."""
        return self.engine.width - min(at[0] for at in self.columns)

    @cached_property
    def most(self) -> int:
        """Runs that fit into the engine's memory at a time."""
        lens, engine, window = self.engine.lens, self.engine, self.window
        per_token = 8 * lens.d_model + 3 * lens.d_mlp + 3 * lens.heads * engine.width
        kept = engine.width * (self.values.shape[-1] * lens.heads_of(self.site.component) + 5 * lens.d_model)
        return max(1, int(engine.memory // (4 * (window * per_token + kept + 3 * engine.logits.shape[1]))))

    @torch.no_grad()
    def with_values(self, values: Float[Tensor, "run column d"], rows: Int[Tensor, " run"]) -> Float[Tensor, " run"]:
        """The metric (log-odds, nats) of these rows with other values at the site; a row may occur several times."""
        found = torch.zeros(len(rows), device=self.own.device)
        for start in range(0, len(rows), self.most):
            part = slice(start, start + self.most)
            given = values[part].to(self.engine.logits.dtype)
            found[part] = self.metric(self.engine.logits_with(self.site, given, rows[part]), rows[part]).float()
        return found

    def at(self, site: Site) -> Run:
        """The same run, looked at elsewhere. Raises InputError for a site that does not exist or is no activation."""
        lens = self.engine.lens
        key: At = (site.layer, site.component)
        _check_unit(lens, site)
        if site.position == self.site.position and key in self.seen:
            return replace(self, site=site)
        edits, seen = _noting(lens, _columns(self.engine.base, self.spans, site), [key])
        with torch.no_grad():
            lens.run(self.engine.base, edits)
        return replace(self, site=site, seen=seen)


@dataclass(frozen=True)
class Scene:
    """Both sides of contrasts at one site: what units take from the clean run is put into the corrupt run."""

    clean: Run
    corrupt: Run

    @property
    def site(self) -> Site:
        """Where both sides are looked at."""
        return self.corrupt.site

    @property
    def base(self) -> Float[np.ndarray, " question"]:
        """The metric (log-odds, nats) of the corrupt side."""
        return to_numpy(self.corrupt.own)

    @property
    def goal(self) -> Float[np.ndarray, " question"]:
        """That of the clean side."""
        return to_numpy(self.clean.own)

    def __len__(self) -> int:
        return len(self.corrupt.own)

    def at(self, site: Site) -> Scene:
        """The same contrasts, looked at elsewhere. Raises InputError as `make_scene` does."""
        return Scene(self.clean.at(site), self.corrupt.at(site))

    def shares(
        self, moved: Float[np.ndarray, "unit question"], counts: Int[np.ndarray, "draw question"]
    ) -> Float[np.ndarray, "draw unit"]:
        """moved / (goal - base), a ratio of means over questions, in every bootstrap sample.

        NaN, not measured, where the two sides surely differ by less than APART nats.
        """
        return share(resampled_mean(moved.T, counts), resampled_mean(self.goal - self.base, counts), APART)


def make_scene(
    lens: Lens, contrasts: Contrasts, site: Site, before: Lens | None = None, watch: Sequence[At] = ()
) -> Scene:
    """Run both sides of contrasts, and keep what they have at a site (one with a position, or every token).

    Clean activations come from the clean prompts of the same model; with `before`, from that checkpoint (for contrasts
    of checkpoints: on the same prompts). `watch`: places that will be looked at, too, at the same position.

    Raises InputError for a site that does not exist or is no activation, prompts that have the position at several
    widths, and a model whose blocks cannot be run alone.
    """
    both = sides(lens, contrasts)
    if any(both.shifts) and not isinstance(site.position, str):
        raise InputError("the two prompts of a contrast differ in length: name a span, not a token or all of them")
    runs = []
    for model, batch, spans in ((before or lens, both.clean, both.spans), (lens, both.corrupt, both.corrupt_spans)):
        _check_unit(model, site)
        edits, seen = _noting(model, _columns(batch, spans, site), [(site.layer, site.component), *watch])
        try:
            with model.hooked(edits):
                engine = Engine(model, batch, spans)
        except RunError as error:
            raise InputError(f"effects of units need the patch engine: {error}") from None
        runs.append(Run(engine, spans, both.metric, site, seen, both.metric(engine.logits).float()))
    clean, corrupt = runs
    if clean.values.shape != corrupt.values.shape:
        raise InputError(f"{site}: its activations have another shape on the other side")
    return Scene(clean, corrupt)


def _check_unit(lens: Lens, site: Site) -> None:
    lens.check(site)
    if (
        site.component == "pattern"
        or site.neuron is not None
        or (site.component in PER_HEAD) != (site.head is not None)
    ):
        raise InputError(f"{site}: units read the residual stream, an output, the neurons of a layer, or one head")


def _columns(batch: Tokens, spans: tuple[Spans, ...], site: Site) -> Int[Tensor, "question column"]:
    columns = Columns(batch, spans)
    places = [columns.of(site.position, row) for row in range(len(batch))]
    if len({len(place) for place in places}) > 1:
        raise InputError(f"{site}: prompts differ in their number of tokens there, so units cannot be compared there")
    return torch.tensor(places, device=batch.ids.device)


def _noting(lens: Lens, at: Int[Tensor, "question column"], keys: Sequence[At]) -> tuple[list[tuple[Any, Edit]], Seen]:
    """Hooks that keep what the first forward has at these columns, and what they keep."""
    seen: Seen = {}
    rows = torch.arange(len(at), device=at.device)[:, None]

    def keep(key: At) -> Edit:
        def store(activation: Tensor) -> None:
            if key not in seen:
                seen[key] = activation.detach()[rows, at].float()

        return store

    return [(lens.point(*key), keep(key)) for key in dict.fromkeys(keys)], seen


# --- effects ----------------------------------------------------------------------------------------------------------


def unit_effects(
    scene: Scene, dictionary: Dictionary, do: Do = "patch", to: Float[Tensor, " unit"] | None = None
) -> Float[np.ndarray, "unit question"]:
    """Nats by which each unit alone moves the metric of each question; `scene.shares` makes shares of them.

    With f the unit's activation at a token of the site's position (every token of it is changed at once):

    - `patch`: the corrupt run with x + (f(clean) - f(corrupt)) write, less the corrupt run
    - `clamp`: the corrupt run with x + (to - f(corrupt)) write, less the corrupt run; `to` is one number a unit
    - `ablate`: what the difference between the sides loses when both have x - f(x) write

    Where f is not changed nothing is run: the effect is exactly 0. Raises InputError for units of another size than the
    site's activations, and for a `clamp` without numbers.
    """
    result = torch.zeros(len(dictionary), len(scene), device=scene.corrupt.own.device)
    for sign, run, change in _changes(scene, dictionary, do, to):
        result += sign * _moved(run, dictionary, change)
    return to_numpy(result)


def joint_effects(
    scene: Scene, dictionary: Dictionary, groups: Sequence[Sequence[int]]
) -> Float[np.ndarray, "group question"]:
    """Nats by which the units of each group, patched together, move the metric of each question, as `unit_effects` of
    one alone: a concept may need one feature on and another off. Raises InputError as `unit_effects` does.
    """
    ((_, run, change),) = _changes(scene, dictionary, "patch", None)
    rows = torch.arange(len(scene), device=run.own.device)
    result = torch.zeros(len(groups), len(scene), device=rows.device)
    for number, group in enumerate(groups):
        units = torch.tensor(list(group), dtype=torch.long, device=rows.device)
        result[number] = run.with_values(run.values + change[..., units] @ dictionary.write[units], rows) - run.own
    return to_numpy(result)


Change = tuple[float, Run, Float[Tensor, "question column unit"]]
"""How an effect counts, the run that is changed, and how much of its vector each unit writes more."""


def check_size(scene: Scene, dictionary: Dictionary) -> None:
    """Raise InputError where the units of a dictionary read more or fewer numbers than the scene's site has."""
    size = scene.corrupt.values.shape[-1]
    if dictionary.read.shape[1] != size:
        raise InputError(f"{scene.site}: units read {dictionary.read.shape[1]} numbers, where there are {size}")


def _changes(scene: Scene, dictionary: Dictionary, do: Do, to: Float[Tensor, " unit"] | None) -> list[Change]:
    check_size(scene, dictionary)
    clean, corrupt = (dictionary.encode(run.values) for run in (scene.clean, scene.corrupt))
    scale = dictionary.scale(scene.corrupt.values)
    if do == "patch":
        return [(1.0, scene.corrupt, scale * (clean - corrupt))]
    if do == "ablate":
        return [
            (1.0, scene.corrupt, -scale * corrupt),
            (-1.0, scene.clean, -dictionary.scale(scene.clean.values) * clean),
        ]
    if to is None or len(to) != len(dictionary):
        raise InputError(f"{scene.site}: a clamp needs a number for each of the {len(dictionary)} units")
    return [(1.0, scene.corrupt, scale * (to - corrupt))]


@torch.no_grad()
def _moved(
    run: Run, dictionary: Dictionary, change: Float[Tensor, "question column unit"]
) -> Float[Tensor, "unit question"]:
    """The metric with each unit's activation changed, less the metric as it is."""
    result = torch.zeros(len(dictionary), len(run.own), device=run.own.device)
    units, questions = (change != 0).any(1).T.nonzero(as_tuple=True)
    most = run.most
    for start in range(0, len(units), most):
        unit, row = units[start : start + most], questions[start : start + most]
        values = run.values[row] + change[row, :, unit][..., None] * dictionary.write[unit][:, None]
        result[unit, row] = run.with_values(values, row) - run.own[row]
    return result


def site_effects(
    scene: Scene, do: Do = "patch", to: Float[Tensor, " d"] | None = None
) -> Float[np.ndarray, " question"]:
    """Nats by which the whole of a site, such as a head, moves the metric of each question: patched, set to the vector
    `to`, or set to zero on both sides.

    Raises InputError for a `clamp` without a vector of the site's size.
    """
    clean, corrupt = scene.clean, scene.corrupt
    rows = torch.arange(len(scene), device=corrupt.own.device)
    if do == "ablate":
        lost = [run.with_values(torch.zeros_like(run.values), rows) - run.own for run in (corrupt, clean)]
        return to_numpy(lost[0] - lost[1])
    if do == "clamp" and (to is None or to.shape != corrupt.values.shape[-1:]):
        raise InputError(f"{scene.site}: a clamp needs a vector of {corrupt.values.shape[-1]} numbers")
    values = clean.values if to is None else to.expand_as(corrupt.values)
    return to_numpy(corrupt.with_values(values, rows) - corrupt.own)


# --- many units at once -----------------------------------------------------------------------------------------------


def operations(scene: Scene, layer: int) -> float:
    """Floating-point operations of running one row with other values at the scene's position of a layer: a
    multiplication and an addition for each weight that is used again.
    """
    lens = scene.corrupt.engine.lens
    weights = sum(parameter.numel() for parameter in lens.bridge.blocks.parameters()) / lens.layers
    head = lens.d_model * scene.corrupt.engine.logits.shape[1]
    return 2.0 * (weights * (lens.layers - layer) * scene.corrupt.window + head)


def slopes(scene: Scene, keys: Sequence[At]) -> dict[At, Float[Tensor, "question column *unit"]]:
    """What the corrupt side's metric gains for each unit of activation: its gradient, at places that are watched.

    It is linear where the truth is not: it nominates units, and says nothing of what they do.
    """
    run, first = scene.corrupt, min(layer for layer, _ in keys)
    engine, lens = run.engine, run.engine.lens
    found = {key: torch.zeros_like(run.seen[key]) for key in keys}
    start_at = Site(layer=first, component="resid_pre", position=run.site.position)
    step = max(1, run.most // (2 * lens.layers))
    for columns, rows in run.columns.items():
        for part in rows.split(step):
            added: dict[At, Tensor] = {}

            def add(key: At, added: dict[At, Tensor] = added) -> Edit:
                def edit(activation: Tensor) -> Tensor:
                    added[key] = torch.zeros_like(activation, requires_grad=True)
                    return activation + added[key]

                return edit

            with torch.enable_grad(), lens.hooked([(lens.point(*key), add(key)) for key in keys]):
                given = run.seen[first, "resid_pre"][part].to(engine.logits.dtype)
                moved = run.metric(engine.logits_with(start_at, given, part), part).sum()
                gradients = torch.autograd.grad(moved, list(added.values()), allow_unused=True)
            for key, gradient in zip(added, gradients, strict=True):
                if gradient is not None:
                    places = _inside(run, key[0], columns)
                    found[key][part[:, None], [n for n, _ in places]] = gradient[:, [at for _, at in places]].float()
    return found


@torch.no_grad()
def sites_together(scene: Scene, groups: Sequence[Sequence[Site]]) -> Float[np.ndarray, "group question"]:
    """Nats by which groups of heads or neurons, of watched layers at the scene's position, move the corrupt side's
    metric: all of a group replaced at once by what the clean side has.
    """
    run = scene.corrupt
    engine, lens = run.engine, run.engine.lens
    result = torch.zeros(len(groups), len(scene), device=run.own.device)
    for number, group in enumerate(groups):
        first = min(site.layer for site in group)
        start_at = Site(layer=first, component="resid_pre", position=run.site.position)
        for columns, every in run.columns.items():
            for rows in every.split(run.most):

                def put(site: Site, columns: tuple[int, ...] = columns, rows: Tensor = rows) -> Edit:
                    unit = site.head if site.component in PER_HEAD else site.neuron
                    given = scene.clean.seen[site.layer, site.component][rows]
                    places = _inside(run, site.layer, columns)
                    source, target = [n for n, _ in places], [at for _, at in places]

                    def edit(activation: Tensor) -> Tensor:
                        if unit is None:
                            activation[:, target] = given[:, source].to(activation.dtype)
                        else:
                            activation[:, target, unit] = given[:, source, unit].to(activation.dtype)
                        return activation

                    return edit

                edits = [(lens.point(site.layer, site.component), put(site)) for site in group]
                given = run.seen[first, "resid_pre"][rows].to(engine.logits.dtype)
                with lens.hooked(edits):
                    logits = engine.logits_with(start_at, given, rows)
                result[number, rows] = run.metric(logits, rows).float() - run.own[rows]
    return to_numpy(result)


def _inside(run: Run, layer: int, columns: tuple[int, ...]) -> list[tuple[int, int]]:
    """(number of a column of the position, where it lies in a layer's window): of the last layer, only the last."""
    if layer == run.engine.lens.layers - 1:
        return [(n, 0) for n, column in enumerate(columns) if column == run.engine.width - 1]
    return [(n, column - columns[0]) for n, column in enumerate(columns)]


@torch.no_grad()
def heads_alone(scene: Scene, sites: Sequence[Site]) -> Float[np.ndarray, "site question"]:
    """Nats by which each head of watched layers moves the corrupt side's metric alone."""
    run, source = scene.corrupt, {}
    for layer in dict.fromkeys(site.layer for site in sites):
        seen = scene.clean.seen[layer, "z"]
        whole = seen.new_zeros(len(seen), run.engine.width, *seen.shape[2:])
        for columns, rows in run.columns.items():
            whole[rows[:, None], list(columns)] = seen[rows]
        source[layer, "z"] = whole
    return to_numpy(run.engine.sweep(sites, source, run.metric).float() - run.own)
