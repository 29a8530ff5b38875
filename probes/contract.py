"""What a probe is: a module with NAME, HYPOTHESIS, PREDICTION, CONTROL and `run`; and the record that it returns.

HYPOTHESIS, PREDICTION and CONTROL are written before the run, with the thresholds they will be judged by, and are saved
with the numbers. `python -m probes.<name> RUN` asks one question of one run.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, cast

import probes
from mixturelens.checkpoints import quiet_libraries
from mixturelens.records import Record
from mixturelens.types import Frozen, InputError, Interval, RunError


class Answer(Frozen):
    """What one pair of the run says."""

    holds: bool | None
    """Whether prediction and control came out as foretold; null where an interval crosses a threshold."""
    outcome: dict[str, Interval]
    control: dict[str, Interval]
    sites: tuple[str, ...] = ()
    """Heads that the numbers are about."""


class ProbeRecord(Record):
    """One question, what was foretold, and what came out, for every pair of a run."""

    KIND = "probe"

    name: str
    hypothesis: str
    prediction: str
    control: str
    answers: dict[str, Answer]
    """Pair -> what it says."""
    holds: bool | None
    """Whether the prediction holds in every pair."""
    finding: str
    """One sentence."""


class Probe(Protocol):
    """A module of this package that asks a question. The same seed gives the same numbers."""

    NAME: str
    HYPOTHESIS: str
    PREDICTION: str
    CONTROL: str

    def run(self, run_folder: Path, seed: int = 0) -> ProbeRecord: ...


def all_probes() -> dict[str, Probe]:
    """Every probe of this package, by name."""
    names = [module.name for module in pkgutil.iter_modules(probes.__path__) if module.name != "contract"]
    modules = [cast(Probe, importlib.import_module(f"probes.{name}")) for name in names]
    return {module.NAME: module for module in modules}


def every(states: Iterable[bool | None]) -> bool | None:
    """True if all are; False if one surely is not; else unknown.

    >>> every([True, None]), every([None, False]), every([True, True])
    (None, False, True)
    """
    known = list(states)
    return False if False in known else None if None in known else True


def over(value: Interval, threshold: float) -> bool | None:
    """Whether a number lies above a threshold; unknown where its interval crosses it."""
    return (value.value or 0.0) > threshold if value.excludes(threshold) else None


def under(value: Interval, threshold: float) -> bool | None:
    above = over(value, threshold)
    return None if above is None else not above


def show(value: Interval) -> str:
    if value.value is None:
        return "-"
    return f"{value.value:.3f}" + ("" if value.low is None else f" [{value.low:.3f}, {value.high:.3f}]")


def main(probe: Probe) -> None:
    """Ask one question of one run, from the command line."""
    parser = argparse.ArgumentParser(description=probe.HYPOTHESIS)
    parser.add_argument("run", type=Path, metavar="RUN", help="a finished run folder, as `mixturelens train` makes it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a file for the record")
    arguments = parser.parse_args()
    quiet_libraries()
    try:
        record = probe.run(arguments.run, arguments.seed)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    for title, text in (("hypothesis", probe.HYPOTHESIS), ("prediction", probe.PREDICTION), ("control", probe.CONTROL)):
        print(f"{title:10}  {text}")
    for pair, answer in record.answers.items():
        print(f"\n{pair}: {', '.join(answer.sites)}; holds: {_word(answer.holds)}")
        for kind, numbers in (("outcome", answer.outcome), ("control", answer.control)):
            for name, value in numbers.items():
                print(f"  {kind}  {name:44} {show(value)}")
    print(f"\nholds: {_word(record.holds)}. {record.finding}")
    if arguments.out is not None:
        record.save(arguments.out)


def _word(holds: bool | None) -> str:
    return {True: "yes", False: "no", None: "cannot say"}[holds]
