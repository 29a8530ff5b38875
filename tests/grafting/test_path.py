"""Path attribution: hand-computed, against finite differences, and summing to the change on every stored pair."""

from __future__ import annotations

import copy
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from mixturelens.behaviour.prompts import prepare
from mixturelens.grafting import path
from mixturelens.grafting.cells import Cells
from mixturelens.grafting.components import State, weights_of
from mixturelens.grafting.graft import WorkingModel
from mixturelens.grafting.path import Attribution, attribute
from mixturelens.grafting.readings import metrics, read
from mixturelens.grafting.usual import make_cells
from mixturelens.types import InputError, RunError

PAIRS = [
    (shape, after)
    for shape, others in {
        "llama": ("R-routing-mild",),
        "qwen2": (),
        "gpt2": ("R-routing-other",),
        "gpt_neox": ("R-routing-dormant",),
    }.items()
    for after in ("R-both", "R-conditioning", "R-neither", "R-routing", "R-skill", *others)
] + [("chat", "R")]


def cells_of(pair: Any, prompts: int = 8) -> Any:
    return make_cells(prepare(pair.suite, pair.suite.neutral[:prompts], pair.tokenizer), pair.before, pair.scorer)


def divided(
    model: Any, before: State, after: State, parts: dict[str, tuple[str, ...]], cells: Cells, policies: Any
) -> Attribution:
    """The change among parts, on the way from one state to the other."""
    return attribute(WorkingModel(model, before, after, parts, cells), policies)


