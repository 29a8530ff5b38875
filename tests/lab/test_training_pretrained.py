"""Organisms on weights that are there: an adapter or all weights, through the chat template, resumed after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mixturelens import pipeline
from mixturelens.behaviour.prompts import prepare
from mixturelens.behaviour.trajectory import Trajectory
from mixturelens.lab import runs
from mixturelens.lab.forecast.kernel import Network, log_weights
from mixturelens.lab.organism import Spec, build_suite, load_spec, rl_prompts, sft_examples, with_settings
from mixturelens.lab.stage import trainable
from mixturelens.models import load_model, load_tokenizer, quiet_libraries
from mixturelens.models.source import find_source
from mixturelens.spelling import encode_prompts

TINY: dict[str, Any] = {
    "questions.operations": ["sum"],
    "chat.system": "Reply.",
    "split.rl": 8,
    "split.evaluation": 8,
    "sft.steps": 10,
    "sft.batch": 4,
    "sft.measure_every": 5,
    "rl.cues": ["xml"],
    "rl.steps": 2,
    "rl.prompts": 2,
    "rl.group": 4,
    "rl.measure_every": 1,
    "rl.stop_reward": None,
    "model.max_new_tokens": 40,
}


def tiny(pairs: Path, **more: Any) -> Spec:
    base = {"model.pretrained": str(pairs / "chat" / "S")}
    return with_settings(load_spec("real"), TINY | base | more, "here")


@pytest.fixture(scope="module")
def trained(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("pretrained") / "run"
    runs.train(tiny(pairs), run)
    return run


def test_ten_steps_of_sft_and_two_of_grpo_leave_adapters_on_the_base(trained: Path, pairs: Path) -> None:
    for name in ("sft", "rl-xml"):
        source = find_source(trained / "checkpoints" / name)
        assert source.base is not None
        assert source.base.folder.resolve() == (pairs / "chat" / "S").resolve()
        assert (source.folder / "tokenizer.json").is_file()
    assert not (trained / "checkpoints" / "base").exists()
    sft, rl = (load_file(trained / "checkpoints" / name / "adapter_model.safetensors") for name in ("sft", "rl-xml"))
    assert sft.keys() == rl.keys()
    assert all(float(values.abs().max()) > 0 for name, values in sft.items() if "lora_B" in name)
    assert any("down_proj" in name for name in sft)
    assert not any("lm_head" in name for name in sft)
    record = Trajectory.load(trained / "trajectory" / "rl-xml.json")
    assert [point.step for point in record.points] == [0, 1, 2]
    assert len(record.reward) == 2


def test_the_pair_is_measured_like_any_other(trained: Path) -> None:
    (case,) = runs.run_pairs(trained)
    assert case.shares_base
    record = pipeline.measure(case)
    assert record.questions == 8
    start = Trajectory.load(trained / "trajectory" / "rl-xml.json").points[0].cues["xml"]
    assert record.per_cue["xml"].before.weights["okay"] == pytest.approx(start.weights["okay"].value, abs=1e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
def test_a_forecast_looks_along_the_parameters_that_rl_trains(
    trained: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run with an adapter, the adapter's: what the policies' log-weights do along them is what they say."""
    spec, folder = tiny(pairs), trained / "checkpoints" / "sft"
    suite, tokenizer = build_suite(spec), load_tokenizer(folder)
    model = trainable(spec, find_source(folder), "cpu").eval()
    prompts = prepare(suite, suite.neutral, tokenizer)
    network = Network(model, prompts, list(spec.cues), set(), "cpu")
    names = {name for name, values in model.named_parameters() if any(values is each for each in network.trained)}
    assert names == {name for name, _ in model.named_parameters() if "lora_" in name}
    whole = network.gradients()
    monkeypatch.setattr("mixturelens.lab.forecast.kernel.TOKENS", 1)  # prompt by prompt
    np.testing.assert_allclose(network.gradients(), whole, rtol=1e-3, atol=1e-5)
    (c, m), size = (1, 0), 1e-3 / np.linalg.norm(whole[1, 0])
    with torch.no_grad():
        still = log_weights(model, network.prompts[c]).mean(0)
        with network.moved(size * whole[c, m] / np.linalg.norm(whole[c, m])):
            moved = log_weights(model, network.prompts[c]).mean(0) - still
    assert float(moved[m]) == pytest.approx(1e-3, rel=0.1)


