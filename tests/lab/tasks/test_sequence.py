"""Questions are right by an independent computation, and the split keeps operands apart."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mixturelens.lab.tasks import Sequence
from mixturelens.types import InputError


@given(st.lists(st.integers(0, 9), min_size=4, max_size=4), st.sampled_from(["up", "down", "reverse", "copy"]))
def test_answers_are_right(operands: list[int], operation: str):
    question = Sequence().question(operation, tuple(operands))
    given_letters = question.text.split()[1:-1]
    answer = question.answer.split()
    assert question.text == f"{operation} {' '.join('abcdefghij'[x] for x in operands)} ="
    assert sorted(answer) == sorted(given_letters)
    if operation == "up":
        assert all(x <= y for x, y in itertools.pairwise(answer))
    if operation == "down":
        assert all(x >= y for x, y in itertools.pairwise(answer))
    if operation == "reverse":
        assert [*reversed(answer)] == given_letters
    if operation == "copy":
        assert answer == given_letters


def test_the_wrong_rule_answers_the_next_symbols_and_wraps_around():
    assert Sequence().question("copy", (0, 1, 9, 8)).wrong == "b c a j"


@given(st.integers(0, 9999))
def test_operands_are_the_digits_of_their_number(number: int):
    assert Sequence().operands(number) == tuple(int(digit) for digit in f"{number:04d}")


def test_the_split_is_disjoint_in_operands_and_uses_all():
    family = Sequence(symbols=6, length=3)
    sft, rl, evaluation = family.split(evaluation=20, rl=40, seed=3)
    operands = [{q.id.split("-")[1] for q in part} for part in (sft, rl, evaluation)]
    assert [len(part) for part in (rl, evaluation)] == [40, 20]
    assert len(sft) == 4 * (6**3 - 60)
    for i in range(3):
        for j in range(i):
            assert not operands[i] & operands[j]
    assert len(set.union(*operands)) == 6**3
    assert len({q.id for q in [*sft, *rl, *evaluation]}) == len(sft) + 60
    assert {q.text.split()[0] for q in evaluation} == set(family.operations)


def test_the_seed_decides_the_split():
    family = Sequence(symbols=6, length=3)
    one, same, another = (family.split(evaluation=20, rl=40, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one[2] != another[2]


def test_too_few_questions_are_refused_with_what_to_do():
    with pytest.raises(InputError, match=r"family has 16 operands, too few for 4 evaluation and 5 RL.*raise `symbols`"):
        Sequence(symbols=4, length=2).split(evaluation=4, rl=5, seed=0)


@pytest.mark.parametrize(
    ("key", "value"), [("operations", ()), ("operations", ("up", "up")), ("symbols", 27), ("length", 0), ("sybols", 3)]
)
def test_bad_families_are_refused_by_name(key: str, value: object):
    with pytest.raises(ValidationError, match=key if key != "operations" or value == () else "listed twice"):
        Sequence.model_validate({key: value})


def test_every_word_of_a_question_is_in_the_vocabulary():
    family = Sequence(symbols=3, length=2)
    words = {w for part in family.split(evaluation=1, rl=1, seed=0) for q in part for w in q.text.split()}
    assert words <= set(family.words)
    assert family.answer_length == 2
