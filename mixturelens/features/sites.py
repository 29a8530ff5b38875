"""Where to learn features: the sites that patching named, and the place by which what RL did has arrived."""

from __future__ import annotations

from mixturelens.features.change import Splices, half_prompts
from mixturelens.features.effort import share_of
from mixturelens.features.record import Concept
from mixturelens.features.splice import Crossing, whole
from mixturelens.hooks.lens import Lens
from mixturelens.patching.record import PatchingRecord
from mixturelens.suite import Suite
from mixturelens.types import Component, InputError, Side, Site

CARRIES = 0.9
"""Share of a contrast from which the residual stream at one position carries it."""
NAMED = 0.5
"""Share under which patching names no site."""
ARRIVED = 0.5
"""Share of what R does differently from which it has arrived at a place."""
FLOOR = 0.005
"""Bits under which R does nothing differently."""
QUESTIONS = 24

SWEEPS: dict[Concept, tuple[str, Side]] = {
    "cue": ("cue", "after"),
    "hint": ("hint", "before"),
    "selector": ("checkpoint", "after"),
}
"""Concept -> kind of contrast, and the checkpoint that was patched into."""


def named_site(patching: PatchingRecord, concept: Concept) -> Site:
    """The earliest residual stream, behind the tokens in which the prompts differ, that carries the contrast in R (the
    hint in S); else the stream, attention or MLP output that carries most.

    Raises InputError where patching did not measure the contrast, or no site carries NAMED of it.
    """
    kind, side = SWEEPS[concept]
    sweep = next((s for s in patching.sweeps if (s.kind, s.checkpoint, s.direction) == (kind, side, "denoise")), None)
    if sweep is None:
        raise InputError(f"patching measured no {kind} contrast here")
    outputs: tuple[Component, ...] = ("resid_pre", "attn_out", "mlp_out")
    found = [
        (each.site, each.effect.value)
        for each in sweep.effects
        if each.site.component in outputs
        and each.effect.value is not None
        and each.site.position not in (sweep.kind, *sweep.spans.get(sweep.kind, ()))  # where the prompts differ
        and (each.site.layer, each.site.component) != (0, "resid_pre")  # the tokens themselves
    ]
    streams = [(site, value) for site, value in found if site.component == "resid_pre" and value >= CARRIES]
    if streams:
        first = min(site.layer for site, _ in streams)
        return max((each for each in streams if each[0].layer == first), key=lambda each: each[1])[0]
    site, value = max(found, key=lambda each: each[1], default=(None, 0.0))
    if site is None or value < NAMED:
        best = f"{site} carries most, {value:.2f} of it," if site is not None else "no share could be measured,"
        raise InputError(f"no one site carries the {kind} contrast: {best} and {NAMED} is needed")
    return site


def arrived_at(before: Lens, after: Lens, suite: Suite, seed: int = 0, share: float = 1.0) -> Site:
    """The earliest residual stream by which most of what R does differently has arrived: R's stream in S does it.

    Found by halving the layers, for more of it has arrived the deeper one looks.
    The last stream where R differs in its unembedding or not at all. Raises InputError for a suite with rules.
    """
    prompts = half_prompts(suite, before.tokenizer, 0, share_of(QUESTIONS, share, 8))
    last: tuple[int, Component] = (before.layers - 1, "resid_post")
    places: list[tuple[int, Component]] = [*((layer, "resid_pre") for layer in range(1, before.layers)), last]

    base = Splices(Crossing(before, after, places[0]), prompts, seed).base

    def bits(place: tuple[int, Component]) -> float:
        (found,) = Splices(Crossing(before, after, place), prompts, seed, base).terms([whole])
        if found.moved is None:
            raise InputError("what S does with R's activations could not be measured")
        return found.moved

    full = bits(last)
    if full < FLOOR:
        return _site(last)
    low, high = 0, len(places) - 1
    while low < high:
        middle = (low + high) // 2
        if bits(places[middle]) >= ARRIVED * full:
            high = middle
        else:
            low = middle + 1
    return _site(places[low])


def _site(place: tuple[int, Component]) -> Site:
    return Site(layer=place[0], component=place[1])
