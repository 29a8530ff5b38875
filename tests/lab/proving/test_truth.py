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
from mixturelens.lab.organism import Spec, SplitSpec, build_model, build_suite, build_tokenizer, prompt_row, questions
from mixturelens.lab.proving import exhaustive, truth
from mixturelens.lab.proving.asked import suite_of
from mixturelens.lab.proving.manner import STYLE, TEMPLATE, Manner
from mixturelens.lab.proving.organisms import Fitting, Lessons, fit, rows_of, sizes, small_spec, target_of
from mixturelens.lab.tasks import Sequence
from mixturelens.models import end_tokens
from mixturelens.routing.verdict import DEFAULT_THRESHOLDS

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
    return values.map(
        lambda a: (a + (a.sum(-1, keepdims=True) == 0)) / (a + (a.sum(-1, keepdims=True) == 0)).sum(-1, keepdims=True)
    )


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
    does = np.tile([0.0, 1.0], (2, 2, 1, 1, 1))
    does[1, 1] = [1.0, 0.0]  # policy b unlearns all

    def of(before: float, after: float) -> dict[str, float]:
        weights = np.array([[before, 1 - before, 0.0], [after, 1 - after, 0.0]])
        return truth.bits_of(weights, weights[:, :2, None], does)  # type: ignore[return-value]

    assert of(1.0, 1.0) == pytest.approx(
        {"routing": 0.0, "conditioning": 0.0, "skill": 0.0, "specialist": 0.0, "dormant": 0.5}
    )
    assert of(0.5, 1.0)["skill"] == pytest.approx(0.25)


def test_a_wording_that_a_policy_lacks_counts_for_nothing():
    does = np.tile([0.2, 0.8], (2, 2, 2, 1, 1))
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
        (0.002, 0.002, 1.0, "neither"),
        (0.9, 0.1, 0.85, "inconclusive"),
    ],
)
def test_the_word_follows_from_the_definition(routing: float, specialist: float, coverage: float, expected: str):
    assert truth.word({"routing": routing, "specialist": specialist}, coverage) == expected


# --- of models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("announced", "policies"), [("token", 2), ("token", 3)])
def test_every_term_is_that_of_the_instruments_own_enumeration(monkeypatch, announced: str, policies: int):
    spec = short(announced, policies)
    tokenizer = build_tokenizer(spec)
    before = build_model(spec, tokenizer).eval()
    after = copy.deepcopy(before)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    found = exhaustive.prompt_truth(spec, (before, after), tokenizer, questions(spec).evaluation)
    suite = build_suite(spec)
    prompts = prepare(suite, suite.neutral, tokenizer)
    scorer = Scorer(end_tokens(before, tokenizer), len(tokenizer))
    monkeypatch.setattr("mixturelens.behaviour.measure.ENUMERATE_AT_MOST", 10**9)
    change = measure_change(scorer, before, after, prompts)
    assert found.unresolved < 1e-3
    for name in ("routing", "wording", "conditioning", "skill", "text", "other"):
        assert found.terms[name].reshape(-1) == pytest.approx(getattr(change.nats, name), abs=2e-4), name
    for name in ("routing", "conditioning", "specialist", "dormant"):
        assert found.bits[name].reshape(-1) == pytest.approx(getattr(change.bits, name), abs=1e-5), name
    assert found.tokens.reshape(-1) == pytest.approx(change.nats.length, abs=1e-3)
    assert found.weights[1].reshape(-1, policies + 1) == pytest.approx(change.after.weights, abs=1e-4)
    parts = sum(found.terms[name] for name in ("routing", "wording", "conditioning", "skill", "text", "other"))
    assert parts == pytest.approx(found.terms["total"], abs=1e-9)


@pytest.mark.slow
def test_wordings_are_told_apart_as_the_instrument_tells_them():
    spec = short("phrase", 2)
    tokenizer = build_tokenizer(spec)
    before = build_model(spec, tokenizer)
    fit(before, rows_of(spec, target_of(spec), tokenizer, Lessons(questions(spec).sft)), Fitting(150, 1e-2))
    after = copy.deepcopy(before)
    other = replace(target_of(spec), weights={"a": 0.8, "b": 0.2})
    fit(after, rows_of(spec, other, tokenizer, Lessons(questions(spec).sft)), Fitting(40, 1e-2))
    found = exhaustive.prompt_truth(spec, (before, after), tokenizer, questions(spec).evaluation)
    suite = build_suite(spec)
    prompts = prepare(suite, suite.neutral, tokenizer)
    change = measure_change(Scorer(end_tokens(before, tokenizer), len(tokenizer)), before, after, prompts)
    assert change.method == "literal"
    assert found.terms["routing"].mean() > 0.05
    for name in ("routing", "wording", "conditioning", "skill"):
        assert found.terms[name].reshape(-1) == pytest.approx(getattr(change.nats, name), abs=2e-3), name
    for name in ("routing", "conditioning", "specialist", "dormant"):
        assert found.bits[name].reshape(-1) == pytest.approx(getattr(change.bits, name), abs=5e-4), name


