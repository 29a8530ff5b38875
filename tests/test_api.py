"""The public API: what `import mixturelens` gives, what it costs, and that it is what the command line uses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from stored import few_nulls

import mixturelens as ml


def test_importing_takes_no_library() -> None:
    heavy = "{'torch', 'numpy', 'transformers', 'plotly', 'trl', 'pydantic', 'sae_lens', 'transformer_lens'}"
    code = f"import sys, mixturelens; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize("name", ml.__all__)
def test_every_name_is_there_and_says_what_it_is(name: str) -> None:
    assert getattr(ml, name).__doc__
    assert name in dir(ml)


def test_another_name_is_not() -> None:
    with pytest.raises(AttributeError, match="no attribute 'patching_everything'"):
        _ = ml.patching_everything


def test_from_two_checkpoints_to_a_verdict_and_a_page(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_nulls(monkeypatch)
    folder = pairs / "llama"
    pair = ml.Pair(folder / "S", folder / "R-routing", folder / "suite.yaml", out=tmp_path)
    verdict = ml.verdict(pair)
    assert verdict.verdict == "routing"
    assert verdict == ml.VerdictRecord.load(pair.records / "verdict.json")
    page = ml.report(pair, tmp_path / "page.html")
    assert verdict.reason.split(";")[0] in page.read_text(encoding="utf-8")


def test_what_is_no_pair_is_refused(pairs: Path) -> None:
    folder = pairs / "llama"
    with pytest.raises(ml.InputError, match="not a pair"):
        ml.Pair(folder / "S", pairs / "gpt2" / "S", folder / "suite.yaml")
    with pytest.raises(ml.InputError, match=r"suite\.yaml: no prompt has the trained cue 'C'"):
        ml.Pair(folder / "S", folder / "R-both", folder / "suite.yaml", trained_cue="C")


@pytest.mark.slow  # CI asks the same of the wheel, where trl is not installed
def test_core_works_without_what_only_the_lab_needs(pairs: Path, tmp_path: Path) -> None:
    """Commands about two checkpoints do not miss trl and dask; datasets and joblib come with libraries of the core."""
    folder = pairs / "llama"
    blocked = "import sys; sys.modules.update(dict.fromkeys(['trl', 'dask', 'distributed']));"
    call = "from mixturelens.cli import main; main()"
    sides = ["--before", folder / "S", "--after", folder / "R-routing", "--suite", folder / "suite.yaml"]
    for command in ("verdict", "patch", "report"):
        arguments = [sys.executable, "-W", "ignore", "-c", f"{blocked} {call}", command, *sides, "--out", tmp_path]
        done = subprocess.run([*map(str, arguments), "--quiet"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    arguments = [sys.executable, "-c", f"{blocked} {call}", "train", "default", "--out", str(tmp_path / "run")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 2
    assert "in a clone, pip install '.[lab]'" in done.stderr
