"""One page about all pairs of a run: the answer, the numbers behind it, controls and method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mixturelens import figures
from mixturelens.pages import evidence, mechanism
from mixturelens.pages import features as units
from mixturelens.pages.pair import Findings, in_words
from mixturelens.pages.parts import Picture, Pictures, render
from mixturelens.pages.plainly import plainly
from mixturelens.pages.reading import reading
from mixturelens.records import write_text
from mixturelens.routing.verdict import VerdictRecord

if TYPE_CHECKING:
    from mixturelens.behaviour.trajectory import Trajectory

_BEFORE_AFTER = "each cue has its points before and after; points that lie apart, whiskers and all, are a real change."
_ALONG = "training runs from left to right; a line is one quantity, and where it bends is when training moved it."


@dataclass(frozen=True)
class Grown:
    """What a page is about, and how its pairs were made, where that is known."""

    title: str
    spec: str | None = None
    recipe: str | None = None
    """What the recipe says of itself."""
    trajectories: Sequence[Trajectory] = ()
    forecasts: Callable[[Pictures], Sequence[object]] = lambda _: ()
    """Makes the parts about what was foreseen, with their pictures."""


def write_report(path: Path, findings: Sequence[Findings], grown: Grown) -> Path:
    """Write the page, whole or not at all. It holds plotly.js once and asks no network for anything."""
    pictures = Pictures()
    verdicts = [(each.name, each.verdict) for each in findings]
    along = [(run, _left_by(run, findings)) for run in grown.trajectories if figures.is_rl(run)]
    watched = {run.provenance.after for run, _ in along}
    unseen = [each for each in findings if each.behaviour.provenance.after not in watched]
    context = {
        "title": grown.title,
        "plainly": plainly(findings),
        "recipe_note": grown.recipe,
        "spec_text": grown.spec,
        "pairs": [in_words(each) for each in findings],
        "headline": [_along(run, left, pictures) for run, left in along],
        "before_after": [
            pictures.add(figures.before_after(each.behaviour), f"{each.name}: the two checkpoints.", read=_BEFORE_AFTER)
            for each in unseen
        ],
        "split": _splits(verdicts, pictures) if findings else [],
        "tables": [_table(each, pictures) for each in findings if each.behaviour.table],
        "where": [
            mechanism.where(each, i, pictures)
            for i, each in enumerate(findings, start=1)
            if each.patching or each.circuit
        ],
        "reading": [
            reading(each.name, each.probing, each.behaviour.cues, pictures) for each in findings if each.probing
        ],
        "changing": [evidence.changing(each.name, each.graft, pictures) for each in findings if each.graft],
        "featured": [
            units.featured(each.name, i, each.features, each.repair, pictures)
            for i, each in enumerate(findings, start=1)
            if each.features
        ],
        "crosscoders": units.crosscoders({each.name: each.features for each in findings if each.features}, pictures),
        "judged": [found for name, verdict in verdicts if (found := evidence.judged(name, verdict, pictures))],
        "repaired": [
            mechanism.repaired(each.name, each.repair, each.verdict.thresholds.cell, pictures)
            for each in findings
            if each.repair
        ],
        "forecasts": grown.forecasts(pictures),
        "trajectories": [
            pictures.add(figures.trajectory(run), _trajectory_caption(run), read=_ALONG) for run in grown.trajectories
        ],
        "intervals": figures.INTERVALS,
    }
    write_text(path, render("report.html.j2", context, pictures))
    return path


def _left_by(run: Trajectory, findings: Iterable[Findings]) -> Findings | None:
    """The pair that ends in what this stage of training left."""
    after = run.provenance.after
    same = (each for each in findings if after is not None and each.behaviour.provenance.after == after)
    return next(same, None)


def _along(run: Trajectory, left: Findings | None, pictures: Pictures) -> Picture:
    cues = {cue for point in run.points for cue in point.cues}
    named = next((cue for cue in sorted(cues) if run.stage == f"rl-{cue}"), None)
    trained = left.behaviour.trained_cue if left else named
    said = f" while RL trains on cue {trained} alone." if trained is not None else " along RL."
    return pictures.add(
        figures.accuracy_along_rl(run, trained, left and left.repair),
        f"{run.stage}: expected accuracy under every cue{said}",
        read="a line that falls while its dotted companion stays up is a skill that is still there and no longer used.",
    )


def _splits(verdicts: Sequence[tuple[str, VerdictRecord]], pictures: Pictures) -> list[Picture]:
    return [
        pictures.add(
            figures.accuracy_split(verdicts),
            "The change of expected accuracy in points, split exactly: by routing, because other policies are "
            "expressed, and by specialists, because policies are right more or less often.",
            read="a bar to the left is accuracy lost under that cue; its colour says what took it away.",
        ),
        pictures.add(
            figures.bits_split(verdicts),
            "How well one completion tells after from before, by what changed: 0 bits not at all, 1 for sure. "
            "Hatched and set apart: dormant, the specialist's with every policy weighed alike, which also hears "
            "those that fell silent. The numbers stand at the right.",
            read="the longer a bar, the more the two checkpoints differ in what its colour names.",
        ),
    ]


def _table(found: Findings, pictures: Pictures) -> Picture:
    cell = found.verdict.thresholds.cell
    return pictures.add(
        figures.policy_table(found.behaviour, cell),
        f"{found.name}: the behaviour shown most often and its probability, and the probability of a right answer, "
        f"with each policy put in place. Outlined: cells that moved by more than {cell:g}.",
        read="compare the left half with the right half: where they are alike, a policy does what it did before.",
        whiskers=False,
    )


def _trajectory_caption(run: Trajectory) -> str:
    caption = f"{run.stage}, {run.steps} steps; measured on held-out questions."
    return caption + (
        " Without signal: groups whose rewards are all equal, which give no gradient." if run.reward else ""
    )
