"""Which latents of a crosscoder one checkpoint has alone, and a checkpoint without some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mixturelens.features.crosscoder import SIDES, Crosscoder
from mixturelens.types import Frozen, InputError, Side

EXCLUSIVE = 0.9
"""Relative decoder norm in one checkpoint from which a latent looks exclusive to it (after arXiv 2504.02922)."""
ON_ERROR, ON_RECONSTRUCTION = 0.2, 0.5
"""Largest latent scaling of an exclusive latent (after that paper): of what the other checkpoint's error still holds
of it, and of what the other latents write of it there."""

ROWS = 8192
"""Rows that are encoded at once."""

Kind = Literal["shared", "before", "after", "false", "dead"]
"""Exclusive to S or R; `false`: exclusive by norm and not by latent scaling; `dead`: never fires."""


@dataclass(frozen=True)
class Latents:
    """Every latent, on rows that did not train it."""

    kind: tuple[Kind, ...]
    relative: Float[Tensor, " latent"]
    """|d_R| / (|d_S| + |d_R|)."""
    rate: Float[Tensor, " latent"]
    """Share of rows on which it fires."""
    on_reconstruction: Float[Tensor, " latent"]
    """Latent scaling nu_r; NaN where the latent does not look exclusive."""
    on_error: Float[Tensor, " latent"]
    """Latent scaling nu_e."""

    def of(self, kind: Kind) -> list[int]:
        """Latents of a kind, those that fire most often first."""
        return sorted((i for i, each in enumerate(self.kind) if each == kind), key=lambda i: -float(self.rate[i]))


class Fit(Frozen):
    """How well a crosscoder describes both checkpoints, on rows that did not train it, and what it found."""

    explained: dict[Side, float]
    """Share of the variance that the reconstruction explains."""
    active: float
    """Latents that fire on a row, mean (L0)."""
    dead: float
    """Share of latents that fire on none of these rows."""
    shared: int
    exclusive: dict[Side, int]
    """After latent scaling."""
    false: int
    """Exclusive by norm, and not by latent scaling."""
    rows: int
    seed: int = 0


@torch.no_grad()
def judge_latents(crosscoder: Crosscoder, x: Float[Tensor, "row model d"], seed: int = 0) -> tuple[Latents, Fit]:
    """Which latents one checkpoint has alone, by decoder norm and by latent scaling (arXiv 2504.02922).

    A latent whose decoder norm is nearly all in one checkpoint may still describe something of the other: too weak
    there to be worth a decoder, or written there by other latents. So for both checkpoints m a scaling beta_m of f
    times its decoder in its own checkpoint is fitted, by least squares with an intercept, to

    - the error of m, together with what the latent itself writes there: nu_e = beta_other / beta_own
    - what the other latents write in m (in its own checkpoint: all latents): nu_r = beta_other / beta_own

    It is exclusive if nu_e is at most ON_ERROR and nu_r at most ON_RECONSTRUCTION, in size. `x` are rows that did not
    train it; `seed` is the training's, for the record. Raises InputError for rows of another shape, or fewer than two.
    """
    if x.shape[1:] != crosscoder.bias.shape or len(x) < 2:
        raise InputError(f"latents are judged on rows [row, 2, {crosscoder.dim}], two at least, not {list(x.shape)}")
    relative = crosscoder.relative
    own = (relative >= 0.5).long()
    looks = (relative - 0.5).abs() >= EXCLUSIVE - 0.5
    part = looks.nonzero()[:, 0]
    u = crosscoder.decoder[part, own[part]]
    fired, wrong, total, squares = (torch.zeros((), dtype=torch.float64, device=x.device) for _ in range(4))
    moments = _Moments()
    for rows in x.split(ROWS):
        f = crosscoder.encode(rows)
        made = crosscoder.decode(f)
        fired = fired + (f > 0).sum(0).double()
        wrong = wrong + (rows - made).double().square().sum((0, 2))
        total, squares = total + rows.double().sum(0), squares + rows.double().square().sum((0, 2))
        moments.add(f[:, part], torch.stack([rows - made, made]) @ u.T)
    rate = fired / len(x)
    varies = squares - (total.square() / len(x)).sum(1)
    if not bool((varies > 0).all()):
        raise InputError("the activations do not vary in both checkpoints: there is nothing to judge latents by")

    # beta times the variance of f and |u|^2, which the ratios do not need
    itself = moments.variance * (crosscoder.decoder[part].transpose(0, 1) * u).sum(2).double()
    error, others, whole = moments.with_f[0] + itself, moments.with_f[1] - itself, moments.with_f[1]
    at, mine = torch.arange(len(part), device=x.device), own[part]
    scale = (crosscoder.scale[1 - mine] / crosscoder.scale[mine]).double()
    on_reconstruction, on_error = (torch.full_like(rate, torch.nan) for _ in range(2))
    on_reconstruction[part] = scale * others[1 - mine, at] / whole[mine, at]
    on_error[part] = scale * error[1 - mine, at] / error[mine, at]
    alone = (on_error.abs() <= ON_ERROR) & (on_reconstruction.abs() <= ON_RECONSTRUCTION)

    def kind(i: int) -> Kind:
        if not rate[i] > 0:
            return "dead"
        if not looks[i]:
            return "shared"
        return SIDES[int(own[i])] if alone[i] else "false"

    kinds: tuple[Kind, ...] = tuple(kind(i) for i in range(len(crosscoder)))
    fit = Fit(
        explained={side: float(1 - wrong[m] / varies[m]) for m, side in enumerate(SIDES)},
        active=float(rate.sum()),
        dead=kinds.count("dead") / len(kinds),
        shared=kinds.count("shared"),
        exclusive={side: kinds.count(side) for side in SIDES},
        false=kinds.count("false"),
        rows=len(x),
        seed=seed,
    )
    return Latents(kinds, relative, rate.float(), on_reconstruction.float(), on_error.float()), fit


class _Moments:
    """Covariances of latents with what is written along their decoders, summed over batches in float64."""

    def __init__(self) -> None:
        self.rows = 0
        self.f = self.squares = self.values = self.products = torch.zeros(())

    def add(self, f: Float[Tensor, "row part"], values: Float[Tensor, "what row model part"]) -> None:
        f, values = f.double(), values.double()
        self.rows += len(f)
        self.f = self.f + f.sum(0)
        self.squares = self.squares + f.square().sum(0)
        self.values = self.values + values.sum(1)
        self.products = self.products + (values * f[:, None]).sum(1)

    @property
    def variance(self) -> Float[Tensor, " part"]:
        return self.squares / self.rows - (self.f / self.rows).square()

    @property
    def with_f(self) -> Float[Tensor, "what model part"]:
        return self.products / self.rows - self.values / self.rows * self.f / self.rows


@torch.no_grad()
def transplant(
    crosscoder: Crosscoder,
    x_s: Float[Tensor, "*before d"],
    x_r: Float[Tensor, "*after d"],
    latents: Sequence[int] | Int[Tensor, " part"],
    side: Side = "after",
) -> Float[Tensor, "*before d"]:
    """The activations of R (with `side` before: of S) without what these latents write there: x - sum_i f_i d_i.

    f is read from both checkpoints' activations on the same tokens. Everything that the crosscoder does not describe
    stays as it is. Raises InputError for latents that do not exist, or activations of different shapes.
    """
    units = torch.as_tensor(latents, dtype=torch.long, device=crosscoder.bias.device)
    outside = units[(units < 0) | (units >= len(crosscoder))]
    if len(outside):
        raise InputError(f"there is no latent {int(outside[0])}; latents are 0 to {len(crosscoder) - 1}")
    if x_s.shape != x_r.shape or x_s.shape[-1] != crosscoder.dim:
        raise InputError(
            f"activations have shapes {list(x_s.shape)} and {list(x_r.shape)}; both need {crosscoder.dim} dimensions"
        )
    both = rearrange([x_s, x_r], "model ... d -> ... (model d)").to(crosscoder.bias.dtype)
    f = crosscoder.dictionary.part(units).encode(both)
    own = SIDES.index(side)
    x = (x_s, x_r)[own]
    return x - (f @ crosscoder.decoder[units, own]).to(x.dtype)
