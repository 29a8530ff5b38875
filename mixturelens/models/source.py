"""Where a checkpoint lies: a folder, a model of the hub, or a LoRA adapter on its base. No weights are loaded here."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixturelens.files import MADE, read_json
from mixturelens.types import InputError, loading

CONFIG, ADAPTER, INDEX = "config.json", "adapter_config.json", "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

BESIDE = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    ADAPTER,
)
"""Small files that decide what a checkpoint does, beside its weights."""

ITERATIONS = 1000
"""That an adapter's start may take."""
STRONGEST = 10**6
"""Scale of an adapter, at most."""
_SIZES = (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))

_HUB = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?(?::(?P<subfolder>[\w./-]+))?"
)


@dataclass(frozen=True)
class Source:
    """A checkpoint's folder. An adapter has a `base`: the checkpoint that it is applied on.

    >>> Source(Path("runs/sft"), "sft").is_adapter
    False
    """

    folder: Path
    name: str
    """What records and folders call it: the folder's name, or `org--name` of the hub."""
    base: Source | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether the weights are a LoRA adapter, to be applied on a base."""
        return self.base is not None

    @property
    def weights(self) -> Path:
        """The folder that holds the config and the full weights: that of the base, for an adapter."""
        return self.folder if self.base is None else self.base.weights

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders in which its tokenizer and end tokens are looked up: its own first, then its base's."""
        return (self.folder,) if self.base is None else (self.folder, *self.base.folders)

    def __str__(self) -> str:
        return str(self.folder)


def find_source(given: str | os.PathLike[str] | Source, base: str | os.PathLike[str] | None = None) -> Source:
    """The checkpoint that a path or a hub id (`org/name`, `org/name@revision`, `org/name:subfolder`) names.

    A folder with an `adapter_config.json` is a LoRA adapter; its base is `base`, else the full weights beside it, else
    what its config names. Raises InputError for what is not there, not safe, quantised, or needs code of its own.
    """
    return _find(given, base)


def _find(
    given: str | os.PathLike[str] | Source, base: str | os.PathLike[str] | None = None, above: tuple[Path, ...] = ()
) -> Source:
    """`above`: adapters that stand on this one."""
    if isinstance(given, Source):
        return given
    folder, name = _locate(str(given))
    if folder.resolve() in above:
        raise InputError(f"{folder}: an adapter that stands on itself")
    if not (folder / ADAPTER).is_file():
        return Source(check_folder(folder), name)
    check_beside(folder)
    config = settings(folder / ADAPTER)
    _check_adapter(folder, config)
    if base is not None:
        return Source(folder, name, _find(base, None, (*above, folder.resolve())))
    if (folder / CONFIG).is_file() and weight_files(folder):
        return Source(folder, name, Source(check_folder(folder), name))
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise InputError(f"{folder}: a LoRA adapter whose {ADAPTER} names no base; give --base")
    beside = folder / named
    try:
        return Source(folder, name, _find(beside if os.path.isdir(beside) else named, None, (*above, folder.resolve())))
    except InputError as error:
        raise InputError(
            f"{folder}: a LoRA adapter whose base {named!r} cannot be used ({error}); give --base"
        ) from None


def _locate(given: str) -> tuple[Path, str]:
    """(folder, name) of a path, or of a snapshot of the hub: from its cache, where there is no network."""
    path = Path(given)
    if os.path.isdir(path):  # which takes any text for an answer
        return path, path.resolve().name
    if os.path.exists(path):
        raise InputError(f"{given}: a file; give the folder of a checkpoint, or a hub id (org/name)")
    found = _HUB.fullmatch(given)
    if found is None:
        raise InputError(f"{given}: no such folder, and no hub id (org/name, org/name@revision, org/name:subfolder)")
    return _snapshot(given, found["id"], found["revision"], found["subfolder"])


