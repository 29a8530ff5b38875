"""The circuit to look at: as an element, in a notebook, and as files."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
from test_figure_patching import make_circuit, make_circuit_record, make_circuits, make_patching
from test_figures import HOSTILE
from test_report import Page

import mixturelens as ml
from mixturelens.features.record import FeatureRecord
from mixturelens.routing.circuit import CircuitRecord
from mixturelens.types import InputError

REFERENCE = Path(__file__).parents[2] / "artifacts" / "reference" / "records" / "sft--rl-A"


def data_of(text: str) -> dict:
    (packed,) = re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)
    return json.loads(packed)


def test_a_notebook_shows_the_page_in_a_frame_of_its_own() -> None:
    view = ml.circuit_view(make_circuit_record())
    shown = view._repr_html_()
    assert "<script" not in shown, "a notebook's own page runs nothing of it"
    (inside,) = re.findall(r'srcdoc="(.*?)"></iframe>', shown, re.DOTALL)
    assert html.unescape(inside) == view.page()
    assert not [link for link in Page(view.page()).links if not link.startswith(("data:", "#"))]
    assert view._repr_svg_().startswith("<svg")


def test_the_kind_is_the_first_or_the_one_asked_for() -> None:
    record = make_circuit_record()
    assert {of.kind for of in ml.circuit_view(record).drawing.circuits} == {"cue"}
    assert {of.kind for of in ml.circuit_view(record, "hint").drawing.circuits} == {"hint"}
    with pytest.raises(InputError, match=r"there is no circuit of the checkpoint \(it was not looked for\)"):
        ml.circuit_view(record, "checkpoint")
    nothing = CircuitRecord(circuits=(), overlaps=(), missing=("cue, before: prompts differ in length",))
    with pytest.raises(InputError, match=r"there is no circuit \(cue, before: prompts differ in length"):
        ml.circuit_view(nothing)


def test_hostile_names_stay_text() -> None:
    plain, hostile = (ml.circuit_view(make_circuit_record(words)).page() for words in ("", HOSTILE))
    assert Page(hostile).tags == Page(plain).tags
    assert HOSTILE in data_of(hostile)["words"][0]


def test_attention_of_patching_is_shown_where_the_circuit_keeps_none() -> None:
    record = CircuitRecord(circuits=make_circuits()[:2], overlaps=())
    data = data_of(ml.circuit_view(record, patching=make_patching()).html("x"))
    known = {name: looks for side in data["sides"].values() for name, looks in side["looks"].items()}
    assert list(known) == ["L0.h1@2"]
    attention = make_patching().attention[0]
    assert known["L0.h1@2"][0] == {str(i): x for i, x in enumerate(attention.under["A"]) if x >= 0.01}


def test_features_stand_behind_the_nodes_that_write_them() -> None:
    record = CircuitRecord.load(REFERENCE / "circuit.json")
    cards = FeatureRecord.load(REFERENCE / "features.json").cards
    names = [f"card-{i}" for i in range(len(cards))]
    view = ml.circuit_view(record, features=FeatureRecord.load(REFERENCE / "features.json"), anchors=names)
    found = {each["title"]: each for each in view.features}
    assert found["L2.mlp_out@7 feature 59"]["node"] == "L2.mlp"
    assert found["L2.mlp_out@7 feature 59"]["at"] == 7
    assert found["L1.resid_pre@8 feature 12"]["node"] == "L0.mlp", "what it leaves behind is what layer 1 reads"
    assert found["L2.attn_out@7 feature 60"] | {"why": ""} == {
        "node": "L2.h",
        "whole": False,
        "at": 7,
        "title": "L2.attn_out@7 feature 60",
        "why": "",
        "anchor": "card-1",
    }


def test_the_reference_run_says_where_its_heads_look() -> None:
    for of in CircuitRecord.load(REFERENCE / "circuit.json").circuits:
        writers = {(edge.sender, edge.position) for edge in of.edges if ".h" in edge.sender}
        assert {(look.head, look.position) for look in of.looks} == writers
        assert all(0.8 < sum(side.values()) <= 1.001 for look in of.looks for side in (look.clean, look.corrupt))


BEGINS = {"c.svg": b"<svg", "c.html": b"<!doctype html>", "c.json": b"{", "c.PNG": b"\x89PNG", "c.pdf": b"%PDF"}


@pytest.mark.parametrize(("name", "begins"), BEGINS.items())
def test_files_are_written_by_their_ending(tmp_path: Path, name: str, begins: bytes) -> None:
    if name.lower().endswith(("png", "pdf")):
        pytest.importorskip("vl_convert", reason="not installed: pip install '.[export]'")
    path = ml.circuit_view(make_circuit_record()).save(tmp_path / "new" / name)
    assert path.read_bytes().startswith(begins)


def test_a_size_is_that_of_the_picture(tmp_path: Path) -> None:
    view = ml.circuit_view(CircuitRecord(circuits=(make_circuit(),), overlaps=()))
    drawn = [view.save(tmp_path / f"{size}.svg", size).read_text().count('<g class="edge') for size in (1, 2, 3)]
    assert [each - drawn[0] for each in drawn] == [0, 1, 2]


def test_other_endings_are_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = ml.circuit_view(make_circuit_record())
    with pytest.raises(InputError, match=r"c.jpg: a circuit is written as .svg"):
        view.save(tmp_path / "c.jpg")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"c.png: vl-convert-python makes it: in a clone, pip install '\.\[export\]'"):
        view.save(tmp_path / "c.png")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_is_of_one_side() -> None:
    view = ml.circuit_view(CircuitRecord(circuits=make_circuits()[:1], overlaps=()))
    assert view.graph("x", "before")["metadata"]["slug"] == "x"
    with pytest.raises(InputError, match=r"there is no circuit of R \(after\)"):
        view.graph("x")
