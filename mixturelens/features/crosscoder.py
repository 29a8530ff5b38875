"""A crosscoder over two checkpoints: sparse latents that S and R share, and those that one of them has alone.

Lindsey et al. 2024 (Sparse crosscoders for cross-layer features and model diffing). Trained with BatchTopK, and judged
by latent scaling, as in Minder et al. 2025 (arXiv 2504.02922): an L1 penalty, and decoder norms on their own, call
latents exclusive that are not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mixturelens.features.batchtopk import KeptLatents, gradients, smallest_kept
from mixturelens.features.dictionary import Dictionary
from mixturelens.features.effort import WIDTH, Training
from mixturelens.types import InputError, Side

RATE, DECAY, WARM_UP = 3e-3, 0.2, 50
"""Adam's rate; the share of the steps over which it falls to a tenth at the end, and the steps in which it rises."""
CLIP = 1.0
"""Largest norm of a gradient."""
RESAMPLE_EVERY, RESAMPLE_UNTIL, UNUSED = 100, 0.7, 10
"""Steps between two resamplings, the share of the training that has them, and batches without firing that make a latent
one of those that take over badly reconstructed examples (Bricken et al. 2023, Towards monosemanticity, appendix). On
the default organism 2 to 9% of latents end up dead."""
SAMPLED = 4
"""Batches that the scale of activations, first latents and resampled ones are taken from."""
CALIBRATION = 16
"""Batches over which the threshold of the trained crosscoder is averaged."""


SIDES: tuple[Side, Side] = ("before", "after")


@runtime_checkable
class Stream(Protocol):
    """Activations of S and R at one site on the same tokens, in batches: a pure function of step and seed."""

    @property
    def dim(self) -> int:
        """Numbers that a model has at the site for one token."""
        ...

    def __len__(self) -> int: ...

    def batch(self, step: int, size: int, seed: int) -> Float[Tensor, "row model d"]:
        """The `step`-th batch of `size` rows; the same for the same arguments, as `Activations.batch`."""
        ...


