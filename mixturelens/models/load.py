"""Load a model or tokenizer faithfully; refuse what is not safe or does not fit."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import tempfile
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mixturelens.files import WRITTEN, read_json, read_text
from mixturelens.limits import limited
from mixturelens.models.source import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    CONFIG,
    INDEX,
    Source,
    content_of,
    find_source,
    settings,
    tensors_of,
    weight_files,
)
from mixturelens.types import InputError, loading

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
DTYPES = ("float32", "bfloat16", "float16")

_HARMLESS = re.compile(
    r"(^|\.)(attn|attention|self_attn)\.(bias|masked_bias)$|rotary_emb\.(inv_freq|cos_cached|sin_cached)$"
    r"|^(v_head|score|value_head|classifier)\."
)
"""Tensors that some savers store beside a model's own: masks, tables of rotations, the value head of RL."""


SECONDS = 5.0
"""That the patterns of an adapter may take."""
PADDED = 1_000_000
"""Tokens of a text, at most."""
EXPERTS = 4096
"""Experts of a layer, at most."""
_WRAPPERS = ("_orig_mod.", "module.", "base_model.model.")


def load_tokenizer(source: Source | Path) -> PreTrainedTokenizerBase:
    """The tokenizer exactly as its tokenizer.json says; that of an adapter's base where the adapter has none.

    AutoTokenizer picks a class by model type, and some classes replace the saved pre-tokenizer by their own.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source = find_source(source)
    folder = tokenizer_folder(source) or source.weights
    whole = folder / "tokenizer.json"
    with loading(folder, "no tokenizer could be loaded"):
        _check_tokenizer(folder)
        if whole.is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            tokenizer.backend_tokenizer.no_padding()
            tokenizer.backend_tokenizer.no_truncation()  # a prompt is read to its end
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not isinstance(tokenizer.chat_template, (str, dict, type(None))):
            raise InputError(f"{folder}: its chat template is no text; mend tokenizer_config.json")
        tokenizer.decode(tokenizer.encode("\n"))  # what is broken in every text fails here
    return tokenizer


def _check_tokenizer(folder: Path) -> None:
    """Refuse files whose size no tokenizer has, and padding that would take all memory before it can be turned off."""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            settings(folder / name)
    for template in (folder / "chat_template.jinja", *folder.glob("additional_chat_templates/*.jinja")):
        if template.is_file():
            read_text(template, "is gone", WRITTEN)
    file = folder / "tokenizer.json"
    if file.is_file() and not _bounded_padding(file, content_of(file)):
        raise InputError(f"{file}: pads texts to more than {PADDED} tokens; set its padding to null")


@functools.lru_cache(maxsize=64)
def _bounded_padding(file: Path, content: str) -> bool:
    padding = read_json(file, "is gone", foreign=True).get("padding")
    numbers = [padding.get("pad_to_multiple_of"), padding.get("strategy")] if isinstance(padding, dict) else []
    numbers += [each for strategy in numbers if isinstance(strategy, dict) for each in strategy.values()]
    return all(each <= PADDED for each in numbers if isinstance(each, (int, float)))


def tokenizer_folder(source: Source) -> Path | None:
    """The folder that a checkpoint's tokenizer lies in; None where neither it nor its base has one."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    return next((folder for folder in source.folders if any((folder / name).is_file() for name in names)), None)


