"""From coarse to fine: the residual stream at every layer and span, then the heads and MLPs that slopes nominate.

Exhaustive patching takes every head at every position, which on 30 layers is hours. Here the residual stream says where
something moves, slopes nominate (`patching.slopes`), and what is nominated is patched exactly. Of what is left a random
sample is patched exactly, too: how much the largest of them moves says what may have been missed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from mixturelens.contrasts import Contrasts
from mixturelens.hooks.sides import sides
from mixturelens.patching.slopes import DROPPED, strengths
from mixturelens.patching.sweep import Bench, Patched
from mixturelens.stats import resample_counts
from mixturelens.types import PER_HEAD, Component, Frozen, Site

OUTPUTS: tuple[Component, ...] = ("attn_out", "mlp_out", "z")
NOMINATED = 8
"""One in so many outputs is nominated, at most."""
LEAST_NOMINATED = 24
SAMPLED = 24
"""Outputs that were not nominated, of which this many are patched all the same."""
SLOPED = 16
"""Questions on which slopes are taken."""
MOVED = 0.02
"""Change of the residual stream's effect from one layer to the next from which something moved there."""
WIDE = 1 / 3
"""Share of the prompt from which a span's window is wide, so that only some layers are patched there."""
LAYERS = 8
"""Those layers."""


class Unseen(Frozen):
    """Outputs that were not nominated, and what a random sample of them moves."""

    sites: int
    sampled: int
    largest: float
    """|Effect| of the largest of the sample."""
    share: float
    """At most this share of them moves more than that, with 95% confidence."""


def outputs(layers: int, heads: int, positions: Sequence[str | int]) -> list[Site]:
    """Attention, MLP and every head at each position."""
    return [
        Site(layer=layer, component=component, head=head, position=position)
        for layer in range(layers)
        for component in OUTPUTS
        for head in (range(heads) if component in PER_HEAD else (None,))
        for position in positions
    ]


def stream(layers: int, contrasts: Contrasts, positions: Sequence[str]) -> list[Site]:
    """The residual stream before each layer; before some of them where a span's window is wide."""
    found = []
    for position in positions:
        step = -(-layers // LAYERS) if _window(contrasts, position) > WIDE else 1
        found += [Site(layer=n, component="resid_pre", position=position) for n in range(0, layers, step)]
    return found


def _window(contrasts: Contrasts, position: str) -> float:
    """Share of a prompt that lies at or behind a span, mean over questions."""
    return float(np.mean([1 - min(row.spans[position]) / len(row.clean) for row in contrasts.rows]))


def patched_tokens(layers: int, contrasts: Contrasts, sites: Sequence[Site]) -> float:
    """Tokens that pass through all layers when each site is patched in turn: of a patch only what comes after it."""
    width = max(len(row.clean) for row in contrasts.rows)
    window = {
        position: width if not isinstance(position, str) else width * _window(contrasts, position)
        for position in dict.fromkeys(site.position for site in sites)
    }
    window |= {position: width - position for position in window if isinstance(position, int)}
    return len(contrasts.rows) * sum(window[site.position] * (layers - site.layer) / layers for site in sites)


def coarse_tokens(layers: int, heads: int, contrasts: Contrasts, positions: Sequence[str]) -> tuple[float, float]:
    """Tokens forwards, and tokens there and back, that `coarse` takes."""
    every = outputs(layers, heads, positions)
    some = every[:: max(1, len(every) // (_nominated(len(every)) + SAMPLED))]
    width = max(len(row.clean) for row in contrasts.rows)
    captured = 2 * len(contrasts.rows) * width
    exact = patched_tokens(layers, contrasts, [*stream(layers, contrasts, positions), *some])
    sloped = 2 * min(len(contrasts.rows), SLOPED) * width
    return exact + captured + 2 * sloped, 2 * sloped * max(_window(contrasts, p) for p in positions) * (1 + DROPPED)


def _nominated(number: int) -> int:
    return max(LEAST_NOMINATED, number // NOMINATED)


def coarse(bench: Bench, positions: Sequence[str], seed: int = 0) -> tuple[Patched, Unseen]:
    """Patch (denoising) where something moves, and say what was passed over.

    >>> found, unseen = coarse(Bench(lens, contrasts, ["last", "policy"]), ["last", "policy"])   # doctest: +SKIP
    """
    lens, contrasts = bench.lens, bench.contrasts
    every = [site for site in outputs(lens.layers, lens.heads, positions) if lens.why_not(site.component) is None]
    whole = bench.patch(stream(lens.layers, contrasts, positions))
    moved = _moved(lens.layers, contrasts, whole)
    few = contrasts.part(contrasts.rows_of(0)[:SLOPED] if len(contrasts.rows) > 1 else [0])
    strength = strengths(lens, sides(lens, few), every, bench.before).tolist()
    # where the stream does not move, an output can still write what others take back: last, but not left out
    order = sorted(range(len(every)), key=lambda i: -strength[i] * (2 if _at(every[i]) in moved else 1))
    nominated = _with_heads(every, order)
    rest = sorted(set(order) - set(nominated))
    drawn = np.random.default_rng(seed).permutation(len(rest))[:SAMPLED]
    exact = bench.patch([every[i] for i in (*nominated, *(rest[i] for i in drawn))])
    found = Patched(
        (*whole.sites, *exact.sites), whole.base, whole.goal, np.concatenate([whole.patched, exact.patched])
    )
    passed = np.abs(exact.effects(resample_counts(len(contrasts.rows), seed, draws=1))[0, len(nominated) :])
    largest = float(np.nan_to_num(passed).max(initial=0.0))
    share = 1 - 0.05 ** (1 / len(drawn)) if len(drawn) < len(rest) else 0.0
    return found, Unseen(sites=len(rest), sampled=len(drawn), largest=round(largest, 6), share=round(share, 6))


def _with_heads(every: Sequence[Site], order: Sequence[int]) -> list[int]:
    """The first in order; with attention all of its heads, which may carry only together what it carries."""
    heads: dict[tuple[int, str | int | None], list[int]] = {}
    for i, site in enumerate(every):
        if site.component == "z":
            heads.setdefault(_at(site), []).append(i)
    found: dict[int, None] = {}
    for i in order:
        if len(found) >= _nominated(len(every)):
            break
        found |= dict.fromkeys([i, *(heads[_at(every[i])] if every[i].component == "attn_out" else ())])
    return list(found)


def _at(site: Site) -> tuple[int, str | int | None]:
    return site.layer, site.position


def _moved(layers: int, contrasts: Contrasts, whole: Patched) -> set[tuple[int, str | int | None]]:
    """(layer, position) at which the effect of the residual stream changes."""
    effects = dict(zip(whole.sites, whole.effects(resample_counts(len(contrasts.rows), 0, draws=1))[0], strict=True))
    found = set()
    for position in dict.fromkeys(site.position for site in whole.sites):
        known = sorted((site.layer, value) for site, value in effects.items() if site.position == position)
        # behind the last layer the last token alone is read
        at_end = all(isinstance(position, str) and len(row.clean) - 1 in row.spans[position] for row in contrasts.rows)
        known.append((layers, 1.0 if at_end else 0.0))
        for (layer, value), (after, then) in itertools.pairwise(known):
            if abs(then - value) >= MOVED:
                found |= {(n, position) for n in range(layer, after)}
    return found
