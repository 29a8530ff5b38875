"""Questions in words are right by an independent computation, and items of a table serve one use alone."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mixturelens.lab.tasks import Words
from mixturelens.lab.tasks.words import CAPITALS, OPPOSITES
from mixturelens.types import InputError

SEEDS, NUMBERS = st.integers(0, 20), st.integers(0, 5000)


@given(SEEDS, NUMBERS)
def test_a_place_in_a_list_is_right(seed: int, number: int):
    question = Words().question("place", (seed, number))
    found = re.fullmatch(r"Which word is the (\w+) of these: (.*)\?", question.text)
    assert found is not None
    words = found[2].split(", ")
    assert len(set(words)) == 6
    at = {"first": 0, "second": 1, "third": 2, "last": 5}[found[1]]
    assert question.answer == f"{words[at]}."
    assert question.wrong == f"{words[(at + 1) % 6]}."
    assert question.text.startswith(question.asks)


@given(SEEDS, NUMBERS)
def test_sorted_words_are_in_order_and_the_same(seed: int, number: int):
    question = Words().question("sort", (seed, number))
    listed = question.text.removeprefix("Put these words in alphabetical order: ").removesuffix(".").split(", ")
    answer = question.answer.removesuffix(".").split(", ")
    assert sorted(listed) == answer
    assert question.wrong == ", ".join(reversed(answer)) + "."


def test_reversed_words_are_the_same_backwards():
    question = Words().question("reverse", (0, 4))
    listed = question.text.removeprefix("Say these words in reverse order: ").removesuffix(".").split(", ")
    assert question.answer == ", ".join(listed[::-1]) + "."


@given(SEEDS, NUMBERS, st.sampled_from(["sum", "sums"]))
def test_sums_add_up(seed: int, number: int, operation: str):
    question = Words().question(operation, (seed, number))
    left, right = map(int, re.findall(r"\d+", question.text))
    assert question.answer == f"{left + right}."
    assert (left < 10) == (right < 10) == (operation == "sum")


@pytest.mark.parametrize(("operation", "table"), [("opposite", OPPOSITES), ("capital", CAPITALS)])
def test_tables_are_asked_whole_and_the_wrong_answer_is_of_another_item(operation: str, table: tuple):
    asked = {Words().question(operation, (3, number)).text.rstrip("?").split(" of ")[1] for number in range(60)}
    assert asked == {item for item, _ in table}
    for number in range(60):
        question = Words().question(operation, (3, number))
        assert question.answer != question.wrong
        assert dict(table)[question.text.rstrip("?").split(" of ")[1]] == question.answer.rstrip(".")


def test_no_question_serves_two_uses():
    family = Words(operations=("place", "sum", "sums", "opposite", "capital"))
    parts = family.split(evaluation=60, rl=300, seed=1)
    texts = [{question.text for question in part} for part in parts]
    assert [len(part) for part in parts] == [2000, 300, 60]
    assert not texts[0] & texts[1]
    assert not texts[0] & texts[2]
    assert not texts[1] & texts[2]
    assert len({question.id for question in parts.evaluation}) == 60
    assert {question.operation for question in parts.evaluation} == set(family.operations)
    assert len({question.operands for question in parts.evaluation}) == 60
    assert parts == family.split(evaluation=60, rl=300, seed=1)
    assert parts != family.split(evaluation=60, rl=300, seed=2)


def test_too_few_items_to_hold_out_are_said():
    with pytest.raises(InputError, match=r"'capital' has only 20 items to hold out; lower split\.evaluation"):
        Words(operations=("capital",)).split(evaluation=21, rl=10, seed=0)


@pytest.mark.parametrize("operations", [(), ("sum", "sum"), ("product",)])
def test_bad_families_are_refused(operations: tuple[str, ...]):
    with pytest.raises(ValidationError, match="operations"):
        Words.model_validate({"operations": operations})
