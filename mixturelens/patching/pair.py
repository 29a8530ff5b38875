"""Patching of a pair: the cue contrast, the hint contrast, and S's activations in R, to one record."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mixturelens.behaviour.harmed import find_harm
from mixturelens.behaviour.record import BehaviourRecord
from mixturelens.contrasts import (
    Contrasts,
    aligned,
    checkpoint_contrasts,
    cue_contrasts,
    hint_contrasts,
    position_labels,
)
from mixturelens.hooks.batches import as_begun, sides
from mixturelens.hooks.engine import MEMORY
from mixturelens.hooks.lens import Lens, lens_of
from mixturelens.models import Pair
from mixturelens.models.cost import Estimate, Size, Work, announced, check_memory, estimate, size_of
from mixturelens.patching.coarse import Unseen, coarse, coarse_tokens, outputs, patched_tokens
from mixturelens.patching.record import Attention, Effect, PatchingRecord, ReaderHeads, Sweep
from mixturelens.patching.slopes import BYTES
from mixturelens.patching.sweep import (
    BY_POSITION,
    HELD,
    Bench,
    Direction,
    Patched,
    all_sites,
    find_reader,
    left_out,
    patch,
)
from mixturelens.stats import FEWEST, interval, mean_interval, resample_counts, too_few
from mixturelens.types import Frozen, Side, Site
from mixturelens.unfinished import NOTHING_KEPT, Unfinished, attempt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Say = Callable[[str], None]

EXHAUSTIVE = 2e12
"""Floating-point operations up to which every site is patched without being asked: about a minute on one core."""
QUESTIONS = 48
"""Questions, at most, where sites are nominated."""


@dataclass(frozen=True)
class PatchingSettings:
    """How much is patched, and where what was measured is kept until the record is whole."""

    exhaustive: bool = False
    """Every site, whatever that takes; else, on a large model, those that slopes nominate."""
    parts: Unfinished = NOTHING_KEPT


class PatchedContrast(Frozen):
    """What patching one contrast in one checkpoint gives to the record."""

    sweeps: tuple[Sweep, ...]
    readers: tuple[ReaderHeads, ...] = ()


def patching_record(
    pair: Pair,
    behaviour: BehaviourRecord,
    settings: PatchingSettings | None = None,
    seed: int = 0,
    say: Say | None = None,
) -> PatchingRecord:
    """Where cue and hint are read in S and in R, and which of S's activations undo in R what RL did.

    Every site is patched where that takes little, or where the settings ask for it; else those that `coarse` finds
    worth it, on at most QUESTIONS questions, and what was passed over is bounded. With less time than that takes
    (`pair.budget`) there are fewer questions. Raises InputError if the trained cue is not known, the prompts of a
    contrast cannot be aligned, or the memory allowed is too little.
    """
    settings, say = settings or PatchingSettings(), say or (lambda _: None)
    harm = find_harm(behaviour)
    pair = pair.spelled(behaviour.spelling)
    suite, tokenizer = pair.suite, pair.tokenizer
    cue = cue_contrasts(suite, tokenizer, harm.policy, harm.cues, harm.shows)
    hinted = {harm.policy, harm.other} <= {row.hint for row in suite.hinted if row.cue == harm.trained_cue}
    missing = [f"patching: {line}" for line in cue.left_out]
    plan = _plan(pair, cue, hinted, settings.exhaustive, missing)
    say(announced("patching", plan.takes))
    check_memory(pair, plan.takes, "patching")
    cue = cue.first(plan.questions)
    lenses: dict[Side, Lens] = {side: lens_of(pair, side) for side in pair.sides}
    told = functools.cache(lambda: as_begun(lenses["before"], suite, cue))
    target = f"answer under {harm.trained_cue}"
    foil = f"{harm.shows or 'other behaviour'} under {harm.harmed_cue}" if cue.rows[0].foil else "anything else"
    if not suite.literal:
        target, foil = (f"how S begins under {name}" for name in harm.cues)
    sweeps: list[Sweep] = []
    readers: list[ReaderHeads] = []
    missing += [
        f"patching {line}" for line in dict.fromkeys(line for each in lenses.values() for line in left_out(each))
    ]

    def part(what: str, work: Callable[[], PatchedContrast]) -> None:
        """What cannot be measured on this pair is said, and the rest is measured."""
        say(what)
        name = f"{what}, {plan.questions} questions{', everywhere' if plan.exhaustive else ''}"
        kept = functools.partial(settings.parts.value, name, PatchedContrast, work)
        found = attempt(what, kept, missing)
        if found is not None:
            sweeps.extend(found.sweeps)
            readers.extend(found.readers)
        gc.collect()  # runs and graphs of the last contrast hold each other

    def search(
        lens: Lens, contrasts: Contrasts, everywhere: bool, before: Lens | None = None
    ) -> tuple[Patched, Unseen | None, Bench | None]:
        if not plan.exhaustive:
            spans = shared_spans(contrasts)
            bench = Bench(lens, contrasts, spans, before=before)
            return *coarse(bench, spans, seed), bench
        sites = [site for site in _sites(lens, contrasts) if everywhere or site.component in BY_POSITION]
        return patch(lens, contrasts, sites, before=before), None, None

    def reader(
        lens: Lens, contrasts: Contrasts, side: Side, position: str, bench: Bench | None, found: Patched
    ) -> ReaderHeads:
        return _reader(lens, contrasts, side, position, seed, (bench, found) if bench else None)

    def of_cue(side: Side) -> PatchedContrast:
        lens, cue, words = lenses[side], told(), {"target": target, "foil": foil, "policy": harm.policy}
        found, unseen, bench = search(lens, cue, everywhere=True)
        denoised = _sweep(found, cue, side, "denoise", seed, tokenizer, unseen, **words)
        heads = [site for site in found.sites if site.component == "z"]
        noised = bench.patch(heads, "noise") if bench else patch(lens, cue, heads, direction="noise")
        both = (denoised, _sweep(noised, cue, side, "noise", seed, tokenizer, unseen, **words))
        return PatchedContrast(sweeps=both, readers=(reader(lens, cue, side, "policy", bench, found),))

    def of_hint(side: Side) -> PatchedContrast:
        hint = hint_contrasts(suite, tokenizer, harm.trained_cue, harm.policy, harm.other).first(plan.questions)
        words = {"target": f"policy {harm.policy}", "foil": f"policy {harm.other}", "cue": harm.trained_cue}
        found, unseen, bench = search(lenses[side], hint, everywhere=False)
        sweep = _sweep(found, hint, side, "denoise", seed, tokenizer, unseen, **words)
        return PatchedContrast(sweeps=(sweep,), readers=(reader(lenses[side], hint, side, "last", bench, found),))

    def of_checkpoints() -> PatchedContrast:
        same = checkpoint_contrasts(suite, tokenizer, harm.harmed_cue, harm.other, harm.policy).first(plan.questions)
        words = {"target": f"policy {harm.other}", "foil": f"policy {harm.policy}", "cue": harm.harmed_cue}
        found, unseen, _ = search(lenses["after"], same, everywhere=False, before=lenses["before"])
        return PatchedContrast(sweeps=(_sweep(found, same, "after", "denoise", seed, tokenizer, unseen, **words),))

    for side in lenses:
        part(f"patching the cue, {side}", functools.partial(of_cue, side))
        if hinted:
            part(f"patching the hint, {side}", functools.partial(of_hint, side))
    part("patching S into R", of_checkpoints)
    return PatchingRecord(
        trained_cue=harm.trained_cue,
        harmed_cue=harm.harmed_cue,
        policy=harm.policy,
        sweeps=tuple(sweeps),
        readers=tuple(readers),
        attention=_attention(lenses, cue, readers, tokenizer),
        exhaustive=plan.exhaustive,
        missing=(
            *missing,
            *too_few("patching", *(each.questions for each in sweeps)),
            *too_few("readers", *(each.questions for each in readers)),
        ),
    )


@dataclass(frozen=True)
class _Plan:
    """How patching will go about it, and what that takes."""

    exhaustive: bool
    questions: int
    takes: Estimate


def _plan(pair: Pair, cue: Contrasts, hinted: bool, exhaustive: bool, missing: list[str]) -> _Plan:
    """Every site, or from coarse to fine; on as many questions as the time allows."""
    size = size_of(pair)
    places = range(len(cue.rows[0].clean)) if aligned(cue) else shared_spans(cue)
    sites = [*outputs(size.layers, size.heads, places), *outputs(size.layers, 1, places)]
    # the cue in S and in R, denoised and noised; the hint in both; S put into R
    sweeps = 2 * 2 + 2 * hinted + 1
    every = sweeps * patched_tokens(size.layers, cue, sites)
    exhaustive = exhaustive or 2 * size.body * every <= EXHAUSTIVE
    questions = len(cue.rows) if exhaustive else min(len(cue.rows), QUESTIONS)

    def takes(number: int) -> Estimate:
        some = cue.first(number)
        forward, back = every * number / len(cue.rows), 0.0
        if not exhaustive:
            forward, back = (sweeps * n for n in coarse_tokens(size.layers, size.heads, some, shared_spans(some)))
        return estimate(pair, Work(tokens=forward, back=back, read=forward / 20, held=_held(size, some, exhaustive)))

    allowed = pair.budget.minutes
    while allowed is not None and takes(questions).seconds > 60 * allowed and questions > 2 * FEWEST:
        questions = max(2 * FEWEST, questions * 3 // 4)
    if questions < len(cue.rows):
        why = f"--minutes {allowed:g}" if questions < min(len(cue.rows), QUESTIONS) else "--exhaustive takes all"
        missing.append(f"patching: {questions} of {len(cue.rows)} questions ({why})")
    least = takes(questions)
    if allowed is not None and least.seconds > 60 * allowed:
        missing.append(f"--minutes {allowed:g}: patching takes {least} at least")
    return _Plan(exhaustive, questions, least)


def _held(size: Size, contrasts: Contrasts, exhaustive: bool) -> float:
    """Bytes beside the weights: both runs of the contrasts, patches in flight, and what slopes hold for a way back."""
    width = max(len(row.clean) for row in contrasts.rows)
    runs = 8.0 * len(contrasts.rows) * width * size.layers * (size.d_model + size.keys)
    if exhaustive:
        return min(1.5 * HELD, 4 * runs) + min(2.0 * MEMORY, 8 * runs)
    return 1.75 * min(runs, HELD) + 1.5 * (BYTES + MEMORY)


def shared_spans(contrasts: Contrasts) -> list[str]:
    """The spans that all questions have, in the order of the prompt."""
    shared = set.intersection(*(set(row.spans) for row in contrasts.rows))
    return [name for name in contrasts.rows[0].spans if name in shared]


def _sites(lens: Lens, contrasts: Contrasts) -> list[Site]:
    """Every position where questions are aligned, else every span that all questions have."""
    if aligned(contrasts):
        return all_sites(lens, range(len(contrasts.rows[0].clean)))
    return all_sites(lens, shared_spans(contrasts), everywhere=not any(row.shift for row in contrasts.rows))


def _sweep(
    patched: Patched,
    contrasts: Contrasts,
    side: Side,
    direction: Direction,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    unseen: Unseen | None = None,
    *,
    target: str,
    foil: str,
    policy: str | None = None,
    cue: str | None = None,
) -> Sweep:
    counts = resample_counts(len(contrasts.rows), seed)
    draws = patched.effects(counts)
    return Sweep(
        kind=contrasts.kind,
        checkpoint=side,
        direction=direction,
        clean=contrasts.clean,
        corrupt=contrasts.corrupt,
        policy=policy,
        cue=cue,
        questions=len(contrasts.rows),
        target=target,
        foil=foil,
        base=mean_interval(patched.base, counts),
        goal=mean_interval(patched.goal, counts),
        labels=position_labels(contrasts, tokenizer),
        spans=dict(contrasts.rows[0].spans) if aligned(contrasts) else {},
        effects=tuple(
            Effect(site=site, effect=interval(draws[:, i], counts, digits=4)) for i, site in enumerate(patched.sites)
        ),
        unseen=unseen,
    )


def _reader(
    lens: Lens, contrasts: Contrasts, side: Side, position: str, seed: int, searched: tuple[Bench, Patched] | None
) -> ReaderHeads:
    found = find_reader(lens, contrasts, position, seed, searched)
    counts = resample_counts(len(contrasts.half(1).rows), seed)
    margin = interval(found.margin, counts)
    return ReaderHeads(
        kind=contrasts.kind,
        checkpoint=side,
        heads=found.heads,
        questions=counts.shape[1],
        chosen_effect=found.chosen_effect,
        effect=interval(found.effect, counts),
        margin=margin,
        rival=found.rival,
        first=None if margin.low is None or counts.shape[1] < FEWEST else margin.low > 0,
    )


def _attention(
    lenses: dict[Side, Lens], contrasts: Contrasts, readers: list[ReaderHeads], tokenizer: PreTrainedTokenizerBase
) -> tuple[Attention, ...]:
    """Where the heads that read the cue in R look from the policy word, in S and in R."""
    labels = position_labels(contrasts, tokenizer)
    heads = [
        head for reader in readers if (reader.kind, reader.checkpoint) == ("cue", "after") for head in reader.heads
    ]
    if not labels:
        return ()
    found = []
    for side, lens in lenses.items():
        both = sides(lens, contrasts)
        patterns = [
            lens.capture(batch, [(head.layer, "pattern") for head in heads])[0] for batch in (both.clean, both.corrupt)
        ]
        for head in heads:
            under = {
                cue: tuple(round(float(x), 6) for x in pattern[head.layer, "pattern"][:, head.head, -1].mean(0))
                for cue, pattern in zip((contrasts.clean, contrasts.corrupt), patterns, strict=True)
            }
            found.append(Attention(head=head, checkpoint=side, labels=labels, under=under))
    return tuple(found)
