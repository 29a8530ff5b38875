"""What has been measured of a record that is not whole yet: an instrument that was killed goes on where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import ValidationError

from mixturelens.files import read_json, read_text
from mixturelens.records import write_bytes, write_text
from mixturelens.types import Frozen, InputError, RunError, loading, running

EVERY = 5.0
"""Seconds between two times that arrays are written: what a kill can cost."""

ABOUT = "about"
"""File that says, hashed, what the parts are about."""
SHELF = "shelf-"
"""What the names of folders begin with that are needed for a while."""
FAILED = "failed"
"""How a record says that a part ended in an error, and not in what its pair does not allow."""

F = TypeVar("F", bound=Frozen)
T = TypeVar("T")
Arrays = Mapping[str, np.ndarray]


class Unfinished:
    """Parts of a record, by name, in a folder beside it: whoever asks for one gets it from there, or has it measured.

    `about` says everything that the parts depend on (checkpoints, suite, seed, settings): parts that were measured of
    something else are thrown away. Without a folder nothing is kept.

    >>> parts = Unfinished(None, "nothing")
    >>> parts.arrays("one", lambda: {"x": np.ones(2)})["x"]
    array([1., 1.])
    """

    def __init__(self, folder: Path | None, about: str) -> None:
        self._folder, self._about = folder, hashlib.sha256(about.encode()).hexdigest()
        self._new: dict[str, Arrays] = {}
        self._known: dict[str, Arrays] = {}
        self._written = time.monotonic()
        if folder is None or not folder.is_dir():
            return
        file = folder / ABOUT
        if not file.is_file() or read_text(file, "is gone") != self._about:
            shutil.rmtree(folder)
            return
        for each in folder.glob(f"{SHELF}*"):
            shutil.rmtree(each)
        for each in sorted(folder.glob("*.safetensors")):
            self._known |= _unpacked(each)

    def value(self, name: str, kind: type[F], measure: Callable[[], F]) -> F:
        """A part that is a frozen value: read back, or measured and written at once."""
        if self._folder is None:
            return measure()
        file = self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
        if file.is_file():
            with contextlib.suppress(ValidationError, InputError):  # of code that has changed since: measured again
                return kind.model_validate(read_json(file, "is gone", foreign=True))  # infinities are kept as they are
        found = measure()
        self._start()
        write_text(file, json.dumps(found.model_dump(mode="json")))
        return found

    def arrays(self, name: str, measure: Callable[[], Arrays]) -> Arrays:
        """A part that is arrays by name: read back, or measured. What is new is written every few seconds."""
        if self._folder is None:
            return measure()
        if name not in self._known:
            self._known[name] = self._new[name] = measure()
            if time.monotonic() - self._written > EVERY:
                self.write()
        return self._known[name]

    def write(self) -> None:
        """Write the arrays that are new."""
        if self._folder is None or not self._new:
            return
        from safetensors.numpy import save

        self._start()
        flat = {
            f"{name}\n{key}": np.ascontiguousarray(value) for name, of in self._new.items() for key, value in of.items()
        }
        number = len(list(self._folder.glob("*.safetensors")))
        write_bytes(self._folder / f"{number:06d}.safetensors", save(flat))
        self._new, self._written = {}, time.monotonic()

    @contextlib.contextmanager
    def shelf(self) -> Iterator[Path]:
        """A folder for files that are needed until the block ends; what a kill leaves of it goes with the parts."""
        if self._folder is not None:
            self._start()
        with tempfile.TemporaryDirectory(prefix=SHELF, dir=self._folder) as folder:
            yield Path(folder)

    def done(self) -> None:
        """The record is whole, and written: its parts are not needed any more."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        assert self._folder is not None
        if not (self._folder / ABOUT).is_file():
            write_text(self._folder / ABOUT, self._about)


NOTHING_KEPT = Unfinished(None, "")
"""Where nobody gives a folder."""


def attempt(what: str, measure: Callable[[], T], missing: list[str]) -> T | None:
    """Measure a part that must not cost the others: what its pair does not allow, or what fails, goes to `missing`.

    A record in which a part failed (memory ran out, say) is not `whole`: the part is tried again when the instrument is
    run again. One that the pair does not allow is not.
    """
    try:
        with running(what, FAILED):
            return measure()
    except InputError as error:
        missing.append(f"{what}: {error}")
    except RunError as error:
        missing.append(f"{error}; run again to try it once more")
    return None


def whole(missing: Iterable[str]) -> bool:
    """Whether nothing of a record failed, by what it says is missing."""
    return not any(f": {FAILED} (" in line for line in missing)


def _unpacked(file: Path) -> dict[str, Arrays]:
    from safetensors.numpy import load_file

    found: dict[str, dict[str, np.ndarray]] = {}
    with loading(file, "not the arrays of a part; delete its folder to measure it anew"):
        for name, value in load_file(file).items():
            part, _, key = name.rpartition("\n")
            found.setdefault(part, {})[key] = value
    return dict(found)
