"""Changed weights of an adapter as one adapter: what peft loads is what was changed, and what cannot be one is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from mixturelens.models import load_model, load_tokenizer
from mixturelens.models.adapter import save_adapter
from mixturelens.models.source import find_source
from mixturelens.types import InputError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft

KEYS = {"llama": "model.layers.1.self_attn.k_proj.weight", "gpt2": "transformer.h.1.attn.c_attn.weight"}


def make_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter of random numbers on a base."""
    torch.manual_seed(0)
    model = load_model(base)
    model.config._name_or_path = str(base)
    peft = get_peft_model(model, LoraConfig(init_lora_weights=False, **settings))
    peft.save_pretrained(str(folder))
    return folder


def changed(adapter: Path, base: Path, name: str, rank: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """(the merged adapter with a change of so many ranks in one parameter, that parameter)."""
    whole = load_model(find_source(adapter, base))
    weight = whole.get_parameter(name).data
    weight += 0.1 * torch.randn(len(weight), rank) @ torch.randn(rank, weight.shape[1])
    return whole, {name: weight.clone()}


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ("llama", {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "k_proj"]}),
        ("llama", {"r": 2, "target_modules": ["down_proj"]}),  # nothing yet where the change is
        ("llama", {"r": 2, "target_modules": ["k_proj", "v_proj"], "rank_pattern": {"v_proj": 4}}),
        ("gpt2", {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
)
def test_peft_loads_what_was_changed(shape: str, settings: dict[str, Any], pairs: Path, tmp_path: Path) -> None:
    base = pairs / shape / "S"
    adapter = make_adapter(base, tmp_path / "R", **settings)
    whole, weights = changed(adapter, base, KEYS[shape], 2)
    tokenizer = load_tokenizer(base)
    save_adapter(find_source(adapter, base), weights, tokenizer, tmp_path / "made")
    ids = torch.arange(3, 12)[None]
    with torch.inference_mode():
        wanted = whole(input_ids=ids).logits
        found = PeftModel.from_pretrained(load_model(base), str(tmp_path / "made")).eval()(input_ids=ids).logits
        own = load_model(find_source(adapter, base))(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert float((own - wanted).abs().max()) > 1e-2
    assert find_source(tmp_path / "made").base == find_source(base)
    most = max(settings.get("rank_pattern", {}).values(), default=settings["r"])
    for tensor in load_file(tmp_path / "made" / "adapter_model.safetensors").values():
        assert min(tensor.shape) <= most + 2


@pytest.mark.parametrize(
    ("settings", "rank", "name", "said"),
    [
        ({"target_modules": ["q_proj"]}, 64, KEYS["llama"], r"k_proj.weight has rank \d+ of \d+: no adapter"),
        ({"target_modules": ["q_proj"], "use_dora": True}, 1, KEYS["llama"], "more than add low-rank products"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, 1, KEYS["llama"], "more than add low-rank"),
        ({"target_modules": ".*q_proj"}, 1, KEYS["llama"], "peft cannot join another change"),
        ({"target_modules": ["q_proj"]}, 1, "model.embed_tokens.weight", "no weight of a linear layer"),
    ],
)
def test_what_is_no_adapter_is_said_and_not_written(
    settings: dict[str, Any], rank: int, name: str, said: str, pairs: Path, tmp_path: Path
) -> None:
    base = pairs / "llama" / "S"
    adapter = make_adapter(base, tmp_path / "R", r=2, **settings)
    _, weights = changed(adapter, base, name, rank)
    with pytest.raises(InputError, match=said):
        save_adapter(find_source(adapter, base), weights, load_tokenizer(base), tmp_path / "made")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["R"]
