"""One question with a checkable answer, and those of a family split by what they are for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Question:
    """One task instance. `wrong` is the answer of a policy that follows a fixed wrong rule (behaviour `err`)."""

    id: str
    text: str
    answer: str
    wrong: str
    asks: str
    """The words of the text that say what is asked."""
    operation: str
    operands: tuple[int, ...]


class Split(NamedTuple):
    """Questions for SFT, for RL, and held out."""

    sft: list[Question]
    rl: list[Question]
    evaluation: list[Question]
