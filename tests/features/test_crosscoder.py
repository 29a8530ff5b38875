"""A planted exclusive feature is found, and one that both checkpoints have is not."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixturelens.features.activations import collect, texts
from mixturelens.features.batchtopk import KeptLatents, gradients, smallest_kept
from mixturelens.features.crosscoder import (
    Crosscoder,
    train_crosscoder,
)
from mixturelens.features.effort import Training
from mixturelens.features.latents import judge_latents, transplant
from mixturelens.hooks.lens import Lens, load_lens, tokens
from mixturelens.models import load_model, load_tokenizer
from mixturelens.suite import load_suite
from mixturelens.types import InputError

REFERENCE = Path(__file__).resolve().parents[2] / "artifacts" / "reference"
SMALL = Training(width=96, k=5, steps=650, batch=512)
TINY = Training(width=16, k=3, steps=100, batch=32)
HELD_OUT = 2000


class Memory:
    """Activations in memory, in batches that follow from step and seed alone."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    @property
    def dim(self) -> int:
        return self.x.shape[2]

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, step: int, size: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(7919 * seed + step)
        return self.x[torch.randint(len(self.x), (size,), generator=generator)]


@functools.cache
def planted(seed: int, in_s: float = 0.0) -> tuple[Tensor, Tensor]:
    """48 sparse features that S and R share in 32 dimensions; R has one direction more, on a fifth of the rows."""
    generator = torch.Generator().manual_seed(seed)
    rows, features, d = 12000, 48, 32
    shared = torch.nn.functional.normalize(torch.randn(features, d, generator=generator), dim=1)
    on = (torch.rand(rows, features, generator=generator) < 4 / features).float()
    s = (on * (0.5 + torch.rand(rows, features, generator=generator))) @ shared + 0.5
    v = torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=0)
    strength = (torch.rand(rows, generator=generator) < 0.2) * (1.1 + 0.8 * torch.rand(rows, generator=generator))
    more = strength[:, None] * v
    noise = 0.01 * torch.randn(rows, 2, d, generator=generator)
    return torch.stack([s + in_s * more, s + more], 1) + noise, v


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


@functools.cache
def trained(seed: int, in_s: float = 0.0) -> Crosscoder:
    return train_crosscoder(Memory(planted(seed, in_s)[0][:-HELD_OUT]), replace(SMALL, seed=seed))


def turned(crosscoder: Crosscoder) -> Crosscoder:
    """S and R the other way round."""
    return Crosscoder(
        encoder=crosscoder.encoder.flip(0),
        b_enc=crosscoder.b_enc,
        decoder=crosscoder.decoder.flip(1),
        bias=crosscoder.bias.flip(0),
        scale=crosscoder.scale.flip(0),
        threshold=crosscoder.threshold,
    )


def random_crosscoder(width: int = 6, d: int = 4) -> Crosscoder:
    generator = torch.Generator().manual_seed(0)
    encoder, decoder = torch.randn(2, d, width, generator=generator), torch.randn(width, 2, d, generator=generator)
    rest = [torch.randn(*shape, generator=generator) for shape in ((width,), (2, d))]
    return Crosscoder(encoder, rest[0], decoder, rest[1], torch.tensor([1.0, 2.0]), threshold=1.5)


# --- what is found ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_a_direction_that_only_r_has_is_found(seed: int):
    x, v = planted(seed)
    latents, fit = judge_latents(trained(seed), x[-HELD_OUT:], seed)
    (found,) = latents.of("after")
    assert cosine(trained(seed).decoder[found, 1], v) >= 0.95
    assert float(latents.rate[found]) == pytest.approx(0.2, abs=0.04)
    assert float(latents.relative[found]) > 0.9
    assert (fit.exclusive, fit.false, fit.seed) == ({"before": 0, "after": 1}, 0, seed)
    assert min(fit.explained.values()) > 0.9
    assert fit.active == pytest.approx(SMALL.k, abs=0.5)
    # without it R is S again, and S stays as it is
    s, r = x[-HELD_OUT:].unbind(1)
    left = transplant(trained(seed), s, r, [found]) - s
    assert float(left.square().sum()) < 0.1 * float((r - s).square().sum())
    assert torch.allclose(transplant(trained(seed), s, r, [found], "before"), s, atol=0.1)


