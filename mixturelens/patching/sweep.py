"""Activation patching of many sites over contrasts: effects with intervals, rankings judged on held-out questions."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mixturelens.contrasts import Contrasts
from mixturelens.hooks.engine import MEMORY, TOGETHER, Columns, Engine
from mixturelens.hooks.lens import Edit, Lens, Tokens
from mixturelens.hooks.metrics import LogOdds
from mixturelens.hooks.sides import sides
from mixturelens.stats import resample_counts, resampled_mean, share
from mixturelens.types import PER_HEAD, Component, InputError, RunError, Site

Direction = Literal["denoise", "noise"]
"""`denoise`: clean activations into the corrupt run (what suffices); `noise`: the reverse (what is needed)."""

Progress = Callable[[int, int], None]

APART = 0.5
"""Nats by which the two sides of a contrast must differ, for the share that a site carries to mean anything."""
ROWS = 512
"""Questions whose activations are held at a time."""


@dataclass(frozen=True)
class Patched:
    """The metric (log-odds, nats) of every contrast: clean, corrupt, and with each site patched.

    `base` is the run that was patched into and `goal` the run that the activations came from.
    """

    sites: tuple[Site, ...]
    base: Float[np.ndarray, " question"]
    goal: Float[np.ndarray, " question"]
    patched: Float[np.ndarray, "site question"]

    def effects(self, counts: Int[np.ndarray, "draw question"]) -> Float[np.ndarray, "draw site"]:
        """(patched - base) / (goal - base), a ratio of means over questions, in every bootstrap sample.

        NaN, not measured, where the two runs surely differ by less than APART: there is nothing to share out.
        """
        moved = resampled_mean((self.patched - self.base).T, counts)
        return share(moved, resampled_mean(self.goal - self.base, counts), APART)


def patch(
    lens: Lens,
    contrasts: Contrasts,
    sites: Sequence[Site],
    *,
    direction: Direction = "denoise",
    before: Lens | None = None,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> Patched:
    """Replace each site in turn, and read the metric.

    The activations come from the other prompt of each contrast; with `before`, from that checkpoint on the same prompt
    (cross-model patching, Prakash et al. 2024, arXiv 2402.14811). Raises InputError for sites that do not exist.
    """
    for site in sites:
        lens.check(site)
    both = sides(lens, contrasts)
    if any(both.shifts) and any(site.position is None or isinstance(site.position, int) for site in sites):
        raise InputError("the two prompts of a contrast differ in length: patch at named spans, not at all positions")
    base, goal, patched = [], [], []
    for start in range(0, len(both), ROWS):
        part = both.part(slice(start, start + ROWS))
        into, out_of, spans = (
            (part.corrupt, part.clean, part.corrupt_spans)
            if direction == "denoise"
            else (part.clean, part.corrupt, part.spans)
        )
        source, logits = (before or lens).capture(out_of, _activations(sites))
        goal.append(_numpy(part.metric(logits)))
        try:
            engine = Engine(lens, into, spans, memory=memory)
        except RunError:  # its blocks cannot be called alone: slower, and as exact
            runs = _full_runs(lens, into, spans, [[site] for site in sites], source, part.metric)
        else:
            runs = part.metric(engine.logits), engine.sweep(sites, source, part.metric, progress)
        base.append(_numpy(runs[0]))
        patched.append(_numpy(runs[1]))
    return Patched(tuple(sites), np.concatenate(base), np.concatenate(goal), np.concatenate(patched, 1))


def jointly(
    lens: Lens,
    contrasts: Contrasts,
    groups: Sequence[Sequence[Site]],
    before: Lens | None = None,
    *,
    memory: int = MEMORY,
) -> Patched:
    """Like `patch` (denoising), but all sites of a group are replaced at once. `sites` holds each group's first."""
    both = sides(lens, contrasts)
    sites = [site for group in groups for site in group]
    for site in sites:
        lens.check(site)
    source, goal = (before or lens).capture(both.clean, _activations(sites))
    engine = None
    if all(len({s.position for s in group}) == 1 and {s.component for s in group} <= set(TOGETHER) for group in groups):
        with contextlib.suppress(RunError):  # its blocks cannot be called alone: slower, and as exact
            engine = Engine(lens, both.corrupt, both.corrupt_spans, memory=memory)
    if engine is None:
        base, patched = _full_runs(lens, both.corrupt, both.corrupt_spans, groups, source, both.metric)
    else:
        base, patched = both.metric(engine.logits), engine.sweep_groups(groups, source, both.metric)
    first = tuple(group[0] for group in groups)
    return Patched(first, _numpy(base), _numpy(both.metric(goal)), _numpy(patched))


@torch.inference_mode()
def _full_runs(
    lens: Lens,
    into: Tokens,
    spans: Sequence[Mapping[str, Sequence[int]]],
    groups: Sequence[Sequence[Site]],
    source: Mapping[tuple[int, Component], Tensor],
    metric: LogOdds,
) -> tuple[Float[Tensor, " row"], Float[Tensor, "group row"]]:
    """The metric without patches, and with each group of sites replaced: one forward each."""
    columns = Columns(into, spans)
    values = []
    for group in groups:
        edits = [(lens.point(s.layer, s.component), _replace(s, columns.mask(s.position), source)) for s in group]
        values.append(metric(lens.run(into, edits)[:, -1]))
    return metric(lens.run(into)[:, -1]), torch.stack(values)


