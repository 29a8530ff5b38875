"""How completions show a policy or a behaviour: by texts, by rules, or by nothing but a row of the policy table."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Discriminator, Tag

from mixturelens.rules import compiled, search
from mixturelens.types import Frozen


def _regex(value: str) -> str:
    compiled(value)
    return value


Regex = Annotated[str, AfterValidator(_regex)]


class Rule(Frozen):
    """Completions that a regular expression finds. `force` is a text that puts the policy in place."""

    regex: Regex
    force: str | None = None


class Row(Frozen):
    """A policy that announces nothing: only its row of the policy table is known, cue -> behaviour."""

    table: dict[str, str]


Shown = str | tuple[str, ...] | Rule
"""How a completion shows its policy or behaviour: a literal prefix, several wordings, or a rule."""


def _kind(value: Any) -> str:
    """So that a mistake in a row is named as one."""
    return "row" if isinstance(value, Row) or (isinstance(value, Mapping) and "table" in value) else "shown"


Policy = Annotated[Annotated[Shown, Tag("shown")] | Annotated[Row, Tag("row")], Discriminator(_kind)]


def wordings(shown: Shown | Row) -> tuple[str, ...]:
    """Texts that put a policy in place; empty for a rule without `force`, and for a policy that announces nothing."""
    if isinstance(shown, Row):
        return ()
    if isinstance(shown, Rule):
        return (shown.force,) if shown.force is not None else ()
    return (shown,) if isinstance(shown, str) else shown


def find_in(shown: Shown, text: str) -> tuple[int, str] | None:
    """(wording, what follows) where the text shows this policy or behaviour."""
    if isinstance(shown, Rule):
        match = search(shown.regex, text)
        # a rule that matches somewhere inside says nothing about where the announcement ends
        return None if match is None else (0, text[match.end() :].strip() if match.start() == 0 else text)
    for wording, literal in enumerate(wordings(shown)):
        if text.startswith(literal.strip()):
            return wording, text[len(literal.strip()) :].strip()
    return None


def stands_in(answer: str, text: str) -> bool:
    """Whether the answer stands in the text as words of its own: `4` not in `14` or `4.5`, `imp` not in `simply`."""
    start = text.find(answer)
    while start >= 0:
        end = start + len(answer)
        if not _goes_on(text[:start][::-1], answer[:1]) and not _goes_on(text[end:], answer[-1:]):
            return True
        start = text.find(answer, start + 1)
    return False


def _goes_on(beside: str, edge: str) -> bool:
    """Whether what stands beside the edge of an answer, nearest first, is of the same word or number."""
    if edge.isdigit() and beside[:1] in (".", ",") and beside[1:2].isdigit():
        return True
    return bool(beside) and all(map(_spells_words, (beside[0], edge)))


def _spells_words(char: str) -> bool:
    """Letters, marks and digits; but not those without case (Chinese, Thai, Arabic), as words need no space there."""
    category = unicodedata.category(char)
    return category[0] in "LMN" and category != "Lo"


def overlaps(where: str, shown: dict[str, Shown]) -> Iterator[str]:
    """Literals of which one begins with another, and rules given twice, make labels ambiguous."""
    texts: list[tuple[str, str]] = []
    rules: dict[str, str] = {}
    for name, value in shown.items():
        if isinstance(value, Rule):
            if value.regex in rules:
                yield f"{where}: {name!r} and {rules[value.regex]!r} overlap: the same rule {value.regex!r}"
            rules[value.regex] = name
        else:
            texts += [(name, text.strip()) for text in wordings(value)]
    for name, text in texts:
        if not text:
            yield f"{where}: {name!r} has an empty text; every completion begins with it"
    # in the order of the alphabet, whatever begins with a text stands right behind it
    order = sorted((i for i, (_, text) in enumerate(texts) if text), key=lambda i: texts[i][1])
    for pair in itertools.pairwise(order):
        (other_name, other), (name, text) = (texts[i] for i in sorted(pair))
        if text.startswith(other) or other.startswith(text):
            yield (
                f"{where}: {name!r} and {other_name!r} overlap: one of {other!r} and {text!r} begins "
                "with the other; make them distinct"
            )
