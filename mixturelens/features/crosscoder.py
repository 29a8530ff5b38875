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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixturelens.features.dictionary import Dictionary
from mixturelens.records import new_folder
from mixturelens.types import Frozen, InputError, Side

WIDTH = 4
"""Latents a dimension, unless asked otherwise."""
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
ROWS = 8192
"""Rows that are encoded at once."""
FILE, SETTINGS = "crosscoder.safetensors", "crosscoder.json"

EXCLUSIVE = 0.9
"""Relative decoder norm in one checkpoint from which a latent looks exclusive to it (arXiv 2504.02922, section 3.1)."""
ON_ERROR, ON_RECONSTRUCTION = 0.2, 0.5
"""Largest latent scaling of an exclusive latent (there, section 3.2): of what the other checkpoint's error still holds
of it, and of what the other latents write of it there."""

Progress = Callable[[int, int, dict[str, float]], None]
"""Called as progress(step, steps, numbers)."""
Kind = Literal["shared", "before", "after", "false", "dead"]
"""Exclusive to S or R; `false`: exclusive by norm and not by latent scaling; `dead`: never fires."""
SIDES: tuple[Side, Side] = ("before", "after")


class Stream(Protocol):
    """Activations of S and R at one site on the same tokens, in batches: a pure function of step and seed."""

    @property
    def dim(self) -> int: ...

    def __len__(self) -> int: ...

    def batch(self, step: int, size: int, seed: int) -> Float[Tensor, "row model d"]: ...


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
            read=self.encoder.flatten(0, 1).T,
            offset=-self.b_enc,
            threshold=self.threshold / self.norms.sum(1),
            write=self.decoder.flatten(1),
            bias=self.bias.flatten(),
        )

    def encode(self, x: Float[Tensor, "row model d"]) -> Float[Tensor, "row latent"]:
        return self.dictionary.encode(x.flatten(1))

    def decode(self, f: Float[Tensor, "row latent"]) -> Float[Tensor, "row model d"]:
        return self.dictionary.decode(f).unflatten(1, self.bias.shape)

    def to(self, device: str) -> Crosscoder:
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
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in (FILE, SETTINGS):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: no such file; a crosscoder is a folder of {FILE} and {SETTINGS}")
    try:
        told = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        threshold, settings = float(told["threshold"]), dict(told["trained"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder / SETTINGS}: not the settings of a crosscoder ({error})") from None
    try:
        tensors = load_file(folder / FILE)
    except SafetensorError as error:
        raise InputError(f"{folder / FILE}: not a safetensors file ({error})") from None
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
    *,
    width: int | None = None,
    k: int = 8,
    steps: int = 1200,
    batch: int = 1024,
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Crosscoder:
    """A BatchTopK crosscoder of S and R, by Adam on the mean squared error of both.

    In every batch the `k` * `batch` largest products f * (|d_S| + |d_R|) are kept (arXiv 2504.02922, section 2.3), of
    activations that are centred and scaled to vary equally in both checkpoints. Latents begin as activations of
    single tokens; those that fire no more take over what is badly reconstructed.

    The same seed gives the same numbers. With a `folder` the result is saved there, and a training that was killed goes
    on, from a state in a hidden folder beside it, to the same numbers to the bit; one that is there is loaded. Raises
    InputError for sizes that cannot be, constant activations, or a folder with a crosscoder of something else.
    """
    width = WIDTH * activations.dim if width is None else width
    if not 1 <= k <= width or steps < 1 or batch < 1:
        raise InputError(
            f"a crosscoder of {width} latents, {k} a row, {steps} steps of {batch} rows: none can be under 1"
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
    training = _Training(activations, first, settings)
    work = folder and folder.with_name(f".{folder.name}.training")
    if work is not None:
        training.resume(work)
    while training.step < steps:
        error = training.advance()
        if progress is not None:
            progress(training.step, steps, {"unexplained": error})
        if work is not None and training.step % SAVE_EVERY == 0 and training.step < steps:
            training.save(work)
    crosscoder = training.finished()
    if folder is not None and work is not None:
        crosscoder.save(folder, settings)
        shutil.rmtree(work, ignore_errors=True)
    return crosscoder


@dataclass(frozen=True)
class Kept:
    """The few latents that BatchTopK keeps in a batch, row by row: sums over them are sums over bags of rows."""

    rows: Int[Tensor, " kept"]
    latents: Int[Tensor, " kept"]
    f: Float[Tensor, " kept"]
    number: int
    """Rows of the batch."""

    def decode(self, decoder: Float[Tensor, "latent both"]) -> Float[Tensor, "row both"]:
        starts = torch.searchsorted(self.rows, torch.arange(self.number, device=self.rows.device))
        return _bags(self.latents, decoder, starts, mode="sum", per_sample_weights=self.f)


_bags = torch.nn.functional.embedding_bag


def gradients(
    kept: Kept,
    x: Float[Tensor, "row both"],
    error: Float[Tensor, "row both"],
    decoder: Float[Tensor, "latent both"],
) -> dict[str, Tensor]:
    """Of the mean squared error, to all weights: what autograd finds, in two thirds of its time.

    Only what was kept has a gradient, 3% of all products for 8 of 256 latents.
    """
    error = error * (2 / error.numel())
    to_f = (error @ decoder.T)[kept.rows, kept.latents]
    latents, order = kept.latents.sort(stable=True)
    starts = torch.searchsorted(latents, torch.arange(len(decoder), device=latents.device))
    rows = kept.rows[order]
    return {
        "encoder": _bags(rows, x, starts, mode="sum", per_sample_weights=to_f[order]),
        "b_enc": _bags(order, to_f[:, None].contiguous(), starts, mode="sum")[:, 0],
        "decoder": _bags(rows, error, starts, mode="sum", per_sample_weights=kept.f[order]),
        "bias": error.sum(0),
    }


class _Training:
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
        return ((x.float() - self.mean) * self.scale[:, None]).flatten(1)

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(1_000_003 * self.seed + step)

    def rate(self) -> float:
        left = (self.steps - self.step) / max(1.0, DECAY * self.steps)
        return RATE * min(1.0, (self.step + 1) / WARM_UP, 0.1 + 0.9 * left)

    def products(self, x: Float[Tensor, "row both"]) -> tuple[Float[Tensor, "row latent"], Float[Tensor, "row latent"]]:
        """Latents before the choice, and what they are chosen by: times the sum of their decoders' norms."""
        f = torch.addmm(self.weights["b_enc"], x, self.weights["encoder"].T)
        return f, f * self.weights["decoder"].unflatten(1, (2, -1)).norm(dim=2).sum(1)

    def kept(self, x: Float[Tensor, "row both"]) -> Kept:
        f, by = self.products(x)
        rows, latents = (by >= smallest_kept(by, self.k)).nonzero(as_tuple=True)
        return Kept(rows, latents, f[rows, latents], len(x))

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
        models = (2, self.activations.dim)
        encoder = self.weights["encoder"].T.unflatten(0, models) * self.scale[:, None, None]
        return Crosscoder(
            encoder=encoder.contiguous(),
            b_enc=self.weights["b_enc"] - torch.einsum("md,mdl->l", self.mean, encoder),
            decoder=(self.weights["decoder"].unflatten(1, models) / self.scale[:, None]).contiguous(),
            bias=self.mean + self.weights["bias"].unflatten(0, models) / self.scale[:, None],
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


def smallest_kept(by: Float[Tensor, "row latent"], k: int) -> float:
    """The smallest of the k largest numbers a row, k * rows of them over the whole batch; never 0 or less.

    >>> smallest_kept(torch.tensor([[5.0, 4.0, 3.0], [2.0, 1.0, 0.0]]), 2)
    2.0
    """
    number = min(k * len(by), by.numel())
    flat = by.detach().flatten()
    if flat.device.type == "cpu":  # a partition, which does not sort what it finds: seven times faster than top-k
        least = float(np.partition(flat.numpy(), len(flat) - number)[len(flat) - number])
    else:
        least = float(flat.topk(number, sorted=False).values.min())
    return max(least, float(np.finfo(np.float32).tiny))


# --- what is found ----------------------------------------------------------------------------------------------------


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
    """Which latents one checkpoint has alone, by decoder norm and by latent scaling (arXiv 2504.02922, section 3.2).

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
    x_s: Float[Tensor, "*batch d"],
    x_r: Float[Tensor, "*batch d"],
    latents: Sequence[int] | Int[Tensor, " part"],
    side: Side = "after",
) -> Float[Tensor, "*batch d"]:
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
    both = torch.stack([x_s, x_r], -2).flatten(-2).to(crosscoder.bias.dtype)
    f = crosscoder.dictionary.part(units).encode(both)
    own = SIDES.index(side)
    x = (x_s, x_r)[own]
    return x - (f @ crosscoder.decoder[units, own]).to(x.dtype)
