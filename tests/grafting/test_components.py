"""Changed parts and how far they moved."""

from __future__ import annotations

import pytest
import torch

from mixturelens.grafting.components import parts, weights_of
from mixturelens.grafting.graft import written
from mixturelens.hooks.lens import load_lens
from mixturelens.hooks.weights import lens_components
from mixturelens.models import load_model


def test_change_is_relative_to_what_was_there():
    before = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0]), "c": torch.zeros(2)}
    after = {"a": torch.tensor([3.0, 0.3]), "b": torch.tensor([4.4]), "c": torch.tensor([0.0, 2.0])}
    found = parts({"x": ("a", "b"), "y": ("c",), "z": ("a",)}, before, {**after, "b": after["b"]})
    assert [(part.name, part.parameters) for part in found] == [("x", 3), ("y", 2), ("z", 2)]
    assert [part.change for part in found] == pytest.approx([0.1, 1.0, 0.1], abs=1e-6)  # sqrt(.09 + .16) / 5


@pytest.mark.parametrize("shape", ["llama", "gpt2", "gpt_neox", "qwen2", "chat"])
def test_what_did_not_change_has_no_change(pairs, shape: str):
    folder = pairs / shape / "S"
    weights = weights_of(load_model(folder))
    components = lens_components(load_lens(folder))
    found = parts(components, weights, weights)
    assert all(part.change == 0 for part in found)
    assert sum(part.parameters for part in found) == sum(w.numel() for w in weights.values())


def test_weights_are_no_copies_and_stay_what_they_are_through_a_graft():
    module, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    own = weights_of(module)
    assert own["weight"].data_ptr() == module.weight.data_ptr()
    assert not own["weight"].requires_grad
    expected = own["weight"].clone()
    with written(module, weights_of(other)):
        assert module.weight.data_ptr() == other.weight.data_ptr()
        assert torch.equal(own["weight"], expected)
    assert module.weight.data_ptr() == own["weight"].data_ptr()
