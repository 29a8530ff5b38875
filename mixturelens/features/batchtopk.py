"""BatchTopK, sparsely: of a batch only what is kept is ever touched again.

SAEs and crosscoders keep k activations a row on average, k of hundreds. Finding the smallest that is kept takes a
partition and no sort, and sums over what is kept are sums over bags of rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def bag(index: Tensor, table: Float[Tensor, "row d"], starts: Tensor, weights: Tensor) -> Float[Tensor, "bag d"]:
    """Weighted sums of some rows of a table."""
    return torch.nn.functional.embedding_bag(index, table, starts, mode="sum", per_sample_weights=weights)


def number_th(values: Float[Tensor, " value"], number: int) -> float:
    """The number-th largest of many values, without sorting them."""
    if values.device.type == "cpu":
        array = values.numpy()
        return float(np.partition(array, len(array) - number)[len(array) - number])
    return float(values.topk(number, sorted=False).values.min())


def smallest_kept(by: Float[Tensor, "row latent"], k: int) -> float:
    """The smallest of the k largest numbers a row, k * rows of them over the whole batch; never 0 or less.

    >>> smallest_kept(torch.tensor([[5.0, 4.0, 3.0], [2.0, 1.0, 0.0]]), 2)
    2.0
    """
    least = number_th(by.detach().flatten(), min(k * len(by), by.numel()))
    return max(least, float(np.finfo(np.float32).tiny))


# --- crosscoders ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeptLatents:
    """The few latents that BatchTopK keeps in a batch, row by row: sums over them are sums over bags of rows."""

    rows: Int[Tensor, " kept"]
    latents: Int[Tensor, " kept"]
    f: Float[Tensor, " kept"]
    number: int
    """Rows of the batch."""

    def decode(self, decoder: Float[Tensor, "latent both"]) -> Float[Tensor, "row both"]:
        """What the kept latents write in each row: the sum of f times the latent's decoder row, without a bias."""
        starts = torch.searchsorted(self.rows, torch.arange(self.number, device=self.rows.device))
        return bag(self.latents, decoder, starts, self.f)


def gradients(
    kept: KeptLatents,
    x: Float[Tensor, "row both"],
    error: Float[Tensor, "row both"],
    decoder: Float[Tensor, "latent both"],
) -> dict[str, Tensor]:
    """Gradients of the mean squared `error` by each of the weights: what autograd finds, in two thirds of its time.

    Only what was kept has a gradient, 3% of all products for 8 of 256 latents.
    """
    error = error * (2 / error.numel())
    to_f = (error @ decoder.T)[kept.rows, kept.latents]
    latents, order = kept.latents.sort(stable=True)
    starts = torch.searchsorted(latents, torch.arange(len(decoder), device=latents.device))
    rows = kept.rows[order]
    return {
        "encoder": bag(rows, x, starts, to_f[order]),
        "b_enc": torch.zeros_like(decoder[:, 0]).index_add_(0, kept.latents, to_f),
        "decoder": bag(rows, error, starts, kept.f[order]),
        "bias": error.sum(0),
    }


# --- SAEs -------------------------------------------------------------------------------------------------------------


class _Reconstruct(torch.autograd.Function):
    """Reconstruction from activations at some (row, feature) places, and the gradients that go through these alone.

    `values` are what is read there, before any norm: (x - b_dec) . w_enc + b_enc; `places` come row by row.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "row d"],
        w_enc: Float[Tensor, "d feature"],
        b_enc: Float[Tensor, " feature"],
        w_dec: Float[Tensor, "feature d"],
        b_dec: Float[Tensor, " d"],
        values: Float[Tensor, " place"],
        places: Int[Tensor, " place"],
    ) -> Float[Tensor, "row d"]:
        width = len(w_dec)
        features = places % width
        starts = torch.searchsorted(places, torch.arange(len(x), device=x.device) * width)
        ctx.save_for_backward(x, w_enc, w_dec, b_dec, values, places, features, starts)
        return bag(features, w_dec, starts, values) + b_dec

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, w_enc, w_dec, b_dec, values, places, features, starts = ctx.saved_tensors
        (out,) = gradients
        with torch.enable_grad():
            known = values.detach().requires_grad_(True)
            # of every place: the product of its row's gradient with its feature's decoder
            (read,) = torch.autograd.grad(bag(features, w_dec.detach(), starts, known), known, out)
        width = len(w_dec)
        features, order = features.sort(stable=True)
        rows = (places // width)[order]
        starts = torch.searchsorted(features, torch.arange(width, device=x.device))
        read = read[order]
        total = b_dec.new_zeros(width).index_add_(0, features, read)
        # x is read less b_dec: taken off here, once for each feature
        for_w_enc = bag(rows, x, starts, read).T - b_dec[:, None] * total
        for_w_dec = bag(rows, out, starts, values[order])
        return None, for_w_enc, total, for_w_dec, out.sum(0) - w_enc @ total, None, None


@functools.cache
def sparse_class() -> type[Any]:
    """The class of our BatchTopK SAEs, a subclass of SAELens' own.

    It is made when it is asked for, as SAELens takes seconds to import.
    """
    from sae_lens import BatchTopKTrainingSAE
    from sae_lens.saes.sae import TrainStepInput, TrainStepOutput

    class SparseBatchTopK(BatchTopKTrainingSAE):
        """SAELens' BatchTopK SAE, with the same activations, loss and gradients.

        SAELens sorts the whole batch x width array, and goes over it some twenty times. Here a partition finds the
        smallest activation that is kept, and decoder and gradients see the k of each row that are. Features are chosen
        by activation times decoder norm; in what they write the norm cancels. Activations that tie at the cut (the same
        token twice) are all kept, where SAELens drops some of them at random.
        """

        def reconstruct(self, x: Float[Tensor, "row d"]) -> tuple[Float[Tensor, "row d"], Tensor, Tensor]:
            """Reconstruction; flat places (row * width + feature) of what is kept; its activations."""
            with torch.no_grad():
                norm = self.W_dec.norm(dim=-1)
                # centre and norm go into weights and bias, so that the large array is written once
                bias = (self.b_enc - self.b_dec @ self.W_enc) * norm
                found = torch.addmm(bias, x, self.W_enc * norm).flatten()
                cut = number_th(found, min(int(self.cfg.k * len(x)), len(found)))
                places = (found >= cut if cut > 0 else found > 0).nonzero()[:, 0]
                kept = found[places]
                values = kept / norm[places % len(norm)]
            out = _Reconstruct.apply(x, self.W_enc, self.b_enc, self.W_dec, self.b_dec, values, places)
            return cast(Tensor, out), places, kept

        def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
            x = step_input.sae_in
            out, places, kept = self.reconstruct(x)
            loss = self.mse_loss_fn(out, x).sum(dim=-1).mean()
            self.update_topk_threshold(kept)
            # all that the trainer asks of activations is which features fired: one row says it
            fired = kept.new_zeros(1, self.cfg.d_sae).index_add_(1, places % self.cfg.d_sae, kept[None])
            return TrainStepOutput(
                sae_in=x,
                sae_out=out,
                feature_acts=fired,
                hidden_pre=fired,
                loss=loss,
                losses={"mse_loss": loss},
                metrics={"topk_threshold": self.topk_threshold},
            )

    return SparseBatchTopK
