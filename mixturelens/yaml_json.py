"""YAML and JSON lines that people write: read strictly, and written so that every text comes back as it is."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mixturelens.types import InputError


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
        return super().construct_object(node, deep=True)  # whole at once, so that a value that holds itself is refused

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
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

    `missing` is said where there is no such file. Raises InputError naming the file for what is no such YAML.
    """
    try:
        return yaml.load(_text(path, missing), _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from None


def _text(path: Path, missing: str) -> str:
    """A file's text, whatever mark it begins with. Raises InputError naming it."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: {missing}") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder, and a file is needed") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error})") from None


def _whole(text: str) -> str:
    """A text whose characters beyond U+FFFF are one each: JSON writes them as two escapes, which YAML leaves apart."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are each given once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def half_a_character(data: object, where: str = "") -> str | None:
    """What is wrong with the first text in JSON or YAML data that holds half of a surrogate pair, in words; None if
    none does.

    No tokenizer can spell such a text. `where` is the key that the data stand under.
    """
    if isinstance(data, str):
        try:
            data.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"{where or 'a text'}: {data!a} holds half of a character (at {error.start}); the text was cut"
        return None
    inside = data.items() if isinstance(data, Mapping) else enumerate(data) if isinstance(data, (list, tuple)) else ()
    for key, value in inside:
        name = ascii(key).strip("'")
        for part in (key, value):
            found = half_a_character(part, f"{where}.{name}" if where else name)
            if found is not None:
                return found
    return None


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
    for number, line in enumerate(_text(path, missing).split("\n"), start=1):
        if line.strip():
            yield number, _json(line)


def _json(line: str) -> Any:
    try:
        data = json.loads(line, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        return InputError(f"not JSON ({error})")
    except (ValueError, RecursionError) as error:
        return InputError(str(error))
    half = half_a_character(data)
    return data if half is None else InputError(half)
