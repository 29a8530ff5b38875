"""Where the heads that read the cue take it from."""

from __future__ import annotations

from collections.abc import Sequence

from mixturelens.contrasts import Contrasts
from mixturelens.hooks.batches import sides
from mixturelens.hooks.engine import Engine
from mixturelens.hooks.lens import Lens
from mixturelens.types import RunError, Site

READER = 0.5
"""Least share of the contrast that keys and values at one span carry, for it to be where heads take the cue from."""


def reading_site(lens: Lens, heads: Sequence[Site], contrasts: Contrasts) -> Site:
    """Where the cue reader's heads take the cue from: the residual stream before their layer, at one span.

    It is the span whose keys and values (those that the heads use), taken from the clean run into the corrupt one, move
    the metric most; `cue` if none moves it by READER of the difference. The layer is that of the first head.
    """
    layer = min(int(head.layer) for head in heads)
    both = sides(lens, contrasts.half(0))
    names = set.intersection(*(set(spans) for spans in both.spans)) - {"policy"}
    spans = sorted(names, key=lambda name: tuple(both.spans[0][name]))
    tried = []
    for name in spans:
        for component in ("k", "v"):
            shared = {int(head.head or 0) * lens.kv_heads // lens.heads for head in heads if head.layer == layer}
            tried += [Site(layer=layer, component=component, head=head, position=name) for head in sorted(shared)]
    default = Site(layer=layer, component="resid_pre", position="cue" if "cue" in names else "last")
    if not tried:
        return default
    source, goal = lens.capture(both.clean, [(layer, "k"), (layer, "v")])
    try:
        engine = Engine(lens, both.corrupt, both.corrupt_spans)
    except RunError:
        return default
    base = both.metric(engine.logits)
    moved = engine.sweep(tried, source, both.metric) - base
    whole = float((both.metric(goal) - base).mean())
    effect = dict.fromkeys(spans, 0.0)
    for site, value in zip(tried, moved.mean(1).tolist(), strict=True):
        effect[str(site.position)] += value / whole if whole else 0.0
    best = max(spans, key=lambda name: effect[name])
    return default.model_copy(update={"position": best}) if effect[best] >= READER else default
