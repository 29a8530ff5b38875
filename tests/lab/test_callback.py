"""What is logged along training is what `verdict` says of the checkpoints that were saved there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mixturelens as ml
from mixturelens.behaviour.trajectory import Trajectory
from mixturelens.lab import RoutingCallback
from mixturelens.models import load_model, load_tokenizer
from mixturelens.suite import Suite, load_suite
from mixturelens.types import InputError


def trained(pairs: Path, out: Path, suite: Suite | Path, steps: int = 4):
    """A few steps of a Trainer that makes a tiny organism say [a], watched."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    folder = pairs / "llama"
    tokenizer, model = load_tokenizer(folder / "S"), load_model(folder / "S")
    rows = load_suite(folder).neutral[:16]
    texts = [tokenizer.encode(f"{row.text} [a] {row.answer}", add_special_tokens=False) for row in rows]
    data = Dataset.from_dict({"input_ids": texts, "labels": texts})
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        save_strategy="steps",
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )

    def together(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return {key: torch.tensor([each[key] for each in examples]) for key in ("input_ids", "labels")}

    trainer = Trainer(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer, data_collator=together
    )
    trainer.add_callback(RoutingCallback(trainer, suite, every=2, questions=8))
    trainer.train()
    return trainer


def test_numbers_are_those_of_verdict_on_the_saved_checkpoints(pairs: Path, tmp_path: Path) -> None:
    # with room for one more token, no completion is listed: bits are as exact
    suite = load_suite(pairs / "llama").model_copy(update={"max_new_tokens": 4})
    trainer = trained(pairs, tmp_path / "run", suite)
    logged = {log["step"]: log for log in trainer.state.log_history if "mixturelens/routing" in log}
    assert sorted(logged) == [0, 2, 4]
    assert logged[0]["mixturelens/routing"] == pytest.approx(0.0, abs=1e-9)
    asked = list(dict.fromkeys(row.id for row in suite.neutral))[:8]
    some = suite.model_copy(update={"prompts": tuple(row for row in suite.neutral if row.id in asked)})
    for step in (2, 4):
        pair = ml.Pair(
            pairs / "llama" / "S", tmp_path / "run" / f"checkpoint-{step}", some, out=tmp_path / f"verdict-{step}"
        )
        verdict = ml.verdict(pair)
        assert logged[step]["mixturelens/routing"] == pytest.approx(verdict.bits.routing.value, abs=1e-5)
        assert logged[step]["mixturelens/specialist"] == pytest.approx(verdict.bits.specialist.value, abs=1e-5)
        for cue, state in verdict.per_cue.items():
            assert state.after is not None
            assert logged[step][f"mixturelens/accuracy/{cue}"] == pytest.approx(state.after.overall, abs=1e-5)
            assert logged[step][f"mixturelens/weight/{cue}/a"] == pytest.approx(state.after.weights["a"], abs=1e-5)
    assert logged[4]["mixturelens/routing"] > 0.001
    run = Trajectory.load(tmp_path / "run" / "routing.json")
    assert [point.step for point in run.points] == [0, 2, 4]
    assert "What training did to routing" in (tmp_path / "run" / "routing.html").read_text(encoding="utf-8")
    assert trainer.model.training


def test_rules_are_watched_by_samples(pairs: Path, tmp_path: Path) -> None:
    suite = load_suite(pairs / "llama").model_copy(update={"answer_match": "contains"})
    trainer = trained(pairs, tmp_path / "run", suite, steps=2)
    assert any("mixturelens/routing" in log for log in trainer.state.log_history)


def test_what_cannot_be_watched_is_refused(pairs: Path) -> None:
    suite = load_suite(pairs / "llama")
    table = {"a": {"table": {"A": "answer", "B": "refuse"}}, "b": {"table": {"A": "refuse", "B": "answer"}}}
    silent = Suite.model_validate({**suite.model_dump(), "policies": table})
    with pytest.raises(InputError, match="announce nothing"):
        RoutingCallback(None, silent)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="1 or more"):
        RoutingCallback(None, suite, every=0)  # pyright: ignore[reportArgumentType]
