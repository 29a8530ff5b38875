"""Units clamped in behaviour: what makes them as active as they are to be, and what that does to the gap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mixturelens.behaviour.repair_questions import Ground, Scale
from mixturelens.contrasts import Contrasts
from mixturelens.features.dictionary import Dictionary
from mixturelens.hooks.edits import Rewrite
from mixturelens.probing.erase import in_behaviour
from mixturelens.types import Interval, Intervention, Site

Clamp = Sequence[Intervention | Rewrite]
"""What makes one unit, or several at once, what they are to be in behaviour."""

FEW = 32
"""Judging questions, at most, on which random units are clamped: they say where chance is, and no more."""


def clamps_of(
    units: Dictionary, which: Sequence[int], site: Site, contrasts: Contrasts, to: Float[Tensor, " unit"]
) -> Clamp:
    """What makes the units `which` as active as `to` says in behaviour, all at once: each reads what was there before
    any of them wrote.

    They are clamped behind the prompt where the contrast has a policy in place. Units whose activation takes more than
    an affine read and a threshold are clamped by their dictionary, token by token.
    """
    if units.alone:
        return [clamp_of(units, each, site, contrasts, float(to[each])) for each in which]
    index = torch.tensor(list(which), dtype=torch.long, device=units.read.device)
    part, amount = units.part(index), to[index]
    return [Rewrite(in_behaviour(site, contrasts), lambda x: part.moved(x, amount - part.encode(x)))]


def clamp_of(units: Dictionary, which: int, site: Site, contrasts: Contrasts, to: float) -> Intervention:
    """The clamp of unit `which` to the activation `to`, as an intervention; its activation must be an affine read of
    its own with a threshold (`Dictionary.alone`).
    """
    where, threshold = in_behaviour(site, contrasts), float(units.threshold[which])
    read, write = (vectors[which].tolist() for vectors in (units.read, units.write))
    if site.component == "neurons" and units.write[which].count_nonzero() == 1:  # one number, of itself
        where = where.model_copy(update={"neuron": int(units.read[which].argmax())})
        read, write = [1.0], [1.0]
    return Intervention(
        site=where,
        do="clamp",
        vector=tuple(write),
        read=tuple(read),
        offset=float(units.offset[which]),
        threshold=None if threshold == -np.inf else threshold,
        amount=to,
    )


def clamped(ground: Ground, scale: Scale, interventions: Clamp) -> tuple[Interval, Interval]:
    """R with units clamped, on the questions that judge: the gap closed under the harmed cue, and the change of the
    accuracy under the trained one. Raises InputError for a site or a position that its prompts lack.
    """
    found = ground.behaviour(interventions, ground.judge)
    return scale.gap_closed(found), scale.trained_change(found)


def random_gaps(
    ground: Ground, scale: Scale, interventions: Sequence[Clamp], most: int = FEW
) -> tuple[float | None, ...]:
    """The share of the gap that each clamp closes by itself, on at most `most` judging questions; null without one."""
    if not scale.gap_closed(scale.before).measured:
        return (None,) * len(interventions)
    few = [i for i, row in enumerate(ground.judge.rows) if row.cue == ground.harm.harmed_cue][:most]
    broken = scale.after.correct.sum(-1)
    gap = float(scale.ceiling[0]) - float(scale.grid.draws(broken)[0, scale.columns[0]])
    found = []
    for each in interventions:
        reached = ground.behaviour(each, ground.judge.part(few)).correct.sum(-1)
        found.append(round(float(np.nanmean(reached - broken[few])) / gap, 6))
    return tuple(found)


def set_to(head: Site, contrasts: Contrasts, to: Float[Tensor, " d"]) -> Intervention:
    """The intervention that makes a head's output this vector in behaviour."""
    return Intervention(site=in_behaviour(head, contrasts), do="set", vector=tuple(to.tolist()))
