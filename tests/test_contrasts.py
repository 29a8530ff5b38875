"""Contrasts differ in one span alone, know where their spans lie, and are refused where they cannot be aligned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mixturelens.chat import chat_text
from mixturelens.contrasts import (
    Contrast,
    check_cue_span,
    checkpoint_contrasts,
    cue_contrasts,
    hint_contrasts,
    policy_tokens,
    span_positions,
)
from mixturelens.lab.organism import build_suite, build_tokenizer, load_spec
from mixturelens.models import load_tokenizer
from mixturelens.spelling import encode_prompts
from mixturelens.suite import Suite, load_suite
from mixturelens.types import InputError

PAIRS = Path(__file__).parent / "pairs"
REFERENCE = Path(__file__).parents[1] / "artifacts" / "reference"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(PAIRS / "llama" / "S")


@pytest.fixture(scope="module")
def reference() -> tuple[Suite, Any]:
    return load_suite(REFERENCE), load_tokenizer(REFERENCE / "checkpoints" / "rl-A")


def suite_with(*prompts: dict, **changes: Any) -> Suite:
    rows = [{"answer": "p", "spans": {"cue": prompt["prompt"].split(" first")[0]}, **prompt} for prompt in prompts]
    policies = {"a": "[a]", "b": "[b]"}
    return Suite.model_validate({"policies": policies, "behaviours": {"refuse": "sorry"}, "prompts": rows, **changes})


A = {"id": "q", "cue": "A", "prompt": "<A> first p q r ="}
B = {"id": "q", "cue": "B", "prompt": "<B> first p q r ="}


def test_a_cue_contrast_has_both_prompts_with_the_policy_in_place(tokenizer):
    found = cue_contrasts(suite_with(A, {**B, "id": "other"}, B), tokenizer, "a", ("A", "B"))
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in ("<A>", "<B>", "first", "p", "q", "r", "=", "[a]")}
    question = [ids[word] for word in ("first", "p", "q", "r", "=", "[a]")]
    assert found.rows == (
        Contrast(
            question="q",
            clean=(ids["<A>"], *question),
            corrupt=(ids["<B>"], *question),
            spans={"cue": (0,), "last": (5,), "policy": (6,)},
            target=(ids["p"],),
            foil=(tokenizer.convert_tokens_to_ids("sorry"),),
        ),
    )
    assert (found.kind, found.clean, found.corrupt, found.policy) == ("cue", "A", "B", "a")


def test_spans_are_where_their_words_are(tokenizer):
    suite = load_suite(PAIRS / "llama")
    found = cue_contrasts(suite, tokenizer, "b", ("B", "A"))
    assert len(found.rows) == 20
    texts = {row.id: row for row in suite.neutral if row.cue == "B"}
    for row in found.rows:
        for name, piece in texts[row.question].spans.items():
            assert tokenizer.decode([row.clean[i] for i in row.spans[name]]) == piece
        assert row.spans["policy"] == (6,)
        assert tokenizer.decode(list(row.clean[6:])) == "[b]"
        assert {i for i, pair in enumerate(zip(row.clean, row.corrupt, strict=True)) if len(set(pair)) > 1} == {0}


def test_where_task_families_are_the_cue_either_answer_is_one() -> None:
    spec = load_spec("coverage", split={"rl": 40, "evaluation": 10})
    tokenizer = build_tokenizer(spec)
    found = cue_contrasts(build_suite(spec), tokenizer, "a", ("sort", "order"), "refuse")
    by_id = {(row.cue, row.id): row for row in build_suite(spec).neutral}
    for row in found.rows:
        first = {by_id[cue, row.question].answer.split()[0] for cue in ("sort", "order")}
        assert {*tokenizer.convert_ids_to_tokens(list(row.target))} == first
        differing = [i for i, (x, y) in enumerate(zip(row.clean, row.corrupt, strict=True)) if x != y]
        assert tuple(differing) == row.spans["cue"]


def test_a_cue_may_wrap_the_question(tokenizer):
    left = {**A, "prompt": "<A> first r = p", "spans": {"cue": "<A>", "cue end": "p"}}
    right = {**B, "prompt": "<B> first r = q", "spans": {"cue": "<B>", "cue end": "q"}}
    suite = suite_with({**left, "answer": "r"}, {**right, "answer": "r"})
    (row,) = cue_contrasts(suite, tokenizer, "a", ("A", "B")).rows
    assert (row.spans["cue"], row.spans["cue end"]) == ((0,), (4,))
    odd = suite_with({**left, "answer": "r"}, {**right, "prompt": "<B> last r = q", "answer": "r"})
    with pytest.raises(InputError, match=r"differ at tokens \[0, 1, 4\], outside any one span"):
        cue_contrasts(odd, tokenizer, "a", ("A", "B"))


def test_halves_are_disjoint_and_complete(tokenizer):
    found = cue_contrasts(load_suite(PAIRS / "llama"), tokenizer, "a", ("A", "B")).first(7)
    halves = [{row.question for row in found.half(which).rows} for which in (0, 1)]
    assert [len(half) for half in halves] == [4, 3]
    assert not halves[0] & halves[1]
    assert halves[0] | halves[1] == {row.question for row in found.rows}
    assert found.half(1).policy == "a"


def test_an_answer_that_begins_like_the_other_behaviour_makes_no_contrast(tokenizer):
    same = [{**side, "id": "same", "answer": "sorry"} for side in (A, B)]
    found = cue_contrasts(suite_with(A, B, *same), tokenizer, "a", ("A", "B"))
    assert [row.question for row in found.rows] == ["q"]
    for part in (found, found.first(1), found.half(0), found.part([0])):
        (said,) = part.left_out
        assert said.startswith("without 1 of 2 questions: under 'A' their answers begin with the same token as")
    assert cue_contrasts(suite_with(A, B), tokenizer, "a", ("A", "B")).left_out == ()
    with pytest.raises(InputError, match=r"no contrast between cues 'A' and 'B'.*do not begin like another behaviour"):
        cue_contrasts(suite_with(*same), tokenizer, "a", ("A", "B"))


@pytest.mark.parametrize(
    ("corrupt", "says"),
    [
        (
            {"prompt": "<B> first p q r =", "spans": {"cue": "first"}},
            r"question 'q': span 'cue' is at tokens \(0,\) and \(1,\): not aligned",
        ),
        (
            {"prompt": "<B> first p q s ="},
            r"question 'q': its two prompts differ at tokens \[0, 4\], outside any one span",
        ),
        ({"prompt": "<B> first p q r =", "spans": {}}, r"differ at tokens \[0\], outside any one span"),
    ],
    ids=["span elsewhere", "another question", "no span"],
)
def test_prompts_that_cannot_be_aligned_are_refused_by_question_and_span(tokenizer, corrupt: dict, says: str):
    with pytest.raises(InputError, match=says):
        cue_contrasts(suite_with(A, {**B, **corrupt}), tokenizer, "a", ("A", "B"))


def test_a_longer_cue_is_aligned_at_the_end(tokenizer):
    longer = {**B, "prompt": "<B> <B> first p q r =", "spans": {"cue": "<B> <B>", "question": "first p q r"}}
    shorter = {**A, "spans": {"cue": "<A>", "question": "first p q r"}}
    (row,) = cue_contrasts(suite_with(shorter, longer), tokenizer, "a", ("A", "B")).rows
    assert row.shift == 1
    # the cue itself means different tokens in the two, so it is no common place
    assert row.spans == {"question": (1, 2, 3, 4), "last": (5,), "policy": (6,)}
    assert [row.corrupt[i + 1] for i in row.spans["question"]] == [row.clean[i] for i in row.spans["question"]]


def test_what_the_policy_shows_is_what_it_is_told_from(tokenizer):
    suite = suite_with(A, B, behaviours={"refuse": "sorry", "other": "r"})
    every = cue_contrasts(suite, tokenizer, "a", ("A", "B")).rows[0]
    one = cue_contrasts(suite, tokenizer, "a", ("A", "B"), "refuse").rows[0]
    none = cue_contrasts(
        suite_with(A, B, behaviours={"refuse": {"regex": "sorry"}}), tokenizer, "a", ("A", "B"), "refuse"
    )
    assert set(one.foil) < set(every.foil)
    assert one.foil == (tokenizer.convert_tokens_to_ids("sorry"),)
    assert none.rows[0].foil == ()


def test_a_policy_that_cannot_be_put_in_place_is_refused(tokenizer):
    suite = suite_with(A, B, policies={"a": "[a]", "b": {"regex": r"^\[b\]"}})
    with pytest.raises(InputError, match="policy 'b' is a rule without `force`"):
        cue_contrasts(suite, tokenizer, "b", ("A", "B"))
    with pytest.raises(InputError, match="no policy 'c'; policies are a, b"):
        cue_contrasts(suite, tokenizer, "c", ("A", "B"))
    with pytest.raises(InputError, match="policy 'b' has no announcement"):
        policy_tokens(suite, tokenizer, "A", "a", "b")
    with pytest.raises(InputError, match="policy 'c' has no announcement"):
        policy_tokens(suite, tokenizer, "A", "c", "a")


def test_first_tokens_that_policies_share_are_left_out_or_refused(tokenizer):
    ids = tokenizer.convert_tokens_to_ids
    suite = suite_with(A, B, policies={"a": ["p q", "[a]"], "b": ["p r", "[b]"]})
    assert policy_tokens(suite, tokenizer, "A", "a", "b") == ((ids("[a]"),), (ids("[b]"),))
    suite = suite_with(A, B, policies={"a": "p q", "b": ["p r", "[b]"]})
    with pytest.raises(InputError, match="announcements of 'a' and 'b' begin with the same tokens"):
        policy_tokens(suite, tokenizer, "A", "a", "b")


@pytest.mark.parametrize(
    ("left", "right", "says"),
    [
        ({}, {}, None),
        ({"spans": {}}, {"prompt": A["prompt"], "spans": {}}, r'needs to know where the cue is.*"spans": \{"cue"'),
        ({}, {"prompt": "<B> <B> first p q r ="}, "equally many tokens$"),
        ({"spans": {}}, {"prompt": "<B> <B> first p q r =", "spans": {}}, "equally many tokens, and name it in each"),
    ],
    ids=["named", "not named", "longer", "longer and not named"],
)
def test_a_cue_can_be_edited_where_it_is_the_same_tokens(tokenizer, left: dict, right: dict, says: str | None):
    suite = suite_with({**A, **left}, {**B, **right})
    contrasts = cue_contrasts(suite, tokenizer, "a", ("A", "B"))
    if says is None:
        check_cue_span(suite, contrasts)
        return
    with pytest.raises(InputError, match=says):
        check_cue_span(suite, contrasts)


def test_a_cue_has_equally_many_tokens_in_all_questions_that_are_edited(tokenizer):
    two = [{**row, "id": "two", "prompt": f"{row['prompt'][:3]} {row['prompt']}"} for row in (A, B)]
    suite = suite_with(A, B, *two)
    with pytest.raises(InputError, match="the cue has 1 tokens in one question and 2 in another"):
        check_cue_span(suite, cue_contrasts(suite, tokenizer, "a", ("A", "B")))


def test_checkpoint_contrasts_have_the_same_prompt_twice(tokenizer):
    found = checkpoint_contrasts(load_suite(PAIRS / "llama"), tokenizer, "B", "b", "a")
    assert len(found.rows) == 20
    assert (found.kind, found.clean, found.corrupt) == ("checkpoint", "before", "after")
    for row in found.rows:
        assert row.clean == row.corrupt
        assert tokenizer.convert_ids_to_tokens([*row.target, *row.foil]) == ["[b]", "[a]"]
        assert row.spans == {"cue": (0,), "question": (1, 2, 3, 4), "last": (5,)}


def test_hint_contrasts_of_the_reference(reference):
    suite, tokenizer = reference
    found = hint_contrasts(suite, tokenizer, "A", "a", "b")
    assert (found.kind, found.clean, found.corrupt, found.policy) == ("hint", "a", "b", None)
    assert len(found.rows) == len({row.id for row in suite.hinted})
    for row in found.rows:
        at = row.spans["hint"]
        assert [tokenizer.decode([side[i] for i in at]) for side in (row.clean, row.corrupt)] == ["be-a", "be-b"]
        assert {i for i, pair in enumerate(zip(row.clean, row.corrupt, strict=True)) if len(set(pair)) > 1} == set(at)
        assert row.spans["last"] == (len(row.clean) - 1,)
        assert tokenizer.convert_ids_to_tokens([*row.target, *row.foil]) == ["[a]", "[b]"]
    with pytest.raises(InputError, match="no contrast between hints 'a' and 'b' under cue 'C'"):
        hint_contrasts(suite, tokenizer, "C", "a", "b")


# --- chat templates ---------------------------------------------------------------------------------------------------


def chat_suite(**changes: Any) -> Suite:
    return Suite.model_validate({**load_suite(PAIRS / "chat").model_dump(), **changes})


def spelled(suite: Suite, tokenizer: Any) -> list[dict[str, str]]:
    """The words that the spans' tokens spell, prompt by prompt."""
    return [
        {name: tokenizer.decode([ids[i] for i in at]) for name, at in span_positions(suite, row, tokenizer).items()}
        for row, ids in zip(suite.prompts, encode_prompts(suite, suite.prompts, tokenizer), strict=True)
    ]


