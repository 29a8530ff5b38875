"""Every probe keeps the contract: stated beforehand, quick, same numbers from the same seed, a record that lasts."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixturelens.types import InputError
from probes.contract import Probe, ProbeRecord, all_probes, every

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "artifacts" / "reference"
PROBES = all_probes()

each = pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)


@functools.cache
def first(name: str) -> tuple[ProbeRecord, float]:
    start = time.perf_counter()
    return PROBES[name].run(REFERENCE, seed=0), time.perf_counter() - start


def test_names_are_those_of_the_files():
    files = {file.stem for file in (ROOT / "probes").glob("*.py")} - {"__init__", "contract"}
    assert set(PROBES) == files
    assert len({probe.HYPOTHESIS for probe in PROBES.values()}) == len(PROBES)


@each
def test_states_beforehand_what_it_will_be_judged_by(probe: Probe):
    for text in (probe.HYPOTHESIS, probe.PREDICTION, probe.CONTROL):
        assert len(text.split()) >= 8
        assert text.endswith(".")
    record, _ = first(probe.NAME)
    assert (record.name, record.hypothesis) == (probe.NAME, probe.HYPOTHESIS)
    assert (record.prediction, record.control) == (probe.PREDICTION, probe.CONTROL)


@each
def test_answers_for_every_pair_with_numbers_and_controls(probe: Probe):
    record, seconds = first(probe.NAME)
    assert set(record.answers) == {"sft--rl-A", "sft--rl-B"}
    assert record.holds == every(answer.holds for answer in record.answers.values())
    assert record.finding.endswith(".")
    for answer in record.answers.values():
        assert answer.outcome
        assert answer.control
        assert all(value.measured for value in {**answer.outcome, **answer.control}.values())
        assert sum(value.low is not None for value in answer.outcome.values()) >= 2
    assert seconds < 60  # a few, on one core with nothing else on it


@each
def test_same_seed_same_numbers(probe: Probe):
    record, _ = first(probe.NAME)
    assert probe.run(REFERENCE, seed=0) == record


@each
def test_record_comes_back_from_a_file(probe: Probe, tmp_path: Path):
    record, _ = first(probe.NAME)
    assert ProbeRecord.load(record.save(tmp_path / "probe.json")) == record


@each
def test_refuses_what_is_no_run(probe: Probe, tmp_path: Path):
    with pytest.raises(InputError, match=r"spec\.json"):
        probe.run(tmp_path)


def test_the_tag_is_read_by_two_heads_in_one_direction_and_by_one_in_the_other():
    """Where two heads share the work the prediction fails, and its own numbers say so."""
    record, _ = first("one_head_reads_the_tag")
    two, one = record.answers["sft--rl-A"], record.answers["sft--rl-B"]
    assert (record.holds, two.holds) == (False, False)
    assert set(two.sites) == {"L0.z.2@policy", "L0.z.3@policy"}
    assert two.outcome["the head alone"].below(0.9)
    assert two.outcome["as few heads as needed"].above(0.99)
    assert one.sites == ("L0.z.0@policy",)
    assert one.outcome["the head alone"].above(0.95)


def test_the_hint_is_read_where_rl_moved_the_most():
    """The first head is the same in both directions; the ranks of the others say less than chance would need."""
    record, _ = first("selector_reads_the_hint")
    for answer in record.answers.values():
        assert answer.sites[0] == "L2.z.0@last"
        assert answer.outcome["undone at it, less at the best other head"].above(0.3)
        assert answer.control["agreement with the hint less with the cue"].above(0.5)
    assert record.holds is False


def test_runs_from_the_command_line(tmp_path: Path):
    out = tmp_path / "record.json"
    name = "one_head_reads_the_tag"
    command = [sys.executable, "-m", f"probes.{name}", str(REFERENCE), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "holds: no" in done.stdout
    assert ProbeRecord.load(out) == first(name)[0]


def test_bad_input_is_one_line(tmp_path: Path):
    command = [sys.executable, "-m", "probes.one_head_reads_the_tag", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_the_package_never_imports_a_probe():
    for file in (ROOT / "mixturelens").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            assert not any(name.split(".")[0] in ("probes", "scripts") for name in names), file