@dataclass(frozen=True)
class Crosscoder:
    """Latents that read both checkpoints' activations and write into both (model 0 is S, model 1 is R).

    f = x . encoder + b_enc where that exceeds the latent's threshold and 0 elsewhere: a JumpReLU in the place of
    BatchTopK, which would make a row's latents depend on its batch. All of it is in the units of the activations.
    """

    encoder: Float[Tensor, "model d latent"]
    b_enc: Float[Tensor, " latent"]
    decoder: Float[Tensor, "latent model d"]
    bias: Float[Tensor, "model d"]
    scale: Float[Tensor, " model"]
    """What makes both checkpoints' activations vary equally; norms of decoders are compared times this."""
    threshold: float
    """Least f * (|d_S| + |d_R|) that fires."""

    def __len__(self) -> int:
        return len(self.b_enc)

    @property
    def dim(self) -> int:
        """Numbers that each checkpoint has at the site for one token."""
        return self.bias.shape[1]

    @property
    def norms(self) -> Float[Tensor, "latent model"]:
        """Decoder norms in each checkpoint, as shares of how much its activations vary."""
        return self.decoder.norm(dim=-1) * self.scale

    @property
    def relative(self) -> Float[Tensor, " latent"]:
        """|d_R| / (|d_S| + |d_R|): 0 for what only S has, 1 for what only R has."""
        return self.norms[:, 1] / self.norms.sum(1)

    @property
    def change(self) -> Float[Tensor, "latent d"]:
        """d_R - d_S. What R writes where S wrote something already mostly ends up here, in a latent that both share."""
        return self.decoder[:, 1] - self.decoder[:, 0]

    @property
    def dictionary(self) -> Dictionary:
        """The same as a dictionary of both activations side by side, [S | R]: 2 d numbers a row."""
        return Dictionary(
            read=rearrange(self.encoder, "model d latent -> latent (model d)"),
            offset=-self.b_enc,
            threshold=self.threshold / self.norms.sum(1),
            write=rearrange(self.decoder, "latent model d -> latent (model d)"),
            bias=rearrange(self.bias, "model d -> (model d)"),
        )

    def encode(self, x: Float[Tensor, "row model d"]) -> Float[Tensor, "row latent"]:
        """How strongly each latent fires on each row of both checkpoints' activations; 0 where it does not."""
        return self.dictionary.encode(rearrange(x, "row model d -> row (model d)"))

    def decode(self, f: Float[Tensor, "row latent"]) -> Float[Tensor, "row model d"]:
        """Both checkpoints' activations as the latents reconstruct them, biases included."""
        return rearrange(self.dictionary.decode(f), "row (model d) -> row model d", model=len(self.bias))

    def to(self, device: str) -> Crosscoder:
        """The same crosscoder on another device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if name != "threshold"}
        return replace(self, **tensors)


def train_crosscoder(activations: Stream, training: Training | None = None) -> Crosscoder:
    """A BatchTopK crosscoder of S and R, by Adam on the mean squared error of both.

    In every batch the k * batch largest products f * (|d_S| + |d_R|) are kept (arXiv 2504.02922), of activations that
    are centred and scaled to vary equally in both checkpoints. Latents begin as activations of
    single tokens; those that fire no more take over what is badly reconstructed.

    The same seed gives the same numbers. Raises InputError for sizes that cannot be, and constant activations.
    """
    training = training or Training()
    width = WIDTH * activations.dim if training.width is None else training.width
    k, steps, batch = int(training.k), training.steps, training.batch
    if not 1 <= k <= width or k != training.k or steps < 1 or batch < 1:
        raise InputError(
            f"a crosscoder of {width} latents, {training.k:g} a row, {steps} steps of {batch} rows: all are whole "
            "numbers, and none can be under 1"
        )
    if not len(activations):
        raise InputError("there are no activations to train a crosscoder on")
    course = _Course(activations, training, width)
    while course.step < steps:
        course.advance()
    return course.finished()


class _Course:
    """Everything that a step changes, and nothing else: what it draws follows from seed and step."""

    def __init__(self, activations: Stream, training: Training, width: int) -> None:
        self.activations, self.width, self.k = activations, width, int(training.k)
        self.steps, self.batch, self.seed, self.step = training.steps, training.batch, training.seed, 0
        first = activations.batch(0, SAMPLED * self.batch, self.seed)
        if first.shape[1:] != (2, activations.dim):
            raise InputError(f"a crosscoder takes activations [row, 2, {activations.dim}], not {list(first.shape)}")
        first = first.float()
        self.mean = first.mean(0)
        varies = (first - self.mean).square().sum(2).mean(0)
        if not bool((varies > 1e-12 * first.square().sum(2).mean(0)).all()):
            raise InputError("the activations do not vary in both checkpoints: there is nothing to describe")
        self.scale = (activations.dim / varies).sqrt()
        x = self.scaled(first)
        rows = torch.randint(len(x), (self.width,), generator=self._generator(0))
        start = torch.nn.functional.normalize(x[rows.to(x.device)], dim=1, eps=1e-6)
        self.weights = {
            "encoder": start.clone(),
            "b_enc": x.new_zeros(self.width),
            "decoder": start.clone(),
            "bias": x.new_zeros(x.shape[1]),
        }
        self.optimizer = torch.optim.Adam(list(self.weights.values()), lr=RATE, fused=True)
        self.unused = torch.zeros(self.width, dtype=torch.long, device=x.device)

    def scaled(self, x: Float[Tensor, "row model d"]) -> Float[Tensor, "row both"]:
        return rearrange((x.float() - self.mean) * self.scale[:, None], "row model d -> row (model d)")

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(1_000_003 * self.seed + step)

    def rate(self) -> float:
        left = (self.steps - self.step) / max(1.0, DECAY * self.steps)
        return RATE * min(1.0, (self.step + 1) / WARM_UP, 0.1 + 0.9 * left)

    def products(self, x: Float[Tensor, "row both"]) -> tuple[Float[Tensor, "row latent"], Float[Tensor, "row latent"]]:
        """Latents before the choice, and what they are chosen by: times the sum of their decoders' norms."""
        f = torch.addmm(self.weights["b_enc"], x, self.weights["encoder"].T)
        each = rearrange(self.weights["decoder"], "latent (model d) -> latent model d", model=2)
        return f, f * each.norm(dim=2).sum(1)

    def kept(self, x: Float[Tensor, "row both"]) -> KeptLatents:
        f, by = self.products(x)
        rows, latents = (by >= smallest_kept(by, self.k)).nonzero(as_tuple=True)
        return KeptLatents(rows, latents, f[rows, latents], len(x))

    def advance(self) -> None:
        """One step of Adam."""
        x = self.scaled(self.activations.batch(self.step, self.batch, self.seed))
        kept = self.kept(x)
        error = kept.decode(self.weights["decoder"]) + self.weights["bias"] - x
        for name, value in gradients(kept, x, error, self.weights["decoder"]).items():
            self.weights[name].grad = value
        torch.nn.utils.clip_grad_norm_(list(self.weights.values()), CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.step()
        self.unused += 1
        self.unused[kept.latents] = 0
        self.step += 1
        if self.step % RESAMPLE_EVERY == 0 and self.step < RESAMPLE_UNTIL * self.steps:
            self.resample()

    def resample(self) -> None:
        """Latents that fire no more take over examples, drawn in proportion to their squared error."""
        dead = (self.unused >= UNUSED).nonzero()[:, 0]
        live = (self.unused < UNUSED).nonzero()[:, 0]
        if not len(dead) or not len(live):
            return
        x = self.scaled(self.activations.batch(self.step, SAMPLED * self.batch, self.seed + 1))
        error = x - self.kept(x).decode(self.weights["decoder"]) - self.weights["bias"]
        wrong = error.square().sum(1).double().cpu()
        if not float(wrong.sum()) > 0:
            return
        drawn = torch.multinomial(wrong, len(dead), replacement=True, generator=self._generator(self.step))
        start = torch.nn.functional.normalize(error[drawn.to(x.device)], dim=1)
        for name in ("encoder", "decoder", "b_enc"):
            weight = self.weights[name]
            weight[dead] = 0.0 if name == "b_enc" else start * weight[live].norm(dim=1).mean()
            for moment in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[weight][moment][dead] = 0.0
        self.unused[dead] = 0

    def finished(self) -> Crosscoder:
        """With scale and mean folded in, and the mean of what BatchTopK keeps at least as its threshold."""
        least = []
        for step in range(CALIBRATION):
            x = self.scaled(self.activations.batch(self.steps + step, self.batch, self.seed))
            least.append(smallest_kept(self.products(x)[1], self.k))
        encoder = rearrange(self.weights["encoder"], "latent (model d) -> model d latent", model=2)
        encoder = encoder * self.scale[:, None, None]
        decoder = rearrange(self.weights["decoder"], "latent (model d) -> latent model d", model=2)
        bias = rearrange(self.weights["bias"], "(model d) -> model d", model=2)
        return Crosscoder(
            encoder=encoder.contiguous(),
            b_enc=self.weights["b_enc"] - torch.einsum("md,mdl->l", self.mean, encoder),
            decoder=(decoder / self.scale[:, None]).contiguous(),
            bias=self.mean + bias / self.scale[:, None],
            scale=self.scale,
            threshold=float(np.mean(least)),
        )
