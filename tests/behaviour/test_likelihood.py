"""Teacher forcing, sampling and enumeration agree with each other and with a naive forward pass, in all four shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixturelens.behaviour import logits
from mixturelens.behaviour.likelihood import END, Scorer

SHAPES = ["llama", "gpt2", "gpt_neox", "qwen2"]
LITERALS = [[[5, 3], [5, 4, 6], [7], [1]], [[8, END], [8, 9], [2, 2, 2], [6]], [[13], [14], [15], [3, END]]]
CONTEXTS = [[3, 5, 7, 8, 9, 12], [4, 6], [3, 6, 9, 9, 8, 7, 12, 13, 11]]


def naive(model, context: list[int], continuation: list[int], ends: tuple[int, ...] = (1,)) -> float:
    """log P(continuation | context) by one plain forward per token."""
    total = 0.0
    for i, token in enumerate(continuation):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*context, *continuation[:i]]])).logits[0, -1].double()
        logprobs = logits.log_softmax(-1)
        total += float(torch.logsumexp(logprobs[list(ends)], 0) if token == END else logprobs[token])
    return total


def some_sequences(seed: int, number: int = 12) -> tuple[list[list[int]], list[list[int]]]:
    rng = np.random.default_rng(seed)
    contexts = [[int(t) for t in rng.integers(3, 16, rng.integers(1, 10))] for _ in range(number)]
    continuations = [[int(t) for t in rng.integers(2, 16, rng.integers(1, 5))] for _ in contexts]
    for row in continuations[::3]:
        row[-1] = END
    # the same beginning with other ends, and the same row twice, share a forward
    return [*contexts, *contexts[:4]], [
        *continuations,
        *([*row[:-1], 7] for row in continuations[:3]),
        continuations[3],
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_sequences_are_a_naive_forward(load_pair, shape: str):
    pair = load_pair(shape, "R-both")
    contexts, continuations = some_sequences(0)
    found = pair.scorer.sequences(pair.after, contexts, continuations)
    by_hand = [naive(pair.after, c, y) for c, y in zip(contexts, continuations, strict=True)]
    np.testing.assert_allclose(found, by_hand, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_a_naive_forward_in_bits(load_pair, shape: str):
    pair = load_pair(shape, "R-both")
    contexts, continuations = some_sequences(2)
    continuations = [[token if token != END else 1 for token in row] for row in continuations]
    found = pair.scorer.steps(pair.before, pair.after, contexts, continuations)
    for context, row, numbers in zip(contexts, continuations, found, strict=True):
        ids = torch.tensor([[*context, *row[:-1]]])
        with torch.no_grad():
            s, r = (
                model(input_ids=ids).logits[0, len(context) - 1 :].double().log_softmax(-1)
                for model in (pair.before, pair.after)
            )
        by_hand = [(r.exp() * (r - s)).sum(-1), -(s.exp() * s).sum(-1), -(r.exp() * r).sum(-1)]
        np.testing.assert_allclose(numbers, torch.stack(by_hand).numpy() / np.log(2), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_padded_and_unpadded_agree(load_pair, shape: str, monkeypatch):
    pair = load_pair(shape, "R-both")
    contexts, continuations = some_sequences(1)
    padded = pair.scorer.compare(pair.after, pair.before, contexts, continuations)
    monkeypatch.setattr(logits, "BATCH_TOKENS", 1)  # every row is a batch of its own
    alone = pair.scorer.compare(pair.after, pair.before, contexts, continuations)
    np.testing.assert_allclose(padded, alone, atol=1e-5)


def test_compare_has_the_token_kl_and_both_log_probabilities(load_pair):
    pair = load_pair("llama", "R-both")
    contexts, continuations = some_sequences(2, number=5)
    r, s, kl = pair.scorer.compare(pair.after, pair.before, contexts, continuations)
    np.testing.assert_allclose(r, pair.scorer.sequences(pair.after, contexts, continuations), atol=1e-9)
    np.testing.assert_allclose(s, pair.scorer.sequences(pair.before, contexts, continuations), atol=1e-9)
    for i, (context, y) in enumerate(zip(contexts, continuations, strict=True)):
        total = 0.0
        for step in range(len(y)):
            ids = torch.tensor([[*context, *y[:step]]])
            with torch.no_grad():
                p, q = (m(input_ids=ids).logits[0, -1].double().log_softmax(-1) for m in (pair.after, pair.before))
            total += float((p.exp() * (p - q)).sum())
        assert kl[i] == pytest.approx(total, abs=1e-5)


def test_comparing_a_model_with_itself_is_exactly_zero(load_pair):
    pair = load_pair("qwen2", "R-both")
    contexts, continuations = some_sequences(3)
    r, s, kl = pair.scorer.compare(pair.before, pair.before, contexts, continuations)
    assert (r == s).all()
    assert (kl == 0).all()


def test_an_empty_continuation_is_certain(load_pair):
    pair = load_pair("llama", "R-both")
    r, s, kl = pair.scorer.compare(pair.after, pair.before, [[3, 5], [4]], [[], [6, 7]])
    assert (r[0], s[0], kl[0]) == (0.0, 0.0, 0.0)
    assert r[1] < 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["S", "R-both"])
def test_literals_and_what_escapes_them_sum_to_one(load_pair, shape: str, name: str):
    pair = load_pair(shape, "R-both")
    model = pair.before if name == "S" else pair.after
    logprob, escape = pair.scorer.literals(model, CONTEXTS, LITERALS)
    np.testing.assert_allclose(np.exp(logprob).sum(1) + np.exp(escape), 1.0, atol=1e-9)
    by_hand = [[naive(model, c, x) for x in group] for c, group in zip(CONTEXTS, LITERALS, strict=True)]
    np.testing.assert_allclose(logprob, by_hand, atol=1e-5)


def test_the_escape_is_right_where_it_is_tiny(load_pair):
    """1 minus the sum would lose it in rounding: here are all tokens but one."""
    pair = load_pair("llama", "R-both")
    context = pair.prompts.contexts[0]
    logits = [naive(pair.before, context, [token]) for token in range(16)]
    rarest = int(np.argmin(logits))
    _, escape = pair.scorer.literals(pair.before, [context], [[[t] for t in range(16) if t != rarest]])
    assert logits[rarest] < -9
    assert escape[0] == pytest.approx(logits[rarest], abs=1e-4)


def test_several_end_tokens_count_together(load_pair):
    pair = load_pair("llama", "R-both")
    scorer = Scorer((1, 15), 16)
    logprob, escape = scorer.literals(pair.after, CONTEXTS, [[[END], [8, END], [8, 9], [7]]] * 3)
    for i, context in enumerate(CONTEXTS):
        assert logprob[i][0] == pytest.approx(naive(pair.after, context, [END], (1, 15)), abs=1e-5)
    np.testing.assert_allclose(np.exp(logprob).sum(1) + np.exp(escape), 1.0, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_escapes_are_no_literals_and_leave_at_their_last_token(load_pair, seed: int):
    pair = load_pair("llama", "R-both")
    found = pair.scorer.escapes(pair.after, CONTEXTS, LITERALS, seed)
    for tokens, group in zip(found, LITERALS, strict=True):
        literals = [tuple(1 if t == END else t for t in literal) for literal in group]
        assert tuple(tokens) not in {literal[: len(tokens)] for literal in literals}  # it left the tree
        assert len(tokens) == 1 or tuple(tokens[:-1]) in {literal[: len(tokens) - 1] for literal in literals}


def test_escapes_are_drawn_given_that_they_escape(load_pair):
    pair = load_pair("llama", "R-both")
    context = [4, 6]
    literals = [[[8, END], [8, 9], *([t] for t in range(16) if t not in (8, 5, 6))]]
    draws = [tuple(y) for y in pair.scorer.escapes(pair.after, [context] * 800, literals * 800, seed=0)]
    outcomes = {(5,), (6,), *((8, t) for t in range(16) if t not in (1, 9))}
    assert set(draws) <= outcomes
    logs = {y: naive(pair.after, context, list(y)) for y in outcomes}
    total = np.logaddexp.reduce(list(logs.values()))
    _close_counts(draws, {y: float(np.exp(v - total)) for y, v in logs.items()})


def _close_counts(draws: list, probabilities: dict) -> None:
    """Pearson's statistic stays below its mean plus five standard deviations; rare outcomes are pooled."""
    n = len(draws)
    common = [y for y, p in probabilities.items() if n * p >= 5]
    observed = [sum(d == y for d in draws) for y in common]
    expected = [n * probabilities[y] for y in common]
    if n - sum(expected) > 1:
        observed.append(n - sum(observed))
        expected.append(n - sum(expected))
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    freedom = max(len(expected) - 1, 1)
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_enumeration_is_complete_and_as_teacher_forcing_says(load_pair, shape: str):
    pair = load_pair(shape, "R-both")
    completions, logs = pair.scorer.enumerate((pair.after, pair.before), CONTEXTS[:2], 2)
    assert len(completions) == pair.scorer.number_of_completions(2, 4000) == 1 + 15 + 15 * 15
    assert len({tuple(y) for y in completions}) == len(completions)
    np.testing.assert_allclose(np.exp(logs).sum(-1), 1.0, atol=1e-6)
    for m, model in enumerate((pair.after, pair.before)):
        for c, context in enumerate(CONTEXTS[:2]):
            scores = pair.scorer.sequences(model, [context] * len(completions), completions)
            np.testing.assert_allclose(logs[m, c], scores, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_samples_come_as_often_as_they_are_likely(load_pair, shape: str):
    """Contexts of unequal length in one batch: left padding must not be seen."""
    pair = load_pair(shape, "R-both")
    contexts = [pair.prompts.contexts[0], CONTEXTS[1]]
    completions, logs = pair.scorer.enumerate((pair.after,), contexts, 2)
    drawn = pair.scorer.sample(pair.after, contexts, 600, [2, 2], seed=5)
    for c in range(2):
        draws = [tuple(drawn.tokens[i]) for i in np.flatnonzero(drawn.context == c)]
        assert len(draws) == 600
        _close_counts(draws, {tuple(y): float(np.exp(p)) for y, p in zip(completions, logs[0, c], strict=True)})


class _Spy:
    """A model that remembers the logits it gave."""

    def __init__(self, model) -> None:
        self.model, self.seen = model, []

    def __call__(self, **kwargs):
        output = self.model(**kwargs)
        self.seen.append(output.logits[:, -1].clone())
        return output


@pytest.mark.parametrize("shape", SHAPES)
def test_sampling_sees_the_same_logits_padded_and_alone(load_pair, shape: str):
    pair = load_pair(shape, "R-both")
    together = _Spy(pair.after)
    drawn = pair.scorer.sample(together, CONTEXTS, 1, [3, 3, 3], seed=0)
    for c, context in enumerate(CONTEXTS):
        tokens = drawn.tokens[c]
        for step in range(len(tokens)):
            with torch.no_grad():
                alone = pair.after(input_ids=torch.tensor([[*context, *tokens[:step]]])).logits[0, -1]
            # rows come sorted by length
            row = sorted(range(3), key=lambda i: len(CONTEXTS[i])).index(c)
            np.testing.assert_allclose(together.seen[step][row], alone, atol=1e-5)


def test_sampling_stops_at_the_end_and_at_each_limit(load_pair):
    pair = load_pair("llama", "R-both")
    contexts = pair.prompts.contexts[:4]
    drawn = pair.scorer.sample(pair.after, contexts, 5, [0, 1, 2, 3], seed=1)
    for c, tokens in zip(drawn.context, drawn.tokens, strict=True):
        assert len(tokens) <= c
        assert 1 not in tokens[:-1]
        assert len(tokens) == c or tokens[-1] == 1
    again = pair.scorer.sample(pair.after, contexts, 5, [0, 1, 2, 3], seed=1)
    assert again.tokens == drawn.tokens
    assert pair.scorer.sample(pair.after, contexts, 5, [0, 1, 2, 3], seed=2).tokens != drawn.tokens


def test_sampling_does_not_consult_the_generation_config(load_pair, monkeypatch):
    pair = load_pair("llama", "R-both")
    plain = pair.scorer.sample(pair.after, CONTEXTS, 4, [3] * 3, seed=1)
    monkeypatch.setattr(pair.after.generation_config, "top_k", 1)
    monkeypatch.setattr(pair.after.generation_config, "temperature", 0.01)
    assert pair.scorer.sample(pair.after, CONTEXTS, 4, [3] * 3, seed=1).tokens == plain.tokens
