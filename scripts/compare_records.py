"""Compare two folders of records number by number: `python scripts/compare_records.py A B`.

Every JSON file in A or B, in folders below them too, is read in both. A line is printed for every number that differs
by more than 1e-6 (absolutely where it is small, else relatively), and for whatever else differs: a text, a null
against a number, what is there once. `provenance` is left out, which says where numbers come from. Exit status 1 if
anything differs.

What measures the reference run again, on its own checkpoints, and looks for what has moved:

    cp -r artifacts/reference /tmp/again && rm -r /tmp/again/records
    for step in verdict patch probe graft features repair verdict; do mixturelens $step /tmp/again --quiet; done
    python scripts/compare_records.py artifacts/reference/records /tmp/again/records
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

from mixturelens.types import InputError

TOLERANCE = 1e-6


def differences(left: object, right: object, where: str = "") -> Iterator[str]:
    """A line for every leaf in which two JSON values differ: its address, what is left, what is right.

    >>> list(differences({"a": [1.0, 2.0], "b": None}, {"a": [1.0000001, 2.1], "b": 0.0}))
    ['a.1: 2.0, then 2.1', 'b: null, then 0.0']
    """
    if isinstance(left, dict) and isinstance(right, dict):
        yield from _of_parts(left, right, where)
    elif isinstance(left, list) and isinstance(right, list):
        yield from _of_parts(dict(enumerate(left)), dict(enumerate(right)), where)
    elif _is_number(left) and _is_number(right):
        if not math.isclose(left, right, rel_tol=TOLERANCE, abs_tol=TOLERANCE):  # pyright: ignore[reportArgumentType]
            yield f"{where}: {left}, then {right}"
    elif type(left) is not type(right) or left != right:
        yield f"{where}: {_short(left)}, then {_short(right)}"


def _of_parts(left: dict, right: dict, where: str) -> Iterator[str]:
    for key in {**left, **right}:
        inner = f"{where}.{key}" if where else str(key)
        if key not in right:
            yield f"{inner}: {_short(left[key])}, then not there"
        elif key not in left:
            yield f"{inner}: not there, then {_short(right[key])}"
        else:
            yield from differences(left[key], right[key], inner)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:80]}..."


def compare_folders(left: Path, right: Path) -> Iterator[str]:
    """A line, with the name of the file in front, for all that differs between the records in two folders.

    Raises InputError where a folder holds no record, or a file no JSON: nothing compared is not nothing found.
    """
    sides = [{file.relative_to(folder): file for file in folder.rglob("*.json")} for folder in (left, right)]
    for folder, files in zip((left, right), sides, strict=True):
        if not files:
            raise InputError(f"{folder}: no records there")
    for name in sorted({**sides[0], **sides[1]}):
        missing = [folder for folder, files in zip((left, right), sides, strict=True) if name not in files]
        if missing:
            yield f"{name}: not in {missing[0]}"
            continue
        records = [_read(files[name]) for files in sides]
        for line in differences(records[0], records[1]):
            yield f"{name}: {line}"


def _read(file: Path) -> object:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: no JSON ({error})") from None
    return {k: v for k, v in record.items() if k != "provenance"} if isinstance(record, dict) else record


def main() -> None:
    """Print what differs, and how much of it there is."""
    parser = argparse.ArgumentParser(description="Compare two folders of records number by number.")
    parser.add_argument("left", type=Path, metavar="A")
    parser.add_argument("right", type=Path, metavar="B")
    given = parser.parse_args()
    try:
        found = list(compare_folders(given.left, given.right))
    except InputError as error:
        parser.error(str(error))
    print(*found, f"{len(found)} differences", sep="\n")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