def load_config(source: Source | Path) -> PretrainedConfig:
    """The config of a checkpoint's full weights. Raises InputError naming the folder."""
    from transformers import AutoConfig

    folder = find_source(source).weights
    with loading(folder, f"{CONFIG} describes no model that transformers knows"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        text = config.get_text_config()
        for name in ("num_hidden_layers", "vocab_size"):
            number = getattr(text, name, None)
            if number is not None and (not isinstance(number, int) or number < 1):
                raise InputError(f"{folder}: {name} is {number!r} in {CONFIG}")
    _check_kind(folder, config)
    return config


RECURRENT = ("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm")
"""Models that carry a state from token to token, and no keys and values that a completion could go on from."""


def _check_kind(folder: Path, config: PretrainedConfig) -> None:
    """Refuse models that do not predict the next token from keys and values of the tokens before it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind = config.model_type
    needed = "give a causal transformer (Llama, Qwen, Gemma, GPT-2, ...)"
    if kind in RECURRENT:
        raise InputError(f"{folder}: a {kind} model is recurrent, it has no attention to look into; {needed}")
    alone = not any(getattr(config, name, False) for name in ("is_encoder_decoder", "is_decoder", "causal"))
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and alone:
        raise InputError(
            f"{folder}: a {kind} model fills masks, each token sees those behind it; {needed}, or set is_decoder in "
            f"{CONFIG} if it was trained to predict the next token"
        )


def skeleton(source: Source | Path) -> nn.Module:
    """The model without its weights: names and shapes alone."""
    import torch
    from transformers import AutoModelForCausalLM

    source = find_source(source)
    config = load_config(source)
    _any_attention(config)
    with loading(source.weights, "cannot be loaded as a causal language model"), torch.device("meta"):
        _check_counts(source.weights, config)
        return AutoModelForCausalLM.from_config(config)


def _check_counts(folder: Path, config: PretrainedConfig) -> None:
    """Refuse a config that asks for more parts than its weights have tensors: making them would take forever."""
    tensors = _tensors(folder)
    for key, value in config.get_text_config().to_dict().items():
        most = len(tensors) if "layer" in key else EXPERTS if "expert" in key or "block" in key else math.inf
        if isinstance(value, int) and key.strip("_").startswith(("n_", "num_")) and value > most:
            raise InputError(f"{folder}: {key} is {value} in {CONFIG}, and the weights have {len(tensors)} tensors")


def _tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's weights, without the prefix of a wrapper."""
    held = {name: shape for file in weight_files(folder) for name, shape in tensors_of(file).items()}
    prefix = _prefix(held)
    return {name.removeprefix(prefix): shape for name, shape in held.items()}


def _check_weights(source: Source, dtype: torch.dtype, device: str) -> None:
    """Refuse weights of other shapes than the config's, and more than the machine has memory, before they are read."""
    model = skeleton(source)
    held = _tensors(source.folder)
    for name, tensor in sorted(model.state_dict().items()):
        if name in held and held[name] != tuple(tensor.shape):
            raise _misshapen(source, name, held[name], tensor.shape)
    needed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers())) * dtype.itemsize
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    if device == "cpu" and needed > there:
        raise InputError(
            f"{source}: takes {needed / 1e9:.0f} GB of memory, and this machine has {there / 1e9:.0f}; give a smaller "
            "model, --dtype bfloat16, or a --device with more"
        )


def _misshapen(source: Source, name: str, held: Sequence[int], needed: Sequence[int]) -> InputError:
    return InputError(f"{source}: {name} has shape {list(held)}, and {CONFIG} asks for {list(needed)}")


def _any_attention(config: PretrainedConfig) -> None:
    """An implementation of attention that a config asks for is a matter of the machine, not of the checkpoint."""
    config._attn_implementation = None


def load_model(
    source: Source | Path, device: str = "cpu", dtype: torch.dtype | str | None = None, device_map: str | None = None
) -> PreTrainedModel:
    """A causal language model in eval mode, fp32 unless asked otherwise; an adapter is merged into its base.

    Raises InputError if the checkpoint is unsafe, or a weight is missing, not expected, of another shape or not finite.
    """
    import torch
    from transformers import AutoModelForCausalLM

    source = find_source(source)
    if source.base is not None:
        model = with_adapters(load_model(source.base, device, dtype, device_map), {"only": source})
        with loading(source, "the adapter cannot be merged"):
            merged = model.merge_and_unload(adapter_names=["only"]).eval()
        _check_finite(source, merged)
        return merged
    config = load_config(source)
    _any_attention(config)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    placed = {} if device_map is None else {"device_map": device_map}
    if device_map is None:
        _check_weights(source, wanted, device)
    with (
        loading(source, "cannot be loaded as a causal language model"),
        _without_adapter(source.folder) as folder,
        torch.random.fork_rng(devices=[]),
    ):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=wanted,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            key_mapping=_wrapper(source.folder),
            **placed,
        )
    model, info = cast(Any, loaded)
    model.name_or_path = model.config._name_or_path = str(source.folder)
    _check_keys(source, info)
    _check_finite(source, model)
    return model.eval() if device_map is not None else model.eval().to(device)


def _wrapper(folder: Path) -> dict[str, str] | None:
    """What to take off the names of weights that were saved from inside a wrapper."""
    prefix = _prefix(tensors_of(weight_files(folder)[0]))
    return {f"^{re.escape(prefix)}": ""} if prefix else None


def _prefix(names: Collection[str]) -> str:
    """What stands before all names of weights that were saved from inside a wrapper (torch.compile, data parallel)."""
    return next((each for each in _WRAPPERS if names and all(name.startswith(each) for name in names)), "")


