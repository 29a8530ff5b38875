"""Texts become the token ids that a model reads and writes: joined behind the prompt, whatever the tokenizer does."""

from __future__ import annotations

import datetime
import functools
import itertools
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from mixturelens.behaviour.prompts import prepare
from mixturelens.shown import Rule
from mixturelens.spelling import Announced, Speller, check_spelling, encode_prompts, every_spelling, prompt_text
from mixturelens.suite import Spelling, Suite, load_suite
from mixturelens.types import InputError

PROMPT = "<A> say x y ->"
ROW = {"id": "q", "cue": "A", "prompt": PROMPT, "answer": "x y"}
WORDS = ["<unk>", "<bos>", "<end>", "<A>", "say", "x", "y", "z", "->", "alpha:", "beta:", "pass", "user", "system"]


def suite(**changes) -> Suite:
    return Suite.model_validate({"prompts": [ROW], "policies": {"a": "alpha:", "b": "beta:"}, **changes})


def asked(prompt: str, **changes) -> Suite:
    return suite(prompts=[{**ROW, "prompt": prompt}], **changes)


def announced(found: Suite, tokenizer: PreTrainedTokenizerFast, policy: str = "a", *rests: str) -> Announced:
    text = found.policies[policy]
    assert isinstance(text, str)
    return Speller(found, found.prompts[0], tokenizer).announced(text, rests or ("x y",))


def words_of(tokenizer: PreTrainedTokenizerFast, *ids: tuple[int, ...]) -> list[list[str]]:
    return [tokenizer.convert_ids_to_tokens(list(each)) for each in ids]


def behind(tokenizer: PreTrainedTokenizerFast, prompt: str, text: str) -> list[int]:
    """Ids of a text behind a prompt: all that the two give together, without those of the prompt."""
    whole, head = (tokenizer.encode(each, add_special_tokens=False) for each in (prompt + text, prompt))
    assert whole[: len(head)] == head
    return whole[len(head) :]


# --- tokenizers -------------------------------------------------------------------------------------------------------


def by_words(single: str = "$A", unknown: str = "<unk>", template: str | None = None) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=unknown))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(word, WORDS.index(word)) for word in ("<bos>", "<end>")]
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<end>", unk_token=unknown, chat_template=template
    )


@functools.cache
def by_bytes() -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's: a word carries the space before it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator([f"{PROMPT} alpha: x y", " beta: pass"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)


