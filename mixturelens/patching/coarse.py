"""From coarse to fine: the residual stream, then attention and MLPs where it carries something, then heads.

Exhaustive patching takes every head at every position, which on 30 layers is hours. Here the residual stream says at
which spans the contrast passes; there attention and MLPs of all layers are patched, and the heads of attention that
moves something. What else is worth it slopes nominate (`patching.slopes`), and it is patched exactly. (Slopes alone
miss much: on a network that saturates, an output that carries a third of the contrast can be flat at both ends.) Of
what is left a random sample is patched exactly, too: how much the largest of it moves says what may have been missed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from mixturelens.contrasts import Contrasts
from mixturelens.hooks.batches import sides
from mixturelens.patching.slopes import DROPPED, strengths
from mixturelens.patching.sweep import Bench, Patched
from mixturelens.stats import resample_counts
from mixturelens.types import PER_HEAD, Component, Frozen, Site

OUTPUTS: tuple[Component, ...] = ("attn_out", "mlp_out", "z")
PATCHED = 4
"""One in so many sites is patched, at most."""
LEAST = 24
"""Outputs that are patched in any case, if there are as many."""
SAMPLED = 24
"""Outputs that were not nominated, of which this many are patched all the same."""
SLOPED = 16
"""Questions on which slopes are taken."""
MOVED = 0.02
"""Change of the residual stream's effect from one layer to the next from which something moved there."""
CARRIES = 0.1
"""Effect of the residual stream, before some layer, from which the contrast passes at a span."""
WIDE = 1 / 3
"""Share of the prompt up to which a span's window is narrow, so that attention and MLPs of all layers are patched."""
STEP = 4
"""The residual stream is patched before one layer in so many, and then before those between where something moved."""


class Unseen(Frozen):
    """What is known of the outputs that were not nominated: how much a random sample of them moves."""

    sites: int
    sampled: int
    largest: float
    """|Effect| of the largest of the sample."""
    share: float
    """At most this share of them moves more than that, with 95% confidence."""


def outputs(layers: int, heads: int, positions: Sequence[str | int]) -> list[Site]:
    """The sites of attention's output, the MLP's output and every head's, in every layer, at each position."""
    return [
        Site(layer=layer, component=component, head=head, position=position)
        for layer in range(layers)
        for component in OUTPUTS
        for head in (range(heads) if component in PER_HEAD else (None,))
        for position in positions
    ]


def _window(contrasts: Contrasts, position: str) -> float:
    """Share of a prompt that lies at or behind a span, mean over questions."""
    return float(np.mean([1 - min(row.spans[position]) / len(row.clean) for row in contrasts.rows]))


def patched_tokens(layers: int, contrasts: Contrasts, sites: Sequence[Site]) -> float:
    """Tokens, as passed through all layers, that patching each site in turn takes: only what comes after it is run."""
    width = max(len(row.clean) for row in contrasts.rows)
    window = {
        position: width if not isinstance(position, str) else width * _window(contrasts, position)
        for position in dict.fromkeys(site.position for site in sites)
    }
    window |= {position: width - position for position in window if isinstance(position, int)}
    return len(contrasts.rows) * sum(window[site.position] * (layers - site.layer) / layers for site in sites)


