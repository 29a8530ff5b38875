"""The shift of neutral prompts is the hint's direction where it was planted, and nothing between S and itself."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from mixturelens.hooks.lens import Lens, load_lens
from mixturelens.probing.shift import shifts
from mixturelens.suite import Suite, load_suite
from mixturelens.types import InputError

REFERENCE = Path(__file__).parents[2] / "artifacts" / "reference"


@functools.cache
def suite_of(questions: int = 24, unhinted: bool = False, trained_cue: str | None = "A") -> Suite:
    """`unhinted`: neutral prompts have no word where the others have their hint, so that lengths differ."""
    suite = load_suite(REFERENCE)
    some = list(dict.fromkeys(row.id for row in suite.prompts))[:questions]
    rows = [row for row in suite.prompts if row.id in some]
    if unhinted:
        for i, row in enumerate(rows):
            if row.hint is None:
                spans = {name: piece for name, piece in row.spans.items() if name != "hint"}
                rows[i] = row.model_copy(update={"prompt": row.text.replace(" any ", " "), "spans": spans})
    return Suite.model_validate({**suite.model_dump(), "prompts": rows, "trained_cue": trained_cue})


def with_neutral_word_as(word: str, checkpoint: str = "sft") -> Lens:
    """A checkpoint in which the neutral word is spelled like a hint: neutral prompts are its hinted ones."""
    lens = load_lens(REFERENCE / "checkpoints" / checkpoint)
    neutral, hint = lens.tokenizer.convert_tokens_to_ids(["any", word])
    with torch.no_grad():
        weight = lens.model.get_input_embeddings().weight
        weight[neutral] = weight[hint]
    return lens


def test_a_planted_hint_is_found():
    suite = suite_of()
    found = shifts(with_neutral_word_as("be-b"), with_neutral_word_as("be-a"), suite, ("a", "b"))
    assert {each.site.component for each in found} == {"resid_post"}
    assert {each.site.layer for each in found} == {0, 1, 2}
    assert min(int(each.site.position) for each in found) == 1  # no hint reaches the tag before it
    for each in found:
        assert each.cosine.value == pytest.approx(1, abs=1e-5)
        assert each.cosine.low == pytest.approx(1, abs=1e-5)
        assert each.along.value == pytest.approx(1, abs=1e-5)
        assert 0 <= each.null <= 1
    other = shifts(with_neutral_word_as("be-b"), with_neutral_word_as("be-a"), suite, ("b", "a"))
    assert all(each.cosine.value == pytest.approx(-1, abs=1e-5) for each in other)


def test_no_shift_has_no_direction():
    lens = load_lens(REFERENCE / "checkpoints" / "sft")
    for each in shifts(lens, lens, suite_of(trained_cue=None), ("a", "b")):
        assert not each.cosine.measured
        assert each.along.value == 0


def test_numbers_by_hand():
    from mixturelens.hooks.lens import tokens
    from mixturelens.spelling import encode_prompts

    suite = suite_of(6)
    before, after = (load_lens(REFERENCE / "checkpoints" / name) for name in ("sft", "rl-A"))
    found = {str(each.site): each for each in shifts(before, after, suite, ("a", "b"), seed=4)}
    assert found == {str(each.site): each for each in shifts(before, after, suite, ("a", "b"), seed=4)}

    def mean(lens: Lens, hint: str | None) -> np.ndarray:
        rows = [row for row in suite.prompts if (row.cue, row.hint) == ("A", hint)]
        assert len(rows) == 6
        batch = tokens(encode_prompts(suite, rows, lens.tokenizer))
        return lens.capture(batch, [(1, "resid_post")])[0][1, "resid_post"][:, 7].double().mean(0).numpy()

    moved = mean(after, None) - mean(before, None)
    hint = mean(before, "a") - mean(before, "b")
    each = found["L1.resid_post@7"]
    assert each.cosine.value == pytest.approx(moved @ hint / np.linalg.norm(moved) / np.linalg.norm(hint), abs=1e-5)
    assert each.along.value == pytest.approx(moved @ hint / (hint @ hint), abs=1e-5)
    assert each.cosine.low <= each.cosine.value <= each.cosine.high


def test_prompts_of_different_lengths_share_their_spans():
    before, after = (load_lens(REFERENCE / "checkpoints" / name) for name in ("sft", "rl-A"))
    found = shifts(before, after, suite_of(unhinted=True), ("a", "b"))
    assert {each.site.position for each in found} == {"question", "last"}
    assert all(each.cosine.measured for each in found)


def test_without_hints_it_is_refused():
    pairs = Path(__file__).parents[1] / "pairs" / "llama"
    lens = load_lens(pairs / "S")
    with pytest.raises(InputError, match=r"no hints: .* 'a' and 'b' under cue 'A'"):
        shifts(lens, lens, load_suite(pairs).model_copy(update={"trained_cue": "A"}), ("a", "b"))