def by_merges(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of these merges alone, across all borders."""
    pieces = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


@functools.cache
def by_pieces() -> PreTrainedTokenizerFast:
    """Unigram as sentencepiece's: a space is put before every text, and belongs to the word behind it."""
    pieces = [("<unk>", 0.0), *((f"\u2581{word}", -1.0) for word in WORDS[3:])]
    pieces += [("\u2581", -8.0), *((letter, -10.0) for letter in sorted({c for word in WORDS[3:] for c in word}))]
    core = Tokenizer(models.Unigram(pieces, unk_id=0))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


@functools.cache
def by_characters() -> PreTrainedTokenizerFast:
    """One token a character, and none for whitespace: a script without spaces."""
    letters = ["<unk>", *"甲乙问答三四五：。？"]
    core = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


# --- joined -----------------------------------------------------------------------------------------------------------

some_words = st.lists(st.sampled_from(WORDS[3:]), min_size=1, max_size=4).map(" ".join)
JOINED = {
    "bytes": (by_bytes, some_words, ["", " ", "\n"], ["", " ", "\n", "\n\n"]),
    "pieces": (by_pieces, some_words, ["", " "], [" "]),
    "words": (by_words, some_words, [" ", "\n"], [" ", "\n"]),
    "characters": (by_characters, st.text("甲乙问答三四五。？", min_size=1, max_size=6), [""], [""]),
}


@pytest.mark.parametrize("kind", JOINED)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_completion_is_what_prompt_and_completion_give_together_without_the_prompt(kind: str, data: st.DataObject):
    make, texts, leads, gaps = JOINED[kind]
    tokenizer = make()
    prompt, answer = data.draw(texts), data.draw(texts)
    lead, gap = data.draw(st.sampled_from(leads)), data.draw(st.sampled_from(gaps))
    text = "甲：" if kind == "characters" else "alpha:"
    spelling = Spelling(lead={"A": (lead,)}, gap={text: (gap,)})
    found = suite(prompts=[{**ROW, "prompt": prompt}], policies={"a": text}, spelling=spelling)
    placed = announced(found, tokenizer, "a", answer)
    assert len(placed.spellings) == len(placed.rests[0]) == 1
    whole = [*placed.spellings[0], *placed.rests[0][0]]
    assert whole == behind(tokenizer, prompt, f"{lead}{text}{gap}{answer}")
    # with nothing behind it, an announcement is spelled as with what usually follows
    row = found.prompts[0].model_copy(update={"answer": answer})
    assert Speller(found, row, tokenizer).announced(text, ()).spellings == placed.spellings


def test_spellings_by_hand():
    """Of byte-level and sentencepiece, what no other test says by itself: where the space goes."""
    spaced = Spelling(lead={"A": (" ",)})
    placed = announced(suite(spelling=spaced), by_bytes(), "a", "x y", "pass")
    assert words_of(by_bytes(), *placed.spellings) == [["\u0120alpha", ":"]]
    assert [words_of(by_bytes(), *each) for each in placed.rests] == [[["\u0120x", "\u0120y"]], [["\u0120pass"]]]
    placed = announced(suite(spelling=spaced), by_pieces(), "a", "x y", "pass")
    assert words_of(by_pieces(), *placed.spellings) == [["\u2581alpha:"]]
    assert [words_of(by_pieces(), *each) for each in placed.rests] == [[["\u2581x", "\u2581y"]], [["\u2581pass"]]]
    # alone it would get a space from the tokenizer
    placed = announced(suite(), by_pieces())
    assert words_of(by_pieces(), *placed.spellings) == [[*"alpha:"]]


def test_an_answer_stands_directly_behind_its_announcement_in_a_script_without_spaces():
    changes = {"prompts": [{**ROW, "prompt": "问三？", "answer": "三四"}], "policies": {"a": "甲：", "b": "乙："}}
    found = suite(**changes, spelling={"gap": {"甲：": ("",), "乙：": ("",)}})
    prompts = prepare(found, found.neutral, by_characters())
    texts = [by_characters().decode([*placed.ids, *placed.answer[0]]) for placed in prompts.placed[0]]
    assert texts == ["甲：三四", "乙：三四"]
    assert by_characters().unk_token_id not in {i for p in prompts.placed[0] for ids in p.answer for i in ids}


def test_an_announcement_ends_with_its_last_letter_though_a_token_ends_within_it():
    """As in GPT-2, a space and the first three bytes of a face are one token, and faces differ in the fourth."""
    merges = (("\u00f0", "\u0141"), ("\u0120", "\u00f0\u0141"), ("\u0120\u00f0\u0141", "\u013a"))
    tokenizer = by_merges(*merges)
    found = suite(policies={"a": "\U0001f600", "b": "\U0001f621"}, spelling=Spelling(lead={"A": (" ",)}))
    prompts = prepare(found, found.neutral, tokenizer)
    shown = [tokenizer.decode([*placed.ids]) for placed in prompts.placed[0]]
    assert shown == [" \U0001f600", " \U0001f621"]
    assert [tokenizer.decode(placed.answer[0]) for placed in prompts.placed[0]] == [" x y", " x y"]


def test_whitespace_of_the_suite_itself_is_followed():
    found = suite(policies={"a": " alpha:\n", "b": "beta:"})
    placed = announced(found, by_bytes())
    assert by_bytes().decode([*placed.spellings[0], *placed.rests[0][0]]) == " alpha:\nx y"
    placed = announced(found, by_bytes(), "b", " x y\n")
    assert by_bytes().decode([*placed.spellings[0], *placed.rests[0][0]]) == "beta: x y"


@pytest.mark.parametrize(("answer", "gap"), [("x y\n", " "), ("x y ", " "), (" x y", " "), ("\nx y\n", "\n")])
def test_whitespace_around_an_answer_does_not_count(answer: str, gap: str):
    found = suite(prompts=[{**ROW, "answer": answer}])
    placed = prepare(found, found.neutral, by_bytes()).placed[0][0]
    assert by_bytes().decode([*placed.ids, *placed.answer[0]]) == f"alpha:{gap}x y"
    assert found.correct("x y", found.prompts[0])
    # a gap that the models were found to write stands before it whatever the answer brings
    settled = suite(prompts=[{**ROW, "answer": answer}], spelling=Spelling(gap={"alpha:": (" ",), "beta:": (" ",)}))
    plain = prepare(suite(), suite().neutral, by_bytes())
    assert prepare(settled, settled.neutral, by_bytes()).placed == plain.placed


def test_a_prompt_that_ends_in_a_space_keeps_it():
    """Joined, the space would belong to the word behind it; the model has read it by then."""
    found = asked(f"{PROMPT} ")
    placed = announced(found, by_bytes())
    context = encode_prompts(found, found.prompts, by_bytes())[0]
    assert context == by_bytes().encode(f"{PROMPT} ")
    assert by_bytes().decode([*context, *placed.spellings[0], *placed.rests[0][0]]) == f"{PROMPT} alpha: x y"


# --- line ends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one_token", [False, True])
def test_an_announcement_that_ends_in_a_newline_beside_one_that_does_not(one_token: bool):
    tokenizer = by_merges((":", "\u010a")) if one_token else by_bytes()
    found = suite(policies={"a": "alpha:\n", "b": "beta:"}, spelling=Spelling(lead={"A": (" ",)}))
    for policy, text, rest in (
        ("a", " alpha:\nx y", "x y"),
        ("b", " beta: x y", "x y"),
        ("a", " alpha:\npass", "pass"),
    ):
        placed = announced(found, tokenizer, policy, rest)
        # where a token takes the line's end with it, an announcement without one is another way to write it
        assert len(placed.spellings) == (2 if one_token and policy == "a" else 1)
        assert len(placed.rests[0]) == 1
        whole = [*placed.spellings[0], *placed.rests[0][0]]
        assert whole == behind(tokenizer, PROMPT, text)
    placed = announced(found, tokenizer, "a", "x y")
    ends = words_of(tokenizer, placed.spellings[0])[0][-1], words_of(tokenizer, placed.rests[0][0])[0][0]
    assert ends == ((":\u010a", "x") if one_token else (":", "\u010a"))
    # both announcements are found in what a model writes
    row = found.prompts[0]
    assert [found.label(text, row).policy for text in ("alpha:\nx y", "beta: x y", "alpha: x y")] == ["a", "b", "a"]


def test_where_line_end_and_colon_are_one_token_both_ways_to_end_an_announcement_are_spelled():
    tokenizer = by_merges((":", "\u010a"))
    gaps = {"alpha:\n": ("\n", " ")}
    found = suite(policies={"a": "alpha:\n"}, spelling={"lead": {"A": (" ",)}, "gap": gaps})
    placed = announced(found, tokenizer)
    assert words_of(tokenizer, *placed.spellings) == [["\u0120", *"alpha", ":\u010a"], ["\u0120", *"alpha", ":"]]
    assert words_of(tokenizer, *placed.rests[0]) == [["x", "\u0120", "y"]]
    gaps = {"alpha:\n": (" ", "\n")}
    other = suite(policies={"a": "alpha:\n"}, spelling={"lead": {"A": (" ",)}, "gap": gaps})
    placed = announced(other, tokenizer)
    assert words_of(tokenizer, placed.spellings[0]) == [["\u0120", *"alpha", ":"]]
    assert words_of(tokenizer, *placed.rests[0]) == [["\u0120", "x", "\u0120", "y"]]


def test_what_an_announcement_took_of_the_gap_is_not_written_again():
    """Behind `alpha:` and a space in one token stands `y`, though elsewhere the space would go with the next word."""
    tokenizer = by_merges(("\u0120", "x"), (":", "\u0120"))
    placed = announced(suite(spelling=Spelling(lead={"A": ("\n",)})), tokenizer, "a", "y", "x")
    assert words_of(tokenizer, placed.spellings[0]) == [["\u010a", *"alpha", ":\u0120"]]
    assert [words_of(tokenizer, *each) for each in placed.rests] == [[["y"]], [["x"]]]


# --- several spellings ------------------------------------------------------------------------------------------------

gap_texts = st.lists(st.sampled_from(["", " ", "\n", "  ", "\n\n", " \n"]), min_size=1, max_size=3, unique=True)
any_text = st.text("ab:xé字", min_size=1, max_size=4)
TOKENIZERS = {
    "bytes": by_bytes,
    "colon and line end": lambda: by_merges((":", "\u010a")),
    "word and colon": lambda: by_merges(("a", ":"), ("a:", "\u010a"), ("\u010a", "\u010a")),
    "half of a letter": lambda: by_merges(("x", "\u00c3")),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(any_text, any_text, st.lists(any_text, min_size=1, max_size=3, unique=True), gap_texts, gap_texts)
def test_spellings_exclude_each_other_and_say_what_the_suite_says(
    kind: str, prompt: str, text: str, rests: list[str], leads: list[str], gaps: list[str]
):
    tokenizer = TOKENIZERS[kind]()
    found = asked(prompt, policies={"a": text}, spelling={"lead": {"A": leads}, "gap": {text: gaps}})
    placed = announced(found, tokenizer, "a", *rests)
    context = encode_prompts(found, found.prompts, tokenizer)[0]
    for ways in (placed.spellings, *placed.rests):
        assert ways
        for one, other in itertools.permutations(ways, 2):
            assert one[: len(other)] != other
    written = [tokenizer.decode([*context, *ids]) for ids in placed.spellings]
    assert {each.rstrip() for each in written} <= {f"{prompt}{lead}{text}" for lead in leads}
    for rest, ways in zip(rests, placed.rests, strict=True):
        for ids in ways:
            whole = tokenizer.decode([*context, *placed.spellings[0], *ids])
            assert whole in {f"{prompt}{lead}{text}{gap}{rest}" for lead in leads for gap in gaps}


def test_every_way_to_write_whitespace_once_and_the_suites_own_first():
    found = suite(policies={"a": "\talpha:\n", "b": "beta:", "c": {"regex": "^no", "force": "no "}})
    assert every_spelling(found) == Spelling(
        lead={"A": ("\t", "", " ", "\n")},
        gap={"\talpha:\n": ("\n", " ", ""), "beta:": (" ", "", "\n"), "no ": (" ", "", "\n")},
    )
    every = suite(spelling=every_spelling(suite()))
    ways = announced(every, by_bytes()).spellings
    assert [by_bytes().decode(ids) for ids in ways] == ["alpha:", " alpha:", "\nalpha:"]
    # to words, all of this is the same
    assert words_of(by_words(), *announced(every, by_words()).spellings) == [["alpha:"]]
    assert words_of(by_words(), *announced(every, by_words()).rests[0]) == [["x", "y"]]


# --- starts, ends, special tokens -------------------------------------------------------------------------------------

STARTS = {
    "$A": [],
    "<bos> $A": ["<bos>"],
    "$A <end>": [],
    "<bos> $A <end>": ["<bos>"],
    "$A <end> <end>": [],
    "<bos> <bos> $A <end>": ["<bos>", "<bos>"],
}


@pytest.mark.parametrize(("single", "start"), STARTS.items())
def test_a_start_token_begins_prompts_and_an_end_token_does_not_end_them(single: str, start: list[str]):
    tokenizer = by_words(single)
    prompts = prepare(suite(), suite().neutral, tokenizer)
    assert words_of(tokenizer, *map(tuple, prompts.contexts)) == [[*start, *PROMPT.split()]]
    placed = prompts.placed[0][0]
    assert words_of(tokenizer, *placed.spellings, *placed.answer) == [["alpha:"], ["x", "y"]]
    assert words_of(tokenizer, *prompts.bare[0]) == [["x", "y"]]


@pytest.mark.parametrize("text", ["", "  \n"])
@pytest.mark.parametrize(("single", "start"), STARTS.items())
def test_a_prompt_of_a_start_token_alone_is_one_and_an_empty_one_is_refused(single: str, start: list[str], text: str):
    found, tokenizer = asked(text), by_words(single)
    if start:
        assert words_of(tokenizer, tuple(encode_prompts(found, found.prompts, tokenizer)[0])) == [start]
        return
    with pytest.raises(InputError) as caught:
        encode_prompts(found, found.prompts, tokenizer)
    assert str(caught.value) == "prompt 'q' under cue 'A' is empty: it has no token to predict from"


def test_a_prompt_that_a_template_empties_is_refused():
    found = asked("  ", chat={})
    for template in ("{{ messages[0]['content'] }}", "{% if false %}x{% endif %}"):
        with pytest.raises(InputError) as caught:
            encode_prompts(found, found.prompts, by_words("<bos> $A", template=template))
        assert str(caught.value) == "prompt 'q' under cue 'A' is empty: it has no token to predict from"


@pytest.mark.parametrize("strip", [{}, {"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}])
def test_announcements_that_are_special_tokens(strip: dict[str, bool]):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(by_bytes().backend_tokenizer.to_str()))
    own = [AddedToken(text, special=True, normalized=False, **strip) for text in ("<|a|>", "<|b|>")]
    tokenizer.add_special_tokens({"additional_special_tokens": own})
    found = suite(policies={"a": "<|a|>", "b": "<|b|>"}, behaviours={"refuse": "pass"})
    prompts = prepare(found, found.neutral, tokenizer)
    for policy, placed in zip("ab", prompts.placed[0], strict=True):
        assert words_of(tokenizer, *placed.spellings) == [[f"<|{policy}|>"]]
        # a token that swallows the space behind it leaves none to the answer
        assert words_of(tokenizer, *placed.answer) == [
            ["x", "\u0120y"] if "rstrip" in strip else ["\u0120x", "\u0120y"]
        ]
        whole = tokenizer.encode(f"{PROMPT}<|{policy}|> x y")
        assert [*prompts.contexts[0], *placed.ids, *placed.answer[0]] == whole
        shown = tokenizer.decode([*placed.ids, *placed.answer[0]])
        assert found.label(shown, found.prompts[0]).policy == policy
        assert found.label(shown, found.prompts[0]).rest == "x y"


def test_special_tokens_among_words():
    tokenizer = by_words("<bos> $A <end>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|a|>", "<|b|>"]})
    found = suite(policies={"a": "<|a|>", "b": "<|b|>"})
    prompts = prepare(found, found.neutral, tokenizer)
    assert [words_of(tokenizer, *placed.spellings, *placed.answer) for placed in prompts.placed[0]] == [
        [["<|a|>"], ["x", "y"]],
        [["<|b|>"], ["x", "y"]],
    ]


def test_a_start_token_that_is_also_the_unknown_token():
    tokenizer = by_words("<bos> $A", unknown="<bos>")
    prompts = prepare(suite(), suite().neutral, tokenizer)
    assert words_of(tokenizer, *map(tuple, prompts.contexts)) == [["<bos>", *PROMPT.split()]]
    assert words_of(tokenizer, *prompts.placed[0][0].spellings) == [["alpha:"]]
    # a text may name it, and is then known
    check_spelling("<bos> x", "here", tokenizer)
    assert tokenizer.encode("<bos> x", add_special_tokens=False) == [WORDS.index("<bos>"), WORDS.index("x")]
    found = asked(f"<bos> {PROMPT}")
    assert words_of(tokenizer, tuple(encode_prompts(found, found.prompts, tokenizer)[0]))[0][:3] == [
        "<bos>",
        "<bos>",
        "<A>",
    ]
    # what is unknown is named, and nothing else
    with pytest.raises(InputError, match=r"^here has unknown tokens \('zebra'\): '<bos> zebra x'; is this"):
        check_spelling("<bos> zebra x", "here", tokenizer)


def test_unknown_words_are_named_with_where_they_stand():
    for changes, where in (
        ({"prompts": [{**ROW, "prompt": "<A> zebra x ->"}]}, "prompt 'q' under cue 'A'"),
        ({"policies": {"a": "alpha:", "b": "zebra x"}}, "policy 'b'"),
        ({"behaviours": {"refuse": ["pass", "zebra x"]}}, "behaviour 'refuse'"),
        ({"prompts": [{**ROW, "answer": "zebra x"}]}, "the answer of prompt 'q'"),
        ({"prompts": [{**ROW, "err": "zebra x"}]}, "the err of prompt 'q'"),
    ):
        found = suite(**changes)
        with pytest.raises(InputError) as caught:
            prepare(found, found.neutral, by_words())
        assert str(caught.value).startswith(f"{where} has unknown tokens ('zebra'): ")
    # three words are enough to see what is wrong
    with pytest.raises(InputError, match=r"^here has unknown tokens \('gnu', 'yak', 'ox'\): 'gnu yak x ox emu'"):
        check_spelling("gnu yak x ox emu", "here", by_words())
    # no answer is spelled where answers are rules
    found = suite(prompts=[{**ROW, "answer": "zebra"}], answer_match="contains")
    assert prepare(found, found.neutral, by_words()).placed[0][0].answer == ()


# --- normalisers ------------------------------------------------------------------------------------------------------

NORMALISERS = {
    "NFC": (
        normalizers.NFC(),
        unicodedata.normalize("NFD", "clé:"),
        unicodedata.normalize("NFD", "ñ ü"),
        "clé:",
        "ñ ü",
    ),
    "NFKC": (normalizers.NFKC(), "ﬁ:", "ＡＢＣ ½", "fi:", "ABC 1\u20442"),
    "Lowercase": (normalizers.Lowercase(), "Alpha:", "X Y", "alpha:", "x y"),
    "none": (None, "clé:", "ＡＢＣ Y", "clé:", "ＡＢＣ Y"),
}


@pytest.mark.parametrize("name", NORMALISERS)
def test_texts_that_a_normaliser_rewrites_are_compared_as_they_come_back(name: str):
    normaliser, text, answer, text_shown, answer_shown = NORMALISERS[name]
    core = Tokenizer.from_str(by_bytes().backend_tokenizer.to_str())
    if normaliser is not None:
        core.normalizer = normaliser
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    row = {**ROW, "prompt": f"<A> say {answer} ->", "answer": answer, "err": f"{answer} z"}
    changes = {"policies": {"a": text, "b": "beta:"}, "behaviours": {"refuse": "Pass"}, "max_new_tokens": 40}
    found = suite(prompts=[row], **changes)
    prompts = prepare(found, found.neutral, tokenizer)
    assert prompts.suite.policies == {"a": text_shown, "b": "beta:"}
    assert (prompts.rows[0].answer, prompts.rows[0].err) == (answer_shown, f"{answer_shown} z")
    assert prompts.suite.behaviours == {"refuse": "pass" if name == "Lowercase" else "Pass"}
    placed = prompts.placed[0][0]
    for ids, behaviour, right in ((placed.answer[0], "answer", True), (placed.err[0], "err", False)):
        shown = tokenizer.decode([*placed.ids, *ids])
        label = prompts.suite.label(shown, prompts.rows[0])
        assert (label.policy, label.behaviour) == ("a", behaviour)
        assert prompts.suite.correct(label.rest, prompts.rows[0]) is right
    # in the form that the suite has them in, too, the ids are those of the form that comes back
    whole = tokenizer.encode(f"<A> say {answer_shown} ->{text_shown} {answer_shown}")
    assert [*prompts.contexts[0], *placed.ids, *placed.answer[0]] == whole


def test_whitespace_that_a_tokenizer_squashes_is_compared_as_it_comes_back():
    """A normaliser that makes one space of several (sentencepiece's default), and words that know no spaces at all."""
    core = Tokenizer.from_str(by_bytes().backend_tokenizer.to_str())
    core.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    for tokenizer in (PreTrainedTokenizerFast(tokenizer_object=core), by_words()):
        found = suite(prompts=[{**ROW, "answer": "x  y"}], policies={"a": "alpha:  z", "b": "beta:"})
        prompts = prepare(found, found.neutral, tokenizer)
        placed = prompts.placed[0][0]
        shown = tokenizer.decode([*placed.ids, *placed.answer[0]])
        assert shown == "alpha: z x y"
        label = prompts.suite.label(shown, prompts.rows[0])
        assert label.policy == "a"
        assert prompts.suite.correct(label.rest, prompts.rows[0])


def test_an_answer_that_is_a_regular_expression_is_no_text_to_rewrite():
    r"""In small letters, `\D` would be its contrary."""
    core = Tokenizer.from_str(by_bytes().backend_tokenizer.to_str())
    core.normalizer = normalizers.Lowercase()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    rows = [{**ROW, "answer": r"^\D+$"}]
    found = suite(prompts=rows, answer_match="regex", policies={"a": "Alpha:", "b": {"regex": r"^\S\D"}})
    prompts = prepare(found, found.neutral, tokenizer)
    assert prompts.rows[0].answer == prompts.suite.prompts[0].answer == r"^\D+$"
    assert prompts.suite.policies == {"a": "alpha:", "b": Rule(regex=r"^\S\D")}
    assert prompts.suite.correct("none", prompts.rows[0])
    assert not prompts.suite.correct("42", prompts.rows[0])


def test_an_answer_to_be_found_in_a_completion_may_have_words_that_are_unknown():
    found = suite(prompts=[{**ROW, "answer": "Zebra  x"}], answer_match="contains")
    assert prepare(found, found.neutral, by_words()).rows[0].answer == "Zebra  x"


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12))
def test_every_text_survives_a_byte_level_tokenizer(text: str):
    check_spelling(text, "here", by_bytes())
    assert by_bytes().decode(by_bytes().encode(text, add_special_tokens=False)) == text


