"""The envelope of everything that is written: kind, version, provenance; atomic save, strict load."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import ValidationError

from mixturelens.files import MADE, read_bytes, read_json
from mixturelens.types import Frozen, InputError, loading

_LIBRARIES = ("mixturelens", "torch", "transformers", "trl")


class Provenance(Frozen):
    """Where a record comes from: enough to tell whether two records are about the same thing."""

    before: str | None = None
    """Name and sha256 (16 digits) of the checkpoint before, with its config, tokenizer and template: `sft@1f2e...`."""
    after: str | None = None
    suite: str | None = None
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    versions: dict[str, str] = {}

    def measures_as(self, other: Provenance) -> bool:
        """Whether the same would be measured from it; with which trl, if any, is of no account there."""
        sides = [{**each.versions, "trl": ""} for each in (self, other)]
        return sides[0] == sides[1] and self.model_copy(update={"versions": other.versions}) == other


def with_versions(made: Provenance) -> Provenance:
    """The same provenance, with the versions that are installed here of the libraries that produce numbers."""
    return made.model_copy(update={"versions": {name: found for name in _LIBRARIES if (found := _version(name))}})


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


class Record(Frozen):
    """Base of every record. Subclasses set `KIND` and `VERSION` and add their fields.

    >>> class Count(Record):
    ...     KIND = "count"
    ...     number: int
    >>> Count(number=3).kind
    'count'
    """

    KIND: ClassVar[str] = ""
    VERSION: ClassVar[int] = 1
    INDENT: ClassVar[int | None] = 1
    """None for records of thousands of numbers, which nobody reads line by line."""

    kind: str = ""
    version: int = 0
    provenance: Provenance = Provenance()

    def model_post_init(self, _: Any) -> None:
        """Fill in `kind` and `version` of the class, where they are not given (pydantic calls this)."""
        for field, expected in (("kind", self.KIND), ("version", self.VERSION)):
            if not getattr(self, field):
                object.__setattr__(self, field, expected)

    @classmethod
    def upgraded(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Data of the version before as that of this version, where it can be read as such; else unchanged."""
        return data

    def to_json(self) -> str:
        """JSON with `null` for what was not measured; NaN and infinity are refused rather than written."""
        separators = (",", ":") if self.INDENT is None else None
        data = self.model_dump(mode="json")
        return json.dumps(data, indent=self.INDENT, separators=separators, allow_nan=False, ensure_ascii=False)

    def save(self, path: Path) -> Path:
        """Write the record as JSON, whole or not at all, and return its path. Folders are made as needed."""
        write_text(path, self.to_json() + "\n")
        return path

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a record back, refusing another kind, another version and unknown or missing keys.

        Raises InputError that names the file and the first offending key.
        """
        data = read_json(path, "no such record; run the command that writes it first")
        if data.get("kind") != cls.KIND:
            raise InputError(f"{path}: holds a {data.get('kind')!r} record, expected {cls.KIND!r}")
        if data.get("version") == cls.VERSION - 1:
            with loading(path, f"not a {cls.KIND} record of version {cls.VERSION - 1}"):
                data = cls.upgraded(data)
        if data.get("version") != cls.VERSION:
            raise InputError(
                f"{path}: {cls.KIND} record of version {data.get('version')}, this mixturelens reads version "
                f"{cls.VERSION}; run the command that writes it again"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise InputError(f"{path}: {first_problem(error)}") from None

    @classmethod
    def beside(cls, other: Record, folder: Path) -> Self | None:
        """The record of this kind in the folder of another one, if it is there and about the same weights."""
        file = folder / f"{cls.KIND}.json"
        there = cls.load(file) if file.is_file() else None
        return there if there is not None and there.provenance.measures_as(other.provenance) else None


def first_problem(error: ValidationError) -> str:
    """One line for the first problem of a pydantic error: key, what is wrong, the value."""
    return next(problems_of(error))[1]


def problems_of(error: ValidationError) -> Iterator[tuple[str, str]]:
    """(key, one line) for every problem of a pydantic error: the key, what is wrong, the value."""
    left = list(error.errors())
    while left:
        problem, *left = left
        if problem["loc"][-1:] == ("str",):
            # a text or a mapping was allowed, and a mapping was given: the problem is inside it
            beside = [p for p in left if p["loc"][: len(problem["loc"]) - 1] == problem["loc"][:-1]]
            left = [p for p in left if p not in beside]
            problem = next((p for p in beside if p["loc"][:-2] == problem["loc"][:-1]), problem)
        # a part with a bar before it names the kind of a value, which no key of the file does
        where = ".".join(part for part in map(str, problem["loc"]) if not part.startswith("|")) or "top level"
        if problem["type"] == "extra_forbidden":
            yield where, f"unknown key {where!r}"
        elif problem["type"] == "missing":
            yield where, f"key {where!r} is missing"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            yield where, f"{where}: {message}" if where != "top level" else message


def check_writable(folder: Path) -> None:
    """Raise InputError, before long work, where its results could not be written into a folder, made or to be made."""
    there = next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))
    if there.is_dir() and not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: no permission to write in {there}; give another --out")


@contextlib.contextmanager
def held(path: Path, waits: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold a file or a folder, which need not be there, until the block ends.

    Whoever else wants it, in this process or in another, calls `waits` and waits. A process that is killed holds
    nothing; what is left of its hold (`.<name>.lock`) goes with the next.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name.lstrip('.')}.lock")
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        waits()
        lock.acquire()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()  # while it is held: who waits for it sees that it is gone, and begins anew
        lock.release()


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either there whole or not at all. A byte of a path that is no text is escaped."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """The same for bytes. What a kill leaves of a write (`.<name>.part`) is written over by the next."""
    temporary = path.with_name(f".{path.name}.part")
    with held(path):
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
            with os.fdopen(os.open(temporary, flags, 0o644), "wb") as stream:
                stream.write(content)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def write_new(files: Mapping[Path, str]) -> None:
    """Write files that must not be there. Raises InputError naming those that are; one with the very same text is
    what a start that was killed has left, and no obstacle."""
    there = [str(file) for file, text in files.items() if os.path.lexists(file) and not _says(file, text)]
    if there:
        raise InputError(f"{' and '.join(there)}: there already; nothing was written")
    for file, text in files.items():
        write_text(file, text)


def _says(file: Path, text: str) -> bool:
    try:
        return read_bytes(file, "is gone", MADE) == text.encode("utf-8", "backslashreplace")
    except InputError:
        return False


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name; it takes its real name only when the block ends well.

    One that was there is whole until then. What a kill leaves (`.<name>.part`, `.<name>.old`) goes with the next.
    """
    temporary, old = (path.with_name(f".{path.name}.{state}") for state in ("part", "old"))
    with held(path):
        try:
            _remove(temporary, old)
            temporary.mkdir(mode=0o755)
            yield temporary
            if os.path.lexists(path):
                os.replace(path, old)
            os.replace(temporary, path)
            _remove(old)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _remove(*folders: Path) -> None:
    for folder in folders:
        if os.path.lexists(folder):
            shutil.rmtree(folder)
