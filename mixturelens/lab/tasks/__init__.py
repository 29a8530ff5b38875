"""Families of questions with checkable answers. A family is a frozen value that has all its questions by number."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Tag

from mixturelens.lab.tasks.question import Question, Split
from mixturelens.lab.tasks.sequence import Sequence
from mixturelens.lab.tasks.words import Words


def _kind(value: Any) -> str:
    name = value.get("family") if isinstance(value, Mapping) else getattr(value, "family", None)
    return "|words" if name == "words" else "|sequence"


Family = Annotated[Annotated[Sequence, Tag("|sequence")] | Annotated[Words, Tag("|words")], Discriminator(_kind)]
"""Every family of questions that a spec can name."""
