"""Truths of pairs for tests: what is so unless a test says otherwise."""

from __future__ import annotations

from typing import Any

from mixturelens.lab.proving.truth import Truth


def make_truth(verdict: str = "routing", share: float | None = 0.5, moved: float = 0.5, **changes: Any) -> Truth:
    bits = {"routing": 0.5, "conditioning": 0.2, "skill": 0.3, "specialist": 0.5, "dormant": 0.5}
    values = {
        "verdict": verdict,
        "routing_share": share,
        "moved": moved,
        "bits": bits,
        "text": 0.02,
        "nats": {"routing": 0.5, "conditioning": 0.2, "total": moved},
        "selector": True,
        "cue_reader": False,
        "skill": False,
        "cell": 0.0,
        "dormant_intact": True,
        "text_drifted": True,
        "coverage": 1.0,
        "unresolved": 0.0,
    }
    return Truth(**{**values, **changes})
