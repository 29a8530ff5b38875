"""What a card says of a unit is what was planted in it, or computed by hand."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from mixturelens.features.cards import EXAMPLES, WORDS, Album, card, interesting
from mixturelens.features.dictionary import Dictionary
from mixturelens.features.record import MovedFeature, SiteChange, Table, Terms, Unit, UnitKind, UnitScore
from mixturelens.hooks.lens import Lens, load_lens, tokens
from mixturelens.spelling import encode_prompts
from mixturelens.stats import half_of
from mixturelens.suite import Suite, load_suite
from mixturelens.types import NOT_MEASURED, Component, InputError, Interval, Site

PAIRS = Path(__file__).parents[1] / "pairs"
REFERENCE = Path(__file__).parents[2] / "artifacts" / "reference"
SHAPES = ["llama", "gpt2", "gpt_neox", "qwen2"]


@functools.cache
def lens_of(shape: str, name: str) -> Lens:
    return load_lens(PAIRS / shape / name)


@functools.cache
def reference(name: str) -> Lens:
    return load_lens(REFERENCE / "checkpoints" / name)


@functools.cache
def suite_of(shape: str) -> Suite:
    return load_suite(REFERENCE if shape == "reference" else PAIRS / shape)


def texts_of(suite: Suite, lens: Lens, questions: int = 12) -> dict[str, list[list[int]]]:
    """Prompts with policy a's announcement and the right answer behind them."""
    rows = [row for row in suite.neutral if row.id in {each.id for each in suite.neutral[: 2 * questions]}]
    found: dict[str, list[list[int]]] = {}
    for row, ids in zip(rows, encode_prompts(suite, rows, lens.tokenizer), strict=True):
        completion = lens.tokenizer.encode(f"[a] {row.answer}", add_special_tokens=False)
        found.setdefault(row.cue, []).append([*ids, *completion])
    return found


def unit(position: str | int | None, layer: int = 0, component: Component = "resid_pre", index: int | None = 0) -> Unit:
    return Unit(kind="feature", site=Site(layer=layer, component=component, position=position), index=index)


def album(before, after, dictionary, unit, suite, texts) -> Album:
    return Album(before, after, dictionary, (unit.site.layer, unit.site.component), suite, texts)


def words_only(lens: Lens, *words: str) -> Dictionary:
    """Units that fire on one token alone, with activation 1, at the embedding."""
    table = lens.model.get_input_embeddings().weight.detach().float()
    assert table.shape[0] <= table.shape[1]  # fewer words than dimensions: each can be told from all others
    read = torch.linalg.pinv(table.T)
    chosen = [int(lens.tokenizer.convert_tokens_to_ids(word)) for word in words]
    return Dictionary(read[chosen], torch.zeros(len(chosen)), torch.full((len(chosen),), 0.5), table[chosen])


def test_a_unit_that_fires_on_one_word_tells_what_that_word_tells():
    s, r, suite = reference("sft"), reference("rl-A"), suite_of("reference")
    texts = texts_of(suite, s)
    dictionary = words_only(s, "<A>", "[a]", "be-b")
    length = len(texts["A"][0])
    cue = card(album(s, r, dictionary, unit("cue"), suite, texts), unit("cue"), "planted")
    assert cue.auroc == {"cue": 1.0, "hint": 0.5, "policy": None}
    assert cue.why == "planted"
    for side in ("before", "after"):  # the embedding is frozen
        assert cue.rate[side] == pytest.approx(1 / (2 * length), abs=1e-6)
        assert cue.strength[side] == pytest.approx(1, abs=1e-4)
    assert len(cue.examples) == EXAMPLES
    for example in cue.examples:  # it fires under no other cue
        assert example.tokens[0] == "<A>"
        assert example.activations == (1.0, *[0.0] * (length - 1))
        assert example.tokens[8] == "[a]"
    assert len({example.tokens for example in cue.examples}) == EXAMPLES

    policy = card(album(s, r, dictionary, unit("policy", index=1), suite, texts), unit("policy", index=1), "planted")
    assert policy.auroc == {"cue": 0.5, "hint": None, "policy": 1.0}
    assert policy.rate["before"] == pytest.approx(1 / length, abs=1e-6)
    assert [example.tokens[0] for example in policy.examples].count("<A>") == EXAMPLES // 2
    assert (
        card(album(s, r, dictionary, unit(8, index=1), suite, texts), unit(8, index=1), "").auroc == policy.auroc
    )  # the same token, by number

    hint = card(album(s, r, dictionary, unit("hint", index=2), suite, texts), unit("hint", index=2), "planted")
    assert hint.auroc == {"cue": 0.5, "hint": 1.0, "policy": None}
    assert hint.rate == hint.strength == {"before": 0.0, "after": 0.0}
    assert hint.examples == ()
    assert hint.promotes == hint.suppresses == ()  # it fires on no neutral prompt

    anywhere = card(album(s, r, dictionary, unit(None, index=1), suite, texts), unit(None, index=1), "")
    assert anywhere.auroc == {"cue": 0.5, "hint": 0.5, "policy": 1.0}
    assert card(album(s, r, dictionary, unit("last"), suite, texts), unit("last"), "").auroc == {
        "cue": 0.5,
        "hint": 0.5,
        "policy": None,
    }


