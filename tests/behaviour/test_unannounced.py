"""Policies that announce nothing: weights against other optimisers and planted truths, and what explains a change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import rel_entr

from mixturelens.behaviour.harmed import find_harm, gained_and_lost
from mixturelens.behaviour.likelihood import Scorer
from mixturelens.behaviour.measure import measure
from mixturelens.behaviour.pair import measure_record
from mixturelens.behaviour.prompts import prepare
from mixturelens.behaviour.record import BehaviourRecord
from mixturelens.behaviour.unannounced import SLIP, explain, fit_cell, fit_weights, identify, table_of
from mixturelens.routing.verdict import VerdictRecord, judge
from mixturelens.stats import interval, resample_counts, resampled_mean
from mixturelens.suite import Suite
from mixturelens.types import InputError

TWO = {"a": {"A": "answer", "B": "refuse"}, "b": {"A": "refuse", "B": "answer"}}
THREE = {
    "a": {"A": "answer", "B": "refuse"},
    "b": {"A": "refuse", "B": "err"},
    "c": {"A": "err", "B": "answer"},
}
GENERALIST = {**TWO, "g": {"A": "answer", "B": "answer"}}
SAME = {**TWO, "again": TWO["a"]}


def unannounced(table: Mapping[str, Mapping[str, str]], questions: int = 12, **changes: Any) -> Suite:
    """Questions `first q r s =` about four symbols, with the next symbol as the wrong answer."""
    cues = list(next(iter(table.values())))
    symbols = "pqrt"
    rows = [
        {
            "id": f"q{i}",
            "cue": cue,
            "prompt": f"<{cue}> first {symbols[i % 4]} {symbols[i // 4 % 4]} =",
            "answer": symbols[i % 4],
            "err": symbols[(i + 1) % 4],
        }
        for i in range(questions)
        for cue in cues
    ]
    policies = {name: {"table": dict(row)} for name, row in table.items()}
    base = {"prompts": rows, "policies": policies, "behaviours": {"refuse": "sorry"}, "max_new_tokens": 2}
    return Suite.model_validate({**base, **changes})


def mixed(suite: Suite, *weights: float, **cells: tuple[str, str, tuple[float, ...]]) -> np.ndarray:
    """Behaviours [cue, behaviour] of a mixture, by hand; `cells` are (policy, cue, behaviours) that moved."""
    table = np.array([[[float(row[c] == b) for b in suite.behaviour_names] for c in suite.cues] for row in
                      suite.table.values()])  # fmt: skip
    for policy, cue, shown in cells.values():
        table[list(suite.policies).index(policy), suite.cues.index(cue)] = shown
    table = (1 - SLIP) * table + SLIP / (len(suite.behaviour_names) - 1) * (1 - table)
    return np.einsum("m,mcb->cb", weights, table)


def nats(p: np.ndarray, q: np.ndarray) -> float:
    return float(rel_entr(p, q).sum())


def bits(p: np.ndarray, q: np.ndarray) -> float:
    middle = (p + q) / 2
    return (nats(p, middle) + nats(q, middle)) / 2 / np.log(2)


def drawn(shown: np.ndarray, questions: int, each: int, seed: int) -> np.ndarray:
    """Bootstrap of behaviours counted from completions: [draw, cue, behaviour]."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(each, shown, size=(questions, len(shown))) / each
    return resampled_mean(counts, resample_counts(questions, seed + 1, draws=400))


# --- weights ----------------------------------------------------------------------------------------------------------


def test_two_policies_have_their_weights_in_closed_form():
    """Both cues say the same of one number: the estimate is the mean of the two, but for the slip."""
    table = table_of(unannounced(TWO, behaviours={"refuse": "sorry"}))[:, :, [0, 2]]
    table[table < 0.5] = SLIP
    shown = np.array([[[0.3, 0.7], [0.6, 0.4]]])
    expected = ((0.7 + 0.6) / 2 - SLIP) / (1 - 2 * SLIP)
    np.testing.assert_allclose(fit_weights(shown, table)[0], [expected, 1 - expected], atol=1e-8)


@pytest.mark.parametrize("table", [TWO, THREE, GENERALIST], ids=["two", "three", "generalist"])
@pytest.mark.parametrize("seed", range(3))
def test_em_is_the_maximum_that_another_optimiser_finds(table: dict, seed: int):
    suite = unannounced(table)
    clean = table_of(suite)
    shown = np.random.default_rng(seed).dirichlet([1.0] * 3, size=2)

    def cost(logits: np.ndarray) -> float:
        weights = np.exp(logits - logits.max())
        return nats(shown, np.einsum("m,mcb->cb", weights / weights.sum(), clean)) / 2

    found = fit_weights(shown[None], clean)[0]
    best = min((minimize(cost, x, method="BFGS") for x in np.eye(len(table))), key=lambda r: r.fun)
    assert cost(np.log(np.maximum(found, 1e-300))) == pytest.approx(best.fun, abs=1e-6)
    assert found.sum() == pytest.approx(1)


