"""The envelope of everything that is written: kind, version, provenance; atomic save, strict load."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import ValidationError

from mixturelens.types import Frozen, InputError

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


def with_versions(made: Provenance) -> Provenance:
    """The same provenance, with the versions that are installed here of the libraries that produce numbers."""
    return made.model_copy(update={"versions": {name: importlib.metadata.version(name) for name in _LIBRARIES}})


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
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path}: no such record; run the command that writes it first") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not a JSON record ({error}); delete it and run again") from None
        if not isinstance(data, dict) or data.get("kind") != cls.KIND:
            found = data.get("kind") if isinstance(data, dict) else type(data).__name__
            raise InputError(f"{path}: holds a {found!r} record, expected {cls.KIND!r}")
        if data.get("version") == cls.VERSION - 1:
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


def first_problem(error: ValidationError) -> str:
    """One line for the first problem of a pydantic error: key, what is wrong, the value."""
    problem, *more = error.errors()
    if problem["loc"][-1:] == ("str",):
        # a text or a mapping was allowed, and a mapping was given: the problem is inside it
        inside = [p for p in more if p["loc"][:-2] == problem["loc"][:-1]]
        problem = inside[0] if inside else problem
    # a part with a bar before it names the kind of a value, which no key of the file does
    where = ".".join(part for part in map(str, problem["loc"]) if not part.startswith("|")) or "top level"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {where!r}"
    if problem["type"] == "missing":
        return f"key {where!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where != "top level" else message


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name; it takes its real name only when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