def _replace(site: Site, mask: Bool[Tensor, "row pos"], source: Mapping[tuple[int, Component], Tensor]) -> Edit:
    unit = site.head if site.component in PER_HEAD else site.neuron

    def at(activation: Tensor) -> Tensor:
        if site.component == "pattern":
            activation = activation.transpose(1, 2)  # of a query, as everything else is of a position
        return activation if unit is None else activation[:, :, unit]

    def edit(activation: Tensor) -> Tensor:
        at(activation)[mask] = at(source[site.layer, site.component])[mask].to(activation.dtype)
        return activation

    return edit


def _activations(sites: Sequence[Site]) -> list[tuple[int, Component]]:
    return list(dict.fromkeys((site.layer, site.component) for site in sites))


def _numpy(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()


# --- which sites ------------------------------------------------------------------------------------------------------

BY_POSITION: tuple[Component, ...] = ("resid_pre", "attn_out", "mlp_out", "z")
EVERYWHERE: tuple[Component, ...] = ("q", "k", "v", "pattern")


def all_sites(lens: Lens, positions: Sequence[str | int], everywhere: bool = True) -> list[Site]:
    """Residual stream, attention, MLP and heads at each position; q, k, v and pattern of every head everywhere."""
    found = []
    for layer in range(lens.layers):
        for component in (*BY_POSITION, *(EVERYWHERE if everywhere else ())):
            heads = range(lens.heads_of(component)) if component in PER_HEAD else (None,)
            places = positions if component in BY_POSITION else (None,)
            found += [
                Site(layer=layer, component=component, head=head, position=place)
                for head, place in itertools.product(heads, places)
            ]
    return found


def head_sites(lens: Lens, position: str | int | None) -> list[Site]:
    """The output of every head at one position."""
    return [
        Site(layer=layer, component="z", head=head, position=position)
        for layer in range(lens.layers)
        for head in range(lens.heads)
    ]


# --- choosing and judging ---------------------------------------------------------------------------------------------

ENOUGH = 0.9
"""Share of the effect from which a group of heads is taken to be the whole reader."""
MOST = 2
"""Heads that a reader may have; with more, it is not one place."""
RIVALS = 12
"""Heads whose groups a reader is compared with: the strongest alone, on the questions that judge."""


@dataclass(frozen=True)
class Reader:
    """Heads chosen on one half of the questions, judged on the other half."""

    heads: tuple[Site, ...]
    chosen_effect: float
    """Of all of them together, on the half that chose."""
    effect: Float[np.ndarray, " draw"]
    """Of all of them together, on the other half."""
    margin: Float[np.ndarray, " draw"]
    """That, less the effect of the best other group of as many heads."""
    rival: tuple[Site, ...]


def find_reader(lens: Lens, contrasts: Contrasts, position: str, seed: int = 0) -> Reader:
    """The fewest heads (at most two) whose outputs at `position` carry a contrast.

    Chosen on half of the questions: the strongest head and, if it does not carry ENOUGH, the head that adds most to it.
    Judged on the other half against every other group of as many heads among the RIVALS strongest there (which favours
    the rivals). Raises InputError if the two sides of the contrast do not differ, so that there is nothing to carry.
    """
    if len(contrasts.rows) < 2:
        raise InputError("one half of the questions chooses heads and the other judges them: give at least two")
    choose, judge = contrasts.half(0), contrasts.half(1)
    alone = patch(lens, choose, head_sites(lens, position))
    effects = alone.effects(resample_counts(len(choose.rows), seed, draws=1))[0]
    if np.isnan(effects).any():
        between = float((alone.goal - alone.base).mean())
        raise InputError(
            f"no {contrasts.kind} reader: the sides of the contrast differ by {between:.2f} nats ({APART} are needed)"
        )
    order = [alone.sites[i] for i in np.argsort(-effects)]
    heads, reached = (order[0],), float(effects.max())
    while reached < ENOUGH and len(heads) < min(MOST, len(order) - 1):  # others must be left to compare with
        groups = [(*heads, other) for other in order if other not in heads]
        together = jointly(lens, choose, groups).effects(resample_counts(len(choose.rows), seed, draws=1))[0]
        if float(together.max()) <= reached:
            break
        heads, reached = groups[int(together.argmax())], float(together.max())
    counts = resample_counts(len(judge.rows), seed)
    strongest = patch(lens, judge, head_sites(lens, position))
    some = [strongest.sites[i] for i in np.argsort(-strongest.effects(counts[:1])[0])[:RIVALS]]
    rivals = [group for group in itertools.combinations(some, len(heads)) if set(group) != set(heads)]
    if not rivals:
        raise InputError("the model has one head: there is no other that a reader could be compared with")
    judged = jointly(lens, judge, [heads, *rivals]).effects(counts)
    best = 1 + int(judged[0, 1:].argmax())
    return Reader(heads, reached, judged[:, 0], judged[:, 0] - judged[:, best], rivals[best - 1])
