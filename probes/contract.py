"""What a probe is: a module with NAME, HYPOTHESIS, PREDICTION, CONTROL and `run`; and the record that it returns.

HYPOTHESIS, PREDICTION and CONTROL are written before the run, with the thresholds they will be judged by, and are saved
with the numbers. `python -m probes.<name> RUN` asks one question of one run.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol, cast

import probes
from mixturelens.contrasts import span_positions
from mixturelens.lab import runs
from mixturelens.models import Pair, quiet_libraries
from mixturelens.models.source import fingerprint
from mixturelens.records import Provenance, Record, with_versions
from mixturelens.spelling import encode_prompts
from mixturelens.types import Frozen, InputError, Interval, RunError


class Answer(Frozen):
    """What one pair of the run says."""

    holds: bool | None
    """Whether prediction and control came out as foretold; null where an interval crosses a threshold."""
    outcome: dict[str, Interval]
    control: dict[str, Interval]
    sites: tuple[str, ...] = ()
    """Heads, other sites or components that the numbers are about."""


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


def ask(
    name: str, run_folder: Path, seed: int, answer: Callable[[Pair, int], Answer], clause: Callable[[str, Answer], str]
) -> ProbeRecord:
    """Ask the question of the module `name` of every pair of a run.

    `answer(pair, seed)` reads the records of that seed, or makes them. `clause(pair, answer)` says what came out there,
    as a part of the finding's sentence. Raises InputError if the folder holds no finished run.
    """
    probe = cast(Probe, sys.modules[name])
    answers = {pair.name: answer(pair, seed) for pair in runs.run_pairs(run_folder)}
    text = "; ".join(clause(*found) for found in answers.items())
    return ProbeRecord(
        provenance=with_versions(Provenance(before=fingerprint(run_folder / "checkpoints" / "sft"), seed=seed)),
        name=probe.NAME,
        hypothesis=probe.HYPOTHESIS,
        prediction=probe.PREDICTION,
        control=probe.CONTROL,
        answers=answers,
        holds=every(answer.holds for answer in answers.values()),
        finding=f"{text[0].upper()}{text[1:]}.",
    )


def places(pair: Pair) -> dict[str, tuple[str | int, ...]]:
    """Span of the neutral prompts, or `last` -> the positions of a record's sites that lie there.

    Records name a position by its token's index where all questions are aligned, else by its span: both are given.
    Raises InputError for a suite without neutral prompts.
    """
    suite, tokenizer = pair.suite, pair.tokenizer
    if not suite.neutral:
        raise InputError(f"{pair.name}: the suite has no neutral prompts to ask about")
    row = suite.neutral[0]
    end = len(encode_prompts(suite, [row], tokenizer)[0]) - 1
    spans = {**span_positions(suite, row, tokenizer), "last": (end,)}
    return {name: (name, *tokens) for name, tokens in spans.items()}


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


def some(states: Iterable[bool | None]) -> bool | None:
    """True if one surely is; False if none can be; else unknown.

    >>> some([True, None]), some([None, False]), some([False, False]), some([])
    (True, None, False, False)
    """
    known = list(states)
    return True if True in known else None if None in known else False


def more(value: Interval, other: Interval) -> bool | None:
    """Whether one number lies above another; unknown where their intervals overlap.

    >>> more(Interval(value=0.5, low=0.4, high=0.6), Interval(value=0.2, low=0.1, high=0.3))
    True
    """
    if value.low is None or value.high is None or other.low is None or other.high is None:
        return None
    return True if value.low > other.high else False if value.high < other.low else None


def show(value: Interval) -> str:
    """A number with its interval, in three digits.

    >>> show(Interval(value=-0.0001, low=-0.1, high=0.1)), show(Interval())
    ('0.000 [-0.100, 0.100]', '-')
    """
    if value.value is None:
        return "-"
    number, *ends = (f"{round(x, 3) + 0.0:.3f}" for x in (value.value, value.low, value.high) if x is not None)
    return number + (f" [{', '.join(ends)}]" if ends else "")


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