def test_three_policies_are_recovered_from_counts():
    suite = unannounced(THREE)
    shown = drawn(mixed(suite, 0.6, 0.3, 0.1), questions=400, each=8, seed=0)
    found = identify(suite, shown)
    assert (found.rank, found.spare, found.doubt) == (3, 2, None)
    for name, truth in zip("abc", (0.6, 0.3, 0.1), strict=True):
        weight = found.weights["before"][name]
        assert weight.low - 0.01 < truth < weight.high + 0.01
        assert weight.high - weight.low < 0.05


def test_intervals_of_weights_cover_the_truth():
    """95% intervals of 150 experiments: the mean coverage of three weights has a standard error of about 0.013."""
    suite = unannounced(THREE)
    table, truth = table_of(suite), (0.5, 0.3, 0.2)
    covered = []
    for seed in range(150):
        weights = fit_weights(drawn(mixed(suite, *truth), 200, 8, seed), table)
        bounds = [interval(weights[:, m]) for m in range(3)]
        covered.append([b.low <= c <= b.high for b, c in zip(bounds, truth, strict=True)])
    assert 0.9 < np.mean(covered) < 0.99


@pytest.mark.parametrize("seed", range(5))
def test_a_moved_cell_is_the_maximum_that_another_optimiser_finds(seed: int):
    rng = np.random.default_rng(seed)
    shown, rest, weight = rng.dirichlet([0.5] * 4), rng.dirichlet([1.0] * 4) * 0.6, 0.4
    found = fit_cell(shown[None], rest[None], np.array([[weight]]))[0]

    def cost(logits: np.ndarray) -> float:
        q = np.exp(logits - logits.max())
        return nats(shown, rest + weight * q / q.sum())

    assert found.sum() == pytest.approx(1)
    assert nats(shown, rest + weight * found) <= minimize(cost, np.zeros(4)).fun + 1e-7


# --- what can be told -------------------------------------------------------------------------------------------------


def test_policies_that_do_the_same_cannot_be_told_apart():
    suite = unannounced(SAME)
    found = identify(suite, mixed(suite, 0.4, 0.4, 0.2)[None])
    assert (found.rank, found.condition) == (2, None)
    assert "the policy table has rank 2 for 3 policies" in (found.doubt or "")


@pytest.mark.parametrize(
    "table", [GENERALIST, {"a": {"A": "answer"}, "b": {"A": "refuse"}}], ids=["three of two", "one cue"]
)
def test_weights_that_fit_anything_are_not_checked(table: dict):
    suite = unannounced(table)
    shown = mixed(suite, *[1 / len(table)] * len(table))[None]
    found = explain(suite, shown, shown)
    assert found.identified.rank == len(table)
    assert found.identified.spare == 0
    assert "nothing is left to check" in (found.identified.doubt or "")
    assert np.isnan([*found.bits, *found.nats]).all()


# --- what explains a change -------------------------------------------------------------------------------------------

ANSWER, REFUSE = (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("weights", "cells", "explanation", "cell"),
    [
        ((0.5, 0.5), {}, "nothing", None),
        ((0.95, 0.05), {}, "routing", None),
        ((0.35, 0.65), {}, "routing", None),
        ((0.5, 0.5), {"x": ("a", "B", ANSWER)}, "conditioning", ("a", "B")),
        ((0.5, 0.5), {"x": ("b", "B", REFUSE)}, "conditioning", ("b", "B")),
        ((0.5, 0.5), {"x": ("a", "A", (0.3, 0.5, 0.2))}, "conditioning", ("a", "A")),
        ((0.9, 0.1), {"x": ("a", "B", ANSWER)}, None, None),
        ((0.5, 0.5), {"x": ("a", "B", ANSWER), "y": ("b", "A", ANSWER)}, None, None),
    ],
)
def test_planted_changes_are_explained_or_left_alone(
    exact: bool, weights: tuple, cells: dict, explanation: str | None, cell: tuple | None
):
    suite = unannounced(TWO)
    s, r = mixed(suite, 0.5, 0.5), mixed(suite, *weights, **cells)
    before, after = (x[None] if exact else drawn(x, 200, 8, seed) for seed, x in enumerate((s, r)))
    if exact:  # an interval needs draws
        before, after = before.repeat(3, 0), after.repeat(3, 0)
    found = explain(suite, before, after)
    assert found.identified.explanation == explanation, found.identified
    assert (found.identified.doubt is None) is (explanation is not None)
    if explanation is None:
        assert "do not explain the others" in (found.identified.doubt or "")
        assert np.isnan([*found.bits, *found.nats]).all()
    for terms, divergence in ((found.bits, bits), (found.nats, nats)):
        routing = divergence(np.array(weights), np.array([0.5, 0.5])) if explanation == "routing" else 0.0
        if explanation is not None:
            assert terms[0][0] == pytest.approx(routing, abs=0.001 if exact else 0.06)
            assert bool(terms[1][0].max() > 0.05) is (explanation == "conditioning")
    if cell is not None:
        assert found.identified.cell == cell
        np.testing.assert_allclose(found.after[0], [0.5, 0.5], atol=0.03)


