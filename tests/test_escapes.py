"""Texts of strangers move no cursor and are not run. Pages, figures and cards have tests of this of their own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import Run

import mixturelens
from mixturelens.cli.tables import print_json, print_table, tell
from mixturelens.records import Record
from mixturelens.suite import load_suite
from mixturelens.types import InputError, RunError, loading, running, shown

ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\r\u202eabc\u2028"


def test_what_moves_a_cursor_is_shown_and_not_sent(capsys: pytest.CaptureFixture[str]):
    assert shown("plain ä \U0001f600 \u200d") == "plain ä \U0001f600 \u200d"
    assert shown(ESCAPES) == r"\x1b[2J\x1b]0;title\x07\x9b31m\r\u202eabc\u2028"
    print_table(("name\x1b",), [(ESCAPES,)])
    tell(f"two\nlines {ESCAPES}")
    out, _ = capsys.readouterr()
    assert not set(out) & (set(ESCAPES) - set("abc[]0;titleJm231"))
    assert out.count(r"\x1b[2J") == 2
    assert "two\nlines " in out


def test_a_record_on_standard_output_is_json_that_moves_no_cursor(capsys: pytest.CaptureFixture[str]):
    class Named(Record):
        KIND = "named"
        name: str

    for name in (ESCAPES, "ä"):
        print_json([Named(name=name)], None)
        out, _ = capsys.readouterr()
        assert json.loads(out)["name"] == name
        assert all(line == shown(line) for line in out.split("\n"))
    assert '"ä"' in out


@pytest.mark.parametrize("kind", [InputError, RunError])
def test_a_message_is_one_line_of_bounded_length(kind: type[Exception]):
    said = str(kind(f"a\n b\r\nc {ESCAPES}{'x' * 10**6} end"))
    assert said == shown(said)
    assert said.startswith(r"a b c \x1b[2J")
    assert said.endswith("x end")
    assert len(said) < 2100
    assert kind(*kind(said).args).args == (said,)  # as a process sends it to another


def test_any_error_of_a_library_becomes_one_line():
    class PanicException(BaseException):
        """As libraries in Rust raise it."""

    for error in (KeyError("x"), ZeroDivisionError(), PanicException("y"), RecursionError("deep\nand deeper")):
        with (
            pytest.raises(InputError, match=rf"^file: cannot be read \({type(error).__name__}: "),
            loading("file", "cannot be read"),
        ):
            raise error
        with pytest.raises(RunError, match=rf"^part: failed \({type(error).__name__}: "), running("part", "failed"):
            raise error
    for stop in (KeyboardInterrupt, SystemExit):
        with pytest.raises(stop), loading("file", "cannot be read"):
            raise stop
    with pytest.raises(RunError, match="memory ran out"), loading("file", "cannot be read"):
        raise MemoryError


def test_nothing_stands_beside_the_doors():
    """Text comes in by `files`, weights and tables by libraries in `loading`; nobody else takes all errors."""
    folder = Path(mixturelens.__file__).parent
    opened = re.compile(r"\.read_text\(|\.read_bytes\(|(?<!def )(?<![.\w])open\(|json\.load\(|yaml\.(safe_)?load\(")
    reads, takes = set(), set()
    for file in folder.rglob("*.py"):
        text, name = file.read_text(encoding="utf-8"), file.relative_to(folder).as_posix()
        assert not re.search(r"except Exception|except:", text), name
        reads |= {name} if opened.search(text) else set()
        takes |= {name} if "except BaseException" in text else set()
    # what ships with the package, what the system says, and the hash of a file as large as it may be
    assert reads == {"lab/organism/spec.py", "cli/doctor.py", "limits.py", "models/source.py"}
    assert takes == {"types.py", "records.py"}  # records takes back what is half written, and raises it again


def test_a_labeller_is_named_on_the_command_line_alone(tmp_path: Path, run: Run):
    (tmp_path / "labels.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\ndef is_c(prompt, completion): return 'c'\n"
    )
    for policy in ('{function: "labels:is_c"}', '{python: "labels.py"}', "!!python/object/apply:os.system ['true']"):
        (tmp_path / "suite.yaml").write_text(f"prompts: prompts.jsonl\npolicies: {{c: {policy}, d: x}}\n")
        (tmp_path / "prompts.jsonl").write_text('{"id": "q", "cue": "A", "prompt": "x", "answer": "y"}\n')
        with pytest.raises(InputError, match=r"suite\.yaml: "):
            load_suite(tmp_path)
        assert run("suite", "check", tmp_path)[0] == 2
    assert not (tmp_path / "ran").exists()
