"""The words of the field as frozen values, and the errors that users see. No I/O, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

ANSWER = "answer"
"""Behaviour of a completion that answers the question and matches no other behaviour."""
REFUSE = "refuse"
"""Behaviour of a completion that holds back."""
ERR = "err"
"""Behaviour of a completion that follows a fixed wrong rule."""
OTHER = "other"
"""The policy that collects completions of no known policy."""

Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class InputError(Exception):
    """Bad input: says what is wrong, where, and what to do. The command line exits with status 2."""


class RunError(Exception):
    """The run itself failed. The command line exits with status 1."""


class Frozen(BaseModel):
    """Base of all specs and records: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Interval(Frozen):
    """A number with its 95% bootstrap interval over questions; all three are null where it was not measured.

    >>> Interval(value=0.5, low=0.4, high=0.6).excludes(0.3)
    True
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Interval:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self

    @property
    def measured(self) -> bool:
        return self.value is not None

    def excludes(self, threshold: float) -> bool:
        """True if the whole interval lies on one side of `threshold`; False when not measured."""
        if self.low is None or self.high is None:
            return False
        return self.low > threshold or self.high < threshold

    def above(self, threshold: float) -> bool:
        return self.low is not None and self.low >= threshold

    def below(self, threshold: float) -> bool:
        return self.high is not None and self.high < threshold


NOT_MEASURED = Interval()

VerdictWord = Literal["routing", "specialist", "both", "neither", "inconclusive"]

PolicyTable = Mapping[str, Mapping[str, str]]
"""policy -> cue -> behaviour, e.g. {"a": {"A": "answer", "B": "refuse"}, ...}"""
