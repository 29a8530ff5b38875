"""Suites label completions as their file says, and every mistake in the file is named with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mixturelens.models import load_tokenizer
from mixturelens.shown import Rule, wordings
from mixturelens.spelling import check_spelling, encode_prompts
from mixturelens.suite import Label, PromptRow, Suite, load_suite
from mixturelens.types import InputError

TABLE = "prompts: prompts.jsonl\nbehaviours: {refuse: sorry}\npolicies: "
ROW = {"id": "q", "cue": "A", "prompt": "2 + 2 =", "answer": "4"}


def make(tmp_path: Path, text: str | None = None, rows: list | None = None) -> Path:
    path = tmp_path / "suite.yaml"
    path.write_text(text if text is not None else "prompts: prompts.jsonl\npolicies: {a: '[a]', b: '[b]'}\n")
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows or [ROW]]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return path


def suite(**changes) -> Suite:
    return Suite.model_validate({"prompts": [ROW], "policies": {"a": "[a]", "b": "[b]"}, **changes})


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_smallest_suite_has_the_documented_defaults(tmp_path: Path):
    found = load_suite(make(tmp_path))
    assert (found.answer_match, found.max_new_tokens, found.samples) == ("exact", 16, 8)
    assert (found.behaviours, found.chat, found.trained_cue) == (None, None, None)
    assert found == load_suite(tmp_path)


@pytest.mark.parametrize("name", ["llama", "chat"])
def test_saved_suites_load_back(pairs: Path, tmp_path: Path, name: str):
    found = load_suite(pairs / name)
    found.save(tmp_path / "suite.yaml")
    again = load_suite(tmp_path / "suite.yaml")
    assert again == found
    assert again.literal is (name == "llama")


def test_policies_that_announce_nothing_survive_saving(tmp_path: Path):
    rows = {"a": {"table": {"A": "answer"}}, "b": {"table": {"A": "refuse"}}}
    found = suite(policies=rows, behaviours={"refuse": "sorry"})
    found.save(tmp_path / "suite.yaml")
    assert load_suite(tmp_path / "suite.yaml") == found


def test_every_kind_of_policy_survives_saving(tmp_path: Path):
    found = suite(
        policies={"a": ["one way", "another"], "b": {"regex": "^no", "force": "no"}, "c": {"regex": "ä"}},
        behaviours={"refuse": "sorry"},
        trained_cue="A",
        answer_match="contains",
        chat={"template_kwargs": {"deep": {"x": 1}}, "system": "s"},
        prompts=[
            {**ROW, "hint": "a", "err": "5"},
            {**ROW, "spans": {"cue": "2"}, "err": "5"},
            {"id": "m", "cue": "B", "messages": [{"role": "user", "content": "hé"}], "answer": "x", "err": "y"},
        ],
    )
    found.save(tmp_path / "s.yaml", prompts_name="p.jsonl")
    assert load_suite(tmp_path / "s.yaml") == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "suite.yaml: a suite is a mapping with `prompts: FILE.jsonl`"),
        ("policies: {a: x}\n", "suite.yaml: a suite is a mapping with `prompts: FILE.jsonl`"),
        ("prompts: [\n", "suite.yaml: not YAML"),
        ("prompts: no.jsonl\npolicies: {a: x}\n", "no.jsonl: no such prompts file; `prompts:` is relative"),
        ("prompts: prompts.jsonl\n", "suite.yaml: key 'policies' is missing"),
        ("prompts: prompts.jsonl\npolicies: {}\n", "policies"),
        ("prompts: prompts.jsonl\npolicies: {a: x}\nsampels: 3\n", "suite.yaml: unknown key 'sampels'"),
        ("prompts: prompts.jsonl\npolicies: {a: x}\nsamples: 0\n", "suite.yaml: samples: "),
        ("prompts: prompts.jsonl\npolicies: {a: x}\nanswer_match: fuzzy\n", "suite.yaml: answer_match: "),
        ("prompts: prompts.jsonl\npolicies: {a: x}\nchat: {kwargs: {}}\n", "suite.yaml: unknown key 'chat.kwargs'"),
        ("prompts: prompts.jsonl\npolicies: {a: x}\ntrained_cue: C\n", "trained_cue: no prompt has cue 'C'"),
        ("prompts: prompts.jsonl\npolicies: {other: x}\n", "policies: 'other' is kept for"),
        ("prompts: prompts.jsonl\npolicies: {a: x}\nbehaviours: {answer: y}\n", "behaviours: 'answer' is what matches"),
        ("prompts: prompts.jsonl\npolicies: {a: x, b: x y}\n", "policies: 'b' and 'a' overlap: one of 'x' and 'x y'"),
        ("prompts: prompts.jsonl\npolicies: {a: [p, q], b: [r, q s]}\n", "policies: 'b' and 'a' overlap"),
        ("prompts: prompts.jsonl\npolicies: {a: [p, p q]}\n", "policies: 'a' and 'a' overlap"),
        ("prompts: prompts.jsonl\npolicies: {a: ' '}\n", "policies: 'a' has an empty text"),
        ("prompts: prompts.jsonl\npolicies: {a: x}\nbehaviours: {r: s, t: s}\n", "behaviours: 't' and 'r' overlap"),
        ("prompts: prompts.jsonl\npolicies: {a: {regex: ^x}, b: {regex: ^x}}\n", "'b' and 'a' overlap: the same rule"),
        (
            "prompts: prompts.jsonl\npolicies: {a: {table: {A: answer}}}\n",
            "behaviours: policies given by their `table`",
        ),
        (TABLE + "{a: {table: {A: answer}}, b: x}\n", "policies: 'b' announces itself, and 'a' has only its `table`"),
        (TABLE + "{a: {table: {}}}\n", "policies.a.table: cue 'A' is missing"),
        (TABLE + "{a: {table: {A: answer, B: refuse}}}\n", "policies.a.table: no prompt has cue 'B'"),
        (TABLE + "{a: {table: {A: err}}}\n", "policies.a.table.A: 'err' is no behaviour of the suite (refuse, answer)"),
        (TABLE + "{a: {table: {A: 3}}}\n", "policies.a.row.table.A: Input should be a valid string"),
        (TABLE + "{a: {table: {A: answer}, force: x}}\n", "suite.yaml: unknown key 'policies.a.row.force'"),
    ],
)
def test_bad_suites_are_refused_by_name(tmp_path: Path, text: str, message: str):
    with pytest.raises(InputError) as caught:
        load_suite(make(tmp_path, text))
    assert str(caught.value).startswith(str(tmp_path))
    assert message in str(caught.value)


def test_a_force_that_shows_another_policy_and_an_err_that_is_a_behaviour_are_refused(tmp_path: Path):
    text = "prompts: prompts.jsonl\npolicies: {a: {regex: ^x, force: y}, b: {regex: ^y, force: y}}\n"
    with pytest.raises(InputError, match=r"policies\.a\.force: 'y' shows policy 'b', not 'a'"):
        load_suite(make(tmp_path, text))
    text = "prompts: prompts.jsonl\npolicies: {a: x}\nbehaviours: {refuse: sorry}\n"
    with pytest.raises(InputError, match="the `err` of 'q' overlaps with behaviour 'refuse'"):
        load_suite(make(tmp_path, text, [{**ROW, "err": "sorry sorry"}]))


def test_a_bad_regular_expression_is_refused_with_where_and_what(tmp_path: Path):
    text = "prompts: prompts.jsonl\npolicies: {a: {regex: '^(x', force: x}}\n"
    with pytest.raises(InputError, match=r"suite.yaml: policies\.a.*regex: not a regular expression .*\^\(x"):
        load_suite(make(tmp_path, text))
    text = "prompts: prompts.jsonl\npolicies: {a: x}\nanswer_match: regex\n"
    with pytest.raises(InputError, match=r"answer of 'q': not a regular expression .*'\['"):
        load_suite(make(tmp_path, text, [{**ROW, "answer": "["}]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: "),
        ({"id": "r", "cue": "A", "prompt": "x"}, "line 2: key 'answer' is missing"),
        ({**ROW, "promt": "x"}, "line 2: unknown key 'promt'"),
        ({"id": "r", "cue": "A", "answer": "4"}, "line 2: give either `prompt` or `messages`"),
        ({**ROW, "messages": [{"role": "user", "content": "x"}]}, "line 2: give either `prompt` or `messages`"),
        ({**ROW, "id": "r", "spans": {"cue": "<A>"}}, "line 2: spans.cue: '<A>' does not occur in the prompt"),
        (ROW, "prompts: question 'q' occurs twice under cue 'A', hint None"),
        ({**ROW, "id": "r", "err": "5"}, "prompts: 'q' has no `err`, but others have"),
        ({**ROW, "id": "r", "answer": " "}, "prompts: the answer of 'r' is empty"),
        (
            {"id": "r", "cue": "A", "messages": [{"role": "user", "content": "x"}], "answer": "4"},
            "prompts: 'r' has messages, but the suite has no `chat:`; add `chat: {}`",
        ),
    ],
)
def test_bad_prompts_are_refused_by_line_or_id(tmp_path: Path, row: object, message: str):
    with pytest.raises(InputError) as caught:
        load_suite(make(tmp_path, rows=[ROW, row]))
    assert message in str(caught.value)


def test_absent_and_unreadable_files_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"absent\.yaml: no such suite file"):
        load_suite(tmp_path / "absent.yaml")
    with pytest.raises(InputError, match=r"suite\.yaml: no such suite file"):
        load_suite(tmp_path)
    path = make(tmp_path)
    (tmp_path / "prompts.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"prompts\.jsonl: not UTF-8"):
        load_suite(path)
    (tmp_path / "prompts.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match=r"prompts\.jsonl: holds no prompts"):
        load_suite(path)


def test_hinted_prompts_alone_are_refused():
    with pytest.raises(ValidationError, match="every prompt has a hint"):
        suite(prompts=[{**ROW, "hint": "a"}])
    found = suite(prompts=[{**ROW, "hint": "a"}, ROW])
    assert (len(found.neutral), len(found.hinted)) == (1, 1)


# --- labels -----------------------------------------------------------------------------------------------------------

ERR_ROW = PromptRow.model_validate({**ROW, "err": "5"})
LITERAL = suite(prompts=[{**ROW, "err": "5"}], behaviours={"refuse": "sorry"})


@pytest.mark.parametrize(
    ("completion", "label"),
    [
        ("[a] 4", Label("a", 0, "answer", "4")),
        ("  [b]   sorry sorry ", Label("b", 0, "refuse", "sorry sorry")),
        ("[a] 5", Label("a", 0, "err", "5")),
        ("[a] 5 5", Label("a", 0, "answer", "5 5")),
        ("[a]", Label("a", 0, "answer", "")),
        ("4", Label("other", 0, None, "4")),
        ("sorry", Label("other", 0, None, "sorry")),
        ("well [a] 4", Label("other", 0, None, "well [a] 4")),
        ("[a", Label("other", 0, None, "[a")),
        ("", Label("other", 0, None, "")),
    ],
)
def test_labels_of_literals(completion: str, label: Label):
    assert LITERAL.label(completion, ERR_ROW) == label


def test_wordings_are_told_apart_and_the_first_rule_wins():
    found = suite(policies={"a": ["sure", "of course"], "b": {"regex": "(?i)^i (can.t|won.t)"}, "c": {"regex": "no"}})
    row = found.prompts[0]
    assert found.label("of course 4", row) == Label("a", 1, None, "4")
    assert found.label("I WON'T say no", row) == Label("b", 0, None, "say no")
    # found in the middle: the announcement has no end, so the whole text is judged
    assert found.label("well no 4", row) == Label("c", 0, None, "well no 4")
    assert not found.literal
    assert wordings(Rule(regex="x")) == ()
    assert wordings(Rule(regex="x", force="y")) == ("y",)


def test_behaviours_of_a_suite_in_order():
    assert LITERAL.behaviour_names == ("refuse", "err", "answer")
    assert suite().behaviour_names == ()
    assert suite(behaviours={"err": "oops"}, prompts=[{**ROW, "err": "5"}]).behaviour_names == ("err", "answer")


@pytest.mark.parametrize(
    ("match", "answer", "rest", "right"),
    [
        ("exact", "4", " 4 ", True),
        ("exact", "4", "4 4", False),
        ("exact", " 4", "4", True),
        ("contains", "4", "it is 4.", True),
        ("contains", "4", "it is 5.", False),
        ("contains", "4", "it is 14.", False),
        ("contains", "4", "it is 4.5, or 0,4", False),
        ("contains", "4", "not 44, but 4", True),
        ("contains", "4", "2, 4, 6", True),
        ("contains", "imp", "it is simply so", False),
        ("contains", "Paris", "**Paris**", True),
        ("contains", "(4)", "f(4)", True),
        ("contains", "cafe", "cafe\u0301", False),
        ("contains", "\u5317\u4eac", "\u662f\u5317\u4eac\u3002", True),
        ("contains", "Paris", "\u662fParis\u3002", True),
        ("regex", r"\b4\b", "it is 4.", True),
        ("regex", r"\b4\b", "it is 44.", False),
    ],
)
def test_correct_answers(match: str, answer: str, rest: str, right: bool):
    row = {**ROW, "answer": answer}
    assert suite(prompts=[row], answer_match=match).correct(rest, PromptRow.model_validate(row)) is right


def test_a_policy_that_announces_nothing_is_not_told_from_a_completion():
    rows = {"a": {"table": {"A": "answer"}}, "b": {"table": {"A": "refuse"}}, "c": {"table": {"A": "err"}}}
    found = suite(policies=rows, behaviours={"refuse": "sorry"}, prompts=[{**ROW, "err": "5"}])
    for text, behaviour in ((" 4", "answer"), ("sorry 4", "refuse"), ("5", "err"), ("[a] 4", "answer")):
        assert found.label(text, found.prompts[0]) == Label(None, 0, behaviour, text.strip())
    assert found.literal
    assert found.table == {"a": {"A": "answer"}, "b": {"A": "refuse"}, "c": {"A": "err"}}
    assert [wordings(shown) for shown in found.policies.values()] == [(), (), ()]
    assert LITERAL.table is None
    assert not suite(policies=rows, behaviours={"refuse": {"regex": "no"}}, prompts=[{**ROW, "err": "5"}]).literal


@given(st.sampled_from(["[a]", "[b]"]), st.text(alphabet="45 sory[]ab", max_size=12))
def test_what_follows_a_literal_announcement_is_all_that_is_judged(announcement: str, rest: str):
    label = LITERAL.label(f"{announcement} {rest}", ERR_ROW)
    assert label.policy == announcement.strip("[]")
    assert label.rest == rest.strip()
    assert (label.behaviour == "refuse") == rest.strip().startswith("sorry")


# --- token ids --------------------------------------------------------------------------------------------------------


def word_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Words, with a BOS put before everything, as Llama's tokenizer does."""
    words = ["<bos>", "<eos>", "<unk>", "user", "system", "go", "2", "+", "=", "4"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", chat_template=template
    )


