"""Where a checkpoint lies: folders, models of the hub's cache, adapters and their bases; and what tells them apart."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from mixturelens.models.source import Source, find_source, fingerprint, weight_files
from mixturelens.types import InputError

INDEX = "model.safetensors.index.json"
LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 2, "target_modules": ["lm_head"]}
COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def full(pairs: Path, tmp_path: Path) -> Path:
    """A checkpoint that may be changed."""
    return Path(shutil.copytree(pairs / "llama" / "S", tmp_path / "full"))


@pytest.fixture
def hub(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with one model, `org/tiny`: S, and R-routing as its revision v2 and in its folder `runs/r`."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = cache / "models--org--tiny"
    for revision, name in (("main", "S"), ("v2", "R-routing")):
        shutil.copytree(pairs / "llama" / name, model / "snapshots" / COMMITS[revision])
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / revision).write_text(COMMITS[revision])
    shutil.copytree(pairs / "llama" / "R-routing", model / "snapshots" / COMMITS["main"] / "runs" / "r")
    return model / "snapshots"


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | changes))


def make_adapter(folder: Path, **config: object) -> Path:
    """A LoRA adapter; no base in its config unless given."""
    folder.mkdir(exist_ok=True)
    edit_json(folder / "adapter_config.json", **LORA, **config)
    prefix = "base_model.model.lm_head"
    tensors = {f"{prefix}.lora_A.weight": torch.ones(2, 32), f"{prefix}.lora_B.weight": torch.ones(16, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def shard(folder: Path) -> Path:
    """The same checkpoint in two shards; its index."""
    weights = load_file(folder / "model.safetensors")
    names = {
        name: f"model-0000{1 + (number >= len(weights) // 2)}-of-00002.safetensors"
        for number, name in enumerate(weights)
    }
    for file in set(names.values()):
        save_file({n: w for n, w in weights.items() if names[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder / INDEX


def refused(call: Callable[..., object], *args: object) -> str:
    """The message, which is one line."""
    with pytest.raises(InputError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_a_checkpoint_called_as_it_is(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_source(full)
    assert found == Source(full, "full")
    assert (found.is_adapter, found.weights, found.folders, str(found)) == (False, full, (full,), str(full))
    assert find_source(found) is found
    assert find_source(f"{full}/").name == "full"
    monkeypatch.chdir(full)
    assert find_source(".").name == "full"
    assert find_source("../full").name == "full"


def test_what_is_neither_a_folder_nor_an_id_is_said_to_be_so(full: Path) -> None:
    assert refused(find_source, full / "config.json") == (
        f"{full / 'config.json'}: a file; give the folder of a checkpoint, or a hub id (org/name)"
    )
    for given in ("nowhere", str(full / "nowhere"), "./org/name", "a/b/c", "org/name@", "org name/x"):
        assert refused(find_source, given).startswith(f"{given}: no such folder, and no hub id (org/name, org/name@")


def test_what_is_no_safe_checkpoint_is_refused(full: Path) -> None:
    config = json.loads((full / "config.json").read_text())
    for changes, words in (
        ({"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}, "needs code from its folder (auto_map), which is never"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "the weights are quantised (gptq)"),
        ({"quantization_config": {"load_in_4bit": True}}, "the weights are quantised (quantised)"),
    ):
        (full / "config.json").write_text(json.dumps(config | changes))
        said = refused(find_source, full)
        assert said.startswith(f"{full}: ")
        assert words in said
        assert "save it" in said  # the remedy
    (full / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    assert find_source(full).name == "full"
    (full / "config.json").write_text("[]")
    assert refused(find_source, full) == f"{full / 'config.json'}: holds [], where an object is needed"


def test_weights_that_are_no_models_are_refused_by_what_they_are(full: Path) -> None:
    (full / "model.safetensors").rename(full / "consolidated.safetensors")
    assert "consolidated.safetensors is not named as a model's weights are" in refused(find_source, full)
    torch.save({}, full / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle, which can run code when loaded" in refused(find_source, full)
    for name in ("consolidated.safetensors", "pytorch_model.bin"):
        (full / name).unlink()
    assert refused(find_source, full) == f"{full}: not a model folder (it has no *.safetensors)"
    (full / "config.json").unlink()
    (full / "tiny.Q4_K_M.gguf").write_bytes(b"GGUF")
    assert "tiny.Q4_K_M.gguf is a quantised file; give the folder of the model" in refused(find_source, full)


def test_only_the_files_that_make_up_a_model_count(full: Path) -> None:
    assert weight_files(full) == [full / "model.safetensors"]
    for name in ("optimizer.safetensors", "consolidated.safetensors", "model-00004-of-00004.safetensors"):
        save_file({"state": torch.zeros(3)}, full / name)
    assert weight_files(full) == [full / "model.safetensors"]
    (full / "model-00004-of-00004.safetensors").unlink()
    shard(full)
    save_file({"state": torch.zeros(3)}, full / "model-00003-of-00003.safetensors")
    assert [file.name for file in weight_files(full)] == [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]


def test_an_index_must_name_shards_that_lie_in_the_folder(full: Path) -> None:
    index = shard(full)
    names = json.loads(index.read_text())["weight_map"]
    first = next(iter(names))
    outside = full.parent / "outside.safetensors"
    save_file({first: torch.zeros(3)}, outside)
    for name in ("../outside.safetensors", str(outside), "sub/../../outside.safetensors"):
        edit_json(index, weight_map=names | {first: name})
        said = refused(weight_files, full)
        assert said.startswith(f"{index}: names ")
        assert "outside" in said
    for data in ({}, {"weight_map": None}, {"weight_map": [1]}, {"weight_map": names | {first: 7}}):
        index.write_text(json.dumps(data))
        assert refused(weight_files, full) == f"{index}: no index of shards (it has no weight_map)"
    edit_json(index, weight_map=names)
    (full / "model-00002-of-00002.safetensors").unlink()
    assert refused(find_source, full) == (
        f"{full}: shard model-00002-of-00002.safetensors is missing; download the checkpoint again"
    )


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_an_id_is_taken_from_the_cache(hub: Path) -> None:
    main, v2 = (hub / COMMITS[name] for name in ("main", "v2"))
    for given, folder, name in (
        ("org/tiny", main, "org--tiny"),
        ("org/tiny@v2", v2, "org--tiny@v2"),
        (f"org/tiny@{COMMITS['v2']}", v2, f"org--tiny@{COMMITS['v2']}"),
        ("org/tiny:runs/r", main / "runs" / "r", "org--tiny--runs--r"),
        ("org/tiny@main:runs/r", main / "runs" / "r", "org--tiny@main--runs--r"),
    ):
        found = find_source(given)
        assert found.folder.resolve() == folder.resolve()
        assert found.name == name
        assert "/" not in found.name


def test_a_folder_goes_before_an_id_of_that_name(hub: Path, full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(full.parent)
    shutil.copytree(full, full.parent / "org" / "tiny")
    assert find_source("org/tiny").name == "tiny"


def test_a_folder_of_an_id_lies_in_its_repository(hub: Path, full: Path) -> None:
    assert find_source("org/tiny:runs/r/").folder.resolve() == (hub / COMMITS["main"] / "runs" / "r").resolve()
    for subfolder in ("absent", f"../{COMMITS['v2']}", "..", str(full)):
        given = f"org/tiny:{subfolder}"
        assert refused(find_source, given) == f"{given}: the repository has no folder {subfolder!r}"


def test_what_the_cache_does_not_hold_is_said_with_what_to_do(hub: Path) -> None:
    for given in ("org/absent", "org/tiny@v9", "org/tiny@" + "c" * 40):
        said = refused(find_source, given)
        assert said.startswith(
            f"{given}: no such folder, and no such model in the cache of the hub, which is all that "
        )
        assert "HF_HUB_OFFLINE" in said
        assert "download it first" in said
    (hub / COMMITS["v2"] / "config.json").unlink()
    assert "not a model folder (it has no config.json)" in refused(find_source, "org/tiny@v2")


def test_an_adapter_of_the_hub_on_a_base_of_the_hub(hub: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base_model_name_or_path="org/tiny")
    found = find_source(adapter)
    assert found.base is not None
    assert (found.name, found.base.name) == ("adapter", "org--tiny")
    model = hub.parent.with_name("models--org--adapter")
    shutil.copytree(adapter, model / "snapshots" / COMMITS["main"])
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMITS["main"])
    found = find_source("org/adapter")
    assert found.base is not None
    assert (found.name, found.base.name) == ("org--adapter", "org--tiny")
    assert found.weights.resolve() == (hub / COMMITS["main"]).resolve()


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_an_adapter_is_applied_on_the_base_that_its_config_names(full: Path, tmp_path: Path) -> None:
    for named in ("../full", str(full)):
        adapter = make_adapter(tmp_path / "adapter", base_model_name_or_path=named)
        found = find_source(adapter)
        assert found.is_adapter
        assert found.base is not None
        assert found.base.folder.resolve() == found.weights.resolve() == full.resolve()
        assert found.folders == (adapter, found.base.folder)


def test_an_adapter_is_applied_on_the_weights_beside_it(full: Path) -> None:
    make_adapter(full, base_model_name_or_path="org/elsewhere")
    found = find_source(full)
    assert found == Source(full, "full", Source(full, "full"))
    assert found.weights == full


def test_a_base_that_is_given_goes_before_every_other(full: Path, pairs: Path) -> None:
    make_adapter(full, base_model_name_or_path="org/elsewhere")
    found = find_source(full, pairs / "llama" / "R-skill")
    assert found.base == Source(pairs / "llama" / "R-skill", "R-skill")
    # and is nothing to checkpoints that are no adapters
    assert find_source(pairs / "llama" / "S", pairs / "llama" / "R-skill").base is None


def test_an_adapter_may_stand_on_an_adapter(full: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "sft", base_model_name_or_path="../full")
    found = find_source(make_adapter(tmp_path / "rl", base_model_name_or_path="../sft"))
    assert found.base is not None
    assert found.base.is_adapter
    assert found.weights.resolve() == full.resolve()
    assert [folder.name for folder in found.folders] == ["rl", "sft", "full"]


def test_an_adapter_without_a_base_asks_for_one(hub: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    assert refused(find_source, adapter) == (
        f"{adapter}: a LoRA adapter whose adapter_config.json names no base; give --base"
    )
    for named, why in (("org/absent", "no such model in the cache"), ("gone", "no such folder, and no hub id")):
        make_adapter(adapter, base_model_name_or_path=named)
        said = refused(find_source, adapter)
        assert said.startswith(f"{adapter}: a LoRA adapter whose base {named!r} cannot be used ({named}: ")
        assert why in said
        assert said.endswith("give --base")


@pytest.mark.parametrize("named", [".", "../adapter", "../other"])
def test_an_adapter_that_is_its_own_base_is_refused(tmp_path: Path, named: str) -> None:
    adapter = make_adapter(tmp_path / "adapter", base_model_name_or_path=named)
    make_adapter(tmp_path / "other", base_model_name_or_path="../adapter")
    said = refused(find_source, adapter)
    assert said.startswith(f"{adapter}: a LoRA adapter whose base ")
    assert said.endswith("give --base")


def test_a_base_that_may_not_be_used_is_none_of_an_adapter(full: Path, tmp_path: Path) -> None:
    edit_json(full / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    adapter = make_adapter(tmp_path / "adapter", base_model_name_or_path="../full")
    said = refused(find_source, adapter)
    assert str(adapter) in said
    assert "the weights are quantised (bitsandbytes)" in said
    assert "quantised" in refused(find_source, adapter, full)
    make_adapter(full)
    assert "quantised" in refused(find_source, full)


@pytest.mark.parametrize("kind", ["IA3", "PREFIX_TUNING", None])
def test_other_adapters_than_lora_are_refused(tmp_path: Path, kind: str | None) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", peft_type=kind)
    assert refused(find_source, adapter) == (
        f"{adapter}: an adapter of type {kind}; LoRA alone is read: merge it into its base first"
    )


def test_an_adapter_that_is_no_safetensors_is_refused(full: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base_model_name_or_path="../full")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    said = refused(find_source, adapter)
    assert said.startswith(f"{adapter}: a LoRA adapter without safetensors (adapter_model.bin is a pickle, which can ")
    assert "save_pretrained" in said
    (adapter / "adapter_model.bin").unlink()
    assert "without safetensors (no adapter_model.safetensors)" in refused(find_source, adapter)
    (adapter / "adapter_config.json").write_text("{")
    assert refused(find_source, adapter).startswith(f"{adapter / 'adapter_config.json'}: not JSON")


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_a_name_and_sixteen_digits(full: Path) -> None:
    name, digits = fingerprint(full).split("@")
    assert name == "full"
    assert len(digits) == 16
    assert set(digits) <= set("0123456789abcdef")
    assert fingerprint(find_source(full)) == fingerprint(full)


def change_weights(folder: Path) -> None:
    """One number, by the least that fp32 allows; the file's size and time stay."""
    file = folder / "model.safetensors"
    times = file.stat()
    weights = load_file(file)
    weights["lm_head.weight"][3, 4] = torch.nextafter(weights["lm_head.weight"][3, 4], torch.tensor(9.0))
    save_file(weights, file, metadata={"format": "pt"})
    assert file.stat().st_size == times.st_size