def coarse_tokens(layers: int, heads: int, contrasts: Contrasts, positions: Sequence[str]) -> tuple[float, float]:
    """Tokens that `coarse` takes forwards, and tokens that it takes forwards and back for gradients."""
    every = outputs(layers, heads, positions)
    some = [*every, *(Site(layer=n, component="resid_pre", position=p) for n in range(layers) for p in positions)]
    some = some[:: max(1, len(some) // min(len(some), max(LEAST, len(some) // PATCHED)))]
    width = max(len(row.clean) for row in contrasts.rows)
    captured = 2 * len(contrasts.rows) * width
    exact = patched_tokens(layers, contrasts, some)
    sloped = 2 * min(len(contrasts.rows), SLOPED) * width
    return exact + captured + 2 * sloped, 2 * sloped * max(_window(contrasts, p) for p in positions) * (1 + DROPPED)


def coarse(bench: Bench, positions: Sequence[str], seed: int = 0) -> tuple[Patched, Unseen]:
    """Patch (denoising) where slopes say that something moves, and measure how much was passed over."""
    lens, contrasts = bench.lens, bench.contrasts
    every = [site for site in outputs(lens.layers, lens.heads, positions) if lens.why_not(site.component) is None]
    parts, carries = _stream(bench, positions)
    counts = resample_counts(len(contrasts.rows), seed, draws=1)
    few = contrasts.part(contrasts.rows_of(0)[:SLOPED] if len(contrasts.rows) > 1 else [0])
    strength = dict(zip(every, strengths(lens, sides(lens, few), every, bench.before).tolist(), strict=True))
    # attention and MLPs of all layers where the contrast passes and little comes behind it
    narrow = [position for position in carries if _window(contrasts, position) <= WIDE]
    whole = [site for site in every if site.component != "z" and site.position in narrow]
    most = max(LEAST, (len(every) + lens.layers * len(positions)) // PATCHED - len(parts[0].sites) - SAMPLED)
    found: dict[Site, float] = {}
    if whole:
        parts.append(bench.patch(whole))
        found = dict(zip(whole, np.abs(np.nan_to_num(parts[-1].effects(counts)[0])).tolist(), strict=True))
    # heads of attention that moves something, which may carry only together what it carries; then what slopes nominate
    moving = sorted((s for s in found if s.component == "attn_out" and found[s] >= MOVED), key=lambda s: -found[s])
    heads = [s for of in moving for s in every if s.component == "z" and _at(s) == _at(of)]
    order = [*heads, *sorted((s for s in every if s not in found), key=lambda s: -strength[s])]
    nominated = list(dict.fromkeys(order))[: max(0, most - len(found))]
    rest = [site for site in every if site not in found and site not in set(nominated)]
    drawn = [rest[i] for i in np.random.default_rng(seed).permutation(len(rest))[:SAMPLED]]
    largest = 0.0
    if nominated or drawn:
        parts.append(bench.patch([*nominated, *drawn]))
        passed = np.abs(np.nan_to_num(parts[-1].effects(counts)[0, len(nominated) :]))
        largest = float(passed.max(initial=0.0))
    share = 1 - 0.05 ** (1 / len(drawn)) if len(drawn) < len(rest) else 0.0
    unseen = Unseen(sites=len(rest), sampled=len(drawn), largest=round(largest, 6), share=round(share, 6))
    return _joined(parts), unseen


def _stream(bench: Bench, positions: Sequence[str]) -> tuple[list[Patched], set[str]]:
    """The residual stream before some layers, before those between where its effect changes; positions that carry."""
    lens, contrasts = bench.lens, bench.contrasts
    steps = [Site(layer=n, component="resid_pre", position=p) for p in positions for n in range(0, lens.layers, STEP)]
    first = bench.patch(steps)
    counts = resample_counts(len(contrasts.rows), 0, draws=1)
    effects = dict(zip(steps, np.nan_to_num(first.effects(counts)[0]).tolist(), strict=True))
    between, carries = [], set()
    for position in positions:
        known = [(site.layer, effects[site]) for site in steps if site.position == position]
        # behind the last layer the last token alone is read
        at_end = all(len(row.clean) - 1 in row.spans[position] for row in contrasts.rows)
        known.append((lens.layers, 1.0 if at_end else 0.0))
        if any(abs(value) >= CARRIES for _, value in known):
            carries.add(position)
        for (layer, value), (after, then) in itertools.pairwise(known):
            if abs(then - value) >= MOVED:
                between += [Site(layer=n, component="resid_pre", position=position) for n in range(layer + 1, after)]
    return [_joined([first, bench.patch(between)]) if between else first], carries


def _joined(parts: Sequence[Patched]) -> Patched:
    """Patches of the same questions, one behind the other."""
    sites = tuple(site for part in parts for site in part.sites)
    return Patched(sites, parts[0].base, parts[0].goal, np.concatenate([part.patched for part in parts]))


def _at(site: Site) -> tuple[int, str | int | None]:
    return site.layer, site.position