TEMPLATE = (
    "{{ bos_token }} {% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt and not quiet %}go{% endif %}"
)


def test_plain_prompts_get_the_tokenizers_bos_and_announcements_do_not():
    assert encode_prompts(suite(), suite().prompts, word_tokenizer()) == [[0, 6, 7, 6, 8]]
    check_spelling("4", "here", word_tokenizer())
    assert word_tokenizer().encode("4", add_special_tokens=False) == [9]


def test_chat_prompts_have_one_bos():
    tokenizer = word_tokenizer(TEMPLATE)
    found = suite(chat={})
    assert encode_prompts(found, found.prompts, tokenizer) == [[0, 3, 6, 7, 6, 8, 5]]
    found = suite(chat={"system": "+ +", "template_kwargs": {"quiet": True}})
    assert encode_prompts(found, found.prompts, tokenizer) == [[0, 4, 7, 7, 3, 6, 7, 6, 8]]
    messages = [{"role": "user", "content": "2"}, {"role": "user", "content": "4"}]
    found = suite(chat={}, prompts=[{"id": "m", "cue": "A", "answer": "4", "messages": messages}])
    assert encode_prompts(found, found.prompts, tokenizer) == [[0, 3, 6, 3, 9, 5]]


def test_a_real_chat_template_takes_system_and_keywords(pairs: Path):
    found, tokenizer = load_suite(pairs / "chat"), load_tokenizer(pairs / "chat" / "S")
    encoded = encode_prompts(found, found.prompts, tokenizer)
    assert len({len(ids) for ids in encoded}) > 5
    text = tokenizer.decode(encoded[0])
    assert text.startswith("<|im_start|>system\nyou are a helpful assistant. be brief.<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    plain = found.model_copy(update={"chat": found.chat.model_copy(update={"template_kwargs": {}})})
    assert "be brief" not in tokenizer.decode(encode_prompts(plain, plain.prompts, tokenizer)[0])


def test_chat_without_a_template_is_refused():
    with pytest.raises(InputError, match="the tokenizer has no chat template; remove `chat:`"):
        encode_prompts(suite(chat={}), suite().prompts, word_tokenizer())


def test_unknown_tokens_are_refused_by_prompt_and_word():
    rows = suite(prompts=[ROW, {**ROW, "cue": "B", "prompt": "2 plus 2 ="}]).prompts
    with pytest.raises(InputError, match=r"prompt 'q' under cue 'B' has unknown tokens \('plus'\): '2 plus 2 ='"):
        encode_prompts(suite(), rows, word_tokenizer())
    with pytest.raises(InputError, match=r"policy 'a' has unknown tokens \('\[a\]'\)"):
        check_spelling("[a]", "policy 'a'", word_tokenizer())


def test_a_tokenizer_that_drops_what_it_cannot_spell_is_refused():
    core = Tokenizer(models.BPE({c: i for i, c in enumerate("24+=# ")}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="#")
    check_spelling("2 + 2", "here", tokenizer)
    assert tokenizer.encode("2 + 2", add_special_tokens=False)
    with pytest.raises(InputError, match=r"here does not survive the tokenizer: '2 × 2' comes back as '2"):
        check_spelling("2 × 2", "here", tokenizer)


def test_prompts_of_every_length_survive_a_byte_level_tokenizer(pairs: Path):
    tokenizer = load_tokenizer(pairs / "chat" / "S")
    for text in ("ünï ✓", "a\nb", "  two  spaces", "I CAN'T"):
        check_spelling(text, "here", tokenizer)
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_copy_with_other_prompts_forgets_the_old_ones() -> None:
    rows = tuple(PromptRow(id=f"q{i}", cue=cue, prompt="2 + 2 =", answer="4") for i in range(3) for cue in "AB")
    suite = Suite(prompts=rows, policies={"a": "[a]", "b": "[b]"})
    assert len(suite.neutral) == 6
    assert suite.cues == ("A", "B")
    fewer = suite.model_copy(update={"prompts": rows[::2]})
    assert len(fewer.neutral) == 3
    assert fewer.cues == ("A",)