CHANGES: dict[str, Callable[[Path], object]] = {
    "weights": change_weights,
    "rope": lambda f: edit_json(f / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 30.0}),
    "end token": lambda f: edit_json(f / "generation_config.json", eos_token_id=0),
    "no generation config": lambda f: (f / "generation_config.json").unlink(),
    "post-processor": lambda f: edit_json(f / "tokenizer.json", post_processor=None),
    "tokenizer config": lambda f: edit_json(f / "tokenizer_config.json", eos_token="<pad>"),
    "special tokens": lambda f: edit_json(f / "special_tokens_map.json", eos_token="<pad>"),
    "added tokens": lambda f: edit_json(f / "added_tokens.json", more=16),
    "chat template": lambda f: (f / "chat_template.jinja").write_text("{{ messages }}"),
    "older chat template": lambda f: edit_json(f / "chat_template.json", chat_template="{{ messages }}"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_fingerprint_changes_with_all_that_decides_what_a_checkpoint_does(full: Path, what: str) -> None:
    before = fingerprint(full)
    CHANGES[what](full)
    assert fingerprint(full) != before


def test_a_fingerprint_does_not_change_with_anything_else(full: Path) -> None:
    before = fingerprint(full)
    save_file({"state": torch.zeros(3)}, full / "optimizer.safetensors")
    (full / "README.md").write_text("A fine model.")
    (full / "runs").mkdir()
    os.utime(full / "model.safetensors", (1, 1))
    assert fingerprint(full) == before
    elsewhere = full.parent / "elsewhere" / "full"
    shutil.copytree(full, elsewhere)
    assert fingerprint(elsewhere) == before
    linked = full.parent / "linked" / "full"
    linked.mkdir(parents=True)
    for file in full.iterdir():
        (linked / file.name).symlink_to(file)
    assert fingerprint(linked) == before


def test_a_fingerprint_tells_shards_and_revisions_apart(full: Path, hub: Path) -> None:
    assert fingerprint(find_source("org/tiny")).startswith("org--tiny@")
    digits = {name: fingerprint(find_source(name)).split("@")[-1] for name in ("org/tiny", "org/tiny@v2")}
    assert len(set(digits.values())) == 2
    assert digits["org/tiny"] == fingerprint(full).split("@")[-1]
    shard(full)
    before = fingerprint(full)
    last = full / "model-00002-of-00002.safetensors"
    weights = load_file(last)
    save_file({name: weight + 1 for name, weight in weights.items()}, last, metadata={"format": "pt"})
    assert fingerprint(full) != before


def test_an_adapters_fingerprint_covers_its_base(full: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base_model_name_or_path="../full")
    seen = [fingerprint(adapter)]
    change_weights(full)
    seen.append(fingerprint(adapter))
    edit_json(full / "generation_config.json", eos_token_id=0)
    seen.append(fingerprint(adapter))
    edit_json(adapter / "adapter_config.json", lora_alpha=4)
    seen.append(fingerprint(adapter))
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    seen.append(fingerprint(adapter))
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    seen.append(fingerprint(adapter))
    assert len(set(seen)) == len(seen)
    assert seen[0].startswith("adapter@")
    # the same base by another way is the same
    assert fingerprint(find_source(adapter, full)) == seen[-1]