def test_what_only_s_has_is_found_the_same_way():
    x = planted(0)[0][-HELD_OUT:]
    latents, fit = judge_latents(trained(0), x)
    mirrored, other = judge_latents(turned(trained(0)), x.flip(1))
    assert mirrored.of("before") == latents.of("after")
    assert other.exclusive == {"before": 1, "after": 0}
    assert other.explained == pytest.approx({"before": fit.explained["after"], "after": fit.explained["before"]})


def test_half_as_strong_is_not_exclusive():
    """The direction in both, half as strong in S (and, turned round, half as strong in R)."""
    x, v = planted(0, in_s=0.5)
    crosscoder = trained(0, in_s=0.5)
    latents, fit = judge_latents(crosscoder, x[-HELD_OUT:])
    assert fit.exclusive == {"before": 0, "after": 0}
    best = max(range(len(crosscoder)), key=lambda i: cosine(crosscoder.decoder[i, 1], v) * bool(latents.rate[i] > 0.1))
    assert latents.kind[best] == "shared"
    assert float(latents.relative[best]) == pytest.approx(2 / 3, abs=0.1)
    assert judge_latents(turned(crosscoder), x[-HELD_OUT:].flip(1))[1].exclusive == {"before": 0, "after": 0}


def test_s_against_itself_has_nothing_exclusive():
    x = planted(0)[0][:, :1].repeat(1, 2, 1)
    latents, fit = judge_latents(train_crosscoder(Memory(x[:-HELD_OUT]), replace(SMALL, steps=300)), x[-HELD_OUT:])
    assert fit.exclusive == {"before": 0, "after": 0}
    assert fit.false == 0
    assert float((latents.relative - 0.5).abs().max()) < 1e-4


def test_latent_scaling_tells_artifacts_from_what_is_exclusive():
    """Four latents that one checkpoint alone has by decoder norm; hand-made, so that both scalings are known.

    Latent 0 truly is R's. Of latent 1, S has 0.6 in its error (complete shrinkage). Latents 2 and 3 fire together and
    write one direction, each in one checkpoint (latent decoupling). Latent 4 is shared, latent 5 never fires.
    """
    axes = torch.eye(6)
    encoder, decoder = torch.zeros(2, 6, 6), torch.zeros(6, 2, 6)
    for latent, (reads, writes, axis) in enumerate([(1, 1, 0), (1, 1, 1), (1, 1, 2), (1, 0, 2), (0, 0, 3), (1, 1, 5)]):
        encoder[reads, axis, latent] = 1.0
        decoder[latent, writes] = axes[axis]
    decoder[4, 1] = axes[3]
    crosscoder = Crosscoder(encoder, torch.zeros(6), decoder, torch.zeros(2, 6), torch.ones(2), threshold=0.01)
    f = torch.rand(4000, 4, generator=torch.Generator().manual_seed(0))
    f = f * (f > 0.5)
    s, r = torch.zeros(4000, 6), torch.zeros(4000, 6)
    r[:, 0], r[:, 1], r[:, 2], r[:, 3] = f.T
    s[:, 1], s[:, 2], s[:, 3] = 0.6 * f[:, 1], f[:, 2], f[:, 3]
    latents, fit = judge_latents(crosscoder, torch.stack([s, r], 1))
    assert latents.kind == ("after", "false", "false", "false", "shared", "dead")
    near = {"abs": 0.05}
    assert latents.on_error[:4].tolist() == pytest.approx([0.0, 0.6, 0.0, 0.0], **near)
    assert latents.on_reconstruction[:4].tolist() == pytest.approx([0.0, 0.0, 1.0, 1.0], **near)
    assert bool(latents.on_error[4:].isnan().all())
    assert (fit.false, fit.shared, fit.exclusive) == (3, 1, {"before": 0, "after": 1})
    assert fit.dead == pytest.approx(1 / 6)
    assert fit.explained["after"] == pytest.approx(1.0)
    varies = s.var(0)
    assert fit.explained["before"] == pytest.approx(float(1 - s[:, 1].square().mean() / varies.sum()), abs=0.01)


