"""Readings are the scorer's log-probabilities, in one differentiable forward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.func import functional_call

from mixturelens.behaviour.prompts import behind_announcements, prepare
from mixturelens.grafting.components import weights_of
from mixturelens.grafting.readings import metric_names, metrics, read, read_weights
from mixturelens.grafting.usual import make_cells, method_of
from mixturelens.shown import Rule
from mixturelens.types import InputError

SHAPES = [
    ("llama", "R-routing"),
    ("gpt2", "R-both"),
    ("gpt_neox", "R-skill"),
    ("qwen2", "R-conditioning"),
    ("chat", "R"),
]


def cells_of(pair, prompts: int = 12):
    return make_cells(prepare(pair.suite, pair.suite.neutral[:prompts], pair.tokenizer), pair.before, pair.scorer)


@pytest.mark.parametrize(("shape", "after"), SHAPES)
def test_readings_are_the_scorers(load_pair, shape: str, after: str):
    pair = load_pair(shape, after)
    cells = cells_of(pair)
    with torch.no_grad():
        found, weights = read(pair.after, cells), read_weights(pair.after, cells)
    contexts = [cells.prompts.contexts[i] for i in cells.prompt]
    announced = [cells.announcement(row) for row in range(len(cells))]
    log_c = pair.scorer.sequences(pair.after, contexts, announced).reshape(12, -1)
    log_p = pair.scorer.sequences(pair.after, behind_announcements(cells.prompts), cells.completions).reshape(12, -1)
    np.testing.assert_allclose(found.log_c.numpy(), log_c, atol=2e-5)
    np.testing.assert_allclose(found.log_p.numpy(), log_p, atol=2e-5)
    np.testing.assert_allclose(weights.numpy(), log_c, atol=2e-5)
    assert found.log_c.dtype == torch.float64


def test_wordings_are_added_for_the_weight_and_averaged_for_what_is_done(load_pair):
    pair = load_pair("llama", "R-routing")
    suite = pair.suite.model_copy(update={"policies": {"a": ("[a]", "[b] sorry"), "b": ("[b] p", "[b] q")}})
    cells = make_cells(prepare(suite, suite.neutral[:3], pair.tokenizer), pair.before, pair.scorer)
    assert cells.policy.tolist() == [0, 0, 1, 1] * 3
    assert cells.wording.tolist() == [0, 1, 0, 1] * 3
    with torch.no_grad():
        found, weights = read(pair.after, cells), read_weights(pair.after, cells)
    announced = [cells.announcement(row) for row in range(len(cells))]
    log_c = pair.scorer.sequences(pair.after, [cells.prompts.contexts[i] for i in cells.prompt], announced)
    log_p = pair.scorer.sequences(pair.after, behind_announcements(cells.prompts), cells.completions)
    np.testing.assert_allclose(found.log_c.numpy(), np.logaddexp.reduce(log_c.reshape(3, 2, 2), -1), atol=2e-5)
    np.testing.assert_allclose(weights.numpy(), found.log_c.numpy(), atol=2e-5)
    np.testing.assert_allclose(found.log_p.numpy(), log_p.reshape(3, 2, 2).mean(-1), atol=2e-5)


def test_the_usual_completion_is_the_most_likely_next_token_again_and_again(load_pair):
    pair = load_pair("gpt2", "R-routing")
    cells = cells_of(pair)
    for context, completion in zip(behind_announcements(cells.prompts), cells.completions, strict=True):
        ids = list(context)
        for token in completion:
            with torch.no_grad():
                assert int(pair.before(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)
        refused = pair.tokenizer.decode(completion) == "sorry"  # how a refusal begins; of an answer, the end counts
        assert refused or completion[-1] in pair.scorer.ends or len(completion) == pair.suite.max_new_tokens - 1
    text = pair.tokenizer.decode(cells.ids[1, : cells.lengths[1]])
    assert text.split()[-2:] == ["[b]", "sorry"]
    assert set(cells.shown) == {True}
    assert pair.tokenizer.decode(cells.ids[1, cells.announced[1] : cells.placed[1]]) == "[b]"
    assert cells.spans[0]["cue"] == (0,)


def test_some_prompts_read_as_they_do_among_all(load_pair):
    pair = load_pair("chat", "R")
    cells = cells_of(pair)
    with torch.no_grad():
        whole, part = read(pair.after, cells), read(pair.after, cells, rows=[7, 2, 3])
    torch.testing.assert_close(part.log_c, whole.log_c[[7, 2, 3]], atol=2e-5, rtol=0)
    torch.testing.assert_close(part.log_p, whole.part([7, 2, 3]).log_p, atol=2e-5, rtol=0)
    assert len(cells.part([7, 2, 3])) == 3 * len(cells.announcements)


def test_batches_of_bounded_memory_read_the_same(load_pair, monkeypatch):
    pair = load_pair("chat", "R")
    with torch.no_grad():
        expected = read(pair.after, cells_of(pair))
        monkeypatch.setattr("mixturelens.grafting.cells.BATCH_TOKENS", 130)
        cells = cells_of(pair)
        found = read(pair.after, cells)
    assert len(cells.batches) > 5
    torch.testing.assert_close(found.log_c, expected.log_c, atol=2e-5, rtol=0)
    torch.testing.assert_close(found.log_p, expected.log_p, atol=2e-5, rtol=0)


@pytest.mark.parametrize("shape", ["llama", "gpt2", "gpt_neox", "qwen2"])
def test_readings_have_slopes(load_pair, shape: str):
    """Forward-mode and reverse-mode slopes along R - S agree with finite differences, after a read without any."""
    pair = load_pair(shape, "R-routing")
    cells = cells_of(pair, 4)
    before, after = weights_of(pair.before), weights_of(pair.after)
    with torch.inference_mode():
        read(pair.before, cells)  # what cells keep must not be inference tensors

    def total(weights):
        def model(**inputs):
            return functional_call(pair.before, weights, (), {**inputs, "attention_mask": None})

        found = read(model, cells)
        return (found.log_c[:, 0] - found.log_c[:, 1] + found.log_p.sum(1)).sum()

    step = {name: after[name] - before[name] for name in before}
    weights = {name: value.clone().requires_grad_() for name, value in before.items()}
    slopes = torch.autograd.grad(total(weights), list(weights.values()))
    slope = sum(float((g * d).sum()) for g, d in zip(slopes, step.values(), strict=True))
    near = 1e-3
    with torch.no_grad():
        ends = [total({n: before[n] + sign * near * step[n] for n in before}) for sign in (1, -1)]
    assert slope == pytest.approx(float(ends[0] - ends[1]) / (2 * near), rel=0.02, abs=0.02)


def test_metrics_by_hand(load_pair):
    pair = load_pair("llama", "R-routing")
    rows = [row for row in pair.suite.neutral if not (row.id == pair.suite.neutral[0].id and row.cue == "B")]
    cells = make_cells(prepare(pair.suite, rows, pair.tokenizer), pair.before, pair.scorer)
    with torch.no_grad():
        found = read(pair.after, cells)
    table, names = metrics(found, cells, ("b", "a"))
    assert names == metric_names(cells) == ("routing@A", "routing@B", "a@A", "a@B", "b@A", "b@B")
    assert table[0].isnan().tolist() == [False, True, False, True, False, True]  # has no prompt under B
    at = [i for i, row in enumerate(rows) if row.cue == "B"]
    assert float(table[:, 1].nanmean()) == pytest.approx(float((found.log_c[at, 1] - found.log_c[at, 0]).mean()))
    assert float(table[:, 4].nanmean()) == pytest.approx(
        float(found.log_p[[i for i, row in enumerate(rows) if row.cue == "A"], 1].mean())
    )


def test_a_rule_without_a_text_is_refused_and_one_with_it_is_forced(load_pair):
    pair = load_pair("chat", "R")
    assert method_of(pair.suite) == "forced texts"
    assert method_of(load_pair("llama", "R-routing").suite) == "literal"
    suite = pair.suite.model_copy(update={"policies": {**pair.suite.policies, "comply": Rule(regex="^sure")}})
    with pytest.raises(InputError, match="policy 'comply' is a rule without `force`"):
        make_cells(prepare(suite, suite.neutral, pair.tokenizer), pair.before, pair.scorer)


def test_what_s_does_is_read_up_to_where_it_has_shown(load_pair):
    """Of two words and an end: an answer that may stand anywhere ends where it stands, and so does a refusal."""
    pair = load_pair("llama", "R-routing")

    def cells(**update: object):
        suite = pair.suite.model_copy(update={"max_new_tokens": 4, **update})
        found = make_cells(prepare(suite, suite.neutral[:4], pair.tokenizer), pair.before, pair.scorer)
        texts = [pair.tokenizer.decode(ids) for ids in found.completions]
        answers = [suite.neutral[i].answer for i in found.prompt]
        return list(zip(texts, answers, found.shown, strict=True))

    exact, anywhere = cells(), cells(answer_match="contains")
    assert {shown for _, _, shown in exact + anywhere} == {True}
    for (text, answer, _), (short, _, _) in zip(exact, anywhere, strict=True):
        assert (text, short) in (("sorry", "sorry"), (f"{answer} <eos>", answer))
    # what never shows is read to its end, and said
    nothing = cells(answer_match="contains", behaviours={"refuse": Rule(regex="^(?!sorry)")})
    for (text, _, shown), (whole, _, _) in zip(nothing, exact, strict=True):
        assert shown is not text.startswith("sorry")
        assert whole == "sorry" or text in whole
