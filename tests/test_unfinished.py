"""Parts of a record that is not whole yet: what was measured is there again, and nothing of something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixturelens import unfinished
from mixturelens.records import Provenance
from mixturelens.types import Frozen
from mixturelens.unfinished import Unfinished


class Part(Frozen):
    number: float


def never() -> dict[str, np.ndarray]:
    return pytest.fail("measured again")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.text(min_size=1).filter(lambda name: "\n" not in name), unique=True, min_size=1, max_size=5),
    values=st.lists(st.floats(allow_nan=False), min_size=1, max_size=4),
)
def test_what_was_measured_comes_back_to_the_bit(tmp_path: Path, names: list[str], values: list[float]) -> None:
    folder = tmp_path / str(abs(hash((*names, *values))))
    first = Unfinished(folder, "this")
    for name in names:
        first.arrays(name, lambda: {"x": np.array(values), "one": np.ones((1, 2))})
    first.value("part", Part, lambda: Part(number=values[0]))
    first.write()
    again = Unfinished(folder, "this")
    for name in names:
        np.testing.assert_array_equal(again.arrays(name, never)["x"], values)
        assert again.arrays(name, never)["one"].shape == (1, 2)
    assert again.value("part", Part, lambda: pytest.fail("measured again")) == Part(number=values[0])
    again.done()
    assert not folder.exists()


def test_parts_of_something_else_are_thrown_away(tmp_path: Path) -> None:
    first = Unfinished(tmp_path / "parts", "this")
    first.arrays("a", lambda: {"x": np.zeros(1)})
    first.write()
    other = Unfinished(tmp_path / "parts", "that")
    assert other.arrays("a", lambda: {"x": np.ones(1)})["x"] == 1


def test_arrays_are_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfinished, "EVERY", -1.0)
    first = Unfinished(tmp_path / "parts", "this")
    for name in "abc":
        first.arrays(name, lambda: {"x": np.zeros(1)})
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) == 3
    assert Unfinished(tmp_path / "parts", "this").arrays("c", never)["x"] == 0


def test_without_a_folder_nothing_is_kept() -> None:
    parts = Unfinished(None, "this")
    assert parts.value("part", Part, lambda: Part(number=1)).number == 1
    assert parts.arrays("a", lambda: {"x": np.ones(1)})["x"] == 1
    assert parts.arrays("a", lambda: {"x": np.zeros(1)})["x"] == 0
    parts.write()
    parts.done()


def test_what_only_trains_makes_no_other_measurement() -> None:
    made, now = Provenance(versions={"torch": "2", "trl": "1"}), Provenance(versions={"torch": "2"})
    assert made.measures_as(now)
    assert now.measures_as(made)
    assert not made.measures_as(Provenance(versions={"torch": "3", "trl": "1"}))
    assert not made.measures_as(Provenance(versions={"torch": "2", "trl": "1"}, seed=1))
