"""A latent that R has alone and that chooses its policy is found causal, and one that does nothing is not."""

from __future__ import annotations

import pytest
import torch
from scenes import PAIRS
from torch.nn.functional import normalize

from mixturelens.features import exclusive
from mixturelens.features.activations import collect, texts
from mixturelens.features.change import Splices, half_prompts
from mixturelens.features.crosscoder import Crosscoder
from mixturelens.features.exclusive import FLOOR, causes, fit_crosscoder
from mixturelens.features.record import CrosscoderFit, Terms
from mixturelens.features.splice import Crossing, whole
from mixturelens.hooks.lens import Lens, load_lens
from mixturelens.models import load_model, load_tokenizer
from mixturelens.suite import load_suite
from mixturelens.types import NOT_MEASURED, Interval

AT = (1, "resid_post")
FOLDER = PAIRS / "llama"


def bits(routing: float | None = 0.0, conditioning: float | None = 0.0, skill: float | None = 0.0) -> Terms:
    """Known to a hundredth of a bit."""
    values = (routing, conditioning, skill)
    made = [NOT_MEASURED if v is None else Interval(value=v, low=max(0.0, v - 0.01), high=v + 0.01) for v in values]
    return Terms(routing=made[0], conditioning=made[1], skill=made[2], specialist=made[2])


# --- which term -------------------------------------------------------------------------------------------------------


def test_the_term_that_is_moved_most_is_the_cause():
    null = [bits(0.01, 0.01, 0.01)] * 12
    assert causes(bits(0.5, 0.1, 0.0), null) == "selector"
    assert causes(bits(0.1, 0.5, 0.0), null) == "cue_reader"
    assert causes(bits(0.0, 0.0, 0.2), null) == "skill"


def test_what_is_not_sure_or_not_more_than_chance_is_no_cause():
    assert causes(bits(), []) is None
    assert causes(bits(0.5), []) == "selector"
    assert causes(bits(FLOOR + 0.005), []) is None  # its interval reaches under the floor
    assert causes(bits(None, None, None), []) is None
    # as good as nothing beside what other latents do
    assert causes(bits(0.5), [bits(0.6)] * 12) is None
    # nearly all of the null, not all of it: one of 24 that does more is chance
    assert causes(bits(0.5), [*[bits(0.1)] * 23, bits(0.9)]) == "selector"
    assert causes(bits(0.5), [*[bits(0.1)] * 20, *[bits(0.9)] * 4]) is None


def test_each_term_has_its_own_null():
    """Much routing that any latent brings, and a little conditioning that none does: it is the conditioning."""
    assert causes(bits(0.5, 0.1), [bits(0.6, 0.0)] * 12) == "cue_reader"


# --- a planted latent -------------------------------------------------------------------------------------------------


def planted(chooses: bool, much: float = 4.0) -> tuple[Lens, Lens, Crosscoder]:
    """R is S in which one neuron of the last MLP writes something more: what the unembedding takes for policy a, or
    what it does not see at all.

    The crosscoder is made by hand and exact: latent 0 is what R alone has, the others are a basis of S that both share.
    """
    s, model, tokenizer = load_lens(FOLDER / "S"), load_model(FOLDER / "S"), load_tokenizer(FOLDER / "S")
    suite, word = load_suite(FOLDER), tokenizer.get_vocab()
    head = model.lm_head.weight.detach()
    seen = head * model.model.norm.weight.detach()
    v = normalize(seen[word["[a]"]] - seen[word["[b]"]] if chooses else torch.linalg.svd(seen)[2][-1], dim=0)
    contexts = texts([s], suite, suite.neutral[:20])
    fires = collect([s], contexts, (1, "neurons")).parts[0][:, 0]
    end = torch.tensor([token == word["="] for context in contexts for token in context])
    neuron = int((fires[end].amin(0) / fires.std(0)).argmax())
    scale = much / float(fires[end, neuron].mean())
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, neuron] += scale * v
    d = len(v)
    basis = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0)))[0]
    signed = torch.cat([basis, -basis])
    encoder, decoder = torch.zeros(2, d, 1 + 2 * d), torch.zeros(1 + 2 * d, 2, d)
    encoder[0, :, 0], encoder[1, :, 0], decoder[0, 1] = -v / scale, v / scale, scale * v
    encoder[0, :, 1:] = signed.T
    decoder[1:] = signed[:, None]
    latents = Crosscoder(encoder, torch.zeros(1 + 2 * d), decoder, torch.zeros(2, d), torch.ones(2), threshold=1e-5)
    return s, Lens(model, tokenizer), latents


def fitted(monkeypatch: pytest.MonkeyPatch, chooses: bool) -> CrosscoderFit:
    s, r, crosscoder = planted(chooses)
    suite = load_suite(FOLDER)
    monkeypatch.setattr(exclusive, "train_crosscoder", lambda *_, **__: crosscoder)
    monkeypatch.setattr(exclusive, "RANDOM", 6)
    activations = collect([s, r], texts([s, r], suite, suite.neutral), AT)
    return fit_crosscoder(
        activations, activations, Splices(Crossing(r, s, AT), half_prompts(suite, s.tokenizer, 1, 8), 3), seed=3
    )


def test_a_latent_that_only_r_has_and_that_chooses_the_policy_is_causal(monkeypatch: pytest.MonkeyPatch):
    found = fitted(monkeypatch, chooses=True)
    assert (found.exclusive, found.false) == ({"before": 0, "after": 1}, 0)
    assert found.shared + round(found.dead * 65) == 64
    assert min(found.explained.values()) > 0.99
    assert (found.tested, found.causal, found.causal_terms) == (1, 1, {"selector": 1})
    assert (str(found.site), found.seed) == ("L1.resid_post", 3)
    assert found.without is not None
    assert found.without.routing.low > 0.05
    assert max(each.routing.value for each in found.random) < 0.05
    # without it R is what S's activations there make of it
    s, r, _ = planted(chooses=True)
    suite = load_suite(FOLDER)
    (known,) = Splices(Crossing(r, s, AT), half_prompts(suite, s.tokenizer, 1, 8)).terms([whole])
    assert found.without.routing.value == pytest.approx(known.routing.value, rel=0.02)
    assert len(found.random) == exclusive.RANDOM // 3
    assert CrosscoderFit.model_validate_json(found.model_dump_json()) == found


def test_a_latent_that_only_r_has_and_that_does_nothing_is_not(monkeypatch: pytest.MonkeyPatch):
    found = fitted(monkeypatch, chooses=False)
    assert found.exclusive == {"before": 0, "after": 1}
    assert (found.tested, found.causal, found.causal_terms) == (1, 0, {})
    assert found.without is not None
    assert found.without.routing.high < FLOOR


def test_s_against_itself_has_nothing_to_take_out(monkeypatch: pytest.MonkeyPatch):
    s, _, crosscoder = planted(chooses=True)
    suite = load_suite(FOLDER)
    monkeypatch.setattr(exclusive, "train_crosscoder", lambda *_, **__: crosscoder)
    activations = collect([s, s], texts([s], suite, suite.neutral[:10]), AT)
    found = fit_crosscoder(
        activations, activations, Splices(Crossing(s, s, AT), half_prompts(suite, s.tokenizer, 1, 8))
    )
    assert found.exclusive == {"before": 0, "after": 0}
    assert (found.tested, found.causal, found.without, found.random) == (0, 0, None, ())
