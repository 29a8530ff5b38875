"""What features take is said from configs alone; with less allowed, less is looked at, and said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hollow import hollow

from mixturelens.behaviour.record import BehaviourRecord
from mixturelens.features.effort import SHARES, make_plan, share_of, work_of
from mixturelens.features.pair import FeatureSettings, feature_record
from mixturelens.models import Budget, Pair
from mixturelens.models.cost import estimate
from mixturelens.models.pair import UNBOUNDED
from mixturelens.suite import load_suite
from mixturelens.types import InputError

REFERENCE = Path(__file__).parents[2] / "artifacts" / "reference"
S, R = (REFERENCE / "checkpoints" / name for name in ("sft", "rl-A"))


def reference(budget: Budget = UNBOUNDED):
    return Pair(S, R, load_suite(REFERENCE), budget=budget)


def test_a_small_model_is_looked_at_whole():
    plan = make_plan(reference(), 4096, 512)
    assert (plan.share, plan.missing) == (1.0, ())
    assert 0.4e9 < plan.needs.memory < 1.5e9


def test_less_time_is_less_work_and_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mixturelens.models.cost.rate", lambda *_: 2e9)
    seconds = [estimate(reference(), work_of(reference(), 4096, 512, share)).seconds for share in SHARES]
    assert seconds == sorted(seconds, reverse=True)
    middle = (seconds[0] + seconds[1]) / 2 / 60
    plan = make_plan(reference(Budget(minutes=middle)), 4096, 512)
    assert plan.share == SHARES[1]
    assert plan.missing[0].startswith("features: at most 0.5 of the texts, questions, nulls and latents")
    least = make_plan(reference(Budget(minutes=1e-3)), 4096, 512)
    assert least.share == SHARES[-1]
    assert "the least there is takes about" in least.missing[1]
    assert [share_of(48, share, 8) for share in SHARES] == [48, 24, 12, 8]


def test_more_memory_than_is_allowed_is_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch):
    behaviour = BehaviourRecord.load(REFERENCE / "records" / "sft--rl-A" / "behaviour.json")
    monkeypatch.setattr("mixturelens.features.pair.lens_of", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(InputError, match=r"features needs 0\.\d GB, and --memory allows 0\.1"):
        feature_record(reference(Budget(memory=0.1)), behaviour, FeatureSettings(tmp_path))


def test_eight_billion_parameters_are_estimated_without_weights(tmp_path: Path):
    """Two folders of a config and the reference's tokenizer: there is nothing else to read."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 8192, "eos_token_id": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    for name in ("S", "R"):
        (tmp_path / name).mkdir()
        for file in S.iterdir():
            if file.name.startswith("tokenizer"):
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        hollow(tmp_path / name)
    plan = make_plan(Pair(tmp_path / "S", tmp_path / "R", load_suite(REFERENCE), dtype="bfloat16"), 60, 60)
    assert 32e9 < plan.needs.memory < 45e9
    assert plan.share == SHARES[-1]
