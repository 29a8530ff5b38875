"""Rows that share a prompt go on from its keys and values: the same numbers, and each prompt through a model once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from mixturelens.behaviour import likelihood, logits
from mixturelens.behaviour.likelihood import END, Scorer
from mixturelens.models import beginnings
from mixturelens.models.beginnings import tree

VOCABULARY, END_ID = 40, 1
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": END_ID,
}  # fmt: skip
SHAPES = {
    "llama": LlamaConfig(num_key_value_heads=2, **SIZES),
    "qwen2": Qwen2Config(num_key_value_heads=2, **SIZES),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, vocab_size=40, bos_token_id=0, eos_token_id=1),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "mistral": MistralConfig(num_key_value_heads=2, sliding_window=8, **SIZES),
    "gemma3": Gemma3TextConfig(
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        pad_token_id=0,
        **SIZES,
    ),
}
"""Two of them look back through a window that is shorter than the prompts."""


def make(shape: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(SHAPES[shape]).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter *= 5  # so that what a token looks back at matters
    return model


def prompts(same: bool, number: int = 5) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, VOCABULARY, 40 if same else 34 + int(rng.integers(0, 9))).tolist() for _ in range(number)]


def asked(heads: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Continuations of every length, some empty, behind prompts and behind announcements."""
    rng = np.random.default_rng(1)
    contexts = [[*head, *announced] for head in heads for announced in ([], [5, 6], [7]) for _ in range(3)]
    return contexts, [rng.integers(2, VOCABULARY, int(rng.integers(0, 5))).tolist() for _ in contexts]


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_shared_rows_say_what_whole_rows_say(shape: str, same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, heads, scorer = make(shape), prompts(same), Scorer((END_ID,), VOCABULARY)
    contexts, continuations = asked(heads)
    literals = [[[5, 6], [7, 8, 9], [7, 3], [END]] for _ in heads]

    def found() -> tuple[Any, ...]:
        read = scorer.literals(model, heads, literals)
        return scorer.sequences(model, contexts, continuations), np.stack(read[0]), read[1]

    shared = found()
    with scorer.once():
        kept, again = found(), found()
    for module in (likelihood, logits):
        monkeypatch.setattr(module, "LONG", 1 << 30)
    assert shared[0].min() < -1
    for one, *others in zip(found(), shared, kept, again, strict=True):
        for other in others:
            np.testing.assert_allclose(other, one, atol=1e-5)


@pytest.mark.parametrize(("shape", "same"), [*((shape, False) for shape in SHAPES), (next(iter(SHAPES)), True)])
def test_samples_are_as_frequent_as_they_are_probable(shape: str, same: bool) -> None:
    model, heads, scorer, number = make(shape), prompts(same, 3), Scorer((END_ID,), VOCABULARY), 4000
    with torch.no_grad():
        model.get_output_embeddings().weight *= 3  # so that some tokens are usual
    drawn = scorer.sample(model, heads, number, [1, 3, 3], 0)
    assert [len(tokens) for tokens in drawn.tokens[:number]] == [1] * number
    assert all(END_ID not in tokens[:-1] and len(tokens) <= 3 for tokens in drawn.tokens)
    assert all(len(tokens) == 3 or tokens[-1] == END_ID for tokens in drawn.tokens[number:])
    every = [[a, b] for a in range(VOCABULARY) for b in range(VOCABULARY) if a != END_ID]
    for context, head in enumerate(heads[1:], start=1):
        own = [tuple(t[:2]) for c, t in zip(drawn.context, drawn.tokens, strict=True) if c == context]
        probable = np.exp(scorer.sequences(model, [head] * len(every), every))
        usual = np.flatnonzero(probable * number > 25)
        frequent = np.array([own.count(tuple(every[i])) for i in usual]) / number
        spread = np.sqrt(probable[usual] * (1 - probable[usual]) / number)
        assert len(usual) > 3
        assert np.abs((frequent - probable[usual]) / spread).max() < 4.5
    again = scorer.sample(model, heads, number, [1, 3, 3], 0)
    assert again.tokens == drawn.tokens


def test_samples_that_are_alike_so_far_are_one_row() -> None:
    model, heads, scorer = make("llama"), prompts(same=True), Scorer((END_ID,), VOCABULARY)
    with torch.no_grad():
        model.lm_head.weight *= 40  # one token is as good as certain
    fed: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, given: fed.append(given["input_ids"].numel()), with_kwargs=True
    )
    drawn = scorer.sample(model, heads, 50, [4] * len(heads), 0)
    handle.remove()
    distinct = {(int(c), tuple(t[:n])) for c, t in zip(drawn.context, drawn.tokens, strict=True) for n in (1, 2, 3)}
    assert sum(fed) <= sum(map(len, heads)) + len(distinct)


