"""Patching of a pair: the cue contrast, the hint contrast, and S's activations in R, to one record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mixturelens.behaviour.record import BehaviourRecord, find_harm
from mixturelens.contrasts import Contrasts, checkpoint_contrasts, cue_contrasts, hint_contrasts
from mixturelens.hooks.lens import Lens, load_lens
from mixturelens.patching.labels import aligned, position_labels
from mixturelens.patching.record import Attention, Effect, PatchingRecord, ReaderHeads, Sweep
from mixturelens.patching.sides import sides
from mixturelens.patching.sweep import (
    BY_POSITION,
    Direction,
    Patched,
    all_sites,
    find_reader,
    patch,
)
from mixturelens.stats import interval, mean_interval, resample_counts
from mixturelens.suite import Suite
from mixturelens.types import Side, Site

Say = Callable[[str], None]


def patching_record(
    before: Path,
    after: Path,
    suite: Suite,
    behaviour: BehaviourRecord,
    *,
    device: str = "cpu",
    seed: int = 0,
    say: Say | None = None,
) -> PatchingRecord:
    """Where cue and hint are read in S and in R, and which of S's activations undo in R what RL did.

    Raises InputError if the trained cue is not known, or the prompts of a contrast cannot be aligned.
    """
    say = say or (lambda _: None)
    harm = find_harm(behaviour)
    lenses: dict[Side, Lens] = {"before": load_lens(before, device), "after": load_lens(after, device)}
    tokenizer = lenses["after"].tokenizer
    cue = cue_contrasts(suite, tokenizer, harm.policy, harm.trained_cue, harm.harmed_cue)
    hints = {row.hint for row in suite.hinted if row.cue == harm.trained_cue}
    hint = (
        hint_contrasts(suite, tokenizer, harm.trained_cue, harm.policy, harm.other)
        if {harm.policy, harm.other} <= hints
        else None
    )
    same = checkpoint_contrasts(suite, tokenizer, harm.harmed_cue, harm.other, harm.policy)
    answering, refusing = f"answer under {harm.trained_cue}", f"behaviour under {harm.harmed_cue}"
    sweeps, readers = [], []
    for side, lens in lenses.items():
        say(f"patching the cue, {side}")
        sites = _sites(lens, cue)
        words = {"target": answering, "foil": refusing, "policy": harm.policy}
        sweeps.append(_sweep(patch(lens, cue, sites), cue, side, "denoise", seed, tokenizer, **words))
        heads = [site for site in sites if site.component == "z"]
        noised = patch(lens, cue, heads, direction="noise")
        sweeps.append(_sweep(noised, cue, side, "noise", seed, tokenizer, **words))
        readers.append(_reader(lens, cue, side, "policy", seed))
        if hint is not None:
            say(f"patching the hint, {side}")
            some = [site for site in _sites(lens, hint) if site.component in BY_POSITION]
            words = {"target": f"policy {harm.policy}", "foil": f"policy {harm.other}", "cue": harm.trained_cue}
            sweeps.append(_sweep(patch(lens, hint, some), hint, side, "denoise", seed, tokenizer, **words))
            readers.append(_reader(lens, hint, side, "last", seed))
    say("patching S into R")
    some = [site for site in _sites(lenses["after"], same) if site.component in BY_POSITION]
    moved = patch(lenses["after"], same, some, before=lenses["before"])
    words = {"target": f"policy {harm.other}", "foil": f"policy {harm.policy}", "cue": harm.harmed_cue}
    sweeps.append(_sweep(moved, same, "after", "denoise", seed, tokenizer, **words))
    return PatchingRecord(
        trained_cue=harm.trained_cue,
        harmed_cue=harm.harmed_cue,
        policy=harm.policy,
        sweeps=tuple(sweeps),
        readers=tuple(readers),
        attention=_attention(lenses, cue, readers, tokenizer),
    )


def _sites(lens: Lens, contrasts: Contrasts) -> list[Site]:
    """Every position where questions are aligned, else every span that all questions have."""
    if aligned(contrasts):
        return all_sites(lens, range(len(contrasts.rows[0].clean)))
    shared = set.intersection(*(set(row.spans) for row in contrasts.rows))
    return all_sites(lens, [name for name in contrasts.rows[0].spans if name in shared])


def _sweep(
    patched: Patched,
    contrasts: Contrasts,
    side: Side,
    direction: Direction,
    seed: int,
    tokenizer: object,
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
        first=None if not margin.measured else (margin.low or 0.0) > 0,
    )


def _attention(
    lenses: dict[Side, Lens], contrasts: Contrasts, readers: list[ReaderHeads], tokenizer: object
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
