"""Load a model or tokenizer faithfully; refuse what is not safe or does not fit. Plain Hugging Face folders only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixturelens.types import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_folder(path: Path) -> Path:
    """The folder of a safetensors checkpoint that needs no code of its own. Raises InputError otherwise."""
    if not path.exists():
        raise InputError(f"{path}: no such folder; give a checkpoint as a local Hugging Face folder")
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: not a model folder (it has no config.json)")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path / 'config.json'}: not JSON ({error})") from None
    if "auto_map" in config:
        raise InputError(f"{path}: the model needs code from its folder (auto_map), which is never run")
    if not list(path.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        if pickles:
            raise InputError(
                f"{path}: {pickles[0]} is a pickle, which can run code when loaded; save the model again "
                "with save_pretrained, which writes safetensors"
            )
        raise InputError(f"{path}: not a model folder (it has no *.safetensors)")
    return path


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer exactly as its tokenizer.json says.

    AutoTokenizer picks a class by model type, and some classes replace the saved pre-tokenizer by their own.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if (path / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no tokenizer could be loaded ({str(error).splitlines()[0]})") from None


def load_model(path: Path, device: str = "cpu", dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A causal language model in eval mode, fp32 unless asked otherwise.

    Raises InputError if the folder is unsafe, or if any weight is missing, unexpected or of another shape.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    check_folder(path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype or torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{path}: cannot be loaded as a causal language model ({str(error).splitlines()[0]})"
        ) from None
    model, info = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            raise InputError(f"{path}: {problem.replace('_', ' ')} in the weights, first: {sorted(info[problem])[0]}")
    return model.eval().to(device)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a completion: those of the generation config, else of the config, else of the tokenizer."""
    for source in (model.generation_config, model.config, tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)
    raise InputError("neither the model nor the tokenizer names an end-of-text token; set eos_token_id")


def check_pair(before: Path, after: Path) -> None:
    """Refuse two checkpoints that differ in a tensor's shape or in their tokenizer. Reads headers only."""
    shapes = [_shapes(check_folder(path)) for path in (before, after)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        left, right = (s.get(name) for s in shapes)
        if left != right:
            raise InputError(
                f"{before} and {after} are not a pair: {name} has shape {_show(left)} before and {_show(right)} after"
            )
    tokenizers = [load_tokenizer(path) for path in (before, after)]
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers]
    if vocabularies[0] != vocabularies[1]:
        different = sorted(set(vocabularies[0].items()) ^ set(vocabularies[1].items()))
        raise InputError(
            f"{before} and {after} are not a pair: their tokenizers differ, first at token {different[0][0]!r}"
        )
    backends = [getattr(tokenizer, "backend_tokenizer", None) for tokenizer in tokenizers]
    if all(backends) and _pipeline(backends[0]) != _pipeline(backends[1]):
        raise InputError(f"{before} and {after} are not a pair: their tokenizers split text differently")


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (no iterator of its own)
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        except SafetensorError as error:
            raise InputError(f"{file}: not a safetensors file ({error})") from None
    return shapes


def _show(shape: tuple[int, ...] | None) -> str:
    return "(absent)" if shape is None else str(list(shape))


def _pipeline(backend: object) -> dict[str, object]:
    """What a fast tokenizer does to text, without padding and truncation (state, not identity)."""
    data = json.loads(backend.to_str())  # type: ignore[attr-defined]
    return {key: data.get(key) for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder")}


def quiet_libraries() -> None:
    """Keep the libraries' progress bars, and notices about settings that are ours by choice, off standard error."""
    import warnings

    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(trl|torch|transformers|accelerate)\b")
