"""Records survive a round trip, refuse what they do not know, and are never half written."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout
from pydantic import ValidationError

from mixturelens import records
from mixturelens.records import (
    Provenance,
    Record,
    check_writable,
    held,
    new_folder,
    with_versions,
    write_new,
    write_text,
)
from mixturelens.types import Frozen, InputError, Interval

FILES = Path(__file__).parent / "files"


class Inner(Frozen):
    size: int


class Count(Record):
    KIND = "count"

    number: int
    share: Interval = Interval()
    inner: Inner = Inner(size=1)


def test_a_stored_record_still_loads():
    record = Count.load(FILES / "count.json")
    assert (record.number, record.share.value, record.inner.size) == (3, None, 2)
    assert record.provenance.versions == {"mixturelens": "0.1.0"}


def test_a_round_trip_gives_the_same_record_and_the_same_file(tmp_path: Path):
    record = Count(number=3, share=Interval(value=0.5, low=0.25, high=1.0))
    path = record.save(tmp_path / "a" / "count.json")
    assert Count.load(path) == record
    assert Count.load(path).save(tmp_path / "again.json").read_bytes() == path.read_bytes()
    data = json.loads(path.read_text())
    assert (data["kind"], data["version"]) == ("count", 1)
    assert data["share"] == {"value": 0.5, "low": 0.25, "high": 1.0}


def test_not_measured_is_null_in_an_object_that_stays():
    assert json.loads(Count(number=1).to_json())["share"] == {"value": None, "low": None, "high": None}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("count-unknown-key.json", "unknown key 'inner.colour'"),
        ("count-missing-key.json", "key 'number' is missing"),
        ("count-future.json", "version 2, this mixturelens reads version 1; run the command that writes it again"),
        ("count-other-kind.json", "holds a 'verdict' record, expected 'count'"),
        ("count-wrong-type.json", "number: "),
        ("count-cut-off.json", "not JSON ("),
        ("count-list.json", "holds [1, 2], where an object is needed"),
        ("count-upside-down.json", "share: low 1.0 is above high 0.5"),
        ("absent.json", "no such record; run the command that writes it first"),
    ],
)
def test_bad_files_are_refused_by_name(name: str, message: str):
    with pytest.raises(InputError) as caught:
        Count.load(FILES / name)
    assert str(caught.value).startswith(str(FILES / name))
    assert message in str(caught.value)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_json_lacks_are_refused_rather_than_written(tmp_path: Path, number: float):
    class Size(Record):
        KIND = "size"
        number: float

    path = tmp_path / "size.json"
    with pytest.raises(ValueError, match="Out of range float values"):
        Size(number=number).save(path)
    assert not path.exists()


def test_records_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Count(number=1).number = 2  # type: ignore[misc]


def _full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class _FullStream:
    """A file on a full disk: the write itself fails."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __enter__(self) -> _FullStream:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    write = staticmethod(_full_disk)


@pytest.mark.parametrize("where", ["write", "replace"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch, where: str):
    path = Count(number=1).save(tmp_path / "count.json")
    with monkeypatch.context() as patch:
        if where == "write":
            patch.setattr(records.os, "fdopen", lambda handle, *_, **__: _FullStream(handle))
        else:
            patch.setattr(records.os, "replace", _full_disk)
        with pytest.raises(OSError, match="No space left"):
            Count(number=2).save(path)
    assert Count.load(path).number == 1
    assert [file.name for file in tmp_path.iterdir()] == ["count.json"]


def test_a_failing_block_leaves_the_old_folder_and_nothing_else(tmp_path: Path):
    with new_folder(tmp_path / "sft") as folder:
        (folder / "a").write_text("old")
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "sft") as folder:
        (folder / "a").write_text((folder / "absent").read_text())
    assert [file.name for file in tmp_path.iterdir()] == ["sft"]
    assert (tmp_path / "sft" / "a").read_text() == "old"
    with new_folder(tmp_path / "sft") as folder:
        (folder / "b").write_text("new")
    assert [file.name for file in (tmp_path / "sft").iterdir()] == ["b"]


def test_files_are_readable_by_others(tmp_path: Path):
    write_text(tmp_path / "x", "ä")
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "x").read_bytes() == "ä".encode()


def test_provenance_names_the_versions_that_produced_numbers():
    found = with_versions(Provenance(before="sft@1", after="rl@2", suite="suite.yaml", seed=7))
    assert (found.before, found.after, found.seed) == ("sft@1", "rl@2", 7)
    assert set(found.versions) == {"mixturelens", "torch", "transformers", "trl"}
    assert with_versions(Provenance(before="sft@1")).after is None


def test_a_byte_of_a_path_that_is_no_text_is_escaped(tmp_path: Path):
    write_text(tmp_path / "file.json", '{"name": "\udcff"}')
    assert (tmp_path / "file.json").read_text() == '{"name": "\\udcff"}'


def _held(path: Path) -> bool:
    """Whether somebody else holds a file."""
    try:
        with FileLock(path.with_name(f".{path.name}.lock"), blocking=False):
            return False
    except Timeout:
        return True


def test_whoever_comes_second_waits_and_says_so(tmp_path: Path):
    path, said, order = tmp_path / "sub" / "record", [], []

    def second() -> None:
        with held(path, lambda: said.append("waits")):
            order.append("second")

    with held(path):
        other = threading.Thread(target=second)
        other.start()
        while not said:
            time.sleep(0.01)
        assert _held(path)
        order.append("first")
    other.join(10)
    assert order == ["first", "second"]
    assert list(tmp_path.rglob("*")) == [tmp_path / "sub"]


def test_what_a_kill_leaves_of_a_write_goes_with_the_next(tmp_path: Path):
    for name in (".count.json.part", ".count.json.lock"):
        (tmp_path / name).write_text("half")
    assert Count.load(Count(number=2).save(tmp_path / "count.json")).number == 2
    for state in ("part", "old"):
        (tmp_path / f".sft.{state}" / "half").mkdir(parents=True)
    with new_folder(tmp_path / "sft") as folder:
        assert list(folder.iterdir()) == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["count.json", "sft"]


def test_a_link_in_place_of_what_is_half_written_is_not_followed(tmp_path: Path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".count.json.part").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic link"):
        Count(number=2).save(tmp_path / "count.json")
    assert (tmp_path / "mine").read_text() == "mine"


def test_new_files_stand_in_the_way_of_none_but_themselves(tmp_path: Path):
    files = {tmp_path / "a": "one", tmp_path / "b": "two"}
    (tmp_path / "a").write_text("one")
    write_new(files)
    write_new(files)
    assert [file.read_text() for file in files] == ["one", "two"]
    (tmp_path / "b").write_text("mine")
    with pytest.raises(InputError, match=f"^{tmp_path / 'b'}: there already; nothing was written$"):
        write_new(files | {tmp_path / "c": "three"})
    assert not (tmp_path / "c").exists()


def test_where_nothing_can_be_written_is_said_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    check_writable(tmp_path / "new" / "folder")
    monkeypatch.setattr(records.os, "access", lambda where, _: where != tmp_path)  # as of a disk that is read-only
    with pytest.raises(InputError, match=rf"folder: no permission to write in {tmp_path}; give another --out$"):
        check_writable(tmp_path / "new" / "folder")
