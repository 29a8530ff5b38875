"""Suites of one question and of two: too few for an interval, and no command may trip over that."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from stored import few_nulls

from mixturelens.grafting.record import GraftRecord
from mixturelens.patching.record import PatchingRecord
from mixturelens.routing import repair
from mixturelens.routing.circuit import CircuitRecord
from mixturelens.routing.repair import RepairRecord

PAIR = Path(__file__).with_name("pairs") / "llama_spelled"

HALVES = "mixturelens: probes are fitted on one half of the questions and scored on the other: give at least four"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def on_pair(monkeypatch: pytest.MonkeyPatch, run: Run) -> Run:
    """Run a command on the pair in this process; (exit status, standard output, standard error).

    Whatever warns, fails: the tests turn warnings into errors.
    """
    few_nulls(monkeypatch)
    monkeypatch.setattr(repair, "NATS", (16.0,))
    monkeypatch.setattr(repair, "AMOUNTS", (1.0,))

    def call(command: str, folder: Path, *more: object) -> tuple[int, str, str]:
        pair = ["--before", PAIR / "S", "--after", PAIR / "R", "--suite", folder / "suite.yaml"]
        return run(command, *pair, "--out", folder / "out", *more, "--quiet")

    return call


def put_suite(folder: Path, questions: list[int], cues: str = "AB") -> Path:
    """The first of the stored suites' questions; its prompts differ in length."""
    lines = (PAIR / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [(line, json.loads(line)) for line in lines]
    kept = [line for line, row in rows if int(row["id"][1:]) in questions and row["cue"] in cues]
    assert len(kept) == len(questions) * len(cues)
    (folder / "prompts.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    shutil.copyfile(PAIR / "suite.yaml", folder / "suite.yaml")
    return folder


def record_of(kind: type, folder: Path, name: str):
    return kind.load(folder / "out" / "records" / "S--R" / f"{name}.json")


def refused(found: tuple[int, str, str]) -> str:
    """Status 2, and one line on standard error."""
    status, out, err = found
    assert (status, out) == (2, ""), err
    (line,) = (each for each in err.splitlines() if each.strip())
    return line


def test_one_question(on_pair: Run, tmp_path: Path):
    folder = put_suite(tmp_path, [0])
    status, out, err = on_pair("verdict", folder, "--json")
    assert (status, err) == (0, "")
    record = json.loads(out)
    assert record["verdict"] == "inconclusive"
    assert record["reason"] == "The suite cannot say: 1 questions are too few for an interval (8 are needed)."
    status, out, err = on_pair("patch", folder)
    assert (status, err) == (0, "")
    assert "S--R: not measured: patching the cue, before: one half of the questions chooses heads" in out
    assert "S--R: not measured: circuit of the cue, after: one half of the questions ranks the edges" in out
    assert record_of(PatchingRecord, folder, "patching").readers == ()
    assert record_of(CircuitRecord, folder, "circuit").circuits == ()
    assert refused(on_pair("probe", folder)) == HALVES
    status, out, err = on_pair("graft", folder)
    assert (status, err) == (0, "")
    assert "factorial, rollback: one question cannot both choose the selector and judge it" in out
    assert "S--R: the mechanism says inconclusive (agrees)" in out
    assert record_of(GraftRecord, folder, "graft").rollback is None
    assert not (folder / "out" / "rollback").exists()
    said = refused(on_pair("repair", folder))
    assert said == "mixturelens: one question is not enough: one half chooses what to repair, the other half judges it"
    assert not (folder / "out" / "repaired").exists()
    reported(on_pair, folder, "1 questions are too few")


@pytest.mark.slow
def test_two_questions(on_pair: Run, tmp_path: Path):
    folder = put_suite(tmp_path, [0, 1])
    status, out, err = on_pair("verdict", folder, "--json")
    assert (status, err) == (0, "")
    record = json.loads(out)
    assert record["verdict"] == "inconclusive"
    assert record["reason"] == "The suite cannot say: 2 questions are too few for an interval (8 are needed)."
    # what is measured is right all the same
    assert record["per_cue"]["A"]["before"]["weights"]["alpha"] == pytest.approx(0.495, abs=0.02)
    assert record["per_cue"]["A"]["after"]["weights"]["alpha"] > 0.95
    status, out, err = on_pair("patch", folder)
    assert (status, err) == (0, "")
    assert {(reader.kind, reader.checkpoint) for reader in record_of(PatchingRecord, folder, "patching").readers} >= {
        ("cue", "before"),
        ("cue", "after"),
    }
    assert [each.questions for each in record_of(CircuitRecord, folder, "circuit").circuits] == [2, 2]
    assert refused(on_pair("probe", folder)) == HALVES
    status, out, err = on_pair("graft", folder)
    assert (status, err) == (0, "")
    assert "S--R: the mechanism says inconclusive (agrees)" in out
    status, out, err = on_pair("repair", folder)
    assert (status, err) == (0, "")
    found = record_of(RepairRecord, folder, "repair")
    # one question does not say how far prompts of a cue lie apart
    assert [each.split(":")[0] for each in found.missing] == ["reroute", "repairs"]
    page = reported(on_pair, folder, "2 questions are too few")
    for kind, name, what, number in (
        (PatchingRecord, "patching", "patching", 2),
        (PatchingRecord, "patching", "readers", 1),
        (CircuitRecord, "circuit", "cue", 1),
        (GraftRecord, "graft", "grafts", 1),
        (RepairRecord, "repair", "repairs", 1),
    ):
        said = f"{what}: {number} questions are too few for an interval (8 are needed)"
        assert said in record_of(kind, folder, name).missing
        assert page.count(said) > 1  # under every figure, and where it says what was not measured
    assert [each.kind for each in found.repairs] == ["interchange", "zero", "mean", "steer", "edit"]


@pytest.mark.slow
def test_a_report_on_prompts_of_several_lengths(on_pair: Run, tmp_path: Path):
    """A position of a circuit is then no one word."""
    folder = put_suite(tmp_path, [0, 1, 2])
    assert len({len(json.loads(x)["prompt"].split()) for x in (folder / "prompts.jsonl").read_text().splitlines()}) > 1
    status, _, err = on_pair("patch", folder)
    assert (status, err) == (0, "")
    assert [each.labels for each in record_of(CircuitRecord, folder, "circuit").circuits] == [(), ()]
    reported(on_pair, folder, "3 questions are too few")


def test_one_cue_alone(on_pair: Run, tmp_path: Path):
    """There is a verdict without a second cue, and a mechanism; there is no cue reader, and that is one line."""
    folder = put_suite(tmp_path, list(range(10)), "B")
    text = (folder / "suite.yaml").read_text().replace("trained_cue: A\n", "")
    (folder / "suite.yaml").write_text(text)
    status, out, err = on_pair("verdict", folder, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["verdict"] == "routing"
    for command in ("patch", "repair"):
        said = refused(on_pair(command, folder, "--trained-cue", "B"))
        assert said == "mixturelens: patching and repair need prompts under two cues and two policies at least"
    status, out, err = on_pair("graft", folder, "--trained-cue", "B")
    assert (status, err) == (0, "")
    assert "S--R: the mechanism says routing (agrees)" in out


def reported(on_pair: Run, folder: Path, said: str) -> str:
    """What the report says, which is this, too."""
    status, out, err = on_pair("report", folder)
    assert (status, err) == (0, "")
    page = Path(out.strip()).read_text(encoding="utf-8")
    assert said in page
    return page
