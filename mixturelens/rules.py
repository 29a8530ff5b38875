"""Regular expressions of a suite: what `re` reads, run by `regex`, which can be told to stop.

Whatever both read means the same in both; what only one of them reads, or reads as something else, is refused or
written so that it does (`{e}` is a text to `re`, and a wish for near matches to `regex`).
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from typing import Any

import regex

from mixturelens.types import InputError

SECONDS = 1.0
"""Of computing that a rule may take on one text."""
REPEATS = 1_000_000
"""Product of all repetitions that a rule asks for at least: `regex` writes them out, one in another."""

_TOKEN = re.compile(r"\\N\{[^}]*\}|\\.|\{(\d+)(?:,\d*)?\}|\{,\d*\}|(\{)", re.DOTALL)


@functools.lru_cache(maxsize=100_000)
def compiled(rule: str) -> Any:
    """A rule, compiled. Raises ValueError that says what is wrong with it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of sets that `re` will read as something else one day
            re.compile(rule)
    except (re.error, OverflowError, RecursionError, FutureWarning, DeprecationWarning) as error:
        raise ValueError(f"not a regular expression ({error}): {rule!r}") from None
    if math.prod(max(1, int(found[1])) for found in _TOKEN.finditer(rule) if found[1]) > REPEATS:
        raise ValueError(f"its repetitions multiply to more than {REPEATS}; repeat less: {rule!r}")
    try:
        return regex.compile(_TOKEN.sub(lambda found: rf"\{found[0]}" if found[2] else found[0], rule))
    except (regex.error, OverflowError, RecursionError) as error:
        raise ValueError(f"not a regular expression ({error}): {rule!r}") from None


def search(rule: str, text: str) -> Any:
    """Where the rule first matches in the text, or None. Raises InputError where that takes too long."""
    try:
        return compiled(rule).search(text, timeout=SECONDS)
    except TimeoutError:
        raise _too_long(rule, text) from None


def without(rule: str, text: str) -> str:
    """The text without all that the rule matches. Raises InputError where that takes too long."""
    try:
        return str(compiled(rule).sub("", text, timeout=SECONDS))
    except TimeoutError:
        raise _too_long(rule, text) from None


def _too_long(rule: str, text: str) -> InputError:
    return InputError(
        f"regex {rule!r}: takes more than {SECONDS:g} s on a text of {len(text)} characters, {text[:40]!r}; a "
        "repetition inside a repetition tries every way to part them: write one of them out"
    )