@contextlib.contextmanager
def _without_adapter(folder: Path) -> Iterator[Path]:
    """A folder as its base weights alone: transformers applies an adapter that lies beside them without a word."""
    if not (folder / "adapter_config.json").is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory() as kept:
        beside = [folder / name for name in (CONFIG, "generation_config.json", INDEX)]
        for file in (*weight_files(folder), *beside):
            if file.is_file():
                Path(kept, file.name).symlink_to(file.resolve())
        yield Path(kept)


def _check_keys(source: Source, info: dict[str, Any]) -> None:
    mismatched: list[tuple[str, Sequence[int], Sequence[int]]] = sorted(info.get("mismatched_keys") or [])
    for name, held, needed in mismatched:
        raise _misshapen(source, name, held, needed)
    for problem in ("missing_keys", "unexpected_keys"):
        names = sorted(name for name in info.get(problem) or () if not _HARMLESS.search(name))
        if names:
            raise InputError(f"{source}: {problem.replace('_', ' ')} in the weights, first: {names[0]}")


def _check_finite(source: Source, model: nn.Module) -> None:
    for name, tensor in model.named_parameters():
        if not bool(tensor.isfinite().all()):
            raise InputError(
                f"{source}: {name} has weights that are NaN or infinite; the training that made it diverged"
            )


def with_adapters(model: PreTrainedModel, adapters: dict[str, Source]) -> Any:
    """The model under peft, with LoRA adapters by name. Raises InputError for adapters that do not fit it."""
    from peft import PeftModel

    under: Any = model
    for name, source in adapters.items():
        with loading(source, f"the adapter does not fit its base {source.weights}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peft, about transformers
            _check_patterns(source, model)
            device = str(next(model.parameters()).device)
            if isinstance(under, PeftModel):
                under.load_adapter(str(source.folder), adapter_name=name, torch_device=device)
            else:
                under = PeftModel.from_pretrained(under, str(source.folder), adapter_name=name, torch_device=device)
            held = set(tensors_of(source.folder / ADAPTER_WEIGHTS))
        _check_adapter_keys(source, held, under, name)
        _check_finite(source, under)
    return under.eval()


def _check_patterns(source: Source, model: nn.Module) -> None:
    """Try the patterns of an adapter on the names of its base's modules, where that can be stopped."""
    config = settings(source.folder / ADAPTER)
    patterns = [config.get(key) for key in ("target_modules", "exclude_modules", "layers_pattern")]
    patterns += [key for each in ("rank_pattern", "alpha_pattern") for key in config.get(each) or ()]
    with limited(SECONDS):
        for pattern in (each for each in patterns if isinstance(each, str)):
            compiled = re.compile(rf"(.*\.)?({pattern})")
            for name, _ in model.named_modules():
                compiled.fullmatch(name)


def _check_adapter_keys(source: Source, held: set[str], model: Any, name: str) -> None:
    """Every tensor of the adapter must have gone somewhere, and every module it adds must have come from it."""
    from peft import get_peft_model_state_dict

    with loading(source, "the adapter cannot be read back"):
        taken = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    own = set(model.state_dict())
    for problem, names in (("has", held - taken - own), ("lacks", taken - held)):
        odd = sorted(each for each in names if "lora_" in each or problem == "has")
        if odd:
            raise InputError(
                f"{source}: the adapter {problem} {odd[0]}, which does not fit its base {source.weights}; give the "
                "right --base"
            )


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a completion: those of the generation config, else of the config, else of the tokenizer.

    Models that a pair hands out have the pair's end tokens in their generation config.
    """
    for source in (model.generation_config, model.config, tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)
    raise InputError("neither the model nor the tokenizer names an end-of-text token; set eos_token_id")


def named_ends(source: Source) -> tuple[int, ...]:
    """Ids that end a completion, as the files of a checkpoint say: generation config, else config.

    Raises InputError for what is no id.
    """
    for folder in source.folders:
        for name in ("generation_config.json", CONFIG):
            found = settings(folder / name).get("eos_token_id") if (folder / name).is_file() else None
            if found is not None:
                ids: Sequence[Any] = found if isinstance(found, list) else [found]
                if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in ids):
                    raise InputError(f"{folder / name}: eos_token_id is {found!r}, where ids are needed")
                return tuple(ids)
    return ()


def quiet_libraries() -> None:
    """Keep the libraries' progress bars, and notices about settings that are ours by choice, off standard error."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(trl|torch|transformers|accelerate|peft)\b")