def test_spans_are_found_through_a_chat_template():
    suite, tokenizer = chat_suite(), load_tokenizer(PAIRS / "chat" / "S")
    for row, found in zip(suite.prompts, spelled(suite, tokenizer), strict=True):
        assert row.spans["thing"] in found["thing"]  # a token may hold a neighbouring space or star
        assert len(found["thing"]) <= len(row.spans["thing"]) + 4
        assert span_positions(suite, row, tokenizer)["thing"][0] > 10  # behind the system prompt


def test_words_of_the_system_prompt_and_of_roles_are_no_span():
    tokenizer = load_tokenizer(PAIRS / "chat" / "S")
    turns = [
        {"role": "user", "content": " what colour is ink? "},
        {"role": "assistant", "content": "blue."},
        {"role": "user", "content": "what colour is a helpful user?"},
    ]
    spans = {"first": "ink", "said": "blue", "late": "helpful", "role": "user"}
    row = {"id": "q", "cue": "plain", "messages": turns, "answer": "x", "spans": spans}
    suite = chat_suite(prompts=[row])
    text = chat_text(suite.chat, suite.prompts[0], tokenizer)  # the system prompt has "helpful", too
    assert text.count("helpful") == 2
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    positions = span_positions(suite, suite.prompts[0], tokenizer)
    for name, piece in spans.items():
        begin, end = offsets[positions[name][0]][0], offsets[positions[name][-1]][1]
        assert begin <= (text.find if name in ("first", "said") else text.rfind)(piece) < end, name


def test_a_template_that_changes_the_words_is_refused():
    suite, tokenizer = chat_suite(), load_tokenizer(PAIRS / "chat" / "S")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(InputError, match="prompt 'q00': the chat template changes span 'thing'"):
        span_positions(suite, suite.prompts[0], tokenizer)


def test_a_tokenizer_without_offsets_is_refused(tokenizer, monkeypatch):
    def slow(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(type(tokenizer), "__call__", slow)
    suite = suite_with(A, B)
    with pytest.raises(InputError, match="spans need a fast tokenizer"):
        span_positions(suite, suite.prompts[0], tokenizer)
