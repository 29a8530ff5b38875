"""Grafts at some positions: everywhere is R, nowhere is S, and what lies between equals a cache handed over."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mixturelens.behaviour.prompts import prepare
from mixturelens.grafting.positions import masks, placed, read_placed
from mixturelens.grafting.readings import read
from mixturelens.grafting.usual import make_cells
from mixturelens.types import InputError, RunError

SHAPES = [
    ("llama", "R-both"),
    ("qwen2", "R-conditioning"),
    ("gpt2", "R-conditioning"),
    ("gpt_neox", "R-both"),
    ("chat", "R"),  # tied embeddings, prompts of several lengths
]


def cells_of(pair: Any, prompts: int = 4) -> Any:
    return make_cells(prepare(pair.suite, pair.suite.neutral[:prompts], pair.tokenizer), pair.before, pair.scorer)


def test_positions_follow_the_sequence(load_pair: Any) -> None:
    cells = cells_of(load_pair("llama", "R-both"))
    found = masks(cells)
    assert list(found) == ["cue", "question", "last", "prompt", "policy", "answer"]  # no token is in no span but `last`
    at = {name: np.flatnonzero(mask[0]).tolist() for name, mask in found.items()}
    length = int(cells.lengths[0])
    assert at == {
        "cue": [0],
        "question": [1, 2, 3, 4],
        "last": [5],
        "prompt": [0, 1, 2, 3, 4, 5],
        "policy": [6],
        "answer": list(range(7, length)),
    }


def test_every_token_is_somewhere(load_pair: Any) -> None:
    cells = cells_of(load_pair("chat", "R"), 12)
    found = masks(cells)
    assert "rest" in found
    assert len(set(cells.lengths)) > 1
    real = np.arange(cells.ids.shape[1]) < cells.lengths[:, None]
    parts = [mask for name, mask in found.items() if name != "prompt"]
    assert (np.any(parts, axis=0) == real).all()
    assert (found["rest"] & (found["thing"] | found["last"])).sum() == 0
    assert (found["last"].sum(1) == 1).all()
    assert (found["prompt"] | found["policy"] | found["answer"] == real).all()


@pytest.mark.parametrize(("shape", "after"), SHAPES)
def test_everywhere_is_after_and_nowhere_is_before(load_pair: Any, shape: str, after: str) -> None:
    pair = load_pair(shape, after)
    cells = cells_of(pair)
    found = placed(pair.before, pair.after, cells)
    nowhere = read_placed(pair.before, pair.after, cells, np.zeros(cells.ids.shape, dtype=bool))
    with torch.no_grad():
        ends = read(pair.before, cells), read(pair.after, cells)
    for mixed, whole in ((nowhere, ends[0]), (found["prompt", "policy", "answer"], ends[1])):
        assert torch.equal(mixed.log_c, whole.log_c)
        assert torch.equal(mixed.log_p, whole.log_p)
    # what comes after a token cannot change what is read at it
    assert torch.equal(found["answer",].log_c, ends[0].log_c)
    if all(len(cells.announcement(row)) == 1 for row in range(len(cells))):
        assert torch.equal(found["prompt",].log_c, ends[1].log_c)
    assert not torch.equal(found["last",].log_c, ends[0].log_c)
    assert not any(module._forward_hooks for module in pair.before.modules())


@pytest.mark.parametrize(("shape", "after"), SHAPES)
def test_handing_over_the_cache_is_the_same(load_pair: Any, shape: str, after: str) -> None:
    """R's weights at the prompt alone are R on the prompt and S behind it, on the keys and values that R left."""
    pair = load_pair(shape, after)
    cells = cells_of(pair, 2)
    found = placed(pair.before, pair.after, cells)
    sides = {("prompt",): (pair.after, pair.before), ("policy", "answer"): (pair.before, pair.after)}
    for names, (first, second) in sides.items():
        for row in range(len(cells)):
            ids = cells.ids[row : row + 1, : int(cells.lengths[row])]
            cut, placed_at = int(cells.announced[row]), int(cells.placed[row])
            with torch.no_grad():
                start = first(input_ids=ids[:, :cut], use_cache=True)
                rest = second(input_ids=ids[:, cut:], past_key_values=start.past_key_values, use_cache=True)
            logprobs = torch.cat([start.logits, rest.logits], 1)[0, :-1].double().log_softmax(-1)
            steps = logprobs.gather(-1, ids[0, 1:, None])[:, 0]
            at = int(cells.prompt[row]), int(cells.policy[row])
            expected = float(steps[cut - 1 : placed_at - 1].sum()), float(steps[placed_at - 1 :].sum())
            assert float(found[names].log_c[at]) == pytest.approx(expected[0], abs=1e-4)
            assert float(found[names].log_p[at]) == pytest.approx(expected[1], abs=1e-4)


def test_other_rows_do_not_matter(load_pair: Any) -> None:
    pair = load_pair("chat", "R")
    cells = cells_of(pair, 6)
    together = placed(pair.before, pair.after, cells)
    for prompt in range(6):
        alone = placed(pair.before, pair.after, cells.part([prompt]))
        assert alone.keys() == together.keys()
        for names, readings in alone.items():
            torch.testing.assert_close(readings.log_c[0], together[names].log_c[prompt], atol=1e-4, rtol=0)
            torch.testing.assert_close(readings.log_p[0], together[names].log_p[prompt], atol=1e-4, rtol=0)


class Stand(nn.Module):
    """Logits out of one kind of module."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 4)
        self.mix = nn.Conv1d(4, 4, 1)
        self.out = nn.Linear(4, vocabulary)
        self.idle = nn.Linear(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 4))
        self.block.scale = nn.Parameter(torch.ones(4))

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        hidden = self.mix(self.embed(input_ids).transpose(1, 2)).transpose(1, 2)
        return SimpleNamespace(logits=self.out(self.block(hidden) * self.block.scale))


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("mix.weight", InputError, "'mix' does not work token by token"),
        ("block.scale", InputError, "'block.scale' belongs to no leaf module"),
        ("idle.bias", RunError, "'idle' was never called"),
    ],
)
def test_what_cannot_be_placed_is_refused(load_pair: Any, name: str, error: type[Exception], says: str) -> None:
    pair = load_pair("llama", "R-both")
    before = Stand(pair.before.config.vocab_size)
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.get_parameter(name).add_(1.0)
    with pytest.raises(error, match=says):
        placed(before, after, cells_of(pair))


def test_models_that_are_no_pair_are_refused(load_pair: Any) -> None:
    pair = load_pair("llama", "R-both")
    with pytest.raises(InputError, match="not a pair"):
        placed(pair.before, load_pair("gpt2", "R-both").after, cells_of(pair))
