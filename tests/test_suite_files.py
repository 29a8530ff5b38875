"""Suite files: what they cannot say is refused by file and line or key, and what is read and saved is what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mixturelens.suite import Label, PromptRow, Suite, load_suite
from mixturelens.types import InputError

BASE = "prompts: prompts.jsonl\npolicies: {a: '[a]', b: '[b]'}\n"
POLICIES = "prompts: prompts.jsonl\npolicies: "
CHAT = f"{BASE}chat: {{}}\n"
ROW = {"id": "q", "cue": "A", "prompt": "2 + 2 =", "answer": "4"}
LINE = json.dumps(ROW)
OTHER = json.dumps({**ROW, "id": "r"})


def make(folder: Path, text: str | bytes = BASE, lines: str | bytes = LINE) -> Path:
    for name, content in (("suite.yaml", text), ("prompts.jsonl", lines)):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / "suite.yaml"


def refused(folder: Path, text: str | bytes = BASE, lines: str | bytes = LINE) -> str:
    """What is said of a file, without the folder: one line."""
    with pytest.raises(InputError) as caught:
        load_suite(make(folder, text, lines))
    said = str(caught.value)
    assert said.startswith(f"{folder}/")
    assert "\n" not in said
    return said.removeprefix(f"{folder}/")


def suite(**changes: Any) -> Suite:
    return Suite.model_validate({"prompts": [ROW], "policies": {"a": "[a]", "b": "[b]"}, **changes})


# --- YAML -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        (f"{BASE}policies: {{c: x}}\n", "policies", 3),
        (POLICIES + "\n  a: x\n  b: y\n  a: z\n", "a", 5),
        (POLICIES + "{yes: x, 'yes': y}\n", "yes", 2),
        (f"{BASE}chat: {{template_kwargs: {{x: {{y: 1, y: 2}}}}}}\n", "y", 3),
    ],
)
def test_a_key_given_twice_is_named_with_its_line(tmp_path: Path, text: str, key: str, line: int):
    said = refused(tmp_path, text)
    assert said.startswith(f"suite.yaml: not YAML (key {key!r} is given twice")
    assert f"line {line}, " in said


def test_keys_are_texts_as_they_are_written(tmp_path: Path):
    names = ["yes", "no", "on", "~", "null", "2024", "2024-01-01", "01", "1e3", "0x1", "1.0", "12:30"]
    pairs = ", ".join(f"{name}: text {number} end" for number, name in enumerate(names))
    found = load_suite(make(tmp_path, f"{POLICIES}{{{pairs}}}\n"))
    assert found.policies == {name: f"text {number} end" for number, name in enumerate(names)}


@pytest.mark.parametrize("value", ["yes", "no", "2024", "1.5", "12:30", "~", ""])
def test_values_that_yaml_takes_for_something_else_are_refused_by_key(tmp_path: Path, value: str):
    string = "Input should be a valid string"
    assert refused(tmp_path, f"{POLICIES}{{a: {value}, b: y}}\n") == f"suite.yaml: policies.a.shown.str: {string}"
    assert (
        refused(tmp_path, f"{BASE}behaviours: {{refuse: {value}}}\n") == f"suite.yaml: behaviours.refuse.str: {string}"
    )
    said = refused(tmp_path, f"{POLICIES}{{a: [x, {value or '~'}], b: y}}\n")
    assert said == f"suite.yaml: policies.a.shown.tuple[str, ...].1: {string}"
    if value not in ("~", ""):  # nothing there is no cue
        rows = json.dumps({**ROW, "cue": value})
        assert refused(tmp_path, f"{BASE}trained_cue: {value}\n", rows) == f"suite.yaml: trained_cue: {string}"
        assert load_suite(make(tmp_path, f"{BASE}trained_cue: '{value}'\n", rows)).trained_cue == value


@pytest.mark.parametrize(("value", "kind"), [("2024-01-01", "date"), ("!!binary aGk=", "bytes"), ("!!set {x}", "set")])
def test_values_that_json_does_not_know_are_refused_by_key(tmp_path: Path, value: str, kind: str):
    said = refused(tmp_path, f"{POLICIES}{{a: {value}, b: y}}\n")
    assert said == f"suite.yaml: policies.a: a {kind}, which is neither text nor number; put it in quotes"
    said = refused(tmp_path, f"{CHAT.replace('{}', '{template_kwargs: {x: [1, ' + value + ']}}')}")
    assert said.startswith(f"suite.yaml: chat.template_kwargs.x.1: a {kind}, ")


def test_a_day_that_does_not_exist_and_a_number_without_end_are_refused(tmp_path: Path):
    for value in ("2024-13-45", "9" * 5000, "0x_"):
        said = refused(tmp_path, f"{POLICIES}{{a: {value}, b: y}}\n")
        assert said.startswith("suite.yaml: ")


def test_brackets_without_quotes_are_a_list_of_one_wording(tmp_path: Path):
    found = load_suite(make(tmp_path, f"{POLICIES}{{a: [a], b: [b, c]}}\n"))
    assert found.policies == {"a": ("a",), "b": ("b", "c")}


@pytest.mark.parametrize(
    "text",
    [
        POLICIES + "&x {a: *x}\n",
        POLICIES + "&x\n  a: [*x]\n",
        "&x\nprompts: prompts.jsonl\npolicies: {a: x}\nchat: *x\n",
        f"{BASE}chat: {{template_kwargs: &x {{y: *x}}}}\n",
        f"{BASE}chat: {{template_kwargs: {{y: &x [*x]}}}}\n",
        f"{BASE}chat: {{template_kwargs: {{x: {'[' * 3000}{']' * 3000}}}}}\n",
    ],
    ids=["a mapping", "a list", "all", "a keyword", "a list of keywords", "deep"],
)
def test_what_holds_itself_or_is_too_deep_is_refused(tmp_path: Path, text: str):
    assert refused(tmp_path, text).startswith("suite.yaml: not YAML (")


def test_a_value_may_be_given_once_and_meant_twice(tmp_path: Path):
    text = f"{POLICIES}{{a: &x [p, q], b: r}}\nbehaviours: {{refuse: *x}}\n"
    assert load_suite(make(tmp_path, text)).behaviours == {"refuse": ("p", "q")}
    assert "found undefined alias 'y'" in refused(tmp_path, f"{POLICIES}*y\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{BASE}chat: !!python/object/apply:os.system ['true']\n", "could not determine a constructor for the tag"),
        (POLICIES + "{a: !!python/tuple [x, y]}\n", "could not determine a constructor for the tag"),
        (POLICIES + "{a: !text x}\n", "could not determine a constructor for the tag '!text'"),
        (POLICIES + "\n\ta: x\n", "found character '\\t' that cannot start any token"),
        (POLICIES + "\n  a:\tx\n", "found character '\\t' that cannot start any token"),
        (POLICIES + "{[a, b]: x}\n", "a key must be a text"),
        (f"{BASE}---\n{BASE}", "expected a single document"),
        (f"{BASE}\0", "unacceptable character #x0000"),
    ],
)
def test_other_yaml_is_refused_in_one_line(tmp_path: Path, text: str, said: str):
    found = refused(tmp_path, text)
    assert found.startswith("suite.yaml: not YAML (")
    assert said in found


@pytest.mark.parametrize("key", ["samples", "max_new_tokens"])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("-3", "Input should be greater than or equal to 1"),
        ("0", "Input should be greater than or equal to 1"),
        ("6.5", "Input should be a valid integer"),
        ("many", "Input should be a valid integer"),
        ("yes", "Input should be a valid integer"),
        (".inf", "is inf, where a finite number is needed"),
        ("[8]", "Input should be a valid integer"),
    ],
)
def test_numbers_that_count_nothing_are_refused_by_key(tmp_path: Path, key: str, value: str, said: str):
    assert refused(tmp_path, f"{BASE}{key}: {value}\n").startswith(f"suite.yaml: {key}: {said}")


def test_a_folder_in_the_place_of_the_prompts_is_refused(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    assert refused(tmp_path, BASE.replace("prompts.jsonl", "folder/.")).startswith("folder: ")
    assert refused(tmp_path, BASE.replace("prompts.jsonl", "3")).endswith("`prompts: FILE.jsonl` and `policies:`")


# --- half of a character, marks, ends of lines ------------------------------------------------------------------------


@pytest.mark.parametrize("key", [*ROW, "hint", "err"])
def test_half_of_a_character_in_a_row_is_refused_by_line_and_key(tmp_path: Path, key: str):
    row = {**ROW, "id": "r", key: "cut \ud83d"}
    said = refused(tmp_path, lines=f"{LINE}\n{json.dumps(row)}\n")
    assert said == f"prompts.jsonl: line 2: {key}: 'cut \\ud83d' holds half of a character (at 4); the text was cut"


def test_half_of_a_character_elsewhere_is_refused_with_its_place(tmp_path: Path):
    half = "holds half of a character"
    for text, where in (
        (POLICIES + '{a: "x\\ud83d", b: y}\n', "policies.a: 'x\\ud83d'"),
        (POLICIES + '{a: [x, "\\udc00"], b: y}\n', "policies.a.1: '\\udc00'"),
        (POLICIES + '{"a\\ud83d": x, b: y}\n', "policies.a\\ud83d: 'a\\ud83d'"),
        (f'{BASE}behaviours: {{refuse: {{regex: "\\ude00"}}}}\n', "behaviours.refuse.regex: '\\ude00'"),
        (f'{BASE}trained_cue: "\\ude00"\n', "trained_cue: '\\ude00'"),
        (f'{BASE}chat: {{template_kwargs: {{x: ["\\ude00"]}}}}\n', "chat.template_kwargs.x.0: '\\ude00'"),
    ):
        assert refused(tmp_path, text).startswith(f"suite.yaml: {where} {half}")
    turns = [{"role": "user", "content": "cut \ud83d"}]
    lines = json.dumps({"id": "m", "cue": "A", "answer": "4", "messages": turns})
    assert refused(tmp_path, CHAT, lines).startswith(f"prompts.jsonl: line 1: messages.0.content: 'cut \\ud83d' {half}")
    lines = json.dumps({**ROW, "spans": {"\ud83d": "2"}})
    assert refused(tmp_path, lines=lines).startswith(f"prompts.jsonl: line 1: spans.\\ud83d: '\\ud83d' {half}")


def test_both_halves_of_a_character_are_one(tmp_path: Path):
    """JSON writes a face as two escapes; a suite may be JSON, which is YAML."""
    face = "\U0001f600"
    data = {"prompts": "prompts.jsonl", "policies": {face: f"{face}:", "b": "[b]"}}
    found = load_suite(make(tmp_path, json.dumps(data), json.dumps({**ROW, "prompt": f"{face} =", "cue": face})))
    assert found.policies == {face: f"{face}:", "b": "[b]"}
    assert (found.prompts[0].prompt, found.cues) == (f"{face} =", (face,))


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"])
def test_separators_inside_a_text_do_not_end_its_line(tmp_path: Path, separator: str):
    rows = [{**ROW, "prompt": f"a{separator}b"}, {**ROW, "id": "r"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    found = load_suite(make(tmp_path, lines=lines))
    assert [row.prompt for row in found.prompts] == [f"a{separator}b", "2 + 2 ="]
    # and an error behind it is named by the line that an editor shows
    assert refused(tmp_path, lines=f"{lines}{{").startswith("prompts.jsonl: line 3: not JSON (")


def test_marks_and_ends_of_lines_of_other_systems_are_read(tmp_path: Path):
    two = f"{LINE}\n{OTHER}\n"
    plain = load_suite(make(tmp_path, lines=two))
    assert len(plain.prompts) == 2
    mark = "\ufeff".encode()
    assert load_suite(make(tmp_path, mark + BASE.encode(), mark + two.encode())) == plain
    windows = [text.replace("\n", "\r\n").encode() for text in (BASE, two)]
    assert load_suite(make(tmp_path, *windows)) == plain
    assert load_suite(make(tmp_path, BASE, f"\n{two}\n  \n")) == plain
    assert refused(tmp_path, BASE.encode("utf-16")).startswith("suite.yaml: not UTF-8 (")
    assert refused(tmp_path, lines=LINE.encode("utf-16")).startswith("prompts.jsonl: not UTF-8 (")


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('{"id": "q", "cue": "A", "prompt": "x", "prompt": "y", "answer": "4"}', "prompt"),
        ('{"id": "q", "cue": "A", "prompt": "x", "answer": "4", "spans": {"cue": "x", "cue": "x"}}', "cue"),
        ('{"id": "q", "cue": "A", "answer": "4", "messages": [{"role": "user", "content": "x", "role": "y"}]}', "role"),
    ],
)
def test_a_key_given_twice_in_a_row_is_named_with_its_line(tmp_path: Path, line: str, key: str):
    said = refused(tmp_path, CHAT, f"\n{OTHER}\n{line}\n")
    assert said == f"prompts.jsonl: line 3: key {key!r} is given twice"


@pytest.mark.parametrize("value", [2024, True, None, 1.5, ["A"], {"A": "B"}])
@pytest.mark.parametrize("key", ["id", "cue", "answer"])
def test_what_is_no_text_in_a_row_is_refused_by_line_and_key(tmp_path: Path, key: str, value: object):
    said = refused(tmp_path, lines=json.dumps({**ROW, key: value}))
    assert said == f"prompts.jsonl: line 1: {key}: Input should be a valid string"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"from": "human", "value": "x"}], "messages.0: has 'from', 'value' and no 'role'; give `role` and `content`"),
        ([{"content": "x"}], "messages.0: has 'content' and no 'role'; give `role` and `content`"),
        ([{"role": "user", "text": "x"}], "messages.0: has 'role', 'text' and no 'content'; give `role` and `content`"),
        (
            [{"role": "user", "content": "x"}, {"role": "assistant", "value": "y"}],
            "messages.1: has 'role', 'value' and no 'content'; give `role` and `content`",
        ),
        ([{}], "messages.0: has nothing and no 'role'; give `role` and `content`"),
        ([], "messages: empty; give at least one message"),
        (["x"], "messages.0: Input should be a valid dictionary"),
        ({"role": "user", "content": "x"}, "messages: Input should be a valid tuple"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
            "messages.0.content: Input should be a valid string",
        ),
        ([{"role": "user", "content": None}], "messages.0.content: Input should be a valid string"),
    ],
)
def test_messages_that_no_template_can_read_are_refused_by_line_and_place(tmp_path: Path, messages: Any, said: str):
    lines = f"{LINE}\n{json.dumps({'id': 'm', 'cue': 'A', 'answer': '4', 'messages': messages})}\n"
    assert refused(tmp_path, CHAT, lines) == f"prompts.jsonl: line 2: {said}"


def test_sharegpt_files_are_refused_by_their_key(tmp_path: Path):
    row = {"id": "m", "cue": "A", "answer": "4", "conversations": [{"from": "human", "value": "x"}]}
    assert refused(tmp_path, CHAT, json.dumps(row)) == "prompts.jsonl: line 1: unknown key 'conversations'"
    row = {"id": "m", "cue": "A", "answer": "4", "messages": [{"role": "user", "content": "x", "name": "y"}]}
    assert load_suite(make(tmp_path, CHAT, json.dumps(row))).prompts[0].text == "x"


def test_a_row_that_is_too_deep_or_too_long_is_refused(tmp_path: Path):
    deep = f"{LINE}\n{'[' * 100_000}"
    assert refused(tmp_path, lines=deep).startswith("prompts.jsonl: line 2: not JSON (more than 64 levels)")
    long = LINE.replace('"4"', "9" * 5000)
    assert refused(tmp_path, lines=long).startswith("prompts.jsonl: line 1: Exceeds the limit (4300 digits)")
    for line in ("[1]", '"x"', "null", json.dumps([ROW])):
        assert refused(tmp_path, lines=line).startswith("prompts.jsonl: line 1: Input should be a valid dictionary")
    assert refused(tmp_path, lines=json.dumps(ROW, indent=1)).startswith("prompts.jsonl: line 1: not JSON (")


# --- saved and loaded -------------------------------------------------------------------------------------------------


def saved(found: Suite, folder: Path) -> dict[str, Any]:
    """What the file of a suite says once it is saved; loaded again it is the same suite."""
    found.save(folder / "suite.yaml")
    assert load_suite(folder / "suite.yaml") == found
    return yaml.safe_load((folder / "suite.yaml").read_text(encoding="utf-8"))


def test_keys_that_say_nothing_are_not_written(tmp_path: Path):
    data = saved(suite(), tmp_path)
    assert data == {
        "prompts": "prompts.jsonl",
        "policies": {"a": "[a]", "b": "[b]"},
        "answer_match": "exact",
        "max_new_tokens": 16,
        "samples": 8,
    }
    assert saved(suite(ends="either", strip=None, spelling={}), tmp_path) == data
    row = json.loads((tmp_path / "prompts.jsonl").read_text())
    assert row == ROW


@pytest.mark.parametrize(
    ("changes", "written"),
    [
        ({"strip": {"regex": "(?s)^.*?</think>"}}, {"strip": {"regex": "(?s)^.*?</think>"}}),
        ({"ends": "after"}, {"ends": "after"}),
        ({"ends": ("<|im_end|>", "<end>")}, {"ends": ["<|im_end|>", "<end>"]}),
        (
            {"spelling": {"lead": {"A": (" ", "\n")}, "gap": {"[a]": ("", "\u0085")}}},
            {"spelling": {"lead": {"A": [" ", "\n"]}, "gap": {"[a]": ["", "\u0085"]}}},
        ),
        (
            {"chat": {"template_kwargs": {"x": [None, 1, True, "yes", {"y": None}]}, "template_of": "after"}},
            {"chat": {"template_kwargs": {"x": [None, 1, True, "yes", {"y": None}]}, "template_of": "after"}},
        ),
    ],
)
def test_what_a_suite_says_of_strip_ends_and_spelling_is_saved(tmp_path: Path, changes: dict, written: dict):
    data = saved(suite(**changes), tmp_path)
    assert {key: data[key] for key in written} == written
    text = f"{BASE}{yaml.safe_dump(written)}"
    assert load_suite(make(tmp_path, text)) == suite(**changes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("strip: {regex: '('}", "strip.regex: not a regular expression (missing ), unterminated"),
        ("strip: '<think>.*</think>'", "strip: Input should be a valid dictionary"),
        ("strip: {regexp: x}", "strip.regex"),
        ("strip: {}", "key 'strip.regex' is missing"),
        ("ends: [1]", "ends"),
        ("ends: '<end>'", "ends"),
        ("ends: {x: y}", "ends"),
    ],
)
def test_bad_strip_and_ends_are_refused_by_key(tmp_path: Path, text: str, said: str):
    found = refused(tmp_path, f"{BASE}{text}\n")
    assert found.startswith("suite.yaml: ")
    assert said in found


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
words = texts.filter(lambda text: text.strip())
spaces = st.lists(st.text(" \n\t\u0085\u2028", max_size=3), max_size=3, unique=True).map(tuple)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_text_is_saved_and_loaded_again(data: st.DataObject, scratch: Path):
    draw = data.draw
    names = draw(st.lists(words.filter(lambda name: name != "other"), min_size=2, max_size=2, unique=True))
    first, second = draw(words), draw(words)
    cue = draw(texts)
    row = {"id": draw(texts), "cue": cue, "prompt": draw(texts), "answer": draw(words), "hint": draw(st.none())}
    changes = {
        "prompts": [row],
        "policies": {names[0]: first, names[1]: (second,)},
        "behaviours": draw(st.none() | words.filter(lambda name: name != "answer").map(lambda name: {name: second})),
        "trained_cue": draw(st.none() | st.just(cue)),
        "ends": draw(st.sampled_from(["either", "before", "after"]) | st.lists(texts, max_size=2)),
        "strip": draw(st.none() | st.just({"regex": "(?s)^.*?</think>"})),
        "chat": draw(st.none() | texts.map(lambda text: {"system": text, "template_kwargs": {"key": [text, None]}})),
        "spelling": {"lead": {cue: draw(spaces)}, "gap": {first: draw(spaces)}},
    }
    try:
        found = Suite.model_validate(changes)
    except ValidationError:  # texts that begin each other
        assume(False)
        return
    found.save(scratch / "suite.yaml")
    assert load_suite(scratch / "suite.yaml") == found


# --- what is cut out --------------------------------------------------------------------------------------------------

THOUGHT = {"regex": "(?s)<think>.*?</think>"}
RULES = {"a": {"regex": r"^\[a\]", "force": "[a]"}, "b": {"regex": "(?i)^of course"}}


@pytest.mark.parametrize("policies", [{"a": "[a]", "b": "Of course"}, RULES], ids=["literals", "rules"])
def test_a_thought_is_cut_before_a_completion_is_judged(policies: dict[str, Any]):
    found = suite(policies=policies, behaviours={"refuse": "sorry"}, strip=THOUGHT)
    row = found.prompts[0]
    for completion, label in (
        ("<think>[b] or\nrather [a]?</think>\n\n[a] 4", Label("a", 0, "answer", "4")),
        ("<think></think>[a] sorry", Label("a", 0, "refuse", "sorry")),
        ("[a] <think>4 or 5</think> 4", Label("a", 0, "answer", "4")),
        ("<think>x</think>Of course 4<think>y</think>", Label("b", 0, "answer", "4")),
        ("[a] 4", Label("a", 0, "answer", "4")),
        # a thought that never ended is no answer
        ("<think>[a] 4", Label("other", 0, None, "<think>[a] 4")),
        ("<think>[a] 4</think>", Label("other", 0, None, "")),
    ):
        assert found.label(completion, row) == label
    assert found.correct(found.label("<think>5</think> [a] 4", row).rest, row)
    plain = suite(policies=policies, behaviours={"refuse": "sorry"})
    assert plain.label("<think>x</think>[a] 4", row).policy == "other"


def test_where_something_is_cut_out_probabilities_are_not_exact():
    assert suite(behaviours={"refuse": "sorry"}).literal
    assert not suite(behaviours={"refuse": "sorry"}, strip=THOUGHT).literal


def test_the_whole_of_a_completion_is_judged_without_its_thought_where_policies_announce_nothing():
    tables = {"a": {"table": {"A": "answer"}}, "b": {"table": {"A": "refuse"}}}
    found = suite(policies=tables, behaviours={"refuse": "sorry"}, strip=THOUGHT)
    row = PromptRow.model_validate(ROW)
    assert found.label("<think>sorry</think> 4", row) == Label(None, 0, "answer", "4")
    assert found.label("<think>4</think> sorry", row) == Label(None, 0, "refuse", "sorry")


def test_a_force_is_judged_without_its_thought(tmp_path: Path):
    """With the thought in the way, it would show no policy."""
    text = f"{POLICIES}{{a: {{regex: '^yes', force: '<think></think> yes'}}}}\n"
    assert (
        refused(tmp_path, text) == "suite.yaml: policies.a.force: '<think></think> yes' shows policy 'other', not 'a'"
    )
    assert load_suite(make(tmp_path, f"{text}strip: {{regex: '(?s)<think>.*?</think>'}}\n")).policies["a"]
