"""Changes of features put into S move the term of the split that is known to have moved, and nothing else."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from mixturelens.behaviour.arrays import Behaviour
from mixturelens.behaviour.grid import Grid, grid_of
from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.literal import literal_behaviour
from mixturelens.behaviour.measure import measure_change
from mixturelens.behaviour.prompts import Prompts, behind_announcements, prepare
from mixturelens.features.change import (
    NEAREST,
    Splices,
    firing,
    half_prompts,
    matched,
    of_features,
    site_change,
    terms,
)
from mixturelens.features.dictionary import Dictionary
from mixturelens.features.record import Terms
from mixturelens.features.splice import At, BothModels, Crossing, Splice, Spliced, own, whole
from mixturelens.hooks.lens import Lens, load_lens, tokens
from mixturelens.models import end_tokens
from mixturelens.shown import Rule
from mixturelens.stats import half_of, interval
from mixturelens.suite import Suite, load_suite
from mixturelens.types import InputError, Side

ROOT = Path(__file__).parents[2]
PAIRS = ROOT / "tests" / "pairs"
REFERENCE = ROOT / "artifacts" / "reference"
SHAPES = ["llama", "gpt2", "gpt_neox", "qwen2"]
every_shape = pytest.mark.parametrize("shape", SHAPES)
LATE = (1, "resid_post")


def splice_terms(into: Lens, other: Lens, at: At, splices: Sequence[Splice], prompts: Prompts) -> list[Terms]:
    return Splices(Crossing(into, other, at), prompts).terms(splices)


@functools.cache
def lens_of(shape: str, name: str) -> Lens:
    return load_lens(PAIRS / shape / name)


@functools.cache
def suite_of(shape: str) -> Suite:
    return load_suite(PAIRS / shape)


@functools.cache
def reference(name: str) -> Lens:
    return load_lens(REFERENCE / "checkpoints" / name)


def prompts_of(shape: str, questions: int | None = None):
    return half_prompts(suite_of(shape), lens_of(shape, "S").tokenizer, 1, questions)


def rotation(size: int, seed: int = 0) -> Dictionary:
    """As many linear units as dimensions, orthonormal: together they say all."""
    q = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))[0]
    return Dictionary(q, torch.zeros(size), torch.full((size,), -torch.inf), q)


def values(found: Terms) -> np.ndarray:
    """Routing, conditioning, skill; NaN where not measured."""
    return np.array([found.routing.value, found.conditioning.value, found.skill.value], dtype=float)


def scorer_of(lens: Lens) -> Scorer:
    return Scorer(end_tokens(lens.model, lens.tokenizer), lens.model.config.vocab_size)


# --- terms ------------------------------------------------------------------------------------------------------------


def behaviour(weights, answers, right) -> Behaviour:
    """Prompts x policies: weights (with `other` last), P(answer given policy), P(right given policy)."""
    weights, answers, right = (np.array(each, dtype=float) for each in (weights, answers, right))
    shown = np.stack([1 - answers, answers], -1)[:, :, None]
    classes = np.zeros((*weights.shape, 1, 2))
    classes[:, :-1] = weights[:, :-1, None, None] * shown
    classes[:, -1, 0, -1] = weights[:, -1]
    rightly = np.stack([np.zeros_like(right), right], -1)[:, :, None]  # only answers are ever right
    return Behaviour(classes, np.zeros_like(classes), shown, rightly)


ONE = Grid(np.array([[0]]), np.ones((3, 1), dtype=int))


def apart(*sides: list[float]) -> float:
    """JS in bits of two distributions: entropy of the mean less mean of the entropies."""

    def entropy(p: np.ndarray) -> float:
        return float(-(p[p > 0] * np.log2(p[p > 0])).sum())

    p, q = (np.array(side) for side in sides)
    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def test_terms_by_hand():
    base = behaviour([[0.5, 0.5, 0.0]], [[0.8, 0.5]], [[0.8, 0.25]])
    changed = behaviour([[0.75, 0.25, 0.0]], [[0.4, 0.5]], [[0.1, 0.25]])
    found = terms(base, changed, ONE)
    assert found.routing.value == pytest.approx(apart([0.5, 0.5], [0.75, 0.25]))
    assert found.conditioning.value == pytest.approx(0.625 * apart([0.8, 0.2], [0.4, 0.6]))
    # policy a is right in a quarter of its answers where it always was; b's answers are as they were
    assert found.specialist.value == pytest.approx(0.625 * apart([0.8, 0.0, 0.2], [0.1, 0.3, 0.6]))
    assert found.skill.value == pytest.approx((found.specialist.value or 0) - (found.conditioning.value or 0))
    base = behaviour([[1.0, 0.0, 0.0]], [[1.0, 0.5]], [[0.5, 0.25]])
    changed = behaviour([[1.0, 0.0, 0.0]], [[1.0, 0.5]], [[0.9, 0.0]])
    silent = terms(base, changed, ONE)  # what a silent policy gets wrong is not heard
    assert silent.routing.value == silent.conditioning.value == 0.0
    assert silent.skill.value == pytest.approx(apart([0.5, 0.5], [0.9, 0.1]))


def test_what_turns_one_way_on_half_of_the_questions_does_not_cancel():
    base = behaviour([[0.5, 0.5, 0.0]] * 2, [[1.0, 1.0]] * 2, [[1.0, 1.0]] * 2)
    changed = behaviour([[0.95, 0.05, 0.0], [0.05, 0.95, 0.0]], [[1.0, 1.0]] * 2, [[1.0, 1.0]] * 2)
    found = terms(base, changed, Grid(np.array([[0], [1]]), np.ones((3, 2), dtype=int)))
    assert found.routing.value == pytest.approx(apart([0.5, 0.5], [0.95, 0.05]))


def test_a_policy_that_never_answers_has_no_skill_to_compare():
    base = behaviour([[1.0, 0.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]])
    changed = behaviour([[1.0, 0.0, 0.0]], [[1.0, 1.0]], [[1.0, 1.0]])
    found = terms(base, changed, ONE)
    assert (found.conditioning.value, found.skill.value) == (1.0, 0.0)


def test_means_are_over_prompts_then_over_the_cues_that_were_asked():
    base = behaviour([[0.5, 0.5, 0.0]] * 3, [[1.0, 1.0]] * 3, [[1.0, 1.0]] * 3)
    changed = behaviour([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]], [[1.0, 1.0]] * 3, [[1.0, 1.0]] * 3)
    counts = np.ones((3, 2), dtype=int)
    once = apart([0.5, 0.5], [1.0, 0.0])
    found = terms(base, changed, Grid(np.array([[0, 2], [1, -1]]), counts))
    assert found.routing.value == pytest.approx(once / 2)  # cue A: twice; cue B: not at all
    assert terms(base, changed, Grid(np.array([[0, -1], [1, -1]]), counts)).routing.value == pytest.approx(once)


def test_without_named_behaviours_conditioning_and_skill_cannot_be_told_apart():
    named = behaviour([[0.5, 0.5, 0.0]], [[1.0, 1.0]], [[1.0, 0.5]])
    other = behaviour([[0.5, 0.5, 0.0]], [[1.0, 1.0]], [[1.0, 0.0]])

    def unnamed(of: Behaviour) -> Behaviour:
        once = of.classes.sum(-1, keepdims=True)
        return Behaviour(once, np.zeros_like(once), of.forced_behaviour[..., -1:], of.forced_right[..., -1:])

    np.testing.assert_array_equal(values(terms(unnamed(named), unnamed(named), ONE)), [0.0, np.nan, np.nan])
    found = terms(unnamed(named), unnamed(other), ONE)
    np.testing.assert_array_equal(values(found), [0.0, np.nan, np.nan])
    assert found.specialist.value == pytest.approx(0.5 * apart([0.5, 0.5], [0.0, 1.0]))


@every_shape
def test_terms_agree_with_the_truth_over_all_completions(shape: str, load_pair):
    truth = json.loads((PAIRS / shape / "truth.json").read_text())
    for name in ("R-conditioning", "R-both"):
        pair = load_pair(shape, name)
        s, r = (literal_behaviour(pair.scorer, model, pair.prompts) for model in (pair.before, pair.after))
        grid = grid_of(pair.prompts, 0)
        found, known = terms(s, r, grid), truth[name]["bits"]
        for term in Terms.model_fields:
            assert getattr(found, term).value == pytest.approx(known[term], abs=1e-5)
        assert not values(terms(r, r, grid)).any()


def test_terms_are_those_of_behaviour(load_pair, monkeypatch):
    pair = load_pair("gpt2", "R-both")
    prompts = pair.prompts.part(range(8))
    monkeypatch.setattr("mixturelens.behaviour.measure.ENUMERATE_AT_MOST", 0)
    exact = measure_change(pair.scorer, pair.before, pair.after, prompts, 0)
    grid = grid_of(prompts, 0)
    found = terms(exact.before, exact.after, grid)
    for term in ("routing", "conditioning", "specialist"):
        assert getattr(found, term) == interval(grid.draws(getattr(exact.bits, term)).mean(-1), grid.counts)


# --- splices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", ["llama", "gpt_neox", *(pytest.param(s, marks=pytest.mark.slow) for s in ("gpt2", "qwen2"))]
)
def test_the_whole_site_moves_the_term_that_is_known_to_have_moved(shape: str):
    truth = json.loads((PAIRS / shape / "truth.json").read_text())
    for number, part in enumerate(("routing", "conditioning", "skill")):
        into, other = lens_of(shape, "S"), lens_of(shape, f"R-{part}")
        (found,) = splice_terms(into, other, LATE, [whole], prompts_of(shape))
        known = np.array([truth[f"R-{part}"]["bits"][name] for name in ("routing", "conditioning", "skill")])
        # what is left is the unembedding's, which R trained, too
        np.testing.assert_allclose(values(found), known, rtol=0.5, atol=0.005)
        assert values(found)[number] > 0.05


@every_shape
def test_all_of_an_orthonormal_dictionary_is_the_whole_site(shape: str):
    prompts, pair = prompts_of(shape, 4), (lens_of(shape, "S"), lens_of(shape, "R-routing"))
    every = rotation(pair[0].d_model)
    for component in ("resid_pre", "mlp_out"):
        found = splice_terms(*pair, (1, component), [whole, of_features(every), of_features(every, range(32))], prompts)
        for other in found[1:]:
            np.testing.assert_allclose(values(found[0]), values(other), atol=1e-5)
        assert values(found[0])[0] > 0.01


@every_shape
def test_s_into_s_is_exactly_nothing(shape: str):
    lens, again = lens_of(shape, "S"), load_lens(PAIRS / shape / "S")
    every = rotation(lens.d_model)
    found = splice_terms(
        lens, again, (1, "resid_pre"), [own, whole, of_features(every, [3]), of_features(every)], prompts_of(shape, 3)
    )
    assert not any(values(each).any() for each in found)


def test_rs_last_residual_stream_in_s_is_r():
    s, r = reference("sft"), reference("rl-A")
    for name in ("norm", "lm_head"):  # the recipe froze them
        one, two = (each.model.get_submodule({"norm": "model.norm", "lm_head": "lm_head"}[name]) for each in (s, r))
        assert all(torch.equal(x, y) for x, y in zip(one.parameters(), two.parameters(), strict=True))
    prompts = half_prompts(load_suite(REFERENCE), s.tokenizer, 1, 12)
    spliced = Spliced(BothModels(s, r, (2, "resid_post"), prompts.contexts), whole)
    found, expected = (literal_behaviour(scorer_of(s), model, prompts) for model in (spliced, r.model))
    np.testing.assert_allclose(found.classes, expected.classes, atol=1e-6)
    np.testing.assert_allclose(found.forced_correct, expected.forced_correct, atol=1e-6)
    row = [*prompts.contexts[0], *prompts.placed[0][0].ids]
    with torch.inference_mode():
        ids, behind = tokens([row]).ids, slice(len(prompts.contexts[0]) - 1, None)
        theirs = r.model(input_ids=ids).logits
        torch.testing.assert_close(spliced(ids).logits[:, behind], theirs[:, behind], atol=1e-5, rtol=0)
        torch.testing.assert_close(spliced(ids, logits_to_keep=1).logits, theirs[:, -1:], atol=1e-5, rtol=0)
        assert bool(spliced(ids).logits[:, : behind.start].isnan().all())
    assert not s.point(2, "resid_post").fwd_hooks


def test_one_feature_by_hand():
    s, r = lens_of("llama", "S"), lens_of("llama", "R-routing")
    ids = tokens(prompts_of("llama", 2).contexts).ids
    read, write = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    dictionary = Dictionary(read, torch.tensor([0.1, 2.0, 0.3]), torch.tensor([0.0, 0.4, -torch.inf]), write)
    at = (1, "resid_mid")
    x_s, x_r = (lens.capture(tokens(ids.tolist()), [at])[0][at] for lens in (s, r))
    f_s, f_r = (x @ read[1] - 2 for x in (x_s, x_r))
    step = torch.where(f_r > 0.4, f_r, 0) - torch.where(f_s > 0.4, f_s, 0)
    assert 0 < (step != 0).float().mean() < 1
    put = x_s + step[..., None] * write[1]

    def edit(x: torch.Tensor) -> None:
        x.copy_(put)

    with torch.inference_mode():
        expected = s.run(tokens(ids.tolist()), [(s.point(*at), edit)], last_only=False)
        found = Spliced(BothModels(s, r, at, ids.tolist()), of_features(dictionary, [1]))(ids).logits
    torch.testing.assert_close(found[:, -1], expected[:, -1], atol=1e-5, rtol=0)


@every_shape
@pytest.mark.parametrize("at", [(0, "resid_pre"), (1, "resid_pre"), (1, "attn_out"), (1, "resid_post")])
def test_only_what_lies_above_is_run_again_and_is_what_a_whole_forward_says(shape: str, at: At):
    """Prompts of two lengths with rests of several: the logits of a hook in a forward of each row alone."""
    s, r = lens_of(shape, "S"), lens_of(shape, "R-routing")
    prompts = [[5, 6, 7, 8, 9], [7, 8, 9], [5, 6, 7, 8, 10]]
    rows = [[*prompts[0], 4, 5, 6], [*prompts[1], 6, 4, 5, 8, 3], [*prompts[2], 3, 4, 4], [*prompts[0], 9, 9, 9]]
    ids = torch.tensor(rows)
    ground = BothModels(s, r, at, prompts)
    every = rotation(s.d_model)
    passes: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, layer=layer: passes.append(layer))
        for lens in (s, r)
        for layer, block in enumerate(lens.bridge.blocks)
    ]
    try:
        for turn, splice in enumerate((own, whole, of_features(every, range(9)))):
            passes.clear()
            found = Spliced(ground, splice)(ids).logits
            # prompts and windows, through each layer from the place on; once for each model below it
            assert turn == 0 or [layer for layer in passes if layer >= at[0]] == [0, 1][at[0] :] * 2
            for row, start, alone in zip(found, (4, 2, 4, 4), rows, strict=True):
                one = tokens([alone])
                x_s, x_r = (lens.capture(one, [at])[0][at] for lens in (s, r))
                put = splice(x_s.clone(), x_r)
                with torch.inference_mode():
                    expected = s.run(one, [(s.point(*at), lambda x, put=put: x.copy_(put))], last_only=False)[0]
                torch.testing.assert_close(row[start:], expected[start:], atol=2e-5, rtol=0)
    finally:
        for handle in handles:
            handle.remove()


def test_what_is_taken_from_r_is_judged_in_r():
    s, r = lens_of("llama", "S"), lens_of("llama", "R-conditioning")
    back, nothing = splice_terms(r, s, LATE, [lambda x_r, x_s: x_r - (x_r - x_s), own], prompts_of("llama"))
    assert not values(nothing).any()
    assert values(back)[1] > 0.2
    assert values(back)[0] < 0.005


# --- what RL changed of the features ----------------------------------------------------------------------------------


@every_shape
def test_how_features_fire_is_counted_by_hand(shape: str):
    s, r = lens_of(shape, "S"), lens_of(shape, "R-skill")
    prompts = prompts_of(shape, 3)
    at = (1, "resid_pre")
    read = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    dictionary = Dictionary(read, torch.zeros(4), torch.tensor([0.0, 0.5, 1e9, -torch.inf]), 2 * torch.eye(32)[:4])
    found = firing(Crossing(s, r, at), dictionary, prompts)
    f: dict[Side, torch.Tensor] = {}
    sides: tuple[tuple[Side, Lens], ...] = (("before", s), ("after", r))
    for side, lens in sides:
        rows = []
        for context, placed in zip(prompts.contexts, prompts.placed, strict=True):
            for number, each in enumerate(placed):
                text = [*context, *each.ids, *each.answer[0]]
                x = lens.capture(tokens([text]), [at])[0][at][0]
                rows.append(dictionary.encode(x)[len(context) if number else 0 :])
        f[side] = torch.cat(rows)
        torch.testing.assert_close(found.rate[side].float(), (f[side] != 0).float().mean(0))
        strength = f[side].sum(0) / (f[side] != 0).sum(0).clamp(min=1)
        torch.testing.assert_close(found.strength[side].float(), strength, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.moved.float(), 2 * (f["after"] - f["before"]).abs().mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        found.written.float(), (f["after"].abs() + f["before"].abs()).mean(0), atol=1e-4, rtol=1e-4
    )
    assert float(found.moved[2]) == float(found.rate["before"][2]) == float(found.strength["after"][2]) == 0.0


def test_random_sets_are_as_strong_and_none_of_the_chosen():
    written = np.concatenate([np.geomspace(0.01, 100, 60), np.zeros(5)])
    rng = np.random.default_rng(0)
    sets = matched(written, [10, 40], 50, rng)
    assert len(sets) == 50
    for drawn in sets:
        assert len(set(drawn)) == 2
        assert not {10, 40, *range(60, 65)} & set(drawn)
        assert all(any(abs(unit - top) <= NEAREST for unit in drawn) for top in (10, 40))
    assert len({tuple(sorted(drawn)) for drawn in sets}) > 10
    assert matched(written, [], 3, rng) == []
    assert matched(np.array([1.0, 1.0, 0.0]), [0, 1], 3, rng) == []


def test_the_feature_that_rl_changed_is_first_and_moves_its_term_alone(monkeypatch):
    """A basis in which the mean change of a pair whose cue reader changed is one of 32 directions."""
    monkeypatch.setattr("mixturelens.features.change.TOP", 4)
    monkeypatch.setattr("mixturelens.features.change.RANDOM", 4)
    s, r = lens_of("llama", "S"), lens_of("llama", "R-conditioning")
    suite = suite_of("llama")
    teach = half_prompts(suite, s.tokenizer, 0)
    contexts = tokens(behind_announcements(teach))
    x_s, x_r = (lens.capture(contexts, [LATE])[0][LATE][:, -1] for lens in (s, r))
    shift = (x_r - x_s).mean(0)
    basis = torch.linalg.qr(torch.cat([shift[None], torch.eye(32)]).T)[0].T
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    planted = int((order == 0).nonzero())
    dictionary = Dictionary(basis[order], torch.zeros(32), torch.full((32,), -torch.inf), basis[order])
    found = site_change(Crossing(s, r, LATE), dictionary, suite, seed=3)
    assert [each.moved for each in found.features] == sorted((each.moved for each in found.features), reverse=True)
    assert (len(found.features), len(found.random)) == (4, 4)
    assert found.features[0].index == planted
    assert found.questions == 10
    routing, conditioning, _ = values(found.features[0].terms)
    assert conditioning > 5 * max(routing, *(values(each)[1] for each in found.random[:2]))  # other features
    assert conditioning > max(values(each)[1] for each in found.random[2:])  # the same changes, written elsewhere
    np.testing.assert_allclose(values(found.every), values(found.whole), atol=1e-4)
    assert values(found.together)[1] > 0.5 * values(found.whole)[1]
    assert site_change(Crossing(s, r, LATE), dictionary, suite, seed=3) == found
    assert str(found.site) == "L1.resid_post"


def test_nothing_changed_means_no_features_and_no_bits():
    s = lens_of("llama", "S")
    found = site_change(Crossing(s, load_lens(PAIRS / "llama" / "S"), LATE), rotation(32), suite_of("llama"))
    assert found.features == found.random == ()
    assert not any(values(each).any() for each in (found.together, found.every, found.whole))


def test_one_half_chooses_the_other_judges():
    suite, tokenizer = suite_of("llama"), lens_of("llama", "S").tokenizer
    ids = list(dict.fromkeys(row.id for row in suite.neutral))
    for which in (0, 1):
        prompts = half_prompts(suite, tokenizer, which)
        assert {row.id for row in prompts.rows} == {ids[i] for i in half_of(len(ids), which)}
        assert len(prompts.rows) == 20  # under both cues
    assert len(half_prompts(suite, tokenizer, 1, 3).rows) == 6


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused():
    s, r, suite = lens_of("llama", "S"), lens_of("llama", "R-skill"), suite_of("llama")
    rules = suite.model_copy(update={"policies": {"a": "[a]", "b": Rule(regex=r"^\[b\]", force="[b]")}})
    with pytest.raises(InputError, match="this suite has rules"):
        splice_terms(s, r, LATE, [whole], prepare(rules, rules.neutral[:4], s.tokenizer))
    with pytest.raises(InputError, match="this suite has rules"):
        site_change(Crossing(s, r, LATE), rotation(32), rules)
    with pytest.raises(InputError, match="a vector for every head"):
        splice_terms(s, r, (0, "z"), [whole], prompts_of("llama", 1))
    with pytest.raises(InputError, match="no hook point"):
        splice_terms(s, r, (9, "resid_pre"), [whole], prompts_of("llama", 1))
    with pytest.raises(InputError, match="32 numbers a token, where features read 16"):
        site_change(Crossing(s, r, LATE), rotation(16), suite)
    with pytest.raises(InputError, match="at least two"):
        half_prompts(suite.model_copy(update={"prompts": suite.prompts[:2]}), s.tokenizer, 0)
    with pytest.raises(InputError, match="keeps no cache"):
        Spliced(BothModels(s, r, LATE, [[0, 0, 0]]), whole)(torch.zeros(1, 3, dtype=torch.long), use_cache=True)
