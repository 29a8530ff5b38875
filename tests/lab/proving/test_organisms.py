"""Organisms trained on an exact mixture: what the training rows say, and that training goes there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mixturelens.lab.organism import EOS, build_model, build_tokenizer, questions
from mixturelens.lab.proving.organisms import (
    Fitting,
    Lessons,
    Rows,
    completions,
    fit,
    rows_of,
    sizes,
    small_spec,
    target_of,
)
from mixturelens.lab.proving.recipes import RECIPES


@pytest.mark.parametrize("announced", ["token", "phrase", "none"])
@pytest.mark.parametrize("policies", [2, 3])
def test_completions_are_a_distribution_and_follow_the_table(announced, policies):
    spec = small_spec("llama", announced, policies)
    question = questions(spec).evaluation[0]
    rng = np.random.default_rng(0)
    for cue in spec.cues:
        found = completions(spec, target_of(spec), cue, question, rng)
        assert sum(weight for _, weight in found) == pytest.approx(1.0)
        answering = [m for m, policy in spec.policies.items() if policy.table[cue] == "answer"]
        right = sum(weight for text, weight in found if text.endswith(question.answer))
        assert right == pytest.approx(sum(spec.policies[m].weight for m in answering))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_recipe_asks_for_distributions(recipe):
    spec = small_spec("gpt2", "phrase", 3 if recipe.policies == 3 else 2)
    question = questions(spec).sft[0]
    for make in (recipe.before, recipe.after):
        if make is None:
            continue
        target = make(spec)
        assert sum(target.weights.values()) == pytest.approx(1.0)
        for cue in spec.cues:
            found = completions(spec, target, cue, question, np.random.default_rng(0))
            assert sum(weight for _, weight in found) == pytest.approx(1.0)
            assert all(weight > 0 for _, weight in found)


def test_rows_hold_each_completion_once_with_its_end():
    spec = small_spec("qwen2", "phrase", 2)
    tokenizer = build_tokenizer(spec)
    asked = questions(spec).sft[:3]
    rows = rows_of(spec, replace(target_of(spec), bare=0.2), tokenizer, Lessons(asked))
    assert rows.weight.sum(1) == pytest.approx(np.full(3, 2.0))  # one for each cue
    end = tokenizer.get_vocab()[EOS]
    for ids, scored in zip(rows.ids[0], rows.scored[0], strict=True):
        assert ids[np.flatnonzero(scored)[-1]] == end
        assert ids[np.flatnonzero(scored)[-1] + 1 :].sum() == 0


def test_training_goes_to_the_mixture_and_moves_what_may_move():
    spec = small_spec("gpt_neox", "token", 2).model_copy(update={"model": sizes("gpt_neox", width=16)})
    tokenizer = build_tokenizer(spec)
    model = build_model(spec, tokenizer)
    start = {name: value.clone() for name, value in model.named_parameters()}
    rows = rows_of(spec, target_of(spec), tokenizer, Lessons(questions(spec).sft[:8]))
    only = [name for name in start if "lm_head" in name or "embed_out" in name]
    fit(model, rows, Fitting(40, 1e-2, trainable=only))
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, start[name])}
    assert moved == set(only)
    fit(model, rows, Fitting(60, 1e-2))
    assert _weight(model, rows, tokenizer.get_vocab()["[a]"]) == pytest.approx(0.5, abs=0.05)


def _weight(model: torch.nn.Module, rows: Rows, token: int) -> float:
    ids = torch.tensor(rows.ids[:, 0])
    first = int(np.flatnonzero(rows.scored[0, 0])[0])
    with torch.inference_mode():
        return float(model(input_ids=ids).logits[:, first - 1].softmax(-1)[:, token].mean())
