"""SAEs as SAELens saves them, its own and other people's, read as dictionaries without importing it (10 s).

Standard, gated, JumpReLU and BatchTopK SAEs are one formula: an affine read that counts where it exceeds a threshold. A
gated SAE reads twice along one direction, so that its gate opens where its magnitude exceeds another number. TopK makes
features compete, and normalisations read each token at its own scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixturelens.features.dictionary import Dictionary, Norm
from mixturelens.files import read_json
from mixturelens.types import Component, InputError, loading

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"

ARCHITECTURES = ("standard", "topk", "batchtopk", "jumprelu", "gated")
NORMS: Mapping[str, Norm | None] = {
    "none": None,
    "expected_average_only_in": None,  # one factor for all tokens, folded into the weights once training is done
    "constant_norm_rescale": "length",
    "layer_norm": "layer",
}
PLACES: Mapping[str, Component] = {
    "hook_resid_pre": "resid_pre",
    "hook_in": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_out": "resid_post",
    "hook_attn_out": "attn_out",
    "attn.hook_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "mlp.hook_out": "mlp_out",
    "mlp.hook_post": "neurons",
    "mlp.out.hook_in": "neurons",
    "attn.hook_z": "z",
    "attn.o.hook_in": "z",
}
"""Names of hook points inside a block, old and new, -> component."""


@dataclass(frozen=True)
class Saved:
    """An SAE from a folder: its features, and what its config says of where they are at home."""

    folder: Path
    dictionary: Dictionary
    hook_name: str | None
    model_name: str | None
    notes: tuple[str, ...] = ()

    @property
    def at(self) -> tuple[int, Component]:
        """The place that it reads. Raises InputError where its config names none that can be looked at."""
        if self.hook_name is None:
            raise InputError(f"{self.folder / CONFIG}: names no hook (`hook_name`), so that nothing says what it reads")
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)", self.hook_name)
        if found is None or found[2] not in PLACES:
            raise InputError(
                f"{self.folder / CONFIG}: hook_name is {self.hook_name!r}; a residual stream, an output or the neurons "
                "of a block are needed, as blocks.5.hook_resid_post"
            )
        component = PLACES[found[2]]
        if component == "z":
            raise InputError(
                f"{self.folder / CONFIG}: hook_name is {self.hook_name!r}; SAEs of heads' outputs can be read, but "
                "features are looked at where there is one vector a token"
            )
        return int(found[1]), component


def load_sae(folder: Path) -> Dictionary:
    """A saved SAE as a dictionary of the same features and reconstruction. Raises InputError as `read_sae` does."""
    return read_sae(folder).dictionary


def read_sae(folder: Path) -> Saved:
    """A saved SAE, with what its config says.

    Of heads' outputs (`reshape_activations`) it reads all heads side by side. Raises InputError, naming the file, for
    other architectures and normalisations, and for weights that are missing, misshapen or not finite.
    """
    config = read_config(folder)
    with loading(folder / CONFIG, "not the configuration of an SAE"):  # a setting is no text where one is needed, say
        return _saved(folder, config)


def _saved(folder: Path, config: dict[str, Any]) -> Saved:
    metadata = config.get("metadata") or {}

    def told(*names: str) -> Any:
        """What the config says under any of these names: they moved into `metadata`, and changed."""
        return next((of[name] for name in names for of in (metadata, config) if of.get(name) is not None), None)

    def wrong(what: str) -> InputError:
        return InputError(f"{folder / CONFIG}: {what}")

    architecture = config.get("architecture") or "standard"
    if told("activation_fn", "activation_fn_str") == "topk":
        architecture = "topk"
    if architecture not in ARCHITECTURES:
        raise wrong(f"architecture is {architecture!r}; {', '.join(ARCHITECTURES)} can be read")
    if told("hook_head_index", "hook_point_head_index") is not None:
        raise wrong("it reads a single head; SAEs of whole vectors are needed")
    normalize = config.get("normalize_activations") or "none"
    normalize = "expected_average_only_in" if normalize is True else normalize
    if normalize not in NORMS:
        raise wrong(f"normalize_activations is {normalize!r}; {', '.join(NORMS)} can be read")
    if config.get("reshape_activations", "none") not in ("none", "hook_z"):
        raise wrong(f"reshape_activations is {config['reshape_activations']!r}; none and hook_z can be read")
    d, width = config.get("d_in"), config.get("d_sae")
    if not (isinstance(d, int) and isinstance(width, int) and d > 0 and width >= 0):  # rows that never vary leave none
        raise wrong(f"d_in and d_sae are {d!r} and {width!r}, where two sizes are needed")
    weights = _weights(folder, architecture, d, width)
    factor, notes = None, ()
    if normalize == "expected_average_only_in":
        factor = _factor(folder)
        if factor is None:
            notes = ("it was trained on scaled activations, and no factor lies beside it: read as it is",)
    found = _dictionary(architecture, weights, config, told, factor, wrong)
    return Saved(
        folder,
        Dictionary(**found, bias=weights["b_dec"], norm=NORMS[normalize]),
        told("hook_name", "hook_point"),
        told("model_name"),
        notes,
    )


def _dictionary(
    architecture: str, weights: dict[str, Tensor], config: dict[str, Any], told: Any, factor: float | None, wrong: Any
) -> dict[str, Any]:
    """The fields of a dictionary from weights, in which a scale of the activations is folded first."""
    if factor is not None:
        weights["W_enc"] *= factor
        weights["W_dec"] /= factor
        weights["b_dec"] /= factor
    read, write = weights["W_enc"].T, weights["W_dec"]
    offset = -weights["b_gate" if architecture == "gated" else "b_enc"]
    threshold = torch.zeros_like(offset)
    if config.get("apply_b_dec_to_input", True):
        offset = offset + read @ weights["b_dec"]
    top = None
    if architecture == "jumprelu":
        threshold = weights["threshold"].clamp(min=0)  # what fires is rectified as well
    elif architecture == "gated":
        gain = weights["r_mag"].exp()
        # its magnitude is the gate's read times the gain, plus this; it counts where that and the gate are above 0
        beyond = weights["b_mag"] - gain * weights["b_gate"]
        read, offset, threshold = gain[:, None] * read, gain * offset - beyond, beyond.clamp(min=0)
    elif config.get("rescale_acts_by_decoder_norm", False):
        norm = write.norm(dim=1).clamp(min=1e-8)
        read, offset, write = norm[:, None] * read, norm * offset, write / norm[:, None]
    if architecture == "batchtopk":
        scale = factor if factor is not None and config.get("rescale_acts_by_decoder_norm", False) else 1.0
        threshold = threshold + float(weights["topk_threshold"]) / scale
    if architecture == "topk":
        top = config.get("k", (told("activation_fn_kwargs") or {}).get("k"))
        if not isinstance(top, int) or not 0 < top <= len(offset):
            raise wrong(f"k is {top!r}, where the number of features that fire is needed, up to {len(offset)}")
    return {
        "read": read.contiguous(),
        "offset": offset,
        "threshold": threshold,
        "write": write,
        "top": top if top != len(offset) else None,
    }


def _weights(folder: Path, architecture: str, d: int, width: int) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    file = folder / WEIGHTS
    if not file.is_file():
        raise InputError(f"{file}: no such file; is the SAE whole?")
    with loading(file, "not a safetensors file"):
        weights = {name: value.float() for name, value in load_file(file).items()}
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d, width), "W_dec": (width, d), "b_dec": (d,)}
    own = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}.get(architecture, ("b_enc",))
    shapes |= dict.fromkeys(own, (width,))
    if architecture == "batchtopk":
        shapes["topk_threshold"] = ()
    for name, shape in shapes.items():
        if name not in weights or tuple(weights[name].shape) != shape:
            found = list(weights[name].shape) if name in weights else "absent"
            raise InputError(f"{file}: {name} is {found}, where {CONFIG} says {list(shape)}")
        if not bool(weights[name].isfinite().all()):
            raise InputError(f"{file}: {name} holds numbers that are not finite")
    scaling = weights.get("scaling_factor", weights.get("finetuning_scaling_factor"))
    if scaling is not None and not torch.allclose(scaling, torch.ones_like(scaling)):
        raise InputError(f"{file}: holds a scaling_factor of finetuning, which SAELens reads no more")
    return weights


def _factor(folder: Path) -> float | None:
    """What a trainer's checkpoint multiplies activations by, from the file that lies beside the weights."""
    if not (folder / SCALER).is_file():
        return None
    held = read_json(folder / SCALER, "is gone", foreign=True)
    if "scaling_factor" not in held:
        raise InputError(f"{folder / SCALER}: holds no scaling_factor")
    found = held["scaling_factor"]
    if found is not None and not (isinstance(found, int | float) and 0 < found < float("inf")):
        raise InputError(f"{folder / SCALER}: scaling_factor is {found!r}, where a number above 0 is needed")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a saved SAE, from its folder. Raises InputError where it is absent or no JSON mapping."""
    file = folder / CONFIG
    return read_json(file, f"no such file; an SAE is a folder with {CONFIG} and {WEIGHTS}", foreign=True)
