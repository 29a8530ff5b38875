"""`suite check` names every mistake made on purpose, and the line that it stands in; `suite init` makes none."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_cli import Run, refused

from mixturelens.models import load_tokenizer
from mixturelens.suite import load_suite
from mixturelens.suite_check import check_suite_file, pitfalls, pitfalls_of_tokens, uneven
from mixturelens.types import InputError

SUITE = """\
prompts: prompts.jsonl
policies:
  a: "[a]"
  b: ["[b]", "(b)"]
behaviours:
  refuse: sorry
trained_cue: A
max_new_tokens: 8
"""
PROMPTS = """\
{"id": "1", "cue": "A", "prompt": "x", "answer": "p"}
{"id": "1", "cue": "B", "prompt": "y", "answer": "p"}
{"id": "2", "cue": "A", "prompt": "x", "answer": "q"}
"""


def written(folder: Path, suite: str = SUITE, prompts: str = PROMPTS) -> Path:
    (folder / "prompts.jsonl").write_text(prompts, encoding="utf-8")
    (folder / "suite.yaml").write_text(suite, encoding="utf-8")
    return folder / "suite.yaml"


def swapped(old: str, new: str) -> dict[str, str]:
    """The suite or its prompts with one piece exchanged."""
    assert (old in SUITE) + (old in PROMPTS) == 1
    return {"suite": SUITE.replace(old, new)} if old in SUITE else {"prompts": PROMPTS.replace(old, new, 1)}


THIRD = '{"id": "2", "cue": "A", "prompt": "x", "answer": "q"}'
MISTAKES = {
    "not YAML": (swapped('"[a]"', '"[a]'), "suite.yaml", 3, "not YAML"),
    "a key twice": (swapped("trained_cue: A", "policies: {}"), "suite.yaml", 7, "'policies' is given twice"),
    "an unknown key": (swapped("max_new_tokens", "max_new_token"), "suite.yaml", 8, "did you mean 'max_new_tokens'?"),
    "a number that is a text": (swapped(": 8", ": eight"), "suite.yaml", 8, "max_new_tokens"),
    "no tokens": (swapped(": 8", ": 0"), "suite.yaml", 8, "greater than or equal to 1"),
    "a cue that no prompt has": (swapped("trained_cue: A", "trained_cue: C"), "suite.yaml", 7, "no prompt has cue 'C'"),
    "an empty announcement": (swapped('a: "[a]"', 'a: ""'), "suite.yaml", 3, "'a' has an empty text"),
    "announcements that overlap": (swapped('"(b)"', '"[a] b"'), "suite.yaml", 4, "'b' and 'a' overlap"),
    "a reserved name": (swapped("  refuse:", "  answer:"), "suite.yaml", 6, "leave it out"),
    "a policy called other": (swapped("  a:", "  other:"), "suite.yaml", 3, "kept for completions of no known policy"),
    "no regular expression": (swapped("sorry", '{regex: "(sorry"}'), "suite.yaml", 6, "not a regular expression"),
    "a rule's unknown key": (swapped("sorry", '{regex: "s", forced: "s"}'), "suite.yaml", 6, "unknown key"),
    "a force that shows something else": (
        swapped('"[a]"', '{regex: "^A", force: "[b]"}'),
        "suite.yaml",
        3,
        "shows policy 'b', not 'a'",
    ),
    "a table beside announcements": (swapped('"[a]"', "{table: {A: answer, B: refuse}}"), "suite.yaml", 4, "announces"),
    "no JSON": (swapped('"id": "2"', '"id": "2'), "prompts.jsonl", 3, "not JSON"),
    "a prompt without a cue": (swapped('"2", "cue": "A"', '"2"'), "prompts.jsonl", 3, "key 'cue' is missing"),
    "a prompt with a slip": (swapped('"2", "cue"', '"2", "cu": 1, "cue"'), "prompts.jsonl", 3, "did you mean 'cue'?"),
    "an empty answer": (swapped('"q"', '" "'), "prompts.jsonl", 3, "the answer of '2' is empty"),
    "a prompt twice": (swapped(THIRD, f"{THIRD}\n{THIRD}"), "prompts.jsonl", 4, "occurs twice under cue 'A'"),
    "an id that is no text": (swapped('"id": "2"', '"id": 2'), "prompts.jsonl", 3, "id"),
    "messages without chat": (
        swapped('"2", "cue": "A", "prompt": "x"', '"2", "cue": "A", "messages": [{"role": "user", "content": "x"}]'),
        "prompts.jsonl",
        3,
        "no `chat:`",
    ),
    "half of a character": (swapped('"q"', '"\\ud83d"'), "prompts.jsonl", 3, "half of a character"),
    "a key of JSON twice": (swapped('"id": "2"', '"id": "2", "id": "3"'), "prompts.jsonl", 3, "'id' is given twice"),
    "an err for some": (swapped('"answer": "q"', '"answer": "q", "err": "r"'), "prompts.jsonl", 1, "has no `err`"),
    "a list": (swapped(THIRD, "[1]"), "prompts.jsonl", 3, "dictionary"),
    "prompts that are not there": (swapped("prompts.jsonl", "none.jsonl"), "none.jsonl", None, "no such prompts file"),
    "no policies": (
        {"suite": "prompts: prompts.jsonl\nbehaviours: {refuse: sorry}\n"},
        "suite.yaml",
        None,
        "'policies' is missing",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    changed, file, line, words = MISTAKES[name]
    path = written(tmp_path, **changed)
    suite, found = check_suite_file(path)
    assert suite is None
    assert any((each.file.name, each.line) == (file, line) and words in each.said for each in found), found
    with pytest.raises(InputError):  # whatever is named here is refused where the suite is used
        load_suite(path)


def test_all_of_them_are_named_at_once(run: Run, tmp_path: Path) -> None:
    suite = SUITE.replace("max_new_tokens: 8", "max_new_tokens: no\nsample: 3").replace('"[a]"', '{regex: "("}')
    prompts = PROMPTS.replace('"cue": "B", ', "") + "nothing\n"
    path = written(tmp_path, suite, prompts)
    _, found = check_suite_file(path)
    assert {(each.file.name, each.line) for each in found} == {
        *(("suite.yaml", line) for line in (3, 8, 9)),
        *(("prompts.jsonl", line) for line in (2, 4)),
    }
    status, out, err = run("suite", "check", path)
    assert (status, out, len(err.splitlines())) == (2, "", 5)
    assert f"{path}: line 9: unknown key 'sample'; did you mean 'samples'?" in err


def test_a_good_suite_is_read_and_its_pitfalls_are_said(tmp_path: Path) -> None:
    suite, found = check_suite_file(written(tmp_path))
    assert found == []
    assert suite == load_suite(tmp_path)
    (few,) = pitfalls(suite)
    assert few.startswith("2 questions are too few")
    rules = (
        SUITE.replace('"[a]"', '{regex: "^a"}')
        .replace("trained_cue: A\n", "")
        .replace("behaviours:\n  refuse: sorry\n", "")
    )
    suite, _ = check_suite_file(
        written(tmp_path, rules, PROMPTS.replace('"id": "1", "cue": "B"', '"id": "3", "cue": "B"'))
    )
    assert suite is not None
    said = " ".join(pitfalls(suite))
    for words in ("policies.a: without `force`", "no `trained_cue`", "no `behaviours`", "samples: 8", "no contrast"):
        assert words in said


def test_slips_in_keys_hide_nothing_else(tmp_path: Path) -> None:
    suite = SUITE.replace("behaviours", "behaviors").replace("trained_cue: A", "trained_cue: C").replace(": 8", ": no")
    _, found = check_suite_file(written(tmp_path, suite, PROMPTS.replace('"q"', '" "')))
    assert {(each.file.name, each.line) for each in found} == {
        *(("suite.yaml", line) for line in (5, 7, 8)),
        ("prompts.jsonl", 3),
    }


@pytest.mark.parametrize(
    ("old", "new", "because", "exact"),
    [
        (
            "max_new_tokens",
            "answer_match: contains\nmax_new_tokens",
            "`answer_match: contains`",
            "`answer_match: exact`",
        ),
        ("max_new_tokens", 'strip: {regex: "x"}\nmax_new_tokens', "`strip`", "no `strip`"),
        ("sorry", '{regex: "sorry"}', "the rule of behaviours.refuse", "literal texts as behaviours"),
    ],
)
def test_literal_policies_that_are_sampled_are_named(
    old: str, new: str, because: str, exact: str, tmp_path: Path
) -> None:
    suite, _ = check_suite_file(written(tmp_path, SUITE.replace(old, new)))
    assert suite is not None
    _, sampled, number = pitfalls(suite)
    assert f"because of {because} all is measured from `samples: 8` completions" in sampled
    assert f"exact with {exact}" in sampled
    assert number.startswith("samples: 8")


def asked(*lines: tuple[str, str]) -> str:
    return "".join(f'{{"id": "{name}", "cue": "{cue}", "prompt": "x", "answer": "p"}}\n' for name, cue in lines)


def test_questions_and_cues_that_may_be_slips_are_named_by_line(tmp_path: Path) -> None:
    names = [str(number) for number in range(6)]
    both = [(name, cue) for name in names for cue in ("A", "heading")]
    assert list(uneven(written(tmp_path, prompts=asked(*both)))) == []
    slip = [(name, "headng" if (name, cue) == ("2", "heading") else cue) for name, cue in both]
    (found,) = uneven(written(tmp_path, prompts=asked(*slip)))
    assert (found.line, found.said) == (6, "cue 'headng' has 1 question, where 'A' has 6; did you mean 'heading'?")
    (found,) = uneven(written(tmp_path, prompts=asked(*both[:4], *both[5:])))
    assert (found.line, found.said.split(",")[0]) == (5, "question '2' has no prompt under 'A'")
    few = [pair for pair in both if pair[1] == "A"] + [(f"b{name}", "heading") for name in names]
    assert list(uneven(written(tmp_path, prompts=asked(*few)))) == []  # other questions under each cue


def test_many_questions_without_a_prompt_are_counted(tmp_path: Path) -> None:
    lines = [(str(number), cue) for number in range(11) for cue in ("A", "B") if cue == "A" or number < 6]
    *named, counted = uneven(written(tmp_path, prompts=asked(*lines)))
    assert [each.line for each in named] == [13, 14, 15]
    assert counted.said == "and 2 more that lack a prompt"


def test_what_instruments_will_not_measure_is_said_from_tokens_alone(pairs: Path) -> None:
    suite, _ = check_suite_file(pairs / "llama")
    assert suite is not None
    tokenizer = load_tokenizer(pairs / "llama" / "S")
    assert list(pitfalls_of_tokens(suite, tokenizer)) == []
    bare = tuple(row.model_copy(update={"spans": {}}) for row in suite.prompts)
    (refused_,) = pitfalls_of_tokens(suite.model_copy(update={"prompts": bare}), tokenizer)
    assert refused_.startswith(
        "no patch, circuit or repair between cues 'A' and 'B': with 'a' in place: question 'q00'"
    )
    assert '"spans": {"cue": "## Question"}' in refused_
    longer = tuple(
        row if row.cue == "A" else row.model_copy(update={"prompt": row.text.replace("<B>", "<B> <B>")}) for row in bare
    )
    circuit, edit = pitfalls_of_tokens(suite.model_copy(update={"prompts": longer}), tokenizer)
    assert circuit.startswith("no circuit between cues 'A' and 'B': the two prompts of a contrast differ in length")
    assert circuit.endswith("question 'q00' has 6 tokens and 7")
    assert edit.startswith("no weight edit in repair between cues 'A' and 'B': the cue lies at other tokens")
    shared = suite.model_copy(update={"policies": {"a": "[a] p", "b": "[a] q"}})
    (same,) = pitfalls_of_tokens(shared, tokenizer)
    assert same.startswith("no S patched into R, and no reroute in repair: the announcements of 'a' and 'b' begin")


def test_a_new_suite_is_right_and_is_not_written_over(run: Run, tmp_path: Path) -> None:
    assert run("suite", "init", tmp_path / "mine")[0] == 0
    assert check_suite_file(tmp_path / "mine")[1] == []
    with (tmp_path / "mine" / "suite.yaml").open("a") as file:
        file.write("# mine\n")
    refused(run("suite", "init", tmp_path / "mine"), "there already")
    assert (tmp_path / "mine" / "suite.yaml").read_text().endswith("# mine\n")


def test_what_the_models_write_is_shown_with_its_labels(run: Run, pairs: Path) -> None:
    folder = pairs / "llama"
    status, out, _ = run("suite", "check", folder, "--before", folder / "S", "--after", folder / "R-both", "--quiet")
    assert status == 0
    assert out.count("[a]") + out.count("[b]") == 16
    assert out.count("q00") == out.count("q19") == 8  # questions from both ends of the file
    assert "note" not in out
