"""`gate`, `doctor` and `--version` from the command line."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

from test_cli import Run, refused

from mixturelens.cli import doctor


def test_a_routing_pair_passes_and_one_whose_specialist_changed_does_not(run: Run, pairs: Path, tmp_path: Path) -> None:
    asked = ["--allow", "routing", "--max-specialist", "0.05", "--quiet", "--junit", tmp_path / "gate.xml"]
    folder = pairs / "llama"
    for after, status in (("R-routing", 0), ("R-conditioning", 1)):
        sides = ["--before", folder / "S", "--after", folder / after, "--suite", folder / "suite.yaml"]
        found, out, err = run("gate", *sides, "--out", tmp_path / after, *asked)
        assert found == status, err
        assert f'failures="{2 * status}"' in (tmp_path / "gate.xml").read_text(encoding="utf-8")
    refused((found, out, err), "the gate is closed: S--R-conditioning: verdict: specialist; ", status=1)
    found, out, err = run("gate", *sides, "--out", tmp_path / after, "--allow", "routing", "--json", "--quiet")
    assert json.loads(out)["verdict"] == "specialist"
    refused((found, "", err), "the gate is closed", status=1)
    refused(run("gate", *sides, "--allow", "nothing", "--quiet"), "--allow nothing: one of ")


def test_the_version_is_the_package_s(run: Run) -> None:
    assert run("--version") == (0, f"mixturelens {version('mixturelens')}\n", "")


def test_doctor_says_what_is_there(run: Run) -> None:
    status, out, _ = run("doctor")
    assert status == 0, out
    for what in ("Python", "torch", "transformer-lens", "threads", "memory", "disk"):
        assert what in out


def test_doctor_says_what_mends_what_is_missing(monkeypatch) -> None:
    needs = ["torch>=99", "no-such-library>=1", 'no-such-trainer>=2; extra == "lab"', 'pytest>=99; extra == "dev"']
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: needs)
    _, torch, missing, trainer = doctor._libraries()
    assert torch.mend == "pip install 'torch>=99'"
    assert (missing.found, missing.mend) == ("not installed", "pip install 'no-such-library>=1'")
    assert trainer.mend == "only for the laboratory: in a clone, pip install '.[lab]'"