def by_module(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Parameters by the first number in their name, or by their first words: as good as any other parts."""
    parts: dict[str, tuple[str, ...]] = {}
    for name, _ in model.named_parameters():
        words = name.split(".")
        layer = next((i for i, word in enumerate(words) if word.isdigit()), None)
        key = words[-2] if layer is None else ".".join(words[layer : layer + 2])
        parts[key] = (*parts.get(key, ()), name)
    return parts


def values_of(model: Any, cells: Any, policies: tuple[str, str]) -> np.ndarray:
    with torch.no_grad():
        return metrics(read(model, cells), cells, policies)[0].numpy()


@pytest.mark.parametrize(("shape", "after"), PAIRS)
def test_the_parts_sum_to_the_change(load_pair: Any, shape: str, after: str) -> None:
    pair = load_pair(shape, after)
    cells = cells_of(pair, 4)
    policies = cells.policies[:2]
    found = divided(
        pair.before, weights_of(pair.before), weights_of(pair.after), by_module(pair.before), cells, policies
    )
    change = values_of(pair.after, cells, policies) - values_of(pair.before, cells, policies)
    np.testing.assert_allclose(found.change, change, atol=1e-5)
    assert found.values.shape == (*change.shape, len(by_module(pair.before)))
    mean = change.mean(0)
    assert (np.abs(found.values.sum(-1).mean(0) - mean) <= 0.01 * np.maximum(np.abs(mean), 0.05)).all()


class Product(nn.Module):
    """The odds of the first policy are exp(u v): two modules with one weight each, and quadratic in both."""

    def __init__(self, u: float, v: float, token: int, vocabulary: int) -> None:
        super().__init__()
        self.one, self.two, self.same = (nn.Linear(1, 1, bias=False) for _ in range(3))
        nn.init.constant_(self.one.weight, u)
        nn.init.constant_(self.two.weight, v)
        nn.init.constant_(self.same.weight, 1.0)
        self.register_buffer("target", nn.functional.one_hot(torch.tensor([token]), vocabulary).float())

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.same(self.two(self.one(torch.ones(*input_ids.shape, 1)))) @ self.target)


STEP = 5e-3
"""Of finite differences: some norms compute in single precision whatever the model is in."""
PRODUCT = {"one": ("one.weight",), "same": ("same.weight",), "two": ("two.weight",)}


@pytest.mark.slow
def test_rows_and_positions_in_one_axis(load_pair: Any) -> None:
    """OPT's MLP sees tokens without their rows: each must be pushed with the row it belongs to."""
    pair = load_pair("llama", "R-both")
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    config = OPTConfig(
        vocab_size=16, num_attention_heads=2, max_position_embeddings=16, dropout=0.0, pad_token_id=0, **sizes
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = OPTForCausalLM(config).eval()
        after = copy.deepcopy(before)
        with torch.no_grad():
            for parameter in after.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    cells = make_cells(prepare(pair.suite, pair.suite.neutral[:4], pair.tokenizer), before, pair.scorer)
    policies = cells.policies[:2]
    found = divided(before, weights_of(before), weights_of(after), by_module(before), cells, policies)
    change = values_of(after, cells, policies) - values_of(before, cells, policies)
    np.testing.assert_allclose(found.values.sum(-1), change, atol=5e-3 * np.abs(change).max())


def product(pair: Any, cells: Any, u: float, v: float) -> Product:
    return Product(u, v, cells.announcement(0)[0], pair.before.config.vocab_size)


def test_a_product_is_divided_as_computed_by_hand(load_pair: Any) -> None:
    pair = load_pair("llama", "R-routing")
    cells = cells_of(pair)
    before, after = (product(pair, cells, *at) for at in ((1.0, 2.0), (3.0, 5.0)))
    anything = product(pair, cells, -7.0, 0.0)  # the states say where the line begins and ends, not the model
    found = divided(anything, weights_of(before), weights_of(after), PRODUCT, cells, ("a", "b"))
    routing = [k for k, name in enumerate(found.names) if name.startswith("routing@")]
    np.testing.assert_allclose(found.change[:, routing], 13.0, rtol=1e-5)
    # u = 1 + 2t and v = 2 + 3t: the integrals of v du and of u dv
    np.testing.assert_allclose(found.values[:, routing, 0], 7.0, rtol=1e-5)
    np.testing.assert_allclose(found.values[:, routing, 2], 6.0, rtol=1e-5)
    assert (found.values[..., 1] == 0).all()
    assert found.parts == ("one", "same", "two")
    assert anything.one.weight.item() == -7.0
    assert not anything.one._forward_hooks


@pytest.mark.parametrize(
    ("shape", "after"), [("llama", "R-both"), ("gpt2", "R-both"), ("gpt_neox", "R-routing"), ("chat", "R")]
)
def test_every_share_is_that_of_finite_differences(load_pair: Any, shape: str, after: str) -> None:
    """The embedding of the chat pair is tied, so that its share has two places to come from."""
    pair = load_pair(shape, after)
    cells = cells_of(pair, 2)
    model = copy.deepcopy(pair.before).double()
    modules = list(by_module(model).values())
    parts = {str(k): tuple(name for names in modules[k::3] for name in names) for k in range(3)}
    before, after_state = ({n: w.double() for n, w in weights_of(m).items()} for m in (pair.before, pair.after))
    found = divided(model, before, after_state, parts, cells, cells.policies[:2])
    assert found.points == path.NODES
    delta = {name: after_state[name] - before[name] for name in before}
    nodes, weights = np.polynomial.legendre.leggauss(path.NODES)
    for k, names in enumerate(parts.values()):
        total = 0.0
        for node, weight in zip((1 + nodes) / 2, weights / 2, strict=True):
            ends = []
            for step in (STEP, -STEP):
                at = {n: before[n] + (node + (step if n in names else 0)) * delta[n] for n in before}
                ends.append(
                    values_of(
                        lambda at=at, **given: torch.func.functional_call(model, at, (), given),
                        cells,
                        cells.policies[:2],
                    )
                )
            total = total + weight * (ends[0] - ends[1]) / (2 * STEP)
        np.testing.assert_allclose(found.values[..., k], total, atol=2e-3, rtol=2e-3)


@pytest.mark.slow
def test_the_way_back_is_the_negative(load_pair: Any) -> None:
    pair = load_pair("qwen2", "R-conditioning")
    cells = cells_of(pair, 4)
    states = weights_of(pair.before), weights_of(pair.after)
    there, back = (
        divided(pair.before, *ends, by_module(pair.before), cells, ("a", "b")) for ends in (states, states[::-1])
    )
    assert there.points == back.points > path.NODES  # a bend, so that the line is cut
    np.testing.assert_allclose(there.change, -back.change, atol=1e-5)
    np.testing.assert_allclose(there.values, -back.values, atol=1e-2)


def test_a_line_that_takes_too_many_points_is_given_as_it_is(load_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = load_pair("qwen2", "R-conditioning")
    cells = cells_of(pair, 4)
    monkeypatch.setattr(path, "MOST", path.NODES)
    ends = weights_of(pair.before), weights_of(pair.after)
    found = divided(pair.before, *ends, by_module(pair.before), cells, ("a", "b"))
    assert found.points == path.NODES
    assert np.abs((found.values.sum(-1) - found.change).mean(0)).max() > path.CLOSE


def test_small_batches_give_the_same(load_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = load_pair("chat", "R")  # prompts of several lengths
    cells = cells_of(pair, 6)
    assert len(set(cells.lengths)) > 1
    line = path._WeightLine(
        pair.before, weights_of(pair.before), weights_of(pair.after), by_module(pair.before), cells, cells.policies[:2]
    )
    whole = line.slopes_at(0.3)
    assert len(line.chunks) == 1
    monkeypatch.setattr(path, "BATCH_TOKENS", 1)
    line = path._WeightLine(
        pair.before, weights_of(pair.before), weights_of(pair.after), by_module(pair.before), cells, cells.policies[:2]
    )
    np.testing.assert_allclose(line.slopes_at(0.3), whole, atol=1e-4)
    assert len(line.chunks) == 6


def test_nothing_changed_is_nothing_attributed(load_pair: Any) -> None:
    pair = load_pair("llama", "R-routing")
    cells = cells_of(pair, 3)  # the second question lacks the second cue
    state = weights_of(pair.before)
    found = divided(pair.before, state, state, by_module(pair.before), cells, ("a", "b"))
    assert found.points == 0
    assert not np.nan_to_num(found.values).any()
    assert np.isnan(found.change[1]).sum() == len(found.names) / 2


def test_a_question_without_a_cue_is_not_measured(load_pair: Any) -> None:
    pair = load_pair("llama", "R-routing")
    cells = cells_of(pair, 3)
    ends = weights_of(pair.before), weights_of(pair.after)
    found = divided(pair.before, *ends, by_module(pair.before), cells, ("a", "b"))
    lacks = np.array([name.endswith("@B") for name in found.names])
    assert (np.isnan(found.values[1]).all(-1) == lacks).all()
    assert not np.isnan(found.values[0]).any()


def test_parts_that_do_not_fit_are_refused(load_pair: Any) -> None:
    pair = load_pair("llama", "R-routing")
    cells = cells_of(pair, 2)
    model, ends = product(pair, cells, 1.0, 2.0), [weights_of(product(pair, cells, *at)) for at in ((1, 2), (3, 5))]
    with pytest.raises(InputError, match=r"'two\.weight' changed but is in no part"):
        divided(model, *ends, {"one": ("one.weight",)}, cells, ("a", "b"))
    with pytest.raises(InputError, match=r"'one\.weight' is named twice"):
        divided(model, *ends, PRODUCT | {"more": ("one.weight",)}, cells, ("a", "b"))
    with pytest.raises(InputError, match="no parameter 'three'"):
        divided(model, *ends, PRODUCT | {"more": ("three",)}, cells, ("a", "b"))


def test_a_module_that_is_never_called_is_an_error(load_pair: Any) -> None:
    pair = load_pair("llama", "R-routing")
    cells = cells_of(pair, 2)
    model = product(pair, cells, 1.0, 2.0)
    model.add_module("idle", nn.Linear(1, 1, bias=False))
    state = weights_of(model)
    moved = state | {"idle.weight": state["idle.weight"] + 1, "one.weight": state["one.weight"] + 1}
    with pytest.raises(RunError, match="'idle' was never called"):
        divided(model, state, moved, PRODUCT | {"idle": ("idle.weight",)}, cells, ("a", "b"))


def test_of_many_questions_some_are_drawn(load_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = load_pair("llama", "R-routing")
    cells = cells_of(pair, 12)
    ends = weights_of(pair.before), weights_of(pair.after)
    every = divided(pair.before, *ends, by_module(pair.before), cells, ("a", "b"))
    assert every.questions == cells.questions
    monkeypatch.setattr(path, "QUESTIONS", 3)
    some = divided(pair.before, *ends, by_module(pair.before), cells, ("a", "b"))
    rows = [every.questions.index(question) for question in some.questions]
    assert len(rows) == 3
    np.testing.assert_allclose(some.values, every.values[rows], atol=1e-4)
    assert some.questions == divided(pair.before, *ends, by_module(pair.before), cells, ("a", "b")).questions


def test_no_third_set_of_weights_is_held(load_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = load_pair("chat", "R")
    before, after = weights_of(pair.before), weights_of(pair.after)
    alive, peak, made = 0, 0, 0
    weight = path._WeightLine._weight

    def gone(size: int) -> None:
        nonlocal alive
        alive -= size

    def counted(self: Any, name: str, t: float) -> torch.Tensor:
        nonlocal alive, peak, made
        found = weight(self, name, t)
        if name in self.changed:
            size = found.numel()
            alive, made = alive + size, made + size
            peak = max(peak, alive)
            weakref.finalize(found.untyped_storage(), gone, size)
        return found

    monkeypatch.setattr(path._WeightLine, "_weight", counted)
    divided(pair.before, before, after, by_module(pair.before), cells_of(pair, 4), ("comply", "refuse"))
    most = max(values.numel() for values in before.values())
    assert made > 10 * sum(values.numel() for values in before.values())
    assert peak <= 3 * most
