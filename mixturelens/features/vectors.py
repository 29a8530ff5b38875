"""Units as vectors that read and write: neurons, and directions that tell the two sides of a contrast apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mixturelens.features.dictionary import Dictionary
from mixturelens.features.effects import Scene
from mixturelens.probing.solve import fit_logistic
from mixturelens.types import InputError


def neurons(size: int, which: Sequence[int], device: torch.device | str = "cpu") -> Dictionary:
    """Some of the hidden neurons of an MLP, as units of the activation that they are."""
    own = torch.zeros(len(which), size, device=device)
    own[torch.arange(len(which)), list(which)] = 1.0
    return _linear(own, own, torch.zeros(len(which), device=device))


def directions(scene: Scene) -> tuple[Dictionary, tuple[str, ...]]:
    """Directions that tell the two sides apart at a site, tokens as rows: unit vectors, and how each was found.

    They are the difference of means, and the weights of a logistic regression in the activation's own coordinates. What
    they read is counted from its mean over both sides, so that ablating one puts this mean in place of it. Raises
    InputError where both sides have the same activations.
    """
    clean, corrupt = (
        rearrange(run.values, "question position d -> (question position) d") for run in (scene.clean, scene.corrupt)
    )
    x = torch.cat([clean, corrupt])
    labels = (torch.arange(len(x), device=x.device) < len(clean)).long()
    probe = fit_logistic(x[None], labels[None])
    found = torch.stack([clean.mean(0) - corrupt.mean(0), probe.weights[0, 0, 0] * probe.scale[0]])
    norms = found.norm(dim=1, keepdim=True)
    if not bool((norms > 0).all()):
        raise InputError(f"{scene.site}: both sides have the same activations, so no direction tells them apart")
    return directed(found / norms, scene), ("difference of means", "logistic probe")


def directed(vectors: Float[Tensor, "unit d"], scene: Scene) -> Dictionary:
    """Unit vectors as linear units that read what they write, counted from their mean over both sides of a scene."""
    mean = (scene.clean.values.mean((0, 1)) + scene.corrupt.values.mean((0, 1))) / 2
    return _linear(vectors, vectors, vectors @ mean)


def _linear(read: Tensor, write: Tensor, offset: Tensor) -> Dictionary:
    return Dictionary(read, offset, torch.full_like(offset, -torch.inf), write)


def strength(scene: Scene, units: Dictionary) -> Float[Tensor, " unit"]:
    """Mean |f(clean) - f(corrupt)| times the norm of what the unit writes: how far it displaces the activation."""
    change = units.encode(scene.clean.values) - units.encode(scene.corrupt.values)
    return (change.abs() * units.scale(scene.corrupt.values)).mean((0, 1)) * units.write.norm(dim=1)
