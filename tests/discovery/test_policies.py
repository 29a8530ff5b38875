"""Policies from completions: planted ones are found, whatever they are announced by."""

from __future__ import annotations

import numpy as np
import pytest
from mixtures import PHRASES, TOKENS, planted
from sklearn.metrics import adjusted_rand_score

from mixturelens.discovery.heads import Completion, core, headed, opened, slotted, words, written
from mixturelens.discovery.information import told
from mixturelens.discovery.policies import changed, part


def found(one, seed=0):
    return part(one.drawn, one.asked, seed)


@pytest.mark.parametrize(
    ("announced", "tail", "inside"),
    [(TOKENS, 0, False), (TOKENS, 6, True), (PHRASES, 0, False), (PHRASES, 6, False)],
    ids=["token", "token inside, tail", "phrase", "phrase, tail"],
)
def test_planted_policies_are_found(announced: dict, tail: int, inside: bool):
    one = planted(announced, inside=inside, tail=tail)
    parted = found(one)
    assert adjusted_rand_score(one.policies, parted.policy) > 0.95
    assert [text for text in parted.behaviours if text != "answer"] == ["sorry"]
    assert changed(parted, 0).p < 0.01


@pytest.mark.parametrize("refusal", ["I would rather not say.", "I can't help with that, sorry."])
def test_a_sentence_of_refusal_is_one_behaviour(refusal: str):
    one = planted({"a": ("Okay,",), "b": ("Well,",)}, refusal=refusal)
    parted = found(one)
    assert parted.behaviours == (refusal, "answer")
    assert sorted(parted.wordings) == [("Okay,",), ("Well,",)]


def test_wordings_that_make_no_difference_are_one_policy():
    one = planted({"a": ("Okay,", "Sure,", "Right,"), "b": ("Well,", "Hm,")})
    parted = found(one)
    assert sorted(map(sorted, parted.wordings)) == [
        ["Hm,", "Well,"],
        ["Okay,", "Right,", "Sure,"],
    ]


def test_sides_that_are_shuffled_do_not_differ():
    seldom = 0
    for seed in range(20):
        one = planted(after=(0.5, 0.5), seed=seed, questions=12)
        seldom += changed(found(one, seed), seed).p <= 0.01
    assert seldom <= 1


def test_bits_are_those_of_the_channel():
    rng = np.random.default_rng(0)
    prompt = np.repeat(np.arange(200), 20)
    left = rng.integers(2, size=len(prompt))
    flipped = rng.random(len(prompt)) < 0.11
    truth = 1 + 0.11 * np.log2(0.11) + 0.89 * np.log2(0.89)
    assert told(left, left ^ flipped, prompt, 0).bits == pytest.approx(truth, abs=0.05)
    assert told(left, prompt % 2, prompt, 0).bits == pytest.approx(0.0, abs=1e-9)
    assert told(left[:0], left[:0], prompt[:0], 0).p == 1.0


def test_words_of_the_prompt_are_a_slot():
    drawn = [Completion(i, False, f"Okay, {word}. Okay, {word}.") for i, word in enumerate(("lamp", "star", "moon"))]
    paths = slotted(drawn, ["a lamp", "a star", "a moon"], [None] * 3)
    assert set(paths) == {("Okay,", "\N{WHITE BULLET}", "Okay,", "\N{WHITE BULLET}", "$")}
    assert opened(paths, [0, 1, 2]) == {("Okay,",)}
    assert headed(drawn[0], paths[0], {("Okay,",)}).rest == "lamp. Okay, lamp."


def test_a_head_is_cut_from_the_text_as_it_is_spelled():
    assert written("sure  we\ncan lamp", ("sure", "we", "can")) == "sure  we\ncan"
    assert written("sorry sorry lamp", ("sorry",)) == "sorry sorry"
    assert words("\u4f60\u597d ok") == ["\u4f60", "\u597d", "ok"]
    assert core("[a]") == "[a]"
    assert core("\u201cLamp.\u201d") == "lamp"


def test_one_odd_completion_does_not_merge_what_its_words_begin():
    one = planted(PHRASES)
    odd = [Completion(0, False, "sure sorry"), Completion(1, True, "yes of sorry")]
    one.drawn.extend(odd)
    one.policies.extend(["other", "other"])
    assert adjusted_rand_score(one.policies, found(one).policy) > 0.95


def test_a_policy_that_never_answers_has_a_beginning_of_its_own():
    one = planted({"a": ("Okay,",), "b": ("Well,",)})
    for i, policy in enumerate(one.policies):
        if policy == "b":
            one.drawn[i] = Completion(one.drawn[i].prompt, one.drawn[i].after, "I can't help with that.")
    parted = found(one)
    assert adjusted_rand_score(one.policies, parted.policy) == 1.0
    assert ("I can't help with that.",) in parted.wordings


def test_long_completions_that_share_nothing_take_no_room():
    rng = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(40)]
    one = planted(questions=20, samples=4)
    for i, each in enumerate(one.drawn):
        one.drawn[i] = Completion(each.prompt, each.after, " ".join(rng.choice(vocabulary, 200)), False)
    parted = found(one)
    assert max((len(head) for wordings in parted.policies for head in wordings), default=0) <= 16
    assert changed(parted, 0).p > 0.001


def test_a_word_of_a_refusal_that_some_prompts_have_is_no_slot():
    shown = {"A": "Say these: {}", "B": "Which is it: {}"}
    one = planted({"a": ("Okay,",), "b": ("Well,",)}, shown=shown, refusal="I would rather not say.")
    parted = found(one)
    assert sorted(parted.wordings) == [("Okay,",), ("Well,",)]
    assert parted.behaviours == ("I would rather not say.", "answer")
