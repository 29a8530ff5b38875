"""A crosscoder over two checkpoints: sparse latents that S and R share, and those that one of them has alone.

Lindsey et al. 2024 (Sparse crosscoders for cross-layer features and model diffing). Trained with BatchTopK, and judged
by latent scaling, as in Minder et al. 2025 (arXiv 2504.02922): an L1 penalty, and decoder norms on their own, call
latents exclusive that are not.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mixturelens.features.batchtopk import KeptLatents, gradients, smallest_kept
from mixturelens.features.dictionary import Dictionary
from mixturelens.features.effort import WIDTH, Training
from mixturelens.files import read_json
from mixturelens.records import new_folder
from mixturelens.types import InputError, Side, loading

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
SAVE_EVERY = 300
"""Steps between two saved states."""
FILE, SETTINGS = "crosscoder.safetensors", "crosscoder.json"


Progress = Callable[[int, int, dict[str, float]], None]
"""Called as progress(step, steps, numbers)."""
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
        return Crosscoder(
            **{name: value.to(device) for name, value in self._tensors().items()}, threshold=self.threshold
        )

    def _tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "threshold"}

    def save(self, folder: Path, settings: Mapping[str, Any] | None = None) -> Path:
        """Write `folder`, whole or not at all; `settings` say what it was trained on."""
        from safetensors.torch import save_file

        with new_folder(folder) as new:
            save_file({name: value.contiguous() for name, value in self._tensors().items()}, new / FILE)
            text = json.dumps({"threshold": self.threshold, "trained": dict(settings or {})}, indent=1, allow_nan=False)
            (new / SETTINGS).write_text(text + "\n", encoding="utf-8")
        return folder


def load_crosscoder(folder: Path) -> Crosscoder:
    """What `save` wrote. Raises InputError naming the file that is missing, or does not fit."""
    return _load(folder)[0]


def _load(folder: Path) -> tuple[Crosscoder, dict[str, Any]]:
    from safetensors.torch import load_file

    for name in (FILE, SETTINGS):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: no such file; a crosscoder is a folder of {FILE} and {SETTINGS}")
    told = read_json(folder / SETTINGS, "is gone")
    with loading(folder / SETTINGS, "not the settings of a crosscoder"):
        threshold, settings = float(told["threshold"]), dict(told["trained"])
    with loading(folder / FILE, "not a safetensors file"):
        tensors = load_file(folder / FILE)
    names = [field.name for field in fields(Crosscoder) if field.name != "threshold"]
    if set(tensors) != set(names):
        raise InputError(f"{folder / FILE}: holds {sorted(tensors)}, expected {sorted(names)}")
    if tensors["encoder"].ndim != 3 or tensors["encoder"].shape[0] != 2:
        raise InputError(
            f"{folder / FILE}: encoder has shape {list(tensors['encoder'].shape)}, expected [2, d, latent]"
        )
    models, d, width = tensors["encoder"].shape
    expected = {"b_enc": [width], "decoder": [width, models, d], "bias": [models, d], "scale": [models]}
    for name, shape in expected.items():
        if list(tensors[name].shape) != shape:
            raise InputError(f"{folder / FILE}: {name} has shape {list(tensors[name].shape)}, expected {shape}")
    for name, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise InputError(f"{folder / FILE}: {name} holds numbers that are not finite")
    return Crosscoder(**tensors, threshold=threshold), settings


# --- training ---------------------------------------------------------------------------------------------------------


def train_crosscoder(
    activations: Stream,
    training: Training | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Crosscoder:
    """A BatchTopK crosscoder of S and R, by Adam on the mean squared error of both.

    In every batch the k * batch largest products f * (|d_S| + |d_R|) are kept (arXiv 2504.02922), of activations that
    are centred and scaled to vary equally in both checkpoints. Latents begin as activations of
    single tokens; those that fire no more take over what is badly reconstructed.

    The same seed gives the same numbers. With a `folder` the result is saved there, and a training that was killed goes
    on, from a state in a hidden folder beside it, to the same numbers to the bit; one that is there is loaded. Raises
    InputError for sizes that cannot be, constant activations, or a folder with a crosscoder of something else.
    """
    training = training or Training()
    width = WIDTH * activations.dim if training.width is None else training.width
    k, steps, batch, seed = int(training.k), training.steps, training.batch, training.seed
    if not 1 <= k <= width or k != training.k or steps < 1 or batch < 1:
        raise InputError(
            f"a crosscoder of {width} latents, {training.k:g} a row, {steps} steps of {batch} rows: all are whole "
            "numbers, and none can be under 1"
        )
    if not len(activations):
        raise InputError("there are no activations to train a crosscoder on")
    first = activations.batch(0, SAMPLED * batch, seed)
    if first.shape[1:] != (2, activations.dim):
        raise InputError(f"a crosscoder takes activations [row, 2, {activations.dim}], not {list(first.shape)}")
    settings = {
        "width": width,
        "k": k,
        "steps": steps,
        "batch": batch,
        "seed": seed,
        "rows": len(activations),
        "activations": hashlib.sha256(first.cpu().float().numpy().tobytes()).hexdigest()[:16],
    }
    if folder is not None and folder.exists():
        there, about = _load(folder)
        if about != settings:
            differ = next(name for name in settings if about.get(name) != settings[name])
            raise InputError(
                f"{folder} holds another crosscoder ({differ}: {about.get(differ)}, not {settings[differ]}); "
                "give another folder"
            )
        return there.to(str(first.device))
    course = _Course(activations, first, settings)
    work = folder and folder.with_name(f".{folder.name}.training")
    if work is not None:
        course.resume(work)
    while course.step < steps:
        error = course.advance()
        if progress is not None:
            progress(course.step, steps, {"unexplained": error})
        if work is not None and course.step % SAVE_EVERY == 0 and course.step < steps:
            course.save(work)
    crosscoder = course.finished()
    if folder is not None and work is not None:
        crosscoder.save(folder, settings)
        shutil.rmtree(work, ignore_errors=True)
    return crosscoder


class _Course:
    """Everything that a step changes, and nothing else: what it draws follows from seed and step."""

    def __init__(self, activations: Stream, first: Float[Tensor, "row model d"], settings: Mapping[str, Any]) -> None:
        self.activations, self.settings = activations, settings
        self.width, self.k, self.batch, self.seed = (settings[name] for name in ("width", "k", "batch", "seed"))
        self.steps, self.step = settings["steps"], 0
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

    def advance(self) -> float:
        """One step of Adam; returns the share of the batch's variance that was not explained."""
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
        return float(error.square().mean())

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

    # --- a state that a killed training goes on from ---

    def _state(self) -> dict[str, Tensor]:
        moments = {
            f"{name}.{key}": self.optimizer.state[weight][key]
            for name, weight in self.weights.items()
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
        return {**self.weights, **moments, "unused": self.unused}

    def save(self, work: Path) -> None:
        """The state, in a file that is there whole or not at all."""
        from safetensors.torch import save_file

        work.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=work, suffix=".part")
        os.close(handle)
        told = {"step": str(self.step), "settings": json.dumps(self.settings)}
        save_file({name: value.contiguous() for name, value in self._state().items()}, temporary, told)
        os.replace(temporary, work / "state.safetensors")

    def resume(self, work: Path) -> None:
        """Go on from a saved state; one of another training is left alone and written over."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(work / "state.safetensors", framework="pt") as file:
                told = file.metadata() or {}
                if json.loads(told.get("settings", "null")) != self.settings:
                    return
                state = {name: file.get_tensor(name).to(self.mean.device) for name in file.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError):
            return
        self.step, self.unused = int(told["step"]), state["unused"]
        for name, weight in self.weights.items():
            weight.copy_(state[name])
            self.optimizer.state[weight] = {key: state[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
