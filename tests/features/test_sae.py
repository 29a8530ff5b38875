"""SAEs: SAELens' own training, only faster; resumable to the bit; read as SAELens reads them; judged by hand."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mixturelens.features import sae as module
from mixturelens.features.activations import Activations, collect, texts
from mixturelens.features.dictionary import Dictionary
from mixturelens.features.effort import Training
from mixturelens.features.sae import (
    JudgingTexts,
    Origin,
    completion_losses,
    load_sae,
    make_trainer,
    quality,
    train_sae,
)
from mixturelens.hooks.lens import Lens, load_lens
from mixturelens.spelling import encode_prompts
from mixturelens.suite import load_suite
from mixturelens.types import InputError

PAIRS = Path(__file__).parents[1] / "pairs"
D, FEATURES = 32, 20
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning"),
]


@functools.cache
def planted(rows: int = 6000, seed: int = 0) -> tuple[Activations, Tensor]:
    """Rows that are sums of about 2 of 20 known directions, behind a mean; and the directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(FEATURES, D, generator=generator), dim=1)
    on = torch.rand(rows, FEATURES, generator=generator) < 2 / FEATURES
    amounts = on * (1 + torch.rand(rows, FEATURES, generator=generator))
    # a little noise, or rows of the same features would be the same row
    x = amounts @ directions + 3 * torch.randn(D, generator=generator) + torch.randn(rows, D, generator=generator) / 100
    return Activations((x[:, None],), f"planted-{seed}"), directions


def train(folder: Path, site_name: str = "blocks.0.hook_resid_pre", **changes: Any) -> Path:
    progress = changes.pop("progress", None)
    training = replace(Training(width=32, k=2, steps=400, batch=256), **changes)
    return train_sae(planted()[0], folder, Origin(site_name, "planted"), training, progress)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("sae") / "one")


# --- the same as SAELens, only faster ---------------------------------------------------------------------------------


def both(k: float = 3.0, width: int = 40) -> tuple[Any, Any, Tensor]:
    """Two trainers with the same weights, ours and SAELens' own, and a batch in which no two activations are equal."""
    acts, _ = planted()
    ours, theirs = (make_trainer(acts, Training(width, k, 200, 256), sparse=sparse) for sparse in (True, False))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        ours.sae.W_dec.mul_(0.5 + torch.rand(width, 1, generator=generator))  # norms that differ
        ours.sae.b_enc.copy_(torch.randn(width, generator=generator) / 10)
        ours.sae.b_dec.copy_(torch.randn(D, generator=generator))
    theirs.sae.load_state_dict(ours.sae.state_dict())
    return ours, theirs, acts.batch(0, 256, 0)[:, 0]


def test_activations_loss_and_gradients_are_those_of_saelens():
    ours, theirs, x = both()
    found, places, kept = ours.sae.reconstruct(x)
    expected = theirs.sae.encode(x).detach()
    dense = torch.zeros(256 * 40).index_put_((places,), kept).view(256, 40)
    assert torch.equal(dense > 0, expected > 0)
    assert len(places) == 256 * 3
    torch.testing.assert_close(dense, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, theirs.sae(x), atol=1e-5, rtol=1e-5)
    step = SimpleNamespace(sae_in=x, dead_neuron_mask=torch.zeros(40, dtype=torch.bool), coefficients={})
    losses = [trainer.sae.training_forward_pass(step).loss for trainer in (ours, theirs)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for name, parameter in ours.sae.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs.sae.get_parameter(name).grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.sae.topk_threshold, theirs.sae.topk_threshold)


