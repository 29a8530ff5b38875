"""Symbols to sort, reverse or copy: questions for networks that are grown from nothing."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from mixturelens.lab.tasks.question import Question, Split
from mixturelens.types import Frozen, InputError

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


MOST = 1_000_000
"""Questions of a family: all of them are written out."""
Operation = Literal["up", "down", "reverse", "copy"]
_OPERATIONS = {
    "up": lambda xs: sorted(xs),
    "down": lambda xs: sorted(xs, reverse=True),
    "reverse": lambda xs: xs[::-1],
    "copy": lambda xs: list(xs),
}


class Sequence(Frozen):
    """Sort, reverse or copy a few symbols: `up c a d b =` -> `a b c d`. The wrong rule answers the next symbols.

    >>> Sequence().question("up", (2, 0, 3, 1)).answer
    'a b c d'
    """

    family: Literal["sequence"] = "sequence"
    operations: tuple[Operation, ...] = Field(default=("up", "down", "reverse", "copy"), min_length=1)
    symbols: int = Field(default=10, ge=2, le=len(_LETTERS))
    length: int = Field(default=4, ge=1, le=8)

    @model_validator(mode="after")
    def _distinct(self) -> Sequence:
        if len(set(self.operations)) != len(self.operations):
            raise ValueError("operations are listed twice")
        if self.operand_count * len(self.operations) > MOST:
            raise ValueError(
                f"{self.symbols} symbols and a length of {self.length} make more than {MOST} questions; lower one"
            )
        return self

    @property
    def words(self) -> tuple[str, ...]:
        """Every word of questions and answers."""
        return (*self.operations, *_LETTERS[: self.symbols], "=")

    @property
    def answer_length(self) -> int:
        """Words of an answer."""
        return self.length

    @property
    def operand_count(self) -> int:
        """Number of different operands."""
        return self.symbols**self.length

    def operands(self, number: int) -> tuple[int, ...]:
        """The `number`-th operand tuple in lexicographic order."""
        return tuple(int(number // self.symbols**place % self.symbols) for place in reversed(range(self.length)))

    def question(self, operation: str, operands: tuple[int, ...]) -> Question:
        """The question that asks for this operation on these operands (symbols by their number, from 0).

        `operation` is one of the family's `operations`.
        """

        def text(xs: list[int]) -> str:
            return " ".join(_LETTERS[x] for x in xs)

        answer = _OPERATIONS[operation](list(operands))
        given = text(list(operands))
        return Question(
            id=f"{operation}-{given.replace(' ', '')}",
            text=f"{operation} {given} =",
            answer=text(answer),
            wrong=text([(x + 1) % self.symbols for x in answer]),
            asks=operation,
            operation=operation,
            operands=operands,
        )

    def split(self, *, evaluation: int, rl: int, seed: int) -> Split:
        """Questions disjoint in their *operands*: none is seen under another operation either.

        SFT has every operation on all operands that are left. Raises InputError where there are too few operands.
        """
        order = np.random.default_rng(seed).permutation(self.operand_count)
        needed = evaluation + rl
        if len(order) < 2 * needed:
            raise InputError(
                f"questions: the family has {len(order)} operands, too few for {evaluation} evaluation and {rl} RL "
                "questions with as many left for SFT; raise `symbols` or `length`, or ask for fewer"
            )

        def one_each(numbers: np.ndarray) -> list[Question]:
            return [
                self.question(self.operations[i % len(self.operations)], self.operands(number))
                for i, number in enumerate(numbers)
            ]

        sft = [self.question(op, self.operands(number)) for number in order[needed:] for op in self.operations]
        return Split(sft, one_each(order[evaluation:needed]), one_each(order[:evaluation]))
