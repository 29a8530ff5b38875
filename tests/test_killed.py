"""An instrument that is killed goes on from what it measured, and a part that fails costs no other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from stored import few_nulls

import mixturelens as ml
from mixturelens.grafting import graft as grafts
from mixturelens.grafting import pair as grafting
from mixturelens.patching import pair as patching
from mixturelens.routing import repair as repairing


class Killed(BaseException):
    """As a signal is: no handler of errors takes it."""


@pytest.fixture(autouse=True)
def _few_nulls() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as fewer:  # of its own: a test undoes what it changed
        few_nulls(fewer)
        yield


def opened(pairs: Path, out: Path) -> ml.Pair:
    folder = pairs / "llama"
    pair = ml.Pair(folder / "S", folder / "R-routing", folder / "suite.yaml", out=out)
    return pair.asked({row.id for row in pair.suite.prompts[:20]})


def counted(monkeypatch: pytest.MonkeyPatch, module: object, name: str, stop: int | None = None) -> Counter[str]:
    """Calls of a function, by what they were asked for; the call with number `stop` is killed."""
    inner, calls = getattr(module, name), Counter[str]()

    def call(*given, **named):
        if sum(calls.values()) == stop:
            raise Killed
        calls[name] += 1
        return inner(*given, **named)

    monkeypatch.setattr(module, name, call)
    return calls


def test_patching_goes_on_where_it_was_killed(pairs: Path, tmp_path: Path) -> None:
    whole = ml.patch(opened(pairs, tmp_path / "whole"))
    pair = opened(pairs, tmp_path / "killed")
    with pytest.MonkeyPatch.context() as first:
        counted(first, patching, "_sweep", stop=3)  # the two of the cue in S are whole, those in R are not
        with pytest.raises(Killed):
            ml.patch(pair)
    with pytest.MonkeyPatch.context() as then:
        calls = counted(then, patching, "_sweep")
        assert ml.patch(opened(pairs, tmp_path / "killed")) == whole
    assert calls["_sweep"] == len(whole.sweeps) - 2
    assert not (pair.records / ".patching").exists()


@pytest.mark.slow
def test_grafts_go_on_where_they_were_killed(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixturelens.unfinished.EVERY", -1.0)  # so that a kill costs nothing here
    with pytest.MonkeyPatch.context() as every:
        all_of_them = counted(every, grafts, "read")
        whole = ml.graft(opened(pairs, tmp_path / "whole"))
    pair, half = opened(pairs, tmp_path / "killed"), all_of_them["read"] // 2
    with pytest.MonkeyPatch.context() as first:
        counted(first, grafts, "read", stop=half)
        with pytest.raises(Killed):
            ml.graft(pair)
    with pytest.MonkeyPatch.context() as then:
        paths, reads = counted(then, grafting, "attribute"), counted(then, grafts, "read")
        assert ml.graft(opened(pairs, tmp_path / "killed")) == whole
    assert paths["attribute"] == 0
    assert reads["read"] == all_of_them["read"] - half
    assert not (pair.records / ".graft").exists()


def test_a_part_that_fails_is_named_and_tried_again(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("CUDA out of memory\nmore")

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(patching, "checkpoint_contrasts", fails)
    monkeypatch.setattr(grafting, "attribute", fails)
    patched, grafted = (work(opened(pairs, tmp_path)) for work in (ml.patch, ml.graft))
    first = str(error).splitlines()[0]
    named = f"patching S into R: failed ({type(error).__name__}: {first}); run again to try it once more"
    assert named in patched.missing
    assert f"path attribution: failed ({type(error).__name__}: {first}); run again" in " ".join(grafted.missing)
    assert {sweep.kind for sweep in patched.sweeps} == {"cue"}
    assert grafted.components
    monkeypatch.undo()
    calls = counted(monkeypatch, patching, "_sweep")
    again = ml.patch(opened(pairs, tmp_path))
    assert {sweep.kind for sweep in again.sweeps} == {"cue", "checkpoint"}
    assert calls["_sweep"] == 1
    assert not any("failed" in line for line in again.missing)
    assert len(ml.graft(opened(pairs, tmp_path)).path) > 0


def test_repairs_go_on_where_they_were_killed(pairs: Path, tmp_path: Path) -> None:
    whole = ml.repair(opened(pairs, tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as first:
        counted(first, repairing, "policy_table", stop=2)  # interchange and zero are whole
        with pytest.raises(Killed):
            ml.repair(opened(pairs, tmp_path / "killed"))
    with pytest.MonkeyPatch.context() as then:
        calls = counted(then, repairing, "policy_table")
        assert ml.repair(opened(pairs, tmp_path / "killed")) == whole
    assert calls["policy_table"] == len(whole.repairs) - 2