def test_each_prompt_goes_through_a_model_once() -> None:
    model, heads, scorer = make("llama"), prompts(same=True), Scorer((END_ID,), VOCABULARY)
    contexts, continuations = asked(heads)
    fed: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, given: fed.append(given["input_ids"].numel()), with_kwargs=True
    )
    with scorer.once():
        scorer.sequences(model, contexts, continuations)
        scorer.literals(model, heads, [[[5, 6], [7, 8, 9]] for _ in heads])
        scorer.literals(model, contexts[3:6], [[[8], [9, 3]] for _ in range(3)])
    handle.remove()
    # what is no prompt is announcements and continuations
    assert sum(fed) < sum(map(len, heads)) + 40 + sum(len(c) + 7 for c in continuations) + 3 * len(heads) * 3


def test_what_is_kept_ends_with_its_block() -> None:
    """A model may change between two calls, as in a graft: then nothing of it may be kept."""
    model, heads, scorer = make("llama"), prompts(same=True), Scorer((END_ID,), VOCABULARY)
    contexts, continuations = asked(heads)
    with scorer.once():
        before = scorer.sequences(model, contexts, continuations)
    with torch.no_grad():
        model.lm_head.weight.data *= 1.5
    after = scorer.sequences(model, contexts, continuations)
    fresh = Scorer((END_ID,), VOCABULARY).sequences(model, contexts, continuations)
    np.testing.assert_array_equal(after, fresh)
    assert np.abs(after - before).max() > 0.1


def test_a_tree_holds_every_context_and_what_several_share() -> None:
    shared = tuple(range(2, 36))
    contexts = [(*shared, a, *([9] * 6), *announced) for a in (3, 4, 5) for announced in ((), (7,), (8, 8))]
    found = tree(contexts * 2)
    assert set(found) == {shared, *contexts}
    assert found[shared] == ()
    assert all(found[c] == (shared if len(c) == 41 else c[:41]) for c in contexts)
    order = list(found)
    assert all(above == () or order.index(above) < order.index(each) for each, above in found.items())


def test_a_tree_of_what_differs_early_has_no_piece_for_little() -> None:
    contexts = [(1, a, *range(10)) for a in (3, 4, 5)]
    assert tree(contexts) == dict.fromkeys(contexts, ())
    assert tree([]) == {}


@pytest.mark.parametrize("shape", ["llama", "mistral", "gpt2"])
def test_what_does_not_fit_is_computed_in_parts(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, heads, scorer = make(shape), prompts(same=False, number=9), Scorer((END_ID,), VOCABULARY)
    contexts, continuations = asked(heads)
    expected = scorer.sequences(model, contexts, continuations)
    monkeypatch.setattr(logits, "KEPT_BYTES", 60_000)
    monkeypatch.setattr(beginnings, "BATCH_TOKENS", 100)
    with scorer.once():
        for _ in range(2):
            np.testing.assert_allclose(scorer.sequences(model, contexts, continuations), expected, atol=1e-5)
        assert scorer._kept is not None
        assert sum(map(beginnings.bytes_of, scorer._kept.values())) <= 60_000
