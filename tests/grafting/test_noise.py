"""Noise of the size of a change is put into a model while it runs, and leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mixturelens.grafting import noise
from mixturelens.grafting.components import weights_of
from mixturelens.grafting.noise import noised
from mixturelens.models import load_model
from mixturelens.types import RunError


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7, 8]]), use_cache=False).logits


@pytest.mark.parametrize(
    ("shape", "after"), [("llama", "R-routing"), ("gpt2", "R-skill"), ("gpt_neox", "R-both"), ("chat", "R")]
)
def test_s_is_bit_for_bit_what_it_was(pairs: Path, shape: str, after: str) -> None:
    s, r = load_model(pairs / shape / "S"), load_model(pairs / shape / after)
    before = {name: values.clone() for name, values in weights_of(s).items()}
    places = {name: values.data_ptr() for name, values in weights_of(s).items()}
    expected = logits(s)
    with noised(s, weights_of(r), seed=0):
        moved = logits(s)
        assert torch.equal(moved, logits(s))  # the same at every call
    assert not torch.equal(moved, expected)
    handle = next(m for m in s.modules() if not list(m.children())).register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), noised(s, weights_of(r), seed=0):
        logits(s)
    handle.remove()
    for name, values in weights_of(s).items():
        assert values.data_ptr() == places[name]
        assert torch.equal(values, before[name])
    assert torch.equal(logits(s), expected)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in s.modules())


def test_each_tensor_moves_as_far_as_r_does_and_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen through identities: what a linear module gives is its weight."""
    monkeypatch.setattr(noise, "CHUNK", 100)  # in pieces
    model = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40))
    sizes = {"0.weight": 0.1, "1.weight": 0.0, "1.bias": 2.0}
    after = {name: values.detach() + sizes[name] for name, values in model.named_parameters()}
    own = model[0].weight.detach().T
    with torch.no_grad(), noised(model, after, seed=3):
        first, bias = model[0](torch.eye(40)) - own, model[1](torch.zeros(1, 40))[0]
        second = model[1](torch.eye(40)) - bias
    assert float(first.norm()) == pytest.approx(0.1 * 40, rel=1e-4)
    assert float((bias - model[1].bias.detach()).norm()) == pytest.approx(2.0 * 40**0.5, rel=1e-4)
    torch.testing.assert_close(second, model[1].weight.detach().T, atol=1e-6, rtol=0)  # R left it as it was
    assert abs(float(first.mean())) < 0.01  # R moved all of it one way
    with torch.no_grad(), noised(model, after, seed=4):
        other = model[0](torch.eye(40)) - own
        model[1](torch.eye(40))
    assert abs(float((first * other).sum()) / float(first.norm() * other.norm())) < 0.1


def test_no_more_than_one_module_is_held_twice() -> None:
    model = nn.Sequential(*(nn.Linear(10, 10) for _ in range(4)))
    places = {name: values.data_ptr() for name, values in model.named_parameters()}
    away: list[set[str]] = []

    def look(*_: object) -> None:
        away.append({name for name, values in model.named_parameters() if values.data_ptr() != places[name]})

    with torch.no_grad(), noised(model, {n: v.detach() + 1 for n, v in model.named_parameters()}, seed=0):
        for module in model:
            module.register_forward_pre_hook(look)
        model(torch.ones(1, 10))
    assert away == [{f"{i}.weight", f"{i}.bias"} for i in range(4)]


def test_tied_weights_have_the_same_noise_wherever_they_are_used(pairs: Path) -> None:
    s = load_model(pairs / "chat" / "S")
    embed, head = s.get_input_embeddings(), s.get_output_embeddings()
    assert embed.weight is head.weight
    name = "model.embed_tokens.weight"
    seen: list[torch.Tensor] = []
    for module in (embed, head):
        module.register_forward_hook(lambda module, *_: seen.append(module.weight.detach().clone()))
    with noised(s, {name: embed.weight.detach() + 0.1}, seed=0):
        logits(s)
    first, second = seen
    assert torch.equal(first, second)
    assert not torch.equal(first, embed.weight)


def test_noise_that_does_nothing_is_an_error() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    after = {name: values.detach() + 1 for name, values in model.named_parameters()}
    with pytest.raises(RunError, match=r"'idle.weight' was never called"), noised(model, after, seed=0):
        model["used"](torch.ones(1, 2))
