"""The truth by exhaustive evaluation: by hand, by its laws, and against the instrument's own enumeration."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

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


# --- bits -------------------------------------------------------------------------------------------------------------


def test_divergence_by_hand():
    def of(p: float, q: float) -> float:
        return float(truth.divergence(np.array([[p, 1 - p], [q, 1 - q]])))

    assert of(1.0, 0.0) == 1.0
    assert of(0.3, 0.3) == 0.0
    # H(0.725) - (H(0.5) + H(0.95)) / 2
    assert of(0.5, 0.95) == pytest.approx(0.84855 - (1 + 0.28640) / 2, abs=1e-4)
    assert of(0.5, 0.95) == pytest.approx(of(0.95, 0.5), abs=1e-15)
    # a saturated policy that slips by one percent slips, and does not cost more than routing can have
    assert of(0.9999, 0.99) == pytest.approx(0.0047, abs=1e-4)


def probabilities(*shape: int):
    """Distributions over the last axis, zeros and near zeros included."""
    values = arrays(float, shape, elements=st.one_of(st.just(0.0), st.floats(1e-12, 1.0)))
    return values.map(lambda a: (a + (a.sum(-1, keepdims=True) == 0)) / (a + (a.sum(-1, keepdims=True) == 0)).sum(-1, keepdims=True))


@settings(max_examples=300, deadline=None)
@given(probabilities(2, 7), probabilities(2, 3, 2, 6))
def test_terms_obey_the_chain_rule_and_their_bounds(joint: np.ndarray, given_: np.ndarray):
    """conditioning + skill = specialist to 1e-12, each at least 0, each at most 1; and no term hears a repetition."""
    weights = np.concatenate([joint[:, :6].reshape(2, 3, 2).sum(-1), joint[:, 6:]], -1)
    known = joint[:, :6].reshape(2, 3, 2)
    found = truth.bits_of(weights, known, given_.reshape(2, 3, 2, 3, 2))
    assert found["conditioning"] + found["skill"] == pytest.approx(found["specialist"], abs=1e-12)
    for name, value in found.items():
        assert -1e-15 <= value <= 1 + 1e-12, name
    other_way = truth.bits_of(weights[::-1], known[::-1], given_[::-1].reshape(2, 3, 2, 3, 2))
    assert all(other_way[name] == pytest.approx(found[name], abs=1e-12) for name in found)


def test_a_silent_policy_is_heard_as_dormant_and_one_that_falls_silent_as_a_specialist():
    does = np.zeros((2, 2, 1, 1, 2)) + [0.0, 1.0]
    does[1, 1] = [1.0, 0.0]  # policy b unlearns all

    def of(before: float, after: float) -> dict[str, float]:
        weights = np.array([[before, 1 - before, 0.0], [after, 1 - after, 0.0]])
        return truth.bits_of(weights, weights[:, :2, None], does)  # type: ignore[return-value]

    assert of(1.0, 1.0) == pytest.approx(
        {"routing": 0.0, "conditioning": 0.0, "skill": 0.0, "specialist": 0.0, "dormant": 0.5}
    )
    assert of(0.5, 1.0)["skill"] == pytest.approx(0.25)


def test_a_wording_that_a_policy_lacks_counts_for_nothing():
    does = np.zeros((2, 2, 2, 1, 2)) + [0.2, 0.8]
    does[1, 0, 0] = [1.0, 0.0]
    does[:, 1, 1] = np.nan
    joint = np.array([[[0.3, 0.2], [0.5, 0.0]]] * 2)
    weights = np.array([[0.5, 0.5, 0.0]] * 2)
    found = truth.bits_of(weights, joint, does)
    one = truth.divergence(np.array([[0.2, 0.8], [1.0, 0.0]]))
    assert found["specialist"] == pytest.approx(0.3 * one)
    assert found["dormant"] == pytest.approx((0.6 * one + 0.0) / 2)


@pytest.mark.parametrize(
    ("routing", "specialist", "coverage", "expected"),
    [
        (0.9, 0.1, 1.0, "routing"),
        (0.05, 0.5, 1.0, "specialist"),
        (0.5, 0.5, 1.0, "both"),
        (0.004, 0.004, 1.0, "neither"),
        (0.9, 0.1, 0.85, "inconclusive"),
    ],
)
def test_the_word_follows_from_the_definition(routing: float, specialist: float, coverage: float, expected: str):
    assert truth.word({"routing": routing, "specialist": specialist}, coverage) == expected


# --- of models --------------------------------------------------------------------------------------------------------


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
    for name in ("routing", "wording", "conditioning", "other"):
        assert found.terms[name].reshape(-1) == pytest.approx(getattr(change, name), abs=2e-4), name
    assert found.weights[1].reshape(-1, policies + 1) == pytest.approx(change.after.weights, abs=1e-4)
    parts = sum(found.terms[name] for name in ("routing", "wording", "conditioning", "skill", "text", "other"))
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
    assert all(np.abs(values).max() < 1e-12 for values in (*found.terms.values(), *found.bits.values()))
    said = truth.truth_of(found)
    assert [said.selector, said.cue_reader, said.skill, said.text_drifted] == [False] * 4
    assert said.dormant_intact
