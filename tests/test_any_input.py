"""Whatever lies in a file or stands in an argument: it is read and sensible, or refused in one line that names it.

Never another exception, a hang, all memory, or a file that is left behind. Kinds of trouble that this found have tests
of their own, beside those of what reads the file.
"""

from __future__ import annotations

import contextlib
import faulthandler
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hostile import KINDS, Kind, spoil
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixturelens.limits import limited
from mixturelens.types import InputError, RunError, shown

SECONDS = 15.0
MEMORY = 3 << 30


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of valid files for each kind, by its number."""
    home = tmp_path_factory.mktemp("valid")
    for number, kind in enumerate(KINDS):
        (home / str(number)).mkdir()
        kind.make(home / str(number))
    return home


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Work that must end: what does not listen ends the tests, with the place where it was."""
    faulthandler.dump_traceback_later(120, exit=True)
    try:
        with limited(SECONDS, MEMORY), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries, about what they were given
            yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def outcome(kind: Kind, folder: Path) -> str | None:
    """What is said of the files of a folder; None where they are read."""
    before = sorted(folder.parent.rglob("*"))
    try:
        with watched():
            assert kind.read(folder), "not sensible"
        said = None
    except (InputError, RunError) as error:
        said = str(error)
        assert said == shown(said), "not one line, or not safe to print"
        assert len(said) < 3000
        assert str(folder) in said or said.startswith("prompt "), said
    assert sorted(folder.parent.rglob("*")) == before, "something was left behind"
    return said


def test_what_is_valid_is_read(valid: Path):
    for number, kind in enumerate(KINDS):
        assert outcome(kind, valid / str(number)) is None, kind.file


def one(valid: Path, number: int, pick: Callable[[int], int]) -> None:
    folder = valid / f"spoiled-{number}"
    shutil.copytree(valid / str(number), folder)
    try:
        spoil(folder / KINDS[number].file, pick)
        outcome(KINDS[number], folder)
    finally:
        shutil.rmtree(folder)


@settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, len(KINDS) - 1), st.randoms(use_true_random=False))
def test_what_is_spoiled_is_read_or_refused(valid: Path, number: int, draw: random.Random):
    one(valid, number, draw.randrange)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, len(KINDS) - 1), st.randoms(use_true_random=False))
def test_what_is_spoiled_is_read_or_refused_however_it_is_spoiled(valid: Path, number: int, draw: random.Random):
    one(valid, number, draw.randrange)