@functools.cache
def edited_embedding() -> tuple[Tensor, Tensor, Tensor]:
    """S, and S with a direction added to the embedding of `reverse`: L0.resid_pre, the direction, where it is."""
    folder = REFERENCE / "checkpoints" / "sft"
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    embeddings = model.get_input_embeddings().weight.data
    v = torch.nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(0)), dim=0)
    token = tokenizer.get_vocab()["reverse"]
    embeddings[token] += 3 * embeddings.norm(dim=1).mean() * v
    lines = (REFERENCE / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    batch = tokens([tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines])
    key = (0, "resid_pre")
    both = [lens.capture(batch, [key])[0][key].flatten(0, 1) for lens in (load_lens(folder), Lens(model, tokenizer))]
    return torch.stack(both, 1), v, batch.ids.flatten() == token


def test_what_was_written_into_one_embedding_is_found():
    """It comes with a token that S knows as well, so it is that token's latent that changed, and by that direction."""
    x, v, there = edited_embedding()
    crosscoder = train_crosscoder(Memory(x), replace(SMALL, width=64, steps=400))
    latents, fit = judge_latents(crosscoder, x)
    fires = crosscoder.encode(x) > 0
    moved = crosscoder.change.norm(dim=1) * (latents.rate > 0)
    found = int(moved.argmax())
    assert cosine(crosscoder.change[found], v) >= 0.95
    assert bool(fires[there, found].all())
    assert float(latents.relative[found]) > 0.6
    assert fit.exclusive == {"before": 0, "after": 0}
    assert fit.explained["after"] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_direction_added_to_real_activations_is_found(seed: int):
    """R is S, with one direction more on a random fifth of the tokens: half as long as what varies, and more."""
    lens, suite = load_lens(REFERENCE / "checkpoints" / "sft"), load_suite(REFERENCE)
    s = collect([lens], texts([lens], suite, suite.prompts, seed), (1, "resid_pre")).parts[0][:, 0]
    generator = torch.Generator().manual_seed(seed)
    s = s[torch.randperm(len(s), generator=generator)]
    v = torch.nn.functional.normalize(torch.randn(s.shape[1], generator=generator), dim=0)
    varies = float((s - s.mean(0)).square().sum(1).mean() ** 0.5)
    on = torch.rand(len(s), generator=generator) < 0.2
    much = on * (0.5 + 0.5 * torch.rand(len(s), generator=generator)) * varies
    x = torch.stack([s, s + much[:, None] * v], 1)
    crosscoder = train_crosscoder(Memory(x[:-HELD_OUT]), Training(seed=seed))
    latents, fit = judge_latents(crosscoder, x[-HELD_OUT:], seed)
    found = latents.of("after")
    assert found
    assert max(cosine(crosscoder.decoder[i, 1], v) for i in found) >= 0.95
    assert cosine(crosscoder.decoder[found[0], 1], v) >= 0.95  # the one that fires most
    assert fit.exclusive["before"] == 0
    assert min(fit.explained.values()) > 0.9
    # it says on which tokens
    held, fires = on[-HELD_OUT:], crosscoder.encode(x[-HELD_OUT:])[:, found].sum(1) > 0
    assert float((held == fires).float().mean()) > 0.95


# --- the arithmetic ---------------------------------------------------------------------------------------------------


def test_encode_and_decode_are_the_formulas():
    crosscoder = random_crosscoder()
    x = torch.randn(50, 2, 4, generator=torch.Generator().manual_seed(1))
    pre = x[:, 0] @ crosscoder.encoder[0] + x[:, 1] @ crosscoder.encoder[1] + crosscoder.b_enc
    norms = crosscoder.decoder[:, 0].norm(dim=1) + 2 * crosscoder.decoder[:, 1].norm(dim=1)
    expected = torch.where(pre * norms > 1.5, pre, 0.0)
    f = crosscoder.encode(x)
    torch.testing.assert_close(f, expected)
    assert 0 < (f > 0).float().mean() < 1
    for side in range(2):
        made = f @ crosscoder.decoder[:, side] + crosscoder.bias[side]
        torch.testing.assert_close(crosscoder.decode(f)[:, side], made)
    torch.testing.assert_close(crosscoder.dictionary.decode(f), crosscoder.decode(f).flatten(1))


def test_gradients_are_those_of_autograd():
    generator = torch.Generator().manual_seed(0)
    x, k = torch.randn(32, 10, generator=generator), 3
    encoder, decoder = (torch.randn(7, 10, generator=generator).requires_grad_() for _ in range(2))
    b_enc, bias = torch.randn(7, generator=generator).requires_grad_(), torch.randn(10, generator=generator)
    bias.requires_grad_()
    f = (x @ encoder.T + b_enc).relu()
    mask = f >= smallest_kept(f, k)
    mask[:, 2] = False  # a latent that is never kept
    error = (f * mask) @ decoder + bias - x
    error.square().mean().backward()
    rows, latents = mask.nonzero(as_tuple=True)
    kept = KeptLatents(rows, latents, f[rows, latents].detach(), len(x))
    torch.testing.assert_close(kept.decode(decoder.detach()) + bias.detach() - x, error.detach())
    found = gradients(kept, x, error.detach(), decoder.detach())
    for name, weight in {"encoder": encoder, "b_enc": b_enc, "decoder": decoder, "bias": bias}.items():
        torch.testing.assert_close(found[name], weight.grad)


def test_the_smallest_that_is_kept():
    by = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
    assert smallest_kept(by, 4) == float(by.flatten().topk(4 * 64).values[-1])
    assert int((by >= smallest_kept(by, 4)).sum()) == 4 * 64
    assert smallest_kept(-by.abs(), 4) > 0
    assert smallest_kept(by.abs(), 50) == float(by.abs().min())


def test_transplant_takes_out_what_latents_write():
    crosscoder = random_crosscoder()
    s, r = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(1))
    f = crosscoder.encode(torch.stack([s, r], -2).flatten(0, 1)).unflatten(0, (5, 3))
    for side, (x, own) in {"after": (r, 1), "before": (s, 0)}.items():
        expected = x - f[..., [1, 4]] @ crosscoder.decoder[[1, 4], own]
        torch.testing.assert_close(transplant(crosscoder, s, r, [1, 4], side), expected)
        assert torch.equal(transplant(crosscoder, s, r, [], side), x)
    whole = transplant(crosscoder, s, r, torch.arange(6))
    torch.testing.assert_close(whole, r - crosscoder.decode(f.flatten(0, 1))[:, 1].view(5, 3, 4) + crosscoder.bias[1])


