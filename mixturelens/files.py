"""The one door through which files come in: regular files of a bounded size, in UTF-8; YAML and JSON read strictly.

What people write for mixturelens, and what it writes itself, holds keys that are given once, whole characters, numbers
that are finite and fit into 64 bits, and no more levels than a person would write. What other libraries write may hold
larger numbers and infinities. Whatever is not so is an InputError that names the file, and the line or the key.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mixturelens.types import InputError

MB = 1 << 20
WRITTEN = MB // 2
"""Bytes of a file that a person writes: a suite, a spec, a grid, a template."""
MADE = 128 * MB
"""Bytes of a file that programs write: prompts, a record, a tokenizer."""
DEEP = 64
"""Levels of lists and mappings in one another."""
VALUES = 200_000
"""Values of a YAML file, where each is counted as often as it is meant."""
DIGITS = 100
"""Characters of a number in YAML."""
BITS = 63


# --- files ------------------------------------------------------------------------------------------------------------


def read_bytes(path: Path, missing: str, most: int = WRITTEN) -> bytes:
    """What a regular file of at most `most` bytes holds. `missing` is said where there is no such file.

    Raises InputError naming it. Nothing is waited for: a pipe or a device is refused before it is read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            status = os.fstat(handle)
            if stat.S_ISDIR(status.st_mode):
                raise InputError(f"{path}: a folder, and a file is needed")
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{path}: no regular file, and one is needed; copy what it gives into a file")
            if status.st_size > most:
                raise InputError(f"{path}: has {status.st_size} bytes, and {most} are read at most; give a smaller one")
            with os.fdopen(handle, "rb", closefd=False) as stream:
                return stream.read(most + 1)
        finally:
            os.close(handle)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: {missing}") from None
    except (OSError, ValueError) as error:  # no permission, a link to itself, a name that cannot be one
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def read_text(path: Path, missing: str, most: int = WRITTEN) -> str:
    """A file's text, whatever mark it begins with. Raises InputError as `read_bytes` does, or where it is not UTF-8."""
    try:
        return read_bytes(path, missing, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None


# --- YAML -------------------------------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """YAML in which a text comes back as it is: a bare U+0085 would be read as a line's end, and folded."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\x85" in text else None),
)


def dump_yaml(data: object) -> str:
    """Data as YAML, keys in their order."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


class _Loader(yaml.SafeLoader):
    """YAML in which a key is a text, as it is written, and is given once."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        return super().construct_object(node, deep=True)  # whole at once

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        number = node.tag.rpartition(":")[2] in ("int", "float")
        if number and isinstance(node, yaml.ScalarNode) and len(node.value) > DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(node.value)} characters", node.start_mark
            )
        return _whole(super().construct_scalar(node))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        self.flatten_mapping(node)
        found: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a text", key_node.start_mark)
            key = _whole(key_node.value)
            if key in found:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            found[key] = self.construct_object(value_node, deep=deep)
        return found


def read_yaml(path: Path, missing: str) -> Any:
    """Read a YAML file in which a key is a text, as it is written, and is given once.

    `missing` is said where there is no such file. Raises InputError naming file, and line or key.
    """
    return yaml_of(read_text(path, missing), str(path))


def yaml_of(text: str, where: str) -> Any:
    """What a text says, read as `read_yaml` reads a file; `where` names it."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {})
        data = loader.construct_document(node)
    # the last three: PyYAML's own of a tag that does not fit what it stands before, as `!!int {}`
    except (yaml.YAMLError, RecursionError, ArithmeticError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise InputError(f"{where}: not YAML ({error})") from None
    finally:
        if loader is not None:
            loader.dispose()
    problem = problem_of(data)
    if problem is not None:
        raise InputError(f"{where}: {problem}")
    return data


def yaml_lines(path: Path) -> dict[tuple[str, ...], int]:
    """Line of every key of a YAML file that `read_yaml` has read, by the keys that lead to it."""
    found: dict[tuple[str, ...], int] = {}

    def walk(node: Any, at: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                found[(*at, str(key.value))] = key.start_mark.line + 1
                walk(value, (*at, str(key.value)))
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                found[(*at, str(i))] = value.start_mark.line + 1
                walk(value, (*at, str(i)))

    walk(yaml.compose(read_text(path, "is gone"), Loader=yaml.SafeLoader), ())
    return found


def _measure(node: yaml.Node, known: dict[yaml.Node, tuple[int, int]]) -> tuple[int, int]:
    """(values, levels) of a node, where one that others mean counts as often as it is meant; refuses too many."""
    if node in known:
        if known[node] == (0, 0):
            raise yaml.constructor.ConstructorError(None, None, "a value that holds itself", node.start_mark)
        return known[node]
    known[node] = (0, 0)
    below: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        below = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    sizes = [_measure(each, known) for each in below]
    values, levels = 1 + sum(size for size, _ in sizes), 1 + max((deep for _, deep in sizes), default=0)
    if values > VALUES:
        raise yaml.constructor.ConstructorError(None, None, f"more than {VALUES} values", node.start_mark)
    if levels > DEEP:
        raise yaml.constructor.ConstructorError(None, None, f"more than {DEEP} levels", node.start_mark)
    known[node] = values, levels
    return known[node]


def _whole(text: Any) -> Any:
    """A text whose characters beyond U+FFFF are one each: JSON writes them as two escapes, which YAML leaves apart."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass") if text else text


