"""Checkpoints of strangers: what would take all time or memory, end the process, or carry a secret out, is refused."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import make_adapter
from safetensors.torch import load_file, save_file

from mixturelens.models import Pair, load_model, load_tokenizer
from mixturelens.models.load import skeleton
from mixturelens.models.source import find_source
from mixturelens.suite import Suite, load_suite
from mixturelens.types import InputError, RunError


@pytest.fixture
def copy(pairs: Path, tmp_path: Path) -> Path:
    """A checkpoint that may be spoiled."""
    return Path(shutil.copytree(pairs / "llama" / "S", tmp_path / "copy"))


@pytest.fixture
def suite(pairs: Path) -> Suite:
    return load_suite(pairs / "llama")


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(call: Callable[..., object], *args: object) -> str:
    began = time.process_time()
    with pytest.raises(InputError) as caught:
        call(*args)
    assert time.process_time() - began < 20
    said = str(caught.value)
    assert "\n" not in said
    return said


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [22, 10**9])
def test_more_layers_than_tensors_are_not_made(copy: Path, layers: int):
    edit(copy / "config.json", num_hidden_layers=layers)
    assert refused(skeleton, copy) == (
        f"{copy}: num_hidden_layers is {layers} in config.json, and the weights have 21 tensors"
    )


def test_more_experts_than_any_model_has_are_not_made(copy: Path):
    config = {"model_type": "mixtral", "num_local_experts": 10**8, "num_hidden_layers": 1, "hidden_size": 8}
    (copy / "config.json").write_text(json.dumps(config))
    assert "num_local_experts is 100000000 in config.json" in refused(skeleton, copy)


def test_a_table_of_positions_larger_than_the_weights_is_not_made(pairs: Path, tmp_path: Path):
    copy = Path(shutil.copytree(pairs / "gpt2" / "S", tmp_path / "copy"))
    edit(copy / "config.json", n_positions=300_000)
    assert "transformer.wpe.weight has shape [" in refused(load_model, copy)


@pytest.mark.parametrize("changes", [{"vocab_size": 10**12}, {"hidden_size": 10**12}, {"intermediate_size": 10**18}])
def test_sizes_that_no_machine_has_are_refused(copy: Path, changes: dict[str, int]):
    edit(copy / "config.json", **changes)
    assert refused(load_model, copy).startswith(f"{copy}: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"model_type": "llama", "model_type": "gpt2"}', "key 'model_type' is given twice"),
        ('{"model_type": "llama", "rms_norm_eps": NaN}', "rms_norm_eps: is nan, where a finite number is needed"),
        ('{"a":' * 100 + "1" + "}" * 100, "more than 64 levels"),
    ],
)
def test_a_config_that_says_two_things_or_none_is_refused(copy: Path, text: str, said: str):
    (copy / "config.json").write_text(text)
    found = refused(find_source, copy)
    assert found.startswith(f"{copy / 'config.json'}: ")
    assert said in found


# --- weights ----------------------------------------------------------------------------------------------------------


def safetensors(file: Path, header: dict[str, Any], size: int = 0, length: int | None = None) -> None:
    """A file of any header, with `size` bytes behind it that take no room."""
    text = json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + size)


def test_giant_tensors_are_refused_before_they_are_read(copy: Path, monkeypatch: pytest.MonkeyPatch):
    """A file of holes may be as large as its header says, and take no room."""
    rows = 10**7
    header = {"lm_head.weight": {"dtype": "F32", "shape": [rows, 32], "data_offsets": [0, rows * 128]}}
    edit(copy / "config.json", num_hidden_layers=1)
    safetensors(copy / "model.safetensors", header, rows * 128)
    assert refused(load_model, copy) == (
        f"{copy}: lm_head.weight has shape [{rows}, 32], and config.json asks for [16, 32]"
    )
    edit(copy / "config.json", vocab_size=rows, tie_word_embeddings=True)
    safetensors(copy / "model.safetensors", {"model.embed_tokens.weight": header["lm_head.weight"]}, rows * 128)
    monkeypatch.setattr(os, "sysconf", lambda name: 10_000)  # a machine of 0.1 GB
    assert f"{copy}: takes 1 GB of memory, and this machine has 0; " in refused(load_model, copy)


@pytest.mark.parametrize(
    "of",
    [
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 64]},
        {"dtype": "F32", "shape": [16], "data_offsets": [0, 2**63]},
        {"dtype": "F32", "shape": [16], "data_offsets": [64, 0]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 64]},
        {"dtype": "F99", "shape": [16], "data_offsets": [0, 64]},
        {"shape": [16], "data_offsets": [0, 64]},
        [],
    ],
)
def test_a_header_that_does_not_add_up_is_refused(copy: Path, of: object):
    safetensors(copy / "model.safetensors", {"lm_head.weight": of}, 64)
    assert refused(load_model, copy).startswith(f"{copy}: cannot be loaded as a causal language model (")
    assert refused(skeleton, copy).startswith(f"{copy}: cannot be loaded as a causal language model (")


@pytest.mark.parametrize("length", [0, 2**31, 2**63])
def test_a_header_of_another_length_is_refused(copy: Path, length: int):
    safetensors(copy / "model.safetensors", {}, 64, length)
    assert refused(load_model, copy).startswith(f"{copy}: cannot be loaded as a causal language model (")


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_a_link_that_would_carry_a_secret_into_a_saved_checkpoint_is_refused(copy: Path, tmp_path: Path, name: str):
    secret = tmp_path / "id_rsa"
    secret.write_text("{}")
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(secret)
    assert refused(find_source, copy) == (
        f"{copy / name}: a link out of its folder, to {secret.resolve()}; copy the file there, if it is meant"
    )


def test_links_inside_a_folder_to_the_same_name_and_of_the_hubs_cache_are_followed(copy: Path, tmp_path: Path):
    (copy / "config.json").rename(copy / "other.json")
    (copy / "config.json").symlink_to("other.json")
    (tmp_path / "elsewhere").mkdir()
    (copy / "tokenizer.json").rename(tmp_path / "elsewhere" / "tokenizer.json")
    (copy / "tokenizer.json").symlink_to(tmp_path / "elsewhere" / "tokenizer.json")
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(copy.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    for folder in (copy, snapshot):
        assert load_tokenizer(find_source(folder)).eos_token == "<eos>"


def test_what_is_no_file_is_refused_and_not_waited_for(copy: Path, suite: Suite):
    for name in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        (copy / name).unlink(missing_ok=True)
        os.mkfifo(copy / name)
        assert refused(Pair, copy, None, suite) == f"{copy / name}: no regular file, and one is needed"
        (copy / name).unlink()


# --- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "padding",
    [
        {"strategy": {"Fixed": 10**12}},
        {"strategy": "BatchLongest", "pad_to_multiple_of": 10**12},
    ],
)
def test_padding_that_would_end_the_process_is_refused(copy: Path, padding: dict[str, Any]):
    usual = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    edit(copy / "tokenizer.json", padding=usual | padding)
    assert refused(load_tokenizer, copy) == (
        f"{copy / 'tokenizer.json'}: pads texts to more than 1000000 tokens; set its padding to null"
    )


def test_a_tokenizer_that_pads_and_cuts_reads_a_prompt_to_its_end_and_no_further(copy: Path):
    usual = load_tokenizer(copy).encode("<A> first p q r =")
    padding = {"strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    edit(copy / "tokenizer.json", padding=padding | {"pad_type_id": 0, "pad_token": "<pad>"}, truncation=cut)
    assert load_tokenizer(copy).encode("<A> first p q r =") == usual


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},  # panics when it encodes
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}},
        {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}},
        {"model": {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]}},
        {"model": {}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
    ],
)
def test_a_tokenizer_that_panics_or_cannot_be_built_is_refused_by_its_folder(
    copy: Path, suite: Suite, changes: dict[str, Any]
):
    edit(copy / "tokenizer.json", **changes)
    assert str(copy) in refused(Pair, copy, None, suite)


def test_a_word_that_the_tokenizer_has_no_word_for_is_refused_by_its_prompt(copy: Path, suite: Suite):
    model = json.loads((copy / "tokenizer.json").read_text())["model"]
    model["vocab"].pop("<unk>")
    edit(copy / "tokenizer.json", model=model, added_tokens=[])
    row = suite.prompts[0].model_copy(update={"prompt": "never heard", "spans": {}})
    said = refused(Pair, copy, None, suite.model_copy(update={"prompts": (row,)}))
    assert "the tokenizer fails on it" in said or "no tokenizer could be loaded" in said


def test_a_template_that_is_no_text_or_has_no_end_is_refused(copy: Path, pairs: Path):
    edit(copy / "tokenizer_config.json", chat_template=7)
    assert str(copy) in refused(load_tokenizer, copy)
    edit(copy / "tokenizer_config.json", chat_template=None)
    (copy / "chat_template.jinja").touch()
    os.truncate(copy / "chat_template.jinja", 10**7)
    assert "bytes, and" in refused(load_tokenizer, copy)


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    make_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 10**9}, "r is 1000000000, where a number up to 2 fits; save the adapter again"),
        ({"r": 0}, "r is 0, where"),
        ({"r": True}, "r is True, where"),
        ({"r": "2"}, "r is '2', where"),
        ({"rank_pattern": {"q_proj": 10**9}}, "r is 1000000000, where"),
        ({"lora_alpha": 1e999}, "lora_alpha is inf, where"),
        ({"lora_alpha": -1}, "lora_alpha is -1, where"),
        ({"init_lora_weights": "pissa_niter_1000000000"}, "init_lora_weights asks for more than 1000 iterations"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config makes another model than its base"),
        ({"layer_replication": [[0, 10**9]]}, "layer_replication makes another model than its base"),
    ],
)
def test_an_adapter_that_asks_for_more_than_it_holds_is_refused(
    adapter: Path, pairs: Path, changes: dict[str, Any], said: str
):
    edit(adapter / "adapter_config.json", **changes)
    found = refused(find_source, adapter, pairs / "llama" / "S")
    assert found.startswith(f"{adapter / 'adapter_config.json'}: {said}")


def test_a_pattern_of_an_adapter_that_takes_forever_is_stopped(
    adapter: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mixturelens.models.load.SECONDS", 0.2)
    edit(adapter / "adapter_config.json", target_modules="([a-z_.]+[0-9a-z_.]*)+!")
    said = refused(load_model, find_source(adapter, pairs / "llama" / "S"))
    assert said.startswith(f"{adapter}: the adapter does not fit its base")
    assert "takes more than 0.2 s" in said


def test_weights_of_an_adapter_that_are_none_are_refused(adapter: Path, pairs: Path):
    (adapter / "adapter_model.safetensors").write_bytes(b"none")
    assert refused(find_source, adapter, pairs / "llama" / "S").startswith(f"{adapter}: adapter_model.safetensors ")


# --- memory -----------------------------------------------------------------------------------------------------------


def test_memory_that_runs_out_is_no_fault_of_the_file(copy: Path, monkeypatch: pytest.MonkeyPatch):
    def read(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", read)
    with pytest.raises(RunError, match=rf"^{copy}: .*: memory ran out; give a smaller one, or a machine with more$"):
        load_model(copy)


def test_numbers_that_are_none_are_found_in_merged_weights(adapter: Path, pairs: Path):
    held = load_file(adapter / "adapter_model.safetensors")
    save_file({name: torch.full_like(w, 1e38) for name, w in held.items()}, adapter / "adapter_model.safetensors")
    assert "NaN or infinite" in refused(load_model, find_source(adapter, pairs / "llama" / "S"))
