"""The door through which files come in: what is no regular file, too large, or no strict YAML or JSON, stays out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mixturelens.files import MADE, VALUES, WRITTEN, dump_yaml, json_of, read_json, read_text, read_yaml, yaml_of
from mixturelens.types import InputError


def refused(read: Callable[[], object], within: float = 5.0) -> str:
    began = time.process_time()
    with pytest.raises(InputError) as caught:
        read()
    assert time.process_time() - began < within
    return str(caught.value)


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_regular_file_is_read_whatever_mark_it_begins_with(tmp_path: Path):
    file = tmp_path / "file"
    file.write_bytes("\ufeffä\r\n".encode())
    assert read_text(file, "absent") == "ä\r\n"
    (tmp_path / "link").symlink_to(file)
    assert read_text(tmp_path / "link", "absent") == "ä\r\n"


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    for name, said in (
        ("pipe", "no regular file, and one is needed; copy what it gives into a file"),
        ("device", "no regular file, and one is needed; copy what it gives into a file"),
        ("loop", "cannot be read (Too many levels of symbolic links)"),
        ("folder", "a folder, and a file is needed"),
        ("absent", "missing"),
        ("folder/absent", "missing"),
        ("x" * 300, "cannot be read (File name too long)"),
    ):
        assert refused(lambda name=name: read_text(tmp_path / name, "missing")) == f"{tmp_path / name}: {said}"
    assert refused(lambda: read_text(Path("a\0b"), "missing")) == r"a\x00b: cannot be read (embedded null byte)"


def test_a_file_that_is_larger_than_any_is_refused_before_it_is_read(tmp_path: Path):
    file = tmp_path / "file"
    file.touch()
    os.truncate(file, 1 << 42)  # holes, which take no room
    assert refused(lambda: read_text(file, "")) == (
        f"{file}: has {1 << 42} bytes, and {WRITTEN} are read at most; give a smaller one"
    )
    assert f"and {MADE} are read at most" in refused(lambda: read_json(file, ""))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path):
    (tmp_path / "file").touch(mode=0)
    assert refused(lambda: read_text(tmp_path / "file", "")).endswith("cannot be read (Permission denied)")


def test_what_is_not_utf8_is_refused_by_its_place(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"abc\xff")
    assert refused(lambda: read_text(tmp_path / "file", "")) == (
        f"{tmp_path / 'file'}: not UTF-8 (invalid start byte at byte 3); save it as UTF-8"
    )


# --- YAML -------------------------------------------------------------------------------------------------------------


def bomb(levels: int, merge: bool = False) -> str:
    """A value of ten parts, each of which is the value before: a few lines that mean 10 to the power of `levels`."""
    lines = ["a0: &a0 {k0: x}"]
    for n in range(1, levels):
        lines.append(
            f"a{n}: &a{n} "
            + (f"{{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" if merge else f"[{', '.join([f'*a{n - 1}'] * 10)}]")
        )
    return "\n".join(lines)


@pytest.mark.parametrize("merge", [False, True])
def test_a_few_lines_that_mean_a_billion_values_are_refused(merge: bool):
    assert f"not YAML (more than {VALUES} values" in refused(lambda: yaml_of(bomb(10, merge), "here"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: " + "[" * 70 + "]" * 70, "more than 64 levels"),
        ("a: " + "[" * 5000, "maximum recursion depth exceeded"),
        ("a: " + "1:" * 300_000 + "1", "a number of 600001 characters"),
        ("a: " + "1:" * 40 + "1.5", None),
        ("a: 0x_", "invalid literal for int()"),
        ("a: !!int {}", "not YAML ("),
        ("a: !!float []", "not YAML ("),
        ("a: !!timestamp x", "not YAML ("),
        ("a: !!bool x", "not YAML ("),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("a: !!binary aGk=", "a: a bytes, which is neither text nor number; put it in quotes"),
        ("a: [1, 2024-01-01]", "a.1: a date, which is neither text nor number; put it in quotes"),
        ("a: {b: .inf}", "a.b: is inf, where a finite number is needed"),
        ("a: {b: .nan}", "a.b: is nan, where a finite number is needed"),
        ("a: 9223372036854775808", "a: a number that does not fit into 64 bits; give a smaller one"),
        ('a: "\\ud800"', "holds half of a character"),
        ("a: b\na: c", "key 'a' is given twice"),
        ("<<: {a: 1}\na: 2", "key 'a' is given twice"),
    ],
)
def test_yaml_that_is_not_plain_is_refused_by_line_or_key(text: str, said: str | None):
    if said is None:
        yaml_of(text, "here")
        return
    found = refused(lambda: yaml_of(text, "here"))
    assert found.startswith("here: ")
    assert said in found


def test_yaml_that_is_plain_is_read_as_it_is_written(tmp_path: Path):
    (tmp_path / "x.yaml").write_text("a: &a [1, 1.5, true, ~, x]\nb: *a\n2024: {<<: {c: 1}, d: 2}\n")
    one = [1, 1.5, True, None, "x"]
    assert read_yaml(tmp_path / "x.yaml", "") == {"a": one, "b": one, "2024": {"c": 1, "d": 2}}
    assert yaml_of("", "here") is None
    assert yaml_of(dump_yaml({"a": "x\x85y", "b": "\U0001f600"}), "here") == {"a": "x\x85y", "b": "\U0001f600"}


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": {"b": NaN}}', "a.b: is nan, where a finite number is needed"),
        ('{"a": [1, -Infinity]}', "a.1: is -inf, where a finite number is needed"),
        ('{"a": 1e999}', "a: is inf, where a finite number is needed"),
        ('{"a": 9223372036854775808}', "a: a number that does not fit into 64 bits; give a smaller one"),
        (f'{{"a": {"9" * 5000}}}', "Exceeds the limit (4300 digits)"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' is given twice"),
        (f'{{"a": {"[" * 70}{"]" * 70}}}', "more than 64 levels"),
        ("[" * 100_000, "not JSON (more than 64 levels)"),
        ('{"a": "\\ud83d"}', r"a: '\ud83d' holds half of a character (at 0); the text was cut"),
        ("{", "not JSON (Expecting property name"),
    ],
)
def test_json_that_is_not_plain_is_refused_by_key(text: str, said: str):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        json_of(text)
    assert said in str(caught.value)


def test_json_of_other_libraries_may_say_more_but_no_nan(tmp_path: Path):
    file = tmp_path / "config.json"
    file.write_text('{"length": 1000000000000000019884624838656, "limit": Infinity}')
    assert read_json(file, "", foreign=True) == {"length": 1000000000000000019884624838656, "limit": float("inf")}
    assert refused(lambda: read_json(file, "")) == (
        f"{file}: length: a number that does not fit into 64 bits; give a smaller one; mend it, or have it written "
        "again"
    )
    file.write_text('{"eps": NaN}')
    assert "eps: is nan" in refused(lambda: read_json(file, "", foreign=True))
    file.write_text("[1]")
    assert refused(lambda: read_json(file, "")) == f"{file}: holds [1], where an object is needed"


def test_both_halves_of_a_character_are_one():
    assert json_of(json.dumps({"a": "\U0001f600"})) == {"a": "\U0001f600"}
