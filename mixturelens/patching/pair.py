"""Patching of a pair: the cue contrast, the hint contrast, and S's activations in R, to one record."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from mixturelens.behaviour.harm import find_harm
from mixturelens.behaviour.record import BehaviourRecord
from mixturelens.contrasts import (
    Contrasts,
    aligned,
    checkpoint_contrasts,
    cue_contrasts,
    hint_contrasts,
    position_labels,
)
from mixturelens.hooks.lens import Lens, lens_of
from mixturelens.hooks.sides import sides
from mixturelens.models import Pair
from mixturelens.patching.record import Attention, Effect, PatchingRecord, ReaderHeads, Sweep
from mixturelens.patching.sweep import (
    BY_POSITION,
    Direction,
    Patched,
    all_sites,
    find_reader,
    left_out,
    patch,
)
from mixturelens.stats import interval, mean_interval, resample_counts
from mixturelens.types import InputError, Side, Site

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Say = Callable[[str], None]

FEWEST = 8
"""Judging questions, with fewer of which a bootstrap says nothing."""


def patching_record(
    pair: Pair,
    behaviour: BehaviourRecord,
    *,
    seed: int = 0,
    say: Say | None = None,
) -> PatchingRecord:
    """Where cue and hint are read in S and in R, and which of S's activations undo in R what RL did.

    Raises InputError if the trained cue is not known, or the prompts of a contrast cannot be aligned.
    """
    say = say or (lambda _: None)
    harm = find_harm(behaviour)
    pair = pair.spelled(behaviour.spelling)
    suite, tokenizer = pair.suite, pair.tokenizer
    lenses: dict[Side, Lens] = {side: lens_of(pair, side) for side in pair.sides}
    cue = cue_contrasts(suite, tokenizer, harm.policy, harm.trained_cue, harm.harmed_cue, harm.shows)
    target = f"answer under {harm.trained_cue}"
    foil = f"{harm.shows or 'other behaviour'} under {harm.harmed_cue}" if cue.rows[0].foil else "anything else"
    sweeps: list[Sweep] = []
    readers: list[ReaderHeads] = []
    missing = [
        f"patching {line}" for line in dict.fromkeys(line for each in lenses.values() for line in left_out(each))
    ]

    def attempt(what: str, work: Callable[[], None]) -> None:
        """What cannot be measured on this pair is said, and the rest is measured."""
        say(what)
        try:
            work()
        except InputError as error:
            missing.append(f"{what}: {error}")

    def of_cue(side: Side) -> None:
        lens, words = lenses[side], {"target": target, "foil": foil, "policy": harm.policy}
        sites = _sites(lens, cue)
        sweeps.append(_sweep(patch(lens, cue, sites), cue, side, "denoise", seed, tokenizer, **words))
        heads = [site for site in sites if site.component == "z"]
        noised = patch(lens, cue, heads, direction="noise")
        sweeps.append(_sweep(noised, cue, side, "noise", seed, tokenizer, **words))
        readers.append(_reader(lens, cue, side, "policy", seed))

    def of_hint(side: Side) -> None:
        hint = hint_contrasts(suite, tokenizer, harm.trained_cue, harm.policy, harm.other)
        lens = lenses[side]
        words = {"target": f"policy {harm.policy}", "foil": f"policy {harm.other}", "cue": harm.trained_cue}
        sites = [site for site in _sites(lens, hint) if site.component in BY_POSITION]
        sweeps.append(_sweep(patch(lens, hint, sites), hint, side, "denoise", seed, tokenizer, **words))
        readers.append(_reader(lens, hint, side, "last", seed))

    def of_checkpoints() -> None:
        same = checkpoint_contrasts(suite, tokenizer, harm.harmed_cue, harm.other, harm.policy)
        words = {"target": f"policy {harm.other}", "foil": f"policy {harm.policy}", "cue": harm.harmed_cue}
        sites = [site for site in _sites(lenses["after"], same) if site.component in BY_POSITION]
        moved = patch(lenses["after"], same, sites, before=lenses["before"])
        sweeps.append(_sweep(moved, same, "after", "denoise", seed, tokenizer, **words))

    hinted = {harm.policy, harm.other} <= {row.hint for row in suite.hinted if row.cue == harm.trained_cue}
    for side in lenses:
        attempt(f"patching the cue, {side}", functools.partial(of_cue, side))
        if hinted:
            attempt(f"patching the hint, {side}", functools.partial(of_hint, side))
    attempt("patching S into R", of_checkpoints)
    return PatchingRecord(
        trained_cue=harm.trained_cue,
        harmed_cue=harm.harmed_cue,
        policy=harm.policy,
        sweeps=tuple(sweeps),
        readers=tuple(readers),
        attention=_attention(lenses, cue, readers, tokenizer),
        missing=tuple(missing),
    )


def _sites(lens: Lens, contrasts: Contrasts) -> list[Site]:
    """Every position where questions are aligned, else every span that all questions have."""
    if aligned(contrasts):
        return all_sites(lens, range(len(contrasts.rows[0].clean)))
    shared = set.intersection(*(set(row.spans) for row in contrasts.rows))
    names = [name for name in contrasts.rows[0].spans if name in shared]
    return all_sites(lens, names, everywhere=not any(row.shift for row in contrasts.rows))


def _sweep(
    patched: Patched,
    contrasts: Contrasts,
    side: Side,
    direction: Direction,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
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
            Effect(site=site, effect=interval(draws[:, i], digits=4)) for i, site in enumerate(patched.sites)
        ),
    )


def _reader(lens: Lens, contrasts: Contrasts, side: Side, position: str, seed: int) -> ReaderHeads:
    found = find_reader(lens, contrasts, position, seed)
    margin = interval(found.margin)
    return ReaderHeads(
        kind=contrasts.kind,
        checkpoint=side,
        heads=found.heads,
        questions=len(contrasts.half(1).rows),
        chosen_effect=found.chosen_effect,
        effect=interval(found.effect),
        margin=margin,
        rival=found.rival,
        first=None if margin.low is None or len(contrasts.half(1).rows) < FEWEST else margin.low > 0,
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