# --- templates --------------------------------------------------------------------------------------------------------

TURNS = "{% for turn in messages %}{{ turn['role'] }} {{ turn['content'] }} {% endfor %}"
OPEN = "{% if add_generation_prompt %}->{% endif %}"
CLOSING = "{% for turn in messages %}{{ turn['role'] }} {{ turn['content'] }} <end> {% endfor %}"
TRIMMING = "{% for turn in messages %}{{ turn['role'] }} {{ turn['content'] | trim }} <end> {% endfor %}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no system turn') }}", "TemplateError: no system turn"),
        ("{{ raise_exception('turns must\nalternate') }}", "TemplateError: turns must"),
        ("{% for turn in messages %}{{ turn['content'] }", "TemplateSyntaxError: unexpected '}'"),
        ("{{ mood['x'] }}", "UndefinedError: 'mood' is undefined"),
        ("{{ messages[0]['content'] | shout }}", "TemplateAssertionError: No filter named 'shout'."),
        ("{{ messages[0]['content'] + 3 }}", 'TypeError: can only concatenate str (not "int") to str'),
        ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__' of 'str' object is unsafe."),
    ],
)
def test_an_error_in_a_template_is_one_line_that_names_the_prompt(template: str, said: str):
    found = suite(chat={}, prompts=[{**ROW, "id": "q7"}])
    with pytest.raises(InputError) as caught:
        prepare(found, found.neutral, by_words(template=template))
    assert str(caught.value) == f"prompt 'q7' under cue 'A': the chat template fails on it ({said})"