def test_next_tokens_are_those_of_the_plain_model_by_hand(monkeypatch: pytest.MonkeyPatch):
    """A unit that always fires at 1: with it is the model; without it, its vector is taken from the last layer."""
    s, r, suite = reference("sft"), reference("rl-A"), suite_of("reference")
    monkeypatch.setattr("mixturelens.features.cards.ASKED_NEXT", 1000)
    tokenizer = s.tokenizer
    vector = 2 * s.model.lm_head.weight.detach()[tokenizer.convert_tokens_to_ids("sorry")].float()
    always = Dictionary(torch.zeros(1, 64), -torch.ones(1), torch.zeros(1), vector[None])
    found = card(
        album(s, r, always, unit("policy", 2, "resid_post"), suite, texts_of(suite, s, 2)),
        unit("policy", 2, "resid_post"),
        "",
    )
    ids = list(dict.fromkeys(row.id for row in suite.neutral))
    judge = {ids[i] for i in half_of(len(ids), 1)[:64]}
    rows = [row for row in suite.neutral if row.id in judge]
    prompts = [
        [*context, tokenizer.convert_tokens_to_ids(word)]
        for context in encode_prompts(suite, rows, tokenizer)
        for word in ("[a]", "[b]")
    ]
    with torch.no_grad():
        acts, plain = s.capture(tokens(prompts), [(2, "resid_post")])
        x = acts[2, "resid_post"][:, -1]
        without = s.bridge.unembed(s.bridge.ln_final((x - vector)[:, None]))[:, 0]
    change = (plain.double().log_softmax(-1) - without.double().log_softmax(-1)).mean(0)
    assert found.promotes[0][0] == "sorry"
    for word, nats in (*found.promotes, *found.suppresses):
        assert nats == pytest.approx(float(change[tokenizer.convert_tokens_to_ids(word)]), abs=2e-3)
    assert [nats for _, nats in found.promotes] == sorted((nats for _, nats in found.promotes), reverse=True)
    assert [nats for _, nats in found.suppresses] == sorted(nats for _, nats in found.suppresses)
    assert all(nats < 0 for _, nats in found.suppresses)
    assert max(len(found.promotes), len(found.suppresses)) <= WORDS
    assert found.rate == {"before": 1.0, "after": 1.0}
    letters = set("abcdefghij")
    assert {word for word, _ in found.suppresses} <= letters | {"<eos>"}  # nothing else is ever likely there


@pytest.mark.parametrize("shape", SHAPES)
def test_cards_on_every_shape_and_on_prompts_of_several_lengths(shape: str):
    s, r = lens_of(shape, "S"), lens_of(shape, "R-routing")
    suite = suite_of(shape)
    rows = list(suite.prompts[:12])
    for number, row in enumerate(rows):
        if number >= 6:  # one letter less
            question = row.spans["question"][:-2]
            spans = {"cue": row.spans["cue"], "question": question}
            text = f"{row.spans['cue']} {question} ="
            rows[number] = row.model_copy(update={"prompt": text, "answer": question.split()[1], "spans": spans})
    suite = Suite.model_validate({**suite.model_dump(), "prompts": rows})
    texts = texts_of(suite, s, 6)
    assert len({len(text) for text in texts["A"]}) == 2
    ids = encode_prompts(suite, suite.neutral, s.tokenizer)
    last = [s.capture(tokens([each]), [(1, "resid_pre")])[0][1, "resid_pre"][0, -1] for each in ids]
    means = [torch.stack([x for x, row in zip(last, suite.neutral, strict=True) if row.cue == c]).mean(0) for c in "AB"]
    read = means[0] - means[1]
    middle = (means[0] + means[1]) @ read / 2
    reads = read[None] / read.norm()
    one = Dictionary(reads, middle[None] / read.norm(), torch.zeros(1), reads)
    for position in ("last", "policy", "cue", None):
        found = card(album(s, r, one, unit(position, 1), suite, texts), unit(position, 1), "")
        # padding is not seen: every text has the activations that it has alone
        for example in found.examples:
            alone = tokens([s.tokenizer.encode(" ".join(example.tokens), add_special_tokens=False)])
            expected = one.encode(s.capture(alone, [(1, "resid_pre")])[0][1, "resid_pre"])[0, :, 0]
            torch.testing.assert_close(torch.tensor(example.activations), expected, atol=1e-3, rtol=0)
        assert (found.auroc["policy"] is None) == (position in ("last", "cue"))
        if position == "last":  # few questions: all of them are read
            f = [float(one.encode(x)) for x in last]
            up, down = ([x for x, row in zip(f, suite.neutral, strict=True) if row.cue == cue] for cue in "AB")
            order = sum((a > b) + (a == b) / 2 for a in up for b in down) / (len(up) * len(down))
            assert found.auroc["cue"] == pytest.approx(max(order, 1 - order), abs=1e-6)
        assert found.auroc["hint"] is None  # no hinted prompts here
        assert all(nats > 0 for _, nats in found.promotes)


