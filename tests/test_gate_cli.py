"""`gate` and `doctor` from the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mixturelens.cli import doctor


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mixturelens.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_routing_pair_passes_and_one_whose_specialist_changed_does_not(pairs: Path, tmp_path: Path) -> None:
    asked = ["--allow", "routing", "--max-specialist", "0.05", "--quiet", "--junit", tmp_path / "gate.xml"]
    folder = pairs / "llama"
    for after, status in (("R-routing", 0), ("R-conditioning", 1)):
        sides = ["--before", folder / "S", "--after", folder / after, "--suite", folder / "suite.yaml"]
        done = call("gate", *sides, "--out", tmp_path / after, *asked)
        assert done.returncode == status, done.stderr
        assert f'failures="{2 * status}"' in (tmp_path / "gate.xml").read_text(encoding="utf-8")
    assert "the gate is closed: S--R-conditioning: verdict: specialist; " in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    wrong = call("gate", *sides, "--allow", "nothing")
    assert wrong.returncode == 2
    assert "--allow nothing: one of " in wrong.stderr


def test_doctor_says_what_is_there(monkeypatch) -> None:
    done = call("doctor")
    assert done.returncode == 0, done.stdout
    for what in ("Python", "torch", "transformer-lens", "threads", "memory", "disk"):
        assert what in done.stdout


def test_doctor_says_what_mends_what_is_missing(monkeypatch) -> None:
    needs = ["torch>=99", "no-such-library>=1", 'no-such-trainer>=2; extra == "lab"', 'pytest>=99; extra == "dev"']
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: needs)
    _, torch, missing, trainer = doctor._libraries()
    assert torch.mend == "pip install 'torch>=99'"
    assert (missing.found, missing.mend) == ("not installed", "pip install 'no-such-library>=1'")
    assert trainer.mend == "only for the laboratory: pip install 'mixturelens[lab]'"