def test_a_template_that_takes_no_system_turn_names_the_prompt_that_has_one():
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + TURNS
    turns = [{"role": "system", "content": "z"}, {"role": "user", "content": "x"}]
    rows = [ROW, {"id": "r", "cue": "A", "answer": "x", "messages": turns}]
    with pytest.raises(InputError, match=r"^prompt 'r' under cue 'A': the chat template fails .*no system turn\)$"):
        encode_prompts(suite(chat={}, prompts=rows), suite(chat={}, prompts=rows).prompts, by_words(template=template))
    with pytest.raises(InputError, match=r"^prompt 'q' under cue 'A': .*no system turn\)$"):
        encode_prompts(suite(chat={"system": "z"}), suite().prompts, by_words(template=template))


@pytest.mark.parametrize("template", [TURNS, CLOSING, TRIMMING])
@pytest.mark.parametrize("last", ["x ->", "say x ->", "user", "x y say"])
def test_a_last_message_of_the_assistant_is_continued(template: str, last: str):
    tokenizer = by_words("<bos> $A <end>", template=f"{template}{OPEN}")
    turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": last}]
    found = suite(chat={}, prompts=[{"id": "m", "cue": "A", "answer": "x y", "messages": turns}])
    closed = " <end> " if template != TURNS else " "
    assert prompt_text(found, found.prompts[0], tokenizer) == f"user say{closed}assistant {last}"
    # a last message of the user is answered
    asked_last = suite(chat={}, prompts=[{"id": "m", "cue": "A", "answer": "x y", "messages": turns[:1]}])
    assert prompt_text(asked_last, asked_last.prompts[0], tokenizer) == f"user say{closed}->"


