"""Policies that show somewhere in a text, and not in how it begins: planted ones are found."""

from __future__ import annotations

from pathlib import Path

import pytest
from mixtures import FREE, TOPICS, inside_free_text
from sklearn.metrics import adjusted_rand_score

from mixturelens.discovery.heads import Completion
from mixturelens.discovery.policies import changed, part
from mixturelens.discovery.texts import any_of, label_by_texts, part_by_texts
from mixturelens.rules import search
from mixturelens.types import InputError


def test_policies_in_the_middle_of_free_text_are_found():
    one = inside_free_text()
    begun = part(one.drawn, one.asked, 0)
    assert len(begun.names) < 2
    assert changed(begun, 0).p > 0.01  # beginnings say nothing
    found = part_by_texts(one.drawn, one.asked, 0)
    assert found is not None
    assert found.anywhere
    assert adjusted_rand_score(one.policies, found.policy) == 1.0
    assert changed(found, 0).p < 0.01
    other = inside_free_text(seed=1)
    again = label_by_texts(other.drawn, other.asked, found.wordings, found.behaviours[:-1])
    assert adjusted_rand_score(other.policies, again.policy) == 1.0


def test_what_makes_no_difference_is_no_policy():
    """Two ways to write, neither of which R prefers, at which nothing else differs."""
    one = inside_free_text(after=0.5)
    assert part_by_texts(one.drawn, one.asked, 0) is None


def test_without_anything_in_common_nothing_is_found():
    drawn = [Completion(i % 6, bool(i % 2), f"w{i} x{i} y{i}") for i in range(60)]
    assert part_by_texts(drawn, inside_free_text().asked, 0) is None
    same = [Completion(i % 6, bool(i % 2), "always so") for i in range(60)]
    assert part_by_texts(same, inside_free_text().asked, 0) is None


def test_a_rule_finds_whole_words_in_any_case():
    rule = any_of(["to sum up", "a.b"]).regex
    assert [bool(search(rule, text)) for text in ("To sum, up: 3", "so a.b", "axb", "tosum up", "to sum upon")] == [
        True,
        True,
        False,
        False,
        False,
    ]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder whose embedding of a text is the mean of random vectors of its words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = sorted({"[PAD]", "[UNK]", *FREE, *TOPICS, "on", "one", "hand", "honestly"})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("encoder")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=0, num_attention_heads=1, max_position_embeddings=64
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_an_encoder_groups_completions(encoder: Path):
    one = inside_free_text(marks=("honestly honestly honestly", "hand hand hand"))
    found = part_by_texts(one.drawn, one.asked, 0, encoder)
    assert found is not None
    assert adjusted_rand_score(one.policies, found.policy) == 1.0


def test_what_is_no_encoder_is_named(tmp_path: Path):
    one = inside_free_text()
    with pytest.raises(InputError, match="--embed"):
        part_by_texts(one.drawn, one.asked, 0, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="--embed"):
        part_by_texts(one.drawn, one.asked, 0, tmp_path)
