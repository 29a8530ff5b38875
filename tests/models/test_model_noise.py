"""Noise in place of RL's change: as much of it in every tensor, and nothing else moved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mixturelens.models import Pair
from mixturelens.models.load import load_model
from mixturelens.models.noise import noised
from mixturelens.suite import load_suite

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft

PAIRS = Path(__file__).parents[1] / "pairs"


def test_noise_has_the_norm_of_the_change_in_every_tensor():
    folder = PAIRS / "llama"
    models = Pair(folder / "S", folder / "R-routing", load_suite(folder)).models()
    start, end = ({name: w.detach().clone() for name, w in m.named_parameters()} for m in models)
    model = noised(models, seed=3)
    for name, weight in model.named_parameters():
        added, change = weight.detach() - start[name], end[name] - start[name]
        assert float(added.norm()) == pytest.approx(float(change.norm()), rel=1e-3)
        if change.numel() > 100:  # and has nothing to do with it
            assert abs(float((added * change).sum() / change.norm() ** 2)) < 0.3
    for name, weight in models[0].named_parameters():
        assert torch.equal(weight, start[name])


def test_no_change_is_no_noise():
    folder = PAIRS / "llama"
    models = Pair(folder / "S", folder / "S", load_suite(folder)).models()
    model = noised(models)
    for (_, weight), (_, same) in zip(model.named_parameters(), models[0].named_parameters(), strict=True):
        assert torch.equal(weight, same)


def test_noise_of_an_adapter_is_as_large_as_what_it_adds(tmp_path: Path):
    folder = PAIRS / "llama"
    base = load_model(folder / "S")
    start = {name: weight.detach().clone() for name, weight in base.named_parameters()}
    peft = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    added = {
        name.replace("base_model.model.", ""): module.get_delta_weight("default").detach()
        for name, module in peft.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    peft.save_pretrained(tmp_path / "adapter")
    pair = Pair(folder / "S", tmp_path / "adapter", load_suite(folder), base=folder / "S")
    assert pair.shares_base
    model = noised(pair.models())
    now = {name.replace(".base_layer", ""): w for name, w in model.under.base_model.model.named_parameters()}
    for name, weight in start.items():
        change = float((now[name].detach() - weight).norm())
        expected = float(added[name.removesuffix(".weight")].norm()) if name.removesuffix(".weight") in added else 0.0
        assert change == pytest.approx(expected, rel=1e-3), name
