"""What R does without the latents that a crosscoder says R has alone: which of them matter, and to which term."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
from torch import Tensor

from mixturelens.features.activations import Activations
from mixturelens.features.change import Splices, matched
from mixturelens.features.crosscoder import train_crosscoder
from mixturelens.features.effort import share_of, training
from mixturelens.features.latents import judge_latents, transplant
from mixturelens.features.record import CrosscoderFit, Part, Terms
from mixturelens.features.splice import Splice
from mixturelens.types import Site

TESTED = 24
"""Latents exclusive to R that are looked at one by one: those that write most."""
RANDOM = 12
"""Shared latents that each is compared with, and sets of as many as all of them."""
QUESTIONS = 24
"""Questions on which R is asked without them."""
FLOOR = 0.005
"""Bits under which nothing has changed."""


def fit_crosscoder(
    activations: Activations, held_out: Activations, splices: Splices, seed: int = 0, share: float = 1.0
) -> CrosscoderFit:
    """Train a crosscoder over S and R, and ablate in R what it says that R has alone.

    A latent exclusive to R is causal if R without it does something else for sure: in some term of the split, by more
    than FLOOR bits and than nearly all (95%) of as many single shared latents that write as much in R. Being causal in
    R is not being what RL did: S against another S has such latents, too, which is why that null belongs beside every
    count. `splices` put S's activations into R at this place. `share`: of latents that are looked at.
    """
    # a few thousand tokens are learnt by heart long before the usual number of steps, and fill no wide dictionary
    crosscoder = train_crosscoder(activations, training(activations.dim, len(activations), seed))
    latents, fit = judge_latents(crosscoder, held_out.batch(0, len(held_out), 0), seed)
    amount = crosscoder.encode(held_out.batch(0, len(held_out), 0)).mean(0)
    written = (amount * crosscoder.decoder[:, 1].norm(dim=1)).double().cpu().numpy()
    crosscoder = crosscoder.to(splices.ground.into.device)
    exclusive, shared = (latents.of(kind) for kind in ("after", "shared"))
    tested = sorted(exclusive, key=lambda i: -written[i])[: share_of(TESTED, share)]
    rng = np.random.default_rng(seed)
    alike = np.where(np.isin(np.arange(len(written)), shared), written, 0.0)
    alike[tested] = written[tested]
    singles = _nearest(alike, tested, shared, share_of(RANDOM, share))
    enough = bool(exclusive) and len(exclusive) <= len(shared)
    sets = matched(alike, exclusive, max(2, share_of(RANDOM, share) // 3), rng) if enough else []

    def without(units: Sequence[int]) -> Splice:
        def splice(x_r: Tensor, x_s: Tensor) -> Tensor:
            return transplant(crosscoder, x_s, x_r, list(units))

        return splice

    groups = [*([i] for i in tested), *([i] for i in singles), *([exclusive] if exclusive else []), *sets]
    found = splices.terms([without(group) for group in groups]) if groups else []
    alone, null = found[: len(tested)], found[len(tested) :][: len(singles)]
    rest = found[len(tested) + len(singles) :]
    causal = [part for part in (causes(each, null) for each in alone) if part is not None]
    return CrosscoderFit(
        site=Site(layer=splices.ground.at[0], component=splices.ground.at[1]),
        seed=seed,
        explained=fit.explained,
        dead=fit.dead,
        shared=fit.shared,
        exclusive=fit.exclusive,
        false=fit.false,
        tested=len(tested),
        causal=len(causal),
        causal_terms={part: causal.count(part) for part in get_args(Part) if part in causal},
        without=rest[0] if rest else None,
        random=tuple(rest[1:]),
    )


def _nearest(written: np.ndarray, units: Sequence[int], among: Sequence[int], number: int) -> list[int]:
    """Other latents that write about as much as these do: the nearest to each in turn."""
    free, found = [i for i in among if written[i] > 0], []
    for unit in [units[k % len(units)] for k in range(number)] if units else []:
        if not free:
            break
        near = min(free, key=lambda i: abs(np.log(written[i] / max(written[unit], 1e-300))))
        found.append(near)
        free.remove(near)
    return found


def causes(alone: Terms, null: Sequence[Terms]) -> Part | None:
    """The term that a latent moves most, of those that it surely moves by more than the null; None if there is none."""
    moved: dict[Part, float] = {}
    for part in get_args(Part):
        chance = [value for each in null if (value := each.of(part).value) is not None]
        least = max(FLOOR, float(np.percentile(chance, 95)) if chance else 0.0)
        effect = alone.of(part)
        if effect.value is not None and effect.low is not None and effect.low > least:
            moved[part] = effect.value
    return max(moved, key=lambda part: moved[part]) if moved else None
