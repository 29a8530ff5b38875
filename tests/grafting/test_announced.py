"""Policies that only rules can find are weighed by the texts that S and R write."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from stored import behaviour_of

from mixturelens.behaviour.prompts import prepare
from mixturelens.grafting.announced import TEXTS, _told_apart, as_announced
from mixturelens.grafting.pair import graft_record
from mixturelens.grafting.record import GraftRecord
from mixturelens.models import Pair
from mixturelens.routing.mechanism import judge_mechanism
from mixturelens.suite import load_suite


def test_texts_are_those_that_are_written(load_pair):
    pair = load_pair("chat", "R")
    rows = pair.suite.neutral
    found = as_announced(prepare(pair.suite, rows, pair.tokenizer), (pair.before, pair.after), pair.scorer)
    assert set(found.suite.policies["comply"]) == {"sure", "of course"}
    assert set(found.suite.policies["refuse"]) == {"i can't", "i won't"}
    assert (found.suite.behaviours, found.suite.answer_match) == (pair.suite.behaviours, pair.suite.answer_match)
    again = as_announced(prepare(pair.suite, rows, pair.tokenizer), (pair.before, pair.after), pair.scorer)
    assert again.suite.policies == found.suite.policies
    literal = load_pair("llama", "R-routing")
    prompts = prepare(literal.suite, literal.suite.neutral, literal.tokenizer)
    assert as_announced(prompts, (literal.before, literal.after), literal.scorer) is prompts


def test_a_text_is_counted_once_and_for_one_policy(load_pair):
    pair = load_pair("chat", "R")
    prompts = prepare(pair.suite, pair.suite.neutral[:2], pair.tokenizer)
    ids = {text: tuple(pair.tokenizer.encode(text)) for text in ("sure", "of", "of course", "i", "i can't", "i won't")}
    assert ids["of course"][:1] == ids["of"]
    sure, can_t = (each.ids for each in prompts.placed[0])  # what is forced is kept, though nobody writes it

    def texts(**seen: int) -> list[tuple[str, ...]]:
        keys = {name: (int(name[-1]), ids[name[:-1].replace("_", " ").replace("wont", "won't")]) for name in seen}
        return _told_apart(Counter({keys[name]: count for name, count in seen.items()}), prompts)

    assert pair.tokenizer.decode(sure) == "sure"
    assert pair.tokenizer.decode(can_t) == "i can't"
    assert texts(of_course0=9, i_wont1=5) == [("of course", "sure"), ("i won't", "i can't")]
    # of two of one policy the shorter says all; one that begins another's tells neither
    assert texts(of_course0=9, of0=1) == [("of", "sure"), ("i can't",)]
    assert texts(of_course0=9, of1=20) == [("of course", "sure"), ("i can't",)]
    assert texts(sure1=3) == [(), ("i can't",)]
    # what is rare beside others is left out
    assert texts(of_course0=300, i0=1) == [("of course", "sure"), ("i can't",)]
    letters = [tuple(pair.tokenizer.encode(letter)) for letter in "abcdefg"]
    many = Counter({(0, each): 10 for each in letters})
    assert len(_told_apart(many, prompts)[0]) == TEXTS + 1


@pytest.mark.slow
def test_rules_are_no_reason_to_say_nothing(pairs: Path, tmp_path: Path):
    """Half of the completions begin otherwise than the forced texts do."""
    folder = pairs / "chat"
    suite = load_suite(folder)
    pair = Pair(folder / "S", folder / "R", suite)
    behaviour = behaviour_of("chat", "R")
    found = graft_record(pair, behaviour)
    assert GraftRecord.load(found.save(tmp_path / "graft.json")) == found
    assert set(found.texts["comply"]) == {"sure", "of course"}
    assert found.coverage > 0.95
    assert found.method == "forced texts"
    said = judge_mechanism(found)
    assert said.verdict == "routing"
    assert found.after.chosen.value == pytest.approx(behaviour.bits.routing.value, abs=0.03)