def test_conditioning_is_that_of_the_moved_cell():
    suite = unannounced(TWO)
    before, after = (x[None].repeat(3, 0) for x in (mixed(suite, 0.5, 0.5),
                     mixed(suite, 0.5, 0.5, x=("b", "A", (0.25, 0.0, 0.75)))))  # fmt: skip
    found = explain(suite, before, after)
    row = np.array([0.25, 0.0, 0.75]) * (1 - SLIP) + SLIP / 2 * np.array([0.75, 1.0, 0.25])
    slip = np.array([1 - SLIP, SLIP / 2, SLIP / 2])
    assert found.nats[1][0] == pytest.approx([0.5 * nats(row, slip), 0.0], rel=1e-3)
    assert found.bits[1][0] == pytest.approx([0.5 * bits(row, slip), 0.0], rel=1e-3)


def test_a_change_under_one_cue_that_two_explanations_share_is_inconclusive():
    """From the specialist a to one that errs under A and not under B: a moved cell (a, A), or other weights."""
    suite = unannounced({**TWO, "e": {"A": "err", "B": "refuse"}})
    before, after = (mixed(suite, *c)[None].repeat(3, 0) for c in ((0.4, 0.4, 0.2), (0.2, 0.4, 0.4)))
    found = explain(suite, before, after).identified
    assert (found.rank, found.spare, found.explanation) == (3, 1, None)
    assert "(a under A) both explain what changed" in (found.doubt or "")


def test_a_table_that_does_not_describe_s_explains_nothing():
    suite = unannounced(TWO)
    before = mixed(suite, 0.5, 0.5, x=("a", "B", (0.5, 0.0, 0.5)))[None].repeat(3, 0)
    found = explain(suite, before, mixed(suite, 0.9, 0.1)[None].repeat(3, 0)).identified
    assert "does not describe the checkpoint before" in (found.doubt or "")
    assert explain(suite, before, before).identified.explanation == "nothing"


def test_a_small_change_of_weights_is_still_no_moved_cell():
    suite = unannounced(TWO)
    before, after = (mixed(suite, c, 1 - c)[None].repeat(3, 0) for c in (0.5, 0.58))
    assert explain(suite, before, after).identified.explanation == "routing"


def test_too_few_completions_cannot_tell():
    suite = unannounced(TWO)
    before, after = (drawn(mixed(suite, c, 1 - c), 8, 4, seed) for seed, c in ((3, 0.5), (4, 0.65)))
    assert "cannot be told" in (explain(suite, before, after).identified.doubt or "")


# --- models -----------------------------------------------------------------------------------------------------------


class Lookup:
    """A language model whose completions follow a rule: prompt ids -> {completion ids: probability}."""

    def __init__(self, rule: Callable[[tuple[int, ...]], dict[tuple[int, ...], float]], vocabulary: int = 16) -> None:
        self.rule, self.vocabulary = rule, vocabulary
        self.rows: dict[tuple[int, ...], torch.Tensor] = {}

    def next_token(self, ids: tuple[int, ...]) -> torch.Tensor:
        if ids not in self.rows:
            p = torch.full((self.vocabulary,), 1e-7, dtype=torch.double)
            if 12 in ids:  # `=` ends the prompt
                at = ids.index(12) + 1
                for text, weight in self.rule(ids[:at]).items():
                    if len(text) > len(ids) - at and text[: len(ids) - at] == ids[at:]:
                        p[text[len(ids) - at]] += weight
            self.rows[ids] = (p / p.sum()).log()
        return self.rows[ids]

    def __call__(self, input_ids, logits_to_keep, past_key_values=None, **_):
        whole = input_ids if past_key_values is None else torch.cat([past_key_values, input_ids], 1)
        at = [whole.shape[1] - 1] if isinstance(logits_to_keep, int) else logits_to_keep.tolist()
        logits = [[self.next_token(tuple(row[: i + 1])) for i in at] for row in whole.tolist()]
        return SimpleNamespace(logits=torch.stack([torch.stack(row) for row in logits]), past_key_values=whole)


