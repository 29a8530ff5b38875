"""Two runs side by side: numbers by hand, pairs that match, and folders that cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_figure_patching import make_patching, make_repair
from test_figures import HOSTILE, around, make_pair
from test_report import Page

import mixturelens as ml
from mixturelens.pages import compare, write_comparison
from mixturelens.pages.compared import differing
from mixturelens.records import Provenance
from mixturelens.types import InputError, Interval


def make_run(folder: Path, pair: str = "S--R", share: float = 0.5, words: str = "", **also) -> Path:
    """An output folder with the records of one pair, whose routing share is as asked."""
    behaviour, verdict = make_pair(words=words)
    made = Provenance(before="S@1", after="R@1")
    verdict = verdict.model_copy(update={"routing_share": around(share), "provenance": made})
    for record in (behaviour, verdict, *also.values()):
        record.model_copy(update={"provenance": made}).save(folder / "records" / pair / f"{record.KIND}.json")
    return folder


def test_a_run_does_not_differ_from_its_copy(tmp_path: Path) -> None:
    record = compare(make_run(tmp_path / "one"), make_run(tmp_path / "two"))
    (pair,) = record.pairs
    assert (record.left, record.right, pair.left) == ("one", "two", "S--R")
    assert len(pair.quantities) > 20
    assert differing(pair) == []
    assert not any(said.differs for said in (*pair.words, *pair.made))


def test_what_differs_is_found_with_its_interval(tmp_path: Path) -> None:
    """Both intervals are 0.01 to either side: that of the difference is sqrt(2) times as wide."""
    left = make_run(tmp_path / "one", share=0.5)
    right = make_run(tmp_path / "two", share=0.7, repair=make_repair(), patching=make_patching())
    (pair,) = compare(left, right).pairs
    (found,) = differing(pair)
    assert (found.about, found.name) == ("verdict", "routing share")
    assert found.difference.known == pytest.approx(0.2)
    assert found.difference.low == pytest.approx(0.2 - 2**0.5 * 0.01)
    assert found.difference.high == pytest.approx(0.2 + 2**0.5 * 0.01)
    (close,) = compare(left, make_run(tmp_path / "three", share=0.513)).pairs
    assert differing(close) == []
    repaired = [each for each in pair.quantities if each.about == "repair"]
    assert repaired
    assert not any(each.left.measured or each.difference.measured for each in repaired)
    readers = next(each for each in pair.words if each.name == "cue reader of R (after)")
    assert (readers.left, readers.right, readers.differs) == ("–", "L0.z.1@policy", False)


def test_records_about_other_weights_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", repair=make_repair())
    file = run / "records" / "S--R" / "repair.json"
    file.write_text(file.read_text().replace("R@1", "R@2"))
    (pair,) = compare(run, make_run(tmp_path / "two", repair=make_repair())).pairs
    assert not any(each.left.measured for each in pair.quantities if each.about == "repair")


def test_pairs_match_by_name_or_as_the_only_ones(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one", "S--R"), make_run(tmp_path / "two", "sft--rl")
    (pair,) = compare(one, two).pairs
    assert (pair.left, pair.right) == ("S--R", "sft--rl")
    make_run(two, "S--R")
    record = compare(one, two)
    assert [each.left for each in record.pairs] == ["S--R"]
    assert record.alone == {"one": (), "two": ("sft--rl",)}
    make_run(tmp_path / "four" / "two", "a--b")
    make_run(tmp_path / "four" / "two", "c--d")
    with pytest.raises(InputError, match=r"no pair of one name .*sft--rl.*a--b, c--d"):
        compare(two, tmp_path / "four" / "two")
    make_run(tmp_path / "four" / "two", "S--R")
    assert compare(two, tmp_path / "four" / "two").right == "four/two"


def test_folders_that_cannot_be_compared(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    with pytest.raises(InputError, match=r"none: no verdict in records/\*/verdict.json"):
        compare(run, tmp_path / "none")
    with pytest.raises(InputError, match="are one folder"):
        compare(run, run)
    file = make_run(tmp_path / "two") / "records" / "S--R" / "behaviour.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"per_cue": {}}))
    with pytest.raises(InputError, match=rf"^{file}: per_cue has no cue 'A', which is one of its cues$"):
        compare(run, tmp_path / "two")


def test_the_page_says_what_the_record_says(tmp_path: Path) -> None:
    left = make_run(tmp_path / "one", f"S--{HOSTILE.replace('/', '')}", share=0.5, words=HOSTILE)
    record, path = ml.compare(left, make_run(tmp_path / "two", share=0.7), tmp_path / "out")
    assert path == tmp_path / "out" / "report.html"
    assert type(record).load(tmp_path / "out" / "comparison.json") == record
    page = Page(path.read_text(encoding="utf-8"))
    words = " ".join(page.text.split())
    assert "both say “both”; 1 of" in words
    assert "verdict routing share 0.500 0.490 to 0.510 0.700 0.690 to 0.710 0.200 0.186 to 0.214 yes" in words
    assert not [link for link in page.links if not link.startswith(("data:", "#"))]
    assert write_comparison(tmp_path / "again.html", record).read_bytes() == path.read_bytes()


def test_a_difference_is_measured_where_both_numbers_are() -> None:
    from mixturelens.stats import difference

    half = Interval(value=0.5, low=0.4, high=0.6)
    assert not difference(half, Interval()).measured
    assert not difference(Interval(value=1.0), half).measured
    same = difference(half, half)
    assert (same.value, same.low, same.high) == (0.0, pytest.approx(-(0.02**0.5)), pytest.approx(0.02**0.5))
