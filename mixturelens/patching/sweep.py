"""Activation patching of many sites over contrasts: effects with intervals, rankings judged on held-out questions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mixturelens.contrasts import Contrasts
from mixturelens.hooks.batches import Sides, sides
from mixturelens.hooks.columns import Columns
from mixturelens.hooks.engine import MEMORY, TOGETHER, Engine, Source
from mixturelens.hooks.lens import Edit, Lens, Tokens
from mixturelens.hooks.metrics import LogOdds, to_numpy
from mixturelens.hooks.unpatched import Watched
from mixturelens.stats import resample_counts, resampled_mean, share
from mixturelens.types import PER_HEAD, Component, InputError, RunError, Site

Direction = Literal["denoise", "noise"]
"""`denoise`: clean activations into the corrupt run (what suffices); `noise`: the reverse (what is needed)."""

Progress = Callable[[int, int], None]

APART = 0.5
"""Nats by which the two sides of a contrast must differ, for the share that a site carries to mean anything."""
HELD = 768 << 20
"""Bytes of activations, of the clean run and of the run that is patched into, that are held at a time."""


@dataclass(frozen=True)
class Patched:
    """The metric (log-odds, nats) of every contrast: clean, corrupt, and with each site patched.

    `base` is the run that was patched into and `goal` the run that the activations came from.
    """

    sites: tuple[Site, ...]
    base: Float[np.ndarray, " question"]
    goal: Float[np.ndarray, " question"]
    patched: Float[np.ndarray, "site question"]

    def part(self, sites: Sequence[int]) -> Patched:
        """Some of the sites, by number."""
        return Patched(tuple(self.sites[i] for i in sites), self.base, self.goal, self.patched[list(sites)])

    def of(self, questions: Sequence[int]) -> Patched:
        """Some of the questions, by number."""
        some = list(questions)
        return Patched(self.sites, self.base[some], self.goal[some], self.patched[:, some])

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
) -> Patched:
    """Replace each site in turn, and read the metric.

    The activations come from the other prompt of each contrast; with `before`, from that checkpoint on the same prompt
    (cross-model patching, Prakash et al. 2024, arXiv 2402.14811). Raises InputError for sites that do not exist.
    """
    return _bench_of(lens, contrasts, sites, before).patch(sites, direction)


def jointly(lens: Lens, contrasts: Contrasts, groups: Sequence[Sequence[Site]], before: Lens | None = None) -> Patched:
    """Like `patch` (denoising), but all sites of a group are replaced at once.

    `sites` of the result holds the first site of each group.
    """
    return _bench_of(lens, contrasts, [site for group in groups for site in group], before).jointly(groups)


def _bench_of(lens: Lens, contrasts: Contrasts, sites: Sequence[Site], before: Lens | None) -> Bench:
    """A bench for one call: what others would take beside it is its own."""
    bench = Bench(lens, contrasts, _positions(sites), _activations(sites), before=before)
    bench.memory = MEMORY
    return bench


class Bench:
    """Both runs of contrasts, kept: sites at some positions can be patched again and again, without running them anew.

    With `before`, the clean run is that checkpoint's on the same prompt. Where the runs do not fit into HELD they are
    run again for each call, some questions at a time. Of activations, only the columns that sites lie in are kept.
    """

    def __init__(
        self,
        lens: Lens,
        contrasts: Contrasts,
        positions: Sequence[str | int | None],
        places: Sequence[tuple[int, Component]] = (),
        *,
        before: Lens | None = None,
    ) -> None:
        """`places`: the activations that sites are of; if not said, the residual stream and all outputs.

        Raises InputError for a position that some prompt lacks, or that is not the same in both prompts of a contrast.
        """
        self.lens, self.contrasts, self.before = lens, contrasts, before
        self.memory = MEMORY // 4
        """Bytes that patching may hold at a time, beside the runs that are kept."""
        self.both = sides(lens, contrasts)
        if any(self.both.shifts) and not all(isinstance(position, str) for position in positions):
            raise InputError(
                "the two prompts of a contrast differ in length: patch at named spans, not at all positions"
            )
        width = self.both.clean.ids.shape[1]
        usual: tuple[Component, ...] = ("resid_pre", *TOGETHER)
        self.places = list(places) or [(layer, component) for layer in range(lens.layers) for component in usual]
        columns = Columns(self.both.corrupt, self.both.corrupt_spans)
        self.first = min((min(columns.of(p, row)) for p in positions for row in range(len(self.both))), default=0)
        rows = _rows(lens, width, self.places, (width - self.first) / width)
        self.parts = [slice(start, start + rows) for start in range(0, len(self.both), rows)]
        self._kept: tuple[Engine, Engine] | None = None

    def _runs(self, part: Sides) -> tuple[Engine, Engine]:
        """An engine for the corrupt run and for the clean one. Raises RunError where there is no exact engine."""
        if self._kept is not None:
            return self._kept
        watch = Watched(self.places, self.first)
        found = (
            Engine(self.lens, part.corrupt, part.corrupt_spans, memory=self.memory, watch=watch),
            Engine(self.before or self.lens, part.clean, part.spans, memory=self.memory, watch=watch),
        )
        if len(self.parts) == 1:
            self._kept = found
        return found

    def patch(
        self, sites: Sequence[Site], direction: Direction = "denoise", progress: Progress | None = None
    ) -> Patched:
        """Replace each site in turn and read the metric, as the function `patch` does."""

        def work(engine: Engine, source: Source, metric: LogOdds) -> Tensor:
            return engine.sweep(sites, source, metric, progress)

        return self._each([[site] for site in sites], direction, work)

    def jointly(self, groups: Sequence[Sequence[Site]]) -> Patched:
        """Replace all sites of each group at once and read the metric, as the function `jointly` does.

        This is fast where each group is of outputs at one position, and as exact where it is not.
        """

        def work(engine: Engine, source: Source, metric: LogOdds) -> Tensor:
            return engine.sweep_groups(groups, source, metric)

        able = all(len(set(_positions(g))) == 1 and {s.component for s in g} <= set(TOGETHER) for g in groups)
        return self._each(groups, "denoise", work if able else None)

    def _each(
        self,
        groups: Sequence[Sequence[Site]],
        direction: Direction,
        work: Callable[[Engine, Source, LogOdds], Tensor] | None,
    ) -> Patched:
        for site in itertools.chain(*groups):
            self.lens.check(site)
        found = []
        for rows in self.parts:
            part = self.both.part(rows)
            try:
                runs = self._runs(part) if work else None
            except RunError:
                runs = None
            if runs is None or work is None:  # slower, and as exact
                found.append(self._whole(part, groups, direction))
                continue
            into, out_of = runs if direction == "denoise" else runs[::-1]
            patched = work(into, out_of.seen, part.metric)
            found.append((to_numpy(part.metric(into.logits)), to_numpy(part.metric(out_of.logits)), to_numpy(patched)))
        base, goal, patched = (np.concatenate(each, -1) for each in zip(*found, strict=True))
        return Patched(tuple(group[0] for group in groups), base, goal, patched)

    def _whole(
        self, part: Sides, groups: Sequence[Sequence[Site]], direction: Direction
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        denoise = direction == "denoise"
        into, out_of = (part.corrupt, part.clean) if denoise else (part.clean, part.corrupt)
        spans = part.corrupt_spans if denoise else part.spans
        source, goal = (self.before or self.lens).capture(out_of, _activations([s for group in groups for s in group]))
        base, patched = _full_runs(self.lens, into, spans, groups, source, part.metric)
        return to_numpy(base), to_numpy(part.metric(goal)), to_numpy(patched)


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
            # of a query, as everything else is of a position
            activation = rearrange(activation, "row head query key -> row query head key")
        return activation if unit is None else activation[:, :, unit]

    def edit(activation: Tensor) -> Tensor:
        at(activation)[mask] = at(source[site.layer, site.component])[mask].to(activation.dtype)
        return activation

    return edit


def _rows(lens: Lens, width: int, captured: Sequence[tuple[int, Component]], share: float = 1.0) -> int:
    """Questions whose activations fit; of what is captured, a share of the columns."""
    sizes = {"neurons": lens.d_mlp, "pattern": lens.heads * width}
    clean = sum(sizes.get(component, max(lens.d_model, lens.heads * lens.d_head)) for _, component in captured)
    stream, keys = lens.layers * lens.d_model, 2 * lens.layers * lens.kv_heads * lens.d_head
    return max(1, int(HELD // (4 * width * (share * clean + 2 * (share * stream + keys)))))


def _positions(sites: Sequence[Site]) -> list[str | int | None]:
    return list(dict.fromkeys(site.position for site in sites))


def _activations(sites: Sequence[Site]) -> list[tuple[int, Component]]:
    return list(dict.fromkeys((site.layer, site.component) for site in sites))


# --- which sites ------------------------------------------------------------------------------------------------------

BY_POSITION: tuple[Component, ...] = ("resid_pre", "attn_out", "mlp_out", "z")
EVERYWHERE: tuple[Component, ...] = ("q", "k", "v", "pattern")


def all_sites(lens: Lens, positions: Sequence[str | int], everywhere: bool = True) -> list[Site]:
    """Residual stream, attention, MLP and heads at each position; q, k, v and pattern of every head everywhere.

    Without what cannot be patched in this model, of which `left_out` says why.
    """
    found = []
    wanted: list[Component] = [*BY_POSITION, *(EVERYWHERE if everywhere else ())]
    components: list[Component] = [component for component in wanted if lens.why_not(component) is None]
    for layer in range(lens.layers):
        for component in components:
            heads = range(lens.heads_of(component)) if component in PER_HEAD else (None,)
            places = positions if component in BY_POSITION else (None,)
            found += [
                Site(layer=layer, component=component, head=head, position=place)
                for head, place in itertools.product(heads, places)
            ]
    return found


def left_out(lens: Lens) -> list[str]:
    """Why `all_sites` leaves components out of this model, a sentence each."""
    return [f"{component}: {why}" for component in (*BY_POSITION, *EVERYWHERE) if (why := lens.why_not(component))]


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
PARTNERS = 48
"""Heads, the strongest alone, among which a second one is looked for."""
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


def find_reader(
    lens: Lens, contrasts: Contrasts, position: str, seed: int = 0, searched: tuple[Bench, Patched] | None = None
) -> Reader:
    """The fewest heads (at most two) whose outputs at `position` carry a contrast.

    `searched`: heads that were patched on all of these questions, to choose among, and the bench that they were
    patched on; without it, every head is patched.

    Chosen on half of the questions: the strongest head and, if it does not carry ENOUGH, the head that adds most to it.
    Judged on the other half against every other group of as many heads among the RIVALS strongest there (which favours
    the rivals). Raises InputError if the two sides of the contrast do not differ, so that there is nothing to carry.
    """
    if len(contrasts.rows) < 2:
        raise InputError("one half of the questions chooses heads and the other judges them: give at least two")
    choose, judge = contrasts.half(0), contrasts.half(1)
    alone = searched[1] if searched else patch(lens, contrasts, head_sites(lens, position))

    def together(groups: Sequence[Sequence[Site]], which: Literal[0, 1]) -> Patched:
        if searched:
            return searched[0].jointly(groups).of(contrasts.rows_of(which))
        return jointly(lens, (choose, judge)[which], groups)

    heads_at = [i for i, s in enumerate(alone.sites) if s.component == "z" and s.head is not None]
    alone = alone.part([i for i in heads_at if alone.sites[i].position == position])
    strongest = alone.of(contrasts.rows_of(1))
    alone = alone.of(contrasts.rows_of(0))
    effects = alone.effects(resample_counts(len(choose.rows), seed, draws=1))[0]
    if np.isnan(effects).any():
        between = float((alone.goal - alone.base).mean())
        raise InputError(
            f"no {contrasts.kind} reader: the sides of the contrast differ by {between:.2f} nats ({APART} are needed)"
        )
    order = [alone.sites[i] for i in np.argsort(-effects)]
    heads, reached = (order[0],), float(effects.max())
    while reached < ENOUGH and len(heads) < min(MOST, len(order) - 1):  # others must be left to compare with
        groups = [(*heads, other) for other in order[:PARTNERS] if other not in heads]
        added = together(groups, 0).effects(resample_counts(len(choose.rows), seed, draws=1))[0]
        if float(added.max()) <= reached:
            break
        heads, reached = groups[int(added.argmax())], float(added.max())
    counts = resample_counts(len(judge.rows), seed)
    some = [strongest.sites[i] for i in np.argsort(-strongest.effects(counts[:1])[0])[:RIVALS]]
    rivals = [group for group in itertools.combinations(some, len(heads)) if set(group) != set(heads)]
    if not rivals:
        raise InputError("the model has one head: there is no other that a reader could be compared with")
    judged = together([heads, *rivals], 1).effects(counts)
    best = 1 + int(judged[0, 1:].argmax())
    return Reader(heads, reached, judged[:, 0], judged[:, 0] - judged[:, best], rivals[best - 1])
