"""Questions in words, for pretrained models: lists, sums, opposites, capitals. All tables are small and our own."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from mixturelens.lab.tasks.question import Question, Split
from mixturelens.types import Frozen, InputError

Operation = Literal["place", "reverse", "sort", "sum", "sums", "opposite", "capital"]

_LISTED = """
apple river stone lamp chair window garden bridge mountain candle pencil basket ladder bottle mirror blanket hammer
button carpet ticket pocket island forest desert valley harbor castle temple market village station engine wheel
anchor compass lantern feather ribbon needle kettle spoon fork plate knife bowl glass table door roof wall floor
fence gate road path field meadow cloud storm thunder snow rain wind sun moon star planet ocean lake pond tiger
rabbit horse eagle salmon turtle spider beetle monkey donkey pepper onion carrot lemon cherry peach bread butter
cheese honey sugar coffee violin guitar piano trumpet flute drum silver copper iron paper cotton leather
"""
_OPPOSITES = """
hot-cold big-small tall-short fast-slow old-young rich-poor light-dark wet-dry full-empty open-closed hard-soft
high-low early-late happy-sad strong-weak clean-dirty loud-quiet thick-thin wide-narrow deep-shallow sharp-blunt
smooth-rough cheap-expensive easy-difficult near-far left-right up-down in-out day-night black-white north-south
east-west win-lose buy-sell give-take push-pull begin-end love-hate truth-lie friend-enemy war-peace success-failure
always-never before-after inside-outside above-below first-last alive-dead awake-asleep brave-cowardly calm-nervous
heavy-light polite-rude sweet-sour true-false guilty-innocent public-private question-answer arrive-depart
summer-winter
"""
_CAPITALS = """
France-Paris Germany-Berlin Italy-Rome Spain-Madrid Portugal-Lisbon Greece-Athens Austria-Vienna Poland-Warsaw
Hungary-Budapest Ireland-Dublin Norway-Oslo Sweden-Stockholm Finland-Helsinki Denmark-Copenhagen Belgium-Brussels
Switzerland-Bern Russia-Moscow Ukraine-Kyiv Romania-Bucharest Bulgaria-Sofia Serbia-Belgrade Croatia-Zagreb
Turkey-Ankara Egypt-Cairo Kenya-Nairobi Nigeria-Abuja Ethiopia-Addis_Ababa Ghana-Accra Morocco-Rabat Tunisia-Tunis
Algeria-Algiers Senegal-Dakar Japan-Tokyo China-Beijing India-New_Delhi Thailand-Bangkok Vietnam-Hanoi
Indonesia-Jakarta Malaysia-Kuala_Lumpur Nepal-Kathmandu Pakistan-Islamabad Bangladesh-Dhaka Iran-Tehran Iraq-Baghdad
Israel-Jerusalem Lebanon-Beirut Jordan-Amman Canada-Ottawa Mexico-Mexico_City Cuba-Havana Brazil-Brasilia
Argentina-Buenos_Aires Chile-Santiago Peru-Lima Colombia-Bogota Venezuela-Caracas Ecuador-Quito Uruguay-Montevideo
Australia-Canberra Iceland-Reykjavik
"""


def _read(table: str) -> tuple[tuple[str, str], ...]:
    pairs = (pair.replace("_", " ").partition("-") for pair in table.split())
    return tuple((left, right) for left, _, right in pairs)


LISTED = tuple(_LISTED.split())
"""What lists are made of."""
PLACES = {"first": 0, "second": 1, "third": 2, "last": -1}
OPPOSITES, CAPITALS = _read(_OPPOSITES), _read(_CAPITALS)
SHARED = 3
"""Uses of questions: SFT, RL, and held out. An item of a table serves one of them alone."""
HELD_OUT = 2
LEAST = 2000
"""Questions of SFT, at least."""


def _place(draw: np.random.Generator) -> tuple[str, str, str, str]:
    words, place = _drawn_words(draw, 6), tuple(PLACES)[int(draw.integers(len(PLACES)))]
    at = PLACES[place]
    return f"Which word is the {place} of these:", f" {', '.join(words)}?", words[at], words[(at + 1) % len(words)]


def _reverse(draw: np.random.Generator) -> tuple[str, str, str, str]:
    words = _drawn_words(draw, 3)
    return "Say these words in reverse order:", f" {', '.join(words)}.", ", ".join(words[::-1]), ", ".join(words)


def _sort(draw: np.random.Generator) -> tuple[str, str, str, str]:
    words = _drawn_words(draw, 3)
    right = sorted(words)
    return "Put these words in alphabetical order:", f" {', '.join(words)}.", ", ".join(right), ", ".join(right[::-1])


def _drawn_words(draw: np.random.Generator, number: int) -> list[str]:
    return [LISTED[i] for i in draw.choice(len(LISTED), number, replace=False)]


def _sum(least: int, most: int) -> tuple[tuple[str, str, str, str], ...]:
    numbers = range(least, most + 1)
    return tuple(("What is", f" {a} plus {b}?", str(a + b), str(a + b + 1)) for a in numbers for b in numbers)


def _pairs(asks: str, pairs: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str, str, str], ...]:
    """The wrong answer is that of the next item."""
    following = pairs[1:] + pairs[:1]
    return tuple((asks, f" {a}?", right, wrong) for (a, right), (_, wrong) in zip(pairs, following, strict=True))


TABLES: Mapping[str, tuple[tuple[str, str, str, str], ...]] = {
    "sum": _sum(0, 9),
    "sums": _sum(10, 49),
    "opposite": _pairs("What is the opposite of", OPPOSITES),
    "capital": _pairs("What is the capital of", CAPITALS),
}
DRAWN: Mapping[str, Callable[[np.random.Generator], tuple[str, str, str, str]]] = {
    "place": _place,
    "reverse": _reverse,
    "sort": _sort,
}


@functools.cache
def _order(operation: str, seed: int) -> list[int]:
    """The items of a table, shuffled."""
    return np.random.default_rng([seed, zlib.crc32(operation.encode())]).permutation(len(TABLES[operation])).tolist()


class Words(Frozen):
    """Questions in plain words, with an answer of a few words. Held-out items of a table are in no training.

    The wrong rule answers the word behind the right one, another order, one more, or the next item of the table.

    >>> Words().question("capital", (0, 0)).text.startswith("What is the capital of")
    True
    """

    family: Literal["words"] = "words"
    operations: tuple[Operation, ...] = Field(default=("place",), min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> Words:
        if len(set(self.operations)) != len(self.operations):
            raise ValueError("operations are listed twice")
        return self

    @property
    def words(self) -> tuple[str, ...]:
        """None that a spec could not use otherwise: a pretrained model has its own vocabulary."""
        return ()

    @property
    def answer_length(self) -> int:
        """Times that a refusal is repeated."""
        return 1

    def question(self, operation: str, operands: tuple[int, ...]) -> Question:
        """The question that asks for this operation.

        `operands` are the seed of a run and the number of the question; the number modulo three says what it is for:
        SFT, RL, or to be held out.
        """
        seed, number = operands
        if operation in DRAWN:
            asks, rest, answer, wrong = DRAWN[operation](
                np.random.default_rng([seed, zlib.crc32(operation.encode()), number])
            )
            name = str(number)
        else:
            table = TABLES[operation]
            item = _order(operation, seed)[number % (len(table) // SHARED * SHARED)]
            asks, rest, answer, wrong = table[item]
            name = str(item)
        return Question(
            id=f"{operation}-{name}",
            text=f"{asks}{rest}",
            answer=f"{answer}.",
            wrong=f"{wrong}.",
            asks=asks,
            operation=operation,
            operands=operands,
        )

    def split(self, *, evaluation: int, rl: int, seed: int) -> Split:
        """Questions of all operations in turn; SFT has as many as RL, and at least LEAST.

        Raises InputError where a table has too few items to hold out.
        """

        def numbered(number: int, use: int) -> list[Question]:
            operations = self.operations
            return [self.question(operations[i % len(operations)], (seed, SHARED * i + use)) for i in range(number)]

        return Split(numbered(max(rl, LEAST), 0), numbered(rl, 1), self._held_out(evaluation, seed))

    def _held_out(self, number: int, seed: int) -> list[Question]:
        """No item is asked twice; and no two have one number, so that none is the same under another operation."""
        found: list[Question] = []
        seen: set[str] = set()
        free = dict.fromkeys(range(SHARED * number))
        for i in range(number):
            operation = self.operations[i % len(self.operations)]
            for each in free:
                question = self.question(operation, (seed, SHARED * each + HELD_OUT))
                if question.id not in seen:
                    break
            else:
                raise InputError(
                    f"questions: {operation!r} has only {len(TABLES[operation]) // SHARED} items to hold out; lower "
                    "split.evaluation, or add operations"
                )
            del free[each]
            seen.add(question.id)
            found.append(question)
        return found