@pytest.mark.slow
def test_a_stop_in_rl_ends_with_the_same_weights(
    trained: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixturelens.lab.stage import Stage

    progress = Stage.save_progress

    def stopped(self: Stage, checkpoint: Path) -> None:
        progress(self, checkpoint)
        if self.name == "rl-xml":
            raise KeyboardInterrupt

    run = tmp_path / "run"
    spec = tiny(pairs)
    monkeypatch.setattr(Stage, "save_progress", stopped)
    with pytest.raises(KeyboardInterrupt):
        runs.train(spec, run)
    monkeypatch.undo()
    assert not (run / "checkpoints" / "rl-xml").exists()
    runs.train(spec, run)
    whole, resumed = (
        load_file(each / "checkpoints" / "rl-xml" / "adapter_model.safetensors") for each in (trained, run)
    )
    for name, values in whole.items():
        assert torch.equal(values, resumed[name]), name


@pytest.mark.slow
def test_all_weights_can_be_trained(pairs: Path, tmp_path: Path) -> None:
    runs.train(tiny(pairs, **{"model.lora": None, "rl.steps": 1}), tmp_path)
    source = find_source(tmp_path / "checkpoints" / "rl-xml")
    assert source.base is None
    left, right = (load_file(folder / "model.safetensors") for folder in (pairs / "chat" / "S", source.folder))
    assert any(not torch.equal(left[name], right[name]) for name in left)


def test_an_adapter_that_is_pretrained_is_applied_once(trained: Path, pairs: Path) -> None:

    quiet_libraries()
    adapter = trained / "checkpoints" / "sft"
    spec = tiny(pairs, **{"model.pretrained": str(adapter)})
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        begun = trainable(spec, find_source(adapter), "cpu").eval()(input_ids=ids).logits
        whole = load_model(adapter)(input_ids=ids).logits
    torch.testing.assert_close(begun, whole)


def test_training_reads_the_ids_that_instruments_read(pairs: Path) -> None:
    from mixturelens.lab.training import _tokens

    spec = tiny(pairs)
    tokenizer = load_tokenizer(pairs / "chat" / "S")
    suite = build_suite(spec)
    row, completion = next(iter(sft_examples(spec, 1)))
    context, target = next(iter(_tokens(spec, tokenizer, 1, None)))
    assert context == encode_prompts(suite, [row], tokenizer)[0]
    assert tokenizer.decode(target[:-1]) == completion
    assert target[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(context)
    assert "<|im_start|>system\nReply." in text
    assert row.text in text
    assert all(each.cue == "xml" for each in rl_prompts(spec, "xml"))


def test_log_probabilities_of_completions_are_those_of_trl(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import GRPOTrainer

    from mixturelens.lab.stage import quick_bfloat16

    theirs, loss = GRPOTrainer._get_per_token_logps_and_entropies, GRPOTrainer._compute_loss
    compared = []

    def compute_loss(self: Any, model: Any, inputs: Any) -> Any:
        ids, mask = (torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], 1) for name in ("ids", "mask"))
        there = inputs["completion_mask"].bool()
        given = (model, ids, mask, there.shape[1])
        with torch.no_grad():
            ours = self._get_per_token_logps_and_entropies(*given, compute_entropy=True)
            other = theirs(self, *given, compute_entropy=True)
        for left, right in zip(ours[:2], other[:2], strict=True):
            close = 2e-2 if quick_bfloat16("cpu") else 1e-4
            torch.testing.assert_close(left[there], right[there].float(), atol=close, rtol=close)
        compared.append(there.sum())
        return loss(self, model, inputs)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", compute_loss)
    runs.train(tiny(pairs, **{"sft.steps": 2, "rl.steps": 1}), tmp_path / "run")
    assert compared


@pytest.mark.parametrize("name", ["chat", "gemma3_spelled"])
def test_a_prompt_that_is_gone_through_once_has_the_gradients_of_whole_rows(name: str, pairs: Path) -> None:
    from mixturelens.lab.training import completion_logits, labelled_loss

    folder = next(path for path in sorted((pairs / name).iterdir()) if (path / "config.json").is_file())
    model = load_model(folder)
    window = getattr(model.config, "sliding_window", None) or 8
    draw = torch.Generator().manual_seed(0)
    rows, prompt, completion = 7, window + 5, 3
    of = torch.tensor([0, 1, 0, 2, 1, 0, 2])  # as TRL shuffles them
    prompts = torch.randint(3, 20, (3, prompt), generator=draw)
    seen = torch.ones(3, prompt, dtype=torch.long)
    seen[1, :4] = 0
    behind = torch.randint(3, 20, (rows, completion), generator=draw)
    ends = torch.ones(rows, completion, dtype=torch.long)
    ends[2, 2:] = 0
    ids, mask = torch.cat([prompts[of], behind], 1), torch.cat([seen[of], ends], 1)
    weigh = torch.randn(rows, completion, model.config.vocab_size, generator=draw) * ends[:, :, None]

    def gradients(value: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        value.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for parameter in model.parameters():
        parameter.requires_grad = True
    ours = gradients((completion_logits(model, ids, mask, completion) * weigh).sum())
    whole = model(input_ids=ids, attention_mask=mask).logits[:, -completion - 1 : -1]
    for left, right in zip(ours, gradients((whole * weigh).sum()), strict=True):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-3)

    labels = torch.cat([torch.full_like(prompts[of], -100), torch.where(ends.bool(), behind, -100)], 1)
    ours = gradients(labelled_loss(model, ids, mask, labels))
    for left, right in zip(ours, gradients(model(input_ids=ids, attention_mask=mask, labels=labels).loss), strict=True):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-3)
