"""The truth by exhaustive evaluation: against the instrument's own enumeration, which shares no code with it."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.measure import measure_change
from mixturelens.behaviour.prompts import prepare
from mixturelens.models import end_tokens
from mixturelens.organism import Spec, SplitSpec, build_model, build_suite, build_tokenizer, questions
from mixturelens.proving import truth
from mixturelens.proving.organisms import fit, rows_of, sizes, small_spec, target_of
from mixturelens.tasks import Sequence

SHORT = Sequence(operations=("copy",), symbols=6, length=1)


def short(announced: str, policies: int) -> Spec:
    spec = small_spec("llama", announced, policies)  # type: ignore[arg-type]
    split = SplitSpec(rl=1, evaluation=2)
    return spec.model_copy(update={"questions": SHORT, "split": split, "model": sizes("llama", width=16)})


@pytest.mark.parametrize(("announced", "policies"), [("token", 2), ("token", 3)])
def test_every_term_is_that_of_the_instruments_own_enumeration(announced: str, policies: int):
    spec = short(announced, policies)
    tokenizer = build_tokenizer(spec)
    before = build_model(spec, tokenizer).eval()
    after = copy.deepcopy(before)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    found = truth.prompt_truth(spec, before, after, tokenizer, questions(spec).evaluation)
    suite = build_suite(spec)
    prompts = prepare(suite, suite.neutral, tokenizer)
    scorer = Scorer(end_tokens(before, tokenizer), len(tokenizer))
    change = measure_change(scorer, before, after, prompts, enumerate_all=True)
    assert found.unresolved < 1e-3
    for name in ("routing", "wording", "conditioning", "skill", "novel", "other", "dormant"):
        assert found.terms[name].reshape(-1) == pytest.approx(getattr(change, name), abs=2e-4), name
    assert found.weights[1].reshape(-1, policies + 1) == pytest.approx(change.after.weights, abs=1e-4)
    parts = sum(found.terms[name] for name in ("routing", "wording", "conditioning", "skill", "other"))
    assert parts == pytest.approx(found.terms["total"], abs=1e-9)


def test_wordings_are_told_apart_as_the_instrument_tells_them():
    spec = short("phrase", 2)
    tokenizer = build_tokenizer(spec)
    before = build_model(spec, tokenizer)
    fit(before, rows_of(spec, target_of(spec), questions(spec).sft, tokenizer), steps=150, rate=1e-2)
    after = copy.deepcopy(before)
    other = replace(target_of(spec), weights={"a": 0.8, "b": 0.2})
    fit(after, rows_of(spec, other, questions(spec).sft, tokenizer), steps=40, rate=1e-2)
    found = truth.prompt_truth(spec, before, after, tokenizer, questions(spec).evaluation)
    suite = build_suite(spec)
    prompts = prepare(suite, suite.neutral, tokenizer)
    change = measure_change(Scorer(end_tokens(before, tokenizer), len(tokenizer)), before, after, prompts)
    assert change.method == "literal"
    assert found.terms["routing"].mean() > 0.05
    for name in ("routing", "wording", "conditioning"):
        assert found.terms[name].reshape(-1) == pytest.approx(getattr(change, name), abs=2e-3), name


def test_the_same_weights_differ_by_nothing():
    spec = short("token", 2)
    tokenizer = build_tokenizer(spec)
    model = build_model(spec, tokenizer).eval()
    found = truth.prompt_truth(spec, model, model, tokenizer, questions(spec).evaluation)
    assert all(np.abs(values).max() < 1e-12 for values in found.terms.values())
    said = truth.truth_of(found)
    assert [said.selector, said.cue_reader, said.skill] == [False, False, False]
    assert said.dormant_intact


@pytest.mark.parametrize(
    ("routing", "specialist", "coverage", "expected"),
    [
        (0.9, 0.1, 1.0, "routing"),
        (0.1, 0.9, 1.0, "specialist"),
        (0.5, 0.5, 1.0, "both"),
        (0.004, 0.004, 1.0, "neither"),
        (0.9, 0.1, 0.85, "inconclusive"),
    ],
)
def test_the_word_follows_from_the_definition(routing: float, specialist: float, coverage: float, expected: str):
    assert truth.word({"routing": routing, "conditioning": specialist, "skill": 0.0}, coverage) == expected
