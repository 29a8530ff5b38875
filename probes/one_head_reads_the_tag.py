"""Does one head read the tag?  `python -m probes.one_head_reads_the_tag RUN`"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import cast

import numpy as np

import mixturelens as ml
from mixturelens.behaviour.harmed import find_harm
from mixturelens.contrasts import Contrasts, cue_contrasts
from mixturelens.hooks.lens import Lens, lens_of
from mixturelens.models import Pair
from mixturelens.patching.sweep import ENOUGH, find_reader, head_sites, jointly, patch
from mixturelens.stats import interval, resample_counts, resampled_mean
from mixturelens.types import Interval, Site
from probes.contract import Answer, Probe, ProbeRecord, ask, every, main, over, show, under

NOTHING = 0.1
"""Share of the contrast under which a control counts as nothing."""

NAME = "one_head_reads_the_tag"
HYPOTHESIS = "After RL one attention head alone reads the tag and tells the policy in place what to do."
PREDICTION = (
    "In every R, with its policy in place, one head chosen on half of the questions carries at least "
    f"{ENOUGH} of what the tag changes on the other half, when its output at the policy word is that of the trained "
    "tag; and as much when that output comes from another question under the trained tag."
)
CONTROL = (
    f"The same head's output from another question under the same tag moves less than {NOTHING} either way, so that "
    "it is the tag that the head carries and not the question; and it beats the best other head."
)


def run(run_folder: Path, seed: int = 0) -> ProbeRecord:
    """Raises InputError if the folder holds no finished run."""
    return ask(__name__, run_folder, seed, _answer, _clause)


def _clause(pair: str, answer: Answer) -> str:
    alone, few = answer.outcome["the head alone"], answer.outcome["as few heads as needed"]
    elsewhere = answer.outcome["the head alone, from another question"]
    return (
        f"in {pair} {answer.sites[0]} alone carries {show(alone)} of the tag ({show(elsewhere)} when it comes from "
        "another question)" + (f", and {' with '.join(answer.sites)} {show(few)}" if len(answer.sites) > 1 else "")
    )


def _answer(case: Pair, seed: int) -> Answer:
    harm = find_harm(ml.measure(case))
    lens = lens_of(case, "after")
    contrasts = cue_contrasts(case.suite, lens.tokenizer, harm.policy, harm.cues)
    reader = find_reader(lens, contrasts, "policy", seed)  # its first head is the strongest on the first half
    head, judge = reader.heads[0], contrasts.half(1)
    counts = resample_counts(len(judge.rows), seed)
    sites = head_sites(lens, "policy")
    found = patch(lens, judge, sites)
    draws = found.effects(counts)
    mine = sites.index(head)
    others = np.delete(draws, mine, axis=1)
    best = int(others[0].argmax())
    gap = resampled_mean(found.goal - found.base, counts)
    elsewhere, control = (
        interval(resampled_mean(_moved(lens, _shifted(judge, side), head), counts) / gap, counts)
        for side in ("clean", "corrupt")
    )
    outcome = {
        "the head alone": interval(draws[:, mine], counts),
        "the head alone, from another question": elsewhere,
        "as few heads as needed": interval(reader.effect, counts),
        "how many these are": Interval(value=len(reader.heads)),
    }
    checks = {
        "another question under the same tag": control,
        "best other head": interval(others[:, best], counts),
        "the head less the best other head": interval(draws[:, mine] - others[:, best], counts),
    }
    return Answer(
        holds=every(
            [
                over(outcome["the head alone"], ENOUGH),
                over(elsewhere, ENOUGH),
                under(control, NOTHING),
                over(control, -NOTHING),
                over(checks["the head less the best other head"], 0.0),
            ]
        ),
        outcome=outcome,
        control=checks,
        sites=tuple(str(site) for site in reader.heads),
    )


def _shifted(contrasts: Contrasts, side: str) -> Contrasts:
    """The same corrupt prompts, but activations come from the `side` prompt of the next question."""
    rows = contrasts.rows
    sources = [getattr(row, side) for row in (*rows[1:], rows[0])]
    moved = [dataclasses.replace(row, clean=source) for row, source in zip(rows, sources, strict=True)]
    return dataclasses.replace(contrasts, rows=tuple(moved))


def _moved(lens: Lens, contrasts: Contrasts, head: Site) -> np.ndarray:
    """How far the metric of each question moves, in nats."""
    found = jointly(lens, contrasts, [(head,)])
    return found.patched[0] - found.base


if __name__ == "__main__":
    main(cast(Probe, sys.modules[__name__]))