# --- JSON -------------------------------------------------------------------------------------------------------------

_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: Path, missing: str, *, foreign: bool = False) -> dict[str, Any]:
    """Read a JSON object whose keys are each given once. `missing` is said where there is no such file.

    `foreign`: another library wrote it, which may say infinity, and numbers beyond 64 bits. Raises InputError naming
    file and key.
    """
    try:
        data = json_of(read_text(path, missing, MADE), foreign=foreign)
    except ValueError as error:
        raise InputError(f"{path}: {error}; mend it, or have it written again") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: holds {json.dumps(data)[:40]}, where an object is needed")
    return data


def json_of(text: str, *, foreign: bool = False) -> Any:
    """What a text says, read as `read_json` reads a file. Raises ValueError that says what is wrong, and the key."""
    odd: list[str] = []

    def number(kind: type[int | float], usual: float) -> Any:
        def read(digits: str) -> int | float:
            found = kind(digits)
            if not -usual < found < usual:
                odd.append(digits)
            return found

        return read

    def constant(name: str) -> float:
        odd.append(name)
        return float(name)

    try:
        data = json.loads(
            text,
            object_pairs_hook=_once,
            parse_int=number(int, math.inf if foreign else 2**BITS),
            parse_float=number(float, math.inf),
            parse_constant=constant,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    except RecursionError:
        raise ValueError(f"not JSON (more than {DEEP} levels)") from None
    if odd or _HALF.search(text) or _too_deep(data):
        problem = problem_of(data, foreign=foreign)
        if problem is not None:
            raise ValueError(problem)
    return data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are each given once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def _too_deep(data: Any) -> bool:
    level = [data]
    for _ in range(DEEP):
        level = [
            each
            for holder in level
            if isinstance(holder, (dict, list))
            for each in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(each, (dict, list))
        ]
        if not level:
            return False
    return True


def json_lines(path: Path, missing: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, what it says) of every line of a file of JSON objects; empty lines are skipped.

    `missing` is said where there is no such file. Raises InputError naming file and line for what is no JSON, or no
    text that a tokenizer can spell.
    """
    for number, data in json_objects(path, missing):
        where = f"{path}: line {number}"
        if isinstance(data, InputError):
            raise InputError(f"{where}: {data}")
        yield where, data


def json_objects(path: Path, missing: str) -> Iterator[tuple[int, Any]]:
    """(line, what it says) of every line that is not empty; what is wrong with a line is an InputError in its place.

    `missing` is said where there is no such file. Raises InputError for a file that cannot be read.
    """
    # not splitlines: a text may hold separators of lines that JSON does not escape
    lines = (found[0] for found in re.finditer(r"[^\n]*\n?", read_text(path, missing, MADE)))
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, json_of(line)
            except ValueError as error:
                yield number, InputError(str(error))


# --- data -------------------------------------------------------------------------------------------------------------


def problem_of(data: object, where: str = "", *, foreign: bool = False, deep: int = 0) -> str | None:
    """What is wrong with the first value in JSON or YAML data that no file may hold, in words; None if all is well.

    `where` is the key that the data stand under. No tokenizer can spell half of a surrogate pair.
    """
    here = where or "top level"
    if isinstance(data, str):
        try:
            data.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"{where or 'a text'}: {data!a} holds half of a character (at {error.start}); the text was cut"
        return None
    if data is None or isinstance(data, bool):
        return None
    if isinstance(data, int):
        if foreign or -(2**BITS) <= data < 2**BITS:
            return None
        return f"{here}: a number that does not fit into 64 bits; give a smaller one"
    if isinstance(data, float):
        if math.isfinite(data) or (foreign and not math.isnan(data)):
            return None
        return f"{here}: is {data}, where a finite number is needed"
    if not isinstance(data, (Mapping, list)):
        return f"{here}: a {type(data).__name__}, which is neither text nor number; put it in quotes"
    if deep == DEEP:
        return f"{here}: more than {DEEP} levels"
    for key, value in data.items() if isinstance(data, Mapping) else enumerate(data):
        name = ascii(key).strip("'")
        for part in (key, value):
            found = problem_of(part, f"{where}.{name}" if where else name, foreign=foreign, deep=deep + 1)
            if found is not None:
                return found
    return None