def test_many_steps_end_where_saelens_ends():
    ours, theirs, _ = both()
    for step in range(30):
        batch = planted()[0].batch(step, 256, 0)[:, 0]
        losses = [float(trainer.step(batch).loss.detach()) for trainer in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, parameter in ours.sae.named_parameters():
        torch.testing.assert_close(parameter, theirs.sae.get_parameter(name), atol=1e-3, rtol=1e-2)
    assert torch.equal(ours.n_forward_passes_since_fired, theirs.n_forward_passes_since_fired)


def test_few_or_tied_activations():
    ours, theirs, x = both(k=40.0)  # all may be kept, and only positive ones are
    torch.testing.assert_close(ours.sae.reconstruct(x)[0], theirs.sae(x), atol=1e-5, rtol=1e-5)
    assert bool((ours.sae.reconstruct(x)[2] > 0).all())
    ours, _, x = both(k=1.0)
    _, places, _ = ours.sae.reconstruct(x[:1].expand(50, -1))
    assert len({int(place) % 40 for place in places}) * 50 == len(places)  # the same token, the same features
    with torch.no_grad():
        ours.sae.b_enc.fill_(-100.0)
    found, places, _ = ours.sae.reconstruct(x)
    assert not len(places)
    torch.testing.assert_close(found, ours.sae.b_dec.expand_as(x))


# --- training ---------------------------------------------------------------------------------------------------------


def test_planted_directions_are_found(trained: Path):
    acts, directions = planted()
    dictionary = load_sae(trained)
    found = (torch.nn.functional.normalize(dictionary.write, dim=1) @ directions.T).max(0).values
    assert float(found.median()) > 0.97
    assert float((found > 0.9).float().mean()) > 0.8
    x = planted(seed=0)[0].parts[0][:, 0]
    error = (x - dictionary.decode(dictionary.encode(x))).square().sum()
    assert float(error / (x - x.mean(0)).square().sum()) < 0.1
    assert bool((module._firing(dictionary, acts) > 0).all())


def test_it_is_read_as_saelens_reads_it(trained: Path):
    from sae_lens import SAE

    theirs: Any = SAE.load_from_disk(trained)
    ours, x = load_sae(trained), planted()[0].parts[0][:500, 0]
    assert theirs.cfg.metadata.hook_name == "blocks.0.hook_resid_pre"
    assert theirs.cfg.metadata.model_name == "planted"
    with torch.no_grad():
        expected = theirs.encode(x)
        assert torch.equal(ours.encode(x) > 0, expected > 0)
        torch.testing.assert_close(ours.encode(x), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.decode(ours.encode(x)), theirs(x), atol=1e-4, rtol=1e-4)
    assert len(ours) == theirs.cfg.d_sae


def test_rows_that_never_vary_have_no_features(tmp_path: Path):
    still = Activations((torch.zeros(256, 1, D),))
    train_sae(still, tmp_path / "sae", Origin("L0.z.0"), Training(k=4, steps=5, batch=64))
    found = load_sae(tmp_path / "sae")
    assert len(found) == 0
    torch.testing.assert_close(found.bias, torch.zeros(D))


def test_killed_at_any_moment_it_ends_with_the_same_weights(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Killed(BaseException):
        pass

    def kill_at(steps: int):
        def kill(done: int, _: int) -> None:
            if done == steps:
                raise Killed

        return kill

    folder, work = tmp_path / "again", tmp_path / ".again.training"
    with pytest.raises(Killed):
        train(folder, progress=kill_at(170))
    (work / "step-199").mkdir()  # half a checkpoint: without its marker it does not count
    (work / "step-199" / "sae_weights.safetensors").write_bytes(b"half")
    steps: list[int] = []

    def killed_at_the_end(_: Path) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(module, "new_folder", killed_at_the_end)
        with pytest.raises(Killed):
            train(folder, progress=lambda done, _: steps.append(done))
    assert steps[0] == 151
    assert not folder.exists()
    train(folder)
    assert (folder / "sae_weights.safetensors").read_bytes() == (trained / "sae_weights.safetensors").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again"]


def test_what_is_there_is_not_trained_again(trained: Path):
    time = (trained / "cfg.json").stat().st_mtime_ns
    assert train(trained, progress=lambda *_: pytest.fail("trained again")) == trained
    assert (trained / "cfg.json").stat().st_mtime_ns == time
    for change in ({"seed": 1}, {"k": 3}, {"site_name": "blocks.1.hook_resid_pre"}):
        with pytest.raises(InputError, match="another SAE"):
            train(trained, **change)
    with pytest.raises(InputError, match="0 < k"):
        train(trained.parent / "no", k=33)
    nothing = Activations((torch.full((300, 1, 4), torch.nan),), "nothing")
    with pytest.raises(InputError, match="not finite"):
        train_sae(nothing, trained.parent / "no", Origin("x"), Training(steps=2, batch=16, k=2))


def test_dead_features_come_back_and_the_useless_are_left_out(tmp_path: Path):
    acts, _ = planted()
    trainer = make_trainer(acts, Training(40, 2, 200, 256))
    module._start_at_examples(trainer, acts, 0)
    with torch.no_grad():
        trainer.sae.b_enc[:10] = -100.0
    for step in range(12):
        trainer.step(acts.batch(step, 256, 0)[:, 0])
        trainer.n_training_steps += 1
    dead = trainer.dead_neurons.clone()
    assert bool(dead[:10].all())
    before = trainer.sae.W_dec.detach().clone()
    module._resample(trainer, acts, 0)
    assert torch.equal((trainer.sae.W_dec.detach() != before).any(1), dead)  # these and no others
    for step in range(12, 24):
        trainer.step(acts.batch(step, 256, 0)[:, 0])
    assert float(trainer.dead_neurons[:10].float().mean()) < 0.5
    # two directions in all: most of 32 features have nothing to do
    few = Activations((torch.randn(2000, 1, 2).abs() @ torch.eye(2, 8),), "few")
    dictionary = load_sae(train_sae(few, tmp_path / "few", Origin("x"), Training(width=32, k=1, steps=200, batch=256)))
    assert float((module._firing(dictionary, few) == 0).float().mean()) == 0
    assert 1 <= len(dictionary) <= 32


# --- reading and judging ----------------------------------------------------------------------------------------------


@functools.cache
def judged(shape: str) -> tuple[Lens, list[list[int]], list[int]]:
    lens, suite = load_lens(PAIRS / shape / "S"), load_suite(PAIRS / shape)
    rows = suite.neutral[:24]
    return lens, texts([lens], suite, rows), [len(ids) for ids in encode_prompts(suite, rows, lens.tokenizer)]


def identity(d: int) -> Dictionary:
    return Dictionary(torch.eye(d), torch.zeros(d), torch.full((d,), -torch.inf), torch.eye(d), torch.zeros(d))


@torch.no_grad()
@pytest.mark.parametrize("shape", ["llama", "gpt2", "gpt_neox", "qwen2"])
def test_quality_of_dictionaries_that_keep_all_or_nothing(shape: str):
    lens, given, prompts = judged(shape)
    at, d = (1, "resid_pre"), lens.d_model
    found = quality(lens, identity(d), at, JudgingTexts(given, prompts))
    assert found.explained == pytest.approx(1)
    assert found.loss_recovered.value == pytest.approx(1, abs=1e-5)
    assert (found.active, found.dead, found.tokens) == (pytest.approx(d, rel=0.01), 0, sum(map(len, given)))
    mean = collect([lens], given, at).parts[0][:, 0].mean(0)
    nothing = Dictionary(torch.zeros(3, d), torch.zeros(3), torch.zeros(3), torch.zeros(3, d), mean)
    found = quality(lens, nothing, at, JudgingTexts(given, prompts))
    assert found.explained == pytest.approx(0, abs=1e-5)
    assert found.loss_recovered.value == pytest.approx(0, abs=1e-4)
    assert (found.active, found.dead) == (0, 1)


@torch.no_grad()
def test_losses_by_hand():
    lens, given, prompts = judged("gpt2")
    by_hand = []
    for ids, start in zip(given, prompts, strict=True):
        logs = lens.model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
        own = [-float(logs[at - 1, ids[at]]) for at in range(start, len(ids))]
        by_hand.append(sum(own) / len(own))
    assert completion_losses(lens.model, JudgingTexts(given, prompts), lens) == pytest.approx(by_hand, abs=1e-5)


def test_quality_refuses_what_it_cannot_judge():
    lens, given, prompts = judged("llama")
    at, d = (1, "resid_pre"), lens.d_model
    with pytest.raises(InputError, match="not meant to reconstruct"):
        quality(lens, identity(d).part(torch.arange(2)), at, JudgingTexts(given, prompts))
    with pytest.raises(InputError, match="dimensions"):
        quality(lens, identity(d + 1), at, JudgingTexts(given, prompts))
    with pytest.raises(InputError, match="completion behind it"):
        quality(lens, identity(d), at, JudgingTexts(given, [len(ids) for ids in given]))
    with pytest.raises(InputError, match="the same on every token"):
        quality(lens, identity(d), (0, "resid_pre"), JudgingTexts([[3, 3], [3, 3]], [1, 1]))


def test_an_sae_of_a_real_site_loses_little(tmp_path: Path):
    lens, given, prompts = judged("llama")
    acts = collect([lens], given, (1, "resid_pre"))
    folder = train_sae(acts, tmp_path / "sae", Origin("blocks.1.hook_resid_pre"), Training(k=8, steps=200, batch=256))
    found = quality(lens, load_sae(folder), (1, "resid_pre"), JudgingTexts(given, prompts))
    assert found.loss_recovered.value is not None
    assert found.loss_recovered.value > 0.9
    assert found.explained is not None
    assert found.explained > 0.9
    assert found.active == pytest.approx(8, rel=0.3)