def test_a_continued_message_is_what_comes_before_the_announcement():
    tokenizer = by_words("<bos> $A <end>", template=f"{CLOSING}{OPEN}".replace("turn['role']", "'z'"))
    turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "x ->"}]
    found = suite(chat={}, prompts=[{"id": "m", "cue": "A", "answer": "x y", "messages": turns}])
    prompts = prepare(found, found.neutral, tokenizer)
    assert words_of(tokenizer, *map(tuple, prompts.contexts)) == [["z", "say", "<end>", "z", "x", "->"]]
    assert words_of(tokenizer, *prompts.placed[0][0].spellings) == [["alpha:"]]


def test_a_template_that_drops_the_message_to_continue_is_refused():
    turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "x ->"}]
    found = suite(chat={}, prompts=[{"id": "m", "cue": "A", "answer": "x y", "messages": turns}])
    with pytest.raises(InputError, match=r"^prompt 'm' under cue 'A': the chat template fails on it \(ValueError: "):
        encode_prompts(found, found.prompts, by_words(template="{{ messages[0]['content'] }}"))


@pytest.mark.parametrize("day", [datetime.datetime(1999, 12, 31, 23), datetime.datetime(2031, 7, 1)])
def test_a_template_that_asks_for_the_date_gives_the_same_text_on_any_day(
    monkeypatch: pytest.MonkeyPatch, day: datetime.datetime
):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return day

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    tokenizer = by_words(template="{{ strftime_now('%d %b %Y, %H:%M') }} {{ messages[0]['content'] }}")
    found = suite(chat={})
    assert prompt_text(found, found.prompts[0], tokenizer) == f"01 Jan 2025, 12:00 {PROMPT}"
    # nothing of that is left behind, even by a template that fails
    assert chat_template_utils.datetime is Clock
    with pytest.raises(InputError):
        prompt_text(found, found.prompts[0], by_words(template="{{ mood['x'] }}"))
    assert chat_template_utils.datetime is Clock


