"""From coarse to fine: groups of layers are grafted first, and opened where that does something."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mixturelens.grafting.effects import Judge, aligned
from mixturelens.grafting.graft import BEHIND, GraftTrial
from mixturelens.grafting.path import Attribution
from mixturelens.grafting.record import Block, Effects, Search

MATTERS = 0.1
"""Share of a change of R, of routing or of specialists, from which a group of components is opened."""
MANY = 24
"""Changed components above which not all of them are grafted one by one."""


@dataclass(frozen=True)
class _Group:
    name: str
    members: tuple[str, ...]
    layers: tuple[int, ...] = ()
    """Those that it has; none of what lies before and behind them."""

    def parts(self) -> tuple[_Group, ...]:
        """Two halves of several layers; the components of one; nothing of a component."""
        if len(self.layers) > 1:
            half = (len(self.layers) + 1) // 2
            return tuple(self._some(layers) for layers in (self.layers[:half], self.layers[half:]))
        return tuple(_Group(name, (name,)) for name in self.members) if len(self.members) > 1 else ()

    def _some(self, layers: tuple[int, ...]) -> _Group:
        kept = tuple(name for name in self.members if layer_of(name) in layers)
        return _Group(kept[0] if len(kept) == 1 else _called(layers), kept, layers)


def layer_of(component: str) -> int | None:
    """`L3.attn` is in layer 3; what lies before or behind the layers is in none."""
    return int(component[1:].split(".")[0]) if "." in component else None


def _called(layers: Sequence[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"


def _all_of(names: Sequence[str]) -> tuple[_Group, ...]:
    """What comes before the layers, all layers, and what comes behind them."""
    inside = tuple(name for name in names if layer_of(name) is not None)
    behind = tuple(name for name in names if name in BEHIND)
    before = tuple(name for name in names if name not in {*inside, *behind})
    layers = tuple(dict.fromkeys(layer for name in inside if (layer := layer_of(name)) is not None))
    found = (
        _Group("embeddings", before),
        _Group(_called(layers or (0,)), inside, layers),
        _Group("unembedding", behind),
    )
    return tuple(_Group(g.members[0], g.members) if len(g.members) == 1 else g for g in found if g.members)


def search(trial: GraftTrial, most: int, path: Attribution | None = None, everything: bool = False) -> Search:
    """Graft groups, and open those that matter, the largest effect first, until all are open or `most` grafts are made.

    A group matters if S with it, or R without it, moves MATTERS of a change of R. What is not opened is bounded by the
    graft of the group that it lies in; `path` says whether its parts may have cancelled there. `everything`: all are
    opened.
    """
    found: dict[str, Block] = {}
    waiting: list[tuple[float, int, _Group]] = []

    def look(groups: Sequence[_Group]) -> None:
        for group in groups:
            block = _look(trial, group)
            found[group.name] = block
            # where R changed nothing there is no bound, and nothing to open the group for
            heapq.heappush(waiting, (0.0 if block.bound is None else -block.bound, len(found), group))

    look(_all_of(trial.bench.names))
    short = []
    while waiting:
        bound, _, group = heapq.heappop(waiting)
        parts = group.parts()
        if not parts or not (everything or -bound >= MATTERS):
            continue
        if not everything and 2 * (len(found) + len(parts)) > most:
            short.append(group.name)
            continue
        found[group.name] = found[group.name].model_copy(update={"opened": True})
        look(parts)
    order = list(trial.bench.components)
    blocks = sorted(found.values(), key=lambda b: (order.index(b.components[0]), -len(b.components)))
    if path is not None:
        shares = _shares(path, trial.judge)
        most_of = {b.name: max(shares[path.parts.index(c)] for c in b.components) for b in blocks}
        blocks = [b.model_copy(update={"attributed": round(float(most_of[b.name]), 10)}) for b in blocks]
    return Search(
        questions=len(trial.judge.grid.index),
        threshold=0.0 if everything else MATTERS,
        grafts=2 * len(found),
        blocks=tuple(blocks),
        short=tuple(short),
    )


def pieces(found: Search) -> dict[str, tuple[str, ...]]:
    """Groups that were not opened, and components: every changed component is in one of them."""
    return {block.name: block.components for block in found.blocks if not block.opened}


def _look(trial: GraftTrial, group: _Group) -> Block:
    alone, without = (trial.effects(names) for names in (group.members, trial.bench.rest(group.members)))
    return Block(
        name=group.name, components=group.members, suffices=alone, without=without, bound=bound(alone, without)
    )


def bound(alone: Effects, without: Effects) -> float | None:
    """The largest share of a change that a group moves, put into S or taken from R; None where R changed nothing."""
    values = [
        value
        for change in ("routing", "specialists")
        for value, whole in ((getattr(alone, change).value, 0.0), (getattr(without, change).value, 1.0))
        if value is not None
        for value in (abs(value - whole),)
    ]
    return round(max(values), 10) if values else None


def _shares(path: Attribution, judge: Judge) -> np.ndarray:
    """Of every part: the largest share of a change, of routing or of specialists, that the path attributes to it."""
    values, change = np.nanmean(path.values, 0), np.nanmean(path.change, 0)  # [metric, part], [metric]
    cues = len(judge.cells.cues)
    whole = np.concatenate([judge.moved_cues, judge.moved_cells.T.flatten()])  # in the order of `metric_names`
    found = np.zeros(len(path.parts))
    for some in (slice(None, cues), slice(cues, None)):
        if whole[some].any():
            shares = aligned(values.T[:, some], np.broadcast_to(change[some], values.T[:, some].shape), whole[some])
            found = np.maximum(found, np.abs(shares))
    return found


def unsound(found: Search) -> tuple[str, ...]:
    """Groups that were left closed though the path gives one part of them more than the graft of all of them moves,
    and enough to matter: parts cancel there, and the bound says nothing."""
    return tuple(
        block.name
        for block in found.blocks
        if not block.opened
        and len(block.components) > 1
        and block.attributed is not None
        and block.attributed > (MATTERS if block.bound is None else max(MATTERS, block.bound))
    )
