"""Cues from prompts: planted ones are found, and shuffled prompts have none."""

from __future__ import annotations

import numpy as np
import pytest
from mixtures import planted

from mixturelens.discovery.cues import Cue, Prompt, features, find_cues
from mixturelens.discovery.policies import part

SHOWN = {
    "tags": {"A": "<A> {}", "B": "<B> {}"},
    "wrapped": {"A": '<task format="xml">\n{}\n</task>', "B": "## Task\n{}"},
    "sentence": {"A": "Please be quick. {}", "B": "Take your time. {}"},
}


def cues(one, seed: int = 0) -> tuple[Cue, ...]:
    parted = part(one.drawn, one.asked, seed)
    ids = sorted({prompt.id for prompt in one.prompts})
    half = {*ids[::2]}
    chosen_on = np.array([prompt.id in half for prompt in one.prompts])
    return find_cues(one.prompts, parted, chosen_on, seed)


@pytest.mark.parametrize("shown", SHOWN.values(), ids=SHOWN)
def test_a_planted_cue_is_the_first(shown: dict):
    one = planted(shown=shown)
    best = cues(one)[0]
    kinds = {cue: set(best.of[np.array(one.cues) == cue]) for cue in ("A", "B")}
    assert all(len(kind) == 1 for kind in kinds.values())
    assert kinds["A"] != kinds["B"]
    assert best.bits.value is not None
    assert best.bits.value > 0.7


def test_years_are_parted_where_what_is_done_changes():
    one = planted()
    rng = np.random.default_rng(0)
    for i, cue in enumerate(one.cues):
        year = int(rng.integers(1990, 2010) if cue == "A" else rng.integers(2010, 2030))
        one.prompts[i] = Prompt(one.prompts[i].id, f"Today is May 4, {year}. {one.prompts[i].text[4:]}")
    best = cues(one)[0]
    assert any("2010" in kind for kind in best.kinds)
    assert np.mean(best.of[np.array(one.cues) == "A"] == best.of[0]) > 0.95


def test_a_system_turn_and_a_given_field_can_be_the_cue():
    one = planted(shown={"A": "{}", "B": "{} "})
    for name in ("system", "fields"):
        for i, cue in enumerate(one.cues):
            old = one.prompts[i]
            given = {"system": f"You are {cue}."} if name == "system" else {"fields": (("kind", cue),)}
            one.prompts[i] = Prompt(old.id, old.text, **given)
        best = cues(one)[0]
        assert len(set(best.of)) == 2
        assert all(("system: You are" if name == "system" else "kind: ") in kind for kind in best.kinds)


def test_where_no_prompt_tells_there_is_no_cue():
    none = 0
    for seed in range(6):
        one = planted(seed=seed, questions=16)
        rng = np.random.default_rng(seed)
        prompts = [Prompt(p.id, f"{rng.choice(['hot', 'cold'])} {p.text[4:]}") for p in one.prompts]
        one.prompts[:] = prompts
        none += not cues(one, seed)
    assert none >= 5


def test_features_part_the_prompts():
    prompts = [Prompt(str(i), text) for i, text in enumerate(("was 1998?", "was 2020?", "caf\u00e9", "a\nb"))]
    found = features(prompts)
    assert found["a year from 2020 on"].tolist() == [False, True, False, False]
    assert found["a letter beyond ASCII"].tolist() == [False, False, True, False]
    assert found["more than a line"].tolist() == [False, False, False, True]
    assert found["a question mark"].tolist() == [True, True, False, False]
