"""Grafts: all of R is R, none of it is S; shares sum and mean what they say; the rollback is a plain checkpoint."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stored import behaviour_of

from mixturelens.behaviour.bits import js
from mixturelens.behaviour.harmed import gained_and_lost
from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.pair import behaviour_record
from mixturelens.behaviour.prompts import prepare
from mixturelens.grafting import pair as graft_pair
from mixturelens.grafting.components import weights_of
from mixturelens.grafting.effects import Judge
from mixturelens.grafting.graft import (
    GraftTrial,
    WorkingModel,
    fewest,
    groups,
    halves,
    null,
    players,
    save_with,
    shapley,
    two_by_two,
    written,
)
from mixturelens.grafting.pair import GraftSettings, graft_record, some_questions
from mixturelens.grafting.readings import Readings
from mixturelens.grafting.record import GraftRecord
from mixturelens.grafting.usual import make_cells
from mixturelens.hooks.lens import load_lens
from mixturelens.hooks.weights import lens_components
from mixturelens.models import Pair, end_tokens, load_model, load_tokenizer
from mixturelens.suite import load_suite
from mixturelens.types import NOT_MEASURED, InputError

REFERENCE = Path(__file__).parents[2] / "artifacts" / "reference"
SHAPES = [
    ("llama", "R-both"),
    ("gpt2", "R-routing"),
    ("gpt_neox", "R-skill"),
    ("qwen2", "R-conditioning"),
    ("chat", "R"),
]


def bench_of(pairs: Path, shape: str, after: str, prompts: int = 8) -> tuple[WorkingModel, Any, Any]:
    """On models of its own: a failing test must not leave a graft in a shared one."""
    folder = pairs / shape
    s, r = load_model(folder / "S"), load_model(folder / after)
    suite, tokenizer = load_suite(folder), load_tokenizer(folder / "S")
    scorer = Scorer(end_tokens(s, tokenizer), s.config.vocab_size)
    cells = make_cells(prepare(suite, suite.neutral[:prompts], tokenizer), s, scorer)
    return WorkingModel(s, weights_of(s), weights_of(r), lens_components(load_lens(folder / "S")), cells), s, r


def judge_of(bench: WorkingModel) -> Judge:
    cells = bench.cells
    return Judge(cells, cells.policies[:2], bench.readings(()), bench.readings(bench.names), cells.grid)


def logits(model: Any, bench: WorkingModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=bench.cells.ids, use_cache=False).logits


# --- copying ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "after"), SHAPES)
def test_all_of_r_is_r_and_none_of_it_is_s(pairs: Path, shape: str, after: str):
    bench, s, r = bench_of(pairs, shape, after)
    of_s, of_r = logits(s, bench), logits(r, bench)
    assert not torch.equal(of_s, of_r)
    with written(s, bench.weights_of(bench.names)):
        assert torch.equal(logits(s, bench), of_r)
    with written(s, bench.weights_of(())):
        assert torch.equal(logits(s, bench), of_s)
    with contextlib.suppress(ZeroDivisionError), written(s, bench.weights_of(bench.names[:3])):
        assert not torch.equal(logits(s, bench), of_s)
        raise ZeroDivisionError
    assert torch.equal(logits(s, bench), of_s)


def test_tied_embeddings_stay_tied(tmp_path: Path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(LlamaForCausalLM(config).eval())
    s, r = models
    after = weights_of(r)
    assert "lm_head.weight" not in after
    ids = torch.tensor([[3, 5, 7, 2]])
    with torch.no_grad():
        before, expected = s(input_ids=ids).logits, r(input_ids=ids).logits
        with written(s, after):
            assert torch.equal(s(input_ids=ids).logits, expected)
            assert s.lm_head.weight.data_ptr() == s.model.embed_tokens.weight.data_ptr()
        assert torch.equal(s(input_ids=ids).logits, before)
        with written(s, {"model.embed_tokens.weight": after["model.embed_tokens.weight"]}):
            assert torch.equal(s.lm_head.weight, r.lm_head.weight)


def test_no_set_is_run_twice(pairs: Path, monkeypatch):
    bench, s, _ = bench_of(pairs, "llama", "R-routing")
    calls = []
    handle = s.register_forward_hook(lambda *_: calls.append(1))
    one = bench.readings(["L0.attn", "L1.mlp"])
    number = len(calls)
    assert bench.readings(("L1.mlp", "L0.attn")) is one
    assert bench.log_c(["L0.attn", "L1.mlp"]) is not None
    assert len(calls) == number
    first = bench.log_c(["embed"])
    number = len(calls)
    assert bench.log_c(("embed",)) is first
    assert len(calls) == number
    handle.remove()
    np.testing.assert_allclose(first, bench.readings(["embed"]).log_c, atol=2e-5)
    assert bench.rest(["embed", "unembed"]) == tuple(n for n in bench.names if n not in ("embed", "unembed"))


# --- shares -----------------------------------------------------------------------------------------------------------


def test_shapley_is_the_mean_over_all_orders(pairs: Path):
    """Against joining one by one in every order, and the sum against the whole change."""
    bench, _, _ = bench_of(pairs, "llama", "R-both")
    judge = judge_of(bench)
    who = {
        "first": ("embed", "L0.attn"),
        "L0.mlp": ("L0.mlp",),
        "L1.attn": ("L1.attn",),
        "L1.mlp": ("L1.mlp", "unembed"),
    }

    def value(names: Any) -> np.ndarray:
        return judge.odds(bench.log_c(names))

    found = shapley(who, value)
    orders = list(itertools.permutations(who))
    for name in who:
        gains = []
        for order in orders:
            joined = [each for other in order[: order.index(name)] for each in who[other]]
            gains.append(value([*joined, *who[name]]) - value(joined))
        np.testing.assert_allclose(found[name], np.mean(gains, axis=0), atol=1e-10)
    everyone = [each for members in who.values() for each in members]
    np.testing.assert_allclose(sum(found.values()), value(everyone) - value([]), atol=1e-10)


def test_shares_of_s_and_r_and_halfway(pairs: Path):
    bench, _, _ = bench_of(pairs, "llama", "R-routing", 40)
    judge = judge_of(bench)
    s, r = judge.before, judge.after
    nothing, all_of_it = judge.effects(s), judge.effects(r)
    assert (nothing.routing.value, all_of_it.routing.value) == (0.0, 1.0)
    assert (nothing.weight.value, all_of_it.weight.value) == (0.0, 1.0)
    assert (nothing.chosen.value, nothing.done.value) == (0.0, 0.0)
    half = judge.effects(Readings((s.log_c + r.log_c) / 2, s.log_p))
    assert half.routing.value == pytest.approx(0.5)
    # by hand, prompt by prompt
    weights = [np.exp(x.log_c.numpy()) for x in (s, r)]
    other = [np.concatenate([w, 1 - w.sum(-1, keepdims=True)], -1) for w in weights]
    assert all_of_it.chosen.value == pytest.approx(float(js(*other).mean()), abs=1e-6)
    assert all_of_it.share.value == pytest.approx(1.0, abs=1e-3)
    assert nothing.share == NOT_MEASURED


def test_what_policies_do_is_weighed_as_both_use_them(pairs: Path):
    bench, _, _ = bench_of(pairs, "llama", "R-conditioning", 40)
    judge = judge_of(bench)
    assert judge.moved_cells.tolist() == [[False, False], [True, False]]  # a under B alone
    assert not judge.moved_cues.any()
    found = judge.effects(judge.after)
    assert not found.routing.measured
    assert found.specialists.value == 1.0
    p, q = (np.exp(x.log_p.numpy()) for x in (judge.before, judge.after))
    used = sum(np.exp(x.log_c.numpy()) for x in (judge.before, judge.after)) / 2
    distance = js(np.stack([p, 1 - p], -1), np.stack([q, 1 - q], -1))
    assert found.done.value == pytest.approx(float((used * distance).sum(-1).mean()), abs=1e-6)
    assert found.share.value == pytest.approx(0.0, abs=1e-3)
    # a graft that chooses otherwise weighs them no differently
    other = judge.effects(Readings(judge.after.log_c.flip(1), judge.after.log_p))
    assert other.done == found.done


def test_what_turns_one_way_on_half_of_the_questions_does_not_cancel(pairs: Path):
    """Weights go from even to 0.95 on half of the questions and to 0.05 on the others, and so does what policies do."""
    bench, _, _ = bench_of(pairs, "llama", "R-routing", 40)
    index = bench.cells.grid.index
    even = torch.full((40, 2), 0.5, dtype=torch.float64).log()
    turned = torch.empty_like(even)
    for question, row in enumerate(index):
        turned[row, 0], turned[row, 1] = (0.95, 0.05) if question % 2 else (0.05, 0.95)
    turned = turned.log()
    apart = float(js(np.array([0.5, 0.5, 0.0]), np.array([0.95, 0.05, 0.0])))
    s = Readings(even, even)
    for r, expected in ((Readings(turned, even), (apart, 0.0, 1.0)), (Readings(even, turned), (0.0, apart, 0.0))):
        found = Judge(bench.cells, ("a", "b"), s, r, bench.cells.grid).effects(r)
        assert not found.weight.measured  # the mean is where it was
        values = (found.chosen, found.done, found.share)
        assert [value.value for value in values] == pytest.approx(expected, abs=1e-9)
        assert found.moved.value == pytest.approx(apart)
        assert (found.moved.low or 0) == pytest.approx(apart)  # every question says the same


def test_a_share_is_no_wider_than_its_parts_move_together(pairs: Path):
    """Where half of the questions change in both ways, and half in none, their share is sure."""
    bench, _, _ = bench_of(pairs, "llama", "R-routing", 40)
    even = torch.full((40, 2), 0.5, dtype=torch.float64).log()
    turned = even.clone()
    some = bench.cells.grid.index[::2].ravel()
    turned[some] = torch.tensor([0.9, 0.1], dtype=torch.float64).log()
    s, r = Readings(even, even), Readings(turned, turned)
    found = Judge(bench.cells, ("a", "b"), s, r, bench.cells.grid).effects(r)
    assert (found.chosen.high or 0) - (found.chosen.low or 0) > 0.05
    assert found.share.value == pytest.approx(0.5)
    assert (found.share.high or 0) - (found.share.low or 0) < 1e-6


def test_noise_of_the_size_of_the_change_moves_s_less_than_the_change(pairs: Path):
    bench, _, _ = bench_of(pairs, "llama", "R-both", 40)
    judge = judge_of(bench)
    found, effects = null(GraftTrial(bench, judge), seed=1), judge.effects(judge.after)
    assert found == null(GraftTrial(bench, judge), seed=1) != null(GraftTrial(bench, judge), seed=2)
    assert 0 < (found.chosen or 0) < (effects.chosen.low or 0) / 2
    assert 0 < (found.done or 0) < (effects.done.low or 0) / 2


def test_fewest_stops_when_it_is_enough_and_drops_what_is_not_needed():
    worth = {"x": 0.5, "y": 0.45, "z": 0.4}
    assert fewest(list(worth), lambda some: sum(worth[n] for n in some)) == [("x", "y"), ("x", "z")]

    def twice(some: Any) -> float:  # the best alone is not needed by the two that suffice
        return 1.0 if {"y", "z"} <= set(some) else 0.6 * ("x" in some) + 0.1 * ("y" in some)

    assert fewest(list(worth), twice) == [("y", "z")]
    assert fewest(["x", "y"], lambda some: 0.1 * len(some)) == [("x", "y")]


def test_groups_and_players():
    names = ["embed", "pos_embed", *(f"L{i}.{p}" for i in range(2) for p in ("attn", "mlp", "norms")), "final_norm"]
    assert groups(names)["norms"] == ("L0.norms", "L1.norms", "final_norm")
    assert groups(names)["embeddings"] == ("embed", "pos_embed")
    assert "unembedding" not in groups(names)
    found = players([*names, "unembed"])
    assert sorted(each for members in found.values() for each in members) == sorted([*names, "unembed"])
    assert groups([]) == players([]) == {}


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _few_completions(monkeypatch):
    """Grafts take no more from a behaviour record than weights and accuracies: no need to list every completion."""
    monkeypatch.setattr("mixturelens.behaviour.measure.ENUMERATE_AT_MOST", 0)


def record_of(before: Path, after: Path, folder: Path, **options: Any) -> GraftRecord:
    suite = load_suite(folder)
    suite = suite.model_copy(update={"prompts": suite.prompts[:20]})
    pair = Pair(before, after, suite)
    return graft_record(pair, behaviour_record(pair), **options)


def test_random_weights_do_not_move_the_routing_of_the_reference():
    suite = load_suite(REFERENCE)
    sft, rl = (REFERENCE / "checkpoints" / name for name in ("sft", "rl-A"))
    s, r, tokenizer = load_model(sft), load_model(rl), load_tokenizer(sft)
    rows = some_questions(suite.neutral, 30)
    cells = make_cells(prepare(suite, rows, tokenizer), s, Scorer(end_tokens(s, tokenizer), s.config.vocab_size))
    before, after = weights_of(s), weights_of(r)
    changed = {
        name: members
        for name, members in lens_components(load_lens(sft)).items()
        if any(not torch.equal(before[each], after[each]) for each in members)
    }
    bench = WorkingModel(s, before, after, changed, cells)
    judge = judge_of(bench)
    found = two_by_two(*halves(bench, judge), 0)
    assert found.enough
    assert found.questions == 15
    assert (found.selector_only.weight.value or 0) > 0.8  # which the selector is chosen by
    assert found.both.routing.value == 1.0
    assert len(found.noise) >= 8
    assert all(abs(each.routing.value or 0) < 0.2 and abs(each.weight.value or 0) < 0.2 for each in found.noise)
    noisy = bench.noisy(found.selector, 0)
    assert torch.equal(noisy.log_c, bench.noisy(found.selector, 0).log_c)
    assert all(torch.equal(values, before[name]) for name, values in s.named_parameters())


def test_record_of_routing(pairs: Path, tmp_path: Path):
    folder = pairs / "gpt2"
    found = record_of(folder / "S", folder / "R-routing", folder, settings=GraftSettings(save_to=tmp_path / "rollback"))
    assert GraftRecord.load(found.save(tmp_path / "graft.json")) == found
    assert found.policies == ("a", "b")
    assert found.questions == 10
    assert [each.name for each in found.components] == [part.name for part in found.parts if part.change > 0]
    assert (found.after.routing.value, found.after.weight.value) == (1.0, 1.0)
    assert (found.after.chosen.low or 0) > (found.null.chosen or 1)
    assert found.factorial is not None
    assert found.rollback is not None
    assert (found.factorial.selector_only.weight.value or 0) > 0.8
    if found.rollback.enough:  # without these parts the choice is S's again
        accuracy = found.rollback.accuracy["B"]
        assert accuracy["rollback"].value == pytest.approx(accuracy["before"].value, abs=0.1)
    shares = sum(each.shapley.value or 0 for each in found.components)
    assert shares == pytest.approx(1.0, abs=1e-3)
    sums = {each.metric: each for each in found.path}
    assert sums["routing@A"].sum == pytest.approx(found.change["routing@A"].value, rel=0.01)
    attributed = sum(each.routing.value or 0 for each in found.components)
    assert attributed == pytest.approx((sums["routing@A"].change + sums["routing@B"].change) / 2, rel=0.01)
    # the rollback is a plain checkpoint: S's selector, R's rest
    assert found.rollback.checkpoint == "rollback"
    rolled, s, r = (weights_of(load_model(f)) for f in (tmp_path / "rollback", folder / "S", folder / "R-routing"))
    owner = {name: c for c, names in lens_components(load_lens(folder / "S")).items() for name in names}
    for name, values in rolled.items():
        assert torch.equal(values, (s if owner[name] in found.rollback.components else r)[name])
    load_tokenizer(tmp_path / "rollback")


def test_record_of_conditioning(pairs: Path, tmp_path: Path):
    folder = pairs / "llama"
    found = record_of(
        folder / "S", folder / "R-conditioning", folder, settings=GraftSettings(save_to=tmp_path / "rollback")
    )
    assert found.factorial is None
    assert found.rollback is None
    assert not (tmp_path / "rollback").exists()
    assert found.specialist_part is not None
    assert (found.specialist_part.effects.specialists.low or 0) > 0.8
    assert (found.after.done.low or 0) > (found.null.done or 1)
    assert any("does not surely change" in each for each in found.missing)


def test_s_given_twice_has_nothing_to_graft(pairs: Path):
    folder = pairs / "qwen2"
    found = record_of(folder / "S", folder / "S", folder)
    assert found.components == () == found.path == found.placed
    assert found.groups == {}
    assert found.factorial is None is found.rollback
    assert found.specialist_part is None
    assert not found.after.routing.measured
    assert (found.after.chosen.value, found.after.done.value) == (0.0, 0.0)
    assert (found.null.chosen, found.null.done) == (0.0, 0.0)  # of no size
    assert all(change.value == 0.0 for change in found.change.values())


def test_the_rollback_of_a_tied_model_is_tied(pairs: Path, tmp_path: Path):
    r = load_model(pairs / "chat" / "R")
    s = weights_of(load_model(pairs / "chat" / "S"))
    embedding = "model.embed_tokens.weight"
    save_with(r, {embedding: s[embedding]}, load_tokenizer(pairs / "chat" / "S"), tmp_path / "back")
    back = load_model(tmp_path / "back")
    assert torch.equal(back.get_parameter(embedding), s[embedding])
    assert torch.equal(back.lm_head.weight, s[embedding])
    assert not torch.equal(r.get_parameter(embedding), s[embedding])  # R itself is as it was


def test_bad_input_is_refused(pairs: Path):
    folder = pairs / "llama"
    suite = load_suite(folder)
    alone = behaviour_record(Pair(folder / "S", None, suite))
    with pytest.raises(InputError, match="can be said of a pair"):
        gained_and_lost(alone)
    with pytest.raises(InputError, match="two policies at least"):
        gained_and_lost(alone.model_copy(update={"policies": ("a",)}))
    assert gained_and_lost(behaviour_of("llama", "R-routing")) == ("a", "b")
    assert gained_and_lost(behaviour_of("llama", "S")) == ("a", "b")
    with pytest.raises(InputError, match="are not a pair"):
        Pair(folder / "S", pairs / "qwen2" / "S", suite)


def test_questions_are_drawn_with_all_their_cues(pairs: Path):
    rows = load_suite(pairs / "llama").neutral
    assert some_questions(rows) is rows
    few = some_questions(rows, 5)
    assert few == some_questions(rows, 5)
    assert len(few) == 10
    assert len({row.id for row in few}) == 5
    assert graft_pair.QUESTIONS >= 200
