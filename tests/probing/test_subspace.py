"""Interchange of everything is patching, a planted direction is found, and the same seed gives the same numbers."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from mixturelens.contrasts import Contrasts, cue_contrasts, hint_contrasts
from mixturelens.hooks.batches import sides
from mixturelens.hooks.engine import Engine
from mixturelens.hooks.lens import Lens, load_lens
from mixturelens.probing import subspace
from mixturelens.probing.subspace import Interchange, Pairs, carrying_site, find_subspace, learn, threshold
from mixturelens.suite import load_suite
from mixturelens.types import InputError, Site

PAIRS = Path(__file__).parents[1] / "pairs"
REFERENCE = Path(__file__).parents[2] / "artifacts" / "reference"
every_shape = pytest.mark.parametrize("shape", ["llama", "gpt2", "gpt_neox", "qwen2"])


@functools.cache
def setting(shape: str) -> tuple[Lens, Contrasts]:
    folder = PAIRS / shape
    lens = load_lens(folder / "S")
    return lens, cue_contrasts(load_suite(folder), lens.tokenizer, "a", ("A", "B"))


@functools.cache
def reference() -> tuple[Lens, Lens]:
    before, after = (load_lens(REFERENCE / "checkpoints" / name) for name in ("sft", "rl-A"))
    return before, after


@every_shape
@pytest.mark.parametrize("position", ["cue", "question", "policy"])
def test_all_dimensions_are_patching_and_none_is_nothing(shape: str, position: str):
    lens, contrasts = setting(shape)
    site = Site(layer=0, component="resid_post", position=position)
    model, both = Interchange(lens, contrasts, site), sides(lens, contrasts)
    n = len(both)
    rows = torch.arange(n)
    same = Pairs(rows + n, rows, torch.ones(n, dtype=torch.bool))  # clean into corrupt, question by question
    source, _ = lens.capture(both.clean, [(0, "resid_post")])
    expected = Engine(lens, both.corrupt, both.corrupt_spans).sweep([site], source, both.metric)[0]
    with torch.no_grad():
        found = model.swapped(same, torch.eye(lens.d_model))
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
        nothing = model.swapped(same, torch.zeros(1, lens.d_model))
    torch.testing.assert_close(nothing, model.own[n:], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(model.own[:n], both.metric(lens.run(both.clean)[:, -1]), atol=2e-5, rtol=1e-5)


@every_shape
def test_a_planted_direction_is_found(shape: str):
    """Activations that vary along one direction alone: it is the subspace, and carries what all of them carry."""
    lens, contrasts = setting(shape)
    model = Interchange(lens, contrasts, carrying_site(lens, contrasts))
    mean = model.values.mean(0)
    apart = model.values[model.clean].mean((0, 1)) - model.values[~model.clean].mean((0, 1))
    planted = apart / apart.norm()
    model.values = mean + ((model.values - mean) @ planted)[..., None] * planted
    pairs = subspace._pairs(model, seed=0, rounds=8)
    found = learn(model, pairs, 2, seed=0)
    torch.testing.assert_close(found @ found.T, torch.eye(2), atol=1e-5, rtol=0)
    assert (found @ planted).norm() > 0.8  # of a random subspace it is 0.25
    everything = model.right(pairs, torch.eye(lens.d_model)).mean()
    assert model.right(pairs, found).mean() >= everything - 0.02
    away = torch.linalg.qr(torch.cat([planted[None], torch.randn(3, lens.d_model)]).T)[0].T[1:]
    unchanged = model.right(pairs, torch.zeros(1, lens.d_model))
    np.testing.assert_allclose(model.right(pairs, away), unchanged, atol=1e-6)
    assert everything > unchanged.mean() + 0.2


def test_pairs_are_of_other_questions_and_ask_for_either_concept_equally_often():
    lens, contrasts = setting("llama")
    model = Interchange(lens, contrasts, Site(layer=0, component="resid_post", position="policy"))
    pairs, n = subspace._pairs(model, seed=1, rounds=3), model.questions
    assert len(pairs) == 12 * n
    assert bool((pairs.base % n != pairs.source % n).all())
    assert bool((pairs.asks == (pairs.source < n)).all())
    for base in (0, 1):
        for source in (0, 1):
            assert int(((pairs.base // n == base) & (pairs.source // n == source)).sum()) == 3 * n
    generator = torch.Generator().manual_seed(0)
    shuffled = subspace._shuffled(pairs, model, generator)
    asked = {}
    for row, asks in zip(shuffled.source.tolist(), shuffled.asks.tolist(), strict=True):
        assert asked.setdefault(row, asks) == asks  # one prompt asks for one thing
    assert shuffled.asks.tolist() != pairs.asks.tolist()


def test_the_cue_in_a_pair(monkeypatch):
    for name, number in {"STEPS": 30, "RANDOM": 6, "SHUFFLES": 2}.items():
        monkeypatch.setattr(subspace, name, number)
    lens, contrasts = setting("llama")
    after = load_lens(PAIRS / "llama" / "R-routing")
    found = find_subspace(lens, after, contrasts, "cue", seed=3)
    assert find_subspace(lens, after, contrasts, "cue", seed=3) == found
    assert found.questions == 10
    assert len(found.directions) == found.dimensions
    directions = torch.tensor(found.directions)
    torch.testing.assert_close(directions @ directions.T, torch.eye(found.dimensions), atol=1e-5, rtol=0)
    assert (len(found.random["before"]), len(found.shuffled["after"])) == (6, 2)
    assert found.accuracy["before"].value > 0.9
    assert found.margin["before"].low > 0.05
    best = max(*found.random["before"], *found.shuffled["before"])
    assert found.margin["before"].value == pytest.approx(found.accuracy["before"].value - best, abs=1e-5)


@pytest.mark.slow
def test_cue_and_selector_of_the_reference(monkeypatch):
    for name, number in {"STEPS": 40, "RANDOM": 6, "SHUFFLES": 2}.items():
        monkeypatch.setattr(subspace, name, number)
    before, after = reference()
    suite = load_suite(REFERENCE)
    cue = cue_contrasts(suite, before.tokenizer, "a", ("A", "B"), "refuse").first(80)
    hint = hint_contrasts(suite, before.tokenizer, "A", "a", "b").first(80)
    for concept, contrasts in (("cue", cue), ("selector", hint)):
        found = find_subspace(before, after, contrasts, concept)
        assert found.accuracy["before"].low > 0.9
        assert found.margin["before"].low > 0
        assert found.site.position not in (0, 1)  # tag and hint themselves are no finding
        assert found.plain["before"].value > 0.95


def test_where_the_sign_never_flips_the_midpoint_tells():
    lens, contrasts = setting("llama")
    model = Interchange(lens, contrasts, Site(layer=0, component="resid_post", position="policy"))
    n = model.questions
    for clean, corrupt, expected in ((3.0, -1.0, 0.0), (8.0, 2.0, 5.0), (-1.0, -3.0, -2.0), (5.0, 4.8, 0.0)):
        model.own = torch.tensor([clean] * n + [corrupt] * n)
        assert threshold(model) == pytest.approx(expected)
    model.own = torch.tensor([8.0] * n + [2.0] * n)
    assert model.plain(0.0).mean() == 0.5
    assert model.plain(5.0).mean() == 1.0


def test_what_carries_nothing_is_refused():
    lens, contrasts = setting("llama")
    with pytest.raises(InputError, match="at least four"):
        find_subspace(lens, lens, contrasts.first(3), "cue")
    same = Contrasts("cue", "A", "B", "a", tuple(
        type(row)(row.question, row.clean, row.clean, row.spans, row.target, row.foil) for row in contrasts.rows
    ))  # fmt: skip
    with pytest.raises(InputError, match=r"differ by 0\.00 nats"):
        find_subspace(lens, lens, same, "cue")