def test_the_same_weights_differ_by_nothing():
    spec = short("token", 2)
    tokenizer = build_tokenizer(spec)
    model = build_model(spec, tokenizer).eval()
    found = exhaustive.prompt_truth(spec, (model, model), tokenizer, questions(spec).evaluation)
    assert all(np.abs(values).max() < 1e-12 for values in (*found.terms.values(), *found.bits.values()))
    said = truth.truth_of(found)
    assert [said.selector, said.cue_reader, said.skill, said.text_drifted] == [False] * 4
    assert said.dormant_intact


def test_the_words_of_the_definition_are_those_of_the_verdict():
    t = DEFAULT_THRESHOLDS
    assert (t.bits, (t.specialist, t.routing), t.cell) == (truth.LEAST, truth.SHARES, truth.CELL)
    assert t.coverage == truth.COVERED


@pytest.fixture(scope="module")
def tailed():
    """S with a tail behind a chat template, and R whose tail drifted; with what they are made of."""
    manner = Manner(chat=True, tail=6)
    spec = short("token", 2).model_copy(update={"model": sizes("llama", width=16, context=64)})
    tokenizer = build_tokenizer(spec, manner.words)
    tokenizer.chat_template = TEMPLATE
    before = build_model(spec, tokenizer)
    lessons = Lessons(questions(spec).sft, manner, 8)
    fit(before, rows_of(spec, target_of(spec), tokenizer, lessons), Fitting(200, 1e-2))
    after = copy.deepcopy(before)
    drifted = rows_of(spec, replace(target_of(spec), drift=0.06), tokenizer, lessons)
    fit(after, drifted, Fitting(60, 3e-3))
    return spec, manner, tokenizer, before, after


def of_tail(tailed, longest: int) -> truth.Truth:
    spec, manner, tokenizer, before, after = tailed
    return truth.truth_of(
        exhaustive.prompt_truth(
            spec, (before, after), tokenizer, questions(spec).sft, exhaustive.Asking(manner, True, longest)
        )
    )


def test_a_tail_moves_text_and_nothing_else(tailed):
    """The word, and all bits, are what they are without the tail, however long it is; text is by the token."""
    without, *found = (of_tail(tailed, longest) for longest in (2, 8, 32))
    assert without.verdict == "neither"
    assert not without.text_drifted
    for each in found:
        assert each.bits == pytest.approx(without.bits, abs=1e-12)
        assert (each.verdict, each.text_drifted) == ("neither", True)
    # of n tokens, two are before the tail
    assert found[-1].text == pytest.approx(0.06 * (1 - 2 / mean_tokens(6, 32)), rel=0.1)
    assert [each.text for each in found] == sorted(each.text for each in found)


def mean_tokens(tail: int, longest: int) -> float:
    """Of announcement, answer and a tail that ends with probability 1 / (tail + 1) at each token."""
    going_on = tail / (tail + 1)
    return 2 + sum(going_on**k for k in range(longest - 2))


def test_truth_of_a_tail_is_that_of_all_completions(tailed, monkeypatch):
    """Against the instrument's enumeration of everything, where that is not too much."""
    spec, manner, tokenizer, before, after = tailed
    rows = tuple(prompt_row(spec, cue, question) for question in questions(spec).sft for cue in spec.cues)
    prompts = prepare(suite_of(spec, manner, 3).model_copy(update={"prompts": rows}), rows, tokenizer)
    scorer = Scorer(end_tokens(before, tokenizer), len(tokenizer))
    monkeypatch.setattr("mixturelens.behaviour.measure.ENUMERATE_AT_MOST", 10**9)
    change = measure_change(scorer, before, after, prompts)
    found = exhaustive.prompt_truth(
        spec, (before, after), tokenizer, questions(spec).sft, exhaustive.Asking(manner, True, 3)
    )
    assert found.terms["text"].mean() == pytest.approx(change.nats.text.mean(), abs=2e-3)
    assert found.tokens.mean() == pytest.approx(change.nats.length.mean(), abs=0.02)
    for name in ("routing", "specialist"):  # a rule looks for the answer anywhere
        assert found.bits[name].reshape(-1) == pytest.approx(getattr(change.bits, name), abs=5e-4), name


def test_a_tail_is_a_distribution_that_drifts_by_what_is_asked():
    plain, drifted = (Manner(tail=12).style(drift) for drift in (0.0, 0.3))
    assert sum(drifted.values()) == pytest.approx(1.0)
    assert plain["<eos>"] == drifted["<eos>"] == pytest.approx(1 / 13)
    assert sum(p * np.log(p / plain[word]) for word, p in drifted.items()) == pytest.approx(0.3)
    assert set(plain) == {*STYLE, "<eos>"}
