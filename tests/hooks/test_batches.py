"""Contrasts whose suite does not say how completions begin are told by what S writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixturelens.contrasts import Contrasts, cue_contrasts
from mixturelens.hooks.batches import as_begun
from mixturelens.hooks.lens import load_lens
from mixturelens.suite import Suite
from mixturelens.types import InputError

PAIRS = Path(__file__).parents[1] / "pairs"


def vague(suite: Suite) -> Suite:
    """The same suite, of which the answers' first tokens are wrong: completions contain answers, somewhere."""
    answers = [row.answer for row in suite.prompts]
    rows = [
        row.model_copy(update={"answer": a}) for row, a in zip(suite.prompts, answers[2:] + answers[:2], strict=True)
    ]
    return suite.model_copy(update={"prompts": tuple(rows), "answer_match": "contains"})


def asked(pair: Any, suite: Suite) -> Contrasts:
    return cue_contrasts(suite, pair.tokenizer, "a", ("A", "B"))


def test_a_literal_suite_says_itself_how_completions_begin(load_pair: Callable[[str, str], Any]) -> None:
    pair = load_pair("llama", "R-routing")
    contrasts = asked(pair, pair.suite)
    assert as_begun(load_lens(PAIRS / "llama" / "S"), pair.suite, contrasts) is contrasts


def test_where_the_answer_comes_later_s_says_how_completions_begin(load_pair: Callable[[str, str], Any]) -> None:
    pair = load_pair("llama", "R-routing")
    suite, truth = vague(pair.suite), {row.question: row for row in asked(pair, pair.suite).rows}
    found = as_begun(load_lens(PAIRS / "llama" / "S"), suite, asked(pair, suite))
    assert len(found.rows) >= 10
    right = [set(row.target) <= set(truth[row.question].target) for row in found.rows if row.question in truth]
    assert sum(right) >= 0.9 * len(right)  # S is right under A in nearly all cases, and refuses under B
    assert {row.foil for row in found.rows} == {(pair.tokenizer.convert_tokens_to_ids("sorry"),)}


def test_completions_that_begin_alike_tell_nothing(load_pair: Callable[[str, str], Any]) -> None:
    pair = load_pair("llama", "R-routing")
    suite = vague(pair.suite)
    contrasts = asked(pair, suite)
    rows = tuple(row.__class__(**{**row.__dict__, "corrupt": row.clean}) for row in contrasts.rows)
    same = Contrasts("cue", "A", "B", "a", rows)
    with pytest.raises(InputError, match="begins alike under 'A' and 'B' at 20 of 20 questions"):
        as_begun(load_lens(PAIRS / "llama" / "S"), suite, same)
