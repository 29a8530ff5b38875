"""What `mixturelens demo` does: the formatting-tag organism grown, judged, taken apart and repaired, in minutes."""

from __future__ import annotations

from pathlib import Path

import mixturelens as ml
from mixturelens.lab import runs
from mixturelens.lab.organism import load_spec, with_settings
from mixturelens.lab.stage import Progress, alone
from mixturelens.models import Pair
from mixturelens.pipeline import Say

LIGHTER = {"sft.batch": 128, "sft.steps": 800, "split.evaluation": 80}
"""What the demo's organism has less of than the recipe `default`: SFT (a third of the time), and questions."""
INSTRUMENTS = ("measure", "patch", "graft", "probe", "circuit", "repair")
"""Functions of mixturelens that are called with every pair, in this order."""


def demo(
    folder: Path, device: str = "cpu", jobs: int = 1, progress: Progress | None = None, say: Say | None = None
) -> list[Pair]:
    """Grow the organism in `folder`, hold every instrument of INSTRUMENTS to its pairs, and return these.

    `jobs` stages of training, and pairs, are worked on at once, each in a process of its own. What lies in the folder
    is not made again.
    """
    from joblib import Parallel, delayed

    spec = with_settings(load_spec("default", name="demo"), LIGHTER, "demo")
    runs.train(spec, folder, device, progress, jobs)
    pairs = runs.run_pairs(folder, device=device)
    names = " and ".join(pair.name for pair in pairs)
    for instrument in INSTRUMENTS:
        if say is not None:
            say(f"{instrument}: {names}")
        Parallel(n_jobs=jobs)(delayed(_apply)(instrument, folder, number, device) for number in range(len(pairs)))
    return pairs


def _apply(instrument: str, folder: Path, number: int, device: str) -> None:
    """Call a function of mixturelens with a pair of the run; what it returns is in the pair's folder, too."""
    alone()
    pairs = runs.run_pairs(folder, device=device)
    of = (pairs[number], pairs) if instrument == "circuit" else (pairs[number],)
    getattr(ml, instrument)(*of)