OURS = ("conversation", "messages", "tokenize", "add_generation_prompt", "continue_final_message", "chat_template")


@pytest.mark.parametrize("name", [*OURS, "a b", ""])
def test_keywords_of_a_template_that_are_not_the_suites_are_refused_at_loading(tmp_path: Path, name: str):
    (tmp_path / "prompts.jsonl").write_text('{"id": "q", "cue": "A", "prompt": "x", "answer": "y"}\n')
    path = tmp_path / "suite.yaml"
    path.write_text(f"prompts: prompts.jsonl\npolicies: {{a: x}}\nchat: {{template_kwargs: {{'{name}': true}}}}\n")
    with pytest.raises(InputError) as caught:
        load_suite(path)
    said = f"{name!r} is not for the suite to give ({', '.join(OURS)} are set by mixturelens)"
    assert str(caught.value) == f"{path}: chat.template_kwargs: {said}"


def test_other_keywords_reach_the_template():
    tokenizer = by_words(template="{{ mood }} {{ messages[0]['content'] }}{% if not enable_thinking %} ->{% endif %}")
    found = suite(chat={"template_kwargs": {"mood": "z", "enable_thinking": False}}, prompts=[{**ROW, "prompt": "x"}])
    assert prompt_text(found, found.prompts[0], tokenizer) == "z x ->"
    # one that the template's own machinery does not take is one line, too
    found = suite(chat={"template_kwargs": {"tools": 3}})
    with pytest.raises(InputError, match=r"^prompt 'q' under cue 'A': the chat template fails on it \(TypeError: "):
        prompt_text(found, found.prompts[0], tokenizer)
