"""A checkpoint made from a LoRA adapter, as a LoRA adapter again: a change of weights joins its products."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixturelens.models.load import load_model, with_adapters
from mixturelens.models.source import ADAPTER, Source, leaves_base, settings
from mixturelens.records import new_folder
from mixturelens.types import InputError, loading

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

MADE = "default"
"""What peft calls the adapter that lies in the folder itself, and not in one below it."""
SLACK = 1e-4
"""Error of a weight, as a part of the largest change of it, from which an adapter is not what it was to be."""


def save_adapter(
    source: Source, weights: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write the adapter `source` with other values in some parameters of the merged model as one adapter.

    `weights` are these parameters, whole and by name. What is written stands on the base of `source`, and
    `peft.PeftModel.from_pretrained` loads it; its rank is that of `source` and of the change together. Raises
    InputError where the change is no low-rank product of a linear layer, or the adapter adds anything but such
    products; nothing is written then.
    """
    if source.base is None:
        raise InputError(f"{source}: no adapter")
    config = settings(source.folder / ADAPTER)
    if not leaves_base(source) or config.get("use_dora") or config.get("modules_to_save"):
        raise InputError("R's adapter does more than add low-rank products to its base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, about transformers and about the names of adapters
        under = with_adapters(load_model(source.base), {"own": source})
        _add_change(under, weights)
        with loading(source, "peft cannot join another change to this adapter"):
            under.add_weighted_adapter(["own", "change"], [1.0, 1.0], MADE, combination_type="cat")
        _check(under, weights)
        under.peft_config[MADE].base_model_name_or_path = _base_of(source, config)
        with new_folder(folder) as temporary:
            under.save_pretrained(temporary, selected_adapters=[MADE])
            (temporary / "README.md").unlink(missing_ok=True)  # peft's empty model card
            tokenizer.save_pretrained(temporary)


def _add_change(under: Any, weights: Mapping[str, Tensor]) -> None:
    """What the weights differ by from base and adapter, as a second adapter."""
    import torch
    from peft import LoraConfig

    factors = {}
    for name, values in weights.items():
        module = under.base_model.model.get_submodule(name.rpartition(".")[0])
        layer = getattr(module, "base_layer", module)
        if not name.endswith(".weight") or not (isinstance(layer, torch.nn.Linear) or _turned(layer)):
            raise InputError(f"{name} is no weight of a linear layer, which is all that an adapter adds to")
        old = _merged(module, "own")
        change = values.double().cpu() - old
        left, sizes, right = torch.linalg.svd(change.T if _turned(layer) else change, full_matrices=False)
        # numbers of this precision are rounded at random, which looks like a change of full rank
        noise = torch.finfo(values.dtype).eps * float(old.square().mean().sqrt()) * sum(s**0.5 for s in old.shape)
        rank = max(1, int((sizes > noise).sum()))
        if 2 * rank > len(sizes):
            raise InputError(f"the change of {name} has rank {rank} of {len(sizes)}: no adapter holds that")
        root = sizes[:rank].sqrt()
        factors[name.removesuffix(".weight")] = (root[:, None] * right[:rank], left[:, :rank] * root)
    most = max(len(a) for a, _ in factors.values())
    own = under.peft_config["own"]
    config = LoraConfig(r=most, lora_alpha=most, target_modules=[*factors], fan_in_fan_out=own.fan_in_fan_out)
    under.add_adapter("change", config)
    for name, (a, b) in factors.items():
        layer = under.base_model.model.get_submodule(name)
        for weight, values in ((layer.lora_A["change"].weight, a), (layer.lora_B["change"].weight.T, b.T)):
            weight.data.zero_()
            weight.data[: len(values)] = values.to(weight)


def _turned(layer: Any) -> bool:
    """Whether a layer holds its weights as [in, out], as those of GPT-2 do."""
    return type(layer).__name__ == "Conv1D"


def _merged(module: Any, adapter: str) -> Tensor:
    """The weights of a layer with what an adapter adds to it, where it adds anything."""
    weight = getattr(module, "base_layer", module).weight.detach().double()
    if adapter in getattr(module, "lora_A", {}):
        weight = weight + module.get_delta_weight(adapter).double()
    return weight


def _check(under: Any, weights: Mapping[str, Tensor]) -> None:
    """The joined adapter must be the changed weights where these are, and R's own adapter elsewhere."""
    for name, module in under.base_model.model.named_modules():
        if MADE not in getattr(module, "lora_A", {}):
            continue
        given = weights.get(f"{name}.weight")
        wanted = _merged(module, "own") if given is None else given.double().cpu()
        error = float((_merged(module, MADE) - wanted).abs().max())
        if error > SLACK * max(1e-3, float((wanted - module.base_layer.weight.double()).abs().max())):
            raise InputError(f"an adapter of R and the change misses {name}.weight by {error:.1g}")


def _base_of(source: Source, config: Mapping[str, Any]) -> str:
    """The base that the written config names: that of the source's own, where this is not a path beside it."""
    named = config.get("base_model_name_or_path")
    if source.base is None or not named or source.base.folder == source.folder or (source.folder / named).is_dir():
        return str((source.base or source).folder.resolve())
    return str(named)