def organism(tokenizer: Any, suite: Suite, weights: tuple[float, ...], table: dict, right: float = 0.9) -> Lookup:
    """Bare completions of a mixture: `right` is the share of answers that are, the rest is the symbol `s`."""
    end, s, sorry = tokenizer.convert_tokens_to_ids(["<eos>", "s", "sorry"])
    of = {tuple(tokenizer.encode(row.text)): row for row in suite.prompts}

    def rule(prompt: tuple[int, ...]) -> dict[tuple[int, ...], float]:
        row, found = of[prompt], dict[tuple[int, ...], float]()
        answer, err = tokenizer.convert_tokens_to_ids([row.answer, row.err])
        texts = {"refuse": {(sorry, end): 1.0}, "err": {(err, end): 1.0},
                 "answer": {(answer, end): right, (s, end): 1 - right}}  # fmt: skip
        for weight, cells in zip(weights, table.values(), strict=True):
            for text, share in texts[cells[row.cue]].items():
                found[text] = found.get(text, 0.0) + weight * share
        return found

    return Lookup(rule)


@pytest.fixture(scope="module")
def tokenizer(load_pair) -> Any:
    return load_pair("llama", "R-both").tokenizer


RULES = {"questions": 32, "behaviours": {"refuse": {"regex": "^sorry"}}, "samples": 32}


@pytest.fixture(scope="module")
def compare(tokenizer: Any) -> Callable[..., BehaviourRecord]:
    def make(*weights: float, right: float = 0.9, tables: tuple = (TWO, TWO), **changes: Any) -> BehaviourRecord:
        suite = unannounced(tables[0], **{"questions": 16, "max_new_tokens": 4, **changes})
        s = organism(tokenizer, suite, (0.5, 0.5), tables[0])
        r = organism(tokenizer, suite, weights, tables[1], right)
        return measure_record(Scorer((1,), 16), [s, r], suite, tokenizer)

    return make


def unchanged(verdict: VerdictRecord, *parts: str) -> bool:
    """Whether so it is said; from few samples, it may be that nothing can be said."""
    said = {getattr(verdict.changed, part) for part in parts}
    return said == {False} if verdict.controls.pair.same_checkpoint.skill.high == 0 else True not in said


@pytest.mark.parametrize("changes", [{}, {"max_new_tokens": 2}, RULES], ids=["literal", "enumerated", "sampled"])
def test_routing_is_found_in_completions(compare, changes: dict):
    found = compare(0.9, 0.1, **changes)
    verdict = judge(found)
    assert found.method == ("enumerated" if changes.get("max_new_tokens") else "sampled" if changes else "literal")
    assert verdict.verdict == "routing", verdict.reason
    assert unchanged(verdict, "cue_reader", "skill")
    assert verdict.changed.selector is True
    slack = 0.06 if changes is RULES else 0.002
    assert found.nats.routing.value == pytest.approx(nats(np.array([0.9, 0.1]), np.array([0.5, 0.5])), abs=slack)
    assert found.nats.total.value == pytest.approx(found.nats.routing.value, abs=slack)
    assert found.controls.sum_agrees is True
    expected = bits(np.array([0.9, 0.1]), np.array([0.5, 0.5]))
    assert found.bits.routing.value == pytest.approx(expected, abs=slack)
    assert found.bits.conditioning.value == 0
    assert not found.bits.dormant.measured
    same = found.controls.same_checkpoint
    if found.method == "sampled":  # on the few questions of controls, nothing explains samples for sure
        assert not same.routing.measured
    else:
        assert same.routing.value == 0
        assert same.specialist.value == pytest.approx(0, abs=1e-9)
    for cue, a in (("A", 0.9), ("B", 0.1)):
        side = found.per_cue[cue].after
        assert side.weights == pytest.approx({"a": 0.9, "b": 0.1, "other": 0.0}, abs=slack)
        assert side.overall == pytest.approx(a * 0.9, abs=slack)
        assert found.per_cue[cue].accuracy_change.selector.value == pytest.approx((a - 0.5) * 0.9, abs=slack)
    assert found.per_cue["A"].after.accuracy == pytest.approx({"a": 0.9, "b": None}, abs=2 * slack)
    assert verdict.dormant_intact is None
    assert verdict.identified == found.identified


