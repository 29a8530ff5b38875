"""On a shape of eight billion parameters every instrument says what it needs, and reads no weight for that."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hollow import hollow
from transformers import LlamaConfig

from mixturelens.behaviour.pair import behaviour_record
from mixturelens.features.pair import FeatureSettings, feature_record
from mixturelens.grafting.pair import graft_record
from mixturelens.models import Budget, Pair
from mixturelens.models.cost import size_of
from mixturelens.patching.pair import patching_record
from mixturelens.probing.pair import probing_record
from mixturelens.routing.repair import repair_record
from mixturelens.suite import load_suite
from mixturelens.types import InputError

SHAPE = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=1,
)
"""Of Llama 3 8B (arXiv 2407.21783)."""
INSTRUMENTS: dict[str, Callable[[Pair, Any, Path], Any]] = {
    "behaviour": lambda pair, record, folder: behaviour_record(pair),
    "patching": lambda pair, record, folder: patching_record(pair, record),
    "probing": lambda pair, record, folder: probing_record(pair, record),
    "grafts": lambda pair, record, folder: graft_record(pair, record),
    "repair": lambda pair, record, folder: repair_record(pair, record),
    "features": lambda pair, record, folder: feature_record(pair, record, FeatureSettings(folder)),
}


@pytest.fixture(scope="module")
def large(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Two folders with the config, and weights of which only the header was ever written: 16 GB of a hole."""
    root = tmp_path_factory.mktemp("large")
    for side in "SR":
        shutil.copytree(pairs / "chat" / "S", root / side)
        SHAPE.save_pretrained(root / side)
        hollow(root / side)
    return Pair(root / "S", root / "R", load_suite(pairs / "chat"), dtype="bfloat16", budget=Budget(memory=1.0))


@pytest.fixture(scope="module")
def record(pairs: Path) -> Any:
    return behaviour_record(Pair(pairs / "chat" / "S", pairs / "chat" / "R", load_suite(pairs / "chat")))


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_says_what_it_needs_before_any_weight_is_read(
    large: Pair, record: Any, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("mixturelens.models.pair.load_model", read)
    size = size_of(large)
    assert size.parameters == pytest.approx(8.03e9, rel=1e-3)
    with pytest.raises(InputError, match=rf"^{name} needs [\d.]+ GB, and --memory allows 1: ") as refused:
        INSTRUMENTS[name](large, record, tmp_path)
    needed = float(str(refused.value).split(" GB")[0].split()[-1]) * 1e9
    # two sets of weights in bfloat16, and less than another half beside them; the crosscoder and its optimiser are more
    assert 2 * size.weights < needed < (2.7 if name == "features" else 2.5) * size.weights
    assert not any(tmp_path.iterdir())