# --- refusing ---------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused():
    data = Memory(torch.randn(100, 2, 4, generator=torch.Generator().manual_seed(0)))
    for wrong in ({"k": 0}, {"k": 17}, {"steps": 0}, {"batch": 0}, {"width": 0}):
        with pytest.raises(InputError, match="none can be"):
            train_crosscoder(data, replace(TINY, **wrong))
    with pytest.raises(InputError, match="no activations"):
        train_crosscoder(Memory(torch.zeros(0, 2, 4)), TINY)
    with pytest.raises(InputError, match=r"not \[128, 3, 4\]"):
        train_crosscoder(Memory(torch.randn(100, 3, 4)), TINY)
    for constant in (torch.ones(100, 2, 4), torch.stack([data.x[:, 0], torch.ones(100, 4)], 1)):
        with pytest.raises(InputError, match="do not vary"):
            train_crosscoder(Memory(constant), TINY)
    crosscoder = random_crosscoder()
    for x in (torch.zeros(5, 2, 3), torch.zeros(1, 2, 4)):
        with pytest.raises(InputError, match="judged on rows"):
            judge_latents(crosscoder, x)
    with pytest.raises(InputError, match="do not vary"):
        judge_latents(crosscoder, torch.zeros(5, 2, 4))
    with pytest.raises(InputError, match="no latent 6"):
        transplant(crosscoder, data.x[:, 0], data.x[:, 1], [0, 6])
    with pytest.raises(InputError, match="4 dimensions"):
        transplant(crosscoder, data.x[:, 0], data.x[:5, 1], [0])