def _snapshot(given: str, repository: str, revision: str | None, subfolder: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download

    inside = f"{subfolder.strip('/')}/" if subfolder else ""
    wanted = [*BESIDE, INDEX, "model*.safetensors", ADAPTER_WEIGHTS]
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    where = "in the cache of the hub, which is all that HF_HUB_OFFLINE allows" if offline else "on the hub"
    what = f"no such folder, and no such model {where}; check the name, download it first, or log in where it is gated"
    with loading(given, what):
        root = snapshot_download(repository, revision=revision, allow_patterns=[f"{inside}{name}" for name in wanted])
    folder = Path(root, inside)
    if not folder.is_dir() or {"/", ".."} & set(Path(subfolder or "").parts):
        raise InputError(f"{given}: the repository has no folder {subfolder!r}")
    name = repository.replace("/", "--") + (f"@{revision}" if revision else "") + (f":{subfolder}" if subfolder else "")
    return folder, re.sub(r"[^\w.@-]+", "--", name)


def check_folder(path: Path) -> Path:
    """The folder of a safetensors checkpoint that needs no code of its own. Raises InputError otherwise."""
    if not path.exists():
        raise InputError(f"{path}: no such folder; give a checkpoint as a local Hugging Face folder")
    if not (path / CONFIG).is_file():
        gguf = sorted(file.name for file in path.glob("*.gguf"))
        if gguf:
            raise InputError(f"{path}: {gguf[0]} is a quantised file; give the folder of the model it was made from")
        raise InputError(f"{path}: not a model folder (it has no {CONFIG})")
    check_beside(path)
    config = settings(path / CONFIG)
    if "auto_map" in config:
        raise InputError(
            f"{path}: the model needs code from its folder (auto_map), which is never run; if its model_type "
            f"({config.get('model_type')}) is known to transformers, save it again without auto_map"
        )
    if config.get("quantization_config"):
        method = config["quantization_config"]
        method = method.get("quant_method", "quantised") if isinstance(method, dict) else "quantised"
        raise InputError(
            f"{path}: the weights are quantised ({method}), so that neither probabilities nor grafts are those of the "
            "model that was trained; give the checkpoint before quantisation, or save it dequantised"
        )
    if not weight_files(path):
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        if pickles:
            raise InputError(
                f"{path}: {pickles[0]} is a pickle, which can run code when loaded; save the model again "
                "with save_pretrained, which writes safetensors"
            )
        others = sorted(file.name for file in path.glob("*.safetensors"))
        if others:
            raise InputError(
                f"{path}: {others[0]} is not named as a model's weights are (model.safetensors, or shards with "
                f"{INDEX}); save the model again with save_pretrained"
            )
        raise InputError(f"{path}: not a model folder (it has no *.safetensors)")
    return path


def _check_adapter(folder: Path, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{folder}: an adapter of type {kind}; LoRA alone is read: merge it into its base first")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        why = "adapter_model.bin is a pickle, which can run code when loaded" if pickled else f"no {ADAPTER_WEIGHTS}"
        raise InputError(f"{folder}: a LoRA adapter without safetensors ({why}); save it again with save_pretrained")
    file = folder / ADAPTER
    for name in ("megatron_config", "layer_replication"):
        if config.get(name):
            raise InputError(f"{file}: {name} makes another model than its base; merge the adapter into it first")
    with loading(folder, f"{ADAPTER_WEIGHTS} cannot be read"):
        shapes = tensors_of(folder / ADAPTER_WEIGHTS)
    held = max((shape[0] for name, shape in shapes.items() if "_A." in name or name.endswith("_A")), default=0)
    ranks, alphas = ([config.get(key), *_values(config.get(each))] for key, each in _SIZES)
    for key, numbers, most in (("r", ranks, held), ("lora_alpha", alphas, STRONGEST)):
        for number in numbers:
            fits = isinstance(number, (int, float)) and not isinstance(number, bool) and 0 < number <= most
            if number is not None and not fits:
                raise InputError(
                    f"{file}: {key} is {number!r}, where a number up to {most} fits; save the adapter again"
                )
    if int((re.findall(r"niter_(\d+)", str(config.get("init_lora_weights"))) or [0])[0]) > ITERATIONS:
        raise InputError(
            f"{file}: init_lora_weights asks for more than {ITERATIONS} iterations; save the adapter again"
        )


def _values(pattern: object) -> list[Any]:
    return list(pattern.values()) if isinstance(pattern, dict) else []


def leaves_base(adapter: Source) -> bool:
    """Whether an adapter only adds to its base.

    Some adapters change the base's biases, some take their own starting values off it, and some replace its weights.
    """
    config = settings(adapter.folder / ADAPTER)
    begun, copied = config.get("init_lora_weights", True), config.get("modules_to_save") or ()
    with loading(adapter, f"{ADAPTER_WEIGHTS} cannot be read"):
        names = list(tensors_of(adapter.folder / ADAPTER_WEIGHTS))
    return (
        config.get("bias", "none") == "none"
        and (not isinstance(begun, str) or begun == "gaussian")
        and all("lora_" in name or any(f".{module}." in name for module in copied) for name in names)
    )


def weight_files(folder: Path) -> list[Path]:
    """The files that make up a model; optimizer states, other formats and left-over shards beside them are not among
    them.

    Raises InputError for an index that is broken, incomplete, or points out of its folder.
    """
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / INDEX
    if not index.is_file():
        return []
    names = settings(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index}: no index of shards (it has no weight_map)")
    files = []
    for name in sorted(set(names.values())):
        if name != Path(name).name:
            raise InputError(f"{index}: names {name}, which is outside the folder")
        file = folder / name
        files.append(file)
        if not os.path.isfile(file):
            raise InputError(f"{folder}: shard {file.name} is missing; download the checkpoint again")
    return files


def settings(path: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint, as other libraries write them. Raises InputError naming it where it is none."""
    return read_json(path, "no such file; is the checkpoint whole?", foreign=True)


def check_beside(folder: Path) -> None:
    """Raise InputError where a small file of a checkpoint is none, or a link to something else outside its folder.

    What it says goes into checkpoints that are written, and a link could carry a secret there. A link to a file of the
    same name is a checkpoint put together from others, and one to a blob is the cache of the hub.
    """
    home = folder.resolve()
    for name in (*BESIDE, INDEX):
        file = folder / name
        if not os.path.lexists(file):
            continue
        if not file.is_file():
            raise InputError(f"{file}: no regular file, and one is needed")
        target = file.resolve()
        blob = target.parent.name == "blobs" and (target.parent.parent / "snapshots").is_dir()
        if not (blob or target.name == name or target.is_relative_to(home)):
            raise InputError(f"{file}: a link out of its folder, to {target}; copy the file there, if it is meant")
        if target.stat().st_size > MADE:
            raise InputError(f"{file}: larger than any such file is ({target.stat().st_size} bytes)")


def tensors_of(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, from its header alone."""
    from safetensors import safe_open

    with safe_open(file, framework="np") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def fingerprint(source: Source | Path) -> str:
    """Name and content of a checkpoint, `sft@<16 digits>`: a hash of its weights, config, tokenizer and template.

    That of an adapter covers its base, too.
    """
    source = find_source(source)
    digest = hashlib.sha256()
    part: Source | None = source
    while part is not None:
        own = [part.folder / ADAPTER_WEIGHTS] if part.is_adapter else weight_files(part.folder)
        for file in (*own, *(part.folder / name for name in BESIDE)):
            if file.is_file():
                digest.update(f"{file.name} {content_of(file)}\n".encode())
        part = part.base
    return f"{source.name}@{digest.hexdigest()[:16]}"


def content_of(file: Path) -> str:
    """The hash of a file; it is read again only when size or time of the file have changed."""
    status = file.stat()
    return _content(str(file), status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=256)
def _content(file: str, size: int, modified: int, node: int) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
