"""What tells one distribution of prompts from another: a tag, the task's family, a year, or a system turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from mixturelens.types import Frozen

QUESTION = "{}"
"""Where a cue's wrapping holds the question, and the hint before it."""


class Tasks(Frozen):
    """A cue without a tag: which task families a prompt belongs to."""

    operations: tuple[str, ...] = Field(min_length=1)


class System(Frozen):
    """A cue in the system turn of a chat: a persona, say."""

    system: str = Field(min_length=1)


class Years(Frozen):
    """A cue that must be computed: a year, `first` to `last`. Held-out prompts show the `unseen` ones.

    Where `says` is given, a sentence says it, with {year} and, if wanted, a {month} and a {day} that tell nothing; else
    its last two digits stand before the question, one by one.
    """

    first: int = Field(ge=0, le=9999)
    last: int = Field(ge=0, le=9999)
    unseen: tuple[int, ...] = Field(min_length=1)
    says: str | None = None

    @model_validator(mode="after")
    def _inside(self) -> Years:
        outside = [year for year in self.unseen if not self.first <= year <= self.last]
        if outside:
            raise ValueError(f"unseen: {outside[0]} is not from {self.first} to {self.last}")
        if not self.seen:
            raise ValueError("unseen: no year is left to learn from")
        if self.says is None and self.last > 99:
            raise ValueError("last: without `says` a year has two digits")
        if self.says is not None and "{year}" not in self.says:
            raise ValueError(f"says: {self.says!r} has no {{year}}")
        return self

    @property
    def seen(self) -> tuple[int, ...]:
        """The years that training shows."""
        unseen = set(self.unseen)
        return tuple(year for year in range(self.first, self.last + 1) if year not in unseen)


def _kind(value: Any) -> str:
    """So that a mistake in a cue is named as one."""
    if isinstance(value, Tasks) or (isinstance(value, Mapping) and "operations" in value):
        return "tasks"
    if isinstance(value, System) or (isinstance(value, Mapping) and "system" in value):
        return "system"
    return "years" if isinstance(value, (Years, Mapping)) else "tag"


Cue = Annotated[
    Annotated[str, Tag("tag")]
    | Annotated[Tasks, Tag("tasks")]
    | Annotated[Years, Tag("years")]
    | Annotated[System, Tag("system")],
    Discriminator(_kind),
]
"""A tag before the question, or a whole wrapping of it (`<task> {} </task>`); its task families; its date; or what the
system turn says."""