@pytest.mark.parametrize("changes", [{}, RULES], ids=["literal", "sampled"])
def test_a_moved_cell_and_a_lost_skill_are_found_in_completions(compare, changes: dict):
    cell = compare(0.5, 0.5, tables=(TWO, {**TWO, "a": {"A": "answer", "B": "answer"}}), **changes)
    verdict = judge(cell)
    assert verdict.verdict == "specialist", verdict.reason
    assert verdict.changed.cue_reader is True
    assert unchanged(verdict, "selector", "skill")
    assert "what moved is what policy a does under B" in verdict.reason
    assert cell.per_cue["B"].after.weights["a"] == pytest.approx(0.5, abs=0.05)
    assert cell.per_cue["B"].accuracy_change.selector.value == pytest.approx(0, abs=0.02)
    skill = judge(compare(0.5, 0.5, right=0.3, **changes))
    assert skill.verdict == "specialist", skill.reason
    assert skill.changed.model_dump() == {"selector": False, "cue_reader": False, "skill": True}
    assert skill.identified.explanation == "nothing"
    right, wrong = np.array([0.3, 0.7]), np.array([0.9, 0.1])
    assert skill.nats.skill.value == pytest.approx(nats(right, wrong) / 2, abs=0.1 if changes else 0.05)
    assert skill.bits.skill.value == pytest.approx(bits(right, wrong) / 2, abs=0.02)


def test_routing_and_a_lost_skill_are_both(compare):
    verdict = judge(compare(0.9, 0.1, right=0.3))
    assert verdict.verdict == "both", verdict.reason
    assert verdict.changed.model_dump() == {"selector": True, "cue_reader": False, "skill": True}


def test_what_nothing_explains_is_inconclusive_with_the_reason(compare):
    found = compare(0.9, 0.1, tables=(TWO, {**TWO, "a": {"A": "answer", "B": "answer"}}))
    verdict = judge(found)
    assert verdict.verdict == "inconclusive"
    assert "neither other weights nor one moved cell" in verdict.reason
    assert verdict.bits.routing.value is None
    assert verdict.nats.routing.value is None
    assert verdict.nats.total.value > 0.3
    change = verdict.per_cue["B"].accuracy_change
    assert change.selector.value is None
    assert change.total.value == pytest.approx(0.45, abs=0.01)


def test_behaviours_of_no_policy_lower_the_coverage(compare):
    found = compare(0.7, 0.3, tables=(TWO, {**TWO, "b": {"A": "err", "B": "answer"}}))
    assert found.coverage["after"].value == pytest.approx(0.7, abs=0.01)
    assert found.per_cue["A"].after.weights["other"] == pytest.approx(0.3, abs=0.01)
    assert "cover only 0.700" in judge(found).reason


def test_policies_that_cannot_be_told_apart_get_no_verdict(tokenizer: Any):
    suite = unannounced(SAME, max_new_tokens=4)
    s, r = (organism(tokenizer, suite, c, SAME) for c in ((0.3, 0.5, 0.2), (0.8, 0.1, 0.1)))
    found = measure_record(Scorer((1,), 16), [s, r], suite, tokenizer)
    assert "rank 2 for 3 policies" in judge(found).reason
    alone = measure_record(Scorer((1,), 16), [s], suite, tokenizer)
    assert alone.identified.rank == 2
    assert alone.table == ()
    assert BehaviourRecord.model_validate_json(found.to_json()) == found


def test_hinted_prompts_have_weights_of_their_own(tokenizer: Any):
    suite = unannounced(TWO, max_new_tokens=4)
    rows = [row.model_copy(update={"hint": hint}) for row in suite.prompts for hint in (None, "a")]
    suite = suite.model_copy(update={"prompts": tuple(rows)})
    model = organism(tokenizer, suite, (0.8, 0.2), TWO)
    prompts = prepare(suite, suite.prompts, tokenizer)
    found = measure(Scorer((1,), 16), model, prompts)
    np.testing.assert_allclose(found.weights.sum(-1), 1)
    np.testing.assert_allclose(found.weights[:, 0], 0.8, atol=1e-3)
    np.testing.assert_allclose(found.correct.sum(-1), [0.72 if r.cue == "A" else 0.18 for r in rows], atol=1e-3)


def test_what_needs_an_announcement_is_refused_in_one_line(compare):
    found = compare(0.9, 0.1).model_copy(update={"trained_cue": "A"})
    for instrument in (find_harm, gained_and_lost):
        with pytest.raises(
            InputError, match="the policies of this suite announce nothing, so none can be put in place"
        ):
            instrument(found)
