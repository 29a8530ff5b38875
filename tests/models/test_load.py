"""Checkpoints load as they were saved, and what is unsafe, broken or no pair is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixturelens.models import Pair, end_tokens, load_model, load_tokenizer
from mixturelens.models.load import load_config
from mixturelens.models.source import check_folder
from mixturelens.suite import load_suite
from mixturelens.types import InputError

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def copy(pairs: Path, tmp_path: Path) -> Path:
    """A checkpoint that may be damaged."""
    return Path(shutil.copytree(pairs / "llama" / "S", tmp_path / "copy"))


def edit(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors of the checkpoint; None takes one out."""
    held = {**load_file(folder / "model.safetensors"), **{k.replace("__", "."): v for k, v in tensors.items()}}
    save_file({k: v for k, v in held.items() if v is not None}, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(call, *args: Path) -> str:
    with pytest.raises(InputError) as caught:
        call(*args)
    return str(caught.value)


@pytest.mark.parametrize("shape", ["llama", "gpt2", "gpt_neox", "qwen2"])
def test_a_model_loads_in_eval_mode_and_fp32_with_the_weights_of_the_file(pairs: Path, shape: str):
    model = load_model(pairs / shape / "S")
    assert not model.training
    held, saved = model.state_dict(), load_file(pairs / shape / "S" / "model.safetensors")
    names = {
        name.replace("embed_out", "lm_head"): name for name in saved
    }  # GPT-NeoX's unembedding is renamed in memory
    held = {name: tensor for name, tensor in held.items() if name in names}
    assert len(held) == len(saved)
    for name, tensor in held.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, saved[names[name]]), name


def test_a_half_precision_checkpoint_is_measured_in_fp32_or_as_asked(copy: Path):
    load_model(copy).to(torch.bfloat16).save_pretrained(copy)
    assert {p.dtype for p in load_model(copy).parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(copy, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_tied_embeddings_are_not_missing(pairs: Path):
    model = load_model(pairs / "chat" / "S")
    assert "lm_head.weight" not in load_file(pairs / "chat" / "S" / "model.safetensors")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("call", [check_folder, load_model])
def test_what_is_no_safe_model_folder_is_refused(copy: Path, tmp_path: Path, call):
    assert refused(call, tmp_path / "absent").startswith(f"{tmp_path / 'absent'}: no such folder")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_evil.Evil"}}))
    assert "needs code from its folder (auto_map), which is never run" in refused(call, copy)
    (copy / "config.json").write_text("{")
    assert refused(call, copy).startswith(f"{copy / 'config.json'}: not JSON")
    (copy / "config.json").write_text(json.dumps(config))
    torch.save({}, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    message = refused(call, copy)
    assert message.startswith(f"{copy}: pytorch_model.bin is a pickle, which can run code when loaded")
    assert "save_pretrained" in message
    (copy / "pytorch_model.bin").unlink()
    assert refused(call, copy) == f"{copy}: not a model folder (it has no *.safetensors)"
    (copy / "config.json").unlink()
    assert refused(call, copy) == f"{copy}: not a model folder (it has no config.json)"


def test_weights_that_do_not_fit_are_refused_by_name(copy: Path):
    original = load_file(copy / "model.safetensors")
    edit(copy, **{NORM: None})
    assert refused(load_model, copy) == f"{copy}: missing keys in the weights, first: {NORM}"
    edit(copy, **{NORM: original[NORM], "model.layers.7.extra.weight": torch.ones(2)})
    assert "unexpected keys in the weights, first: model.layers.7.extra.weight" in refused(load_model, copy)
    save_file(original | {NORM: torch.ones(31)}, copy / "model.safetensors", metadata={"format": "pt"})
    assert refused(load_model, copy) == f"{copy}: {NORM} has shape [31], and config.json asks for [32]"


@pytest.mark.parametrize("keep", [0, 5, 1000, 50000])
def test_a_cut_off_file_is_refused(copy: Path, keep: int):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert refused(load_model, copy).startswith(f"{copy}: cannot be loaded as a causal language model (")


def test_a_config_of_no_language_model_is_refused(copy: Path):
    edit_json(copy / "config.json", model_type="martian")
    assert refused(load_model, copy).startswith(f"{copy}: config.json describes no model that transformers knows (")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("mamba", "a mamba model is recurrent"),
        ("rwkv", "a rwkv model is recurrent"),
        ("xlstm", "a xlstm model is recurrent"),
        ("bert", "a bert model fills masks"),
        ("roberta", "a roberta model fills masks"),
    ],
)
def test_recurrent_and_masked_models_are_refused_before_their_weights_are_read(pairs: Path, copy: Path, kind, says):
    (copy / "config.json").write_text(json.dumps({"model_type": kind, "vocab_size": 16, "hidden_size": 32}))
    (copy / "model.safetensors").write_bytes(b"nothing that could be read")
    suite = load_suite(pairs / "llama")
    for said in (refused(load_model, copy), refused(lambda: Pair(copy, None, suite))):
        assert said.startswith(f"{copy}: {says}")
        assert "give a causal transformer" in said
        assert "\n" not in said


def test_a_decoder_of_the_bert_kind_is_none_that_fills_masks(copy: Path):
    (copy / "config.json").write_text(json.dumps({"model_type": "bert", "is_decoder": True, "vocab_size": 16}))
    assert load_config(copy).is_decoder
    (copy / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 16}))
    assert "set is_decoder in config.json" in refused(load_config, copy)


@pytest.mark.parametrize("shape", ["llama", "gpt2", "gpt_neox", "qwen2"])
def test_a_tokenizer_loads_as_it_was_saved(pairs: Path, shape: str):
    """AutoTokenizer replaces the pre-tokenizer of some model types, qwen2 among them."""
    tokenizer = load_tokenizer(pairs / shape / "S")
    assert tokenizer.encode("<A> first p q r =") == [3, 5, 7, 8, 9, 12]
    assert (tokenizer.eos_token, tokenizer.unk_token_id) == ("<eos>", 2)


def test_a_chat_template_is_loaded(pairs: Path):
    tokenizer = load_tokenizer(pairs / "chat" / "S")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"


def test_a_folder_without_a_tokenizer_is_refused(copy: Path):
    (copy / "tokenizer.json").write_text("{")
    assert refused(load_tokenizer, copy).startswith(f"{copy / 'tokenizer.json'}: not JSON (")
    (copy / "tokenizer.json").write_text("{}")
    assert refused(load_tokenizer, copy).startswith(f"{copy}: no tokenizer could be loaded (")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    assert refused(load_tokenizer, copy).startswith(f"{copy}: no tokenizer could be loaded (")


def test_end_tokens_come_from_where_generation_would_take_them(pairs: Path):
    tokenizer = load_tokenizer(pairs / "chat" / "S")
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert end_tokens(load_model(pairs / "chat" / "S"), tokenizer) == tuple(ends)

    def model(generation: object, config: object) -> SimpleNamespace:
        return SimpleNamespace(
            generation_config=SimpleNamespace(eos_token_id=generation), config=SimpleNamespace(eos_token_id=config)
        )

    assert end_tokens(model(4, 5), tokenizer) == (4,)
    assert end_tokens(model(None, 0), tokenizer) == (0,)
    assert end_tokens(model(None, None), tokenizer) == (tokenizer.eos_token_id,)
    with pytest.raises(InputError, match="set eos_token_id"):
        end_tokens(model(None, None), SimpleNamespace(eos_token_id=None))