def score(index: int, kind: UnitKind = "feature") -> UnitScore:
    one = Interval(value=0.5, low=0.4, high=0.6)
    site = Site(layer=1, component="resid_pre", position="policy")
    unit = Unit(kind=kind, site=site, index=index if kind == "feature" else None)
    return UnitScore(unit=unit, among=8, auroc=one, patch=one, clamp=one, ablate=one, random=(), margin=one)


def table(concept, *scores: UnitScore) -> Table:
    site = Site(layer=1, component="resid_pre", position="policy")
    none = NOT_MEASURED
    return Table(
        concept=concept,
        checkpoint="after",
        clean="A",
        corrupt="B",
        questions=8,
        base=none,
        goal=none,
        site=site,
        scores=scores,
    )


def change(layer: int, *moved: tuple[int, float, float, float]) -> SiteChange:
    """Features: number, how far they moved, bits of routing and of conditioning."""

    def terms(routing: float, conditioning: float) -> Terms:
        one, two = (Interval(value=x, low=x, high=x) for x in (routing, conditioning))
        return Terms(routing=one, conditioning=two, skill=NOT_MEASURED, specialist=two)

    return SiteChange(
        site=Site(layer=layer, component="resid_pre"),
        features=tuple(
            MovedFeature(index=i, rate={}, strength={}, moved=m, terms=terms(*bits)) for i, m, *bits in moved
        ),
        together=terms(0, 0),
        every=terms(0, 0),
        whole=terms(0, 0),
        random=(),
        questions=8,
    )


def test_interesting_units_are_named_once_with_every_reason():
    tables = [table("cue", score(3), score(0, "neuron")), table("hint", score(5))]
    changes = [
        change(1, (3, 2.0, 0.4, 0.1), (4, 0.5, 0.0, 0.001)),
        change(2, (3, 9.0, 0.0, 0.001), (7, 8.0, 0.0, 0.0), (9, 0.1, 0.05, 0.3)),
    ]
    found = interesting(tables, changes)
    assert [(str(unit), why) for unit, why in found] == [
        ("L1.resid_pre@policy feature 3", "best feature for the cue; training moved it: 0.400 bits of routing alone"),
        ("L1.resid_pre@policy feature 5", "best feature for the hint"),
        ("L2.resid_pre feature 9", "training moved it: 0.300 bits of conditioning alone"),
        ("L2.resid_pre feature 3", "training moved it"),
    ]
    assert interesting([], []) == []
    assert interesting([table("selector", score(0, "neuron"))], []) == []
    many = [table(concept, score(i)) for i, concept in enumerate(("cue", "hint", "selector"))]
    assert len(interesting(many, [change(2, *((i, float(i), 0.0, 0.0) for i in range(1, 9)))])) == 6


def test_bad_input_is_refused():
    s, suite = lens_of("llama", "S"), suite_of("llama")
    texts = texts_of(suite, s, 2)
    two = Dictionary(torch.eye(32)[:2], torch.zeros(2), torch.zeros(2), torch.eye(32)[:2])
    with pytest.raises(InputError, match="feature 2: the dictionary holds 2 units"):
        card(album(s, s, two, unit("last", index=2), suite, texts), unit("last", index=2), "")
    with pytest.raises(InputError, match="holds 2 units"):
        card(album(s, s, two, unit("last", index=None), suite, texts), unit("last", index=None), "")
    with pytest.raises(InputError, match="not of heads"):
        card(album(s, s, two, unit("last", component="z"), suite, texts), unit("last", component="z"), "")
    with pytest.raises(InputError, match="there are none"):
        card(album(s, s, two, unit("last"), suite, {"A": []}), unit("last"), "")
    with pytest.raises(InputError, match="no prompt has a position 'hint'"):
        card(album(s, s, two, unit("hint"), suite, texts), unit("hint"), "")
    with pytest.raises(InputError, match="reads 32 numbers a token, where there are 48"):
        card(album(s, s, two, unit("last", component="neurons"), suite, texts), unit("last", component="neurons"), "")
    with pytest.raises(InputError, match="at least four"):
        card(
            album(s, s, two, unit("last"), suite.model_copy(update={"prompts": suite.prompts[:6]}), texts),
            unit("last"),
            "",
        )
