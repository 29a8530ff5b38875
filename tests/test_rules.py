"""Rules of a suite mean what `re` says they mean, and end."""

from __future__ import annotations

import re
import time
import warnings

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mixturelens import rules
from mixturelens.rules import compiled, search, without
from mixturelens.suite import PromptRow, Suite
from mixturelens.types import InputError

# dotless i is İ to `re` where case does not count, and to nobody else
TEXTS = st.text(alphabet="aAbßſK1 .\n{}e<=|()-éİΣς\u0660", max_size=12)
ATOMS = st.sampled_from(
    [
        *(
            "a",
            "b",
            "1",
            " ",
            ".",
            "A",
            "ß",
            "é",
            "İ",
            "Σ",
            r"\d",
            r"\w",
            r"\s",
            r"\b",
            r"\.",
            "[ab]",
            "[^a]",
            "[a-f1]",
        ),
        *("(?:a|b)", "(a)", "^", "$", "{e}", "{", "}", "a{2}", "a{1,2}", "a{,2}", "a{}", "b*?", "a+", "a?", "(?i:A)"),
        *("(?=a)", "(?<!a)", "|"),
    ]
)
RULES = st.builds(
    lambda flag, atoms: flag + "".join(atoms),
    st.sampled_from(["", "(?i)", "(?s)", "(?m)", "(?is)"]),
    st.lists(ATOMS, max_size=6),
)


@settings(max_examples=500, deadline=None)
@given(RULES, TEXTS)
def test_a_rule_finds_what_re_finds(rule: str, text: str):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            expected = re.compile(rule)
    except (re.error, Warning):
        with pytest.raises(ValueError, match="not a regular expression"):
            compiled(rule)
        return
    try:
        found = search(rule, text)
    except ValueError:  # `regex` reads less than `re` in a corner; that is refused, not read as something else
        assume(False)
    there = expected.search(text)
    assert (found and (found.span(), found.groups())) == (there and (there.span(), there.groups()))
    assert without(rule, text) == expected.sub("", text)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second is long where there is much to do."""
    monkeypatch.setattr(rules, "SECONDS", 0.1)


@pytest.mark.usefixtures("short")
def test_a_rule_that_takes_forever_is_stopped_and_named():
    rule = r"^(a|aa)+$"
    began = time.process_time()
    with pytest.raises(InputError, match=r"takes more than 0\.1 s on a text of 61 characters") as caught:
        search(rule, "a" * 60 + "c")
    assert repr(rule) in str(caught.value)
    assert "write one of them out" in str(caught.value)
    with pytest.raises(InputError):
        without(rule, "a" * 60 + "c")
    assert time.process_time() - began < 5


def test_a_rule_that_takes_all_memory_is_refused_before():
    for rule in ("((a{1000}){1000}){1000}", "(a{2000,}){2000}"):
        with pytest.raises(ValueError, match="multiply to more than 1000000"):
            compiled(rule)
    assert compiled(r"\d{4}-\d{2}-\d{2}").search("on 2024-01-31")


@pytest.mark.parametrize(
    "rule", ["(", "[[:alpha:]]", "[a--b]", "(?P<n>a)(?P<n>b)", r"\p{L}", "(?R)", "(" * 5000, "a{99999999999}"]
)
def test_what_re_does_not_read_or_will_read_otherwise_is_refused(rule: str):
    with pytest.raises(ValueError, match="not a regular expression"):
        compiled(rule)


def test_braces_are_text_where_re_says_so():
    """To `regex`, `{e}` asks for near matches."""
    assert search("a{e}", "ab") is None
    assert search("a{e}", "xa{e}").span() == (1, 5)
    assert search(r"\\boxed{i<=1}", r"\boxed{i<=1}")
    assert search(r"\N{EM DASH}{2}", "——")


@pytest.mark.usefixtures("short")
def test_a_suite_with_such_a_rule_is_refused_or_stopped():
    row = PromptRow(id="q", cue="A", prompt="x", answer="4")
    slow = {"regex": r"^(a|aa)+$", "force": "a" * 60 + "c"}
    with pytest.raises(ValueError, match=r"policies\.a\.force: regex .* takes more than 0\.1 s"):
        Suite.model_validate({"prompts": [row], "policies": {"a": slow, "b": "x"}})
    suite = Suite.model_validate({"prompts": [row], "policies": {"a": {"regex": slow["regex"]}, "b": "x"}})
    with pytest.raises(InputError, match=r"takes more than 0\.1 s"):
        suite.label("a" * 60 + "c", row)
    answers = Suite.model_validate(
        {"prompts": [row.model_copy(update={"answer": "(a|aa)+$"})], "policies": {"b": "x"}, "answer_match": "regex"}
    )
    with pytest.raises(InputError, match=r"takes more than 0\.1 s"):
        answers.correct("a" * 60 + "c", answers.prompts[0])
